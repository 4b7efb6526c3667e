"""The model on C kernels: the reference's tokens in float32; little beside it where activations are rounded."""
import random
import sys

import numpy as np
import pytest

import rustinfer
from harness import DEMO, REFERENCE_NAMES, REFERENCES, ROOT, need_compiler, reference_answers
from rustinfer import FLOAT32, PAIRS, TILED, Batch, Checkpoint, CpuBackend, EngineConfig, Llama, ModelConfig

MAX_LEN, BLOCK_SIZE = 2048, 16
TAKEN = [name for name in (*REFERENCE_NAMES, "demo")
         if not CpuBackend.why_not(ModelConfig.load(DEMO if name == "demo" else REFERENCES / name))]


class Runner:
    """A model on kernels of one arithmetic, with one sequence; the rest of its cache is NaN."""

    def __init__(self, kernels, folder, arithmetic):
        config = ModelConfig.load(folder)
        backend = CpuBackend(kernels, "test", EngineConfig(device="cpu", threads=2), arithmetic)
        self.model = Llama(config, backend, min(MAX_LEN, config.max_position_embeddings), BLOCK_SIZE)
        self.model.load(Checkpoint(folder))
        self.table = np.random.default_rng(0).permutation(MAX_LEN // BLOCK_SIZE + 2)[: MAX_LEN // BLOCK_SIZE]
        self.model.allocate_kv_cache(MAX_LEN // BLOCK_SIZE + 2)

    def run(self, token_ids, chunk=MAX_LEN):
        """The logits (T, V) after every token of a sequence that comes in chunks."""
        self.model.kv_cache[:] = np.nan
        logits = []
        for start in range(0, len(token_ids), chunk):
            piece = np.array(token_ids[start : start + chunk])
            at = np.arange(start, start + len(piece))
            slots = self.table[at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE
            batch = Batch(piece, at, slots, np.array([0, len(piece)]), self.table[None], at - start)
            logits.append(self.model.run(batch).copy())
        return np.concatenate(logits)


@pytest.fixture(scope="module")
def kernels():
    need_compiler()
    return rustinfer.open_kernels(rustinfer.KernelCompiler(ROOT / "kernels").library())


@pytest.fixture
def make(kernels):
    runners = []

    def make_runner(name, arithmetic):
        runners.append(Runner(kernels, DEMO if name == "demo" else REFERENCES / name, arithmetic))
        return runners[-1]

    yield make_runner
    for runner in runners:
        runner.model.close()


def test_some_reference_models_fit_the_kernels():
    assert {"demo", "llama3-tied"} <= set(TAKEN)


@pytest.mark.parametrize("chunk", [MAX_LEN, 7, 1])
@pytest.mark.parametrize("name", TAKEN)
def test_float32_kernels_give_the_references_tokens_and_logits(make, name, chunk):
    runner, (_, arrays) = make(name, FLOAT32), reference_answers(name)
    for i in range(3):
        prompt, output = arrays[f"prompt_token_ids_{i}"].tolist(), arrays[f"output_token_ids_{i}"].tolist()
        logits, expected = runner.run(prompt + output, chunk), arrays[f"logits_{i}"]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == output
        assert np.abs(logits[arrays[f"positions_{i}"]] - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("arithmetic", [FLOAT32, PAIRS, TILED])
@pytest.mark.parametrize("name", TAKEN)
def test_bits_do_not_depend_on_the_chunks(make, name, arithmetic):
    runner, (_, arrays) = make(name, arithmetic), reference_answers(name)
    tokens = [*arrays["prompt_token_ids_1"].tolist(), *arrays["output_token_ids_1"].tolist()]
    whole = runner.run(tokens)
    assert all((runner.run(tokens, chunk) == whole).all() for chunk in (1, 5, 16, 33))


def log_softmax(logits):
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def demo_texts(count):
    """Dialogues of the kind that the demo model was trained on, as token ids."""
    sys.path.insert(0, str(ROOT / "demo"))
    import dialogues

    tokenizer = rustinfer.Tokenizer(DEMO)
    texts = [dialogues.render(*dialogues.conversation(random.Random(seed))) for seed in range(count)]
    return [tokenizer.inner.encode(text, add_special_tokens=False).ids for text in texts]


@pytest.mark.parametrize("arithmetic", [PAIRS, TILED])
def test_rounded_activations_cost_next_to_nothing(make, arithmetic):
    """KL divergence from float32 of at most 1e-3 a token, and the same perplexity within 0.1 %."""
    exact, rounded = make("demo", FLOAT32), make("demo", arithmetic)
    divergence, nll = [], []
    for tokens in demo_texts(24):
        p, q = (log_softmax(runner.run(tokens)) for runner in (exact, rounded))
        divergence += (np.exp(p) * (p - q)).sum(-1).tolist()
        at = np.arange(len(tokens) - 1), tokens[1:]
        nll += zip(-p[at], -q[at])
    before, after = np.mean(nll, 0)
    assert 1e-9 < np.mean(divergence) <= 1e-3
    assert abs(np.exp(after - before) - 1) <= 1e-3


def test_small_models_are_exact_whatever_is_fastest(monkeypatch, kernels):
    monkeypatch.setattr(kernels, "fastest_arithmetic", lambda: TILED)
    monkeypatch.setattr(rustinfer, "open_kernels", lambda path: kernels)
    for num_weights, arithmetic in ((CpuBackend.EXACT_MODEL - 1, FLOAT32), (CpuBackend.EXACT_MODEL, TILED)):
        monkeypatch.setattr(rustinfer.ModelConfig, "num_weights", num_weights)
        with rustinfer.LLM(REFERENCES / "llama3-tied", device="cpu") as llm:
            assert llm.engine.model.backend.arithmetic == arithmetic


@pytest.mark.parametrize("arithmetic", [PAIRS, TILED])
def test_engine_keeps_its_promise_in_every_arithmetic(monkeypatch, kernels, arithmetic):
    """Requests together, in small steps, have the tokens and logprob bits that each has alone."""
    monkeypatch.setattr(kernels, "fastest_arithmetic", lambda: arithmetic)
    monkeypatch.setattr(rustinfer, "open_kernels", lambda path: kernels)
    monkeypatch.setattr(CpuBackend, "SMALL_MODEL", 0)
    monkeypatch.setattr(CpuBackend, "EXACT_MODEL", 0)
    options = dict(temperature=0.8, seed=3, max_tokens=9, ignore_eos=True, logprobs=2)
    prompts = [list(range(5, 5 + length)) for length in (1, 2, 15, 16, 17, 40, 70)]

    def answers(batches, **config):
        with rustinfer.LLM(REFERENCES / "llama3-tied", device="cpu", **config) as llm:
            assert CpuBackend.ROUNDINGS[arithmetic] in llm.backend_name
            found = [output for batch in batches for output in llm.generate(batch, **options)]
        return [(one.outputs[0].token_ids, one.outputs[0].logprobs) for one in found]

    alone = answers([[prompt] for prompt in prompts], no_prefix_caching=True)
    assert answers([prompts]) == alone
    assert answers([prompts], max_num_batched_tokens=8) == alone
