/* bench_step - how many tokens per second does training see, and where does a step go?

   Build:  make build/bench_step
   Run:    build/bench_step [--quick]              (isa: DLM_ISA=avx2 and so on)

   Rows "step" are whole training steps on random windows of a random text: noise,
   forward, backward, clip and AdamW; precision is that of dlm_train_options.

   The phases under them take one causal batch, all rows looked at, through the pieces of
   a trainer, in f32; share_of_pass is their time over that of pass, measured in turns.
       forward    cross-entropy of every row; the session reads the weights as stored, as
                  a trainer does
       pass       forward and backward
       backward   medians of pass minus forward; what keeping activations for it costs
                  counts as backward
       update     clip and AdamW
       products   the products of a pass with weights, alone: its share_of_pass is the
                  part of a pass that faster matmuls could make faster.  Those inside
                  attention are not products with weights.  Gradients of weights are
                  overwritten here, the pass adds to them
   --quick leaves out gpt2_124M and shortens the batch of b_10.65M. */
#define _POSIX_C_SOURCE 199309L
#define DLM_IMPLEMENTATION
#include "dlm.h"
#include "bench.h"

#define TEXT_TOKENS 65536
#define MOST_THREADS 2

typedef struct shape {                     /* a model and its batch                */
    const char *name;
    int dim, layers, heads, kv_heads, ffn, vocab, T, B;
    int quick_B;                           /* 0: not in the quick run              */
    int alone;                             /* 1: numbers of threads do not take turns:
                                              a model with its trainer has 2.3 GB, and
                                              no more than two of them are held    */
} shape;

/* The last has GPT-2's sizes but for the MLP, three matrices of 2048 where GPT-2 has two
   of 3072: 123,552,768 parameters (GPT-2: 124,439,808, positions and biases included). */
static const shape shapes[] = {
    { "a_0.26M",    64,  5,  8,  4,  172,   512, 256,  8, 8, 0 },
    { "char_1M",   128,  5,  4,  4,  352,    66, 128, 16, 8, 0 },
    { "b_10.65M",  384,  6,  6,  6, 1024,    65, 256, 16, 1, 0 },
    { "gpt2_124M", 768, 12, 12, 12, 2048, 50257,  64,  4, 0, 1 }
};

static const struct { const char *name; dlm_pattern pattern; int precisions; }
objectives[] = {                           /* precisions 2: also in bf16           */
    { "mdlm", DLM_PATTERN_FULL, 2 }, { "block", DLM_PATTERN_BLOCK, 1 },
    { "ar", DLM_PATTERN_CAUSAL, 1 }
};

typedef struct product {                   /* of a linear layer, all rows          */
    int          out, in;
    const float *w;                        /* (out, in) the model's                */
    float       *dw;                       /* (out, in) the trainer's              */
    float       *x, *y;                    /* (rows, in), (rows, out); y is dy, too */
} product;

typedef struct run {                       /* one model in training                */
    const shape *shape;
    int B, threads;
    dlm_dtype precision;
    dlm_ctx     *ctx;
    dlm_model   *model;
    dlm_trainer *trainer;
    dlm_session *session;
    const int   *text;                     /* (TEXT_TOKENS)                        */
    dlm_batch    batch;                    /* B causal sequences of T, all looked at */
    double       flops;                    /* of all steps so far                  */
    long         steps;
    product     *products, head;           /* (n_products) in order, without head  */
    int          n_products;
    float       *dx, *floats;              /* (rows, widest in); every x, y and dx */
} run;

static const int *random_text(int vocab)   /* never the mask, the last id          */
{
    const dlm_address at = { 1, DLM_RANDOM_USER, 0, 0, 0 };
    int *text = (int *)bench_alloc(TEXT_TOKENS, sizeof(int));
    for (uint32_t i = 0; i < TEXT_TOKENS; i++)
        text[i] = (int)(dlm_uniform(&at, i) * (vocab - 1));
    return text;
}

static void run_open(run *r, const shape *s, int B, dlm_pattern pattern, int threads,
                     dlm_dtype precision, const int *text)
{
    dlm_config cfg = {0};
    dlm_train_options opt = {0};
    cfg.vocab = s->vocab, cfg.dim = s->dim, cfg.layers = s->layers;
    cfg.heads = s->heads, cfg.kv_heads = s->kv_heads, cfg.ffn = s->ffn;
    cfg.max_seq = s->T, cfg.pattern = pattern;
    opt.precision = precision;
    opt.max_rows = 2 * B * s->T;           /* a doubled batch still is one pass    */
    if (pattern != DLM_PATTERN_BLOCK) opt.max_rows = B * s->T;
    memset(r, 0, sizeof *r);
    r->shape = s, r->B = B, r->threads = threads, r->precision = precision;
    r->text = text;
    r->ctx = bench_ctx(DLM_ISA_AUTO, threads);
    bench_require(r->ctx, dlm_model_create(&r->model, r->ctx, &cfg, 1, NULL));
    bench_require(r->ctx, dlm_trainer_create(&r->trainer, r->ctx, r->model, &opt, NULL));
}

static void run_close(run *r)
{
    dlm_session_free(r->session);
    dlm_trainer_free(r->trainer);
    dlm_model_free(r->model);
    dlm_shutdown(r->ctx);
}

static void run_step(void *arg)
{
    run *r = (run *)arg;
    dlm_report report;
    bench_require(r->ctx, dlm_trainer_step_text(r->trainer, r->text, TEXT_TOKENS,
                                                r->shape->T, r->B, &report));
    r->flops += report.flops;
    r->steps++;
}

/* --[ phases ]---------------------------------------------------------------- */

static void score_row(void *user, int i, float *logits)
{
    const run *r = (const run *)user;
    dlm_cross_entropy(r->ctx, logits, r->shape->vocab, r->text[i + 1],
                      1.0 / r->batch.n_out);
}

static void run_forward(void *arg)
{
    run *r = (run *)arg;
    bench_require(r->ctx, dlm_forward(r->session, &r->batch, score_row, r));
}

static void run_pass(void *arg)
{
    run *r = (run *)arg;
    bench_require(r->ctx, dlm_trainer_pass(r->trainer, &r->batch, score_row, r));
}

static void run_update(void *arg)
{
    run *r = (run *)arg;
    bench_require(r->ctx, dlm_trainer_update(r->trainer, NULL));
}

/* --[ products ]--------------------------------------------------------------
   Weights, their gradients and, per layer, activations lie apart from each other, as in
   a trainer.  The head goes both ways for some rows at a time, as there. */

static void product_forward(const run *r, const product *p, int first, int n)
{
    dlm_matmul_nt(r->ctx, p->y, p->x + (size_t)first * (size_t)p->in, p->w, n, p->out,
                  p->in);
}

static void product_backward(const run *r, const product *p, int first, int n)
{
    dlm_matmul_nn(r->ctx, r->dx, p->y, p->w, n, p->in, p->out);
    dlm_matmul_tn(r->ctx, p->dw, p->y, p->x + (size_t)first * (size_t)p->in, p->out,
                  p->in, n);
}

static void run_products(void *arg)
{
    const run *r = (const run *)arg;
    const int N = r->batch.n_out, chunk = r->trainer->work->chunk;   /* private */
    for (int i = 0; i < r->n_products; i++) product_forward(r, &r->products[i], 0, N);
    for (int first = 0; first < N; first += chunk) {
        const int n = first + chunk < N ? chunk : N - first;
        product_forward(r, &r->head, first, n);
        product_backward(r, &r->head, first, n);
    }
    for (int i = r->n_products - 1; i >= 0; i--)
        product_backward(r, &r->products[i], 0, N);
}

static double products_flops(const run *r)
{
    double sum = (double)r->head.out * r->head.in;
    for (int i = 0; i < r->n_products; i++)
        sum += (double)r->products[i].out * r->products[i].in;
    return 3.0 * 2.0 * r->batch.n_out * sum;
}

/* The product that begins with tensor t: k and v are one, as are gate and up.  0: none
   does. */
static int product_of(const run *r, const dlm_tensor *t, product *p)
{
    static const struct { const char *name; int tensors; } firsts[] = {
        { "q_proj.weight", 1 }, { "k_proj.weight", 2 }, { "o_proj.weight", 1 },
        { "gate_proj.weight", 2 }, { "down_proj.weight", 1 }, { "embed_tokens.weight", 1 }
    };
    for (int i = 0; i < (int)(sizeof firsts / sizeof firsts[0]); i++) {
        if (strstr(t->name, firsts[i].name) == NULL) continue;
        memset(p, 0, sizeof *p);
        p->out = firsts[i].tensors * t->rows;
        p->in = t->cols;
        p->w = t->data;
        p->dw = r->trainer->gradients + (t->data - r->model->weights);
        return 1;
    }
    return 0;
}

static float *take(float **from, size_t rows, int cols)
{
    float *x = *from;
    *from += rows * (size_t)cols;
    return x;
}

static void run_open_products(run *r)
{
    const int tensors = dlm_model_tensors(r->model), chunk = r->trainer->work->chunk;
    const size_t N = (size_t)r->batch.n_out;
    size_t n = N * (size_t)r->shape->dim + (size_t)chunk * (size_t)r->shape->vocab;
    int widest = r->shape->dim;
    float *next;
    r->products = (product *)bench_alloc((size_t)tensors, sizeof(product));
    for (int i = 0; i < tensors; i++) {
        product *p = &r->products[r->n_products];
        dlm_tensor t;
        dlm_model_tensor(r->model, i, &t);
        if (!product_of(r, &t, p)) continue;
        if (t.layer < 0) { r->head = *p; continue; }
        n += N * (size_t)(p->in + p->out);
        if (p->in > widest) widest = p->in;
        r->n_products++;
    }
    n += N * (size_t)widest;
    r->floats = next = (float *)bench_alloc(n, sizeof(float));
    for (size_t i = 0; i < n; i++) next[i] = (float)(i * 2654435761u % 2001u) * 1e-3f - 1;
    r->dx = take(&next, N, widest);
    r->head.x = take(&next, N, r->head.in);
    r->head.y = take(&next, (size_t)chunk, r->head.out);
    for (int i = 0; i < r->n_products; i++) {
        r->products[i].x = take(&next, N, r->products[i].in);
        r->products[i].y = take(&next, N, r->products[i].out);
    }
}

static void run_open_phases(run *r)
{
    const int T = r->shape->T, N = r->B * T;
    dlm_limits limits = {0};
    int *start = (int *)bench_alloc((size_t)r->B + 1, sizeof(int));
    int *rows = (int *)bench_alloc((size_t)N, sizeof(int));
    dlm_keys *keys = (dlm_keys *)bench_alloc((size_t)N, sizeof(dlm_keys));
    for (int b = 0; b <= r->B; b++) start[b] = b * T;
    for (int b = 0; b < r->B; b++)
        dlm_keys_fill(keys + b * T, T, DLM_PATTERN_CAUSAL, 1, 0);
    for (int i = 0; i < N; i++) rows[i] = i;
    r->batch.n_seqs = r->B;
    r->batch.start = start;
    r->batch.tokens = r->text;
    r->batch.keys = keys;
    r->batch.out_rows = rows;
    r->batch.n_out = N;
    limits.seqs = r->B;
    limits.slots = T;
    bench_require(r->ctx, dlm_session_create(&r->session, r->ctx, r->model, &limits,
                                             NULL));
    run_open_products(r);
}

static void run_close_phases(run *r)
{
    free((void *)r->batch.start);
    free((void *)r->batch.keys);
    free((void *)r->batch.out_rows);
    free(r->products);
    free(r->floats);
}

/* --[ rows ]------------------------------------------------------------------ */

static void print_head(const run *r, const char *objective, const char *phase)
{
    printf("%s,%s,%d,%d,%d,%s,%s,", r->shape->name, objective, r->B, r->shape->T,
           r->threads, r->precision == DLM_BF16 ? "bf16" : "f32", phase);
}

/* share: of a pass; negative: none. */
static void print_row(const run *r, const char *objective, const char *phase,
                      const bench_case *c, double flops, double share)
{
    print_head(r, objective, phase);
    printf("%.0f,%.0f,%.0f,%.3f,%.1f,", bench_median(c), bench_min(c), bench_max(c),
           bench_ms(c), 1e-9 * flops * bench_median(c) / c->work);
    if (share >= 0.0) printf("%.3f", share);
    printf(",%d,%d\n", BENCH_SAMPLES, bench_noisy(c));
    fflush(stdout);
}

/* A difference of two medians has no samples of its own, so no minimum and maximum. */
static void print_backward(const run *r, const bench_case *forward,
                           const bench_case *pass, double flops)
{
    const double ms = bench_ms(pass) - bench_ms(forward);
    print_head(r, "causal", "backward");
    printf("%.0f,,,%.3f,%.1f,%.3f,%d,%d\n", 1e3 * pass->work / ms, ms, 1e-6 * flops / ms,
           ms / bench_ms(pass), BENCH_SAMPLES, bench_noisy(pass) || bench_noisy(forward));
}

#define MOST_RUNS (2 * MOST_THREADS)

/* threads and the next n - 1 numbers of threads take turns, in every precision. */
static void bench_steps(const shape *s, int B, int which, const int *text, int threads,
                        int n)
{
    const int precisions = objectives[which].precisions;
    run r[MOST_RUNS];
    bench_case c[MOST_RUNS];
    memset(c, 0, sizeof c);
    for (int i = 0; i < n * precisions; i++) {
        run_open(&r[i], s, B, objectives[which].pattern, threads + i / precisions,
                 i % precisions ? DLM_BF16 : DLM_F32, text);
        c[i].run = run_step;
        c[i].arg = &r[i];
        c[i].work = (double)B * s->T;
    }
    bench_run(c, n * precisions);
    for (int i = 0; i < n * precisions; i++) {
        print_row(&r[i], objectives[which].name, "step", &c[i],
                  r[i].flops / (double)r[i].steps, -1.0);
        run_close(&r[i]);
    }
}

enum { FORWARD, PASS, UPDATE, PRODUCTS, PHASES };

static void print_phases(const run *r, const bench_case *c)
{
    static const char *const names[PHASES] = { "forward", "pass", "update", "products" };
    const double forward = dlm_forward_flops(&r->model->config, &r->batch);
    const double flops[PHASES] = { forward, 3.0 * forward, 0.0, products_flops(r) };
    for (int p = 0; p < PHASES; p++) {
        print_row(r, "causal", names[p], &c[p], flops[p], bench_ms(&c[p])
                                                        / bench_ms(&c[PASS]));
        if (p == PASS) print_backward(r, &c[FORWARD], &c[PASS], 2.0 * forward);
    }
}

static void bench_phases(const shape *s, int B, const int *text, int threads, int n)
{
    static void (*const phases[PHASES])(void *arg) = {
        run_forward, run_pass, run_update, run_products
    };
    run r[MOST_THREADS];
    bench_case c[PHASES * MOST_THREADS];
    memset(c, 0, sizeof c);
    for (int t = 0; t < n; t++) {
        run_open(&r[t], s, B, DLM_PATTERN_CAUSAL, threads + t, DLM_F32, text);
        run_open_phases(&r[t]);
        for (int p = 0; p < PHASES; p++) {
            c[PHASES * t + p].run = phases[p];
            c[PHASES * t + p].arg = &r[t];
            c[PHASES * t + p].work = (double)B * s->T;
        }
    }
    bench_run(c, PHASES * n);
    for (int t = 0; t < n; t++) {
        print_phases(&r[t], &c[PHASES * t]);
        run_close_phases(&r[t]);
        run_close(&r[t]);
    }
}

static void bench_shape(const shape *s, int B)
{
    const int *text = random_text(s->vocab);
    const int n = s->alone ? 1 : MOST_THREADS;
    for (int o = 0; o < (int)(sizeof objectives / sizeof objectives[0]); o++)
        for (int t = 1; t <= MOST_THREADS; t += n) bench_steps(s, B, o, text, t, n);
    for (int t = 1; t <= MOST_THREADS; t += n) bench_phases(s, B, text, t, n);
    free((void *)text);
}

int main(int argc, char **argv)
{
    const int quick = bench_quick(argc, argv, "bench_step [--quick]");
    dlm_ctx *ctx = bench_ctx(DLM_ISA_AUTO, 1);
    bench_context("bench_step", dlm_isa_name(dlm_active_isa(ctx)),
                  quick ? "1 and 2, in turns"
                        : "1 and 2, in turns; gpt2_124M: one after the other");
    dlm_shutdown(ctx);
    printf("model,objective,B,T,threads,precision,phase,tokens_per_s_median,"
           "tokens_per_s_min,tokens_per_s_max,ms_median,gflops,share_of_pass,samples,"
           "noisy\n");
    for (int i = 0; i < (int)(sizeof shapes / sizeof shapes[0]); i++) {
        const int B = quick ? shapes[i].quick_B : shapes[i].B;
        if (B > 0) bench_shape(&shapes[i], B);
    }
    return 0;
}
