"""Several corpora in given shares: one endless stream whose every stretch holds the shares.

Weights become whole quotas of a cycle of 2^16 draws, and each corpus's draws are spread evenly over the cycle.
So the draws of a corpus before any place have a closed form, each corpus runs through its own epochs
in its own order, and no window of samples is far from the wanted shares.
"""

from collections.abc import Sequence

import numpy as np

from muomni.config.loading import did_you_mean
from muomni.config.run import DataSection, MixSection
from muomni.data.sampling.lengths import Lengths, spread
from muomni.data.sampling.order import Order, SampleOrder
from muomni.data.shards.source import Source
from muomni.errors import ConfigError

CYCLE = 1 << 16


def open_order(
    source: Source, lengths: Lengths, data: DataSection, seed: int, window: int
) -> Order:
    """The stream of a source's samples: all its corpora as one, or mixed as `data.mix` says.

    Raises ConfigError for weights that do not fit the corpora.
    """
    if data.mix is None:
        return SampleOrder(source.all_kept, seed, window, data.block)
    names = [manifest.name for manifest in source.manifests]
    kept = [source.kept(number) for number in range(len(names))]
    means = [1.0] * len(names)
    if data.mix.unit == "length":
        means = [
            float(lengths[part[spread(len(part))]].mean()) if len(part) else 1.0 for part in kept
        ]
    shares = draw_shares(data.mix, names, [len(part) for part in kept], means)
    drawn = [number for number, share in enumerate(shares) if share > 0]
    orders = [SampleOrder(kept[i], seed, window, data.block, key=i) for i in drawn]
    return MixedOrder(orders, cycle_quotas([shares[i] for i in drawn]))


def draw_shares(
    mix: MixSection, names: Sequence[str], num_samples: Sequence[int], mean_lengths: Sequence[float]
) -> list[float]:
    """The share of draws that goes to each corpus; they add up to 1.

    Weights count samples, or lengths: there a corpus of long samples is drawn from less often.
    """
    if mix.weights is not None:
        weights = _given_weights(mix.weights, names)
    else:
        sizes = np.multiply(num_samples, mean_lengths if mix.unit == "length" else 1.0)
        weights = [float(size) ** float(mix.alpha or 0.0) if size else 0.0 for size in sizes]
    for name, weight, num in zip(names, weights, num_samples, strict=True):
        if weight and not num:
            raise ConfigError(
                f"data.mix gives '{name}' the weight {weight:g}, but masks exclude all its samples"
            )
    if mix.unit == "length":
        weights = [weight / mean for weight, mean in zip(weights, mean_lengths, strict=True)]
    return [weight / sum(weights) for weight in weights]


def cycle_quotas(shares: Sequence[float]) -> list[int]:
    """Whole draws of a cycle for each corpus: rounded by largest remainder, at least one each."""
    exact = np.asarray(shares) * CYCLE
    quotas = np.maximum(1, np.floor(exact).astype(np.int64))
    rest = CYCLE - int(quotas.sum())
    if rest >= 0:
        by_remainder = np.argsort(-(exact - quotas), kind="stable")
        quotas[by_remainder[np.arange(rest) % len(quotas)]] += 1
    else:  # many tiny corpora got their one draw from the largest
        quotas[int(quotas.argmax())] += rest
    return quotas.tolist()


class MixedOrder:
    """Draws from several orders in turn; `quotas` are draws of each in a cycle, at least 1.

    A round is as many draws as the orders have samples together.
    """

    def __init__(self, orders: Sequence[SampleOrder], quotas: Sequence[int]) -> None:
        self.orders = orders
        self.quotas = np.array(quotas)
        self.round_size = sum(order.round_size for order in orders)
        self.cycle = int(self.quotas.sum())
        # Draw j of a quota q stands at (j + 1/2) / q of the cycle.
        of_order = np.repeat(np.arange(len(orders)), self.quotas)
        count = np.concatenate([np.arange(quota) for quota in quotas])
        by_place = np.argsort((count + 0.5) / self.quotas[of_order], kind="stable")
        self._of_order, self._count = of_order[by_place], count[by_place]

    @property
    def depends_on(self) -> str:
        """Everything besides samples and seed that the stream depends on."""
        parts = ", ".join(order.depends_on for order in self.orders)
        return f"mix quotas={self.quotas.tolist()} of {parts}"

    def samples(self) -> np.ndarray:
        return np.concatenate([order.samples() for order in self.orders])

    def draws(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        cycles, places = np.divmod(np.arange(start, stop), self.cycle)
        of_order = self._of_order[places]
        positions = cycles * self.quotas[of_order] + self._count[places]
        ids, epochs = np.empty_like(positions), np.empty_like(positions)
        for number in np.unique(of_order).tolist():
            is_its = of_order == number
            first, last = positions[is_its][[0, -1]].tolist()
            # One after the other: what lies between two draws of the mix is drawn from other orders.
            ids[is_its], epochs[is_its] = self.orders[number].draws(first, last + 1)
        return ids, epochs


def _given_weights(weights: dict[str, float], names: Sequence[str]) -> list[float]:
    for name in weights:
        if name not in names:
            raise ConfigError(
                f"data.mix.weights names '{name}', which is no corpus here"
                f"{did_you_mean(name, list(names))}; there are {', '.join(names)}"
            )
    for name in names:
        if name not in weights:
            raise ConfigError(f"data.mix.weights lacks '{name}'; give it a weight, 0 leaves it out")
        if list(names).count(name) > 1:
            raise ConfigError(
                f"data.mix.weights cannot tell two corpora '{name}' apart; rename one"
            )
    return [weights[name] for name in names]
