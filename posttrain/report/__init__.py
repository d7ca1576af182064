"""Numbers and pictures for a whole pipeline, made from the files that its stages left behind."""

from __future__ import annotations

from posttrain.report.console import print_result_table
from posttrain.report.page import write_report
from posttrain.report.picture import headline_picture

__all__ = ["headline_picture", "print_result_table", "write_report"]
