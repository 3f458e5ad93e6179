/* bench_step - how many tokens per second does training see, and where does a step go?

   Build:  make build/bench_step
   Run:    build/bench_step [--quick]              (isa: DLM_ISA=avx2 and so on)

   Rows "step" are whole training steps on random windows of a random text: noise,
   forward, backward, clip and AdamW.  The phases under them take one causal batch
   through the pieces of a trainer: forward (a session, cross-entropy of every row),
   pass (forward and backward), update (clip and AdamW). */
#define _POSIX_C_SOURCE 199309L
#define DLM_IMPLEMENTATION
#include "dlm.h"
#include "bench.h"

#define TEXT_TOKENS 65536
#define MOST_THREADS 2

typedef struct shape {                     /* a model and its batch                */
    const char *name;
    int dim, layers, heads, kv_heads, ffn, vocab, T, B, quick_B;
} shape;

static const shape shapes[] = {
    { "a_0.26M",   64, 5, 8, 4,  172, 512, 256,  8, 8 },
    { "char_1M",  128, 5, 4, 4,  352,  66, 128, 16, 8 },
    { "b_10.65M", 384, 6, 6, 6, 1024,  65, 256, 16, 1 }
};

static const struct { const char *name; dlm_pattern pattern; } objectives[] = {
    { "mdlm", DLM_PATTERN_FULL }, { "block", DLM_PATTERN_BLOCK },
    { "ar", DLM_PATTERN_CAUSAL }
};

typedef struct run {                       /* one model in training                */
    int T, B, V;
    dlm_ctx     *ctx;
    dlm_model   *model;
    dlm_trainer *trainer;
    dlm_session *session;
    const int   *text;                     /* (TEXT_TOKENS)                        */
    dlm_batch    batch;                    /* B causal sequences of T, all looked at */
    double       flops;                    /* of all steps so far                  */
    long         steps;
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
                     const int *text)
{
    dlm_config cfg = {0};
    dlm_train_options opt = {0};
    cfg.vocab = s->vocab, cfg.dim = s->dim, cfg.layers = s->layers;
    cfg.heads = s->heads, cfg.kv_heads = s->kv_heads, cfg.ffn = s->ffn;
    cfg.max_seq = s->T, cfg.pattern = (int)pattern;
    opt.max_rows = 2 * B * s->T;           /* a doubled batch still is one pass    */
    if (pattern != DLM_PATTERN_BLOCK) opt.max_rows = B * s->T;
    memset(r, 0, sizeof *r);
    r->T = s->T, r->B = B, r->V = s->vocab;
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
    bench_require(r->ctx, dlm_trainer_step_text(r->trainer, r->text, TEXT_TOKENS, r->T,
                                                r->B, &report));
    r->flops += report.flops;
    r->steps++;
}

/* --[ phases ]---------------------------------------------------------------- */

static void score_row(void *user, int i, float *logits)
{
    const run *r = (const run *)user;
    dlm_cross_entropy(r->ctx, logits, r->V, r->text[i + 1], 1.0 / r->batch.n_out);
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

static void run_open_phases(run *r)
{
    const int N = r->B * r->T;
    dlm_limits limits = {0};
    int *start = (int *)bench_alloc((size_t)r->B + 1, sizeof(int));
    int *rows = (int *)bench_alloc((size_t)N, sizeof(int));
    dlm_keys *keys = (dlm_keys *)bench_alloc((size_t)N, sizeof(dlm_keys));
    for (int b = 0; b <= r->B; b++) start[b] = b * r->T;
    for (int b = 0; b < r->B; b++)
        dlm_keys_fill(keys + b * r->T, r->T, DLM_PATTERN_CAUSAL, 1, 0);
    for (int i = 0; i < N; i++) rows[i] = i;
    r->batch.n_seqs = r->B;
    r->batch.start = start;
    r->batch.tokens = r->text;
    r->batch.keys = keys;
    r->batch.out_rows = rows;
    r->batch.n_out = N;
    limits.seqs = r->B;
    limits.slots = r->T;
    bench_require(r->ctx, dlm_session_create(&r->session, r->ctx, r->model, &limits,
                                             NULL));
}

static void run_close_phases(run *r)
{
    free((void *)r->batch.start);
    free((void *)r->batch.keys);
    free((void *)r->batch.out_rows);
}

/* --[ rows ]------------------------------------------------------------------ */

static void print_row(const char *model, const run *r, const char *objective,
                      int threads, const char *phase, const bench_case *c, double flops)
{
    printf("%s,%s,%d,%d,%d,%s,%.0f,%.0f,%.0f,%.3f,%.1f,%d,%d\n", model, objective, r->B,
           r->T, threads, phase, bench_median(c), bench_min(c), bench_max(c),
           bench_ms(c), 1e-9 * flops * bench_median(c) / c->work, BENCH_SAMPLES,
           bench_noisy(c));
    fflush(stdout);
}

static void bench_objective(const shape *s, int B, int which, const int *text)
{
    run r[MOST_THREADS];
    bench_case c[MOST_THREADS];
    memset(c, 0, sizeof c);
    for (int t = 0; t < MOST_THREADS; t++) {
        run_open(&r[t], s, B, objectives[which].pattern, t + 1, text);
        c[t].run = run_step;
        c[t].arg = &r[t];
        c[t].work = (double)B * s->T;
    }
    bench_run(c, MOST_THREADS);
    for (int t = 0; t < MOST_THREADS; t++) {
        print_row(s->name, &r[t], objectives[which].name, t + 1, "step", &c[t],
                  r[t].flops / (double)r[t].steps);
        run_close(&r[t]);
    }
}

static void bench_phases(const shape *s, int B, const int *text)
{
    static void (*const phases[])(void *arg) = { run_forward, run_pass, run_update };
    static const char *const names[] = { "forward", "pass", "update" };
    static const double times[] = { 1.0, 3.0, 0.0 };   /* forwards' worth of work  */
    run r[MOST_THREADS];
    bench_case c[3 * MOST_THREADS];
    memset(c, 0, sizeof c);
    for (int t = 0; t < MOST_THREADS; t++) {
        run_open(&r[t], s, B, DLM_PATTERN_CAUSAL, t + 1, text);
        run_open_phases(&r[t]);
        for (int p = 0; p < 3; p++) {
            c[3 * t + p].run = phases[p];
            c[3 * t + p].arg = &r[t];
            c[3 * t + p].work = (double)B * s->T;
        }
    }
    bench_run(c, 3 * MOST_THREADS);
    for (int t = 0; t < MOST_THREADS; t++) {
        const double flops = dlm_forward_flops(&r[t].model->config, &r[t].batch);
        for (int p = 0; p < 3; p++)
            print_row(s->name, &r[t], "causal", t + 1, names[p], &c[3 * t + p],
                      times[p] * flops);
        run_close_phases(&r[t]);
        run_close(&r[t]);
    }
}

int main(int argc, char **argv)
{
    const int quick = argc > 1 && strcmp(argv[1], "--quick") == 0;
    dlm_ctx *ctx = bench_ctx(DLM_ISA_AUTO, 1);
    bench_context("bench_step", dlm_isa_name(dlm_active_isa(ctx)), "1 and 2, in turns");
    dlm_shutdown(ctx);
    printf("model,objective,B,T,threads,phase,tokens_per_s_median,tokens_per_s_min,"
           "tokens_per_s_max,ms_median,gflops,samples,noisy\n");
    for (int i = 0; i < (int)(sizeof shapes / sizeof shapes[0]); i++) {
        const shape *s = &shapes[i];
        const int B = quick ? s->quick_B : s->B;
        const int *text = random_text(s->vocab);
        for (int o = 0; o < (int)(sizeof objectives / sizeof objectives[0]); o++)
            bench_objective(s, B, o, text);
        bench_phases(s, B, text);
        free((void *)text);
    }
    return 0;
}
