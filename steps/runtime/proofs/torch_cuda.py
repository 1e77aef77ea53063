"""torch on the first GPU: products in both precisions against exact ones, a training step, and which one is fast."""

from steps.runtime.gpus import gpus
from steps.runtime.proof import Absent, Facts, Proof

PROOF = Proof(
    runtime="CUDA",
    distribution="torch",
    module="torch",
    libraries=("_C*.so", "lib/*.so*"),
    variables=("CUDA_VISIBLE_DEVICES",),
    measures=True,
    serves="every step on a GPU",
    advice="install a build of torch for this GPU's driver (`nvidia-smi` prints the newest CUDA that it knows)",
    optional=True,
)


def prove() -> Facts:
    """Compute with torch on the first GPU.

    Returns:
        What `computes_rightly` gives, the GPU's name and its memory in GB.
    """
    if not gpus():
        raise Absent("this machine has no NVIDIA GPU")
    import torch

    from steps.runtime.torch_checks import computes_rightly

    assert torch.cuda.is_available(), f"torch {torch.__version__} cannot use this machine's GPU"
    memory = torch.cuda.get_device_properties(0).total_memory
    return {"gpu": torch.cuda.get_device_name(0), "memory_gb": round(memory / 1e9, 1), **computes_rightly("cuda")}
