"""Attention masks and positions for packed and padded batches; built once per forward.

Masks are boolean [B, 1, T or 1, S], True where a query may look. No row is ever empty: padding sees
padding, so a softmax over nothing (NaN) cannot occur even for rows without any real token.
"""

import torch
from torch import Tensor, nn


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


# Narrower windows than this one gain nothing: the kernel works in blocks of this order.
_MIN_WINDOW = 32


def window_size(document_ids: Tensor) -> int | None:
    """The size of windows that hold all documents of rows [B, T], None if whole rows are as cheap.

    Rows are cut into windows of that many positions. A document that is not longer reaches no further
    back than into the window before, so queries need the keys of two windows in place of T. Reads
    the documents, which stalls an accelerator.
    """
    length = document_ids.shape[1]
    longest = int((document_positions(document_ids) * (document_ids > 0)).max()) + 1
    size = _MIN_WINDOW
    while size < longest:
        size *= 2
    return size if 4 * size <= length and length % size == 0 else None


def window_mask(document_ids: Tensor, size: int) -> Tensor:
    """Which keys of its own and the previous window a query sees: bool [B * T / size, 1, size, 2 * size].

    For real positions the same as `document_mask`, given a size by `window_size`; padding sees no
    further back than its window reaches.
    """
    positions = document_positions(document_ids).reshape(-1, size)
    places = torch.arange(size, device=positions.device)
    keys = torch.arange(-size, size, device=positions.device)
    distance = places[:, None] - keys
    # A document begins as many positions before a query as its position in it says.
    return ((distance >= 0) & (distance <= positions[:, :, None]))[:, None]


def padding_mask(valid: Tensor) -> Tensor:
    """Bidirectional mask, `valid` [B, T] -> [B, 1, 1, T]: queries see the real keys of their row.

    A row without any real key (an empty modality slot) sees all of its padding and stays finite.
    """
    valid = valid.to(torch.bool)
    return (valid | ~valid.any(dim=1, keepdim=True))[:, None, None]


def padded_starts(valid: Tensor) -> Tensor:
    """Where the real part of each row and its padding begin in rows laid end to end: int32 [3 * B + 1].

    `valid` [B, T] may be True in one run a row; before and behind it is padding, each a document of its
    own, perhaps an empty one (`layers.Documents.starts`).
    """
    num_rows, length = valid.shape
    valid = valid.to(torch.int32)
    rows = torch.arange(num_rows, dtype=torch.int32, device=valid.device) * length
    begins = rows + valid.argmax(dim=1)
    ends = begins + valid.sum(dim=1)
    starts = torch.stack([rows, begins, ends], dim=1).flatten()
    return nn.functional.pad(starts, (0, 1), value=num_rows * length).to(torch.int32)


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
