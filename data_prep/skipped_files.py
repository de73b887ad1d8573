"""Files of a source folder that no reader takes: counted while the folder is searched, reported afterward."""

import os
from collections import Counter
from dataclasses import dataclass, field

_MAX_SHOWN = 8


@dataclass(slots=True)
class SkippedFiles:
    """Numbers of skipped files.

    Args:
        clutter: by name or kind of name: files of operating systems, hidden files, and folders of them.
        others: by suffix: files that the format does not read.
        num_links: links to folders that are listed anyway, such as a link to a parent.
    """

    clutter: Counter[str] = field(default_factory=Counter)
    others: Counter[str] = field(default_factory=Counter)
    num_links: int = 0

    def add_other(self, name: str) -> None:
        """Count a file that the format does not read."""
        self.others[os.path.splitext(name)[1].lower() or "no suffix"] += 1

    def report(self) -> str:
        """One line about all skipped files; empty if there are none."""
        parts = []
        if self.clutter:
            parts.append(f"{self.clutter.total()} that are not data ({_listed(self.clutter)})")
        if self.others:
            parts.append(f"{self.others.total()} of other types ({_listed(self.others)})")
        if self.num_links:
            parts.append(f"{self.num_links} links to folders that are listed already")
        return f"files not read: {'; '.join(parts)}" if parts else ""


def _listed(counts: Counter[str]) -> str:
    """`.bmp 12, .heic 3`, the most frequent first."""
    ordered = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    shown = [f"{name} {number}" for name, number in ordered[:_MAX_SHOWN]]
    return ", ".join(shown if len(ordered) <= _MAX_SHOWN else [*shown, "..."])
