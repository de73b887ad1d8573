"""CTC decoding that says only the words of a list: prefix beam search over a trie of their spellings.

A hypothesis is a sequence of finished words and a place in the trie; its probability is summed over
the paths that lead there (Graves, "Supervised Sequence Labeling with Recurrent Neural Networks",
2012; Hannun et al., 2014, arXiv:1408.2873). A word is weighted with its unigram probability, and
before it ends with that of the likeliest word that it can become, so that the beam need not be wide.

Probabilities are plain products, scaled to a best of 1 after each frame: no logarithm in the loop. It
runs on the CPU.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import nlargest
from typing import NamedTuple

import torch
from torch import Tensor

from muomni.models.speech.ctc import BLANK_ID

_ROOT = 0
_BLANK = 0  # the blank's column; the others are the tokens that words are spelled with
# No output of the head is less likely: a frame must not leave a search without hypotheses.
_LEAST_PROBABILITY = 1e-100


class SpelledWord(NamedTuple):
    """The token ids of a word, none of them the blank, and how often it is said."""

    ids: Sequence[int]
    count: int


@dataclass(frozen=True, slots=True)
class WordSearch:
    """How much to trust the word list, and how widely to search.

    A word weighs `lm_weight * ln p + word_score` nats, where p is its share of all words counted,
    with one added to each. In each frame the `tokens_per_frame` likeliest tokens are tried and the
    `beam_size` best hypotheses kept, if they are within `beam_range` nats of the best.

    The defaults were chosen on the validation split of the sample corpus, where WER hardly changes
    between LM weights 0.75 and 1.25 and in a wider beam (docs/evaluation.md has the metrics).
    """

    lm_weight: float = 1.0
    word_score: float = 0.0
    beam_size: int = 50
    tokens_per_frame: int = 20
    beam_range: float = 15.0


class _Trie:
    """The spellings as columns, node by node; `columns` lead to a node, `steps` lead on.

    `weights` and `best` are in nats: of the word that ends at a node, and of the best one that can
    still end at or below it. `steps` are (column, next node, factor by which `best` changes).
    """

    def __init__(self) -> None:
        self.children: list[dict[int, int]] = [{}]
        self.columns = [_BLANK]
        self.words: list[str | None] = [None]
        self.weights = [-math.inf]
        self.best = [-math.inf]

    def insert(self, word: str, columns: Sequence[int], weight: float) -> None:
        """Add a word; of words that are spelled alike the one of greater weight stays."""
        node = _ROOT
        for column in columns:
            if column not in self.children[node]:
                self.children[node][column] = len(self.children)
                self.children.append({})
                self.columns.append(column)
                self.words.append(None)
                self.weights.append(-math.inf)
                self.best.append(-math.inf)
            node = self.children[node][column]
            self.best[node] = max(self.best[node], weight)
        if weight > self.weights[node]:
            self.words[node], self.weights[node] = word, weight

    def freeze(self) -> None:
        """Compute `steps` and `endings`, the factor of a word that ends, when all words are in."""
        self.best[_ROOT] = 0.0  # between words nothing is weighed in advance
        self.steps = [
            [
                (column, child, math.exp(self.best[child] - self.best[node]))
                for column, child in children.items()
            ]
            for node, children in enumerate(self.children)
        ]
        self.endings = [
            math.exp(weight - best) for weight, best in zip(self.weights, self.best, strict=True)
        ]


class WordDecoder:
    """Decodes the outputs of a CTC head into words of a list.

    Of words that are spelled alike the most frequent is said. Raises ValueError for an empty list and
    for a spelling that is empty or holds the blank.
    """

    def __init__(self, words: Mapping[str, SpelledWord], search: WordSearch | None = None) -> None:
        if not words:
            raise ValueError("a word list needs at least one word")
        self.search = search or WordSearch()
        tokens = sorted({i for word in words.values() for i in word.ids})
        self._tokens = torch.tensor([BLANK_ID, *tokens])
        columns = {token: column for column, token in enumerate(tokens, start=1)}
        self._trie = _Trie()
        total = sum(word.count + 1 for word in words.values())
        for text, word in words.items():
            if not word.ids or BLANK_ID in word.ids:
                raise ValueError(f"'{text}' is spelled {list(word.ids)}: empty or with the blank")
            log_p = math.log((word.count + 1) / total)
            weight = self.search.lm_weight * log_p + self.search.word_score
            self._trie.insert(text, [columns[i] for i in word.ids], weight)
        self._trie.freeze()

    def decode(self, logits: Tensor, frame_lengths: Tensor) -> list[list[str]]:
        """The words heard in each sample of logits [B, T, V], of which `frame_lengths` [B] count.

        They have the largest product of path probability and weights that the beam finds.
        """
        probabilities = logits.double().softmax(-1)[..., self._tokens.to(logits.device)]
        rows = zip(probabilities.cpu(), frame_lengths.tolist(), strict=True)
        return [self._decode_one(row[:length]) for row, length in rows]

    def _decode_one(self, probabilities: Tensor) -> list[str]:
        """The words of one sample: probabilities [T, columns]."""
        beam = _Beam(self._trie, self.search)
        for frame in self._likely(probabilities).tolist():
            beam.advance(frame)
        return beam.best_words()

    def _likely(self, probabilities: Tensor) -> Tensor:
        """Zero for all but the blank and the likeliest tokens of each frame."""
        probabilities = probabilities.clamp(min=_LEAST_PROBABILITY)
        blank, tokens = probabilities.split([1, probabilities.shape[1] - 1], dim=1)
        if tokens.shape[1] > self.search.tokens_per_frame:
            least = tokens.topk(self.search.tokens_per_frame, dim=1).values[:, -1:]
            tokens = torch.where(tokens >= least, tokens, 0.0)
        return torch.cat([blank, tokens], dim=1)


class _Beam:
    """The hypotheses after some frames of one audio clip.

    A hypothesis is `history * number of nodes + node`; history 0 is no word yet, and another one
    stands for the hypothesis whose last word it finished. Kept are its probabilities by the end of
    the paths: (hypothesis, with a blank, with its last token).
    """

    def __init__(self, trie: _Trie, search: WordSearch) -> None:
        self._trie = trie
        self._num_nodes = len(trie.words)
        self._beam_size = search.beam_size
        self._least = math.exp(-search.beam_range)
        self._kept = [(_ROOT, 1.0, 0.0)]
        self._finished = [_ROOT]  # by history
        self._histories: dict[int, int] = {}  # by finished hypothesis

    def advance(self, frame: list[float]) -> None:
        """Hear one more frame: a probability for each column."""
        num_nodes, columns, words = self._num_nodes, self._trie.columns, self._trie.words
        endings = self._trie.endings
        ways: dict[int, list[tuple[int, int, float]]] = {}
        blank_ends: dict[int, float] = {}
        token_ends: dict[int, float] = {}
        for hypothesis, after_blank, after_token in self._kept:
            total = after_blank + after_token
            node = hypothesis % num_nodes
            blank_ends[hypothesis] = total * frame[_BLANK]
            last = columns[node]
            if stay := after_token * frame[last]:
                token_ends[hypothesis] = token_ends.get(hypothesis, 0.0) + stay
            starts = [(hypothesis - node, node, 1.0)]
            if words[node] is not None:
                starts.append((self._history(hypothesis) * num_nodes, _ROOT, endings[node]))
            for history, start, factor in starts:
                if start not in ways:
                    ways[start] = self._ways(start, frame)
                for column, child, p in ways[start]:
                    # A path goes on to an equal token only over a blank.
                    source = after_blank if column == last else total
                    key = history + child
                    token_ends[key] = token_ends.get(key, 0.0) + source * p * factor
        self._keep_best(blank_ends, token_ends)

    def best_words(self) -> list[str]:
        """The words of the best hypothesis whose last word is finished.

        If there is none left, the finished words of the best one.
        """
        num_nodes, endings = self._num_nodes, self._trie.endings
        scored = []
        for hypothesis, after_blank, after_token in self._kept:
            node = hypothesis % num_nodes
            is_finished = node == _ROOT or self._trie.words[node] is not None
            factor = endings[node] if is_finished and node != _ROOT else 1.0
            scored.append((is_finished, (after_blank + after_token) * factor, hypothesis))
        _, _, hypothesis = max(scored)
        said = []
        while hypothesis:
            history, node = divmod(hypothesis, num_nodes)
            word = self._trie.words[node]
            if word is not None:
                said.append(word)
            hypothesis = self._finished[history]
        return said[::-1]

    def _history(self, hypothesis: int) -> int:
        """The history of hypotheses that follow when the last word of this one is finished."""
        if hypothesis not in self._histories:
            self._histories[hypothesis] = len(self._finished)
            self._finished.append(hypothesis)
        return self._histories[hypothesis]

    def _ways(self, node: int, frame: list[float]) -> list[tuple[int, int, float]]:
        """(column, next node, probability with the change of weight) of what may follow a node."""
        return [
            (column, child, frame[column] * factor)
            for column, child, factor in self._trie.steps[node]
            if frame[column]
        ]

    def _keep_best(self, blank_ends: dict[int, float], token_ends: dict[int, float]) -> None:
        totals = dict(blank_ends)
        for hypothesis, p in token_ends.items():
            totals[hypothesis] = totals.get(hypothesis, 0.0) + p
        best = max(totals.values())
        least = best * self._least
        candidates = [(p, hypothesis) for hypothesis, p in totals.items() if p >= least]
        if len(candidates) > self._beam_size:
            candidates = nlargest(self._beam_size, candidates)
        self._kept = [
            (h, blank_ends.get(h, 0.0) / best, token_ends.get(h, 0.0) / best) for _, h in candidates
        ]
