"""Vision encoder: image-text retrieval and zero-shot classification."""

from muomni.evaluation.context import EvaluationContext
from muomni.evaluation.metrics.retrieval import (
    DEPTHS,
    class_names,
    embed_split,
    majority_top1,
    recall,
    zero_shot_top1,
)
from muomni.evaluation.report import Metric
from muomni.training.stages.vision_encoder import VisionEncoderStage


def evaluate(context: EvaluationContext) -> list[Metric]:
    """Recall@k in both directions, and zero-shot top-1 among the distinct first captions of the split.

    Pairs with an equal image or caption are equally correct, so the chance level of recall@k exceeds k / N.
    The baseline of zero-shot top-1 is the better of chance and the most frequent training caption.
    """
    features = embed_split(context.model, context.batches())
    recalls = recall(features)
    metrics = [
        Metric(name, recalls[name], recalls[f"chance_{name}"], "chance", is_lower_better=False)
        for target in ("text", "image")
        for name in (f"{target}_recall@{depth}" for depth in DEPTHS)
    ]
    names, stage = class_names([context.source]), context.stage
    assert isinstance(stage, VisionEncoderStage)
    top1 = zero_shot_top1(context.model, features, names, stage.view(), context.device)
    baseline, name = 1 / len(names), f"chance among {len(names)} captions"
    majority = majority_top1(features, context.train_samples())
    if majority > baseline:  # false for NaN
        baseline, name = majority, "most frequent training caption"
    metrics.append(Metric("zero_shot_top1", top1, baseline, name, is_lower_better=False))
    return metrics
