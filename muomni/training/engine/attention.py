"""Packed and padded rows through flash kernels (`training.attention: varlen`), document by document.

A mask makes a query look at its whole row and lets torch choose only kernels that take masks. These kernels get
the places where documents begin instead, and compute nothing outside of them (Dao 2023, FlashAttention-2,
arXiv:2307.08691). The padding of a row is a document, too. Towers without a mask (images, captions) have
flash kernels anyway.
"""

import inspect

import torch
from pydantic import BaseModel
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from muomni.config.models import (
    AudioEncoderConfig,
    OmniConfig,
    TalkerConfig,
    ThinkerConfig,
    TransformerConfig,
)
from muomni.data.views.base import Batch
from muomni.errors import ConfigError
from muomni.models.layers.transformer import TransformerStack

_OPTION = "training.attention=varlen"
_LEAST_CAPABILITY = (8, 0)
_HEAD_DIM_STEP, _LARGEST_HEAD_DIM = 8, 256


def documents_of(batch: Batch) -> dict[str, Tensor]:
    """What a Thinker is told of the documents in a batch of packed rows."""
    return {name: batch[name] for name in ("document_ids", "document_starts")}


def attend_by_documents(task: nn.Module) -> None:
    """Turn it on in all transformers of a task."""
    for module in task.modules():
        if isinstance(module, TransformerStack):
            module.attends_by_documents = True


def check_support(device: torch.device | None, precision: str, sizes: BaseModel) -> None:
    """Raises ConfigError for a stage without packed or padded rows, and where the kernels do not run.

    `device` None: on one that is not here.
    """
    masked = _masked_parts(sizes)
    if not masked:
        raise ConfigError(
            f"{_OPTION} is for stages that pack or pad rows (thinker, audio_encoder, talker, sft); take it out"
        )
    if device is not None and not _has_kernels(device):
        raise ConfigError(
            f"{_OPTION} needs a CUDA device of compute capability 8.0 or more, this run is on "
            f"{device.type}; take it out"
        )
    if precision not in ("bf16", "fp16"):
        raise ConfigError(f"{_OPTION} needs bf16 or fp16, not {precision}; give --precision bf16")
    for part in masked:
        if part.head_dim % _HEAD_DIM_STEP or part.head_dim > _LARGEST_HEAD_DIM:
            raise ConfigError(
                f"{_OPTION} needs a head_dim that is a multiple of {_HEAD_DIM_STEP} and at most "
                f"{_LARGEST_HEAD_DIM}, not {part.head_dim}"
            )
    if not {"window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters):
        raise ConfigError(f"{_OPTION} needs torch 2.14 or newer, not {torch.__version__}")


def _has_kernels(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY


def _masked_parts(sizes: BaseModel) -> list[TransformerConfig]:
    """The transformers of a stage's model whose attention has a mask otherwise."""
    parts = [sizes]
    if isinstance(sizes, OmniConfig):
        parts = [sizes.thinker, sizes.audio_encoder, sizes.talker]
    return [
        part
        for part in parts
        if isinstance(part, ThinkerConfig | AudioEncoderConfig | TalkerConfig)
    ]
