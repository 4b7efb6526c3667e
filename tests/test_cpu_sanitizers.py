"""No op of kernels/*.c touches a byte that is not its own or does what C leaves undefined, and no threads race."""
import functools
import os
import platform
import shutil
import subprocess
from typing import NamedTuple

import pytest
from cpu_build import compile_c, new_folder
from harness import ROOT, give_up

OPS = ["attention", "linear", "layers", "embedding", "lm_head", "sample", "team"]
FLAGS = ("-std=gnu11", "-g", "-ffp-contract=off", "-march=native", "-pthread", "-Wall", "-Wextra", "-Werror",
         "-Wno-psabi")
# -O0: no stray access is optimized away, and compiling takes a quarter of the time
MEMORY = "-O0", "-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"
THREADS = "-O1", "-fsanitize=thread"
# detect_stack_use_after_return: GCC 13 and 14 do not align the stacks that it makes (GCC bug 110027)
ENVIRONMENT = {"ASAN_OPTIONS": "detect_leaks=0:redzone=256:detect_stack_use_after_return=0",
               "TSAN_OPTIONS": "halt_on_error=1"}
# GCC's ThreadSanitizer does not know all places where a system may put a program at random
LAUNCHERS = [], ["setarch", platform.machine(), "-R"]
LANES = 16  # where one build will do


def run(*command):
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | ENVIRONMENT)


@functools.cache
def launcher(sanitizer):
    """What goes before a program with this sanitizer; where none works the test is skipped or fails."""
    source = new_folder() / "nothing.c"
    source.write_text("int main(void) { return 0; }\n")
    try:
        program = compile_c("nothing", *sanitizer, source)
    except subprocess.CalledProcessError:
        return give_up(f"needs a compiler with {sanitizer[1]}")
    usable = (words for words in LAUNCHERS if not words or shutil.which(words[0]))
    found = next((words for words in usable if run(*words, program).returncode == 0), None)
    return give_up(f"needs a system where {sanitizer[1]} works") if found is None else found


class Mistake(NamedTuple):
    """A place of a file, and what stands there instead when a unit is compiled."""

    unit: str
    file: str
    text: str
    instead: str


@functools.cache
def sources(mistake):
    folder = new_folder() / "kernels"
    shutil.copytree(ROOT / "kernels", folder, ignore=shutil.ignore_patterns("*.cu*"))
    if mistake:
        file = folder / mistake.file
        text = file.read_text()
        assert text.count(mistake.text) == 1, f"{mistake.file} no longer has the place for the mistake: {mistake.text}"
        file.write_text(text.replace(mistake.text, mistake.instead))
    return folder


@functools.cache
def compiled(unit, sanitizer, lanes, mistake):
    """One C file: of the kernels, or of the tests."""
    folder, own = sources(mistake), ROOT / "tests" / unit
    return compile_c(f"{unit}.o", *FLAGS, *sanitizer, f"-DVL={lanes}",
                     f"-I{folder}", "-c", own if own.exists() else folder / unit)


@functools.cache
def program(sanitizer, lanes, mistake):
    """cpu_edges.c with all kernels."""
    units = ["cpu_edges.c", *sorted(path.name for path in sources(None).glob("*.c"))]
    objects = [compiled(unit, sanitizer, lanes, mistake if mistake and mistake.unit == unit else None)
               for unit in units]
    return compile_c("cpu_edges", *sanitizer, "-pthread", *objects, "-lm")


def complaint(sanitizer, op, threads=2, lanes=LANES, mistake=None):
    """What the sanitizer has to say about an op, or nothing."""
    done = run(*launcher(sanitizer), program(sanitizer, lanes, mistake), op, str(threads))
    assert (done.returncode == 0) == (done.stderr == ""), done
    return done.stderr


@pytest.mark.parametrize("lanes", [4, 8, 16])
@pytest.mark.parametrize("op", OPS)
def test_ops_keep_to_their_arrays_and_to_defined_behaviour(op, lanes):
    assert complaint(MEMORY, op, lanes=lanes) == ""


@pytest.mark.parametrize("op, threads", [*((op, 2) for op in OPS), ("layers", 4), ("sample", 4), ("team", 4)])
def test_threads_do_not_race(op, threads):
    assert complaint(THREADS, op, threads) == ""


# ---- that a mistake would be found

STRAYS = {
    "attention": Mistake("attention.c", "attention.c", "d < rows->dim; d++) rows->out[i][d]",
                         "d <= rows->dim; d++) rows->out[i][d]"),
    "linear": Mistake("linear.c", "cpu.h", "load(const float *p) { return *(const vec *)p; }",
                      "load(const float *p) { return *(const vec *)p + 0 * p[VL]; }"),
    "layers": Mistake("llama.c", "llama.c", "row, dim * sizeof(float));", "row, (dim + 1) * sizeof(float));"),
    "embedding": Mistake("llama.c", "llama.c", "first, size * sizeof(float));", "first, (size + 1) * sizeof(float));"),
    "lm_head": Mistake("llama.c", "llama.c", "for (i = 0; i < size; i += VL) store",
                       "for (i = 0; i <= size; i += VL) store"),
    "sample": Mistake("sample.c", "sample.c", "return id + VL <= row->size ?", "return id + VL <= row->size + 1 ?"),
    "team": Mistake("team.c", "team.c", "(sizeof(Team) + size * sizeof(Member) + 63) / 64 * 64", "sizeof(Team)")}


@pytest.mark.parametrize("op", OPS)
def test_an_access_behind_the_end_would_be_found(op):
    assert "AddressSanitizer" in complaint(MEMORY, op, mistake=STRAYS[op])


@pytest.mark.parametrize("op", ["attention", "sample"])
def test_vectors_that_need_alignment_would_be_found(op):
    vector = "typedef float vec __attribute__((vector_size(4 * VL)"
    mistake = Mistake(f"{op}.c", "cpu.h", f"{vector}, aligned(4)))", f"{vector}))")
    assert "misaligned address" in complaint(MEMORY, op, mistake=mistake)


@pytest.mark.parametrize("mistake", [
    Mistake("llama.c", "llama.c", "for (int64_t t; (t = next_chunk(team)) < num_rows;)",
            "for (int64_t t = 0; t < num_rows; t++)"),
    Mistake("team.c", "team.c", "phase + 1, memory_order_seq_cst", "phase + 1, memory_order_relaxed"),
    Mistake("team.c", "team.c", "&team->phase, memory_order_acquire", "&team->phase, memory_order_relaxed")],
    ids=["shared rows", "release", "acquire"])
def test_races_would_be_found(mistake):
    """On a busy machine one thread may have done all the work before the others begin, but not time and again."""
    assert any("data race" in complaint(THREADS, "layers", 4, mistake=mistake) for _ in range(30))
