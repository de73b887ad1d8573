"""Warnings about a finished dataset, which follow its table."""

import numpy as np

from data_prep.sharding.listings import FILTERED, QUARANTINE
from data_prep.sharding.plan_file import PlanFile, load_plan_file
from muomni.data.shards.manifest import Manifest
from muomni.data.shards.reader import SplitReader


def remarks(manifest: Manifest) -> list[str]:
    """One sentence for each problem: empty splits, notes of the plan, equal samples."""
    found: list[str] = []
    plan = load_plan_file(manifest.root)
    if plan is not None and plan.request is not None:
        fractions = {"val": plan.request.val_fraction, "test": plan.request.test_fraction}
        for name, fraction in fractions.items():
            if fraction and name not in manifest.splits:
                found.append(_empty_split(plan, name, fraction))
        found += plan.notes
    columns = [SplitReader(manifest, name).columns for name in manifest.splits]
    contents = np.concatenate([own["content_hash"] for own in columns])
    if num_repeated := len(contents) - len(np.unique(contents)):
        found.append(
            f"{num_repeated:,} of {len(contents):,} samples repeat another one, byte for byte; "
            f"`python -m data_prep dedup {manifest.root}` excludes them"
        )
    return found


def _empty_split(plan: PlanFile, name: str, fraction: float) -> str:
    planned = sum(shard.num_planned for shard in plan.all_shards if shard.split == name)
    if planned:
        return (
            f"{name} is empty, since all {planned:,} samples for it were dropped (listed in {QUARANTINE}/ and "
            f"{FILTERED}/); fix them, or raise --{name}-fraction {fraction:g}"
        )
    return f"{name} is empty; raise --{name}-fraction {fraction:g}, or add data with other groups"
