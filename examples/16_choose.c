/* 16_choose.c - yes or no, A or B or C: a model decides instead of writing.

   Build:  cc -O2 -I.. 16_choose.c -o choose -lm -pthread
   Run:    ./choose MODEL TOKENIZER "a form with {one|or|another} place"
           ./choose -l MODEL TOKENIZER "beginning" "long answer" "another one" ..
           TOKENIZER is - when MODEL, a file or a folder, has one of its own.  What
           may stand in a place is one token: of llama2.c's pieces a short word, the space
           before it belongs to it; of characters one.
   See:    how likely each candidate is, of all tokens and of those in the braces, for all
           places at once by one forward (a causal model fills them in from the left, by
           one each); with -l which answer the model would rather write, exactly. */
#define _POSIX_C_SOURCE 200112L              /* clock_gettime under -std=c99         */
#define DLM_IMPLEMENTATION
#include "dlm.h"
#include "scoring.h"
#include <stdio.h>
#include <string.h>
#include <time.h>

enum { TOKENS = 4096, PLACES = 32, LIST = 16 };
typedef struct judge {
    dlm_ctx *ctx; dlm_model *model; dlm_tokenizer *tok;
    scoring how;                             /* with a session and a state           */
    char why[256];                           /* where the library has no words       */
} judge;

static int canvas[TOKENS], n_tokens, texts[LIST][TOKENS], lists[PLACES][LIST];
static double p[PLACES][LIST], among[PLACES][LIST];
static const char *words[PLACES][LIST];      /* candidates as they stand in the form */
static scoring_choice choices[PLACES];

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static dlm_error refuse(judge *j, const char *what, const char *text, size_t size)
{
    snprintf(j->why, sizeof j->why, "%s: \"%.*s\"", what, (int)size, text);
    return DLM_E_INPUT;
}

/* Appends a piece of text.  llama2.c's pieces bring the space before them along. */
static dlm_error append(judge *j, int *tokens, int *n, const char *text, size_t size)
{
    size_t more = 0;
    if (j->tok->kind == DLM_TOKENIZER_PIECES && size > 0 && text[size - 1] == ' ') size--;
    const size_t room = (size_t)(TOKENS - *n);
    dlm_error e = dlm_encode(j->tok, text, size, tokens + *n, room, &more);
    if (!e && more > room) e = refuse(j, "too long", text, size);
    else if (!e) *n += (int)more;
    return e;
}

/* Of pieces a text begins with their stop token. */
static void begin(const judge *j, int *tokens, int *n)
{
    *n = 0;
    if (j->tok->kind == DLM_TOKENIZER_PIECES) tokens[(*n)++] = j->tok->stop;
}

/* "yes|no}": the candidates of a new place, and its mask on the canvas. */
static dlm_error read_place(judge *j, const char *at, const char *end, int place)
{
    scoring_choice *c = &choices[place];
    c->position = n_tokens;
    c->candidates = lists[place], c->p = p[place], c->among = among[place];
    if (n_tokens == TOKENS) return refuse(j, "too long, from here on", at, 20);
    for (dlm_error e = DLM_OK; at < end; c->n++) {
        size_t size = strcspn(at, "|}"), n = 0;
        if (c->n == LIST) return refuse(j, "too many candidates, from", at, size);
        e = dlm_encode(j->tok, at, size, &lists[place][c->n], 1, &n);
        if (!e && n != 1) e = refuse(j, "not one token (-l takes longer ones)", at, size);
        if (e) return e;
        words[place][c->n] = at;
        at += size + 1;
    }
    canvas[n_tokens++] = j->model->config.mask_id;
    return DLM_OK;
}

static dlm_error read_form(judge *j, const char *at, int *n_places)
{
    dlm_error e = DLM_OK;
    begin(j, canvas, &n_tokens);
    for (*n_places = 0; *at && !e; ) {
        const size_t before = strcspn(at, "{");
        if (before > 0) e = append(j, canvas, &n_tokens, at, before);
        at += before;
        if (e || !*at) break;
        const char *end = strchr(++at, '}');
        if (!end || *n_places == PLACES) return refuse(j, "no }, or too many {", at, 20);
        e = read_place(j, at, end, (*n_places)++);
        at = end + 1;
    }
    return !e && *n_places == 0 ? refuse(j, "no {place} in the form", "", 0) : e;
}

/* A session and a state for texts of T tokens, twice over where blocks need that. */
static dlm_error make_room(judge *j, int T)
{
    const dlm_config *c = &j->model->config;
    dlm_limits limits = {0};
    limits.slots = c->pattern == DLM_PATTERN_BLOCK ? 2 * T + c->block : T;
    const dlm_error e = dlm_session_create(&j->how.session, j->ctx, j->model,
                                           &limits, NULL);
    return e ? e : dlm_state_create(&j->how.state, j->ctx, c, DLM_OBJECTIVE_AUTO,
                                    limits.slots, 1, NULL);
}

static dlm_error choose(judge *j, const char *form)
{
    int n = 0;
    dlm_error e = read_form(j, form, &n);
    const int causal = j->model->config.pattern == DLM_PATTERN_CAUSAL;
    const int at_once = causal ? 1 : n;
    if (!e) e = make_room(j, n_tokens);
    const double start = seconds();
    for (int i = 0; i < n && !e; i += at_once) {
        e = score_choices(&j->how, canvas, n_tokens, choices + i, at_once);
        if (causal) canvas[choices[i].position] = lists[i][choices[i].best];
    }
    const double spent = 1e3 * (seconds() - start);
    for (int i = 0; i < n && !e; i++) {
        printf("place %d\n", i + 1);
        for (int k = 0; k < choices[i].n; k++)
            printf("  %c %-16.*s %8.4f of all %8.4f of these\n",
                   k == choices[i].best ? '*' : ' ', (int)strcspn(words[i][k], "|}"),
                   words[i][k], p[i][k], among[i][k]);
    }
    if (!e) printf("%d tokens, forwards %d: %.2f ms\n", n_tokens, causal ? n : 1, spent);
    return e;
}

/* log p(answer | beginning), for every answer. */
static dlm_error judge_answers(judge *j, const char *beginning, char **answers, int n)
{
    int given = 0, length[LIST], longest = 0, best = 0;
    scoring_result score[LIST];
    dlm_error e = n > LIST ? refuse(j, "too many answers", "", 0) : DLM_OK;
    j->how.left_to_right = 1;
    for (int i = 0; i < n && !e; i++) {
        begin(j, texts[i], &length[i]);
        if (*beginning) e = append(j, texts[i], &length[i], beginning, strlen(beginning));
        given = length[i];
        if (!e) e = append(j, texts[i], &length[i], answers[i], strlen(answers[i]));
        if (length[i] > longest) longest = length[i];
    }
    if (!e) e = make_room(j, longest);
    const double start = seconds();
    for (int i = 0; i < n && !e; i++) {
        e = score_text(&j->how, texts[i], length[i], given, strlen(answers[i]),
                       &score[i]);
        if (!e && score[i].nats > score[best].nats) best = i;
    }
    const double spent = 1e3 * (seconds() - start);
    if (!e) printf("    log p   tokens  bits/byte\n");
    for (int i = 0; i < n && !e; i++)
        printf("%c %7.3f %8d %10.3f   %s\n", i == best ? '*' : ' ', score[i].nats,
               score[i].tokens, score[i].bits_per_byte, answers[i]);
    if (!e) printf("%.2f ms\n", spent);
    return e;
}

int main(int argc, char **argv)
{
    judge j = {0};
    dlm_model *loaded = NULL;
    dlm_options options = {0};
    const int longer = argc > 1 && !strcmp(argv[1], "-l");
    char **arg = argv + longer;              /* model, tokenizer, form or beginning  */
    if (argc - longer < 4 + longer || (!longer && (argc != 4 || argv[1][0] == '-'))) {
        puts("usage: choose MODEL TOKENIZER \"a form with {one|or|another} place\"\n"
             "       choose -l MODEL TOKENIZER \"beginning\" \"answer\" ..");
        return argc > 1 && !strcmp(argv[1], "--help") ? 0 : 2;
    }
    j.how.exclude_mask = 1;                  /* it is no answer                      */
    options.message = j.why, options.message_size = sizeof j.why;
    dlm_error e = dlm_init(&j.ctx, &options);
    if (!e) e = dlm_open(&loaded, &j.tok, j.ctx, arg[1], NULL);
    if (!e) e = dlm_model_pack(&j.model, j.ctx, loaded, DLM_F32, NULL);  /* fast */
    if (!e && strcmp(arg[2], "-")) {
        dlm_tokenizer_free(j.tok);
        e = dlm_tokenizer_load(&j.tok, j.ctx, DLM_TOKENIZER_PIECES, arg[2]);
    }
    if (!e && !j.tok) e = refuse(&j, "holds no tokenizer", arg[1], strlen(arg[1]));
    if (!e) e = longer ? judge_answers(&j, arg[3], arg + 4, argc - 5)
                       : choose(&j, arg[3]);
    if (e) fprintf(stderr, "%s: %s\n", dlm_error_string(e),
                   *j.why ? j.why : *j.how.why ? j.how.why : dlm_last_error(j.ctx));
    dlm_state_free(j.how.state); dlm_session_free(j.how.session);
    dlm_model_free(j.model); dlm_model_free(loaded);
    dlm_tokenizer_free(j.tok); dlm_shutdown(j.ctx);
    return e != DLM_OK;
}
