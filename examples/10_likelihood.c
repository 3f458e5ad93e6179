/* 10_likelihood.c - which sentence is likelier?  Exact, and by a diffusion bound.

   Build:  cc -O2 -I.. 10_likelihood.c -lm -pthread
   See:    bits per character of pairs of sentences under two models of the same size,
           trained for some seconds on the same text: an autoregressive one (exact) and
           a block-diffusion one (an estimate of an upper bound on its bits). */
#define DLM_IMPLEMENTATION
#include "dlm.h"
#include <math.h>
#include <stdio.h>
#include <string.h>

enum { T = 64, B = 8, STEPS = 400, SIZE = 60000, SAMPLES = 128 };
static char text[SIZE + 100];
static int ids[SIZE + 100];

/* Sentences of a small grammar, always the same ones. */
static size_t make_text(void)
{
    static const char *const words[4][6] = {
        {"the sailor ", "a young fox ", "my sister ", "the baker ", "a friend ", "he "},
        {"carries ", "finds ", "watches ", "hides ", "remembers ", "paints "},
        {"the silver key ", "a wooden boat ", "some honey ", "a letter ", "it ", "me "},
        {"in the forest. ", "by the river. ", "at home. ", "here. ", "again. ", "now. "}};
    dlm_address at = {1, DLM_RANDOM_USER, 0, 0, 0};
    size_t n = 0;
    for (; n < SIZE; at.step++)
        n += (size_t)sprintf(text + n, "%s",
                             words[at.step % 4][(int)(6.0 * dlm_uniform(&at, 0))]);
    return n;
}

static dlm_error train(dlm_model **model, dlm_ctx *ctx, int vocab, dlm_pattern pattern,
                       size_t n)
{
    dlm_trainer *trainer = NULL;
    dlm_config cfg = {0};
    dlm_train_options how = {0};
    cfg.vocab = vocab, cfg.dim = 64, cfg.layers = 2, cfg.heads = 4, cfg.max_seq = T;
    cfg.pattern = pattern, cfg.rope_theta = 30;
    how.lr = 3e-3f, how.warmup = 100;
    dlm_error e = dlm_model_create(model, ctx, &cfg, 1, NULL);
    if (!e) e = dlm_trainer_create(&trainer, ctx, *model, &how, NULL);
    for (int step = 0; step < STEPS && !e; step++)
        e = dlm_trainer_step_text(trainer, ids, n, T, B, NULL);
    dlm_trainer_free(trainer);
    return e;
}

/* Bits per character of a sentence that follows the end of another one. */
static dlm_error bits(dlm_session *s, const dlm_tokenizer *tok, const char *sentence,
                      double *out)
{
    int tokens[T];
    size_t p = 0, n = 0;
    double nats = 0.0;
    dlm_error e = dlm_encode(tok, ". ", 2, tokens, T, &p);
    if (!e) e = dlm_encode(tok, sentence, strlen(sentence), tokens + p, T - p, &n);
    if (!e) e = dlm_log_likelihood(s, tokens, (int)(p + n), (int)p, SAMPLES, 1, &nats);
    *out = -nats / log(2.0) / (double)n;
    return e;
}

int main(int argc, char **argv)
{
    static const char *const pairs[][2] = {
        {"the baker hides some honey by the river.",
         "the baker hides some honey by the sailor."},
        {"my sister paints a wooden boat in the forest.",
         "my sister boat in a wooden paints the forest."},
        {"he finds the silver key again.", "he finds the silver kye again."}};
    static const dlm_pattern patterns[2] = {DLM_PATTERN_CAUSAL, DLM_PATTERN_BLOCK};
    dlm_ctx *ctx = NULL;
    dlm_tokenizer *tok = NULL;
    dlm_model *model[2] = {NULL, NULL};
    dlm_session *session[2] = {NULL, NULL};
    dlm_limits limits = {0};
    size_t size = make_text(), n = 0;
    char why[256] = "";                      /* for a context that fails             */
    dlm_options options = {0};

    if (argc > 1) {
        puts("usage: likelihood        it takes no arguments");
        return strcmp(argv[1], "--help") ? 2 : 0;
    }
    options.message = why, options.message_size = sizeof why;
    dlm_error e = dlm_init(&ctx, &options);
    if (!e) e = dlm_tokenizer_create(&tok, ctx, DLM_TOKENIZER_CHARS, text, size);
    if (!e) e = dlm_encode(tok, text, size, ids, size, &n);
    limits.slots = 2 * T;                    /* blocks: sentence and its noisy copy  */
    for (int m = 0; m < 2; m++) {
        if (!e) e = train(&model[m], ctx, tok->vocab, patterns[m], n);
        if (!e) e = dlm_session_create(&session[m], ctx, model[m], &limits, NULL);
    }
    if (!e) printf("bits per character\n%-48s %8s %8s\n", "", "AR", "BLOCK <=");
    for (size_t p = 0; p < sizeof pairs / sizeof *pairs && !e; p++) {
        double b[2][2] = {{0}};              /* sentence, model                      */
        for (int k = 0; k < 4 && !e; k++)
            e = bits(session[k % 2], tok, pairs[p][k / 2], &b[k / 2][k % 2]);
        for (int s = 0; s < 2 && !e; s++)
            printf("%-48s %7.3f%s %7.3f%s\n", pairs[p][s], b[s][0],
                   b[s][0] < b[1 - s][0] ? "*" : " ", b[s][1],
                   b[s][1] < b[1 - s][1] ? "*" : " ");
        printf("\n");
    }
    if (!e) printf("* the likelier of the two\n");
    else fprintf(stderr, "%s: %s\n", dlm_error_string(e),
                 *why ? why : dlm_last_error(ctx));
    for (int m = 0; m < 2; m++) {
        dlm_session_free(session[m]);
        dlm_model_free(model[m]);
    }
    dlm_tokenizer_free(tok);
    dlm_shutdown(ctx);
    return e != DLM_OK;
}
