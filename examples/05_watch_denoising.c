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

enum { WIDTH = 72, MAX_ROWS = 3, PER_STEP = 3, STEPS = 400 };

/* 60 KB of sentences of a small grammar, always the same ones. */
static size_t make_text(char *text)
{
    static const char *const words[4][6] = {
        {"the sailor ", "a young fox ", "my sister ", "the baker ", "a friend ", "he "},
        {"carries ", "finds ", "watches ", "hides ", "remembers ", "paints "},
        {"the silver key ", "a wooden boat ", "some honey ", "a letter ", "it ", "me "},
        {"in the forest. ", "by the river. ", "at home. ", "here. ", "again. ", "now. "}};
    dlm_address at = {1, DLM_RANDOM_USER, 0, 0, 0};
    size_t n = 0;
    for (; n < 60000; at.step++)
        n += (size_t)sprintf(text + n, "%s",
                             words[at.step % 4][(int)(6.0 * dlm_uniform(&at, 0))]);
    return n;
}

static dlm_error train(dlm_ctx *ctx, dlm_model **model, dlm_tokenizer **tok)
{
    static char text[60100];
    static int ids[60100];
    dlm_trainer *trainer = NULL;
    dlm_config cfg = {0};
    dlm_train_options how = {0};
    size_t size = make_text(text), n = 0;

    dlm_error e = dlm_tokenizer_create(tok, ctx, DLM_TOKENIZER_CHARS, text, size);
    if (!e) e = dlm_encode(*tok, text, size, ids, size, &n);
    cfg.vocab = e ? 0 : dlm_tokenizer_vocab(*tok);
    cfg.dim = 96, cfg.layers = 3, cfg.heads = 3, cfg.max_seq = WIDTH;
    cfg.pattern = DLM_PATTERN_FULL;
    how.lr = 3e-3f, how.warmup = 20, how.total = STEPS;
    how.schedule = DLM_SCHEDULE_COSINE;
    if (!e) e = dlm_model_create(model, ctx, &cfg, 1, NULL);
    if (!e) e = dlm_trainer_create(&trainer, ctx, *model, &how, NULL);
    for (int step = 0; step < STEPS && !e; step++)
        e = dlm_trainer_step_text(trainer, ids, n, WIDTH, 8, NULL);
    dlm_trainer_free(trainer);
    return e;
}

/* Prints the canvas; born[i] is the step token i appeared in, 0 while it is masked. */
static void draw(const dlm_tokenizer *tok, const int *canvas, const int *born, int T,
                 int step, int live)
{
    static const int ramp[] = {197, 208, 220, 154, 48, 45, 69, 135};
    char c[16];
    if (!live) printf("%3d ", step);
    for (int i = 0; i < T; i++) {
        dlm_decode(tok, canvas + i, 1, c, sizeof c);
        if (c[0] == '\n') strcpy(c, " ");
        if (!live) printf("%s", born[i] ? c : ".");
        else if (!born[i]) printf("\033[2m.\033[0m");
        else printf("\033[38;5;%dm%s\033[0m", ramp[born[i] / 2 % 8], c);
        if (i + 1 == T || (live && (i + 1) % WIDTH == 0)) printf("\n");
    }
}

static dlm_error watch(const dlm_tokenizer *tok, const dlm_model *model, int live)
{
    static int canvas[WIDTH * MAX_ROWS], born[WIDTH * MAX_ROWS];
    struct timespec pause = {0, 120000000};
    dlm_session *session = NULL;
    dlm_sampler *sampler = NULL;
    dlm_limits limits = {0};
    dlm_sample_options how = {0};
    int T = live ? WIDTH * MAX_ROWS : WIDTH, n_events = 0, shown = 0;

    if (T > model->config.max_seq) T = model->config.max_seq;
    for (int i = 0; i < T; i++) canvas[i] = model->config.mask_id;
    limits.slots = T;
    limits.cached = model->config.pattern != DLM_PATTERN_FULL;
    how.order = DLM_ORDER_CONFIDENCE;
    how.steps = (model->config.pattern == DLM_PATTERN_FULL ? T : model->config.block)
              / PER_STEP;
    how.temperature = 0.7f;
    how.seed = (uint64_t)time(NULL);

    dlm_error e = dlm_session_create(&session, model->ctx, model, &limits, NULL);
    if (!e) e = dlm_sampler_create(&sampler, session, &how, NULL);
    if (!e) e = dlm_sampler_begin(sampler, canvas, &T, 1);
    if (!e) draw(tok, canvas, born, T, 0, live);
    for (int step = 1; !e && !dlm_sampler_done(sampler); step++) {
        e = dlm_sampler_step(sampler);
        if (e) break;
        const dlm_event *events = dlm_sampler_trace(sampler, &n_events);
        for (; shown < n_events; shown++) born[events[shown].position] = step;
        if (live) nanosleep(&pause, NULL);
        if (live) printf("\033[%dA\r", (T + WIDTH - 1) / WIDTH);   /* back to the top */
        draw(tok, canvas, born, T, step, live);
        fflush(stdout);
    }
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
    int live = isatty(1) && !(plain && *plain);

    dlm_error e = dlm_init(&ctx, NULL);
    if (!e && argc > 1) e = dlm_load(&model, &tok, ctx, argv[1]);
    else if (!e) e = train(ctx, &model, &tok);
    if (!e && !tok) fprintf(stderr, "%s holds no tokenizer\n", argv[1]);
    else if (!e) e = watch(tok, model, live);
    if (e) fprintf(stderr, "%s: %s\n", dlm_error_string(e), dlm_last_error(ctx));
    dlm_model_free(model);
    dlm_tokenizer_free(tok);
    dlm_shutdown(ctx);
    return e != DLM_OK;
}
