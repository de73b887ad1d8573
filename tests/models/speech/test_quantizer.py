import pytest
import torch

from muomni.models.speech.quantizer import (
    QuantizerStatistics,
    ResidualQuantizer,
    code_perplexity,
    count_codes,
)
from tests.models.gradients import grad


def make(num_codebooks: int = 2, codebook_size: int = 16) -> ResidualQuantizer:
    return ResidualQuantizer(num_codebooks, codebook_size, 4, ema_decay=0.9, dead_code_usage=0.1)


def latents(seed: int, batch: int = 4, num_frames: int = 25) -> torch.Tensor:
    return torch.randn(batch, num_frames, 4, generator=torch.Generator().manual_seed(seed))


def everything(x: torch.Tensor) -> torch.Tensor:
    return torch.ones(x.shape[:2], dtype=torch.bool)


def train(quantizer: ResidualQuantizer, num_steps: int, start: int = 0) -> None:
    for step in range(start, start + num_steps):
        x = latents(step)
        seeds = torch.arange(len(x)) + 1000 * step
        output = quantizer(x, everything(x), seeds)
        assert output.statistics is not None
        quantizer.update(output.statistics)


def test_each_update_fills_a_codebook_and_errors_shrink() -> None:
    quantizer = make()
    x = latents(99)
    errors = []
    for step in range(30):
        output = quantizer(x, everything(x), torch.arange(4))
        errors.append((output.quantized - x).square().mean().item())
        assert int(quantizer.num_filled) == min(step, 2)
        train(quantizer, 1, start=step)
    assert errors[0] == pytest.approx(x.square().mean().item())
    assert errors[1] < 0.7 * errors[0]
    assert errors[2] < 0.9 * errors[1]
    assert errors[-1] < 0.8 * errors[2]


def test_all_codes_come_into_use() -> None:
    quantizer = make()
    train(quantizer, 60)
    x = latents(7, batch=40)
    codes = quantizer.encode(x, everything(x))
    counts = count_codes(codes, everything(x), 16)
    assert (counts > 0).sum(1).min() >= 15
    assert code_perplexity(counts).min() > 8


def test_a_dead_code_is_revived_from_the_data() -> None:
    quantizer = make(num_codebooks=1)
    train(quantizer, 20)
    quantizer.codebooks[0, 3] = 1e3
    quantizer.ema_sums[0, 3] = 1e3 * quantizer.ema_counts[0, 3]
    train(quantizer, 60, start=20)
    assert quantizer.codebooks[0, 3].abs().max() < 6
    x = latents(7, batch=40)
    assert 3 in quantizer.encode(x, everything(x))


def test_statistics_of_two_halves_sum_to_those_of_the_batch() -> None:
    quantizer = make()
    train(quantizer, 5)
    x, seeds = latents(3), torch.tensor([5, 6, 7, 8])
    valid = everything(x)
    valid[1, 10:] = False
    whole = quantizer(x, valid, seeds).statistics
    # The second half is padded further, as another micro-batch would be.
    longer = torch.nn.functional.pad(x[2:], (0, 0, 0, 6), value=9.0)
    longer_valid = torch.nn.functional.pad(valid[2:], (0, 6))
    parts = [
        quantizer(x[:2], valid[:2], seeds[:2]).statistics,
        quantizer(longer, longer_valid, seeds[2:]).statistics,
    ]
    total = parts[1] + parts[0]
    for name, tensor in whole.tensors().items():
        torch.testing.assert_close(total.tensors()[name], tensor, rtol=1e-5, atol=1e-6)
    assert torch.equal(whole.counts.sum(1), torch.full((2,), 85.0))
    other = make()
    other.load_state_dict(quantizer.state_dict())
    quantizer.update(whole)
    other.update(QuantizerStatistics(**total.tensors()))
    torch.testing.assert_close(other.codebooks, quantizer.codebooks, rtol=1e-4, atol=1e-5)


def test_candidates_are_latents_of_the_batch() -> None:
    quantizer = make(num_codebooks=1)
    x = latents(3)
    statistics = quantizer(x, everything(x), torch.arange(4)).statistics
    quantizer.update(statistics)
    distance = torch.cdist(quantizer.codebooks[0], x.reshape(-1, 4)).min(1).values
    assert (distance < 0.2).float().mean() >= 0.7
    assert len(torch.unique(quantizer.codebooks[0], dim=0)) >= 14


def test_gradient_passes_straight_through() -> None:
    quantizer = make()
    train(quantizer, 5)
    x = latents(3).requires_grad_()
    output = quantizer(x, everything(x), torch.arange(4))
    assert not torch.allclose(output.quantized, x)
    weights = torch.randn_like(x)
    (output.quantized * weights).sum().backward()
    torch.testing.assert_close(x.grad, weights)


def test_commitment_pulls_latents_to_their_codes() -> None:
    quantizer = make()
    train(quantizer, 5)
    x = latents(3).requires_grad_()
    before = quantizer(x, everything(x), torch.arange(4)).commitment
    before.backward()
    moved = (x - 0.2 * grad(x)).detach()
    after = quantizer(moved, everything(x), torch.arange(4)).commitment
    assert 0 < after < before


def test_padding_has_no_effect() -> None:
    quantizer = make()
    train(quantizer, 5)
    x = latents(3)
    valid = everything(x)
    valid[:, 20:] = False
    x[:, 20:] = 50.0
    short = quantizer(x[:, :20], valid[:, :20], torch.arange(4))
    padded = quantizer(x, valid, torch.arange(4))
    torch.testing.assert_close(padded.commitment, short.commitment)
    assert torch.equal(padded.codes[:, :20], short.codes)
    assert (padded.codes[:, 20:] == 0).all() and (padded.quantized[:, 20:] == 0).all()


def test_encode_and_decode_agree_with_forward() -> None:
    quantizer = make()
    train(quantizer, 5)
    quantizer.eval()
    x = latents(3)
    output = quantizer(x, everything(x), None)
    assert output.statistics is None
    assert torch.equal(quantizer.encode(x, everything(x)), output.codes)
    torch.testing.assert_close(quantizer.decode(output.codes), output.quantized)


def test_an_empty_batch_changes_nothing() -> None:
    for num_steps in (0, 5):
        quantizer = make()
        train(quantizer, num_steps)
        before = {name: value.clone() for name, value in quantizer.state_dict().items()}
        x = latents(3)
        quantizer.update(quantizer(x, ~everything(x), torch.arange(4)).statistics)
        for name, value in quantizer.state_dict().items():
            assert torch.equal(value, before[name])


def test_codebooks_stay_fp32_buffers_when_the_model_is_cast() -> None:
    quantizer = make()
    train(quantizer, 3)
    before = quantizer.codebooks.clone()
    quantizer.half().bfloat16()
    assert quantizer.codebooks.dtype == torch.float32
    assert torch.equal(quantizer.codebooks, before)
    assert list(quantizer.parameters()) == []


def test_a_meta_model_can_be_materialized() -> None:
    with torch.device("meta"):
        quantizer = make()
    quantizer.to_empty(device="cpu").load_state_dict(make().state_dict())
    assert quantizer.codebooks.device.type == "cpu"
    train(quantizer, 2)


def test_training_needs_seeds() -> None:
    x = latents(0)
    with pytest.raises(ValueError, match="seed"):
        make()(x, everything(x), None)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_latent_changes_no_codebook(bad: float) -> None:
    quantizer = make()
    train(quantizer, 5)
    before = {name: buffer.clone() for name, buffer in quantizer.named_buffers()}
    x = latents(50)
    x[1, 3, 2] = bad
    quantizer.update(quantizer(x, everything(x), torch.arange(4)).statistics)
    for name, buffer in quantizer.named_buffers():
        assert torch.equal(buffer, before[name]), name
    train(quantizer, 1, start=5)
    assert not torch.equal(quantizer.codebooks, before["codebooks"])
