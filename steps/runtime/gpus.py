"""The NVIDIA GPUs of this machine, told from their device files and the driver's, without importing torch."""

import itertools
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

_DRIVER = Path("/proc/driver/nvidia")
_DEVICES = Path("/dev")
_PREFIXES = ("GPU-", "MIG-")
_UUID, _MINOR, _MODEL = "GPU UUID", "Device Minor", "Model"
"""What the driver's folder tells of a GPU. The minor number is that of its device file, in containers as well."""


def gpus() -> list[str]:
    """Return the NVIDIA GPUs that may be used, by the names that `CUDA_VISIBLE_DEVICES` gives them.

    As for CUDA, ` 1`, `01` and `1st` are all GPU 1, the list ends before the first name that no GPU has or that is of
    another sort than those before it, and of a list that names one GPU twice nothing is left.
    """
    there = device_files()
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None or not there:
        return [str(number) for number in range(there)]
    names = [name.strip() for name in chosen.split(",")]
    prefix = next((prefix for prefix in _PREFIXES if names[0].startswith(prefix)), "")
    if prefix:
        named = list(itertools.takewhile(lambda name: name.startswith(prefix), names))
        found = list(itertools.takewhile(_may_be_there, named))
    else:
        numbers = itertools.takewhile(bool, (re.match(r"\+?([0-9]+)", name) for name in names))
        named = [str(int(number[1])) for number in numbers if number]
        found = list(itertools.takewhile(lambda name: int(name) < there, named))
    twice = len(set(named)) < len(named) or len(set(map(physical_name, found))) < len(found)
    return [] if twice else found


def physical_name(name: str) -> str:
    """Return the number of a GPU's device file for the name that `CUDA_VISIBLE_DEVICES` gives it.

    The name may be its UUID, shortened, or its place among the GPUs that are given to this container. CUDA counts GPUs
    of one model by their addresses; of several models it counts the fastest first, and a number is taken as it stands.
    """
    told = _told()
    if name.startswith("GPU-"):
        found = [gpu for gpu in told if gpu.get(_UUID, "").startswith(name)]
    else:
        ours = [gpu for gpu in told if (_DEVICES / f"nvidia{gpu.get(_MINOR)}").exists()]
        in_order = len({gpu.get(_MODEL) for gpu in ours}) == 1 or os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
        found = ours[int(name) :][:1] if name.isdecimal() and in_order and len(ours) == device_files() else []
    return found[0].get(_MINOR, name) if len(found) == 1 else name


def device_files() -> int:
    """Return for how many GPUs there are device files; a container may know the driver and have none."""
    return len(list(_DEVICES.glob("nvidia[0-9]*")))


def _may_be_there(name: str) -> bool:
    """Whether a GPU may have this name; the driver tells a UUID by question marks before the GPU is first used."""
    uuids = [gpu.get(_UUID, "?") for gpu in _told()]
    return name.startswith("MIG-") or not uuids or any("?" in uuid or uuid.startswith(name) for uuid in uuids)


def _told() -> Sequence[dict[str, str]]:
    """Return what the driver's folder tells of each GPU, in the order of their addresses."""
    found = []
    for path in sorted(_DRIVER.glob("gpus/*/information")):
        with suppress(OSError):
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            found.append({key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)})
    return found


def gpus_identity() -> str:
    """Return the models of all GPUs and the driver's version as one text; empty where there is none."""
    told = [gpu[_MODEL] for gpu in _told() if _MODEL in gpu]
    with suppress(OSError):
        told.append((_DRIVER / "version").read_text(encoding="utf-8", errors="replace").splitlines()[0])
    if not told and (count := device_files()):
        told.append(f"{count} GPUs")
    return "; ".join(told)
