"""Which stages build on which, and so which of them may train side by side."""

from collections.abc import Collection, Mapping

from muomni.config.run import STAGE_NAMES

Needs = Mapping[str, frozenset[str]]  # of each stage, all stages that it builds on


def stage_needs() -> Needs:
    """The needs of all stages, from what their classes load (this imports torch)."""
    from muomni.training.stages import load_stage

    needs: dict[str, frozenset[str]] = {}
    for stage in STAGE_NAMES:  # their order is one in which they can be trained
        upstream = load_stage(stage).upstream
        needs[stage] = frozenset(upstream).union(*(needs[name] for name in upstream))
    return needs


def trains_alone(stage: str, needs: Needs) -> bool:
    """Whether every other stage is needed by this one or needs it."""
    return all(stage == other or other in needs[stage] or stage in needs[other] for other in needs)


def next_stage(waiting: Collection[str], running: Collection[str], needs: Needs) -> str | None:
    """The stage of `waiting` to start next, None while all of them need one that is not finished.

    What is neither waiting nor running is taken for finished. First comes what most of the waiting
    stages build on, since they can start the sooner.
    """
    unfinished = {*waiting, *running}
    ready = [stage for stage in waiting if not needs[stage] & unfinished]
    return max(
        ready,
        key=lambda stage: sum(stage in needs[other] for other in waiting),
        default=None,
    )
