"""The dialect: every op with its reference meaning, shape rule and symbolic cost."""

from .attention import ATTENTION, CACHED_ATTENTION
from .hadamard import HADAMARD
from .linear import ACTIVATIONS, EMBEDDING, EXPERTS, GATED, HEAD, LINEAR
from .loss import HEAD_CROSS_ENTROPY
from .norm import LAYER_NORM, RMS_NORM
from .quantized import QUANTIZED
from .registry import OPS, Cost, Op, arguments, define, is_op
from .rotary import ROTARY

__all__ = [
    "ACTIVATIONS",
    "ATTENTION",
    "CACHED_ATTENTION",
    "EMBEDDING",
    "EXPERTS",
    "GATED",
    "HADAMARD",
    "HEAD",
    "HEAD_CROSS_ENTROPY",
    "LAYER_NORM",
    "LINEAR",
    "OPS",
    "QUANTIZED",
    "RMS_NORM",
    "ROTARY",
    "Cost",
    "Op",
    "arguments",
    "define",
    "is_op",
]
