/* 07_check_gradient.c - are the hand-written gradients right?  Ask finite differences.

   Build:  cc -O2 -I.. 07_check_gradient.c -lm -pthread
   See:    one row per tensor of a tiny model: the derivative of the loss along a random
           direction as the backward pass has it, the same from forward passes a small
           step apart, and their relative difference: some 1e-4 from rounding, 1e-2 for
           a gradient that is 1 % wrong, 2 for a wrong sign; last line "all good".
   Yours:  to check a loss of your own, copy what stands above GRADCHECK_NO_MAIN, fill a
           gradcheck with your model, its trainer (in DLM_F32), your batch and score
           function, and do as main does.  Best is a mean over rows, about 1 in size:
           where training has left next to no loss, rounding is all there is to see. */
#define DLM_IMPLEMENTATION
#include "dlm.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- the check ----------------------------------------------------------------------
   Along a direction u of +-1, per tensor w: g . u, with g from backward, against
     d(h) = (loss(w + h u) - loss(w - h u)) / 2h = g . u + c h^2 + O(h^4) + noise / h
   for a ladder of steps h: what is large enough to show in float and small enough not to
   bend the loss differs from tensor to tensor.  r = (4 d(h/2) - d(h)) / 3 has no c; along
   the ladder it first converges, then drowns in the rounding of float passes.  In between
   it stands still, and there it is read: g has no say in that. */
enum { GRADCHECK_STEPS = 12, GRADCHECK_DRAWS = 16 };
#define GRADCHECK_TOLERANCE 5e-3         /* right gradients have less, on every ISA   */

typedef struct gradcheck {
    dlm_model       *model;
    dlm_trainer     *trainer;
    const dlm_batch *batch;
    dlm_score_fn     score;              /* logits become d(loss)/d(logits)           */
    double         (*loss)(void *user);  /* from what score stored at its latest calls */
    void            *user;
    dlm_session     *session;            /* the losses come from its forward passes   */
    float           *before;             /* (n_params) the weights as they were       */
} gradcheck;

typedef struct gradcheck_row {
    dlm_tensor tensor;
    double     analytic, numeric;        /* derivatives along u                       */
    double     error;                    /* |a - n| / max(|a|, |n|, 1e-3)             */
} gradcheck_row;

/* One pass: the gradients of the trainer are then those of the loss. */
static dlm_error gradcheck_begin(gradcheck *c)
{
    const size_t bytes = c->model->n_params * sizeof(float);
    dlm_limits lim = {0};
    lim.seqs = c->batch->n_seqs;
    lim.slots = lim.rows = c->batch->start[lim.seqs];
    dlm_error e = dlm_session_create(&c->session, c->model->ctx, c->model, &lim, NULL);
    c->before = (float *)malloc(bytes);
    if (!e && !c->before) e = DLM_E_NOMEM;
    if (e) return e;
    memcpy(c->before, c->model->weights, bytes);
    memset(c->trainer->gradients, 0, bytes);
    return dlm_trainer_pass(c->trainer, c->batch, c->score, c->user);
}

/* u: entry j of direction `draw` of tensor i. */
static double gradcheck_sign(uint32_t draw, int i, size_t j)
{
    const dlm_address at = { 0, DLM_RANDOM_USER, draw, (uint32_t)i, (uint32_t)j };
    return dlm_uniform(&at, 0) < 0.5 ? 1.0 : -1.0;
}

/* Of a few directions the one with the largest slope g . u, or chance might leave nothing
   to compare. */
static uint32_t gradcheck_direction(int i, const float *g, size_t n, double *slope)
{
    uint32_t best = 0;
    *slope = 0.0;
    for (uint32_t draw = 0; draw < GRADCHECK_DRAWS; draw++) {
        double sum = 0.0;
        for (size_t j = 0; j < n; j++) sum += gradcheck_sign(draw, i, j) * (double)g[j];
        if (fabs(sum) > fabs(*slope)) { *slope = sum; best = draw; }
    }
    return best;
}

/* loss(w + h u) */
static dlm_error gradcheck_loss(const gradcheck *c, int i, const dlm_tensor *w,
                                uint32_t draw, double h, double *loss)
{
    const float *from = c->before + (w->data - c->model->weights);
    for (size_t j = 0; j < (size_t)w->rows * (size_t)w->cols; j++)
        w->data[j] = from[j] + (float)(h * gradcheck_sign(draw, i, j));
    dlm_error e = dlm_forward(c->session, c->batch, c->score, c->user);
    *loss = e ? 0.0 : c->loss(c->user);
    return e;
}

/* The r that differs least from those before and behind it; of two that do so equally
   the one of larger h, which has less noise. */
static double gradcheck_settled(const double *d)
{
    double r[GRADCHECK_STEPS - 1], least = HUGE_VAL, doubt = 1.0;
    int best = 1;
    for (int k = 0; k < GRADCHECK_STEPS - 1; k++) r[k] = (4.0 * d[k + 1] - d[k]) / 3.0;
    for (int k = 1; k < GRADCHECK_STEPS - 2; k++, doubt *= 1.4) {
        const double a = fabs(r[k] - r[k - 1]), b = fabs(r[k + 1] - r[k]);
        const double spread = doubt * (a > b || a != a ? a : b);
        if (spread < least) { least = spread; best = k; }
    }
    return r[best];
}

/* Tensor i; two forward passes per step of the ladder. */
static dlm_error gradcheck_tensor(const gradcheck *c, int i, gradcheck_row *out)
{
    double d[GRADCHECK_STEPS], h = 0.1;
    dlm_tensor *w = &out->tensor;
    dlm_error e = DLM_OK;
    dlm_model_tensor(c->model, i, w);
    const size_t first = (size_t)(w->data - c->model->weights);
    const size_t n = (size_t)w->rows * (size_t)w->cols;
    const float *g = c->trainer->gradients + first;
    const uint32_t draw = gradcheck_direction(i, g, n, &out->analytic);
    for (int k = 0; k < GRADCHECK_STEPS && !e; k++, h /= 2.0) {
        double up = 0.0, down = 0.0;
        e = gradcheck_loss(c, i, w, draw, h, &up);
        if (!e) e = gradcheck_loss(c, i, w, draw, -h, &down);
        d[k] = (up - down) / (2.0 * h);
    }
    memcpy(w->data, c->before + first, n * sizeof(float));
    if (e) return e;
    out->numeric = gradcheck_settled(d);
    out->error = fabs(out->analytic - out->numeric)
        / fmax(fmax(fabs(out->analytic), fabs(out->numeric)), 1e-3);
    return DLM_OK;
}

#ifndef GRADCHECK_NO_MAIN                /* the tests include what is above           */
/* ---- a loss: the mean cross-entropy of some masked tokens -------------------------- */
enum { V = 23, MASK = V - 1, T = 12, MASKED = 4 };
static const int start[] = { 0, T }, out_rows[MASKED] = { 1, 4, 5, 9 };
static const int truth[MASKED] = { 7, 1, 20, 7 };
static const int tokens[T] = { 3, MASK, 11, 5, MASK, MASK, 0, 16, 3, MASK, 19, 2 };
static dlm_keys keys[T];
static dlm_ctx *ctx;

static void score(void *losses, int i, float *logits)      /* on any thread: i's alone */
{
    ((double *)losses)[i] = dlm_cross_entropy(ctx, logits, V, truth[i], 1.0 / MASKED);
}

static double total(void *losses)
{
    double sum = 0.0;
    for (int i = 0; i < MASKED; i++) sum += ((double *)losses)[i] / MASKED;
    return sum;
}

int main(int argc, char **argv)
{
    double losses[MASKED];
    dlm_batch batch = { 1, start, tokens, NULL, NULL, NULL, keys, out_rows, MASKED };
    gradcheck check = { NULL, NULL, &batch, score, total, losses, NULL, NULL };
    dlm_config cfg = {0};
    char why[256] = "";                      /* for a context that fails             */
    dlm_options options = {0};
    int bad = 0;
    if (argc > 1) {
        puts("usage: check_gradient        it takes no arguments");
        return strcmp(argv[1], "--help") ? 2 : 0;
    }

    /* Every kind of tensor there is, but for those of an ungated MLP (gelu_mlp). */
    cfg.vocab = V, cfg.dim = 32, cfg.layers = 2, cfg.heads = 4, cfg.kv_heads = 2;
    cfg.max_seq = T, cfg.pattern = DLM_PATTERN_FULL;
    cfg.qkv_bias = 1, cfg.untied_head = 1, cfg.head_bias = 1;
    dlm_keys_fill(keys, T, DLM_PATTERN_FULL, 0, 0);
    options.message = why, options.message_size = sizeof why;
    dlm_error e = dlm_init(&ctx, &options);
    if (!e) e = dlm_model_create(&check.model, ctx, &cfg, 1, NULL);
    if (!e) e = dlm_trainer_create(&check.trainer, ctx, check.model, NULL, NULL);
    if (!e) e = gradcheck_begin(&check);
    if (!e) printf("%-46s %10s %10s %9s\n", "tensor", "backward", "difference", "error");
    for (int i = 0; !e && i < dlm_model_tensors(check.model); i++) {
        gradcheck_row r = {0};
        e = gradcheck_tensor(&check, i, &r);
        const int right = r.error < GRADCHECK_TOLERANCE;
        if (e) break;
        printf("%-46s %10.6f %10.6f %9.1e%s\n", r.tensor.name, r.analytic, r.numeric,
               r.error, right ? "" : "  <-- wrong");
        bad += !right;
    }
    if (e) fprintf(stderr, "%s: %s\n", dlm_error_string(e),
                   *why ? why : dlm_last_error(ctx));
    else puts(bad ? "some are wrong" : "all good");
    free(check.before);
    dlm_session_free(check.session);
    dlm_trainer_free(check.trainer);
    dlm_model_free(check.model);
    dlm_shutdown(ctx);
    return e != DLM_OK || bad;
}
#endif
