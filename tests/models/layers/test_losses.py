"""Cross entropy as a sum over real tokens, and router losses."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from muomni.models.layers.losses import cross_entropy_sum, next_token_loss, router_losses
from tests.models.accelerator import accelerated
from tests.models.gradients import grad


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("chunk_tokens", [1, 5, 1000])
def test_loss_and_gradients_equal_plain_cross_entropy(chunk_tokens: int, on_cpu: bool) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(3, 7, 16, requires_grad=True)
    weight = torch.randn(29, 16, requires_grad=True)
    labels = torch.randint(0, 29, (3, 7))
    labels[0, :4] = -100
    labels[1] = (hidden @ weight.T)[1].argmax(-1)
    read = hidden if on_cpu else accelerated(hidden)
    loss = next_token_loss(read, labels, weight, chunk_tokens)
    assert loss.num_correct == ((hidden @ weight.T).argmax(-1) == labels).sum() >= 7
    plain = F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(loss.total, plain)
    assert loss.weight == 17
    ours = torch.autograd.grad(loss.total / 17, (hidden, weight))
    theirs = torch.autograd.grad(plain / 17, (hidden, weight))
    torch.testing.assert_close(ours, theirs)


def test_correct_predictions_are_counted() -> None:
    weight = torch.eye(5)
    hidden = torch.eye(5)[[0, 1, 2, 3]]
    labels = torch.tensor([0, 1, 4, -100])
    assert next_token_loss(hidden, labels, weight).num_correct == 2
    assert cross_entropy_sum(hidden @ weight.T, labels).num_correct == 2


def test_no_labels_give_zero_loss_and_zero_gradient() -> None:
    hidden, weight = torch.randn(2, 3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    loss = next_token_loss(hidden, torch.full((2, 3), -100), weight)
    loss.total.backward()
    assert loss.total == 0 and loss.weight == 0
    assert grad(hidden).abs().sum() == 0 and grad(weight).abs().sum() == 0


def test_half_precision_loss_is_summed_in_fp32() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(4000, 16), torch.randn(50, 16)
    labels = torch.randint(0, 50, (4000,))
    exact = next_token_loss(hidden, labels, weight)
    half = next_token_loss(hidden.bfloat16().requires_grad_(), labels, weight.bfloat16())
    assert half.total.dtype == torch.float32
    assert abs(half.total / exact.total - 1) < 2e-3


def loss_gradients(
    hidden: Tensor, weight: Tensor, labels: Tensor, scale: float, on_cpu: bool
) -> list[tuple[Tensor, Tensor]]:
    """Gradients of hidden states and weights, and those of fp64 autograd, all times `scale`."""
    hidden.requires_grad_()
    weight.requires_grad_()
    loss = next_token_loss(hidden if on_cpu else accelerated(hidden), labels, weight, 256)
    found = torch.autograd.grad(loss.total * scale, (hidden, weight))
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    plain = F.cross_entropy(wide[0] @ wide[1].T, labels, reduction="sum")
    expected = torch.autograd.grad(plain * scale, wide)
    return [(one.double(), other) for one, other in zip(found, expected, strict=True)]


@pytest.fixture
def mixed_matmul(monkeypatch: pytest.MonkeyPatch) -> None:
    """`out_dtype` of CUDA's matmuls, which CPUs do not have."""

    def mm(left: Tensor, right: Tensor, out_dtype: torch.dtype) -> Tensor:
        return left.to(out_dtype) @ right.to(out_dtype)

    def addmm(total: Tensor, left: Tensor, right: Tensor, out_dtype: torch.dtype) -> Tensor:
        return total + mm(left, right, out_dtype)

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("scale", [1.2e-4, 1.0])
@pytest.mark.usefixtures("mixed_matmul")
def test_gradients_in_bf16_have_no_common_error(scale: float, on_cpu: bool) -> None:
    """bf16 would round the scale 1.2e-4 by 0.14 %, and with it every gradient."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(600, 64).bfloat16(), torch.randn(300, 64).bfloat16()
    labels = torch.randint(0, 300, (600,))
    labels[::7] = -100
    for found, expected in loss_gradients(hidden, weight, labels, scale, on_cpu):
        assert (found - expected).norm() / expected.norm() < 0.01
        factor = (found * expected).sum() / expected.square().sum()
        assert abs(factor - 1) < 5e-4


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.usefixtures("mixed_matmul")
def test_small_probabilities_have_gradients_in_fp16(on_cpu: bool) -> None:
    """Token 0 has a probability of 1e-8 everywhere, which fp16 rounds to zero before any loss scale."""
    hidden, weight = torch.ones(600, 8).half(), torch.zeros(20, 8).half()
    weight[0] = -2
    labels = torch.arange(600) % 19 + 1
    _, (found, expected) = loss_gradients(hidden, weight, labels, 2**16, on_cpu)
    torch.testing.assert_close(found[0], expected[0], rtol=0.05, atol=0)


def test_balance_loss_equals_that_of_transformers() -> None:
    torch.manual_seed(0)
    layers = [torch.randn(12, 6) for _ in range(3)]
    mask = torch.rand(3, 4) > 0.3
    losses = router_losses(layers, 2, mask.flatten())  # as one sequence
    theirs = torch.tensor([load_balancing_loss_func((layer,), 6, 2, mask) for layer in layers])
    torch.testing.assert_close(losses.balance / losses.weight, theirs.mean())
    by_sequence = router_losses(layers, 2, mask).balance
    rows = [[layer[4 * i : 4 * i + 4] for layer in layers] for i in range(3)]
    alone = [router_losses(row, 2, mask[i]).balance for i, row in enumerate(rows)]
    torch.testing.assert_close(by_sequence, torch.stack(alone).sum())
    z = torch.stack([layer.logsumexp(-1).square()[mask.flatten()].mean() for layer in layers])
    torch.testing.assert_close(losses.z / losses.weight, z.mean())


def test_balance_loss_falls_when_routing_evens_out() -> None:
    torch.manual_seed(0)
    logits = (torch.randn(64, 4) + torch.tensor([3.0, 0, 0, 0])).requires_grad_()
    before = router_losses([logits], 1).balance / 64
    moved = logits
    for _ in range(50):
        (gradient,) = torch.autograd.grad(router_losses([moved], 1).balance, moved)
        moved = (moved - gradient).detach().requires_grad_()
    after = router_losses([moved], 1).balance / 64
    assert before > 1.5 and after < 1.1


def test_a_routing_bias_changes_the_load_but_no_probability() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]]).expand(5, 3)
    plain = router_losses([logits], 1)
    biased = router_losses([logits], 1, None, [torch.tensor([-1.0, 0.0, 0.0])])
    assert plain.load.tolist() == [[5, 0, 0]] and biased.load.tolist() == [[0, 5, 0]]
    shares = logits[0].softmax(dim=-1)
    torch.testing.assert_close(plain.balance / 5, 3 * shares[0])
    torch.testing.assert_close(biased.balance / 5, 3 * shares[1])
    assert plain.z == biased.z


def test_router_losses_of_padding_only_are_zero() -> None:
    losses = router_losses([torch.randn(4, 3)], 1, torch.zeros(4))
    assert losses.balance == 0 and losses.z == 0 and losses.weight == 0
