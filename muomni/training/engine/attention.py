"""Choice of attention kernels for packed and padded sequences (`training.attention`).

With a mask, attention computes all pairs of a sequence, and torch can only use kernels that accept masks.
Varlen flash kernels take document offsets instead and compute nothing across documents (Dao 2023,
FlashAttention-2, arXiv:2307.08691). The padding of a sequence counts as a document. Towers without a mask
(images, captions) use flash kernels anyway.
"""

import inspect
from typing import Any, Literal

import torch
from pydantic import BaseModel
from torch import nn
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

_LEAST_CAPABILITY = (8, 0)
_HEAD_DIM_STEP, _LARGEST_HEAD_DIM = 8, 256


def documents_of(batch: Batch) -> dict[str, Any]:
    """Document arguments of a Thinker for a batch of packed sequences."""
    longest = int(batch["longest_document"])  # on the host
    tensors = {name: batch[name] for name in ("document_ids", "document_starts")}
    return {**tensors, "longest_document": longest}


def attend_by_documents(task: nn.Module) -> None:
    """Enable varlen attention in all transformers of a task."""
    for module in task.modules():
        if isinstance(module, TransformerStack):
            module.attends_by_documents = True


def use_varlen(
    wanted: Literal["auto", "mask", "varlen"],
    device: torch.device | None,
    precision: str,
    sizes: BaseModel,
) -> bool:
    """Resolve `training.attention`: `auto` is varlen where its kernels run, else the mask.

    `device` None skips the check of the device. Raises ConfigError if varlen is set but cannot run.
    """
    if wanted == "mask":
        return False
    refusal = _refusal(device, precision, sizes)
    if wanted == "varlen" and refusal is not None:
        raise ConfigError(f"training.attention=varlen {refusal}")
    return refusal is None


def avoid_cudnn(device: torch.device, sizes: BaseModel) -> None:
    """Keep torch from choosing cuDNN's attention for masks, in stages that have them.

    On Hopper and Blackwell GPUs torch prefers it in half precision. Its gradients can be NaN with a mask
    (pytorch issue 196678), and it builds a plan for every new shape. Flash and memory-efficient kernels remain.
    """
    if device.type == "cuda" and _masked_parts(sizes):
        torch.backends.cuda.enable_cudnn_sdp(False)


def _refusal(device: torch.device | None, precision: str, sizes: BaseModel) -> str | None:
    """Why varlen attention cannot be used, or None."""
    masked = _masked_parts(sizes)
    if not masked:
        return "is for stages that pack or pad sequences (thinker, audio_encoder, talker, sft); remove it"
    if device is not None and not _has_kernels(device):
        return (
            f"needs a CUDA device of compute capability 8.0 or more, this run is on {device.type}; "
            f"remove it"
        )
    if precision not in ("bf16", "fp16"):
        return f"needs bf16 or fp16, not {precision}; use --precision bf16"
    for part in masked:
        if part.head_dim % _HEAD_DIM_STEP or part.head_dim > _LARGEST_HEAD_DIM:
            return (
                f"needs a head_dim that is a multiple of {_HEAD_DIM_STEP} and at most "
                f"{_LARGEST_HEAD_DIM}, not {part.head_dim}"
            )
    if not {"window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters):
        return f"needs torch 2.14 or newer, not {torch.__version__}"
    return None


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
