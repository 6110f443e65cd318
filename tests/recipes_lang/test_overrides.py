"""`--set` changes one option of one step, is held to the option's type, and says what it does not know."""

from collections.abc import Mapping
from typing import Any

import pytest

from smelt.ir.errors import SmeltError
from smelt.recipes import Gate, load

Catalogue = Mapping[str, type]

RECIPE: dict[str, Any] = {
    "name": "r",
    "family": "cache",
    "does": "Something.",
    "steps": [
        {"weights.quantize": {"bits": 4, "layers": [1, 2]}},
        {"weights.quantize": {"name": "low", "bits": 2}},
        "cache.encode",
        "decode.heads",
        "decode.heads",
    ],
}


CHANGES: dict[str, tuple[int, str, Any]] = {
    "cache.encode.tail=128": (2, "tail", 128),
    "weights.quantize.bits=3": (0, "bits", 3),
    "low.bits=1": (1, "bits", 1),
    "low.group=": (1, "group", None),
    "decode.heads#2.count=1": (4, "count", 1),
    "weights.quantize.layers.1=7": (0, "layers", (1, 7)),
    "weights.quantize.layers=[0]": (0, "layers", (0,)),
    "cache.encode.keys.affine.bits=3": (2, "keys", {"affine": {"bits": 3}, "order": [1, 2]}),
    "cache.encode.keys.new.part=on": (2, "keys", {"affine": {"bits": 2}, "order": [1, 2], "new": {"part": "on"}}),
    "cache.encode.keys={low_rank: 1e-1}": (2, "keys", {"low_rank": 0.1}),
}


@pytest.mark.parametrize("text", CHANGES)
def test_changes_one_option(text: str, catalogue: Catalogue) -> None:
    at, option, value = CHANGES[text]
    before, after = load(RECIPE, catalogue).steps, load(RECIPE, catalogue, [text]).steps
    assert getattr(after[at].pass_, option) == value
    assert getattr(before[at].pass_, option) != value
    assert [step for i, step in enumerate(after) if i != at] == [step for i, step in enumerate(before) if i != at]


def test_changes_what_every_step_has(catalogue: Catalogue) -> None:
    changes = ["cache.encode.optional=true", "low.gate.max_kl=0.5", "cache.encode.last.size=3"]
    _, low, encode, *_ = load(RECIPE, catalogue, changes).steps
    assert (encode.optional, low.gate, encode.options["last"]) == (True, Gate(max_kl=0.5), {"size": 3, "roll": False})


def test_the_longest_name_is_meant(catalogue: Catalogue) -> None:
    steps = [{"decode.heads": {"name": "cache"}}, "cache.encode"]
    loaded = load({**RECIPE, "steps": steps}, catalogue, ["cache.encode.tail=1", "cache.count=2"])
    assert (loaded.steps[0].options["count"], loaded.steps[1].options["tail"]) == (2, 1)


def test_the_last_one_wins(catalogue: Catalogue) -> None:
    assert load(RECIPE, catalogue, ["low.bits=1", "low.bits=3"]).steps[1].options["bits"] == 3


REFUSED = {
    "cache.encod.tail=1": "no step 'cache.encod' in this recipe (did you mean 'cache.encode'?)",
    "lov.bits=1": "no step 'lov' in this recipe (did you mean 'low'?)",
    "cache.encodes=1": "no step 'cache' in this recipe (did you mean 'cache.encode'?)",
    "cache.encode.tial=1": "unknown key 'tial' in cache.encode (did you mean 'tail'?)",
    "low.name=other": "a step is named in the recipe; nothing else would change",
    "decode.heads#1.zzz=1": "unknown key 'zzz' in decode.heads (known: count, optional, gate)",
    "cache.encode=1": "'cache.encode' is a step; name the option too, as cache.encode.<option>=<value>",
    "cache.encode.tail": "write it as <step>.<option>=<value>",
    "=1": "write it as <step>.<option>=<value>",
    "decode.heads.count=1": "2 steps run decode.heads; write one of decode.heads#1, decode.heads#2 in its place",
    "weights.quantize.layers.2=7": "'2' is no place in a list of 2, counted from 0",
    "weights.quantize.bits.low=7": "'low' would lie within a single value; set the whole option",
    "cache.encode.tail=many": "'tail' in cache.encode must be a whole number, but is \"many\"",
    "low.gate.max_lk=1": "unknown key 'max_lk' in 'gate' in weights.quantize (did you mean 'max_kl'?)",
}


@pytest.mark.parametrize("text", REFUSED)
def test_refuses(text: str, catalogue: Catalogue) -> None:
    with pytest.raises(SmeltError) as caught:
        load(RECIPE, catalogue, [text])
    assert str(caught.value) == f"--set {text}: {REFUSED[text]}"


def test_what_the_pass_refuses_names_the_change(catalogue: Catalogue) -> None:
    with pytest.raises(SmeltError) as caught:
        load(RECIPE, catalogue, ["low.damping=1", "low.bits=9"])
    what = "weights.quantize (with --set low.damping=1, --set low.bits=9)"
    assert str(caught.value) == f"<dict>:steps[1].weights.quantize: {what}: bits must lie between 1 and 8, but is 9"


def test_what_an_encoding_refuses_names_the_change(catalogue: Catalogue) -> None:
    steps = [{"cache.encode": {"values": {"affine": {"bits": 4, "group": 32}}}}]
    change = "cache.encode.values.affine.bits=7"
    with pytest.raises(SmeltError) as caught:
        load({**RECIPE, "steps": steps}, catalogue, [change])
    assert str(caught.value).startswith(f"--set {change}: 'values' in cache.encode: affine: bits must be one of ")


def test_a_value_that_is_no_yaml(catalogue: Catalogue) -> None:
    with pytest.raises(SmeltError, match=r"^--set low\.bits=\[1:1:3: not valid YAML: "):
        load(RECIPE, catalogue, ["low.bits=[1"])
