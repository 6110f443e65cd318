"""The KV cache: what it stores (`plan`, `site`, `options`) and what that means, in plain PyTorch (`store`)."""

from .hyper import Hyper
from .options import Merge, Predict, Retrieve, Rope, Select, Tier
from .plan import CachePlan
from .policy import Policy
from .score import Score
from .site import Counts, Site
from .store import Bytes, Cache

__all__ = [
    "Bytes",
    "Cache",
    "CachePlan",
    "Counts",
    "Hyper",
    "Merge",
    "Policy",
    "Predict",
    "Retrieve",
    "Rope",
    "Score",
    "Select",
    "Site",
    "Tier",
]
