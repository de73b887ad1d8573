"""Word and character error rates of transcripts, with constant transcripts as the baseline."""

from dataclasses import dataclass

import torch

from muomni.data.text.normalization import spoken_form
from muomni.evaluation.metrics.tally import Tally, ratio
from muomni.evaluation.report import Metric
from muomni.training.stages.audio_encoder import error_sums

_CPU = torch.device("cpu")


class ErrorCounts:
    """Word and character errors of hypotheses, and of constant transcripts, on the same references.

    Texts are compared in lower case without punctuation. References without words are ignored.
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
        """Return the error rates over all ranks; a collective."""
        sums = self._tally.reduce()
        return ErrorRates({name: ratio(pair) for name, pair in sums.items()}, self.constants)


@dataclass(frozen=True, slots=True)
class ErrorRates:
    """Error rates by kind (`wer`, `cer`) and hypothesis."""

    rates: dict[str, float]
    constants: tuple[str, ...]

    def rate(self, kind: str, name: str) -> float:
        """Return the rate of one hypothesis; NaN if it has no reference."""
        return self.rates.get(f"{kind} {name}", float("nan"))

    def metric(self, kind: str, name: str, value: float) -> Metric:
        """Return `value`, a rate of `kind`, as metric `name`; the best constant is the baseline."""
        rates = [(self.rate(kind, _constant(text)), text) for text in self.constants]
        baseline, text = min(rates, key=lambda rate: (rate[0], rate[1]))
        return Metric(name, value, baseline, f"always '{text}'" if text else "empty transcript")


def _constant(text: str) -> str:
    return f"always {text}"
