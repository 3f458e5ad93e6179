/* 13_continue.c - continue a text with a block-diffusion model, at several temperatures
   and thresholds: how much faster is it to believe the model, and what does it cost?

   Build:  cc -O2 -I.. 13_continue.c -o continue -lm -pthread
   Run:    ./continue [-v] MODEL.safetensors ["beginning"] [tokens]
           MODEL.safetensors is what 12_convert wrote; a text may begin with nothing.
           -v says first what model it is.
   See:    six continuations.  A pass of the model fills in all tokens of a block that it
           is sure of: without a threshold one, with 0.9 or 0.7 often more. */
#define _POSIX_C_SOURCE 200112L              /* clock_gettime under -std=c99         */
#define DLM_IMPLEMENTATION
#include "dlm.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { MAX_TOKENS = 4096 };
typedef struct writer { dlm_ctx *ctx; dlm_model *model; dlm_tokenizer *tok; } writer;

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Fills in canvas[given .. length), says how it went; threshold 0: one token a pass. */
static dlm_error go_on(const writer *w, const int *prompt, int given, int length,
                       float temperature, float threshold)
{
    const int stop = w->tok->stop;
    static int canvas[MAX_TOKENS];
    static char text[16 * MAX_TOKENS];
    dlm_limits limits = {0};
    dlm_sample_options how = {0};
    dlm_session *session = NULL;
    dlm_sampler *sampler = NULL;
    int forwards = 0, end = 0;
    double flops = 0;
    for (int i = 0; i < length; i++)
        canvas[i] = i < given ? prompt[i] : w->model->config.mask_id;
    limits.slots = length, limits.cached = 1;
    how.temperature = temperature, how.threshold = threshold, how.seed = 1;
    how.order = threshold > 0 ? DLM_ORDER_THRESHOLD : DLM_ORDER_SEQUENTIAL;
    how.left_first = 1;                      /* a converted model ignores its right   */
    how.stop = &stop, how.n_stop = 1;
    dlm_error e = dlm_session_create(&session, w->ctx, w->model, &limits, NULL);
    if (!e) e = dlm_sampler_create(&sampler, session, &how, NULL);
    if (!e) e = dlm_sampler_begin(sampler, canvas, &length, 1);
    const double start = seconds();
    while (!e && !dlm_sampler_done(sampler)) e = dlm_sampler_step(sampler);
    const double elapsed = seconds() - start;
    if (!e) {
        end = dlm_sampler_length(sampler, 0);
        dlm_sampler_cost(sampler, &forwards, &flops);
        dlm_decode(w->tok, canvas, (size_t)end, text, sizeof text);
        printf("--- temperature %.1f, ", (double)temperature);
        if (threshold > 0) printf("threshold %.1f: ", (double)threshold);
        else printf("left to right: ");
        printf("%.2f tokens per forward, %.0f tokens/s, %.2f MFLOP/token\n%s\n\n",
               (double)(end - given) / forwards, (end - given) / elapsed,
               flops * 1e-6 / (end - given), text);
    }
    dlm_sampler_free(sampler);
    dlm_session_free(session);
    return e;
}

int main(int argc, char **argv)
{
    const int describe = argc > 1 && !strcmp(argv[1], "-v");
    argc -= describe, argv += describe;
    static const float temperatures[] = {0, 1}, thresholds[] = {0, 0.9f, 0.7f};
    const char *beginning = argc > 2 ? argv[2] : "Once upon a time";
    int tokens = argc > 3 ? atoi(argv[3]) : 128, begins = 0, prompt[MAX_TOKENS];
    dlm_model *loaded = NULL;
    writer w = {0};
    size_t n = 0;
    char why[256] = "";                      /* where the library has no words yet   */
    dlm_options options = {0};
    if (argc < 2 || argc > 4 || argv[1][0] == '-') {
        puts("usage: continue [-v] MODEL.safetensors [\"beginning\"] [tokens]");
        return argc > 1 && !strcmp(argv[1], "--help") ? 0 : 2;
    }
    options.message = why, options.message_size = sizeof why;
    dlm_error e = dlm_init(&w.ctx, &options);
    if (!e) e = dlm_load(&loaded, &w.tok, w.ctx, argv[1]);
    if (!e) e = dlm_model_pack(&w.model, w.ctx, loaded, DLM_F32, NULL);  /* fast */
    dlm_model_free(loaded);
    if (!e && describe) {
        char about[1024];
        dlm_describe(w.model, about, sizeof about);
        printf("%s\n", about);
    }
    if (!e && w.tok == NULL) {
        snprintf(why, sizeof why, "%s holds no tokenizer", argv[1]);
        e = DLM_E_MISMATCH;
    }
    if (!e && w.tok->mask >= w.tok->vocab)
        prompt[begins++] = w.tok->stop;          /* pieces: it begins a text   */
    if (!e) e = dlm_encode(w.tok, beginning, strlen(beginning), prompt + begins,
                           MAX_TOKENS - 1, &n);
    if (!e) {
        const int most = w.model->config.max_seq, given = (int)n + begins;
        const int room = most < MAX_TOKENS ? most : MAX_TOKENS;
        if (tokens > room - given) tokens = room - given;
        if (tokens < 1 || given < 1) {
            snprintf(why, sizeof why, "%s needs a beginning of 1 .. %d tokens and one or "
                     "more to go on", argv[1], room - 1);
            e = DLM_E_INPUT;
        }
        for (int t = 0; t < 2; t++)
            for (int k = 0; k < 3 && !e; k++)
                e = go_on(&w, prompt, given, given + tokens, temperatures[t],
                          thresholds[k]);
    }
    if (e) fprintf(stderr, "%s: %s\n", dlm_error_string(e),
                   *why ? why : dlm_last_error(w.ctx));
    dlm_model_free(w.model);
    dlm_tokenizer_free(w.tok);
    dlm_shutdown(w.ctx);
    return e != DLM_OK;
}
