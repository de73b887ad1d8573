"""Stage sft: loss curves across layouts, trained and frozen parts, and errors."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from muomni.checkpoint.export import find_exports
from muomni.config.models import OmniConfig, TalkerConfig
from muomni.data.loading.loader import PlannedDataset
from muomni.data.text.tokenizer import Tokenizer
from muomni.data.views.base import Batch
from muomni.distributed.discovery import discover
from muomni.errors import ConfigError, UpstreamError
from muomni.models.omni import OmniModel
from muomni.models.speech.talker import Talker
from muomni.training.session import Request, Session, prepare
from muomni.training.stages.sft.parts import freeze, load_parts
from muomni.training.stages.sft.stage import SftStage
from muomni.training.stages.sft.task import OmniTask
from muomni.training.validation import SplitBatches, validate
from tests.conversations import omni_config, write_upstream
from tests.corpora import write_tokenizer
from tests.parity.reference import reference_curve
from tests.ranks import RankPool
from tests.training.runs import train
from tests.training.stages.sft.omni_runs import omni_run, write_root

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_root(tmp_path_factory.mktemp("sft"))


def open_session(
    root: Path, changes: dict[str, Any] | None = None, run: Path | None = None
) -> Session:
    engine_json: dict[str, Any] = {"zero_optimization": {"stage": 0}}
    config = omni_run("sft", root, changes)
    request = Request(config, root / "none", run or root / "run", engine_json, "never")
    return prepare(request, discover({}))


# -- layouts -------------------------------------------------------------------------------------


def test_ranks_of_a_step_often_have_different_modalities(root: Path) -> None:
    """The layout tests below rely on this: images on one rank, audio clips on the other."""
    session = open_session(root)
    dataset = PlannedDataset(session.planned.source, session.stage.view(), 0)

    def kind(batch: Batch) -> tuple[bool, bool, bool]:
        has_image, has_audio = bool(batch["sees_image"].any()), bool(batch["sees_audio"].any())
        return has_image, has_audio, bool(batch["speech_text_mask"].any())

    pairs = set()
    for step in range(8):
        kinds = [
            kind(dataset[micro].tensors) for micro in session.planned.plan.rank_step(step, 0, 1)
        ]
        assert len(kinds) == 4 and all(sum(k) == 1 for k in kinds)
        pairs |= {(kinds[0], kinds[1]), (kinds[2], kinds[3])}
    assert sum(one != other for one, other in pairs) >= 4


@pytest.mark.parametrize("zero", ["zero1", "zero3"])
def test_frozen_parts_do_not_change_on_any_layout(
    zero: str, root: Path, tmp_path: Path, two_ranks: RankPool
) -> None:
    changes = {"options": {"freeze": ["vision_encoder.*", "audio_encoder.*", "talker.*"]}}
    config = omni_run("sft", root, changes)
    result = two_ranks.run(train, config=config, run=tmp_path, zero=zero, upstream=root / "run")[0]
    expected, _ = reference_curve(config, root / "run")
    assert result["losses"] == pytest.approx(expected.losses, abs=1e-4)
    assert {"val/exact_match", "val/image_answer_loss", "val/speech_accuracy_1"} <= result.keys()
    exported = load_file(tmp_path / "sft" / "export" / WEIGHTS)
    changed = parts_that_changed(exported, root)
    assert changed == {"thinker"}


def test_a_resumed_run_repeats_the_losses(root: Path, tmp_path: Path, two_ranks: RankPool) -> None:
    config = omni_run("sft", root, {"training": {"save_every": 5}})
    full, resumed = tmp_path / "full", tmp_path / "resumed"
    common = {"config": config, "zero": "zero2", "upstream": root / "run"}
    first = two_ranks.run(train, run=full, **common)[0]
    checkpoint = full / "sft" / "checkpoints" / "step_00000005"
    second = two_ranks.run(train, run=resumed, resume=str(checkpoint), **common)[0]
    assert second["losses"] == first["losses"][5:]


# -- what is trained and exported ------------------------------------------------------------------


def parts_that_changed(exported: dict[str, torch.Tensor], root: Path) -> set[str]:
    """Parts of an sft export whose weights differ from those of their own stage."""
    changed = set()
    prefixes = {
        "thinker": ("thinker.", ""), "audio_encoder": ("audio_encoder.", ""),
        "vision_encoder": ("vision_encoder.", "vision."), "codec": ("codec.", ""),
        "talker": ("talker.", ""),
    }  # fmt: skip
    for stage, (ours, theirs) in prefixes.items():
        before = load_file(root / "run" / stage / "export" / WEIGHTS)
        found = {n.removeprefix(ours): t for n, t in exported.items() if n.startswith(ours)}
        assert found, stage
        for name, tensor in found.items():
            if name != "thinker_proj.weight" and not torch.equal(before[theirs + name], tensor):
                changed.add(stage)
    return changed


def test_the_export_is_the_complete_trained_model(
    root: Path, tmp_path: Path, one_rank: RankPool
) -> None:
    """Loaded with its config alone, it has the validation metrics of the training run."""
    result = one_rank.run(train, config=omni_run("sft", root), run=tmp_path, upstream=root / "run")[
        0
    ]
    folder = tmp_path / "sft" / "export"
    exported = load_file(folder / WEIGHTS)
    trained = {"thinker", "audio_encoder", "vision_encoder", "talker"}
    assert parts_that_changed(exported, root) == trained  # the codec is unchanged
    config = OmniConfig.model_validate_json((folder / "config.json").read_text())
    model = OmniModel(config, with_codec=True)
    model.load_state_dict(exported, strict=True)
    session = open_session(root)
    stage = session.stage
    task = stage.build()
    stage.load_export(task, find_exports(tmp_path, ("sft",))["sft"])
    assert session.val is not None
    with torch.no_grad():
        batches = SplitBatches(stage, session.val, torch.device("cpu"))
        again = validate(stage, task.eval(), batches)
    for name, value in again.items():
        assert result[f"val/{name}"] == pytest.approx(value, abs=1e-4), name
    untuned = stage.build().eval()
    with torch.no_grad():
        before = validate(stage, untuned, SplitBatches(stage, session.val, torch.device("cpu")))
    assert before["answer_loss"] > again["answer_loss"] + 0.1


def test_the_talker_starts_unchanged(root: Path) -> None:
    """The new projection of the Thinker's states is zero, so the first loss is the same."""
    session = open_session(root)
    stage = session.stage
    task = stage.build().eval()
    export = session.stage.context.upstream["talker"]
    alone = Talker(export.config(TalkerConfig))
    export.load_into(alone)
    batch = stage.prepare(
        stage.view().collate([[stage.view().example(session.planned.source.read(7), None)]])
    )
    with torch.no_grad():
        joined = task(batch).logs["speech_loss"]
        codes, mask = batch["codes"], batch["code_mask"]
        text = (batch[f"speech_{key}"] for key in ("text_ids", "character_ids", "text_mask"))
        output = alone(*text, codes, mask)
        expected = alone.loss(output, codes, mask)
    assert float(joined[1]) == float(expected.weight) > 0
    torch.testing.assert_close(joined[0], expected.total)


def audio_batch(session: Session, seed: int | None = None) -> Batch:
    """A batch of the first training sample with an audio clip."""
    view, source = session.stage.view(), session.planned.source
    for index in range(len(source)):
        random = None if seed is None else np.random.default_rng(seed)
        example = view.example(source.read(index), random)
        if example.audios:
            return session.stage.prepare(view.collate([[example]]))
    raise AssertionError("no sample has an audio clip")


def test_audio_features_start_as_ctc_embeddings(root: Path) -> None:
    """The new projection of the encoder's states is zero, so only CTC embeddings remain."""
    session = open_session(root)
    task, batch = session.stage.build().eval(), audio_batch(session)
    assert isinstance(task, OmniTask)
    omni = task.omni
    with torch.no_grad():
        states, _ = omni.audio_encoder(batch["audios"], batch["audio_lengths"])
        posteriors = omni.audio_encoder.ctc_logits(states).softmax(-1)
        features = omni.audio_features(batch["audios"], batch["audio_lengths"])
    first = posteriors[0, : omni.config.audio_stack].sum(0)
    torch.testing.assert_close(features[0, 0], first @ omni.thinker.embed_tokens.weight)


def test_audio_clips_are_masked_in_training_only_by_their_seeds(
    root: Path,
) -> None:
    session = open_session(root)
    masked = session.stage.build()
    assert isinstance(masked, OmniTask) and masked.augmentation is not None
    plain = OmniTask(masked.omni.config)
    plain.load_state_dict(masked.state_dict())

    @torch.no_grad()
    def loss(task: OmniTask, seed: int | None) -> float:
        return float(task(audio_batch(session, seed)).losses["answer"])

    unmasked = loss(plain.train(), 1)
    assert unmasked == loss(plain, 2) == loss(masked.eval(), None)
    assert unmasked != loss(masked.train(), 1) == loss(masked, 1) != loss(masked, 2)


def test_the_talker_can_ignore_the_thinker(root: Path) -> None:
    session = open_session(root, {"options": {"talker_sees_thinker": False}})
    config = session.stage.model_config()
    assert isinstance(config, OmniConfig) and config.talker is not None
    assert config.talker.thinker_hidden_size is None
    assert len(reference_curve(session.stage.config, root / "run")[0].losses) == 8


def test_a_short_run_learns_answers_and_stops_speech(root: Path) -> None:
    """After a short run, held-out answers are correct, and a wrong image makes them unlikely."""
    changes = {
        "training": {"max_steps": 160},
        "batch": {"seq_len": 120, "global_tokens": 120},
        "optim": {"lr": 5e-3},
    }
    _, task = reference_curve(omni_run("sft", root, changes), root / "run")
    session = open_session(root, changes)
    assert session.val is not None
    with torch.no_grad():
        batches = SplitBatches(session.stage, session.val, torch.device("cpu"))
        metrics = validate(session.stage, task.eval(), batches)
    assert metrics["exact_match"] >= 0.7
    assert metrics["image_swap_gap"] > 0.3 and "audio_swap_gap" in metrics
    assert metrics["speech_stop_accuracy"] > 0.8


# -- freezing --------------------------------------------------------------------------------------


def test_freeze_affects_matching_parameters_only(tokenizer: Tokenizer) -> None:
    model = OmniModel(omni_config(tokenizer))
    freeze(model, ("vision_encoder.*", "thinker.stack.blocks.0.*"))
    named = ("vision_encoder.", "thinker.stack.blocks.0.")
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad is not name.startswith(named), name


@pytest.mark.parametrize("is_used", [True, False])
def test_an_unused_ctc_head_is_frozen(tokenizer: Tokenizer, is_used: bool) -> None:
    model = OmniModel(omni_config(tokenizer, ctc_embeddings=is_used))
    freeze(model, ())
    assert all(p.requires_grad is is_used for p in model.audio_encoder.ctc_head.parameters())


def test_an_lr_scale_without_match_is_rejected(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"lr_scales pattern 'taker\.\*' matches no parameter"):
        open_session(root, {"optim": {"lr_scales": {"taker.*": 0.5}}})


def test_a_freeze_pattern_without_match_is_rejected_with_a_suggestion(root: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"matches no parameter \(did you mean 'vision_encoder\.\*'"
    ):
        open_session(root, {"options": {"freeze": ["vision_encodr.*"]}})


def test_freezing_everything_is_rejected(root: Path) -> None:
    with pytest.raises(ConfigError, match="freezes all parameters"):
        open_session(root, {"options": {"freeze": ["*"]}})


# -- upstream exports ------------------------------------------------------------------------------


def test_missing_exports_are_listed_with_their_commands(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "run" / "thinker", tmp_path / "thinker")
    with pytest.raises(UpstreamError) as caught:
        open_session(root, run=tmp_path)
    message = str(caught.value)
    assert "no export of audio_encoder, vision_encoder, codec, talker" in message
    assert "--stage codec" in message and "--stage thinker" not in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"thinker": {"hidden_size": 64}}, "stage thinker has hidden_size=32, but .* has 64"),
        ({"codec": {"codebook_size": 99}}, "stage codec has codebook_size=16, but .* has 99"),
        (
            {"vision_encoder": {"vision": {"image_size": 64}}},
            "stage vision_encoder has vision.image_size=32, but .* has 64",
        ),
    ],
)
def test_an_export_of_another_size_is_rejected(
    root: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UpstreamError, match=message):
        open_session(root, {"model": changes})


def test_a_talker_of_another_codec_is_rejected(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "run", tmp_path / "run")
    manifest = tmp_path / "run" / "talker" / "export" / "export.json"
    content = json.loads(manifest.read_text())
    content["upstream"]["codec"] = "0" * 64
    manifest.write_text(json.dumps(content))
    with pytest.raises(UpstreamError, match=r"codes of another codec .* --stage talker"):
        open_session(root, run=tmp_path / "run")


def test_an_export_with_another_tokenizer_is_rejected(root: Path, tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "other.model", vocab_size=340)
    write_upstream(tmp_path / "run", Tokenizer.load(tmp_path / "other.model"))
    with pytest.raises(UpstreamError, match="tokenizer"):
        open_session(root, run=tmp_path / "run")


def test_parts_are_loaded_strictly(root: Path, tokenizer: Tokenizer) -> None:
    session = open_session(root)
    assert isinstance(session.stage, SftStage)
    other = OmniModel(omni_config(tokenizer, thinker={
        **session.stage.sizes.thinker.model_dump(), "num_layers": 3,
    }))  # fmt: skip
    with pytest.raises(UpstreamError, match="does not match"):
        load_parts(other, session.stage.context.upstream)


@pytest.fixture(scope="module")
def tokenizer(root: Path) -> Tokenizer:
    return Tokenizer.load(root / "tokenizer.model")
