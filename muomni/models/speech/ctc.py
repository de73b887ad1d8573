"""CTC loss that reports infeasible samples, and greedy decoding (Graves et al., 2006).

CTC needs a frame per label and one more between equal neighbors. A sample with fewer frames has infinite
loss: it gets zero weight and is counted in the logs. The blank is id 0, the tokenizer's pad id, which no
transcript contains.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BLANK_ID = 0


def usable_samples(
    frame_lengths: Tensor, labels: Tensor, label_lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """Return boolean masks [B]: samples with labels, and feasible samples with labels.

    `labels` is [B, L] padded with `BLANK_ID`; `label_lengths` and `frame_lengths` are [B].
    """
    repeats = (labels[:, 1:] == labels[:, :-1]) & (labels[:, 1:] != BLANK_ID)
    needed = label_lengths + repeats.sum(1)
    has_labels = label_lengths > 0
    return has_labels, has_labels & (frame_lengths >= needed)


def ctc_weight(frame_lengths: Tensor, labels: Tensor, label_lengths: Tensor) -> Tensor:
    """Return the denominator of `ctc_loss`: label tokens (fp32, 0-d) of feasible samples."""
    _, is_feasible = usable_samples(frame_lengths, labels, label_lengths)
    return (label_lengths * is_feasible).sum().float()


def ctc_loss(
    logits: Tensor, frame_lengths: Tensor, labels: Tensor, label_lengths: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return (loss sum, weight, logs) of logits [B, T, V] against labels [B, L], in fp32.

    The sum and the weight (label tokens) run over feasible samples; without any, the sum is zero with
    zero gradient. Logs are pairs [sum, weight]: `infeasible` is the fraction of samples with labels
    that have too few frames, `frames_per_label` is the mean of the others.
    """
    has_labels, is_feasible = usable_samples(frame_lengths, labels, label_lengths)
    losses = _sample_losses(logits.float(), frame_lengths, labels, label_lengths, is_feasible)
    total = torch.where(is_feasible, losses, 0.0).sum()
    weight = (label_lengths * is_feasible).sum().float()
    num_samples = has_labels.sum().float()
    logs = {
        "infeasible": torch.stack([num_samples - is_feasible.sum(), num_samples]),
        "frames_per_label": torch.stack([(frame_lengths * is_feasible).sum().float(), weight]),
    }
    return total, weight, logs


def _sample_losses(
    logits: Tensor,
    frame_lengths: Tensor,
    labels: Tensor,
    label_lengths: Tensor,
    is_feasible: Tensor,
) -> Tensor:
    """Return the loss [B] of each sample; that of infeasible samples is finite and arbitrary."""
    if logits.numel() == 0:  # torch rejects these, but empty media slots have them
        return logits.sum((1, 2))
    # One frame without a label replaces an infeasible sample. On GPUs, torch copies the lengths to the
    # host and back, the only synchronization in this loss; lengths on the host would not avoid it.
    return F.ctc_loss(
        logits.log_softmax(-1).transpose(0, 1),
        labels,
        torch.where(is_feasible, frame_lengths, 1),
        torch.where(is_feasible, label_lengths, 0),
        blank=BLANK_ID,
        reduction="none",
    )


def greedy_decode(logits: Tensor, frame_lengths: Tensor) -> list[list[int]]:
    """Greedy CTC decoding: label ids of each sample, repeats merged, blanks removed."""
    best = logits.argmax(-1)
    is_new = torch.ones_like(best, dtype=torch.bool)
    is_new[:, 1:] = best[:, 1:] != best[:, :-1]
    frames = torch.arange(best.shape[1], device=best.device)
    kept = is_new & (best != BLANK_ID) & (frames < frame_lengths[:, None])
    samples = zip(best.cpu(), kept.cpu(), strict=True)
    return [ids[keep].tolist() for ids, keep in samples]
