/* solver.h - what sudoku and countdown share: a model that learns one task, first plainly
   and then with LIFT, its file, and a sampler for many problems at a time.  Include after
   dlm.h, bench.h and tasks.h. */
#ifndef SOLVER_H
#define SOLVER_H

enum { SOLVER_SEQS = 64 };                 /* problems of a step, and of a forward */

typedef struct solver_task {
    const char *name;                      /* the program's                        */
    int vocab, length;                     /* tokens there are; of a problem       */
    int base_steps, lift_steps, report;    /* of training; between progress lines  */
    /* Training example `number`, a function of (seed, number). */
    void (*example)(task_example *ex, uint64_t seed, uint32_t number);
    /* The share of the validation problems that is solved. */
    double (*validate)(dlm_ctx *ctx, const dlm_model *m);
} solver_task;

typedef struct solver {
    dlm_session *session;
    dlm_sampler *sampler;
    dlm_ctx     *ctx;
    int          canvas[SOLVER_SEQS * TASK_LENGTH];      /* rows of task->length   */
} solver;

static void solver_fail(const solver_task *task, const char *what, const char *detail)
{
    fprintf(stderr, "%s: %s%s\n", task->name, what, detail);
    exit(1);
}

/* Is this the command, with as many arguments as it takes? */
static int solver_command(int argc, char **argv, const char *name, int least, int most)
{
    return argc - 2 >= least && argc - 2 <= most && strcmp(argv[1], name) == 0;
}

/* Argument i, if it is there. */
static uint64_t solver_seed(int argc, char **argv, int i)
{
    return argc > i ? (uint64_t)bench_number("SEED", argv[i], 0, LONG_MAX) : 1;
}

/* The next line that is not blank, without its end and a byte order mark; 0 at the end
   of the file.  *line counts all of them. */
static int solver_line(const solver_task *task, FILE *f, char *text, size_t size,
                       int *line)
{
    do {
        if (fgets(text, (int)size, f) == NULL) {
            if (ferror(f)) solver_fail(task, "the file cannot be read", "");
            return 0;
        }
        if (strlen(text) + 1 == size && text[size - 2] != '\n')
            solver_fail(task, "too long a line: ", text);
        text[strcspn(text, "\r\n")] = 0;
        if (++*line == 1 && memcmp(text, "\xEF\xBB\xBF", 3) == 0)
            memmove(text, text + 3, strlen(text + 3) + 1);
    } while (text[strspn(text, " ")] == 0);
    return 1;
}

/* A line is not what it should be. */
static void solver_refuse(const solver_task *task, int line, const char *wanted,
                          const char *text)
{
    char found[128];
    snprintf(found, sizeof found, "%d: not %s but: %.60s", line, wanted, text);
    solver_fail(task, "line ", found);
}

static void solver_open(solver *s, const solver_task *task, dlm_ctx *ctx,
                        const dlm_model *m)
{
    dlm_limits limits = {0};
    limits.seqs = SOLVER_SEQS, limits.slots = task->length;
    s->ctx = ctx;
    bench_require(ctx, dlm_session_create(&s->session, ctx, m, &limits, NULL));
    bench_require(ctx, dlm_sampler_create(&s->sampler, s->session, NULL, NULL));
}

static void solver_close(solver *s)
{
    dlm_sampler_free(s->sampler);
    dlm_session_free(s->session);
}

/* how->total steps of one method with a schedule of its own, numbered from first. */
static void solver_learn(const solver_task *task, dlm_ctx *ctx, dlm_model *m,
                         const dlm_train_options *how, int first, double started)
{
    static task_example examples[SOLVER_SEQS];
    const int all = task->base_steps + task->lift_steps;
    const char *const method = how->lift.method ? "LIFT" : "base";
    dlm_trainer *t;
    double loss = 0.0;
    bench_require(ctx, dlm_trainer_create(&t, ctx, m, how, NULL));
    for (int done = first + 1; done <= first + how->total; done++) {
        dlm_example batch[SOLVER_SEQS] = {{0}};
        dlm_report r;
        for (int i = 0; i < SOLVER_SEQS; i++) {
            task->example(&examples[i], how->seed, (uint32_t)(done * SOLVER_SEQS + i));
            batch[i].tokens = examples[i].tokens;
            batch[i].length = examples[i].length, batch[i].prompt = examples[i].prompt;
        }
        bench_require(ctx, dlm_trainer_step(t, batch, SOLVER_SEQS, &r));
        loss += r.loss;
        if ((done - first) % task->report != 0) continue;
        const double spent = bench_now() - started;
        printf("%s step %5d of %d  loss %.3f  validation %.3f  %.0f s, %.0f s left\n",
               method, done, all, loss / task->report, task->validate(ctx, m), spent,
               spent / done * (all - done));
        fflush(stdout);
        loss = 0.0;
    }
    dlm_trainer_free(t);
}

static dlm_model *solver_load(const solver_task *task, dlm_ctx *ctx, const char *path)
{
    dlm_model *m;
    bench_require(ctx, dlm_load(&m, NULL, ctx, path));
    if (m->config.vocab != task->vocab || m->config.mask_id != TASK_MASK
        || m->config.max_seq < task->length || m->config.pattern != DLM_PATTERN_FULL)
        solver_fail(task, "not one of its models: ", path);
    return m;
}

#endif /* SOLVER_H */
