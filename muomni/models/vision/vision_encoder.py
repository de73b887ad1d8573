"""Vision tower: a pre-norm ViT as in CLIP (Dosovitskiy et al., 2020; Radford et al., 2021).

A strided convolution embeds patches; a class token, learned positions, and a norm precede the transformer
(LayerNorm, GELU, biases). The final norm covers all tokens, patch tokens included, for the projector.
Reference in tests: open_clip.
"""

from functools import lru_cache

import torch
from torch import Tensor, nn

from muomni.config.models import VisionTowerConfig
from muomni.models.layers.attention import StackOptions, make_norm
from muomni.models.layers.flops import Flops, module_flops
from muomni.models.layers.transformer import TransformerStack, init_weights

# Channel statistics of CLIP's training images, RGB in 0..1, as CLIP models use them.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


class VisionEncoder(nn.Module):
    """Square RGB images -> a class token and a token per patch."""

    def __init__(self, config: VisionTowerConfig) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.patch_embedding = nn.Conv2d(
            3, size, config.patch_size, stride=config.patch_size, bias=False
        )
        self.class_embedding = nn.Parameter(torch.empty(size))
        self.position_embedding = nn.Parameter(torch.empty(config.num_patches + 1, size))
        self.input_norm = make_norm("layer", size, config.norm_eps)
        self.stack = TransformerStack(config, clip_stack_options(config.norm_eps, is_causal=False))
        # 1 / sqrt(width), as in CLIP: 0.02 is too small for small towers.
        init_weights(self, config.num_layers, std=size**-0.5)
        nn.init.normal_(self.class_embedding, std=size**-0.5)
        nn.init.normal_(self.position_embedding, std=size**-0.5)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the class token [B, D] and the patch tokens [B, P, D] in row-major order.

        `pixels` [B, 3, S, S] are RGB, uint8 in 0..255 or float in 0..1, and are normalized here.
        Raises ValueError if S is not the configured image size.
        """
        side = self.config.image_size
        if pixels.shape[1:] != (3, side, side):
            shape = tuple(pixels.shape)
            raise ValueError(f"the vision tower expects [B, 3, {side}, {side}], got {shape}")
        x = normalize_pixels(pixels).to(self.patch_embedding.weight.dtype)
        x = self.patch_embedding(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)
        x = self.stack(self.input_norm(x + self.position_embedding))
        return x[:, 0], x[:, 1:]

    def flops(self) -> Flops:
        """FLOPs per image."""
        num_patches = self.config.num_patches
        position, pair = self.stack.flops()
        patches = module_flops(self.patch_embedding, num_patches, is_first=True)
        return patches + position * (num_patches + 1) + pair * (num_patches + 1) ** 2


def clip_stack_options(norm_eps: float, is_causal: bool) -> StackOptions:
    """The transformer variant of both CLIP towers."""
    return StackOptions(
        norm="layer",
        mlp="gelu",
        bias=True,
        causal=is_causal,
        rope_theta=None,
        qk_norm=False,
        norm_eps=norm_eps,
    )


def normalize_pixels(pixels: Tensor) -> Tensor:
    """Normalize [B, 3, H, W], uint8 in 0..255 or float in 0..1, by CLIP's statistics; fp32."""
    if pixels.dtype == torch.uint8:
        pixels = pixels.float() / 255
    mean, std = _pixel_statistics(pixels.device)
    return (pixels.float() - mean) / std


@lru_cache(maxsize=16)
def _pixel_statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    # Cached per device: a copy from the host in each forward pass would synchronize a GPU.
    with torch.inference_mode(False):
        mean, std = (torch.tensor(v, device=device) for v in (PIXEL_MEAN, PIXEL_STD))
        return mean[:, None, None], std[:, None, None]
