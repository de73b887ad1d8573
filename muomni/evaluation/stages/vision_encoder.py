"""Vision encoder: image-text retrieval and zero-shot classification."""

from muomni.evaluation.context import EvaluationContext
from muomni.evaluation.metrics.retrieval import (
    DEPTHS,
    class_names,
    embed_split,
    hits_by_type,
    recall,
    zero_shot_hits,
)
from muomni.evaluation.report import Metric
from muomni.training.stages.vision_encoder import VisionEncoderStage


def evaluate(context: EvaluationContext) -> list[Metric]:
    """Recall@k in both directions, and zero-shot top-1 among the distinct first captions of the split.

    Zero-shot top-1 also by type of sample, where the most frequent caption of the type is the baseline.
    Equal captions are equally correct, so the chance level of recall@k exceeds k / N.
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
    top1, chance = float(hits.double().mean()), f"chance among {len(names)} captions"
    metrics.append(Metric("zero_shot_top1", top1, 1 / len(names), chance, is_lower_better=False))
    for type, (value, baseline) in hits_by_type(hits, features, context.source).items():
        name = f"zero_shot_top1.{type}"
        metrics.append(
            Metric(name, value, baseline, "most frequent caption", is_lower_better=False)
        )
    return metrics
