/* scoring.h - judging instead of writing: how likely candidates are in the places of a
   canvas, and texts, longer ones in windows.  For dlm_log_likelihood's bound of one short
   text nothing here is needed.

   Include after dlm.h, of which it uses what is public, and nothing else.  A `scoring`
   has a session and a state (AUTO, for one sequence) of the caller's; nothing is
   allocated.  Their content goes: of the state all, of the session the keys of lane 0.
       scoring how = {0};                    // 0: the default of every option
       how.session = s, how.state = x;
       e = score_text(&how, tokens, T, P, bytes, &score);
       e = score_choices(&how, canvas, T, choices, n);
       if (e) puts(*how.why ? how.why : dlm_last_error(ctx));
   Logits that are not numbers give NaN, not an error. */
#ifndef SCORING_H
#define SCORING_H

#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

typedef struct scoring_choice {            /* what may stand at a position         */
    int        position, n, best;          /* best gets the likeliest's index      */
    const int *candidates;                 /* (n) tokens; choices may share a list */
    double    *p, *among;                  /* (n) get the probability of each; the same
                                              when nothing but candidates may be   */
} scoring_choice;

typedef struct scoring {                   /* 0 in a field marked * = the default  */
    dlm_session *session;                  /* as many slots as rows                */
    dlm_state   *state;                    /* rows: see the functions below        */
    int      exclude_mask;                 /* 1: the mask is in no softmax, as in MDLM and
                                              BD3-LM and whenever a sampler draws  */
    int      absolute_blocks;              /* of a canvas; as the sampler's        */
    int      left_to_right;                /* 1: of diffusion patterns not a bound, but
                                              exactly what order SEQUENTIAL writes, a
                                              token a step: in as many forwards as a block
                                              (FULL: the response) has tokens      */
    int      samples;                      /* * = 64: forwards for the bound       */
    int      window;                       /* * = max_seq: tokens of one forward   */
    int      stride;                       /* * = half the window.  Of a longer text the
                                              first window scores what fits, each other so
                                              many new tokens (whole blocks), which see
                                              those before them                    */
    uint64_t seed;
    char     why[160];                     /* gets the words of an error that is found
                                              here; "": dlm_last_error has them    */
    scoring_choice *choices;               /* set in here                          */
} scoring;

typedef struct scoring_result {
    double nats, error;                    /* log p(response | prompt), or an estimate of
                                              its lower bound with its standard error: 0
                                              when exact, INFINITY of one sample   */
    double bits_per_byte;                  /* 0: the bytes were not given          */
    int    tokens;                         /* scored                               */
} scoring_result;

static dlm_error scoring_fail(scoring *s, dlm_error e, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(s->why, sizeof s->why, format, args);
    va_end(args);
    return e;
}

/* s: how with every default filled in, unless something is out of range. */
static dlm_error scoring_resolve(scoring *s, scoring *how)
{
    const struct { const char *name; int value, most; } fields[] = {
        { "exclude_mask", how->exclude_mask, 1 },
        { "absolute_blocks", how->absolute_blocks, 1 },
        { "left_to_right", how->left_to_right, 1 },
        { "samples", how->samples, INT_MAX / 2 },
        { "window", how->window, 1 << 20 }, { "stride", how->stride, 1 << 20 } };
    const dlm_config *c = &how->state->config;
    how->why[0] = 0;
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++)
        if (fields[i].value < 0 || fields[i].value > fields[i].most)
            return scoring_fail(how, DLM_E_CONFIG, "%s: %d is not in 0..%d",
                                fields[i].name, fields[i].value, fields[i].most);
    *s = *how;
    if (s->samples == 0) s->samples = 64;
    if (s->window == 0) s->window = c->max_seq;
    if (s->stride == 0) s->stride = s->window / 2;
    if (s->stride > s->window - c->shifted) s->stride = s->window - c->shifted;
    if (s->stride < 1) s->stride = 1;
    return DLM_OK;
}

/* log sum exp of the logits, or of all but the mask's. */
static double scoring_all(const scoring *s, float *logits)
{
    const dlm_config *c = &s->state->config;
    if (s->exclude_mask && c->mask_id < c->vocab) logits[c->mask_id] -= INFINITY;
    return dlm_log_sum_exp(s->state->ctx, logits, c->vocab, NULL);
}

/* --[ texts ]-----------------------------------------------------------------
   log p(response | prompt).  Causal: the exact sum.  Else a Monte Carlo bound over the
   number of masks l in a block of n (the whole response when FULL): l uniform on 1..n
   and stratified over the samples, l positions without replacement, weight n/l.  (Nie
   et al. 2025, appendix B; integer arithmetic keeps l exactly uniform.)  Or, left to
   right, an exact sum again: forward j looks at token j of every block, which sees the
   clean blocks before, the tokens before it in its own, and masks. */

/* Masks l of the cells of unit u, weight n/l; place: of its first token in the text. */
static void scoring_mask_exactly(const scoring *s, const dlm_unit *u, uint32_t place,
                                 int sample, int samples)
{
    dlm_state *x = s->state;
    const dlm_address at = { s->seed, DLM_RANDOM_LIKELIHOOD, 0, place, 0 };
    const int k = (int)(dlm_uniform(&at, 0) * u->n);
    const int l = (int)((k + (int64_t)sample * u->n / samples) % u->n) + 1;
    for (int i = 0; i < u->n; i++) {
        x->masked[u->cell + i] = 0;
        x->weight[u->cell + i] = (float)u->n / (float)l;
    }
    for (int i = 0; i < l; i++)
        x->masked[u->cell + (int)dlm_shuffled(s->seed ^ (uint64_t)place << 32,
                                              (uint32_t)sample, (size_t)u->n,
                                              (size_t)i)] = 1;
}

/* Token j of unit u is next. */
static void scoring_mask_from(const scoring *s, const dlm_unit *u, int j)
{
    for (int i = 0; i < u->n; i++) {
        s->state->masked[u->cell + i] = i >= j;
        s->state->weight[u->cell + i] = (float)(i == j);
    }
}

static void scoring_gold(void *user, int i, float *logits)
{
    const scoring *s = (const scoring *)user;
    const double all = scoring_all(s, logits);
    s->state->loss[i] = all - (double)logits[s->state->targets[i]];
}

/* Forward i of n, and its log-likelihood. */
static dlm_error scoring_pass(scoring *s, int place, int i, int n, double *nats)
{
    dlm_state *x = s->state;
    dlm_error e;
    for (int k = 0; k < x->n_units && x->objective != DLM_OBJECTIVE_AR; k++) {
        const dlm_unit *u = &x->units[k];
        if (s->left_to_right) scoring_mask_from(s, u, i);
        else scoring_mask_exactly(s, u, (uint32_t)(place + u->cell), i, n);
    }
    e = dlm_state_layout(x, 0);
    if (e == DLM_OK) e = dlm_forward(s->session, &x->batch, scoring_gold, s);
    *nats = 0.0;
    for (int k = 0; e == DLM_OK && k < x->batch.n_out; k++)
        *nats -= x->loss[k] * (double)x->out_weight[k];
    return e;
}

/* Adds a window, whose response begins at `place` of the text, to the score; error is
   still a variance.  Neighbouring samples mask about as many, so half their mean squared
   difference is the variance within strata (Cochran 1977, chapter 8). */
static dlm_error scoring_window(scoring *s, const dlm_example *window, int place,
                                scoring_result *score)
{
    dlm_state *x = s->state;
    const int exact = x->objective == DLM_OBJECTIVE_AR || s->left_to_right;
    const int blind = window->prompt == 0 && x->config.shifted;
    double sum = 0.0, squares = 0.0, nats, before = 0.0;
    dlm_error e = dlm_state_take(x, window, 1, 1);
    int n = s->samples;
    if (e != DLM_OK) return e;
    if (exact) n = x->objective == DLM_OBJECTIVE_AR ? 1 : x->units[0].n;
    dlm_state_noise(x, NULL);
    for (int i = 0; i < n && e == DLM_OK; i++) {
        e = scoring_pass(s, place, i, n, &nats);
        if (i > 0) squares += (nats - before) * (nats - before);
        sum += nats;
        before = nats;
    }
    score->nats += exact ? sum : sum / n;
    if (!exact) score->error += n > 1 ? squares / (2.0 * (n - 1) * n) : INFINITY;
    score->tokens += window->length - window->prompt - blind;
    return e;
}

/* The whole text, before any of its windows is run. */
static dlm_error scoring_check(scoring *how, const int *tokens, int T, int P)
{
    const dlm_config *c = &how->state->config;
    if (P < 0 || P > T)
        return scoring_fail(how, DLM_E_INPUT, "text: prompt %d is not in 0..%d", P, T);
    for (int i = 0; i < T; i++) {
        if (tokens[i] < 0 || tokens[i] >= c->vocab)
            return scoring_fail(how, DLM_E_INPUT, "text: token %d at %d is not in 0..%d",
                                tokens[i], i, c->vocab - 1);
        if (tokens[i] == c->mask_id)
            return scoring_fail(how, DLM_E_INPUT, "text: token %d at %d is the mask",
                                tokens[i], i);
    }
    return DLM_OK;
}

/* tokens (T), response = tokens[P..T) of so many bytes; a shifted model cannot score
   token 0.  Causal: exact.  Else a Monte Carlo estimate of the ELBO (LLaDA).  Rows of a
   window, for BLOCK also of its response rounded up to whole blocks (not beyond
   max_seq). */
static inline dlm_error score_text(scoring *how, const int *tokens, int T, int P,
                                   size_t bytes, scoring_result *score)
{
    const dlm_config *c = &how->state->config;
    const int block = c->pattern == DLM_PATTERN_BLOCK ? c->block : 1;
    scoring s;
    dlm_error e = scoring_resolve(&s, how);
    if (e == DLM_OK) e = scoring_check(how, tokens, T, P);
    memset(score, 0, sizeof *score);
    for (int at = P, end; at != T && e == DLM_OK; at = end) {
        const int fits = s.window - at > s.stride ? s.window - at : s.stride;
        const int n = fits > block ? fits - fits % block : fits;
        end = T <= s.window || T - at < n ? T : at + n;
        const int first = end > s.window ? end - s.window : 0;
        const dlm_example window = { tokens + first, end - first, at - first, 0, NULL };
        e = scoring_window(&s, &window, at, score);
    }
    score->error = sqrt(score->error);
    if (bytes > 0) score->bits_per_byte = -score->nats / (log(2.0) * (double)bytes);
    return e;
}

/* --[ choices ]---------------------------------------------------------------  */

static void scoring_choose(void *user, int i, float *logits)
{
    const scoring *s = (const scoring *)user;
    const double all = scoring_all(s, logits);
    scoring_choice *q = &s->choices[i];
    double sum = 0.0;
    q->best = 0;
    for (int k = 0; k < q->n; k++) {
        q->p[k] = exp((double)logits[q->candidates[k]] - all);
        sum += q->p[k];
        if (q->p[k] > q->p[q->best]) q->best = k;
    }
    for (int k = 0; k < q->n; k++) q->among[k] = q->p[k] / sum;
}

static dlm_error scoring_check_choice(scoring *how, const int *canvas, int T,
                                      const scoring_choice *q, int i)
{
    const dlm_config *c = &how->state->config;
    const int causal = c->pattern == DLM_PATTERN_CAUSAL;
    if (q->n < 1 || q->position < causal || q->position >= T
        || !(causal || canvas[q->position] == c->mask_id))
        return scoring_fail(how, DLM_E_INPUT, "choice %d: %d candidates at %d, wants 1 "
                            "or more, and a mask in %d..%d", i, q->n, q->position,
                            causal, T - 1);
    for (int k = 0; k < q->n; k++)
        if (q->candidates[k] < 0 || q->candidates[k] >= c->vocab)
            return scoring_fail(how, DLM_E_INPUT, "choice %d: candidates[%d]: %d is not "
                                "in 0..%d", i, k, q->candidates[k], c->vocab - 1);
    return DLM_OK;
}

/* All n choices on a canvas (T), in whatever blocks, by one forward of at most T rows,
   those that the last choice sees: those before it see no others.  Positions rise and,
   unless causal, hold masks (0 and 1 of a shifted model come from one row: only one of
   them). */
static inline dlm_error score_choices(scoring *how, const int *canvas, int T,
                                      scoring_choice *choices, int n)
{
    dlm_state *x = how->state;
    const dlm_config *c = &x->config;
    const int most = x->rows < c->max_seq ? x->rows : c->max_seq;
    scoring s;
    dlm_batch b;
    int prompt = 0;
    dlm_error e = scoring_resolve(&s, how);
    if (e == DLM_OK && (T < 1 || T > most || n < 1 || n > T))
        e = scoring_fail(how, DLM_E_INPUT, "choices: %d on a canvas of %d, there is room "
                         "for %d", n, T, most);
    for (int i = 0; i < n && e == DLM_OK; i++) {
        e = scoring_check_choice(how, canvas, T, &choices[i], i);
        x->out_rows[i] = choices[i].position - (c->shifted && choices[i].position > 0);
    }
    if (e != DLM_OK) return e;
    while (canvas[prompt] != c->mask_id && prompt < choices->position) prompt++;
    dlm_keys_fill(x->keys, T, c->pattern, c->block, s.absolute_blocks ? 0 : prompt);
    x->start[0] = 0;
    x->start[1] = x->keys[x->out_rows[n - 1]].hi0;
    memset(&b, 0, sizeof b);
    b.n_seqs = 1; b.start = x->start; b.tokens = canvas; b.keys = x->keys;
    b.out_rows = x->out_rows; b.n_out = n;
    s.choices = choices;
    return dlm_forward(s.session, &b, scoring_choose, &s);
}

#endif
