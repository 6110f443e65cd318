"""The machine's read bandwidth: threads that sum a buffer far larger than the caches."""

from __future__ import annotations

import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy

BYTES = 1 << 30  # 30 times the 32 MB of last-level cache of the machine that this was written on
PASSES = 8
SOURCE = r"""
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

int main(int, char** words) {
  const size_t threads = atoi(words[1]), share = strtoull(words[2], nullptr, 10) / threads / 8, passes = atoi(words[3]);
  std::vector<std::vector<uint64_t>> parts(threads);
  std::vector<uint64_t> sums(threads * 8);
  for (size_t pass = 0; pass <= passes; ++pass) {  // the first one touches the pages
    const auto start = std::chrono::steady_clock::now();
    std::vector<std::thread> workers;
    for (size_t number = 0; number < threads; ++number)
      workers.emplace_back([&, number] {
        if (pass == 0) return parts[number].assign(share, number);
        const uint64_t* values = parts[number].data();
        uint64_t lanes[32] = {};  // enough independent sums that adding does not hold up reading
        for (size_t at = 0; at + 32 <= share; at += 32)
          for (size_t lane = 0; lane < 32; ++lane) lanes[lane] += values[at + lane];
        for (const uint64_t lane : lanes) sums[number * 8] += lane;
      });
    for (auto& worker : workers) worker.join();
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
    if (pass) printf("%g\n", share * threads * 8 / taken.count());
  }
  return sums[0] == 1;  // the sums are read, so that they are made
}
"""


def read_bandwidth(threads: int, work: Path, size: int = BYTES) -> float:
    """Bytes a second of the best pass, by a program in `work`, built on first use; by numpy without a compiler."""
    program = work / "bandwidth"
    if not program.exists():
        compiler = next((found for name in ("c++", "clang++") if (found := shutil.which(name))), None)
        if compiler is None:
            return _by_numpy(threads, size)
        source = work / "bandwidth.cpp"
        source.write_text(SOURCE)
        subprocess.run([compiler, "-O3", "-march=native", "-pthread", source, "-o", program], check=True)
    words = [str(program), str(threads), str(size), str(PASSES)]
    return max(map(float, subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()))


def _by_numpy(threads: int, size: int) -> float:
    parts = [numpy.ones(size // threads // 8, dtype=numpy.int64) for _ in range(threads)]
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(PASSES):
            start = time.perf_counter()
            list(pool.map(numpy.sum, parts))
            best = max(best, sum(part.nbytes for part in parts) / (time.perf_counter() - start))
    return best
