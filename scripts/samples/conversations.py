"""Conversations about the images and audio clips of the sample corpora, in the layout of LLaVA.

The type of a conversation is its question: the blind baseline of a type is its most frequent answer.
Questions about images of `val` and `test` are asked by unseen voices.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from scripts.samples.images import NamedImage
from scripts.samples.speech import UNSEEN_SUFFIX, Clip
from scripts.samples.vocabulary import (
    ANIMALS,
    ASK_ALOUD,
    ASK_ANIMAL,
    ASK_COUNT,
    ASK_DIGIT,
    ASK_FEET,
    ASK_IS,
    ASK_MORE,
    ASK_NAME,
    ASK_WHICH,
    CLOTHING,
    COUNTED,
    DIGITS,
    FOOTWEAR,
    REPEAT,
    SPEAK,
    SPEECH_TYPES,
    fraction,
    pick,
    plain,
    take,
)
from scripts.samples.voices import TALKER, TRAINED, UNSEEN, VALIDATION

Conversation = dict[str, object]
# Images, and questions with their answers.
Asked = tuple[list[NamedImage], list[tuple[str, str]]]

KINDS = ("clothing", "digit", "emoji")
_ASKING = {"train": TRAINED, "val": VALIDATION, "test": UNSEEN}
# Conversations of each type.
_COUNTS = {
    "name": {"train": 900, "val": 50, "test": 100},
    "asked": {"train": 900, "val": 50, "test": 100},
    "answer_aloud": {"train": 400, "val": 20, "test": 40},
    "transcribe": {"train": 1800, "val": 130, "test": 240},
    "repeat": {"train": 800, "val": 40, "test": 60},
}
_ORDINALS = ("the first", "the second")


def write_conversations(
    split: str, images: Sequence[NamedImage], clips: Sequence[Clip]
) -> list[Conversation]:
    """All conversations of a split about its images and clips."""
    album = Album(split, images)
    spoken = {(clip.voice, clip.text): clip for clip in clips}
    clips = [clip for clip in clips if clip.split == split]
    return [
        *_about_images(album, spoken),
        *_answered_aloud(album, spoken),
        *_transcribed(split, clips),
        *_spoken(split, clips),
        *_repeated(split),
    ]


class Album:
    """The images of one split, and questions about them."""

    def __init__(self, split: str, images: Sequence[NamedImage]) -> None:
        self.split = split
        self.of = {
            kind: [p for p in images if p.split == split and p.type == kind] for kind in KINDS
        }

    def images(self, key: str, kinds: Sequence[str], count: int) -> Iterator[NamedImage]:
        """`count` images in a random order, of each kind in turn."""
        pools = [sorted(self.of[kind], key=lambda p: fraction(f"{key} {p.file}")) for kind in kinds]
        for number in range(count):
            pool = pools[number % len(pools)]
            yield pool[number // len(pools) % len(pool)]

    def other(self, key: str, accept: Callable[[NamedImage], bool]) -> NamedImage:
        """A random image of a random kind that is accepted."""
        number = 0
        while True:
            kind = pick(KINDS, f"kind {key} {number}")
            image = pick(self.of[kind], f"image {key} {number}")
            if accept(image):
                return image
            number += 1

    def name(self, image: NamedImage, key: str) -> Asked:
        ask = pick((*ASK_NAME, *ASK_DIGIT) if image.type == "digit" else ASK_NAME, key)
        return [image], [(ask, image.name)]

    def yes_no(self, image: NamedImage, key: str) -> Asked:
        """A property, or for clothing its name; about half the answers are yes."""
        if image.type == "digit":
            return [image], [(pick(ASK_MORE, key), _yes(DIGITS.index(image.name) > 4))]
        if image.type == "emoji":
            return [image], [(pick(ASK_ANIMAL, key), _yes(image.name in ANIMALS))]
        if fraction(f"feet {key}") < (0.8 if image.name in FOOTWEAR else 0.3):
            return [image], [(pick(ASK_FEET, key), _yes(image.name in FOOTWEAR))]
        is_yes = fraction(f"yes {key}") < 0.5
        others = [name for name in CLOTHING if name != image.name]
        return [image], [(ASK_IS.format(image.name if is_yes else pick(others, key)), _yes(is_yes))]

    def which_of_two(self, image: NamedImage, key: str) -> Asked:
        """Which of two images shows a piece of clothing."""
        other = self.other(key, lambda other: other.name != image.name)
        images = [image, other] if fraction(f"order {key}") < 0.5 else [other, image]
        return images, [(ASK_WHICH.format(image.name), _ORDINALS[images.index(image)])]

    def how_many(self, image: NamedImage, key: str) -> Asked:
        """How many of two to four images are of a kind; `image` is one of them."""
        kind = pick(COUNTED, f"counted {key}")
        count = pick((2, 3, 4), f"count {key}")
        matching = pick(range(count), f"matching {key}")
        images = [image] + [
            self.other(f"{key} {n}", lambda p, wanted=n < matching: _is(p, kind) == wanted)
            for n in range(count - 1)
        ]
        images.sort(key=lambda image: fraction(f"{key} {image.file}"))
        return images, [(ASK_COUNT[kind], DIGITS[sum(_is(p, kind) for p in images)])]

    def two_turns(self, image: NamedImage, key: str) -> Asked:
        """The name, and then a property."""
        images, named = self.name(image, key)
        return images, [*named, *self.yes_no(image, f"second {key}")[1]]


def _is(image: NamedImage, kind: str) -> bool:
    """Whether an image is of a kind of `COUNTED`."""
    if kind == "animals":
        return image.name in ANIMALS
    return image.name in FOOTWEAR if kind == "shoes" else image.type == "digit"


def _yes(is_yes: bool) -> str:
    return "yes" if is_yes else "no"


def _about_images(album: Album, spoken: dict[tuple[str, str], Clip]) -> Iterator[Conversation]:
    """Questions about images, each type written and asked by voice."""
    plan: list[tuple[str, Callable[[NamedImage, str], Asked], tuple[str, ...], str]] = [
        *((f"name_{kind}", album.name, (kind,), "name") for kind in KINDS),
        ("yes_no", album.yes_no, KINDS, "asked"),
        ("which_of_two", album.which_of_two, ("clothing",), "asked"),
        ("how_many", album.how_many, KINDS, "asked"),
        ("two_turns", album.two_turns, KINDS, "asked"),
    ]
    for base, ask, kinds, counts in plan:
        for type, is_spoken in ((base, False), (f"spoken_{base}", True)):
            images = album.images(type, kinds, _COUNTS[counts][album.split])
            for number, image in enumerate(images):
                asked = ask(image, f"{album.split} {type} {number}")
                entry = _header(type, album.split, number)
                yield _conversation(entry, *asked, spoken if is_spoken else None)


def _answered_aloud(album: Album, spoken: dict[tuple[str, str], Clip]) -> Iterator[Conversation]:
    """Spoken answers to a question about an image."""
    images = album.images("aloud", KINDS, _COUNTS["answer_aloud"][album.split])
    for number, image in enumerate(images):
        ask = pick(ASK_ALOUD, f"{album.split} {number}")
        entry = _header("answer_aloud", album.split, number)
        entry = _conversation(entry, [image], [(ask, image.name)], None)
        yield _with_speech(entry, spoken[TALKER.name, image.name.lower()])


def _transcribed(split: str, clips: Sequence[Clip]) -> Iterator[Conversation]:
    """Clips to write down, with several prompts."""
    clips = [clip for clip in clips if not clip.type.startswith("prompts")]
    clips.sort(key=lambda clip: fraction(f"transcribe {clip.file}"))
    for number in range(_COUNTS["transcribe"][split]):
        clip = clips[number % len(clips)]
        suffix = UNSEEN_SUFFIX if clip.type.endswith(UNSEEN_SUFFIX) else ""
        entry = _header(f"write_down{suffix}", split, number)
        ask = pick(REPEAT, f"{clip.file} {number}").format("<audio>")
        entry |= {"group": Path(clip.file).stem, "audio": clip.path}
        yield entry | {"conversations": _turns([(ask, clip.text)])}


def _spoken(split: str, clips: Sequence[Clip]) -> Iterator[Conversation]:
    """Texts to read aloud, in the voice of the Talker."""
    chosen = [clip for clip in clips if clip.voice == TALKER.name]
    chosen.sort(key=lambda clip: fraction(f"speak {clip.file}"))
    for number, clip in enumerate(chosen):
        entry = _header("read_aloud", split, number)
        ask = pick(SPEAK, clip.file).format(clip.text)
        entry |= {"group": Path(clip.file).stem, "conversations": _turns([(ask, clip.text)])}
        yield _with_speech(entry, clip)


def _repeated(split: str) -> Iterator[Conversation]:
    """Texts to repeat, a part of both reading aloud and transcribing."""
    for type in SPEECH_TYPES:
        count = _COUNTS["repeat"][split] // len(SPEECH_TYPES)
        for number, sentence in enumerate(take(type, "repeat", split, count)):
            entry = _header("repeat", split, f"{type}-{number}")
            ask = pick(REPEAT, sentence.text).format(sentence.text)
            entry |= {"group": f"repeat:{sentence.text}"}
            yield entry | {"conversations": _turns([(ask, sentence.text)])}


def _header(type: str, split: str, number: object) -> Conversation:
    return {"id": f"{type}-{split}-{number}", "split": split, "type": type}


def _conversation(
    entry: Conversation,
    images: Sequence[NamedImage],
    turns: Sequence[tuple[str, str]],
    spoken: dict[tuple[str, str], Clip] | None,
) -> Conversation:
    """A conversation that starts with its images; with `spoken`, its questions are audio clips."""
    audio = []
    asked = []
    for position, (ask, answer) in enumerate(turns):
        if spoken is not None:
            voice = pick(_ASKING[str(entry["split"])], f"{entry['id']} {position}")
            audio.append(spoken[voice.name, plain(ask)].path)
            ask = "<audio>"
        asked.append(("<image>" * len(images) + ask if position == 0 else ask, answer))
    entry = {**entry, "image": [image.path for image in images]}
    if audio:
        entry["audio"] = audio
    return {**entry, "conversations": _turns(asked)}


def _turns(turns: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    pairs = [
        ({"from": "human", "value": ask}, {"from": "gpt", "value": answer}) for ask, answer in turns
    ]
    return [turn for pair in pairs for turn in pair]


def _with_speech(entry: Conversation, clip: Clip) -> Conversation:
    """The conversation with its last answer spoken."""
    turns = entry["conversations"]
    assert isinstance(turns, list)
    return {**entry, "conversations": [*turns[:-1], {**turns[-1], "audio": clip.path}]}
