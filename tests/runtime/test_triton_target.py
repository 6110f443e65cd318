"""Target triton: whole steps equal the reference, in Triton's interpreter, as graphs, and on a GPU as captured."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import pytest
import torch

import smelt
from smelt.codegen import attention_triton
from smelt.codegen.chains_triton import ProductsKernel
from smelt.codegen.device_triton import Placed
from smelt.codegen.lower import lower
from smelt.codegen.lower_triton import holds_up
from smelt.codegen.nodes_triton import AttentionKernel
from smelt.codegen.plan import Plan, Target
from smelt.ir.encoding import Affine
from smelt.ir.errors import SmeltError
from smelt.ir.ops import QUANTIZED
from smelt.ir.program import Program
from smelt.passes import catalogue
from smelt.passes.events import ignore
from smelt.passes.manager import run
from smelt.recipes import load
from smelt.runtime.bound_triton import TritonBound
from smelt.runtime.generate import Decoding, Limits
from smelt.runtime.sampling import Sampling
from smelt.runtime.session import Session

from .. import tiny
from ..codegen.triton_checks import compiled, in_the_interpreter, interpreted
from ..ir.programs import cached, captured, quantized

pytest.importorskip("triton", reason="triton is not installed")

TOLERANCE = 2e-5  # of the largest logit; two layers in float32, at most 6e-7 in the interpreter
TIES = 5e-5  # where activations are rounded: at times a value lies between two codes
PROMPT = [5, 9, 77, 30]
WIDE = ["cache.insert.dtype=float32"]  # attention takes operands of the cache's type
PAGES = [*WIDE, "cache.select.tail=2", "cache.select.page=4", "cache.select.skip_layers=[0]", "cache.select.sink=1"]
PAGES += [f"cache.encode.{role}={{affine: {{bits: 8, group: {group}, axis: {axis}, zero: true}}}}"
          for role, axis, group in (("keys", "channel", 2), ("values", "token", 16))]  # fmt: skip
SHORT = [f"{{}}.{name}" for name in ("sink=1", "tail=2", "page=2")]
ROTATED = [
    f"cache.encode.{role}={{rotated: {{inner: {{affine: {{bits: 8, group: 0}}}}}}}}" for role in ("keys", "values")
]
READ = [*WIDE, *(each.format("cache.retrieve") for each in SHORT), "cache.retrieve.budget=2"]
RECIPES: dict[str, list[str]] = {
    "none": [],
    "finequant": WIDE,
    "w4a8": WIDE,
    "quantized-pruning": PAGES,
    "token-recycling": WIDE,
    "tidaldecode": [*READ, "cache.retrieve.layers=[0]", "cache.retrieve.dense_layers=0"],
    "turboquant": [*WIDE, *(each.format("cache.encode") for each in SHORT), *ROTATED],
}
LEAVING = {"quantized-pruning", "tidaldecode", "turboquant"}  # of whose caches pages leave on the way
TREE = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]], dtype=torch.bool)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough for a cut in most rows, and a third of the time."""
    monkeypatch.setattr(attention_triton, "INTERPRETED", 2)


@cache
def program(recipe: str) -> Program:
    """The tiny llama of the tests by a shipped recipe, its cache in float32 so that both targets compute alike."""
    if recipe == "coded":
        coded = {"sink": 1, "tail": 2, "page": 2, "keys": Affine(8, 2, "channel", True), "values": Affine(8, 16)}
        return cached(quantized(captured("llama"), Affine(4, 32)), **coded)
    resolved = load(recipe, catalogue(), RECIPES[recipe])
    return run(captured("llama"), resolved.steps, None, ignore).program


def session(recipe: str, target: Target, rows: int = 1) -> Session:
    return Session(lower(program(recipe), target), rows, 64)


def stepped(session: Session, count: int, rows: int = 1, tree: bool = False) -> list[torch.Tensor]:
    """Logits of the prompts' ends, of steps of one token, and of steps of a tree of which some nodes are accepted."""
    out = [session.prefill([PROMPT[row:] for row in range(rows)])["logits"].clone()]
    for step in range(count):
        positions = torch.tensor(session.cache.lengths)[:, None]
        nodes = torch.arange(4 if tree else 1) + 3 * step + torch.arange(rows)[:, None]
        ancestors = TREE if tree else None
        positions = positions + (TREE.sum(1) - 1 if tree else 0)
        out.append(session.step(nodes, positions, None, ancestors)["logits"].clone())
        session.cache.commit([[0, 2, 3] if tree else [0]] * rows)
    return out


def off(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
    errors = [(a - b).abs().max() / b.abs().max() for a, b in zip(found, wanted, strict=True)]
    return float(torch.stack(errors).nan_to_num(nan=float("inf")).max())


def error(recipe: str, count: int = 3, rows: int = 1, tree: bool = False) -> float:
    """The largest difference between the targets triton and torch."""
    found, wanted = (stepped(session(recipe, target, rows), count, rows, tree) for target in ("triton", "torch"))
    return off(found, wanted)


@interpreted
@pytest.mark.parametrize("recipe", RECIPES)
def test_steps_equal_the_reference(recipe: str) -> None:
    assert error(recipe, 4 if recipe in LEAVING else 1) < (TIES if recipe == "w4a8" else TOLERANCE)


@interpreted
def test_a_tree_and_ragged_rows_equal_the_reference() -> None:
    assert error("coded", 2, rows=2, tree=True) < TOLERANCE


@interpreted
@pytest.mark.parametrize("wrong", ["norm", "attention", "residual"])
def test_a_wrong_kernel_is_caught(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five percent of one gain or scale, and a residual that is left out."""
    if wrong == "norm":
        right = ProductsKernel._norm
        scaled: Callable[..., Any] = lambda self, room: {**right(self, room), "offset": 0.05}  # noqa: E731
        monkeypatch.setattr(
            ProductsKernel, "_norm", lambda self, room: scaled(self, room) if self.region.before else {}
        )
    elif wrong == "attention":
        turn = AttentionKernel._turn
        monkeypatch.setattr(
            AttentionKernel,
            "_turn",
            lambda self, room, q: ({**turn(self, room, q)[0], "scale": 1.05}, turn(self, room, q)[1]),
        )
    else:
        bound = ProductsKernel._bound

        def without(self: ProductsKernel, *args: Any) -> Any:
            values, made = bound(self, *args)
            return values, partial(made.func, *made.args, **{**made.keywords, "residual": None})

        monkeypatch.setattr(ProductsKernel, "_bound", without)
    assert error("none", 0) > 20 * TOLERANCE


@interpreted
def test_ties_do_not_hide_activations_of_one_bit_less() -> None:
    coarse = program("w4a8").fork()
    for node in coarse.calls(QUANTIZED):
        node.args = (node.args[0], 7, node.args[2])
    wanted = stepped(Session(lower(coarse, "torch"), 1, 64), 0)
    assert off(stepped(session("w4a8", "triton"), 0), wanted) > 20 * TIES


class Recorded:
    """A CUDA graph's likeness in the interpreter: launches and copies with the arguments that they had at first."""

    def __init__(self, bound: TritonBound) -> None:
        from triton.runtime.interpreter import GridExecutor

        self.done: list[Callable[[], Any]] = []
        self.replays = 0
        launch = GridExecutor.__call__

        def noted(executor: Any, *args: Any, **options: Any) -> None:
            self.done.append(lambda: launch(executor, *args, **options))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(GridExecutor, "__call__", noted)
            for call in bound.calls:
                before = len(self.done)
                if getattr(getattr(call, "func", None), "__name__", "") == "copy_":
                    self.done.append(call)
                else:
                    call()
                assert len(self.done) > before, f"{call} is no launch: a graph would not hold it"

    def replay(self) -> None:
        self.replays += 1
        for each in self.done:
            each()


@interpreted
@pytest.mark.parametrize(("recipe", "tree"), [("coded", False), ("token-recycling", True)])
def test_replays_of_a_step_equal_its_launches(recipe: str, tree: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens, positions, counts and trees change between replays, and pages leave; nothing of it is in the graph."""
    made: list[Recorded] = []

    def capture(self: TritonBound) -> Any:
        made.append(Recorded(self))
        return made[-1]

    wanted = stepped(session(recipe, "triton"), 5 if recipe == "coded" else 3, tree=tree)
    monkeypatch.setattr(TritonBound, "_capture", capture)
    monkeypatch.setattr(TritonBound, "_captures", True)
    found = stepped(session(recipe, "triton"), len(wanted) - 1, tree=tree)
    # the first step compiles; where a page leaves, the pool of pages may grow once and move
    assert len(made) == 1 if tree else 1 <= len(made) <= 2
    assert sum(graph.replays for graph in made) >= len(wanted) - 1 - 2 * len(made)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@interpreted
def test_a_cache_whose_buffers_moved_is_captured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Recorded] = []
    monkeypatch.setattr(TritonBound, "_capture", lambda self: made.append(Recorded(self)) or made[-1])
    monkeypatch.setattr(TritonBound, "_captures", True)
    again = session("none", "triton")
    stepped(again, 2)
    again.cache.restart()
    assert off(stepped(again, 2), stepped(session("none", "torch"), 2)) < TOLERANCE
    assert [graph.replays for graph in made] == [1, 1]


@interpreted
def test_generates_the_tokens_of_the_reference() -> None:
    """Speculation included, through compile, save and load."""
    texts = []
    for target in ("torch", "triton"):
        lm = smelt.load(tiny.artefact("token-recycling"), target)  # type: ignore[arg-type]
        texts.append(lm.complete([[5, 9, 77]], max_new_tokens=3).rows[0].tokens)
    assert texts[0] == texts[1]


@interpreted
def test_drafts_are_verified_as_the_reference_does() -> None:
    made = []
    for target in ("torch", "triton"):
        decoding = Decoding(session("token-recycling", target), [[3, 4, 3, 4]], Sampling(), Limits(4))  # type: ignore[arg-type]
        made.append((list(decoding.run()), decoding.counts))
    assert made[0] == made[1]


@interpreted
@pytest.mark.parametrize("family", ["gpt2", "mixtral", "gemma2"])
def test_other_families_equal_the_reference(family: str) -> None:
    """Layer norms, biases, experts, caps of logits and windows."""
    plans = [lower(cached(captured(family)), target) for target in ("triton", "torch")]  # type: ignore[arg-type]
    found, wanted = (stepped(Session(plan, 1, 32), 0) for plan in plans)
    assert off(found, wanted) < TOLERANCE
    why = holds_up(plans[0])
    assert why is None if family != "mixtral" else "depends on values" in str(why)


@interpreted
def test_weights_lie_on_the_device_as_they_are_stored() -> None:
    """Once, the ones that run as one product only so, and the small tables decoded beside them."""
    plan = lower(program("finequant"), "triton")
    stepped(Session(plan, 1, 64), 1)
    kernels = [kernel for _, kernel in plan.regions if isinstance(kernel, ProductsKernel)]
    stacked = {id(weight): weight for kernel in kernels for weight in kernel.stacked.values()}.values()
    assert len(stacked) == 2  # query, key and value of two layers
    held = [
        weight.parts.held for weight in (*plan.program.weights.values(), *stacked) if isinstance(weight.parts, Placed)
    ]
    on_device = sum(part.numel() * part.element_size() for parts in held for part in parts.values())
    assert on_device == sum(weight.nbytes for weight in program("finequant").weights.values())


@interpreted
def test_a_plain_module_runs() -> None:
    """An encoder has no cache; its inputs and results are the caller's own."""
    layers = torch.nn.Sequential(torch.nn.Linear(64, 48), torch.nn.GELU(), torch.nn.Linear(48, 32)).eval()
    x = torch.randn(3, 5, 64)
    found = [
        next(
            iter(
                smelt.compile(
                    layers,
                    {"name": "n", "family": "baseline", "does": "Nothing.", "steps": []},
                    example=[x],
                    target=target,
                )
                .run(input=x)
                .values()
            )
        )
        for target in ("triton", "torch")
    ]
    assert off(found[:1], found[1:]) < TOLERANCE


@compiled
def test_everything_holds_in_the_interpreter() -> None:
    in_the_interpreter(__file__)


@compiled
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_the_ways_out_are_told() -> None:
    for call in (partial(smelt.load, "nowhere", "triton"), partial(smelt.compile, "nowhere", target="triton")):
        with pytest.raises(SmeltError, match=r"needs a CUDA device.*target cpp.*TRITON_INTERPRET=1"):
            call()
    with pytest.raises(SmeltError, match="needs a CUDA device"):
        session("none", "triton").prefill([PROMPT])


@pytest.fixture
def on_gpu() -> Iterator[None]:
    """Compiled kernels, whatever the environment of the run says."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1 is set: kernels would be interpreted")
    yield


def bound_of(session: Session, tokens: int) -> TritonBound:
    bound = session.bound(tokens)
    assert isinstance(bound, TritonBound)
    return bound


@pytest.mark.gpu
@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("recipe", [*RECIPES, "coded"])
def test_captured_steps_equal_the_reference_on_a_gpu(recipe: str) -> None:
    """w4a8: between two codes the last bit of a value decides which it gets."""
    ours = session(recipe, "triton")
    found, wanted = stepped(ours, 20), stepped(session(recipe, "torch"), 20)
    assert bound_of(ours, 1).captured
    assert off(found, wanted) < (2e-2 if recipe in ("w4a8", "coded", "quantized-pruning") else 10 * TOLERANCE)


@pytest.mark.gpu
@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize(("recipe", "tree"), [("none", False), ("coded", False), ("token-recycling", True)])
def test_replays_equal_launches_on_a_gpu(recipe: str, tree: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, over one plan, so that both take the same tiles."""
    plan: Plan = lower(program(recipe), "triton")
    launched, replayed, nodes = Session(plan, 1, 64), Session(plan, 1, 64), 4 if tree else 1
    with monkeypatch.context() as patch:
        patch.setattr(TritonBound, "_captures", False)
        wanted = stepped(launched, 12, tree=tree)
    found = stepped(replayed, 12, tree=tree)
    assert bound_of(replayed, nodes).captured and not bound_of(launched, nodes).captured
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.gpu
@pytest.mark.usefixtures("on_gpu")
def test_a_restarted_cache_is_captured_anew_on_a_gpu() -> None:
    ours = session("coded", "triton", 2)
    first = stepped(ours, 8, rows=2)
    ours.cache.restart()
    again = stepped(ours, 8, rows=2)
    assert bound_of(ours, 1).captured and off(again, first) < TOLERANCE


@pytest.mark.gpu
@pytest.mark.usefixtures("on_gpu")
def test_generates_the_tokens_of_the_reference_on_a_gpu() -> None:
    texts = [
        smelt.load(tiny.artefact("none"), target).complete([[5, 9, 77, 300, 2]], max_new_tokens=32).rows[0].tokens  # type: ignore[arg-type]
        for target in ("torch", "triton")
    ]
    assert texts[0] == texts[1]
