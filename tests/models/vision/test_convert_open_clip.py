"""Both towers against open_clip's CLIP: equal weights give equal features."""

from typing import Any

import pytest
import torch

from muomni.config.models import ClipConfig, TextTowerConfig, VisionTowerConfig
from muomni.errors import ConfigError
from muomni.models.vision.clip import Clip
from muomni.models.vision.convert_open_clip import from_open_clip, open_clip_config, to_open_clip
from muomni.models.vision.vision_encoder import normalize_pixels

open_clip_model = pytest.importorskip("open_clip.model")

SIZES = {"num_layers": 3, "num_heads": 4, "num_kv_heads": 4}
CONFIG = ClipConfig(
    vision=VisionTowerConfig(
        hidden_size=64, head_dim=16, intermediate_size=160, image_size=48, patch_size=16, **SIZES
    ),
    text=TextTowerConfig(
        hidden_size=48,
        head_dim=12,
        intermediate_size=96,
        vocab_size=60,
        max_positions=10,
        norm_eps=1e-6,
        **SIZES,
    ),
    embedding_size=40,
)
EOS_ID = 2


def shaken(module: torch.nn.Module) -> torch.nn.Module:
    """Add noise to all parameters, so that no bias or norm is trivially equal."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (3, 3, 48, 48), generator=generator, dtype=torch.uint8)
    ids = torch.randint(3, 60, (3, 10), generator=generator)
    lengths = torch.tensor([10, 4, 7])
    ids[torch.arange(3), lengths - 1] = EOS_ID
    ids[torch.arange(10) >= lengths[:, None]] = 0
    return pixels, ids, lengths


def reference() -> Any:
    torch.manual_seed(0)
    return open_clip_model.CLIP(**open_clip_config(CONFIG, EOS_ID))


@torch.no_grad()
def test_features_equal_those_of_open_clip() -> None:
    theirs: Any = shaken(reference())
    ours = Clip(CONFIG).eval()
    ours.load_state_dict(from_open_clip(theirs.state_dict()))
    pixels, ids, lengths = inputs()
    theirs.visual.output_tokens = True
    image, patches = theirs.visual(normalize_pixels(pixels))
    text = theirs.encode_text(ids)
    cls, our_patches = ours.vision(pixels)
    torch.testing.assert_close(our_patches, patches, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.vision_projection(cls), image, rtol=1e-5, atol=1e-5)
    ours_text = ours.text_projection(ours.text(ids, lengths))
    torch.testing.assert_close(ours_text, text, rtol=1e-5, atol=1e-5)
    output = ours(pixels, ids, lengths)
    for mine, other in ((output.image, image), (output.text, text)):
        unit = torch.nn.functional.normalize(other, dim=-1)
        torch.testing.assert_close(mine, unit, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.scale, theirs.logit_scale.exp())


@torch.no_grad()
def test_open_clip_loads_our_weights_strictly() -> None:
    ours: Any = shaken(Clip(CONFIG))
    theirs = reference().eval()
    theirs.load_state_dict(to_open_clip(ours.state_dict()))
    pixels, ids, lengths = inputs()
    output = ours(pixels, ids, lengths)
    theirs_image = theirs.encode_image(normalize_pixels(pixels), normalize=True)
    torch.testing.assert_close(output.image, theirs_image, rtol=1e-5, atol=1e-5)
    theirs_text = theirs.encode_text(ids, normalize=True)
    torch.testing.assert_close(output.text, theirs_text, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_logits_with_a_bias_equal_those_of_open_clip() -> None:
    config = CONFIG.model_copy(update={"initial_bias": -10.0})
    ours: Any = shaken(Clip(config))
    theirs = open_clip_model.CLIP(**open_clip_config(config, EOS_ID)).eval()
    assert theirs.logit_bias.item() == -10
    theirs.load_state_dict(to_open_clip(ours.state_dict()))
    pixels, ids, lengths = inputs()
    output = ours(pixels, ids, lengths)
    logits, _ = theirs.get_logits(normalize_pixels(pixels), ids)
    actual = output.scale * output.image @ output.text.T + output.bias
    torch.testing.assert_close(actual, logits, rtol=1e-5, atol=1e-4)
    back = Clip(config)
    back.load_state_dict(from_open_clip(theirs.state_dict()))
    assert back.bias is not None and torch.equal(back.bias, ours.bias)


@pytest.mark.parametrize("bias", [None, -10.0])
def test_conversion_round_trip_is_the_identity(bias: float | None) -> None:
    state = shaken(Clip(CONFIG.model_copy(update={"initial_bias": bias}))).state_dict()
    back = from_open_clip(to_open_clip(state))
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(back[name], tensor), name


def test_unsupported_sizes_are_an_error() -> None:
    vision = CONFIG.vision.model_copy(update={"head_dim": 32})
    with pytest.raises(ConfigError, match=r"vision\.head_dim"):
        open_clip_config(CONFIG.model_copy(update={"vision": vision}), EOS_ID)
    text = CONFIG.text.model_copy(update={"num_kv_heads": 2})
    with pytest.raises(ConfigError, match=r"text\.num_kv_heads"):
        open_clip_config(CONFIG.model_copy(update={"text": text}), EOS_ID)


def test_an_unknown_weight_is_an_error() -> None:
    with pytest.raises(KeyError, match="adapter"):
        to_open_clip({"adapter.weight": torch.zeros(1)})
