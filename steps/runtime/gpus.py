"""The NVIDIA GPUs of this machine, told from their device files and the driver's, without importing torch."""

import itertools
import os
from contextlib import suppress
from pathlib import Path

_DRIVER = Path("/proc/driver/nvidia")


def gpus() -> list[str]:
    """Return the NVIDIA GPUs that may be used, by the names that `CUDA_VISIBLE_DEVICES` gives them.

    Like CUDA, it reads the same GPU in `1`, ` 1` and `01`, and none behind the first name that is none.
    """
    there = device_files()
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None or not there:
        return [str(number) for number in range(there)]
    names = [name.strip() for name in chosen.split(",")]
    known = itertools.takewhile(lambda name: name and not name.startswith("-"), names)
    return [str(int(name)) if name.isdecimal() else name for name in known]


def physical_name(name: str) -> str:
    """Return a GPU's number for the name that `CUDA_VISIBLE_DEVICES` gives it, which may be its UUID, shortened."""
    for path in sorted(_DRIVER.glob("gpus/*/information")):
        with suppress(OSError):
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
            if name.startswith("GPU-") and told.get("GPU UUID", "").startswith(name) and "Device Minor" in told:
                return told["Device Minor"]
    return name


def device_files() -> int:
    """Return for how many GPUs there are device files; a container may know the driver and have none."""
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def gpus_identity() -> str:
    """Return the models of all GPUs and the driver's version as one text; empty where there is none."""
    told = []
    for path in sorted(_DRIVER.glob("gpus/*/information")):
        with suppress(OSError):
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            told += [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]
    with suppress(OSError):
        told.append((_DRIVER / "version").read_text(encoding="utf-8", errors="replace").splitlines()[0])
    if not told and (count := device_files()):
        told.append(f"{count} GPUs")
    return "; ".join(told)
