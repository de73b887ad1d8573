"""Recorder of TensorBoard event files in RUN/STAGE/tensorboard; needs the extra `muomni[tensorboard]`."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from muomni.errors import ConfigError
from muomni.observe.metric_names import recorder_metrics
from muomni.observe.recorder import Kind, RunInfo, Status

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FOLDER = "tensorboard"
_MAX_TEXT_BYTES = 100_000


def check_installed() -> None:
    """Raise ConfigError if the optional package is missing."""
    if find_spec("tensorboard") is None:
        raise ConfigError(
            "training.recorders names tensorboard, which is not installed; run pip install muomni[tensorboard]"
        )


class TensorBoardLog:
    """Writes metrics as scalars with the names of `metric_names`, and text files as text."""

    _writer: "SummaryWriter"
    _step: int

    def open(self, info: RunInfo) -> None:
        check_installed()
        from torch.utils.tensorboard import SummaryWriter

        # `purge_step` hides the events of steps that will run again.
        self._writer = SummaryWriter(str(info.folder / FOLDER), purge_step=info.step + 1)
        self._step = info.step

    def log(self, step: int, kind: Kind, metrics: dict[str, float]) -> None:
        self._step = step
        for name, value in recorder_metrics(kind, metrics).items():
            self._writer.add_scalar(name, value, step)

    def artifact(self, path: Path, folder: str) -> None:
        if path.suffix in (".txt", ".yaml"):
            text = path.read_text(encoding="utf-8")[:_MAX_TEXT_BYTES]
            indented = "".join(f"    {line}\n" for line in text.splitlines())  # Markdown code block
            self._writer.add_text(f"{folder}/{path.name}", indented, self._step)

    def close(self, status: Status) -> None:
        self._writer.close()
