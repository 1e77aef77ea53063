"""torch on the processor: products in both precisions against exact ones, a training step, and which one is fast."""

from steps.runtime.proof import Facts, Proof

PROOF = Proof(
    runtime="torch",
    distribution="torch",
    module="torch",
    libraries=("_C*.so", "lib/*.so*"),
    measures=True,
    variables=("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS"),
    serves="every step that loads a model",
    advice="install a build of torch for this processor",
)


def prove() -> Facts:
    """Compute with torch on the processor; see `computes_rightly` for what comes back."""
    from steps.runtime.torch_checks import computes_rightly

    return computes_rightly("cpu")
