"""Bytes of the tensors that operators make, from their making to their death, and FLOPs on the way.

It sees storages, so a view costs nothing and a tensor that autograd keeps counts until the backward
pass lets it go. It works on real tensors and on fake ones, which have sizes but no memory; the meta
device is left out. What lives inside an operator alone (scratch of a kernel) is not seen.
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
    """While active, keeps `now`, the living bytes by part, and `peak`, `now` at its fullest.

    `part` names the part that a new storage belongs to. `flops` counts as `models/flops.py` does.
    """

    def __init__(self, part: Callable[[], str]) -> None:
        super().__init__()
        self.now: Bytes = {}
        self.peak: Bytes = {}
        self.flops = 0
        self._part = part
        self._known: dict[int, tuple[str, int]] = {}

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Count neither these tensors nor views of them."""
        for tensor in tensors:
            self._watch(tensor, "", 0)

    def start_peak(self) -> None:
        """Look for the fullest moment from here on."""
        self.peak = dict(self.now)

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute one operator."""
        return func(*args, **kwargs)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = self.run(func, args, kwargs or {})
        self.flops += operator_flops(func, args, kwargs or {}, out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
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
    """Bytes behind some tensors; a storage that several share counts once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
