"""What `posttrain run` says of a run, also where there is nothing to do."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from flows.cli.running import run_recipe
from flows.finish import finish
from flows.prepare import prepare
from registry.home import Home

RECIPE = """
name: noted
base: {uses: model.pico, hidden: 64, layers: 1, heads: 2, kv_heads: 1, pretrain_steps: 2}
steps:
  data: {uses: data.prepare, source: rows.jsonl, near_dedup: null, eval_fraction: 0.3}
  sft: {uses: train.sft, model: base, data: data.train, adapter: {kind: full}, max_steps: 2, batch_size: 8,
        eval: data.eval, eval_steps: 1}
  quality: {uses: evaluate.compare, reference: sft, candidates: [base], data: data.eval, rows: 4, generate_rows: 1,
            new_tokens: 4}
"""


@pytest.mark.slow
def test_a_run_that_has_nothing_to_do_still_says_its_notes_and_where_the_report_lies(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"How many minutes are {hours} hours?"},
                {"role": "assistant", "content": f"{hours} hours are {60 * hours} minutes."},
            ]
        }
        for hours in range(2, 42)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "noted.yaml").write_text(RECIPE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    execution = prepare("noted.yaml", (), home=home)
    assert [execution.run(name).outcome for name in execution.plan.steps] == ["finished"] * 4
    first = finish(execution, publish=True).summary()
    assert any("was chosen by these very rows" in note for note in first["notes"])
    for page_is_there in (True, False):
        out = io.StringIO()
        # With `publish`, too: a recipe that publishes nothing has nothing left to publish.
        again = run_recipe("noted.yaml", (), publish=page_is_there, console=Console(file=out, width=300)).summary()
        assert again["notes"] == first["notes"]
        assert again["report"] == (first["report"] if page_is_there else None)
        said = out.getvalue()
        assert "Nothing to do." in said and f"Note: {first['notes'][0]}." in said
        assert (f"Report: {first['report']}" in said) is page_is_there
        if page_is_there:
            Path(first["report"]).unlink()
