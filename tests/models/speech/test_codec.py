import math
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from muomni.config.models import CodecConfig
from muomni.models.layers.flops import forward_flops
from muomni.models.speech.codec import Codec, codec_loss, mean_mel_l1
from muomni.models.speech.mel import LOG_FLOOR, length_mask
from muomni.models.speech.quantizer import count_codes
from tests.models.gradients import grad

SMALL = CodecConfig(hidden_size=48, latent_size=16, codebook_size=32, num_blocks=1)


def voices(num: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Speech-like audio clips: gliding harmonics, changing loudness and timbre, some hiss."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: float, high: float) -> torch.Tensor:
        knots = low + (high - low) * torch.rand(num, 1, 9, generator=generator)
        return torch.nn.functional.interpolate(knots, 16_000, mode="linear")[:, 0]

    phase = 2 * math.pi * draw(80, 250).cumsum(1) / 16_000
    color = draw(200, 3_000)
    harmonics = sum(
        torch.sin(n * phase) * torch.exp(-(((n * 150 - color) / 600) ** 2)) for n in range(1, 20)
    )
    hiss = torch.randn(num, 16_000, generator=generator) * 0.001
    return 0.2 * harmonics * draw(-0.5, 1).clamp(min=0) + hiss, torch.full((num,), 16_000)


def train(codec: Codec, num_steps: int) -> dict[str, list[float]]:
    optimizer = torch.optim.AdamW(codec.parameters(), lr=2e-3)
    waveform, lengths = voices(24, seed=1)
    generator = torch.Generator().manual_seed(2)
    history: dict[str, list[float]] = {"l1": [], "codes": []}
    for _ in range(num_steps):
        rows = torch.randperm(len(waveform), generator=generator)[:6]
        output = codec(waveform[rows], lengths[rows], rows)
        losses, weights, logs = codec_loss(output)
        loss = losses["reconstruction"] / weights["reconstruction"]
        loss = loss + 0.25 * losses["commitment"] / weights["commitment"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert output.statistics is not None
        codec.quantizer.update(output.statistics)
        history["l1"].append((logs["mel_l1"][0] / logs["mel_l1"][1]).item())
        history["codes"].append(float((output.statistics.counts > 0).sum(1).min()))
    return history


def test_training_moves_the_parameters_and_beats_the_mean_mel_on_unseen_audio_clips() -> None:
    torch.manual_seed(0)
    codec = Codec(SMALL)
    before = {name: value.clone() for name, value in codec.named_parameters()}
    history = train(codec, 120)
    for name, value in codec.named_parameters():
        assert not torch.equal(value, before[name]), name
    codec.eval()
    waveform, lengths = voices(6, seed=100)
    mean_mel = codec.log_mel(*voices(24, seed=1))[0].mean((0, 1))
    with torch.no_grad():
        output = codec(waveform, lengths)
    _, _, logs = codec_loss(output)
    baseline = mean_mel_l1(output.target, output.mel_lengths, mean_mel)
    assert logs["mel_l1"][0] < 0.7 * baseline[0]
    assert logs["mel_l1"][1] == baseline[1] == 600
    # Codes in use grow from the single one that an unfilled codebook has.
    assert history["codes"][0] == 1
    assert min(history["codes"][-10:]) > 20
    valid = length_mask(output.code_lengths, output.codes.shape[1])
    counts = count_codes(output.codes, valid, SMALL.codebook_size)
    assert (counts > 0).sum(1).min() > 16
    # The codes carry the audio clip: those of another one rebuild it worse.
    own = (codec.decode(output.codes) - output.target).abs().mean()
    others = (codec.decode(output.codes.flip(0)) - output.target).abs().mean()
    assert own < 0.8 * others
    torch.testing.assert_close(own, logs["mel_l1"][0] / logs["mel_l1"][1], rtol=0.02, atol=0)


def test_padded_batch_equals_single_audio_clips() -> None:
    torch.manual_seed(0)
    codec = Codec(SMALL)
    train(codec, 4)
    codec.eval()
    waveform, _ = voices(4, seed=5)
    lengths = torch.tensor([16_000, 9_111, 640, 1])
    waveform = waveform + 10.0 * ~length_mask(lengths, 16_000)
    codes, code_lengths = codec.encode(waveform, lengths)
    decoded = codec.decode(codes, code_lengths)
    with torch.no_grad():
        batch = codec(waveform, lengths)
    singles = []
    for i, length in enumerate(lengths.tolist()):
        row = waveform[i : i + 1, :length]
        own_codes, own_lengths = codec.encode(row, lengths[i : i + 1])
        frames = int(own_lengths)
        assert frames == int(code_lengths[i]) == math.ceil(length / 640)
        assert torch.equal(codes[i, :frames], own_codes[0])
        assert (codes[i, frames:] == 0).all()
        own_mel = codec.decode(own_codes)[0]
        torch.testing.assert_close(decoded[i, : 4 * frames], own_mel, rtol=0, atol=1e-3)
        assert (decoded[i, 4 * frames :] == LOG_FLOOR).all()
        with torch.no_grad():
            singles.append(codec(row, lengths[i : i + 1]))
    for term in ("reconstruction", "commitment"):
        total = sum(codec_loss(single)[0][term] for single in singles)
        torch.testing.assert_close(codec_loss(batch)[0][term], total, rtol=1e-4, atol=1e-4)
        weight = sum(codec_loss(single)[1][term] for single in singles)
        assert codec_loss(batch)[1][term] == weight


def test_training_statistics_and_gradients_add_up_over_micro_batches() -> None:
    torch.manual_seed(0)
    codec = Codec(SMALL)
    train(codec, 4)
    waveform, _ = voices(4, seed=5)
    lengths, seeds = torch.tensor([16_000, 9_111, 12_000, 4_000]), torch.arange(4)

    def gradient(parts: list[slice]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        codec.zero_grad()
        total: Any = None
        for part in parts:
            output = codec(waveform[part], lengths[part], seeds[part])
            torch.stack(list(codec_loss(output)[0].values())).sum().backward()
            total = output.statistics if total is None else total + output.statistics
        return [grad(p).clone() for p in codec.parameters()], list(total.tensors().values())

    full, halves = gradient([slice(0, 4)]), gradient([slice(0, 2), slice(2, 4)])
    for one, two in zip(full[0] + full[1], halves[0] + halves[1], strict=True):
        torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_close_and_has_gradients(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    codec = Codec(SMALL)
    train(codec, 10)
    waveform, lengths = voices(2, seed=5)
    wide = codec_loss(codec(waveform, lengths, torch.arange(2)))[0]["reconstruction"]
    codec.to(dtype)
    losses, _, _ = codec_loss(codec(waveform, lengths, torch.arange(2)))
    assert losses["reconstruction"].dtype == torch.float32
    torch.testing.assert_close(losses["reconstruction"], wide, rtol=0.05, atol=0)
    torch.stack(list(losses.values())).sum().backward()
    for parameter in codec.parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all()


def test_an_empty_slot_reaches_every_parameter_with_zero_weight() -> None:
    codec = Codec(SMALL)
    output = codec(torch.zeros(1, 1_600), torch.tensor([0]), torch.tensor([0]))
    losses, weights, _ = codec_loss(output)
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    assert total.item() == 0 == torch.stack(list(weights.values())).sum().item()
    for name, parameter in codec.named_parameters():
        assert parameter.grad is not None and (parameter.grad == 0).all(), name


def test_flops_agree_with_torch() -> None:
    codec = Codec(SMALL).eval()
    waveform, lengths = voices(1, seed=0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        codec(waveform, lengths)
    units = {"mel_frames": 100, "encoded": 25}
    both = units | {"decoded": 25}
    assert counter.get_total_flops() == forward_flops(codec.flops(), both)
    with FlopCounterMode(display=False) as counter:
        codec.encode(waveform, lengths)
    assert counter.get_total_flops() == forward_flops(codec.flops(), units)
