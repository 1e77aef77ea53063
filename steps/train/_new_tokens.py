"""Control tokens of a template that a model was given: an adapter learns their embeddings, which the base never did."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from steps.frame import UserError

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn
    from transformers import PreTrainedModel


def learn_new_tokens(model: "PreTrainedModel", config: "PeftConfig", tokens: Sequence[int]) -> None:
    """Let an adapter learn the rows of new tokens, in both embeddings.

    LoRA and its kin learn these rows alone (https://huggingface.co/docs/peft/package_reference/trainable_tokens). What
    cannot, or has an output layer with a bias, which PEFT leaves out there, learns the embeddings whole.

    Args:
        model: the frozen model.
        config: of the adapter; it is changed.
        tokens: their ids; without any nothing is done.

    Raises:
        UserError: the adapter cannot learn them.
    """
    if not tokens:
        return
    settings: Any = config
    entrance: Any = model.get_input_embeddings()
    # A classifier has no embedding at its other end.
    exit_: Any = model.get_output_embeddings()
    is_tied = exit_ is not None and exit_.weight is entrance.weight
    names = [_name(model, layer) for layer in ([entrance] if is_tied or exit_ is None else [entrance, exit_])]
    if str(getattr(settings, "init_lora_weights", "")).startswith("pissa"):
        # What it begins with is taken out again at the end, by a conversion of PEFT that keeps no other rows.
        raise _unable("pissa", tokens, "")
    if hasattr(settings, "trainable_token_indices") and getattr(exit_, "bias", None) is None:
        settings.trainable_token_indices = {name: list(tokens) for name in names}
    elif is_tied:
        raise _unable(settings.peft_type.value.lower(), tokens, ", because the two embeddings of this model are one")
    else:
        settings.modules_to_save = [*(settings.modules_to_save or ()), *names]


def _unable(kind: str, tokens: Sequence[int], why: str) -> UserError:
    return UserError(
        f"adapter: `{kind}` cannot learn the {len(tokens)} control tokens that the template brought{why}; take `lora`, "
        "or `full`"
    )


def show_bias(model: "nn.Module") -> None:
    """Say of output layers whose rows are learned that they have no bias: trainers that use their weights directly ask.

    PEFT's wrapper passes on the weights, and no other attribute.
    """
    from peft.utils.other import TrainableTokensWrapper

    for module in model.modules():
        if isinstance(module, TrainableTokensWrapper):
            module.bias = None  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]


def _name(model: "PreTrainedModel", layer: "nn.Module") -> str:
    return next(name for name, module in model.named_modules() if module is layer)
