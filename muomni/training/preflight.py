"""Checks before training starts; each one rejects one kind of invalid run.

The pipeline first runs the checks that need no exports, for all of its stages. A training command runs all of
them before it creates a process group.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from muomni.config.run import RunConfig
from muomni.distributed import compiler
from muomni.observe.profiler import check_ranks
from muomni.observe.recorder import check_recorders
from muomni.training.engine import attention, expert_parallel, offload
from muomni.training.engine.ds_config import zero_stage
from muomni.training.moe import find_moe
from muomni.training.optim import muon
from muomni.training.optim.groups import parameter_groups
from muomni.training.stage import Stage


@dataclass(frozen=True, slots=True)
class Candidate:
    """A run that is about to start.

    `device` and `precision` are None if the run is planned for another machine. `stage` is None until its data
    and upstream exports are open.
    """

    config: RunConfig
    engine_json: dict[str, Any]
    num_ranks: int
    device: torch.device | None = None
    precision: str | None = None
    stage: Stage | None = None


def _profiled_ranks_exist(run: Candidate) -> None:
    check_ranks(run.config.profile, run.num_ranks)


def _recorders_are_installed(run: Candidate) -> None:
    check_recorders(run.config.training.recorders)


def _muon_fits_the_engine(run: Candidate) -> None:
    if run.config.optim.name == "muon":
        has_experts = expert_parallel.is_enabled(run.engine_json)
        muon.check_support(zero_stage(run.engine_json), has_experts)


def _offload_is_supported(run: Candidate) -> None:
    offload.check_support(run.engine_json)


def _blocks_compile_here(run: Candidate) -> None:
    if run.config.training.compile is True and run.device is not None:
        compiler.check_support(os.environ, run.device.type)


def _varlen_kernels_run(run: Candidate) -> None:
    if run.stage is not None:
        assert run.precision is not None
        sizes = run.stage.model_config()
        attention.use_varlen(run.config.training.attention, run.device, run.precision, sizes)


def _patterns_match_parameters(run: Candidate) -> None:
    """Parameter name patterns and Muon must match some parameters."""
    config = run.config
    by_part = isinstance(config.training.activation_checkpointing, dict)
    uses_names = config.optim.lr_scales or config.optim.name == "muon" or by_part
    if uses_names and run.stage is not None:
        with torch.device("meta"):
            task = run.stage.build()
        parameter_groups(task, config.optim)
        run.stage.set_up(task)


def _experts_divide_over_ranks(run: Candidate) -> None:
    if run.stage is not None:
        moe = find_moe(run.stage.model_config())
        expert_parallel.complete_section(run.engine_json, moe, run.num_ranks)


CHECKS: tuple[Callable[[Candidate], None], ...] = (
    _profiled_ranks_exist,
    _recorders_are_installed,
    _muon_fits_the_engine,
    _offload_is_supported,
    _blocks_compile_here,
    _varlen_kernels_run,
    _patterns_match_parameters,
    _experts_divide_over_ranks,
)


def check(run: Candidate) -> None:
    """Run all checks that apply; raises ConfigError for the first that fails."""
    for check_one in CHECKS:
        check_one(run)
