"""The dialect: every op with its reference meaning, shape rule and symbolic cost."""

from .attention import ATTENTION, CACHED_ATTENTION
from .linear import ACTIVATIONS, EMBEDDING, EXPERTS, GATED, HEAD, LINEAR
from .norm import LAYER_NORM, RMS_NORM
from .registry import OPS, Cost, Op, arguments, define, is_op
from .rotary import ROTARY

__all__ = [
    "ACTIVATIONS",
    "ATTENTION",
    "CACHED_ATTENTION",
    "EMBEDDING",
    "EXPERTS",
    "GATED",
    "HEAD",
    "LAYER_NORM",
    "LINEAR",
    "OPS",
    "RMS_NORM",
    "ROTARY",
    "Cost",
    "Op",
    "arguments",
    "define",
    "is_op",
]
