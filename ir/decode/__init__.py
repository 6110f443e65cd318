"""How new tokens are proposed, verified and accepted: drafts, acceptance rules, and the plan that joins them."""

from .accept import Accept, KSequential, Law, Merge, Near, Reject, Trust, Typical, Walk
from .draft import Draft, Heads, Jacobi, Lookahead, Lookup, Model, Proposal, Recycle, Suffix, Trigrams, Union
from .plan import DecodePlan
from .tree import Tree, usual_rates

__all__ = [
    "Accept",
    "DecodePlan",
    "Draft",
    "Heads",
    "Jacobi",
    "KSequential",
    "Law",
    "Lookahead",
    "Lookup",
    "Merge",
    "Model",
    "Near",
    "Proposal",
    "Recycle",
    "Reject",
    "Suffix",
    "Tree",
    "Trigrams",
    "Trust",
    "Typical",
    "Union",
    "Walk",
    "usual_rates",
]
