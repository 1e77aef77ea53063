"""Several processes for one step: the command that starts them, what a machine lacks for them, and which one speaks.

Every process runs the step's whole function (a trainer divides the rows among them); the main one, rank 0, alone logs,
reports and publishes. `accelerate launch` starts them by a profile in `infra/accelerate/`.

Several nodes share the home's directory. The flow runs on the first; the environment of all names its address in
`MASTER_ADDR` (and a free port of it in `MASTER_PORT`, 29500 where that is unset). On each other node `posttrain join`
takes part in every such step; the node's number, from 1, is in `NODE_RANK`.
"""

import ctypes
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from steps.frame.config import Resources
from steps.frame.errors import UserError
from steps.frame.spec import RESULT_NAME, SPEC_NAME, StepResult, StepSpec
from steps.runtime.gpus import gpus
from steps.runtime.verdicts import BROKEN, broken_here, is_broken

PROFILES = Path(__file__).parents[2] / "infra" / "accelerate"
DEEPSPEED = Path(sys.prefix) / "share" / "posttrain" / "deepspeed"
JOIN_NAME = "join"
"""File in a step's work directory that is there while other nodes may take part."""
NODE_RANK, ADDRESS, PORT = "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"
_PR_SET_PDEATHSIG = 1
_BUSY = 0.3
"""Cores in use by others from which the machine counts as shared."""
_MOMENTS = 4
_SET_BY_LAUNCHER = re.compile(rf"((LOCAL|GROUP|ROLE)_)?(RANK|WORLD_SIZE)|ROLE_NAME|TORCHELASTIC_\w+|{ADDRESS}|{PORT}")
"""What a launcher tells its processes of their group."""


def launch_command(resources: Resources, python: str = sys.executable, node: int = 0) -> list[str]:
    """Return the command that runs a module on a node, all but the module itself.

    The number of threads is what the node's cores leave for each process. On one node any free port will do.
    """
    if resources.world == 1:
        return [python]
    one = resources.nodes == 1
    options = {
        "config_file": PROFILES / f"{resources.launcher}.yaml",
        "num_processes": resources.world,
        "num_machines": resources.nodes,
        "machine_rank": node,
        "main_process_ip": "127.0.0.1" if one else os.environ[ADDRESS],
        "main_process_port": 0 if one else os.environ.get(PORT, 29500),
        "num_cpu_threads_per_process": threads(resources),
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [python, "-m", "accelerate.commands.launch", *words]


def cores() -> int:
    """Return how many processors this process may use: all, or those it is bound to."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads(resources: Resources) -> int:
    """Return the cores that each process of a step may use."""
    return max((resources.cpus or cores()) // resources.local_processes, 1)


def lacking(resources: Resources) -> tuple[str, str]:
    """Return which of a step's `resources` this machine cannot give, and why; two empty texts where it can."""
    here = len(gpus())
    if resources.gpus > here:
        several = "GPUs are" if resources.gpus > 1 else "GPU is"
        return "gpus", f"{resources.gpus} {several} asked for, this machine has {here or 'none'}"
    if resources.nodes > 1 and ADDRESS not in os.environ:
        return (
            "nodes",
            f"{resources.nodes} nodes are asked for; set {ADDRESS} to this one's address (see `posttrain join`)",
        )
    if _by_deepspeed(resources) and not DEEPSPEED.exists() and importlib.util.find_spec("deepspeed") is None:
        return "launch", f"`{resources.launcher}` needs the package deepspeed, which is not installed; run `make setup`"
    return "", ""


def launcher_environment(resources: Resources) -> dict[str, str]:
    """Return what a launcher's environment needs beyond that of other steps, if DeepSpeed shares the work.

    It lies beside the other packages, not among them: accelerate imports it, where it finds it, whenever a trained
    model is unwrapped, which takes a second of every training. It compiles its kernels with this environment's ninja.
    """
    if not _by_deepspeed(resources):
        return {}
    tools = str(Path(sys.executable).parent)
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(DEEPSPEED)))),
        "PATH": os.pathsep.join(filter(None, (tools, os.environ.get("PATH")))),
    }


def _by_deepspeed(resources: Resources) -> bool:
    return resources.world > 1 and resources.launcher.startswith("zero")


def die_with_parent() -> None:
    """Ask the kernel (Linux) to kill this process when its parent dies, however that happens.

    The kernel means the thread that forked; in the fork server and in a launcher that is the main thread, which lives
    as long as they do.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def rank_of(spec: StepSpec) -> int:
    """Return this process's number among all of its step; 0 is the main one."""
    return int(os.environ.get("RANK", 0)) if spec.resources.world > 1 else 0


def use_devices(spec: StepSpec) -> None:
    """Show CUDA the GPUs that were granted to a step, before anything touches one.

    A step that asks for none may use the machine's first, which it shares with others; of more than one the trainers
    would each take a part of the batch.
    """
    broken = is_broken("CUDA")
    granted = spec.devices or (gpus()[:1] if spec.resources.world == 1 and not broken else [])
    if granted or broken or spec.resources.world > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(granted)


def stand_alone(resources: Resources, rank: int, count: int = 1) -> None:
    """Let a process of a shared step go on alone, with `count` GPUs from its own on; before anything touches one.

    What it loads then sees no other GPU, and nothing that would make it look for the other processes.
    """
    if "LOCAL_RANK" not in os.environ:
        return
    if resources.gpus:
        first = rank % resources.local_processes
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus()[first : first + count])
    for name in [name for name in os.environ if _SET_BY_LAUNCHER.fullmatch(name)]:
        del os.environ[name]


def environment() -> dict[str, str]:
    """Return the environment of step processes.

    OpenMP's threads (torch, llama.cpp) spin at every barrier before they sleep. On two cores that were otherwise idle a
    training was 15 % slower with 20,000 turns than with the default of 300,000, and 3 % slower with 100,000; beside one
    busy process it was 1.7 times slower with 100,000 than with 20,000, and several times slower with the default,
    because a spinning thread keeps the one that it waits for from running. The library reads this once, when it loads.

    CUDA cannot be used after a fork by a process whose parent has asked it for devices; with NVML the question does no
    harm (see `torch.cuda.is_available`).

    What a launcher says of ranks is said anew for each step; a cluster's own words would make one process wait for
    others.
    """
    kept = {name: value for name, value in os.environ.items() if not _SET_BY_LAUNCHER.fullmatch(name)}
    if "GOMP_SPINCOUNT" not in kept:
        # The kernel counts in hundredths of a second: one moment says little of others, but idle is idle.
        shared = all(busy_cores() > _BUSY for _ in range(_MOMENTS))
        kept["GOMP_SPINCOUNT"] = "20000" if shared else "100000"
    # By the working directory a package of the same name as one of ours would be taken for it.
    return {"PYTORCH_NVML_BASED_CUDA_CHECK": "1", "PYTHONSAFEPATH": "1", **kept, BROKEN: broken_here()}


def busy_cores(seconds: float = 0.1) -> float:
    """Return how many cores other processes keep busy, measured for a moment."""

    def used() -> float:
        times = psutil.cpu_times()
        return sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)

    before, own = used(), time.process_time()
    time.sleep(seconds)
    return max(used() - before - (time.process_time() - own), 0.0) / seconds


@contextmanager
def open_to_nodes(spec: StepSpec) -> Iterator[None]:
    """Let other nodes take part in a step while it runs."""
    marker = spec.work / JOIN_NAME
    if spec.resources.nodes > 1:
        marker.touch()
    try:
        yield
    finally:
        marker.unlink(missing_ok=True)


def join(work: Path) -> None:
    """Take part, as node `NODE_RANK`, in every step of several nodes whose work lies below `work`; never returns.

    A step that this node has no part in (its number is beyond the step's nodes) is left alone.

    Raises:
        UserError: the environment does not say which node this is, or where the first one is.
    """
    number = os.environ.get(NODE_RANK, "")
    if not re.fullmatch("[1-9][0-9]*", number) or ADDRESS not in os.environ:
        raise UserError(
            f"set {NODE_RANK} to this node's number, from 1, and {ADDRESS} to the address of the flow's node"
        )
    node = int(number)
    seen: dict[Path, float] = {}
    while True:
        for marker in work.glob(f"*/{JOIN_NAME}"):
            try:
                at = marker.stat().st_mtime
                spec = StepSpec.model_validate_json(marker.with_name(SPEC_NAME).read_bytes())
            except OSError:
                continue
            if seen.get(marker) == at or node >= spec.resources.nodes:
                continue
            seen[marker] = at
            print(f"{spec.name}: joined", flush=True)
            command = [*launch_command(spec.resources, node=node), "-m", "steps", str(marker.with_name(SPEC_NAME))]
            with (spec.work / f"log.{node}.txt").open("ab") as log:
                options = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "preexec_fn": die_with_parent}
                end = subprocess.run(command, env=environment() | launcher_environment(spec.resources), **options)
            print(f"{spec.name}: ended with code {end.returncode}", flush=True)
            if end.returncode and _opened_at(marker) == at and not (spec.work / RESULT_NAME).exists():
                why = f"its processes on node {node} ended with code {end.returncode}; see log.{node}.txt"
                StepResult(status="failed", message=why).write(spec.work, f"node{node}")
        time.sleep(0.2)


def _opened_at(marker: Path) -> float | None:
    """When this attempt at a step was opened to nodes; None once it is over: its end is not another attempt's."""
    try:
        return marker.stat().st_mtime
    except OSError:
        return None
