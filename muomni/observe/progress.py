"""Progress: rates of training, and what is printed while it runs."""

import re
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from muomni.io.count_progress import EVERY_S, duration
from muomni.io.live_line import LIVE_LINE, Ticker, is_terminal, styled, width
from muomni.observe.announce import DRAW_EVERY_S
from muomni.observe.recorder import Kind, Recorder, RunInfo, Status, links

# Sections of the step clock that the live line names, since no step ends meanwhile.
_ACTIVITIES = ("validation", "save", "export")
# Without progress, a line still appears this often, to show that the process is alive.
_SILENCE_S = 60.0
_PROGRESS_LINE = re.compile(r"(\w+) (\d+)/(\d+)  (loss .*)")
_RELAYED = {"loss": 0, "eta": 1}  # texts that a relayed line keeps first
# The narrowest bar, and the narrowest line that has one.
_MIN_BAR, _MIN_COLUMNS = 8, 60


class StepRates:
    """Step time and throughput since the last logged step, without pauses."""

    def __init__(self, unit: str, step: int) -> None:
        self.unit = unit
        self.busy_s = 0.0  # duration of the steps in the last call of `take`
        self.num_busy_steps = 0
        self._last_wait_s = 0.0
        self.start(step)

    def start(self, step: int) -> None:
        """Measure from now on, after `step` finished steps."""
        self._last_s, self._last_step = time.perf_counter(), step
        self._paused_s = 0.0

    def pause(self, seconds: float) -> None:
        """Exclude time that was spent on validation or saving."""
        self._paused_s += seconds

    def take(self, step: int, units: float, wait_s: float) -> dict[str, float]:
        """Metrics since the last call: step time, units per second over all ranks, data wait."""
        now = time.perf_counter()
        busy = max(1e-9, now - self._last_s - self._paused_s)
        steps = max(1, step - self._last_step)
        self.busy_s, self.num_busy_steps = busy, steps
        waited = wait_s - self._last_wait_s
        self._last_s, self._last_step, self._last_wait_s, self._paused_s = now, step, wait_s, 0.0
        return {
            "step_time_s": busy / steps,
            f"{self.unit}_per_s": units / busy,
            "data_wait_fraction": min(1.0, max(0.0, waited) / busy),
        }


class ProgressLine:
    """Recorder of standard output: a live line with a bar on a terminal, otherwise a line every ten seconds.

    Validations and the last step always get a line. `others` are asked for links to the run.
    """

    _info: RunInfo

    def __init__(self, others: Sequence[Recorder] = ()) -> None:
        self._others = others
        self._ticker: Ticker | None = None
        self._lock = threading.Lock()  # the ticker prints, too

    def open(self, info: RunInfo) -> None:
        self._info = info
        self._is_live = is_terminal(sys.stdout)
        self._metrics: dict[str, float] = {}
        self._first: tuple[int, float] | None = None  # step and time of the first progress
        self._printed = (info.step, time.perf_counter())
        self._num_links = 0
        if info.step < info.num_steps:  # else only sample outputs follow
            every_s = DRAW_EVERY_S if self._is_live else EVERY_S
            self._ticker = Ticker(self._draw if self._is_live else self._report, every_s)
            self._ticker.start()

    def log(self, step: int, kind: Kind, metrics: dict[str, float]) -> None:
        info = self._info
        self._now()
        if kind == "val":
            text = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            print(f"{self._name()} {step}/{info.num_steps}  {text}", flush=True)
            return
        is_first, self._metrics = not self._metrics, metrics
        if step == info.num_steps or (is_first and not self._is_live):
            self._print(step)

    def artifact(self, path: Path, folder: str) -> None:
        """Ignored."""

    def close(self, status: Status) -> None:
        if self._ticker is not None:
            self._ticker.stop()
            self._ticker = None
            self._print_links()
            LIVE_LINE.hide()

    def _name(self) -> str:
        return styled(self._info.stage, "bold")

    def _print(self, step: int) -> None:
        with self._lock:
            self._printed = (step, time.perf_counter())
            texts = [text for _, text in self._fields(step)]
            position = f"{self._name()} {step}/{self._info.num_steps}"
            print("  ".join([position, *texts]), flush=True)

    def _report(self) -> None:
        """Print a line if there is progress, or has not been any for a minute."""
        self._print_links()
        step, _ = self._now()
        last_step, last_s = self._printed
        silent_s = time.perf_counter() - last_s
        wanted_s = EVERY_S / 2 if step > last_step else _SILENCE_S
        if self._metrics and silent_s > wanted_s:
            self._print(step)

    def _draw(self) -> None:
        """Redraw the live line."""
        self._print_links()
        step, activity = self._now()
        columns = width(sys.stdout) - 1  # a full line would wrap on some terminals
        left = f"{self._info.stage} {step}/{self._info.num_steps}"
        fields = [(0, activity)] if activity in _ACTIVITIES else self._fields(step)
        reserved = _MIN_BAR + 3 if columns >= _MIN_COLUMNS else 2
        right = fit(fields, columns - len(left) - reserved)
        LIVE_LINE.draw(bar(left, step, self._info.num_steps, right, columns))

    def _now(self) -> tuple[int, str]:
        """The number of finished steps, and what the loop does now."""
        step, activity = (
            (self._info.step, "") if self._info.position is None else self._info.position()
        )
        if self._first is None and step > self._info.step:
            self._first = step, time.perf_counter()  # the first step, which is slow, is over
        return step, activity

    def _print_links(self) -> None:
        known = links(self._others)
        for link in known[self._num_links :]:
            print(f"{self._name()} is logged to {link}", flush=True)
        self._num_links = len(known)

    def _fields(self, step: int) -> list[tuple[int, str]]:
        """The texts of a line, each with its rank by importance (0 first)."""
        info, metrics = self._info, self._metrics
        eta_s = self._eta_s(step)
        eta = [] if eta_s is None else [(1, f"eta {duration(eta_s)}")]
        if not metrics:
            return eta
        fields = [
            (0, f"loss {metrics['loss']:.4f}"),
            (4, f"lr {metrics['lr']:.2e}"),
            (3, f"grad {metrics['grad_norm']:.2f}"),
            (2, f"{metrics[f'{info.unit}_per_s']:,.0f} {info.unit}/s"),
            (5, f"wait {100 * metrics['data_wait_fraction']:.0f} %"),
        ]
        if "moe/max_load" in metrics:
            load, even, dead = (
                metrics[f"moe/{name}"] for name in ("max_load", "entropy", "num_dead")
            )
            fields.insert(3, (7, f"experts max {load:.1f}x entropy {even:.2f} dead {dead:.0f}"))
        if "loss_scale" in metrics:
            mark = "!" if metrics.get("fp16_warning") else ""
            skipped = f"skipped {metrics['num_skipped']:.0f}"
            fields.insert(3, (6, f"scale {metrics['loss_scale']:g}{mark} {skipped}"))
        if "mfu" in metrics:
            fields.append((3, f"MFU {100 * metrics['mfu']:.1f} %"))
        if metrics.get("num_bad_samples"):
            fields.append((2, f"bad samples {metrics['num_bad_samples']:.0f}"))
        return fields + eta

    def _eta_s(self, step: int) -> float | None:
        """Seconds to the last step, from the steps after the first; None before there are any."""
        if step >= self._info.num_steps:
            return 0.0
        if self._first is None or step <= self._first[0]:
            per_step = self._metrics.get("step_time_s")
            if per_step is None:
                return None
        else:
            per_step = (time.perf_counter() - self._first[1]) / (step - self._first[0])
        return per_step * (self._info.num_steps - step)


def as_live_line(line: str, columns: int) -> str | None:
    """A printed progress line with a bar, to redraw it in a terminal; None for other lines."""
    found = _PROGRESS_LINE.fullmatch(line)
    if found is None:
        return None
    stage, step, num_steps, texts = found.groups()
    left = f"{stage} {step}/{num_steps}"
    fields = [(_RELAYED.get(text.split()[0], 2), text) for text in texts.split("  ")]
    reserved = _MIN_BAR + 3 if columns >= _MIN_COLUMNS else 2
    right = fit(fields, columns - len(left) - reserved)
    return bar(left, int(step), int(num_steps), right, columns)


def fit(fields: list[tuple[int, str]], columns: int) -> str:
    """The most important fields that fit, in their order; the first one always is among them."""
    kept = sorted(range(len(fields)), key=lambda index: fields[index][0])
    while len(kept) > 1 and sum(len(fields[index][1]) + 2 for index in kept) - 2 > columns:
        kept.pop()
    return "  ".join(fields[index][1] for index in sorted(kept))


def bar(left: str, step: int, num_steps: int, right: str, columns: int) -> str:
    """A line with a bar between two texts, of at most `columns` characters."""
    from tqdm import tqdm

    if len(left) + len(right) + _MIN_BAR + 3 > columns:
        return f"{left}  {right}"[:columns]
    is_ascii = not (sys.stdout.encoding or "").lower().startswith("utf")
    line = tqdm.format_meter(
        step, num_steps, 0.0, ncols=columns, ascii=is_ascii,
        bar_format="{desc} {bar}  {unit}", prefix=left, unit=right,
    )  # fmt: skip
    before, after = len(left) + 1, len(line) - len(right) - 2
    return f"{styled(left, 'bold')} {styled(line[before:after], 'cyan')}  {right}"
