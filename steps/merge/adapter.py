"""`merge.adapter`: fold an adapter into its base, and prove that the answers stay the same."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field

from steps.artifacts import Adapter, Dataset, Documents, Draft, Model
from steps.frame import Follows, Input, Job, Resources, StepConfig, UserError, step
from steps.frame.errors import ProofFailed
from steps.lm.chat import conversation
from steps.lm.checkpoint import Dtype, load_model, load_tokenizer, model_facts, save_model
from steps.lm.four_bit import load_four_bit
from steps.lm.plain_text import PlainTexts
from steps.lm.rows import read_jsonl

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Onto = Literal["original", "dequantised"]
"""What the adapter's update is added to: the base as it is stored, or what its 4 bits (QLoRA) stand for."""

# Used where the recipe gives no held-out data: any text will show a wrong scale or a missing layer.
_PROBES = (
    "What does the function do, and what does it return?",
    "Write a short note about the sea.",
    "List three prime numbers and say why each is prime.",
    "def add(a, b):",
)


class MergeAdapter(StepConfig):
    """Fold an adapter into its base weights and prove that base + adapter and the merged model agree.

    An adapter that was trained on a base in 4 bits is compared with that base. It is merged twice, onto the stored base
    and onto what the 4 bits stand for, and the better of the two by measurement is given out.
    """

    adapter: Input[Adapter]
    base: Input[Model] = Follows("adapter.model")
    """The model that the adapter was trained on; found by itself."""
    data: Input[Dataset | Documents] | None = None
    """Held-out rows for the proof; a few built-in prompts when unset."""
    dtype: Dtype = "bfloat16"
    """Precision in which the result is stored; the delta is added in float32."""
    prompts: int = Field(default=8, ge=1)
    """Rows compared."""
    prompt_tokens: int = Field(default=96, ge=8)
    """Tokens compared in each row."""
    max_kl: float = Field(default=0.01, gt=0)
    """Largest mean KL(base + adapter || merged) per token, in nats, that counts as the same model."""
    min_agreement: float = Field(default=0.95, ge=0, le=1)
    """Smallest share of positions at which both choose the same token."""


class Parity(BaseModel):
    """The proof that comes with a merge, over all compared positions."""

    positions: int
    max_logit_difference: float
    mean_kl: float
    greedy_agreement: float


@step(
    "merge.adapter",
    produces=Model,
    reference="https://arxiv.org/abs/2106.09685",
    libraries=("torch", "transformers", "peft"),
    preload=("torch", "transformers", "peft"),
    resources=Resources(cpus=0),
)
def merge_adapter(config: MergeAdapter, job: Job) -> Draft:
    """Merge in float32, store in `dtype`, reload what was stored and compare it with base + adapter."""
    from steps.lm.device import granted_device

    if config.adapter.facts.base != config.base.digest:
        raise UserError(
            f"step `{job.name}`: the adapter was trained on {config.adapter.facts.base[:12]}, not on "
            f"{config.base.digest[:12]}; give its own base as `base:`"
        )
    tokenizer = load_tokenizer(config.base.path)
    rows = _token_rows(config, tokenizer)
    ways: tuple[Onto, ...] = ("original", "dequantised") if config.adapter.facts.four_bit else ("original",)
    device = granted_device(job.resources)
    tuned = _tuned(config, "trained", device)
    expected = [logits(tuned, row) for row in rows]
    del tuned
    job.progress(1, 1 + len(ways), "base + adapter measured")
    outs = {onto: job.output(onto) for onto in ways}
    proofs: dict[Onto, Parity] = {}
    for done, onto in enumerate(ways, start=2):
        proofs[onto] = _merged(config, onto, tokenizer, outs[onto], rows, expected, device)
        job.log.info("merged onto the %s base: %s", onto, proofs[onto])
        job.progress(done, 1 + len(ways), f"merged onto the {onto} base")
    best = min(proofs, key=lambda onto: (math.isnan(proofs[onto].mean_kl), proofs[onto].mean_kl))
    job.log_metrics({f"parity/{name}": value for name, value in proofs[best].model_dump().items()})
    _judge(config, job.name, proofs[best])
    out = outs[best]
    measured = {onto: each.model_dump() for onto, each in proofs.items()}
    record = {**measured[best], "onto": best, "measured": measured}
    (out / "parity.json").write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    facts = config.base.facts
    return Model.draft(out, model_facts(out, origin=facts.origin, licence=facts.licence))


def _tuned(config: MergeAdapter, onto: Onto | Literal["trained"], device: str) -> "PreTrainedModel":
    """Load the base with its adapter in float32: as it was trained on, or in a form that can be merged."""
    from peft import PeftModel

    four_bit = config.adapter.facts.four_bit
    if four_bit and onto != "original":
        base = load_four_bit(config.base.path, "float32", four_bit)
        if onto == "dequantised":
            base = base.dequantize()
    else:
        base = load_model(config.base.path, "float32").to(device)  # pyright: ignore[reportArgumentType]
    return PeftModel.from_pretrained(base, str(config.adapter.path))  # pyright: ignore[reportReturnType]


def _merged(
    config: MergeAdapter,
    onto: Onto,
    tokenizer: "PreTrainedTokenizerFast",
    out: Path,
    rows: list[list[int]],
    expected: list["torch.Tensor"],
    device: str,
) -> Parity:
    """Merge, store in `out`, and measure what was stored."""
    merged = _tuned(config, onto, device).merge_and_unload(safe_merge=True)  # pyright: ignore[reportCallIssue]
    save_model(merged.to(getattr(_torch(), config.dtype)), tokenizer, out)
    del merged
    stored: Any = load_model(out, "float32")
    stored.to(device)
    return compare(expected, [logits(stored, row) for row in rows])


def logits(model: "PreTrainedModel", ids: list[int]) -> "torch.Tensor":
    """Return the next-token logits of one row: T × vocabulary, float32."""
    torch = _torch()
    model.eval()
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids], device=model.device)).logits[0].float().cpu()


def compare(expected: list["torch.Tensor"], found: list["torch.Tensor"]) -> Parity:
    """Compare two models' logits row by row (each T × vocabulary)."""
    torch = _torch()
    positions, largest, kl, agree = 0, 0.0, 0.0, 0
    for left, right in zip(expected, found, strict=True):
        left_log, right_log = torch.log_softmax(left, -1), torch.log_softmax(right, -1)
        positions += len(left)
        largest = max(largest, (left - right).abs().max().item())
        kl += (left_log.exp() * (left_log - right_log)).sum().item()
        agree += int((left.argmax(-1) == right.argmax(-1)).sum())
    return Parity(
        positions=positions,
        max_logit_difference=largest,
        mean_kl=kl / positions,
        greedy_agreement=agree / positions,
    )


def _judge(config: MergeAdapter, name: str, parity: Parity) -> None:
    # `not <=` so that a NaN fails.
    if not parity.mean_kl <= config.max_kl or not parity.greedy_agreement >= config.min_agreement:
        raise ProofFailed(
            f"step `{name}`: the merged model is not base + adapter: mean KL {parity.mean_kl:.4g} nats (at most "
            f"{config.max_kl}), greedy agreement {parity.greedy_agreement:.3f} (at least {config.min_agreement}), "
            f"largest logit difference {parity.max_logit_difference:.3g}"
        )


def _token_rows(config: MergeAdapter, tokenizer: "PreTrainedTokenizerFast") -> list[list[int]]:
    if config.data is None:
        return [tokenizer(text)["input_ids"][: config.prompt_tokens] for text in _PROBES]  # pyright: ignore[reportReturnType]
    plain = PlainTexts(tokenizer, config.base.facts.stop_token_ids, config.prompt_tokens)
    rows = []
    for row in read_jsonl(Path(config.data.rows_file)):
        if isinstance(config.data, Documents):
            ids, _ = plain.tokens(row["prompt"], row["text"])
        else:
            ids = conversation(tokenizer, row["messages"], only_last=True).ids
        rows.append(ids[: config.prompt_tokens])
        if len(rows) == config.prompts:
            break
    return rows


def _torch():  # noqa: ANN202 - the module itself, imported late
    import torch

    return torch
