"""SpecAugment: mask bands of channels and stretches of time (Park et al., 2019, without warping).

The masks are a function of a seed per sample, so they do not depend on batch, device, or resume; the
caller gives each sample a new seed in each epoch.
"""

import torch
from torch import Tensor

from muomni.config.models import SpecAugmentConfig
from muomni.models.layers.counter_random import uniform_hash


def spec_augment(
    features: Tensor, frame_lengths: Tensor, seeds: Tensor, config: SpecAugmentConfig
) -> Tensor:
    """Return normalized features [B, T, M] with masked positions set to zero, the mean.

    `frame_lengths` and `seeds` (int64) are [B]; a time mask covers at most `max_time_share` of the
    valid frames of its sample.
    """
    num_channels = features.shape[2]
    channel_limit = torch.full_like(frame_lengths, min(config.max_channels, num_channels))
    time_limit = (frame_lengths * config.max_time_share).long()
    channels = torch.full_like(frame_lengths, num_channels)
    hidden = (
        _masks(seeds, config.num_time_masks, 0, frame_lengths, time_limit, features.shape[1])[
            :, :, None
        ]
        | (_masks(seeds, config.num_channel_masks, 1, channels, channel_limit, num_channels))[
            :, None
        ]
    )
    return features.masked_fill(hidden, 0.0)


def _masks(
    seeds: Tensor, num_masks: int, axis: int, extents: Tensor, limits: Tensor, size: int
) -> Tensor:
    """Return bool [B, size], True inside of `num_masks` masks of at most `limits` [B] positions."""
    index = torch.arange(num_masks, device=seeds.device)[None, :]
    samples = [
        uniform_hash(seeds[:, None], index, torch.full_like(index, 2 * axis + part))
        for part in range(2)
    ]
    widths = (samples[0] * (limits[:, None] + 1)).long()
    starts = (samples[1] * (extents[:, None] - widths + 1)).long()
    positions = torch.arange(size, device=seeds.device)[None, None, :]
    inside = (positions >= starts[:, :, None]) & (positions < (starts + widths)[:, :, None])
    return inside.any(1)
