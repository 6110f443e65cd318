"""weights.residual: a fine-tune is what it adds to its base, within its budget, and stands upon no other base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import smelt
from smelt.cli import app
from smelt.ir.encoding import Affine, LowRank
from smelt.ir.errors import SmeltError
from smelt.ir.program import Program
from smelt.ir.verify import verify
from smelt.ir.weight import Weight
from smelt.passes.weights.quantize import Quantize
from smelt.passes.weights.residual import Residual, _Directions
from smelt.runtime import artefact

from ... import tiny
from ..families import answer, captured, random_tokens


def changed(value: torch.Tensor, rank: int, size: float, seed: int) -> torch.Tensor:
    """Matrices plus a change whose singular values fall by half each, and some noise."""
    random, lead = torch.Generator().manual_seed(seed), value.shape[:-2]
    left, right = (torch.linalg.qr(torch.randn(*lead, n, rank, generator=random)).Q for n in value.shape[-2:])
    noise = torch.randn(value.shape, generator=random) * 1e-3 * size
    return value + size * (left * 0.5 ** torch.arange(rank)) @ right.mT + noise


def tuned() -> Program:
    """A float16 program, its base, and changes of which every third is ten times as large; norms change as well."""
    program = captured("llama")
    program.weights = {n: Weight.of(w.dense(torch.float16)) for n, w in program.weights.items()}
    program.base = program.fork()
    for i, (name, weight) in enumerate(program.weights.items()):
        value = weight.dense()
        new = changed(value, 8, 5.0 if i % 3 == 0 else 0.5, i) if value.dim() == 2 else value * 1.01
        program.weights[name] = Weight.of(new.half())
    return program


def stored(program: Program, **options: Any) -> Program:
    made = program.fork()
    Residual(**options).apply(made, None)
    verify(made)
    return made


def missed(program: Program, made: Program) -> float:
    """Squared error of all weights relative to that of the base."""
    assert program.base is not None

    def off(other: Program) -> float:
        return sum(float((w.dense() - other.weights[n].dense()).square().sum()) for n, w in program.weights.items())

    return off(made) / off(program.base)


def test_the_budget_is_kept_and_spent_where_it_gains_most() -> None:
    program = tuned()
    errors = {}
    for ranks in ("budget", "equal"):
        made = stored(program, budget=0.06, bits=8, ranks=ranks)
        assert 0.04 * program.nbytes < made.nbytes <= 0.06 * program.nbytes
        assert 8 * made.nbytes == sum(weight.bits for weight in made.weights.values())
        errors[ranks] = missed(program, made)
    assert 1e-4 < errors["budget"] < 0.6 * errors["equal"] < 0.1


def test_vectors_of_four_bits_cost_little_and_half_as_much() -> None:
    program = tuned()
    budgets = {16: 0.32, 8: 0.16, 4: 0.1}
    errors = {bits: missed(program, stored(program, budget=b, bits=bits)) for bits, b in budgets.items()}
    assert errors[16] < errors[8] < 1.5 * errors[16] + 1e-3 and errors[4] < 0.03


def test_experts_share_a_rank() -> None:
    before = torch.randn(3, 16, 32, generator=torch.Generator().manual_seed(0))
    after = changed(before, 4, 1.0, 1)
    thin = _Directions.of(Weight.of(after), Weight.of(before), None)
    assert thin.cost == 3 * 16 * (16 + 32) and thin.count >= 4
    for rank in (2, 4):
        encoding = LowRank(rank)
        parts = encoding.onto(after - before, thin.right[..., :rank, :])
        error = (encoding.decode(parts, (3, 16, 32)) - after + before).square().sum()
        assert error < 1.02 * thin.gains[rank:].sum() + 1e-5


def test_what_did_not_change_and_what_is_no_matrix() -> None:
    program = tuned()
    assert program.base is not None
    names = iter(name for name, weight in program.weights.items() if len(weight.shape) == 2)
    same, alien = next(names), next(names)
    program.weights[same] = Weight.of(program.base.weights[same].dense(torch.float16))
    program.base.weights.pop(alien)
    made = program.fork()
    outcome = Residual(budget=0.6).apply(made, None)
    assert made.weights[same].bits == 0 and torch.equal(made.weights[same].dense(), program.weights[same].dense())
    assert made.weights[alien] is program.weights[alien] and "no weight of this name" in outcome.skipped[alien]
    norm = "model.norm.weight"
    assert torch.equal(made.weights[norm].dense(), program.weights[norm].dense()) and norm in outcome.skipped
    program.base = None
    assert "--base" in next(Residual().requires(program))
    with pytest.raises(SmeltError, match=r"as it is takes .* budget is"):
        stored(tuned(), budget=1e-4)


def test_only_what_is_added_is_written_and_no_other_base_fits(tmp_path: Path) -> None:
    """Over a base of 4 bits, whose error the products make up for as well."""
    program = tuned()
    assert program.base is not None
    Quantize(bits=4, group=32, head="keep").apply(program.base, None)
    coded = [w for w in program.base.weights.values() if isinstance(w.encoding, Affine)]
    assert coded
    made, before = stored(program, budget=0.2, bits=8), missed(program, stored(program, budget=0.03, bits=8))
    assert missed(program, made) < 0.8 * before
    artefact.save(tmp_path / "out", made, {}, {})
    size = (tmp_path / "out" / "weights.safetensors").stat().st_size
    header = int.from_bytes((tmp_path / "out" / "weights.safetensors").read_bytes()[:8], "little") + 8
    assert size - header == made.nbytes < 0.2 * program.nbytes
    read, manifest = artefact.load(tmp_path / "out", program.base)
    tokens = random_tokens(1, 8)
    assert torch.equal(answer(read, tokens), answer(made, tokens)) and read.base is program.base
    right, merged = answer(made, tokens), read.merged()
    assert (answer(merged, tokens) - right).abs().max() < 1e-2 * right.abs().max()
    assert (answer(program.base, tokens) - right).abs().max() > 1e-1 * right.abs().max()
    assert all(weight.own is weight.parts for weight in merged.weights.values())
    artefact.save(tmp_path / "again", read, {}, {})
    assert artefact.read_manifest(tmp_path / "again")["base"] == manifest["base"]

    with pytest.raises(SmeltError, match=r"holds only what its model adds to .*--base"):
        artefact.load(tmp_path / "out")
    other = program.base.fork()
    name = next(iter(other.weights))
    other.weights[name] = Weight.of(other.weights[name].dense(torch.float16) * 1.05)
    with pytest.raises(SmeltError, match=r"but the base given is .*, which hashes to"):
        artefact.load(tmp_path / "out", other)
    other.weights.pop(name)
    with pytest.raises(SmeltError, match=rf"which has no {name}"):
        artefact.load(tmp_path / "out", other)
    artefact.save(tmp_path / "whole", program.base, {}, {})
    with pytest.raises(SmeltError, match="stands upon no base"):
        artefact.load(tmp_path / "whole", program.base)


def test_compile_load_and_the_command_line_take_a_base(tmp_path: Path) -> None:
    model, out = tmp_path / "tuned", tmp_path / "out"
    shutil.copytree(tiny.model(), model)
    tensors = load_file(model / "model.safetensors")
    new = {n: changed(t, 4, 2.0, i) if t.dim() == 2 else t for i, (n, t) in enumerate(tensors.items())}
    save_file(new, model / "model.safetensors", metadata={"format": "pt"})
    lm = smelt.compile(model, "ere", base=tiny.model(), overrides=["weights.residual.budget=0.2"], target="torch")
    assert 0.1 * lm.program.nbytes < lm.stored.nbytes <= 0.2 * lm.program.nbytes
    said = lm.generate("def f(x):\n", max_new_tokens=8)
    lm.save(out)
    assert smelt.load(out, "torch", base=tiny.artefact()).generate("def f(x):\n", max_new_tokens=8) == said
    asked = ["run", str(out), "def f(x):\n", "--max-new-tokens", "8", "--target", "torch"]
    assert CliRunner().invoke(app, [*asked, "--base", str(tiny.model())]).stdout == said + "\n"
    assert CliRunner().invoke(app, asked).exit_code == 2
    told = CliRunner().invoke(app, ["inspect", str(out), "--json", "--base", str(tiny.model())])
    assert json.loads(told.stdout)["weight_bytes"] == lm.stored.nbytes
    assert said != smelt.load(tiny.artefact(), "torch").generate("def f(x):\n", max_new_tokens=8)
