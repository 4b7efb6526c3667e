"""The emulator of kernels (cuda_cpu): right answers in every mode and order, and no seeded bug goes unnoticed."""
import threading

import numpy as np
import pytest

from cuda_cpu import HERE, MODES, KernelError, RawModule, bf16, f32, nan_like, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

LANE = np.arange(32)


@pytest.fixture(params=[(mode, seed) for mode in MODES for seed in (0, 1, 2)], ids=lambda p: f"{p[0]}-{p[1]}")
def module(request):
    mode, seed = request.param
    return RawModule(path=HERE / "selftest.cu", mode=mode, seed=seed)


@pytest.fixture
def fast():
    return RawModule(path=HERE / "selftest.cu")


def run(module, name, grid, block, *args, **settings):
    module.get_function(name)(grid, block, args, **settings)


# ---------------------------------------------------------------- right answers


def test_shuffles(module):
    out = nan_like((9, 32), np.int32)
    run(module, "shuffles", (1,), (32,), out)
    sources = [
        np.full(32, 5),
        LANE // 8 * 8 + (LANE + 1) % 8,
        LANE ^ 3,
        np.where((LANE ^ 12) <= LANE | 7, LANE ^ 12, LANE),
        np.where(LANE + 4 < 32, LANE + 4, LANE),
        np.where(LANE % 16 + 3 < 16, LANE + 3, LANE),
        np.where(LANE % 8 >= 2, LANE - 2, LANE),
        np.full(32, 7),
        np.where(LANE < 16, LANE ^ 1, 31),
    ]
    assert np.array_equal(out, 10 * np.array(sources))


def test_votes(module):
    for limit in (31, 32):
        out = nan_like((3, 32), np.uint32)
        run(module, "votes", (1,), (32,), out, np.int32(limit))
        ballot = sum(1 << lane for lane in range(0, 32, 3))
        assert np.array_equal(out, np.repeat([[ballot], [limit < 32], [limit == 32]], 32, axis=1))


def test_bit_functions(module):
    x = np.concatenate([[0, 1, 2**31, 2**32 - 1], np.random.default_rng(0).integers(0, 2**32, 96)]).astype(np.uint32)
    out = nan_like((6, len(x)), np.uint32)
    run(module, "bits", (4,), (32,), out, x, np.int32(len(x)))
    for column, value in zip(out.T, map(int, x)):
        reversed_bits = int(f"{value:032b}"[::-1], 2)
        lowest = (value & -value).bit_length()
        product = (value << 32) * 0x9E3779B97F4A7C15 >> 64 & 0xFFFFFFFF
        assert column.tolist() == [value.bit_count(), 32 - value.bit_length(), lowest, reversed_bits,
                                   value * 0x9E3779B9 >> 32, product]


def test_bf16_rounds_to_nearest_even(module):
    spread = np.random.default_rng(0).standard_normal(500) * 10 ** np.linspace(-40, 38, 500)
    ties = np.array([0x3F808000, 0x3F818000, 0xBF808000, 0x7F7F8000], np.uint32).view(np.float32)
    x = np.concatenate([spread, ties, [0.0, -0.0, np.inf, -np.inf]]).astype(np.float32)
    rounded, back = nan_like(x.shape, np.uint16), nan_like(x.shape, np.float32)
    run(module, "round_bf16", (16,), (32,), rounded, back, x, np.int32(len(x)))
    assert np.array_equal(rounded, bf16(x)) and np.array_equal(back, f32(bf16(x)))
    assert rounded[500:504].tolist() == [0x3F80, 0x3F82, 0xBF80, 0x7F80]


def test_functions_are_those_of_numpy(module):
    x = np.geomspace(1e-3, 80, 100).astype(np.float32)
    out = nan_like((6, 100), np.float32)
    run(module, "functions", (1,), (128,), out, x, np.int32(100))
    d = x.astype(np.float64)
    expected = [1 / np.sqrt(d), np.exp2(d), np.exp(-d), np.log(d), 1 / d, np.exp(-d) + np.log(d)]
    np.testing.assert_allclose(out, expected, rtol=2e-7, atol=1e-30)     # within two units in the last place


def test_atomics_in_a_block_that_is_no_whole_number_of_warps(module):
    counts, wide = np.array([0, -1, 0, 0, 0, 0], np.int32), np.zeros(2, np.uint64)
    run(module, "atomics", (1,), (5, 4, 2), counts, wide)
    assert counts.tolist() == [780, 39, 255, 3, 11, 0] and wide.tolist() == [39 << 40, 40 << 32]


def mma(module, a, b, c):
    """a (N, 16, 16), b (N, 8, 16) bf16, c (N, 16, 8) float32, a multiple of two tiles."""
    d = nan_like(c.shape, np.float32)
    run(module, "mma_tiles", (len(a) // 2,), (64,), d, a.view(np.uint32), b.view(np.uint32), c)
    return d


def random_tiles(n):
    rng = np.random.default_rng(1)
    shapes = (n, 16, 16), (n, 8, 16), (n, 16, 8)
    a, b, c = ((rng.standard_normal(s) * 10 ** rng.uniform(-3, 3, s)).astype(np.float32) for s in shapes)
    return bf16(a), bf16(b), c


def test_mma_adds_products_in_rising_k_in_double(module):
    a, b, c = random_tiles(6)
    products = f32(a).astype(np.float64)[:, :, None] * f32(b)[:, None]
    sums = np.add.accumulate(products, axis=-1)[..., -1]
    assert np.array_equal(mma(module, a, b, c), (sums + c).astype(np.float32))


def test_mma_rows_do_not_depend_on_their_place_or_neighbours(fast):
    a, b, c = random_tiles(2)
    order = np.random.default_rng(2).permutation(16)
    moved = mma(fast, a.take(order, axis=1), b, c.take(order, axis=1))
    assert np.array_equal(moved, mma(fast, a, b, c)[:, order])
    alone, zeros = a.copy(), c.copy()
    alone[:, 1:], zeros[:, 1:] = 0, 0
    assert np.array_equal(mma(fast, alone, b, zeros)[:, 0], mma(fast, a, b, c)[:, 0])


def test_mma_products_that_are_zero_change_nothing(fast):
    a, b, c = random_tiles(2)
    a[:, :, 8:] = 0
    later = [np.roll(matrix, 8, axis=2) for matrix in (a, b)]
    assert np.array_equal(mma(fast, *later, c), mma(fast, a, b, c))


def test_dynamic_shared_memory(module):
    x, y = np.arange(3 * 7 * 11, dtype=np.float32).reshape(3, 7, 11), nan_like((3, 11, 7), np.float32)
    run(module, "transpose", (3,), (11, 7), y, x, shared_mem=7 * 11 * 4)
    assert np.array_equal(y, x.transpose(0, 2, 1))


def test_asynchronous_copies_arrive_in_order_and_fill_up_with_zeros(module):
    x = np.arange(1028, dtype=np.float32)
    y = nan_like(x.shape, np.float32)
    run(module, "pipeline", (1,), (64,), y, x, np.int32(len(x)))
    assert np.array_equal(y, 2 * x)


def test_last_block_sees_what_the_others_wrote(module):
    x, parts = np.arange(5 * 32, dtype=np.float32), nan_like((5,), np.float32)
    total, ticket = nan_like((1,), np.float32), np.zeros(1, np.uint32)
    for _ in range(2):
        run(module, "last_block_adds", (5,), (32,), total, parts, ticket, x)
        assert total[0] == x.sum() and ticket[0] == 0


def test_kernel_that_a_macro_states_is_found(fast):
    out = np.zeros(4, np.int32)
    run(fast, "stated_by_macro", (1,), (4,), out)
    assert out.tolist() == [7] * 4
    with pytest.raises(KernelError, match="no kernel stated_by_nobody"):
        fast.get_function("stated_by_nobody")


def test_seed_decides_the_order_of_blocks_and_threads(fast):
    def order(seed):
        out = nan_like((4, 64), np.int32)
        fast.get_function("arrivals")((4,), (64,), (out, np.zeros(1, np.int32)), seed=seed)
        return out.ravel().tolist()

    assert order(0) == list(range(256))
    assert order(1) == order(1) != order(2) and sorted(order(1)) == order(0)


def test_launch_from_another_thread_has_its_own_shared_memory(fast):
    thread = threading.Thread(target=test_dynamic_shared_memory, args=(fast,))
    test_dynamic_shared_memory(fast)
    thread.start()
    thread.join()
    test_dynamic_shared_memory(fast)


# ---------------------------------------------------------------- arguments


@pytest.fixture(params=["fast", "check"])
def checked(request):
    return RawModule(path=HERE / "selftest.cu", mode=request.param)


def test_addresses_in_memory_and_as_arguments_must_be_registered(checked):
    rows = [np.full(4, value, np.float32) for value in (5, 6)]
    table, y = np.array([row.ctypes.data for row in rows], np.uint64), nan_like((2,), np.float32)
    checked.buffers[:] = [*rows, table]
    run(checked, "gather", (1,), (2,), y, table)
    assert y.tolist() == [5, 6]
    run(checked, "gather", (1,), (2,), y, table.ctypes.data)
    run(checked, "gather", (1,), (2,), y, np.uint64(table.ctypes.data))
    with pytest.raises(TypeError, match="argument 1: .* an address inside an array of module.buffers"):
        run(checked, "gather", (1,), (2,), y, y.ctypes.data)
    if checked.mode == "check":
        checked.buffers.pop(0)
        with pytest.raises(KernelError, match="read of 4 bytes out of bounds"):
            run(checked, "gather", (1,), (2,), y, table)


def test_view_may_be_passed_and_is_its_own_bound(checked):
    x, y = np.arange(12, dtype=np.float32), nan_like((12,), np.float32)
    run(checked, "copy", (1,), (4,), y[2:6], x[3:7], np.int32(4))
    assert y[2:6].tolist() == [3, 4, 5, 6] and np.isnan(y[:2]).all() and np.isnan(y[6:]).all()
    if checked.mode == "check":
        with pytest.raises(KernelError, match="at 16 of the 16 bytes of argument 1 at selftest.cu"):
            run(checked, "copy", (1,), (4,), y, x[3:7], np.int32(5))


def test_overlapping_arrays_are_one_piece_of_memory():
    module = RawModule(path=HERE / "selftest.cu", mode="check")
    x = np.arange(12, dtype=np.float32)
    with pytest.raises(KernelError, match="race: .* of argument 1 and argument 0 [+] 4, .* by thread"):
        run(module, "copy", (1,), (4,), x[1:9], x[:8], np.int32(8))


ARGUMENTS = {
    "a Python number": ([0, 0, 5], "argument 2: 5 for a 4-byte integer"),
    "a wide number": ([0, 0, np.int64(5)], "argument 2: .* for a 4-byte integer"),
    "a float for an integer": ([0, 0, np.float32(5)], "argument 2: .* for a 4-byte integer"),
    "wide items": ([0, np.zeros(8), np.int32(5)], "argument 1: an array of float64 for a 4-byte floating-point"),
    "integer items": ([0, np.zeros(8, np.int32), np.int32(5)], "argument 1: an array of int32 for a 4-byte floating"),
    "a stride": ([0, np.zeros(16, np.float32)[::2], np.int32(5)], "argument 1: the array is not contiguous"),
    "a list": ([0, [1.0, 2.0], np.int32(5)], "argument 1: .*pass an array, None or an address"),
    "an argument too few": ([0, 0], "2 arguments for 3 parameters"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_wrong_argument_is_refused(fast, case):
    args, message = ARGUMENTS[case]
    args = [nan_like((8,), np.float32) if isinstance(arg, int) and i < 2 else arg for i, arg in enumerate(args)]
    with pytest.raises(TypeError, match=message):
        run(fast, "copy", (1,), (4,), *args)


def test_more_than_a_card_grants_is_refused(fast):
    kernel, args = fast.get_function("transpose"), (nan_like((4,), np.float32), np.ones(4, np.float32))
    with pytest.raises(KernelError, match="49153 bytes of shared memory; max_dynamic_shared_size_bytes is 49152"):
        kernel((1,), (4,), args, shared_mem=49153)
    kernel.max_dynamic_shared_size_bytes = 1 << 20
    with pytest.raises(KernelError, match="a block of a card has at most 232448"):
        kernel((1,), (4,), args, shared_mem=232449)
    kernel((1,), (4,), args, shared_mem=232448)
    with pytest.raises(KernelError, match="blocks of 1025 threads; a block has 1 to 1024"):
        kernel((1,), (1025,), args)


# ---------------------------------------------------------------- builds

HEADED = '#include "value.cuh"\nextern "C" __global__ void value(int *out) { *out = VALUE + ADD; }'


def value_of(**source):
    out = np.zeros(1, np.int32)
    run(RawModule(options=source.pop("options", ("-DADD=0",)), **source), "value", (1,), (1,), out)
    return int(out[0])


def test_change_of_source_header_or_option_builds_anew(tmp_path):
    source, header = tmp_path / "value.cu", tmp_path / "value.cuh"
    source.write_text(HEADED)
    header.write_text("#define VALUE 1")
    assert value_of(path=source) == 1 and value_of(path=source, options=("-DADD=4",)) == 5
    header.write_text("#define VALUE 2")
    assert value_of(path=source) == 2
    source.write_text(HEADED.replace("+", "* 10 +"))
    assert value_of(path=source) == 20


def test_text_of_a_kernel_finds_its_headers_by_option(tmp_path):
    (tmp_path / "value.cuh").write_text("#define VALUE 1")
    assert value_of(code=HEADED, options=("-DADD=2", f"-I{tmp_path}", "-std=c++17")) == 3


def test_what_does_not_compile_says_where(tmp_path):
    (tmp_path / "broken.cu").write_text("\nint broken(")
    with pytest.raises(KernelError, match="broken.cu:2:.*error"):
        RawModule(path=tmp_path / "broken.cu")


# ---------------------------------------------------------------- seeded bugs

RACE = "race: .* with no barrier in between"
WRONG = "wrong numbers"
FAULTS = {  # kernel of faulty.cu: the mode that must notice, what it says
    "missing_barrier": ("check", RACE),
    "missing_barrier_before_reuse": ("check", RACE),
    "missing_syncwarp": ("check", RACE),
    "two_blocks_write_one_cell": ("check", "race: write of argument 0 [+] 0, written by block 0 with nothing to order"),
    "missing_fence_before_ticket": ("check", "race: read of argument 2 .*, written by block 0 with nothing to order"),
    "copy_read_before_it_arrives": ("check", "where a cp.async is to arrive that nobody has waited for"),
    "divergent_shuffle": ("fast", "thread .31,0,0.: returns while other lanes wait|names lanes that have returned"),
    "shuffle_after_some_lanes_returned": ("fast", "names lanes that have returned"),
    "shuffle_without_own_lane": ("fast", "lane 16 calls a shuffle with mask 0000ffff, which does not name it"),
    "two_different_barriers": ("fast", "threads of one block meet at different barriers"),
    "deadlock": ("fast", "32 of 64 threads wait; 31 .* in __syncwarp at faulty.cu.*; 1 .* in __syncthreads"),
    "endless_loop": ("fast", "still running after 1 CPU seconds"),
    "reads_past_the_end": ("check", "read of 4 bytes out of bounds: at 512 of the 512 bytes of argument 1"),
    "writes_past_dynamic_shared_memory": ("check", "write of 4 bytes at 256 of 256 bytes of dynamic shared memory"),
    "writes_past_static_shared_memory": ("check", "index 63 is out of bounds of its array"),
    "writes_to_const": ("check", "write to argument 1 [+] 0, which is const"),
    "misaligned_load": ("check", "misaligned"),
    "reads_local_memory_of_another_thread": ("check", "in the local memory of another thread"),
    "null_pointer": ("fast", "crash: access to 0x4"),
    "uninitialised_local": ("init", WRONG),
    "shared_memory_read_before_written": ("fast", WRONG),
    "output_never_written": ("fast", WRONG),
    "shift_past_the_word": ("check", "shift by 32"),
    "division_by_zero": ("fast", "integer division by zero"),
}


def swap_neighbours(module, name):
    """Runs a kernel of faulty.cu on arrays that lie in larger ones, so that a wild access does no harm."""
    memory = [np.arange(384, dtype=np.int32) for _ in range(2)]
    out, x, scratch = nan_like((128,), np.int32), memory[0][128:256], memory[1][128:256]
    ticket, expected = np.zeros(1, np.uint32), x.reshape(-1, 2)[:, ::-1].ravel().copy()
    run(module, name, (2,), (64,), out, x, scratch, ticket, shared_mem=256)
    assert np.array_equal(out, expected), WRONG
    assert ticket[0] == 0


@pytest.mark.parametrize("name", FAULTS)
def test_seeded_bug_is_noticed(name):
    mode, message = FAULTS[name]
    module = RawModule(path=HERE / "faulty.cu", mode=mode, cpu_seconds=1)
    with pytest.raises((KernelError, AssertionError), match=message):
        swap_neighbours(module, name)
    swap_neighbours(module, "correct")      # the launch that failed leaves nothing behind


@pytest.mark.parametrize("mode", MODES)
def test_repaired_kernels_pass_without_complaint(mode):
    for seed in (0, 1, 2):
        module = RawModule(path=HERE / "faulty.cu", options=("-DREPAIRED",), mode=mode, seed=seed)
        for name in FAULTS:
            swap_neighbours(module, name)
