"""Run folder → one self-contained HTML page. Reads files only; imports neither torch nor
transformers."""

from sememe.report.page import write_report, write_speed

__all__ = ["write_report", "write_speed"]
