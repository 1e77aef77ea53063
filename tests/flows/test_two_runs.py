"""Two runs at once on one home: every step is made once, and one model is champion, judged by its gates."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flows.finish import show_latest
from tests.flows.command import Command

RECIPE = """
name: twice
base: {uses: model.pico, hidden: 64, layers: 1, heads: 2, kv_heads: 1, pretrain_steps: 2}
seed: 5
steps:
  data: {uses: data.prepare, source: rows.jsonl, near_dedup: null, eval_fraction: 0.2}
  sft: {uses: train.sft, model: base, data: data.train, adapter: {kind: full}, max_steps: 12, batch_size: 8,
        learning_rate: 5.0e-3}
  quality: {uses: evaluate.compare, reference: sft, candidates: [base], data: data.eval, rows: 16, generate_rows: 2,
            new_tokens: 4}
publish:
  family: twice
  members: [sft]
  gates: [{metric: quality.perplexity, against: champion, no_worse_by: 0.05}]
"""


def test_reports_of_runs_that_end_at_once_stay_whole(tmp_path: Path) -> None:
    shown = tmp_path / "reports" / "twice" / "comparison.png"
    contents = [letter * 500_000 for letter in (b"a", b"b")]

    def end(mine: bytes) -> None:
        for _ in range(40):
            show_latest(shown, mine)
            assert shown.read_bytes() in contents

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(end, contents))
    assert [path.name for path in shown.parent.iterdir()] == [shown.name]
    show_latest(shown, None)
    assert not shown.exists()


@pytest.mark.slow
def test_two_runs_at_once_make_each_step_once_and_one_champion(tmp_path: Path) -> None:
    rows = [
        {"question": f"How many minutes are {hours} hours?", "answer": f"{hours} hours are {60 * hours} minutes."}
        for hours in range(2, 122)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "twice.yaml").write_text(RECIPE, encoding="utf-8")
    posttrain = Command(tmp_path / "home", tmp_path)
    with ThreadPoolExecutor(2) as pool:
        same = list(pool.map(lambda _: posttrain("run", "twice.yaml", "--json"), range(2)))
    assert [ended.code for ended in same] == [0, 0], same
    first, second = (ended.json for ended in same)
    assert posttrain.launches() == {"base": 1, "data": 1, "sft": 1, "quality": 1}
    assert {name: step["outputs"] for name, step in first["steps"].items()} == {
        name: step["outputs"] for name, step in second["steps"].items()
    }
    assert len(posttrain("show", "twice", "--json").json["releases"]) == 1

    # Two others, each judged against that one: whoever comes second meets the first, or waits.
    with ThreadPoolExecutor(2) as pool:
        seeds = ("--set", "steps.sft.seed=1"), ("--set", "steps.sft.seed=2")
        other = list(pool.map(lambda more: posttrain("run", "twice.yaml", *more, "--json"), seeds))
    assert [ended.code for ended in other] == [0, 0], other
    family = posttrain("show", "twice", "--json").json
    assert len(family["releases"]) == 3
    champions = [release for release in family["releases"] if "champion" in release["aliases"]]
    assert len(champions) == 1
    later = family["releases"][1:]
    assert all(release["decision"]["outcomes"] for release in later), "none is promoted without its gates"
