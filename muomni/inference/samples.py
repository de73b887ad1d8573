"""Sample outputs of a stage on held-out samples: transcripts, reconstructions, answers, and speech.

One function per stage; they run after training on the export, and the quick ones also at each validation, on
rank 0 only. Files are kept in RUN/STAGE/samples and sent to the run's recorders.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from muomni.checkpoint.export import read_export
from muomni.config.models import FRAME_RATE_HZ, MEL_RATE_HZ
from muomni.config.registry import load, stage_spec
from muomni.data.media.audio import pad_waveforms, read_audio
from muomni.data.shards.source import Source
from muomni.data.text.turns import read_turns
from muomni.inference.answer import Prompt, answer_batch
from muomni.inference.load import Assistant, load_assistant
from muomni.models.omni import MediaSlots, gather_positions
from muomni.models.speech.ctc import greedy_decode
from muomni.models.speech.mel import LOG_FLOOR
from muomni.models.speech.speech_output import Speech, speak
from muomni.models.speech.vocoder import mel_to_waveform
from muomni.observe.recorder import Recorder, RunInfo, Status
from muomni.observe.spectrogram import write_spectrograms, write_waveform
from muomni.run_folder import RunFolder
from muomni.training.engine.attention import documents_of
from muomni.training.stage import Stage

if TYPE_CHECKING:
    from muomni.training.stages.audio_encoder import AudioEncoderStage
    from muomni.training.stages.codec import CodecStage
    from muomni.training.stages.sft.stage import SftStage
    from muomni.training.stages.talker import TalkerStage
    from muomni.training.stages.vision_encoder import VisionEncoderStage

logger = logging.getLogger(__name__)

# Stages whose samples take a moment: one forward pass each, no generation.
QUICK = ("audio_encoder", "vision_encoder", "codec")
_NUM_TEXTS = 8
_NUM_PAIRS = 64
_NUM_SPOKEN = 2
_MAX_ANSWER_TOKENS = 64
_MAX_ANSWER_FRAMES = 10 * FRAME_RATE_HZ


@dataclass(frozen=True, slots=True)
class Artifact:
    """A file with a sample output."""

    path: Path
    kind: Literal["text", "table", "image", "audio"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where samples are written, and a model in training to use instead of the export in `folder`."""

    folder: RunFolder
    target: Path
    model: Any = None

    def model_of(self, stage: Stage) -> Any:
        """The model of the samples in evaluation mode; an export is loaded outside of any engine."""
        if self.model is not None:
            return self.model
        task = stage.build().to(stage.context.device)
        stage.load_export(task, read_export(self.folder.export, stage.name))
        return stage.model(task.eval())


@torch.no_grad()
def write_samples(
    stage: Stage, source: Source, folder: RunFolder, model: Any = None, name: str = ""
) -> list[Artifact]:
    """Write sample outputs for samples of `source`; none for stages without any.

    They are those of the stage's export or, for stages in `QUICK`, of a `model` in training; the latter are
    in the subfolder `name`.
    """
    writer = stage_spec(stage.name).samples
    if writer is None:
        return []
    target = folder.samples / name
    target.mkdir(exist_ok=True, parents=True)
    return list(load(writer)(stage, source, Place(folder, target, model)))


class ValidationSamples:
    """Writes sample outputs of a model in training and adds them to the open `recorders`."""

    def __init__(
        self, stage: Stage, source: Source, folder: RunFolder, recorders: Sequence[Recorder]
    ) -> None:
        self._parts = (stage, source, folder)
        self._recorders = recorders
        self._has_failed = False

    def __call__(self, model: Any, step: int) -> None:
        """Write the samples of finished step `step`; a failure is one warning, and ends them."""
        if self._has_failed:
            return
        name = f"step_{step:08d}"
        try:
            artifacts = write_samples(*self._parts, model, name)
        except Exception as error:  # of a damaged sample, or memory: peers train on
            self._has_failed = True
            reason = str(error).partition("\n")[0]
            logger.warning("no sample outputs at validations any more: %s", reason)
            return
        for recorder in self._recorders:
            for artifact in artifacts:
                recorder.artifact(artifact.path, f"samples/{name}/{artifact.kind}")


def record_samples(
    stage: Stage,
    source: Source,
    folder: RunFolder,
    recorders: Sequence[Recorder],
    info: RunInfo,
) -> None:
    """Write sample outputs, and add them to the closed recorders of the finished run `info`.

    A device without memory for them is a warning: the run has ended, and its export is complete.
    """
    try:
        artifacts = write_samples(stage, source, folder)
    except torch.OutOfMemoryError as error:
        reason = str(error).partition("\n")[0]
        logger.warning("no sample outputs of %s: %s", stage.name, reason)
        return
    for recorder in recorders if artifacts else ():
        status: Status = "FAILED"
        recorder.open(info)
        try:
            for artifact in artifacts:
                recorder.artifact(artifact.path, f"samples/{artifact.kind}")
            status = "FINISHED"
        finally:
            recorder.close(status)


def write_transcripts(
    stage: "AudioEncoderStage", source: Source, place: Place
) -> Iterator[Artifact]:
    encoder, view, rows = place.model_of(stage), stage.view(), []
    device = stage.context.device
    for index in range(min(_NUM_TEXTS, len(source))):
        utterance = view.example(source.read(index), None)
        batch = view.collate([[utterance]])
        hidden, lengths = encoder(batch["waveform"].to(device), batch["lengths"].to(device))
        (ids,) = greedy_decode(encoder.ctc_logits(hidden), lengths)
        reference, decoded = stage.tokenizer.decode(utterance.labels), stage.tokenizer.decode(ids)
        rows.append({"reference": reference, "decoded": decoded})
    yield from _texts(place.target / "audio_encoder", rows)


def write_reconstructions(stage: "CodecStage", source: Source, place: Place) -> Iterator[Artifact]:
    """Each image has the spectrogram of the original above that of the reconstruction."""
    codec, device = place.model_of(stage), stage.context.device
    for index in range(min(_NUM_SPOKEN, len(source))):
        waveform, lengths = pad_waveforms([read_audio(source.read(index))])
        waveform, lengths = waveform.to(device), lengths.to(device)
        target, _ = codec.log_mel(waveform, lengths)
        codes, _ = codec.encode(waveform, lengths)
        mel = codec.decode(codes)[0, : target.shape[1]].float()
        sound = mel_to_waveform(mel, codec.config.mel)
        yield from _sound(place.target / f"codec_{index}", [target[0], mel], sound)


def write_spoken_texts(stage: "TalkerStage", source: Source, place: Place) -> Iterator[Artifact]:
    """Each image has the spectrogram of the original above that of the generated speech."""
    talker, view = place.model_of(stage), stage.view()
    codec, device = stage.codec.codec, stage.context.device
    for index in range(min(_NUM_SPOKEN, len(source))):
        batch = view.collate([[view.example(source.read(index), None)]])
        target, _ = codec.log_mel(batch["waveform"].to(device), batch["lengths"].to(device))
        max_frames = 2 * target.shape[1] * FRAME_RATE_HZ // MEL_RATE_HZ + FRAME_RATE_HZ
        text = [batch[name][0].to(device) for name in ("text_ids", "character_ids")]
        speech = speak(talker, codec, *text, max_frames=max_frames)
        yield from _speech(place.target / f"talker_{index}", target[0], speech)


def write_neighbors(
    stage: "VisionEncoderStage", source: Source, place: Place
) -> Iterator[Artifact]:
    """The three nearest captions of each image, among those of the first pairs of the split."""
    clip, view, device = place.model_of(stage), stage.view(), stage.context.device
    pairs = [view.example(source.read(i), None) for i in range(min(_NUM_PAIRS, len(source)))]
    batch = view.collate([[pair] for pair in pairs])
    output = clip(*(batch[name].to(device) for name in ("images", "token_ids", "token_lengths")))
    names = [stage.tokenizer.decode(pair.ids) for pair in pairs]
    similarity = output.image[: len(pairs)] @ output.text[: len(pairs)].T
    nearest = similarity.argsort(dim=1, descending=True)[:, :3].tolist()
    rows = [
        {"image of": name, "nearest": " | ".join(names[index] for index in indices)}
        for name, indices in list(zip(names, nearest, strict=True))[:_NUM_TEXTS]
    ]
    yield from _texts(place.target / "vision_encoder", rows)


def write_answers(stage: "SftStage", source: Source, place: Place) -> Iterator[Artifact]:
    """Answers to held-out questions, and the first spoken answer as speech."""
    assistant = load_assistant(place.folder.export, stage.context.device)
    indices = range(0, len(source), max(1, len(source) // _NUM_TEXTS))
    rows = [_answer(assistant, source.read(index)) for index in indices[:_NUM_TEXTS]]
    yield from _texts(place.target / "sft", rows)
    batch = _first_spoken_answer(stage, source)
    if batch is not None:
        target, speech = _speak_answer(assistant, batch)
        yield from _speech(place.target / "sft_speech", target, speech)


def _answer(assistant: Assistant, sample: dict[str, Any]) -> dict[str, str]:
    turns = read_turns(sample)
    prompt = Prompt(assistant.encoder.prompt(turns[:-1], sample), _MAX_ANSWER_TOKENS)
    (answer,) = answer_batch(assistant, [prompt], cut_loops=False)
    asked = " ".join(p.value if p.kind == "text" else f"<{p.kind}>" for p in turns[-2].parts)
    expected = assistant.tokenizer.decode(assistant.encoder.answer_ids(turns[-1]))
    return {"asked": asked, "expected": expected, "answered": answer.text}


def _first_spoken_answer(stage: "SftStage", source: Source) -> dict[str, Tensor] | None:
    """The batch of the first sample whose answer is spoken, on the device."""
    view = stage.view()
    for index in range(len(source)):
        sample = source.read(index)
        if any(p.kind == "audio" for turn in read_turns(sample)[1:] for p in turn.parts):
            batch = view.collate([[view.example(sample, None)]])
            if bool(batch["speech_text_mask"].any()):
                return {name: tensor.to(stage.context.device) for name, tensor in batch.items()}
    return None


def _speak_answer(assistant: Assistant, batch: dict[str, Tensor]) -> tuple[Tensor, Speech]:
    """The log-mel of a spoken answer, and speech from its text and the Thinker's states at it."""
    talker, codec = assistant.model.talker, assistant.model.codec
    assert talker is not None and codec is not None
    mask = batch["speech_text_mask"][0]
    text = [batch[f"speech_{name}"][0][mask] for name in ("text_ids", "character_ids")]
    hidden = None
    if talker.config.thinker_hidden_size is not None:
        slots = MediaSlots.of_batch(batch)
        states = assistant.model(batch["input_ids"], slots, **documents_of(batch))
        hidden = gather_positions(states, batch["speech_positions"])[:1, mask]
    speech = speak(talker, codec, *text, max_frames=_MAX_ANSWER_FRAMES, thinker_hidden=hidden)
    target, _ = codec.log_mel(batch["speech"][:1], batch["speech_lengths"][:1])
    return target[0], speech


def _texts(stem: Path, rows: list[dict[str, str]]) -> Iterator[Artifact]:
    """Write rows with the same keys as `STEM.txt`, and as `STEM.json`, a table for MLflow."""
    width = max(len(name) for row in rows for name in row) + 1
    blocks = ("".join(f"{f'{k}:':<{width}} {v}\n" for k, v in row.items()) for row in rows)
    text, table = stem.with_suffix(".txt"), stem.with_suffix(".json")
    text.write_text("\n".join(blocks), encoding="utf-8")
    yield Artifact(text, "text")
    content = {"columns": list(rows[0]), "data": [list(row.values()) for row in rows]}
    table.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    yield Artifact(table, "table")


def _speech(stem: Path, target: Tensor, speech: Speech) -> Iterator[Artifact]:
    return _sound(stem, [mel for mel in (target, speech.mel) if len(mel)], speech.waveform)


def _sound(stem: Path, mels: list[Tensor], waveform: Tensor) -> Iterator[Artifact]:
    """Write `STEM.png` with spectrograms [T, num_mels] below each other, and `STEM.wav`."""
    image, sound = stem.with_suffix(".png"), stem.with_suffix(".wav")
    write_spectrograms(image, [mel.float().cpu().numpy() for mel in mels], LOG_FLOOR)
    yield Artifact(image, "image")
    write_waveform(sound, waveform.cpu().numpy())
    yield Artifact(sound, "audio")
