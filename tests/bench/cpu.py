"""The CPU beside its peers: `python tests/bench/cpu.py [--rounds N] [--llama-cpp DIR] [--json FILE] [--plot FILE]`.

Random checkpoints of the Llama-3.2-1B and SmolLM2-135M shapes. In each round, one after the other: rustinfer (weights
mapped and copied, with and without batch invariance, float32 activations, NumPy), transformers (torch, bfloat16) and
llama.cpp (BF16, F16 and, for orientation, Q8_0), each in a process of its own with two threads, between two readings of
the memory's bandwidth: time to load, decoding 1, 8 and 32 sequences after prompts of 128 tokens, a prompt of 512,
memory. Medians over the rounds. rustinfer is measured through its engine, requests and sampling included.

Needs torch and transformers for the one, gguf and a folder with llama-batched-bench and llama-quantize for the other:
    pip download --no-deps --no-binary llama-cpp-python llama-cpp-python && tar xzf llama_cpp_python-*.tar.gz
    cd llama_cpp_python-*/vendor/llama.cpp
    cmake -B build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DLLAMA_CURL=OFF -DBUILD_SHARED_LIBS=OFF
    cmake --build build -j2 --target llama-batched-bench llama-quantize    # then --llama-cpp .../build/bin
"""
import argparse
import ctypes
import functools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

THREADS = 2
PROMPT, LONG_PROMPT = 128, 512
STEPS = {1: 48, 8: 24, 32: 12}  # decoded by each of so many sequences
SHAPES = {
    "1B": dict(hidden_size=2048, intermediate_size=8192, num_layers=16, num_attention_heads=32, num_kv_heads=8,
               vocab_size=128256, max_position_embeddings=131072,
               rope={"rope_theta": 500000.0, "rope_scaling": {
                   "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                   "original_max_position_embeddings": 8192, "rope_type": "llama3"}}),
    "135M": dict(hidden_size=576, intermediate_size=1536, num_layers=30, num_attention_heads=9, num_kv_heads=3,
                 vocab_size=49152, max_position_embeddings=8192, rope={"rope_theta": 100000.0}),
}
OURS = {"mmap": {}, "copy": {"weights": "copy"}, "copy, not invariant": {"weights": "copy", "no_batch_invariant": True},
        "copy, float32": {"weights": "copy", "cpu_kernels": "float32"}, "NumPy": {"cpu_kernels": "off"}}
FORMATS = ("BF16", "F16", "Q8_0")


# -- in a process of its own


def anonymous_bytes():
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@functools.cache
def reader():
    """read.c."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "read.so"
        flags = ("-O3", "-march=native", "-shared", "-fPIC", "-pthread")
        subprocess.run(["cc", *flags, str(HERE / "read.c"), "-o", str(path)], check=True)
        library = ctypes.CDLL(str(path))
    library.read_bandwidth.restype = library.read_regions.restype = ctypes.c_double
    library.read_bandwidth.argtypes = (ctypes.c_int64, ctypes.c_int, ctypes.c_int)
    library.read_regions.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int)
    return library


def read_bandwidth():
    """Bytes a second, the best of five readings of 1 GiB."""
    return reader().read_bandwidth(1 << 30, THREADS, 5)


def run_ours(folder, options):
    """rustinfer through its engine."""
    import numpy as np

    import rustinfer

    params = lambda tokens: rustinfer.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    started = time.perf_counter()
    llm = rustinfer.LLM(folder, device="cpu", threads=THREADS, max_model_len=2048, kv_cache_memory="1GiB", **options)
    result = {"load_s": time.perf_counter() - started, "backend": llm.backend_name}

    def decode(num_seqs, tokens):
        prompts = [[300 + number, *range(20, 20 + PROMPT)] for number in range(num_seqs)]
        for prompt in prompts:  # then the prefix cache has all but the last token, and all begin in one step
            list(llm.engine.submit(prompt, params(1)))
        handles = [llm.engine.submit(prompt, params(tokens)) for prompt in prompts]
        for handle in handles:
            while not handle.exhausted:
                handle.take(at_least=tokens)
        seconds = max(h.timing.finished for h in handles) - max(h.timing.first_token for h in handles)
        return num_seqs * (tokens - 1) / seconds

    def prefill(first):
        handle = llm.engine.submit([first, *range(1000, 1000 + LONG_PROMPT - 1)], params(1))
        list(handle)
        return LONG_PROMPT / handle.timing.ttft_s

    def share_of_bandwidth():
        """Of one sequence, against reading the same weights just before and after: both change by the moment."""
        model = llm.engine.model
        stacks = [model.head, *(getattr(layer, name) for layer in model.layers
                                for name in ("qkv", "output", "gate_up", "down"))]
        regions = np.array([(t.ctypes.data, t.nbytes) for stack in stacks for t in stack.tensors], np.int64)
        read = lambda: reader().read_regions(regions.ctypes.data, len(regions), THREADS, 1)
        turns = [(read(), decode(1, 17), read()) for _ in range(9)]
        size = regions[:, 1].sum()
        return statistics.median(2 * tokens * size / (before + after) for before, tokens, after in turns)

    with llm:
        is_slow = options.get("cpu_kernels") == "off"
        decode(1, 4)
        for num_seqs, steps in {1: 8}.items() if is_slow else STEPS.items():
            result[f"decode_{num_seqs}"] = decode(num_seqs, steps + 1)
        result["prefill"] = statistics.median(prefill(first) for first in range(5, 6 if is_slow else 8))
        result["anonymous_bytes"] = anonymous_bytes()
        if not is_slow:
            result["of_weights_bandwidth"] = share_of_bandwidth()
    return result


def run_transformers(folder, _):
    import torch
    import transformers

    torch.set_num_threads(THREADS)
    started = time.perf_counter()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    result = {"load_s": time.perf_counter() - started, "backend": f"torch {torch.__version__}"}

    def forward(ids, cache=None):
        out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values

    def decode(batch, steps):
        ids, cache = forward(torch.randint(0, 1000, (batch, PROMPT)))
        started = time.perf_counter()
        for _ in range(steps):
            ids, cache = forward(ids, cache)
        return batch * steps / (time.perf_counter() - started)

    def prefill():
        started = time.perf_counter()
        forward(torch.randint(0, 1000, (1, LONG_PROMPT)))
        return LONG_PROMPT / (time.perf_counter() - started)

    with torch.inference_mode():
        decode(1, 4)
        for batch, steps in STEPS.items():
            result[f"decode_{batch}"] = decode(batch, steps)
        result["prefill"] = statistics.median(prefill() for _ in range(3))
    return {**result, "anonymous_bytes": anonymous_bytes()}


def worker(kind, folder, options):
    print(json.dumps({"ours": run_ours, "transformers": run_transformers}[kind](folder, json.loads(options))))


# -- the others


def run_worker(kind, folder, options):
    done = subprocess.run([sys.executable, __file__, "--worker", kind, str(folder), json.dumps(options)],
                          stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def run_llama_cpp(tools, path):
    def bench(*arguments):
        done = subprocess.run([tools / "llama-batched-bench", "-m", path, "-t", str(THREADS), "-tb", str(THREADS), "-c",
                               "8192", "-b", "2048", "-ub", "512", "--output-format", "jsonl", *map(str, arguments)],
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]

    result = {"backend": path.name}
    for batch, steps in STEPS.items():
        result[f"decode_{batch}"] = bench("-npp", PROMPT, "-ntg", steps, "-npl", batch)[0]["speed_tg"]
    result["prefill"] = bench("-npp", LONG_PROMPT, "-ntg", 1, "-npl", 1)[0]["speed_pp"]
    return result


def write_gguf(folder, path):
    """The checkpoint as GGUF in BF16, with a vocabulary of made-up tokens."""
    import gguf
    import numpy as np

    import rustinfer

    config, checkpoint = rustinfer.ModelConfig.load(folder), rustinfer.Checkpoint(folder)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(8192)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    characters = [*rustinfer.BYTES_OF_UNICODE]
    made_up = [f"token{number}" for number in range(config.vocab_size - len(characters) - 2)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(characters + made_up + ["<s>", "</s>"])
    writer.add_token_types([1] * (config.vocab_size - 2) + [3, 3])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(config.vocab_size - 2)
    writer.add_eos_token_id(config.vocab_size - 1)
    c, q, kv, f = (config.hidden_size, config.num_attention_heads * config.head_dim,
                   config.num_kv_heads * config.head_dim, config.intermediate_size)
    names = {"self_attn.q_proj": ("attn_q", (q, c)), "self_attn.k_proj": ("attn_k", (kv, c)),
             "self_attn.v_proj": ("attn_v", (kv, c)), "self_attn.o_proj": ("attn_output", (c, q)),
             "mlp.gate_proj": ("ffn_gate", (f, c)), "mlp.up_proj": ("ffn_up", (f, c)),
             "mlp.down_proj": ("ffn_down", (c, f)), "input_layernorm": ("attn_norm", (c,)),
             "post_attention_layernorm": ("ffn_norm", (c,))}
    tensors = {"token_embd": ("model.embed_tokens", (config.vocab_size, c)), "output_norm": ("model.norm", (c,))}
    tensors |= {f"blk.{layer}.{theirs}": (f"model.layers.{layer}.{ours}", shape)
                for layer in range(config.num_layers) for ours, (theirs, shape) in names.items()}
    for name, (ours, shape) in tensors.items():
        part = checkpoint.tensor(f"{ours}.weight", shape)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", part.to_float32())
        else:
            writer.add_tensor(f"{name}.weight", part.data.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def file_seconds(path):
    """To read a file that is in the page cache into memory of its own."""
    import numpy as np

    started = time.perf_counter()
    np.fromfile(path, np.uint8)
    return time.perf_counter() - started


# -- rounds


def contenders(folder, ggufs, tools, names):
    """{name: a function that measures it once}"""
    found = {name: lambda options=options: run_worker("ours", folder, options) for name, options in OURS.items()}
    found["transformers"] = lambda: run_worker("transformers", folder, {})
    for kind, path in ggufs.items():
        found[f"llama.cpp {kind}"] = lambda path=path: run_llama_cpp(tools, path)
    return {name: run for name, run in found.items() if not names or name in names}


def median_of(seen):
    """{figure: median}, text as it is."""
    return {key: statistics.median(one[key] for one in seen) if isinstance(value, (int, float)) else value
            for key, value in seen[0].items()}


def measure(shape, rounds, folder, tools, names):
    from make_references import random_checkpoint

    model = folder / shape
    if not (model / "config.json").exists():
        random_checkpoint(model, **SHAPES[shape])
    weights, ggufs = model / "model.safetensors", {}
    for kind in FORMATS if tools else ():
        ggufs[kind] = folder / f"{shape}-{kind}.gguf"
        if kind == "BF16" and not ggufs[kind].exists():
            write_gguf(model, ggufs[kind])
        elif not ggufs[kind].exists():
            quantize = [tools / "llama-quantize", ggufs["BF16"], ggufs[kind], kind]
            subprocess.run(quantize, check=True, capture_output=True)
    seen, bandwidths, readings = {}, {}, []
    for number in range(rounds):
        for name, run in contenders(model, ggufs, tools, names).items():
            before = read_bandwidth()
            seen.setdefault(name, []).append(run())
            bandwidths.setdefault(name, []).append(max(before, read_bandwidth()))
            one = seen[name][-1]
            print(f"{shape} round {number + 1}: {name}: {bandwidths[name][-1] / 1e9:.1f} GB/s, " + ", ".join(
                f"{key} {value:.4g}" for key, value in one.items() if isinstance(value, (int, float))),
                file=sys.stderr, flush=True)
        readings.append(file_seconds(weights))
    results = {name: median_of(values) for name, values in seen.items()}
    size = weights.stat().st_size
    for name, result in results.items():  # each round's rate against the readings beside it
        result["of_bandwidth"] = statistics.median(
            one["decode_1"] * size / bandwidth for one, bandwidth in zip(seen[name], bandwidths[name]))
    return {"bytes": size, "read_file_s": statistics.median(readings), "contenders": results,
            "bandwidth": statistics.median(sum(bandwidths.values(), []))}


COLUMNS = {"decode_1": "B = 1", "decode_8": "B = 8", "decode_32": "B = 32", "prefill": "prompt of 512"}


def rate(value):
    """A rate as it is shown: three digits, whole from 100 on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(shape, result):
    """The results as Markdown."""
    titles = " | ".join(COLUMNS.values())
    lines = [f"| {shape}, tokens/s | {titles} | B = 1 of the bandwidth | of its weights' | load, s | anonymous GB |",
             "|---" * (len(COLUMNS) + 5) + "|"]
    for name, one in result["contenders"].items():
        rates = " | ".join(rate(one[key]) if key in one else "" for key in COLUMNS)
        load = f"{one['load_s']:.2f}" if "load_s" in one else ""
        memory = f"{one['anonymous_bytes'] / 1e9:.2f}" if "anonymous_bytes" in one else ""
        own = f"{one['of_weights_bandwidth']:.0%}" if "of_weights_bandwidth" in one else ""
        lines.append(f"| {name} | {rates} | {one['of_bandwidth']:.0%} | {own} | {load} | {memory} |")
    return "\n".join(lines)


def draw_bars(axes, names, values, colours, title, first):
    """A contender a bar, with its number; the first of a row names them."""
    axes.bar_label(axes.barh(names, values, color=colours), labels=[f" {rate(value)}" for value in values])
    axes.set_title(title, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.invert_yaxis()
    axes.margins(x=0.3)
    if not first:
        axes.set_yticklabels([])


def plot(results, path):
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.fonttype"] = "none"  # letters stay letters
    figure = Figure(figsize=(10, 3 * len(results)), layout="constrained")
    for row, (shape, result) in zip(figure.subplots(len(results), len(COLUMNS), squeeze=False), results.items()):
        names = [name for name in result["contenders"] if name not in ("NumPy", "llama.cpp Q8_0")]
        for axes, (key, title) in zip(row, COLUMNS.items()):
            values = [result["contenders"][name][key] for name in names]
            colours = ["tab:blue" if name in OURS else "tab:grey" for name in names]
            shown = [f"rustinfer, {name}" if name in OURS else name for name in names]
            draw_bars(axes, shown, values, colours, f"{shape}: {title}", axes is row[0])
    figure.supxlabel("tokens per second")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def processor():
    match = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else None
    return match[1] if match else platform.processor()


def main():
    if sys.argv[1:2] == ["--worker"]:
        return worker(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="names of contenders")
    parser.add_argument("--llama-cpp", type=Path, help="folder with llama-batched-bench and llama-quantize")
    parser.add_argument("--folder", type=Path, help="where checkpoints are kept (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--plot", type=Path, help="draw them into this file (SVG or PNG)")
    args = parser.parse_args()
    for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):  # a setting for old libraries would slow NumPy down
        os.environ.pop(name, None)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        results = {shape: measure(shape, args.rounds, folder, args.llama_cpp, args.only) for shape in args.shapes}
    print(f"{processor()}, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}")
    for shape, result in results.items():
        print(f"\nbandwidth {result['bandwidth'] / 1e9:.1f} GB/s; the file is read in {result['read_file_s']:.2f} s\n")
        print(table(shape, result))
    if args.json:
        args.json.write_text(json.dumps({"processor": processor(), **results}, indent=2) + "\n", encoding="utf-8")
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
