"""The report of a run: self-contained, escaped, complete, and right about what it claims."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from itertools import pairwise
from math import exp
from pathlib import Path
from typing import Any

import pytest

from flows.report import ReportStep, RunReport, comparison_png, prefect_table, read_notes, render_report, report_page
from flows.report.comparison import read_comparison
from flows.report.layout import layered
from flows.report.samples import typical_samples
from steps.lm.scoring import bootstrap_interval, wilson_interval

HOSTILE = """<script>alert(1)</script><img src="https://evil.example/x.png" onerror=alert(2)>'"</style>"""
SAMPLES = 40
ANSWERED = 30
SCORE = {"base": 0.24, "merged": 0.61, "gguf[Q4_K_M]": 0.58}


def step(name: str, kind: str, *parents: str, **other: Any) -> ReportStep:
    plain = ReportStep(name, kind, "finished", 12.0, 2_000_000_000, parents, {"": "ab" * 32}, {"": "Model"}, {}, None)
    return replace(plain, **other)


@pytest.fixture
def report_folder(tmp_path: Path) -> Path:
    """A Report artifact's files: the base is far worse than merged, the quantized member is hardly worse."""
    folder = tmp_path / "quality"
    folder.mkdir()
    rows = []
    for index in range(SAMPLES):
        hard = 0.3 * ((index * 7) % SAMPLES / SAMPLES - 0.5)
        for name, score in SCORE.items():
            asked = index < ANSWERED
            rows.append(
                {
                    "sample": f"s{index:02}",
                    "candidate": name,
                    "prompt": [{"role": "user", "content": f"What does f{index} do?"}],
                    "reference_answer": "It returns the count of items.",
                    "answer": f"It returns what {name} says. {HOSTILE}" if asked else None,
                    "nll": 2.5 - 2 * score + hard,
                    "tokens": 5 + index % 3,
                    "kl": None if name == "merged" else 0.9 * (0.61 - score) * (1 + hard),
                    "top1": None if name == "merged" else 0.9,
                    "score": score + hard + 0.01 * (index % 2) if asked else None,
                }
            )
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    candidates = {
        name: {"answer_score": score, "perplexity": exp(2.5 - 2 * score), "size_bytes": 1e8 * (1 + score)}
        for name, score in SCORE.items()
    }
    candidates["base"]["kl"], candidates["gguf[Q4_K_M]"]["kl"] = 0.33, 0.027
    (folder / "summary.json").write_text(json.dumps({"reference": "merged", "candidates": candidates}))
    return folder


@pytest.fixture
def run(tmp_path: Path, report_folder: Path) -> RunReport:
    metrics = tmp_path / "metrics.jsonl"
    lines = [{"step": index, "time": 1.0, "values": {"loss": 3 / (1 + index), "epoch": index}} for index in range(9)]
    lines.append({"step": 8, "time": 2.0, "values": {"loss": float("nan")}})
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9, "ti')
    return RunReport(
        recipe="quickstart",
        description="Teach it.",
        yaml="name: quickstart\nsteps: {}",
        began=datetime(2026, 11, 22, 3, 5, tzinfo=UTC),
        seconds=321.0,
        steps=[
            step("base", "model.source", status="cached"),
            step("data", "data.prepare"),
            step("sft", "train.sft", "base", "data", metrics_file=metrics),
            step("merged", "merge.adapter", "sft"),
            step("gguf[Q4_K_M]", "quantize.gguf", "merged", "data"),
            step(
                "quality",
                "evaluate.compare",
                *["base", "merged", "gguf[Q4_K_M]", "data"],
                metrics={"gguf[Q4_K_M]/tokens_per_second": 92.5, "merged/tokens_per_second": 40.0},
            ),
        ],
        comparisons={"quality": report_folder},
        publication="Published stdlib version 3.",
        versions={"torch": "2.13.0"},
    )


class _Page(HTMLParser):
    """Collects elements, attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def test_page_refers_to_nothing_outside(run: RunReport) -> None:
    html = render_report(run)
    page = _Page(html)
    assert not {"script", "link", "img", "iframe", "object", "image", "use"} & {tag for tag, _ in page.elements}
    for tag, attributes in page.elements:
        assert not {"src", "href", "xlink:href", "srcset"} & attributes.keys(), tag
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style


def test_hostile_text_stays_text(run: RunReport) -> None:
    bad = replace(
        run,
        recipe=HOSTILE,
        description=HOSTILE,
        yaml=HOSTILE,
        publication=HOSTILE,
        versions={HOSTILE: HOSTILE},
        steps=[*run.steps, step(HOSTILE, HOSTILE, status="failed", message=HOSTILE, outputs={HOSTILE: HOSTILE})],
    )
    page = _Page(render_report(bad))
    assert not {"script", "img"} & {tag for tag, _ in page.elements}
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert page.text.count("<script>alert(1)</script>") > 10, "escaped, not dropped"
    assert "Grey text" in page.text, "a closing tag in a text must not end the style sheet"


def test_what_steps_note_is_shown_and_said(run: RunReport) -> None:
    noted = replace(run, steps=[*run.steps[:1], replace(run.steps[1], notes=("2 rows were left out",)), *run.steps[2:]])
    assert "2 rows were left out." in _Page(render_report(noted)).text
    assert read_notes(noted)[0] == "data: 2 rows were left out"


def test_text_without_utf8_is_written(run: RunReport, report_folder: Path) -> None:
    rows = report_folder / "rows.jsonl"
    rows.write_text(rows.read_text().replace("It returns what", r"It \ud83d returns what"))
    assert "It ? returns what" in report_page(run).decode()


def test_graph_shows_every_step(run: RunReport) -> None:
    html = render_report(run)
    graph = html[html.index('class="graph"') : html.index("</svg>")]
    for each in run.steps:
        assert f">{each.name}</text>" in graph
        assert f">{each.kind}</text>" in graph
    assert graph.count('class="box"') == len(run.steps)


def test_layout_keeps_columns_and_distances() -> None:
    parents = {"base": (), "data": (), "sft": ("base", "data"), "merged": ("sft",)}
    parents |= {f"q{index}": ("merged", "data") for index in range(6)}
    parents["quality"] = ("base", "merged", *(f"q{index}" for index in range(6)), "data", "elsewhere")
    layout = layered(parents, box=60, gap=16)
    for name, names in parents.items():
        assert all(layout.column[name] > layout.column[parent] for parent in names if parent in parents)
    assert all(end[1] == start[1] + 1 for start, end in layout.links)
    for column in range(layout.columns):
        boxes = sorted(at for (name, place), at in layout.centre.items() if place == column == layout.column[name])
        assert all(below - above >= 76 - 1e-6 for above, below in pairwise(boxes))
    assert layered({}, box=60, gap=16).columns == 0


def test_headline_and_figures_come_from_the_comparison(run: RunReport) -> None:
    text = _Page(render_report(run)).text
    assert "Tuned beats base: answer score 0.61 against 0.24, perplexity 3.6 against 7.5" in text
    assert "gguf[Q4_K_M] keeps 95.1 % of the answer score at 98.1 % of the size" in text
    assert "92.5" in text, "speed comes from the step's metrics"
    assert "Optimizer step" in text
    assert "Published stdlib version 3." in text


def test_headline_admits_defeat_and_doubt(run: RunReport, report_folder: Path) -> None:
    def swap(one: str, other: str) -> str:
        for name in ("rows.jsonl", "summary.json"):
            path = report_folder / name
            text = path.read_text().replace(f'"{one}"', '"?"').replace(f'"{other}"', f'"{one}"')
            path.write_text(text.replace('"?"', f'"{other}"'))
        return _Page(render_report(run)).text

    content = json.loads((report_folder / "summary.json").read_text())
    swap("base", "merged")
    content["candidates"]["base"], content["candidates"]["merged"] = (
        content["candidates"][name] for name in ("merged", "base")
    )
    (report_folder / "summary.json").write_text(json.dumps(content))
    assert "Tuned falls behind base: answer score 0.24 against 0.61" in _Page(render_report(run)).text
    rows = [json.loads(line) for line in (report_folder / "rows.jsonl").read_text().splitlines()]
    for index, row in enumerate(rows):
        row |= {"score": 0.5 + 0.3 * (index % 7 % 2) if row["score"] else None, "nll": 1 + index % 5}
    (report_folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "Tuned is not clearly different from base" in _Page(render_report(run)).text


def test_intervals_are_those_of_the_evaluation(report_folder: Path) -> None:
    found = read_comparison("quality", report_folder, {})
    rows = [json.loads(line) for line in (report_folder / "rows.jsonl").read_text().splitlines()]
    merged = [row for row in rows if row["candidate"] == "merged"]
    figures = found.reference.figures
    low, high = bootstrap_interval([row["nll"] for row in merged], [row["tokens"] for row in merged])
    assert figures["perplexity"].interval == pytest.approx((exp(low), exp(high)), rel=1e-4)
    scores = [row["score"] for row in merged if row["score"] is not None]
    assert figures["answer_score"].interval == pytest.approx(bootstrap_interval(scores), rel=1e-4)
    by_name = {each.name: each for each in found.candidates}
    member = by_name["gguf[Q4_K_M]"].figures
    # Paired: 0.03 is real although the intervals of the two scores overlap widely.
    assert member["answer_score"].verdict == "worse"
    assert member["answer_score"].difference == pytest.approx(-0.03)
    assert figures["answer_score"].best
    assert not member["answer_score"].best
    assert "kl" not in figures


def test_samples_spread_over_the_scores(report_folder: Path) -> None:
    found = read_comparison("quality", report_folder, {})
    chosen = typical_samples(found)
    assert len(chosen) == 8
    assert [answer.candidate.name for answer in chosen[0].answers] == ["base", "merged", "gguf[Q4_K_M]"]
    scores = [sample.answers[1].score for sample in chosen]
    every = sorted(own["merged"]["score"] for own in found.answered.values())
    assert scores == sorted(scores, reverse=True)
    assert scores[0] >= every[-4]
    assert scores[-1] <= every[3]
    assert chosen[0].answers[2].shared == "It returns what"
    assert len(typical_samples(replace(found, rows=dict(list(found.rows.items())[:3])))) == 3


def test_run_without_comparison(run: RunReport) -> None:
    bare = replace(run, comparisons={}, publication="", steps=run.steps[:4])
    text = _Page(render_report(bare)).text
    assert "All 4 steps are done in 5 min 21 s" in text
    assert "Comparison" not in text
    assert "Publication" not in text
    assert comparison_png(bare) is None
    assert "All 0 steps" in _Page(render_report(replace(bare, steps=[]))).text


def test_failed_step_shows_its_message(run: RunReport) -> None:
    gone = step(
        "gptq", "quantize.gptq", "merged", status="failed", message="group_size 128 does not divide 576", outputs={}
    )
    late = step("ship", "package.bundle", "gptq", status="skipped", message="needs gptq", outputs={}, seconds=0.0)
    failed = replace(run, steps=[*run.steps, gone, late])
    html = render_report(failed)
    assert '<h1 class="bad">One step of 8 failed: gptq</h1>' in html
    assert "Tuned beats base" in html
    assert '<p class="message failed">group_size 128 does not divide 576</p>' in html
    table = {row["step"]: row for row in prefect_table(failed)}
    assert table["gptq"]["status"] == "failed"
    assert table["gptq"]["message"] == gone.message
    assert table["sft"] == {
        "step": "sft",
        "kind": "train.sft",
        "status": "finished",
        "time": "12 s",
        "peak memory": "2.00 GB",
        "outputs": "abababababab",
        "message": "",
    }


def test_equal_runs_give_equal_bytes(run: RunReport, tmp_path: Path) -> None:
    first = report_page(run)
    assert report_page(replace(run)) == first
    assert str(tmp_path).encode() not in first, "no path of this machine"


def test_png_of_quality_against_size(run: RunReport) -> None:
    png = comparison_png(run)
    assert png is not None
    assert png.startswith(b"\x89PNG")
    assert (int.from_bytes(png[16:20]), int.from_bytes(png[20:24])) == (1280, 720)
    assert comparison_png(run) == png


def test_one_candidate_and_bare_figures(run: RunReport, write: Callable[[str, str], Path]) -> None:
    summary = {"reference": "a$b$", "candidates": {"a$b$": {"perplexity": 5.0, "size_bytes": 10}}}
    folder = write("alone/summary.json", json.dumps(summary)).parent
    write("alone/rows.jsonl", "")
    alone = replace(run, comparisons={"quality": folder})
    assert re.search(r"<h1>a\$b\$: perplexity 5.0</h1>", render_report(alone))
    assert comparison_png(alone) is not None


@pytest.fixture
def solved_tasks(run: RunReport, write: Callable[[str, str], Path]) -> RunReport:
    """A run with the report of `evaluate.tasks`: the base solves 10 of 40 tasks, the policy those and 20 more."""
    accuracy = {"base": 0.25, "policy": 0.75}
    rows = [
        {
            "sample": f"t{index:02}",
            "candidate": name,
            "prompt": [{"role": "user", "content": f"{index}+1"}],
            "reference_answer": str(index + 1),
            "answer": f"<think>{HOSTILE}</think>{index + 1}",
            "score": float(index < share * 40),
            "tokens": 7.0,
        }
        for index in range(40)
        for name, share in accuracy.items()
    ]
    point = {"accuracy": 0.2, "interval": [0.1, 0.35]}
    budgets = [{**point, "thinking_tokens": 0}, {**point, "thinking_tokens": 64}, {**point, "thinking_tokens": None}]
    summary = {
        "reference": "base",
        "score": "exact",
        "candidates": {name: {"accuracy": share, "truncated": 0.1} for name, share in accuracy.items()},
        "budgets": {"base": budgets, "policy": budgets},
    }
    folder = write("tasks/rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows)).parent
    write("tasks/summary.json", json.dumps(summary))
    steps = [*run.steps, step("solved", "evaluate.tasks", "base", "data")]
    return replace(run, steps=steps, comparisons={"solved": folder})


def test_solved_tasks_are_told_and_drawn(solved_tasks: RunReport) -> None:
    html = render_report(solved_tasks)
    text = _Page(html).text
    assert "<h1>policy solves 75.0 % of the tasks, more than base with 25.0 %</h1>" in html
    assert "Accuracy 75.0 % policy, base 25.0 %" in text, "tile"
    assert "right is what exact says" in text
    assert "Share of tasks solved, 95 % interval" in text
    assert "Share of tasks solved by thinking budget, tokens" in text
    assert "no limit" in text
    assert not {"script", "img"} & {tag for tag, _ in _Page(html).elements}
    (found,) = (read_comparison("solved", folder, {}) for folder in solved_tasks.comparisons.values())
    policy = next(each for each in found.candidates if each.name == "policy").figures["accuracy"]
    assert policy.interval == pytest.approx(wilson_interval(30 / 40, 40))
    assert (policy.verdict, policy.difference) == ("better", 0.5)


def test_solved_tasks_stand_beside_a_comparison(run: RunReport, solved_tasks: RunReport) -> None:
    both = replace(solved_tasks, comparisons={**run.comparisons, **solved_tasks.comparisons})
    text = _Page(render_report(both)).text
    assert "Tuned beats base: answer score 0.61 against 0.24" in text
    assert "Accuracy 75.0 % policy, base 25.0 %" in text
    assert comparison_png(both) == comparison_png(run)


def test_the_candidate_that_a_step_chose_is_the_one_told(solved_tasks: RunReport) -> None:
    choice = replace(step("best", "evaluate.best", "solved"), chosen="policy")
    html = render_report(replace(solved_tasks, steps=[*solved_tasks.steps, choice]))
    assert "<h1>policy, chosen by best, solves 75.0 % of the tasks, more than base with 25.0 %</h1>" in html
    other = replace(choice, chosen="base")
    html = render_report(replace(solved_tasks, steps=[*solved_tasks.steps, other]))
    assert "<h1>base, chosen by best, solves 25.0 % of the tasks</h1>" in html
