"""Mixes several corpora into one endless stream that has the given shares in every window.

Weights become integer quotas of a cycle of 2^16 samples, and the samples of each corpus are spread evenly
over the cycle. The number of samples of a corpus before any position thus has a closed form, and each
corpus runs through its own epochs in its own order.
"""

from collections.abc import Sequence

import numpy as np

from muomni.config.loading import did_you_mean
from muomni.config.run import DataSection, MixSection
from muomni.data.sampling.lengths import Lengths, evenly_spaced
from muomni.data.sampling.order import Order, SampleOrder
from muomni.data.shards.source import Source
from muomni.errors import ConfigError

CYCLE = 1 << 16


def open_order(
    source: Source, lengths: Lengths, data: DataSection, seed: int, shuffle_window: int
) -> Order:
    """The stream of a source's samples: all corpora as one, or mixed according to `data.mix`.

    Raises ConfigError if the weights do not match the corpora.
    """
    if data.mix is None:
        return SampleOrder(source.all_included, seed, shuffle_window, data.block)
    names = [manifest.name for manifest in source.manifests]
    included = [source.included(number) for number in range(len(names))]
    means = [1.0] * len(names)
    if data.mix.unit == "length":
        means = [
            float(lengths[part[evenly_spaced(len(part))]].mean()) if len(part) else 1.0
            for part in included
        ]
    shares = sampling_shares(data.mix, names, [len(part) for part in included], means)
    used = [number for number, share in enumerate(shares) if share > 0]
    orders = [SampleOrder(included[i], seed, shuffle_window, data.block, key=i) for i in used]
    return MixedOrder(orders, cycle_quotas([shares[i] for i in used]))


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


class MixedOrder:
    """Interleaves several orders; `quotas` are samples of each per cycle, at least 1.

    An epoch has as many samples as all orders together.
    """

    def __init__(self, orders: Sequence[SampleOrder], quotas: Sequence[int]) -> None:
        self.orders = orders
        self.quotas = np.array(quotas)
        self.epoch_size = sum(order.epoch_size for order in orders)
        self.cycle = int(self.quotas.sum())
        # Sample j of a quota q is at (j + 1/2) / q of the cycle.
        of_order = np.repeat(np.arange(len(orders)), self.quotas)
        count = np.concatenate([np.arange(quota) for quota in quotas])
        by_position = np.argsort((count + 0.5) / self.quotas[of_order], kind="stable")
        self._of_order, self._count = of_order[by_position], count[by_position]

    @property
    def depends_on(self) -> str:
        """Everything besides the samples and the seed that determines the stream."""
        parts = ", ".join(order.depends_on for order in self.orders)
        return f"mix quotas={self.quotas.tolist()} of {parts}"

    def sample_ids(self) -> np.ndarray:
        return np.concatenate([order.sample_ids() for order in self.orders])

    def samples(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        cycles, within = np.divmod(np.arange(start, stop), self.cycle)
        of_order = self._of_order[within]
        positions = cycles * self.quotas[of_order] + self._count[within]
        ids, epochs = np.empty_like(positions), np.empty_like(positions)
        for number in np.unique(of_order).tolist():
            is_its = of_order == number
            first, last = positions[is_its][[0, -1]].tolist()
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
