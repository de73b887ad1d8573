"""Build a validated `RunConfig` from YAML files and `key=value` overrides.

Later sources win: the stage's recipe, the preset, the user's file, the command line. The `config.yaml` of a run
is complete, so it replaces recipe and preset. An unknown key or a wrong type is a one-sentence `ConfigError`
that names the key, its source, and a suggestion.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from muomni.config.names import PRESETS, preset_names
from muomni.config.registry import stage_spec
from muomni.config.run import RunConfig
from muomni.config.values import CoreLoader, parse_value
from muomni.errors import ConfigError, did_you_mean

# Keys of earlier versions and their new names, for the error message. The first one that the stage has applies.
RENAMED_KEYS = {
    "batch.size": ("batch.seq_len", "batch.micro_seconds", "batch.micro_samples"),
    "batch.rows": ("batch.micro_sequences",),
    "batch.batch_size": ("batch.micro_sequences", "batch.micro_samples"),
    "batch.max_seconds": ("batch.micro_seconds",),
    "batch.micro_batches_per_step": (
        "batch.global_tokens",
        "batch.global_seconds",
        "batch.global_samples",
    ),
    "data.stream.samples_per_batch": ("data.stream.samples_per_micro_batch",),
    "data.max_bad_samples": ("data.max_bad_fraction",),
    "training.validate_batches": ("training.validate_samples",),
    "batch.window": ("batch.shuffle_window",),
    "model.frames_per_letter": ("model.frames_per_character",),
    "model.talker.frames_per_letter": ("model.talker.frames_per_character",),
    "model.moe.normalise_top_k": ("model.moe.normalize_top_k",),  # codespell:ignore
    "model.thinker.moe.normalise_top_k": ("model.thinker.moe.normalize_top_k",),  # codespell:ignore
}

# The section of a run's `config.yaml` that records facts about the run; it has no settings.
RESOLVED = "resolved"
DEFAULT_PRESET = "nano"
_MAX_SHOWN = 80
# What the user should write, by pydantic's type of error.
_REMEDIES = {
    "int_type": "write an integer in decimal digits, without leading zeros",
    "float_type": "write a number, such as 0.5 or 3e-4",
    "finite_number": "write a finite number",
    "bool_type": "write true or false",
    "string_type": "write text; in YAML, quote a number that is meant as text",
    "tuple_type": "write a list, such as [a, b]",
    "dict_type": "write a mapping, such as {a: 1}",
    "model_type": "write its keys, as in section.key=value",
}

Model = TypeVar("Model", bound=BaseModel)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping; raises ConfigError if it is missing, malformed, or not a mapping."""
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist; check the path")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), CoreLoader)
    except OSError as error:
        raise ConfigError(f"cannot read config file {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"config file {path} is not valid YAML ({reason})") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(
            f"config file {path} must contain a mapping, not a {type(content).__name__}"
        )
    return content


def merge(base: dict[str, Any], update: dict[str, Any]) -> dict[str, Any]:
    """Return a recursive merge in which `update` wins; neither argument is modified."""
    merged = dict(base)
    for key, value in update.items():
        old = merged.get(key)
        merged[key] = (
            merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
        )
    return merged


def parse_override(text: str, config: type[RunConfig] = RunConfig) -> dict[str, Any]:
    """Parse `a.b=c` into `{"a": {"b": c}}`; a field of `config` that holds text takes the value literally."""
    key, separator, value = text.partition("=")
    path = key.split(".")
    if not separator or key.startswith("-") or not all(path):
        raise ConfigError(f"'{text}' is not an override; write it as section.key=value")
    field = _model_at(config, path[:-1]).model_fields.get(path[-1])
    parsed = parse_value(value, is_text=field is not None and _holds_text(field.annotation))
    for part in reversed(path):
        parsed = {part: parsed}
    return parsed


def _holds_text(annotation: Any) -> bool:
    """Whether a field holds a text, or a text or null."""
    options = [option for option in get_args(annotation) if option is not type(None)]
    plain = [get_args(o)[0] if get_origin(o) is Annotated else o for o in options or [annotation]]
    return plain == [str]


def load_preset(preset: str) -> dict[str, Any]:
    """Read a preset: `models` has the model sizes of every stage, `stages` changes to the recipes."""
    if preset not in preset_names():
        hint = did_you_mean(preset, preset_names())
        raise ConfigError(f"unknown preset '{preset}'{hint}; presets: {', '.join(preset_names())}")
    return read_yaml(PRESETS / f"{preset}.yaml")


def resolve(
    stage: str,
    preset: str | None,
    config_file: Path | None = None,
    overrides: dict[str, Any] | None = None,
) -> RunConfig:
    """Build the run config of a stage from recipe, preset, file, and overrides, in this order.

    Without `preset`, it is that of the file, or nano.
    """
    spec = stage_spec(stage)
    own, source = {}, "the command line"
    if config_file is not None:
        own, source = read_yaml(config_file), f"{config_file} or the command line"
    preset = str(preset or own.get("preset") or DEFAULT_PRESET)
    for owned, expected in (("stage", stage), ("preset", preset)):
        if own.get(owned, expected) != expected:
            raise ConfigError(
                f"{config_file} is for {owned} '{own[owned]}', but --{owned} is '{expected}'"
            )
        if (overrides or {}).get(owned, expected) != expected:
            raise ConfigError(f"{owned} cannot be overridden; use --{owned}")
    sizes = load_preset(preset)
    if RESOLVED in own:
        content = {key: value for key, value in own.items() if key != RESOLVED}
    else:
        content = read_yaml(spec.recipe)
        content = merge(content, sizes.get("stages", {}).get(stage, {}))
        content = merge(content, {"model": sizes["models"].get(stage, {})})
        content = merge(content, own)
    content = merge(content, overrides or {})
    return validate(spec.config, {**content, "stage": stage, "preset": preset}, source)


def run_config(content: dict[str, Any], source: str = "the config") -> RunConfig:
    """Validate a complete config, such as the `config.yaml` of a run; raises ConfigError."""
    spec = stage_spec(content.get("stage", ""))
    settings = {key: value for key, value in content.items() if key != RESOLVED}
    return validate(spec.config, settings, source)


def validate(model: type[Model], content: dict[str, Any], source: str) -> Model:
    """Validate `content` against a pydantic model; raises ConfigError for the first problem."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise ConfigError(_sentence(model, error, source)) from None


def _sentence(model: type[BaseModel], error: ValidationError, source: str) -> str:
    problem = error.errors()[0]
    location = [str(part) for part in problem["loc"]]
    path = _path_of(model, location)
    key = ".".join(path) or model.__name__
    if problem["type"] == "extra_forbidden":
        return _unknown_key(model, path, source)
    if problem["type"] == "missing":
        # Its old name was used instead.
        for other in error.errors():
            old = ".".join(map(str, other["loc"]))
            if other["type"] == "extra_forbidden" and key in RENAMED_KEYS.get(old, ()):
                return f"key '{old}' in {source} was renamed to '{key}'"
        return f"key '{key}' is missing in {source}; set it"
    # A value that fits none of several types has a problem for each of them.
    same = [p for p in error.errors() if _path_of(model, [str(part) for part in p["loc"]]) == path]
    remedies = dict.fromkeys(_remedy(p) for p in same)
    message = ", or ".join(remedies)
    if len(remedies) > 2:
        message = f"a value of type {type(problem['input']).__name__} is not allowed here"
    field = _model_at(model, path[:-1]).model_fields.get(path[-1]) if path else None
    is_section = not path or (field is not None and _section(field.annotation) is not None)
    if is_section and isinstance(problem["input"], dict):  # a validator of several keys
        where = f"{key}: " if path and key not in message else ""
        return f"{where}{message} (in {source})"
    return f"bad value {_shown(problem['input'])} for '{key}' in {source}: {message}"


def _remedy(problem: Mapping[str, Any]) -> str:
    """What to write instead, as the end of a sentence."""
    message: str = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if problem["type"] == "literal_error":
        return f"write {problem['ctx']['expected'].replace(chr(39), '')}"
    return _REMEDIES.get(problem["type"], message.replace("should be", "it must be", 1))


def _path_of(model: type[BaseModel], path: list[str]) -> list[str]:
    """Drop the names of pydantic's union members from the location of an error."""
    for index, part in enumerate(path):
        field = model.model_fields.get(part)
        section = _section(field.annotation) if field else None
        if section is None:
            annotation = field.annotation if field else None
            is_union = get_origin(annotation) in (Union, UnionType)
            has_one_type = len(set(get_args(annotation)) - {type(None)}) == 1
            return path[: index + 1] if is_union and not has_one_type else path
        model = section
    return path


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _unknown_key(model: type[BaseModel], path: list[str], source: str) -> str:
    key, all_keys = ".".join(path), list(_keys(model))
    renamed = [new for new in RENAMED_KEYS.get(key, ()) if new in all_keys]
    if renamed:
        return f"key '{key}' in {source} was renamed to '{renamed[0]}'"
    known = sorted(_model_at(model, path[:-1]).model_fields)
    hint = did_you_mean(path[-1], known)
    if not hint:  # the same key in another section
        same = [other for other in all_keys if other.split(".")[-1] == path[-1]]
        hint = f" (did you mean '{min(same, key=len)}'?)" if same else ""
    return f"unknown key '{key}' in {source}{hint}; keys here: {', '.join(known) or 'none'}"


def _section(annotation: Any) -> type[BaseModel] | None:
    """Return the section type of a field, which may be optional, or None for a plain value."""
    for option in get_args(annotation) or (annotation,):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield all keys of a config as `section.key`."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        section = _section(field.annotation)
        if section is not None:
            yield from _keys(section, f"{prefix}{name}.")


def _model_at(model: type[BaseModel], path: list[str]) -> type[BaseModel]:
    """Return the innermost section on `path`."""
    for part in path:
        field = model.model_fields.get(part)
        inner = _section(field.annotation) if field else None
        if inner is None:
            break
        model = inner
    return model
