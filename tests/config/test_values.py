"""Typed values: what users write is what they get, or one sentence; never a traceback."""

import math
import os
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from muomni.config.loading import merge, parse_override, read_yaml, resolve
from muomni.config.models import (
    AudioEncoderConfig,
    ClipConfig,
    CodecConfig,
    TalkerConfig,
    ThinkerConfig,
)
from muomni.config.registry import STAGES
from muomni.config.values import parse_value
from muomni.errors import ConfigError
from muomni.models.language.thinker import Thinker
from muomni.models.speech.audio_encoder import AudioEncoder
from muomni.models.speech.codec import Codec
from muomni.models.speech.talker import Talker
from muomni.models.vision.clip import Clip

KEYS = [
    (stage, key)
    for stage in STAGES
    for key in (
        "seed", "tf32", "precision", "data.root", "data.cache_gb", "data.num_workers", "data.mix",
        "data.stream", "data.storage_options", "data.block", "batch.shuffle_window", "optim.lr",
        "optim.betas", "optim.eps", "optim.lr_scales", "optim.weight_decay", "optim.schedule",
        "optim.warmup_fraction", "training.max_steps", "training.max_epochs", "training.ema_decay",
        "training.recorders", "training.activation_checkpointing", "training.peak_tflops",
        "profile.ranks", "fp16.initial_scale_power", "fp16.min_scale", "model", "options",
    )
]  # fmt: skip
JUNK = st.one_of(
    st.text(string.printable, max_size=12),
    st.sampled_from(["nan", "inf", ".nan", "1e400", "010", "yes", "[", "{", "!!x", "~", "-0", "9" * 40]),
    st.integers().map(str),
    st.floats().map(str),
)  # fmt: skip


def leaves(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def override(stage: str, text: str) -> BaseModel:
    return resolve(stage, "nano", None, parse_override(text, STAGES[stage].config))


@pytest.mark.parametrize("text", ["010", "08", "0x10", "1_000", "1:30", "yes", "1e1", "1.0", "true", "",
                                  "4294967296", "-1", '"7"'])  # fmt: skip
def test_an_integer_is_decimal_digits(text: str) -> None:
    with pytest.raises(ConfigError, match="for 'seed' in the command line"):
        override("thinker", f"seed={text}")


@pytest.mark.parametrize(
    "text", ["nan", ".nan", "inf", ".inf", "1e400", "true", "1,5e-4", "", "null"]
)
def test_a_float_is_finite(text: str) -> None:
    with pytest.raises(ConfigError, match=r"for 'optim\.lr' in the command line: write a"):
        override("thinker", f"optim.lr={text}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("3e-4", 3e-4), ("1E-4", 1e-4), (".5", 0.5), ("7", 7), ("+5", 5), ("true", True), ("null", None),
     ("no", "no"), ("2024-01-01", "2024-01-01"), ("a #b: c", "a #b: c"), ("[1, 1e-1]", [1, 0.1])],
)  # fmt: skip
def test_scalars_follow_the_core_schema(text: str, expected: Any) -> None:
    assert parse_value(text) == expected and type(parse_value(text)) is type(expected)


def test_files_have_the_same_scalars(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("optim: {lr: 3e-4}\n")
    assert resolve("thinker", "nano", file).optim.lr == 3e-4
    file.write_text("seed: 010\n")
    with pytest.raises(ConfigError, match="bad value '010' for 'seed'"):
        resolve("thinker", "nano", file)
    file.write_text("data: {root: 2024}\n")
    with pytest.raises(ConfigError, match="quote a number that is meant as text"):
        resolve("thinker", "nano", file)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("~/x", "{home}/x"), ("a b", "{cwd}/a b"), ("/data/a #b", "/data/a #b"), ("/a: b", "/a: b"),
     ("2024", "{cwd}/2024"), ("s3://b/x", "s3://b/x"), ("'q'", "{cwd}/q")],
)  # fmt: skip
def test_paths_are_expanded_and_absolute(text: str, expected: str) -> None:
    root = resolve("thinker", "nano", None, parse_override(f"data.root={text}")).data.root
    assert root == expected.format(home=os.path.expanduser("~"), cwd=os.getcwd())


@pytest.mark.parametrize("text", ["", "''", "null", "x" * 300])
def test_a_path_is_not_empty_or_too_long(text: str) -> None:
    with pytest.raises(ConfigError, match=r"for 'data\.root'"):
        resolve("thinker", "nano", None, parse_override(f"data.root={text}"))


@pytest.mark.parametrize(
    ("stage", "text", "message"),
    [
        ("thinker", "model.head_dim=31", "model: head_dim=31 must be even, for rotary positions"),
        ("thinker", "model.num_kv_heads=3", "num_heads=4 is not a multiple of num_kv_heads=3"),
        (
            "vision_encoder",
            "model.vision.patch_size=128",
            "image_size=64 is not a multiple of patch",
        ),
        ("audio_encoder", "model.mel.num_mels=400", "num_mels=400 exceeds the 256 frequencies"),
        ("audio_encoder", "model.mel.min_hz=8000", "min_hz=8000 must be below max_hz=7600"),
        ("codec", "model.num_blocks=64", r"'model\.num_blocks'"),
        ("sft", "model.thinker.head_dim=0", r"bad value 0 for 'model\.thinker\.head_dim'"),
        ("thinker", "optim.betas=[0.9, 1]", r"'optim\.betas\.1'"),
        ("thinker", "fp16.min_scale=1e9", "exceeds the initial scale, 2\\^16"),
        (
            "vision_encoder",
            "options.augmentation={min_scale: 2}",
            "min_scale=2 exceeds max_scale=1.1",
        ),
        ("thinker", "data.storage_options={a: {1: 2}}", "key 1 must be a text"),
        ("thinker", "stage=codec", "stage cannot be overridden; use --stage"),
        (
            "thinker",
            "training.compile=yes",
            "'training.compile' .*: write true or false, or write auto",
        ),
        ("thinker", "training.activation_checkpointing=[1]", "a value of type list is not allowed"),
    ],
)
def test_what_a_run_cannot_be_built_from_is_refused_in_words(
    stage: str, text: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        override(stage, text)


@pytest.mark.parametrize("stage", STAGES)
def test_wrong_types_of_every_key_are_refused(stage: str) -> None:
    """Every number refuses text, true, and infinity; every text refuses a number in a file."""
    recorded = resolve(stage, "nano").model_dump(mode="json")
    for key, value in leaves(recorded):
        if key in ("stage", "preset") or key.startswith("optim.lr_scales."):
            continue
        wrong: list[Any] = []
        if isinstance(value, bool):
            wrong = ["yes", 1, math.inf]
        elif isinstance(value, (int, float)):
            wrong = ["1", True, math.inf, math.nan, -math.inf, [1]]
        elif isinstance(value, str):
            wrong = [1, True, [1], ""] if key == "data.root" else [1, 1.5]
        for bad in wrong:
            update: Any = bad
            for part in reversed(key.split(".")):
                update = {part: update}
            if key in ("training.activation_checkpointing", "data.num_workers"):
                continue  # takes several types
            with pytest.raises(ConfigError) as caught:
                resolve(stage, "nano", None, update)
            assert key in str(caught.value) and "\n" not in str(caught.value)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(KEYS), JUNK)
def test_junk_is_refused_or_gives_a_valid_config(stage_key: tuple[str, str], junk: str) -> None:
    stage, key = stage_key
    try:
        config = override(stage, f"{key}={junk}")
    except ConfigError as error:
        assert str(error)
    else:
        for _, value in leaves(config.model_dump(mode="json")):
            assert not isinstance(value, float) or math.isfinite(value)


SIZES = st.fixed_dictionaries(
    {name: st.integers(0, 9) for name in
     ("hidden_size", "num_heads", "num_kv_heads", "head_dim", "intermediate_size")}
    | {"num_layers": st.integers(0, 2)}
)  # fmt: skip
MODELS = {
    ThinkerConfig: (Thinker, {"vocab_size": 300}),
    AudioEncoderConfig: (AudioEncoder, {"vocab_size": 300, "conv_channels": 3}),
    TalkerConfig: (Talker, {"text_vocab_size": 9, "num_codebooks": 2, "codebook_size": 4}),
}


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(MODELS)), SIZES, st.integers(0, 8))
def test_every_valid_transformer_can_be_built(
    kind: type[BaseModel], sizes: dict[str, int], kernel: int
) -> None:
    model, rest = MODELS[kind]
    extra = {"conv_kernel_size": kernel} if kind is AudioEncoderConfig else {}
    try:
        config = kind.model_validate({**sizes, **rest, **extra})
    except ValueError:
        return
    with torch.device("meta"):
        model(config)  # pyright: ignore[reportArgumentType]


@settings(max_examples=60, deadline=None)
@given(SIZES, SIZES, st.integers(0, 70), st.integers(0, 70), st.integers(0, 14), st.integers(0, 3))
def test_every_valid_clip_and_codec_can_be_built(
    vision: dict[str, int], text: dict[str, int], image: int, patch: int, blocks: int, codes: int
) -> None:
    for kind, model, content in (
        (ClipConfig, Clip, {"vision": {**vision, "image_size": image, "patch_size": patch},
                            "text": {**text, "vocab_size": 30}, "embedding_size": 4}),
        (CodecConfig, Codec, {"hidden_size": vision["hidden_size"], "num_blocks": blocks,
                              "num_codebooks": codes, "codebook_size": 8}),
    ):  # fmt: skip
        try:
            config = kind.model_validate(content)
        except ValueError:
            continue
        with torch.device("meta"):
            model(config)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("stage", STAGES)
def test_the_config_of_a_run_is_accepted_as_config(stage: str, tmp_path: Path) -> None:
    from muomni.run_folder import RunFolder

    changes = {
        "seed": 3, "optim": {"lr": 1e-5, "eps": 1e-9}, "profile": {"ranks": [0, 1]},
        "data": {"root": str(tmp_path)},
    }  # fmt: skip
    config = resolve(stage, "tiny", None, changes)
    folder = RunFolder(tmp_path, stage)
    folder.create()
    folder.write_config(config.model_dump(mode="json"), {"ranks": 2, "upstream": {"codec": "abc"}})
    assert resolve(stage, None, folder.config_file) == config
    assert read_yaml(folder.config_file)["resolved"]["ranks"] == 2
    changed = resolve(stage, None, folder.config_file, parse_override("optim.lr=1e-3"))
    assert changed == type(config).model_validate(
        merge(config.model_dump(), {"optim": {"lr": 1e-3}})
    )
    with pytest.raises(ConfigError, match="is for preset 'tiny', but --preset is 'nano'"):
        resolve(stage, "nano", folder.config_file)
