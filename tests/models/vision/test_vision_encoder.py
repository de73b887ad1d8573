import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from muomni.config.models import VisionTowerConfig
from muomni.models.vision.vision_encoder import (
    VisionEncoder,
    normalize_pixels,
)

CONFIG = VisionTowerConfig(
    hidden_size=48,
    num_layers=2,
    num_heads=3,
    num_kv_heads=3,
    head_dim=16,
    intermediate_size=96,
    image_size=32,
    patch_size=8,
)


def build() -> VisionEncoder:
    torch.manual_seed(0)
    return VisionEncoder(CONFIG).eval()


def images(num: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num, 3, 32, 32), generator=generator, dtype=torch.uint8)


@torch.no_grad()
def test_uint8_and_float_pixels_are_equivalent() -> None:
    model = build()
    cls, patches = model(images(2))
    assert cls.shape == (2, 48) and patches.shape == (2, 16, 48)
    for other, mine in zip(model(images(2) / 255), (cls, patches), strict=True):
        torch.testing.assert_close(other, mine)
    gray = torch.full((1, 3, 4, 4), 0.48145466)
    assert normalize_pixels(gray)[0, 0].abs().max() < 1e-6


@torch.no_grad()
def test_patch_positions_matter_and_are_row_major() -> None:
    model = build()
    image = torch.full((1, 3, 32, 32), 128, dtype=torch.uint8)
    base = model(image)[1][0]
    corner = image.clone()
    corner[:, :, :8, 24:] = 255  # first row, last column
    change = (model(corner)[1][0] - base).norm(dim=1)
    assert int(change.argmax()) == 3
    moved = image.clone()
    moved[:, :, 24:, :8] = 255
    assert (model(moved)[0] - model(corner)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_close_and_has_gradients(dtype: torch.dtype) -> None:
    model = build()
    with torch.no_grad():
        wide, _ = model(images(2))
    model.to(dtype)
    cls, patches = model(images(2))
    assert cls.dtype == dtype
    torch.testing.assert_close(cls.float(), wide, rtol=0.1, atol=0.1)
    (cls.float().square().sum() + patches.float().mean()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


def test_another_image_size_is_an_error() -> None:
    with pytest.raises(ValueError, match="32"):
        build()(torch.zeros(1, 3, 64, 64))


def test_flops_agree_with_torch() -> None:
    model = build()
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
        torch.no_grad(),
    ):
        model(images(1))
    assert counter.get_total_flops() == model.flops().forward
