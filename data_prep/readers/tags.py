"""Tags in the texts of conversations that stand for an image or audio clip.

The next file of the record: `<image>`, `<ImageHere>`, `<|image|>`,
`<|vision_start|><|image_pad|><|vision_end|>`, `(<image>./</image>)`, `<audio>`, `<|AUDIO|>`, ... A numbered
file: `<image_1>`, `<|image_1|>`, `<image 1>`, `<image_00>`. A file by its path: `<img>path</img>`,
`<audio>path</audio>`. Upper and lower case are equal.

The same characters can be ordinary words, such as `<audio>` in a chat about HTML. They are if the record
has no file for them, or if the questions already have a tag for each file and the words are part of an
answer.
"""

import re
from typing import NamedTuple

from muomni.data.text.turns import MediaKind

_NAMES: dict[MediaKind, tuple[str, ...]] = {
    "image": (
        *("image", "img", "imagehere", "image_here", "image_placeholder", "image_pad"),
        *("image_token", "image_soft_token", "start_of_image", "img_context"),
    ),
    "audio": (
        *("audio", "speech", "sound", "audiohere", "audio_here", "speechhere", "audio_placeholder"),
        *(
            "audio_pad",
            "audio_token",
            "audio_soft_token",
            "sound_placeholder",
            "speech_placeholder",
        ),
    ),
}
_KINDS: dict[str, MediaKind] = {name: kind for kind, names in _NAMES.items() for name in names}
# Longer names first, since the first alternative that matches is taken.
_ANY_NAME = "|".join(sorted(_KINDS, key=len, reverse=True))
TAG = re.compile(
    rf"""
    (?:<\|(?:vision|image|audio)_(?:start|bos)\|>|<im_start>|<img>(?=<img_context>))?
    (?:
        \(?<(?P<around>img|image|audio)>(?P<inner>[^<>\n]+)</(?P=around)>\)?
      | <\|?[ ]?(?P<name>{_ANY_NAME})(?:[_ ]?(?P<number>\d{{1,4}}))?[ ]?\|?>
    )
    (?:<\|(?:vision|image|audio)_(?:end|eos)\|>|<im_end>|(?<=<img_context>)</img>)?
    """,
    re.VERBOSE | re.IGNORECASE,
)
_MEDIA_NAME = re.compile(
    r"[^\s<>\"'][^\n<>\"']*\.(?:jpe?g|jfif|png|webp|gif|bmp|tiff?|avif|heic|wav|flac|mp3|ogg|opus|m4a|aac|wma|aiff?"
    r"|webm|mp4|avi|mov|mkv)",
    re.IGNORECASE,
)
_MAX_NAME_CHARS = 4096
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://\S+|data:[^\s,]*,.+", re.IGNORECASE)


class Tag(NamedTuple):
    """A tag of a kind: `number` of its file, or `path`, or neither for the next file; `words` as written."""

    kind: MediaKind
    words: str
    number: int | None = None
    path: str = ""


def names_a_file(text: str) -> bool:
    """Whether a text is the name of an image, audio clip, or video."""
    return len(text) <= _MAX_NAME_CHARS and bool(_MEDIA_NAME.fullmatch(text))


def tag_of(match: re.Match[str]) -> Tag | None:
    """The tag of a match of `TAG`; None for an element of markup, such as `<audio>No sound.</audio>`."""
    words, inner = match[0], match["inner"]
    if inner is None:
        number = match["number"]
        return Tag(_KINDS[match["name"].lower()], words, int(number) if number else None)
    kind = _KINDS[match["around"].lower()]
    path = inner.strip()
    if path in ("./", "."):
        return Tag(kind, words)
    is_file = names_a_file(path) or _ADDRESS.fullmatch(path)
    return Tag(kind, words, path=path) if is_file else None


def tags_in(text: str) -> list[Tag]:
    """All tags of a text."""
    return [tag for match in TAG.finditer(text) if (tag := tag_of(match))]


def stands_alone(match: re.Match[str]) -> bool:
    """Whether a tag is written as one that stands for a file: alone on its line, or joined to the first word.

    A tag inside of a sentence, or of an element that is closed later, is not.
    """
    text = match.string
    name = match["name"] or match["around"]
    if re.search(rf"</{name}\s*>", text, re.IGNORECASE):
        return False
    before, after = text[: match.start()].rpartition("\n")[2], text[match.end() :]
    alone = not before.strip() and (not after.strip() or after.lstrip(" ")[:1] == "\n")
    joined = not text[: match.start()].strip() and after[:1].isalnum()
    return alone or joined
