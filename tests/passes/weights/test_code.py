"""weights.code and weights.cast: logits to the bit through the kernels, refusals that name the way out."""

from pathlib import Path

import torch

import smelt
from smelt.ir.encoding import Affine, Dense, Tiered
from smelt.ir.ops import EMBEDDING, LINEAR
from smelt.ir.program import Program
from smelt.ir.weight import Weight
from smelt.passes.weights.cast import Cast
from smelt.passes.weights.code import Code
from smelt.quality import replay

from ... import tiny
from ..families import Sketch


def chain(*matrices: torch.Tensor) -> Program:
    """A table, and each matrix [N, K] multiplies the one before's result."""
    made = Sketch(vocabulary=8)
    x = made.call(EMBEDDING, made.tokens, made.weight("table", value=matrices[0]))
    for i, matrix in enumerate(matrices[1:]):
        x = made.call(LINEAR, x, made.weight(f"m{i}", value=matrix), None)
    return made.program(y=x)


def gaussian(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()


def test_codes_what_it_shrinks_and_says_why_the_rest_stays() -> None:
    wide = gaussian(64, 64) * 2.0 ** torch.randint(-100, 60, (64, 64), generator=torch.Generator().manual_seed(1))
    program = chain(gaussian(128, 64), gaussian(64, 64), wide.bfloat16(), gaussian(62, 64), gaussian(64, 62))
    before = {name: weight.dense() for name, weight in program.weights.items()}
    program.weights["m0"] = program.weights["m0"].encoded(Affine(4, 32))
    outcome = Code().apply(program, None)
    assert outcome.done == ("table", "m2")
    assert outcome.skipped.keys() == {"m0", "m1", "m3"}
    assert "stored as affine" in outcome.skipped["m0"] and "no multiple of 4" in outcome.skipped["m3"]
    assert "exponents are too many" in outcome.skipped["m1"]
    assert all(torch.equal(program.weights[name].dense(), before[name]) for name in outcome.done)
    assert 10 < outcome.notes["bits_per_weight"] < 11.6
    assert Code().apply(program, None).done == ()


def test_another_type_is_refused_and_cast() -> None:
    half = torch.randn(64, 64, generator=torch.Generator().manual_seed(2)).half()
    program = chain(gaussian(128, 64), half)
    (reason,) = Code().requires(program)
    assert "m0 must be bfloat16" in reason and "weights.cast: {to: bfloat16}" in reason
    outcome = Cast().apply(program, None)
    assert outcome.done == ("m0",) and outcome.skipped == {"table": "stored as dense(dtype=bfloat16)"}
    assert program.weights["m0"].encoding == Dense("bfloat16")
    assert torch.equal(program.weights["m0"].dense(), half.bfloat16().float())
    assert 50 < outcome.notes["sqnr_db"]["min"] < 60 and not list(Code().requires(program))
    program.weights["m0"] = Weight.of(half).encoded(Affine(4, 32))
    assert "stored as affine" in Cast().apply(program, None).skipped["m0"]  # what a quantizer did stays


def test_a_coded_model_has_the_logits_of_its_bfloat16_to_the_bit(tmp_path: Path) -> None:
    recipe = tmp_path / "cast.yaml"
    recipe.write_text(
        "name: cast\nfamily: weights\ndoes: rounds\nsteps:\n  - weights.cast: {}\n  - cache.insert: {dtype: float32}\n"
    )
    plain, coded = smelt.compile(tiny.model(), recipe), smelt.compile(tiny.model(), "dfloat11")
    assert sum(isinstance(weight.encoding, Tiered) for weight in coded.program.weights.values()) == 15
    coded.save(tmp_path / "coded")
    loaded = smelt.load(tmp_path / "coded")
    tokens = torch.arange(40).view(2, 20) * 97
    wanted = replay(plain.plan, tokens, 9)  # a prompt by blocks of rows, then token by token
    assert wanted.isfinite().all() and wanted.std() > 0.1
    assert torch.equal(replay(coded.plan, tokens, 9), wanted) and torch.equal(replay(loaded.plan, tokens, 9), wanted)
