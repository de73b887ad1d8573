"""Metrics of the other stages: computed by hand where possible, and equal on one rank and two."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from muomni.data.shards.manifest import find_datasets
from muomni.data.shards.source import Source
from muomni.evaluation.metrics import generated_answers
from muomni.evaluation.metrics.error_rates import ErrorCounts
from muomni.evaluation.metrics.tally import Tally, ratio
from muomni.evaluation.speech import speech_errors
from muomni.evaluation.speech.recognizer import Transcription
from muomni.evaluation.stages import talker as talker_metrics
from muomni.inference.answer import Answer
from tests import conversations
from tests.corpora import write_dataset
from tests.evaluation.runs import answers, evaluate
from tests.media_corpora import speech_sample
from tests.ranks import RankPool

RUNS = {
    "audio_encoder": ("perception_run", "val"),
    "vision_encoder": ("perception_run", "val"),
    "codec": ("perception_run", "val"),
    "talker": ("omni_runs", "val"),
    "sft": ("omni_runs", "test"),
}


def arguments_of(stage: str, request: pytest.FixtureRequest) -> dict[str, Any]:
    fixture, split = RUNS[stage]
    run = request.getfixturevalue(fixture)
    run = run / "tuned" if fixture == "omni_runs" else run
    return {"stage": stage, "run": run, "split": split}


@pytest.mark.parametrize("stage", sorted(RUNS))
def test_metrics_do_not_depend_on_number_of_ranks(
    stage: str, request: pytest.FixtureRequest, two_ranks: RankPool
) -> None:
    arguments = {**arguments_of(stage, request), "max_samples": 11}
    alone = evaluate(**arguments)
    for result in two_ranks.run(evaluate, timeout_s=300.0, **arguments):
        assert result["metrics"] == pytest.approx(alone["metrics"], rel=1e-5, nan_ok=True)
        assert result["baselines"].keys() == alone["baselines"].keys()
        for name, baseline in alone["baselines"].items():
            assert result["baselines"][name]["value"] == pytest.approx(baseline["value"], rel=1e-6)
            assert result["baselines"][name]["name"] == baseline["name"]
        assert result["num_samples"] == alone["num_samples"]


def test_answers_are_in_sample_order_on_any_number_of_ranks(
    omni_runs: Path, two_ranks: RankPool
) -> None:
    arguments = {"stage": "sft", "run": omni_runs / "tuned", "max_samples": 5}
    alone = answers(**arguments)
    assert [answer["index"] for answer in alone] == [0, 1, 2, 3, 4]
    assert {"key", "kind", "reference", "answer", "is_exact"} <= alone[0].keys()
    assert two_ranks.run(answers, timeout_s=300.0, **arguments) == [alone, alone]


def test_every_stage_reports_its_metrics(request: pytest.FixtureRequest) -> None:
    expected = {
        "audio_encoder": {"wer", "wer_with_word_list", "cer", "infeasible_fraction"},
        "vision_encoder": {"text_recall@1", "image_recall@10", "zero_shot_top1"},
        "codec": {"mel_l1", "code_use_fraction.1", "code_perplexity.0", "wer_of_decoded_speech"},
        "talker": {"code_accuracy.1", "stop_balanced_accuracy", "duration_ratio"},
        "sft": {"answer_loss", "exact_match", "image_swap_gap", "wer.transcribe"},
    }
    for stage, names in expected.items():
        result = evaluate(**arguments_of(stage, request), max_samples=10)
        assert names <= result["metrics"].keys(), stage
        assert result["baselines"].keys() <= result["metrics"].keys()


def test_no_wer_of_generated_speech_without_audio_encoder(
    perception_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "codec").symlink_to(perception_run / "codec")
    result = evaluate(stage="codec", run=tmp_path, split="val")
    assert not [name for name in result["metrics"] if "wer" in name]
    assert "mel_l1" in result["metrics"]
    assert "skipping WER of generated speech: no export of stage audio_encoder" in caplog.text


def test_codec_wer_uses_word_list_and_cer_uses_greedy_decoding(
    perception_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recognizer with a constant output has the error rates of that constant transcript."""
    fake = SimpleNamespace(
        transcribe=lambda waveform: Transcription(greedy="ca door", words="cat"),
        export=SimpleNamespace(path=perception_run / "audio_encoder" / "export", digest="0"),
    )
    monkeypatch.setattr(speech_errors, "find_recognizer", lambda runs, device, transcripts: fake)
    metrics = evaluate(stage="codec", run=perception_run, split="val")["metrics"]
    expected = ErrorCounts(())
    root = perception_run.parent
    for task in ("speech", "tts"):
        source = Source(find_datasets(root, task), "val")
        for index in range(len(source)):
            expected.add(source.read(index)["txt"].decode(), wer="cat", cer="ca door")
    rates = expected.reduce()
    for kind in ("wer", "cer"):
        assert metrics[f"{kind}_of_decoded_speech"] == pytest.approx(rates.rate(kind, kind))
        assert metrics[f"{kind}_of_originals"] == pytest.approx(rates.rate(kind, kind))


@pytest.mark.parametrize("stage", ["audio_encoder", "codec"])
def test_broken_audio_clips_are_skipped_and_counted(
    stage: str, perception_run: Path, tmp_path: Path
) -> None:
    key, members, cost = speech_sample("broken", ["cat"], seed=0)
    broken = (key, [("flac", b"no sound"), *members[1:]], cost)
    intact = speech_sample("whole", ["door", "cat"], seed=1)
    write_dataset(tmp_path / "clips", "speech", {"test": [broken, intact]})
    write_dataset(tmp_path / "more", "tts", {"test": [speech_sample("x", ["river"], seed=2)]})
    result = evaluate(stage=stage, run=perception_run, data=tmp_path)
    assert result["num_dropped"] == 1
    assert all(value is not None for value in result["metrics"].values())


def test_stop_accuracy_is_balanced() -> None:
    """Two audio clips of 2 and 1 frames; the first stops too late, the second on time."""
    stop, num_codes = 2, 2
    predicted = torch.tensor([[0, 1, 0], [1, stop, stop]])
    base = torch.nn.functional.one_hot(predicted, num_codes + 1).float()
    talker = lambda *inputs: SimpleNamespace(base=base)  # noqa: E731
    talker.stop = stop  # type: ignore[attr-defined]
    batch = {
        "text_ids": torch.zeros(2, 1),
        "character_ids": torch.zeros(2, 1),
        "text_mask": torch.ones(2, 1),
        "codes": torch.zeros(2, 2, 1),
        "code_mask": torch.tensor([[True, True], [True, False]]),
    }
    tally = Tally()
    talker_metrics._add_stops(tally, talker, batch)  # type: ignore[arg-type]
    assert {name: pair.tolist() for name, pair in tally.reduce().items()} == {
        "stop": [1.0, 2.0],
        "continue": [3.0, 3.0],
    }
    metric = talker_metrics._stop_metric(tally)
    assert (metric.value, metric.baseline, metric.is_better) == (0.75, 0.5, True)


def _always(text: str | None) -> Any:
    """A model that always answers `text`, or the reference if it is None."""

    def generate(assistant: Any, queries: Iterator[Any]) -> Iterator[tuple[Any, Answer]]:
        for query in queries:
            answer = query.task.text if text is None else text
            ids = assistant.tokenizer.encode(answer)
            width = assistant.model.config.thinker.hidden_size
            yield query, Answer(answer, ids, torch.zeros(1, len(ids), width), True)

    return generate


def test_reference_answers_are_exact_and_constant_answers_match_baseline(
    omni_runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: dict[str, Any] = {"stage": "sft", "run": omni_runs / "tuned"}
    monkeypatch.setattr(generated_answers, "_generate", _always(None))
    result = evaluate(**arguments)
    kinds = {"caption", "transcribe", "speak"}
    exact = {name: result["metrics"][f"exact_match.{name}"] for name in kinds}
    assert exact == dict.fromkeys(kinds, 1.0)
    assert result["metrics"]["token_f1.caption"] == 1.0
    assert result["metrics"]["wer.transcribe"] == 0.0
    baselines = {name: entry["value"] for name, entry in result["baselines"].items()}
    # Four colors, three tones, and three words, equally often: a constant is correct for one of each.
    assert baselines["exact_match.caption"] == pytest.approx(1 / 4)
    assert baselines["exact_match.transcribe"] == pytest.approx(1 / 3)
    assert baselines["exact_match"] == pytest.approx(3 / 10)
    assert baselines["wer.transcribe"] == pytest.approx(2 / 3)

    monkeypatch.setattr(generated_answers, "_generate", _always("blue"))
    result = evaluate(**arguments)
    assert result["metrics"]["exact_match.caption"] == baselines["exact_match.caption"]
    assert result["baselines"]["exact_match.caption"]["is_beaten"] is False


def test_spoken_samples_are_the_first_with_spoken_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first samples of the split may have none."""
    makers = (conversations.tone_sample, conversations.speech_sample)
    written, spoken = ({"__key__": "s", **dict(make("s", "low")[1])} for make in makers)
    broken = {"__key__": "b", "json": b"{"}
    samples = [written, spoken, broken, written, spoken, spoken]
    source = SimpleNamespace(read=samples.__getitem__)
    context: Any = SimpleNamespace(num_samples=len(samples), source=source)
    assert generated_answers._spoken_samples(context) == {1, 4, 5}
    monkeypatch.setattr(generated_answers, "MAX_SPOKEN_SAMPLES", 2)
    assert generated_answers._spoken_samples(context) == {1, 4}


def test_number_of_spoken_answers_is_limited(
    omni_runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoken: set[int] = set()
    add_speech = generated_answers._add_speech

    def recording(errors: Any, assistant: Any, query: Any, answer: Any) -> None:
        spoken.add(query.index)
        add_speech(errors, assistant, query, answer)

    monkeypatch.setattr(generated_answers, "_add_speech", recording)
    monkeypatch.setattr(generated_answers, "MAX_SPOKEN_SAMPLES", 1)
    evaluate(stage="sft", run=omni_runs / "tuned")
    assert len(spoken) == 1


def test_answer_loss_baseline_is_unigram_model_of_training_answers(
    omni_runs: Path,
) -> None:
    """Every answer is one word; word frequencies are the same in training and test."""
    result = evaluate(stage="sft", run=omni_runs / "tuned")
    baselines = {name: entry["value"] for name, entry in result["baselines"].items()}
    assert 0 < baselines["answer_loss"] < result["metrics"]["answer_loss"]
    # A uniform model has log(vocabulary) = 5.8.
    assert result["metrics"]["answer_loss"] < 7
    assert baselines["image_swap_gap"] == baselines["audio_swap_gap"] == 0.0


def test_duration_ratio_is_a_ratio_of_sums() -> None:
    tally = Tally()
    tally.add("duration", torch.tensor([1.0, 2.0]))
    tally.add("duration", torch.tensor([3.0, 2.0]))
    assert ratio(tally.reduce()["duration"]) == 1.0
