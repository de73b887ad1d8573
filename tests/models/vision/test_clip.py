import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from muomni.config.models import ClipConfig, TextTowerConfig, VisionTowerConfig
from muomni.models.layers.flops import forward_flops
from muomni.models.vision.clip import MAX_SCALE, Clip
from muomni.models.vision.contrastive import (
    contrastive_surrogate,
    pair_normalizers,
)
from tests.models.gradients import grad
from tests.models.vision.textbook_losses import gathered_features

SIZES = {"num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "head_dim": 16}
CONFIG = ClipConfig(
    vision=VisionTowerConfig(
        hidden_size=32, intermediate_size=64, image_size=16, patch_size=8, **SIZES
    ),
    text=TextTowerConfig(
        hidden_size=32, intermediate_size=64, vocab_size=20, max_positions=8, **SIZES
    ),
    embedding_size=24,
)


def build() -> Clip:
    torch.manual_seed(0)
    return Clip(CONFIG)


def pairs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (8, 3, 16, 16), generator=generator, dtype=torch.uint8)
    ids = torch.randint(3, 20, (8, 6), generator=generator)
    lengths = torch.tensor([6, 5, 4, 3, 6, 5, 4, 3])
    return pixels, ids, lengths


@torch.no_grad()
def test_features_are_unit_vectors_and_the_scale_starts_at_the_temperature() -> None:
    output = build()(*pairs())
    for features in (output.image, output.text):
        assert features.shape == (8, 24) and features.dtype == torch.float32
        torch.testing.assert_close(features.norm(dim=1), torch.ones(8))
    assert output.scale.item() == pytest.approx(1 / 0.07, rel=1e-5)


@torch.no_grad()
def test_text_features_ignore_padding_and_use_every_token() -> None:
    model = build()
    _, ids, lengths = pairs()
    base = model.embed_text(ids, lengths)
    padded = torch.nn.functional.pad(ids, (0, 2), value=7)
    padded[torch.arange(8) >= lengths[:, None]] = 9
    torch.testing.assert_close(model.embed_text(padded, lengths), base)
    for i in range(8):
        for place in range(int(lengths[i])):
            other = ids.clone()
            other[i, place] = 1
            assert (model.embed_text(other, lengths)[i] - base[i]).abs().max() > 1e-4
    swapped = ids.clone()
    swapped[:, [0, 1]] = ids[:, [1, 0]]
    assert (model.embed_text(swapped, lengths) - base).abs().max() > 1e-4


def test_scale_is_capped_but_can_return() -> None:
    model = build()
    with torch.no_grad():
        model.log_scale.fill_(9.0)
    scale = model.scale()
    assert scale.item() == pytest.approx(MAX_SCALE, rel=1e-5)
    scale.backward()
    assert grad(model.log_scale).item() == pytest.approx(MAX_SCALE, rel=1e-4)


def test_learns_to_match_texts_and_images() -> None:
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ratio, logs = torch.tensor(0.0), {}
    for _ in range(40):
        output = model(*pairs())
        gathered = gathered_features(output.image, output.text, torch.arange(8))
        normalizers = pair_normalizers(0, 8, gathered, output.scale)
        total, weight, logs = contrastive_surrogate(
            output.image, output.text, gathered, normalizers, 0, output.scale
        )
        optimizer.zero_grad()
        ratio = total / weight
        ratio.backward()
        optimizer.step()
    assert ratio < 0.1
    assert logs["accuracy_x_to_y"].tolist() == logs["accuracy_y_to_x"].tolist() == [8, 8]
    assert model.log_scale.item() != pytest.approx(math.log(1 / 0.07))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_close_and_has_gradients(dtype: torch.dtype) -> None:
    model = build()
    with torch.no_grad():
        wide = model(*pairs())
    model.to(dtype)
    half = model(*pairs())
    assert half.image.dtype == half.scale.dtype == torch.float32
    torch.testing.assert_close(half.text, wide.text, rtol=0, atol=0.05)
    torch.testing.assert_close(half.scale, wide.scale, rtol=0.02, atol=0)
    ((half.image * half.text.flip(0)).sum() * half.scale).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


def test_a_text_that_is_too_long_is_an_error() -> None:
    with pytest.raises(ValueError, match="max_positions=8"):
        build().embed_text(torch.zeros(1, 9, dtype=torch.int64), torch.tensor([9]))


def test_flops_agree_with_torch() -> None:
    model = build()
    pixels, ids, lengths = (t[:1] for t in pairs())
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
        torch.no_grad(),
    ):
        model(pixels, ids, lengths)
    units = {"images": 1, "texts": 1, "tokens": 6, "pairs": 36}
    assert counter.get_total_flops() == forward_flops(model.flops(), units)
