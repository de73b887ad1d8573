"""Traces of a few steps and snapshots of GPU memory, requested by config or by touching a file.

`RUN/STAGE/profile_now` requests a trace of the next steps, `RUN/STAGE/memory_now` a snapshot of their
allocations. Rank 0 looks for these files at logging steps and removes them; then all ranks record the same
steps, and those in `profile.ranks` write. Files are written atomically.
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch

from muomni.config.run import ProfileSection
from muomni.errors import ConfigError
from muomni.observe.step_clock import StepClock

logger = logging.getLogger(__name__)

TRACE_REQUEST = "profile_now"
MEMORY_REQUEST = "memory_now"
# Allocations and frees with their stacks in a snapshot.
_MAX_MEMORY_EVENTS = 100_000


def check_ranks(settings: ProfileSection, num_ranks: int) -> None:
    """Raise ConfigError if `profile.ranks` names a rank that the run does not have."""
    missing = [rank for rank in settings.ranks if rank >= num_ranks]
    if missing:
        are = "is 1 rank" if num_ranks == 1 else f"are {num_ranks} ranks"
        raise ConfigError(
            f"profile.ranks names rank {missing[0]}, but there {are}, numbered from 0"
        )


class Profiler:
    """Records steps with torch.profiler and torch's memory history, for one rank of a run."""

    def __init__(
        self,
        settings: ProfileSection,
        root: Path,
        device: torch.device,
        rank: int,
        clock: StepClock,
    ) -> None:
        self._settings = settings
        self._root, self._device, self._clock = root, device, clock
        self._rank = rank
        self._records = rank in settings.ranks
        self._trace: torch.profiler.profile | None = None
        self._is_recording = False
        # First and last step to record, or None.
        self._steps: tuple[int, int] | None = None
        self._kinds: set[str] = set()
        self._plan(after_step=0)

    def _plan(self, after_step: int) -> None:
        """Schedule the steps of the config, unless they have begun or passed."""
        first = self._settings.start_step
        self._steps, self._kinds = None, {"trace"}
        if first is not None and first > after_step:
            self._steps = (first, first + self._settings.num_steps - 1)

    # -- requests ----------------------------------------------------------------------------------
    def take_requests(self) -> list[float]:
        """Take the request files of the run folder: [trace, memory], each 0 or 1.

        Only rank 0 looks, and not during a recording: the file then waits.
        """
        if self._rank != 0 or self._is_recording:
            return [0.0, 0.0]
        return [float(self._taken(name)) for name in (TRACE_REQUEST, MEMORY_REQUEST)]

    def request(self, wants_trace: bool, wants_memory: bool, step: int) -> None:
        """Record the steps after `step`; all ranks must pass the same arguments."""
        if wants_memory and self._device.type != "cuda":
            logger.warning("%s: memory snapshots need a GPU", MEMORY_REQUEST)
            wants_memory = False
        if wants_trace or wants_memory:
            kinds = {"trace": wants_trace, "memory": wants_memory}
            self._kinds = {kind for kind, is_wanted in kinds.items() if is_wanted}
            self._steps = (step + 1, step + self._settings.num_steps)

    def _taken(self, name: str) -> bool:
        try:
            (self._root / name).unlink()
        except FileNotFoundError:
            return False
        except OSError as error:
            logger.warning("cannot remove %s: %s", self._root / name, error.strerror)
            return False
        return True

    # -- steps -------------------------------------------------------------------------------------
    def is_due(self, step: int) -> bool:
        """Whether `turn` must be called between `step` and the next step."""
        return self._steps is not None and step in (self._steps[0] - 1, self._steps[1])

    def turn(self, step: int) -> None:
        """Start recording with the next step, or stop and write after `step`."""
        assert self._steps is not None
        if not self._is_recording and step == self._steps[0] - 1:
            self._start()
        elif self._is_recording and step == self._steps[1]:
            self._stop(step)

    def finish(self, step: int) -> None:
        """Write an unfinished recording when training ends at `step`."""
        if self._is_recording:
            self._stop(step)
        elif self._steps is not None and self._steps[0] > step and self._rank == 0:
            logger.warning(
                "training ended before steps %d to %d, which were to be profiled",
                *self._steps,
            )

    def discard(self) -> None:
        """Stop a recording without a file, because the run stops."""
        if self._is_recording:
            logger.warning("the run stopped during a profile; no trace is written")
            self._end_recording()

    def _start(self) -> None:
        self._is_recording = True
        if not self._records:
            return
        if "memory" in self._kinds:
            torch.cuda.memory._record_memory_history(max_entries=_MAX_MEMORY_EVENTS)
        if "trace" in self._kinds:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self._device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._trace = torch.profiler.profile(activities=activities)
            self._trace.start()
            self._clock.name_ranges(True)

    def _stop(self, last_step: int) -> None:
        assert self._steps is not None
        first_step, kinds = self._steps[0], self._kinds
        memory = "memory" in kinds and self._records
        if memory and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            self._write(
                "memory", first_step, last_step, ".pickle", torch.cuda.memory._dump_snapshot
            )
        trace = self._end_recording()
        if trace is not None:
            self._write("trace", first_step, last_step, ".json", trace.export_chrome_trace)
        self._plan(last_step)

    def _end_recording(self) -> torch.profiler.profile | None:
        trace, self._trace = self._trace, None
        if trace is not None:
            self._clock.name_ranges(False)
            trace.stop()
        if self._records and "memory" in self._kinds:
            torch.cuda.memory._record_memory_history(enabled=None)
        self._is_recording, self._steps, self._kinds = False, None, set()
        return trace

    def _write(
        self, kind: str, first: int, last: int, suffix: str, write: Callable[[str], None]
    ) -> None:
        folder = self._root / "profile"
        path = folder / f"{kind}_steps_{first:08d}-{last:08d}_rank{self._rank}{suffix}"
        # torch chooses the format by the suffix.
        temporary = path.with_name(f".tmp-{path.name}")
        try:
            folder.mkdir(exist_ok=True)
            write(str(temporary))
            os.replace(temporary, path)
        except (OSError, RuntimeError) as error:  # torch's writers raise RuntimeError
            temporary.unlink(missing_ok=True)
            logger.warning("cannot write %s: %s; training continues", path, error)
            return
        print(f"wrote {path}", flush=True)
