"""What holds for every encoding: bits are counted, specs read back, errors have bounds, tables are shared."""

import math

import pytest
import torch

from smelt.codegen.printers import torch as printed
from smelt.ir.encoding import Affine, Codebook, Encoding, Nonuniform, Rotated, catalogue, parse
from smelt.ir.errors import SmeltError

from .examples import EXAMPLES, decibels, samples

every = pytest.mark.parametrize("name", EXAMPLES)
SHAPE = (2, 128, 64)


def held(encoding: Encoding, x: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Parts and tables."""
    tables = encoding.fit(x)
    return encoding.encode(x, tables or None), tables


def bits(parts: dict[str, torch.Tensor]) -> int:
    return sum(8 * part.numel() * part.itemsize for part in parts.values())


def test_there_is_an_example_of_every_encoding() -> None:
    exact = {"bitmap", "dense", "tiered"}  # have tests of their own
    assert {encoding.name for encoding, _, _ in EXAMPLES.values()} | exact == set(catalogue())


@every
def test_the_error_lies_between_its_bounds(name: str) -> None:
    encoding, low, high = EXAMPLES[name]
    x = samples(2)
    parts, tables = held(encoding, x)
    y = encoding.decode({**parts, **tables}, SHAPE)
    assert low < decibels(x, y) < high
    missing = y.clone()
    missing[:, ::4] = 0
    assert decibels(x, missing) < low


@every
def test_the_formulas_count_every_stored_bit(name: str) -> None:
    encoding = EXAMPLES[name][0]
    parts, tables = held(encoding, samples(2))
    assert encoding.stored_bits(SHAPE) == bits(parts)
    assert encoding.table_bits(SHAPE) == bits(tables)


@every
def test_what_prints_reads_back_equal(name: str) -> None:
    encoding = EXAMPLES[name][0]
    assert parse(str(encoding)) == encoding == parse(encoding.spec())
    assert len({encoding, parse(str(encoding))}) == 1


@every
def test_the_expression_equals_decode(name: str) -> None:
    encoding, x = EXAMPLES[name][0], samples(2)
    parts, tables = held(encoding, x)
    if isinstance(encoding, Rotated):
        with pytest.raises(SmeltError, match="depends on its whole row"):
            encoding.expr(SHAPE)
        return
    wanted = encoding.decode({**parts, **tables}, SHAPE)
    for head in (0, 1):
        here = {part: value[head if len(value) > 1 else 0] for part, value in {**parts, **tables}.items()}
        rows, columns = torch.arange(128)[:, None], torch.arange(64)[None]
        found = printed.evaluate(encoding.expr(SHAPE), here, rows, columns)
        assert (found - wanted[head]).abs().max() <= 1e-6 * wanted.abs().max()
    assert (found - wanted[0]).abs().max() > 0.1  # of the other head


@every
def test_tables_serve_the_pages_of_their_head(name: str) -> None:
    """[G, ...] serves [G, P, N, K]; what a page stores does not depend on the others."""
    encoding, x = EXAMPLES[name][0], samples(2)
    tables = encoding.fit(x)
    pages = x.unflatten(1, (2, 64))
    parts = encoding.encode(pages, tables or None)
    y = encoding.decode({**parts, **tables}, (2, 2, 64, 64))
    own = {part: value[1:] if len(value) > 1 else value for part, value in tables.items()}
    alone = encoding.encode(pages[1:, 1], own or None)
    assert all(torch.equal(part, parts[p][1:, 1]) for p, part in alone.items())
    assert torch.allclose(encoding.decode({**alone, **own}, (1, 64, 64)), y[1:, 1], atol=1e-5)
    by_slot = {part: value[[0, 0, 1, 1]] if len(value) > 1 else value for part, value in tables.items()}
    flat = encoding.encode(pages.flatten(0, 1), by_slot or None)
    assert all(torch.equal(part.unflatten(0, (2, 2)), parts[p]) for p, part in flat.items())


@every
def test_constant_pages_are_finite_and_kept(name: str) -> None:
    encoding = EXAMPLES[name][0]
    for value in (0.0, -0.75):
        x = torch.full((1, 64, 64), value)
        parts, tables = held(encoding, x)
        y = encoding.decode({**parts, **tables}, (1, 64, 64))
        assert y.isfinite().all() and y.abs().max() <= 6 * abs(value) + 1e-3


@every
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(name: str, bad: float) -> None:
    encoding, x = EXAMPLES[name][0], samples(1, rows=64)
    tables = encoding.fit(x)
    x[0, 3, 7] = bad
    with pytest.raises(SmeltError, match="NaN or infinite"):
        encoding.encode(x, tables or None)


@every
def test_strides_do_not_matter(name: str) -> None:
    encoding, x = EXAMPLES[name][0], samples(2, rows=64)
    tables = encoding.fit(x)
    turned = x.mT.contiguous().mT
    one, other = encoding.encode(x, tables or None), encoding.encode(turned, tables or None)
    assert all(part.is_contiguous() for part in (*one.values(), *other.values(), *tables.values()))
    assert all(torch.allclose(one[part].float(), other[part].float(), atol=1e-2) for part in one)


@every
def test_shapes_that_do_not_fit_are_refused(name: str) -> None:
    encoding = EXAMPLES[name][0]
    assert encoding.refuses((64,)) and encoding.refuses((2, 64, 64)) is None
    with pytest.raises(SmeltError, match=rf"{encoding.name}\(.*needs a tensor"):
        encoding.encode(torch.zeros(64))


@every
def test_missing_tables_are_named(name: str) -> None:
    encoding = EXAMPLES[name][0]
    if encoding.calibrated:
        with pytest.raises(SmeltError, match=r"its table '\w+' comes from data and is missing; calibrate"):
            encoding.encode(samples(1, rows=64))
    else:
        assert encoding.encode(samples(1, rows=64))


@every
def test_a_matrix_alone_brings_its_tables(name: str) -> None:
    encoding, low, _ = EXAMPLES[name]
    x = samples()
    assert decibels(x, encoding.decode(encoding.alone(x), (128, 64))) > low - 1.5


WRONG = [
    ({"nonuniform": 5}, "bits must be one of 2, 3, 4"),
    ({"nonuniform": {"bits": 3, "kind": "norml"}}, "did you mean 'normal'"),
    ({"nonuniform": {"bits": 3, "range": "calibrated"}}, "use axis: channel"),
    ({"nonuniform": {"bits": 3, "axis": "channel"}}, "needs a group of tokens"),
    ({"nonuniform": {"bits": 3, "clip": 0.1}}, "clip is a fraction"),
    ({"nonuniform": {"bits": 3, "kind": "normal", "qnorm": True}}, "qnorm moves learned signposts"),
    ({"nonuniform": {"bits": 3, "zero": 1}}, "zero must be true or false"),
    ({"nonuniform": {"bits": 3, "grop": 1}}, "unknown option 'grop' .did you mean 'group'"),
    ({"codebook": {"dims": 0, "bits": 4}}, "dims must be a positive"),
    ({"codebook": {"dims": 4, "bits": 11}}, "bits of a code must be one of"),
    ({"codebook": {"dims": 4, "bits": 8, "kind": "gausian"}}, "did you mean 'gaussian'"),
    ({"sparse": 1.5}, "keep is a fraction"),
    ({"sparse": 3}, "an even number, not 3"),
    ({"sparse": {"keep": 4, "by": "extreme"}}, "did you mean 'extremes'"),
    ({"sparse": {"keep": 4, "index": "int32"}}, "index must be uint8 or int16"),
    ({"sparse": {"keep": 4, "values": 8}}, "values is an encoding without tables"),
    ({"nm": {"keep": 2, "of": 5}}, "of is 2, 4, 8 or 16"),
    ({"nm": {"keep": 4, "of": 4}}, "less than of=4"),
    ({"nm": {"keep": 2, "of": 4, "values": {"sign": 0}}}, "dense floating point, or affine"),
    ({"bitmap": "float32"}, "dtype must be float16 or bfloat16"),
    ({"low_rank": 0}, "rank must be a positive"),
    ({"low_rank": {"rank": 2, "factors": {"affine": {"bits": 4, "axis": "channel", "group": 2}}}}, "of single rows"),
    ({"sign": {"group": -1}}, "group must be a count"),
    ({"sum": [{"low_rank": 2}]}, "two encodings or more"),
    ({"sum": ["float16", {"low_rank": 2}]}, "unknown encoding 'float16'"),
    ({"sum": 4}, "terms is a list of encodings"),
    ({"sum": [{"afine": {"bits": 2}}, {"low_rank": 2}]}, "unknown encoding 'afine' .did you mean 'affine'"),
    ({"sum": [{"affine": {"bits": 2, "grup": 64}}, {"low_rank": 2}]}, "unknown option 'grup' .did you mean 'group'"),
    ({"sum": {"terms": [{"low_rank": 2}, {"sign": 0}], "first": "outliers"}}, "takes the entries of one sparse term"),
    ({"rotated": {"inner": {"sign": 0}, "by": "hadamar"}}, "did you mean 'hadamard'"),
    ({"rotated": 4}, "inner is an encoding"),
    ({"channel_scaled": 4}, "inner is an encoding"),
    ({"nonunifrm": 3}, "did you mean 'nonuniform'"),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "message"), WRONG, ids=str)
def test_wrong_options_say_what_is_right(spec: dict[str, object], message: str) -> None:
    with pytest.raises(SmeltError, match=message):
        parse(spec)


def test_the_recipe_form_nests() -> None:
    spec = {"sum": [{"affine": {"bits": 2, "group": 64}}, {"low_rank": 4}, {"sparse": 0.02}]}
    assert str(parse(spec)) == (
        "sum(terms=[affine(bits=2, group=64, axis=token, zero=False, scale=float16), low_rank(rank=4, loops=3), "
        "sparse(keep=0.02, by=extremes, axis=token, index=uint8)], first=given)"
    )
    turbo = {"rotated": {"inner": {"nonuniform": {"bits": 3, "kind": "normal", "zero": False}}}}
    assert parse(turbo) == Rotated(Nonuniform(3, kind="normal", zero=False))
    assert parse({"rotated": "affine(bits=4, group=0)"}) == Rotated(Affine(4, 0))
    assert parse({"rotated": {"inner": {"codebook": {"dims": 2, "bits": 4}}}}) == Rotated(Codebook(2, 4))
