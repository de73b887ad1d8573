"""Names of metrics in MLflow and TensorBoard, from those in `metrics.jsonl`.

Both group names by the part before the slash and sort the groups by alphabet. `loss` must be the first group,
so no other may start with a letter before `l` (hence `samples/`, not `data/`).
"""

import re

from muomni.observe.recorder import Kind

# The name of the loss of each kind. Recorders log it last in a step, so its presence completes the step.
LOSS: dict[Kind, str] = {"train": "loss/train", "val": "loss/val"}
# Validation metrics by which stages are judged; they follow the loss, others are in the group `metric`.
_HEADLINES = {"accuracy", "cer", "exact_match", "mel_l1", "perplexity"}
_GROUPS = {
    "optim": ("lr", "grad_norm", "loss_scale", "num_skipped", "skipped_fraction", "fp16_warning"),
    "speed": (
        r"step_time_s", r"\w+_per_s", r"mfu", r"hfu", r"data_wait_fraction",
    ),
    "samples": (r"num_bad_samples", r"bad_fraction", r"\w+_seen"),
}  # fmt: skip
_GROUP_OF = {re.compile("|".join(patterns)): group for group, patterns in _GROUPS.items()}
_PERCENT = re.compile(r"time/\w+_percent")


def recorder_name(kind: Kind, name: str) -> str | None:
    """The name of a metric in recorders; None for one that follows from others.

    The loss is `loss/train` or `loss/val`, the metrics of a stage are `metric/KIND_NAME` or, if a stage is
    judged by them, `loss/val_NAME`.
    """
    short = name.removeprefix("val/")
    if short == "loss":
        return LOSS[kind]
    if short.startswith("moe/"):
        return short if kind == "train" else f"moe/val_{short.removeprefix('moe/')}"
    if kind == "val":
        return f"loss/val_{short}" if short in _HEADLINES else f"metric/val_{short}"
    if short.startswith("data/"):
        return mlflow_name(f"samples/{short.removeprefix('data/')}")
    if short.startswith("time/"):
        return None if _PERCENT.fullmatch(short) else short
    for pattern, group in _GROUP_OF.items():
        if pattern.fullmatch(short):
            return f"{group}/{short}"
    return f"metric/train_{short}"


def recorder_metrics(kind: Kind, metrics: dict[str, float]) -> dict[str, float]:
    """Rename metrics for recorders; the loss is the last one."""
    named = {recorder_name(kind, name): value for name, value in metrics.items()}
    ordered = sorted(named.items(), key=lambda item: item[0] == LOSS[kind])
    return {name: value for name, value in ordered if name is not None}


def mlflow_name(name: str) -> str:
    """A name without the characters that MLflow refuses, such as those of a type that a corpus has chosen."""
    return re.sub(r"[^\w./ -]", "_", name.replace("@", "_at_"))
