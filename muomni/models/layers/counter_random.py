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
    state = torch.zeros((), dtype=torch.int64, device=keys[0].device)
    for key in keys:
        state = _mix(state + key.to(torch.int64) + _GOLDEN)
    return ((state >> 40) & 0xFFFFFF).float() / 2**24


def _signed(constant: int) -> int:
    return constant - 2**64 if constant >= 2**63 else constant


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FACTORS = (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))


def _mix(x: Tensor) -> Tensor:
    """Scramble 64-bit integers; shifts are logical, and products wrap around."""
    x = (x ^ _shift(x, 30)) * _FACTORS[0]
    x = (x ^ _shift(x, 27)) * _FACTORS[1]
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)
