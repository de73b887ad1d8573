import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from muomni.config.models import AudioEncoderConfig, SpecAugmentConfig
from muomni.models.layers.flops import forward_flops
from muomni.models.speech.audio_encoder import AudioEncoder, audio_units, num_encoder_frames
from muomni.models.speech.ctc import ctc_loss, greedy_decode
from muomni.models.speech.mel import length_mask

CONFIG = AudioEncoderConfig(
    hidden_size=48,
    num_layers=2,
    num_heads=3,
    num_kv_heads=3,
    head_dim=16,
    intermediate_size=96,
    vocab_size=11,
    conv_channels=16,
)


def audio_clips(lengths: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise of these lengths; the padding holds large values that must not matter."""
    generator = torch.Generator().manual_seed(seed)
    waveform = 0.1 * torch.randn(len(lengths), max(lengths), generator=generator)
    sizes = torch.tensor(lengths)
    return waveform + 5.0 * ~length_mask(sizes, max(lengths)), sizes


WITH_CONV = CONFIG.model_copy(update={"conv_kernel_size": 7})
WITH_DROPOUT = WITH_CONV.model_copy(update={"dropout": 0.3})


def build(config: AudioEncoderConfig = CONFIG) -> AudioEncoder:
    torch.manual_seed(0)
    return AudioEncoder(config).eval()


@pytest.mark.parametrize(
    "config", [CONFIG, WITH_CONV, WITH_DROPOUT], ids=["plain", "conv", "dropout"]
)
@torch.no_grad()
def test_padded_batch_equals_single_audio_clips(config: AudioEncoderConfig) -> None:
    model = build(config).train(config.dropout > 0)
    waveform, lengths = audio_clips([16_000, 9_000, 8_960, 641, 100, 1])
    seeds = torch.arange(6)
    hidden, frame_lengths = model(waveform, lengths, seeds)
    assert hidden.shape == (6, 25, 48)
    assert frame_lengths.tolist() == num_encoder_frames(lengths).tolist() == [25, 15, 14, 2, 1, 1]
    for i, length in enumerate(lengths.tolist()):
        single, _ = model(waveform[i : i + 1, :length], lengths[i : i + 1], seeds[i : i + 1])
        frames = int(frame_lengths[i])
        assert single.shape[1] == frames == math.ceil(length / 640)
        torch.testing.assert_close(hidden[i, :frames], single[0], rtol=1e-4, atol=1e-4)
        assert (hidden[i, frames:] == 0).all()


@torch.no_grad()
def test_order_and_context_matter() -> None:
    model = build()
    waveform, lengths = audio_clips([16_000])
    hidden, _ = model(waveform, lengths)
    # Played backward, the states are not the old ones in reverse: there are positions.
    backward, _ = model(waveform.flip(1), lengths)
    assert (backward.flip(1) - hidden).abs().mean() > 0.05
    # The first frame sees the last: the encoder is bidirectional.
    changed = waveform.clone()
    changed[:, -2_000:] *= torch.linspace(1, 30, 2_000)
    assert (model(changed, lengths)[0][:, 0] - hidden[:, 0]).abs().max() > 1e-3


def test_an_even_kernel_is_rejected() -> None:
    with pytest.raises(ValueError, match="conv_kernel_size=8 must be odd"):
        AudioEncoderConfig.model_validate({**CONFIG.model_dump(), "conv_kernel_size": 8})


def test_learns_to_transcribe_tones() -> None:
    torch.manual_seed(0)
    model = AudioEncoder(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    time = torch.arange(1_600) / 16_000
    tones = torch.stack([torch.sin(2 * math.pi * 200 * n * time) for n in range(1, 11)])

    def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(1, 11, (8, 5), generator=generator)
        waveform = tones[labels - 1].flatten(1)
        return waveform + 0.01 * torch.randn(waveform.shape), torch.full((8,), 8_000), labels

    num_labels = torch.full((8,), 5)
    augmentation = SpecAugmentConfig(max_channels=2, max_time_share=0.02)
    for step in range(120):
        waveform, lengths, labels = batch(step)
        hidden, frames = model(waveform, lengths, torch.arange(8) + 8 * step, augmentation)
        total, weight, _ = ctc_loss(model.ctc_logits(hidden), frames, labels, num_labels)
        optimizer.zero_grad()
        (total / weight).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    waveform, lengths, labels = batch(10_000)
    with torch.no_grad():
        hidden, frames = model(waveform, lengths)
        decoded = greedy_decode(model.ctc_logits(hidden), frames)
    # A tone that follows itself cannot be heard as two.
    heard = [torch.unique_consecutive(row).tolist() for row in labels]
    assert (
        sum(a == b or a == c.tolist() for a, b, c in zip(decoded, heard, labels, strict=True)) >= 6
    )


def test_specaugment_is_optional_and_seeded() -> None:
    """In either mode: training with a frozen encoder masks its input too."""
    model = build()
    waveform, lengths = audio_clips([16_000])
    plain, _ = model(waveform, lengths)
    seeds, strong = torch.tensor([3]), SpecAugmentConfig(num_time_masks=5)
    masked, _ = model(waveform, lengths, seeds, strong)
    assert not torch.allclose(masked, plain)
    assert torch.equal(model(waveform, lengths, seeds, strong)[0], masked)
    assert not torch.equal(model(waveform, lengths, seeds + 1, strong)[0], masked)
    model.train()
    assert torch.equal(model(waveform, lengths)[0], plain)
    with pytest.raises(ValueError, match="seed"):
        model(waveform, lengths, None, strong)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_close_and_has_gradients(dtype: torch.dtype) -> None:
    model = build()
    waveform, lengths = audio_clips([8_000, 5_000])
    labels, num_labels = torch.tensor([[1, 2, 3], [4, 4, 0]]), torch.tensor([3, 2])

    def loss() -> torch.Tensor:
        hidden, frames = model(waveform, lengths)
        return ctc_loss(model.ctc_logits(hidden), frames, labels, num_labels)[0]

    wide = loss()
    model.to(dtype)
    half = loss()
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, wide, rtol=0.02, atol=0)
    half.backward()
    for name, parameter in model.named_parameters():
        assert parameter.dtype == dtype
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


def test_an_empty_slot_reaches_every_parameter_with_zero_gradient() -> None:
    model = build()
    hidden, frames = model(torch.zeros(1, 800), torch.tensor([0]))
    assert (hidden == 0).all() and frames.tolist() == [0]
    labels, num_labels = torch.zeros(1, 2, dtype=torch.int64), torch.tensor([0])
    total, weight, _ = ctc_loss(model.ctc_logits(hidden), frames, labels, num_labels)
    total.backward()
    assert total.item() == 0 == weight.item()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and (parameter.grad == 0).all(), name


@pytest.mark.parametrize("config", [CONFIG, WITH_CONV], ids=["plain", "conv"])
@pytest.mark.parametrize("num_samples", [16_000, 7_001])
def test_flops_agree_with_torch(num_samples: int, config: AudioEncoderConfig) -> None:
    model = build(config)
    waveform, lengths = audio_clips([num_samples])
    # torch's fused attention for CPUs goes uncounted.
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
        torch.no_grad(),
    ):
        model.ctc_logits(model(waveform, lengths)[0])
    assert counter.get_total_flops() == forward_flops(model.flops(), audio_units(lengths))
