"""Which stages build on which, and so which of them may train side by side."""

from collections.abc import Collection, Mapping

from muomni.config.registry import STAGES

Needs = Mapping[str, frozenset[str]]  # per stage, all stages that it builds on


def stage_needs() -> Needs:
    """The needs of all stages, from the registry."""
    needs: dict[str, frozenset[str]] = {}
    for stage, spec in STAGES.items():  # in an order in which they can be trained
        needs[stage] = frozenset(spec.upstream).union(*(needs[name] for name in spec.upstream))
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
