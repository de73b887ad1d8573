"""Word and character errors by hand, and the best constant transcript."""

import math

import pytest

from muomni.evaluation.metrics.transcripts import TranscriptErrors


def test_errors_are_summed_before_the_ratio() -> None:
    errors = TranscriptErrors(())
    errors.add("one two three four", heard="one too three")  # a substitution and a deletion of 4
    errors.add("five", heard="five six seven")  # two insertions of 1
    rates = errors.reduce()
    assert rates.rate("wer", "heard") == pytest.approx(4 / 5)


def test_capitals_and_punctuation_are_not_heard() -> None:
    errors = TranscriptErrors(())
    errors.add("Don't stop, now!", heard="don't stop now")
    rates = errors.reduce()
    assert rates.rate("wer", "heard") == rates.rate("cer", "heard") == 0.0


def test_references_without_words_do_not_count() -> None:
    errors = TranscriptErrors(())
    errors.add("...", heard="anything")
    assert math.isnan(errors.reduce().rate("wer", "heard"))


def test_the_baseline_is_the_better_of_the_constant_transcripts() -> None:
    errors = TranscriptErrors(("", "yes"))
    for text in ("yes", "yes", "no way"):
        errors.add(text, heard=text)
    rates = errors.reduce()
    metric = rates.metric("wer", "wer", rates.rate("wer", "heard"))
    # "yes" is right twice and gets two errors of four words; the empty one gets all four.
    assert (metric.value, metric.baseline, metric.baseline_name) == (0.0, 0.5, "always 'yes'")
    assert metric.is_better
    # By characters: three of "no way" are missing and three are others, of 3 + 3 + 6.
    assert rates.metric("cer", "cer", 0.0).baseline == pytest.approx(6 / 12)


def test_the_empty_transcript_may_be_the_best_constant() -> None:
    errors = TranscriptErrors(("", "a long and wrong transcript"))
    errors.add("yes", heard="")
    metric = errors.reduce().metric("wer", "wer", 1.0)
    assert (metric.baseline, metric.baseline_name) == (1.0, "empty transcript")
    assert metric.is_better is False
