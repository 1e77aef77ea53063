"""Rounds: a group of steps that is repeated; what a name means in it and outside of it, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest

from flows.graph import Graph, build_graph
from flows.plan import graph_keys
from flows.publish_check import judged_gates
from flows.recipe import load_recipe
from registry.home import Home
from steps.frame import UserError
from tests.flows.command import Command
from tests.flows.conftest import builder

LOOP = """
name: loop
base: {uses: model.pico, pretrain_steps: 4}
seed: 3
steps:
  data: {uses: data.prepare, source: python-stdlib-docs, limit: 60, max_tokens: 200, eval_fraction: 0.2}
  improve:
    rounds: 3
    carry:
      policy: {start: base, then: merged}
    steps:
      tuned: {uses: train.sft, model: policy, data: data.train, max_steps: 4}
      merged: {uses: merge.adapter, adapter: tuned}
      gguf: {uses: quantize.gguf, model: merged, matrix: {scheme: [Q8_0, F16]}}
  quality: {uses: evaluate.compare, reference: merged, candidates: [base, merged], data: data.eval}
publish: {family: loop, members: [merged, gguf], gates: [{metric: quality.perplexity, at_most: 100}]}
"""
Loop = Callable[..., Graph]


@pytest.fixture
def loop(tmp_path: Path) -> Loop:
    """Build the graph of the recipe above, with replacements and overrides."""

    return builder(LOOP, tmp_path / "loop.yaml")


def refusal(loop: Loop, *changes: tuple[str, str], overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(UserError) as caught:
        loop(*changes, overrides=overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def seeds(graph: Graph, family: str) -> list[int]:
    return [node.config.model_dump()["seed"] for node in graph.nodes.values() if node.family == family]


def test_rounds_follow_each_other(loop: Loop) -> None:
    graph = loop()
    assert list(graph.nodes) == [
        "base", "data",
        "tuned[1]", "merged[1]", "gguf[1,Q8_0]", "gguf[1,F16]",
        "tuned[2]", "merged[2]", "gguf[2,Q8_0]", "gguf[2,F16]",
        "tuned[3]", "merged[3]", "gguf[3,Q8_0]", "gguf[3,F16]",
        "quality",
    ]  # fmt: skip
    assert graph.nodes["tuned[1]"].parents == ["base", "data"]
    assert graph.nodes["tuned[2]"].parents == ["merged[1]", "data"]
    assert graph.nodes["merged[3]"].parents == ["tuned[3]", "merged[2]"]
    assert graph.nodes["gguf[2,F16]"].parents == ["merged[2]"]


def test_each_round_draws_anew_unless_it_says_otherwise(loop: Loop) -> None:
    assert seeds(loop(), "tuned") == [3, 4, 5]
    assert seeds(loop(("max_steps: 4", "seed: 9")), "tuned") == [9, 9, 9]


def test_from_outside_a_name_is_the_last_round_or_all_of_them(loop: Loop) -> None:
    graph = loop()
    quality = graph.nodes["quality"]
    assert [ref.step for ref in quality.edges["reference"]] == ["merged[3]"]
    assert quality.config.model_dump()["names"] == ("base", "merged[1]", "merged[2]", "merged[3]")
    assert [node.name for node in graph.members("merged")] == ["merged[3]"]
    assert [node.name for node in graph.members("gguf")] == ["gguf[3,Q8_0]", "gguf[3,F16]"]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("merged[1]", ["merged[1]"]),
        ("gguf[2]", ["gguf[2,Q8_0]", "gguf[2,F16]"]),
        ("gguf[F16]", ["gguf[1,F16]", "gguf[2,F16]", "gguf[3,F16]"]),
        ("gguf[2,F16]", ["gguf[2,F16]"]),
    ],
)
def test_brackets_choose_a_round_and_a_member(loop: Loop, name: str, meant: list[str]) -> None:
    quality = loop(("[base, merged]", f"[base, '{name}']")).nodes["quality"]
    assert [ref.step for ref in quality.edges["candidates"]] == ["base", *meant]


def test_a_round_sees_its_own_members_first(loop: Loop) -> None:
    """A matrix over numbers reads like rounds: within a round, `more[2]` is the member, not the round."""
    full = "data: data.train, adapter: {kind: full}, matrix: {max_steps: [2, 4]}"
    more = f"more: {{uses: train.sft, model: merged, {full}}}"
    score = "score: {uses: evaluate.compare, reference: merged, candidates: ['more[2]', more], data: data.eval}"
    graph = loop(("      gguf:", f"      {more}\n      {score}\n      gguf:"))
    assert [ref.step for ref in graph.nodes["score[3]"].edges["candidates"]] == ["more[3,2]", "more[3,4]"]


def test_data_may_be_carried_by_its_output(loop: Loop) -> None:
    pool = "pool: {start: data.train, then: prepared.train}"
    prepared = "prepared: {uses: data.prepare, source: python-stdlib-docs, model: policy, limit: 50}"
    graph = loop(
        ("      policy:", f"      {pool}\n      policy:"),
        ("      tuned:", f"      {prepared}\n      tuned:"),
        ("model: policy, data: data.train", "model: policy, data: pool"),
    )
    refs = [str(graph.nodes[f"tuned[{number}]"].edges["data"][0]) for number in (1, 2, 3)]
    assert refs == ["data.train", "prepared[1].train", "prepared[2].train"]


def test_one_more_round_leaves_the_others_cached(loop: Loop, home: Home, tmp_path: Path) -> None:
    three, four = (
        graph_keys(loop(overrides=(f"steps.improve.rounds={rounds}",)), home, tmp_path)[0] for rounds in (3, 4)
    )
    assert set(four) - set(three) == {"tuned[4]", "merged[4]", "gguf[4,Q8_0]", "gguf[4,F16]"}
    assert {name for name in three if three[name] != four[name]} == {"quality"}


def test_set_reaches_into_a_group(loop: Loop) -> None:
    graph = loop(overrides=("steps.improve.rounds=2", "steps.improve.steps.tuned.max_steps=9"))
    assert [node.config.model_dump()["max_steps"] for node in graph.nodes.values() if node.family == "tuned"] == [9, 9]
    assert "did you mean `tuned`?" in refusal(loop, overrides=("steps.improve.steps.tined.max_steps=9",))


def test_extends_changes_a_group_and_replaces_it_by_a_step(write: Callable[[str, str], Path]) -> None:
    write("loop.yaml", LOOP)
    more = "{rounds: 2, steps: {tuned: {max_steps: 7}, gguf: null}}"
    head = "extends: loop.yaml\nname: above\npublish: null\nsteps:\n"
    graph = build_graph(load_recipe(write("above.yaml", f"{head}  improve: {more}\n")))
    assert list(graph.nodes)[2:] == ["tuned[1]", "merged[1]", "tuned[2]", "merged[2]", "quality"]
    single = "{uses: train.sft, model: base, data: data.train}"
    graph = build_graph(load_recipe(write("single.yaml", f"{head}  improve: {single}\n  quality: null\n")))
    assert list(graph.nodes) == ["base", "data", "improve"]


def test_many_rounds_are_planned_quickly(loop: Loop) -> None:
    assert len(loop(overrides=("steps.improve.rounds=300",)).nodes) == 3 + 300 * 4


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("model: policy", "model: polcy", "12: steps.improve.steps.tuned.model: there is no step `polcy`; did you"),
        ("start: base", "start: bsae", "10: steps.improve.carry.policy.start: there is no step `bsae`; did you mean"),
        ("start: base", "start: tuned", "carry.policy.start: `tuned` is of the group; name what is there before its f"),
        ("start: base", "start: data", "carry.policy.start: `data` does not exist; did you mean `data."),
        ("start: base", "start: data.train", "policy: every round needs the same kind: `data.train` gives a Dataset"),
        ("then: merged", "then: data", "10: steps.improve.carry.policy.then: `data` is no step of `improve`;"),
        ("then: merged", "then: mergd", "carry.policy.then: `mergd` is no step of `improve`; did you mean `merged`?"),
        ("then: merged", "then: tuned", "every round needs the same kind: `base` gives a Model, `tuned` an Adapter"),
        ("then: merged", "then: gguf", "`gguf` is a matrix of 2 steps; name one: `gguf[Q8_0]` or `gguf[F16]`"),
        ("then: merged", "thn: merged", "10: steps.improve.carry.policy.thn: unknown key; did you mean `then`?"),
        ("rounds: 3", "rouns: 3", "8: steps.improve.rouns: unknown key; did you mean `rounds`?"),
        ("rounds: 3", "rounds: 0", "8: steps.improve.rounds: input should be greater than or equal to 1, not 0"),
        ("max_steps: 4", "max_stps: 4", "12: steps.improve.steps.tuned.max_stps: unknown key; did you mean `max_steps"),
        ("model: policy", "model: merged", "the steps form a cycle: tuned[1] → merged[1] → tuned[1]"),
        (
            "model: policy",
            "model: 'merged[3]'",
            "tuned.model: `merged[3]` is of one round of `improve` for ever; write",
        ),
        (
            "model: policy",
            "model: gguf",
            "tuned.model: `gguf` is a matrix of 2 steps; name one: `gguf[Q8_0]` or `gguf[F",
        ),
        (
            "model: policy",
            "model: 'gguf[2,F16]'",
            "for ever; write `gguf[F16]`, without its number",
        ),
        ("model: policy", "model: 'gguf[2]'", "for ever; write `gguf`, without its number"),
        ("model: policy", "model: 'polcy[1]'", "there is no step `polcy[1]`; did you mean `policy`?"),
        ("model: policy", "model: 'mergd[1]'", "there is no step `mergd[1]`; did you mean `merged`?"),
        ("adapter: tuned", "adapter: 'tuned[1]'", "merged.adapter: `tuned[1]` is of one round of `improve` for ever;"),
        (
            "then: merged",
            "then: 'merged[1]'",
            "policy.then: `merged[1]` is of one round of `improve` for ever; write `mer",
        ),
        (
            "then: merged",
            "then: 'gguf[1,F16]'",
            "policy.then: `gguf[1,F16]` is of one round of `improve` for ever; write `",
        ),
        (
            "model: merged, m",
            "model: tuned, m",
            "gguf.model: quantize.gguf takes a Model here, `tuned[1]` (train.sft) gives an Adap",
        ),
        ("model: merged, m", "model: tuned, m", "; `merged` would fit"),
        ("reference: merged", "reference: tuned", "; `merged` would fit"),
        ("reference: merged", "reference: gguf", "`gguf` is a matrix of 2 steps; name one: `gguf[Q8_0]` or `gguf[F"),
        ("  quality:", "  tuned: {uses: model.pico}\n  quality:", "15: steps.tuned: the name `tuned` is taken by"),
        ("      policy:", "      tuned:", "12: steps.improve.steps.tuned: the name `tuned` is taken by"),
        ("      gguf:", "      inner: {rounds: 2, steps: {}}\n      gguf:", "`inner` is a group within a group"),
        ("      tuned:", "      base:", "`base` is kept for the recipe's own"),
        ("members: [merged, gguf]", "members: ['merged[4]']", "publish.members.0: no step `merged[4]`; did you mean"),
        (
            "at_most: 100",
            "at_most: 100, member: gguff",
            "16: publish.gates.0.member: `gguff` is not among the published members;",
        ),
    ],
)
def test_refused_in_one_sentence_with_its_place(loop: Loop, old: str, new: str, sentence: str) -> None:
    assert sentence in refusal(loop, (old, new))


def test_a_step_from_which_the_rounds_begin_cannot_take_what_they_make(loop: Loop) -> None:
    cold = "  cold: {uses: train.sft, model: merged, data: data.train, adapter: {kind: full}}\n  improve:"
    message = refusal(loop, ("  improve:", cold), ("start: base", "start: cold"))
    assert ":7: steps.cold.model: `merged` is made in the rounds of `improve`, which need `cold`" in message
    assert "cold → merged[3] → tuned[3] → merged[2] → tuned[2] → merged[1] → tuned[1] → cold" in message


def test_what_is_suggested_within_a_group_means_the_same_rounds_step(loop: Loop) -> None:
    """A matrix within the group, and the sentence's own advice taken."""
    fan = ("data: data.train, max_steps: 4", "data: data.train, adapter: {kind: full}, matrix: {max_steps: [2, 40]}")
    many = ("{uses: merge.adapter, adapter: tuned}", "{uses: train.sft, model: tuned, data: data.train}")
    assert "model: `tuned` is a matrix of 2 steps; name one: `tuned[2]` or `tuned[40]`" in refusal(loop, fan, many)
    chosen = (many[0], "{uses: train.sft, model: 'tuned[2]', data: data.train, adapter: {kind: full}}")
    graph = loop(fan, chosen)
    for number in (1, 2, 3):
        assert [ref.step for ref in graph.nodes[f"merged[{number}]"].edges["model"]] == [f"tuned[{number},2]"]
    then = ("then: merged", "then: tuned")
    assert "policy.then: `tuned` is a matrix of 2 steps; name one: `tuned[2]`" in refusal(loop, fan, chosen, then)
    graph = loop(fan, chosen, ("then: merged", "then: 'tuned[40]'"))
    assert graph.nodes["tuned[3,2]"].parents == ["tuned[2,40]", "data"]


def test_from_outside_a_suggested_name_stays_the_last_rounds(loop: Loop) -> None:
    """Unless its member looks like a round: then only the whole name is clear."""
    reference = ("reference: merged", "reference: tuned")
    fan = ("data: data.train, max_steps: 4", "data: data.train, adapter: {kind: full}, matrix: {max_steps: [2, 40]}")
    merged = ("{uses: merge.adapter, adapter: tuned}", "{uses: train.sft, model: 'tuned[2]', data: data.train}")
    full = (merged[0], merged[1].replace("}", ", adapter: {kind: full}}"))
    message = refusal(loop, fan, full, reference)
    assert "quality.reference: `tuned` is a matrix of 2 steps; name one: `tuned[3,2]` or `tuned[40]`" in message
    loop40 = loop(fan, full, ("reference: merged", "reference: 'tuned[40]'"), overrides=("steps.improve.rounds=4",))
    assert [ref.step for ref in loop40.nodes["quality"].edges["reference"]] == ["tuned[4,40]"]


def test_a_report_that_a_gate_may_name_stays_the_last_rounds(loop: Loop) -> None:
    score = (
        "score: {uses: evaluate.compare, reference: merged, candidates: gguf, data: data.eval, matrix: {rows: [4, 8]}}"
    )
    message = refusal(loop, ("      gguf:", f"      {score}\n      gguf:"), ("metric: quality", "metric: score"))
    assert "`score` is several reports; name one: `score[4].perplexity` or `score[8].perplexity`" in message


def test_a_name_of_another_group_that_may_be_a_round_or_a_member_is_refused_within_a_group_too(loop: Loop) -> None:
    fan = ("data: data.train, max_steps: 4", "data: data.train, adapter: {kind: full}, matrix: {max_steps: [2, 40]}")
    full = (
        "{uses: merge.adapter, adapter: tuned}",
        "{uses: train.sft, model: 'tuned[2]', data: data.train, adapter: {kind: full}}",
    )
    more = "  more: {rounds: 2, steps: {then: {uses: train.sft, model: 'tuned[2]', data: data.train}}}\n  quality:"
    assert "steps.more.steps.then.model: `tuned[2]` may mean the member 2" in refusal(
        loop, fan, full, ("  quality:", more)
    )


@pytest.mark.slow
def test_a_loop_runs_and_goes_on_where_it_ended(write: Callable[[str, str], Path], tmp_path: Path) -> None:
    tuned = "{uses: train.sft, model: policy, data: data.train, adapter: {kind: full}, max_steps: 2, batch_size: 2}"
    recipe = write(
        "loop.yaml",
        "name: loop\nbase: {uses: model.pico, hidden: 32, layers: 1, vocabulary: 300, pretrain_steps: 2}\nsteps:\n"
        "  data: {uses: data.prepare, source: python-stdlib-docs, limit: 20, max_tokens: 100, eval_fraction: 0.3}\n"
        "  improve:\n    rounds: 2\n    carry: {policy: {start: base, then: tuned}}\n"
        f"    steps: {{tuned: {tuned}}}\n"
        "publish: {family: loop, members: [tuned]}\n",
    )
    command = Command(tmp_path / "home")
    two = command("run", str(recipe), "--json")
    assert two.code == 0, two.err
    assert {name: step["outcome"] for name, step in two.json["steps"].items()} == dict.fromkeys(
        ("base", "data", "tuned[1]", "tuned[2]"), "finished"
    )
    three = command("run", str(recipe), "--set=steps.improve.rounds=3", "--json").json
    outcomes = {name: step["outcome"] for name, step in three["steps"].items()}
    assert outcomes == {**dict.fromkeys(("base", "data", "tuned[1]", "tuned[2]"), "cached"), "tuned[3]": "finished"}
    tuned_digests = [step["outputs"][""] for name, step in three["steps"].items() if name.startswith("tuned")]
    assert len(set(tuned_digests)) == 3
    (member,) = command("show", "loop", "--json").json["releases"][-1]["members"]
    assert (member["name"], member["digest"]) == ("loop", tuned_digests[-1])


def test_a_name_that_may_be_a_round_or_a_member_is_refused(loop: Loop) -> None:
    """A step of the group has a member 2, as the group has a round 2."""
    ranks = ("max_steps: 4}", "max_steps: 4, matrix: {seed: [2, 8]}}")
    merged = ("{uses: merge.adapter, adapter: tuned}", '{uses: merge.adapter, adapter: "tuned[2]"}')
    best = ("  quality:", '  best: {uses: merge.adapter, adapter: "tuned[2]"}\n  quality:')
    assert loop(ranks, merged), "inside the group it is the member of the same round"
    said = refusal(loop, ranks, merged, best)
    assert "steps.best.adapter: `tuned[2]` may mean the member 2 of every round, or round 2" in said
    assert "write `tuned[ROUND,2]` or `tuned[2,MEMBER]`" in said
    assert loop(ranks, merged, (best[0], best[1].replace("tuned[2]", "tuned[3,2]")))
    assert loop(ranks, merged, (best[0], best[1].replace("tuned[2]", "tuned[8]")))


def gated(gate: str) -> tuple[str, str]:
    """A change of the recipe: its members by names without a round, and this gate."""
    old = "members: [merged, gguf], gates: [{metric: quality.perplexity, at_most: 100}]"
    return old, f"members: [merged, 'gguf[Q8_0]'], gates: [{{{gate}}}]"


@pytest.mark.parametrize("member", ["gguf[Q8_0]", "gguf", "gguf[3,Q8_0]", "gguf[3]"])
def test_a_gate_names_a_member_of_the_last_round_as_the_published_members_do(loop: Loop, member: str) -> None:
    measured = ("[base, merged]", "['gguf[Q8_0]']")
    graph = loop(measured, gated(f"metric: quality.kl, member: '{member}', at_most: 1"))
    assert [(index, gate.member) for index, gate in judged_gates(graph)] == [(0, "gguf[3,Q8_0]")]


def test_a_gate_on_what_is_not_published_is_refused_with_the_nearest(loop: Loop) -> None:
    message = refusal(loop, gated("metric: quality.kl, member: 'gguf[F16]', at_most: 1"))
    assert "publish.gates.0.member: `gguf[F16]` is not among the published members" in message
    message = refusal(loop, gated("metric: quality.kl, member: 'gguf[2,Q8_0]', at_most: 1"))
    assert "`gguf[2,Q8_0]` is not among the published members; did you mean `gguf[3,Q8_0]`?" in message


def test_a_gate_names_one_report_of_a_matrix_of_fractions(loop: Loop) -> None:
    scores = "  at: {uses: evaluate.tasks, candidates: [merged], data: data.eval, matrix: {temperature: [0.5, 1.0]}}\n"
    old, gate = gated("metric: 'at[0.5].accuracy', at_least: 0.1")
    assert judged_gates(loop(("publish:", f"{scores}publish:"), (old, gate)))[0][1].step == "at[0.5]"
    old, gate = gated("metric: at.accuracy, at_least: 0.1")
    message = refusal(loop, ("publish:", f"{scores}publish:"), (old, gate))
    assert "name one: `at[0.5].accuracy` or `at[1.0].accuracy`" in message
