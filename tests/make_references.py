"""Reference checkpoints and transformers' answers for them: `python tests/make_references.py [name ...]`.

Importing this file needs NumPy only. Rewriting tests/references/ also needs torch and transformers, and ends in the
same bytes each time on one machine (with torch 2.13.0 and transformers 5.23.0; other releases and CPUs round
differently, by 1e-5 in a logit).
`random_checkpoint` writes a Llama checkpoint of any size without torch, for the other tests.

Each folder under tests/references/ is what a user downloads (config, tokenizer, weights) plus the answers that
transformers gives in float32 (references/demo holds the answers alone; the model is demo/):

reference.npz    for each prompt i: prompt_token_ids_i (P,), output_token_ids_i (64,) greedy with eos ignored,
                 positions_i (R,) and logits_i (R, V) float32. Row r holds the logits after the token at positions_i[r]
                 of prompt + output, so the row of position P - 1 chooses the first output token;
                 logprobs_i (64,) float32, the output tokens' natural log-probabilities.
reference.json   transformers, seed, margins (one a prompt: the least top-1 minus top-2 of the 64 steps, over
                 max|logits|); added_ids, texts, decodes, conversations (see `text_answers`).

Sections: Corpus, Tokenizer, Weights, Checkpoint, Templates, Models, Answers from transformers.
"""
import json
import re
import struct
import sys
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).resolve().parent / "references"
DEMO = FOLDER.parent.parent / "demo"

# ==============================================================================
# Corpus -- the text that decides the merges of every tokenizer here
# ==============================================================================

CORPUS = """The river runs down to the sea, and the people of the town walk along the water in the evening.
When the rain stopped, they opened the windows and listened to the birds in the old trees.
There is a library in the middle of the street; there are thousands of books in it, and some of them are read.
The teacher asked the children what they wanted to be, and one of them answered that she wanted to be a river.
It isn't the answer that she'd expected, but it was the best that she'd heard that day, and she didn't forget it.
In 1998 there were 365 days, 52 weeks and 12 months; in 2024 there were 366 days.
def add(first, second):
    return first + second

for index in range(10):
    print(index, add(index, index))
        # deeper than the rest
Der Fluss fließt durch die Stadt, und die Menschen gehen über die Brücke. Où est la bibliothèque? Près de la rivière.
El niño pregunta por qué el cielo es azul, y la maestra sonríe. Река течёт к морю. 川は海へ流れる。 河水流向大海。
The weather in the town, the weather at sea, and the weather over the mountains: rain, wind, snow and sun.
"""


# ==============================================================================
# Tokenizer -- tokenizer.json and tokenizer_config.json of the three families, assembled as plain JSON
# uses: Corpus
# ==============================================================================

# More merges than this cost seconds to learn; a larger vocabulary is filled up with made-up words.
MAX_MERGES = 300

LLAMA3_SPECIALS = ("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|finetune_right_pad_id|>",
                   "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>")
LLAMA2_SPECIALS = ("<unk>", "<s>", "</s>")
CHATML_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<file_sep>")

LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")


@lru_cache(maxsize=None)
def byte_alphabet():
    """GPT-2's map from byte to a printable character, {byte: character}, in the order of GPT-2's vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


def byte_spelling(text):
    """`text` in the alphabet of a byte-level tokenizer: one printable character for each UTF-8 byte."""
    return "".join(byte_alphabet()[byte] for byte in text.encode())


def join_pair(word, pair):
    """`word` (a tuple of symbols) with every occurrence of `pair` made one symbol."""
    joined, i = [], 0
    while i < len(word):
        step = 2 if word[i:i + 2] == pair else 1
        joined.append("".join(word[i:i + step]))
        i += step
    return tuple(joined)


@lru_cache(maxsize=None)
def learn_merges(word_pattern, as_bytes, count):
    """The `count` most frequent BPE merges of the corpus, as pairs; ties go to the greater pair, so order is fixed."""
    words = Counter(re.findall(word_pattern, CORPUS if as_bytes else CORPUS.replace(" ", "▁")))
    words = {(tuple(byte_spelling(word)) if as_bytes else tuple(word)): number for word, number in words.items()}
    merges = []
    while len(merges) < count:
        pairs = Counter()
        for word, number in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += number
        if not pairs:
            break
        merges.append(max(pairs, key=lambda pair: (pairs[pair], pair)))
        words = {join_pair(word, merges[-1]): number for word, number in words.items()}
    return tuple(merges)


def base26(number):
    """`number` in letters, at least three of them."""
    letters = ""
    while number or len(letters) < 3:
        number, digit = divmod(number, 26)
        letters = chr(ord("a") + digit) + letters
    return letters


def grow_vocab(first, size, as_bytes):
    """Vocabulary {token: id} of `size` tokens that begins with `first`, and the merges that reach the learned ones."""
    if size < len(first):
        raise ValueError(f"vocabulary has room for {size} tokens; this kind needs {len(first)}; raise vocab_size")
    vocab, merges = {token: i for i, token in enumerate(first)}, []
    pattern = r" ?[^\W\d_]+| ?[^\s\w]+| +(?= )" if as_bytes else r"▁?[^▁\W\d]+|▁?[^\w\s]+|▁+(?=▁)"
    for left, right in learn_merges(pattern, as_bytes, min(MAX_MERGES, size - len(first))):
        # Characters outside the alphabet of "llama2" stay bytes: a merge of them has no tokens to join.
        if left in vocab and right in vocab:
            vocab.setdefault(left + right, len(vocab))
            merges.append((left, right))
    space = "Ġ" if as_bytes else "▁"
    for i in range(size - len(vocab)):
        vocab[f"{space}qz{base26(i)}"] = len(vocab)
    return vocab, merges


def bpe_model(vocab, merges, **options):
    """The "model" part of tokenizer.json."""
    defaults = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {**defaults, **options, "vocab": vocab, "merges": [list(pair) for pair in merges]}


def bos_processor(token, specials):
    """The post-processor that puts `token` in front of a text."""
    bos = {"SpecialToken": {"id": token, "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    second = [{"SpecialToken": {"id": token, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": [bos, text], "pair": [bos, text, *second],
            "special_tokens": {token: {"id": token, "ids": [specials[token]], "tokens": [token]}}}


def tokenizer_json(specials, normalizer=None, **parts):
    """The whole of tokenizer.json, in the order in which `tokenizers` writes it."""
    added = [{"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
              "special": True} for token, i in specials.items()]
    order = ("pre_tokenizer", "post_processor", "decoder", "model")
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": normalizer,
            **{part: parts[part] for part in order}}


def tokenizer_config(specials, bos_token, eos_token, extra):
    """tokenizer_config.json; the class named there makes transformers use tokenizer.json as it is."""
    decoder = {str(i): {"content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
                        "special": True} for token, i in specials.items()}
    return {"added_tokens_decoder": decoder, "bos_token": bos_token, "eos_token": eos_token,
            "clean_up_tokenization_spaces": False, "model_max_length": 131072,
            "tokenizer_class": "PreTrainedTokenizerFast", **extra}


@dataclass
class TokenizerFiles:
    """One tokenizer as the two JSON documents of a checkpoint, and what config.json must know of it."""
    tokenizer: dict
    config: dict
    bos_token_id: int
    eos_token_ids: list
    special_token_ids: list


def llama3_tokenizer(vocab_size, extra):
    """Byte-level BPE as Llama 3's: digits in threes, whole words before merges, specials last, <|begin_of_text|>."""
    vocab, merges = grow_vocab(list(byte_alphabet().values()), vocab_size - len(LLAMA3_SPECIALS), True)
    specials = {token: len(vocab) + i for i, token in enumerate(LLAMA3_SPECIALS)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": LLAMA3_SPLIT}, "behavior": "Isolated", "invert": False}
    tokenizer = tokenizer_json(
        specials, pre_tokenizer={"type": "Sequence", "pretokenizers": [split, byte_level]},
        post_processor={"type": "Sequence", "processors": [byte_level, bos_processor("<|begin_of_text|>", specials)]},
        decoder=dict(byte_level, add_prefix_space=True, use_regex=True),
        model=bpe_model(vocab, merges, ignore_merges=True))
    config = tokenizer_config(specials, "<|begin_of_text|>", "<|eot_id|>", extra)
    eos = [specials[token] for token in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")]
    return TokenizerFiles(tokenizer, config, specials["<|begin_of_text|>"], eos, list(specials.values()))


def chatml_tokenizer(vocab_size, extra):
    """Byte-level BPE as SmolLM2's: single digits, GPT-2's pattern, ChatML specials first, no beginning-of-text."""
    vocab, merges = grow_vocab([*CHATML_SPECIALS, *byte_alphabet().values()], vocab_size, True)
    specials = {token: i for i, token in enumerate(CHATML_SPECIALS)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    tokenizer = tokenizer_json(
        specials, pre_tokenizer={"type": "Sequence", "pretokenizers": [digits, byte_level]}, post_processor=None,
        decoder=dict(byte_level, add_prefix_space=True), model=bpe_model(vocab, merges))
    config = tokenizer_config(specials, "<|im_start|>", "<|im_end|>", dict(extra, unk_token="<|endoftext|>"))
    eos = [specials["<|im_end|>"]]
    return TokenizerFiles(tokenizer, config, specials["<|im_start|>"], eos, list(specials.values()))


def llama2_tokenizer(vocab_size, extra):
    """SentencePiece-like BPE as Llama 2's: spaces as ▁, one more in front, bytes where a character is unknown, <s>."""
    letters = sorted({letter for letter in CORPUS.replace(" ", "▁") if ord(letter) < 0x250 or letter == "▁"} - {"\n"})
    first = [*LLAMA2_SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    vocab, merges = grow_vocab(first, vocab_size, False)
    specials = {token: i for i, token in enumerate(LLAMA2_SPECIALS)}
    tokenizer = tokenizer_json(
        specials, pre_tokenizer=None, post_processor=bos_processor("<s>", specials),
        normalizer={"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        decoder={"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        model=bpe_model(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    # Llama 2 spells its special tokens as objects where later models have strings.
    spelled = {"__type": "AddedToken", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    config = tokenizer_config(specials, dict(spelled, content="<s>"), dict(spelled, content="</s>"),
                              dict(extra, unk_token=dict(spelled, content="<unk>")))
    return TokenizerFiles(tokenizer, config, specials["<s>"], [specials["</s>"]], list(specials.values()))


def build_tokenizer(kind, vocab_size, chat_template=None):
    """Tokenizer of `kind` ("llama3", "llama2" or "chatml") with exactly `vocab_size` tokens."""
    return {"llama3": llama3_tokenizer, "llama2": llama2_tokenizer, "chatml": chatml_tokenizer}[kind](
        vocab_size, {} if chat_template is None else {"chat_template": chat_template})


# ==============================================================================
# Weights -- random tensors under Hugging Face's names, and the safetensors format
# ==============================================================================

SAFETENSORS_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}

# Gains at which a few random layers give varied greedy text: attention with clear favourites, layers that outweigh the
# embedding (else a tied head repeats its input), logits with a standard deviation of about 3.
PROJECTION_GAINS = {"q_proj": 1.5, "k_proj": 1.5, "o_proj": 1.5, "gate_proj": 1.5, "up_proj": 1.5, "lm_head": 3.0}

# Special tokens get small rows, so that random models write text, and 64 tokens of it, before they end.
SPECIAL_ROW_GAIN = 0.2


def write_json(path, document, indent=2):
    """Write `document` as UTF-8 JSON with a newline at the end; `indent=None` is the compact form."""
    separators = (",", ":") if indent is None else None
    text = json.dumps(document, ensure_ascii=False, indent=indent, separators=separators)
    Path(path).write_text(text + "\n", encoding="utf-8")


def tensor_shapes(dims):
    """{name: shape} of every tensor of a checkpoint, in the order in which weights are drawn and stored."""
    c, f, d = dims.hidden_size, dims.intermediate_size, dims.head_size
    q, kv = dims.num_attention_heads * d, (dims.num_kv_heads or dims.num_attention_heads) * d
    linears = {"self_attn.q_proj": (q, c), "self_attn.k_proj": (kv, c), "self_attn.v_proj": (kv, c),
               "self_attn.o_proj": (c, q), "mlp.gate_proj": (f, c), "mlp.up_proj": (f, c), "mlp.down_proj": (c, f)}
    shapes = {"model.embed_tokens.weight": (dims.vocab_size, c)}
    for layer in range(dims.num_layers):
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{name}.weight"] = (c,)
        for name, shape in linears.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
            if dims.bias:
                shapes[f"model.layers.{layer}.{name}.bias"] = shape[:1]
    shapes["model.norm.weight"] = (c,)
    return shapes if dims.tied else {**shapes, "lm_head.weight": (dims.vocab_size, c)}


def random_weights(dims, special_token_ids):
    """Yield (name, float32 array) for every tensor, drawn from `dims.seed`."""
    rng = np.random.default_rng(dims.seed)
    for name, shape in tensor_shapes(dims).items():
        values = rng.standard_normal(shape, dtype=np.float32)
        *_, module, kind = name.split(".")
        if kind == "bias":
            values *= 0.3
        elif len(shape) == 1:
            values = 1 + 0.2 * values
        else:
            gain = PROJECTION_GAINS["lm_head"] if module == "embed_tokens" else PROJECTION_GAINS.get(module, 1.0)
            values *= gain / np.sqrt(shape[1])
            if shape[0] == dims.vocab_size:
                values[special_token_ids] *= SPECIAL_ROW_GAIN
        yield name, values.astype(np.float32, copy=False)


def to_dtype(values, dtype):
    """float32 `values` as the array whose bytes safetensors stores; bfloat16 becomes uint16, rounded to even."""
    if dtype != "bfloat16":
        return values.astype(dtype)
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def write_safetensors(path, tensors, dtype):
    """Write {name: array of `to_dtype`} as one safetensors file."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, values in tensors.items():
        header[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": list(values.shape),
                        "data_offsets": [offset, offset + values.nbytes]}
        offset += values.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for values in tensors.values():
            file.write(np.ascontiguousarray(values).data)


def write_weights(folder, tensors, dtype, shards):
    """Write `tensors` as model.safetensors, or as `shards` files of about equal size and their index."""
    if shards == 1:
        return write_safetensors(folder / "model.safetensors", tensors, dtype)
    total = sum(values.nbytes for values in tensors.values())
    parts, written = [{} for _ in range(shards)], 0
    for name, values in tensors.items():
        parts[written * shards // total][name] = values
        written += values.nbytes
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    for file, part in zip(files, parts):
        write_safetensors(folder / file, part, dtype)
    weight_map = {name: file for file, part in zip(files, parts) for name in part}
    write_json(folder / "model.safetensors.index.json",
               {"metadata": {"total_size": total}, "weight_map": weight_map})


# ==============================================================================
# Checkpoint -- a model folder as a user downloads it, of any size
# uses: Tokenizer, Weights
# ==============================================================================


@dataclass
class Dims:
    """What a random checkpoint is; `rope` goes into config.json as it stands, in either spelling."""
    seed: int = 0
    hidden_size: int = 64
    intermediate_size: int = 128
    num_layers: int = 2
    num_attention_heads: int = 4
    num_kv_heads: int = None            # None: one a query head, and config.json says nothing of it
    head_dim: int = None                # None: hidden_size / num_attention_heads, and config.json says nothing of it
    vocab_size: int = 320
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    dtype: str = "bfloat16"             # of the stored weights: float32, float16 or bfloat16
    tied: bool = True                   # the head is the embedding
    bias: bool = False                  # on all attention and MLP projections
    rope: dict = field(default_factory=lambda: {"rope_theta": 10000.0})
    tokenizer: str = "llama3"           # or llama2, chatml
    chat_template: str = None           # in tokenizer_config.json; None: left out
    chat_template_file: str = None      # in chat_template.jinja; None: no such file
    shards: int = 1

    @property
    def head_size(self):
        """Elements of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads


def one_or_list(ids):
    """A lone id as a number, several as a list, as checkpoints spell eos_token_id."""
    return ids[0] if len(ids) == 1 else ids


def generation_config(files):
    """generation_config.json; greedy, so that nothing in it changes an answer."""
    return {"bos_token_id": files.bos_token_id, "do_sample": False, "eos_token_id": one_or_list(files.eos_token_ids)}


def model_config(dims, files):
    """config.json, with keys of the age that `dims.rope` is spelled in."""
    optional = {"num_key_value_heads": dims.num_kv_heads, "head_dim": dims.head_dim}
    dtype_key = "dtype" if "rope_parameters" in dims.rope else "torch_dtype"
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": dims.vocab_size,
        "hidden_size": dims.hidden_size, "intermediate_size": dims.intermediate_size,
        "num_hidden_layers": dims.num_layers, "num_attention_heads": dims.num_attention_heads,
        **{key: value for key, value in optional.items() if value is not None},
        "hidden_act": "silu", "max_position_embeddings": dims.max_position_embeddings,
        "rms_norm_eps": dims.rms_norm_eps, "attention_bias": dims.bias, "mlp_bias": dims.bias,
        "tie_word_embeddings": dims.tied, "bos_token_id": files.bos_token_id,
        "eos_token_id": one_or_list(files.eos_token_ids), dtype_key: dims.dtype, "use_cache": True, **dims.rope}


def random_checkpoint(folder, **dims):
    """Write a random Llama checkpoint with the given `Dims` into `folder` and return its path.

    The same arguments give the same bytes. Needs NumPy only; 30 million parameters take about a second.
    """
    folder, dims = Path(folder), Dims(**dims)
    folder.mkdir(parents=True, exist_ok=True)
    files = build_tokenizer(dims.tokenizer, dims.vocab_size, dims.chat_template)
    write_json(folder / "config.json", model_config(dims, files))
    write_json(folder / "generation_config.json", generation_config(files))
    write_json(folder / "tokenizer.json", files.tokenizer, indent=None)
    write_json(folder / "tokenizer_config.json", files.config)
    if dims.chat_template_file is not None:
        (folder / "chat_template.jinja").write_text(dims.chat_template_file, encoding="utf-8")
    tensors = {name: to_dtype(values, dims.dtype) for name, values in random_weights(dims, files.special_token_ids)}
    write_weights(folder, tensors, dims.dtype, dims.shards)
    return folder


# ==============================================================================
# Templates -- chat formats in the shape in which checkpoints carry them
# ==============================================================================

# The layout of Llama 3.1: a system header with dates always, tools in it as indented JSON, roles trimmed.
LLAMA3_TEMPLATE = r"""{{- bos_token }}
{%- if date_string is not defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set instructions = messages[0]['content'] | trim %}
    {%- set dialogue = messages[1:] %}
{%- else %}
    {%- set instructions = "" %}
    {%- set dialogue = messages %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if tools %}
    {{- "Environment: ipython\n" }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\nToday Date: " + date_string + "\n\n" }}
{%- if tools %}
    {{- "Answer with a call of one of these functions, as JSON.\n\n" }}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) }}
        {{- "\n\n" }}
    {%- endfor %}
{%- endif %}
{{- instructions + "<|eot_id|>" }}
{%- for message in dialogue %}
    {%- if message.tool_calls is defined and message.tool_calls %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception("This model makes one tool call at a time.") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- "<|start_header_id|>assistant<|end_header_id|>\n\n" }}
        {{- '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + "}<|eot_id|>" }}
    {%- elif message.role in ("tool", "ipython") %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" }}
        {%- if message.content is mapping %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>" + message['role'] + "<|end_header_id|>\n\n" }}
        {{- message['content'] | trim + "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|start_header_id|>assistant<|end_header_id|>\n\n" }}
{%- endif %}
"""

# The layout of Llama 2's chat models: the system text inside the first [INST], turns closed by eos, roles in turn.
LLAMA2_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set turns = messages %}{% set system = false %}{% endif %}"
    "{% for turn in turns %}"
    "{% if (turn['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate: user, assistant, user, assistant, ...') }}{% endif %}"
    "{% if loop.first and system %}"
    "{% set text = '<<SYS>>\\n' + system.strip() + '\\n<</SYS>>\\n\\n' + turn['content'] %}"
    "{% else %}{% set text = turn['content'] %}{% endif %}"
    "{% if turn['role'] == 'user' %}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + text.strip() + ' ' + eos_token }}{% endif %}"
    "{% endfor %}")

# Uses all that a template may ask of its host: loop controls, namespaces, macros, tojson, raise_exception, the time
# (only its century, so that the answer lasts) and the trimming of block lines.
HOST_FEATURES_TEMPLATE = r"""{# A template that leans on its host. #}
{% macro turn(role, text) %}
<|im_start|>{{ role }}
{{ text }}<|im_end|>
{% endmacro %}
{% set state = namespace(system='You answer briefly.', users=0) %}
{% for message in messages %}
    {% if message.role != 'system' %}
        {% break %}
    {% endif %}
    {% set state.system = message.content %}
{% endfor %}
{{ turn('system', state.system ~ '\nCentury: ' ~ strftime_now('%Y')[:2] ~ '00s') -}}
{% if tools %}
    {% for tool in tools %}
<tool>{{ tool.function | tojson }}</tool>
    {% endfor %}
{% endif %}
{% for message in messages %}
    {% if message.role == 'system' %}
        {% if not loop.first %}
            {{ raise_exception('Only the first message can be a system message, not message ' ~ loop.index) }}
        {% endif %}
        {% continue %}
    {% endif %}
    {% if message.role == 'user' %}
        {% set state.users = state.users + 1 %}
    {% endif %}
    {% if message.tool_calls is defined and message.tool_calls %}
        {% for call in message.tool_calls %}
{{ turn('assistant', '<call>' ~ (call.function | tojson) ~ '</call>') -}}
        {% endfor %}
    {% else %}
{{ turn(message.role, message.content) -}}
    {% endif %}
{% endfor %}
{% if not state.users %}
    {{ raise_exception('No user message found.') }}
{% endif %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""


def builtin_llama3_text(messages):
    """The prompt that a Llama 3 checkpoint without a template expects; no system text is invented."""
    header = "<|start_header_id|>{}<|end_header_id|>\n\n".format
    turns = "".join(header(turn["role"]) + turn["content"].strip() + "<|eot_id|>" for turn in messages)
    return "<|begin_of_text|>" + turns + header("assistant")


def builtin_chatml_text(messages):
    """The prompt that a ChatML checkpoint without a template expects; no system text is invented."""
    turns = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in messages)
    return turns + "<|im_start|>assistant\n"


# ==============================================================================
# Models -- the reference checkpoints, and what each is there for
# uses: Checkpoint, Templates
# ==============================================================================

LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 256}

MODELS = {
    # Llama 3.2: tied, 4 query heads a KV head, llama3 rope scaling in the older spelling, the model's own template.
    # Of its four frequencies one is kept, one lies in the smoothed band and two are divided by the factor.
    "llama3-tied": dict(
        hidden_size=48, intermediate_size=80, num_attention_heads=8, num_kv_heads=2, head_dim=8, vocab_size=304,
        rope={"rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE}, chat_template=LLAMA3_TEMPLATE),
    # Llama 2: untied, as many KV heads as query heads, float16, SentencePiece-like; config.json leaves out
    # num_key_value_heads, head_dim and rope_theta, as the first Llama checkpoints do.
    "llama2-untied": dict(
        hidden_size=32, intermediate_size=64, num_attention_heads=4, vocab_size=368, dtype="float16", tied=False,
        rope={}, rms_norm_eps=1e-6, tokenizer="llama2", chat_template=LLAMA2_TEMPLATE),
    # SmolLM2: tied, 3 query heads a KV head, linear rope scaling under the oldest key "type", float32, no template.
    "smollm2": dict(
        hidden_size=48, intermediate_size=48, num_attention_heads=6, num_kv_heads=2, vocab_size=288, dtype="float32",
        rope={"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 2.5}}, tokenizer="chatml"),
    # Untied, biases everywhere, head_dim that hidden_size does not give, the newer "rope_parameters", shards, and the
    # template in a file of its own.
    "sharded-biased": dict(
        hidden_size=48, intermediate_size=64, num_attention_heads=4, num_kv_heads=2, head_dim=8,
        vocab_size=288, tied=False, bias=True, shards=3, tokenizer="chatml", chat_template_file=HOST_FEATURES_TEMPLATE,
        rope={"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    # Llama 3 without a template, and rope_scaling there but null.
    "llama3-builtin": dict(
        hidden_size=32, intermediate_size=64, num_attention_heads=4, num_kv_heads=2, vocab_size=288,
        rope={"rope_theta": 500000.0, "rope_scaling": None}),
}

# {model: function} for the models whose prompt no template of theirs gives.
BUILTIN_FORMATS = {"smollm2": builtin_chatml_text, "llama3-builtin": builtin_llama3_text}

PROMPT_LENGTHS = (5, 37, 150)
OUTPUT_LENGTH = 64

# Every position of the shortest prompt has its logits stored, and every 32nd (and the last) of the others.
LONG_PROMPT_STRIDE = 32

# Greedy output is fair to ask for only where rounding cannot swap the first two tokens: their distance over
# max|logits| must be well above the 1e-4 that logits may differ by.
LEAST_MARGIN = 5e-4
LEAST_VARIETY = 24

TEXTS = [
    "The river runs down to the sea.", "It isn't, we'll, THEY'RE, you'd", "1998 12345678 3.14 007",
    "for index in range(10):\n    print(index)\n\n\n\tdone", " leading", "trailing ", "   three   spaces   ", "\n", " ",
    "a\r\nb\rc\u00a0d\u3000e", "Über die Brücke, où est la rivière, el niño sonríe", "Река течёт к морю",
    "川は海へ流れる。河水流向大海。", "नमस्ते दुनिया", "مرحبا بالعالم", "שלום עולם", "สวัสดีชาวโลก",
    "👩‍👩‍👧‍👦 👍🏽 🇨🇭 ❤️", "e\u0301 vs é, ﬁ, Ⅷ, \u200b, \ufeff", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0010fffd",
    "\u0000\u0001\u007f", "▁ ▁a Ġ Ċ <0x0A>",
    "$\\frac{1}{2}$ {\"key\": [1, null]} <b>&amp;</b>", "qzaaa the qzaab", "",
]

CONVERSATIONS = [
    [("user", "What runs to the sea?")],
    [("system", "You are a river."), ("user", "Where do you run?")],
    [("system", "  Be brief.\n"), ("user", "\n\n  Hello!  "), ("assistant", "  Hi.\n"), ("user", "Again\tplease \n")],
    [("user", "Où est 川?"), ("assistant", "Près de 👩‍👩‍👧‍👦, naïve."),
     ("user", "Что ещё? \"quoted\" <b>&amp;</b> {{ x }}")],
    [("user", "")],
    [("user", "One"), ("assistant", "Two"), ("user", "Three"), ("assistant", "Four"), ("user", "Five")],
]

REFUSED_CONVERSATIONS = {
    "llama2-untied": [[("user", "One"), ("user", "Two")]],
    "sharded-biased": [[("user", "One"), ("system", "Two")], [("system", "Only this")]],
}

TOOLS = [{"type": "function", "function": {
    "name": "get_weather", "description": "Weather in a town, in °C; \"now\" & <later>",
    "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]}}}]
TOOL_CONVERSATION = [
    {"role": "user", "content": "Weather in Genève?"},
    {"role": "assistant", "content": "", "tool_calls": [
        {"id": "call_1", "type": "function",
         "function": {"name": "get_weather", "arguments": {"town": "Genève", "days": [1, 2.5], "exact": True}}}]},
    {"role": "tool", "tool_call_id": "call_1", "content": "{\"celsius\": 11}"},
]
TOOL_MODELS = ("llama3-tied", "sharded-biased")


# ==============================================================================
# Answers from transformers -- greedy tokens, logits, token ids, texts
# uses: Models
# ==============================================================================


def load_model(folder):
    """The checkpoint in `folder` as transformers loads it, in float32 with plain attention."""
    import torch
    from transformers import LlamaForCausalLM
    torch.set_num_threads(1)
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def special_ids(folder):
    """Ids of the special tokens of the tokenizer in `folder`."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return [token["id"] for token in tokenizer["added_tokens"]]


def prompts(folder, seed):
    """Random token ids of each prompt length, beginning-of-text first, without other special tokens."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    rng = np.random.default_rng(seed)
    text_ids = np.setdiff1d(np.arange(config["vocab_size"]), special_ids(folder))
    return [[config["bos_token_id"], *rng.choice(text_ids, length - 1).tolist()] for length in PROMPT_LENGTHS]


def run_greedy(model, prompt):
    """(prompt, the 64 most likely next tokens with eos ignored, float32 logits (P + 64, V) of one pass over both)."""
    import torch
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(OUTPUT_LENGTH):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        logits = model(torch.tensor([ids])).logits[0].numpy()
        generated = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=OUTPUT_LENGTH)[0].tolist()
    output = ids[len(prompt):]
    # generate() works from a KV cache and stops at eos; up to there both ways must agree.
    if generated != ids[:len(generated)]:
        raise RuntimeError(f"generate() and repeated passes differ: {generated[len(prompt):]} and {output}")
    return prompt, output, logits


def least_margin(prompt, output, logits):
    """The least distance between the first two logits of the steps that chose `output`, over max|logits|."""
    steps = np.sort(logits[len(prompt) - 1:len(prompt) - 1 + len(output)], axis=1)
    return float((steps[:, -1] - steps[:, -2]).min() / np.abs(logits).max())


def output_logprobs(prompt, output, logits):
    """The natural log-probability (64,) of each output token, in float64."""
    steps = np.float64(logits[len(prompt) - 1:len(prompt) - 1 + len(output)])
    steps -= steps.max(1, keepdims=True)
    return steps[np.arange(len(output)), output] - np.log(np.exp(steps).sum(1))


def write_arrays(path, runs, first_stride=1):
    """Write reference.npz."""
    arrays = {}
    for i, (prompt, output, logits) in enumerate(runs):
        stride = first_stride if i == 0 else LONG_PROMPT_STRIDE
        positions = np.unique([*range(0, len(logits), stride), len(prompt) - 1, len(logits) - 1])
        arrays |= {f"prompt_token_ids_{i}": np.int32(prompt), f"output_token_ids_{i}": np.int32(output),
                   f"positions_{i}": np.int32(positions), f"logits_{i}": np.float32(logits[positions]),
                   f"logprobs_{i}": np.float32(output_logprobs(prompt, output, logits))}
    np.savez_compressed(path, **arrays)


def write_answers(path, answers):
    """Write reference.json with one line for each value or list element."""
    def compact(value):
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    lines = []
    for key, value in answers.items():
        listed = isinstance(value, list) and value and isinstance(value[0], dict)
        body = "[\n" + ",\n".join(compact(item) for item in value) + "\n]" if listed else compact(value)
        lines.append(f"{compact(key)}:{body}")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def special_spellings(folder):
    """The special tokens of the tokenizer in `folder` as they are spelled."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return [token["content"] for token in tokenizer["added_tokens"]]


def texts_for(specials):
    """The common texts, and three that contain spellings of `specials`."""
    return [*TEXTS, specials[-1], f"before{specials[1]}after", f" {specials[0]} \n{specials[1]}{specials[2]} the end"]


def encode_answer(tokenizer, text):
    """One element of "texts"."""
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    return {"text": text, "ids": ids, "special_ids": tokenizer.encode(text, add_special_tokens=False),
            "decoded": tokenizer.decode(ids, skip_special_tokens=True)}


def id_sequences(tokenizer, specials):
    """Id sequences to decode: cut emoji, joined texts around a special token, random bytes, random ids."""
    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    emoji, rng = encode("👩‍👩‍👧‍👦 é"), np.random.default_rng(7)
    cut = [emoji[:end] for end in range(1, 8)] + [emoji[start:] for start in (1, 2, 3, 5)]
    joined = [encode("The sea") + [specials[1]] + encode(" and 川") + [specials[2]] + encode("done")]
    bytes_only = sorted({i for byte in range(0x80, 0xC0) for i in encode(chr(byte) + chr(byte * 1000))})
    random_bytes = [rng.choice(bytes_only, 12).tolist() for _ in range(8)]
    return cut + joined + random_bytes + [rng.integers(0, len(tokenizer), 24).tolist() for _ in range(12)]


def decode_answer(tokenizer, ids):
    """One element of "decodes"."""
    return {"ids": ids, "text": tokenizer.decode(ids, skip_special_tokens=True),
            "special_text": tokenizer.decode(ids, skip_special_tokens=False)}


def prompt_answer(name, tokenizer, messages, tools=None):
    """Text and ids of the prompt for `messages`, or the error of the template."""
    from jinja2.exceptions import TemplateError
    if name in BUILTIN_FORMATS:
        text = BUILTIN_FORMATS[name](messages)
        return {"text": text, "ids": tokenizer.encode(text, add_special_tokens=False)}
    options = {"tools": tools, "add_generation_prompt": True}
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except TemplateError as error:
        return {"error": str(error)}
    return {"text": text, "ids": tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)}


def conversation_answers(name, tokenizer):
    """The list "conversations" of model `name`."""
    spoken = [[{"role": role, "content": content} for role, content in turns]
              for turns in CONVERSATIONS + REFUSED_CONVERSATIONS.get(name, [])]
    answers = [{"messages": messages, **prompt_answer(name, tokenizer, messages)} for messages in spoken]
    if name in TOOL_MODELS:
        answers.append({"messages": TOOL_CONVERSATION, "tools": TOOLS,
                        **prompt_answer(name, tokenizer, TOOL_CONVERSATION, TOOLS)})
    return answers


def text_answers(name, folder):
    """What transformers' tokenizer says of the checkpoint in `folder`, as three lists of dicts and added_ids.

    texts: text, ids (spellings of special tokens are plain text, no bos), special_ids (the spellings are the tokens,
    no bos), decoded (of ids, special tokens skipped). added_ids: what the post-processor puts in front of a text.
    decodes: ids, text (special tokens skipped), special_text (not skipped); ids need not be valid UTF-8.
    conversations: messages, perhaps tools, then text and ids of the prompt, or error, the message of the template.
    """
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return {"added_ids": tokenizer.encode(""),
            "texts": [encode_answer(tokenizer, text) for text in texts_for(special_spellings(folder))],
            "decodes": [decode_answer(tokenizer, ids) for ids in id_sequences(tokenizer, special_ids(folder))],
            "conversations": conversation_answers(name, tokenizer)}


def find_fair_seed(name):
    """Write the checkpoint with the first seed whose greedy output is varied and clear; return (seed, greedy runs)."""
    for seed in range(200):
        folder = random_checkpoint(FOLDER / name, **MODELS[name], seed=seed)
        model = load_model(folder)
        runs = [run_greedy(model, prompt) for prompt in prompts(folder, seed)]
        varied = all(len(set(output)) >= LEAST_VARIETY for _, output, _ in runs)
        if varied and all(least_margin(*run) >= LEAST_MARGIN for run in runs):
            return seed, runs
    raise RuntimeError(f"{name}: none of 200 seeds gives margins of {LEAST_MARGIN} and varied output")


def make_reference(name):
    """Rewrite the folder of model `name`: checkpoint and answers."""
    import transformers
    transformers.utils.logging.disable_progress_bar()
    folder = FOLDER / name
    for path in folder.glob("*"):
        path.unlink()
    seed, runs = find_fair_seed(name)
    margins = [round(least_margin(*run), 7) for run in runs]
    write_arrays(folder / "reference.npz", runs)
    write_answers(folder / "reference.json", {"transformers": transformers.__version__, "seed": seed,
                                              "margins": margins, **text_answers(name, folder)})
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{name}: seed {seed}, least margin {min(margins):.1e}, {size // 1024} KiB", flush=True)


DEMO_QUESTIONS = ("Tell me a story about a fox.", "What is Rust?", "Write a haiku about the sea.", "Tell me a joke.",
                  "Count to 10.", "Who are you?", "What is a KV cache?", "What is the capital of Japan?")


def make_demo_reference():
    """Answers for the demo model, to the first three questions whose 64 tokens (eos ignored) are chosen clearly."""
    import transformers
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(DEMO), load_model(DEMO)
    runs = []
    for question in DEMO_QUESTIONS:
        prompt = prompt_answer("demo", tokenizer, [{"role": "user", "content": question}])["ids"]
        run = run_greedy(model, prompt)
        if least_margin(*run) >= LEAST_MARGIN:
            runs.append(run)
    folder = FOLDER / "demo"
    folder.mkdir(exist_ok=True)
    write_arrays(folder / "reference.npz", runs[:3], LONG_PROMPT_STRIDE)
    write_answers(folder / "reference.json", {"transformers": transformers.__version__,
                                              "margins": [round(least_margin(*run), 7) for run in runs[:3]],
                                              **text_answers("demo", DEMO)})
    print(f"demo: {len(runs)} of {len(DEMO_QUESTIONS)} questions are clear", flush=True)


def main(names):
    """Rewrite the references of `names`, or of all models and the demo."""
    for name in names or (*MODELS, "demo"):
        make_demo_reference() if name == "demo" else make_reference(name)


if __name__ == "__main__":
    main(sys.argv[1:])
