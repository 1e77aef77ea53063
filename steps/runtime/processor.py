"""What processor this is, as the operating system tells. Imports only Python's own library: set-up reads it, too."""

import hashlib
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Processor:
    """A processor: two machines with equal ones run the same machine code."""

    architecture: str
    """As `uname -m` prints it: `x86_64`, `aarch64`."""
    model: str
    features: frozenset[str]
    """Instruction sets that the kernel lets programs use, by the names of `/proc/cpuinfo`; empty where it is absent."""

    @property
    def identity(self) -> str:
        """Digest that is equal on machines of the same kind."""
        told = "\n".join((self.architecture, self.model, *sorted(self.features)))
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    @property
    def is_amd(self) -> bool:
        """Whether AMD made it."""
        return "AMD" in self.model

    @property
    def level(self) -> str:
        """The widest arithmetic in a few words, for people."""
        widest = next((name for flag, name in _WIDEST if flag in self.features), "baseline")
        return ", ".join([widest, *(name for flag, name in _BESIDE if flag in self.features)])


_WIDEST = (
    ("avx512f", "AVX512"),
    ("avx2", "AVX2"),
    ("avx", "AVX"),
    ("sse4_2", "SSE4.2"),
    ("sve", "SVE"),
    ("asimd", "NEON"),
)
_BESIDE = (
    ("avx512_bf16", "AVX512-BF16"),
    ("avx512_vnni", "VNNI"),
    ("avx_vnni", "AVX-VNNI"),
    ("amx_tile", "AMX"),
    ("i8mm", "I8MM"),
)


def read_processor(cpuinfo: str, architecture: str) -> Processor:
    """Tell a processor from the text of `/proc/cpuinfo`; its first core stands for all."""
    fields: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip(), value.strip())
    if "model name" in fields:
        model = fields["model name"]
    else:
        parts = (fields.get(key, "") for key in ("CPU implementer", "CPU part", "CPU variant"))
        model = " ".join(filter(None, parts)) or architecture
    flags = fields.get("flags") or fields.get("Features") or ""
    return Processor(architecture, model, frozenset(flags.split()))


@cache
def this_processor() -> Processor:
    """Return the processor of this machine."""
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    return read_processor(text, platform.machine())
