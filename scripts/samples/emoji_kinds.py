"""What kind of thing an emoji shows, after Unicode's list of them (`emoji-test.txt`, UTS #51)."""

from pathlib import Path

_PRESENTATION = "FE0F"
_OTHER = "other"


def read_emoji_kinds(path: Path) -> dict[str, str]:
    """The kind ("animal", "person", "sky & weather") by code points ("1F469 200D 1F52C").

    A kind is what stands before the hyphen of the list's subgroup ("animal-bird"). Emoji that the list
    itself calls other are left out, and so are the selectors of presentation in the code points.

    Raises:
        ValueError: the file names no emoji.
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
        raise ValueError(f"{path} names no emoji: it is not Unicode's emoji-test.txt.")
    return kinds


def emoji_key(points: list[str]) -> str:
    """Code points in hexadecimal, as keys of `read_emoji_kinds` write them."""
    return " ".join(point.upper().zfill(4) for point in points if point.upper() != _PRESENTATION)
