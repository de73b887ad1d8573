"""Flags of filters and preprocessing: which tasks have them, and the options they give."""

import argparse
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING

from data_prep.cli.parser import any_integer, any_number
from data_prep.options import (
    CHECKS,
    FRAME_S,
    MIN_SCRIPT_SHARE,
    NORMALIZERS,
    OUTPUT_FORMATS,
    RULES,
    SILENCE_DBFS,
    TRIM_MARGIN_S,
    Filters,
    Preprocessing,
)

if TYPE_CHECKING:
    from muomni.data.shards.manifest import Task

_SPEECH = ("speech", "tts")
_IMAGES = ("image-caption", "sft")
_TEXTS = ("text", "image-caption", "speech", "tts")

# Field of `Filters`: tasks, type of the flag, its metavar, and its help.
_FILTERS: dict[str, tuple[tuple[str, ...], Callable[[str], int | float | str], str, str]] = {
    "min_duration_s": (_SPEECH, any_number, "S", "minimum duration of audio clips in seconds"),
    "max_duration_s": (_SPEECH, any_number, "S", "maximum duration of audio clips in seconds"),
    "min_chars_per_s": (
        _SPEECH,
        any_number,
        "N",
        "minimum characters of the transcript per second",
    ),
    "max_chars_per_s": (
        _SPEECH,
        any_number,
        "N",
        "maximum characters of the transcript per second",
    ),
    "max_silence_fraction": (
        _SPEECH,
        any_number,
        "F",
        f"maximum fraction of {1000 * FRAME_S:g} ms frames with an RMS below {SILENCE_DBFS} dBFS",
    ),
    "max_clipped_fraction": (_SPEECH, any_number, "F", "maximum fraction of full-scale samples"),
    "min_side_pixels": (_IMAGES, any_integer, "PIXELS", "minimum shorter side of images"),
    "max_pixels": (_IMAGES, any_integer, "N", "maximum pixels of images (width times height)"),
    "max_aspect": (_IMAGES, any_number, "RATIO", "maximum ratio of the longer to the shorter side"),
    "min_chars": (_TEXTS, any_integer, "N", "minimum characters of texts"),
    "max_chars": (_TEXTS, any_integer, "N", "maximum characters of texts"),
    "script": (
        _TEXTS,
        str.lower,
        "NAME",
        f"Unicode script of at least {MIN_SCRIPT_SHARE:.0%}% of the letters, such as latin, cyrillic, "
        "or han",
    ),
}

_FILTER_NOTE = {
    "image-caption": "An image is dropped if it is out of bounds or all its captions are.",
    "sft": "A conversation is dropped if an image is out of bounds.",
}
_DEFAULT = Preprocessing()


def add_filters(verb: argparse.ArgumentParser, task: "Task") -> None:
    """Add the filter flags of a task."""
    group = verb.add_argument_group(
        "filters",
        "Samples out of bounds are counted by reason and listed in filtered/; they do not count as bad. "
        + _FILTER_NOTE.get(task, ""),
    )
    for name, (tasks, kind, metavar, text) in _FILTERS.items():
        if task in tasks:
            group.add_argument(RULES[name].flag, dest=name, type=kind, metavar=metavar, help=text)


def parse_filters(arguments: argparse.Namespace) -> Filters:
    """The filters of the command line; raises `ConfigError` as `Filters` does."""
    values = {each.name: getattr(arguments, each.name, None) for each in fields(Filters)}
    return Filters(**{name: value for name, value in values.items() if value is not None})


def add_preprocessing(verb: argparse.ArgumentParser, task: "Task") -> None:
    """Add the preprocessing flags of a task."""
    group = verb.add_argument_group(
        "preprocessing",
        "Files are copied unchanged unless requested otherwise. The manifest records all changes.",
    )
    if task != "text":
        group.add_argument(
            "--check",
            choices=CHECKS,
            default=_DEFAULT.check,
            help="decode every image and audio clip, or only read its header, which is faster but "
            "misses later damage",
        )
    if task in _IMAGES:
        _add_images(group)
    if task in (*_SPEECH, "sft"):
        group.add_argument(
            "--sample-rate",
            dest="sample_rate_hz",
            type=any_integer,
            metavar="HZ",
            help="resample audio clips of other rates, as 16-bit FLAC",
        )
    if task in _SPEECH:
        group.add_argument(
            "--trim-silence",
            dest="trim_dbfs",
            type=any_number,
            nargs="?",
            const=float(SILENCE_DBFS),
            metavar="DBFS",
            help="cut off the beginning and end of audio clips below this level, except for "
            f"{TRIM_MARGIN_S:g} s; without a value, below {SILENCE_DBFS} dBFS",
        )
    if task != "sft":
        group.add_argument(
            "--normalize",
            default="",
            metavar="STEP,...",
            help=f"normalize texts by these steps, in order: {', '.join(NORMALIZERS)}; json keeps the "
            "original text",
        )


def _add_images(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--resize-shorter",
        type=any_integer,
        metavar="PIXELS",
        help="shrink larger images to this shorter side",
    )
    group.add_argument("--upscale", action="store_true", help="also enlarge smaller images")
    group.add_argument(
        "--image-format",
        choices=OUTPUT_FORMATS,
        default=_DEFAULT.image_format,
        help="format of images; JPEG has a white background for transparency",
    )
    group.add_argument(
        "--quality",
        type=any_integer,
        default=_DEFAULT.quality,
        metavar="N",
        help="quality of JPEG and WebP, 1 to 100",
    )


def parse_preprocessing(arguments: argparse.Namespace) -> Preprocessing:
    """The preprocessing of the command line; raises `ConfigError` as `Preprocessing` does."""
    given = vars(arguments)
    names = (
        "check",
        "resize_shorter",
        "upscale",
        "image_format",
        "quality",
        "sample_rate_hz",
        "trim_dbfs",
    )
    steps = given.get("normalize", "")
    return Preprocessing(
        **{name: given[name] for name in names if name in given},
        normalize=tuple(step.strip() for step in steps.split(",") if step.strip()),
    )
