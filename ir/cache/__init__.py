"""The KV cache: what it stores (`plan`) and what that means, in plain PyTorch (`store`)."""

from .plan import CachePlan, Counts, Select, Site
from .store import Bytes, Cache

__all__ = ["Bytes", "Cache", "CachePlan", "Counts", "Select", "Site"]
