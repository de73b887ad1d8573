"""The omni model: a Thinker that reads projected images and audio clips among its text tokens.

Patch tokens of the vision tower and stacked states of the audio encoder each pass through an MLP and
replace the embeddings of placeholder tokens (projector after Liu et al. 2023, LLaVA, arXiv:2304.08485). A
batch always has a slot of each kind; an empty slot points at the pad index and has zero gradient, but
keeps its modules in the graph. The Talker speaks the answers from their text and the Thinker's states.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muomni.config.models import OmniConfig, SpecAugmentConfig
from muomni.models.language.generation import GeneratedText, generate_text
from muomni.models.language.thinker import Thinker
from muomni.models.layers.attention import RMSNorm
from muomni.models.layers.flops import Flops, module_flops, weight_flops
from muomni.models.layers.transformer import INIT_STD
from muomni.models.speech.audio_encoder import AudioEncoder
from muomni.models.speech.codec import Codec
from muomni.models.speech.mel import length_mask
from muomni.models.speech.talker import Talker
from muomni.models.vision.vision_encoder import VisionEncoder

# Mean square of gelu(x) for x from N(0, 1).
GELU_POWER = 0.425


@dataclass(slots=True)
class MediaSlots:
    """Images and audio clips of a batch [B, T], with indices into its B * T flat positions.

    Padding and empty slots have the pad index B * T.
    """

    images: Tensor  # [I, 3, side, side] uint8, I >= 1
    image_positions: Tensor  # [I, P]
    audios: Tensor  # [A, N] at 16 kHz, A >= 1
    audio_lengths: Tensor  # [A] in samples
    audio_positions: Tensor  # [A, L], L >= the longest audio clip's positions

    @classmethod
    def of_batch(cls, batch: dict[str, Tensor]) -> "MediaSlots":
        """The slots of a batch with the names of the fields as keys."""
        return cls(*(batch[name] for name in cls.__dataclass_fields__))


class Projector(nn.Module):
    """Norm and two-layer MLP from a tower's states to the Thinker's embeddings."""

    def __init__(self, input_size: int, hidden_size: int, output_size: int) -> None:
        super().__init__()
        self.norm = RMSNorm(input_size)
        self.up_proj = nn.Linear(input_size, hidden_size)
        self.down_proj = nn.Linear(hidden_size, output_size)
        nn.init.normal_(self.up_proj.weight, std=input_size**-0.5)
        nn.init.zeros_(self.up_proj.bias)
        nn.init.zeros_(self.down_proj.bias)
        self.start_at(INIT_STD)

    @torch.no_grad()
    def start_at(self, std: float) -> None:
        """Reinitialize the output layer, so that features start with this standard deviation.

        Use that of the Thinker's token embeddings, or zero for features that are added to embeddings.
        """
        layer = self.down_proj
        nn.init.normal_(layer.weight, std=std * (GELU_POWER * layer.in_features) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """[..., input_size] -> [..., output_size]."""
        x = self.norm(x.to(self.up_proj.weight.dtype))
        return self.down_proj(F.gelu(self.up_proj(x)))


class OmniModel(nn.Module):
    """Token ids with media slots in, Thinker states out; speaks through Talker and codec.

    `with_codec` adds the codec for inference; training keeps it outside of the model, because it is
    frozen and its codebooks must stay fp32.
    """

    def __init__(self, config: OmniConfig, with_codec: bool = False) -> None:
        super().__init__()
        self.config = config
        size, width = config.thinker.hidden_size, config.projector_hidden_size
        self.thinker = Thinker(config.thinker)
        self.vision_encoder = VisionEncoder(config.vision_encoder)
        self.audio_encoder = AudioEncoder(config.audio_encoder)
        self.image_projector = Projector(config.vision_encoder.hidden_size, width, size)
        stacked_size = config.audio_encoder.hidden_size * config.audio_stack
        self.audio_projector = Projector(stacked_size, width, size)
        self.talker = Talker(config.talker) if config.talker is not None else None
        self.codec = Codec(config.codec) if with_codec and config.codec is not None else None

    def train(self, mode: bool = True) -> "OmniModel":
        """Set training mode, except in frozen towers, whose dropout would only add noise."""
        super().train(mode)
        for tower in (self.vision_encoder, self.audio_encoder):
            if not any(parameter.requires_grad for parameter in tower.parameters()):
                tower.eval()
        return self

    # -- reading -----------------------------------------------------------------------------------
    def image_features(self, images: Tensor) -> Tensor:
        """Images [I, 3, side, side] -> embeddings [I, P, hidden_size], one per patch."""
        with torch.set_grad_enabled(_trains(self.vision_encoder)):
            _, patches = self.vision_encoder(images)
        return self.image_projector(patches)

    def audio_features(
        self,
        audios: Tensor,
        audio_lengths: Tensor,
        seeds: Tensor | None = None,
        augmentation: SpecAugmentConfig | None = None,
    ) -> Tensor:
        """Audio clips [A, N] -> embeddings [A, ceil(frames / audio_stack), hidden_size].

        `ctc_embeddings` adds the Thinker's token embeddings, weighted by the posteriors of the CTC head
        (Ma et al. 2025, LegoSLM, arXiv:2505.11352), so the Thinker reads transcripts from the first step
        on. The blank uses the embedding of the padding token. `seeds` [A] and `augmentation` as in
        `AudioEncoder.forward`.
        """
        with torch.set_grad_enabled(_trains(self.audio_encoder)):
            states, lengths = self.audio_encoder(audios, audio_lengths, seeds, augmentation)
        stack = self.config.audio_stack
        padding = (0, 0, 0, -states.shape[1] % stack)
        stacked = F.pad(states, padding).reshape(len(states), -1, stack * states.shape[2])
        features = self.audio_projector(stacked)
        if not self.config.ctc_embeddings:
            return features
        with torch.set_grad_enabled(_trains(self.audio_encoder)):
            posteriors = self.audio_encoder.ctc_logits(states).float().softmax(-1)
            posteriors = posteriors * length_mask(lengths, states.shape[1])[:, :, None]
        posteriors = F.pad(posteriors, padding).unflatten(1, (-1, stack)).sum(2)
        table = self.thinker.embed_tokens.weight
        return features + posteriors.to(table.dtype) @ table

    def embed(self, input_ids: Tensor, slots: MediaSlots) -> Tensor:
        """Embeddings [B, T, hidden_size] with the features of all slots at their positions."""
        images = self.image_features(slots.images)
        audios = self.audio_features(slots.audios, slots.audio_lengths)
        return self.insert_features(input_ids, slots, images, audios)

    def insert_features(
        self, input_ids: Tensor, slots: MediaSlots, images: Tensor, audios: Tensor
    ) -> Tensor:
        """Token embeddings [B, T, D] with `images` [I, P, D] and `audios` [A, L, D] at their positions."""
        text = self.thinker.embed(input_ids)
        rows = F.pad(text.flatten(0, 1), (0, 0, 0, 1))  # the pad index is last
        for features, positions in (
            (images, slots.image_positions),
            (audios, slots.audio_positions),
        ):
            rows = rows.index_copy(0, positions.flatten(), features.flatten(0, 1).to(rows.dtype))
        return rows[:-1].view_as(text)

    def forward(
        self,
        input_ids: Tensor,
        slots: MediaSlots,
        document_ids: Tensor | None = None,
        document_starts: Tensor | None = None,
        longest_document: int | None = None,
    ) -> Tensor:
        """Hidden states [B, T, hidden_size]; document arguments as in `Thinker.forward`."""
        return self.thinker(
            inputs_embeds=self.embed(input_ids, slots),
            document_ids=document_ids,
            document_starts=document_starts,
            longest_document=longest_document,
        )

    def flops(self) -> dict[str, Flops]:
        """FLOPs of joining media to text: per image, and per Thinker position of an audio clip."""
        costs = {
            "images": module_flops(self.image_projector, self.config.num_image_tokens),
            "audio_positions": module_flops(self.audio_projector),
        }
        if self.config.ctc_embeddings:
            costs["ctc_positions"] = weight_flops(self.thinker.embed_tokens.weight)
            if not any(p.requires_grad for p in self.audio_encoder.parameters()):  # input is data
                costs["ctc_positions"] = replace(costs["ctc_positions"], input_grad=0)
        return costs

    # -- answering ---------------------------------------------------------------------------------
    @torch.no_grad()
    def generate(self, input_ids: Tensor, slots: MediaSlots, **options: Any) -> list[GeneratedText]:
        """Generate answers to the prompts `input_ids` [B, T]; `options` are those of `generate_text`."""
        return generate_text(self.thinker, self.embed(input_ids, slots), **options)


def _trains(module: nn.Module) -> bool:
    """Whether a tower needs gradients; a frozen one runs without."""
    return torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters())


def gather_positions(states: Tensor, positions: Tensor) -> Tensor:
    """States [B, T, D] at flat indices [S, L] -> [S, L, D]; zeros at the pad index."""
    rows = F.pad(states.flatten(0, 1), (0, 0, 0, 1))
    return rows[positions]
