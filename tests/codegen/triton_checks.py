"""What the tests of Triton kernels share: the interpreter in a process of its own, and what a compiled kernel uses.

Triton decides at its import whether it interprets. Tests marked `interpreted` are skipped in the parent process and run
by `in_the_interpreter` in a child; tests marked `compiled` compile for GPUs that need not be there.
"""

import functools
import inspect
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from smelt.codegen.autotune_triton import Tile
from smelt.codegen.gemm_triton import TritonProduct
from smelt.codegen.product_triton import Product
from smelt.ir.ops.linear import ACTIVATIONS

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a child process, under TRITON_INTERPRET=1")
compiled = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
# halves round x, weights and results once each, and a gate multiplies two such values
TOLERANCE = {torch.float32: 5e-6, torch.float16: 6e-3, torch.bfloat16: 5e-2}


def _list_builtins_once() -> None:
    """The interpreter lists all of Triton's language for each launch and call: a third of its time."""
    from triton.runtime import interpreter

    @functools.cache
    def builtins(package: Any) -> list[tuple[str, Any]]:
        members = inspect.getmembers(package)
        return [(name, member) for name, member in members if interpreter.tl.core.is_builtin(member)]

    def patch(package: Any, builder: Any, scope: Any) -> None:
        for name, member in builtins(package):
            if getattr(package, name) is member:  # else a launch stands in for it, whose kernel calls a function
                interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_builtin = patch


if INTERPRETED:
    _list_builtins_once()


def in_the_interpreter(file: str) -> None:
    """Run the interpreted tests of a file; fails with what pytest said."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not gpu", file]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout[-4000:]
    assert " passed" in result.stdout, "the child process ran no test"


@dataclass(frozen=True)
class Usage:
    """What one thread and one block of a compiled kernel take; spilled: bytes of local memory."""

    registers: int
    spilled: int
    shared: int


def usage(
    kernel: Any, signature: dict[str, str], constants: dict[str, Any], tile: Tile, capability: int, folder: Path
) -> Usage:
    """Compile for a capability as a launch on aligned tensors would, and read the machine code's needs."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name in ("N", "K") or name.endswith(("_row", "_page", "_h", "_t"))
    }
    absent = {name: None for name, kind in signature.items() if kind == "constexpr" and name not in constants}
    made = triton.compile(
        ASTSource(kernel, signature, absent | constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": tile.warps, "num_stages": tile.stages},
    )
    (folder / "kernel.cubin").write_bytes(made.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("triton has no cuobjdump: nothing to read a kernel with")
    dump = [tool, "--dump-resource-usage", folder / "kernel.cubin"]
    said = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    used = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said)}
    return Usage(used["REG"], used["STACK"] + used["LOCAL"], made.metadata.shared)


def product_error(
    product: Product,
    shape: tuple[int, int, int],
    dtype: torch.dtype = torch.float32,
    tile: Tile | None = None,
    extras: bool = True,
    device: str = "cpu",
    kernels: TritonProduct | None = None,
) -> float:
    """The greatest error of a product [m, n, k] against float64, relative to a value and to the mean size of values.

    extras: with bias and residual, and the norm with a weight. x and out have rows that lie apart; out is NaN before.
    """
    m, n, k = shape
    generator = torch.Generator().manual_seed(m)
    gate, up, x, gain = (torch.randn(size, generator=generator) for size in ((n, k), (n, k), (m, k + 3), (k,)))
    bias, residual = torch.randn(n, generator=generator), torch.randn(m, n + 5, generator=generator)
    x, gain, bias, residual = (each.to(device, dtype) for each in (x, gain, bias, residual))
    x, residual = x[:, :k], residual[:, :n]
    out = torch.full((m, n + 5), float("nan"), dtype=dtype, device=device)[:, :n]
    parts = {part: tensor.to(device) for part, tensor in product.encoding.encode(gate).items()}
    up_parts = product.up and {part: tensor.to(device) for part, tensor in product.up.encode(up).items()}
    (kernels or TritonProduct(product))(
        parts, x, out, up=up_parts, eps=1e-5 if product.norm else 0.0, offset=0.5 if product.norm else 0.0, tile=tile,
        gain=gain if product.norm and extras else None, bias=bias if extras else None,
        residual=residual if extras else None,
    )  # fmt: skip
    right = x.double()
    if product.norm:
        right = right * torch.rsqrt(right.square().mean(-1, keepdim=True) + 1e-5)
        right = right * ((gain.double() if extras else 1.0) + 0.5)
    value = right @ product.encoding.decode(parts, (n, k)).double().t() + (bias.double() if extras else 0)
    value = ACTIVATIONS[product.act](value) if product.act else value
    if product.up is not None and up_parts is not None:
        value = value * (right @ product.up.decode(up_parts, (n, k)).double().t())
    value = value + (residual.double() if extras else 0)
    error = (out.double() - value).abs() / (value.abs() + value.abs().mean())
    return float(error.nan_to_num(nan=9.0).max())
