"""Images and audio clips in conversations: tags, words that look like tags, base64, and bytes."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.corpus import Blob, Cell, Item, TextSpan
from data_prep.media.convert import read_media
from data_prep.options import ReaderOptions
from data_prep.readers import chat_media
from data_prep.readers.chat_files import read_chat_files
from data_prep.readers.chat_parquet import read_chat_parquet
from muomni.errors import DataError
from tests.data_prep.corpus_files import write_file, write_jsonl, write_parquet
from tests.data_prep.raw_corpora import audio, image


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def chat(question: object, answer: str = "Blue.", **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **fields}


def read(folder: Path, *records: object) -> list[Item]:
    path = write_file(folder / "chats.json", json.dumps(records))
    return list(read_chat_files(path, ReaderOptions(), "chats", "record"))


def parts(item: Item, turn: int = 0) -> list[str]:
    """Texts, and names of files."""
    assert item.problem is None, item.problem
    found = item.turns[turn].parts
    return [part.value if part.kind == "text" else Path(part.value).name for part in found]


def message(item: Item) -> str:
    assert item.problem is not None
    return item.problem.message


@pytest.mark.parametrize(
    "tag",
    [
        *("<image>", "<IMAGE>", "< image >", "<img>", "<ImageHere>", "<|image|>", "<image_1>", "<image 1>"),
        *("<|image_1|>", "<image1>", "<image_00>", "<image_placeholder>", "(<image>./</image>)"),
        *("<|vision_start|><|image_pad|><|vision_end|>", "<im_start><image><im_end>"),
        *("<img><IMG_CONTEXT></img>", "<start_of_image>", "<image>d/a.png</image>"),
    ],
)  # fmt: skip
def test_tags_of_a_listed_image(tag: str, tmp_path: Path) -> None:
    (item,) = read(tmp_path, chat(f"Look: {tag}\nWhat color?", images=["d/a.png"]))
    assert parts(item) == ["Look:", "a.png", "What color?"]


@pytest.mark.parametrize(
    "tag", ["<audio>", "<|AUDIO|>", "<|audio_bos|><|AUDIO|><|audio_eos|>", "<SpeechHere>"]
)
def test_tags_of_a_listed_audio_clip(tag: str, tmp_path: Path) -> None:
    (item,) = read(tmp_path, chat(f"{tag}What?", audio="a.wav"))
    assert parts(item) == ["a.wav", "What?"]


def test_numbers_and_names_of_tags(tmp_path: Path) -> None:
    by_one = chat("<image_2> or <image_1>? <image_2>!", images=["a.png", "b.png"])
    by_zero = chat("<image_1> or <image_0>?", images=["a.png", "b.png"])
    by_name = chat("<image_07>?", image={"<image_07>": "a.png"})
    beyond = chat("<image_1> and <image_3>", images=["a.png", "b.png"])
    items = read(tmp_path, by_one, by_zero, by_name, beyond)
    assert parts(items[0]) == ["b.png", "or", "a.png", "?", "b.png", "!"]
    assert parts(items[1]) == ["b.png", "or", "a.png", "?"]
    assert parts(items[2]) == ["a.png", "?"]
    assert message(items[3]) == "<image_3> has no file; the record has 2 of type image"


def test_paths_inside_of_texts(tmp_path: Path) -> None:
    first = chat("Image 1: <img>d/my cat.png</img>\nAudio 1: <audio>a.wav</audio>\nWhat?")
    items = read(tmp_path, first, chat("<img>http://a.example/b.png</img>What?"))
    assert parts(items[0]) == ["Image 1:", "my cat.png", "Audio 1:", "a.wav", "What?"]
    assert "is an address, not a local file: 'http://a.example/b.png'" in message(items[1])


@pytest.mark.parametrize("question", [
    "What does the <image> element do?", "<audio> shows nothing, why?", "Fix:\n<audio>\n<source>\n</audio>",
    "Is <audio>No sound</audio> right?", "I wrote <IMG> and <image_1>.",
])  # fmt: skip
def test_words_that_look_like_tags_stay_text(question: str, tmp_path: Path) -> None:
    answer = "Use <audio>, or <image>."
    (item,) = read(tmp_path, chat(question, answer))
    assert (parts(item), parts(item, 1)) == ([question], [answer])
    # In an answer, they are words also if all files of the record have a tag in the questions.
    (item,) = read(tmp_path, chat("<image>\nWhy?", answer, images=["a.png"]))
    assert (parts(item), parts(item, 1)) == (["a.png", "Why?"], [answer])


def test_tags_and_files_that_do_not_agree(tmp_path: Path) -> None:
    items = read(
        tmp_path,
        chat("<image>\nWhat?"),
        chat("<image>What?", images=[]),
        chat("<image> <image>", images=["a.png"]),
        chat("<image>", images=["a.png", "b.png"]),
        chat([{"type": "image"}, {"type": "text", "text": "What?"}]),
        chat([{"type": "image", "image": "a.png"}, {"type": "text", "text": "<image> or <image>"}]),
    )
    expected = ["<image> has no file", "<image> has no file", "has 1 of type image",
                "b.png is listed but has no <image> tag", "a part of type 'image' has no file",
                "a turn has more <image> tags than files"]  # fmt: skip
    for item, text in zip(items, expected, strict=True):
        assert text in message(item) and item.problem and item.problem.reason == "bad-record"


def test_media_of_messages(tmp_path: Path) -> None:
    text = {"type": "text", "text": "<image>\nWhat?"}
    user = {"role": "user", "content": "What?", "images": ["a.png"]}
    spoken = {"role": "assistant", "content": "Blue.", "audio": "a.wav"}
    items = read(
        tmp_path,
        chat([text, {"type": "image", "image": "a.png"}]),
        chat([{"type": "image"}, {"type": "text", "text": "What?"}], images=["a.png"]),
        {"messages": [user, spoken]},
        chat([{"image": "a.png"}, {"text": "What?"}]),
        chat([{"type": "image", "source": {"type": "path", "path": "a.png"}}, text]),
    )
    assert [parts(item) for item in items] == [["a.png", "What?"]] * 5
    assert parts(items[2], 1) == ["Blue.", "a.wav"]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"videos": ["a.mp4"]}, "'videos'"),
        ({"photo": "a.png"}, "'photo'"),
        ({"frames": ["a.JPG", "b.JPG"]}, "'frames'"),
        ({"speech": {"bytes": "UklGRg==", "path": None}}, "'speech'"),
        ({"shot": "data:image/png;base64,iVBO"}, "'shot'"),
    ],
)
def test_media_that_no_field_of_ours_holds_are_refused(
    fields: dict[str, Any], named: str, tmp_path: Path
) -> None:
    beside = chat("What?", **fields)
    inside = {"messages": [{"role": "user", "content": "What?", **fields}, chat("")["messages"][1]]}
    for item in read(tmp_path, beside, inside):
        assert named in message(item)
    (item,) = read(tmp_path, chat("<image>", image="d/a.png", file_name="a.png", source="coco"))
    assert parts(item) == ["a.png"]


DATA = [image(3), audio(4)]


@pytest.mark.parametrize("write", ["list", "lines", "escaped", "gzip"])
def test_base64_is_read_from_its_record(write: str, tmp_path: Path) -> None:
    png, wav = map(encoded, DATA)
    image_url = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png}"}}
    records = [
        chat([image_url, {"type": "input_audio", "input_audio": {"data": wav, "format": "wav"}}]),
        chat("<image> <audio>", images=[png], audios=[{"bytes": wav, "path": None}]),
        chat("<image> <audio>", image={"bytes": png, "path": "a.png"}, audio=f"data:audio/wav;base64,{wav}"),
        chat([{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": png}},
              {"type": "audio", "audio": wav.replace("+", "-").replace("/", "_")}]),
    ]  # fmt: skip
    path = tmp_path / ("chats.jsonl.gz" if write == "gzip" else "chats.jsonl")
    if write == "list":
        write_file(path, json.dumps(records, indent=1))
    else:
        write_jsonl(path, records)
    if write == "escaped":
        path.write_text(path.read_text().replace("/", "\\/"))
    items = list(read_chat_files(path, ReaderOptions(), "chats", "record"))
    for item in items:
        assert item.problem is None
        stored = zip(item.media, ("image", "audio"), strict=True)
        assert [read_media(medium, kind)[1] for medium, kind in stored] == DATA
        assert [item.medium(part.value) for part in item.turns[0].parts if part.kind != "text"] == [
            *item.media
        ]
        assert all(isinstance(medium, Blob) for medium in item.media)
        assert any(medium.held for medium in item.media if isinstance(medium, Blob)) == (
            write == "gzip"
        )
    # One image, one group; so its conversations share a split.
    assert len({item.group for item in items}) == 1


def test_base64_that_is_cut_or_held_beyond_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    png = encoded(image(1))
    (item,) = read(tmp_path, chat("<image>", image="data:image/png;base64,iVBO*"))
    with pytest.raises(Exception, match=r"image \(base64 number 1\) is not valid base64"):
        read_media(item.media[0], "image")
    (item,) = read(tmp_path, chat("<image>", image="data:image/png,iVBO"))
    assert "is a data URI without base64" in message(item)
    monkeypatch.setattr(chat_media, "_MAX_HELD_CHARS", 2 * len(png))
    packed = write_jsonl(tmp_path / "chats.jsonl.gz", [chat("<image>", image=png)] * 3)
    with pytest.raises(
        DataError, match=r"chats\.jsonl\.gz has more than .* must be held in memory"
    ):
        list(read_chat_files(packed, ReaderOptions(), "chats", "record"))


def test_parquet_cells_in_lists_and_messages(tmp_path: Path) -> None:
    def question(number: int) -> list[dict[str, Any]]:
        images = [
            {"type": "image", "text": None, "image": {"bytes": image(number + k), "path": None}}
            for k in (0, 1)
        ]
        return [{"type": "text", "text": "Compare:", "image": None}, *images]

    nested = [
        {"messages": [{"role": "user", "content": question(n)},
                      {"role": "assistant", "content": [{"type": "text", "text": "Same.", "image": None}]}]}
        for n in range(3)
    ]  # fmt: skip
    plain = [{"images": [image(k) for k in range(n)], **chat("What?")} for n in range(3)]
    mixed = [
        {"image": {"bytes": None, "path": "a.png"} if n else None, **chat("<image>\nWhat?" if n else "What?")}
        for n in range(2)
    ]  # fmt: skip
    for name, rows in (("a", nested), ("b", plain), ("c", mixed)):
        write_parquet(tmp_path / f"src/{name}/test.parquet", rows)
    write_file(tmp_path / "src/a.png", image(9))
    items = list(read_chat_parquet(tmp_path / "src", ReaderOptions()))
    assert all(item.problem is None and item.declared_split == "test" for item in items)
    found = [
        [read_media(each, "image")[1] for each in item.inputs if not isinstance(each, TextSpan)]
        for item in items
    ]
    assert found[:3] == [[image(n), image(n + 1)] for n in range(3)]
    assert found[3:6] == [[image(k) for k in range(n)] for n in range(3)]
    assert found[6:] == [[], [image(9)]]
    assert [part.kind for part in items[0].turns[0].parts] == ["text", "image", "image"]
    assert {item.block for item in items[:3]} == {"a/test.parquet:0", "a/test.parquet:1"}


def test_listing_parquet_does_not_read_images_beside_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow.parquet

    read_columns: list[str] = []
    iter_batches = pyarrow.parquet.ParquetFile.iter_batches

    def spy(file: Any, num_rows: int, groups: list[int], columns: list[str]) -> Any:
        read_columns.extend(columns)
        return iter_batches(file, num_rows, groups, columns)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", spy)
    rows = [{"images": [{"bytes": image(n), "path": None}], **chat("What?")} for n in range(4)]
    path = write_parquet(tmp_path / "chats.parquet", rows)
    items = list(read_chat_parquet(path, ReaderOptions()))
    assert all(isinstance(item.media[0], Cell) for item in items)
    assert "images.list.element.path" in read_columns
    assert not any(name.endswith("bytes") for name in read_columns)


KEYS = (
    *("messages", "conversations", "texts", "role", "from", "content", "value", "type", "text"),
    *("image", "images", "audio", "video", "image_url", "url", "path", "bytes", "source", "system"),
    *("tools", "history", "query", "response", "tool_calls", "id", "group", "user", "assistant"),
    *("weight", "<image_1>", "other"),
)
WORDS = (
    *("", "user", "assistant", "gpt", "tool", "text", "image", "<image>", "<image_2> x", "a.png"),
    *("<audio>a.wav</audio>", "data:image/png;base64,iVBO", "http://x/y.png", "\ud83d", "A" * 80),
)
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-1, 3), st.just(float("nan")), st.sampled_from(WORDS)
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system"]), "content": VALUES},
    optional={"image": VALUES, "audio": VALUES, "tool_calls": VALUES},
)
RECORDS = st.fixed_dictionaries(
    {"messages": st.lists(MESSAGES, max_size=3) | VALUES},
    optional={"images": VALUES, "audio": VALUES, "tools": VALUES, "other": VALUES, "id": VALUES},
) | st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=5)


@settings(max_examples=40, deadline=None)
@given(records=st.lists(RECORDS, min_size=1, max_size=6))
def test_any_record_is_an_item_or_has_a_problem_of_one_line(
    records: list[object], tmp_path_factory: pytest.TempPathFactory
) -> None:
    items = read(tmp_path_factory.getbasetemp(), *records)
    assert len(items) == len(records)
    for item in items:
        if item.problem is None:
            assert item.turns[-1].role == "assistant" and item.files is not None
        else:
            assert 0 < len(item.problem.message) < 400 and "\n" not in item.problem.message
