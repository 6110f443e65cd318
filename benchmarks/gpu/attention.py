"""Attention of new tokens over a long cache: dense, 8 bits and 4 bits, against torch's over the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from smelt.codegen.attention_triton import TritonAttention
from smelt.ir.cache import Cache, CachePlan, Site
from smelt.ir.encoding import Affine

from .contest import Bar, Contest, Entry, Makers, Outputs, Run, Settings, worst

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3}  # keys, queries and weights are rounded to 8 or 11 bits
BACKENDS = {"sdpa flash": SDPBackend.FLASH_ATTENTION, "sdpa cudnn": SDPBackend.CUDNN_ATTENTION}


@dataclass(frozen=True)
class Shape:
    """Rows, stored tokens and new ones, heads and channels, and tokens of a page."""

    rows: int
    stored: int
    new: int = 1
    heads: int = 32
    groups: int = 8
    dim: int = 128
    page: int = 64

    def __str__(self) -> str:
        """For the table."""
        new = f", tree of {self.new}" if self.new > 1 else ""
        return f"{self.rows} x {self.stored} tokens{new}, {self.heads}/{self.groups} heads of {self.dim}"


SHAPES = (Shape(1, 32768), Shape(8, 32768), Shape(8, 4096), Shape(1, 32768, new=16))
TINY = (Shape(2, 150, 1, 4, 2, 32, 32), Shape(1, 150, 5, 4, 2, 32, 32))


def contests(settings: Settings) -> Iterator[Contest]:
    """By rows and context; a tree is checked and timed over the 4-bit cache as well."""
    for shape in TINY if settings.tiny else SHAPES:
        bar = Bar("smelt int4", 1.3, ("smelt 16 bits", *BACKENDS, "flex")) if shape.stored == 32768 else None
        bar = bar if shape.new == 1 else None
        prepare = partial(_prepare, settings, shape)
        yield Contest(str(shape), TOLERANCE[settings.half], prepare, worst, bar)


def sites(shape: Shape, dense: str) -> dict[str, Site]:
    """What is stored, by name."""
    plain = Site(0, shape.heads, shape.groups, shape.dim, shape.dim, dense=dense)
    paged = replace(plain, sink=4, tail=shape.page, page=shape.page)
    of = {bits: (Affine(bits, shape.page, "channel", True), Affine(bits, shape.dim // 2, "token", True))
          for bits in (8, 4)}  # fmt: skip
    return {"16 bits": plain} | {f"int{b}": replace(paged, keys=keys, values=v) for b, (keys, v) in of.items()}


def _prepare(settings: Settings, shape: Shape) -> Makers:
    device, half = settings.device, settings.half
    keys, values = (
        torch.randn(shape.rows, shape.groups, shape.stored + shape.new, shape.dim, device=device, dtype=half)
        for _ in range(2)
    )
    q = torch.randn(shape.rows, shape.heads, shape.new, shape.dim, device=device, dtype=half)
    tree = torch.ones(shape.new, shape.new, dtype=torch.bool, device=device).tril()
    if shape.new > 2:
        tree[2:, 1] = False  # two branches
    flops = 4.0 * shape.rows * shape.heads * shape.new * shape.dim * shape.stored
    makers: dict[str, Callable[[], Entry]] = {
        f"smelt {name}": partial(_ours, site, shape, (q, keys, values), tree, flops)
        for name, site in sites(shape, str(half).removeprefix("torch.")).items()
    }
    if settings.rivals:
        plain = 2 * keys.numel() * keys.element_size()
        right = (_exact(q, keys, values, tree),)
        mask = torch.cat([tree.new_ones(shape.new, shape.stored), tree], 1) if shape.new > 1 else None

        def rival(run: Callable[[], torch.Tensor]) -> Entry:
            return Entry(lambda: (run(),), right, None, plain, flops)

        for name, backend in BACKENDS.items():
            makers[name] = partial(rival, partial(_sdpa, backend, q, keys, values, mask))
        if shape.new == 1 and shape.rows == 1:
            makers["flex"] = lambda: rival(_flex(q, keys, values))
    return makers


def _ours(site: Site, shape: Shape, fresh: Outputs, tree: torch.Tensor, flops: float) -> Entry:
    q, keys, values = fresh
    stored, new, rows, device = shape.stored, shape.new, shape.rows, keys.device
    cache = Cache(CachePlan((site,)), rows, stored + new, device, scratch=new)
    cache.begin(torch.arange(stored, device=device).expand(rows, -1))
    cache.append(0, keys[:, :, :stored], values[:, :, :stored])
    cache.commit([list(range(stored))] * rows)
    cache.end_prefill()
    depth = tree.sum(1) - 1
    cache.begin((stored + depth).expand(rows, -1), ancestors=tree if new > 1 else None)
    cache.append(0, keys[:, :, stored:], values[:, :, stored:])
    wide, scale, kernel = q.float(), shape.dim**-0.5, TritonAttention(site)

    def launch(scale: float) -> Run:
        out = torch.full((rows, shape.heads, new, shape.dim), float("nan"), device=device)
        launches = kernel.launches(cache, 0, wide, out, scale)

        def run() -> Outputs:
            for each in launches:
                each()
            return (out,)

        return run

    right = (cache.attend(0, wide, scale),)
    return Entry(launch(scale), right, launch(1.05 * scale), rows * int(site.bits(stored + new)) / 8, flops)


def _exact(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tree: torch.Tensor) -> torch.Tensor:
    """A row at a time in float64."""
    groups, new = keys.shape[1], q.shape[2]
    out = []
    for query, k, v in zip(q.double(), keys, values, strict=True):
        grouped = query.unflatten(0, (groups, -1)) * q.shape[3] ** -0.5
        logits = grouped @ k.double()[:, None].mT
        logits[..., -new:].masked_fill_(~tree, float("-inf"))
        out.append((torch.softmax(logits, -1) @ v.double()[:, None]).flatten(0, 1))
    return torch.stack(out)


def _sdpa(
    backend: SDPBackend, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    with sdpa_kernel(backend):
        return functional.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)


def _flex(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Callable[[], torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, keys, values, enable_gqa=True)
