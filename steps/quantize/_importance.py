"""The importance matrix: how much each input channel of each weight matrix carries, measured on real rows.

llama.cpp weighs the rounding error of column j of a matrix by the mean of x_j^2 over the tokens that pass through it.
Source: `llama-imatrix`, https://github.com/ggml-org/llama.cpp/tree/master/tools/imatrix
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from transformers import PreTrainedModel


def importance_matrix(
    model: "PreTrainedModel",
    rows: Sequence[Sequence[int]],
    tensors: Mapping[str, str],
    progress: Callable[[int, int], None],
) -> "dict[str, NDArray[np.float32]]":
    """Run the rows, one at a time, through the model's body and return the mean square input of each linear layer.

    The output layer is left out, as llama.cpp does by default: its own inputs mislead more than they help.

    Args:
        model: in the precision to run in.
        rows: token ids.
        tensors: GGUF name of each checkpoint tensor.
        progress: called with the rows done and the rows in all.

    Returns:
        GGUF tensor name -> float32 of shape (input channels,).
    """
    import torch

    sums: dict[str, torch.Tensor] = {}
    tokens = 0

    def watch(name: str) -> "torch.utils.hooks.RemovableHandle":
        def add(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            squares = inputs[0].detach().flatten(0, -2).float().square_().sum(0)
            sums[name] = sums[name] + squares if name in sums else squares

        return modules[name].register_forward_pre_hook(add)

    modules = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    handles = [watch(name) for name in modules if f"{name}.weight" in tensors]
    try:
        with torch.inference_mode():
            for index, ids in enumerate(rows):
                model.base_model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
                tokens += len(ids)
                progress(index + 1, len(rows))
    finally:
        for handle in handles:
            handle.remove()
    return {tensors[f"{name}.weight"]: (total / tokens).cpu().numpy() for name, total in sums.items()}
