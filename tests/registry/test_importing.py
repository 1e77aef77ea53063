"""MLflow is imported by one thread at a time, whichever of ours comes first."""

import ast
import subprocess
import sys
from collections.abc import Iterator

from registry.home import Home
from tests.flows.command import ROOT

THREADS = """
import sys, threading
from pathlib import Path
from registry.home import Home
from registry.record import Recorder
recorder = Recorder(Home.at(Path(sys.argv[1])))
together, ended = threading.Barrier(4), []
def alone(what):
    together.wait()
    what()
    ended.append(what)
calls = [recorder.warm_up, lambda: recorder.tracking.experiment("one"), lambda: recorder.find("0" * 64),
         lambda: recorder.begin("one", "", {})]
threads = [threading.Thread(target=alone, args=(call,)) for call in calls]
for each in (*threads,):
    each.start()
for each in threads:
    each.join()
print(len(ended))
"""


def imports(tree: ast.AST, inside: bool = False) -> Iterator[tuple[int, bool]]:
    """Yield the line of each import from MLflow, and whether it stands where none runs or where one thread does."""
    for node in ast.iter_child_nodes(tree):
        safe = inside
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            safe = True
        if isinstance(node, ast.With) and any(ast.unparse(item) == "importing()" for item in node.items):
            safe = True
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        if any(name.partition(".")[0] == "mlflow" for name in names):
            yield getattr(node, "lineno", 0), safe
        yield from imports(node, safe)


def test_every_import_from_mlflow_holds_off_the_others() -> None:
    found = {
        f"{path.relative_to(ROOT)}:{line}": safe
        for room in ("registry", "flows")
        for path in (ROOT / room).rglob("*.py")
        for line, safe in imports(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert len(found) > 10
    assert [place for place, safe in found.items() if not safe] == []


def test_threads_that_all_want_mlflow_first_all_get_it(home: Home) -> None:
    line = [sys.executable, "-c", THREADS, str(home.root)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("4", 0), done.stderr[-2000:]
