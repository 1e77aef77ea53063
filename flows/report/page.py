"""The page: everything a run's report shows, rendered from the template."""

from collections.abc import Iterator
from typing import Any

from flows import units
from flows.report.charts import accuracy_chart, budget_chart, drift_chart, quality_chart, training_charts
from flows.report.comparison import Comparison, read_comparisons
from flows.report.graph import graph_drawing
from flows.report.headline import headline, tiles
from flows.report.run import ReportStep, RunReport
from flows.report.samples import typical_samples

TEMPLATE = "report.html.j2"


def report_page(run: RunReport) -> bytes:
    """Return the report as a file's content, in UTF-8.

    The page needs nothing beside it, no network and no script, and equal runs give equal bytes.

    Raises:
        FileNotFoundError: a comparison's directory lacks `rows.jsonl` or `summary.json`.
    """
    # Half of a surrogate pair, which a model may well produce, has no UTF-8: it becomes a question mark.
    return render_report(run).encode("utf-8", errors="replace")


def render_report(run: RunReport) -> str:
    """Return the report as HTML. All text is escaped: recipe, messages and above all what models wrote."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("flows.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"size": units.size, "duration": units.duration, "fixed": units.fixed}
    comparisons = read_comparisons(run)
    return environment.get_template(TEMPLATE).render(
        run=run,
        headline=headline(run, comparisons),
        tiles=tiles(run, comparisons),
        graph=graph_drawing(run.steps),
        trainings=training_charts(run.steps),
        comparisons=[_comparison_view(each, index) for index, each in enumerate(comparisons)],
        longest=max((step.seconds for step in run.steps), default=0.0) or 1.0,
        digests={step.name: list(_digests(step)) for step in run.steps},
    )


def _comparison_view(comparison: Comparison, index: int) -> dict[str, Any]:
    drawn = (draw(comparison) for draw in (quality_chart, drift_chart, accuracy_chart, budget_chart))
    return {
        "id": f"x{index}",
        "found": comparison,
        "charts": [chart for chart in drawn if chart],
        "samples": typical_samples(comparison),
    }


def _digests(step: ReportStep) -> Iterator[tuple[str, str, str]]:
    """Yield output name, artifact kind and digest, in the order of the names."""
    for name, digest in sorted(step.outputs.items()):
        yield name, step.output_kinds.get(name, ""), digest
