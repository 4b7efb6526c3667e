"""The CPU backend's host side: kernels compiled once, kept safely and checked at load, or NumPy with the reason."""
import dataclasses
import json
import logging
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from harness import REFERENCES, ROOT, ServerProcess, need_compiler, reference_answers, wait_for
from make_references import random_checkpoint

import rustinfer
from rustinfer import (FLOAT32, LLM, PAIRS, TILED, CpuBackend, EngineConfig, HugePages, KernelCompiler, KernelError,
                       ModelConfig, check_kernels, open_kernels, pick_backend, available_memory, usable_cores)

TINY = REFERENCES / "llama3-tied"
TEXT = "The river runs down to the sea"
SOURCES = {"one.c": '#include "shared.h"\nEXPORT int one(void) { return ONE; }\n',
           "two.c": "int two(void) { return 2; }\n",
           "shared.h": '#define ONE 1\n#define EXPORT __attribute__((visibility("default")))\n'}


@pytest.fixture(scope="module", autouse=True)
def module_cache(tmp_path_factory):
    """A cache for this file's tests, which do not depend on what earlier starts left."""
    need_compiler()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CC", raising=False)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """The folder of a cache that is empty yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rustinfer"


@pytest.fixture
def sources(tmp_path):
    """A folder of C files that compile in no time."""
    return write_files(tmp_path / "sources", SOURCES)


@pytest.fixture(scope="module")
def kernels():
    return open_kernels(KernelCompiler(ROOT / "kernels").library())


def write_files(folder, texts):
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text)
    return folder


def compiler_script(path, before):
    """A compiler that runs some lines of shell and then the system's."""
    path.write_text(f'#!/bin/sh\n{before}\nexec {need_compiler()} "$@"\n')
    path.chmod(0o755)
    return str(path)


def when_compiling(lines):
    """Lines of shell for the compilation alone, not for the question which CPU this is."""
    return f'case "$*" in *-shared*) {lines};; esac'


def run_python(code, *args, timeout=60):
    """What a Python process that imports rustinfer from here prints."""
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], cwd=ROOT, capture_output=True, text=True,
                          timeout=timeout)
    assert done.returncode == 0, (done.returncode, done.stderr)
    return done.stdout


def names_in(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def thread_ids():
    """Of this process, those of the kernels included; one that was joined may still be there for a moment."""
    return {thread.id for thread in psutil.Process().threads()}


def answers_of(llm, prompts=(TEXT, [40, 41, 42]), max_tokens=8):
    """Token ids and the bits of their logprobs."""
    outputs = llm.generate(list(prompts), temperature=0, logprobs=0, max_tokens=max_tokens, ignore_eos=True)
    return [(token_id, entries[token_id].logprob.hex()) for output in outputs for completion in output.outputs
            for token_id, entries in zip(completion.token_ids, completion.logprobs)]


def assert_answers_as_the_reference(llm, name=TINY.name):
    _, arrays = reference_answers(name)
    prompt, wanted = arrays["prompt_token_ids_0"].tolist(), arrays["output_token_ids_0"].tolist()[:16]
    assert [token_id for token_id, _ in answers_of(llm, [prompt], len(wanted))] == wanted


# -- compiled once


def test_next_start_finds_the_library_and_does_not_compile(sources, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CC", compiler_script(tmp_path / "cc", f'echo "$*" >> {tmp_path}/calls'))
    first, second = (KernelCompiler(sources).library() for _ in range(2))
    assert first == second and first.parent == cache and names_in(cache) == [first.name]
    calls = (tmp_path / "calls").read_text().splitlines()
    assert sum("-shared" in call for call in calls) == 1


def test_only_the_first_start_says_that_it_compiles(sources, cache, caplog):
    with caplog.at_level(logging.INFO, "rustinfer"):
        compiler = KernelCompiler(sources)
        compiler.library()
        assert [record.getMessage() for record in caplog.records] == [
            f"compiling the CPU kernels with {compiler.compiler}"]
        KernelCompiler(sources).library()
    assert len(caplog.records) == 1


CHANGES = {
    "source": lambda sources, tools, patch: (sources / "two.c").write_text("int two(void) { return 3; }\n"),
    "header": lambda sources, tools, patch: (sources / "shared.h").open("a").write("// new\n"),
    "another source": lambda sources, tools, patch: (sources / "three.c").write_text("int three;\n"),
    "another header": lambda sources, tools, patch: (sources / "more.h").write_text("#define MORE\n"),
    "compiler": lambda sources, tools, patch: patch.setenv("CC", compiler_script(tools / "other", "")),
    "its version or the CPU": lambda sources, tools, patch: compiler_script(tools / "cc", 'set -- -DNEWER=1 "$@"'),
    "flags": lambda sources, tools, patch: patch.setattr(KernelCompiler, "FLAGS", (*KernelCompiler.FLAGS, "-DFAST")),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_the_library_changes_its_name(sources, cache, tmp_path, monkeypatch, change):
    monkeypatch.setenv("CC", compiler_script(tmp_path / "cc", ""))
    before = KernelCompiler(sources).library()
    change(sources, tmp_path, monkeypatch)
    after = KernelCompiler(sources).library()
    assert before != after and names_in(cache) == sorted([before.name, after.name])


def test_two_processes_that_compile_at_once_both_get_a_whole_library(sources, cache, tmp_path, monkeypatch):
    both = when_compiling(f"touch {tmp_path}/waits-$$; for i in $(seq 500); do "
                          f"set -- \"$@\"; [ $(ls {tmp_path} | grep -c waits-) = 2 ] && break; sleep 0.01; done")
    monkeypatch.setenv("CC", compiler_script(tmp_path / "cc", both))
    code = ("import ctypes, sys, pathlib, rustinfer\n"
            "path = rustinfer.KernelCompiler(pathlib.Path(sys.argv[1])).library()\n"
            "print(path, ctypes.CDLL(str(path)).one())")
    with ThreadPoolExecutor(2) as pool:
        printed = list(pool.map(lambda _: run_python(code, sources), range(2)))
    assert len(list(tmp_path.glob("waits-*"))) == 2
    [name] = names_in(cache)
    assert printed == [f"{cache / name} 1\n"] * 2


def test_compiler_is_the_first_of_cc_gcc_and_clang(sources, tmp_path, monkeypatch):
    real, path = need_compiler(), os.environ["PATH"]
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("clang", "gcc", "cc"):
        (tmp_path / name).write_text(f'#!/bin/sh\nPATH={path}\nexec {real} "$@"\n')
        (tmp_path / name).chmod(0o755)
        assert KernelCompiler(sources).compiler == str(tmp_path / name)


def test_description_names_compiler_and_vectors(sources):
    found = KernelCompiler(sources).description
    assert re.fullmatch(r"(gcc|clang) \d+\.\d+, (AMX|AVX-512|AVX2|NEON|no vectors)", found)


# -- not compiled


FAILURES = {
    "error": ("echo unknown option >&2; exit 1", "failed: unknown option"),
    "no words": ("exit 3", "failed: 3"),
    "half a file": ('head -c 99 $0 > "$(echo "$*" | sed "s/.* -o //; s/ .*//")"; exit 1', "failed: 1"),
    "nothing written": ("exit 0", None),
    "other alphabet": (r"printf 'Fehler: ung\374ltig\n' >&2; exit 1", "failed: Fehler: ung"),
}


@pytest.mark.parametrize("lines, reason", FAILURES.values(), ids=FAILURES)
def test_failed_compilation_says_why_and_leaves_nothing(sources, cache, tmp_path, monkeypatch, lines, reason):
    monkeypatch.setenv("CC", compiler_script(tmp_path / "cc", when_compiling(lines)))
    with pytest.raises(KernelError, match=reason):
        KernelCompiler(sources).library()
    assert names_in(cache) == []


def test_compiler_that_never_ends_is_given_up(sources, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CC", compiler_script(tmp_path / "cc", when_compiling("exec sleep 20")))
    monkeypatch.setattr(KernelCompiler, "TIMEOUT", 0.3)
    with pytest.raises(KernelError, match=r"0\.3 s"):
        KernelCompiler(sources).library()
    assert names_in(cache) == []


def test_file_that_is_no_program_is_no_compiler(sources, tmp_path, monkeypatch):
    (tmp_path / "cc").write_bytes(b"\x7fELF")
    (tmp_path / "cc").chmod(0o755)
    monkeypatch.setenv("CC", str(tmp_path / "cc"))
    with pytest.raises(KernelError, match="format"):
        KernelCompiler(sources)


def test_signal_during_compilation_ends_the_server_and_leaves_nothing(cache, tmp_path):
    mark = tmp_path / "compiles"
    compiler = compiler_script(tmp_path / "cc", when_compiling(f"touch {mark}; exec sleep 20"))
    with ServerProcess("--device", "cpu", model=TINY, env={"CC": compiler}, wait=False) as server:
        wait_for(mark.exists)
        assert server.stop(timeout=5) == 0
    assert names_in(cache) == []


# -- the cache


def open_to_others(folder, patch):
    folder.mkdir(parents=True)
    folder.chmod(0o777)


def open_to_its_group(folder, patch):
    folder.mkdir(parents=True)
    folder.chmod(0o770)


def not_ours(folder, patch):
    folder.mkdir(parents=True)
    if os.getuid() == 0:
        os.chown(folder, 65534, -1)
    else:
        patch.setattr(os, "getuid", lambda mine=os.getuid(): mine + 1)


def unwritable(folder, patch):
    folder.mkdir(parents=True)
    folder.chmod(0o500)
    if os.getuid() == 0:  # who may write everywhere
        access = os.access
        patch.setattr(os, "access", lambda path, mode: Path(path) != folder and access(path, mode))


def a_file_in_its_place(folder, patch):
    folder.parent.mkdir()
    folder.touch()


def a_file_above_it(folder, patch):
    folder.parent.touch()


def no_home(folder, patch):
    """As in a container whose user has no entry in /etc/passwd."""
    import pwd

    def unknown(uid):
        raise KeyError(uid)

    for name in ("HOME", "XDG_CACHE_HOME"):
        patch.delenv(name, raising=False)
    patch.setattr(pwd, "getpwuid", unknown)


@pytest.mark.parametrize("make", [open_to_others, open_to_its_group, not_ours, unwritable, a_file_in_its_place,
                                  a_file_above_it, no_home])
def test_cache_that_is_not_ours_alone_is_not_used(sources, cache, monkeypatch, make):
    make(cache, monkeypatch)
    before = names_in(cache) if cache.is_dir() else None
    path = KernelCompiler(sources).library()
    monkeypatch.undo()
    assert path.is_file() and cache not in path.parents
    assert path.parent.stat().st_mode & 0o777 == 0o700 and path.parent.stat().st_uid == os.getuid()
    assert (names_in(cache) if cache.is_dir() else None) == before


def test_private_folder_is_one_for_the_process_and_ends_with_it(sources, cache):
    a_file_above_it(cache, None)
    code = """
import sys, pathlib, rustinfer
for _ in range(2):
    print(rustinfer.KernelCompiler(pathlib.Path(sys.argv[1])).library())
"""
    first, second = map(Path, run_python(code, sources).split())
    assert first == second and first.name.startswith("kernels-") and not first.parent.exists()


@pytest.mark.parametrize("empty", [False, True], ids=["not set", "set to nothing"])
def test_cache_is_in_the_home_folder_unless_named(sources, tmp_path, monkeypatch, empty):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "") if empty else monkeypatch.delenv("XDG_CACHE_HOME")
    before = os.umask(0)
    try:
        path = KernelCompiler(sources).library()
    finally:
        os.umask(before)
    assert path.parent == tmp_path / ".cache" / "rustinfer" and path.parent.stat().st_mode & 0o777 == 0o700


DAMAGES = {"emptied": lambda data: b"", "cut": lambda data: data[: len(data) // 2],
           "zeros at its end": lambda data: data[:8192].ljust(len(data), b"\0")}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_library_does_not_end_the_process(kernels, cache, damage):
    """As after a full disk or a power cut: it is compiled again, or NumPy answers and says why."""
    cache.mkdir(parents=True, mode=0o700)
    for whole in Path(kernels._name).parent.iterdir():
        (cache / whole.name).write_bytes(damage(whole.read_bytes()))
    backend, reason = json.loads(run_python("""
import json, sys, rustinfer
with rustinfer.LLM(sys.argv[1], device="cpu") as llm:
    print(json.dumps([llm.backend_name, llm.backend_reason]))
""", TINY))
    assert backend.startswith("C kernels") or (backend == "NumPy" and "no C kernels: " in reason)


def test_library_without_our_functions_is_refused_by_name(cache, tmp_path):
    other = KernelCompiler(write_files(tmp_path / "sources", {"other.c": "int other;"})).library()
    with pytest.raises(KernelError, match="team_create"):
        open_kernels(other)


@pytest.mark.parametrize("text", [None, "no library"], ids=["missing", "text"])
def test_file_that_is_no_library_is_refused_by_name(tmp_path, text):
    path = tmp_path / "kernels.so"
    if text:
        path.write_text(text)
    with pytest.raises(KernelError, match="kernels.so"):
        open_kernels(path)


# -- NumPy instead, and the reason


def here(patch, folder):
    """As if rustinfer.py lay in this folder."""
    patch.setattr(rustinfer, "HERE", folder)


def with_failing_compiler(patch, folder):
    patch.setenv("CC", compiler_script(folder / "cc", "echo out of order >&2; exit 1"))


def with_an_error_in_a_source(patch, folder):
    write_files(folder / "kernels", {"wrong.c": "#error seeded\n"})
    here(patch, folder)


def with_an_empty_path(patch, folder):
    patch.setenv("PATH", str(folder))


def with_no_sources(patch, folder):
    write_files(folder / "kernels", {"README.md": "No sources.\n"})
    here(patch, folder)


def with_no_folder_to_write_to(patch, folder):
    (folder / "file").touch()
    patch.setenv("XDG_CACHE_HOME", str(folder / "file"))
    patch.setattr(KernelCompiler, "_scratch", None)
    patch.setattr(tempfile, "tempdir", str(folder / "file"))


def with_a_missing_compiler(patch, folder):
    patch.setenv("CC", "no-such-cc")


REASONS = {
    "no such compiler": (with_a_missing_compiler, "there is no C compiler (CC=no-such-cc)"),
    "no compiler": (with_an_empty_path, "there is no C compiler (cc, gcc or clang)"),
    "failing compiler": (with_failing_compiler, "failed: out of order"),
    "error in a source": (with_an_error_in_a_source, "seeded"),
    "nowhere to write": (with_no_folder_to_write_to, "there is no place to keep them: "),
    "no folder": (here, "there is no folder kernels/ beside rustinfer.py"),
    "no sources": (with_no_sources, "kernels has no C files"),
}


@pytest.mark.parametrize("arrange, reason", REASONS.values(), ids=REASONS)
def test_numpy_answers_where_there_are_no_kernels_and_says_why(cache, tmp_path, monkeypatch, arrange, reason):
    arrange(monkeypatch, tmp_path)
    with LLM(TINY, device="cpu") as llm:
        assert llm.backend_name == "NumPy"
        assert llm.backend_reason.startswith("--device cpu; no C kernels: ") and reason in llm.backend_reason
        assert "\n" not in llm.backend_reason
        assert_answers_as_the_reference(llm)
    assert names_in(cache) == []


def test_kernels_switched_off_are_not_compiled(cache):
    with LLM(TINY, device="cpu", cpu_kernels="off") as llm:
        assert (llm.backend_name, llm.backend_reason) == ("NumPy", "--device cpu; no C kernels: --cpu-kernels off")
    assert not cache.exists()


MODEL = dataclasses.replace(ModelConfig.load(TINY), hidden_size=64, intermediate_size=96, num_attention_heads=4,
                            num_kv_heads=2, head_dim=16)


@pytest.mark.parametrize("changes, reason", [
    ({}, None), ({"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "head_dim": 8}, None),
    ({"head_dim": 256}, None), ({"vocab_size": 301}, None), ({"num_kv_heads": 1}, None),
    ({"hidden_size": 40}, "hidden_size is 40; the kernels need a multiple of 16"),
    ({"intermediate_size": 100}, "intermediate_size is 100; the kernels need a multiple of 16"),
    ({"num_attention_heads": 3, "num_kv_heads": 1, "head_dim": 8},
     "num_attention_heads * head_dim is 24; the kernels need a multiple of 16"),
    ({"head_dim": 20}, "head_dim is 20; the kernels need a multiple of 8"),
    ({"head_dim": 264}, "head_dim is 264; the kernels have at most 256")])
def test_widths_that_the_kernels_cannot_take_are_named(changes, reason):
    assert CpuBackend.why_not(dataclasses.replace(MODEL, **changes)) == reason


def test_model_of_odd_widths_is_answered_by_numpy(tmp_path, cache):
    folder = random_checkpoint(tmp_path / "model", hidden_size=40, num_attention_heads=2, intermediate_size=72)
    with LLM(folder, device="cpu") as llm:
        assert llm.backend_name == "NumPy" and "hidden_size is 40" in llm.backend_reason
        assert len(answers_of(llm)) == 16
    assert not cache.exists()


def hello_of(server):
    """The line that says what serves."""
    return server.process.stdout.readline()


def test_server_says_that_the_kernels_run():
    with ServerProcess("--device", "cpu", "--threads", "3", model=TINY) as server:
        assert re.search(r" on C kernels \((gcc|clang) .+, 3 threads\) \(--device cpu\), KV cache ", hello_of(server))
        assert server.chat(max_tokens=3)[0] == 200


def test_server_without_a_compiler_says_so_and_answers():
    with ServerProcess("--device", "cpu", model=TINY, env={"CC": "no-such-cc"}) as server:
        assert " on NumPy (--device cpu; no C kernels: there is no C compiler (CC=no-such-cc))" in hello_of(server)
        assert server.chat(max_tokens=3)[0] == 200


def test_lone_file_says_that_it_has_no_kernels(tmp_path):
    script = shutil.copy(ROOT / "rustinfer.py", tmp_path)
    with ServerProcess("--device", "cpu", model=TINY, script=script, cwd=tmp_path) as server:
        assert " on NumPy (--device cpu; no C kernels: there is no folder kernels/ beside " in hello_of(server)


def test_copied_file_compiles_the_kernels_beside_it(tmp_path):
    script = shutil.copy(ROOT / "rustinfer.py", tmp_path)
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    with ServerProcess("--device", "cpu", model=TINY, script=script, cwd=tmp_path) as server:
        assert " on C kernels (" in hello_of(server)


# -- the check at load


def changed_kernels(folder, name, old, new):
    """The project's kernels, with one line of one file replaced."""
    shutil.copytree(ROOT / "kernels", folder / "kernels")
    path = folder / "kernels" / name
    text = path.read_text()
    assert text.count(old) == 1, f"{name} has no such line, or several"
    path.write_text(text.replace(old, new))
    return folder / "kernels"


@pytest.fixture
def quick_compiler(monkeypatch):
    flags = tuple("-O1" if flag == "-O3" else flag for flag in KernelCompiler.FLAGS)
    monkeypatch.setattr(KernelCompiler, "FLAGS", flags)


@pytest.mark.parametrize("arithmetic", [FLOAT32, PAIRS, TILED])
@pytest.mark.parametrize("name", ["llama3-tied", "smollm2", "llama2-untied", "sharded-biased"])
def test_check_passes_the_kernels_for_every_model(kernels, name, arithmetic):
    check_kernels(kernels, EngineConfig(device="cpu"), ModelConfig.load(REFERENCES / name), arithmetic)


@pytest.mark.parametrize("arithmetic", [FLOAT32, PAIRS, TILED])
@pytest.mark.parametrize("block_size", [8, 16, 128])
def test_check_passes_the_kernels_at_a_large_models_widths(kernels, arithmetic, block_size):
    large = dataclasses.replace(MODEL, hidden_size=2048, num_attention_heads=32, num_kv_heads=8, head_dim=64,
                                intermediate_size=8192, vocab_size=128_256)
    check_kernels(kernels, EngineConfig(device="cpu", threads=2, block_size=block_size), large, arithmetic)


BUGS = {
    "rotation": ("llama.c", "low * cos[i] - high * sin[i]", "low * cos[i] + high * sin[i]"),
    "gate": ("llama.c", "(broadcast(1.0f) + exp_vec(-g))", "(broadcast(1.0f) + exp_vec(g))"),
    "value": ("llama.c", "(h * size + offset) * dim", "(h * size) * dim"),
    "bias": ("linear.c", "sums += *(const quad *)(p->bias + row)", "sums += 0 * *(const quad *)(p->bias + row)"),
    "second layer": ("llama.c", "a->values + i * a->layer_stride", "a->values"),
}


@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_check_refuses_kernels_with_wrong_arithmetic(cache, tmp_path, quick_compiler, bug):
    wrong = open_kernels(KernelCompiler(changed_kernels(tmp_path, *bug)).library())
    with pytest.raises(KernelError, match=r"differ from NumPy's by \d|bits depend on the tokens beside it"):
        check_kernels(wrong, EngineConfig(device="cpu"), MODEL, FLOAT32)


# The logits of several rows come out a little larger than those of one.
LEANING_HEAD = """
#include "llama.h"
void true_lm_head(Team *team, const Head *head);
void run_lm_head(Team *team, const Head *head) {
  true_lm_head(team, head);
  int64_t size = head->num_rows * head->head.weights[0].rows;
  for (int64_t i = 0; i < size; i++) head->logits[i] *= head->num_rows > 1 ? 1.000001f : 1.0f;
}
"""


@pytest.fixture(scope="module")
def leaning_folder(tmp_path_factory):
    folder = changed_kernels(tmp_path_factory.mktemp("leaning"), "llama.c", "void run_lm_head(", "void true_lm_head(")
    (folder / "lean.c").write_text(LEANING_HEAD)
    return folder


def test_check_refuses_kernels_whose_bits_depend_on_the_batch(leaning_folder, quick_compiler):
    wrong = open_kernels(KernelCompiler(leaning_folder).library())
    with pytest.raises(KernelError, match="a token's bits depend on the tokens beside it"):
        check_kernels(wrong, EngineConfig(device="cpu"), MODEL, FLOAT32)


def test_refused_kernels_leave_numpy_the_reason_and_no_thread(leaning_folder, quick_compiler, monkeypatch):
    here(monkeypatch, leaning_folder.parent)
    before = thread_ids()
    with LLM(TINY, device="cpu", threads=1) as llm:
        assert llm.backend_name == "NumPy"
        assert llm.backend_reason == "--device cpu; no C kernels: a token's bits depend on the tokens beside it"
        assert_answers_as_the_reference(llm)
    wait_for(lambda: not thread_ids() - before)


# -- weights


SHAPE = dict(seed=3, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_kv_heads=2, tied=False)


def give_odd_header(folder):
    """Move the weights of a model by one byte."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    path.write_bytes(struct.pack("<Q", size + 1) + data[8 : 8 + size] + b" " + data[8 + size :])


@pytest.fixture(scope="module", params=["bfloat16", "float16", "float32"])
def dtype_folder(request, tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp(request.param) / "model", dtype=request.param, **SHAPE)


@pytest.fixture(scope="module")
def mapped_answers(dtype_folder):
    with LLM(dtype_folder, device="cpu", threads=1) as llm:
        assert llm.backend_name.startswith("C kernels")
        return answers_of(llm)


def test_copied_weights_give_the_bits_of_mapped_ones(dtype_folder, mapped_answers):
    with LLM(dtype_folder, device="cpu", threads=2, weights="copy") as llm:
        assert llm.backend_name.startswith("C kernels") and answers_of(llm) == mapped_answers


@pytest.mark.parametrize("weights", ["mmap", "copy"])
def test_weights_behind_a_header_of_odd_length_give_the_same_bits(dtype_folder, mapped_answers, weights, tmp_path):
    odd = shutil.copytree(dtype_folder, tmp_path / "model")
    give_odd_header(odd)
    with LLM(odd, device="cpu", weights=weights) as llm:
        assert llm.backend_name.startswith("C kernels") and answers_of(llm) == mapped_answers


def test_every_dtype_gives_numpys_answers(dtype_folder):
    """Logprobs of about ten, whose float32 sums are taken in another order: they agree to a few parts in a million."""
    answers = {}
    for mode in ("float32", "off"):
        with LLM(dtype_folder, device="cpu", cpu_kernels=mode) as llm:
            assert (llm.backend_name == "NumPy") == (mode == "off")
            answers[mode] = answers_of(llm)
    found, expected = answers["float32"], answers["off"]
    assert [token_id for token_id, _ in found] == [token_id for token_id, _ in expected]
    near = pytest.approx([float.fromhex(bits) for _, bits in expected], abs=1e-4)
    assert [float.fromhex(bits) for _, bits in found] == near


def test_stacked_weights_of_several_files_are_read_where_they_lie():
    with LLM(REFERENCES / "sharded-biased", device="cpu", cpu_kernels="float32") as llm:
        assert llm.backend_name.startswith("C kernels")
        assert_answers_as_the_reference(llm, "sharded-biased")


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory):
    """A model whose weights outweigh everything else in the process."""
    return random_checkpoint(tmp_path_factory.mktemp("large") / "model", hidden_size=512, intermediate_size=2048,
                             num_layers=9, num_attention_heads=8, num_kv_heads=8, max_position_embeddings=512)


def anonymous_memory(folder, weights):
    """Bytes that a process takes for a model beyond its files, and the model's first answers."""
    return json.loads(run_python("""
import json, re, sys, rustinfer
sys.path.append("tests")
from test_cpu_backend import answers_of

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) << 10

before = anonymous()
options = {"kv_cache_memory": 4 << 20, "max_num_seqs": 2, "max_num_batched_tokens": 32}
with rustinfer.LLM(sys.argv[1], device="cpu", weights=sys.argv[2], **options) as llm:
    assert llm.backend_name.startswith("C kernels"), llm.backend_reason
    answers = answers_of(llm)
    print(json.dumps([anonymous() - before, answers]))
""", folder, weights))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_mapped_weights_take_no_memory_and_copied_ones_their_size(large_folder):
    size = (large_folder / "model.safetensors").stat().st_size
    assert 60e6 < size < 100e6
    mapped, answers = anonymous_memory(large_folder, "mmap")
    copied, same_answers = anonymous_memory(large_folder, "copy")
    assert answers == same_answers
    assert mapped < size / 8
    assert 0.95 * size < copied - mapped < 1.15 * size


def test_copies_are_whole_aligned_and_apart(monkeypatch):
    monkeypatch.setattr(HugePages, "ARENA", 1 << 20)
    pages, rng = HugePages(), np.random.default_rng(0)
    shapes = [(3, 5), (1,), (700, 300), (17, 64), (2000, 700), (1, 1)]  # the fifth is larger than an arena
    arrays = [rng.integers(0, 1 << 16, shape).astype(dtype) for shape in shapes for dtype in (np.uint16, np.float32)]
    copies = [pages.copy(array) for array in arrays]
    places = sorted((copy.ctypes.data, copy.ctypes.data + copy.nbytes) for copy in copies)
    assert all(stop <= start for (_, stop), (start, _) in zip(places, places[1:]))
    for array, copy in zip(arrays, copies):
        assert copy.ctypes.data % 64 == 0 and copy.dtype == array.dtype and (copy == array).all()


# -- threads


def test_as_many_threads_compute_as_were_asked_for(kernels):
    before = thread_ids()  # some of them may end during the test
    for wanted in (1, 2, 5, None):
        backend, _ = pick_backend(EngineConfig(device="cpu", threads=wanted), MODEL)
        assert backend.threads == (wanted or usable_cores())
        wait_for(lambda: len(thread_ids() - before) == backend.threads - 1)  # the caller computes too
        assert f", {backend.threads} thread" in backend.name
        backend.close()
        wait_for(lambda: not thread_ids() - before)


def test_closed_twice_is_closed_once(kernels):
    backend = CpuBackend(kernels, "", EngineConfig(device="cpu", threads=2))
    backend.close()
    backend.close()


def test_no_more_cores_are_used_than_affinity_allows():
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("threads cannot be bound to cores here")

    def bound():
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # this thread's alone
        return usable_cores()

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(bound).result() == 1
    assert 1 <= usable_cores() <= (psutil.cpu_count(logical=False) or os.cpu_count())


@pytest.mark.parametrize("quota, most", [("50000 100000", 1), ("100000 100000", 1), ("110000 100000", 2),
                                         ("max 100000", 1 << 20), ("", 1 << 20), ("a b c", 1 << 20)])
def test_no_more_cores_are_used_than_the_containers_quota_allows(monkeypatch, quota, most):
    files = {"cpu.max": "max 100000"}  # a test cannot set the quota of the group that it runs in
    monkeypatch.setattr(Path, "read_text", lambda path, *args, **options: files[path.name])
    own = usable_cores()
    files["cpu.max"] = quota
    assert usable_cores() == min(own, most)


@pytest.mark.parametrize("limit, used, left", [("1000000", "400000", 650_000), ("300000", "900000", 0),
                                               ("max", "400000", None), ("", "", None)])
def test_no_more_memory_is_taken_for_free_than_the_containers_limit_leaves(monkeypatch, limit, used, left):
    files = {"memory.max": limit, "memory.current": used, "memory.stat": "anon 350000\nfile 50000"}
    monkeypatch.setattr(Path, "read_text", lambda path, *args, **options: files[path.name])
    assert available_memory() == left if left is not None else available_memory() > 1 << 20


def test_opening_and_closing_leaves_no_thread_no_file_and_no_memory():
    def use(number):
        with LLM(TINY, device="cpu", threads=3, weights=("mmap", "copy")[number % 2]) as llm:
            answers_of(llm)

    for number in range(4):
        use(number)
    process = psutil.Process()
    threads, files, memory = thread_ids(), process.num_fds(), process.memory_info().rss
    for number in range(10):
        use(number)
    wait_for(lambda: not thread_ids() - threads)
    assert process.num_fds() <= files and process.memory_info().rss - memory < 4 << 20


def test_blas_has_one_thread_while_a_backend_lives_and_its_own_count_after():
    assert run_python("""
import pathlib, sys, threadpoolctl, rustinfer
blas = lambda: [pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]
threadpoolctl.threadpool_limits(limits=2)
before, model = blas(), rustinfer.ModelConfig.load(pathlib.Path(sys.argv[1]))
first, second = (rustinfer.pick_backend(rustinfer.EngineConfig(device="cpu"), model)[0] for _ in range(2))
assert isinstance(first, rustinfer.CpuBackend) and set(blas()) == {1}
first.close()
assert set(blas()) == {1}
second.close()
assert blas() == before, (blas(), before)
print("ok")
""", TINY) == "ok\n"


def test_backend_without_memory_for_its_team_lets_blas_go():
    before, without_memory = rustinfer.BlasThreads._holders, SimpleNamespace(team_create=lambda size: None)
    with pytest.raises(KernelError, match="memory"):
        CpuBackend(without_memory, "", EngineConfig(device="cpu"))
    assert rustinfer.BlasThreads._holders == before


# -- two at once


def test_two_models_in_one_process_keep_their_own_answers_and_threads():
    options = [dict(threads=1), dict(threads=3, weights="copy", block_size=32)]
    alone = []
    for folder, option in zip((TINY, REFERENCES / "smollm2"), options):
        with LLM(folder, device="cpu", **option) as llm:
            alone.append(answers_of(llm))
    with LLM(TINY, device="cpu", **options[0]) as first:
        with LLM(REFERENCES / "smollm2", device="cpu", **options[1]) as second, ThreadPoolExecutor(4) as pool:
            assert all(llm.backend_name.startswith("C kernels") for llm in (first, second))
            assert list(pool.map(answers_of, [first, second] * 6)) == alone * 6
        assert answers_of(first) == alone[0]  # with the other one closed
