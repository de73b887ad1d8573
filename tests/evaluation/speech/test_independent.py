"""The language model of the independent recognizer, and corpora that it does not judge."""

import re
from collections import Counter, defaultdict

import pytest

from muomni.evaluation.speech import independent
from muomni.evaluation.speech.independent import bigram_model, find_independent


def test_probabilities_of_all_followers_of_a_word_sum_to_one() -> None:
    model = bigram_model(Counter({"one two": 3, "two two one": 1, "x one": 1}), {"one", "two"})
    lines = [line.split() for line in model.splitlines()]
    one = {word: (float(p), float(b)) for p, word, b in (x for x in lines if _is_number(x, 3, 2))}
    two: defaultdict[str, dict[str, float]] = defaultdict(dict)
    for probability, first, second in (x for x in lines if _is_number(x, 3, 0)):
        if not re.fullmatch(r"-?[0-9.]+", second):
            two[first][second] = float(probability)
    assert set(one) == {"<s>", "one", "two", "</s>"}  # x has no pronunciation
    for first, followers in two.items():
        others = [10 ** (p + one[first][1]) for w, (p, _) in one.items() if w not in followers]
        assert sum(10**p for p in followers.values()) + sum(others) == pytest.approx(1, abs=1e-3)
    assert two["one"]["two"] > two["two"]["two"]


def _is_number(fields: list[str], count: int, at: int) -> bool:
    return len(fields) == count and re.fullmatch(r"-?[0-9.]+", fields[at]) is not None


def test_without_package_there_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(independent.importlib.util, "find_spec", lambda name: None)
    assert find_independent(Counter({"one": 1})) is None
    assert "install the extra 'judge'" in caplog.text


def test_other_languages_are_not_judged(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("pocketsphinx")
    assert find_independent(Counter({"zwei drei": 1})) is None
    assert "English words only" in caplog.text
