"""decode.prompts: the vocabulary's tokens are looked up as ever, and ids behind it in a weight of their own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from smelt.ir.errors import SmeltError
from smelt.ir.interpret import interpret
from smelt.ir.ops import EMBEDDING, arguments
from smelt.ir.program import Program
from smelt.ir.verify import verify
from smelt.ir.weight import Weight
from smelt.passes.decode.lookahead import Lookahead
from smelt.passes.decode.lookup import Lookup
from smelt.passes.decode.prompts import PROMPTS, Prompts


def run(program: Program, tokens: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
    return interpret(program, {"tokens": tokens, "positions": positions})["logits"]


def test_a_prompt_token_is_what_its_weight_says(cached: Program, tokens: Callable[..., torch.Tensor]) -> None:
    (name,) = {str(arguments(node)["weight"].target) for node in cached.calls(EMBEDDING)}
    before, ids = cached.fork(), tokens(2, 9)
    outcome = Prompts(prompts=3, width=4, dtype="float32").apply(cached, None)
    verify(cached)
    assert torch.equal(run(cached, ids), run(before, ids))
    mean = before.weights[name].dense().mean(0)
    torch.testing.assert_close(cached.weights[PROMPTS].dense(), mean.expand(3, -1))
    assert outcome.notes == {"parameters": 3 * 64, "bytes": 4 * 3 * 64}
    cached.weights[PROMPTS] = Weight.of(before.weights[name].dense()[[7, 90, 31]].clone())
    meant, written = ids.clone(), ids.clone()
    meant[0, 4:7], written[0, 4:7] = torch.tensor([7, 90, 31]), torch.tensor([97, 98, 99])
    assert torch.equal(run(cached, written), run(before, meant))
    assert not torch.equal(run(cached, written), run(before, ids))
    assert cached.facts["vocabulary"] == 97 and cached.facts["prompts_trained"] is False
    assert {"decode", PROMPTS} <= cached.touched


def test_what_does_not_fit_is_said(cached: Program, llama: Program) -> None:
    other = llama.fork()
    other.cache = None
    assert "put cache.insert in front" in next(Prompts().requires(other))
    assert list(Prompts(width=98).requires(cached)) == ["width must be at most the vocabulary of 97 tokens, but is 98"]
    (words,) = cached.calls(EMBEDDING)
    with cached.graph.inserting_after(words):
        again = cached.graph.create_node("call_function", words.target, words.args, name="again")
    said = "llama must read its tokens in one embedding and nowhere else, but embedding, again reads them"
    assert next(Prompts().requires(cached)).startswith(said[:60])
    cached.graph.erase_node(again)
    assert list(Prompts().requires(cached)) == []
    Prompts().apply(cached, None)
    assert len(list(Prompts().requires(cached))) == 3
    for step in (Lookup(), Lookahead()):
        assert next(step.requires(cached)).startswith("llama already decodes by prompts, and only drafts")


@pytest.mark.parametrize("options", [{"prompts": 0}, {"width": 0}, {"rows": 1}])
def test_nothing_to_guess_is_an_error(options: dict[str, int]) -> None:
    with pytest.raises(SmeltError, match="prompts and width count from 1 and rows from 2"):
        Prompts(**options)
