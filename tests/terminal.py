"""Run a program in a terminal of a given width, for tests of what is drawn there."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_CONTROL = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def run_in_terminal(program: str, columns: int, **environ: str) -> str:
    """What a Python program writes to a terminal, with its control sequences; it must succeed."""
    clean = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    clean |= {"TERM": "xterm", "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", **environ}
    main, terminal = pty.openpty()
    fcntl.ioctl(main, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    command = [sys.executable, "-c", program]
    with subprocess.Popen(
        command, stdin=terminal, stdout=terminal, stderr=terminal, env=clean
    ) as process:
        os.close(terminal)
        written = b""
        while True:
            try:
                written += os.read(main, 65536)
            except OSError:  # the program has closed the terminal
                break
    os.close(main)
    assert process.returncode == 0, written.decode()
    return written.decode()


def drawn(written: str) -> list[str]:
    """The texts that were drawn between line ends, carriage returns, and erased lines."""
    return [text for text in re.split(r"[\r\n]+", _CONTROL.sub("", written)) if text]
