"""Whether an adapter fits the model that it was put on."""

from typing import TYPE_CHECKING, Any

from steps.frame import UserError

if TYPE_CHECKING:
    from peft import PeftModel

EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "lm_head", "embed_out")
"""Usual names of the embeddings."""


def tied(target: str) -> str:
    """Return why an adapter on an embedding that is the output layer, too, is refused."""
    return (
        f"adapter.targets: {target} is the output layer, too (tied embeddings), where an adapter on it would not count "
        "and could not be merged; leave it out, or take `adapter: {kind: full}`"
    )


def check_fit(model: "PeftModel", *, rank: int | None, block_size: int | None) -> None:
    """Check that an adapter was put on as it was asked for.

    Args:
        model: with the adapter.
        rank: of PiSSA, whose directions each layer must have; None for all else.
        block_size: of OFT, which must divide each layer's inputs; None for all else.

    Raises:
        UserError: naming the setting, and the layer that it does not fit.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.oft import OFTLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise UserError(
            "adapter.targets: the output layer cannot have an adapter, because trainers use its weights directly; "
            "leave it out"
        )
    config: Any = model.config
    if isinstance(model.get_input_embeddings(), BaseTunerLayer) and config.get_text_config().tie_word_embeddings:
        raise UserError(tied("the embedding"))
    for name, layer in model.named_modules():
        if block_size is not None and isinstance(layer, OFTLayer):
            if layer.oft_block_size["default"] != block_size:
                raise UserError(
                    f"adapter.block_size: {block_size} does not divide the {layer.in_features} inputs of "
                    f"{name.removeprefix('base_model.model.')}; {layer.oft_block_size['default']} does"
                )
        elif rank is not None and isinstance(layer, LoraLayer):
            smallest = min(size for size in (layer.in_features, layer.out_features) if size)
            if rank > smallest:
                raise UserError(
                    f"adapter.rank: {rank} is more than the {smallest} singular values of "
                    f"{name.removeprefix('base_model.model.')}"
                )
