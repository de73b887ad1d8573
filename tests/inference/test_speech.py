"""Spoken answers: 40 ms per frame, seeded sampling, and errors."""

from pathlib import Path

import pytest
import soundfile
import torch

from muomni.errors import ConfigError, DataError, UpstreamError
from muomni.inference.answer import Answer
from muomni.inference.load import Assistant, load_assistant
from muomni.inference.speech import check_can_speak, speak_answer, write_speech
from tests.inference.exports import write_sft_export


@pytest.fixture(scope="module")
def assistant(tmp_path_factory: pytest.TempPathFactory) -> Assistant:
    run = tmp_path_factory.mktemp("run")
    write_sft_export(run)
    return load_assistant(run, torch.device("cpu"))


def text_answer(assistant: Assistant, text: str) -> Answer:
    ids = assistant.tokenizer.encode(text)
    return Answer(text, ids, torch.zeros(1, len(ids), 32), True)


def test_speech_has_forty_milliseconds_per_frame(assistant: Assistant, tmp_path: Path) -> None:
    speech = speak_answer(
        assistant, text_answer(assistant, "the cat"), max_seconds=0.4, temperature=1.0,
        seed=3,
    )  # fmt: skip
    write_speech(tmp_path / "out.wav", speech)
    waveform, rate_hz = soundfile.read(tmp_path / "out.wav")
    assert rate_hz == 16_000
    assert len(waveform) == 640 * len(speech.codes) <= 0.4 * 16_000


def test_equal_seeds_give_equal_speech(assistant: Assistant) -> None:
    def codes(seed: int) -> list[list[int]]:
        answer = text_answer(assistant, "again and again")
        speech = speak_answer(assistant, answer, max_seconds=0.5, temperature=1.0, seed=seed)
        return speech.codes.tolist()

    assert codes(3) == codes(3) != codes(5)


def test_empty_answer_is_an_error(assistant: Assistant) -> None:
    with pytest.raises(DataError, match="no text to speak"):
        speak_answer(assistant, text_answer(assistant, ""))


def test_talker_without_frames_is_an_error(assistant: Assistant) -> None:
    talker = assistant.model.talker
    assert talker is not None
    # The stop class always wins.
    stop = torch.tensor([talker.stop])
    hook = talker.base_head.register_forward_hook(
        lambda _module, _inputs, logits: logits.index_fill(-1, stop, 99.0)
    )
    with hook, pytest.raises(DataError, match="generated no frame"):
        speak_answer(assistant, text_answer(assistant, "the cat"))


def test_model_without_talker_is_an_error(tmp_path: Path) -> None:
    write_sft_export(tmp_path, with_talker=False)
    assistant = load_assistant(tmp_path, torch.device("cpu"))
    with pytest.raises(UpstreamError, match="has no Talker"):
        check_can_speak(assistant)


def test_unwritable_path_is_reported(assistant: Assistant, tmp_path: Path) -> None:
    answer = text_answer(assistant, "the cat")
    speech = speak_answer(
        assistant, answer, max_seconds=0.1, temperature=1.0,
        seed=3,
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"cannot write speech to .*none/out.wav"):
        write_speech(tmp_path / "none" / "out.wav", speech)
