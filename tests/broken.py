"""Native libraries that die when they are called: compiled here, and put where a real one is looked for."""

import shutil
import subprocess
import sysconfig
from pathlib import Path

PACKAGES = Path(sysconfig.get_paths()["purelib"])
LLAMA_CPP = PACKAGES / "llama_cpp" / "lib"

ABORT, ILLEGAL = "abort();", "__builtin_trap();"
"""Deaths: by SIGABRT, and by an instruction that no processor has (SIGILL on x86)."""


def compiled(source: str, target: Path) -> Path:
    """Compile a shared library from C."""
    text = f"#include <signal.h>\n#include <unistd.h>\n#include <stdlib.h>\n#include <pthread.h>\n{source}\n"
    command = ["cc", "-shared", "-fPIC", "-O0", "-x", "c", "-", "-o", str(target), "-lpthread"]
    subprocess.run(command, input=text, text=True, check=True)
    return target


def dying_variant(death: str, folder: Path, name: str = "newest", *, at_once: bool = False) -> None:
    """Put a processor backend into a folder of llama.cpp's that calls itself the best and dies when it is loaded.

    Args:
        death: what it does, in C.
        folder: where the others lie.
        name: the variant's.
        at_once: whether it dies as soon as it is opened, before it has told how good it is.
    """
    source = (
        f"int ggml_backend_score(void) {{ return 1 << 20; }}\nvoid *ggml_backend_init(void) {{ {death} return 0; }}"
    )
    opened = f"__attribute__((constructor)) static void die(void) {{ {death} }}" if at_once else ""
    compiled(f"{source}\n{opened}", folder / f"libggml-cpu-{name}.so")


def llama_cpp_with(death: str, folder: Path, *, others: bool, at_once: bool = False) -> Path:
    """Return a folder of llama.cpp's libraries with a backend that dies, beside the real ones or alone."""
    folder.mkdir(parents=True)
    for path in LLAMA_CPP.glob("*.so"):
        if others or not path.name.startswith("libggml-cpu-"):
            shutil.copyfile(path, folder / path.name)
    dying_variant(death, folder, at_once=at_once)
    return folder


def package_with(name: str, library: str, death: str, folder: Path) -> Path:
    """Return a folder for PYTHONPATH that holds an installed package, one of its libraries replaced by a dying one."""
    overlay = folder / "site-packages" / name
    overlay.mkdir(parents=True)
    for path in (PACKAGES / name).iterdir():
        if path.name != library:
            (overlay / path.name).symlink_to(path)
    compiled(f"__attribute__((constructor)) static void die(void) {{ {death} }}", overlay / library)
    return folder / "site-packages"


def module_with(name: str, death: str, folder: Path) -> Path:
    """Return a folder for PYTHONPATH that holds a native module which dies as it is imported."""
    target = folder / "site-packages" / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    target.parent.mkdir(parents=True, exist_ok=True)
    compiled(f"__attribute__((constructor)) static void die(void) {{ {death} }}", target)
    return target.parent
