"""One model that answers tasks, in as many processes as share the step."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self

from steps.artifacts import Adapter, Model
from steps.frame.errors import UserError
from steps.frame.scale import stand_alone
from steps.lm.checkpoint import Dtype, load_model, load_tokenizer
from steps.lm.generate import Continuation, Decoding, Engine, sample_answers
from steps.lm.kept import Kept
from steps.lm.tasks import Rollout, Task

if TYPE_CHECKING:
    from steps.frame.job import Job


class Sampler:
    """Answers tasks with a model, and an adapter where one is given; the model is loaded when something is to be asked.

    Each process, or each group of `tensor_parallel`, holds the whole model and answers every so many batches. All of
    them get all answers.
    """

    def __init__(self, model: Model, adapter: Adapter | None, decoding: Decoding, job: "Job") -> None:
        """Prepare; nothing is loaded yet.

        Raises:
            UserError: the adapter was trained on another model.
        """
        if adapter is not None and adapter.facts.base != model.digest:
            raise UserError(
                f"step `{job.name}`: the adapter was trained on {adapter.facts.base[:12]}, not on {model.digest[:12]}; "
                "give its own base"
            )
        self._model, self._adapter, self._decoding, self._job = model, adapter, decoding, job
        self._tokenizer = load_tokenizer(model.path)
        self._engine: Engine | None = None
        self._part, self._parts = share(decoding, job)

    def __enter__(self) -> Self:
        """Return itself; `with` gives the model's memory back at its end."""
        return self

    def __exit__(self, *_: object) -> None:
        """Give the model's memory back."""
        self.close()

    def answers(
        self,
        tasks: Sequence[Task],
        name: str,
        *,
        samples: int = 1,
        thinking_tokens: int | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[list[Rollout]]:
        """Sample answers to every task, see `sample_answers`; what is finished is kept as `name` over a restart."""
        return sample_answers(
            self,
            self._tokenizer,
            tasks,
            self._decoding,
            samples=samples,
            thinking_tokens=thinking_tokens,
            kept=Kept(self._job.scratch / name, self._part, self._parts, lambda: self._job.is_ended),
            progress=progress,
        )

    def write(self, prompts: Sequence[Sequence[int]], keys: Sequence[str], new_tokens: int) -> list[Continuation]:
        """Continue prompts, see `Engine`.

        Raises:
            UserError: vLLM is asked for and not there, or does not take this adapter.
        """
        if self._engine is None:
            stand_alone(self._job.resources, self._job.rank, self._decoding.tensor_parallel)
            self._engine = _open(self._model, self._adapter, self._tokenizer, self._decoding)
        return self._engine.write(prompts, keys, new_tokens)

    def close(self) -> None:
        """Give the model's memory back, so that what comes next (a reward model, the next candidate) has room."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None


def share(decoding: Decoding, job: "Job") -> tuple[int | None, int]:
    """Return which share of the batches this process answers (None: it lends its GPU to another), and of how many."""
    group = decoding.tensor_parallel
    return (None if job.rank % group else job.rank // group), job.resources.world // group


def _open(model: Model, adapter: Adapter | None, tokenizer: Any, decoding: Decoding) -> Engine:
    if decoding.backend == "vllm":
        from steps.lm.vllm_engine import VllmEngine

        return VllmEngine(model, adapter, decoding)
    from steps.lm.transformers_engine import TransformersEngine

    return TransformersEngine(_loaded(model, adapter, decoding.dtype), tokenizer, decoding, model.facts.stop_token_ids)


def _loaded(model: Model, adapter: Adapter | None, dtype: Dtype) -> Any:
    """Load a model, its base in 4 bits where the adapter was trained on such, on the GPU where there is one."""
    from steps.lm.device import own_device
    from steps.lm.four_bit import load_four_bit

    four_bit = adapter.facts.four_bit if adapter else None
    loaded: Any = load_four_bit(model.path, dtype, four_bit) if four_bit else load_model(model.path, dtype)
    if adapter is not None:
        from peft import PeftModel

        loaded = PeftModel.from_pretrained(loaded, str(adapter.path))
    return loaded.to(own_device())
