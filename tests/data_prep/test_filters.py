"""Filters: which side of each bound is kept."""

from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.corpus import Problem
from data_prep.filters import (
    clipped_fraction,
    filter_image,
    filter_speech,
    filter_text,
    script_share,
    silence_fraction,
    split_dropped,
)
from data_prep.options import RULES, Filters
from muomni.errors import ConfigError

_RATE_HZ = 8_000
_FRAME = 160


def reason(problem: Problem | None) -> str:
    return problem.reason if problem else ""


def noise(num_frames: int, num_silent: int = 0) -> np.ndarray:
    """Frames of +0.1 and -0.1, the first `num_silent` of them zero; [num_samples, 1]."""
    samples = np.tile(np.array([0.1, -0.1], np.float32), num_frames * _FRAME // 2)
    samples[: num_silent * _FRAME] = 0
    return samples[:, None]


def speech(filters: Filters, duration_s: float, num_chars: int, samples: np.ndarray) -> str:
    return reason(filter_speech(filters, samples, _RATE_HZ, duration_s, num_chars))


@pytest.mark.parametrize(
    ("filters", "duration_s", "num_chars", "expected"),
    [
        (Filters(), 0.001, 100_000, ""),
        (Filters(min_duration_s=1.5), 1.5, 10, ""),
        (Filters(min_duration_s=1.5), 1.499, 10, "too-short"),
        (Filters(max_duration_s=1.5), 1.5, 10, ""),
        (Filters(max_duration_s=1.5), 1.501, 10, "too-long"),
        (Filters(min_chars_per_s=5), 2.0, 10, ""),
        (Filters(min_chars_per_s=5), 2.0, 9, "too-slow"),
        (Filters(max_chars_per_s=5), 2.0, 10, ""),
        (Filters(max_chars_per_s=5), 2.0, 11, "too-fast"),
        (Filters(min_duration_s=2, max_duration_s=2), 2.0, 10, ""),
    ],
)
def test_duration_and_rate(
    filters: Filters, duration_s: float, num_chars: int, expected: str
) -> None:
    assert speech(filters, duration_s, num_chars, noise(4)) == expected


def test_silence() -> None:
    filters = Filters(max_silence_fraction=0.25)
    assert speech(filters, 1.0, 10, noise(8, 2)) == ""
    assert speech(filters, 1.0, 10, noise(8, 3)) == "too-silent"
    assert speech(Filters(max_silence_fraction=1.0), 1.0, 10, noise(8, 8)) == ""


@pytest.mark.parametrize(("level_dbfs", "share"), [(-50.1, 1.0), (-49.9, 0.0)])
def test_silence_threshold(level_dbfs: float, share: float) -> None:
    samples = noise(5) / 0.1 * 10 ** (level_dbfs / 20)
    assert silence_fraction(samples, _RATE_HZ) == share


def test_silence_uses_mean_of_channels() -> None:
    one = noise(4)
    assert silence_fraction(np.concatenate([one, -one], axis=1), _RATE_HZ) == 1.0
    assert silence_fraction(np.concatenate([one, one], axis=1), _RATE_HZ) == 0.0
    unfinished = np.concatenate([one, np.zeros((_FRAME - 1, 1), np.float32)])
    assert silence_fraction(unfinished, _RATE_HZ) == 0.0
    assert silence_fraction(np.zeros((3, 1), np.float32), _RATE_HZ) == 1.0


def test_clipping() -> None:
    steps = np.array([32767, -32768, 32766, -32767], np.int16) / np.float32(32768)
    assert clipped_fraction(steps[:, None]) == 0.75
    assert clipped_fraction(np.array([[1.2], [0.0]], np.float32)) == 0.5
    samples = noise(1)
    samples[:40] = 1.0
    assert speech(Filters(max_clipped_fraction=0.25), 1.0, 10, samples) == ""
    samples[40] = -1.0
    assert speech(Filters(max_clipped_fraction=0.25), 1.0, 10, samples) == "too-clipped"


@pytest.mark.parametrize(
    ("filters", "size", "expected"),
    [
        (Filters(), (1, 10_000), ""),
        (Filters(min_side_pixels=32), (32, 99), ""),
        (Filters(min_side_pixels=32), (99, 31), "too-small"),
        (Filters(max_pixels=600), (20, 30), ""),
        (Filters(max_pixels=599), (20, 30), "too-large"),
        (Filters(max_aspect=3), (30, 10), ""),
        (Filters(max_aspect=3), (10, 31), "too-narrow"),
        (Filters(max_aspect=1), (10, 10), ""),
    ],
)
def test_images(filters: Filters, size: tuple[int, int], expected: str) -> None:
    assert reason(filter_image(filters, *size)) == expected


@pytest.mark.parametrize(
    ("filters", "text", "expected"),
    [
        (Filters(), "", ""),
        (Filters(min_chars=3), "abc", ""),
        (Filters(min_chars=3), "ab", "too-few-chars"),
        (Filters(max_chars=3), "абв", ""),
        (Filters(max_chars=3), "abcd", "too-many-chars"),
        (Filters(script="latin"), "Ça va, ｏｋ? 123", ""),
        (Filters(script="latin"), "ab вг", ""),
        (Filters(script="latin"), "ab вгд", "other-script"),
        (Filters(script="latin"), "123 !?", "other-script"),
        (Filters(script="cyrillic"), "Привет, Bob", ""),
        (Filters(script="cyrillic"), "Hello", "other-script"),
        (Filters(script="han"), "你好 人々", ""),
        (Filters(script="han"), "こんにちは", "other-script"),
        (Filters(script="katakana"), "ー", ""),
        (Filters(script="hangul"), "안녕", ""),
    ],
)
def test_texts(filters: Filters, text: str, expected: str) -> None:
    assert reason(filter_text(filters, text)) == expected


def test_message_contains_value_and_flag() -> None:
    short = filter_speech(Filters(min_duration_s=1), noise(1), _RATE_HZ, 0.3, 5)
    assert short == Problem("too-short", "0.3 seconds, less than --min-duration 1")
    other = filter_text(Filters(script="latin"), "ab вгде")
    assert other is not None
    assert other.message.endswith("of its letters in the script, less than 0.5 of --script latin")


@given(st.floats(0.001, 100), st.floats(0, 100), st.floats(0, 10))
def test_looser_bound_keeps_more(duration_s: float, bound: float, slack: float) -> None:
    samples = noise(1)
    if not speech(Filters(max_duration_s=bound), duration_s, 5, samples):
        assert not speech(Filters(max_duration_s=bound + slack), duration_s, 5, samples)
    if not speech(Filters(min_duration_s=bound + slack), duration_s, 5, samples):
        assert not speech(Filters(min_duration_s=bound), duration_s, 5, samples)
    assert not speech(
        Filters(min_duration_s=duration_s, max_duration_s=duration_s), duration_s, 5, samples
    )


@given(st.integers(1, 5000), st.integers(1, 5000), st.floats(1, 20), st.integers(0, 5000))
def test_image_filters_ignore_orientation(
    width: int, height: int, aspect: float, side: int
) -> None:
    filters = Filters(max_aspect=aspect, min_side_pixels=side)
    turned = filter_image(filters, height, width)
    assert filter_image(filters, width, height) == turned


@given(st.text(), st.text())
def test_script_share(first: str, second: str) -> None:
    shares = [script_share(first, script) for script in ("latin", "cyrillic", "han", "arabic")]
    assert 0 <= sum(shares) <= 1 + 1e-9
    joined = script_share(first + second, "latin")
    parts = script_share(first, "latin"), script_share(second, "latin")
    assert joined <= max(parts) + 1e-9
    assert script_share(first + "0 .!", "latin") == parts[0]


@given(
    st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=1000),
    st.floats(0, 1),
    st.integers(1, 48_000),
)
def test_level_fractions(values: list[float], gain: float, sample_rate_hz: int) -> None:
    samples = np.array(values, dtype=np.float32)[:, None]
    quieter = samples * np.float32(gain)
    assert 0 <= silence_fraction(samples, sample_rate_hz) <= 1
    assert silence_fraction(quieter, sample_rate_hz) >= silence_fraction(samples, sample_rate_hz)
    assert 0 <= clipped_fraction(quieter) <= clipped_fraction(samples) <= 1


def test_each_filter_has_one_rule_and_reason() -> None:
    assert list(RULES) == list(asdict(Filters()))
    assert len({rule.reason for rule in RULES.values()}) == len(RULES)
    assert Filters(max_chars=0, script="latin").as_text() == {"max_chars": "0", "script": "latin"}
    assert Filters().as_text() == {}


def test_split_dropped() -> None:
    bad, filtered = split_dropped({"bad-utf8": 2, "too-long": 3})
    assert (bad, filtered) == ({"bad-utf8": 2}, {"too-long": 3})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_duration_s": -1.0}, "--min-duration must be at least 0, got -1.0"),
        ({"max_duration_s": float("nan")}, "--max-duration must be at least 0, got nan"),
        ({"max_duration_s": float("inf")}, "--max-duration must be at least 0, got inf"),
        ({"max_silence_fraction": 1.5}, "--max-silence-fraction must be between 0 and 1, got 1.5"),
        ({"max_aspect": 0.5}, "--max-aspect must be at least 1, got 0.5"),
        ({"min_chars": 9, "max_chars": 8}, "--min-chars 9 exceeds --max-chars 8"),
        (
            {"min_chars_per_s": 9.0, "max_chars_per_s": 8.0},
            "--min-chars-per-second 9.0 exceeds --max-chars-per-second 8.0",
        ),
        ({"script": "klingon"}, "--script 'klingon' is not a Unicode script"),
    ],
)
def test_invalid_filter_values(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Filters(**values)
