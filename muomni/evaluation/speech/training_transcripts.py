"""Training transcripts: constant baseline transcripts, and the word list of the recognizer.

Reads only training splits, without the samples that a mask excludes: those may also be in a held-out
split.
"""

import logging
from collections import Counter
from pathlib import Path

import numpy as np

from muomni.data.shards.datasets import open_datasets
from muomni.data.shards.source import Source
from muomni.data.text.ctc_units import CtcUnits
from muomni.data.text.normalization import spoken_form
from muomni.data.text.sample_texts import sample_text
from muomni.errors import DataError
from muomni.evaluation.context import MAX_BASELINE_SAMPLES, TRAIN, EvaluationContext, shard_indices
from muomni.evaluation.metrics.tally import most_common, sum_counts
from muomni.models.speech.word_decoder import Word, WordDecoder

logger = logging.getLogger(__name__)


class TrainingTranscripts:
    """Counts of the training transcripts in spoken form, computed lazily once per dataset.

    Uses the first `MAX_BASELINE_SAMPLES` samples of each dataset and decodes no audio. Ranks read
    disjoint shards and get the same counts; every method is a collective.
    """

    def __init__(self, context: EvaluationContext) -> None:
        self._context = context
        self._counts: dict[Path, Counter[str]] = {}

    def constants(self) -> tuple[str, ...]:
        """The empty transcript and the most frequent transcript of the run's training split."""
        train = self._context.train
        counts = Counter[str]() if train is None else self._count(train)
        frequent = most_common(counts)
        return ("",) if frequent is None else ("", frequent)

    def sentences(self) -> Counter[str]:
        """Counts of the transcripts of the speech datasets in the evaluated data root.

        Logs a warning if there are none.
        """
        reason = f"no training transcript in {self._context.data.root} contains a word"
        sentences: Counter[str] = Counter()
        try:
            sentences = self._count(Source(open_datasets(self._context.data, ("speech",)), TRAIN))
        except DataError as error:
            reason = str(error)
        if not sentences:
            logger.warning("no word list, using greedy CTC decoding for word errors: %s", reason)
        return sentences

    def words(self) -> Counter[str]:
        """Word counts of these sentences."""
        words: Counter[str] = Counter()
        for text, count in self.sentences().items():
            for word in text.split():
                words[word] += count
        return words

    def word_decoder(self, units: CtcUnits) -> WordDecoder | None:
        """A decoder into these words, spelled with `units`; None if there are none."""
        words = self.words()
        # Sorted, so that ties do not depend on the number of ranks.
        spelled = {word: Word(units.encode(word), words[word]) for word in sorted(words)}
        return WordDecoder(spelled) if spelled else None

    def _count(self, source: Source) -> Counter[str]:
        """Count the non-empty transcripts of a split, over all ranks."""
        total: Counter[str] = Counter()
        for number, manifest in enumerate(source.manifests):
            root = manifest.root.resolve()
            if root not in self._counts:
                kept = source.included(number)
                share = shard_indices(min(len(kept), MAX_BASELINE_SAMPLES))
                indices = kept[np.array(share, dtype=np.int64)]
                texts = Counter(
                    text for index in indices.tolist() if (text := _spoken(source, index))
                )
                self._counts[root] = sum_counts(texts)
            total.update(self._counts[root])
        return total


def _spoken(source: Source, index: int) -> str:
    """The spoken form of a transcript; empty if the sample has none."""
    sample = source.read(index)
    try:
        return spoken_form(sample_text(sample))
    except DataError:
        return ""
