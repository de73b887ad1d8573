from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from muomni.distributed.discovery import discover
from muomni.models.speech.codec import mean_mel_l1
from muomni.models.speech.mel import length_mask
from muomni.models.speech.quantizer import code_perplexity
from muomni.training.session import Request, Session, prepare, seed_everything
from muomni.training.stages.codec import CodecTask
from muomni.training.validation import SplitBatches, validate
from tests.parity.reference import reference_curve
from tests.ranks import RankPool
from tests.training.runs import train
from tests.training.stages.curves import stage_config

CPU = torch.device("cpu")


def open_session(data: Path, changes: dict[str, object] | None = None) -> Session:
    config = stage_config("codec", data, changes)
    return prepare(Request(config, Path(), Path(), {}, "never"), discover({}))


def _train_and_return_codebooks(**request: object) -> torch.Tensor:
    """Run on this rank and return the codebooks that it ended with."""
    codebooks = []
    original = CodecTask.forward

    def forward(self: CodecTask, batch: dict[str, torch.Tensor]) -> object:
        codebooks[:] = [self.codec.quantizer.codebooks]
        return original(self, batch)

    CodecTask.forward = forward  # type: ignore[method-assign]
    try:
        train(**request)  # type: ignore[arg-type]
    finally:
        CodecTask.forward = original  # type: ignore[method-assign]
    return codebooks[0].clone()


@pytest.mark.parametrize("zero", ["zero1", "zero3"])
def test_all_ranks_end_with_the_codebooks_of_one_process(
    zero: str, media_data: Path, tmp_path: Path, two_ranks: RankPool
) -> None:
    config = stage_config("codec", media_data)
    first, second = two_ranks.run(
        _train_and_return_codebooks, config=config, run=tmp_path, zero=zero
    )
    assert torch.equal(first, second) and first.abs().sum() > 0
    _, task = reference_curve(config)
    assert isinstance(task, CodecTask)
    torch.testing.assert_close(first, task.codec.quantizer.codebooks, rtol=0.01, atol=2e-3)
    exported = load_file(tmp_path / "codec" / "export" / "model.safetensors")
    assert torch.equal(exported["quantizer.codebooks"], first)


def test_training_updates_parameters_and_codebooks_and_evaluation_does_not(
    media_data: Path,
) -> None:
    session = open_session(media_data)
    seed_everything(session.request.config.seed)
    before = session.stage.build().state_dict()
    _, task = reference_curve(session.request.config)
    after = {name: tensor.clone() for name, tensor in task.state_dict().items()}
    still = [name for name in before if torch.equal(before[name], after[name])]
    assert still == []
    assert session.val is not None
    with torch.no_grad():
        validate(session.stage, task.eval(), SplitBatches(session.stage, session.val, CPU))
    assert all(torch.equal(after[name], tensor) for name, tensor in task.state_dict().items())


def test_loss_denominators_match_the_logs(media_data: Path) -> None:
    stage = open_session(media_data).stage
    task, view = stage.build(), stage.view()
    source = open_session(media_data).planned.source
    crops = [view.example(source.read(i), None) for i in range(3)]
    for samples in ([[crop] for crop in crops], [[crops[0]], []], []):
        batch = view.collate(samples)
        output = task(batch)
        for term, weight in stage.loss_denominators(batch).items():
            assert output.logs[term][1] == weight
            assert torch.isfinite(output.losses[term])
    assert set(stage.loss_weights()) == set(stage.terms)


def test_it_beats_the_mean_spectrum_on_unseen_audio_clips_and_uses_its_codes(
    media_data: Path,
) -> None:
    changes = {
        "batch": {"global_samples": 8, "micro_samples": 8},
        "optim": {"lr": 4e-3},
        "training": {"max_steps": 200},
        "model": {"hidden_size": 48, "latent_size": 16, "codebook_size": 16},
    }
    session = open_session(media_data, changes)
    stage, val = session.stage, session.val
    _, task = reference_curve(session.request.config)
    assert val is not None and isinstance(task, CodecTask)
    batches = [batch for _, batch in SplitBatches(stage, val, CPU)]
    mels = [task.codec.log_mel(batch["waveform"], batch["lengths"]) for batch in batches]
    mean = torch.cat([mel[length_mask(lengths, mel.shape[1])] for mel, lengths in mels]).mean(0)
    baselines = [mean_mel_l1(mel, lengths, mean) for mel, lengths in mels]
    total, weight = torch.stack(baselines).sum(dim=0)
    with torch.no_grad():
        metrics = validate(stage, task.eval(), SplitBatches(stage, val, CPU))
    assert metrics["mel_l1"] < 0.75 * float(total / weight)
    assert float(code_perplexity(task.codec.quantizer.ema_counts).min()) > 4


def test_a_run_validates_under_zero3(media_data: Path, tmp_path: Path, two_ranks: RankPool) -> None:
    config = stage_config("codec", media_data, {"training": {"max_steps": 2}})
    result = two_ranks.run(train, config=config, run=tmp_path, zero="zero3")[0]
    assert result["val/mel_l1"] > 0
