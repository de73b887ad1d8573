"""Speech of the sample corpora: sentences in many voices, as tables of speech and of one speaker."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from muomni.data.shards.manifest import hash64
from scripts.samples import voices
from scripts.samples.vocabulary import (
    CLOTHING_QUESTIONS,
    DIGITS,
    FIXED_QUESTIONS,
    LETTERS,
    NAMES,
    SPEECH_TYPES,
    Sentence,
    plain,
    take,
)
from scripts.samples.voices import ALLISON, TALKER, TRAINED, UNSEEN, VALIDATION, Voice

# Clips of each type that one voice speaks.
_NUM_TRAIN = {"digits": 40, "letters": 24, "names": 44, "questions": 24, "commands": 44}
_NUM_TALKER = {"digits": 60, "letters": 16, "names": 80, "questions": 10, "commands": 50}
_NUM_VAL, _NUM_TEST_SEEN, _NUM_TEST_UNSEEN = 4, 4, 14
_NUM_VAL_TALKER, _NUM_TEST_TALKER = 8, 20
_NUM_ALLISON = {"digits": 60, "letters": 30}
_MAX_PROMPT_WORDS, _TEST_PROMPTS = 6, 0.3
UNSEEN_SUFFIX = "_unseen_voice"


@dataclass(frozen=True, slots=True)
class Clip:
    """An audio clip: its file, words, voice, split, and type."""

    file: str
    text: str
    voice: str
    split: str
    type: str

    @property
    def path(self) -> str:
        return f"speech/clips/{self.file}"


def build_speech(out: Path, allison: Path) -> list[Clip]:
    """Write `out`/speech with its tables; `allison` is an LJSpeech folder."""
    (out / "speech/clips").mkdir(parents=True, exist_ok=True)
    clips: list[Clip] = []
    for voice, sentences in plan_sentences():
        clips += _write(
            out, voice.name, sentences, voices.speak(voice, [_spelled(s) for s in sentences])
        )
    recorded, prompts = read_allison(allison)
    sentences = _allison_sentences()
    waveforms = [voices.join([recorded[word] for word in s.text.split()]) for s in sentences]
    clips += _write(out, ALLISON, sentences, waveforms)
    clips += _write(out, ALLISON, *prompts)
    _write_table(out / "speech/speech.tsv", clips)
    _write_table(out / "speech/talker.tsv", (clip for clip in clips if clip.voice == TALKER.name))
    return clips


def plan_sentences() -> list[tuple[Voice, list[Sentence]]]:
    """What each synthetic voice says."""
    plan = []
    questions = [plain(text) for text in (*FIXED_QUESTIONS, *CLOTHING_QUESTIONS)]
    for voice in TRAINED:
        is_talker = voice is TALKER
        said = [Sentence("questions", "train", text) for text in questions]
        counts = _NUM_TALKER if is_talker else {}
        for type in SPEECH_TYPES:
            key = f"{voice.name} {type}"
            said += take(type, key, "train", _NUM_TRAIN[type] + counts.get(type, 0))
            said += take(type, f"{key} val", "val", _NUM_VAL + is_talker * _NUM_VAL_TALKER)
            num_test = _NUM_TEST_SEEN + is_talker * _NUM_TEST_TALKER
            said += take(type, f"{key} test", "test", num_test)
        words = [*DIGITS, *LETTERS] if not is_talker else [*DIGITS, *LETTERS, *NAMES]
        said += [Sentence(_word_type(word), "train", word.lower()) for word in words]
        plan.append((voice, _distinct(said)))
    for split, unseen in (("val", VALIDATION), ("test", UNSEEN)):
        for voice in unseen:
            said = [Sentence("asked", split, text) for text in questions]
            for type in SPEECH_TYPES:
                said += take(type, f"{voice.name} {type}", split, _NUM_TEST_UNSEEN)
            said = [Sentence(f"{s.type}{UNSEEN_SUFFIX}", s.split, s.text) for s in said]
            plan.append((voice, _distinct(said)))
    return plan


def read_allison(
    folder: Path,
) -> tuple[dict[str, np.ndarray], tuple[list[Sentence], list[np.ndarray]]]:
    """Waveforms of digits and letters by word; short prompts and their waveforms."""
    words: dict[str, np.ndarray] = {}
    prompts: dict[str, tuple[Sentence, np.ndarray]] = {}
    for line in (folder / "metadata.csv").read_text(encoding="utf-8").splitlines():
        name, _, text = line.split("|")
        text = " ".join(
            "".join(c if c.isalnum() or c == "'" else " " for c in text).lower().split()
        )
        waveform = voices.read(folder / "wavs" / f"{name}.wav")
        if text in DIGITS or text in tuple(LETTERS):
            words.setdefault(text, waveform)
        elif len(text.split()) <= _MAX_PROMPT_WORDS and text not in prompts:
            is_test = hash64(f"prompt {text}") / 2**64 < _TEST_PROMPTS
            sentence = Sentence("prompts", "test" if is_test else "train", text)
            prompts[text] = (sentence, voices.trim(waveform))
    return words, ([s for s, _ in prompts.values()], [w for _, w in prompts.values()])


def _allison_sentences() -> list[Sentence]:
    """Digits and letters, alone and in strings of recorded words."""
    said = [Sentence(_word_type(word), "train", word) for word in (*DIGITS, *LETTERS)]
    for type, count in _NUM_ALLISON.items():
        said += take(type, f"{ALLISON} {type}", "train", count)
        said += take(type, f"{ALLISON} {type} val", "val", _NUM_VAL)
        said += take(type, f"{ALLISON} {type} test", "test", 2 * _NUM_TEST_SEEN)
    return _distinct(said)


def _word_type(word: str) -> str:
    return "digits" if word in DIGITS else "letters" if len(word) == 1 else "names"


def _spelled(sentence: Sentence) -> str:
    """A sentence as engines read it correctly: letters in upper case."""
    is_letters = sentence.type.startswith("letters")
    return ", ".join(sentence.text.upper().split()) + "." if is_letters else sentence.text


def _distinct(sentences: Iterable[Sentence]) -> list[Sentence]:
    """The sentences without repeated texts."""
    return list({sentence.text: sentence for sentence in reversed(list(sentences))}.values())[::-1]


def _write(
    out: Path, voice: str, sentences: list[Sentence], waveforms: list[np.ndarray]
) -> list[Clip]:
    clips = []
    for sentence, waveform in zip(sentences, waveforms, strict=True):
        file = f"{voice}_{hash64(sentence.text) & 0xFFFFFFFF:08x}.ogg"
        clips.append(Clip(file, sentence.text, voice, sentence.split, sentence.type))
        voices.encode(waveform, out / clips[-1].path)
    return clips


def _write_table(path: Path, clips: Iterable[Clip]) -> None:
    # A clip is a group of its own: the same words in another voice may be in another split.
    rows = ["id\taudio\ttext\tspeaker\tgroup\tsplit\ttype"]
    for clip in clips:
        stem = Path(clip.file).stem
        fields = (stem, f"clips/{clip.file}", clip.text, clip.voice, stem, clip.split, clip.type)
        rows.append("\t".join(fields))
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
