"""ONNX as a front end: .onnx files become Programs in the dialect, as torch models do."""

from .importer import capture_onnx

__all__ = ["capture_onnx"]
