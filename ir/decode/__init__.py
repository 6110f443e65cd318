"""How new tokens are proposed, verified and accepted: drafts, acceptance rules, and the plan that joins them."""

from .accept import Accept, KSequential, Law, Merge, Near, Reject, Trust, Typical, Walk
from .draft import (
    Draft,
    Fused,
    Heads,
    Jacobi,
    Lookahead,
    Lookup,
    Model,
    Prompts,
    Proposal,
    Recycle,
    Suffix,
    Trigrams,
    Union,
)
from .plan import DecodePlan
from .sparse import Sparse, sparse
from .tree import Tree, usual_rates

__all__ = [
    "Accept",
    "DecodePlan",
    "Draft",
    "Fused",
    "Heads",
    "Jacobi",
    "KSequential",
    "Law",
    "Lookahead",
    "Lookup",
    "Merge",
    "Model",
    "Near",
    "Prompts",
    "Proposal",
    "Recycle",
    "Reject",
    "Sparse",
    "Suffix",
    "Tree",
    "Trigrams",
    "Trust",
    "Typical",
    "Union",
    "Walk",
    "sparse",
    "usual_rates",
]
