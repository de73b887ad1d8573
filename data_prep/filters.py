"""Filters that drop valid samples by duration, level, size, length, or script.

Filtered samples are not bad: they have reason codes and listings of their own and do not count toward
--max-bad-fraction. All functions are pure; values equal to a bound are kept.
"""

from collections import Counter

import numpy as np

from data_prep.corpus import Problem
from data_prep.options import (
    FILTER_REASONS,
    FRAME_S,
    MIN_SCRIPT_SHARE,
    RULES,
    SILENCE_DBFS,
    Filters,
    is_in_script,
)

# The largest positive 16-bit sample; the largest negative one is -1.
FULL_SCALE = 32767 / 32768


def filter_text(filters: Filters, text: str) -> Problem | None:
    """The reason to drop a document, caption, or transcript, if any."""
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


def filter_image(filters: Filters, width: int, height: int) -> Problem | None:
    """The reason to drop an image of this size in pixels, if any."""
    shorter, longer = sorted((width, height))
    return (
        _outside(filters, "min_side_pixels", shorter)
        or _outside(filters, "max_pixels", width * height)
        or _outside(filters, "max_aspect", longer / shorter)
    )


def filter_speech(
    filters: Filters,
    samples: np.ndarray | None,
    sample_rate_hz: int,
    duration_s: float,
    num_chars: int,
) -> Problem | None:
    """The reason to drop an audio clip with a transcript, if any.

    `samples`, float [num_samples, num_channels], are required if `filters.needs_levels`.
    """
    problem = (
        _outside(filters, "min_duration_s", duration_s)
        or _outside(filters, "max_duration_s", duration_s)
        or _outside(filters, "min_chars_per_s", num_chars / duration_s)
        or _outside(filters, "max_chars_per_s", num_chars / duration_s)
    )
    if samples is None or problem:
        return problem
    if filters.max_silence_fraction is not None:
        fraction = silence_fraction(samples, sample_rate_hz)
        problem = _outside(filters, "max_silence_fraction", fraction)
    if not problem and filters.max_clipped_fraction is not None:
        problem = _outside(filters, "max_clipped_fraction", clipped_fraction(samples))
    return problem


def silence_fraction(samples: np.ndarray, sample_rate_hz: int) -> float:
    """Fraction of silent frames in the mean of all channels; an incomplete last frame is ignored.

    A clip shorter than a frame counts as one frame.
    """
    mono = samples.mean(axis=1, dtype=np.float64)
    size = min(len(mono), max(1, round(FRAME_S * sample_rate_hz)))
    frames = mono[: len(mono) // size * size].reshape(-1, size)
    power = np.square(frames).mean(axis=1)
    return float((power < 10 ** (SILENCE_DBFS / 10)).mean())


def clipped_fraction(samples: np.ndarray) -> float:
    """Fraction of samples at full scale (32767/32768) or above, over all channels."""
    return float((np.abs(samples) >= FULL_SCALE).mean())


def script_share(text: str, script: str) -> float:
    """Fraction of the letters of a text that belong to a script; 0 for a text without letters."""
    letters = Counter(letter for letter in text if letter.isalpha())
    inside = sum(count for letter, count in letters.items() if is_in_script(letter, script))
    return inside / max(1, letters.total())


def split_dropped(dropped: dict[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """Split counts by reason into those of bad samples and those of filtered samples."""
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
