"""Ways to do the same, timed in turn, so that a slow moment of the machine hits all of them."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from muomni.training.loop import Loop


def take_turns(
    ways: dict[str, Callable[[], None]], num_rounds: int, num_steps: int
) -> dict[str, list[float]]:
    """Milliseconds a step of each way in each round, given ways that do `num_steps` steps.

    Every other round goes through them backward; the first one only warms up.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(num_rounds + 1):
        order = list(ways.items())
        for name, run in order if number % 2 else reversed(order):
            start = time.perf_counter()
            run()
            if number:
                times[name].append(1000 * (time.perf_counter() - start) / num_steps)
    return times


@contextmanager
def training_loops(loops: list["Loop"]) -> Iterator[None]:
    """Open the recorders of training loops for the block, as `Loop.run` does."""
    with ExitStack() as stack:
        for loop in loops:
            loop.open()
            stack.callback(loop.close, "FINISHED")
            loop.engine.train()
        yield


def steps_of(loop: "Loop", num_steps: int) -> Callable[[], None]:
    """A function that runs the next `num_steps` steps of a training loop, and logs when it is due."""

    def run() -> None:
        for _ in range(num_steps):
            loop.train_step()
            if loop.state.step % loop.config.training.log_every == 0:
                loop.log()

    return run
