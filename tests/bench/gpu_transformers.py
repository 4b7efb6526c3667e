"""Decode with transformers, static cache and torch.compile: `python tests/bench/gpu_transformers.py FOLDER BATCH ...`.

Prints one JSON object a line for each batch; gpu.py runs it beside its own numbers.
"""
import json
import sys
import time

PROMPT, SHORT, LONG = 128, 8, 136  # tokens of the prompt; of the two answers whose difference is timed


def seconds(model, prompts, tokens: int) -> float:
    import torch

    torch.cuda.synchronize()
    started = time.perf_counter()
    model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=tokens, min_new_tokens=tokens,
                   do_sample=False, cache_implementation="static", pad_token_id=0)
    torch.cuda.synchronize()
    return time.perf_counter() - started


def decode_rate(model, batch: int) -> float:
    """Tokens a second in all; prefill, capture and warm-up are not part of it."""
    import torch

    prompts = torch.randint(0, model.config.vocab_size, (batch, PROMPT), device="cuda")
    for _ in range(2):
        seconds(model, prompts, LONG)
    times = sorted(seconds(model, prompts, LONG) - seconds(model, prompts, SHORT) for _ in range(3))
    return batch * (LONG - SHORT) / times[1]


def main() -> None:
    import torch
    import transformers

    folder, *batches = sys.argv[1:]
    if not torch.cuda.is_available():
        return print(json.dumps({"skipped": "torch sees no card"}))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).to("cuda", torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    if not hasattr(transformers, "CompileConfig"):  # where it exists, a static cache is compiled by generate, likewise
        model.forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
    print(json.dumps({"torch": torch.__version__, "transformers": transformers.__version__}), flush=True)
    for batch in map(int, batches):
        print(json.dumps({batch: {"tokens_per_s": decode_rate(model, batch)}}), flush=True)


if __name__ == "__main__":
    main()
