"""The array expressions on a device that refuses host arrays, as CuPy does."""
import pytest

import rustinfer
import strict_device
from harness import REFERENCE_NAMES, REFERENCES, reference_answers


@pytest.fixture
def strict_llm(monkeypatch, request):
    """A reference model whose backend computes on the strict device."""
    backend = rustinfer.ArrayBackend(strict_device)
    monkeypatch.setattr(rustinfer, "pick_backend", lambda *_: (backend, "test"))
    with rustinfer.LLM(REFERENCES / request.param, kv_cache_memory="16MiB") as llm:
        yield llm


@pytest.mark.parametrize("strict_llm", REFERENCE_NAMES, indirect=True)
def test_model_and_sampler_never_mix_host_and_device_arrays(strict_llm):
    _, arrays = reference_answers(strict_llm.name)
    prompts = [arrays[f"prompt_token_ids_{i}"].tolist() for i in range(3)]
    outputs = strict_llm.generate(prompts, temperature=0, max_tokens=64, ignore_eos=True, logprobs=2)
    assert [out.outputs[0].token_ids for out in outputs] == [arrays[f"output_token_ids_{i}"].tolist() for i in range(3)]


@pytest.mark.parametrize("strict_llm", ["llama3-tied"], indirect=True)
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}, {"top_k": 5, "min_p": 0.01}])
def test_device_draws_the_same_tokens_as_the_host(strict_llm, filters, monkeypatch):
    options = dict(temperature=1.0, seed=5, max_tokens=20, ignore_eos=True, **filters)
    monkeypatch.undo()
    with rustinfer.LLM(REFERENCES / strict_llm.name, device="cpu", cpu_kernels="off") as host_llm:
        device, host = (llm.generate([[1, 2, 3]], **options)[0].outputs[0] for llm in (strict_llm, host_llm))
    assert device.token_ids == host.token_ids


def test_strict_device_refuses_host_arrays():
    import numpy as np

    with pytest.raises(TypeError, match="host array"):
        strict_device.asarray(np.ones(3)) + np.ones(3)
