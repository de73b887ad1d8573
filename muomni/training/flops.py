"""FLOPs of training batches: those that the model needs, and those that the device computes.

Model FLOPs count every real sample alone; hardware FLOPs include padding, empty slots, and recomputed
activations. Both are units of work, read from the batch on the host, times the costs that the models
report (`muomni/models/layers/flops.py`), so the device is not synchronized.
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
    """Multiplies units of work by their costs in a part of a model.

    `has_gradient`: the part or something before it is trained; otherwise it only runs forward.
    """

    def __init__(self, costs: Mapping[str, Flops], has_gradient: bool = True) -> None:
        self._costs = [
            (unit, flops.model(has_gradient), flops.hardware(has_gradient))
            for unit, flops in costs.items()
        ]

    def __call__(self, real: Units, computed: Units) -> StepFlops:
        """FLOPs of the units in real samples, and of those that the device computes."""
        return StepFlops(
            sum(model * real[unit] for unit, model, _ in self._costs),
            sum(hardware * computed[unit] for unit, _, hardware in self._costs),
        )


def text_work(batch: Batch, on_cpu: bool, by_documents: bool) -> tuple[Units, Units]:
    """Units of `Thinker.flops` in packed sequences [B, T], real and computed.

    A document attends to itself. The device computes attention by documents (`by_documents`), in windows
    (`on_cpu`, short documents), or over full sequences, and logits everywhere or, `on_cpu`, at labels.
    """
    document_ids, num_labels = batch["document_ids"], int(batch["units"])
    num_positions, length = document_ids.numel(), document_ids.shape[1]
    starts = document_starts(document_ids.numpy()).astype(np.int64)
    lengths = np.diff(starts)  # also of padding
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
    """Units of `AudioEncoder.flops` in audio clips [B, N] of `lengths` [B] samples."""
    padded = torch.full_like(lengths, waveform.shape[1])
    computed = audio_units(padded)
    if by_documents:
        frames = num_encoder_frames(lengths)
        computed["pairs"] = _num_pairs(frames, num_encoder_frames(padded) - frames)
    return audio_units(lengths), computed


def _num_pairs(*lengths: Tensor) -> int:
    """Query-key pairs within documents of these lengths."""
    return sum(int(length.square().sum()) for length in lengths)


def codec_work(waveform: Tensor, lengths: Tensor) -> tuple[Units, Units]:
    """Units of `Codec.flops` in audio clips [B, N] of `lengths` [B] samples."""

    def units(num_samples: Tensor) -> Units:
        mel_frames = int((-(-num_samples // MEL_HOP)).sum())
        code_frames = int(num_encoder_frames(num_samples).sum())
        return {"mel_frames": mel_frames, "encoded": code_frames, "decoded": code_frames}

    return units(lengths), units(torch.full_like(lengths, waveform.shape[1]))


def count_thinker(thinker: Thinker, on_cpu: bool) -> FlopCounter:
    """Counts batches of `TextView`."""
    count, by_documents = PartFlops(thinker.flops()), thinker.stack.attends_by_documents
    return lambda batch: count(*text_work(batch, on_cpu, by_documents))


def count_audio_encoder(encoder: AudioEncoder) -> FlopCounter:
    """Counts batches of `SpeechView`, including the CTC head."""
    count, by_documents = PartFlops(encoder.flops()), encoder.stack.attends_by_documents
    return lambda batch: count(*audio_work(batch["waveform"], batch["lengths"], by_documents))


def count_codec(codec: Codec) -> FlopCounter:
    """Counts batches of `WaveformView`."""
    count = PartFlops(codec.flops())
    return lambda batch: count(*codec_work(batch["waveform"], batch["lengths"]))


def count_clip(clip: Clip, group: int, num_ranks: int) -> FlopCounter:
    """Counts batches of `ImageTextView`, `group` of which make a step of `num_ranks` ranks.

    With gradient accumulation, an extra forward pass computes the features of all micro-batches first.
    """
    costs = clip.flops()
    if group > num_ranks:
        for unit, flops in costs.items():
            costs[unit] = replace(flops, recomputed=flops.recomputed + flops.forward)
    # The model needs each similarity once. The loss computes it twice, with a gradient each, and InfoNCE
    # twice more for the log-sum-exps.
    forward, num_more = 2 * clip.config.embedding_size, 3 if clip.bias is None else 1
    costs["similarities"] = Flops(forward, 0, 2 * forward, num_more * forward)
    count = PartFlops(costs)

    def units(lengths: Tensor, batch_size: int) -> Units:
        return {
            "images": len(lengths),
            "texts": len(lengths),
            "tokens": int(lengths.sum()),
            "pairs": _num_pairs(lengths),
            "similarities": len(lengths) * batch_size * group,
        }

    def count_batch(batch: Batch) -> StepFlops:
        lengths, (batch_size, width) = batch["token_lengths"], batch["token_ids"].shape
        padded = torch.full_like(lengths, width)
        return count(units(lengths[: int(batch["units"])], batch_size), units(padded, batch_size))

    return count_batch


def count_speech(
    talker: Talker, codec: Codec, by_documents: bool, has_gradient: bool = True
) -> Callable[[Tensor, Tensor, Tensor], StepFlops]:
    """Counts a Talker on texts [B, Tl] and audio clips [B, N], which a frozen codec encodes.

    The counter takes the text mask, the waveform, and its lengths [B]; a slot without audio is padding.
    """
    count_talker = PartFlops(talker.flops(), has_gradient)
    costs = {unit: flops for unit, flops in codec.flops().items() if unit != "decoded"}
    count_codec = PartFlops(costs, has_gradient=False)

    def count(text_mask: Tensor, waveform: Tensor, lengths: Tensor) -> StepFlops:
        characters, frames = text_mask.sum(1).long(), num_encoder_frames(lengths)
        all_characters = torch.full_like(characters, text_mask.shape[1])
        all_frames = num_encoder_frames(torch.full_like(lengths, waveform.shape[1]))
        computed, is_real = talker_units(all_characters, all_frames), lengths > 0
        if by_documents:
            documents = characters + 1 + frames, all_characters - characters, all_frames - frames
            computed["pairs"] = _num_pairs(*documents)
        spoken = count_talker(talker_units(characters[is_real], frames[is_real]), computed)
        return spoken + count_codec(*codec_work(waveform, lengths))

    return count


def count_talker(talker: Talker, codec: Codec) -> FlopCounter:
    """Counts batches of `TtsView`."""
    count = count_speech(talker, codec, talker.stack.attends_by_documents)
    return lambda batch: count(batch["text_mask"], batch["waveform"], batch["lengths"])
