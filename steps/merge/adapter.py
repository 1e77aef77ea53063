"""`merge.adapter`: fold a LoRA adapter into its base, and prove that the answers stay the same."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, Field

from steps.artifacts import Adapter, Dataset, Draft, Model
from steps.frame import Follows, Input, Job, Resources, StepConfig, UserError, step
from steps.frame.errors import ProofFailed
from steps.lm.chat import conversation
from steps.lm.checkpoint import Dtype, load_model, load_tokenizer, model_facts, save_model
from steps.lm.rows import read_jsonl

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# Used where the recipe gives no held-out data: any text will show a wrong scale or a missing layer.
_PROBES = (
    "What does the function do, and what does it return?",
    "Write a short note about the sea.",
    "List three prime numbers and say why each is prime.",
    "def add(a, b):",
)


class MergeAdapter(StepConfig):
    """Fold a LoRA adapter into its base weights and prove that base + adapter and the merged model agree."""

    adapter: Input[Adapter]
    base: Input[Model] = Follows("adapter.model")
    """The model that the adapter was trained on; found by itself."""
    data: Input[Dataset] | None = None
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
    from peft import PeftModel

    if config.adapter.facts.base != config.base.digest:
        raise UserError(
            f"step `{job.name}`: the adapter was trained on {config.adapter.facts.base[:12]}, not on "
            f"{config.base.digest[:12]}; give its own base as `base:`"
        )
    tokenizer = load_tokenizer(config.base.path)
    rows = _token_rows(config, tokenizer)
    base = load_model(config.base.path, "float32")
    tuned = PeftModel.from_pretrained(base, str(config.adapter.path))
    job.progress(1, 4, "loaded")
    expected = [logits(tuned, row) for row in rows]  # pyright: ignore[reportArgumentType]
    job.progress(2, 4, "base + adapter measured")
    out = job.output()
    merged = tuned.merge_and_unload(safe_merge=True)  # pyright: ignore[reportCallIssue]
    save_model(merged.to(getattr(_torch(), config.dtype)), tokenizer, out)
    del merged, tuned, base
    job.progress(3, 4, "merged")
    stored = load_model(out, "float32")
    parity = compare(expected, [logits(stored, row) for row in rows])
    job.log_metrics({f"parity/{name}": value for name, value in parity.model_dump().items()})
    job.log.info("parity: %s", parity)
    _judge(config, job.name, parity)
    (out / "parity.json").write_text(json.dumps(parity.model_dump(), indent=2, sort_keys=True) + "\n")
    job.progress(4, 4, "proved")
    facts = config.base.facts
    return Model.draft(out, model_facts(out, origin=facts.origin, licence=facts.licence))


def logits(model: "PreTrainedModel", ids: list[int]) -> "torch.Tensor":
    """Return the next-token logits of one row: T × vocabulary, float32."""
    torch = _torch()
    model.eval()
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids])).logits[0].float()


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
    rows = []
    for row in read_jsonl(Path(config.data.rows_file)):
        rows.append(conversation(tokenizer, row["messages"]).ids[: config.prompt_tokens])
        if len(rows) == config.prompts:
            break
    return rows


def _torch():  # noqa: ANN202 - the module itself, imported late
    import torch

    return torch
