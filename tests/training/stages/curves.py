"""Small, fast configs of the perception stages."""

from pathlib import Path
from typing import Any

from muomni.config.loading import merge, run_config
from muomni.config.run import RunConfig

_STACK = {
    "hidden_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2, "head_dim": 16,
    "intermediate_size": 64,
}  # fmt: skip
_STAGES: dict[str, dict[str, Any]] = {
    "audio_encoder": {
        "batch": {"global_seconds": 8, "micro_seconds": 2},
        "model": {**_STACK, "conv_channels": 8, "conv_kernel_size": 5},
        "options": {"num_merges": 0},
    },
    "vision_encoder": {
        "batch": {"global_samples": 16, "micro_samples": 4},
        "model": {
            "embedding_size": 16,
            "vision": {**_STACK, "image_size": 32},
            "text": {**_STACK, "max_positions": 24},
        },
    },
    "codec": {
        "batch": {"global_samples": 12, "micro_samples": 3},
        "model": {"hidden_size": 24, "latent_size": 8, "codebook_size": 8, "num_blocks": 1},
        "options": {"crop_s": 0.48},
    },
}


def stage_config(stage: str, data: Path, changes: dict[str, Any] | None = None) -> RunConfig:
    """A run of 8 steps, of 4 micro-batches on one rank, in fp32, logged at each step."""
    content: dict[str, Any] = {
        "stage": stage,
        "preset": "test",
        "precision": "fp32",
        "data": {"root": str(data)},
        "optim": {"lr": 3e-3, "warmup_fraction": 0.25},
        "training": {
            "max_steps": 8, "log_every": 1, "validate_every": 1000, "save_every": 1000,
        },
    }  # fmt: skip
    return run_config(merge(merge(content, _STAGES[stage]), changes or {}))
