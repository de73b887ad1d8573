"""InfoNCE against one matrix with explicit targets, for any split of the global batch."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from muomni.models.vision.contrastive import (
    contrastive_surrogate,
    pair_normalizers,
    sigmoid_surrogate,
)
from tests.models.gradients import grad
from tests.models.vision import textbook_losses
from tests.models.vision.textbook_losses import gathered_features

NUM_PAIRS = 12


def features(num: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, num, 6, generator=generator, dtype=dtype)
    return F.normalize(x, dim=1), F.normalize(y, dim=1)


def split_loss(
    x: torch.Tensor,
    y: torch.Tensor,
    scale: torch.Tensor,
    groups: torch.Tensor,
    sizes: list[int],
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum of the surrogates of chunks; each chunk has its own graph, as on its own rank."""
    gathered = gathered_features(x, y, groups)
    offsets = [sum(sizes[:i]) for i in range(len(sizes))]
    chunks = list(zip(offsets, sizes, strict=True))
    normalizers = torch.cat([pair_normalizers(o, n, gathered, scale) for o, n in chunks])
    total = weight = x.new_zeros(())
    for offset, size in chunks:
        pairs = x[offset : offset + size], y[offset : offset + size], gathered
        if bias is None:
            value, count, _ = contrastive_surrogate(*pairs, normalizers, offset, scale)
        else:
            value, count, _ = sigmoid_surrogate(*pairs, offset, scale, bias)
        total, weight = total + value, weight + count
    assert weight == (groups.unsqueeze(-1).flatten(1)[:, 0] >= 0).sum()
    return total


@st.composite
def divided_groups(draw: st.DrawFn) -> tuple[list[list[int]], list[int]]:
    """Groups [N, G] of a global batch, some of them padding, and the sizes of its chunks."""
    sizes = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4).filter(sum))
    num_columns = draw(st.integers(1, 3))
    row = st.lists(st.integers(0, 5), min_size=num_columns, max_size=num_columns)
    rows = st.one_of(row, row, st.just([-1] * num_columns))
    return draw(st.lists(rows, min_size=sum(sizes), max_size=sum(sizes))), sizes


@settings(deadline=None, max_examples=60)
@given(divided_groups(), st.booleans())
def test_any_groups_and_any_split_match_the_textbook(
    case: tuple[list[list[int]], list[int]], is_sigmoid: bool
) -> None:
    groups, sizes = torch.tensor(case[0]), case[1]
    results = []
    for is_split in (False, True):
        x, y = (t.requires_grad_() for t in features(len(groups)))
        log_scale, bias = (
            torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (2.0, -1.0)
        )
        scale = log_scale.exp()
        if is_split:
            loss = split_loss(x, y, scale, groups, sizes, bias if is_sigmoid else None)
        elif is_sigmoid:
            loss = textbook_losses.sigmoid(
                scale * x @ y.T + bias, textbook_losses.positives(groups)
            )
        else:
            loss = textbook_losses.infonce(scale * x @ y.T, textbook_losses.positives(groups))
        inputs = (x, y, log_scale, *([bias] if is_sigmoid else []))
        results.append((loss.detach(), *torch.autograd.grad(loss, inputs)))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
def test_distinct_pairs_have_the_bits_of_one_positive_each(loss: str) -> None:
    """Targets are exactly 1 on the diagonal, as in CLIP and SigLIP."""
    x, y = (t.requires_grad_() for t in features(8, torch.float32))
    scale, bias = (torch.tensor(value, requires_grad=True) for value in (12.0, -3.0))
    gathered = gathered_features(x, y, torch.arange(16).view(8, 2))
    rows, columns = scale * (x @ y.detach().T), scale.detach() * (y @ x.detach().T)
    eye = torch.eye(8)
    if loss == "infonce":
        inputs = (x, y, scale)
        normalizers = pair_normalizers(0, 8, gathered, scale)
        actual, _, _ = contrastive_surrogate(x, y, gathered, normalizers, 0, scale)
        row_lse, column_lse = rows.detach().logsumexp(1), columns.detach().logsumexp(1)
        surrogate = torch.zeros(())
        for logits, own, other in ((rows, row_lse, column_lse), (columns, column_lse, row_lse)):
            fixed = logits.detach()
            weights = (torch.exp(fixed - own[:, None]) + torch.exp(fixed - other[None])) / 2
            surrogate = surrogate + ((weights - eye) * logits).sum()
        value = ((row_lse + column_lse) / 2 - rows.detach().diagonal()).sum()
        expected = value + surrogate - surrogate.detach()
    else:
        inputs = (x, y, scale, bias)
        actual, _, _ = sigmoid_surrogate(x, y, gathered, 0, scale, bias)
        signs = 2 * eye - 1
        expected = -F.logsigmoid(signs * (rows + bias)).sum()
        gradient_of_y = -F.logsigmoid(signs * (columns + bias.detach())).sum()
        expected = expected + gradient_of_y - gradient_of_y.detach()
    assert torch.equal(actual, expected)
    gradients = (torch.autograd.grad(value, inputs) for value in (actual, expected))
    for mine, reference in zip(*gradients, strict=True):
        assert torch.equal(mine, reference)


def test_perfect_features_cost_the_entropy_of_the_targets() -> None:
    x = features(4)[0].repeat(2, 1)
    scale = torch.tensor(50.0, dtype=torch.float64)
    loss = split_loss(x, x, scale, torch.arange(4).repeat(2), [8]) / 8
    assert loss == pytest.approx(math.log(2), rel=1e-3)


def test_pairs_that_share_either_image_or_caption_are_positives() -> None:
    x, y = features(4)
    scale = torch.tensor(5.0, dtype=torch.float64)
    # Pairs 0 and 1 share the image, 1 and 2 the caption, 3 stands alone.
    groups = torch.tensor([[7, 1], [7, 2], [8, 2], [9, 3]])
    logits = scale * x @ y.T
    positives = {0: [0, 1], 1: [0, 1, 2], 2: [1, 2], 3: [3]}
    expected = sum(
        (m[i].logsumexp(0) - m[i, same].mean()) / 2
        for m in (logits, logits.T)
        for i, same in positives.items()
    )
    torch.testing.assert_close(split_loss(x, y, scale, groups, [1, 3]), expected)


def test_random_features_cost_log_n_and_chance_accuracy() -> None:
    x, y = features(512, torch.float32)
    scale, groups = torch.tensor(1e-4), torch.arange(512)

    def compute(y: torch.Tensor, groups: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        gathered = gathered_features(x, y, groups)
        normalizers = pair_normalizers(0, 512, gathered, scale)
        value, weight, logs = contrastive_surrogate(x, y, gathered, normalizers, 0, scale)
        return value / weight, {name: float(pair[0] / pair[1]) for name, pair in logs.items()}

    loss, accuracies = compute(y, groups)
    assert loss == pytest.approx(math.log(512), rel=1e-3)
    assert max(accuracies.values()) < 0.05
    assert set(compute(x, groups)[1].values()) == {1.0}
    # Any of the captions of a group is correct.
    loss, accuracies = compute(y, groups % 2)
    assert loss == pytest.approx(math.log(512), rel=1e-3)
    assert min(accuracies.values()) == pytest.approx(0.5, abs=0.1)
    neighbors = x.view(256, 2, -1).flip(1).reshape(512, -1)
    assert set(compute(neighbors, groups)[1].values()) == {0.0}
    assert set(compute(neighbors, groups // 2)[1].values()) == {1.0}


def test_similarities_of_half_precision_features_are_fp32() -> None:
    x, y = features(16, torch.float32)
    half = gathered_features(x.bfloat16(), y.bfloat16(), torch.arange(16))
    normalizers = pair_normalizers(0, 16, half, torch.tensor(14.0))
    assert normalizers.dtype == torch.float32
    local = x.bfloat16().requires_grad_()
    value, _, _ = contrastive_surrogate(
        local, y.bfloat16(), half, normalizers, 0, torch.tensor(14.0)
    )
    value.backward()
    assert value.dtype == torch.float32 and torch.isfinite(grad(local)).all()


def test_padding_has_no_gradient() -> None:
    x, y = (t.requires_grad_() for t in features(6))
    scale = torch.tensor(10.0, dtype=torch.float64)
    split_loss(x, y, scale, torch.tensor([0, 1, -1, 2, -1, 3]), [3, 3]).backward()
    assert (grad(x)[[2, 4]] == 0).all() and (grad(y)[[2, 4]] == 0).all()
    assert (grad(x)[[0, 1, 3, 5]] != 0).any(1).all()


def test_only_padding_is_zero_loss() -> None:
    x, y = (t.requires_grad_() for t in features(3))
    scale = torch.tensor(10.0, dtype=torch.float64)
    total = split_loss(x, y, scale, torch.full((3,), -1), [3])
    total.backward()
    assert total.item() == 0
    assert (x.grad == 0).all()
