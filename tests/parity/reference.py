"""The reference for every layout: plain PyTorch, fp32, one process.

It uses the same sample plan and micro-batches, one backward pass over the loss of the full step, and
torch's gradient clipping and AdamW: no engine, ranks, accumulation, or activation checkpointing.
"""

import functools
import operator
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from muomni.config.run import RunConfig
from muomni.data.loading.loader import PlannedDataset
from muomni.distributed.discovery import discover
from muomni.training.optim.groups import build_optimizer
from muomni.training.optim.schedule import lr_factor
from muomni.training.session import Request, prepare, seed_everything
from muomni.training.step_reduction import RunningSums


class Curve(NamedTuple):
    """The logged loss and the gradient norm before clipping, for each step."""

    losses: list[float]
    grad_norms: list[float]


def reference_curve(config: RunConfig, upstream: Path = Path()) -> tuple[Curve, torch.nn.Module]:
    """Train for all steps of `config` on the exports in `upstream`; returns the curve and the task."""
    engine_json: dict[str, Any] = {"zero_optimization": {"stage": 0}}
    session = prepare(Request(config, Path(), upstream, engine_json, "never"), discover({}))
    stage = session.stage
    seed_everything(config.seed)
    task = stage.build()
    optimizer = build_optimizer(task, config.optim)
    base_lrs = [group["lr"] for group in optimizer.param_groups]
    dataset = PlannedDataset(session.planned.source, stage.view(), config.seed)
    curve = Curve([], [])
    for step in range(session.num_steps):
        batches = [
            stage.prepare(dataset[micro].tensors)
            for micro in session.planned.plan.rank_step(step, 0, 1)
        ]
        weights = {
            term: _sum(stage.loss_denominators(batch)[term] for batch in batches)
            for term in stage.terms
        }
        outputs = [task(batch) for batch in stage.begin_step(task, batches)]
        total = _sum(
            stage.loss_weights()[term] * output.losses[term] / weights[term].clamp(min=1e-6)
            for output in outputs
            for term in stage.terms
        )
        total.backward()
        # Norm 0 turns clipping off.
        limit = config.optim.max_grad_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(task.parameters(), limit)
        factor = lr_factor(step, session.num_steps, config.optim)
        for group, base in zip(optimizer.param_groups, base_lrs, strict=True):
            group["lr"] = base * factor
        optimizer.step()
        optimizer.zero_grad()
        state = {name: _sum(output.state[name] for output in outputs) for name in outputs[0].state}
        stage.after_step(task, state, step + 1)
        sums = RunningSums()
        for output in outputs:
            sums.add(output.logs)
        curve.losses.append(stage.metrics(sums.take())["loss"])
        curve.grad_norms.append(float(norm))
    return curve, task


def _sum(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    return functools.reduce(operator.add, tensors)
