"""Print what posttrain costs beside the bare libraries: `make bench`, or `python -m tests.bench [SUBJECT]...`."""

import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.bench.flow import add_commands, add_flow, add_store
from tests.bench.llama_cpp import add_llama_cpp
from tests.bench.training import add_training
from tests.flows.command import Command


def main(subjects: list[str]) -> None:
    """Measure each subject: a recipe with its commands and the store, `training`, or `llama.cpp`."""
    for subject in subjects:
        with tempfile.TemporaryDirectory(prefix="posttrain-bench-") as folder:
            root = Path(folder)
            title = f"posttrain beside the bare libraries: {subject}"
            table = Table("what", "posttrain", "bare", "ratio or goal", title=title)
            if subject == "training":
                add_training(root, table)
            elif subject == "llama.cpp":
                add_llama_cpp(root, table)
            else:
                add_flow(subject, root, table)
                add_commands(subject, Command(root / "home"), table)
                add_store(root, table)
            Console(width=120).print(table)


if __name__ == "__main__":
    main(sys.argv[1:] or ["pico", "training", "llama.cpp"])
