"""The Triton GEMV: right in the interpreter at ragged shapes, and compiled for sm_80 and sm_90 without a spill.

Triton decides at its import whether it interprets, so both modes run in a process of their own: this file as a script.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from smelt.codegen import gemv_triton
from smelt.ir.encoding import Affine, Dense, Encoding
from smelt.ir.errors import SmeltError

pytest.importorskip("triton", reason="triton is not installed")

ENCODINGS: list[Encoding] = [
    Dense("float32"),
    Dense("float16"),
    Affine(4, 64),
    Affine(8, 0),
    Affine(2, 64, zero=True),
    Affine(4, 3, "channel", zero=True, scale="float32"),
]
COMPILED: list[Encoding] = [Dense("float16"), Affine(4, 64), Affine(2, 64, zero=True)]
MUTANT = "mutant"
REGISTERS = 128  # 4 warps of such a kernel still fill an SM to half
TOLERANCE = 2e-7  # of the sum of |x| times the greatest |w|, as for the C++ kernel


def interpret() -> dict[str, float]:
    """Greatest error by encoding, over ragged M and N, with and without bias."""
    worst: dict[str, float] = {}
    for encoding in ENCODINGS:
        kernel = gemv_triton.kernel(encoding)
        worst[str(encoding)] = max(_error(kernel, encoding, m, rows) for m, rows in ((1, 63), (3, 129)))
    text = gemv_triton.source(Affine(4, 64))
    mutant = gemv_triton.load(text.replace(" & 15", " & 7"), "gemv").gemv
    assert text.count(" & 15") == 1
    worst[MUTANT] = _error(mutant, Affine(4, 64), 3, 63)
    return worst


def _error(kernel: Any, encoding: Encoding, m: int, rows: int) -> float:
    generator = torch.Generator().manual_seed(m)
    w, x, bias = (torch.randn(shape, generator=generator) for shape in ((rows, 192), (m, 192), (rows,)))
    parts = encoding.encode(w)
    w = encoding.decode(parts, (rows, 192))
    size = x.abs().sum(-1, keepdim=True) * w.abs().amax(-1)
    worst = 0.0
    for each in (None, bias):
        out = torch.full((m, rows), float("nan"))
        gemv_triton.launch(kernel, parts, x, out, each, gemv_triton.Tile(16, 128))
        right = x.double() @ w.double().t() + (0 if each is None else each)
        worst = max(worst, float(((out - right).abs() / size).nan_to_num(nan=9.0).max()))
    return worst


def compile_ahead() -> dict[str, str]:
    """What cuobjdump says of every encoding and architecture."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tile, said = gemv_triton.Tile(), {}
    for encoding in COMPILED:
        for arch in (80, 90):
            source = ASTSource(
                gemv_triton.kernel(encoding),
                gemv_triton.signature(encoding, bias=True),
                {"HAS_BIAS": True, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k},
            )
            options = {"num_warps": tile.warps}
            compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
            cubin = Path(os.environ["SMELT_CACHE"]) / "kernel.cubin"
            cubin.write_bytes(compiled.asm["cubin"])
            tool = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
            said[f"{encoding} sm_{arch}"] = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    return said


def _script(mode: str, folder: Path) -> Any:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "SMELT_CACHE": str(folder),
        "TRITON_CACHE_DIR": str(folder / "triton-cache"),
        "TRITON_INTERPRET": "1" if mode == "interpret" else "0",
        "TRITON_DEFAULT_FP_FUSION": "1",
    }
    done = subprocess.run([sys.executable, __file__, mode], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    result: dict[str, float] = _script("interpret", tmp_path_factory.mktemp("interpret"))
    return result


@pytest.fixture(scope="module")
def usage(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    import triton

    for tool in ("ptxas", "cuobjdump"):
        try:
            getattr(triton.knobs.nvidia, tool).path  # noqa: B018 - the look-up raises
        except (RuntimeError, AttributeError):
            pytest.skip(f"triton has no {tool}: nothing to assemble or to read a kernel with")
    result: dict[str, str] = _script("compile", tmp_path_factory.mktemp("compile"))
    return result


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_equals_the_reference_at_ragged_shapes(errors: dict[str, float], encoding: Encoding) -> None:
    assert errors[str(encoding)] < TOLERANCE


def test_a_wrong_mask_exceeds_the_tolerance(errors: dict[str, float]) -> None:
    assert errors[MUTANT] > 1000 * TOLERANCE


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("encoding", COMPILED, ids=str)
def test_compiles_without_a_spill(usage: dict[str, str], encoding: Encoding, arch: int) -> None:
    said = usage[f"{encoding} sm_{arch}"]
    assert "Function gemv" in said
    used = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", said)}
    assert used["STACK"] == used["LOCAL"] == 0
    assert used["REG"] <= REGISTERS and used["SHARED"] <= 48 * 1024


def test_the_source_is_one_kernel_with_the_encoding_spliced() -> None:
    text = gemv_triton.source(Affine(4, 64, zero=True))
    assert compile(text, "gemv", "exec") and text.count("@triton.jit") == 1
    assert "tl.load(zero + " in text and ".to(tl.int64) * BLOCK_N" in text
    assert list(gemv_triton.signature(Affine(4, 64), bias=False).values())[:2] == ["*u8", "*fp16"]


def test_integer_tables_are_not_covered() -> None:
    with pytest.raises(SmeltError, match="its values are int64"):
        gemv_triton.source(Dense("int64"))


if __name__ == "__main__":
    print(json.dumps(interpret() if sys.argv[1] == "interpret" else compile_ahead()))
