/* 05_watch_denoising.c - watch a text come out of noise, step by step.

   Build:  cc -O2 -I.. 05_watch_denoising.c -o watch -lm -pthread
   Run:    ./watch [checkpoint]         without one, a small model is trained first
   See:    dots (masked characters) turn into text; the colour of a character tells the
           step it appeared in.  Into a file or with NO_COLOR: one plain line per step. */
#define _POSIX_C_SOURCE 200112L              /* isatty, nanosleep under -std=c99     */
#define DLM_IMPLEMENTATION
#include "dlm.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { T = 64, B = 6, STEPS = 900, PER_STEP = 2 };

static const char text[] =
    "the cat likes milk. the dog likes bones. the bird likes seeds. the fish likes "
    "water. the cat fears the dog. the bird fears the cat. the fish fears the bird. "
    "the dog fears the dark. the cat likes milk. the dog likes bones. ";

static dlm_error train(dlm_ctx *ctx, dlm_model **model, dlm_tokenizer **tok)
{
    int ids[sizeof text];
    dlm_trainer *trainer = NULL;
    dlm_config cfg = {0};
    dlm_train_options how = {0};
    size_t n = 0;

    dlm_error e = dlm_tokenizer_create(tok, ctx, DLM_TOKENIZER_CHARS, text, strlen(text));
    if (!e) e = dlm_encode(*tok, text, strlen(text), ids, sizeof text, &n);
    cfg.vocab = e ? 0 : (*tok)->vocab;
    cfg.dim = 64, cfg.layers = 2, cfg.heads = 4, cfg.max_seq = T;
    cfg.pattern = DLM_PATTERN_FULL;          /* every character sees every other     */
    cfg.rope_theta = 10;                     /* few positions, so short waves        */
    how.lr = 2e-3f, how.warmup = 100, how.total = STEPS;
    how.schedule = DLM_SCHEDULE_COSINE;
    if (!e) e = dlm_model_create(model, ctx, &cfg, 1, NULL);
    if (!e) e = dlm_trainer_create(&trainer, ctx, *model, &how, NULL);
    for (int step = 0; step < STEPS && !e; step++)
        e = dlm_trainer_step_text(trainer, ids, n, T, B, NULL);
    dlm_trainer_free(trainer);
    return e;
}

/* Prints a canvas; born[i] is the step token i appeared in, 0 while it is masked. */
static void draw(const dlm_tokenizer *tok, const int *canvas, const int *born, int n,
                 int step, int live)
{
    static const int ramp[] = {197, 203, 209, 215, 185, 149, 79, 74, 69, 99, 134, 170};
    char c[16];
    if (live) printf("\r");
    else printf("%3d  ", step);
    for (int i = 0; i < n; i++) {
        dlm_decode(tok, canvas + i, 1, c, sizeof c);
        if (c[0] == '\n') strcpy(c, " ");
        if (!live) printf("%s", born[i] ? c : ".");
        else if (!born[i]) printf("\033[2m.\033[0m");
        else printf("\033[38;5;%dm%s\033[0m", ramp[born[i] / 2 % 12], c);
    }
    if (!live) printf("\n");
    fflush(stdout);
}

static dlm_error watch(const dlm_tokenizer *tok, const dlm_model *model, int live)
{
    int canvas[T], born[T] = {0}, shown = 0, n_events = 0;
    int blocks = model->config.pattern != DLM_PATTERN_FULL;
    int n = model->config.max_seq < T ? model->config.max_seq : T;
    struct timespec pause = {0, 150000000};
    dlm_session *session = NULL;
    dlm_sampler *sampler = NULL;
    dlm_limits limits = {0};
    dlm_sample_options how = {0};

    for (int i = 0; i < n; i++) canvas[i] = model->config.mask_id;
    limits.slots = n;
    limits.cached = blocks;
    how.steps = (blocks ? model->config.block : n) / PER_STEP;
    how.temperature = 0.3f;
    how.seed = (uint64_t)time(NULL);         /* another text every time              */
    dlm_error e = dlm_session_create(&session, model->ctx, model, &limits, NULL);
    if (!e) e = dlm_sampler_create(&sampler, session, &how, NULL);
    if (!e) e = dlm_sampler_begin(sampler, canvas, &n, 1);
    if (!e) draw(tok, canvas, born, n, 0, live);
    for (int step = 1; !e && !dlm_sampler_done(sampler); step++) {
        e = dlm_sampler_step(sampler);
        if (e) break;
        const dlm_event *events = dlm_sampler_trace(sampler, &n_events);
        for (; shown < n_events; shown++) born[events[shown].position] = step;
        if (live) nanosleep(&pause, NULL);
        draw(tok, canvas, born, n, step, live);
    }
    if (live) printf("\n");
    dlm_sampler_free(sampler);
    dlm_session_free(session);
    return e;
}

int main(int argc, char **argv)
{
    dlm_ctx *ctx = NULL;
    dlm_tokenizer *tok = NULL;
    dlm_model *model = NULL;
    const char *plain = getenv("NO_COLOR");
    char why[256] = "";                      /* where the library has no words yet   */
    dlm_options options = {0};

    if (argc > 2 || (argc > 1 && argv[1][0] == '-')) {
        puts("usage: watch [checkpoint]");
        return strcmp(argv[1], "--help") ? 2 : 0;
    }
    options.message = why, options.message_size = sizeof why;
    dlm_error e = dlm_init(&ctx, &options);
    if (!e && argc > 1) e = dlm_load(&model, &tok, ctx, argv[1]);
    else if (!e) e = train(ctx, &model, &tok);
    if (!e && !tok) {
        snprintf(why, sizeof why, "%s holds no tokenizer", argv[1]);
        e = DLM_E_MISMATCH;
    }
    if (!e) e = watch(tok, model, isatty(1) && !(plain && *plain));
    if (e) fprintf(stderr, "%s: %s\n", dlm_error_string(e),
                   *why ? why : dlm_last_error(ctx));
    dlm_model_free(model);
    dlm_tokenizer_free(tok);
    dlm_shutdown(ctx);
    return e != DLM_OK;
}
