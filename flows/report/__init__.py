"""The report of a run: one self-contained HTML page, and the parts of it that Prefect and MLflow show."""

from flows.report.comparison import read_notes
from flows.report.exports import comparison_png, prefect_table
from flows.report.page import render_report, report_page
from flows.report.run import ReportStep, RunReport

__all__ = ["ReportStep", "RunReport", "comparison_png", "prefect_table", "read_notes", "render_report", "report_page"]
