"""The Talker: a language model over speech codes with the text to speak as its prefix.

A sequence is [characters of the text] [start of audio] [frames ...]. A character is one byte; its embedding
is the sum of those of the byte, of its token, and of the projected Thinker state at that token. Bytes let
the Talker speak unseen words; tokens and states add context. The state at the start token predicts frame
0, the state at frame t predicts frame t + 1, and after the last frame the stop class. The base code
of a frame is predicted from the state alone, residual code k by a small head that also sees the codes
below k (teacher-forced in training, sequential in generation), after the residual prediction of Wang et
al. 2023 (VALL-E, arXiv:2301.02111).

Positions are in frames, for characters too: character i has position `i * frames_per_character`, about
where it is spoken, so that the rotary distance between a frame and its character stays small (after the
progress-monitoring positions of Peng et al. 2025, VoiceStar, arXiv:2505.19462, with a mean rate instead
of the known length). Only real characters and frames count, so padding has no effect.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from muomni.config.models import TalkerConfig
from muomni.models.layers.attention import Documents, RMSNorm, StackOptions
from muomni.models.layers.counter_random import (
    channel_keys,
    keyed_dropout,
    position_keys,
    uniform_hash,
)
from muomni.models.layers.flops import Flops, module_flops
from muomni.models.layers.kv_cache import KVCache
from muomni.models.layers.losses import IGNORE, cross_entropy_sum
from muomni.models.layers.masks import causal_padding_mask, padded_starts, valid_positions
from muomni.models.layers.sampling import sample
from muomni.models.layers.transformer import SwiGLU, TransformerStack, init_weights

NUM_CHARACTERS = 256
# Frames are numbered from here for dropout; no text is that long.
_FIRST_FRAME = 2**30


class TalkerOutput(NamedTuple):
    """Logits of a teacher-forced pass over Tf frames; V codes per codebook, class V is stop."""

    base: Tensor  # [B, Tf + 1, V + 1]: position t predicts frame t, or stop
    residual: list[Tensor]  # codebooks 1..K-1, each [B, Tf, V]


class TalkerLoss(NamedTuple):
    """Cross entropy summed over `weight` predictions: K codes per frame and a stop per audio clip.

    `logs[name]` is a detached pair [sum, weight].
    """

    total: Tensor
    weight: Tensor
    logs: dict[str, Tensor]


class GeneratedCodes(NamedTuple):
    """`codes` [B, T, K], valid up to `lengths` [B]; `stopped` [B] is True after a stop class."""

    codes: Tensor
    lengths: Tensor
    stopped: Tensor


class _Prefix(NamedTuple):
    """Everything before the first frame; `valid` is False on padding, `positions` are in frames.

    `numbers` count the real elements of a sample: 0 for the start token, then characters.
    """

    embeds: Tensor  # [B, Tp, D]
    valid: Tensor  # [B, Tp]
    positions: Tensor  # [B, Tp]
    numbers: Tensor  # [B, Tp]


class ResidualHead(nn.Module):
    """Logits of a residual codebook from the state plus embeddings of the previous codes."""

    def __init__(self, config: TalkerConfig) -> None:
        super().__init__()
        self.input_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)
        self.output_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = nn.Linear(config.hidden_size, config.codebook_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] -> [..., codebook_size]."""
        return self.head(self.output_norm(x + self.mlp(self.input_norm(x))))


class Talker(nn.Module):
    """Text ids and codes in, logits of the next codes out."""

    def __init__(self, config: TalkerConfig) -> None:
        super().__init__()
        self.config = config
        size, num_codes = config.hidden_size, config.codebook_size
        self.embed_text = nn.Embedding(config.text_vocab_size, size)
        self.embed_characters = nn.Embedding(NUM_CHARACTERS, size)
        # One table for all codebooks: code c of codebook k has index k * num_codes + c.
        self.embed_codes = nn.Embedding(config.num_codebooks * num_codes, size)
        self.embed_start = nn.Embedding(1, size)
        if config.thinker_hidden_size is not None:
            self.thinker_proj = nn.Linear(config.thinker_hidden_size, size, bias=False)
        options = StackOptions(
            rope_theta=config.rope_theta, norm_eps=config.norm_eps, dropout=config.dropout
        )
        self.stack = TransformerStack(config, options)
        self.base_head = nn.Linear(size, num_codes + 1, bias=False)
        self.residual_heads = nn.ModuleList(
            ResidualHead(config) for _ in range(config.num_codebooks - 1)
        )
        init_weights(self, config.num_layers)

    @property
    def stop(self) -> int:
        """The class of the base codebook that ends speech."""
        return self.config.codebook_size

    def forward(
        self,
        text_ids: Tensor,
        character_ids: Tensor,
        text_mask: Tensor,
        codes: Tensor,
        code_mask: Tensor,
        thinker_hidden: Tensor | None = None,
        seeds: Tensor | None = None,
    ) -> TalkerOutput:
        """Teacher-forced logits of all frames.

        `character_ids` [B, Tl] are bytes, `text_ids` [B, Tl] the token of each, `text_mask` [B, Tl] is
        False on padding; `codes` [B, Tf, K] and `code_mask` [B, Tf] are padded at the end;
        `thinker_hidden` is [B, Tl, thinker_hidden_size]. Padding may hold any valid id. Dropout in training
        depends on a seed per sample, `seeds` int64 [B]. Raises ValueError if they are missing, or for
        `thinker_hidden` without a configured size.
        """
        prefix = self._prefix(text_ids, character_ids, text_mask, thinker_hidden)
        if self.stack.attends_by_documents:
            prefix = _with_padding_first(prefix)
        code_embeds = self._code_embeddings(codes)
        frames = self._drop_frames(code_embeds.sum(dim=2), seeds)
        keys = self._dropout_keys(seeds, prefix, frames)
        x = self._drop(torch.cat([prefix.embeds, frames], dim=1), keys, 0)
        valid = torch.cat([prefix.valid, code_mask.to(torch.bool)], dim=1)
        at_frames = torch.arange(1, codes.shape[1] + 1, device=codes.device).expand(len(codes), -1)
        positions = torch.cat([prefix.positions, at_frames.float()], dim=1)
        if self.stack.attends_by_documents:
            documents = Documents(padded_starts(valid), valid.shape[1])
            states = self.stack(x, positions=positions, documents=documents, dropout_keys=keys)
        else:
            mask = causal_padding_mask(valid)
            states = self.stack(x, positions=positions, mask=mask, dropout_keys=keys)
        prefix_length = prefix.embeds.shape[1]
        states = states[:, prefix_length - 1 :]
        frame_keys = None if keys is None else keys[:, prefix_length:]
        residual, known = [], states[:, :-1]
        for k, head in enumerate(self.residual_heads):
            known = known + code_embeds[:, :, k]
            residual.append(head(self._drop(known, frame_keys, k + 1)))
        return TalkerOutput(self.base_head(states), residual)

    def loss(self, output: TalkerOutput, codes: Tensor, code_mask: Tensor) -> TalkerLoss:
        """Sum of the cross entropies of all codes and stops; sequences without frames do not count.

        `codes` [B, Tf, K] and `code_mask` [B, Tf] are those of `forward`, unshifted.
        """
        mask = code_mask.to(torch.bool)
        targets = codes.masked_fill(~mask[..., None], IGNORE)
        base = cross_entropy_sum(output.base, self._base_targets(targets[..., 0], mask))
        total, weight = base.total, base.weight
        logs = {"base_loss": torch.stack([base.total, base.weight])}
        guesses, lengths = output.base.detach().argmax(dim=-1), mask.sum(dim=1)
        is_hit = (guesses[:, :-1] == targets[..., 0]).sum()
        logs["accuracy_0"] = torch.stack([is_hit.float(), mask.sum().float()])
        # Fraction of audio clips whose end is predicted at the right frame.
        is_stop = (guesses.gather(1, lengths[:, None])[:, 0] == self.stop) & (lengths > 0)
        logs["stop_accuracy"] = torch.stack([is_stop.sum().float(), (lengths > 0).sum().float()])
        for k, logits in enumerate(output.residual, start=1):
            part = cross_entropy_sum(logits, targets[..., k])
            total, weight = total + part.total, weight + part.weight
            logs[f"accuracy_{k}"] = torch.stack([part.num_correct, part.weight])
        return TalkerLoss(total, weight, {name: pair.detach() for name, pair in logs.items()})

    def _base_targets(self, base_codes: Tensor, mask: Tensor) -> Tensor:
        """Base codes [B, Tf] followed by a stop after the last frame: [B, Tf + 1]."""
        lengths = mask.sum(dim=1)
        targets = nn.functional.pad(base_codes, (0, 1), value=IGNORE)
        stops = torch.where(lengths > 0, self.stop, IGNORE)
        return targets.scatter(1, lengths[:, None], stops[:, None])

    @torch.no_grad()
    def generate(
        self,
        text_ids: Tensor,
        character_ids: Tensor,
        text_mask: Tensor | None = None,
        *,
        max_frames: int,
        temperature: float = 1.0,
        top_k: int = 0,
        generator: torch.Generator | None = None,
        thinker_hidden: Tensor | None = None,
    ) -> GeneratedCodes:
        """Generate codes for `character_ids` [B, Tl] until the stop class, at most `max_frames` frames.

        `temperature=0` is greedy; other arguments as in `forward` and `sampling.sample`.
        """
        if text_mask is None:
            text_mask = torch.ones_like(text_ids, dtype=torch.bool)
        prefix = self._prefix(text_ids, character_ids, text_mask, thinker_hidden)
        batch_size, length, _ = prefix.embeds.shape
        device = text_ids.device
        cache = self.new_cache(batch_size, length + max_frames)
        state = self.stack(
            prefix.embeds, positions=prefix.positions, cache=cache, valid=prefix.valid
        )[:, -1:]
        stopped = torch.zeros(batch_size, dtype=torch.bool, device=device)
        lengths = torch.zeros(batch_size, dtype=torch.long, device=device)
        frames: list[Tensor] = []
        for step in range(max_frames + 1):
            base = sample(self.base_head(state), temperature, top_k, generator=generator)
            stopped = stopped | (base[:, 0] == self.stop)
            # The last iteration only tells a stopped sequence from a truncated one.
            if step == max_frames or bool(stopped.all()):
                break
            lengths = lengths + (~stopped).long()
            # Stopped sequences continue with code 0 until all have stopped; `lengths` excludes it.
            base = base.masked_fill(stopped[:, None], 0)
            frame, embedding = self._complete_frame(state, base, temperature, top_k, generator)
            frames.append(frame)
            position = torch.full((batch_size, 1), step + 1.0, device=device)
            state = self.stack(embedding, positions=position, cache=cache)
        shape = (batch_size, 0, self.config.num_codebooks)
        codes = torch.cat(frames, dim=1) if frames else text_ids.new_zeros(shape)
        return GeneratedCodes(codes, lengths, stopped)

    def new_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty KV cache for `max_length` positions (prefix and frames)."""
        return self.stack.new_cache(batch_size, max_length)

    def flops(self) -> dict[str, Flops]:
        """FLOPs per unit of `talker_units`."""
        position, pair = self.stack.flops()
        base, character = module_flops(self.base_head), position
        if self.config.thinker_hidden_size is not None:
            character += module_flops(self.thinker_proj)
        return {
            "sequences": position + base,
            "characters": character,
            "frames": position + base + module_flops(self.residual_heads),
            "pairs": pair,
        }

    def _complete_frame(
        self,
        state: Tensor,
        base: Tensor,
        temperature: float,
        top_k: int,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor]:
        """Complete a frame with residual codes: codes [B, 1, K], summed embedding [B, 1, D]."""
        codes = [base]
        embedding = self._embed_codebook(base, 0)
        for k, head in enumerate(self.residual_heads, start=1):
            code = sample(head(state + embedding), temperature, top_k, generator=generator)
            codes.append(code)
            embedding = embedding + self._embed_codebook(code, k)
        return torch.stack(codes, dim=-1), embedding

    def _dropout_keys(self, seeds: Tensor | None, prefix: _Prefix, frames: Tensor) -> Tensor | None:
        """Position keys [B, Tp + Tf] of dropout, or None without it."""
        if not self.training or not self.config.dropout:
            return None
        numbers = torch.arange(frames.shape[1], device=frames.device) + _FIRST_FRAME
        numbers = torch.cat([prefix.numbers, numbers.expand(len(frames), -1)], dim=1)
        return position_keys(_required(seeds), numbers)

    def _drop(self, x: Tensor, keys: Tensor | None, use: int) -> Tensor:
        """Apply dropout outside of the stack."""
        if keys is None:
            return x
        (channels,) = channel_keys(self.stack.num_dropouts + use, 1, x.shape[2], x.device)
        return keyed_dropout(x, keys, channels, self.config.dropout)

    def _drop_frames(self, frames: Tensor, seeds: Tensor | None) -> Tensor:
        """In training, drop random frames [B, Tf, D] from the input.

        The last frame mostly predicts the next one; without it, the model must attend to characters,
        which makes generation robust to its own errors.
        """
        rate = self.config.frame_dropout
        if not self.training or not rate:
            return frames
        numbers = torch.arange(frames.shape[1], device=frames.device)
        is_kept = uniform_hash(_required(seeds)[:, None], numbers) >= rate
        return frames * is_kept[:, :, None]

    def _embed_codebook(self, codes: Tensor, k: int) -> Tensor:
        return self.embed_codes(codes + k * self.config.codebook_size)

    def _code_embeddings(self, codes: Tensor) -> Tensor:
        """Codes [B, Tf, K] -> embeddings [B, Tf, K, D]."""
        offsets = torch.arange(self.config.num_codebooks, device=codes.device)
        return self.embed_codes(codes + offsets * self.config.codebook_size)

    def _prefix(
        self,
        text_ids: Tensor,
        character_ids: Tensor,
        text_mask: Tensor,
        thinker_hidden: Tensor | None,
    ) -> _Prefix:
        text = self.embed_text(text_ids) + self.embed_characters(character_ids)
        if thinker_hidden is not None:
            if self.config.thinker_hidden_size is None:
                raise ValueError("this Talker has no thinker_hidden_size; pass no thinker_hidden")
            text = text + self.thinker_proj(_unit_states(thinker_hidden).to(text.dtype))
        start = self.embed_start(text_ids.new_zeros(len(text_ids), 1))
        text_mask = text_mask.to(torch.bool)
        numbers = valid_positions(text_mask)
        at_characters = numbers * self.config.frames_per_character
        return _Prefix(
            torch.cat([text, start], dim=1),
            nn.functional.pad(text_mask, (0, 1), value=True),
            nn.functional.pad(at_characters, (0, 1)),  # the start token, before frame 0
            nn.functional.pad(numbers + 1, (0, 1)),
        )


def talker_units(num_characters: Tensor, num_frames: Tensor) -> dict[str, int]:
    """Units of `Talker.flops` in sequences of these lengths [B] (on the CPU)."""
    lengths = num_characters + 1 + num_frames
    return {
        "sequences": len(lengths),
        "characters": int(num_characters.sum()),
        "frames": int(num_frames.sum()),
        "pairs": int(lengths.square().sum()),
    }


def _with_padding_first(prefix: _Prefix) -> _Prefix:
    """Move padding before the characters, so that frames follow without a gap."""
    order = prefix.valid.to(torch.int8).argsort(dim=1, stable=True)
    return _Prefix(
        prefix.embeds.take_along_dim(order[..., None], dim=1),
        prefix.valid.take_along_dim(order, dim=1),
        prefix.positions.take_along_dim(order, dim=1),
        prefix.numbers.take_along_dim(order, dim=1),
    )


def _required(seeds: Tensor | None) -> Tensor:
    if seeds is None:
        raise ValueError("dropout in training needs a seed per sample")
    return seeds


def _unit_states(states: Tensor) -> Tensor:
    """Normalize states [..., D] to length 1, that of a text embedding at initialization; fp32.

    The Thinker's final norm leaves them at about sqrt(D), so the first updates of a projection would
    drown out the text.
    """
    return nn.functional.normalize(states.float(), dim=-1)


def num_predictions(code_mask: Tensor, num_codebooks: int) -> Tensor:
    """The weight of `Talker.loss`: K predictions per frame and a stop per non-empty sequence."""
    lengths = code_mask.to(torch.bool).sum(dim=1)
    return (lengths * num_codebooks + (lengths > 0)).sum().float()
