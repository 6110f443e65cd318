"""Raising: from ATen to the dialect, one small pattern a construct. What no pattern knows stays ATen and still runs."""

from ..program import Program
from .activation import raise_gated, raise_gelu
from .arithmetic import raise_roots, raise_written_activations, raise_written_layer_norm
from .attention import drop_full_masks, raise_attention
from .cleanup import drop_copies, loosen_views
from .linear import raise_embedding, raise_head, raise_linear
from .norm import raise_layer_norm, raise_rms_norm
from .rotary import raise_rotary
from .rotary_halves import raise_rotary_halves
from .softmax_attention import raise_softmax_attention, share_heads

STEPS = (
    drop_copies,
    loosen_views,
    raise_linear,
    raise_embedding,
    raise_roots,
    raise_layer_norm,
    raise_written_layer_norm,
    raise_rms_norm,
    raise_rotary,
    raise_rotary_halves,
    raise_gelu,
    raise_written_activations,
    raise_gated,
    raise_attention,
    raise_softmax_attention,
    share_heads,
    drop_full_masks,
    raise_head,
)


def raise_program(program: Program) -> dict[str, int]:
    """Rewrite in place, in the order of STEPS; returns how many sites each step raised."""
    raised = {}
    for step in STEPS:
        raised[step.__name__] = step(program)
        program.prune()
    program.graph.lint()
    return raised


__all__ = ["STEPS", "raise_program"]
