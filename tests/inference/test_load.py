"""Loading an sft export is strict."""

from pathlib import Path

import pytest
import torch

from muomni.errors import UpstreamError
from muomni.inference.load import load_assistant
from tests.inference.exports import write_sft_export

CPU = torch.device("cpu")


def test_assistant_has_exported_weights(tmp_path: Path) -> None:
    model = write_sft_export(tmp_path)
    assistant = load_assistant(tmp_path, CPU)
    state = assistant.model.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert any(name.startswith("codec.") for name in state)
    assert not assistant.model.training
    assert not any(p.requires_grad for p in assistant.model.parameters())
    folder = load_assistant(tmp_path / "sft" / "export", CPU)
    assert folder.path == assistant.path


def test_missing_export_names_command(tmp_path: Path) -> None:
    with pytest.raises(UpstreamError, match=r"no export of stage sft .* --stage sft"):
        load_assistant(tmp_path, CPU)


def test_damaged_weights_are_rejected(tmp_path: Path) -> None:
    write_sft_export(tmp_path)
    weights = tmp_path / "sft" / "export" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(UpstreamError, match=r"model.safetensors is missing or damaged"):
        load_assistant(tmp_path, CPU)
