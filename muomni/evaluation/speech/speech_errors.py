"""Error rates of generated speech and of the original audio, by our own and an independent recognizer.

A recognizer itself makes errors, so the WER of generated speech is only meaningful next to the WER on
the originals.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from muomni.data.media.audio import read_audio
from muomni.data.shards.source import Source
from muomni.data.text.sample_texts import sample_text
from muomni.errors import DataError
from muomni.evaluation.context import EvaluationContext, shard_indices
from muomni.evaluation.metrics.error_rates import ErrorCounts
from muomni.evaluation.report import Metric
from muomni.evaluation.speech.independent import find_independent
from muomni.evaluation.speech.recognizer import find_recognizer
from muomni.evaluation.speech.training_transcripts import TrainingTranscripts

logger = logging.getLogger(__name__)

# The vocoder and autoregressive generation are slow, so speech is generated for this many samples.
MAX_SPOKEN_SAMPLES = 256
# WER is of decoding with the word list, CER of greedy decoding.
_DECODING = {"wer": "words", "cer": "greedy"}


@dataclass(frozen=True, slots=True)
class Audio:
    """One sample: its index in the split, waveform [N] at 16 kHz on the device, and transcript."""

    index: int
    waveform: Tensor
    text: str

    @property
    def is_spoken(self) -> bool:
        """Whether speech is generated for this sample."""
        return self.index < MAX_SPOKEN_SAMPLES


def audio_clips(context: EvaluationContext, source: Source, max_samples: int) -> Iterator[Audio]:
    """Yield this rank's shard of the first audio clips; broken ones are logged and skipped."""
    indices = shard_indices(min(len(source), max_samples))
    for index in context.counted(indices, len(indices), f"{source.split} audio clips"):
        sample = source.read(index)
        try:
            waveform, text = read_audio(sample), sample_text(sample)
        except DataError as error:
            logger.warning("skipped %s: %s", source.describe(index), error)
            continue
        yield Audio(index, torch.from_numpy(waveform).to(context.device), text)


class SpeechErrors:
    """Counts recognition errors in generated speech and in the originals, if the run has a recognizer.

    `constants` are the baseline transcripts, by default the empty one and the most frequent one.
    """

    def __init__(
        self, context: EvaluationContext, constants: tuple[str, ...] | None = None
    ) -> None:
        runs = tuple(dict.fromkeys((context.request.run, context.upstream_run)))
        transcripts = TrainingTranscripts(context)
        self.recognizer = find_recognizer(runs, context.device, transcripts)
        self.independent = None
        if self.recognizer is not None:
            context.measure_with(self.recognizer.export)
            self.independent = find_independent(transcripts.sentences())
        self.errors = ErrorCounts(transcripts.constants() if constants is None else constants)

    def add(self, audio: Audio, generated: Tensor) -> None:
        """Count the errors in the generated waveform [N] and in the original."""
        if self.recognizer is not None:
            hypotheses = {}
            for name, waveform in (("generated", generated), ("original", audio.waveform)):
                transcription = self.recognizer.transcribe(waveform)
                hypotheses[f"{name}, words"] = transcription.words
                hypotheses[f"{name}, greedy"] = transcription.greedy
                if self.independent is not None:
                    hypotheses[f"{name}, independent"] = self.independent.transcribe(waveform)
            self.errors.add(audio.text, **hypotheses)

    def metrics(self, name: str) -> list[Metric]:
        """Return WER and CER of the generated speech as `wer_of_{name}`, and of the originals.

        Empty without a recognizer. A collective.
        """
        if self.recognizer is None:
            return []
        rates = self.errors.reduce()
        metrics = []
        for kind, decoding in _DECODING.items():
            rate = rates.rate(kind, f"generated, {decoding}")
            metrics.append(rates.metric(kind, f"{kind}_of_{name}", rate))
        for kind, decoding in _DECODING.items():
            rate = rates.rate(kind, f"original, {decoding}")
            metrics.append(Metric(f"{kind}_of_originals", rate))
        if self.independent is not None:
            rate = rates.rate("wer", "generated, independent")
            metrics.append(rates.metric("wer", f"wer_of_{name}_by_pocketsphinx", rate))
            rate = rates.rate("wer", "original, independent")
            metrics.append(Metric("wer_of_originals_by_pocketsphinx", rate))
        return metrics
