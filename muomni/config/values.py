"""Values as users write them in YAML files and `key=value` overrides, and the types of config fields.

Scalars follow the core schema of YAML 1.2: numbers are decimal, `3e-4` is a number, and `010`, `1_000`, `yes`,
and dates are texts. PyYAML implements YAML 1.1, where they are 8, 1000, true, and a date.
"""

import re
from typing import Annotated, Any, ClassVar

import yaml
from pydantic import AfterValidator, Field, Strict

from muomni.errors import ConfigError
from muomni.io.paths import absolute

_MAX_INT = 2**31 - 1
_INTEGER = r"[-+]?(?:0|[1-9][0-9]{0,17})"
_FLOAT = r"[-+]?(?:(?:0|[1-9][0-9]*)?\.[0-9]+|(?:0|[1-9][0-9]*)\.?)(?:[eE][-+]?[0-9]+)?"
_INFINITE = r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
_NULLS = ("null", "Null", "NULL", "~", "")
# A value of these starts is a YAML list, mapping, or quoted text, not a plain scalar.
_STRUCTURED = ("[", "{", '"', "'")


def _moderate(value: int) -> int:
    if value > _MAX_INT:
        raise ValueError(f"it must be at most {_MAX_INT}")
    return value


Positive = Annotated[int, Field(gt=0), AfterValidator(_moderate)]
Count = Annotated[int, Field(ge=0), AfterValidator(_moderate)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PathText = Annotated[str, AfterValidator(absolute)]
# YAML has lists, not tuples.
FromList = Strict(False)


class CoreLoader(yaml.SafeLoader):
    """Safe YAML with the core schema; rejects duplicate keys (plain YAML keeps the last one)."""

    yaml_implicit_resolvers: ClassVar[dict[Any, Any]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key '{key.value}' occurs twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("null", "|".join(map(re.escape, _NULLS)), ["n", "N", "~", ""]),
    ("bool", "true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", _INTEGER, list("-+0123456789")),
    ("float", f"(?=.*[.eE])(?:{_FLOAT}|{_INFINITE})", list("-+.0123456789")),
    ("merge", "<<", ["<"]),
):
    CoreLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first
    )


def parse_value(text: str, is_text: bool = False) -> Any:
    """Parse the value of a `key=value` override; with `is_text`, the field holds a text, such as a path.

    A plain scalar may contain any character (`#`, `: `); a text is taken literally, except `null`. Raises
    ConfigError for a malformed list, mapping, or quoted text.
    """
    stripped = text.strip()
    if not stripped.startswith(_STRUCTURED):
        if is_text:
            return None if stripped in _NULLS[:3] else stripped
        stripped = _scalar_document(stripped)
    try:
        return yaml.load(stripped, CoreLoader)
    except (yaml.YAMLError, ValueError):
        raise ConfigError(f"'{text}' is not a valid value; quote it") from None


def _scalar_document(text: str) -> str:
    """YAML whose content is the scalar `text`: plain if it has a type of its own, else quoted."""
    is_typed = any(
        pattern.match(text) for _, pattern in CoreLoader.yaml_implicit_resolvers.get(text[:1], ())
    )
    return text if is_typed else "'" + text.replace("'", "''") + "'"
