import pytest
import torch
from torch import Tensor

from muomni.models.layers.counter_random import (
    channel_keys,
    keyed_dropout,
    position_keys,
    uniform_hash,
)


def test_hash_is_uniform_and_depends_on_every_key() -> None:
    draws = uniform_hash(torch.arange(200)[:, None], torch.arange(100)[None, :])
    assert draws.min() >= 0 and draws.max() < 1
    assert torch.histc(draws, 10, 0, 1).sub(2000).abs().max() < 200
    assert len(draws.unique()) > 19_900
    assert (
        abs(torch.corrcoef(torch.stack([draws[:-1].flatten(), draws[1:].flatten()]))[0, 1]) < 0.05
    )


def dropped(rate: float, use: int = 0, num_samples: int = 8) -> Tensor:
    """Which of 300 positions and 500 channels of each sample are dropped, 1 or 0."""
    rows = position_keys(torch.arange(num_samples) + 2**60, torch.arange(300)[None])
    (columns,) = channel_keys(use, 1, 500, torch.device("cpu"))
    return (keyed_dropout(torch.ones(num_samples, 300, 500), rows, columns, rate) == 0).float()


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.5])
def test_dropout_drops_its_rate_along_every_axis(rate: float) -> None:
    """Six standard deviations of a binomial distribution, for means over positions, channels, and both."""
    mask = dropped(rate)
    for axes in ((1, 2), (0, 1), (0, 2), (0, 1, 2)):
        means = mask.mean(dim=axes)
        deviation = (rate * (1 - rate) * means.numel() / mask.numel()) ** 0.5
        assert (means - rate).abs().max() < 6 * deviation, axes


def test_dropped_units_are_independent() -> None:
    """Of samples, positions, channels, and uses, whose correlations are those of random numbers."""
    mask, other = dropped(0.3), dropped(0.3, use=1)
    rows = [
        torch.cat([mask.flatten(1), other.flatten(1)]),  # samples and uses
        mask[0],  # positions
        mask.flatten(0, 1).T,  # channels
    ]
    for variables in rows:
        correlations = torch.corrcoef(variables).fill_diagonal_(0)
        limit = 6 / variables.shape[1] ** 0.5
        assert correlations.abs().max() < limit
        assert correlations.square().mean() < 1.2 / variables.shape[1]


def test_dropout_keeps_the_mean_in_half_precision() -> None:
    rows = position_keys(torch.arange(4), torch.arange(200)[None])
    (columns,) = channel_keys(0, 1, 256, torch.device("cpu"))
    x = (1 + torch.rand(4, 200, 256)).bfloat16()
    output = keyed_dropout(x, rows, columns, 0.1)
    kept = output != 0
    # bf16 would round the scale 1 / 0.9 by 0.16 %.
    ratio = output[kept].double().sum() / x[kept].double().sum() * 0.9
    assert output.dtype == torch.bfloat16 and abs(ratio - 1) < 2e-4
