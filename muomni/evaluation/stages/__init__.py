"""One file a stage, each with `evaluate(subject) -> list[Metric]`, which every rank calls."""

from collections.abc import Callable
from importlib import import_module

from muomni.evaluation.context import Subject
from muomni.evaluation.report import Metric


def load_evaluator(stage: str) -> Callable[[Subject], list[Metric]]:
    """The `evaluate` of a stage; its module is imported only when the stage is evaluated."""
    return import_module(f"muomni.evaluation.stages.{stage}").evaluate
