"""The flags of the treatment: how files are checked, and what is changed in them."""

import argparse

from data_prep.media.treatment import CHECKS, NORMALIZERS, OUTPUT_FORMATS, Treatment
from muomni.data.shards.manifest import Task

_DEFAULT = Treatment()


def add_treatment(verb: argparse.ArgumentParser, task: Task) -> None:
    """Add the flags that serve a task."""
    group = verb.add_argument_group(
        "treatment (files are copied as they are unless given)",
        "What was changed stands in manifest and card; another treatment makes another dataset.",
    )
    if task != "text":
        group.add_argument(
            "--check",
            choices=CHECKS,
            default=_DEFAULT.check,
            help="decode each image and audio clip in full, or trust its header, which is faster and "
            "lets files in that are broken behind it",
        )
    if task in ("image-caption", "sft"):
        _add_images(group)
    if task in ("speech", "tts", "sft"):
        group.add_argument(
            "--sample-rate",
            dest="sample_rate_hz",
            type=int,
            default=argparse.SUPPRESS,
            metavar="HZ",
            help="resample audio clips of other rates to this one, as FLAC of 16 bits",
        )
    if task != "sft":
        group.add_argument(
            "--normalize",
            default=argparse.SUPPRESS,
            metavar="STEP,...",
            help=f"change texts by these steps, in this order: {', '.join(NORMALIZERS)}; the text "
            "as it was is kept in json",
        )


def _add_images(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--resize-shorter",
        type=int,
        default=argparse.SUPPRESS,
        metavar="PIXELS",
        help="make larger images smaller, so that the shorter side has so many pixels",
    )
    group.add_argument("--upscale", action="store_true", help="also make smaller ones larger")
    group.add_argument(
        "--image-format",
        choices=OUTPUT_FORMATS,
        default=_DEFAULT.image_format,
        help="write images in this format; JPEG lays transparency on white",
    )
    group.add_argument("--quality", type=int, default=_DEFAULT.quality, help="of JPEG and WebP")


def given_treatment(arguments: argparse.Namespace) -> Treatment:
    """The treatment that the command line asks for; raises `ConfigError` as `Treatment` does."""
    given = vars(arguments)
    names = ("check", "resize_shorter", "upscale", "image_format", "quality", "sample_rate_hz")
    steps = given.get("normalize", "")
    return Treatment(
        **{name: given[name] for name in names if name in given},
        normalize=tuple(step.strip() for step in steps.split(",") if step.strip()),
    )
