import math

import pytest
import torch
import torch.nn.functional as F

from muomni.models.vision.contrastive import (
    PADDING_GROUP,
    GatheredFeatures,
    contrastive_surrogate,
    gathered_logsumexp,
)
from tests.models.gradients import grad

NUM_PAIRS = 12


def features(num: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, num, 6, generator=generator, dtype=dtype)
    return F.normalize(x, dim=1), F.normalize(y, dim=1)


def full_loss(
    x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor, groups: torch.Tensor | None
) -> torch.Tensor:
    """The plain N x N loss, negatives of the same group taken out one by one."""
    logits = scale * x @ y.T
    num = len(x)
    total = logits.new_zeros(())
    for matrix in (logits, logits.T):
        for i in range(num):
            if groups is not None and groups[i] == PADDING_GROUP:
                continue
            kept = [
                j
                for j in range(num)
                if j == i
                or groups is None
                or (groups[j] != groups[i] and groups[j] != PADDING_GROUP)
            ]
            total = total + (matrix[i, kept].logsumexp(0) - matrix[i, i]) / 2
    return total


def split_loss(
    x: torch.Tensor,
    y: torch.Tensor,
    scale: torch.Tensor,
    groups: torch.Tensor | None,
    sizes: list[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the surrogates of chunks; each chunk has its own graph, as on its own rank."""
    gathered = GatheredFeatures(x.detach(), y.detach(), groups)
    offsets = [sum(sizes[:i]) for i in range(len(sizes))]
    chunks = list(zip(offsets, sizes, strict=True))
    parts = [gathered_logsumexp(o, n, gathered, scale) for o, n in chunks]
    rows, columns = (torch.cat(lse) for lse in zip(*parts, strict=True))
    total = weight = x.new_zeros(())
    for offset, size in chunks:
        local = slice(offset, offset + size)
        value, count, _ = contrastive_surrogate(
            x[local], y[local], gathered, rows, columns, offset, scale
        )
        total, weight = total + value, weight + count
    assert weight == gathered.weight()
    return total, weight


@pytest.mark.parametrize("sizes", [[12], [6, 6], [1, 2, 9], [3, 3, 3, 3], [1] * 12, [0, 5, 7]])
@pytest.mark.parametrize(
    "groups",
    [
        None,
        list(range(12)),
        [0, 1, 0, 2, 3, 1, 0, 4, 5, 5, 6, 7],
        [0, 1, 0, -1, 3, 1, 0, 4, -1, -1, 6, 7],
    ],
)
def test_any_split_matches_the_full_loss(sizes: list[int], groups: list[int] | None) -> None:
    group_ids = None if groups is None else torch.tensor(groups)
    results = []
    for compute in (
        lambda x, y, s: full_loss(x, y, s, group_ids),
        lambda x, y, s: split_loss(x, y, s, group_ids, sizes)[0],
    ):
        x, y = (t.requires_grad_() for t in features(NUM_PAIRS))
        log_scale = torch.tensor(math.log(1 / 0.07), dtype=torch.float64, requires_grad=True)
        loss = compute(x, y, log_scale.exp())
        loss.backward()
        results.append((loss.detach(), x.grad, y.grad, log_scale.grad))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_a_repeated_caption_costs_nothing_when_grouped() -> None:
    x, _ = features(4)
    x = torch.cat([x, x])
    scale = torch.tensor(50.0, dtype=torch.float64)
    plain, _ = split_loss(x, x, scale, None, [8])
    grouped, _ = split_loss(x, x, scale, torch.arange(4).repeat(2), [8])
    assert plain / 8 > 0.69 > 0.01 > grouped / 8


def test_pairs_that_share_either_image_or_caption_are_not_contrasted() -> None:
    x, y = features(4)
    scale = torch.tensor(5.0, dtype=torch.float64)
    # Pairs 0 and 1 share the image, 1 and 2 the caption, 3 stands alone.
    groups = torch.tensor([[7, 1], [7, 2], [8, 2], [9, 3]])
    logits = scale * x @ y.T
    negatives = {0: [2, 3], 1: [3], 2: [0, 3], 3: [0, 1, 2]}
    expected = sum(
        (m[i, [i, *others]].logsumexp(0) - m[i, i]) / 2
        for m in (logits, logits.T)
        for i, others in negatives.items()
    )
    torch.testing.assert_close(split_loss(x, y, scale, groups, [1, 3])[0], expected)


def test_random_features_cost_log_n_and_chance_accuracy() -> None:
    x, y = features(512, torch.float32)
    scale = torch.tensor(1e-4)
    gathered = GatheredFeatures(x, y)
    rows, columns = gathered_logsumexp(0, 512, gathered, scale)
    value, weight, logs = contrastive_surrogate(x, y, gathered, rows, columns, 0, scale)
    assert value / weight == pytest.approx(math.log(512), rel=1e-3)
    assert logs["accuracy_x_to_y"][0] / logs["accuracy_x_to_y"][1] < 0.05
    _, _, logs = contrastive_surrogate(
        x,
        x,
        GatheredFeatures(x, x),
        *gathered_logsumexp(0, 512, GatheredFeatures(x, x), scale),
        0,
        scale,
    )
    assert logs["accuracy_y_to_x"].tolist() == [512, 512]


def test_similarities_of_half_precision_features_are_fp32() -> None:
    x, y = features(16, torch.float32)
    half = GatheredFeatures(x.bfloat16(), y.bfloat16())
    rows, columns = gathered_logsumexp(0, 16, half, torch.tensor(14.0))
    assert rows.dtype == torch.float32
    local = x.bfloat16().requires_grad_()
    value, _, _ = contrastive_surrogate(
        local, y.bfloat16(), half, rows, columns, 0, torch.tensor(14.0)
    )
    value.backward()
    assert value.dtype == torch.float32 and torch.isfinite(grad(local)).all()


def test_padding_has_no_gradient() -> None:
    x, y = (t.requires_grad_() for t in features(6))
    scale = torch.tensor(10.0, dtype=torch.float64)
    total, weight = split_loss(x, y, scale, torch.tensor([0, 1, -1, 2, -1, 3]), [3, 3])
    total.backward()
    assert weight == 4
    assert (grad(x)[[2, 4]] == 0).all() and (grad(y)[[2, 4]] == 0).all()
    assert (grad(x)[[0, 1, 3, 5]] != 0).any(1).all()


def test_only_padding_is_zero_loss() -> None:
    x, y = (t.requires_grad_() for t in features(3))
    scale = torch.tensor(10.0, dtype=torch.float64)
    total, weight = split_loss(x, y, scale, torch.full((3,), PADDING_GROUP), [3])
    total.backward()
    assert total.item() == 0 == weight.item()
    assert (x.grad == 0).all()
