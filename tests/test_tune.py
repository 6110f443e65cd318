"""Fitting speculation to a machine: drafts are cut to the likeliest tokens, nothing that is generated changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import smelt
from smelt import tune as tuning
from smelt.cli import app
from smelt.ir import decode
from smelt.ir.decode import DecodePlan, Tree
from smelt.ir.errors import SmeltError
from smelt.model import Compiled
from smelt.runtime.drafters.base import Drafted, Drafter
from smelt.runtime.drafters.limit import LimitedDrafter

from . import tiny

JOINED = {
    "name": "joined",
    "family": "deploy",
    "does": "Drafts.",
    "steps": [{"cache.insert": {}}, {"decode.recycle": {"width": 3, "nodes": 6}}, {"decode.lookup": {"tokens": 3}}],
}
PROMPTS = [[5, 9, 3, 5, 9], [1, 2]]


def compiled() -> Compiled:
    return smelt.compile(str(tiny.model()), JOINED)


class Fixed(Drafter):
    """Always the same draft."""

    def __init__(self, draft: Drafted, fixed: bool) -> None:
        self.draft, self.fixed = draft, fixed

    def propose(self, row: int) -> Drafted:
        return self.draft


def paths(draft: Drafted) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = [()]
    for node in range(1, len(draft.tokens)):
        found.append((*found[draft.parents[node]], draft.tokens[node]))
    return found[1:]


def test_drafts_are_cut_to_the_likeliest_tokens_with_all_above_them() -> None:
    draft = Drafted([7, 1, 2, 3, 4], (0, 0, 0, 1, 2), [1.0, 0.5, 0.4, 0.1, 0.3])
    for nodes, left in ((4, [(1,), (2,), (1, 3), (2, 4)]), (3, [(1,), (2,), (2, 4)]), (1, [(1,)])):
        for fixed in (False, True):
            made = LimitedDrafter(Fixed(draft, fixed), nodes).propose_all([0])[0]
            assert paths(made) == left and made.tokens[0] == 7


def test_a_static_tree_is_cut_by_the_usual_law_of_ranks() -> None:
    tree = Tree.from_paths([(0,), (1,), (0, 0), (0, 1), (0, 0, 0)])
    draft = Drafted([9, 1, 2, 3, 4, 5], tree.parents)
    cut = LimitedDrafter(Fixed(draft, True), 3).propose_all([0])[0]
    assert paths(cut) == [(1,), (1, 3), (1, 3, 5)]


@pytest.mark.parametrize("limits", [(0, 0), (1, 2), (3, 5), (9, 9)])
def test_limits_change_the_steps_and_no_token(limits: tuple[int, int]) -> None:
    lm = compiled()
    assert lm.program.decode is not None
    lm.program.decode = DecodePlan(lm.program.decode.draft, limits=limits)
    for options in ({}, {"temperature": 1.0, "seed": 2}):
        made, plain = (
            lm.complete(PROMPTS, max_new_tokens=12, eos=(), speculate=speculate, **options)
            for speculate in (True, False)
        )
        assert [row.tokens for row in made.rows] == [row.tokens for row in plain.rows]
        assert made.steps == plain.steps == 11 if limits == (0, 0) else made.steps <= plain.steps


def test_the_fastest_size_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lm, real = compiled(), Compiled.complete

    def timed(self: Compiled, prompts: Any, **options: Any) -> Any:
        """A machine on which three drafted tokens are best when greedy, and none when sampled."""
        made = real(self, prompts, **options)
        size = self.program.decode.limits[0]  # type: ignore[union-attr,index]
        rate = 50 - abs(size - 3) if "temperature" not in options else 50 - size
        object.__setattr__(made, "decode_seconds", made.step_tokens / rate)
        return made

    monkeypatch.setattr(Compiled, "complete", timed)
    told = {name: found.to_dict() for name, found in tuning.tune(lm, PROMPTS).items()}
    assert (told["greedy"]["best"], told["sampled"]["best"]) == (3, 0)
    assert list(told["greedy"]["tokens_per_second"]) == ["0", "1", "2", "3", "5", "7", "9"]
    assert lm.program.decode.limits == (3, 0)  # type: ignore[union-attr]
    lm.save(tmp_path / "out")
    again = smelt.load(tmp_path / "out")
    assert again.program.decode == lm.program.decode and again.facts["tuned"] == told


def test_only_what_drafts_can_be_tuned() -> None:
    with pytest.raises(SmeltError, match=r"does not draft: add a step such as decode\.lookup"):
        tuning.tune(smelt.compile(str(tiny.model()), "none"), PROMPTS)
    with pytest.raises(SmeltError, match="give at least one prompt"):
        tuning.tune(compiled(), [])
    with pytest.raises(SmeltError, match="limits are two numbers of tokens from 0"):
        DecodePlan(decode.Lookup(), limits=(1, -1))


def test_the_command_writes_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "SIZES", (0, 2))
    monkeypatch.setattr(tuning, "NEW", 4)
    compiled().save(tmp_path / "out")
    (tmp_path / "text.txt").write_text(tiny.tokens(600))
    done = CliRunner().invoke(app, ["tune", str(tmp_path / "out"), "--text", str(tmp_path / "text.txt"), "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    limits = smelt.load(tmp_path / "out").program.decode.limits  # type: ignore[union-attr]
    assert limits == (told["greedy"]["best"], told["sampled"]["best"])
    assert torch.tensor(limits).min() >= 0
