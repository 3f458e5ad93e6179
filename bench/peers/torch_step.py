#!/usr/bin/env python3
"""torch_step - the training step and the forward of bench_step's models, in PyTorch.

Run:   python3 bench/peers/torch_step.py [--threads 1] [--samples 7] [--models a,b,gpt2]
Needs: PyTorch 1.13 or later (Debian: python3-torch); dlm.h and its benches need none.

The same architecture as dlm.h with no_qk_norm: RMSNorm, half-split rotary positions,
grouped-query attention over the whole sequence, SwiGLU, tied head.  "step": half of
the tokens masked, logits of the masked rows only, cross-entropy, backward, clipping,
AdamW; "forward": T tokens, all logits, eager and traced; "_bf16": the eager ones under
torch.autocast, the loss in f32.  gpt2 is bench_step's gpt2_124M.  Set
MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000 before, or glibc
hands the activations back after every step, which costs PyTorch its speed."""
import argparse
import os
import statistics
import time

options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
options.add_argument("--threads", type=int, default=1)
options.add_argument("--samples", type=int, default=7)
options.add_argument("--models", default="a,b")
options = options.parse_args()
for library in ("OMP", "OPENBLAS", "BLIS", "MKL"):  # all read it when torch is loaded
    os.environ[library + "_NUM_THREADS"] = str(options.threads)

import torch
from torch import nn
from torch.nn import functional as F

SHAPES = {  # dim, layers, heads, kv heads, ffn, vocab, T, B
    "a": (64, 5, 8, 4, 172, 512, 256, 8),
    "b": (384, 6, 6, 6, 1024, 65, 256, 16),
    "gpt2": (768, 12, 12, 12, 2048, 50257, 64, 4),
}


class Norm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


def turn(x, cos, sin):
    """Rotates the pairs (i, i + half) of x (B, heads, T, D) by their positions."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def attend(q, k, v, head_dim):
    if hasattr(F, "scaled_dot_product_attention"):  # since 2.0
        return F.scaled_dot_product_attention(q, k, v)
    scores = q @ k.transpose(-2, -1) * head_dim ** -0.5
    return scores.softmax(-1) @ v


class Layer(nn.Module):
    def __init__(self, dim, heads, kv_heads, ffn):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim // heads
        self.norm1, self.norm2 = Norm(dim), Norm(dim)
        self.qkv = nn.Linear(dim, (heads + 2 * kv_heads) * self.head_dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.gate_up = nn.Linear(dim, 2 * ffn, bias=False)
        self.down = nn.Linear(ffn, dim, bias=False)

    def forward(self, x, cos, sin):
        B, T, C = x.shape
        H, KV, D = self.heads, self.kv_heads, self.head_dim
        qkv = self.qkv(self.norm1(x)).view(B, T, H + 2 * KV, D).transpose(1, 2)
        q, k, v = qkv.split([H, KV, KV], 1)
        q, k = turn(q, cos, sin), turn(k, cos, sin)
        if KV < H:
            k = k.repeat_interleave(H // KV, 1)
            v = v.repeat_interleave(H // KV, 1)
        x = x + self.out(attend(q, k, v, D).transpose(1, 2).reshape(B, T, C))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Model(nn.Module):
    def __init__(self, dim, layers, heads, kv_heads, ffn, vocab, T):
        super().__init__()
        self.embedding = nn.Embedding(vocab, dim)
        self.layers = nn.ModuleList(
            Layer(dim, heads, kv_heads, ffn) for _ in range(layers))
        self.norm = Norm(dim)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, 0.0, 0.02)
        half = dim // heads // 2
        rates = 10000.0 ** (-torch.arange(half).float() / half)
        angles = torch.outer(torch.arange(T).float(), rates)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def states(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        return self.norm(x)

    def head(self, states):
        return F.linear(states, self.embedding.weight)

    def forward(self, tokens):
        return self.head(self.states(tokens))


def bf16(enabled=True):
    return torch.autocast("cpu", torch.bfloat16, enabled)


def training_step(model, vocab, B, T, narrow=False):
    mask_id = vocab - 1
    text = torch.randint(0, mask_id, (B, T))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step():
        masked = torch.rand(B, T) < 0.5
        with bf16(narrow):
            states = model.states(text.masked_fill(masked, mask_id))
            logits = model.head(states[masked])
        loss = F.cross_entropy(logits.float(), text[masked])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return step


def measure(name, work, tokens, run):
    """Samples of at least 0.2 s after two calls to warm up; prints tokens per second."""
    run()
    start = time.perf_counter()
    run()
    calls = int(0.2 / (time.perf_counter() - start)) + 1
    rates = []
    for _ in range(options.samples):
        start = time.perf_counter()
        for _ in range(calls):
            run()
        rates.append(tokens * calls / (time.perf_counter() - start))
    print("%s,%s,%d,%.0f,%.0f,%.0f,%d" % (name, work, options.threads,
          statistics.median(rates), min(rates), max(rates), len(rates)), flush=True)


def measure_model(name):
    *sizes, vocab, T, B = SHAPES[name]
    model = Model(*sizes, vocab, T)
    print("# model    %s: %d parameters" % (name, sum(p.numel() for p in
                                                      model.parameters())))
    measure(name, "step", B * T, training_step(model, vocab, B, T))
    measure(name, "step_bf16", B * T, training_step(model, vocab, B, T, True))
    tokens = torch.randint(0, vocab, (1, T))
    model.eval()
    with torch.no_grad():
        measure(name, "forward", T, lambda: model(tokens))
        with bf16():
            measure(name, "forward_bf16", T, lambda: model(tokens))
        traced = torch.jit.freeze(torch.jit.trace(model, tokens))
        measure(name, "forward_traced", T, lambda: traced(tokens))


if __name__ == "__main__":
    torch.manual_seed(1)
    torch.set_num_threads(options.threads)
    print("# program  torch_step, PyTorch", torch.__version__)
    print("# threads ", options.threads)
    print("model,work,threads,tokens_per_s_median,tokens_per_s_min,tokens_per_s_max,"
          "samples")
    for model_name in options.models.split(","):
        measure_model(model_name)
