"""linear.c multiplies as NumPy does, in every arithmetic, and gives a token the same bits whatever stands beside it."""
import ctypes
import functools

import numpy as np
import pytest
from cpu_build import Team

from rustinfer import FLOAT32, PAIRS, TILED, CpuWeight, c_struct, words

CProduct = c_struct("Product", **words("y stride x num_tokens weights num_weights bias add arithmetic packed"))
GUARD = np.float32(-12345.0)
ARITHMETICS = {"float32": FLOAT32, "pairs": PAIRS, "tiled": TILED}


def inside(size, dtype, fill, skew=0):
    """An array with 64 elements of `fill` around it, at an address that is `skew` elements off any alignment."""
    room = np.full(size + 192, fill, dtype)
    first = 64 + -(room.ctypes.data // room.itemsize) % 64 + skew
    return room, room[first : first + size]


def random_weight(rng, rows, columns, kind, skew=0):
    """(the weight as the kernel reads it, its values): bfloat16 or float32, among NaN that nobody may read."""
    if kind == "f32":
        _, stored = inside(rows * columns, np.float32, np.nan, skew)
        stored[:] = rng.standard_normal(rows * columns, np.float32) / 8
        return stored.reshape(rows, columns), stored.reshape(rows, columns)
    _, stored = inside(rows * columns, np.uint16, 0x7FC0, skew)
    stored[:] = rng.integers(0x3C80, 0x3E80, rows * columns) | rng.integers(0, 2, rows * columns) << 15
    return stored.reshape(rows, columns), (stored.astype(np.uint32) << 16).view(np.float32).reshape(rows, columns)


def rounded(x):
    """x as bfloat16 holds it, to the nearest, ties to even."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


class Kernel(Team):
    """run_linear on a team of its own."""

    def multiply(self, x, weights, arithmetic, bias=None, add=None):
        """x (T, C) @ the stacked weights.T (+ bias) (+ add) -> (T, F)."""
        tokens, columns = x.shape
        height = sum(len(weight) for weight in weights)
        _, given = inside(x.size, np.float32, np.nan, 1)
        given[:] = x.ravel()
        room, y = inside(tokens * height, np.float32, GUARD, 1)
        y[:] = np.nan if add is None else add.ravel()
        packed_room, packed = inside(-(-tokens // 16) * 16 * columns, np.float32, GUARD)
        packed[:] = np.nan
        stack = CpuWeight.of(list(weights))
        product = CProduct(y.ctypes.data, height, given.ctypes.data, tokens, ctypes.addressof(stack.structs),
                           len(weights), 0 if bias is None else bias.ctypes.data, add is not None, arithmetic,
                           packed.ctypes.data)
        self.call("run_linear", product)
        for whole, part in ((room, y), (packed_room, packed)):
            assert (whole == GUARD).sum() == len(whole) - len(part), "a stray write"
        return y.reshape(tokens, height)


@pytest.fixture(scope="module", params=[4, 8, 16], ids="lanes={}".format)
def kernel(request):
    with Kernel(request.param) as kernel:
        yield kernel


@functools.cache
def kernel_of(lanes, threads):
    return Kernel(lanes, threads)


def check(kernel, rng, tokens, heights, columns, arithmetic, kinds=None, bias=False, add=False, skew=0):
    """One product against float64."""
    kinds = kinds or ["bf16"] * len(heights)
    stored, values = zip(*(random_weight(rng, rows, columns, kind, skew) for rows, kind in zip(heights, kinds)))
    x = rng.standard_normal((tokens, columns), np.float32)
    bias = rng.standard_normal(sum(heights), np.float32) if bias else None
    before = rng.standard_normal((tokens, sum(heights)), np.float32) if add else None
    found = kernel.multiply(x, stored, arithmetic, bias, before)
    rounds = [kind == "bf16" and arithmetic != FLOAT32 and columns % 32 == 0 for kind in kinds]
    exact = np.concatenate([(rounded(x) if rounding else x).astype(np.float64) @ weight.T.astype(np.float64)
                            for rounding, weight in zip(rounds, values)], 1)
    size = np.abs(x).astype(np.float64) @ np.concatenate([np.abs(weight) for weight in values]).T
    exact = exact + (0 if bias is None else bias) + (0 if before is None else before)
    # a chain of n float32 additions is off by at most n * 2^-24 of the sum of magnitudes, on average by its root
    allowed = size * (columns**0.5 * 2.0**-23) + np.abs(exact) * 2.0**-22 + 1e-6
    assert (np.abs(found - exact) <= allowed).all(), np.abs(found - exact).max()


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("columns", [16, 32, 48, 64, 80, 96, 512, 544, 576, 1024, 1040, 1056, 2048, 2080])
def test_few_tokens_at_every_width(kernel, columns, arithmetic):
    rng = np.random.default_rng(columns)
    for tokens in (1, 2, 3, 7):
        check(kernel, rng, tokens, [37], columns, ARITHMETICS[arithmetic], bias=tokens == 2, add=tokens == 3)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("tokens", [*range(1, 10), 12, 15, 16, 17, 24, 31, 32, 33, 48, 49, 255, 256, 257, 300])
def test_every_number_of_tokens(kernel, tokens, arithmetic):
    check(kernel, np.random.default_rng(tokens), tokens, [50], 96, ARITHMETICS[arithmetic], bias=True, add=True)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 15, 16, 17, 23, 24, 25, 31, 33, 47, 48, 49, 63, 64, 65, 97, 200, 515])
def test_every_number_of_rows(kernel, rows, arithmetic):
    rng = np.random.default_rng(rows)
    for tokens in (1, 6, 21, 40):
        check(kernel, rng, tokens, [rows], 64, ARITHMETICS[arithmetic])


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("kinds", [("bf16",) * 3, ("f32", "bf16", "bf16"), ("bf16", "f32", "bf16"), ("f32",)])
def test_stacked_weights_of_any_format(kernel, kinds, arithmetic):
    rng = np.random.default_rng(len(kinds))
    for tokens in (1, 5, 20, 36):
        check(kernel, rng, tokens, [40, 7, 19][: len(kinds)], 160, ARITHMETICS[arithmetic], kinds, bias=True, add=True)


def test_weights_lie_at_any_address_that_four_divides(kernel):
    rng = np.random.default_rng(0)
    for skew in (1, 3, 16, 31):
        for arithmetic in ARITHMETICS.values():
            check(kernel, rng, 3, [21], 64, arithmetic, skew=2 * skew)
            check(kernel, rng, 1, [21], 64, arithmetic, ["f32"], skew=skew)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("kind", ["bf16", "f32"])
def test_bits_of_a_token_do_not_depend_on_its_company(arithmetic, kind):
    """Alone, among others, in any place, with any number of threads."""
    rng = np.random.default_rng(7)
    for lanes, columns in ((4, 608), (8, 1056), (16, 2080)):
        stored, _ = random_weight(rng, 70, columns, kind)
        x, number = rng.standard_normal((290, columns), np.float32), ARITHMETICS[arithmetic]
        expected = kernel_of(lanes, 2).multiply(x, [stored], number)
        for threads, places in ((1, [0]), (3, [5]), (2, [289]), (2, range(0, 2)), (2, range(7, 14)), (3, range(3, 11)),
                                (2, range(100, 117)), (2, range(40, 73)), (1, range(20, 290))):
            found = kernel_of(lanes, threads).multiply(x[places], [stored], number)
            assert (found == expected[places]).all(), (lanes, threads, places)


def test_broken_numbers_stay_in_their_row(kernel):
    """Not a number and infinity reach the products of their own token, and of no other."""
    rng = np.random.default_rng(3)
    stored, _ = random_weight(rng, 33, 64, "bf16")
    for arithmetic in ARITHMETICS.values():
        for tokens in (1, 7, 19):
            x = rng.standard_normal((tokens, 64), np.float32)
            x[tokens // 2, 5], x[0, 9] = np.array([0x7F800001, 0x7FFFFFFF], np.uint32).view(np.float32)
            found = kernel.multiply(x, [stored], arithmetic)
            broken = {0, tokens // 2}
            assert np.isnan(found[sorted(broken)]).all()
            assert np.isfinite(np.delete(found, sorted(broken), 0)).all()


def test_activations_are_rounded_to_the_nearest_even(kernel):
    """With one weight of 1 a product is the rounded activation itself."""
    edges = np.array([0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0xBF808000, 0x00000000, 0x80000000, 0x7F7F0000,
                      0x3FFFFFFF, 0x42F6E979], np.uint32).view(np.float32)
    weight = np.zeros((1, 32), np.uint16)
    weight[0, 11] = 0x3F80
    x = np.zeros((len(edges), 32), np.float32)
    x[:, 11] = edges
    for arithmetic in (PAIRS, TILED):
        assert (kernel.multiply(x, [weight], arithmetic)[:, 0] == rounded(edges)).all()
