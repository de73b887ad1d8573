"""Configs of seconds for the perception stages, and their curves in plain PyTorch."""

from pathlib import Path
from typing import Any

import torch

from muomni.config.loading import merge
from muomni.config.run import RunConfig
from muomni.dist.discovery import discover
from muomni.training.session import Request, prepare, seed_everything

_STACK = {
    "hidden_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2, "head_dim": 16,
    "intermediate_size": 64,
}  # fmt: skip
_STAGES: dict[str, dict[str, Any]] = {
    "audio_encoder": {
        "batch": {"size": 2},
        "model": {**_STACK, "conv_channels": 8, "conv_kernel_size": 5},
        "options": {"num_merges": 0},
    },
    "vision_encoder": {
        "batch": {"size": 4},
        "model": {
            "embedding_size": 16,
            "vision": {**_STACK, "image_size": 32},
            "text": {**_STACK, "max_positions": 24},
        },
    },
    "codec": {
        "batch": {"size": 3},
        "model": {"hidden_size": 24, "latent_size": 8, "codebook_size": 8, "num_blocks": 1},
        "options": {"crop_s": 0.48},
    },
}


def stage_config(stage: str, data: Path, changes: dict[str, Any] | None = None) -> RunConfig:
    """A run of 8 steps of 4 micro-batches in fp32, logged at each step."""
    content: dict[str, Any] = {
        "stage": stage,
        "preset": "test",
        "precision": "fp32",
        "data": {"root": str(data)},
        "batch": {"micro_batches_per_step": 4},
        "optim": {"lr": 3e-3, "warmup_fraction": 0.25},
        "training": {
            "max_steps": 8, "log_every": 1, "validate_every": 1000, "save_every": 1000,
        },
    }  # fmt: skip
    return RunConfig.model_validate(merge(merge(content, _STAGES[stage]), changes or {}))


def plain_curve(config: RunConfig, upstream: Path = Path()) -> tuple[list[float], torch.nn.Module]:
    """The mean loss of each step in one process without DeepSpeed, and the trained task module."""
    from muomni.data.loader import PlannedDataset
    from muomni.training.optim import build_optimizer, lr_factor

    engine_json: dict[str, Any] = {"zero_optimization": {"stage": 0}}
    session = prepare(Request(config, Path(), upstream, engine_json, "never"), discover({}))
    stage = session.stage
    seed_everything(config.seed)
    task = stage.build()
    optimizer = build_optimizer(task, config.optim)
    dataset = PlannedDataset(session.train, stage.view(), config.seed)
    losses = []
    for step in range(session.num_steps):
        batches = [stage.prepare(dataset[micro]) for micro in session.plan.step(step)]
        weights = {
            term: sum(stage.weights(batch)[term] for batch in batches) for term in stage.terms
        }
        outputs = [task(batch) for batch in stage.begin_step(task, batches)]
        total = sum(
            stage.coefficients()[term] * output.losses[term] / weights[term].clamp(min=1e-6)
            for output in outputs
            for term in stage.terms
        )
        total.backward()
        torch.nn.utils.clip_grad_norm_(task.parameters(), config.optim.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = config.optim.lr * lr_factor(step, session.num_steps, config.optim)
        optimizer.step()
        optimizer.zero_grad()
        state = {name: sum(output.state[name] for output in outputs) for name in outputs[0].state}
        stage.after_step(task, state, step + 1)
        losses.append(total.item())
    return losses, task
