"""The key promise: a request's tokens and logprob bits depend on nothing but the request."""
import random

import pytest
from make_references import random_checkpoint

import rustinfer
from harness import need_compiler

SHAPES = {
    "gqa1-odd-sizes": dict(seed=1, hidden_size=40, intermediate_size=72, num_attention_heads=2, num_kv_heads=2,
                           head_dim=20, vocab_size=331, dtype="float32", tied=False),
    "gqa3-wide": dict(seed=2, hidden_size=100, intermediate_size=130, num_layers=1, num_attention_heads=6,
                      num_kv_heads=2, head_dim=64, vocab_size=517, bias=True),
    "gqa4-small-heads": dict(seed=3, hidden_size=56, intermediate_size=120, num_attention_heads=4, num_kv_heads=1,
                             head_dim=16, vocab_size=401),
    "gqa2-c-kernels": dict(seed=4, hidden_size=112, intermediate_size=208, num_attention_heads=4, num_kv_heads=2,
                           head_dim=40, vocab_size=531),
    "gqa3-c-kernels-biased": dict(seed=5, hidden_size=576, intermediate_size=96, num_layers=1, num_attention_heads=6,
                                  num_kv_heads=2, head_dim=64, vocab_size=300, bias=True, tied=False),
}
LENGTHS = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 128, 129, 130, 200, 255, 257, 300, 511, 600]


@pytest.fixture(scope="module", autouse=True)
def all_threads():
    """However small the model, all threads of the C kernels take part."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rustinfer.CpuBackend, "SMALL_MODEL", 0)
        yield


@pytest.fixture(scope="module", params=SHAPES)
def folder(request, tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp(request.param) / "model", **SHAPES[request.param])


@pytest.fixture(scope="module")
def alone(folder):
    """What each request answers with the engine to itself; each time nothing of it is in any cache."""
    with rustinfer.LLM(folder, device="cpu", max_num_batched_tokens=8192, no_prefix_caching=True) as llm:
        return [answer_of(llm.engine.submit(*request)) for request in requests(folder)]


def requests(folder):
    """64 (prompt ids, params): all lengths, three shared beginnings, greedy and seeded with every filter."""
    rng, vocab = random.Random(7), rustinfer.ModelConfig.load(folder).vocab_size
    stems = [[rng.randrange(vocab) for _ in range(600)] for _ in range(3)]
    made = []
    for index in range(64):
        length = LENGTHS[index % len(LENGTHS)] if index < 40 else rng.randint(1, 80)
        shared = rng.choice([0, length // 2, length])
        prompt = stems[index % 3][:shared] + [rng.randrange(vocab) for _ in range(length - shared)]
        made.append((prompt, sampling(rng, index)))
    return made


def sampling(rng, index):
    limits = {"max_tokens": rng.randint(6, 36), "ignore_eos": True, "logprobs": rng.choice([0, 1, 5, 20])}
    if index % 2:
        return rustinfer.SamplingParams(temperature=0, **limits)
    filters = {"top_p": rng.choice([1.0, 0.8]), "top_k": rng.choice([0, 5, 40]), "min_p": rng.choice([0.0, 0.02])}
    return rustinfer.SamplingParams(temperature=rng.choice([0.5, 1.0, 1.7]), seed=index, **filters, **limits)


def answer_of(handle):
    """Token ids, logprobs and likeliest tokens, the floats by their bits."""
    return [(token.token_id, token.logprob.hex(), [(i, value.hex()) for i, value in token.top]) for token in handle]


def answers_together(llm, disturb=lambda number: None):
    handles = []
    for number, request in enumerate(requests(llm.folder)):
        handles.append(llm.engine.submit(*request))
        disturb(number)
    return [answer_of(handle) for handle in handles]


def check_equal(answers, alone):
    different = [number for number, pair in enumerate(zip(answers, alone)) if pair[0] != pair[1]]
    assert not different, f"requests {different} differ from when they ran alone"


@pytest.mark.parametrize("options", [
    dict(max_num_batched_tokens=64, block_size=8),
    dict(max_num_batched_tokens=64, block_size=16, no_prefix_caching=True),
    dict(max_num_batched_tokens=8192, block_size=16),
    dict(max_num_batched_tokens=8192, block_size=8, no_prefix_caching=True),
], ids=["chunked-cached", "chunked", "whole-cached", "whole"])
def test_together_equals_alone(folder, alone, options):
    with rustinfer.LLM(folder, device="cpu", **options) as llm:
        check_equal(answers_together(llm), alone)
        if not llm.config.no_prefix_caching:  # once more, with every prompt's blocks in the cache
            check_equal(answers_together(llm), alone)
            assert llm.engine.snapshot()["cached_tokens"] > 1000


@pytest.mark.parametrize("options", [dict(), dict(no_prefix_caching=True)], ids=["cached", "uncached"])
def test_preempted_sequences_resume_with_the_same_bits(folder, alone, options):
    memory = 648 // 8 * kv_block_bytes(folder, 8)  # the longest request just fits
    with rustinfer.LLM(folder, device="cpu", block_size=8, kv_cache_memory=memory, max_num_batched_tokens=256,
                       **options) as llm:
        check_equal(answers_together(llm), alone)
        assert llm.engine.snapshot()["num_preemptions"] > 0


def kv_block_bytes(folder, block_size):
    config = rustinfer.ModelConfig.load(folder)
    return 2 * config.num_layers * block_size * config.num_kv_heads * config.head_dim * 4


def test_unrelated_traffic_and_aborts_change_nothing(folder, alone):
    rng = random.Random(3)
    with rustinfer.LLM(folder, device="cpu", max_num_batched_tokens=128, max_num_seqs=24) as llm:
        noise = []

        def disturb(number):
            prompt = [rng.randrange(300) for _ in range(rng.randint(1, 150))]
            noise.append(llm.engine.submit(prompt, rustinfer.SamplingParams(max_tokens=50)))
            if number % 3 == 0:
                rng.choice(noise).abort()

        check_equal(answers_together(llm, disturb), alone)
        for handle in noise:
            handle.abort()
    assert llm.engine.dead is None


def test_products_split_over_threads_keep_the_promise_too(folder, monkeypatch):
    """Large weights are split over NumPy's threads; here every weight counts as large."""
    monkeypatch.setattr(rustinfer.ArrayBackend, "PARALLEL_SIZE", 1)
    options = dict(device="cpu", cpu_kernels="off", threads=3, max_num_batched_tokens=512, no_prefix_caching=True)
    with rustinfer.LLM(folder, **options) as llm:
        assert llm.engine.model.backend.threads == 3
        alone = [answer_of(llm.engine.submit(*request)) for request in requests(folder)[::4]]
        check_equal(answers_together(llm)[::4], alone)


def test_small_models_have_the_same_bits_on_one_thread(folder, alone, monkeypatch):
    monkeypatch.setattr(rustinfer.CpuBackend, "SMALL_MODEL", 1 << 40)
    with rustinfer.LLM(folder, device="cpu") as llm:
        if llm.backend_name.startswith("C kernels"):
            assert llm.engine.model.backend.team_for(1) != llm.engine.model.backend.team_for(1 << 40)
            check_equal(answers_together(llm), alone)


def test_shapes_that_the_c_kernels_take_ran_on_them(folder):
    need_compiler()
    with rustinfer.LLM(folder, device="cpu") as llm:
        assert llm.backend_name.startswith("C kernels") == ("c-kernels" in folder.parent.name)


@pytest.mark.parametrize("threads", [1, 3])
def test_number_of_threads_changes_no_bit_of_the_c_kernels(folder, alone, threads):
    with rustinfer.LLM(folder, device="cpu", threads=threads) as llm:
        if not llm.backend_name.startswith("C kernels"):
            pytest.skip("NumPy splits its products by the number of threads")
        check_equal(answers_together(llm), alone)


def test_seed_of_a_request_is_its_own(folder):
    with rustinfer.LLM(folder, device="cpu") as llm:
        params = rustinfer.SamplingParams(temperature=1.5, max_tokens=12, logprobs=0, ignore_eos=True)
        handles = [llm.engine.submit([5, 6, 7], rustinfer.dataclasses.replace(params, seed=seed)) for seed in (1, 2, 1)]
        first, second, third = map(answer_of, handles)
    assert first == third != second
