"""What is said in training: the transcripts to beat, and the words that our recognition may hear.

Only training splits are read, and of them only the samples that no mask excludes: a mask may hide
what a held-out split holds too.
"""

import logging
from collections import Counter
from pathlib import Path

import numpy as np

from muomni.data.shards.datasets import open_datasets
from muomni.data.shards.source import Source
from muomni.data.text.ctc_units import CtcUnits, spoken_form
from muomni.data.views.speech import transcript
from muomni.errors import DataError
from muomni.evaluation.context import MAX_BASELINE_SAMPLES, TRAIN, Subject, rank_share
from muomni.evaluation.metrics.tally import most_common, sum_counts
from muomni.models.speech.word_decoder import SpelledWord, WordDecoder

logger = logging.getLogger(__name__)


class TrainingTranscripts:
    """The transcripts of training splits in spoken form, counted once a dataset when asked for.

    Of each dataset the first `MAX_BASELINE_SAMPLES` count; audio clips are not decoded. The ranks share
    the reading and get the same counts, so every rank must call every method.
    """

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._counts: dict[Path, Counter[str]] = {}

    def constants(self) -> tuple[str, ...]:
        """The empty transcript and the most frequent one among those that the run was trained on."""
        train = self._subject.train
        counts = Counter[str]() if train is None else self._count(train)
        frequent = most_common(counts)
        return ("",) if frequent is None else ("", frequent)

    def words(self) -> Counter[str]:
        """How often each word is said in the speech datasets of the data root that is evaluated.

        Without any it is empty, and a line in the log says what that means.
        """
        words: Counter[str] = Counter()
        reason = f"no transcript of training in {self._subject.data.root} has a word"
        try:
            speech = Source(open_datasets(self._subject.data, ("speech",)), TRAIN)
        except DataError as error:
            reason = str(error)
        else:
            for text, count in self._count(speech).items():
                for word in text.split():
                    words[word] += count
        if not words:
            logger.warning("no word list, so word errors are those of the best path: %s", reason)
        return words

    def word_decoder(self, units: CtcUnits) -> WordDecoder | None:
        """A decoder into those words, spelled with `units`; None when there are none."""
        words = self.words()
        # In the same order on any number of ranks, so that equals are settled equally.
        spelled = {word: SpelledWord(units.encode(word), words[word]) for word in sorted(words)}
        return WordDecoder(spelled) if spelled else None

    def _count(self, source: Source) -> Counter[str]:
        """How often each transcript with a word stands in a split, over all ranks."""
        total: Counter[str] = Counter()
        for number, manifest in enumerate(source.manifests):
            place = manifest.root.resolve()
            if place not in self._counts:
                kept = source.included(number)
                share = rank_share(min(len(kept), MAX_BASELINE_SAMPLES))
                indices = kept[np.array(share, dtype=np.int64)]
                texts = Counter(
                    text for index in indices.tolist() if (text := _spoken(source, index))
                )
                self._counts[place] = sum_counts(texts)
            total.update(self._counts[place])
        return total


def _spoken(source: Source, index: int) -> str:
    """The spoken form of a transcript; nothing where a sample has none."""
    sample = source.read(index)
    try:
        return spoken_form(transcript(sample))
    except DataError:
        return ""
