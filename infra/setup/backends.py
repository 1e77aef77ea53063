"""Give llama.cpp the processor backend that fits this machine best; set-up puts this file into the package.

Set-up builds the backend several times (`libggml-cpu-haswell.so`, ...). Each tells by itself, before it executes
anything special, whether this processor can run it and how good it is (`ggml_backend_score`); the best is loaded.
Those that died on this kind of machine when they were proven are named in a note beside them and passed over.
`POSTTRAIN_LLAMA_CPP_VARIANT=haswell` takes that one, whatever else is there. Run as a program, this loads none and
prints where the note lies, and the variants that this processor can run, the best first, before them those that die
as they are opened; each is opened in a child of its own.
"""

import _ctypes
import ctypes
import hashlib
import os
import platform
import subprocess
import sys
from pathlib import Path

VARIANT = "POSTTRAIN_LLAMA_CPP_VARIANT"
LIBRARIES = Path(os.environ.get("LLAMA_CPP_LIB_PATH") or Path(__file__).parent / "lib")
_PREFIX = "libggml-cpu-"


def variants(libraries: Path = LIBRARIES, passed_over: "frozenset[str]" = frozenset()) -> "list[str]":
    """Return the variants that this processor can run, the best first; files that cannot be opened are left out."""
    _open_base(libraries)
    scores = {name: _score(libraries, name) for name in _names(libraries) if name not in passed_over}
    return [name for name, score in sorted(scores.items(), key=lambda item: -item[1]) if score > 0]


def variants_and_deaths(libraries: Path = LIBRARIES) -> "list[str]":
    """Return the variants that die as they are opened, then those that this processor can run, the best first."""
    scores = {}
    for name in _names(libraries):
        done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True)
        scores[name] = 1 << 30 if done.returncode < 0 else int(done.stdout or 0)
    return [name for name, score in sorted(scores.items(), key=lambda item: -item[1]) if score > 0]


def _names(libraries: Path) -> "list[str]":
    return [path.stem[len(_PREFIX) :] for path in sorted(libraries.glob(f"{_PREFIX}*.so"))]


def _score(libraries: Path, name: str) -> int:
    """Return how good a variant is on this processor; 0 where it cannot run, or cannot be opened."""
    try:
        library = ctypes.CDLL(str(libraries / f"{_PREFIX}{name}.so"))
        score = library.ggml_backend_score()
        _ctypes.dlclose(library._handle)
    except (OSError, AttributeError):
        return 0
    return score


def _open_base(libraries: Path) -> None:
    """Open ggml's own base by its full path: `LD_LIBRARY_PATH` may lead to another program's."""
    base = libraries / "libggml-base.so"
    if base.exists():
        ctypes.CDLL(str(base))


def note(libraries: Path = LIBRARIES) -> Path:
    """Return where the variants that died on this kind of processor are noted."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    told = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    kind = hashlib.sha256("\n".join([platform.machine(), *sorted(told)]).encode()).hexdigest()[:16]
    return libraries / f"avoid-{kind}.txt"


def load(libraries: Path = LIBRARIES) -> str:
    """Load the best processor backend, and whatever other backends were built; return the variant's name.

    Empty where the backend is part of the library, as in builds of other origin.
    """
    if not any(libraries.glob(f"{_PREFIX}*.so")):
        return ""
    _open_base(libraries)
    name = os.environ.get(VARIANT, "")
    if not name:
        path = note(libraries)
        avoided = frozenset(path.read_text(encoding="utf-8", errors="replace").split() if path.is_file() else ())
        name = next(iter(variants(libraries, avoided)), "")
    if not name:
        raise ImportError(f"llama.cpp: no processor backend in {libraries} runs on this machine; run infra/setup.sh")
    ggml = ctypes.CDLL(str(libraries / "libggml.so"))
    ggml.ggml_backend_load.restype = ctypes.c_void_p
    ggml.ggml_backend_load.argtypes = [ctypes.c_char_p]
    own = ("libggml-base", "libggml-cpu")
    others = [path for path in libraries.glob("libggml-*.so") if not path.stem.startswith(own)]
    _keep_quiet(ggml, quiet=True)
    try:
        for path in sorted(others):
            ggml.ggml_backend_load(str(path).encode())
        if not ggml.ggml_backend_load(str(libraries / f"{_PREFIX}{name}.so").encode()):
            raise ImportError(f"llama.cpp: its variant `{name}` does not run on this processor ({VARIANT})")
    finally:
        _keep_quiet(ggml, quiet=False)
    return name


def _keep_quiet(ggml: ctypes.CDLL, *, quiet: bool) -> None:
    """Have ggml say nothing, or print to standard error again: every load would be announced there."""
    ggml.ggml_log_set(_silence if quiet else None, None)


_silence = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)

if __name__ == "__main__":
    if len(sys.argv) > 1:
        _open_base(LIBRARIES)
        print(_score(LIBRARIES, sys.argv[1]))
    else:
        print(note(), *variants_and_deaths(), sep="\n")
else:
    loaded = load()
    """The variant that computes in this process."""
