/* dlm.h - v0.1.0 - small diffusion language models on a CPU, in one C file
   SPDX-License-Identifier: MIT OR Unlicense      both texts at the end of this file

   DO THIS in exactly ONE .c (or .cpp) file:
       #define DLM_IMPLEMENTATION
       #include "dlm.h"
   and a plain #include "dlm.h" everywhere else.  Link with -lm (and -pthread on old
   systems).  No other flag is needed: the kernels of every instruction set are
   compiled in, and dlm_init chooses the best one that the CPU has.

   A diffusion language model reads a canvas of tokens of which some are masked,
   predicts all of them at once from both sides, and fills them in over a few steps.
   Continuing a text, infilling it and filling in a form are therefore one call.

   A WHOLE PROGRAM                 examples/01_first_program.c has it with error checks

       #define DLM_IMPLEMENTATION
       #include "dlm.h"
       int main(void)
       {
           const char text[] = "the cat sat on the mat. the dog sat on the log. ";
           dlm_ctx *ctx; dlm_tokenizer *tok; dlm_model *model; dlm_trainer *trainer;
           dlm_config cfg = {0};                           // zero: the default
           int ids[64], canvas[48];
           size_t n;
           char out[64];
           if (dlm_init(&ctx, NULL) != DLM_OK) return 1;
           dlm_tokenizer_create(&tok, ctx, DLM_TOKENIZER_CHARS, text, sizeof text - 1);
           dlm_encode(tok, text, sizeof text - 1, ids, 64, &n);
           cfg.vocab = tok->vocab; cfg.max_seq = 48;
           cfg.dim = 64; cfg.layers = 2; cfg.heads = 2;
           dlm_model_create(&model, ctx, &cfg, 1, NULL);
           dlm_trainer_create(&trainer, ctx, model, NULL, NULL);
           for (int step = 0; step < 200; step++)
               dlm_trainer_step_text(trainer, ids, n, 48, 8, NULL);
           for (int i = 0; i < 48; i++)
               canvas[i] = i < 8 ? ids[i] : model->config.mask_id;
           dlm_sample(ctx, model, canvas, 48, NULL);       // fills in 8..47
           dlm_decode(tok, canvas, 48, out, sizeof out);
           puts(out);
       }

   CONTENTS                        grep -n '==\[' dlm.h lists the same with line numbers
       api                         types and prototypes, each with its contract
       platform memory random cpu  the ground: compiler, arenas, addressed bits, tables
       kernels instances           every inner loop once, compiled per instruction set
       threads                     jobs, a small pool
       options                     names, defaults and ranges of all options; the resolver
       context matmul              what all work is done with; packed, blocked products
       layers attention            forward and backward of each, side by side
       config parameters patterns  what a model is: sizes, the weight table, key ranges
       work passes                 activations, a batch; a layer up and down, passes
       sessions                    inference
       states                      what a pass learns from: cells, units, rows
       trainer optimizer           passes that learn; clipping, AdamW, averaging
       lift steps                  choosing masks: LIFT, or a rule of yours; one update
       sampler likelihood          filling in a canvas; scoring a text
       distill                     OPDLM: teacher, divergences, step maps
       json files                  a reader; whole files, written or left alone
       unicode tokenizers          bytes, characters, pieces, byte-level BPE
       safetensors layouts         files of tensors, and how families lay out weights
       checkpoints llama2c         models and training states on disk, and llama2.c's
       folders loading             published models; any model, from files, too
       history license

   COMPILE-TIME OPTIONS            define before including the implementation
       DLM_STATIC                  everything static, implementation included
       DLM_NO_SIMD                 scalar kernels only (small, portable, slow)
       DLM_NO_STDIO                no files: load from memory, nothing is saved
       DLM_NO_THREADS              no built-in pool; a hook still works
       DLM_ASSERT(x)               default assert(x): a cheap check of a contract
       DLM_MALLOC(n) DLM_FREE(p)   both or none; dlm_allocator replaces them at run time
       DLM_GUARD                   64, 128, ..: bytes of a pattern around the arrays of
                                   objects, which freeing asserts to be unharmed; sizes
                                   count them (default 0: none)
       DLM_SELF                    this file's name, if you renamed it: "my_dlm.h"
       DLM_ALLOW_FAST_MATH         -ffast-math, -ffinite-math-only and, where the compiler
                                   says so, -fassociative-math are refused without it
   and at run time the environment variable DLM_ISA=scalar, sse2, avx2, avx512,
   avx512bf16 (with dot products of bf16 and int8), amx or neon.
   Other macros of yours come through unchanged, and those called by one capital letter or
   abs, add, constrain, dot, max, min, round do no harm (gcc, clang, tcc, MSVC; values of
   the options above must not use them).

   SHAPES AND NAMES                row-major, last index fastest, contiguous
       N   rows (tokens) of a pass, all sequences one after the other    64 .. 4096
       S   sequences in a pass                                           1 .. 64
       T   tokens of one sequence                                        16 .. 1024
       P R prompt and response tokens of it, T = P + R
       Q   query rows: N, or in the last layer the rows looked at
       C   width of the model, `dim`                                     64 .. 1024
       H   query heads;  KV key/value heads;  G = H / KV per group       2 .. 16
       D   width of a head                                               8 .. 128
       F   width of the MLP, `ffn`                                       8/3 C
       V   vocabulary                                                    32 .. 152000
       L   layers                                                        2 .. 28
       M N K   of a matrix product;  b: tokens of a block
   Weights are (out, in).  dx is the gradient of x.  x_i means &x[i*...].

   WORDS                           each has one meaning here
       canvas  a text that is being filled in: tokens, and masks, which mean "not known"
       block   so many neighbouring tokens, filled in before the next block is begun
       row     one token of a pass: a line of every activation; rows looked at get logits
       slot    the place of a row's key and value, where other rows see them
       lane    the slots of one sequence in a session: its cache
       cell    a response token of a state, which may be masked and learned from
       unit    cells that share a noise level t: each is masked with probability t
       step    one update in training; one forward of all sequences in sampling
       round   a step in which something of this block was filled in, the first is 0
       state   what one pass learns from: examples, their masks and weights, the rows

   MEMORY                          one piece per object, from the allocator or from you
       How large, dlm_ctx_bytes and dlm_model_bytes say, and every creator that is called
       with out = NULL; tokenizers and files ask the allocator.  After creation a training
       step, a forward pass and a sampling step allocate nothing.  Threads need 300 KiB
       of stack.  An object must be freed before those it was made from (a packed
       model needs its plain one no longer).

   ERRORS                          nothing prints, exits or aborts
       The world failed (memory, files, data, options): a dlm_error, and a sentence in
       dlm_last_error(ctx).  Creators leave *out = NULL.  The caller broke a contract (a
       NULL where none is allowed): undefined.  The numbers went wrong: reported as data,
       grad_norm is then not finite and the weights stay as they were.

   THREADS AND DETERMINISM         one context per thread of control; no globals
       A forked child has no workers: it must not use or shut down its parent's context.
       The built-in pool needs POSIX threads and gcc's atomics; elsewhere give a hook, or
       one thread works.
       Same binary, same ISA: bit-identical results for any number of threads and any
       neighbours in a batch, because work is shared out over outputs, never over sums.
       In f32 ISAs agree to about 1e-5 relative; dlm_test checks 1e-4.  The same seed
       draws the same bits everywhere.

   HOW TO READ THIS FILE           begin with examples/00_by_hand.c: a whole model, its
       training and its sampler in 300 lines of plain C, every formula beside its code.
       Then api, and layers -> passes -> states -> sampler tell the same as it is
       here; lift, steps and distill go on from there; random, attention and matmul tell
       how it is made deterministic and fast; the rest is files and ground.

   WHAT THIS IS NOT                no GPU, no autograd, no strides or views, no mixture
       of experts, no training of models beyond some hundred million parameters. */

#ifndef DLM__KERNEL_PASS           /* door 1: a kernel pass skips all of this      */

#if defined(DLM_STATIC) || defined(__INTELLISENSE__) || defined(__JETBRAINS_IDE__)
#ifndef DLM_IMPLEMENTATION
#define DLM_IMPLEMENTATION         /* static needs the bodies; IDEs want to see them */
#endif
#endif

/* Macros of the includer that bear names used below, as in Arduino.h and windows.h (max,
   F, ...) and in many programs (N, K, ...), are set aside until the end of this file;
   both lists must name the same. */
#if defined(__GNUC__) || defined(_MSC_VER) || defined(__TINYC__)
#define DLM__SET_ASIDE             /* elsewhere such macros do not compile         */
#pragma push_macro("B")
#undef B
#pragma push_macro("C")
#undef C
#pragma push_macro("D")
#undef D
#pragma push_macro("F")
#undef F
#pragma push_macro("G")
#undef G
#pragma push_macro("H")
#undef H
#pragma push_macro("K")
#undef K
#pragma push_macro("L")
#undef L
#pragma push_macro("M")
#undef M
#pragma push_macro("N")
#undef N
#pragma push_macro("P")
#undef P
#pragma push_macro("Q")
#undef Q
#pragma push_macro("R")
#undef R
#pragma push_macro("S")
#undef S
#pragma push_macro("T")
#undef T
#pragma push_macro("V")
#undef V
#pragma push_macro("abs")
#undef abs
#pragma push_macro("add")
#undef add
#pragma push_macro("constrain")
#undef constrain
#pragma push_macro("dot")
#undef dot
#pragma push_macro("max")
#undef max
#pragma push_macro("min")
#undef min
#pragma push_macro("round")
#undef round
#endif

/* ==[ api ]===================================================================
   Everything a caller may use.  Nothing from section platform on is promised.
   Ordered as a program meets it: errors, context, random, math, model, batch, inference,
   sampling, objectives, states, lift, training, distillation, tokenizers, files. */
#ifndef DLM_H
#define DLM_H
#include <stddef.h>
#include <stdint.h>

#define DLM_VERSION_MAJOR 0
#define DLM_VERSION_MINOR 1
#define DLM_VERSION_PATCH 0

#ifndef DLM_API
  #if defined(DLM_STATIC) && defined(__GNUC__)
    #define DLM_API static __attribute__((unused))     /* clang has it, too        */
  #elif defined(DLM_STATIC)
    #define DLM_API static
  #else
    #define DLM_API extern
  #endif
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* --[ errors ]----------------------------------------------------------------
   A function that can fail returns dlm_error; the sentence that names the thing,
   what was wanted and what was found is in dlm_last_error(ctx), that of dlm_init in
   dlm_options.message. */

typedef enum dlm_error {
    DLM_OK = 0,
    DLM_E_NOMEM,         /* an allocation failed, or the memory given is too small */
    DLM_E_CONFIG,        /* a config or option struct contradicts itself           */
    DLM_E_INPUT,         /* tokens, lengths or rows that the object cannot take    */
    DLM_E_IO,            /* open, read or write failed                             */
    DLM_E_FORMAT,        /* the file is not what it claims to be                   */
    DLM_E_MISMATCH,      /* a sound file whose names or shapes do not fit          */
    DLM_E_UNSUPPORTED    /* a known feature not built in, or not on this CPU       */
} dlm_error;

DLM_API const char *dlm_error_string(dlm_error e);      /* static text, never NULL */

/* --[ context ]---------------------------------------------------------------
   One per thread of control.  Holds the allocator, the chosen kernels, the
   threads and the text of the last error.  There is no global state.  Finite numbers of
   ordinary size raise no floating-point exceptions but inexact and underflow, so a host
   may trap the others. */

typedef enum dlm_isa {
    DLM_ISA_AUTO = 0, DLM_ISA_SCALAR, DLM_ISA_SSE2, DLM_ISA_AVX2,
    DLM_ISA_AVX512,      /* F and BW                                               */
    DLM_ISA_AVX512BF16,  /* and dot products of bf16 and int8 (VNNI); AUTO takes it on
                            AMD alone, where that of bf16 is faster than f32's     */
    DLM_ISA_AMX,         /* and tiles of both; Linux is asked for them             */
    DLM_ISA_NEON, DLM_ISA_COUNT
} dlm_isa;

typedef struct dlm_allocator {             /* all zero: DLM_MALLOC and DLM_FREE    */
    void *(*alloc)(void *user, size_t size);        /* aligned as malloc's; or NULL */
    void  (*release)(void *user, void *ptr);
    void   *user;
} dlm_allocator;

/* Where an object shall live, for the creators that take one: NULL asks the allocator for
   a single block; otherwise the object is placed at base (any alignment, size bytes of
   it).  Such an object must still be freed (its threads and files are released), base is
   not.  With out = NULL a creator checks all that it is given and makes nothing: it puts
   the bytes that base must have into mem->size, to the byte what it would take (mem NULL:
   it only checks). */
typedef struct dlm_memory {
    void  *base;
    size_t size;
} dlm_memory;

typedef struct dlm_options {               /* all zero is right for most programs  */
    int           threads;                 /* * = 1, never "all cores" unasked; at most
                                              the cores there are.  On glibc workers keep
                                              off the core that called dlm_init, if there
                                              are enough others; the caller's own affinity
                                              is left alone                        */
    dlm_isa       isa;                     /* AUTO: env DLM_ISA, else the best     */
    dlm_allocator allocator;
    /* Your own pool: run job(arg, i) for every i in [0, n), in any order, on any
       threads, and return when all are done.  NULL: the built-in pool. */
    void (*parallel_for)(void *user, int n, void (*job)(void *arg, int i), void *arg);
    void         *parallel_user;
    dlm_memory    memory;                  /* where the context lives; base NULL: ask
                                              the allocator                        */
    size_t        scratch;                 /* * = 1 MiB: room for the matmul's packed
                                              panels, of which one must fit: 4 KiB for
                                              scalar, 8 sse2 and neon, 16 avx2, 32 avx512
                                              and above.  Changes no result        */
    char         *message;                 /* (message_size) gets the sentence when
                                              dlm_init or dlm_ctx_bytes fails, when there
                                              is no context to ask; else not touched, not
                                              kept.  NULL: nobody wants it         */
    size_t        message_size;
} dlm_options;

typedef struct dlm_ctx dlm_ctx;

DLM_API size_t      dlm_ctx_bytes(const dlm_options *opt);      /* 0: options invalid */
DLM_API dlm_error   dlm_init(dlm_ctx **out, const dlm_options *opt); /* NULL: zeros */
DLM_API void        dlm_shutdown(dlm_ctx *ctx);                      /* NULL is ok  */
/* The sentence of the last call that failed, "" before the first; successes leave it as
   it is.  ctx NULL: "". */
DLM_API const char *dlm_last_error(const dlm_ctx *ctx);
DLM_API dlm_isa     dlm_active_isa(const dlm_ctx *ctx);
DLM_API int         dlm_active_threads(const dlm_ctx *ctx);
/* On this CPU, 1 or 0.  For AMX, as in DLM_ISA_AUTO, Linux is asked to keep the tiles of
   this process: signal stacks must then have room for 8 KiB more. */
DLM_API int         dlm_isa_supported(dlm_isa isa);
DLM_API const char *dlm_isa_name(dlm_isa isa);            /* "avx2"; what DLM_ISA takes */

/* --[ random ]----------------------------------------------------------------
   Randomness is addressed, not consumed: bits are a pure function of where they are
   used (Philox4x32-10; Salmon et al., SC 2011).  Results therefore do not depend on
   threads, on the order of work or on the neighbours in a batch. */

typedef enum dlm_purpose {                 /* one stream of randomness each        */
    DLM_RANDOM_INIT = 1, DLM_RANDOM_DATA, DLM_RANDOM_LEVEL, DLM_RANDOM_MASK,
    DLM_RANDOM_ORDER, DLM_RANDOM_TOKEN, DLM_RANDOM_LIKELIHOOD,
    DLM_RANDOM_LIFT = 9, DLM_RANDOM_SELECT, DLM_RANDOM_DISTILL,
    DLM_RANDOM_USER = 64                   /* and above: yours                     */
} dlm_purpose;

typedef struct dlm_address {
    uint64_t seed;
    uint32_t purpose, step, row, position; /* row: mostly the sequence; position: in it */
} dlm_address;

/* 128 bits, number `index` at this address. */
DLM_API void   dlm_random_bits(const dlm_address *at, uint32_t index, uint32_t out[4]);
/* Uniform in [0, 1) with 53 bits; index counts numbers, two per block of bits. */
DLM_API double dlm_uniform(const dlm_address *at, uint32_t index);
/* The i-th entry of a random permutation of 0..n-1, computed without a table: the
   same (seed, epoch) visits every example once.  n >= 1, 0 <= i < n. */
DLM_API size_t dlm_shuffled(uint64_t seed, uint32_t epoch, size_t n, size_t i);

/* --[ math ]------------------------------------------------------------------
   Usable without any model.  Row-major, overwriting out, which must not overlap a or b;
   sizes of 0 are allowed.
     _nn   out (M,N) = a (M,K) @ b (K,N)
     _nt   out (M,N) = a (M,K) @ b (N,K)^T     the layout linear layers keep
     _tn   out (M,N) = a (K,M)^T @ b (K,N)     the shape of a weight gradient
   Each output is one chain of multiply-adds (fused where the ISA can) over k = 0 .. K-1,
   whatever M and N are: a row of the result never depends on how many rows were asked
   for. */

DLM_API void dlm_matmul_nn(dlm_ctx *ctx, float *out, const float *a, const float *b,
                           int M, int N, int K);
DLM_API void dlm_matmul_nt(dlm_ctx *ctx, float *out, const float *a, const float *b,
                           int M, int N, int K);
DLM_API void dlm_matmul_tn(dlm_ctx *ctx, float *out, const float *a, const float *b,
                           int M, int N, int K);

typedef enum dlm_dtype {                   /* types of numbers, here and in files  */
    DLM_F32 = 0, DLM_F16, DLM_BF16, DLM_F64, DLM_I64, DLM_I32, DLM_I16, DLM_I8, DLM_U8,
    DLM_BOOL,
    DLM_DTYPE_OTHER,                       /* none of these: U16, F8_E4M3, ...     */
    DLM_DTYPE_COUNT
} dlm_dtype;

/* What a linear layer multiplies by: weights (rows, cols) = (out, in), as floats where
   they lie, or packed, rearranged once for the kernels of one ctx.  The memory of either
   is borrowed.  type says what both factors are rounded to before they are multiplied:
     F32   nothing is rounded
     BF16  both to nearest even, products are summed in f32: about 2^-9 of error per
           factor.  ISAs agree to the order of two sums, and to what avx512bf16 and amx
           flush to zero (below 2^-126)
     I8    packed only.  Rows of both are scaled to -127..127 and rounded, sums are exact:
           the same bits on every ISA.  A row that is not finite gives NaN or infinity,
           one below 4e-37 counts as zeros.  At most DLM_I8_MOST columns, or sums
           overflow                                                                */
#define DLM_I8_MOST 131072
typedef struct dlm_matrix {
    int         rows, cols;
    dlm_dtype   type;
    int         packed;                    /* 0: data is float (rows, cols)        */
    const void *data;
} dlm_matrix;

/* Bytes of rows * cols packed weights: about 4, 2 or 1 each. */
DLM_API size_t     dlm_pack_bytes(const dlm_ctx *ctx, dlm_dtype type, int rows, int cols);
/* Packs w (rows, cols) into memory of that many bytes, aligned to 64; type F32, BF16, I8
   (F32 alone where floats are x87's, see dlm_model_pack for an error instead). */
DLM_API dlm_matrix dlm_pack(const dlm_ctx *ctx, void *memory, dlm_dtype type,
                            const float *w, int rows, int cols);
/* out (M, w->rows) = a (M, w->cols) @ w^T. */
DLM_API void       dlm_matmul(dlm_ctx *ctx, float *out, const float *a,
                              const dlm_matrix *w, int M);

/* --[ model ]-----------------------------------------------------------------
   A pre-norm transformer: RMSNorm, rotary positions (half-split), grouped-query
   attention, SwiGLU.  Covers LLaMA, Qwen2/2.5 (qkv_bias), Qwen3 (QK-norm), SDAR,
   LLaDA and Dream (shifted), and MDLM's DiT (gelu_mlp, head_bias) with its LayerNorms and
   modulation folded into weights.  Weights are read-only while in use and may be shared
   by any number of sessions.  A model is plain, one flat block of floats that can be
   trained and saved, or packed: made from a plain one to run quickly in f32, bf16 or
   int8, needing it no longer.  Denormal ones (below 2^-126) are numbers like any others
   in f32 and in files; what narrower words make of them, dlm_pack says. */

typedef enum dlm_pattern {   /* which keys may a row see (0: the default)          */
    DLM_PATTERN_BLOCK = 0,   /* its own block and all earlier ones (BD3-LM)        */
    DLM_PATTERN_FULL,        /* the whole sequence (LLaDA, MDLM)                   */
    DLM_PATTERN_CAUSAL       /* itself and what came before: an autoregressive LM  */
} dlm_pattern;

typedef struct dlm_config {                /* 0 in a field marked * = the default  */
    int   vocab, dim, layers, heads;       /* V, C, L, H: required                 */
    int   max_seq;                         /* largest T:  required                 */
    int   mask_id;                         /* * = vocab - 1: stands for "not known", is
                                              never emitted and in no text; = vocab (no
                                              token) is allowed when causal        */
    int   mask_is_0;                       /* 1: the mask is token 0, mask_id stays 0 */
    dlm_pattern pattern;                   /* 0 is BLOCK                           */
    int   block;                           /* * = 8: tokens in a block (pattern BLOCK) */
    int   shifted;                         /* row i-1 predicts token i; 0: row i.
                                              Always 1 when causal                 */
    int   kv_heads;                        /* * = heads; must divide heads  (KV)   */
    int   head_dim;                        /* * = dim / heads; even, <= 256 (D)    */
    int   ffn;                             /* * = 8/3 dim, rounded up to 32 (F)    */
    int   untied_head;                     /* 0: the head is the embedding         */
    int   no_qk_norm;                      /* 0: RMSNorm per head on q and k       */
    int   qkv_bias;                        /* 1: biases on q, k, v (Qwen2, Dream)  */
    float rope_theta;                      /* * = 10000; short sequences (64) learn faster
                                              with 10 to 100                       */
    float norm_eps;                        /* * = 1e-6                             */
    int   gelu_mlp;                        /* 1: no gate, the MLP is down(gelu(up x + b))
                                              + b, GELU in its tanh form: MDLM's, and what
                                              GPT-2 calls gelu_new; 0: SwiGLU      */
    int   head_bias;                       /* 1: logits + bias (V).  A token of bias
                                              -INFINITY has probability 0 and no gradient,
                                              whatever is learned (SUBS: MDLM's mask) */
} dlm_config;

typedef struct dlm_model {                 /* open for reading                     */
    dlm_config config;                     /* with every default filled in         */
    dlm_dtype  type;                       /* packed: what it is multiplied in     */
    size_t     n_params;                   /* floats in weights                    */
    float     *weights;                    /* (n_params) one flat block; packed: NULL */
    dlm_ctx   *ctx;                        /* where it was made                    */
    struct dlm__packed *packed;            /* private; NULL: plain                 */
    char       origin[320];                /* what dlm_open found, in lines        */
} dlm_model;

typedef struct dlm_tensor {                /* one named piece of weights           */
    char   name[64];                       /* the Hugging Face name                */
    float *data;                           /* (rows, cols), inside model->weights  */
    int    rows, cols;                     /* cols = 1: a vector                   */
    int    layer;                          /* -1: outside the layers               */
    int    decayed;                        /* weight decay applies (matrices)      */
} dlm_tensor;

/* Fills in every default, or says what is wrong (DLM_E_CONFIG). */
DLM_API dlm_error dlm_config_resolve(dlm_ctx *ctx, dlm_config *cfg);
/* What a model of this config takes in ctx, from its config alone: plain (packed 0, type
   DLM_F32), or packed in DLM_F32, DLM_BF16 or DLM_I8.  0: invalid, dlm_last_error says
   why. */
DLM_API size_t    dlm_model_bytes(dlm_ctx *ctx, const dlm_config *cfg, dlm_dtype type,
                                  int packed);
/* Fresh random weights: normal(0.02), residual outputs scaled by 1/sqrt(2L), norms 1. */
DLM_API dlm_error dlm_model_create(dlm_model **out, dlm_ctx *ctx, const dlm_config *cfg,
                                   uint64_t seed, dlm_memory *mem);
/* Weights that already exist (flash, a mapped file): n_params floats in the order of
   dlm_model_tensor, borrowed and never written unless trained. */
DLM_API dlm_error dlm_model_wrap(dlm_model **out, dlm_ctx *ctx, const dlm_config *cfg,
                                 const float *weights, size_t n_params);
DLM_API void      dlm_model_free(dlm_model *m);                        /* NULL is ok */
DLM_API int       dlm_model_tensors(const dlm_model *m);     /* how many; packed: 0  */
DLM_API void      dlm_model_tensor(const dlm_model *m, int i, dlm_tensor *out);
/* A copy of a plain model with weights of its own: a frozen teacher, a baseline. */
DLM_API dlm_error dlm_model_clone(dlm_model **out, dlm_ctx *ctx, const dlm_model *plain,
                                  dlm_memory *mem);
/* All of it as text, a line each: form, type, parameters, bytes and the fields of the
   config.  Writes at most size - 1 bytes and a zero; returns the bytes there are without
   the zero (out may be NULL to ask). */
DLM_API size_t    dlm_describe(const dlm_model *m, char *out, size_t size);
/* The packed form of a plain model for ctx's kernels, type DLM_F32, DLM_BF16 or DLM_I8:
   matrices packed, vectors in f32, embeddings read from what is packed.  Sessions on any
   number of contexts of the same ISA may share it. */
DLM_API dlm_error dlm_model_pack(dlm_model **out, dlm_ctx *ctx, const dlm_model *plain,
                                 dlm_dtype type, dlm_memory *mem);
/* Once more from a plain model of the same config, after it was trained on, say; no
   session of it may be in a forward. */
DLM_API dlm_error dlm_model_repack(dlm_model *packed, const dlm_model *plain);

/* --[ batch ]-----------------------------------------------------------------
   What a forward pass is given: rows (tokens), grouped into sequences of any length
   without padding, and for every row the keys it may see, as at most two ranges.
   Every pattern there is reduces to this: full, causal, block, prefix, and the
   doubled row [prompt | clean | noisy] of block-diffusion training.  No token means
   padding, here or anywhere else: one that you pad with is seen, kept and learnt like
   any other.  Give lengths instead. */

typedef struct dlm_keys {                  /* slots [lo0,hi0) and [lo1,hi1) of the  */
    int lo0, hi0, lo1, hi1;                /* row's own sequence; disjoint, in order */
} dlm_keys;                                /* lo1 == hi1: one range only           */

typedef struct dlm_batch {
    int        n_seqs;                     /* S                                    */
    const int *start;                      /* (S+1) sequence s is rows start[s] ..
                                              start[s+1]-1; start[0] = 0, N = start[S] */
    const int *tokens;                     /* (N)                                  */
    const int *positions;                  /* (N) rotary positions, less than max_seq and
                                              slots (of a trainer: max_rows); NULL: the
                                              slot                                 */
    const int *slots;                      /* (N) where the row's key and value go, in its
                                              own sequence, all different; NULL: its
                                              place there.  A slot that is seen before it
                                              is written holds what was there before */
    const int *lanes;                      /* (S) which cache of the session; NULL: s */
    const dlm_keys *keys;                  /* (N)                                  */
    const int *out_rows;                   /* (n_out) rows that are looked at, strictly
                                              increasing; only these get logits    */
    int        n_out;
} dlm_batch;

/* Looks at the logits (V) of row out_rows[i].  In a training pass they must be
   overwritten with d(loss)/d(logits).  Runs once per i, on any thread, in any order:
   touch only what belongs to i, and start no other work of the same context. */
typedef void (*dlm_score_fn)(void *user, int i, float *logits);

/* Keys of T rows standing in slots 0 .. T-1.  Blocks of `block` tokens begin at every
   slot congruent to offset modulo block; what is before the first is a shorter one. */
DLM_API void dlm_keys_fill(dlm_keys *keys, int T, dlm_pattern pattern, int block,
                           int offset);

/* --[ inference ]-------------------------------------------------------------
   A session owns what one user of a model needs: activations and the K/V cache.  The
   model is only read, as it is at each forward.  Forwards of few rows are several times
   faster on a packed model: a plain one is packed anew, piece by piece, each time. */

typedef struct dlm_limits {                /* 0 in a field marked * = the default  */
    int seqs;                              /* * = 1: sequences in one forward      */
    int slots;                             /* * = max_seq: keys of one sequence    */
    int rows;                              /* * = seqs * slots: rows in one forward */
    int out;                               /* * = rows: rows looked at             */
    int cached;                            /* 1: keep keys and values between calls
                                              (needs layers times the memory)      */
} dlm_limits;

typedef struct dlm_session dlm_session;

DLM_API dlm_error dlm_session_create(dlm_session **out, dlm_ctx *ctx, const dlm_model *m,
                                     const dlm_limits *lim, dlm_memory *mem);
DLM_API void      dlm_session_free(dlm_session *s);                    /* NULL is ok */
/* One forward pass; score sees the logits of every out row (NULL: only fill caches). */
DLM_API dlm_error dlm_forward(dlm_session *s, const dlm_batch *b, dlm_score_fn score,
                              void *user);
/* The same, logits copied out: (n_out, V). */
DLM_API dlm_error dlm_logits(dlm_session *s, const dlm_batch *b, float *logits);
/* Floating-point operations of one forward (multiply-add = 2): matmuls and attention
   over the keys that are seen.  A training pass costs three times as much. */
DLM_API double    dlm_forward_flops(const dlm_config *resolved, const dlm_batch *b);

/* Monte Carlo estimate of log p(response | prompt) in nats (LLaDA, see likelihood):
   the number of masks is stratified over 1..n, the weight is n/l.  Its expectation is
   a lower bound (ELBO) for diffusion patterns; exact, with samples ignored, when
   causal.  tokens (T), response = tokens[P..T); a shifted model cannot score token 0.
   Needs T slots and rows, for BLOCK T + the response rounded up to whole blocks (not
   beyond max_seq), out >= T - P, and overwrites the keys in lane 0.  Allocates its work
   space and frees it.  Logits that are not numbers give NaN, not an error. */
DLM_API dlm_error dlm_log_likelihood(dlm_session *s, const int *tokens, int T, int P,
                                     int samples, uint64_t seed, double *nats);

/* --[ sampling ]--------------------------------------------------------------
   The canvas is the interface: tokens equal to mask_id are filled in, all others are
   fixed.  The mask token is never emitted, a given token never changes.  A sampler
   asks for rows, is shown their logits, and answers on the canvas; who runs the rows is
   all the same to it: a session, a network of your own, or nobody, when the logits of
   an earlier run were kept. */

typedef enum dlm_order {     /* which masked positions are filled in this step     */
    DLM_ORDER_CONFIDENCE = 0,/* the planned number of most confident ones (LLaDA)  */
    DLM_ORDER_THRESHOLD,     /* all with confidence > threshold, at least the plan */
    DLM_ORDER_ENTROPY,       /* the planned number of lowest entropies             */
    DLM_ORDER_ENTROPY_BOUND, /* ascending while the entropies sum to < entropy_bound, at
                                least one: those of what is drawn from, tempered and
                                filtered (SDAR); at temperature 0 the model's own  */
    DLM_ORDER_MARGIN,        /* the planned number of largest p1 - p2              */
    DLM_ORDER_RANDOM,        /* the planned number, uniformly                      */
    DLM_ORDER_SEQUENTIAL,    /* the planned number, left to right                  */
    DLM_ORDER_ANCESTRAL,     /* each with probability 1 - s/t (MDLM)               */
    DLM_ORDER_FIRST_HITTING, /* one, uniformly; time shrinks by u^(1/masks) (BD3-LM) */
    DLM_ORDER_COUNT
} dlm_order;

typedef struct dlm_event {                 /* a token that was filled in, or drawn  */
    int   seq, position, token;
    int   step;                            /* 1-based, counted per sequence        */
    float confidence;                      /* untempered probability of the token  */
    float time;                            /* noise level left, 1 .. 0 in its block */
    int   drawn_only;                      /* 1: not filled in (list_drawn)        */
} dlm_event;

/* Pointers in it are borrowed until the sampler is freed. */
typedef struct dlm_sample_options {        /* 0 in a field marked * = the default  */
    int      steps;                        /* * = one per token: steps per block.  The
                                              plan of a step is n // steps tokens, the
                                              first n % steps steps one more, at least 1;
                                              n: `block`, whatever of it is visible or
                                              beyond the end (BLOCK, CAUSAL: SDAR, OPDLM),
                                              or the masks that there were (FULL: LLaDA).
                                              A block with masks left when its steps are
                                              used up (ENTROPY_BOUND, remask_below) goes
                                              on at the same rate                  */
    int      block;                        /* * = config.block, or the whole canvas
                                              when the pattern is FULL             */
    int      absolute_blocks;              /* 0: blocks are counted from the end of the
                                              prompt (the visible prefix); 1: from
                                              position 0 (SDAR's files)            */
    dlm_order order;                       /* 0 is CONFIDENCE                      */
    float    threshold;                    /* * = 0.9, for THRESHOLD.  What 0 would mean,
                                              whole blocks at once, is 1e-30       */
    int      left_first;                   /* 1: THRESHOLD fills its plan up from the
                                              left instead of with the surest ones: for
                                              students that ignore their right     */
    float    entropy_bound;                /* * = 0.35 nats, for ENTROPY_BOUND     */
    float    temperature;                  /* 0 is argmax: a real value, not "auto"; the
                                              smallest floats are as good as 0     */
    int      top_k;                        /* 0: off                               */
    float    top_p, min_p;                 /* 0: off                               */
    const float *logit_bias;               /* (V) added to the logits, -INFINITY forbids
                                              a token (unless constrain sets it anew);
                                              NULL: none                           */
    const int   *suppress;                 /* (n_suppress) tokens never emitted    */
    int      n_suppress;
    const int   *stop;                     /* (n_stop) tokens that end a sequence when
                                              they are emitted                     */
    int      n_stop;
    /* Says what may stand at a position, by rewriting its logits (V): guidance and
       logit_bias are in, suppressed tokens and the mask token will be forbidden.  Numbers
       and -INFINITY may be written, all there is to confidence, entropy and margin is
       what this leaves.  Runs on any thread, for all positions that are looked at side
       by side: write only what belongs to (seq, position).  All through a step, from ask
       to answer, the canvas is as the step began and may be read: tokens that stand
       there, and masks, this position's among them (with remask_below it can be a token
       instead, whose logits now judge it).  What one position gets another does not see,
       so rules between positions need an order that fills in one at a time.  Tokens 0
       and 1 of a shifted model come from one row: when both are masked there is one
       call, for 0.  NULL: everything is allowed. */
    void   (*constrain)(void *constrain_user, int seq, int position, float *logits);
    void    *constrain_user;
    /* Called after every step with what it added to the trace.  NULL: nobody watches. */
    void   (*on_step)(void *step_user, const dlm_event *events, int n_events);
    void    *step_user;
    /* The random numbers of the run, in [0, 1); the same whenever the same is asked, on
       any thread.  NULL: dlm_uniform(at, 0).  Of `at`, seed is the one below, row the
       sequence's of ids, step its step, counted from 0, and
           purpose            position     asked for
           DLM_RANDOM_TOKEN   p            the token at p, by inverting the CDF
           DLM_RANDOM_ORDER   p            RANDOM, FIRST_HITTING: the smallest go first
           DLM_RANDOM_ORDER   p, step 0    ANCESTRAL: p's turn, steps * u rounded down
           DLM_RANDOM_ORDER   the length   FIRST_HITTING: the time, times u^(1/masks)
       TOKEN only at a temperature above 0, for every masked position that is looked at;
       of tokens 0 and 1 of a shifted model, when both are masked, for 0 alone. */
    double (*uniform)(void *uniform_user, const dlm_address *at);
    void    *uniform_user;
    uint64_t seed;                         /* 0 is a seed like any other           */
    float    guidance;                     /* classifier-free: logits u + (s+1)(c - u), u
                                              with all tokens masked that were given,
                                              wherever they stand (LLaDA); needs limits of
                                              twice the sequences, as each is run twice
                                              in the same forward; 0: none         */
    float    remask_below;                 /* a token of the active block is masked again,
                                              once, when its probability falls below this;
                                              0: never                             */
    const uint32_t *ids;                   /* (n_seqs) who each sequence is to the random
                                              numbers; NULL: its index in the batch */
    int      list_drawn;                   /* 1: the trace lists after the tokens of each
                                              sequence's step what else it had drawn but
                                              did not fill in, best first (the blind
                                              orders, RANDOM and below, fill in all they
                                              draw).  Room for it grows with the square
                                              of the block                         */
} dlm_sample_options;

typedef struct dlm_sampler dlm_sampler;

/* A sampler drives a session that outlives it.  For BLOCK and CAUSAL models the
   session should be cached; each step then runs only the rows of the current block
   and the final keys of a finished block are stored in the next one's first step. */
DLM_API dlm_error dlm_sampler_create(dlm_sampler **out, dlm_session *s,
                                     const dlm_sample_options *opt, dlm_memory *mem);
/* The same without a session or a model, from sizes alone: of config only vocab, max_seq,
   mask_id, mask_is_0, pattern, block and shifted matter, with the usual defaults, and dim
   may be 0; lim NULL: zeros.  No step can be run but by asking, scoring and answering.  A
   network that keeps no keys and values leaves lim.cached 0: every step then asks for all
   rows from slot 0 on. */
DLM_API dlm_error dlm_sampler_create_for(dlm_sampler **out, dlm_ctx *ctx,
                                         const dlm_config *config, const dlm_limits *lim,
                                         const dlm_sample_options *opt, dlm_memory *mem);
DLM_API void      dlm_sampler_free(dlm_sampler *sm);                   /* NULL is ok */
/* canvas: n_seqs rows of limits.slots tokens, written in place, caller-owned, must
   stay until the end; lengths (n_seqs) tokens used of each, the rest is not looked at.
   Resets everything. */
DLM_API dlm_error dlm_sampler_begin(dlm_sampler *sm, int *canvas, const int *lengths,
                                    int n_seqs);
/* One step of all sequences that are not done (of none: DLM_OK) is dlm_sampler_ask,
   dlm_forward(session, &b, dlm_sampler_score, sm), and dlm_sampler_answer. */
DLM_API dlm_error dlm_sampler_step(dlm_sampler *sm);
/* The rows to be run now and those to be looked at; b points into the sampler and holds
   until the next ask.  Asking again asks the same.  DLM_E_INPUT: the limits have no room
   for them, or every sequence is done. */
DLM_API dlm_error dlm_sampler_ask(dlm_sampler *sm, dlm_batch *b);
/* Is shown the logits (V) of row out_rows[i], once for each i, in any order, on any
   thread; overwrites them.  A dlm_score_fn. */
DLM_API void      dlm_sampler_score(void *sampler, int i, float *logits);
/* Fills in, extends the trace and calls on_step.  DLM_E_INPUT: not asked, not all shown,
   or, with sequence and position, every token is forbidden there or a logit is NaN or
   +INFINITY, be it the model's or made so by guidance, logit_bias or constrain, and of a
   suppressed token, too.  The canvas is then what it was, and the same step may be tried
   again, from ask on. */
DLM_API dlm_error dlm_sampler_answer(dlm_sampler *sm);
DLM_API int       dlm_sampler_done(const dlm_sampler *sm);
/* Tokens of a sequence up to and including its stop token (or its whole length).
   What had been filled in after a stop token is masked again. */
DLM_API int       dlm_sampler_length(const dlm_sampler *sm, int seq);
/* Every token filled in since begin, in order; replaying them redraws the run (also
   what a stop token then cut off; a token that is masked again is listed again when it
   is filled in again).  What is drawn_only was never there. */
DLM_API const dlm_event *dlm_sampler_trace(const dlm_sampler *sm, int *n_events);
/* The step at which each token of a sequence was filled in, 0 where it was given.  steps
   (session slots) of which dlm_sampler_length are written. */
DLM_API void      dlm_sampler_steps(const dlm_sampler *sm, int seq, int *steps);
/* Forward passes and their operations since begin: the cost of parallel decoding (of
   operations only a session knows). */
DLM_API void      dlm_sampler_cost(const dlm_sampler *sm, int *forwards, double *flops);

/* One canvas (T), filled in, with a session, and of a plain model its packed form, made
   and freed on the way. */
DLM_API dlm_error dlm_sample(dlm_ctx *ctx, const dlm_model *m, int *tokens, int T,
                             const dlm_sample_options *opt);

/* --[ objectives ]------------------------------------------------------------
   What a diffusion language model learns.  Of a text x every response token is masked
   with probability t, the noise level; x_t is what is left to see.  With t uniform
       L(x) = E_t E [ 1/t  sum over masked i of  -log p(x_i | x_t) ]  >=  -log p(x)
   bounds the information in the text (MDLM, Sahoo et al. 2024; LLaDA, Nie et al. 2025,
   eq. 3).  1/t, because a token is masked with probability t: in expectation each counts
   once at every level.  A report's loss is L per response token, in nats. */

typedef enum dlm_objective {
    DLM_OBJECTIVE_AUTO = 0,  /* what the model's pattern asks for, in this order:  */
    DLM_OBJECTIVE_BLOCK,     /* CE/t on masked, t per block, doubled row (BD3-LM)  */
    DLM_OBJECTIVE_MDLM,      /* CE/t on masked, t per sequence (LLaDA, MDLM)       */
    DLM_OBJECTIVE_AR         /* next-token CE                                      */
} dlm_objective;

/* One sequence to learn from; what is not needed is 0.  Every token of the response
   carries loss: there is no padding token, what pads a text is learned like the rest.
   The mask is refused. */
typedef struct dlm_example {
    const int *tokens;                     /* (length)                             */
    int        length;                     /* 1 .. max_seq                         */
    int        prompt;                     /* leading tokens never masked or scored; where
                                              all are, the example contributes nothing */
    int        canvas;                     /* tokens of the canvas it was, or will be,
                                              filled in on, >= length; 0: a long one.  A
                                              text that ends inside a block is shown to a
                                              BLOCK model as the sampler shows it: masks,
                                              without loss, up to the end of the block, or
                                              of the canvas or max_seq where that is
                                              nearer                               */
    const int *steps;                      /* (length) its step map: in which step each
                                              token was filled in, 0: given
                                              (dlm_sampler_steps); for distillation.
                                              NULL: there is none                  */
} dlm_example;

/* -log softmax(logits)[target], and logits (V) become weight * (softmax - onehot).  Both
   are NaN when a logit is NaN or +INFINITY or all are -INFINITY: no error, but data. */
DLM_API double dlm_cross_entropy(dlm_ctx *ctx, float *logits, int V, int target,
                                 double weight);
/* log sum exp of logits (V) and, where not NULL, the largest entry's index.  NaN when one
   is NaN or +INFINITY, -INFINITY when all are. */
DLM_API double dlm_log_sum_exp(dlm_ctx *ctx, const float *logits, int V, int *argmax);

/* --[ states ]----------------------------------------------------------------
   A state is what one pass learns from: some examples, noised.  First their response
   tokens stand side by side as cells, each masked or not; units are runs of cells that
   share a noise level, blocks (BLOCK) or whole responses.  Then they are laid out as the
   rows of a batch.  Two examples, `|` where the prompt ends, with blocks of 2:
       examples    the cat | sat on a mat       he | ran
       cells                 0   1  2  3            4
       units                 0----  1----           2-
       rows        the cat sat on a mat  __ on  a __        he ran  __ __
                   clean copy of 6       noisy: 0, 1        clean   noisy, to its end
   FULL has the noisy copy alone, prompt included, AR the clean one but its last token.
   The doubled row of the first example, x: row sees column; P = 2, R = 4 (BD3-LM,
   Arriola et al. 2025):
                      p0 p1 c0 c1 c2 c3 n0 n1 n2 n3
             p0 p1     x  x  .  .  .  .  .  .  .  .    prompt
             c0 c1     x  x  x  x  .  .  .  .  .  .    clean: its block, all before it
             c2 c3     x  x  x  x  x  x  .  .  .  .
             n0 n1     x  x  .  .  .  .  x  x  .  .    noisy: the clean past, its block
             n2 n3     x  x  x  x  .  .  .  .  x  x
   An objective is a function on a state.  dlm_trainer_step is: take, noise, choose
   (LIFT), lay out, pass with dlm_state_loss, update; examples/08 writes it out. */

typedef enum dlm_select {    /* which masked tokens keep their mask                */
    DLM_SELECT_RANDOM = 0,
    DLM_SELECT_EASIEST,      /* largest log p(gold), of the true token: top-k      */
    DLM_SELECT_HARDEST       /* smallest: bottom-k                                 */
} dlm_select;

typedef struct dlm_unit {
    int    example;                        /* of the state                         */
    int    cell, n;                        /* its cells are cell .. cell + n - 1   */
    int    blind;                          /* 1: no row predicts its first cell, token
                                              0 of a shifted model: no loss        */
    int    wanted;                         /* 0: is not laid out                   */
    double t;                              /* noise level                          */
    double rho;                            /* LIFT: what is masked beyond t, and   */
    dlm_select keep;                       /* which of these stay masked           */
} dlm_unit;

typedef struct dlm_noise {                 /* 0 in a field marked * = the default  */
    uint64_t seed;
    uint32_t step;                         /* address of the random numbers        */
    int      independent;                  /* 0: levels stratified over the step   */
    double   lo, hi;                       /* * = 0.001, 1: range of the levels, within
                                              0 < lo <= hi <= 1                    */
    int      all;                          /* units of the step; * = up to this state's */
    int      first, row;                   /* units, examples of the step before these */
} dlm_noise;

typedef struct dlm_state {                 /* open for reading; what is in units, masked,
                                              weight, score, scale and out_weight for
                                              writing, too                         */
    dlm_ctx   *ctx;
    dlm_config config;
    dlm_objective objective;
    int        rows, seqs;                 /* room for                             */
    const dlm_example *examples;           /* (n_examples) borrowed                */
    int        n_examples, n_units, n_cells;
    int       *first_cell, *first_unit;    /* (n_examples + 1)                     */
    dlm_unit  *units;                      /* (n_units)                            */
    dlm_noise  noise;                      /* what it was noised with              */
    unsigned char *masked;                 /* (n_cells)                            */
    float     *weight;                     /* (n_cells) of its loss when masked    */
    float     *score;                      /* (n_cells) log p(gold), or entropy    */
    double     scale;                      /* of all weights: 1 over the response tokens
                                              that could carry loss                */
    dlm_batch  batch;                      /* what is laid out; by row looked at,  */
    int       *targets, *out_cell;         /* (batch.n_out) token and cell it predicts */
    float     *out_weight, *out_level;     /* weight of that cell, its t           */
    double    *loss;                       /* cross-entropy, by dlm_state_loss     */
    int       *start, *tokens, *positions, *out_rows;    /* the batch's            */
    dlm_keys  *keys;
} dlm_state;

/* config: of the model that will run the batches.  AUTO is what its pattern asks for.
   rows: of a pass; seqs 0: of so many sequences as the trainer has. */
DLM_API dlm_error dlm_state_create(dlm_state **out, dlm_ctx *ctx,
                                   const dlm_config *config, dlm_objective objective,
                                   int rows, int seqs, dlm_memory *mem);
DLM_API void      dlm_state_free(dlm_state *s);                        /* NULL is ok */
/* The first examples of n that fit, n_examples of them.  views 2: each twice, as long as
   it takes for dlm_state_layout to add a second view.  DLM_E_INPUT names an example that
   contradicts itself or could never fit. */
DLM_API dlm_error dlm_state_take(dlm_state *s, const dlm_example *examples, int n,
                                 int views);
/* A level for every unit, masks at that rate, weights 1/t; scale for this state alone.
   AR: all count as masked and weigh 1.  noise may be NULL. */
DLM_API void      dlm_state_noise(dlm_state *s, const dlm_noise *noise);
/* Masks each cell of unit k with probability p instead, by the same random numbers: what
   was masked at a lower p still is.  A cell's is dlm_uniform(at, 0) at noise.seed and
   step, DLM_RANDOM_MASK, row noise.row + example, position cell - first_cell[example]. */
DLM_API void      dlm_state_mask(dlm_state *s, int k, double p);
/* Fills in batch from what is wanted, an example without such a unit not at all; cells of
   weight 0 are not looked at.  again 1: adds a second view to what is there.
   DLM_E_INPUT, and an empty batch, where the room is not enough for that. */
DLM_API dlm_error dlm_state_layout(dlm_state *s, int again);
/* For a pass over batch, user is the state: loss and gradient of the weighted
   cross-entropy; or the score of every cell looked at, log p(gold) or entropy in nats. */
DLM_API void      dlm_state_loss(void *state, int i, float *logits);
DLM_API void      dlm_state_gold(void *state, int i, float *logits);
DLM_API void      dlm_state_entropy(void *state, int i, float *logits);

/* --[ lift ]------------------------------------------------------------------
   LIFT (arXiv 2605.22939): mask more than the noise level t asks for, keep the easy ones
   of these when t is high, the hard ones when it is low and random ones between (LIFT3),
   give the rest their gold token back.  Its pieces are the functions below. */

typedef enum dlm_policy {    /* how t decides                                      */
    DLM_POLICY_TIME = 0,     /* the largest of the weights t, 1-t, H t(1-t); ties go to
                                random (the paper's)                               */
    DLM_POLICY_SAMPLED,      /* drawn with these weights (ours)                    */
    DLM_POLICY_RANDOM,       /* uniform, whatever t is                             */
    DLM_POLICY_REVERSED      /* easy at low t, hard at high t: the control         */
} dlm_policy;

typedef enum dlm_method {    /* what a masked objective does beyond its masks      */
    DLM_METHOD_VANILLA = 0,
    DLM_METHOD_LIFT3, DLM_METHOD_LIFT2,        /* easiest, hardest; 3: and random  */
    DLM_METHOD_TOP_K, DLM_METHOD_BOTTOM_K, DLM_METHOD_RANDOM_K,    /* at every t   */
    DLM_METHOD_COUNT
} dlm_method;

struct dlm_trainer;

typedef struct dlm_lift_options {          /* 0 in a field marked * = the default  */
    float      H;                          /* * = 3: how often LIFT3 is random     */
    dlm_method method;
    dlm_policy policy;
    int        rho_code_form;              /* 1: rho >= 0.1 if it can, as the code */
    int        one_pass;                   /* 1: the rejected stay masked, without loss:
                                              no second forward                    */
    int        complementary;              /* 1: a second view masks what the first does
                                              not; both count half                 */
    int        no_time_scaling;            /* 1: weight 1 instead of 1/t           */
    /* A rule of yours, in the method's place where not NULL (bench/rivals.h has two).
       Called for each state that is learned from, t->state: plain masks, weights 1/t or
       1, every unit wanted.  It may write what is open for writing, and lay out and look
       with dlm_state_layout and dlm_trainer_forward; what it leaves wanted is learned
       from.  An error ends the step; gradients of states before this one stay.    */
    dlm_error (*choose)(void *choose_user, struct dlm_trainer *t);
    void      *choose_user;
} dlm_lift_options;

/* The extra masked fraction: uniform in [0, 1 - t_raw], t = 0.999 t_raw + 0.001. */
DLM_API double     dlm_lift_rho(const dlm_address *at, double t, int code_form);
/* How many of n masked tokens are kept: n t / (t + rho), half to even, 1 .. n. */
DLM_API int        dlm_lift_count(int n, double t, double rho);
/* Which ones.  components: 3 with random, or 2.  at: for the policies that draw. */
DLM_API dlm_select dlm_lift_mode(double t, int components, double H, dlm_policy policy,
                                 const dlm_address *at);
/* Unmasks all but k of the masked ones; score (n) is log p(gold), read where masked; at
   is used by RANDOM only, score by the others.  Returns how many stay masked.  Of equal
   scores the lower index is kept first. */
DLM_API int        dlm_lift_select(unsigned char *masked, const float *score, int n,
                                   int k, dlm_select mode, const dlm_address *at);

/* --[ training ]--------------------------------------------------------------
   A trainer owns gradients, moments, activations, schedule and step counter of one
   model.  One step is one update over all the examples given, in as many passes as
   max_rows makes necessary: to accumulate gradients, give more examples. */

typedef enum dlm_schedule {
    DLM_SCHEDULE_CONSTANT = 0, DLM_SCHEDULE_LINEAR, DLM_SCHEDULE_COSINE
} dlm_schedule;

typedef struct dlm_train_options {         /* 0 in a field marked * = the default  */
    int      max_rows;                     /* * = 16 sequences of max_seq or 2048: rows of
                                              one pass (a doubled row counts twice), which
                                              memory grows with                    */
    dlm_objective objective;               /* * = what the pattern asks for        */
    float    lr;                           /* * = 1e-3: the peak                   */
    int      warmup;                       /* W: update n = 0, 1, .. has lr (n + 1) / W
                                              until that is lr: the first one learns, too
                                              (the papers' code begins with n / W) */
    int      total;                        /* steps in all; needed by the schedules */
    dlm_schedule schedule;                 /* after the warm-up; 0: constant       */
    float    lr_min;                       /* where LINEAR and COSINE end, at update
                                              number total                         */
    float    beta1, beta2, adam_eps;       /* * = 0.9, 0.99, 1e-8 (at least 1e-15) */
    float    weight_decay;                 /* decoupled; on matrices only; times lr at
                                              most 1                               */
    float    clip;                         /* * = 1: largest global gradient norm.
                                              Whatever is above 1e18, INFINITY too, is
                                              1e18, whose square f32 still holds   */
    float    ema;                          /* decay of averaged weights; 0: none   */
    float    level_min, level_max;         /* noise levels of training are uniform in
                                              this range (BD3-LM's clipped schedule);
                                              * = 0.001, 1: all of them, the ELBO   */
    int      independent_levels;           /* 0: noise levels stratified over the batch */
    dlm_dtype precision;                   /* DLM_F32 (0) or DLM_BF16: the factors of
                                              products with weights, forward and back, are
                                              rounded to it as by dlm_pack; weights, sums,
                                              norms, attention, loss, moments stay f32 */
    dlm_lift_options lift;                 /* zeros: plain masks                   */
    uint64_t seed;
} dlm_train_options;

#define DLM_BINS 8
typedef struct dlm_report {
    int64_t step;                          /* updates done, this one included      */
    double  loss;                          /* nats per one of `tokens` (ELBO weighted) */
    double  grad_norm;                     /* before clipping, right for all finite
                                              gradients; not finite when a gradient or a
                                              moment is not or a second moment is below 0:
                                              then the update leaves weights and moments
                                              alone, but counts as a step          */
    double  lr;
    int64_t tokens;                        /* response tokens that could carry loss */
    int64_t scored;                        /* rows that did                        */
    double  flops;                         /* forward and backward, scoring and teacher
                                              passes; not rollouts                 */
    double  bin_loss[DLM_BINS];            /* mean CE by noise level, bin floor(8t) */
    int64_t bin_count[DLM_BINS];           /* masked tokens in the bin             */
    /* LIFT only: tokens masked before selection, and of the scored ones how many were
       kept and rejected, with the mean probability of their gold tokens */
    int64_t bin_superset[DLM_BINS], bin_kept[DLM_BINS], bin_rejected[DLM_BINS];
    double  bin_gold_kept[DLM_BINS], bin_gold_rejected[DLM_BINS];
} dlm_report;

typedef struct dlm_trainer {               /* open for reading                     */
    dlm_ctx   *ctx;
    dlm_model *model;
    dlm_train_options options;             /* with every default filled in         */
    int64_t    steps;                      /* updates done                         */
    float     *gradients;                  /* (n_params) since the update; writable */
    float     *adam_m, *adam_v;            /* (n_params) moments                   */
    float     *ema;                        /* (n_params) averaged weights, or NULL */
    double     flops;                      /* of the passes since the last update  */
    dlm_state *state;                      /* max_rows large; yours between steps  */
    double      *partial;                  /* private, as all that follows         */
    dlm_example *windows;
    struct dlm__work *work;
} dlm_trainer;

DLM_API dlm_error dlm_trainer_create(dlm_trainer **out, dlm_ctx *ctx, dlm_model *m,
                                     const dlm_train_options *opt, dlm_memory *mem);
DLM_API void      dlm_trainer_free(dlm_trainer *t);                    /* NULL is ok */
/* One update on n examples.  report may be NULL. */
DLM_API dlm_error dlm_trainer_step(dlm_trainer *t, const dlm_example *examples, int n,
                                   dlm_report *report);
/* One update on B random windows of T tokens out of a long text; which ones is a
   function of (seed, step) alone. */
DLM_API dlm_error dlm_trainer_step_text(dlm_trainer *t, const int *tokens,
                                        size_t n_tokens, int T, int B,
                                        dlm_report *report);
/* The loss on examples without learning, over all noise levels; `draw` picks them.
   report must be given. */
DLM_API dlm_error dlm_trainer_evaluate(dlm_trainer *t, const dlm_example *examples, int n,
                                       uint32_t draw, dlm_report *report);

/* The same in pieces, for objectives of your own: any number of passes, each adding
   to the gradients, then one update.  slots and lanes of the batch are not used. */
DLM_API dlm_error dlm_trainer_pass(dlm_trainer *t, const dlm_batch *b, dlm_score_fn score,
                                   void *user);
/* The way up alone, without gradients: score, which must be given, only looks. */
DLM_API dlm_error dlm_trainer_forward(dlm_trainer *t, const dlm_batch *b,
                                      dlm_score_fn score, void *user);
/* Denormals (below 2^-126) among weights, averages and moments become 0 at every 64th
   update: what only decays would end there, and slow down all that follows. */
DLM_API dlm_error dlm_trainer_update(dlm_trainer *t, dlm_report *report);

/* --[ distillation ]----------------------------------------------------------
   OPDLM (arXiv 2606.06712): an autoregressive model becomes a block-diffusion model by
   learning, on its own rollouts, what the frozen original would have said. */

enum { DLM_NEW_TOKEN = -1 };

/* A copy of a plain AR model as a block-diffusion student: causal becomes BLOCK.
   mask_id: an existing, unused id, or DLM_NEW_TOKEN: the vocabulary grows by one token,
   whose embedding is the mean of the others.  shifted 0: row i learns to predict token i
   (the paper's); 1: row i goes on predicting token i + 1, which small models learn in a
   fraction of the time.  block * = 4. */
DLM_API dlm_error dlm_convert(dlm_model **out, dlm_ctx *ctx, const dlm_model *ar,
                              int block, int mask_id, int shifted,
                              dlm_memory *mem);

typedef enum dlm_divergence_kind {         /* p teacher, s student                 */
    DLM_FORWARD_KL = 0,                    /* sum p (log p - log s)                */
    DLM_REVERSE_KL,                        /* sum s (log s - log p)                */
    DLM_MIXED_KL,                          /* (1-w) forward + w reverse            */
    DLM_JSD                                /* w KL(p||m) + (1-w) KL(s||m),
                                              m = w p + (1-w) s                    */
} dlm_divergence_kind;

typedef struct dlm_divergence_options {    /* 0 in a field marked * = the default  */
    float weight;                          /* w of MIXED_KL and JSD; * = 0.5       */
    dlm_divergence_kind kind;
    int   sparse;                          /* K: only the teacher's K best tokens enter
                                              the sums, not renormalised; 0: all   */
    float temperature;                     /* * = 1: of the teacher, before        */
    int   top_k;                           /* its renormalisation by top-k,        */
    float top_p, min_p;                    /* top-p, min-p; 0: off                 */
} dlm_divergence_options;

/* The teacher's logits (V) become probabilities, renormalised as o says; all NaN when a
   logit is NaN or +INFINITY or all are -INFINITY. */
DLM_API void   dlm_teacher_probs(dlm_ctx *ctx, float *logits, int V,
                                 const dlm_divergence_options *o);
/* The divergence, and the student's logits (V) become weight * d/dlogits.  teacher (V)
   are probabilities.  Both are NaN when either side has no softmax. */
DLM_API double dlm_divergence(dlm_ctx *ctx, float *student, const float *teacher, int V,
                              double weight, const dlm_divergence_options *o);

typedef enum dlm_states {    /* which of a rollout's states the student learns on  */
    DLM_STATES_TRAJECTORY = 0,             /* per block as before one of its steps */
    DLM_STATES_RANDOM,                     /* random masks, at least one per block
                                              (OPDLM_off; off-policy distillation) */
    DLM_STATES_ALL                         /* before every step, a sequence each   */
} dlm_states;

typedef struct dlm_distill_options {
    int        max_targets;                /* * = what 64 MiB hold, at least the lesser of
                                              1024 and max_seq (at most max_rows):
                                              teacher rows (V) kept at a time, at least
                                              the longest response                 */
    dlm_states states;
    dlm_divergence_options divergence;
    int        exclude_stop;               /* 1: no loss on the token `stop`       */
    int        stop;
} dlm_distill_options;

typedef struct dlm_distiller dlm_distiller;

/* Joins a trainer, whose model is the student (BLOCK), with a frozen teacher (CAUSAL),
   plain or packed, of at least the same tokens.  Both outlive it. */
DLM_API dlm_error dlm_distiller_create(dlm_distiller **out, dlm_trainer *t,
                                       const dlm_model *teacher,
                                       const dlm_distill_options *o, dlm_memory *mem);
DLM_API void      dlm_distiller_free(dlm_distiller *d);                /* NULL is ok */
/* One update on n finished sequences, which the caller has sampled (examples/12): loss is
   the mean over sequences (ALL: and their rounds) of the mean divergence over masked
   tokens.  Every example has its step map, but for RANDOM.  Its targets know only the
   left, so the student comes to ignore its right: who wants infilling puts
   dlm_trainer_step on clean texts, same trainer, in between. */
DLM_API dlm_error dlm_distiller_step(dlm_distiller *d, const dlm_example *examples, int n,
                                     dlm_report *report);

/* --[ tokenizers ]------------------------------------------------------------
   Text to ids and back.  After the ordinary tokens come a stop token and, last, the
   mask token; JSON has them where its file has them. */

typedef enum dlm_tokenizer_kind {
    DLM_TOKENIZER_BYTES = 0,               /* 256 bytes + stop + mask              */
    DLM_TOKENIZER_CHARS,                   /* the UTF-8 characters of a corpus, by
                                              code point, + stop + mask            */
    DLM_TOKENIZER_PIECES,                  /* a llama2.c tokenizer file: scored pieces;
                                              stop is its BOS (1), which separates
                                              texts, mask is vocab, outside        */
    DLM_TOKENIZER_JSON                     /* a tokenizer.json of Hugging Face: byte-
                                              level BPE (GPT-2, Qwen, Llama 3, SmolLM)
                                              or that of SentencePiece (Llama 2)   */
} dlm_tokenizer_kind;

typedef struct dlm_tokenizer {             /* open for reading                     */
    int       vocab, stop, mask;           /* ids in all (the largest of JSON, + 1);
                                              the two special ones, JSON: or -1    */
    dlm_tokenizer_kind kind;
    dlm_ctx  *ctx;                         /* where it was allocated               */
    const char *mask_from;                 /* JSON: what says which the mask is: "added
                                              token <|mask|>"; a constant, or NULL */
    char     *text;                        /* (size) CHARS: the characters, PIECES and */
    size_t    size;                        /* JSON: the file; a zero follows       */
    struct dlm__lexicon *lexicon;          /* private: the pieces, and how they merge */
} dlm_tokenizer;

/* text (size) is the corpus for CHARS, the bytes of the file for PIECES and JSON, ignored
   for BYTES.  What is needed of it is copied.  A corpus is UTF-8 without zeros; a file
   that is none, and the JSON vocabulary of another program (tokenizer.json, vocab.json),
   are DLM_E_INPUT.  Any other JSON is a text like others.
   JSON has the BPE of the families above and of LLaDA; what else would change a result
   is DLM_E_UNSUPPORTED and named.  Texts are expected in NFC, as all but all are: that a
   file asks for it is ignored, as are `normalized` of its added tokens, post-processor,
   truncation and padding.  stop is <|endoftext|>, </s> or <|end_of_text|>, mask an added
   token of one of the usual names; dlm_tokenizer_open knows better. */
DLM_API dlm_error dlm_tokenizer_create(dlm_tokenizer **out, dlm_ctx *ctx,
                                       dlm_tokenizer_kind kind, const char *text,
                                       size_t size);
DLM_API void      dlm_tokenizer_free(dlm_tokenizer *t);                /* NULL is ok */
/* The id of a token by its text, "<|im_end|>" or " the" (spaces as spaces), added tokens
   before others; -1 when there is none.  Bytes that are tokens have no text. */
DLM_API int       dlm_tokenizer_id(const dlm_tokenizer *t, const char *text);
/* ids (max) gets the tokens of text (size); *n the number there are, even when that
   exceeds max: then ids has the first max and the rest is dropped, with DLM_OK (ids may
   be NULL to ask).  A character outside the vocabulary is DLM_E_INPUT and is named; *n
   are then the tokens before it.  No BOS is added.
   PIECES begins with a space, as llama2.c does, and merges the neighbours of best score,
   of equals the leftmost, until none are left.  JSON finds added tokens first, at a place
   the longest (<s> in a text is that token, as Hugging Face has it), and goes on between
   them as its file says; bytes that are no UTF-8 are characters alone, of no class.
   Time is n log n for any text; 28 bytes per byte of the longest word are allocated and
   freed again, when that fails: DLM_E_NOMEM. */
DLM_API dlm_error dlm_encode(const dlm_tokenizer *t, const char *text, size_t size,
                             int *ids, size_t max, size_t *n);
/* Writes at most size - 1 bytes and a zero; returns the bytes there are without the
   zero (out may be NULL to ask).  Stop tokens vanish, masks and ids outside the
   vocabulary become '_'.  PIECES drops the space with which encoding began a text: that
   of the first piece and, as llama2.c does, of every piece behind a stop.  JSON drops all
   special tokens and, of Llama 2, the first space; bytes come out as they are. */
DLM_API size_t    dlm_decode(const dlm_tokenizer *t, const int *ids, size_t n, char *out,
                             size_t size);

/* How many bytes of a decoded text (size) are whole characters: what may be shown of it
   while more is to come.  Bytes that begin no character (UTF-8) count. */
DLM_API size_t dlm_whole_text(const char *text, size_t size);

/* --[ files ]-----------------------------------------------------------------
   Checkpoints are safetensors files with Hugging Face tensor names; our config and
   tokenizer ride along as string metadata.  A training state is a second file; resuming
   from both is bit-exact.
   Saving is atomic: the file is written beside its target as "<target>.<n>.part", a name
   not taken before, flushed to disk and renamed.  A reader finds the old file or the new
   one, whoever else is saving; after a failure the old one.  A symbolic link stays, what
   it points to is replaced; the mode of an old file is kept; what is there and is not a
   regular file (a folder, a device) is refused.  So are pipes for reading.  The numbers
   in a file do not depend on the locale. */

/* One entry of a safetensors file.  What points somewhere lives as long as the file is
   open.  Any type and any number of dimensions is listed; only a use can refuse it. */
typedef struct dlm_st_tensor {
    const char    *name, *type;            /* as the file has them                 */
    dlm_dtype      dtype;
    int            n_dims;
    const int64_t *dims;                   /* (n_dims)                             */
    size_t         count, bytes;           /* elements; what they take             */
    const void    *data;                   /* (bytes) little-endian, maybe unaligned,
                                              inside the file's memory             */
    int            used;                   /* private: a model had a use for it    */
} dlm_st_tensor;

typedef struct dlm_safetensors {           /* open for reading                     */
    int            count;
    dlm_st_tensor *tensors;                /* (count) sorted by name               */
    const char    *data;                   /* (bytes) theirs, one behind the other */
    size_t         bytes;
    dlm_ctx       *ctx;                    /* where it was allocated               */
    struct dlm__pair *meta;                /* private: (n_meta)                    */
    int            n_meta;
    int64_t       *dims;                   /* private: where the next shape goes,  */
    char          *text, *text_end;        /* and the next string                  */
    struct dlm__file *file;                /* private: all of it, if opened here   */
} dlm_safetensors;

/* data (size) is borrowed and must stay until close.  As the format wants, the header
   begins with '{' (spaces may follow it) and the tensors fill the rest without a hole. */
DLM_API dlm_error dlm_safetensors_parse(dlm_safetensors **out, dlm_ctx *ctx,
                                        const void *data, size_t size);
DLM_API void      dlm_safetensors_close(dlm_safetensors *f);           /* NULL is ok */
DLM_API const dlm_st_tensor *dlm_safetensors_find(const dlm_safetensors *f,
                                                  const char *name);   /* or NULL    */
/* A string of __metadata__, unescaped; NULL when absent. */
DLM_API const char *dlm_safetensors_metadata(const dlm_safetensors *f, const char *key);
/* Widens F32, F16, BF16 or F64 to float; anything else is DLM_E_UNSUPPORTED. */
DLM_API dlm_error dlm_safetensors_floats(dlm_ctx *ctx, const dlm_st_tensor *t,
                                         float *out /* (count) */);
/* A model, from the bytes of a checkpoint of ours, with its tokenizer when one was saved
   with it; or of llama2.c's .bin (version 0: LLaMA layout, f32, causal; rotary pairs
   stand next to each other there and are moved apart), which has none.  tok may be NULL.
   Weights are copied. */
DLM_API dlm_error dlm_load_memory(dlm_model **out, dlm_tokenizer **tok, dlm_ctx *ctx,
                                  const void *data, size_t size);
/* A training state, from the bytes of a file of dlm_trainer_save, into a trainer of the
   same config and objective.  Checked as a whole first: numbers that are not finite or a
   negative adam.v are refused, named with their place, and so is all that fails; the
   trainer is then as it was. */
DLM_API dlm_error dlm_trainer_load_memory(dlm_trainer *t, const void *data, size_t size);

#ifndef DLM_NO_STDIO
/* A tokenizer whose corpus, or pieces, are the content of a file. */
DLM_API dlm_error dlm_tokenizer_load(dlm_tokenizer **out, dlm_ctx *ctx,
                                     dlm_tokenizer_kind kind, const char *path);
/* The tokenizer of a model folder: tokenizer.json, or else vocab.json with merges.txt (of
   GPT2Tokenizer or Qwen2Tokenizer; t->text is then the tokenizer.json that they make,
   with the added tokens of tokenizer_config.json or else added_tokens.json), or else
   llama2.c's tokenizer.bin.  mask_token and eos_token of tokenizer_config.json, or else
   special_tokens_map.json, win over dlm_tokenizer_create's. */
DLM_API dlm_error dlm_tokenizer_open(dlm_tokenizer **out, dlm_ctx *ctx,
                                     const char *folder);
/* As parse, from a file: mapped where the platform can, else read. */
DLM_API dlm_error dlm_safetensors_open(dlm_safetensors **out, dlm_ctx *ctx,
                                       const char *path);
/* Weights that are not finite are not saved (DLM_E_INPUT, with tensor and place): the
   last sound file stays.  A JSON tokenizer's stop and mask are found anew when loaded. */
DLM_API dlm_error dlm_save(dlm_ctx *ctx, const char *path, const dlm_model *m,
                           const dlm_tokenizer *tok /* or NULL */);
DLM_API dlm_error dlm_load(dlm_model **out, dlm_tokenizer **tok, dlm_ctx *ctx,
                           const char *path);

typedef struct dlm_open_options {          /* 0: what the files say                */
    const char *family;                    /* a model_type, instead of config.json's */
    dlm_dtype   type;                      /* DLM_BF16, DLM_I8: packed in it; DLM_F32:  */
    int         packed;                    /* 0: plain, for training; 1: packed in f32 */
    int         heads;                     /* where it names none; * = SMDM's      */
    int         block;                     /* > 0: pattern BLOCK, of so many tokens; -1:
                                              FULL; an AR family is then not shifted */
    int         shifted;                   /* 1: row i-1 predicts token i; -1: row i */
    int         mask_id;
    int         max_seq;                   /* smaller tables than for all positions */
} dlm_open_options;

/* A model as others publish it: a folder (config.json, one or several safetensors, maybe
   a tokenizer), a lone safetensors with `family` given, or any file of dlm_load; how
   NULL: all 0.  Families: llama, qwen2, qwen3, sdar, a2d-llama, a2d-qwen2, a2d-qwen3,
   Fast_dLLM_Qwen, Dream, open-dcoder, llada, smdm; mdlm, bd3lm, radd, whose LayerNorms
   and modulation at constant time are folded into weights; dlm (what no other has).  All
   else, and options that change results and are not built here, is refused by name
   (DLM_E_UNSUPPORTED); so are missing, misshapen and left over tensors (DLM_E_MISMATCH).
   The mask is mask_id, or config.json's, the tokenizer's, its family's.  tok may be NULL;
   *tok is NULL where there is no tokenizer.  Besides the model some 8 MiB are in memory,
   and the files where they cannot be mapped; to fold, all weights as floats. */
DLM_API dlm_error dlm_open(dlm_model **out, dlm_tokenizer **tok, dlm_ctx *ctx,
                           const char *path, const dlm_open_options *how);
/* Moments, averaged weights, step and a copy of the weights: everything a resumed
   run needs beyond its options.  What loading would refuse is not saved (DLM_E_INPUT):
   the last sound file stays. */
DLM_API dlm_error dlm_trainer_save(dlm_trainer *t, const char *path);
DLM_API dlm_error dlm_trainer_load(dlm_trainer *t, const char *path);
#endif

#ifdef __cplusplus
}
#endif
#endif /* DLM_H */

#if defined(DLM_IMPLEMENTATION) && !defined(DLM__IMPLEMENTED)

/* ==[ platform ]==============================================================
   Includes and the few compiler differences.  After this section the code is plain
   C99 that is also C++11. */

#if defined(DLM_ALLOW_FAST_MATH)
#elif defined(__FAST_MATH__) || defined(_M_FP_FAST)
#error "dlm.h relies on infinities and NaN: compile without -ffast-math (/fp:fast)"
#elif defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__    /* or defined as 0  */
#error "dlm.h relies on infinities and NaN: compile without -ffinite-math-only"
#elif defined(__ASSOCIATIVE_MATH__)
#error "dlm.h relies on the order of sums: compile without -fassociative-math"
#endif
#if defined(DLM_MALLOC) != defined(DLM_FREE)
#error "define both of DLM_MALLOC and DLM_FREE, or none"
#endif

#include <float.h>
#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef DLM_MALLOC
#define DLM_MALLOC(size) malloc(size)
#define DLM_FREE(ptr) free(ptr)
#endif
#ifndef DLM_ASSERT
#include <assert.h>
#define DLM_ASSERT(condition) assert(condition)
#endif
#ifndef DLM_GUARD
#define DLM_GUARD 0
#endif
#if DLM_GUARD < 0 || DLM_GUARD % 64 != 0
#error "DLM_GUARD must be a multiple of 64, or arrays would not be aligned"
#endif
#ifndef DLM__OVERRUN                /* the tests collect these                     */
#define DLM__OVERRUN(words) DLM_ASSERT((words)[0] == '\0')
#endif

#if defined(__GNUC__) || defined(__clang__)
#define DLM__INLINE static inline __attribute__((always_inline))
#define DLM__PRINTF(f, a) __attribute__((format(printf, f, a)))
#define DLM__MAYBE_UNUSED __attribute__((unused))
#elif defined(_MSC_VER)
#define DLM__INLINE static __forceinline
#define DLM__PRINTF(f, a)
#define DLM__MAYBE_UNUSED
#else
#define DLM__INLINE static inline
#define DLM__PRINTF(f, a)
#define DLM__MAYBE_UNUSED
#endif

/* Full unrolling of the loop that follows, whatever the optimisation level. */
#define DLM__PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define DLM__UNROLL DLM__PRAGMA(clang loop unroll(full))
#elif defined(__GNUC__) && __GNUC__ >= 8
#define DLM__UNROLL DLM__PRAGMA(GCC unroll 16)
#else
#define DLM__UNROLL
#endif

/* Here the compiler has written all it was to write and forgets what it has read. */
#if defined(__GNUC__)
#define DLM__BARRIER __asm__ volatile("" : : : "memory")
#else
#define DLM__BARRIER ((void)0)
#endif

#define DLM__JOIN2(a, b) a##_##b
#define DLM__JOIN(a, b) DLM__JOIN2(a, b)

#if !defined(DLM_NO_SIMD) && (defined(__GNUC__) || defined(__clang__))
  #if defined(__x86_64__)
    #define DLM__X86 1
    #include <immintrin.h>
    #if defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11
      #define DLM__AVX512BF16 1     /* older compilers have not heard of it        */
      #if defined(__linux__)
        #define DLM__AMX 1
        #include <cpuid.h>
      #endif
    #endif
  #elif defined(__aarch64__)
    #define DLM__ARM 1
    #include <arm_neon.h>
  #endif
#endif

#if !defined(DLM_NO_THREADS) && defined(__ATOMIC_SEQ_CST) \
    && (defined(__unix__) || defined(__APPLE__))
#define DLM__POSIX_THREADS 1        /* tcc has had no atomics for long             */
#include <pthread.h>
#include <unistd.h>
#endif

DLM__INLINE int dlm__min(int a, int b) { return a < b ? a : b; }
DLM__INLINE int dlm__max(int a, int b) { return a > b ? a : b; }
DLM__INLINE int dlm__ceil_div(int a, int b) { return a / b + (a % b != 0); }
DLM__INLINE int dlm__round_up(int a, int b) { return dlm__ceil_div(a, b) * b; }

/* ==[ memory ]================================================================
   The context, errors, the arena, and how objects are made.  An object is one block of
   memory, carved by one function that runs twice: with no base it counts, with a base it
   places.  What is predicted and what is used can therefore not differ. */

enum { DLM__ALIGN = 64 };           /* bytes: a cache line, the widest vector      */

struct dlm__pool;
struct dlm__kernels;

struct dlm_ctx {
    dlm_options   opt;
    const struct dlm__kernels *k;   /* the kernels of the chosen ISA               */
    struct dlm__pool *pool;         /* NULL: one thread, or the user's hook        */
    float        *scratch;          /* packed B of the matmul that is running      */
    char          error[256];
};

static void *dlm__alloc(dlm_ctx *ctx, size_t size)
{
    const dlm_allocator *a = &ctx->opt.allocator;
    return a->alloc ? a->alloc(a->user, size) : DLM_MALLOC(size);
}

static void dlm__release(dlm_ctx *ctx, void *ptr)
{
    const dlm_allocator *a = &ctx->opt.allocator;
    if (ptr == NULL) return;
    if (a->release) a->release(a->user, ptr);
    else if (!a->alloc) DLM_FREE(ptr);
}

/* Stores the sentence and returns the code, so that failing is one line. */
DLM__PRINTF(3, 4)
static dlm_error dlm__fail(dlm_ctx *ctx, dlm_error code, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(ctx->error, sizeof ctx->error, format, args);
    va_end(args);
    return code;
}

typedef struct dlm__arena {
    char  *base;                    /* NULL: only count                            */
    size_t used;                    /* SIZE_MAX once a size has overflowed         */
} dlm__arena;

enum { DLM__PATTERN = 0xA5 };       /* what guards and the ends of slices hold     */

/* Slices are 64-byte aligned.  All but the first, at the base, have DLM_GUARD bytes
   before them, of which the last say how long the slice is; what is left of the 64 behind
   it is part of the next one's guard. */
static void dlm__put_guard(char *slice, size_t size)
{
    const size_t guard = DLM_GUARD;
    memset(slice - guard, DLM__PATTERN, guard);
    memcpy(slice - sizeof size, &size, sizeof size);
    memset(slice + size, DLM__PATTERN, (DLM__ALIGN - size % DLM__ALIGN) % DLM__ALIGN);
}

/* count items of size bytes; NULL while counting. */
static void *dlm__push(dlm__arena *a, size_t count, size_t size)
{
    const size_t at = a->used ? a->used + DLM_GUARD : 0;
    if (a->used > SIZE_MAX / 4 || (count != 0 && size > (SIZE_MAX / 4) / count)) {
        a->used = SIZE_MAX;
        return NULL;
    }
    a->used = (at + count * size + DLM__ALIGN - 1) / DLM__ALIGN * DLM__ALIGN;
    if (a->base == NULL) return NULL;
    if (DLM_GUARD > 0 && at > 0) dlm__put_guard(a->base + at, count * size);
    return a->base + at;
}

static float *dlm__push_floats(dlm__arena *a, size_t rows, size_t cols)
{
    if (cols != 0 && rows > SIZE_MAX / 16 / cols) a->used = SIZE_MAX;
    return (float *)dlm__push(a, rows * cols, sizeof(float));
}

static int *dlm__push_ints(dlm__arena *a, size_t count)
{
    return (int *)dlm__push(a, count, sizeof(int));
}

/* Places all that an object points to; runs twice on the same one.  NULL: nothing. */
typedef void (*dlm__carve_fn)(dlm__arena *a, void *object);

typedef struct dlm__origin {        /* the slice before an object: where it is from */
    dlm_ctx    *ctx;                /* a context's: itself                         */
    void       *block;              /* what was allocated, NULL if the user's      */
    const char *what, *end;         /* the object's name; behind its last slice    */
} dlm__origin;

static dlm__origin *dlm__origin_of(void *object)
{
    return (dlm__origin *)(void *)((char *)object - DLM__ALIGN - DLM_GUARD);
}

static void *dlm__carve_whole(dlm__arena *a, dlm__carve_fn carve, void *object,
                              size_t size)
{
    void *at;
    dlm__push(a, 1, sizeof(dlm__origin));
    at = dlm__push(a, 1, size);
    if (carve) carve(a, object);
    if (DLM_GUARD > 0) dlm__push(a, 0, 1);      /* a guard behind the last         */
    return at;
}

/* Makes the object that `draft` (size) is but for what carve places; with wanted = 0 it
   only writes what that takes into mem->size.  NULL then, and after an error: *e, which
   may have been one before. */
static void *dlm__make(dlm_error *e, dlm_ctx *ctx, const char *what, dlm__carve_fn carve,
                       void *draft, size_t size, int wanted, dlm_memory *mem)
{
    dlm__arena a = { NULL, 0 };
    dlm__origin *origin;
    size_t bytes;
    void *object, *raw = NULL;
    if (*e != DLM_OK) return NULL;
    dlm__carve_whole(&a, carve, draft, size);
    bytes = a.used + DLM__ALIGN;    /* some to align the base                      */
    if (a.used == SIZE_MAX)
        *e = dlm__fail(ctx, DLM_E_NOMEM, "%s: its size overflows", what);
    else if (!wanted && mem)
        mem->size = bytes;
    else if (wanted && mem && (mem->base == NULL || mem->size < bytes))
        *e = dlm__fail(ctx, DLM_E_NOMEM, "%s: needs %.0f bytes, was given %.0f", what,
                       (double)bytes, (double)mem->size);
    else if (wanted && (raw = mem ? mem->base : dlm__alloc(ctx, bytes)) == NULL)
        *e = dlm__fail(ctx, DLM_E_NOMEM, "%s: cannot allocate %.0f bytes", what,
                       (double)bytes);
    if (raw == NULL) return NULL;
    a.base = (char *)memset(raw, 0, bytes);
    a.base += (DLM__ALIGN - (uintptr_t)raw % DLM__ALIGN) % DLM__ALIGN;
    a.used = 0;
    object = dlm__carve_whole(&a, carve, draft, size);
    origin = dlm__origin_of(object);
    origin->ctx = ctx == draft ? (dlm_ctx *)object : ctx;
    origin->block = mem ? NULL : raw;
    origin->what = what;
    origin->end = a.base + a.used;
    return memcpy(object, draft, size);
}

/* Which array of an object was written beyond its end, in words: number 0 is the object
   itself, 1 what its carve function places first.  0: none; without guards always. */
static int dlm__overrun(void *object, char *words, size_t size)
{
    const dlm__origin *o = dlm__origin_of(object);
    const char *at = (const char *)object;
    for (int slice = 0; DLM_GUARD > 0 && at < o->end; slice++) {
        const char *next = o->end, *behind = at;
        size_t n;
        memcpy(&n, at - sizeof n, sizeof n);
        if (n < (size_t)(o->end - at)) {
            behind += n;
            next = at + (n + DLM__ALIGN - 1) / DLM__ALIGN * DLM__ALIGN + DLM_GUARD;
        }
        for (const char *b = behind; b < next - sizeof n; b++)
            if (*(const unsigned char *)b != DLM__PATTERN) {
                snprintf(words, size, "%s: array %d, of %.0f bytes, was overrun by %d",
                         o->what, slice, (double)n, (int)(b - behind) + 1);
                return 1;
            }
        at = next;
    }
    return 0;
}

static void dlm__unmake(void *object)
{
    if (object) {
        const dlm__origin *o = dlm__origin_of(object);
        dlm_ctx copy = *o->ctx;     /* it may be what goes                         */
        if (dlm__overrun(object, copy.error, sizeof copy.error)) DLM__OVERRUN(copy.error);
        dlm__release(&copy, o->block);
    }
}

DLM_API const char *dlm_error_string(dlm_error e)
{
    static const char *const words[] = {    /* in the order of dlm_error           */
        "ok", "out of memory", "invalid configuration", "invalid input",
        "input or output failed", "malformed file", "names or shapes do not fit",
        "not supported"
    };
    const size_t i = (size_t)e;
    return i < sizeof words / sizeof *words ? words[i] : "unknown error";
}

DLM_API const char *dlm_last_error(const dlm_ctx *ctx) { return ctx ? ctx->error : ""; }

/* ==[ random ]================================================================
   Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers, as easy as
   1, 2, 3.  SC 2011): ten rounds of multiply-and-swap turn a counter and a key into
   128 random bits.  The key is the seed and the purpose, the counter the rest of the
   address, so nothing has to be carried along. */

DLM_API void dlm_random_bits(const dlm_address *at, uint32_t index, uint32_t out[4])
{
    uint32_t c0 = index, c1 = at->position, c2 = at->row, c3 = at->step;
    uint32_t k0 = (uint32_t)at->seed;
    uint32_t k1 = (uint32_t)(at->seed >> 32) ^ at->purpose * 0x85EBCA6BU;
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)c0 * 0xD2511F53U;
        uint64_t p1 = (uint64_t)c2 * 0xCD9E8D57U;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)p1;
        c3 = (uint32_t)p0;
        k0 += 0x9E3779B9U;          /* the golden ratio and sqrt(3) - 1            */
        k1 += 0xBB67AE85U;
    }
    out[0] = c0; out[1] = c1; out[2] = c2; out[3] = c3;
}

DLM_API double dlm_uniform(const dlm_address *at, uint32_t index)
{
    uint32_t r[4];
    const uint32_t *half = r + 2 * (index % 2);
    dlm_random_bits(at, index / 2, r);
    return (double)(((uint64_t)half[0] << 32 | half[1]) >> 11)
        * (1.0 / 9007199254740992.0);                               /* 2^-53 */
}

static dlm_address dlm__address(uint64_t seed, uint32_t purpose, uint32_t step,
                                uint32_t row, uint32_t position)
{
    const dlm_address at = { seed, purpose, step, row, position };
    return at;
}

/* Two independent standard normals per pair of uniforms (Box and Muller, 1958). */
static double dlm__normal(const dlm_address *at, uint32_t index)
{
    double u = 1.0 - dlm_uniform(at, 2 * index), v = dlm_uniform(at, 2 * index + 1);
    return sqrt(-2.0 * log(u)) * cos(6.283185307179586 * v);
}

/* A Feistel network (eight rounds: tiny domains need them) over the smallest even
   number of bits that covers n is a permutation of a power of four; walking it until
   the value is below n makes it a permutation of 0..n-1 (Black and Rogaway, CT-RSA
   2002). */
DLM_API size_t dlm_shuffled(uint64_t seed, uint32_t epoch, size_t n, size_t i)
{
    unsigned half = 1;
    size_t mask, x = i;
    DLM_ASSERT(i < n);
    while (half < sizeof(size_t) * 4 && (((size_t)1 << half << half) - 1) < n - 1) half++;
    mask = ((size_t)1 << half) - 1;
    do {
        size_t left = x >> half, right = x & mask;
        for (uint32_t round = 0; round < 8; round++) {
            uint32_t r[4];
            dlm_address at = dlm__address(seed, DLM_RANDOM_DATA, epoch, round,
                                          (uint32_t)right);
            size_t old_left = left;
            dlm_random_bits(&at, (uint32_t)((uint64_t)right >> 32), r);
            left = right;
            right = old_left ^ (((size_t)r[0] ^ ((size_t)r[1] << (half / 2))) & mask);
        }
        x = left << half | right;
    } while (x >= n);
    return x;
}

/* ==[ cpu ]===================================================================
   Which instruction sets there are and what a set of kernels offers.  A context
   keeps a pointer to one such table; everything below calls through it. */

#ifndef DLM_SELF
#define DLM_SELF "dlm.h"            /* vendored under another name?  define this too */
#endif

enum {                              /* one, as C++20 regrets products of two       */
#if defined(DLM__X86)               /* the largest tile of any compiled ISA        */
    DLM__MAX_MR = 32, DLM__MAX_NR = 32,
#elif defined(DLM__ARM)
    DLM__MAX_MR = 8, DLM__MAX_NR = 8,
#else
    DLM__MAX_MR = 4, DLM__MAX_NR = 4,
#endif
    DLM__KC = 256,                  /* words of K in a block of a product          */
    DLM__MAX_D = 256,               /* widest head                                 */
    DLM__CHUNK = 96,                /* keys of attention at a time: a multiple of every
                                       mr and nr                                   */
    DLM__FEW_LANES = 4,             /* DLM__FEW of the widest vectors              */
    DLM__FEW_LD = DLM__CHUNK + DLM__MAX_NR
};

/* Factors of a product are kept in words of 32 bits: one f32, or two bf16 or four int8
   that follow each other along K.  Two words are multiplied into the sum of their
   values' products, so that one tile, one panel and one packing serve all three. */
typedef enum dlm__word {
    DLM__WORD_F32, DLM__WORD_BF16, DLM__WORD_I8, DLM__WORDS
} dlm__word;

/* How an ISA wants the narrow words, bf16 and int8, of a product laid out. */
typedef struct dlm__narrow {
    int mr;                         /* rows of the largest tile                    */
    int k_step;                     /* K is padded to a multiple of so many words  */
    int by_rows;                    /* tiles of a: 0 [k][m] as f32's, 1 [m][k]     */
    int offset;                     /* is added to the int8 of a: 128 where only
                                       unsigned times signed can be multiplied     */
    void (*enter)(int yes);         /* before and after tiles are used, or NULL    */
} dlm__narrow;

/* One side of a product wherever it lies: x(i,k) = at[i*by_i + k*by_k].  Of the right one
   i counts the columns. */
typedef struct dlm__side {
    const float *at;
    size_t by_i, by_k;
} dlm__side;

DLM__INLINE dlm__side dlm__side_of(const float *at, size_t by_i, size_t by_k)
{
    const dlm__side x = { at, by_i, by_k };
    return x;
}

/* The kernels: name, what it returns, what it is given.  One list makes the fields of the
   struct and the entries of every table.  Letters: x, y rows of n floats; "tile" arrays
   are [rows][nr], one lane per column.
     to_bf16 to_int8    words = x in bf16, to nearest even; or in int8, as round(x scale)
                        + offset.  Up to vw - 1 values past n are written, too
     pair               words[i] = x[i] and y[i] as one word of bf16; y NULL: zeros
     magnitude          the largest |x_i|, NaN if one of them is not finite
     scale_int          y_i, an integer, becomes the float (y_i r) x_i
     tiny               the tiles' chain of multiply-adds, where they would cost more than
                        it does: c (M, N; ldc) (+)= a b
     few_*              attention of at most vw / 4 queries, keys in the lanes: as the
                        tiles, to the bit.  s (F, ld): a query's scores in a row, ld with
                        room for a vector more; q, o (F, DLM__MAX_D); F = (vw + 3) / 4
                        rows are computed, needed or not
     add                y += x              add_product  y += r x z
     lerp               y += r (x - y), which leaves a y of -INFINITY as it is */
#define DLM__KERNEL_LIST(K) \
    K(to_bf16, void, (float *words, const float *x, int n)) \
    K(to_int8, void, (float *words, const float *x, int n, float scale, int offset)) \
    K(pair, void, (float *words, const float *x, const float *y, int n)) \
    K(magnitude, float, (const float *x, int n)) \
    K(scale_int, void, (float *y, const float *x, float r, int n)) \
    K(tiny, void, (float *c, size_t ldc, dlm__side a, dlm__side b, int M, int N, \
                   int K, int add)) \
    K(softmax_tile, void, (float *s, int rows, int lanes, float *max, float *sum, \
                           float *rescale)) \
    K(softmax_tile_backward, void, (float *s, float *ds, int rows, int lanes, \
                                    const float *lse, const float *delta)) \
    K(scale_tile, void, (float *s, int rows, int lanes, const float *scale)) \
    K(few_scores, void, (float *s, int ld, const float *panels, int n_panels, \
                         const float *q, int D)) \
    K(few_softmax, void, (float *s, int ld, int queries, int n, float *max, \
                          float *rescale)) \
    K(few_mix, void, (float *o, float *sum, const float *rescale, int D, \
                      const float *rows, size_t ld_rows, const float *s, int ld, int n)) \
    K(rmsnorm, float, (float *y, const float *x, const float *g, int n, float eps)) \
    K(rmsnorm_backward, void, (float *dx, const float *dy, const float *x, \
                               const float *g, float r, int n)) \
    K(rope, void, (float *x, const float *cos_sin, int half, float sign)) \
    K(swiglu, void, (float *y, const float *gate, const float *up, int n)) \
    K(swiglu_backward, void, (float *dgate, float *dup, const float *dy, \
                              const float *gate, const float *up, int n)) \
    K(gelu, void, (float *y, const float *x, int n)) \
    K(gelu_backward, void, (float *dx, const float *dy, const float *x, int n)) \
    K(add, void, (float *y, const float *x, int n)) \
    K(add_product, void, (float *y, const float *x, const float *z, float r, int n)) \
    K(lerp, void, (float *y, const float *x, float r, int n)) \
    K(dot, float, (const float *x, const float *y, int n)) \
    K(max, float, (const float *x, int n)) \
    K(sum_exp, double, (const float *x, int n, float shift, double *sum_exp_x)) \
    K(exp_scaled, void, (float *y, const float *x, int n, float shift, float scale)) \
    K(unsound, float, (const float *m, const float *v, int n)) \
    K(flush, void, (float *x, int n)) \
    K(adamw, void, (float *w, const float *g, float *m, float *v, int n, \
                    const float *constants))

#define DLM__FIELD(name, type, given) type (*name) given;
typedef struct dlm__kernels {
    int mr, nr, vw;                 /* the largest tile: mr rows, nr columns; lanes
                                       of one vector                               */
    dlm__narrow narrow;
    /* c (m, n) (+)= sum over k of a(i,k) * b[k][j], in words; b has rows of ldb; m <= mr,
       n <= nr; a row of b must be readable for nr words, c is touched in n columns only.
       Of int8, c gets the sum as a 32-bit integer. */
    void (*tile[DLM__WORDS])(float *c, int ldc, dlm__side a, const float *b, int ldb,
                             int m, int n, int k, int add);
    /* c (1, 4 nr) (+)= a (1, k) times four panels of b, `next` apart: one panel gives a
       single row too few chains of multiply-adds to hide their latency.  Or NULL. */
    void (*row[DLM__WORDS])(float *c, dlm__side a, const float *b, int ldb, size_t next,
                            int k, int add);
    DLM__KERNEL_LIST(DLM__FIELD)
} dlm__kernels;
#undef DLM__FIELD

/* The tile of one kind of words, from the body for all of them. */
#define DLM__TILE_OF(target, name, body, kind) \
static target void name(float *c, int ldc, dlm__side a, const float *b, int ldb, \
                        int m, int n, int k, int add) \
{ \
    body(c, ldc, a, b, ldb, m, n, k, add, kind); \
}

#ifdef DLM__AMX
/* Tiles have 8 KiB of state, which Linux keeps for a process only if it has asked:
   arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA), called without a libc that may
   not know it.  Asking twice does no harm. */
static int dlm__ask_for_amx(void)
{
    const unsigned wanted = 1U << 24 | 1U << 22 | 1U << 25;     /* tile, bf16, int8 */
    unsigned a, b, c, d;
    long result;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & wanted) != wanted) return 0;
    __asm__ volatile("syscall" : "=a"(result) : "a"(158L), "D"(0x1023L), "S"(18L)
                     : "rcx", "r11", "memory");
    return result == 0;
}
#endif

#endif /* implementation, part 1 */
#endif /* !DLM__KERNEL_PASS */

/* ==[ kernels ]===============================================================
   Every inner loop that matters, written once, compiled once per instruction set.
   Section instances defines the vocabulary
       DLM__KERNEL_PASS   the name suffix, avx2 say
       DLM__TARGET        function attribute, __attribute__((target("avx2,fma")))
       DLM__VW _MR _NV    lanes of a vector, rows of a tile, vectors of a tile row
       dlm__vf            a vector of floats, which has the operators + - / of C, and
                          words on it: dlm__vset1 vfma vmax (b unless a > b)
                          vsqrt; across: the sum of its lanes, or the largest of them;
                          fma1: vfma of single floats
       dlm__vtoint        to the nearest int32, as the vector dlm__vu, which has all
                          operators; vfromint; vstore16: stores the upper halves of the
                          lanes, vstore8: their lowest bytes
       dlm__vmadd16(a, b) of int16, two in a lane: sums of neighbouring products
   and, where there is something better than what is put together here,
       dlm__vloadn        the first n lanes, others 0; vstoren
       dlm__vnotbelow     (v, x, low): v, but 0 where x < low
       dlm__bf16_fma      a dot product of whole words, added to c; int8_fma and with it,
                          see dlm__narrow, int8_offset
   and includes this file again; only this section is then visible, and it undefines
   all of them at its end.  The scalar instance is the same code with one lane. */
#ifdef DLM__KERNEL_PASS
#define DLM__K(name) DLM__JOIN(name, DLM__KERNEL_PASS)
#define DLM__NR (DLM__VW * DLM__NV)
#define dlm__ld DLM__K(dlm__ld)
#define dlm__st DLM__K(dlm__st)
#define dlm__vexp DLM__K(dlm__vexp)
#define dlm__vu DLM__K(dlm__vu)
#define dlm__vs DLM__K(dlm__vs)
#define dlm__vat DLM__K(dlm__vat)   /* a vector where it lies, at any float        */
#define dlm__hsum(v) dlm__across(v, 1)
#define dlm__hmax(v) dlm__across(v, 0)
#define dlm__vload(p) (*(const dlm__vat *)(p))
#define dlm__vstore(p, v) (*(dlm__vat *)(p) = (v))
#if DLM__VW == 1                    /* it has bits, floats, vnan and vmul itself   */
typedef uint32_t dlm__vu;
typedef float dlm__vat;
#else                               /* casts of vectors keep their bits            */
typedef float dlm__vat __attribute__((vector_size(4 * DLM__VW), aligned(4), may_alias));
typedef uint32_t dlm__vu __attribute__((vector_size(4 * DLM__VW)));
typedef int16_t  dlm__vs __attribute__((vector_size(4 * DLM__VW)));
#define dlm__bits(v) ((dlm__vu)(v))
#define dlm__floats(u) ((dlm__vf)(u))
#define dlm__vnan(v) ((dlm__vu)((v) != (v)))
#define dlm__vmul DLM__K(dlm__vmul)
/* No operator, or clang would fuse it with the sum that it may stand in. */
DLM__INLINE DLM__TARGET dlm__vf dlm__vmul(dlm__vf a, dlm__vf b) { return a * b; }
#endif
#ifndef dlm__vnotbelow
#define dlm__vnotbelow(v, x, low) dlm__floats(dlm__bits(v) & ~(dlm__vu)((x) < (low)))
#endif
#ifdef dlm__bf16_fma
#define dlm__bf16_parts 1
#else                               /* no dot products: halves, widened            */
#define dlm__bf16_parts 2
#define dlm__bf16_fma(a, b, c) dlm__vfma(a, b, c)
#endif
#ifdef dlm__int8_fma
#define dlm__int8_parts 1
#else
#define dlm__int8_parts 2
#define dlm__int8_fma(a, b, c) dlm__floats(dlm__bits(c) + (dlm__vu)dlm__vmadd16(a, b))
#endif
#ifndef dlm__int8_offset
#define dlm__int8_offset 0
#endif

#ifndef dlm__vloadn
#define dlm__vloadn DLM__K(dlm__vloadn)
#define dlm__vstoren DLM__K(dlm__vstoren)
DLM__INLINE DLM__TARGET dlm__vf dlm__vloadn(const float *p, int n)
{
    float v[DLM__VW] = { 0.0f };
    for (int i = 0; i < n; i++) v[i] = p[i];
    return dlm__vload(v);
}

DLM__INLINE DLM__TARGET void dlm__vstoren(float *p, dlm__vf x, int n)
{
    float v[DLM__VW];
    dlm__vstore(v, x);
    for (int i = 0; i < n; i++) p[i] = v[i];
}
#endif

/* The vector at p of which n lanes remain, n >= 1; others are 0. */
DLM__INLINE DLM__TARGET dlm__vf dlm__ld(const float *p, int n)
{
    if (DLM__VW == 1 || n >= DLM__VW) return dlm__vload(p);
    return dlm__vloadn(p, n);
}

DLM__INLINE DLM__TARGET void dlm__st(float *p, dlm__vf x, int n)
{
    if (DLM__VW == 1 || n >= DLM__VW) dlm__vstore(p, x);
    else dlm__vstoren(p, x, n);
}

/* e^x: x = n ln 2 + r with |r| <= ln(2)/2, then the Taylor series of e^r to r^7, whose
   remainder r^8/8! is below 6e-9, times 2^n.  ln 2 is split so that n * hi is exact.
   For x in [-87.33, 88.37]; NaN stays NaN. */
DLM__INLINE DLM__TARGET dlm__vf DLM__K(dlm__vexp_within)(dlm__vf x)
{
    const dlm__vu int_n = dlm__vtoint(dlm__vmul(x, dlm__vset1(1.44269504f)));
    const dlm__vf n = dlm__vfromint(int_n);
    dlm__vf r = dlm__vfma(n, dlm__vset1(-0.693359375f), x);
    dlm__vf p = dlm__vset1(1.0f / 5040);
    r = dlm__vfma(n, dlm__vset1(2.12194440e-4f), r);
    p = dlm__vfma(p, r, dlm__vset1(1.0f / 720));
    p = dlm__vfma(p, r, dlm__vset1(1.0f / 120));
    p = dlm__vfma(p, r, dlm__vset1(1.0f / 24));
    p = dlm__vfma(p, r, dlm__vset1(1.0f / 6));
    p = dlm__vfma(p, r, dlm__vset1(0.5f));
    p = dlm__vfma(p, r, dlm__vset1(1.0f));
    p = dlm__vfma(p, r, dlm__vset1(1.0f));
    return dlm__vmul(p, dlm__floats((int_n + 127U) << 23));
}

/* e^x for x <= 88.37, 0 below -87.33 (2^-126).  What stands for "nothing", -FLT_MAX or
   -INFINITY, does not reach the arithmetic, where it would raise exceptions. */
DLM__INLINE DLM__TARGET dlm__vf dlm__vexp(dlm__vf x)
{
    const dlm__vf least = dlm__vset1(-87.33f);
    return dlm__vnotbelow(DLM__K(dlm__vexp_within)(dlm__vmax(least, x)), x, least);
}

/* 1 / (1 + e^-x); below -88.37 it stays what it is there. */
DLM__INLINE DLM__TARGET dlm__vf DLM__K(dlm__vsigmoid)(dlm__vf x)
{
    const dlm__vf one = dlm__vset1(1.0f);
    const dlm__vf y = dlm__vset1(0.0f) - dlm__vmax(dlm__vset1(-88.37f), x);
    const dlm__vf e = DLM__K(dlm__vexp_within)(dlm__vmax(dlm__vset1(-87.33f), y));
    return one / (one + e);
}

/* Rounded to bf16, nearest even; NaN stays one whatever its bits. */
DLM__INLINE DLM__TARGET dlm__vu DLM__K(dlm__round_bf16)(dlm__vf x)
{
    const dlm__vu u = dlm__bits(x), nan = dlm__vnan(x);
    const dlm__vu rounded = u + 0x7fffU + (u >> 16 & 1U);
    return ((rounded & ~nan) | (nan & 0x7fc00000U)) & 0xffff0000U;
}

/* What dlm__multiply takes of a word, `part` after `part`: without dot products, of bf16,
   floats without their lower halves, the lower one or the upper, later one; of four int8
   the first and third as int16, or the others. */
DLM__INLINE DLM__TARGET dlm__vf DLM__K(dlm__part)(dlm__vf word, const int part,
                                                  const dlm__word kind)
{
    const dlm__vu u = dlm__bits(word);
    if (kind == DLM__WORD_BF16 && dlm__bf16_parts == 2)
        return dlm__floats(part ? u & 0xffff0000U : u << 16);
#if dlm__int8_parts == 2
    if (kind == DLM__WORD_I8) return dlm__floats((dlm__vs)(part ? u : u << 8) >> 8);
#endif
    return word;
}

DLM__INLINE DLM__TARGET dlm__vf DLM__K(dlm__multiply)(dlm__vf a, dlm__vf b, dlm__vf c,
                                                      const dlm__word kind)
{
    if (kind == DLM__WORD_BF16) return dlm__bf16_fma(a, b, c);
    if (kind == DLM__WORD_I8) return dlm__int8_fma(a, b, c);
    return dlm__vfma(a, b, c);
}

#define DLM__PARTS(kind) ((kind) == DLM__WORD_BF16 ? dlm__bf16_parts \
                          : (kind) == DLM__WORD_I8 ? dlm__int8_parts : 1)

/* The register tile: m rows of a times one panel of b or, with panels = 4, a single row
   times four, `next` apart, each of which makes a row of c.  m, panels, nv and kind are
   constants where this is inlined, so the loops over them unroll and acc lives in
   registers; columns from n on are left alone. */
DLM__INLINE DLM__TARGET void DLM__K(dlm__tile_body)(
    float *c, int ldc, dlm__side a, const float *b, int ldb, size_t next, const int m,
    const int panels, const int nv, int n, int k, int add, const dlm__word kind)
{
    const int parts = DLM__PARTS(kind), thirds = (m + 2) / 3, rows = m * panels;
    const float *third[(DLM__MR + 2) / 3];  /* base + 0, 1 or 2 by_i: one address mode */
    dlm__vf acc[DLM__MR][DLM__NV];
    DLM__UNROLL
    for (int j = 0; j < thirds; j++) third[j] = a.at + (size_t)(3 * j) * a.by_i;
    DLM__UNROLL
    for (int i = 0; i < rows; i++) {
        DLM__UNROLL
        for (int v = 0; v < nv; v++)
            acc[i][v] = add && n > v * DLM__VW
                ? dlm__ld(c + (size_t)i * (size_t)ldc + v * DLM__VW, n - v * DLM__VW)
                : dlm__vset1(0.0f);
    }
    for (int kk = 0; kk < k; kk++, b += ldb) {
        DLM__UNROLL
        for (int i = 0; i < parts * panels; i++) {
            const int part = i / panels, panel = i % panels;
            dlm__vf b_k[DLM__NV];
            DLM__UNROLL
            for (int v = 0; v < nv; v++)
                b_k[v] = DLM__K(dlm__part)(
                    dlm__vload(b + (size_t)panel * next + v * DLM__VW), part, kind);
            DLM__UNROLL
            for (int j = 0; j < m; j++) {
                const float *a_j = third[j / 3] + (size_t)(j % 3) * a.by_i;
                const dlm__vf a_kj = DLM__K(dlm__part)(dlm__vset1(*a_j), part, kind);
                dlm__vf *acc_j = acc[panel + j];
                DLM__UNROLL
                for (int v = 0; v < nv; v++)
                    acc_j[v] = DLM__K(dlm__multiply)(a_kj, b_k[v], acc_j[v], kind);
            }
            /* Load a word again for its other part: few registers, none to keep it in. */
            if (parts > panels && DLM__VW < 16) DLM__BARRIER;
        }
        DLM__UNROLL
        for (int j = 0; j < thirds; j++) third[j] += a.by_k;
    }
    DLM__UNROLL
    for (int i = 0; i < rows; i++) {
        DLM__UNROLL
        for (int v = 0; v < nv; v++)
            if (n > v * DLM__VW)
                dlm__st(c + (size_t)i * (size_t)ldc + v * DLM__VW, acc[i][v],
                        n - v * DLM__VW);
    }
}

/* One vector wide where that is enough: few queries, few classes.  Narrow words are not
   met there often enough for another twelve tiles. */
DLM__INLINE DLM__TARGET void DLM__K(dlm__tile_rows)(
    float *c, int ldc, dlm__side a, const float *b, int ldb,
    const int m, int n, int k, int add, const dlm__word kind)
{
    if (n <= DLM__VW && kind == DLM__WORD_F32)
        DLM__K(dlm__tile_body)(c, ldc, a, b, ldb, 0, m, 1, 1, n, k, add, kind);
    else
        DLM__K(dlm__tile_body)(c, ldc, a, b, ldb, 0, m, 1, DLM__NV, n, k, add, kind);
}

DLM__INLINE DLM__TARGET void DLM__K(dlm__tile_any)(
    float *c, int ldc, dlm__side a, const float *b, int ldb,
    int m, int n, int k, int add, const dlm__word kind)
{
#define DLM__CASE(m) \
    case m: \
        if (m <= DLM__MR) \
            DLM__K(dlm__tile_rows)(c, ldc, a, b, ldb, m, n, k, add, kind); \
        break;
    switch (m) {
    DLM__CASE(1) DLM__CASE(2) DLM__CASE(3) DLM__CASE(4) DLM__CASE(5) DLM__CASE(6)
    DLM__CASE(7) DLM__CASE(8) DLM__CASE(9) DLM__CASE(10) DLM__CASE(11) DLM__CASE(12)
    default: break;
    }
#undef DLM__CASE
}

/* The tile and the row of each kind of words. */
#define DLM__PRODUCTS(name, kind) \
DLM__TILE_OF(DLM__TARGET, DLM__K(dlm__tile_##name), DLM__K(dlm__tile_any), kind) \
static DLM__TARGET void DLM__K(dlm__row_##name)( \
    float *c, dlm__side a, const float *b, int ldb, size_t next, int k, int add) \
{ \
    DLM__K(dlm__tile_body)(c, DLM__NR, a, b, ldb, next, 1, 4, DLM__NV, DLM__NR, k, add, \
                           kind); \
}
DLM__PRODUCTS(f32, DLM__WORD_F32)
DLM__PRODUCTS(bf16, DLM__WORD_BF16)
DLM__PRODUCTS(int8, DLM__WORD_I8)

static DLM__TARGET void DLM__K(dlm__to_bf16)(float *words, const float *x, int n)
{
    char *out = (char *)words;
    for (int i = 0; i < n; i += DLM__VW)
        dlm__vstore16(out + 2 * i, DLM__K(dlm__round_bf16)(dlm__ld(x + i, n - i)));
}

static DLM__TARGET void DLM__K(dlm__to_int8)(float *words, const float *x, int n,
                                             float scale, int offset)
{
    char *out = (char *)words;
    const dlm__vf s = dlm__vset1(scale);
    for (int i = 0; i < n; i += DLM__VW) {
        const dlm__vf y = dlm__vmul(dlm__ld(x + i, n - i), s);
        dlm__vstore8(out + i, dlm__vtoint(y) + (unsigned)offset);
    }
}

static DLM__TARGET void DLM__K(dlm__pair)(float *words, const float *x, const float *y,
                                          int n)
{
    for (int i = 0; i < n; i += DLM__VW) {
        dlm__vu word = DLM__K(dlm__round_bf16)(dlm__ld(x + i, n - i)) >> 16;
        if (y) word |= DLM__K(dlm__round_bf16)(dlm__ld(y + i, n - i));
        dlm__st(words + i, dlm__floats(word), n - i);
    }
}

static DLM__TARGET float DLM__K(dlm__magnitude)(const float *x, int n)
{
    dlm__vf m = dlm__vset1(0.0f), finite = m;
    for (int i = 0; i < n; i += DLM__VW) {
        const dlm__vf x_i = dlm__ld(x + i, n - i);
        m = dlm__vmax(dlm__floats(dlm__bits(x_i) & 0x7fffffffU), m);
        finite = finite + (x_i - x_i);                      /* 0, or NaN           */
    }
    return dlm__hmax(m) + dlm__hsum(finite);
}

static DLM__TARGET void DLM__K(dlm__scale_int)(float *y, const float *x, float r, int n)
{
    const dlm__vf rv = dlm__vset1(r);
    for (int i = 0; i < n; i += DLM__VW) {
        const dlm__vf y_i = dlm__vfromint(dlm__bits(dlm__ld(y + i, n - i)));
        const dlm__vf x_i = dlm__ld(x + i, n - i);
        dlm__st(y + i, dlm__vmul(dlm__vmul(y_i, rv), x_i), n - i);
    }
}

static DLM__TARGET void DLM__K(dlm__tiny)(float *c, size_t ldc, dlm__side a,
                                          dlm__side b, int M, int N, int K, int add)
{
    for (size_t i = 0; i < (size_t)M; i++)
        for (size_t j = 0; j < (size_t)N; j++) {
            float sum = add ? c[i * ldc + j] : 0.0f;
            for (size_t k = 0; k < (size_t)K; k++)
                sum = dlm__fma1(a.at[i * a.by_i + k * a.by_k],
                                b.at[j * b.by_i + k * b.by_k], sum);
            c[i * ldc + j] = sum;
        }
}

/* One chunk of keys of a running softmax, down the columns of s (rows, nr):
     max' = max(max, s)   s = e^(s - max')   rescale = e^(max - max')
     sum = sum * rescale + s
   A column that has seen no key yet has max = -FLT_MAX, so -INFINITY turns to 0. */
static DLM__TARGET void DLM__K(dlm__softmax_tile)(float *s, int rows, int lanes,
                                                  float *max, float *sum, float *rescale)
{
    for (int v = 0; v < lanes; v += DLM__VW) {
        const dlm__vf old = dlm__vload(max + v);
        dlm__vf m = old, total = dlm__vset1(0.0f), r;
        for (int i = 0; i < rows; i++) m = dlm__vmax(m, dlm__vload(s + i * DLM__NR + v));
        for (int i = 0; i < rows; i++) {
            float *s_i = s + i * DLM__NR + v;
            const dlm__vf e = dlm__vexp(dlm__vload(s_i) - m);
            dlm__vstore(s_i, e);
            total = total + e;
        }
        r = dlm__vexp(old - m);
        dlm__vstore(max + v, m);
        dlm__vstore(rescale + v, r);
        dlm__vstore(sum + v, dlm__vfma(dlm__vload(sum + v), r, total));
    }
}

/* p = e^(s - lse), ds = p (dp - delta); s becomes p, ds comes in as dp. */
static DLM__TARGET void DLM__K(dlm__softmax_tile_backward)(
    float *s, float *ds, int rows, int lanes, const float *lse, const float *delta)
{
    for (int v = 0; v < lanes; v += DLM__VW) {
        const dlm__vf l = dlm__vload(lse + v), d = dlm__vload(delta + v);
        for (int i = 0; i < rows; i++) {
            float *s_i = s + i * DLM__NR + v, *ds_i = ds + i * DLM__NR + v;
            const dlm__vf p = dlm__vexp(dlm__vload(s_i) - l);
            dlm__vstore(s_i, p);
            dlm__vstore(ds_i, dlm__vmul(p, dlm__vload(ds_i) - d));
        }
    }
}

/* Few queries would leave most lanes of a tile empty, so here keys are the lanes; what
   is summed, and in which order, is the same. */
#define DLM__FEW ((DLM__VW + 3) / 4)

static DLM__TARGET void DLM__K(dlm__few_scores)(float *s, int ld, const float *panels,
                                                int n_panels, const float *q, int D)
{
    for (int p = 0; p < n_panels; p++, panels += D * DLM__MR)
        for (int j = 0; j < DLM__MR; j += DLM__VW) {
            dlm__vf acc[DLM__FEW];
            DLM__UNROLL
            for (int i = 0; i < DLM__FEW; i++) acc[i] = dlm__vset1(0.0f);
            for (int d = 0; d < D; d++) {
                const dlm__vf k_d = dlm__ld(panels + d * DLM__MR + j, DLM__MR - j);
                DLM__UNROLL
                for (int i = 0; i < DLM__FEW; i++)
                    acc[i] = dlm__vfma(k_d, dlm__vset1(q[i * DLM__MAX_D + d]), acc[i]);
            }
            DLM__UNROLL
            for (int i = 0; i < DLM__FEW; i++)
                dlm__st(s + i * ld + p * DLM__MR + j, acc[i], DLM__MR - j);
        }
}

/* s = e^(s - max'); the lanes between n and a whole vector are filled up with 0. */
static DLM__TARGET void DLM__K(dlm__few_softmax)(float *s, int ld, int queries, int n,
                                                 float *max, float *rescale)
{
    for (int i = 0; i < queries; i++, s += ld) {
        dlm__vf m = dlm__vset1(max[i]);
        float top, r[DLM__VW];
        for (int j = n; j % DLM__VW; j++) s[j] = -INFINITY;
        for (int j = 0; j < n; j += DLM__VW) m = dlm__vmax(m, dlm__vload(s + j));
        top = dlm__hmax(m);
        m = dlm__vset1(top);
        for (int j = 0; j < n; j += DLM__VW)
            dlm__vstore(s + j, dlm__vexp(dlm__vload(s + j) - m));
        dlm__vstore(r, dlm__vexp(dlm__vset1(max[i] - top)));
        rescale[i] = r[0];
        max[i] = top;
    }
}

static DLM__TARGET void DLM__K(dlm__few_mix)(
    float *o, float *sum, const float *rescale, int D, const float *rows, size_t ld_rows,
    const float *s, int ld, int n)
{
    float total[DLM__FEW];
    for (int d = 0; d < D; d += DLM__VW) {
        dlm__vf acc[DLM__FEW];
        DLM__UNROLL
        for (int i = 0; i < DLM__FEW; i++)
            acc[i] = dlm__vmul(dlm__ld(o + i * DLM__MAX_D + d, D - d),
                               dlm__vset1(rescale[i]));
        for (int j = 0; j < n; j++) {
            const dlm__vf v = dlm__ld(rows + (size_t)j * ld_rows + d, D - d);
            DLM__UNROLL
            for (int i = 0; i < DLM__FEW; i++)
                acc[i] = dlm__vfma(v, dlm__vset1(s[i * ld + j]), acc[i]);
        }
        DLM__UNROLL
        for (int i = 0; i < DLM__FEW; i++)
            dlm__st(o + i * DLM__MAX_D + d, acc[i], D - d);
    }
    memset(total, 0, sizeof total);
    for (int j = 0; j < n; j++) {
        DLM__UNROLL
        for (int i = 0; i < DLM__FEW; i++) total[i] += s[i * ld + j];
    }
    for (int i = 0; i < DLM__FEW; i++)
        sum[i] = dlm__fma1(sum[i], rescale[i], total[i]);
}

static DLM__TARGET void DLM__K(dlm__scale_tile)(float *s, int rows, int lanes,
                                                const float *scale)
{
    for (int v = 0; v < lanes; v += DLM__VW) {
        const dlm__vf x = dlm__vload(scale + v);
        for (int i = 0; i < rows; i++) {
            float *s_i = s + i * DLM__NR + v;
            dlm__vstore(s_i, dlm__vmul(dlm__vload(s_i), x));
        }
    }
}

static DLM__TARGET float DLM__K(dlm__dot)(const float *x, const float *y, int n)
{
    dlm__vf sum = dlm__vset1(0.0f);
    for (int i = 0; i < n; i += DLM__VW)
        sum = dlm__vfma(dlm__ld(x + i, n - i), dlm__ld(y + i, n - i), sum);
    return dlm__hsum(sum);
}

/* The formulas stand in section layers. */
static DLM__TARGET float DLM__K(dlm__rmsnorm)(float *y, const float *x, const float *g,
                                              int n, float eps)
{
    const float r = 1.0f / sqrtf(DLM__K(dlm__dot)(x, x, n) / (float)n + eps);
    const dlm__vf rv = dlm__vset1(r);
    for (int i = 0; i < n; i += DLM__VW) {
        const dlm__vf xr = dlm__vmul(dlm__ld(x + i, n - i), rv);
        dlm__st(y + i, dlm__vmul(xr, dlm__ld(g + i, n - i)), n - i);
    }
    return r;
}

static DLM__TARGET void DLM__K(dlm__rmsnorm_backward)(
    float *dx, const float *dy, const float *x, const float *g, float r, int n)
{
    dlm__vf s = dlm__vset1(0.0f), rv = dlm__vset1(r), cv;
    for (int i = 0; i < n; i += DLM__VW) {
        const dlm__vf gdy = dlm__vmul(dlm__ld(dy + i, n - i), dlm__ld(g + i, n - i));
        s = dlm__vfma(gdy, dlm__ld(x + i, n - i), s);
    }
    cv = dlm__vset1(-dlm__hsum(s) * r * r * r / (float)n);
    for (int i = 0; i < n; i += DLM__VW) {
        const dlm__vf gdy = dlm__vmul(dlm__ld(dy + i, n - i), dlm__ld(g + i, n - i));
        dlm__vf d = dlm__vfma(rv, gdy, dlm__ld(dx + i, n - i));
        d = dlm__vfma(cv, dlm__ld(x + i, n - i), d);
        dlm__st(dx + i, d, n - i);
    }
}

/* Rotates the pairs (x_i, x_{i+half}); cos_sin holds half cosines, then half sines.
   sign = -1 turns back, which is also the gradient. */
static DLM__TARGET void DLM__K(dlm__rope)(float *x, const float *cos_sin, int half,
                                          float sign)
{
    const dlm__vf sg = dlm__vset1(sign);
    for (int i = 0; i < half; i += DLM__VW) {
        const int n = half - i;
        const dlm__vf c = dlm__ld(cos_sin + i, n);
        const dlm__vf s = dlm__vmul(dlm__ld(cos_sin + half + i, n), sg);
        const dlm__vf a = dlm__ld(x + i, n), b = dlm__ld(x + half + i, n);
        const dlm__vf bs = dlm__vmul(b, s), bc = dlm__vmul(b, c);
        dlm__st(x + i, dlm__vmul(a, c) - bs, n);
        dlm__st(x + half + i, dlm__vmul(a, s) + bc, n);
    }
}

static DLM__TARGET void DLM__K(dlm__swiglu)(float *y, const float *gate, const float *up,
                                            int n)
{
    for (int i = 0; i < n; i += DLM__VW) {
        const dlm__vf z = dlm__ld(gate + i, n - i);
        const dlm__vf silu = dlm__vmul(z, DLM__K(dlm__vsigmoid)(z));
        dlm__st(y + i, dlm__vmul(silu, dlm__ld(up + i, n - i)), n - i);
    }
}

static DLM__TARGET void DLM__K(dlm__swiglu_backward)(
    float *dgate, float *dup, const float *dy, const float *gate, const float *up, int n)
{
    const dlm__vf one = dlm__vset1(1.0f);
    for (int i = 0; i < n; i += DLM__VW) {
        const dlm__vf z = dlm__ld(gate + i, n - i);
        const dlm__vf u = dlm__ld(up + i, n - i);
        const dlm__vf d = dlm__ld(dy + i, n - i);
        const dlm__vf s = DLM__K(dlm__vsigmoid)(z);
        const dlm__vf slope = dlm__vmul(s, dlm__vfma(z, one - s, one));
        dlm__st(dup + i, dlm__vmul(d, dlm__vmul(z, s)), n - i);
        dlm__st(dgate + i, dlm__vmul(dlm__vmul(d, u), slope), n - i);
    }
}

/* 2 sqrt(2/pi) and that times 0.044715: the sigmoid's argument is x (c1 + c3 x^2). */
#define DLM__GELU_1 1.59576912f
#define DLM__GELU_3 0.0713548162f

static DLM__TARGET void DLM__K(dlm__gelu)(float *y, const float *x, int n)
{
    const dlm__vf c1 = dlm__vset1(DLM__GELU_1), c3 = dlm__vset1(DLM__GELU_3);
    for (int i = 0; i < n; i += DLM__VW) {
        const dlm__vf z = dlm__ld(x + i, n - i);
        const dlm__vf u = dlm__vmul(z, dlm__vfma(dlm__vmul(z, z), c3, c1));
        dlm__st(y + i, dlm__vmul(z, DLM__K(dlm__vsigmoid)(u)), n - i);
    }
}

/* Beyond 16 the slope is what it is there, 0 or 1; z^2 could overflow. */
static DLM__TARGET void DLM__K(dlm__gelu_backward)(float *dx, const float *dy,
                                                   const float *x, int n)
{
    const dlm__vf c1 = dlm__vset1(DLM__GELU_1), c3 = dlm__vset1(DLM__GELU_3);
    const dlm__vf one = dlm__vset1(1.0f), zero = dlm__vset1(0.0f);
    const dlm__vf least = dlm__vset1(-16.0f);
    for (int i = 0; i < n; i += DLM__VW) {
        const dlm__vf minus_z = zero - dlm__vmax(least, dlm__ld(x + i, n - i));
        const dlm__vf z = zero - dlm__vmax(least, minus_z);
        const dlm__vf c3zz = dlm__vmul(c3, dlm__vmul(z, z));
        const dlm__vf s = DLM__K(dlm__vsigmoid)(dlm__vmul(z, c3zz + c1));
        const dlm__vf du = dlm__vfma(dlm__vset1(3.0f), c3zz, c1);
        const dlm__vf slope = dlm__vmul(s, dlm__vfma(dlm__vmul(z, du), one - s, one));
        dlm__st(dx + i, dlm__vmul(dlm__ld(dy + i, n - i), slope), n - i);
    }
}

static DLM__TARGET void DLM__K(dlm__add)(float *y, const float *x, int n)
{
    for (int i = 0; i < n; i += DLM__VW)
        dlm__st(y + i, dlm__ld(y + i, n - i) + dlm__ld(x + i, n - i), n - i);
}

static DLM__TARGET void DLM__K(dlm__add_product)(float *y, const float *x, const float *z,
                                                 float r, int n)
{
    const dlm__vf rv = dlm__vset1(r);
    for (int i = 0; i < n; i += DLM__VW) {
        const dlm__vf xr = dlm__vmul(dlm__ld(x + i, n - i), rv);
        const dlm__vf zi = dlm__ld(z + i, n - i);
        dlm__st(y + i, dlm__vfma(xr, zi, dlm__ld(y + i, n - i)), n - i);
    }
}

static DLM__TARGET void DLM__K(dlm__lerp)(float *y, const float *x, float r, int n)
{
    const dlm__vf rv = dlm__vset1(r), least = dlm__vset1(-FLT_MAX);
    for (int i = 0; i < n; i += DLM__VW) {
        const dlm__vf a = dlm__ld(y + i, n - i);
        const dlm__vf d = dlm__ld(x + i, n - i) - dlm__vmax(least, a);
        dlm__st(y + i, dlm__vfma(rv, d, a), n - i);
    }
}

static DLM__TARGET float DLM__K(dlm__max)(const float *x, int n)
{
    const dlm__vf low = dlm__vset1(-INFINITY);
    dlm__vf m = low;
    float best;
    int i = 0;
    for (; i + DLM__VW <= n; i += DLM__VW) m = dlm__vmax(m, dlm__vload(x + i));
    best = dlm__hmax(m);
    for (; i < n; i++) best = x[i] > best ? x[i] : best;
    return best;
}

/* Sum of e^(x - shift), in double over runs of 512, and of e^(x - shift) (x - shift)
   where that is asked for (entropy).  -INFINITY counts as nothing in both.  NaN where an
   x or x - shift is NaN, which vmax lets through as its second operand: with the largest
   x as shift that is one that is NaN or +INFINITY, or all at -INFINITY. */
static DLM__TARGET double DLM__K(dlm__sum_exp)(const float *x, int n, float shift,
                                               double *sum_exp_x)
{
    const dlm__vf sh = dlm__vset1(shift), floor_ = dlm__vset1(-100.0f);
    double total = 0.0, total_x = 0.0;
    for (int run = 0; run < n; run += 512) {
        const int end = dlm__min(n, run + 512);
        dlm__vf s = dlm__vset1(0.0f), sx = dlm__vset1(0.0f);
        for (int i = run; i < end; i += DLM__VW) {
            const float *x_i = x + i;
            float rest[DLM__VW];    /* lanes beyond the end hold nothing           */
            if (i + DLM__VW > end) {
                for (int j = 0; j < DLM__VW; j++)
                    rest[j] = i + j < end ? x_i[j] : -INFINITY;
                x_i = rest;
            }
            const dlm__vf d = dlm__vmax(floor_, dlm__vload(x_i) - sh);
            const dlm__vf e = dlm__vexp(d);
            s = s + e;
            sx = dlm__vfma(e, d, sx);
        }
        total += (double)dlm__hsum(s);
        total_x += (double)dlm__hsum(sx);
    }
    if (sum_exp_x) *sum_exp_x = total_x;
    return total;
}

/* y = scale e^(x - shift), x <= shift + 88.37.  Lanes beyond the end hold e^0. */
static DLM__TARGET void DLM__K(dlm__exp_scaled)(float *y, const float *x, int n,
                                                float shift, float scale)
{
    const dlm__vf sc = dlm__vset1(scale);
    float shifts[DLM__VW];
    dlm__vstore(shifts, dlm__vset1(shift));
    for (int i = 0; i < n; i += DLM__VW) {
        const dlm__vf d = dlm__ld(x + i, n - i) - dlm__ld(shifts, n - i);
        dlm__st(y + i, dlm__vmul(dlm__vexp(d), sc), n - i);
    }
}

/* 0, or NaN if one of m or v is not finite or one of v, means of squares, below 0. */
static DLM__TARGET float DLM__K(dlm__unsound)(const float *m, const float *v, int n)
{
    const dlm__vf zero = dlm__vset1(0.0f);
    dlm__vf bad = zero, most = zero;                    /* of -v                   */
    for (int i = 0; i < n; i += DLM__VW) {
        const dlm__vf v_i = dlm__ld(v + i, n - i);
        const dlm__vf both = dlm__ld(m + i, n - i) + v_i;
        bad = bad + (both - both);
        most = dlm__vmax(zero - v_i, most);
    }
    return dlm__hsum(bad + dlm__vsqrt(zero - most));
}

/* Denormals become 0. */
static DLM__TARGET void DLM__K(dlm__flush)(float *x, int n)
{
    for (int i = 0; i < n; i += DLM__VW) {
        const dlm__vf x_i = dlm__ld(x + i, n - i);
        const dlm__vf size = dlm__floats(dlm__bits(x_i) & 0x7fffffffU);
        dlm__st(x + i, dlm__vnotbelow(x_i, size, dlm__vset1(FLT_MIN)), n - i);
    }
}

/* constants: 1-beta1, 1-beta2, 1/(1-beta1^t), 1/(1-beta2^t), eps, lr, lr*decay, clip
   scale of the gradient.  (Loshchilov and Hutter, ICLR 2019, algorithm 2.) */
static DLM__TARGET void DLM__K(dlm__adamw)(float *w, const float *g, float *m, float *v,
                                           int n, const float *constants)
{
    const dlm__vf c1 = dlm__vset1(constants[0]), c2 = dlm__vset1(constants[1]);
    const dlm__vf u1 = dlm__vset1(constants[2]), u2 = dlm__vset1(constants[3]);
    const dlm__vf eps = dlm__vset1(constants[4]), lr = dlm__vset1(-constants[5]);
    const dlm__vf decay = dlm__vset1(-constants[6]), clip = dlm__vset1(constants[7]);
    const int decays = constants[6] != 0.0f;        /* 0 times -INFINITY is NaN    */
    for (int i = 0; i < n; i += DLM__VW) {
        const int left = n - i;
        const dlm__vf gi = dlm__vmul(dlm__ld(g + i, left), clip);
        dlm__vf mi = dlm__ld(m + i, left), vi = dlm__ld(v + i, left);
        dlm__vf wi = dlm__ld(w + i, left), step;
        mi = dlm__vfma(c1, gi - mi, mi);
        vi = dlm__vfma(c2, dlm__vmul(gi, gi) - vi, vi);
        step = dlm__vmul(mi, u1) / (dlm__vsqrt(dlm__vmul(vi, u2)) + eps);
        if (decays) wi = dlm__vfma(decay, wi, wi);
        dlm__st(w + i, dlm__vfma(lr, step, wi), left);
        dlm__st(m + i, mi, left);
        dlm__st(v + i, vi, left);
    }
}

#define DLM__ENTRY(name, type, given) DLM__K(dlm__##name),
static const dlm__kernels DLM__K(dlm__table) = {
    DLM__MR, DLM__NR, DLM__VW, { DLM__MR, 1, 0, dlm__int8_offset, NULL },
    { DLM__K(dlm__tile_f32), DLM__K(dlm__tile_bf16), DLM__K(dlm__tile_int8) },
    { DLM__K(dlm__row_f32), DLM__K(dlm__row_bf16), DLM__K(dlm__row_int8) },
    DLM__KERNEL_LIST(DLM__ENTRY)
};

#if defined(DLM__AMX) && dlm__int8_offset       /* avx512bf16: see instances       */
static const dlm__kernels dlm__table_amx = {
    DLM__MR, DLM__NR, DLM__VW, { 32, 16, 1, 0, dlm__amx_enter },
    { DLM__K(dlm__tile_f32), dlm__amx_tile_bf16, dlm__amx_tile_int8 },
    { DLM__K(dlm__row_f32), NULL, NULL },
    DLM__KERNEL_LIST(DLM__ENTRY)
};
#endif

#undef DLM__KERNEL_PASS             /* what every pass defines alike may stay      */
#undef DLM__TARGET
#undef dlm__bits
#undef dlm__floats
#undef dlm__vnan
#undef dlm__vmul
#undef dlm__bf16_parts
#undef dlm__bf16_fma
#undef dlm__int8_parts
#undef dlm__int8_fma
#undef dlm__int8_offset
#ifndef DLM__SAME_WORDS             /* the next instance has all others in common  */
#undef DLM__VW
#undef DLM__MR
#undef DLM__NV
#undef dlm__vf
#undef dlm__vloadn
#undef dlm__vstoren
#undef dlm__vstore16
#undef dlm__vstore8
#undef dlm__vset1
#undef dlm__vfma
#undef dlm__fma1
#undef dlm__vmadd16
#undef dlm__vtoint
#undef dlm__vfromint
#undef dlm__vmax
#undef dlm__vsqrt
#undef dlm__vnotbelow
#undef dlm__across
#endif
#else /* door 2: back to the ordinary reading of the file */

#if defined(DLM_IMPLEMENTATION) && !defined(DLM__IMPLEMENTED)
#define DLM__IMPLEMENTED

/* ==[ instances ]=============================================================
   One paragraph per instruction set: its vocabulary, then the kernels above. */

/* --[ scalar ]---------------------------------------------------------------- */
DLM__INLINE uint32_t dlm__bits_scalar(float x)
{
    union { float f; uint32_t u; } bits;
    bits.f = x;
    return bits.u;
}

DLM__INLINE float dlm__floats_scalar(uint32_t x)
{
    union { uint32_t u; float f; } bits;
    bits.u = x;
    return bits.f;
}

DLM__INLINE void dlm__store16_scalar(char *p, uint32_t x)
{
    const uint16_t upper = (uint16_t)(x >> 16);
    memcpy(p, &upper, sizeof upper);
}

DLM__INLINE float dlm__int8_fma_scalar(float a, float b, float c)
{
    const uint32_t x = dlm__bits_scalar(a), y = dlm__bits_scalar(b);
    uint32_t sum = dlm__bits_scalar(c);
    for (int i = 0; i < 32; i += 8)
        sum += (uint32_t)((int8_t)(x >> i & 255) * (int8_t)(y >> i & 255));
    return dlm__floats_scalar(sum);
}

DLM__INLINE uint32_t dlm__toint_scalar(float x)          /* |x| <= 128; NaN: 0     */
{
    return x == x ? (uint32_t)(int32_t)rintf(x < 128.0f ? x : 128.0f) : 0U;
}

#define DLM__KERNEL_PASS scalar
#define DLM__TARGET
#define DLM__VW 1
#define DLM__MR 4
#define DLM__NV 4
#define dlm__vf float
#define dlm__bits(v) dlm__bits_scalar(v)
#define dlm__floats(u) dlm__floats_scalar(u)
#define dlm__vnan(v) ((v) != (v) ? ~0U : 0U)
#define dlm__int8_fma(a, b, c) dlm__int8_fma_scalar(a, b, c)
#define dlm__vtoint(v) dlm__toint_scalar(v)
#define dlm__vfromint(u) ((float)(int32_t)(u))
#define dlm__vstore16(p, u) dlm__store16_scalar(p, u)
#define dlm__vstore8(p, u) (*(p) = (char)(u))
#define dlm__vset1(x) (x)
#define dlm__vmul(a, b) ((a) * (b))
#define dlm__vfma(a, b, c) ((a) * (b) + (c))
#define dlm__fma1(a, b, c) ((a) * (b) + (c))
#define dlm__vmax(a, b) ((a) > (b) ? (a) : (b))
#define dlm__vsqrt(a) sqrtf(a)
#define dlm__vnotbelow(v, x, low) ((x) < (low) ? 0.0f : (v))
#define dlm__across(v, sum) (v)
#include DLM_SELF                   /* not found?  see DLM_SELF in the top comment */

#ifdef DLM__X86

/* --[ sse2 ]------------------------------------------------------------------ */
DLM__INLINE float dlm__across_sse2(__m128 v, int sum)      /* else the largest       */
{
    const __m128 upper = _mm_movehl_ps(v, v);
    const __m128 w = sum ? _mm_add_ps(v, upper) : _mm_max_ps(v, upper);
    const __m128 next = _mm_shuffle_ps(w, w, 1);
    return _mm_cvtss_f32(sum ? _mm_add_ss(w, next) : _mm_max_ss(w, next));
}

/* Four numbers in the lower halves of x, as int16 or, in the lowest bytes, as int8. */
DLM__INLINE void dlm__store16_sse2(char *p, __m128i x)
{
    _mm_storel_epi64((__m128i *)(void *)p, _mm_packs_epi32(x, x));
}

DLM__INLINE void dlm__store8_sse2(char *p, __m128i x)
{
    const __m128i y = _mm_packs_epi32(x, x);
    const int four = _mm_cvtsi128_si32(_mm_packs_epi16(y, y));
    memcpy(p, &four, sizeof four);
}

#define DLM__KERNEL_PASS sse2
#define DLM__TARGET
#define DLM__VW 4
#define DLM__MR 4
#define DLM__NV 2
#define dlm__vf __m128
#define dlm__vmadd16(a, b) _mm_madd_epi16((__m128i)(a), (__m128i)(b))
#define dlm__vtoint(v) ((dlm__vu)_mm_cvtps_epi32(v))
#define dlm__vfromint(u) _mm_cvtepi32_ps((__m128i)(u))
#define dlm__vstore16(p, u) dlm__store16_sse2(p, _mm_srai_epi32((__m128i)(u), 16))
#define dlm__vstore8(p, u) dlm__store8_sse2(p, (__m128i)(u))
#define dlm__vset1(x) _mm_set1_ps(x)
#define dlm__vfma(a, b, c) _mm_add_ps(_mm_mul_ps(a, b), c)
#define dlm__fma1(a, b, c) ((a) * (b) + (c))
#define dlm__vmax(a, b) _mm_max_ps(a, b)
#define dlm__vsqrt(a) _mm_sqrt_ps(a)
#define dlm__across(v, sum) dlm__across_sse2(v, sum)
#include DLM_SELF

/* --[ avx2 ]------------------------------------------------------------------ */
#define DLM__AVX2 __attribute__((target("avx2,fma")))
DLM__INLINE DLM__AVX2 __m256i dlm__first_avx2(int n)
{
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n),
                              _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

DLM__INLINE DLM__AVX2 __m128 dlm__lower_avx2(__m256 v, int sum)
{
    const __m128 lo = _mm256_castps256_ps128(v), hi = _mm256_extractf128_ps(v, 1);
    return sum ? _mm_add_ps(lo, hi) : _mm_max_ps(lo, hi);
}

/* Eight numbers in the lower halves of x as int16, in the lower half of the result. */
DLM__INLINE DLM__AVX2 __m128i dlm__pack16_avx2(__m256i x)
{
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packs_epi32(x, x), 8));
}

DLM__INLINE DLM__AVX2 void dlm__store16_avx2(char *p, __m256i x)
{
    _mm_storeu_si128((__m128i *)(void *)p, dlm__pack16_avx2(x));
}

DLM__INLINE DLM__AVX2 void dlm__store8_avx2(char *p, __m256i x)
{
    const __m128i y = dlm__pack16_avx2(x);
    _mm_storel_epi64((__m128i *)(void *)p, _mm_packs_epi16(y, y));
}

#define DLM__KERNEL_PASS avx2
#define DLM__TARGET DLM__AVX2
#define DLM__VW 8
#define DLM__MR 6
#define DLM__NV 2
#define dlm__vf __m256
#define dlm__vmadd16(a, b) _mm256_madd_epi16((__m256i)(a), (__m256i)(b))
#define dlm__vtoint(v) ((dlm__vu)_mm256_cvtps_epi32(v))
#define dlm__vfromint(u) _mm256_cvtepi32_ps((__m256i)(u))
#define dlm__vstore16(p, u) dlm__store16_avx2(p, _mm256_srai_epi32((__m256i)(u), 16))
#define dlm__vstore8(p, u) dlm__store8_avx2(p, (__m256i)(u))
#define dlm__vloadn(p, n) _mm256_maskload_ps(p, dlm__first_avx2(n))
#define dlm__vstoren(p, v, n) _mm256_maskstore_ps(p, dlm__first_avx2(n), v)
#define dlm__vset1(x) _mm256_set1_ps(x)
#define dlm__vfma(a, b, c) _mm256_fmadd_ps(a, b, c)
#define dlm__fma1(a, b, c) __builtin_fmaf(a, b, c)
#define dlm__vmax(a, b) _mm256_max_ps(a, b)
#define dlm__vsqrt(a) _mm256_sqrt_ps(a)
#define dlm__across(v, sum) dlm__across_sse2(dlm__lower_avx2(v, sum), sum)
#include DLM_SELF

/* --[ avx512 ]----------------------------------------------------------------
   Words of gcc without a mask start from a register that is never set, of which g++
   -Wall warns wherever they are used; those whose mask is all set are the same code. */
#define DLM__AVX512 __attribute__((target("avx512f,avx512bw")))
#define DLM__ALL ((__mmask16)0xffff)
DLM__INLINE DLM__AVX512 __m128 dlm__lower_avx512(__m512 v, int sum)
{
    const __m512d d = _mm512_castps_pd(v);
    const __m256 lo = _mm256_castpd_ps(_mm512_maskz_extractf64x4_pd(0xf, d, 0));
    const __m256 hi = _mm256_castpd_ps(_mm512_maskz_extractf64x4_pd(0xf, d, 1));
    const __m256 w = sum ? _mm256_add_ps(hi, lo) : _mm256_max_ps(hi, lo);
    const __m128 low = _mm256_castps256_ps128(w), high = _mm256_extractf128_ps(w, 1);
    return sum ? _mm_add_ps(high, low) : _mm_max_ps(high, low);
}

#define DLM__SAME_WORDS             /* for the instance after this one             */
#define DLM__KERNEL_PASS avx512
#define DLM__TARGET DLM__AVX512
#define DLM__VW 16
#define DLM__MR 12
#define DLM__NV 2
#define dlm__vf __m512
#define dlm__vmadd16(a, b) _mm512_madd_epi16((__m512i)(a), (__m512i)(b))
#define dlm__vtoint(v) ((dlm__vu)_mm512_maskz_cvtps_epi32(DLM__ALL, v))
#define dlm__vfromint(u) _mm512_maskz_cvtepi32_ps(DLM__ALL, (__m512i)(u))
#define dlm__vstore16(p, u) _mm256_storeu_si256( \
    (__m256i *)(void *)(p), \
    _mm512_maskz_cvtepi32_epi16(DLM__ALL, (__m512i)((u) >> 16)))
#define dlm__vstore8(p, u) _mm_storeu_si128( \
    (__m128i *)(void *)(p), _mm512_maskz_cvtepi32_epi8(DLM__ALL, (__m512i)(u)))
#define dlm__vloadn(p, n) _mm512_maskz_loadu_ps((__mmask16)((1U << (n)) - 1U), p)
#define dlm__vstoren(p, v, n) _mm512_mask_storeu_ps(p, (__mmask16)((1U << (n)) - 1U), v)
#define dlm__vset1(x) _mm512_set1_ps(x)
#define dlm__vfma(a, b, c) _mm512_fmadd_ps(a, b, c)
#define dlm__fma1(a, b, c) __builtin_fmaf(a, b, c)
#define dlm__vmax(a, b) _mm512_maskz_max_ps(DLM__ALL, a, b)
#define dlm__vsqrt(a) _mm512_maskz_sqrt_ps(DLM__ALL, a)
#define dlm__vnotbelow(v, x, low) \
    _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, low, _CMP_NLT_UQ), v)
#define dlm__across(v, sum) dlm__across_sse2(dlm__lower_avx512(v, sum), sum)
#include DLM_SELF
#undef DLM__SAME_WORDS

#ifdef DLM__AVX512BF16

/* --[ amx ]-------------------------------------------------------------------
   Eight tile registers of 16 rows of 64 bytes.  A block of c, 32 by 32, stays in four of
   them, two hold 16 words of each of its rows of a, two as many words of its columns of
   b.  Rows of a beyond m hold whatever is there: a row of c depends on its own alone. */
#ifdef DLM__AMX
#define DLM__AMX_TARGET __attribute__((target("amx-tile,amx-bf16,amx-int8")))

static DLM__AMX_TARGET void dlm__amx_enter(int yes)
{
    struct { uint8_t palette, start, zero[14]; uint16_t bytes[16]; uint8_t rows[16]; } t;
    memset(&t, 0, sizeof t);
    t.palette = 1;
    for (int i = 0; i < 8; i++) t.bytes[i] = 64, t.rows[i] = 16;
    DLM__BARRIER;                   /* gcc's words do not say all that they read   */
    if (yes) _tile_loadconfig(&t);
    else _tile_release();
}

DLM__INLINE DLM__AMX_TARGET void dlm__amx_tile(
    float *c, int ldc, dlm__side a, const float *b, int ldb, int m, int n, int k, int add,
    const dlm__word kind)
{
    float edge[32 * 32], *block = m == 32 && n == 32 ? c : edge;
    const size_t a_row = 4 * a.by_i, b_row = 4 * (size_t)ldb;
    const size_t ld = (size_t)(block == c ? ldc : 32), row = 4 * ld;
    float *lower = block + 16 * ld;
    for (int i = 0; add && block != c && i < m; i++)
        memcpy(edge + 32 * i, c + (size_t)i * (size_t)ldc, (size_t)n * sizeof *c);
    DLM__BARRIER;
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    if (add) {
        _tile_loadd(0, block, row); _tile_loadd(1, block + 16, row);
        if (m > 16) { _tile_loadd(2, lower, row); _tile_loadd(3, lower + 16, row); }
    }
#define DLM__MULTIPLY(c, a, b) \
    if (kind == DLM__WORD_I8) _tile_dpbssd(c, a, b); else _tile_dpbf16ps(c, a, b)
    for (int kk = 0; kk < k; kk += 16, a.at += 16, b += 16 * ldb) {
        _tile_loadd(4, a.at, a_row);
        _tile_loadd(6, b, b_row);
        _tile_loadd(7, b + 16, b_row);
        DLM__MULTIPLY(0, 4, 6);
        DLM__MULTIPLY(1, 4, 7);
        if (m <= 16) continue;
        _tile_loadd(5, a.at + 16 * a.by_i, a_row);
        DLM__MULTIPLY(2, 5, 6);
        DLM__MULTIPLY(3, 5, 7);
    }
#undef DLM__MULTIPLY
    _tile_stored(0, block, row); _tile_stored(1, block + 16, row);
    if (m > 16) { _tile_stored(2, lower, row); _tile_stored(3, lower + 16, row); }
    for (int i = 0; block != c && i < m; i++)
        memcpy(c + (size_t)i * (size_t)ldc, edge + 32 * i, (size_t)n * sizeof *c);
}

DLM__TILE_OF(DLM__AMX_TARGET, dlm__amx_tile_bf16, dlm__amx_tile, DLM__WORD_BF16)
DLM__TILE_OF(DLM__AMX_TARGET, dlm__amx_tile_int8, dlm__amx_tile, DLM__WORD_I8)
#endif

/* --[ avx512bf16 ]------------------------------------------------------------
   The same words, but those that multiply narrow ones; the tables of avx512bf16, amx. */
#define DLM__KERNEL_PASS avx512bf16
#define DLM__TARGET __attribute__((target("avx512f,avx512bw,avx512bf16,avx512vnni")))
#define dlm__bf16_fma(a, b, c) _mm512_dpbf16_ps(c, (__m512bh)(a), (__m512bh)(b))
#define dlm__int8_fma(a, b, c) \
    ((__m512)_mm512_dpbusd_epi32((__m512i)(c), (__m512i)(a), (__m512i)(b)))
#define dlm__int8_offset 128
#include DLM_SELF
#endif
#endif /* DLM__X86 */

#ifdef DLM__ARM

/* --[ neon ]------------------------------------------------------------------ */
/* Sums of neighbouring products, as _mm_madd_epi16. */
DLM__INLINE int32x4_t dlm__madd16_neon(int16x8_t a, int16x8_t b)
{
    return vpaddq_s32(vmull_s16(vget_low_s16(a), vget_low_s16(b)), vmull_high_s16(a, b));
}

DLM__INLINE void dlm__store16_neon(char *p, uint32x4_t x)
{
    const uint16x4_t four = vshrn_n_u32(x, 16);
    memcpy(p, &four, sizeof four);
}

DLM__INLINE void dlm__store8_neon(char *p, uint32x4_t x)
{
    const uint16x4_t y = vmovn_u32(x);
    const uint8x8_t four = vmovn_u16(vcombine_u16(y, y));
    memcpy(p, &four, 4);
}

#define DLM__KERNEL_PASS neon
#define DLM__TARGET
#define DLM__VW 4
#define DLM__MR 8
#define DLM__NV 2
#define dlm__vf float32x4_t
#define dlm__vmadd16(a, b) dlm__madd16_neon((int16x8_t)(a), (int16x8_t)(b))
#define dlm__vtoint(v) ((dlm__vu)vcvtnq_s32_f32(v))
#define dlm__vfromint(u) vcvtq_f32_s32((int32x4_t)(u))
#define dlm__vstore16(p, u) dlm__store16_neon(p, (uint32x4_t)(u))
#define dlm__vstore8(p, u) dlm__store8_neon(p, (uint32x4_t)(u))
#define dlm__vset1(x) vdupq_n_f32(x)
#define dlm__vfma(a, b, c) vfmaq_f32(c, a, b)
#define dlm__fma1(a, b, c) __builtin_fmaf(a, b, c)
/* vmaxq would return NaN where the x86 words return the second operand. */
#define dlm__vmax(a, b) vbslq_f32(vcgtq_f32(a, b), a, b)
#define dlm__vsqrt(a) vsqrtq_f32(a)
#define dlm__across(v, sum) ((sum) ? vaddvq_f32(v) : vmaxvq_f32(v))
#include DLM_SELF
#endif /* DLM__ARM */

/* --[ the table ]-------------------------------------------------------------  */

/* NULL: not compiled in, or not on this CPU.  SSE2 is part of x86-64, NEON of AArch64. */
static const dlm__kernels *dlm__kernels_of(dlm_isa isa)
{
    switch ((int)isa) {
    case DLM_ISA_SCALAR: return &dlm__table_scalar;
#ifdef DLM__X86
    case DLM_ISA_SSE2: return &dlm__table_sse2;
    case DLM_ISA_AVX2:
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")
            ? &dlm__table_avx2 : NULL;
    case DLM_ISA_AVX512:
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
            ? &dlm__table_avx512 : NULL;
#endif
#ifdef DLM__AVX512BF16
    case DLM_ISA_AVX512BF16:
        return dlm__kernels_of(DLM_ISA_AVX512) && __builtin_cpu_supports("avx512bf16")
            && __builtin_cpu_supports("avx512vnni") ? &dlm__table_avx512bf16 : NULL;
#endif
#ifdef DLM__AMX
    case DLM_ISA_AMX:
        return dlm__kernels_of(DLM_ISA_AVX512BF16) && dlm__ask_for_amx()
            ? &dlm__table_amx : NULL;
#endif
#ifdef DLM__ARM
    case DLM_ISA_NEON: return &dlm__table_neon;
#endif
    default: return NULL;
    }
}

DLM_API const char *dlm_isa_name(dlm_isa isa)
{
    static const char *const names[] = {    /* in the order of dlm_isa             */
        "auto", "scalar", "sse2", "avx2", "avx512", "avx512bf16", "amx", "neon"
    };
    return (unsigned)isa < DLM_ISA_COUNT ? names[isa] : "unknown";
}

DLM_API int dlm_isa_supported(dlm_isa isa) { return dlm__kernels_of(isa) != NULL; }

/* ==[ threads ]===============================================================
   dlm__parallel(ctx, n, ...) runs job(arg, i) for i in [0, n).  What a job computes
   depends on i alone, so results do not depend on who runs it.  The pool's threads
   spin a moment for the next call, because a training step makes hundreds of short
   ones, then sleep.  A caller that has run out of jobs closes the round and waits only
   for workers that have joined it: one that still sleeps, or has not got a core yet,
   costs nothing but its help. */

#ifdef DLM__POSIX_THREADS

enum { DLM__SPINS = 4000, DLM__OPEN = 1 << 20 };

typedef struct dlm__cpus { unsigned long word[1024 / (8 * sizeof(long))]; } dlm__cpus;

#if defined(__GLIBC__) && !defined(__UCLIBC__)
/* Under names of our own, so that no feature macro is asked of the user. */
extern int dlm__get_affinity(int tid, size_t size, unsigned long *mask)
    __asm__("sched_getaffinity");
extern int dlm__set_affinity(int tid, size_t size, const unsigned long *mask)
    __asm__("sched_setaffinity");
extern int dlm__get_cpu(void) __asm__("sched_getcpu");

/* Returns how many CPUs this thread may use, 0 if that is not known; then `others` are
   those without the one it is on. */
static int dlm__cpus_elsewhere(dlm__cpus *others)
{
    const int bits = 8 * (int)sizeof(long), here = dlm__get_cpu();
    int n = 0;
    memset(others, 0, sizeof *others);
    if (dlm__get_affinity(0, sizeof others->word, others->word) != 0) return 0;
    for (int i = 0; i < 1024; i++) n += (int)(others->word[i / bits] >> i % bits & 1);
    if (here < 0 || here >= 1024) return 0;
    others->word[here / bits] &= ~(1UL << here % bits);
    return n;
}

/* A woken worker that is put on the caller's core, where it was needed last, takes turns
   with it instead of helping: so the workers stay away from there. */
static void dlm__stay_on(const dlm__cpus *cpus)
{
    (void)dlm__set_affinity(0, sizeof cpus->word, cpus->word);
}
#else
static int  dlm__cpus_elsewhere(dlm__cpus *others) { (void)others; return 0; }
static void dlm__stay_on(const dlm__cpus *cpus) { (void)cpus; }
#endif

typedef struct dlm__share {         /* of the jobs, alone in its cache line        */
    int next, end;                  /* next: the first job nobody has taken        */
    int pad[14];
} dlm__share;

typedef struct dlm__bed { pthread_cond_t wake; int asleep; } dlm__bed;

typedef struct dlm__pool {
    pthread_mutex_t lock;           /* for those who go to sleep                   */
    dlm__bed        workers, caller; /* until `round` changes, until all have left */
    pthread_t      *threads;
    dlm__share     *shares;         /* of the caller, then of each worker          */
    int             n_threads;      /* workers besides the caller                  */
    int             numbered;       /* workers that know which share is theirs     */
    void          (*job)(void *arg, int i);
    void           *arg;
    int             joined;         /* workers at work, + DLM__OPEN: more may join */
    int             round;          /* changes with every dlm__parallel            */
    int             stop;
    int             stay;           /* workers stay on the CPUs of `elsewhere`     */
    dlm__cpus       elsewhere;      /* all but the one that dlm_init ran on        */
} dlm__pool;

static int dlm__atomic_get(const int *p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }

static int dlm__atomic_add(int *p, int by)
{
    return __atomic_fetch_add(p, by, __ATOMIC_SEQ_CST);
}

/* Waits while *at is `value`: spins a moment, then lies down.  A sleeper says so and,
   with the lock, looks once more; who changes *at does that first and then looks whether
   anybody sleeps (dlm__wake).  Each sees the other in one of the two orders, so nobody
   sleeps through. */
static void dlm__await(dlm__pool *p, dlm__bed *bed, const int *at, int value)
{
    for (int i = 0; i < DLM__SPINS; i++) {
        if (dlm__atomic_get(at) != value) return;
#ifdef DLM__X86
        _mm_pause();
#endif
    }
    pthread_mutex_lock(&p->lock);
    dlm__atomic_add(&bed->asleep, 1);
    while (dlm__atomic_get(at) == value) pthread_cond_wait(&bed->wake, &p->lock);
    dlm__atomic_add(&bed->asleep, -1);
    pthread_mutex_unlock(&p->lock);
}

static void dlm__wake(dlm__pool *p, dlm__bed *bed)
{
    if (dlm__atomic_get(&bed->asleep) == 0) return;
    pthread_mutex_lock(&p->lock);
    pthread_cond_broadcast(&bed->wake);
    pthread_mutex_unlock(&p->lock);
}

/* Its own share first: neighbouring jobs touch neighbouring rows, which the job before
   has left in this core's cache.  Then what the others have not begun. */
static void dlm__pool_run(dlm__pool *p, int self)
{
    const int n = p->n_threads + 1;
    for (int k = 0; k < n; k++) {
        dlm__share *s = &p->shares[(self + k) % n];
        for (int i; (i = dlm__atomic_add(&s->next, 1)) < s->end; ) p->job(p->arg, i);
    }
}

static void *dlm__pool_thread(void *arg)
{
    dlm__pool *p = (dlm__pool *)arg;
    const int self = 1 + dlm__atomic_add(&p->numbered, 1);
    int seen = 0;
    if (p->stay) dlm__stay_on(&p->elsewhere);
    for (;;) {
        dlm__await(p, &p->workers, &p->round, seen);
        seen = dlm__atomic_get(&p->round);
        if (dlm__atomic_get(&p->stop)) return NULL;
        if (dlm__atomic_add(&p->joined, 1) >= DLM__OPEN) dlm__pool_run(p, self);
        if (dlm__atomic_add(&p->joined, -1) == 1) dlm__wake(p, &p->caller);
    }
}

static void dlm__pool_parallel(void *pool, int n, void (*job)(void *, int), void *arg)
{
    dlm__pool *p = (dlm__pool *)pool;
    const int shares = p->n_threads + 1;
    p->job = job;
    p->arg = arg;
    for (int k = 0; k < shares; k++) {
        p->shares[k].next = (int)((int64_t)n * k / shares);
        p->shares[k].end = (int)((int64_t)n * (k + 1) / shares);
    }
    dlm__atomic_add(&p->joined, DLM__OPEN);
    dlm__atomic_add(&p->round, 1);
    dlm__wake(p, &p->workers);
    dlm__pool_run(p, 0);
    dlm__atomic_add(&p->joined, -DLM__OPEN);
    for (int in; (in = dlm__atomic_get(&p->joined)) > 0; )
        dlm__await(p, &p->caller, &p->joined, in);
}

static void dlm__pool_stop(dlm__pool *p)
{
    if (p == NULL) return;
    dlm__atomic_add(&p->stop, 1);
    dlm__atomic_add(&p->round, 1);
    dlm__wake(p, &p->workers);
    for (int i = 0; i < p->n_threads; i++) pthread_join(p->threads[i], NULL);
    pthread_cond_destroy(&p->caller.wake);
    pthread_cond_destroy(&p->workers.wake);
    pthread_mutex_destroy(&p->lock);
}

static dlm__pool *dlm__pool_carve(dlm__arena *a, int workers)
{
    dlm__pool *p = (dlm__pool *)dlm__push(a, 1, sizeof *p);
    pthread_t *threads = (pthread_t *)dlm__push(a, (size_t)workers, sizeof *threads);
    dlm__share *shares = (dlm__share *)dlm__push(a, (size_t)workers + 1, sizeof *shares);
    if (p) { p->threads = threads; p->shares = shares; }
    return p;
}

/* From here on the pool is the context's hook.  A thread that cannot be had is no error:
   the rest do its work. */
static void dlm__pool_start(dlm_ctx *ctx)
{
    dlm__pool *p = ctx->pool;
    const int workers = ctx->opt.threads - 1;
    pthread_attr_t attr;
    if (p == NULL) return;
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->workers.wake, NULL);
    pthread_cond_init(&p->caller.wake, NULL);
    pthread_attr_init(&attr);
    pthread_attr_setstacksize(&attr, (size_t)1 << 20);  /* 300 KiB are used */
    p->stay = dlm__cpus_elsewhere(&p->elsewhere) > workers;
    for (int i = 0; i < workers; i++) {
        if (pthread_create(&p->threads[i], &attr, dlm__pool_thread, p) != 0) break;
        p->n_threads = i + 1;
    }
    pthread_attr_destroy(&attr);
    ctx->opt.parallel_for = dlm__pool_parallel;
    ctx->opt.parallel_user = p;
    ctx->opt.threads = p->n_threads + 1;
}

/* More threads than cores only get in each other's way. */
static int dlm__cores(void)
{
    dlm__cpus others;
    const int allowed = dlm__cpus_elsewhere(&others);
    long n = sysconf(_SC_NPROCESSORS_ONLN);
    if (allowed > 0 && allowed < n) n = allowed;
    return n < 1 ? 1 : n > 1024 ? 1024 : (int)n;
}

#else /* no threads */

static struct dlm__pool *dlm__pool_carve(dlm__arena *a, int n)
{
    (void)a;
    (void)n;
    return NULL;
}
static void dlm__pool_stop(struct dlm__pool *p) { (void)p; }
static void dlm__pool_start(dlm_ctx *ctx) { (void)ctx; }
static int  dlm__cores(void) { return 1; }

#endif /* threads */

/* flops: about what all jobs cost together.  One core does half a million in some 10 us,
   about what waking a thread takes: below that a hand-over costs more than it saves. */
enum { DLM__HAND_OVER = 500000 };

static int dlm__alone(const dlm_ctx *ctx, double flops)
{
    return flops < (int)DLM__HAND_OVER || ctx->opt.parallel_for == NULL;
}

static void dlm__parallel(dlm_ctx *ctx, int n, double flops, void (*job)(void *, int),
                          void *arg)
{
    if (n > 1 && !dlm__alone(ctx, flops))
        ctx->opt.parallel_for(ctx->opt.parallel_user, n, job, arg);
    else
        for (int i = 0; i < n; i++) job(arg, i);
}

/* Rows in chunks of a fixed size, so that the partition is the same for everyone. */
enum { DLM__ROWS = 16 };

typedef struct dlm__row_loop {
    void (*body)(void *arg, int first, int end);
    void  *arg;
    int    n;
} dlm__row_loop;

static void dlm__row_job(void *arg, int i)
{
    const dlm__row_loop *l = (const dlm__row_loop *)arg;
    l->body(l->arg, i * DLM__ROWS, dlm__min(l->n, (i + 1) * DLM__ROWS));
}

static void dlm__for_rows(dlm_ctx *ctx, int n, double flops_per_row,
                          void (*body)(void *arg, int first, int end), void *arg)
{
    dlm__row_loop loop = { body, arg, n };
    dlm__parallel(ctx, dlm__ceil_div(n, DLM__ROWS), flops_per_row * n, dlm__row_job,
                  &loop);
}

/* ==[ options ]===============================================================
   One table per option struct: what a field is called, what its 0 stands for, and what it
   may be.  One resolver fills in and checks them all; the table of dlm_config is also
   what checkpoints and dlm_describe list.  What depends on other fields is said where the
   struct is used. */

typedef struct dlm__option {
    const char *name;
    size_t      offset, size;       /* an enum may be smaller than an int          */
    int         real;               /* a float; else an int or an enum             */
    double      preset, lo, hi;     /* 0 becomes the preset, which is in lo .. hi  */
} dlm__option;

#define DLM__FIELD(f) #f, offsetof(DLM__OF, f), sizeof(((DLM__OF *)0)->f)
#define DLM__INT(f, preset, lo, hi) { DLM__FIELD(f), 0, preset, lo, hi }
#define DLM__REAL(f, preset, lo, hi) { DLM__FIELD(f), 1, preset, lo, hi }
#define DLM__FLAG(f) DLM__INT(f, 0, 0, 1)
#define DLM__END { NULL, 0, 0, 0, 0, 0, 0 }

/* In the order of the files, which have DLM__OLD_FIELDS at least; what has been added
   since is in those where it is not 0. */
enum { DLM__OLD_FIELDS = 17 };
#define DLM__OF dlm_config
static const dlm__option dlm__config_options[] = {
    DLM__INT(vocab, 0, 2, 1 << 22),         DLM__INT(dim, 0, 1, 65536),
    DLM__INT(layers, 0, 1, 1024),           DLM__INT(heads, 0, 1, 1024),
    DLM__INT(max_seq, 0, 1, 1 << 20),       DLM__INT(mask_id, 0, INT_MIN, INT_MAX),
    DLM__INT(pattern, 0, 0, DLM_PATTERN_CAUSAL),
    DLM__INT(block, 8, 1, 1 << 20),         DLM__FLAG(shifted),
    DLM__INT(kv_heads, 0, 1, 1024),         DLM__INT(head_dim, 0, 2, DLM__MAX_D),
    DLM__INT(ffn, 0, 1, 1 << 20),           DLM__FLAG(untied_head),
    DLM__FLAG(no_qk_norm),                  DLM__FLAG(qkv_bias),
    DLM__REAL(rope_theta, 10000, 0, 1e12),  DLM__REAL(norm_eps, 1e-6, 0, 1),
    DLM__FLAG(mask_is_0),                   DLM__FLAG(gelu_mlp),
    DLM__FLAG(head_bias),                   DLM__END
};
#undef DLM__OF

#define DLM__OF dlm_limits
static const dlm__option dlm__limits_options[] = {
    DLM__INT(seqs, 1, 1, 1 << 20),          DLM__INT(slots, 0, 1, 1 << 22),
    DLM__INT(rows, 0, 0, INT_MAX / 2),      DLM__INT(out, 0, 0, INT_MAX / 2),
    DLM__FLAG(cached),                      DLM__END
};
#undef DLM__OF

#define DLM__OF dlm_sample_options
static const dlm__option dlm__sample_options[] = {
    DLM__INT(steps, 0, 0, INT_MAX),         DLM__INT(block, 0, 0, 1 << 20),
    DLM__FLAG(absolute_blocks),             DLM__INT(order, 0, 0, DLM_ORDER_COUNT - 1),
    DLM__REAL(threshold, 0.9, 0, 1),        DLM__FLAG(left_first),
    DLM__REAL(entropy_bound, 0.35, 0, 1e6), DLM__REAL(temperature, 0, 0, 1e4),
    DLM__INT(top_k, 0, 0, INT_MAX),         DLM__REAL(top_p, 0, 0, 1),
    DLM__REAL(min_p, 0, 0, 1),              DLM__REAL(guidance, 0, 0, 1e3),
    DLM__REAL(remask_below, 0, 0, 1),       DLM__FLAG(list_drawn),
    DLM__END
};
#undef DLM__OF

#define DLM__MOST_NORM 1e18f        /* of gradients whose squares f32 still holds  */
#define DLM__OF dlm_train_options
static const dlm__option dlm__train_options[] = {
    DLM__INT(max_rows, 0, 0, 1 << 26),      DLM__INT(objective, 0, 0, DLM_OBJECTIVE_AR),
    DLM__REAL(lr, 1e-3, 0, 1e3),            DLM__INT(warmup, 0, 0, INT_MAX),
    DLM__INT(total, 0, 0, INT_MAX),         DLM__INT(schedule, 0, 0, DLM_SCHEDULE_COSINE),
    DLM__REAL(lr_min, 0, 0, 1e3),           DLM__REAL(beta1, 0.9, 0, 0.999999),
    DLM__REAL(beta2, 0.99, 0, 0.999999),    DLM__REAL(adam_eps, 1e-8, 1e-15, 1),
    DLM__REAL(weight_decay, 0, 0, 100),     DLM__REAL(clip, 1, 0, DLM__MOST_NORM),
    DLM__REAL(ema, 0, 0, 0.9999999),        DLM__REAL(level_min, 1e-3, 1e-4, 1),
    DLM__REAL(level_max, 1, 1e-4, 1),       DLM__FLAG(independent_levels),
    DLM__INT(lift.method, 0, 0, DLM_METHOD_COUNT - 1),
    DLM__INT(lift.policy, 0, 0, DLM_POLICY_REVERSED),
    DLM__REAL(lift.H, 3, 0, 1e6),           DLM__FLAG(lift.rho_code_form),
    DLM__FLAG(lift.one_pass),               DLM__FLAG(lift.complementary),
    DLM__FLAG(lift.no_time_scaling),        DLM__END
};
#undef DLM__OF

#define DLM__OF dlm_distill_options
static const dlm__option dlm__distill_options[] = {
    DLM__INT(max_targets, 0, 0, 1 << 26),   DLM__INT(states, 0, 0, DLM_STATES_ALL),
    DLM__REAL(divergence.weight, 0.5, 0, 1), DLM__INT(divergence.kind, 0, 0, DLM_JSD),
    DLM__INT(divergence.sparse, 0, 0, INT_MAX),
    DLM__REAL(divergence.temperature, 1, 0, 1e4),
    DLM__INT(divergence.top_k, 0, 0, 1000000000),
    DLM__REAL(divergence.top_p, 0, 0, 1),   DLM__REAL(divergence.min_p, 0, 0, 1),
    DLM__FLAG(exclude_stop),                DLM__END
};
#undef DLM__OF

static double dlm__get_option(const dlm__option *o, const void *from)
{
    const char *at = (const char *)from + o->offset;
    int whole = 0;
    if (o->real) return (double)*(const float *)(const void *)at;
    memcpy(&whole, at, o->size);    /* little-endian where enums are short         */
    return whole;
}

static void dlm__set_option(const dlm__option *o, void *to, double value)
{
    const float real = (float)value;
    const int whole = o->real ? 0 : (int)value;
    memcpy((char *)to + o->offset, o->real ? (const void *)&real : &whole, o->size);
}

static dlm_error dlm__in_range(dlm_ctx *ctx, const char *name, int value, int lo, int hi)
{
    if (value >= lo && value <= hi) return DLM_OK;
    return dlm__fail(ctx, DLM_E_CONFIG, "%s: %d is not in %d..%d", name, value, lo, hi);
}

/* what: goes before the names.  Ends of ranges are floats where the field is one. */
static dlm_error dlm__resolve(dlm_ctx *ctx, const char *what, const dlm__option *list,
                              void *options)
{
    for (const dlm__option *o = list; o->name; o++) {
        const double lo = o->real ? (double)(float)o->lo : o->lo;
        const double hi = o->real ? (double)(float)o->hi : o->hi;
        const int digits = o->real ? 7 : 10;
        double value = dlm__get_option(o, options);
        if (value == 0.0) dlm__set_option(o, options, o->preset);
        value = dlm__get_option(o, options);
        if (!(value >= lo && value <= hi))      /* NaN is in no range              */
            return dlm__fail(ctx, DLM_E_CONFIG, "%s%s: %.*g is not in %.*g..%.*g", what,
                             o->name, digits, value, digits, lo, digits, hi);
    }
    return DLM_OK;
}

/* ==[ context ]===============================================================
   Choosing the kernels, reading options, making and releasing the context. */

static dlm__word dlm__word_of(dlm_dtype type)
{
    return type == DLM_F32 ? DLM__WORD_F32 : type == DLM_BF16 ? DLM__WORD_BF16
        : type == DLM_I8 ? DLM__WORD_I8 : DLM__WORDS;
}

static dlm_error dlm__check_type(dlm_ctx *ctx, const char *name, dlm_dtype type, int int8)
{
    const dlm__word kind = dlm__word_of(type);
    if (kind == DLM__WORDS || (kind == DLM__WORD_I8 && !int8))
        return dlm__fail(ctx, DLM_E_CONFIG, "%s: %d is none of DLM_F32, DLM_BF16%s", name,
                         (int)type, int8 ? ", DLM_I8" : "");
#if defined(FLT_EVAL_METHOD) && FLT_EVAL_METHOD == 2
    if (kind != DLM__WORD_F32)      /* x87 registers do not keep every pattern of bits */
        return dlm__fail(ctx, DLM_E_UNSUPPORTED, "%s: %d needs floats that are kept as "
                         "32 bits; compile with -mfpmath=sse", name, (int)type);
#endif
    return DLM_OK;
}

/* The ISA of that name, or DLM_ISA_COUNT; NULL, "" and "auto" name the best there is. */
static dlm_isa dlm__find_isa(const char *name)
{
    const int best = name == NULL || *name == '\0' || strcmp(name, "auto") == 0;
    for (int i = DLM_ISA_COUNT - 1; i >= DLM_ISA_SCALAR; i--) {
        const dlm_isa isa = (dlm_isa)i;
#ifdef DLM__AVX512BF16              /* others multiply bf16 at half the rate of f32 */
        if (best && isa == DLM_ISA_AVX512BF16 && !__builtin_cpu_is("amd")) continue;
#endif
        if (best ? dlm_isa_supported(isa) : strcmp(name, dlm_isa_name(isa)) == 0)
            return isa;
    }
    return DLM_ISA_COUNT;
}

static dlm_error dlm__choose_isa(dlm_ctx *ctx)
{
    const char *name = getenv("DLM_ISA");
    const dlm_isa isa = ctx->opt.isa;
    char asked[64], list[96] = "";          /* for what, and where; what there is    */
    size_t n = 0;
    snprintf(asked, sizeof asked, "isa %d (%s)", (int)isa, dlm_isa_name(isa));
    if (isa == DLM_ISA_AUTO && name && *name)
        snprintf(asked, sizeof asked, "DLM_ISA=%.40s", name);
    ctx->opt.isa = isa == DLM_ISA_AUTO ? dlm__find_isa(name) : isa;
    ctx->k = dlm__kernels_of(ctx->opt.isa);
    if (ctx->k) return DLM_OK;
    for (int i = DLM_ISA_SCALAR; i < DLM_ISA_COUNT && n < sizeof list; i++)
        if (dlm_isa_supported((dlm_isa)i))
            n += (size_t)snprintf(list + n, sizeof list - n, "%s%s", n ? ", " : "",
                                  dlm_isa_name((dlm_isa)i));
    return dlm__fail(ctx, DLM_E_UNSUPPORTED, "%s: this CPU and build have %s", asked,
                     list);
}

static void dlm__ctx_carve(dlm__arena *a, void *object)
{
    dlm_ctx *ctx = (dlm_ctx *)object;
    const int workers = ctx->opt.parallel_for ? 0 : ctx->opt.threads - 1;
    ctx->scratch = dlm__push_floats(a, ctx->opt.scratch / sizeof(float), 1);
    ctx->pool = workers ? dlm__pool_carve(a, workers) : NULL;
}

static dlm_error dlm__ctx_resolve(dlm_ctx *c, const dlm_options *opt)
{
    dlm_error e;
    size_t least;
    memset(c, 0, sizeof *c);
    if (opt) c->opt = *opt;
    e = dlm__in_range(c, "threads", c->opt.threads, 0, 1024);
    if (e != DLM_OK) return e;
    if (!c->opt.allocator.alloc != !c->opt.allocator.release)
        return dlm__fail(c, DLM_E_CONFIG, "allocator: alloc and release go together");
    c->opt.threads = dlm__min(dlm__max(c->opt.threads, 1), dlm__cores());
    e = dlm__choose_isa(c);
    if (e != DLM_OK) return e;
    least = (size_t)(DLM__KC * c->k->nr) * sizeof(float);   /* one panel of a matmul */
    if (c->opt.scratch == 0) c->opt.scratch = (size_t)1 << 20;
    if (c->opt.scratch < least || c->opt.scratch > SIZE_MAX / 8)
        return dlm__fail(c, DLM_E_CONFIG, "scratch: %.0f bytes, %s can use %.0f .. %.0f",
                         (double)c->opt.scratch, dlm_isa_name(c->opt.isa), (double)least,
                         (double)(SIZE_MAX / 8));
    return DLM_OK;
}

/* Of a context that cannot be, or shall not, the sentence goes to the caller. */
static dlm_error dlm__ctx_make(dlm_ctx **out, const dlm_options *opt, dlm_memory *mem)
{
    dlm_ctx c, *ctx;
    dlm_error e = dlm__ctx_resolve(&c, opt);
    if (e == DLM_OK && mem == NULL && c.opt.memory.base) mem = &c.opt.memory;
    ctx = (dlm_ctx *)dlm__make(&e, &c, "context", dlm__ctx_carve, &c, sizeof c,
                               out != NULL, mem);
    if (e != DLM_OK && c.opt.message && c.opt.message_size)
        snprintf(c.opt.message, c.opt.message_size, "%s", c.error);
    if (out) *out = ctx;
    return e;
}

DLM_API size_t dlm_ctx_bytes(const dlm_options *opt)
{
    dlm_memory mem = { NULL, 0 };
    (void)dlm__ctx_make(NULL, opt, &mem);
    return mem.size;
}

DLM_API dlm_error dlm_init(dlm_ctx **out, const dlm_options *opt)
{
    const dlm_error e = dlm__ctx_make(out, opt, NULL);
    if (e != DLM_OK) return e;
    (*out)->opt.message = NULL;
    dlm__pool_start(*out);
    return DLM_OK;
}

DLM_API void dlm_shutdown(dlm_ctx *ctx)
{
    if (ctx) dlm__pool_stop(ctx->pool);
    dlm__unmake(ctx);
}

DLM_API dlm_isa dlm_active_isa(const dlm_ctx *ctx) { return ctx->opt.isa; }
DLM_API int dlm_active_threads(const dlm_ctx *ctx) { return ctx->opt.threads; }

/* ==[ matmul ]================================================================
   c (M,N) (+)= a (M,K) b (K,N) with any strides, which covers NN, NT and TN.  b is
   rearranged into panels of nr columns, [k][nr], zero-padded, in blocks of at most
   256 k; or that was done before (dlm_pack); or, when a has few rows and rows of b are
   contiguous, whole panels are read where they stand.  Tiles of mr rows of a are read
   where they lie, too, unless many panels read them; a single row meets four panels at
   once.  Each output is one chain of multiply-adds over k from 0 up: the tile continues
   from c where the block before stopped.  So no size but K can change a result.

   In bf16 and int8, both factors are narrowed while they are packed and from there on k
   counts words (dlm__word).  bf16 rounds both and sums in f32.  int8 has a scale per
   row of a, found when the row is packed, and one per row of the weights:
     c_ij = s_i t_j sum_k round(a_ik / s_i) round(b_jk / t_j)     s_i = max_k |a_ik| / 127
   (1 / s_i is computed as 127 / max) and the sum is one of integers, the same on every
   ISA. */

enum {
    DLM__IN_PLACE = 24,             /* up to so many tile rows, packing b does not pay */
    DLM__LEFT_PACKED = 8,           /* from so many panels on, packing a does      */
    DLM__L3_WORDS = 1 << 22,        /* 16 MiB                                      */
    DLM__GROUPS = 8                 /* jobs that keep a few threads busy           */
};

typedef struct dlm__gemm {
    dlm_ctx *ctx;
    float *c; size_t ldc;   /* (M, N), rows of ldc                                 */
    dlm__side a, b;       /* a(i,k), b(j,k)                                      */
    int M, N, K, add;
    dlm__word kind;         /* in which it is computed                             */
    int per, words, mr;     /* values in a word; K in words; rows of a tile        */
    const float *packed;    /* whole panels (words, nr) of b from dlm_pack, or NULL */
    int in_place;           /* whole panels of b are read where they stand         */
    int k0, kc, j0, nc;     /* the block in work: words [k0,k0+kc), j in [j0,j0+nc) */
    int groups, per_group;  /* column panels are shared out in groups              */
} dlm__gemm;

static int dlm__values_per_word(dlm__word kind)
{
    return kind == DLM__WORD_I8 ? 4 : kind == DLM__WORD_BF16 ? 2 : 1;
}

static int dlm__words_of(const dlm__kernels *k, dlm__word kind, int K)
{
    const int step = kind == DLM__WORD_F32 ? 1 : k->narrow.k_step;
    return dlm__round_up(dlm__ceil_div(K, dlm__values_per_word(kind)), step);
}

/* out (4 rows, ldo apart) = the transposed of in (4 rows, ldi apart), 4 by 4. */
DLM__INLINE void dlm__transpose4(float *out, size_t ldo, const float *in, size_t ldi)
{
#if defined(DLM__X86)               /* SSE is part of x86-64: no dispatch          */
    __m128 a = _mm_loadu_ps(in), b = _mm_loadu_ps(in + ldi);
    __m128 c = _mm_loadu_ps(in + 2 * ldi), d = _mm_loadu_ps(in + 3 * ldi);
    _MM_TRANSPOSE4_PS(a, b, c, d);
    _mm_storeu_ps(out, a);
    _mm_storeu_ps(out + ldo, b);
    _mm_storeu_ps(out + 2 * ldo, c);
    _mm_storeu_ps(out + 3 * ldo, d);
#else
    for (size_t i = 0; i < 4; i++)
        for (size_t j = 0; j < 4; j++) out[j * ldo + i] = in[i * ldi + j];
#endif
}

/* out (cols, rows; ldo) = the transposed of in (rows, cols; ldi): 16 columns, a cache
   line, of all rows at a time, so that no line is left and come back to. */
static void dlm__transpose(float *out, size_t ldo, const float *in, size_t ldi, int rows,
                           int cols)
{
    const int rows4 = rows / 4 * 4, cols4 = cols / 4 * 4;
    for (int line = 0; line < cols4; line += 16)
        for (int i = 0; i < rows4; i += 4)
            for (int j = line; j < dlm__min(line + 16, cols4); j += 4)
                dlm__transpose4(out + (size_t)j * ldo + (size_t)i, ldo,
                                in + (size_t)i * ldi + (size_t)j, ldi);
    for (int j = 0; j < cols; j++)
        for (int i = j < cols4 ? rows4 : 0; i < rows; i++)
            out[(size_t)j * ldo + (size_t)i] = in[(size_t)i * ldi + (size_t)j];
}

/* dst[k*w + i] = src[i*s_i + k*s_k] for i < n, 0 for n <= i < w; one of the strides
   is 1. */
static void dlm__pack_panel(float *dst, int w, int n, int k, const float *src, size_t s_i,
                            size_t s_k)
{
    if (n < w) memset(dst, 0, (size_t)w * (size_t)k * sizeof *dst);
    if (s_i != 1) {
        DLM_ASSERT(s_k == 1);
        dlm__transpose(dst, (size_t)w, src, s_i, n, k);
        return;
    }
    for (int kk = 0; kk < k; kk++, dst += w, src += s_k) {
        int i = 0;                  /* rows are short: no call for each of them    */
        for (; i + 4 <= n; i += 4) memcpy(dst + i, src + i, 4 * sizeof *dst);
        for (; i < n; i++) dst[i] = src[i];
    }
}

/* A part of a side: values x(i,k), i < n, k < K. */
typedef struct dlm__slice {
    dlm__side x;
    int n, K;
    const float *inverse;           /* for int8: (n) 1 / scale of each i           */
    int offset;                     /* for int8: is added to each value            */
} dlm__slice;

/* The slice as words, dst[word*w + i] or, by rows, dst[i*words + word]: padded with
   zeros to `words` and, if not by rows, to w.  dst has room for 16 words more. */
static void dlm__pack_slice(const dlm__kernels *k, dlm__word kind, float *dst, int w,
                             int by_rows, int words, const dlm__slice *s)
{
    const int along_k = s->x.by_k == 1, per = dlm__values_per_word(kind);
    const int full = dlm__ceil_div(s->K, per), lines = along_k ? s->n : full;
    const int direct = along_k == by_rows, ld = by_rows ? words : w;
    float four[4 * DLM__KC + 16];
    if (kind == DLM__WORD_F32) {
        dlm__pack_panel(dst, w, s->n, s->K, s->x.at, s->x.by_i, s->x.by_k);
        return;
    }
    if (!along_k || s->n < w) memset(dst, 0, (size_t)(w * words) * sizeof *dst);
    for (int line = 0; line < lines; line++) {
        float *out = direct ? dst + (size_t)line * (size_t)ld
                            : four + line % 4 * DLM__KC;
        const size_t step = along_k ? s->x.by_i : (size_t)per * s->x.by_k;
        const float *x = s->x.at + (size_t)line * step;
        if (along_k) {
            if (full > 0) out[full - 1] = 0.0f;          /* if K ends within it        */
            if (kind == DLM__WORD_BF16) k->to_bf16(out, x, s->K);
            else k->to_int8(out, x, s->K, s->inverse[line], s->offset);
            if (full < words)
                memset(out + full, 0, (size_t)(words - full) * sizeof *out);
        } else {
            DLM_ASSERT(kind == DLM__WORD_BF16);
            k->pair(out, x, 2 * line + 1 < s->K ? x + s->x.by_k : NULL, s->n);
        }
        if (!direct && (line % 4 == 3 || line == lines - 1))
            dlm__transpose(dst + line / 4 * 4, (size_t)ld, four, DLM__KC, line % 4 + 1,
                           along_k ? words : s->n);
    }
}

/* Of side x, n i from `first` on and the words in work. */
static dlm__slice dlm__slice_of(const dlm__gemm *g, const dlm__side *x, int first, int n,
                                const float *inverse)
{
    const int k = g->k0 * g->per;
    const float *at = x->at + (size_t)first * x->by_i + (size_t)k * x->by_k;
    const dlm__slice s = { dlm__side_of(at, x->by_i, x->by_k), n,
                           dlm__max(0, dlm__min(g->kc * g->per, g->K - k)), inverse,
                           g->ctx->k->narrow.offset };
    return s;
}

static void dlm__gemm_pack_job(void *arg, int p)
{
    const dlm__gemm *g = (const dlm__gemm *)arg;
    const dlm__kernels *k = g->ctx->k;
    const int j = p * k->nr, n = dlm__min(k->nr, g->nc - j);
    float *panel = g->ctx->scratch + (size_t)j * (size_t)g->kc;
    const dlm__slice s = dlm__slice_of(g, &g->b, g->j0 + j, n, NULL);
    dlm__pack_slice(k, g->kind, panel, k->nr, 0, g->kc, &s);
}

/* m rows of a, from i0 on, against the panel at column j; a single row against the next
   three, too, if the group has them.  Returns how many columns are done. */
static int dlm__gemm_tile(const dlm__gemm *g, int i0, int m, dlm__side a, int j, int end)
{
    const dlm__kernels *k = g->ctx->k;
    const int n = dlm__min(k->nr, g->nc - j), in_place = g->in_place && n == k->nr;
    const int wide = m == 1 && j + 4 * k->nr <= end && k->row[g->kind];
    const int ldb = in_place ? (int)g->b.by_k : k->nr, ldc = (int)g->ldc;
    const int add = g->add || g->k0 > 0
        || (g->kind == DLM__WORD_I8 && k->narrow.offset);   /* c holds what corrects it */
    const size_t next = (size_t)k->nr
        * (size_t)(in_place ? 1 : g->packed ? g->words : g->kc);
    float *c = g->c + (size_t)i0 * g->ldc + (size_t)(g->j0 + j);
    const float *b = g->ctx->scratch + (size_t)j * (size_t)g->kc;
    if (in_place)
        b = g->b.at + (size_t)g->k0 * g->b.by_k + (size_t)(g->j0 + j);
    else if (g->packed)
        b = g->packed + (size_t)(g->j0 + j) * (size_t)g->words + (size_t)(g->k0 * k->nr);
    if (wide) k->row[g->kind](c, a, b, ldb, next, g->kc, add);
    else k->tile[g->kind](c, ldc, a, b, ldb, m, n, g->kc, add);
    return wide ? 4 * k->nr : k->nr;
}

/* Of n values; not finite if one of them is not. */
static void dlm__int8_scale(const dlm__kernels *k, const float *x, int n, float *scale,
                            float *inverse)
{
    const float most = k->magnitude(x, n);
    *scale = most / 127.0f;
    *inverse = most > 4e-37f ? 127.0f / most : 0.0f;      /* still finite          */
}

/* Before the first block of words c gets what makes up for the offset of a, after the
   last one the integers become floats. */
static void dlm__int8_edges(const dlm__gemm *g, int i0, int m, int j, int n, int last,
                            const float *scale)
{
    const size_t N = (size_t)dlm__round_up(g->N, g->ctx->k->nr), at = (size_t)(g->j0 + j);
    const float *column = g->packed + N * (size_t)g->words + at;
    for (int i = 0; i < m; i++) {
        float *c = g->c + (size_t)(i0 + i) * g->ldc + at;
        if (last) g->ctx->k->scale_int(c, column, scale[i], n);
        else memcpy(c, column + N, (size_t)n * sizeof *c);
    }
}

/* m rows of a: as they lie, or in a panel, narrowed or because many will read them. */
static dlm__side dlm__gemm_rows(const dlm__gemm *g, int i0, int m, float *panel,
                                const float *inverse)
{
    const dlm__kernels *k = g->ctx->k;
    const size_t by_k = g->a.by_k;
    int by_rows = k->narrow.by_rows || by_k == 1;
    const dlm__slice s = dlm__slice_of(g, &g->a, i0, m, inverse);
    if (g->kind == DLM__WORD_F32) {
        const int evicts = by_k % 1024 == 0;     /* steps of 4 KiB share one L1 set */
        if ((g->per_group < DLM__LEFT_PACKED && !evicts) || (m == 1 && by_k == 1))
            return s.x;
        by_rows = 0;
    }
    dlm__pack_slice(k, g->kind, panel, m, by_rows, g->kc, &s);
    return by_rows ? dlm__side_of(panel, (size_t)g->kc, 1)
                   : dlm__side_of(panel, 1, (size_t)m);
}

/* One tile row: mr rows of a against the column panels of one group. */
static void dlm__gemm_job(void *arg, int job)
{
    const dlm__gemm *g = (const dlm__gemm *)arg;
    const dlm__kernels *k = g->ctx->k;
    const int i0 = job / g->groups * g->mr, m = dlm__min(g->mr, g->M - i0);
    const int first = job % g->groups * g->per_group * k->nr;
    const int end = dlm__min(g->nc, first + g->per_group * k->nr);
    const int enter = g->kind != DLM__WORD_F32 && k->narrow.enter;
    float a_panel[DLM__MAX_MR * DLM__KC + 16];
    float scale[DLM__MAX_MR], inverse[DLM__MAX_MR];
    dlm__side a;
    if (g->kind == DLM__WORD_I8) {
        for (int i = 0; i < m; i++)
            dlm__int8_scale(k, g->a.at + (size_t)(i0 + i) * g->a.by_i, g->K, &scale[i],
                            &inverse[i]);
        if (g->k0 == 0 && k->narrow.offset)
            dlm__int8_edges(g, i0, m, first, end - first, 0, scale);
    }
    a = dlm__gemm_rows(g, i0, m, a_panel, inverse);
    if (enter) k->narrow.enter(1);
    for (int j = first; j < end; j += dlm__gemm_tile(g, i0, m, a, j, end)) { }
    if (enter) k->narrow.enter(0);
    if (g->kind == DLM__WORD_I8 && g->k0 + g->kc == g->words)
        dlm__int8_edges(g, i0, m, first, end - first, 1, scale);
}

static void dlm__gemm_block(dlm__gemm *g)
{
    const dlm__kernels *k = g->ctx->k;
    const int panels = dlm__ceil_div(g->nc, k->nr), tiles = dlm__ceil_div(g->M, g->mr);
    const double flops = 2.0 * g->M * g->nc * g->kc;
    g->in_place = !g->packed && g->kind == DLM__WORD_F32 && g->b.by_i == 1
        && tiles <= DLM__IN_PLACE;
    if (g->in_place) {
        if (g->nc % k->nr) dlm__gemm_pack_job(g, panels - 1);
    } else if (!g->packed) {
        dlm__parallel(g->ctx, panels, flops, dlm__gemm_pack_job, g);
    }
    /* Every group packs its rows of a again: no more of them than give threads work. */
    g->per_group = dlm__ceil_div(panels, dlm__alone(g->ctx, flops)
                                         ? 1 : dlm__ceil_div(DLM__GROUPS, tiles));
    if (g->M == 1) g->per_group = dlm__max(g->per_group, 4);
    g->groups = dlm__ceil_div(panels, g->per_group);
    dlm__parallel(g->ctx, tiles * g->groups, flops, dlm__gemm_job, g);
}

static void dlm__gemm_run(dlm__gemm *g)
{
    const dlm__kernels *k = g->ctx->k;
    const int nr = k->nr, words = dlm__words_of(k, g->kind, g->K);
    const int kc = dlm__min(DLM__KC, dlm__max(words, 1));
    const size_t room = g->ctx->opt.scratch / sizeof(float) / (size_t)(kc * nr);
    const int panels = dlm__ceil_div(g->N, nr);
    int nc = (room < (size_t)panels ? (int)room : panels) * nr;
    g->words = words;
    g->per = dlm__values_per_word(g->kind);
    g->mr = g->kind == DLM__WORD_F32 ? k->mr : k->narrow.mr;
    if (g->packed) {
        /* Weights that the L3 holds are best read through by every tile row; of larger
           ones, a part that the L2 holds by all tile rows in turn. */
        const int large = (size_t)g->N * (size_t)words > (size_t)DLM__L3_WORDS;
        nc = large && g->M > g->mr ? dlm__max(nc / 2 / nr, 1) * nr : panels * nr;
    }
    if (g->K == 0 && !g->add)
        for (int i = 0; i < g->M; i++)
            memset(g->c + (size_t)i * g->ldc, 0, (size_t)g->N * sizeof *g->c);
    if (g->M == 0) return;
    for (g->j0 = 0; g->j0 < g->N; g->j0 += nc)
        for (g->k0 = 0; g->k0 < words; g->k0 += kc) {
            g->nc = dlm__min(nc, g->N - g->j0);
            g->kc = dlm__min(kc, words - g->k0);
            dlm__gemm_block(g);
        }
}

enum { DLM__TINY = 128 };           /* multiply-adds below which packing costs more */

/* Any orientation; c has rows of N.  Tiny products are done here and now. */
static void dlm__gemm_any(dlm_ctx *ctx, float *c, dlm__side a, dlm__side b,
                          const float *packed, dlm__word kind, int M, int N, int K,
                          int add)
{
    dlm__gemm g;
    if (!packed && kind == DLM__WORD_F32 && (double)M * N * K <= (int)DLM__TINY) {
        ctx->k->tiny(c, (size_t)N, a, b, M, N, K, add);
        return;
    }
    memset(&g, 0, sizeof g);
    g.ctx = ctx; g.c = c; g.ldc = (size_t)N; g.a = a; g.b = b; g.packed = packed;
    g.M = M; g.N = N; g.K = K; g.add = add; g.kind = kind;
    dlm__gemm_run(&g);
}

/* c (M,N) = a (M,K) w^T: linear layers, forward. */
DLM_API void dlm_matmul(dlm_ctx *ctx, float *out, const float *a, const dlm_matrix *w,
                        int M)
{
    const size_t K = (size_t)w->cols;
    const float *b = (const float *)w->data;
    DLM_ASSERT(w->packed || w->type != DLM_I8);
    dlm__gemm_any(ctx, out, dlm__side_of(a, K, 1), dlm__side_of(b, K, 1),
                  w->packed ? b : NULL, dlm__word_of(w->type), M, w->rows, w->cols, 0);
}

/* c (M,N) (+)= a (M,K) b (K,N): gradients of inputs. */
static void dlm__gemm_nn(dlm_ctx *ctx, float *c, const float *a, const float *b,
                         dlm__word kind, int M, int N, int K, int add)
{
    dlm__gemm_any(ctx, c, dlm__side_of(a, (size_t)K, 1),
                  dlm__side_of(b, 1, (size_t)N), NULL, kind, M, N, K, add);
}

/* c (M,N) (+)= a^T b with a (K,M), b (K,N): gradients of weights. */
static void dlm__gemm_tn(dlm_ctx *ctx, float *c, const float *a, const float *b,
                         dlm__word kind, int M, int N, int K, int add)
{
    dlm__gemm_any(ctx, c, dlm__side_of(a, 1, (size_t)M),
                  dlm__side_of(b, 1, (size_t)N), NULL, kind, M, N, K, add);
}

/* Floats where they lie. */
static dlm_matrix dlm__plain(const float *data, int rows, int cols, dlm_dtype type)
{
    const dlm_matrix w = { rows, cols, type, 0, data };
    return w;
}

DLM_API void dlm_matmul_nn(dlm_ctx *ctx, float *out, const float *a, const float *b,
                           int M, int N, int K)
{
    dlm__gemm_nn(ctx, out, a, b, DLM__WORD_F32, M, N, K, 0);
}

DLM_API void dlm_matmul_nt(dlm_ctx *ctx, float *out, const float *a, const float *b,
                           int M, int N, int K)
{
    const dlm_matrix w = dlm__plain(b, N, K, DLM_F32);
    dlm_matmul(ctx, out, a, &w, M);
}

DLM_API void dlm_matmul_tn(dlm_ctx *ctx, float *out, const float *a, const float *b,
                           int M, int N, int K)
{
    dlm__gemm_tn(ctx, out, a, b, DLM__WORD_F32, M, N, K, 0);
}

DLM_API size_t dlm_pack_bytes(const dlm_ctx *ctx, dlm_dtype type, int rows, int cols)
{
    const dlm__word kind = dlm__word_of(type);
    const size_t columns = (size_t)dlm__round_up(rows, ctx->k->nr);
    return columns * sizeof(float) * (size_t)(dlm__words_of(ctx->k, kind, cols)
                                              + (kind == DLM__WORD_I8 ? 2 : 0));
}

/* What the offset of a adds to column i of a panel of int8, with its sign turned. */
static float dlm__int8_correction(const dlm__kernels *k, const float *panel, int words,
                                  int i)
{
    int32_t sum = 0;
    for (int word = 0; word < words; word++) {
        int8_t four[4];
        memcpy(four, panel + word * k->nr + i, sizeof four);
        sum += four[0] + four[1] + four[2] + four[3];
    }
    return dlm__floats_scalar(0U - (uint32_t)k->narrow.offset * (uint32_t)sum);
}

/* Rows [first, first + n) of the packed `out`: panels (words, nr), of int8 followed by a
   scale and a correction per row.  first is a multiple of nr; w has these rows alone. */
static void dlm__pack_rows(const dlm_ctx *ctx, const dlm_matrix *out, const float *w,
                           int first, int n)
{
    const dlm__kernels *k = ctx->k;
    const dlm__word kind = dlm__word_of(out->type);
    const int K = out->cols, nr = k->nr, per = dlm__values_per_word(kind);
    const int words = dlm__words_of(k, kind, K), columns = dlm__round_up(out->rows, nr);
    float *packed = (float *)(uintptr_t)out->data;
    float *scale = packed + (size_t)columns * (size_t)words;
    float inverse[DLM__MAX_NR];
    dlm__slice s;
    s.inverse = inverse; s.offset = 0;
    for (int j = first; j < first + n; j += nr, w += (size_t)nr * (size_t)K) {
        float *panel = packed + (size_t)j * (size_t)words;
        s.n = dlm__min(nr, first + n - j);
        for (int i = 0; kind == DLM__WORD_I8 && i < nr; i++) {
            scale[j + i] = scale[columns + j + i] = 0.0f;       /* of what is padding */
            if (i < s.n)
                dlm__int8_scale(k, w + (size_t)i * (size_t)K, K, &scale[j + i],
                                &inverse[i]);
        }
        for (int at = 0; at < words; at += DLM__KC) {
            const int kc = dlm__min(DLM__KC, words - at);
            s.x = dlm__side_of(w + (size_t)(at * per), (size_t)K, 1);
            s.K = dlm__max(0, dlm__min(kc * per, K - at * per));
            dlm__pack_slice(k, kind, panel + at * nr, nr, 0, kc, &s);
        }
        for (int i = 0; kind == DLM__WORD_I8 && i < s.n; i++)
            scale[columns + j + i] = dlm__int8_correction(k, panel, words, i);
    }
}

DLM_API dlm_matrix dlm_pack(const dlm_ctx *ctx, void *memory, dlm_dtype type,
                            const float *w, int rows, int cols)
{
    dlm_matrix out = dlm__plain((const float *)memory, rows, cols, type);
    DLM_ASSERT(dlm__word_of(type) != DLM__WORDS
               && (type != DLM_I8 || cols <= DLM_I8_MOST));
    out.packed = 1;
    dlm__pack_rows(ctx, &out, w, 0, rows);
    return out;
}

/* Row i of w, as floats. */
static void dlm__matrix_row(const dlm_ctx *ctx, float *out, const dlm_matrix *w, int i)
{
    const dlm__word kind = dlm__word_of(w->type);
    const int nr = ctx->k->nr, K = w->cols, per = dlm__values_per_word(kind);
    const size_t words = (size_t)dlm__words_of(ctx->k, kind, K);
    const float *data = (const float *)w->data;
    const float *at = data + (size_t)(i / nr * nr) * words + i % nr;
    const size_t columns = (size_t)dlm__round_up(w->rows, nr);
    if (!w->packed) {
        memcpy(out, data + (size_t)i * (size_t)K, (size_t)K * sizeof *out);
        return;
    }
    for (int k = 0; k < K; k += per, at += nr) {
        uint16_t half[2];
        int8_t byte[4];
        memcpy(half, at, sizeof half);
        memcpy(byte, at, sizeof byte);
        for (int part = 0; part < dlm__min(per, K - k); part++)
            out[k + part] = kind == DLM__WORD_F32 ? *at
                : kind == DLM__WORD_BF16 ? dlm__floats_scalar((uint32_t)half[part] << 16)
                : (float)byte[part] * data[columns * words + (size_t)i];
    }
}

/* ==[ layers ]================================================================
   Each operation of a layer: its formula, forward, and right below it its backward.
   It works on rows; rows of different sequences never meet except in the sums
   that make a weight's gradient.  Backward functions add into weight gradients. */

/* --[ linear ]----------------------------------------------------------------
     y (M,N) = x (M,K) w^T            dlm_matmul
     dx (M,K) (+)= dy w               dw (N,K) += dy^T x          w (N,K) is plain */
static void dlm__linear_backward(dlm_ctx *ctx, float *dx, int add, float *dw,
                                 const float *dy, const float *x, const dlm_matrix *w,
                                 int M)
{
    const dlm__word kind = dlm__word_of(w->type);
    const float *data = (const float *)w->data;
    dlm__gemm_nn(ctx, dx, dy, data, kind, M, w->cols, w->rows, add);
    dlm__gemm_tn(ctx, dw, dy, x, kind, w->rows, w->cols, M, 1);
}

/* --[ sums over rows ]--------------------------------------------------------
   Gradients of vectors (norms, biases, embedding rows) sum over rows.  The columns
   are shared out, 64 at a time, and every column adds its rows in order. */
enum { DLM__COLUMNS = 64 };

typedef struct dlm__column_sum {
    dlm_ctx *ctx;
    float *out;                     /* (n), or (V, n) when tokens are given        */
    const float *dy; size_t ldy;    /* (rows, heads, n), rows ldy apart            */
    const float *x;  size_t ldx;    /* the same, or NULL: a plain sum              */
    const float *r;                 /* (rows, heads)                               */
    const int *tokens;              /* (rows) or NULL                              */
    int rows, heads, n;
} dlm__column_sum;

static void dlm__column_sum_job(void *arg, int job)
{
    const dlm__column_sum *c = (const dlm__column_sum *)arg;
    const dlm__kernels *k = c->ctx->k;
    const int j = job * DLM__COLUMNS, n = dlm__min(DLM__COLUMNS, c->n - j);
    for (int i = 0; i < c->rows; i++)
        for (int h = 0; h < c->heads; h++) {
            const size_t at = (size_t)(h * c->n + j);
            const float *dy = c->dy + (size_t)i * c->ldy + at;
            float *out = c->out + j;
            if (c->tokens) out += (size_t)c->tokens[i] * (size_t)c->n;
            if (c->x)
                k->add_product(out, dy, c->x + (size_t)i * c->ldx + at,
                               c->r[i * c->heads + h], n);
            else
                k->add(out, dy, n);
        }
}

static void dlm__column_sum_run(dlm__column_sum *c)
{
    dlm__parallel(c->ctx, dlm__ceil_div(c->n, DLM__COLUMNS),
                  4.0 * c->rows * c->heads * c->n, dlm__column_sum_job, c);
}

/* --[ bias ]------------------------------------------------------------------
     y_i += b                         db += sum_i dy_i                             */
static void dlm__bias_forward(const dlm_ctx *ctx, float *y, const float *b, size_t ldy,
                              int rows, int n)
{
    for (int i = 0; i < rows; i++) ctx->k->add(y + (size_t)i * ldy, b, n);
}

/* db NULL: there is no bias. */
static void dlm__bias_backward(dlm_ctx *ctx, float *db, const float *dy, size_t ldy,
                               int rows, int n)
{
    dlm__column_sum c = { ctx, db, dy, ldy, NULL, 0, NULL, NULL, rows, 1, n };
    if (db) dlm__column_sum_run(&c);
}

/* --[ embedding ]-------------------------------------------------------------
     x_i = e[token_i]                 de[token_i] += dx_i                          */
static void dlm__embedding_forward(const dlm_ctx *ctx, float *x, const dlm_matrix *e,
                                   const int *tokens, int rows)
{
    for (int i = 0; i < rows; i++)
        dlm__matrix_row(ctx, x + (size_t)i * (size_t)e->cols, e, tokens[i]);
}

static void dlm__embedding_backward(dlm_ctx *ctx, float *de, const float *dx,
                                    const int *tokens, int rows, int C)
{
    dlm__column_sum c = { ctx, de, dx, (size_t)C, NULL, 0, NULL, tokens, rows, 1, C };
    dlm__column_sum_run(&c);
}

/* --[ residual ]--------------------------------------------------------------
     y_i += b + x_row(i)              dx_row(i) += dy_i, which is done in place
   b is the bias of the linear layer that wrote y: its gradient is as above. */
typedef struct dlm__residual {
    dlm_ctx     *ctx;
    float       *y;                 /* (n, C)                                      */
    const float *bias;              /* (C); NULL: none                             */
    const float *x;                 /* (.., C)                                     */
    const int   *rows;              /* (n) which of x; NULL: the same              */
    int          C;
} dlm__residual;

static void dlm__residual_rows(void *arg, int first, int end)
{
    const dlm__residual *a = (const dlm__residual *)arg;
    const dlm__kernels *k = a->ctx->k;
    for (int i = first; i < end; i++) {
        float *y_i = a->y + (size_t)i * (size_t)a->C;
        if (a->bias) k->add(y_i, a->bias, a->C);
        k->add(y_i, a->x + (size_t)(a->rows ? a->rows[i] : i) * (size_t)a->C, a->C);
    }
}

static void dlm__add_residual(dlm_ctx *ctx, float *y, const float *bias, const float *x,
                              const int *rows, int n, int C)
{
    dlm__residual a;
    a.ctx = ctx; a.y = y; a.bias = bias; a.x = x; a.rows = rows; a.C = C;
    dlm__for_rows(ctx, n, 2.0 * C, dlm__residual_rows, &a);
}

/* --[ rmsnorm ]---------------------------------------------------------------
     y_i = x_i r g_i                  r = 1 / sqrt(mean_j x_j^2 + eps), kept
   Backward, with dr/dx_j = -r^3 x_j / n and s = sum_j dy_j g_j x_j:
     dg_i += dy_i x_i r               dx_i += r g_i dy_i - r^3 x_i s / n
   (Zhang and Sennrich 2019.) */
typedef struct dlm__norm {
    dlm_ctx *ctx;
    float *y, *x, *r;               /* (rows, n), (rows, n), (rows)                */
    const float *g;                 /* (n)                                         */
    const float *dy;                /* (rows, n)                                   */
    float *dx;                      /* (rows, n); NULL: forward                    */
    int n;
    float eps;
} dlm__norm;

static void dlm__norm_rows(void *arg, int first, int end)
{
    const dlm__norm *m = (const dlm__norm *)arg;
    const dlm__kernels *k = m->ctx->k;
    for (int i = first; i < end; i++) {
        const size_t at = (size_t)i * (size_t)m->n;
        if (m->dx)
            k->rmsnorm_backward(m->dx + at, m->dy + at, m->x + at, m->g, m->r[i], m->n);
        else
            m->r[i] = k->rmsnorm(m->y + at, m->x + at, m->g, m->n, m->eps);
    }
}

static void dlm__norm_forward(dlm__norm *m, int rows)
{
    dlm__for_rows(m->ctx, rows, 6.0 * m->n, dlm__norm_rows, m);
}

static void dlm__norm_backward(dlm__norm *m, float *dg, int rows)
{
    const size_t ld = (size_t)m->n;
    dlm__column_sum c = { m->ctx, dg, m->dy, ld, m->x, ld, m->r, NULL, rows, 1, m->n };
    dlm__column_sum_run(&c);
    dlm__for_rows(m->ctx, rows, 8.0 * m->n, dlm__norm_rows, m);
}

/* --[ heads ]-----------------------------------------------------------------
   What happens to queries and keys between the linear layer and attention, per head:
     z = x + bias        u = QK-norm(z) with one g (D) for all heads      y = rope(u)
   rope turns the pair (u_i, u_{i+D/2}) by the angle position * theta^(-2i/D).
   Forward keeps z (pre) and the norms' r; without QK-norm nothing is kept.
   Backward turns back, then the rmsnorm backward; dbias and dg sum over rows. */
typedef struct dlm__heads {
    dlm_ctx *ctx;
    float *x; size_t ldx;           /* (rows, heads, D) in place, rows ldx apart   */
    float *pre, *r;                 /* (rows, heads, D), (rows, heads); with norm  */
    const float *bias, *g;          /* (heads*D), (D); NULL: none                  */
    const float *cos_sin;           /* (positions, D)                              */
    const int *positions;           /* (rows)                                      */
    int heads, D;
    float eps;
} dlm__heads;

static void dlm__heads_rows(void *arg, int first, int end)
{
    const dlm__heads *q = (const dlm__heads *)arg;
    const dlm__kernels *k = q->ctx->k;
    const int D = q->D, n = q->heads * D;
    for (int i = first; i < end; i++) {
        float *x_i = q->x + (size_t)i * q->ldx, *pre_i = q->pre + (size_t)i * (size_t)n;
        const float *turn = q->cos_sin + (size_t)q->positions[i] * (size_t)D;
        if (q->bias) k->add(x_i, q->bias, n);
        if (q->g) memcpy(pre_i, x_i, (size_t)n * sizeof *x_i);
        for (int h = 0; h < q->heads; h++) {
            float *x_ih = x_i + h * D;
            if (q->g)
                q->r[i * q->heads + h] = k->rmsnorm(x_ih, pre_i + h * D, q->g, D, q->eps);
            k->rope(x_ih, turn, D / 2, 1.0f);
        }
    }
}

static void dlm__heads_forward(dlm__heads *q, int rows)
{
    dlm__for_rows(q->ctx, rows, 10.0 * q->heads * q->D, dlm__heads_rows, q);
}

static void dlm__heads_turn_back(void *arg, int first, int end)
{
    const dlm__heads *q = (const dlm__heads *)arg;
    for (int i = first; i < end; i++) {
        float *dx_i = q->x + (size_t)i * q->ldx;
        const float *turn = q->cos_sin + (size_t)q->positions[i] * (size_t)q->D;
        for (int h = 0; h < q->heads; h++)
            q->ctx->k->rope(dx_i + h * q->D, turn, q->D / 2, -1.0f);
    }
}

static void dlm__heads_unnorm(void *arg, int first, int end)
{
    const dlm__heads *q = (const dlm__heads *)arg;
    const int D = q->D;
    float du[DLM__MAX_D];
    for (int i = first; i < end; i++)
        for (int h = 0; h < q->heads; h++) {
            const size_t at = (size_t)i * (size_t)q->heads + (size_t)h;
            float *dx_ih = q->x + (size_t)i * q->ldx + h * D;
            memcpy(du, dx_ih, (size_t)D * sizeof *du);
            memset(dx_ih, 0, (size_t)D * sizeof *du);
            q->ctx->k->rmsnorm_backward(dx_ih, du, q->pre + at * (size_t)D, q->g,
                                        q->r[at], D);
        }
}

/* q->x holds the gradient, in place; dg (D) and dbias (heads*D) may be NULL. */
static void dlm__heads_backward(dlm__heads *q, float *dg, float *dbias, int rows)
{
    const int n = q->heads * q->D;
    dlm__for_rows(q->ctx, rows, 4.0 * n, dlm__heads_turn_back, q);
    if (dg) {
        dlm__column_sum c = { q->ctx, dg, q->x, q->ldx, q->pre, (size_t)n, q->r, NULL,
                              rows, q->heads, q->D };
        dlm__column_sum_run(&c);
        dlm__for_rows(q->ctx, rows, 8.0 * n, dlm__heads_unnorm, q);
    }
    dlm__bias_backward(q->ctx, dbias, q->x, q->ldx, rows, n);
}

/* --[ mlp ]-------------------------------------------------------------------
     y = silu(gate) up                silu(z) = z s(z), s(z) = 1 / (1 + e^-z)
     dup = dy silu(gate)              dgate = dy up s (1 + z (1 - s))
   gate and up are the halves of one row gu (2F).  (Shazeer 2020.)  Ungated, gu (F) is up,
   and with s = s(u), u = 2 sqrt(2/pi) (z + 0.044715 z^3),
     z = up + bias, kept in gu        y = gelu(z) = z (1 + tanh(u/2)) / 2 = z s
     dz = dy s (1 + z (1 - s) du/dz)  dbias += sum_i dz_i
   (the tanh form of Hendrycks and Gimpel 2016). */
typedef struct dlm__mlp {
    dlm_ctx *ctx;
    float *y_or_dy;                 /* (rows, F) out; backward: in                 */
    float *gu, *dgu;                /* (rows, 2F or F); dgu NULL: forward          */
    const float *bias;              /* (F); NULL: gated                            */
    int F;
} dlm__mlp;

static void dlm__mlp_rows(void *arg, int first, int end)
{
    const dlm__mlp *s = (const dlm__mlp *)arg;
    const dlm__kernels *k = s->ctx->k;
    const size_t F = (size_t)s->F, width = s->bias ? F : 2 * F;
    for (int i = first; i < end; i++) {
        float *gu = s->gu + (size_t)i * width, *y_i = s->y_or_dy + (size_t)i * F;
        float *dgu = s->dgu ? s->dgu + (size_t)i * width : NULL;
        if (s->bias && dgu) {
            k->gelu_backward(dgu, y_i, gu, s->F);
        } else if (s->bias) {
            k->add(gu, s->bias, s->F);
            k->gelu(y_i, gu, s->F);
        } else if (dgu) {
            k->swiglu_backward(dgu, dgu + F, y_i, gu, gu + F, s->F);
        } else {
            k->swiglu(y_i, gu, gu + F, s->F);
        }
    }
}

static void dlm__mlp_run(dlm_ctx *ctx, float *y_or_dy, float *gu, float *dgu,
                         const float *bias, int rows, int F)
{
    dlm__mlp s;
    s.ctx = ctx; s.y_or_dy = y_or_dy; s.gu = gu; s.dgu = dgu; s.bias = bias; s.F = F;
    dlm__for_rows(ctx, rows, 30.0 * F, dlm__mlp_rows, &s);
}

/* --[ cross-entropy ]---------------------------------------------------------
     loss = log sum_v e^z_v - z_target          dz_v = w (softmax(z)_v - [v = target]) */

/* The first place of the largest entry, V - 1 if none equals it: whole runs without it
   are passed a vector at a time. */
static int dlm__argmax(const dlm__kernels *k, const float *x, int V, float max)
{
    const int run = 512;
    int at = 0;
    while (V - at > run && !(k->max(x + at, run) == max)) at += run;
    while (at < V - 1 && !(x[at] == max)) at++;
    return at;
}

DLM_API double dlm_log_sum_exp(dlm_ctx *ctx, const float *logits, int V, int *argmax)
{
    const float max = ctx->k->max(logits, V);
    const float shift = max > -INFINITY ? max : 0.0f;
    if (argmax) *argmax = dlm__argmax(ctx->k, logits, V, max);
    return (double)shift + log(ctx->k->sum_exp(logits, V, shift, NULL));
}

DLM_API double dlm_cross_entropy(dlm_ctx *ctx, float *logits, int V, int target,
                                 double weight)
{
    const float max = ctx->k->max(logits, V);
    const double sum = ctx->k->sum_exp(logits, V, max, NULL);
    const double loss = (double)max + log(sum) - (double)logits[target];
    ctx->k->exp_scaled(logits, logits, V, max, (float)(weight / sum));
    logits[target] -= (float)weight;
    return loss;
}

/* ==[ attention ]=============================================================
     s_ij = q_i . k_j / sqrt(D)     p_ij = e^(s_ij - lse_i)     o_i = sum_j p_ij v_j
   over the keys j in the two ranges of row i; lse_i = log sum_j e^s_ij is kept, p is
   not.  One job is one sequence and one key/value head.  The queries that share that
   head become the lanes of a tile, (row, head in group) in order, and keys pass by in
   chunks of 96 at fixed places; a running maximum and sum make the softmax exact
   (Milakov and Gimelshein 2018; Dao et al. 2022).  Keys that a lane does not see get
   s = -INFINITY, hence p = 0 and no effect on any sum: what a row computes depends on
   its own keys only, not on the rest of its tile. */

/* Keys stand in panels of mr slots, [slot / mr][D][mr], ready to be the tile's a. */
typedef struct dlm__attention {
    dlm_ctx *ctx;
    int H, KV, D;
    int n_seqs;
    const int *start;               /* (S+1) query rows of each sequence           */
    const dlm_keys *keys;           /* (query rows)                                */
    const float *q;                 /* (query rows, H*D)                           */
    float *o, *lse;                 /* (query rows, H*D), (query rows, H)          */
    const float *k_panels;          /* (KV, pad_total, D) as panels                */
    const int *k_base;              /* (S) slot 0 of each sequence, multiple of 96 */
    int pad_total;
    const float *v; size_t ldv;     /* value rows: (.., KV*D), ldv apart           */
    const int *v_base;              /* (S) row of slot 0                           */
    /* backward only */
    const float *d_o;               /* (query rows, H*D)                           */
    float *dq;                      /* (query rows, H*D) overwritten               */
    const float *k; size_t ldk;     /* key rows, same base as v                    */
    float *dk, *dv; size_t lddk;    /* overwritten, same base as v                 */
    const float *v_panels;          /* as k_panels                                 */
    float *dkv_columns;             /* (KV, pad_total, 2 D) scratch                */
    const int *n_slots;             /* (S)                                         */
} dlm__attention;

/* The queries of one tile. */
typedef struct dlm__lanes {
    int n, width;                   /* lanes in use; computed: one vector or nr    */
    size_t at[DLM__MAX_NR];         /* which of all (rows, H) each is              */
    dlm_keys keys[DLM__MAX_NR];
    dlm_keys hull;                  /* the union of each range over the lanes      */
} dlm__lanes;

/* Lanes first .. of sequence seq and key/value head kv; 0 if there are none. */
static int dlm__lanes_take(dlm__lanes *l, const dlm__attention *a, int seq, int kv,
                           int first)
{
    const int G = a->H / a->KV, nr = a->ctx->k->nr;
    dlm_keys *hull = &l->hull;
    l->n = dlm__min(nr, (a->start[seq + 1] - a->start[seq]) * G - first);
    l->width = l->n <= a->ctx->k->vw ? a->ctx->k->vw : nr;
    for (int i = 0; i < l->n; i++) {
        dlm_keys *k = &l->keys[i];
        const int row = a->start[seq] + (first + i) / G;
        l->at[i] = (size_t)row * (size_t)a->H + (size_t)(kv * G + (first + i) % G);
        *k = a->keys[row];
        if (k->lo1 >= k->hi1) k->lo1 = k->hi1 = k->hi0;
        if (i == 0) *hull = *k;
        hull->lo0 = dlm__min(hull->lo0, k->lo0);
        hull->hi0 = dlm__max(hull->hi0, k->hi0);
        if (k->lo1 == k->hi1) continue;
        hull->lo1 = hull->lo1 == hull->hi1 ? k->lo1 : dlm__min(hull->lo1, k->lo1);
        hull->hi1 = dlm__max(hull->hi1, k->hi1);
    }
    return l->n > 0;
}

/* The slots [*from, *to) that some lane may see, of the first chunk from *chunk on that
   has any; 0 if there is none. */
static int dlm__lanes_span(const dlm__lanes *l, int *chunk, int *from, int *to)
{
    for (; *chunk < dlm__max(l->hull.hi0, l->hull.hi1); *chunk += DLM__CHUNK) {
        const int end = *chunk + DLM__CHUNK;
        const int a0 = dlm__max(l->hull.lo0, *chunk), b0 = dlm__min(l->hull.hi0, end);
        const int a1 = dlm__max(l->hull.lo1, *chunk), b1 = dlm__min(l->hull.hi1, end);
        *from = a0 >= b0 ? a1 : a1 >= b1 ? a0 : dlm__min(a0, a1);
        *to = a0 >= b0 ? b1 : a1 >= b1 ? b0 : dlm__max(b0, b1);
        if (a0 < b0 || a1 < b1) return 1;
    }
    return 0;
}

static void dlm__hide(float *s, int by, int chunk, int from, int to)
{
    for (int j = from; j < to; j++) s[(j - chunk) * by] = -INFINITY;
}

/* The score of slot j and lane i, s[i * by_lane + (j - chunk) * by_slot], = -INFINITY for
   the slots in [from, to) that the lane must not see. */
static void dlm__lanes_mask(const dlm__lanes *l, float *s, int by_lane, int by_slot,
                            int chunk, int from, int to)
{
    for (int i = 0; i < l->n; i++) {
        const dlm_keys *k = &l->keys[i];
        if (k->lo0 <= from && k->hi0 >= to) continue;
        if (k->lo1 <= from && k->hi1 >= to) continue;
        float *s_i = s + i * by_lane;
        dlm__hide(s_i, by_slot, chunk, from, dlm__min(to, k->lo0));
        dlm__hide(s_i, by_slot, chunk, dlm__max(from, k->hi0), dlm__min(to, k->lo1));
        dlm__hide(s_i, by_slot, chunk, dlm__max(from, k->hi1), to);
    }
}

/* Where slot 0 of a sequence and key/value head is in (KV, pad_total, D). */
static size_t dlm__head_at(const dlm__attention *a, int seq, int kv)
{
    return ((size_t)kv * (size_t)a->pad_total + (size_t)a->k_base[seq]) * (size_t)a->D;
}

/* out[i * by_lane + d * by_d] = scale * x[row of lane i][head of lane i][d]. */
static void dlm__lanes_gather(const dlm__lanes *l, float *out, int by_lane, int by_d,
                              const float *x, int D, float scale)
{
    for (int i = 0; i < l->n; i++) {
        const float *x_i = x + l->at[i] * (size_t)D;
        for (int d = 0; d < D; d++) out[i * by_lane + d * by_d] = scale * x_i[d];
    }
}

/* s[slot - chunk][lane] for the panels that hold slots [from, to): keys (or values) in
   panels times x [D][nr]. */
static void dlm__lanes_scores(const dlm__attention *a, const dlm__lanes *l, float *s,
                              const float *panels, const float *x, int chunk, int from,
                              int to)
{
    const dlm__kernels *k = a->ctx->k;
    for (int j = (from - chunk) / k->mr * k->mr; j < to - chunk; j += k->mr)
        k->tile[DLM__WORD_F32](s + j * k->nr, k->nr,
                               dlm__side_of(panels + (size_t)(chunk + j)
                                                     * (size_t)a->D, 1, (size_t)k->mr),
                               x, k->nr, k->mr, l->width, a->D, 0);
}

/* out [D][nr] += sum over slots [from, to) of rows[slot][d] * p[slot - chunk][lane]. */
static void dlm__lanes_mix(const dlm__attention *a, const dlm__lanes *l, float *out,
                           const float *rows, size_t ld, const float *p, int chunk,
                           int from, int to)
{
    const dlm__kernels *k = a->ctx->k;
    for (int d = 0; d < a->D; d += k->mr)
        k->tile[DLM__WORD_F32](out + d * k->nr, k->nr,
                               dlm__side_of(rows + (size_t)from * ld + (size_t)d, 1, ld),
                               p + (from - chunk) * k->nr, k->nr,
                               dlm__min(k->mr, a->D - d), l->width, to - from, 1);
}

/* The output of every lane from its weighted sum and the sum of its weights. */
static void dlm__lanes_finish(const dlm__attention *a, const dlm__lanes *l,
                              const float *o, int by_lane, int by_d, const float *max,
                              const float *sum)
{
    for (int i = 0; i < l->n; i++) {
        const size_t at = l->at[i];
        float *o_i = a->o + at * (size_t)a->D;
        const float scale = 1.0f / sum[i];
        for (int d = 0; d < a->D; d++) o_i[d] = o[i * by_lane + d * by_d] * scale;
        a->lse[at] = max[i] + logf(sum[i]);
    }
}

/* panels, v: keys and values of the sequence and head, from slot 0.  Lanes that would
   leave most of a tile empty, one token that is decoded, say, have rows [lane][d] and
   [lane][slot] instead of tiles [d][nr] and [slot][nr], and kernels of their own. */
static void dlm__attention_lanes(const dlm__attention *a, const dlm__lanes *l,
                                 const float *panels, const float *v)
{
    const dlm__kernels *k = a->ctx->k;
    const int few = 4 * l->n <= k->vw, D = a->D, lanes = few ? DLM__FEW_LANES : k->nr;
    const int by_lane = few ? DLM__MAX_D : 1, by_d = few ? 1 : k->nr;
    const int ld = few ? DLM__FEW_LD : 1;
    float q[DLM__MAX_D * DLM__MAX_NR], o[DLM__MAX_D * DLM__MAX_NR];
    float s[DLM__CHUNK * DLM__MAX_NR];
    float max[DLM__MAX_NR], sum[DLM__MAX_NR], rescale[DLM__MAX_NR];
    int from = 0, to = 0;
    for (int i = 0; i < (few ? lanes : 1); i++) {
        memset(q + i * by_lane, 0, (size_t)(D * by_d) * sizeof *q);
        memset(o + i * by_lane, 0, (size_t)(D * by_d) * sizeof *o);
    }
    for (int i = 0; i < lanes; i++) max[i] = -FLT_MAX, sum[i] = 0.0f, rescale[i] = 0.0f;
    dlm__lanes_gather(l, q, by_lane, by_d, a->q, D, 1.0f / sqrtf((float)D));
    for (int chunk = 0; dlm__lanes_span(l, &chunk, &from, &to); chunk += DLM__CHUNK) {
        const int n = to - from, first = (from - chunk) / k->mr * k->mr;
        float *s_from = s + (from - chunk) * by_d;
        if (few)
            k->few_scores(s + first, ld, panels + (size_t)(chunk + first) * (size_t)D,
                          dlm__ceil_div(to - chunk - first, k->mr), q, D);
        else
            dlm__lanes_scores(a, l, s, panels, q, chunk, from, to);
        dlm__lanes_mask(l, s, ld, by_d, chunk, from, to);
        if (few) {
            k->few_softmax(s_from, ld, l->n, n, max, rescale);
            k->few_mix(o, sum, rescale, D, v + (size_t)from * a->ldv, a->ldv, s_from, ld,
                       n);
        } else {
            k->softmax_tile(s_from, n, l->width, max, sum, rescale);
            k->scale_tile(o, D, l->width, rescale);
            dlm__lanes_mix(a, l, o, v, a->ldv, s, chunk, from, to);
        }
    }
    dlm__lanes_finish(a, l, o, by_lane, by_d, max, sum);
}

static void dlm__attention_job(void *arg, int job)
{
    const dlm__attention *a = (const dlm__attention *)arg;
    const int seq = job / a->KV, kv = job % a->KV;
    const float *v = a->v + (size_t)a->v_base[seq] * a->ldv + (size_t)(kv * a->D);
    dlm__lanes l;
    for (int first = 0; dlm__lanes_take(&l, a, seq, kv, first); first += a->ctx->k->nr)
        dlm__attention_lanes(a, &l, a->k_panels + dlm__head_at(a, seq, kv), v);
}

/* Keys seen by all queries, for the cost estimate. */
static double dlm__keys_seen(const dlm_keys *keys, int rows)
{
    double n = 0.0;
    for (int i = 0; i < rows; i++)
        n += (keys[i].hi0 - keys[i].lo0) + dlm__max(0, keys[i].hi1 - keys[i].lo1);
    return n;
}

static void dlm__attention_forward(dlm__attention *a)
{
    const double seen = dlm__keys_seen(a->keys, a->start[a->n_seqs]);
    dlm__parallel(a->ctx, a->n_seqs * a->KV, 4.0 * a->D * a->H * seen,
                  dlm__attention_job, a);
}

/* Backward, with delta_i = do_i . o_i (= sum_j p_ij dp_ij), the chunks again:
     p_ij = e^(s_ij - lse_i)        dv_j += p_ij do_i         dp_ij = do_i . v_j
     ds_ij = p_ij (dp_ij - delta_i)
     dq_i = sum_j ds_ij k_j / sqrt(D)         dk_j += ds_ij q_i / sqrt(D)
   dk and dv are summed as columns [D][slot], so that p and ds, turned over, are the
   tile's b; one job owns all of them for its sequence and head. */

/* columns [D][ld] at slots [from, to) += sum over lanes of rows[lane][d] * p[lane][j]. */
static void dlm__lanes_spread(const dlm__attention *a, const dlm__lanes *l,
                              float *columns, int ld, const float *rows, const float *p,
                              int slots)
{
    const dlm__kernels *k = a->ctx->k;
    for (int d = 0; d < a->D; d += k->mr)
        for (int j = 0; j < slots; j += k->nr)
            k->tile[DLM__WORD_F32](columns + (size_t)d * (size_t)ld + (size_t)j, ld,
                                   dlm__side_of(rows + d, 1, (size_t)a->D), p + j,
                                   DLM__CHUNK, dlm__min(k->mr, a->D - d),
                                   dlm__min(k->nr, slots - j), l->n, 1);
}

typedef struct dlm__lanes_back {    /* one tile's gradient work space              */
    float q[DLM__MAX_D * DLM__MAX_NR];        /* [D][nr] scaled queries            */
    float d_o[DLM__MAX_D * DLM__MAX_NR];      /* [D][nr]                           */
    float dq[DLM__MAX_D * DLM__MAX_NR];       /* [D][nr]                           */
    float q_rows[DLM__MAX_D * DLM__MAX_NR];   /* [lane][D]                         */
    float do_rows[DLM__MAX_D * DLM__MAX_NR];  /* [lane][D]                         */
    float s[DLM__CHUNK * DLM__MAX_NR];        /* [slot][nr]                        */
    float ds[DLM__CHUNK * DLM__MAX_NR];
    float turned[DLM__CHUNK * DLM__MAX_NR];   /* [lane][slot]                      */
    float lse[DLM__MAX_NR], delta[DLM__MAX_NR];
} dlm__lanes_back;

static void dlm__lanes_back_begin(const dlm__attention *a, const dlm__lanes *l,
                                  dlm__lanes_back *w)
{
    const int nr = a->ctx->k->nr, D = a->D;
    const float scale = 1.0f / sqrtf((float)D);
    memset(w->q, 0, (size_t)(D * nr) * sizeof *w->q);
    memset(w->d_o, 0, (size_t)(D * nr) * sizeof *w->d_o);
    dlm__lanes_gather(l, w->q, 1, nr, a->q, D, scale);
    dlm__lanes_gather(l, w->d_o, 1, nr, a->d_o, D, 1.0f);
    memset(w->dq, 0, (size_t)(D * nr) * sizeof *w->dq);
    memset(w->lse, 0, sizeof w->lse);
    memset(w->delta, 0, sizeof w->delta);
    for (int i = 0; i < l->n; i++) {
        const size_t at = l->at[i];
        const float *d_o = a->d_o + at * (size_t)D;
        for (int d = 0; d < D; d++) w->q_rows[i * D + d] = w->q[d * nr + i];
        memcpy(w->do_rows + i * D, d_o, (size_t)D * sizeof *d_o);
        w->lse[i] = a->lse[at];
        w->delta[i] = a->ctx->k->dot(d_o, a->o + at * (size_t)D, D);
    }
}

static void dlm__attention_tile_backward(const dlm__attention *a, const dlm__lanes *l,
                                         int seq, int kv, dlm__lanes_back *w)
{
    const dlm__kernels *k = a->ctx->k;
    const int nr = k->nr, D = a->D;
    const size_t head = dlm__head_at(a, seq, kv);
    const float *k_rows = a->k + (size_t)a->v_base[seq] * a->ldk + (size_t)(kv * D);
    const int ld = dlm__round_up(a->n_slots[seq], DLM__CHUNK);
    float *dk = a->dkv_columns + 2 * head, *dv = dk + (size_t)D * (size_t)ld;
    int from = 0, to = 0;
    dlm__lanes_back_begin(a, l, w);
    for (int chunk = 0; dlm__lanes_span(l, &chunk, &from, &to); chunk += DLM__CHUNK) {
        const int at = (from - chunk) * nr, n = to - from;
        dlm__lanes_scores(a, l, w->s, a->k_panels + head, w->q, chunk, from, to);
        dlm__lanes_mask(l, w->s, 1, nr, chunk, from, to);
        dlm__lanes_scores(a, l, w->ds, a->v_panels + head, w->d_o, chunk, from, to);
        k->softmax_tile_backward(w->s + at, w->ds + at, n, l->width, w->lse, w->delta);
        dlm__lanes_mix(a, l, w->dq, k_rows, a->ldk, w->ds, chunk, from, to);
        dlm__transpose(w->turned, DLM__CHUNK, w->ds + at, (size_t)nr, n, l->n);
        dlm__lanes_spread(a, l, dk + from, ld, w->q_rows, w->turned, n);
        dlm__transpose(w->turned, DLM__CHUNK, w->s + at, (size_t)nr, n, l->n);
        dlm__lanes_spread(a, l, dv + from, ld, w->do_rows, w->turned, n);
    }
    for (int i = 0; i < l->n; i++) {
        const size_t at = l->at[i];
        float *dq_i = a->dq + at * (size_t)D;
        for (int d = 0; d < D; d++) dq_i[d] = w->dq[d * nr + i] / sqrtf((float)D);
    }
}

static void dlm__attention_backward_job(void *arg, int job)
{
    const dlm__attention *a = (const dlm__attention *)arg;
    const int seq = job / a->KV, kv = job % a->KV, D = a->D;
    const int ld = dlm__round_up(a->n_slots[seq], DLM__CHUNK);
    const size_t at = (size_t)a->v_base[seq] * a->lddk + (size_t)(kv * D);
    float *dk = a->dkv_columns + 2 * dlm__head_at(a, seq, kv);
    float *dv = dk + (size_t)D * (size_t)ld;
    dlm__lanes l;
    dlm__lanes_back w;
    memset(dk, 0, 2 * (size_t)D * (size_t)ld * sizeof *dk);
    memset(w.turned, 0, sizeof w.turned);   /* tiles read past the slots they write */
    for (int first = 0; dlm__lanes_take(&l, a, seq, kv, first); first += a->ctx->k->nr)
        dlm__attention_tile_backward(a, &l, seq, kv, &w);
    dlm__transpose(a->dk + at, a->lddk, dk, (size_t)ld, D, a->n_slots[seq]);
    dlm__transpose(a->dv + at, a->lddk, dv, (size_t)ld, D, a->n_slots[seq]);
}

static void dlm__attention_backward(dlm__attention *a)
{
    const double seen = dlm__keys_seen(a->keys, a->start[a->n_seqs]);
    /* What is not in proportion to them, too, is worth a hand-over: whole columns. */
    dlm__parallel(a->ctx, a->n_seqs * a->KV,
                  10.0 * a->D * a->H * seen + 2.0 * (int)DLM__HAND_OVER,
                  dlm__attention_backward_job, a);
}

/* ==[ config ]================================================================
   Defaults and checks of a dlm_config.  After this section a config is complete and
   its sizes do not overflow. */

static size_t dlm__count_params(const dlm_config *c);

/* Defaults that depend on other fields. */
static void dlm__config_defaults(dlm_config *c)
{
    if (c->kv_heads == 0) c->kv_heads = c->heads;
    if (c->head_dim == 0 && c->heads > 0) c->head_dim = c->dim / c->heads;
    if (c->ffn == 0 && c->dim > 0 && c->dim <= 65536)
        c->ffn = dlm__round_up(8 * c->dim / 3, 32);
    if (c->mask_id == 0 && c->mask_is_0 == 0 && c->vocab > 0) c->mask_id = c->vocab - 1;
    if (c->pattern == DLM_PATTERN_CAUSAL) c->shifted = 1;
}

/* In this order: defaults that depend on other fields, the table's own and its ranges,
   then what fields ask of each other.  cfg is written only when all of it holds. */
DLM_API dlm_error dlm_config_resolve(dlm_ctx *ctx, dlm_config *cfg)
{
    dlm_config c = *cfg;
    dlm_error e;
    dlm__config_defaults(&c);
    e = dlm__resolve(ctx, "", dlm__config_options, &c);
    if (e == DLM_OK)        /* vocab: no token, a mark on the canvas of a causal model */
        e = dlm__in_range(ctx, "mask_id", c.mask_id, !c.mask_is_0, c.mask_is_0 ? 0
                          : c.vocab - (c.pattern != DLM_PATTERN_CAUSAL));
    if (e != DLM_OK) return e;
    if (c.heads % c.kv_heads != 0)
        return dlm__fail(ctx, DLM_E_CONFIG, "kv_heads: %d does not divide heads = %d",
                         c.kv_heads, c.heads);
    if (c.head_dim % 2 != 0)
        return dlm__fail(ctx, DLM_E_CONFIG, "head_dim: %d is odd; rotary turns pairs",
                         c.head_dim);
    if (dlm__count_params(&c) == 0)
        return dlm__fail(ctx, DLM_E_CONFIG, "the parameters of this config overflow");
    *cfg = c;
    return DLM_OK;
}

/* ==[ parameters ]============================================================
   The one list of weights.  Sizes, places, names, initialisation, decay, files and
   gradient checks all loop over it.  In memory: embedding, every layer in turn, final
   norm, head; wq wk wv and wgate wup are neighbours, so that one matmul serves them. */

typedef struct dlm__layer {                 /* weights, or gradients, of one layer, or */
                                            /* -1: of none, what begins with tok_emb  */
    float *norm1;                           /* (C)                                 */
    float *wq;                              /* (H*D, C)                            */
    float *wk, *wv;                         /* (KV*D, C) each                      */
    float *bq, *bk, *bv;                    /* (H*D), (KV*D), (KV*D); NULL: none   */
    float *qnorm, *knorm;                   /* (D) each; NULL: none                */
    float *wo;                              /* (C, H*D)                            */
    float *norm2;                           /* (C)                                 */
    float *wgate, *wup;                     /* (F, C) each; wup twice: no gate     */
    float *bup;                             /* (F); NULL: gated                    */
    float *wdown;                           /* (C, F)                              */
    float *bdown;                           /* (C); NULL: none                     */
    float *tok_emb;                         /* (V, C)                              */
    float *norm_out;                        /* (C)                                 */
    float *head;                            /* (V, C); tok_emb when tied           */
    float *head_bias;                       /* (V); NULL: none                     */
} dlm__layer;

typedef enum dlm__dim {                     /* KV, GU: of what one matmul serves   */
    DLM__ONE, DLM__V, DLM__C, DLM__HD, DLM__KVD, DLM__D, DLM__F, DLM__KV, DLM__GU
} dlm__dim;
typedef enum dlm__when {
    DLM__ALWAYS, DLM__BIASED, DLM__QK_NORM, DLM__UNTIED, DLM__GATED, DLM__UNGATED,
    DLM__HEAD_BIAS
} dlm__when;
typedef enum dlm__init { DLM__ONES, DLM__ZEROS, DLM__NORMAL, DLM__RESIDUAL } dlm__init;

typedef struct dlm__param {
    const char *name;                       /* after "model.layers.%d." in a layer */
    size_t      offset;                     /* in dlm__layer                       */
    dlm__dim    rows, cols;
    dlm__init   init;
    dlm__when   when;
} dlm__param;

#define DLM__P(name, field, rows, cols, init, when) \
    { name, offsetof(dlm__layer, field), \
      DLM__##rows, DLM__##cols, DLM__##init, DLM__##when }
static const dlm__param dlm__params[] = {       /* all layers after the first, and then */
    DLM__P("model.embed_tokens.weight",       tok_emb, V, C, NORMAL,     ALWAYS),
    DLM__P("input_layernorm.weight",          norm1, C,   ONE, ONES,     ALWAYS),
    DLM__P("self_attn.q_proj.weight",         wq,    HD,  C,   NORMAL,   ALWAYS),
    DLM__P("self_attn.k_proj.weight",         wk,    KVD, C,   NORMAL,   ALWAYS),
    DLM__P("self_attn.v_proj.weight",         wv,    KVD, C,   NORMAL,   ALWAYS),
    DLM__P("self_attn.q_proj.bias",           bq,    HD,  ONE, ZEROS,    BIASED),
    DLM__P("self_attn.k_proj.bias",           bk,    KVD, ONE, ZEROS,    BIASED),
    DLM__P("self_attn.v_proj.bias",           bv,    KVD, ONE, ZEROS,    BIASED),
    DLM__P("self_attn.q_norm.weight",         qnorm, D,   ONE, ONES,     QK_NORM),
    DLM__P("self_attn.k_norm.weight",         knorm, D,   ONE, ONES,     QK_NORM),
    DLM__P("self_attn.o_proj.weight",         wo,    C,   HD,  RESIDUAL, ALWAYS),
    DLM__P("post_attention_layernorm.weight", norm2, C,   ONE, ONES,     ALWAYS),
    DLM__P("mlp.gate_proj.weight",            wgate, F,   C,   NORMAL,   GATED),
    DLM__P("mlp.up_proj.weight",              wup,   F,   C,   NORMAL,   ALWAYS),
    DLM__P("mlp.up_proj.bias",                bup,   F,   ONE, ZEROS,    UNGATED),
    DLM__P("mlp.down_proj.weight",            wdown, C,   F,   RESIDUAL, ALWAYS),
    DLM__P("mlp.down_proj.bias",              bdown, C,   ONE, ZEROS,    UNGATED),
    DLM__P("model.norm.weight",               norm_out, C, ONE, ONES,    ALWAYS),
    DLM__P("lm_head.weight",                  head,  V,   C,   NORMAL,   UNTIED),
    DLM__P("lm_head.bias",                    head_bias, V, ONE, ZEROS,  HEAD_BIAS),
};
#undef DLM__P
enum { DLM__N_PARAMS = sizeof dlm__params / sizeof *dlm__params };

/* 1 when a layer, or none (-1), has the pointer at this offset. */
static int dlm__has(int layer, size_t offset)
{
    return (offset < offsetof(dlm__layer, tok_emb)) == (layer >= 0);
}

static int dlm__dim_of(const dlm_config *c, dlm__dim d)
{
    const int KVD = c->kv_heads * c->head_dim;
    const int sizes[] = { 1, c->vocab, c->dim, c->heads * c->head_dim, KVD, c->head_dim,
                          c->ffn, 2 * KVD, c->gelu_mlp ? c->ffn : 2 * c->ffn };
    return sizes[d];                        /* in the order of dlm__dim            */
}

/* Floats of one parameter; 0 when the config does not have it. */
static size_t dlm__param_size(const dlm_config *c, const dlm__param *p)
{
    const int has[] = { 1, c->qkv_bias, !c->no_qk_norm, c->untied_head, !c->gelu_mlp,
                        c->gelu_mlp, c->head_bias };    /* in the order of dlm__when */
    if (!has[p->when]) return 0;
    return (size_t)dlm__dim_of(c, p->rows) * (size_t)dlm__dim_of(c, p->cols);
}

/* How many parameters a layer has, of so many floats. */
static int dlm__per_layer(const dlm_config *c, size_t *floats)
{
    int n = 0;
    *floats = 0;
    for (int i = 0; i < DLM__N_PARAMS; i++) {
        const size_t size = dlm__param_size(c, &dlm__params[i]);
        if (!dlm__has(0, dlm__params[i].offset)) continue;
        n += size != 0;
        *floats += size;
    }
    return n;
}

/* 0 when the bytes would not fit in a quarter of the address space. */
static size_t dlm__count_params(const dlm_config *c)
{
    double exact = 0.0;
    size_t n = 0;
    for (int i = 0; i < DLM__N_PARAMS; i++) {
        const dlm__param *p = &dlm__params[i];
        const int times = dlm__has(0, p->offset) ? c->layers : 1;
        exact += (double)times * dlm__dim_of(c, p->rows) * dlm__dim_of(c, p->cols);
        n += (size_t)times * dlm__param_size(c, p);
    }
    return exact * sizeof(float) * 4 > (double)SIZE_MAX ? 0 : n;
}

static float **dlm__param_in(dlm__layer *l, const dlm__param *p)
{
    return (float **)(void *)((char *)l + p->offset);
}

/* The weights of a layer (-1: of none) in the flat block at base. */
static dlm__layer dlm__layer_at(const dlm_config *c, float *base, int layer)
{
    dlm__layer l;
    size_t floats;
    (void)dlm__per_layer(c, &floats);
    base += (size_t)dlm__max(layer, 0) * floats;
    for (int i = 0; i < DLM__N_PARAMS; i++) {
        const dlm__param *p = &dlm__params[i];
        const size_t size = dlm__param_size(c, p);
        const int over = layer < 0 && dlm__has(0, p->offset) ? c->layers : 1;
        *dlm__param_in(&l, p) = size && dlm__has(layer, p->offset) ? base : NULL;
        base += (size_t)over * size;
    }
    if (l.wgate == NULL) l.wgate = l.wup;
    if (l.head == NULL) l.head = l.tok_emb;
    return l;
}

DLM_API int dlm_model_tensors(const dlm_model *m)
{
    size_t floats;
    int n = m->config.layers * dlm__per_layer(&m->config, &floats);
    for (int i = 0; i < DLM__N_PARAMS; i++)
        n += dlm__has(-1, dlm__params[i].offset)
            && dlm__param_size(&m->config, &dlm__params[i]) != 0;
    return m->packed ? 0 : n;
}

/* Parameter i of a model: its entry in the table, its layer or -1, the floats before.
   What follows the layers is found behind the last. */
static const dlm__param *dlm__param_at(const dlm_config *c, int i, int *layer, size_t *at)
{
    const int per = dlm__per_layer(c, at), l = dlm__min((i - 1) / per, c->layers - 1);
    const dlm__param *p = dlm__params;
    *at *= (size_t)l;
    for (int left = i - l * per; ; p++) {
        const size_t size = dlm__param_size(c, p);
        *layer = dlm__has(l, p->offset) ? l : -1;
        if (size != 0 && left-- == 0) return p;
        *at += size;
    }
}

DLM_API void dlm_model_tensor(const dlm_model *m, int i, dlm_tensor *out)
{
    const dlm_config *c = &m->config;
    int layer;
    size_t at;
    const dlm__param *p = dlm__param_at(c, i, &layer, &at);
    if (layer < 0) snprintf(out->name, sizeof out->name, "%s", p->name);
    else snprintf(out->name, sizeof out->name, "model.layers.%d.%s", layer, p->name);
    out->data = m->weights + at;
    out->rows = dlm__dim_of(c, p->rows);
    out->cols = dlm__dim_of(c, p->cols);
    out->layer = layer;
    out->decayed = p->init == DLM__NORMAL || p->init == DLM__RESIDUAL;
}

/* normal(0.02), what writes to the residual stream smaller by 1/sqrt(2L) (GPT-2), norms
   1, biases 0.  Number i is the row of the address, 2^16 entries share a position. */
static void dlm__init_weights(dlm_model *m, uint64_t seed)
{
    for (int i = 0; i < dlm_model_tensors(m); i++) {
        dlm_address at = dlm__address(seed, DLM_RANDOM_INIT, 0, (uint32_t)i, 0);
        dlm_tensor t;
        size_t before;
        const dlm__init init = dlm__param_at(&m->config, i, &t.layer, &before)->init;
        const double scale = init == DLM__RESIDUAL ? 0.02 / sqrt(2.0 * m->config.layers)
                                                   : 0.02;
        dlm_model_tensor(m, i, &t);
        for (size_t j = 0; j < (size_t)t.rows * (size_t)t.cols; j++) {
            at.position = (uint32_t)(j >> 16);
            t.data[j] = init == DLM__ONES ? 1.0f : init == DLM__ZEROS ? 0.0f
                : (float)(scale * dlm__normal(&at, (uint32_t)(j & 0xFFFF)));
        }
    }
}

static void dlm__plain_carve(dlm__arena *a, void *object)
{
    dlm_model *m = (dlm_model *)object;
    m->weights = dlm__push_floats(a, m->n_params, 1);
}

/* carve: which form of a model this is; NULL: its weights are the caller's. */
static dlm_error dlm__model_new(dlm_model **out, dlm_ctx *ctx, const dlm_config *cfg,
                                dlm_dtype type, dlm__carve_fn carve, dlm_memory *mem)
{
    dlm_model draft, *m;
    dlm_error e;
    memset(&draft, 0, sizeof draft);
    draft.config = *cfg;
    draft.type = type;
    draft.ctx = ctx;
    e = dlm_config_resolve(ctx, &draft.config);
    if (e == DLM_OK) draft.n_params = dlm__count_params(&draft.config);
    m = (dlm_model *)dlm__make(&e, ctx, "model", carve, &draft, sizeof draft, out != NULL,
                               mem);
    if (out) *out = m;
    return e;
}

DLM_API dlm_error dlm_model_create(dlm_model **out, dlm_ctx *ctx, const dlm_config *cfg,
                                   uint64_t seed, dlm_memory *mem)
{
    dlm_error e = dlm__model_new(out, ctx, cfg, DLM_F32, dlm__plain_carve, mem);
    if (out && *out) dlm__init_weights(*out, seed);
    return e;
}

/* The weights are not ours to free, and const only until they are trained. */
DLM_API dlm_error dlm_model_wrap(dlm_model **out, dlm_ctx *ctx, const dlm_config *cfg,
                                 const float *weights, size_t n_params)
{
    dlm_error e = dlm__model_new(out, ctx, cfg, DLM_F32, NULL, NULL);
    if (e != DLM_OK || out == NULL) return e;
    if ((*out)->n_params != n_params) {
        e = dlm__fail(ctx, DLM_E_MISMATCH, "weights: %.0f floats, the config needs %.0f",
                      (double)n_params, (double)(*out)->n_params);
        dlm_model_free(*out);
        *out = NULL;
        return e;
    }
    (*out)->weights = (float *)(uintptr_t)weights;
    return DLM_OK;
}

DLM_API void dlm_model_free(dlm_model *m) { dlm__unmake(m); }

/* --[ matrices of a model ]---------------------------------------------------
   How a pass sees weights: vectors as they are, everything else as a dlm_matrix, which is
   made on the spot for a plain model and kept by a packed one. */

typedef struct dlm__layer_weights {         /* of a layer, or of none              */
    dlm__layer p;                           /* packed: only the vectors            */
    dlm_matrix q, kv, o, gu, down;          /* kv and gu: two neighbours as one    */
    dlm_matrix embed, head;                 /* (V, C); the same when tied          */
} dlm__layer_weights;

struct dlm__packed {
    const dlm__kernels *k;                  /* whose panels these are              */
    dlm__layer_weights *layers;             /* (1 + L) first what is of none       */
};

static const struct dlm__product {
    size_t   at, from;                      /* in dlm__layer_weights; dlm__layer   */
    dlm__dim rows, cols;
} dlm__products[] = {
    { offsetof(dlm__layer_weights, q), offsetof(dlm__layer, wq), DLM__HD, DLM__C },
    { offsetof(dlm__layer_weights, kv), offsetof(dlm__layer, wk), DLM__KV, DLM__C },
    { offsetof(dlm__layer_weights, o), offsetof(dlm__layer, wo), DLM__C, DLM__HD },
    { offsetof(dlm__layer_weights, gu), offsetof(dlm__layer, wgate), DLM__GU, DLM__C },
    { offsetof(dlm__layer_weights, down), offsetof(dlm__layer, wdown), DLM__C, DLM__F },
    { offsetof(dlm__layer_weights, embed), offsetof(dlm__layer, tok_emb), DLM__V,
      DLM__C },
    { offsetof(dlm__layer_weights, head), offsetof(dlm__layer, head), DLM__V, DLM__C },
};
enum { DLM__N_PRODUCTS = sizeof dlm__products / sizeof *dlm__products };

static dlm_matrix *dlm__product_of(dlm__layer_weights *w, int i)
{
    return (dlm_matrix *)(void *)((char *)w + dlm__products[i].at);
}

/* type: in which a plain model is multiplied; a packed one has its own. */
static dlm__layer_weights dlm__layer_of(const dlm_model *m, int layer, dlm_dtype type)
{
    const dlm_config *c = &m->config;
    dlm__layer_weights w;
    if (m->packed) return m->packed->layers[layer + 1];
    w.p = dlm__layer_at(c, m->weights, layer);
    for (int i = 0; i < DLM__N_PRODUCTS; i++) {
        const struct dlm__product *x = &dlm__products[i];
        *dlm__product_of(&w, i) = dlm__plain(*(float **)((char *)&w.p + x->from),
                                             dlm__dim_of(c, x->rows),
                                             dlm__dim_of(c, x->cols), type);
    }
    return w;
}

static dlm_matrix dlm__matrix_carve(dlm__arena *a, const dlm_model *m, int rows, int cols)
{
    dlm_matrix w = dlm__plain(NULL, rows, cols, m->type);
    w.packed = 1;
    w.data = dlm__push(a, dlm_pack_bytes(m->ctx, m->type, rows, cols), 1);
    return w;
}

/* What a packed model has of a layer: its vectors and then its products, in the order of
   the tables; a tied head is embed itself, so that it is packed and stored once. */
static void dlm__packed_layer_carve(dlm__arena *a, const dlm_model *m, int layer,
                                    dlm__layer_weights *w)
{
    const dlm_config *c = &m->config;
    memset(w, 0, sizeof *w);
    for (int i = 0; i < DLM__N_PARAMS; i++) {
        const dlm__param *p = &dlm__params[i];
        const size_t size = dlm__param_size(c, p);
        if (size > 0 && p->cols == DLM__ONE && dlm__has(layer, p->offset))
            *dlm__param_in(&w->p, p) = dlm__push_floats(a, size, 1);
    }
    for (int i = 0; i < DLM__N_PRODUCTS; i++) {
        const struct dlm__product *x = &dlm__products[i];
        const int tied = x->from == offsetof(dlm__layer, head) && !c->untied_head;
        if (dlm__has(layer, x->from) && !tied)
            *dlm__product_of(w, i) = dlm__matrix_carve(
                a, m, dlm__dim_of(c, x->rows), dlm__dim_of(c, x->cols));
    }
    if (!c->untied_head) w->head = w->embed;
}

/* The carve of a packed model: k says whose panels these are. */
static void dlm__packed_carve(dlm__arena *a, void *object)
{
    dlm_model *m = (dlm_model *)object;
    struct dlm__packed here, *p = (struct dlm__packed *)dlm__push(a, 1, sizeof *p);
    dlm__layer_weights one;
    m->packed = p;
    if (p == NULL) p = &here;               /* only counting                       */
    p->k = m->ctx->k;
    p->layers = (dlm__layer_weights *)dlm__push(a, (size_t)m->config.layers + 1,
                                                sizeof *p->layers);
    for (int l = -1; l < m->config.layers; l++)
        dlm__packed_layer_carve(a, m, l, a->base ? &p->layers[l + 1] : &one);
}

/* A packed model whose matrices are still to be packed. */
static dlm_error dlm__packed_new(dlm_model **out, dlm_ctx *ctx, const dlm_config *cfg,
                                 dlm_dtype type, dlm_memory *mem)
{
    dlm_config c = *cfg;
    dlm_error e = dlm_config_resolve(ctx, &c);
    const int widest = dlm__max(dlm__max(c.dim, c.ffn), c.heads * c.head_dim);
    if (out) *out = NULL;
    if (e == DLM_OK) e = dlm__check_type(ctx, "packed type", type, 1);
    if (e == DLM_OK && type == DLM_I8 && widest > DLM_I8_MOST)
        e = dlm__fail(ctx, DLM_E_CONFIG, "a model in DLM_I8: %d columns are more than %d",
                      widest, DLM_I8_MOST);
    if (e != DLM_OK) return e;
    return dlm__model_new(out, ctx, &c, type, dlm__packed_carve, mem);
}

DLM_API size_t dlm_model_bytes(dlm_ctx *ctx, const dlm_config *cfg, dlm_dtype type,
                               int packed)
{
    dlm_memory mem = { NULL, 0 };
    if (packed) (void)dlm__packed_new(NULL, ctx, cfg, type, &mem);
    else if (type != DLM_F32)
        (void)dlm__fail(ctx, DLM_E_CONFIG, "a plain model: type %d is not DLM_F32",
                        (int)type);
    else (void)dlm__model_new(NULL, ctx, cfg, type, dlm__plain_carve, &mem);
    return mem.size;
}

/* --[ filling ]---------------------------------------------------------------
   Wherever the numbers of a model come from, another model or a file, they are asked for
   by rows and put where they belong: into the flat block, or packed. */

/* n rows of parameter p of a layer (-1: of none), from `first` on; beyond its last row
   those of the next in the table follow.  They are written to out, or lie elsewhere when
   out is NULL; returns where they are.  Runs on any thread. */
typedef const float *(*dlm__rows_fn)(void *from, const dlm__param *p, int layer,
                                     int first, int n, float *out);

typedef struct dlm__filling {
    dlm_model        *m;
    dlm__rows_fn      take;
    void             *from;
    float            *room;                 /* (size) for what is still to be packed, */
    size_t            size;                 /* at least nr rows; NULL: take needs none */
    const dlm__param *p;                    /* in work: of this layer, with those   */
    int               layer;                /* behind it, rows [first, first + n)  */
    int               first, n, cols;
    float            *plain;                /* where all its rows go, or           */
    const dlm_matrix *packed;
} dlm__filling;

static void dlm__fill_job(void *arg, int job)
{
    const dlm__filling *f = (const dlm__filling *)arg;
    const int nr = f->m->ctx->k->nr, at = job * nr, row = f->first + at;
    const int n = dlm__min(nr, f->n - at);
    const size_t cols = (size_t)f->cols;
    float *to = f->plain ? f->plain + (size_t)row * cols
        : f->room ? f->room + (size_t)at * cols : NULL;
    const float *rows = f->take(f->from, f->p, f->layer, row, n, f->room ? to : NULL);
    if (f->packed) dlm__pack_rows(f->m->ctx, f->packed, rows, row, n);
    else if (rows != to) memcpy(to, rows, (size_t)n * cols * sizeof *to);
}

/* All rows of p, or of a product that begins with it, to one of plain and packed. */
static void dlm__fill_rows(dlm__filling *f, int rows, float *plain,
                           const dlm_matrix *packed)
{
    const int nr = f->m->ctx->k->nr;
    int chunk = rows;
    f->plain = plain; f->packed = packed;
    f->cols = dlm__dim_of(&f->m->config, f->p->cols);
    if (packed && f->room) chunk = (int)(f->size / (size_t)f->cols / (size_t)nr) * nr;
    for (f->first = 0; f->first < rows; f->first += chunk) {
        f->n = dlm__min(chunk, rows - f->first);
        dlm__parallel(f->m->ctx, dlm__ceil_div(f->n, nr), 8.0 * f->n * f->cols,
                      dlm__fill_job, f);
    }
}

/* Vectors and what is plain by itself; a matrix is the product that begins with p. */
static void dlm__fill(dlm__filling *f)
{
    const dlm_config *c = &f->m->config;
    for (f->layer = -1; f->layer < c->layers; f->layer++) {
        dlm__layer_weights w = dlm__layer_of(f->m, f->layer, DLM_F32);
        for (int i = 0; i < DLM__N_PARAMS; i++) {
            const dlm__param *p = f->p = &dlm__params[i];
            float *plain = *dlm__param_in(&w.p, p);
            if (!dlm__has(f->layer, p->offset)) continue;
            if (plain && dlm__param_size(c, p) > 0)
                dlm__fill_rows(f, dlm__dim_of(c, p->rows), plain, NULL);
            for (int k = 0; f->m->packed && k < DLM__N_PRODUCTS; k++)
                if (dlm__products[k].from == p->offset
                    && (f->layer >= 0 || dlm__param_size(c, p) > 0))
                    dlm__fill_rows(f, dlm__product_of(&w, k)->rows, NULL,
                                   dlm__product_of(&w, k));
        }
    }
}

/* The rows of a plain model, where they lie: neighbours do. */
static const float *dlm__model_rows(void *from, const dlm__param *p, int layer, int first,
                                    int n, float *out)
{
    const dlm_model *m = (const dlm_model *)from;
    dlm__layer l = dlm__layer_at(&m->config, m->weights, layer);
    const size_t skip = (size_t)first * (size_t)dlm__dim_of(&m->config, p->cols);
    (void)n;
    (void)out;
    return *dlm__param_in(&l, p) + skip;
}

static void dlm__fill_from_model(dlm_model *m, const dlm_model *plain)
{
    dlm__filling f;
    memset(&f, 0, sizeof f);
    f.m = m;
    f.take = dlm__model_rows;
    f.from = (void *)(uintptr_t)plain;
    dlm__fill(&f);
}

static dlm_error dlm__check_kernels(dlm_ctx *ctx, const dlm_model *m)
{
    if (!m->packed || m->packed->k == ctx->k) return DLM_OK;
    return dlm__fail(ctx, DLM_E_MISMATCH, "model: packed for another ISA than %s",
                     dlm_isa_name(ctx->opt.isa));
}

/* For what only a plain model can do. */
static dlm_error dlm__want_plain(dlm_ctx *ctx, const char *what, const dlm_model *m)
{
    if (!m->packed) return DLM_OK;
    return dlm__fail(ctx, DLM_E_CONFIG, "%s: the model is packed, wants the plain one",
                     what);
}

DLM_API dlm_error dlm_model_clone(dlm_model **out, dlm_ctx *ctx, const dlm_model *plain,
                                  dlm_memory *mem)
{
    dlm_error e = dlm__want_plain(ctx, "clone", plain);
    if (out) *out = NULL;
    if (e == DLM_OK)
        e = dlm__model_new(out, ctx, &plain->config, DLM_F32, dlm__plain_carve, mem);
    if (out && *out) dlm__fill_from_model(*out, plain);
    return e;
}

DLM_API dlm_error dlm_model_pack(dlm_model **out, dlm_ctx *ctx, const dlm_model *plain,
                                 dlm_dtype type, dlm_memory *mem)
{
    dlm_error e = dlm__want_plain(ctx, "pack", plain);
    if (out) *out = NULL;
    if (e == DLM_OK) e = dlm__packed_new(out, ctx, &plain->config, type, mem);
    if (out && *out) dlm__fill_from_model(*out, plain);
    return e;
}

DLM_API dlm_error dlm_model_repack(dlm_model *packed, const dlm_model *plain)
{
    dlm_error e = dlm__want_plain(packed->ctx, "repack", plain);
    if (e != DLM_OK) return e;
    if (!packed->packed
        || memcmp(&packed->config, &plain->config, sizeof plain->config) != 0)
        return dlm__fail(packed->ctx, DLM_E_MISMATCH, "repack: these are not the packed "
                         "and the plain form of one config");
    dlm__fill_from_model(packed, plain);
    return DLM_OK;
}

DLM_API size_t dlm_describe(const dlm_model *m, char *out, size_t size)
{
    static const char *const patterns[] = { "block", "full", "causal" };
    const int packed = m->packed != NULL;
    char text[1536];                        /* some thirty lines of at most 35 bytes */
    size_t n = (size_t)snprintf(
        text, sizeof text,
        "form        %s, %s\nparameters  %.0f\nbytes       %.0f\npattern     %s\n",
        packed ? "packed" : "plain",
        m->type == DLM_F32 ? "f32" : m->type == DLM_BF16 ? "bf16" : "int8",
        (double)m->n_params,
        (double)dlm_model_bytes(m->ctx, &m->config, m->type, packed),
        patterns[m->config.pattern]);
    for (const dlm__option *o = dlm__config_options; o->name; o++)
        if (o->offset != offsetof(dlm_config, pattern))
            n += (size_t)snprintf(text + n, sizeof text - n, "%-11s %.*g\n", o->name,
                                  o->real ? 6 : 10, dlm__get_option(o, &m->config));
    n += (size_t)snprintf(text + n, sizeof text - n, "%s", m->origin);
    if (size > 0) snprintf(out, size, "%s", text);
    return n;
}

/* ==[ patterns ]==============================================================
   Key ranges for every row of the usual patterns. */

/* The keys of row i of T; first < block is where the first whole block begins. */
static dlm_keys dlm__keys_of(int i, int T, dlm_pattern pattern, int block, int first)
{
    dlm_keys k;
    int end = T;
    if (pattern == DLM_PATTERN_CAUSAL) end = i + 1;
    if (pattern == DLM_PATTERN_BLOCK)
        end = i < first ? first : first + ((i - first) / block + 1) * block;
    k.lo0 = 0;
    k.hi0 = k.lo1 = k.hi1 = dlm__min(end, T);
    return k;
}

DLM_API void dlm_keys_fill(dlm_keys *keys, int T, dlm_pattern pattern, int block,
                           int offset)
{
    const int first = pattern == DLM_PATTERN_BLOCK ? offset % block : 0;
    block = dlm__min(block, T);                 /* more is the same, and overflows */
    for (int i = 0; i < T; i++) keys[i] = dlm__keys_of(i, T, pattern, block, first);
}

/* ==[ work ]==================================================================
   What a pass needs besides weights.  Training keeps the activations of every layer for
   backward and one cache, filled anew by each layer; a session has one set of
   activations, which every layer overwrites, and keeps keys and values in caches, one
   per layer if they are to outlive the pass. */

typedef struct dlm__acts {          /* Q: query rows, all rows but in the last layer */
    float *x;                       /* (N, C) what enters the layer                */
    float *h1, *r1;                 /* (N, C), (N) norm1                           */
    float *q, *q_pre, *rq;          /* (Q, H*D), the same, (Q, H)                  */
    float *kv, *k_pre, *rk;         /* (N, 2*KV*D), (N, KV*D), (N, KV)             */
    float *o, *lse;                 /* (Q, H*D), (Q, H)                            */
    float *x2, *h2, *r2;            /* (Q, C), (Q, C), (Q) after attention; norm2  */
    float *gu, *act;                /* (Q, 2F or ungated F), (Q, F)                */
} dlm__acts;

typedef struct dlm__cache {
    float *k_panels;                /* (KV, pad_total, D) see dlm__attention       */
    float *v;                       /* (pad_total, KV*D); training: NULL           */
} dlm__cache;

typedef struct dlm__rows {          /* rows of a pass, grouped by sequence         */
    int       n;
    int      *start;                /* (S+1)                                       */
    int      *positions;            /* (n)                                         */
    dlm_keys *keys;                 /* (n)                                         */
} dlm__rows;

typedef struct dlm__work {
    dlm_ctx    *ctx;
    dlm_config  c;
    int         training, seqs, slots, rows, out, cached;             /* limits    */
    dlm_dtype   type;               /* in which a plain model is multiplied        */
    int         chunk;              /* rows of the head at a time                  */
    int         pad_total;          /* slots of all sequences, each rounded to 96  */
    int         turns;              /* positions there can be: max_seq, but no more
                                       than the slots                              */
    float      *cos_sin;            /* (turns, D)                                  */
    dlm__acts  *acts;               /* (training ? L : 1)                          */
    dlm__cache *caches;             /* (cached ? L : 1)                            */
    float      *hq;                 /* (out, C) last layer: the rows of h1 looked at */
    float      *x_out, *hf, *rf;    /* (out, C), (out, C), (out) final norm        */
    float      *logits;             /* (chunk, V)                                  */
    dlm__rows   all, sub;           /* every row; the rows that are looked at      */
    int        *slot;               /* (rows)                                      */
    int        *tokens;             /* (rows) copied, so that backward has them    */
    int        *out_rows;           /* (out)                                       */
    int        *k_base, *v_base, *n_slots;     /* (S) see dlm__attention           */
    int         n_seqs;
    /* training only: gradients; of the last layer dy, dhq have only the rows looked at */
    float *dx, *dy, *dh, *dhq, *dq, *dkv, *d_o, *dgu, *dact, *dhf;
    float *v_panels, *dkv_columns;
} dlm__work;

static void dlm__rows_carve(dlm__arena *a, dlm__rows *r, int n, int seqs)
{
    r->start = dlm__push_ints(a, (size_t)seqs + 1);
    r->positions = dlm__push_ints(a, (size_t)n);
    r->keys = (dlm_keys *)dlm__push(a, (size_t)n, sizeof(dlm_keys));
}

/* norm is 0 or 1: without QK-norm nothing before it has to be kept. */
static void dlm__acts_carve(dlm__arena *a, const dlm__work *w, dlm__acts *t)
{
    const size_t N = (size_t)w->rows, C = (size_t)w->c.dim, F = (size_t)w->c.ffn;
    const size_t H = (size_t)w->c.heads, KV = (size_t)w->c.kv_heads;
    const size_t D = (size_t)w->c.head_dim, norm = !w->c.no_qk_norm;
    t->x = dlm__push_floats(a, N, C);
    t->h1 = dlm__push_floats(a, N, C);
    t->r1 = dlm__push_floats(a, N, 1);
    t->q = dlm__push_floats(a, N, H * D);
    t->q_pre = dlm__push_floats(a, norm * N, H * D);
    t->rq = dlm__push_floats(a, norm * N, H);
    t->kv = dlm__push_floats(a, N, 2 * KV * D);
    t->k_pre = dlm__push_floats(a, norm * N, KV * D);
    t->rk = dlm__push_floats(a, norm * N, KV);
    t->o = dlm__push_floats(a, N, H * D);
    t->lse = dlm__push_floats(a, N, H);
    t->x2 = dlm__push_floats(a, N, C);
    t->h2 = dlm__push_floats(a, N, C);
    t->r2 = dlm__push_floats(a, N, 1);
    t->gu = dlm__push_floats(a, N, (size_t)dlm__dim_of(&w->c, DLM__GU));
    t->act = dlm__push_floats(a, N, F);
}

/* Activations and caches: how many sets there are is what differs, see above. */
static void dlm__layers_carve(dlm__arena *a, dlm__work *w)
{
    const size_t KVD = (size_t)(w->c.kv_heads * w->c.head_dim);
    const int sets = w->training ? w->c.layers : 1, caches = w->cached ? w->c.layers : 1;
    dlm__acts count;
    dlm__cache counted;
    w->acts = (dlm__acts *)dlm__push(a, (size_t)sets, sizeof *w->acts);
    for (int l = 0; l < sets; l++) dlm__acts_carve(a, w, a->base ? &w->acts[l] : &count);
    w->caches = (dlm__cache *)dlm__push(a, (size_t)caches, sizeof *w->caches);
    for (int l = 0; l < caches; l++) {
        dlm__cache *t = a->base ? &w->caches[l] : &counted;
        t->k_panels = dlm__push_floats(a, (size_t)w->pad_total, KVD);
        t->v = w->training ? NULL : dlm__push_floats(a, (size_t)w->pad_total, KVD);
    }
    w->hq = dlm__push_floats(a, (size_t)w->out, (size_t)w->c.dim);
}

/* Gradients of activations, one set for all layers: each is used up by the layer below
   before the next is written. */
static void dlm__training_carve(dlm__arena *a, dlm__work *w)
{
    const size_t N = (size_t)w->rows, C = (size_t)w->c.dim, F = (size_t)w->c.ffn;
    const size_t HD = (size_t)(w->c.heads * w->c.head_dim), out = (size_t)w->out;
    const size_t KVD = (size_t)(w->c.kv_heads * w->c.head_dim);
    w->dx = dlm__push_floats(a, N, C);
    w->dy = dlm__push_floats(a, out, C);
    w->dh = dlm__push_floats(a, N, C);
    w->dhq = dlm__push_floats(a, out, C);
    w->dq = dlm__push_floats(a, N, HD);
    w->dkv = dlm__push_floats(a, N, 2 * KVD);
    w->d_o = dlm__push_floats(a, N, HD);
    w->dgu = dlm__push_floats(a, N, (size_t)dlm__dim_of(&w->c, DLM__GU));
    w->dact = dlm__push_floats(a, N, F);
    w->dhf = dlm__push_floats(a, out, C);
    w->v_panels = dlm__push_floats(a, (size_t)w->pad_total, KVD);
    w->dkv_columns = dlm__push_floats(a, (size_t)w->pad_total, 2 * KVD);
}

/* w's limits, ctx and c are set; everything else is placed here. */
static void dlm__work_carve(dlm__arena *a, dlm__work *w)
{
    const size_t C = (size_t)w->c.dim, out = (size_t)w->out, seqs = (size_t)w->seqs;
    const int by_logits = (1 << 18) / w->c.vocab;        /* 1 MiB, but not few rows */
    w->chunk = dlm__min(w->out, dlm__min(dlm__max(by_logits, 128), 512));
    w->pad_total = w->training
        ? dlm__round_up(w->rows, DLM__CHUNK) + w->seqs * DLM__CHUNK
        : w->seqs * dlm__round_up(w->slots, DLM__CHUNK);
    w->turns = dlm__min(w->c.max_seq, w->slots);
    w->cos_sin = dlm__push_floats(a, (size_t)w->turns, (size_t)w->c.head_dim);
    w->x_out = dlm__push_floats(a, out, C);
    w->hf = dlm__push_floats(a, out, C);
    w->rf = dlm__push_floats(a, out, 1);
    w->logits = dlm__push_floats(a, (size_t)w->chunk, (size_t)w->c.vocab);
    dlm__rows_carve(a, &w->all, w->rows, w->seqs);
    dlm__rows_carve(a, &w->sub, w->out, w->seqs);
    w->slot = dlm__push_ints(a, (size_t)w->rows);
    w->tokens = dlm__push_ints(a, (size_t)w->rows);
    w->out_rows = dlm__push_ints(a, out);
    w->k_base = dlm__push_ints(a, seqs);
    w->v_base = dlm__push_ints(a, seqs);
    w->n_slots = dlm__push_ints(a, seqs);
    dlm__layers_carve(a, w);
    if (w->training) dlm__training_carve(a, w);
}
/* cos and sin of t theta^(-2i/D), the angle of pair i at position t: half a row each. */
static void dlm__fill_cos_sin(const dlm__work *w)
{
    const dlm_config *c = &w->c;
    const int half = c->head_dim / 2;
    for (int t = 0; t < w->turns; t++)
        for (int i = 0; i < half; i++) {
            const double angle = t * pow((double)c->rope_theta,
                                         -2.0 * i / c->head_dim);
            float *row = w->cos_sin + (size_t)t * (size_t)c->head_dim;
            row[i] = (float)cos(angle);
            row[half + i] = (float)sin(angle);
        }
}

/* --[ checking a batch ]------------------------------------------------------  */

/* No two sequences share a cache.  n_slots, which is filled in afterwards, remembers who
   has which lane. */
static dlm_error dlm__check_sequences(const dlm__work *w, const dlm_batch *b)
{
    if (b->n_seqs < 0 || b->n_seqs > w->seqs)
        return dlm__fail(w->ctx, DLM_E_INPUT, "batch: %d sequences, room for %d",
                         b->n_seqs, w->seqs);
    if (b->start[0] != 0)
        return dlm__fail(w->ctx, DLM_E_INPUT, "batch: start[0] is %d, not 0",
                         b->start[0]);
    for (int s = 0; s < w->seqs; s++) w->n_slots[s] = -1;
    for (int s = 0; s < b->n_seqs; s++) {
        const int lane = b->lanes ? b->lanes[s] : s;
        if (b->start[s + 1] < b->start[s] || b->start[s + 1] > w->rows)
            return dlm__fail(w->ctx, DLM_E_INPUT,
                             "batch: start[%d] = %d, wants %d..%d (rows)", s + 1,
                             b->start[s + 1], b->start[s], w->rows);
        if (lane < 0 || lane >= w->seqs)
            return dlm__fail(w->ctx, DLM_E_INPUT, "batch: lanes[%d] = %d, wants 0..%d", s,
                             lane, w->seqs - 1);
        if (w->n_slots[lane] >= 0)
            return dlm__fail(w->ctx, DLM_E_INPUT, "batch: lanes[%d] and lanes[%d] are "
                             "both %d", w->n_slots[lane], s, lane);
        w->n_slots[lane] = s;
    }
    return DLM_OK;
}

/* With the ranges in order and inside the slots, attention needs no check of its own; a
   row that sees nothing would divide by a sum of 0. */
static dlm_error dlm__check_row(const dlm__work *w, int i, int slots)
{
    const dlm_keys *k = &w->all.keys[i];
    const int two = k->lo1 < k->hi1;
    if (w->tokens[i] < 0 || w->tokens[i] >= w->c.vocab)
        return dlm__fail(w->ctx, DLM_E_INPUT, "tokens[%d] = %d is not in 0..%d", i,
                         w->tokens[i], w->c.vocab - 1);
    if (w->slot[i] < 0 || w->slot[i] >= slots)
        return dlm__fail(w->ctx, DLM_E_INPUT, "slot of row %d: %d is not in 0..%d", i,
                         w->slot[i], slots - 1);
    if (w->all.positions[i] < 0 || w->all.positions[i] >= w->turns)
        return dlm__fail(w->ctx, DLM_E_INPUT, "position of row %d: %d is not in 0..%d", i,
                         w->all.positions[i], w->turns - 1);
    if (k->lo0 < 0 || k->lo0 > k->hi0 || k->hi0 > slots || (k->lo0 == k->hi0 && !two)
        || (two && (k->lo1 < k->hi0 || k->hi1 > slots)))
        return dlm__fail(w->ctx, DLM_E_INPUT,
                         "keys of row %d: [%d,%d) and [%d,%d) are not"
                         " two ranges in order within 0..%d, one of them not empty", i,
                         k->lo0, k->hi0, k->lo1, k->hi1, slots);
    return DLM_OK;
}

static dlm_error dlm__check_out_rows(dlm__work *w, const dlm_batch *b)
{
    if (b->n_out < 0 || b->n_out > w->out)
        return dlm__fail(w->ctx, DLM_E_INPUT, "batch: n_out = %d, room for %d", b->n_out,
                         w->out);
    for (int i = 0; i < b->n_out; i++) {
        const int least = i ? b->out_rows[i - 1] + 1 : 0;
        if (b->out_rows[i] < least || b->out_rows[i] >= w->all.n)
            return dlm__fail(w->ctx, DLM_E_INPUT, "out_rows[%d] = %d is not in %d..%d", i,
                             b->out_rows[i], least, w->all.n - 1);
    }
    return DLM_OK;
}

/* Copies a batch into the work space with its defaults filled in.  Keys stand in panels
   from k_base on, values in rows from v_base on.  A session has a place for every lane,
   its slots rounded up to whole chunks, for both.  In training, where a row's slot is its
   place in the sequence, keys stand one sequence after the other, each rounded up, and
   values are the rows of kv, where the matmul left them. */
static void dlm__take_rows(dlm__work *w, const dlm_batch *b)
{
    int base = 0;
    w->n_seqs = b->n_seqs;
    w->all.n = b->start[b->n_seqs];
    for (int s = 0; s < b->n_seqs; s++) {
        const int first = b->start[s], n = b->start[s + 1] - first;
        const int lane = b->lanes ? b->lanes[s] : s;
        w->all.start[s] = first;
        for (int i = first; i < first + n; i++) {
            w->tokens[i] = b->tokens[i];
            w->slot[i] = b->slots && !w->training ? b->slots[i] : i - first;
            w->all.positions[i] = b->positions ? b->positions[i] : w->slot[i];
            w->all.keys[i] = b->keys[i];
        }
        w->n_slots[s] = w->training ? n : w->slots;
        w->k_base[s] = w->training ? base : lane * dlm__round_up(w->slots, DLM__CHUNK);
        w->v_base[s] = w->training ? first : w->k_base[s];
        base += dlm__round_up(n, DLM__CHUNK);
    }
    w->all.start[b->n_seqs] = w->all.n;
}

/* The rows that are looked at, as rows of their own: all the last layer computes. */
static void dlm__take_out_rows(dlm__work *w, const dlm_batch *b)
{
    int i = 0;
    w->sub.n = b->n_out;
    for (int s = 0; s < w->n_seqs; s++) {
        w->sub.start[s] = i;
        for (; i < b->n_out && b->out_rows[i] < w->all.start[s + 1]; i++) {
            w->out_rows[i] = b->out_rows[i];
            w->sub.keys[i] = w->all.keys[b->out_rows[i]];
            w->sub.positions[i] = w->all.positions[b->out_rows[i]];
        }
    }
    w->sub.start[w->n_seqs] = i;
}

/* All that is wrong is found before anything is computed, and cached keys stay. */
static dlm_error dlm__take_batch(dlm__work *w, const dlm_batch *b)
{
    dlm_error e = dlm__check_sequences(w, b);
    if (e != DLM_OK) return e;
    dlm__take_rows(w, b);
    for (int s = 0; s < w->n_seqs; s++)
        for (int i = w->all.start[s]; i < w->all.start[s + 1]; i++)
            if ((e = dlm__check_row(w, i, w->n_slots[s])) != DLM_OK) return e;
    if ((e = dlm__check_out_rows(w, b)) != DLM_OK) return e;
    dlm__take_out_rows(w, b);
    return DLM_OK;
}

/* ==[ passes ]================================================================
   One layer of the transformer, up and down, and the passes made of them.  Numbers are
   those of the lines; backward undoes them from the last to the first.
     1  h  = norm1(x)
     2  q  = heads(h Wq)            heads: bias, QK-norm, rotary
     3  k  = heads(h Wk)   v = h Wv + bv
     4  o  = attention(q, k, v)
     5  x2 = x + o Wo
     6  h2 = norm2(x2)
     7  a  = swiglu(h2 Wgate, h2 Wup)   or gelu(h2 Wup + bup)
     8  y  = x2 + a Wdown + bdown   y is the next layer's x
   Before the first stands x = embedding, behind the last logits = norm(y) W_head, plus a
   bias if there is one.  In the last layer only the rows that are looked at have queries,
   and all that follows them: their numbers pick rows of h as tokens pick embeddings. */

typedef struct dlm__store {
    const dlm__work *w;
    float *panels;                  /* (KV, pad_total, D)                          */
    const float *x; size_t ld;      /* (N, KV*D), rows ld apart                    */
} dlm__store;

/* The rows of one key/value head of one sequence. */
static void dlm__store_job(void *arg, int job)
{
    const dlm__store *st = (const dlm__store *)arg;
    const dlm__work *w = st->w;
    const int s = job / w->c.kv_heads, kv = job % w->c.kv_heads, D = w->c.head_dim;
    const int mr = w->ctx->k->mr;
    const size_t base = (size_t)kv * (size_t)w->pad_total + (size_t)w->k_base[s];
    for (int i = w->all.start[s]; i < w->all.start[s + 1]; i++) {
        const int in = w->slot[i] % mr;
        const float *x = st->x + (size_t)i * st->ld + (size_t)(kv * D);
        float *out = st->panels + (base + (size_t)(w->slot[i] - in)) * (size_t)D + in;
        for (int d = 0; d < D; d++) out[d * mr] = x[d];
    }
}

static void dlm__store_run(const dlm__work *w, float *panels, const float *x, size_t ld)
{
    dlm__store st;
    st.w = w; st.panels = panels; st.x = x; st.ld = ld;
    dlm__parallel(w->ctx, w->n_seqs * w->c.kv_heads,
                  4.0 * w->all.n * w->c.kv_heads * w->c.head_dim, dlm__store_job, &st);
}

/* Keys to panels; values stay where they are in training, else go to the cache. */
static void dlm__store_keys_values(const dlm__work *w, const dlm__cache *cache,
                                   const float *kv)
{
    const size_t KVD = (size_t)(w->c.kv_heads * w->c.head_dim);
    dlm__store_run(w, cache->k_panels, kv, 2 * KVD);
    for (int s = 0; s < w->n_seqs && !w->training; s++)
        for (int i = w->all.start[s]; i < w->all.start[s + 1]; i++)
            memcpy(cache->v + (size_t)(w->v_base[s] + w->slot[i]) * KVD,
                   kv + (size_t)i * 2 * KVD + KVD, KVD * sizeof(float));
}

/* The layers' descriptions of what stands in the work space.  x: the values themselves
   on the way up, their gradients on the way down. */
static dlm__heads dlm__heads_of(const dlm__work *w, float *x, size_t ldx, float *pre,
                                float *r, const float *bias, const float *g, int heads,
                                const int *positions)
{
    dlm__heads q;
    q.ctx = w->ctx; q.x = x; q.ldx = ldx; q.pre = pre; q.r = r; q.bias = bias; q.g = g;
    q.cos_sin = w->cos_sin; q.positions = positions; q.heads = heads;
    q.D = w->c.head_dim; q.eps = w->c.norm_eps;
    return q;
}

static dlm__heads dlm__queries(const dlm__work *w, const dlm__layer *p,
                               const dlm__acts *t, float *x, const dlm__rows *rows)
{
    return dlm__heads_of(w, x, (size_t)(w->c.heads * w->c.head_dim), t->q_pre, t->rq,
                         p->bq, p->qnorm, w->c.heads, rows->positions);
}

static dlm__heads dlm__keys_of_layer(const dlm__work *w, const dlm__layer *p,
                                     const dlm__acts *t, float *x)
{
    return dlm__heads_of(w, x, (size_t)(2 * w->c.kv_heads * w->c.head_dim), t->k_pre,
                         t->rk, p->bk, p->knorm, w->c.kv_heads, w->all.positions);
}

static dlm__attention dlm__attention_of(const dlm__work *w, const dlm__acts *t,
                                        const dlm__cache *cache, const dlm__rows *rows)
{
    const size_t KVD = (size_t)(w->c.kv_heads * w->c.head_dim);
    dlm__attention a;
    memset(&a, 0, sizeof a);
    a.ctx = w->ctx; a.H = w->c.heads; a.KV = w->c.kv_heads; a.D = w->c.head_dim;
    a.n_seqs = w->n_seqs; a.start = rows->start; a.keys = rows->keys;
    a.q = t->q; a.o = t->o; a.lse = t->lse;
    a.k_panels = cache->k_panels; a.k_base = w->k_base; a.pad_total = w->pad_total;
    a.v = w->training ? t->kv + KVD : cache->v;
    a.ldv = w->training ? 2 * KVD : KVD;
    a.v_base = w->v_base; a.n_slots = w->n_slots;
    return a;
}

static dlm__norm dlm__norm_of(const dlm__work *w, float *y, float *x, float *r,
                              const float *g)
{
    dlm__norm n;
    memset(&n, 0, sizeof n);
    n.ctx = w->ctx; n.y = y; n.x = x; n.r = r; n.g = g; n.n = w->c.dim;
    n.eps = w->c.norm_eps;
    return n;
}

/* x of t (N, C) enters, y (Q, C) leaves; may be the same when Q = N. */
static void dlm__layer_forward(dlm__work *w, const dlm__layer_weights *lw,
                               const dlm__acts *t, const dlm__cache *cache, int last,
                               float *y)
{
    const dlm__layer *p = &lw->p;
    const dlm__rows *rows = last ? &w->sub : &w->all;
    const int C = w->c.dim, KVD = w->c.kv_heads * w->c.head_dim;
    const int N = w->all.n, Q = rows->n;
    const int *looked_at = last ? w->out_rows : NULL;
    float *hq = last ? w->hq : t->h1;
    dlm__norm norm1 = dlm__norm_of(w, t->h1, t->x, t->r1, p->norm1);
    dlm__norm norm2 = dlm__norm_of(w, t->h2, t->x2, t->r2, p->norm2);
    dlm__heads q = dlm__queries(w, p, t, t->q, rows);
    dlm__heads k = dlm__keys_of_layer(w, p, t, t->kv);
    dlm__attention attention = dlm__attention_of(w, t, cache, rows);
    const dlm_matrix h = dlm__plain(t->h1, N, C, DLM_F32);

    dlm__norm_forward(&norm1, N);                                   /* 1 */
    if (last) dlm__embedding_forward(w->ctx, hq, &h, w->out_rows, Q);
    dlm_matmul(w->ctx, t->q, hq, &lw->q, Q);                        /* 2 */
    dlm__heads_forward(&q, Q);
    dlm_matmul(w->ctx, t->kv, t->h1, &lw->kv, N);                   /* 3 */
    dlm__heads_forward(&k, N);
    if (p->bv) dlm__bias_forward(w->ctx, t->kv + KVD, p->bv, 2 * (size_t)KVD, N, KVD);
    dlm__store_keys_values(w, cache, t->kv);
    if (Q == 0) return;

    dlm__attention_forward(&attention);                             /* 4 */
    dlm_matmul(w->ctx, t->x2, t->o, &lw->o, Q);                     /* 5 */
    dlm__add_residual(w->ctx, t->x2, NULL, t->x, looked_at, Q, C);
    dlm__norm_forward(&norm2, Q);                                   /* 6 */
    dlm_matmul(w->ctx, t->gu, t->h2, &lw->gu, Q);                   /* 7 */
    dlm__mlp_run(w->ctx, t->act, t->gu, NULL, p->bup, Q, w->c.ffn);
    dlm_matmul(w->ctx, y, t->act, &lw->down, Q);                    /* 8 */
    dlm__add_residual(w->ctx, y, p->bdown, t->x2, NULL, Q, C);
}

/* Layers share the cache, so it is filled once more; dq, dkv get the gradients. */
static void dlm__attention_back(dlm__work *w, const dlm__acts *t, const dlm__rows *rows)
{
    const size_t KVD = (size_t)(w->c.kv_heads * w->c.head_dim);
    dlm__attention a = dlm__attention_of(w, t, w->caches, rows);
    dlm__store_run(w, w->caches->k_panels, t->kv, 2 * KVD);
    dlm__store_run(w, w->v_panels, t->kv + KVD, 2 * KVD);
    a.d_o = w->d_o; a.dq = w->dq; a.k = t->kv; a.ldk = 2 * KVD;
    a.dk = w->dkv; a.dv = w->dkv + KVD; a.lddk = 2 * KVD;
    a.v_panels = w->v_panels; a.dkv_columns = w->dkv_columns;
    dlm__attention_backward(&a);
}

/* dy (Q, C) comes in, the gradient of what left: w->dy of the last layer, else w->dx.
   w->dx (N, C) goes out, the gradient of what entered. */
static void dlm__layer_backward(dlm__work *w, const dlm__layer_weights *lw,
                                const dlm__layer *g, const dlm__acts *t, int last)
{
    const dlm__layer *p = &lw->p;
    const dlm__rows *rows = last ? &w->sub : &w->all;
    const int C = w->c.dim, F = w->c.ffn, KVD = w->c.kv_heads * w->c.head_dim;
    const int N = w->all.n, Q = rows->n;
    float *hq = last ? w->hq : t->h1, *dy = last ? w->dy : w->dx;
    float *dhq = last ? w->dhq : w->dh;
    dlm__norm norm1 = dlm__norm_of(w, t->h1, t->x, t->r1, p->norm1);
    dlm__norm norm2 = dlm__norm_of(w, t->h2, t->x2, t->r2, p->norm2);
    dlm__heads q = dlm__queries(w, p, t, w->dq, rows);
    dlm__heads k = dlm__keys_of_layer(w, p, t, w->dkv);
    norm1.dy = norm2.dy = w->dh;
    norm1.dx = w->dx;
    norm2.dx = dy;

    dlm__linear_backward(w->ctx, w->dact, 0, g->wdown, dy, t->act, &lw->down, Q); /* 8 */
    dlm__bias_backward(w->ctx, g->bdown, dy, (size_t)C, Q, C);
    dlm__mlp_run(w->ctx, w->dact, t->gu, w->dgu, p->bup, Q, F);                   /* 7 */
    dlm__bias_backward(w->ctx, g->bup, w->dgu, (size_t)F, Q, F);
    dlm__linear_backward(w->ctx, w->dh, 0, g->wgate, w->dgu, t->h2, &lw->gu, Q);
    dlm__norm_backward(&norm2, g->norm2, Q);       /* 6: dy, now that of x2, grows    */
    dlm__linear_backward(w->ctx, w->d_o, 0, g->wo, dy, t->o, &lw->o, Q);          /* 5 */
    if (last) memset(w->dx, 0, (size_t)N * (size_t)C * sizeof *dy);
    if (last) dlm__embedding_backward(w->ctx, w->dx, dy, w->out_rows, Q, C);
    dlm__attention_back(w, t, rows);                                              /* 4 */
    dlm__heads_backward(&k, g->knorm, g->bk, N);                                  /* 3 */
    dlm__bias_backward(w->ctx, g->bv, w->dkv + KVD, 2 * (size_t)KVD, N, KVD);
    dlm__linear_backward(w->ctx, w->dh, 0, g->wk, w->dkv, t->h1, &lw->kv, N);
    dlm__heads_backward(&q, g->qnorm, g->bq, Q);                                  /* 2 */
    dlm__linear_backward(w->ctx, dhq, !last, g->wq, w->dq, hq, &lw->q, Q);
    if (last) dlm__embedding_backward(w->ctx, w->dh, dhq, w->out_rows, Q, C);
    dlm__norm_backward(&norm1, g->norm1, N);       /* 1: dx, of which 5 took x, grows */
}

/* --[ whole passes ]----------------------------------------------------------
   learn: every layer keeps its activations for backward. */

static void dlm__layers_forward(dlm__work *w, const dlm_model *m, int learn)
{
    const dlm__layer_weights outer = dlm__layer_of(m, -1, w->type);
    const int last = w->c.layers - 1;
    dlm__norm norm = dlm__norm_of(w, w->hf, w->x_out, w->rf, outer.p.norm_out);
    dlm__embedding_forward(w->ctx, w->acts[0].x, &outer.embed, w->tokens, w->all.n);
    for (int l = 0; l <= last; l++) {
        const dlm__layer_weights lw = dlm__layer_of(m, l, w->type);
        const dlm__acts *t = &w->acts[learn ? l : 0], *next = learn ? t + 1 : t;
        dlm__layer_forward(w, &lw, t, &w->caches[w->cached ? l : 0], l == last,
                           l == last ? w->x_out : next->x);
    }
    dlm__norm_forward(&norm, w->sub.n);
}

/* The gradient of the last layer's output has only the rows looked at, so it begins in
   dy; what leaves that layer, and all below it, has every row and stays in dx. */
static void dlm__layers_backward(dlm__work *w, const dlm_model *m, float *grads)
{
    const dlm__layer g = dlm__layer_at(&w->c, grads, -1);
    const int last = w->c.layers - 1;
    dlm__norm norm = dlm__norm_of(w, w->hf, w->x_out, w->rf,
                                  dlm__layer_of(m, -1, w->type).p.norm_out);
    memset(w->dy, 0, (size_t)w->sub.n * (size_t)w->c.dim * sizeof *w->dy);
    norm.dy = w->dhf;
    norm.dx = w->dy;
    dlm__norm_backward(&norm, g.norm_out, w->sub.n);
    for (int l = last; l >= 0; l--) {
        const dlm__layer_weights lw = dlm__layer_of(m, l, w->type);
        const dlm__layer gl = dlm__layer_at(&w->c, grads, l);
        dlm__layer_backward(w, &lw, &gl, &w->acts[l], l == last);
    }
    dlm__embedding_backward(w->ctx, g.tok_emb, w->dx, w->tokens, w->all.n, w->c.dim);
}

typedef struct dlm__scoring {
    dlm_ctx *ctx;
    dlm_score_fn score;
    void  *user;
    float *logits;                  /* (chunk, V)                                  */
    const float *bias;              /* (V); NULL: none                             */
    int    first, V;                /* number of the chunk's first row             */
} dlm__scoring;

static void dlm__score_rows(void *arg, int first, int end)
{
    const dlm__scoring *s = (const dlm__scoring *)arg;
    for (int i = first; i < end; i++) {
        float *logits = s->logits + (size_t)i * (size_t)s->V;
        if (s->bias) s->ctx->k->add(logits, s->bias, s->V);
        s->score(s->user, s->first + i, logits);
    }
}

/* The way back of the chunk's n rows, whose logits are gradients now.  What a bias of
   -INFINITY forbids has none, whatever the loss makes of it. */
static void dlm__head_backward(dlm__work *w, const dlm__scoring *s, const dlm__layer *g,
                               const dlm_matrix *head, int n)
{
    const size_t at = (size_t)s->first * (size_t)w->c.dim, V = (size_t)s->V;
    for (size_t v = 0; s->bias && v < V; v++)
        for (size_t i = 0; i < (size_t)n && s->bias[v] < -FLT_MAX; i++)
            s->logits[i * V + v] = 0.0f;
    dlm__bias_backward(w->ctx, g->head_bias, s->logits, V, n, s->V);
    dlm__linear_backward(w->ctx, w->dhf + at, 0, g->head, s->logits, w->hf + at, head, n);
}

/* The head, a chunk of rows at a time: logits, score, and when training (grads not
   NULL) at once the way back, so that no more than a chunk of logits ever exists. */
static void dlm__head(dlm__work *w, const dlm_model *m, float *grads, dlm_score_fn score,
                      void *user)
{
    const dlm__layer_weights outer = dlm__layer_of(m, -1, w->type);
    const size_t C = (size_t)w->c.dim;
    const int V = w->c.vocab;
    dlm__scoring s;
    s.ctx = w->ctx; s.score = score; s.user = user; s.logits = w->logits; s.V = V;
    s.bias = outer.p.head_bias;
    for (s.first = 0; s.first < w->sub.n; s.first += w->chunk) {
        const int n = dlm__min(w->chunk, w->sub.n - s.first);
        dlm_matmul(w->ctx, w->logits, w->hf + (size_t)s.first * C, &outer.head, n);
        dlm__for_rows(w->ctx, n, 20.0 * V, dlm__score_rows, &s);
        if (grads) {
            const dlm__layer g = dlm__layer_at(&w->c, grads, -1);
            dlm__head_backward(w, &s, &g, &outer.head, n);
        }
    }
}

/* Per layer and row 4 C KVD for k and v, 2 C (2 HD + GU + F) for the other products of
   those that have queries, and 4 HD per key that a query sees: scores, their mixture. */
DLM_API double dlm_forward_flops(const dlm_config *c, const dlm_batch *b)
{
    const double C = c->dim, HD = (double)c->heads * c->head_dim;
    const double KVD = (double)c->kv_heads * c->head_dim;
    const int N = b->start[b->n_seqs];
    const double per_query = 2.0 * C * (2.0 * HD + dlm__dim_of(c, DLM__GU) + c->ffn);
    double seen_out = 0.0, flops;
    for (int i = 0; i < b->n_out; i++)
        seen_out += dlm__keys_seen(b->keys + b->out_rows[i], 1);
    flops = (double)c->layers * N * 4.0 * C * KVD;
    flops += (c->layers - 1) * (N * per_query + 4.0 * HD * dlm__keys_seen(b->keys, N));
    flops += b->n_out * (per_query + 2.0 * C * c->vocab) + 4.0 * HD * seen_out;
    return flops;
}

/* ==[ sessions ]==============================================================
   Inference: a work space that keeps nothing for backward. */

struct dlm_session {
    dlm__work        w;
    const dlm_model *m;
};

/* Defaults and checks of limits for sequences of at most max_seq tokens. */
static dlm_error dlm__limits_resolve(dlm_ctx *ctx, const dlm_limits *lim, int max_seq,
                                     dlm_limits *d)
{
    dlm_error e;
    memset(d, 0, sizeof *d);
    if (lim) *d = *lim;
    if (d->slots == 0) d->slots = max_seq;
    e = dlm__resolve(ctx, "limits.", dlm__limits_options, d);
    if (e != DLM_OK) return e;
    if ((double)d->seqs * (d->slots + DLM__CHUNK) > INT_MAX / 2)
        return dlm__fail(ctx, DLM_E_CONFIG, "limits: %d seqs of %d slots are too many",
                         d->seqs, d->slots);
    if (d->rows == 0) d->rows = d->seqs * d->slots;
    if (d->out == 0) d->out = d->rows;
    return dlm__in_range(ctx, "limits.out", d->out, 1, d->rows);
}

static dlm_limits dlm__limits_of(const dlm__work *w)
{
    dlm_limits lim;
    lim.seqs = w->seqs; lim.slots = w->slots; lim.rows = w->rows; lim.out = w->out;
    lim.cached = w->cached;
    return lim;
}

/* A work space that is complete but for its arrays. */
static dlm_error dlm__session_limits(dlm__work *w, dlm_ctx *ctx, const dlm_model *m,
                                     const dlm_limits *lim)
{
    dlm_limits d;
    dlm_error e = dlm__limits_resolve(ctx, lim, m->config.max_seq, &d);
    memset(w, 0, sizeof *w);
    w->ctx = ctx;
    w->c = m->config;
    if (e == DLM_OK) e = dlm__check_kernels(ctx, m);
    w->seqs = d.seqs; w->slots = d.slots; w->rows = d.rows; w->out = d.out;
    w->cached = d.cached != 0;
    return e;
}

static void dlm__session_carve(dlm__arena *a, void *object)
{
    dlm__work_carve(a, &((dlm_session *)object)->w);
}

DLM_API dlm_error dlm_session_create(dlm_session **out, dlm_ctx *ctx, const dlm_model *m,
                                     const dlm_limits *lim, dlm_memory *mem)
{
    dlm_session draft, *s;
    dlm_error e = dlm__session_limits(&draft.w, ctx, m, lim);
    draft.m = m;
    s = (dlm_session *)dlm__make(&e, ctx, "session", dlm__session_carve, &draft,
                                 sizeof draft, out != NULL, mem);
    if (s) dlm__fill_cos_sin(&s->w);
    if (out) *out = s;
    return e;
}

DLM_API void dlm_session_free(dlm_session *s) { dlm__unmake(s); }

DLM_API dlm_error dlm_forward(dlm_session *s, const dlm_batch *b, dlm_score_fn score,
                              void *user)
{
    dlm_error e = dlm__take_batch(&s->w, b);
    if (e != DLM_OK) return e;
    dlm__layers_forward(&s->w, s->m, 0);
    if (score) dlm__head(&s->w, s->m, NULL, score, user);
    return DLM_OK;
}

typedef struct dlm__copy { float *out; size_t V; } dlm__copy;

static void dlm__copy_logits(void *user, int i, float *logits)
{
    const dlm__copy *c = (const dlm__copy *)user;
    memcpy(c->out + (size_t)i * c->V, logits, c->V * sizeof *logits);
}

DLM_API dlm_error dlm_logits(dlm_session *s, const dlm_batch *b, float *logits)
{
    dlm__copy c;
    c.out = logits;
    c.V = (size_t)s->w.c.vocab;
    return dlm_forward(s, b, dlm__copy_logits, &c);
}

/* ==[ states ]================================================================
   Noise levels, masks, and how the three objectives lay a state out as rows. */

/* t = lo + (hi - lo) u of unit `row` of n; u in [0, 1) is uniform, or stratified (MDLM):
   u = (s + u')/n, the strata s dealt out by a random permutation. */
static double dlm__noise_level(const dlm_address *at, int row, int n, int stratified,
                               double lo, double hi)
{
    dlm_address a = *at;
    double u;
    a.row = (uint32_t)row;
    u = dlm_uniform(&a, 0);
    if (stratified && n > 1)
        u = (u + (double)dlm_shuffled(at->seed ^ at->purpose, at->step, (size_t)n,
                                      (size_t)row)) / n;
    return lo + (hi - lo) * u;
}

/* Cells are at most the rows, and so are units and rows looked at. */
static void dlm__state_carve(dlm__arena *a, void *object)
{
    dlm_state *s = (dlm_state *)object;
    const size_t n = (size_t)s->rows, seqs = (size_t)s->seqs;
    s->first_cell = dlm__push_ints(a, seqs + 1);
    s->first_unit = dlm__push_ints(a, seqs + 1);
    s->units = (dlm_unit *)dlm__push(a, n, sizeof(dlm_unit));
    s->masked = (unsigned char *)dlm__push(a, n, 1);
    s->weight = dlm__push_floats(a, n, 1);
    s->score = dlm__push_floats(a, n, 1);
    s->start = dlm__push_ints(a, seqs + 1);
    s->tokens = dlm__push_ints(a, n);
    s->positions = dlm__push_ints(a, n);
    s->keys = (dlm_keys *)dlm__push(a, n, sizeof(dlm_keys));
    s->out_rows = dlm__push_ints(a, n);
    s->targets = dlm__push_ints(a, n);
    s->out_cell = dlm__push_ints(a, n);
    s->out_weight = dlm__push_floats(a, n, 1);
    s->out_level = dlm__push_floats(a, n, 1);
    s->loss = (double *)dlm__push(a, n, sizeof(double));
}

static const char *const dlm__objective_names[] = { "auto", "block", "mdlm", "ar" };

/* What a pattern asks for is the objective of its own number, behind AUTO. */
static dlm_objective dlm__objective_of(const dlm_config *c)
{
    return (dlm_objective)((int)c->pattern + 1);
}

static dlm_error dlm__check_objective(dlm_ctx *ctx, const dlm_config *c,
                                      dlm_objective objective)
{
    const int ar = objective == DLM_OBJECTIVE_AR;
    if (objective == DLM_OBJECTIVE_AUTO || ar == (c->pattern == DLM_PATTERN_CAUSAL))
        return DLM_OK;
    return dlm__fail(ctx, DLM_E_CONFIG, "objective: ar and the causal pattern go "
                     "together, in a model of their own");
}

/* Everything but the arrays; seqs 0: one to 32 rows, but not few. */
static void dlm__state_prepare(dlm_state *s, dlm_ctx *ctx, const dlm_config *c,
                               dlm_objective objective, int rows, int seqs)
{
    memset(s, 0, sizeof *s);
    s->ctx = ctx;
    s->config = *c;
    s->objective = objective == DLM_OBJECTIVE_AUTO ? dlm__objective_of(c) : objective;
    s->rows = rows;
    s->seqs = seqs ? seqs : dlm__max(16, rows / 32);
    s->scale = 1.0;
}

/* --[ taking examples ]-------------------------------------------------------  */

/* Tokens of the noisy copy: the response, and the masks that the sampler shows behind a
   text that ends inside a block. */
static int dlm__noisy_length(const dlm_config *c, const dlm_example *e)
{
    const int canvas = e->canvas ? dlm__min(e->canvas, c->max_seq) : c->max_seq;
    return dlm__min(dlm__round_up(e->length - e->prompt, c->block), canvas - e->prompt);
}

/* Rows that an example may take; one without a response has none. */
static int dlm__rows_of(const dlm_state *s, const dlm_example *e)
{
    if (e->prompt == e->length) return 0;
    return e->length + (s->objective == DLM_OBJECTIVE_BLOCK
                        ? dlm__noisy_length(&s->config, e) : 0);
}

/* Cells of a unit, at most. */
static int dlm__unit_length(const dlm_state *s)
{
    return s->objective == DLM_OBJECTIVE_BLOCK ? s->config.block : INT_MAX / 2;
}

/* A text to learn from or to score: tokens of the vocabulary, none of them the mask,
   whose meaning "not known" it would unlearn. */
static dlm_error dlm__check_text(dlm_ctx *ctx, const dlm_config *c, const char *what,
                                 int number, const int *tokens, int n)
{
    for (int i = 0; i < n; i++) {
        if (tokens[i] < 0 || tokens[i] >= c->vocab)
            return dlm__fail(ctx, DLM_E_INPUT, "%s %d: token %d at %d is not in 0..%d",
                             what, number, tokens[i], i, c->vocab - 1);
        if (tokens[i] == c->mask_id)
            return dlm__fail(ctx, DLM_E_INPUT, "%s %d: token %d at %d is the mask; no "
                             "text may hold it (a vocab one larger has a free one)",
                             what, number, tokens[i], i);
    }
    return DLM_OK;
}

/* Everything that could make an example impossible, so that the passes cannot fail. */
static dlm_error dlm__check_examples(const dlm_state *s, const dlm_example *examples,
                                     int n, int views)
{
    dlm_ctx *ctx = s->ctx;
    const int most = s->config.max_seq;
    dlm_error error = DLM_OK;
    if (n < 1)
        return dlm__fail(ctx, DLM_E_INPUT, "examples: %d of them, wants 1 or more", n);
    for (int i = 0; i < n && error == DLM_OK; i++) {
        const dlm_example *e = &examples[i];
        if (e->length < 1 || e->length > most)
            return dlm__fail(ctx, DLM_E_INPUT, "example %d: length %d is not in 1..%d", i,
                             e->length, most);
        if (e->prompt < 0 || e->prompt > e->length)
            return dlm__fail(ctx, DLM_E_INPUT, "example %d: prompt %d is not in 0..%d", i,
                             e->prompt, e->length);
        if (e->canvas != 0 && e->canvas < e->length)
            return dlm__fail(ctx, DLM_E_INPUT, "example %d: canvas %d, its length is %d",
                             i, e->canvas, e->length);
        if (views * dlm__rows_of(s, e) > s->rows)
            return dlm__fail(ctx, DLM_E_INPUT, "example %d: needs %d rows, max_rows is "
                             "%d", i, views * dlm__rows_of(s, e), s->rows);
        error = dlm__check_text(ctx, &s->config, "example", i, e->tokens, e->length);
    }
    return error;
}

/* The cells and units of checked examples, of at most most_cells cells together; the
   first always fits. */
static void dlm__state_take(dlm_state *s, const dlm_example *examples, int n, int views,
                            int most_cells)
{
    const int most = dlm__unit_length(s);
    int rows = 0;
    s->examples = examples;
    s->n_examples = s->n_units = s->n_cells = s->first_cell[0] = s->first_unit[0] = 0;
    for (int i = 0; i < n && (i + 1) * views <= s->seqs; i++) {
        const dlm_example *e = &examples[i];
        const int R = e->length - e->prompt;
        rows += views * dlm__rows_of(s, e);
        if (rows > s->rows || s->n_cells + R > most_cells) break;
        for (int r = 0; r < R; r += most) {
            dlm_unit *u = &s->units[s->n_units++];
            memset(u, 0, sizeof *u);
            u->example = i;
            u->cell = s->n_cells + r;
            u->n = dlm__min(most, R - r);
            u->blind = s->config.shifted && e->prompt + r == 0;
            u->wanted = 1;
        }
        s->n_cells += R;
        s->n_examples = i + 1;
        s->first_cell[i + 1] = s->n_cells;
        s->first_unit[i + 1] = s->n_units;
    }
}

DLM_API dlm_error dlm_state_take(dlm_state *s, const dlm_example *examples, int n,
                                 int views)
{
    dlm_error e = dlm__in_range(s->ctx, "views", views, 1, dlm__min(2, s->seqs));
    if (e == DLM_OK) e = dlm__check_examples(s, examples, n, views);
    if (e == DLM_OK) dlm__state_take(s, examples, n, views, s->rows);
    return e;
}

/* Tokens that could carry loss: a shifted model cannot predict token 0. */
static int dlm__could_carry(const dlm_state *s, const dlm_example *e)
{
    return e->length - dlm__max(e->prompt, s->config.shifted);
}

/* --[ noise ]-----------------------------------------------------------------  */

static dlm_address dlm__cell_address(const dlm_state *s, const dlm_unit *u, int cell,
                                     dlm_purpose purpose)
{
    return dlm__address(s->noise.seed, purpose, s->noise.step,
                        (uint32_t)(s->noise.row + u->example),
                        (uint32_t)(cell - s->first_cell[u->example]));
}

DLM_API void dlm_state_mask(dlm_state *s, int k, double p)
{
    const dlm_unit *u = &s->units[k];
    for (int i = u->cell; i < u->cell + u->n; i++) {
        const dlm_address at = dlm__cell_address(s, u, i, DLM_RANDOM_MASK);
        s->masked[i] = dlm_uniform(&at, 0) < p;
    }
}

/* Every cell of unit k weighs w. */
static void dlm__weigh(dlm_state *s, int k, double w)
{
    const dlm_unit *u = &s->units[k];
    for (int i = u->cell; i < u->cell + u->n; i++) s->weight[i] = (float)w;
}

/* Levels are numbered through the whole step, so that strata spread over all its states
   and the noise of an example does not depend on which of them it is in. */
DLM_API void dlm_state_noise(dlm_state *s, const dlm_noise *noise)
{
    dlm_address at;
    int could = 0;
    memset(&s->noise, 0, sizeof s->noise);
    if (noise) s->noise = *noise;
    if (s->noise.lo == 0.0) s->noise.lo = 1e-3;
    if (s->noise.hi == 0.0) s->noise.hi = 1.0;
    if (s->noise.all == 0) s->noise.all = s->noise.first + s->n_units;
    at = dlm__address(s->noise.seed, DLM_RANDOM_LEVEL, s->noise.step, 0, 0);
    for (int k = 0; k < s->n_units; k++) {
        dlm_unit *u = &s->units[k];
        u->t = s->objective == DLM_OBJECTIVE_AR ? 1.0
            : dlm__noise_level(&at, s->noise.first + k, s->noise.all,
                              !s->noise.independent, s->noise.lo, s->noise.hi);
        u->wanted = 1;
        dlm_state_mask(s, k, u->t);         /* AR: at level 1 all are              */
        dlm__weigh(s, k, 1.0 / u->t);
    }
    for (int i = 0; i < s->n_examples; i++) could += dlm__could_carry(s, &s->examples[i]);
    s->scale = 1.0 / dlm__max(could, 1);
}

/* --[ layouts ]---------------------------------------------------------------
   Out rows must increase, so they are added in the order of rows. */

static int dlm__cell_token(const dlm_state *s, int ex, int cell)
{
    const dlm_example *e = &s->examples[ex];
    return s->masked[cell] ? s->config.mask_id
                           : e->tokens[e->prompt + cell - s->first_cell[ex]];
}

/* Row `row` predicts this cell of unit u; nobody looks at what weighs nothing. */
static void dlm__look_at(dlm_state *s, const dlm_unit *u, int cell, int row)
{
    const dlm_example *e = &s->examples[u->example];
    int i;
    if (s->weight[cell] == 0.0f) return;
    i = s->batch.n_out++;
    s->out_rows[i] = row;
    s->targets[i] = e->tokens[e->prompt + cell - s->first_cell[u->example]];
    s->out_cell[i] = cell;
    s->out_weight[i] = s->weight[cell];
    s->out_level[i] = (float)u->t;
}

/* The noisy block of unit u from row `row` on, which is slot row - base: it sees the
   clean rows before it and itself.  Returns its rows. */
static int dlm__layout_noisy(dlm_state *s, const dlm_unit *u, int base, int row)
{
    const dlm_config *c = &s->config;
    const dlm_example *e = &s->examples[u->example];
    const int r = u->cell - s->first_cell[u->example], first = e->prompt + r;
    const int n = dlm__min(c->block, dlm__noisy_length(c, e) - r), slot = row - base;
    const dlm_keys seen = { 0, first, slot, slot + n };
    for (int i = 0; i < n; i++) {
        s->keys[row + i] = seen;
        s->positions[row + i] = first + i;
        s->tokens[row + i] = i < u->n ? dlm__cell_token(s, u->example, u->cell + i)
                                      : c->mask_id;
        if (i < u->n && s->masked[u->cell + i] && i >= c->shifted)
            dlm__look_at(s, u, u->cell + i, row + i - c->shifted);
    }
    return n;
}

/* The rows of an example from row `base` on: clean, but that FULL has masks among them.
   AR: row i-1 predicts token i, the last token needs no row, and all count as masked.
   BLOCK: what is wanted follows, noisy; shifted, the clean row before a block predicts
   its first token.  Returns the rows. */
static int dlm__layout_example(dlm_state *s, int ex, int base)
{
    const dlm_example *e = &s->examples[ex];
    const int ar = s->objective == DLM_OBJECTIVE_AR, T = e->length - ar;
    const int full = s->objective == DLM_OBJECTIVE_MDLM, shifted = s->config.shifted;
    int rows = T;
    dlm_keys_fill(s->keys + base, T, (dlm_pattern)((int)s->objective - 1),
                  s->config.block, e->prompt);
    for (int i = 0; i < T; i++) {
        s->tokens[base + i] = e->tokens[i];
        s->positions[base + i] = i;
    }
    for (int k = s->first_unit[ex]; k < s->first_unit[ex + 1]; k++) {
        const dlm_unit *u = &s->units[k];
        const int most = ar || full ? u->n : u->wanted && shifted;
        for (int cell = u->cell; cell < u->cell + most; cell++) {
            const int row = base + e->prompt + cell - s->first_cell[ex];
            if (full) s->tokens[row] = dlm__cell_token(s, ex, cell);
            if ((ar || s->masked[cell]) && cell >= u->cell + u->blind)
                dlm__look_at(s, u, cell, row - shifted);
        }
    }
    for (int k = s->first_unit[ex]; k < s->first_unit[ex + 1] && !ar && !full; k++)
        if (s->units[k].wanted)
            rows += dlm__layout_noisy(s, &s->units[k], base, base + rows);
    return rows;
}

/* One sequence per example that has a wanted unit.  Kept to the rows that taking it has
   counted, which are the most it can have. */
DLM_API dlm_error dlm_state_layout(dlm_state *s, int again)
{
    dlm_batch *b = &s->batch;
    if (!again) {
        memset(b, 0, sizeof *b);
        s->start[0] = 0;
    }
    b->start = s->start; b->tokens = s->tokens; b->positions = s->positions;
    b->keys = s->keys; b->out_rows = s->out_rows;
    for (int ex = 0; ex < s->n_examples; ex++) {
        const int base = s->start[b->n_seqs], most = dlm__rows_of(s, &s->examples[ex]);
        int wanted = 0;
        for (int k = s->first_unit[ex]; k < s->first_unit[ex + 1]; k++)
            wanted |= s->units[k].wanted;
        if (!wanted) continue;
        if (b->n_seqs == s->seqs || most > s->rows - base) {
            memset(b, 0, sizeof *b);
            return dlm__fail(s->ctx, DLM_E_INPUT, "state: no room for rows of example %d "
                             "(two views must be taken as such)", ex);
        }
        s->start[++b->n_seqs] = base + dlm__layout_example(s, ex, base);
    }
    return DLM_OK;
}

/* --[ looking at rows ]-------------------------------------------------------  */

DLM_API void dlm_state_loss(void *state, int i, float *logits)
{
    const dlm_state *s = (const dlm_state *)state;
    s->loss[i] = dlm_cross_entropy(s->ctx, logits, s->config.vocab, s->targets[i],
                                   (double)s->out_weight[i] * s->scale);
}

DLM_API void dlm_state_gold(void *state, int i, float *logits)
{
    const dlm_state *s = (const dlm_state *)state;
    s->score[s->out_cell[i]] = (float)((double)logits[s->targets[i]]
        - dlm_log_sum_exp(s->ctx, logits, s->config.vocab, NULL));
}

/* -sum p log p = log sum e^x - sum x e^x / sum e^x; NaN stays NaN. */
DLM_API void dlm_state_entropy(void *state, int i, float *logits)
{
    const dlm_state *s = (const dlm_state *)state;
    const dlm__kernels *k = s->ctx->k;
    const int V = s->config.vocab;
    double sum_x, sum = k->sum_exp(logits, V, k->max(logits, V), &sum_x);
    const double h = log(sum) - sum_x / sum;
    s->score[s->out_cell[i]] = (float)(h < 0.0 ? 0.0 : h);
}

DLM_API dlm_error dlm_state_create(dlm_state **out, dlm_ctx *ctx,
                                   const dlm_config *config, dlm_objective objective,
                                   int rows, int seqs, dlm_memory *mem)
{
    dlm_state draft, *s;
    dlm_config c = *config;
    dlm_error e = dlm_config_resolve(ctx, &c);
    if (e == DLM_OK) e = dlm__in_range(ctx, "rows", rows, 1, 1 << 26);
    if (e == DLM_OK) e = dlm__in_range(ctx, "seqs", seqs, 0, 1 << 20);
    if (e == DLM_OK) e = dlm__in_range(ctx, "objective", (int)objective, 0,
                                       DLM_OBJECTIVE_AR);
    if (e == DLM_OK) e = dlm__check_objective(ctx, &c, objective);
    if (e == DLM_OK) dlm__state_prepare(&draft, ctx, &c, objective, rows, seqs);
    s = (dlm_state *)dlm__make(&e, ctx, "state", dlm__state_carve, &draft, sizeof draft,
                               out != NULL, mem);
    if (out) *out = s;
    return e;
}

DLM_API void dlm_state_free(dlm_state *s) { dlm__unmake(s); }

/* ==[ trainer ]===============================================================
   What learns: work space, gradients, passes that add them up.
   Gradients and both moments are flat arrays in the order of the weights. */

typedef struct dlm__trainer_parts { /* what a trainer points to, in one block      */
    dlm_trainer t;
    dlm_state   state;
    dlm__work   work;
} dlm__trainer_parts;

enum { DLM__GRAD_RUN = 4096 };      /* floats of one job: sums in a fixed order    */

/* The table's defaults and ranges, the model's, then what fields ask of each other and of
   the model.  A row of a pass costs a row of every activation, so max_rows is what memory
   grows with; block diffusion shows every token twice. */
static dlm_error dlm__train_resolve(dlm_ctx *ctx, const dlm_model *m,
                                    const dlm_train_options *opt, dlm_train_options *o)
{
    dlm_error e;
    memset(o, 0, sizeof *o);
    if (opt) *o = *opt;
    if (o->clip > DLM__MOST_NORM) o->clip = DLM__MOST_NORM;
    e = dlm__resolve(ctx, "", dlm__train_options, o);
    if (e == DLM_OK) e = dlm__check_type(ctx, "precision", o->precision, 0);
    if (e == DLM_OK) e = dlm__want_plain(ctx, "trainer", m);
    if (e == DLM_OK) e = dlm__check_objective(ctx, &m->config, o->objective);
    if (e != DLM_OK) return e;
    if (o->objective == DLM_OBJECTIVE_AUTO) o->objective = dlm__objective_of(&m->config);
    if (o->max_rows == 0)
        o->max_rows = 16 * dlm__min(m->config.max_seq, 2048)
            * (1 + (o->objective == DLM_OBJECTIVE_BLOCK));
    if (o->objective == DLM_OBJECTIVE_AR
        && (o->lift.method || o->lift.choose || o->lift.complementary))
        return dlm__fail(ctx, DLM_E_CONFIG, "lift.method, choose, complementary: ar has "
                         "no masks to choose from");
    if (o->lift.one_pass && o->lift.complementary)
        return dlm__fail(ctx, DLM_E_CONFIG,
                         "lift.one_pass and lift.complementary exclude each other");
    if (!(o->level_min <= o->level_max))
        return dlm__fail(ctx, DLM_E_CONFIG, "level_max: %g is below level_min, %g",
                         (double)o->level_max, (double)o->level_min);
    if (!(o->lr * o->weight_decay <= 1.0f))
        return dlm__fail(ctx, DLM_E_CONFIG, "weight_decay: %g times lr is more than 1: "
                         "weights would turn over", (double)o->weight_decay);
    if (o->schedule != DLM_SCHEDULE_CONSTANT && o->total <= o->warmup)
        return dlm__fail(ctx, DLM_E_CONFIG, "total: %d steps, a schedule needs more than "
                         "the warmup of %d", o->total, o->warmup);
    return DLM_OK;
}

static void dlm__trainer_carve(dlm__arena *a, void *object)
{
    dlm__trainer_parts *p = (dlm__trainer_parts *)object;
    dlm_trainer *t = &p->t;
    const size_t n = t->model->n_params, rows = (size_t)p->work.rows;
    t->gradients = dlm__push_floats(a, n, 1);
    t->adam_m = dlm__push_floats(a, n, 1);
    t->adam_v = dlm__push_floats(a, n, 1);
    t->ema = t->options.ema > 0.0f ? dlm__push_floats(a, n, 1) : NULL;
    t->partial = (double *)dlm__push(a, n / DLM__GRAD_RUN + 1, sizeof(double));
    t->windows = (dlm_example *)dlm__push(a, rows, sizeof(dlm_example));
    dlm__state_carve(a, &p->state);
    dlm__work_carve(a, &p->work);
}

/* Averaged weights begin as the weights: an average of nothing would begin at 0. */
DLM_API dlm_error dlm_trainer_create(dlm_trainer **out, dlm_ctx *ctx, dlm_model *m,
                                     const dlm_train_options *opt, dlm_memory *mem)
{
    dlm__trainer_parts draft, *p;
    dlm__work *w = &draft.work;
    dlm_train_options *o = &draft.t.options;
    dlm_error e;
    memset(&draft, 0, sizeof draft);
    e = dlm__train_resolve(ctx, m, opt, o);
    draft.t.ctx = w->ctx = ctx;
    draft.t.model = m;
    w->c = m->config;
    w->training = 1;
    w->type = o->precision;
    w->rows = w->out = w->slots = o->max_rows;
    dlm__state_prepare(&draft.state, ctx, &w->c, o->objective, o->max_rows, 0);
    w->seqs = draft.state.seqs;
    p = (dlm__trainer_parts *)dlm__make(&e, ctx, "trainer", dlm__trainer_carve, &draft,
                                        sizeof draft, out != NULL, mem);
    if (out) *out = p ? &p->t : NULL;
    if (p == NULL) return e;
    p->t.state = &p->state;
    p->t.work = &p->work;
    dlm__fill_cos_sin(&p->work);
    if (p->t.ema) memcpy(p->t.ema, m->weights, m->n_params * sizeof(float));
    return e;
}

DLM_API void dlm_trainer_free(dlm_trainer *t) { dlm__unmake(t); }

/* --[ passes ]----------------------------------------------------------------  */

/* learn: keep activations, add to the gradients.  Otherwise only score. */
static dlm_error dlm__pass(dlm_trainer *t, const dlm_batch *b, dlm_score_fn score,
                           void *user, int learn)
{
    dlm_error e = dlm__take_batch(t->work, b);
    if (e != DLM_OK) return e;
    if (b->n_out == 0) return DLM_OK;
    dlm__layers_forward(t->work, t->model, learn);
    dlm__head(t->work, t->model, learn ? t->gradients : NULL, score, user);
    if (learn) dlm__layers_backward(t->work, t->model, t->gradients);
    t->flops += (learn ? 3.0 : 1.0) * dlm_forward_flops(&t->model->config, b);
    return DLM_OK;
}

DLM_API dlm_error dlm_trainer_pass(dlm_trainer *t, const dlm_batch *b, dlm_score_fn score,
                                   void *user)
{
    return dlm__pass(t, b, score, user, 1);
}

DLM_API dlm_error dlm_trainer_forward(dlm_trainer *t, const dlm_batch *b,
                                      dlm_score_fn score, void *user)
{
    return dlm__pass(t, b, score, user, 0);
}

/* ==[ optimizer ]=============================================================
   Learning rate, clipping by the global norm, AdamW with decoupled decay, averaging. */

/* Learning rate of update n = 0, 1, ..: linear up to lr over warmup, then the
   schedule down to lr_min at total. */
static double dlm__learning_rate(const dlm_train_options *o, int64_t n)
{
    double x;
    if (n < o->warmup) return (double)o->lr * (double)(n + 1) / o->warmup;
    if (o->schedule == DLM_SCHEDULE_CONSTANT) return (double)o->lr;
    x = fmin(1.0, (double)(n - o->warmup) / (o->total - o->warmup));
    if (o->schedule == DLM_SCHEDULE_COSINE) x = 0.5 - 0.5 * cos(3.141592653589793 * x);
    return (double)o->lr + x * ((double)o->lr_min - (double)o->lr);
}

/* Where f32 cannot hold the squares, those of multiples by a power of two, which are the
   same digits; NaN if one of x is not finite. */
static double dlm__sum_of_squares(const dlm__kernels *k, const float *x, int n)
{
    const float plain = k->dot(x, x, n);
    float most, scaled[DLM__GRAD_RUN];
    double down;
    int exponent;
    if (plain > 1e-25f && plain <= FLT_MAX) return (double)plain;
    most = k->magnitude(x, n);
    if (most == 0.0f || most != most) return (double)most;
    frexp((double)most, &exponent);
    down = ldexp(1.0, -exponent);
    for (int i = 0; i < n; i++) scaled[i] = (float)((double)x[i] * down);
    return ldexp((double)k->dot(scaled, scaled, n), 2 * exponent);
}

static void dlm__square_job(void *arg, int i)
{
    const dlm_trainer *t = (const dlm_trainer *)arg;
    const size_t at = (size_t)i * DLM__GRAD_RUN;
    const size_t left = t->model->n_params - at;
    const int n = left < DLM__GRAD_RUN ? (int)left : DLM__GRAD_RUN;
    const dlm__kernels *k = t->ctx->k;
    t->partial[i] = dlm__sum_of_squares(k, t->gradients + at, n)
                  + (double)k->unsound(t->adam_m + at, t->adam_v + at, n);
}

/* Not finite, too, when there are moments that must not meet the weights. */
static double dlm__gradient_norm(dlm_trainer *t)
{
    const int runs = (int)((t->model->n_params + DLM__GRAD_RUN - 1) / DLM__GRAD_RUN);
    double sum = 0.0;
    dlm__parallel(t->ctx, runs, 6.0 * (double)t->model->n_params, dlm__square_job, t);
    for (int i = 0; i < runs; i++) sum += t->partial[i];
    return sqrt(sum);
}

typedef struct dlm__adam {
    dlm_trainer *t;
    float  constants[8];            /* see the kernel                              */
    size_t first, n;                /* the tensor: where, how many                 */
} dlm__adam;

/* Moments without gradients, weights under decay and their averages shrink by a factor
   per update and would end among the denormals, slow and, rounded to themselves, for
   ever.  Every so many updates those become 0. */
enum { DLM__FLUSH_EVERY = 64 };

/* One run of a tensor; its gradients are used up. */
static void dlm__adam_job(void *arg, int i)
{
    const dlm__adam *a = (const dlm__adam *)arg;
    const size_t run = (size_t)i * DLM__GRAD_RUN, at = a->first + run;
    const int n = a->n - run < DLM__GRAD_RUN ? (int)(a->n - run) : DLM__GRAD_RUN;
    const dlm_trainer *t = a->t;
    const dlm__kernels *k = t->ctx->k;
    if (t->steps % DLM__FLUSH_EVERY == 0) {
        k->flush(t->model->weights + at, n);
        k->flush(t->adam_m + at, n);
        k->flush(t->adam_v + at, n);
        if (t->ema) k->flush(t->ema + at, n);
    }
    k->adamw(t->model->weights + at, t->gradients + at, t->adam_m + at, t->adam_v + at, n,
             a->constants);
    memset(t->gradients + at, 0, (size_t)n * sizeof *t->gradients);
    if (t->ema) k->lerp(t->ema + at, t->model->weights + at, 1.0f - t->options.ema, n);
}

/* Moments are biased towards their beginning, 0, by 1 - beta^n (Kingma and Ba 2015,
   section 3): constants 2 and 3 undo that.  Decay is decoupled from the gradient
   (Loshchilov and Hutter 2019) and for matrices only. */
static void dlm__adam_run(dlm_trainer *t, double lr, double clip)
{
    const dlm_train_options *o = &t->options;
    const double n = (double)(t->steps + 1);
    const int tensors = dlm_model_tensors(t->model);
    dlm__adam a;
    a.t = t;
    a.constants[0] = 1.0f - o->beta1;
    a.constants[1] = 1.0f - o->beta2;
    a.constants[2] = (float)(1.0 / (1.0 - pow((double)o->beta1, n)));
    a.constants[3] = (float)(1.0 / (1.0 - pow((double)o->beta2, n)));
    a.constants[4] = o->adam_eps;
    a.constants[5] = (float)lr;
    a.constants[7] = (float)clip;
    for (int i = 0; i < tensors; i++) {
        dlm_tensor x;
        dlm_model_tensor(t->model, i, &x);
        a.constants[6] = x.decayed ? (float)(lr * (double)o->weight_decay) : 0.0f;
        a.first = (size_t)(x.data - t->model->weights);
        a.n = (size_t)x.rows * (size_t)x.cols;
        dlm__parallel(t->ctx, (int)((a.n + DLM__GRAD_RUN - 1) / DLM__GRAD_RUN),
                      12.0 * (double)a.n, dlm__adam_job, &a);
    }
}

/* A norm that is not finite leaves weights and moments alone, but counts as a step: the
   next one draws other noise and may go well. */
DLM_API dlm_error dlm_trainer_update(dlm_trainer *t, dlm_report *report)
{
    const double lr = dlm__learning_rate(&t->options, t->steps);
    const double norm = dlm__gradient_norm(t), limit = (double)t->options.clip;
    const double clip = norm > limit ? limit / norm : 1.0;
    if (norm - norm == 0.0) dlm__adam_run(t, lr, clip);     /* neither NaN nor inf */
    else memset(t->gradients, 0, t->model->n_params * sizeof *t->gradients);
    t->steps++;
    if (report) {
        report->step = t->steps;
        report->grad_norm = norm;
        report->lr = lr;
        report->flops = t->flops;
    }
    t->flops = 0.0;
    return DLM_OK;
}

/* ==[ lift ]==================================================================
   LIFT, learnability-informed fine-tuning (arXiv 2605.22939), changes the masks of a
   noised state before it is learned from.
     1  mask at rate t + rho, more than the noise level t asks for; n tokens
     2  score them by log p of their true, "gold" tokens, unless 3 is random: a forward
        without gradient, the method's cost
     3  keep k = round(n t / (t + rho)) of them; the rest get their gold token back:
        which, the largest of three weights says: easiest t, hardest 1 - t, random
        H t (1 - t).  With H = 3: hardest below t = 1/3, random up to 2/3, then easiest
     4  learn from the kept ones, CE / t, as if only they had been masked            */

DLM_API double dlm_lift_rho(const dlm_address *at, double t, int code_form)
{
    const double u = 1.0 - fmax(0.0, (t - 1e-3) / (1.0 - 1e-3));   /* 1 - t_raw      */
    const double least = !code_form || u <= 0.1 ? 0.0 : 0.1;
    return least + (u - least) * dlm_uniform(at, 0);
}

DLM_API int dlm_lift_count(int n, double t, double rho)
{
    const double fraction = fmin(1.0, fmax(1e-3, t / fmax(t + rho, 1e-3)));
    return n < 1 ? 0 : dlm__min(n, dlm__max(1, (int)rint((double)((float)n
                                                         * (float)fraction))));
}

/* The released code compares these weights as floats, so ties are theirs, too. */
DLM_API dlm_select dlm_lift_mode(double t, int components, double H, dlm_policy policy,
                                 const dlm_address *at)
{
    const float easy = (float)t, hard = (float)(1.0 - t);
    const float any = components == 3 ? (float)(H * t * (1.0 - t)) : 0.0f;
    const int uniform = policy == DLM_POLICY_RANDOM;
    const double to_easy = uniform ? 1.0 : (double)easy;
    const double to_hard = uniform ? 2.0 : (double)easy + (double)hard;
    double u;
    if (policy == DLM_POLICY_TIME || policy == DLM_POLICY_REVERSED) {
        if (components == 3 && any >= easy && any >= hard) return DLM_SELECT_RANDOM;
        return (easy >= hard) == (policy == DLM_POLICY_TIME) ? DLM_SELECT_EASIEST
                                                             : DLM_SELECT_HARDEST;
    }
    u = dlm_uniform(at, 1) * (uniform ? (double)components : to_hard + (double)any);
    return u < to_easy ? DLM_SELECT_EASIEST
        : u < to_hard ? DLM_SELECT_HARDEST : DLM_SELECT_RANDOM;
}

/* What selection goes by, as an integer that is larger for what is kept first: 53 random
   bits, or the score's bits with the negative ones turned around, which sort as floats
   do.  -0 becomes 0, as they are equal. */
static uint64_t dlm__select_key(const float *score, int i, dlm_select mode,
                                const dlm_address *at)
{
    uint32_t bits;
    if (mode == DLM_SELECT_RANDOM)
        return (uint64_t)(dlm_uniform(at, (uint32_t)i) * 9007199254740992.0);   /* 2^53 */
    bits = dlm__bits_scalar(score[i] + 0.0f);
    bits = bits >> 31 ? ~bits : bits | 0x80000000U;
    return mode == DLM_SELECT_HARDEST ? ~bits : bits;
}

/* The k-th largest key is found bit by bit, in as many passes as keys take to tell apart,
   not in k. */
DLM_API int dlm_lift_select(unsigned char *masked, const float *score, int n, int k,
                            dlm_select mode, const dlm_address *at)
{
    uint64_t least = 0;             /* at least k keys are this or more            */
    int kept = 0, ties = k, above = INT_MAX;
    for (int bit = mode == DLM_SELECT_RANDOM ? 52 : 31; bit >= 0 && above != k; bit--) {
        const uint64_t guess = least | (uint64_t)1 << bit;
        int count = 0;
        for (int i = 0; i < n; i++)
            count += masked[i] && dlm__select_key(score, i, mode, at) >= guess;
        if (count < k) continue;
        least = guess;
        above = count;
    }
    for (int i = 0; i < n; i++)
        ties -= masked[i] && dlm__select_key(score, i, mode, at) > least;
    for (int i = 0; i < n; i++) {
        const uint64_t key = masked[i] ? dlm__select_key(score, i, mode, at) : 0;
        masked[i] = masked[i] && (key > least || (key == least && ties-- > 0));
        kept += masked[i];
    }
    return kept;
}

/* --[ choosing ]--------------------------------------------------------------
   A state comes with plain masks at t, weights 1/t or 1. */

static int dlm__bin(double t) { return dlm__min(DLM_BINS - 1, (int)(t * DLM_BINS)); }

/* Called before selection, when all count as rejected, and after it, when those that are
   still masked move over. */
static void dlm__count_gold(const dlm_state *s, const dlm_unit *u, dlm_report *r,
                            int after)
{
    const int bin = dlm__bin(u->t), scored = u->keep != DLM_SELECT_RANDOM;
    for (int i = u->cell + u->blind; i < u->cell + u->n; i++) {
        const double p = exp((double)s->score[i]);
        if (!s->masked[i]) continue;
        if (!after) r->bin_superset[bin]++;
        if (!scored) continue;
        r->bin_rejected[bin] += after ? -1 : 1;
        r->bin_gold_rejected[bin] += after ? -p : p;
        if (after) r->bin_kept[bin]++;
        if (after) r->bin_gold_kept[bin] += p;
    }
}

/* Step 3 for unit u: what is not kept is no longer masked. */
static void dlm__lift_refill(dlm_state *s, const dlm_unit *u, dlm_report *r)
{
    const dlm_address at = dlm__cell_address(s, u, u->cell, DLM_RANDOM_SELECT);
    const int first = u->cell + u->blind;
    int n = 0;
    for (int i = first; i < u->cell + u->n; i++) n += s->masked[i] ? 1 : 0;
    dlm__count_gold(s, u, r, 0);
    dlm_lift_select(s->masked + first, s->score + first, u->n - u->blind,
                    dlm_lift_count(n, u->t, u->rho), u->keep, &at);
    dlm__count_gold(s, u, r, 1);
}

/* Scores are 0 where no row predicts.  With one_pass, units that need them wait for
   dlm__learn_in_one_pass. */
static dlm_error dlm__choose_lift(dlm_trainer *t, dlm_report *r)
{
    const dlm_lift_options *o = &t->options.lift;
    dlm_state *s = t->state;
    dlm_error e = DLM_OK;
    for (int k = 0; k < s->n_units; k++) {
        dlm_unit *u = &s->units[k];
        const dlm_address at = dlm__cell_address(s, u, u->cell, DLM_RANDOM_LIFT);
        u->rho = dlm_lift_rho(&at, u->t, o->rho_code_form);
        u->keep = o->method == DLM_METHOD_TOP_K ? DLM_SELECT_EASIEST
            : o->method == DLM_METHOD_BOTTOM_K ? DLM_SELECT_HARDEST
            : o->method == DLM_METHOD_RANDOM_K ? DLM_SELECT_RANDOM
            : dlm_lift_mode(u->t, o->method == DLM_METHOD_LIFT3 ? 3 : 2, (double)o->H,
                            o->policy, &at);
        u->wanted = u->keep != DLM_SELECT_RANDOM;
        dlm_state_mask(s, k, u->t + u->rho);
    }
    memset(s->score, 0, (size_t)s->n_cells * sizeof *s->score);
    if (!o->one_pass) e = dlm_state_layout(s, 0);
    if (!o->one_pass && e == DLM_OK)
        e = dlm_trainer_forward(t, &s->batch, dlm_state_gold, s);
    for (int k = 0; k < s->n_units && e == DLM_OK; k++) {
        if (!o->one_pass || s->units[k].keep == DLM_SELECT_RANDOM)
            dlm__lift_refill(s, &s->units[k], r);
        s->units[k].wanted = 1;
    }
    return e;
}

/* The approximation: scores come from the pass that learns.  The head runs twice, first
   to score, then with the rejected rows weighing nothing; they stay masked. */
static dlm_error dlm__learn_in_one_pass(dlm_trainer *t, dlm_report *r)
{
    dlm_state *s = t->state;
    const dlm_batch *b = &s->batch;
    dlm_error e = dlm__take_batch(t->work, b);
    if (e != DLM_OK || b->n_out == 0) return e;
    dlm__layers_forward(t->work, t->model, 1);
    dlm__head(t->work, t->model, NULL, dlm_state_gold, s);
    for (int k = 0; k < s->n_units; k++)
        if (s->units[k].keep != DLM_SELECT_RANDOM) dlm__lift_refill(s, &s->units[k], r);
    for (int i = 0; i < b->n_out; i++)
        if (!s->masked[s->out_cell[i]]) s->out_weight[i] = 0.0f;
    dlm__head(t->work, t->model, t->gradients, dlm_state_loss, s);
    dlm__layers_backward(t->work, t->model, t->gradients);
    t->flops += 3.0 * dlm_forward_flops(&t->model->config, b);
    return DLM_OK;
}

/* The second view: what was masked is seen and what was seen is masked, 1/(1-t). */
static void dlm__complement(dlm_state *s, int time_scaling)
{
    for (int i = 0; i < s->batch.n_out; i++) s->out_weight[i] *= 0.5f;
    for (int k = 0; k < s->n_units; k++) {
        dlm_unit *u = &s->units[k];
        u->t = fmax(1.0 - u->t, 1e-3);
        for (int i = u->cell; i < u->cell + u->n; i++) s->masked[i] = !s->masked[i];
        dlm__weigh(s, k, time_scaling ? 0.5 * (1.0 / u->t) : 0.5);
    }
}

/* ==[ steps ]=================================================================
   One update, from examples: states, as many as they need, and the optimizer. */

static void dlm__report_state(dlm_report *r, const dlm_state *s)
{
    for (int i = 0; i < s->batch.n_out; i++) {
        const int bin = dlm__bin((double)s->out_level[i]);
        if (s->out_weight[i] == 0.0f) continue;
        r->loss += s->loss[i] * (double)s->out_weight[i] * s->scale;
        r->bin_loss[bin] += s->loss[i];
        r->bin_count[bin]++;
        r->scored++;
    }
}

/* The state, noised, once through the model.  To evaluate is to take the plain bound,
   whatever the options. */
static dlm_error dlm__run_state(dlm_trainer *t, int learn, dlm_report *r)
{
    const dlm_lift_options *o = &t->options.lift;
    const int lift = learn && !o->choose && o->method != DLM_METHOD_VANILLA;
    dlm_state *s = t->state;
    dlm_error e = DLM_OK;
    for (int k = 0; k < s->n_units && learn && o->no_time_scaling; k++)
        dlm__weigh(s, k, 1.0);
    if (lift) e = dlm__choose_lift(t, r);
    else if (learn && o->choose) e = o->choose(o->choose_user, t);
    if (e == DLM_OK) e = dlm_state_layout(s, 0);
    if (e == DLM_OK && learn && o->complementary) {
        dlm__complement(s, !o->no_time_scaling);
        e = dlm_state_layout(s, 1);
    }
    if (e != DLM_OK) return e;
    if (lift && o->one_pass) e = dlm__learn_in_one_pass(t, r);
    else e = dlm__pass(t, &s->batch, dlm_state_loss, s, learn);
    if (e == DLM_OK) dlm__report_state(r, s);
    return e;
}

static double dlm__mean(double sum, int64_t n) { return n ? sum / (double)n : 0.0; }

/* All examples, once checked, through as many passes as they need.  loss is normalised by
   r->tokens, those that could carry loss, so that it does not depend on the passes. */
static dlm_error dlm__run_examples(dlm_trainer *t, const dlm_example *e, int n,
                                   uint64_t seed, uint32_t step, int learn, dlm_report *r)
{
    dlm_state *s = t->state;
    const int views = 1 + t->options.lift.complementary, unit = dlm__unit_length(s);
    dlm_error error = dlm__check_examples(s, e, n, views);
    dlm_noise noise;
    memset(r, 0, sizeof *r);
    if (error != DLM_OK) return error;
    memset(&noise, 0, sizeof noise);
    noise.seed = seed;
    noise.step = step;
    noise.independent = t->options.independent_levels;
    noise.lo = learn ? (double)t->options.level_min : 0.0;
    noise.hi = learn ? (double)t->options.level_max : 0.0;
    for (int k = 0; k < n; k++) {
        r->tokens += dlm__could_carry(s, &e[k]);
        noise.all += dlm__ceil_div(e[k].length - e[k].prompt, unit);
    }
    for (int i = 0; i < n && error == DLM_OK; i += s->n_examples) {
        dlm__state_take(s, e + i, n - i, views, s->rows);
        noise.row = i;
        dlm_state_noise(s, &noise);
        noise.first += s->n_units;
        s->scale = 1.0 / (double)(r->tokens > 0 ? r->tokens : 1);
        error = dlm__run_state(t, learn, r);
    }
    for (int bin = 0; bin < DLM_BINS; bin++) {
        r->bin_loss[bin] = dlm__mean(r->bin_loss[bin], r->bin_count[bin]);
        r->bin_gold_kept[bin] = dlm__mean(r->bin_gold_kept[bin], r->bin_kept[bin]);
        r->bin_gold_rejected[bin] = dlm__mean(r->bin_gold_rejected[bin],
                                              r->bin_rejected[bin]);
    }
    return error;
}

DLM_API dlm_error dlm_trainer_step(dlm_trainer *t, const dlm_example *examples, int n,
                                   dlm_report *report)
{
    dlm_report local, *r = report ? report : &local;
    dlm_error e = dlm__run_examples(t, examples, n, t->options.seed, (uint32_t)t->steps,
                                    1, r);
    return e == DLM_OK ? dlm_trainer_update(t, r) : e;
}

/* The first token of a window is uniform over all places where a window fits. */
DLM_API dlm_error dlm_trainer_step_text(dlm_trainer *t, const int *tokens,
                                        size_t n_tokens, int T, int B, dlm_report *report)
{
    const int max_seq = t->model->config.max_seq, rows = t->state->rows;
    if (report) memset(report, 0, sizeof *report);
    if (T < 1 || T > max_seq || (size_t)T > n_tokens)
        return dlm__fail(t->ctx, DLM_E_INPUT, "window: T = %d is not in 1..%d (max_seq), "
                         "or the text has fewer tokens (%.0f)", T, max_seq,
                         (double)n_tokens);
    if (B < 1 || B > rows)
        return dlm__fail(t->ctx, DLM_E_INPUT, "windows: %d is not in 1..%d (max_rows)", B,
                         rows);
    for (int i = 0; i < B; i++) {
        const dlm_address at = dlm__address(t->options.seed, DLM_RANDOM_DATA,
                                            (uint32_t)t->steps, (uint32_t)i, 0);
        const double u = dlm_uniform(&at, 0);
        t->windows[i].tokens = tokens + (size_t)(u * (double)(n_tokens - (size_t)T + 1));
        t->windows[i].length = T;
    }
    return dlm_trainer_step(t, t->windows, B, report);
}

/* Over all levels, and never the noise that was trained on. */
DLM_API dlm_error dlm_trainer_evaluate(dlm_trainer *t, const dlm_example *examples, int n,
                                       uint32_t draw, dlm_report *report)
{
    const double flops = t->flops;
    dlm_error e = dlm__run_examples(t, examples, n, ~t->options.seed, draw, 0, report);
    if (e == DLM_OK) report->step = t->steps;
    report->flops = t->flops - flops;
    t->flops = flops;
    return e;
}

/* ==[ sampler ]===============================================================
   A state machine per sequence: the active block [a, e) loses its masks step by step,
   then the next block that has some becomes active.  A step has three parts; the network
   runs between the first two:
       ask      which positions are candidates, which rows must be run to see them
       score    the logits of a row -> a token, its probability, how it is ranked
       answer   the best ranked are written on the canvas, as many as the order says
   What a step runs.  The pattern is BLOCK, a prompt of 3, blocks of 4, two tokens a step,
   a cache; the digits are the steps in which the row of that slot is run:

       slot             0 1 2   3 4 5 6   7 8 9 10   11 12 13 14
       step 1           1 1 1   1 1 1 1                            fills in 4 and 5
       step 2                   2 2 2 2                            fills in 3 and 6
       step 3                   3 3 3 3   3 3 3 3                  fills in two of 7..10
       step 4                             4 4 4 4                  and the other two
       step 5                             5 5 5 5    5  5  5  5

   Keys and values that a row leaves in the cache are final when it and all it saw were
   clean: those of 3..6 not before step 3, which stores them along with the first step
   of the next block, without a forward of its own.  The last block needs none of that.
   CAUSAL is the same with blocks of one, where the row to store is the row that
   predicts.  FULL runs the whole canvas every time; without a cache BLOCK and CAUSAL run
   everything from slot 0 to there. */

typedef struct dlm__sequence {      /* one text that is being filled in            */
    int  *canvas;                   /* (length) the caller's                       */
    unsigned char *marks;           /* (length) dlm__mark                          */
    int   length;                   /* tokens                                      */
    int   offset;                   /* blocks begin at slots congruent to it       */
    int   a, e;                     /* the active block                            */
    int   cached;                   /* rows [0, cached) have final keys and values */
    int   from, to;                 /* the rows of this step                       */
    int   step, block_step;         /* steps done in all; in this block            */
    int   block_masks;              /* masks when the block became active          */
    int   end;                      /* tokens that count: up to the stop           */
    int   done;
    float time;                     /* noise level in this block: 1 .. 0           */
    int   first, n;                 /* its candidates of this step                 */
} dlm__sequence;

enum dlm__mark { DLM__GIVEN = 1, DLM__REMASKED };       /* neither is masked again  */

typedef struct dlm__guess {         /* what the logits of one row say              */
    int   token;                    /* negative: DLM__UNSEEN, or see dlm__decide   */
    float confidence;               /* its probability                             */
    float rank;                     /* the largest first                           */
} dlm__guess;

enum { DLM__UNSEEN = INT_MIN };     /* asked for, logits not shown yet             */

typedef struct dlm__candidate {     /* a position whose logits are wanted          */
    int   seq, position;
    int   check;                    /* already filled in; is it still likely?      */
    int   out;                      /* the row looked at that predicts it          */
    dlm__guess guess;
} dlm__candidate;

struct dlm_sampler {
    dlm_ctx           *ctx;
    dlm_session       *s;           /* NULL: rows are run by whoever asks          */
    dlm_config         c;
    dlm_limits         lim;         /* both with every default filled in           */
    dlm_sample_options opt;
    int                n_seqs;
    dlm__sequence     *seqs;        /* (lim.seqs)                                  */
    unsigned char     *marks;       /* (seqs, slots)                               */
    dlm__candidate    *cands;       /* (seqs, slots)                               */
    int                n_cands;
    dlm__guess        *guesses;     /* (rows) of the rows looked at                */
    int               *wanted_by;   /* (rows) looked at: first candidate of each   */
    float             *kept;        /* (out, V) guidance: logits of both sides     */
    int               *start, *lanes, *tokens, *slots, *out_rows;   /* the batch    */
    dlm_keys          *keys;
    dlm_batch          batch;       /* as it was asked; n_seqs 0: not, or answered */
    dlm_event         *trace;
    int                n_events, forwards;
    double             flops;
};

/* What the orders rank by, always the largest first.  Those that are blind know their
   positions before they see logits, so only these rows are looked at; all they drew is
   committed, and the rank is merely the order in the trace. */
typedef enum dlm__by {
    DLM__BY_TOKEN,                  /* p of the token that was drawn               */
    DLM__BY_BEST,                   /* p of the most likely token                  */
    DLM__BY_MARGIN,                 /* what that is above the second               */
    DLM__BY_CERTAINTY,              /* minus the entropy                           */
    DLM__BY_DRAWN                   /* the same of what is drawn from              */
} dlm__by;

static const struct { const char *name; dlm__by by; int blind; }
dlm__orders[DLM_ORDER_COUNT] = {                    /* in the order of dlm_order    */
    { "confidence",    DLM__BY_TOKEN, 0 },     { "threshold",  DLM__BY_TOKEN,  0 },
    { "entropy",       DLM__BY_CERTAINTY, 0 }, { "entropy bound", DLM__BY_DRAWN, 0 },
    { "margin",        DLM__BY_MARGIN, 0 },    { "random",     DLM__BY_BEST,   1 },
    { "sequential",    DLM__BY_BEST, 1 },      { "ancestral",  DLM__BY_BEST,   1 },
    { "first hitting", DLM__BY_BEST, 1 },
};

static void dlm__sampler_carve(dlm__arena *a, void *object)
{
    dlm_sampler *sm = (dlm_sampler *)object;
    const dlm_limits *lim = &sm->lim;
    const dlm_sample_options *o = &sm->opt;
    const size_t rows = (size_t)lim->rows, seqs = (size_t)lim->seqs;
    const size_t cells = seqs * (size_t)lim->slots;
    /* With list_drawn each of at most 2 block steps of a block lists all its cells. */
    const int listed = o->list_drawn ? dlm__min(o->block, lim->slots) : 1;
    sm->seqs = (dlm__sequence *)dlm__push(a, seqs, sizeof(dlm__sequence));
    sm->marks = (unsigned char *)dlm__push(a, cells, 1);
    sm->cands = (dlm__candidate *)dlm__push(a, cells, sizeof(dlm__candidate));
    sm->guesses = (dlm__guess *)dlm__push(a, rows, sizeof(dlm__guess));
    sm->wanted_by = dlm__push_ints(a, rows);
    sm->kept = dlm__push_floats(a, o->guidance != 0.0f ? (size_t)lim->out : 0,
                                (size_t)sm->c.vocab);
    sm->start = dlm__push_ints(a, seqs + 1);
    sm->lanes = dlm__push_ints(a, seqs);
    sm->tokens = dlm__push_ints(a, rows);
    sm->slots = dlm__push_ints(a, rows);
    sm->out_rows = dlm__push_ints(a, rows);
    sm->keys = (dlm_keys *)dlm__push(a, rows, sizeof(dlm_keys));
    sm->trace = (dlm_event *)dlm__push(a, 2 * cells, (size_t)listed * sizeof(dlm_event));
}

static dlm_error dlm__sample_tokens(dlm_ctx *ctx, const char *name, const int *list,
                                    int n, int vocab)
{
    if (n < 0 || (n > 0 && list == NULL))
        return dlm__fail(ctx, DLM_E_CONFIG, "%s: %d tokens at %p", name, n,
                         (const void *)list);
    for (int i = 0; i < n; i++)
        if (list[i] < 0 || list[i] >= vocab)
            return dlm__fail(ctx, DLM_E_CONFIG, "%s[%d]: %d is not in 0..%d", name, i,
                             list[i], vocab - 1);
    return DLM_OK;
}

static dlm_error dlm__sample_bias(dlm_ctx *ctx, const float *bias, int vocab)
{
    for (int v = 0; bias && v < vocab; v++)
        if (!(bias[v] < INFINITY))
            return dlm__fail(ctx, DLM_E_CONFIG, "logit_bias[%d]: %s, wants a number or "
                             "-infinity", v, bias[v] > 0.0f ? "+infinity" : "NaN");
    return DLM_OK;
}

/* What depends on the model: tokens of its vocabulary, its mask, its blocks. */
static dlm_error dlm__sample_resolve(dlm_ctx *ctx, const dlm_config *c,
                                     const dlm_sample_options *opt, dlm_sample_options *o)
{
    dlm_error e;
    memset(o, 0, sizeof *o);
    if (opt) *o = *opt;
    e = dlm__resolve(ctx, "", dlm__sample_options, o);
    if (e == DLM_OK) e = dlm__sample_tokens(ctx, "suppress", o->suppress, o->n_suppress,
                                            c->vocab);
    if (e == DLM_OK) e = dlm__sample_tokens(ctx, "stop", o->stop, o->n_stop, c->vocab);
    if (e == DLM_OK) e = dlm__sample_bias(ctx, o->logit_bias, c->vocab);
    if (e != DLM_OK) return e;
    if (o->remask_below > 0.0f && dlm__orders[o->order].blind)
        return dlm__fail(ctx, DLM_E_CONFIG, "remask_below: order %s does not look at "
                         "probabilities", dlm__orders[o->order].name);
    if (o->guidance != 0.0f && c->mask_id >= c->vocab)
        return dlm__fail(ctx, DLM_E_CONFIG, "guidance: the model has no mask token");
    if (o->block == 0) o->block = c->pattern == DLM_PATTERN_FULL ? 1 << 20 : c->block;
    if (c->pattern == DLM_PATTERN_CAUSAL) o->block = 1;
    return DLM_OK;
}

/* A config with the seven fields that the sampler reads; the rest is made up to be valid,
   and never looked at. */
DLM_API dlm_error dlm_sampler_create_for(dlm_sampler **out, dlm_ctx *ctx,
                                         const dlm_config *config, const dlm_limits *lim,
                                         const dlm_sample_options *opt, dlm_memory *mem)
{
    dlm_sampler draft, *sm;
    dlm_config *c = &draft.c;
    dlm_error e;
    memset(&draft, 0, sizeof draft);
    draft.ctx = ctx;
    c->vocab = config->vocab; c->max_seq = config->max_seq; c->block = config->block;
    c->mask_id = config->mask_id; c->mask_is_0 = config->mask_is_0;
    c->pattern = config->pattern; c->shifted = config->shifted;
    c->dim = 2; c->layers = c->heads = 1;   /* whatever, the network is not ours   */
    e = dlm_config_resolve(ctx, c);
    if (e == DLM_OK) e = dlm__limits_resolve(ctx, lim, c->max_seq, &draft.lim);
    if (e == DLM_OK) e = dlm__sample_resolve(ctx, c, opt, &draft.opt);
    sm = (dlm_sampler *)dlm__make(&e, ctx, "sampler", dlm__sampler_carve, &draft,
                                  sizeof draft, out != NULL, mem);
    if (out) *out = sm;
    return e;
}

DLM_API dlm_error dlm_sampler_create(dlm_sampler **out, dlm_session *s,
                                     const dlm_sample_options *opt, dlm_memory *mem)
{
    const dlm_limits lim = dlm__limits_of(&s->w);
    dlm_error e = dlm_sampler_create_for(out, s->w.ctx, &s->w.c, &lim, opt, mem);
    if (e != DLM_OK || out == NULL) return e;
    (*out)->s = s;
    (*out)->c = s->w.c;
    return e;
}

DLM_API void dlm_sampler_free(dlm_sampler *sm) { dlm__unmake(sm); }

/* --[ blocks ]----------------------------------------------------------------  */

/* In the active block. */
static int dlm__count_masks(const dlm_sampler *sm, const dlm__sequence *q)
{
    int n = 0;
    for (int i = q->a; i < q->e; i++) n += q->canvas[i] == sm->c.mask_id;
    return n;
}

/* Makes the next block with masks active, or ends the sequence. */
static void dlm__next_block(const dlm_sampler *sm, dlm__sequence *q)
{
    do {
        q->a = q->e;
        q->e = q->a < q->offset ? q->offset : q->a + sm->opt.block;
        q->e = dlm__min(q->e, q->length);
        q->block_masks = dlm__count_masks(sm, q);
    } while (q->block_masks == 0 && q->a < q->length);
    q->block_step = 0;
    q->time = 1.0f;
    q->done = q->block_masks == 0;
}

/* Masks and tokens of the vocabulary; CAUSAL cannot predict the first token. */
static dlm_error dlm__check_canvas(const dlm_sampler *sm, int seq, const int *canvas,
                                   int length)
{
    const dlm_config *c = &sm->c;
    const int most = dlm__min(sm->lim.slots, c->max_seq);
    if (length < 1 || length > most)
        return dlm__fail(sm->ctx, DLM_E_INPUT, "canvas %d: length %d is not in 1..%d",
                         seq, length, most);
    for (int i = 0; i < length; i++)
        if (canvas[i] != c->mask_id && (canvas[i] < 0 || canvas[i] >= c->vocab))
            return dlm__fail(sm->ctx, DLM_E_INPUT, "canvas %d: token %d at %d is not in "
                             "0..%d", seq, canvas[i], i, c->vocab - 1);
    if (c->pattern == DLM_PATTERN_CAUSAL && canvas[0] == c->mask_id)
        return dlm__fail(sm->ctx, DLM_E_INPUT, "canvas %d: a causal model needs a first "
                         "token to go on from", seq);
    return DLM_OK;
}

/* What is visible now stays; the prompt is what of it has no mask before. */
static void dlm__begin_sequence(const dlm_sampler *sm, int seq, int *canvas, int length)
{
    dlm__sequence *q = &sm->seqs[seq];
    unsigned char *marks = sm->marks + (size_t)seq * (size_t)sm->lim.slots;
    int prompt = 0;
    memset(q, 0, sizeof *q);
    q->canvas = canvas;
    q->marks = marks;
    q->length = q->end = length;
    for (int i = 0; i < length; i++)
        marks[i] = canvas[i] != sm->c.mask_id ? DLM__GIVEN : 0;
    while (prompt < length && marks[prompt]) prompt++;      /* the visible prefix   */
    q->offset = sm->opt.absolute_blocks ? 0 : prompt % sm->opt.block;
    dlm__next_block(sm, q);
}

DLM_API dlm_error dlm_sampler_begin(dlm_sampler *sm, int *canvas, const int *lengths,
                                    int n_seqs)
{
    const int seqs = sm->lim.seqs, slots = sm->lim.slots;
    const int room = sm->opt.guidance != 0.0f ? seqs / 2 : seqs;
    dlm_error e = DLM_OK;
    if (n_seqs < 1 || n_seqs > room)
        return dlm__fail(sm->ctx, DLM_E_INPUT, "canvas: %d sequences, room for %d%s",
                         n_seqs, room, room < seqs ? " (guidance doubles them)" : "");
    for (int s = 0; s < n_seqs && e == DLM_OK; s++)
        e = dlm__check_canvas(sm, s, canvas + (size_t)s * (size_t)slots, lengths[s]);
    if (e != DLM_OK) return e;
    sm->n_seqs = n_seqs;
    sm->batch.n_seqs = sm->n_events = sm->forwards = 0;
    sm->flops = 0.0;
    for (int s = 0; s < n_seqs; s++)
        dlm__begin_sequence(sm, s, canvas + (size_t)s * (size_t)slots, lengths[s]);
    return DLM_OK;
}

DLM_API int dlm_sampler_done(const dlm_sampler *sm)
{
    for (int s = 0; s < sm->n_seqs; s++)
        if (!sm->seqs[s].done) return 0;
    return 1;
}

DLM_API int dlm_sampler_length(const dlm_sampler *sm, int seq)
{
    return sm->seqs[seq].end;
}

DLM_API const dlm_event *dlm_sampler_trace(const dlm_sampler *sm, int *n_events)
{
    *n_events = sm->n_events;
    return sm->trace;
}

DLM_API void dlm_sampler_steps(const dlm_sampler *sm, int seq, int *steps)
{
    memset(steps, 0, (size_t)sm->seqs[seq].end * sizeof *steps);
    for (int i = 0; i < sm->n_events; i++) {
        const dlm_event *e = &sm->trace[i];
        if (e->seq == seq && e->position < sm->seqs[seq].end && !e->drawn_only)
            steps[e->position] = e->step;
    }
}

DLM_API void dlm_sampler_cost(const dlm_sampler *sm, int *forwards, double *flops)
{
    *forwards = sm->forwards;
    *flops = sm->flops;
}

/* --[ ask: which positions ]--------------------------------------------------  */

/* The plan: tokens to fill in this step, if there are as many: cells // steps, one more
   in the first cells % steps steps.  Cells: the size of the block, when FULL the masks it
   began with.  A block of 8 in 3 steps: 3, 3, 2; in 12 steps: 1 each, eight times. */
static int dlm__planned(const dlm_sampler *sm, const dlm__sequence *q)
{
    const int full = sm->c.pattern == DLM_PATTERN_FULL;
    const int cells = full ? q->block_masks : sm->opt.block;
    const int steps = sm->opt.steps ? sm->opt.steps : cells;
    return dlm__max(cells / steps + (q->block_step < cells % steps), 1);
}

static double dlm__sampler_uniform(const dlm_sampler *sm, const dlm__sequence *q,
                                   uint32_t purpose, int step, int position)
{
    const dlm_sample_options *o = &sm->opt;
    const uint32_t seq = (uint32_t)(q - sm->seqs);
    const dlm_address at = dlm__address(o->seed, purpose, (uint32_t)step,
                                        o->ids ? o->ids[seq] : seq, (uint32_t)position);
    return o->uniform ? o->uniform(o->uniform_user, &at) : dlm_uniform(&at, 0);
}

/* The order of candidates: larger rank first, of equal ones the left one. */
static int dlm__comes_before(const dlm__candidate *a, const dlm__candidate *b)
{
    if (a->guess.rank != b->guess.rank) return a->guess.rank > b->guess.rank;
    return a->position < b->position;
}

/* Shell's sort: insertion along ever smaller gaps .. 40, 13, 4, 1 (Knuth, TAOCP 3). */
static void dlm__sort(dlm__candidate *c, int n)
{
    int gap = 1;
    while (gap < n / 3) gap = 3 * gap + 1;
    for (; gap > 0; gap /= 3)
        for (int i = gap, j; i < n; i++) {
            const dlm__candidate moved = c[i];
            for (j = i; j >= gap && dlm__comes_before(&moved, &c[j - gap]); j -= gap)
                c[j] = c[j - gap];
            c[j] = moved;
        }
}

/* What blind orders rank by before there are logits.  ANCESTRAL, the turn: from t to s
   each mask is revealed with probability 1 - s/t, which is 1/(steps - k) at step k of
   `steps` even ones; its step is then uniform on 0 .. steps - 1 and independent of the
   others, so it can be drawn at once, the same number whenever it is asked for. */
static float dlm__blind_rank(const dlm_sampler *sm, const dlm__sequence *q, int position,
                             int steps)
{
    const int once = sm->opt.order == DLM_ORDER_ANCESTRAL;
    double u;
    if (sm->opt.order == DLM_ORDER_SEQUENTIAL) return (float)-position;
    u = dlm__sampler_uniform(sm, q, DLM_RANDOM_ORDER, once ? 0 : q->step, position);
    return once ? (float)-(int)(steps * u) : (float)-u;
}

/* Keeps the `keep` candidates, or all whose turn is next, that a blind order looks at,
   left to right.  Ancestral steps that reveal nothing need no forward and are passed over
   (the cache of MDLM). */
static void dlm__keep_blindly(const dlm_sampler *sm, dlm__sequence *q, dlm__candidate *c,
                              int keep)
{
    const int steps = sm->opt.steps ? sm->opt.steps : q->block_masks;
    for (int i = 0; i < q->n; i++)
        c[i].guess.rank = dlm__blind_rank(sm, q, c[i].position, steps);
    dlm__sort(c, q->n);
    if (sm->opt.order == DLM_ORDER_ANCESTRAL) {
        for (keep = 1; keep < q->n && c[keep].guess.rank == c->guess.rank; ) keep++;
        q->time = ((float)steps + c->guess.rank - 1.0f) / (float)steps;
    }
    q->n = dlm__min(q->n, keep);
    for (int i = 0; i < q->n; i++) c[i].guess.rank = 0.0f;      /* now by position  */
    dlm__sort(c, q->n);
}

/* The candidates of one sequence, left to right: the masks of its block, or those a blind
   order has already settled on; with remasking also the tokens that may be taken back.
   (Tokens 0 and 1 of a shifted model share a row and are left alone.) */
static void dlm__find_candidates(dlm_sampler *sm, int seq)
{
    dlm__sequence *q = &sm->seqs[seq];
    dlm__candidate *c = sm->cands + sm->n_cands;
    const dlm_order order = sm->opt.order;
    const int plan = dlm__planned(sm, q);
    q->first = sm->n_cands;
    q->n = 0;
    for (int i = q->a; i < q->e; i++) {
        const int check = q->canvas[i] != sm->c.mask_id;
        if (check && (sm->opt.remask_below == 0.0f || q->marks[i]
                      || i < 2 * sm->c.shifted)) continue;
        c[q->n].seq = seq;
        c[q->n].position = i;
        c[q->n++].check = check;
    }
    if (dlm__orders[order].blind)
        dlm__keep_blindly(sm, q, c, order == DLM_ORDER_FIRST_HITTING ? 1 : plan);
    sm->n_cands += q->n;
}

/* --[ ask: which rows ]-------------------------------------------------------  */

static int dlm__predictor(const dlm_sampler *sm, int position)
{
    return sm->c.shifted ? dlm__max(0, position - 1) : position;
}

static void dlm__choose_rows(const dlm_sampler *sm, dlm__sequence *q)
{
    const int full = sm->c.pattern == DLM_PATTERN_FULL;
    const int causal = sm->c.pattern == DLM_PATTERN_CAUSAL;
    q->from = full || !sm->lim.cached ? 0
            : dlm__min(q->cached, dlm__predictor(sm, q->a));
    q->to = full ? q->length : causal ? q->a : q->e;
}

/* Adds a sequence to the batch; slot i of it becomes row base + i.  Unguided: all given
   tokens are masked, in a lane of its own.  What is given never changes, so the cached
   keys of that lane stay right, too. */
static void dlm__add_rows(dlm_sampler *sm, int seq, int unguided)
{
    const dlm__sequence *q = &sm->seqs[seq];
    dlm_batch *b = &sm->batch;
    const int base = sm->start[b->n_seqs] - q->from;
    for (int i = q->from; i < q->to; i++) {
        const int masked = unguided && q->marks[i] == DLM__GIVEN;
        sm->tokens[base + i] = masked ? sm->c.mask_id : q->canvas[i];
        sm->slots[base + i] = i;
        sm->keys[base + i] = dlm__keys_of(i, q->length, (dlm_pattern)sm->c.pattern,
                                          sm->opt.block, q->offset);
    }
    for (int i = q->first; i < q->first + q->n; i++) {
        const int row = base + dlm__predictor(sm, sm->cands[i].position);
        if (b->n_out == 0 || sm->out_rows[b->n_out - 1] != row) {
            sm->guesses[b->n_out].token = DLM__UNSEEN;
            sm->wanted_by[b->n_out] = i;
            sm->out_rows[b->n_out++] = row;
        }
        if (!unguided) sm->cands[i].out = b->n_out - 1;
    }
    sm->lanes[b->n_seqs++] = unguided ? seq + sm->lim.seqs / 2 : seq;
    sm->start[b->n_seqs] = base + q->to;
}

/* Rows first, candidates after: nothing is changed when the room is not enough.  With
   guidance the second half of the sequences are the same rows, given tokens masked. */
DLM_API dlm_error dlm_sampler_ask(dlm_sampler *sm, dlm_batch *out)
{
    const int sides = sm->opt.guidance != 0.0f ? 2 : 1;
    dlm_batch *b = &sm->batch;
    int rows = 0;
    memset(b, 0, sizeof *b);
    b->start = sm->start; b->tokens = sm->tokens; b->slots = sm->slots;
    b->lanes = sm->lanes; b->keys = sm->keys; b->out_rows = sm->out_rows;
    for (int s = 0; s < sm->n_seqs; s++) {
        dlm__sequence *q = &sm->seqs[s];
        if (q->done) continue;
        dlm__choose_rows(sm, q);
        rows += q->to - q->from;
    }
    if (rows < 1 || rows * sides > sm->lim.rows)
        return dlm__fail(sm->ctx, DLM_E_INPUT, "a step needs %d rows%s, there is room "
                         "for %d", rows * sides, rows ? "" : " when all is done",
                         sm->lim.rows);
    sm->n_cands = 0;
    for (int s = 0; s < sides * sm->n_seqs; s++) {
        const int seq = s % sm->n_seqs, unguided = s >= sm->n_seqs;
        if (sm->seqs[seq].done) continue;
        if (!unguided) dlm__find_candidates(sm, seq);
        dlm__add_rows(sm, seq, unguided);
    }
    if (b->n_out <= sm->lim.out) {
        *out = *b;
        return DLM_OK;
    }
    b->n_seqs = 0;
    return dlm__fail(sm->ctx, DLM_E_INPUT, "a step looks at %d rows, there is room for "
                     "%d", b->n_out, sm->lim.out);
}

/* --[ decide ]----------------------------------------------------------------
   Of the logits of one row: which token, how likely, what rank. */

/* Floats that are not negative sort like their bits, so a threshold can be found by
   bisection on the bits: the smallest bits b for which keep(b) holds. */
static float dlm__bisect(const float *w, int V, double limit, int by_mass)
{
    union { uint32_t u; float f; } lo, hi, mid;
    lo.u = 0;                                   /* keeps everything                */
    hi.f = 2.0f;                                /* above every weight              */
    while (hi.u - lo.u > 1) {
        double above = 0.0;
        mid.u = lo.u + (hi.u - lo.u) / 2;
        /* by mass: what lies above mid; by count: what is at least mid */
        for (int v = 0; v < V; v++)
            above += by_mass ? (w[v] > mid.f ? (double)w[v] : 0.0)
                             : (w[v] >= mid.f ? 1.0 : 0.0);
        if (by_mass ? above > limit : above >= limit) lo = mid;
        else hi = mid;
    }
    return by_mass ? hi.f : lo.f;
}

static void dlm__drop_below(float *w, int V, float least)
{
    for (int v = 0; v < V; v++) if (w[v] < least) w[v] = 0.0f;
}

/* top-k keeps what is at least the k-th largest; top-p keeps a token while the mass
   before it is at most p; min-p what is at least min_p times the largest.  Ties stay
   together.  w (V) are weights with largest 1; each filter sees what the last left. */
static void dlm__filter(float *w, int V, int top_k, float top_p, float min_p)
{
    if (top_k > 0 && top_k < V)
        dlm__drop_below(w, V, dlm__bisect(w, V, (double)top_k, 0));
    if (top_p > 0.0f && top_p < 1.0f) {
        double total = 0.0;
        for (int v = 0; v < V; v++) total += (double)w[v];
        dlm__drop_below(w, V, dlm__bisect(w, V, (double)top_p * total, 1));
    }
    if (min_p > 0.0f) dlm__drop_below(w, V, min_p);
}

/* The token v with probability w_v / sum w that u in [0, 1) draws: the inverted CDF. */
static int dlm__draw(const float *w, int V, double u)
{
    double total = 0.0, before = 0.0;
    int drawn = 0;
    for (int v = 0; v < V; v++) total += (double)w[v];
    for (int v = 0; v < V; v++) {
        if (w[v] <= 0.0f) continue;
        before += (double)w[v];
        drawn = v;
        if (before > total * u) break;
    }
    return drawn;
}

/* Weights e^((x - max) / T) instead of logits x (V), the largest 1.  1/T stays finite. */
static void dlm__temper(const dlm__kernels *k, float *x, int V, float max, float T)
{
    const float cold = 1.0f / fmaxf(T, 1e-37f), least = -200.0f / cold;    /* e^-200: 0 */
    for (int v = 0; v < V; v++) x[v] = (x[v] - max < least ? least : x[v] - max) * cold;
    k->exp_scaled(x, x, V, 0.0f, 1.0f);
}

/* In nats, of the distribution that weights (V) stand for. */
static double dlm__entropy(const float *w, int V)
{
    double sum = 0.0, sum_log = 0.0;
    for (int v = 0; v < V; v++) {
        if (w[v] <= 0.0f) continue;
        sum += (double)w[v];
        sum_log += (double)w[v] * log((double)w[v]);
    }
    return log(sum) - sum_log / sum;
}

/* Second largest logit, for the margin. */
static float dlm__runner_up(const dlm__kernels *k, const float *logits, int V, int argmax)
{
    const float *after = logits + argmax + 1;
    return fmaxf(k->max(logits, argmax), k->max(after, V - argmax - 1));
}

static dlm_error dlm__fail_softmax(dlm_ctx *ctx, const dlm__candidate *c, int V)
{
    if (~c->guess.token == V)
        return dlm__fail(ctx, DLM_E_INPUT, "sequence %d, position %d: every token is "
                         "forbidden", c->seq, c->position);
    return dlm__fail(ctx, DLM_E_INPUT, "sequence %d, position %d: the logit of token %d "
                     "is %s", c->seq, c->position, ~c->guess.token,
                     c->guess.rank > 0.0f ? "+infinity" : "NaN");
}

/* A token where `shown` is negative, else only how likely that one is.  With p the
   softmax of x (V), which is overwritten, at temperature 0 the token is argmax p; else u
   draws it from p tempered (p^(1/T), normalised) and filtered; its confidence is p all
   the same.  No softmax: token ~v, where v is the first logit that is NaN or +INFINITY,
   which then is the rank, or V: all are -INFINITY. */
static dlm__guess dlm__decide(const dlm__kernels *k, const dlm_sample_options *o,
                              float *x, int V, int shown, double u)
{
    const dlm__by by = dlm__orders[o->order].by;
    const float max = k->max(x, V);
    double sum_x, p_max, sum = k->sum_exp(x, V, max, &sum_x);
    dlm__guess g = { 0, 0.0f, 0.0f };
    if (sum != sum) {
        while (g.token < V && x[g.token] < INFINITY) g.token++;
        if (g.token < V) g.rank = x[g.token];
        g.token = ~g.token;
        return g;
    }
    p_max = 1.0 / sum;
    g.token = shown < 0 ? dlm__argmax(k, x, V, max) : shown;
    g.confidence = g.rank = (float)p_max;
    if (shown >= 0)
        g.confidence = (float)(p_max * exp((double)x[shown] - (double)max));
    else if (by == DLM__BY_CERTAINTY || by == DLM__BY_DRAWN)
        g.rank = (float)(sum_x / sum - log(sum));
    else if (by == DLM__BY_MARGIN)
        g.rank = (float)(p_max - p_max * exp((double)(
            dlm__runner_up(k, x, V, g.token) - max)));
    if (shown < 0 && o->temperature > 0.0f) {
        dlm__temper(k, x, V, max, o->temperature);
        dlm__filter(x, V, o->top_k, o->top_p, o->min_p);
        g.token = dlm__draw(x, V, u);
        g.confidence = (float)(p_max * pow((double)x[g.token], (double)o->temperature));
        if (by == DLM__BY_TOKEN) g.rank = g.confidence;
        if (by == DLM__BY_DRAWN) g.rank = (float)-dlm__entropy(x, V);
    }
    return g;
}

/* What must not be emitted gets -INFINITY before anything is computed from the row, by
   adding it: that makes NaN of NaN and +INFINITY and so hides neither. */
static void dlm__guess_row(dlm_sampler *sm, int i, float *logits)
{
    const dlm__candidate *c = &sm->cands[sm->wanted_by[i]];
    const dlm__sequence *q = &sm->seqs[c->seq];
    const dlm_sample_options *o = &sm->opt;
    double u = 0.0;
    if (o->logit_bias) sm->ctx->k->add(logits, o->logit_bias, sm->c.vocab);
    if (o->constrain) o->constrain(o->constrain_user, c->seq, c->position, logits);
    for (int j = 0; j < o->n_suppress; j++) logits[o->suppress[j]] -= INFINITY;
    if (sm->c.mask_id < sm->c.vocab) logits[sm->c.mask_id] -= INFINITY;
    if (o->temperature > 0.0f && !c->check)
        u = dlm__sampler_uniform(sm, q, DLM_RANDOM_TOKEN, q->step, c->position);
    sm->guesses[i] = dlm__decide(sm->ctx->k, o, logits, sm->c.vocab,
                                 c->check ? q->canvas[c->position] : -1, u);
}

DLM_API void dlm_sampler_score(void *sampler, int i, float *logits)
{
    dlm_sampler *sm = (dlm_sampler *)sampler;
    const size_t V = (size_t)sm->c.vocab;
    if (sm->opt.guidance == 0.0f) {
        dlm__guess_row(sm, i, logits);
    } else {                                /* the other side may not be there yet */
        memcpy(sm->kept + (size_t)i * V, logits, V * sizeof *logits);
        sm->guesses[i].token = 0;
    }
}

static void dlm__guide_job(void *arg, int i)
{
    dlm_sampler *sm = (dlm_sampler *)arg;
    const size_t V = (size_t)sm->c.vocab, n = (size_t)sm->batch.n_out / 2;
    float *x = sm->kept + (size_t)i * V;
    const float *unguided = x + n * V;
    for (size_t v = 0; v < V; v++)          /* the same, as -INFINITY is: it stays so  */
        if (x[v] != unguided[v])
            x[v] = unguided[v] + (sm->opt.guidance + 1.0f) * (x[v] - unguided[v]);
    dlm__guess_row(sm, i, x);
}

/* All that was asked has been shown and has a softmax: guesses become the candidates'.
   (Tokens 0 and 1 of a shifted model get the same one.) */
static dlm_error dlm__take_guesses(dlm_sampler *sm)
{
    const dlm_batch *b = &sm->batch;
    const dlm_sample_options *o = &sm->opt;
    if (b->n_seqs == 0)
        return dlm__fail(sm->ctx, DLM_E_INPUT, "sampler: an answer, but nothing has been "
                         "asked");
    for (int i = 0; i < b->n_out; i++)
        if (sm->guesses[i].token == DLM__UNSEEN)
            return dlm__fail(sm->ctx, DLM_E_INPUT, "sampler: the logits of out row %d of "
                             "%d were not shown", i, b->n_out);
    sm->forwards++;
    if (sm->s) sm->flops += dlm_forward_flops(&sm->c, b);
    if (o->guidance != 0.0f)
        dlm__parallel(sm->ctx, b->n_out / 2, 30.0 * b->n_out * sm->c.vocab,
                      dlm__guide_job, sm);
    for (int i = 0; i < sm->n_cands; i++) {
        dlm__candidate *c = &sm->cands[i];
        c->guess = sm->guesses[c->out];
        if (c->guess.token < 0) return dlm__fail_softmax(sm->ctx, c, sm->c.vocab);
        if (o->order == DLM_ORDER_THRESHOLD && o->left_first
            && c->guess.confidence <= o->threshold)
            c->guess.rank = (float)-c->position;
        if (c->check) c->guess.rank = -INFINITY;       /* behind all the masks    */
    }
    return DLM_OK;
}

/* --[ commit ]----------------------------------------------------------------  */

/* How many of a sequence's candidates, best first, are filled in. */
static int dlm__quota(const dlm_sampler *sm, const dlm__sequence *q)
{
    const dlm__candidate *c = sm->cands + q->first;
    const dlm_sample_options *o = &sm->opt;
    const int plan = dlm__orders[o->order].blind ? q->n : dlm__planned(sm, q);
    double entropy = 0.0;
    int n = 0;
    for (; n < q->n && !c[n].check; n++) {
        entropy -= (double)c[n].guess.rank;
        if (o->order == DLM_ORDER_ENTROPY_BOUND) {
            if (n > 0 && !(entropy < (double)o->entropy_bound)) break;
        } else if (n >= plan && !(o->order == DLM_ORDER_THRESHOLD
                                  && c[n].guess.confidence > o->threshold)) {
            break;
        }
    }
    return n;
}

/* The guesses of one sequence go to its canvas and into the trace. */
static void dlm__commit(dlm_sampler *sm, dlm__sequence *q)
{
    dlm__candidate *c = sm->cands + q->first;
    const dlm_order order = sm->opt.order;
    const int masks = dlm__count_masks(sm, q);
    int quota;
    dlm__sort(c, q->n);
    quota = dlm__quota(sm, q);
    if (order == DLM_ORDER_FIRST_HITTING)
        q->time *= (float)pow(dlm__sampler_uniform(sm, q, DLM_RANDOM_ORDER, q->step,
                                                   q->length), 1.0 / masks);
    for (int i = 0; i < q->n; i++, c++) {
        const int due = i < quota;
        dlm_event *e = &sm->trace[sm->n_events];
        if (due && order != DLM_ORDER_ANCESTRAL && order != DLM_ORDER_FIRST_HITTING)
            q->time = (float)(masks - i - 1) / (float)q->block_masks;
        if (due) q->canvas[c->position] = c->guess.token;
        if (c->check && c->guess.confidence < sm->opt.remask_below) {
            q->canvas[c->position] = sm->c.mask_id;
            q->marks[c->position] = DLM__REMASKED;
        }
        if (c->check || !(due || sm->opt.list_drawn)) continue;
        e->seq = c->seq; e->position = c->position; e->token = c->guess.token;
        e->step = q->step + 1; e->confidence = c->guess.confidence; e->time = q->time;
        e->drawn_only = !due;
        sm->n_events++;
    }
}

static int dlm__is_stop(const dlm_sampler *sm, int token)
{
    for (int i = 0; i < sm->opt.n_stop; i++)
        if (sm->opt.stop[i] == token) return 1;
    return 0;
}

/* Ends the sequence at the first generated stop token with no mask before it.  There is
   none before the active block: that was looked through when it was active. */
static void dlm__check_stop(const dlm_sampler *sm, dlm__sequence *q)
{
    const int mask = sm->c.mask_id;
    int i = q->a;
    while (i < q->e && q->canvas[i] != mask
           && (q->marks[i] == DLM__GIVEN || !dlm__is_stop(sm, q->canvas[i]))) i++;
    if (i >= q->e || q->canvas[i] == mask) return;
    q->done = 1;
    q->end = i + 1;
    for (i++; i < q->length; i++)
        if (q->marks[i] != DLM__GIVEN) q->canvas[i] = mask;
}

/* Nothing is committed before all guesses are sound, so that an error changes nothing.
   What is before the active block was clean in this forward: it has final keys now. */
DLM_API dlm_error dlm_sampler_answer(dlm_sampler *sm)
{
    const int before = sm->n_events;
    dlm_error e = dlm__take_guesses(sm);
    sm->batch.n_seqs = 0;                   /* whatever comes next must be asked   */
    if (e != DLM_OK) return e;
    for (int s = 0; s < sm->n_seqs; s++) {
        dlm__sequence *q = &sm->seqs[s];
        if (q->done) continue;
        q->cached = q->a;                   /* all before the block was clean      */
        dlm__commit(sm, q);
        q->step++;
        q->block_step++;
        dlm__check_stop(sm, q);
        if (!q->done && dlm__count_masks(sm, q) == 0) dlm__next_block(sm, q);
    }
    if (sm->opt.on_step)
        sm->opt.on_step(sm->opt.step_user, sm->trace + before, sm->n_events - before);
    return DLM_OK;
}

DLM_API dlm_error dlm_sampler_step(dlm_sampler *sm)
{
    dlm_batch b;
    dlm_error e;
    if (sm->s == NULL)
        return dlm__fail(sm->ctx, DLM_E_INPUT, "sampler: there is no session to run a "
                         "step; ask, score and answer");
    if (dlm_sampler_done(sm)) return DLM_OK;
    e = dlm_sampler_ask(sm, &b);
    if (e == DLM_OK) e = dlm_forward(sm->s, &b, dlm_sampler_score, sm);
    if (e == DLM_OK) e = dlm_sampler_answer(sm);
    return e;
}

DLM_API dlm_error dlm_sample(dlm_ctx *ctx, const dlm_model *m, int *tokens, int T,
                             const dlm_sample_options *opt)
{
    dlm_limits lim;
    dlm_model *packed = NULL;
    dlm_session *s = NULL;
    dlm_sampler *sm = NULL;
    dlm_error e = DLM_OK;
    memset(&lim, 0, sizeof lim);
    lim.seqs = opt && opt->guidance != 0.0f ? 2 : 1;
    lim.slots = T;
    lim.cached = m->config.pattern != DLM_PATTERN_FULL;
    if (T < 1) return dlm__fail(ctx, DLM_E_INPUT, "canvas: length %d", T);
    if (!m->packed) e = dlm_model_pack(&packed, ctx, m, DLM_F32, NULL);
    if (e == DLM_OK) e = dlm_session_create(&s, ctx, packed ? packed : m, &lim, NULL);
    if (e == DLM_OK) e = dlm_sampler_create(&sm, s, opt, NULL);
    if (e == DLM_OK) e = dlm_sampler_begin(sm, tokens, &T, 1);
    while (e == DLM_OK && !dlm_sampler_done(sm)) e = dlm_sampler_step(sm);
    dlm_sampler_free(sm);
    dlm_session_free(s);
    dlm_model_free(packed);
    return e;
}

/* ==[ likelihood ]============================================================
   log p(response | prompt).  Causal: the exact sum.  Else a Monte Carlo bound over the
   number of masks l in a block of n (the whole response when FULL): l uniform on 1..n
   and stratified over the samples, l positions without replacement, weight n/l.  (Nie
   et al. 2025, appendix B; integer arithmetic keeps l exactly uniform.) */

/* Masks l of the cells of unit u, weight n/l. */
static void dlm__mask_exactly(dlm_state *s, const dlm_unit *u, uint64_t seed, int sample,
                              int samples)
{
    const dlm_address at = dlm__address(seed, DLM_RANDOM_LIKELIHOOD, 0, (uint32_t)u->cell,
                                        0);
    const int k = (int)(dlm_uniform(&at, 0) * u->n);
    const int l = (int)((k + (int64_t)sample * u->n / samples) % u->n) + 1;
    for (int i = 0; i < u->n; i++) {
        s->masked[u->cell + i] = 0;
        s->weight[u->cell + i] = (float)u->n / (float)l;
    }
    for (int i = 0; i < l; i++)
        s->masked[u->cell + (int)dlm_shuffled(seed ^ (uint64_t)u->cell << 32,
                                              (uint32_t)sample, (size_t)u->n,
                                              (size_t)i)] = 1;
}

/* Adds one sample's log-likelihood to sum. */
static dlm_error dlm__likelihood_sample(dlm_session *s, dlm_state *x, int sample,
                                        int samples, uint64_t seed, double *sum)
{
    dlm_error e;
    if (x->objective != DLM_OBJECTIVE_AR)
        for (int i = 0; i < x->n_units; i++)
            dlm__mask_exactly(x, &x->units[i], seed, sample, samples);
    e = dlm_state_layout(x, 0);
    if (e == DLM_OK) e = dlm_forward(s, &x->batch, dlm_state_loss, x);
    for (int i = 0; e == DLM_OK && i < x->batch.n_out; i++)
        *sum -= x->loss[i] * (double)x->out_weight[i];
    return e;
}

/* A state of the one text; each sample masks it anew.  Strata: sample i of n has i / n of
   the way through the counts of masks, from a random first one. */
DLM_API dlm_error dlm_log_likelihood(dlm_session *s, const int *tokens, int T, int P,
                                     int samples, uint64_t seed, double *nats)
{
    const dlm_example whole = { tokens, T, P, 0, NULL };
    const int causal = s->w.c.pattern == DLM_PATTERN_CAUSAL;
    dlm_state *x;
    double sum = 0.0;
    dlm_error e = dlm_state_create(&x, s->w.ctx, &s->w.c, DLM_OBJECTIVE_AUTO,
                                   dlm__min(s->w.rows, s->w.slots) + causal, 1, NULL);
    if (causal) samples = 1;
    if (e == DLM_OK && samples < 1)
        e = dlm__fail(s->w.ctx, DLM_E_INPUT, "likelihood: %d samples", samples);
    if (e == DLM_OK) e = dlm_state_take(x, &whole, 1, 1);
    if (e == DLM_OK) dlm_state_noise(x, NULL);
    for (int i = 0; i < samples && P < T && e == DLM_OK; i++)
        e = dlm__likelihood_sample(s, x, i, samples, seed, &sum);
    if (e == DLM_OK) *nats = sum / samples;
    dlm_state_free(x);
    return e;
}

/* ==[ distill ]===============================================================
   OPDLM (arXiv 2606.06712, section 4 and algorithm 1 with w(t) = 1).  One update:
     1  the student fills in texts with its own block sampler, whose trace says in which
        step each token came: the step map.  Every step shows a state the student was
        in: its block partly masked, nothing to the right
     2  of every block one of these states is drawn, a round of it; all blocks stand in
        one doubled row, so that the student sees them all in one pass
     3  the teacher reads the finished texts once, causally: at every place p_i, what it
        would have written there given what stands before
     4  the student's s_i, at the masked places, learns to be p_i: the loss is their
        divergence, its mean over the places, then over the texts.  No 1/t: a masked
        place counts as often as the student met it */

/* Weights are copied.  A new token gets the mean of all rows, in embedding and head: it
   means nothing in particular, and its logit is an average one. */
DLM_API dlm_error dlm_convert(dlm_model **out, dlm_ctx *ctx, const dlm_model *ar,
                              int block, int mask_id, int shifted, dlm_memory *mem)
{
    const int V = ar->config.vocab;
    dlm_config c = ar->config;
    dlm_error e = dlm__want_plain(ctx, "convert", ar);
    if (out) *out = NULL;
    if (e != DLM_OK) return e;
    if (c.pattern != DLM_PATTERN_CAUSAL)
        return dlm__fail(ctx, DLM_E_CONFIG, "convert: the model is not causal");
    c.pattern = DLM_PATTERN_BLOCK;
    c.shifted = shifted;
    c.block = block ? block : 4;
    c.vocab = V + (mask_id == DLM_NEW_TOKEN);
    c.mask_id = mask_id == DLM_NEW_TOKEN ? V : mask_id;
    c.mask_is_0 = mask_id == 0;
    e = dlm__model_new(out, ctx, &c, DLM_F32, dlm__plain_carve, mem);
    if (out == NULL || *out == NULL) return e;
    for (int i = 0; i < dlm_model_tensors(ar); i++) {
        dlm_tensor from, to;
        dlm_model_tensor(ar, i, &from);
        dlm_model_tensor(*out, i, &to);
        memcpy(to.data, from.data, (size_t)from.rows * (size_t)from.cols * sizeof(float));
        if (to.rows == from.rows) continue;     /* an embedding or head: one row more */
        for (int j = 0; j < to.cols; j++) {
            double sum = 0.0;
            for (int v = 0; v < V; v++)
                sum += (double)from.data[(size_t)v * (size_t)from.cols + (size_t)j];
            to.data[(size_t)V * (size_t)to.cols + (size_t)j] = (float)(sum / V);
        }
    }
    return DLM_OK;
}

/* --[ divergences ]-----------------------------------------------------------  */

DLM_API void dlm_teacher_probs(dlm_ctx *ctx, float *logits, int V,
                               const dlm_divergence_options *o)
{
    double sum = 0.0;
    dlm__temper(ctx->k, logits, V, ctx->k->max(logits, V),
                o->temperature > 0.0f ? o->temperature : 1.0f);
    dlm__filter(logits, V, o->top_k, o->top_p, o->min_p);
    for (int v = 0; v < V; v++) sum += (double)logits[v];
    for (int v = 0; v < V; v++) logits[v] = (float)((double)logits[v] / sum);
}

/* The value and slope of one token's term: f(p, s) and s df/ds, so that
   dz_v = slope_v - s_v sum_u slope_u  (the derivative of the softmax).
     forward   p (log p - log s)        slope -p
     reverse   s (log s - log p)        slope s (log s - log p + 1)
     JSD       w p log(p/m) + (1-w) s log(s/m)      slope (1-w) s log(s/m)        */
static double dlm__divergence_term(const dlm_divergence_options *o, double p, double s,
                                   double *slope)
{
    const double w = o->weight > 0.0f ? (double)o->weight : 0.5;
    const double to_fwd = o->kind == DLM_FORWARD_KL ? 1.0
        : o->kind == DLM_MIXED_KL ? 1.0 - w : 0.0;
    const double m = w * p + (1.0 - w) * s;
    const double floor_ = fmax(p, 1e-37);       /* exp rounds what is smaller to 0 */
    double value = 0.0;
    *slope = 0.0;
    if (o->kind == DLM_JSD) {
        if (s > 0.0) *slope = (1.0 - w) * s * log(s / m);
        return *slope + (p > 0.0 ? w * p * log(p / m) : 0.0);
    }
    if (to_fwd > 0.0 && p > 0.0) {
        value += to_fwd * p * log(p / s);
        *slope -= to_fwd * p;
    }
    if (to_fwd < 1.0 && s > 0.0) {
        value += (1.0 - to_fwd) * s * log(s / floor_);
        *slope += (1.0 - to_fwd) * s * (log(s / floor_) + 1.0);
    }
    return value;
}

/* Twice over the vocabulary: the softmax's derivative needs the sum of all slopes.  With
   `sparse`, limit is the smallest probability among the teacher's best, and ties so many
   tokens of exactly that belong to them (lower ids first). */
DLM_API double dlm_divergence(dlm_ctx *ctx, float *student, const float *teacher, int V,
                              double weight, const dlm_divergence_options *o)
{
    const float max = ctx->k->max(student, V);
    const double sum = ctx->k->sum_exp(student, V, max, NULL);
    double value = 0.0, total = 0.0;
    int ties = V;
    float limit = 0.0f;
    if (o->sparse > 0 && o->sparse < V) {
        limit = dlm__bisect(teacher, V, (double)o->sparse, 0);
        ties = o->sparse;
        for (int v = 0; v < V; v++) ties -= teacher[v] > limit;
    }
    ctx->k->exp_scaled(student, student, V, max, (float)(1.0 / sum));
    for (int pass = 0; pass < 2; pass++) {      /* sum the slopes, then use them   */
        int left = ties;
        for (int v = 0; v < V; v++) {
            const double s = (double)student[v];
            const double nan = 0.0 * (s + (double)teacher[v]);      /* or 0        */
            double slope = 0.0, term = 0.0;
            if (teacher[v] > limit || (teacher[v] == limit && left-- > 0))
                term = dlm__divergence_term(o, (double)teacher[v], fmax(s, 1e-37),
                                            &slope);
            if (pass == 0) { value += term + nan; total += slope + nan; }
            else student[v] = (float)(weight * (slope - s * total));
        }
    }
    return value;
}

/* --[ the distiller ]---------------------------------------------------------  */

struct dlm_distiller {
    dlm_trainer        *t;
    dlm_session         teacher;
    dlm_distill_options opt;
    int                 V;          /* of the teacher                              */
    float              *targets;    /* (max_targets, V) teacher probabilities, by cell */
    dlm_state           said;       /* the same examples as the teacher reads them */
    int                *values;     /* (rows) steps of the rounds of a block       */
};

/* The teacher must know every token the student can write, but for the mask, and be able
   to read as far.  Reverse KL divides by the teacher's probabilities. */
static dlm_error dlm__distill_resolve(const dlm_trainer *t, const dlm_model *teacher,
                                      const dlm_distill_options *opt,
                                      dlm_distill_options *o)
{
    const dlm_config *c = &teacher->config, *student = &t->model->config;
    dlm_ctx *ctx = t->ctx;
    dlm_error e;
    memset(o, 0, sizeof *o);
    if (opt) *o = *opt;
    e = dlm__resolve(ctx, "", dlm__distill_options, o);
    if (e == DLM_OK) e = dlm__in_range(ctx, "divergence.sparse", o->divergence.sparse, 0,
                                       c->vocab);
    if (e == DLM_OK) e = dlm__check_kernels(ctx, teacher);
    if (e != DLM_OK) return e;
    if (c->pattern != DLM_PATTERN_CAUSAL)
        return dlm__fail(ctx, DLM_E_CONFIG, "distill: the teacher is not causal");
    if (t->options.objective != DLM_OBJECTIVE_BLOCK)
        return dlm__fail(ctx, DLM_E_CONFIG, "distill: the trainer's objective is %s, "
                         "wants block", dlm__objective_names[t->options.objective]);
    if (c->vocab > student->vocab || c->max_seq < student->max_seq)
        return dlm__fail(ctx, DLM_E_MISMATCH, "distill: teacher of %d tokens, %d long; "
                         "the student has %d and %d", c->vocab, c->max_seq,
                         student->vocab, student->max_seq);
    if (o->max_targets == 0)            /* 64 MiB                                  */
        o->max_targets = dlm__min(t->state->rows,
                                  dlm__max(dlm__min(student->max_seq, 1024),
                                           (1 << 24) / c->vocab));
    if ((o->divergence.kind == DLM_REVERSE_KL || o->divergence.kind == DLM_MIXED_KL)
        && (o->divergence.top_k > 0 || o->divergence.top_p > 0.0f
            || o->divergence.min_p > 0.0f))
        return dlm__fail(ctx, DLM_E_CONFIG, "divergence: reverse KL is infinite where a "
                         "renormalised teacher is 0");
    return DLM_OK;
}

static void dlm__distiller_carve(dlm__arena *a, void *object)
{
    dlm_distiller *d = (dlm_distiller *)object;
    d->targets = dlm__push_floats(a, (size_t)d->opt.max_targets, (size_t)d->V);
    d->values = dlm__push_ints(a, (size_t)d->t->state->rows);
    dlm__state_carve(a, &d->said);
    dlm__session_carve(a, &d->teacher);
}

DLM_API dlm_error dlm_distiller_create(dlm_distiller **out, dlm_trainer *t,
                                       const dlm_model *teacher,
                                       const dlm_distill_options *o, dlm_memory *mem)
{
    dlm_ctx *ctx = t->ctx;
    dlm_distiller draft, *d;
    dlm_limits lim;
    dlm_error e;
    memset(&draft, 0, sizeof draft);
    memset(&lim, 0, sizeof lim);
    draft.t = t;
    draft.V = teacher->config.vocab;
    dlm__state_prepare(&draft.said, ctx, &teacher->config, DLM_OBJECTIVE_AR,
                       t->state->rows, t->state->seqs);
    e = dlm__distill_resolve(t, teacher, o, &draft.opt);
    lim.seqs = t->state->seqs;
    lim.slots = dlm__min(t->model->config.max_seq, t->state->rows);
    lim.rows = t->state->rows;
    lim.out = dlm__min(draft.opt.max_targets, lim.rows);
    if (e == DLM_OK) e = dlm__session_limits(&draft.teacher.w, ctx, teacher, &lim);
    draft.teacher.m = teacher;
    d = (dlm_distiller *)dlm__make(&e, ctx, "distiller", dlm__distiller_carve, &draft,
                                   sizeof draft, out != NULL, mem);
    if (d) dlm__fill_cos_sin(&d->teacher.w);
    if (out) *out = d;
    return e;
}

DLM_API void dlm_distiller_free(dlm_distiller *d) { dlm__unmake(d); }

/* --[ states of a rollout ]---------------------------------------------------
   A step map says when each token was filled in.  Round r of a block is the r-th of its
   distinct steps, in order, and in its state what was filled in at that step or later is
   masked: a block a b c d filled in at steps 7 5 5 9 has the states
       round 0 (step 5)  _ _ _ _      1 (step 7)  _ b c _      2 (step 9)  a b c _  */

/* The step values of a block's rounds in order, into values (n); returns how many. */
static int dlm__rounds(int *values, const int *steps, int n)
{
    int rounds = 0;
    for (int i = 0; i < n; i++) {
        int at = rounds;
        while (at > 0 && values[at - 1] > steps[i]) at--;
        if (steps[i] <= 0 || (at > 0 && values[at - 1] == steps[i])) continue;
        memmove(values + at + 1, values + at, (size_t)(rounds++ - at) * sizeof *values);
        values[at] = steps[i];
    }
    return rounds;
}

/* Random masks: t uniform, each cell with probability t, at least one. */
static void dlm__random_round(dlm_state *s, const dlm_unit *u, const dlm_address *at)
{
    const double t = dlm_uniform(at, 0);
    int hits = 0;
    for (int i = 0; i < u->n; i++)
        hits += s->masked[u->cell + i] = dlm_uniform(at, (uint32_t)(3 + i)) < t;
    if (hits == 0) s->masked[u->cell + (int)(dlm_uniform(at, 1) * u->n)] = 1;
}

/* Masks for every unit; first: the number of example 0 in the update; round: of ALL, a
   random one per block else.  A block with fewer rounds gets no masks, hence no loss. */
static void dlm__distill_masks(dlm_distiller *d, int first, int round)
{
    dlm_state *s = d->t->state;
    for (int k = 0; k < s->n_units; k++) {
        const dlm_unit *u = &s->units[k];
        const dlm_example *e = &s->examples[u->example];
        const int r = u->cell - s->first_cell[u->example], *map;
        const dlm_address at = dlm__address(d->t->options.seed, DLM_RANDOM_DISTILL,
                                            (uint32_t)d->t->steps,
                                            (uint32_t)(first + u->example), (uint32_t)r);
        int value, rounds, pick = round;
        if (d->opt.states == DLM_STATES_RANDOM) {
            dlm__random_round(s, u, &at);
            continue;
        }
        map = e->steps + e->prompt + r;
        rounds = dlm__rounds(d->values, map, u->n);
        if (d->opt.states != DLM_STATES_ALL) pick = (int)(dlm_uniform(&at, 0) * rounds);
        value = pick < rounds ? d->values[pick] : 0;
        for (int i = 0; i < u->n; i++)
            s->masked[u->cell + i] = value > 0 && map[i] >= value;
    }
}

/* Weights: the mean over an example's masked cells, times per_row.  Returns how many
   examples have any. */
static int dlm__distill_weights(dlm_distiller *d, double per_row)
{
    dlm_state *s = d->t->state;
    int rows = 0;
    for (int k = 0; k < s->n_examples; k++) {
        const dlm_example *e = &s->examples[k];
        const int first = s->first_cell[k], end = s->first_cell[k + 1];
        int n = 0;
        for (int i = first; i < end; i++) {
            const int position = e->prompt + i - first;
            const int excluded = d->opt.exclude_stop
                && e->tokens[position] == d->opt.stop;
            s->weight[i] = s->masked[i] && position > 0 && !excluded ? 1.0f : 0.0f;
            n += s->weight[i] > 0.0f;
        }
        for (int i = first; i < end && n > 0; i++) s->weight[i] *= (float)(per_row / n);
        rows += n > 0;
    }
    return rows;
}

/* --[ a step ]----------------------------------------------------------------  */

static void dlm__keep_target(void *user, int i, float *logits)
{
    const dlm_distiller *d = (const dlm_distiller *)user;
    float *row = d->targets + (size_t)d->said.out_cell[i] * (size_t)d->V;
    memcpy(row, logits, (size_t)d->V * sizeof *row);
    dlm_teacher_probs(d->t->ctx, row, d->V, &d->opt.divergence);
}

/* Tokens that the teacher does not know, the mask, get no gradient. */
static void dlm__distill_score(void *user, int i, float *logits)
{
    const dlm_distiller *d = (const dlm_distiller *)user;
    const dlm_state *s = d->t->state;
    const float *target = d->targets + (size_t)s->out_cell[i] * (size_t)d->V;
    s->loss[i] = dlm_divergence(s->ctx, logits, target, d->V, (double)s->out_weight[i],
                                &d->opt.divergence);
    for (int v = d->V; v < s->config.vocab; v++) logits[v] = 0.0f;   /* unknown to the */
}                                                                    /* teacher        */

/* The same masks and weights for both: first the targets, in one causal pass over the
   finished texts, whose cells are the student's; then the pass that learns. */
static dlm_error dlm__distill_state(dlm_distiller *d, dlm_report *r)
{
    dlm_state *s = d->t->state, *q = &d->said;
    dlm_error e;
    dlm__state_take(q, s->examples, s->n_examples, 1, q->rows);
    memcpy(q->weight, s->weight, (size_t)s->n_cells * sizeof *s->weight);
    e = dlm_state_layout(q, 0);
    if (e == DLM_OK) e = dlm_forward(&d->teacher, &q->batch, dlm__keep_target, d);
    if (e == DLM_OK) e = dlm_state_layout(s, 0);
    if (e == DLM_OK) e = dlm_trainer_pass(d->t, &s->batch, dlm__distill_score, d);
    if (e != DLM_OK) return e;
    d->t->flops += dlm_forward_flops(&q->config, &q->batch);
    for (int i = 0; i < s->batch.n_out; i++) {
        r->loss += s->loss[i] * (double)s->out_weight[i];
        r->scored++;
    }
    return DLM_OK;
}

/* Rows that learn from example e: one, or with STATES_ALL the most rounds of a block. */
static int dlm__most_rounds(const dlm_distiller *d, const dlm_example *e)
{
    const int b = d->t->state->config.block;
    int most = 1;
    if (e->prompt == e->length) return 0;
    if (d->opt.states != DLM_STATES_ALL) return 1;
    for (int i = e->prompt; i < e->length; i += b)
        most = dlm__max(most, dlm__rounds(d->values, e->steps + i,
                                          dlm__min(b, e->length - i)));
    return most;
}

/* On top of what every example must be: few targets, the teacher's tokens, steps. */
static dlm_error dlm__check_rollout(const dlm_distiller *d, const dlm_example *e, int k)
{
    dlm_ctx *ctx = d->t->ctx;
    if (e->length - e->prompt > d->opt.max_targets)
        return dlm__fail(ctx, DLM_E_INPUT, "example %d: a response of %d tokens, "
                         "max_targets is %d", k, e->length - e->prompt,
                         d->opt.max_targets);
    for (int i = 0; i < e->length; i++) {
        if (e->tokens[i] >= d->V)
            return dlm__fail(ctx, DLM_E_INPUT, "example %d: token %d at %d is unknown to "
                             "the teacher", k, e->tokens[i], i);
        if (d->opt.states != DLM_STATES_RANDOM && i >= e->prompt
            && (e->steps == NULL || e->steps[i] < 0))
            return dlm__fail(ctx, DLM_E_INPUT, "example %d: no step map, or a negative "
                             "step at %d", k, i);
    }
    return DLM_OK;
}

/* `rows` counts the texts (ALL: their rounds) that the loss is a mean over, before the
   first pass, as every pass needs it.  What a round masks the one before did, too. */
DLM_API dlm_error dlm_distiller_step(dlm_distiller *d, const dlm_example *examples, int n,
                                     dlm_report *report)
{
    dlm_report local, *r = report ? report : &local;
    dlm_state *s = d->t->state;
    double rows = 0.0;
    dlm_error e = dlm__check_examples(s, examples, n, 1);
    memset(r, 0, sizeof *r);
    for (int i = 0; i < n && e == DLM_OK; i++) {
        e = dlm__check_rollout(d, &examples[i], i);
        if (e != DLM_OK) break;
        rows += dlm__most_rounds(d, &examples[i]);
        r->tokens += examples[i].length - examples[i].prompt;
    }
    for (int i = 0; i < n && e == DLM_OK; i += s->n_examples) {
        dlm__state_take(s, examples + i, n - i, 1, d->opt.max_targets);
        for (int round = 0; e == DLM_OK; round++) {
            dlm__distill_masks(d, i, round);
            if (dlm__distill_weights(d, 1.0 / rows) == 0) break;
            e = dlm__distill_state(d, r);
            if (d->opt.states != DLM_STATES_ALL) break;
        }
    }
    return e == DLM_OK ? dlm_trainer_update(d->t, r) : e;
}

/* ==[ json ]==================================================================
   A reader over memory that keeps no tree: the caller walks objects key by key.  It
   checks what it passes over, limits depth, and never reads beyond the end. */

typedef struct dlm__json {
    const char *p, *end;
    int         bad;                /* set at the first mistake, stays set         */
} dlm__json;

enum { DLM__JSON_DEPTH = 32 };

static void dlm__json_space(dlm__json *j)
{
    while (j->p < j->end && (*j->p == ' ' || *j->p == '\n' || *j->p == '\t'
                             || *j->p == '\r')) j->p++;
}

/* Takes the character c if it is next. */
static int dlm__json_take(dlm__json *j, char c)
{
    dlm__json_space(j);
    if (j->bad || j->p >= j->end || *j->p != c) return 0;
    j->p++;
    return 1;
}

static void dlm__json_want(dlm__json *j, char c) { j->bad |= !dlm__json_take(j, c); }

static int dlm__json_word(dlm__json *j, const char *word)
{
    const size_t n = strlen(word);
    dlm__json_space(j);
    if (j->bad || (size_t)(j->end - j->p) < n || memcmp(j->p, word, n) != 0) return 0;
    j->p += n;
    return 1;
}

/* Decodes one character of text [*i, size); 0 and *i unmoved when malformed: wrong
   continuation, overlong, surrogate or beyond U+10FFFF. */
static int dlm__utf8_get(const char *text, size_t size, size_t *i, uint32_t *out)
{
    static const uint32_t least[] = { 0, 0x80, 0x800, 0x10000 };
    const unsigned char *p = (const unsigned char *)text + *i;
    const size_t left = size - *i;
    const unsigned char first = p[0];
    const size_t more = first < 0x80 ? 0 : first < 0xC0 ? 9 : first < 0xE0 ? 1
        : first < 0xF0 ? 2 : first < 0xF8 ? 3 : 9;      /* 9: cannot begin one     */
    uint32_t c;
    if (more > 3 || more >= left) return 0;
    c = more == 0 ? first : (uint32_t)(first & (0x3F >> more));
    for (size_t k = 1; k <= more; k++) {
        if ((p[k] & 0xC0) != 0x80) return 0;
        c = c << 6 | (p[k] & 0x3F);
    }
    if (c < least[more] || (c >= 0xD800 && c <= 0xDFFF) || c > 0x10FFFF) return 0;
    *i += more + 1;
    *out = c;
    return 1;
}

/* Code point to UTF-8; returns the bytes written, at most 4. */
static size_t dlm__utf8_put(char *out, uint32_t c)
{
    static const unsigned char first[] = { 0, 0xC0, 0xE0, 0xF0 };
    const size_t more = c < 0x80 ? 0 : c < 0x800 ? 1 : c < 0x10000 ? 2 : 3;
    for (size_t k = more; k > 0; k--, c >>= 6) out[k] = (char)(0x80 | (c & 0x3F));
    out[0] = (char)(first[more] | c);
    return more + 1;
}

/* The value of the n hexadecimal digits at p, -1 when one of them is none. */
static int dlm__hex(const char *p, int n)
{
    static const char digits[] = "0123456789abcdefABCDEF";
    int v = 0;
    for (int i = 0; i < n; i++) {
        const char *at = p[i] ? strchr(digits, p[i]) : NULL;
        if (at == NULL) return -1;
        v = 16 * v + (int)(at - digits) - (at - digits > 15 ? 6 : 0);
    }
    return v;
}

static uint32_t dlm__json_hex4(dlm__json *j)
{
    const int v = j->end - j->p < 4 ? -1 : dlm__hex(j->p, 4);
    j->bad |= v < 0;
    if (v >= 0) j->p += 4;
    return (uint32_t)v & 0xFFFF;
}

/* The escape after a backslash; surrogate pairs become one code point. */
static uint32_t dlm__json_escape(dlm__json *j)
{
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
    const char c = j->p < j->end ? *j->p++ : '\0';
    const char *at = c ? strchr(from, c) : NULL;
    uint32_t high = 0, low;
    if (at) return (uint32_t)to[at - from];
    if (c == 'u') high = dlm__json_hex4(j);
    else j->bad = 1;
    if (high >> 10 == 0x36 && j->end - j->p > 1 && j->p[0] == '\\' && j->p[1] == 'u') {
        j->p += 2;
        low = dlm__json_hex4(j);
        if (low >> 10 == 0x37) return 0x10000 + ((high & 0x3FF) << 10 | (low & 0x3FF));
    }
    if (high >> 11 == 0x1B) j->bad = 1;         /* half a pair                     */
    return high;
}

/* A string, unescaped and zero-terminated into out (size); what does not fit is a
   mistake, and so is a zero character.  out NULL: pass over it.  Returns its length. */
static size_t dlm__json_string(dlm__json *j, char *out, size_t size)
{
    size_t n = 0;
    dlm__json_want(j, '"');
    while (!j->bad) {
        char bytes[4];
        size_t m = 0;
        uint32_t c = 0;
        if (j->p < j->end && *j->p == '"') { j->p++; break; }
        if (j->p >= j->end || !dlm__utf8_get(j->p, (size_t)(j->end - j->p), &m, &c)
            || c < 0x20) { j->bad = 1; break; }
        j->p += m;
        if (c == '\\') c = dlm__json_escape(j);
        if (c == 0) j->bad = 1;
        m = dlm__utf8_put(bytes, c);
        if (out && n + m >= size) { j->bad = 1; break; }
        if (out) memcpy(out + n, bytes, m);
        n += m;
    }
    if (out && size) out[j->bad ? 0 : n] = '\0';
    return j->bad ? 0 : n;
}

/* A whole number that is not negative. */
static uint64_t dlm__json_count(dlm__json *j)
{
    uint64_t v = 0;
    int digits = 0;
    dlm__json_space(j);
    for (; !j->bad && j->p < j->end && *j->p >= '0' && *j->p <= '9'; j->p++, digits++) {
        if (v > (UINT64_MAX - 9) / 10) { j->bad = 1; break; }
        v = v * 10 + (uint64_t)(*j->p - '0');
    }
    if (digits == 0 || (digits > 1 && j->p[-digits] == '0')) j->bad = 1;
    return v;
}

/* --[ numbers ]---------------------------------------------------------------
   Files have the numbers of JSON wherever they come from.  The C library reads and
   writes them exactly, but with the point of the locale, which may be a comma, and may
   be several bytes; and it takes " +1", "0x10" and "nan", which JSON has not. */

/* Where the JSON number that begins at p ends; NULL: there is none. */
static const char *dlm__number_end(const char *p, const char *end)
{
    static const char *const signs[] = { "-", ".", "eE" };
    for (int part = 0; part < 3; part++) {      /* whole, fraction, power of ten   */
        const int there = p < end && *p && strchr(signs[part], *p);
        const char *first = p + there;
        if (part > 0 && !there) continue;
        if (part == 2 && first < end && (*first == '+' || *first == '-')) first++;
        for (p = first; p < end && *p >= '0' && *p <= '9';) p++;
        if (p == first || (part == 0 && *first == '0' && p > first + 1)) return NULL;
    }
    return p;
}

/* 1 when the whole text is one. */
static int dlm__is_number(const char *text)
{
    const char *end = text + strlen(text);
    return dlm__number_end(text, end) == end;
}

/* What stands between the digits of 0.5 here, in out. */
enum { DLM__NUMBER = 32, DLM__NUMBER_MOST = 255 };
static const char *dlm__point(char out[DLM__NUMBER])
{
    const int n = snprintf(out, DLM__NUMBER, "%.1f", 0.5);
    if (n < 3) return ".";          /* a small library, which prints no floats     */
    out[n - 1] = '\0';
    return out + 1;
}

/* The whole text as an integer in [least, most]; 0 when it is none. */
static int dlm__int_from(const char *text, int64_t least, int64_t most, int64_t *out)
{
    char *end;
    *out = strtoll(text, &end, 10);
    return dlm__is_number(text) && *end == '\0' && *out >= least && *out <= most;
}

/* The whole text (up to 255 bytes) as the nearest float, of two the even one; 0 when it
   is none. */
static int dlm__float_from(const char *text, float *out)
{
    char room[DLM__NUMBER], local[DLM__NUMBER_MOST + DLM__NUMBER];
    const size_t whole = strcspn(text, ".");
    if (!dlm__is_number(text) || strlen(text) > DLM__NUMBER_MOST) return 0;
    snprintf(local, sizeof local, "%.*s%s%s", (int)whole, text,
             text[whole] ? dlm__point(room) : "", text[whole] ? text + whole + 1 : "");
    *out = strtof(local, NULL);
    return fabsf(*out) <= FLT_MAX;
}

/* The printf form %.9g, from which every finite float can be read again. */
DLM__MAYBE_UNUSED static void dlm__float_text(char out[DLM__NUMBER], float x)
{
    char room[DLM__NUMBER], *at, *e;
    const char *point = dlm__point(room);
    const size_t n = strlen(point);
    DLM_ASSERT(fabsf(x) <= FLT_MAX);
    snprintf(out, DLM__NUMBER, "%.9g", (double)x);
    at = strstr(out, point);
    if (at) memmove(at + 1, at + n, strlen(at + n) + 1);
    if (at) *at = '.';
    e = strchr(out, 'e');                       /* some write e-007: two will do   */
    if (e && e[2] == '0' && e[4]) memmove(e + 2, e + 3, strlen(e + 3) + 1);
}

/* Walks on inside a list: 1 when another item follows, 0 after `close`. */
static int dlm__json_next(dlm__json *j, char close, int *count)
{
    if (j->bad || dlm__json_take(j, close)) return 0;
    if ((*count)++ > 0) dlm__json_want(j, ',');
    return !j->bad;
}

/* The next key of an object, into key (size); 0 at its end. */
static int dlm__json_key(dlm__json *j, char *key, size_t size, int *count)
{
    if (!dlm__json_next(j, '}', count)) return 0;
    dlm__json_string(j, key, size);
    dlm__json_want(j, ':');
    return !j->bad;
}

static void dlm__json_skip(dlm__json *j, int depth)
{
    int count = 0;
    if (depth > DLM__JSON_DEPTH) { j->bad = 1; return; }
    if (dlm__json_take(j, '{')) {
        while (dlm__json_key(j, NULL, 0, &count)) dlm__json_skip(j, depth + 1);
    } else if (dlm__json_take(j, '[')) {
        while (dlm__json_next(j, ']', &count)) dlm__json_skip(j, depth + 1);
    } else if (j->p < j->end && *j->p == '"') {
        dlm__json_string(j, NULL, 0);
    } else if (!dlm__json_word(j, "true") && !dlm__json_word(j, "false")
               && !dlm__json_word(j, "null")) {
        const char *end = dlm__number_end(j->p, j->end);
        if (end) j->p = end;
        else j->bad = 1;
    }
}

/* ==[ files ]=================================================================
   Whole files.  Reading maps them where that can be.  Writing puts a file beside its
   target, under a name that nobody else has, and renames it when it is safely there: a
   reader sees the old file or the new one. */

typedef struct dlm__file { void *data; size_t size; int mapped; } dlm__file;

#ifndef DLM_NO_STDIO

#include <errno.h>

enum { DLM__PATH = 4096 };

#if defined(__unix__) || defined(__APPLE__)
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#ifndef DLM__MAY_MAP
#define DLM__MAY_MAP 1              /* the tests ask for what happens without      */
#endif

/* POSIX hides these under -std=c99, C++ compilers never do. */
#if !defined(__cplusplus)
extern FILE   *fdopen(int fd, const char *mode);
extern int     fileno(FILE *file);
extern int     fsync(int fd);
extern int     fchmod(int fd, mode_t mode);
extern ssize_t readlink(const char *path, char *out, size_t size);
extern int     madvise(void *at, size_t size, int advice);
#endif

/* The mode of what is at path, -1 where nothing is, -2 when it is no regular file. */
static int dlm__file_mode(const char *path)
{
    struct stat st;
    if (stat(path, &st) != 0) return -1;
    return S_ISREG(st.st_mode) ? (int)(st.st_mode & 0777) : -2;
}

/* Does not block: what would wait for a writer, a FIFO, is not a regular file. */
static FILE *dlm__open_old(const char *path)
{
    const int fd = open(path, O_RDONLY | O_NONBLOCK | O_NOCTTY);
    FILE *f = fd < 0 ? NULL : fdopen(fd, "rb");
    if (fd >= 0 && f == NULL) close(fd);
    return f;
}

/* Some network file systems map nothing: then it is read. */
static void *dlm__map(FILE *f, size_t size)
{
    void *at = DLM__MAY_MAP ? mmap(NULL, size, PROT_READ, MAP_PRIVATE, fileno(f), 0)
                            : MAP_FAILED;
    return at == MAP_FAILED ? NULL : at;
}

static void dlm__unmap(void *at, size_t size) { munmap(at, size); }

#if defined(__linux__)
/* Pages of a map that may leave memory (MADV_DONTNEED): they come back from the file. */
static void dlm__forget(const char *at, size_t size)
{
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    const uintptr_t first = ((uintptr_t)at + page - 1) / page * page;
    const uintptr_t end = ((uintptr_t)at + size) / page * page;
    if (end > first) (void)madvise((void *)first, (size_t)(end - first), 4);
}
#endif

/* Replaces a link by what it points to, until it is none; 0: too long, or for ever. */
static int dlm__follow_links(char *path)
{
    char link[DLM__PATH];
    ssize_t n;
    for (int hops = 0; (n = readlink(path, link, sizeof link)) >= 0; hops++) {
        char *slash = n > 0 && link[0] != '/' ? strrchr(path, '/') : NULL;
        char *from = slash ? slash + 1 : path;
        if (hops == 40 || n >= DLM__PATH - (from - path)) return 0;
        memcpy(from, link, (size_t)n);
        from[n] = '\0';
    }
    return 1;
}

/* A file that was not there before, as private as the one that it shall replace. */
static FILE *dlm__open_new(const char *path, int mode)
{
    const int fd = open(path, O_WRONLY | O_CREAT | O_EXCL, mode < 0 ? 0666 : 0600);
    FILE *f = fd < 0 ? NULL : fdopen(fd, "wb");
    if (fd >= 0 && mode >= 0) (void)fchmod(fd, (mode_t)mode);   /* not on every disk */
    if (fd >= 0 && f == NULL) {
        close(fd);
        remove(path);
    }
    return f;
}

static int dlm__to_disk(FILE *f) { return fsync(fileno(f)) == 0; }

/* The name is safe once its folder is; some file systems cannot promise it. */
static int dlm__rename_file(const char *from, char *to)
{
    char *slash = strrchr(to, '/');
    int fd;
    if (rename(from, to) != 0) return 0;
    if (slash) slash[slash == to] = '\0';
    fd = open(slash ? to : ".", O_RDONLY);
    if (fd >= 0) {
        (void)fsync(fd);
        close(fd);
    }
    return 1;
}

#else                               /* no maps and no links                        */

static FILE *dlm__open_old(const char *path) { return fopen(path, "rb"); }
static void *dlm__map(FILE *f, size_t size) { (void)f; (void)size; return NULL; }
static void dlm__unmap(void *at, size_t size) { (void)at; (void)size; }
static int dlm__follow_links(char *path) { (void)path; return 1; }

#if defined(_WIN32)
#include <fcntl.h>
#include <io.h>
#include <sys/stat.h>

#ifdef __cplusplus
extern "C"
#endif
__declspec(dllimport) int __stdcall MoveFileExA(const char *from, const char *to,
                                                unsigned long flags);

static int dlm__file_mode(const char *path)
{
    struct _stati64 st;
    if (_stati64(path, &st) != 0) return -1;
    return (st.st_mode & _S_IFMT) == _S_IFREG ? 0 : -2;
}

static FILE *dlm__open_new(const char *path, int mode)
{
    const int fd = _open(path, _O_WRONLY | _O_CREAT | _O_EXCL | _O_BINARY,
                         _S_IREAD | _S_IWRITE);
    FILE *f = fd < 0 ? NULL : _fdopen(fd, "wb");
    (void)mode;
    if (fd >= 0 && f == NULL) {
        _close(fd);
        remove(path);
    }
    return f;
}

static int dlm__to_disk(FILE *f) { return _commit(_fileno(f)) == 0; }

/* rename does not replace here; this does (1), and returns when it is on disk (8). */
static int dlm__rename_file(const char *from, char *to)
{
    return MoveFileExA(from, to, 1 | 8) != 0;
}

#else                               /* C alone has neither modes nor "only if new" */

static int dlm__file_mode(const char *path) { (void)path; return -1; }

static FILE *dlm__open_new(const char *path, int mode)
{
    FILE *f = fopen(path, "rb");
    (void)mode;
    if (f == NULL) return fopen(path, "wb");
    fclose(f);
    errno = EEXIST;
    return NULL;
}

static int dlm__to_disk(FILE *f) { (void)f; return 1; }
static int dlm__rename_file(const char *from, char *to) { return rename(from, to) == 0; }

#endif
#endif /* POSIX */

static void dlm__close_file(dlm_ctx *ctx, dlm__file *f)
{
    if (f->mapped) dlm__unmap(f->data, f->size);
    else dlm__release(ctx, f->data);
    memset(f, 0, sizeof *f);
}

static dlm_error dlm__open_file(dlm_ctx *ctx, const char *path, dlm__file *f)
{
    FILE *in = dlm__open_old(path);
    const int regular = dlm__file_mode(path) != -2;
    long n = -1;
    int sound;
    memset(f, 0, sizeof *f);
    if (in == NULL) return dlm__fail(ctx, DLM_E_IO, "cannot open %s", path);
    if (regular && fseek(in, 0, SEEK_END) == 0) n = ftell(in);
    if (n > 0) {
        f->size = (size_t)n;
        f->data = dlm__map(in, f->size);
        f->mapped = f->data != NULL;
        if (!f->mapped) f->data = dlm__alloc(ctx, f->size);
    }
    sound = f->mapped || (f->data && fseek(in, 0, SEEK_SET) == 0
                          && fread(f->data, 1, f->size, in) == f->size);
    fclose(in);
    if (sound) return DLM_OK;
    dlm__close_file(ctx, f);
    return !regular ? dlm__fail(ctx, DLM_E_IO, "%s is not a regular file", path)
        : n == 0 ? dlm__fail(ctx, DLM_E_IO, "%s is empty", path)
        : dlm__fail(ctx, DLM_E_IO, "cannot read %s", path);
}

/* e, an error, gets the path in front of its sentence. */
static dlm_error dlm__name_file(dlm_ctx *ctx, const char *path, dlm_error e)
{
    char text[sizeof ctx->error];
    memcpy(text, ctx->error, sizeof text);
    return dlm__fail(ctx, e, "%.120s: %.130s", path, text);
}

/* Lets go of a file that was read, if it could be opened; e came of its bytes. */
static dlm_error dlm__end_file(dlm_ctx *ctx, const char *path, dlm__file *f, dlm_error e)
{
    if (f->data == NULL) return e;
    dlm__close_file(ctx, f);
    return e == DLM_OK ? e : dlm__name_file(ctx, path, e);
}

static void dlm__folder_path(char out[DLM__PATH], const char *folder, const char *name)
{
    snprintf(out, DLM__PATH, "%s%s%s", folder, *name ? "/" : "", name);
}

static int dlm__is_there(const char *folder, const char *name)
{
    char path[DLM__PATH];
    FILE *in;
    dlm__folder_path(path, folder, name);
    in = dlm__open_old(path);
    if (in) fclose(in);
    return in != NULL;
}

/* write puts the content into a stream, and says 1 when all of it is there. */
typedef int (*dlm__write_fn)(FILE *f, void *content);

static dlm_error dlm__write_file(dlm_ctx *ctx, const char *path, dlm__write_fn write_to,
                                 void *content)
{
    char target[DLM__PATH], beside[DLM__PATH + 24];
    const int mode = dlm__file_mode(path);
    FILE *f = NULL;
    int ok;
    if (mode == -2)
        return dlm__fail(ctx, DLM_E_IO, "%s is not a regular file: it stays", path);
    if (strlen(path) >= sizeof target)
        return dlm__fail(ctx, DLM_E_IO, "cannot create a file with so long a path");
    memcpy(target, path, strlen(path) + 1);
    if (!dlm__follow_links(target))
        return dlm__fail(ctx, DLM_E_IO, "cannot follow the links of %s", path);
    for (int i = 0; f == NULL && i < 1000; i++) {
        snprintf(beside, sizeof beside, "%s.%d.part", target, i);
        f = dlm__open_new(beside, mode);
        if (f == NULL && errno != EEXIST) break;
    }
    if (f == NULL) return dlm__fail(ctx, DLM_E_IO, "cannot create %s", beside);
    ok = write_to(f, content) && fflush(f) == 0 && dlm__to_disk(f);
    ok = fclose(f) == 0 && ok;
    if (ok && dlm__rename_file(beside, target)) return DLM_OK;
    remove(beside);
    return dlm__fail(ctx, DLM_E_IO, "cannot write %s; what was there is unchanged", path);
}

#endif /* !DLM_NO_STDIO */

/* ==[ unicode ]===============================================================
   What tokenizers ask of Unicode: which characters are letters, numbers and white space
   (16.0; what is not assigned counts as its neighbours if these are of one class). */

enum { DLM__OTHER, DLM__LETTER, DLM__NUMERAL, DLM__SPACE, DLM__NO_CLASS };
enum { DLM__CLASSES = 0x33480 };    /* from here on everything is OTHER            */

/* \p{L}, \p{N} and White_Space as the distances from each edge to the next: where the
   first range begins, behind it, where the second begins, ...  Numbers have digits of
   base 90; those below 60 end a number, the others, base 30, go before. */
static const char *const dlm__class_text[3] = {
    "b(=)=S$-$'$(:$C$hJ'/1(*$$$c,($+$$)$$bV$c6+d@)Mb.GQOG%$bK$$2%*%-&%$3$$BAbA.$;E,%'$(9'"
    "$,$&$:<*L$)4N_Z&$5$*-23'Y&$3$0)1%-$+YC)6&3Y&$55:$.Y&$B)2$4[9$XY&$=-B$'Y&$C(2%4[%$3$("
    "&+&;)(b)_T$%/*_T$%,-8Ib&Q>(b[O7$3)''&$&%*&'0/$4bC$k*I33bF&k7%4$=(b2)E0615142XG$'$b*b"
    "M%F$b^Uc%Z:,Yb9$bES4+ZB0%-P=HM&-H%b'M'$)$%&d5b'h<$$&.&/'0(.b]$0$30bM$'$%-$$&()$$$$$$"
    "'$.%'(('$X%boOdU)'&%/bX3bGb7$hU%N((%'b=)&$bB$c>4DT3iDdtXb'mj4b*R%eA&3-b,3C%b-U,%bO%b"
    "`$&$'$:AX1Vb%)&$$%.@-:<A*S@$3($--S:&$+7:&$&V$$&%%(%$$@%.*&/bB$1)b[AghLeuXj%$-$c3Eg&5"
    "b'%ZL/b]c8H=)=.b`Ge.gAb8SD07$+)J-B%TTcJ5d#/m9-:,Cb(9-9-=b-])%b'$2JNA&AG+$@>Z-9-605bV"
    "e&0HJ@,:e-N)8`A-CN5R8>:/Y^%%$0QD<=HA$%P&$/T1'8$$$GP6%b&M*SJY&$5$/(B]<$$$PY5'7b87%$$d"
    "'SM'HT7$`O0$b.>Id]b]b'CU2$$$bFU3$$$@$-L*$8$.R6$5b0d6ECS4$UBbXU8$<N1$f>62$$Tc'$b6p9dV"
    "bsU2rX4)<gkZ~9k*4b64B5T3'CiNdCb'c+b2($b)b6$$@k{VdjVlQ$<$C$<$C$<$C$<$C$<$+baPOe8b%c=Q"
    "-*3$f8B5Pi'@dTB%$i2dU`b+*$u'd+cnLbloD",
    "T-c#%($%&y$-c1-d5-gX-b_-')bT-b_-b_-%)bV0b[-+*bO-bP**6bU-bH-b_-b-7e@-b--l`7oM&d`=9-f#"
    "-c+.cQ=d%-b=-c1-)-r=$&))-d5W%(m)b#b59kBBx($m^$<,1&fO'c5-B+$2D-K2qm3-d+-f7)cF-J-d5-9-"
    "b=-gR-lyB-i0Q/^4%fM>H'A$+$c1(d9-pN+<*K,b2(9)cL%%b'b',X%B&b2(bP+;+M*fB)T=eJCcJ-N'bX*c"
    "1Bc+-b#-c;-*7e.-fN-b_-g1-bNHb3/h#6bE-l%-b=AdS-b--h%-bN8rSbWit0-bj%-b=-c15iR-e9:nmE-y"
    "JXbT<sAVbj@-h%-i9-e*-l],c+-n.`$&$c($2q%0bq>-",
    ",(5$bL$=$dd6$bkC.A%($S$cgL$"
};

/* The classes (DLM__CLASSES, zero before) of all characters. */
static void dlm__classes_fill(unsigned char *classes)
{
    for (int k = 0; k < 3; k++) {
        size_t at = 0, n = 0;
        int inside = 0;
        for (const char *p = dlm__class_text[k]; *p; p++) {
            const size_t digit = (size_t)(*p - '#' - (*p > '?') - (*p > '\\'));
            n = digit < 60 ? 60 * n + digit : 30 * n + digit - 60;
            if (digit >= 60) continue;
            if (inside) memset(classes + at, DLM__LETTER + k, n);
            inside = !inside;
            at += n;
            n = 0;
        }
    }
}

/* ==[ tokenizers ]============================================================
   Text to ids and back.  An id stands for a piece of text, some bytes: any one byte, a
   character of a corpus, or a piece of another program, which come with scores, or with
   the pairs they are merged from.  ids of characters: by code point, stop, mask. */

typedef struct dlm__piece { const char *text; int size; float score; } dlm__piece;

typedef struct dlm__table {         /* pieces by number, and numbers by bytes      */
    dlm__piece *items;              /* (most)                                      */
    int        *slots, mask;        /* (mask + 1) hashed: numbers + 1, 0 is none   */
    int         n, most, spaces;    /* spaces 1: one has a space behind a letter   */
} dlm__table;

enum {                              /* of form: what is done with a text           */
    DLM__BYTE_LEVEL = 1,            /* words by an expression, begin as bytes; else */
    DLM__MARKED = 2,                /* they begin as characters; U+2581 is a space */
    DLM__MODERN = 4,                /* Qwen's expression, or Llama 3's; else GPT-2's */
    DLM__WHOLE = 8,                 /* a word that is a piece is not looked into   */
    DLM__FALLBACK = 16,             /* "<0x0A>" stands for a byte                  */
    DLM__SCORED = 32                /* pieces have scores; else merges have ranks  */
};

typedef struct dlm__lexicon {
    dlm_ctx    *ctx;
    int         form, digits;       /* numerals in a word of digits; 0: any number */
    int         unk;                /* what has no piece and no bytes; or -1       */
    dlm__table  pieces, merges;     /* merges: by rank, the bytes of two ids       */
    int        *pairs;              /* (2 merges.most) these ids                   */
    int        *added, n_added;     /* tokens that are found in the text as it is; */
    unsigned char *classes;         /* their pieces' score is 1, of special ones 2 */
    char       *bytes;              /* (n_bytes) of the pieces of JSON, used so far */
    size_t      n_bytes, used;
} dlm__lexicon;

/* --[ pieces ]---------------------------------------------------------------- */

static void dlm__table_carve(dlm__arena *a, dlm__table *h)
{
    h->mask = 3;
    while (h->mask / 4 * 3 <= h->most) h->mask = 2 * h->mask + 1;
    h->items = (dlm__piece *)dlm__push(a, (size_t)h->most, sizeof *h->items);
    h->slots = dlm__push_ints(a, (size_t)h->mask + 1);
}

/* Where the bytes a (na) b (nb) are in the table, or would be: *slot is then 0. */
static int *dlm__slot(const dlm__table *h, const void *a, size_t na, const void *b,
                      size_t nb)
{
    const unsigned char *x = (const unsigned char *)a, *y = (const unsigned char *)b;
    uint32_t hash = 2166136261u;                /* FNV-1a                          */
    for (size_t i = 0; i < na; i++) hash = (hash ^ x[i]) * 16777619u;
    for (size_t i = 0; i < nb; i++) hash = (hash ^ y[i]) * 16777619u;
    for (hash ^= hash >> 15;; hash++) {
        int *slot = &h->slots[hash & (uint32_t)h->mask];
        const dlm__piece *p = &h->items[*slot - (*slot > 0)];
        if (*slot == 0 || ((size_t)p->size == na + nb && memcmp(p->text, a, na) == 0
                           && memcmp(p->text + na, b, nb) == 0)) return slot;
    }
}

/* The number of some bytes, -1 when nothing has them. */
static int dlm__find(const dlm__table *h, const char *text, size_t size)
{
    return *dlm__slot(h, text, size, "", 0) - 1;
}

/* Item k (< most) is these bytes, which stay where they are, to be found if `known`; 0:
   another one was before it. */
static int dlm__enter(dlm__table *h, int k, const char *text, size_t size, int known)
{
    int *slot = dlm__slot(h, text, size, "", 0);
    h->items[k].text = text;
    h->items[k].size = (int)size;
    h->n = dlm__max(h->n, k + 1);
    for (size_t i = 1; i < size; i++) h->spaces |= text[i] == ' ' && text[i - 1] != ' ';
    if (!known || *slot) return !known;
    *slot = k + 1;
    return 1;
}

/* What two neighbours become and how good that is; -1: they stay. */
static int dlm__merged(const dlm__lexicon *v, int a, int b, float *score)
{
    const dlm__piece *p = &v->pieces.items[a], *q = &v->pieces.items[b];
    int rank = 0, id;
    if (!(v->form & DLM__SCORED))
        rank = *dlm__slot(&v->merges, &a, sizeof a, &b, sizeof b) - 1;
    if (rank < 0) return -1;
    id = *dlm__slot(&v->pieces, p->text, (size_t)p->size, q->text, (size_t)q->size) - 1;
    *score = v->form & DLM__SCORED && id >= 0 ? v->pieces.items[id].score : (float)-rank;
    return *score > -INFINITY ? id : -1;
}

/* The piece of a byte, or -1. */
static int dlm__byte_id(const dlm__lexicon *v, char byte)
{
    char name[8];
    if (v->form & DLM__SCORED) return 3 + (unsigned char)byte;
    if (v->form & DLM__BYTE_LEVEL) return dlm__find(&v->pieces, &byte, 1);
    snprintf(name, sizeof name, "<0x%02X>", (unsigned)(unsigned char)byte);
    return v->form & DLM__FALLBACK ? dlm__find(&v->pieces, name, 6) : -1;
}

/* --[ characters ]------------------------------------------------------------
   A set of code points, one bit each. */

enum { DLM__CODES = 0x110000 };

/* Puts the characters of a text into the set, and counts them and their bytes. */
static dlm_error dlm__see_chars(dlm_tokenizer *t, const char *text, size_t size,
                                unsigned char *seen)
{
    for (size_t i = 0, next = 0; i < size; i = next) {
        uint32_t c;
        if (!dlm__utf8_get(text, size, &next, &c) || c == 0)
            return dlm__fail(t->ctx, DLM_E_INPUT,
                             "text: malformed UTF-8, or a zero, at byte %.0f: not a text",
                             (double)i);
        if (seen[c / 8] >> c % 8 & 1) continue;
        seen[c / 8] |= (unsigned char)(1 << c % 8);
        t->lexicon->pieces.most++;
        t->size += next - i;
    }
    if (size > 0) return DLM_OK;
    return dlm__fail(t->ctx, DLM_E_INPUT, "text: no characters to make a vocabulary of");
}

static void dlm__add_chars(dlm_tokenizer *t, const unsigned char *seen)
{
    dlm__table *h = &t->lexicon->pieces;
    char *at = t->text;
    for (uint32_t c = 0; c < DLM__CODES; c++) {
        size_t n;
        if (!(seen[c / 8] >> c % 8 & 1)) continue;
        n = dlm__utf8_put(at, c);
        dlm__enter(h, h->n, at, n, 1);
        at += n;
    }
}

/* The values of n keys of an object, at[k].p NULL when absent or null; a key twice is a
   mistake. */
static void dlm__json_fields(dlm__json *j, const char *const *keys, int n, dlm__json *at)
{
    char name[256];
    int count = 0;
    memset(at, 0, (size_t)n * sizeof *at);
    dlm__json_want(j, '{');
    while (dlm__json_key(j, name, sizeof name, &count)) {
        int k = 0;
        while (k < n && strcmp(keys[k], name) != 0) k++;
        dlm__json_space(j);
        if (k < n && at[k].end) j->bad = 1;
        if (k < n) at[k] = *j;
        if (k < n && dlm__json_word(j, "null")) at[k].p = NULL;
        else dlm__json_skip(j, 0);
    }
}

/* Enters an object and goes to the value of `key`; 0: it is not there. */
static int dlm__json_find(dlm__json *j, const char *key)
{
    dlm__json at;
    dlm__json_fields(j, &key, 1, &at);
    if (at.p) *j = at;
    return at.p != NULL;
}

/* 1 for the files in which others keep a vocabulary: an object whose "model" has a
   "vocab" (tokenizer.json), or one of nothing but the ids 0, 1, 2, ... (vocab.json). */
static int dlm__is_vocabulary(const char *text, size_t size)
{
    dlm__json j = { text, text + size, 0 }, again = j;
    int count = 0;
    uint64_t ids = 0;
    if (dlm__json_find(&j, "model") && dlm__json_find(&j, "vocab")) return 1;
    dlm__json_want(&again, '{');
    while (dlm__json_key(&again, NULL, 0, &count))
        if (dlm__json_count(&again) != ids++) return 0;
    return !again.bad && ids >= 256;            /* fewer may be a text             */
}

/* --[ scored pieces ]---------------------------------------------------------
   i32 longest, then for every id f32 score, i32 length, bytes. */

static dlm_error dlm__add_scored(dlm__lexicon *v, const char *file, size_t size)
{
    dlm__table *h = &v->pieces;
    size_t at = 4;
    v->form = DLM__SCORED | DLM__FALLBACK;
    while (at < size && size - at >= 8 && h->n < h->most) {
        float score;
        int32_t length;
        memcpy(&score, file + at, 4);
        memcpy(&length, file + at + 4, 4);
        if (length < 0 || (size_t)length > size - at - 8 || score != score) break;
        h->items[h->n].score = score;
        dlm__enter(h, h->n, file + at + 8, (size_t)length, 1);
        at += 8 + (size_t)length;
    }
    if (at == size && h->n >= 3) return DLM_OK;
    return dlm__fail(v->ctx, DLM_E_FORMAT, "tokenizer: not a file of scored pieces");
}

/* --[ tokenizer.json ]--------------------------------------------------------
   A file has no more ids and merges than strings, and these no more bytes than it: that
   is the room there is.  What reads a part says what is wrong with it, NULL: nothing. */

enum { DLM__IDS = 1 << 22 };        /* ranks are exact floats                      */

/* true; what is absent is not. */
static int dlm__json_true(dlm__json j) { return j.p && dlm__json_word(&j, "true"); }

/* GPT-2 writes bytes as printable characters: those that print as they are, the others
   as U+0100 and on.  The byte of such a character, -1 when it is none. */
static int dlm__char_byte(uint32_t c)
{
    const int k = (int)c - 256;
    if ((c > 32 && c < 127) || (c > 160 && c < 256 && c != 173)) return (int)c;
    return k < 0 ? -1 : k < 33 ? k : k < 67 ? k + 94 : k == 67 ? 173 : -1;
}

/* The bytes that a piece of the file (*n) stands for, in its place; 0 when no text comes
   to it: it is no writing of bytes, or has a space where that is U+2581. */
static int dlm__spelled(const dlm__lexicon *v, char *text, size_t *n)
{
    const int marked = v->form & DLM__MARKED;
    size_t size = 0;
    int known = 1;
    for (size_t i = 0; i < *n;) {
        uint32_t c = 0;
        int byte;
        dlm__utf8_get(text, *n, &i, &c);
        byte = !marked ? dlm__char_byte(c) : c == 0x2581 ? ' ' : -1;
        known &= marked ? c != ' ' : byte >= 0;
        if (byte >= 0) text[size++] = (char)byte;
        else size += dlm__utf8_put(text + size, c);
    }
    *n = size;
    return known;
}

/* The next string, where the next bytes go. */
static size_t dlm__next_bytes(const dlm__lexicon *v, dlm__json *j)
{
    return dlm__json_string(j, v->bytes + v->used, v->n_bytes - v->used);
}

/* "vocab": pieces and their ids. */
static const char *dlm__add_vocab(dlm__lexicon *v, dlm__json *j)
{
    int count = 0;
    dlm__json_want(j, '{');
    while (dlm__json_next(j, '}', &count)) {
        char *at = v->bytes + v->used;
        size_t n = dlm__next_bytes(v, j);
        uint64_t id;
        int known;
        dlm__json_want(j, ':');
        id = dlm__json_count(j);
        if (j->bad) break;
        if (id >= (uint64_t)v->pieces.most) return "an id beyond all others";
        known = dlm__spelled(v, at, &n);
        if (v->pieces.items[id].text) return "an id given twice";
        if (!dlm__enter(&v->pieces, (int)id, at, n, known)) return "a piece given twice";
        v->used += n + 1;
    }
    return NULL;
}

static const char dlm__not_alone[] = "lstrip, rstrip or single_word, not supported,";

static const char *dlm__add_added(dlm__lexicon *v, dlm__json *j)
{
    static const char *const keys[] = {
        "id", "content", "special", "lstrip", "rstrip", "single_word"
    };
    int count = 0;
    dlm__json_want(j, '[');
    while (dlm__json_next(j, ']', &count)) {
        char *at = v->bytes + v->used;
        dlm__json f[6];
        dlm__piece *p;
        uint64_t id = 0;
        size_t n = 0;
        dlm__json_fields(j, keys, 6, f);
        if (!j->bad && f[0].p && f[1].p) {
            id = dlm__json_count(&f[0]);
            n = dlm__next_bytes(v, &f[1]);
        }
        if (n == 0 || f[0].bad) j->bad = 1;
        if (j->bad) break;
        if (id >= (uint64_t)v->pieces.most) return "an id beyond all others";
        for (int k = 3; k < 6; k++) if (dlm__json_true(f[k])) return dlm__not_alone;
        p = &v->pieces.items[id];
        if (p->text && (p->score > 0.0f || (size_t)p->size != n
                        || memcmp(p->text, at, n) != 0)) return "an id given twice";
        if (p->text == NULL) dlm__enter(&v->pieces, (int)id, at, n, 1);
        p->score = dlm__json_true(f[2]) ? 2.0f : 1.0f;
        v->used += n + 1;
        v->added[v->n_added++] = (int)id;
    }
    return NULL;
}

/* "merges", the best first: "a b" or ["a", "b"]. */
static const char *dlm__add_merges(dlm__lexicon *v, dlm__json *j)
{
    dlm__table *h = &v->merges;
    int count = 0;
    dlm__json_want(j, '[');
    while (dlm__json_next(j, ']', &count)) {
        char *a = v->bytes + v->used, *b;
        int *pair = v->pairs + 2 * h->n;
        const int apart = dlm__json_take(j, '[');
        size_t na = dlm__next_bytes(v, j), nb;
        float score;
        if (apart) {                            /* are put together                */
            dlm__json_want(j, ',');
            v->used += na + 1;
            dlm__next_bytes(v, j);
            v->used -= na + 1;
            dlm__json_want(j, ']');
            a[na] = ' ';
        }
        b = j->bad ? NULL : strchr(a, ' ');
        if (b == NULL) j->bad = 1;
        if (j->bad) break;
        na = (size_t)(b++ - a);
        nb = strlen(b);
        pair[0] = dlm__spelled(v, a, &na) ? dlm__find(&v->pieces, a, na) : -1;
        pair[1] = dlm__spelled(v, b, &nb) ? dlm__find(&v->pieces, b, nb) : -1;
        if (pair[0] < 0 || pair[1] < 0) return "a merge of what is no piece";
        if (!dlm__enter(h, h->n, (const char *)pair, 2 * sizeof *pair, 1))
            return "a merge given twice";
        if (dlm__merged(v, pair[0], pair[1], &score) < 0) return "a merge to no piece";
    }
    return NULL;
}

/* --[ components ]------------------------------------------------------------
   The decoder, normalizer and pre-tokenizer of a file are written in one line, as the
   values of their settings; what the line means is in a table, or it is refused. */

#define DLM__GPT2_WORDS "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+" \
    "| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"
#define DLM__QWEN_WORDS(numerals) \
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|" numerals \
    "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"

static const struct { const char *line; int form, digits; } dlm__pipelines[] = {
#define DLM__BYTES(words) "decoder ByteLevel normalizer pre_tokenizer " words "ByteLevel"
#define DLM__SPLIT(regex) DLM__BYTES("Split " regex " Isolated ") " !use_regex"
    { DLM__BYTES(""), DLM__BYTE_LEVEL, 0 },
    { DLM__SPLIT(DLM__GPT2_WORDS), DLM__BYTE_LEVEL, 0 },
    { DLM__BYTES("Digits individual_digits "), DLM__BYTE_LEVEL, 1 },        /* SmolLM */
    { DLM__SPLIT(DLM__QWEN_WORDS("\\p{N}")), DLM__BYTE_LEVEL | DLM__MODERN, 1 },
    { DLM__SPLIT(DLM__QWEN_WORDS("\\p{N}{1,3}")), DLM__BYTE_LEVEL | DLM__MODERN, 3 },
    { "decoder Replace \xE2\x96\x81   ByteFallback Fuse Strip   1 0 normalizer "
      "Prepend \xE2\x96\x81 Replace   \xE2\x96\x81 pre_tokenizer", DLM__MARKED, 0 }
#undef DLM__SPLIT
#undef DLM__BYTES
};

/* Writes a value behind the line: its strings and numbers, and what is true (use_regex:
   what is not) by its key; but nothing of what changes no ids and no text, and no NFC. */
static void dlm__component_line(dlm__json *j, const char *key, char *line, size_t size)
{
    const size_t n = strlen(line);
    char name[24];
    int count = 0, yes;
    if (dlm__json_take(j, '{')) {
        while (dlm__json_key(j, name, sizeof name, &count))
            dlm__component_line(j, name, line, size);
    } else if (dlm__json_take(j, '[')) {
        while (dlm__json_next(j, ']', &count)) dlm__component_line(j, "", line, size);
    } else if ((yes = dlm__json_word(j, "true")) != 0 || dlm__json_word(j, "false")) {
        if (yes != (strcmp(key, "use_regex") == 0) && strcmp(key, "trim_offsets") != 0
            && strncmp(line, "decoder ByteLevel", n) != 0)
            snprintf(line + n, size - n, yes ? " %s" : " !%s", key);
    } else if (j->p < j->end && *j->p == '"' && n + 2 < size) {
        line[n] = ' ';
        dlm__json_string(j, line + n + 1, size - n - 1);
        if (!strcmp(line + n, " Sequence") || !strcmp(line + n, " NFC")) line[n] = '\0';
    } else if (!dlm__json_word(j, "null")) {
        snprintf(line + n, size - n, " %.0f", (double)dlm__json_count(j));
    }
}

static dlm_error dlm__add_components(dlm__lexicon *v, dlm__json *at)
{
    static const char *const stages[] = { "decoder", " normalizer", " pre_tokenizer" };
    char line[512] = "";
    for (int k = 0; k < 3; k++) {
        const size_t n = strlen(line);
        snprintf(line + n, sizeof line - n, "%s", stages[k]);
        if (at[k].p) dlm__component_line(&at[k], "", line, sizeof line);
    }
    for (size_t k = 0; k < sizeof dlm__pipelines / sizeof *dlm__pipelines; k++) {
        if (strcmp(dlm__pipelines[k].line, line) || at[0].bad + at[1].bad + at[2].bad)
            continue;
        v->form = dlm__pipelines[k].form;
        v->digits = dlm__pipelines[k].digits;
        return DLM_OK;
    }
    return dlm__fail(v->ctx, DLM_E_UNSUPPORTED, "tokenizer: not supported: %.220s", line);
}

/* --[ the whole file ]-------------------------------------------------------- */

/* What a model says of itself but for its pieces and merges. */
static dlm_error dlm__add_settings(dlm__lexicon *v, const char *const *keys,
                                   dlm__json *at)
{
    static const char *const usual[] = { "\"BPE\"", "0.0", "\"\"", "\"\"", "false" };
    int whole = 1;                              /* every byte has a piece          */
    if (dlm__json_true(at[5])) v->form |= DLM__FALLBACK;
    if (dlm__json_true(at[6])) v->form |= DLM__WHOLE;
    for (int b = 0; b < 256; b++) whole &= dlm__byte_id(v, (char)b) >= 0;
    if (v->form & DLM__MARKED && (!whole || v->form & DLM__WHOLE))
        return dlm__fail(v->ctx, DLM_E_UNSUPPORTED, "tokenizer: model: not supported: "
                         "ignore_merges, or not all bytes, of SentencePiece");
    for (int k = 0; k < (whole ? 4 : 5); k++)   /* then fuse_unk has nothing to do */
        if (at[k].p && (!dlm__json_word(&at[k], usual[k])
                        || (*at[k].p >= '0' && *at[k].p <= '9')))
            return dlm__fail(v->ctx, DLM_E_UNSUPPORTED, "tokenizer: model: %s is not %s: "
                             "not supported", keys[k], usual[k]);
    return DLM_OK;
}

static dlm_error dlm__add_part(dlm__lexicon *v, const char *part, dlm__json j,
                               const char *(*add)(dlm__lexicon *v, dlm__json *j))
{
    const char *start = j.p, *wrong = j.p ? add(v, &j) : NULL;
    if (j.bad) wrong = "malformed";
    if (wrong == NULL) return DLM_OK;
    return dlm__fail(v->ctx, wrong == dlm__not_alone ? DLM_E_UNSUPPORTED : DLM_E_FORMAT,
                     "tokenizer: %s: %s at its byte %.0f", part, wrong,
                     (double)(j.p - start));
}

static dlm_error dlm__add_json(dlm__lexicon *v, const char *text, size_t size)
{
    static const char *const parts[] = {
        "decoder", "normalizer", "pre_tokenizer", "added_tokens", "model"
    };
    static const char *const keys[] = {
        "type", "dropout", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk",
        "byte_fallback", "ignore_merges", "unk_token", "vocab", "merges"
    };
    dlm__json j = { text, text + size, 0 }, at[5], model[10];
    dlm_error e;
    char unk[128] = "";
    dlm__json_fields(&j, parts, 5, at);
    dlm__json_space(&j);
    if (j.p != j.end) j.bad = 1;
    if (!j.bad && at[4].p) dlm__json_fields(&at[4], keys, 10, model);
    if (j.bad || !at[4].p || at[4].bad || !model[8].p || !model[9].p)
        return dlm__fail(v->ctx, DLM_E_FORMAT, "tokenizer: malformed at byte %.0f, or no "
                         "model with vocab and merges", (double)(j.p - text));
    dlm__classes_fill(v->classes);
    e = dlm__add_components(v, at);
    if (e == DLM_OK) e = dlm__add_part(v, "vocab", model[8], dlm__add_vocab);
    if (e == DLM_OK) e = dlm__add_settings(v, keys, model);
    if (e == DLM_OK) e = dlm__add_part(v, "added_tokens", at[3], dlm__add_added);
    if (e == DLM_OK) e = dlm__add_part(v, "merges", model[9], dlm__add_merges);
    if (e == DLM_OK && model[7].p) dlm__json_string(&model[7], unk, sizeof unk);
    v->unk = dlm__find(&v->pieces, unk, strlen(unk));
    return e;
}

/* --[ words ]-----------------------------------------------------------------
   What the expressions match, written out.  They differ in what may go before letters
   (GPT-2: a space, others: anything but newlines and numerals), in how many numerals go
   together, and in whether newlines end white space and go with what is before them. */

/* The class of the character at i and where it ends; a byte that begins none is OTHER. */
static int dlm__look(const dlm__lexicon *v, const char *text, size_t size, size_t i,
                     size_t *next)
{
    uint32_t c;
    *next = i;
    if (i >= size) return DLM__NO_CLASS;
    if (dlm__utf8_get(text, size, next, &c))
        return c < DLM__CLASSES ? v->classes[c] : (int)DLM__OTHER;
    *next = i + 1;
    return DLM__OTHER;
}

/* Where a run of one class ends that begins at i, after at most `most` characters if that
   is not 0. */
static size_t dlm__class_run(const dlm__lexicon *v, const char *text, size_t size,
                             size_t i, int class_of_run, int most)
{
    size_t next;
    for (int n = 0; (most == 0 || n < most)
         && dlm__look(v, text, size, i, &next) == class_of_run; n++) i = next;
    return i;
}

static int dlm__is_newline(char c) { return c == '\n' || c == '\r'; }

/* The bytes of a contraction at i, 0 if there is none. */
static size_t dlm__contraction(const char *text, size_t size, size_t i, int any_case)
{
    const char fold = any_case ? 32 : 0;
    const char a = i + 1 < size ? (char)(text[i + 1] | fold) : '\0';
    const char b = i + 2 < size ? (char)(text[i + 2] | fold) : '\0';
    if (text[i] != '\'' || a == '\0') return 0;
    if (strchr("stmd", a)) return 2;
    return ((a == 'r' || a == 'v') && b == 'e') || (a == 'l' && b == 'l') ? 3 : 0;
}

/* Where the white space ends that is a word of its own. */
static size_t dlm__white_end(const dlm__lexicon *v, const char *text, size_t size,
                             size_t i)
{
    const int modern = v->form & DLM__MODERN;
    size_t end = i, last = i, newline = 0, next;
    int kind;
    while ((kind = dlm__look(v, text, size, end, &next)) == DLM__SPACE) {
        last = end;
        if (dlm__is_newline(text[end])) newline = next;
        end = next;
    }
    if (newline && modern) return newline;
    if (kind == DLM__NO_CLASS || (kind == DLM__NUMERAL && v->digits && !modern)
        || last == i) return end;
    return last;                                /* the last goes with the next word */
}

/* Where the word ends that begins at i < size.  (SmolLM, GPT-2's but for its digits, cuts
   the text at these before the expression sees it.) */
static size_t dlm__word_end(const dlm__lexicon *v, const char *text, size_t size,
                            size_t i)
{
    const int modern = (v->form & DLM__MODERN) != 0, space = text[i] == ' ';
    size_t at, after, end = dlm__contraction(text, size, i, modern);
    const int kind = dlm__look(v, text, size, i, &after);
    if (end > 0) return i + end;
    at = kind == DLM__LETTER || (modern ? kind == DLM__NUMERAL || dlm__is_newline(text[i])
                                        : !space) ? i : after;
    if (dlm__look(v, text, size, at, &end) == DLM__LETTER)
        return dlm__class_run(v, text, size, at, DLM__LETTER, 0);
    at = space && v->digits == 0 ? after : i;
    if (dlm__look(v, text, size, at, &end) == DLM__NUMERAL)
        return dlm__class_run(v, text, size, at, DLM__NUMERAL, v->digits);
    at = dlm__class_run(v, text, size, space ? after : i, DLM__OTHER, 0);
    if (at == i + (size_t)space) return dlm__white_end(v, text, size, i);
    while (modern && at < size && dlm__is_newline(text[at])) at++;
    return at;
}

/* --[ merging ]---------------------------------------------------------------
   A word begins as symbols, of one character or byte each, linked in both directions.
   Each waits to merge with the next one; a tree over all knows whose turn it is: of the
   best score the leftmost.  Its node k has the winner of nodes 2 k and 2 k + 1, and of n
   symbols number i is node n + i. */

typedef struct dlm__symbol {
    int   id, before, next;         /* id -1: merged away                          */
    int   merged;                   /* with the next: this id, or -1; its score    */
    float score;
} dlm__symbol;

typedef struct dlm__encoder {
    const dlm__lexicon *v;
    int          *ids;              /* what dlm_encode was given                   */
    size_t        max, *n;
    dlm__symbol  *symbols;          /* (room)                                      */
    int          *tree;             /* (2 room)                                    */
    size_t        room;
    unsigned char begins[256];      /* 1: an added token begins so                 */
} dlm__encoder;

/* Symbol i of n, or what is behind it, has changed. */
static void dlm__play(dlm__encoder *w, int n, int i)
{
    dlm__symbol *all = w->symbols, *s = &all[i];
    s->merged = s->id < 0 || s->next < 0 ? -1
        : dlm__merged(w->v, s->id, all[s->next].id, &s->score);
    if (s->merged < 0) s->score = -INFINITY;
    for (int k = (n + i) / 2; k > 0; k /= 2) {
        const int a = w->tree[2 * k], b = w->tree[2 * k + 1];
        const int first = all[a].score > all[b].score
            || (all[a].score == all[b].score && a < b);
        w->tree[k] = first ? a : b;
    }
}

static void dlm__merge_all(dlm__encoder *w, int n)
{
    dlm__symbol *all = w->symbols;
    for (int i = 0; i < n; i++) {
        all[i].before = i - 1;
        all[i].next = i + 1 < n ? i + 1 : -1;
        all[i].score = -INFINITY;
        w->tree[i] = w->tree[n + i] = i;
    }
    for (int i = 0; i < n; i++) dlm__play(w, n, i);
    while (all[w->tree[1]].merged >= 0) {
        const int at = w->tree[1], gone = all[at].next;
        dlm__symbol *s = &all[at];
        s->id = s->merged;
        s->next = all[gone].next;
        all[gone].id = -1;
        if (s->next >= 0) all[s->next].before = at;
        dlm__play(w, n, gone);
        dlm__play(w, n, at);
        if (s->before >= 0) dlm__play(w, n, s->before);
    }
}

static void dlm__emit(dlm__encoder *w, int id)
{
    if (w->ids && *w->n < w->max) w->ids[*w->n] = id;
    ++*w->n;
}

/* n symbols more for a word: its characters if those are pieces, else their bytes. */
static dlm_error dlm__split_word(dlm__encoder *w, const char *word, size_t size, int *n)
{
    const dlm__lexicon *v = w->v;
    for (size_t i = 0, next = 0; i < size; i = next) {
        uint32_t c = 0;
        int id = -1;
        if (v->form & DLM__BYTE_LEVEL || !dlm__utf8_get(word, size, &next, &c)) next++;
        else if (c == 0x2581 && v->form & DLM__MARKED) id = dlm__find(&v->pieces, " ", 1);
        else id = dlm__find(&v->pieces, word + i, next - i);
        if (id >= 0) w->symbols[(*n)++].id = id;
        for (; id < 0 && i < next; i++) {
            const int byte = dlm__byte_id(v, word[i]);
            w->symbols[(*n)++].id = byte < 0 ? v->unk : byte;
            if (byte < 0 && v->unk < 0)
                return dlm__fail(v->ctx, DLM_E_INPUT, "text: the byte 0x%02X is not in "
                                 "the vocabulary", (unsigned)(unsigned char)word[i]);
        }
    }
    return DLM_OK;
}

static dlm_error dlm__make_room(dlm__encoder *w, size_t n)
{
    const size_t each = sizeof *w->symbols + 2 * sizeof *w->tree;
    dlm_ctx *ctx = w->v->ctx;
    if (n <= w->room) return DLM_OK;
    dlm__release(ctx, w->symbols);
    w->room = n < 256 ? 256 : n;
    w->symbols = (dlm__symbol *)(n < INT_MAX / each ? dlm__alloc(ctx, w->room * each)
                                                    : NULL);
    if (w->symbols == NULL)
        return dlm__fail(ctx, DLM_E_NOMEM, "text: no memory for a word of %.0f bytes",
                         (double)n);
    w->tree = (int *)(void *)(w->symbols + w->room);
    return DLM_OK;
}

/* A word; begun 0: behind the space that goes before all of them. */
static dlm_error dlm__encode_word(dlm__encoder *w, const char *word, size_t size,
                                  int begun)
{
    const dlm__lexicon *v = w->v;
    const int whole = v->form & DLM__WHOLE ? dlm__find(&v->pieces, word, size) : -1;
    dlm_error e = dlm__make_room(w, size + 1);
    int n = 0;
    if (e == DLM_OK && !begun) e = dlm__split_word(w, " ", 1, &n);
    if (e == DLM_OK && whole >= 0) w->symbols[n++].id = whole;
    else if (e == DLM_OK) e = dlm__split_word(w, word, size, &n);
    if (e != DLM_OK) return e;
    dlm__merge_all(w, n);
    for (int i = 0; i < n; i++) if (w->symbols[i].id >= 0) dlm__emit(w, w->symbols[i].id);
    return DLM_OK;
}

/* --[ encoding ]-------------------------------------------------------------- */

/* The text between two added tokens, word by word: by the expression; or at spaces, which
   changes nothing where no piece goes on behind them, and never cuts a run of them. */
static dlm_error dlm__encode_words(dlm__encoder *w, const char *text, size_t size)
{
    const int bytes = w->v->form & DLM__BYTE_LEVEL;
    dlm_error e = DLM_OK;
    for (size_t i = 0, next; e == DLM_OK && i < size; i = next) {
        next = bytes ? dlm__word_end(w->v, text, size, i) : i + 1;
        while (!bytes && next < size && (w->v->pieces.spaces || text[next] != ' '
               || text[next - 1] == ' ' || text[next - 1] == '\x81')) next++;
        e = dlm__encode_word(w, text + i, next - i, bytes || i > 0);
    }
    return e;
}

/* The first added token from *at on, the longest at its place, which is *at then; -1:
   there is none, and *at = size. */
static int dlm__next_added(const dlm__encoder *w, const char *text, size_t size,
                           size_t *at)
{
    const dlm__lexicon *v = w->v;
    int found = -1, longest = 0;
    for (; *at < size; ++*at) {
        for (int k = 0; w->begins[(unsigned char)text[*at]] && k < v->n_added; k++) {
            const dlm__piece *p = &v->pieces.items[v->added[k]];
            if (p->size <= longest || (size_t)p->size > size - *at
                || memcmp(text + *at, p->text, (size_t)p->size) != 0) continue;
            found = v->added[k];
            longest = p->size;
        }
        if (found >= 0) break;
    }
    return found;
}

static dlm_error dlm__encode_pieces(const dlm__lexicon *v, const char *text, size_t size,
                                    int *ids, size_t max, size_t *n)
{
    dlm__encoder w;
    dlm_error e = DLM_OK;
    if (v->form & DLM__SCORED && v->pieces.n < 259)
        return dlm__fail(v->ctx, DLM_E_INPUT, "tokenizer: %d pieces, bytes need 259",
                         v->pieces.n);
    memset(&w, 0, sizeof w);
    w.v = v;
    w.ids = ids;
    w.max = max;
    w.n = n;
    for (int k = 0; k < v->n_added; k++)
        w.begins[(unsigned char)v->pieces.items[v->added[k]].text[0]] = 1;
    for (size_t i = 0, at = 0; e == DLM_OK && i < size; i = at) {
        const int id = dlm__next_added(&w, text, size, &at);
        e = dlm__encode_words(&w, text + i, at - i);
        if (e != DLM_OK || id < 0) continue;
        dlm__emit(&w, id);
        at += (size_t)v->pieces.items[id].size;
    }
    dlm__release(v->ctx, w.symbols);
    return e;
}

/* --[ decoding ]-------------------------------------------------------------- */

/* The bytes of an id: of "<0x0A>" the one it stands for, of masks and strangers '_', none
   of what vanishes. */
static const char *dlm__id_bytes(const dlm_tokenizer *t, int id, char *byte, size_t *n)
{
    const dlm__lexicon *v = t->lexicon;
    const dlm__piece *p = id >= 0 && id < v->pieces.n ? &v->pieces.items[id] : NULL;
    int code = t->kind == DLM_TOKENIZER_BYTES && id >= 0 && id < 256 ? id : '_';
    *byte = (char)code;
    *n = id < 0 || id != t->stop;
    if (p == NULL || p->text == NULL || id == t->stop || id == t->mask) return byte;
    code = v->form & DLM__FALLBACK && p->size == 6 && memcmp(p->text, "<0x", 3) == 0
        && p->text[5] == '>' ? dlm__hex(p->text + 3, 2) : -1;
    *byte = (char)code;
    if (code >= 0) return byte;
    *n = !(v->form & DLM__SCORED) && p->score > 1.0f ? 0 : (size_t)p->size;
    return p->text;
}

/* --[ creating ]-------------------------------------------------------------- */

/* The room that a tokenizer needs; of a corpus the characters are then in *seen. */
static dlm_error dlm__tokenizer_measure(dlm_tokenizer *t, const char *text, size_t size,
                                        unsigned char **seen)
{
    const int json = t->kind == DLM_TOKENIZER_JSON;
    size_t most = json ? 1 : size / 4;
    if (t->kind == DLM_TOKENIZER_BYTES) return DLM_OK;
    if (t->kind == DLM_TOKENIZER_CHARS) {
        if (dlm__is_vocabulary(text, size))
            return dlm__fail(t->ctx, DLM_E_INPUT, "text: a vocabulary in JSON, not a "
                             "corpus");
        *seen = (unsigned char *)dlm__alloc(t->ctx, DLM__CODES / 8);
        if (*seen == NULL)
            return dlm__fail(t->ctx, DLM_E_NOMEM, "text: no memory for its characters");
        memset(*seen, 0, DLM__CODES / 8);
        return dlm__see_chars(t, text, size, *seen);
    }
    for (size_t i = 0; json && i < size; i++) most += text[i] == '"';
    if (most / 2 >= DLM__IDS || size >= INT_MAX)
        return dlm__fail(t->ctx, DLM_E_FORMAT, "tokenizer: a file of %.0f bytes is too "
                         "large", (double)size);
    t->lexicon->pieces.most = t->lexicon->merges.most = (int)(most / 2);
    t->lexicon->n_bytes = json ? size : 0;
    t->size = size;
    return DLM_OK;
}

static void dlm__tokenizer_carve(dlm__arena *a, void *object)
{
    dlm_tokenizer *t = (dlm_tokenizer *)object;
    dlm__lexicon *v = t->lexicon;
    void *at = dlm__push(a, 1, sizeof *v);
    t->text = (char *)dlm__push(a, t->size + 1, 1);
    dlm__table_carve(a, &v->pieces);
    if (v->n_bytes > 0) {
        dlm__table_carve(a, &v->merges);
        v->pairs = dlm__push_ints(a, 2 * (size_t)v->merges.most);
        v->added = dlm__push_ints(a, (size_t)v->pieces.most);
        v->bytes = (char *)dlm__push(a, v->n_bytes, 1);
        v->classes = (unsigned char *)dlm__push(a, DLM__CLASSES, 1);
    }
    if (at) t->lexicon = (dlm__lexicon *)memcpy(at, v, sizeof *v);
}

DLM_API int dlm_tokenizer_id(const dlm_tokenizer *t, const char *text)
{
    const dlm__lexicon *v = t->lexicon;
    const size_t n = strlen(text);
    if (t->kind == DLM_TOKENIZER_BYTES) return n == 1 ? (unsigned char)text[0] : -1;
    for (int k = 0; k < v->n_added; k++)
        if (strcmp(v->pieces.items[v->added[k]].text, text) == 0) return v->added[k];
    return dlm__find(&v->pieces, text, n);
}

/* The stop and the mask of a tokenizer.json, by the names that they usually have. */
static void dlm__find_special(dlm_tokenizer *t)
{
    static const char *const stops[] = { "<|endoftext|>", "</s>", "<|end_of_text|>" };
    static const char *const masks[] = {        /* the name behind two words       */
        "added token <|MASK|>", "added token <|mask|>", "added token <|mdm_mask|>",
        "added token <mask>", "added token [MASK]", "added token |<MASK>|",
        "added token <M>"
    };
    t->stop = t->mask = -1;
    for (int k = 0; t->stop < 0 && k < 3; k++) t->stop = dlm_tokenizer_id(t, stops[k]);
    for (int k = 0; t->mask < 0 && k < 7; k++) {
        const int id = dlm_tokenizer_id(t, masks[k] + strlen("added token "));
        if (id < 0 || t->lexicon->pieces.items[id].score <= 0.0f) continue;
        t->mask = id;
        t->mask_from = masks[k];
    }
}

DLM_API dlm_error dlm_tokenizer_create(dlm_tokenizer **out, dlm_ctx *ctx,
                                       dlm_tokenizer_kind kind, const char *text,
                                       size_t size)
{
    const int outside = kind == DLM_TOKENIZER_PIECES;     /* is the mask           */
    unsigned char *seen = NULL;
    dlm__lexicon lexicon;
    dlm_tokenizer draft, *t;
    dlm_error e;
    *out = NULL;
    memset(&lexicon, 0, sizeof lexicon);
    memset(&draft, 0, sizeof draft);
    draft.kind = kind;
    draft.ctx = lexicon.ctx = ctx;
    draft.lexicon = &lexicon;
    if ((unsigned)kind > DLM_TOKENIZER_JSON)
        return dlm__fail(ctx, DLM_E_CONFIG, "tokenizer: no kind %d", (int)kind);
    e = dlm__tokenizer_measure(&draft, text, size, &seen);
    t = (dlm_tokenizer *)dlm__make(&e, ctx, "tokenizer", dlm__tokenizer_carve, &draft,
                                   sizeof draft, 1, NULL);
    if (t && seen) dlm__add_chars(t, seen);
    else if (t && t->size > 0) memcpy(t->text, text, size);
    dlm__release(ctx, seen);
    if (t && outside) e = dlm__add_scored(t->lexicon, t->text, size);
    if (t && kind == DLM_TOKENIZER_JSON) e = dlm__add_json(t->lexicon, t->text, size);
    if (t == NULL || e != DLM_OK) {
        dlm__unmake(t);
        return e;
    }
    t->vocab = kind == DLM_TOKENIZER_BYTES ? 256 : t->lexicon->pieces.n;
    t->stop = outside ? 1 : t->vocab;
    t->mask = outside ? t->vocab : t->vocab + 1;
    if (kind == DLM_TOKENIZER_JSON) dlm__find_special(t);
    else t->vocab += outside ? 0 : 2;
    *out = t;
    return DLM_OK;
}

DLM_API void dlm_tokenizer_free(dlm_tokenizer *t) { dlm__unmake(t); }

DLM_API dlm_error dlm_encode(const dlm_tokenizer *t, const char *text, size_t size,
                             int *ids, size_t max, size_t *n)
{
    *n = 0;
    if (t->kind >= DLM_TOKENIZER_PIECES)
        return dlm__encode_pieces(t->lexicon, text, size, ids, max, n);
    for (size_t i = 0, next = 0; i < size; i = next, (*n)++) {
        int id = (unsigned char)text[i];
        uint32_t c = 0;
        if (t->kind == DLM_TOKENIZER_BYTES) {
            next++;
        } else if (dlm__utf8_get(text, size, &next, &c)) {
            id = dlm__find(&t->lexicon->pieces, text + i, next - i);
        } else {
            return dlm__fail(t->ctx, DLM_E_INPUT, "text: malformed UTF-8 at byte %.0f",
                             (double)i);
        }
        if (id < 0)
            return dlm__fail(t->ctx, DLM_E_INPUT, "text: '%.*s' (U+%04X) at byte %.0f is "
                             "not in the vocabulary", (int)(next - i), text + i,
                             (unsigned)c, (double)i);
        if (ids && *n < max) ids[*n] = id;
    }
    return DLM_OK;
}

DLM_API size_t dlm_decode(const dlm_tokenizer *t, const int *ids, size_t n, char *out,
                          size_t size)
{
    const int pieces = t->kind == DLM_TOKENIZER_PIECES;
    const int spaced = pieces || t->lexicon->form & DLM__MARKED;
    size_t length = 0, m;
    int begun = 0;                              /* is this text; a stop ends it    */
    for (size_t i = 0; i < n; i++) {
        char byte;
        const char *from = dlm__id_bytes(t, ids[i], &byte, &m);
        if (pieces && ids[i] == t->stop) begun = 0;
        if (m == 0) continue;
        if (spaced && !begun && from[0] == ' ') {
            from++;                             /* what encoding put in front      */
            m--;
        }
        begun = 1;
        for (size_t k = 0; k < m; k++, length++)
            if (out && length + 1 < size) out[length] = from[k];
    }
    if (out && size) out[length < size ? length : size - 1] = '\0';
    return length;
}

/* --[ composing ]-------------------------------------------------------------
   A vocab.json and a merges.txt are written into a tokenizer.json in memory: there is one
   reader, and that text can be saved. */

static char *dlm__quote(char *out, const char *text, const char *end)
{
    *out++ = '"';
    for (; text < end; *out++ = *text++)
        if (*text == '"' || *text == '\\') *out++ = '\\';
    *out++ = '"';
    return out;
}

/* Tokens as in added_tokens_decoder, "id": {"content": ...}, or added_tokens.json,
   "content": id, as the items of added_tokens; returns where they end.  What is malformed
   stays so, which their reader will say. */
static char *dlm__compose_added(char *out, dlm__json j)
{
    char key[256];
    int count = 0;
    dlm__json_want(&j, '{');
    while (dlm__json_key(&j, key, sizeof key, &count)) {
        const char *value;
        dlm__json_space(&j);
        value = j.p;
        dlm__json_skip(&j, 0);
        if (count > 1) *out++ = ',';
        if (!j.bad && *value == '{') {
            out += sprintf(out, "{\"id\":%s,", key);
            out += sprintf(out, "%.*s", (int)(j.p - value) - 1, value + 1);
        } else {
            out += sprintf(out, "{\"id\":%.*s,\"special\":true,\"content\":",
                           (int)(j.p - value), value);
            out = dlm__quote(out, key, key + strlen(key));
            *out++ = '}';
        }
    }
    if (j.bad) *out++ = '?';
    return out;
}

/* The tokenizer.json of a byte-level BPE with the expression of GPT-2 or Qwen2, into out;
   returns its size, at most 1024 + 8 added + vocab + 4 merges bytes.  added: tokens as
   above, p NULL: none; vocab: a vocab.json; merges: the lines of a merges.txt, of which
   the first may begin with #version and is then none. */
DLM__MAYBE_UNUSED static size_t dlm__compose(char *out, int qwen, dlm__json added,
                                             dlm__json vocab, dlm__json merges)
{
    static const char regex[] = DLM__QWEN_WORDS("\\p{N}"), byte_level[] = "{\"type\":"
        "\"ByteLevel\",\"add_prefix_space\":false,\"trim_offsets\":true,\"use_regex\":";
    const char *p = merges.p, *next;
    char *at = out + sprintf(out, "{\"version\":\"1.0\",\"added_tokens\":[");
    if (added.p) at = dlm__compose_added(at, added);
    at += sprintf(at, "],\"decoder\":%strue},\"normalizer\":%s,\"pre_tokenizer\":",
                  byte_level, qwen ? "{\"type\":\"NFC\"}" : "null");
    if (qwen) {
        at += sprintf(at, "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\","
                      "\"pattern\":{\"Regex\":");
        at = dlm__quote(at, regex, regex + sizeof regex - 1);
        at += sprintf(at, "},\"behavior\":\"Isolated\",\"invert\":false},");
    }
    at += sprintf(at, "%s%s,\"model\":{\"type\":\"BPE\",\"vocab\":%.*s,\"merges\":[",
                  byte_level, qwen ? "false}]}" : "true}", (int)(vocab.end - vocab.p),
                  vocab.p);
    for (int count = 0; p < merges.end; p = next + 1) {
        const char *stop = next = (const char *)memchr(p, '\n', (size_t)(merges.end - p));
        if (next == NULL) stop = next = merges.end;
        while (stop > p && stop[-1] == '\r') stop--;
        if (stop == p || (p == merges.p && stop - p > 7 && memcmp(p, "#version", 8) == 0))
            continue;
        if (count++ > 0) *at++ = ',';
        at = dlm__quote(at, p, stop);
    }
    return (size_t)(at + sprintf(at, "]}}") - out);
}

#ifndef DLM_NO_STDIO

/* --[ tokenizer folders ]----------------------------------------------------- */

enum { DLM__T_JSON, DLM__T_VOCAB, DLM__T_MERGES, DLM__T_PIECES, DLM__T_CONFIG,
       DLM__T_MAP, DLM__T_ADDED, DLM__T_FILES };
static const char *const dlm__tok_files[] = {
    "tokenizer.json", "vocab.json", "merges.txt", "tokenizer.bin",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
};

static dlm_error dlm__tok_composed(dlm_tokenizer **out, dlm_ctx *ctx, dlm__json name,
                                   dlm__json added, const dlm__json *text)
{
    const dlm__json vocab = text[DLM__T_VOCAB], merges = text[DLM__T_MERGES];
    const size_t room = 1024 + 8 * (size_t)(added.end - added.p)
        + (size_t)(vocab.end - vocab.p) + 4 * (size_t)(merges.end - merges.p);
    char kind[64] = "", *json;
    dlm_error e;
    int qwen;
    if (name.p) dlm__json_string(&name, kind, sizeof kind);
    qwen = strncmp(kind, "Qwen2Tokenizer", 14) == 0;
    if (!qwen && strncmp(kind, "GPT2Tokenizer", 13) != 0)
        return dlm__fail(ctx, DLM_E_UNSUPPORTED, "tokenizer_class \"%s\": of vocab.json "
                         "only GPT2Tokenizer and Qwen2Tokenizer are supported", kind);
    json = (char *)(room < INT_MAX ? dlm__alloc(ctx, room) : NULL);
    if (json == NULL) return dlm__fail(ctx, DLM_E_NOMEM, "no memory for tokenizer.json");
    e = dlm_tokenizer_create(out, ctx, DLM_TOKENIZER_JSON, json,
                             dlm__compose(json, qwen, added, vocab, merges));
    dlm__release(ctx, json);
    return e;
}

/* A token's text, itself or its "content", into out (256); 0: there is none. */
static int dlm__token_text(dlm__json j, char *out)
{
    if (j.p) dlm__json_space(&j);
    if (j.p && j.p < j.end && *j.p == '{' && !dlm__json_find(&j, "content")) return 0;
    return j.p && dlm__json_string(&j, out, 256) > 0;
}

/* The id of a token of the config: t's, or else the decoder's; -1: there is none. */
static int dlm__config_id(const dlm_tokenizer *t, dlm__json token, dlm__json decoder)
{
    char text[256], key[64], other[256];
    int64_t id = -1;
    int count = 0;
    if (!dlm__token_text(token, text)) return -1;
    id = dlm_tokenizer_id(t, text);
    if (id >= 0 || decoder.p == NULL) return (int)id;
    dlm__json_want(&decoder, '{');
    while (dlm__json_key(&decoder, key, sizeof key, &count)) {
        const int same = dlm__token_text(decoder, other) && strcmp(other, text) == 0;
        int64_t found;
        if (same && dlm__int_from(key, 0, DLM__IDS, &found)) id = found;
        dlm__json_skip(&decoder, 0);
    }
    return (int)id;
}

static dlm_error dlm__tok_from(dlm_tokenizer **out, dlm_ctx *ctx, const dlm__json *text)
{
    enum { MASK, STOP, DECODER, CLASS, KEYS };
    static const char *const keys[] = {
        "mask_token", "eos_token", "added_tokens_decoder", "tokenizer_class"
    };
    const int json = text[DLM__T_JSON].p != NULL;
    const dlm_tokenizer_kind kind = json ? DLM_TOKENIZER_JSON : DLM_TOKENIZER_PIECES;
    const dlm__json *file = &text[json ? DLM__T_JSON : DLM__T_PIECES];
    dlm__json said[KEYS], at[KEYS];
    dlm_error e;
    int mask, stop;
    memset(said, 0, sizeof said);
    for (int k = DLM__T_CONFIG; k <= DLM__T_MAP; k++) {     /* the first that says it */
        dlm__json j = text[k];
        if (j.p) dlm__json_fields(&j, keys, KEYS, at);
        if (j.bad) return dlm__fail(ctx, DLM_E_FORMAT, "%s: malformed",
                                    dlm__tok_files[k]);
        for (int i = 0; j.p && i < KEYS; i++) if (!said[i].p) said[i] = at[i];
    }
    if (!json && text[DLM__T_VOCAB].p && text[DLM__T_MERGES].p)
        e = dlm__tok_composed(out, ctx, said[CLASS], said[DECODER].p ? said[DECODER]
                              : text[DLM__T_ADDED], text);
    else if (file->p == NULL)
        e = dlm__fail(ctx, DLM_E_IO, "neither tokenizer.json nor vocab.json with "
                      "merges.txt nor tokenizer.bin");
    else
        e = dlm_tokenizer_create(out, ctx, kind, file->p, (size_t)(file->end - file->p));
    if (e != DLM_OK || (*out)->kind == DLM_TOKENIZER_PIECES) return e;
    mask = dlm__config_id(*out, said[MASK], said[DECODER]);
    stop = dlm__config_id(*out, said[STOP], said[DECODER]);
    if (mask >= 0) (*out)->mask_from = "tokenizer_config.json: mask_token";
    if (mask >= 0) (*out)->mask = mask;
    if (stop >= 0) (*out)->stop = stop;
    (*out)->vocab = dlm__max((*out)->vocab, mask + 1);
    return DLM_OK;
}

DLM_API dlm_error dlm_tokenizer_open(dlm_tokenizer **out, dlm_ctx *ctx,
                                     const char *folder)
{
    char path[DLM__PATH];
    dlm__file files[DLM__T_FILES];
    dlm__json text[DLM__T_FILES];
    dlm_error e = DLM_OK;
    *out = NULL;
    memset(text, 0, sizeof text);
    memset(files, 0, sizeof files);
    for (int k = 0; e == DLM_OK && k < DLM__T_FILES; k++) {
        if (!dlm__is_there(folder, dlm__tok_files[k])) continue;
        dlm__folder_path(path, folder, dlm__tok_files[k]);
        e = dlm__open_file(ctx, path, &files[k]);
        text[k].p = (const char *)files[k].data;
        text[k].end = text[k].p + files[k].size;
    }
    if (e == DLM_OK) {
        e = dlm__tok_from(out, ctx, text);
        if (e != DLM_OK) e = dlm__name_file(ctx, folder, e);
    }
    for (int k = 0; k < DLM__T_FILES; k++) dlm__close_file(ctx, &files[k]);
    return e;
}

#endif /* !DLM_NO_STDIO */

DLM_API size_t dlm_whole_text(const char *text, size_t size)
{
    for (size_t n = 1; n <= 3 && n <= size; n++) {
        const unsigned char c = (unsigned char)text[size - n];
        const size_t needs = c >= 0xF0 ? 4 : c >= 0xE0 ? 3 : c >= 0xC2 ? 2 : 1;
        if (c >= 0xC2 || c < 0x80) return needs > n && c < 0xF5 ? size - n : size;
    }
    return size;
}

/* ==[ safetensors ]===========================================================
   u64 header length, a JSON header that begins with '{', raw little-endian data.
   Everything in the header is hostile until checked: sizes with overflow, no name twice,
   and tensors that lie one behind the other and fill the data, as the format wants. */

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
#error "dlm.h reads and writes little-endian files on little-endian machines only"
#endif

typedef struct dlm__pair { const char *key, *value; } dlm__pair;

static const struct { const char *name; size_t size; } dlm__dtypes[DLM_DTYPE_COUNT] = {
    { "F32", 4 }, { "F16", 2 }, { "BF16", 2 }, { "F64", 8 }, { "I64", 8 }, { "I32", 4 },
    { "I16", 2 }, { "I8", 1 }, { "U8", 1 }, { "BOOL", 1 }, { "", 0 },
};

static dlm_error dlm__bad_header(dlm_ctx *ctx, const char *name, const char *what)
{
    return dlm__fail(ctx, DLM_E_FORMAT, "safetensors: %.80s: %s", name, what);
}

/* The next string, kept.  It is shorter than in the header, where it has quotes. */
static const char *dlm__st_string(dlm_safetensors *f, dlm__json *j)
{
    char *text = f->text;
    f->text += dlm__json_string(j, text, (size_t)(f->text_end - text)) + 1;
    return text;
}

/* Says what is wrong with it, NULL: nothing; as does the next. */
static const char *dlm__st_dtype(dlm_safetensors *f, dlm__json *j, dlm_st_tensor *t)
{
    int i = 0;
    t->type = dlm__st_string(f, j);
    while (i < DLM_DTYPE_OTHER && strcmp(t->type, dlm__dtypes[i].name) != 0) i++;
    t->dtype = (dlm_dtype)i;
    return j->bad ? "dtype is not a string" : NULL;
}

static const char *dlm__st_shape(dlm_safetensors *f, dlm__json *j, dlm_st_tensor *t)
{
    int count = 0;
    t->count = 1;
    t->dims = f->dims;
    dlm__json_want(j, '[');
    while (dlm__json_next(j, ']', &count)) {
        const uint64_t d = dlm__json_count(j);
        if (j->bad) break;
        if (d > INT64_MAX || (d != 0 && t->count > SIZE_MAX / 16 / d))
            return "its shape overflows";
        *f->dims++ = (int64_t)d;
        t->n_dims++;
        t->count *= (size_t)d;
    }
    return j->bad ? "shape is not a list of sizes" : NULL;
}

/* One entry, j behind its key.  begin and end are relative to the data. */
static dlm_error dlm__st_entry(dlm_safetensors *f, dlm__json *j, dlm_st_tensor *t)
{
    static const char *const keys[] = { "dtype", "shape", "data_offsets" };
    char key[32];
    uint64_t begin = 1, end = 0;
    int count = 0, seen = 0;
    const char *wrong = NULL;
    dlm__json_want(j, '{');
    while (wrong == NULL && dlm__json_key(j, key, sizeof key, &count)) {
        int k = 0;
        while (k < 3 && strcmp(key, keys[k]) != 0) k++;
        if (k < 3 && seen >> k & 1) return dlm__bad_header(f->ctx, key, "there twice");
        seen |= 1 << k;
        if (k == 0) wrong = dlm__st_dtype(f, j, t);
        if (k == 1) wrong = dlm__st_shape(f, j, t);
        if (k == 3) dlm__json_skip(j, 0);
        if (k != 2) continue;
        dlm__json_want(j, '[');
        begin = dlm__json_count(j);
        dlm__json_want(j, ',');
        end = dlm__json_count(j);
        dlm__json_want(j, ']');
    }
    if (wrong == NULL && (j->bad || (seen & 7) != 7))
        wrong = "wants dtype, shape and data_offsets";
    if (wrong) return dlm__bad_header(f->ctx, t->name, wrong);
    if (begin > end || end > f->bytes)
        return dlm__fail(f->ctx, DLM_E_FORMAT, "safetensors: %.80s: bytes [%.0f, %.0f) "
                         "of %.0f", t->name, (double)begin, (double)end,
                         (double)f->bytes);
    t->bytes = (size_t)(end - begin);
    t->data = f->data + begin;
    if (t->dtype != DLM_DTYPE_OTHER && t->bytes != t->count * dlm__dtypes[t->dtype].size)
        return dlm__bad_header(f->ctx, t->name, "its bytes do not fit its shape");
    return DLM_OK;
}

/* Metadata: null or an object of strings. */
static const char *dlm__st_metadata(dlm_safetensors *f, dlm__json *j)
{
    int count = 0;
    if (dlm__json_word(j, "null")) return NULL;
    dlm__json_want(j, '{');
    while (dlm__json_next(j, '}', &count)) {
        dlm__pair *pair = &f->meta[f->n_meta++];
        pair->key = dlm__st_string(f, j);
        dlm__json_want(j, ':');
        pair->value = dlm__st_string(f, j);
    }
    return j->bad ? "not an object of strings" : NULL;
}

static dlm_error dlm__st_walk(dlm_safetensors *f, const char *header, size_t size)
{
    dlm__json j = { header, header + size, 0 };
    int count = 0, meta = 0;
    dlm_error e = DLM_OK;
    dlm__json_want(&j, '{');
    while (e == DLM_OK && dlm__json_next(&j, '}', &count)) {
        dlm_st_tensor *t = &f->tensors[f->count];
        memset(t, 0, sizeof *t);
        t->name = dlm__st_string(f, &j);
        dlm__json_want(&j, ':');
        if (j.bad) break;
        if (strcmp(t->name, "__metadata__") == 0) {
            const char *wrong = meta++ ? "there twice" : dlm__st_metadata(f, &j);
            if (wrong) e = dlm__bad_header(f->ctx, t->name, wrong);
        } else {
            e = dlm__st_entry(f, &j, t);
            f->count++;
        }
    }
    if (e != DLM_OK) return e;
    dlm__json_space(&j);
    if (j.bad || j.p != j.end)
        return dlm__fail(f->ctx, DLM_E_FORMAT, "safetensors: malformed near byte %.0f",
                         (double)(j.p - header) + 8.0);
    return DLM_OK;
}

static int dlm__by_name(const void *a, const void *b)
{
    return strcmp(((const dlm_st_tensor *)a)->name, ((const dlm_st_tensor *)b)->name);
}

static int dlm__by_place(const void *a, const void *b)
{
    const dlm_st_tensor *s = (const dlm_st_tensor *)a, *t = (const dlm_st_tensor *)b;
    const char *x = (const char *)s->data, *y = (const char *)t->data;
    if (x != y) return (x > y) - (x < y);
    return (s->bytes > t->bytes) - (s->bytes < t->bytes);
}

/* Every tensor begins where the one before it ends, the last ends with the file. */
static dlm_error dlm__st_check_places(dlm_safetensors *f)
{
    const char *at = f->data;
    qsort(f->tensors, (size_t)f->count, sizeof *f->tensors, dlm__by_place);
    for (int i = 0; i < f->count; i++) {
        const dlm_st_tensor *t = &f->tensors[i];
        if ((const char *)t->data != at)
            return dlm__bad_header(f->ctx, t->name, (const char *)t->data < at
                                   ? "overlaps another tensor" : "a hole before it");
        at += t->bytes;
    }
    if (at != f->data + f->bytes)
        return dlm__bad_header(f->ctx, "its end", "bytes behind the last tensor");
    qsort(f->tensors, (size_t)f->count, sizeof *f->tensors, dlm__by_name);
    for (int i = 1; i < f->count; i++)
        if (strcmp(f->tensors[i - 1].name, f->tensors[i].name) == 0)
            return dlm__bad_header(f->ctx, f->tensors[i].name, "there twice");
    return DLM_OK;
}

/* Room for all that the header can hold, in one block behind the object: a tensor has a
   brace, a pair of metadata a colon, a size of a shape a bracket or a comma before it.
   Not with dlm__make, which would touch it all: a header of nothing but braces asks for
   far more than it needs. */
static dlm_safetensors *dlm__st_new(dlm_ctx *ctx, const char *header, size_t size)
{
    size_t braces = 0, colons = 0, sizes = 0;
    dlm__arena arena = { NULL, 0 };
    dlm_safetensors f, *out;
    for (size_t i = 0; i < size; i++) {
        braces += header[i] == '{';
        colons += header[i] == ':';
        sizes += header[i] == ',' || header[i] == '[';
    }
    memset(&f, 0, sizeof f);
    for (;;) {
        out = (dlm_safetensors *)dlm__push(&arena, 1, sizeof f);
        f.tensors = (dlm_st_tensor *)dlm__push(&arena, braces, sizeof *f.tensors);
        f.meta = (dlm__pair *)dlm__push(&arena, colons, sizeof *f.meta);
        f.dims = (int64_t *)dlm__push(&arena, sizes, sizeof *f.dims);
        f.text = (char *)dlm__push(&arena, size + 1, 1);
        f.file = (dlm__file *)dlm__push(&arena, 1, sizeof *f.file);
        if (arena.base) break;
        arena.base = arena.used == SIZE_MAX ? NULL : (char *)dlm__alloc(ctx, arena.used);
        if (arena.base == NULL) return NULL;
        arena.used = 0;
    }
    memset(f.file, 0, sizeof *f.file);
    f.text_end = f.text + size + 1;
    f.ctx = ctx;
    *out = f;
    return out;
}

DLM_API dlm_error dlm_safetensors_parse(dlm_safetensors **out, dlm_ctx *ctx,
                                        const void *data, size_t size)
{
    const char *text = (const char *)data + 8;
    dlm_safetensors *f;
    uint64_t header = 0;
    dlm_error e;
    *out = NULL;
    if (size < 8)
        return dlm__fail(ctx, DLM_E_FORMAT, "safetensors: only %.0f bytes", (double)size);
    memcpy(&header, data, 8);
    if (header > size - 8 || header > 100000000)
        return dlm__fail(ctx, DLM_E_FORMAT, "safetensors: a header of %.0f bytes in %.0f",
                         (double)header, (double)size);
    if (header == 0 || *text != '{')
        return dlm__fail(ctx, DLM_E_FORMAT, "safetensors: a header must begin with '{'");
    f = dlm__st_new(ctx, text, (size_t)header);
    if (f == NULL) return dlm__fail(ctx, DLM_E_NOMEM, "safetensors: cannot allocate");
    f->data = text + header;
    f->bytes = size - 8 - (size_t)header;
    e = dlm__st_walk(f, text, (size_t)header);
    if (e == DLM_OK) e = dlm__st_check_places(f);
    if (e == DLM_OK) *out = f;
    else dlm__release(ctx, f);
    return e;
}

DLM_API const dlm_st_tensor *dlm_safetensors_find(const dlm_safetensors *f,
                                                  const char *name)
{
    dlm_st_tensor wanted;
    wanted.name = name;
    return (const dlm_st_tensor *)bsearch(&wanted, f->tensors, (size_t)f->count,
                                          sizeof wanted, dlm__by_name);
}

DLM_API const char *dlm_safetensors_metadata(const dlm_safetensors *f, const char *key)
{
    for (int i = 0; i < f->n_meta; i++)
        if (strcmp(f->meta[i].key, key) == 0) return f->meta[i].value;
    return NULL;
}

DLM_API void dlm_safetensors_close(dlm_safetensors *f)
{
    if (f == NULL) return;
#ifndef DLM_NO_STDIO
    dlm__close_file(f->ctx, f->file);
#endif
    dlm__release(f->ctx, f);
}

/* --[ widening ]--------------------------------------------------------------  */

/* IEEE half: 1 sign, 5 exponent (bias 15), 10 fraction bits. */
static float dlm__half_to_float(uint16_t h)
{
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31;
    const uint32_t fraction = h & 0x3FF;
    if (exponent == 31) return dlm__floats_scalar(sign | 0x7F800000U | fraction << 13);
    if (exponent == 0) {            /* subnormal: fraction * 2^-24, exact in float */
        const float magnitude = (float)fraction * (1.0f / 16777216.0f);
        return sign ? -magnitude : magnitude;
    }
    return dlm__floats_scalar(sign | (exponent + 112) << 23 | fraction << 13);
}

/* n values of a tensor of floats, from number `first` on. */
static void dlm__widen(const dlm_st_tensor *t, size_t first, size_t n, float *out)
{
    const size_t size = dlm__dtypes[t->dtype].size;
    const char *p = (const char *)t->data + first * size;
    for (size_t i = 0; i < n; i++, p += size) {
        uint16_t half;
        double d;
        if (t->dtype == DLM_F64) memcpy(&d, p, sizeof d);
        else memcpy(&half, p, sizeof half);
        if (t->dtype == DLM_F32) memcpy(&out[i], p, sizeof *out);
        else out[i] = t->dtype == DLM_F64 ? (float)d
            : t->dtype == DLM_F16 ? dlm__half_to_float(half)
            : dlm__floats_scalar((uint32_t)half << 16);
    }
}

static dlm_error dlm__check_floats(dlm_ctx *ctx, const dlm_st_tensor *t)
{
    if (t->dtype <= DLM_F64) return DLM_OK;     /* F32, F16, BF16, F64             */
    return dlm__fail(ctx, DLM_E_UNSUPPORTED, "%.80s: no float type we read: %.40s",
                     t->name, t->type);
}

DLM_API dlm_error dlm_safetensors_floats(dlm_ctx *ctx, const dlm_st_tensor *t, float *out)
{
    dlm_error e = dlm__check_floats(ctx, t);
    if (e == DLM_OK) dlm__widen(t, 0, t->count, out);
    return e;
}

/* ==[ layouts ]===============================================================
   How files lay out the weights of a model: which families there are, where they keep
   each of our parameters, and what becomes of a family that has LayerNorms. */

typedef enum dlm__layout { DLM__LLAMA, DLM__LLADA, DLM__SMDM, DLM__DIT } dlm__layout;

typedef struct dlm__family {
    const char *name;               /* model_type                                  */
    dlm__layout layout;
    dlm_pattern pattern;            /* when no size of blocks is given             */
    int         shifted, bias, qk_norm;     /* 2: when the file has it             */
} dlm__family;

static const dlm__family dlm__families[] = {                /* ours is the first    */
    { "dlm",            DLM__LLAMA, DLM_PATTERN_FULL,   0, 2, 2 },
    { "llama",          DLM__LLAMA, DLM_PATTERN_CAUSAL, 1, 0, 0 },
    { "qwen2",          DLM__LLAMA, DLM_PATTERN_CAUSAL, 1, 1, 0 },
    { "qwen3",          DLM__LLAMA, DLM_PATTERN_CAUSAL, 1, 0, 1 },
    { "sdar",           DLM__LLAMA, DLM_PATTERN_BLOCK,  0, 0, 1 },
    { "a2d-llama",      DLM__LLAMA, DLM_PATTERN_FULL,   0, 0, 0 },
    { "a2d-qwen2",      DLM__LLAMA, DLM_PATTERN_FULL,   0, 1, 0 },
    { "a2d-qwen3",      DLM__LLAMA, DLM_PATTERN_FULL,   0, 0, 1 },
    { "Fast_dLLM_Qwen", DLM__LLAMA, DLM_PATTERN_BLOCK,  1, 1, 0 },
    { "Dream",          DLM__LLAMA, DLM_PATTERN_FULL,   1, 1, 0 },
    { "open-dcoder",    DLM__LLAMA, DLM_PATTERN_FULL,   1, 1, 0 },
    { "llada",          DLM__LLADA, DLM_PATTERN_FULL,   0, 2, 0 },
    { "smdm",           DLM__SMDM,  DLM_PATTERN_FULL,   0, 0, 0 },
    { "mdlm",           DLM__DIT,   DLM_PATTERN_FULL,   0, 1, 0 },
    { "bd3lm",          DLM__DIT,   DLM_PATTERN_BLOCK,  0, 1, 0 },
    { "radd",           DLM__DIT,   DLM_PATTERN_FULL,   0, 1, 0 },
};
enum { DLM__N_FAMILIES = sizeof dlm__families / sizeof *dlm__families, DLM__SHARDS = 64 };

/* Files with weights, and the config that they are read for. */
typedef struct dlm__source {
    dlm_ctx           *ctx;
    const dlm__family *family;
    dlm_config         c;
    dlm_safetensors   *files[DLM__SHARDS];
    int                n_files, mapped;     /* 1: what was read may leave memory   */
} dlm__source;

/* Where another layout has our parameter; NULL: nowhere, it is zero.  q, k and v lie in
   one tensor: below each other or, in SMDM, for each key head its queries, its key and
   its value. */
static const struct { const char *ours, *llada, *smdm, *dit; } dlm__renames[] = {
    { "model.embed_tokens.weight", "model.transformer.wte.weight",
      "transformer.wte.weight", "vocab_embed.embedding" },
    { "model.norm.weight", "model.transformer.ln_f.weight", "transformer.ln_f.weight",
      "output_layer.norm_final.weight" },
    { "lm_head.weight", "model.transformer.ff_out.weight", "lm_head.weight",
      "output_layer.linear.weight" },
    { "lm_head.bias", NULL, NULL, "output_layer.linear.bias" },
    { "input_layernorm.weight", "attn_norm.weight", "norm_1.weight", "norm1.weight" },
    { "self_attn.q_proj.weight", "q_proj.weight", "attn.attn.weight", "attn_qkv.weight" },
    { "self_attn.k_proj.weight", "k_proj.weight", "attn.attn.weight", "attn_qkv.weight" },
    { "self_attn.v_proj.weight", "v_proj.weight", "attn.attn.weight", "attn_qkv.weight" },
    { "self_attn.q_proj.bias", "q_proj.bias", NULL, NULL },
    { "self_attn.k_proj.bias", "k_proj.bias", NULL, NULL },
    { "self_attn.v_proj.bias", "v_proj.bias", NULL, NULL },
    { "self_attn.o_proj.weight", "attn_out.weight", "attn.proj.weight",
      "attn_out.weight" },
    { "post_attention_layernorm.weight", "ff_norm.weight", "norm_2.weight",
      "norm2.weight" },
    { "mlp.gate_proj.weight", "ff_proj.weight", "mlp.swiglu.w1.weight", NULL },
    { "mlp.up_proj.weight", "up_proj.weight", "mlp.swiglu.w2.weight", "mlp.0.weight" },
    { "mlp.up_proj.bias", NULL, NULL, "mlp.0.bias" },
    { "mlp.down_proj.weight", "ff_out.weight", "mlp.swiglu.w3.weight", "mlp.2.weight" },
    { "mlp.down_proj.bias", NULL, NULL, "mlp.2.bias" },
};

/* What the files call parameter `ours`; NULL: they have none. */
static const char *dlm__their_name(const dlm__source *s, const char *ours)
{
    for (size_t i = 0; i < sizeof dlm__renames / sizeof *dlm__renames; i++)
        if (s->family->layout != DLM__LLAMA && strcmp(dlm__renames[i].ours, ours) == 0)
            return s->family->layout == DLM__LLADA ? dlm__renames[i].llada
                : s->family->layout == DLM__SMDM ? dlm__renames[i].smdm
                : dlm__renames[i].dit;
    return s->family->layout == DLM__LLAMA ? ours : NULL;
}

/* A name in a layer, -1: in none, as the files have it. */
static void dlm__full_name(char out[192], const dlm__source *s, int layer,
                           const char *name)
{
    static const char *const layers[] = {       /* in the order of dlm__layout      */
        "model.layers.%d.", "model.transformer.blocks.%d.", "transformer.h.%d.",
        "blocks.%d."
    };
    char prefix[64] = "";
    if (layer >= 0) snprintf(prefix, sizeof prefix, layers[s->family->layout], layer);
    snprintf(out, 192, "%s%s", prefix, name);
}

/* NULL: it is in no file.  DiTs are parts of a larger class. */
static dlm_st_tensor *dlm__find_tensor(const dlm__source *s, int layer, const char *name)
{
    char full[256] = "backbone.";
    dlm__full_name(full + 9, s, layer, name);
    for (int i = 0; i < 2 * s->n_files; i++) {
        const dlm_safetensors *f = s->files[i / 2];
        const dlm_st_tensor *t = dlm_safetensors_find(f, full + (i % 2 ? 0 : 9));
        if (t) return f->tensors + (t - f->tensors);
    }
    return NULL;
}

static dlm_st_tensor *dlm__find_param(const dlm__source *s, int layer, const char *ours)
{
    const char *name = dlm__their_name(s, ours);
    return name ? dlm__find_tensor(s, layer, name) : NULL;
}

/* 0, 1, 2 for q, k, v of a tensor that has all three; -1: a tensor of its own. */
static int dlm__part_of(const dlm__source *s, const dlm__param *p)
{
    const char *qkv = "qkv", *at = strncmp(p->name, "self_attn.", 10) ? NULL
        : strchr(qkv, p->name[10]);
    return at && s->family->layout >= DLM__SMDM ? (int)(at - qkv) : -1;
}

/* Which row of that tensor is row r of the part. */
static int dlm__row_of(const dlm__source *s, int part, int r)
{
    const int D = s->c.head_dim, per = s->c.heads / s->c.kv_heads, head = r / D;
    if (part < 0) return r;
    if (s->family->layout == DLM__DIT) return r + part * s->c.heads * D;
    return part == 0 ? (head / per * (per + 2) + head % per) * D + r % D
                     : (head * (per + 2) + per + part - 1) * D + r % D;
}

/* Every parameter is where it must be, has its shape and a type that we read; `used` says
   then that the model has a use for it. */
static dlm_error dlm__check_param(const dlm__source *s, const dlm__param *p, int layer)
{
    const char *name = dlm__their_name(s, p->name);
    const int64_t cols = dlm__dim_of(&s->c, p->cols);
    const int n_dims = cols > 1 ? 2 : 1;
    int64_t rows = dlm__part_of(s, p) < 0 ? dlm__dim_of(&s->c, p->rows)
        : (s->c.heads + 2 * s->c.kv_heads) * s->c.head_dim;
    dlm_st_tensor *t = name ? dlm__find_tensor(s, layer, name) : NULL;
    char full[192];
    if (name == NULL) return DLM_OK;
    dlm__full_name(full, s, layer, name);
    if (t == NULL)
        return dlm__fail(s->ctx, DLM_E_MISMATCH, "checkpoint: %s is missing", full);
    t->used = 1;
    if (s->family->layout == DLM__SMDM && p->when == DLM__UNTIED && t->n_dims == 2)
        rows -= t->dims[0] == rows - 1;         /* the mask may have no row        */
    if (t->n_dims != n_dims || t->dims[0] != rows || (n_dims > 1 && t->dims[1] != cols))
        return dlm__fail(s->ctx, DLM_E_MISMATCH, "checkpoint: %.80s has %d dimensions "
                         "[%.0f, %.0f], the config needs [%.0f, %.0f]", full, t->n_dims,
                         t->n_dims > 0 ? (double)t->dims[0] : 1.0,
                         t->n_dims > 1 ? (double)t->dims[1] : 1.0, (double)rows,
                         (double)cols);
    return dlm__check_floats(s->ctx, t);
}

static dlm_error dlm__check_params(const dlm__source *s)
{
    dlm_error e = DLM_OK;
    for (int l = -1; l < s->c.layers; l++)
        for (int i = 0; i < DLM__N_PARAMS && e == DLM_OK; i++)
            if (dlm__has(l, dlm__params[i].offset)
                && dlm__param_size(&s->c, &dlm__params[i]) > 0)
                e = dlm__check_param(s, &dlm__params[i], l);
    return e;
}

/* No tensor is left over, but for angles of rotary positions and limits of noise. */
static dlm_error dlm__check_used(const dlm__source *s)
{
    for (int i = 0; i < s->n_files; i++)
        for (int k = 0; k < s->files[i]->count; k++) {
            const dlm_st_tensor *t = &s->files[i]->tensors[k];
            if (!t->used && !strstr(t->name, "rotary_emb.inv_freq")
                && !strstr(t->name, "sampling_eps_m"))
                return dlm__fail(s->ctx, DLM_E_MISMATCH, "checkpoint: the model has no "
                                 "%.80s", t->name);
        }
    return DLM_OK;
}

/* Rows of one parameter.  What no tensor has is zero, but for the bias of the mask where
   the family never predicts it: -INFINITY (SUBS, Sahoo et al. 2024). */
static void dlm__part_rows(const dlm__source *s, const dlm__param *p, int layer,
                           int first, int n, float *out)
{
    const dlm_st_tensor *t = dlm__find_param(s, layer, p->name);
    const int part = dlm__part_of(s, p), there = t ? (int)t->dims[0] : 0;
    const size_t cols = (size_t)dlm__dim_of(&s->c, p->cols);
    for (int i = 0, run; i < n; i += run, out += (size_t)run * cols) {
        const int row = dlm__row_of(s, part, first + i);
        run = part < 0 && row < there ? dlm__min(n - i, there - row) : 1;
        if (row < there) dlm__widen(t, (size_t)row * cols, (size_t)run * cols, out);
        else memset(out, 0, cols * sizeof *out);
#if defined(__linux__) && !defined(DLM_NO_STDIO)
        if (row < there && s->mapped)
            dlm__forget((const char *)t->data + t->bytes / t->count * (size_t)row * cols,
                        t->bytes / t->count * (size_t)run * cols);
#endif
        if (p->when == DLM__HEAD_BIAS && s->family->layout != DLM__LLAMA
            && s->c.mask_id >= row && s->c.mask_id < row + run)
            out[s->c.mask_id - row] = -INFINITY;
    }
}

/* A dlm__rows_fn. */
static const float *dlm__source_rows(void *from, const dlm__param *p, int layer,
                                     int first, int n, float *out)
{
    const dlm__source *s = (const dlm__source *)from;
    for (float *to = out; n > 0; p++) {
        const int there = dlm__param_size(&s->c, p) ? dlm__dim_of(&s->c, p->rows) : 0;
        const int m = dlm__min(n, there - first);
        if (m > 0) {
            dlm__part_rows(s, p, layer, first, m, to);
            to += (size_t)m * (size_t)dlm__dim_of(&s->c, p->cols);
            n -= m;
        }
        first = dlm__max(first - there, 0);     /* on in the next of the table     */
    }
    return out;
}

/* --[ folding ]---------------------------------------------------------------
   A DiT at constant time has LayerNorms n(x) of gain g, maybe a shift b, modulated: its
   linear layers see (n(x) g + b)(1 + scale) + shift, and what its blocks write is times a
   gate.  All of it goes into weights, exactly:
     gain := g (1 + scale)     bias += W (b (1 + scale) + shift)     W_out := gate W_out
   and LayerNorm becomes RMSNorm, as what is written to the residual stream is centred:
   the mean over its C channels goes.  (Peebles and Xie 2023; time is 0: MDLM.) */

typedef struct dlm__fold {
    const dlm__source *s;
    int       C, n;
    float    *condition;            /* (n) of the modulation; n = 0: there is none */
    float    *parts;                /* (6, C) shift, scale, gate; and those again  */
    float    *matrix, *row, *sums;  /* (6 C, n), (widest), (widest)                */
    dlm_error e;                    /* the first                                   */
} dlm__fold;

/* A tensor (rows, cols) as floats; cols 0: (rows), zero when it is missing. */
static void dlm__fold_tensor(dlm__fold *w, int layer, const char *name, const char *end,
                             int rows, int cols, float *out)
{
    char full[64];
    dlm_st_tensor *t;
    snprintf(full, sizeof full, "%s.%s", name, end);
    t = dlm__find_tensor(w->s, layer, full);
    memset(out, 0, (size_t)rows * (size_t)dlm__max(cols, 1) * sizeof *out);
    if (w->e != DLM_OK || (t == NULL && cols == 0)) return;
    if (t == NULL || t->n_dims != 1 + (cols > 0) || t->dims[0] != rows
        || (cols > 0 && t->dims[1] != cols))
        w->e = dlm__fail(w->s->ctx, DLM_E_MISMATCH, "checkpoint: no %s [%d, %d]", full,
                         rows, cols);
    else w->e = dlm__check_floats(w->s->ctx, t);
    if (w->e != DLM_OK) return;
    t->used = 1;
    dlm__widen(t, 0, t->count, out);
}

/* bias (rows) += W (rows, cols) x. */
static void dlm__fold_reader(dlm__fold *w, const float *weights, int rows, int cols,
                             const float *x, float *bias)
{
    const dlm_matrix plain = dlm__plain(weights, rows, cols, DLM_F32);
    dlm_matmul(w->s->ctx, w->row, x, &plain, 1);
    w->s->ctx->k->add(bias, w->row, rows);
}

/* out (rows) = A x + b of two tensors. */
static void dlm__fold_linear(dlm__fold *w, int layer, const char *name, const float *x,
                             int rows, int cols, float *out)
{
    dlm__fold_tensor(w, layer, name, "bias", rows, 0, out);
    dlm__fold_tensor(w, layer, name, "weight", rows, cols, w->matrix);
    dlm__fold_reader(w, w->matrix, rows, cols, x, out);
}

/* Time 0 is cosines of 1 and sines of 0, which pass two layers, each with a silu. */
static void dlm__fold_condition(dlm__fold *w, int features)
{
    for (int layer = 0; layer < 2; layer++) {
        float *x = w->condition;
        for (int i = 0; i < features && layer == 0; i++) w->sums[i] = i < features / 2;
        dlm__fold_linear(w, -1, layer ? "sigma_map.mlp.2" : "sigma_map.mlp.0", w->sums,
                         w->n, layer ? w->n : features, x);
        for (int i = 0; i < w->n; i++) x[i] /= 1.0f + expf(-x[i]);
        memcpy(w->sums, x, (size_t)w->n * sizeof *x);
    }
}

static void dlm__fold_modulation(dlm__fold *w, int layer, const char *name, int n)
{
    for (int i = 0; i < n * w->C; i++) w->parts[i] = i / w->C % 3 == 2;    /* the gates */
    if (w->n > 0)
        dlm__fold_linear(w, layer, name, w->condition, n * w->C, w->n, w->parts);
}

/* A norm's gain is scaled; shift becomes all that its readers see added. */
static void dlm__fold_norm(dlm__fold *w, int layer, const char *name, float *gain,
                           float *shift)
{
    dlm__fold_tensor(w, layer, name, "bias", w->C, 0, w->row);
    for (int i = 0; i < w->C; i++) {
        const float scale = 1.0f + shift[w->C + i];
        shift[i] += w->row[i] * scale;
        gain[i] *= scale;
    }
}

/* Of a writer (C, n), or its bias, value (c, i) at x[c by_c + i by_i]: gated, centred. */
static void dlm__fold_writer(const dlm__fold *w, float *x, size_t by_c, size_t by_i,
                             int n, const float *gate)
{
    memset(w->sums, 0, (size_t)n * sizeof *w->sums);
    for (int pass = 0; pass < 2; pass++)
        for (int c = 0; c < w->C; c++)
            for (int i = 0; i < n; i++) {
                float *at = &x[(size_t)c * by_c + (size_t)i * by_i];
                if (pass == 0) w->sums[i] += *at *= gate ? gate[c] : 1.0f;
                else *at -= w->sums[i] / (float)w->C;
            }
}

static void dlm__fold_layer(dlm__fold *w, dlm_model *m, int l)
{
    const dlm_config *c = &m->config;
    const int C = c->dim, F = c->ffn, HD = c->heads * c->head_dim;
    const dlm__layer p = dlm__layer_at(c, m->weights, l);
    float *attn = w->parts, *mlp = attn + 3 * C;
    dlm__fold_modulation(w, l, "adaLN_modulation", 6);
    dlm__fold_norm(w, l, "norm1", p.norm1, attn);
    dlm__fold_reader(w, p.wq, HD, C, attn, p.bq);
    dlm__fold_reader(w, p.wk, HD, C, attn, p.bk);
    dlm__fold_reader(w, p.wv, HD, C, attn, p.bv);
    dlm__fold_writer(w, p.wo, (size_t)HD, 1, HD, attn + 2 * C);
    dlm__fold_norm(w, l, "norm2", p.norm2, mlp);
    dlm__fold_reader(w, p.wup, F, C, mlp, p.bup);
    dlm__fold_writer(w, p.wdown, (size_t)F, 1, F, mlp + 2 * C);
    dlm__fold_writer(w, p.bdown, 1, 1, 1, mlp + 2 * C);
}

/* Of a plain model that has its weights as the files have them. */
static dlm_error dlm__fold_model(const dlm__source *s, dlm_model *m)
{
    const dlm_config *c = &m->config;
    const dlm__layer g = dlm__layer_at(c, m->weights, -1);
    const dlm_st_tensor *time = dlm__find_tensor(s, -1, "sigma_map.mlp.0.weight");
    const int there = time && time->n_dims == 2
        && time->dims[0] + time->dims[1] < 1 << 12;
    const int features = there ? (int)time->dims[1] : 0, C = c->dim;
    const int n = there ? (int)time->dims[0] : 0, HD = c->heads * c->head_dim;
    const int most = dlm__max(dlm__max(c->ffn, c->vocab), HD);
    const size_t widest = (size_t)dlm__max(most, 6 * C + features + n);
    const size_t matrix = (size_t)dlm__max(6 * C, n) * (size_t)dlm__max(features, n);
    dlm__fold w;
    memset(&w, 0, sizeof w);
    w.s = s; w.C = C; w.n = n;
    w.sums = (float *)dlm__alloc(s->ctx, (4 * widest + matrix) * sizeof *w.sums);
    if (w.sums == NULL) return dlm__fail(s->ctx, DLM_E_NOMEM, "folding: cannot allocate");
    w.row = w.sums + widest;
    w.parts = w.row + widest;
    w.condition = w.parts + widest;
    w.matrix = w.condition + widest;
    if (there) dlm__fold_condition(&w, features);
    for (int l = 0; l < c->layers && w.e == DLM_OK; l++) dlm__fold_layer(&w, m, l);
    dlm__fold_modulation(&w, -1, "output_layer.adaLN_modulation", 2);
    dlm__fold_norm(&w, -1, "output_layer.norm_final", g.norm_out, w.parts);
    dlm__fold_reader(&w, g.head, c->vocab, C, w.parts, g.head_bias);
    dlm__fold_writer(&w, g.tok_emb, 1, (size_t)C, c->vocab, NULL);
    dlm__release(s->ctx, w.sums);
    return w.e;
}

/* --[ reading ]---------------------------------------------------------------  */

static dlm_error dlm__fill_from(dlm_model *m, dlm__source *s)
{
    const dlm_config *c = &m->config;
    const int widest = dlm__max(dlm__max(c->ffn, c->dim), c->heads * c->head_dim);
    dlm__filling f;
    memset(&f, 0, sizeof f);
    f.m = m; f.take = dlm__source_rows; f.from = s;
    f.size = (size_t)dlm__max(s->ctx->k->nr * widest, 1 << 21);
    f.room = (float *)dlm__alloc(s->ctx, f.size * sizeof *f.room);
    if (f.room == NULL)
        return dlm__fail(s->ctx, DLM_E_NOMEM, "checkpoint: cannot allocate %.0f bytes",
                         (double)(f.size * sizeof *f.room));
    dlm__fill(&f);
    dlm__release(s->ctx, f.room);
    return DLM_OK;
}

/* The model of a source, packed in a type unless that is DLM_DTYPE_OTHER.  One that is
   folded needs its floats all at once, for a while. */
static dlm_error dlm__read_model(dlm_model **out, dlm__source *s, dlm_dtype packed)
{
    const int folded = s->family->layout == DLM__DIT;
    dlm_model *m = NULL, *plain;
    dlm_error e = dlm_config_resolve(s->ctx, &s->c);
    if (e == DLM_OK) e = dlm__check_params(s);
    if (e == DLM_OK && !folded) e = dlm__check_used(s);
    if (e == DLM_OK && !folded && packed != DLM_DTYPE_OTHER)
        e = dlm__packed_new(&m, s->ctx, &s->c, packed, NULL);
    else if (e == DLM_OK)
        e = dlm__model_new(&m, s->ctx, &s->c, DLM_F32, dlm__plain_carve, NULL);
    if (e == DLM_OK) e = dlm__fill_from(m, s);
    if (e == DLM_OK && folded) e = dlm__fold_model(s, m);
    if (e == DLM_OK && folded) e = dlm__check_used(s);
    if (e == DLM_OK && folded && packed != DLM_DTYPE_OTHER) {
        plain = m;
        m = NULL;
        e = dlm_model_pack(&m, s->ctx, plain, packed, NULL);
        dlm_model_free(plain);
    }
    if (e != DLM_OK) dlm_model_free(m);
    *out = e == DLM_OK ? m : NULL;
    return e;
}

/* ==[ checkpoints ]===========================================================
   Our own files: the config as metadata strings "dlm.<field>", the tokenizer as
   "dlm.tokenizer", tensors by their Hugging Face names. */

static dlm_error dlm__config_from(dlm_config *c, dlm_ctx *ctx, const dlm_safetensors *f)
{
    memset(c, 0, sizeof *c);
    for (int i = 0; dlm__config_options[i].name; i++) {
        const dlm__option *field = &dlm__config_options[i];
        const char *text;
        char key[32];
        int64_t whole = 0;
        float real = 0.0f;
        snprintf(key, sizeof key, "dlm.%s", field->name);
        text = dlm_safetensors_metadata(f, key);
        if (text == NULL && i >= DLM__OLD_FIELDS) continue;
        if (text == NULL)
            return dlm__fail(ctx, DLM_E_MISMATCH, "checkpoint: no metadata \"%s\": not a "
                             "file of dlm_save", key);
        if (field->real ? !dlm__float_from(text, &real)
                        : !dlm__int_from(text, -1, INT_MAX, &whole))
            return dlm__fail(ctx, DLM_E_FORMAT, "checkpoint: %s is \"%.40s\"", key, text);
        dlm__set_option(field, c, field->real ? (double)real : (double)whole);
    }
    return dlm_config_resolve(ctx, c);
}

static const char *const dlm__kind_names[] = { "bytes", "chars", "pieces", "json" };

/* A file of pieces travels as hexadecimal digits, which become bytes where they are. */
static dlm_error dlm__pieces_from(dlm_tokenizer **tok, dlm_ctx *ctx, char *hex)
{
    const size_t n = strlen(hex);
    for (size_t i = 0; i < n; i += 2) {
        const int byte = dlm__hex(hex + i, 2);
        if (byte < 0)
            return dlm__fail(ctx, DLM_E_FORMAT, "tokenizer: dlm.chars: not hexadecimal");
        hex[i / 2] = (char)byte;
    }
    return dlm_tokenizer_create(tok, ctx, DLM_TOKENIZER_PIECES, hex, n / 2);
}

static dlm_error dlm__tokenizer_from(dlm_tokenizer **tok, dlm_ctx *ctx,
                                     dlm_safetensors *f)
{
    const char *kind = dlm_safetensors_metadata(f, "dlm.tokenizer");
    const char *chars = dlm_safetensors_metadata(f, "dlm.chars");
    int k = 0;
    *tok = NULL;
    if (kind == NULL) return DLM_OK;
    while (k < 4 && strcmp(kind, dlm__kind_names[k]) != 0) k++;
    if (k == DLM_TOKENIZER_PIECES && chars)
        return dlm__pieces_from(tok, ctx, (char *)chars);      /* f's own memory   */
    if (k == DLM_TOKENIZER_BYTES || (k < 4 && chars))
        return dlm_tokenizer_create(tok, ctx, (dlm_tokenizer_kind)k, chars,
                                    chars ? strlen(chars) : 0);
    return dlm__fail(ctx, DLM_E_UNSUPPORTED, "checkpoint: tokenizer \"%.40s\"", kind);
}

static dlm_error dlm__check_vocab(dlm_ctx *ctx, const dlm_model *m,
                                  const dlm_tokenizer *tok)
{
    if (tok == NULL || tok->vocab <= m->config.vocab) return DLM_OK;
    return dlm__fail(ctx, DLM_E_MISMATCH, "tokenizer: %d ids, the model knows %d",
                     tok->vocab, m->config.vocab);
}

static dlm_error dlm__checkpoint_from(dlm_model **out, dlm_tokenizer **tok, dlm_ctx *ctx,
                                      const void *data, size_t size)
{
    dlm__source s;
    dlm_error e;
    memset(&s, 0, sizeof s);
    s.ctx = ctx; s.family = dlm__families; s.n_files = 1;
    e = dlm_safetensors_parse(&s.files[0], ctx, data, size);
    if (e == DLM_OK) e = dlm__config_from(&s.c, ctx, s.files[0]);
    if (e == DLM_OK) e = dlm__read_model(out, &s, DLM_DTYPE_OTHER);
    if (e == DLM_OK && tok) e = dlm__tokenizer_from(tok, ctx, s.files[0]);
    if (e == DLM_OK && tok) e = dlm__check_vocab(ctx, *out, *tok);
    dlm_safetensors_close(s.files[0]);
    if (e == DLM_OK) return DLM_OK;
    dlm_model_free(*out);
    *out = NULL;
    if (tok) dlm_tokenizer_free(*tok);
    if (tok) *tok = NULL;
    return e;
}

/* --[ training states ]-------------------------------------------------------
   The flat arrays of a trainer, as they are. */

typedef struct dlm__array {
    dlm_tensor t;                   /* of a state's arrays: name and data alone    */
    size_t     count;
    size_t     numbers;             /* so many must be numbers; behind them stands the
                                       head's bias, which may be -INFINITY         */
    float      least;               /* no sound number is below                    */
} dlm__array;

/* Array i of a file: a tensor of the model m or, t not NULL, what the state of t consists
   of; 0: there are no more. */
static int dlm__array_at(const dlm_model *m, const dlm_trainer *t, int i, dlm__array *a)
{
    static const char *const names[] = { "weights", "adam.m", "adam.v", "ema" };
    float *const state[] = { m->weights, t ? t->adam_m : NULL, t ? t->adam_v : NULL,
                             t ? t->ema : NULL };
    memset(a, 0, sizeof *a);
    a->least = t && i == 2 ? 0.0f : -FLT_MAX;           /* a mean of squares       */
    if (t == NULL && i < dlm_model_tensors(m)) {
        dlm_model_tensor(m, i, &a->t);
        a->count = (size_t)a->t.rows * (size_t)a->t.cols;
    } else if (t && i < 4 && state[i]) {
        snprintf(a->t.name, sizeof a->t.name, "%s", names[i]);
        a->t.data = state[i];
        a->count = m->n_params;
    }
    a->numbers = a->count;
    if (m->config.head_bias && (t ? i % 3 == 0 : i == dlm_model_tensors(m) - 1))
        a->numbers -= (size_t)m->config.vocab;
    return a->count > 0;
}

/* data (count), maybe unaligned: numbers where they must be, and no mean of squares below
   zero, whose root would be NaN in an update that reports finite gradients. */
static dlm_error dlm__check_array(dlm_ctx *ctx, dlm_error code, const char *what,
                                  const dlm__array *a, const void *data)
{
    for (size_t i = 0; i < a->count; i++) {
        float x;
        memcpy(&x, (const char *)data + i * sizeof x, sizeof x);
        if (!(x >= (i < a->numbers ? a->least : -INFINITY) && x <= FLT_MAX))
            return dlm__fail(ctx, code, "%s: %s[%.0f] is %g", what, a->t.name, (double)i,
                             (double)x);
    }
    return DLM_OK;
}

/* Checks everything before anything is copied. */
static dlm_error dlm__trainer_from(dlm_trainer *t, const dlm_safetensors *f)
{
    dlm_ctx *ctx = t->ctx;
    const char *step = dlm_safetensors_metadata(f, "dlm.step");
    const char *objective = dlm_safetensors_metadata(f, "dlm.objective");
    const char *kind = dlm__objective_names[t->options.objective];
    const dlm_st_tensor *from[4];
    dlm__array to;
    dlm_config config;
    int64_t steps;
    dlm_error e = dlm__config_from(&config, ctx, f);
    if (e != DLM_OK) return e;
    if (memcmp(&config, &t->model->config, sizeof config) != 0)
        return dlm__fail(ctx, DLM_E_MISMATCH, "training state: of another config");
    if (step == NULL || objective == NULL || strcmp(objective, kind) != 0)
        return dlm__fail(ctx, DLM_E_MISMATCH, "training state: objective %s, not %s",
                         objective ? objective : "missing", kind);
    if (!dlm__int_from(step, 0, (int64_t)1 << 53, &steps))  /* exact in a double   */
        return dlm__fail(ctx, DLM_E_FORMAT, "training state: step \"%.40s\", not 0..2^53",
                         step);
    for (int i = 0; dlm__array_at(t->model, t, i, &to); i++) {
        from[i] = dlm_safetensors_find(f, to.t.name);
        if (from[i] == NULL || from[i]->dtype != DLM_F32 || from[i]->count != to.count)
            return dlm__fail(ctx, DLM_E_MISMATCH, "training state: no %s of %.0f floats",
                             to.t.name, (double)to.count);
        e = dlm__check_array(ctx, DLM_E_FORMAT, "training state", &to, from[i]->data);
        if (e != DLM_OK) return e;
    }
    for (int i = 0; dlm__array_at(t->model, t, i, &to); i++)
        memcpy(to.t.data, from[i]->data, from[i]->bytes);
    t->steps = steps;
    memset(t->gradients, 0, t->model->n_params * sizeof *t->gradients);
    return DLM_OK;
}

DLM_API dlm_error dlm_trainer_load_memory(dlm_trainer *t, const void *data, size_t size)
{
    dlm_safetensors *f;
    dlm_error e = dlm_safetensors_parse(&f, t->ctx, data, size);
    if (e == DLM_OK) e = dlm__trainer_from(t, f);
    dlm_safetensors_close(f);
    return e;
}

#ifndef DLM_NO_STDIO

/* --[ saving ]----------------------------------------------------------------
   How long the header is, is known and filled in when it has been written; and what could
   not be written, the stream remembers. */

typedef struct dlm__text {          /* what is written:                            */
    const dlm_model     *m;
    const dlm_tokenizer *tok;       /* with it, or NULL                            */
    const dlm_trainer   *trainer;   /* not NULL: a training state                  */
} dlm__text;

static void dlm__put_quoted(FILE *f, const char *s)
{
    fputc('"', f);
    for (; *s; s++)
        if (*s == '"' || *s == '\\') fprintf(f, "\\%c", *s);
        else if ((unsigned char)*s < 0x20) fprintf(f, "\\u%04x", (unsigned)*s);
        else fputc(*s, f);
    fputc('"', f);
}

/* The key is ours and needs no escapes. */
static void dlm__put_pair(FILE *f, const char *key, const char *value)
{
    fprintf(f, ",\"%s\":", key);
    dlm__put_quoted(f, value);
}

static void dlm__put_array(FILE *f, const dlm__array *a, size_t *offset)
{
    const size_t end = *offset + a->count * sizeof(float);
    fprintf(f, ",\"%s\":{\"dtype\":\"F32\",\"shape\":[", a->t.name);
    if (a->t.cols > 1) fprintf(f, "%d,%d", a->t.rows, a->t.cols);
    else fprintf(f, "%.0f", (double)a->count);
    fprintf(f, "],\"data_offsets\":[%.0f,%.0f]}", (double)*offset, (double)end);
    *offset = end;
}

/* The vocabulary as text: the characters, the JSON, or the file in hexadecimal. */
static void dlm__put_tokenizer(FILE *f, const dlm_tokenizer *tok)
{
    dlm__put_pair(f, "dlm.tokenizer", dlm__kind_names[tok->kind]);
    if (tok->kind == DLM_TOKENIZER_CHARS || tok->kind == DLM_TOKENIZER_JSON)
        dlm__put_pair(f, "dlm.chars", tok->text);
    if (tok->kind != DLM_TOKENIZER_PIECES) return;
    fprintf(f, ",\"dlm.chars\":\"");
    for (size_t i = 0; i < tok->size; i++)
        fprintf(f, "%02x", (unsigned)(unsigned char)tok->text[i]);
    fputc('"', f);
}

static void dlm__put_config(FILE *f, const dlm_config *c)
{
    for (int i = 0; dlm__config_options[i].name; i++) {
        const dlm__option *field = &dlm__config_options[i];
        const double x = dlm__get_option(field, c);
        char key[32], value[DLM__NUMBER];
        if (x == 0.0 && i >= DLM__OLD_FIELDS) continue;
        snprintf(key, sizeof key, "dlm.%s", field->name);
        if (field->real) dlm__float_text(value, (float)x);
        else snprintf(value, sizeof value, "%.0f", x);
        dlm__put_pair(f, key, value);
    }
}

static void dlm__put_header(FILE *f, const dlm__text *t)
{
    size_t offset = 0;
    dlm__array a;
    fprintf(f, "{\"__metadata__\":{\"format\":\"pt\"");
    dlm__put_config(f, &t->m->config);
    if (t->tok) dlm__put_tokenizer(f, t->tok);
    if (t->trainer) {
        fprintf(f, ",\"dlm.step\":\"%.0f\"", (double)t->trainer->steps);
        dlm__put_pair(f, "dlm.objective",
                      dlm__objective_names[t->trainer->options.objective]);
    }
    fputc('}', f);
    for (int i = 0; dlm__array_at(t->m, t->trainer, i, &a); i++)
        dlm__put_array(f, &a, &offset);
    fputc('}', f);
    for (long n = ftell(f); n % 8 > 0; n++) fputc(' ', f);
}

static int dlm__write_text(FILE *f, void *text)
{
    const dlm__text *t = (const dlm__text *)text;
    uint64_t length = 0;
    long end;
    dlm__array a;
    if (fwrite(&length, sizeof length, 1, f) != 1) return 0;
    dlm__put_header(f, t);
    end = ftell(f);
    length = (uint64_t)end - sizeof length;
    for (int i = 0; dlm__array_at(t->m, t->trainer, i, &a); i++)
        if (fwrite(a.t.data, sizeof(float), a.count, f) != a.count) return 0;
    return end > 0 && !ferror(f) && fseek(f, 0, SEEK_SET) == 0
        && fwrite(&length, sizeof length, 1, f) == 1;
}

/* What loading would refuse is not saved. */
static dlm_error dlm__save(dlm_ctx *ctx, const char *path, const dlm_model *m,
                           const dlm_tokenizer *tok, const dlm_trainer *trainer)
{
    const char *what = trainer ? "training state" : "checkpoint";
    dlm__text t = { m, tok, trainer };
    dlm__array a;
    dlm_error e = DLM_OK;
    for (int i = 0; e == DLM_OK && dlm__array_at(m, trainer, i, &a); i++)
        e = dlm__check_array(ctx, DLM_E_INPUT, what, &a, a.t.data);
    return e == DLM_OK ? dlm__write_file(ctx, path, dlm__write_text, &t) : e;
}

DLM_API dlm_error dlm_save(dlm_ctx *ctx, const char *path, const dlm_model *m,
                           const dlm_tokenizer *tok)
{
    dlm_error e = dlm__want_plain(ctx, "save", m);
    if (e == DLM_OK) e = dlm__check_vocab(ctx, m, tok);
    return e == DLM_OK ? dlm__save(ctx, path, m, tok, NULL) : e;
}

DLM_API dlm_error dlm_trainer_save(dlm_trainer *t, const char *path)
{
    return dlm__save(t->ctx, path, t->model, NULL, t);
}

#endif /* !DLM_NO_STDIO */

/* ==[ llama2c ]===============================================================
   llama2.c's .bin: seven i32 {dim, hidden, layers, heads, kv_heads, vocab, seq}, vocab
   negative when the head is its own; then f32 tensors, each for all layers. */

/* The next rows*cols floats at *from; with D > 0 rotary pairs (2j, 2j+1) of every head
   of D rows go to (j, j + D/2). */
static void dlm__llama_take(const char **from, const dlm_tensor *t, int D)
{
    const size_t bytes = (size_t)t->cols * sizeof(float);
    for (int r = 0; r < t->rows; r++, *from += bytes) {
        const int in_head = D ? r % D : 0;
        const int to = D ? r - in_head + in_head / 2 + in_head % 2 * (D / 2) : r;
        memcpy(t->data + (size_t)to * (size_t)t->cols, *from, bytes);
    }
}

/* from: what follows the header, as long as it must be. */
static void dlm__llama_weights(const char *from, dlm_model *m)
{
    static const char *const order[] = {        /* of the file; * : turned, - : angles */
        "embed_tokens", "input_layernorm", "*q_proj", "*k_proj", "v_proj", "o_proj",
        "post_attention_layernorm", "gate_proj", "down_proj", "up_proj", "model.norm",
        "-", "lm_head"
    };
    const dlm_config *c = &m->config;
    for (size_t k = 0; k < sizeof order / sizeof *order; k++) {
        const int turned = order[k][0] == '*';
        for (int i = 0; i < dlm_model_tensors(m); i++) {
            dlm_tensor t;
            dlm_model_tensor(m, i, &t);
            if (strstr(t.name, order[k] + turned))
                dlm__llama_take(&from, &t, turned ? c->head_dim : 0);
        }
        if (order[k][0] == '-')
            from += (size_t)(c->max_seq * c->head_dim) * sizeof(float);
    }
}

/* A checkpoint has a '{' at byte 8, where the number of layers begins here. */
static int dlm__is_llama2c(const void *data, size_t size)
{
    int32_t h[7];
    if (size < sizeof h || ((const char *)data)[8] == '{') return 0;
    memcpy(h, data, sizeof h);
    return h[0] > 0 && h[1] > 0 && h[2] > 0 && h[2] <= 1024;
}

static dlm_error dlm__llama2c_from(dlm_model **out, dlm_ctx *ctx, const void *data,
                                   size_t size)
{
    int32_t h[7];
    double wanted;
    dlm_config c;
    dlm_error e;
    *out = NULL;
    if (size < sizeof h)
        return dlm__fail(ctx, DLM_E_FORMAT, "llama2.c: only %.0f bytes", (double)size);
    memcpy(h, data, sizeof h);
    memset(&c, 0, sizeof c);
    c.dim = h[0]; c.ffn = h[1]; c.layers = h[2]; c.heads = h[3]; c.kv_heads = h[4];
    c.untied_head = h[5] < 0;
    c.vocab = h[5] == INT32_MIN ? 0 : h[5] < 0 ? -h[5] : h[5];
    c.max_seq = h[6];
    c.mask_id = c.vocab;
    c.pattern = DLM_PATTERN_CAUSAL;
    c.no_qk_norm = 1;
    c.norm_eps = 1e-5f;
    e = dlm_config_resolve(ctx, &c);
    if (e != DLM_OK) return e;
    wanted = sizeof h + 4.0 * ((double)dlm__count_params(&c)
                               + (double)(c.max_seq * c.head_dim));
    if ((double)size != wanted)
        return dlm__fail(ctx, DLM_E_FORMAT, "llama2.c: %.0f bytes, its header wants %.0f",
                         (double)size, wanted);
    e = dlm__model_new(out, ctx, &c, DLM_F32, dlm__plain_carve, NULL);
    if (e == DLM_OK) dlm__llama_weights((const char *)data + sizeof h, *out);
    return e;
}

/* ==[ folders ]===============================================================
   Models as others publish them: a config.json, one or several safetensors, the files of
   a tokenizer.  What the keys of a config mean is one table, which of them must say what
   is built here another. */

#ifndef DLM_NO_STDIO

typedef struct dlm__folder {
    dlm__source  s;
    const char  *path, *mask_from;
    int          mask, tied, causal, tokens, stop;      /* -1: not said            */
    char         type[48], act[32];
    char         names[DLM__SHARDS][64];    /* of the files                        */
} dlm__folder;

/* What a key is called, here and there. */
#define DLM__KEY(names, f, real) \
    { names, offsetof(dlm__folder, f), sizeof(((dlm__folder *)0)->f), real, 0, 0, 0 }
static const dlm__option dlm__keys[] = {
    DLM__KEY("hidden_size d_model hidden_dim model.hidden_size", s.c.dim, 0),
    DLM__KEY("num_hidden_layers n_layers n_blocks model.n_blocks", s.c.layers, 0),
    DLM__KEY("num_attention_heads n_heads model.n_heads", s.c.heads, 0),
    DLM__KEY("num_key_value_heads n_kv_heads", s.c.kv_heads, 0),
    DLM__KEY("head_dim", s.c.head_dim, 0),
    DLM__KEY("intermediate_size mlp_hidden_size", s.c.ffn, 0),
    DLM__KEY("vocab_size", s.c.vocab, 0),
    DLM__KEY("max_position_embeddings max_sequence_length model_length model.length",
             s.c.max_seq, 0),
    DLM__KEY("rms_norm_eps", s.c.norm_eps, 1),
    DLM__KEY("rope_theta rope_parameters.rope_theta", s.c.rope_theta, 1),
    DLM__KEY("block_size bd_size", s.c.block, 0),
    DLM__KEY("mask_token_id", mask, 0),
    DLM__KEY("eos_token_id", stop, 0),
    DLM__KEY("tie_word_embeddings weight_tying", tied, 0),
    DLM__KEY("attention_bias include_qkv_bias", s.c.qkv_bias, 0),
    DLM__KEY("is_causal", causal, 0),       /* these two are ours                  */
    DLM__KEY("shifted", s.c.shifted, 0),
    DLM__KEY("tokens", tokens, 0),          /* RADD: without the mask              */
    DLM__END
};

/* What is not built here and changes results: other values are refused. */
static const struct { const char *names, *allowed; } dlm__only[] = {
    { "rope_scaling.rope_type rope_scaling.type rope_parameters.rope_type", "default" },
    { "rope_scaling.factor partial_rotary_factor rope_parameters.partial_rotary_factor",
      "1 1.0" },
    { "use_sliding_window use_mrope mlp_bias include_bias alibi attention_layer_norm "
      "scale_logits input_emb_norm model.scale_by_sigma time_conditioning", "false" },
    { "rope adaln", "true" },
    { "layer_norm_type", "rms" },
    { "block_type", "llama" },
    { "graph.type", "absorb" },
    { "num_experts num_local_experts n_routed_experts", "0 1" },
    { "quantization_config quantization clip_qkv", "none" },
};

/* The next word of a list; returns what follows it, NULL: there is none. */
static const char *dlm__next_word(const char *list, char word[64])
{
    const size_t n = strcspn(list += strspn(list, " "), " ");
    snprintf(word, 64, "%.*s", (int)n, list);
    return n > 0 ? list + n : NULL;
}

static int dlm__listed(const char *list, const char *text)
{
    char word[64];
    while ((list = dlm__next_word(list, word)) != NULL)
        if (strcmp(word, text) == 0) return 1;
    return 0;
}

/* The scalar at a path of keys, "a.b", as text: of a list the first.  0: there is none,
   or it is null.  j->bad: malformed, too long, or there twice. */
static int dlm__json_get(dlm__json *j, const char *path, char *out, size_t size)
{
    const size_t n = strcspn(path, ".");
    char key[64];
    const char *const keys[] = { key };
    dlm__json in = *j, at;
    int found = dlm__json_take(&in, '{');
    if (!found) return 0;
    in = *j;
    snprintf(key, sizeof key, "%.*s", (int)n, path);
    dlm__json_fields(&in, keys, 1, &at);
    if (at.p && path[n]) found = dlm__json_get(&at, path + n + 1, out, size);
    j->bad |= in.bad | at.bad;
    if (at.p == NULL || path[n] || j->bad) return at.p && found && !j->bad;
    (void)dlm__json_take(&at, '[');
    dlm__json_space(&at);
    if (*at.p == '"') dlm__json_string(&at, out, size);
    else if (*at.p == '{') snprintf(out, size, "an object");
    else snprintf(out, size, "%.*s", (int)strcspn(at.p, ",]} \n\t\r"), at.p);
    j->bad |= at.bad;
    return 1;
}

static dlm_error dlm__config_key(dlm__folder *f, dlm__json *j, const dlm__option *k)
{
    const char *list = k->name;
    char word[64], text[64], said[64] = "";
    int64_t whole = 0;
    float real = 0.0f;
    while ((list = dlm__next_word(list, word)) != NULL) {
        if (!dlm__json_get(j, word, text, sizeof text)) continue;
        whole = strcmp(text, "true") == 0;
        if (!whole && strcmp(text, "false") != 0
            && !(k->real ? dlm__float_from(text, &real)
                         : dlm__int_from(text, 0, INT_MAX, &whole)))
            return dlm__fail(f->s.ctx, DLM_E_FORMAT, "%s is \"%s\"", word, text);
        if (said[0] && dlm__get_option(k, f) != (k->real ? (double)real : (double)whole))
            return dlm__fail(f->s.ctx, DLM_E_FORMAT, "%s is %s, elsewhere %s", word, text,
                             said);
        snprintf(said, sizeof said, "%s", text);
        dlm__set_option(k, f, k->real ? (double)real : (double)whole);
    }
    return DLM_OK;
}

static dlm_error dlm__read_config(dlm__folder *f, dlm__json *j)
{
    dlm_error e = DLM_OK;
    char word[64], text[64];
    for (size_t i = 0; i < sizeof dlm__only / sizeof *dlm__only; i++) {
        const char *list = dlm__only[i].names;
        while ((list = dlm__next_word(list, word)) != NULL)
            if (dlm__json_get(j, word, text, sizeof text)
                && !dlm__listed(dlm__only[i].allowed, text))
                return dlm__fail(f->s.ctx, DLM_E_UNSUPPORTED, "%s is %s; only %s is "
                                 "built here", word, text, dlm__only[i].allowed);
    }
    for (const dlm__option *k = dlm__keys; k->name && e == DLM_OK; k++)
        e = dlm__config_key(f, j, k);
    if (!dlm__json_get(j, "model_type", f->type, sizeof f->type) && f->tokens > 0
        && f->type[0] == '\0')
        snprintf(f->type, sizeof f->type, "radd");
    if (!dlm__json_get(j, "hidden_act", f->act, sizeof f->act))
        (void)dlm__json_get(j, "activation_type", f->act, sizeof f->act);
    return e;
}

/* Gives a file of the folder, if it is there, to read; checks that it is JSON. */
static dlm_error dlm__with_json(dlm__folder *f, const char *name,
                                dlm_error (*read_it)(dlm__folder *f, dlm__json *j))
{
    char path[DLM__PATH];
    dlm__file file;
    dlm__json j, all;
    dlm_error e;
    if (!dlm__is_there(f->path, name)) return DLM_OK;
    dlm__folder_path(path, f->path, name);
    e = dlm__open_file(f->s.ctx, path, &file);
    if (e != DLM_OK) return e;
    j.p = (const char *)file.data; j.end = j.p + file.size; j.bad = 0;
    all = j;
    dlm__json_skip(&all, 0);
    dlm__json_space(&all);
    if (all.bad || all.p != all.end)
        e = dlm__fail(f->s.ctx, DLM_E_FORMAT, "malformed near byte %.0f",
                      (double)(all.p - j.p));
    if (e == DLM_OK) e = read_it(f, &j);
    if (e == DLM_OK && j.bad)
        e = dlm__fail(f->s.ctx, DLM_E_FORMAT, "malformed, or a key is there twice");
    return dlm__end_file(f->s.ctx, path, &file, e);
}

/* Opens a file of weights that is not open yet. */
static dlm_error dlm__open_shard(dlm__folder *f, const char *name)
{
    char path[DLM__PATH];
    const int n = f->s.n_files;
    dlm_error e;
    for (int i = 0; i < n; i++) if (strcmp(f->names[i], name) == 0) return DLM_OK;
    if (n == DLM__SHARDS || strlen(name) > 63 || strpbrk(name, "/\\:"))
        return dlm__fail(f->s.ctx, DLM_E_UNSUPPORTED, "%.64s: not one of at most %d "
                         "files in this folder", name, (int)DLM__SHARDS);
    dlm__folder_path(path, f->path, name);
    e = dlm_safetensors_open(&f->s.files[n], f->s.ctx, path);
    if (e != DLM_OK) return e;
    snprintf(f->names[n], sizeof f->names[n], "%s", name);
    f->s.n_files++;
    f->s.mapped &= f->s.files[n]->file->mapped;
    for (int i = 0; i < f->s.files[n]->count; i++)
        for (int k = 0; k < n; k++)
            if (dlm_safetensors_find(f->s.files[k], f->s.files[n]->tensors[i].name))
                return dlm__fail(f->s.ctx, DLM_E_MISMATCH, "%.80s is in %s and in %s",
                                 f->s.files[n]->tensors[i].name, f->names[k], name);
    return DLM_OK;
}

/* The files that an index names; which tensors they have, they say themselves. */
static dlm_error dlm__read_index(dlm__folder *f, dlm__json *j)
{
    char name[256];
    int count = 0;
    dlm_error e = DLM_OK;
    if (!dlm__json_find(j, "weight_map"))
        return dlm__fail(f->s.ctx, DLM_E_FORMAT, "no weight_map");
    dlm__json_want(j, '{');
    while (e == DLM_OK && dlm__json_key(j, NULL, 0, &count)) {
        dlm__json_string(j, name, sizeof name);
        if (!j->bad) e = dlm__open_shard(f, name);
    }
    return e;
}

/* --[ what is missing ]-------------------------------------------------------  */

/* What the files show, and what a layout has. */
static void dlm__config_form(dlm__folder *f)
{
    const dlm__family *x = f->s.family;
    dlm_st_tensor *head = dlm__find_param(&f->s, -1, "lm_head.weight");
    const dlm_st_tensor *embed = dlm__find_param(&f->s, -1, "model.embed_tokens.weight");
    const dlm_st_tensor *up = dlm__find_param(&f->s, 0, "mlp.up_proj.weight");
    const int dit = x->layout == DLM__DIT;
    const int matrices = embed && up && embed->n_dims == 2 && up->n_dims == 2;
    dlm_config *c = &f->s.c;
    if (c->vocab == 0 && f->tokens > 0) c->vocab = f->tokens + 1;
    if (c->vocab == 0 && matrices) c->vocab = (int)(embed->dims[0] & INT_MAX);
    if (c->dim == 0 && matrices) c->dim = (int)(embed->dims[1] & INT_MAX);
    if (c->ffn == 0 && matrices) c->ffn = (int)(up->dims[0] & INT_MAX);
    while (x->layout == DLM__SMDM && c->layers < 1024
           && dlm__find_param(&f->s, c->layers, "input_layernorm.weight")) c->layers++;
    c->qkv_bias |= x->bias == 1
        || (x->bias == 2 && dlm__find_param(&f->s, 0, "self_attn.q_proj.bias"));
    c->no_qk_norm = !x->qk_norm || (x->qk_norm == 2
        && !dlm__find_param(&f->s, 0, "self_attn.q_norm.weight"));
    c->gelu_mlp = dit || dlm__find_param(&f->s, 0, "mlp.up_proj.bias");
    if (dit) c->kv_heads = c->head_dim = 0;     /* as all its parts lie in one tensor */
    c->head_bias = x->layout >= DLM__SMDM || dlm__find_param(&f->s, -1, "lm_head.bias");
    c->untied_head = f->tied != 1 || (head && embed && (head->bytes != embed->bytes
        || memcmp(head->data, embed->data, head->bytes) != 0));
    if (head && !c->untied_head) head->used = 1;            /* the embedding again */
    if (x->layout != DLM__LLAMA && c->norm_eps == 0.0f) c->norm_eps = 1e-5f;
}

/* SMDM's files have no config: its paper's heads and length. */
static void dlm__config_given(dlm__folder *f, const dlm_open_options *how)
{
    dlm_config *c = &f->s.c;
    const int smdm = f->s.family->layout == DLM__SMDM;
    if (how->heads) c->heads = how->heads;
    if (c->heads == 0 && smdm) c->heads = c->dim / (c->dim <= 1024 ? 64 : 128);
    if (how->max_seq) c->max_seq = how->max_seq;
    if (c->max_seq == 0 && smdm) c->max_seq = 2048;
    c->pattern = f->causal == 1 ? DLM_PATTERN_CAUSAL : f->s.family->pattern;
    if (f->causal == 0 && c->pattern == DLM_PATTERN_CAUSAL) c->pattern = DLM_PATTERN_FULL;
    if (c->pattern == DLM_PATTERN_CAUSAL) c->block = 0;     /* means the context there */
    else c->shifted |= f->s.family->shifted;
    if (how->block != 0) {
        c->block = dlm__max(how->block, 0);
        c->pattern = DLM_PATTERN_FULL;
    }
    if (c->block > 0) c->pattern = DLM_PATTERN_BLOCK;
    if (how->shifted != 0) c->shifted = how->shifted > 0;
}

/* The mask: the caller's, the config's, the tokenizer's, or what the family has. */
static dlm_error dlm__config_mask(dlm__folder *f, const dlm_tokenizer *tok,
                                  const dlm_open_options *how)
{
    dlm_config *c = &f->s.c;
    const struct { int id; const char *from; } known[] = {
        { how->mask_id > 0 ? how->mask_id : -1, "dlm_open_options" },
        { f->mask, "config.json: mask_token_id" },
        { tok && tok->mask < c->vocab ? tok->mask : -1, tok ? tok->mask_from : NULL },
        { f->s.family->layout >= DLM__SMDM ? c->vocab - 1 : -1, "its family: the last" },
        { c->pattern == DLM_PATTERN_CAUSAL ? c->vocab : -1, "nowhere: it needs none" },
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (known[i].id >= 0) {
            f->mask_from = known[i].from;
            c->mask_id = known[i].id;
            c->mask_is_0 = known[i].id == 0;
            return DLM_OK;
        }
    return dlm__fail(f->s.ctx, DLM_E_CONFIG, "mask_id: neither config.json nor a "
                     "tokenizer has one; give it in dlm_open_options");
}

/* All that a folder says, and what follows from it. */
static dlm_error dlm__read_folder(dlm__folder *f, dlm_tokenizer **tok, int wanted,
                                  const dlm_open_options *how)
{
    static const char index[] = "model.safetensors.index.json";
    const int lone = dlm__file_mode(f->path) >= 0;
    dlm_error e = dlm__with_json(f, "config.json", dlm__read_config);
    const char *act = NULL;
    if (e == DLM_OK)
        e = dlm__with_json(f, "generation_config.json", dlm__read_config);
    if (e == DLM_OK && how->family == NULL && f->type[0] == '\0')
        e = dlm__fail(f->s.ctx, DLM_E_IO, "no config.json with a model_type, and no "
                      "family named");
    for (int i = 0; i < DLM__N_FAMILIES; i++)
        if (strcmp(dlm__families[i].name, how->family ? how->family : f->type) == 0)
            f->s.family = &dlm__families[i];
    if (e == DLM_OK && f->s.family == NULL)
        e = dlm__fail(f->s.ctx, DLM_E_UNSUPPORTED, "model_type \"%.60s\" is not built "
                      "here", how->family ? how->family : f->type);
    if (e == DLM_OK && !lone) e = dlm__with_json(f, index, dlm__read_index);
    if (e == DLM_OK && f->s.n_files == 0)
        e = dlm__open_shard(f, lone ? "" : "model.safetensors");
    if (e == DLM_OK && wanted && (dlm__is_there(f->path, "tokenizer.json")
                        || dlm__is_there(f->path, "vocab.json")))
        e = dlm_tokenizer_open(tok, f->s.ctx, f->path);
    if (e == DLM_OK && wanted && *tok == NULL)  /* one that dlm_save put there     */
        e = dlm__tokenizer_from(tok, f->s.ctx, f->s.files[0]);
    if (e != DLM_OK) return e;
    if (*tok && f->stop >= 0) (*tok)->stop = f->stop;
    dlm__config_form(f);
    dlm__config_given(f, how);
    act = f->s.c.gelu_mlp ? "gelu_new gelu_pytorch_tanh" : "silu swish";
    if (f->act[0] && !dlm__listed(act, f->act))
        return dlm__fail(f->s.ctx, DLM_E_UNSUPPORTED, "hidden_act is %s, here it is %s",
                         f->act, act);
    return dlm__config_mask(f, *tok, how);
}

/* What dlm_describe repeats. */
static void dlm__tell_origin(const dlm__folder *f, const dlm_tokenizer *tok, dlm_model *m)
{
    const dlm_st_tensor *t = dlm__find_param(&f->s, -1, "model.embed_tokens.weight");
    const char *head = !m->config.untied_head ? "tied"
        : f->tied == 1 ? "its own, though it is said to be tied" : "its own";
    snprintf(m->origin, sizeof m->origin, "family      %s\nstored      %.8s in %d file%s"
             "\nhead        %s\nmask from   %.80s\ntokenizer   %d ids\n",
             f->s.family->name, t->type, f->s.n_files, f->s.n_files > 1 ? "s" : "", head,
             f->mask_from ? f->mask_from : "its tokenizer", tok ? tok->vocab : 0);
}

static dlm_error dlm__open_folder(dlm_model **out, dlm_tokenizer **tok, dlm_ctx *ctx,
                                  const char *path, const dlm_open_options *how)
{
    const int plain = how->type == DLM_F32 && !how->packed;
    dlm_tokenizer *own = NULL;
    dlm__folder f;
    dlm_error e;
    memset(&f, 0, sizeof f);
    f.s.ctx = ctx; f.path = path; f.s.mapped = 1;
    f.mask = f.stop = f.tied = f.causal = -1;
    e = strlen(path) + 300 > DLM__PATH ? dlm__fail(ctx, DLM_E_IO, "so long a path")
        : dlm__read_folder(&f, &own, tok || how->mask_id <= 0, how);
    if (e == DLM_OK)
        e = dlm__read_model(out, &f.s, plain ? DLM_DTYPE_OTHER : how->type);
    if (e == DLM_OK) e = dlm__check_vocab(ctx, *out, own);
    if (e == DLM_OK) dlm__tell_origin(&f, own, *out);
    for (int i = 0; i < f.s.n_files; i++) dlm_safetensors_close(f.s.files[i]);
    if (e == DLM_OK && tok) *tok = own;
    else dlm_tokenizer_free(own);
    if (e == DLM_OK) return e;
    dlm_model_free(*out);
    *out = NULL;
    return strncmp(ctx->error, path, strlen(path)) ? dlm__name_file(ctx, path, e) : e;
}

#endif /* !DLM_NO_STDIO */

/* ==[ loading ]===============================================================
   Models of any kind; and whatever is read from memory is read from files, too. */

DLM_API dlm_error dlm_load_memory(dlm_model **out, dlm_tokenizer **tok, dlm_ctx *ctx,
                                  const void *data, size_t size)
{
    *out = NULL;
    if (tok) *tok = NULL;
    if (dlm__is_llama2c(data, size)) return dlm__llama2c_from(out, ctx, data, size);
    return dlm__checkpoint_from(out, tok, ctx, data, size);
}

#ifndef DLM_NO_STDIO

DLM_API dlm_error dlm_tokenizer_load(dlm_tokenizer **out, dlm_ctx *ctx,
                                     dlm_tokenizer_kind kind, const char *path)
{
    dlm__file file;
    dlm_error e = dlm__open_file(ctx, path, &file);
    *out = NULL;
    if (e == DLM_OK)
        e = dlm_tokenizer_create(out, ctx, kind, (const char *)file.data, file.size);
    return dlm__end_file(ctx, path, &file, e);
}

DLM_API dlm_error dlm_safetensors_open(dlm_safetensors **out, dlm_ctx *ctx,
                                       const char *path)
{
    dlm__file file;
    dlm_error e = dlm__open_file(ctx, path, &file);
    *out = NULL;
    if (e == DLM_OK) e = dlm_safetensors_parse(out, ctx, file.data, file.size);
    if (e != DLM_OK) return dlm__end_file(ctx, path, &file, e);
    *(*out)->file = file;
    return DLM_OK;
}

DLM_API dlm_error dlm_load(dlm_model **out, dlm_tokenizer **tok, dlm_ctx *ctx,
                           const char *path)
{
    dlm__file file;
    dlm_error e = dlm__open_file(ctx, path, &file);
    *out = NULL;
    if (tok) *tok = NULL;
    if (e == DLM_OK) e = dlm_load_memory(out, tok, ctx, file.data, file.size);
    return dlm__end_file(ctx, path, &file, e);
}

DLM_API dlm_error dlm_open(dlm_model **out, dlm_tokenizer **tok, dlm_ctx *ctx,
                           const char *path, const dlm_open_options *how)
{
    static const dlm_open_options none = { NULL, DLM_F32, 0, 0, 0, 0, 0, 0 };
    dlm_model *plain;
    dlm_error e;
    *out = NULL;
    if (tok) *tok = NULL;
    if (how == NULL) how = &none;
    e = dlm__check_type(ctx, "type", how->type, 1);
    if (e != DLM_OK) return e;
    if (how->family || dlm__file_mode(path) == -2 || dlm__is_there(path, "config.json"))
        return dlm__open_folder(out, tok, ctx, path, how);
    if (how->block || how->shifted || how->mask_id || how->max_seq || how->heads)
        return dlm__fail(ctx, DLM_E_CONFIG, "%.100s: block, shifted, mask_id, max_seq: "
                         "only of a folder", path);
    e = dlm_load(&plain, tok, ctx, path);
    if (e != DLM_OK || (how->type == DLM_F32 && !how->packed)) {
        *out = plain;
        return e;
    }
    e = dlm_model_pack(out, ctx, plain, how->type, NULL);
    dlm_model_free(plain);
    if (e != DLM_OK && tok) dlm_tokenizer_free(*tok);
    if (e != DLM_OK && tok) *tok = NULL;
    return e;
}

DLM_API dlm_error dlm_trainer_load(dlm_trainer *t, const char *path)
{
    dlm__file file;
    dlm_error e = dlm__open_file(t->ctx, path, &file);
    if (e == DLM_OK) e = dlm_trainer_load_memory(t, file.data, file.size);
    return dlm__end_file(t->ctx, path, &file, e);
}

#endif /* !DLM_NO_STDIO */

#endif /* implementation, part 2 */

#ifdef DLM__SET_ASIDE               /* the includer's macros again                 */
#pragma pop_macro("B")
#pragma pop_macro("C")
#pragma pop_macro("D")
#pragma pop_macro("F")
#pragma pop_macro("G")
#pragma pop_macro("H")
#pragma pop_macro("K")
#pragma pop_macro("L")
#pragma pop_macro("M")
#pragma pop_macro("N")
#pragma pop_macro("P")
#pragma pop_macro("Q")
#pragma pop_macro("R")
#pragma pop_macro("S")
#pragma pop_macro("T")
#pragma pop_macro("V")
#pragma pop_macro("abs")
#pragma pop_macro("add")
#pragma pop_macro("constrain")
#pragma pop_macro("dot")
#pragma pop_macro("max")
#pragma pop_macro("min")
#pragma pop_macro("round")
#undef DLM__SET_ASIDE
#endif
#endif /* DLM__KERNEL_PASS */

/* ==[ history ]===============================================================
   0.1.0   first version */

/* ==[ license ]===============================================================
   This file is available under two licenses; choose the one you like.

   ALTERNATIVE A - MIT License

   Copyright (c) 2026 the dlm.h authors

   Permission is hereby granted, free of charge, to any person obtaining a copy of this
   software and associated documentation files (the "Software"), to deal in the
   Software without restriction, including without limitation the rights to use, copy,
   modify, merge, publish, distribute, sublicense, and/or sell copies of the Software,
   and to permit persons to whom the Software is furnished to do so, subject to the
   following conditions:

   The above copyright notice and this permission notice shall be included in all copies
   or substantial portions of the Software.

   THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED,
   INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A
   PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT
   HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF
   CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE
   OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.

   ALTERNATIVE B - Public domain (unlicense.org)

   This is free and unencumbered software released into the public domain.

   Anyone is free to copy, modify, publish, use, compile, sell, or distribute this
   software, either in source code form or as a compiled binary, for any purpose,
   commercial or non-commercial, and by any means.

   In jurisdictions that recognize copyright laws, the author or authors of this
   software dedicate any and all copyright interest in the software to the public
   domain. We make this dedication for the benefit of the public at large and to the
   detriment of our heirs and successors. We intend this dedication to be an overt act
   of relinquishment in perpetuity of all present and future rights to this software
   under copyright law.

   THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED,
   INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A
   PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS BE LIABLE FOR
   ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
   OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR
   OTHER DEALINGS IN THE SOFTWARE. */
