"""Build a validated `RunConfig` from YAML files and `key=value` overrides.

Later sources win: the stage's recipe, the preset, the user's file, the command line. An unknown key or a
wrong type is a one-sentence `ConfigError` that names the key, its source, and a suggestion.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from muomni.config.names import PRESETS, preset_names
from muomni.config.registry import stage_spec
from muomni.config.run import RunConfig
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
    "batch.window": ("batch.shuffle_window",),
    "model.frames_per_letter": ("model.frames_per_character",),
    "model.talker.frames_per_letter": ("model.talker.frames_per_character",),
    "model.moe.normalise_top_k": ("model.moe.normalize_top_k",),  # codespell:ignore
    "model.thinker.moe.normalise_top_k": ("model.thinker.moe.normalize_top_k",),  # codespell:ignore
}

# Keys of a run's `config.yaml` that are not settings.
RECORDED_KEYS = frozenset({"upstream", "upstream_digests", "provenance"})

Model = TypeVar("Model", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """Safe YAML that rejects duplicate keys (plain YAML keeps the last one)."""

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


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping; raises ConfigError if it is missing, malformed, or not a mapping."""
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist; check the path")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
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


def parse_override(text: str) -> dict[str, Any]:
    """Parse `a.b=c` into `{"a": {"b": c}}`; the value is YAML."""
    key, separator, value = text.partition("=")
    if not separator or not key or key.startswith("-") or not all(key.split(".")):
        raise ConfigError(f"'{text}' is not an override; write it as section.key=value")
    try:
        parsed: Any = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"the value of override '{text}' is not valid YAML; quote it") from None
    if isinstance(parsed, str):
        try:  # YAML 1.1 reads 3e-4 as a string
            parsed = float(parsed)
        except ValueError:
            parsed = parsed.strip()
    for part in reversed(key.split(".")):
        parsed = {part: parsed}
    return parsed


def load_preset(preset: str) -> dict[str, Any]:
    """Read a preset: `models` has the model sizes of every stage, `stages` changes to the recipes."""
    if preset not in preset_names():
        hint = did_you_mean(preset, preset_names())
        raise ConfigError(f"unknown preset '{preset}'{hint}; presets: {', '.join(preset_names())}")
    return read_yaml(PRESETS / f"{preset}.yaml")


def resolve(
    stage: str,
    preset: str,
    config_file: Path | None = None,
    overrides: dict[str, Any] | None = None,
) -> RunConfig:
    """Build the run config of a stage from recipe, preset, file, and overrides, in this order."""
    spec = stage_spec(stage)
    sizes = load_preset(preset)
    content = read_yaml(spec.recipe)
    content = merge(content, sizes.get("stages", {}).get(stage, {}))
    content = merge(content, {"model": sizes["models"].get(stage, {})})
    source = "the command line"
    if config_file is not None:
        content = merge(content, read_yaml(config_file))
        source = f"{config_file} or the command line"
    for owned in ("stage", "preset"):
        found = content.pop(owned, None)
        expected = {"stage": stage, "preset": preset}[owned]
        if found not in (None, expected):
            raise ConfigError(
                f"{config_file} is for {owned} '{found}', but --{owned} is '{expected}'"
            )
    content = merge(content, overrides or {})
    return validate(spec.config, {"stage": stage, "preset": preset, **content}, source)


def run_config(content: dict[str, Any], source: str = "the config") -> RunConfig:
    """Validate a complete config, such as the `config.yaml` of a run; raises ConfigError."""
    spec = stage_spec(content.get("stage", ""))
    settings = {key: value for key, value in content.items() if key not in RECORDED_KEYS}
    return validate(spec.config, settings, source)


def validate(model: type[Model], content: dict[str, Any], source: str) -> Model:
    """Validate `content` against a pydantic model; raises ConfigError for the first problem."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise ConfigError(_sentence(model, error, source)) from None


def _sentence(model: type[BaseModel], error: ValidationError, source: str) -> str:
    problem = error.errors()[0]
    path = [str(part) for part in problem["loc"]]
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
    message = problem["msg"].removeprefix("Value error, ")
    field = _model_at(model, path[:-1]).model_fields.get(path[-1]) if path else None
    is_section = not path or (field is not None and _section(field.annotation) is not None)
    if is_section and isinstance(problem["input"], dict):  # a validator of several keys
        return f"{message} (in {source})"
    return f"bad value {problem['input']!r} for '{key}' in {source}: {message}"


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
