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


def dying_variant(death: str, folder: Path, name: str = "newest") -> None:
    """Put a processor backend into a folder of llama.cpp's that calls itself the best and dies when it is loaded."""
    source = (
        f"int ggml_backend_score(void) {{ return 1 << 20; }}\nvoid *ggml_backend_init(void) {{ {death} return 0; }}"
    )
    compiled(source, folder / f"libggml-cpu-{name}.so")


def llama_cpp_with(death: str, folder: Path, *, others: bool) -> Path:
    """Return a folder of llama.cpp's libraries with a backend that dies, beside the real ones or alone."""
    folder.mkdir(parents=True)
    for path in LLAMA_CPP.glob("*.so"):
        if others or not path.name.startswith("libggml-cpu-"):
            shutil.copyfile(path, folder / path.name)
    dying_variant(death, folder)
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
