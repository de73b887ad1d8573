"""Log output of a process: what DeepSpeed and torch report at the start, and the log files of ranks."""

import logging
import sys
from pathlib import Path
from typing import Any

# Loggers and beginnings of messages that say nothing about a problem, at level WARNING. A GPU that cannot be
# used is an error of muomni.distributed.devices, and an accelerator without GPUs is printed with the setup.
_STARTUP_NOISE = {
    "DeepSpeed": "Setting accelerator to CPU.",
    "torch.utils.cpp_extension": "No CUDA runtime is found, using CUDA_HOME=",
}


class StartupNoise(logging.Filter):
    """Drops messages that begin with a text, and no others."""

    def __init__(self, beginning: str) -> None:
        super().__init__()
        self._beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(self._beginning)


class RankLog(logging.FileHandler):
    """Appends to a file, which is created with its folder at the first message; a failure is printed once."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, delay=True, encoding="utf-8")
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._has_failed = False

    def _open(self) -> Any:
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
        return super()._open()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:  # of opening the file
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        if not self._has_failed:
            self._has_failed = True
            error = sys.exc_info()[1]
            print(f"cannot write {self.baseFilename} ({error})", file=sys.stderr, flush=True)


def configure(level: int, is_main: bool = True, log: Path | None = None) -> None:
    """Log messages from `level` on to standard error; ranks other than the main one errors only.

    Such a rank logs everything from `level` on, Python's warnings included, to the file `log`. Below WARNING,
    startup messages of DeepSpeed and torch are shown, too.
    """
    terminal = logging.StreamHandler()
    if not is_main:
        terminal.setLevel(logging.ERROR)
    terminal.setFormatter(logging.Formatter("%(message)s"))
    handlers: list[logging.Handler] = [terminal]
    if log is not None and not is_main:
        handlers.append(RankLog(log))
        logging.captureWarnings(True)
    logging.basicConfig(level=level if is_main or log else logging.ERROR, handlers=handlers)
    if level >= logging.WARNING:
        for name, beginning in _STARTUP_NOISE.items():
            logging.getLogger(name).addFilter(StartupNoise(beginning))


def is_verbose() -> bool:
    """Whether messages below WARNING are shown."""
    return logging.getLogger().isEnabledFor(logging.INFO)


def use_root_handlers(name: str) -> None:
    """Let a logger with handlers of its own, such as DeepSpeed's, use those of this process instead."""
    logger = logging.getLogger(name)
    logger.handlers.clear()
    logger.propagate = True
