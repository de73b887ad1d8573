"""Write the tables of docs/config_keys.md from the typed configs, recipes, and registry.

    python scripts/config_table.py --write    # replace the text between the markers
    python scripts/config_table.py --check    # exit with 1 if the page is out of date

A default is that of the recipes if they agree. Does not import torch.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from muomni.config.loading import read_yaml
from muomni.config.registry import STAGES, StageSpec
from muomni.config.run import RunConfig
from scripts.generated_page import GeneratedPage

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "config_keys.md"
HEADER = ("| key | type | default | meaning |", "|---|---|---|---|")
# Set by command-line options, not by keys.
NOT_KEYS = ("stage", "preset")
REQUIRED = "required"
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def render() -> str:
    """All tables, as Markdown."""
    stages = list(STAGES.values())
    lines = ["## Top level", "", *HEADER]
    own = {
        name: field
        for name, field in RunConfig.model_fields.items()
        if name not in NOT_KEYS and section_of(field.annotation) is None
    }
    lines += [row(name, field, stages, default_of(field)) for name, field in own.items()]
    for name, field in RunConfig.model_fields.items():
        if section_of(field.annotation) is not None:
            for title, section, users in variants(name, stages):
                lines += ["", f"## {title}", "", *HEADER, *rows(section, f"{name}.", users)]
    return "\n".join(lines)


def variants(
    name: str, stages: Sequence[StageSpec]
) -> Iterator[tuple[str, type[BaseModel], list[StageSpec]]]:
    """The types that a section has, each with its heading and the stages that use it."""
    users: dict[type[BaseModel], list[StageSpec]] = {}
    for spec in stages:
        section = section_of(spec.config.model_fields[name].annotation)
        assert section is not None
        if section.model_fields:
            users.setdefault(section, []).append(spec)
    for section, specs in users.items():
        is_shared = len(specs) == len(stages)
        names = ", ".join(spec.name for spec in specs)
        yield (name if is_shared else f"{name} ({names})"), section, specs


def rows(
    section: type[BaseModel],
    prefix: str,
    stages: Sequence[StageSpec],
    default: BaseModel | None = None,
) -> Iterator[str]:
    """One row per key, nested sections flattened; `default` is the default value of the section."""
    for name, field in section.model_fields.items():
        inner, key = section_of(field.annotation), f"{prefix}{name}"
        value = default_of(field) if default is None else getattr(default, name)
        if inner is None:
            yield row(key, field, stages, value)
        elif inner.__name__.endswith("Overrides"):
            yield f"| `{key}.*` | section | | sizes of this part that differ from the preset |"
        else:
            if NoneType in get_args(field.annotation):
                text = "`null`" if value is None else "on"
                yield f"| `{key}` | section or null | {text} | {field.description or ''} |"
            yield from rows(inner, f"{key}.", stages, value if isinstance(value, inner) else None)


def row(key: str, field: FieldInfo, stages: Sequence[StageSpec], default: Any) -> str:
    """One row of a table."""
    kind = type_text(field.annotation, bounds(field.metadata))
    texts = {value_text(recipe_value(key, default, spec)) for spec in stages}
    cells = [f"`{key}`", kind, texts.pop() if len(texts) == 1 else "by stage"]
    cells.append(field.description or "")
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def default_of(field: FieldInfo) -> Any:
    """The default of a field, or `REQUIRED`."""
    return REQUIRED if field.is_required() else field.get_default(call_default_factory=True)


def recipe_value(key: str, default: Any, stage: StageSpec) -> Any:
    """The value of a key in a recipe, or `default`."""
    found: Any = read_yaml(stage.recipe)
    for part in key.split("."):
        if not isinstance(found, dict) or part not in found:
            return default
        found = found[part]
    return found


def value_text(value: Any) -> str:
    """A value as in YAML."""
    if value is REQUIRED:
        return REQUIRED
    if value is None or isinstance(value, bool):
        return f"`{str(value).lower() if value is not None else 'null'}`"
    if isinstance(value, (list, tuple)):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value}`"


def type_text(annotation: Any, limits: str = "") -> str:
    """A type in words, such as `int > 0 or null`."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_text(inner[0], bounds(inner[1:]))
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (Union, UnionType):
        texts = [type_text(option, limits) for option in inner if option is not NoneType]
        return " or ".join(texts + ["null"] * (NoneType in inner))
    if origin is tuple:
        return f"list of {type_text(inner[0])}"
    if origin is dict:
        return f"mapping to {type_text(inner[1])}"
    names = {str: "string", Any: "any"}
    return names.get(annotation, getattr(annotation, "__name__", "")) + limits


def bounds(metadata: Sequence[Any]) -> str:
    """The numeric bounds of a field, such as ` > 0`."""
    found = []
    for item in metadata:
        if isinstance(item, FieldInfo):
            found.append(bounds(item.metadata).strip())
        found += [
            f"{sign} {_limit(getattr(item, name))}"
            for name, sign in BOUNDS.items()
            if hasattr(item, name)
        ]
    return f" {', '.join(found)}" if found else ""


def _limit(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, also if it is optional; None for a plain value."""
    for option in get_args(annotation) or (annotation,):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


def all_keys() -> set[str]:
    """Every key of the tables, including those of sections that may be null."""
    return set(re.findall(r"^\| `([a-z_0-9.]+)` \|", render(), re.MULTILINE))


GENERATED = GeneratedPage(PAGE, "keys", "scripts/config_table.py", render)

if __name__ == "__main__":
    GENERATED.main(__doc__)
