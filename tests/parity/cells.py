"""The cells of the parity matrix, and small subsets that cover all pairs of settings."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from itertools import combinations, product

STAGES = (
    "thinker", "thinker-moe", "audio_encoder", "vision_encoder", "codec", "talker", "sft",
)  # fmt: skip
ZERO_STAGES = (0, 1, 2, 3)
PRECISIONS = ("fp32", "bf16", "fp16")
NUM_RANKS = (1, 2, 3, 4)
ACCUMULATIONS = (1, 2)
# A global batch in units of a stage: sequences, or a few samples. Three ranks get unequal shares of it.
NUM_UNITS = 8


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    """One configuration of a stage."""

    stage: str
    zero: int
    precision: str
    num_ranks: int
    num_accumulation: int
    is_checkpointing: bool

    @property
    def units_per_micro_batch(self) -> int:
        """The largest share of a global batch in one of the cell's micro-batches."""
        return -(-NUM_UNITS // (self.num_ranks * self.num_accumulation))

    @property
    def labels(self) -> tuple[str, ...]:
        """Parts of the name: stage, ZeRO stage, precision, ranks x accumulation, recomputation."""
        layout = f"{self.num_ranks}x{self.num_accumulation}"
        recomputed = ("recomputed",) if self.is_checkpointing else ()
        return (self.stage, f"zero{self.zero}", self.precision, layout, *recomputed)

    def __str__(self) -> str:
        return "-".join(self.labels)


def all_cells() -> list[Cell]:
    """The full matrix: every stage with every setting."""
    factors = (STAGES, ZERO_STAGES, PRECISIONS, NUM_RANKS, ACCUMULATIONS, (False, True))
    return [Cell(*values) for values in product(*factors)]


def covering(cells: Sequence[Cell], strength: int = 2) -> list[Cell]:
    """Choose few cells that contain every combination of values of any `strength` settings.

    Greedy: takes the cell with the most uncovered combinations; ties go to the cell whose values were
    chosen least. Combinations that no cell has are ignored.
    """
    combinations_of = {cell: _combinations(cell, strength) for cell in cells}
    missing = set().union(*combinations_of.values())
    num_uses: Counter[tuple[int, object]] = Counter()
    chosen = []
    while missing:
        best = max(
            cells,
            key=lambda cell: (
                len(missing & combinations_of[cell]),
                -sum(num_uses[value] for value in enumerate(astuple(cell))),
            ),
        )
        missing = missing - combinations_of[best]
        num_uses.update(enumerate(astuple(best)))
        chosen.append(best)
    return chosen


def default_suite() -> list[Cell]:
    """The cells of `make test`: all pairs of settings on one and two ranks, and few on three.

    More ranks are slow on two cores, so on three each setting only occurs at least once.
    """
    cells = all_cells()
    few = [cell for cell in cells if cell.num_ranks < 3]
    return covering([cell for cell in cells if cell.num_ranks == 3], strength=1) + covering(few)


def _combinations(cell: Cell, strength: int) -> set[tuple[tuple[int, object], ...]]:
    return set(combinations(enumerate(astuple(cell)), strength))
