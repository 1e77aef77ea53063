"""`train.distill`: a student learns a teacher's whole distribution, on its own answers or on given ones."""

from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from steps.artifacts import Adapter, Dataset, Draft, Model
from steps.frame import Input, Job, NamesOf, Resources, UserError, step
from steps.lm.chat import conversation
from steps.lm.checkpoint import load_model, load_tokenizer
from steps.lm.rows import read_jsonl
from steps.train._adapters import trainable_model, trained_draft
from steps.train._checkpoints import checkpoints, train
from steps.train._rows import Longest, check_no_tools, note_rows
from steps.train._settings import LIBRARIES, PRELOAD, Training, common_arguments, training_tokenizer

if TYPE_CHECKING:
    from datasets import Dataset as Table
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


class TrainDistill(Training):
    """Teach a model another model's distribution, token by token; gives an Adapter, or a Model."""

    teacher: Input[Model]
    """Model with the same tokenizer."""
    data: Input[Dataset]
    """Prompts; their answers too are used where the student does not answer itself."""
    student_name: str | None = NamesOf("model")
    teacher_name: str | None = NamesOf("teacher")
    mode: Literal["on_policy", "logits"] = "on_policy"
    """Learn on answers that the student samples, or on the data's own."""
    on_policy_share: float | None = Field(default=None, gt=0, le=1)
    """With `mode: on_policy`, share of the batches that the student answers (λ of GKD); all of them when unset."""
    beta: float = Field(default=1.0, ge=0, le=1)
    """Divergence: 0 is the forward KL(teacher || student), 1 the reverse KL, between them Jensen-Shannon."""
    temperature: float = Field(default=1.0, gt=0)
    """Of the sampling, and of both distributions in the loss."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Longest answer; given ones are cut."""

    @model_validator(mode="after")
    def _share_has_a_use(self) -> Self:
        if self.mode == "logits" and self.on_policy_share is not None:
            raise ValueError("on_policy_share: the student answers nothing in `mode: logits`; leave it out")
        return self

    @property
    def share(self) -> float:
        """Share of batches that the student answers."""
        return 0.0 if self.mode == "logits" else self.on_policy_share or 1.0


@step(
    "train.distill",
    produces=(Adapter, Model),
    reference="https://arxiv.org/abs/2306.13649",
    libraries=LIBRARIES,
    preload=(*PRELOAD, "trl.trainer.distillation_trainer"),
    resources=Resources(cpus=0),
)
def train_distill(config: TrainDistill, job: Job) -> Draft:
    """Train, resuming from the last complete checkpoint where an earlier attempt left one."""
    from transformers import set_seed
    from trl.trainer.distillation_config import DistillationConfig

    from steps.train._distill import Distillation
    from steps.train._progress import ReportToJob
    from steps.train._speed import Speed

    set_seed(config.seed)
    tokenizer = training_tokenizer(config, job)
    tokenizer.padding_side = "left"
    check_tokenizers(config, job, tokenizer)
    rows = prompts_and_answers(config, tokenizer, job)
    if not rows:
        raise UserError(f"step `{job.name}`: no row of `data` has an answer; give conversations that end with one")
    arguments = DistillationConfig(
        **common_arguments(config, checkpoints(job)),
        beta=config.beta,
        temperature=config.temperature,
        max_completion_length=config.max_new_tokens,
        # `in_order` shuffles.
        shuffle_dataset=False,
    )
    per_step = config.batch_size * config.accumulation * arguments.world_size
    arguments.max_steps = config.max_steps or max(1, int(config.epochs * len(rows) / per_step))
    model = trainable_model(config.model, config.adapter, config.dtype)
    trainer = Distillation(
        model=model,
        teacher_model=teacher_model(config),
        args=arguments,
        train_dataset=in_order(rows, arguments.max_steps * per_step, config.seed),
        processing_class=tokenizer,
        callbacks=[ReportToJob(job), Speed(job)],
        on_policy_share=config.share,
    )
    train(trainer, job)
    return trained_draft(config, job, trainer, model)


def check_tokenizers(config: TrainDistill, job: Job, tokenizer: "PreTrainedTokenizerFast") -> None:
    """Refuse a teacher whose tokens are not the student's: the loss compares probabilities token by token.

    Raises:
        UserError: naming both.
    """
    student, teacher = config.student_name or "model", config.teacher_name or "teacher"
    ours, theirs = config.model.facts, config.teacher.facts
    if ours.tokenizer_sha256 != theirs.tokenizer_sha256:
        # The file holds settings besides the vocabulary, e.g. of padding; those may differ.
        own, other = tokenizer.get_vocab(), load_tokenizer(config.teacher.path).get_vocab()
        different = sum(own.get(token) != other.get(token) for token in {*own, *other})
        if different:
            raise UserError(
                f"step `{job.name}`: the teacher `{teacher}` has another tokenizer than the student `{student}` "
                f"({different} tokens differ), so their probabilities cannot be compared; give a teacher of the same "
                "family, or fine-tune on answers that `data.sample` takes from it"
            )
    if theirs.vocabulary < ours.vocabulary:
        raise UserError(
            f"step `{job.name}`: the teacher `{teacher}` gives probabilities to {theirs.vocabulary} tokens, the "
            f"student `{student}` to {ours.vocabulary}; give a teacher with at least as many"
        )


def teacher_model(config: TrainDistill) -> "PreTrainedModel":
    """Load the teacher; rows of its vocabulary beyond the student's, which no token uses, are cut off."""
    teacher = load_model(config.teacher.path, config.dtype)
    if config.teacher.facts.vocabulary > config.model.facts.vocabulary:
        teacher.resize_token_embeddings(config.model.facts.vocabulary)
    return teacher.eval()


def prompts_and_answers(config: TrainDistill, tokenizer: "PreTrainedTokenizerFast", job: Job) -> list[dict[str, Any]]:
    """Return `prompt` (messages) and `answer` (tokens, the stop token included) of every row."""
    rows: list[dict[str, Any]] = []
    seen, cut = config.data.facts.rows, 0
    for row in read_jsonl(config.data.rows_file):
        talk = conversation(tokenizer, row["messages"], config.model.facts.stop_token_ids, only_last=True)
        own = zip(talk.ids[talk.prompt_length :], talk.assistant[talk.prompt_length :], strict=True)
        answer = [token for token, mine in own if mine]
        cut += len(answer) > config.max_new_tokens
        if answer:
            rows.append({"prompt": list(row["messages"][:-1]), "answer": answer[: config.max_new_tokens]})
    check_no_tools(job, "data", (row["prompt"] for row in rows))
    longest = Longest(config.max_new_tokens, f"max_new_tokens: {config.max_new_tokens}")
    note_rows(job, "data", seen, left_out=seen - len(rows), cut=cut, longest=longest)
    return rows


def in_order(rows: list[dict[str, Any]], count: int, seed: int) -> "Table":
    """Return the rows of the whole training, each epoch shuffled anew.

    One long table instead of epochs over a short one: TRL's sampler draws each epoch's order from a state that a
    resumed run does not have, so that from the second epoch on it would see other rows.
    """
    import numpy as np
    from datasets import Dataset as Table

    random = np.random.default_rng(seed)
    order: list[int] = []
    while len(order) < count:
        order += random.permutation(len(rows)).tolist()
    return Table.from_list([rows[index] for index in order[:count]])
