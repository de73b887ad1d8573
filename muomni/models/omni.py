"""The omni model: a Thinker that reads projected images and audio clips among its text tokens.

Patch tokens of the vision tower and stacked states of the audio encoder pass through an MLP each and
are written over the placeholder positions that the data put into the row (Liu et al. 2023, LLaVA,
arXiv:2304.08485, for the projector). A batch always has a slot of each kind; one that points past
the end of the rows is written nowhere and has zero gradient, yet keeps its modules in the graph. The
Talker speaks the answers, from their text and the Thinker's states at it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muomni.config.models import OmniConfig
from muomni.models.language.thinker import Thinker
from muomni.models.layers.flops import ForwardFlops, linear_flops
from muomni.models.layers.layers import INIT_STD, RMSNorm
from muomni.models.layers.sampling import LoopDetector, sample
from muomni.models.speech.audio_encoder import AudioEncoder
from muomni.models.speech.codec import Codec
from muomni.models.speech.mel import length_mask
from muomni.models.speech.specaugment import SpecAugmentConfig
from muomni.models.speech.talker import Talker
from muomni.models.vision.vision_encoder import VisionEncoder

# Mean square of gelu(x) for x from N(0, 1).
GELU_POWER = 0.425


@dataclass(slots=True)
class MediaSlots:
    """Images and audio clips of a row block [B, T]; places index its B * T positions.

    The place B * T means nowhere: that is where padding and empty slots point.
    """

    images: Tensor  # [I, 3, side, side] uint8, I >= 1
    image_positions: Tensor  # [I, P]
    audios: Tensor  # [A, N] at 16 kHz, A >= 1
    audio_lengths: Tensor  # [A] in samples
    audio_positions: Tensor  # [A, L], L >= the longest audio clip's positions

    @classmethod
    def of_batch(cls, batch: dict[str, Tensor]) -> "MediaSlots":
        """The slots of a batch, whose keys are the names of the fields."""
        return cls(*(batch[name] for name in cls.__dataclass_fields__))


@dataclass(slots=True)
class GeneratedText:
    """Token ids of an answer without its end, and the Thinker's states at them."""

    ids: list[int]
    hidden: Tensor  # [1, len(ids), hidden_size]
    stopped: bool  # False: cut, at the limit or since it repeated itself


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
        """Draw the output layer anew, so that features start with this standard deviation.

        That of the Thinker's token embeddings: smaller features drown in it, larger ones drown it.
        Zero where they are added to embeddings that should be read as they are at first.
        """
        layer = self.down_proj
        nn.init.normal_(layer.weight, std=std * (GELU_POWER * layer.in_features) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """[..., input_size] -> [..., output_size]."""
        x = self.norm(x.to(self.up_proj.weight.dtype))
        return self.down_proj(F.gelu(self.up_proj(x)))


class OmniModel(nn.Module):
    """Token ids with media slots in, Thinker states out; speaks through Talker and codec.

    `with_codec` adds the codec, which inference needs and training keeps elsewhere (it is frozen, and
    its codebooks must stay fp32).
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
        """Training mode, but for frozen towers: their dropout would only add noise."""
        super().train(mode)
        for tower in (self.vision_encoder, self.audio_encoder):
            if not any(parameter.requires_grad for parameter in tower.parameters()):
                tower.eval()
        return self

    # -- reading -----------------------------------------------------------------------------------
    def image_features(self, images: Tensor) -> Tensor:
        """Images [I, 3, side, side] -> embeddings [I, P, hidden_size], one a patch."""
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

        With `ctc_embeddings` each holds what its frames spell, too: the embeddings of the Thinker's
        tokens, weighted by the posteriors of the encoder's CTC head (Ma et al. 2025, LegoSLM,
        arXiv:2505.11352). So the Thinker can read before it has learned to listen. The blank takes the
        embedding of the padding token, which no text holds: silence is something, too. `seeds` [A] and
        `augmentation` as in `AudioEncoder.forward`.
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
        spelled = F.pad(posteriors, padding).unflatten(1, (-1, stack)).sum(2)
        table = self.thinker.embed_tokens.weight
        return features + spelled.to(table.dtype) @ table

    def embed(self, input_ids: Tensor, slots: MediaSlots) -> Tensor:
        """Embeddings [B, T, hidden_size] with the features of all slots at their places."""
        images = self.image_features(slots.images)
        audios = self.audio_features(slots.audios, slots.audio_lengths)
        return self.place(input_ids, slots, images, audios)

    def place(self, input_ids: Tensor, slots: MediaSlots, images: Tensor, audios: Tensor) -> Tensor:
        """Token embeddings of [B, T] with `images` [I, P, D] and `audios` [A, L, D] written over."""
        text = self.thinker.embed(input_ids)
        rows = F.pad(text.flatten(0, 1), (0, 0, 0, 1))  # the last one is nowhere
        for features, places in ((images, slots.image_positions), (audios, slots.audio_positions)):
            rows = rows.index_copy(0, places.flatten(), features.flatten(0, 1).to(rows.dtype))
        return rows[:-1].view_as(text)

    def forward(
        self,
        input_ids: Tensor,
        slots: MediaSlots,
        document_ids: Tensor | None = None,
        document_starts: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [B, T, hidden_size]; what tells of documents is that of `Thinker.forward`."""
        return self.thinker(
            inputs_embeds=self.embed(input_ids, slots),
            document_ids=document_ids,
            document_starts=document_starts,
        )

    # -- answering ---------------------------------------------------------------------------------
    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        slots: MediaSlots,
        *,
        eos_id: int,
        max_new_tokens: int | Sequence[int],
        valid: Tensor | None = None,
        min_new_tokens: int = 0,
        cut_loops: bool = False,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> list[GeneratedText]:
        """Answer the prompts `input_ids` [B, T]: each until `eos_id`, at most `max_new_tokens`.

        Prompts end at the last position; `valid` [B, T] is False on the padding before shorter ones.
        `eos_id` cannot be chosen among the first `min_new_tokens`. With `cut_loops`, an answer that has
        said the same over and over ends behind the first time. `temperature=0` takes the likeliest
        token. Raises ValueError unless there is one limit, or one a prompt.
        """
        num_rows, length = input_ids.shape
        limits = [max_new_tokens] if isinstance(max_new_tokens, int) else list(max_new_tokens)
        if len(limits) not in (1, num_rows):
            raise ValueError(f"{num_rows} prompts need one limit or {num_rows}, not {len(limits)}")
        most = torch.tensor(limits, device=input_ids.device).expand(num_rows)
        cache = self.thinker.new_cache(num_rows, length + max(limits))
        embeds = self.embed(input_ids, slots)
        state = self.thinker(inputs_embeds=embeds, cache=cache, valid=valid)[:, -1:]
        stopped = torch.zeros(num_rows, dtype=torch.bool, device=input_ids.device)
        lengths = torch.zeros_like(most)
        detector = LoopDetector(num_rows, input_ids.device) if cut_loops else None
        # The empty first parts let a batch that says nothing be joined, too.
        tokens, states = [input_ids[:, :0]], [state[:, :0]]
        for num_made in range(max(limits)):
            logits = self.thinker.logits(state)
            if num_made < min_new_tokens:
                logits[..., eos_id] = float("-inf")
            token = sample(logits, temperature, generator=generator)
            is_open = ~stopped & (num_made < most)
            stopped = stopped | is_open & (token[:, 0] == eos_id)
            is_open = is_open & ~stopped
            if not bool(is_open.any()):
                break
            lengths = lengths + is_open.long()
            if detector is not None:
                repeated = detector.num_repeated(token)
                is_cut = is_open & (repeated > 0) & (lengths >= min_new_tokens)
                kept = (lengths - repeated).clamp_min(min_new_tokens)
                lengths = torch.where(is_cut, kept, lengths)
                most = most.masked_fill(is_cut, 0)
            # Rows that have ended go on with what they choose until all have; `lengths` cuts that off.
            tokens.append(token)
            state = self.thinker(token, cache=cache)
            states.append(state)
        ids, hidden = torch.cat(tokens, 1), torch.cat(states, 1)
        return [
            GeneratedText(ids[row, :end].tolist(), hidden[row : row + 1, :end], is_stopped)
            for row, (end, is_stopped) in enumerate(
                zip(lengths.tolist(), stopped.tolist(), strict=True)
            )
        ]


def _trains(module: nn.Module) -> bool:
    """Whether gradients are wanted of a tower; a frozen one runs without them."""
    return torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters())


def gather_positions(states: Tensor, places: Tensor) -> Tensor:
    """States [B, T, D] at flat places [S, L] -> [S, L, D]; zeros at the place nowhere."""
    rows = F.pad(states.flatten(0, 1), (0, 0, 0, 1))
    return rows[places]


def image_projector_flops(config: OmniConfig) -> ForwardFlops:
    """Forward FLOPs of the projection of one image (see `flops.py` for the conventions)."""
    sizes = config.vision_encoder.hidden_size + config.thinker.hidden_size
    return ForwardFlops(config.num_image_tokens * linear_flops(sizes, config.projector_hidden_size))


def audio_projector_flops(config: OmniConfig, num_frames: int) -> ForwardFlops:
    """Forward FLOPs of the projection of one audio clip of `num_frames` encoder frames."""
    num_positions = -(-num_frames // config.audio_stack)
    sizes = config.audio_encoder.hidden_size * config.audio_stack + config.thinker.hidden_size
    return ForwardFlops(num_positions * linear_flops(sizes, config.projector_hidden_size))


def spelling_flops(config: OmniConfig, num_frames: int) -> ForwardFlops:
    """Forward FLOPs of the embeddings of what an audio clip of `num_frames` frames spells."""
    if not config.ctc_embeddings:
        return ForwardFlops()
    num_positions = -(-num_frames // config.audio_stack)
    sizes = (config.thinker.vocab_size, config.thinker.hidden_size)
    return ForwardFlops(num_positions * linear_flops(*sizes))
