"""A plan bound to one batch, one number of tokens and one cache: a fixed list of calls over planned buffers.

Binding walks the graph once. Sizes are evaluated, views are made, buffers are taken from a pool and go back to it after
their last reader; what is left is the list of kernel calls that a step makes. A step allocates nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import fx

from ..codegen.plan import Attention, Plan
from ..ir.cache import Cache
from ..ir.errors import SmeltError
from ..ir.ops import CACHED_ATTENTION, arguments

class Pool:
    """Storage by size: freed blocks are handed out again, smallest fit first."""

    def __init__(self) -> None:
        self.free: list[torch.Tensor] = []
        self.allocated = 0

    def take(self, like: torch.Tensor) -> torch.Tensor:
        """A contiguous buffer with the shape and dtype of `like` (a meta tensor)."""
        need = max(1, like.numel()) * like.element_size()
        fits = [b for b in self.free if need <= b.numel() <= 4 * need]
        if fits:
            block = min(fits, key=torch.numel)
            self.free = [b for b in self.free if b is not block]
        else:
            block = torch.empty(-(-need // 64) * 64, dtype=torch.uint8)
            self.allocated += block.numel()
        return block[: like.numel() * like.element_size()].view(like.dtype).view(like.shape)

    def give(self, storage: torch.UntypedStorage) -> None:
        """Return a block."""
        self.free.append(torch.empty(0, dtype=torch.uint8).set_(storage))  # type: ignore[call-overload]


class Bound:
    """`run()` computes `outputs` from `inputs`; both are fixed buffers, by name."""

    def __init__(
        self,
        plan: Plan,
        inputs: Mapping[str, torch.Tensor],
        cache: Cache | None,
        decoded: dict[str, torch.Tensor],
    ) -> None:
        """`inputs`: buffers that hold the inputs. `decoded`: small tables shared between bindings."""
        self.plan, self.inputs, self.cache = plan, dict(inputs), cache
        self.calls: list[Callable[[], Any]] = []
        self.outputs: dict[str, torch.Tensor] = {}
        self._decoded = decoded
        self._pool = Pool()
        self._values: dict[fx.Node, Any] = {}
        self._readers: dict[fx.Node, int] = {n: len(n.users) for n in plan.program.graph.nodes}
        self._holders: dict[int, int] = {}
        for node in plan.program.graph.nodes:
            self._bind(node)
        self._values.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of the planned buffers."""
        return self._pool.allocated

    def run(self) -> None:
        """One step."""
        for call in self.calls:
            call()

    def _bind(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self._values[node] = self.inputs[str(node.target)]
        elif node.op == "get_attr":
            self._values[node] = None  # a kernel takes the weight itself; others ask _table
        elif node.op == "output":
            self.outputs = {name: self._values[n] for name, n in node.args[0].items()}  # type: ignore[union-attr]
            return
        elif node.target is CACHED_ATTENTION.target:
            self._values[node] = self._attention(node)
        elif node.name in self.plan.choices:
            self._values[node] = self._kernel(node)
        else:
            self._values[node] = self._host(node)
        for storage in _storages(self._values[node]):
            self._holders[storage.data_ptr()] = self._holders.get(storage.data_ptr(), 0) + 1
        self._release(node)

    def _release(self, node: fx.Node) -> None:
        """Give back what this node read last."""
        if node.op in ("placeholder", "get_attr"):
            return
        dead = [n for n in node.all_input_nodes if self._read(n)]
        for used in (*dead, *(() if node.users else (node,))):
            if used.op in ("placeholder", "get_attr"):
                continue
            for storage in _storages(self._values[used]):
                at = storage.data_ptr()
                self._holders[at] -= 1
                if not self._holders[at] and not self._is_input(storage):
                    self._pool.give(storage)

    def _read(self, node: fx.Node) -> bool:
        self._readers[node] -= 1
        return self._readers[node] == 0

    def _is_input(self, storage: torch.UntypedStorage) -> bool:
        fixed = (*self.inputs.values(), *self._decoded.values())
        return any(t.untyped_storage().data_ptr() == storage.data_ptr() for t in fixed)

    def _value(self, argument: Any) -> Any:
        return fx.node.map_arg(argument, self._of_node)

    def _of_node(self, node: fx.Node) -> Any:
        return self._table(str(node.target)) if node.op == "get_attr" else self._values[node]

    def _table(self, name: str) -> torch.Tensor:
        """A small weight decoded once, shared by every binding of a session."""
        if name not in self._decoded:
            self._decoded[name] = self.plan.program.weights[name].dense().contiguous()
        return self._decoded[name]

    def _kernel(self, node: fx.Node) -> Any:
        choice = self.plan.choices[node.name]
        encoded = self.plan.encoded.get(node.name, ())
        args: dict[str, Any] = {}
        for name, argument in arguments(node).items():
            stored = name in encoded and isinstance(argument, fx.Node) and argument.op == "get_attr"
            args[name] = self.plan.program.weights[str(argument.target)] if stored else self._value(argument)  # type: ignore[union-attr]
        spare = self._copies(choice.kernel.contiguous(args), args)
        meta = _on_meta(node.target, args)
        out = self._pool.take(meta) if isinstance(meta, torch.Tensor) else tuple(self._pool.take(m) for m in meta)
        self.calls.append(choice.kernel.bind(args, out))
        for block in spare:
            self._pool.give(block.untyped_storage())
        return out

    def _copies(self, names: tuple[str, ...], args: dict[str, Any]) -> list[torch.Tensor]:
        """Replace arguments by contiguous copies that are refreshed on every step."""
        spare = []
        for name in names:
            copy = self._pool.take(args[name].to("meta"))
            self.calls.append(partial(copy.copy_, args[name]))
            args[name] = copy
            spare.append(copy)
        return spare

    def _attention(self, node: fx.Node) -> torch.Tensor:
        args = {name: self._value(a) for name, a in arguments(node).items()}
        kernel = cast(Attention, self.plan.choices[node.name].kernel)
        if self.cache is None:
            raise SmeltError(f"{node.name} reads a cache: run this program through generate or with a cache")
        spare = self._copies(kernel.contiguous(args), args)
        # [B, T, H, E] in memory, so that the transpose behind attention is a view
        out = self._pool.take(_on_meta(node.target, args).transpose(1, 2)).transpose(1, 2)
        self.calls.append(partial(self.cache.append, int(args["layer"]), args["key"], args["value"]))
        self.calls.append(kernel.attend(self.cache, args, out))
        for block in spare:
            self._pool.give(block.untyped_storage())
        return out

    def _host(self, node: fx.Node) -> Any:
        """Sizes, tuples and views: evaluated now. A view that must copy becomes a call."""
        args, kwargs = self._value(node.args), self._value(node.kwargs)
        result = node.target(*args, **kwargs)  # type: ignore[operator]  # an ATen view or a Python operator
        if not isinstance(result, torch.Tensor) or not isinstance(args[0], torch.Tensor):
            return result
        if result.untyped_storage().data_ptr() == args[0].untyped_storage().data_ptr():
            return result
        out = self._pool.take(result.to("meta"))
        self.calls.append(partial(out.view(args[0].shape).copy_, args[0]))
        return out


def _storages(value: Any) -> list[torch.UntypedStorage]:
    if isinstance(value, torch.Tensor):
        return [value.untyped_storage()]
    if isinstance(value, tuple | list):
        unique = {s.data_ptr(): s for v in value for s in _storages(v)}
        return list(unique.values())
    return []


def _on_meta(target: Any, args: Mapping[str, Any]) -> Any:
    """The result of an op on tensors without storage: its shape and dtype."""

    def meta(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        if hasattr(value, "encoding"):
            return torch.empty(value.shape, device="meta")
        return [meta(v) for v in value] if isinstance(value, list | tuple) else value

    return target(**{name: meta(value) for name, value in args.items()})
