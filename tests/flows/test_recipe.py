"""Recipes: what is read, and what is refused in one sentence that names file, line and key."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from flows.graph import Graph, build_graph
from flows.recipe import StepEntry, load_recipe
from flows.schema import recipe_schema
from steps.frame import UserError
from tests.flows.command import ROOT

Build = Callable[..., Graph]


def refusal(build: Build, *changes: tuple[str, str], overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(UserError) as caught:
        build(*changes, overrides=overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_graph_connects_what_the_recipe_names(recipe: Build) -> None:
    graph = recipe()
    assert list(graph.nodes) == ["base", "data", "sft", "merged", "gguf[Q8_0]", "gguf[F16]"]
    assert graph.nodes["merged"].parents == ["sft", "base"]
    assert graph.nodes["data"].parents == ["base"]
    assert graph.nodes["sft"].config.model_dump()["seed"] == 3


def test_matrix_fans_out_and_a_list_fans_in(recipe: Build) -> None:
    quality = (
        "  quality: {uses: evaluate.compare, reference: merged, candidates: [base, gguf], data: data.eval}\npublish"
    )
    graph = recipe(("publish", quality.replace("gguf]", "gguf, base]")))
    node = graph.nodes["quality"]
    assert [ref.step for ref in node.edges["candidates"]] == ["base", "gguf[Q8_0]", "gguf[F16]"]
    assert node.config.model_dump()["names"] == ("base", "gguf[Q8_0]", "gguf[F16]")
    assert node.config.model_dump()["reference_name"] == "merged"


def test_unknown_key_names_line_and_nearest(recipe: Build) -> None:
    message = refusal(recipe, ("batch_size: 4", "batchsize: 4"))
    assert "small.yaml:7: steps.sft.batchsize: unknown key; did you mean `batch_size`?" in message


def test_unknown_key_inside_an_adapter(recipe: Build) -> None:
    message = refusal(recipe, ("max_steps: 4", "adapter: {kind: lora, rnak: 8}"))
    assert "rnak: unknown key; did you mean `rank`?" in message


def test_unknown_key_at_the_top(recipe: Build) -> None:
    assert "sede: unknown key; did you mean `seed`?" in refusal(recipe, ("seed: 3", "sede: 3"))


def test_wrong_value_is_shown(recipe: Build) -> None:
    message = refusal(recipe, ("max_steps: 4", "max_steps: many"))
    assert "steps.sft.max_steps" in message
    assert "'many'" in message


def test_unknown_step_kind(recipe: Build) -> None:
    message = refusal(recipe, ("train.sft", "train.stf"))
    assert "steps.sft.uses: unknown step kind `train.stf`; did you mean `train.sft`?" in message


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "adapter: sft}",
            "adapter: sft, resources: {gpus: 2}}",
            "steps.merged.resources: 2 processes cannot share this step; leave `processes` and `nodes` out",
        ),
        (
            "max_steps: 4",
            "optimizer: muon, resources: {gpus: 2, launch: zero2}",
            "steps.sft.resources: optimizer: Muon trains whole matrices, which `launch: zero2` divides; use adamw",
        ),
        (
            "max_steps: 4",
            "optimizer: adamw_8bit, resources: {gpus: 2, launch: fsdp2}",
            "steps.sft.resources: optimizer: 8-bit AdamW cannot step weights that `launch: fsdp2` divides",
        ),
        (
            "  merged:",
            "  some: {uses: data.sample, model: base, data: data.train, backend: vllm, tensor_parallel: 4,"
            " resources: {gpus: 6}}\n  merged:",
            "steps.some.resources: tensor_parallel: 4 does not divide a node's 6 GPUs",
        ),
        (
            "  merged:",
            "  rl: {uses: train.grpo, model: base, data: data.train, rewards: [{kind: exact}],"
            " rollouts: {kind: vllm}}\n  merged:",
            "steps.rl.resources: rollouts: vLLM needs a GPU; ask for one with `resources: {gpus: 1}`",
        ),
    ],
)
def test_resources_that_do_not_fit_the_settings(recipe: Build, old: str, new: str, said: str) -> None:
    assert said in refusal(recipe, (old, new))


def test_a_process_reward_is_within_a_recipes_reach(recipe: Build) -> None:
    """From answers to labelled steps, a reward model of steps, and a training that asks it."""
    more = """
  tries: {uses: data.sample, model: base, data: data.train}
  labels: {uses: data.label_steps, model: merged, data: tries, verifier: {kind: numeric}}
  judge: {uses: train.reward, model: base, data: labels, process: true, adapter: {kind: full}}
  rl: {uses: train.grpo, model: base, data: data.train, reward_model: judge, rewards: [{kind: reward_model}]}
publish"""
    graph = recipe(("\npublish", more))
    parents = {name: set(graph.nodes[name].parents) for name in ("labels", "judge", "rl")}
    assert parents == {"labels": {"tries", "merged"}, "judge": {"base", "labels"}, "rl": {"base", "data", "judge"}}
    assert "data.label_steps takes a Samples here, `data.train` (data.prepare) gives a Dataset; `tries`" in refusal(
        recipe, ("\npublish", more.replace("data: tries", "data: data.train"))
    )


def test_missing_input(recipe: Build) -> None:
    assert "steps.sft.model: this key is required" in refusal(recipe, ("model: base, data", "data"))


@pytest.mark.parametrize(
    ("step", "key"),
    [
        ("{uses: evaluate.compare, reference: merged, candidates: [], data: data.eval}", "candidates"),
        ("{uses: evaluate.best, candidates: [], report: quality}", "candidates"),
        ("{uses: data.mix, parts: []}", "parts"),
        ("{uses: package.bundle, title: none, members: []}", "members"),
    ],
)
def test_an_input_that_is_an_empty_list_is_refused_where_it_stands(recipe: Build, step: str, key: str) -> None:
    message = refusal(recipe, ("publish", f"  more: {step}\npublish"))
    assert f"small.yaml:10: steps.more.{key}: an empty list; name the steps" in message


@pytest.mark.parametrize(
    ("parts", "means"),
    [
        ("[data.train, data.train]", ["data.train", "data.train"]),
        ("[several.train, data.train]", ["several[20].train", "several[30].train", "data.train"]),
        ("several.train", ["several[20].train", "several[30].train"]),
    ],
)
def test_settings_for_each_input_count_what_a_list_means(recipe: Build, parts: str, means: list[str]) -> None:
    several = "{uses: data.prepare, source: python-stdlib-docs, matrix: {limit: [20, 30]}}"

    def changed(weights: int) -> tuple[str, str]:
        mixed = f"{{uses: data.mix, parts: {parts}, weights: {list(range(1, weights + 1))}}}"
        return "publish", f"  several: {several}\n  mixed: {mixed}\npublish"

    count = len(means)
    assert [str(ref) for ref in recipe(changed(count)).nodes["mixed"].edges["parts"]] == means
    for other in (count - 1, count + 1):
        said = f"small.yaml:11: steps.mixed: weights: {other} entries for {count} parts; give one for each part"
        assert said in refusal(recipe, changed(other))


def test_a_member_of_an_empty_text_is_one_of_all_that_the_matrix_means(recipe: Build) -> None:
    several = "{uses: data.prepare, source: python-stdlib-docs, matrix: {system: ['', 'Be brief']}}"
    plan = recipe(("publish", f"  d: {several}\n  mixed: {{uses: data.mix, parts: [d.train]}}\npublish"))
    assert [str(ref) for ref in plan.nodes["mixed"].edges["parts"]] == ["d[''].train", "d[Be brief].train"]


def test_members_that_are_called_alike_are_refused(recipe: Build) -> None:
    several = "{uses: data.prepare, source: python-stdlib-docs, matrix: {limit: [20, '20']}}"
    message = refusal(recipe, ("publish", f"  d: {several}\npublish"))
    assert "small.yaml:10: steps.d.matrix: several combinations are called `20`; " in message


def test_unknown_reference(recipe: Build) -> None:
    message = refusal(recipe, ("adapter: sft}", "adapter: stf}"))
    assert "steps.merged.adapter: there is no step `stf`; did you mean `sft`?" in message


def test_unknown_output(recipe: Build) -> None:
    message = refusal(recipe, ("data: data.train", "data: data.trian"))
    assert "`data.trian` does not exist; did you mean `data.train`?" in message


def test_an_output_that_the_settings_leave_out_names_the_key_that_gives_it(recipe: Build) -> None:
    score = "  score: {uses: evaluate.tasks, candidates: [merged], data: data.test}\npublish"
    message = refusal(recipe, ("publish", score))
    assert "steps.score.data: `data.test` is not made: in `data` `test_fraction` is 0, so that there are no" in message
    asked = recipe(("publish", score), overrides=("steps.data.test_fraction=0.1",))
    assert set(asked.nodes["data"].outputs) == {"train", "eval", "test"}
    overrides = ("steps.data.eval_fraction=0",)
    evaluated = "  score: {uses: evaluate.tasks, candidates: [merged], data: data.eval}\npublish"
    assert "`eval_fraction` is 0, so" in refusal(recipe, ("publish", evaluated), overrides=overrides)


def test_wrong_kind_names_both_ends_and_what_would_fit(recipe: Build) -> None:
    message = refusal(recipe, ("model: merged, matrix", "model: sft, matrix"))
    assert "quantize.gguf takes a Model here, `sft` (train.sft) gives an Adapter; `merged` would fit" in message


def test_gguf_offered_to_a_trainer(recipe: Build) -> None:
    more = "  again: {uses: train.sft, model: 'gguf[Q8_0]', data: data.train}\npublish"
    message = refusal(recipe, ("publish", more))
    assert "train.sft takes a Model here, `gguf[Q8_0]` (quantize.gguf) gives a Quantized" in message


def test_matrix_step_where_one_is_wanted(recipe: Build) -> None:
    more = "  again: {uses: train.sft, model: gguf, data: data.train}\npublish"
    assert "`gguf` is a matrix of 2 steps; name one: `gguf[Q8_0]` or `gguf[F16]`" in refusal(recipe, ("publish", more))


def test_adapter_merged_onto_another_base(recipe: Build) -> None:
    other = "other: {uses: model.pico, seed: 9}"
    merged = "merged: {uses: merge.adapter, adapter: sft"
    change = (f"{merged}}}", f"{other}\n  {merged}, base: other}}")
    assert "`other` is not what `sft` was trained on; that is `base`" in refusal(recipe, change)


def test_cycle(recipe: Build) -> None:
    message = refusal(recipe, ("model: base, data", "model: merged, data"))
    assert "the steps form a cycle: " in message
    assert "sft → merged → sft" in message or "merged → sft → merged" in message


def test_key_given_twice(recipe: Build) -> None:
    assert "small.yaml:5: `seed` is given twice, first on line 4" in refusal(recipe, ("seed: 3", "seed: 3\nseed: 4"))


def test_malformed_yaml_names_the_line(recipe: Build) -> None:
    assert ": not valid YAML" in refusal(recipe, ("seed: 3", "seed: [3"))


def test_two_published_members_of_one_kind(recipe: Build) -> None:
    message = refusal(recipe, ("members: [merged, gguf]", "members: [merged, gguf, base]"))
    assert "publish.members: `merged` and `base` are each a Model, and a family has one; name one" in message


def test_published_member_must_exist(recipe: Build) -> None:
    assert "publish.members.1: no step `ggfu`; did you mean `gguf`?" in refusal(
        recipe, ("[merged, gguf]", "[merged, ggfu]")
    )


def test_gate_needs_a_report(recipe: Build) -> None:
    change = ("members: [merged, gguf]}", "members: [merged], gates: [{metric: data.score, at_least: 0.5}]}")
    assert "publish.gates.0.metric: no report step `data`" in refusal(recipe, change)


def test_set_overrides_and_says_what_it_does_not_know(recipe: Build) -> None:
    graph = recipe(overrides=("steps.sft.max_steps=9", "seed=8"))
    assert graph.nodes["sft"].config.model_dump()["max_steps"] == 9
    assert graph.nodes["sft"].config.model_dump()["seed"] == 8
    assert "did you mean `sft`?" in refusal(recipe, overrides=("steps.stf.max_steps=9",))
    assert "write path=value" in refusal(recipe, overrides=("steps.sft",))


def test_a_key_that_is_set_changes_no_other_step_that_shares_its_anchor(write: Callable[[str, str], Path]) -> None:
    """Nor does a profile, or a recipe that extends this one; the anchor's own place stays, too."""
    sft = "{uses: train.sft, model: base, data: data.train, adapter: *lora}"
    path = write(
        "shared.yaml",
        "name: shared\nbase: {uses: model.pico}\nvars: {lora: &lora {kind: lora, rank: 16}}\nsteps:\n"
        f"  data: {{uses: data.prepare, source: python-stdlib-docs}}\n  a: {sft}\n  b: {sft}\n  c: {sft}\n"
        "profiles: {small: {steps: {b: {adapter: {rank: 4}}}}}\n",
    )
    above = write("above.yaml", "extends: shared.yaml\nsteps: {c: {adapter: {rank: 2}}}\n")

    def ranks(path: Path, *overrides: str, profile: str = "") -> list[int]:
        loaded = load_recipe(path, overrides, profile)
        nodes = build_graph(loaded).nodes
        found = [nodes[name].config.model_dump()["adapter"]["rank"] for name in "abc"]
        return [*found, loaded.recipe.vars["lora"]["rank"]]

    assert ranks(path) == [16, 16, 16, 16]
    assert ranks(path, "steps.a.adapter.rank=8") == [8, 16, 16, 16]
    assert ranks(path, "steps.a.adapter.rank=8", "steps.b.adapter.rank=2") == [8, 2, 16, 16]
    assert ranks(path, "steps.a.adapter.rank=8", profile="small") == [8, 4, 16, 16]
    assert ranks(above, "steps.a.adapter.rank=8", profile="small") == [8, 4, 2, 16]
    assert ranks(path, "vars.lora.rank=32") == [16, 16, 16, 32]


def test_variables(recipe: Build) -> None:
    graph = recipe(("seed: 3", "seed: 3\nvars: {most: 7}"), ("max_steps: 4", "max_steps: '${vars.most}'"))
    assert graph.nodes["sft"].config.model_dump()["max_steps"] == 7
    assert "vars.mots" in refusal(recipe, ("max_steps: 4", "max_steps: '${vars.mots}'"))


def test_extends_merges_and_null_removes(write: Callable[[str, str], Path]) -> None:
    write("below.yaml", "name: below\nsteps:\n  one: {uses: model.pico, layers: 2}\n  two: {uses: model.pico}\n")
    path = write("above.yaml", "extends: below.yaml\nname: above\nsteps:\n  one: {layers: 3}\n  two: null\n")
    loaded = load_recipe(path)
    assert loaded.recipe.name == "above"
    assert list(loaded.recipe.steps) == ["one"]
    one = loaded.recipe.steps["one"]
    assert isinstance(one, StepEntry)
    assert one.config == {"layers": 3}


def test_another_kind_of_adapter_replaces_the_old_one_whole(write: Callable[[str, str], Path]) -> None:
    data = "data: {uses: data.prepare, source: python-stdlib-docs, model: base}"
    sft = "sft: {uses: train.sft, model: base, data: data.train, adapter: {kind: lora, rank: 8}}"
    write("below.yaml", f"name: below\nbase: {{uses: model.pico}}\nsteps:\n  {data}\n  {sft}\n")
    path = write("above.yaml", "extends: below.yaml\nsteps: {sft: {adapter: {kind: full}}}\n")
    assert build_graph(load_recipe(path)).nodes["sft"].config.model_dump()["adapter"] == {"kind": "full"}


def test_a_key_of_another_kind_of_adapter_names_those_of_this_kind(recipe: Build) -> None:
    message = refusal(recipe, ("max_steps: 4", "adapter: {kind: full, rank: 8}"))
    assert "steps.sft.adapter.rank: unknown key; known here: kind" in message


def test_a_report_of_many_members_is_no_gate(recipe: Build) -> None:
    compare = "evaluate.compare, reference: merged, candidates: base, data: data.eval"
    quality = f"quality: {{uses: {compare}, matrix: {{rows: [4, 8]}}}}"
    gates = "members: [merged], gates: [{metric: quality.kl, at_most: 1}]}"
    message = refusal(recipe, ("publish:", f"  {quality}\npublish:"), ("members: [merged, gguf]}", gates))
    assert (
        "publish.gates.0.metric: `quality` is several reports; name one: `quality[4].kl` or `quality[8].kl`" in message
    )


def test_the_schema_takes_what_the_loader_takes(write: Callable[[str, str], Path]) -> None:
    check = Draft202012Validator(recipe_schema())
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        assert [error.message for error in check.iter_errors(yaml.safe_load(path.read_text(encoding="utf-8")))] == []
    text = (
        "name: a\nsteps:\n"
        "  loop: {rounds: 2, carry: {it: {start: base, then: one}}, steps: {one: {uses: model.pico}}}\n"
        "profiles: {small: {base: null, steps: {loop: {rounds: 1, steps: {one: null}}}, publish: {family: x}}}\n"
    )
    assert list(check.iter_errors(yaml.safe_load(text))) == []
    for old, new in (
        ("rounds: 2", "ronds: 2"),
        ("start", "strat"),
        ("model.pico", "model.pica"),
        ("base: n", "bace: n"),
    ):
        assert list(check.iter_errors(yaml.safe_load(text.replace(old, new)))), new


def test_extends_refuses_a_circle_and_a_missing_file(write: Callable[[str, str], Path]) -> None:
    write("a.yaml", "extends: b.yaml\nname: a\n")
    path = write("b.yaml", "extends: a.yaml\nname: b\n")
    with pytest.raises(UserError, match="extends this recipe in turn"):
        load_recipe(path)
    with pytest.raises(UserError, match="there is no"):
        load_recipe(write("c.yaml", "extends: none.yaml\nname: c\n"))


def test_a_seed_that_no_generator_takes_is_refused(recipe: Build) -> None:
    for seed in ("-1", "4294967296", "1.5"):
        assert "steps.sft.seed" in refusal(recipe, overrides=(f"steps.sft.seed={seed}",))
