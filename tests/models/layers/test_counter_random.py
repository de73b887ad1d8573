import torch

from muomni.models.layers.counter_random import uniform_hash


def test_hash_is_uniform_and_depends_on_every_key() -> None:
    draws = uniform_hash(torch.arange(200)[:, None], torch.arange(100)[None, :])
    assert draws.min() >= 0 and draws.max() < 1
    assert torch.histc(draws, 10, 0, 1).sub(2000).abs().max() < 200
    assert len(draws.unique()) > 19_900
    assert (
        abs(torch.corrcoef(torch.stack([draws[:-1].flatten(), draws[1:].flatten()]))[0, 1]) < 0.05
    )
