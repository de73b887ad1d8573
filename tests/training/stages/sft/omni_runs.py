"""Small, fast configs of the stages talker and sft, on exports with random weights."""

from pathlib import Path
from typing import Any

from muomni.config.loading import merge, run_config
from muomni.config.run import RunConfig
from muomni.data.text.tokenizer import Tokenizer
from tests.conversations import SIZES, write_sft_dataset, write_tts_dataset, write_upstream
from tests.corpora import write_tokenizer


def write_root(root: Path) -> Path:
    """Datasets of both tasks, a tokenizer, and the exports of all upstream stages in `run`."""
    write_sft_dataset(root / "sft")
    write_tts_dataset(root / "tts")
    write_tokenizer(root / "tokenizer.model")
    write_upstream(root / "run", Tokenizer.load(root / "tokenizer.model"))
    return root


def omni_run(stage: str, root: Path, changes: dict[str, Any] | None = None) -> RunConfig:
    """8 steps in fp32, of 4 micro-batches on one rank; an sft sequence holds one conversation."""
    own: dict[str, Any] = {
        "talker": {"batch": {"global_seconds": 4, "micro_seconds": 1}, "model": SIZES["talker"]},
        "sft": {
            "batch": {"seq_len": 22, "global_tokens": 88},
            "model": {"projector_hidden_size": 32, **SIZES},
            "options": {"freeze": []},
        },
    }[stage]
    content: dict[str, Any] = {
        "stage": stage,
        "preset": "nano",
        "precision": "fp32",
        "data": {"root": str(root)},
        "optim": {"lr": 3e-3, "warmup_fraction": 0.25},
        "training": {
            "max_steps": 8, "log_every": 1, "validate_every": 1000, "save_every": 1000,
        },
    }  # fmt: skip
    return run_config(merge(merge(content, own), changes or {}))
