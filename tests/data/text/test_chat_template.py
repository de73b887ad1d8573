"""The chat template: ids, answer labels, media placement, truncation, and refused samples."""

import json
from typing import Any

import numpy as np
import pytest

from muomni.config.models import OmniConfig
from muomni.data.text.chat_template import ConversationEncoder
from muomni.data.text.tokenizer import Tokenizer
from muomni.data.text.turns import Part, Turn, read_turns
from muomni.errors import DataError
from tests.conversations import AUDIO_0, COLORS, IMAGE_0, omni_config, png, text_part, tone


@pytest.fixture(scope="module")
def encoder(tokenizer: Tokenizer) -> ConversationEncoder:
    return ConversationEncoder(tokenizer, omni_config(tokenizer))


def turns(*raw: tuple[str, list[dict[str, str]]]) -> list[Turn]:
    content = {"turns": [{"role": role, "content": parts} for role, parts in raw]}
    return read_turns({"json": json.dumps(content).encode()})


def test_ids_contain_roles_boundaries_placeholders_and_eos(
    encoder: ConversationEncoder, tokenizer: Tokenizer
) -> None:
    t = tokenizer
    conversation = turns(
        ("system", [text_part("be kind")]),
        ("user", [IMAGE_0, text_part("the door"), {"type": "audio", "name": "1.wav"}]),
        ("assistant", [text_part("red")]),
    )
    media = {"0.png": png(COLORS["red"]), "1.wav": tone(440, 0.4)}
    encoded = encoder.encode(conversation, media, 100)
    # 0.4 s give 10 encoder frames, and two share a position.
    expected = [
        t.bos_id, t.system_id, *t.encode("be kind"), t.user_id,
        t.image_start_id, *[t.image_id] * 4, t.image_end_id, *t.encode("the door"),
        t.audio_start_id, *[t.audio_id] * 5, t.audio_end_id,
        t.assistant_id, *t.encode("red"), t.eos_id,
    ]  # fmt: skip
    assert encoded.ids == expected
    num_answer = len(t.encode("red")) + 1
    assert encoded.answers == [0] * (len(expected) - num_answer) + [1] * num_answer
    assert encoded.ids[encoded.images[0].start] == t.image_id
    assert encoded.ids[encoded.images[0].start - 1] == t.image_start_id
    assert encoded.ids[encoded.audios[0].start - 1] == t.audio_start_id
    assert encoded.audios[0].num_tokens == 5


def test_media_follow_the_order_of_the_text(encoder: ConversationEncoder) -> None:
    conversation = turns(
        ("user", [{"type": "audio", "name": "2.wav"}, IMAGE_0, {"type": "image", "name": "1.png"}]),
        ("assistant", [text_part("red and blue")]),
        ("user", [text_part("again"), IMAGE_0]),
        ("assistant", [text_part("red")]),
    )
    media = {"0.png": png(COLORS["red"]), "1.png": png(COLORS["blue"]), "2.wav": tone(440)}
    encoded = encoder.encode(conversation, media, 200)
    assert [tuple(image.pixels[:, 5, 5]) for image in encoded.images] == [
        COLORS["red"], COLORS["blue"], COLORS["red"],
    ]  # fmt: skip
    starts = [image.start for image in encoded.images]
    assert starts == sorted(starts) and encoded.audios[0].start < starts[0]
    assert max(encoded.answers) == 2


def test_spoken_answer_takes_no_position_and_points_at_its_text(
    encoder: ConversationEncoder, tokenizer: Tokenizer
) -> None:
    conversation = turns(
        ("user", [text_part("say low")]),
        ("assistant", [text_part("low")]),
        ("user", [text_part("say the green door")]),
        ("assistant", [text_part("the green door"), AUDIO_0]),
    )
    encoded = encoder.encode(conversation, {"0.wav": tone(200, 0.3)}, 100)
    (spoken,) = encoded.spoken
    assert tokenizer.audio_id not in encoded.ids and not encoded.audios
    end = spoken.start + spoken.num_tokens
    assert encoded.ids[spoken.start : end] == tokenizer.encode("the green door")
    assert encoded.ids[end] == tokenizer.eos_id
    assert len(spoken.waveform) == 4800


@pytest.mark.parametrize("rate_hz", [8000, 11025, 16000, 22050, 44100])
@pytest.mark.parametrize("duration_s", [0.01, 0.1234, 0.55])
def test_num_positions_equals_encoded_length(
    encoder: ConversationEncoder, rate_hz: int, duration_s: float
) -> None:
    conversation = turns(("user", [AUDIO_0]), ("assistant", [text_part("low")]))
    media = {"0.wav": tone(300, duration_s, rate_hz)}
    encoded = encoder.encode(conversation, media, 100)
    assert encoder.num_positions(conversation, media, 100) == len(encoded.ids) - 1
    assert encoder.num_audio_tokens(len(encoded.audios[0].waveform)) == encoded.audios[0].num_tokens


def test_long_conversation_is_truncated_after_the_last_answer_that_fits(
    encoder: ConversationEncoder, tokenizer: Tokenizer
) -> None:
    exchange = [("user", [text_part("the old river")]), ("assistant", [text_part("again")])]
    conversation = turns(*(exchange * 10))
    encoded = encoder.encode(conversation, {}, 30)
    assert encoded.ids[-1] == tokenizer.eos_id and len(encoded.ids) - 1 <= 30
    assert 1 < max(encoded.answers) < 10
    assert encoder.num_positions(conversation, {}, 30) == len(encoded.ids) - 1
    with pytest.raises(
        DataError, match=r"position \d+, but a sequence has 3 positions; raise batch.seq_len"
    ):
        encoder.encode(conversation, {}, 3)


def test_prompt_is_a_prefix_of_the_training_sequence(encoder: ConversationEncoder) -> None:
    conversation = turns(
        ("user", [IMAGE_0, text_part("the door")]), ("assistant", [text_part("red")])
    )
    media = {"0.png": png(COLORS["red"])}
    prompt, full = encoder.prompt(conversation[:1], media), encoder.encode(conversation, media, 100)
    assert prompt.ids == full.ids[: len(prompt.ids)]
    assert full.answers[len(prompt.ids)] == 1 and full.answers[len(prompt.ids) - 1] == 0
    assert encoder.num_prompt_positions(conversation[:1], media) == len(prompt.ids)


def test_markers_typed_by_a_user_are_plain_text(
    encoder: ConversationEncoder, tokenizer: Tokenizer
) -> None:
    encoded = encoder.prompt([Turn("user", (Part("text", "<|image|> <|assistant|>"),))], {})
    assert tokenizer.image_id not in encoded.ids
    assert encoded.ids.count(tokenizer.assistant_id) == 1


def _json(content: Any) -> dict[str, Any]:
    return {"json": json.dumps(content).encode()}


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (_json({"turns": [{"role": "user", "content": [text_part("a")]}]}), "no assistant turn"),
        (_json({"turns": [{"role": "assistant", "content": []}]}), "no text"),
        (_json({"turns": [{"role": "user", "content": [IMAGE_0]}]}), r"refers to 0\.png"),
    ],
)
def test_unusable_conversations_are_rejected(
    encoder: ConversationEncoder, sample: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        encoder.encode(read_turns(sample), sample, 100)


@pytest.mark.parametrize("name", ["0.png", "0.wav"])
def test_broken_media_are_rejected(encoder: ConversationEncoder, name: str) -> None:
    kind = IMAGE_0 if name == "0.png" else AUDIO_0
    conversation = turns(("user", [kind]), ("assistant", [text_part("red")]))
    with pytest.raises(DataError, match="broken"):
        encoder.encode(conversation, {name: b"not a file"}, 100)


def test_audio_shorter_than_its_header_is_rejected(encoder: ConversationEncoder) -> None:
    conversation = turns(("user", [AUDIO_0]), ("assistant", [text_part("low")]))
    with pytest.raises(DataError, match="broken audio clip"):
        encoder.encode(conversation, {"0.wav": tone(300, 0.5, kind="FLAC")[:-4000]}, 100)


def test_waveforms_reach_the_model_unchanged(
    encoder: ConversationEncoder, tokenizer: Tokenizer
) -> None:
    assert isinstance(omni_config(tokenizer), OmniConfig)
    conversation = turns(("user", [AUDIO_0]), ("assistant", [text_part("low")]))
    encoded = encoder.encode(conversation, {"0.wav": tone(300, 0.5)}, 100)
    time_s = np.arange(8000) / 16000
    assert np.abs(encoded.audios[0].waveform - 0.4 * np.sin(2 * np.pi * 300 * time_s)).max() < 0.06
