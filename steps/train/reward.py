"""`train.reward`: a reward model, of whole answers from preferences or of reasoning steps from their labels."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, model_validator

from steps.artifacts import Artifact, Draft, Preferences, RewardModel, Samples
from steps.frame import Input, Job, Resources, UserError, step
from steps.lm.chat import control_tokens
from steps.lm.checkpoint import give_padding, load_tokenizer, model_facts, name_tokens_as, save_model
from steps.train._adapters import Full, thaw_padding
from steps.train._checkpoints import checkpoints, train
from steps.train._divided import whole_model
from steps.train._new_tokens import learn_new_tokens
from steps.train._settings import LIBRARIES, PRELOAD, Training, common_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

_GENERATION = "generation_config.json"


class TrainReward(Training):
    """Learn which answer is better from preferences, or which step is right from labels; gives a RewardModel."""

    data: Input[Preferences | Samples]
    """Preferences; for `process: true` Samples whose answers carry `steps: [{text, label}]`: see `data.label_steps`."""
    eval: Input[Preferences | Samples] | None = None
    """Held-out rows of the same kind, measured before the first step and after the last."""
    process: bool = False
    """Score every reasoning step, not the whole answer (https://arxiv.org/abs/2305.20050)."""
    step_separator: str = Field(default="\n", min_length=1)
    """What divides an answer into steps when it is scored; only for `process: true`."""
    max_tokens: int = Field(default=1024, ge=8)
    """Longer conversations are cut at the end."""
    learning_rate: float = Field(default=1e-4, gt=0)
    centre: float = Field(default=0.0, ge=0)
    """Weight of the squared sum of a pair's rewards, which keeps their mean at 0; 0.01 is usual
    (https://arxiv.org/abs/2312.09244)."""

    @model_validator(mode="after")
    def _can_be_merged(self) -> Self:
        if not isinstance(self.adapter, Full) and self.adapter.four_bit:
            raise ValueError("adapter: a reward model is given out whole, and 4-bit weights cannot be; use kind: lora")
        if self.centre and self.process:
            raise ValueError("centre: steps are scored by probabilities, which have a zero of their own; leave it out")
        return self

    def produced(self) -> type[Artifact]:
        """Kind of the output: an adapter is merged into it."""
        return RewardModel


@step(
    "train.reward",
    produces=RewardModel,
    reference="https://arxiv.org/abs/2203.02155",
    libraries=LIBRARIES,
    preload=PRELOAD,
    resources=Resources(cpus=0),
)
def train_reward(config: TrainReward, job: Job) -> Draft:
    """Train, resuming from the last complete checkpoint where an earlier attempt left one; merge and save."""
    from transformers import set_seed

    from steps.train._divergence import check_finite
    from steps.train._preference_reward import outcome_trainer, process_trainer

    _check_kinds(config, job)
    set_seed(config.seed)
    tokenizer = load_tokenizer(config.model.path)
    give_padding(tokenizer, config.model.facts.stop_token_ids, config.model.facts.vocabulary, by_length=False)
    model = _classifier(config, tokenizer)
    arguments = {
        **common_arguments(config, checkpoints(job)),
        "per_device_eval_batch_size": config.batch_size,
        "eval_on_start": config.eval is not None,
    }
    make = process_trainer if config.process else outcome_trainer
    trainer = make(config, job, model, tokenizer, arguments)
    train(trainer, job)
    if config.eval is not None:
        trainer.evaluate()
    trained = whole_model(trainer, model, lambda: _classifier(config, tokenizer))
    check_finite(job, trained)
    return _draft(config, trained, tokenizer, job.output())


def _check_kinds(config: TrainReward, job: Job) -> None:
    wanted = Samples if config.process else Preferences
    for field in ("data", "eval"):
        given = getattr(config, field)
        if given is not None and not isinstance(given, wanted):
            raise UserError(
                f"step `{job.name}`: `{field}` is {given.named()}; with process: {str(config.process).lower()} a "
                f"reward model learns from {wanted.kind}"
            )


def _classifier(config: TrainReward, tokenizer: "PreTrainedTokenizerFast") -> "PreTrainedModel":
    """Load the model with a fresh head, and an adapter where one is asked for."""
    from peft import get_peft_model

    from steps.lm.reward_model import head_name, new_reward_model

    method = config.adapter
    whole = isinstance(method, Full)
    model = new_reward_model(config.model.path, "float32" if whole else config.dtype, process=config.process)
    thaw_padding(model)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if config.process:
        model.config.step_separator = config.step_separator
    if whole:
        return model
    peft: Any = method.peft_config()
    peft.task_type = "TOKEN_CLS" if config.process else "SEQ_CLS"
    # The head is fresh: it is trained whole, and needs no adapter.
    peft.modules_to_save = [head_name(model)]
    peft.exclude_modules = [head_name(model)]
    learn_new_tokens(model, peft, config.model.facts.new_tokens)
    try:
        return get_peft_model(model, peft)  # pyright: ignore[reportReturnType]
    except ValueError as error:
        raise UserError(f"adapter.targets: {error}") from error


def _draft(config: TrainReward, model: Any, tokenizer: "PreTrainedTokenizerFast", out: Path) -> Draft:
    """Merge the adapter and save the whole checkpoint in `dtype`."""
    import torch
    from peft import PeftModel

    if isinstance(model, PeftModel):
        model = model.merge_and_unload()
    name_tokens_as(model, config.model.path)
    # A classifier that reads the last token must know which are padding.
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    own = load_tokenizer(config.model.path)
    if tokenizer.pad_token_id in control_tokens(own):
        # An ordinary token would be made special by that, and be read as none of what an answer says.
        own.pad_token = tokenizer.pad_token
    save_model(model.to(dtype=getattr(torch, config.dtype)), own, out)
    # A classifier has no generation config, but where an answer ends is told there.
    if (stops := config.model.path / _GENERATION).exists():
        shutil.copyfile(stops, out / _GENERATION)
    base = config.model.facts
    return RewardModel.draft(out, model_facts(out, origin=base.origin, licence=base.licence))
