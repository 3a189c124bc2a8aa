"""Prefetches in the built module: a compiler may leave them out without a word, and nothing but speed is lost then."""

import platform
import re
import shutil
import subprocess

import pytest

from turbosparse import _native

INSTRUCTION = re.compile(r"^\s*[0-9a-f]+:\s+(.*)", re.MULTILINE)
# What only one instruction set's kernels hold; they lie together in the module, AVX2's are the rest.
OWN = {"avx512": re.compile("%zmm"), "avxvnni": re.compile(r"\{vex\} vpdpbusd")}
LANES = {"avx512": 16, "avxvnni": 8, "avx2": 8}
LIST_HEIGHTS = {"avx512": 3, "avxvnni": 2, "avx2": 2}  # of the tiles of a list: 8 rows, 4 and 1, or 4 and 1


def asked_for(isa: str) -> int:
    """Prefetches that csrc/kernels/simd_*.h ask for: one beside each load of a blocked row, in unrolled loops.

    They are there for each type, size of group and kernel: dot products of one term and of two, with lists and with
    rows in order, one and four of these at a time; axpy, sums. The first rows of a list, plain rows and a prompt's rows
    come on top.
    """
    loads = sum(max(dwords * blocks // LANES[isa], 1) for dwords in (4, 8) for blocks in (16, 8, 4, 2, 1))
    return loads * (2 * LIST_HEIGHTS[isa] + 2 * (1 + 4) + 2)


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or not shutil.which("objdump"),
    reason="needs objdump (binutils) and a module for x86-64",
)
def test_the_compiler_kept_them() -> None:
    """GCC takes a function that only prefetches for one without effect: not inlined early, its calls are gone."""
    command = ("objdump", "-d", "--no-show-raw-insn", _native.__file__)
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    code = INSTRUCTION.findall(text)
    places = [place for place, each in enumerate(code) if each.startswith("prefetch")]
    kept = {}
    for isa, own in OWN.items():
        of_isa = [place for place, each in enumerate(code) if own.search(each)]
        if of_isa:  # avxvnni: not every compiler knows it
            kept[isa] = sum(of_isa[0] < place < of_isa[-1] for place in places)
    kept["avx2"] = len(places) - sum(kept.values())
    assert "avx512" in kept
    assert all(count >= asked_for(isa) for isa, count in kept.items()), kept
