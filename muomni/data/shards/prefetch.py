"""A thread that downloads the next shards to the cache, a limited number ahead.

It is a daemon: if the process ends during a download, the part remains and the next run continues it.
"""

import logging
import threading
from collections import deque
from collections.abc import Sequence

from muomni.data.shards.cache import RemoteShard, ShardCache
from muomni.errors import DataError

logger = logging.getLogger(__name__)


class Prefetcher:
    """Downloads the first `num_ahead` shards of the last call of `expect`."""

    def __init__(self, cache: ShardCache, num_ahead: int) -> None:
        self._cache = cache
        self._num_ahead = num_ahead
        self._queue = _Queue()
        # The thread must not hold a reference to this object, whose deletion ends the thread.
        thread = threading.Thread(
            target=_fetch, args=(cache, self._queue), name="shard-prefetch", daemon=True
        )
        thread.start()

    def expect(self, shards: Sequence[RemoteShard]) -> None:
        """Announce the shards to read next, soonest first; replaces the previous announcement."""
        self._cache.expect(shards)
        self._queue.put(shards[: self._num_ahead])

    def close(self) -> None:
        """Stop after the current download."""
        self._queue.close()

    def __del__(self) -> None:
        self.close()


class _Queue:
    """A queue of shards to download, with their positions; `take` waits for one."""

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


def _fetch(cache: ShardCache, queue: _Queue) -> None:
    while (entry := queue.take()) is not None:
        position, shard = entry
        try:
            cache.prefetch(shard, position)
        except (DataError, OSError) as error:
            # Reading the shard retries the download and raises.
            logger.warning("cannot prefetch %s: %s", cache.remote.url_of(shard.path), error)
