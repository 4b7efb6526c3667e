"""kernels/*.c compile for every kind of CPU without a warning, and use the instructions that they are written for."""
import re
import shutil
import subprocess

import pytest
from cpu_build import FLAGS, compile_c
from harness import ROOT, need_compiler, need_tool

SOURCES = sorted((ROOT / "kernels").glob("*.c"))
PLAIN = [flag for flag in FLAGS if flag not in ("-march=native", "-shared")]
X86 = {  # an architecture: what its code must have, and what it cannot have
    "x86-64": ("mulps", "vfmadd"),
    "x86-64-v2": ("mulps", "vfmadd"),
    "haswell": ("vfmadd231ps", "zmm"),
    "znver3": ("vfmadd231ps", "zmm"),
    "skylake-avx512": ("vfmadd231ps.*zmm", "vdpbf16ps"),
    "cooperlake": ("vdpbf16ps.*zmm", "tdpbf16ps"),
    "sapphirerapids": ("tdpbf16ps", "vdpbf16ps.*ymm"),
}


@pytest.fixture(scope="module")
def x86():
    """Skips where the compiler makes code for something else."""
    compiler = need_compiler()
    if "x86" not in subprocess.run([compiler, "-dumpmachine"], capture_output=True, text=True, check=True).stdout:
        pytest.skip("the compiler makes no code for x86")


def machine_code(compiler, objdump, *flags):
    """The instructions of linear.c."""
    linear = next(path for path in SOURCES if path.name == "linear.c")
    built = compile_c("linear.o", *PLAIN, *flags, "-c", linear, compiler=compiler)
    shown = subprocess.run([objdump, "-d", "--no-show-raw-insn", built], capture_output=True, text=True, check=True)
    return shown.stdout


@pytest.mark.parametrize("architecture", X86)
def test_every_x86_has_its_instructions(x86, architecture):
    wanted, refused = X86[architecture]
    for source in SOURCES:
        if source.name != "linear.c":
            compile_c("kernel.o", *PLAIN, f"-march={architecture}", "-c", source)
    code = machine_code(None, need_tool("objdump"), f"-march={architecture}")
    assert re.search(wanted, code) and not re.search(refused, code)


def test_tiles_are_configured_before_they_are_loaded(x86):
    """GCC up to 12 drops the stores into the configuration unless a barrier stands before it is loaded."""
    code = machine_code(None, need_tool("objdump"), "-march=sapphirerapids")
    before = code[: code.index("ldtilecfg")][-3000:]
    assert re.search(r"mov.*(\$0x1[,)]|\$0x40|%[xyz]mm\d+,.*\(%[re]sp\))", before)
    assert code.count("tilerelease") >= 1


def test_arm_has_its_instructions():
    compiler = shutil.which("aarch64-linux-gnu-gcc")
    if compiler is None:
        pytest.skip("needs aarch64-linux-gnu-gcc")
    for source in SOURCES:
        compile_c("kernel.o", *PLAIN, "-c", source, compiler=compiler)
    assert "fmla" in machine_code(compiler, "aarch64-linux-gnu-objdump")


@pytest.mark.parametrize("op", ["linear", "attention", "layers", "lm_head", "embedding", "sample"])
def test_the_edges_run_on_arm(op):
    """The driver of the sanitizers, on an emulated ARM."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("needs aarch64-linux-gnu-gcc and qemu-aarch64")
    built = compile_c("edges", "-std=gnu11", "-O2", "-ffp-contract=off", "-pthread", "-static", "-I", ROOT / "kernels",
                      ROOT / "tests" / "cpu_edges.c", *SOURCES, "-lm", compiler=compiler)
    subprocess.run([emulator, built, op], check=True, timeout=300)
