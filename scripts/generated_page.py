"""Pages of docs/ with a part that a script writes, between two markers; used by the scripts `*_table.py`."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class GeneratedPage:
    """A page, and the function that renders the text between its markers `<!-- NAME: begin (SCRIPT) -->`."""

    path: Path
    name: str
    script: str
    render: Callable[[], str]

    def updated(self, page: str) -> str:
        """The page with current text between the markers; exits if a marker is missing."""
        first, last = f"<!-- {self.name}: begin ({self.script}) -->", f"<!-- {self.name}: end -->"
        before, begin, rest = page.partition(first)
        _, end, after = rest.partition(last)
        if not begin or not end:
            raise SystemExit(f"{self.path} lacks the lines '{first}' and '{last}'; add them")
        return f"{before}{first}\n{self.render()}\n{last}{after}"

    def main(self, description: str | None) -> None:
        """Run the command line of the script: --write or --check."""
        parser = argparse.ArgumentParser(
            description=description, formatter_class=argparse.RawTextHelpFormatter
        )
        action = parser.add_mutually_exclusive_group(required=True)
        action.add_argument("--write", action="store_true", help="update the page")
        action.add_argument("--check", action="store_true", help="fail if the page is out of date")
        is_check = parser.parse_args().check
        page = self.path.read_text(encoding="utf-8")
        content = self.updated(page)
        if is_check and content != page:
            raise SystemExit(f"{self.path} is out of date; run: python {self.script} --write")
        if not is_check:
            self.path.write_text(content, encoding="utf-8")
