"""`muomni count` against the real models and torch's FLOP counter."""

import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from muomni.cli.main import main
from muomni.config.loading import preset_names, resolve
from muomni.config.models import SAMPLE_RATE_HZ
from muomni.config.registry import STAGES
from muomni.models.language.thinker import Thinker
from muomni.models.omni import MediaSlots, OmniModel
from muomni.training.planning.model_counts import (
    AUDIO_S,
    CONVERSATION_TOKENS,
    count_preset,
    model_configs,
)


def test_counts_match_the_real_models() -> None:
    rows = {row.stage: row for row in count_preset("nano", 300)}
    assert tuple(rows) == tuple(STAGES)
    configs = model_configs("nano", 300)
    for stage, model_type in (("thinker", Thinker), ("sft", OmniModel)):
        total = sum(parameter.numel() for parameter in model_type(configs[stage]).parameters())
        assert rows[stage].parameters == rows[stage].active == total
    assert rows["thinker"].embedding == 300 * configs["thinker"].hidden_size


def test_flops_of_a_conversation_match_the_counter_of_torch() -> None:
    (row,) = (row for row in count_preset("nano", 300) if row.stage == "sft")
    config = model_configs("nano", 300)["sft"]
    model, side = OmniModel(config).eval(), config.vision_encoder.image_size
    samples = AUDIO_S * SAMPLE_RATE_HZ
    num_audio = -(-AUDIO_S * 25 // config.audio_stack)
    length = CONVERSATION_TOKENS + config.num_image_tokens + num_audio
    positions = torch.arange(length)[None, CONVERSATION_TOKENS:]
    slots = MediaSlots(
        images=torch.zeros(1, 3, side, side, dtype=torch.uint8),
        image_positions=positions[:, : config.num_image_tokens],
        audios=torch.randn(1, samples),
        audio_lengths=torch.tensor([samples]),
        audio_positions=positions[:, config.num_image_tokens :],
    )
    ids = torch.ones(1, length, dtype=torch.long)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.thinker.logits(model(ids, slots)[:, :CONVERSATION_TOKENS])
    assert counter.get_total_flops() == row.forward_flops


@pytest.mark.parametrize("preset", ["tiny", "small"])
def test_a_moe_preset_has_the_active_parameters_of_the_dense_preset(preset: str) -> None:
    dense, sparse = (count_preset(name, 2048)[0] for name in (preset, f"{preset}-moe"))
    assert sparse.parameters > 2.5 * dense.parameters
    assert sparse.active == pytest.approx(dense.active, rel=0.01)  # the router is extra
    assert sparse.forward_flops == pytest.approx(dense.forward_flops, rel=0.01)


def test_small_has_150_million_parameters_in_its_thinker() -> None:
    assert count_preset("small", 32_000)[0].parameters == pytest.approx(150e6, rel=0.01)


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_has_sizes_and_a_recipe_for_every_stage(preset: str) -> None:
    for stage in STAGES:
        assert resolve(stage, preset).model
    assert len(model_configs(preset, 300)) == len(STAGES)


def test_tables_and_json_agree(capsys: pytest.CaptureFixture[str]) -> None:
    main(["count", "nano", "tiny-moe", "--vocab-size", "300", "--json"])
    content = json.loads(capsys.readouterr().out)
    main(["count", "nano", "tiny-moe", "--vocab-size", "300"])
    text = capsys.readouterr().out
    assert list(content) == ["nano", "tiny-moe"]
    for rows in content.values():
        for row in rows:
            assert f"{row['parameters']:,}" in text and f"{row['active']:,}" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nani"], "muomni count: unknown preset 'nani' (did you mean 'nano'?)"),
        (["nano", "--vocab-size", "0"], "muomni count: argument --vocab-size: '0' is not an"),
    ],
)
def test_user_errors_are_one_sentence(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["count", *arguments])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(message)
