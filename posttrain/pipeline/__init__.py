"""Pipelines: stages declared with handles, checked as a whole, then skipped, resumed, refused or run."""

from posttrain.pipeline.command import main
from posttrain.pipeline.pipeline import Pipeline

__all__ = ["Pipeline", "main"]
