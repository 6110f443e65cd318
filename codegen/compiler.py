"""Finds the machine's C++ compiler, and what it is called, speaks and lacks."""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from ..ir.errors import SmeltError

FLAGS = (
    "-O3", "-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi", "-shared", "-fPIC", "-std=c++17",
    "-pthread",
)  # fmt: skip
REMEDY = "install a C++ compiler (apt install g++), or `pip install ziglang`, or compile with target='torch'"


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler as a command and the first line of what it says of itself."""

    command: tuple[str, ...]
    version: str

    def run(self, source: Path, output: Path, flags: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
        """Compile one file into a shared library; the caller judges the return code."""
        command = [*self.command, *flags, str(source), "-o", str(output)]
        return subprocess.run(command, capture_output=True, text=True, errors="replace")

    def __str__(self) -> str:
        return f"{shlex.join(self.command)} ({self.version})"


def find() -> Compiler:
    """$CXX, else c++, g++ or clang++ on the path, else the compiler inside the ziglang package.

    Raises SmeltError with both remedies when there is none, and when $CXX names none.
    """
    return _find(os.environ.get("CXX", ""), os.environ.get("PATH", ""))


@functools.cache
def _find(cxx: str, path: str) -> Compiler:
    if cxx:
        compiler = _ask(tuple(shlex.split(cxx)), path)
        if compiler is None:
            raise SmeltError(f"CXX is '{cxx}', which does not run; unset it, or {REMEDY}")
        return compiler
    for command in ("c++", "g++", "clang++"):
        if compiler := _ask((command,), path):
            return compiler
    # without -nostdlib++ the first kernel waits a minute for a C++ library to be built, which none asks for
    zig = (sys.executable, "-m", "ziglang", "c++", "-nostdlib++")
    if importlib.util.find_spec("ziglang") and (compiler := _ask(zig, path)):
        return compiler
    raise SmeltError(f"no C++ compiler found ($CXX, c++, g++, clang++, ziglang): {REMEDY}")


def _ask(command: tuple[str, ...], path: str) -> Compiler | None:
    """The compiler behind a command, or None if it is not there or does not answer."""
    program = shutil.which(command[0], path=path)
    if program is None:
        return None
    answer = subprocess.run([program, *command[1:], "--version"], capture_output=True, text=True, errors="replace")
    lines = answer.stdout.strip().splitlines()
    return Compiler((program, *command[1:]), lines[0]) if answer.returncode == 0 and lines else None


def flags() -> tuple[str, ...]:
    """What kernels are compiled with: for this CPU, or for `$SMELT_MARCH`, such as x86-64-v3 or native -mno-avx512f."""
    return (*FLAGS, *shlex.split(f"-march={os.environ.get('SMELT_MARCH') or 'native'}"))


def defines(*macros: str) -> bool:
    """Whether kernels are compiled for a CPU with all of these features, such as `__AVX512VBMI2__`."""
    return set(macros) <= _defined((*find().command, *flags()))


@functools.cache
def _defined(command: tuple[str, ...]) -> frozenset[str]:
    told = subprocess.run([*command, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True)
    return frozenset(line.split()[1] for line in told.stdout.splitlines() if line.startswith("#define "))


@functools.cache
def cpu() -> str:
    """What `-march=native` depends on: the processor's feature flags."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        with info.open() as lines:
            for line in lines:
                if line.startswith(("flags", "Features")):
                    return line.partition(":")[2].strip()
    return f"{platform.machine()} {platform.processor()}"
