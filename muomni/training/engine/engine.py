"""Stage-agnostic wrapper of a DeepSpeed engine.

It completes the engine config, keeps buffers in fp32, and turns loss sums into gradients of the global mean,
sum(losses of all ranks and micro-batches) / sum(their denominators), for any layout: DeepSpeed averages over
ranks, so each micro-batch's sum is multiplied by world size / global denominator.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from torch import Tensor, nn

from muomni.config.run import OptimSection, RunConfig
from muomni.data.views.base import Batch
from muomni.distributed import collectives
from muomni.errors import ConfigError
from muomni.models.layers.blocks import not_compiled
from muomni.observe.step_clock import StepClock
from muomni.training.engine import deepspeed_quirks as quirks
from muomni.training.engine import ds_config, expert_parallel, weights
from muomni.training.engine.precision import DTYPES
from muomni.training.engine.sharded_build import RecordedBuild, shard
from muomni.training.engine.unsharded import UnshardedOptimizer
from muomni.training.optim.groups import build_optimizer, parameter_groups
from muomni.training.outputs import StageOutput, Sums


class Engine:
    """A DeepSpeed engine around a stage's task module.

    `accumulates`: some steps have several micro-batches. Their number may vary from step to step.
    """

    deepspeed: DeepSpeedEngine
    optimizer: quirks.DeepSpeedOptimizer

    def __init__(
        self,
        task: nn.Module,
        config: RunConfig,
        engine_json: dict[str, Any],
        precision: str,
        accumulates: bool,
        device: torch.device,
        build: RecordedBuild | None = None,
    ) -> None:
        """`build` has recorded how to initialize `task`; ZeRO 3 then never holds all of its weights."""
        if precision == "fp16" and device.type == "cpu":
            quirks.allow_fp16_on_cpu()
        self.zero_stage = ds_config.zero_stage(engine_json)
        self.precision = precision
        full = ds_config.complete(
            engine_json, config, precision, accumulates, collectives.world_size()
        )
        # Without ZeRO, DeepSpeed does not report the norm in fp32, and reads many values in 16 bits.
        self._clips_itself = self.zero_stage == 0
        if self._clips_itself:
            full["gradient_clipping"] = 0.0
        self.settings = full  # what DeepSpeed gets
        self._scales_itself = quirks.leaves_loss_unscaled(self.zero_stage, precision)
        self._own_scale = 1.0
        self._optimizer_name = config.optim.name
        self._max_grad_norm = config.optim.max_grad_norm
        self._own_norm: Tensor | None = None
        self._own_skips = torch.zeros((), device=device)
        # Consecutive steps with non-finite gradients at a loss scale that cannot fall, up to the last step.
        # Equal on all ranks. Such a step leaves the weights unchanged.
        self.num_bad_steps: int | Tensor = 0
        self.num_expert_ranks = expert_parallel.group_size(full)
        self._device = device
        groups = [group.settings() for group in parameter_groups(task, config.optim)]
        if build is not None:
            sharded = shard(task, build, full, DTYPES[precision])
            for group in groups:
                group["params"] = [sharded[id(parameter)] for parameter in group["params"]]
        task.to(device)
        buffers = {name: buffer.clone() for name, buffer in task.named_buffers()}
        optimizer: Any = partial(_moe_optimizer, task, config.optim)
        if not self.num_expert_ranks:
            optimizer = build_optimizer(task, config.optim, groups)
        with quirks.quiet_deepspeed():
            parts: Any = deepspeed.initialize(model=task, optimizer=optimizer, config=full)
        self.deepspeed, self.optimizer, _, _ = parts
        if self.zero_stage == 0 and collectives.world_size() == 1:
            quirks.skip_reduction_on_one_rank(self.deepspeed, self.optimizer)
        if self.zero_stage == 0 and precision != "fp32":
            quirks.undo_warm_up_step(self.optimizer)
            UnshardedOptimizer.take_over(self.optimizer)
        self._updated = self._updated_weights() if self._clips_itself else {}
        if self.zero_stage and precision == "fp16":
            quirks.tolerate_min_loss_scale(self.optimizer)
        self._min_scale = config.fp16.min_scale if precision == "fp16" else 1.0
        weights.restore_buffers(self.task, buffers)
        self._base_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.masters = weights.MasterWeights(
            self.optimizer, self.zero_stage, precision, config.training.ema_decay
        )

    @property
    def optimizer_layout(self) -> str:
        """The optimizer and how DeepSpeed lays out its state, for checkpoints."""
        has_sums = quirks.has_fp32_sums(self.optimizer)
        return self._optimizer_name + (" with fp32 sums of gradients" if has_sums else "")

    @property
    def task(self) -> nn.Module:
        return self.deepspeed.module  # pyright: ignore[reportReturnType]

    # -- one step ----------------------------------------------------------------------------------
    def forward(self, batch: Batch) -> StageOutput:
        return self.deepspeed(batch)

    def backward(
        self,
        output: StageOutput,
        denominators: Sums,
        loss_weights: dict[str, float],
        is_last: bool = True,
    ) -> None:
        """Add this micro-batch's part of the gradient of the step's mean loss; `is_last` ends the step."""
        num_ranks = collectives.world_size()
        total = sum(
            # A term that no rank has in this step has denominator 0; its sum is 0, too.
            loss_weights[term] * num_ranks * loss / denominators[term].clamp(min=1e-6)
            for term, loss in output.losses.items()
        )
        if self._scales_itself:
            self._own_scale = self.loss_scale
        quirks.set_accumulation_boundary(self.deepspeed, self.optimizer, is_last)
        self.deepspeed.backward(total * self._own_scale, scale_wrt_gas=False)

    def end_micro_step(self, lr_factor: float) -> None:
        """Count a micro-step; on the last one of a step clip, update, and zero the gradients.

        If gradients are non-finite on any rank, the weights stay unchanged on all ranks.
        """
        is_last = self.deepspeed.is_gradient_accumulation_boundary()
        scale = self.loss_scale
        if is_last:
            for group, base in zip(self.optimizer.param_groups, self._base_lrs, strict=True):
                group["lr"] = base * lr_factor
            if self._clips_itself:
                self._clip()
        self.deepspeed.step()
        if is_last and not self._counts_on_device:
            is_bad = self.optimizer.overflow and scale <= self._min_scale
            self.num_bad_steps = self.num_bad_steps + 1 if is_bad else 0

    @property
    def _counts_on_device(self) -> bool:
        """Whether the host does not know if gradients were non-finite, so that it need not wait."""
        return self._clips_itself and self.precision != "fp16"

    def _clip(self) -> None:
        """Unscale gradients, clip them by their global norm, and let the optimizer skip non-finite ones."""
        gradients = {name: w.grad for name, w in self._updated.items() if w.grad is not None}
        if self.num_expert_ranks:
            norm = expert_parallel.global_norm(self.task, gradients)
        else:
            norm = torch.nn.utils.get_total_norm(gradients.values())
        limit, scale = self._max_grad_norm or float("inf"), self._own_scale
        factor = (limit / (norm / scale + 1e-6)).clamp(max=1.0) / scale
        torch._foreach_mul_(  # pyright: ignore[reportPrivateImportUsage]
            list(gradients.values()), factor
        )
        is_bad = (~torch.isfinite(norm)).view(()).float()
        # As torch's GradScaler does: fused optimizers read it on the device, so the host does not wait.
        inner = self.optimizer if self.precision == "fp32" else self.optimizer.optimizer
        inner.found_inf = is_bad
        self._own_norm = norm
        if self._counts_on_device:
            self._own_skips += is_bad
            self.num_bad_steps = (self.num_bad_steps + 1) * is_bad

    def _updated_weights(self) -> dict[str, Tensor]:
        """The weights that the optimizer without ZeRO updates, by parameter name."""
        named = {name: p for name, p in self.task.named_parameters() if p.requires_grad}
        if self.precision == "fp32":
            return dict(named)
        full = {id(short): full for short, full in self.optimizer.pairs()}
        return {name: full[id(p)] for name, p in named.items()}

    def time_reductions(self, clock: StepClock) -> None:
        """Let `clock` separate the gradient reduction from the backward pass."""
        quirks.time_gradient_reduction(self.deepspeed, clock)

    @contextmanager
    def own_settings(self) -> Iterator[None]:
        """Keep the optimizer settings of this run while a checkpoint is loaded, which holds its own."""
        groups = [
            {name: value for name, value in group.items() if name != "params"}
            for group in self.optimizer.param_groups
        ]
        others = quirks.optimizer_settings(self.optimizer)
        yield
        for group, settings in zip(self.optimizer.param_groups, groups, strict=True):
            group.update(settings)
        quirks.set_optimizer_settings(self.optimizer, others)

    # -- metrics; at logging steps only --------------------------------------------------------------
    @property
    def grad_norm(self) -> float:
        """Norm of the last step's gradient before clipping; NaN if the step was skipped."""
        norm = self._own_norm if self._clips_itself else self.deepspeed.get_global_grad_norm()
        return float("nan") if norm is None else float(norm) / self._own_scale

    @property
    def loss_scale(self) -> float:
        return quirks.loss_scale(self.optimizer) if self.precision == "fp16" else 1.0

    def count_skipped(self) -> int:
        """Steps of the run that were skipped because their gradients were non-finite."""
        self.deepspeed.skipped_steps += int(self._own_skips)  # part of DeepSpeed's checkpoints
        self._own_skips.zero_()
        return int(self.deepspeed.skipped_steps)

    # -- weights -----------------------------------------------------------------------------------
    def first_non_finite_weight(self) -> str | None:
        """The first parameter or buffer that is non-finite on any rank, or None; every rank must call it."""
        return weights.first_non_finite_weight(self.task, self._device)

    def full_state(self, prefix: str) -> dict[str, Tensor]:
        """Parameters and buffers below `prefix` as full fp32 CPU tensors, on rank 0; all ranks must call it."""
        return weights.full_state(self.task, prefix, self.zero_stage, self._device)

    def shapes_digest(self) -> str:
        """Hash of the names and full shapes of all parameters."""
        return weights.shapes_digest(self.task)

    def train(self) -> None:
        self.deepspeed.train()

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Evaluation mode without gradient, with averaged weights if an average is kept."""
        with self.masters.averaged():
            self.deepspeed.eval()
            try:
                with torch.no_grad(), not_compiled():
                    yield
            finally:
                self.deepspeed.train()


def _moe_optimizer(task: nn.Module, optim: OptimSection, _parameters: object) -> Any:
    """The optimizer over expert-parallel layers; DeepSpeed calls this after it has created them.

    ZeRO shards experts over fewer ranks than other parameters, so it wants them in groups of their own.
    """
    groups = [
        {**group.settings(), "name": f"group{number}"}
        for number, group in enumerate(parameter_groups(task, optim))
    ]
    split = split_params_into_different_moe_groups_for_optimizer(groups)
    if not any(group.get("moe") for group in split):
        raise ConfigError(
            "expert_parallel shards experts, but none is trained; remove that section from the DeepSpeed "
            "config, or the experts from options.freeze"
        )
    return build_optimizer(task, optim, [group for group in split if group["params"]])
