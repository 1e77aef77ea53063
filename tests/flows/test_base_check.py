"""What does not fit the pretrained model is known before anything runs, where the model is on this machine."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.graph import Graph
from flows.plan import make_plan
from registry.home import Home
from tests.flows.conftest import builder
from tests.steps.test_given_template import make_base

RECIPE = """
name: base
base: file://base
steps:
  data: {uses: data.prepare, source: rows.jsonl, eval_fraction: 0}
  sft: {uses: train.sft, model: base, data: data.train, max_steps: 2}
"""


@pytest.fixture
def base(pico: Any, tmp_path: Path) -> Path:
    """A base model without a template, beside its recipe."""
    (tmp_path / "rows.jsonl").write_text("{}")
    return make_base(pico.path, tmp_path / "base")


@pytest.fixture
def recipe(base: Path, tmp_path: Path) -> Callable[..., Graph]:
    return builder(RECIPE, tmp_path / "base.yaml")


def reasons(graph: Graph, home: Home, root: Path) -> dict[str, str]:
    """Why steps are blocked, by their names."""
    plan = make_plan(graph, home, root, thorough=False)
    return {step.name: step.reason for step in plan.blocked}


def test_a_missing_template_is_known_with_the_key_that_mends_it(recipe: Any, home: Home, tmp_path: Path) -> None:
    said = reasons(recipe(), home, tmp_path)
    assert set(said) == {"data", "sft"}
    for name, field in (("data", "model"), ("sft", "model")):
        assert (
            f"steps.{name}.{field}: file://base: it has no chat template; give it one, for example `base: {{uri"
            in (said[name])
        )


@pytest.mark.parametrize(
    "change",
    [
        ("base: file://base", "base: {uri: file://base, template: chatml}"),
        ("rows.jsonl, eval", "rows.jsonl, format: text, eval"),
    ],
    ids=["given", "plain text"],
)
def test_with_one_or_without_conversations_nothing_is_missing(
    recipe: Any, home: Home, tmp_path: Path, change: tuple[str, str]
) -> None:
    assert reasons(recipe(change), home, tmp_path) == {}


def test_a_gguf_file_says_whether_it_has_one(recipe: Any, home: Home, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + 64 * b"\0")
    assert "has no chat template" in reasons(recipe(("file://base", "x.gguf")), home, tmp_path)["data"]
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + 64 * b"\0" + b"tokenizer.chat_template" + 64 * b"\0")
    assert not any("template" in each for each in reasons(recipe(("file://base", "x.gguf")), home, tmp_path).values())


def test_an_adapter_on_tied_embeddings_is_refused_before_anything_runs(
    recipe: Any, home: Home, tmp_path: Path, base: Path
) -> None:
    given = ("base: file://base", "base: {uri: file://base, template: chatml}")
    change = ("max_steps: 2", "max_steps: 2, adapter: {kind: lora, targets: [q_proj, embed_tokens]}")
    assert (
        "steps.sft: adapter.targets: embed_tokens is the output layer, too"
        in (reasons(recipe(given, change), home, tmp_path)["sft"])
    )
    pico = ("base: file://base", "base: {uses: model.pico}")
    assert "embed_tokens is the output layer, too" in reasons(recipe(pico, change), home, tmp_path)["sft"]
    config = base / "config.json"
    config.write_text(config.read_text().replace('"tie_word_embeddings": true', '"tie_word_embeddings": false'))
    assert reasons(recipe(given, change), home, tmp_path) == {}


def test_a_misspelt_template_is_known(recipe: Any, home: Home, tmp_path: Path) -> None:
    said = reasons(recipe(("base: file://base", "base: {uri: file://base, template: chatlm}")), home, tmp_path)
    assert "template: no chat template `chatlm`; did you mean `chatml`?" in said["base"]


def test_models_that_render_nothing_need_no_template(pico: Any, base: Path, home: Home, tmp_path: Path) -> None:
    """A teacher gives probabilities of the student's text, and what adapters were trained on only its weights."""
    text = """
name: taught
base: {uri: file://base, template: chatml}
steps:
  old: {uses: model.source, uri: file://base}
  data: {uses: data.prepare, source: rows.jsonl, eval_fraction: 0}
  kd: {uses: train.distill, model: base, teacher: old, data: data.train, max_steps: 2, adapter: {kind: full}}
  score: {uses: evaluate.tasks, model: old, candidates: [kd], data: data.train, verifier: {kind: exact}}
"""
    assert reasons(builder(text, tmp_path / "taught.yaml")(), home, tmp_path) == {}
