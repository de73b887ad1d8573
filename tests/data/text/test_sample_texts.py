"""The text and captions of stored samples: which member or field has them, and what is refused."""

import json
from typing import Any

import pytest

from muomni.data.text.sample_texts import sample_captions, sample_text
from muomni.errors import DataError


def _sample(**members: Any) -> dict[str, Any]:
    encoded = {
        name: value if isinstance(value, bytes) else json.dumps(value).encode()
        for name, value in members.items()
    }
    return {"__key__": "k", **encoded}


@pytest.mark.parametrize(
    ("sample", "text"),
    [
        (_sample(txt=b" as it is\n", json={"text": "other"}), " as it is\n"),
        (_sample(text=b"words"), "words"),
        (_sample(json={"text": " words ", "wav": "x.mp3"}), "words"),
        (_sample(txt="caf\u00e9".encode(), caption=b"x"), "caf\u00e9"),
    ],
)
def test_text(sample: dict[str, Any], text: str) -> None:
    assert sample_text(sample) == text


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (_sample(wav=b""), "has no text .*its members are: wav"),
        (_sample(txt=b"\xff"), "its .txt is not UTF-8"),
        (_sample(json={"text": 7}), "'text' of its .json is not a text"),
        (_sample(json={"text": None}), "has no text"),
        (_sample(json=b"{"), "its .json is not JSON"),
    ],
)
def test_no_text(sample: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"'k'.*{message}"):
        sample_text(sample)


@pytest.mark.parametrize(
    ("sample", "captions"),
    [
        (_sample(txt=b"a", json={"captions": ["a", "b"]}), ["a", "b"]),
        (_sample(txt=b"a", json={"captions": "a cat"}), ["a cat"]),
        (_sample(txt=b"a", json={"captions": []}), ["a"]),
        (_sample(txt=b"a", json={"caption": "b"}), ["a"]),
        (_sample(json={"caption": "b"}), ["b"]),
        (_sample(json={"captions": None, "text": "c"}), ["c"]),
    ],
)
def test_captions(sample: dict[str, Any], captions: list[str]) -> None:
    assert sample_captions(sample) == captions


@pytest.mark.parametrize("value", [[{"raw": "a"}], {"en": "a"}, [None], 5])
def test_captions_of_other_types(value: object) -> None:
    with pytest.raises(DataError, match=r"'k': a caption of its .json is of type .*, not text"):
        sample_captions(_sample(txt=b"a", json={"captions": value}))
