/* bench_lift - does LIFT's claim show in models of half a million weights?

   Build:  make build/bench_lift
   Run:    build/bench_lift [smoke|short|full] [--out FILE] [--seeds A-B] [--text FILE]
                            [--only el1|el2|el3|speed]
           build/bench_lift report FILE...           the tables again, files put together
   Tiers:  smoke under a minute (checks invariants; --quick is the same), short under ten
           minutes, full about an hour on two cores.  Every finished run appends rows to
           FILE and is skipped when its row is there: an interrupted run goes on.  It uses
           one thread; two processes with files and seeds of their own run side by side.

   EL1    frequency x mask ratio.  Rare tokens cannot be learnt when most is masked,
          common ones are nearly free when little is.
   EL2    fine-tuning.  LIFT against plain training at equal steps and at equal cost,
          against its ingredients, the reversed schedule and random choice; paired seeds,
          learning rates chosen per arm on the validation split.
   EL3    what is kept, against what the distributions of t and rho say.
   speed  wall time of a LIFT-3 step over that of a plain one.

   Pre-registered, with exact answers at two tokens per step as the measure:
     reproduced      on one task LIFT-3 beats the plain arm of equal FLOPs, the reversed
                     and the random-k arm (95 % intervals above 0), and on the other task
                     it is not significantly worse than the plain arm
     partly          the same against the plain arm of equal steps only, or all but
                     random-k
     not reproduced  otherwise */
#define _POSIX_C_SOURCE 199309L
#define DLM_IMPLEMENTATION
#include "dlm.h"
#include "bench.h"
#include "tasks.h"
#include "rivals.h"
#include <ctype.h>
#include <math.h>
#include <stdarg.h>

enum {
    MOST_SEEDS = 16, RATES = 3, KINDS = 2, DECODINGS = 2, MOST_ITEMS = 2048,
    DRAWS = 10000,                         /* of the bootstrap                     */
    BLOCK = 8, SEQS = 50                   /* decoding: block, puzzles at a time   */
};

static const char *const kind_names[KINDS] = { "sudoku", "countdown" };
static const float rate_factors[RATES] = { 0.3f, 1.0f, 3.0f };

typedef struct plan {                      /* a tier                               */
    const char *name;
    int dim, layers, heads, ffn;
    int base_steps, steps, batch;          /* of the base; of plain fine-tuning    */
    int n_train, n_valid, n_test;          /* per task                             */
    int seeds, rates, every_arm;
    int text_dim, text_steps, text_tokens, text_vocab, windows;
    int speed_shapes;
} plan;

static const plan plans[] = {
    { "smoke", 64, 4, 4, 160,  150,  100, 16,  128,  48,  48, 1, 1, 0,
      64,  100, 1 << 16,  512,  32, 1 },
    { "short", 64, 4, 4, 160, 2500,  400, 32,  512, 100, 100, 2, 1, 0,
      96,  600, 1 << 18,  512, 128, 2 },
    { "full",  64, 4, 4, 160, 7000,  400, 32,  512, 100, 300, 6, RATES, 1,
      96, 1500, 1 << 19, 1024, 256, 4 }
};

typedef struct arm {
    const char *name;
    double      steps;                     /* times plan.steps                     */
    dlm_method  method;
    int         policy;                    /* a dlm_policy                         */
    float       H;
    int         rho_code_form, one_pass;
    int         always;                    /* in every tier                        */
    dlm_error (*choose)(void *options, dlm_trainer *t);     /* in the method's place */
} arm;

/* Short names for the table. */
enum { TIME = DLM_POLICY_TIME, RANDOM = DLM_POLICY_RANDOM,
       REVERSE = DLM_POLICY_REVERSED };
enum { BASE, PLAIN, PLAIN_LIFT3, PLAIN_LIFT2, LIFT3 = 8, REVERSED = 11, RANDOM_K = 12 };
static const arm arms[] = {
    { "base",           0.0,      DLM_METHOD_VANILLA,  TIME,    0, 0, 0, 1, NULL },
    { "vanilla",        1.0,      DLM_METHOD_VANILLA,  TIME,    0, 0, 0, 1, NULL },
    { "vanilla_x1.22",  11 / 9.0, DLM_METHOD_VANILLA,  TIME,    0, 0, 0, 1, NULL },
    { "vanilla_x1.33",  4 / 3.0,  DLM_METHOD_VANILLA,  TIME,    0, 0, 0, 0, NULL },
    { "cart",           1.0,      DLM_METHOD_VANILLA,  TIME,    0, 0, 0, 0, rival_cart },
    { "gift",           1.0,      DLM_METHOD_VANILLA,  TIME,    0, 0, 0, 0, rival_gift },
    { "top_k",          1.0,      DLM_METHOD_TOP_K,    TIME,    0, 0, 0, 0, NULL },
    { "bottom_k",       1.0,      DLM_METHOD_BOTTOM_K, TIME,    0, 0, 0, 0, NULL },
    { "lift3",          1.0,      DLM_METHOD_LIFT3,    TIME,    3, 0, 0, 1, NULL },
    { "lift2",          1.0,      DLM_METHOD_LIFT2,    TIME,    0, 0, 0, 0, NULL },
    { "lift3_random",   1.0,      DLM_METHOD_LIFT3,    RANDOM,  3, 0, 0, 0, NULL },
    { "lift3_reversed", 1.0,      DLM_METHOD_LIFT3,    REVERSE, 3, 0, 0, 1, NULL },
    { "random_k",       1.0,      DLM_METHOD_RANDOM_K, TIME,    0, 0, 0, 1, NULL },
    { "lift3_one_pass", 1.0,      DLM_METHOD_LIFT3,    TIME,    3, 0, 1, 0, NULL },
    { "lift3_rho_code", 1.0,      DLM_METHOD_LIFT3,    TIME,    3, 1, 0, 0, NULL },
    { "lift3_h4",       1.0,      DLM_METHOD_LIFT3,    TIME,    4, 0, 0, 0, NULL },
    { "lift3_h8",       1.0,      DLM_METHOD_LIFT3,    TIME,    8, 0, 0, 0, NULL }
};
enum { ARMS = sizeof arms / sizeof *arms };

static int failures;                       /* invariants that do not hold          */

static void check(int holds, const char *what)
{
    printf("%s  %s\n", holds ? "holds " : "FAILS ", what);
    failures += !holds;
}

/* Only the full tier is large enough to mean anything. */
static const char *judged(const char *tier)
{
    return strcmp(tier, "full") ? " (this tier is too small to judge)" : "";
}

/* --[ results ]---------------------------------------------------------------
   Lines, in memory and in a file if there is one.  A row begins with its experiment,
   tier and seed; what follows is in the columns below. */

static const char *const columns[] = {
    "el1,tier,seed,corpus,t,class,masked,argmax,argmax_lo,argmax_hi,gold,gold_lo,gold_hi,"
    "ce,gain_over_unigram,unigram_p,spearman",
    "el2,tier,seed,arm,rate,lr,steps,seconds,tflop,loss,valid,elbo_sudoku,elbo_countdown,"
    "sudoku_2,sudoku_1,countdown_2,countdown_1,cells_2,cells_1,right_sudoku_2,"
    "right_sudoku_1,right_countdown_2,right_countdown_1",
    "el3,tier,seed,arm,bin,superset,scored,kept,rejected,gold_kept,gold_rejected",
    "speed,tier,seed,pattern,dim,T,B,vanilla_ms,lift3_ms,ratio,flop_ratio,noisy"
};

static struct results {
    char **lines;
    int    n, room;
    FILE  *file;
    const char *path;                      /* NULL: rows stay in memory            */
} results;

/* A row that is there already, to the letter, is a run that was repeated. */
static void results_add(const char *line)
{
    const size_t size = strlen(line) + 1;
    for (int i = 0; i < results.n; i++)
        if (strcmp(results.lines[i], line) == 0) return;
    if (results.n == results.room) {
        char **grown = (char **)bench_alloc((size_t)results.room * 2 + 64,
                                            sizeof(char *));
        if (results.n) memcpy(grown, results.lines, (size_t)results.n * sizeof(char *));
        free(results.lines);
        results.lines = grown;
        results.room = results.room * 2 + 64;
    }
    results.lines[results.n] = (char *)bench_alloc(size, 1);
    memcpy(results.lines[results.n++], line, size);
}

static void results_emit(const char *format, ...)
{
    char line[4 * MOST_ITEMS];
    va_list args;
    va_start(args, format);
    vsnprintf(line, sizeof line, format, args);
    va_end(args);
    results_add(line);
    if (results.file == NULL) return;
    fprintf(results.file, "%s\n", line);
    fflush(results.file);
}

static int results_have(const char *format, ...)
{
    char key[256];
    va_list args;
    va_start(args, format);
    vsnprintf(key, sizeof key, format, args);
    va_end(args);
    for (int i = 0; i < results.n; i++)
        if (strncmp(results.lines[i], key, strlen(key)) == 0) return 1;
    return 0;
}

static int results_load(const char *path)
{
    static char line[4 * MOST_ITEMS];
    FILE *f = fopen(path, "r");
    if (f == NULL) return 0;
    while (fgets(line, sizeof line, f) != NULL) {
        const size_t n = strcspn(line, "\n");
        const int whole = line[n] == '\n';   /* not the stump of a killed run      */
        line[n] = 0;
        if (whole && line[0] != '#') results_add(line);
    }
    fclose(f);
    return 1;
}

static void results_open(const char *path, const char *isa)
{
    const int known = results_load(path);
    char machine[256];
    results.path = path;
    results.file = fopen(path, "a");
    if (results.file == NULL) {
        fprintf(stderr, "%s: cannot be written\n", path);
        exit(1);
    }
    if (known) {
        printf("# resumed  %s, %d rows are there\n", path, results.n);
        fprintf(results.file, "\n");       /* ends a stump                         */
        return;
    }
    bench_machine(machine, sizeof machine);
    fprintf(results.file, "# bench_lift, dlm.h %d.%d.%d\n# machine  %s\n# flags    %s\n"
            "# isa      %s, 1 thread\n", DLM_VERSION_MAJOR, DLM_VERSION_MINOR,
            DLM_VERSION_PATCH, machine, DLM_BENCH_FLAGS, isa);
    for (size_t i = 0; i < sizeof columns / sizeof *columns; i++)
        fprintf(results.file, "# columns  %s\n", columns[i]);
}

/* The fields of a row, cut in place; returns how many. */
static int split(char *line, char **field, int most)
{
    int n = 0;
    for (char *at = line; at != NULL && n < most; n++) {
        char *comma = strchr(at, ',');
        field[n] = at;
        if (comma != NULL) *comma++ = 0;
        at = comma;
    }
    return n;
}

/* --[ tasks ]-----------------------------------------------------------------
   Fine-tuning data: Sudoku traces with 8 to 11 blanks and Countdown of the small
   variant.  What is tested is the same for every seed. */

typedef struct items {
    int kind, n;
    task_example *ex;                      /* (n)                                  */
    task_puzzle  *puzzle;                  /* (n) Sudoku                           */
    task_problem *problem;                 /* (n) Countdown                        */
} items;

static items items_make(const task_grids *grids, int kind, task_part part, uint64_t seed,
                        int n)
{
    items it = {0};
    it.kind = kind;
    it.n = n;
    it.ex = (task_example *)bench_alloc((size_t)n, sizeof *it.ex);
    it.puzzle = (task_puzzle *)bench_alloc((size_t)n, sizeof *it.puzzle);
    it.problem = (task_problem *)bench_alloc((size_t)n, sizeof *it.problem);
    for (int i = 0; i < n; i++) {
        const uint32_t index = (uint32_t)i;
        if (kind == 0) {
            task_sudoku_puzzle(&it.puzzle[i], grids, part, 8 + i % 4, seed, index);
            task_sudoku_example(&it.ex[i], &it.puzzle[i], TASK_TRACE);
        } else {
            task_countdown_problem(&it.problem[i], task_countdown_small, part, seed,
                                   index);
            task_countdown_example(&it.ex[i], &it.problem[i], task_countdown_small);
        }
    }
    return it;
}

static void items_free(items *it)
{
    free(it->ex);
    free(it->puzzle);
    free(it->problem);
}

static dlm_example as_example(const task_example *ex)
{
    dlm_example e = {0};
    e.tokens = ex->tokens;
    e.length = ex->length;
    e.prompt = ex->prompt;
    return e;
}

/* The base's broad mixture, in turn: a Sudoku of 4 to 10 blanks without a trace, two
   with one, a Countdown, a random string that is repeated. */
static void base_example(task_example *ex, const task_grids *grids, uint64_t seed,
                         int vocab, uint32_t number)
{
    const int what = (int)(number % 5);
    dlm_address at = {0};
    at.seed = seed, at.purpose = TASK_RANDOM_USER, at.row = number;
    if (what < 3) {
        const int blanks = what ? 8 + task_below(&at, 0, 4) : 4 + task_below(&at, 0, 7);
        task_puzzle p;
        task_sudoku_puzzle(&p, grids, TASK_TRAIN, blanks, seed, number);
        task_sudoku_example(ex, &p, what ? TASK_TRACE : TASK_DIRECT);
    } else if (what == 3) {
        task_problem p;
        task_countdown_problem(&p, task_countdown_small, TASK_TRAIN, seed, number);
        task_countdown_example(ex, &p, task_countdown_small);
    } else {
        ex->length = 0;
        for (uint32_t i = 0; i < 10; i++)
            task_push(ex, TASK_PLUS + task_below(&at, i, vocab - TASK_PLUS));
        task_push(ex, TASK_BREAK);
        ex->prompt = ex->length;
        for (int i = 0; i < 10; i++) task_push(ex, ex->tokens[i]);
    }
}

/* --[ lab ]-------------------------------------------------------------------
   One model whose weights go back to the base's before every run, one session. */

typedef struct lab {
    const plan  *p;
    dlm_ctx     *ctx;
    task_grids   grids;
    dlm_model   *model;
    float       *base;                     /* (n_params)                           */
    dlm_session *session;
    uint64_t     seed;
    items        train[KINDS], valid[KINDS], test[KINDS];
} lab;

static void lab_open(lab *l, const plan *p, dlm_ctx *ctx, uint64_t seed)
{
    dlm_config cfg = {0};
    dlm_limits limits = {0};
    memset(l, 0, sizeof *l);
    l->p = p;
    l->ctx = ctx;
    l->seed = seed;
    task_grids_init(&l->grids);
    cfg.vocab = task_countdown_vocab(task_countdown_small), cfg.mask_id = TASK_MASK;
    cfg.dim = p->dim, cfg.layers = p->layers, cfg.heads = p->heads, cfg.ffn = p->ffn;
    cfg.max_seq = TASK_LENGTH, cfg.pattern = DLM_PATTERN_FULL;
    bench_require(ctx, dlm_model_create(&l->model, ctx, &cfg, seed, NULL));
    limits.seqs = SEQS;
    bench_require(ctx, dlm_session_create(&l->session, ctx, l->model, &limits, NULL));
    l->base = (float *)bench_alloc(l->model->n_params, sizeof(float));
    memcpy(l->base, l->model->weights, l->model->n_params * sizeof(float));
    for (int k = 0; k < KINDS; k++) {
        l->train[k] = items_make(&l->grids, k, TASK_TRAIN, 1000 + seed, p->n_train);
        l->valid[k] = items_make(&l->grids, k, TASK_VALIDATION, 1, p->n_valid);
        l->test[k] = items_make(&l->grids, k, TASK_TEST, 2, p->n_test);
    }
}

static void lab_close(lab *l)
{
    for (int k = 0; k < KINDS; k++) {
        items_free(&l->train[k]);
        items_free(&l->valid[k]);
        items_free(&l->test[k]);
    }
    free(l->base);
    dlm_session_free(l->session);
    dlm_model_free(l->model);
}

static dlm_trainer *lab_trainer(lab *l, const arm *a, double lr, int steps)
{
    dlm_trainer *t;
    dlm_train_options o = {0};
    o.max_rows = l->p->batch * TASK_LENGTH;
    o.lr = (float)lr, o.warmup = steps / 20, o.total = steps;
    o.schedule = steps > 0 ? DLM_SCHEDULE_COSINE : DLM_SCHEDULE_CONSTANT;
    o.lift.method = a->method, o.lift.policy = (dlm_policy)a->policy, o.lift.H = a->H;
    o.lift.rho_code_form = a->rho_code_form, o.lift.one_pass = a->one_pass;
    o.lift.choose = a->choose;
    o.seed = l->seed;
    bench_require(l->ctx, dlm_trainer_create(&t, l->ctx, l->model, &o, NULL));
    return t;
}

/* Examples of step number `step` of fine-tuning: half of each task, every example once
   per epoch, the same for every arm. */
static void lab_batch(const lab *l, int step, dlm_example *batch)
{
    const int B = l->p->batch, n = l->p->n_train;
    for (int i = 0; i < B; i++) {
        const int kind = i % KINDS, at = step * (B / KINDS) + i / KINDS;
        const size_t which = dlm_shuffled(l->seed * KINDS + (uint64_t)kind,
                                          (uint32_t)(at / n), (size_t)n,
                                          (size_t)(at % n));
        batch[i] = as_example(&l->train[kind].ex[which]);
    }
}

static void add_bins(dlm_report *sum, const dlm_report *r)
{
    for (int i = 0; i < DLM_BINS; i++) {
        sum->bin_count[i] += r->bin_count[i];
        sum->bin_superset[i] += r->bin_superset[i];
        sum->bin_kept[i] += r->bin_kept[i];
        sum->bin_rejected[i] += r->bin_rejected[i];
        sum->bin_gold_kept[i] += r->bin_gold_kept[i] * (double)r->bin_kept[i];
        sum->bin_gold_rejected[i] += r->bin_gold_rejected[i] * (double)r->bin_rejected[i];
    }
    sum->flops += r->flops;
}

/* Fine-tunes from the base.  sum: bins and FLOPs of all steps, loss of the last tenth. */
static dlm_trainer *lab_tune(lab *l, const arm *a, double lr, int steps, dlm_report *sum)
{
    dlm_example *batch = (dlm_example *)bench_alloc((size_t)l->p->batch, sizeof *batch);
    dlm_trainer *t = lab_trainer(l, a, lr, steps);
    int counted = 0;
    memcpy(l->model->weights, l->base, l->model->n_params * sizeof(float));
    memset(sum, 0, sizeof *sum);
    for (int step = 0; step < steps; step++) {
        dlm_report r;
        lab_batch(l, step, batch);
        bench_require(l->ctx, dlm_trainer_step(t, batch, l->p->batch, &r));
        add_bins(sum, &r);
        if (step < steps - (steps + 9) / 10) continue;
        sum->loss += r.loss;
        counted++;
    }
    sum->loss /= counted > 0 ? counted : 1;
    free(batch);
    return t;
}

/* Trains the base, stopped early and at a constant rate.  Gives the losses of the first
   and the last tenth. */
static void lab_train_base(lab *l, int steps, double loss[2])
{
    const int B = l->p->batch;
    task_example *ex = (task_example *)bench_alloc((size_t)B, sizeof *ex);
    dlm_example *batch = (dlm_example *)bench_alloc((size_t)B, sizeof *batch);
    dlm_trainer *t = lab_trainer(l, &arms[PLAIN], 2e-3, 0);
    loss[0] = loss[1] = 0.0;
    for (int step = 0; step < steps; step++) {
        dlm_report r;
        for (int i = 0; i < B; i++) {
            base_example(&ex[i], &l->grids, l->seed, l->model->config.vocab,
                         (uint32_t)(step * B + i));
            batch[i] = as_example(&ex[i]);
        }
        bench_require(l->ctx, dlm_trainer_step(t, batch, B, &r));
        if (step < steps / 10) loss[0] += r.loss / (steps / 10);
        if (step >= steps - steps / 10) loss[1] += r.loss / (steps / 10);
    }
    memcpy(l->base, l->model->weights, l->model->n_params * sizeof(float));
    dlm_trainer_free(t);
    free(ex);
    free(batch);
}

/* The base of a run that was interrupted is beside its results. */
static void base_path(const lab *l, char path[1024])
{
    snprintf(path, 1024, "%s.base%d", results.path, (int)l->seed);
}

static int lab_load_base(lab *l)
{
    char path[1024];
    dlm_model *saved;
    int fits;
    base_path(l, path);
    if (results.path == NULL || dlm_load(&saved, NULL, l->ctx, path) != DLM_OK) return 0;
    fits = saved->n_params == l->model->n_params;
    if (fits) memcpy(l->base, saved->weights, saved->n_params * sizeof(float));
    dlm_model_free(saved);
    return fits;
}

static void lab_save_base(lab *l)
{
    char path[1024];
    base_path(l, path);
    if (results.path) bench_require(l->ctx, dlm_save(l->ctx, path, l->model, NULL));
}

/* --[ decoding ]-------------------------------------------------------------- */

static int score_item(const items *it, int i, const int *canvas, task_score *sum)
{
    const task_example *ex = &it->ex[i];
    const int *response = canvas + ex->prompt;
    char text[TASK_LENGTH + 32];
    if (it->kind == 0) {
        task_sudoku_text(text, response, ex->length - ex->prompt, TASK_TRACE);
        return task_sudoku_score(sum, &it->puzzle[i], text);
    }
    if (!task_countdown_text(text, response)) return 0;
    return task_countdown_score(text, it->problem[i].numbers, 3,
                                (double)it->problem[i].target);
}

/* Greedy, blocks of 8, per_step tokens at a time.  right (n) gets 1 or 0 for every
   item; returns the fraction.  cells (may be NULL): of the blanks. */
static double decode(lab *l, const items *it, int per_step, unsigned char *right,
                     double *cells)
{
    static int canvas[SEQS * TASK_LENGTH];
    int lengths[SEQS], total = 0;
    task_score score = {0};
    dlm_sampler *sampler;
    dlm_sample_options o = {0};
    o.block = BLOCK, o.steps = BLOCK / per_step;
    bench_require(l->ctx, dlm_sampler_create(&sampler, l->session, &o, NULL));
    for (int first = 0; first < it->n; first += SEQS) {
        const int n = it->n - first < SEQS ? it->n - first : SEQS;
        for (int s = 0; s < n; s++) {
            const task_example *ex = &it->ex[first + s];
            for (int i = 0; i < ex->length; i++)
                canvas[s * TASK_LENGTH + i] = i < ex->prompt ? ex->tokens[i] : TASK_MASK;
            lengths[s] = ex->length;
        }
        bench_require(l->ctx, dlm_sampler_begin(sampler, canvas, lengths, n));
        while (!dlm_sampler_done(sampler))
            bench_require(l->ctx, dlm_sampler_step(sampler));
        for (int s = 0; s < n; s++) {
            right[first + s] = (unsigned char)score_item(it, first + s,
                                                         canvas + s * TASK_LENGTH,
                                                         &score);
            total += right[first + s];
        }
    }
    dlm_sampler_free(sampler);
    if (cells && score.blanks > 0)
        *cells = (double)score.blanks_right / (double)score.blanks;
    return (double)total / it->n;
}

/* Bound on nats per token of the validation split, every arm with the same noise. */
static double held_out_elbo(lab *l, dlm_trainer *t, const items *it)
{
    dlm_example *ex = (dlm_example *)bench_alloc((size_t)it->n, sizeof *ex);
    double sum = 0.0;
    for (int i = 0; i < it->n; i++) ex[i] = as_example(&it->ex[i]);
    for (uint32_t draw = 0; draw < 4; draw++) {
        dlm_report r;
        bench_require(l->ctx, dlm_trainer_evaluate(t, ex, it->n, draw, &r));
        sum += r.loss / 4.0;
    }
    free(ex);
    return sum;
}

/* --[ el2: runs ]------------------------------------------------------------- */

/* One hexadecimal digit for four items. */
static void write_bits(char *hex, const unsigned char *right, int n)
{
    for (int i = 0; i < n; i += 4) {
        int value = 0;
        for (int j = 0; j < 4; j++) value = 2 * value + (i + j < n && right[i + j]);
        *hex++ = "0123456789abcdef"[value];
    }
    *hex = 0;
}

static void emit_bins(const lab *l, const arm *a, const dlm_report *r)
{
    for (int i = 0; i < DLM_BINS; i++) {
        const double kept = (double)r->bin_kept[i], rejected = (double)r->bin_rejected[i];
        results_emit("el3,%s,%d,%s,%d,%.0f,%.0f,%.0f,%.0f,%.4f,%.4f", l->p->name,
                     (int)l->seed, a->name, i, (double)r->bin_superset[i],
                     (double)r->bin_count[i], kept, rejected,
                     kept > 0.0 ? r->bin_gold_kept[i] / kept : 0.0,
                     rejected > 0.0 ? r->bin_gold_rejected[i] / rejected : 0.0);
    }
}

static double base_rate(const plan *p) { (void)p; return 1e-3; }

/* Fine-tunes one arm at one learning rate, measures, appends the row. */
static void run_arm(lab *l, const arm *a, int rate)
{
    const int steps = (int)(a->steps * l->p->steps + 0.5);
    const double lr = base_rate(l->p) * (double)rate_factors[rate];
    const double start = bench_now();
    double elbo[KINDS], valid = 0.0, exact[KINDS][DECODINGS], cells[DECODINGS] = {0};
    unsigned char right[MOST_ITEMS];
    static char bits[KINDS][DECODINGS][MOST_ITEMS / 4 + 1];
    dlm_report sum;
    dlm_trainer *t = lab_tune(l, a, lr, steps, &sum);
    for (int k = 0; k < KINDS; k++) elbo[k] = held_out_elbo(l, t, &l->valid[k]);
    dlm_trainer_free(t);
    for (int k = 0; k < KINDS; k++) {
        valid += decode(l, &l->valid[k], 2, right, NULL) / KINDS;
        for (int d = 0; d < DECODINGS; d++) {
            exact[k][d] = decode(l, &l->test[k], 2 - d, right,
                                 k == 0 ? &cells[d] : NULL);
            write_bits(bits[k][d], right, l->test[k].n);
        }
    }
    results_emit("el2,%s,%d,%s,%d,%g,%d,%.2f,%.4f,%.4f,%.4f,%.4f,%.4f,%.4f,%.4f,%.4f,"
                 "%.4f,%.4f,%.4f,%s,%s,%s,%s", l->p->name, (int)l->seed, a->name, rate,
                 lr, steps, bench_now() - start, 1e-12 * sum.flops, sum.loss, valid,
                 elbo[0], elbo[1], exact[0][0], exact[0][1], exact[1][0], exact[1][1],
                 cells[0], cells[1], bits[0][0], bits[0][1], bits[1][0], bits[1][1]);
    if (a->method == DLM_METHOD_LIFT3 && rate == 1 && a->always) emit_bins(l, a, &sum);
    printf("seed %d  %-14s lr %-7g loss %.3f  valid %.3f  sudoku %.3f %.3f  countdown "
           "%.3f %.3f  %.1f s\n", (int)l->seed, a->name, lr, sum.loss, valid, exact[0][0],
           exact[0][1], exact[1][0], exact[1][1], bench_now() - start);
    fflush(stdout);
}

static int wanted(const plan *p, int i, int rate)
{
    if (i == BASE || p->rates == 1) return rate == 1 && (p->every_arm || arms[i].always);
    return p->every_arm || arms[i].always;
}

/* Runs of a seed whose row is not there yet. */
static int runs_left(const plan *p, int seed)
{
    int n = 0;
    for (int i = 0; i < ARMS; i++)
        for (int rate = 0; rate < RATES; rate++)
            n += wanted(p, i, rate)
                && !results_have("el2,%s,%d,%s,%d,", p->name, seed, arms[i].name, rate);
    return n;
}

/* H = 2 chooses as LIFT-2 does; it is not run, but this is. */
static void check_h2(lab *l)
{
    arm h2 = arms[LIFT3], two = arms[LIFT3];
    float *kept = (float *)bench_alloc(l->model->n_params, sizeof(float));
    dlm_report r;
    h2.H = 2.0f;
    two.method = DLM_METHOD_LIFT2;
    dlm_trainer_free(lab_tune(l, &h2, 1e-3, 10, &r));
    memcpy(kept, l->model->weights, l->model->n_params * sizeof(float));
    dlm_trainer_free(lab_tune(l, &two, 1e-3, 10, &r));
    check(memcmp(kept, l->model->weights, l->model->n_params * sizeof(float)) == 0,
          "LIFT-3 with H = 2 is LIFT-2, weights bit-equal after 10 steps");
    free(kept);
}

/* Seconds that the missing runs will take, from a few steps of each kind. */
static double estimate(lab *l, int runs, int bases)
{
    const plan *p = l->p;
    unsigned char right[MOST_ITEMS];
    double loss[2], start = bench_now(), base, step, items_2 = 0.0;
    dlm_report r;
    lab_train_base(l, 10, loss);
    base = (bench_now() - start) / 10;
    start = bench_now();
    dlm_trainer_free(lab_tune(l, &arms[PLAIN], 1e-3, 10, &r));
    step = (bench_now() - start) / 10;
    start = bench_now();
    for (int k = 0; k < KINDS; k++) decode(l, &l->valid[k], 2, right, NULL);
    items_2 = (bench_now() - start) / p->n_valid;
    /* One token per step costs twice as much as two. */
    return bases * p->base_steps * base + runs * (1.2 * p->steps * step
         + items_2 * (p->n_valid + 3.0 * p->n_test));
}

static void el2_seed(const plan *p, dlm_ctx *ctx, int seed)
{
    lab *l = (lab *)bench_alloc(1, sizeof *l);
    const double start = bench_now();
    char path[1024];
    double loss[2];
    lab_open(l, p, ctx, (uint64_t)seed);
    if (lab_load_base(l)) printf("seed %d  base: read back\n", seed);
    else {
        lab_train_base(l, p->base_steps, loss);
        lab_save_base(l);
        printf("seed %d  base: loss %.3f -> %.3f in %d steps, %.1f s\n", seed, loss[0],
               loss[1], p->base_steps, bench_now() - start);
        check(loss[1] < loss[0], "the base's loss falls");
    }
    check_h2(l);
    for (int rate = 0; rate < RATES; rate++)
        for (int i = 0; i < ARMS; i++)
            if (wanted(p, i, rate)
                && !results_have("el2,%s,%d,%s,%d,", p->name, seed, arms[i].name, rate))
                run_arm(l, &arms[i], rate);
    base_path(l, path);
    if (results.path) remove(path);
    lab_close(l);
    free(l);
}

static void el2_run(const plan *p, dlm_ctx *ctx, int first, int last)
{
    int runs = 0, bases = 0;
    printf("\n== EL2: fine-tuning ==\n");
    for (int seed = first; seed <= last; seed++) {
        runs += runs_left(p, seed);
        bases += runs_left(p, seed) > 0;
    }
    if (runs > 0) {
        lab *l = (lab *)bench_alloc(1, sizeof *l);
        lab_open(l, p, ctx, 1);
        printf("# %d runs and %d bases to do, about %.1f minutes\n", runs, bases,
               estimate(l, runs, bases) / 60.0);
        fflush(stdout);
        lab_close(l);
        free(l);
    }
    for (int seed = first; seed <= last; seed++)
        if (runs_left(p, seed) > 0) el2_seed(p, ctx, seed);
}

/* --[ el2: tables ]-----------------------------------------------------------
   Everything below reads rows, so that it works on the files of several processes. */

typedef struct run {                       /* an el2 row                           */
    int    seed, arm, rate, steps, n[KINDS];
    double lr, seconds, tflop, loss, valid, elbo[KINDS];
    double exact[KINDS][DECODINGS], cells[DECODINGS];
    unsigned char *right[KINDS][DECODINGS];    /* (n) each                         */
} run;

typedef struct runs {
    run *at;
    int  n, n_seeds, seeds[MOST_SEEDS];    /* seeds: those with any row            */
    int  rate[ARMS];                       /* chosen on validation; -1: no runs    */
} runs;

static int arm_by_name(const char *name)
{
    int i = 0;
    while (i < ARMS && strcmp(arms[i].name, name) != 0) i++;
    return i < ARMS ? i : -1;
}

static unsigned char *read_bits(const char *hex, int *n)
{
    const int digits = (int)strlen(hex);
    unsigned char *right = (unsigned char *)bench_alloc((size_t)digits * 4, 1);
    for (int i = 0; i < digits * 4; i++) {
        const char c = hex[i / 4];
        const int value = c <= '9' ? c - '0' : c - 'a' + 10;
        right[i] = (unsigned char)(value >> (3 - i % 4) & 1);
    }
    *n = digits * 4;
    return right;
}

/* 1 if the line is an el2 row of the tier. */
static int read_run(run *r, const char *line, const char *tier)
{
    char copy[4 * MOST_ITEMS], *f[24];
    memset(r, 0, sizeof *r);
    snprintf(copy, sizeof copy, "%s", line);
    if (split(copy, f, 24) != 23 || strcmp(f[0], "el2") || strcmp(f[1], tier)) return 0;
    r->seed = atoi(f[2]), r->arm = arm_by_name(f[3]), r->rate = atoi(f[4]);
    r->lr = atof(f[5]), r->steps = atoi(f[6]), r->seconds = atof(f[7]);
    r->tflop = atof(f[8]), r->loss = atof(f[9]), r->valid = atof(f[10]);
    for (int k = 0; k < KINDS; k++) {
        r->elbo[k] = atof(f[11 + k]);
        r->cells[k] = atof(f[17 + k]);     /* by decoding, and there are two       */
        for (int d = 0; d < DECODINGS; d++) {
            r->exact[k][d] = atof(f[13 + 2 * k + d]);
            r->right[k][d] = read_bits(f[19 + 2 * k + d], &r->n[k]);
        }
    }
    return r->arm >= 0 && r->rate >= 0 && r->rate < RATES;
}

static const run *find_run(const runs *all, int arm_index, int rate, int seed)
{
    for (int i = 0; i < all->n; i++)
        if (all->at[i].arm == arm_index && all->at[i].rate == rate
            && all->at[i].seed == seed) return &all->at[i];
    return NULL;
}

/* The rate with the best mean score on the validation split, over all seeds; rates
   that were not run with every seed do not compete. */
static int best_rate(const runs *all, int arm_index)
{
    double best = -1.0;
    int chosen = -1;
    for (int rate = 0; rate < RATES; rate++) {
        double sum = 0.0;
        int found = 0;
        for (int s = 0; s < all->n_seeds; s++) {
            const run *r = find_run(all, arm_index, rate, all->seeds[s]);
            if (r == NULL) continue;
            sum += r->valid;
            found++;
        }
        if (found < all->n_seeds || sum / found <= best) continue;
        best = sum / found;
        chosen = rate;
    }
    return chosen;
}

static void runs_read(runs *all, const char *tier)
{
    memset(all, 0, sizeof *all);
    all->at = (run *)bench_alloc((size_t)results.n, sizeof(run));
    for (int i = 0; i < results.n; i++) {
        int s = 0;
        if (!read_run(&all->at[all->n], results.lines[i], tier)) continue;
        while (s < all->n_seeds && all->seeds[s] != all->at[all->n].seed) s++;
        if (s == all->n_seeds && s < MOST_SEEDS)
            all->seeds[all->n_seeds++] = all->at[all->n].seed;
        all->n++;
    }
    for (int i = 0; i < ARMS; i++) all->rate[i] = best_rate(all, i);
}

/* Mean and standard deviation over seeds of a number of an arm's chosen runs. */
static double over_seeds(const runs *all, int arm_index,
                         double (*of)(const run *r, int k), int k, double *deviation)
{
    double sum = 0.0, squares = 0.0;
    for (int s = 0; s < all->n_seeds; s++) {
        const double x = of(find_run(all, arm_index, all->rate[arm_index],
                                     all->seeds[s]), k);
        sum += x;
        squares += x * x;
    }
    sum /= all->n_seeds;
    if (deviation != NULL)
        *deviation = all->n_seeds < 2 ? 0.0
            : sqrt(fmax(0.0, squares / all->n_seeds - sum * sum) * all->n_seeds
                   / (all->n_seeds - 1));
    return sum;
}

static double of_tflop(const run *r, int k) { (void)k; return r->tflop; }
static double of_elbo(const run *r, int k) { return r->elbo[k]; }
static double of_cells(const run *r, int d) { return r->cells[d]; }
static double of_exact(const run *r, int k)
{
    return r->exact[k / DECODINGS][k % DECODINGS];
}

typedef struct difference {                /* between two arms                     */
    double mean, lo, hi, p;                /* 95 % interval; p two-sided           */
} difference;

/* Paired bootstrap: seeds and items are drawn again, both arms alike. */
static difference compare(const runs *all, int a, int b, int kind, int decoding)
{
    static double draw[DRAWS], drawn[MOST_ITEMS];
    const int n = find_run(all, a, all->rate[a], all->seeds[0])->n[kind];
    const run *ra[MOST_SEEDS], *rb[MOST_SEEDS];
    dlm_address at = {0};
    difference d = {0};
    int above = 0, below = 0;
    at.seed = 5, at.purpose = TASK_RANDOM_USER;
    for (int s = 0; s < all->n_seeds; s++) {
        ra[s] = find_run(all, a, all->rate[a], all->seeds[s]);
        rb[s] = find_run(all, b, all->rate[b], all->seeds[s]);
    }
    for (int i = -1; i < DRAWS; i++) {     /* -1: as they are                      */
        uint32_t bits[4];
        double sum = 0.0;
        at.step = (uint32_t)(i + 1);
        for (int j = 0; j < n; j++) drawn[j] = 0.0;
        for (int s = 0; s < all->n_seeds; s++) {
            const int from = i < 0 ? s : task_below(&at, (uint32_t)s, all->n_seeds);
            for (int j = 0; j < n; j++)
                drawn[j] += ra[from]->right[kind][decoding][j]
                          - rb[from]->right[kind][decoding][j];
        }
        for (int j = 0; j < n; j++) {
            if (j % 4 == 0) dlm_random_bits(&at, (uint32_t)(64 + j / 4), bits);
            sum += drawn[i < 0 ? j : (int)((uint64_t)bits[j % 4] * (uint64_t)n >> 32)];
        }
        sum /= (double)n * all->n_seeds;
        if (i < 0) d.mean = sum;
        else draw[i] = sum;
    }
    qsort(draw, DRAWS, sizeof *draw, bench_ascending);
    for (int i = 0; i < DRAWS; i++) above += draw[i] >= 0.0, below += draw[i] <= 0.0;
    d.lo = draw[DRAWS / 40];
    d.hi = draw[DRAWS - 1 - DRAWS / 40];
    d.p = fmin(1.0, 2.0 * ((above < below ? above : below) + 1) / (DRAWS + 1));
    return d;
}

static int ran(const runs *all, int arm_index) { return all->rate[arm_index] >= 0; }

static void print_arms(const runs *all)
{
    printf("\nmeans over %d seeds (deviation over seeds), exact answers in %%\n"
           "%-15s %7s %6s | %13s %6s %6s | %13s %6s | %7s %7s\n", all->n_seeds, "arm",
           "lr", "FLOP", "sudoku 2/step", "cells", "1/step", "countdown 2/s", "1/step",
           "bound s", "bound c");
    for (int i = 0; i < ARMS; i++) {
        double sd[KINDS], two[KINDS], plain;
        if (!ran(all, i)) continue;
        for (int k = 0; k < KINDS; k++)
            two[k] = 1e2 * over_seeds(all, i, of_exact, k * DECODINGS, &sd[k]);
        plain = ran(all, PLAIN) ? over_seeds(all, PLAIN, of_tflop, 0, NULL) : 1.0;
        printf("%-15s %7g %6.2f | %6.1f (%4.1f) %6.1f %6.1f | %6.1f (%4.1f) %6.1f | "
               "%7.3f %7.3f\n", arms[i].name,
               find_run(all, i, all->rate[i], all->seeds[0])->lr,
               over_seeds(all, i, of_tflop, 0, NULL) / plain, two[0], 1e2 * sd[0],
               1e2 * over_seeds(all, i, of_cells, 0, NULL),
               1e2 * over_seeds(all, i, of_exact, 1, NULL), two[1], 1e2 * sd[1],
               1e2 * over_seeds(all, i, of_exact, DECODINGS + 1, NULL),
               over_seeds(all, i, of_elbo, 0, NULL),
               over_seeds(all, i, of_elbo, 1, NULL));
    }
    printf("bound: ELBO on the validation split, nats per token; lower is better.  LIFT "
           "trains on other\nmasks than the bound averages over, so a worse bound with "
           "better answers is no contradiction.\n");
}

/* Holm: sorted ascending, the i-th of m p-values counts m - i times, monotonically. */
static void holm(double *p, int m)
{
    int order[ARMS] = {0};
    double least = 0.0;
    for (int i = 0; i < m; i++) {
        int j = i;
        for (; j > 0 && p[order[j - 1]] > p[i]; j--) order[j] = order[j - 1];
        order[j] = i;
    }
    for (int i = 0; i < m; i++) {
        least = fmax(least, fmin(1.0, p[order[i]] * (m - i)));
        p[order[i]] = least;
    }
}

static void print_against(const runs *all, int kind, int decoding)
{
    difference d[ARMS];
    double p[ARMS];
    int which[ARMS], m = 0;
    for (int i = PLAIN + 1; i < ARMS; i++) {
        if (!ran(all, i)) continue;
        d[m] = compare(all, i, PLAIN, kind, decoding);
        p[m] = d[m].p;
        which[m++] = i;
    }
    holm(p, m);
    printf("\n%s, %s per step: exact answers minus vanilla's, points, 95 %% interval; p "
           "after Holm over the arms\n", kind_names[kind],
           decoding ? "one token" : "two tokens");
    for (int i = 0; i < m; i++)
        printf("  %-15s %+6.2f  [%+6.2f, %+6.2f]  p %.4f%s\n", arms[which[i]].name,
               1e2 * d[i].mean, 1e2 * d[i].lo, 1e2 * d[i].hi, p[i],
               p[i] < 0.05 ? "  *" : "");
}

/* The arms that LIFT-3 has to beat, on both tasks; 1: above, -1: below, 0: neither. */
static int print_pair(const runs *all, int b, int kind, int decoding)
{
    const difference d = compare(all, LIFT3, b, kind, decoding);
    const int sign = d.lo > 0.0 ? 1 : d.hi < 0.0 ? -1 : 0;
    printf("  lift3 - %-15s %-9s %+6.2f  [%+6.2f, %+6.2f]  %s\n", arms[b].name,
           kind_names[kind], 1e2 * d.mean, 1e2 * d.lo, 1e2 * d.hi,
           sign > 0 ? "better" : sign < 0 ? "worse" : "no difference shown");
    return sign;
}

static void print_verdict(const runs *all, const char *tier, int decoding)
{
    static const int rivals[] = { PLAIN_LIFT3, REVERSED, RANDOM_K, PLAIN };
    int sign[4][KINDS], full = 0, partly = 0;
    for (int i = 0; i < 4; i++)
        if (!ran(all, rivals[i]) || !ran(all, LIFT3)) return;
    printf("\nclaim 2, %s per step\n", decoding ? "one token" : "two tokens");
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < KINDS; k++)
            sign[i][k] = print_pair(all, rivals[i], k, decoding);
    for (int k = 0; k < KINDS; k++) {
        const int equal_cost = sign[0][k] > 0 && sign[0][1 - k] >= 0 && sign[1][k] > 0;
        const int equal_steps = sign[3][k] > 0 && sign[3][1 - k] >= 0 && sign[1][k] > 0;
        full |= equal_cost && sign[2][k] > 0;
        partly |= equal_cost || equal_steps;
    }
    printf("%s: %s, %d seeds%s\n",
           decoding ? "the same rule, for information" : "VERDICT EL2, as registered",
           full ? "REPRODUCED" : partly ? "PARTLY reproduced" : "NOT reproduced",
           all->n_seeds, judged(tier));
}

static void el2_report(const char *tier)
{
    runs all;
    runs_read(&all, tier);
    if (all.n == 0) return;
    printf("\n== EL2 (%s): %d runs ==\n", tier, all.n);
    print_arms(&all);
    if (!ran(&all, PLAIN)) return;
    for (int k = 0; k < KINDS; k++)
        for (int d = 0; d < DECODINGS; d++) print_against(&all, k, d);
    print_verdict(&all, tier, 0);
    print_verdict(&all, tier, 1);
}

/* --[ el1: texts ]------------------------------------------------------------ */

typedef struct corpus {
    const char *name;
    int   *ids;                            /* (n)                                  */
    size_t n, n_train;                     /* what is held out comes after n_train */
    int    vocab;                          /* without the mask                     */
    double *count;                         /* (vocab) in the training part         */
    int    *class_of;                      /* (vocab)                              */
} corpus;

enum { COMMON, RARE, OTHER, ALL, CLASSES };    /* ALL counts every token           */
static const char *const class_names[CLASSES] = { "common", "rare", "other", "all" };

/* common: the most frequent types that cover 30 % of the training text; rare: the least
   frequent ones with 20 occurrences or more that cover 10 %. */
static void corpus_classify(corpus *c)
{
    int *order = (int *)bench_alloc((size_t)c->vocab, sizeof(int));
    double covered = 0.0;
    c->count = (double *)bench_alloc((size_t)c->vocab, sizeof(double));
    c->class_of = (int *)bench_alloc((size_t)c->vocab, sizeof(int));
    for (size_t i = 0; i < c->n_train; i++) c->count[c->ids[i]] += 1.0;
    for (int v = 0; v < c->vocab; v++) {   /* descending                           */
        int j = v;
        for (; j > 0 && c->count[order[j - 1]] < c->count[v]; j--)
            order[j] = order[j - 1];
        order[j] = v;
        c->class_of[v] = OTHER;
    }
    for (int j = 0; j < c->vocab && covered < 0.3 * (double)c->n_train; j++) {
        c->class_of[order[j]] = COMMON;
        covered += c->count[order[j]];
    }
    covered = 0.0;
    for (int j = c->vocab - 1; j >= 0 && covered < 0.1 * (double)c->n_train; j--) {
        if (c->count[order[j]] < 20.0 || c->class_of[order[j]] == COMMON) continue;
        c->class_of[order[j]] = RARE;
        covered += c->count[order[j]];
    }
    free(order);
}

/* Word w of n, the k-th with probability proportional to 1/k. */
static int zipf(double u, int n)
{
    double total = 0.0;
    for (int k = 1; k <= n; k++) total += 1.0 / k;
    for (int k = 1; k < n; k++) {
        u -= 1.0 / k / total;
        if (u < 0.0) return k - 1;
    }
    return n - 1;
}

/* Stories of a grammar.  Small words are the templates' own; a capital letter is a word
   drawn by Zipf's law: once for the story (Name, Object, Place, Quality), so that it can
   be told from where it stands elsewhere, or at each place (Verb, Adverb).  Which name
   it is hardly follows from anything else: that is what makes it rare and hard. */
static corpus grammar_text(int n)
{
    static const char *const sentences[] = {
        "there was a Q O in the P .", "N had a O and it was Q .", "N V the O to the P .",
        "so N went to the P and V it A .", "the O was Q , said N .", "then N V A .",
        "in the P the O V .", "he said that the O of N was Q .", "it V and N V A ."
    };
    static const char slots[] = "NOPQVA", small[] = " there was a in the . had and it to "
        "so went , said then he that of ";
    static const int sizes[] = { 80, 160, 60, 60, 80, 40 };
    corpus c = {0};
    dlm_address at = {0};
    int length = 0;
    c.name = "grammar";
    c.ids = (int *)bench_alloc((size_t)n + 64, sizeof(int));
    at.seed = 11, at.purpose = TASK_RANDOM_USER + 1;
    for (; length < n; at.step++) {
        for (int s = 0; s < 5; s++) {
            char text[64], *word;
            strcpy(text, sentences[task_below(&at, (uint32_t)s,
                                              sizeof sentences / sizeof *sentences)]);
            for (word = strtok(text, " "); word; word = strtok(NULL, " ")) {
                const char *slot = strchr(slots, *word);
                int id = (int)sizeof small;
                if (slot == NULL) {        /* a small word is its place in the list */
                    char spaced[16];
                    sprintf(spaced, " %s ", word);
                    c.ids[length++] = (int)(strstr(small, spaced) - small);
                    continue;
                }
                for (int k = 0; k < slot - slots; k++) id += sizes[k];
                at.position = slot - slots < 4 ? 1000U + (uint32_t)(slot - slots)
                                               : 2000U + (uint32_t)length;
                c.ids[length++] = id + zipf(dlm_uniform(&at, 0), sizes[slot - slots]);
                at.position = 0;
            }
        }
    }
    c.vocab = (int)sizeof small;
    for (int k = 0; k < 6; k++) c.vocab += sizes[k];
    c.n = (size_t)n;
    c.n_train = c.n * 9 / 10;
    return c;
}

/* Byte pairs, the most frequent first, that stay inside a word and the space before it:
   what is joined on the right begins with a letter, on the left ends with one or is a
   space.  Found on the training part alone. */
static void merge_pairs(corpus *c, const unsigned char *first, int most)
{
    unsigned char begin[4096], end[4096];
    int *count = (int *)bench_alloc((size_t)most * (size_t)most, sizeof(int));
    for (int v = 0; v < c->vocab; v++) begin[v] = end[v] = first[v];
    while (c->vocab < most) {
        size_t kept = 0, kept_train = 0;
        int best = 0;
        memset(count, 0, (size_t)most * (size_t)most * sizeof(int));
        for (size_t i = 0; i + 1 < c->n_train; i++) {
            const int a = c->ids[i], b = c->ids[i + 1], pair = a * most + b;
            if (isalpha(begin[b]) && (isalpha(end[a]) || end[a] == ' ')
                && ++count[pair] > count[best]) best = pair;
        }
        if (count[best] < 20) break;
        begin[c->vocab] = begin[best / most];
        end[c->vocab] = end[best % most];
        for (size_t i = 0; i < c->n; i++) {
            const int joined = i + 1 < c->n && c->ids[i] == best / most
                            && c->ids[i + 1] == best % most;
            if (i < c->n_train) kept_train = kept + 1;
            c->ids[kept++] = joined ? c->vocab : c->ids[i];
            i += (size_t)joined;
        }
        c->n = kept;
        c->n_train = kept_train;
        c->vocab++;
    }
    free(count);
}

static corpus file_text(const char *path, int most)
{
    corpus c = {0};
    unsigned char first[256], *bytes = (unsigned char *)bench_alloc(1 << 22, 1);
    int id[256];
    FILE *f = fopen(path, "rb");
    c.name = "file";
    if (f) c.n = fread(bytes, 1, 1 << 22, f);
    if (c.n < 10000) {
        fprintf(stderr, "%s: %d bytes of text, at least 10000 are needed\n", path,
                (int)c.n);
        exit(1);
    }
    fclose(f);
    c.ids = (int *)bench_alloc(c.n, sizeof(int));
    for (int b = 0; b < 256; b++) id[b] = -1;
    for (size_t i = 0; i < c.n; i++) {
        if (id[bytes[i]] < 0) {
            first[c.vocab] = bytes[i];
            id[bytes[i]] = c.vocab++;
        }
        c.ids[i] = id[bytes[i]];
    }
    free(bytes);
    c.n_train = c.n * 9 / 10;
    merge_pairs(&c, first, most);
    return c;
}

/* Countdown traces one after the other; what is held out has triples of its own. */
static corpus countdown_text(int n)
{
    corpus c = {0};
    c.name = "countdown";
    c.vocab = task_countdown_vocab(task_countdown_small);
    c.ids = (int *)bench_alloc((size_t)n + TASK_LENGTH, sizeof(int));
    c.n_train = (size_t)n / 10 * 9;
    for (uint32_t i = 0; c.n < (size_t)n; i++) {
        task_problem p;
        task_example ex;
        task_countdown_problem(&p, task_countdown_small,
                               c.n < c.n_train ? TASK_TRAIN : TASK_TEST, 3, i);
        task_countdown_example(&ex, &p, task_countdown_small);
        for (int k = 0; k < ex.length; k++) c.ids[c.n++] = ex.tokens[k];
    }
    return c;
}

static void corpus_free(corpus *c)
{
    free(c->ids);
    free(c->count);
    free(c->class_of);
}

/* --[ el1: measuring ]-------------------------------------------------------- */

enum { LEVELS = 6, WINDOW = 64, AT_ONCE = 32, MOST_WINDOWS = 512, RESAMPLES = 1000 };
static const double levels[LEVELS] = { 0.0625, 0.125, 0.25, 0.5, 0.70710678, 0.84089642 };

typedef struct sums {                      /* over masked tokens                   */
    double n, argmax, gold, ce, gain, unigram;
} sums;

typedef struct study {                     /* one level of one model               */
    const corpus *c;
    dlm_ctx *ctx;
    int  gold[AT_ONCE * WINDOW], window[AT_ONCE * WINDOW];   /* by out row          */
    double p_argmax[AT_ONCE * WINDOW], p_gold[AT_ONCE * WINDOW];
    sums by[CLASSES][MOST_WINDOWS];        /* by class and window                  */
    double *type_n, *type_gold;            /* (vocab)                              */
} study;

static void study_score(void *user, int i, float *logits)
{
    study *s = (study *)user;
    int argmax;
    const double z = dlm_log_sum_exp(s->ctx, logits, s->c->vocab + 1, &argmax);
    s->p_argmax[i] = exp((double)logits[argmax] - z);
    s->p_gold[i] = exp((double)logits[s->gold[i]] - z);
}

static void study_add(study *s, int i)
{
    const int v = s->gold[i], classes[2] = { s->c->class_of[v], ALL };
    const double u = fmax(1.0, s->c->count[v]) / (double)s->c->n_train;
    const double p = fmax(s->p_gold[i], 1e-30);
    for (int k = 0; k < 2; k++) {
        sums *x = &s->by[classes[k]][s->window[i]];
        x->n += 1.0, x->argmax += s->p_argmax[i], x->gold += p, x->ce -= log(p);
        x->gain += log(p / u), x->unigram += u;
    }
    s->type_n[v] += 1.0;
    s->type_gold[v] += p;
}

/* Masks held-out windows at level t and adds what the model says about them. */
static void study_windows(study *s, dlm_session *session, int windows, double t,
                          uint64_t seed, uint32_t level)
{
    static int start[AT_ONCE + 1], tokens[AT_ONCE * WINDOW], out[AT_ONCE * WINDOW];
    static dlm_keys keys[AT_ONCE * WINDOW];
    const corpus *c = s->c;
    dlm_address at = {0};
    dlm_batch b = {0};
    at.seed = seed, at.purpose = TASK_RANDOM_USER + 2, at.step = level;
    b.start = start, b.tokens = tokens, b.keys = keys, b.out_rows = out;
    for (int w = 0; w < windows; w++) {
        const size_t from = c->n_train + (size_t)w * (c->n - c->n_train - WINDOW)
                                       / (size_t)windows;
        const int row = b.n_seqs * WINDOW;
        at.row = (uint32_t)w;
        dlm_keys_fill(keys + row, WINDOW, DLM_PATTERN_FULL, 1, 0);
        for (int i = 0; i < WINDOW; i++) {
            const int gold = c->ids[from + (size_t)i];
            const int masked = dlm_uniform(&at, (uint32_t)i) < t;
            tokens[row + i] = masked ? c->vocab : gold;
            if (!masked) continue;
            s->gold[b.n_out] = gold;
            s->window[b.n_out] = w;
            out[b.n_out++] = row + i;
        }
        start[++b.n_seqs] = row + WINDOW;
        if (b.n_seqs < AT_ONCE && w + 1 < windows) continue;
        bench_require(s->ctx, dlm_forward(session, &b, study_score, s));
        for (int i = 0; i < b.n_out; i++) study_add(s, i);
        b.n_seqs = b.n_out = 0;
    }
}

/* Mean of one of the sums over windows, each counted times[w] times (NULL: once). */
static double ratio(const sums *by, int windows, int gold, const int *which)
{
    double n = 0.0, x = 0.0;
    for (int w = 0; w < windows; w++) {
        const sums *one = &by[which ? which[w] : w];
        n += one->n;
        x += gold ? one->gold : one->argmax;
    }
    return n > 0.0 ? x / n : 0.0;
}

static void bootstrap_windows(const sums *by, int windows, int gold, double interval[2])
{
    double draw[RESAMPLES];
    int which[MOST_WINDOWS];
    dlm_address at = {0};
    at.seed = 6, at.purpose = TASK_RANDOM_USER;
    for (at.step = 0; at.step < RESAMPLES; at.step++) {
        for (int w = 0; w < windows; w++)
            which[w] = task_below(&at, (uint32_t)w, windows);
        draw[at.step] = ratio(by, windows, gold, which);
    }
    qsort(draw, RESAMPLES, sizeof *draw, bench_ascending);
    interval[0] = draw[RESAMPLES / 40];
    interval[1] = draw[RESAMPLES - 1 - RESAMPLES / 40];
}

/* Ranks, ties sharing their mean. */
static void ranks(double *rank, const double *x, int n)
{
    for (int i = 0; i < n; i++) {
        double below = 0.0, same = 0.0;
        for (int j = 0; j < n; j++) below += x[j] < x[i], same += x[j] == x[i];
        rank[i] = below + (same + 1.0) / 2.0;
    }
}

/* Spearman's correlation of frequency and mean gold probability over the types that
   were masked at least five times. */
static double spearman(const study *s)
{
    const size_t room = (size_t)s->c->vocab;
    double *x = (double *)bench_alloc(room * 4, sizeof(double)), *y = x + room;
    double *rx = y + room, *ry = rx + room, mean, xy = 0.0, xx = 0.0, yy = 0.0;
    int n = 0;
    for (int v = 0; v < s->c->vocab; v++) {
        if (s->type_n[v] < 5.0) continue;
        x[n] = s->c->count[v];
        y[n++] = s->type_gold[v] / s->type_n[v];
    }
    ranks(rx, x, n);
    ranks(ry, y, n);
    mean = (n + 1) / 2.0;
    for (int i = 0; i < n; i++) {
        xy += (rx[i] - mean) * (ry[i] - mean);
        xx += (rx[i] - mean) * (rx[i] - mean);
        yy += (ry[i] - mean) * (ry[i] - mean);
    }
    free(x);
    return xx > 0.0 && yy > 0.0 ? xy / sqrt(xx * yy) : 0.0;
}

static void emit_study(const study *s, const plan *p, int seed, double t)
{
    for (int k = 0; k < CLASSES; k++) {
        double argmax[2], gold[2];
        sums all = {0};
        for (int w = 0; w < p->windows; w++) {
            const sums *one = &s->by[k][w];
            all.n += one->n, all.argmax += one->argmax, all.gold += one->gold;
            all.ce += one->ce, all.gain += one->gain, all.unigram += one->unigram;
        }
        if (all.n == 0.0) continue;
        bootstrap_windows(s->by[k], p->windows, 0, argmax);
        bootstrap_windows(s->by[k], p->windows, 1, gold);
        results_emit("el1,%s,%d,%s,%.4f,%s,%.0f,%.4f,%.4f,%.4f,%.4f,%.4f,%.4f,%.4f,%.4f,"
                     "%.5f,%.4f", p->name, seed, s->c->name, t, class_names[k], all.n,
                     all.argmax / all.n, argmax[0], argmax[1], all.gold / all.n, gold[0],
                     gold[1], all.ce / all.n, all.gain / all.n, all.unigram / all.n,
                     k == ALL ? spearman(s) : 0.0);
    }
}

static void el1_train(const plan *p, dlm_ctx *ctx, const corpus *c, int seed,
                      dlm_model **model)
{
    /* Countdown is learnt as far as it goes in a third of the steps. */
    const int steps = strcmp(c->name, "countdown") ? p->text_steps : p->text_steps / 3;
    dlm_config cfg = {0};
    dlm_train_options o = {0};
    dlm_trainer *t;
    dlm_report r = {0};
    const double begin = bench_now();
    cfg.vocab = c->vocab + 1, cfg.dim = p->text_dim, cfg.layers = 4, cfg.heads = 4;
    cfg.max_seq = WINDOW, cfg.pattern = DLM_PATTERN_FULL;
    o.max_rows = 16 * WINDOW, o.lr = 2e-3f, o.seed = (uint64_t)seed;
    o.warmup = steps / 20, o.total = steps, o.schedule = DLM_SCHEDULE_COSINE;
    bench_require(ctx, dlm_model_create(model, ctx, &cfg, (uint64_t)seed, NULL));
    bench_require(ctx, dlm_trainer_create(&t, ctx, *model, &o, NULL));
    for (int step = 0; step < steps; step++) {
        bench_require(ctx, dlm_trainer_step_text(t, c->ids, c->n_train, WINDOW, 16, &r));
        if (step == 9)
            printf("# %s, seed %d: %d types, %.0f tokens, about %.1f minutes\n", c->name,
                   seed, c->vocab, (double)c->n,
                   (bench_now() - begin) / 10 * steps / 60);
        fflush(stdout);
    }
    printf("seed %d  %s: loss %.3f after %d steps, %.1f s\n", seed, c->name, r.loss,
           steps, bench_now() - begin);
    dlm_trainer_free(t);
}

static void el1_measure(const plan *p, dlm_ctx *ctx, const corpus *c, int seed)
{
    study *s = (study *)bench_alloc(1, sizeof *s);
    dlm_model *model;
    dlm_session *session;
    dlm_limits limits = {0};
    el1_train(p, ctx, c, seed, &model);
    limits.seqs = AT_ONCE;
    bench_require(ctx, dlm_session_create(&session, ctx, model, &limits, NULL));
    for (int level = 0; level < LEVELS; level++) {
        memset(s, 0, sizeof *s);
        s->c = c;
        s->ctx = ctx;
        s->type_n = (double *)bench_alloc((size_t)c->vocab * 2, sizeof(double));
        s->type_gold = s->type_n + c->vocab;
        study_windows(s, session, p->windows, levels[level], (uint64_t)seed,
                      (uint32_t)level);
        emit_study(s, p, seed, levels[level]);
        free(s->type_n);
    }
    dlm_session_free(session);
    dlm_model_free(model);
    free(s);
}

static void el1_run(const plan *p, dlm_ctx *ctx, int first, int last, const char *text)
{
    printf("\n== EL1: frequency x mask ratio ==\n");
    for (int which = 0; which < 2; which++) {
        corpus c = {0};
        for (int seed = first; seed <= last; seed++) {
            const char *name = which ? "countdown" : text ? "file" : "grammar";
            /* A corpus is done when its last row is there. */
            if (results_have("el1,%s,%d,%s,%.4f,all,", p->name, seed, name,
                             levels[LEVELS - 1])) continue;
            if (c.ids == NULL) {
                c = which ? countdown_text(p->text_tokens)
                    : text ? file_text(text, p->text_vocab)
                    : grammar_text(p->text_tokens);
                corpus_classify(&c);
            }
            el1_measure(p, ctx, &c, seed);
        }
        corpus_free(&c);
    }
}

/* --[ el1: table ]------------------------------------------------------------ */

typedef struct cell {                      /* means over seeds                     */
    double n, argmax, gold, lo, hi, ce, gain, unigram, spearman;
} cell;

static int el1_read(const char *tier, const char *corpus_name, cell at[LEVELS][CLASSES])
{
    int seeds = 0;
    memset(at, 0, LEVELS * sizeof *at);
    for (int i = 0; i < results.n; i++) {
        char copy[4 * MOST_ITEMS], *f[24];
        int level = 0, k = 0;
        cell *x;
        snprintf(copy, sizeof copy, "%s", results.lines[i]);
        if (split(copy, f, 24) != 17 || strcmp(f[0], "el1") || strcmp(f[1], tier)
            || strcmp(f[3], corpus_name)) continue;
        while (level < LEVELS - 1 && fabs(atof(f[4]) - levels[level]) > 1e-3) level++;
        while (k < CLASSES - 1 && strcmp(f[5], class_names[k])) k++;
        x = &at[level][k];
        x->n += 1.0, x->argmax += atof(f[7]), x->gold += atof(f[10]);
        x->lo += atof(f[11]), x->hi += atof(f[12]);
        x->ce += atof(f[13]), x->gain += atof(f[14]), x->unigram += atof(f[15]);
        x->spearman += atof(f[16]);
        if (level == 0 && k == ALL) seeds++;
    }
    for (int i = 0; i < LEVELS * CLASSES; i++) {
        cell *x = &at[i / CLASSES][i % CLASSES];
        const double n = x->n > 0.0 ? x->n : 1.0;
        x->argmax /= n, x->gold /= n, x->lo /= n, x->hi /= n, x->ce /= n;
        x->gain /= n, x->unigram /= n, x->spearman /= n;
    }
    return seeds;
}

static double probability(const cell *x, int gold) { return gold ? x->gold : x->argmax; }

/* (i) to (iv) for one of the two metrics; (v) is about the gold probability alone. */
static int el1_verdict(cell at[LEVELS][CLASSES], int gold)
{
    double p[2][LEVELS], kept[2];
    int holds[4] = { 1, 1, 0, 0 }, all = 1;
    for (int k = 0; k < 2; k++) {
        for (int i = 0; i < LEVELS; i++) p[k][i] = probability(&at[i][k], gold);
        kept[k] = p[k][2] > 0.0 ? p[k][LEVELS - 1] / p[k][2] : 0.0;
    }
    for (int i = 0; i < LEVELS; i++) holds[0] &= p[COMMON][i] > p[RARE][i];
    for (int i = 1; i < LEVELS && levels[i] <= 0.5; i++)
        holds[1] &= p[COMMON][i] >= 0.8 * p[COMMON][0];
    holds[2] = kept[RARE] < 0.5;
    holds[3] = kept[RARE] < kept[COMMON];
    printf("  %-6s (i) common > rare %s  (ii) common varies little to t = .5 %s  (iii) "
           "rare halves %s\n         (iv) rare loses more %s: at t = .84 keeps %.2f of "
           "t = .25, common %.2f\n", gold ? "gold" : "argmax", holds[0] ? "yes" : "NO",
           holds[1] ? "yes" : "NO", holds[2] ? "yes" : "NO", holds[3] ? "yes" : "NO",
           kept[RARE], kept[COMMON]);
    for (int i = 0; i < 4; i++) all &= holds[i];
    return all;
}

static void el1_report(const char *tier, const char *name)
{
    cell at[LEVELS][CLASSES];
    const int seeds = el1_read(tier, name, at);
    int both, correlated = 1;
    if (seeds == 0) return;
    printf("\n== EL1 (%s): %s, %d seeds ==\n%6s %8s | %7s %7s %14s %7s %7s %9s | %s\n",
           tier, name, seeds, "t", "class", "argmax", "gold", "[95 %]  ", "CE", "gain",
           "unigram p", "spearman");
    for (int i = 0; i < LEVELS; i++)
        for (int k = 0; k < CLASSES; k++) {
            const cell *x = &at[i][k];
            if (k == OTHER) continue;
            printf("%6.4f %8s | %7.3f %7.3f [%.3f, %.3f] %7.3f %7.3f %9.5f |", levels[i],
                   class_names[k], x->argmax, x->gold, x->lo, x->hi, x->ce, x->gain,
                   x->unigram);
            if (k == ALL) printf(" %+.3f", x->spearman);
            printf("\n");
            if (k == ALL) correlated &= x->spearman > 0.0;
        }
    printf("[95 %%]: bootstrap over held-out windows, ends averaged over seeds.  "
           "gain: log p(gold) - log unigram.\nunigram p: what a model without "
           "context gives the gold token; near t = 1 every model comes down\nto it, "
           "so part of the effect is mechanical.\n");
    both = el1_verdict(at, 0);
    both &= el1_verdict(at, 1);
    printf("         (v) frequency and gold probability correlate at every t %s\n"
           "VERDICT EL1, %s: %s%s\n", correlated ? "yes" : "NO", name,
           both ? "REPRODUCED ((i) to (iv), both metrics)" : "NOT reproduced",
           judged(tier));
}

/* --[ el3 ]-------------------------------------------------------------------
   Kept fractions, once from an experiment of one example per step with levels of one
   third of the range, once from the bins that fine-tuning reported. */

static double kept_fraction(lab *l, int third, int code_form, int steps)
{
    dlm_trainer *t;
    dlm_train_options o = {0};
    double sum = 0.0;
    int n = 0;
    o.max_rows = TASK_LENGTH, o.lr = 1e-4f, o.seed = 1 + (uint64_t)third;
    o.level_min = fmaxf(1e-3f, (float)third / 3.0f);
    o.level_max = (float)(third + 1) / 3.0f;
    o.lift.method = DLM_METHOD_LIFT3, o.lift.rho_code_form = code_form;
    bench_require(l->ctx, dlm_trainer_create(&t, l->ctx, l->model, &o, NULL));
    for (int step = 0; step < steps; step++) {
        const dlm_example ex = as_example(&l->train[0].ex[step % l->p->n_train]);
        dlm_report r;
        double superset = 0.0;
        bench_require(l->ctx, dlm_trainer_step(t, &ex, 1, &r));
        for (int i = 0; i < DLM_BINS; i++) superset += (double)r.bin_superset[i];
        if (superset == 0.0) continue;
        sum += (double)r.scored / superset;
        n++;
    }
    dlm_trainer_free(t);
    return sum / n;
}

static void el3_thirds(const plan *p, dlm_ctx *ctx)
{
    static const double expected[2][3] = { { 0.337, 0.690, 0.909 },
                                           { 0.285, 0.635, 0.874 } };
    const int steps = p->speed_shapes > 2 ? 2000 : 500;
    lab *l = (lab *)bench_alloc(1, sizeof *l);
    int close = 1;
    lab_open(l, p, ctx, 1);
    printf("\n== EL3: kept fraction by thirds of t (Sudoku traces, %d examples each; "
           "expected: the formula) ==\n", steps);
    for (int form = 0; form < 2; form++) {
        printf("  rho, %s form ", form ? "code " : "paper");
        for (int third = 0; third < 3; third++) {
            const double kept = kept_fraction(l, third, form, steps);
            printf("  %.3f (%.3f)", kept, expected[form][third]);
            close &= fabs(kept - expected[form][third]) < 0.03;
        }
        printf("\n");
    }
    check(close, "kept fractions are within .03 of the expected ones");
    lab_close(l);
    free(l);
}

/* Expected of a bin's tokens: E t / E (t + rho) = 2 t / (1 + t) at its middle. */
static void el3_report(const char *tier, const char *name)
{
    double sum[DLM_BINS][6] = {{0}};
    int rows = 0;
    for (int i = 0; i < results.n; i++) {
        char copy[4 * MOST_ITEMS], *f[24];
        double *x;
        snprintf(copy, sizeof copy, "%s", results.lines[i]);
        if (split(copy, f, 24) != 11 || strcmp(f[0], "el3") || strcmp(f[1], tier)
            || strcmp(f[3], name)) continue;
        x = sum[atoi(f[4]) & (DLM_BINS - 1)];
        for (int k = 0; k < 4; k++) x[k] += atof(f[5 + k]);
        x[4] += atof(f[7]) * atof(f[9]);
        x[5] += atof(f[8]) * atof(f[10]);
        rows++;
    }
    if (rows == 0) return;
    printf("\n== EL3 (%s): %s while it fine-tunes, %d seeds ==\n%13s %10s %6s %9s | %13s "
           "%9s\n", tier, name, rows / DLM_BINS, "noise level", "superset", "kept",
           "2t/(1+t)", "p(gold) kept", "rejected");
    for (int i = 0; i < DLM_BINS; i++) {
        const double *x = sum[i], t = (i + 0.5) / DLM_BINS;
        printf("%.3f - %.3f %10.0f %6.3f %9.3f | ", i / 8.0, (i + 1) / 8.0, x[0],
               x[1] / x[0], 2.0 * t / (1.0 + t));
        if (x[2] > 0.0 && x[3] > 0.0)
            printf("%13.3f %9.3f\n", x[4] / x[2], x[5] / x[3]);
        else printf("%23s\n", "random, not scored");
    }
}

/* --[ speed ]----------------------------------------------------------------- */

typedef struct pace {                      /* a model in training                  */
    dlm_ctx     *ctx;
    dlm_model   *model;
    dlm_trainer *trainer;
    const int   *text;
    int          T, B, V;
    double       flops;
    long         steps;
} pace;

enum { SPEED_TEXT = 1 << 14 };

static void pace_step(void *arg)
{
    pace *x = (pace *)arg;
    dlm_report r;
    bench_require(x->ctx, dlm_trainer_step_text(x->trainer, x->text, SPEED_TEXT, x->T,
                                                x->B, &r));
    x->flops += r.flops;
    x->steps++;
}

static void pace_open(pace *x, dlm_ctx *ctx, dlm_pattern pattern, int dim, int T, int B,
                      dlm_method method)
{
    static int text[SPEED_TEXT];
    const dlm_address at = { 1, TASK_RANDOM_USER, 0, 0, 0 };
    dlm_config cfg = {0};
    dlm_train_options o = {0};
    memset(x, 0, sizeof *x);
    cfg.vocab = 64, cfg.dim = dim, cfg.layers = dim > 96 ? 6 : 4, cfg.heads = dim / 24;
    cfg.max_seq = T, cfg.pattern = pattern;
    for (uint32_t i = 0; i < SPEED_TEXT; i++) text[i] = (int)(dlm_uniform(&at, i) * 63);
    x->ctx = ctx, x->text = text, x->T = T, x->B = B;
    o.max_rows = 2 * B * T, o.lift.method = method;
    bench_require(ctx, dlm_model_create(&x->model, ctx, &cfg, 1, NULL));
    bench_require(ctx, dlm_trainer_create(&x->trainer, ctx, x->model, &o, NULL));
}

static void speed_shape(const plan *p, dlm_ctx *ctx, dlm_pattern pattern, int dim, int T)
{
    static const dlm_method methods[2] = { DLM_METHOD_VANILLA, DLM_METHOD_LIFT3 };
    const int B = dim > 96 || p->speed_shapes < 4 ? 8 : 16;
    pace x[2];
    bench_case c[2];
    double times, flops;
    memset(c, 0, sizeof c);
    for (int i = 0; i < 2; i++) {
        pace_open(&x[i], ctx, pattern, dim, T, B, methods[i]);
        c[i].run = pace_step;
        c[i].arg = &x[i];
        c[i].work = 1.0;
    }
    bench_run(c, 2);
    times = bench_ms(&c[1]) / bench_ms(&c[0]);
    flops = x[1].flops / (double)x[1].steps / (x[0].flops / (double)x[0].steps);
    for (int i = 0; i < 2; i++) {
        dlm_trainer_free(x[i].trainer);
        dlm_model_free(x[i].model);
    }
    printf("%5s %4d %4d %4d %10.2f %9.2f %6.3f %6.3f%s\n",
           pattern == DLM_PATTERN_FULL ? "mdlm" : "block", dim, T, B, bench_ms(&c[0]),
           bench_ms(&c[1]), times, flops,
           bench_noisy(&c[0]) || bench_noisy(&c[1]) ? "  noisy" : "");
    fflush(stdout);
    results_emit("speed,%s,%d,%s,%d,%d,%d,%.3f,%.3f,%.3f,%.3f,%d", p->name, 1,
                 pattern == DLM_PATTERN_FULL ? "mdlm" : "block", dim, T, B,
                 bench_ms(&c[0]), bench_ms(&c[1]), times, flops,
                 bench_noisy(&c[0]) || bench_noisy(&c[1]));
}

static void speed_run(const plan *p, dlm_ctx *ctx)
{
    static const dlm_pattern patterns[2] = { DLM_PATTERN_FULL, DLM_PATTERN_BLOCK };
    printf("\n== speed: a LIFT-3 step over a vanilla step, interleaved medians; wanted "
           "at most 1.30 ==\n%5s %4s %4s %4s %10s %9s %6s %6s\n", "", "dim", "T", "B",
           "vanilla ms", "lift3 ms", "ratio", "FLOP");
    for (int i = 0; i < p->speed_shapes; i++)
        for (int k = 0; k < 2; k++) {
            const int dim = i < 2 ? 96 : 192, T = i % 2 ? 128 : 48;
            if (!results_have("speed,%s,%d,%s,%d,%d,", p->name, 1,
                              k ? "block" : "mdlm", dim, T))
                speed_shape(p, ctx, patterns[k], dim, T);
        }
}

static void speed_report(const char *tier)
{
    double worst = 0.0;
    int rows = 0;
    for (int i = 0; i < results.n; i++) {
        char copy[4 * MOST_ITEMS], *f[24];
        snprintf(copy, sizeof copy, "%s", results.lines[i]);
        if (split(copy, f, 24) != 12 || strcmp(f[0], "speed") || strcmp(f[1], tier))
            continue;
        worst = fmax(worst, atof(f[9]));
        rows++;
    }
    if (rows > 0)
        printf("\n== speed (%s): LIFT-3 step / vanilla step is at most %.3f in %d rows; "
               "%s 1.30 ==\n", tier, worst, rows, worst <= 1.30 ? "within" : "OVER");
}

/* --[ the program ]----------------------------------------------------------- */

typedef struct request {
    const plan *p;
    const char *out, *text, *only;
    int first, last;
} request;

static void report(const char *tier)
{
    static const char *const texts[] = { "grammar", "file", "countdown" };
    for (int i = 0; i < 3; i++) el1_report(tier, texts[i]);
    el2_report(tier);
    el3_report(tier, "lift3");
    el3_report(tier, "lift3_reversed");
    speed_report(tier);
}

static request read_request(int argc, char **argv)
{
    static const char usage[] =
        "bench_lift [smoke|short|full] [--out FILE] [--seeds A-B] [--text FILE]\n"
        "                  [--only el1|el2|el3|speed]\n"
        "       bench_lift report FILE...";
    static const char *const parts[4] = { "el1", "el2", "el3", "speed" };
    request q = {0};
    q.p = &plans[0];
    for (int i = 1; i < argc; i++) {
        const char *value = i + 1 < argc ? argv[i + 1] : "";
        int known = 0;
        for (int k = 0; k < 3; k++)
            if (!strcmp(argv[i], plans[k].name)) q.p = &plans[k], known = 1;
        if (!strcmp(argv[i], "--quick")) known = 1;
        if (!strcmp(argv[i], "--out")) q.out = value, known = 2;
        if (!strcmp(argv[i], "--text")) q.text = value, known = 2;
        if (!strcmp(argv[i], "--only")) {
            q.only = value;
            for (int k = 0; k < 4; k++) if (!strcmp(value, parts[k])) known = 2;
        }
        if (!strcmp(argv[i], "--seeds"))
            known = sscanf(value, "%d-%d", &q.first, &q.last) == 2 ? 2 : 0;
        if (!known || (known == 2 && i + 1 == argc)) bench_usage(usage, argv[i]);
        i += known - 1;
    }
    if (q.last == 0) q.first = 1, q.last = q.p->seeds;
    if (q.first < 1 || q.last < q.first || q.last - q.first >= MOST_SEEDS)
        bench_usage(usage, NULL);
    if (q.text) bench_readable(q.text);
    return q;
}

static int asked(const request *q, const char *part)
{
    return q->only == NULL || strcmp(q->only, part) == 0;
}

int main(int argc, char **argv)
{
    request q;
    dlm_ctx *ctx;
    const double start = bench_now();
    if (argc > 1 && strcmp(argv[1], "report") == 0) {
        if (argc == 2) bench_usage("bench_lift report FILE...", NULL);
        for (int i = 2; i < argc; i++) {
            bench_readable(argv[i]);
            results_load(argv[i]);
        }
        for (int k = 0; k < 3; k++) report(plans[k].name);
        return 0;
    }
    q = read_request(argc, argv);
    ctx = bench_ctx(DLM_ISA_AUTO, 1);
    bench_context("bench_lift", dlm_isa_name(dlm_active_isa(ctx)), "1");
    printf("# tier     %s, seeds %d to %d\n", q.p->name, q.first, q.last);
    if (q.out) results_open(q.out, dlm_isa_name(dlm_active_isa(ctx)));
    /* What does not depend on seeds belongs to the process that has the first one. */
    if (q.first == 1 && asked(&q, "speed")) speed_run(q.p, ctx);
    if (q.first == 1 && asked(&q, "el3")) el3_thirds(q.p, ctx);
    if (asked(&q, "el1")) el1_run(q.p, ctx, q.first, q.last, q.text);
    if (asked(&q, "el2")) el2_run(q.p, ctx, q.first, q.last);
    report(q.p->name);
    printf("\n# %.1f minutes, %d checks failed\n", (bench_now() - start) / 60.0,
           failures);
    if (results.file) fclose(results.file);
    dlm_shutdown(ctx);
    return failures > 0;
}
