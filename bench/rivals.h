/* rivals.h - two rules that LIFT is compared with, CART and GIFT, for
   dlm_lift_options.choose: they show how to write one from public pieces.  Include after
   dlm.h.  choose_user: a rival_options, or NULL for the defaults. */
#ifndef RIVALS_H
#define RIVALS_H

#include <math.h>
#include <string.h>

typedef struct rival_options {             /* 0 in a field marked * = the default  */
    float p;                               /* CART: * = 0.1, at most 1             */
    int   time_scaling;                    /* CART, 1: divide by t, too (the LIFT code) */
    int   masked_mean;                     /* GIFT, 1: mean over the masked tokens instead
                                              of all response tokens (its code)    */
} rival_options;

/* --[ CART ]------------------------------------------------------------------
   Plain masks; a token weighs what can be seen around it (Dream, arXiv 2508.15487).  */

/* weight_i = sum over visible j of p/2 (1-p)^(|i-j|-1), as two running sums over P
   visible tokens and R cells; from the left first, then what comes from the right. */
static inline void rival_cart_weights(float *weight, const unsigned char *masked, int P,
                                      int R, double p)
{
    double left = 0.0, right = 0.0;
    for (int i = -P; i < R; i++) {
        if (i >= 0) weight[i] = (float)left;
        left = (1.0 - p) * left + (i >= 0 && masked[i] ? 0.0 : 0.5 * p);
    }
    for (int i = R - 1; i >= 0; i--) {
        weight[i] = (float)((double)weight[i] + right);
        right = (1.0 - p) * right + (masked[i] ? 0.0 : 0.5 * p);
    }
}

/* The weights pass through score.  The state's are 1/t, or 1 without time scaling. */
static inline dlm_error rival_cart(void *options, dlm_trainer *t)
{
    const rival_options *o = (const rival_options *)options;
    const float p = o && o->p != 0.0f ? o->p : 0.1f;
    dlm_state *s = t->state;
    for (int k = 0; k < s->n_examples; k++) {
        const int first = s->first_cell[k];
        rival_cart_weights(s->score + first, s->masked + first, s->examples[k].prompt,
                           s->first_cell[k + 1] - first, (double)p);
    }
    for (int i = 0; i < s->n_cells; i++)
        s->weight[i] = s->score[i] * (o && o->time_scaling ? s->weight[i] : 1.0f);
    return DLM_OK;
}

/* --[ GIFT ]------------------------------------------------------------------
   Masks where a fully masked forward is uncertain (arXiv 2509.20863); no_time_scaling
   says nothing to it.  Its mean is over the examples of one pass: give max_rows room for
   all of them. */

/* The probability of masking a token of this entropy (nats), of mean root m. */
static inline double rival_gift_level(double t, double entropy, double m)
{
    return 1.0 - pow(1.0 - t, sqrt(entropy > 0.0 ? entropy : 0.0) / fmax(m, 1e-12));
}

/* The entropies of everything, masked; returns how many cells a row predicts. */
static inline dlm_error rival_gift_entropies(dlm_trainer *t, int *cells)
{
    dlm_state *s = t->state;
    dlm_error e;
    *cells = 0;
    for (int k = 0; k < s->n_units; k++) {
        dlm_state_mask(s, k, 1.0);
        *cells += s->units[k].n - s->units[k].blind;
    }
    memset(s->score, 0, (size_t)s->n_cells * sizeof *s->score);
    e = dlm_state_layout(s, 0);
    return e == DLM_OK ? dlm_trainer_forward(t, &s->batch, dlm_state_entropy, s) : e;
}

/* Weighs every cell by 1 over its own level and, with `draw`, masks it at that level, by
   the number that dlm_state_mask compares with; returns how many of those that can carry
   loss are masked. */
static inline int rival_gift_cells(dlm_state *s, double mean, int draw)
{
    int hits = 0;
    for (int k = 0; k < s->n_units; k++) {
        const dlm_unit *u = &s->units[k];
        dlm_address at = { 0, DLM_RANDOM_MASK, 0, 0, 0 };
        at.seed = s->noise.seed;
        at.step = s->noise.step;
        at.row = (uint32_t)(s->noise.row + u->example);
        for (int i = u->cell; i < u->cell + u->n; i++) {
            const double level = rival_gift_level(u->t, (double)s->score[i], mean);
            at.position = (uint32_t)(i - s->first_cell[u->example]);
            if (draw) s->masked[i] = dlm_uniform(&at, 0) < level;
            s->weight[i] = level > 0.0 ? (float)(1.0 / level) : 0.0f;
            hits += s->masked[i] && i >= u->cell + u->blind;
        }
    }
    return hits;
}

/* 1: entropies with everything masked.  2: masks at each cell's own level.  3: if that
   left none, plain masks. */
static inline dlm_error rival_gift(void *options, dlm_trainer *t)
{
    const rival_options *o = (const rival_options *)options;
    dlm_state *s = t->state;
    double mean = 0.0;
    int cells, hits;
    dlm_error e = rival_gift_entropies(t, &cells);
    if (e != DLM_OK) return e;
    for (int i = 0; i < s->n_cells; i++) mean += sqrt((double)s->score[i]);
    mean /= cells > 0 ? cells : 1;          /* of the cells that a row predicts    */
    hits = rival_gift_cells(s, mean, 1);
    if (hits == 0) {                        /* nobody is uncertain: plain masks,   */
        for (int k = 0; k < s->n_units; k++) dlm_state_mask(s, k, s->units[k].t);
        hits = rival_gift_cells(s, mean, 0);        /* weighed by their own levels */
    }
    if (o && o->masked_mean && hits > 0)
        for (int i = 0; i < s->n_cells; i++) s->weight[i] *= (float)cells / (float)hits;
    return DLM_OK;
}

#endif /* RIVALS_H */
