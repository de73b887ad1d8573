"""Evaluate one stage, from the request to the report."""

import os
from contextlib import ExitStack
from itertools import chain
from pathlib import Path

import torch

from muomni.config.registry import load, stage_spec
from muomni.data.loading.bad_samples import num_allowed
from muomni.distributed import collectives
from muomni.distributed.deepspeed_import import import_deepspeed
from muomni.distributed.discovery import Ranks, check_master_port, export_environment
from muomni.errors import DataError
from muomni.evaluation.context import open_context
from muomni.evaluation.report import REPORT_NAME, Report, write_report
from muomni.evaluation.request import EvaluationRequest
from muomni.observe.tracking.sync import record_evaluation
from muomni.training.engine.precision import pick_device, use_tf32


def run_evaluation(request: EvaluationRequest, device: torch.device) -> Report:
    """Evaluate a stage's export on a split; a collective that returns the same report on all ranks.

    Raises MuomniError if something is missing or does not match.
    """
    context = open_context(request, device)
    with torch.no_grad():
        metrics = load(stage_spec(request.stage).evaluate)(context)
    num_dropped = sum(collectives.gather_objects(context.num_bad))
    max_fraction = context.data.max_bad_fraction
    if num_dropped > num_allowed(max_fraction, context.num_samples):
        raise DataError(
            f"{num_dropped} of {context.num_samples} samples are not usable, more than "
            f"data.max_bad_fraction={max_fraction:g} allows; see the warnings above"
        )
    answers = chain.from_iterable(collectives.gather_objects(context.answers))
    return Report(
        stage=request.stage,
        split=request.split,
        datasets=tuple(manifest.location for manifest in context.source.manifests),
        num_samples=context.num_samples,
        num_dropped=num_dropped,
        num_seen=context.num_seen,
        export=str(context.export.path),
        digest=context.export.digest,
        measured_on=context.measured_on,
        metrics=tuple(metrics),
        answers=tuple(sorted(answers, key=lambda answer: (answer["index"], answer["turn"]))),
    )


def evaluate(request: EvaluationRequest, ranks: Ranks, report_file: Path | None = None) -> Report:
    """Set up the ranks of this process, evaluate, print the table, and write the report.

    The default report file of a full test split is in the folder of the stage, and MLflow gets its metrics;
    other evaluations have none. Raises MuomniError as `run_evaluation` does, and ConfigError if the report
    cannot be written.
    """
    device = pick_device(ranks.local_rank)
    use_tf32(request.tf32, "fp32", device)
    with ExitStack() as stack:
        if ranks.world_size > 1:
            import_deepspeed()
            from muomni.training.engine.process_group import process_group

            export_environment(ranks, os.environ)
            check_master_port(ranks, os.environ)
            stack.enter_context(process_group(device))
        report = run_evaluation(request, device)
    if ranks.is_main:
        print(report.table(), flush=True)
        if report_file is None and request.split == "test" and request.max_samples is None:
            report_file = request.run / request.stage / REPORT_NAME
            write_report(report_file, report)
            record_evaluation(request.run, request.stage)
        elif report_file is not None:
            write_report(report_file, report)
    return report
