"""Generated Triton source as a Python module: Triton reads a kernel's text from the file that defines it."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import tempfile
from types import ModuleType

from ..ir.errors import SmeltError
from .build import cache


def load(text: str, name: str) -> ModuleType:
    """The module of a source, from a file named by its content in the build cache; executed anew on every call."""
    path = cache() / "triton" / f"{name}_{hashlib.sha256(text.encode()).hexdigest()[:16]}.py"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            file.write(text)
        os.replace(file.name, path)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise SmeltError(f"cannot import the generated kernel {path}; delete it and it is written anew")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
