"""Holds a compiled model to what its recipe promises: measures again, on this machine, through the built kernels."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from . import reference_model
from .codegen.lower import lower
from .kept import code_digest
from .model import Compiled
from .passes.measure import compare
from .quality import METRICS, NEEDS_SOURCE, NEW, REQUESTS, Meter, replay
from .recipes import Bound
from .runtime.artefact import PROGRAM, WEIGHTS, plain_hash, read_manifest

Status = Literal["holds", "broken", "measured", "not measured"]
KERNELS_KL = 1e-3  # nats; a quantized cache rounds a reordered sum to another code now and then
STEPS = 32  # tokens that the reference, which decodes every weight in every step, is asked for


@dataclass(frozen=True)
class Check:
    """One promise. `value` is what was measured, None if it could not be; `note` says more, such as why."""

    metric: str
    promise: str
    value: float | None
    status: Status
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return dict(vars(self))


def bounds(compiled: Compiled) -> dict[str, Bound]:
    """What the recipe promises, as the artefact remembers it."""
    recipe: Mapping[str, Any] = compiled.facts.get("recipe") or {}
    return {metric: Bound(**told) for metric, told in recipe.get("expect", {}).items()}


def is_reference(compiled: Compiled) -> bool:
    """Whether this was made from the model that comes with smelt, which is what recipes state their numbers for."""
    own = (reference_model() / "tokenizer.json").read_bytes()
    return compiled.program.facts.get("source") == "reference" and compiled.assets.files.get("tokenizer.json") == own


def verify(meter: Meter) -> Iterator[Check]:
    """Each promise of the recipe, then those that smelt makes itself: speculation is exact, kernels mean what ops mean.

    A bound that is stated for the reference model is measured and told for another model, but holds it to nothing.
    """
    compiled, promised = meter.compiled, bounds(meter.compiled)
    here = is_reference(compiled)
    for metric, bound in promised.items():
        yield _check(meter, metric, bound, here)
    plan = compiled.program.decode
    if "lossless" not in promised and plan is not None and plan.exact:
        yield _check(meter, "lossless", Bound(equals=1), True)
    yield _kernels(meter)


def certificate(meter: Meter) -> dict[str, Any] | None:
    """What was proved of an artefact's speculation, of which program and by which code; None if it does not draft.

    `equal` of `asked` requests gave the tokens of plain decoding, greedy and, where drafts are accepted by the walk,
    sampled. `law`: what the rule of acceptance promises by itself.
    """
    plan, folder = meter.compiled.program.decode, meter.folder
    if plan is None or folder is None:
        return None
    manifest = read_manifest(folder)
    return {
        "law": plan.accept.law,
        "equal": meter.equality.equal,
        "asked": meter.equality.total,
        "difference": meter.equality.difference,
        "prompts": len(meter.text.prompts),
        "requests": [dict(request) for request in REQUESTS],
        "new_tokens": NEW,
        "drafted_tokens": plan.draft.most,
        "program": plain_hash(manifest, PROGRAM),
        "weights": plain_hash(manifest, WEIGHTS),
        "code": code_digest(),
        "date": datetime.date.today().isoformat(),
    }


def _check(meter: Meter, metric: str, bound: Bound, here: bool) -> Check:
    promise = say(bound)
    if metric not in METRICS:
        return Check(metric, promise, None, "not measured", "this version of smelt does not know the metric")
    if metric in NEEDS_SOURCE and meter.source is None:
        return Check(metric, promise, None, "not measured", "needs the source model: --source MODEL")
    value = meter[metric]
    if not here and metric != "lossless":
        return Check(metric, promise, value, "measured", f"promised on {bound.on or 'the reference model'}")
    note = ""
    if metric == "lossless":
        note = meter.equality.difference or f"{meter.equality.total} requests"
    return Check(metric, promise, value, "holds" if bound.holds(value) else "broken", note)


def _kernels(meter: Meter) -> Check:
    """The built kernels against the plain PyTorch meaning of the same program, over a cache that is not empty."""
    promise, compiled, text = say(Bound(at_most=KERNELS_KL)), meter.compiled, meter.text
    tokens = text.windows[:1, : text.prefix + STEPS]
    meant = replay(lower(compiled.program, "torch"), tokens, text.prefix)
    divergence = compare(meant, replay(compiled.plan, tokens, text.prefix))
    status: Status = "holds" if divergence.kl <= KERNELS_KL else "broken"
    return Check("kernels_kl", promise, divergence.kl, status, f"top-1 {divergence.top1:.3g}")


def say(bound: Bound) -> str:
    """A bound in signs: `≤ 4`, `0.5 to 1`, `= 1`."""
    if bound.equals is not None:
        return f"= {bound.equals:g}"
    if bound.at_most is not None and bound.at_least is not None:
        return f"{bound.at_least:g} to {bound.at_most:g}"
    return f"≤ {bound.at_most:g}" if bound.at_most is not None else f"≥ {bound.at_least:g}"
