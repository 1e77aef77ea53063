"""Give llama.cpp the processor backend that fits this machine best; set-up puts this file into the package.

Set-up builds the backend several times (`libggml-cpu-haswell.so`, ...). Each tells by itself, before it executes
anything special, whether this processor can run it and how good it is (`ggml_backend_score`); the best is loaded.
Those that died on this kind of machine when they were proven are named in a note beside them and passed over.
`POSTTRAIN_LLAMA_CPP_VARIANT=haswell` takes that one, whatever else is there. Run as a program, this loads none and
prints where the note lies, and the variants that this processor can run, the best first.
"""

import _ctypes
import ctypes
import hashlib
import os
import platform
from pathlib import Path

VARIANT = "POSTTRAIN_LLAMA_CPP_VARIANT"
LIBRARIES = Path(os.environ.get("LLAMA_CPP_LIB_PATH") or Path(__file__).parent / "lib")
_PREFIX = "libggml-cpu-"


def variants(libraries: Path = LIBRARIES, passed_over: "frozenset[str]" = frozenset()) -> "list[str]":
    """Return the variants that this processor can run, the best first; files that cannot be opened are left out."""
    scores = {}
    for path in sorted(libraries.glob(f"{_PREFIX}*.so")):
        name = path.stem[len(_PREFIX) :]
        if name in passed_over:
            continue
        try:
            library = ctypes.CDLL(str(path))
            scores[name] = library.ggml_backend_score()
            _ctypes.dlclose(library._handle)
        except (OSError, AttributeError):
            continue
    return [name for name, score in sorted(scores.items(), key=lambda item: -item[1]) if score > 0]


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
    print(note(), *variants(), sep="\n")
else:
    loaded = load()
    """The variant that computes in this process."""
