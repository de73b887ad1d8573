"""Speech recognition by PocketSphinx, which has learned nothing from the run: an independent judge of speech.

Its acoustic model is for English. Its language model is a bigram model of the training transcripts, smoothed
as by Witten and Bell (1991), so it knows the vocabulary of the corpus. Needs the package pocketsphinx
(extra `judge`); without it, its metrics are not reported.
"""

import importlib
import importlib.util
import logging
import math
import tempfile
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

logger = logging.getLogger(__name__)

_START, _END = "<s>", "</s>"
# With fewer words in its dictionary, the corpus is of another language.
_MIN_PRONOUNCED = 0.9
# The recognizer expects silence around speech, and no digital silence.
_SILENCE_SAMPLES, _NOISE = 4000, 0.001


class IndependentRecognizer:
    """Transcribes waveforms at 16 kHz with a vocabulary of counted sentences, of `pronounced` words only."""

    def __init__(self, package: Any, sentences: Counter[str], pronounced: set[str]) -> None:
        with tempfile.NamedTemporaryFile("w", suffix=".lm") as file:
            file.write(bigram_model(sentences, pronounced))
            file.flush()
            self._decoder: Any = package.Decoder(lm=file.name, cmn="batch", loglevel="FATAL")

    def transcribe(self, waveform: Tensor) -> str:
        """The transcript of a waveform [N]; empty without recognized words."""
        padded = np.pad(waveform.detach().float().cpu().numpy(), _SILENCE_SAMPLES)
        padded = padded + np.random.default_rng(0).normal(0, _NOISE, len(padded))
        # The mean and noise of earlier clips must not affect a transcript; ranks get different clips.
        self._decoder.reinit_feat()
        self._decoder.start_utt()
        pcm = (np.clip(padded, -1, 1) * 32767).astype("<i2").tobytes()
        self._decoder.process_raw(pcm, full_utt=True)
        self._decoder.end_utt()
        hypothesis = self._decoder.hyp()
        return hypothesis.hypstr if hypothesis is not None else ""


def find_independent(sentences: Counter[str]) -> IndependentRecognizer | None:
    """A recognizer of the vocabulary of `sentences`; the log says why there is none (None).

    Words without a pronunciation in PocketSphinx's dictionary cannot be recognized.
    """
    if importlib.util.find_spec("pocketsphinx") is None:
        logger.warning("no independent judge of speech: install the extra 'judge' of muomni")
        return None
    package = importlib.import_module("pocketsphinx")
    dictionary = Path(package.get_model_path()) / "en-us/cmudict-en-us.dict"
    lines = dictionary.read_text(encoding="utf-8").splitlines()
    pronounced = {line.split(maxsplit=1)[0] for line in lines if line}
    words = {word for sentence in sentences for word in sentence.split()}
    missing = sorted(words - pronounced)
    if len(words) - len(missing) < max(1, _MIN_PRONOUNCED * len(words)):
        logger.warning("no independent judge of speech: it knows English words only")
        return None
    if missing:
        logger.warning("the independent judge of speech does not know %s", ", ".join(missing))
    return IndependentRecognizer(package, sentences, pronounced)


def bigram_model(sentences: Counter[str], pronounced: set[str]) -> str:
    """A bigram model of counted sentences in the ARPA format, of pronounced words only."""
    followers: defaultdict[str, Counter[str]] = defaultdict(Counter)
    words: Counter[str] = Counter()
    for sentence, count in sentences.items():
        spoken = [_START, *(word for word in sentence.split() if word in pronounced), _END]
        for first, second in pairwise(spoken):
            followers[first][second] += count
            words[second] += count
    total = sum(words.values()) + len(words)
    unigrams = {word: (count + 1) / total for word, count in words.items()}
    one, two = [], []
    for word in (_START, *sorted(unigrams)):
        probability = math.log10(unigrams[word]) if word in unigrams else -99.0
        after = followers.get(word)
        backoff = 0.0
        if after:
            is_all = len(after) == len(unigrams)  # no word to back off to
            seen = sum(after.values()) + (0 if is_all else len(after))
            unseen = 1 - sum(unigrams[other] for other in after)
            backoff = 0.0 if is_all else math.log10(len(after) / seen / unseen)
            two += [f"{math.log10(n / seen):.4f} {word} {o}" for o, n in sorted(after.items())]
        one.append(f"{probability:.4f} {word} {backoff:.4f}")
    counts = f"\\data\\\nngram 1={len(one)}\nngram 2={len(two)}\n"
    parts = (counts, "\\1-grams:", *one, "", "\\2-grams:", *two, "", "\\end\\", "")
    return "\n".join(parts)
