"""`muomni convert`: converted exports load in transformers and open_clip with equal outputs."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3ForCausalLM

from muomni.checkpoint.export import read_export
from muomni.cli.main import main
from muomni.config.models import ClipConfig, ThinkerConfig
from muomni.models.language.thinker import Thinker
from muomni.models.vision.clip import Clip
from tests.corpora import write_tokenizer
from tests.evaluation.runs import untrained_export
from tests.training.runs import thinker_config
from tests.training.stages.curves import stage_config


def convert(run: Path, stage: str, out: Path) -> None:
    main(["convert", "--run", str(run), "--stage", stage, "--out", str(out)])


@torch.no_grad()
def test_thinker_loads_in_transformers(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer.model")
    untrained_export(thinker_config(tmp_path), tmp_path / "run")
    convert(tmp_path / "run", "thinker", tmp_path / "out")
    theirs = Qwen3ForCausalLM.from_pretrained(tmp_path / "out").eval()
    export = read_export(tmp_path / "run" / "thinker" / "export", "thinker")
    ours = Thinker(export.config(ThinkerConfig)).eval()
    export.load_into(ours)
    ids = torch.randint(0, 300, (2, 17), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours.logits(ours(ids)), theirs(ids).logits, atol=1e-5, rtol=1e-5)
    assert (tmp_path / "out" / "tokenizer.model").is_file()


@torch.no_grad()
def test_vision_encoder_loads_in_open_clip(tmp_path: Path) -> None:
    open_clip_model = pytest.importorskip("open_clip.model")
    write_tokenizer(tmp_path / "tokenizer.model")
    untrained_export(stage_config("vision_encoder", tmp_path), tmp_path / "run")
    convert(tmp_path / "run", "vision_encoder", tmp_path / "out")
    theirs = open_clip_model.CLIP(**json.loads((tmp_path / "out" / "config.json").read_text()))
    theirs.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"), strict=True)
    export = read_export(tmp_path / "run" / "vision_encoder" / "export", "vision_encoder")
    ours = Clip(export.config(ClipConfig)).eval()
    export.load_into(ours)
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())


def test_mistakes_leave_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tokenizer(tmp_path / "tokenizer.model")
    untrained_export(stage_config("codec", tmp_path), tmp_path / "run")
    with pytest.raises(SystemExit) as stop:
        convert(tmp_path / "run", "codec", tmp_path / "out")
    assert stop.value.code == 2
    assert "stage codec has no published format; convert thinker" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "tokenizer.model"]
    (tmp_path / "out").mkdir()
    untrained_export(thinker_config(tmp_path), tmp_path / "run")
    with pytest.raises(SystemExit):
        convert(tmp_path / "run", "thinker", tmp_path / "out")
    assert "already exists; choose another --out" in capsys.readouterr().err
