"""A second memory that is pretended: tensors that ask for CUDA lie on the CPU, and no computation may mix the two.

In Triton's interpreter host and device are one memory, so that a tensor on the wrong side computes the right thing
there and fails on a GPU. Here every storage is on a side; `device` of a tensor tells it, and an op over tensors of both
sides raises, as does a launch of a kernel over one of the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

HERE, THERE = torch.device("cpu"), torch.device("cuda", 0)
MIXING = ("copy_", "set_", "__getitem__", "type_as")  # may read what lies on the other side
READING = ("tolist", "item", "__int__", "__float__", "__bool__", "__index__", "numpy", "is_nonzero", "equal", "nonzero")


class Mixed(AssertionError):
    """One op, or one launch, over both memories."""


class TwoMemories(TorchFunctionMode):
    """While it is entered, "cuda" is a memory of its own. `waits`: ops of the host that read what lies there."""

    def __init__(self) -> None:
        super().__init__()
        self._there: dict[int, torch.UntypedStorage] = {}  # by address; held, so that no address is given twice
        self.waits: list[str] = []

    def lies_there(self, x: torch.Tensor) -> bool:
        """Whether a tensor's storage is the device's."""
        with torch._C.DisableTorchFunction():
            return x.untyped_storage()._cdata in self._there or x.untyped_storage().data_ptr() in self._there

    def take(self, x: Any) -> Any:
        """Declare a tensor to lie on the device."""
        if isinstance(x, torch.Tensor) and x.device.type != "meta":
            storage = x.untyped_storage()
            self._there[storage.data_ptr() or storage._cdata] = storage
        return x

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Translate devices, refuse a mixture, and note on which side the result lies."""
        name, given = getattr(func, "__name__", ""), dict(kwargs or {})
        owner = getattr(func, "__self__", None)
        if name == "__get__" and owner is torch.Tensor.device:
            return THERE if self.lies_there(args[0]) else func(*args)
        if name == "__get__" and owner is torch.Tensor.is_cuda:
            return self.lies_there(args[0])
        if name == "__get__" or func is torch.device:
            return func(*args, **given)
        if name in ("data_ptr", "untyped_storage", "size", "stride", "numel", "element_size", "dim"):
            return func(*args, **given)
        asked = [leaf for leaf in tree_leaves((args, given)) if _names_device(leaf)]
        there = bool(asked) and torch.device(asked[-1]).type == "cuda"
        pinned = given.pop("pin_memory", False)
        assert not (pinned and there), f"{name}: only memory of the host is pinned"
        tensors = [leaf for leaf in tree_leaves((args, given)) if isinstance(leaf, torch.Tensor)]
        # a number of the host may meet tensors of the device, but not the other way round
        sides = {side for x in tensors if x.device.type != "meta" if (side := self.lies_there(x)) or x.dim()}
        if name in READING and True in sides:
            self.waits.append(name)
        if len(sides) > 1 and name not in MIXING:
            shapes = [(str(x.device), list(x.shape)) for x in tensors]
            raise Mixed(f"{name} over both memories: {shapes}")
        if name == "__getitem__" and len(sides) > 1 and not self.lies_there(args[0]):
            raise Mixed("an index of the device into a tensor of the host")
        args, given = tree_map(_here, args), tree_map(_here, given)
        moved = bool(asked) and name in ("to", "cpu", "_to_copy") and sides == {not there}
        moved |= name == "cpu" and True in sides
        result = func(*args, **given)
        if moved:
            result = result.clone()
            if not there:
                self.waits.append(name)
        if name != "copy_" and (there or (not asked and name != "cpu" and True in sides and name not in READING)):
            tree_map(self.take, result)
        return result


def _names_device(leaf: Any) -> bool:
    return isinstance(leaf, torch.device) or (isinstance(leaf, str) and leaf.partition(":")[0] in ("cpu", "cuda"))


def _here(leaf: Any) -> Any:
    return HERE if _names_device(leaf) and torch.device(leaf).type == "cuda" else leaf


@contextmanager
def two_memories(monkeypatch: pytest.MonkeyPatch) -> Iterator[TwoMemories]:
    """Plans of target triton are for the pretended device; kernels may be launched over its tensors alone."""
    from contextlib import nullcontext

    from triton.runtime.interpreter import GridExecutor

    from smelt.codegen import lower_triton
    from smelt.runtime import bound_triton

    mode, launch = TwoMemories(), GridExecutor.__call__

    def checked(executor: Any, *args: Any, **options: Any) -> None:
        for place, x in [*enumerate(args), *options.items()]:
            if isinstance(x, torch.Tensor) and not mode.lies_there(x):
                raise Mixed(f"argument {place} of kernel {executor.fn.__name__} lies on the host: {list(x.shape)}")
        with torch._C.DisableTorchFunction():
            launch(executor, *args, **options)

    monkeypatch.setattr(GridExecutor, "__call__", checked)
    monkeypatch.setattr(lower_triton, "likely", lambda: THERE)
    monkeypatch.setattr(bound_triton, "_on", lambda to: nullcontext())
    monkeypatch.setattr(bound_triton, "_event", lambda device: None)
    with mode:
        yield mode
