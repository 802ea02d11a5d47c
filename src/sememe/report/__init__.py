"""Run folder → one self-contained HTML page, and what is wrong with the run. Reads files only;
imports neither torch nor transformers."""

from sememe.report.page import write_report

__all__ = ["write_report"]
