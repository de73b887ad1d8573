"""Conversations in the forms of other tools: turns, roles, tools, repairs, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.corpus import Item
from data_prep.options import ReaderOptions
from data_prep.readers import find_reader
from data_prep.readers.chat_files import read_chat_files
from muomni.errors import DataError
from tests.data_prep.commands import quarantined, shard
from tests.data_prep.corpus_files import write_file, write_jsonl

U = {"role": "user", "content": "Why?"}
A = {"role": "assistant", "content": "Since it rained."}


def read(
    folder: Path, *records: dict[str, Any], options: ReaderOptions | None = None
) -> list[Item]:
    path = write_file(folder / "chats.json", json.dumps(records))
    return list(read_chat_files(path, options or ReaderOptions(), "chats", "record"))


def turns(item: Item) -> list[tuple[str, str]]:
    assert item.problem is None, item.problem
    return [(turn.role, " | ".join(part.value for part in turn.parts)) for turn in item.turns]


def message(item: Item) -> str:
    assert item.problem is not None
    return item.problem.message


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "Add.", "input": "2 and 3", "output": "5"},
        {"instruction": "Add.", "context": "2 and 3", "response": "5"},
        {"query": "Add.\n2 and 3", "response": "5", "history": [], "system": ""},
        {"prompt": "Add.\n2 and 3", "completion": "5", "tools": "[]"},
        {"input": "Add.\n2 and 3", "output": "5", "instruction": None},
        {"conversations": [{"from": "Human", "value": "Add.\n2 and 3"}, {"from": "chatgpt", "value": "5"}]},
        {"conversation": [{"human": "Add.\n2 and 3", "assistant": "5"}]},
        {"texts": [{"user": "Add.\n2 and 3", "assistant": "5", "source": "sums"}]},
        {"messages": '[{"role": "user", "content": "Add.\\n2 and 3"}, {"role": "assistant", "content": "5"}]'},
        {"messages": [{"role": "user", "content": {"type": "input_text", "text": "Add.\n2 and 3"}},
                      {"role": "model", "content": [{"type": "output_text", "text": "5"}]}]},
        {"prompt": [{"role": "user", "content": "Add.\n2 and 3"}],
         "completion": [{"role": "assistant", "content": "5"}]},
    ],
)  # fmt: skip
def test_one_question_in_every_form(record: dict[str, Any], tmp_path: Path) -> None:
    (item,) = read(tmp_path, record)
    assert turns(item) == [("user", "Add.\n2 and 3"), ("assistant", "5")]


def test_system_and_earlier_rounds(tmp_path: Path) -> None:
    record = {
        "system": "Be kind.", "history": [["One?", "1"], ["Two?", "2"]],
        "query": "Three?", "response": "3",
    }  # fmt: skip
    (item,) = read(tmp_path, record)
    assert turns(item) == [
        ("system", "Be kind."), ("user", "One?"), ("assistant", "1"), ("user", "Two?"),
        ("assistant", "2"), ("user", "Three?"), ("assistant", "3"),
    ]  # fmt: skip


def test_questions_after_the_last_answer_are_dropped_and_counted(tmp_path: Path) -> None:
    open_end = {"id": "open", "messages": [U, A, U]}
    no_answer = {"id": "blank", "messages": [U, A, U, {"role": "assistant", "content": " "}]}
    begun = {"id": "begun", "messages": [A, U, A]}
    items = read(tmp_path, open_end, no_answer, begun, {"messages": [U, A]})
    assert [len(item.turns) for item in items] == [2, 2, 3, 2]
    dropped = [item.metadata.get("dropped_turns") for item in items]
    assert dropped == ["1", "2", None, None]


def test_conversations_without_question_or_answer_are_bad(tmp_path: Path) -> None:
    blank = {"role": "user", "content": ""}
    items = read(tmp_path, {"messages": []}, {"messages": [U]}, {"messages": [A]},
                 {"messages": [U, A, blank, A]}, {"messages": "none"}, {"question": "x"})  # fmt: skip
    assert list(map(message, items)) == [
        "the conversation has no turns",
        "the conversation has no answer",
        "the conversation has no question",
        "a turn of user is empty",
        "the turns are not a list: 'none'",
        "the record has neither a list 'messages' or 'conversations' nor a question and its answer; its fields "
        "are question",
    ]


@pytest.mark.parametrize("empty", ["", "  \n", None, []])
def test_empty_system_turns_are_dropped(empty: object, tmp_path: Path) -> None:
    inside = {"messages": [{"role": "system", "content": empty}, U, A]}
    beside = {"messages": [U, A], "system": empty or ""}
    assert [[turn.role for turn in item.turns] for item in read(tmp_path, inside, beside)] == [
        ["user", "assistant"]
    ] * 2


CALL = {"id": "c1", "type": "function", "function": {"name": "sky", "arguments": '{"at": "noon"}'}}
CALL_TEXT = '{"name": "sky", "arguments": "{\\"at\\": \\"noon\\"}"}'
TOOLS: list[dict[str, Any]] = [
    {"messages": [U, {"role": "assistant", "content": None, "tool_calls": [CALL]},
                  {"role": "tool", "tool_call_id": "c1", "content": "blue"}, A]},
    {"conversations": [{"from": "human", "value": "Why?"},
                       {"from": "function_call", "value": CALL_TEXT},
                       {"from": "observation", "value": "blue"},
                       {"from": "gpt", "value": "Since it rained."}]},
]  # fmt: skip


@pytest.mark.parametrize("record", TOOLS)
def test_tool_turns_are_kept_as_text(record: dict[str, Any], tmp_path: Path) -> None:
    (item,) = read(tmp_path, record)
    assert turns(item) == [
        ("user", "Why?"), ("assistant", CALL_TEXT),
        ("user", "blue"), ("assistant", "Since it rained."),
    ]  # fmt: skip
    (item,) = read(tmp_path, {**record, "tools": [{"name": "sky"}]})
    assert turns(item)[0] == ("system", '[{"name": "sky"}]')


def test_tool_turns_are_rejected_on_request(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "chats.jsonl", [*TOOLS, {"id": "plain", "messages": [U, A]}])
    options = ("--tool-turns", "reject", "--max-bad-fraction", "1")
    manifest = shard("sft", "openai", path, tmp_path / "out", *options)
    assert manifest.split("train").num_samples == 1
    assert set(quarantined(tmp_path / "out").values()) == {"tool-turn"}


def test_roles_parts_and_losses_that_are_not_supported(tmp_path: Path) -> None:
    part = [{"type": "refusal", "refusal": "no"}]
    items = read(
        tmp_path,
        {"messages": [{"role": "critic", "content": "x"}, A]},
        {"messages": [{"content": "x"}, A]},
        {"messages": [{"role": "user", "content": part}, A]},
        {"messages": [U, {**A, "weight": 0}]},
        {"messages": [{"role": "user", "content": 5}, A]},
        {"instruction": "x", "output": ["a", "b"]},
        {"query": "x", "response": "y", "history": [["only one"]]},
        {"messages": [U, A], "id": ["a"]},
    )
    expected = ["the role 'critic'", "no role", "'refusal'", "excluded from the loss",
                "'content' is not a text", "a turn is not an object", "'history' is not a question",
                "'id' is a list"]  # fmt: skip
    for item, text in zip(items, expected, strict=True):
        assert text in message(item) and item.problem and item.problem.reason == "bad-record"


def test_ids_are_names_and_zero_is_one(tmp_path: Path) -> None:
    items = read(tmp_path, *({"id": name, "messages": [U, A]} for name in (0, 1.0, "a", None)))
    assert [item.key for item in items] == ["0", "1", "a", "chats-00000003"]
    items = read(tmp_path, {"group": 0, "messages": [U, A]}, {"type": 0, "messages": [U, A]})
    assert (items[0].group, items[1].metadata) == ("0", {"type": "0"})


def test_columns_name_other_fields_and_win(tmp_path: Path) -> None:
    columns = {"messages": "dialog", "image": "shot"}
    record = {"dialog": [U, A], "messages": "of another tool", "shot": "a.png", "image": "b.png"}
    (item,) = read(tmp_path, record, options=ReaderOptions(columns=columns))
    assert [Path(part.value).name for part in item.turns[0].parts] == ["a.png", "Why?"]


def test_folders_of_files_that_declare_splits(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "src/train-0.jsonl", [{"messages": [U, A]}])
    write_jsonl(tmp_path / "src/deep/validation.jsonl.gz", [{"messages": [U, A]}] * 2)
    write_file(tmp_path / "src/notes.md", "no data")
    options = ReaderOptions()
    items = list(find_reader("sft", "jsonl")(tmp_path / "src", options))
    assert [(item.key.rpartition("-")[0][:10], item.declared_split) for item in items] == [
        ("deep-valid", "val"), ("deep-valid", "val"), ("train-0", "train"),
    ]  # fmt: skip
    assert options.skipped.others == {".md": 1}
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"none contains no \.jsonl or"):
        list(find_reader("sft", "jsonl")(tmp_path / "none", options))
