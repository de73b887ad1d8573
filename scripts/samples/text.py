"""Text of the sample corpora: sentences about its vocabulary, and example sentences of WordNet."""

from collections.abc import Iterator
from pathlib import Path

from muomni.data.shards.manifest import hash64
from scripts.samples.vocabulary import (
    ANIMALS,
    CLOTHING,
    DIGITS,
    EMOJI,
    FOOTWEAR,
    NAMES,
    SPEECH_TYPES,
    pick,
    take,
)

_PER_TYPE, _NUM_FACTS, _NUM_WORDNET = 1000, 2500, 4000
_MAX_CHARS = 60


def write_text(folder: Path, wordnet: Path) -> None:
    """Write `vocabulary.txt` and `wordnet_examples.txt`, one sentence per line, without repetitions.

    Sentences of the types that are also spoken are those of their training split.
    """
    folder.mkdir()
    lines = [
        *_facts(),
        *(s.text for t in SPEECH_TYPES for s in take(t, "text", "train", _PER_TYPE)),
    ]
    _write(folder / "vocabulary.txt", lines)
    examples = set(wordnet.read_text(encoding="utf-8").splitlines())
    short = sorted((line for line in examples if len(line) <= _MAX_CHARS), key=hash64)
    _write(folder / "wordnet_examples.txt", short[:_NUM_WORDNET])


def _facts() -> Iterator[str]:
    """Statements about what names and digits are."""
    for number in range(_NUM_FACTS):
        key = f"fact {number}"
        name = pick(NAMES, key)
        digit = pick(DIGITS, key)
        more = "more" if DIGITS.index(digit) > 4 else "not more"
        feet = "worn" if name in FOOTWEAR else "not worn"
        animal = "an animal" if name in ANIMALS else "not an animal"
        other = pick(EMOJI if name in CLOTHING else CLOTHING, key)
        yield pick(
            (
                f"The {name} is {feet} on the feet.",
                f"The {name} is {animal}.",
                f"The number {digit} is {more} than four.",
                f"This is the {name}, and that is the {other}.",
                f"The first picture is the {name}, the second picture is the {other}.",  # terms: allow
                f"I see the {name}.",
            ),
            f"kind {key}",
        )


def _write(path: Path, lines: list[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in dict.fromkeys(lines)), encoding="utf-8")
