"""Word and character error rates of transcripts, with constant transcripts as the baseline."""

from dataclasses import dataclass

import torch

from muomni.data.text.normalization import spoken_form
from muomni.evaluation.metrics.sample_types import reported_types
from muomni.evaluation.metrics.tally import Tally, ratio
from muomni.evaluation.report import Metric
from muomni.training.stages.audio_encoder import error_sums

# Separates a name from a type; no hypothesis or constant transcript contains it.
_TYPE_MARK = "\0"
_CPU = torch.device("cpu")


class ErrorCounts:
    """Word and character errors of hypotheses, and of constant transcripts, on the same references.

    Errors are also counted by type of sample. Texts are compared in lower case without punctuation.
    References without words are ignored.
    """

    def __init__(self, constants: tuple[str, ...]) -> None:
        self.constants = constants
        self._tally = Tally()

    def add(self, reference: str, type: str = "", **hypotheses: str) -> None:
        """Count the errors of each named hypothesis for one audio clip of a type."""
        spoken = spoken_form(reference)
        named = {**hypotheses, **{_constant(text): text for text in self.constants}}
        for name, hypothesis in named.items():
            for kind, pair in error_sums([spoken], [spoken_form(hypothesis)], _CPU).items():
                self._tally.add(f"{kind} {name}", pair)
                if type:
                    self._tally.add(_of_type(f"{kind} {name}", type), pair)
                    self._tally.add(_of_type("", type), 1)

    def reduce(self) -> "ErrorRates":
        """Return the error rates over all ranks; a collective."""
        sums = self._tally.reduce()
        types = reported_types(name[1:] for name in sums if name.startswith(_TYPE_MARK))
        rates = {name: ratio(pair) for name, pair in sums.items() if pair.ndim}
        return ErrorRates(rates, self.constants, tuple(types))


@dataclass(frozen=True, slots=True)
class ErrorRates:
    """Error rates by kind (`wer`, `cer`) and hypothesis, also by type of sample."""

    rates: dict[str, float]
    constants: tuple[str, ...]
    types: tuple[str, ...] = ()

    def rate(self, kind: str, name: str, type: str = "") -> float:
        """Return the rate of one hypothesis on samples of a type (default: all); NaN without any."""
        return self.rates.get(_of_type(f"{kind} {name}", type), float("nan"))

    def metrics_by_type(self, kind: str, metric: str, hypothesis: str) -> list[Metric]:
        """Return the rate of a hypothesis for each type, as `METRIC.TYPE`."""
        return [
            self.metric(kind, f"{metric}.{type}", self.rate(kind, hypothesis, type), type)
            for type in self.types
        ]

    def metric(self, kind: str, name: str, value: float, type: str = "") -> Metric:
        """Return `value`, a rate of `kind`, as metric `name`; the best constant is the baseline."""
        rates = [(self.rate(kind, _constant(text), type), text) for text in self.constants]
        baseline, text = min(rates, key=lambda rate: (rate[0], rate[1]))
        return Metric(name, value, baseline, f"always '{text}'" if text else "empty transcript")


def _of_type(name: str, type: str) -> str:
    return f"{name}{_TYPE_MARK}{type}" if type else name


def _constant(text: str) -> str:
    return f"always {text}"
