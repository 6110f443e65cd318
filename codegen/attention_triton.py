"""Attention over the segments of a cache site on a GPU, in Triton: equal shares of all tiles, merged."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch

from ..ir.cache import Cache, Site
from ..ir.encoding.expr import Cast, Expr, Load, k, n
from ..ir.errors import SmeltError
from .attention_source import parts
from .attention_triton_columns import tile
from .attention_triton_template import BODY_LOADERS, BODY_SCAN, KERNEL, SINK_SCAN
from .printers import triton as printer
from .triton_module import load

Launch: TypeAlias = Callable[[], Any]

TILE = 32  # tokens of a dense tile
ROWS = 16  # query rows of a program: the fewest that tl.dot takes; from 32 on, 128 channels spill on sm_80 and sm_90
PIECES = 16  # pieces of a unit that are merged at once
OCCUPANCY = 2  # programs on a multiprocessor
INTERPRETED = 6  # programs where there is no multiprocessor to count: in Triton's interpreter
POINTERS = {
    "float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16", "int32": "*i32", "int8": "*i8", "uint8": "*u8",
}  # fmt: skip


def covers(site: Site) -> str | None:
    """Why there is no kernel for a site, or None."""
    try:
        source(site)
    except (NotImplementedError, SmeltError) as error:
        return str(error)
    return None


def source(site: Site) -> str:
    """The kernels `attend` and `merge` of a site as a Python module; NotImplementedError where it cannot be printed."""
    kept = site.kept if site.tail is not None else 0
    text: dict[str, Any] = {
        "site": site,
        "heads": site.heads,
        "groups": site.kv_heads,
        "group": site.group,
        "key_dim": site.key_dim,
        "value_dim": site.value_dim,
        "key_pad": _padded(site.key_dim),
        "value_pad": _padded(site.value_dim),
        "dense_key": _tile(_dense(site.dense, site.key_dim), site.key_dim, "live"),
        "dense_value": _tile(_dense(site.dense, site.value_dim), site.value_dim, "live"),
        "compute": site.dense,
        "sink": site.sink,
        "kept": kept,
        "window": site.window or 0,
        "tile": TILE,
        "pieces": PIECES,
    }
    text["sink_scan"] = SINK_SCAN.substitute(text) if site.sink else ""
    none = {"body_loaders": "", "body_scan": "", "body_tiles": "n_body * 0", "parameters": ""}
    text |= _body(site, text) if kept else none
    return KERNEL.substitute(text)


def _body(site: Site, text: dict[str, Any]) -> dict[str, str]:
    """The loaders of the body's pages, the scan over them, and the parts as parameters of the kernel.

    Scales stay with the codes: tensor cores read the query in a form that every warp holds whole, so that scaling it
    (as the kernel for CPUs does) took 64 registers a thread more than scaling 32 keys.
    """
    pages, tiles = parts(site), -(-site.kept // TILE)
    names = {role: {part: f"{role}_{part}" for r, part, _ in pages if r == role} for role in ("keys", "values")}
    here = {
        role: ", ".join(f"{role}_{part} + at_page * {page.numel()}" for r, part, page in pages if r == role)
        for role in ("keys", "values")
    }
    keys, values = (
        tile(encoding.expr((site.kept, dim)), dim, _padded(dim), TILE, site.kept, names[role])
        for role, encoding, dim in (
            ("keys", site.key_encoding, site.key_dim),
            ("values", site.value_encoding, site.value_dim),
        )
    )
    fill = {
        **text,
        "tiles": tiles,
        "key_parts": ", ".join(names["keys"].values()),
        "value_parts": ", ".join(names["values"].values()),
        "key": keys,
        "value": values,
        "keys_here": here["keys"],
        "values_here": here["values"],
    }
    return {
        "body_loaders": BODY_LOADERS.substitute(fill),
        "body_scan": BODY_SCAN.substitute(fill),
        "body_tiles": f"n_body // {site.kept} * {tiles}",
        "parameters": "".join(f", {role}_{part}" for role, part, _ in pages),
    }


def signature(site: Site, sinks: bool = False) -> dict[str, dict[str, str]]:
    """Triton's type of every argument of both kernels, for compiling ahead of time."""
    dense, kept = POINTERS[site.dense], site.kept if site.tail is not None else 0
    pages = {
        f"{role}_{part}": POINTERS[str(page.dtype).removeprefix("torch.")]
        for role, part, page in (parts(site) if kept else [])
    }
    numbers = {"sinks": "*fp32" if sinks else "constexpr"}
    numbers |= dict.fromkeys(("out_row", "out_head", "out_token", "B", "T", "P"), "i32")
    numbers |= dict.fromkeys(("SINKS", "BATCH", "M"), "constexpr")
    attend = {
        **dict.fromkeys(("q", "out", "work", "stats"), "*fp32"),
        **dict.fromkeys(("sink_k", "sink_v", "tail_k", "tail_v"), dense),
        **pages,
        **{"places": "*i32", "counts": "*i32", "positions": "*i64", "visible": "*i64"},
        **numbers,
        **dict.fromkeys(("q_row", "q_head", "q_token", "W"), "i32"),
        **{"scale": "fp32", "softcap": "fp32", "SOFTCAP": "constexpr"},
    }
    merge = {**dict.fromkeys(("work", "stats", "out"), "*fp32"), "counts": "*i32", **numbers}
    return {"attend": attend, "merge": merge}


def options(site: Site) -> dict[str, int]:
    """Warps and stages of `attend`: up to 128 channels of 16 bits take four warps, 160 to 250 registers (triton 3.9).

    Wider ones would spill with four warps and take 124 KiB with three stages. float32 products take no tensor cores:
    beside encoded pages of 128 channels they spill whatever the warps.
    """
    wide = max(site.key_dim, site.value_dim) > 128 or site.dense == "float32"
    return {"num_warps": 8, "num_stages": 2} if wide else {"num_warps": 4, "num_stages": 3}


class TritonAttention:
    """The kernels of a site: two launches a layer, the same ones whatever the cache holds.

    Grids depend on the device and on the shape of the step, never on lengths, so that a captured graph of the launches
    stays right while the cache fills its buffers. Scratch grows with the programs, not with the context. The bits of a
    row are the same in every run of a batch, but not in every batch: where a row is cut depends on what others store.

    `programs`: of the grid; default as many as the device runs at once.
    """

    def __init__(self, site: Site, programs: int | None = None) -> None:
        if why := covers(site):
            raise SmeltError(f"cache site of layer {site.layer}: no attention kernel on this target: {why}")
        self.site, self.source, self.programs = site, source(site), programs
        module = load(self.source, "attention")
        self.attend, self.merge = module.attend, module.merge
        self._scratch: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(
        self,
        cache: Cache,
        layer: int,
        q: torch.Tensor,
        out: torch.Tensor,
        scale: float,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        """out [B, H, T, E] = attention of q [B, H, T, D] over a layer in the cache's current step; both float32."""
        for launch in self.launches(cache, layer, q, out, scale, softcap, sinks):
            launch()

    def launches(
        self,
        cache: Cache,
        layer: int,
        q: torch.Tensor,
        out: torch.Tensor,
        scale: float,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> tuple[Launch, Launch]:
        """What `__call__` runs: right for every later step of this shape whose tensors lie where these do."""
        segments, step, site = cache.segments[layer], cache.step, self.site
        if step is None:
            raise RuntimeError("no step: call begin and append before attending")
        programs, new, counts = self._programs(q.device), step.tokens, cache.counts(layer)
        work, stats = self.scratch(q)
        dense = (segments.sink_k, segments.sink_v, segments.tail_k, segments.tail_v)
        places = segments.places if segments.places is not None else counts
        constants = {"SINKS": sinks is not None, "BATCH": _power(cache.batch), "M": ROWS}
        attend = partial(
            self.attend[(programs,)],
            q, out, work, stats, *dense, *segments.keys.values(), *segments.values.values(),
            places, counts, step.positions, step.words, sinks, *q.stride()[:3], *out.stride()[:3],
            cache.batch, new, segments.width, segments.slots, scale, softcap or 0.0,
            SOFTCAP=softcap is not None, **constants, **options(site),
        )  # fmt: skip
        merge = partial(
            self.merge[(cache.batch * site.heads * new,)],
            work, stats, sinks, out, counts, *out.stride()[:3], cache.batch, new, programs, **constants,
        )  # fmt: skip
        return attend, merge

    def scratch(self, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Values, and maxima with sums, of two pieces a program; the layers and steps of a device share them."""
        if q.device not in self._scratch:
            rows = 2 * self._programs(q.device) * ROWS
            self._scratch[q.device] = q.new_empty(rows * self.site.value_dim), q.new_empty(rows * 2)
        return self._scratch[q.device]

    def _programs(self, device: torch.device) -> int:
        if self.programs is not None:
            return self.programs
        if device.type != "cuda":
            return INTERPRETED
        return OCCUPANCY * int(torch.cuda.get_device_properties(device).multi_processor_count)


def _power(n: int) -> int:
    """The lowest power of two from n on."""
    return 1 << (n - 1).bit_length()


def _padded(dim: int) -> int:
    return max(16, _power(dim))


def _dense(dtype: str, dim: int) -> Expr:
    stored = Load("x", n * dim + k, dtype)
    return stored if dtype == "float32" else Cast("float32", stored)


def _tile(expr: Expr, dim: int, rows: str) -> str:
    return printer.text(expr, row_mask=f"({rows})", column_mask=f"(k < {dim})")
