"""Make the demo model: train a small Llama on the dialogues of dialogues.py and write a Hugging Face checkpoint.

    python demo/train.py            needs torch, tokenizers, safetensors and less than an hour on two cores

The same seed and number of steps give the same bytes on the same machine. Letters in shapes: B rows, T tokens,
C hidden_size, H query heads, K key-value heads, D head_dim, F intermediate_size, V vocab_size.
"""
import argparse
import json
import math
import random
import re
import time
from pathlib import Path
from typing import NamedTuple

import dialogues
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn

BOS, END, PAD, EOM, EOT = ("<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|eom_id|>",
                           "<|eot_id|>")
SPECIALS = [BOS, END, PAD, "<|start_header_id|>", "<|end_header_id|>", EOM, EOT, "<|python_tag|>"]
# A space, a digit and a run of newlines are tokens of their own: a word then has the same tokens wherever it stands,
# which makes copying it easy to learn.
SPLIT = r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]|[\r\n]+|[^\S\r\n]+"
VOCAB_SIZE = 1536
ROW_TOKENS = 4096  # tokens in a batch, padding included
LONGEST = 768      # tokens in a dialogue; longer ones are left out
PRACTICE = 120     # first steps, all on random copies (see copy_batch)


class Stage(NamedTuple):
    """A part of the training: its steps, the steps in which its rate would fall to nothing, and its dialogues."""

    steps: int
    horizon: int
    rate: float
    mixture: dict


def stages(steps):
    """One with all kinds of dialogues at a high rate; then two, from rounded weights, with more of what is hard."""
    early, late = round(steps * 25 / 48), round(steps * 13 / 48)
    last = steps - early - late
    return [Stage(early, round(1.6 * early), 6e-3, dialogues.EARLY), Stage(late, late, 2e-3, dialogues.LATE),
            Stage(last, last, 1.5e-3, dialogues.LAST)]


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer and configuration
# ----------------------------------------------------------------------------------------------------------------------
def tokenizer_texts(rng):
    """The texts that the byte pairs are learned from; names and words count extra, so that few are in pieces."""
    texts = []
    for i in range(20000):
        messages, tools = dialogues.conversation(rng)
        texts += [text for _, text in messages]
        if tools and i % 5 == 0:
            texts += re.split(r"<\|\w+\|>", dialogues.render(messages, tools))
    return texts + (dialogues.WORDS + dialogues.NAMES.train) * 20


def train_tokenizer(texts):
    """A byte-level BPE with Llama 3's special tokens after the learned ones."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIALS), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))])
    return tokenizer


def model_config(tokenizer):
    """config.json of a Llama 3 with llama3 RoPE scaling."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB_SIZE,
        "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 32, "hidden_act": "silu", "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 512},
        "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False,
        "bos_token_id": tokenizer.token_to_id(BOS),
        "eos_token_id": [tokenizer.token_to_id(name) for name in (END, EOM, EOT)],
        "torch_dtype": "bfloat16", "use_cache": True,
    }


# ----------------------------------------------------------------------------------------------------------------------
# Model
# ----------------------------------------------------------------------------------------------------------------------
def rope_tables(config, length):
    """Cosines and sines (T, D) of the llama3 scaled rotary embedding."""
    dim, scaling = config["head_dim"], config["rope_scaling"]
    frequency = config["rope_theta"] ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    frequency = (1 - smooth) * frequency / scaling["factor"] + smooth * frequency
    angle = torch.arange(length, dtype=torch.float64)[:, None] * torch.cat([frequency, frequency])
    return angle.cos().float(), angle.sin().float()


def rotate(x, cos, sin):
    """Turn queries or keys (..., T, D) by their position."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class Layer(nn.Module):
    """One Llama layer, its query, key and value rows in one matrix and its gate and up rows in another."""

    def __init__(self, config):
        super().__init__()
        self.q, self.kv, self.dim = (config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
        hidden, inter = config["hidden_size"], config["intermediate_size"]
        self.attention_norm = nn.Parameter(torch.ones(hidden))
        self.qkv = nn.Parameter(torch.randn((self.q + 2 * self.kv) * self.dim, hidden) * .04)
        self.out = nn.Parameter(torch.zeros(hidden, self.q * self.dim))  # (C, H * D)
        self.mlp_norm = nn.Parameter(torch.ones(hidden))
        self.gate_up = nn.Parameter(torch.randn(2 * inter, hidden) * .04)
        self.down = nn.Parameter(torch.zeros(hidden, inter))

    def attend(self, x, cos, sin):
        """Causal attention of x (B, T, C), before the output matrix: (B, T, H * D)."""
        rows, length, hidden = x.shape
        y = F.linear(F.rms_norm(x, (hidden,), self.attention_norm, 1e-5), self.qkv)
        y = y.view(rows, length, -1, self.dim).transpose(1, 2)
        turned = rotate(y[:, :self.q + self.kv], cos, sin)
        keys = turned[:, self.q:].repeat_interleave(self.q // self.kv, 1)
        values = y[:, self.q + self.kv:].repeat_interleave(self.q // self.kv, 1)
        y = F.scaled_dot_product_attention(turned[:, :self.q], keys, values, is_causal=True)
        return y.transpose(1, 2).reshape(rows, length, -1)

    def mlp(self, x):
        gate, up = F.linear(F.rms_norm(x, x.shape[-1:], self.mlp_norm, 1e-5), self.gate_up).chunk(2, -1)
        return F.linear(F.silu(gate) * up, self.down)


class Llama(nn.Module):
    """The model, for training: no cache, and logits only where they are asked for."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Parameter(torch.randn(config["vocab_size"], config["hidden_size"]) * .02)  # (V, C), tied
        self.layers = nn.ModuleList(Layer(config) for _ in range(config["num_hidden_layers"]))
        self.norm = nn.Parameter(torch.ones(config["hidden_size"]))
        self.cos, self.sin = rope_tables(config, LONGEST)

    def forward(self, ids, keep):
        """Logits (n, V) after the n tokens of ids (B, T) where keep (B, T) is true."""
        cos, sin = self.cos[:ids.shape[1]], self.sin[:ids.shape[1]]
        x = F.embedding(ids, self.embed)
        for layer in self.layers:
            attended = layer.attend(x, cos, sin)
            if layer is self.layers[-1]:  # what follows is only needed where there are logits
                x, attended = x[keep], attended[keep]
            x = x + F.linear(attended, layer.out)
            x = x + layer.mlp(x)
        return F.linear(F.rms_norm(x, x.shape[-1:], self.norm, 1e-5), self.embed)

    def tensors(self):
        """The weights under Hugging Face's names, in bfloat16."""
        out = {"model.embed_tokens.weight": self.embed, "model.norm.weight": self.norm}
        for i, layer in enumerate(self.layers):
            query, key, value = layer.qkv.split([n * layer.dim for n in (layer.q, layer.kv, layer.kv)])
            gate, up = layer.gate_up.chunk(2)
            parts = {"input_layernorm": layer.attention_norm, "post_attention_layernorm": layer.mlp_norm,
                     "self_attn.q_proj": query, "self_attn.k_proj": key, "self_attn.v_proj": value,
                     "self_attn.o_proj": layer.out,
                     "mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": layer.down}
            out |= {f"model.layers.{i}.{name}.weight": tensor for name, tensor in parts.items()}
        return {name: tensor.detach().bfloat16().contiguous().clone() for name, tensor in out.items()}


@torch.no_grad()
def preset_copying(model):
    """Start two heads as those that copying needs (Olsson et al. 2022, 2209.11895); training then only refines them.

    Head 0 of layer 0 attends to the previous token and writes what it was; head 0 of layer 1 attends to a token whose
    previous token is the one at hand, and writes that token. Without this start, copying takes most of the training.
    """
    first, second = model.layers[0], model.layers[1]
    hidden, dim = model.embed.shape[1], first.dim
    key, value = first.q * dim, (first.q + first.kv) * dim  # where head 0's keys and values start in `qkv`
    frequency = model.config["rope_theta"] ** -(torch.arange(0, dim, 2) / dim)
    model.embed[:, 0] = .02 * math.sqrt(hidden)  # a direction that all tokens share, so that position alone decides
    first.qkv[:dim] *= .1
    first.qkv[key:key + dim] *= .1
    strength = math.sqrt(22 * math.sqrt(dim) / (hidden / 2))
    first.qkv[:dim, 0] = strength * torch.cat([frequency.cos(), -frequency.sin()])  # turned back by one position
    first.qkv[key:key + dim, 0] = strength * torch.cat([torch.ones(dim // 2), torch.zeros(dim // 2)])

    content, slot, output = (torch.linalg.qr(torch.randn(hidden, dim))[0].T for _ in range(3))  # (D, C) each
    for basis in (content, slot, output):
        basis[:, 0] = 0
    for half in (0, dim // 2):
        content[half:half + 7] = 0  # leaves the pairs that turn slowly, so that distance matters little
    first.qkv[value:value + dim] = content
    first.out[:, :dim] = .1 * slot.T
    second.qkv[:dim] = 2.2 * content
    second.qkv[key:key + dim] = 2.2 * slot
    second.qkv[value:value + dim] = output
    second.out[:, :dim] = .3 * output.T


# ----------------------------------------------------------------------------------------------------------------------
# Batches
# ----------------------------------------------------------------------------------------------------------------------
def own_tokens(ids, assistant, header_end, eot):
    """Mark the tokens that the assistant writes: after its header's blank line, through <|eot_id|>."""
    own = [False] * len(ids)
    writing = False
    for i in range(2, len(ids)):
        own[i] = writing
        if ids[i] == eot:
            writing = False
        elif ids[i - 1] == header_end:  # this token is the blank line
            writing = ids[i - 2] == assistant
    return own


def dialogue_batches(rng, tokenizer, mixture, chunk=4000):
    """Yield (ids, keep) of dialogues of like length, without end; keep marks what the assistant writes."""
    assistant, header_end, eot, pad = (tokenizer.token_to_id(t) for t in ("assistant", "<|end_header_id|>", EOT, PAD))
    while True:
        texts = [dialogues.render(*dialogues.conversation(rng, mixture)) for _ in range(chunk)]
        rows = [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False) if len(e.ids) <= LONGEST]
        groups = [[]]
        for row in sorted(rows, key=len):
            if len(row) * (len(groups[-1]) + 1) > ROW_TOKENS:
                groups.append([])
            groups[-1].append(row)
        rng.shuffle(groups)
        for group in groups:
            width = max(map(len, group))
            ids = torch.tensor([row + [pad] * (width - len(row)) for row in group])
            keep = torch.tensor([own_tokens(row, assistant, header_end, eot) + [False] * (width - len(row))
                                 for row in group])
            yield ids, keep


def copy_batch(bos):
    """Random tokens twice: (ids, keep), where the second half, which is kept, can only be copied.

    The length varies, else a distance is learned in place of the content.
    """
    length = int(torch.randint(8, 65, ()))
    half = torch.randint(0, VOCAB_SIZE - len(SPECIALS), (2048 // (2 * length + 1), length))
    ids = torch.cat([torch.full((len(half), 1), bos), half, half], 1)
    keep = torch.zeros(ids.shape, dtype=torch.bool)
    keep[:, length + 2:] = True
    return ids, keep


def is_copy_step(step, stage):
    """Whether a step is on random copies: in the first stage all, then a third, then a few; later always a few."""
    share = 1 if step < PRACTICE else .3 if step < .35 * stage.horizon else .06
    if stage.mixture is not dialogues.EARLY:
        share = .06
    return torch.rand(()).item() < share


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------
def orthogonal(matrix):
    """The nearest matrix with singular values of about one, by five Newton-Schulz steps in float32."""
    x = matrix / (matrix.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (2.0315 * square @ square - 4.7750 * square) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal (Jordan et al. 2024), in float32: torch's own works in bfloat16, which
    is many times slower on a CPU without bfloat16 units."""

    def __init__(self, params, lr, momentum=.95, weight_decay=.05):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonal(p.grad.lerp(average, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-.2 * group["lr"] * math.sqrt(max(p.shape)))  # as large as AdamW's would be


def make_optimizers(model, rate):
    """Muon for the layers' matrices; AdamW at half the rate for the embedding and the norms."""
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    norms = [p for p in model.parameters() if p.ndim == 1]
    adam = torch.optim.AdamW([{"params": [model.embed], "weight_decay": .05}, {"params": norms, "weight_decay": 0.}],
                             lr=rate / 2, betas=(.9, .98))
    return [Muon(matrices, rate), adam]


def rate_share(step, horizon):
    """The learning rate as a share of its peak: it rises for 50 steps and falls as a cosine."""
    return min(1, (step + 1) / 50) * (.5 + .5 * math.cos(math.pi * step / horizon))


def train(model, batches, stage):
    """Take the steps of one stage."""
    optimizers = make_optimizers(model, stage.rate)
    rates = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: rate_share(step, stage.horizon)) for o in optimizers]
    losses, start = {False: 0., True: 0.}, time.time()
    for step in range(stage.steps):
        copy = is_copy_step(step, stage)
        ids, keep = copy_batch(model.config["bos_token_id"]) if copy else next(batches)
        loss = F.cross_entropy(model(ids[:, :-1], keep[:, 1:]), ids[keep])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.)
        for optimizer, rate in zip(optimizers, rates):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            rate.step()
        losses[copy] += .02 * (loss.item() - losses[copy]) if losses[copy] else loss.item()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}/{stage.steps}  loss {losses[False]:.4f}  copy loss {losses[True]:.3f}  "
                  f"{time.time() - start:.0f} s", flush=True)


@torch.no_grad()
def round_weights(model):
    """Round the weights as saving and loading them would."""
    for p in model.parameters():
        p.copy_(p.bfloat16())


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save(model, tokenizer, out):
    """Write the checkpoint: weights, tokenizer and configurations."""
    out.mkdir(parents=True, exist_ok=True)
    config = model.config
    save_file(model.tensors(), out / "model.safetensors", {"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    tokenizer.save(str(out / "tokenizer.json"))
    write_json(out / "config.json", config)
    write_json(out / "generation_config.json", {k: config[k] for k in ("bos_token_id", "eos_token_id")} |
               {"do_sample": False})
    write_json(out / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOT, "pad_token": PAD,
        "clean_up_tokenization_spaces": False, "model_max_length": config["max_position_embeddings"],
        "model_input_names": ["input_ids", "attention_mask"], "chat_template": dialogues.TEMPLATE})


def parse_args():
    parser = argparse.ArgumentParser(description="Make the demo model.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to")
    parser.add_argument("--steps", type=int, default=4800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; another number gives other rounding")
    return parser.parse_args()


def main():
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    tokenizer = train_tokenizer(tokenizer_texts(rng))
    model = Llama(model_config(tokenizer))
    preset_copying(model)
    print(f"{sum(p.numel() for p in model.parameters())} parameters", flush=True)
    for number, stage in enumerate(stages(args.steps)):
        if number:  # a stage starts afresh from what the one before has saved
            round_weights(model)
            torch.manual_seed(args.seed + number)
            rng = random.Random(args.seed + number)
        train(model, dialogue_batches(rng, tokenizer, stage.mixture), stage)
        save(model, tokenizer, args.out)


if __name__ == "__main__":
    main()
