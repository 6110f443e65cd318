"""Built once, found again; every fault names its way out."""

import ctypes
import importlib.util
import multiprocessing
import os
import stat
import sys
from pathlib import Path

import pytest

from smelt.codegen import build as build_module
from smelt.codegen.build import build, cache, source_of, threads
from smelt.codegen.compiler import find
from smelt.ir.errors import SmeltError

SOURCE = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMELT_CACHE", str(tmp_path / "cache"))


def logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes $CXX a compiler that writes a line a call, and returns where."""
    log, wrapper = tmp_path / "log", tmp_path / "cxx"
    real = " ".join(find().command)
    wrapper.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexec {real} "$@"\n')
    wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(wrapper))
    return log


def compiled(log: Path) -> int:
    return sum("-shared" in line for line in log.read_text().splitlines())


def test_a_second_build_compiles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = logged(tmp_path, monkeypatch)
    assert build(SOURCE, "a.kernel").answer() == 42
    before = compiled(log)
    assert before >= 1
    assert build(SOURCE, "a.kernel").answer() == 42
    assert compiled(log) == before
    assert build(SOURCE.replace("42", "43"), "a.kernel").answer() == 43
    assert compiled(log) == before + 1


def test_intrinsics_are_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is built is the same; a damaged header is named, and one that cannot be precompiled is only slower."""
    source = "#include <immintrin.h>\n" + SOURCE
    log = logged(tmp_path, monkeypatch)
    bytes_ = [Path(build(source.replace("42", str(n)), "kernel")._name).read_bytes() for n in (1, 2, 1)]
    lines = log.read_text().splitlines()
    assert sum("c++-header" in line for line in lines) == 1
    assert sum("-include" in line for line in lines) == 2
    monkeypatch.setattr(build_module, "_headers", lambda *_: ())
    monkeypatch.setenv("SMELT_CACHE", str(tmp_path / "other"))
    assert [Path(build(source.replace("42", str(n)), "kernel")._name).read_bytes() for n in (1, 2, 1)] == bytes_


def test_a_damaged_header_is_named_and_one_that_cannot_be_built_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "#include <immintrin.h>\n" + SOURCE
    assert build(source, "kernel").answer() == 42
    (header,) = cache().glob("headers/*/*.gch")
    header.write_bytes(header.read_bytes()[:1000])
    build_module._headers.cache_clear()
    with pytest.raises(SmeltError, match=r"headers\.h\.gch is damaged; delete .* built anew"):
        build(source.replace("42", "43"), "kernel")
    monkeypatch.setenv("SMELT_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(build_module, "HEADERS", "no C++")
    assert build(source, "kernel").answer() == 42


def test_another_compiler_is_another_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(SOURCE, "kernel")
    log = logged(tmp_path, monkeypatch)
    build(SOURCE, "kernel")
    assert compiled(log) >= 1


def test_the_source_of_a_library_can_be_read() -> None:
    library = build(SOURCE, "gemv.affine4.g64")
    assert source_of(library) == SOURCE
    assert Path(library._name).parent.name.startswith("gemv_affine4_g64-")
    assert Path(library._name).is_relative_to(cache())


def test_a_failed_compile_shows_what_the_compiler_said() -> None:
    with pytest.raises(SmeltError, match=r"failed on kernel 'broken'.*source kept in") as caught:
        build('extern "C" int answer() { return undeclared_thing; }\n', "broken")
    assert "undeclared_thing" in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 13
    assert not list((cache() / "kernels").glob(".building-*"))


@pytest.mark.parametrize("damage", [b"", b"not a library", None])
def test_a_damaged_library_is_named(damage: bytes | None) -> None:
    path = Path(build(SOURCE.replace("42", "7"), "kernel")._name)
    content = path.read_bytes()
    path.unlink()  # the loaded file stays mapped, the damaged one is another
    path.write_bytes(content[: len(content) // 2] if damage is None else damage)
    with pytest.raises(SmeltError, match=r"kernel\.so is damaged; delete .* built anew"):
        build(SOURCE.replace("42", "7"), "kernel")


def test_a_missing_library_is_damage_too() -> None:
    path = Path(build(SOURCE, "kernel")._name)
    path.unlink()
    with pytest.raises(SmeltError, match="damaged"):
        build(SOURCE, "kernel")


def test_no_compiler_names_both_remedies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SmeltError, match=r"apt install g\+\+.*pip install ziglang.*target='torch'"):
        build(SOURCE, "kernel")


def test_a_wrong_cxx_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with pytest.raises(SmeltError, match=r"CXX is 'no-such-compiler -m64'"):
        build(SOURCE, "kernel")


def _build_and_call(start: float) -> int:
    return int(build(SOURCE.replace("42", "11"), "raced").answer())


def test_two_processes_may_build_one_kernel() -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map(_build_and_call, [0.0] * 4, chunksize=1) == [11] * 4
    assert len(list((cache() / "kernels").glob("raced-*"))) == 1
    assert not list((cache() / "kernels").glob(".building-*"))


def test_threads_follow_the_affinity_and_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    usable = len(os.sched_getaffinity(0))
    monkeypatch.delenv("SMELT_THREADS", raising=False)
    assert threads() == usable
    monkeypatch.setenv("SMELT_THREADS", "1")
    assert threads() == 1
    monkeypatch.setenv("SMELT_THREADS", str(usable + 5))
    assert threads() == usable
    monkeypatch.setenv("SMELT_THREADS", "many")
    with pytest.raises(SmeltError, match="SMELT_THREADS is 'many'"):
        threads()


@pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="the ziglang package is not installed")
def test_the_compiler_in_the_zig_wheel_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", f"{sys.executable} -m ziglang c++ -nostdlib++")
    library = build(SOURCE, "kernel")
    assert isinstance(library, ctypes.CDLL) and library.answer() == 42
