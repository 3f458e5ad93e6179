"""folders - random checkpoint folders of every family, with the logits they must give.

     python3 folders.py OUT

OUT/<family>/ is a folder as it is published, only small: config.json, safetensors and
what else the family has.  Beside it lie
  ids.i32      sequences x length token ids
  logits.f64   sequences x length x vocab, of the weights as the file stores them; row i
               is what the model says at position i, without any shift.  The column of a
               mask that its family can never predict (SUBS) is -infinity
  expect       one line: pattern=full|causal|block block=N shifted=0|1 mask=ID vocab=V
               sequences=N length=N say=NAME; mask=-1 is none; say names the layout that
               the caller must give since the files do not, or is -
OUT/refuse/<name>/ must be refused, with an error that holds the one line of `expect`.
tied-other-head is for a choice to be made and said: logits.f64 is by the head in the
file, logits.tied.f64 by the embedding that config.json says is the head.

Names, shapes and logits agree with the modelling code that published MDLM, BD3-LM, RADD,
SMDM, LLaDA and Dream (run in PyTorch, names matched strictly: 1e-15 to 6e-9 where
its arithmetic is f64, 4e-7 where parts are f32).  Not verified, for no published file
could be read: tokenizer files of Fast_dLLM_Qwen and open-dcoder beyond names and ids of
their masks; the floating-point type of SMDM's files; tensor names of GIDD and SEDD."""
import json
import os
import shutil
import sys

import numpy as np

import forward as f

V, MASK = 64, 61                       # unless a family says otherwise
SEQUENCES, LENGTH = 2, 12
QWEN_BASE = {
    "attention_dropout": 0.0, "bos_token_id": 58, "eos_token_id": 58,
    "hidden_act": "silu", "initializer_range": 0.02, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "sliding_window": None, "use_cache": True,
    "use_sliding_window": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0", "vocab_size": V}
QWEN3 = dict(QWEN_BASE, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
             num_attention_heads=4, num_key_value_heads=2, head_dim=16,
             attention_bias=False, max_position_embeddings=256, max_window_layers=3,
             rope_theta=1000000, architectures=["Qwen3ForCausalLM"], model_type="qwen3",
             tie_word_embeddings=True)
QWEN2 = dict(QWEN_BASE, hidden_size=56, intermediate_size=96, num_hidden_layers=2,
             num_attention_heads=7, num_key_value_heads=1, sliding_window=32768,
             max_position_embeddings=128, max_window_layers=2, rope_theta=1000000.0,
             architectures=["Qwen2ForCausalLM"], model_type="qwen2",
             tie_word_embeddings=True)
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False,
    "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 64, "initializer_range": 0.02, "intermediate_size": 176,
    "max_position_embeddings": 2048, "mlp_bias": False, "model_type": "llama",
    "num_attention_heads": 8, "num_hidden_layers": 2, "num_key_value_heads": 4,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
    "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "float16",
    "transformers_version": "4.35.0", "use_cache": True, "vocab_size": V}
LLADA = {
    "activation_type": "silu", "alibi": False, "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"], "attention_dropout": 0.0,
    "attention_layer_norm": False, "attention_layer_norm_with_affine": True,
    "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig",
                 "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
                 "AutoModel": "modeling_llada.LLaDAModelLM"},
    "bias_for_layer_norm": False, "block_group_size": 1, "block_type": "llama",
    "d_model": 64, "embedding_dropout": 0.0, "embedding_size": V, "eos_token_id": 59,
    "flash_attention": False, "include_bias": False, "include_qkv_bias": False,
    "init_cutoff_factor": None, "init_device": "meta", "init_fn": "mitchell",
    "init_std": 0.02, "input_emb_norm": False, "layer_norm_type": "rms",
    "layer_norm_with_affine": True, "mask_token_id": MASK, "max_sequence_length": 128,
    "mlp_hidden_size": 96, "mlp_ratio": 4, "model_type": "llada",
    "multi_query_attention": None, "n_heads": 4, "n_kv_heads": 2, "n_layers": 2,
    "pad_token_id": 59, "precision": "amp_bf16", "residual_dropout": 0.0,
    "rms_norm_eps": 1e-05, "rope": True, "rope_full_precision": True,
    "rope_theta": 500000.0, "scale_logits": False, "transformers_version": "4.46.3",
    "use_cache": False, "vocab_size": V, "weight_tying": False}
MDLM = {
    "_name_or_path": "mdlm", "architectures": ["MDLM"],
    "auto_map": {"AutoConfig": "configuration_mdlm.MDLMConfig",
                 "AutoModelForMaskedLM": "modeling_mdlm.MDLM"},
    "cond_dim": 24, "dropout": 0.1, "hidden_dim": 40, "model_length": 64,
    "model_type": "mdlm", "n_blocks": 2, "n_heads": 5, "return_dict": False,
    "time_conditioning": False, "torch_dtype": "float32",
    "transformers_version": "4.38.2", "vocab_size": V}
BD3LM = {
    "adaln": True, "architectures": ["BD3LM"], "attn_backend": "flex", "block_size": 4,
    "auto_map": {"AutoConfig": "configuration_bd3lm.BD3LMConfig",
                 "AutoModelForMaskedLM": "modeling_bd3lm.BD3LM"},
    "causal": False, "cond_dim": 24, "cross_attn": True, "dropout": 0.1,
    "hidden_dim": 40, "model_length": 64, "model_type": "bd3lm", "n_blocks": 2,
    "n_heads": 5, "sampling_eps_max": 0.999, "sampling_eps_min": 0.001,
    "time_conditioning": False, "torch_dtype": "float32",
    "transformers_version": "4.49.0", "var_min": True, "vocab_size": V}
RADD = {                               # the whole configuration of its training run
    "ngpus": 4, "tokens": V - 1, "gpt_dir": "gpt2-large",
    "training": {"batch_size": 512, "accum": 16, "weight": "standard", "ema": 0.9999,
                 "loss_type": "lambda_DCE"},
    "data": {"train": "openwebtext", "valid": "wikitext103", "cache_dir": "data"},
    "noise": {"type": "loglinear", "sigma_min": 0.0001, "sigma_max": 20},
    "sampling": {"predictor": "euler", "steps": 1024},
    "model": {"name": "small_radd", "type": "ddit_wot", "hidden_size": 40,
              "cond_dim": 128, "length": 64, "n_blocks": 2, "n_heads": 5,
              "dropout": 0.02, "use_checkpoint": False, "dtype": "float16"}}
SEDD = dict(RADD, graph={"type": "absorb", "file": "data", "report_all": False},
            model={"name": "small", "type": "ddit", "hidden_size": 40, "cond_dim": 24,
                   "length": 64, "n_blocks": 2, "n_heads": 5, "scale_by_sigma": True,
                   "dropout": 0.02})
GIDD = {"architectures": ["GiddForDiffusionLM"], "model_type": "dit", "vocab_size": V,
        "max_seq_len": 64, "hidden_size": 40, "timestep_cond_dim": 24,
        "num_hidden_layers": 2, "num_attention_heads": 5, "p_uniform": 0.1,
        "t_eps": 0.0001, "torch_dtype": "float32"}
# --[ random tensors ]----------------------------------------------------------


def draw(rng, shapes, dtype, types={}):
    """Values as the file will hold them: large enough to make a wrong gain, a missing
    bias or a swapped matrix plain, small enough for attention that is not one-hot."""
    out = {}
    for name in sorted(shapes):
        shape, kind = shapes[name], types.get(name, dtype)
        x = rng.standard_normal(shape)
        if len(shape) == 1:
            gain = name.endswith(".weight")
            x = 1 + 0.3 * x if gain else 0.3 * x
        elif "embed" in name or "wte" in name or "wpe" in name:
            x = 0.05 * x               # so that the eps of a norm counts
        else:
            x = x * 1.2 / np.sqrt(shape[0] if ".c_" in name else shape[1])
        out[name] = f.unpack(f.pack(x, kind), kind, shape)
    return out


def hf_shapes(c, qkv_bias=False, qk_norm=False, head=False, o_bias=False):
    C, F, H = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"]
    D = c.get("head_dim") or C // H
    Q, K = H * D, (c.get("num_key_value_heads") or H) * D
    rows = {"norm1": (C,), "norm2": (C,), "q": (Q, C), "k": (K, C), "v": (K, C),
            "o": (C, Q), "gate": (F, C), "up": (F, C), "down": (C, F)}
    if qkv_bias:
        rows.update(q_bias=(Q,), k_bias=(K,), v_bias=(K,))
    if o_bias:
        rows.update(o_bias=(C,))
    if qk_norm:
        rows.update(q_norm=(D,), k_norm=(D,))
    shapes = {"model.layers.%d.%s" % (i, f.HF_LAYER[n]): shape
              for n, shape in rows.items() for i in range(c["num_hidden_layers"])}
    shapes.update({"model.embed_tokens.weight": (c["vocab_size"], C),
                   "model.norm.weight": (C,)})
    if head:
        shapes["lm_head.weight"] = (c["vocab_size"], C)
    return shapes


def llada_shapes(c):
    C, F = c["d_model"], c["mlp_hidden_size"]
    K = c["n_kv_heads"] * C // c["n_heads"]
    rows = {"attn_norm": (C,), "ff_norm": (C,), "q_proj": (C, C), "k_proj": (K, C),
            "v_proj": (K, C), "attn_out": (C, C), "ff_proj": (F, C), "up_proj": (F, C),
            "ff_out": (C, F)}
    at = "model.transformer."
    shapes = {"%sblocks.%d.%s.weight" % (at, i, n): shape for n, shape in rows.items()
              for i in range(c["n_layers"])}
    shapes.update({at + "wte.weight": (V, C), at + "ln_f.weight": (C,),
                   at + "ff_out.weight": (V, C)})
    return shapes


def smdm_shapes(C, F, layers):
    rows = {"norm_1": (C,), "norm_2": (C,), "attn.attn": (3 * C, C), "attn.proj": (C, C),
            "mlp.swiglu.w1": (F, C), "mlp.swiglu.w2": (F, C), "mlp.swiglu.w3": (C, F)}
    shapes = {"transformer.h.%d.%s.weight" % (i, n): shape for n, shape in rows.items()
              for i in range(layers)}
    shapes.update({"transformer.wte.weight": (V + 1, C), "transformer.ln_f.weight": (C,),
                   "lm_head.weight": (V, C)})
    return shapes


def dit_shapes(prefix, C, blocks, condition):
    """condition 0: no adaLN, and norms with a bias (RADD)."""
    rows = {"norm1.weight": (C,), "norm2.weight": (C,), "attn_qkv.weight": (3 * C, C),
            "attn_out.weight": (C, C), "mlp.0.weight": (4 * C, C), "mlp.0.bias": (4 * C,),
            "mlp.2.weight": (C, 4 * C), "mlp.2.bias": (C,)}
    out = {"norm_final.weight": (C,), "linear.weight": (V, C), "linear.bias": (V,)}
    shapes = {prefix + "vocab_embed.embedding": (V, C)}
    if condition:
        rows.update({"adaLN_modulation.weight": (6 * C, condition),
                     "adaLN_modulation.bias": (6 * C,)})
        out.update({"adaLN_modulation.weight": (2 * C, condition),
                    "adaLN_modulation.bias": (2 * C,)})
        shapes.update({prefix + "sigma_map.mlp." + n: shape for n, shape in {
            "0.weight": (condition, 256), "0.bias": (condition,),
            "2.weight": (condition, condition), "2.bias": (condition,)}.items()})
    else:
        rows.update({"norm1.bias": (C,), "norm2.bias": (C,)})
        out["norm_final.bias"] = (C,)
    shapes.update({"%sblocks.%d.%s" % (prefix, i, n): shape for n, shape in rows.items()
                   for i in range(blocks)})
    shapes.update({prefix + "output_layer." + n: shape for n, shape in out.items()})
    return shapes


def inverse_frequencies(D):
    return 1.0 / 10000.0 ** (np.arange(0, D, 2) / D)


# --[ writing a folder ]--------------------------------------------------------


class Folder:
    def __init__(self, *path):
        self.path = os.path.join(*path)
        self.rng = np.random.default_rng(sum(os.path.basename(self.path).encode()))
        os.makedirs(self.path)

    def json(self, name, value):
        with open(os.path.join(self.path, name), "w") as file:
            json.dump(value, file, indent=2)

    def tensors(self, tensors, dtype, name="model.safetensors", **how):
        f.write_tensors(os.path.join(self.path, name), tensors, dtype, **how)

    def shards(self, tensors, dtype, split, weight_map=None):
        """Two files: names that `split` holds for, and the others."""
        files = ["model-0000%d-of-00002.safetensors" % i for i in (1, 2)]
        where = {name: files[not split(name)] for name in sorted(tensors)}
        for file in files:
            self.tensors({n: tensors[n] for n in tensors if where[n] == file}, dtype,
                         file)
        size = sum(t.size for t in tensors.values()) * {"BF16": 2, "F32": 4}[dtype]
        self.json("model.safetensors.index.json",
                  {"metadata": {"total_size": size}, "weight_map": weight_map or where})

    def expect(self, logits, pattern="full", block=0, shifted=0, mask=MASK, vocab=V,
               never=False, say="-", tied=None):
        """logits(ids, seen) is the forward, and tied the one by the other head.  never:
        the mask cannot be predicted."""
        ids = self.rng.integers(0, min(vocab, V) - 4, (SEQUENCES, LENGTH))
        if mask >= 0:
            hidden = self.rng.random(ids.shape) < 0.4
            hidden[:, 5] = True                        # at least one in each sequence
            ids[hidden] = mask
        seen = f.visible(pattern, block, LENGTH)
        rows = np.stack([logits(x, seen) for x in ids])
        if rows.shape[-1] < vocab:                     # a head without the mask's row
            rows = np.concatenate([rows, np.zeros(rows.shape[:2] + (1,))], -1)
        if never:
            rows[..., mask] = -np.inf
        assert rows.shape == (SEQUENCES, LENGTH, vocab)
        rows.astype("<f8").tofile(os.path.join(self.path, "logits.f64"))
        if tied:
            other = np.stack([tied(x, seen) for x in ids])
            other.astype("<f8").tofile(os.path.join(self.path, "logits.tied.f64"))
        ids.astype("<i4").tofile(os.path.join(self.path, "ids.i32"))
        with open(os.path.join(self.path, "expect"), "w") as file:
            file.write("pattern=%s block=%d shifted=%d mask=%d vocab=%d sequences=%d "
                       "length=%d say=%s\n" % (pattern, block, shifted, mask, vocab,
                                               SEQUENCES, LENGTH, say))

    def expect_word(self, word):
        with open(os.path.join(self.path, "expect"), "w") as file:
            file.write(word + "\n")


def gated(p):
    return lambda ids, seen: f.gated(ids, p, seen)


def causal(folder, config, tensors):
    """An autoregressive family: row i says token i + 1, and there is no mask."""
    folder.expect(gated(f.hf_parameters(config, tensors)), "causal", shifted=1, mask=-1)


def generation(folder, **more):
    folder.json("generation_config.json", dict(
        {"bos_token_id": 58, "do_sample": True, "eos_token_id": [60, 58],
         "pad_token_id": 58, "temperature": 0.6, "top_k": 20, "top_p": 0.95,
         "transformers_version": "4.51.0"}, **more))


def added(content, **more):
    """tokenizer_config.json with one added token, at the mask's id."""
    return dict({"added_tokens_decoder": {
        "58": {"content": "<|endoftext|>", "lstrip": False, "normalized": False,
               "rstrip": False, "single_word": False, "special": True},
        str(MASK): {"content": content, "lstrip": False, "normalized": False,
                    "rstrip": False, "single_word": False, "special": True}},
        "eos_token": "<|endoftext|>", "tokenizer_class": "Qwen2Tokenizer"}, **more)


def tokenizer(mask=None):
    """tokenizer.json of a byte-level BPE with 58 bytes, no merges, and added tokens."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
             "special": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
             "use_regex": True}
    tokens = [dict(id=58, content="<|endoftext|>", **flags)]
    if mask:
        tokens.append(dict(id=MASK, content=mask, **flags))
    return {"version": "1.0", "added_tokens": tokens, "normalizer": None,
            "pre_tokenizer": level, "decoder": level,
            "model": {"type": "BPE", "vocab": {chr(33 + i): i for i in range(58)},
                      "merges": []}}


# --[ families ]----------------------------------------------------------------


def llama(at):
    d = Folder(at, "llama")
    c = dict(LLAMA, head_dim=None)
    t = draw(d.rng, hf_shapes(c, head=True), "F16")
    d.json("config.json", c)
    d.tensors(t, "F16")
    d.json("generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    causal(d, c, t)


def llama_old(at):
    d = Folder(at, "llama-old")        # of 2023: heads, theta and ties are by default
    c = dict(LLAMA, transformers_version="4.28.0")
    for key in ("num_key_value_heads", "rope_theta", "rope_scaling", "attention_bias",
                "attention_dropout", "mlp_bias", "pretraining_tp", "tie_word_embeddings"):
        del c[key]
    t = draw(d.rng, hf_shapes(c, head=True), "F16")
    d.json("config.json", c)
    d.tensors(t, "F16")
    causal(d, c, t)


def llama_tied(at):
    d = Folder(at, "llama-tied")       # SmolLM's keys: harmless ones beside the known
    c = dict(LLAMA, tie_word_embeddings=True, num_key_value_heads=8, head_dim=8,
             torch_dtype="bfloat16", rope_interleaved=False, is_llama_config=True,
             rope_theta=100000)
    t = draw(d.rng, hf_shapes(c), "BF16")
    d.json("config.json", c)
    d.tensors(t, "BF16", metadata="absent")
    causal(d, c, t)


def qwen2(at):
    d = Folder(at, "qwen2")
    t = draw(d.rng, hf_shapes(QWEN2, qkv_bias=True), "BF16")
    d.json("config.json", QWEN2)
    d.tensors(t, "BF16", spaces=16)
    generation(d)
    causal(d, QWEN2, t)


def qwen3(at):
    d = Folder(at, "qwen3")
    t = draw(d.rng, hf_shapes(QWEN3, qk_norm=True), "BF16")
    d.json("config.json", QWEN3)
    d.tensors(t, "BF16", metadata=None)
    generation(d)
    causal(d, QWEN3, t)


def qwen3_nested(at):
    d = Folder(at, "qwen3-nested")     # the keys of newer writers; untied
    c = dict(QWEN3, rope_parameters={"rope_type": "default", "rope_theta": 1000000},
             dtype="bfloat16", tie_word_embeddings=False,
             layer_types=["full_attention"] * 3, transformers_version="5.0.0")
    for key in ("rope_theta", "rope_scaling", "torch_dtype"):
        del c[key]
    t = draw(d.rng, hf_shapes(c, qk_norm=True, head=True), "BF16")
    d.json("config.json", c)
    d.tensors(t, "BF16")
    causal(d, c, t)


def sdar(at):
    d = Folder(at, "sdar")
    c = dict(QWEN3, architectures=["SDARForCausalLM"], model_type="sdar", block_size=4,
             mask_token_id=MASK, fuse_cross_entropy=True, tie_word_embeddings=False,
             attn_implementation="flex_attention", debug=False, ep_size=1,
             micro_forward=False, skip_checkpoint=False, use_deepep=False,
             auto_map={"AutoConfig": "configuration_sdar.SDARConfig",
                       "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM"})
    t = draw(d.rng, hf_shapes(c, qk_norm=True, head=True), "BF16")
    d.json("config.json", c)
    d.shards(t, "BF16", lambda name: name != "model.norm.weight" and ".2." not in name)
    generation(d)
    d.expect(gated(f.hf_parameters(c, t)), "block", block=4)


def a2d_qwen2(at):
    d = Folder(at, "a2d-qwen2")        # the mask is named in tokenizer_config.json alone
    c = dict(QWEN2, architectures=["A2DQwen2LMHeadModel"], model_type="a2d-qwen2")
    t = draw(d.rng, hf_shapes(c, qkv_bias=True), "BF16")
    d.json("config.json", c)
    d.json("tokenizer_config.json", added("<|mask|>", mask_token="<|mask|>"))
    d.json("tokenizer.json", tokenizer())      # which has not heard of the mask
    d.tensors(t, "BF16")
    generation(d)
    d.expect(gated(f.hf_parameters(c, t)))


def a2d_qwen3(at):
    d = Folder(at, "a2d-qwen3")        # mask_token as an object; pad_token_id null
    c = dict(QWEN3, architectures=["A2DQwen3LMHeadModel"], model_type="a2d-qwen3",
             pad_token_id=None, dtype="bfloat16",
             auto_map={"AutoConfig": "modeling_qwen3.A2DQwen3Config",
                       "AutoModelForMaskedLM": "modeling_qwen3.A2DQwen3LMHeadModel"})
    t = draw(d.rng, hf_shapes(c, qk_norm=True), "BF16")
    d.json("config.json", c)
    mask = {"__type": "AddedToken", "content": "<|MASK|>", "lstrip": False,
            "normalized": False, "rstrip": False, "single_word": False, "special": True}
    d.json("tokenizer_config.json", added("<|MASK|>", mask_token=mask))
    d.json("tokenizer.json", tokenizer())
    d.tensors(t, "BF16")
    generation(d)
    d.expect(gated(f.hf_parameters(c, t)))


def fast_dllm(at):
    d = Folder(at, "fast-dllm")        # data in another order than the header
    c = dict(QWEN2, architectures=["Fast_dLLM_QwenForCausalLM"], bd_size=4,
             model_type="Fast_dLLM_Qwen", layer_types=["full_attention"] * 2,
             auto_map={"AutoConfig": "configuration.Fast_dLLM_QwenConfig",
                       "AutoModelForCausalLM": "modeling.Fast_dLLM_QwenForCausalLM"})
    t = draw(d.rng, hf_shapes(c, qkv_bias=True), "BF16")
    d.json("config.json", c)
    d.json("tokenizer_config.json", added("|<MASK>|"))
    d.json("tokenizer.json", tokenizer("|<MASK>|"))
    d.tensors(t, "BF16", order=list(d.rng.permutation(sorted(t))))
    generation(d)
    d.expect(gated(f.hf_parameters(c, t)), "block", block=4, shifted=1)


def dream(at):
    d = Folder(at, "dream")
    c = dict(QWEN2, architectures=["DreamModel"], model_type="Dream", use_mrope=False,
             mask_token_id=MASK, pad_token_id=58, sliding_window=None,
             tie_word_embeddings=False,
             auto_map={"AutoConfig": "configuration_dream.DreamConfig",
                       "AutoModel": "modeling_dream.DreamModel"})
    t = draw(d.rng, hf_shapes(c, qkv_bias=True, head=True), "BF16")
    d.json("config.json", c)
    d.tensors(t, "BF16")
    d.json("generation_config.json", {"_from_model_config": True, "alg": "origin",
           "alg_temp": None, "bos_token_id": 58, "eos_token_id": 58, "eps": 0.001,
           "mask_token_id": None, "output_history": False, "pad_token_id": 58,
           "steps": 512, "temperature": 0.0, "top_k": None, "top_p": None})
    d.expect(gated(f.hf_parameters(c, t)), shifted=1)


def open_dcoder(at):
    d = Folder(at, "open-dcoder")      # a plain qwen2 folder: nothing in config.json says
    t = draw(d.rng, hf_shapes(QWEN2, qkv_bias=True), "BF16")     # that it sees both ways
    d.json("config.json", QWEN2)
    d.json("added_tokens.json", {"<M>": MASK, "<|endoftext|>": 58, "<|im_end|>": 60})
    d.json("tokenizer.json", tokenizer("<M>"))
    d.tensors(t, "BF16")
    generation(d)
    d.expect(gated(f.hf_parameters(QWEN2, t)), shifted=1, say="open-dcoder")


def llada(at):
    d = Folder(at, "llada")
    t = draw(d.rng, llada_shapes(LLADA), "BF16")
    d.json("config.json", LLADA)
    d.tensors(t, "BF16")
    d.expect(gated(f.llada_parameters(LLADA, t)))


def smdm(at):
    d = Folder(at, "smdm")             # one file; its config is known by its sizes: heads
    t = draw(d.rng, smdm_shapes(128, 512, 2), "F32")   # of 64 up to C 1024, 128 above,
    d.tensors(t, "F32", "mdm-tiny.safetensors")        # but 80 for C 640 with F 1600
    d.expect(gated(f.smdm_parameters(2, 2, t)), mask=V, vocab=V + 1, never=True,
             say="smdm")


def dit(t, prefix, c):
    return lambda ids, seen: f.dit(ids, t, prefix, c["n_blocks"], c["n_heads"], seen)


def mdlm_tensors(rng, c):
    C, H = c["hidden_dim"], c["n_heads"]
    t = draw(rng, dit_shapes("backbone.", C, c["n_blocks"], c["cond_dim"]), "F32")
    t["backbone.rotary_emb.inv_freq"] = inverse_frequencies(C // H)
    return t


def mdlm(at):
    d = Folder(at, "mdlm")
    t = mdlm_tensors(d.rng, MDLM)
    d.json("config.json", MDLM)
    d.tensors(t, "F32")
    d.expect(dit(t, "backbone.", MDLM), mask=V - 1, never=True)


def bd3lm(at):
    d = Folder(at, "bd3lm")
    # Training runs noised and clean copies side by side.  At inference the canvas runs
    # alone (sample_mode) and a row sees its block and the earlier ones, whatever they
    # hold: block-causal.  cond_dim is left to the tensors; the buffers are scalars.
    t = mdlm_tensors(d.rng, BD3LM)
    t.update(sampling_eps_min=np.array(1e-3), sampling_eps_max=np.array(0.999))
    d.json("config.json", {k: v for k, v in BD3LM.items() if k != "cond_dim"})
    d.tensors(t, "F32")
    d.expect(dit(t, "backbone.", BD3LM), "block", block=4, mask=V - 1, never=True)


def radd(at):
    d = Folder(at, "radd")
    m = RADD["model"]
    t = draw(d.rng, dit_shapes("", m["hidden_size"], m["n_blocks"], 0), "F32")
    t["rotary_emb.inv_freq"] = inverse_frequencies(m["hidden_size"] // m["n_heads"])
    d.json("config.json", RADD)
    d.tensors(t, "F32")
    d.expect(dit(t, "", m), mask=V - 1, never=True)


def tied_head(at, name, same):
    """config.json says tied, and the file holds a head all the same."""
    d = Folder(at, name)
    c = dict(QWEN2, architectures=["A2DQwen2LMHeadModel"], model_type="a2d-qwen2")
    t = draw(d.rng, hf_shapes(c, qkv_bias=True, head=True), "BF16")
    if same:
        t["lm_head.weight"] = t["model.embed_tokens.weight"]
    tied = {n: x for n, x in t.items() if n != "lm_head.weight"}
    d.json("config.json", c)
    d.json("tokenizer_config.json", added("<|mask|>", mask_token="<|mask|>"))
    d.json("tokenizer.json", tokenizer())      # which has not heard of the mask
    d.tensors(t, "BF16")
    d.expect(gated(f.hf_parameters(c, t)),
             tied=None if same else gated(f.hf_parameters(c, tied)))


def tied_same_head(at):
    tied_head(at, "tied-same-head", True)


def tied_other_head(at):
    tied_head(at, "tied-other-head", False)


FAMILIES = (llama, llama_old, llama_tied, qwen2, qwen3, qwen3_nested, sdar, a2d_qwen2,
            a2d_qwen3, fast_dllm, dream, open_dcoder, llada, smdm, mdlm, bd3lm, radd,
            tied_same_head, tied_other_head)

# --[ what must be refused ]----------------------------------------------------


def refuse_config(at, name, word, base, **changes):
    """A folder that is right but for keys of config.json; a value ... takes a key out."""
    d = Folder(at, name)
    c = dict(base, **changes)
    if base is LLADA:
        t = draw(d.rng, llada_shapes(LLADA), "BF16")
    elif base is QWEN2:
        t = draw(d.rng, hf_shapes(QWEN2, qkv_bias=True), "BF16")
    elif base is QWEN3:
        t = draw(d.rng, hf_shapes(QWEN3, qk_norm=True), "BF16")
    elif base is LLAMA:
        t = draw(d.rng, hf_shapes(LLAMA, head=True), "BF16")
    else:
        t = mdlm_tensors(d.rng, MDLM)
    d.json("config.json", {k: v for k, v in c.items() if v is not ...})
    d.tensors(t, "BF16" if base not in (MDLM, BD3LM) else "F32")
    d.expect_word(word)


def configs(at):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
              "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    for name, word, base, changes in (
            ("rope-yarn", "rope", QWEN3, dict(rope_scaling=yarn)),
            ("rope-llama3", "rope", LLAMA, dict(rope_scaling=llama3)),
            ("rope-linear", "rope", LLAMA, dict(rope_scaling={"type": "linear",
                                                              "factor": 2.0})),
            ("rope-nested-yarn", "rope", QWEN3,
             dict(rope_scaling=..., rope_parameters=dict(yarn, rope_theta=1e6))),
            ("partial-rotary", "partial_rotary_factor", LLAMA,
             dict(partial_rotary_factor=0.5)),
            ("sliding-window", "sliding_window", QWEN2,
             dict(use_sliding_window=True, sliding_window=4, max_window_layers=0)),
            ("sliding-layers", "sliding", QWEN3, dict(
                layer_types=["full_attention", "sliding_attention", "full_attention"],
                sliding_window=4, use_sliding_window=True)),
            ("activation", "hidden_act", LLAMA, dict(hidden_act="gelu")),
            ("mrope", "mrope", QWEN2, dict(model_type="Dream", mask_token_id=MASK,
                                           architectures=["DreamModel"],
                                           use_mrope=True)),
            ("mixtral", "mixtral", LLAMA, dict(model_type="mixtral",
                                               architectures=["MixtralForCausalLM"])),
            ("no-model-type", "model_type", LLAMA, dict(model_type=...,
                                                        architectures=...)),
            ("experts", "num_experts", QWEN3, dict(num_experts=8,
                                                   num_experts_per_tok=2)),
            ("quantised", "quantization", QWEN3, dict(
                quantization_config={"quant_method": "gptq", "bits": 4})),
            ("quantised-mlx", "quantization", QWEN3,
             dict(quantization={"bits": 4, "group_size": 32})),
            ("mlp-bias", "mlp_bias", LLAMA, dict(mlp_bias=True)),
            ("vocab", "embed_tokens", LLAMA, dict(vocab_size=V + 1)),
            ("llada-norm", "layer_norm_type", LLADA, dict(layer_norm_type="default")),
            ("llada-alibi", "alibi", LLADA, dict(alibi=True)),
            ("llada-no-rope", "rope", LLADA, dict(rope=False)),
            ("llada-block", "block_type", LLADA, dict(block_type="sequential")),
            ("llada-scale", "scale_logits", LLADA, dict(scale_logits=True)),
            ("llada-embedding-norm", "input_emb_norm", LLADA, dict(input_emb_norm=True)),
            ("time-conditioning", "time_conditioning", MDLM,
             dict(time_conditioning=True)),
            ("bd3lm-time", "time_conditioning", BD3LM, dict(time_conditioning=True))):
        refuse_config(at, name, word, base, **changes)


def live_time(at):
    """Checkpoints whose gates change with the time: there is nothing to fold."""
    for name, word, c, prefix in (("gidd", "dit", GIDD, "model."),
                                  ("sedd", "sigma", SEDD, "")):
        d = Folder(at, name)
        t = draw(d.rng, dit_shapes(prefix, 40, 2, 24), "F32")
        t[prefix + "rotary_emb.inv_freq"] = inverse_frequencies(8)
        d.json("config.json", c)
        d.tensors(t, "F32")
        d.expect_word(word)


def tensors(at):
    """Tensors that are missing, too many, of a wrong shape or of a wrong type."""
    name = "model.layers.1.mlp.up_proj.weight"
    extra = "model.layers.1.mlp.extra_proj.weight"

    def folder(title, word, change, types={}, config=QWEN3):
        d = Folder(at, title)
        t = draw(d.rng, hf_shapes(QWEN3, qk_norm=True), "BF16")
        change(t)
        d.json("config.json", config)
        d.tensors(t, "BF16", types=types)
        d.expect_word(word)
    folder("missing", name, lambda t: t.pop(name))
    folder("surplus", extra, lambda t: t.update({extra: t[name]}))
    folder("surplus-layer", "model.layers.2.", lambda t: None,
           config=dict(QWEN3, num_hidden_layers=2))
    folder("shape", name, lambda t: t.update({name: t[name][:-1]}))
    folder("transposed", name, lambda t: t.update({name: t[name].T.copy()}))
    folder("rank", "model.norm.weight",
           lambda t: t.update({"model.norm.weight": t["model.norm.weight"][None]}))
    folder("type", name, lambda t: t.update({name: np.round(t[name])}), {name: "I64"})
    folder("bias", "model.layers.0.self_attn.q_proj.bias",
           lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.ones(64)}))
    folder("no-head", "lm_head.weight", lambda t: None,
           config=dict(QWEN3, tie_word_embeddings=False))

    d = Folder(at, "output-bias")      # attention_bias of LLaMA: a bias on o_proj too;
    c = dict(LLAMA, attention_bias=True)               # has logits, if it is ever opened
    t = draw(d.rng, hf_shapes(c, qkv_bias=True, o_bias=True, head=True), "F16")
    d.json("config.json", c)
    d.tensors(t, "F16")
    causal(d, c, t)
    d.expect_word("o_proj")


def indices(at):
    """Shards: absent, twice the same tensor, an index of itself, a way out."""
    second = "model-00002-of-00002.safetensors"
    norm = "model.norm.weight"

    def folder(title, word, change=None):
        d = Folder(at, title)
        t = draw(d.rng, hf_shapes(QWEN3, qk_norm=True), "BF16")
        d.json("config.json", QWEN3)
        d.shards(t, "BF16", lambda name: ".2." not in name and name != norm,
                 weight_map=change and {name: change for name in t})
        d.expect_word(word)
        return d, t
    d, _ = folder("shard-missing", second)
    os.remove(os.path.join(d.path, second))
    folder("shard-cyclic", "model.safetensors.index.json", "model.safetensors.index.json")
    folder("shard-outside", "../", "../qwen3/model.safetensors")
    folder("shard-absolute", "/dev/zero", "/dev/zero")
    d, t = folder("shard-twice", norm)
    first = {n: x for n, x in t.items() if ".2." not in n}     # the norm again
    d.tensors(first, "BF16", "model-00001-of-00002.safetensors")


def main(out):
    if os.path.exists(out):
        shutil.rmtree(out)
    for family in FAMILIES:
        family(out)
    for group in (configs, live_time, tensors, indices):
        group(os.path.join(out, "refuse"))
    print("folders: %d families and %d to be refused in %s" %
          (len(FAMILIES), len(os.listdir(os.path.join(out, "refuse"))), out))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
