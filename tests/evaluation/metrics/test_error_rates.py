"""Error rates computed by hand, and the best constant transcript."""

import math

import pytest

from muomni.evaluation.metrics.error_rates import ErrorCounts


def test_errors_are_summed_over_samples_before_dividing() -> None:
    errors = ErrorCounts(())
    errors.add(
        "one two three four", transcript="one too three"
    )  # a substitution and a deletion of 4
    errors.add("five", transcript="five six seven")  # two insertions of 1
    rates = errors.reduce()
    assert rates.rate("wer", "transcript") == pytest.approx(4 / 5)


def test_case_and_punctuation_are_ignored() -> None:
    errors = ErrorCounts(())
    errors.add("Don't stop, now!", transcript="don't stop now")
    rates = errors.reduce()
    assert rates.rate("wer", "transcript") == rates.rate("cer", "transcript") == 0.0


def test_references_without_words_are_ignored() -> None:
    errors = ErrorCounts(())
    errors.add("...", transcript="anything")
    assert math.isnan(errors.reduce().rate("wer", "transcript"))


def test_baseline_is_best_constant_transcript() -> None:
    errors = ErrorCounts(("", "yes"))
    for text in ("yes", "yes", "no way"):
        errors.add(text, transcript=text)
    rates = errors.reduce()
    metric = rates.metric("wer", "wer", rates.rate("wer", "transcript"))
    # "yes" is correct twice and makes two errors in four words; the empty transcript makes four.
    assert (metric.value, metric.baseline, metric.baseline_name) == (0.0, 0.5, "always 'yes'")
    assert metric.is_better
    # Characters of "no way": three deletions and three substitutions, out of 3 + 3 + 6.
    assert rates.metric("cer", "cer", 0.0).baseline == pytest.approx(6 / 12)


def test_empty_transcript_can_be_best_constant() -> None:
    errors = ErrorCounts(("", "a long and wrong transcript"))
    errors.add("yes", transcript="")
    metric = errors.reduce().metric("wer", "wer", 1.0)
    assert (metric.baseline, metric.baseline_name) == (1.0, "empty transcript")
    assert metric.is_better is False
