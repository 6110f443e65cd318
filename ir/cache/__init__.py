"""The KV cache: what it stores (`plan`, `site`, `options`) and what that means, in plain PyTorch (`store`)."""

from .estimate import Estimate
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
    "Estimate",
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
