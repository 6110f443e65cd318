"""ONNX export: a Program as a model folder that other runtimes load; `export` writes it."""

from .export import Exported, export
from .styles import STYLES
from .write import check_place

__all__ = ["STYLES", "Exported", "check_place", "export"]
