"""Muon for a model's matrices and AdamW for the rest, as the one optimizer that a trainer wants."""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import AdamW, Muon, Optimizer

_HEADS = {"score", "classifier", "lm_head", "v_head"}
"""What transformers and TRL call the last layer: of a reward model no method names it."""


def muon_for(model: Any, rate: float, weight_decay: float) -> "MuonWithAdamW":
    """Divide a model's trained weights between the two (https://kellerjordan.github.io/posts/muon/).

    Muon gets the matrices between hidden layers. AdamW gets embeddings, the output layer, heads and vectors;
    vectors (norms, biases, DoRA's magnitudes) are not decayed.
    """
    output = model.get_output_embeddings()
    heads = [module for name, module in model.named_modules() if _HEADS & set(name.split("."))]
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    tables = [*embeddings, *heads, *([output] if output else [])]
    apart = {id(parameter) for table in tables for parameter in table.parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [each for each in trained if each.ndim == 2 and id(each) not in apart]
    others = [each for each in trained if each.ndim >= 2 and (each.ndim > 2 or id(each) in apart)]
    vectors = [each for each in trained if each.ndim < 2]
    return MuonWithAdamW(matrices, others, vectors, rate, weight_decay)


class MuonWithAdamW(Optimizer):
    """Two optimizers with one list of groups and one state, so that a schedule and a checkpoint reach both.

    Muon's update is scaled to the size of AdamW's (https://arxiv.org/abs/2502.16982), so both take the same rate.
    """

    def __init__(
        self,
        matrices: list[nn.Parameter],
        embeddings: list[nn.Parameter],
        vectors: list[nn.Parameter],
        rate: float,
        weight_decay: float,
    ) -> None:
        rest = [{"params": embeddings, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self._muon = Muon(matrices, lr=rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self._adamw = AdamW([group for group in rest if group["params"]] or [{"params": []}], lr=rate)
        super().__init__([*self._muon.param_groups, *self._adamw.param_groups], {})
        self._share()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update all weights."""
        loss = self._muon.step(closure)
        self._adamw.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore groups and state."""
        super().load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        """Let both optimizers work on this one's groups and state."""
        self._muon.param_groups, self._adamw.param_groups = self.param_groups[:1], self.param_groups[1:]
        self._muon.state = self._adamw.state = self.state
