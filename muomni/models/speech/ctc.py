"""CTC loss that says which samples it cannot fit, and greedy decoding (Graves et al., 2006).

CTC needs one frame a label and one more between equal neighbors. A sample with fewer frames has
infinite loss; here it is left out with zero weight and counted, never hidden. The blank is id 0,
the tokenizer's pad id, which no transcript holds.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BLANK_ID = 0


def usable_samples(
    frame_lengths: Tensor, labels: Tensor, label_lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """Return boolean masks [B]: samples that have labels, and those among them that CTC can fit.

    `labels` is [B, L] padded with `BLANK_ID`; `label_lengths` and `frame_lengths` are [B].
    """
    repeats = (labels[:, 1:] == labels[:, :-1]) & (labels[:, 1:] != BLANK_ID)
    needed = label_lengths + repeats.sum(1)
    has_labels = label_lengths > 0
    return has_labels, has_labels & (frame_lengths >= needed)


def ctc_weight(frame_lengths: Tensor, labels: Tensor, label_lengths: Tensor) -> Tensor:
    """Return what `ctc_loss` is divided by: label tokens (fp32, 0-d) of the samples that fit."""
    _, fits = usable_samples(frame_lengths, labels, label_lengths)
    return (label_lengths * fits).sum().float()


def ctc_loss(
    logits: Tensor, frame_lengths: Tensor, labels: Tensor, label_lengths: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return (loss sum, weight, logs) of logits [B, T, V] against labels [B, L], in fp32.

    The sum and the weight (label tokens) run over the samples that fit; without any, the sum is
    zero with zero gradient. Logs are pairs [sum, weight]: `infeasible` is the share of samples with
    labels that do not fit, `frames_per_label` how much room the others have.
    """
    has_labels, fits = usable_samples(frame_lengths, labels, label_lengths)
    losses = _sample_losses(logits.float(), frame_lengths, labels, label_lengths, fits)
    total = torch.where(fits, losses, 0.0).sum()
    weight = (label_lengths * fits).sum().float()
    num_samples = has_labels.sum().float()
    logs = {
        "infeasible": torch.stack([num_samples - fits.sum(), num_samples]),
        "frames_per_label": torch.stack([(frame_lengths * fits).sum().float(), weight]),
    }
    return total, weight, logs


def _sample_losses(
    logits: Tensor, frame_lengths: Tensor, labels: Tensor, label_lengths: Tensor, fits: Tensor
) -> Tensor:
    """Return the loss [B] of each sample, and something finite for those that do not fit."""
    if logits.numel() == 0:  # torch refuses these, but an empty modality slot may look so
        return logits.sum((1, 2))
    # One frame and no label stand in for a sample that does not fit. On GPUs torch copies the
    # lengths to the host, the one wait in this loss.
    return F.ctc_loss(
        logits.log_softmax(-1).transpose(0, 1),
        labels,
        torch.where(fits, frame_lengths, 1),
        torch.where(fits, label_lengths, 0),
        blank=BLANK_ID,
        reduction="none",
    )


def greedy_decode(logits: Tensor, frame_lengths: Tensor) -> list[list[int]]:
    """Return the label ids of the best path of each sample: repeats merged, blanks removed."""
    best = logits.argmax(-1)
    is_new = torch.ones_like(best, dtype=torch.bool)
    is_new[:, 1:] = best[:, 1:] != best[:, :-1]
    frames = torch.arange(best.shape[1], device=best.device)
    kept = is_new & (best != BLANK_ID) & (frames < frame_lengths[:, None])
    rows = zip(best.cpu(), kept.cpu(), strict=True)
    return [ids[keep].tolist() for ids, keep in rows]
