/* demo.c - one minute with dlm.h: make a text, train on it, watch what was learned.

   Build:  cc -O2 -I.. demo.c -o demo -lm -pthread       (or: make demo)
   See:    a text of 300 KB is made up; a model of about a million parameters learns
           from it for half a minute; a text comes out of noise, coloured by step (one
           plain line per step into a file or with NO_COLOR); holes are filled in; and
           a closing table of what was measured. */
#define _POSIX_C_SOURCE 200112L    /* clock_gettime, isatty, nanosleep under -std=c99 */
#define DLM_IMPLEMENTATION
#include "dlm.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum {
    THREADS = 2, TEXT = 300000,
    T = 128, B = 4, BLOCK = 8,     /* characters per sequence, sequences, block size  */
    WINDOWS = 64,                  /* held-out sequences                              */
    TRAIN_SECONDS = 30             /* the number of steps follows from it             */
};
static const double LATE = 1.4;    /* stop after so many times what was planned       */

static char text[TEXT + 200];
static int ids[TEXT + 200];

struct demo {
    dlm_ctx       *ctx;
    dlm_tokenizer *tok;
    dlm_model     *model;
    dlm_trainer   *trainer;
    size_t         n, n_train;     /* ids, and how many of them are learned from      */
    int            steps;
    int            live;           /* a terminal that takes colours and cursor moves  */
    double         entropy, before, after, train_rate, sample_rate, per_forward;
};

static double seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* ---- a text and its tokens ---- */

/* Sentences of a small grammar, always the same ones. */
static size_t make_text(void)
{
    static const char *const words[5][6] = {
        {"the sailor", "a young fox", "my sister", "the baker", "an owl", "a friend"},
        {"carries", "finds", "watches", "hides", "remembers", "paints"},
        {"the silver key", "a red apple", "some honey", "a letter", "a clock", "a boat"},
        {"in the forest", "near the river", "on the hill", "at home", "at sea", "here"},
        {"at night", "every summer", "after the rain", "in winter", "again", "at last"}};
    static const int orders[3][5] = {{0, 1, 2, 3, 4}, {4, 0, 1, 2, 3}, {3, 0, 1, 2, 4}};
    dlm_address at = {1, DLM_RANDOM_USER, 0, 0, 0};
    size_t n = 0;
    for (; n < TEXT; at.step++) {
        const int *order = orders[(int)(3.0 * dlm_uniform(&at, 5))];
        for (uint32_t k = 0; k < 5; k++)
            n += (size_t)sprintf(text + n, k < 4 ? "%s " : "%s. ",
                                 words[order[k]][(int)(6.0 * dlm_uniform(&at, k))]);
    }
    return n;
}

static dlm_error stage_text(struct demo *d)
{
    size_t size = make_text();
    dlm_error e = dlm_tokenizer_create(&d->tok, d->ctx, DLM_TOKENIZER_CHARS, text, size);
    if (!e) e = dlm_encode(d->tok, text, size, ids, size, &d->n);
    if (e) return e;
    d->n_train = d->n - d->n / 10;
    for (int v = 0; v < dlm_tokenizer_vocab(d->tok); v++) {
        double count = 0.0;
        for (size_t i = 0; i < d->n; i++) count += ids[i] == v;
        count /= (double)d->n;
        if (count > 0.0) d->entropy -= count * log(count);
    }
    printf("%.72s...\n%d characters, %d different; the last tenth is held out\n", text,
           (int)d->n, dlm_tokenizer_vocab(d->tok) - 2);
    return DLM_OK;
}

/* ---- training ---- */

/* A fresh model and its trainer, in place of those there were. */
static dlm_error make_model(struct demo *d, int steps)
{
    dlm_config cfg = {0};
    dlm_train_options how = {0};
    dlm_trainer_free(d->trainer);
    dlm_model_free(d->model);
    d->trainer = NULL;
    cfg.vocab = dlm_tokenizer_vocab(d->tok);
    cfg.dim = 160, cfg.layers = 3, cfg.heads = 5, cfg.ffn = 480;
    cfg.max_seq = T, cfg.block = BLOCK;
    cfg.rope_theta = 100.0f;                 /* short waves suit short sequences      */
    how.max_rows = 2 * B * T, how.lr = 1.5e-3f, how.lr_min = 1e-4f;
    how.warmup = steps / 8, how.total = steps, how.schedule = DLM_SCHEDULE_COSINE;
    dlm_error e = dlm_model_create(&d->model, d->ctx, &cfg, 1, NULL);
    return e ? e : dlm_trainer_create(&d->trainer, d->ctx, d->model, &how, NULL);
}

/* How many steps fit?  Times some with a model that is thrown away, because the
   schedule of the learning rate has to know the number beforehand. */
static dlm_error plan(struct demo *d)
{
    enum { TIMED = 5 };
    double t0 = 0.0;
    dlm_error e = make_model(d, 100);
    for (int step = 0; step <= TIMED && !e; step++) {
        if (step == 1) t0 = seconds();       /* the first one warms up               */
        e = dlm_trainer_step_text(d->trainer, ids, d->n_train, T, B, NULL);
    }
    double fit = TRAIN_SECONDS * TIMED / (seconds() - t0);
    d->steps = fit < 50.0 ? 50 : fit > 2000.0 ? 2000 : (int)fit / 10 * 10;
    return e ? e : make_model(d, d->steps);
}

static dlm_error evaluate(struct demo *d, double *bound)
{
    dlm_example windows[WINDOWS] = {{0}};
    dlm_report r = {0};
    for (size_t i = 0; i < WINDOWS; i++) {
        windows[i].tokens = ids + d->n_train + i * (d->n - d->n_train - T) / WINDOWS;
        windows[i].length = T;
    }
    dlm_error e = dlm_trainer_evaluate(d->trainer, windows, WINDOWS, 0, &r);
    *bound = r.loss;
    return e;
}

static dlm_error stage_train(struct demo *d)
{
    dlm_report r = {0};
    dlm_error e = plan(d);
    if (!e) e = evaluate(d, &d->before);
    if (!e) printf("%d steps of %d characters\n", d->steps, B * T);
    if (!e && d->steps < 400)
        printf("(a slow or busy machine: expect letters rather than words)\n");
    double t0 = seconds(), now = t0, shown = t0;
    for (int step = 1; step <= d->steps && !e; step++) {
        e = dlm_trainer_step_text(d->trainer, ids, d->n_train, T, B, &r);
        now = seconds();
        if (now - t0 > LATE * TRAIN_SECONDS) d->steps = step;     /* a busy machine   */
        if (e || (now - shown < 2.0 && step < d->steps)) continue;
        d->train_rate = (double)step * B * T / (now - t0);
        printf("step %4d  loss %.3f nats/char  %6.0f chars/s  %3.0f s left\n", step,
               r.loss, d->train_rate, (now - t0) / step * (d->steps - step));
        fflush(stdout);
        shown = now;
    }
    return e ? e : evaluate(d, &d->after);
}

/* ---- generation ---- */

/* Prints a canvas; born[i] is the step character i appeared in, 0 while masked. */
static void draw(const struct demo *d, const int *canvas, const int *born, int n,
                 int step)
{
    static const int ramp[] = {197, 208, 220, 154, 48, 45, 69, 135};
    char c[16];
    if (d->live) printf("\r");
    else printf("%3d  ", step);
    for (int i = 0; i < n; i++) {
        dlm_decode(d->tok, canvas + i, 1, c, sizeof c);
        if (!d->live) printf("%s", born[i] ? c : ".");
        else if (!born[i]) printf("\033[2m.\033[0m");
        else printf("\033[38;5;%dm%s\033[0m", ramp[born[i] % 8], c);
    }
    if (!d->live) printf("\n");
    fflush(stdout);
}

/* Lets the model write n characters, the first four given; watched or only timed. */
static dlm_error generate(struct demo *d, const dlm_sample_options *how, int *canvas,
                          int n, int watched)
{
    struct timespec pause = {0, 80000000};
    int born[T] = {0}, n_events = 0, shown = 0, forwards = 0;
    dlm_session *session = NULL;
    dlm_sampler *sampler = NULL;
    dlm_limits limits = {0};
    size_t given = 0;
    double flops;

    limits.cached = 1;             /* finished blocks are not computed again          */
    dlm_error e = dlm_session_create(&session, d->ctx, d->model, &limits, NULL);
    if (!e) e = dlm_sampler_create(&sampler, session, how, NULL);
    for (int i = 0; i < n; i++) canvas[i] = d->model->config.mask_id, born[i] = i < 4;
    if (!e) e = dlm_encode(d->tok, "the ", 4, canvas, 4, &given);
    double t0 = seconds();
    if (!e) e = dlm_sampler_begin(sampler, canvas, &n, 1);
    for (int step = 1; !e && !dlm_sampler_done(sampler); step++) {
        e = dlm_sampler_step(sampler);
        if (e || !watched) continue;
        const dlm_event *events = dlm_sampler_trace(sampler, &n_events);
        for (; shown < n_events; shown++) born[events[shown].position] = step;
        if (d->live) nanosleep(&pause, NULL);
        draw(d, canvas, born, n, step);
    }
    if (!e) {
        dlm_sampler_cost(sampler, &forwards, &flops);
        d->sample_rate = (n - 4) / (seconds() - t0);
        d->per_forward = (double)(n - 4) / forwards;
    }
    dlm_sampler_free(sampler);
    dlm_session_free(session);
    return e;
}

/* Every step takes all characters the model is 90 % sure of, and at least one. */
static dlm_error stage_watch(struct demo *d)
{
    int canvas[T];
    dlm_sample_options how = {0};
    how.order = DLM_ORDER_THRESHOLD, how.temperature = 0.4f;
    dlm_error e = generate(d, &how, canvas, 60, 1);
    if (d->live) printf("\n");
    return e;
}

static dlm_error stage_infill(struct demo *d)
{
    static const char *const forms[] = {
        "the sailor f____ the silver key near the river at night. ",
        "in winter my sister paints a red _____ on the hill. "};
    dlm_error e = DLM_OK;
    for (size_t f = 0; f < sizeof forms / sizeof *forms && !e; f++) {
        int canvas[T], n = (int)strlen(forms[f]);
        char filled[T + 1];
        size_t one;
        for (int i = 0; i < n && !e; i++) {
            const char *c = forms[f] + i;
            canvas[i] = d->model->config.mask_id;
            if (*c != '_') e = dlm_encode(d->tok, c, 1, canvas + i, 1, &one);
        }
        if (!e) e = dlm_sample(d->ctx, d->model, canvas, n, NULL);
        dlm_decode(d->tok, canvas, (size_t)n, filled, sizeof filled);
        if (!e) printf("%s\n%s\n", forms[f], filled);
    }
    return e;
}

static dlm_error stage_write(struct demo *d)
{
    int canvas[T];
    char out[T + 1];
    dlm_sample_options how = {0};
    how.order = DLM_ORDER_THRESHOLD, how.temperature = 0.4f, how.seed = 1;
    dlm_error e = generate(d, &how, canvas, T, 0);
    dlm_decode(d->tok, canvas, T, out, sizeof out);
    if (!e) printf("%s\n", out);
    return e;
}

static dlm_error stage_table(struct demo *d)
{
    printf("parameters                 %10d\n", (int)d->model->n_params);
    printf("training steps             %10d\n", d->steps);
    printf("training, chars/s          %10.0f\n", d->train_rate);
    printf("single chars, nats         %10.3f\n", d->entropy);
    printf("held-out bound at start    %10.3f nats/char\n", d->before);
    printf("held-out bound at end      %10.3f nats/char\n", d->after);
    printf("sampling, chars/forward    %10.2f\n", d->per_forward);
    printf("sampling, chars/s          %10.0f\n", d->sample_rate);
    printf("threads, kernels           %10d %s\n", dlm_active_threads(d->ctx),
           dlm_isa_name(dlm_active_isa(d->ctx)));
    return DLM_OK;
}

int main(void)
{
    static const struct { const char *name; dlm_error (*run)(struct demo *); } stage[] = {
        {"a text", stage_text}, {"training", stage_train}, {"denoising", stage_watch},
        {"filling in", stage_infill}, {"writing", stage_write}, {"table", stage_table}};
    struct demo d = {0};
    dlm_options options = {0};
    const char *plain = getenv("NO_COLOR");
    double t0 = seconds();

    d.live = isatty(1) && !(plain && *plain);
    options.threads = THREADS;
    dlm_error e = dlm_init(&d.ctx, &options);
    for (size_t s = 0; s < sizeof stage / sizeof *stage && !e; s++) {
        printf("\n== %s (%.0f s)\n", stage[s].name, seconds() - t0);
        e = stage[s].run(&d);
    }
    if (e) fprintf(stderr, "%s: %s\n", dlm_error_string(e), dlm_last_error(d.ctx));
    dlm_trainer_free(d.trainer);
    dlm_model_free(d.model);
    dlm_tokenizer_free(d.tok);
    dlm_shutdown(d.ctx);
    return e != DLM_OK;
}
