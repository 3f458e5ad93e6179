"""forward - small language models in float64 with numpy, and the files they come in.

Everything here is written from the definitions of the architectures: nothing is folded,
nothing is fused, every matrix is [out, in] and every row is computed alone.  folders.py,
read_folder.py and check_forward.py use it; it needs Python 3 and numpy.
A row of logits belongs to the token of the same index: no shift is applied."""
import json
import os
import struct

import numpy as np

# --[ safetensors ]-------------------------------------------------------------


def pack(x, dtype):
    """The bytes of x in a file's type, rounded to nearest, ties to even."""
    if dtype != "BF16":
        return x.astype({"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8"}[dtype]
                        ).tobytes()
    bits = x.astype("<f4").view("<u4").astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").tobytes()


def unpack(raw, dtype, shape):
    if dtype == "BF16":
        x = (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
    else:
        x = np.frombuffer(raw, {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype])
    return x.astype(np.float64).reshape(shape)


def write_tensors(path, tensors, dtype, types={}, metadata={"format": "pt"}, order=None,
                  spaces=0):
    """Writes a file.  Header keys are sorted; `order` is that of the data; types[name]
    overrides dtype; metadata "absent" leaves the entry out; spaces pad the header."""
    entries, data, at = {}, [], 0
    for name in order or sorted(tensors):
        kind = types.get(name, dtype)
        raw = pack(tensors[name], kind)
        entries[name] = {"dtype": kind, "shape": list(tensors[name].shape),
                         "data_offsets": [at, at + len(raw)]}
        data.append(raw)
        at += len(raw)
    header = {} if metadata == "absent" else {"__metadata__": metadata}
    header.update((name, entries[name]) for name in sorted(entries))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8 + spaces)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + b"".join(data))


def read_tensors(path):
    """As strict as the reference reader: no gap, no overlap, nothing behind the data."""
    with open(path, "rb") as f:
        size = struct.unpack("<Q", f.read(8))[0]
        text, data = f.read(size), f.read()
    assert text[:1] == b"{" and size < 100 << 20, path + ": not a header"
    header = json.loads(text)
    header.pop("__metadata__", None)
    tensors, at = {}, 0
    for name, e in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = e["data_offsets"]
        assert begin == at and end <= len(data), path + ": offsets of " + name
        tensors[name] = unpack(data[begin:end], e["dtype"], e["shape"])
        at = end
    assert at == len(data), path + ": bytes behind the tensors"
    return tensors


def read_folder(path):
    """config.json and all tensors of a folder, of one file or of several."""
    with open(os.path.join(path, "config.json")) as f:
        config = json.load(f)
    index = os.path.join(path, "model.safetensors.index.json")
    names = {"model.safetensors"}
    if os.path.exists(index):
        with open(index) as f:
            names = set(json.load(f)["weight_map"].values())
    tensors = {}
    for name in sorted(names):
        tensors.update(read_tensors(os.path.join(path, name)))
    return config, tensors


# --[ layers ]------------------------------------------------------------------


def rms_norm(x, gain, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * gain


def layer_norm(x, gain, bias, eps):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * gain + bias


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    """The tanh form: nn.GELU(approximate="tanh"), and gelu_new of GPT-2."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x ** 3)))


def linear(x, w, bias=None):
    return x @ w.T if bias is None else x @ w.T + bias


def rotate(x, theta, interleaved=False):
    """x (T, heads, D): the pair (i, i + D/2) of position t turns by t theta^(-2i/D);
    interleaved, the pair (2i, 2i + 1) does."""
    T, _, D = x.shape
    angle = np.outer(np.arange(T), theta ** (-np.arange(0, D, 2) / D))[:, None, :]
    cos, sin = np.cos(angle), np.sin(angle)
    out = np.empty_like(x)
    first, second = (slice(0, D, 2), slice(1, D, 2)) if interleaved else \
        (slice(0, D // 2), slice(D // 2, D))
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., first] * sin + x[..., second] * cos
    return out


def visible(pattern, block, T):
    """(T, T): may row i see key j."""
    i, j = np.arange(T)[:, None], np.arange(T)[None, :]
    return {"full": j >= 0 * i, "causal": j <= i,
            "block": j // max(block, 1) <= i // max(block, 1)}[pattern]


def attention(q, k, v, seen):
    """q (T, H, D), k and v (T, KV, D): query head h reads key head h / (H / KV)."""
    T, H, D = q.shape
    out = np.empty((T, H, D))
    for h in range(H):
        g = h // (H // k.shape[1])
        score = np.where(seen, q[:, h] @ k[:, g].T / np.sqrt(D), -np.inf)
        weight = np.exp(score - score.max(-1, keepdims=True))
        out[:, h] = weight / weight.sum(-1, keepdims=True) @ v[:, g]
    return out.reshape(T, H * D)


# --[ RMSNorm, rotary positions, SiLU-gated MLP ]-------------------------------


def gated(ids, p, seen):
    """LLaMA, Qwen2, Qwen3, SDAR, Dream, LLaDA, SMDM and their like.  p: embed, norm,
    head, heads, kv_heads, theta, eps, and layers, each with norm1, q, k, v, o, norm2,
    gate, up, down and, where there are some, biases *_bias and gains q_norm, k_norm."""
    x = p["embed"][ids]
    for w in p["layers"]:
        y = rms_norm(x, w["norm1"], p["eps"])
        q, k, v = (linear(y, w[n], w.get(n + "_bias")).reshape(len(ids), heads, -1)
                   for n, heads in (("q", p["heads"]), ("k", p["kv_heads"]),
                                    ("v", p["kv_heads"])))
        if "q_norm" in w:
            q, k = rms_norm(q, w["q_norm"], p["eps"]), rms_norm(k, w["k_norm"], p["eps"])
        q, k = (rotate(z, p["theta"], p.get("interleaved", False)) for z in (q, k))
        x = x + linear(attention(q, k, v, seen), w["o"], w.get("o_bias"))
        y = rms_norm(x, w["norm2"], p["eps"])
        x = x + linear(silu(linear(y, w["gate"])) * linear(y, w["up"]), w["down"])
    return linear(rms_norm(x, p["norm"], p["eps"]), p["head"])


HF_LAYER = {
    "norm1": "input_layernorm.weight", "norm2": "post_attention_layernorm.weight",
    "q": "self_attn.q_proj.weight", "q_bias": "self_attn.q_proj.bias",
    "k": "self_attn.k_proj.weight", "k_bias": "self_attn.k_proj.bias",
    "v": "self_attn.v_proj.weight", "v_bias": "self_attn.v_proj.bias",
    "o": "self_attn.o_proj.weight", "o_bias": "self_attn.o_proj.bias",
    "q_norm": "self_attn.q_norm.weight", "k_norm": "self_attn.k_norm.weight",
    "gate": "mlp.gate_proj.weight", "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight"}


def hf_parameters(c, t):
    """LLaMA, Qwen2, Qwen3 and what took their names, from config.json c, tensors t."""
    theta = c.get("rope_theta") or c.get("rope_parameters", {}).get("rope_theta", 1e4)
    return {"embed": t["model.embed_tokens.weight"], "norm": t["model.norm.weight"],
            "head": t.get("lm_head.weight", t["model.embed_tokens.weight"]),
            "heads": c["num_attention_heads"],
            "kv_heads": c.get("num_key_value_heads") or c["num_attention_heads"],
            "theta": float(theta), "eps": c["rms_norm_eps"],
            "layers": [{n: t["model.layers.%d.%s" % (i, name)]
                        for n, name in HF_LAYER.items()
                        if "model.layers.%d.%s" % (i, name) in t}
                       for i in range(c["num_hidden_layers"])]}


def llada_parameters(c, t):
    """LLaDA's OLMo-like names: ff_proj is the gate, ff_out of a block its way down."""
    names = {"norm1": "attn_norm", "norm2": "ff_norm", "q": "q_proj", "k": "k_proj",
             "v": "v_proj", "o": "attn_out", "gate": "ff_proj", "up": "up_proj",
             "down": "ff_out"}
    return {"embed": t["model.transformer.wte.weight"],
            "norm": t["model.transformer.ln_f.weight"],
            "head": t["model.transformer.ff_out.weight"], "heads": c["n_heads"],
            "kv_heads": c["n_kv_heads"], "theta": c["rope_theta"],
            "eps": c["rms_norm_eps"],
            "layers": [{n: t["model.transformer.blocks.%d.%s.weight" % (i, name)]
                        for n, name in names.items()} for i in range(c["n_layers"])]}


def smdm_parameters(layers, heads, t):
    """SMDM (lit-gpt): qkv fused head by head, and one query head for a key head; w1 is
    the gate, w3 the way down; the head has no row for the mask, the embedding has."""
    def layer(i):
        at = "transformer.h.%d." % i
        fused = t[at + "attn.attn.weight"]
        qkv = fused.reshape(heads, 3, -1, fused.shape[1])
        w = {n: qkv[:, k].reshape(-1, fused.shape[1]) for k, n in enumerate("qkv")}
        w.update(norm1=t[at + "norm_1.weight"], norm2=t[at + "norm_2.weight"],
                 o=t[at + "attn.proj.weight"], gate=t[at + "mlp.swiglu.w1.weight"],
                 up=t[at + "mlp.swiglu.w2.weight"], down=t[at + "mlp.swiglu.w3.weight"])
        return w
    return {"embed": t["transformer.wte.weight"], "norm": t["transformer.ln_f.weight"],
            "head": t["lm_head.weight"], "heads": heads, "kv_heads": heads,
            "theta": 1e4, "eps": 1e-5, "layers": [layer(i) for i in range(layers)]}


# --[ the diffusion transformer of MDLM, BD3-LM and RADD ]----------------------


def condition(t, prefix):
    """silu(sigma_map(0)): cos(0) is 1 and sin(0) is 0 at all 128 frequencies each."""
    x = np.concatenate([np.ones(128), np.zeros(128)])
    x = silu(linear(x, t[prefix + "sigma_map.mlp.0.weight"],
                    t[prefix + "sigma_map.mlp.0.bias"]))
    return silu(linear(x, t[prefix + "sigma_map.mlp.2.weight"],
                       t[prefix + "sigma_map.mlp.2.bias"]))


def dit(ids, t, prefix, blocks, heads, seen):
    """Nothing folded.  With adaLN a norm's output is modulated, y (1 + scale) + shift,
    and a branch is multiplied by its gate; without it (RADD) norms have a bias."""
    live = prefix + "sigma_map.mlp.0.weight" in t
    c = condition(t, prefix) if live else None

    def modulation(at, parts):
        if not live:                                   # gates 1, shifts and scales 0
            return (np.arange(parts)[:, None] % 3 == 2) * 1.0
        return linear(c, t[at + "adaLN_modulation.weight"],
                      t[at + "adaLN_modulation.bias"]).reshape(parts, -1)

    def norm(x, name, shift, scale):
        bias = t.get(name + ".bias", 0)
        return layer_norm(x, t[name + ".weight"], bias, 1e-5) * (1 + scale) + shift

    x = t[prefix + "vocab_embed.embedding"][ids]
    for i in range(blocks):
        at = "%sblocks.%d." % (prefix, i)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation(at, 6)
        qkv = linear(norm(x, at + "norm1", shift1, scale1), t[at + "attn_qkv.weight"])
        q, k, v = qkv.reshape(len(ids), 3, heads, -1).transpose(1, 0, 2, 3)
        y = attention(rotate(q, 1e4), rotate(k, 1e4), v, seen)
        x = x + gate1 * linear(y, t[at + "attn_out.weight"])
        y = linear(norm(x, at + "norm2", shift2, scale2), t[at + "mlp.0.weight"],
                   t[at + "mlp.0.bias"])
        x = x + gate2 * linear(gelu(y), t[at + "mlp.2.weight"], t[at + "mlp.2.bias"])
    shift, scale = modulation(prefix + "output_layer.", 2)
    return linear(norm(x, prefix + "output_layer.norm_final", shift, scale),
                  t[prefix + "output_layer.linear.weight"],
                  t[prefix + "output_layer.linear.bias"])
