"""docs/config_keys.md is current, and its tables describe types and defaults."""

from typing import Literal

import pytest
from pydantic import Field

from muomni.config.models import Positive, Section
from muomni.config.registry import STAGES
from scripts.config_table import GENERATED, all_keys, rows, type_text


def test_page_is_current() -> None:
    page = GENERATED.path.read_text(encoding="utf-8")
    assert GENERATED.updated(page) == page, "run: python scripts/config_table.py --write"


def test_all_keys() -> None:
    keys = all_keys()
    assert {
        "seed",
        "optim.lr",
        "batch.micro_seconds",
        "model.moe",
        "options.spec_augment.max_channels",
    } <= keys
    assert not {"stage", "preset", "optim", "batch.size"} & keys


class Inner(Section):
    size: Positive
    rate: float = Field(default=0.5, ge=0, lt=1, description="a | b")


class Outer(Section):
    inner: Inner = Inner(size=3)
    kind: Literal["x", "y"] | None = None


def test_rows_flatten_nested_sections_and_use_their_default() -> None:
    assert list(rows(Outer, "o.", [STAGES["codec"]])) == [
        "| `o.inner.size` | int > 0 | `3` |  |",
        "| `o.inner.rate` | float ≥ 0, < 1 | `0.5` | a \\| b |",
        "| `o.kind` | `x`, `y` or null | `null` |  |",
    ]


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (Positive | None, "int > 0 or null"),
        (tuple[str, ...], "list of string"),
        (dict[str, Positive], "mapping to int > 0"),
        (bool | int | str, "bool or int or string"),
    ],
)
def test_types(annotation: object, text: str) -> None:
    assert type_text(annotation) == text


def test_markers_are_required() -> None:
    with pytest.raises(SystemExit, match="lacks the lines"):
        GENERATED.updated("# Config keys\n")
