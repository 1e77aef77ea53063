"""Held-out verification during reinforcement learning: the best checkpoint is chosen by it, not by reward.

Imports transformers: use within a step only.
"""

import json
import math
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from steps.artifacts import write_atomic
from steps.frame import Job
from steps.lm.chat import render, token_ids
from steps.lm.generate import Continuation, opened_thinking, text_of
from steps.lm.tasks import Rollout, read_tasks
from steps.train._audits import Audits
from steps.train._checkpoints import resume_step
from steps.train._divided import is_divided, whole_state
from steps.train._online import end, random_state, set_random_state
from steps.train._rl import RlTraining, best_folder
from steps.train._together import together
from steps.train.rewards import Scorer


class HeldOut(TrainerCallback):
    """Answers held-out tasks greedily every `eval_steps` and keeps the weights that answered best.

    Why not by reward: with LoRA and a format reward the best held-out accuracy comes just before the format reward
    turns, while the total still rises (Tina, https://arxiv.org/abs/2504.15777).
    """

    def __init__(
        self,
        config: RlTraining,
        job: Job,
        trainer: Any,
        tokenizer: PreTrainedTokenizerFast,
        verifier: Scorer,
        audits: Audits,
    ) -> None:
        assert config.eval is not None
        self.config = config
        self.job = job
        self.trainer = trainer
        self.tokenizer = tokenizer
        self.verifier = verifier
        self.audits = audits
        self.tasks = read_tasks(config.eval, config.eval_rows)
        self.history: list[tuple[int, float]] = []
        """Optimizer step and mean of the verifier, in order."""
        self._read_best()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Measure the model as it came; after a restart, as it is where that look failed or was lost."""
        due = state.global_step % self.config.eval_steps == 0
        if not state.global_step or not self.history or (due and state.global_step not in dict(self.history)):
            self._look(state.global_step, control)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Look every `eval_steps`."""
        if state.global_step % self.config.eval_steps == 0:
            self._look(state.global_step, control)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Look at the last step too."""
        if not self.history or self.history[-1][0] != state.global_step:
            self._look(state.global_step, control)

    def best(self) -> Path:
        """Say which checkpoint did best; return the file of its trained weights."""
        step, score = _best(self.history)
        self.job.log_metrics({"held_out/best": score, "held_out/best_step": step})
        if step:
            self.job.log.info("the best checkpoint on held-out tasks is that of step %d: %.4g", step, score)
        else:
            self.job.log.warning(
                "no step answered held-out tasks better than the start (%.4g): its weights stay", score
            )
        return self._weights(step)

    def _look(self, step: int, control: TrainerControl) -> None:
        rollouts = self._answer()

        def judged() -> list[tuple[float, int]]:
            return list(zip(self.verifier(rollouts), (one.tokens for one in rollouts), strict=True))

        found = [each for part in together(self.job, judged) for each in part]
        score = math.fsum(each for each, _ in found) / len(found)
        self.history = [each for each in self.history if each[0] < step]
        if not self.history or score > max(seen for _, seen in self.history):
            self._keep(step)
        self.history.append((step, score))
        if self.trainer.accelerator.is_main_process:
            write_atomic(best_folder(self.job) / "history.json", json.dumps(self.history).encode())
            self._drop_others()
        values = {"held_out": score, "held_out/tokens": sum(tokens for _, tokens in found) / len(found)}
        end(self.audits.record(step, values), self.job, control)

    def _keep(self, step: int) -> None:
        """Save what is trained, beside the best before."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        whole = whole_state(self.trainer) if is_divided() else dict(model.named_parameters())
        trained = [name for name, each in model.named_parameters() if each.requires_grad]
        if self.trainer.accelerator.is_main_process:
            partial = best_folder(self.job) / "weights.partial"
            save_file({name: whole[name].detach().contiguous() for name in trained}, partial)
            partial.replace(self._weights(step))

    def _drop_others(self) -> None:
        """Delete all weights but the best, and the best that there was at the last checkpoint: a restart needs it."""
        last = resume_step(self.job)
        until_then = [each for each in self.history if each[0] <= last]
        needed = {self._weights(_best(looks)[0]) for looks in (self.history, until_then) if looks}
        for file in best_folder(self.job).glob("weights-*.safetensors"):
            if file not in needed:
                file.unlink()

    def _weights(self, step: int) -> Path:
        return best_folder(self.job) / f"weights-{step}.safetensors"

    def _read_best(self) -> None:
        """Read the looks up to where training goes on; those after it are made again, and may come out otherwise."""
        best_folder(self.job).mkdir(exist_ok=True)
        file = best_folder(self.job) / "history.json"
        try:
            looks = [(int(step), float(score)) for step, score in json.loads(file.read_bytes())]
        except FileNotFoundError:
            return
        except (ValueError, TypeError):
            self.job.log.warning("%s cannot be read: the best checkpoint is looked for from here on", file)
            return
        last = resume_step(self.job)
        self.history = [each for each in looks if each[0] <= last]
        while self.history and not self._weights(step := _best(self.history)[0]).exists():
            self.job.log.warning("the weights of step %d are gone: the best checkpoint is another", step)
            self.history = [each for each in self.history if each[0] != step]

    def _answer(self) -> list[Rollout]:
        """Answer this process's share of the tasks, by whatever samples the rollouts."""
        processes = self.job.resources.world
        own = self.tasks[self.job.rank :: processes]
        prompts = [render(self.tokenizer, task.prompt, prompt=True) for task in own]
        ids = [token_ids(self.tokenizer, prompt) for prompt in prompts]
        # All processes must ask alike often: those with a task less ask one twice.
        ids += [token_ids(self.tokenizer, render(self.tokenizer, self.tasks[0].prompt, prompt=True))] * (
            math.ceil(len(self.tasks) / processes) - len(own)
        )
        before = random_state()
        answers = self.trainer.answer_greedily(ids)
        set_random_state(before)
        stops = self.config.model.facts.stop_token_ids
        written = [Continuation(each, bool(each) and each[-1] in stops) for each in answers]
        return [
            Rollout(
                task,
                opened_thinking(prompt) + text_of(self.tokenizer, each.said),
                len(each.ids),
                not each.stopped,
            )
            for task, prompt, each in zip(own, prompts, written, strict=False)
        ]


def _best(history: list[tuple[int, float]]) -> tuple[int, float]:
    """Return the best look, of equal ones the first."""
    return max(history, key=lambda each: (each[1], -each[0]))
