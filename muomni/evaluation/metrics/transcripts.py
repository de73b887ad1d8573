"""Errors of transcripts, beside those of transcripts that say the same about every audio clip."""

from dataclasses import dataclass

import torch

from muomni.data.text.ctc_units import spoken_form
from muomni.evaluation.metrics.tally import Tally, ratio
from muomni.evaluation.report import Metric
from muomni.training.stages.audio_encoder import error_sums

_CPU = torch.device("cpu")


class TranscriptErrors:
    """Word and character errors of hypotheses, and of constant ones, against the same references.

    All texts are compared as spoken: lower case, words only. References without a word do not count.
    """

    def __init__(self, constants: tuple[str, ...]) -> None:
        self.constants = constants
        self._tally = Tally()

    def add(self, reference: str, **hypotheses: str) -> None:
        """Count the errors of each named hypothesis for one audio clip."""
        spoken = spoken_form(reference)
        named = {**hypotheses, **{_constant(text): text for text in self.constants}}
        for name, hypothesis in named.items():
            for kind, pair in error_sums([spoken], [spoken_form(hypothesis)], _CPU).items():
                self._tally.add(f"{kind} {name}", pair)

    def reduce(self) -> "ErrorRates":
        """The error rates over all ranks; every rank must call it."""
        sums = self._tally.reduce()
        return ErrorRates({name: ratio(pair) for name, pair in sums.items()}, self.constants)


@dataclass(frozen=True, slots=True)
class ErrorRates:
    """Error rates by kind (`wer`, `cer`) and hypothesis."""

    rates: dict[str, float]
    constants: tuple[str, ...]

    def rate(self, kind: str, name: str) -> float:
        """The rate of one hypothesis, NaN when none was seen."""
        return self.rates.get(f"{kind} {name}", float("nan"))

    def metric(self, kind: str, name: str, value: float) -> Metric:
        """`value`, a rate of `kind`, as metric `name` beside the best constant transcript."""
        rates = [(self.rate(kind, _constant(text)), text) for text in self.constants]
        baseline, text = min(rates, key=lambda rate: (rate[0], rate[1]))
        return Metric(name, value, baseline, f"always '{text}'" if text else "empty transcript")


def _constant(text: str) -> str:
    return f"always {text}"
