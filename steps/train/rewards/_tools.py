"""The models that rewards may ask, loaded when first asked; a judge in the step's own precision, a part of its key."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from steps.artifacts import Model, RewardModel
from steps.frame.errors import UserError
from steps.lm.checkpoint import Dtype
from steps.lm.tasks import Rollout
from steps.train.rewards._reward import RewardSpec

_ASKING = {"reward_model", "judge"}
_WORDS = ("Yes", "No")


class Models:
    """The step's reward model and judge, either of which may be absent; see `steps.train.rewards.Tools`."""

    def __init__(
        self, reward_model: RewardModel | None = None, judge: Model | None = None, dtype: Dtype = "float32"
    ) -> None:
        self._reward_model = reward_model
        self._judge = judge
        self._dtype: Dtype = dtype

    def reward_scores(self, rollouts: Sequence[Rollout]) -> Sequence[float]:
        """Score answers with the reward model.

        Raises:
            UserError: the step has none.
        """
        return self._scorer.score(rollouts)

    def judge_scores(self, rollouts: Sequence[Rollout], question: str) -> Sequence[float]:
        """Return for each answer the probability of yes against no as the judge's next token.

        Raises:
            UserError: the step has no judge.
        """
        return self._asked.probabilities([judge_prompt(rollout, question) for rollout in rollouts])

    @cached_property
    def _scorer(self) -> Any:
        from steps.lm.reward_model import RewardScorer

        if self._reward_model is None:
            raise UserError("the reward `reward_model` needs the step's input `reward_model`")
        return RewardScorer(self._reward_model.path)

    @cached_property
    def _asked(self) -> "_Judge":
        if self._judge is None:
            raise UserError("the reward `judge` needs the step's input `judge`")
        return _Judge(self._judge, self._dtype)


class _Judge:
    """A causal language model that answers by yes or no."""

    def __init__(self, artifact: Model, dtype: Dtype) -> None:
        from steps.lm.checkpoint import load_model, load_tokenizer
        from steps.lm.device import own_device

        self._model = load_model(artifact.path, dtype).to(own_device())  # pyright: ignore[reportArgumentType]
        self._tokenizer = load_tokenizer(artifact.path)

    def probabilities(self, prompts: Sequence[str]) -> list[float]:
        """Return the probability of yes after each prompt; prompts as the user's whole turn."""
        from steps.lm.choice import choice_probabilities

        turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
        return [yes for yes, _ in choice_probabilities(self._model, self._tokenizer, turns, _WORDS)]


def judge_prompt(rollout: Rollout, question: str) -> str:
    """Write what a judge is asked about an answer; its thinking is not shown."""
    task = "\n\n".join(message["content"] for message in rollout.task.prompt)
    asked = question.replace("{reference}", rollout.task.answer)
    return f"Task:\n{task}\n\nAnswer:\n{rollout.answer}\n\n{asked} Say Yes or No."


def check_tools(rewards: Sequence[RewardSpec], reward_model: object, judge: object) -> None:
    """Check that rewards have the models that they ask; for the validators of step configs.

    Args:
        rewards: all of the step's rewards, its verifier included.
        reward_model: the step's input of that name, or None.
        judge: the step's input of that name, or None.

    Raises:
        ValueError: a model is asked and absent, or there and asked by nothing.
    """
    asked = {kind for reward in rewards for kind in _kinds_in(reward)} & _ASKING
    given: Mapping[str, object] = {"reward_model": reward_model, "judge": judge}
    for name, value in given.items():
        if name in asked and value is None:
            raise ValueError(f"the reward `{name}` asks the step's input `{name}`, which is not given")
        if name not in asked and value is not None:
            raise ValueError(f"`{name}` is given, but no reward of kind `{name}` asks it")


def check_labels(rewards: Sequence[RewardSpec]) -> None:
    """Check that all rewards have different names; for the validators of step configs.

    Raises:
        ValueError: two have the same.
    """
    labels = [reward.label for reward in rewards]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise ValueError(f"two rewards are called `{twice}`; give one of them another `name`")


def _kinds_in(reward: RewardSpec) -> Iterator[str]:
    """Yield the kind of a reward and of those inside it."""
    yield reward.kind
    for name in type(reward).model_fields:
        if isinstance(inner := getattr(reward, name), RewardSpec):
            yield from _kinds_in(inner)
