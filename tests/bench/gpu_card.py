"""What the stages of gpu.py share: the card and its clock, random weights of real shapes, a model with its engine.

Everything runs on the stand-in for CuPy as well (`--dry-run`), with times that say nothing of a card.
"""
from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import make_references  # noqa: E402

import rustinfer  # noqa: E402
from rustinfer import CudaBackend, CudaRunner, EngineConfig, Llama, ModelConfig, RawTensor  # noqa: E402

SHAPES = {  # config.json of Llama-3.2-1B and Llama-3.1-8B, as far as sizes go
    "1B": dict(hidden_size=2048, intermediate_size=8192, num_layers=16, num_attention_heads=32, num_kv_heads=8,
               head_dim=64, vocab_size=128256, tied=True),
    "8B": dict(hidden_size=4096, intermediate_size=14336, num_layers=32, num_attention_heads=32, num_kv_heads=8,
               head_dim=128, vocab_size=128256, tied=False)}
TINY = dict(hidden_size=64, intermediate_size=96, num_layers=2, num_attention_heads=4, num_kv_heads=2, head_dim=32,
            vocab_size=332, tied=True)  # every shape of a dry run
KERNELS = r"""
// Values of about N(0, sigma) in bf16: the sum of four random bytes of a hash (Wang 2007) of place and seed.
extern "C" __global__ void fill_random(unsigned short *out, unsigned long long count, unsigned seed, float sigma) {
  for (unsigned long long i = blockIdx.x * 256ull + threadIdx.x; i < count; i += gridDim.x * 256ull) {
    unsigned h = (unsigned)i ^ (unsigned)(i >> 32) * 0x85ebca6bu ^ seed;
    h = (h ^ 61u) ^ (h >> 16), h *= 9u, h ^= h >> 4, h *= 0x27d4eb2du, h ^= h >> 15, h *= 0x9e3779b1u, h ^= h >> 13;
    const int sum = (int)(h & 255) + (int)(h >> 8 & 255) + (int)(h >> 16 & 255) + (int)(h >> 24);
    out[i] = (unsigned short)(__float_as_uint((sum - 509.5f) * (sigma / 147.8f)) >> 16);
  }
}
extern "C" __global__ void read_all(unsigned *out, const uint4 *in, unsigned long long count) {
  unsigned found = 0;
  for (unsigned long long i = blockIdx.x * 256ull + threadIdx.x; i < count; i += gridDim.x * 256ull) {
    const uint4 v = in[i];
    found ^= v.x ^ v.y ^ v.z ^ v.w;
  }
  if (found == 0x9e3779b9u) *out = found;  // hardly ever, but the compiler cannot know
}
"""


class CheckError(Exception):
    """Something is not as it must be; the text says what and where."""


def check(holds: bool, what: str) -> None:
    if not holds:
        raise CheckError(what)


def percent(part: float | None, whole: float | None) -> float | None:
    return 100 * part / whole if part and whole else None


class Card:
    """The card: CuPy or its stand-in, random data, and times by events on one stream.

    copy_rate (bytes/s, read and written) and matrix_rate (FLOP/s) are filled in by the stage `card`; None: not known.
    """

    def __init__(self, dry: bool):
        self.dry = dry
        if dry:
            import cupy_cpu

            sys.modules["cupy"] = cupy_cpu
        import cupy

        self.cupy, self.copy_rate, self.matrix_rate = cupy, None, None
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self._module = cupy.RawModule(code=KERNELS, options=("-std=c++17",))
        self._kernel = functools.cache(self._module.get_function)
        self.loaded: Loaded | None = None
        self.folder = Path(tempfile.mkdtemp(prefix="rustinfer-gpu-"))
        self.children: list[subprocess.Popen] = []

    def shape(self, name: str) -> dict:
        return TINY if self.dry else SHAPES[name]

    def only_real(self, values: tuple, dry: tuple) -> tuple:
        """`values`, or in a dry run the few that the emulator has time for."""
        return dry if self.dry else values

    def launch(self, name: str, count: int, *args) -> None:
        """One of KERNELS over `count` elements."""
        blocks = min(-(-count // 256), 4 if self.dry else 4096)
        with self.stream:
            self._kernel(name)((blocks,), (256,), args)

    def fill(self, array, seed: int = 0, sigma: float = 1.0) -> None:
        """Random bf16 bits into a contiguous uint16 array; the stream is idle afterwards."""
        self.launch("fill_random", array.size, array, np.uint64(array.size), np.uint32(seed), np.float32(sigma))
        self.stream.synchronize()

    def random(self, shape: tuple[int, ...], seed: int = 0, sigma: float = 1.0):
        array = self.cupy.empty(shape, np.uint16)
        self.fill(array, seed, sigma)
        return array

    def elapsed(self, launch, stream) -> float:
        """Seconds of what `launch` puts on the stream, by events; it is done then."""
        if self.dry:
            started = time.perf_counter()
            launch()
            stream.synchronize()
            return time.perf_counter() - started
        start, stop = self.cupy.cuda.Event(), self.cupy.cuda.Event()
        start.record(stream)
        launch()
        stop.record(stream)
        stop.synchronize()
        return self.cupy.cuda.get_elapsed_time(start, stop) / 1000

    def seconds(self, launch, repeats: int = 20, stream=None) -> float:
        """Median time of what `launch` puts on the stream, after one launch that is not counted."""
        times = [self.elapsed(launch, stream or self.stream) for _ in range(2 if self.dry else repeats + 1)]
        return statistics.median(times[1:])

    def captured_seconds(self, backend: CudaBackend, works: list, repeats: int = 10) -> float:
        """Median time of one of `works` when a graph runs them one after the other, so that no launch is waited for."""
        def run_all():
            for work in works:
                work()

        run_all()  # kernels load at their first launch, which a graph cannot hold
        graph = backend.capture(run_all)
        return self.seconds(lambda: graph.launch(backend.stream), repeats, backend.stream) / len(works)

    def open(self, name: str) -> Loaded:
        """The model of that shape; one at a time is on the card."""
        if self.loaded is None or self.loaded.name != name:
            self.close_model()
            self.loaded = Loaded(self, name)
        return self.loaded

    def close_model(self) -> None:
        if self.loaded:
            self.loaded.close()
            self.loaded = None

    def is_lost(self) -> bool:
        """True when the context is broken: nothing more can run in this process."""
        try:
            self.cupy.asnumpy(self.cupy.zeros((1,), np.int32))
            self.stream.synchronize()
            return False
        except Exception:
            return True

    def start(self, *command: str, **options) -> subprocess.Popen:
        """A child process, which does not outlive this one."""
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, text=True, **options)
        self.children.append(child)
        return child

    def end_children(self) -> None:
        for child in self.children:
            if child.poll() is None:
                child.kill()

    def script(self, text: str) -> Path:
        """A program in a file that sees rustinfer, and in a dry run the stand-in."""
        head = [f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]!r}"]
        head += ["import cupy_cpu; sys.modules['cupy'] = cupy_cpu"] * self.dry
        path = self.folder / f"script{zlib.crc32(text.encode()):08x}.py"
        path.write_text("\n".join([*head, text]) + "\n", encoding="utf-8")
        return path

    def card_memory(self) -> int:
        """Bytes of the card that are in use, by anybody."""
        free, total = self.cupy.cuda.runtime.memGetInfo()
        return total - free


class RandomCheckpoint:
    """Weights that no file holds, about N(0, 0.02): what Llama.load asks of a Checkpoint."""

    POOL = (1 << 24) - 3  # values, used again and again; odd, so that no two rows of a weight are alike

    def __init__(self, pool: int = POOL):
        values = 0.02 * np.random.default_rng(0).standard_normal(pool, np.float32)
        self._pool = np.tile(rustinfer.to_bfloat16(RawTensor(values, "F32")), 2)

    def tensor(self, name: str, shape: tuple[int, ...]) -> RawTensor:
        half = len(self._pool) // 2
        start = zlib.crc32(name.encode()) % half
        data = np.resize(self._pool[start : start + half], shape)
        if len(shape) == 1:  # a norm: around 1
            data = rustinfer.to_bfloat16(RawTensor(1 + RawTensor(data, "BF16").to_float32(), "F32"))
        return RawTensor(data, "BF16")


def model_config(shape: dict, num_layers: int | None = None, max_position_embeddings: int = 131072) -> ModelConfig:
    sizes = {key: value for key, value in shape.items() if key != "tied"}
    return ModelConfig(**sizes | dict(num_layers=num_layers or shape["num_layers"]), rms_norm_eps=1e-5,
                       max_position_embeddings=max_position_embeddings, rope_theta=500000.0, rope_scaling=None,
                       tie_word_embeddings=shape["tied"], attention_bias=False, mlp_bias=False, eos_token_ids=())


@functools.cache
def random_weights(dry: bool) -> RandomCheckpoint:
    return RandomCheckpoint(*([4093] if dry else []))


def load_on_card(card: Card, config: EngineConfig, model: ModelConfig, max_model_len: int) -> Llama:
    """A Llama of random weights on the kernels, without a KV cache; raises CheckError where they are refused."""
    backend, reason = rustinfer.pick_backend(config, model)
    check(isinstance(backend, CudaBackend), f"the kernels were refused: {reason}")
    try:
        with backend.on_device(), backend.errors():
            llama = Llama(model, backend, max_model_len, config.block_size)
            llama.load(random_weights(card.dry))
            return llama
    except BaseException:
        backend.close()
        raise


def load_on_host(card: Card, model: ModelConfig, max_model_len: int, num_blocks: int) -> Llama:
    """The same weights in float32, computed by the array expressions on NumPy."""
    llama = Llama(model, rustinfer.ArrayBackend(np, batch_invariant=False), max_model_len, 16)
    llama.load(random_weights(card.dry))
    llama.allocate_kv_cache(num_blocks)
    return llama


def write_checkpoint(card: Card, name: str, num_layers: int | None = None) -> Path:
    """The random model of that shape as a folder, with a tokenizer; written once."""
    shape = card.shape(name)
    layers = num_layers or shape["num_layers"]
    folder = card.folder / f"{name}-{layers}"
    if folder.is_dir():
        return folder
    folder.mkdir()
    sizes = {key: value for key, value in shape.items() if key not in ("tied", "num_layers")}
    dims = make_references.Dims(**sizes, num_layers=layers, tied=shape["tied"], max_position_embeddings=4096)
    files = make_references.build_tokenizer(dims.tokenizer, dims.vocab_size, dims.chat_template)
    make_references.write_json(folder / "config.json", make_references.model_config(dims, files))
    make_references.write_json(folder / "generation_config.json", make_references.generation_config(files))
    make_references.write_json(folder / "tokenizer.json", files.tokenizer, indent=None)
    make_references.write_json(folder / "tokenizer_config.json", files.config)
    weights = random_weights(card.dry)
    tensors = {key: weights.tensor(key, size).data for key, size in make_references.tensor_shapes(dims).items()}
    make_references.write_safetensors(folder / "model.safetensors", tensors, "bfloat16")
    return folder


class Loaded:
    """A model with random weights and cache on the card, and its engine, which is idle while stages use the model."""

    LENGTH = 8192 + 512  # of the longest sequence

    def __init__(self, card: Card, name: str):
        self.card, self.name = card, name
        self.max_model_len = 512 if card.dry else self.LENGTH
        self.config = EngineConfig(device="cuda:0", max_num_seqs=4 if card.dry else 256, no_prefix_caching=True,
                                   max_num_batched_tokens=64 if card.dry else 8192, max_queue=4096)
        model = model_config(card.shape(name))
        started = time.monotonic()
        self.model = load_on_card(card, self.config, model, self.max_model_len)
        self.backend: CudaBackend = self.model.backend
        with self.use():
            self.num_blocks = rustinfer.count_kv_blocks(self.config, self.model, self.max_model_len)
            self.model.allocate_kv_cache(self.num_blocks)
            self.backend.stream.synchronize()
            card.fill(self.model.kv_cache)
            self.engine = rustinfer.Engine(self.model, self.config, self.num_blocks, ())
        self.seconds_to_load = time.monotonic() - started

    @contextlib.contextmanager
    def use(self):
        """For calls of the model from this thread, while the engine is idle."""
        with self.backend.on_device(), self.backend.errors():
            yield
            self.backend.stream.synchronize()
            self.count_draws()

    def count_draws(self) -> None:
        """Tell the runner which place of the ring is next: the stages draw without it."""
        self.runner._num_drawn = int(self.card.cupy.asnumpy(self.backend.buffers.ring)[0])

    @property
    def runner(self) -> CudaRunner:
        return self.engine._runner

    @contextlib.contextmanager
    def variant(self, *, eager: bool = False, programmatic: bool = True):
        """The engine with another runner: kernels launched one by one, or no programmatic dependent launch."""
        launcher = self.backend._launcher
        try:
            self.backend._launcher = launcher if programmatic else None
            self._renew_runner(enforce_eager=eager)
            yield
        finally:
            self.backend._launcher = launcher
            self._renew_runner()

    def _renew_runner(self, **options) -> None:
        self.engine._runner = None  # its graphs go before the new ones are captured
        self.engine._runner = CudaRunner(self.model, dataclasses.replace(self.config, **options))
        with self.use():
            pass

    def floor_bytes(self, batch: int, context: float) -> float:
        """What a decode step must read: every weight that it multiplies once, and the keys and values."""
        c = self.model.config
        table = 0 if c.tie_word_embeddings else c.vocab_size * c.hidden_size
        cache = 4 * c.num_layers * c.num_kv_heads * c.head_dim
        return 2 * (self.model.num_parameters - table) + batch * context * cache

    def prefill_flops(self, tokens: int) -> float:
        """Of the products of every token, of the last one's logits, and of causal attention."""
        c = self.model.config
        tables = c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2)
        attention = 2 * tokens**2 * c.num_layers * c.num_attention_heads * c.head_dim
        return 2 * tokens * (self.model.num_parameters - tables) + 2 * c.vocab_size * c.hidden_size + attention

    def close(self) -> None:
        self.engine.close()
        self.engine._runner = self.model = None


def nvidia_smi(*fields: str) -> dict[str, str]:
    """What nvidia-smi says of the first card, or nothing where there is none."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, map(str.strip, found.strip().split(","))))


def num_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def same_bits(found, expected) -> bool:
    """Bit for bit, of arrays on the card; NaN equals itself."""
    kind = {2: np.uint16, 4: np.uint32}[found.dtype.itemsize]
    return found.shape == expected.shape and bool((found.view(kind) == expected.view(kind)).all())


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    """The greatest difference over the greatest expected value; infinite where something is not finite."""
    if found.shape != expected.shape or not np.isfinite(found).all():
        return math.inf
    return float(np.abs(found - expected).max() / max(float(np.abs(expected).max()), 1e-30))


def from_bf16(bits) -> np.ndarray:
    return RawTensor(np.asarray(bits), "BF16").to_float32()


def round_bf16(values: np.ndarray) -> np.ndarray:
    return from_bf16(rustinfer.to_bfloat16(RawTensor(np.ascontiguousarray(values, np.float32), "F32")))
