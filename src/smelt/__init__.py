"""smelt: one compiler that captures a model, rewrites it by a recipe, and lowers the result to fused kernels."""

from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING

__version__ = "0.1.0"

# in a checkout the folders beside this file are links: load the real ones, so that tracebacks and breakpoints name them
_here = _Path(__file__).resolve().parent
if (_here / "ir").is_symlink():
    __path__.insert(0, str(_here.parents[1]))

if _TYPE_CHECKING:
    from .compiler import compile
    from .ir.errors import SmeltError
    from .model import Compiled, load

__all__ = ["Compiled", "SmeltError", "compile", "load", "reference_model"]
_HOMES = {"Compiled": "model", "SmeltError": "ir.errors", "compile": "compiler", "load": "model"}


def __getattr__(name: str) -> object:
    """Public names are imported when first used: `import smelt` stays quick and pulls in no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'smelt' has no attribute '{name}'")
    return getattr(_imported(f".{_HOMES[name]}"), name)


def _imported(module: str) -> object:
    """A module, imported without collections of garbage in between, of which there is none."""
    import gc
    from importlib import import_module

    pausing = gc.isenabled()
    gc.disable()
    try:
        return import_module(module, __name__)
    finally:
        if pausing:
            gc.enable()


def __dir__() -> list[str]:
    """Public names are listed before they are imported."""
    return sorted({*globals(), *__all__})


def reference_model() -> _Path:
    """The folder of the bundled reference decoder (Llama layout, 5.8 M parameters, fp16), with its tokenizer."""
    return _here / "reference"
