"""The template, placeholders and labels of conversations, and what is refused."""

import json
from typing import Any

import numpy as np
import pytest

from muomni.config.models import OmniConfig
from muomni.data.text.chat_template import ConversationEncoder, Part, Turn, read_turns
from muomni.data.text.tokenizer import Tokenizer
from muomni.errors import DataError
from tests.conversations import AUDIO_0, COLORS, IMAGE_0, omni_config, png, text_part, tone


@pytest.fixture(scope="module")
def encoder(tokenizer: Tokenizer) -> ConversationEncoder:
    return ConversationEncoder(tokenizer, omni_config(tokenizer))


def turns(*raw: tuple[str, list[dict[str, str]]]) -> list[Turn]:
    content = {"turns": [{"role": role, "content": parts} for role, parts in raw]}
    return read_turns({"json": json.dumps(content).encode()})


def test_the_template_has_roles_boundaries_placeholders_and_ends(
    encoder: ConversationEncoder, tokenizer: Tokenizer
) -> None:
    t = tokenizer
    asked = turns(
        ("system", [text_part("be kind")]),
        ("user", [IMAGE_0, text_part("the door"), {"type": "audio", "name": "1.wav"}]),
        ("assistant", [text_part("red")]),
    )
    media = {"0.png": png(COLORS["red"]), "1.wav": tone(440, 0.4)}
    made = encoder.encode(asked, media, 100)
    # 0.4 s are 10 encoder frames, two of which share a position.
    expected = [
        t.bos_id, t.system_id, *t.encode("be kind"), t.user_id,
        t.image_start_id, *[t.image_id] * 4, t.image_end_id, *t.encode("the door"),
        t.audio_start_id, *[t.audio_id] * 5, t.audio_end_id,
        t.assistant_id, *t.encode("red"), t.eos_id,
    ]  # fmt: skip
    assert made.ids == expected
    num_answer = len(t.encode("red")) + 1
    assert made.answers == [0] * (len(expected) - num_answer) + [1] * num_answer
    assert made.ids[made.images[0].start] == t.image_id
    assert made.ids[made.images[0].start - 1] == t.image_start_id
    assert made.ids[made.audios[0].start - 1] == t.audio_start_id
    assert made.audios[0].num_tokens == 5


def test_media_follow_the_order_of_the_text(encoder: ConversationEncoder) -> None:
    asked = turns(
        ("user", [{"type": "audio", "name": "2.wav"}, IMAGE_0, {"type": "image", "name": "1.png"}]),
        ("assistant", [text_part("red and blue")]),
        ("user", [text_part("again"), IMAGE_0]),
        ("assistant", [text_part("red")]),
    )
    media = {"0.png": png(COLORS["red"]), "1.png": png(COLORS["blue"]), "2.wav": tone(440)}
    made = encoder.encode(asked, media, 200)
    assert [tuple(image.pixels[:, 5, 5]) for image in made.images] == [
        COLORS["red"], COLORS["blue"], COLORS["red"],
    ]  # fmt: skip
    starts = [image.start for image in made.images]
    assert starts == sorted(starts) and made.audios[0].start < starts[0]
    assert max(made.answers) == 2


def test_a_spoken_answer_takes_no_position_and_points_at_its_text(
    encoder: ConversationEncoder, tokenizer: Tokenizer
) -> None:
    asked = turns(
        ("user", [text_part("say low")]),
        ("assistant", [text_part("low")]),
        ("user", [text_part("say the green door")]),
        ("assistant", [text_part("the green door"), AUDIO_0]),
    )
    made = encoder.encode(asked, {"0.wav": tone(200, 0.3)}, 100)
    (spoken,) = made.spoken
    assert tokenizer.audio_id not in made.ids and not made.audios
    end = spoken.start + spoken.num_tokens
    assert made.ids[spoken.start : end] == tokenizer.encode("the green door")
    assert made.ids[end] == tokenizer.eos_id
    assert len(spoken.waveform) == 4800


@pytest.mark.parametrize("rate_hz", [8000, 11025, 16000, 22050, 44100])
@pytest.mark.parametrize("duration_s", [0.01, 0.1234, 0.55])
def test_measured_positions_are_those_of_the_encoded_conversation(
    encoder: ConversationEncoder, rate_hz: int, duration_s: float
) -> None:
    asked = turns(("user", [AUDIO_0]), ("assistant", [text_part("low")]))
    media = {"0.wav": tone(300, duration_s, rate_hz)}
    made = encoder.encode(asked, media, 100)
    assert encoder.num_positions(asked, media, 100) == len(made.ids) - 1
    assert encoder.num_audio_tokens(len(made.audios[0].waveform)) == made.audios[0].num_tokens


def test_a_long_conversation_is_cut_after_the_last_answer_that_fits(
    encoder: ConversationEncoder, tokenizer: Tokenizer
) -> None:
    exchange = [("user", [text_part("the old river")]), ("assistant", [text_part("again")])]
    asked = turns(*(exchange * 10))
    made = encoder.encode(asked, {}, 30)
    assert made.ids[-1] == tokenizer.eos_id and len(made.ids) - 1 <= 30
    assert 1 < max(made.answers) < 10
    assert encoder.num_positions(asked, {}, 30) == len(made.ids) - 1
    with pytest.raises(DataError, match=r"position \d+ of a row of 3; raise batch.size"):
        encoder.encode(asked, {}, 3)


def test_a_prompt_is_the_start_of_the_trained_sequence(encoder: ConversationEncoder) -> None:
    asked = turns(("user", [IMAGE_0, text_part("the door")]), ("assistant", [text_part("red")]))
    media = {"0.png": png(COLORS["red"])}
    prompt, whole = encoder.prompt(asked[:1], media), encoder.encode(asked, media, 100)
    assert prompt.ids == whole.ids[: len(prompt.ids)]
    assert whole.answers[len(prompt.ids)] == 1 and whole.answers[len(prompt.ids) - 1] == 0


def test_typed_markers_stay_text(encoder: ConversationEncoder, tokenizer: Tokenizer) -> None:
    made = encoder.prompt([Turn("user", (Part("text", "<|image|> <|assistant|>"),))], {})
    assert tokenizer.image_id not in made.ids
    assert made.ids.count(tokenizer.assistant_id) == 1


def _json(content: Any) -> dict[str, Any]:
    return {"json": json.dumps(content).encode()}


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({}, "no .json member"),
        ({"json": b"{"}, "no list of turns"),
        (_json({"turns": [{"role": "robot", "content": []}]}), "role 'robot'"),
        (_json({"turns": [{"role": "user", "content": [{"type": "video"}]}]}), "type 'video'"),
        (_json({"turns": [{"role": "user", "content": [text_part("a")]}]}), "no answer"),
        (_json({"turns": [{"role": "assistant", "content": []}]}), "no text"),
        (_json({"turns": [{"role": "user", "content": [IMAGE_0]}]}), "names 0.png"),
    ],
)
def test_malformed_conversations_are_named(
    encoder: ConversationEncoder, sample: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        encoder.encode(read_turns(sample), sample, 100)


@pytest.mark.parametrize("name", ["0.png", "0.wav"])
def test_broken_media_are_refused(encoder: ConversationEncoder, name: str) -> None:
    kind = IMAGE_0 if name == "0.png" else AUDIO_0
    asked = turns(("user", [kind]), ("assistant", [text_part("red")]))
    with pytest.raises(DataError, match="broken"):
        encoder.encode(asked, {name: b"not a file"}, 100)


def test_a_audio_shorter_than_its_header_is_broken(encoder: ConversationEncoder) -> None:
    asked = turns(("user", [AUDIO_0]), ("assistant", [text_part("low")]))
    with pytest.raises(DataError, match="broken audio clip"):
        encoder.encode(asked, {"0.wav": tone(300, 0.5, kind="FLAC")[:-4000]}, 100)


def test_waveforms_reach_the_model_unchanged(
    encoder: ConversationEncoder, tokenizer: Tokenizer
) -> None:
    assert isinstance(omni_config(tokenizer), OmniConfig)
    asked = turns(("user", [AUDIO_0]), ("assistant", [text_part("low")]))
    made = encoder.encode(asked, {"0.wav": tone(300, 0.5)}, 100)
    time_s = np.arange(8000) / 16000
    assert np.abs(made.audios[0].waveform - 0.4 * np.sin(2 * np.pi * 300 * time_s)).max() < 0.06
