/* bench_sample - what does a generated token cost?

   Build:  make build/bench_sample
   Run:    build/bench_sample [--quick]            (isa: DLM_ISA=avx2 and so on)

   Random weights, temperature 0, a prompt of 8 tokens.  Rows "full" denoise a whole
   canvas, recomputing everything in every step; "block" and "causal" generate with the
   keys and values of finished blocks cached or recomputed.  weights: how packed weights
   are kept and multiplied.  speedup is against the row named in versus, measured in turns
   with it.  --quick leaves out M_134M and most of S_24M. */
#define _POSIX_C_SOURCE 199309L
#define DLM_IMPLEMENTATION
#include "dlm.h"
#include "bench.h"

#define PROMPT 8
#define LONG   256                         /* tokens of the cached comparisons     */
#define THREADS_MOST 2

typedef struct shape {
    const char *name;
    int dim, layers, heads, kv_heads, ffn, vocab, untied;
} shape;

static const shape model_t    = { "T_0.26M",  64, 5, 8, 4, 160,   512, 0 };
static const shape model_s    = { "S_24M",   288, 6, 6, 6, 768, 32000, 1 };
static const shape model_m    = { "M_134M",  768, 12, 12, 12, 2048, 32000, 1 };
static const shape model_260k = { "260K",     64, 5, 8, 4, 172,   512, 0 };

typedef struct setup {                     /* how one competitor generates         */
    const shape *model;
    dlm_pattern  pattern;
    int generated, block, steps;           /* tokens; in a block; per block        */
    int cached, threads;
    dlm_dtype type;                        /* of the packed weights                */
} setup;

typedef struct generation {
    setup        as;
    dlm_ctx     *ctx;
    dlm_model   *model;
    dlm_session *session;
    dlm_sampler *sampler;
    int         *canvas;                   /* (T) prompt, then masks               */
    int          T, forwards;              /* forwards: of one generation          */
    double       flops;                    /* of one generation                    */
} generation;

static void generation_open(generation *g, const setup *as)
{
    dlm_config cfg = {0};
    dlm_limits limits = {0};
    dlm_sample_options opt = {0};
    dlm_options machine = {0};
    dlm_model *plain;
    const shape *s = as->model;
    memset(g, 0, sizeof *g);
    g->as = *as;
    g->T = PROMPT + as->generated;
    cfg.vocab = s->vocab, cfg.dim = s->dim, cfg.layers = s->layers;
    cfg.heads = s->heads, cfg.kv_heads = s->kv_heads, cfg.ffn = s->ffn;
    cfg.untied_head = s->untied;
    cfg.max_seq = g->T, cfg.pattern = as->pattern, cfg.block = as->block;
    limits.cached = as->cached;
    opt.block = as->block;
    opt.steps = as->steps;
    machine.threads = as->threads;
    g->ctx = bench_ctx_with(machine);
    g->canvas = (int *)bench_alloc((size_t)g->T, sizeof(int));
    bench_require(g->ctx, dlm_model_create(&plain, g->ctx, &cfg, 1, NULL));
    bench_require(g->ctx, dlm_model_pack(&g->model, g->ctx, plain, as->type, NULL));
    dlm_model_free(plain);
    bench_require(g->ctx, dlm_session_create(&g->session, g->ctx, g->model, &limits,
                                             NULL));
    bench_require(g->ctx, dlm_sampler_create(&g->sampler, g->session, &opt, NULL));
}

static void generation_close(generation *g)
{
    dlm_sampler_free(g->sampler);
    dlm_session_free(g->session);
    dlm_model_free(g->model);
    dlm_shutdown(g->ctx);
    free(g->canvas);
}

static void generation_run(void *arg)
{
    generation *g = (generation *)arg;
    for (int i = 0; i < g->T; i++)
        g->canvas[i] = i < PROMPT ? i + 1 : g->model->config.mask_id;
    bench_require(g->ctx, dlm_sampler_begin(g->sampler, g->canvas, &g->T, 1));
    while (!dlm_sampler_done(g->sampler))
        bench_require(g->ctx, dlm_sampler_step(g->sampler));
    dlm_sampler_cost(g->sampler, &g->forwards, &g->flops);
}

static void print_row(const generation *g, const bench_case *c, double speedup,
                      const char *versus)
{
    static const char *const patterns[] = { "block", "full", "causal" };
    const setup *as = &g->as;
    const double forwards = g->forwards;
    const char *weights = as->type == DLM_F32 ? "f32"
                        : as->type == DLM_BF16 ? "bf16" : "i8";
    printf("%s,%s,%d,%d,%d,%s,%d,%s,%.1f,%.1f,%.1f,%.3f,%.2f,%.1f,%.2f,%s,%d,%d\n",
           as->model->name, patterns[as->pattern], as->generated, as->block, as->steps,
           as->cached ? "yes" : "no", as->threads, weights, bench_median(c),
           bench_min(c), bench_max(c), bench_ms(c) / forwards, as->generated / forwards,
           1e-9 * g->flops * bench_median(c) / c->work, speedup, versus, BENCH_SAMPLES,
           bench_noisy(c));
    fflush(stdout);
}

#define MOST_SETUPS 3

/* n setups in turns; the first is what the others are compared with. */
static void compare(const setup *setups, int n, const char *versus)
{
    generation g[MOST_SETUPS];
    bench_case c[MOST_SETUPS];
    memset(c, 0, sizeof c);
    for (int i = 0; i < n; i++) {
        generation_open(&g[i], &setups[i]);
        c[i].run = generation_run;
        c[i].arg = &g[i];
        c[i].work = g[i].as.generated;
    }
    bench_run(c, n);
    for (int i = 0; i < n; i++) {
        print_row(&g[i], &c[i], bench_median(&c[i]) / bench_median(&c[0]),
                  i == 0 ? "itself" : versus);
        generation_close(&g[i]);
    }
}

static setup whole_canvas(const shape *model, int generated, int steps)
{
    setup s = { NULL, DLM_PATTERN_FULL, 0, 0, 0, 0, 1, DLM_F32 };
    s.model = model;
    s.generated = generated;
    s.block = PROMPT + generated;
    s.steps = steps;
    return s;
}

static void compare_threads(const shape *model, int generated, int steps)
{
    setup s[2];
    s[0] = s[1] = whole_canvas(model, generated, steps);
    s[1].threads = THREADS_MOST;
    compare(s, 2, "1 thread");
}

static void compare_cache(const shape *model, dlm_pattern pattern, int block, int steps)
{
    setup s[2] = { { NULL, DLM_PATTERN_BLOCK, LONG, 0, 0, 0, 1, DLM_F32 } };
    s[0].model = model;
    s[0].pattern = pattern;
    s[0].block = block;
    s[0].steps = steps;
    s[1] = s[0];
    s[1].cached = 1;
    compare(s, 2, "recomputed");
}

/* Token by token, where reading the weights is all there is to do; and a whole canvas. */
static void compare_weights(const shape *model, dlm_pattern pattern, int generated)
{
    static const dlm_dtype types[MOST_SETUPS] = { DLM_F32, DLM_BF16, DLM_I8 };
    setup s[MOST_SETUPS] = { { NULL, DLM_PATTERN_CAUSAL, 0, 1, 1, 1, 1, DLM_F32 } };
    s[0].model = model;
    s[0].generated = generated;
    if (pattern == DLM_PATTERN_FULL) s[0] = whole_canvas(model, generated, 16);
    for (int i = 0; i < MOST_SETUPS; i++) {
        s[i] = s[0];
        s[i].type = types[i];
    }
    compare(s, MOST_SETUPS, "f32");
}

int main(int argc, char **argv)
{
    const int quick = bench_quick(argc, argv, "bench_sample [--quick]");
    dlm_ctx *ctx = bench_ctx(DLM_ISA_AUTO, 1);
    bench_context("bench_sample", dlm_isa_name(dlm_active_isa(ctx)), "as the row says");
    dlm_shutdown(ctx);
    printf("model,pattern,generated,block,steps_per_block,cached,threads,weights,"
           "tokens_per_s_median,tokens_per_s_min,tokens_per_s_max,ms_per_forward,"
           "tokens_per_forward,gflops,speedup,versus,samples,noisy\n");
    compare_threads(&model_t, 64, 16);
    compare_threads(&model_t, 64, 64);
    compare_threads(&model_s, 64, 16);
    if (!quick) {
        compare_threads(&model_s, 64, 64);
        compare_threads(&model_t, 256, 64);
        compare_threads(&model_s, 256, 64);
        compare_threads(&model_m, 64, 16);
    }
    for (int block = 4; block <= 16; block *= 2) {
        compare_cache(&model_t, DLM_PATTERN_BLOCK, block, block / 2);
        if (!quick) compare_cache(&model_s, DLM_PATTERN_BLOCK, block, block / 2);
    }
    compare_cache(&model_260k, DLM_PATTERN_CAUSAL, 1, 1);
    compare_weights(&model_260k, DLM_PATTERN_CAUSAL, LONG);
    compare_weights(&model_s, DLM_PATTERN_CAUSAL, 64);
    compare_weights(&model_s, DLM_PATTERN_FULL, 64);
    if (!quick) {
        compare_weights(&model_m, DLM_PATTERN_CAUSAL, 16);
        compare_weights(&model_m, DLM_PATTERN_FULL, 64);
    }
    return 0;
}
