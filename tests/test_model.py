"""Model: the reference's logits and greedy tokens, in any chunks, and rotary angles against their formula."""
import json
import math

import numpy as np
import pytest
from harness import REFERENCE_NAMES, REFERENCES, reference_answers
from make_references import LLAMA3_ROPE, random_checkpoint
from rustinfer import ArrayBackend, Batch, Checkpoint, Llama, ModelConfig, rope_tables

# Equal in exact arithmetic, the two sides sum in other orders. Over two layers float32 rounding (6e-8 a step) grows to
# some 1e-6 of the largest logit; 1e-4 leaves room for deeper models and other BLAS, and is far below any real mistake.
TOLERANCE = 1e-4
BLOCK_SIZE, MAX_LEN = 16, 256


class Runner:
    """One sequence on a model, with a cache whose unwritten places are NaN and whose blocks lie in disorder."""

    def __init__(self, folder):
        self.backend = ArrayBackend()
        self.model = Llama(ModelConfig.load(folder), self.backend, MAX_LEN, BLOCK_SIZE)
        self.model.load(Checkpoint(folder))
        self.table = np.random.default_rng(0).permutation(MAX_LEN // BLOCK_SIZE + 2)[: MAX_LEN // BLOCK_SIZE]
        self.restart()

    def restart(self):
        self.model.allocate_kv_cache(MAX_LEN // BLOCK_SIZE + 2)
        self.model.kv_cache[:] = np.nan
        self.length = 0

    def run(self, token_ids, wanted=None):
        """Append tokens to the sequence; logits (R, V) after those at the indices `wanted` (all)."""
        positions = np.arange(self.length, self.length + len(token_ids))
        slots = self.table[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
        wanted = np.arange(len(token_ids)) if wanted is None else np.array(wanted)
        self.length += len(token_ids)
        return self.model.run(Batch(np.array(token_ids), positions, slots, np.array([0, len(token_ids)]),
                                    self.table[None], wanted))

    def run_chunks(self, token_ids, chunk):
        """The logits after every token of a sequence that is fed in chunks from its beginning."""
        self.restart()
        return np.concatenate([self.run(token_ids[at : at + chunk]) for at in range(0, len(token_ids), chunk)])

    def greedy(self, prompt, count, chunk):
        """The likeliest `count` tokens after a prompt that is fed in chunks."""
        logits = self.run_chunks(prompt, chunk)
        output = [int(logits[-1].argmax())]
        while len(output) < count:
            output.append(int(self.run(output[-1:])[0].argmax()))
        return output


@pytest.fixture(scope="module", params=REFERENCE_NAMES)
def runner(request):
    runner = Runner(REFERENCES / request.param)
    runner.name = request.param
    yield runner
    runner.model.close()


def reference_runs(name):
    _, arrays = reference_answers(name)
    for i in range(3):
        yield tuple(arrays[f"{kind}_{i}"] for kind in ("prompt_token_ids", "output_token_ids", "positions", "logits"))


@pytest.mark.parametrize("chunk", [10_000, 7])
def test_greedy_tokens_equal_the_reference(runner, chunk):
    for prompt, output, _, _ in reference_runs(runner.name):
        assert runner.greedy(prompt, len(output), chunk) == output.tolist()


@pytest.mark.parametrize("chunk", [10_000, 7, 1])
def test_logits_are_the_reference_within_rounding(runner, chunk):
    for prompt, output, positions, expected in reference_runs(runner.name):
        logits = runner.run_chunks(np.concatenate((prompt, output)), chunk)
        assert logits.dtype == np.float32
        assert np.abs(logits[positions] - expected).max() <= TOLERANCE * np.abs(expected).max()


def test_chunks_change_no_bit(runner):
    prompt = max((prompt for prompt, *_ in reference_runs(runner.name)), key=len)
    found = [runner.run_chunks(prompt, chunk) for chunk in (len(prompt), 64, 7, 1)]
    assert all(np.array_equal(logits.view(np.uint32), found[0].view(np.uint32)) for logits in found)


def test_only_the_wanted_logits_are_computed(runner):
    prompt = next(reference_runs(runner.name))[0]
    runner.restart()
    everything = runner.run(prompt)
    runner.restart()
    assert np.array_equal(runner.run(prompt, [4, 1]), everything[[4, 1]])
    runner.restart()
    assert runner.run(prompt, np.empty(0, np.int64)).shape == (0, everything.shape[1])


def test_parameters_are_counted(runner):
    files = list((REFERENCES / runner.name).glob("*.safetensors"))
    width = {"smollm2": 4}.get(runner.name, 2)  # bytes a number
    headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in files)
    assert runner.model.num_parameters == (sum(path.stat().st_size for path in files) - headers) / width


def test_a_block_has_the_bytes_of_its_keys_and_values(runner):
    assert runner.model.kv_block_bytes() * (MAX_LEN // BLOCK_SIZE + 2) == runner.model.kv_cache.nbytes


# ---- rotary tables --------------------------------------------------------------------------------------------------


def load_config(tmp_path, **dims):
    return ModelConfig.load(random_checkpoint(tmp_path / "model", hidden_size=64, num_attention_heads=1, num_layers=1,
                                              **dims))


def frequencies(head_dim, theta, scaling):
    """The angle that each pair turns a position, in float64, by the text of the Llama 3.1 release."""
    for i in range(head_dim // 2):
        frequency = theta ** (-2 * i / head_dim)
        wavelength = 2 * math.pi / frequency
        if scaling.get("rope_type") == "linear":
            frequency /= scaling["factor"]
        elif scaling.get("rope_type") == "llama3":
            original, low, high = (scaling[f"{name}"] for name in (
                "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"))
            if wavelength > original / low:
                frequency /= scaling["factor"]
            elif wavelength > original / high:
                smooth = (original / wavelength - low) / (high - low)
                frequency = (1 - smooth) * frequency / scaling["factor"] + smooth * frequency
        yield frequency


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("scaling", [
    None, {"rope_type": "linear", "factor": 2.5}, LLAMA3_ROPE,
    dict(LLAMA3_ROPE, factor=32.0, original_max_position_embeddings=8192),
    dict(LLAMA3_ROPE, low_freq_factor=2, high_freq_factor=16)])
def test_rope_tables_equal_their_formula(tmp_path, theta, scaling):
    config = load_config(tmp_path, rope={"rope_theta": theta, "rope_scaling": scaling})
    cos, sin = rope_tables(config, 4096)
    expected = np.arange(4096)[:, None] * np.array(list(frequencies(64, theta, scaling or {})))
    assert cos.shape == sin.shape == (4096, 1, 32) and cos.dtype == sin.dtype == np.float32
    # An angle of up to 4095 radians in float32, its frequency a few roundings off, is off by some 4095 * 2^-22.
    assert np.abs(cos[:, 0] - np.cos(expected)).max() < 2e-3 and np.abs(sin[:, 0] - np.sin(expected)).max() < 2e-3
    assert np.abs(cos[:64, 0] - np.cos(expected[:64])).max() < 3e-5


def test_rope_tables_reach_past_the_original_context(tmp_path):
    config = load_config(tmp_path, rope={"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE})
    cos, _ = rope_tables(config, 8 * LLAMA3_ROPE["original_max_position_embeddings"])
    assert len(cos) == 2048 and np.isfinite(cos).all()


@pytest.mark.parametrize("rope", [
    {"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE}, {"rope_parameters": {**LLAMA3_ROPE, "rope_theta": 5e5}},
    {"rope_theta": 5e5,
     "rope_scaling": {"type": "llama3", **{k: v for k, v in LLAMA3_ROPE.items() if k != "rope_type"}}},
    {"rope_theta": 5e5, "rope_parameters": LLAMA3_ROPE}])
def test_spellings_of_rope_mean_the_same(tmp_path, rope):
    expected = rope_tables(load_config(tmp_path, rope={"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE}), 64)
    found = rope_tables(load_config(tmp_path, rope=rope), 64)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected))


# ---- live comparison ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [
    dict(hidden_size=56, intermediate_size=77, num_attention_heads=7, num_kv_heads=1, head_dim=10, num_layers=3,
         bias=True,
         tied=False, dtype="float16",
         rope={"rope_theta": 1e4, "rope_scaling": dict(LLAMA3_ROPE, original_max_position_embeddings=64)}),
    dict(hidden_size=36, intermediate_size=50, num_attention_heads=9, num_kv_heads=3, dtype="float32",
         rms_norm_eps=1e-3,
         rope={"rope_theta": 300.0, "rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    dict(hidden_size=32, intermediate_size=33, num_attention_heads=1, head_dim=128, shards=2, num_layers=1)])
def test_odd_dimensions_agree_with_transformers(tmp_path, dims):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import torch
    from make_references import load_model

    folder = random_checkpoint(tmp_path / "model", seed=5, **dims)
    tokens = np.random.default_rng(1).integers(0, json.loads((folder / "config.json").read_text())["vocab_size"], 200)
    with torch.no_grad():
        expected = load_model(folder)(torch.tensor(tokens[None])).logits[0].numpy()
    runner = Runner(folder)
    found = runner.run_chunks(tokens, 37)
    runner.model.close()
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()
