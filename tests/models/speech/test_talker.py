"""The Talker is conditioned on its text, predicts each code once, copies exactly, and stops."""

from typing import Any

import pytest
import torch
from torch import Tensor

from muomni.config.models import TalkerConfig
from muomni.models.layers.transformer import init_weights
from muomni.models.speech.talker import Talker, TalkerOutput, num_predictions

NUM_CODES = 11


def make_talker(num_codebooks: int = 2, std: float = 0.3, **changes: Any) -> Talker:
    torch.manual_seed(0)
    config = TalkerConfig(
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        intermediate_size=64,
        text_vocab_size=30,
        num_codebooks=num_codebooks,
        codebook_size=NUM_CODES,
        **changes,
    )
    talker = Talker(config)
    init_weights(talker, 1, std=std)
    return talker.eval()


def make_batch(num_codebooks: int = 2) -> dict[str, Tensor]:
    torch.manual_seed(1)
    text_lengths, code_lengths = torch.tensor([5, 2, 4]), torch.tensor([3, 6, 0])
    return {
        "text_ids": torch.randint(0, 30, (3, 5)),
        "character_ids": torch.randint(97, 123, (3, 5)),
        "text_mask": torch.arange(5) < text_lengths[:, None],
        "codes": torch.randint(0, NUM_CODES, (3, 6, num_codebooks)),
        "code_mask": torch.arange(6) < code_lengths[:, None],
    }


def speak_batch(num_codebooks: int) -> dict[str, Tensor]:
    """A toy voice: each character is two frames whose codes depend on it; tokens carry no information."""
    torch.manual_seed(2)
    text = torch.stack([torch.randperm(30)[:6] for _ in range(4)])
    lengths = torch.tensor([6, 3, 5, 4])
    table = torch.randint(0, NUM_CODES, (30, 2, num_codebooks))
    return {
        "text_ids": torch.full_like(text, 7),
        "character_ids": text,
        "text_mask": torch.arange(6) < lengths[:, None],
        "codes": table[text].flatten(1, 2),
        "code_mask": torch.arange(12) < 2 * lengths[:, None],
    }


def text_of(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return batch["text_ids"], batch["character_ids"], batch["text_mask"]


def train(talker: Talker, batch: dict[str, Tensor], steps: int) -> None:
    optimizer = torch.optim.AdamW(talker.parameters(), lr=5e-3, weight_decay=0.0)
    talker.train()
    for step in range(steps):
        seeds = torch.arange(len(batch["codes"])) + 1000 * step
        loss = talker.loss(talker(**batch, seeds=seeds), batch["codes"], batch["code_mask"])
        optimizer.zero_grad()
        (loss.total / loss.weight).backward()
        torch.nn.utils.clip_grad_norm_(talker.parameters(), 1.0)
        optimizer.step()
    talker.eval()


@pytest.mark.parametrize("num_codebooks", [1, 2, 3])
def test_learns_to_speak_exactly_and_to_stop(num_codebooks: int) -> None:
    talker, batch = make_talker(num_codebooks, std=0.05), speak_batch(num_codebooks)
    train(talker, batch, 150)
    spoken = talker.generate(*text_of(batch), max_frames=20, temperature=0)
    assert spoken.stopped.all()
    assert torch.equal(spoken.lengths, batch["code_mask"].sum(dim=1))
    mask = batch["code_mask"]
    assert torch.equal(spoken.codes[mask], batch["codes"][mask])


def test_another_text_raises_the_loss() -> None:
    talker, batch = make_talker(std=0.05), speak_batch(2)
    train(talker, batch, 60)
    swapped = dict(batch, character_ids=batch["character_ids"].flip(0))
    right, wrong = (
        talker.loss(talker(**b), batch["codes"], batch["code_mask"]).total for b in (batch, swapped)
    )
    assert wrong > 2 * right


def test_the_token_of_a_character_matters_too() -> None:
    talker, batch = make_talker(), make_batch()
    other = talker(**dict(batch, text_ids=(batch["text_ids"] + 1) % 30)).base
    assert not torch.allclose(talker(**batch).base[0], other[0])


def test_unseen_words_are_spoken_by_character() -> None:
    """Sounds follow characters, so words without a training text are spoken correctly."""
    talker = make_talker(std=0.05, frames_per_character=2.0, frame_dropout=0.3)
    torch.manual_seed(3)
    table = torch.randint(0, NUM_CODES, (5, 2, 2))
    words = torch.randint(0, 5, (72, 7))

    def batch(characters: Tensor) -> dict[str, Tensor]:
        return {
            "text_ids": torch.zeros_like(characters),
            "character_ids": characters,
            "text_mask": torch.ones_like(characters, dtype=torch.bool),
            "codes": table[characters].flatten(1, 2),
            "code_mask": torch.ones(len(characters), 14, dtype=torch.bool),
        }

    train(talker, batch(words[:64]), 150)
    unheard = batch(words[64:])
    spoken = talker.generate(*text_of(unheard), max_frames=20, temperature=0)
    is_right = (spoken.codes[:, :14] == unheard["codes"]).all(dim=(1, 2))
    assert spoken.codes.shape[1] >= 14 and is_right.float().mean() >= 0.75


def test_frames_are_dropped_in_training_only() -> None:
    talker, batch = make_talker(frame_dropout=0.99), make_batch()
    other = dict(batch, codes=(batch["codes"] + 1) % NUM_CODES)
    assert not torch.allclose(talker(**batch).base[1, 3], talker(**other).base[1, 3])
    talker.train()
    seeds = torch.arange(3)
    hidden = talker(**batch, seeds=seeds).base[1]
    torch.testing.assert_close(hidden, talker(**other, seeds=seeds).base[1])


@pytest.mark.parametrize("rate", ["dropout", "frame_dropout"])
def test_dropout_needs_seeds_and_depends_on_nothing_else(rate: str) -> None:
    rates: Any = {rate: 0.5}
    talker, batch = make_talker(**rates).train(), make_batch()
    with pytest.raises(ValueError, match="needs a seed per sample"):
        talker(**batch)
    seeds, state = torch.tensor([7, 8, 9]), torch.get_rng_state()
    first = talker(**batch, seeds=seeds).base
    assert torch.equal(talker(**batch, seeds=seeds).base, first)
    assert torch.equal(torch.get_rng_state(), state)
    other = talker(**batch, seeds=seeds + torch.tensor([0, 1, 0])).base
    assert torch.equal(other[[0, 2]], first[[0, 2]]) and not torch.equal(other[1], first[1])
    assert not torch.equal(talker.eval()(**batch).base, first)


def test_shapes_and_weight() -> None:
    talker, batch = make_talker(3), make_batch(3)
    output = talker(**batch)
    assert output.base.shape == (3, 7, NUM_CODES + 1)
    assert [tuple(r.shape) for r in output.residual] == [(3, 6, NUM_CODES)] * 2
    loss = talker.loss(output, batch["codes"], batch["code_mask"])
    # 3 + 6 frames of 3 codes and two stops; the row without frames counts nothing.
    assert loss.weight == 9 * 3 + 2 == num_predictions(batch["code_mask"], 3)


def test_loss_is_the_sum_over_targets_shifted_once_with_one_stop() -> None:
    talker, batch = make_talker(2), make_batch(2)
    output, codes = talker(**batch), batch["codes"]
    expected = torch.zeros(())
    for row, length in enumerate([3, 6, 0]):
        for t in range(length):
            expected -= output.base[row, t].log_softmax(-1)[codes[row, t, 0]]
            expected -= output.residual[0][row, t].log_softmax(-1)[codes[row, t, 1]]
        if length:
            expected -= output.base[row, length].log_softmax(-1)[talker.stop]
    loss = talker.loss(output, codes, batch["code_mask"])
    torch.testing.assert_close(loss.total, expected)


def test_perfect_logits_give_full_accuracy() -> None:
    talker, batch = make_talker(2), make_batch(2)
    codes = batch["codes"]
    base = torch.nn.functional.one_hot(codes[..., 0], NUM_CODES + 1) * 50.0
    base = torch.cat([base, torch.zeros(3, 1, NUM_CODES + 1)], dim=1)
    residual = torch.nn.functional.one_hot(codes[..., 1], NUM_CODES) * 50.0
    logs = talker.loss(TalkerOutput(base, [residual]), codes, batch["code_mask"]).logs
    assert logs["accuracy_0"].tolist() == [9, 9] and logs["accuracy_1"].tolist() == [9, 9]


def test_no_prediction_sees_the_code_it_predicts() -> None:
    talker, batch = make_talker(3), make_batch(3)
    before = talker(**batch)
    frame, book = 2, 1
    changed = batch["codes"].clone()
    changed[:, frame, book] = (changed[:, frame, book] + 1) % NUM_CODES
    after = talker(**dict(batch, codes=changed))
    same = [
        torch.isclose(a, b, atol=1e-6).all(dim=-1)
        for a, b in zip([before.base, *before.residual], [after.base, *after.residual], strict=True)
    ]
    assert same[0][:, : frame + 1].all() and not same[0][1, frame + 1]
    assert same[1][:, : frame + 1].all()
    assert same[2][:, :frame].all() and not same[2][1, frame]


@pytest.mark.parametrize("has_dropout", [False, True])
def test_padded_batch_equals_single_samples(has_dropout: bool) -> None:
    talker, batch = make_talker(dropout=0.3, frame_dropout=0.3), make_batch()
    talker.train(has_dropout)
    seeds = torch.tensor([7, 8, 9])
    together = talker(**batch, seeds=seeds)
    for row, (text_length, length) in enumerate([(5, 3), (2, 6), (4, 0)]):
        alone = talker(
            *(part[[row], :text_length] for part in text_of(batch)),
            batch["codes"][[row], :length],
            batch["code_mask"][[row], :length],
            seeds=seeds[[row]],
        )
        torch.testing.assert_close(together.base[row, : length + 1], alone.base[0])
        torch.testing.assert_close(together.residual[0][row, :length], alone.residual[0][0])


@pytest.mark.parametrize("num_codebooks", [1, 2, 3])
def test_greedy_generation_with_cache_equals_the_uncached_model(num_codebooks: int) -> None:
    talker, batch = make_talker(num_codebooks, std=0.5), make_batch(num_codebooks)
    text = text_of(batch)
    spoken = talker.generate(*text, max_frames=8, temperature=0)
    assert spoken.codes.shape[1] >= 1
    code_mask = torch.arange(spoken.codes.shape[1]) < spoken.lengths[:, None]
    output = talker(*text, spoken.codes, code_mask)
    guesses = [output.base[:, :-1], *output.residual]
    for k, logits in enumerate(guesses):
        assert torch.equal(logits.argmax(dim=-1)[code_mask], spoken.codes[..., k][code_mask])
    for row in range(3):
        ends = output.base[row, spoken.lengths[row]].argmax() == talker.stop
        assert ends == spoken.stopped[row]


def test_batched_generation_equals_single_samples() -> None:
    talker, batch = make_talker(std=0.5), make_batch()
    text_ids, character_ids, mask = text_of(batch)
    together = talker.generate(text_ids, character_ids, mask, max_frames=8, temperature=0)
    for row in range(3):
        text = (ids[[row]][:, mask[row]] for ids in (text_ids, character_ids))
        alone = talker.generate(*text, max_frames=8, temperature=0)
        length = int(alone.lengths[0])
        assert together.lengths[row] == length
        assert torch.equal(together.codes[row, :length], alone.codes[0, :length])


def test_generation_is_truncated_at_max_frames() -> None:
    talker = make_talker()
    talker.base_head.weight.data[talker.stop] = 0.0
    talker.base_head.weight.data[:2] = 0.0
    talker.base_head.weight.data[0] = 9.0
    talker.base_head.weight.data[1] = -9.0
    text = torch.ones(1, 3, dtype=torch.long)
    spoken = talker.generate(text, text, max_frames=4, temperature=0)
    assert spoken.codes.shape == (1, 4, 2) and not spoken.stopped.any()


def test_sampling_repeats_with_the_same_generator_state() -> None:
    talker = make_talker()
    text = torch.ones(1, 3, dtype=torch.long)
    drawn = [
        talker.generate(
            text, text, max_frames=6, top_k=5, generator=torch.Generator().manual_seed(7)
        ).codes
        for _ in range(2)
    ]
    assert torch.equal(*drawn)


def test_thinker_states_matter() -> None:
    talker, batch = make_talker(thinker_hidden_size=16), make_batch()
    hidden = torch.randn(3, 5, 16)
    output = talker(**batch, thinker_hidden=hidden).base
    assert not torch.allclose(output, talker(**batch, thinker_hidden=-hidden).base)


def test_thinker_states_without_their_size_are_rejected() -> None:
    with pytest.raises(ValueError, match="thinker_hidden_size"):
        make_talker()(**make_batch(), thinker_hidden=torch.zeros(3, 5, 16))
