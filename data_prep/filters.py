"""Which sound samples a dataset leaves out on purpose: bounds on audio clips, images and texts.

A filtered sample is not bad: it has a reason of its own, does not count against --max-bad-fraction and
is listed apart. All functions are pure; a value that equals its bound is kept.
"""

import sys
import unicodedata
from collections import Counter
from dataclasses import asdict, dataclass, fields
from typing import NamedTuple

import numpy as np

from data_prep.corpus import Problem
from muomni.errors import ConfigError

# A frame is silent when its RMS lies below this; a sine at full scale has -3 dBFS.
SILENCE_DBFS = -50
FRAME_S = 0.02
# The largest positive sample of 16 bits; the largest negative one is -1.
FULL_SCALE = 32767 / 32768
MIN_SCRIPT_SHARE = 0.5

# Unicode names most characters by their script; these are named otherwise as well.
_NAME_STARTS = {
    "han": ("CJK ", "IDEOGRAPHIC "),
    "hiragana": ("HIRAGANA ", "KATAKANA-HIRAGANA "),
    "katakana": ("KATAKANA ", "KATAKANA-HIRAGANA "),
}


class _Rule(NamedTuple):
    """The flag of a bound, the reason it gives, and what its value counts."""

    flag: str
    reason: str
    unit: str


RULES = {
    "min_duration_s": _Rule("--min-duration", "too-short", "seconds"),
    "max_duration_s": _Rule("--max-duration", "too-long", "seconds"),
    "min_chars_per_s": _Rule("--min-chars-per-second", "too-slow", "characters a second"),
    "max_chars_per_s": _Rule("--max-chars-per-second", "too-fast", "characters a second"),
    "max_silence_fraction": _Rule("--max-silence-fraction", "too-silent", "of its frames silent"),
    "max_clipped_fraction": _Rule(
        "--max-clipped-fraction", "too-clipped", "of its samples clipped"
    ),
    "min_side_pixels": _Rule("--min-side", "too-small", "pixels on the shorter side"),
    "max_pixels": _Rule("--max-pixels", "too-large", "pixels"),
    "max_aspect": _Rule("--max-aspect", "too-narrow", "as longer side by shorter side"),
    "min_chars": _Rule("--min-chars", "too-few-chars", "characters"),
    "max_chars": _Rule("--max-chars", "too-many-chars", "characters"),
    "script": _Rule("--script", "other-script", "of its characters in the script"),
}
FILTER_REASONS = frozenset(rule.reason for rule in RULES.values())


@dataclass(frozen=True, slots=True)
class Filters:
    """Bounds that were set; None and an empty script filter nothing.

    Raises `ConfigError` for a value that no sample can have, a minimum above its maximum, or a script
    that Unicode does not know.
    """

    min_duration_s: float | None = None
    max_duration_s: float | None = None
    min_chars_per_s: float | None = None
    max_chars_per_s: float | None = None
    max_silence_fraction: float | None = None
    max_clipped_fraction: float | None = None
    min_side_pixels: int | None = None
    max_pixels: int | None = None
    max_aspect: float | None = None
    min_chars: int | None = None
    max_chars: int | None = None
    script: str = ""

    def __post_init__(self) -> None:
        bounds = {name: value for name, value in asdict(self).items() if name != "script"}
        for name, value in bounds.items():
            if value is None:
                continue
            least = 1 if name == "max_aspect" else 0
            most = 1 if name.endswith("_fraction") else sys.maxsize
            if not least <= value <= most:
                limits = f"{least} or more" if most > 1 else f"from {least} to {most}"
                raise ConfigError(f"{RULES[name].flag} {value} must be a number, {limits}")
            opposite = name.replace("max_", "min_")
            smallest = bounds.get(opposite)
            if smallest is not None and smallest > value:
                flags = f"{RULES[opposite].flag} {smallest} exceeds {RULES[name].flag} {value}"
                raise ConfigError(f"{flags}, so no sample would be left")
        characters = filter(str.isalpha, map(chr, range(sys.maxunicode + 1)))
        if self.script and not any(
            _is_in_script(character, self.script) for character in characters
        ):
            raise ConfigError(
                f"--script {self.script!r} is no script by which Unicode names characters; give one "
                "like latin, cyrillic or han"
            )

    @property
    def needs_levels(self) -> bool:
        """Whether audio clips have to be decoded to be filtered."""
        return self.max_silence_fraction is not None or self.max_clipped_fraction is not None

    def as_text(self) -> dict[str, str]:
        """The filters that are set, for plan and manifest."""
        return {name: str(value) for name, value in asdict(self).items() if value not in (None, "")}

    @classmethod
    def from_text(cls, texts: dict[str, str]) -> "Filters":
        """What `as_text` gave, read again."""
        kinds = {each.name: each.type for each in fields(cls)}
        read = {int | None: int, float | None: float, str: str}
        return cls(**{name: read[kinds[name]](text) for name, text in texts.items()})


def unwanted_text(filters: Filters, text: str) -> Problem | None:
    """Why a document, caption or transcript is left out; characters count as in the columns."""
    num_chars = len(text)
    problem = _outside(filters, "min_chars", num_chars)
    problem = problem or _outside(filters, "max_chars", num_chars)
    if problem or not filters.script:
        return problem
    share = script_share(text, filters.script)
    if share >= MIN_SCRIPT_SHARE:
        return None
    message = f"{share:.9g} {RULES['script'].unit}, less than {MIN_SCRIPT_SHARE} of --script"
    return Problem(RULES["script"].reason, f"{message} {filters.script}")


def unwanted_image(filters: Filters, width: int, height: int) -> Problem | None:
    """Why an image of this size in pixels is left out."""
    shorter, longer = sorted((width, height))
    return (
        _outside(filters, "min_side_pixels", shorter)
        or _outside(filters, "max_pixels", width * height)
        or _outside(filters, "max_aspect", longer / shorter)
    )


def unwanted_speech(
    filters: Filters,
    samples: np.ndarray | None,
    sample_rate_hz: int,
    duration_s: float,
    num_chars: int,
) -> Problem | None:
    """Why an audio clip, float [num_samples, num_channels], with a transcript is left out.

    Samples are needed where `filters.needs_levels`.
    """
    problem = (
        _outside(filters, "min_duration_s", duration_s)
        or _outside(filters, "max_duration_s", duration_s)
        or _outside(filters, "min_chars_per_s", num_chars / duration_s)
        or _outside(filters, "max_chars_per_s", num_chars / duration_s)
    )
    if samples is None or problem:
        return problem
    # Levels are worked out only where they are asked for.
    if filters.max_silence_fraction is not None:
        fraction = silence_fraction(samples, sample_rate_hz)
        problem = _outside(filters, "max_silence_fraction", fraction)
    if not problem and filters.max_clipped_fraction is not None:
        problem = _outside(filters, "max_clipped_fraction", clipped_fraction(samples))
    return problem


def silence_fraction(samples: np.ndarray, sample_rate_hz: int) -> float:
    """Share of silent frames in the mean of all channels; an unfinished last frame does not count.

    An audio clip shorter than a frame is one frame.
    """
    mono = samples.mean(axis=1, dtype=np.float64)
    size = min(len(mono), max(1, round(FRAME_S * sample_rate_hz)))
    frames = mono[: len(mono) // size * size].reshape(-1, size)
    power = np.square(frames).mean(axis=1)
    return float((power < 10 ** (SILENCE_DBFS / 10)).mean())


def clipped_fraction(samples: np.ndarray) -> float:
    """Share of samples at full scale (32767/32768) or beyond, over all channels."""
    return float((np.abs(samples) >= FULL_SCALE).mean())


def script_share(text: str, script: str) -> float:
    """Share of the characters of a text that belong to a script; 0 for a text without characters."""
    characters = Counter(character for character in text if character.isalpha())
    inside = sum(
        count for character, count in characters.items() if _is_in_script(character, script)
    )
    return inside / max(1, characters.total())


def bad_and_filtered(dropped: dict[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """Counts by reason, parted: samples that could not be used, and those that filters left out."""
    filtered = {reason: count for reason, count in dropped.items() if reason in FILTER_REASONS}
    return {reason: dropped[reason] for reason in dropped if reason not in filtered}, filtered


def _outside(filters: Filters, name: str, value: float) -> Problem | None:
    bound: float | None = getattr(filters, name)
    is_least = name.startswith("min_")
    if bound is None or (value >= bound if is_least else value <= bound):
        return None
    rule = RULES[name]
    relation = "less" if is_least else "more"
    return Problem(rule.reason, f"{value:.9g} {rule.unit}, {relation} than {rule.flag} {bound:.9g}")


def _is_in_script(character: str, script: str) -> bool:
    name = unicodedata.name(character, "").removeprefix("FULLWIDTH ").removeprefix("HALFWIDTH ")
    return name.startswith(_NAME_STARTS.get(script, (f"{script.upper()} ",)))
