"""Attention masks and positions for packed and padded batches; built once per forward.

Masks are boolean [B, 1, T or 1, S], True where a query may look. No row is ever empty: padding sees
padding, so a softmax over nothing (NaN) cannot occur even for rows without any real token.
"""

import torch
from torch import Tensor


def document_mask(document_ids: Tensor) -> Tensor:
    """Causal mask in which no document sees another: `document_ids` [B, T] -> bool [B, 1, T, T].

    0 marks padding, which forms a document of its own.
    """
    same = document_ids[:, :, None] == document_ids[:, None, :]
    return same.tril()[:, None]


def document_positions(document_ids: Tensor) -> Tensor:
    """Positions [B, T] that restart at 0 wherever `document_ids` [B, T] changes along a row."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    is_start = torch.ones_like(document_ids, dtype=torch.bool)
    is_start[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return index - torch.where(is_start, index, 0).cummax(dim=1).values


def padding_mask(valid: Tensor) -> Tensor:
    """Bidirectional mask, `valid` [B, T] -> [B, 1, 1, T]: queries see the real keys of their row.

    A row without any real key (an empty modality slot) sees all of its padding and stays finite.
    """
    valid = valid.to(torch.bool)
    return (valid | ~valid.any(dim=1, keepdim=True))[:, None, None]


def valid_positions(valid: Tensor) -> Tensor:
    """Positions [B, T] that count only the real tokens of each row; padding before them gets 0."""
    return (valid.long().cumsum(dim=1) - 1).clamp(min=0)


def causal_padding_mask(valid: Tensor) -> Tensor:
    """Causal mask over the real tokens of each row: `valid` [B, T] -> bool [B, 1, T, T].

    Padding may stand anywhere. Every position sees itself, so padding stays finite too.
    """
    length = valid.shape[1]
    own = torch.eye(length, dtype=torch.bool, device=valid.device)
    return (valid.to(torch.bool)[:, None, :] | own).tril()[:, None]
