"""What masks mean, told by their values: causal, causal with a window, or everything seen; anything else in words.

A mask is looked at for several lengths, and for those just beyond every number that it is computed with. A number too
large for that is put to the test: the window moves with it, or it is none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import fx

from ...interpret import interpret
from ...program import Program
from ...weight import Weight

aten = torch.ops.aten
LENGTHS = (1, 2, 5, 9, 17, 33)
WIDEST = 4096  # the longest text that is looked at
_ENDLESS = 1 << 40  # numbers from here on mean "no end"
_TRIALS = (3, 6, 13)  # windows that stand for one too wide to be looked at
_SIZES = {aten.slice.Tensor, aten.view.default, aten.reshape.default, aten.expand.default, aten.arange.default}

Meaning: TypeAlias = tuple[bool, int | None]  # causal, window
Changes: TypeAlias = Mapping[Hashable, float]  # other numbers for some of those that masks are computed with
Look: TypeAlias = Callable[[int, int, Changes], Mapping[str, torch.Tensor]]  # length, token of every place, changes


def meanings(look: Look, names: Sequence[str], numbers: Mapping[Hashable, float]) -> dict[str, Meaning | str]:
    """What each of the masks that `look` gives means; `numbers` are those that they are computed with, by place."""
    looked = {abs(int(n)) for n in numbers.values() if 1 < abs(n) <= WIDEST}
    lengths = sorted({*LENGTHS, *(m for n in looked for m in (n + 1, n + 3) if m > LENGTHS[-1])})
    found = _seen(look, names, lengths, {})
    plain = {name: meaning(values) for name, values in found.items()}
    made = dict(plain)
    for place, number in numbers.items():
        if not WIDEST < abs(number) < _ENDLESS:
            continue
        tried = [_tried(look, names, place, math.copysign(trial, number)) for trial in _TRIALS]
        for name in names:
            made[name] = _narrower(made[name], _judged(plain[name], number, [trial[name] for trial in tried]))
    return made


def _seen(look: Look, names: Sequence[str], lengths: Sequence[int], changes: Changes) -> dict[str, list[torch.Tensor]]:
    found: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for length in lengths:
        for fill in (0, 1) if length <= LENGTHS[-1] else (0,):
            for name, value in look(length, fill, changes).items():
                found[name].append(_visible(value))
    return found


def _tried(look: Look, names: Sequence[str], place: Hashable, number: float) -> dict[str, Meaning | str | None]:
    """Meanings with another number in its place; None where it was a size, or the value of what is hidden."""
    try:
        found = _seen(look, names, LENGTHS, {place: number})
    except Exception:  # torch raises every kind for sizes that do not fit
        return dict.fromkeys(names)
    return {
        name: None if any(value.dtype is not torch.bool for value in values) else meaning(values)
        for name, values in found.items()
    }


def _judged(before: Meaning | str, number: float, tried: Sequence[Meaning | str | None]) -> Meaning | str:
    """The meaning, where `number` is too wide to be seen: trials say whether the window goes with it."""
    if isinstance(before, str) or all(trial is None or trial == before for trial in tried):
        return before
    windows = [trial[1] for trial in tried if isinstance(trial, tuple) and trial[0]]
    beyond = {width - trial for width, trial in zip(windows, _TRIALS, strict=False) if width is not None}
    if not before[0] or len(windows) != len(tried) or None in windows or len(beyond) != 1:
        return f"depends on the number {number:g} in a way that is no window"
    return True, abs(int(number)) + beyond.pop()


def _narrower(one: Meaning | str, other: Meaning | str) -> Meaning | str:
    """Of two windows the narrower one; what is neither stays."""
    if isinstance(one, str) or isinstance(other, str):
        return one if isinstance(one, str) else other
    widths = [width for width in (one[1], other[1]) if width is not None]
    return one[0] or other[0], min(widths) if widths else None


def _visible(mask: torch.Tensor) -> torch.Tensor:
    """bool, true where a key is seen; numbers in between are no mask and come as they are."""
    if mask.dtype is torch.bool:
        return mask
    seen = mask == 0
    return seen if bool((seen | (mask <= -1e4)).all()) else mask


def meaning(found: Sequence[torch.Tensor]) -> Meaning | str:
    """What bool masks [..., T, S] of several lengths have in common."""
    if any(value.dtype is not torch.bool for value in found):
        return "adds numbers to the logits (as ALiBi or relative positions do), which cannot be captured yet"
    if all(bool(value.all()) for value in found):
        return False, None
    longest = max(found, key=lambda value: value.shape[-1])
    if longest.shape[-1] != longest.shape[-2]:
        return "is not square: it does not hide what comes later"
    window = int(longest.reshape(-1, *longest.shape[-2:])[0, -1].sum())
    width = window if window < longest.shape[-1] else None
    for value in found:
        length = value.shape[-1]
        apart = torch.arange(length)[:, None] - torch.arange(length)
        meant = (apart >= 0) if width is None else (apart >= 0) & (apart < width)
        if value.shape[-2] != length or not bool((value == meant).all()):
            return "is neither causal nor a sliding window"
    return True, width


def masks_of(program: Program, masks: Sequence[fx.Node]) -> dict[fx.Node, Meaning | str]:
    """What each mask of a Program over tokens and positions means."""
    names = {mask.name: mask for mask in masks}
    probe = _probe(program, names)
    numbers: dict[Hashable, float] = {}
    for node in probe.graph.nodes:
        for i, number in enumerate(_numbers(node)):
            numbers[node.name, i] = number
    tables = [probe.weights[str(n.target)] for n in probe.graph.nodes if n.op == "get_attr"]
    if any(_hides_a_window(table) for table in tables):
        return dict.fromkeys(masks, f"is read from a stored table wider than {WIDEST}, and is not plainly causal")
    for i, table in enumerate(tables):
        if len(table.shape) > 1 and table.shape[-1] == table.shape[-2] <= WIDEST:
            numbers["table", i] = table.shape[-1] - 3  # looked at in its full length

    def look(length: int, fill: int, changes: Changes) -> Mapping[str, torch.Tensor]:
        tokens = torch.full((2, length), fill, dtype=torch.int64)
        inputs = {"tokens": tokens, "positions": torch.arange(length).expand(2, -1)}
        chosen = _changed(probe, changes) if changes else probe
        return interpret(chosen, {n: inputs[n] for n in chosen.inputs})

    return {names[name]: found for name, found in meanings(look, list(names), numbers).items()}


def _probe(program: Program, names: Mapping[str, fx.Node]) -> Program:
    """The part of a Program that computes its masks."""
    probe = program.fork()
    inner = {node.name: node for node in probe.graph.nodes}
    probe.graph.output_node().args = ({name: inner[name] for name in names},)
    probe.prune()
    return probe


def _hides_a_window(table: Weight) -> bool:
    """Whether a stored mask is too wide to be looked at in a run, and hides more than what comes later."""
    if len(table.shape) < 2 or table.shape[-1] != table.shape[-2] or table.shape[-1] <= WIDEST:
        return False
    width = table.shape[-1]
    values = table.dense().reshape(-1, width, width)
    seen = values.bool() if bool(values[:, 0, 0].all()) else values == 0  # 1 is seen, or 0 is added
    return not bool((seen == torch.ones(width, width, dtype=torch.bool).tril()).all())


def _numbers(node: fx.Node) -> list[float]:
    """Numbers among a node's arguments, in the order in which fx walks them; sizes are none."""
    found: list[float] = []

    def see(argument: Any) -> Any:
        if _is_number(argument):
            found.append(argument)
        return argument

    if node.op == "call_function" and node.target not in _SIZES:
        fx.node.map_aggregate(node.args, see)
    return found


def _is_number(argument: Any) -> bool:
    return type(argument) is int or (type(argument) is float and argument.is_integer())


def _changed(probe: Program, changes: Changes) -> Program:
    """The probe with other numbers, by node and place."""
    changed = probe.fork()
    for node in changed.graph.nodes:
        mine = {place[1]: new for place, new in changes.items() if isinstance(place, tuple) and place[0] == node.name}
        if not mine:
            continue
        count = iter(range(1 << 20))

        def put(argument: Any, mine: dict[int, float] = mine, count: Any = count) -> Any:
            return type(argument)(mine.get(next(count), argument)) if _is_number(argument) else argument

        node.args = fx.node.map_aggregate(node.args, put)
    return changed
