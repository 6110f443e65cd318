"""What a loaded recipe holds: steps built in order, names, includes, the resolved form and its digest."""

import json
from collections.abc import Callable, Mapping
from dataclasses import make_dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smelt.ir.encoding import Affine
from smelt.ir.errors import SmeltError
from smelt.recipes import Bound, Gate, Header, Needs, Paper, load, loader, shipped

Write = Callable[..., str]
Catalogue = Mapping[str, type]

FULL = """\
name: everything
family: cache
paper: {title: "A Paper: On Caches", year: 2024, url: "https://example.org"}
does: Uses every part of the language.
deviations: [It is not a paper.]
needs: {training: true, calibration: text}
steps:
  - cache.insert
  - weights.quantize: {bits: 4, layers: [0, 5], gate: {max_kl: 0.02, otherwise: stop}}
  - weights.quantize: {name: low, bits: 2, group: null, damping: 1}
  - cache.encode:
      tail: 32
      values: {affine: {bits: 4, group: 32}}
      last: {size: 8}
      optional: true
expect:
  bits_per_value: {at_most: 4, at_least: 1.5, source: table 2}
  replay_kl: {equals: 0, on: the reference model}
"""


def recipe(*steps: Any, **header: Any) -> dict[str, Any]:
    return {"name": "r", "family": "cache", "does": "Something.", **header, "steps": list(steps)}


def header_text(*steps: str) -> str:
    return "name: r\nfamily: cache\ndoes: x\nsteps:\n" + "".join(f"  - {step}\n" for step in steps)


def test_holds_every_part(write: Write, catalogue: Catalogue) -> None:
    loaded = load(write(FULL), catalogue)
    assert loaded.paper == Paper("A Paper: On Caches", 2024, "https://example.org")
    assert loaded.needs == Needs(training=True, calibration="text")
    assert loaded.deviations == ("It is not a paper.",)
    assert loaded.expect["bits_per_value"] == Bound(at_most=4.0, at_least=1.5, source="table 2")
    assert [step.name for step in loaded.steps] == ["cache.insert", "weights.quantize", "low", "cache.encode"]
    insert, quantize, low, encode = loaded.steps
    assert insert.pass_ == catalogue["cache.insert"]()
    assert quantize.pass_ == catalogue["weights.quantize"](bits=4, layers=(0, 5))
    assert quantize.gate == Gate(max_kl=0.02, otherwise="stop")
    built = vars(low.pass_)
    assert (built["group"], built["damping"], type(built["damping"])) == (None, 1.0, float)
    assert vars(encode.pass_)["values"] == Affine(bits=4, group=32)
    assert vars(encode.pass_)["last"].size == 8
    assert [step.optional for step in loaded.steps] == [False, False, False, True]
    assert [step.place for step in loaded.steps] == [f"r.yaml:{line}" for line in (8, 9, 10, 11)]


def test_options_show_the_defaults_too(catalogue: Catalogue) -> None:
    step = load(recipe({"weights.quantize": {"bits": 4}}), catalogue).steps[0]
    assert step.options == {"bits": 4, "group": 64, "scheme": "rtn", "damping": 0.01, "layers": []}


def test_equal_passes_get_numbered_names(catalogue: Catalogue) -> None:
    loaded = load(recipe("cache.insert", "decode.heads", {"cache.insert": {"name": "mine"}}, "cache.insert"), catalogue)
    assert [step.name for step in loaded.steps] == ["cache.insert#1", "decode.heads", "mine", "cache.insert#2"]


def test_the_resolved_form_loads_back_equal(write: Write, catalogue: Catalogue) -> None:
    write("name: i\nfamily: cache\ndoes: x\nsteps: [decode.heads, decode.heads]\n", "inner.yaml")
    path = write(FULL.replace("  - cache.insert\n", "  - include: inner.yaml\n  - cache.insert\n"))
    loaded = load(path, catalogue, ["low.bits=3", "cache.encode.keys.order=[3]", "decode.heads#2.count=2"])
    assert len(loaded.steps) == 6
    as_json = json.loads(json.dumps(loaded.to_dict()))
    for again in (load(as_json, catalogue), load(write(loaded.to_yaml(), "again.yaml"), catalogue)):
        assert again == loaded
        assert again.digest() == loaded.digest()


def test_includes_stand_in_place(write: Write, catalogue: Catalogue) -> None:
    write(header_text("cache.insert", "include: ../c.yaml"), "sub/b.yaml")
    write(header_text("cache.encode") + "needs: {training: true}\n", "c.yaml")
    loaded = load(write(header_text("cache.insert", "include: sub/b.yaml", "cache.insert")), catalogue)
    passes = [step.pass_name for step in loaded.steps]
    assert passes == ["cache.insert", "cache.insert", "cache.encode", "cache.insert"]
    assert [step.place for step in loaded.steps] == ["r.yaml:5", "sub/b.yaml:5", "c.yaml:5", "r.yaml:7"]
    assert loaded.needs == Needs(training=True), "what an included recipe needs, the whole one needs"


def test_what_a_pass_needs_the_recipe_needs(catalogue: Catalogue) -> None:
    assert load(recipe("cache.insert"), catalogue).needs == Needs()
    assert load(recipe("decode.heads"), catalogue).needs == Needs(calibration="text")


def test_a_cycle_of_includes_prints_its_chain(write: Write, catalogue: Catalogue) -> None:
    write(header_text("include: b.yaml"), "a.yaml")
    write(header_text("cache.insert", "include: sub/../c.yaml"), "b.yaml")
    write(header_text("include: ./a.yaml"), "c.yaml")
    Path("sub").mkdir()
    with pytest.raises(SmeltError, match=r"^c\.yaml:5:14: include cycle: a\.yaml → b\.yaml → c\.yaml → a\.yaml$"):
        load("a.yaml", catalogue)


def test_a_recipe_may_be_included_twice(write: Write, catalogue: Catalogue) -> None:
    write(header_text("cache.insert"), "b.yaml")
    loaded = load(write(header_text("include: b.yaml", "include: b.yaml")), catalogue)
    assert [step.name for step in loaded.steps] == ["cache.insert#1", "cache.insert#2"]


def test_a_fault_in_an_included_file_names_both(write: Write, catalogue: Catalogue) -> None:
    write("name: b\nname: c\n", "b.yaml")
    with pytest.raises(SmeltError, match=r"^r\.yaml:5:14: b\.yaml:2:1: duplicate key 'name', first at b\.yaml:1:1$"):
        load(write(header_text("include: b.yaml")), catalogue)


def test_includes_that_multiply_are_stopped(write: Write, catalogue: Catalogue) -> None:
    write(header_text(*["cache.insert"] * 8), "0.yaml")
    for i in range(1, 8):
        write(header_text(f"include: {i - 1}.yaml", f"include: {i - 1}.yaml"), f"{i}.yaml")
    with pytest.raises(SmeltError, match="more than 512 steps once includes are spliced in"):
        load("7.yaml", catalogue)


def test_a_gate_may_be_null(catalogue: Catalogue) -> None:
    assert load(recipe({"cache.insert": {"gate": None}}), catalogue).steps[0].gate is None


def test_a_pass_may_not_take_a_reserved_word(catalogue: Catalogue) -> None:
    taken = make_dataclass("Taken", [("gate", int, 0)], frozen=True)
    with pytest.raises(TypeError, match=r"a\.b: recipes reserve the words \['gate'\]"):
        load(recipe("a.b"), {"a.b": taken})


@pytest.mark.parametrize(
    ("bound", "inside", "outside"),
    [
        (Bound(at_most=4.0), 4.0, 4.1),
        (Bound(at_least=4.0), 4.0, 3.9),
        (Bound(at_least=1.0, at_most=2.0), 1.5, 0.5),
        (Bound(equals=0.0), 0.0, 1e-9),
    ],
)
def test_a_bound_holds_inside_only(bound: Bound, inside: float, outside: float) -> None:
    assert bound.holds(inside)
    assert not bound.holds(outside)
    assert not bound.holds(float("nan"))


QUANTIZE = st.fixed_dictionaries({"bits": st.integers(1, 8)}, optional={"damping": st.floats(0, 1)})
KEYS = st.dictionaries(st.text("abc", min_size=1), st.integers() | st.booleans())
ENCODE = st.fixed_dictionaries({}, optional={"tail": st.integers(), "keys": KEYS, "optional": st.booleans()})
STEPS = st.lists(
    st.fixed_dictionaries({"weights.quantize": QUANTIZE}) | st.fixed_dictionaries({"cache.encode": ENCODE}), max_size=4
)


def shuffled(value: Any, draw: Callable[[list[Any]], list[Any]]) -> Any:
    if isinstance(value, dict):
        return {key: shuffled(value[key], draw) for key in draw(list(value))}
    return [shuffled(item, draw) for item in value] if isinstance(value, list) else value


@given(STEPS, st.data())
def test_the_digest_ignores_the_order_of_keys(catalogue: Catalogue, steps: list[Any], data: st.DataObject) -> None:
    def draw(keys: list[Any]) -> list[Any]:
        return data.draw(st.permutations(keys))

    first, second = recipe(*steps), shuffled(recipe(*steps, deviations=["one"]), draw)
    assert load(first, catalogue).digest() == load(second, catalogue).digest()


@pytest.mark.parametrize(
    "steps",
    [
        [{"cache.encode": {"tail": 65}}],
        [{"cache.encode": {"optional": True}}],
        [{"cache.encode": {"gate": {"max_kl": 0.1}}}],
        [{"cache.encode": {"keys": {"order": [2, 1], "affine": {"bits": 2}}}}],
        ["cache.encode", "cache.encode"],
        ["cache.insert"],
        [],
    ],
)
def test_the_digest_tells_different_steps_apart(catalogue: Catalogue, steps: list[Any]) -> None:
    assert load(recipe(*steps), catalogue).digest() != load(recipe("cache.encode"), catalogue).digest()


def test_the_digest_sees_through_spelling(catalogue: Catalogue) -> None:
    short = load(recipe("cache.encode", {"weights.quantize": {"bits": 4}}), catalogue)
    spelt = {"name": "q", "bits": 4, "damping": 0.01, "optional": False}
    long = load(recipe({"cache.encode": {"tail": 64, "gate": None}}, {"weights.quantize": spelt}), catalogue)
    assert short.digest() == long.digest()


@pytest.fixture
def home(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes recipes that ship, into a folder that stands for the package's."""
    monkeypatch.setattr(loader, "_home", lambda: tmp_path / "home")
    (tmp_path / "home").mkdir()
    return lambda text, name: write(text, f"home/{name}.yaml")


def test_shipped_recipes_are_found_by_name(home: Write, catalogue: Catalogue) -> None:
    home("name: none\nfamily: baseline\ndoes: Nothing.\nsteps: []\n", "none")
    home(FULL.replace("  - cache.insert\n", "  - include: none\n"), "everything")
    assert load("everything", catalogue).steps[0].place == "everything.yaml:9"
    assert load(recipe({"include": "everything"}), catalogue).steps == load("everything", catalogue).steps
    assert [(one.family, one.name) for one in shipped()] == [("baseline", "none"), ("cache", "everything")]
    assert type(shipped()[0]) is Header
    with pytest.raises(SmeltError, match=r"^no recipe 'evrything' \(did you mean 'everything'\?\); a file is named by"):
        load("evrything", catalogue)


def test_shipped_recipes_are_called_as_their_file(home: Write, catalogue: Catalogue) -> None:
    home("name: other\nfamily: baseline\ndoes: x\nsteps: []\n", "one")
    with pytest.raises(SmeltError, match=r"^one\.yaml:1:7: 'name' must be 'one', as the file is called$"):
        load("one", catalogue)


def test_shipped_recipes_cite_their_paper(home: Write, catalogue: Catalogue) -> None:
    home("name: one\nfamily: cache\ndoes: x\nsteps: []\n", "one")
    said = r"^one\.yaml:1:1: a recipe of the family cache that ships with smelt must cite its 'paper'$"
    with pytest.raises(SmeltError, match=said):
        shipped()
