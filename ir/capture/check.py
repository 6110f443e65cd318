"""Capture checks itself: a Program's outputs against the source model's own eager forward, weights streamed through.

One walk over the graph answers all questions, because each walk decodes every weight:
- Do the outputs equal the source's? Masks are asked for tokens that stand far apart, so that a window, or anything else
  that a mask does only in long texts, shows in a short probe.
- Does a decoder mix tokens in attention alone? Tokens that attend to themselves only, in one sequence, must give what
  they give as sequences of one. A cache could not reproduce anything else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import SmeltError
from ..interpret import interpret
from ..ops import ATTENTION, arguments
from ..program import Program
from ..weight import Weight
from .constructs import suspect
from .exported import first_line
from .interfaces import chosen
from .streamed import streamed
from .variants import ALONE, TOLERANCE, alone_inputs, broken_weight, mixed_tokens, relative_error, side_by_side

__all__ = ["TOLERANCE", "check_against_source", "probe_places"]

_UNKNOWN_CONTEXT = 1 << 17
_ALONE = 6  # tokens of the second question


def check_against_source(program: Program, model: nn.Module, weights: Mapping[str, Weight], decoder: bool) -> None:
    """Raises SmeltError if the answers differ by more than TOLERANCE, or are not finite.

    `weights` by the model's names; `program.facts["capture_error"]` is set to the difference.
    """
    places = probe_places(program)
    tokens = torch.randint(0, program.facts["vocabulary"], (2, len(places)), generator=torch.Generator().manual_seed(0))
    real = torch.ones_like(tokens, dtype=torch.bool)
    if decoder:
        positions = torch.arange(len(places)).expand(2, -1)
        answers = _decoder_answers(program, tokens, positions, places)
        mine, options = answers["logits"], {"position_ids": positions, "use_cache": False}
    else:
        real[1, len(places) // 2 :] = False
        answers = _interpret(program, {"tokens": tokens, "mask": real.long()})
        mine, options = answers["hidden"], {"attention_mask": real.long()}
    if not torch.isfinite(mine).all():
        raise SmeltError(f"{program.name}: outputs are not finite; {broken_weight(weights)}")
    theirs = _eager(model, weights, places, program.name, input_ids=tokens, **options)
    error = relative_error(mine[real], theirs[real])  # what stands at padded places is nobody's promise
    if not error <= TOLERANCE:
        raise SmeltError(
            f"{program.name}: the captured graph differs from transformers' eager model (relative error {error:.1e}, "
            f"allowed {TOLERANCE:.0e}); {suspect(model)}"
        )
    if decoder and (why := mixed_tokens(answers)):
        raise SmeltError(f"{program.name}: {why}")
    program.facts["capture_error"] = error


def probe_places(program: Program) -> torch.Tensor:
    """Where the probe's tokens stand in the eyes of masks, int64, rising: close together, at each window's edge, and
    spread over the context."""
    context = program.facts.get("context") or _UNKNOWN_CONTEXT
    edges = {window + step for window in _windows(program)[:4] for step in (-1, 0, 1)}
    spread = {(context - 1) * part // 8 for part in range(1, 9)}
    return torch.tensor(sorted(p for p in {*range(6)} | edges | spread if p < context))


def _windows(program: Program) -> list[int]:
    return sorted({int(w) for node in program.calls(ATTENTION) if (w := arguments(node)["window"]) is not None})


def _decoder_answers(
    program: Program, tokens: torch.Tensor, positions: torch.Tensor, places: torch.Tensor
) -> dict[str, torch.Tensor]:
    """`logits` of the probe, and those of its first tokens `alone` in one sequence and as sequences of `one`."""
    apart = places[:, None] - places
    few = tokens[:1, :_ALONE]
    at = (places if program.facts.get("context") else positions[0])[-few.shape[1] :][None]
    inputs = {"tokens": tokens, "positions": positions} | alone_inputs(few, at)
    inputs |= {_seen(window): (apart < window)[None, None] for window in _windows(program)}
    return _interpret(side_by_side(program, {"": _by_mask, **ALONE}), inputs)


def _seen(window: int) -> str:
    return f"seen.{window}"


def _by_mask(a: dict[str, Any]) -> dict[str, Any]:
    """A window as a mask among the inputs, so that tokens may stand anywhere."""
    return a if a["window"] is None else a | {"mask": _seen(a["window"]), "window": None}


def _interpret(program: Program, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    try:
        with torch.no_grad():
            return {name: value.float() for name, value in interpret(program, inputs).items()}
    except (RuntimeError, IndexError) as fault:
        raise SmeltError(f"{program.name}: the captured graph cannot be evaluated: {first_line(fault)}") from fault


def _eager(model: Any, weights: Mapping[str, Weight], places: torch.Tensor, name: str, **inputs: Any) -> torch.Tensor:
    try:
        with torch.no_grad(), chosen(model, "eager"), _masks_at(places), streamed(model, weights):
            out = model(**inputs)
    except SmeltError:
        raise
    except Exception as fault:  # modelling code raises anything
        raise SmeltError(f"{name}: transformers' own eager forward fails: {first_line(fault)}") from fault
    result: torch.Tensor = out.logits if "logits" in out else out.last_hidden_state
    return result.float()


@contextmanager
def _masks_at(places: torch.Tensor) -> Iterator[None]:
    """Eager masks as if token i stood at places[i]."""
    from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

    plain = AttentionMaskInterface()["eager"]

    def moved(*args: Any, mask_function: Callable[..., Any] = causal_mask_function, **options: Any) -> Any:
        def at(batch: Any, head: Any, q: Any, k: Any) -> Any:
            return mask_function(batch, head, places[q], places[k])

        return plain(*args, mask_function=at, **options)

    AttentionMaskInterface.register("eager", moved)
    try:
        yield
    finally:
        AttentionMaskInterface.register("eager", plain)
