"""Metrics of the vision encoder: retrieval among held-out pairs, and naming of images."""

from muomni.evaluation.context import Subject
from muomni.evaluation.metrics.retrieval import (
    DEPTHS,
    class_names,
    embed_split,
    recall,
    zero_shot_top1,
)
from muomni.evaluation.report import Metric
from muomni.training.stages.vision_encoder import VisionEncoderStage


def evaluate(subject: Subject) -> list[Metric]:
    """Recall@k both ways and zero-shot top-1 over the distinct first captions of the split.

    Chance is computed for this split: equal captions are equally right, so it is more than k / N.
    """
    features = embed_split(subject.model, subject.batches())
    found = recall(features)
    metrics = [
        Metric(name, found[name], found[f"chance_{name}"], "chance", is_lower_better=False)
        for way in ("text", "image")
        for name in (f"{way}_recall@{depth}" for depth in DEPTHS)
    ]
    names, stage = class_names([subject.source]), subject.stage
    assert isinstance(stage, VisionEncoderStage)
    top1 = zero_shot_top1(subject.model, features, names, stage.view(), subject.device)
    chance = f"chance among {len(names)} captions"
    metrics.append(Metric("zero_shot_top1", top1, 1 / len(names), chance, is_lower_better=False))
    return metrics
