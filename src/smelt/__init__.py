"""smelt: one compiler that captures a model, rewrites it by a recipe, and lowers the result to fused kernels."""

from pathlib import Path as _Path

__version__ = "0.1.0"

# in a checkout the folders beside this file are links: load the real ones, so that tracebacks and breakpoints name them
_here = _Path(__file__).resolve().parent
if (_here / "ir").is_symlink():
    __path__.insert(0, str(_here.parents[1]))
