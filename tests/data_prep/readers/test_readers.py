"""Each reader lists its layout and reports bad records."""

import json
import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.corpus import (
    Item,
    TextSpan,
    clean_key,
    declared_split,
    image_group,
    text_group,
    transcript_group,
)
from data_prep.options import ReaderOptions
from data_prep.readers.coco import read_coco
from data_prep.readers.librispeech import read_librispeech
from data_prep.readers.ljspeech import read_ljspeech
from data_prep.readers.messages import read_messages
from data_prep.readers.placeholders import read_llava
from data_prep.readers.plain_text import read_plain_text
from data_prep.readers.table import read_image_table, read_speech_table, read_text_table
from muomni.errors import DataError
from tests.data_prep.raw_corpora import (
    read_annotations,
    write_annotations,
    write_coco,
    write_librispeech,
    write_ljspeech,
)

OPTIONS = ReaderOptions()


def _reasons(items: list[Item]) -> dict[str, str]:
    return {item.key: item.problem.reason for item in items if item.problem}


def test_coco_groups_captions_by_image(tmp_path: Path) -> None:
    write_coco(tmp_path, 2)
    images, captions = read_annotations(tmp_path)
    captions.append({"id": 9, "image_id": 1, "caption": "a second\ncaption"})
    write_annotations(tmp_path, images, captions)
    first, second = read_coco(tmp_path, OPTIONS)
    assert first.key == "000000000001"
    assert first.texts == ("thing number 1", "a second caption")
    assert first.group == second.group.replace("2", "1") == image_group("x/000000000001.jpg")
    assert first.declared_split == "train"


def test_coco_bad_records(tmp_path: Path) -> None:
    write_coco(tmp_path, 3)
    images, captions = read_annotations(tmp_path)
    captions[0]["caption"] = "  "
    captions[1]["image_id"] = 77
    write_annotations(tmp_path, images, captions)
    items = list(read_coco(tmp_path, OPTIONS))
    assert _reasons(items) == {
        "000000000001": "empty-text",
        "000000000002": "empty-text",
        "captions_train2017-image-77": "caption-without-image",
    }


def test_coco_without_annotations(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="annotations does not exist"):
        list(read_coco(tmp_path, OPTIONS))
    write_coco(tmp_path)
    (tmp_path / "annotations/captions_train2017.json").write_text("[]")
    with pytest.raises(DataError, match=r"captions_train2017\.json is not a COCO annotation"):
        list(read_coco(tmp_path, OPTIONS))


def test_coco_annotation_pattern(tmp_path: Path) -> None:
    write_coco(tmp_path, 2)
    plain = tmp_path / "annotations/captions_train2017.json"
    french = {"images": [], "annotations": []}
    (plain.parent / "captions_train2017_fr.json").write_text(json.dumps(french))
    assert len(list(read_coco(tmp_path, OPTIONS))) == 2
    assert list(read_coco(tmp_path, ReaderOptions(annotations="captions_*_fr.json"))) == []


def test_librispeech(tmp_path: Path) -> None:
    write_librispeech(tmp_path / "LibriSpeech")
    write_librispeech(tmp_path / "LibriSpeech", "dev-clean", 1)
    items = list(read_librispeech(tmp_path, OPTIONS))
    assert len(items) == 8
    assert items[0].texts == ("hello chapter 0 line 0",)
    assert {item.declared_split for item in items} == {"train", "val"}
    assert items[0].group == items[1].group == "chapter:19-100"
    kept = read_librispeech(tmp_path, ReaderOptions(keep_case=True, subsets=("dev-clean",)))
    assert next(item.texts[0] for item in kept) == "HELLO CHAPTER 0 LINE 0"
    by_speaker = read_librispeech(tmp_path, ReaderOptions(group_by="speaker"))
    assert {item.group for item in by_speaker} == {"speaker:19"}


def test_librispeech_bad_records(tmp_path: Path) -> None:
    write_librispeech(tmp_path, chapters=1)
    transcript = next(tmp_path.rglob("*.trans.txt"))
    transcript.write_bytes(b"19-100-0000\n19-100-0005 CAF\xc9\n")
    items = list(read_librispeech(tmp_path, OPTIONS))
    assert _reasons(items) == {
        "train-clean-100-19-100-0000": "empty-text",
        "train-clean-100-19-100-0005": "bad-utf8",
        "train-clean-100-19-100-0001": "missing-transcript",
    }
    with pytest.raises(DataError, match=r"subset .*test-other does not exist"):
        list(read_librispeech(tmp_path, ReaderOptions(subsets=("test-other",))))
    with pytest.raises(DataError, match="contains no transcript"):
        (tmp_path / "empty").mkdir()
        list(read_librispeech(tmp_path / "empty", OPTIONS))


def test_ljspeech_repeated_prompts_share_a_group(tmp_path: Path) -> None:
    write_ljspeech(tmp_path, ["Thank you.", "thank  you", "Something else"])
    items = list(read_ljspeech(tmp_path, OPTIONS))
    assert items[0].group == items[1].group == transcript_group("THANK YOU!")
    assert items[2].group != items[0].group
    assert items[1].texts == ("thank you",)


def test_ljspeech_bad_records(tmp_path: Path) -> None:
    write_ljspeech(tmp_path, ["one"])
    (tmp_path / "metadata.csv").write_bytes(b"A|x|x\nB||\nonlyone\nC|\xff|\xff\n")
    assert _reasons(list(read_ljspeech(tmp_path, OPTIONS))) == {
        "A": "missing-media",
        "B": "empty-text",
        "metadata-line-00000003": "bad-record",
        "C": "bad-utf8",
    }
    with pytest.raises(DataError, match=r"metadata\.csv does not exist"):
        list(read_ljspeech(tmp_path / "nowhere", OPTIONS))


def _spans(items: list[Item]) -> list[bytes]:
    spans = [item.span for item in items if isinstance(item.span, TextSpan)]
    return [Path(span.path).read_bytes()[span.start : span.end] for span in spans]


def test_plain_text_documents(tmp_path: Path) -> None:
    path = tmp_path / "b.txt"
    path.write_bytes("first line\r\nsecönd\n\n\nthird\nfourth".encode())
    lines = list(read_plain_text(path, OPTIONS))
    expected = [b"first line", "secönd".encode(), b"third", b"fourth"]
    assert _spans(lines) == expected
    paragraphs = list(read_plain_text(path, ReaderOptions(document="paragraph")))
    assert _spans(paragraphs) == ["first line\r\nsecönd".encode(), b"third\nfourth"]
    (tmp_path / "a").mkdir()
    (tmp_path / "a/c.txt").write_text("x")
    files = list(read_plain_text(tmp_path, ReaderOptions(document="file")))
    assert [item.source for item in files] == ["c.txt file 1", "b.txt file 1"]
    assert len({item.key for item in files}) == 2


def test_plain_text_bad_records(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good\nb\xe9d\n")
    items = list(read_plain_text(tmp_path / "a.txt", OPTIONS))
    assert _reasons(items) == {"a-00000002": "bad-utf8"}
    assert items[1].problem and "byte 6" in items[1].problem.message
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"contains no \*\.txt"):
        list(read_plain_text(tmp_path / "empty", OPTIONS))


def test_csv_with_other_column_names(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('\ufefffile,title\na.png,"one, two"\nb.png,\nc.png\n', encoding="utf-8")
    options = ReaderOptions(columns={"image": "file", "caption": "title"})
    items = list(read_image_table(path, options))
    assert items[0].texts == ("one, two",)
    assert items[0].media == (str(tmp_path / "a.png"),)
    assert _reasons(items) == {"t-00000002": "empty-text", "t-00000003": "bad-record"}
    with pytest.raises(DataError, match=r"no column 'image' \(it has file, title\).*--columns"):
        list(read_image_table(path, OPTIONS))


def test_jsonl_tables(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    rows = [
        {"id": "x y", "audio": "a.wav", "text": "Hello", "speaker": "me", "split": "test"},
        {"audio": "b.wav", "text": "", "split": "test"},
        {"audio": "b.wav", "text": "x", "split": "other"},
        {"text": "x"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    items = list(read_speech_table(path, OPTIONS, "jsonl"))
    assert items[0].metadata["speaker"] == "me"
    assert items[0].declared_split == "test"
    assert items[0].key == clean_key("x y") != "x y"
    assert list(_reasons(items).values()) == ["empty-text", *["bad-record"] * 3]
    assert next(item.texts for item in read_text_table(path, OPTIONS, "jsonl")) == ("Hello",)


def _llava(path: Path, *records: dict) -> list[Item]:
    path.write_text(json.dumps(records))
    return list(read_llava(path, OPTIONS))


def _turns(prompt: str, answer: str, **answer_fields: str) -> dict:
    return {
        "conversations": [
            {"from": "human", "value": prompt},
            {"from": "gpt", "value": answer, **answer_fields},
        ]
    }


def test_llava_placeholders(tmp_path: Path) -> None:
    (item,) = _llava(
        tmp_path / "c.json",
        {
            "id": "1",
            "image": ["d/a.png", "b.png"],
            "audio": "q.wav",
            **_turns("<image>\nor <image>?\n<audio>", "Both.", audio="spoken.wav"),
        },
    )
    kinds = [(part.kind, Path(part.value).name) for part in item.turns[0].parts]
    assert kinds == [
        ("image", "a.png"),
        ("text", "or"),
        ("image", "b.png"),
        ("text", "?"),
        ("audio", "q.wav"),
    ]
    assert [part.kind for part in item.turns[1].parts] == ["text", "audio"]
    assert item.group == "picture:a"  # terms: allow


def test_llava_without_placeholder(tmp_path: Path) -> None:
    (item,) = _llava(tmp_path / "c.json", {"id": "1", "image": "a.png", **_turns("What?", "X")})
    assert [part.kind for part in item.turns[0].parts] == ["image", "text"]


def test_llava_groups(tmp_path: Path) -> None:
    items = _llava(
        tmp_path / "c.json",
        {"id": "1", **_turns("a", "b")},
        {"id": "2", "audio": "x/q.wav", **_turns("<audio>", "b")},
        {"id": "3", "audio": "q.wav", "group": "speech:hello", **_turns("<audio>", "b")},
    )
    assert [item.group for item in items] == ["id:1", "picture:q", "speech:hello"]  # terms: allow


@pytest.mark.parametrize("field", ["type", "split"])
def test_a_name_of_another_type_is_a_bad_record_that_names_the_field(
    field: str, tmp_path: Path
) -> None:
    values: list[object] = [["train"], {"a": 1}, 1.5, True]
    chats = [{"id": str(n), field: value, **_turns("a", "b")} for n, value in enumerate(values)]
    rows = [{"id": str(n), "text": "words", field: value} for n, value in enumerate(values)]
    table = tmp_path / "t.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    texts = list(read_text_table(table, OPTIONS, "jsonl"))
    for items in (_llava(tmp_path / "c.json", *chats), texts):
        problems = [item.problem for item in items]
        assert len(problems) == len(values)
        assert all(p and p.reason == "bad-record" and f"'{field}'" in p.message for p in problems)


def test_zero_is_a_type(tmp_path: Path) -> None:
    items = _llava(tmp_path / "c.json", {"id": "1", "type": 0, **_turns("a", "b")})
    assert items[0].metadata == {"type": "0"}


def test_llava_splits_and_types(tmp_path: Path) -> None:
    items = _llava(
        tmp_path / "c.json",
        {"id": "1", "split": "validation", "type": "how_many", **_turns("a", "b")},
        {"id": "2", **_turns("a", "b")},
        {"id": "3", "split": "other", **_turns("a", "b")},
    )
    assert [item.declared_split for item in items] == ["val", None, None]
    assert [item.metadata for item in items] == [{"type": "how_many"}, {}, {}]
    assert _reasons(items) == {"3": "bad-record"}


def test_llava_bad_records(tmp_path: Path) -> None:
    items = _llava(
        tmp_path / "c.json",
        {"id": "a", **_turns("<image>\nx", "y")},
        {"id": "b", "image": ["1.png", "2.png"], **_turns("<image>\nx", "y")},
        {"id": "c", **_turns("x", " ")},
        {"id": "d", "conversations": [{"from": "robot", "value": "x"}]},
        {"id": "e"},
    )
    assert _reasons(items) == {
        "a": "bad-record",
        "b": "bad-record",
        "c": "empty-text",
        "d": "bad-record",
        "e": "bad-record",
    }
    with pytest.raises(DataError, match="cannot read the LLaVA file"):
        (tmp_path / "d.json").write_text("[{")
        list(read_llava(tmp_path / "d.json", OPTIONS))


def test_messages(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    content = [{"type": "audio", "audio": "a.wav"}, {"type": "text", "text": " Write it. "}]
    rows = [
        {
            "messages": [
                {"role": "system", "content": "Be short."},
                {"role": "user", "content": content},
                {"role": "assistant", "content": "hello"},
            ]
        },
        {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    items = list(read_messages(path, OPTIONS))
    assert [turn.role for turn in items[0].turns] == ["system", "user", "assistant"]
    assert items[0].turns[1].parts[1].value == "Write it."
    assert _reasons(items) == {"m-00000002": "bad-record"}


def test_declared_splits() -> None:
    declared = {
        **{"train-clean-100": "train", "Train_GCC-training.tsv": "train", "train2017": "train"},
        **{"validation": "val", "val2014": "val", "dev.tsv": "val", "test-00000": "test"},
        **{"validated": None, "testament": None, "data": None, "": None},
    }
    assert {name: declared_split(name) for name in declared} == declared


def test_keys() -> None:
    assert clean_key("abc_DEF-9") == "abc_DEF-9"
    for odd in ("a b", "a.b", "日本", "", "x" * 91, "x" * 500, "a/b", "\udcff"):
        key = clean_key(odd)
        assert 0 < len(key) <= 90
        assert key.isascii()
    assert clean_key("a b") != clean_key("a.b")


def test_transcript_groups_ignore_case_and_punctuation() -> None:
    assert transcript_group("Hello,  World!") == transcript_group("HELLO WORLD")
    assert transcript_group("it's") != transcript_group("its")


def test_groups_of_texts_know_marks_and_composition() -> None:
    """Marks belong to words, so texts that differ in them are different."""
    assert transcript_group("की") != transcript_group("का")
    assert transcript_group("कातब मजे") != transcript_group("किताब मेज़")
    assert transcript_group(nfd("Café, don’t!")) == transcript_group("café don't")
    assert text_group(nfd("Äpfel  essen")) == text_group("äpfel essen")
    assert text_group("का") != text_group("की")


@given(st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=126, exclude_characters="`")))
def test_groups_of_ascii_texts_are_those_of_earlier_versions(text: str) -> None:
    words = re.sub(r"[^\w']+", " ", text.lower()).split()
    assert transcript_group(text) == f"speech:{' '.join(words)}"


def test_formats_give_a_document_the_same_group(tmp_path: Path) -> None:
    text = "ÄPFEL\u00a0und नमस्ते"
    (tmp_path / "t.txt").write_text(text + "\n", encoding="utf-8")
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": nfd(text)}) + "\n")
    (plain,) = read_plain_text(tmp_path / "t.txt", ReaderOptions())
    (row,) = read_text_table(tmp_path / "t.jsonl", ReaderOptions(), "jsonl")
    assert plain.group == row.group == text_group(text)


def nfd(text: str) -> str:
    return unicodedata.normalize("NFD", text)
