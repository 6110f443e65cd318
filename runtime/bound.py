"""A plan bound to one batch, one number of tokens and one cache: a fixed list of calls over planned buffers.

Binding walks the graph once. Sizes are evaluated, views are made, buffers are taken from a pool and go back to it after
their last reader; what is left is the list of kernel calls that a step makes. Neighbouring calls of generated functions
become one unit, which for a decoder is the whole step. A step allocates nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from typing import Any, cast

import torch
from torch import fx

from ..codegen.build import threads
from ..codegen.choose import Chooser
from ..codegen.choose_triton import TritonChooser
from ..codegen.close_up import CloseUp
from ..codegen.fuse import Chain, Region
from ..codegen.fused import Codes, ProductKernel, QuantizeKernel
from ..codegen.mass import column_sums
from ..codegen.plan import Attention, Kernel, Plan
from ..codegen.rows import copied, picked, row_stride
from ..codegen.unit import Call, Unit
from ..ir.cache import Cache
from ..ir.errors import SmeltError
from ..ir.ops import CACHED_ATTENTION, HEAD, LAYER_NORM, QUANTIZED, RMS_NORM, arguments, is_op
from ..ir.weight import Weight
from .pool import Pool


class Bound:
    """`run()` computes `outputs` from `inputs`; both are fixed buffers, by name."""

    def __init__(
        self,
        plan: Plan,
        inputs: Mapping[str, torch.Tensor],
        cache: Cache | None,
        decoded: dict[str, torch.Tensor],
        last: torch.Tensor | None = None,
    ) -> None:
        """`inputs`: buffers that hold the inputs. `decoded`: small tables, shared between bindings of one plan.

        `last` int64 [B]: holds the one token of each row whose logits are asked for, [B, 1, V].
        """
        self.last = last
        self.plan, self.inputs, self.cache = plan, dict(inputs), cache
        self.outputs: Mapping[str, torch.Tensor] = {}
        self._made: list[Callable[[], Any]] = []
        self._decoded = decoded
        self._pool = Pool(plan.device)
        self._values: dict[fx.Node, Any] = {}
        self._unread = {node: len(node.users) for node in plan.program.graph.nodes}
        self._holders: dict[int, int] = {}  # nodes whose value lies in the block at an address
        self._metas: dict[Any, Any] = {}
        self._fixed = {t.untyped_storage().data_ptr() for t in (*inputs.values(), *decoded.values())}
        self._leads: dict[fx.Node, tuple[int, ...]] = {}  # of activations that are codes: the shape but for columns
        self._logits = _logits(plan.program.graph, [region for region, _ in plan.regions])
        self.chooser: Chooser | TritonChooser | None = None
        self._here: tuple[int, int, int] | None = None  # where the last step's cache and tokens lay
        self.alone = True  # whether the calls of a step need nobody to count the cache's tokens between two of them
        self._starts = {region.at: (region, kernel) for region, kernel in plan.regions}
        self._inside = {node: region for region, _ in plan.regions for node in region.nodes}
        _pack(plan)
        for node in plan.program.graph.nodes:
            self._bind(node)
        self._values.clear()
        self.calls = _units(self._made)
        if cache is not None and plan.target == "cpp":
            cache.keep = cache.keep if isinstance(cache.keep, CloseUp) else CloseUp()
            for segments in cache.segments.values():
                segments.sums = column_sums

    @property
    def nbytes(self) -> int:
        """Bytes of the planned buffers."""
        return self._pool.allocated

    def run(self) -> None:
        """One step."""
        step = self.cache.step if self.cache is not None else None
        here = None if self.cache is None or step is None else (self.cache.generation, *step.addresses)
        moved, self._here = here is None or here != self._here, None
        for call in self.calls:
            call(moved) if isinstance(call, Unit) else call()
        self._here = here  # who is refused finds nothing in its place

    def again(self) -> None:
        """One step more over a cache whose buffers stayed where they are."""
        for call in self.calls:
            call.again() if isinstance(call, Unit) else call()

    def _bind(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self._values[node] = self.inputs[str(node.target)]
        elif node.op == "get_attr":
            self._values[node] = None  # a kernel takes the weight itself; others ask _table
        elif node.op == "output":
            named = cast("dict[str, fx.Node]", node.args[0])
            self.outputs = {name: self._of_node(value) for name, value in named.items()}
        elif node in self._starts:
            self._fused(*self._starts[node])
        elif node not in self._inside:
            with self._last_only((node,)):
                self._values[node] = self._computed(node)
            self._hold(node)
            self._release(node)

    def _hold(self, node: fx.Node) -> None:
        for at in _addresses(self._values[node]):
            self._holders[at] = self._holders.get(at, 0) + 1

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
        self._drop(dead)

    def _drop(self, dead: list[fx.Node]) -> None:
        for gone in dead:
            for at, storage in _addresses(self._values[gone]).items():
                self._holders[at] -= 1
                if not self._holders[at] and at not in self._fixed:
                    self._pool.give(storage)

    def _of_node(self, node: fx.Node) -> Any:
        return self._table(str(node.target)) if node.op == "get_attr" else self._values[node]

    def _fused(self, region: Region, kernel: Any) -> None:
        """The call of a region; its members' values but its outputs never exist."""
        members = set(region.nodes)
        spare: list[torch.Tensor] = []
        known: dict[fx.Node, Any] = {}

        def value(node: fx.Node) -> Any:
            """An operand, copied where it does not lie as kernels read it: once, whoever asks."""
            if node not in known:
                known[node] = x = self._of_node(node)
                rows = region.kind == "pointwise" and row_stride(x) >= 0
                if isinstance(x, torch.Tensor) and not x.is_contiguous() and not rows:
                    known[node] = self._copy(x)
                    spare.append(known[node])
            return known[node]

        with self._last_only(region.nodes):
            self._call(region, kernel, value, spare)
        for node in region.outputs:
            self._hold(node)
        self._return(spare)
        dead = [node for node in region.outputs if not node.users]
        for used in (used for node in region.nodes for used in node.all_input_nodes):
            self._unread[used] -= 1
            if used not in members and not self._unread[used] and used.op == "call_function":
                dead.append(used)
        self._drop(dead)

    def _call(self, region: Region, kernel: Any, value: Callable[[fx.Node], Any], spare: list[torch.Tensor]) -> None:
        """Take the outputs of a region and bind its kernel."""
        if isinstance(kernel, QuantizeKernel):
            self._note(self._rounded(region, kernel, value, spare), region.at)
        else:
            outs = {chain.output: self._pool.take(torch.empty(self._shape(kernel, chain, value), device="meta"))
                    for chain in region.chains}  # fmt: skip
            self._values.update(outs)
            made = kernel.bind(value, outs)
            self._note(made, region.at)
            if isinstance(kernel, ProductKernel) and kernel.head and self._logits and self.last is None and self.cache:
                inputs = self.inputs["positions"], self.inputs["tokens"]
                self.chooser = chooser = Chooser(made, *inputs, ranks=threads())
                self._note(chooser.call, region.at)

    @contextmanager
    def _last_only(self, nodes: Sequence[fx.Node]) -> Iterator[None]:
        """Where only the last tokens' logits are asked for, these nodes read the rows [B, 1, …] of those tokens."""
        if self.last is None or self._logits is None or self._logits[1] not in nodes:
            yield
            return
        source, _ = self._logits
        whole = self._values[source]
        x = whole if whole.is_contiguous() else self._copy(whole)
        self._values[source] = out = self._pool.take(
            torch.empty(x.shape[0], 1, *x.shape[2:], dtype=x.dtype, device="meta")
        )
        self._note(self._picked(x.flatten(2), self.last, out.flatten(2)), source)
        yield
        self._values[source] = whole
        self._return([out] if x is whole else [out, x])

    def _shape(self, kernel: Any, chain: Chain, value: Callable[[fx.Node], Any]) -> tuple[int, ...]:
        if isinstance(kernel, ProductKernel):
            x = arguments(chain.products[0])["x"]
            return (*(self._leads.get(x) or value(x).shape[:-1]), kernel.width(chain))
        full = [x.shape for x in map(value, kernel.operands) if x.dim() > 1] or [value(kernel.operands[0]).shape]
        return tuple(full[0])

    def _rounded(
        self, region: Region, kernel: QuantizeKernel, value: Callable[[fx.Node], Any], spare: list[torch.Tensor]
    ) -> Call:
        x = value(arguments(region.nodes[0])["x"])
        rows, columns = x.numel() // x.shape[-1], x.shape[-1]
        likes = Codes.shapes(rows, columns, cast(int, region.width))
        out = Codes(*(self._pool.take(torch.empty(shape, dtype=dtype, device="meta")) for shape, dtype in likes))
        self._leads[region.at] = tuple(x.shape[:-1])
        self._values[region.at] = out
        if len(region.nodes) > 1:
            spare.append(self._pool.take(x.to("meta")))
        return kernel.bind(value, out, spare[-1] if len(region.nodes) > 1 else None)

    def _copy(self, x: torch.Tensor) -> torch.Tensor:
        """A contiguous copy, refreshed on every step."""
        copy = self._pool.take(torch.empty(x.shape, dtype=x.dtype, device="meta"))
        self._made.append(self._copied(x, copy))
        return copy

    def _copied(self, x: torch.Tensor, out: torch.Tensor) -> Callable[[], Any]:
        """A call that copies x of any strides to the contiguous `out`."""
        return copied(x, out) or partial(out.copy_, x)

    def _picked(self, x: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> Callable[[], Any]:
        """A call that copies x[b, index[b]] of a contiguous x [B, T, K] to out [B, 1, K]."""
        return picked(x, index, out)

    def _table(self, name: str) -> torch.Tensor:
        """A small weight decoded once, shared by every binding of a session."""
        if name not in self._decoded:
            self._decoded[name] = self.plan.program.weights[name].dense().contiguous()
        self._fixed.add(self._decoded[name].untyped_storage().data_ptr())
        return self._decoded[name]

    def _kernel(self, node: fx.Node) -> Any:
        choice = self.plan.choices[node.name]
        kernel = choice.kernel
        args = self._arguments(node)
        spare = self._copies(kernel, args)
        meta = _on_meta(node.target, args, self._metas)
        out = self._pool.take(meta) if isinstance(meta, torch.Tensor) else tuple(self._pool.take(m) for m in meta)
        self._note(kernel.bind(args, out), node)
        self._return(spare)
        return out

    def _note(self, made: Callable[[], Any], node: fx.Node) -> None:
        if isinstance(made, Call):
            made.node = node.name
        self._made.append(made)

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
            args[name] = self._copy(args[name])
            spare.append(args[name])
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
        for made in kernel.attend(self.cache, args, out):
            self.alone &= isinstance(made, Call)  # the reference counts on the host
            self._note(made, node)
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
        out = self._pool.take(torch.empty(result.shape, dtype=result.dtype, device="meta"))
        whole = out.view(args[0].shape)
        self._made.append(self._copied(args[0], whole))
        return out


def binding(plan: Plan) -> type[Bound]:
    """The class that binds a plan of its target; a CPU need not import what is for GPUs."""
    if plan.target != "triton":
        return Bound
    from .bound_triton import TritonBound

    return TritonBound


def _pack(plan: Plan) -> None:
    """Pack all weights that are not yet, side by side: most of the time goes into pages that the system hands out."""
    kernels = [kernel for _, kernel in plan.regions if isinstance(kernel, ProductKernel)]
    with ThreadPoolExecutor(threads()) as pool:
        list(pool.map(ProductKernel.pack, kernels))


def _units(made: list[Callable[[], Any]]) -> list[Callable[[], Any]]:
    """The calls in order, with neighbouring calls of generated functions as one unit."""
    out: list[Callable[[], Any]] = []
    for generated, neighbours in groupby(made, key=lambda each: isinstance(each, Call)):
        calls = list(neighbours)
        out += [Unit(cast("list[Call]", calls))] if generated else calls
    return out


def _logits(graph: fx.Graph, regions: Sequence[Region]) -> tuple[fx.Node, fx.Node] | None:
    """(activations, their reader): from that reader on, nodes do nothing but compute logits, each row by itself."""
    heads = [r for r in regions if r.kind == "product" and all(is_op(p, HEAD) for c in r.chains for p in c.products)]
    read = {user.op for region in heads for node in region.outputs for user in node.users}
    if len(heads) != 1 or read != {"output"}:
        return None
    (reader,) = heads[0].chains[0].products
    source: fx.Node = arguments(reader)["x"]
    while is_op(source, RMS_NORM, LAYER_NORM, QUANTIZED) and len(source.users) == 1:
        reader, source = source, arguments(source)["x"]
    return source, reader


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
