"""A thread that fetches the shards that come next into the cache, a bounded number ahead.

It is a daemon: when the process ends in the middle of a download, the part stays and the next run goes
on with it.
"""

import logging
import threading
from collections import deque
from collections.abc import Sequence

from muomni.data.shards.cache import RemoteShard, ShardCache
from muomni.errors import DataError

logger = logging.getLogger(__name__)


class Prefetcher:
    """Fetches the first `num_ahead` of the shards that were last given to `expect`."""

    def __init__(self, cache: ShardCache, num_ahead: int) -> None:
        self._cache = cache
        self._num_ahead = num_ahead
        self._wanted = _Wanted()
        # The thread must not keep this object alive, for its end is the thread's.
        thread = threading.Thread(
            target=_fetch, args=(cache, self._wanted), name="shard-prefetch", daemon=True
        )
        thread.start()

    def expect(self, shards: Sequence[RemoteShard]) -> None:
        """The shards that will be read, soonest first; replaces what was expected before."""
        self._cache.expect(shards)
        self._wanted.put(shards[: self._num_ahead])

    def close(self) -> None:
        """Fetch nothing more; a download that runs is finished."""
        self._wanted.close()

    def __del__(self) -> None:
        self.close()


class _Wanted:
    """The shards that are to be fetched, with their positions; `take` waits for one."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._shards: deque[tuple[int, RemoteShard]] = deque()
        self._is_closed = False

    def put(self, shards: Sequence[RemoteShard]) -> None:
        with self._condition:
            self._shards = deque(enumerate(shards))
            self._condition.notify()

    def take(self) -> tuple[int, RemoteShard] | None:
        with self._condition:
            self._condition.wait_for(lambda: self._shards or self._is_closed)
            return None if self._is_closed else self._shards.popleft()

    def close(self) -> None:
        with self._condition:
            self._is_closed = True
            self._condition.notify()


def _fetch(cache: ShardCache, wanted: _Wanted) -> None:
    while (entry := wanted.take()) is not None:
        position, shard = entry
        try:
            cache.prefetch(shard, position)
        except (DataError, OSError) as error:
            # Whoever reads the shard tries again, and its error stops the run.
            logger.warning("did not fetch %s ahead: %s", cache.remote.url_of(shard.path), error)
