"""Loading an sft export: whole and strict, or a clear refusal."""

from pathlib import Path

import pytest
import torch

from muomni.errors import UpstreamError
from muomni.inference.load import load_assistant
from tests.inference.exports import write_sft_export

CPU = torch.device("cpu")


def test_the_assistant_has_the_exported_weights_and_tokenizer(tmp_path: Path) -> None:
    model = write_sft_export(tmp_path)
    assistant = load_assistant(tmp_path, CPU)
    state = assistant.model.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert any(name.startswith("codec.") for name in state)
    assert not assistant.model.training
    assert not any(p.requires_grad for p in assistant.model.parameters())
    folder = load_assistant(tmp_path / "sft" / "export", CPU)
    assert folder.export.path == assistant.export.path


def test_a_missing_export_is_named_with_its_command(tmp_path: Path) -> None:
    with pytest.raises(UpstreamError, match=r"no export of stage sft .* --stage sft"):
        load_assistant(tmp_path, CPU)


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    write_sft_export(tmp_path)
    weights = tmp_path / "sft" / "export" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(UpstreamError, match=r"model.safetensors is missing or damaged"):
        load_assistant(tmp_path, CPU)
