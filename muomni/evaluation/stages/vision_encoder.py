"""Vision encoder: image-text retrieval and zero-shot classification."""

from muomni.evaluation.context import EvaluationContext
from muomni.evaluation.metrics.retrieval import (
    DEPTHS,
    class_names,
    embed_split,
    hits_by_type,
    majority_top1,
    recall,
    zero_shot_hits,
)
from muomni.evaluation.report import Metric
from muomni.training.stages.vision_encoder import VisionEncoderStage


def evaluate(context: EvaluationContext) -> list[Metric]:
    """Recall@k in both directions, and zero-shot top-1 among the distinct first captions of the split.

    Pairs with an equal image or caption are equally correct, so the chance level of recall@k exceeds k / N.
    The baseline of zero-shot top-1 is the better of chance and the most frequent training caption.
    Zero-shot top-1 also by type of sample, where the most frequent caption of the type is the baseline.
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
    hits = zero_shot_hits(context.model, features, names, stage.view(), context.device)
    baseline, name = 1 / len(names), f"chance among {len(names)} captions"
    majority = majority_top1(features, context.train_samples())
    if majority > baseline:  # false for NaN
        baseline, name = majority, "most frequent training caption"
    metrics.append(
        Metric("zero_shot_top1", float(hits.double().mean()), baseline, name, is_lower_better=False)
    )
    for type, (value, baseline) in hits_by_type(hits, features, context.source).items():
        name = f"zero_shot_top1.{type}"
        metrics.append(
            Metric(name, value, baseline, "most frequent caption", is_lower_better=False)
        )
    return metrics
