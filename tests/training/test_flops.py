"""FLOPs of real batches of every stage: hardware against torch's counter, model by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch

from muomni.config.run import RunConfig
from muomni.data.loading.loader import PlannedDataset
from muomni.data.views.base import Batch
from muomni.distributed.discovery import discover
from muomni.models.layers import attention as attention_layer
from muomni.models.layers.flops import forward_flops
from muomni.models.layers.masks import window_size
from muomni.models.speech.talker import talker_units
from muomni.training.engine import attention
from muomni.training.flops import StepFlops, count_thinker
from muomni.training.session import Request, Session, prepare
from tests.models.layers.test_flops import measured
from tests.models.layers.test_varlen_attention import attend_to_each
from tests.training.runs import thinker_config
from tests.training.stages.curves import stage_config
from tests.training.stages.sft.omni_runs import omni_run, write_root

PERCEPTION = ("audio_encoder", "vision_encoder", "codec")
MOE = {"num_experts": 4, "num_experts_per_token": 2, "expert_intermediate_size": 16}


@pytest.fixture(scope="module")
def omni_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_root(tmp_path_factory.mktemp("omni"))


def open_session(config: RunConfig, upstream: Path = Path()) -> Session:
    engine_json: dict[str, Any] = {"zero_optimization": {"stage": 0}}
    return prepare(Request(config, Path("none"), upstream, engine_json, "never"), discover({}))


def first_step(session: Session) -> list[Batch]:
    dataset = PlannedDataset(session.planned.source, session.stage.view(), 0)
    return [dataset[micro].tensors for micro in session.planned.plan.rank_step(0, 0, 1)]


def counted_and_measured(session: Session) -> tuple[StepFlops, int, Any]:
    """FLOPs of the first step, by the stage's counter and by torch."""
    stage: Any = session.stage
    torch.manual_seed(0)
    task = stage.build().train()
    stage.set_up(task)
    batches = first_step(session)
    count = stage.flop_counter(task)

    def step() -> None:
        window = [stage.prepare(batch) for batch in batches]
        for batch in stage.begin_step(task, window):
            torch.stack(list(task(batch).losses.values())).sum().backward()

    return sum(map(count, batches), StepFlops()), measured(step), task


@pytest.mark.parametrize("policy", ["none", "full", 2])
@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "moe"])
def test_thinker(text_data: Path, moe: dict[str, int] | None, policy: str | int) -> None:
    changes = {
        "training": {"activation_checkpointing": policy},
        "model": {"moe": moe, "num_layers": 3},
    }
    counted, by_torch, _ = counted_and_measured(open_session(thinker_config(text_data, changes)))
    assert counted.hardware == by_torch
    assert 0 < counted.model < counted.hardware


def test_thinker_with_windowed_attention(text_data: Path) -> None:
    session = open_session(thinker_config(text_data, {"batch": {"seq_len": 512}}))
    ids = first_step(session)[0]["document_ids"]
    assert window_size(ids) is not None
    counted, by_torch, _ = counted_and_measured(session)
    assert counted.hardware == by_torch


@pytest.mark.parametrize(
    ("stage", "policy"),
    [
        *((stage, policy) for stage in PERCEPTION for policy in ("none", "full", 2)),
        ("vision_encoder", {"vision": "full"}),
        ("vision_encoder", {"text*": 2, "*": "none"}),
        ("codec", {"decoder": 3}),
    ],
    ids=str,
)
def test_perception_stages(media_data: Path, stage: str, policy: Any) -> None:
    changes: dict[str, Any] = {"training": {"activation_checkpointing": policy}}
    if stage == "audio_encoder":
        # torch counts the weight gradient of a depthwise convolution as if it were a full one.
        changes["model"] = {"conv_kernel_size": 0}
    counted, by_torch, _ = counted_and_measured(
        open_session(stage_config(stage, media_data, changes))
    )
    assert counted.hardware == by_torch
    assert 0 < counted.model <= counted.hardware


# Not siglip with 2: torch's counter cannot follow a module that returns a parameter without gradient.
@pytest.mark.parametrize(("loss", "group"), [("clip", 1), ("clip", 2), ("siglip", 1)])
def test_contrastive_losses_by_micro_batches(media_data: Path, loss: str, group: int) -> None:
    """One micro-batch needs no first pass over the towers, and the sigmoid loss no log-sum-exps."""
    changes = {"batch": {"global_samples": 4 * group}, "options": {"loss": loss}}
    counted, by_torch, _ = counted_and_measured(
        open_session(stage_config("vision_encoder", media_data, changes))
    )
    assert counted.hardware == by_torch


def test_talker_with_its_frozen_codec(omni_root: Path) -> None:
    config = omni_run("talker", omni_root)
    counted, by_torch, _ = counted_and_measured(open_session(config, omni_root / "run"))
    assert counted.hardware == by_torch
    assert 0 < counted.model <= counted.hardware


@pytest.mark.parametrize("policy", ["none", "full"])
@pytest.mark.parametrize("stage", ["thinker", "audio_encoder", "talker", "sft"])
def test_attention_by_documents(
    stage: str,
    policy: str,
    text_data: Path,
    media_data: Path,
    omni_root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch counts attention per document, in place of the kernels."""
    changes: dict[str, Any] = {"training": {"activation_checkpointing": policy}}
    if stage == "thinker":
        config = thinker_config(text_data, changes)
    elif stage == "audio_encoder":
        changes |= {
            "model": {"conv_kernel_size": 0},
            "batch": {"global_seconds": 16, "micro_seconds": 4},
        }
        config = stage_config(stage, media_data, changes)
    elif stage == "talker":
        config = omni_run(
            stage, omni_root, changes | {"batch": {"global_seconds": 6, "micro_seconds": 3}}
        )
    else:
        # No gradient of depthwise convolutions, which torch counts as full ones.
        changes |= {"options": {"freeze": ["audio_encoder.*"]}, "batch": {"seq_len": 64}}
        config = omni_run(stage, omni_root, changes)
    by_mask, _, _ = counted_and_measured(open_session(config, omni_root / "run"))
    monkeypatch.setattr(attention, "use_varlen", lambda wanted, *_: wanted == "varlen")
    monkeypatch.setattr(attention_layer, "varlen_attn", attend_to_each)
    training = config.training.model_copy(update={"attention": "varlen"})
    config = config.model_copy(update={"training": training})
    counted, by_torch, _ = counted_and_measured(open_session(config, omni_root / "run"))
    assert counted.hardware == by_torch
    assert counted.model == by_mask.model
    assert counted.hardware < by_mask.hardware or stage == "thinker"


ALL_FROZEN_BUT = {
    "everything": [],
    "projectors and speech": ["vision_encoder.*", "audio_encoder.*", "thinker.*"],
    "talker": ["vision_*", "audio_*", "image_*", "thinker.*"],
    "language": ["vision_encoder.*", "audio_encoder.*"],
    "what is not spoken": ["audio_encoder.*", "talker.*"],
}


BY_TOWER = {"thinker": "full", "vision*": "none", "audio*": 2}


@pytest.mark.parametrize(
    ("trained", "policy"),
    [
        *((trained, policy) for trained in ALL_FROZEN_BUT for policy in ("none", "full")),
        ("everything", BY_TOWER),
        ("language", BY_TOWER),
    ],
    ids=str,
)
def test_sft_by_trained_parts(omni_root: Path, trained: str, policy: Any) -> None:
    changes = {
        "options": {"freeze": ALL_FROZEN_BUT[trained]},
        "training": {"activation_checkpointing": policy},
    }
    session = open_session(omni_run("sft", omni_root, changes), omni_root / "run")
    counted, by_torch, task = counted_and_measured(session)
    surplus = 0
    if trained == "everything":
        # As torch counts depthwise convolutions, see above.
        audio = task.omni.config.audio_encoder
        frames = sum(
            len(batch["audios"]) * -(-batch["audios"].shape[1] // 640)
            for batch in first_step(session)
        )
        depthwise = 2 * audio.conv_kernel_size * audio.hidden_size
        surplus = frames * audio.num_layers * depthwise * (audio.hidden_size - 1)
    if trained == "talker":
        # Torch sees that nothing before the projection of the Thinker's states wants a gradient.
        assert counted.hardware == pytest.approx(by_torch, rel=0.01)
    else:
        assert counted.hardware == by_torch - surplus
    assert 0 < counted.model < counted.hardware


# -- model FLOPs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["audio_encoder", "talker"])
def test_model_flops_of_a_batch_are_those_of_its_samples(
    media_data: Path, omni_root: Path, stage: str
) -> None:
    if stage == "talker":
        session = open_session(omni_run("talker", omni_root), omni_root / "run")
    else:
        session = open_session(stage_config(stage, media_data))
    view = session.stage.view()
    count = session.stage.flop_counter(session.stage.build())
    examples = [view.example(session.planned.source.read(index), None) for index in range(5)]
    together = count(view.collate([examples]))
    alone = [count(view.collate([[example]])) for example in examples]
    assert all(flops.model == flops.hardware for flops in alone)
    assert together.model == sum(flops.model for flops in alone) < together.hardware


def test_a_document_attends_only_to_itself(text_data: Path) -> None:
    stage: Any = open_session(thinker_config(text_data)).stage
    thinker = stage.build().thinker
    ids = torch.tensor([[1, 1, 1, 2, 2, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]])
    batch = {"document_ids": ids, "units": torch.tensor(9)}

    def training(lengths: tuple[int, ...], num_predictions: int) -> int:
        pairs = sum(length**2 for length in lengths)
        units = {"positions": sum(lengths), "pairs": pairs, "predictions": num_predictions}
        return 3 * forward_flops(thinker.flops(), units)

    counted = count_thinker(thinker, on_cpu=False)(batch)
    assert counted.model == training((3, 2, 4), 9)
    assert counted.hardware == training((8, 8), 16)
    thinker.stack.attends_by_documents = True
    by_documents = count_thinker(thinker, on_cpu=False)(batch)
    assert by_documents.hardware == training((3, 2, 3, 4, 4), 16)  # padding, too
    assert by_documents.model == counted.model


def test_empty_sequences_and_slots_count_as_hardware_flops_only(omni_root: Path) -> None:
    session = open_session(omni_run("sft", omni_root), omni_root / "run")
    view: Any = session.stage.view()
    count = session.stage.flop_counter(session.stage.build())
    empty = count(view.collate([]))
    assert empty.model == 0 < empty.hardware
    speaking = next(s for s in map(session.planned.source.read, range(20)) if "say" in s["__key__"])
    example = view.example(speaking, None)
    view.num_sequences = 3
    counted = count(view.collate([[example]]))
    assert 0 < counted.model < counted.hardware / 2


def test_the_frozen_codec_only_runs_forward(omni_root: Path) -> None:
    session = open_session(omni_run("talker", omni_root), omni_root / "run")
    stage: Any = session.stage
    view = stage.view()
    batch = view.collate([[view.example(session.planned.source.read(0), None)]])
    task, codec = stage.build(), stage.codec.codec
    num_mel = -(-int(batch["lengths"][0]) // 160)
    num_characters, num_frames = batch["text_mask"].shape[1], -(-num_mel // 4)
    units = talker_units(torch.tensor([num_characters]), torch.tensor([num_frames]))
    spoken = forward_flops(task.talker.flops(), units)
    heard = forward_flops(codec.flops(), {"mel_frames": num_mel, "encoded": num_frames})
    assert stage.flop_counter(task)(batch).model == 3 * spoken + heard
