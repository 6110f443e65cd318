"""Attention over the segments of a cache site on a GPU, in Triton: equal shares of all tiles, merged."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch

from ..ir.cache import Cache, Site
from ..ir.cache.body import Body
from ..ir.errors import SmeltError
from .attention import Picks
from .attention_triton_source import PIECES, ROWS, TILE, Scan, parameters, scans, source
from .product_triton import POINTERS
from .triton_module import load

__all__ = [
    "OCCUPANCY", "PIECES", "POINTERS", "ROWS", "TILE", "Launch", "Picks", "TritonAttention", "covers", "options",
    "signature", "source",
]  # fmt: skip

Launch: TypeAlias = Callable[[], Any]

OCCUPANCY = 2  # programs on a multiprocessor
INTERPRETED = 6  # programs where there is no multiprocessor to count: in Triton's interpreter


def covers(site: Site) -> str | None:
    """Why a site's attention is not computed by these kernels, or None."""
    if site.predict is not None:
        return "a layer's tokens are rebuilt from the layer before, which no kernel does"
    return _unprinted(site)


def _unprinted(site: Site) -> str | None:
    """Why there is no kernel for a site, or None."""
    try:
        source(site)
    except (NotImplementedError, SmeltError) as error:
        return str(error)
    return None


def signature(site: Site, sinks: bool = False, lists: bool = False) -> dict[str, dict[str, str]]:
    """Triton's type of every argument of both kernels, for compiling ahead of time."""
    kernels, constants = parameters(site, sinks, lists), dict.fromkeys(("SINKS", "PAIRS", "M"), "constexpr")
    return {
        "attend": {**kernels["attend"], "SOFTCAP": "constexpr", **constants},
        "merge": {**kernels["merge"], **constants},
    }


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
        if why := _unprinted(site):
            raise SmeltError(f"cache site of layer {site.layer}: no attention kernel on this target: {why}")
        self.site, self.source, self.programs = site, source(site), programs
        module = load(self.source, "attention")
        self.attend, self.merge = module.attend, module.merge
        self._scans, self._names = scans(site), parameters(site)
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
        picks: Picks | None = None,
    ) -> None:
        """out [B, H, T, E] = attention of q [B, H, T, D] over a layer in the cache's current step; both float32."""
        for launch in self.launches(cache, layer, q, out, scale, softcap, sinks, picks):
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
        picks: Picks | None = None,
    ) -> tuple[Launch, Launch]:
        """What `__call__` runs: right for every later step of this shape whose tensors lie where these do.

        `picks`: what is read of the body, where the site retrieves; without it everything is.
        """
        segments, step, site = cache.segments[layer], cache.step, self.site
        if step is None:
            raise RuntimeError("no step: call begin and append before attending")
        programs, new = self._programs(q.device), step.tokens
        work, stats = self.scratch(q)
        given: dict[str, Any] = {"q": q, "out": out, "work": work, "stats": stats, "counts": cache.counts(layer)}
        given |= {name: getattr(segments, name) for name in ("sink_k", "sink_v", "tail_k", "tail_v")}
        for body, scan in zip(segments.bodies, self._scans, strict=True):
            given |= held(body, scan)
        given |= {"sink_at": segments.sink_at, "turns": cache.turns(layer), "sinks": sinks}
        given |= {"positions": step.positions, "visible": step.words, "B": cache.batch, "T": new, "P": programs}
        given |= dict(zip(("q_row", "q_head", "q_token"), q.stride(), strict=False))
        given |= dict(zip(("out_row", "out_head", "out_token"), out.stride(), strict=False))
        given |= {"W": segments.width, "scale": scale, "softcap": softcap or 0.0}
        given |= self._listed(picks, layer, new)
        constants = {"SINKS": sinks is not None, "PAIRS": _power(cache.batch * site.kv_heads)}
        attend, merge = ({name: given[name] for name in self._names[kernel]} for kernel in ("attend", "merge"))
        return (
            partial(
                self.attend[(programs,)], **attend, SOFTCAP=softcap is not None, **constants, M=ROWS, **options(site)
            ),
            partial(self.merge[(cache.batch * site.heads * new,)], **merge, **constants, M=ROWS),
        )

    def _listed(self, picks: Picks | None, layer: int, new: int) -> dict[str, Any]:
        """The lists as arguments."""
        if picks is None:
            return dict.fromkeys(("picks", "picked", "N"))
        if "N" not in self._names["merge"]:
            raise ValueError(f"layer {layer}: its site reads the whole body, and takes no list of what to read")
        entries, counts = picks
        shape = (counts.shape[0], new, self.site.kv_heads)
        if entries.shape[:3] != shape or counts.shape != shape or not entries.is_contiguous() & counts.is_contiguous():
            raise ValueError(
                f"layer {layer}: lists are contiguous [B, T, G, n] and [B, T, G], here [B, {new}, {shape[2]}, …], "
                f"not {list(entries.shape)} and {list(counts.shape)}"
            )
        return {"picks": entries, "picked": counts, "N": entries.shape[3]}

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


def held(body: Body, scan: Scan) -> dict[str, Any]:
    """The buffers of a body as arguments."""
    given: dict[str, Any] = {}
    for part in scan.form.parts:
        stored = body.keys if part.role == "keys" else body.values
        buffer = body.tables[part.role].get(part.name) if part.shared else stored[part.name]
        buffer = part.sample.to(body.device) if buffer is None else buffer  # what needs no data, as a rotation
        given[scan.name(part)] = buffer
        given[f"{scan.name(part)}_step"] = buffer.stride(0) if len(buffer) > 1 else 0
    at = scan.number
    given |= {f"pages{at}": body.pages, f"table{at}": body.table, f"held{at}": body.held, f"P{at}": body.table.shape[2]}
    return given | {f"places{at}": body.places, f"bias{at}": body.bias}


def _power(n: int) -> int:
    """The lowest power of two from n on."""
    return 1 << (n - 1).bit_length()
