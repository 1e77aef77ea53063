"""Nights of one family: what is published, whom it meets, and when a night has nothing to do. Steps are made up."""

import json
import shutil
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from flows.cli.tables import family_table
from flows.execution import Execution
from flows.plan import PlannedStep
from flows.prepare import plan_recipe
from flows.publication import Publication, is_current, publish_release
from registry import family as family_module
from registry.family import load, promote, rollback
from registry.home import Home
from registry.members import Release
from steps.artifacts import Artifact, ReportFacts
from tests.registry.conftest import migrated  # noqa: F401 - a fixture
from tests.registry.workshop import MODEL_FACTS, Workshop, quantized_facts

RECIPE = """
name: nights
base: {uses: model.pico, hidden: 64, layers: 1, heads: 2, kv_heads: 1, pretrain_steps: 2}
seed: SEED
steps:
  data: {uses: data.prepare, source: rows.jsonl, near_dedup: null, eval_fraction: 0.2}
  sft: {uses: train.sft, model: base, data: data.train, adapter: {kind: full}, max_steps: 2}
  gguf: {uses: quantize.gguf, model: sft, matrix: {scheme: [SCHEMES]}}
  quality: {uses: evaluate.compare, reference: sft, candidates: [base, gguf], data: data.eval, rows: ROWS}
publish:
  family: nights
  members: [MEMBERS]
  gates: [GATES]
"""
BOUND = "{metric: quality.perplexity, at_most: 1000}"
NOT_WORSE = "{metric: quality.nll, against: champion}"
FACTS = {"rows": 1, "format": "messages", "template_sha256": None, "statistics": {}}


class Nights:
    """Runs a recipe night after night; a step's result is made from its key, a report's from `nll` by candidate."""

    def __init__(self, home: Home, folder: Path) -> None:
        self.home = home
        self.folder = folder
        self.workshop = Workshop(home)
        self.rows = 12
        """How many rows the comparison asks for."""
        self.perplexity = 914.5
        """What it finds."""

    def __call__(
        self, gates: str = BOUND, members: str = "sft, gguf", seed: int = 1, schemes: str = "Q8_0", **nll: float
    ) -> tuple[bool, Release]:
        """Return whether there was nothing to do, and the release."""
        recipe = self.recipe(gates, members, seed, schemes)
        self.run(recipe, nll)
        execution = self.plan(recipe)
        assert not execution.plan.todo
        if current := is_current(execution):
            return True, found(current)
        for name in execution.plan.steps:
            execution.run(name)
        release = found(publish_release(execution))
        execution.close(ok=True)
        assert is_current(self.plan(recipe)), "the night after has nothing to do"
        return False, release

    def sentence(self, seed: int) -> str:
        """What a night says that has nothing to do."""
        return is_current(self.plan(self.recipe(BOUND, "sft, gguf", seed, "Q8_0"))).sentence

    def recipe(self, gates: str, members: str, seed: int, schemes: str) -> Path:
        text = RECIPE.replace("SEED", str(seed)).replace("SCHEMES", schemes).replace("ROWS", str(self.rows))
        path = self.folder / "nights.yaml"
        path.write_text(text.replace("MEMBERS", members).replace("GATES", gates), encoding="utf-8")
        return path

    def run(self, recipe: Path, nll: dict[str, float]) -> None:
        record = self.workshop.begin("nights")
        for step in self.plan(recipe).plan.steps.values():
            if step.status == "run":
                record.record(self.workshop.step(step.name, *self.made(step, nll)))
        record.finish()

    def plan(self, recipe: Path, *, thorough: bool = False) -> Execution:
        return Execution(plan_recipe(str(recipe), (), thorough=thorough, home=self.home), self.home, 1)

    def made(self, step: PlannedStep, nll: dict[str, float]) -> list[Artifact[Any]]:
        kind = {output: each.kind for output, each in step.node.outputs.items()}
        facts, files = MODEL_FACTS, {"model.safetensors": step.key.encode()}
        if "Dataset" in kind.values():
            facts = FACTS
        elif "Quantized" in kind.values():
            facts = quantized_facts("gguf", step.node.member or "Q8_0")
        elif "Report" in kind.values():
            names = [ref.step for field in ("reference", "candidates") for ref in step.node.edges[field]]
            rows = [
                {"candidate": name, "sample": str(n), "nll": nll.get(name.partition("[")[0], 1.0), "tokens": 1}
                for name in names
                for n in range(12)
            ]
            facts = ReportFacts(metrics={f"{name}/perplexity": self.perplexity for name in names}).as_plain()
            files = {"rows.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode()}
        return [
            self.workshop.make(each, files, facts, step=step.node.kind.name, output=output, key=step.key)
            for output, each in kind.items()
        ]

    @property
    def champion(self) -> int | None:
        return load(self.home, "nights").aliases.get("champion")


def found(publication: Publication) -> Release:
    assert publication.release
    return publication.release


@pytest.fixture
def nights(
    home: Home,
    tmp_path: Path,
    migrated: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> Nights:
    monkeypatch.chdir(tmp_path)
    home.root.mkdir()
    shutil.copyfile(migrated, home.database)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "answer": "b"}\n', encoding="utf-8")
    return Nights(home, tmp_path)


def said(release: Release) -> str:
    assert release.decision
    return release.decision.sentence


def against(release: Release) -> int | None:
    assert release.decision
    return release.decision.against


def test_changed_gates_are_judged_again(nights: Nights) -> None:
    _, refused = nights(BOUND.replace("1000", "5"))
    assert "it must be at most 5" in said(refused)
    assert nights.champion is None
    was_current, promoted = nights(BOUND)
    assert (was_current, promoted.id, nights.champion) == (False, refused.id, refused.version)
    assert nights(BOUND)[0]
    was_current, stays = nights(BOUND.replace("1000", "0.1"))
    assert not was_current
    assert "It stays champion, though it would not become it now" in said(stays)
    assert "it must be at most 0.1" in said(stays)
    assert nights.champion == refused.version


@pytest.mark.parametrize(("gate", "worse"), [(BOUND, 1.0), (NOT_WORSE, 2.0)], ids=["bound", "against the champion"])
def test_a_new_report_on_published_members_is_judged(nights: Nights, gate: str, worse: float) -> None:
    nights(gate, seed=1)
    _, promoted = nights(gate, seed=2)
    assert nights.champion == promoted.version
    nights.rows, nights.perplexity = 13, 2000.0
    was_current, again = nights(gate, seed=2, sft=worse)
    assert (was_current, again.id) == (False, promoted.id)
    assert "It stays champion, though it would not become it now" in said(again)
    assert again.reports != promoted.reports
    nights.rows, nights.perplexity = 12, 914.5
    was_current, back = nights(gate, seed=2)
    assert not was_current
    assert said(back) == said(promoted)


def test_a_new_report_lifts_what_the_old_one_held_back(nights: Nights) -> None:
    nights.perplexity = 2000.0
    _, refused = nights(BOUND)
    assert nights.champion is None
    nights.rows, nights.perplexity = 13, 5.0
    _, promoted = nights(BOUND)
    assert promoted.id == refused.id
    assert nights.champion == promoted.version


def test_a_judgement_that_was_killed_half_way_is_made_again(nights: Nights, monkeypatch: pytest.MonkeyPatch) -> None:
    nights(BOUND)
    nights.rows, nights.perplexity = 13, 2000.0
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(family_module, "_settle", killed)
        nights(BOUND)
    was_current, again = nights(BOUND)
    assert not was_current
    assert "it would not become it now" in said(again)


def killed(*_: object) -> None:
    """The process ends between two words of it."""
    raise KeyboardInterrupt


def test_one_that_is_promoted_by_hand_is_so_until_the_gates_change(nights: Nights) -> None:
    _, refused = nights(BOUND.replace("1000", "5"))
    promote(nights.workshop.recorder, "nights", str(refused.version), "the bound was too low")
    was_current, by_hand = nights(BOUND.replace("1000", "5"))
    assert was_current
    assert said(by_hand) == "Promoted by hand: the bound was too low."
    assert nights.champion == refused.version


def test_another_principal_member_is_another_release(nights: Nights) -> None:
    _, first = nights()
    was_current, other = nights(members="gguf, sft")
    assert not was_current
    assert other.id != first.id
    assert [member.role for member in other.members] == ["gguf[Q8_0]", "sft"]
    assert set(other.aliases) == {"candidate", "champion"}
    assert nights(members="gguf, sft")[0]


def test_an_added_member_is_judged_beside_the_champion_of_now_and_what_both_share_is_equal(nights: Nights) -> None:
    first, champion = nights(NOT_WORSE)[1], nights(NOT_WORSE, seed=2)[1]
    assert (against(first), against(champion)) == (None, first.version)
    both = f"{NOT_WORSE}, {NOT_WORSE[:-1]}, member: gguf}}"
    _, more = nights(both, seed=2, schemes="Q8_0, Q4_K_M")
    assert more.id != champion.id
    assert against(more) == champion.version
    assert more.decision and [outcome.member for outcome in more.decision.outcomes] == [
        "sft",
        "gguf[Q8_0]",
        "gguf[Q4_K_M]",
    ]
    assert "`sft` is the champion's own: equal in quality.nll." in said(more)
    assert nights.champion == more.version
    _, worse = nights(both, seed=2, schemes="Q8_0, Q5_K_M", gguf=2.0)
    assert "quality.nll of `gguf[Q5_K_M]` is 2 against the champion's 1" in said(worse)
    assert nights.champion == more.version


@pytest.mark.parametrize("nll", [1.0, 2.0], ids=["as good", "worse"])
def test_an_earlier_recipe_meets_the_champion_of_now(nights: Nights, nll: float) -> None:
    _, _, two, three = (nights(NOT_WORSE, seed=seed)[1] for seed in (1, 2, 3, 4))
    assert nights.champion == three.version
    was_current, again = nights(NOT_WORSE, seed=3, sft=nll)
    assert not was_current
    assert (again.id, against(again)) == (two.id, three.version)
    assert nights.champion == (two.version if nll == 1.0 else three.version)


def test_a_recipe_whose_former_champion_was_deleted_goes_on(nights: Nights) -> None:
    one, two = (nights(NOT_WORSE, seed=seed)[1] for seed in (1, 2))
    for member in one.members:
        nights.workshop.recorder.tracking.client.delete_model_version("nights", str(member.version))
    shutil.rmtree(nights.home.index)
    assert nights(NOT_WORSE, seed=2)[1].id == two.id
    assert nights.champion == two.version
    assert against(nights(NOT_WORSE, seed=3)[1]) == two.version


def test_what_was_rolled_back_says_how_it_is_promoted_all_the_same(nights: Nights) -> None:
    nights()
    _, two = nights(seed=2)
    rollback(nights.workshop.recorder, "nights", "it flatters")
    _, again = nights(BOUND.replace("1000", "2000"), seed=2)
    assert f"(it flatters); if it is right, `posttrain promote nights {two.version}` makes it champion" in said(again)


def test_a_night_without_work_says_that_its_release_was_rolled_back_or_is_champion_no_more(nights: Nights) -> None:
    _, one = nights()
    _, two = nights(seed=2)
    assert f"({', '.join(two.aliases)}), 2 members. Promoted: the one gate held." in nights.sentence(seed=2)
    superseded = f"Version {two.version} is champion now. Earlier: Promoted"
    assert f"version {one.version} (previous), 2 members. {superseded}" in nights.sentence(seed=1)
    rollback(nights.workshop.recorder, "nights", "it flatters")
    sentence = nights.sentence(seed=2)
    assert "(candidate), 2 members. It was rolled back at 20" in sentence
    by_hand = f"`posttrain promote nights {two.version}` makes it champion"
    assert f"(it flatters); if it is right, {by_hand}. Before that: Promoted" in sentence
    shown = Console(width=400, record=True, file=StringIO())
    shown.print(family_table(load(nights.home, "nights")))
    assert "It was rolled back at 20" in shown.export_text()
    promote(nights.workshop.recorder, "nights", str(two.version), "it does not")
    assert "2 members. Promoted by hand: it does not." in nights.sentence(seed=2)
