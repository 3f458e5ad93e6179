/* 14_own_network.c - the sampler of dlm.h with a network that is not of dlm.h.

   Build:  cc -O2 -I.. 14_own_network.c -o own_network -lm -pthread
   See:    a form is filled in step by step by the bigrams of a text, a Markov chain: no
           dlm_model, no session.  Then the logits of that run, which were kept, fill
           in the same form again, with no network at all.
   The chain is an exact denoiser: what it says of a masked place is its true probability,
   given the nearest letters that stand to the left and to the right. */
#define DLM_IMPLEMENTATION
#include "dlm.h"
#include <math.h>
#include <stdio.h>
#include <string.h>

enum { T = 64, V = 32 };                     /* at most: letters of a form, tokens   */

static const char text[] =
    "the cat sat on the mat. the dog sat on the log. the cat saw the dog. the dog saw "
    "the cat. a rat sat on a hat. a bat ate the rat. the hen ate the corn. the cat ate. ";

static const char form[] = "the c____________ the d________ a ______ ate ________.";

typedef struct chain {
    int    vocab, letters, mask;             /* letters: the tokens before the stop  */
    double first[V];                         /* how often each letter is in the text */
    double reach[T][V][V];                   /* [d][a][b]: b stands d places after a */
} chain;

/* The logits of one run: those of row i of step k stand at logits[k][i]. */
typedef struct tape {
    float logits[T][T][V];
} tape;

static void count(chain *c, const int *ids, size_t n)
{
    for (int a = 0; a < c->letters; a++) {
        c->reach[0][a][a] = 1;
        for (int b = 0; b < c->letters; b++) c->reach[1][a][b] = 0.001;
    }
    for (size_t i = 0; i + 1 < n; i++) {
        c->first[ids[i]]++;
        c->reach[1][ids[i]][ids[i + 1]]++;
    }
    for (int a = 0; a < c->letters; a++) {
        double sum = 0;
        for (int b = 0; b < c->letters; b++) sum += c->reach[1][a][b];
        for (int b = 0; b < c->letters; b++) c->reach[1][a][b] /= sum;
    }
    for (int d = 2; d < T; d++)              /* one place more: a matrix product     */
        for (int a = 0; a < c->letters; a++)
            for (int b = 0; b < c->letters; b++)
                for (int k = 0; k < c->letters; k++)
                    c->reach[d][a][b] += c->reach[d - 1][a][k] * c->reach[1][k][b];
}

/* log p(letter at place i | the nearest letters that stand), up to a constant. */
static void predict(const chain *c, const int *tokens, int n, int i, float *logits)
{
    int left = i - 1, right = i + 1;
    while (left >= 0 && tokens[left] == c->mask) left--;
    while (right < n && tokens[right] == c->mask) right++;
    for (int v = 0; v < c->vocab; v++) {
        double p = left < 0 ? c->first[v] : c->reach[i - left][tokens[left]][v];
        if (right < n) p *= c->reach[right - i][v][tokens[right]];
        logits[v] = p > 0 ? (float)log(p) : -INFINITY;
    }
}

static void draw(const dlm_tokenizer *tok, const int *canvas, int n, int step)
{
    char line[4 * T + 1];
    dlm_decode(tok, canvas, (size_t)n, line, sizeof line);      /* masks become _    */
    printf("%3d  %s\n", step, line);
}

/* Fills in a canvas.  With a chain: asks it and keeps what it says; without: asks the
   tape.  The sampler sees no difference. */
static dlm_error fill(dlm_ctx *ctx, const dlm_tokenizer *tok, const chain *c, tape *kept,
                      int *canvas, int n)
{
    dlm_sampler *sampler = NULL;
    dlm_config sizes = {0};                  /* the rest is for models               */
    dlm_sample_options how = {0};
    sizes.vocab = tok->vocab;
    sizes.max_seq = T;
    sizes.mask_id = tok->mask;
    sizes.pattern = DLM_PATTERN_FULL;        /* every row is to see all others       */
    how.steps = 12;
    how.temperature = 0.5f;
    how.seed = 2;

    dlm_error e = dlm_sampler_create_for(&sampler, ctx, &sizes, NULL, &how, NULL);
    if (!e) e = dlm_sampler_begin(sampler, canvas, &n, 1);
    for (int k = 0; !e && !dlm_sampler_done(sampler); k++) {
        dlm_batch b;
        e = dlm_sampler_ask(sampler, &b);
        for (int i = 0; !e && i < b.n_out; i++) {
            float logits[V];
            if (c) predict(c, b.tokens, n, b.out_rows[i], kept->logits[k][i]);
            memcpy(logits, kept->logits[k][i], sizeof logits);
            dlm_sampler_score(sampler, i, logits);      /* overwrites them           */
        }
        if (!e) e = dlm_sampler_answer(sampler);
        if (!e && c) draw(tok, canvas, n, k + 1);
    }
    dlm_sampler_free(sampler);
    return e;
}

static dlm_error run(dlm_ctx *ctx, const dlm_tokenizer *tok, int *same)
{
    static chain c;                          /* large, so not on the stack           */
    static tape kept;
    int ids[sizeof text], canvas[T], again[T];
    char given[sizeof form];
    size_t n = 0, length = 0;
    for (size_t i = 0; i < sizeof form; i++) given[i] = form[i] == '_' ? ' ' : form[i];
    dlm_error e = dlm_encode(tok, text, strlen(text), ids, sizeof text, &n);
    if (!e) e = dlm_encode(tok, given, strlen(given), canvas, T, &length);
    if (e) return e;
    c.vocab = tok->vocab;
    c.mask = tok->mask;
    c.letters = c.vocab - 2;                 /* the stop and the mask come last      */
    for (size_t i = 0; i < length; i++)
        if (form[i] == '_') canvas[i] = c.mask;
    memcpy(again, canvas, sizeof again);

    count(&c, ids, n);
    draw(tok, canvas, (int)length, 0);
    e = fill(ctx, tok, &c, &kept, canvas, (int)length);
    if (!e) e = fill(ctx, tok, NULL, &kept, again, (int)length);
    *same = memcmp(canvas, again, length * sizeof *canvas) == 0;
    if (!e) printf("\nfrom the logits that were kept: %s\n",
                   *same ? "the same, letter for letter" : "something else");
    return e;
}

int main(int argc, char **argv)
{
    dlm_ctx *ctx = NULL;
    dlm_tokenizer *tok = NULL;
    int same = 0;
    char why[256] = "";                      /* where the library has no words yet   */
    dlm_options options = {0};
    if (argc > 1) {
        puts("usage: own_network        it takes no arguments");
        return strcmp(argv[1], "--help") ? 2 : 0;
    }
    options.message = why, options.message_size = sizeof why;
    dlm_error e = dlm_init(&ctx, &options);
    if (!e) e = dlm_tokenizer_create(&tok, ctx, DLM_TOKENIZER_CHARS, text, strlen(text));
    if (!e) e = run(ctx, tok, &same);
    if (e) fprintf(stderr, "%s: %s\n", dlm_error_string(e),
                   *why ? why : dlm_last_error(ctx));
    dlm_tokenizer_free(tok);
    dlm_shutdown(ctx);
    return e != DLM_OK || !same;
}
