"""Answers that follow a schema, an expression or a grammar: always valid, and the same with speculation as without."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

import pytest
import torch

import smelt
from smelt.ir.errors import SmeltError
from smelt.model import Compiled
from smelt.runtime import noise
from smelt.runtime.constraint import Constraint, Guide

pytest.importorskip("llguidance")

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "ok": {"type": "boolean"}},
    "required": ["name", "ok"],
    "additionalProperties": False,
}
PROMPTS = ['result = json.loads("', "def main():\n    return "]
ASKED: dict[str, dict[str, Any]] = {
    "schema": {"json_schema": SCHEMA},
    "regex": {"regex": r"[a-f]{3,9}(-[0-9]{2}){1,3}"},
    "grammar": {"grammar": 'start: "[" item ("," item)* "]"\nitem: /[0-9]{1,3}/'},
}
SAMPLED = {"temperature": 1.0, "seed": 4}


@cache
def compiled() -> Compiled:
    steps = [{"cache.insert": {}}, {"decode.recycle": {"nodes": 7}}, {"decode.lookup": {"tokens": 4}}]
    recipe = {"name": "drafting", "family": "deploy", "does": "Drafts.", "steps": steps}
    return smelt.compile(str(smelt.reference_model()), recipe)


def follows(kind: str, text: str) -> bool:
    if kind == "schema":
        found = json.loads(text)
        return set(found) == {"name", "ok"} and len(found["name"]) <= 8 and isinstance(found["ok"], bool)
    if kind == "regex":
        return re.fullmatch(ASKED["regex"]["regex"], text) is not None
    return re.fullmatch(r"\[\d{1,3}(,\d{1,3})*\]", text) is not None


@pytest.mark.parametrize("kind", ASKED)
@pytest.mark.parametrize("sampling", [{}, SAMPLED, {**SAMPLED, "top_p": 0.8, "repetition_penalty": 1.2}])
def test_answers_follow_and_drafts_change_none(kind: str, sampling: dict[str, Any]) -> None:
    made, plain = (
        compiled().complete(PROMPTS, max_new_tokens=60, speculate=speculate, **ASKED[kind], **sampling)
        for speculate in (True, False)
    )
    assert [row.tokens for row in made.rows] == [row.tokens for row in plain.rows]
    ended = [row for row in made.rows if row.reason in ("grammar", "eos")]
    assert all(follows(kind, row.text or "") for row in ended) and (ended or kind == "grammar")
    assert made.steps <= plain.steps


def test_a_draw_is_the_best_allowed_token_under_the_same_noise() -> None:
    """The law is the model's, restricted to what is allowed: Gumbel's maximum over the allowed tokens."""
    lm, asked = compiled(), ASKED["regex"]
    (row,) = lm.complete(PROMPTS[:1], max_new_tokens=4, speculate=False, **asked, **SAMPLED).rows
    session = lm._session(1, 64)
    ids = lm.tokenizer.encode(PROMPTS[0])
    logits = session.prefill([ids])["logits"][0]
    text = (smelt.reference_model() / "tokenizer.json").read_text()
    guide = Constraint("regex", asked["regex"], text, 4096, 0).guide()
    keys = logits - logits.max() + noise.gumbel(SAMPLED["seed"], torch.tensor([0]), torch.tensor([len(ids)]), 4096)[0]  # type: ignore[arg-type]
    order = keys.argsort(descending=True)
    first = next(int(token) for token in order if guide.allowed[token])
    assert row.tokens[0] == first != int(order[0])


def test_a_guide_that_allows_everything_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Guide, "allowed", property(lambda self: torch.ones(4096, dtype=torch.bool)))
    with pytest.raises(SmeltError, match="is outside of the grammar"):
        compiled().complete(PROMPTS, max_new_tokens=20, **ASKED["regex"])


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"regex": "[z"}, "the regular expression cannot be used: .*unclosed character class"),
        ({"regex": "a", "grammar": 'start: "a"'}, "regex and grammar were given; an answer follows one of them"),
        ({"json_schema": {"type": "strange"}}, "the JSON schema cannot be used"),
        ({"json_schema": '{"type":'}, "the JSON schema cannot be used"),
        ({"json_schema": {"x": {1, 2}}}, "the JSON schema is no JSON"),
        ({"grammar": "start: nothing"}, "the grammar cannot be used"),
        ({"regex": 7}, "regex must be text, not int"),
        ({"json_schema": {"type": "string", "enum": []}}, "the JSON schema (cannot be used|admits no answer)"),
    ],
)
def test_what_cannot_be_followed_is_said(asked: dict[str, Any], says: str) -> None:
    with pytest.raises(SmeltError, match=says):
        compiled().complete(PROMPTS, **asked)


def test_a_grammar_that_admits_nothing_is_refused() -> None:
    text = (smelt.reference_model() / "tokenizer.json").read_text()
    with pytest.raises(SmeltError, match="the regular expression admits no answer"):
        Constraint("regex", r"[^\x00-\x{10FFFF}]", text, 4096, 0).guide()
