"""The stages of gpu.py that measure: card, kernel_speed, decode, prefill, load, served, transformers.

A stage is a function of (card, left), as in gpu_checks.py. Times are seconds, rates bytes, FLOP or tokens a second;
`percent` is of the copy bandwidth or the matrix rate that the stage `card` measured, None where it could not.
"""
from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
from gpu_card import Card, Loaded, check, num_cpus, nvidia_smi, percent, write_checkpoint
from harness import ServerProcess, chat_body

import rustinfer
from rustinfer import SamplingParams

ROWS = (1, 4, 8, 16, 32, 64, 128)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXTS = (128, 512, 1024, 8192)
BF16, FLOAT_SUMS = 14, 68  # CUDA_R_16BF of library_types.h, CUBLAS_COMPUTE_32F of cublas_api.h


# ------------------------------------------------------------------------------
# card

def copy_rate(card: Card) -> float:
    """Bytes a second that a copy within the card reads and writes."""
    size = 1 << (12 if card.dry else 30)
    target, source = (card.random((size // 2,), seed) for seed in (1, 2))

    def copy():
        if card.dry:
            target[...] = source
        else:  # 3: from the card to the card
            card.cupy.cuda.runtime.memcpyAsync(target.data.ptr, source.data.ptr, size, 3, card.stream.ptr)

    return 2 * size / card.seconds(copy)


def read_rate(card: Card) -> float:
    """Bytes a second that a kernel reads which does nothing else."""
    size = 1 << (12 if card.dry else 30)
    source, out = card.random((size // 2,)), card.cupy.zeros((1,), np.uint32)
    return size / card.seconds(lambda: card.launch("read_all", size // 16, out, source, np.uint64(size // 16)))


def matrix_rate(card: Card) -> float:
    """FLOP/s of cuBLAS on square bf16 matrices with float32 sums."""
    cupy, n = card.cupy, 64 if card.dry else 8192
    a, b, c = (card.random((n, n), seed) for seed in range(3))
    one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)
    handle = None if card.dry else cupy.cuda.device.get_cublas_handle()

    def multiply():
        if card.dry:
            return a.astype(np.float32) @ b.astype(np.float32)
        with card.stream:
            cupy.cuda.cublas.gemmEx(handle, 1, 0, n, n, n, one.ctypes.data, a.data.ptr, BF16, n, b.data.ptr, BF16, n,
                                    zero.ctypes.data, c.data.ptr, BF16, n, FLOAT_SUMS, -1)

    return 2 * n**3 / card.seconds(multiply)


def stage_card(card: Card, left) -> dict:
    """What card it is, and what it can do at best."""
    runtime, device = card.cupy.cuda.runtime, card.cupy.cuda.Device()
    facts = {"python": platform.python_version(), "numpy": np.__version__, "cpus": num_cpus(),
             "multiprocessors": device.attributes["MultiProcessorCount"],
             "compute_capability": device.compute_capability, "memory_bytes": runtime.memGetInfo()[1],
             "l2_bytes": device.attributes.get("L2CacheSize")}
    if not card.dry:
        name = runtime.getDeviceProperties(device.id)["name"]
        facts |= {"name": name.decode() if isinstance(name, bytes) else name, "cupy": card.cupy.__version__,
                  "cuda_runtime": runtime.runtimeGetVersion(), "cuda_driver": runtime.driverGetVersion(),
                  "nvrtc": ".".join(map(str, card.cupy.cuda.nvrtc.getVersion()))}
    facts |= nvidia_smi("driver_version", "clocks.max.sm", "clocks.max.mem", "clocks.sm", "power.limit",
                        "ecc.mode.current")
    card.copy_rate = facts["copy_bytes_per_s"] = copy_rate(card)
    facts["read_bytes_per_s"] = read_rate(card)
    try:
        card.matrix_rate = facts["matrix_flops_per_s"] = matrix_rate(card)
    except Exception as error:  # there may be no cuBLAS; percentages of it are then None
        facts["matrix_error"] = repr(error)
    if not card.dry:
        card.cupy.get_default_memory_pool().free_all_blocks()
    return facts


# ------------------------------------------------------------------------------
# kernel_speed

class OpTimes:
    """Times of the ops of one model: graphs of many launches, each on another layer's weights and cache."""

    def __init__(self, card: Card, loaded: Loaded):
        self.card, self.loaded, self.model, self.ops = card, loaded, loaded.model, loaded.backend
        self.c, self.buffers = loaded.model.config, loaded.backend.buffers
        for name in ("normed", "q", "attended", "h"):
            card.fill(getattr(self.buffers, name))
        self.x = card.cupy.asarray(np.random.default_rng(0).standard_normal(self.buffers.x.shape, np.float32))
        places = np.arange(self.ops.max_tokens, dtype=np.int32)
        self.places = card.cupy.asarray(places % min(self.loaded.max_model_len, 16 * self.loaded.num_blocks))
        self.caches = list(self.model.kv_cache.swapaxes(0, 1))
        self.set_tables()

    def set_tables(self) -> None:
        """Every seat has the blocks of the longest sequence as far as the cache has them; seats may share some."""
        state, per_seat = self.ops.state, self.ops.max_blocks
        for seat in range(self.loaded.config.max_num_seqs):
            blocks = (np.arange(per_seat) + seat * per_seat) % self.loaded.num_blocks
            self.ops.patch_state(state.patch("block_tables", seat, blocks.tolist()))
        self.seats = self.card.cupy.asarray(np.arange(self.loaded.config.max_num_seqs, dtype=np.int32))

    def products(self, tokens: int) -> dict:
        """{op: (the launch of each layer, bytes, FLOP)}; a norm is part of its op."""
        c, b, ops, layers = self.c, self.buffers, self.ops, self.model.layers
        step = ops.prepare(ops.decode_step(min(tokens, self.loaded.config.max_num_seqs)))
        step.num_tokens = tokens
        width, heads = c.hidden_size, (c.num_attention_heads + 2 * c.num_kv_heads) * c.head_dim
        query, inner = c.num_attention_heads * c.head_dim, c.intermediate_size
        b.x[...], b.positions[...], b.slot_mapping[...] = self.x, self.places, self.places
        # Rows and columns of the weight, and bytes of the input and output of a token.
        sizes = {"qkv_rope": (heads, width, 4 * width + 2 * heads), "output": (width, query, 2 * query + 8 * width),
                 "gate_up": (2 * inner, width, 4 * width + 2 * inner), "down": (width, inner, 2 * inner + 8 * width)}
        launches = {
            "qkv_rope": [lambda a=a: ops.qkv_rope(b.x, *a, step) for a in zip(layers, self.caches)],
            "output": [lambda w=layer.output: ops.add_linear(b.x, b.attended, w, None) for layer in layers],
            "gate_up": [lambda layer=layer: ops.gate_up(b.x, layer) for layer in layers],
            "down": [lambda w=layer.down: ops.add_linear(b.x, b.h, w, None) for layer in layers]}
        if tokens <= self.loaded.config.max_num_seqs:
            sizes["lm_head"] = c.vocab_size, width, 4 * width + 4 * c.vocab_size
            launches["lm_head"] = [lambda: ops.lm_head(b.x, self.model.norm, self.model.head, step)]
        return {op: (launches[op], 2 * n * k + tokens * each, 2 * n * k * tokens) for op, (n, k, each) in sizes.items()}

    def entry(self, seconds: float, size: float, flops: float, matrix: bool) -> dict:
        """percent: of the matrix rate, or of the copy bandwidth."""
        part, whole = (flops, self.card.matrix_rate) if matrix else (size, self.card.copy_rate)
        return {"seconds": seconds, "bytes_per_s": size / seconds, "flops_per_s": flops / seconds,
                "percent": percent(part / seconds, whole)}

    def of_products(self, tokens: int, matrix: bool) -> dict:
        found = {}
        for op, (launches, size, flops) in self.products(tokens).items():
            seconds = self.card.captured_seconds(self.ops, launches * (1 if matrix else 3))
            found[op] = self.entry(seconds, size, flops, matrix)
            self.buffers.x[...] = self.x  # add_linear has added to it again and again
        return found

    def of_decode_attention(self, tokens: int, context: int) -> dict:
        """Launches go through layers and groups of seats, so that most of what they read is not in L2."""
        ops, b, step = self.ops, self.buffers, self.ops.decode_step(tokens)
        b.positions.fill(context - 1)
        groups = [self.seats[at : at + tokens] for at in range(0, len(self.seats) - tokens + 1, tokens)]
        launches = []
        for seats in groups[: max(1, 32 // tokens)]:
            own = dataclasses.replace(step, seats=seats, row_seats=seats)
            launches += [lambda cache=cache, own=own: ops.attention(b.q, cache, own) for cache in self.caches]
        seconds = self.card.captured_seconds(ops, launches)
        size, flops = (tokens * context * 4 * heads * self.c.head_dim for heads in (
            self.c.num_kv_heads, self.c.num_attention_heads))
        return self.entry(seconds, size, flops, False)

    def of_prefill_attention(self, tokens: int) -> dict:
        ops, b, piece = self.ops, self.buffers, self.ops.tokens_per_tile
        tiles = [(at, min(piece, tokens - at)) for at in range(0, tokens, piece)]
        step = ops.mixed_step([(0, place, 0) for place in range(tokens)], 0, tiles, [0])
        b.positions[...] = self.places
        launches = [lambda cache=cache: ops.attention(b.q, cache, step) for cache in self.caches]
        seconds = self.card.captured_seconds(ops, launches)
        return self.entry(seconds, 4 * tokens * self.c.num_kv_heads * self.c.head_dim,
                          2 * tokens**2 * self.c.num_attention_heads * self.c.head_dim, True)

    def of_sampling(self, rows: int) -> dict:
        """Seconds to draw a token for each row, by what is asked for."""
        ops, runner, found = self.ops, self.loaded.runner, {}
        logits = 3 * np.random.default_rng(0).standard_normal((rows, self.c.vocab_size), np.float32)
        self.buffers.logits[:rows].set(logits, stream=ops.stream)
        self.buffers.positions.fill(20)
        half = rustinfer.pack_bits(np.arange(self.c.vocab_size) % 2 == 0)
        ops.masks.send(dict.fromkeys(range(rows), half))
        kinds = {"greedy": dict(temperature=0.0), "drawn": {}, "masked": {}, "top-p": dict(top_p=0.9),
                 "top-k": dict(top_k=50), "logprobs": dict(temperature=0.0, logprobs=5)}
        for kind, options in kinds.items():
            for row in range(rows):
                params = SamplingParams(seed=row, **dict(temperature=1.0) | options)
                runner._introduce(rustinfer.Sequence(row, [1, 2, 3], params, row), row)
                runner._patches += ops.state.patch("row_seats", row, [row])
                runner._patches += ops.state.patch("ints", row, [kind == "masked"], runner.MASK_COLUMN)
                runner._row_seats[row] = row
            runner._send_patches()
            step = ops.prepare(ops.decode_step(rows))
            found[kind] = self.card.captured_seconds(ops, [lambda: ops.sample(step)] * 16)
        return found


def stage_kernel_speed(card: Card, left) -> dict:
    """Every op at the sizes of two models, by bytes where it decodes and by FLOP where it computes a prompt."""
    results = {}
    for name in card.only_real(("1B", "8B"), ("1B",)):
        if left() < 25 and results:
            results[name] = "skipped: out of time"
            continue
        loaded = card.open(name)
        with loaded.use():
            times = OpTimes(card, loaded)
            results[name] = found = {"decode": {}, "prefill": {}, "attention_decode": {}, "sample": {}}
            for tokens in card.only_real(ROWS, (1, 3)):
                found["decode"][tokens] = times.of_products(tokens, matrix=False)
            for tokens in card.only_real((512, 2048), (20,)):
                found["prefill"][tokens] = times.of_products(tokens, matrix=True)
                found["prefill"][tokens]["attention"] = times.of_prefill_attention(tokens)
            for context in card.only_real((128, 1024, 8192), (40,)):
                found["attention_decode"][context] = {tokens: times.of_decode_attention(tokens, context)
                                                      for tokens in card.only_real((1, 8, 32), (1, 2))}
            for rows in card.only_real((1, 64), (2,)):
                found["sample"][rows] = times.of_sampling(rows)
    return results


# ------------------------------------------------------------------------------
# decode

class Replays:
    """Decode steps of fabricated sequences: seats, tables and positions as if their prompts had been computed."""

    STEPS = 16  # a round; contexts grow by that much

    def __init__(self, card: Card, loaded: Loaded):
        self.card, self.loaded, self.ops = card, loaded, loaded.backend
        self.steps = self.STEPS if not card.dry else 2

    def fits(self, batch: int, context: int) -> bool:
        blocks = -(-(context + self.steps + 1) // 16)
        return (batch <= self.loaded.config.max_num_seqs and batch * blocks <= self.loaded.num_blocks
                and blocks <= self.ops.max_blocks)

    def seat(self, batch: int, context: int) -> list:
        """Seats 0.. with blocks of their own, greedy, about to compute their token number `context`."""
        runner, state, per_seat = self.loaded.runner, self.ops.state, -(-(context + self.steps + 1) // 16)
        seats = []
        for index in range(batch):
            seq = rustinfer.Sequence(index, [index % 100 + 1], SamplingParams(temperature=0), index)
            runner._introduce(seq, index)
            blocks = range(index * per_seat, (index + 1) * per_seat)
            runner._patches += state.patch("block_tables", index, blocks)
            runner._patches += state.patch("last_token", index, [index % 100 + 1])
            seats.append(rustinfer.Seat(index, 0, per_seat, context))
        self.place(batch, context)
        return seats

    def place(self, batch: int, context: int) -> None:
        runner, state = self.loaded.runner, self.ops.state
        for index in range(batch):
            runner._patches += state.patch("next_position", index, [context])
        runner._send_patches()

    def step_seconds(self, batch: int, context: int) -> float:
        """Median time of one step on the card, of rounds of STEPS around the context, one launched behind the other."""
        runner, first, times = self.loaded.runner, context - self.steps // 2, []
        seats = self.seat(batch, first)

        def launch():
            for _ in range(self.steps):
                runner._launch_decode(seats)

        for _ in range(2 if self.card.dry else 6):
            self.place(batch, first)
            self.ops.stream.synchronize()
            times.append(self.card.elapsed(launch, self.ops.stream) / self.steps)
        return statistics.median(times[1:])

    def row(self, batch: int, context: int) -> dict:
        seconds, floor = self.step_seconds(batch, context), self.loaded.floor_bytes(batch, context)
        return {"seconds": seconds, "tokens_per_s": batch / seconds, "floor_bytes": floor,
                "percent": percent(floor / seconds, self.card.copy_rate)}

    def launches(self, batch: int) -> dict:
        """Kernels of a step, and how long the host takes to launch one."""
        launch, count = self.ops._launch, 0

        def counting(*args, **options):
            nonlocal count
            count += 1
            launch(*args, **options)

        self.ops._launch = counting
        try:
            started = time.perf_counter()
            self.loaded.runner._run(self.ops.decode_step(batch))
            seconds = time.perf_counter() - started
        finally:
            del self.ops._launch
        self.ops.stream.synchronize()
        return {"kernels": count, "host_seconds_per_kernel": seconds / count}


def engine_rate(loaded: Loaded, batch: int, context: int, tokens: int) -> float:
    """Tokens a second of `batch` sequences in the engine, from the first token of the last one on."""
    rng, vocab_size = np.random.default_rng(batch), loaded.model.config.vocab_size
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    prompts = rng.integers(0, vocab_size, (batch, context)).tolist()
    handles = [loaded.engine.submit(prompt, params) for prompt in prompts]
    for handle in handles:
        handle.take()
    started, already = time.monotonic(), sum(handle.seq.num_output_tokens for handle in handles)
    for handle in handles:
        while not handle.exhausted:
            handle.take(at_least=tokens)
    return (batch * tokens - already) / (max(handle.timing.finished for handle in handles) - started)


def stage_decode(card: Card, left) -> dict:
    """Steps of whole models by replay, with and without graphs and programmatic launch, and through the engine."""
    results = {}
    names = ("8B", "1B") if card.loaded and card.loaded.name == "8B" else ("1B", "8B")  # what is loaded comes first
    for name in card.only_real(names, ("1B",)):
        if left() < 25 and results:
            results[name] = "skipped: out of time"
            continue
        results[name] = decode_of_model(card, card.open(name), left if name == "1B" else lambda: left() - 45)
    return results


def decode_of_model(card: Card, loaded: Loaded, left) -> dict:
    replays, found = Replays(card, loaded), {"replayed": {}, "variants": {}, "engine": {}}
    engines = ((1, 128), (32, 512), (128, 512), (256, 128)) if loaded.name == "1B" else ((1, 128), (32, 512))
    with loaded.use():
        found["launches"] = replays.launches(1)
    for batch, context in card.only_real(engines, ((1, 128),)):
        if left() > 5 and replays.fits(batch, context + 128):
            found["engine"][f"{batch} at {context}"] = engine_row(card, loaded, batch, context)
    batches, contexts = card.only_real(BATCHES, (1, 3)), card.only_real(CONTEXTS, (128,))
    with loaded.use():
        for context in contexts:
            rows = found["replayed"][context] = {}
            for batch in batches:
                rows[batch] = replays.row(batch, context) if left() > 3 and replays.fits(batch, context) else None
    variants = {"graphs": {}, "eager": dict(eager=True), "no pdl": dict(programmatic=False),
                "no pdl, eager": dict(eager=True, programmatic=False)}
    for what, options in variants.items():
        if left() < 3:
            break
        with loaded.variant(**options) if options else contextlib.nullcontext(), loaded.use():
            sizes = card.only_real((1, 32), (1,))
            found["variants"][what] = {batch: replays.row(batch, contexts[0]) for batch in sizes}
    return found


def engine_row(card: Card, loaded: Loaded, batch: int, context: int) -> dict:
    """Through the engine, with prompts, scheduling and the reading of every token."""
    tokens = 128 if not card.dry else 24  # more than are there before the first is taken, on a busy machine too
    value = engine_rate(loaded, batch, context, tokens)
    floor = loaded.floor_bytes(batch, context + tokens / 2)
    return {"tokens_per_s": value, "seconds_per_step": batch / value,
            "percent": percent(value / batch * floor, card.copy_rate)}


# ------------------------------------------------------------------------------
# prefill

def prefill_seconds(card: Card, loaded: Loaded, tokens: int) -> float:
    """Time on the card to compute a prompt in one step, captured so that no launch is waited for."""
    ops, piece = loaded.backend, loaded.backend.tokens_per_tile
    with loaded.use():
        ops.patch_state(ops.state.patch("block_tables", 0, range(-(-tokens // 16))))
        ids = np.random.default_rng(tokens).integers(0, loaded.model.config.vocab_size, tokens).tolist()
        tiles = [(at, min(piece, tokens - at)) for at in range(0, tokens, piece)]
        step = ops.mixed_step([(token, place, 0) for place, token in enumerate(ids)], 0, tiles, [tokens - 1])
        return card.captured_seconds(ops, [lambda: loaded.model.run(step)], 5)


def stage_prefill(card: Card, left) -> dict:
    """Prompts through the engine and as bare steps."""
    loaded, results = card.open("1B"), {}
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    for tokens in card.only_real((512, 2048, 8192), (40,)):
        rng, waits = np.random.default_rng(tokens), []
        for _ in range(2 if card.dry else 6):
            handle = loaded.engine.submit(rng.integers(0, loaded.model.config.vocab_size, tokens).tolist(), params)
            list(handle)
            waits.append(handle.timing.ttft_s)
        wait, step = statistics.median(waits[1:]), prefill_seconds(card, loaded, tokens)
        flops = loaded.prefill_flops(tokens)
        results[tokens] = {
            "ttft_s": wait, "tokens_per_s": tokens / wait, "flops_per_s": flops / wait,
            "percent": percent(flops / wait, card.matrix_rate), "step_seconds": step,
            "step_percent": percent(flops / step, card.matrix_rate)}
    return results


# ------------------------------------------------------------------------------
# load, served

LOAD = """
import json
import time

started = time.monotonic()
import rustinfer

times, load = {"import_s": time.monotonic() - started}, rustinfer.Llama.load

def timed_load(model, *args):
    began = time.monotonic()
    load(model, *args)
    model.backend.stream.synchronize()
    times["load_s"] = time.monotonic() - began

rustinfer.Llama.load = timed_load
with rustinfer.LLM(sys.argv[1], device="cuda:0", max_model_len=256, max_num_seqs=4) as llm:
    times["ready_s"] = time.monotonic() - started
    llm.generate([[1, 2, 3]], max_tokens=2)
    times["first_answer_s"] = time.monotonic() - started
print(json.dumps(times))
"""


def stage_load(card: Card, left) -> dict:
    """A checkpoint in the page cache, until the process is ready; its kernels not compiled, then compiled."""

    card.close_model()
    folder, script = write_checkpoint(card, "1B"), card.script(LOAD)
    size = (folder / "model.safetensors").stat().st_size
    results = {"bytes": size}
    environment = {**os.environ, "CUPY_CACHE_DIR": str(card.folder / "cupy-cache")}
    for what in ("cold", "warm"):
        child = card.start(sys.executable, str(script), str(folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           env=environment)
        out, log = child.communicate(timeout=max(20, left()))
        check(child.returncode == 0, f"{what}: the process ended with {child.returncode}: {log[-1500:]}")
        results[what] = json.loads(out.splitlines()[-1])
        results[what]["upload_bytes_per_s"] = size / results[what]["load_s"]
    return results


class Stream(threading.Thread):
    """One chat request on a raw socket, read until [DONE]."""

    def __init__(self, port: int, body: bytes):
        super().__init__(daemon=True)
        self.port, self.body, self.tail, self.error = port, body, b"", None
        self.finished = 0.0

    def run(self) -> None:
        try:
            with socket.create_connection(("127.0.0.1", self.port), 120) as connection:
                head = (f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                        f"Content-Length: {len(self.body)}\r\nConnection: close\r\n\r\n")
                connection.sendall(head.encode() + self.body)
                while data := connection.recv(1 << 16):
                    self.tail = (self.tail + data)[-4096:]
            self.finished = time.monotonic()
        except OSError as error:
            self.error = error


def served_seconds(port: int, prompts: list[str], tokens: int) -> float:
    """Seconds until as many streams as prompts have ended, all begun at once."""
    bodies = [json.dumps(chat_body(prompt, stream=True, temperature=0, max_tokens=tokens, ignore_eos=True,
                                   stream_options={"include_usage": True})).encode() for prompt in prompts]
    streams, started = [Stream(port, body) for body in bodies], time.monotonic()
    for stream in streams:
        stream.start()
    for stream in streams:
        stream.join(180)
        check(b"[DONE]" in stream.tail and f'"completion_tokens":{tokens}'.encode() in stream.tail.replace(b": ", b":"),
              f"a stream broke off: {stream.error or stream.tail[-300:]}")
    return max(stream.finished for stream in streams) - started


def bare_seconds(llm: rustinfer.LLM, prompts: list[str], tokens: int) -> float:
    """The same requests without a server."""
    ids = [llm.template.encode([{"role": "user", "content": prompt}]) for prompt in prompts]
    params, started = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True), time.monotonic()
    handles = [llm.engine.submit(prompt, params) for prompt in ids]
    for handle in handles:
        while not handle.exhausted:
            handle.take(at_least=tokens)
    return max(handle.timing.finished for handle in handles) - started


def stage_served(card: Card, left) -> dict:
    """1, 8 and 64 streams over HTTP against the bare engine, in turns; both are on the card all the time."""
    card.close_model()
    folder, tokens = write_checkpoint(card, "1B"), 256 if not card.dry else 4
    counts = card.only_real((1, 8, 64), (2,))
    limits = dict(max_num_seqs=max(counts), max_model_len=1024 if not card.dry else 128,
                  kv_cache_memory="4GiB" if not card.dry else "1MiB")
    flags = [part for name, value in limits.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    script, results, number = card.script("import rustinfer; sys.exit(rustinfer.main())"), {}, 0
    with rustinfer.LLM(folder, device="cuda:0", **limits) as llm, ServerProcess(
            "--device", "cuda:0", *flags, model=folder, script=script, wait=False) as server:
        card.children.append(server.process)
        server.wait_ready(120)
        for count in counts:
            times = {"served": [], "bare": []}
            for _ in range(1 if card.dry else 4):
                prompts = [f"Question {number}, stream {stream}: what runs down to the sea?" for stream in range(count)]
                number += 1
                times["served"].append(served_seconds(server.port, prompts, tokens))
                times["bare"].append(bare_seconds(llm, prompts, tokens))
                if left() < 5:
                    break
            served, bare = (statistics.median(values[1:] or values) for values in times.values())
            results[count] = {"served_tokens_per_s": count * tokens / served,
                              "bare_tokens_per_s": count * tokens / bare, "percent": percent(bare, served)}
    return results


# ------------------------------------------------------------------------------
# transformers

def stage_transformers(card: Card, left) -> dict:
    """Tokens a second of transformers with a static cache and torch.compile on the same weights."""
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if card.dry or missing:
        return {"skipped": f"not installed: {', '.join(missing)}" if missing else "dry run"}
    card.close_model()
    script = Path(__file__).resolve().with_name("gpu_transformers.py")
    command = [sys.executable, str(script), str(write_checkpoint(card, "1B")), "1", "32"]
    child, results = card.start(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE), {}
    try:
        out, log = child.communicate(timeout=max(10, left()))
    except subprocess.TimeoutExpired:
        child.kill()
        out, log = child.communicate()
        results["error"] = "out of time"
    for line in out.splitlines():
        if line.startswith("{"):
            results |= json.loads(line)
    if child.returncode and "error" not in results:
        results["error"] = log[-1500:]
    return results
