"""Tables as people have them: other names, types, quotation marks, folders; nothing is falsified or lost."""

import bz2
import csv
import gzip
import io
import json
import lzma
import math
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from data_prep.corpus import Item
from data_prep.options import ReaderOptions
from data_prep.readers import find_reader
from muomni.errors import ConfigError, DataError
from tests.data_prep.commands import Capture, fails, quarantined, shard
from tests.data_prep.corpus_files import write_file, write_jsonl
from tests.data_prep.raw_corpora import audio, image

TEXTS = ["One morning.", "Two cats, one dog.", 'A "quoted" word.']


def read(task: str, form: str, src: Path, **options: object) -> list[Item]:
    return list(find_reader(task, form)(src, ReaderOptions(**options)))  # type: ignore[arg-type]


def texts(items: list[Item]) -> list[str]:
    return [text for item in items for text in item.texts]


def messages(items: list[Item]) -> list[str]:
    return [item.problem.message for item in items if item.problem]


def _lines() -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def _list() -> bytes:
    return json.dumps([{"text": text} for text in TEXTS], indent=2).encode()


def _csv(delimiter: str) -> bytes:
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter).writerows([["text"], *([text] for text in TEXTS)])
    return file.getvalue().encode()


def _zstd(data: bytes) -> bytes:
    return pyarrow.compress(data, codec="zstd", asbytes=True)


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress, _zstd])
@pytest.mark.parametrize("name", ["t.csv", "t.TSV", "t.txt", "t", "part.00000-of-00002.json.gz"])
@pytest.mark.parametrize(
    ("form", "content"), [("jsonl", _lines()), ("jsonl", _list()), ("csv", _csv(","))]
)
def test_the_format_decides_and_the_content_tells_the_compression(
    tmp_path: Path, form: str, content: bytes, name: str, pack: Callable[[bytes], bytes]
) -> None:
    src = write_file(tmp_path / name, pack(content))
    assert texts(read("text", form, src)) == TEXTS


def test_a_folder_of_tables_is_its_tables(tmp_path: Path) -> None:
    for number, name in enumerate(("b.jsonl", "a/x.JSONL.gz", "a/y.ndjson", "train/z.jsonl")):
        data = json.dumps({"text": f"text {number}"}).encode()
        write_file(tmp_path / name, gzip.compress(data) if name.endswith("gz") else data)
    write_file(tmp_path / "a/settings.json", '{\n"text": "not a row"\n}')
    write_file(tmp_path / "a/._x.jsonl", b"\0\1")
    options = ReaderOptions()
    items = list(find_reader("text", "jsonl")(tmp_path, options))
    assert texts(items) == ["text 1", "text 2", "text 0", "text 3"]
    assert [item.declared_split for item in items] == [None, None, None, "train"]
    assert len({item.key for item in items}) == 4
    assert (
        ".json 1" in options.skipped.report() and "1 that are not data" in options.skipped.report()
    )


def test_json_files_are_the_tables_of_a_folder_without_json_lines(tmp_path: Path) -> None:
    write_file(tmp_path / "c4.00000.json.gz", gzip.compress(_lines()))
    assert texts(read("text", "jsonl", tmp_path)) == TEXTS
    with pytest.raises(DataError, match=r"contains no \.csv file \(files not read: .*\.gz 1"):
        read("text", "csv", tmp_path)


def test_a_hub_folder_is_read_with_the_splits_of_its_subfolders(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for number in range(2):
            write_file(tmp_path / split / f"{number}.wav", audio(number))
        rows = "".join(f"{n}.wav,{split} {n}\n" for n in range(2))
        write_file(tmp_path / split / "metadata.csv", "file_name,transcription\n" + rows)
    every = "".join(f"{s}/{n}.wav,{s} {n}\n" for s in ("train", "test") for n in range(2))
    write_file(tmp_path / "metadata.csv", "file_name,transcription\n" + every + "extra.wav,more\n")
    columns = {"audio": "file_name", "text": "transcription"}
    items = read("speech", "csv", tmp_path, columns=columns)
    assert {item.texts[0]: item.declared_split for item in items} == {
        **{"train 0": "train", "train 1": "train", "test 0": "test", "test 1": "test", "more": None}
    }
    assert len(items) == 5
    assert all(Path(str(item.media[0])).is_file() for item in items if item.texts != ("more",))


@pytest.mark.parametrize("order", [["text", "title"], ["title", "text"]])
def test_a_mapped_column_wins_over_one_of_the_standard_name(
    tmp_path: Path, order: list[str]
) -> None:
    row = {"text": "wrong", "title": "right"}
    table = ",".join(order) + "\n" + ",".join(row[name] for name in order) + "\n"
    lines = json.dumps({name: row[name] for name in order})
    arrow = pyarrow.table({name: [row[name]] for name in order})
    pyarrow.parquet.write_table(arrow, tmp_path / "t.parquet")
    columns = {"text": "title"}
    csv_src = write_file(tmp_path / "t.csv", table)
    json_src = write_file(tmp_path / "t.jsonl", lines)
    assert texts(read("text", "csv", csv_src, columns=columns)) == ["right"]
    assert texts(read("text", "jsonl", json_src, columns=columns)) == ["right"]
    manifest = shard(
        "text", "parquet", tmp_path / "t.parquet", tmp_path / "out", "--columns", "text=title"
    )
    assert manifest.split("train").totals.num_chars == len("right")


def test_one_column_may_serve_under_two_names(tmp_path: Path) -> None:
    src = write_file(tmp_path / "t.csv", "file,text\na.wav,hello\n")
    (item,) = read("speech", "csv", src, columns={"audio": "file", "id": "file"})
    assert item.key.startswith("a-wav") and item.media == (str(tmp_path / "a.wav"),)


def test_a_mapped_column_must_exist_and_its_name_be_known(tmp_path: Path) -> None:
    src = write_file(tmp_path / "t.csv", "text,who\nhello,0\n")
    with pytest.raises(DataError, match="no column 'speaker_id'"):
        read("text", "csv", src, columns={"speaker": "speaker_id"})
    with pytest.raises(ConfigError, match=r"'txt' is not one of text, id"):
        read("text", "csv", src, columns={"txt": "text"})
    with pytest.raises(DataError, match=r"no column 'body' \(it has text\)"):
        src = write_jsonl(tmp_path / "t.jsonl", [{"text": "a"}] * 3)
        read("text", "jsonl", src, columns={"text": "body"})


def test_rows_without_a_column_are_bad_rows(tmp_path: Path) -> None:
    src = write_jsonl(tmp_path / "t.jsonl", [{"meta": 1}, {"text": "good"}, {"content": "bad"}])
    items = read("text", "jsonl", src)
    assert texts(items) == ["good"]
    assert messages(items) == [
        "the row has no 'text' (it has meta)",
        "the row has no 'text' (it has content)",
    ]


def test_fields_of_objects_are_columns(tmp_path: Path) -> None:
    rows = [{"doc": {"body": {"en": "inside"}}, "doc.id": "x"}]
    src = write_jsonl(tmp_path / "t.jsonl", rows)
    columns = {"text": "doc.body.en", "id": "doc.id"}
    (item,) = read("text", "jsonl", src, columns=columns)
    assert (item.key, item.texts) == ("x", ("inside",))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    manifest = shard(
        "text", "parquet", tmp_path / "t.parquet", tmp_path / "out", "--columns", "text=doc.body.en"
    )
    assert manifest.split("train").totals.num_chars == len("inside")


def test_an_option_that_a_format_ignores_is_refused(tmp_path: Path, capsys: Capture) -> None:
    src, out = str(write_file(tmp_path / "t.txt", "a\n")), str(tmp_path / "out")
    command = ("text", "--format", "txt", "--src", src, "--out", out)
    for option, value in (("--columns", "text=a"), ("--quotes", "no"), ("--delimiter", ";")):
        assert f"{option} applies to --format" in fails(capsys, *command, option, value, code=2)


_SENTENCES = [
    "Good.",
    '"Leave me alone',
    "he said.",
    'It is "home".',
    '"Done," she said.',
    'The end."',
]


def _table(delimiter: str) -> str:
    rows = (f"{number}.wav{delimiter}{text}\n" for number, text in enumerate(_SENTENCES))
    return f"audio{delimiter}text\n" + "".join(rows)


def test_quotation_marks_of_tsv_are_text(tmp_path: Path) -> None:
    src = write_file(tmp_path / "t.tsv", _table("\t"))
    assert texts(read("speech", "tsv", src)) == _SENTENCES
    items = read("speech", "csv", src, delimiter="\t", quotes="no")
    assert texts(items) == _SENTENCES


def test_tsv_that_was_written_with_quotation_marks_is_noticed(tmp_path: Path) -> None:
    src = write_file(tmp_path / "t.tsv", 'text\tid\n"He said ""no""."\ta\n"Whole."\tb\n')
    items = read("text", "tsv", src)
    assert texts(items) == ['"Whole."']
    assert "--quotes yes" in messages(items)[0]
    assert texts(read("text", "tsv", src, quotes="yes")) == ['He said "no".', "Whole."]
    assert texts(read("text", "tsv", src, quotes="no")) == ['"He said ""no""."', '"Whole."']
    src = write_file(tmp_path / "all.tsv", '"text"\t"id"\n"a"\t"b"\n')
    with pytest.raises(DataError, match="--quotes yes"):
        read("text", "tsv", src)


def test_an_unclosed_quotation_mark_in_csv_costs_one_row(tmp_path: Path) -> None:
    items = read("speech", "csv", write_file(tmp_path / "t.csv", _table("|")), delimiter="|")
    assert [text for text in _SENTENCES if text not in texts(items)] == [
        '"Leave me alone',
        '"Done," she said.',
    ]
    assert all(
        f"line {number}" in message for number, message in zip((3, 6), messages(items), strict=True)
    )


def test_a_quotation_mark_that_closes_rows_later_costs_one_row(tmp_path: Path) -> None:
    rows = ["1.png,a cat", '2.png,"a dog', "3.png,a cow", '4.png,the end"', "5.png,a hen"]
    src = write_file(tmp_path / "t.csv", "\n".join(["image,caption", *rows, ""]))
    items = read("image-caption", "csv", src)
    assert texts(items) == ["a cat", "a cow", 'the end"', "a hen"]
    assert "line 3: a quoted field contains what looks like the next rows" in messages(items)[0]


def test_a_quotation_mark_that_is_never_closed_costs_one_row(tmp_path: Path) -> None:
    src = write_file(tmp_path / "t.csv", 'text\n"open\n' + "more\n" * 3)
    items = read("text", "csv", src)
    assert texts(items) == ["more"] * 3
    assert "line 2: a quotation mark is never closed" in messages(items)[0]


@pytest.mark.parametrize(
    "rows",
    [
        [["1", "one\ntwo"], ["2", "three"]],
        [["1", "one\ntwo, end"], ["2", "three\r\n\r\nfour, five\nsix"]],
        [["1", 'He said "one,\ntwo"'], ["2", "\n"]],
    ],
)
def test_quoted_fields_may_have_several_lines(tmp_path: Path, rows: list[list[str]]) -> None:
    file = io.StringIO()
    csv.writer(file).writerows([["id", "text"], *rows])
    src = write_file(tmp_path / "t.csv", file.getvalue())
    items = read("text", "csv", src)
    assert texts(items) == [text for _, text in rows if text.strip()]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("text,id\rone,1\rtwo,2\r", ["one", "two"]),
        ("sep=;\r\ntext;id\r\none, two;1\r\n", ["one, two"]),
        (" id , text\n1,one\n", ["one"]),
        ("id,text,\n1,one,\n", ["one"]),
        ("\ufeffid,text\n\n1,one\n\n", ["one"]),
        ('id,text\n1,5" screen\n', ['5" screen']),
    ],
)
def test_csv_of_other_programs(tmp_path: Path, content: str, expected: list[str]) -> None:
    items = read("text", "csv", write_file(tmp_path / "t.csv", content))
    assert texts(items) == expected and not messages(items)


def test_headers_that_cannot_be_used(tmp_path: Path) -> None:
    src = write_file(tmp_path / "t.csv", "text;id\none;1\n")
    with pytest.raises(DataError, match="separated by ';', for --delimiter"):
        read("text", "csv", src)
    assert texts(read("text", "csv", src, delimiter=";")) == ["one"]
    with pytest.raises(DataError, match="names 'text' twice"):
        read("text", "csv", write_file(tmp_path / "t.csv", "text,id,text\na,b,c\n"))


def test_values_of_other_types_are_refused(tmp_path: Path) -> None:
    rows = [["a", "b"], {"en": "a"}, 7, 0, True, None, math.nan, "x" * 200, "words"]
    items = read(
        "text", "jsonl", write_jsonl(tmp_path / "t.jsonl", [{"text": row} for row in rows])
    )
    assert texts(items) == ["x" * 200, "words"]
    assert [item.problem.reason for item in items if item.problem] == ["bad-record"] * 5 + [
        "empty-text"
    ] * 2
    assert "'text' is a struct of en, not a text" in messages(items)[1]


def test_captions_are_a_text_or_a_list(tmp_path: Path) -> None:
    captions = ["one", ["one", None, "two"], [["nested"]], [], [{"raw": "one"}]]
    rows = [{"image": f"{n}.png", "caption": caption} for n, caption in enumerate(captions)]
    items = read("image-caption", "jsonl", write_jsonl(tmp_path / "t.jsonl", rows))
    assert [item.texts for item in items] == [("one",), ("one", "two"), (), (), ()]
    assert "a list, not a text" in messages(items)[0] and "a struct of raw" in messages(items)[2]


def test_zero_is_a_value(tmp_path: Path) -> None:
    names = {"id": 0, "speaker": 0, "group": 0, "type": 0, "language": 0}
    rows = [
        {"audio": "a.wav", "text": "words", **names},
        {"audio": "b.wav", "text": "x", "speaker": None},
    ]
    items = read("tts", "jsonl", write_jsonl(tmp_path / "t.jsonl", rows))
    assert (items[0].key, items[0].group) == ("0", "0")
    assert items[0].metadata == {"speaker": "0", "language": "0", "type": "0"}
    assert items[1].metadata["speaker"] == ""
    table = pyarrow.table({"audio": ["a.wav"], "text": ["words"], "speaker": [0.0]})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    (item,) = read("tts", "parquet", tmp_path / "t.parquet", group_by="speaker")
    assert item.metadata["speaker"] == "0" and item.group == "speaker:0"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([["a", "b"]], "is list<element: string>, not a text"),
        (
            [{"de": "Tag", "en": "day"}],
            "has the fields de, en, not a text; select a field with --columns text=text.de",
        ),
        ([1, 2], "is int64, not a text"),
        ([[{"role": "user"}]], "not a text"),
    ],
)
def test_parquet_columns_of_other_types_are_refused(
    tmp_path: Path, values: list[object], words: str
) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), tmp_path / "t.parquet")
    with pytest.raises(DataError) as error:
        read("text", "parquet", tmp_path / "t.parquet")
    assert words in str(error.value) and "--columns text=" in str(error.value)


@pytest.mark.parametrize("kind", ["binary", "large_string", "dictionary"])
def test_other_types_of_text_in_parquet(tmp_path: Path, kind: str) -> None:
    values = pyarrow.array(["één", "één", None])
    column = values.dictionary_encode() if kind == "dictionary" else values.cast(kind)
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "t.parquet")
    out = tmp_path / "out"
    manifest = shard("text", "parquet", tmp_path / "t.parquet", out, "--max-bad-fraction", "1")
    assert manifest.split("train").totals.num_chars == 6
    assert quarantined(out) == {"t-00000003": "empty-text"}


def test_binary_that_is_not_utf8_is_a_bad_row(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(
        pyarrow.table({"text": [b"good", b"\xff\xfe"]}), tmp_path / "t.parquet"
    )
    items = read("text", "parquet", tmp_path / "t.parquet")
    assert [item.problem and item.problem.reason for item in items] == [None, "bad-utf8"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "one"},', "goes on after its JSON value: ','"),
        ('{"text": "one"}{"text": "two"}', 'goes on after its JSON value: \'{"text": "two"}\''),
        ("{'text': 'one'}", "Expecting property name enclosed in double quotes"),
        ('{"text": "cut', "Unterminated string"),
        ("{", "several lines; write one object per line"),
        ("7", "not a JSON object: 7"),
        ('"' + "x" * 10_000 + '"', "not a JSON object: 'xxx"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_lines_that_are_not_objects(tmp_path: Path, line: str, words: str) -> None:
    src = write_file(tmp_path / "t.jsonl", f'{{"text": "good"}}\n{line}\n{{"text": "fine"}}\n')
    items = read("text", "jsonl", src)
    assert texts(items) == ["good", "fine"]
    (message,) = messages(items)
    assert words in message and len(message) < 220


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('[{"text": "a"},\n{"text": }]', "line 2: Expecting value"),
        ('[{"text": "a"}\n{"text": "b"}]', "line 2: expected , or ] instead of '{'"),
        ('[{"text": "a"},\n', "line 2: Expecting value"),
        ('[{"text": "a"}]\n[{"text": "b"}]', "line 2: there is more after the list"),
    ],
)
def test_a_broken_list_names_the_line(tmp_path: Path, content: str, words: str) -> None:
    with pytest.raises(DataError, match=r"t\.json") as error:
        read("text", "jsonl", write_file(tmp_path / "t.json", content))
    assert words in str(error.value)


def test_entries_of_a_list_that_are_not_objects_are_bad_rows(tmp_path: Path) -> None:
    src = write_file(tmp_path / "t.json", ' \n[ ["a"], {"text": "good"},null , 12]\n\n')
    items = read("text", "jsonl", src)
    assert texts(items) == ["good"] and len(messages(items)) == 3


def test_a_list_longer_than_the_blocks_in_which_it_is_read(tmp_path: Path) -> None:
    rows = [{"text": f"{number} " + "é" * 50_000} for number in range(50)]
    src = write_file(tmp_path / "t.json", json.dumps(rows, ensure_ascii=False))
    assert texts(read("text", "jsonl", src)) == [row["text"] for row in rows]


def test_media_that_are_not_paths_are_refused_in_short_sentences(tmp_path: Path) -> None:
    values = [
        "https://example.org/a.png",
        "data:image/png;base64," + "A" * 9999,
        ["a.png"],
        {"bytes": "x"},
        "",
    ]
    rows = [{"image": value, "caption": "a cat"} for value in values]
    items = read("image-caption", "jsonl", write_jsonl(tmp_path / "t.jsonl", rows))
    assert [item.problem and item.problem.reason for item in items] == ["bad-record"] * 5
    assert max(map(len, messages(items))) < 200


def test_media_are_found_as_others_write_them(tmp_path: Path) -> None:
    write_file(tmp_path / "img/a.PNG", image(1))
    write_file(tmp_path / "b.png", image(2))
    names = [
        "img\\a.PNG",
        "img/a.png",
        "img/a",
        f"file://{tmp_path}/b.png",
        "/home/x/data/img/a.PNG",
    ]
    rows = [{"id": n, "image": name, "caption": "a cat"} for n, name in enumerate(names)]
    src = write_jsonl(tmp_path / "t.jsonl", rows)
    manifest = shard("image-caption", "jsonl", src, tmp_path / "out")
    assert manifest.split("train").num_samples == len(names)


def test_bytes_that_are_not_utf8_anywhere_are_a_bad_row(tmp_path: Path) -> None:
    header = ["id", "audio", "text", "speaker", "language", "split", "type", "group"]
    rows = [[f"r{number}", "a.wav", "words", "s", "en", "train", "t", "g"] for number in range(9)]
    for number in range(8):
        rows[number][number] = "\udcff"
    table = "\n".join(map(",".join, [header, *rows]))
    src = write_file(tmp_path / "t.csv", table.encode(errors="surrogateescape"))
    write_file(tmp_path / "a.wav", audio(1))
    manifest = shard("tts", "csv", src, tmp_path / "out", "--max-bad-fraction", "1")
    assert manifest.split("train").num_samples == 1
    reasons = list(quarantined(tmp_path / "out").values())
    assert len(reasons) == 8 and set(reasons) == {"bad-utf8", "bad-record", "missing-media"}
