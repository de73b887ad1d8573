"""The sigmoid loss against its formula (Zhai et al., 2023), for any split of the global batch."""

import math

import pytest
import torch
import torch.nn.functional as F

from muomni.models.vision.contrastive import PADDING_GROUP, sigmoid_surrogate
from tests.models.vision.textbook_losses import gathered_features

Values = tuple[torch.Tensor, ...]


def features(num: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, num, 6, generator=generator, dtype=torch.float64)
    return F.normalize(x, dim=1), F.normalize(y, dim=1)


def formula(
    x: torch.Tensor,
    y: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    groups: list[int],
) -> torch.Tensor:
    """Pair by pair: -w log(1 / (1 + exp(z (-t x.y - b)))), z = 1 for positives and -1 for negatives.

    Each of n equal pairs has n positives, of weight w = 1 / n.
    """
    total = x.new_zeros(())
    for i in range(len(x)):
        for j in range(len(x)):
            if PADDING_GROUP in (groups[i], groups[j]):
                continue
            z, w = (1, 1 / groups.count(groups[i])) if groups[i] == groups[j] else (-1, 1)
            total = total + w * torch.log(1 + torch.exp(z * (-scale * (x[i] @ y[j]) - bias)))
    return total


def split_loss(
    x: torch.Tensor,
    y: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    groups: list[int],
    sizes: list[int],
) -> torch.Tensor:
    """Sum of the surrogates of chunks; each has its own graph, as on its own rank."""
    gathered = gathered_features(x, y, torch.tensor(groups))
    total = weight = x.new_zeros(())
    for i, size in enumerate(sizes):
        offset = sum(sizes[:i])
        local = slice(offset, offset + size)
        value, count, _ = sigmoid_surrogate(x[local], y[local], gathered, offset, scale, bias)
        total, weight = total + value, weight + count
    assert weight == len(groups) - groups.count(PADDING_GROUP)
    return total


def with_gradients(loss: torch.Tensor, *inputs: torch.Tensor) -> Values:
    return (loss.detach(), *torch.autograd.grad(loss, inputs))


@pytest.mark.parametrize("sizes", [[12], [6, 6], [1, 2, 9], [3, 3, 3, 3], [1] * 12, [0, 5, 7]])
@pytest.mark.parametrize(
    "groups",
    [
        list(range(12)),
        [0, 1, 0, 2, 3, 1, 0, 4, 5, 5, 6, 7],
        [0, 1, 0, -1, 3, 1, 0, 4, -1, -1, 6, 7],
    ],
)
def test_any_split_matches_the_formula(sizes: list[int], groups: list[int]) -> None:
    x, y = (t.requires_grad_() for t in features(12))
    log_scale = torch.tensor(math.log(10), dtype=torch.float64, requires_grad=True)
    # Near zero, where no sigmoid is saturated.
    bias = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    inputs = (x, y, log_scale, bias)
    expected = with_gradients(formula(x, y, log_scale.exp(), bias, groups), *inputs)
    actual = with_gradients(split_loss(x, y, log_scale.exp(), bias, groups, sizes), *inputs)
    for mine, reference in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-10, atol=1e-10)


def test_equals_the_loss_of_open_clip() -> None:
    module = pytest.importorskip("open_clip.loss")
    x, y = (t.requires_grad_() for t in features(8))
    scale, bias = (
        torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (10.0, -3.0)
    )
    inputs = (x, y, scale, bias)
    expected = with_gradients(module.SigLipLoss()(x, y, scale, bias), *inputs)
    actual = with_gradients(split_loss(x, y, scale, bias, list(range(8)), [4, 4]) / 8, *inputs)
    for mine, reference in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, reference)


def test_the_initial_bias_keeps_steps_with_many_negatives_small() -> None:
    """With random features and bias -10, positives cost 10 each and negatives almost nothing."""
    x, y = features(256)
    groups, sizes = list(range(256)), [256]
    scale, zero, low = (torch.tensor(v, dtype=torch.float64) for v in (0.0, 0.0, -10.0))
    started = split_loss(x, y, scale, low, groups, sizes) / 256
    assert started == pytest.approx(10, rel=1e-2)
    assert split_loss(x, y, scale, zero, groups, sizes) / 256 == pytest.approx(256 * math.log(2))


def test_similarities_of_half_precision_features_are_fp32() -> None:
    x, y = (t.bfloat16() for t in features(16))
    local = x.clone().requires_grad_()
    gathered = gathered_features(x, y, torch.arange(16))
    value, _, _ = sigmoid_surrogate(local, y, gathered, 0, torch.tensor(10.0), torch.tensor(-10.0))
    value.backward()
    assert value.dtype == torch.float32 and local.grad is not None
    assert torch.isfinite(local.grad).all() and (local.grad != 0).any()


def test_padding_has_no_gradient_and_no_accuracy() -> None:
    x, _ = features(6)
    x.requires_grad_()
    groups = torch.tensor([0, 1, -1, 2, -1, 3])
    gathered = gathered_features(x, x, groups)
    scale, bias = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (10.0, -1.0))
    value, weight, logs = sigmoid_surrogate(x, x, gathered, 0, scale, bias)
    value.backward()
    assert x.grad is not None
    assert (x.grad[[2, 4]] == 0).all() and (x.grad[[0, 1, 3, 5]] != 0).any(1).all()
    assert weight == 4
    assert logs["accuracy_x_to_y"].tolist() == logs["accuracy_y_to_x"].tolist() == [4, 4]


def test_only_padding_is_zero_loss() -> None:
    x, y = (t.requires_grad_() for t in features(3))
    scale, bias = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (10.0, -1.0))
    total = split_loss(x, y, scale, bias, [PADDING_GROUP] * 3, [3])
    total.backward()
    assert total.item() == 0 == bias.grad
    assert (x.grad == 0).all()
