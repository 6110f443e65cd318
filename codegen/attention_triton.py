"""Attention over the segments of a cache site on a GPU, in Triton: split over tokens, merged by log-sum-exp."""

from __future__ import annotations

from typing import Any

import torch

from ..ir.cache import Cache, Site
from ..ir.encoding.expr import Cast, Const, Expr, Load, k, n
from ..ir.errors import SmeltError
from .attention_loaders import Body
from .attention_source import CHUNK, pages_a_chunk, parts
from .attention_triton_template import BODY_LOADERS, BODY_SCAN, KERNEL, SINK_SCAN
from .printers import triton as printer
from .triton_module import load

TILE = 32  # tokens of a dense tile
ROWS = 16  # query rows of a program: the fewest that tl.dot takes; from 32 on, 128 channels spill on sm_80 and sm_90
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
        "pages": pages_a_chunk(site),
        "window": site.window or 0,
        "chunk": CHUNK,
        "tile": TILE,
    }
    text["sink_scan"] = SINK_SCAN.substitute(text) if site.sink else ""
    text |= _body(site, text) if kept else {"body_loaders": "", "body_scan": "    chunks = 0", "parameters": ""}
    return KERNEL.substitute(text)


def _body(site: Site, text: dict[str, Any]) -> dict[str, str]:
    """The loaders of the body's pages, the scan over them, and the parts as parameters of the kernel."""
    body, pages = Body.of(site), parts(site)
    names = {role: {part: f"{role}_{part}" for r, part, _ in pages if r == role} for role in ("keys", "values")}
    here = {
        role: ", ".join(f"{role}_{part} + at_page * {page.numel()}" for r, part, page in pages if r == role)
        for role in ("keys", "values")
    }
    scale, zero = (*body.keys.scale, Const(1.0, "float32"))[0], (*body.keys.zero, None)[0] or Const(0.0, "float32")
    inside = f"n < {site.kept}"
    fill = {
        **text,
        "body": body.tile,
        "tiles": -(-site.kept // body.tile),
        "key_parts": ", ".join(names["keys"].values()),
        "value_parts": ", ".join(names["values"].values()),
        "key": _tile(body.keys.factor, site.key_dim, inside, names["keys"]),
        "key_scale": _tile(scale, site.key_dim, inside, names["keys"]),
        "key_zero": _tile(zero, site.key_dim, inside, names["keys"]),
        "value": _tile(site.value_encoding.expr((site.kept, site.value_dim)), site.value_dim, inside, names["values"]),
        "keys_here": here["keys"],
        "values_here": here["values"],
    }
    return {
        "body_loaders": BODY_LOADERS.substitute(fill),
        "body_scan": BODY_SCAN.substitute(fill),
        "parameters": "".join(f", {role}_{part}" for role, part, _ in pages),
    }


def signature(site: Site, sinks: bool = False) -> dict[str, dict[str, str]]:
    """Triton's type of every argument of both kernels, for compiling ahead of time."""
    dense, kept = POINTERS[site.dense], site.kept if site.tail is not None else 0
    pages = {
        f"{role}_{part}": POINTERS[str(page.dtype).removeprefix("torch.")]
        for role, part, page in (parts(site) if kept else [])
    }
    attend = {
        **dict.fromkeys(("q", "work", "stats"), "*fp32"),
        **dict.fromkeys(("sink_k", "sink_v", "tail_k", "tail_v"), dense),
        **pages,
        **{"places": "*i32", "counts": "*i32", "positions": "*i64", "visible": "*i64"},
        **dict.fromkeys(("q_row", "q_head", "q_token", "T", "W", "P"), "i32"),
        **{"scale": "fp32", "softcap": "fp32", "SOFTCAP": "constexpr", "M": "constexpr"},
    }
    merge = {
        **{"work": "*fp32", "stats": "*fp32", "sinks": "*fp32" if sinks else "constexpr", "out": "*fp32"},
        **dict.fromkeys(("out_row", "out_head", "out_token", "T", "chunks"), "i32"),
        "SINKS": "constexpr",
    }
    return {"attend": attend, "merge": merge}


class TritonAttention:
    """The kernels of a site, called for one layer of a cache: two launches, whose grids depend on buffer sizes only."""

    def __init__(self, site: Site) -> None:
        if why := covers(site):
            raise SmeltError(f"cache site of layer {site.layer}: no attention kernel on this target: {why}")
        self.site, self.source = site, source(site)
        module = load(self.source, "attention")
        self.attend, self.merge = module.attend, module.merge

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
        segments, step, site = cache.segments[layer], cache.step, self.site
        if step is None:
            raise RuntimeError("no step: call begin and append before attending")
        new, pairs = step.tokens, cache.batch * site.kv_heads
        # the grid covers the buffers, not what they hold: a captured graph of launches stays right as the cache fills
        chunks = -(-segments.slots // pages_a_chunk(site)) - (-segments.width // CHUNK)
        rows = new * site.group
        work = q.new_empty(pairs * chunks * rows * site.value_dim)
        stats = q.new_empty(pairs * chunks * rows * 2)
        dense = (segments.sink_k, segments.sink_v, segments.tail_k, segments.tail_v)
        places = segments.places if segments.places is not None else cache.counts(layer)
        self.attend[(pairs, chunks, -(-rows // ROWS))](
            q, work, stats, *dense, *segments.keys.values(), *segments.values.values(),
            places, cache.counts(layer), step.positions, step.words,
            *q.stride()[:3], new, segments.width, segments.slots, scale, softcap or 0.0, softcap is not None, ROWS,
        )  # fmt: skip
        self.merge[(cache.batch * site.heads * new,)](
            work, stats, sinks, out, *out.stride()[:3], new, chunks, sinks is not None
        )


def _padded(dim: int) -> int:
    return max(16, 1 << (dim - 1).bit_length())


def _dense(dtype: str, dim: int) -> Expr:
    stored = Load("x", n * dim + k, dtype)
    return stored if dtype == "float32" else Cast("float32", stored)


def _tile(expr: Expr, dim: int, rows: str, names: dict[str, str] | None = None) -> str:
    return printer.text(expr, names, row_mask=f"({rows})", column_mask=f"(k < {dim})")
