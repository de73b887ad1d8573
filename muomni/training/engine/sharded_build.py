"""Builds a model for ZeRO 3 without ever holding all of it: weights are initialized and sharded one by one.

`RecordedBuild` runs a stage's `build()` with large weights on the meta device and records the operators that
initialize them. `shard` later repeats those of one weight at a time, in fp32 on the CPU, and gives the result
to DeepSpeed, which keeps this rank's shard. Random numbers are drawn in the order of an ordinary build, so a
run starts with the same weights under every ZeRO stage. (DeepSpeed's `zero.Init` as a context would draw them
on the device and in the compute dtype.)
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_aten = torch.ops.aten
# Smaller tensors are built as usual.
_LEAST_ELEMENTS = 4096
_RANDOM = {_aten.normal_.default, _aten.uniform_.default, _aten.random_.default}
# Views of the whole tensor, in the same layout.
_ALIASES = {_aten.detach.default, _aten.detach_.default, _aten.alias.default}


@dataclass(slots=True)
class _Recipe:
    """How to compute a tensor: its shape, and the operators that change it, with their other arguments."""

    shape: torch.Size
    dtype: torch.dtype
    storage: Any  # keeps the address from being reused
    steps: list[tuple[Any, tuple[Any, ...], dict[str, Any], Tensor | None]] = field(
        default_factory=list
    )

    def compute(self) -> Tensor:
        """The tensor; leaves the state of the random number generator as it was."""
        state = torch.get_rng_state()
        result = torch.empty(self.shape, dtype=self.dtype)
        for func, args, kwargs, seed in self.steps:
            if seed is not None:
                torch.set_rng_state(seed)
            real = tree_map(lambda arg: arg.compute() if isinstance(arg, _Recipe) else arg, args)
            func(result, *real, **kwargs)
        torch.set_rng_state(state)
        return result


class RecordedBuild(TorchDispatchMode):
    """While active, large uninitialized tensors are created on the meta device, and their changes recorded.

    Operators that read such a tensor get its value, computed for them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._recipes: dict[int, _Recipe] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _aten.empty.memory_format:
            return self._create(func, args, kwargs)
        recipe = self._find(args[0]) if args else None
        if func in _ALIASES and recipe is not None:
            return func(*args, **kwargs)
        if recipe is not None and func._schema.is_mutable and recipe.shape == args[0].shape:
            return self._record(recipe, func, args, kwargs)
        if any(self._find(leaf) for leaf in tree_leaves((args, kwargs))):
            assert not func._schema.is_mutable, f"cannot shard a model that is built with {func}"
            args, kwargs = tree_map(self._value, (args, kwargs))
        return func(*args, **kwargs)

    def value(self, parameter: Tensor) -> Tensor:
        """The initialized tensor."""
        return self._value(parameter)

    def _create(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        size = torch.Size(args[0])
        dtype = kwargs.get("dtype") or torch.get_default_dtype()
        is_host = torch.device(kwargs.get("device") or "cpu").type == "cpu"
        if not is_host or not dtype.is_floating_point or size.numel() < _LEAST_ELEMENTS:
            return func(*args, **kwargs)
        created = func(*args, **{**kwargs, "device": torch.device("meta"), "pin_memory": False})
        storage = created.untyped_storage()
        self._recipes[storage._cdata] = _Recipe(size, dtype, storage)
        return created

    def _record(
        self, recipe: _Recipe, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        assert kwargs.get("generator") is None, "weights are drawn from the default generator"
        seed = None
        if func in _RANDOM:
            seed = torch.get_rng_state()
            func(torch.empty(recipe.shape, dtype=recipe.dtype), *args[1:], **kwargs)  # advances it
        others = tree_map(self._copy_of_recipe, args[1:])
        recipe.steps.append((func, others, kwargs, seed))
        return args[0]

    def _copy_of_recipe(self, leaf: Any) -> Any:
        """A recorded argument as it is now, or any other one itself."""
        recipe = self._find(leaf)
        if recipe is None:
            return leaf
        return _Recipe(recipe.shape, recipe.dtype, recipe.storage, list(recipe.steps))

    def _find(self, leaf: Any) -> _Recipe | None:
        if not isinstance(leaf, Tensor) or not leaf.is_meta:
            return None
        return self._recipes.get(leaf.untyped_storage()._cdata)

    def _value(self, leaf: Any) -> Any:
        recipe = self._find(leaf)
        if recipe is None:
            return leaf
        assert recipe.shape == leaf.shape, "cannot compute a part of a weight"
        return recipe.compute()


def shard(
    task: nn.Module, build: RecordedBuild, config: dict[str, Any], dtype: torch.dtype
) -> dict[int, nn.Parameter]:
    """Replace all parameters of `task` by ZeRO-3 parameters in `dtype`, of which each rank has a shard.

    `config` is the complete DeepSpeed config. Returns the new parameters by the `id` of the old ones. Every
    rank must call it.
    """
    known: dict[int, nn.Parameter] = {}
    first: Any = None
    for module, name, parameter in list(
        _parameters(task)
    ):  # the list keeps the old ones, and their ids
        if id(parameter) not in known:
            full = build.value(parameter).detach().to(dtype)
            known[id(parameter)] = sharded = nn.Parameter(full, parameter.requires_grad)
            del full
            if first is None:
                deepspeed.zero.Init(nn.ParameterList([sharded]), config_dict_or_path=config)
                first = sharded
            else:
                first.convert_to_zero_parameters(param_list=[sharded])
        module._parameters[name] = known[id(parameter)]
    return known


def _parameters(task: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Each parameter with a module that has it; tied ones occur several times."""
    for module in task.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield module, name, parameter
