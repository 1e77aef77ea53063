"""Where steps compute: on the GPU that they were granted, never silently on a processor."""

import re
from pathlib import Path

import pytest
import torch

import steps
from steps.frame import Resources
from steps.lm.device import granted_device, own_device


def test_a_granted_gpu_is_used_and_one_that_was_not_asked_for_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert granted_device(Resources(gpus=1)) == "cpu", "there is none here"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert granted_device(Resources(gpus=1)) == own_device() == "cuda:0"
    assert granted_device(Resources()) == "cpu"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert granted_device(Resources(gpus=8)) == "cuda:3"


def test_every_step_that_loads_a_model_says_where_it_computes() -> None:
    """A file that loads weights moves them, or leaves it to who moves them: none forgets it, as two steps did."""
    moves = re.compile(
        r"own_device|granted_device|device_map|TransformersRuntime|use_cpu|Trainer|Distillation|_loaded\("
    )
    loads = re.compile(r"(?<!def )\b(load_model|load_gptq|load_reward_model|load_four_bit)\(")
    silent = []
    for path in sorted(Path(steps.__path__[0]).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if loads.search(text) and not moves.search(text):
            silent.append(path.name)
    assert silent == []
