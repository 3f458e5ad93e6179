/* 08_custom_objective.c - an objective of one's own from the library's pieces.

   Build:  cc -O2 -I.. 08_custom_objective.c -lm -pthread
   See:    the held-out bound of two equal models after equally many steps on the same
           masks: one trained with the loss CE/t of masked diffusion (g = 0), one with a
           focal version that spends less on what is known already, (1-p)^g CE/t. */
#define DLM_IMPLEMENTATION
#include "dlm.h"
#include <math.h>
#include <stdio.h>
#include <string.h>

enum { T = 64, B = 8, STEPS = 400, SIZE = 60000, WINDOWS = 64 };

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

/* ---- the objective: take a state, noise it, lay it out, run the model, score ---- */

struct focal {
    dlm_state *s;
    double     g;
};

/* With p the target's probability, the loss is w (1-p)^g CE.  Its derivative is that of
   the cross-entropy, w (softmax - onehot), times (1-p)^g - g p (1-p)^(g-1) log p. */
static void score(void *user, int i, float *logits)
{
    struct focal *f = user;
    const dlm_state *s = f->s;
    int y = s->targets[i], V = s->config.vocab;
    double log_p = logits[y] - dlm_log_sum_exp(s->ctx, logits, V, NULL);
    double p = exp(log_p), q = 1.0 - p + 1e-9;
    double factor = pow(q, f->g) - f->g * p * pow(q, f->g - 1.0) * log_p;
    double w = s->out_weight[i] * s->scale;             /* 1/t, over all tokens      */
    dlm_cross_entropy(s->ctx, logits, V, y, w * factor);
}

static dlm_error focal_step(dlm_trainer *t, struct focal *f, size_t n, int step)
{
    dlm_example windows[B] = {{0}};
    dlm_noise noise = {0};
    for (int b = 0; b < B; b++) {
        dlm_address at = {1, DLM_RANDOM_USER + 1, (uint32_t)step, (uint32_t)b, 0};
        windows[b].tokens = ids + (size_t)(dlm_uniform(&at, 0) * (double)(n - T));
        windows[b].length = T;
    }
    noise.seed = 1, noise.step = (uint32_t)step;
    dlm_error e = dlm_state_take(f->s, windows, B, 1);
    if (e) return e;
    dlm_state_noise(f->s, &noise);                      /* masks may be changed here */
    e = dlm_state_layout(f->s, 0);
    if (!e) e = dlm_trainer_pass(t, &f->s->batch, score, f);
    return e ? e : dlm_trainer_update(t, NULL);
}

/* ---- the comparison ---- */

static dlm_error run(dlm_ctx *ctx, int vocab, size_t n, double g)
{
    static dlm_example windows[WINDOWS];
    struct focal f = {0};
    dlm_model *model = NULL;
    dlm_trainer *trainer = NULL;
    dlm_config cfg = {0};
    dlm_train_options how = {0};
    dlm_report r;
    size_t n_train = n - n / 10;

    f.g = g;
    cfg.vocab = vocab, cfg.dim = 64, cfg.layers = 2, cfg.heads = 4, cfg.max_seq = T;
    cfg.pattern = DLM_PATTERN_FULL, cfg.rope_theta = 30;
    how.lr = 3e-3f, how.warmup = 100, how.max_rows = B * T;
    dlm_error e = dlm_model_create(&model, ctx, &cfg, 1, NULL);
    if (!e) e = dlm_trainer_create(&trainer, ctx, model, &how, NULL);
    if (!e) e = dlm_state_create(&f.s, ctx, &model->config, DLM_OBJECTIVE_AUTO, B * T, 0,
                                 NULL);
    for (int step = 0; step < STEPS && !e; step++)
        e = focal_step(trainer, &f, n_train, step);
    for (size_t i = 0; i < WINDOWS; i++) {
        windows[i].tokens = ids + n_train + i * (n - n_train - T) / WINDOWS;
        windows[i].length = T;
    }
    if (!e) e = dlm_trainer_evaluate(trainer, windows, WINDOWS, 0, &r);
    if (!e) printf("g = %.1f: held-out bound %.3f nats/char\n", g, r.loss);
    dlm_state_free(f.s);
    dlm_trainer_free(trainer);
    dlm_model_free(model);
    return e;
}

int main(int argc, char **argv)
{
    size_t size = make_text(), n = 0;
    dlm_ctx *ctx = NULL;
    dlm_tokenizer *tok = NULL;
    char why[256] = "";                      /* for a context that fails             */
    dlm_options options = {0};
    if (argc > 1) {
        puts("usage: custom_objective        it takes no arguments");
        return strcmp(argv[1], "--help") ? 2 : 0;
    }
    options.message = why, options.message_size = sizeof why;
    dlm_error e = dlm_init(&ctx, &options);
    if (!e) e = dlm_tokenizer_create(&tok, ctx, DLM_TOKENIZER_CHARS, text, size);
    if (!e) e = dlm_encode(tok, text, size, ids, size, &n);
    if (!e) e = run(ctx, tok->vocab, n, 0.0);
    if (!e) e = run(ctx, tok->vocab, n, 1.0);
    if (e) fprintf(stderr, "%s: %s\n", dlm_error_string(e),
                   *why ? why : dlm_last_error(ctx));
    dlm_tokenizer_free(tok);
    dlm_shutdown(ctx);
    return e != DLM_OK;
}
