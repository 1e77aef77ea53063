"""SFT and GRPO as one writes them with TRL alone: `python -m tests.bench.bare JSON` prints tokens and seconds."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer


def sft(model: Path, rows: Path, out: Path, settings: dict[str, Any]) -> int:
    """Train every weight on the answers of `rows`; return the tokens seen."""
    table = [json.loads(line)["messages"] for line in rows.read_text(encoding="utf-8").splitlines()]
    arguments = SFTConfig(max_length=settings["max_tokens"], packing=settings["packing"], **common(out, settings))
    trainer = SFTTrainer(
        model=load(model),
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": row[:-1], "completion": row[-1:]} for row in table]),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    return _trained(trainer, out)


def grpo(model: Path, rows: Path, out: Path, settings: dict[str, Any]) -> int:
    """Reward answers that equal the reference; return the tokens asked and sampled."""

    def exact(completions: list[Any], answer: list[str], **_: Any) -> list[float | None]:
        return [
            float(completion[0]["content"].strip() == wanted)
            for completion, wanted in zip(completions, answer, strict=True)
        ]

    table = [json.loads(line)["messages"] for line in rows.read_text(encoding="utf-8").splitlines()]
    arguments = GRPOConfig(
        num_generations=settings["group_size"],
        max_completion_length=settings["max_new_tokens"],
        loss_type="dapo",
        epsilon=0.2,
        epsilon_high=0.28,
        beta=0.0,
        **common(out, settings),
    )
    trainer = GRPOTrainer(
        model=load(model),
        reward_funcs=exact,
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": row[:-1], "answer": row[-1]["content"]} for row in table]),
        processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
    )
    return _trained(trainer, out)


def _trained(trainer: Any, out: Path) -> int:
    trainer.train()
    trainer.save_model(str(out / "final"))
    return int(next(line["num_tokens"] for line in reversed(trainer.state.log_history) if "num_tokens" in line))


def common(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What both configs share, as `train.sft` and `train.grpo` set it."""
    return {
        "output_dir": str(out),
        "max_steps": settings.get("max_steps", -1),
        "num_train_epochs": settings.get("epochs", 1),
        "per_device_train_batch_size": settings["batch_size"],
        "learning_rate": settings["learning_rate"],
        "lr_scheduler_type": settings["schedule"],
        "warmup_steps": settings["warmup"],
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "save_steps": 50,
        "save_total_limit": 1,
        "logging_steps": 5,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": settings["seed"],
    }


def load(path: Path) -> Any:
    """Load the weights in float32."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    began = time.perf_counter()
    method = {"sft": sft, "grpo": grpo}[given["method"]]
    seen = method(Path(given["model"]), Path(given["rows"]), Path(given["out"]), given["settings"])
    print(json.dumps({"seconds": time.perf_counter() - began, "tokens": seen}))
