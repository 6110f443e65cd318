"""ATen's reductions, products, sorts, convolutions, pools and norms."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

from ...ir.errors import SmeltError
from .builder import Builder, Value, onnx_type
from .form_pointwise import typed
from .forms import Given, form

REDUCTIONS = {"sum": "ReduceSum", "mean": "ReduceMean", "amax": "ReduceMax", "amin": "ReduceMin", "prod": "ReduceProd",
              "logsumexp": "ReduceLogSumExp"}  # fmt: skip


@form(
    "aten.sum.dim_IntList",
    "aten.sum.default",
    "aten.mean.dim",
    "aten.mean.default",
    "aten.amax.default",
    "aten.amin.default",
    "aten.prod.dim_int",
    "aten.logsumexp.default",
)
def reduce(b: Builder, node: fx.Node, a: Given) -> str:
    """A reduction over some dims, or all."""
    x = a["self"]
    dims = a.get("dim")
    dims = [dims] if isinstance(dims, int) else dims
    over = b.const([dim % len(x.shape) for dim in dims]) if dims else None
    kind = REDUCTIONS[str(node.target).split(".")[1]]
    return str(b.op(kind, typed(b, x, node.meta["dtype"]), over, keepdims=int(a.get("keepdim", False))))


@form("aten.any.dim", "aten.all.dim", "aten.any.default", "aten.all.default")
def quantifier(b: Builder, node: fx.Node, a: Given) -> str:
    """Whether any, or all, hold."""
    x, dim = a["self"], a.get("dim")
    over = None if dim is None else b.const([dim % len(x.shape)])
    kind = "ReduceMax" if ".any." in str(node.target) else "ReduceMin"
    found = b.op(kind, typed(b, typed_bool(b, x), torch.uint8), over, keepdims=int(a.get("keepdim", False)))
    return str(b.op("Cast", found, to=onnx_type(torch.bool)))


def typed_bool(b: Builder, x: Value) -> Value:
    """A tensor as booleans."""
    return Value(typed(b, x, torch.bool), x.shape, torch.bool)


@form("aten.var.correction", "aten.var_mean.correction", "aten.std.correction")
def variance(b: Builder, node: fx.Node, a: Given) -> Any:
    """Mean of squared distances to the mean."""
    x, dims = a["self"], a["dim"]
    over = [dim % len(x.shape) for dim in (dims or range(len(x.shape)))]
    sizes = [x.shape[dim] for dim in over]
    if not all(isinstance(size, int) for size in sizes):
        raise SmeltError(
            f"{b.name}: %{node.name}: the variance over a dim whose size is not fixed has no ONNX form yet"
        )
    axes, keep = b.const(over), int(a["keepdim"])
    correction = 1 if a["correction"] is None else a["correction"]
    apart = b.op("Sub", x, b.op("ReduceMean", x, axes, keepdims=1))
    count = float(np.prod(sizes) - correction)
    made = b.op("Div", b.op("ReduceSum", b.op("Mul", apart, apart), axes, keepdims=keep), b.const(count))
    if ".std." in str(node.target):
        return str(b.op("Sqrt", made))
    return (made, b.op("ReduceMean", x, axes, keepdims=keep)) if "var_mean" in str(node.target) else str(made)


@form("aten.softmax.int", "aten._softmax.default", "aten.log_softmax.int", "aten._log_softmax.default")
def softmax(b: Builder, node: fx.Node, a: Given) -> str:
    """Softmax along a dim."""
    kind = "LogSoftmax" if "log" in str(node.target) else "Softmax"
    return str(b.op(kind, typed(b, a["self"], node.meta["dtype"]), axis=a["dim"] % len(a["self"].shape)))


@form("aten.cumsum.default")
def cumsum(b: Builder, node: fx.Node, a: Given) -> str:
    """Running sums."""
    at = b.const(np.array(a["dim"] % len(a["self"].shape), np.int64))
    return str(b.op("CumSum", typed(b, a["self"], node.meta["dtype"]), at))


@form("aten.topk.default", "aten.sort.default")
def topk(b: Builder, node: fx.Node, a: Given) -> tuple[str, ...]:
    """The largest or smallest values and where they stand."""
    x, at = a["self"], a["dim"] % len(a["self"].shape)
    count = a.get("k", x.shape[at])
    if not isinstance(count, int):
        raise SmeltError(f"{b.name}: %{node.name}: sorts a dim whose size is not fixed")
    largest = a.get("largest", a.get("descending", False))
    return tuple(b.op("TopK", x, b.const([count]), axis=at, largest=int(largest), sorted=1, outputs=2))


@form("aten.argmax.default", "aten.argmin.default")
def argmax(b: Builder, node: fx.Node, a: Given) -> str:
    """Where the largest or smallest value stands."""
    kind = "ArgMax" if "max" in str(node.target) else "ArgMin"
    x = a["self"]
    if a["dim"] is None:
        x = b.op("Reshape", x, b.const([-1]))
        return str(b.op(kind, x, axis=0, keepdims=0))
    return str(b.op(kind, x, axis=a["dim"] % len(x.shape), keepdims=int(a["keepdim"])))


@form("aten.matmul.default", "aten.bmm.default", "aten.mm.default")
def matmul(b: Builder, node: fx.Node, a: Given) -> str:
    """A matrix product, broadcast over what lies before."""
    left, right = list(a.values())[:2]
    return str(b.op("MatMul", left, right))


@form("aten.addmm.default", "aten.baddbmm.default")
def addmm(b: Builder, node: fx.Node, a: Given) -> str:
    """A matrix product on top of a tensor."""
    left, right = (a["mat1"], a["mat2"]) if "mat1" in a else (a["batch1"], a["batch2"])
    product: Any = b.op("MatMul", left, right)
    added: Any = a["self"]
    if a["alpha"] != 1:
        product = b.op("Mul", product, b.const(float(a["alpha"])))
    if a["beta"] != 1:
        added = b.op("Mul", added, b.const(float(a["beta"])))
    return str(b.op("Add", product, added))


@form(
    "aten.conv1d.default",
    "aten.conv2d.default",
    "aten.conv3d.default",
    "aten.convolution.default",
    "aten.conv2d.padding",
    "aten.conv1d.padding",
)
def convolution(b: Builder, node: fx.Node, a: Given) -> str:
    """A convolution, or a transposed one."""
    weight = a["weight"]
    rank = len(weight.shape) - 2

    def every(value: Any) -> list[int]:
        values = [value] if isinstance(value, int) else list(value)
        return values * rank if len(values) == 1 else values

    dilation, padding = every(a["dilation"]), a["padding"]
    attributes: dict[str, Any] = {"strides": every(a["stride"]), "dilations": dilation, "group": a["groups"]}
    if isinstance(padding, str):
        total = [d * (int(k) - 1) if padding == "same" else 0 for d, k in zip(dilation, weight.shape[2:], strict=True)]
        attributes["pads"] = [t // 2 for t in total] + [t - t // 2 for t in total]
    else:
        attributes["pads"] = every(padding) * 2
    if a.get("transposed"):
        return str(
            b.op(
                "ConvTranspose", a["input"], weight, a["bias"], output_padding=every(a["output_padding"]), **attributes
            )
        )
    return str(b.op("Conv", a["input"], weight, a["bias"], **attributes))


@form("aten.im2col.default")
def windows(b: Builder, node: fx.Node, a: Given) -> str:
    """Windows as rows: each channel convolved with kernels that pick one place of the window each."""
    channels, (height, width) = int(a["self"].shape[1]), a["kernel_size"]
    picks = np.eye(height * width, dtype=np.float32).reshape(-1, 1, height, width)
    attributes = {"strides": a["stride"], "dilations": a["dilation"], "pads": a["padding"] * 2, "group": channels}
    rows = b.op("Conv", a["self"], b.const(np.tile(picks, (channels, 1, 1, 1))), **attributes)
    return str(b.op("Reshape", rows, b.const([0, channels * height * width, -1])))


@form("aten.max_pool1d.default", "aten.max_pool2d.default", "aten.avg_pool1d.default", "aten.avg_pool2d.default")
def pool(b: Builder, node: fx.Node, a: Given) -> str:
    """The largest or mean value under a window."""
    rank = 1 if "1d" in str(node.target) else 2

    def every(value: Any) -> list[int]:
        values = [value] if isinstance(value, int) else list(value)
        return values * rank if len(values) == 1 else values

    kernel = every(a["kernel_size"])
    attributes: dict[str, Any] = {
        "kernel_shape": kernel,
        "strides": every(a["stride"]) if a["stride"] else kernel,
        "pads": every(a["padding"]) * 2,
        "ceil_mode": int(a["ceil_mode"]),
    }
    if "max_pool" in str(node.target):
        return str(b.op("MaxPool", a["self"], dilations=every(a["dilation"]), **attributes))
    if a.get("divisor_override"):
        raise SmeltError(f"{b.name}: %{node.name}: a mean by another count than the window's has no ONNX form")
    return str(b.op("AveragePool", a["self"], count_include_pad=int(a["count_include_pad"]), **attributes))


@form("aten.adaptive_avg_pool1d.default", "aten.adaptive_avg_pool2d.default")
def adaptive(b: Builder, node: fx.Node, a: Given) -> str:
    """The mean over everything, or over windows that tile a fixed size."""
    x, wanted = a["self"], list(a["output_size"])
    sizes = x.shape[-len(wanted) :]
    if all(size == 1 for size in wanted):
        return str(
            b.op("ReduceMean", x, b.const([len(x.shape) - len(wanted) + k for k in range(len(wanted))]), keepdims=1)
        )
    if not all(isinstance(s, int) and s % w == 0 for s, w in zip(sizes, wanted, strict=True)):
        raise SmeltError(f"{b.name}: %{node.name}: pools {list(sizes)} to {wanted}, which are not equal windows")
    kernel = [int(s) // w for s, w in zip(sizes, wanted, strict=True)]
    return str(b.op("AveragePool", x, kernel_shape=kernel, strides=kernel))


@form("aten.batch_norm.default", "aten._native_batch_norm_legit_no_training.default")
def batch_norm(b: Builder, node: fx.Node, a: Given) -> Any:
    """Normalisation by running statistics."""
    x, mean = a["input"], a["running_mean"]
    weight = a["weight"] if a["weight"] is not None else b.op("Expand", b.const(1.0), b.op("Shape", mean))
    bias = a["bias"] if a["bias"] is not None else b.op("Expand", b.const(0.0), b.op("Shape", mean))
    return str(b.op("BatchNormalization", x, weight, bias, mean, a["running_var"], epsilon=float(a["eps"])))


@form("aten.layer_norm.default", "aten.rms_norm.default")
def norm(b: Builder, node: fx.Node, a: Given) -> str:
    """Normalisation over the last dims."""
    dims = len(a["normalized_shape"])
    weight = (
        a["weight"]
        if a["weight"] is not None
        else b.const(np.ones([int(n) for n in a["normalized_shape"]], np.float32))
    )
    if "rms" in str(node.target):
        eps = a["eps"] if a["eps"] is not None else float(torch.finfo(torch.float32).eps)
        return str(b.op("RMSNormalization", a["input"], weight, axis=-dims, epsilon=eps))
    return str(b.op("LayerNormalization", a["input"], weight, a["bias"], axis=-dims, epsilon=float(a["eps"])))


@form("aten.group_norm.default")
def group_norm(b: Builder, node: fx.Node, a: Given) -> str:
    """Normalisation over groups of channels."""
    channels = int(a["input"].shape[1])
    weight = a["weight"] if a["weight"] is not None else b.const(np.ones(channels, np.float32))
    bias = a["bias"] if a["bias"] is not None else b.const(np.zeros(channels, np.float32))
    return str(
        b.op("GroupNormalization", a["input"], weight, bias, num_groups=a["num_groups"], epsilon=float(a["eps"]))
    )
