"""The kind of thing that an emoji shows, from Unicode's `emoji-test.txt` (UTS #51)."""

from pathlib import Path

_PRESENTATION = "FE0F"
_OTHER = "other"


def read_emoji_kinds(path: Path) -> dict[str, str]:
    """Map code points ("1F469 200D 1F52C") to kinds ("animal", "person", "sky & weather").

    The kind is the part of the list's subgroup before the hyphen ("animal-bird"). Emoji of the subgroup
    "other" and presentation selectors in the code points are dropped.

    Raises:
        ValueError: the file contains no emoji.
    """
    kinds: dict[str, str] = {}
    kind = _OTHER
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# subgroup:"):
            kind = line.partition(":")[2].strip().partition("-")[0]
        points = line.partition("#")[0].partition(";")[0].split()
        if points and kind != _OTHER:
            kinds[emoji_key(points)] = kind
    if not kinds:
        raise ValueError(f"{path} contains no emoji; use Unicode's emoji-test.txt")
    return kinds


def emoji_key(points: list[str]) -> str:
    """Normalize hexadecimal code points to a key of `read_emoji_kinds`."""
    return " ".join(point.upper().zfill(4) for point in points if point.upper() != _PRESENTATION)
