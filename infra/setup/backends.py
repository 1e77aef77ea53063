"""Give llama.cpp the processor backend that fits this machine best; set-up puts this file into the package.

Set-up builds the backend several times (`libggml-cpu-haswell.so`, ...). Each tells by itself, before it executes
anything special, whether this processor can run it and how good it is (`ggml_backend_score`); the best is loaded.
One that died here when it was proven is named in `lib/avoid.txt` and passed over. `POSTTRAIN_LLAMA_CPP_VARIANT=haswell`
takes that one, whatever else is there. Run as a program it loads none and prints those that this processor can run.
"""

import _ctypes
import ctypes
import os
from pathlib import Path

VARIANT = "POSTTRAIN_LLAMA_CPP_VARIANT"
LIBRARIES = Path(os.environ.get("LLAMA_CPP_LIB_PATH") or Path(__file__).parent / "lib")
_PREFIX = "libggml-cpu-"


def variants(libraries: Path = LIBRARIES) -> "dict[str, int]":
    """Return the variants that this processor can run, by name, with ggml's score of each; the best first."""
    scores = {}
    for path in sorted(libraries.glob(f"{_PREFIX}*.so")):
        library = ctypes.CDLL(str(path))
        scores[path.stem[len(_PREFIX) :]] = library.ggml_backend_score()
        _ctypes.dlclose(library._handle)
    return {name: score for name, score in sorted(scores.items(), key=lambda item: -item[1]) if score > 0}


def avoided(libraries: Path = LIBRARIES) -> "set[str]":
    """Return the variants that died here when they were proven."""
    try:
        return set((libraries / "avoid.txt").read_text(encoding="utf-8").split())
    except OSError:
        return set()


def load(libraries: Path = LIBRARIES) -> str:
    """Load the best processor backend, and whatever other backends were built; return the variant's name.

    Empty where the backend is part of the library, as in builds of other origin.
    """
    if not any(libraries.glob(f"{_PREFIX}*.so")):
        return ""
    wanted = os.environ.get(VARIANT)
    usable = [name for name in variants(libraries) if name not in avoided(libraries)]
    name = wanted or next(iter(usable), "")
    if not name:
        raise ImportError(f"llama.cpp: no processor backend in {libraries} runs on this machine; run `make setup`")
    ggml = ctypes.CDLL(str(libraries / "libggml.so"))
    ggml.ggml_backend_load.restype = ctypes.c_void_p
    ggml.ggml_backend_load.argtypes = [ctypes.c_char_p]
    others = [
        path for path in libraries.glob("libggml-*.so") if not path.stem.startswith(("libggml-cpu", "libggml-base"))
    ]
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
    print(*variants())
else:
    loaded = load()
    """The variant that computes in this process."""
