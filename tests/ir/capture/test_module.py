"""Plain modules: several inputs and outputs, any batch, token models that become decoders, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import smelt
from smelt.ir.capture import capture, capture_module
from smelt.ir.capture.variants import TOLERANCE, relative_error
from smelt.ir.errors import SmeltError
from smelt.ir.interpret import interpret
from smelt.ir.ops import ATTENTION, EMBEDDING, HEAD, LINEAR, arguments

NOTHING: dict[str, Any] = {"name": "nothing", "family": "baseline", "does": "Nothing at all.", "steps": []}
V, C, H, CONTEXT = 50, 32, 4, 64


def seeded(kind: Callable[..., nn.Module], *args: Any) -> Any:
    torch.manual_seed(0)
    return kind(*args)


class Block(nn.Module):
    """Attention and an MLP, each behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.qkv, self.out = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.mlp = nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, C))

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        q, k, v = (part.view(b, t, H, -1).transpose(1, 2) for part in self.qkv(x).split(C, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).contiguous().view(b, t, C))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.mix(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Words(nn.Module):
    """A GPT by hand: positions looked up with arange, dropout, a head that is the embedding turned."""

    def __init__(self, block: Callable[[], nn.Module] = Block) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(V, C), nn.Embedding(CONTEXT, C)
        self.drop, self.blocks = nn.Dropout(0.3), nn.Sequential(block(), block())
        self.norm = nn.LayerNorm(C)
        for layer in self.modules():  # as they are made, a token would be followed by itself for ever
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.4)

    def position(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.places(torch.arange(tokens.shape[1], device=tokens.device))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.drop(self.words(tokens) + self.position(tokens)))
        return self.norm(x) @ self.words.weight.t()


class Sliced(Words):
    """Takes the first rows of its table instead."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, CONTEXT, C) * 0.5)

    def position(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.table[:, : tokens.shape[1]]


class Unsqueezed(Words):
    """Looks positions up as [1, T]."""

    def position(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.places(torch.arange(0, tokens.shape[1], dtype=torch.long).unsqueeze(0))


def naive(model: nn.Module, prompt: list[int], count: int) -> list[int]:
    """Greedy decoding by running the module over everything, again and again."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("kind", [Words, Sliced, Unsqueezed])
def test_a_hand_written_gpt_generates_as_a_loop_over_it_does(kind: type[Words]) -> None:
    model = seeded(kind).eval()
    compiled = smelt.compile(model, "none", example=(torch.randint(0, V, (1, 9)),))
    facts = compiled.program.facts
    assert (facts["kind"], facts["vocabulary"], facts["hidden"], facts["context"]) == ("decoder", V, C, CONTEXT)
    prompts = [[3], [7, 1, 4], list(range(20))]
    with torch.no_grad():
        expected = [naive(model, prompt, 40) for prompt in prompts]
    assert compiled.generate(prompts, max_new_tokens=40) == expected
    assert len(set(expected[2])) > 2, "not one token for ever"


def test_a_decoder_has_a_head_and_reads_its_positions() -> None:
    program = capture(seeded(Words), (torch.randint(0, V, (2, 5)),))
    assert program.inputs == ("tokens", "positions")
    assert [str(arguments(n)["ids"]) for n in program.calls(EMBEDDING)] == ["tokens", "positions"]
    assert [arguments(n)["causal"] for n in program.calls(ATTENTION)] == [True, True]
    assert len(list(program.calls(HEAD))) == 1
    tokens = torch.randint(0, V, (1, 6))
    shifted = interpret(program, {"tokens": tokens, "positions": torch.arange(6)[None] + 5})["logits"]
    plain = interpret(program, {"tokens": tokens, "positions": torch.arange(6)[None]})["logits"]
    assert not torch.allclose(shifted, plain)


class Both(Block):
    """Sees both ways."""

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unsqueeze(1) for part in self.qkv(x).split(C, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v).squeeze(1))


class Shifting(Block):
    """Mixes a token with the one before it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + F.pad(x, (0, 0, 1, 0))[:, :-1])


class Counting(Words):
    """Uses its positions as numbers too."""

    def position(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().position(tokens) + torch.arange(tokens.shape[1])[:, None] / CONTEXT


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Words(Both), "is_causal=True and no mask, everywhere"),
        (lambda: Words(Shifting), "tokens depend on each other outside causal attention"),
        (Counting, "uses arange for more than rows of a table"),
    ],
)
def test_a_token_model_that_cannot_decode_is_a_plain_module_that_says_why(make: Any, why: str) -> None:
    model = seeded(make).eval()
    tokens = torch.randint(0, V, (3, 8))
    program = capture_module(model, (tokens,))
    assert program.facts["kind"] == "module" and why in program.facts["no_decoder"]
    assert relative_error(interpret(program, {"tokens": tokens})["output0"], model(tokens).detach()) <= TOLERANCE


def test_an_mlp_runs_on_any_batch() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 4)))
    compiled = smelt.compile(model, NOTHING, example=(torch.randn(2, 8),))
    assert compiled.program.facts["inputs"] == {"input": {"shape": ["B", 8], "dtype": "float32"}}
    for batch in (1, 2, 7):
        x = torch.randn(batch, 8)
        assert relative_error(compiled.run(input=x)["output0"], model(x).detach()) <= TOLERANCE
    assert [node.target for node in compiled.program.calls(LINEAR)] == [LINEAR.target] * 2


def test_a_convolutional_net_keeps_its_statistics_and_its_mode() -> None:
    layers = (nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1))
    model = seeded(lambda: nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 5)))
    model(torch.randn(4, 3, 16, 16))  # some statistics
    model[0].eval()
    compiled = smelt.compile(model, NOTHING, example=(torch.randn(2, 3, 16, 16),))
    assert [part.training for part in model] == [False, True, True, True, True, True], "every part as it was"
    x = torch.randn(5, 3, 16, 16)
    out = compiled.run(input=x)["output0"]
    assert relative_error(out, model.eval()(x).detach()) <= TOLERANCE
    assert relative_error(out, model.train()(x).detach()) > 0.01, "the statistics of a batch are others"


class Several(nn.Module):
    """Two inputs, two outputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"sum": self.layer(left) + right, "product": left * right}


def test_several_inputs_and_outputs_go_by_their_names() -> None:
    model = seeded(Several)
    compiled = smelt.compile(model, NOTHING, example=(torch.randn(3, 4), torch.randn(3, 4)))
    left, right = torch.randn(2, 5, 4)
    out = compiled.run(left=left, right=right)
    assert out.keys() == {"sum", "product"}
    for name, value in model(left, right).items():
        assert relative_error(out[name], value.detach()) <= TOLERANCE


def test_a_tuple_is_numbered() -> None:
    class Pair(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x.sin(), x.cos()

    program = capture_module(Pair(), (torch.randn(2, 3),), name="pair")
    assert (program.name, list(program.outputs)) == ("pair", ["output0", "output1"])


@pytest.mark.parametrize("rank", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masks_of_any_rank_keep_their_meaning(rank: int, dtype: torch.dtype) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            seen = torch.rand(6, 6) > 0.4
            seen |= torch.eye(6, dtype=torch.bool)
            mask = seen if dtype is torch.bool else torch.zeros(6, 6).masked_fill(~seen, -3.0)
            self.register_buffer("mask", mask[(None,) * (rank - 2)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(x, x, 2 * x, attn_mask=self.mask, scale=0.3)

    model, x = Masked(), torch.randn(3, 2, 6, 4)
    program = capture_module(model, (x,))
    assert [arguments(n)["scale"] for n in program.calls(ATTENTION)] == [0.3]
    assert relative_error(interpret(program, {"x": x})["output0"], model(x)) <= TOLERANCE


def test_a_causal_rectangle_stays_torch() -> None:
    """torch lets query i see keys up to i, the dialect aligns the last query with the last key."""

    class Rectangle(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(q, k, k, is_causal=True)

    q, k = torch.randn(2, 1, 3, 4), torch.randn(2, 1, 7, 4)
    program = capture_module(Rectangle(), (q, k))
    assert not list(program.calls(ATTENTION))
    assert torch.equal(interpret(program, {"q": q, "k": k})["output0"], Rectangle()(q, k))


def test_writing_into_views_becomes_functional() -> None:
    class Swapped(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.zeros_like(x)
            y[..., :2] = x[..., 2:]
            y[..., 2:].copy_(x[..., :2])
            return y.mul_(2) + F.relu(x.clone(), inplace=True)

    x = torch.randn(3, 4)
    assert torch.equal(interpret(capture_module(Swapped(), (x,)), {"x": x})["output0"], Swapped()(x))


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum() > 0 else x


class BySize(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.shape[0] > 2 else x


class Remembering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.add_(1)
        return x * self.seen


class Noisy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.randn_like(x)


class Listing(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        return x, "done"


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        nn.init.constant_(self.layer.weight, torch.nan)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


ROW = (torch.randn(3, 3, generator=torch.Generator().manual_seed(0)),)


@pytest.mark.parametrize(
    ("module", "example", "reason"),
    [
        (
            Branching(),
            ROW,
            "Branching: cannot be captured yet: it branches on values.*express the choice as torch.where",
        ),
        (BySize(), ROW, "differs from the module in 'output0'.*differently for other batch sizes"),
        (Remembering(), ROW, "the model writes into seen while it runs"),
        (Noisy(), ROW, "differs from the module.*at random"),
        (Listing(), ROW, "Listing: returns a str as 'output1'; capture takes tensors only"),
        (Broken(), ROW, "outputs are not finite; weight 'layer.weight' holds NaN"),
        (nn.Linear(3, 3), (), "Linear: capturing a plain module needs `example` inputs"),
        (nn.Linear(4, 3), ROW, "Linear: fails on the example inputs: mat1 and mat2"),
        (nn.Linear(3, 3), ([[1.0]],), r"`example` takes tensors with a batch dimension, not \[\[1.0\]\]"),
        (nn.Linear(3, 3).half(), ROW, r"weight is torch.float16; .*module.float\(\)"),
    ],
)
def test_names_what_cannot_be_captured(module: nn.Module, example: Any, reason: str, capfd: Any) -> None:
    with pytest.raises(SmeltError, match=reason):
        capture(module, example)
    assert capfd.readouterr().err == "", "torch's own words are not added"
