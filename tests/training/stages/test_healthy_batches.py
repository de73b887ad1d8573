"""A post-mortem of healthy batches finds only finite values in every stage, including masks."""

from pathlib import Path

import pytest
import torch

from muomni.training.postmortem import Seen, watched
from tests.training.stages.curves import stage_config
from tests.training.stages.sft.omni_runs import omni_run, write_root
from tests.training.test_flops import PERCEPTION, first_step, open_session


@pytest.fixture(scope="module")
def omni_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_root(tmp_path_factory.mktemp("omni"))


@pytest.mark.parametrize("name", [*PERCEPTION, "talker", "sft"])
def test_post_mortem_finds_nothing(name: str, media_data: Path, omni_root: Path) -> None:
    if name in PERCEPTION:
        session = open_session(stage_config(name, media_data))
    else:
        session = open_session(omni_run(name, omni_root), omni_root / "run")
    stage = session.stage
    torch.manual_seed(0)
    task = stage.build().train()
    window = [stage.prepare(batch) for batch in first_step(session)]
    seen = Seen()
    num_looks = [0]
    original = Seen.note_output

    def counted(self: Seen, module: str, output: object) -> None:
        num_looks[0] += 1
        original(self, module, output)

    Seen.note_output = counted  # type: ignore[method-assign]
    try:
        for batch in stage.begin_step(task, window):
            with watched(task, seen):
                torch.stack(list(task(batch).losses.values())).sum().backward()
    finally:
        Seen.note_output = original  # type: ignore[method-assign]
    assert num_looks[0] > len(window) * 10
    assert (seen.outputs, seen.gradients, seen.parameters) == ([], [], [])
