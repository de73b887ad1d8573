import math

import pytest
import torch

from muomni.models.speech.ctc import ctc_loss, ctc_weight, greedy_decode
from tests.models.gradients import grad


def test_loss_is_the_sum_over_all_alignments() -> None:
    logits = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0))
    p = logits.softmax(-1)[0]
    # Labels (1, 2) in three frames.
    paths = [(1, 2, 2), (1, 1, 2), (1, 2, 0), (1, 0, 2), (0, 1, 2)]
    likelihood = sum(math.prod(p[t, c].item() for t, c in enumerate(path)) for path in paths)
    total, weight, _ = ctc_loss(
        logits, torch.tensor([3]), torch.tensor([[1, 2]]), torch.tensor([2])
    )
    assert total.item() == pytest.approx(-math.log(likelihood), rel=1e-5)
    assert weight.item() == 2


def test_infeasible_samples_are_skipped_and_counted() -> None:
    logits = torch.randn(4, 6, 5, requires_grad=True)
    # Three labels with a repeat need four frames; the last sample has no labels at all.
    labels = torch.tensor([[1, 2, 3], [1, 1, 3], [1, 1, 3], [0, 0, 0]])
    label_lengths = torch.tensor([3, 3, 3, 0])
    frame_lengths = torch.tensor([6, 3, 4, 5])
    total, weight, logs = ctc_loss(logits, frame_lengths, labels, label_lengths)
    total.backward()
    alone, _, _ = ctc_loss(logits[::2], frame_lengths[::2], labels[::2], label_lengths[::2])
    two, _, _ = ctc_loss(logits[:1], frame_lengths[:1], labels[:1], label_lengths[:1])
    third, _, _ = ctc_loss(logits[2:3], frame_lengths[2:3], labels[2:3], label_lengths[2:3])
    assert total.item() == pytest.approx(alone.item()) == pytest.approx((two + third).item())
    assert weight.item() == 6 == ctc_weight(frame_lengths, labels, label_lengths).item()
    assert logs["infeasible"].tolist() == [1, 3]
    assert logs["frames_per_label"].tolist() == [10, 6]
    gradient = grad(logits)
    assert torch.isfinite(gradient).all()
    assert (gradient[1] == 0).all() and (gradient[3] == 0).all()
    assert (gradient[0] != 0).any() and (gradient[2, 4:] == 0).all()


@pytest.mark.parametrize("shape", [(2, 4, 0), (2, 0, 3), (2, 0, 0), (0, 4, 3)])
def test_an_empty_batch_gives_zero_loss_and_zero_gradient(shape: tuple[int, int, int]) -> None:
    batch, num_frames, num_labels = shape
    logits = torch.randn(batch, num_frames, 5, requires_grad=True)
    zeros = torch.zeros(batch, dtype=torch.int64)
    labels = torch.zeros(batch, num_labels, dtype=torch.int64)
    total, weight, logs = ctc_loss(logits, zeros + num_frames, labels, zeros)
    total.backward()
    assert total.item() == 0 == weight.item()
    assert (logits.grad == 0).all()
    assert logs["infeasible"].tolist() == [0, 0]


def test_half_precision_logits_are_cast_to_fp32() -> None:
    logits = torch.randn(1, 20, 5)
    labels, lengths = torch.tensor([[1, 2]]), torch.tensor([2])
    wide, _, _ = ctc_loss(logits.bfloat16().float(), torch.tensor([20]), labels, lengths)
    half, _, _ = ctc_loss(logits.bfloat16(), torch.tensor([20]), labels, lengths)
    assert half.dtype == torch.float32
    assert half.item() == wide.item()


def test_greedy_decoding_merges_repeats_and_drops_blanks_and_padding() -> None:
    ids = torch.tensor([[0, 1, 1, 0, 1, 2, 2, 3], [3, 3, 0, 0, 2, 1, 1, 1]])
    logits = torch.nn.functional.one_hot(ids, 4).float()
    assert greedy_decode(logits, torch.tensor([8, 5])) == [[1, 1, 2, 3], [3, 2]]
