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

from ..codegen.plan import Attention, Kernel, Plan
from ..ir.cache import Cache
from ..ir.errors import SmeltError
from ..ir.ops import CACHED_ATTENTION, arguments
from ..ir.weight import Weight

ALIGN = 64  # bytes; a cache line, and the widest vector
SLACK = 4  # a freed block serves requests down to a quarter of its size


class Pool:
    """Storage by size: freed blocks are handed out again, smallest fit first."""

    def __init__(self) -> None:
        self.free: list[torch.Tensor] = []
        self.allocated = 0

    def take(self, like: torch.Tensor) -> torch.Tensor:
        """A contiguous buffer with the shape and dtype of `like` (a meta tensor); its content is whatever was there."""
        nbytes = like.numel() * like.element_size()
        fits = [block for block in self.free if nbytes <= block.numel() <= SLACK * max(nbytes, ALIGN)]
        if fits:
            block = min(fits, key=torch.numel)
            self.free = [b for b in self.free if b is not block]
        else:
            block = torch.empty(max(1, -(-nbytes // ALIGN)) * ALIGN, dtype=torch.uint8)
            self.allocated += block.numel()
        return block[:nbytes].view(like.dtype).view(like.shape)

    def give(self, storage: torch.UntypedStorage) -> None:
        """Return a block."""
        self.free.append(torch.empty(0, dtype=torch.uint8).set_(storage))


class Bound:
    """`run()` computes `outputs` from `inputs`; both are fixed buffers, by name."""

    def __init__(
        self,
        plan: Plan,
        inputs: Mapping[str, torch.Tensor],
        cache: Cache | None,
        decoded: dict[str, torch.Tensor],
        bulk: bool = False,
    ) -> None:
        """`inputs`: buffers that hold the inputs. `decoded`: small tables, shared between bindings of one plan.

        `bulk`: take kernels for many rows where a node has one; see `Choice`.
        """
        self.plan, self.inputs, self.cache, self.bulk = plan, dict(inputs), cache, bulk
        self.calls: list[Callable[[], Any]] = []
        self.outputs: dict[str, torch.Tensor] = {}
        self._decoded = decoded
        self._pool = Pool()
        self._values: dict[fx.Node, Any] = {}
        self._unread = {node: len(node.users) for node in plan.program.graph.nodes}
        self._holders: dict[int, int] = {}  # nodes whose value lies in the block at an address
        self._metas: dict[Any, Any] = {}
        self._fixed = {t.untyped_storage().data_ptr() for t in (*inputs.values(), *decoded.values())}
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
            named = cast("dict[str, fx.Node]", node.args[0])
            self.outputs = {name: self._of_node(value) for name, value in named.items()}
        else:
            self._values[node] = self._computed(node)
            for at in _addresses(self._values[node]):
                self._holders[at] = self._holders.get(at, 0) + 1
            self._release(node)

    def _computed(self, node: fx.Node) -> Any:
        if node.target is CACHED_ATTENTION.target:
            return self._attention(node)
        return self._kernel(node) if node.name in self.plan.choices else self._host(node)

    def _release(self, node: fx.Node) -> None:
        """Give back what this node was the last to read, and its own result if nobody reads it."""
        dead = [] if node.users else [node]
        for used in node.all_input_nodes:
            self._unread[used] -= 1
            if not self._unread[used] and used.op == "call_function":
                dead.append(used)
        for gone in dead:
            for at, storage in _addresses(self._values[gone]).items():
                self._holders[at] -= 1
                if not self._holders[at] and at not in self._fixed:
                    self._pool.give(storage)

    def _of_node(self, node: fx.Node) -> Any:
        return self._table(str(node.target)) if node.op == "get_attr" else self._values[node]

    def _table(self, name: str) -> torch.Tensor:
        """A small weight decoded once, shared by every binding of a session."""
        if name not in self._decoded:
            self._decoded[name] = self.plan.program.weights[name].dense().contiguous()
        self._fixed.add(self._decoded[name].untyped_storage().data_ptr())
        return self._decoded[name]

    def _kernel(self, node: fx.Node) -> Any:
        choice = self.plan.choices[node.name]
        kernel = choice.bulk if self.bulk and choice.bulk is not None else choice.kernel
        args = self._arguments(node)
        spare = self._copies(kernel, args)
        meta = _on_meta(node.target, args, self._metas)
        out = self._pool.take(meta) if isinstance(meta, torch.Tensor) else tuple(self._pool.take(m) for m in meta)
        self.calls.append(kernel.bind(args, out))
        self._return(spare)
        return out

    def _arguments(self, node: fx.Node) -> dict[str, Any]:
        """Values by argument name; weights that the kernel takes as they are stored stay so."""
        stored = self.plan.encoded.get(node.name, ())
        args: dict[str, Any] = {}
        for name, argument in arguments(node).items():
            if name in stored and isinstance(argument, fx.Node) and argument.op == "get_attr":
                args[name] = self.plan.program.weights[str(argument.target)]
            else:
                args[name] = fx.node.map_arg(argument, self._of_node)
        return args

    def _copies(self, kernel: Kernel, args: dict[str, Any]) -> list[torch.Tensor]:
        """Replace arguments that the kernel does not take as they lie by copies, refreshed on every step."""
        spare = []
        for name in kernel.contiguous(args):
            copy = self._pool.take(args[name].to("meta"))
            self.calls.append(partial(copy.copy_, args[name]))
            args[name] = copy
            spare.append(copy)
        return spare

    def _return(self, spare: list[torch.Tensor]) -> None:
        for block in spare:
            self._pool.give(block.untyped_storage())

    def _attention(self, node: fx.Node) -> torch.Tensor:
        args = self._arguments(node)
        kernel = cast(Attention, self.plan.choices[node.name].kernel)
        if self.cache is None:
            raise SmeltError(f"{node.name} reads a cache: run this program through generate or with a cache")
        spare = self._copies(kernel, args)
        # [B, T, H, E] in memory, so that the transpose behind attention is a view
        out = self._pool.take(_on_meta(node.target, args, self._metas).transpose(1, 2)).transpose(1, 2)
        self.calls.append(partial(self.cache.append, int(args["layer"]), args["key"], args["value"]))
        self.calls.append(kernel.attend(self.cache, args, out))
        self._return(spare)
        return out

    def _host(self, node: fx.Node) -> Any:
        """Sizes, tuples and views: evaluated now. A view that must copy becomes a call."""
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._of_node)
        # buffers are contiguous where the traced model's may not have been: a view of those can be a copy here
        target: Any = torch.reshape if node.target is torch.ops.aten.view.default else node.target
        result = target(*args, **kwargs)
        if not isinstance(result, torch.Tensor) or not isinstance(args[0], torch.Tensor):
            return result
        if result.untyped_storage().data_ptr() == args[0].untyped_storage().data_ptr():
            return result
        out = self._pool.take(result.to("meta"))
        self.calls.append(partial(out.view(args[0].shape).copy_, args[0]))
        return out


def _addresses(value: Any) -> dict[int, torch.UntypedStorage]:
    """The storages of a value by address."""
    if isinstance(value, torch.Tensor):
        return {value.untyped_storage().data_ptr(): value.untyped_storage()}
    if isinstance(value, tuple | list):
        return {at: storage for member in value for at, storage in _addresses(member).items()}
    return {}


def _on_meta(target: Any, args: Mapping[str, Any], known: dict[Any, Any]) -> Any:
    """The result of an op on tensors without storage: its shape and dtype; layers ask the same again (`known`)."""

    def described(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.shape, value.stride(), value.dtype
        if isinstance(value, Weight):
            return value.shape
        return tuple(map(described, value)) if isinstance(value, list | tuple) else value

    def meta(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        if isinstance(value, Weight):
            return torch.empty(value.shape, device="meta")
        return [meta(v) for v in value] if isinstance(value, list | tuple) else value

    key = (target, *((type(value), described(value)) for value in args.values()))
    if key not in known:
        known[key] = target(**{name: meta(value) for name, value in args.items()})
    return known[key]
