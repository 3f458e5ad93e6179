/* bench_opd - does on-policy distillation make a block-diffusion model of an AR one?

   Build:  make build/bench_opd
   Run:    build/bench_opd [smoke|short|full] [--out FILE] [--seeds A-B] [--model FILE]
                           [--only sudoku|stories] [--arm NAME] [--rate LR]
           build/bench_opd report FILE...            the tables again, files put together
   Tiers:  smoke under a minute (checks invariants; --quick is the same), short under ten
           minutes, full about an hour.  Every finished run appends a row to FILE and is
           skipped when its row is there: an interrupted bench goes on.  It uses one
           thread; processes with files and seeds of their own run side by side.

   Two teachers.  sudoku: a small AR model trained here on Sudoku 4x4 (puzzle, then the
   solution); quality is exact grids, decoded greedily.  stories: a llama2.c file, which
   is skipped when it is missing; quality is minus the excess of the teacher's NLL of the
   student's samples over that of its own samples, temperature 1, nats per token.  Its
   training corpus is not here: fresh samples of the teacher stand for it.

   All arms begin with the same weights and prompts, take as many updates of as many
   texts and share a learning rate (--rate tries another); x3 and the like have that many
   times the texts.  Row i of a student predicts token i + 1 as it did in the teacher,
   except in opdlm_same.  scratch_x5 and cpt_x15 run only when --arm names them.

   Pre-registered, intervals are 95 % t-intervals of paired differences over
   seeds, in points (sudoku) or hundredths of a nat (stories):
     EO1   sudoku: accuracy at least 90 % of the teacher's, untouched far below
     EO2   tokens continued training needs for the same quality, more than 3 times as many
     EO3   student's texts - teacher's texts > 0, more than trajectory - random masks
     EO4   trajectory - random masks within +-2 points (+-5 hundredths of a nat)
     EO5   the drop from one token per step to threshold .9 is smaller than for SFT
     EO6   larger blocks: more tokens per step, lower quality
     EO7   the student ignores its right context: it gives the gold token of an infilling
           the probability that a left-to-right teacher gives, SFT a higher one
     EO10  FLOPs with and without rollouts (a table) */
#define _POSIX_C_SOURCE 199309L
#define DLM_IMPLEMENTATION
#include "dlm.h"
#include "bench.h"
#include "tasks.h"
#include <math.h>
#include <stdarg.h>

enum {
    MOST_SEEDS = 16, GAMMAS = 5, SLOTS = 96, MOST_TEXTS = 1024, PROMPT = 32,
    BOS = 1,                               /* of llama2.c: stands between stories  */
    SUDOKU = 0, STORIES = 1, TASKS = 2
};

static const char *const task_names[TASKS] = { "sudoku", "stories" };
/* Thresholds of the decodings; above 1: one token per step. */
static const float gammas[GAMMAS] = { 2.0f, 0.95f, 0.9f, 0.85f, 0.8f };
enum { STATIC = 0, DYNAMIC = 2 };

typedef struct plan {                      /* a tier                               */
    const char *name;
    int seeds, level;                      /* arms up to this level                */
    int teacher_steps, teacher_dim;        /* sudoku                               */
    int rounds[TASKS], texts, batch;       /* rollouts; texts of each; of an update */
    int length;                            /* of a story                           */
    int n_eval[TASKS];
    double rate[TASKS];                    /* learning rate of every arm            */
} plan;

static const plan plans[] = {
    { "smoke", 1, 0,  150, 64, {  2,  1 }, 32,  8, 48, {  32,  16 }, { 1e-3, 2e-4 } },
    { "short", 2, 1, 1200, 64, { 64, 24 }, 64,  8, 64, { 192,  64 }, { 1e-3, 2e-4 } },
    { "full",  3, 2, 1500, 64, { 80, 60 }, 64,  8, 64, { 512, 192 }, { 1e-3, 2e-4 } }
};

typedef enum source { ROLLOUT, TEACHER, CORPUS } source;

typedef struct arm {
    const char *name;
    int    level;                          /* first tier that runs it              */
    source from;                           /* whose texts                          */
    int    ce;                             /* cross-entropy instead of the teacher */
    int    flat;                           /* 1: without the weight 1/t            */
    int    states;                         /* a dlm_states                         */
    int    block;
    double times;                          /* texts, relative to the plan          */
    double warm;                           /* share of off-policy rounds before    */
    int    mix;                            /* every |mix|-th update: cross-entropy on the
                                              student's own texts, or if negative on those
                                              of the corpus; 0: never              */
    int    kind;                           /* a dlm_divergence_kind                */
    int    scratch;                        /* 1: random weights                    */
    int    same;                           /* 1: row i predicts token i, as in the paper;
                                              0: token i + 1, as it did in the teacher */
} arm;

enum { TRAJECTORY = DLM_STATES_TRAJECTORY, RANDOM = DLM_STATES_RANDOM,
       REVERSE = DLM_REVERSE_KL, JSD = DLM_JSD };
static const arm arms[] = {
    { "untouched",  0, ROLLOUT, 0, 0, TRAJECTORY,  4,  0.0, 0.0, 0, 0, 0, 0 },
    { "opdlm",      0, ROLLOUT, 0, 0, TRAJECTORY,  4,  1.0, 0.0, 0, 0, 0, 0 },
    { "opdlm_off",  1, ROLLOUT, 0, 0, RANDOM,      4,  1.0, 0.0, 0, 0, 0, 0 },
    { "off_policy", 1, TEACHER, 0, 0, RANDOM,      4,  1.0, 0.0, 0, 0, 0, 0 },
    { "sft",        0, TEACHER, 1, 0, RANDOM,      4,  1.0, 0.0, 0, 0, 0, 0 },
    { "opdlm_warm", 2, ROLLOUT, 0, 0, TRAJECTORY,  4,  1.0, 0.1, 0, 0, 0, 0 },
    { "opdlm_jsd",  1, ROLLOUT, 0, 0, TRAJECTORY,  4,  1.0, 0.1, 0, JSD, 0, 0 },
    { "opdlm_rev",  2, ROLLOUT, 0, 0, TRAJECTORY,  4,  1.0, 0.1, 0, REVERSE, 0, 0 },
    { "opdlm_mix",  1, ROLLOUT, 0, 0, TRAJECTORY,  4,  1.0, 0.0, 4, 0, 0, 0 },
    { "opdlm_both", 2, ROLLOUT, 0, 0, TRAJECTORY,  4,  1.0, 0.0, -2, 0, 0, 0 },
    { "opdlm_same", 2, ROLLOUT, 0, 0, TRAJECTORY,  4,  1.0, 0.1, 0, 0, 0, 1 },
    { "opdlm_x4",   2, ROLLOUT, 0, 0, TRAJECTORY,  4,  4.0, 0.0, 0, 0, 0, 0 },
    { "opdlm_b8",   2, ROLLOUT, 0, 0, TRAJECTORY,  8,  1.0, 0.0, 0, 0, 0, 0 },
    { "opdlm_b16",  2, ROLLOUT, 0, 0, TRAJECTORY, 16,  1.0, 0.0, 0, 0, 0, 0 },
    { "sft_flat",   2, TEACHER, 1, 1, RANDOM,      4,  1.0, 0.0, 0, 0, 0, 0 },
    { "cpt",        2, CORPUS,  1, 0, RANDOM,      4,  1.0, 0.0, 0, 0, 0, 0 },
    { "cpt_x3",     2, CORPUS,  1, 0, RANDOM,      4,  3.0, 0.0, 0, 0, 0, 0 },
    { "cpt_x5",     2, CORPUS,  1, 0, RANDOM,      4,  5.0, 0.0, 0, 0, 0, 0 },
    { "scratch_x5", 3, CORPUS,  1, 0, RANDOM,      4,  5.0, 0.0, 0, 0, 1, 0 },
    { "cpt_x15",    3, CORPUS,  1, 0, RANDOM,      4, 15.0, 0.0, 0, 0, 0, 0 }
};
enum { ARMS = sizeof arms / sizeof *arms };

static int failures;                       /* invariants that do not hold          */

static void check(int holds, const char *what)
{
    printf("%s  %s\n", holds ? "holds " : "FAILS ", what);
    failures += !holds;
}

/* --[ results ]---------------------------------------------------------------
   One line per finished run, in memory and in a file if there is one. */

typedef struct run {                       /* what a row says                      */
    int    task, seed, arm;                /* arm ARMS: the teacher                */
    double seconds, tokens, train_flops, rollout_flops, loss;
    double quality[GAMMAS], per_step[GAMMAS], per_pass[GAMMAS], distinct[GAMMAS];
    double gold, log_gold;                 /* infilling                            */
} run;

static struct results { run run[TASKS * (ARMS + 1) * MOST_SEEDS]; int n; FILE *file; }
    results;

static const char *arm_name(int i) { return i == ARMS ? "teacher" : arms[i].name; }

static run *find_run(int task, int seed, int arm_index)
{
    for (int i = 0; i < results.n; i++) {
        run *r = &results.run[i];
        if (r->task == task && r->seed == seed && r->arm == arm_index) return r;
    }
    return NULL;
}

static void results_header(FILE *f, const char *isa)
{
    char machine[256];
    bench_machine(machine, sizeof machine);
    fprintf(f, "# bench_opd, dlm.h %d.%d.%d\n# machine  %s\n# flags    %s\n"
            "# isa      %s, 1 thread\n", DLM_VERSION_MAJOR, DLM_VERSION_MINOR,
            DLM_VERSION_PATCH, machine, DLM_BENCH_FLAGS, isa);
    fprintf(f, "tier,task,seed,arm,seconds,tokens,train_tflop,rollout_tflop,loss,gold,"
            "log_gold");
    for (int g = 0; g < GAMMAS; g++)
        fprintf(f, ",quality_%.2f,per_step_%.2f,per_pass_%.2f,distinct2_%.2f",
                (double)gammas[g], (double)gammas[g], (double)gammas[g],
                (double)gammas[g]);
    fprintf(f, "\n");
}

static void results_add(const run *r, const char *tier)
{
    DLM_ASSERT(results.n < (int)(sizeof results.run / sizeof *results.run));
    results.run[results.n++] = *r;
    if (results.file == NULL) return;
    fprintf(results.file, "%s,%s,%d,%s,%.2f,%.0f,%.5f,%.5f,%.5f,%.5f,%.5f", tier,
            task_names[r->task], r->seed, arm_name(r->arm), r->seconds, r->tokens,
            r->train_flops * 1e-12, r->rollout_flops * 1e-12, r->loss, r->gold,
            r->log_gold);
    for (int g = 0; g < GAMMAS; g++)
        fprintf(results.file, ",%.5f,%.4f,%.4f,%.4f", r->quality[g], r->per_step[g],
                r->per_pass[g], r->distinct[g]);
    fprintf(results.file, "\n");
    fflush(results.file);
}

/* A row of the file, or 0 when it is something else or another tier's. */
static int read_run(run *r, char *line, const char *tier)
{
    char *field[11 + 4 * GAMMAS + 1];
    int n = 0;
    memset(r, 0, sizeof *r);
    for (char *p = strtok(line, ",\n"); p && n < 12 + 4 * GAMMAS; p = strtok(NULL, ",\n"))
        field[n++] = p;
    if (n != 11 + 4 * GAMMAS || strcmp(field[0], tier) != 0) return 0;
    r->task = strcmp(field[1], task_names[STORIES]) == 0;
    r->seed = atoi(field[2]);
    while (r->arm < ARMS && strcmp(field[3], arm_name(r->arm)) != 0) r->arm++;
    r->seconds = atof(field[4]), r->tokens = atof(field[5]);
    r->train_flops = atof(field[6]) * 1e12, r->rollout_flops = atof(field[7]) * 1e12;
    r->loss = atof(field[8]), r->gold = atof(field[9]), r->log_gold = atof(field[10]);
    for (int g = 0; g < GAMMAS; g++) {
        char **f = field + 11 + 4 * g;
        r->quality[g] = atof(f[0]), r->per_step[g] = atof(f[1]);
        r->per_pass[g] = atof(f[2]), r->distinct[g] = atof(f[3]);
    }
    return r->seed >= 1 && r->seed <= MOST_SEEDS
        && (r->arm < ARMS || strcmp(field[3], "teacher") == 0);
}

static int results_load(const char *path, const char *tier)
{
    static char line[4096];
    FILE *f = fopen(path, "r");
    run r;
    if (f == NULL) return 0;
    while (fgets(line, sizeof line, f) != NULL)
        if (strchr(line, '\n') && read_run(&r, line, tier)
            && find_run(r.task, r.seed, r.arm) == NULL)
            results.run[results.n++] = r;
    fclose(f);
    return 1;
}

static void results_open(const char *path, const char *tier, const char *isa)
{
    const int known = results_load(path, tier);
    results.file = fopen(path, "a");
    if (results.file == NULL) {
        fprintf(stderr, "%s: cannot be written\n", path);
        exit(1);
    }
    if (known) fprintf(results.file, "\n");      /* ends the stump of a killed run  */
    else results_header(results.file, isa);
    if (known) printf("# resumed  %s, %d rows are there\n", path, results.n);
}

/* --[ texts ]-----------------------------------------------------------------
   Prompts, their continuations, and the step at which each token was filled in. */

typedef struct texts {
    int  n;
    int *tokens, *steps;                   /* (n, SLOTS)                           */
    int *prompt, *length;                  /* (n)                                  */
    task_puzzle *puzzle;                   /* (n) sudoku                           */
} texts;

static texts texts_new(int n)
{
    const size_t cells = (size_t)n * SLOTS;
    texts x = {0};
    x.n = n;
    x.tokens = (int *)bench_alloc(cells, sizeof(int));
    x.steps = (int *)bench_alloc(cells, sizeof(int));
    x.prompt = (int *)bench_alloc((size_t)n, sizeof(int));
    x.length = (int *)bench_alloc((size_t)n, sizeof(int));
    x.puzzle = (task_puzzle *)bench_alloc((size_t)n, sizeof *x.puzzle);
    return x;
}

static void texts_free(texts *x)
{
    free(x->tokens);
    free(x->steps);
    free(x->prompt);
    free(x->length);
    free(x->puzzle);
}

typedef struct lab {                       /* one task, one seed                   */
    const plan *p;
    dlm_ctx    *ctx;
    int         task;
    uint64_t    seed;
    task_grids  grids;
    dlm_model  *teacher;
    texts       pool;                      /* the teacher's: prompts are cut of them */
    texts       held;                      /* for infilling                        */
    double      own;                       /* stories: NLL of the teacher's texts  */
    double      rate;                      /* learning rate of the arms            */
} lab;

/* What the decoder shall do. */
typedef struct decoding { float gamma, temperature; int block; uint64_t seed; } decoding;

typedef struct tally { double tokens, steps, passes, flops; } tally;

/* Fills everything after the prompts, up to length[i] tokens each. */
static void write_texts(const lab *l, const dlm_model *m, const decoding *d, texts *x,
                        uint32_t first_id, tally *t)
{
    static const int stop = BOS;
    uint32_t ids[MOST_TEXTS];
    dlm_limits limits = {0};
    dlm_sample_options how = {0};
    dlm_session *session;
    dlm_sampler *sm;
    limits.seqs = x->n, limits.slots = SLOTS, limits.cached = 1;
    limits.rows = x->n * (PROMPT + 2 * d->block);
    how.order = d->gamma <= 1.0f ? DLM_ORDER_THRESHOLD
        : l->task == STORIES ? DLM_ORDER_SEQUENTIAL : DLM_ORDER_CONFIDENCE;
    how.threshold = d->gamma > 1.0f ? 1.0f : d->gamma;
    how.block = d->block, how.temperature = d->temperature;
    how.ids = ids, how.seed = d->seed;
    how.left_first = l->task == STORIES;   /* a text is told from its left         */
    how.stop = &stop, how.n_stop = l->task == STORIES;
    for (int i = 0; i < x->n; i++) {
        ids[i] = first_id + (uint32_t)i;
        for (int k = x->prompt[i]; k < x->length[i]; k++)
            x->tokens[i * SLOTS + k] = m->config.mask_id;
    }
    bench_require(l->ctx, dlm_session_create(&session, l->ctx, m, &limits, NULL));
    bench_require(l->ctx, dlm_sampler_create(&sm, session, &how, NULL));
    bench_require(l->ctx, dlm_sampler_begin(sm, x->tokens, x->length, x->n));
    while (!dlm_sampler_done(sm)) bench_require(l->ctx, dlm_sampler_step(sm));
    for (int i = 0; i < x->n; i++) {
        int *steps = x->steps + i * SLOTS, last = 0, blocks;
        x->length[i] = dlm_sampler_length(sm, i);
        dlm_sampler_steps(sm, i, steps);
        for (int k = 0; k < x->length[i]; k++) if (steps[k] > last) last = steps[k];
        blocks = (x->length[i] - x->prompt[i] + d->block - 1) / d->block;
        t->tokens += x->length[i] - x->prompt[i];
        t->steps += last;
        t->passes += last + blocks;        /* as if every commit were a pass       */
    }
    {
        int forwards;
        double flops;
        dlm_sampler_cost(sm, &forwards, &flops);
        t->flops += flops;
    }
    dlm_sampler_free(sm);
    dlm_session_free(session);
}

/* --[ tasks ]-----------------------------------------------------------------  */

static dlm_address address(const lab *l, int what, uint32_t step, uint32_t row)
{
    dlm_address at = {0};
    at.seed = l->seed, at.purpose = (uint32_t)(TASK_RANDOM_USER + what);
    at.step = step, at.row = row;
    return at;
}

static void sudoku_text(const lab *l, texts *x, int i, task_part part, uint32_t number)
{
    task_example ex;
    task_sudoku_puzzle(&x->puzzle[i], &l->grids, part, 5 + (int)(number % 5), l->seed,
                       number);
    task_sudoku_example(&ex, &x->puzzle[i], TASK_DIRECT);
    memcpy(x->tokens + i * SLOTS, ex.tokens, (size_t)ex.length * sizeof(int));
    x->prompt[i] = ex.prompt;
    x->length[i] = ex.length;
}

/* The prompts of a round: sudoku with the solution behind them; stories BOS, half of
   them with up to 31 tokens of a text of the teacher. */
static void prompts(const lab *l, texts *x, uint32_t round)
{
    for (int i = 0; i < x->n; i++) {
        const dlm_address at = address(l, 0, round, (uint32_t)i);
        const int from = task_below(&at, 0, l->pool.n > 0 ? l->pool.n : 1);
        if (l->task == SUDOKU) {
            sudoku_text(l, x, i, TASK_TRAIN, round * (uint32_t)x->n + (uint32_t)i);
            continue;
        }
        x->length[i] = l->p->length;
        x->prompt[i] = dlm_uniform(&at, 1) < 0.5 ? 1 : 1 + task_below(&at, 2, PROMPT - 1);
        if (x->prompt[i] >= l->pool.length[from]) x->prompt[i] = 1;
        memcpy(x->tokens + i * SLOTS, l->pool.tokens + from * SLOTS,
               (size_t)x->prompt[i] * sizeof(int));
    }
}

static void teacher_writes(const lab *l, texts *x, uint32_t first_id, tally *t)
{
    decoding d = {0};
    d.gamma = 2.0f, d.temperature = 1.0f, d.block = 1, d.seed = l->seed + 1000;
    write_texts(l, l->teacher, &d, x, first_id, t);
}

static void train_teacher(lab *l)
{
    dlm_config cfg = {0};
    dlm_train_options how = {0};
    dlm_trainer *t;
    dlm_report r = {0};
    texts x = texts_new(32);
    cfg.vocab = TASK_SUDOKU_VOCAB, cfg.mask_id = TASK_MASK, cfg.max_seq = SLOTS;
    cfg.dim = l->p->teacher_dim, cfg.layers = 4, cfg.heads = 4;
    cfg.pattern = DLM_PATTERN_CAUSAL;
    bench_require(l->ctx, dlm_model_create(&l->teacher, l->ctx, &cfg, l->seed, NULL));
    how.lr = 2e-3f, how.warmup = 50, how.total = l->p->teacher_steps, how.seed = l->seed;
    how.schedule = DLM_SCHEDULE_COSINE, how.lr_min = 1e-5f;
    bench_require(l->ctx, dlm_trainer_create(&t, l->ctx, l->teacher, &how, NULL));
    for (int step = 0; step < l->p->teacher_steps; step++) {
        dlm_example ex[32] = {{0}};
        for (int i = 0; i < x.n; i++) {
            sudoku_text(l, &x, i, TASK_TRAIN, 0x40000000u + (uint32_t)(step * x.n + i));
            ex[i].tokens = x.tokens + i * SLOTS;
            ex[i].length = x.length[i], ex[i].prompt = x.prompt[i];
        }
        bench_require(l->ctx, dlm_trainer_step(t, ex, x.n, &r));
    }
    printf("# teacher  sudoku, %d parameters, %d steps, loss %.3f\n",
           (int)l->teacher->n_params, l->p->teacher_steps, r.loss);
    dlm_trainer_free(t);
    texts_free(&x);
}

/* The teacher, texts of its own for prompts and for infilling. */
static int lab_open(lab *l, const plan *p, dlm_ctx *ctx, int task, int seed,
                    const char *path)
{
    tally t = {0};
    memset(l, 0, sizeof *l);
    l->p = p, l->ctx = ctx, l->task = task, l->seed = (uint64_t)seed;
    task_grids_init(&l->grids);
    if (task == SUDOKU) {
        train_teacher(l);
    } else if (path == NULL || dlm_load(&l->teacher, NULL, ctx, path) != DLM_OK) {
        printf("# skipped  stories: %s\n", path ? dlm_last_error(ctx) : "no --model");
        return 0;
    }
    l->held = texts_new(p->n_eval[task]);
    if (task == SUDOKU) {
        for (int i = 0; i < l->held.n; i++)
            sudoku_text(l, &l->held, i, TASK_TEST, (uint32_t)i);
        return 1;
    }
    l->pool = texts_new(p->n_eval[STORIES] * 4);
    for (int k = 0; k < 2; k++) {
        texts *x = k ? &l->pool : &l->held;
        for (int i = 0; i < x->n; i++) {
            x->tokens[i * SLOTS] = BOS, x->prompt[i] = 1, x->length[i] = p->length;
        }
        teacher_writes(l, x, k ? 0x10000000u : 0x20000000u, &t);
    }
    return 1;
}

static void lab_close(lab *l)
{
    dlm_model_free(l->teacher);
    if (l->held.n > 0) texts_free(&l->held);
    if (l->pool.n > 0) texts_free(&l->pool);
}

/* --[ arms ]------------------------------------------------------------------  */

typedef struct course {                    /* an arm under way                     */
    const lab     *l;
    const arm     *a;
    dlm_model     *student;
    dlm_trainer   *trainer;
    dlm_distiller *distiller, *warm;       /* of the arm; with random masks        */
    texts          x, corpus;              /* corpus: for mix < 0                  */
    int            rounds;
    run           *r;
} course;

static void course_open(course *c)
{
    const lab *l = c->l;
    dlm_train_options how = {0};
    dlm_distill_options distil = {0};
    const int mask = l->task == SUDOKU ? TASK_MASK : DLM_NEW_TOKEN;
    bench_require(l->ctx, dlm_convert(&c->student, l->ctx, l->teacher, c->a->block, mask,
                                      !c->a->same, NULL));
    if (c->a->scratch) {
        const dlm_config cfg = c->student->config;
        dlm_model_free(c->student);
        bench_require(l->ctx, dlm_model_create(&c->student, l->ctx, &cfg, l->seed, NULL));
    }
    c->x = texts_new(l->p->texts);
    c->corpus = texts_new(l->p->texts);
    c->rounds = (int)(c->a->times * l->p->rounds[l->task]);
    if (c->rounds == 0) return;
    how.lr = (float)l->rate, how.lr_min = how.lr * 0.02f, how.seed = l->seed;
    how.schedule = DLM_SCHEDULE_COSINE;
    how.total = c->rounds * ((c->x.n + l->p->batch - 1) / l->p->batch);
    how.warmup = how.total > 80 ? 20 : how.total / 4;
    how.lift.no_time_scaling = c->a->flat;
    how.max_rows = 2 * SLOTS * l->p->batch;
    bench_require(l->ctx, dlm_trainer_create(&c->trainer, l->ctx, c->student, &how,
                                             NULL));
    distil.states = (dlm_states)c->a->states;
    distil.divergence.kind = (dlm_divergence_kind)c->a->kind;
    bench_require(l->ctx, dlm_distiller_create(&c->distiller, c->trainer, l->teacher,
                                               &distil, NULL));
    distil.states = DLM_STATES_RANDOM;
    distil.divergence.kind = DLM_FORWARD_KL;
    bench_require(l->ctx, dlm_distiller_create(&c->warm, c->trainer, l->teacher, &distil,
                                               NULL));
}

static void course_close(course *c)
{
    texts_free(&c->x);
    texts_free(&c->corpus);
    dlm_distiller_free(c->warm);
    dlm_distiller_free(c->distiller);
    dlm_trainer_free(c->trainer);
    dlm_model_free(c->student);
}

/* The curriculum of OPDLM: the longest text of round `round`, from start to end over
   `ramp` rounds along 1 - cos, in whole blocks, at least one. */
static int length_cap(int round, int ramp, int start, int end, int block)
{
    const double x = ramp > 0 ? fmin(1.0, (double)round / ramp) : 1.0;
    const double cap = start + (end - start) * (1.0 - cos(1.5707963267948966 * x));
    return (int)fmax(rint(cap / block), 1.0) * block;
}

/* Texts for a round; what writing them costs counts as rollout, whoever writes. */
static int course_texts(course *c, int round)
{
    const lab *l = c->l;
    const int warm = round < c->a->warm * c->rounds;
    const uint32_t first_id = (uint32_t)(round * c->x.n);
    decoding d = {0};
    tally t = {0};
    prompts(l, &c->x, (uint32_t)round);
    if (c->a->from == ROLLOUT && !warm) {
        d.gamma = 0.9f, d.temperature = 1.0f, d.block = c->a->block, d.seed = l->seed;
        for (int i = 0; i < c->x.n && l->task == STORIES; i++) {
            const int cap = length_cap(round, c->rounds / 5, PROMPT + 16, l->p->length,
                                       c->a->block);
            c->x.length[i] = cap < l->p->length ? cap : l->p->length;
        }
        write_texts(l, c->student, &d, &c->x, first_id, &t);
    } else if (c->a->from != CORPUS || l->task == STORIES) {
        teacher_writes(l, &c->x, first_id, &t);
    }
    if (c->a->mix < 0) {
        prompts(l, &c->corpus, (uint32_t)(round + c->rounds));
        if (l->task == STORIES) teacher_writes(l, &c->corpus, 0x30000000u + first_id, &t);
    }
    c->r->rollout_flops += t.flops;
    return warm;
}

static void course_round(course *c, int round)
{
    const int warm = course_texts(c, round), mix = abs(c->a->mix);
    dlm_report r;
    static dlm_example ex[MOST_TEXTS];
    for (int i = 0; i < c->x.n; i += c->l->p->batch) {
        int n = c->x.n - i < c->l->p->batch ? c->x.n - i : c->l->p->batch;
        const int mixed = mix && i / c->l->p->batch % mix == mix - 1;
        const texts *x = mixed && c->a->mix < 0 ? &c->corpus : &c->x;
        for (int k = 0; k < n; k++) {
            ex[k].tokens = x->tokens + (i + k) * SLOTS;
            ex[k].length = x->length[i + k], ex[k].prompt = x->prompt[i + k];
            ex[k].steps = x->steps + (i + k) * SLOTS;
        }
        if (c->a->ce || mixed)
            bench_require(c->l->ctx, dlm_trainer_step(c->trainer, ex, n, &r));
        else
            bench_require(c->l->ctx, dlm_distiller_step(warm ? c->warm : c->distiller, ex,
                                                        n, &r));
        c->r->tokens += (double)r.tokens;
        c->r->train_flops += r.flops;
        c->r->loss = r.loss;
    }
}

/* --[ measures ]--------------------------------------------------------------  */

/* Nats per token of the teacher, and the share of different pairs among all pairs. */
static double judge(const lab *l, const texts *x, double *distinct)
{
    const int V = l->teacher->config.vocab;
    unsigned char *seen = (unsigned char *)bench_alloc((size_t)V * (size_t)V, 1);
    double nats = 0.0, tokens = 0.0, pairs = 0.0, different = 0.0;
    dlm_limits limits = {0};
    dlm_session *s;
    limits.slots = SLOTS;
    bench_require(l->ctx, dlm_session_create(&s, l->ctx, l->teacher, &limits, NULL));
    for (int i = 0; i < x->n; i++) {
        const int *t = x->tokens + i * SLOTS;
        double log_p;
        if (x->length[i] <= x->prompt[i]) continue;
        bench_require(l->ctx, dlm_log_likelihood(s, t, x->length[i], x->prompt[i], 1, 0,
                                                 &log_p));
        nats -= log_p, tokens += x->length[i] - x->prompt[i];
        for (int k = x->prompt[i] + 1; k < x->length[i]; k++) {
            unsigned char *pair = &seen[t[k - 1] * V + t[k]];
            pairs++, different += *pair == 0;
            *pair = 1;
        }
    }
    *distinct = pairs > 0.0 ? different / pairs : 0.0;
    dlm_session_free(s);
    free(seen);
    return tokens > 0.0 ? nats / tokens : INFINITY;
}

static double exact(const texts *x)
{
    task_score sum = {0};
    for (int i = 0; i < x->n; i++) {
        char text[TASK_LENGTH + 32];
        task_sudoku_text(text, x->tokens + i * SLOTS + x->prompt[i], 16, TASK_DIRECT);
        task_sudoku_score(&sum, &x->puzzle[i], text);
    }
    return (double)sum.exact / x->n;
}

/* Decodes the evaluation prompts with each threshold. */
static void measure_decoding(const lab *l, const dlm_model *m, int block, run *r)
{
    for (int g = 0; g < GAMMAS; g++) {
        texts x = texts_new(l->p->n_eval[l->task]);
        decoding d = {0};
        tally t = {0};
        d.gamma = gammas[g], d.block = block, d.seed = l->seed + 2000;
        d.temperature = l->task == STORIES ? 1.0f : 0.0f;
        for (int i = 0; i < x.n; i++) {
            if (l->task == SUDOKU) {
                sudoku_text(l, &x, i, TASK_TEST, (uint32_t)i);
                continue;
            }
            x.tokens[i * SLOTS] = BOS, x.prompt[i] = 1, x.length[i] = l->p->length;
        }
        write_texts(l, m, &d, &x, 0, &t);
        r->per_step[g] = t.tokens / t.steps;
        r->per_pass[g] = t.tokens / t.passes;
        if (l->task == SUDOKU) r->quality[g] = exact(&x);
        else r->quality[g] = l->own - judge(l, &x, &r->distinct[g]);
        texts_free(&x);
        if (m == l->teacher) {             /* one token per step is all it can do  */
            r->per_pass[0] = 1.0;
            for (g++; g < GAMMAS; g++) {
                r->quality[g] = r->quality[0], r->distinct[g] = r->distinct[0];
                r->per_step[g] = r->per_pass[g] = 1.0;
            }
        }
    }
}

typedef struct infilling {                 /* one text, one token of each block masked */
    dlm_state *s;
    double     log_p[SLOTS];
} infilling;

static void infilling_score(void *user, int i, float *logits)
{
    infilling *f = (infilling *)user;
    const dlm_config *c = &f->s->config;
    float gold;
    if (c->mask_id < c->vocab) logits[c->mask_id] = -INFINITY;
    gold = logits[f->s->targets[i]];
    f->log_p[i] = (double)gold - dlm_log_sum_exp(f->s->ctx, logits, c->vocab, NULL);
}

/* Lays out one text; the teacher is asked for the same tokens from their left. */
static void infilling_layout(const lab *l, dlm_state *s, int block, int i)
{
    const texts *x = &l->held;
    dlm_example e = {0};
    e.tokens = x->tokens + i * SLOTS, e.length = x->length[i], e.prompt = x->prompt[i];
    bench_require(l->ctx, dlm_state_take(s, &e, 1, 1));
    dlm_state_noise(s, NULL);
    memset(s->masked, 0, (size_t)s->n_cells);
    memset(s->weight, 0, (size_t)s->n_cells * sizeof(float));
    for (int r = 0; r + block <= s->n_cells; r += block) {
        const dlm_address at = address(l, 1, (uint32_t)r, (uint32_t)i);
        const int j = r + 1 + task_below(&at, 0, block - 2);   /* seen from both sides */
        s->masked[j] = 1, s->weight[j] = 1;
    }
    bench_require(l->ctx, dlm_state_layout(s, 0));
}

/* Means over one token per block, neither its first nor its last.  Comparable among
   students of the same block. */
static void measure_infilling(const lab *l, const dlm_model *m, run *r)
{
    const int block = m == l->teacher ? 4 : m->config.block;
    infilling f;
    dlm_limits limits = {0};
    dlm_session *s;
    int total = 0;
    bench_require(l->ctx, dlm_state_create(&f.s, l->ctx, &m->config, DLM_OBJECTIVE_AUTO,
                                           2 * SLOTS, 1, NULL));
    limits.slots = limits.rows = 2 * SLOTS, limits.out = SLOTS;
    bench_require(l->ctx, dlm_session_create(&s, l->ctx, m, &limits, NULL));
    for (int i = 0; i < l->held.n; i++) {
        infilling_layout(l, f.s, block, i);
        bench_require(l->ctx, dlm_forward(s, &f.s->batch, infilling_score, &f));
        for (int k = 0; k < f.s->batch.n_out; k++) {
            r->gold += exp(f.log_p[k]), r->log_gold += f.log_p[k];
            total++;
        }
    }
    r->gold /= total, r->log_gold /= total;
    dlm_state_free(f.s);
    dlm_session_free(s);
}

static void show_run(const run *r)
{
    printf("%-8s seed %d %-11s %6.1f s %8.0f tokens loss %.3f | quality %7.4f, .9: %7.4f "
           "at %.2f | gold %.3f\n", task_names[r->task], r->seed, arm_name(r->arm),
           r->seconds, r->tokens, r->loss, r->quality[STATIC], r->quality[DYNAMIC],
           r->per_step[DYNAMIC], r->gold);
    fflush(stdout);
}

static void run_teacher(lab *l)
{
    run r = {0}, *known = find_run(l->task, (int)l->seed, ARMS);
    double distinct;
    if (l->task == STORIES) l->own = judge(l, &l->pool, &distinct);
    if (known) return;
    r.task = l->task, r.seed = (int)l->seed, r.arm = ARMS;
    measure_decoding(l, l->teacher, 1, &r);
    measure_infilling(l, l->teacher, &r);
    results_add(&r, l->p->name);
    show_run(&r);
}

static void run_arm(const lab *l, int i)
{
    run r = {0};
    course c = {0};
    const double begin = bench_now();
    r.task = l->task, r.seed = (int)l->seed, r.arm = i;
    c.l = l, c.a = &arms[i], c.r = &r;
    course_open(&c);
    for (int round = 0; round < c.rounds; round++) course_round(&c, round);
    measure_decoding(l, c.student, c.a->block, &r);
    measure_infilling(l, c.student, &r);
    r.seconds = bench_now() - begin;
    course_close(&c);
    results_add(&r, l->p->name);
    show_run(&r);
}

/* On stories there is no corpus but the teacher's texts: once through it is sft. */
static int wanted(const plan *p, int task, int i, const char *only)
{
    if (only) return strcmp(only, arms[i].name) == 0;
    return arms[i].level <= p->level && !(task == STORIES && strcmp(arms[i].name, "cpt")
                                          == 0);
}

/* --[ report ]----------------------------------------------------------------  */

typedef struct interval { double mean, half; int n; } interval;

typedef double (*number_fn)(const run *r, int g);
static double of_quality(const run *r, int g) { return r->quality[g]; }
static double of_per_step(const run *r, int g) { return r->per_step[g]; }
static double of_drop(const run *r, int g) { return r->quality[STATIC] - r->quality[g]; }
static double of_gold(const run *r, int g) { (void)g; return r->gold; }
static double of_log_gold(const run *r, int g) { (void)g; return r->log_gold; }
static double of_tokens(const run *r, int g) { (void)g; return r->tokens; }

static int arm_index(const char *name)
{
    int i = 0;
    while (i < ARMS && strcmp(arms[i].name, name) != 0) i++;
    return i;
}

/* 95 % t-interval of n numbers. */
static interval interval_of(const double *x, int n)
{
    static const double t[] = { 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306,
                                2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131 };
    interval v = {0};
    double square = 0.0;
    v.n = n;
    for (int i = 0; i < n; i++) v.mean += x[i] / n;
    for (int i = 0; i < n; i++) square += (x[i] - v.mean) * (x[i] - v.mean);
    v.half = n > 1 ? t[n - 2] * sqrt(square / (n - 1) / n) : INFINITY;
    return v;
}

/* Of arm a, or of a minus b where b >= 0, over the seeds that have both. */
static interval over_seeds(int task, int a, int b, number_fn f, int g)
{
    double x[MOST_SEEDS];
    int n = 0;
    for (int seed = 1; seed <= MOST_SEEDS; seed++) {
        const run *r = find_run(task, seed, a), *q = b < 0 ? r : find_run(task, seed, b);
        if (r && q) x[n++] = f(r, g) - (b < 0 ? 0.0 : f(q, g));
    }
    return interval_of(x, n);
}

static double mean_of(int task, int a, number_fn f, int g)
{
    return over_seeds(task, a, -1, f, g).mean;
}

static void print_arms(int task)
{
    printf("\n%s: means over seeds; quality is %s\n", task_names[task],
           task == SUDOKU ? "exact grids" : "minus excess nats per token");
    printf("%-12s %2s %9s | %8s %8s %8s | %5s %5s %5s | %6s %7s | %7s %7s\n", "arm", "n",
           "tokens", "quality", "at .9", "at .8", "t/st", ".8", "t/pas", "dist-2",
           "gold", "TFLOP", "rollout");
    for (int i = ARMS; i >= 0; i = i == ARMS ? 0 : i + 1 < ARMS ? i + 1 : -1) {
        double tflop[2] = {0}, distinct = 0.0, per_pass = 0.0;
        int n = 0;
        for (int seed = 1; seed <= MOST_SEEDS; seed++) {
            const run *r = find_run(task, seed, i);
            if (r == NULL) continue;
            tflop[0] += r->train_flops * 1e-12, tflop[1] += r->rollout_flops * 1e-12;
            distinct += r->distinct[STATIC], per_pass += r->per_pass[DYNAMIC];
            n++;
        }
        if (n == 0) continue;
        printf("%-12s %2d %9.0f | %8.4f %8.4f %8.4f | %5.2f %5.2f %5.2f | %6.3f %7.3f | "
               "%7.3f %7.3f\n", arm_name(i), n, mean_of(task, i, of_tokens, 0),
               mean_of(task, i, of_quality, STATIC),
               mean_of(task, i, of_quality, DYNAMIC),
               mean_of(task, i, of_quality, GAMMAS - 1),
               mean_of(task, i, of_per_step, DYNAMIC),
               mean_of(task, i, of_per_step, GAMMAS - 1), per_pass / n, distinct / n,
               mean_of(task, i, of_gold, 0), tflop[0] / n, tflop[1] / n);
    }
}

static interval print_difference(const char *what, int task, const char *a, const char *b,
                                 number_fn f, int g)
{
    const interval v = over_seeds(task, arm_index(a), arm_index(b), f, g);
    if (v.n > 0)
        printf("  %-34s %8.2f +- %.2f (%d seeds)\n", what, 100.0 * v.mean, 100.0 * v.half,
               v.n);
    return v;
}

static void verdict(const char *id, int known, int yes, const char *claim)
{
    printf("  %-5s %-14s %s\n", id, !known ? "not run" : yes ? "reproduced"
           : "not reproduced", claim);
}

/* EO2: where the continued-training arms reach opdlm's quality, by interpolation in the
   logarithm of the tokens, per seed; beyond the longest arm: that arm's tokens. */
static double token_ratio(int task, int seed, int *censored)
{
    static const char *const names[] = { "sft", "cpt", "cpt_x3", "cpt_x5", "cpt_x15" };
    const run *opdlm = find_run(task, seed, arm_index("opdlm")), *last = NULL;
    for (size_t i = task == SUDOKU; opdlm && i < sizeof names / sizeof *names; i++) {
        const run *r = find_run(task, seed, arm_index(names[i]));
        const double want = opdlm->quality[STATIC];
        if (r == NULL) continue;
        if (r->quality[STATIC] >= want) {
            double u = 1.0;
            if (last) u = (want - last->quality[STATIC])
                        / (r->quality[STATIC] - last->quality[STATIC]);
            return (last ? exp(log(last->tokens) + u * log(r->tokens / last->tokens))
                         : r->tokens) / opdlm->tokens;
        }
        last = r;
    }
    *censored = 1;
    return last ? last->tokens / opdlm->tokens : 0.0;
}

static void verdict_tokens(int task)
{
    double x[MOST_SEEDS];
    int n = 0, censored = 0;
    interval v;
    for (int seed = 1; seed <= MOST_SEEDS; seed++) {
        const double ratio = token_ratio(task, seed, &censored);
        if (ratio > 0.0) x[n++] = log(ratio);
    }
    v = interval_of(x, n);
    if (n > 0)
        printf("  tokens of continued training / opdlm's: %s%.2f, interval %.2f .. %.2f "
               "(%d seeds)\n", censored ? "at least " : "", exp(v.mean),
               exp(v.mean - v.half), exp(v.mean + v.half), n);
    verdict("EO2", n > 1, n > 1 && exp(v.mean - v.half) > 3.0,
            "continued training needs more than 3 times the tokens");
}

static void verdict_arms(int task)
{
    const interval data = print_difference("student's - teacher's texts", task,
                                           "opdlm_off", "off_policy", of_quality, STATIC);
    const interval states = print_difference("trajectory - random masks", task, "opdlm",
                                             "opdlm_off", of_quality, STATIC);
    const double margin = task == SUDOKU ? 0.02 : 0.05;
    interval drop;
    print_difference("opdlm - sft", task, "opdlm", "sft", of_quality, STATIC);
    drop = print_difference("drop at .9, opdlm - sft", task, "opdlm", "sft", of_drop,
                            DYNAMIC);
    verdict("EO3", data.n > 1, data.mean - data.half > 0.0
            && fabs(states.mean) < data.mean, "whose texts matters most");
    verdict("EO4", states.n > 1, fabs(states.mean) + states.half < margin,
            "trajectory and random masks are equivalent");
    verdict("EO5", drop.n > 1, drop.mean + drop.half < 0.0,
            "less is lost under threshold .9 than after SFT");
}

static void verdict_blocks(int task)
{
    static const char *const names[] = { "opdlm", "opdlm_b8", "opdlm_b16" };
    int known = 1, yes = 1;
    printf("  block x threshold: quality / tokens per step\n");
    for (int k = 0; k < 3; k++) {
        const int a = arm_index(names[k]);
        known &= over_seeds(task, a, -1, of_quality, 0).n > 0;
        if (!known) break;
        printf("  %-10s", names[k]);
        for (int g = 0; g < GAMMAS; g++)
            printf("  %8.4f / %5.2f", mean_of(task, a, of_quality, g),
                   mean_of(task, a, of_per_step, g));
        printf("\n");
        for (int g = 1; g < GAMMAS && k > 0; g++) {
            const int b = arm_index(names[k - 1]);
            yes &= mean_of(task, a, of_per_step, g) > mean_of(task, b, of_per_step, g)
                && mean_of(task, a, of_quality, g) < mean_of(task, b, of_quality, g);
        }
    }
    verdict("EO6", known, yes, "larger blocks: more tokens per step, lower quality");
}

static void verdict_right(int task)
{
    const interval same = over_seeds(task, arm_index("opdlm"), ARMS, of_log_gold, 0);
    const interval sft = over_seeds(task, arm_index("sft"), ARMS, of_log_gold, 0);
    printf("  log p(gold) of an infilling, above the left-only teacher's: opdlm %.3f +- "
           "%.3f, sft %.3f +- %.3f", same.mean, same.half, sft.mean, sft.half);
    for (int i = 0; i < 2; i++) {
        const char *name = i ? "opdlm_both" : "opdlm_mix";
        const interval v = over_seeds(task, arm_index(name), ARMS, of_log_gold, 0);
        if (v.n > 0) printf(", %s %.3f +- %.3f", name, v.mean, v.half);
    }
    printf("\n");
    verdict("EO7", same.n > 1 && sft.n > 1, same.mean < 0.1 && sft.mean - sft.half
            > same.mean + same.half, "the student is blind to its right, SFT is not");
}

static void report(void)
{
    for (int task = 0; task < TASKS; task++) {
        interval rate;
        double teacher;
        if (over_seeds(task, arm_index("opdlm"), -1, of_quality, 0).n == 0) continue;
        print_arms(task);
        printf("\n%s: verdicts (points or hundredths of a nat)\n", task_names[task]);
        teacher = mean_of(task, ARMS, of_quality, STATIC);
        rate = over_seeds(task, arm_index("opdlm"), -1, of_quality, STATIC);
        if (task == SUDOKU)
            printf("  accuracy: opdlm %.3f, _x4 %.3f, teacher %.3f, untouched %.3f\n",
                   rate.mean,
                   mean_of(task, arm_index("opdlm_x4"), of_quality, STATIC), teacher,
                   mean_of(task, arm_index("untouched"), of_quality, STATIC));
        if (task == SUDOKU)
            verdict("EO1", rate.n > 1, rate.mean >= 0.9 * teacher
                    && mean_of(task, arm_index("untouched"), of_quality, STATIC)
                       < 0.5 * rate.mean, "at least 90 % of the teacher's accuracy");
        verdict_tokens(task);
        verdict_arms(task);
        verdict_blocks(task);
        verdict_right(task);
    }
}

/* --[ main ]------------------------------------------------------------------  */

typedef struct request {
    const plan *p;
    int         first, last, only_report;
    const char *out, *model, *only, *arm;
    double      rate;                      /* 0: the plan's                        */
} request;

static const char usage[] =
    "bench_opd [smoke|short|full] [--out FILE] [--seeds A-B] [--model FILE]\n"
    "                 [--only sudoku|stories] [--arm NAME] [--rate LR]\n"
    "       bench_opd report FILE...";

/* 0: a value that is none of its option's. */
static int sensible(const request *q)
{
    int task = q->only == NULL;
    for (int i = 0; i < TASKS && !task; i++) task = !strcmp(q->only, task_names[i]);
    return task && (q->arm == NULL || arm_index(q->arm) < ARMS) && q->first >= 1
        && q->last <= MOST_SEEDS && q->first <= q->last;
}

static void read_request(request *q, int argc, char **argv)
{
    memset(q, 0, sizeof *q);
    q->p = &plans[1];
    for (int i = 1; i < argc; i++) {
        const int more = i + 1 < argc;
        int tier = -1;
        for (int k = 0; k < 3; k++) if (strcmp(argv[i], plans[k].name) == 0) tier = k;
        if (strcmp(argv[i], "--quick") == 0) tier = 0;
        if (tier >= 0) q->p = &plans[tier];
        else if (more && strcmp(argv[i], "report") == 0) q->only_report = i + 1, i = argc;
        else if (more && strcmp(argv[i], "--out") == 0) q->out = argv[++i];
        else if (more && strcmp(argv[i], "--model") == 0) q->model = argv[++i];
        else if (more && strcmp(argv[i], "--only") == 0) q->only = argv[++i];
        else if (more && strcmp(argv[i], "--arm") == 0) q->arm = argv[++i];
        else if (more && strcmp(argv[i], "--rate") == 0
                 && (q->rate = atof(argv[i + 1])) > 0.0) i++;
        else if (more && strcmp(argv[i], "--seeds") == 0
                 && sscanf(argv[i + 1], "%d-%d", &q->first, &q->last) == 2) i++;
        else bench_usage(usage, argv[i]);
    }
    if (q->first == 0) q->first = 1, q->last = q->p->seeds;
    if (!sensible(q)) bench_usage(usage, NULL);
    if (q->model) bench_readable(q->model);
}

static void run_seed(const request *q, dlm_ctx *ctx, int task, int seed)
{
    lab l;
    if (lab_open(&l, q->p, ctx, task, seed, q->model)) {
        l.rate = q->rate > 0.0 ? q->rate : q->p->rate[task];
        run_teacher(&l);
        for (int i = 0; i < ARMS; i++)
            if (wanted(q->p, task, i, q->arm) && !find_run(task, seed, i))
                run_arm(&l, i);
    }
    lab_close(&l);
}

static void check_smoke(void)
{
    static const int caps[][2] = {         /* published: 100 to 4000 in 100 rounds */
        { 0, 100 }, { 1, 100 }, { 10, 148 }, { 20, 292 }, { 30, 524 }, { 50, 1244 },
        { 70, 2228 }, { 90, 3388 }, { 100, 4000 }, { 101, 4000 }, { 9999, 4000 }
    };
    for (size_t i = 0; i < sizeof caps / sizeof *caps; i++)
        check(length_cap(caps[i][0], 100, 100, 4000, 4) == caps[i][1], "the curriculum");
    check(length_cap(0, 10, 1, 64, 8) == 8, "a block at least");
    check(length_cap(3, 0, 8, 64, 4) == 64, "no ramp");
    for (int task = 0; task < TASKS; task++) {
        const run *r = find_run(task, 1, arm_index("opdlm"));
        const run *teacher = find_run(task, 1, ARMS);
        if (r == NULL || teacher == NULL) continue;
        check(isfinite(r->loss) && r->loss >= 0.0, "the divergence is finite");
        check(r->per_step[STATIC] == 1.0, "one token per step without a threshold");
        check(r->per_step[GAMMAS - 1] >= 1.0, "at least one with a threshold");
        check(r->rollout_flops > 0.0 && r->train_flops > r->rollout_flops / 10.0,
              "both costs are counted");
        check(teacher->gold > 0.0 && teacher->gold <= 1.0, "a probability");
    }
}

int main(int argc, char **argv)
{
    request q;
    dlm_ctx *ctx;
    read_request(&q, argc, argv);
    if (q.only_report) {
        for (int k = 2; k >= 0 && results.n == 0; k--)   /* the largest tier there is */
            for (int i = q.only_report; i < argc; i++) {
                bench_readable(argv[i]);
                results_load(argv[i], plans[k].name);
            }
        report();
        return 0;
    }
    ctx = bench_ctx(DLM_ISA_AUTO, 1);
    printf("# bench_opd %s, seeds %d-%d, isa %s, 1 thread\n", q.p->name, q.first, q.last,
           dlm_isa_name(dlm_active_isa(ctx)));
    if (q.out) results_open(q.out, q.p->name, dlm_isa_name(dlm_active_isa(ctx)));
    for (int seed = q.first; seed <= q.last; seed++)
        for (int task = 0; task < TASKS; task++)
            if (q.only == NULL || strcmp(q.only, task_names[task]) == 0)
                run_seed(&q, ctx, task, seed);
    report();
    if (q.p->level == 0) check_smoke();
    if (results.file) fclose(results.file);
    dlm_shutdown(ctx);
    return failures > 0;
}
