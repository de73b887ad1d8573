"""Image and text towers with a shared embedding (CLIP: Radford et al., 2021).

The forward pass returns unit features and the scale and bias of their similarities for the losses in
`contrastive.py`. Reference in tests: open_clip.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muomni.config.models import ClipConfig, TextTowerConfig
from muomni.models.layers.flops import Flops, module_flops
from muomni.models.layers.transformer import TransformerStack, init_weights
from muomni.models.vision.vision_encoder import VisionEncoder, clip_stack_options

MAX_SCALE = 100.0


class ClipOutput(NamedTuple):
    """Unit features of B pairs, fp32, with scale and bias of their similarities.

    A tuple, because ZeRO-3 finds the tensors for its backward hooks in tuples.
    """

    image: Tensor  # [B, embedding_size]
    text: Tensor  # [B, embedding_size]
    scale: Tensor  # 0-d fp32, between 0 and MAX_SCALE
    bias: Tensor | None  # 0-d fp32, added to scaled similarities; None without `initial_bias`


class TextEncoder(nn.Module):
    """Causal transformer over subwords, pooled at the end-of-sequence token."""

    def __init__(self, config: TextTowerConfig) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.token_embedding = nn.Embedding(config.vocab_size, size)
        self.position_embedding = nn.Parameter(torch.empty(config.max_positions, size))
        self.stack = TransformerStack(config, clip_stack_options(config.norm_eps, is_causal=True))
        init_weights(self, config.num_layers, std=size**-0.5)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding, std=0.01)

    def forward(self, token_ids: Tensor, token_lengths: Tensor) -> Tensor:
        """Return the state [B, D] at the last of the `token_lengths` [B] tokens.

        `token_ids` [B, L] end with the end-of-sequence token, then padding of any value. Raises
        ValueError if L exceeds `max_positions`.
        """
        length = token_ids.shape[1]
        if length > self.config.max_positions:
            raise ValueError(
                f"a text of {length} tokens exceeds max_positions={self.config.max_positions}"
            )
        x = self.stack(self.token_embedding(token_ids) + self.position_embedding[:length])
        batch = torch.arange(len(x), device=x.device)
        return x[batch, (token_lengths - 1).clamp(min=0)]


class Clip(nn.Module):
    """Both towers, their projections, a learned temperature, and a bias for the sigmoid loss."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionEncoder(config.vision)
        self.text = TextEncoder(config.text)
        vision_size, text_size = config.vision.hidden_size, config.text.hidden_size
        self.vision_projection = nn.Linear(vision_size, config.embedding_size, bias=False)
        self.text_projection = nn.Linear(text_size, config.embedding_size, bias=False)
        nn.init.normal_(self.vision_projection.weight, std=vision_size**-0.5)
        nn.init.normal_(self.text_projection.weight, std=text_size**-0.5)
        # One element instead of a scalar: sharding needs a dimension.
        self.log_scale = nn.Parameter(torch.tensor([-math.log(config.initial_temperature)]))
        initial_bias = config.initial_bias
        self.bias = None if initial_bias is None else nn.Parameter(torch.tensor([initial_bias]))

    def forward(self, pixels: Tensor, token_ids: Tensor, token_lengths: Tensor) -> ClipOutput:
        """Embed B pairs: pixels as in `VisionEncoder.forward`, tokens as in `TextEncoder.forward`.

        Scale and bias are outputs because a sharded parameter is gathered only in `forward`.
        """
        return ClipOutput(
            self.embed_image(pixels),
            self.embed_text(token_ids, token_lengths),
            self.scale(),
            None if self.bias is None else self.bias[0].float(),
        )

    def embed_image(self, pixels: Tensor) -> Tensor:
        """Return unit features [B, embedding_size] fp32 of images."""
        return F.normalize(self.vision_projection(self.vision(pixels)[0]).float(), dim=-1)

    def embed_text(self, token_ids: Tensor, token_lengths: Tensor) -> Tensor:
        """Return unit features [B, embedding_size] fp32 of texts."""
        return F.normalize(
            self.text_projection(self.text(token_ids, token_lengths)).float(), dim=-1
        )

    def scale(self) -> Tensor:
        """Return exp(log_scale), at most MAX_SCALE, fp32.

        The limit does not change the gradient, so a scale that momentum pushed above it can return.
        """
        log_scale = self.log_scale[0].float()
        excess = (log_scale - math.log(MAX_SCALE)).clamp(min=0).detach()
        return (log_scale - excess).exp()

    def flops(self) -> dict[str, Flops]:
        """FLOPs per image, and of the text tower per text, token, and query-key pair."""
        token, pair = self.text.stack.flops()
        return {
            "images": self.vision.flops() + module_flops(self.vision_projection),
            "texts": module_flops(self.text_projection),
            "tokens": token,
            "pairs": pair,
        }
