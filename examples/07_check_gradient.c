/* 07_check_gradient.c - are the hand-written gradients right?  Ask finite differences.

   Build:  cc -O2 -I.. 07_check_gradient.c -lm -pthread
   See:    one row per tensor of a tiny model: the derivative of the loss along a random
           direction as the backward pass has it, the same from forward passes a small
           step apart, and their relative difference; last line "all good".  Rounding in
           float leaves less than DLM_CHECK_TOLERANCE of difference, mostly much less; a
           gradient that is 1 % wrong gives 1e-2, a wrong sign 2. */
#define DLM_IMPLEMENTATION
#include "dlm.h"
#include <stdio.h>
#include <string.h>

enum { V = 23, T = 24, SEQS = 2, ROWS = SEQS * T, TENSORS = 64 };

/* What the score function needs, and where it leaves its losses: slot i is its own,
   so that rows may be scored on any thread in any order. */
struct objective {
    dlm_ctx *ctx;
    int      n, target[ROWS];
    float    weight[ROWS];
    double   loss[ROWS];
};

static void score(void *user, int i, float *logits)
{
    struct objective *o = user;
    o->loss[i] = o->weight[i] *
        dlm_cross_entropy(o->ctx, logits, V, o->target[i], (double)o->weight[i]);
}

static double total(void *user)
{
    const struct objective *o = user;
    double sum = 0.0;
    for (int i = 0; i < o->n; i++) sum += o->loss[i];
    return sum;
}

/* Random tokens, about half of them masked; the masked ones are to be predicted. */
static dlm_batch make_batch(struct objective *o)
{
    static int tokens[ROWS], noisy[ROWS], out_rows[ROWS];
    static dlm_keys keys[ROWS];
    static const int start[SEQS + 1] = {0, T, 2 * T};
    dlm_batch batch = {0};
    dlm_address at = {3, DLM_RANDOM_USER, 0, 0, 0};
    for (int s = 0; s < SEQS; s++) {
        float weight[T];
        at.row = (uint32_t)s;
        for (int i = s * T; i < s * T + T; i++)
            tokens[i] = (int)((V - 1) * dlm_uniform(&at, (uint32_t)i));
        for (int i = 0; i < T; i++) {
            int masked = dlm_uniform(&at, (uint32_t)(ROWS + i)) < 0.5;
            noisy[s * T + i] = masked ? V - 1 : tokens[s * T + i];
            weight[i] = masked ? 2.0f : 0.0f;
        }
        dlm_keys_fill(keys + s * T, T, DLM_PATTERN_FULL, 0, 0);
        for (int i = 0; i < T; i++) {
            if (weight[i] == 0.0f) continue;
            out_rows[o->n] = s * T + i;
            o->target[o->n] = tokens[s * T + i];
            o->weight[o->n++] = weight[i] / ROWS;
        }
    }
    batch.n_seqs = SEQS, batch.start = start, batch.tokens = noisy, batch.keys = keys;
    batch.out_rows = out_rows, batch.n_out = o->n;
    return batch;
}

int main(int argc, char **argv)
{
    static struct objective o;
    static dlm_check table[TENSORS];
    dlm_model *model = NULL;
    dlm_trainer *trainer = NULL;
    dlm_config cfg = {0};
    dlm_batch batch = make_batch(&o);
    char why[256] = "";                      /* for a context that fails             */
    dlm_options options = {0};
    int bad = 0;
    if (argc > 1) {
        puts("usage: check_gradient        it takes no arguments");
        return strcmp(argv[1], "--help") ? 2 : 0;
    }

    /* Grouped queries, biases, an untied head: every kind of tensor there is. */
    cfg.vocab = V, cfg.dim = 32, cfg.layers = 2, cfg.heads = 4, cfg.kv_heads = 2;
    cfg.max_seq = T, cfg.pattern = DLM_PATTERN_FULL;
    cfg.qkv_bias = 1, cfg.untied_head = 1;

    options.message = why, options.message_size = sizeof why;
    dlm_error e = dlm_init(&o.ctx, &options);
    if (!e) e = dlm_model_create(&model, o.ctx, &cfg, 1, NULL);
    if (!e) e = dlm_trainer_create(&trainer, o.ctx, model, NULL, NULL);
    if (!e) e = dlm_gradcheck(trainer, &batch, score, total, &o, 0, table);

    if (!e) printf("%-46s %10s %10s %9s\n", "tensor", "backward", "difference", "error");
    for (int i = 0; !e && i < dlm_model_tensors(model); i++) {
        int wrong = !(table[i].error < DLM_CHECK_TOLERANCE);
        printf("%-46s %10.6f %10.6f %9.1e%s\n", table[i].name, table[i].analytic,
               table[i].numeric, table[i].error, wrong ? "  <-- wrong" : "");
        bad += wrong;
    }
    if (e) fprintf(stderr, "%s: %s\n", dlm_error_string(e),
                   *why ? why : dlm_last_error(o.ctx));
    else if (bad) printf("%d of %d tensors differ\n", bad, dlm_model_tensors(model));
    else printf("all good\n");
    dlm_trainer_free(trainer);
    dlm_model_free(model);
    dlm_shutdown(o.ctx);
    return e != DLM_OK || bad;
}
