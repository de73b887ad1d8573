"""Dependencies between stages, and which stages can train in parallel."""

from collections.abc import Collection, Mapping

from muomni.config.registry import STAGES

Needs = Mapping[str, frozenset[str]]  # per stage, all direct and indirect dependencies


def stage_needs() -> Needs:
    """The dependencies of all stages, from the registry."""
    needs: dict[str, frozenset[str]] = {}
    for stage, spec in STAGES.items():  # in dependency order
        needs[stage] = frozenset(spec.upstream).union(*(needs[name] for name in spec.upstream))
    return needs


def trains_alone(stage: str, needs: Needs) -> bool:
    """Whether every other stage is an ancestor or a descendant of this one."""
    return all(stage == other or other in needs[stage] or stage in needs[other] for other in needs)


def next_stage(waiting: Collection[str], running: Collection[str], needs: Needs) -> str | None:
    """The stage of `waiting` to start next, or None while each depends on an unfinished one.

    Stages that are neither waiting nor running count as finished. Stages on which most of the waiting
    ones depend come first.
    """
    unfinished = {*waiting, *running}
    ready = [stage for stage in waiting if not needs[stage] & unfinished]
    return max(
        ready,
        key=lambda stage: sum(stage in needs[other] for other in waiting),
        default=None,
    )
