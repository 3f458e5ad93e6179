"""read_folder - the logits of a folder that another program wrote, in float64.

     python3 read_folder.py DIR [LENGTH [full|causal|BLOCK]]
     python3 read_folder.py DIR --against OTHER     reads OTHER's ids, compares logits

DIR has config.json and safetensors with the names of LLaMA, Qwen2, Qwen3, SDAR, Dream,
Fast_dLLM_Qwen, a2d-*, LLaDA, MDLM or BD3-LM.  Its tensors must be those that config.json
asks for, no more and no less, with the right shapes.  ids.i32 holds sequences of LENGTH
tokens (all in one by default); logits.f64 is written beside it.  Without a pattern
config.json decides: block_size or bd_size, then what is usual for model_type.
--against prints the largest difference over the largest logit, infinities apart."""
import os
import sys

import numpy as np

import folders
import forward as f

AUTOREGRESSIVE = ("llama", "qwen2", "qwen3")


def pattern_of(c, word):
    if word:
        return (word, 0) if word in ("full", "causal") else ("block", int(word))
    block = c.get("block_size") or c.get("bd_size")
    if block:
        return "block", block
    return ("causal" if c["model_type"] in AUTOREGRESSIVE else "full"), 0


def wanted(c, t):
    """The names and shapes that config.json asks for."""
    if c["model_type"] == "llada":
        return folders.llada_shapes(c)
    if c["model_type"] in ("mdlm", "bd3lm"):
        shapes = folders.dit_shapes("backbone.", c["hidden_dim"], c["n_blocks"],
                                    t["backbone.sigma_map.mlp.0.bias"].size)
        shapes["backbone.rotary_emb.inv_freq"] = (c["hidden_dim"] // c["n_heads"] // 2,)
        shapes.update((n, ()) for n in t if n.startswith("sampling_eps_"))
        return shapes
    return folders.hf_shapes(
        c, qkv_bias=c["model_type"] in ("qwen2", "a2d-qwen2", "Dream", "Fast_dLLM_Qwen"),
        qk_norm=c["model_type"] in ("qwen3", "a2d-qwen3", "sdar"),
        head=not c.get("tie_word_embeddings", False))


def logits(path, ids, word=None):
    c, t = f.read_folder(path)
    want, have = wanted(c, t), {n: x.shape for n, x in t.items()}
    for name in sorted(set(want) | set(have)):
        if want.get(name) != have.get(name):
            sys.exit("%s: %s is %s, wanted %s" % (path, name, have.get(name, "absent"),
                                                  want.get(name, "none")))
    seen = f.visible(*pattern_of(c, word), ids.shape[1])
    if c["model_type"] in ("mdlm", "bd3lm"):
        return np.stack([f.dit(x, t, "backbone.", c["n_blocks"], c["n_heads"], seen)
                         for x in ids])
    kind = f.llada_parameters if c["model_type"] == "llada" else f.hf_parameters
    return np.stack([f.gated(x, kind(c, t), seen) for x in ids])


def against(path, other):
    with open(os.path.join(other, "expect")) as file:
        expect = dict(word.split("=") for word in file.read().split())
    ids = np.fromfile(os.path.join(other, "ids.i32"), "<i4")
    ids = ids.reshape(int(expect["sequences"]), -1)
    word = expect["block"] if expect["pattern"] == "block" else expect["pattern"]
    got, want = logits(path, ids, word), np.fromfile(os.path.join(other, "logits.f64"))
    finite, got = np.isfinite(want), got.ravel()
    print("%.3g" % (np.abs(got - want)[finite].max() / np.abs(want[finite]).max()))


def main(path, *more):
    if more[:1] == ("--against",):
        return against(path, more[1])
    ids = np.fromfile(os.path.join(path, "ids.i32"), "<i4")
    ids = ids.reshape(-1, int(more[0]) if more else ids.size)
    rows = logits(path, ids, *more[1:])
    rows.astype("<f8").tofile(os.path.join(path, "logits.f64"))
    return None


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
