"""Measures how far one Program's outputs are from another's, through the decode path with a non-empty cache."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional

from ..ir.blocks import stages
from ..ir.cache import Cache
from ..ir.cache.chunks import readings
from ..ir.errors import SmeltError
from ..ir.interpret import interpret
from ..ir.program import Program
from .probe import Probe

Outputs = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Divergence:
    """How far a candidate's outputs are from a reference's.

    kl: KL(reference || candidate) in nats, mean over positions; NaN where the outputs are no distribution.
    top1: share of positions whose most likely token is the same; NaN likewise.
    max_error: largest absolute difference, relative to the reference's largest value.
    """

    kl: float
    top1: float
    max_error: float

    @property
    def finite(self) -> bool:
        """Whether the candidate's outputs were finite."""
        return math.isfinite(self.max_error)

    def to_dict(self) -> dict[str, float | None]:
        """JSON form; what is not a number is null."""
        return {name: value if math.isfinite(value) else None for name, value in vars(self).items()}


PIECE = 1 << 20  # elements of a tensor that are looked at together
NONE = Divergence(kl=0.0, top1=1.0, max_error=0.0)


@torch.no_grad()
def replay(program: Program, tokens: torch.Tensor, prefix: int, chunk: int = 1) -> torch.Tensor:
    """Logits [B, T - prefix, V] that a decoder gives to the tokens [B, T] behind `prefix` of them, teacher-forced.

    With a cache plan, `prefix` tokens are the prompt and the rest arrive through the cache, at most `chunk` a step and
    never more than the cache takes before a page leaves or a stage of the depth plan begins, so that `chunk` decides
    the time and not the result. Without one, the same rows of a plain forward. Row i stands behind token prefix + i and
    predicts the next.
    """
    batch, length = tokens.shape
    if not 0 <= prefix < length:
        raise ValueError(f"a prefix of {prefix} leaves nothing to replay of {length} tokens")
    if chunk < 1:
        raise ValueError(f"a chunk holds at least one token, not {chunk}")
    positions = torch.arange(length).expand(batch, -1)
    if program.cache is None:
        return interpret(program, {"tokens": tokens, "positions": positions})["logits"][:, prefix:]
    cache = Cache(program.cache, batch, length, scratch=chunk)
    depth, programs = program.depth, [program, *stages(program)]

    def read(new: torch.Tensor, stage: int = 0) -> torch.Tensor:
        places = positions[:, cache.lengths[0] :][:, : new.shape[1]]
        cache.begin(places, tokens=new)
        logits: torch.Tensor = interpret(programs[stage], {"tokens": new, "positions": places}, cache)["logits"]
        cache.commit([list(range(new.shape[1]))] * batch)
        return logits

    for texts, questions in readings(program.cache, tokens[:, :prefix].tolist()) if prefix else ():
        read(torch.tensor(texts))
        cache.end_chunk(questions)
    cache.end_prefill()
    rows = []
    while (at := cache.lengths[0]) < length:
        left = min(chunk, length - at, *cache.room())
        if depth is not None:
            left = min(left, depth.left(at - prefix) or left)
        rows.append(read(tokens[:, at : at + left], depth.at(at - prefix) if depth is not None else 0))
    return torch.cat(rows, 1)


@torch.no_grad()
def observe(program: Program, probe: Probe) -> dict[str, torch.Tensor]:
    """What a Program answers to a probe: replayed logits of a decoder, every output of anything else."""
    if probe.prefix is not None:
        return {"logits": replay(program, probe.inputs["tokens"], probe.prefix, probe.chunk)}
    outputs = interpret(program, probe.inputs)
    real = probe.real
    if real is None:
        return outputs
    return {name: value[real] if value.shape[:2] == real.shape else value for name, value in outputs.items()}


def compare(reference_logits: torch.Tensor, candidate_logits: torch.Tensor) -> Divergence:
    """The divergence of candidate logits [..., V] from reference logits of the same shape."""
    _check_shapes("logits", reference_logits, candidate_logits)
    error = relative_error(reference_logits, candidate_logits)
    if not math.isfinite(error):
        return Divergence(kl=math.inf, top1=0.0, max_error=math.inf)
    reference, candidate = (functional.log_softmax(x.double(), -1) for x in (reference_logits, candidate_logits))
    kl = (reference.exp() * (reference - candidate)).sum(-1).mean().item()
    agree = reference_logits.argmax(-1) == candidate_logits.argmax(-1)
    return Divergence(max(kl, 0.0), agree.double().mean().item(), error)  # rounding can leave a KL of -1e-17


def compare_outputs(reference: Outputs, candidate: Outputs) -> Divergence:
    """The divergence of named outputs: of `logits` where there are any, else the largest error over all outputs."""
    if missing := sorted(reference.keys() - candidate.keys()):
        raise SmeltError(f"the outputs {missing} are gone")
    if "logits" in reference:
        return compare(reference["logits"], candidate["logits"])
    for name in reference:
        _check_shapes(f"output '{name}'", reference[name], candidate[name])
    worst = max(relative_error(reference[name], candidate[name]) for name in reference)
    return Divergence(kl=math.nan, top1=math.nan, max_error=worst)


def relative_error(reference: torch.Tensor, candidate: torch.Tensor) -> float:
    """Largest absolute difference over the reference's largest magnitude; infinite if the candidate is not finite."""
    candidate = candidate.double()
    if not torch.isfinite(candidate).all():
        return math.inf
    difference = (candidate - reference.double()).abs().max().item()
    largest = reference.double().abs().max().item()
    return difference / largest if largest else (math.inf if difference else 0.0)


def sqnr(reference: torch.Tensor, value: torch.Tensor) -> float:
    """Signal to quantization noise ratio in dB, 10 log10(Σ r² / Σ (r - v)²); infinite for equal tensors.

    Summed in float64 over pieces: whole copies in float64 would be the largest tensors of a compilation.
    """
    signal = noise = 0.0
    for r, v in zip(reference.reshape(-1).split(PIECE), value.reshape(-1).split(PIECE), strict=True):
        wide = r.double()
        signal += wide.square().sum().item()
        noise += (wide - v.double()).square().sum().item()
    if not noise:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def perplexity(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """exp of the mean cross-entropy of logits [..., V] with the tokens [...] that they should have predicted."""
    if logits.shape[:-1] != targets.shape:
        raise ValueError(f"logits {list(logits.shape)} predict no targets of shape {list(targets.shape)}")
    loss = functional.cross_entropy(logits.reshape(-1, logits.shape[-1]).double(), targets.reshape(-1))
    return math.exp(min(loss.item(), 700.0))  # exp overflows at 710


def _check_shapes(what: str, reference: torch.Tensor, candidate: torch.Tensor) -> None:
    if reference.shape != candidate.shape:
        raise SmeltError(f"{what}: the shape was {list(reference.shape)} and now is {list(candidate.shape)}")
