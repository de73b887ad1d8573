"""Whole recordings one by one, and the errors that our own recognition makes on speech.

The WER of made speech means little alone, so that of the original recordings stands beside it.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from muomni.data.recording import read_recording
from muomni.data.source import Source
from muomni.data.speech_view import transcript
from muomni.errors import DataError
from muomni.evaluation.recogniser import find_recogniser
from muomni.evaluation.report import Figure
from muomni.evaluation.subject import Subject, rank_share
from muomni.evaluation.transcripts import TranscriptErrors, constant_transcripts

logger = logging.getLogger(__name__)

# Vocoder and free-run generation take their time: so many samples are made audible.
MAX_SPOKEN_SAMPLES = 256
_KINDS = ("wer", "cer")


@dataclass(frozen=True, slots=True)
class Recording:
    """One sample: its number in the split, waveform [N] on the device, and transcript."""

    index: int
    waveform: Tensor
    text: str

    @property
    def is_spoken(self) -> bool:
        """Whether it is among the samples that are made audible."""
        return self.index < MAX_SPOKEN_SAMPLES


def recordings(subject: Subject, source: Source, max_samples: int) -> Iterator[Recording]:
    """This rank's share of the first recordings of `source`; broken ones are left out and named."""
    for index in rank_share(min(len(source), max_samples)):
        sample = source.read(index)
        try:
            waveform, text = read_recording(sample), transcript(sample)
        except DataError as error:
            logger.warning("left out %s: %s", source.describe(index), error)
            continue
        yield Recording(index, torch.from_numpy(waveform).to(subject.device), text)


class SpeechErrors:
    """What our recognition hears in made speech and in the originals, if the run has an encoder.

    `constants` are the transcripts to beat, by default the empty and the most frequent one.
    """

    def __init__(self, subject: Subject, constants: tuple[str, ...] | None = None) -> None:
        runs = tuple(dict.fromkeys((subject.wanted.run, subject.upstream_run)))
        self.recogniser = find_recogniser(runs, subject.device)
        if constants is None:
            constants = constant_transcripts(subject)
        self.errors = TranscriptErrors(constants)

    def add(self, recording: Recording, made: Tensor) -> None:
        """Count the errors in the made waveform [N] and in the original."""
        if self.recogniser is not None:
            self.errors.add(
                recording.text,
                made=self.recogniser.transcribe(made),
                original=self.recogniser.transcribe(recording.waveform),
            )

    def figures(self, made: str) -> list[Figure]:
        """WER and CER of speech called `made` ("decoded_speech") and of the originals.

        Every rank must call it; without a recogniser there are none.
        """
        if self.recogniser is None:
            return []
        rates = self.errors.reduce()
        return [
            *(rates.figure(kind, f"{kind}_of_{made}", rates.rate(kind, "made")) for kind in _KINDS),
            *(Figure(f"{kind}_of_originals", rates.rate(kind, "original")) for kind in _KINDS),
        ]
