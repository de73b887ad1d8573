"""One evaluation from request to report."""

from itertools import chain

import torch

from muomni.distributed import collectives
from muomni.evaluation.context import Wanted, open_subject
from muomni.evaluation.report import Report
from muomni.evaluation.stages import load_evaluator


def run_evaluation(wanted: Wanted, device: torch.device) -> Report:
    """Evaluate a stage's export over a split, shared by all ranks; all return the same report.

    Raises MuomniError for what is missing or does not fit.
    """
    subject = open_subject(wanted, device)
    with torch.no_grad():
        metrics = load_evaluator(wanted.stage)(subject)
    num_left_out = sum(collectives.gather_objects(subject.num_bad))
    answers = chain.from_iterable(collectives.gather_objects(subject.answers))
    return Report(
        stage=wanted.stage,
        split=wanted.split,
        datasets=tuple(manifest.location for manifest in subject.source.manifests),
        num_samples=subject.num_samples,
        num_left_out=num_left_out,
        export=str(subject.export.path),
        metrics=tuple(metrics),
        answers=tuple(sorted(answers, key=lambda answer: (answer["index"], answer["turn"]))),
    )
