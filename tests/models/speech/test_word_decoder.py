"""Decoding with a word list, against a sum over all paths."""

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muomni.models.speech.word_decoder import Word, WordDecoder, WordSearch

# The first characters repeat across a word's end, one word is another's beginning, one is doubled.
WORDS = {
    "a": Word([1], 6),
    "ab": Word([1, 2], 1),
    "b": Word([2], 2),
    "cc": Word([3, 3], 3),
}
NUM_TOKENS = 5  # the blank, three characters and one that no word has
WIDE = {"beam_size": 10_000, "tokens_per_frame": NUM_TOKENS, "beam_range": math.inf}


def sentence_scores(logits: torch.Tensor, search: WordSearch) -> dict[tuple[str, ...], float]:
    """The product of path probability and word weights of every sentence, path by path."""
    p = logits.double().softmax(-1).tolist()
    by_label: dict[tuple[int, ...], float] = defaultdict(float)
    for path in itertools.product(range(NUM_TOKENS), repeat=len(p)):
        label = tuple(token for token, _ in itertools.groupby(path) if token)
        by_label[label] += math.prod(p[t][token] for t, token in enumerate(path))
    total = sum(word.count + 1 for word in WORDS.values())
    weights = {
        text: ((word.count + 1) / total) ** search.lm_weight * math.exp(search.word_score)
        for text, word in WORDS.items()
    }
    scores = {}
    for length in range(len(p) + 1):
        for sentence in itertools.product(WORDS, repeat=length):
            label = tuple(token for text in sentence for token in WORDS[text].ids)
            # Spellings are ambiguous ("ab" is also "a b"): each reading is scored by its own weights.
            scores[sentence] = by_label.get(label, 0.0) * math.prod(weights[w] for w in sentence)
    return scores


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    num_frames=st.integers(1, 5),
    sharpness=st.sampled_from([0.5, 2.0, 4.0]),
    lm_weight=st.sampled_from([0.0, 0.7, 2.0]),
    word_score=st.sampled_from([-1.0, 0.0, 3.0]),
)
def test_a_wide_beam_finds_the_best_of_all_sentences(
    seed: int, num_frames: int, sharpness: float, lm_weight: float, word_score: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(1, num_frames, NUM_TOKENS, generator=generator)
    search = WordSearch(lm_weight=lm_weight, word_score=word_score, **WIDE)
    scores = sentence_scores(logits[0], search)
    (found,) = WordDecoder(WORDS, search).decode(logits, torch.tensor([num_frames]))
    assert scores[tuple(found)] == pytest.approx(max(scores.values()), rel=1e-9)


def logits_of(*frames: Sequence[float]) -> torch.Tensor:
    """Logits [1, T, V] of given probabilities."""
    return torch.tensor([frames], dtype=torch.float64).log()


@pytest.mark.parametrize("beam_size", [1, 5, 50])
def test_only_listed_words_are_decoded(beam_size: int) -> None:
    """Also with a narrow beam, for noise, and for an audio clip that ends inside a word."""
    logits = 4 * torch.randn(20, 30, NUM_TOKENS, generator=torch.Generator().manual_seed(0))
    decoder = WordDecoder(WORDS, WordSearch(beam_size=beam_size))
    said = decoder.decode(logits, torch.full((20,), 30))
    assert {word for words in said for word in words} <= WORDS.keys()
    assert any(said)


def test_an_unlisted_word_becomes_the_nearest_word() -> None:
    sure, other = [0.01, 0.01, 0.01, 0.01, 0.96], [0.04, 0.03, 0.9, 0.02, 0.01]
    (words,) = WordDecoder(WORDS).decode(logits_of(sure, other), torch.tensor([2]))
    assert words == ["b"]


def test_an_unfinished_word_is_dropped() -> None:
    words = {"ab": Word([1, 2], 1), "b": Word([2], 1)}
    b, a, blank = [0.0, 0.01, 0.99], [0.0, 0.99, 0.01], [1.0, 0.0, 0.0]
    decoder = WordDecoder(words, WordSearch(beam_size=1))
    assert decoder.decode(logits_of(b, blank, a), torch.tensor([3])) == [["b"]]


def test_the_lm_weight_decides_between_similar_words() -> None:
    """The rare word has a slightly larger path probability than the frequent one."""
    words = {"rare": Word([1], 0), "frequent": Word([2], 98)}
    logits = logits_of([0.0, 0.6, 0.4])
    for lm_weight, expected in ((0.0, "rare"), (1.0, "frequent")):
        decoder = WordDecoder(words, WordSearch(lm_weight=lm_weight))
        assert decoder.decode(logits, torch.tensor([1])) == [[expected]]


def test_the_word_score_decides_between_one_long_word_and_two_short_ones() -> None:
    words = {"to": Word([1], 1), "day": Word([2], 1), "today": Word([1, 2], 1)}
    logits = logits_of([0.1, 0.8, 0.1], [0.1, 0.1, 0.8])
    for word_score, expected in ((0.0, ["today"]), (5.0, ["to", "day"])):
        decoder = WordDecoder(words, WordSearch(word_score=word_score))
        assert decoder.decode(logits, torch.tensor([2])) == [expected]


def test_padding_and_neighbors_have_no_effect() -> None:
    logits = 3 * torch.randn(3, 12, NUM_TOKENS, generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([12, 7, 0])
    decoder = WordDecoder(WORDS)
    together = decoder.decode(logits, lengths)
    alone = [
        decoder.decode(row[None, :length], torch.tensor([length]))[0]
        for row, length in zip(logits, lengths.tolist(), strict=True)
    ]
    assert together == alone
    assert together[2] == []
    assert decoder.decode(logits[:0], lengths[:0]) == []
    assert decoder.decode(logits[:, :0], 0 * lengths) == [[], [], []]


def test_impossible_outputs_leave_a_hypothesis() -> None:
    """Logits so far apart that all but one token have probability zero even in fp64."""
    logits = torch.full((1, 3, NUM_TOKENS), -2e3)
    logits[0, [0, 1, 2], [1, 4, 2]] = 0.0
    (words,) = WordDecoder(WORDS).decode(logits, torch.tensor([3]))
    assert words and set(words) <= WORDS.keys()


def test_among_equal_tokens_the_most_frequent_word_is_chosen() -> None:
    words = {"two": Word([1], 2), "to": Word([1], 5), "too": Word([1], 1)}
    assert WordDecoder(words).decode(logits_of([0.1, 0.9]), torch.tensor([1])) == [["to"]]


@pytest.mark.parametrize("words", [{}, {"x": Word([], 1)}, {"x": Word([1, 0], 1)}])
def test_invalid_word_lists_are_rejected(words: dict[str, Word]) -> None:
    with pytest.raises(ValueError, match=r"at least one"):
        WordDecoder(words)
