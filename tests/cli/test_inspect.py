"""smelt inspect: sizes are those of the files, formulas those of the graph, and the graph parses back."""

import json

import sympy
from typer.testing import CliRunner

import smelt
from smelt.cli import app
from smelt.ir.text import parse_program, same_program

from .. import tiny


def inspect(*words: object) -> str:
    result = CliRunner().invoke(app, ["inspect", *map(str, words)])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_sizes_of_an_artefact() -> None:
    told = json.loads(inspect(tiny.artefact(), "--json"))
    program = smelt.load(tiny.artefact()).program
    assert told["weight_bytes"] == program.nbytes == sum(row["bytes"] for row in told["weights"].values())
    assert told["recipe"] == "none" and told["steps"] == ["cache.insert"]
    assert told["cache_bits_per_value"] == 32
    assert told["cache_bytes"] == 2 * 2 * 2 * 16 * 4 * 1024  # layers, keys and values, heads, dim, bytes, tokens


def test_formulas_count_matrix_products() -> None:
    flops = sympy.sympify(
        json.loads(inspect(tiny.artefact(), "--json"))["cost"]["flops"], locals={"S": sympy.Symbol("S")}
    )
    b, t, s = sympy.symbols("B T S")
    per_token = 2 * (2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64) + 4096 * 64)
    assert flops.coeff(s).subs({b: 1, t: 1}) == 2 * 2 * 2 * 64  # layers, products, multiply and add, heads times dim
    assert 1 <= flops.subs({b: 1, t: 1, s: 0}) / per_token < 1.05  # norms, activations and additions on top


def test_a_model_is_inspected_as_it_is_captured() -> None:
    told = json.loads(inspect(tiny.model(), "--json"))
    assert told["steps"] == [] and told["cache"] is None
    assert told["ops"]["smelt.attention"] == 2
    assert "smelt.cached_attention" not in told["ops"]


def test_the_graph_parses_back() -> None:
    program = smelt.load(tiny.artefact()).program
    parsed = parse_program(inspect(tiny.artefact(), "--graph"), program.weights)
    assert same_program(parsed, program) is None


def test_kernels_are_told_with_their_reason() -> None:
    rows = json.loads(inspect(tiny.artefact(), "--kernels", "--json"))["kernels"]
    assert {row["node"]: row["kernel"] for row in rows} == {
        row["node"]: row["kernel"] for row in smelt.load(tiny.artefact()).kernels
    }
    assert all(row["why"] for row in rows)
    assert "attention over segments" in inspect(tiny.artefact(), "--kernels")
    assert "target torch runs the reference" in inspect(tiny.artefact(), "--kernels", "--target", "torch")
