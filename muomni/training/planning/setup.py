"""The resolved setup of a run, as it is printed before the first step."""

from typing import TYPE_CHECKING

from torch import nn

from muomni.config.run import PackedBatch
from muomni.data.shards.source import Source
from muomni.observe.announce import row
from muomni.training.engine.deepspeed_quirks import full_shape
from muomni.training.optim.groups import describe_parameters

if TYPE_CHECKING:  # which imports this module
    from muomni.training.session import Session


def plural(number: int, one: str, many: str = "") -> str:
    """`1 rank`, `2 ranks`."""
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


def count_parameters(module: nn.Module, only_trained: bool = False) -> int:
    """Count the parameters of a module, including those that ZeRO-3 has partitioned."""
    parameters = (p for p in module.parameters() if p.requires_grad or not only_trained)
    return sum(full_shape(p).numel() for p in parameters)


def describe_global_batch(session: "Session") -> str:
    """The global batch, its rounding, and the share of each rank, on one line."""
    batch, num_ranks = session.request.config.batch, session.ranks.world_size
    num_micro_batches = session.feed.num_micro_batches(0)
    layout = (
        f"{plural(num_ranks, 'rank')} x {plural(num_micro_batches, 'micro-batch', 'micro-batches')}"
    )
    text = f"{batch.describe()} per step on {layout}"
    if batch.max_ranks is None:
        return f"{text} at first"
    num_slots = (
        num_ranks * num_micro_batches * -(-batch.max_ranks // (num_ranks * num_micro_batches))
    )
    num_idle = num_slots - batch.max_ranks
    return f"{text}, {num_idle / num_slots:.0%} of them padding" if num_idle else text


def describe_length(session: "Session") -> str:
    """The number of epochs; call it once the steps of the first epoch are counted."""
    steps = session.feed.num_steps(1)
    text = f"{session.num_steps / steps:.3g}; one has {steps:,} steps"
    batch = session.request.config.batch
    if isinstance(batch, PackedBatch):
        text += f" and {steps * batch.global_sequences * batch.seq_len:,} tokens"
    return text


def describe_data(train: Source | None, num_samples: int, val: Source | None) -> str:
    """Samples and what they hold; of a stream (`train` is None), only the number is known."""
    parts = [f"{num_samples:,} samples"]
    if train is not None:
        totals = [manifest.splits[train.split].totals for manifest in train.manifests]
        hours = sum(each.duration_ms for each in totals) / 3.6e6
        num_images, num_chars = (
            sum(getattr(each, name) for each in totals) for name in ("num_images", "num_chars")
        )
        parts += [f"{hours:,.2f} hours of audio"] if hours else []
        parts += [f"{num_images:,} images"] if num_images else []
        parts += [f"{num_chars:,} characters"] if num_chars else []
    parts.append(f"{val.num_included:,} for validation" if val else "none for validation")
    return ", ".join(parts)


def describe_model(session: "Session", task: nn.Module) -> list[str]:
    """Rows on parameters and the memory of their state; call it before ZeRO partitions them."""
    from muomni.training.planning.dry_run import MIB, predict_state

    counts = count_parameters(task), count_parameters(task, only_trained=True)
    rows = [row("model", "{:,} parameters, {:,} trained".format(*counts))]
    rows += [row("", line) for line in describe_parameters(task, session.request.config.optim)]
    plan = predict_state(session, task)
    if plan is not None:
        host = f", {plan.host_peak / MIB:,.1f} MiB of host memory" if plan.host_peak else ""
        what = (
            f"{plan.step_peak / MIB:,.1f} MiB per rank for weights, gradients, and optimizer state"
        )
        rows.append(row("memory", f"{what}{host}; --dry-run adds activations"))
    return rows
