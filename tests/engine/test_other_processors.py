"""Kernels of processors that this one is not: cross-compiled, and run under an emulator where there is one."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
FLAGS = ("-std=c++20", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", f"-I{ROOT / 'csrc'}")
# Signed sums past their range are undefined, however right they look under one compiler: here they end the program.
CHECKED = ("-O1", "-fsanitize=undefined", "-fno-sanitize-recover=undefined")  # with -O2 it takes minutes to compile

for_arm = pytest.mark.skipif(
    platform.machine() != "x86_64" or not (shutil.which(COMPILER) and shutil.which(EMULATOR)),
    reason=f"needs {COMPILER} and {EMULATOR} (Debian: g++-aarch64-linux-gnu qemu-user)",
)


@for_arm
def test_the_engine_compiles_for_arm():
    """Everything around the kernels; what binds it to Python needs that processor's Python."""
    sources = [path for path in sorted((ROOT / "csrc").glob("*.cpp")) if "nanobind" not in path.read_text()]
    assert len(sources) > 10
    subprocess.run((COMPILER, *FLAGS, "-Wpedantic", "-fsyntax-only", *sources), check=True)


@for_arm
@pytest.mark.parametrize("build", [("-O2",), CHECKED], ids=["optimised", "checked"])
def test_neon_agrees_with_generic(tmp_path, build):
    """Compile NEON for ARM and compare every kernel of its table with the generic one, at odd sizes."""
    sources = [
        ROOT / "csrc/kernels" / f"{name}.cpp" for name in ("neon", "generic", "pack", "ternary", "sums", "dispatch")
    ]
    program = tmp_path / "kernels_agree"
    inputs = (*sources, ROOT / "tests/native/kernels_agree.cpp")
    command = (COMPILER, *FLAGS, *build, "-march=armv8.2-a+dotprod", *inputs, "-static", "-o", program)
    subprocess.run(command, check=True)
    done = subprocess.run([EMULATOR, "-cpu", "max", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "neon agrees\ngeneric agrees\n", "")
