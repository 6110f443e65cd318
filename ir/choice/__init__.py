"""How tokens are chosen behind the model's law: sampling options that an artefact presets, and searches."""

from .plan import ChoicePlan, Constrain
from .preset import Preset
from .search import Against, Beam, Cascade, Cautious, Contrastive, Rerank, Search, Superposed

__all__ = [
    "Against",
    "Beam",
    "Cascade",
    "Cautious",
    "ChoicePlan",
    "Constrain",
    "Contrastive",
    "Preset",
    "Rerank",
    "Search",
    "Superposed",
]
