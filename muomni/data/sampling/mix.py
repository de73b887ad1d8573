"""Mixes several corpora into one endless stream that has the given shares in every window.

Weights become integer quotas of a cycle of 2^16 samples, and the samples of each corpus are spread evenly
over the cycle. The number of samples of a corpus before any position thus has a closed form, and each
corpus runs through its own epochs in its own order. A run may change the weights when it resumes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from muomni.config.loading import did_you_mean
from muomni.config.run import DataSection, MixSection
from muomni.data.sampling.lengths import Lengths, evenly_spaced
from muomni.data.sampling.order import Order, SampleOrder
from muomni.data.shards.source import Source
from muomni.errors import ConfigError

CYCLE = 1 << 16


@dataclass(frozen=True, slots=True)
class MixSegment:
    """The quotas of each corpus, 0 for one that is not used, from stream position `start` on.

    `step` is the number of finished optimizer steps when they were set.
    """

    step: int
    start: int
    quotas: tuple[int, ...]


def open_order(
    source: Source,
    data: DataSection,
    seed: int,
    shuffle_window: int,
    segments: Sequence[MixSegment] = (),
) -> Order:
    """The stream of a source's samples: all corpora as one, or with `segments` mixed."""
    if not segments:
        return SampleOrder(source.all_included, seed, shuffle_window, data.block)
    numbers = range(len(source.manifests))
    used = [i for i in numbers if any(segment.quotas[i] for segment in segments)]
    orders = [
        SampleOrder(source.included(i), seed, shuffle_window, data.block, key=i) for i in used
    ]
    parts = [(part.start, [part.quotas[i] for i in used]) for part in segments]
    return MixedOrder(orders, parts[0][1], parts[1:])


def configured_quotas(source: Source, lengths: Lengths, mix: MixSection) -> tuple[int, ...]:
    """The quotas of each corpus according to `data.mix`, 0 for one that is not used.

    Raises ConfigError if the weights do not match the corpora.
    """
    names = [manifest.name for manifest in source.manifests]
    included = [source.included(number) for number in range(len(names))]
    means = [1.0] * len(names)
    if mix.unit == "length":
        means = [
            float(lengths[part[evenly_spaced(len(part))]].mean()) if len(part) else 1.0
            for part in included
        ]
    shares = sampling_shares(mix, names, [len(part) for part in included], means)
    quotas = iter(cycle_quotas([share for share in shares if share > 0]))
    return tuple(next(quotas) if share > 0 else 0 for share in shares)


def sampling_shares(
    mix: MixSection, names: Sequence[str], num_samples: Sequence[int], mean_lengths: Sequence[float]
) -> list[float]:
    """The fraction of samples from each corpus; the fractions add up to 1.

    Weights count samples or length; by length, a corpus of long samples is sampled less often.
    """
    if mix.weights is not None:
        weights = _given_weights(mix.weights, names)
    else:
        sizes = np.multiply(num_samples, mean_lengths if mix.unit == "length" else 1.0)
        weights = [float(size) ** float(mix.alpha or 0.0) if size else 0.0 for size in sizes]
    for name, weight, num in zip(names, weights, num_samples, strict=True):
        if weight and not num:
            raise ConfigError(
                f"data.mix gives '{name}' weight {weight:g}, but masks exclude all its samples"
            )
    if mix.unit == "length":
        weights = [weight / mean for weight, mean in zip(weights, mean_lengths, strict=True)]
    return [weight / sum(weights) for weight in weights]


def cycle_quotas(shares: Sequence[float]) -> list[int]:
    """Integer samples per cycle for each corpus: largest remainder method, at least one each."""
    exact = np.asarray(shares) * CYCLE
    quotas = np.maximum(1, np.floor(exact).astype(np.int64))
    rest = CYCLE - int(quotas.sum())
    if rest >= 0:
        by_remainder = np.argsort(-(exact - quotas), kind="stable")
        quotas[by_remainder[np.arange(rest) % len(quotas)]] += 1
    else:  # many tiny corpora got one sample each; the largest gives them
        quotas[int(quotas.argmax())] += rest
    return quotas.tolist()


class _Cycle:
    """One cycle of samples with `quotas` of each order, evenly spread."""

    def __init__(self, quotas: Sequence[int]) -> None:
        self.quotas = np.array(quotas)
        self.size = int(self.quotas.sum())
        # Sample j of a quota q is at (j + 1/2) / q of the cycle.
        of_order = np.repeat(np.arange(len(quotas)), self.quotas)
        count = np.concatenate([np.arange(quota) for quota in quotas])
        by_position = np.argsort((count + 0.5) / self.quotas[of_order], kind="stable")
        self._of_order, self._count = of_order[by_position], count[by_position]

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The order of each position of the endless cycles, and the position in that order."""
        cycles, within = np.divmod(positions, self.size)
        of_order = self._of_order[within]
        return of_order, cycles * self.quotas[of_order] + self._count[within]

    def num_before(self, position: int) -> np.ndarray:
        """Samples of each order before a position."""
        cycles, within = divmod(position, self.size)
        rest = np.bincount(self._of_order[:within], minlength=len(self.quotas))
        return cycles * self.quotas + rest


class MixedOrder:
    """Interleaves several orders; `quotas` are samples of each per cycle, at least one above 0.

    An epoch has as many samples as all orders with a quota together. `changes` are other quotas from a
    position of the stream on; each order continues where it was, and epochs keep their size.
    """

    def __init__(
        self,
        orders: Sequence[SampleOrder],
        quotas: Sequence[int],
        changes: Sequence[tuple[int, Sequence[int]]] = (),
    ) -> None:
        self.orders = orders
        self.epoch_size = sum(o.epoch_size for o, q in zip(orders, quotas, strict=True) if q)
        self._parts: list[tuple[int, _Cycle, np.ndarray]] = []  # start, cycle, samples before it
        start, before = 0, np.zeros(len(orders), dtype=np.int64)
        for next_start, next_quotas in ((0, quotas), *changes):
            if self._parts:
                before = before + self._parts[-1][1].num_before(next_start - start)
            start = next_start
            self._parts.append((start, _Cycle(next_quotas), before))

    @property
    def depends_on(self) -> str:
        """Everything besides the samples and the seed that determines the stream."""
        parts = ", ".join(order.depends_on for order in self.orders)
        (_, first, _), *changes = self._parts
        text = f"mix quotas={first.quotas.tolist()} of {parts}"
        return text + "".join(f", from {s} on {cycle.quotas.tolist()}" for s, cycle, _ in changes)

    def sample_ids(self) -> np.ndarray:
        return np.concatenate([order.sample_ids() for order in self.orders])

    def samples(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        ids, epochs = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
        ends = [part[0] for part in self._parts[1:]] + [stop]
        for (begin, cycle, before), end in zip(self._parts, ends, strict=True):
            positions = np.arange(max(start, begin), min(stop, end)) - begin
            if len(positions):
                found = self._samples(cycle, before, positions)
                ids.append(found[0])
                epochs.append(found[1])
        return np.concatenate(ids), np.concatenate(epochs)

    def _samples(
        self, cycle: _Cycle, before: np.ndarray, positions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Sample ids and epochs at consecutive positions since the last change of quotas."""
        of_order, within = cycle.locate(positions)
        within = within + before[of_order]
        ids, epochs = np.empty_like(within), np.empty_like(within)
        for number in np.unique(of_order).tolist():
            is_its = of_order == number
            first, last = within[is_its][[0, -1]].tolist()
            # Consecutive positions of this order: the positions between them belong to other orders.
            ids[is_its], epochs[is_its] = self.orders[number].samples(first, last + 1)
        return ids, epochs


def _given_weights(weights: dict[str, float], names: Sequence[str]) -> list[float]:
    for name in weights:
        if name not in names:
            raise ConfigError(
                f"data.mix.weights names unknown corpus '{name}'"
                f"{did_you_mean(name, list(names))}; corpora: {', '.join(names)}"
            )
    for name in names:
        if name not in weights:
            raise ConfigError(f"data.mix.weights lacks '{name}'; set its weight (0 to skip it)")
        if list(names).count(name) > 1:
            raise ConfigError(
                f"data.mix.weights needs unique names, but two corpora are named '{name}'; rename one"
            )
    return [weights[name] for name in names]
