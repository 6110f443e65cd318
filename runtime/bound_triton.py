"""A plan of target triton bound to one batch, one number of tokens and one cache: launches, captured in a CUDA graph.

Inputs and results are buffers of the host; `run` takes the inputs to buffers of the device and runs the step there. A
result comes back when somebody asks for it. The first run launches each kernel by itself, which compiles and tunes it.
From the second on the step is one graph: its grids and addresses are fixed, and what changes from step to step (tokens,
positions, counts of the cache, who sees whom, how tokens are chosen) is read from device memory. A cache whose buffers
moved starts over. Pages leave the cache between steps, by launches of their own (`Cache.commit`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import fx

from ..codegen.choose_triton import TritonChooser, likes
from ..codegen.device_triton import device
from ..codegen.encode_triton import encoded
from ..codegen.fuse import Region
from ..codegen.lower_triton import holds_up
from ..codegen.mass_triton import column_sums, covers
from ..codegen.plan import Plan
from ..ir.cache import Cache
from ..ir.cache.step import Step
from ..ir.ops import HEAD, is_op
from .bound import Bound
from .pool import ALIGN

_LAST, _POSITIONS, _VALID, _WORDS = "last token", "step positions", "step valid", "step words"  # no names of inputs


@dataclass(frozen=True)
class Standing(Step):
    """A step whose tensors lie in buffers of the device that every step of its shape uses."""

    bits: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    @cached_property
    def words(self) -> torch.Tensor:
        """Who sees whom, as the host worked it out."""
        return self.bits


@dataclass(frozen=True)
class Room:
    """What a region's kernel is bound with."""

    cache: Cache | None
    value: Callable[[fx.Node], torch.Tensor]
    copy: Callable[[torch.Tensor], torch.Tensor]
    take: Callable[..., torch.Tensor]
    spare: Callable[..., torch.Tensor]


class Mirror:
    """Tensors of the host, `here`, and their likes on a device, `there`: one block each, which one copy brings over."""

    def __init__(self, likes: Mapping[str, torch.Tensor], device: torch.device) -> None:
        ends, places = 0, dict[str, tuple[int, int]]()
        for name, like in likes.items():
            places[name] = ends, ends + like.numel() * like.element_size()
            ends += -(-like.numel() * like.element_size() // ALIGN) * ALIGN
        self._from = torch.zeros(ends, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._to = torch.zeros(ends, dtype=torch.uint8, device=device)
        self.here, self.there = (
            {name: block[slice(*places[name])].view(like.dtype).view(like.shape) for name, like in likes.items()}
            for block in (self._from, self._to)
        )
        self._read = _event(device)

    def send(self) -> None:
        """Bring what is here over; whoever writes here again must have called `wait` since."""
        self._to.copy_(self._from, non_blocking=True)
        if self._read is not None:
            self._read.record()

    def wait(self) -> None:
        """Until the device has read what was sent."""
        if self._read is not None:
            self._read.synchronize()


class Results(Mapping[str, torch.Tensor]):
    """Results of a run by name, each brought to a buffer of the host when it is first asked for after the run."""

    def __init__(self, there: Mapping[str, torch.Tensor], device: torch.device) -> None:
        self._there, self._device = there, device
        self._here: dict[str, torch.Tensor] = {}
        self._old = set(there)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._old:
            if name not in self._here:
                self._here[name] = _on_host(self._there[name], self._device)
            self._here[name].copy_(self._there[name])  # waits for the device
            self._old.remove(name)
        return self._here[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._there)

    def __len__(self) -> int:
        return len(self._there)

    def forget(self) -> None:
        """A run follows: what was brought is old."""
        self._old = set(self._there)


class TritonBound(Bound):
    """`run()` computes `outputs` from `inputs`; both are buffers of the host by name, outputs once they are read."""

    def __init__(
        self,
        plan: Plan,
        inputs: Mapping[str, torch.Tensor],
        cache: Cache | None,
        decoded: dict[str, torch.Tensor],
        last: torch.Tensor | None = None,
    ) -> None:
        """As `Bound`; `cache` lies on the plan's device. Raises SmeltError where this process has no such device."""
        device()
        given = dict(inputs) if last is None else {**inputs, _LAST: last}
        if cache is not None:
            rows, new = next(iter(inputs.values())).shape[:2]
            given |= likes(rows)
            given |= _of_step(Step(torch.zeros(rows, new, dtype=torch.int64), torch.ones(rows, new, dtype=torch.bool)))
        with _on(plan.device):
            self._mirror = Mirror(given, plan.device)
            there = self._mirror.there
            super().__init__(plan, {name: there[name] for name in inputs}, cache, decoded, there.get(_LAST))
        for segments in cache.segments.values() if cache is not None else ():
            for body in segments.bodies:
                body.encode = encoded  # pages leave without a word from the device
            if covers(segments.tail_k.dtype, segments.site.key_dim) is None:
                segments.sums = column_sums
        self.inputs, self.last = {name: self._mirror.here[name] for name in inputs}, self._mirror.here.get(_LAST)
        self.outputs: Results = Results(self.outputs, plan.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warm = False
        self._generation = -1

    @cached_property
    def _captures(self) -> bool:
        """Whether a step that comes again becomes a graph."""
        return self.plan.device.type == "cuda" and holds_up(self.plan) is None

    @property
    def captured(self) -> bool:
        """Whether the next step is a replay."""
        return self._graph is not None

    def run(self) -> None:
        """One step."""
        with _on(self.plan.device):
            self.outputs.forget()
            self._place()
            self._launch()
            self._mirror.wait()  # the next step's inputs are written over this one's

    def again(self) -> None:
        """As `run`."""
        self.run()

    def _launch(self) -> None:
        moved = self.cache is not None and self.cache.generation != self._generation
        if self.cache is not None and moved:
            self._graph, self._warm, self._generation = None, False, self.cache.generation
        # a prompt's steps move buffers and do not come again
        if self._graph is None and self._warm and self._captures and not (self.cache and self.cache.prefilling):
            self._graph = self._capture()
        if self._graph is not None:
            self._graph.replay()
            return
        for call in self.calls:
            call()
        self._warm = True

    def _capture(self) -> torch.cuda.CUDAGraph:
        """The step as a graph; nothing is computed yet."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in self.calls:
                call()
        return graph

    def _place(self) -> None:
        """Take inputs, and the step that the cache was told of, to the device."""
        step = None if self.cache is None else self.cache.step
        if step is not None:
            for name, value in _of_step(step).items():
                self._mirror.here[name].copy_(value)
        self._mirror.send()
        if self.cache is not None and step is not None:
            # kernels read `words`; the tree itself is for steps that torch computes
            tree = None if step.ancestors is None or self._captures else step.ancestors.to(self.plan.device)
            there = self._mirror.there
            self.cache.step = Standing(there[_POSITIONS], there[_VALID], tree, there[_WORDS])

    def _call(self, region: Region, kernel: Any, value: Callable[[fx.Node], Any], spare: list[torch.Tensor]) -> None:
        """Take the outputs of a region and bind its kernel."""

        def taken(*shape: int) -> torch.Tensor:
            return self._pool.take(torch.empty(shape, device="meta"))

        def kept(x: torch.Tensor) -> torch.Tensor:
            spare.append(x)
            return x

        room = Room(self.cache, self._of_node, lambda x: kept(self._copy(x)), taken, lambda *shape: kept(taken(*shape)))
        outputs, runs = kernel.bind(room)
        self._values.update(outputs)
        for run in runs:
            self._note(run, region.at)
        head = len(region.chains) == 1 and all(is_op(product, HEAD) for product in region.chains[0].products)
        if region.kind == "product" and head and self._logits and self.last is None and self.cache:
            logits, positions = outputs[region.chains[0].output], self.inputs["positions"]
            buffer = _on_host(positions, self.plan.device)
            self.chooser = chooser = TritonChooser(logits, positions, self._mirror.here, self._mirror.there, buffer)
            for call in chooser.calls:
                self._note(call, region.at)

    def _arguments(self, node: fx.Node) -> dict[str, Any]:
        """As `Bound`; what an op makes anew it makes on the device."""
        args = super()._arguments(node)
        return {name: self.plan.device if isinstance(value, torch.device) else value for name, value in args.items()}

    def _copied(self, x: torch.Tensor, out: torch.Tensor) -> Callable[[], Any]:
        return partial(out.copy_, x)

    def _picked(self, x: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> Callable[[], Any]:
        at = index.view(-1, 1, 1).expand(-1, 1, x.shape[2])
        return partial(torch.gather, x, 1, at, out=out)


def _of_step(step: Step) -> dict[str, torch.Tensor]:
    return {_POSITIONS: step.positions, _VALID: step.valid, _WORDS: step.words}


def _on_host(like: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A buffer of the host, where a GPU can write it without a copy in between."""
    return torch.zeros(like.shape, dtype=like.dtype, pin_memory=device.type == "cuda")


def _event(device: torch.device) -> torch.cuda.Event | None:
    """What the host can wait for; where there is no GPU it need not."""
    return torch.cuda.Event() if device.type == "cuda" else None


def _on(to: torch.device) -> AbstractContextManager[Any]:
    """Launches go to this device, whichever is current."""
    return torch.cuda.device(to) if to.type == "cuda" else nullcontext()
