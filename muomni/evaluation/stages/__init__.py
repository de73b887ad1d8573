"""One module per stage with `evaluate(context) -> list[Metric]`, a collective."""

from collections.abc import Callable
from importlib import import_module

from muomni.evaluation.context import EvaluationContext
from muomni.evaluation.report import Metric


def load_evaluator(stage: str) -> Callable[[EvaluationContext], list[Metric]]:
    """Import the module of a stage and return its `evaluate`."""
    return import_module(f"muomni.evaluation.stages.{stage}").evaluate
