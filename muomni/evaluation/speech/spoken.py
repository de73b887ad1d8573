"""Whole audio clips one by one, and the errors that our own recognition makes on speech.

The WER of made speech means little alone, so that of the original audio clips stands beside it.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from muomni.data.media.audio import read_audio
from muomni.data.shards.source import Source
from muomni.data.views.speech import transcript
from muomni.errors import DataError
from muomni.evaluation.context import Subject, rank_share
from muomni.evaluation.metrics.transcripts import TranscriptErrors
from muomni.evaluation.report import Metric
from muomni.evaluation.speech.recognizer import find_recognizer
from muomni.evaluation.speech.training_transcripts import TrainingTranscripts

logger = logging.getLogger(__name__)

# Vocoder and free-run generation take their time: so many samples are made audible.
MAX_SPOKEN_SAMPLES = 256
# Word errors are of what is heard with the word list, character errors of the best path.
_HEARD = {"wer": "words", "cer": "best path"}


@dataclass(frozen=True, slots=True)
class Audio:
    """One sample: its number in the split, waveform [N] on the device, and transcript."""

    index: int
    waveform: Tensor
    text: str

    @property
    def is_spoken(self) -> bool:
        """Whether it is among the samples that are made audible."""
        return self.index < MAX_SPOKEN_SAMPLES


def audio_clips(subject: Subject, source: Source, max_samples: int) -> Iterator[Audio]:
    """This rank's share of the first audio clips of `source`; broken ones are left out and named."""
    for index in rank_share(min(len(source), max_samples)):
        sample = source.read(index)
        try:
            waveform, text = read_audio(sample), transcript(sample)
        except DataError as error:
            logger.warning("left out %s: %s", source.describe(index), error)
            continue
        yield Audio(index, torch.from_numpy(waveform).to(subject.device), text)


class SpeechErrors:
    """What our recognition hears in made speech and in the originals, if the run has an encoder.

    Word errors are those of decoding with the words of the training transcripts (where there are none,
    of the best path), character errors those of the best path. `constants` are the transcripts to
    beat, by default the empty and the most frequent one.
    """

    def __init__(self, subject: Subject, constants: tuple[str, ...] | None = None) -> None:
        runs = tuple(dict.fromkeys((subject.wanted.run, subject.upstream_run)))
        transcripts = TrainingTranscripts(subject)
        self.recognizer = find_recognizer(runs, subject.device, transcripts)
        self.errors = TranscriptErrors(transcripts.constants() if constants is None else constants)

    def add(self, audio: Audio, made: Tensor) -> None:
        """Count the errors in the made waveform [N] and in the original."""
        if self.recognizer is not None:
            hypotheses = {}
            for name, waveform in (("made", made), ("original", audio.waveform)):
                heard = self.recognizer.transcribe(waveform)
                hypotheses[f"{name}, words"] = heard.words
                hypotheses[f"{name}, best path"] = heard.greedy
            self.errors.add(audio.text, **hypotheses)

    def metrics(self, made: str) -> list[Metric]:
        """WER and CER of speech called `made` ("decoded_speech") and of the originals.

        Every rank must call it; without a recognizer there are none.
        """
        if self.recognizer is None:
            return []
        rates = self.errors.reduce()
        metrics = []
        for kind, heard in _HEARD.items():
            rate = rates.rate(kind, f"made, {heard}")
            metrics.append(rates.metric(kind, f"{kind}_of_{made}", rate))
        for kind, heard in _HEARD.items():
            metrics.append(Metric(f"{kind}_of_originals", rates.rate(kind, f"original, {heard}")))
        return metrics
