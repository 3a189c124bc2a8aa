"""Kernels of processors that this one is not: cross-compiled, and run under an emulator where there is one."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
FLAGS = ("-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", f"-I{ROOT / 'csrc'}")


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not (shutil.which(COMPILER) and shutil.which(EMULATOR)),
    reason=f"needs {COMPILER} and {EMULATOR} (Debian: g++-aarch64-linux-gnu qemu-user)",
)
def test_neon_agrees_with_generic(tmp_path):
    """Compile NEON for ARM and compare it with the generic kernels at odd sizes."""
    sources = [ROOT / "csrc/kernels" / f"{name}.cpp" for name in ("neon", "generic", "pack", "sums", "dispatch")]
    program = tmp_path / "kernels_agree"
    inputs = (*sources, ROOT / "tests/native/kernels_agree.cpp")
    command = (COMPILER, *FLAGS, "-march=armv8.2-a+dotprod", *inputs, "-static", "-o", program)
    subprocess.run(command, check=True)
    done = subprocess.run([EMULATOR, "-cpu", "max", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "neon agrees\ngeneric agrees\n")
