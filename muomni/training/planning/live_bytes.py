"""Track the bytes of live tensors, from allocation to release, and count FLOPs.

Storages are counted, so views are free, and tensors saved for autograd count until the backward pass releases
them. Works with real and fake tensors, or with meta tensors in their place. Temporary memory within an operator
(kernel scratch space) is not tracked.
"""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from muomni.models.layers.flops import operator_flops

Bytes = dict[str, int]


class LiveBytes(TorchDispatchMode):
    """While active, tracks `now`, the live bytes by part, and `peak`, their values at the highest total.

    `part()` returns the part of a new storage. `on_meta` tracks tensors on the meta device, and no
    others. `flops` follows `models/layers/flops.py`.
    """

    def __init__(self, part: Callable[[], str], on_meta: bool = False) -> None:
        super().__init__()
        self.now: Bytes = {}
        self.peak: Bytes = {}
        self.flops = 0
        self._part = part
        self._on_meta = on_meta
        self._known: dict[int, tuple[str, int]] = {}

    def exclude(self, tensors: Iterable[Tensor]) -> None:
        """Do not count these tensors or views of them."""
        for tensor in tensors:
            self._watch(tensor, "", 0)

    def start_peak(self) -> None:
        """Start a new peak."""
        self.peak = dict(self.now)

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one operator."""
        return func(*args, **kwargs)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = self.run(func, args, kwargs or {})
        self.flops += operator_flops(func, args, kwargs or {}, out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.is_meta == self._on_meta:
                self._watch(leaf, self._part(), leaf.untyped_storage().nbytes())
        if sum(self.now.values()) > sum(self.peak.values()):
            self.peak = dict(self.now)
        return out

    def _watch(self, tensor: Tensor, part: str, num_bytes: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = (part, num_bytes)
        self.now[part] = self.now.get(part, 0) + num_bytes
        weakref.finalize(storage, self._forget, key).atexit = False

    def _forget(self, key: int) -> None:
        part, num_bytes = self._known.pop(key)
        self.now[part] -= num_bytes


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the tensors' storages; shared storages count once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
