"""Variable-length flash attention for packed and padded sequences (`training.attention: varlen`).

With a mask, attention computes all pairs of a sequence, and torch can only use kernels that accept masks.
Varlen kernels take document offsets instead and compute nothing across documents (Dao 2023, FlashAttention-2,
arXiv:2307.08691). The padding of a sequence counts as a document. Towers without a mask (images, captions)
use flash kernels anyway.
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
    """Document arguments of a Thinker for a batch of packed sequences."""
    return {name: batch[name] for name in ("document_ids", "document_starts")}


def attend_by_documents(task: nn.Module) -> None:
    """Enable varlen attention in all transformers of a task."""
    for module in task.modules():
        if isinstance(module, TransformerStack):
            module.attends_by_documents = True


def check_support(device: torch.device | None, precision: str, sizes: BaseModel) -> None:
    """Raise ConfigError for a stage without packed or padded sequences, or if the kernels are unavailable.

    `device` None skips the check of the device.
    """
    masked = _masked_parts(sizes)
    if not masked:
        raise ConfigError(
            f"{_OPTION} is for stages that pack or pad sequences (thinker, audio_encoder, talker, sft); "
            f"remove it"
        )
    if device is not None and not _has_kernels(device):
        raise ConfigError(
            f"{_OPTION} needs a CUDA device of compute capability 8.0 or more, this run is on "
            f"{device.type}; remove it"
        )
    if precision not in ("bf16", "fp16"):
        raise ConfigError(f"{_OPTION} needs bf16 or fp16, not {precision}; use --precision bf16")
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
    """The transformers of a stage's model that use masked attention by default."""
    parts = [sizes]
    if isinstance(sizes, OmniConfig):
        parts = [sizes.thinker, sizes.audio_encoder, sizes.talker]
    return [
        part
        for part in parts
        if isinstance(part, ThinkerConfig | AudioEncoderConfig | TalkerConfig)
    ]
