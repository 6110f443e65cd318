"""A whole decode step from the Triton kernels, captured in a graph, against torch.compile in bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from smelt.codegen import rows_triton
from smelt.codegen.attention_triton import TritonAttention
from smelt.codegen.gemm_triton import TritonProduct
from smelt.codegen.product_triton import Product
from smelt.ir.cache import Cache, CachePlan, Site

from .contest import Bar, Contest, Entry, Makers, Outputs, Settings, apart
from .decoder import EPS, Model, Shape, plain

TINY = Shape(64, 2, 4, 2, 16, 96, 100, 40, 32)
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 5e-3}  # the stream is rounded twice a layer
PIECES = ("products", "attention", "rotary")


def contests(settings: Settings) -> Iterator[Contest]:
    """One token of one row."""
    shape = TINY if settings.tiny else Shape()
    bar = Bar("smelt 4 bits", 0.7)
    yield Contest(f"decode step, {shape}", TOLERANCE[settings.half], partial(_prepare, settings, shape), apart, bar)


def _prepare(settings: Settings, shape: Shape) -> Makers:
    model = Model.random(shape, settings.device, settings.half)
    step = TritonStep(model, settings)
    keys, values = step.stored()
    exact, double = model.decoded(torch.float64), torch.float64
    right = (plain(model, exact, [k.to(double) for k in keys], [v.to(double) for v in values], double)(),)
    cached = 2 * sum(each.numel() * each.element_size() for each in keys)

    def ours() -> Entry:
        pieces = {piece: partial(step.run, only=piece) for piece in PIECES}
        wrong = partial(step.run, without=shape.layers // 2)
        return Entry(step.run, right, wrong, model.nbytes + cached, captured=True, pieces=pieces)

    def rival() -> Entry:
        dense = torch.bfloat16
        matrices = list(model.decoded(dense))
        first, second = ([each.to(dense, copy=True) for each in part] for part in (keys, values))
        compiled = torch.compile(plain(model, matrices, first, second, dense), dynamic=False)
        read = sum(2 * matrix.numel() for layer in matrices for matrix in layer.values())
        return Entry(lambda: (compiled(),), right, None, read + cached, captured=True)

    makers: dict[str, Callable[[], Entry]] = {"smelt 4 bits": ours}
    return makers | ({"torch compiled bf16": rival} if settings.rivals else {})


class TritonStep:
    """The launches of a step, seven a layer, over buffers of its own; running it again computes the same token."""

    def __init__(self, model: Model, settings: Settings) -> None:
        self.model, shape, device, half = model, model.shape, settings.device, settings.half
        dense = str(half).removeprefix("torch.")
        sites = [Site(i, shape.heads, shape.groups, shape.dim, shape.dim, dense=dense) for i in range(shape.layers)]
        self.cache = _filled(CachePlan(tuple(sites)), shape, device)
        attention = TritonAttention(sites[0])  # all layers have its sizes
        encoding = shape.encoding
        self.normed, self.added = (TritonProduct(Product(encoding, norm=norm), settings.tune) for norm in (True, False))
        self.gated = TritonProduct(Product(encoding, up=encoding, norm=True, act="silu"), settings.tune)
        self.x, self.inner, self.joined, self.attended, self.logits = (
            torch.full((1, n), float("nan"), dtype=half, device=device)
            for n in (shape.hidden, shape.inner, shape.matrices["qkv"][0], shape.heads * shape.dim, shape.vocabulary)
        )
        self.q = torch.full((1, shape.heads, 1, shape.dim), float("nan"), device=device)
        self.heads = self.joined.view(1, 1, -1, shape.dim).transpose(1, 2).split(
            [shape.heads, shape.groups, shape.groups], 1
        )  # fmt: skip
        mixed = self.attended.view(1, shape.heads, 1, shape.dim)
        self.attend = [
            attention.launches(self.cache, i, self.q, mixed, shape.dim**-0.5) for i in range(shape.layers)
        ]  # fmt: skip

    def run(self, only: str | None = None, without: int | None = None) -> Outputs:
        """The logits. `only`: one of PIECES, as if the rest took no time; without: a layer whose MLP is left out."""
        self.x.copy_(self.model.token)
        for number in range(self.model.shape.layers):
            self._layer(number, only, number == without)
        if only in (None, "products"):
            self.normed(self.model.head, self.x, self.logits, gain=self.model.gains[-1], eps=EPS)
        return (self.logits,)

    def _layer(self, number: int, only: str | None, halved: bool) -> None:
        w, (first, second) = self.model.layers[number], self.model.gains[2 * number : 2 * number + 2]
        if only in (None, "products"):
            self.normed(w["qkv"], self.x, self.joined, gain=first, eps=EPS)
        if only in (None, "rotary"):
            self._rotate(number)
        if only in (None, "attention"):
            for launch in self.attend[number]:
                launch()
        if only in (None, "products"):
            self.added(w["out"], self.attended, self.x, residual=self.x)
            if not halved:
                self.gated(w["gate"], self.x, self.inner, up=w["up"], gain=second, eps=EPS)
                self.added(w["down"], self.inner, self.x, residual=self.x)

    def _rotate(self, number: int) -> None:
        segments, step = self.cache.segments[number], self.cache.step
        assert step is not None  # `_filled` began it
        q, k, v = self.heads
        tails, counts = (segments.tail_k, segments.tail_v), self.cache.counts(number)
        rows_triton.rotate_append(q, k, v, self.q, *tails, step.positions, counts, self.model.frequencies)

    def stored(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Copies of keys and of values by layer, [1, G, stored + 1, D]; the last place is the step's."""
        segments, until = self.cache.segments.values(), self.model.shape.stored + 1
        return [s.tail_k[:, :, :until].clone() for s in segments], [s.tail_v[:, :, :until].clone() for s in segments]


def _filled(plan: CachePlan, shape: Shape, device: str) -> Cache:
    """A cache with random tokens, in the step that brings the next one."""
    cache = Cache(plan, 1, shape.stored + 1, device, scratch=1)
    cache.begin(torch.arange(shape.stored, device=device)[None])
    for site in plan.sites:
        cache.append(site.layer, *(torch.randn(1, shape.groups, shape.stored, shape.dim, device=device)
                                   for _ in range(2)))  # fmt: skip
    cache.commit([list(range(shape.stored))])
    cache.end_prefill()
    cache.begin(torch.tensor([[shape.stored]], device=device))
    return cache
