"""Every fault in a recipe is one error that names file, line, column and the way out, word for word."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from smelt.ir.errors import SmeltError
from smelt.recipes import load

Write = Callable[..., str]
HEAD = "name: r\nfamily: weights\ndoes: Something.\n"  # three lines: what follows starts on line 4

FAULTS = {
    "unknown top-level key": (
        HEAD + "stpes: []\n",
        "r.yaml:4:1: unknown key 'stpes' in the recipe (did you mean 'steps'?)",
    ),
    "unknown pass": (
        HEAD + "steps:\n  - weights.quantise: {bits: 4}\n",
        "r.yaml:5:5: unknown pass 'weights.quantise' (did you mean 'weights.quantize'?)",
    ),
    "unknown bare pass, far from any": (
        HEAD + "steps: [xyz]\n",
        "r.yaml:4:9: unknown pass 'xyz' (known: weights.quantize, cache.encode, cache.insert, decode.heads, include)",
    ),
    "unknown option": (
        HEAD + "steps:\n  - weights.quantize:\n      bits: 4\n      grup: 32\n",
        "r.yaml:7:7: unknown key 'grup' in weights.quantize (did you mean 'group'?)",
    ),
    "option of a nested dataclass": (
        HEAD + "steps:\n  - cache.encode: {last: {size: 4, rol: true}}\n",
        "r.yaml:5:36: unknown key 'rol' in 'last' in cache.encode (did you mean 'roll'?)",
    ),
    "option of a dataclass in a list": (
        HEAD + "steps:\n  - cache.encode: {tails: [{size: 4}, {size: 4, rol: true}]}\n",
        "r.yaml:5:49: unknown key 'rol' in 'tails' in cache.encode[1] (did you mean 'roll'?)",
    ),
    "wrong type": (
        HEAD + "steps:\n  - weights.quantize: {bits: four}\n",
        "r.yaml:5:30: 'bits' in weights.quantize must be a whole number, but is \"four\"",
    ),
    "number in quotes": (
        HEAD + 'steps:\n  - weights.quantize: {bits: "4"}\n',
        "r.yaml:5:30: 'bits' in weights.quantize must be a whole number, but is \"4\"",
    ),
    "truth for a number": (
        HEAD + "steps:\n  - weights.quantize: {bits: true}\n",
        "r.yaml:5:30: 'bits' in weights.quantize must be a whole number, but is true",
    ),
    "wrong type in a union": (
        HEAD + "steps:\n  - weights.quantize: {bits: 4, group: []}\n",
        "r.yaml:5:40: 'group' in weights.quantize must be a whole number or null, but is a list",
    ),
    "wrong type within a list": (
        HEAD + "steps:\n  - weights.quantize: {bits: 4, layers: [0, one]}\n",
        "r.yaml:5:45: 'layers' in weights.quantize must be a list (a whole number each), but its part [1] is \"one\"",
    ),
    "wrong type within a mapping": (
        HEAD + "steps:\n  - cache.encode: {heads: {a: 1, b: x}}\n",
        "r.yaml:5:37: 'heads' in cache.encode must be a mapping or null, but its part b is \"x\"",
    ),
    "unknown word": (
        HEAD + "steps:\n  - weights.quantize: {bits: 4, scheme: gtpq}\n",
        "r.yaml:5:41: 'scheme' in weights.quantize must be rtn or gptq, but is \"gtpq\" (did you mean 'gptq'?)",
    ),
    "missing option": (
        HEAD + "steps:\n  - weights.quantize\n",
        "r.yaml:5:5: weights.quantize lacks 'bits' (a whole number)",
    ),
    "value the pass refuses": (
        HEAD + "steps:\n  - weights.quantize: {bits: 9}\n",
        "r.yaml:5:5: weights.quantize: bits must lie between 1 and 8, but is 9",
    ),
    "value the pass refuses by SmeltError": (
        HEAD + "steps:\n  - decode.heads: {count: 10}\n",
        "r.yaml:5:5: decode.heads: at most 9 heads",
    ),
    "encoding the ir refuses": (
        HEAD + "steps:\n  - cache.encode: {values: {afine: {bits: 4}}}\n",
        "r.yaml:5:28: 'values' in cache.encode: unknown encoding 'afine' (did you mean 'affine'?)…",
    ),
    "encoding of a wrong type": (
        HEAD + "steps:\n  - cache.encode: {values: 4}\n",
        "r.yaml:5:28: 'values' in cache.encode: an encoding is one name with its options, such as {dense: float16}",
    ),
    "missing key": ("name: r\ndoes: x\nsteps: []\n", "r.yaml:1:1: the recipe lacks 'family' (weights or prune or …"),
    "missing steps": (HEAD, "r.yaml:1:1: the recipe lacks 'steps' (a list of passes)"),
    "missing key of the paper": (
        HEAD + "paper: {title: A, url: b}\nsteps: []\n",
        "r.yaml:4:1: 'paper' in the recipe lacks 'year' (a whole number)",
    ),
    "duplicate key": (
        HEAD + "steps: []\ndoes: Another.\n",
        "r.yaml:5:1: duplicate key 'does', first at r.yaml:3:1",
    ),
    "duplicate option": (
        HEAD + "steps:\n  - weights.quantize: {bits: 4, bits: 3}\n",
        "r.yaml:5:33: duplicate key 'bits', first at r.yaml:5:24",
    ),
    "syntax": (HEAD + "steps: [\n", "r.yaml:5:1: not valid YAML: expected the node content, but found '<stream end>'"),
    "tab": ("paper:\n\ttitle: x\n", "r.yaml:2:1: not valid YAML: found character '\\t' that cannot start any token"),
    "empty": ("", "r.yaml:1:1: empty"),
    "only a comment": ("# nothing yet\n", "r.yaml:1:1: empty"),
    "two documents": ("a: 1\n---\nb: 2\n", "r.yaml:2:1: not valid YAML: but found another document"),
    "not a mapping": ("- weights.quantize\n", "r.yaml:1:1: the recipe must be a mapping, but is a list"),
    "steps no list": (HEAD + "steps: {a: 1}\n", "r.yaml:4:8: 'steps' must be a list, but is a mapping"),
    "step no mapping": (
        HEAD + "steps:\n  - 4\n",
        "r.yaml:5:5: a step is a pass's name, alone or as the one key over its options, but this is 4",
    ),
    "options not indented": (
        HEAD + "steps:\n  - weights.quantize:\n    bits: 4\n",
        "r.yaml:5:5: a step is one pass, but this one has the keys weights.quantize, bits: "
        "indent options below their pass, and start each pass with '-'",
    ),
    "options no mapping": (
        HEAD + "steps:\n  - weights.quantize: 4\n",
        "r.yaml:5:23: the options of weights.quantize must be a mapping, but are 4",
    ),
    "unknown family": (
        "name: r\nfamily: wieghts\ndoes: x\nsteps: []\n",
        "r.yaml:2:9: 'family' in the recipe must be weights or prune or cache or decode or tokens or sample or "
        "attention or train or deploy or baseline, but is \"wieghts\" (did you mean 'weights'?)",
    ),
    "unknown gate key": (
        HEAD + "steps:\n  - cache.insert: {gate: {max_lk: 0.1}}\n",
        "r.yaml:5:27: unknown key 'max_lk' in 'gate' in cache.insert (did you mean 'max_kl'?)",
    ),
    "empty gate": (
        HEAD + "steps:\n  - cache.insert: {gate: {otherwise: stop}}\n",
        "r.yaml:5:20: 'gate' in cache.insert: give max_kl, min_top1 or both",
    ),
    "gate out of range": (
        HEAD + "steps:\n  - cache.insert: {gate: {min_top1: 95}}\n",
        "r.yaml:5:20: 'gate' in cache.insert: min_top1 is a share between 0 and 1, but is 95.0",
    ),
    "unknown way out of a gate": (
        HEAD + "steps:\n  - cache.insert: {gate: {max_kl: 0, otherwise: rollback}}\n",
        "r.yaml:5:49: 'otherwise' in 'gate' in cache.insert must be roll-back or stop, "
        "but is \"rollback\" (did you mean 'roll-back'?)",
    ),
    "optional is a truth": (
        HEAD + "steps:\n  - cache.insert: {optional: yes}\n",
        "r.yaml:5:30: 'optional' in cache.insert must be true or false, but is \"yes\"",
    ),
    "name of a step": (
        HEAD + "steps:\n  - cache.insert: {name: a.b}\n",
        'r.yaml:5:26: a step\'s name is small letters, digits, - and _, but is "a.b"',
    ),
    "two steps of one name": (
        HEAD + "steps:\n  - cache.insert: {name: a}\n  - cache.encode: {name: a}\n",
        "r.yaml:6:5: a second step is named 'a'; the first is at r.yaml:5:5",
    ),
    "bare bound": (
        HEAD + "steps: []\nexpect:\n  kl: 0.1\n",
        "r.yaml:6:7: 'kl' in 'expect' in the recipe must be a mapping, but is 0.1",
    ),
    "bound without number": (
        HEAD + "steps: []\nexpect:\n  kl: {on: the reference model}\n",
        "r.yaml:6:3: 'kl' in 'expect' in the recipe: give at_most, at_least or equals",
    ),
    "bound of a wrong type": (
        HEAD + "steps: []\nexpect:\n  kl: {at_most: low}\n",
        "r.yaml:6:17: 'at_most' in 'kl' in 'expect' in the recipe must be a number or null, but is \"low\"",
    ),
    "bound misspelt": (
        HEAD + "steps: []\nexpect:\n  kl: {atmost: 1}\n",
        "r.yaml:6:8: unknown key 'atmost' in 'kl' in 'expect' in the recipe (did you mean 'at_most'?)",
    ),
    "bounds that nothing satisfies": (
        HEAD + "steps: []\nexpect:\n  kl: {at_most: 1, at_least: 2}\n",
        "r.yaml:6:3: 'kl' in 'expect' in the recipe: at_least 2.0 is above at_most 1.0: nothing can satisfy both",
    ),
    "bounds that exclude each other": (
        HEAD + "steps: []\nexpect:\n  kl: {at_most: 1, equals: 1}\n",
        "r.yaml:6:3: 'kl' in 'expect' in the recipe: equals stands alone, without at_most and at_least",
    ),
    "bound without end": (
        HEAD + "steps: []\nexpect:\n  kl: {at_most: .nan}\n",
        "r.yaml:6:3: 'kl' in 'expect' in the recipe: a bound must be finite",
    ),
    "unknown included recipe": (
        HEAD + "steps:\n  - include: no-such-recipe-anywhere\n",
        "r.yaml:5:14: no recipe 'no-such-recipe-anywhere'; a file is named by a path that ends in .yaml",
    ),
    "missing included file": (
        HEAD + "steps:\n  - include: other.yaml\n",
        "r.yaml:5:14: other.yaml: cannot be read (No such file or directory)",
    ),
    "include no text": (HEAD + "steps:\n  - include: 4\n", "r.yaml:5:14: 'include' must be text, but is 4"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_names_the_place_and_the_way_out(case: str, write: Write, catalogue: Mapping[str, type]) -> None:
    text, message = FAULTS[case]
    with pytest.raises(SmeltError) as caught:
        load(write(text), catalogue)
    said = str(caught.value)
    assert "\n" not in said
    if message.endswith("…"):  # a list of names follows that changes as the project grows
        assert said.startswith(message[:-1])
    else:
        assert said == message


def test_a_dict_is_placed_by_its_path(catalogue: Mapping[str, type]) -> None:
    recipe = {"name": "r", "family": "weights", "does": "x", "steps": [{"weights.quantize": {"bits": "4"}}]}
    with pytest.raises(SmeltError) as caught:
        load(recipe, catalogue)
    place = "<dict>:steps[0].weights.quantize.bits"
    assert str(caught.value) == f"{place}: 'bits' in weights.quantize must be a whole number, but is \"4\""


def test_a_dict_holds_plain_data_only(catalogue: Mapping[str, type]) -> None:
    with pytest.raises(SmeltError) as caught:
        load({"name": object()}, catalogue)
    said = "<dict>:name: a recipe holds plain data, not a object; write it as in a YAML file"
    assert str(caught.value) == said


def test_unreadable_sources(write: Write, catalogue: Mapping[str, type]) -> None:
    with pytest.raises(SmeltError, match=r"^gone\.yaml: cannot be read \(No such file or directory\)$"):
        load("gone.yaml", catalogue)
    with pytest.raises(SmeltError, match=r"^no recipe 'no-such-recipe-anywhere'; a file is named by a path that "):
        load("no-such-recipe-anywhere", catalogue)
    path = Path(write(""))
    path.write_bytes(b"name: \xff\n")
    with pytest.raises(SmeltError, match=r"^r\.yaml: not UTF-8 text \(byte 6\)$"):
        load(path, catalogue)
    path.write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(SmeltError, match=r"^r\.yaml: larger than 1048576 bytes, which no recipe is$"):
        load(path, catalogue)
