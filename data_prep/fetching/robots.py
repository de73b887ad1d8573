"""What a host allows: robots.txt (RFC 9309) and the header X-Robots-Tag.

`urllib.robotparser` knows neither wildcards nor the rule that the longest match decides.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import unquote

# The product token that robots.txt and X-Robots-Tag may address.
TOKEN = "muomni"
MAX_ROBOTS_BYTES = 500 * 1024
# The directives that img2dataset obeys by default.
_REFUSING = frozenset({"noai", "noimageai", "noindex", "noimageindex"})
# Directives with a colon, which is otherwise that of an agent.
_WITH_VALUE = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")


@dataclass(frozen=True, slots=True)
class RobotsRules:
    """The rules of one origin: path patterns with whether they allow, and seconds between requests."""

    rules: tuple[tuple[str, bool], ...] = ()
    crawl_delay_s: float = 0.0

    def allows(self, path: str) -> bool:
        """Whether a path with its query may be requested: the longest matching pattern decides, else yes."""
        path = unquote(path)
        matching = [
            (len(pattern), allowed) for pattern, allowed in self.rules if _matches(pattern, path)
        ]
        return max(matching, default=(0, True))[1]


def parse_robots(text: str) -> RobotsRules:
    """The rules for `TOKEN`, or else those for all agents; unknown lines are ignored."""
    rules: dict[str, list[tuple[str, bool]]] = {}
    delays: dict[str, float] = {}
    agents: list[str] = []
    in_rules = False
    for line in text.removeprefix("\ufeff").splitlines():
        name, colon, value = line.partition("#")[0].partition(":")
        name, value = name.strip().lower(), value.strip()
        if not colon:
            continue
        if name == "user-agent":
            agents = [value.lower()] if in_rules else [*agents, value.lower()]
            in_rules = False
            for agent in agents:
                rules.setdefault(agent, [])
        elif name in ("allow", "disallow", "crawl-delay"):
            in_rules = True
            for agent in agents:
                if name == "crawl-delay":
                    delays[agent] = _seconds(value)
                elif value:
                    rules[agent].append((unquote(value), name == "allow"))
    agent = TOKEN if TOKEN in rules else "*"
    return RobotsRules(tuple(rules.get(agent, ())), delays.get(agent, 0.0))


def refusing_tag(values: Iterable[str]) -> str:
    """The first directive of X-Robots-Tag headers that refuses use for training; empty if there is none.

    An agent holds for what follows it: those of `otherbot: noindex, nofollow` do not count.
    """
    for value in values:
        agent = TOKEN
        for part in value.lower().split(","):
            name, colon, rest = part.partition(":")
            if colon and name.strip() not in _WITH_VALUE:
                agent, part = name.strip(), rest
            if agent == TOKEN and part.strip() in _REFUSING:
                return part.strip()
    return ""


def _matches(pattern: str, path: str) -> bool:
    """Whether a pattern with `*` and a final `$` matches the start of a path, in linear time."""
    is_whole = pattern.endswith("$")
    first, *rest = pattern.removesuffix("$").split("*")
    if not path.startswith(first):
        return False
    end = len(first)
    last = rest.pop() if is_whole and rest else None
    for part in rest:
        start = path.find(part, end)
        if start < 0:
            return False
        end = start + len(part)
    if last is not None:
        return path.endswith(last) and len(path) - len(last) >= end
    return end == len(path) if is_whole else True


def _seconds(text: str) -> float:
    return float(text) if re.fullmatch(r"\d{1,9}(\.\d*)?", text) else 0.0
