"""The sample outputs of each stage: one function per stage, named in its row of the registry.

All samples are of a held-out split. A function is given the stage's model in evaluation mode: that of the
export, or one in training.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
from torch import Tensor

from muomni.config.models import FRAME_RATE_HZ, MEL_RATE_HZ, MelConfig
from muomni.data.media.audio import pad_waveforms, read_audio
from muomni.data.shards.source import Source
from muomni.data.text.chat_template import Conversation, ConversationEncoder
from muomni.data.text.turns import Turn, read_turns
from muomni.errors import DataError
from muomni.inference.answer import Prompt, answer_batch, pad_left
from muomni.inference.load import Assistant
from muomni.models.language.generation import generate_text
from muomni.models.omni import MediaSlots, gather_positions
from muomni.models.speech.ctc import greedy_decode
from muomni.models.speech.mel import LOG_FLOOR
from muomni.models.speech.speech_output import Speech, speak
from muomni.models.speech.vocoder import mel_to_waveform
from muomni.observe.sample_files import Artifact, SampleFiles
from muomni.training.engine.attention import documents_of
from muomni.training.validation import first_samples

if TYPE_CHECKING:
    from muomni.training.stages.audio_encoder import AudioEncoderStage
    from muomni.training.stages.codec import CodecStage
    from muomni.training.stages.sft.stage import SftStage
    from muomni.training.stages.talker import TalkerStage
    from muomni.training.stages.thinker import ThinkerStage
    from muomni.training.stages.vision_encoder import VisionEncoderStage

_NUM_TEXTS = 8
_NUM_PAIRS = 64
_NUM_NEAREST = 3
_NUM_SPOKEN = 2
_MAX_TOKENS = 64
_MAX_ANSWER_FRAMES = 10 * FRAME_RATE_HZ
_MAX_SEARCHED = 256  # samples among which a spoken answer is looked for


T = TypeVar("T")


class SampleWriter(Protocol):
    """Writes sample outputs of a stage's `model` for samples of a split."""

    def __call__(self, stage: Any, model: Any, source: Source, files: SampleFiles) -> None: ...


def write_continuations(
    stage: "ThinkerStage", model: Any, source: Source, files: SampleFiles
) -> None:
    """Held-out texts, continued from the middle of their first tokens."""
    tokenizer, device = stage.tokenizer, stage.context.device
    view, prompts, rows = stage.view(), [], []
    for example in _read(source, _NUM_TEXTS, lambda sample: view.example(sample, None)):
        ids = list(example.ids)[: 2 * _MAX_TOKENS]
        half = (len(ids) + 1) // 2
        prompts.append(ids[:half])
        rows.append(
            {"text": tokenizer.decode(ids[:half]), "continues": tokenizer.decode(ids[half:])}
        )
    if not prompts:
        return
    ids, valid = (part.to(device) for part in pad_left(prompts, tokenizer.pad_id))
    generated = generate_text(
        model, model.embed(ids), eos_id=tokenizer.eos_id, max_new_tokens=_MAX_TOKENS, valid=valid,
    )  # fmt: skip
    for row, text in zip(rows, generated, strict=True):
        row["generated"] = tokenizer.decode(text.ids)
    files.add_table("thinker", rows)


def write_transcripts(
    stage: "AudioEncoderStage", model: Any, source: Source, files: SampleFiles
) -> None:
    view, device, rows = stage.view(), stage.context.device, []
    utterances = _read(source, _NUM_TEXTS, lambda sample: view.example(sample, None))
    for index, utterance in enumerate(utterances):
        batch = view.collate([[utterance]])
        hidden, lengths = model(batch["waveform"].to(device), batch["lengths"].to(device))
        (ids,) = greedy_decode(model.ctc_logits(hidden), lengths)
        reference, decoded = stage.tokenizer.decode(utterance.labels), stage.tokenizer.decode(ids)
        audio = files.add_input_sound(f"audio_encoder_{index}", utterance.waveform)
        rows.append({"audio": audio, "reference": reference, "decoded": decoded})
    files.add_table("audio_encoder", rows)


def write_reconstructions(
    stage: "CodecStage", model: Any, source: Source, files: SampleFiles
) -> None:
    device, rows = stage.context.device, []
    for index, original in enumerate(_read(source, _NUM_SPOKEN, read_audio)):
        name = f"codec_{index}"
        waveform, lengths = (part.to(device) for part in pad_waveforms([original]))
        target, _ = model.log_mel(waveform, lengths)
        codes, _ = model.encode(waveform, lengths)
        mel = model.decode(codes)[0, : target.shape[1]].float()
        sound = mel_to_waveform(mel, model.config.mel)
        panels = {"original": target[0], "reconstruction": mel}
        _add_sound(files, name, panels, model.config.mel, sound)
        audio = files.add_input_sound(name, original)
        rows.append({"original": audio, "reconstruction": f"{name}.wav"})
    files.add_table("codec", rows)


def write_spoken_texts(
    stage: "TalkerStage", model: Any, source: Source, files: SampleFiles
) -> None:
    view, rows = stage.view(), []
    codec, device = stage.codec.codec, stage.context.device
    texts = _read(source, _NUM_SPOKEN, lambda sample: view.example(sample, None))
    for index, example in enumerate(texts):
        name = f"talker_{index}"
        batch = view.collate([[example]])
        target, _ = codec.log_mel(batch["waveform"].to(device), batch["lengths"].to(device))
        max_frames = 2 * target.shape[1] * FRAME_RATE_HZ // MEL_RATE_HZ + FRAME_RATE_HZ
        text = [batch[each][0].to(device) for each in ("text_ids", "character_ids")]
        speech = speak(model, codec, *text, max_frames=max_frames)
        _add_speech(files, name, target[0], speech, codec.config.mel)
        rows.append(
            {
                "text": stage.tokenizer.decode(example.ids),
                "original": files.add_input_sound(name, example.waveform),
                "spoken": f"{name}.wav",
                "seconds": f"{len(speech.codes) / FRAME_RATE_HZ:.1f}",
                "ended": "yes" if speech.stopped else "no",
            }
        )
    files.add_table("talker", rows)


def write_neighbors(
    stage: "VisionEncoderStage", model: Any, source: Source, files: SampleFiles
) -> None:
    """The nearest captions of images and images of captions, among the first pairs of the split."""
    view, device = stage.view(), stage.context.device
    pairs = list(_read(source, _NUM_PAIRS, lambda sample: view.example(sample, None)))
    if not pairs:
        return
    batch = view.collate([[pair] for pair in pairs])
    output = model(*(batch[name].to(device) for name in ("images", "token_ids", "token_lengths")))
    captions = [stage.tokenizer.decode(pair.ids) for pair in pairs]
    similarity = output.image[: len(pairs)] @ output.text[: len(pairs)].T
    count = min(_NUM_NEAREST, len(pairs))
    nearest_captions, nearest_images = (
        scores.topk(count, dim=1).indices.tolist() for scores in (similarity, similarity.T)
    )

    def image(index: int) -> Artifact:
        return files.add_input_images(f"vision_encoder_{index}", [pairs[index].pixels])

    rows = [
        {
            "image": image(index),
            "caption": captions[index],
            "nearest captions": " | ".join(captions[found] for found in nearest_captions[index]),
            **{f"image {k}": image(found) for k, found in enumerate(nearest_images[index], 1)},
        }
        for index in range(min(_NUM_TEXTS, len(pairs)))
    ]
    files.add_table("vision_encoder", rows)


def write_answers(stage: "SftStage", model: Any, source: Source, files: SampleFiles) -> None:
    """Answers to held-out questions, and one spoken answer as speech."""
    encoder = ConversationEncoder(stage.tokenizer, stage.sizes)
    device = stage.context.device
    assistant = Assistant(model, stage.tokenizer, encoder, device, files.root)
    prompts, rows = [], []

    def encode(sample: dict[str, Any]) -> tuple[list[Turn], Conversation]:
        turns = read_turns(sample)
        return turns, encoder.prompt(turns[:-1], sample)

    for index, (turns, prompt) in enumerate(_read(source, _NUM_TEXTS, encode)):
        prompts.append(Prompt(prompt, _MAX_TOKENS))
        asked = " ".join(p.value if p.kind == "text" else f"<{p.kind}>" for p in turns[-2].parts)
        expected = stage.tokenizer.decode(encoder.answer_ids(turns[-1]))
        rows.append({**_media(prompt, index, files), "asked": asked, "expected": expected})
    if prompts:
        answers = answer_batch(assistant, prompts, cut_loops=False)
        for row, answer in zip(rows, answers, strict=True):
            row["answered"] = answer.text
    files.add_table("sft", rows)
    batch = _first_spoken_answer(stage, source)
    if batch is not None:
        target, speech = _speak_answer(stage, model, batch)
        _add_speech(files, "sft_speech", target, speech, stage.codec.config.mel)


def _media(prompt: Conversation, index: int, files: SampleFiles) -> dict[str, str | Artifact]:
    """The images and the audio clips of a question."""
    images = [placed.pixels for placed in prompt.images]
    sounds = [
        files.add_input_sound(f"sft_{index}_{number}", placed.waveform)
        for number, placed in enumerate(prompt.audios)
    ]
    return {"images": files.add_input_images(f"sft_{index}", images), "audio": " ".join(sounds)}


def _first_spoken_answer(stage: "SftStage", source: Source) -> dict[str, Tensor] | None:
    """The batch of the first sample whose answer is spoken, on the device."""
    view = stage.view()

    def encode(sample: dict[str, Any]) -> dict[str, Tensor] | None:
        if all(p.kind != "audio" for turn in read_turns(sample)[1:] for p in turn.parts):
            return None
        return view.collate([[view.example(sample, None)]])

    for batch in _read(source, _MAX_SEARCHED, encode):
        if batch is not None and bool(batch["speech_text_mask"].any()):
            return {name: tensor.to(stage.context.device) for name, tensor in batch.items()}
    return None


def _speak_answer(stage: "SftStage", model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Speech]:
    """The log-mel of a spoken answer, and speech from its text and the Thinker's states at it."""
    talker, codec = model.talker, stage.codec.codec
    mask = batch["speech_text_mask"][0]
    text = [batch[f"speech_{name}"][0][mask] for name in ("text_ids", "character_ids")]
    hidden = None
    if talker.config.thinker_hidden_size is not None:
        states = model(batch["input_ids"], MediaSlots.of_batch(batch), **documents_of(batch))
        hidden = gather_positions(states, batch["speech_positions"])[:1, mask]
    speech = speak(talker, codec, *text, max_frames=_MAX_ANSWER_FRAMES, thinker_hidden=hidden)
    target, _ = codec.log_mel(batch["speech"][:1], batch["speech_lengths"][:1])
    return target[0], speech


def _read(source: Source, most: int, read: Callable[[dict[str, Any]], T]) -> Iterator[T]:
    """`read` at most `most` samples, evenly spaced over those that are not excluded; bad ones are skipped."""
    ids = first_samples(source, None)
    for index in ids[:: max(1, len(ids) // most)][:most]:
        try:
            yield read(source.read(int(index)))
        except DataError:  # counted by the validation
            continue


def _add_speech(
    files: SampleFiles, name: str, target: Tensor, speech: Speech, config: MelConfig
) -> None:
    panels = {"original": target, "generated": speech.mel}
    spoken = {title: mel for title, mel in panels.items() if len(mel)}
    _add_sound(files, name, spoken, config, speech.waveform)


def _add_sound(
    files: SampleFiles, name: str, panels: Mapping[str, Tensor], config: MelConfig, sound: Tensor
) -> None:
    images: dict[str, np.ndarray] = {t: mel.float().cpu().numpy() for t, mel in panels.items()}
    files.add_sound(name, images, config, LOG_FLOOR, sound.cpu().numpy())
