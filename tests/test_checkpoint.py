"""Checkpoint: exact widening from every layout, and an error that names the file for every broken folder."""
import gc
import json
import math
import os
import shutil
import struct
import subprocess
import sys

import numpy as np
import psutil
import pytest
import safetensors
from harness import REFERENCE_NAMES, REFERENCES, ROOT
from make_references import Dims, random_checkpoint, random_weights, tensor_shapes, to_dtype, write_safetensors
from rustinfer import (
    ArrayBackend, Checkpoint, CheckpointError, Llama, ModelConfig, RustinferError, SettingsError, resolve_model)

DIMS = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_kv_heads=1, num_layers=1, vocab_size=280)
SHAPES = tensor_shapes(Dims(**DIMS))
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def load(folder):
    """Everything that reading a model does."""
    config, backend = ModelConfig.load(folder), ArrayBackend()
    try:
        model = Llama(config, backend, 64, 16)
        model.load(Checkpoint(folder))
        return model
    finally:
        backend.close()


def failure(folder):
    """The message of the error in which loading must end."""
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert len(str(caught.value)) < 700
    return str(caught.value)


def change_config(folder, name="config.json", **entries):
    path = folder / name
    spec = json.loads(path.read_text(encoding="utf-8")) | entries
    path.write_text(json.dumps({key: value for key, value in spec.items() if value is not Ellipsis}))


def rewrite(folder, change, dtype="bfloat16", file="model.safetensors"):
    """The weights again, after `change` of {name: array}."""
    tensors = {name: to_dtype(values, dtype) for name, values in random_weights(Dims(**DIMS), [])}
    change(tensors)
    write_safetensors(folder / file, tensors, dtype)


@pytest.fixture
def folder(tmp_path):
    return random_checkpoint(tmp_path / "model", **DIMS)


@pytest.fixture
def shards(tmp_path):
    return random_checkpoint(tmp_path / "model", **DIMS, shards=3)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_16_bit_number_is_widened_exactly(tmp_path, dtype):
    bits = np.arange(1 << 16, dtype=np.uint32)
    stored = {"float32": bits.view(np.float32), "float16": bits.astype(np.uint16).view(np.float16),
              "bfloat16": bits.astype(np.uint16)}[dtype]
    expected = (bits << 16).view(np.float32) if dtype == "bfloat16" else stored.astype(np.float32)
    write_safetensors(tmp_path / "model.safetensors", {"x": stored.reshape(256, 256)}, dtype)
    with np.errstate(invalid="ignore"):
        found = Checkpoint(tmp_path).tensor("x", (256, 256)).to_float32()
    assert found.dtype == np.float32 and found.shape == (256, 256)
    # NaNs may gain the quiet bit on their way through a conversion; all other bits must be equal
    assert np.array_equal(found.ravel().view(np.uint32)[~np.isnan(expected)],
                          expected.view(np.uint32)[~np.isnan(expected)])
    assert np.array_equal(np.isnan(found.ravel()), np.isnan(expected))


@pytest.mark.parametrize("name", REFERENCE_NAMES)
def test_the_config_tells_the_number_of_weights(name):
    sizes = []
    for path in (REFERENCES / name).glob("*.safetensors"):
        with safetensors.safe_open(path, "np") as file:
            shapes = [file.get_slice(key).get_shape() for key in file.keys()]
        sizes += [math.prod(shape) for shape in shapes if len(shape) == 2]
    assert ModelConfig.load(REFERENCES / name).num_weights == sum(sizes)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("number", [1, 3])
def test_one_file_and_shards_give_the_same_tensors(tmp_path, dtype, number):
    folder = random_checkpoint(tmp_path / "model", **DIMS, dtype=dtype, shards=number)
    checkpoint, specials = Checkpoint(folder), json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    for name, values in random_weights(Dims(**DIMS), [token["id"] for token in specials]):
        stored = to_dtype(values, dtype)
        wide = (stored.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else stored.astype(np.float32)
        assert np.array_equal(checkpoint.tensor(name, values.shape).to_float32(), wide)


def test_tensors_need_not_be_aligned(tmp_path):
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    header = json.dumps({"x": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]}}).encode()
    header += b" " * (-len(header) % 8 + 3)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + values.tobytes())
    try:
        found = Checkpoint(tmp_path).tensor("x", (3, 4)).to_float32()
    except CheckpointError as error:  # a release of the library may refuse such a file
        assert "model.safetensors" in str(error)
    else:
        assert np.array_equal(found, values)


def test_reading_leaves_no_file_open_and_no_map(shards):
    model, process = load(shards), psutil.Process()
    gc.collect()
    held = [file.path for file in process.open_files()] + [entry.path for entry in process.memory_maps(grouped=False)]
    assert not any(str(shards) in path for path in held)
    assert model.num_parameters == sum(map(np.prod, SHAPES.values()))


def test_the_whole_file_wins_over_an_index(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "gone.safetensors"}}')
    load(folder)


def test_tied_embeddings_win_over_a_stored_head(folder):
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": np.zeros((280, 16), np.uint16)}))
    model = load(folder)
    assert model.head is model.embed


def test_a_missing_head_of_untied_embeddings_is_named(folder):
    change_config(folder, tie_word_embeddings=False)
    assert "tensor lm_head.weight [280, 16] is missing" in failure(folder)


def test_tensors_that_no_layer_asks_for_are_ignored(folder):
    rewrite(folder,
            lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.uint16)}))
    load(folder)


@pytest.mark.parametrize("name", SHAPES)
def test_a_missing_tensor_is_named_with_its_shape(folder, name):
    rewrite(folder, lambda tensors: tensors.pop(name))
    message = failure(folder)
    assert str(folder) in message and f"tensor {name} {list(SHAPES[name])} is missing" in message


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("change", [lambda x: x[:-1], lambda x: x[None], lambda x: x.reshape(-1, 2)])
def test_a_wrong_shape_is_told_with_file_and_both_shapes(folder, name, change):
    rewrite(folder, lambda tensors: tensors.update({name: change(tensors[name])}))
    found = change(np.zeros(SHAPES[name])).shape
    message = failure(folder)
    assert "model.safetensors: " in message
    assert f"tensor {name} has shape {list(found)}; config.json implies {list(SHAPES[name])}" in message


def test_biases_that_config_promises_must_be_there(folder):
    change_config(folder, attention_bias=True)
    assert "tensor model.layers.0.self_attn.q_proj.bias [16] is missing" in failure(folder)
    change_config(folder, attention_bias=False, mlp_bias=True)
    assert "tensor model.layers.0.mlp.gate_proj.bias [24] is missing" in failure(folder)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 100, -1, -1000])
def test_a_truncated_file_is_named_with_its_size(folder, size):
    path = folder / "model.safetensors"
    data = path.read_bytes()[:size]
    path.write_bytes(data)
    message = failure(folder)
    assert f"{path}: not a whole safetensors file ({len(data)} bytes)" in message


def test_weights_that_may_not_be_read_are_called_that(folder):
    path, user = folder / "model.safetensors", os.geteuid()
    path.chmod(0)
    for parent in folder.parents[:-2] if user == 0 else ():
        parent.chmod(parent.stat().st_mode | 0o111)
    folder.chmod(0o755)
    try:
        os.seteuid(user or 65534)  # root may read everything
        with pytest.raises(CheckpointError) as caught:
            Checkpoint(folder)
    finally:
        os.seteuid(user)
    assert str(caught.value) == f"{path}: cannot be read: Permission denied"


def test_a_file_with_more_behind_its_tensors_is_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"xx")
    assert f"{path}: not a whole safetensors file" in failure(folder)


@pytest.mark.parametrize("header", [
    b"", b"{", b"[]", b"5", b"null", b"\xff\xfe{}", b'{"x": 5}', b'{"x": {}}', b'{"x": {"dtype": "F32"}}', b"[" * 5000,
    b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
    b'{"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
    b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
    b'{"x": {"dtype": "??", "shape": [1], "data_offsets": [0, 4]}}',
    b'{"x": {"dtype": "F32", "shape": [4611686018427387905], "data_offsets": [0, 4]}}', b"<!DOCTYPE html>",
    b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, '
    b'"y": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'])
@pytest.mark.parametrize("size", [None, 0, 1 << 62])
def test_a_corrupt_header_is_an_error_that_names_the_file(folder, header, size):
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header) if size is None else size) + header + bytes(4))
    assert str(path) in failure(folder)


def test_a_pointer_in_place_of_the_weights_is_an_error_that_names_the_file(folder):
    path = folder / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    assert f"{path}: not a whole safetensors file" in failure(folder)


def test_random_damage_never_ends_in_another_error(folder):
    """Flipped bytes anywhere in the header; what still loads is a file that says something else."""
    path, rng = folder / "model.safetensors", np.random.default_rng(5)
    original = path.read_bytes()
    for _ in range(150):
        data = bytearray(original)
        for place in rng.integers(0, 1500, rng.integers(1, 4)):
            data[place] = rng.integers(0, 256)
        path.write_bytes(data)
        try:
            load(folder)
        except RustinferError:
            pass


@pytest.mark.parametrize("dtype, width", [("F64", 8), ("I64", 8), ("F8_E4M3", 1), ("I8", 1), ("BOOL", 1)])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.mlp.up_proj.bias"])
def test_an_unsupported_dtype_is_named(folder, dtype, width, name):
    header = json.dumps({name: {"dtype": dtype, "shape": [16], "data_offsets": [0, 16 * width]}}).encode()
    header += b" " * (-len(header) % 8)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16 * width))
    message = failure(folder)
    assert f"model.safetensors: tensor {name} is {dtype}; BF16, F16 and F32 are supported" in message


def test_a_missing_shard_is_named(shards):
    name = json.loads((shards / "model.safetensors.index.json").read_text())["weight_map"]["model.norm.weight"]
    (shards / name).unlink()
    assert f"{shards / name}: not found; model.safetensors.index.json names it" in failure(shards)


@pytest.mark.parametrize("name",
                         ["../model-00002-of-00003.safetensors", "/etc/passwd", "/tmp/x.safetensors", "a/b.safetensors",
                          "..",
                                  "", "x.bin", "x.safetensors/", "a\0.safetensors", "~/x.safetensors", 5, None, ["x"]])
def test_a_shard_outside_the_folder_is_refused(shards, name):
    outside = shards.parent / "model-00002-of-00003.safetensors"
    shutil.copy(shards / outside.name, outside)
    path = shards / "model.safetensors.index.json"
    spec = json.loads(path.read_text())
    spec["weight_map"][Q_PROJ] = name
    path.write_text(json.dumps(spec))
    message = failure(shards)
    assert "model.safetensors.index.json" in message
    assert "a .safetensors file beside it is expected" in message or "not found" in message


@pytest.mark.parametrize("content",
                         ["", "{", "[]", "{}", '{"weight_map": 5}', '{"weight_map": []}', '{"weight_map": null}'])
def test_a_broken_index_is_an_error_that_names_it(shards, content):
    (shards / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json: " in failure(shards)


def test_an_index_that_misses_a_shard_ends_in_the_missing_tensor(shards):
    path = shards / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    kept = {name: file for name, file in weight_map.items() if file != weight_map["model.norm.weight"]}
    path.write_text(json.dumps({"weight_map": kept}))
    assert "is missing" in failure(shards)


def test_a_folder_without_weights_is_named(folder):
    (folder / "model.safetensors").unlink()
    assert f"{folder}: has neither model.safetensors nor model.safetensors.index.json" in failure(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"5", b"\xff", b"[" * 100_000, b"9" * 10_000])
def test_a_config_that_is_not_a_json_object_is_named(folder, content):
    (folder / "config.json").write_bytes(content)
    assert str(folder / "config.json") in failure(folder)


def test_a_missing_config_is_named(folder):
    (folder / "config.json").unlink()
    assert failure(folder) == f"{folder / 'config.json'}: not found"
    (folder / "config.json").mkdir()
    assert str(folder / "config.json") in failure(folder)


@pytest.mark.parametrize("kinds",
                         [["MistralForCausalLM"], ["GPT2LMHeadModel", "LlamaForCausalLM"], "LlamaForCausalLM", 5, [5],
                                   [["LlamaForCausalLM"]], {"a": 1}, [None]])
def test_an_unknown_architecture_is_named(folder, kinds):
    change_config(folder, architectures=kinds)
    message = failure(folder)
    assert "config.json: architecture is" in message and "LlamaForCausalLM is supported" in message


def test_the_model_type_stands_in_for_a_missing_architecture(folder):
    for kinds in (..., None, []):
        change_config(folder, architectures=kinds)
        load(folder)
    change_config(folder, model_type="gpt2")
    assert "architecture is gpt2" in failure(folder)


def test_what_the_model_does_not_compute_is_refused(folder):
    change_config(folder, hidden_act="gelu")
    assert "hidden_act is gelu; silu is supported" in failure(folder)
    change_config(folder, hidden_act="silu", quantization_config={"quant_method": "gptq"})
    assert "quantization_config" in failure(folder)


@pytest.mark.parametrize("scaling", [
    {"rope_type": "yarn", "factor": 2.0}, {"type": "dynamic", "factor": 2.0}, {"rope_type": ["llama3"]},
    {"rope_type": 5}, "linear", [1],
    {"rope_type": "linear"}, {"rope_type": "linear", "factor": 0}, {"rope_type": "linear", "factor": "2"},
    {"rope_theta": "x"},
    {"rope_type": "llama3", "factor": 8.0}, {"rope_theta": -1.0}, {"rope_theta": [1]},
    {"rope_type": "linear", "factor": True},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 64}])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_a_rope_scaling_that_is_not_supported_is_refused(folder, scaling, key):
    change_config(folder, **{key: scaling})
    message = failure(folder)
    assert "config.json: " in message and any(word in message for word in ("rope", "factor", "original_max"))


NUMBERS = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
           "num_key_value_heads",
           "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta"]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [0, -1, "8", True, [8], {}, float("nan"), float("inf"), 1 << 40])
def test_a_config_number_that_is_none_is_named_with_its_value(folder, name, value):
    change_config(folder, **{name: value})
    message = failure(folder)
    assert "config.json: " in message and name in message and "a positive number is expected" in message


@pytest.mark.parametrize("name", NUMBERS[:5])
def test_a_missing_config_number_is_named(folder, name):
    change_config(folder, **{name: ...})
    assert f"{name} is None; a positive number is expected" in failure(folder)


@pytest.mark.parametrize("entries, words", [
    ({"num_attention_heads": 3, "num_key_value_heads": 2},
     "num_attention_heads 3 is not a multiple of num_key_value_heads 2"),
    ({"num_attention_heads": 2, "num_key_value_heads": 4},
     "num_attention_heads 2 is not a multiple of num_key_value_heads 4"),
    ({"head_dim": 7}, "head_dim is 7; an even number is expected"),
    ({"num_attention_heads": 32, "num_key_value_heads": 1}, "head_dim is 0")])
def test_heads_must_fit(folder, entries, words):
    change_config(folder, **entries)
    assert words in failure(folder)


@pytest.mark.parametrize("entries",
                         [{"vocab_size": 281}, {"hidden_size": 20}, {"intermediate_size": 25}, {"num_hidden_layers": 2},
                                     {"head_dim": 4}, {"num_key_value_heads": 2}, {"num_hidden_layers": 1 << 30}])
def test_a_config_that_the_weights_contradict_is_told_with_tensor_and_shape(folder, entries):
    change_config(folder, **entries)
    message = failure(folder)
    assert "tensor model." in message and "[" in message


@pytest.mark.parametrize("generation, config, expected", [
    ({"eos_token_id": [5, 6]}, 7, (5, 6)), ({"eos_token_id": 5}, [7], (5,)), ({"eos_token_id": None}, 7, (7,)),
    ({}, [7, 8], (7, 8)), (None, 7, (7,)), ({}, None, ()), ({"eos_token_id": []}, 7, ())])
def test_end_tokens_come_from_the_generation_config_first(folder, generation, config, expected):
    change_config(folder, eos_token_id=config)
    path = folder / "generation_config.json"
    path.unlink() if generation is None else path.write_text(json.dumps(generation))
    assert ModelConfig.load(folder).eos_token_ids == expected


def test_a_broken_generation_config_is_named(folder):
    (folder / "generation_config.json").write_text("{")
    assert "generation_config.json: " in failure(folder)


def test_defaults_are_those_of_the_reference(folder):
    change_config(folder,
                  **{name: ... for name in ("num_key_value_heads", "head_dim", "rope_theta", "rms_norm_eps",
                                            "attention_bias",
                                                    "mlp_bias", "tie_word_embeddings", "max_position_embeddings",
                                                    "hidden_act")})
    config = ModelConfig.load(folder)
    assert (config.num_kv_heads, config.head_dim, config.rope_theta, config.rms_norm_eps) == (2, 8, 10000.0, 1e-6)
    assert (config.attention_bias, config.mlp_bias, config.tie_word_embeddings) == (False, False, False)
    assert config.max_position_embeddings == 2048 and config.rope_scaling is None


@pytest.mark.parametrize("entries, theta, scaling", [
    ({"rope_theta": 5e5}, 5e5, None),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_theta": ...}, 5e5, None),
    ({"rope_scaling": None, "rope_theta": 100}, 100.0, None), ({"rope_scaling": {}, "rope_theta": 100}, 100.0, None),
    ({"rope_scaling": {"type": "linear", "factor": 2}}, 1e4, {"type": "linear", "rope_type": "linear", "factor": 2}),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}}, 7.0,
     {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0})])
def test_rope_may_be_spelled_the_old_way_or_the_new(folder, entries, theta, scaling):
    change_config(folder, **entries)
    config = ModelConfig.load(folder)
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


@pytest.mark.parametrize("name", REFERENCE_NAMES)
def test_references_load(name):
    assert load(REFERENCES / name).num_parameters > 0


def test_a_model_path_that_is_no_folder_is_refused_with_what_it_may_be(tmp_path):
    (tmp_path / "file").touch()
    for model in (tmp_path / "none", tmp_path / "file", "no-slash", "../../none", "a/b/c", "a/b\n", "-a/b"):
        with pytest.raises(SettingsError, match="--model: .* a folder that exists or a Hub id such as"):
            resolve_model(model)
    assert resolve_model(str(tmp_path)) == tmp_path


def test_a_hub_model_that_cannot_be_had_is_a_checkpoint_error(monkeypatch):
    import huggingface_hub

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match="--model a/b: no such folder, and the Hub download failed: .*no network"):
        resolve_model("a/b")


def test_shards_may_be_links_as_in_the_hub_cache(shards, tmp_path):
    for path in list(shards.glob("*.safetensors")):
        os.rename(path, tmp_path / f"blob-{path.name}")
        path.symlink_to(tmp_path / f"blob-{path.name}")
    load(shards)


def test_a_hub_id_is_found_in_the_cache_without_a_network(tmp_path):
    """The Hub's own cache layout, read with its offline switch, in a process of its own since it reads them once."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "hub" / "models--owner--tiny"
    shutil.copytree(REFERENCES / "sharded-biased", cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    code = ("import rustinfer; llm = rustinfer.LLM('owner/tiny', device='cpu'); print(llm.name, llm.num_parameters); "
            "llm.close()")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True,
                          env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)})
    assert done.stdout.split()[0] == "owner/tiny" and int(done.stdout.split()[1]) > 0
