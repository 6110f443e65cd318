"""The engines of the side-by-side benchmark: which script runs each, and what its throw-away environment holds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parents[1] / "src"


@dataclass(frozen=True)
class Venv:
    """`pip install packages` under `environment`, and then without the `unwanted`."""

    packages: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    unwanted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Engine:
    """One contestant. `venv` is None for smelt, which runs in the Python of the benchmark."""

    name: str
    script: str
    variant: str
    venv: str | None = None

    @property
    def slug(self) -> str:
        """The name as part of a file name."""
        return "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in self.name)

    def python(self, venvs: Path) -> Path:
        """The interpreter that has the engine."""
        return Path(sys.executable) if self.venv is None else venvs / self.venv / "bin" / "python"

    def environment(self, threads: int, work: Path) -> dict[str, str]:
        """As many threads for everybody, no network, and a kernel cache of smelt's own for the cold compile time."""
        counted = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "SMELT_THREADS")
        own = {"PYTHONPATH": str(SOURCE), "SMELT_CACHE": str(work / f"{self.slug}.cache")} if self.venv is None else {}
        return {**dict.fromkeys(counted, str(threads)), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **own}


VENVS = {
    "transformers": Venv(("torch==2.13.0", "transformers>=5.17")),
    "onnxruntime-genai": Venv(
        ("torch==2.13.0", "onnxruntime-genai", "onnxruntime", "onnx", "onnx-ir", "onnxscript", "transformers")
    ),
    # torchvision, which optimum-intel asks for, may come from another index than torch; then it fails on import
    "openvino": Venv(("torch==2.13.0", "nncf", "optimum-intel[openvino]", "openvino-genai"), unwanted=("torchvision",)),
    "llama-cpp": Venv(  # built for this machine; its AMX kernels crashed on a machine that has AMX
        ("llama-cpp-python", "gguf"),
        {"CMAKE_ARGS": "-DGGML_NATIVE=ON -DGGML_AMX_TILE=OFF -DGGML_AMX_INT8=OFF -DGGML_AMX_BF16=OFF"},
    ),
}
PEERS = {
    peer.name: peer
    for peer in (
        Engine("transformers", "run_transformers.py", "eager", "transformers"),
        Engine("torch.compile", "run_transformers.py", "compile", "transformers"),
        Engine("onnxruntime-genai", "run_ort_genai.py", "int4", "onnxruntime-genai"),
        Engine("openvino-genai", "run_openvino.py", "int4", "openvino"),
        Engine("llama.cpp-q4_0", "run_llama_cpp.py", "Q4_0", "llama-cpp"),
        Engine("llama.cpp-q4_k_m", "run_llama_cpp.py", "Q4_K_M", "llama-cpp"),
        Engine("llama.cpp-q8_0", "run_llama_cpp.py", "Q8_0", "llama-cpp"),
    )
}


def smelt_engine(recipe: str) -> Engine:
    """smelt by a recipe: a name or a file, with options behind colons: `finequant:weights.quantize.bits=8`."""
    return Engine(f"smelt {recipe}", "run_smelt.py", recipe)


def install(name: str, venvs: Path) -> None:
    """Make an environment, or leave the one that is there. One that cannot be made is taken away again."""
    folder, venv = venvs / name, VENVS[name]
    python = str(folder / "bin" / "python")
    if Path(python).exists():
        return
    steps = [[sys.executable, "-m", "venv", str(folder)]]
    steps += [[python, "-m", "pip", "install", "-q", *venv.packages]]
    steps += [[python, "-m", "pip", "uninstall", "-q", "-y", package] for package in venv.unwanted]
    for step in steps:
        if subprocess.run(step, env={**os.environ, **venv.environment}).returncode:
            shutil.rmtree(folder, ignore_errors=True)
            print(f"{name}: failed: {' '.join(step)}", file=sys.stderr)
            return
