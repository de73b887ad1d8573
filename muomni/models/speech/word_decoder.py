"""CTC decoding to words of a list: prefix beam search over a trie of their token sequences.

A hypothesis is a sequence of finished words and a node of the trie; its probability is summed over the
paths that lead there (Graves, "Supervised Sequence Labeling with Recurrent Neural Networks", 2012; Hannun
et al., 2014, arXiv:1408.2873). A finished word is weighted by its unigram probability, an unfinished one
by that of the most probable word that it can become, so that a narrow beam suffices.

Probabilities are products, scaled to a maximum of 1 after each frame: no logarithm in the loop. It runs on
the CPU.
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
_BLANK = 0  # column of the blank; the others are the tokens of the words
# Floor of the head's outputs, so that no frame leaves the search without hypotheses.
_LEAST_PROBABILITY = 1e-100


class Word(NamedTuple):
    """The token ids of a word, without the blank, and its count in the training transcripts."""

    ids: Sequence[int]
    count: int


@dataclass(frozen=True, slots=True)
class WordSearch:
    """Weight of the unigram language model and width of the beam.

    A word weighs `lm_weight * ln p + word_score` nats, where p is its unigram probability with add-one
    smoothing. Each frame extends hypotheses by the `tokens_per_frame` most probable tokens and keeps
    the best `beam_size` within `beam_range` nats of the best.

    The defaults were chosen on the validation split of the sample corpus, where WER hardly changes
    between LM weights 0.75 and 1.25 or with a wider beam (docs/LOG.md).
    """

    lm_weight: float = 1.0
    word_score: float = 0.0
    beam_size: int = 50
    tokens_per_frame: int = 20
    beam_range: float = 15.0


class _Trie:
    """A trie of words; `columns` holds the token column that leads to each node.

    `weights` and `best` are in nats: of the word that ends at a node, and of the best word that ends at
    or below it. `steps` are (column, next node, factor by which `best` changes).
    """

    def __init__(self) -> None:
        self.children: list[dict[int, int]] = [{}]
        self.columns = [_BLANK]
        self.words: list[str | None] = [None]
        self.weights = [-math.inf]
        self.best = [-math.inf]

    def insert(self, word: str, columns: Sequence[int], weight: float) -> None:
        """Add a word; among words with equal tokens, keep the one of greatest weight."""
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
        """After the last insert: compute `steps` and `endings`, the factors of finished words."""
        self.best[_ROOT] = 0.0  # no look-ahead between words
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

    Among words with equal tokens, the most frequent one is chosen. Raises ValueError for an empty list
    and for a word that is empty or contains the blank.
    """

    def __init__(self, words: Mapping[str, Word], search: WordSearch | None = None) -> None:
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
                raise ValueError(
                    f"word '{text}' has tokens {list(word.ids)}; it needs at least one, and no blank"
                )
            log_p = math.log((word.count + 1) / total)
            weight = self.search.lm_weight * log_p + self.search.word_score
            self._trie.insert(text, [columns[i] for i in word.ids], weight)
        self._trie.freeze()

    def decode(self, logits: Tensor, frame_lengths: Tensor) -> list[list[str]]:
        """Decode logits [B, T, V] with `frame_lengths` [B] to the words of each sample.

        They maximize the product of path probability and word weights, as far as the beam finds it.
        """
        probabilities = logits.double().softmax(-1)[..., self._tokens.to(logits.device)]
        samples = zip(probabilities.cpu(), frame_lengths.tolist(), strict=True)
        return [self._decode_one(sample[:length]) for sample, length in samples]

    def _decode_one(self, probabilities: Tensor) -> list[str]:
        """The words of one sample: probabilities [T, columns]."""
        beam = _Beam(self._trie, self.search)
        for frame in self._prune(probabilities).tolist():
            beam.advance(frame)
        return beam.best_words()

    def _prune(self, probabilities: Tensor) -> Tensor:
        """Zero all but the blank and the most probable tokens of each frame."""
        probabilities = probabilities.clamp(min=_LEAST_PROBABILITY)
        blank, tokens = probabilities.split([1, probabilities.shape[1] - 1], dim=1)
        if tokens.shape[1] > self.search.tokens_per_frame:
            least = tokens.topk(self.search.tokens_per_frame, dim=1).values[:, -1:]
            tokens = torch.where(tokens >= least, tokens, 0.0)
        return torch.cat([blank, tokens], dim=1)


class _Beam:
    """The hypotheses after some frames of an audio clip.

    A hypothesis is encoded as `history * num_nodes + node`. History 0 has no words; any other one is the
    index of the hypothesis that it continues in `_finished`. `_kept` holds (hypothesis, probability of
    paths that end with a blank, probability of paths that end with its last token).
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
        """Process a frame, which holds a probability per column."""
        num_nodes, columns, words = self._num_nodes, self._trie.columns, self._trie.words
        endings = self._trie.endings
        extensions: dict[int, list[tuple[int, int, float]]] = {}
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
                if start not in extensions:
                    extensions[start] = self._extensions(start, frame)
                for column, child, p in extensions[start]:
                    # A path reaches an equal token only through a blank.
                    source = after_blank if column == last else total
                    key = history + child
                    token_ends[key] = token_ends.get(key, 0.0) + source * p * factor
        self._keep_best(blank_ends, token_ends)

    def best_words(self) -> list[str]:
        """The words of the best hypothesis whose last word is finished.

        Without any, the finished words of the best hypothesis.
        """
        num_nodes, endings = self._num_nodes, self._trie.endings
        scored = []
        for hypothesis, after_blank, after_token in self._kept:
            node = hypothesis % num_nodes
            is_finished = node == _ROOT or self._trie.words[node] is not None
            factor = endings[node] if is_finished and node != _ROOT else 1.0
            scored.append((is_finished, (after_blank + after_token) * factor, hypothesis))
        _, _, hypothesis = max(scored)
        words = []
        while hypothesis:
            history, node = divmod(hypothesis, num_nodes)
            word = self._trie.words[node]
            if word is not None:
                words.append(word)
            hypothesis = self._finished[history]
        return words[::-1]

    def _history(self, hypothesis: int) -> int:
        """The history of hypotheses that start after the last word of this one."""
        if hypothesis not in self._histories:
            self._histories[hypothesis] = len(self._finished)
            self._finished.append(hypothesis)
        return self._histories[hypothesis]

    def _extensions(self, node: int, frame: list[float]) -> list[tuple[int, int, float]]:
        """Extensions of a node: (column, next node, probability times change of weight)."""
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
