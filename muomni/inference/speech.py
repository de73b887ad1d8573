"""Speaks an answer: Talker codes, codec decoder, vocoder, WAV file."""

from pathlib import Path

import torch

from muomni.config.models import FRAME_RATE_HZ, SPEECH_TEMPERATURE
from muomni.errors import ConfigError, DataError, UpstreamError
from muomni.inference.answer import Answer
from muomni.inference.load import Assistant
from muomni.models.speech.speech_output import Speech, speak
from muomni.observe.spectrogram import write_waveform


def check_can_speak(assistant: Assistant) -> None:
    """Raise UpstreamError when the export answers in text only."""
    if assistant.model.talker is None or assistant.model.codec is None:
        raise UpstreamError(
            f"the model in {assistant.export.path} has no Talker, so it cannot speak; leave --speak "
            f"out, or train stage sft with one"
        )


def speak_answer(
    assistant: Assistant,
    answer: Answer,
    *,
    max_seconds: float = 30.0,
    temperature: float = SPEECH_TEMPERATURE,
    seed: int = 0,
) -> Speech:
    """The answer's text as speech at 16 kHz, at most `max_seconds` of it.

    Raises UpstreamError without a Talker, DataError when there is nothing to say or nothing was said.
    """
    check_can_speak(assistant)
    talker, codec = assistant.model.talker, assistant.model.codec
    assert talker is not None and codec is not None
    sees_no_states = talker.config.thinker_hidden_size is None
    characters = assistant.tokenizer.characters(answer.ids)
    if not characters.ids:
        raise DataError("the answer has no text, so there is nothing to speak; ask otherwise")
    speech = speak(
        talker,
        codec,
        torch.tensor(answer.ids, device=assistant.device)[characters.token_positions],
        torch.tensor(characters.ids, device=assistant.device),
        max_frames=max(1, round(max_seconds * FRAME_RATE_HZ)),
        temperature=temperature,
        seed=seed,
        thinker_hidden=None if sees_no_states else answer.hidden[:, characters.token_positions],
    )
    if not len(speech.codes):
        raise DataError(
            f"the Talker ended before its first frame for the answer '{answer.text}'; train it longer, "
            f"or give another --seed"
        )
    return speech


def write_speech(path: Path, speech: Speech) -> None:
    """Write a 16-bit WAV file at 16 kHz; raises ConfigError when that is not possible."""
    try:
        write_waveform(path, speech.waveform.cpu().numpy())
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"cannot write speech to {path} ({error}); give another --speak"
        ) from None
