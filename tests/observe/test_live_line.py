"""The live line of a terminal: its width, its colors, and other output above it."""

from pathlib import Path

import pytest

from muomni.observe.progress import as_live_line, bar, fit
from tests.terminal import drawn, run_in_terminal

PROGRAM = """
import sys, time
from pathlib import Path
from muomni.io.console import protect_output
from muomni.io.live_line import LIVE_LINE
from muomni.observe import announce, progress
from muomni.observe.announce import Startup, row
from muomni.observe.progress import ProgressLine
from muomni.observe.recorder import RunInfo

draws, draw = [], LIVE_LINE.draw
LIVE_LINE.draw = lambda text: (draw(text), draws.append(text))
announce.DRAW_EVERY_S = progress.DRAW_EVERY_S = 0.05


def wait():  # for the next draw that starts from now on
    number = len(draws)
    while len(draws) < number + 2:
        time.sleep(0.01)


protect_output(None)
with Startup(is_shown=True) as startup:
    startup.begin("a part with a name that is too long for a line of a narrow terminal")
    wait()
    startup.finish()
position = (3, "forward")
info = RunInfo("audio_encoder", "tokens", Path(), Path(), {}, 0, 20, None, lambda: position)
line = ProgressLine()
line.open(info)
metrics = dict(loss=2.5, lr=1e-3, grad_norm=0.75, tokens_per_s=1234.0, data_wait_fraction=0.02, step_time_s=1)
line.log(3, "train", metrics)
wait()
print("a warning", file=sys.stderr)
print("in", "parts", end="")
wait()
print(" of a line")
position = (4, "validation")
wait()
line.close("FINISHED")
"""


@pytest.mark.parametrize(("columns", "no_color"), [(40, ""), (80, "1")])
def test_the_live_line_fits_and_leaves_other_output_intact(columns: int, no_color: str) -> None:
    written = run_in_terminal(PROGRAM, columns, NO_COLOR=no_color)
    lines = drawn(written)
    live = [line for line in lines if line.startswith("audio_encoder")]
    assert any(line.startswith("audio_encoder 3/20") and "loss 2.5000" in line for line in live)
    assert any(line.startswith("audio_encoder 4/20") and "validation" in line for line in live)
    assert any(line.startswith("  start      a part with") and "..." not in line for line in lines)
    assert max(map(len, lines)) < columns
    assert any("█" in line for line in live if "loss" in line) is (columns == 80)
    assert "\r\x1b[Ka warning\r\n" in written  # the live line is erased first
    assert "in parts of a line\r\n" in written  # and not drawn into an unfinished line
    assert written.endswith("\r\x1b[K")
    assert ("\x1b[1m" in written) is (not no_color)


def test_the_most_important_fields_are_kept() -> None:
    fields = [(0, "loss 1.0"), (2, "9 tokens/s"), (1, "eta 0:02")]
    assert fit(fields, 40) == "loss 1.0  9 tokens/s  eta 0:02"
    assert fit(fields, 20) == "loss 1.0  eta 0:02"
    assert fit(fields, 3) == "loss 1.0"
    assert fit([], 10) == ""
    assert bar("thinker 1/2", 1, 2, "loss 1.0", 15) == "thinker 1/2  lo"
    assert len(bar("thinker 1/2", 1, 2, "loss 1.0", 60)) == 60


RELAYING = """
import os, sys, time
from pathlib import Path
from muomni.io.console import protect_output
from muomni.pipeline.local import RunningRanks

protect_output(None)
lines = ["codec 1/9  loss 2.0  lr 1e-3  eta 0:08", "codec 1/9  val/loss 1.0", "a warning"]
program = f"print(*{lines}, sep=chr(10))"
ranks = RunningRanks([sys.executable, "-c", program], Path(os.environ["LOG"]), dict(os.environ))
while ranks.poll() is None:
    time.sleep(0.05)
"""


def test_a_pipeline_redraws_the_lines_of_its_stage(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    written = run_in_terminal(RELAYING, 40, NO_COLOR="1", LOG=str(log))
    assert "\r\x1b[Kcodec 1/9  loss 2.0  lr 1e-3  eta 0:08\r\x1b[K" in written
    assert "codec 1/9  val/loss 1.0\r\na warning\r\n" in written
    assert log.read_text().splitlines()[1] == "codec 1/9  loss 2.0  lr 1e-3  eta 0:08"
    assert (
        as_live_line("codec 1/9  loss 2.0  lr 1e-3  eta 0:08", 30)
        == "codec 1/9  loss 2.0  eta 0:08"
    )
    assert as_live_line("codec 1/9  val/loss 1.0", 80) is None
