"""The reference that every layout is compared with: plain PyTorch, fp32, one process.

The same plan of samples, the same micro-batches of a step, one backward pass over the loss that is the
sum over all of them by the weight of all of them, torch's clipping and AdamW. No engine, no ranks, no
accumulation, no recomputation.
"""

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
    """What is logged at each step: the reported loss and the gradient norm before clipping."""

    losses: list[float]
    grad_norms: list[float]


def reference_curve(config: RunConfig, upstream: Path = Path()) -> tuple[Curve, torch.nn.Module]:
    """Run all steps of `config` on the exports below `upstream`: the curve and the trained task."""
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
        batches = [stage.prepare(dataset[micro]) for micro in session.planned.plan.step(step)]
        weights = {
            term: sum(stage.loss_denominators(batch)[term] for batch in batches)
            for term in stage.terms
        }
        outputs = [task(batch) for batch in stage.begin_step(task, batches)]
        total = sum(
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
        state = {name: sum(output.state[name] for output in outputs) for name in outputs[0].state}
        stage.after_step(task, state, step + 1)
        sums = RunningSums()
        for output in outputs:
            sums.add(output.logs)
        curve.losses.append(stage.metrics(sums.take())["loss"])
        curve.grad_norms.append(float(norm))
    return curve, task
