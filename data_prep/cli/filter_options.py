"""The flags of the filters: which task has which, and what was given on the command line."""

import argparse
from collections.abc import Callable
from dataclasses import fields

from data_prep.filters import FRAME_S, MIN_SCRIPT_SHARE, RULES, SILENCE_DBFS, Filters
from muomni.data.shards.manifest import Task

_SPEECH = ("speech", "tts")
_IMAGES = ("image-caption", "sft")
_TEXTS = ("text", "image-caption", "speech", "tts")

# Field of `Filters`: tasks, what the flag is read as, its placeholder, its help.
_OPTIONS: dict[str, tuple[tuple[str, ...], Callable[[str], int | float | str], str, str]] = {
    "min_duration_s": (_SPEECH, float, "S", "shortest audio clip, in seconds"),
    "max_duration_s": (_SPEECH, float, "S", "longest audio clip, in seconds"),
    "min_chars_per_s": (_SPEECH, float, "N", "slowest speech, by the transcript"),
    "max_chars_per_s": (_SPEECH, float, "N", "fastest speech, by the transcript"),
    "max_silence_fraction": (
        _SPEECH,
        float,
        "F",
        f"largest share of {1000 * FRAME_S:g} ms frames with an RMS below {SILENCE_DBFS} dBFS",
    ),
    "max_clipped_fraction": (_SPEECH, float, "F", "largest share of samples at full scale"),
    "min_side_pixels": (_IMAGES, int, "PIXELS", "least shorter side of an image"),
    "max_pixels": (_IMAGES, int, "N", "most pixels of an image, width times height"),
    "max_aspect": (
        _IMAGES,
        float,
        "RATIO",
        "longer side of an image by its shorter side, at most",
    ),
    "min_chars": (_TEXTS, int, "N", "fewest characters of a text"),
    "max_chars": (_TEXTS, int, "N", "most characters of a text"),
    "script": (
        _TEXTS,
        str.lower,
        "NAME",
        f"Unicode script that at least {MIN_SCRIPT_SHARE:g} of the characters belong to, like latin, "
        "cyrillic or han",
    ),
}

_DESCRIPTION: dict[Task, str] = {
    "text": "Documents outside of these bounds are left out.",
    "image-caption": "Captions outside of these bounds are left out, and so is an image that is "
    "outside of them or has no caption left.",
    "speech": "Audio clips and transcripts outside of these bounds are left out.",
    "tts": "Audio clips and transcripts outside of these bounds are left out.",
    "sft": "Conversations with an image outside of these bounds are left out; there are no filters "
    "for their texts and audio clips, since a turn cannot be left out alone.",
}


def add_filters(verb: argparse.ArgumentParser, task: Task) -> None:
    """Add the flags of the filters that serve a task."""
    group = verb.add_argument_group(
        "filters (none unless given)",
        f"{_DESCRIPTION[task]} What is left out is counted by reason and listed in filtered/; it does not "
        "count as bad.",
    )
    for name, (tasks, kind, placeholder, text) in _OPTIONS.items():
        if task in tasks:
            # Without a default the help says nothing of None, and only what was given is there.
            group.add_argument(
                RULES[name].flag,
                dest=name,
                type=kind,
                default=argparse.SUPPRESS,
                metavar=placeholder,
                help=text,
            )


def given_filters(arguments: argparse.Namespace) -> Filters:
    """The filters that the command line asks for; raises `ConfigError` as `Filters` does."""
    given = vars(arguments)
    names = [field.name for field in fields(Filters) if field.name in given]
    return Filters(**{name: given[name] for name in names})
