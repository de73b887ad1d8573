import json
from pathlib import Path

import numpy as np
import pytest
import torch

from muomni.data.sampling.plan import cover
from muomni.data.views.speech import Utterance
from muomni.distributed.discovery import discover
from muomni.training.session import Request, Session, prepare, seed_everything
from muomni.training.stages.audio_encoder import AudioEncoderStage, error_sums
from muomni.training.validation import SplitBatches, validate
from tests.media_corpora import say
from tests.parity.reference import reference_curve
from tests.ranks import RankPool
from tests.training.runs import train
from tests.training.stages.curves import stage_config

CPU = torch.device("cpu")


def open_session(data: Path, changes: dict[str, object] | None = None) -> Session:
    config = stage_config("audio_encoder", data, changes)
    return prepare(Request(config, Path(), Path(), {}, "never"), discover({}))


def stage_of(session: Session) -> AudioEncoderStage:
    assert isinstance(session.stage, AudioEncoderStage)
    return session.stage


def batch_of(stage: AudioEncoderStage, *pairs: tuple[list[str], str]) -> dict[str, torch.Tensor]:
    """A batch of synthesized words, each with a transcript that may differ."""
    view = stage.view()
    utterances = []
    for words, text in pairs:
        labels = view.units.encode(text)
        utterances.append(Utterance(say(words), labels, 0))
    return view.collate([[utterance] for utterance in utterances])


def test_loss_denominators_and_infeasible_samples(
    media_data: Path,
) -> None:
    stage = stage_of(open_session(media_data))
    seed_everything(0)
    task = stage.build()
    # 0.24 s are 6 frames: "cat" fits with its word mark, a sentence does not.
    batch = batch_of(stage, (["cat"], "cat"), (["cat"], "the old river door"), (["old"], "old"))
    output = task(batch)
    loss, infeasible = output.logs["loss"], output.logs["infeasible"]
    assert infeasible.tolist() == [1, 3]
    assert loss[1] == stage.loss_denominators(batch)["loss"] == 4 + 4
    assert torch.isfinite(output.losses["loss"])
    fitting = task(batch_of(stage, (["cat"], "cat"), (["old"], "old")))
    assert stage.metrics({"infeasible": 1 / 3})["infeasible_fraction"] == pytest.approx(1 / 3)
    assert fitting.logs["infeasible"].tolist() == [0, 2]


def test_a_batch_of_infeasible_samples_has_no_gradient_and_no_weight(media_data: Path) -> None:
    stage = stage_of(open_session(media_data))
    task = stage.build()
    for batch in (stage.view().collate([]), batch_of(stage, (["cat"], "the old river door"))):
        output = task(batch)
        output.losses["loss"].backward()
        assert (
            float(output.losses["loss"].detach())
            == 0
            == float(stage.loss_denominators(batch)["loss"])
        )
        gradients = [p.grad for p in task.parameters() if p.grad is not None]
        assert gradients and all(float(g.abs().sum()) == 0 for g in gradients)


def test_error_sums_count_edits_over_all_pairs() -> None:
    sums = error_sums(["the cat", "a door", ""], ["the car", "door door", "noise"], CPU)
    assert sums["wer"].tolist() == [2, 4]
    assert sums["cer"].tolist() == [1 + 4, 7 + 6]
    assert error_sums([], [], CPU)["wer"].tolist() == [0, 0]


def test_spec_augment_changes_training_and_not_evaluation(media_data: Path) -> None:
    off = stage_of(open_session(media_data, {"options": {"spec_augment": None}}))
    on = stage_of(open_session(media_data))
    batch = {**batch_of(on, (["cat", "door"], "cat door")), "seeds": torch.tensor([5])}
    losses = {}
    for name, stage in (("off", off), ("on", on)):
        seed_everything(0)
        task = stage.build()
        losses[name] = float(task(batch).losses["loss"].detach())
        losses[f"{name} in evaluation"] = float(task.eval()(batch).losses["loss"].detach())
        other = task.train()({**batch, "seeds": torch.tensor([6])})
        assert (float(other.losses["loss"].detach()) != losses[name]) == (name == "on")
    assert losses["on"] != losses["off"]
    assert losses["on in evaluation"] == losses["off in evaluation"] == losses["off"]


def test_it_learns_to_recognize_unseen_audio_clips_of_known_words(media_data: Path) -> None:
    """It leaves the phase in which CTC predicts only blanks, and then gets words right."""
    changes = {
        "batch": {"global_seconds": 8, "micro_seconds": 4},
        "optim": {"lr": 1e-2},
        "training": {"max_steps": 160},
        "model": {"hidden_size": 64, "num_heads": 4, "intermediate_size": 128},
        "options": {"perturb_speed": False, "spec_augment": None, "num_merges": None},
    }
    session = open_session(media_data, changes)
    curve, task = reference_curve(session.request.config)
    assert session.val is not None
    batches = SplitBatches(session.stage, session.val, CPU)
    with torch.no_grad():
        metrics = validate(session.stage, task.eval(), batches)
    assert curve.losses[-1] < 0.5 * curve.losses[0]
    assert metrics["wer"] < 0.7 and metrics["cer"] < 0.5
    matching = task(batch_of(stage_of(session), (["cat"], "cat")))
    swapped = task(batch_of(stage_of(session), (["river"], "cat")))
    assert swapped.losses["loss"] > matching.losses["loss"] + 1


def test_a_run_reports_errors(media_data: Path, tmp_path: Path, two_ranks: RankPool) -> None:
    config = stage_config("audio_encoder", media_data, {"training": {"max_steps": 2}})
    result = two_ranks.run(train, config=config, run=tmp_path)[0]
    assert {"val/wer", "val/cer", "val/infeasible_fraction"} <= result.keys()
    folder = tmp_path / "audio_encoder"
    assert json.loads((folder / "export" / "config.json").read_text())["hidden_size"] == 32
    assert result["curve"][0]["infeasible_fraction"] >= 0


def test_micro_batches_respect_micro_seconds(media_data: Path) -> None:
    session = open_session(media_data)
    assert session.planned.plan.batching.micro_size == 200
    lengths = session.planned.plan.lengths.all()
    for batch in cover(np.arange(len(lengths)), lengths, session.planned.plan.batching):
        assert len(batch.ids) * max(int(lengths[i]) for i in batch.ids) <= 200
