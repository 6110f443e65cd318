"""HyperAttention (arXiv:2310.05869) of whole prompts on a GPU, in Triton: exact blocks, then a launch a level."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from ..ir.cache import Cache, Site
from ..ir.cache.hyper import Hyper, buckets, key_of, planes
from ..ir.errors import SmeltError
from .attention_triton import POINTERS
from .hyper import covers, whole_prompts
from .hyper_layout import Layout, layout
from .hyper_triton_template import KERNEL
from .triton_module import load

TILE = 32  # keys of a tile
STAGES = 2


def source(site: Site, options: Hyper) -> str:
    """The kernels `exact` and `approximate` as a Python module."""
    return KERNEL.substitute(
        site=f"{site.heads}x{site.kv_heads}x{site.key_dim} in {site.dense}",
        heads=site.heads,
        groups=site.kv_heads,
        group=site.group,
        key_dim=site.key_dim,
        value_dim=site.value_dim,
        key_pad=_padded(site.key_dim),
        value_pad=_padded(site.value_dim),
        compute=site.dense,
        block=options.block,
        sample=options.sample,
        sink=options.sink,
        rows=rows(site, options),
        tile=TILE,
        pieces=-(-options.block // rows(site, options)),
    )


def rows(site: Site, options: Hyper) -> int:
    """Queries of a program: 32 of 128 channels of 16 bits take 255 registers, 64 spill (triton 3.9, sm_80 and sm_90).

    float32 products take no tensor cores, but twice the registers.
    """
    most = 32 if site.dense != "float32" and max(site.key_dim, site.value_dim) <= 128 else 16
    return max(16, min(most, 1 << (options.block.bit_length() - 1)))


def warps(site: Site) -> int:
    """Warps of a program."""
    return 8 if site.dense == "float32" or max(site.key_dim, site.value_dim) > 128 else 4


def signature(site: Site) -> dict[str, dict[str, str]]:
    """Triton's type of every argument of both kernels, for compiling ahead of time."""
    dense = POINTERS[site.dense]
    tensors = {"q": "*fp32", "out": "*fp32", "keys": dense, "values": dense, "state": "*fp32"}
    strides = dict.fromkeys(("q_row", "q_head", "q_token", "out_row", "out_head", "out_token", "W", "T"), "i32")
    return {
        "exact": {**tensors, "units": "*i32", "lengths": "*i32", **strides, "scale": "fp32"},
        "approximate": {
            **tensors,
            **dict.fromkeys(("parts", "orders", "starts"), "*i32"),
            **strides,
            **{"B": "i32", "key": "i64", "scale": "fp32"},
        },
    }


class TritonHyperAttention:
    """The kernels of a site for steps that bring the whole prompt of every row, into a cache that is empty.

    Hash and sort are PyTorch's: of the work, one product with `projections` columns and a sort a level.
    """

    def __init__(self, site: Site, options: Hyper) -> None:
        if why := covers(site):
            raise SmeltError(f"cache site of layer {site.layer}: no HyperAttention: {why}")
        self.site, self.options, self.source = site, options, source(site, options)
        module = load(self.source, "hyper")
        self.exact, self.approximate = module.exact, module.approximate

    def __call__(self, cache: Cache, layer: int, q: torch.Tensor, out: torch.Tensor, scale: float) -> None:
        """out [B, H, T, E] = attention of the q [B, H, T, D] of a prompt that was appended; padding becomes 0."""
        if cache.step is None:
            raise RuntimeError("no step: call begin and append before attending")
        site, options, segments, new = self.site, self.options, cache.segments[layer], q.shape[2]
        lengths = whole_prompts(cache, layer)
        tables = _tables(lengths, new, options, str(q.device))
        counts = torch.tensor(lengths, dtype=torch.int32, device=q.device)
        state = q.new_empty(*q.shape[:3], 2)
        padded = torch.arange(new, device=q.device) >= counts[:, None]
        out.masked_fill_(padded[:, None, :, None], 0.0)
        pieces, shared = -(-options.block // rows(site, options)), (q, out, segments.tail_k, segments.tail_v, state)
        strides = (*q.stride()[:3], *out.stride()[:3], segments.width, new)
        choice = {"num_warps": warps(site), "num_stages": STAGES}
        units = tables.layout.exact
        self.exact[(len(units) * pieces, site.heads)](*shared, units, counts, *strides, scale, **choice)
        if not tables.sides:
            return
        orders, first = self._orders(cache, layer, q, tables), 0
        for until in tables.until:
            parts = tables.layout.parts[first:until]
            self.approximate[(len(parts) * pieces, site.heads)](
                *shared, parts, orders, tables.layout.starts, *strides, cache.batch, key_of(options, layer), scale,
                **choice,
            )  # fmt: skip
            first = until

    def _orders(self, cache: Cache, layer: int, q: torch.Tensor, tables: _Tables) -> torch.Tensor:
        """int32 [levels, B, H + G, T]: the tokens of each side of each rectangle by bucket, where the side lies."""
        normals = planes(self.options, self.site.key_dim, layer)
        keys = cache.segments[layer].tail_k[:, :, : q.shape[2]].float()
        of_queries, of_keys = buckets(q, normals), buckets(keys, normals)
        orders = []
        for asking, asked in tables.sides:  # sides keep their place: those of a level are numbered by position
            codes = torch.cat([of_queries + asking[:, None], of_keys + asked[:, None]], 1)
            orders.append(torch.sort(codes, stable=True).indices)
        return torch.stack(orders).int()


@dataclass(frozen=True)
class _Tables:
    """A layout on a device; for each level, the number of the side that a token belongs to, above all bucket bits."""

    layout: Layout
    until: list[int]
    sides: list[tuple[torch.Tensor, torch.Tensor]]


@functools.lru_cache(64)
def _tables(lengths: tuple[int, ...], tokens: int, options: Hyper, device: str) -> _Tables:
    host = layout(lengths, tokens, options)
    borders = torch.zeros(len(host.until), 2, len(lengths), tokens + 1, dtype=torch.int64)
    for b, first, middle, end, level in host.pieces.tolist():
        for side, low, high in ((0, middle, end), (1, first, middle)):
            borders[level, side, b, low] = borders[level, side, b, high] = 1
    # a token outside of all sides must not move: it is a side of its own
    inside = torch.zeros_like(borders)
    for b, first, middle, end, level in host.pieces.tolist():
        inside[level, 0, b, middle:end] = inside[level, 1, b, first:middle] = 1
    numbers = ((borders | 1 - inside).cumsum(-1) << options.projections)[..., :tokens].to(device)
    moved = Layout(*(getattr(host, name).to(device) for name in ("exact", "pieces", "parts", "until", "starts")))
    return _Tables(moved, host.until.tolist(), [(level[0], level[1]) for level in numbers])


def _padded(dim: int) -> int:
    return max(16, 1 << (dim - 1).bit_length())
