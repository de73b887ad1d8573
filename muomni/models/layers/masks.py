"""Attention masks and positions of packed and padded batches, built once per forward pass.

Masks are boolean [B, 1, T or 1, S], True where a query attends. Every query attends to something, since
padding sees padding: a softmax over nothing (NaN) cannot occur, even without any real token.
"""

import torch
from torch import Tensor, nn


def document_mask(document_ids: Tensor) -> Tensor:
    """Causal mask within documents: `document_ids` [B, T] (0 = padding) -> bool [B, 1, T, T]."""
    same = document_ids[:, :, None] == document_ids[:, None, :]
    return same.tril()[:, None]


def document_positions(document_ids: Tensor) -> Tensor:
    """Positions [B, T] that restart at 0 wherever `document_ids` [B, T] changes."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    is_start = torch.ones_like(document_ids, dtype=torch.bool)
    is_start[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return index - torch.where(is_start, index, 0).cummax(dim=1).values


# Elements of half precision in 16 bytes.
_ALIGNMENT = 8
# Narrower windows gain nothing: the kernel works in blocks of about this size.
_MIN_WINDOW = 32


def window_size(document_ids: Tensor) -> int | None:
    """Window size that covers every document of `document_ids` [B, T], or None if it saves nothing.

    A document no longer than a window reaches back at most into the previous one, so a query needs the
    keys of two windows instead of T. Reads the data, which synchronizes an accelerator.
    """
    length = document_ids.shape[1]
    longest = int((document_positions(document_ids) * (document_ids > 0)).max()) + 1
    size = _MIN_WINDOW
    while size < longest:
        size *= 2
    return size if 4 * size <= length and length % size == 0 else None


def window_mask(document_ids: Tensor, size: int) -> Tensor:
    """Mask over the previous and the own window of each query: bool [B * T / size, 1, size, 2 * size].

    Equal to `document_mask` at real positions, for a size from `window_size`.
    """
    positions = document_positions(document_ids).reshape(-1, size)
    queries = torch.arange(size, device=positions.device)
    keys = torch.arange(-size, size, device=positions.device)
    distance = queries[:, None] - keys
    # A document starts `position` positions before the query.
    return ((distance >= 0) & (distance <= positions[:, :, None]))[:, None]


def padding_mask(valid: Tensor) -> Tensor:
    """Bidirectional mask over real keys: `valid` [B, T] -> bool [B, 1, 1, T].

    A sequence without a real key (an empty media slot) attends to its padding and stays finite.
    """
    valid = valid.to(torch.bool)
    return (valid | ~valid.any(dim=1, keepdim=True))[:, None, None]


def padded_starts(valid: Tensor) -> Tensor:
    """Document offsets of a padded batch for `attention.Documents.starts`: int32 [3 * B + 1].

    `valid` [B, T] is True in one run per sequence. The run and the padding before and after it are
    documents, unless they are empty.
    """
    batch_size, length = valid.shape
    valid = valid.to(torch.int32)
    offsets = torch.arange(batch_size, dtype=torch.int32, device=valid.device) * length
    begins = offsets + valid.argmax(dim=1)
    ends = begins + valid.sum(dim=1)
    starts = torch.stack([offsets, begins, ends], dim=1).flatten()
    starts = nn.functional.pad(starts, (0, 1), value=batch_size * length).to(torch.int32)
    # Repeated offsets are empty documents; as copies of the last offset, they sort to the end.
    is_empty = nn.functional.pad(starts.diff() == 0, (0, 1))
    return torch.where(is_empty, starts[-1], starts).sort().values


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a bool mask [..., S] to one that is added to scores: 0 or -inf.

    Otherwise `scaled_dot_product_attention` converts the mask in every layer, and autograd keeps each
    copy. Its kernels need rows aligned to 16 bytes, or copy the mask once more.
    """
    width = mask.shape[-1]
    aligned = -(-width // _ALIGNMENT) * _ALIGNMENT
    zeros = torch.zeros(*mask.shape[:-1], aligned, dtype=dtype, device=mask.device)
    return zeros[..., :width].masked_fill_(~mask, -torch.inf)


def valid_positions(valid: Tensor) -> Tensor:
    """Positions [B, T] that count real tokens only; padding before them gets 0."""
    return (valid.long().cumsum(dim=1) - 1).clamp(min=0)


def causal_padding_mask(valid: Tensor) -> Tensor:
    """Causal mask over real tokens: `valid` [B, T] -> bool [B, 1, T, T].

    Padding may be anywhere. Every position attends to itself, so padding stays finite too.
    """
    length = valid.shape[1]
    own = torch.eye(length, dtype=torch.bool, device=valid.device)
    return (valid.to(torch.bool)[:, None, :] | own).tril()[:, None]
