"""From YAML files and `key=value` overrides to a checked `RunConfig`.

Later sources win: the stage's recipe, the preset, the user's file, the command line. Every unknown key
and every wrong type is a `ConfigError` of one sentence that names the key, its source and a suggestion.
"""

import difflib
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from muomni.config.run import STAGE_NAMES, RunConfig
from muomni.errors import ConfigError

CONFIG_ROOT = Path(__file__).resolve().parent

Model = TypeVar("Model", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key may stand only once in a mapping (plain YAML takes the last one)."""

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
    """Read a YAML mapping; raises ConfigError when it is missing, malformed or not a mapping."""
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist; check the path")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"config file {path} is not valid YAML ({reason}); correct it") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"config file {path} must hold a mapping of keys, not a {type(content)}")
    return content


def merge(base: dict[str, Any], update: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with `update` laid over it, mapping by mapping; neither is changed."""
    merged = dict(base)
    for key, value in update.items():
        old = merged.get(key)
        merged[key] = (
            merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
        )
    return merged


def parse_override(text: str) -> dict[str, Any]:
    """Turn `a.b=c` into `{"a": {"b": c}}`, the value read as YAML."""
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


def preset_names() -> list[str]:
    """Names of the presets in `muomni/config/presets`."""
    return sorted(path.stem for path in (CONFIG_ROOT / "presets").glob("*.yaml"))


def load_preset(preset: str) -> dict[str, Any]:
    """Read one preset: `models` holds the sizes of every stage, `stages` its changes to the recipes."""
    if preset not in preset_names():
        hint = did_you_mean(preset, preset_names())
        raise ConfigError(f"unknown preset '{preset}'{hint}; presets: {', '.join(preset_names())}")
    return read_yaml(CONFIG_ROOT / "presets" / f"{preset}.yaml")


def resolve(
    stage: str,
    preset: str,
    config_file: Path | None = None,
    overrides: dict[str, Any] | None = None,
) -> RunConfig:
    """Build the run config of a stage from recipe, preset, file and overrides, in this order."""
    if stage not in STAGE_NAMES:
        hint = did_you_mean(stage, STAGE_NAMES)
        raise ConfigError(f"unknown stage '{stage}'{hint}; stages: {', '.join(STAGE_NAMES)}")
    sizes = load_preset(preset)
    content = read_yaml(CONFIG_ROOT / "recipes" / f"{stage}.yaml")
    content = merge(content, sizes.get("stages", {}).get(stage, {}))
    content = merge(content, {"model": sizes["models"].get(stage, {})})
    source = "the command line"
    if config_file is not None:
        content = merge(content, read_yaml(config_file))
        source = f"{config_file} or the command line"
    for owned in ("stage", "preset"):
        given = content.pop(owned, None)
        expected = {"stage": stage, "preset": preset}[owned]
        if given not in (None, expected):
            raise ConfigError(
                f"{config_file} is for {owned} '{given}', but --{owned} is '{expected}'"
            )
    content = merge(content, overrides or {})
    return validate(RunConfig, {"stage": stage, "preset": preset, **content}, source)


def validate(model: type[Model], content: dict[str, Any], source: str) -> Model:
    """Check `content` against a pydantic model; the first problem becomes one ConfigError sentence."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise ConfigError(_sentence(model, error, source)) from None


def _sentence(model: type[BaseModel], error: ValidationError, source: str) -> str:
    problem = error.errors()[0]
    path = [str(part) for part in problem["loc"]]
    key = ".".join(path) or model.__name__
    if problem["type"] == "extra_forbidden":
        known = _fields_at(model, path[:-1])
        return f"unknown key '{key}' in {source}{did_you_mean(path[-1], known)}; keys here: {', '.join(known)}"
    if problem["type"] == "missing":
        return f"key '{key}' is missing in {source}; give it a value"
    message = problem["msg"].removeprefix("Value error, ")
    if not path:
        return f"{message} (in {source})"
    return f"bad value {problem['input']!r} for '{key}' in {source}: {message}"


def _fields_at(model: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        field = model.model_fields.get(part)
        inner = field.annotation if field else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            break
        model = inner
    return sorted(model.model_fields)


def did_you_mean(word: str, known: list[str] | tuple[str, ...]) -> str:
    """Return `" (did you mean 'x'?)"` when a known word is close, else an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""
