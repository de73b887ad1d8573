"""The type of a sample: the field "type" of its .json member, by which metrics are also reported.

A corpus names its types, such as the kinds of questions in conversations; samples without the field have
the empty type.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from muomni.data.shards.source import Source
from muomni.data.views.base import View
from muomni.errors import DataError
from muomni.training.validation import LocatedBatch

logger = logging.getLogger(__name__)

# More types than a person reads are not types, but names of samples.
MAX_TYPES = 64


def sample_type(sample: Mapping[str, Any]) -> str:
    """The type of a sample; empty without a type, or if the member cannot be parsed."""
    try:
        content = json.loads(sample.get("json", b"{}"))
    except ValueError:
        return ""  # the view of the stage reports the sample
    return str(content.get("type") or "") if isinstance(content, dict) else ""


def reported_types(types: Iterable[str]) -> list[str]:
    """The distinct non-empty types, sorted; none, with a warning, if there are more than `MAX_TYPES`."""
    distinct = sorted(set(types) - {""})
    if len(distinct) > MAX_TYPES:
        logger.warning("%d types of samples are too many for metrics by type", len(distinct))
        return []
    return distinct


class BatchTypes:
    """Iterates micro-batches, and knows the types of the examples in the current one, in their order."""

    def __init__(self, batches: Iterable[LocatedBatch], source: Source, view: View[Any]) -> None:
        self._batches = batches
        self._source = source
        self._view = view
        self._ids: list[int] = []

    def __iter__(self) -> Iterator[LocatedBatch]:
        for micro, batch in self._batches:
            self._ids = micro.ids
            yield micro, batch

    def current(self, num_examples: int) -> list[str]:
        """Types of the `num_examples` examples of the current micro-batch."""
        samples = [self._source.read(index) for index in self._ids]
        if len(samples) > num_examples:
            samples = [sample for sample in samples if self._is_usable(sample)]
        return [sample_type(sample) for sample in samples]

    def _is_usable(self, sample: dict[str, Any]) -> bool:
        """Whether a sample is in its batch; the loader has dropped and logged the others."""
        try:
            self._view.example(sample, None)
        except DataError:
            return False
        return True
