"""Who meets whom: each published member that a gate judges is measured beside the champion's own."""

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from flows.graph import Graph, Node, build_graph
from flows.opponent import counterpart, with_opponent
from flows.plan import graph_keys
from flows.recipe import load_recipe
from flows.rounds import titled
from registry.errors import RegistryError
from registry.family import find
from registry.gates import Evidence, decide
from registry.home import Home
from registry.index import Index
from registry.members import Family, Member, Release
from steps.frame import UserError, load_kind
from tests.flows.command import Command

RECIPE = """
name: formats
base: {uses: model.pico, hidden: 64, layers: 1, heads: 2, kv_heads: 1, pretrain_steps: 2}
seed: 5
steps:
  data: {uses: data.prepare, source: rows.jsonl, near_dedup: null, eval_fraction: 0.2}
  sft: {uses: train.sft, model: base, data: data.train, adapter: {kind: full}, max_steps: 24, batch_size: 8,
        learning_rate: 5.0e-3}
  gguf: {uses: quantize.gguf, model: sft, scheme: Q8_0}
  quality: {uses: evaluate.compare, reference: sft, candidates: [gguf], data: data.eval, rows: 16, generate_rows: 2,
            new_tokens: 4}
publish:
  family: formats
  members: [gguf, sft]
  gates:
    - {metric: quality.perplexity, against: champion, no_worse_by: 0.05}
    - {metric: quality.nll, member: sft, against: champion, no_worse_by: 0.05}
"""


def member(role: str, selector: str, version: int, kind: str) -> Member:
    form, _, scheme = selector.partition(":")
    return Member(
        family="formats", name="formats", role=role, kind=kind, format=form, scheme=scheme, selector=selector,
        digest=f"{version:064d}", parents={}, key=f"{version + 100:064d}", release="r", version=version, run_id="r",
        model_id="m", size=1,
    )  # fmt: skip


def family(*members: Member) -> Family:
    release = Release(
        id="r", family="formats", version=members[0].version, members=members, created_at=datetime.now(UTC)
    )
    return Family(name="formats", aliases={"champion": members[0].version}, releases=(release,))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"How many minutes are {hours} hours?"},
                {"role": "assistant", "content": f"{hours} hours are {60 * hours} minutes."},
            ]
        }
        for hours in range(2, 122)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "formats.yaml").write_text(RECIPE, encoding="utf-8")
    return tmp_path


def with_champion(folder: Path, champion: Family) -> Graph:
    home = Home.at(folder / "home")
    index = Index(home.index)
    index.create()
    index.put_family("formats", champion.model_dump_json().encode())
    return with_opponent(build_graph(load_recipe(folder / "formats.yaml", ())), home, folder)


def test_each_judged_member_meets_the_champions_of_its_name(folder: Path) -> None:
    graph = with_champion(folder, family(member("gguf", "gguf:Q8_0", 1, "Quantized"), member("sft", "hf", 2, "Model")))
    assert graph.opponent
    assert (graph.opponent.version, dict(graph.opponent.names)) == (1, {"gguf": "champion", "sft": "champion[sft]"})
    uris = {name: getattr(node.config, "uri", "") for name, node in graph.nodes.items() if node.family == "champion"}
    assert uris == {
        "champion": "registry://formats@1/gguf:Q8_0",
        "champion[sft]": "registry://formats@1/hf",
    }
    assert [ref.step for ref in graph.nodes["quality"].edges["candidates"]] == ["gguf", "champion", "champion[sft]"]
    names: Any = graph.nodes["quality"].config
    assert names.names == ("gguf", "champion", "champion[sft]")


def test_a_member_that_the_champion_has_not_meets_its_principal(folder: Path) -> None:
    graph = with_champion(folder, family(member("merged", "hf", 1, "Model")))
    assert graph.opponent
    assert dict(graph.opponent.names) == {"gguf": "champion", "sft": "champion"}
    assert [ref.step for ref in graph.nodes["quality"].edges["candidates"]] == ["gguf", "champion"]
    only = family(member("merged", "hf", 1, "Model")).releases[0]
    assert counterpart(only, graph.nodes["sft"], is_principal=False) is only.members[0]


def test_a_member_of_a_round_meets_the_champions_of_its_last_round() -> None:
    roles = ("gguf[2,Q8_0]", "sft[1,Q8_0]", "sft[9]", "sft[10]", "sft[Q8_0]", "tuned[11]")
    champion = family(*(member(role, "hf", at, "Model") for at, role in enumerate(roles, start=1))).releases[0]

    def met(name: str, round: int, value: str = "") -> str:
        kind = load_kind("model.pico")
        node = Node(titled(name, round, value), name, kind, kind.config(), member=value, round=round)
        return counterpart(champion, node, is_principal=False).role

    assert met("sft", 12) == "sft[10]", "the latest, by number"
    assert (met("sft", 3, "Q8_0"), met("gguf", 1, "Q8_0")) == ("sft[1,Q8_0]", "gguf[2,Q8_0]")
    assert (met("tuned", 1), met("sft", 0, "Q8_0")) == ("tuned[11]", "sft[Q8_0]")
    assert met("gguf", 1, "Q4_K_M") == "gguf[2,Q8_0]" == champion.members[0].role, "none alike: the principal"


def test_a_champion_that_no_report_can_measure_is_refused_before_anything_runs(folder: Path) -> None:
    with pytest.raises(UserError, match=r"the champion's `sft` is an Adapter, which `quality` .* cannot measure"):
        with_champion(folder, family(member("sft", "adapter", 1, "Adapter")))


def test_a_member_is_never_compared_with_itself() -> None:
    rows = {name: tuple({"sample": str(n), "score": 1.0} for n in range(20)) for name in ("a", "b", "champion")}
    evidence = {"quality": Evidence(metrics={}, rows=rows)}
    gate = {"metric": "quality.accuracy", "member": "b", "against": "champion"}
    from registry.gates import Gate

    with pytest.raises(RegistryError, match="`b` meets no member of the champion, only itself"):
        decide([Gate.model_validate(gate)], ["a", "b"], evidence, evidence, {"a": "champion"})


def test_no_family_is_no_opponent(folder: Path) -> None:
    graph = build_graph(load_recipe(folder / "formats.yaml", ()))
    home = Home.at(folder / "home")
    assert with_opponent(graph, home, folder) is graph
    assert find(home, "formats") is None
    assert set(graph_keys(graph, home, folder)[0]) == set(graph.nodes)


@pytest.mark.recipes
def test_a_family_published_as_gguf_first_goes_on_and_a_worse_member_is_not_promoted(folder: Path) -> None:
    """Two nights; the second trains with next to no steps, and its second member is what the gate refuses."""
    command = Command(folder / "home", cwd=folder)
    first = command("run", "formats.yaml", "--json")
    assert first.code == 0, first.err
    shutil.rmtree(folder / "home" / "index")
    worse = command("run", "formats.yaml", "--set=steps.sft.max_steps=1", "--json")
    assert worse.code == 0, worse.err
    assert {"champion", "champion[sft]"} <= worse.json["steps"].keys()
    shown = command("show", "formats", "--json").json
    assert [len(release["members"]) for release in shown["releases"]] == [2, 2]
    assert shown["aliases"]["champion"] == shown["releases"][0]["version"]
    assert shown["aliases"]["candidate"] == shown["releases"][1]["version"]
    decision = shown["releases"][1]["decision"]
    assert decision["against"] == shown["releases"][0]["version"]
    judged = {outcome["member"]: outcome for outcome in decision["outcomes"]}
    assert not judged["sft"]["passed"]
    assert judged["sft"]["value"] > judged["sft"]["champion"] + 0.05
    again = command("run", "formats.yaml", "--set=steps.sft.max_steps=1", "--json").json
    assert {step["outcome"] for step in again["steps"].values()} == {"cached"}
