"""Random numbers as a pure function of integer keys, such as (sample, frame).

They do not depend on device, batch, micro-batch, or rank, and there is no generator state to save.
"""

import torch
from torch import Tensor


def uniform_hash(*keys: Tensor) -> Tensor:
    """Return fp32 numbers in [0, 1) that depend only on the broadcastable int64 `keys`.

    A counter-based generator with the mixing steps of Steele et al., "Fast Splittable Pseudorandom
    Number Generators", 2014.
    """
    return ((_hash(*keys) >> 40) & 0xFFFFFF).float() / 2**24


def position_keys(seeds: Tensor, positions: Tensor) -> Tensor:
    """Random odd numbers for `keyed_dropout`: int32 [B, T].

    `seeds` int64 [B] identify a sample in an epoch. `positions` int64 [B or 1, T] count within the sample, so
    that padding and the other samples of a batch do not matter.
    """
    salt = torch.full((), _DROPOUT_SALT, device=seeds.device)
    return _odd(_hash(salt, seeds[:, None], positions))


def channel_keys(first_use: int, num_uses: int, num_channels: int, device: torch.device) -> Tensor:
    """Random odd numbers for `keyed_dropout`: int32 [num_uses, num_channels].

    Uses are the places in a model that drop units; each has a number.
    """
    uses = torch.arange(first_use, first_use + num_uses, device=device)
    return _odd(_hash(uses[:, None], torch.arange(num_channels, device=device)))


def keyed_dropout(x: Tensor, positions: Tensor, channels: Tensor, rate: float) -> Tensor:
    """Dropout (Srivastava et al. 2014) of x [B, T, D], a function of sample, position, use, and channel.

    `positions` [B, T] are `position_keys`, `channels` [D] those of one use in `channel_keys`. A unit is dropped
    if the product of its keys modulo 2^32 is among the lowest (multiplicative hashing; Dietzfelbinger et
    al. 1997): one multiplication per unit, and no state that recomputation would have to restore.
    """
    lowest_kept = round(rate * 2**32) - 2**31
    is_kept = positions[:, :, None] * channels >= lowest_kept
    # The scale is applied last: half precision would round it.
    return (x * is_kept.to(x.dtype)).mul_(1 / (1 - rate))


def _hash(*keys: Tensor) -> Tensor:
    state = torch.zeros((), dtype=torch.int64, device=keys[0].device)
    for key in keys:
        state = _mix(state + key.to(torch.int64) + _GOLDEN)
    return state


def _odd(state: Tensor) -> Tensor:
    """The upper half of 64-bit integers as odd int32; products of odd numbers lose no bits."""
    return (state >> 32).to(torch.int32) | 1


def _signed(constant: int) -> int:
    return constant - 2**64 if constant >= 2**63 else constant


_DROPOUT_SALT = 0x64726F70
_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FACTORS = (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))


def _mix(x: Tensor) -> Tensor:
    """Scramble 64-bit integers; shifts are logical, and products wrap around."""
    x = (x ^ _shift(x, 30)) * _FACTORS[0]
    x = (x ^ _shift(x, 27)) * _FACTORS[1]
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)
