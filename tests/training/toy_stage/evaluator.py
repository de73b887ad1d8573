"""Mean squared error of the toy model beside the variance of the lengths."""

from muomni.data.views.base import Batch
from muomni.evaluation.context import EvaluationContext
from muomni.evaluation.metrics.tally import Tally, watch
from muomni.evaluation.report import Metric
from muomni.training.validation import validate


def evaluate(context: EvaluationContext) -> list[Metric]:
    """The error; the baseline always answers the mean length."""
    tally = Tally()

    def observe(batch: Batch) -> None:
        lengths = batch["num_chars"][batch["num_chars"] > 0].double()
        tally.add("count", lengths.new_tensor(float(len(lengths))))
        tally.add("sum", lengths.sum())
        tally.add("squares", lengths.square().sum())

    metrics = validate(context.stage, context.task, watch(context.batches(), observe))
    sums = {name: float(value) for name, value in tally.reduce().items()}
    variance = sums["squares"] / sums["count"] - (sums["sum"] / sums["count"]) ** 2
    return [Metric("squared_error", metrics["loss"], variance, "mean length")]
