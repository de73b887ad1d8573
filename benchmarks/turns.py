"""Time variants in turn, so that noise of the machine affects all of them."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any


def take_turns(
    variants: dict[str, Callable[[], None]], num_rounds: int, num_steps: int
) -> dict[str, list[float]]:
    """Return milliseconds per step of each variant in each round; a call runs `num_steps` steps.

    The order alternates between rounds. The first round is a warm-up.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(num_rounds + 1):
        order = list(variants.items())
        for name, run in order if number % 2 else reversed(order):
            start = time.perf_counter()
            run()
            if number:
                times[name].append(1000 * (time.perf_counter() - start) / num_steps)
    return times


@contextmanager
def training_loops(loops: list[Any]) -> Iterator[None]:
    """Open the logs of training loops for the block, as `Loop.run` does."""
    with ExitStack() as stack:
        for loop in loops:
            loop._open_logs()
            stack.callback(loop._close_logs, "FINISHED")
            loop.engine.train()
        yield


def steps_of(loop: Any, num_steps: int) -> Callable[[], None]:
    """Return a function that runs the next `num_steps` steps of a training loop, with logging."""
    batches = iter(loop.loader)

    def run() -> None:
        for _ in range(num_steps):
            loop._step(batches, False)
            loop.window.stop_agreed()
            if loop.state.step % loop.config.training.log_every == 0:
                loop._log(loop.state.step)

    return run
