"""Options of data preparation, as the command line gives them and as plan and manifest record them.

Imports little, so that `--help` is fast.
"""

import re
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal, NamedTuple

from data_prep.skipped_files import SkippedFiles
from muomni.data.text.normalization import (
    QUOTES,
    remove_control,
    remove_punctuation,
    spoken_form,
)
from muomni.errors import ConfigError

DOCUMENTS = ("line", "paragraph", "file")
Check = Literal["decode", "header"]
CHECKS: tuple[Check, ...] = ("decode", "header")
ImageFormat = Literal["keep", "jpeg", "webp"]
OUTPUT_FORMATS: tuple[ImageFormat, ...] = ("keep", "jpeg", "webp")
_MIN_RATE_HZ, _MAX_RATE_HZ = 4_000, 192_000

# Frames with a lower RMS are silent; a full-scale sine is at -3 dBFS.
SILENCE_DBFS = -50
FRAME_S = 0.02
# Kept before the first and after the last frame that is not silent.
TRIM_MARGIN_S = 0.1
_MIN_TRIM_DBFS = -100
MIN_SCRIPT_SHARE = 0.5

# Unicode names of most characters start with their script; exceptions and additions.
_NAME_PREFIXES = {
    "han": ("CJK ", "IDEOGRAPHIC "),
    "hiragana": ("HIRAGANA ", "KATAKANA-HIRAGANA "),
    "katakana": ("KATAKANA ", "KATAKANA-HIRAGANA "),
}


@dataclass(frozen=True, slots=True)
class ReaderOptions:
    """Options that the readers of corpora take; `skipped` counts the files that a reader does not take."""

    media_root: Path | None = None
    document: str = "line"
    group_by: str = ""
    columns: dict[str, str] = field(default_factory=dict)
    delimiter: str = ""
    quotes: str = ""
    annotations: str = ""
    subsets: tuple[str, ...] = ()
    keep_case: bool = False
    text_form: str = ""
    language: str = ""
    speaker: str = ""
    keeps_tools: bool = True
    skipped: SkippedFiles = field(default_factory=SkippedFiles, compare=False, repr=False)

    def as_text(self) -> dict[str, str]:
        """The non-default options, for the manifest; without paths, since data may be moved."""
        texts = {
            "document": self.document if self.document != "line" else "",
            "group_by": self.group_by,
            "columns": ",".join(f"{k}={v}" for k, v in sorted(self.columns.items())),
            "delimiter": self.delimiter,
            "quotes": self.quotes,
            "annotations": self.annotations,
            "subsets": ",".join(self.subsets),
            "keep_case": "yes" if self.keep_case else "",
            "text_form": self.text_form,
            "language": self.language,
            "speaker": self.speaker,
            "tool_turns": "" if self.keeps_tools else "reject",
        }
        return {name: text for name, text in texts.items() if text}

    @classmethod
    def from_text(cls, texts: dict[str, str], media_root: Path | None) -> "ReaderOptions":
        """Inverse of `as_text`; `media_root` is not in the texts."""
        columns = filter(None, texts.get("columns", "").split(","))
        plain = (
            "annotations",
            "delimiter",
            "quotes",
            "group_by",
            "text_form",
            "language",
            "speaker",
        )
        return cls(
            media_root=media_root,
            document=texts.get("document", "line"),
            columns=dict(pair.split("=", 1) for pair in columns),
            subsets=tuple(filter(None, texts.get("subsets", "").split(","))),
            keep_case="keep_case" in texts,
            skipped=SkippedFiles(),
            keeps_tools="tool_turns" not in texts,
            **{name: texts.get(name, "") for name in plain},
        )


class _Rule(NamedTuple):
    """Flag of a bound, reason code of samples beyond it, and unit of its value."""

    flag: str
    reason: str
    unit: str


RULES = {
    "min_duration_s": _Rule("--min-duration", "too-short", "seconds"),
    "max_duration_s": _Rule("--max-duration", "too-long", "seconds"),
    "min_chars_per_s": _Rule("--min-chars-per-second", "too-slow", "characters per second"),
    "max_chars_per_s": _Rule("--max-chars-per-second", "too-fast", "characters per second"),
    "max_silence_fraction": _Rule("--max-silence-fraction", "too-silent", "of its frames silent"),
    "max_clipped_fraction": _Rule(
        "--max-clipped-fraction", "too-clipped", "of its samples clipped"
    ),
    "min_side_pixels": _Rule("--min-side", "too-small", "pixels on the shorter side"),
    "max_pixels": _Rule("--max-pixels", "too-large", "pixels"),
    "max_aspect": _Rule("--max-aspect", "too-narrow", "as aspect ratio"),
    "min_chars": _Rule("--min-chars", "too-few-chars", "characters"),
    "max_chars": _Rule("--max-chars", "too-many-chars", "characters"),
    "script": _Rule("--script", "other-script", "of its letters in the script"),
}
# Reason code of samples that `--overlap drop` drops.
SPLIT_OVERLAP = "split-overlap"
FILTER_REASONS = frozenset((*(rule.reason for rule in RULES.values()), SPLIT_OVERLAP))
# What to do with groups that a corpus declares in several splits.
OVERLAPS = ("refuse", "drop", "move", "allow")


@dataclass(frozen=True, slots=True)
class Filters:
    """Bounds on samples; None and an empty script disable a filter.

    Raises `ConfigError` for a value that no sample can have, a minimum above its maximum, or a script
    that Unicode does not define.
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
                limits = f"at least {least}" if most > 1 else f"between {least} and {most}"
                raise ConfigError(f"{RULES[name].flag} must be {limits}, got {value}")
            opposite = name.replace("max_", "min_")
            smallest = bounds.get(opposite)
            if smallest is not None and smallest > value:
                flags = f"{RULES[opposite].flag} {smallest} exceeds {RULES[name].flag} {value}"
                raise ConfigError(f"{flags}, so no sample would remain")
        letters = filter(str.isalpha, map(chr, range(sys.maxunicode + 1)))
        if self.script and not any(is_in_script(letter, self.script) for letter in letters):
            raise ConfigError(
                f"--script {self.script!r} is not a Unicode script; use a name such as latin, cyrillic, "
                "or han"
            )

    @property
    def needs_levels(self) -> bool:
        """Whether audio clips must be decoded for filtering."""
        return self.max_silence_fraction is not None or self.max_clipped_fraction is not None

    def as_text(self) -> dict[str, str]:
        """The active filters, for plan and manifest."""
        return {name: str(value) for name, value in asdict(self).items() if value not in (None, "")}

    @classmethod
    def from_text(cls, texts: dict[str, str]) -> "Filters":
        """Inverse of `as_text`."""
        kinds = {each.name: each.type for each in fields(cls)}
        read = {int | None: int, float | None: float, str: str}
        return cls(**{name: read[kinds[name]](text) for name, text in texts.items()})


def is_in_script(letter: str, script: str) -> bool:
    """Whether the Unicode name of a letter assigns it to a script, such as "latin"."""
    name = unicodedata.name(letter, "").removeprefix("FULLWIDTH ").removeprefix("HALFWIDTH ")
    return name.startswith(_NAME_PREFIXES.get(script, (f"{script.upper()} ",)))


def _normalize_whitespace(text: str) -> str:
    """Reduce runs of white space to one space, line break, or blank line, and strip the ends."""

    def shortest(run: re.Match[str]) -> str:
        return ("\n" * min(run[0].count("\n"), 2)) or " "

    return re.sub(r"\s+", shortest, text).strip()


NORMALIZERS: dict[str, Callable[[str], str]] = {
    "nfc": lambda text: unicodedata.normalize("NFC", text),
    "nfkc": lambda text: unicodedata.normalize("NFKC", text),
    "control": remove_control,
    "quotes": lambda text: text.translate(QUOTES),
    "punctuation": remove_punctuation,
    "spoken": spoken_form,
    "lower": str.lower,
    "upper": str.upper,
    "whitespace": _normalize_whitespace,
}


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How files are checked and converted; raises `ConfigError` for invalid values.

    Args:
        check: decode every file, or trust its header.
        resize_shorter: pixels of the shorter side; smaller images are enlarged only with `upscale`.
        image_format: format of the stored images.
        quality: of JPEG and WebP.
        sample_rate_hz: audio clips of other rates are resampled to this one.
        normalize: names of `NORMALIZERS`, applied in this order.
        trim_dbfs: quieter beginnings and ends of audio clips are cut off, except for `TRIM_MARGIN_S`.
    """

    check: Check = "decode"
    resize_shorter: int | None = None
    upscale: bool = False
    image_format: ImageFormat = "keep"
    quality: int = 90
    sample_rate_hz: int | None = None
    normalize: tuple[str, ...] = ()
    trim_dbfs: float | None = None

    def __post_init__(self) -> None:
        if self.resize_shorter is not None and self.resize_shorter < 1:
            raise ConfigError(f"--resize-shorter must be at least 1, got {self.resize_shorter}")
        if self.upscale and self.resize_shorter is None:
            raise ConfigError("--upscale requires --resize-shorter")
        if not 1 <= self.quality <= 100:
            raise ConfigError(f"--quality must be between 1 and 100, got {self.quality}")
        rate = self.sample_rate_hz
        if rate is not None and not _MIN_RATE_HZ <= rate <= _MAX_RATE_HZ:
            raise ConfigError(
                f"--sample-rate must be between {_MIN_RATE_HZ} and {_MAX_RATE_HZ} Hz, got {rate}"
            )
        if self.trim_dbfs is not None and not _MIN_TRIM_DBFS <= self.trim_dbfs < 0:
            raise ConfigError(
                f"--trim-silence must be a level from {_MIN_TRIM_DBFS} to 0 dBFS, such as {SILENCE_DBFS}, got "
                f"{self.trim_dbfs:g}"
            )
        unknown = [name for name in self.normalize if name not in NORMALIZERS]
        if unknown:
            raise ConfigError(
                f"--normalize {unknown[0]!r} is unknown; choose from {', '.join(NORMALIZERS)}"
            )

    @property
    def changes_audio(self) -> bool:
        return self.sample_rate_hz is not None or self.trim_dbfs is not None

    @property
    def changes_images(self) -> bool:
        return self.resize_shorter is not None or self.image_format != "keep"

    def as_text(self) -> dict[str, str]:
        """The non-default options, for plan and manifest."""
        default = asdict(Preprocessing())
        chosen = {name: value for name, value in asdict(self).items() if value != default[name]}
        chosen.pop("quality", None)
        if self.changes_images:
            chosen["quality"] = self.quality
        return {
            name: ",".join(value) if isinstance(value, tuple) else str(value)
            for name, value in chosen.items()
        }

    @classmethod
    def from_text(cls, texts: dict[str, str]) -> "Preprocessing":
        """Inverse of `as_text`."""
        read: dict[str, Callable[[str], object]] = {
            "resize_shorter": int,
            "quality": int,
            "sample_rate_hz": int,
            "trim_dbfs": float,
            "upscale": lambda text: text == "True",
            "normalize": lambda text: tuple(text.split(",")),
        }
        return cls(**{name: read.get(name, str)(text) for name, text in texts.items()})  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Which samples `dedup` treats as duplicates, beyond those of equal content.

    Raises `ConfigError` for invalid values.

    Args:
        reads_text: also samples with the same words and media.
        is_near: also near-duplicate images and texts.
        max_distance: of 64 bits, between the hashes of near-duplicate images.
        min_similarity: between the MinHash signatures of near-duplicate texts.
    """

    reads_text: bool = True
    is_near: bool = False
    max_distance: int = 4
    min_similarity: float = 0.8

    def __post_init__(self) -> None:
        if not 0 <= self.max_distance <= 16:
            raise ConfigError(
                f"--max-distance must be between 0 and 16 bits, got {self.max_distance}"
            )
        if not 0.5 <= self.min_similarity <= 1:
            raise ConfigError(
                f"--min-similarity must be between 0.5 and 1, got {self.min_similarity:g}"
            )
        if self.is_near and not self.reads_text:
            raise ConfigError("--near reads the samples, so it cannot be used with --content-only")


MediaKind = Literal["image", "audio"]
Robots = Literal["all", "tags", "none"]
ROBOTS: tuple[Robots, ...] = ("all", "tags", "none")
_MAX_BYTES: dict[MediaKind, int] = {"image": 50 * 10**6, "audio": 500 * 10**6}


@dataclass(frozen=True, slots=True)
class FetchOptions:
    """How `fetch` downloads; raises `ConfigError` for a contact that cannot be sent.

    Args:
        kind: what the URLs are expected to hold.
        num_connections: requests at a time.
        num_per_host: requests at a time to one host.
        rate: requests per second; None for no limit.
        host_rate: requests per second to one host.
        num_attempts: requests per URL if failures are temporary.
        first_wait_s: wait before the second attempt; each further wait is twice as long.
        max_wait_s: longest wait that a server may ask for.
        connect_timeout_s: limit for a connection.
        read_timeout_s: limit without any bytes.
        total_timeout_s: limit for a request.
        max_redirects: redirects per URL.
        max_bytes: limit for a file; 0 for the default of its kind.
        contact: mail address or web page in the user agent.
        robots: obey robots.txt and X-Robots-Tag (all), the latter only (tags), or none.
        allow_private: also connect to addresses that are not public.
    """

    kind: MediaKind = "image"
    num_connections: int = 64
    num_per_host: int = 4
    rate: float | None = None
    host_rate: float = 10.0
    num_attempts: int = 4
    first_wait_s: float = 1.0
    max_wait_s: float = 120.0
    connect_timeout_s: float = 10.0
    read_timeout_s: float = 30.0
    total_timeout_s: float = 300.0
    max_redirects: int = 5
    max_bytes: int = 0
    contact: str = ""
    robots: Robots = "all"
    allow_private: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[!-'*-~]*", self.contact):
            raise ConfigError(
                f"--contact {self.contact!r} must be a mail address or URL, in ASCII without spaces"
            )

    @property
    def size_limit(self) -> int:
        """Limit for a file, in bytes."""
        return self.max_bytes or _MAX_BYTES[self.kind]
