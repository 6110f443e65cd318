"""ATen's views, joins, slices and lookups."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

from ...ir.errors import SmeltError
from .builder import Builder, Value
from .form_pointwise import typed
from .forms import Given, form
from .sizes import reshaped, shape, size_of

END = np.iinfo(np.int64).max


def _at(dim: int, x: Value) -> int:
    assert x.shape is not None
    return dim % len(x.shape)


@form("aten.sym_size.int")
def sym_size(b: Builder, node: fx.Node, a: Given) -> str:
    """A size, [1]."""
    return size_of(b, a["self"], _at(a["dim"], a["self"]))


@form(
    "aten.view.default",
    "aten.reshape.default",
    "aten._unsafe_view.default",
    "aten.flatten.using_ints",
    "aten.unflatten.int",
    "aten.view_as.default",
)
def view(b: Builder, node: fx.Node, a: Given) -> str:
    """The same values in another shape."""
    x = a["self"]
    asked = a.get("size", a.get("shape"))
    wanted = node.meta["shape"]
    if asked is None or len(asked) != len(wanted) or isinstance(asked, Value):
        asked = [size if isinstance(size, int) else -1 for size in wanted]
    return reshaped(b, x, asked, wanted)


@form("aten.transpose.int", "aten.t.default", "aten.permute.default", "aten.numpy_T.default", "aten.mT.default")
def permute(b: Builder, node: fx.Node, a: Given) -> str:
    """Dims in another order."""
    x, rank = a["self"], len(a["self"].shape)
    if "dims" in a:
        order = [dim % rank for dim in a["dims"]]
    else:
        first, second = (_at(a["dim0"], x), _at(a["dim1"], x)) if "dim0" in a else (max(rank - 2, 0), rank - 1)
        order = list(range(rank))
        order[first], order[second] = order[second], order[first]
    return str(b.op("Transpose", x, perm=order))


@form("aten.unsqueeze.default")
def unsqueeze(b: Builder, node: fx.Node, a: Given) -> str:
    """A dim of size 1."""
    return str(b.op("Unsqueeze", a["self"], b.const([a["dim"] % (len(a["self"].shape) + 1)])))


@form("aten.squeeze.dim", "aten.squeeze.dims", "aten.squeeze.default")
def squeeze(b: Builder, node: fx.Node, a: Given) -> str:
    """Without the dims of size 1 among those named."""
    x = a["self"]
    named = a.get("dim")
    dims = range(len(x.shape)) if named is None else [named] if isinstance(named, int) else named
    gone = sorted({_at(dim, x) for dim in dims if x.shape[_at(dim, x)] == 1})
    return str(b.op("Squeeze", x, b.const(gone))) if gone else b.name_of(x)


@form("aten.expand.default", "aten.expand_as.default", "aten.broadcast_to.default")
def expand(b: Builder, node: fx.Node, a: Given) -> str:
    """Sizes of 1 repeated; -1 keeps a size."""
    if "size" not in a:
        return str(b.op("Expand", a["self"], b.op("Shape", a["other"])))
    sizes = [1 if isinstance(size, int) and size == -1 else size for size in a["size"]]
    return str(b.op("Expand", a["self"], shape(b, sizes)))


@form("aten.repeat.default")
def repeat(b: Builder, node: fx.Node, a: Given) -> str:
    """The tensor laid side by side."""
    x, times = a["self"], a["repeats"]
    more = len(times) - len(x.shape)
    lifted = b.op("Unsqueeze", x, b.const(list(range(more)))) if more else x
    return str(b.op("Tile", lifted, shape(b, times)))


@form("aten.repeat_interleave.self_int")
def repeat_interleave(b: Builder, node: fx.Node, a: Given) -> str:
    """Every entry of a dim `repeats` times in a row."""
    x, dim, times = a["self"], a["dim"], a["repeats"]
    if dim is None or not isinstance(times, int):
        raise SmeltError(f"{b.name}: %{node.name}: repeat_interleave exports with a dim and a fixed count")
    at, rank = _at(dim, x), len(x.shape)
    apart = b.op("Unsqueeze", x, b.const([at + 1]))
    wide = b.op("Expand", apart, b.const([1] * (at + 1) + [times] + [1] * (rank - at - 1)))
    merged = [0] * at + [-1]
    if at + 1 < rank:  # what lies behind cannot be copied from where it stood: it has moved by one
        behind = [
            size if isinstance(size, int) else size_of(b, x, at + 1 + k) for k, size in enumerate(x.shape[at + 1 :])
        ]
        return str(b.op("Reshape", wide, shape(b, [*merged, *behind])))
    return str(b.op("Reshape", wide, b.const(merged)))


@form("aten.cat.default", "aten.concat.default")
def cat(b: Builder, node: fx.Node, a: Given) -> str:
    """Tensors one behind the other."""
    parts = [part for part in a["tensors"] if part.shape != (0,)]
    return str(b.op("Concat", *[typed(b, part, node.meta["dtype"]) for part in parts], axis=_at(a["dim"], parts[0])))


@form("aten.stack.default")
def stack(b: Builder, node: fx.Node, a: Given) -> str:
    """Tensors along a new dim."""
    at = a["dim"] % len(node.meta["shape"])
    parts = [b.op("Unsqueeze", typed(b, part, node.meta["dtype"]), b.const([at])) for part in a["tensors"]]
    return str(b.op("Concat", *parts, axis=at))


@form("aten.slice.Tensor", "aten.narrow.default")
def slice_(b: Builder, node: fx.Node, a: Given) -> str:
    """A range of one dim."""
    x, at = a["self"], _at(a["dim"], a["self"])
    start = a["start"] if a["start"] is not None else 0
    end, step = a.get("end"), a.get("step", 1)
    if "length" in a:
        end = (
            start + a["length"]
            if isinstance(start, int) and isinstance(a["length"], int)
            else b.op("Add", shape(b, [start]), shape(b, [a["length"]]))
        )
    end = END if end is None else end
    if (start, end, step) == (0, END, 1):
        return b.name_of(x)
    return str(b.op("Slice", x, shape(b, [start]), shape(b, [end]), b.const([at]), shape(b, [step])))


@form("aten.select.int")
def select(b: Builder, node: fx.Node, a: Given) -> str:
    """One entry of a dim."""
    index = a["index"]
    at = b.const(np.array(index, np.int64)) if isinstance(index, int) else b.op("Squeeze", index)
    return str(b.op("Gather", a["self"], at, axis=_at(a["dim"], a["self"])))


@form("aten.split.Tensor", "aten.chunk.default", "aten.split_with_sizes.default", "aten.split.sizes", "aten.unbind.int")
def split(b: Builder, node: fx.Node, a: Given) -> tuple[str, ...]:
    """Pieces of one dim, of fixed sizes."""
    x, at = a["self"], _at(a["dim"], a["self"])
    shapes = node.meta["shape"]
    if "unbind" in str(node.target):
        return tuple(b.op("Gather", x, b.const(np.array(k, np.int64)), axis=at) for k in range(len(shapes)))
    sizes = [piece[at] for piece in shapes]
    if not all(isinstance(size, int) for size in sizes):
        raise SmeltError(f"{b.name}: %{node.name}: splits a dim whose size is not fixed")
    made = b.op("Split", x, b.const(sizes), axis=at, outputs=len(sizes))
    return tuple(made) if len(sizes) > 1 else (made,)


@form("operator.getitem")
def getitem(b: Builder, node: fx.Node, a: Given) -> Any:
    """One result of a node that has several."""
    return a["0"][a["1"]]


@form("aten.index_select.default", "aten.embedding.default", "aten.gather.default")
def lookup(b: Builder, node: fx.Node, a: Given) -> str:
    """Entries by index."""
    if "weight" in a:
        return str(b.op("Gather", a["weight"], a["indices"]))
    kind = "GatherElements" if "gather" in str(node.target) else "Gather"
    return str(b.op(kind, a["self"], a["index"], axis=_at(a["dim"], a["self"])))


@form("aten.index.Tensor")
def index(b: Builder, node: fx.Node, a: Given) -> str:
    """One tensor of indices, in any dim; several in the first dims."""
    x, at = a["self"], [k for k, value in enumerate(a["indices"]) if value is not None]
    given = [a["indices"][k] for k in at]
    if len(at) == 1 and given[0].dtype != torch.bool:
        return str(b.op("Gather", x, typed(b, given[0], torch.int64), axis=at[0]))
    if at != list(range(len(at))) or any(value.dtype == torch.bool for value in given):
        raise SmeltError(f"{b.name}: %{node.name}: indexing by masks, or behind a whole dim, has no ONNX form yet")
    zero: Any = b.const(0)  # takes the shape that all indices have together
    for value in given:
        zero = b.op("Add", zero, b.op("Mul", typed(b, value, torch.int64), b.const(0)))
    parts = [b.op("Unsqueeze", b.op("Add", typed(b, v, torch.int64), zero), b.const([-1])) for v in given]
    return str(b.op("GatherND", x, b.op("Concat", *parts, axis=-1)))


@form("aten.arange.default", "aten.arange.start", "aten.arange.start_step")
def arange(b: Builder, node: fx.Node, a: Given) -> str:
    """Numbers from start to end."""
    dtype = node.meta["dtype"]

    def scalar(value: Any) -> str:
        if isinstance(value, Value):
            return str(b.op("Squeeze", typed(b, value, dtype)))
        return typed(b, value, dtype)

    return str(b.op("Range", scalar(a.get("start", 0)), scalar(a["end"]), scalar(a.get("step", 1))))


@form(
    "aten.full.default",
    "aten.zeros.default",
    "aten.ones.default",
    "aten.scalar_tensor.default",
    "aten.full_like.default",
    "aten.zeros_like.default",
    "aten.ones_like.default",
    "aten.new_zeros.default",
    "aten.new_ones.default",
    "aten.new_full.default",
)
def full(b: Builder, node: fx.Node, a: Given) -> str:
    """One number everywhere."""
    kind = str(node.target).split(".")[1]
    number = 0 if "zeros" in kind else 1 if "ones" in kind else a["s"] if kind == "scalar_tensor" else a["fill_value"]
    value = typed(b, number, node.meta["dtype"])
    if kind == "scalar_tensor":
        return value
    sizes = b.op("Shape", a["self"]) if kind.endswith("_like") else shape(b, a["size"])
    return str(b.op("Expand", value, sizes))


@form("aten.tril.default", "aten.triu.default")
def triangle(b: Builder, node: fx.Node, a: Given) -> str:
    """The part of a matrix below or above a diagonal."""
    upper = int("triu" in str(node.target))
    return str(b.op("Trilu", a["self"], b.const(np.array(a["diagonal"], np.int64)), upper=upper))


@form("aten.constant_pad_nd.default", "aten.pad.default")
def pad(b: Builder, node: fx.Node, a: Given) -> str:
    """Padding of the last dims by a number; negative widths cut."""
    if a.get("mode", "constant") != "constant":
        raise SmeltError(f"{b.name}: %{node.name}: padding of mode {a['mode']} has no ONNX form yet")
    widths, rank = a["pad"], len(a["self"].shape)
    before, after = [0] * rank, [0] * rank
    for k in range(len(widths) // 2):
        before[rank - 1 - k], after[rank - 1 - k] = widths[2 * k], widths[2 * k + 1]
    value = typed(b, a.get("value") or 0, node.meta["dtype"])
    return str(b.op("Pad", a["self"], b.const(before + after), value))


@form("aten.flip.default", "aten.roll.default")
def flip(b: Builder, node: fx.Node, a: Given) -> str:
    """Dims in reverse, or turned around by a fixed count."""
    x = a["self"]
    if "shifts" not in a:
        dims = [_at(dim, x) for dim in a["dims"]]
        count = len(dims)
        return str(
            b.op("Slice", x, b.const([-1] * count), b.const([-END] * count), b.const(dims), b.const([-1] * count))
        )
    value: Any = x
    for shift, dim in zip(a["shifts"], a["dims"], strict=True):
        at = b.const([_at(dim, x)])
        behind = b.op("Slice", value, b.const([-shift]), b.const([END]), at)
        value = b.op("Concat", behind, b.op("Slice", value, b.const([0]), b.const([-shift]), at), axis=_at(dim, x))
    return str(value)
