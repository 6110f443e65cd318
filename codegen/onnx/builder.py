"""Builds one ONNX graph: unique names, equal nodes and constants once, large tensors kept out of the protobuf."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import sympy
import torch

from ...ir.errors import SmeltError

OPSET, IR_VERSION = 26, 13  # the newest that onnxruntime 1.31 loads; onnx 1.23's reference evaluator runs it too
CONTRIB = "com.microsoft"

Dim: TypeAlias = "int | str | sympy.Expr"


@dataclass(frozen=True)
class Value:
    """A tensor in the graph. `shape` holds ints and sympy expressions; None where a form did not say.

    `weight`: the Program's weight that it reads; its `name` is empty until `Builder.name` decodes it.
    """

    name: str
    shape: tuple[Any, ...] | None = None
    dtype: torch.dtype = torch.float32
    weight: str | None = None


Operand: TypeAlias = Value | str | None


@dataclass(frozen=True)
class Tensor:
    """An initialiser: its ONNX type, its dims, and how to read its bytes when they are written."""

    name: str
    kind: int
    dims: tuple[int, ...]
    nbytes: int
    read: Callable[[], bytes]


@dataclass
class Builder:
    """Collects the nodes, initialisers, inputs and outputs of one graph, in order.

    `decode` turns a weight into a float32 value of the graph where a form does not read it in its own way.
    `shared` belongs to styles and forms: what they make once for the graph.
    """

    name: str
    decode: Callable[[Builder, str], str]
    nodes: list[Any] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    inputs: list[Any] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    shared: dict[Any, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    domains: set[str] = field(default_factory=lambda: {""})
    scope: str = ""  # the Program's node that is being written; names of new values begin with it
    _made: dict[Hashable, tuple[str, ...]] = field(default_factory=dict)
    _taken: set[str] = field(default_factory=set)

    def op(
        self,
        kind: str,
        *operands: Operand,
        outputs: int = 1,
        name: str | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> Any:
        """Add a node and return the name of its output, or a tuple of names; an equal node is not made twice.

        An operand that is None is left out. `name` fixes the name of a single output.
        """
        from onnx import helper

        inputs = [self.name_of(operand) for operand in operands]
        while inputs and not inputs[-1]:
            inputs.pop()
        attributes = {key: value for key, value in attributes.items() if value is not None}
        key = (kind, domain, tuple(inputs), outputs, repr(sorted(attributes.items())))
        if name is None and key in self._made:
            made = self._made[key]
            return made if outputs > 1 else made[0]
        names = (
            (name,)
            if name
            else tuple(self.fresh(f"{self.scope}/{kind}" if self.scope else kind) for _ in range(outputs))
        )
        if name:
            self._take(name)
        self.nodes.append(
            helper.make_node(kind, inputs, list(names), name=f"{names[0]}:{kind}", domain=domain, **attributes)
        )
        self.domains.add(domain)
        self._made.setdefault(key, names)
        return names if outputs > 1 else names[0]

    def fresh(self, hint: str) -> str:
        """A name that nothing has yet."""
        name, count = hint, 1
        while name in self._taken:
            count += 1
            name = f"{hint}_{count}"
        self._taken.add(name)
        return name

    def name_of(self, operand: Operand) -> str:
        """The name that a node reads; a weight is decoded to float32 on its first use."""
        if operand is None:
            return ""
        if isinstance(operand, str):
            return operand
        return self.decode(self, operand.weight) if operand.weight is not None else operand.name

    def const(self, value: Any, dtype: Any = None) -> str:
        """A small constant: a number, a list or an array; ints are int64, floats float32."""
        array = np.asarray(value)
        if dtype is None:
            dtype = (
                {"i": np.int64, "u": np.int64, "f": np.float32, "b": np.bool_}[array.dtype.kind]
                if not isinstance(value, np.ndarray)
                else array.dtype
            )
        array = np.ascontiguousarray(array.astype(dtype)).reshape(array.shape)
        return self.array("const", array)

    def array(self, hint: str, array: np.ndarray[Any, Any]) -> str:
        """An initialiser of numpy values; one of equal type, dims and bytes is made once."""
        from onnx import helper

        data = array.tobytes()
        digest = hashlib.sha256(data).digest()
        key = ("array", array.dtype.str, array.shape, digest)
        if key not in self._made:
            name = self.fresh(hint)
            kind = int(helper.np_dtype_to_tensor_dtype(array.dtype))
            self.tensors[name] = Tensor(name, kind, tuple(array.shape), len(data), lambda: data)
            self._made[key] = (name,)
        return self._made[key][0]

    def tensor(self, hint: str, kind: int, dims: Sequence[int], nbytes: int, read: Callable[[], bytes]) -> str:
        """An initialiser of any ONNX type, whose bytes are read only when the model is written."""
        name = self.fresh(hint)
        self.tensors[name] = Tensor(name, kind, tuple(dims), nbytes, read)
        return name

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` returns, made on the first call with this key."""
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]

    def input(self, name: str, kind: int, dims: Sequence[Dim]) -> str:
        """A graph input; names of sizes are symbols, equal wherever they stand."""
        from onnx import helper

        self._take(name)
        self.inputs.append(helper.make_tensor_value_info(name, kind, [_dim(d) for d in dims]))
        return name

    def output(self, name: str, value: Operand, kind: int, dims: Sequence[Dim]) -> None:
        """A graph output `name` that is `value`."""
        from onnx import helper

        self.op("Identity", value, name=name)
        self.outputs.append(helper.make_tensor_value_info(name, kind, [_dim(d) for d in dims]))

    def note(self, text: str) -> None:
        """A remark for the manifest and whoever exports; said once."""
        if text not in self.notes:
            self.notes.append(text)

    def _take(self, name: str) -> None:
        if name in self._taken:
            raise SmeltError(f"{self.name}: the name '{name}' stands for two values of the exported graph")
        self._taken.add(name)


def _dim(size: Dim) -> int | str:
    """An int, or a symbol or formula in words."""
    if isinstance(size, sympy.Expr):
        return int(size) if size.is_Integer else str(size)
    return size


def onnx_type(dtype: torch.dtype) -> int:
    """The ONNX element type of a torch dtype."""
    from onnx import TensorProto

    names = {
        torch.float32: "FLOAT", torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16", torch.float64: "DOUBLE",
        torch.int64: "INT64", torch.int32: "INT32", torch.int16: "INT16", torch.int8: "INT8", torch.uint8: "UINT8",
        torch.bool: "BOOL",
    }  # fmt: skip
    return int(getattr(TensorProto, names[dtype]))
