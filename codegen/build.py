"""Builds generated C++ into shared libraries, once: a library is found again by its source, compiler, flags and CPU."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from ..ir.errors import SmeltError
from .compiler import Compiler, cpu, defines, find, flags

HEADERS = "#include <stdint.h>\n#include <string.h>\n#if defined(__x86_64__)\n#include <immintrin.h>\n#endif\n"


def cache() -> Path:
    """Where built kernels lie: $SMELT_CACHE, or ~/.cache/smelt."""
    return Path(os.environ.get("SMELT_CACHE") or Path.home() / ".cache" / "smelt").expanduser()


def threads() -> int:
    """Threads for a kernel: the CPUs this process may use, or fewer by $SMELT_THREADS."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("SMELT_THREADS", "")
    if asked and not (asked.isdecimal() and int(asked) > 0):
        raise SmeltError(f"SMELT_THREADS is '{asked}'; give a count of threads, such as 2, or unset it")
    return min(int(asked), usable) if asked else usable


def build(source: str, name: str) -> ctypes.CDLL:
    """The library of a C++ source; `name` makes its folder readable. Compiles only what the cache does not hold.

    Two processes may build the same source at once: whole folders are moved into place, and the first one stays.
    Raises SmeltError with the compiler's first lines, or naming a damaged folder.
    """
    return _load(_build(find(), flags(), source, name))


def source_of(library: ctypes.CDLL) -> str:
    """The C++ source that a library from `build` was compiled from."""
    return Path(library._name).with_name("kernel.cpp").read_text()


def _build(compiler: Compiler, options: tuple[str, ...], source: str, name: str) -> Path:
    """The folder that holds `kernel.cpp`, `kernel.so` and the hash of the latter."""
    kernels = cache() / "kernels"
    key = _key(source, compiler, options)
    folder = kernels / f"{re.sub(r'[^A-Za-z0-9]+', '_', name)}-{key}"

    def compiled(work: Path) -> Path:
        (work / "kernel.cpp").write_text(source)
        read = _headers(compiler, options, cache()) if "<immintrin.h>" in source else ()
        result = compiler.run(work / "kernel.cpp", work / "kernel.so", (*options, *read))
        if result.returncode != 0:
            kept = kernels / f"{folder.name}.failed.cpp"
            os.replace(work / "kernel.cpp", kept)
            said = "\n".join((result.stderr or result.stdout).strip().splitlines()[:12])
            raise SmeltError(f"{compiler} failed on kernel '{name}' (source kept in {kept}):\n{said}")
        return work / "kernel.so"

    return _once(folder, compiled)


@functools.cache
def _headers(compiler: Compiler, options: tuple[str, ...], place: Path) -> tuple[str, ...]:
    """Options by which GCC reads intrinsics precompiled: parsing them takes as long as compiling most kernels."""
    if defines("__clang__"):  # it would look for the header where it was built
        return ()
    folder = place / "headers" / _key(HEADERS, compiler, options)

    def compiled(work: Path) -> Path:
        header = work / "headers.h"
        header.write_text(HEADERS)
        result = compiler.run(header, work / "headers.h.gch", (*options, "-x", "c++-header"))
        if result.returncode != 0:
            raise SmeltError(f"{compiler} does not precompile headers: {result.stderr or result.stdout}")
        return work / "headers.h.gch"

    try:
        _once(folder, compiled)
    except SmeltError:
        return ()
    _check(folder / "headers.h.gch")
    return "-include", str(folder / "headers.h")


def _key(source: str, compiler: Compiler, options: tuple[str, ...]) -> str:
    return hashlib.sha256("\0".join([source, str(compiler), *options, cpu()]).encode()).hexdigest()[:16]


def _once(folder: Path, make: Callable[[Path], Path]) -> Path:
    """The folder, which `make` fills elsewhere if it is not there; its file is hashed, and all is moved into place."""
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
    try:
        made = make(work)
        made.with_suffix(".sha256").write_text(_digest(made))
        try:
            os.rename(work, folder)
        except OSError:
            if not folder.exists():  # else another process was first, and its build is the same
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _load(folder: Path) -> ctypes.CDLL:
    library = folder / "kernel.so"
    _check(library)
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise SmeltError(f"the kernel {library} does not load: {error}; delete {folder} to build it anew") from error


def _check(file: Path) -> None:
    """Raises SmeltError if the file is not what was built."""
    digest = file.with_suffix(".sha256")
    if not file.exists() or not digest.exists() or _digest(file) != digest.read_text():
        raise SmeltError(f"the cached {file} is damaged; delete {file.parent} and it is built anew")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
