"""FLOPs of the batches that a run trains on: those the model needs and those the device computes.

`model` counts every real sample alone, `hardware` the shapes of the batch: padding, empty slots, and
recomputed activations. Both multiply units of work, read from the batch on the host, by the costs of
the models (`flops.py` of `muomni/models/layers`), so nothing waits for the device. Optimizer, norms,
softmax, and FFT are not counted.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from muomni.config.models import MEL_HOP
from muomni.data.sampling.packing import document_starts
from muomni.data.views.base import Batch
from muomni.models.language.thinker import Thinker
from muomni.models.layers.flops import Flops
from muomni.models.layers.masks import window_size
from muomni.models.speech.audio_encoder import AudioEncoder, audio_units, num_encoder_frames
from muomni.models.speech.codec import Codec
from muomni.models.speech.talker import Talker, talker_units
from muomni.models.vision.clip import Clip

Units = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class StepFlops:
    """FLOPs of one or several micro-batches on one rank."""

    model: int = 0
    hardware: int = 0

    def __add__(self, other: "StepFlops") -> "StepFlops":
        return StepFlops(self.model + other.model, self.hardware + other.hardware)


FlopCounter = Callable[[Batch], StepFlops]


def is_trained(module: nn.Module) -> bool:
    """Whether any parameter of the module is trained."""
    return any(parameter.requires_grad for parameter in module.parameters())


class PartFlops:
    """Costs of a part of a model per unit of work, trained if it or its input `has_gradient`."""

    def __init__(self, costs: Mapping[str, Flops], has_gradient: bool = True) -> None:
        self._costs = [
            (unit, flops.model(has_gradient), flops.hardware(has_gradient))
            for unit, flops in costs.items()
        ]

    def __call__(self, real: Units, computed: Units) -> StepFlops:
        """FLOPs of the units of the real samples, and of those that the device computes."""
        return StepFlops(
            sum(model * real[unit] for unit, model, _ in self._costs),
            sum(hardware * computed[unit] for unit, _, hardware in self._costs),
        )


def text_work(batch: Batch, on_cpu: bool, by_documents: bool) -> tuple[Units, Units]:
    """Units of `Thinker.flops` in packed sequences [B, T], real and computed.

    A document attends to itself alone. The device computes attention by documents (`by_documents`), over
    windows (`on_cpu`, for short documents), or over the full sequence, and the head at all positions,
    `on_cpu` at labels only.
    """
    document_ids, num_labels = batch["document_ids"], int(batch["units"])
    num_positions, length = document_ids.numel(), document_ids.shape[1]
    # Documents as runs of equal ids, padding included.
    starts = document_starts(document_ids.numpy()).astype(np.int64)
    lengths = np.diff(starts)
    is_real = document_ids.numpy().ravel()[starts[:-1].clip(max=num_positions - 1)] > 0
    real = {
        "positions": int(lengths[is_real].sum()),
        "pairs": int(np.square(lengths[is_real]).sum()),
        "predictions": num_labels,
    }
    pairs = num_positions * length
    if by_documents:
        pairs = int(np.square(lengths).sum())
    elif on_cpu and (window := window_size(document_ids)) is not None:
        pairs = num_positions * 2 * window
    predictions = num_labels if on_cpu else num_positions
    return real, {"positions": num_positions, "pairs": pairs, "predictions": predictions}


def audio_work(waveform: Tensor, lengths: Tensor, by_documents: bool) -> tuple[Units, Units]:
    """Units of `AudioEncoder.flops` in audio clips [B, N], `lengths` [B] samples of which are real."""
    padded = torch.full_like(lengths, waveform.shape[1])
    real, computed = audio_units(lengths), audio_units(padded)
    if by_documents:
        frames, all_frames = num_encoder_frames(lengths), num_encoder_frames(padded)
        computed["pairs"] = _num_pairs(frames, all_frames - frames)
    return real, computed


def _num_pairs(*lengths: Tensor) -> int:
    """Query-key pairs within documents of these lengths."""
    return sum(int(length.square().sum()) for length in lengths)


def codec_work(waveform: Tensor, lengths: Tensor) -> tuple[Units, Units]:
    """Units of `Codec.flops` in audio clips [B, N], `lengths` [B] samples of which are real."""

    def units(num_samples: Tensor) -> Units:
        num_mel = -(-num_samples // MEL_HOP)
        num_codes = int(num_encoder_frames(num_samples).sum())
        return {"mel_frames": int(num_mel.sum()), "encoded": num_codes, "decoded": num_codes}

    return units(lengths), units(torch.full_like(lengths, waveform.shape[1]))


def count_thinker(thinker: Thinker, on_cpu: bool) -> FlopCounter:
    """Counts batches of `TextView`."""
    count, by_documents = PartFlops(thinker.flops()), thinker.stack.attends_by_documents
    return lambda batch: count(*text_work(batch, on_cpu, by_documents))


def count_audio_encoder(encoder: AudioEncoder) -> FlopCounter:
    """Counts batches of `SpeechView`, with the CTC head."""
    count, by_documents = PartFlops(encoder.flops()), encoder.stack.attends_by_documents
    return lambda batch: count(*audio_work(batch["waveform"], batch["lengths"], by_documents))


def count_codec(codec: Codec) -> FlopCounter:
    """Counts batches of `WaveformView`."""
    count = PartFlops(codec.flops())
    return lambda batch: count(*codec_work(batch["waveform"], batch["lengths"]))


def count_clip(clip: Clip, group: int, num_ranks: int) -> FlopCounter:
    """Counts batches of `ImageTextView`, `group` of which make a step of `num_ranks` ranks.

    With several per rank, the features of all are computed once more beforehand, without gradient.
    """
    costs = clip.flops()
    if group > num_ranks:
        costs = {
            unit: replace(flops, recomputed=flops.recomputed + flops.forward)
            for unit, flops in costs.items()
        }
    # The loss computes every similarity twice, with one gradient each; InfoNCE twice more for its
    # log-sum-exps. The model needs them once.
    forward = 2 * clip.config.embedding_size
    num_more = 3 if clip.bias is None else 1
    costs["similarities"] = Flops(forward, 0, 2 * forward, num_more * forward)
    flops = PartFlops(costs)

    def units(lengths: Tensor, batch_size: int) -> Units:
        return {
            "images": len(lengths),
            "texts": len(lengths),
            "tokens": int(lengths.sum()),
            "pairs": _num_pairs(lengths),
            "similarities": len(lengths) * batch_size * group,
        }

    def count(batch: Batch) -> StepFlops:
        lengths, (batch_size, width) = batch["token_lengths"], batch["token_ids"].shape
        padded = torch.full_like(lengths, width)
        return flops(units(lengths[: int(batch["units"])], batch_size), units(padded, batch_size))

    return count


class SpeechFlops:
    """Counts a Talker over texts and the codes of their audio clips, which a frozen codec encodes."""

    def __init__(self, talker: Talker, codec: Codec, has_gradient: bool = True) -> None:
        self._talker = PartFlops(talker.flops(), has_gradient)
        costs = {unit: flops for unit, flops in codec.flops().items() if unit != "decoded"}
        self._codec = PartFlops(costs, has_gradient=False)

    def __call__(
        self, text_mask: Tensor, waveform: Tensor, lengths: Tensor, by_documents: bool
    ) -> StepFlops:
        """FLOPs of texts [B, Tl] and audio clips [B, N]; a slot without an audio clip is padding."""
        characters, frames = text_mask.sum(1).long(), num_encoder_frames(lengths)
        padded = torch.full_like(characters, text_mask.shape[1])
        padded_frames = num_encoder_frames(torch.full_like(lengths, waveform.shape[1]))
        is_real = lengths > 0
        computed = talker_units(padded, padded_frames)
        if by_documents:
            own = characters + 1 + frames
            computed["pairs"] = _num_pairs(own, padded - characters, padded_frames - frames)
        spoken = self._talker(talker_units(characters[is_real], frames[is_real]), computed)
        return spoken + self._codec(*codec_work(waveform, lengths))


def count_talker(talker: Talker, codec: Codec) -> FlopCounter:
    """Counts batches of `TtsView`."""
    count, by_documents = SpeechFlops(talker, codec), talker.stack.attends_by_documents
    return lambda batch: count(
        batch["text_mask"], batch["waveform"], batch["lengths"], by_documents
    )
