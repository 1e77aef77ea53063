"""Recipes that nobody should write: each ends in a graph or in one sentence, quickly, and never in a traceback."""

import random
import time
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.graph import build_graph
from flows.recipe import load_recipe
from steps.frame import UserError
from tests.flows.command import ROOT, Command

SLOWEST = 2.0
"""Seconds within which a recipe must be read or refused."""
ODD: list[Any] = [
    None,
    True,
    0,
    -1,
    3,
    10**12,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    " ",
    "x",
    "base",
    "champion",
    "data.train",
    "sft",
    "sft[1]",
    "sft[99]",
    "a.b.c",
    "${vars.none}",
    "${vars}",
    "${",
    "${oc.env:NOT_SET}",
    "\N{PILE OF POO}",
    "a" * 3000,
    "../..",
    "/",
    "~",
    "\t",
    "{}",
    [],
    [[]],
    [None],
    ["base", "base"],
    [1, "two", None],
    {},
    {"": 1},
    {1: 2},
    {None: None},
    {"uses": "train.sft"},
    {"uses": 3},
    {"rounds": 2},
    {"steps": {}},
    {"kind": "lora"},
    {"kind": ["lora"]},
    {"a": {"b": {}}},
    {"matrix": {"a": []}},
    {"matrix": {"rank": [1, 2], "seed": list(range(50))}},
    {"gpus": 2},
    {"family": 3},
]
KEYS: list[Any] = [
    "uses",
    "kind",
    "extends",
    "profiles",
    "steps",
    "rounds",
    "carry",
    "matrix",
    "resources",
    "model",
    "data",
    "publish",
    "gates",
    "members",
    "schedule",
    "vars",
    "seed",
    "adapter",
    "rewards",
    "",
    1,
    None,
    True,
    2.5,
]
SNIPPETS = [
    b"\x00",
    b"\xff\xfe",
    b"\t",
    b"\r",
    b"&a ",
    b"*a",
    b"<<: *a\n",
    b"!!python/object:os.system ",
    b"!!binary x",
    b"---\n",
    b"...",
    b"2026-13-45",
    b"2026-01-01T99:99:99",
    b"{",
    b"}",
    b"[",
    b"]",
    b": ",
    b"- ",
    b"? ",
    b"#",
    b"|",
    b">",
    b"'",
    b'"',
    b"%TAG ! x\n",
    b"${",
    b"}",
    "\u2028".encode(),
    b"0o77",
    b"1_000",
    b"0x",
    b"~",
    b"=",
    b"!!float nan",
    b"!!int x",
    b"!!set {a, b}",
    b"1e999",
    b"!!int ",
    b"!!int '' ",
    b"!!float ",
    b"!!float '-' ",
    b"!!bool foo ",
    b"!!timestamp x ",
    b"!!timestamp ",
    b"!!null x ",
    b"!!str ",
    b"!!map ",
    b"!!seq ",
    b"!!omap ",
    b"!!pairs ",
    b"!!binary ",
    b"!!binary aGk= ",
    b"!!merge ",
    b"!!value ",
    b"!own ",
    b"! ",
    b"!<> ",
    b"!<tag:yaml.org,2002:int> ",
]

HARD = {
    "latin-1": "name: na\N{LATIN SMALL LETTER I WITH DIAERESIS}ve\n".encode("latin-1"),
    "NUL": b"name: a\x00b\n",
    "impossible date": b"name: x\nseed: 2026-02-31\n",
    "alias to itself": b"name: x\nsteps: &a {b: *a}\n",
    "sequence of itself": b"name: x\nsteps: &a [*a]\n",
    "merge of itself": b"name: x\nsteps: &a\n  <<: *a\n",
    "extends a number": b"name: x\nextends: 3\nsteps: {a: {uses: model.pico}}\n",
    "extends a mapping": b"name: x\nextends: {a: b}\nsteps: {a: {uses: model.pico}}\n",
    "extends numbers": b"name: x\nextends: [1, null]\nsteps: {a: {uses: model.pico}}\n",
    "extends NUL": b'name: x\nextends: "a\\0b"\nsteps: {a: {uses: model.pico}}\n',
    "extends a directory": b"name: x\nextends: ..\nsteps: {a: {uses: model.pico}}\n",
    "extends what is no YAML": b"name: x\nextends: [other.yaml]\nsteps: {a: {uses: model.pico}}\n",
    "a list as key": b"name: x\n? [a, b]\n: c\n",
    "a mapping as key": b"name: x\nsteps: {? {a: b} : c}\n",
    "numbers as keys": b"1: x\n2: y\n",
    "profile of a string": b"name: x\nprofiles: {p: text}\nsteps: {a: {uses: model.pico}}\n",
    "publish in a profile": b"name: x\nprofiles: {p: {publish: 3}}\nsteps: {a: {uses: model.pico}}\n",
    "publish of a list": b"name: x\npublish: [1]\nprofiles: {p: {seed: 3}}\nsteps: {a: {uses: model.pico}}\n",
    "python object": b"name: !!python/object/apply:os.system [ls]\n",
    "deep": b"name: x\nsteps: " + b"[" * 5000 + b"]" * 5000 + b"\n",
    "deep mappings": b"name: x\nsteps: " + b"{a: " * 3000 + b"1" + b"}" * 3000 + b"\n",
    "nothing": b"",
    "a list": b"- a\n",
    "two documents": b"name: x\n---\nname: y\n",
    "huge matrix": b"name: x\nsteps: {a: {uses: model.pico, matrix: {seed: [%s], layers: [%s], hidden: [%s]}}}\n"
    % ((b"1," * 300,) * 3),
    "endless rounds": b"name: x\nsteps: {g: {rounds: 1000000000, steps: {a: {uses: model.pico}}}}\n",
    "variable of itself": b"name: x\nvars: {a: '${vars.a}'}\nsteps: {a: {uses: model.pico, seed: '${vars.a}'}}\n",
    "interpolated NaN": b"name: x\nvars: {a: .nan}\nseed: '${vars.a}'\nsteps: {a: {uses: model.pico}}\n",
}


def bomb(depth: int, merged: bool) -> bytes:
    """Aliases that stand for ten of the one before, by the power of ten."""
    lines = [b"name: x", b"vars:"]
    for level in range(depth):
        before = b"*a%d" % (level - 1)
        lines.append(
            b"  v%d: &a%d %s" % (level, level, b"[1]" if not level else b"[" + b", ".join([before] * 10) + b"]")
        )
    if merged:
        lines[2:] = [b"  v0: &a0 {x: 1}"] + [
            b"  v%d: &a%d {<<: [%s]}" % (level, level, b", ".join([b"*a%d" % (level - 1)] * 10))
            for level in range(1, depth)
        ]
    return b"\n".join([*lines, b"steps: {a: {uses: model.pico}}", b""])


def read(path: Path, profile: str = "", overrides: tuple[str, ...] = ()) -> str:
    """Read a recipe and build its graph; return the sentence with which it was refused, or nothing."""
    began = time.monotonic()
    try:
        build_graph(load_recipe(path, overrides, profile))
    except UserError as error:
        said = str(error)
        assert said and "\n" not in said, said
        return said
    finally:
        took = time.monotonic() - began
        assert took < SLOWEST, f"{took:.1f} s"
    return ""


@pytest.mark.parametrize("name", HARD)
def test_what_is_no_recipe_is_refused_in_a_sentence(name: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    path.write_bytes(HARD[name])
    (tmp_path / "other.yaml").write_bytes(b"\xff")
    for profile in ("", "p"):
        said = read(path, profile)
        assert said or b"profiles" in HARD[name]
    assert str(path.name) in read(path) or b"extends" in HARD[name] or b"profiles" in HARD[name]


@pytest.mark.parametrize(
    "value",
    [
        *(
            "2026-13-45",
            "0x_",
            "0b_",
            "9" * 5000,
            "[" * 3000,
            "{a: " * 3000,
            "!!int x",
            "&a [*a]",
            "&a {b: *a}",
            "a: b: c",
        ),
        "{a: &a [*a], b: '${vars.b}'}",
        bomb(9, False).decode().partition("vars:")[2].partition("steps:")[0],
    ],
)
def test_what_is_no_value_is_refused_in_a_sentence(value: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    path.write_bytes(b"name: x\nsteps: {a: {uses: model.pico}}\n")
    assert read(path, overrides=(f"vars.a={value}",)).startswith("--set vars.a")


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "1e400"])
@pytest.mark.parametrize(
    "key", ["learning_rate", "weight_decay", "resources.timeout_minutes", "resources.memory_gb", "adapter.dropout"]
)
def test_a_number_without_end_is_refused_in_a_sentence(key: str, value: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    data, adapter = "{uses: data.prepare, model: base, source: python-stdlib-docs}", "{kind: lora}"
    sft = f"{{uses: train.sft, model: base, data: data.train, resources: {{cpus: 1}}, adapter: {adapter}}}"
    path.write_text(f"name: x\nbase: {{uses: model.pico}}\nsteps:\n  data: {data}\n  sft: {sft}\n", encoding="utf-8")
    assert f"steps.sft.{key}: input should be" in read(path, overrides=(f"steps.sft.{key}={value}",))


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("depth", [5, 9, 60])
def test_a_bomb_of_aliases_does_not_go_off(depth: int, merged: bool, tmp_path: Path) -> None:
    path = tmp_path / "bomb.yaml"
    path.write_bytes(bomb(depth, merged))
    assert "aliases" in read(path) or depth == 5


def test_the_command_line_says_it_in_one_sentence(tmp_path: Path) -> None:
    command = Command(tmp_path / "home", cwd=tmp_path)
    for name, content in (("bomb", bomb(9, False)), ("latin", HARD["latin-1"]), ("own", HARD["alias to itself"])):
        (tmp_path / f"{name}.yaml").write_bytes(content)
        ended = command("plan", f"{name}.yaml")
        assert ended.code == 2
        assert ended.err.startswith("error: ") and ended.err.count("\n") == 1, ended.err


def mutated(chance: random.Random, text: bytes) -> bytes:
    """A recipe with some bytes of it, or some of its values, made odd."""
    if chance.random() < 0.4:
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(text) + 1)
            cut = at + chance.choice([0, 0, 1, 5, 40])
            text = text[:at] + chance.choice(SNIPPETS) + text[cut:]
        return text
    tree = yaml.safe_load(text)
    for _ in range(chance.randint(1, 4)):
        holders = list(_holders(tree))
        holder = chance.choice(holders)
        if isinstance(holder, dict) and (not holder or chance.random() < 0.3):
            holder[chance.choice(KEYS)] = deepcopy(chance.choice(ODD))
        elif isinstance(holder, dict):
            key = chance.choice(list(holder))
            if chance.random() < 0.2:
                del holder[key]
            else:
                holder[key] = deepcopy(chance.choice(ODD))
        else:
            holder.append(deepcopy(chance.choice(ODD)))
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).encode("utf-8", errors="surrogatepass")


def _holders(tree: Any) -> Iterator[Any]:
    if isinstance(tree, dict | list):
        yield tree
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _holders(value)


@pytest.mark.parametrize("count", [150, pytest.param(2000, marks=pytest.mark.recipes)])
def test_recipes_with_odd_values_are_read_or_refused(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    chance = random.Random(count)
    recipes = sorted((ROOT / "recipes").glob("*.yaml"))
    refused = 0
    for index in range(count):
        source = chance.choice(recipes)
        content = mutated(chance, source.read_bytes())
        path = tmp_path / "odd.yaml"
        path.write_bytes(content)
        for other in recipes:
            if not (tmp_path / other.name).exists():
                (tmp_path / other.name).symlink_to(other)
        try:
            refused += bool(read(path, chance.choice(["", "pico"])))
        except AssertionError:
            raise
        except BaseException as error:
            kept = tmp_path / "failed.yaml"
            kept.write_bytes(content)
            raise AssertionError(f"number {index}, from {source.name}, kept as {kept}: {error!r}") from error
    assert count / 3 < refused < count, "they are neither all fine nor all refused for one reason"
