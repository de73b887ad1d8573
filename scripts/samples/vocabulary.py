"""The words of the sample corpora, and the sentences that are made of them.

Everything is a function of hashes, so the corpora are reproducible. Sentences with free words have a
split: those of `val` and `test` are new combinations of words that occur in training.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from muomni.data.shards.manifest import hash64

T = TypeVar("T")

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
# In the order of the labels of Fashion-MNIST.
CLOTHING = (
    "T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot",
)  # fmt: skip
FOOTWEAR = ("sandal", "sneaker", "boot")
ANIMALS = (
    "ant", "bear", "butterfly", "camel", "crab", "deer", "dolphin", "duck", "eagle", "elephant",
    "flamingo", "frog", "giraffe", "goat", "gorilla", "hedgehog", "kangaroo", "koala", "lion",
    "lobster", "octopus", "owl", "panda", "parrot", "peacock", "penguin", "shark", "snail", "snake",
    "spider", "squid", "swan", "turtle", "whale", "wolf", "zebra",
)  # fmt: skip
THINGS = (
    "accordion", "airplane", "ambulance", "anchor", "avocado", "axe", "balloon", "banana", "bathtub",
    "bed", "bell", "bicycle", "book", "brain", "broccoli", "broom", "bus", "cactus", "candle", "carrot",
    "castle", "chair", "cherries", "cloud", "cookie", "crown", "cucumber", "door", "drum", "envelope",
    "feather", "fire", "grapes", "guitar", "hamburger", "hammer", "helicopter", "key", "kite", "ladder",
    "lemon", "magnet", "microscope", "mushroom", "necktie", "pear", "pencil", "pineapple", "pizza",
    "popcorn", "pretzel", "rainbow", "rocket", "rose", "scissors", "snowflake", "spoon", "star",
    "strawberry", "tent", "tomato", "tractor", "trumpet", "umbrella", "volcano", "watermelon",
)  # fmt: skip
# No other image or audio clip has these names: what training on the others cannot teach.
UNSEEN_NAMES = (
    "abacus", "backpack", "badger", "bagel", "basket", "beaver", "beetle", "briefcase", "burrito",
    "camera", "canoe", "chestnut", "coconut", "compass", "crayon", "croissant", "dragon", "dumpling",
    "eggplant", "falafel", "ferry", "flute", "garlic", "glasses", "hamster", "hippopotamus", "jellyfish",
    "keyboard", "laptop", "llama", "locomotive", "luggage", "mammoth", "mango", "megaphone",
    "microphone", "mosquito", "motorcycle", "mountain", "newspaper", "orangutan", "otter", "pancakes",
    "paperclip", "parachute", "peach", "peanuts", "potato", "rabbit", "raccoon", "radio",
    "sailboat", "sandwich", "satellite", "saxophone", "screwdriver", "scroll", "sloth", "snowman",
    "stethoscope", "sunflower", "taxi", "telescope", "television", "tiger", "toothbrush", "trophy",
    "tulip", "unicorn", "violin", "waffle", "watch", "window", "wrench",
)  # fmt: skip
# Names of icons that differ from ours.
ICONS = {"book": "closed-book"}
EMOJI = (*ANIMALS, *THINGS)
NAMES = (*CLOTHING, *EMOJI)

# Spoken in each voice, so questions about unseen images come from unseen voices.
ASK_NAME = ("What is this?", "What do you see?", "Name the thing in the picture.")  # terms: allow
ASK_DIGIT = ("Which digit is it?", "What number do you see?")
ASK_FEET = ("Is it worn on the feet?", "Do you wear it on your feet?")
ASK_MORE = ("Is it more than four?", "Is the number more than four?")
ASK_ANIMAL = ("Is it an animal?", "Does the picture show an animal?")
COUNTED = ("shoes", "digits", "animals")
ASK_COUNT = {kind: f"How many of them are {kind}?" for kind in COUNTED}
ASK_IS = "Is it the {}?"
ASK_WHICH = "Which picture is the {}?"  # terms: allow
ASK_ALOUD = ("What is this? Answer aloud.", "Tell me what you see, aloud.")
SPEAK = ("Say: {}", "Read this aloud: {}", "Speak this text: {}")
# For texts and audio clips: repeating one is half of converting it to the other.
REPEAT = ("Repeat: {}", "Write this down: {}", "Copy this: {}")
FIXED_QUESTIONS = (*ASK_NAME, *ASK_DIGIT, *ASK_FEET, *ASK_MORE, *ASK_ANIMAL, *ASK_COUNT.values())
CLOTHING_QUESTIONS = (
    *(ASK_IS.format(name) for name in CLOTHING),
    *(ASK_WHICH.format(name) for name in CLOTHING),
)

_COMMANDS = (
    "show me the {}", "find the {}", "put the {} next to the {}", "look at the {}", "say {}",
    "count to {d}", "turn left at the {}", "bring the {} and the {}", "press {d}", "stop at the {}",
    "call {d} {d} {d}", "go to picture {d}", "open the door", "turn right", "close the {}",  # terms: allow
)  # fmt: skip
_QUESTIONS = (
    "is this the {}", "which picture is the {}", "where is the {}", "is the {} next to the {}",  # terms: allow
    "is it the {} or the {}", "do you see the {}", "what is on the {}",
)  # fmt: skip
_VAL, _TEST = 0.1, 0.35


@dataclass(frozen=True, slots=True)
class Sentence:
    """A text to speak: its type, split, and words."""

    type: str
    split: str
    text: str


def fraction(name: str) -> float:
    """A reproducible number in [0, 1)."""
    return hash64(name) / 2**64


def pick(choices: Sequence[T], name: str) -> T:
    """A reproducible choice."""
    return choices[hash64(name) % len(choices)]


def plain(text: str) -> str:
    """A text as it is transcribed: lower case, without punctuation."""
    return " ".join(text.lower().replace("?", "").replace(".", "").replace(":", "").split())


def sentences(type: str, key: str) -> Iterator[Sentence]:
    """An endless series of sentences of a type without repetitions; `key` makes it a different series."""
    seen: set[str] = set()
    number = 0
    while True:
        text = _MAKERS[type](f"{type} {key} {number}")
        number += 1
        if text not in seen:
            seen.add(text)
            yield Sentence(type, split_of(text), text)


def split_of(text: str) -> str:
    """The split of a sentence; single words and sentences without free words are for training."""
    if " " not in text or text in ("open the door", "turn right"):
        return "train"
    position = fraction(f"split {text}")
    return "test" if position < _TEST else "val" if position < _TEST + _VAL else "train"


def take(type: str, key: str, split: str, count: int) -> list[Sentence]:
    """The first `count` sentences of a series that belong to a split."""
    found = []
    for sentence in sentences(type, key):
        if sentence.split == split:
            found.append(sentence)
        if len(found) == count:
            break
    return found


def _digits(key: str) -> str:
    return " ".join(pick(DIGITS, f"{key} {n}") for n in range(pick((2, 3, 3, 4, 5), key)))


def _letters(key: str) -> str:
    return " ".join(pick(LETTERS, f"{key} {n}") for n in range(pick((2, 3, 3, 4), key)))


def _names(key: str) -> str:
    first, second = (pick(NAMES, f"{key} {n}").lower() for n in range(2))
    return pick((f"{first} and {second}", f"the {first} not the {second}", f"the {first}"), key)


def _filled(templates: Sequence[str], key: str) -> str:
    text = pick(templates, key)
    for number in range(text.count("{")):
        word = pick(NAMES, f"{key} {number}").lower()
        digit = pick(DIGITS, f"{key} {number}")
        at = text.index("{")
        if text.startswith("{d}", at):
            text = text[:at] + digit + text[at + 3 :]
        else:
            text = text[:at] + word + text[at + 2 :]
    return text


_MAKERS = {
    "digits": _digits,
    "letters": _letters,
    "names": _names,
    "commands": lambda key: _filled(_COMMANDS, key),
    "questions": lambda key: _filled(_QUESTIONS, key),
}
SPEECH_TYPES = tuple(_MAKERS)
