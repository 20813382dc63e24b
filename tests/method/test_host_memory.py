"""Freed memory is kept where it is soon taken again, and given back where it is not."""

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="the options are glibc's; elsewhere nothing is set"
)

# Takes and frees a piece again and again; prints the pages that had to be mapped for it each time,
# and MB that stay with the process afterwards.
RUN = """
import resource
import sys
import numpy as np
from msn.method import host_memory

def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize() / 2**20

ways, size = sys.argv[1].split(","), int(sys.argv[2])
told = [getattr(host_memory, way)() for way in ways if way]
before, above = resident(), []
for turn in range(20):
    if turn == 4:
        first = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    piece = np.empty(size << 20, dtype=np.uint8)
    piece.fill(1)
    if sys.argv[3] == "hole":
        above.append(bytes(5_000))  # what is freed below it does not lie at the end
    del piece
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - first
print(all(told), faults / 16, resident() - before)
"""


def pages_and_kept(*ways: str, size: int, where: str = "end") -> tuple[float, float]:
    """Pages mapped anew each time, and MB kept, for pieces of `size` MB.

    `where` in the process's memory they lie when they are freed: at its `end`, or as a `hole`.
    """
    run = [sys.executable, "-c", RUN, ",".join(ways), str(size), where]
    told, pages, kept = subprocess.run(
        run, capture_output=True, text=True, check=True
    ).stdout.split()
    assert told == "True"
    return float(pages), float(kept)


def test_photographs_are_kept_and_large_images_given_back():
    pages, kept = pages_and_kept("keep_photographs", size=24)
    assert pages < 10
    assert kept > 20
    pages, kept = pages_and_kept("keep_photographs", size=100)
    assert kept < 20
    # A worker forked from a process that keeps everything gives large images back as well.
    _, kept = pages_and_kept("keep_freed_memory", "keep_photographs", size=100, where="hole")
    assert kept < 20


def test_a_training_process_keeps_everything():
    pages, kept = pages_and_kept("keep_freed_memory", size=100)
    assert pages < 10
    assert kept > 90


def test_without_them_the_pages_are_mapped_each_time():
    pages, kept = pages_and_kept("", size=100)
    assert pages > 20  # huge pages are few
    assert kept < 20
