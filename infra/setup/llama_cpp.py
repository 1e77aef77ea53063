"""llama.cpp and its Python binding as a wheel that runs on any processor of this architecture.

Built with `GGML_NATIVE` (the default of llama-cpp-python) it fits the processor at hand only, and on those with AMX its
first decode dies of SIGSEGV (llama.cpp issue 20824). So ggml's processor backend is built several times, as modules of
which one is chosen when the library is loaded (`backends.py`): for the oldest processor, for a common one, and for the
one at hand, never with AMX. What a backend must not use, it was not compiled with.

llama.cpp is configured directly instead of through the binding's own build, which would compile llama.cpp's `common`
part (chat parsers, an HTTP client) that Python never calls: a third of the time.
"""

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.setup.stages import Log, StageFailed
from steps.runtime.processor import Processor

_FLAGS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "x86_64": {
        "SSE42": ("sse4_2",),
        "AVX": ("avx",),
        "F16C": ("f16c",),
        "FMA": ("fma",),
        "AVX2": ("avx2",),
        "BMI2": ("bmi2",),
        "AVX_VNNI": ("avx_vnni",),
        "AVX512": ("avx512f", "avx512cd", "avx512vl", "avx512dq", "avx512bw"),
        "AVX512_VBMI": ("avx512vbmi",),
        "AVX512_VNNI": ("avx512_vnni",),
        "AVX512_BF16": ("avx512_bf16",),
    },
    "aarch64": {
        "DOTPROD": ("asimddp",),
        "FP16_VECTOR_ARITHMETIC": ("asimdhp", "fphp"),
        "SVE": ("sve",),
        "MATMUL_INT8": ("i8mm",),
        "SVE2": ("sve2",),
    },
}
"""ggml's names of features, and the flags in `/proc/cpuinfo` that stand for each. AMX and SME are left out on purpose:
no variant that needs a feature without a row here is ever built."""
_COMMON = {"x86_64": "haswell", "aarch64": "armv8.2_2"}
"""The variant that most machines of the last ten years can run."""
_LISTED = re.compile(r"^([ \t]*)(ggml_add_cpu_backend_variant\(([\w.]+)((?:[ \t]+\w+)*)\))", re.MULTILINE)
_OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "ON",
    "GGML_NATIVE": "OFF",
    "LLAMA_BUILD_COMMON": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_TOOLS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_SERVER": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "GGML_ALL_WARNINGS": "OFF",
    "LLAMA_ALL_WARNINGS": "OFF",
    "CMAKE_INSTALL_RPATH": "$ORIGIN",
    "CMAKE_BUILD_WITH_INSTALL_RPATH": "ON",
    # A wheel holds no symbolic links: each library has one name only.
    "CMAKE_PLATFORM_NO_VERSIONED_SONAME": "ON",
}
_SHAPING = re.compile(
    r"CMAKE_\w+|GGML_\w+|CC|CXX|(C|CXX|CPP|LD|CUDA|HIP)FLAGS|CUDA(ARCHS|CXX|HOSTCXX)|NVCC_\w+|HIPCXX"
    r"|CPATH|C(PLUS)?_INCLUDE_PATH|(LIBRARY|COMPILER)_PATH"
)
"""Environment variables that the compilers and CMake read."""
_FOR_THIS_PROCESSOR = re.compile(r"-m(arch|cpu|tune)=native")
_UNKNOWN_TO_COMPILER = re.compile(r"unrecognized|unknown argument|unsupported (argument|option)|no such instruction")
_LIGHTER = "\ntarget_compile_options(llama PRIVATE -O2)\n"


@dataclass(frozen=True)
class Variant:
    """One build of ggml's processor backend, as ggml lists it."""

    name: str
    """`haswell`; the library is `libggml-cpu-haswell.so`."""
    features: frozenset[str]
    """What it is compiled with, by ggml's names."""


def listed_variants(cmake: str, architecture: str) -> list[Variant]:
    """Read ggml's own list of variants from its `src/CMakeLists.txt`, those for other machines left out."""
    known = _FLAGS.get(architecture, {})
    found = [Variant(name, frozenset(features.split())) for _, _, name, features in _LISTED.findall(cmake)]
    plain = {"x86_64": "x64", "aarch64": "armv8.0_1"}.get(architecture)
    return [
        each
        for each in found
        if each.name == plain
        or (each.features and each.features <= known.keys() and (architecture != "aarch64" or each.name[:4] == "armv"))
    ]


def chosen_variants(variants: Sequence[Variant], processor: Processor) -> list[str]:
    """Return the variants to build: the one without any feature, the common one, and the best that runs here."""
    if not variants:
        return []
    flags = _FLAGS[processor.architecture]

    def runs_here(variant: Variant) -> bool:
        return all(flag in processor.features for feature in variant.features for flag in flags[feature])

    plain = min(variants, key=lambda each: len(each.features))
    best = max(filter(runs_here, variants), key=lambda each: len(each.features), default=plain)
    common = [each.name for each in variants if each.name == _COMMON[processor.architecture]]
    return list(dict.fromkeys([plain.name, *common, best.name]))


def keep_variants(cmake: str, names: Iterable[str]) -> str:
    """Return ggml's `src/CMakeLists.txt` with only the named variants in its list."""
    kept = set(names)
    return _LISTED.sub(lambda line: line[0] if line[3] in kept else f"{line[1]}# {line[2]}", cmake)


@dataclass(frozen=True)
class Builder:
    """Builds the wheel in a scratch directory.

    Args:
        python: the interpreter whose pip fetches the source and packs the wheel.
        version: of llama-cpp-python.
        processor: the one at hand.
        cache: directory of wheels that were built before.
    """

    python: Path
    version: str
    processor: Processor
    cache: Path

    @property
    def key(self) -> str:
        """Digest of all that shapes the wheel; a wheel of another kind of processor, or compiler, is never taken."""
        compilers = [shlex.split(os.environ.get(name) or usual) for name, usual in (("CXX", "c++"), ("CC", "cc"))]
        told = [_said_by([*words, "--version"]) for words in compilers]
        shaping = [name for name in os.environ if _SHAPING.fullmatch(name)]
        here = Path(__file__)
        own = [path.read_bytes() for path in (here, here.with_name("backends.py"), Path("infra/build.lock"))]
        content = {
            "version": self.version,
            "processor": [self.processor.architecture, *self._shaping_flags()],
            "system": [sys.platform, *platform.libc_ver()],
            "compiler": told,
            "environment": {name: os.environ[name] for name in sorted(shaping)},
            "set-up": [hashlib.sha256(each).hexdigest() for each in own],
        }
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]

    def _shaping_flags(self) -> list[str]:
        """Return the flags of this processor on which the choice of variants depends."""
        known = {flag for flags in _FLAGS.get(self.processor.architecture, {}).values() for flag in flags}
        return sorted(known & self.processor.features)

    def cached(self) -> Path | None:
        """Return the wheel that was built before of exactly this; one whose bytes were spoilt is none."""
        wheel = next(iter((self.cache / self.key).glob("*.whl")), None)
        try:
            return wheel if wheel and zipfile.ZipFile(wheel).testzip() is None else None
        except Exception:
            # A spoilt archive can raise nearly anything.
            return None

    def fetch(self, scratch: Path, log: Log) -> Path:
        """Fetch the tools and the source; return the source's directory."""
        tools = scratch / "tools"
        pip = [self.python, "-m", "pip", "--disable-pip-version-check", "--no-input"]
        log.run([*pip, "install", "--no-deps", "--target", tools, "-r", "infra/build.lock"])
        source = ["--no-deps", "--no-build-isolation", "--no-binary", "llama-cpp-python", "-d", scratch]
        log.run([*pip, "download", *source, f"llama-cpp-python=={self.version}"], **self._with_tools(scratch))
        archive = next(scratch.glob("llama_cpp_python-*.tar.gz"))
        with tarfile.open(archive) as stream:
            # Python 3.11.0 to 3.11.3 know no filter; the archive is one that pip has verified.
            options: Any = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
            stream.extractall(scratch, **options)
        return scratch / archive.name.removesuffix(".tar.gz")

    def build(self, source: Path, log: Log, *, safest: bool = False) -> Path:
        """Compile and pack the wheel, and put it into the cache; return its path there.

        Where the compiler does not know the best variant's instructions, the others are built without it.

        Args:
            source: directory of llama-cpp-python's source.
            log: where the compiler prints.
            safest: leave out the best variant, whose instructions are the newest.

        Raises:
            StageFailed: it does not compile.
        """
        listed = self._list(source).read_text(encoding="utf-8")
        names = chosen_variants(listed_variants(listed, self.processor.architecture), self.processor)
        if safest:
            names = names[:2]
        try:
            self.compile(source, names, log)
        except StageFailed:
            if len(names) < 3:
                raise
            too_new = _UNKNOWN_TO_COMPILER.search(log.tail(200)) is not None
            self.compile(source, names[:2], log)
            # Any other fault may pass: what was made without the best is not kept as what fits this processor.
            return self._pack(source, self.key if too_new else f"{self.key}-without-{names[2]}", log)
        return self._pack(source, self.key, log)

    def compile(self, source: Path, names: Sequence[str], log: Log) -> None:
        """Compile llama.cpp with the named variants, or without any; the libraries come to lie in the package.

        Raises:
            StageFailed: it does not compile.
        """
        llama, ggml = source / "vendor" / "llama.cpp", self._list(source)
        listed = ggml.read_text(encoding="utf-8")
        # No arithmetic is in this part, which lays out graphs: as fast as with -O3, and compiled in 10 s less.
        if _LIGHTER not in (text := (llama / "src" / "CMakeLists.txt").read_text(encoding="utf-8")):
            (llama / "src" / "CMakeLists.txt").write_text(text + _LIGHTER, encoding="utf-8")
        ggml.write_text(keep_variants(listed, names), encoding="utf-8")
        try:
            self._run_cmake(source, llama, names, log)
        finally:
            ggml.write_text(listed, encoding="utf-8")

    @staticmethod
    def _list(source: Path) -> Path:
        """Return the file in which ggml lists its variants."""
        return source / "vendor" / "llama.cpp" / "ggml" / "src" / "CMakeLists.txt"

    def _run_cmake(self, source: Path, llama: Path, names: Sequence[str], log: Log) -> None:
        options = dict(_OPTIONS)
        if names:
            options |= {"GGML_BACKEND_DL": "ON", "GGML_CPU_ALL_VARIANTS": "ON"}
        build = Path(tempfile.mkdtemp(prefix="build-", dir=source.parent))
        words = [f"-D{name}={value}" for name, value in options.items()] + shlex.split(os.environ.get("CMAKE_ARGS", ""))
        tools = self._with_tools(source.parent)
        cmake = source.parent / "tools" / "bin" / "cmake"
        log.run([cmake, "-G", "Ninja", "-S", llama, "-B", build, *words], **tools)
        # Packages are unpacked meanwhile by one process, which takes as long alone: the compilers give way to it.
        log.run(["nice", "-n", "19", cmake, "--build", build, "--target", "llama"], **tools)
        libraries = source / "llama_cpp" / "lib"
        shutil.rmtree(libraries, ignore_errors=True)
        libraries.mkdir()
        for path in (build / "bin").glob("lib*"):
            if path.suffix in (".so", ".dylib"):
                shutil.copyfile(path, libraries / path.name)
        shutil.rmtree(build)

    def _pack(self, source: Path, key: str, log: Log) -> Path:
        """Pack binding and libraries, with what chooses among them, and place the wheel in one rename."""
        shutil.copyfile(Path(__file__).with_name("backends.py"), source / "llama_cpp" / "_backends.py")
        start = source / "llama_cpp" / "__init__.py"
        line = "from . import _backends  # chooses the processor backend; added by posttrain's set-up\n"
        if line not in (text := start.read_text(encoding="utf-8")):
            start.write_text(line + text, encoding="utf-8")
        # It would keep the libraries out of the wheel.
        (source / ".gitignore").unlink(missing_ok=True)
        self.cache.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=self.cache))
        pack = ["wheel", "--no-deps", "--no-build-isolation", "-w", staging, source]
        words = [self.python, "-m", "pip", "--disable-pip-version-check", "--no-cache-dir", *pack]
        packer = {"SKBUILD_WHEEL_CMAKE": "false", "SKBUILD_WHEEL_PLATLIB": "true"}
        place = self.cache / key
        try:
            log.run(words, **self._with_tools(source.parent), **packer)
            # Others may share this cache; a scratch directory is its maker's alone.
            staging.chmod(0o755)
            shutil.rmtree(place, ignore_errors=True)
            staging.replace(place)
        except OSError:
            # Another set-up placed the same meanwhile, or this user may not replace what another placed.
            if not any(place.glob("*.whl")):
                raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return next(place.glob("*.whl"))

    @staticmethod
    def _with_tools(scratch: Path) -> dict[str, str]:
        tools = scratch / "tools"
        path = os.pathsep.join([str(tools / "bin"), os.environ.get("PATH", "")])
        # What is for this processor alone would pass into the variants for others.
        given = {name: os.environ[name] for name in ("CFLAGS", "CXXFLAGS", "CPPFLAGS") if name in os.environ}
        portable = {name: _FOR_THIS_PROCESSOR.sub("", value) for name, value in given.items()}
        return {"PYTHONPATH": str(tools), "PATH": path, **portable}


def _said_by(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout
    except OSError:
        return ""
