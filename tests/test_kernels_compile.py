"""The kernels compile for every architecture, fit it, and their machine code is what was meant; no card is needed.

Compiling takes its time, so not every model is compiled for every architecture. references/registers.json is written
when all of them are, none may spill then, and it is void as soon as a kernel changes.
"""
import ast
import inspect
import itertools
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

import kernel_code
import rustinfer
from kernel_code import ARCHITECTURES, DIMS, KERNELS, REGISTER_FILE, SHARED_LIMITS, Build
from rustinfer import CudaBackend

# Every instruction set and every model; RUSTINFER_TEST_KERNELS=all compiles each for each.
CHECKED = {"1B": ["sm_80", "sm_90"], "3B": ["sm_120"], "8B": ["sm_100"], "demo": ["sm_90"]}
if os.environ.get("RUSTINFER_TEST_KERNELS") == "all":
    CHECKED = dict.fromkeys(DIMS, ARCHITECTURES)
BUILDS = [Build(unit, dims, arch) for dims in DIMS for unit in kernel_code.units() for arch in CHECKED[dims]]
TILES = {"qkv_rope": 2, "gate_up": 2, "add_linear": 1, "lm_head": 2}  # n8 tiles of a unit of the four products
DISASSEMBLED = [build for build in BUILDS if build.can_wait or build.file in (*TILES, "attention")]
# Copies of weights to shared memory that a thread starts before it waits: STAGES - 1 steps of 8 * BN / threads.
COPIES_AHEAD = {"tiled_32": 20, "tiled_64": 16, "tiled_128": 8}
ROUND = 16  # 16-byte loads of weights that a lane of linear_stream asks for at once
# 16-byte loads of a lane before its first multiplication: AHEAD + 1 pieces of four (attention.cu).
KEYS_AHEAD = {"attention_decode": 32, "attention_prefill": 16}
RECORD_ANEW = "`python tests/kernel_code.py --record` writes the record anew; look at the difference before committing"


def for_builds(builds: list[Build]):
    return pytest.mark.parametrize("build", builds, ids=str)


@pytest.fixture(scope="module", autouse=True)
def compiler():
    kernel_code.need_wheels("lib/libnvrtc.so.*", "bin/nvdisasm")


def make_module(build: Build) -> kernel_code.Module:
    module = kernel_code.compile_build(build)
    if build in DISASSEMBLED:
        module.code  # is kept; nvdisasm takes as long as the compiler
    return module


@pytest.fixture(scope="module")
def modules(request, compiler):
    """{build: future of its module} for the chosen tests, made side by side."""
    chosen = {item.callspec.params.get("build") for item in request.session.items if hasattr(item, "callspec")}
    pool = ThreadPoolExecutor(os.cpu_count())
    yield {build: pool.submit(make_module, build) for build in BUILDS if build in chosen}
    pool.shutdown(cancel_futures=True)


@pytest.fixture
def module(modules, build):
    return modules[build].result()


@pytest.fixture
def record():
    return json.loads(kernel_code.RECORD.read_text(encoding="utf-8"))


def launched_blocks() -> dict[str, int]:
    """{pattern of a kernel's name: threads} of the launches in rustinfer.py that name a number of threads."""
    calls = [node.args for node in ast.walk(ast.parse(inspect.getsource(rustinfer))) if isinstance(node, ast.Call)
             and isinstance(node.func, ast.Attribute) and node.func.attr == "_launch" and len(node.args) > 3]
    return {"".join(getattr(part, "value", "") if isinstance(part, ast.Constant) else r"\w+"
                    for part in getattr(entry, "values", [entry])): block.value
            for _, entry, _, block, *_ in calls if isinstance(block, ast.Constant)}


@for_builds(BUILDS)
def test_file_compiles_without_warnings_stack_or_spills(module):
    assert module.kernels and module.warnings == []
    assert {name: kernel for name, kernel in module.kernels.items() if kernel.stack or kernel.spills} == {}


@for_builds(BUILDS)
def test_block_fits_a_multiprocessor(module, build):
    dynamic = {f"{build.file}_tiled_{rows}": shared for _, rows, _, _, shared in CudaBackend.TILES}
    dynamic["attention_prefill"] = 512 * build.macros["HEAD_DIM"]
    for name, kernel in module.kernels.items():
        assert -(-kernel.registers // 8) * 8 * kernel.threads <= REGISTER_FILE, name
        assert kernel.shared + dynamic.get(name, 0) <= SHARED_LIMITS[build.arch], name


@for_builds([build for build in BUILDS if build.dims == "1B" and build.arch == "sm_90"])
def test_host_launches_blocks_as_large_as_the_kernel_is_bound_to(module, build):
    blocks = launched_blocks() | {rf"\w+_tiled_{rows}": threads for _, rows, _, threads, _ in CudaBackend.TILES}
    for name, kernel in module.kernels.items():
        assert [kernel.threads] == [threads for pattern, threads in blocks.items() if re.fullmatch(pattern, name)], name


@for_builds(BUILDS)
def test_register_counts_are_as_recorded(module, build, record):
    if kernel_code.nvrtc_version() != record["nvrtc"]:
        pytest.skip(f"recorded with NVRTC {record['nvrtc']}, and this is {kernel_code.nvrtc_version()}")
    counts = {build.key(name): kernel.registers for name, kernel in module.kernels.items()}
    recorded = record["registers"]
    assert counts == {key: recorded.get(key, {}).get(build.dims, {}).get(build.arch) for key in counts}, RECORD_ANEW


def test_record_is_of_these_kernels(record):
    assert record["sources"] == {path.stem: kernel_code.source_hash(path) for path in KERNELS.glob("*.cu")}, RECORD_ANEW


def test_shared_memory_of_tiles_is_what_the_host_asks_for():
    checks = "".join(f"static_assert(Tile{rows}::BM == {rows} && Tile{rows}::BN == {columns} && Tile{rows}::SHARED == "
                     f"{shared} && Tile{rows}::THREADS == {threads});\n"
                     for _, rows, columns, threads, shared in CudaBackend.TILES)
    text = '#include "linear.cuh"\n' + checks
    kernel_code.compile_text(text, "tiles.cu", "sm_80", Build("lm_head", "1B", "sm_80").macros)


# ------------------------------------------------------------------------------
# Machine code

def weights_ahead(code, mark: str) -> int:
    return kernel_code.ahead_of(kernel_code.events(code), mark).count("weights")


@for_builds([build for build in BUILDS if build.can_wait])
def test_every_kernel_lets_the_next_one_start_and_waits_before_it_touches_more_than_weights(module):
    faults = {name: kernel_code.faults_of_waiting(code) for name, code in module.code.items()}
    assert faults == dict.fromkeys(module.kernels, [])


def rounds_of(build: Build) -> list[int]:
    """Weight loads as linear_stream means them: a round before any maths, one in the loop, and what is left over."""
    k, tiles = build.macros.get("WIDTH", build.macros["HIDDEN"]), TILES[build.file]
    rounds, rest = divmod((k + 127) // 128, ROUND // tiles)  # a warp has a quarter of K, in blocks of 32
    return [ROUND] * min(rounds, 2) + [rest * tiles] * (rest > 0)


@for_builds([build for build in BUILDS if build.file in TILES])
def test_streamed_weights_are_asked_for_together_and_first_before_the_wait(module, build):
    """A warp whose loads do not overlap is up to 16 times as slow, and nothing but the machine code shows it."""
    streams = {name: code for name, code in module.code.items() if "tiled" not in name}
    assert {name: kernel_code.rounds_of_weights(code) for name, code in streams.items()} == dict.fromkeys(
        streams, rounds_of(build))
    for name, code in streams.items():
        for mark in ["mma", "wait"] if build.can_wait else ["mma"]:
            assert weights_ahead(code, mark) == rounds_of(build)[0], f"{name}: {kernel_code.describe(code)}"


@for_builds([build for build in BUILDS if build.file in TILES and build.can_wait])
def test_tiled_weights_are_on_their_way_before_the_wait(module, build):
    for name, code in module.code.items():
        if tile := name.removeprefix(f"{build.file}_") if "tiled" in name else "":
            ahead = kernel_code.ahead_of(kernel_code.events(code), "wait")
            assert ahead.count("copy") == COPIES_AHEAD[tile], f"{name}: {kernel_code.describe(code)}"


@for_builds([build for build in BUILDS if build.file == "attention"])
def test_keys_of_a_chunk_are_on_their_way_before_the_first_is_used(module):
    """Twice: for chunks whose keys all rows see, and for those at the end."""
    for name, code in module.code.items():
        runs = [(event, len(list(group))) for event, group in itertools.groupby(kernel_code.events(code))]
        starts = [count for (event, count), (after, _) in zip(runs, runs[1:]) if (event, after) == ("load128", "mma")]
        assert sum(count >= KEYS_AHEAD[name] for count in starts) == 2, f"{name}: {kernel_code.describe(code)}"


# ------------------------------------------------------------------------------
# The checks notice what they are there for

SOUND = """#include "ptx.cuh"
extern "C" __global__ void __launch_bounds__(128) sum(float *y, const float *x, const uint4 *weights, int n) {
  pdl_launch();
  uint4 w[16];
#pragma unroll
  for (int i = 0; i < 16; i++) w[i] = load_weights(weights + 128 * i + threadIdx.x);
  __syncwarp();
  pdl_wait();
  float d[4] = {x[0], x[1], x[2], x[3]};
#pragma unroll
  for (int i = 0; i < 16; i++) {
    mma_bf16(d, 1, 1, 1, 1, w[i].x, w[i].y);
    mma_bf16(d, 1, 1, 1, 1, w[i].z, w[i].w);
  }
  y[threadIdx.x] = d[0] + d[1] + d[2] + d[3];
}
"""


def code_of(text: str, arch: str) -> list[tuple[str, str]]:
    cubin, _, _ = kernel_code.compile_text(text, "sum.cu", arch, {})
    return kernel_code.disassemble(cubin)["sum"]


def test_sound_kernel_passes():
    code = code_of(SOUND, "sm_90")
    assert kernel_code.faults_of_waiting(code) == [] and weights_ahead(code, "wait") == weights_ahead(code, "mma") == 16


@pytest.mark.parametrize("find, put, fault", [
    ("pdl_wait();", "", "does not wait"),
    ("pdl_launch();", "", "does not begin with launch"),
    ("  __syncwarp();", "  if (threadIdx.x >= n) return;", "leaves the wait out"),
    ("  pdl_wait();", "  if (threadIdx.x < n) pdl_wait();", "leaves the wait out"),
    ("  uint4 w[16]", "  const uint4 early = load_activations((const uint4 *)x);  y[0] = early.x;  uint4 w[16]",
     "load before the wait"),
])
def test_missing_or_late_wait_is_noticed(find, put, fault):
    assert find in SOUND
    faults = kernel_code.faults_of_waiting(code_of(SOUND.replace(find, put), "sm_90"))
    assert any(fault in found for found in faults), faults


def test_read_only_weights_sink_below_the_wait_and_are_noticed():
    text = SOUND.replace("load_weights(weights + 128 * i + threadIdx.x)", "__ldg(weights + 128 * i + threadIdx.x)")
    assert weights_ahead(code_of(text, "sm_90"), "wait") == 0


def test_loads_that_no_fence_holds_together_are_noticed():
    assert weights_ahead(code_of(SOUND, "sm_80"), "mma") == 16
    assert weights_ahead(code_of(SOUND.replace("__syncwarp();", ""), "sm_80"), "mma") < 16


@pytest.mark.parametrize("text, fault", [
    ('__global__ void f(int *y) { int a[64]; for (int i = 0; i < 64; i++) a[y[i]] = i; y[0] = a[y[1]]; }', "stack"),
    ('__global__ void f(int *y) { int unused; y[0] = 1; }', "warnings")])
def test_stack_and_warnings_are_noticed(text, fault):
    _, ptx, log = kernel_code.compile_text(f'extern "C" {text}', "f.cu", "sm_90", {})
    found = {"stack": kernel_code.read_resources(log, {})["f"].stack, "warnings": kernel_code.read_warnings(log)}
    assert found[fault]
