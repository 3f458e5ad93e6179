/* shape.c - writes a folder of exactly a published checkpoint's shape, with random
   weights, for measures of memory and speed.

     cc -O2 -std=c99 bench/oracle/shape.c -o shape
     shape NAME DIR           DIR must exist; NAME is one of the rows of `shapes` below

   config.json has the published keys; model.safetensors has the published names, types
   and order (sorted by name, as the reference writer leaves them).  Matrices are
   normal-like with standard deviation 0.02, gains are 1, biases 0.02 too.  Nothing but
   libc is used and no tensor is ever held: the file goes through one small buffer.
   Parameters and bytes are printed, and what was published where that is known. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { QWEN, DIT, SMDM };                              /* layouts of names           */
enum { QK_NORM = 1, QKV_BIAS = 2, HEAD = 4 };          /* parts of the QWEN layout   */

typedef struct {
    const char *name;
    int layout, parts, f32;
    int vocab, dim, layers, heads, kv_heads, head_dim, ffn;
    long long parameters, bytes;       /* as published, 0 where that is not known    */
    const char *config;                /* what config.json has beside the sizes      */
} shape;

#define QWEN3_KEYS \
    "  \"attention_bias\": false,\n  \"attention_dropout\": 0.0,\n" \
    "  \"hidden_act\": \"silu\",\n  \"initializer_range\": 0.02,\n" \
    "  \"rms_norm_eps\": 1e-06,\n  \"rope_scaling\": null,\n" \
    "  \"sliding_window\": null,\n  \"use_cache\": true,\n" \
    "  \"use_sliding_window\": false,\n  \"bos_token_id\": 151643,\n"
#define QWEN2_KEYS \
    "  \"attention_dropout\": 0.0,\n  \"hidden_act\": \"silu\",\n" \
    "  \"initializer_range\": 0.02,\n  \"max_position_embeddings\": 32768,\n" \
    "  \"rms_norm_eps\": 1e-06,\n  \"rope_theta\": 1000000.0,\n" \
    "  \"torch_dtype\": \"bfloat16\",\n  \"use_cache\": true,\n" \
    "  \"use_sliding_window\": false,\n  \"bos_token_id\": 151643,\n"
#define CODER_KEYS \
    "  \"tie_word_embeddings\": true,\n  \"sliding_window\": 32768,\n" \
    "  \"max_window_layers\": 24,\n"

static const shape shapes[] = {
    { "opdlm-0.6b", QWEN, QK_NORM, 0, 151936, 1024, 28, 16, 8, 128, 3072,
      596049920, 1192135096,
      "  \"architectures\": [\n    \"A2DQwen3LMHeadModel\"\n  ],\n"
      "  \"model_type\": \"a2d-qwen3\",\n" QWEN3_KEYS
      "  \"eos_token_id\": 151645,\n  \"pad_token_id\": 151643,\n"
      "  \"max_position_embeddings\": 40960,\n  \"max_window_layers\": 28,\n"
      "  \"rope_theta\": 1000000,\n  \"tie_word_embeddings\": true,\n"
      "  \"dtype\": \"bfloat16\",\n" },
    { "sdar-1.7b", QWEN, QK_NORM | HEAD, 0, 151936, 2048, 28, 16, 8, 128, 6144,
      2031739904, 4063515640,
      "  \"architectures\": [\n    \"SDARForCausalLM\"\n  ],\n"
      "  \"model_type\": \"sdar\",\n" QWEN3_KEYS
      "  \"eos_token_id\": 151643,\n  \"block_size\": 4,\n"
      "  \"mask_token_id\": 151669,\n  \"fuse_cross_entropy\": true,\n"
      "  \"max_position_embeddings\": 32768,\n  \"max_window_layers\": 28,\n"
      "  \"rope_theta\": 1000000,\n  \"tie_word_embeddings\": false,\n"
      "  \"torch_dtype\": \"bfloat16\",\n" },
    { "fast-dllm-1.5b", QWEN, QKV_BIAS, 0, 151936, 1536, 28, 12, 2, 128, 8960,
      1543714304, 0,
      "  \"architectures\": [\n    \"Fast_dLLM_QwenForCausalLM\"\n  ],\n"
      "  \"model_type\": \"Fast_dLLM_Qwen\",\n" QWEN2_KEYS
      "  \"eos_token_id\": 151645,\n  \"bd_size\": 32,\n"
      "  \"rope_scaling\": null,\n  \"sliding_window\": null,\n"
      "  \"max_window_layers\": 28,\n  \"tie_word_embeddings\": true,\n" },
    { "qwen2.5-coder-0.5b", QWEN, QKV_BIAS, 0, 151936, 896, 24, 14, 2, 64, 4864,
      494032768, 0,
      "  \"architectures\": [\n    \"Qwen2ForCausalLM\"\n  ],\n"
      "  \"model_type\": \"qwen2\",\n" QWEN2_KEYS CODER_KEYS
      "  \"eos_token_id\": 151643,\n" },
    { "a2d-coder-0.5b", QWEN, QKV_BIAS | HEAD, 0, 151936, 896, 24, 14, 2, 64, 4864,
      630167424, 0,                    /* says tied, and holds a head of its own     */
      "  \"architectures\": [\n    \"A2DQwen2LMHeadModel\"\n  ],\n"
      "  \"model_type\": \"a2d-qwen2\",\n" QWEN2_KEYS CODER_KEYS
      "  \"eos_token_id\": 151645,\n" },
    { "mdlm-owt", DIT, 0, 1, 50258, 768, 12, 12, 12, 64, 3072, 169627218, 0,
      "  \"architectures\": [\n    \"MDLM\"\n  ],\n  \"model_type\": \"mdlm\",\n"
      "  \"cond_dim\": 128,\n  \"dropout\": 0.1,\n  \"model_length\": 1024,\n"
      "  \"return_dict\": false,\n  \"time_conditioning\": false,\n"
      "  \"torch_dtype\": \"float32\",\n" },
    { "smdm-170m", SMDM, 0, 1, 32000, 768, 18, 12, 12, 64, 3072, 219050496, 0,
      NULL }                           /* F32 as it was trained; the file's type is ? */
};
enum { SHAPES = sizeof shapes / sizeof *shapes, MOST = 1024, BUFFER = 1 << 16 };

typedef struct {
    char name[80];
    int rows, cols;                    /* cols 0: a vector                           */
    int gain;                          /* all ones                                   */
    long long begin;
} tensor;

static tensor tensors[MOST];
static int n_tensors;

static void fail(const char *what, const char *detail)
{
    fprintf(stderr, "shape: %s %s\n", what, detail);
    exit(1);
}

/* --[ the tensors of a layout ]--------------------------------------------- */

static void add(const char *prefix, int layer, const char *name, int rows, int cols)
{
    tensor *t = &tensors[n_tensors++];
    if (n_tensors > MOST) fail("too many tensors at", name);
    if (layer >= 0) snprintf(t->name, sizeof t->name, "%s%d.%s", prefix, layer, name);
    else snprintf(t->name, sizeof t->name, "%s%s", prefix, name);
    t->rows = rows;
    t->cols = cols;
    t->gain = !cols && strstr(t->name, "norm") != NULL && !strstr(t->name, ".bias");
    if (!strcmp(name, "ln_f.weight")) t->gain = 1;
}

static void add_qwen(const shape *s)
{
    const char *at = "model.layers.";
    int C = s->dim, Q = s->heads * s->head_dim, K = s->kv_heads * s->head_dim;
    add("model.", -1, "embed_tokens.weight", s->vocab, C);
    add("model.", -1, "norm.weight", C, 0);
    if (s->parts & HEAD) add("", -1, "lm_head.weight", s->vocab, C);
    for (int i = 0; i < s->layers; i++) {
        add(at, i, "input_layernorm.weight", C, 0);
        add(at, i, "post_attention_layernorm.weight", C, 0);
        add(at, i, "self_attn.q_proj.weight", Q, C);
        add(at, i, "self_attn.k_proj.weight", K, C);
        add(at, i, "self_attn.v_proj.weight", K, C);
        add(at, i, "self_attn.o_proj.weight", C, Q);
        add(at, i, "mlp.gate_proj.weight", s->ffn, C);
        add(at, i, "mlp.up_proj.weight", s->ffn, C);
        add(at, i, "mlp.down_proj.weight", C, s->ffn);
        if (s->parts & QK_NORM) {
            add(at, i, "self_attn.q_norm.weight", s->head_dim, 0);
            add(at, i, "self_attn.k_norm.weight", s->head_dim, 0);
        }
        if (s->parts & QKV_BIAS) {
            add(at, i, "self_attn.q_proj.bias", Q, 0);
            add(at, i, "self_attn.k_proj.bias", K, 0);
            add(at, i, "self_attn.v_proj.bias", K, 0);
        }
    }
}

static void add_dit(const shape *s)
{
    enum { CONDITION = 128, FREQUENCIES = 256 };
    const char *at = "backbone.blocks.", *out = "backbone.output_layer.";
    int C = s->dim;
    add("backbone.", -1, "vocab_embed.embedding", s->vocab, C);
    add("backbone.", -1, "sigma_map.mlp.0.weight", CONDITION, FREQUENCIES);
    add("backbone.", -1, "sigma_map.mlp.0.bias", CONDITION, 0);
    add("backbone.", -1, "sigma_map.mlp.2.weight", CONDITION, CONDITION);
    add("backbone.", -1, "sigma_map.mlp.2.bias", CONDITION, 0);
    add("backbone.", -1, "rotary_emb.inv_freq", s->head_dim / 2, 0);
    add(out, -1, "norm_final.weight", C, 0);
    add(out, -1, "linear.weight", s->vocab, C);
    add(out, -1, "linear.bias", s->vocab, 0);
    add(out, -1, "adaLN_modulation.weight", 2 * C, CONDITION);
    add(out, -1, "adaLN_modulation.bias", 2 * C, 0);
    for (int i = 0; i < s->layers; i++) {
        add(at, i, "norm1.weight", C, 0);
        add(at, i, "norm2.weight", C, 0);
        add(at, i, "attn_qkv.weight", 3 * C, C);
        add(at, i, "attn_out.weight", C, C);
        add(at, i, "mlp.0.weight", s->ffn, C);
        add(at, i, "mlp.0.bias", s->ffn, 0);
        add(at, i, "mlp.2.weight", C, s->ffn);
        add(at, i, "mlp.2.bias", C, 0);
        add(at, i, "adaLN_modulation.weight", 6 * C, CONDITION);
        add(at, i, "adaLN_modulation.bias", 6 * C, 0);
    }
}

static void add_smdm(const shape *s)
{
    const char *at = "transformer.h.";
    int C = s->dim;
    add("transformer.", -1, "wte.weight", s->vocab + 1, C);
    add("transformer.", -1, "ln_f.weight", C, 0);
    add("", -1, "lm_head.weight", s->vocab, C);
    for (int i = 0; i < s->layers; i++) {
        add(at, i, "norm_1.weight", C, 0);
        add(at, i, "norm_2.weight", C, 0);
        add(at, i, "attn.attn.weight", 3 * C, C);
        add(at, i, "attn.proj.weight", C, C);
        add(at, i, "mlp.swiglu.w1.weight", s->ffn, C);
        add(at, i, "mlp.swiglu.w2.weight", s->ffn, C);
        add(at, i, "mlp.swiglu.w3.weight", C, s->ffn);
    }
}

static long long elements(const tensor *t)
{
    return (long long)t->rows * (t->cols ? t->cols : 1);
}

/* Sorted by name, which is also the order of the data. */
static void place(int element_size)
{
    long long at = 0;
    for (int i = 1; i < n_tensors; i++)
        for (int j = i; j && strcmp(tensors[j - 1].name, tensors[j].name) > 0; j--) {
            tensor t = tensors[j - 1];
            tensors[j - 1] = tensors[j];
            tensors[j] = t;
        }
    for (int i = 0; i < n_tensors; i++) {
        tensors[i].begin = at;
        at += elements(&tensors[i]) * element_size;
    }
}

/* --[ values ]-------------------------------------------------------------- */

/* 2^16 draws: the sum of twelve uniforms is near enough to normal, and needs no libm. */
static float draws[1 << 16];
static uint64_t state = 1;

static uint64_t next(void)                                 /* xorshift64*            */
{
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return state * UINT64_C(2685821657736338717);
}

static void make_draws(void)
{
    for (int i = 0; i < 1 << 16; i++) {
        double sum = -6;
        for (int k = 0; k < 12; k++) sum += (double)(next() >> 11) / 9007199254740992.0;
        draws[i] = (float)(0.02 * sum);
    }
}

static uint16_t bf16(float x)                              /* to nearest, ties even  */
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

/* The rotary buffer of a DiT, for heads of 64: 10000^(-i/32), by repeated
   multiplication with 10000^(-1/32). */
static float frequency(long long i)
{
    double f = 1;
    while (i--) f *= 0.749894209332455827;
    return (float)f;
}

/* n values of tensor t, from element `first` on. */
static void fill(unsigned char *to, const tensor *t, long long first, int n, int f32)
{
    static uint16_t narrow[1 << 16];
    uint64_t bits = 0;
    if (!narrow[0]) for (int i = 0; i < 1 << 16; i++) narrow[i] = bf16(draws[i]);
    for (int i = 0; i < n; i++) {
        if (i % 4 == 0) bits = next();
        int k = (int)(bits >> 16 * (i % 4) & 0xFFFF);
        if (f32) {
            float x = t->gain ? 1 : draws[k];
            if (strstr(t->name, "inv_freq")) x = frequency(first + i);
            memcpy(to + 4 * i, &x, 4);
        } else {
            uint16_t x = t->gain ? 0x3F80 : narrow[k];
            memcpy(to + 2 * i, &x, 2);
        }
    }
}

/* --[ files ]--------------------------------------------------------------- */

static FILE *create(const char *dir, const char *name)
{
    char path[1024];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "wb");
    if (!f) fail("cannot write", path);
    return f;
}

static void finish(FILE *f, const char *name)
{
    int bad = ferror(f);
    if (fclose(f) || bad) fail("writing failed:", name);
}

static void write_config(const shape *s, const char *dir)
{
    FILE *f = create(dir, "config.json");
    fprintf(f, "{\n%s", s->config);
    if (s->layout == DIT)
        fprintf(f, "  \"hidden_dim\": %d,\n  \"n_blocks\": %d,\n  \"n_heads\": %d,\n",
                s->dim, s->layers, s->heads);
    else
        fprintf(f, "  \"hidden_size\": %d,\n  \"intermediate_size\": %d,\n"
                "  \"num_hidden_layers\": %d,\n  \"num_attention_heads\": %d,\n"
                "  \"num_key_value_heads\": %d,\n", s->dim, s->ffn, s->layers, s->heads,
                s->kv_heads);
    if (s->parts & QK_NORM) fprintf(f, "  \"head_dim\": %d,\n", s->head_dim);
    fprintf(f, "  \"vocab_size\": %d\n}\n", s->vocab);
    finish(f, "config.json");
}

static size_t write_header(FILE *f, int f32)
{
    size_t size = (size_t)n_tensors * 200 + 64, n;
    char *text = (char *)malloc(size);
    unsigned char length[8];
    if (!text) fail("no memory for", "the header");
    n = (size_t)snprintf(text, size, "{\"__metadata__\":{\"format\":\"pt\"}");
    for (int i = 0; i < n_tensors; i++) {
        const tensor *t = &tensors[i];
        char cols[16] = "";
        if (t->cols) snprintf(cols, sizeof cols, ",%d", t->cols);
        n += (size_t)snprintf(text + n, size - n, ",\"%s\":{\"dtype\":\"%s\",\"shape\":"
                              "[%d%s],\"data_offsets\":[%lld,%lld]}", t->name,
                              f32 ? "F32" : "BF16", t->rows, cols, t->begin,
                              t->begin + elements(t) * (f32 ? 4 : 2));
    }
    text[n++] = '}';
    while (n % 8) text[n++] = ' ';
    for (int i = 0; i < 8; i++) length[i] = (unsigned char)((uint64_t)n >> 8 * i);
    fwrite(length, 1, 8, f);
    fwrite(text, 1, n, f);
    free(text);
    return n + 8;
}

static long long write_tensors(const shape *s, const char *dir)
{
    static unsigned char buffer[4 * BUFFER];
    const char *name = s->config ? "model.safetensors" : "mdm-170M-100e18.safetensors";
    FILE *f = create(dir, name);
    int element_size = s->f32 ? 4 : 2;
    long long total = (long long)write_header(f, s->f32);
    for (int i = 0; i < n_tensors; i++) {
        long long n = elements(&tensors[i]);
        for (long long at = 0; at < n; at += BUFFER) {
            int part = n - at < BUFFER ? (int)(n - at) : BUFFER;
            fill(buffer, &tensors[i], at, part, s->f32);
            fwrite(buffer, (size_t)element_size, (size_t)part, f);
        }
        total += n * element_size;
    }
    finish(f, name);
    return total;
}

int main(int argc, char **argv)
{
    const shape *s = NULL;
    long long parameters = 0, bytes;
    for (int i = 0; argc == 3 && i < SHAPES; i++)
        if (!strcmp(argv[1], shapes[i].name)) s = &shapes[i];
    if (!s) {
        fprintf(stderr, "use: shape NAME DIR, where NAME is one of");
        for (int i = 0; i < SHAPES; i++) fprintf(stderr, " %s", shapes[i].name);
        fprintf(stderr, "\n");
        return 2;
    }
    if (s->layout == QWEN) add_qwen(s);
    if (s->layout == DIT) add_dit(s);
    if (s->layout == SMDM) add_smdm(s);
    place(s->f32 ? 4 : 2);
    for (int i = 0; i < n_tensors; i++)
        if (!strstr(tensors[i].name, "inv_freq")) parameters += elements(&tensors[i]);
    if (parameters != s->parameters) fail("not the published parameters:", s->name);
    make_draws();
    if (s->config) write_config(s, argv[2]);
    bytes = write_tensors(s, argv[2]);
    printf("%s: %lld parameters, %lld bytes", s->name, parameters, bytes);
    if (s->bytes) printf(" (published: %lld)", s->bytes);
    printf("\n");
    return 0;
}
