import torch

from muomni.config.models import SpecAugmentConfig
from muomni.models.speech.specaugment import spec_augment

CONFIG = SpecAugmentConfig()


def test_masks_are_not_empty_and_within_limits() -> None:
    lengths = torch.tensor([200, 100, 37, 4, 0]).repeat(20)
    features = torch.ones(100, 200, 80)
    masked = spec_augment(features, lengths, torch.arange(100), CONFIG)
    time_hidden = (masked == 0).all(2)
    channel_hidden = (masked == 0).all(1)
    limit = CONFIG.num_time_masks * (lengths * CONFIG.max_time_share).long()
    assert (time_hidden.sum(1) <= limit).all()
    assert (channel_hidden.sum(1) <= CONFIG.num_channel_masks * CONFIG.max_channels).all()
    past_end = torch.arange(200) >= lengths[:, None]
    assert not (time_hidden & past_end).any()
    assert time_hidden[lengths == 200].sum(1).float().mean() > 10
    assert channel_hidden.sum(1).float().mean() > 8
    # Nothing else is touched.
    rest = ~(time_hidden[:, :, None] | channel_hidden[:, None, :])
    assert (masked[rest] == 1).all()


def test_masks_reach_all_positions() -> None:
    features = torch.ones(500, 100, 80)
    masked = spec_augment(features, torch.full((500,), 100), torch.arange(500), CONFIG)
    share = (masked == 0).float().mean(0)
    assert share[:, 40].min() > 0 and share[50].min() > 0


def test_masks_do_not_depend_on_the_batch() -> None:
    features, lengths = torch.ones(3, 50, 80), torch.tensor([50, 40, 30])
    seeds = torch.tensor([11, 22, 2**60])
    batch = spec_augment(features, lengths, seeds, CONFIG)
    for i in (2, 0, 1):
        row = slice(i, i + 1)
        single = spec_augment(features[row, : lengths[i]], lengths[row], seeds[row], CONFIG)
        assert torch.equal(single[0], batch[i, : lengths[i]])


def test_another_seed_gives_another_mask() -> None:
    features, lengths = torch.ones(2, 50, 80), torch.tensor([50, 50])
    masked = spec_augment(features, lengths, torch.tensor([1, 2]), CONFIG)
    assert not torch.equal(masked[0], masked[1])


def test_zero_masks_change_nothing() -> None:
    features = torch.randn(2, 50, 80)
    off = SpecAugmentConfig(num_channel_masks=0, num_time_masks=0)
    assert torch.equal(
        spec_augment(features, torch.tensor([50, 9]), torch.arange(2), off), features
    )
