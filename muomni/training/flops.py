"""FLOPs of the batches that really ran: what the model needs, and what the device computes.

`model` counts each real sample alone, once forward and backward; `hardware` counts what the shapes of
the batch make of it: padding, empty slots, recomputed activations. Both from the batch as it lies on
the host, by the formulas beside the models, so no device is waited for. Not counted: optimizer,
norms, softmax, FFT, and whatever else is no matrix product or convolution.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, partial

import numpy as np
import torch
from torch import nn

from muomni.config.models import (
    FRAME_SUBSAMPLING,
    MEL_HOP,
    AudioEncoderConfig,
    ClipConfig,
    CodecConfig,
    TalkerConfig,
    ThinkerConfig,
)
from muomni.data.sampling.packing import document_starts
from muomni.data.views.base import Batch
from muomni.models.layers.flops import ForwardFlops, stack_flops, talker_flops, thinker_flops
from muomni.models.layers.masks import window_size
from muomni.models.speech.audio_encoder import audio_encoder_flops
from muomni.models.speech.codec import codec_flops
from muomni.models.vision.clip import clip_image_flops, clip_text_flops
from muomni.training.engine.deepspeed_quirks import full_shape


@dataclass(frozen=True, slots=True)
class StepFlops:
    """FLOPs of one micro-batch on one rank, or of several."""

    model: int = 0
    hardware: int = 0

    def __add__(self, other: "StepFlops") -> "StepFlops":
        return StepFlops(self.model + other.model, self.hardware + other.hardware)


FlopCounter = Callable[[Batch], StepFlops]


@dataclass(frozen=True, slots=True)
class Training:
    """How a part of a model is trained (see `ForwardFlops.training`)."""

    share: float = 1.0
    has_trained_input: bool = False

    def model(self, forward: ForwardFlops) -> int:
        return forward.training(self.share, self.has_trained_input)

    def hardware(self, forward: ForwardFlops, recomputed: Fraction) -> int:
        return forward.training(self.share, self.has_trained_input, recomputed)


WHOLLY_TRAINED = Training()
KEPT = Fraction(0)  # no activation is recomputed


def trained_share(module: nn.Module) -> float:
    """Share of the weights in matrix products and convolutions that is trained."""
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    total = trained = 0
    for parameter in module.parameters():
        shape = full_shape(parameter)
        if len(shape) >= 2 and id(parameter) not in embeddings:
            total += shape.numel()
            trained += shape.numel() * parameter.requires_grad
    return trained / total if total else 0.0


class PackedRows:
    """A Thinker over packed rows: linear in positions, in query-key pairs, and in predictions.

    A document's positions need its own keys alone. `on_cpu`: the head runs where there is a label
    only, not everywhere, and short documents attend in windows, not to whole rows. `by_documents`: nobody
    attends beyond a document (`TransformerStack.attends_by_documents`). `recomputed` is a share (see
    `recomputed_share`).
    """

    def __init__(
        self,
        config: ThinkerConfig,
        recomputed: Fraction,
        on_cpu: bool,
        stack: Training = WHOLLY_TRAINED,
        head: Training = WHOLLY_TRAINED,
        by_documents: bool = False,
    ) -> None:
        position = stack_flops(config, 1, num_keys=0, moe=config.moe)
        one_pair = stack_flops(config, 1, num_keys=1, moe=config.moe)
        at_head = thinker_flops(config, 0, num_predicted=1)
        self._model = stack.model(position), stack.model(one_pair) - stack.model(position)
        again, with_pair = (stack.hardware(flops, recomputed) for flops in (position, one_pair))
        self._hardware = again, with_pair - again
        self._head = head.model(at_head)
        self._on_cpu = on_cpu
        self._by_documents = by_documents

    def __call__(self, document_ids: torch.Tensor, num_labels: int) -> StepFlops:
        """FLOPs of rows [R, T] of documents (0: padding), `num_labels` of whose places predict."""
        num_rows, length = document_ids.shape
        num_places = num_rows * length
        num_real, num_pairs = _documents(document_ids)
        position, pair = self._model
        model = num_real * position + num_pairs * pair + num_labels * self._head
        position, pair = self._hardware
        num_predicted = num_labels if self._on_cpu else num_places
        num_computed = num_places * length  # query-key pairs
        if self._by_documents:
            starts = document_starts(document_ids.numpy()).astype(np.int64)
            num_computed = int(np.square(np.diff(starts)).sum())
        elif self._on_cpu and (window := window_size(document_ids)) is not None:
            num_computed = num_places * 2 * window
        hardware = num_places * position + num_computed * pair + num_predicted * self._head
        return StepFlops(model, hardware)


def _documents(document_ids: torch.Tensor) -> tuple[int, int]:
    """Real positions of rows [R, T], and the sum over documents of their length squared."""
    ids = document_ids.numpy()
    width = int(ids.max()) + 1
    rows = np.arange(len(ids))[:, None]
    lengths = np.bincount((ids + width * rows).ravel(), minlength=width * len(ids))
    lengths = lengths.reshape(len(ids), width)[:, 1:]
    return int(lengths.sum()), int(np.square(lengths).sum())


def count_thinker(
    config: ThinkerConfig, recomputed: Fraction, on_cpu: bool, by_documents: bool
) -> FlopCounter:
    """Counts batches of `TextView`."""
    rows = PackedRows(config, recomputed, on_cpu, by_documents=by_documents)
    return lambda batch: rows(batch["document_ids"], int(batch["units"]))


class AudioClips:
    """An audio encoder over padded audio clips; `by_documents`: none attends to its padding."""

    def __init__(
        self,
        config: AudioEncoderConfig,
        recomputed: Fraction,
        training: Training = WHOLLY_TRAINED,
        with_head: bool = True,
        by_documents: bool = False,
    ) -> None:
        @cache
        def one(num_mel: int, recomputed: Fraction) -> int:
            forward = audio_encoder_flops(config, num_mel * MEL_HOP, with_head)
            return training.hardware(forward, recomputed)

        self._one, self._recomputed = one, recomputed
        none, one_pair = (
            training.hardware(
                stack_flops(config, 1, num_keys=n, dropout=config.dropout), recomputed
            )
            for n in (0, 1)
        )
        self._skipped_pair = (one_pair - none) * by_documents

    def __call__(self, waveform: torch.Tensor, lengths: torch.Tensor) -> StepFlops:
        """FLOPs of audio clips [B, N] of which `lengths` [B] samples are real."""
        num_rows, width = waveform.shape
        lengths_in_mel = mel_lengths(lengths)
        model = sum(self._one(num_mel, KEPT) for num_mel in lengths_in_mel)
        hardware = num_rows * self._one(_num_mel(width), self._recomputed)
        num_places, reals = _num_frames(_num_mel(width)), map(_num_frames, lengths_in_mel)
        skipped = sum(_pairs_across(real, num_places - real) for real in reals)
        return StepFlops(model, hardware - skipped * self._skipped_pair)


def _pairs_across(*documents: int) -> int:
    """Query-key pairs of one row that are in two of its documents, given the lengths of all."""
    return sum(documents) ** 2 - sum(length**2 for length in documents)


def count_audio_encoder(
    config: AudioEncoderConfig, recomputed: Fraction, by_documents: bool
) -> FlopCounter:
    """Counts batches of `SpeechView`, with the CTC head."""
    audio_clips = AudioClips(config, recomputed, by_documents=by_documents)
    return lambda batch: audio_clips(batch["waveform"], batch["lengths"])


def count_clip(
    config: ClipConfig, recomputed: tuple[Fraction, Fraction], group: int, num_ranks: int
) -> FlopCounter:
    """Counts batches of `ImageTextView`, `group` of which make a step of `num_ranks` ranks.

    `recomputed` are the shares of the vision and of the text tower.
    With several a rank, the features of all are computed once more beforehand, without gradient.
    A pair is compared with all others of the step; its similarities are needed once, and computed twice,
    with a gradient each, for the loss, and for InfoNCE twice more for the log-sum-exps.
    """
    image = clip_image_flops(config)
    similarity = 2 * config.embedding_size
    num_products = 6 if config.initial_bias is None else 4
    has_first_pass = group > num_ranks

    @cache
    def text(num_tokens: int) -> int:
        return clip_text_flops(config, num_tokens).training()

    @cache
    def padded(num_tokens: int) -> int:
        towers = (image, clip_text_flops(config, num_tokens))
        trained = sum(
            tower.training(recomputed=share)
            for tower, share in zip(towers, recomputed, strict=True)
        )
        return trained + has_first_pass * sum(tower.total for tower in towers)

    def count(batch: Batch) -> StepFlops:
        num_pairs, width = batch["token_ids"].shape
        num_real = int(batch["units"])
        similarities = similarity * num_pairs * group
        model = num_real * (image.training() + 3 * similarities)
        model += sum(map(text, batch["token_lengths"].tolist()[:num_real]))
        return StepFlops(model, num_pairs * (padded(width) + num_products * similarities))

    return count


def count_codec(config: CodecConfig, recomputed: Fraction) -> FlopCounter:
    """Counts batches of `WaveformView`."""

    @cache
    def one(num_mel: int, recomputed: Fraction) -> int:
        return codec_flops(config, num_mel).training(recomputed=recomputed)

    def count(batch: Batch) -> StepFlops:
        num_rows, width = batch["waveform"].shape
        model = sum(one(num_mel, KEPT) for num_mel in mel_lengths(batch["lengths"]))
        return StepFlops(model, num_rows * one(_num_mel(width), recomputed))

    return count


class Speech:
    """A Talker over texts and the codes of their audio clips, which a frozen codec makes first.

    `by_documents`: nothing attends to padding.
    """

    def __init__(
        self,
        talker: TalkerConfig,
        codec: CodecConfig,
        recomputed: Fraction,
        training: Training = WHOLLY_TRAINED,
        by_documents: bool = False,
    ) -> None:
        def speaking(num_characters: int, num_frames: int, recomputed: Fraction = KEPT) -> int:
            return training.hardware(talker_flops(talker, num_characters, num_frames), recomputed)

        self._padded = partial(speaking, recomputed=recomputed)

        # Characters and frames enter in first power, and the length of the row in second: three lengths
        # tell the coefficients, and a row then costs a few products.
        def pair(recomputed: Fraction) -> int:
            none, one, two = (
                speaking(num_characters, 0, recomputed) for num_characters in range(3)
            )
            return (two - 2 * one + none) // 2

        none, one = (speaking(num_characters, 0) for num_characters in range(2))
        self._square = pair(KEPT)
        self._character = one - none - self._square
        self._frame = speaking(0, 1) - none - self._square
        self._start = none
        self._skipped_pair = pair(recomputed) * by_documents
        self._num_starts = 1 + (talker.num_speakers > 0)
        self._listening = cache(
            lambda num_mel: codec_flops(codec, num_mel, with_decoder=False).total
        )

    def __call__(
        self, text_mask: torch.Tensor, waveform: torch.Tensor, lengths: torch.Tensor
    ) -> StepFlops:
        """FLOPs of texts [S, Tl] and audio clips [S, N]; a slot without an audio clip is padding."""
        num_slots, width = waveform.shape
        num_mel = _num_mel(width)
        most_characters, most_frames = text_mask.shape[1], _num_frames(num_mel)
        hardware = num_slots * (
            self._padded(most_characters, most_frames) + self._listening(num_mel)
        )
        model = 0
        for num_characters, num_mel in zip(
            text_mask.sum(1).tolist(), mel_lengths(lengths), strict=True
        ):
            num_frames = _num_frames(num_mel)
            real = num_characters + self._num_starts + num_frames
            paddings = most_characters - num_characters, most_frames - num_frames
            hardware -= _pairs_across(real, *paddings) * self._skipped_pair
            if num_mel:
                model += self._start + num_characters * self._character + num_frames * self._frame
                model += (num_characters + num_frames) ** 2 * self._square + self._listening(
                    num_mel
                )
        return StepFlops(model, hardware)


def count_talker(
    config: TalkerConfig, codec: CodecConfig, recomputed: Fraction, by_documents: bool
) -> FlopCounter:
    """Counts batches of `TtsView`."""
    speech = Speech(config, codec, recomputed, by_documents=by_documents)
    return lambda batch: speech(batch["text_mask"], batch["waveform"], batch["lengths"])


def mel_lengths(num_samples: torch.Tensor) -> list[int]:
    """Mel frames of audio clips, given their numbers of samples [B] on the host."""
    return [_num_mel(length) for length in num_samples.tolist()]


def _num_mel(num_samples: int) -> int:
    return -(-num_samples // MEL_HOP)


def _num_frames(num_mel: int) -> int:
    return -(-num_mel // FRAME_SUBSAMPLING)
