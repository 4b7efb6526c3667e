"""What NVRTC makes of the kernels, executed (ptx_cpu): the asm of ptx.cuh does what its C++ twins do.

The cases are those of test_kernels_*, which run the twins; here the same helpers launch the PTX.
"""
import contextlib
import functools
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import test_kernels_attention as attention
import test_kernels_linear as linear
import test_kernels_sample as sample
from cuda_cpu import KernelError
from harness import ROOT
from kernel_code import KERNELS, need_wheels
from ptx_cpu import RawModule
from rustinfer import ArrayBackend, Sampler, SamplingParams


@pytest.fixture(scope="module", autouse=True)
def compiler():
    need_wheels("lib/libnvrtc.so.*")


# ------------------------------------------------------------------------------
# Cases: together they execute every asm statement of the kernels


def check_product(op: str, name: str, *variants: tuple[str, int]) -> None:
    """Each (variant, splits) agrees with NumPy, and they agree with one another to the bit."""
    case = linear.OPS[op](name, 9)
    outputs = [case.run(variant, splits=splits) for variant, splits in variants]
    for found in outputs:
        linear.assert_close(found, *case.expected())
        assert np.array_equal(found, outputs[0])


def check_attention(name: str) -> None:
    """Prefill agrees with the formula, and decode with prefill to the bit."""
    case = attention.Case(name, [3, 140])
    rows, out = case.prefill([(0, 0, 3), (1, 136, 4)])
    case.check(rows, out)
    assert np.array_equal(case.decode(rows[-2:], splits=2), out[-2:])


def check_sample() -> None:
    """Tokens and logprobs are those of the array twin."""
    rng, vocab = np.random.default_rng(0), 300
    options = [{"temperature": 0}, {"top_p": 0.9}, {"top_k": 20, "logprobs": 3},
               {"repetition_penalty": 1.3, "logprobs": 20}]
    drawers = [sample.random_drawer(rng, vocab, SamplingParams(**each)) for each in options]
    logits, card = rng.standard_normal((len(drawers), vocab), np.float32), sample.Card(sample.build(vocab), vocab)
    with contextlib.closing(ArrayBackend()) as backend:
        assert sample.check_all(Sampler(backend), logits, drawers, card.draw(logits, drawers)) == 0


CASES = {
    "embedding": lambda: linear.test_embedding("fast"),
    "qkv_rope": lambda: check_product("qkv_rope", "short", ("stream", 1), ("tiled_32", 1)),
    "gate_up": lambda: check_product("gate_up", "small", ("fused", 1), ("tiled_64", 4)),
    "add_linear": lambda: check_product("add_linear", "tiny", ("stream", 1), ("tiled_32", 4)),
    "lm_head": lambda: check_product("lm_head", "tiny", ("fused", 1), ("stream", 1), ("tiled_128", 1)),
    "attention": lambda: check_attention("g3-d32"),
    "attention-wide": lambda: check_attention("g2-d128"),
    "sample": check_sample,
}


def run_on_ptx(check: Callable[[], None], root: Path = ROOT) -> set[str]:
    """Runs a check with the PTX of root/kernels; returns the opcodes of the asm statements that were executed."""
    modules = []

    def make(**arguments):
        modules.append(RawModule(**arguments))
        return modules[-1]

    with pytest.MonkeyPatch.context() as patch:
        for tests in (linear, attention, sample):
            patch.setattr(tests, "RawModule", make)
            patch.setattr(tests, "ROOT", root)
        for tests in (linear, attention):  # these keep modules, which must be neither found here nor left behind
            patch.setattr(tests, "module", functools.cache(tests.module.__wrapped__))
        check()
    return set().union(*(module.executed for module in modules))


@functools.cache
def run_case(name: str) -> set[str]:
    return run_on_ptx(CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_kernels_as_ptx_give_what_their_twins_give(name):
    assert run_case(name)


def test_every_asm_statement_was_executed():
    """By the cases above. The compiler's own headers have asm too, which is of no interest here."""
    source = "".join(re.sub("//.*", "", path.read_text(encoding="utf-8")) for path in sorted(KERNELS.glob("*.cu*")))
    opcodes = re.findall(r'\basm(?: volatile)?\("([\w.:]+)', source)
    assert len(opcodes) == len(set(opcodes)) == len(re.findall(r"\basm\b", source))
    assert set(opcodes) - set().union(*map(run_case, CASES)) == set()


# ------------------------------------------------------------------------------
# Faults in ptx.cuh: (case, text, what stands there instead, how it is noticed)

WRONG = "of the bound"  # numbers
FAULTS = {
    "halves of a word swapped": ("lm_head", '"f"(high), "f"(low)', '"f"(low), "f"(high)', WRONG),
    "weights out of order": ("lm_head", "256B.v4.u32 {%0,%1,%2,%3}", "256B.v4.u32 {%1,%0,%2,%3}", WRONG),
    "activations out of order": ("lm_head", "global.v4.u32 {%0,%1,%2,%3}", "global.v4.u32 {%0,%1,%3,%2}", WRONG),
    "two words for four": ("lm_head", "global.v4.u32 {%0,%1,%2,%3}", "global.v2.u32 {%0,%1}", WRONG),
    "zeros forgotten": ("lm_head", '"r"(ok ? 16 : 0)', '"r"(16)', "out of bounds"),
    "copies never committed": ("lm_head", "cp.async.commit_group;", "", WRONG),
    "a group not waited for": ("add_linear", 'wait_group %0;" ::"n"(N)', 'wait_group %0;" ::"n"(N + 1)', WRONG),
    "a out of order": ("lm_head", '"r"(a0), "r"(a1), "r"(a2)', '"r"(a0), "r"(a2), "r"(a1)', WRONG),
    "b out of order": ("lm_head", '"r"(b0), "r"(b1)', '"r"(b1), "r"(b0)', WRONG),
    "sums out of order": ("lm_head", "{%8,%9}, {%0,%1,%2,%3}", "{%8,%9}, {%2,%3,%0,%1}", WRONG),
    "no wait": ("lm_head", "griddepcontrol.wait;", "griddepcontrol.launch_dependents;", "before it has waited"),
}


def kernels_with(text: str, instead: str, root: Path) -> Path:
    """A folder with a copy of the kernels in which ptx.cuh says something else."""
    shutil.copytree(KERNELS, root / "kernels")
    path = root / "kernels" / "ptx.cuh"
    source = path.read_text(encoding="utf-8")
    assert source.count(text) == 1
    path.write_text(source.replace(text, instead), encoding="utf-8")
    return root


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_in_an_asm_statement_is_noticed(fault, tmp_path):
    case, text, instead, sign = FAULTS[fault]
    root = kernels_with(text, instead, tmp_path)
    with pytest.raises((AssertionError, KernelError), match=sign):
        run_on_ptx(CASES[case], root)


# ------------------------------------------------------------------------------
# What no kernel may do, in a block of 64 threads; `out` has 64 elements

WAIT = 'asm volatile("griddepcontrol.wait;" ::: "memory");'
STORE, WAITED = "out[threadIdx.x] = threadIdx.x;", f"{WAIT} volatile unsigned *v = out; unsigned i = threadIdx.x;"
FORBIDDEN = {
    "end without waiting": ("", "before it has waited"),
    "store before waiting": (f"{STORE} {WAIT}", "before it has waited"),
    "store out of bounds": (f"{WAITED} v[i + 1] = i;", "out of bounds in thread 63"),
    "load out of bounds": (f"{WAITED} v[i] = v[i - 1];", "out of bounds in thread 0"),
    "misaligned": (f"{WAITED} *(unsigned *)((char *)out + 2) = i;", "not aligned to 4 bytes"),
    "shared out of bounds": (f"{WAITED} extern __shared__ unsigned s[]; s[i] = v[i]; v[63 - i] = s[i];",
                             "out of bounds"),
    "half a warp": (f"{WAITED} if (i < 48) v[i] = __shfl_sync(~0u, i, 1);", "never come"),
    "shuffle of some lanes": (f"{WAITED} v[i] = __shfl_sync(0xFFFFu, i, 1);", "not of all lanes"),
    "two barriers": (f"{WAITED} if (v[i] > 7) {{ __syncthreads(); v[i] = 1; }} else {{ v[i] = 2; __syncthreads(); }}",
                     "never come"),
    "endless": (f"{WAITED} while (v[0] == 0) v[i] = v[i];", "endless"),
    "unknown": (f'{WAITED} asm volatile("nanosleep.u32 1;");', "unknown instruction"),
    "another rounding": (f'{WAITED} float f; asm volatile("add.rz.f32 %0, %1, %1;" : "=f"(f) : "f"(1.0f)); v[i] = f;',
                         "unknown instruction"),
}


def launch_text(body: str, folder: Path) -> np.ndarray:
    path, out = folder / "f.cu", np.arange(64, dtype=np.uint32) // 2
    path.write_text(f'extern "C" __global__ void f(unsigned *out) {{ {body} }}', encoding="utf-8")
    RawModule(path=path).get_function("f")((1,), (64,), (out,))
    return out


def test_what_is_allowed_is_done(tmp_path):
    out = launch_text(f"{WAITED} unsigned x = v[i]; __syncthreads(); v[63 - i] = x + __shfl_sync(~0u, i, 1);", tmp_path)
    assert out.tolist() == [i // 2 + i // 32 * 32 + 1 for i in range(63, -1, -1)]


@pytest.mark.parametrize("what", FORBIDDEN)
def test_what_is_forbidden_is_noticed(what, tmp_path, monkeypatch):
    body, sign = FORBIDDEN[what]
    monkeypatch.setattr("ptx_cpu.MOST_TURNS", 1000)
    with pytest.raises(KernelError, match=sign):
        launch_text(body, tmp_path)
