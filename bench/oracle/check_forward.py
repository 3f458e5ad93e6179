"""check_forward - is forward.py right?  Two small real models answer.

     python3 check_forward.py DATA

DATA/tiny_qwen3 continues 1 2 with 76 112 63 76; DATA/stories260K, a LLaMA with rotary
pairs side by side, writes its author's text, and so does the same model with the rows
of q and k reordered to rotary halves."""
import os
import sys

import numpy as np

import forward as f


def greedy(p, ids, steps):
    for _ in range(steps):
        seen = f.visible("causal", 0, len(ids))
        ids = ids + [int(f.gated(np.array(ids), p, seen)[-1].argmax())]
    return ids


def stories(path):
    """llama2.c's version 0: seven sizes, then the tensors one kind after the other."""
    with open(path, "rb") as file:
        raw = file.read()
    dim, ffn, layers, heads, kv_heads, vocab, _ = np.frombuffer(raw, "<i4", 7)
    data, at = np.frombuffer(raw, "<f4", offset=28).astype(np.float64), 0
    kv = dim // heads * kv_heads

    def take(*shape):
        nonlocal at
        at += int(np.prod(shape))
        return data[at - int(np.prod(shape)):at].reshape(shape)
    embed, L = take(vocab, dim), layers
    kinds = {"norm1": take(L, dim), "q": take(L, dim, dim), "k": take(L, kv, dim),
             "v": take(L, kv, dim), "o": take(L, dim, dim), "norm2": take(L, dim),
             "gate": take(L, ffn, dim), "down": take(L, dim, ffn),
             "up": take(L, ffn, dim)}
    return {"embed": embed, "norm": take(dim), "head": embed, "heads": heads,
            "kv_heads": kv_heads, "theta": 1e4, "eps": 1e-5, "interleaved": True,
            "layers": [{n: kinds[n][i] for n in kinds} for i in range(layers)]}


def halves(w, heads):
    """Rows of a head from pairs side by side to halves: 0 2 4 ... 1 3 5 ..."""
    D = w.shape[0] // heads
    rows = np.concatenate([np.arange(0, D, 2), np.arange(1, D, 2)])
    return w.reshape(heads, D, -1)[:, rows].reshape(w.shape)


def pieces(path):
    with open(path, "rb") as file:
        raw, at, out = file.read(), 4, []
    while at < len(raw):
        size = int.from_bytes(raw[at + 4:at + 8], "little")
        out.append(raw[at + 8:at + 8 + size])
        at += 8 + size
    return out


def main(data):
    p = f.hf_parameters(*f.read_folder(os.path.join(data, "tiny_qwen3")))
    tiny = greedy(p, [1, 2], 4)
    print("tiny_qwen3:", *tiny)
    ok = tiny[2:] == [76, 112, 63, 76]
    at = os.path.join(data, "stories260K")
    p, tokens = stories(at + "/stories260K.bin"), pieces(at + "/tok512.bin")
    with open(at + "/greedy.txt", "rb") as file:
        want = file.read().strip()
    ids = greedy(p, [1], 60)
    for w in p["layers"]:
        w["q"], w["k"] = halves(w["q"], p["heads"]), halves(w["k"], p["kv_heads"])
    p["interleaved"] = False
    text = b"".join(tokens[i] for i in ids[1:]).strip()
    print("stories260K:", text.decode())
    ok = ok and len(text) > 100 and want.startswith(text) and greedy(p, [1], 60) == ids
    print("check_forward:", "ok" if ok else "FAILED")
    return not ok


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
