"""team.c hands out each chunk once, holds its barriers, sleeps while nothing is to do, and leaves no thread behind."""
import contextlib
import ctypes
import functools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from cpu_build import FLAGS, compile_c
from harness import ROOT, wait_for

SIZES = [1, 2, 3, 8]


@functools.cache
def library():
    kernels = ctypes.CDLL(str(compile_c("team.so", *FLAGS, f"-I{ROOT / 'kernels'}", ROOT / "tests" / "team_work.c")))
    kernels.team_create.restype = ctypes.c_void_p
    kernels.count_mistakes.restype = kernels.count_held.restype = ctypes.c_int64
    kernels.team_free.argtypes = kernels.team_size.argtypes = (ctypes.c_void_p,)
    kernels.count_mistakes.argtypes = (ctypes.c_void_p, *(ctypes.c_int64,) * 4)
    kernels.limit_system.argtypes = (ctypes.c_int64,) * 2
    return kernels


def in_time(call, *arguments):
    """What it returns; an assertion error, rather than a test that never ends, if threads wait for each other."""
    results = []
    caller = threading.Thread(target=lambda: results.append(call(*arguments)), daemon=True)
    caller.start()
    caller.join(60)
    assert results, "threads wait in vain"
    return results[0]


@contextlib.contextmanager
def team_of(size):
    """A team whose threads and memory are given back afterwards."""
    held = library().count_held()
    team = library().team_create(size)
    yield team
    in_time(library().team_free, team)
    assert library().count_held() == held


def assert_right(team, runs, loops=1, chunks=7, pause=0):
    assert in_time(library().count_mistakes, team, runs, loops, chunks, pause) == 0


@pytest.fixture(params=SIZES, ids="size={}".format)
def team(request):
    with team_of(request.param) as team:
        assert library().team_size(team) == request.param
        yield team


@pytest.mark.parametrize("loops, chunks", [(0, 0), (1, 0), (1, 1), (1, 7), (2, 0), (16, 3), (5, 40)])
def test_each_chunk_is_handed_out_once_and_barriers_hold(team, loops, chunks):
    assert_right(team, 100, loops, chunks)


def test_thousands_of_short_runs_are_right(team):
    assert_right(team, 3000 if library().team_size(team) < 8 else 1000)


def test_one_thread_may_keep_the_others_waiting_for_long(team):
    assert_right(team, 10, 8, 5, pause=1000)


def test_runs_after_pauses_of_any_length_are_right(team):
    """Around a tenth of a millisecond the threads are just about to sleep."""
    for pause in np.random.default_rng(0).exponential(2e-4, 300):
        time.sleep(pause)
        assert_right(team, 1, 2)


def is_idle():
    used = time.process_time()
    time.sleep(0.05)
    return time.process_time() - used < 0.005


def test_threads_sleep_while_there_is_nothing_to_do(team):
    for _ in range(3):
        assert_right(team, 1)
        wait_for(is_idle)


def test_any_thread_may_have_a_team_run(team):
    """`in_time` calls from a thread of its own."""
    for _ in range(100):
        assert_right(team, 1)
        assert library().count_mistakes(team, 1, 1, 7, 0) == 0


@pytest.mark.parametrize("size", SIZES)
def test_teams_come_and_go_at_work_asleep_and_unused(size):
    for turn in range(40):
        with team_of(size) as team:
            if turn % 3:
                assert_right(team, turn)
            time.sleep(0.001 * (turn % 4 == 0))


@pytest.mark.parametrize("size", [0, 1])
def test_the_least_team_is_the_caller_alone(size):
    held = library().count_held()
    with team_of(size) as team:
        assert library().team_size(team) == 1 and library().count_held() == held + 1  # its memory
        assert_right(team, 10, 3)


@pytest.mark.parametrize("sizes, runs", [((2, 2), 1000), ((3, 2, 1), 500), ((8, 8), 100)], ids=str)
def test_teams_at_work_at_once_do_not_mix(sizes, runs):
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(len(sizes)) as pool:
        teams = [stack.enter_context(team_of(size)) for size in sizes]
        for future in [pool.submit(assert_right, team, runs, 3) for team in teams]:
            future.result()


@pytest.mark.parametrize("allowed", [0, 1, 3])
def test_a_system_without_enough_threads_gives_a_smaller_team(allowed):
    library().limit_system(allowed, 1)
    try:
        with team_of(8) as team:
            assert library().team_size(team) == allowed + 1
            assert_right(team, 100, 3)
    finally:
        library().limit_system(-1, 1)


def test_a_system_without_memory_gives_no_team():
    library().limit_system(-1, 0)
    try:
        assert library().team_create(2) is None
    finally:
        library().limit_system(-1, 1)
