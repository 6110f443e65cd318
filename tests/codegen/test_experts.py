"""Routed experts: equal to the reference for every routing and encoding, and every row by itself."""

import pytest
import torch

from smelt.codegen.experts import ExpertsKernel, covers
from smelt.ir.encoding import Affine, Dense, Encoding
from smelt.ir.ops import EXPERTS
from smelt.ir.weight import Weight

COUNT, HIDDEN, INNER = 6, 64, 96
ENCODINGS = [Dense("float32"), Dense("bfloat16"), Affine(4, 32), Affine(8, 0, zero=True), Affine(4, 32, "channel")]
TOLERANCE = 3e-6  # of the largest value; two products in float32


def weights(encoding: Encoding) -> tuple[Weight, Weight]:
    random = torch.Generator().manual_seed(0)
    stored = []
    for shape in ((COUNT, 2 * INNER, HIDDEN), (COUNT, HIDDEN, INNER)):
        stored.append(Weight(shape, encoding, encoding.encode(torch.randn(shape, generator=random) * 0.1)))
    return stored[0], stored[1]


def routed(rows: int, slots: int = 2, seed: int = 1) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    shares, chosen = torch.rand(rows, COUNT, generator=random).topk(slots)
    return {"x": torch.randn(rows, HIDDEN, generator=random), "chosen": chosen, "shares": shares}


def run(kernel: ExpertsKernel, args: dict[str, torch.Tensor], act: str = "silu") -> torch.Tensor:
    out = torch.full(args["x"].shape, float("nan"))
    kernel.bind({**args, "act": act}, out)()
    return out


def off(kernel: ExpertsKernel, args: dict[str, torch.Tensor], like: ExpertsKernel | None = None) -> float:
    like = like or kernel
    want = EXPERTS.reference(**args, gate_up=like.gate_up.dense(), down=like.down.dense(), act="silu")
    return float((run(kernel, args) - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
@pytest.mark.parametrize("rows", [1, 63, 129])
def test_equals_the_reference(encoding: Encoding, rows: int) -> None:
    kernel = ExpertsKernel(*weights(encoding))
    assert covers(kernel.gate_up, kernel.down) is None
    for slots in (1, 2, COUNT):
        assert off(kernel, routed(rows, slots)) < TOLERANCE


def test_a_strange_routing_is_right_too() -> None:
    kernel, args = ExpertsKernel(*weights(Affine(4, 32))), routed(9)
    assert off(kernel, args | {"chosen": torch.full((9, 2), 5)}) < TOLERANCE  # one expert twice
    assert off(kernel, args | {"shares": args["shares"].half()}) < TOLERANCE


def test_a_row_does_not_depend_on_the_others() -> None:
    kernel, args = ExpertsKernel(*weights(Affine(4, 32))), routed(63)
    whole = run(kernel, args)
    for start, end in ((0, 1), (5, 6), (62, 63), (3, 20), (1, 63)):
        part = {name: value[start:end].contiguous() for name, value in args.items()}
        assert torch.equal(run(kernel, part), whole[start:end])


def test_a_call_follows_its_inputs() -> None:
    """Addresses are bound once: new values there give new results."""
    kernel, args = ExpertsKernel(*weights(Dense("float32"))), routed(7)
    out = torch.empty(7, HIDDEN)
    call = kernel.bind({**args, "act": "silu"}, out)
    call()
    other = routed(7, seed=2)
    for name, value in other.items():
        args[name].copy_(value)
    call()
    assert torch.equal(out, run(kernel, other))


def test_the_comparison_catches_a_wrong_kernel() -> None:
    gate_up, down = weights(Dense("float32"))
    right, args = ExpertsKernel(gate_up, down), routed(9)
    scaled = ExpertsKernel(gate_up, Weight.of(down.dense() * 1.05))
    moved = ExpertsKernel(gate_up, Weight.of(down.dense().roll(1, 0)))
    swapped = ExpertsKernel(Weight.of(gate_up.dense().roll(INNER, 1)), down)
    assert all(off(mutant, args, right) > 100 * TOLERANCE for mutant in (scaled, moved, swapped))


def test_what_is_not_covered_has_a_reason() -> None:
    gate_up, down = weights(Affine(4, 32))
    assert "within groups of 2" in (covers(gate_up, down.encoded(Affine(4, 2))) or "")
    assert "needs weights [E, N, K]" in (covers(Weight.of(torch.zeros(4, 4)), down) or "")
