"""The Thinker against transformers' Qwen3, its KV cache, and its packed documents."""

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from muomni.config.models import MoEConfig, ThinkerConfig
from muomni.errors import ConfigError
from muomni.models.language.convert_qwen3 import from_qwen3, qwen3_config, to_qwen3
from muomni.models.language.thinker import Thinker
from muomni.models.layers.masks import document_mask, document_positions, window_size
from muomni.models.layers.transformer import init_weights
from tests.models.gradients import grad

MOE = MoEConfig(num_experts=6, num_experts_per_token=2, expert_intermediate_size=24)


def make_config(moe: MoEConfig | None = None, tied: bool = True) -> ThinkerConfig:
    return ThinkerConfig(
        vocab_size=61,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        intermediate_size=48,
        max_positions=64,
        rope_theta=50_000.0,
        tie_embeddings=tied,
        moe=moe,
    )


def make_thinker(moe: MoEConfig | None = None, tied: bool = True) -> Thinker:
    torch.manual_seed(1)
    model = Thinker(make_config(moe, tied))
    init_weights(model, 1, std=0.2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model.eval()


def make_reference(config: ThinkerConfig) -> torch.nn.Module:
    values = qwen3_config(config)
    if config.moe is None:
        return Qwen3ForCausalLM(Qwen3Config(**values)).eval()
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**values)).eval()


CASES = [
    pytest.param(None, True, id="dense-tied"),
    pytest.param(None, False, id="dense-untied"),
    pytest.param(MOE, False, id="moe"),
    pytest.param(MOE.model_copy(update={"normalize_top_k": False}), True, id="moe-raw-scores"),
]


@pytest.mark.parametrize("moe,tied", CASES)
def test_export_loads_in_transformers_with_equal_logits(moe: MoEConfig | None, tied: bool) -> None:
    model = make_thinker(moe, tied)
    reference = make_reference(model.config)
    reference.load_state_dict(to_qwen3(model.state_dict(), model.config), strict=True)
    ids = torch.randint(0, 61, (3, 17))
    with torch.no_grad():
        ours, theirs = model.logits(model(ids)), reference(ids).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("change", [{"shared_intermediate_size": 8}, {"balance": "bias"}])
def test_unsupported_mixtures_are_not_converted(change: dict[str, object]) -> None:
    config = make_config(MOE.model_copy(update=change))
    for convert in (lambda: qwen3_config(config), lambda: to_qwen3({}, config)):
        with pytest.raises(ConfigError, match="Qwen3Moe has no shared expert and no routing bias"):
            convert()


@pytest.mark.parametrize("moe,tied", CASES)
def test_weights_of_transformers_load_with_equal_logits(moe: MoEConfig | None, tied: bool) -> None:
    config = make_config(moe, tied)
    torch.manual_seed(2)
    reference = make_reference(config)
    model = Thinker(config).eval()
    model.load_state_dict(from_qwen3(reference.state_dict(), config), strict=True)
    ids = torch.randint(0, 61, (2, 9))
    with torch.no_grad():
        ours, theirs = model.logits(model(ids)), reference(ids).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_gradients_equal_those_of_transformers() -> None:
    model = make_thinker()
    reference = make_reference(model.config)
    reference.load_state_dict(to_qwen3(model.state_dict(), model.config))
    ids = torch.randint(0, 61, (2, 11))
    model.loss(model(ids[:, :-1]), ids[:, 1:]).total.div(20).backward()
    reference(ids, labels=ids).loss.backward()
    ours = to_qwen3({n: grad(p) for n, p in model.named_parameters()}, model.config)
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "moe"])
def test_cached_logits_equal_uncached(moe: MoEConfig | None) -> None:
    model = make_thinker(moe)
    ids = torch.randint(0, 61, (2, 12))
    cache = model.new_cache(2, 12)
    with torch.no_grad():
        hidden = [model(ids[:, :5], cache=cache)]
        hidden += [model(ids[:, [t]], cache=cache) for t in range(5, 12)]
        cached, uncached = model.logits(torch.cat(hidden, dim=1)), model.logits(model(ids))
    torch.testing.assert_close(cached, uncached, atol=1e-5, rtol=1e-5)


def test_packed_documents_match_single_documents() -> None:
    model = make_thinker()
    documents = [torch.randint(0, 61, (1, length)) for length in (4, 1, 6)]
    packed = torch.cat([*documents, torch.zeros(1, 3, dtype=torch.long)], dim=1)
    numbers = torch.tensor([[1] * 4 + [2] + [3] * 6 + [0] * 3])
    with torch.no_grad():
        hidden = model(packed, document_ids=numbers)
        for number, document in enumerate(documents, start=1):
            alone = model.logits(model(document))[0]
            torch.testing.assert_close(
                model.logits(hidden[numbers == number]), alone, atol=1e-5, rtol=1e-5
            )


def rows_of_documents(lengths: list[list[int]], width: int) -> torch.Tensor:
    """Document ids [B, T] of documents of these lengths, padded."""
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, own in enumerate(lengths):
        numbers = torch.arange(1, len(own) + 1).repeat_interleave(
            torch.tensor(own, dtype=torch.long)
        )
        ids[row, : len(numbers)] = numbers
    return ids


def test_windowed_attention_matches_the_full_mask() -> None:
    model = make_thinker().double()
    # As long as a window, over the edges of windows, one row full, one with more padding than a window.
    ids = rows_of_documents([[32, 7, 25, 31, 32, 1], [5, 32, 20]], 128)
    assert window_size(ids) == 32
    tokens = torch.randint(0, 61, ids.shape)
    labels = tokens.masked_fill(ids == 0, -100)
    mask, positions = document_mask(ids), document_positions(ids)
    found = []
    for masked in ({"document_ids": ids}, {"mask": mask, "positions": positions}):
        hidden = model(tokens, **masked)
        loss = model.loss(hidden, labels).total
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        found.append([hidden[ids > 0], loss, *gradients])
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("lengths", "width", "expected"),
    [([33], 256, 64), ([64], 256, 64), ([65], 256, None), ([32], 120, None), ([], 128, 32)],
)
def test_window_size_covers_the_longest_document(
    lengths: list[int], width: int, expected: int | None
) -> None:
    assert window_size(rows_of_documents([lengths], width)) == expected


def test_no_loss_sends_gradient_to_another_document() -> None:
    model = make_thinker()
    embeddings = model.embed(torch.randint(0, 61, (1, 12))).detach().requires_grad_()
    numbers = torch.tensor([[1] * 3 + [2] * 4 + [3] * 3 + [0] * 2])
    for number in (1, 2, 3):
        hidden = model(inputs_embeds=embeddings, document_ids=numbers)
        loss = model.logits(hidden[numbers == number]).logsumexp(dim=-1).sum()
        (gradient,) = torch.autograd.grad(loss, embeddings)
        touched = gradient.abs().amax(dim=-1) > 0
        assert torch.equal(touched, numbers == number)


def test_embeddings_and_ids_are_equivalent_inputs() -> None:
    model = make_thinker()
    ids = torch.randint(0, 61, (1, 5))
    torch.testing.assert_close(model(ids), model(inputs_embeds=model.embed(ids)))


def test_conflicting_inputs_are_rejected() -> None:
    model = make_thinker()
    ids = torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="either"):
        model(ids, inputs_embeds=model.embed(ids))
    with pytest.raises(ValueError, match="document_ids"):
        model(ids, document_ids=ids, cache=model.new_cache(1, 3))


def test_distant_positions_stay_distinct_in_half_precision() -> None:
    model = make_thinker()
    ids = torch.randint(0, 61, (1, 8))
    far = torch.arange(1000, 1008)[None]
    exact = model.logits(model(ids, positions=far)).softmax(dim=-1)
    model = model.to(torch.bfloat16)
    half = model.logits(model(ids, positions=far)).float().softmax(dim=-1)
    assert (exact - half).abs().max() < 0.1


def test_learns_to_copy_and_to_stop() -> None:
    torch.manual_seed(3)
    model = Thinker(make_config()).train()
    words = torch.randint(4, 61, (4, 5))
    start, turn, end = (torch.full((4, 1), number) for number in (1, 2, 3))
    rows = torch.cat([start, words, turn, words, end], dim=1)
    labels = rows[:, 1:].clone()
    labels[:, :6] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(80):
        loss = model.loss(model(rows[:, :-1]), labels)
        optimizer.zero_grad()
        (loss.total / loss.weight).backward()
        optimizer.step()
    cache, ids, written = model.new_cache(4, 16), rows[:, :7], []
    with torch.no_grad():
        for _ in range(6):
            ids = model.logits(model(ids, cache=cache)[:, -1:]).argmax(dim=-1)
            written.append(ids)
    assert torch.equal(torch.cat(written, dim=1), rows[:, 7:])
