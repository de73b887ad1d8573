"""Synthesize the speech of an answer: Talker, codec decoder, vocoder, WAV file."""

from pathlib import Path

import torch

from muomni.config.models import FRAME_RATE_HZ, SPEECH_TEMPERATURE
from muomni.errors import ConfigError, DataError, UpstreamError
from muomni.inference.answer import Answer
from muomni.inference.load import Assistant
from muomni.models.speech.speech_output import Speech, speak
from muomni.observe.spectrogram import write_waveform


def check_can_speak(assistant: Assistant) -> None:
    """Raise UpstreamError if the export has no Talker."""
    if assistant.model.talker is None or assistant.model.codec is None:
        raise UpstreamError(
            f"the model in {assistant.path} has no Talker and cannot speak; train stage sft with one"
        )


def speak_answer(
    assistant: Assistant,
    answer: Answer,
    *,
    max_seconds: float = 30.0,
    temperature: float = SPEECH_TEMPERATURE,
    seed: int = 0,
) -> Speech:
    """Synthesize an answer at 16 kHz, at most `max_seconds` long.

    Raises:
        UpstreamError: the model has no Talker.
        DataError: the answer has no text, or the Talker generates no frame.
    """
    check_can_speak(assistant)
    talker, codec = assistant.model.talker, assistant.model.codec
    assert talker is not None and codec is not None
    is_text_only = talker.config.thinker_hidden_size is None
    characters = assistant.tokenizer.characters(answer.ids)
    if not characters.ids:
        raise DataError("the answer has no text to speak; rephrase the question")
    speech = speak(
        talker,
        codec,
        torch.tensor(answer.ids, device=assistant.device)[characters.token_positions],
        torch.tensor(characters.ids, device=assistant.device),
        max_frames=max(1, round(max_seconds * FRAME_RATE_HZ)),
        temperature=temperature,
        seed=seed,
        thinker_hidden=None if is_text_only else answer.hidden[:, characters.token_positions],
    )
    if not len(speech.codes):
        raise DataError(
            f"the Talker generated no frame for the answer '{answer.text}'; train it longer or change --seed"
        )
    return speech


def write_speech(path: Path, speech: Speech) -> None:
    """Write a 16-bit WAV file at 16 kHz; raises ConfigError if it cannot be written."""
    try:
        write_waveform(path, speech.waveform.cpu().numpy())
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"cannot write speech to {path} ({error}); choose another --speak"
        ) from None
