/* countdown.c - a diffusion model that learns Countdown with three numbers: make the
   target from them with + - * and /, each used once.

     countdown train MODEL.safetensors [SEED]     about ten minutes on two cores
     countdown eval  MODEL.safetensors FILE.jsonl     last line: correct= n=
     countdown show  MODEL.safetensors 30,100,93 23   step by step
     countdown gen   FILE.jsonl [COUNT [SEED]]    unseen triples of numbers, 1000

   A line of a file is {"input":"30,100,93","output":"23"}.  Numbers and targets go from
   1 to 100, every number is one token, and the response is two steps,
   "30 - 7 = 23 ; 23 + 2 = 25 .", scored as the expression (30 - 7) + 2.  The numbers are
   sorted before the model sees them, since their order carries nothing.

   Two things let a small model calculate: the embeddings of the numbers start as
   sines and cosines of the number, so that sums are rotations from the first step on;
   and training masks at least 30 % of the response, because what is hard is to choose
   the operations, with nothing but the prompt to see. */
#define _POSIX_C_SOURCE 200112L            /* clock_gettime, isatty under -std=c99   */
#define DLM_IMPLEMENTATION
#include "dlm.h"
#include "bench.h"
#include "tasks.h"
#include "solver.h"
#include <unistd.h>

enum {
    THREADS = 2, DIM = 128, LAYERS = 3, HEADS = 4, FFN = 384,
    LENGTH = TASK_COUNTDOWN_LENGTH, PROMPT = TASK_COUNTDOWN_PROMPT,
    BATCH = SOLVER_SEQS,
    BASE_STEPS = 3000, LIFT_STEPS = 1000, REPORT = 100,
    CHECKS = 512                           /* validation problems while training   */
};

static void train_example(task_example *ex, uint64_t seed, uint32_t number);
static double validate(dlm_ctx *ctx, const dlm_model *m);
static solver_task task = {
    "countdown", 0 /* main says */, LENGTH, BASE_STEPS, LIFT_STEPS, REPORT,
    train_example, validate
};

static void fail(const char *what, const char *detail)
{
    solver_fail(&task, what, detail);
}

/* --[ solving ]------------------------------------------------------------- */

/* Prompt and, where there is one, the response to learn. */
static void make_example(task_example *ex, const task_problem *p)
{
    task_problem sorted = *p;
    task_sort3(sorted.numbers);
    task_countdown_example(ex, &sorted, task_countdown_large);
}

/* Fills in the responses to n <= BATCH problems. */
static void solve(solver *s, const task_problem *problems, int n)
{
    int lengths[BATCH];
    for (int i = 0; i < n; i++) {
        int *const row = s->canvas + i * LENGTH;
        task_example ex;
        make_example(&ex, &problems[i]);
        for (int k = 0; k < LENGTH; k++) row[k] = k < PROMPT ? ex.tokens[k] : TASK_MASK;
        lengths[i] = LENGTH;
    }
    bench_require(s->ctx, dlm_sampler_begin(s->sampler, s->canvas, lengths, n));
    while (!dlm_sampler_done(s->sampler))
        bench_require(s->ctx, dlm_sampler_step(s->sampler));
}

/* How many of them are right. */
static int solve_and_score(solver *s, const task_problem *problems, int n)
{
    int right = 0;
    char text[96];
    solve(s, problems, n);
    for (int i = 0; i < n; i++) {
        task_countdown_text(text, s->canvas + i * LENGTH + PROMPT);
        right += task_countdown_score(text, problems[i].numbers, 3, problems[i].target);
    }
    return right;
}

/* --[ train ]--------------------------------------------------------------- */

/* Number n starts as the sines and cosines of 2 pi n / period, periods from 2 to 500,
   as large as the random values they replace. */
static void init_numbers(dlm_model *m)
{
    const double scale = 0.02 * sqrt(2.0), longest = 500.0;
    dlm_tensor t;
    dlm_model_tensor(m, 0, &t);            /* the embedding, which is the head too */
    for (int n = 0; TASK_NUMBER + n < t.rows; n++) {
        float *const row = t.data + (size_t)(TASK_NUMBER + n) * (size_t)t.cols;
        for (int k = 0; k < t.cols / 2; k++) {
            const double share = (double)k / (t.cols / 2 - 1);
            const double angle = 2.0 * acos(-1.0) * n / (2.0 * pow(longest / 2.0, share));
            row[2 * k] = (float)(scale * cos(angle));
            row[2 * k + 1] = (float)(scale * sin(angle));
        }
    }
}

static void train_example(task_example *ex, uint64_t seed, uint32_t number)
{
    task_problem p;
    task_countdown_problem(&p, task_countdown_large, TASK_TRAIN, seed, number);
    make_example(ex, &p);
}

/* The fraction of validation problems solved; their triples are never trained on. */
static double validate(dlm_ctx *ctx, const dlm_model *m)
{
    solver s;
    task_problem problems[BATCH];
    int right = 0;
    solver_open(&s, &task, ctx, m);
    for (int first = 0; first < CHECKS; first += BATCH) {
        for (int i = 0; i < BATCH; i++)
            task_countdown_problem(&problems[i], task_countdown_large, TASK_VALIDATION, 0,
                                   (uint32_t)(first + i));
        right += solve_and_score(&s, problems, BATCH);
    }
    solver_close(&s);
    return (double)right / CHECKS;
}

static void train(dlm_ctx *ctx, const char *path, uint64_t seed)
{
    dlm_config cfg = {0};
    dlm_train_options how = {0};
    dlm_model *m;
    const double started = bench_now();
    bench_writable(path);
    cfg.vocab = task.vocab, cfg.mask_id = TASK_MASK;
    cfg.dim = DIM, cfg.layers = LAYERS, cfg.heads = HEADS, cfg.ffn = FFN;
    cfg.max_seq = LENGTH, cfg.pattern = DLM_PATTERN_FULL;
    bench_require(ctx, dlm_model_create(&m, ctx, &cfg, seed, NULL));
    init_numbers(m);
    printf("%d parameters\n", (int)m->n_params);

    how.max_rows = BATCH * LENGTH, how.seed = seed, how.weight_decay = 0.01f;
    how.schedule = DLM_SCHEDULE_COSINE, how.warmup = 100;
    how.lr = 3e-3f, how.lr_min = 3e-4f, how.total = BASE_STEPS;
    how.level_min = 0.3f, how.level_max = 1.0f;
    solver_learn(&task, ctx, m, &how, 0, started);

    how.lr = 1e-3f, how.lr_min = 1e-5f, how.total = LIFT_STEPS;
    how.lift.method = DLM_METHOD_LIFT3;
    solver_learn(&task, ctx, m, &how, BASE_STEPS, started);

    bench_require(ctx, dlm_save(ctx, path, m, NULL));
    printf("saved %s\n", path);
    dlm_model_free(m);
}

/* --[ files ]--------------------------------------------------------------- */

/* Three whole numbers with a comma or a space between them, and nothing else up to the
   end, which is a zero or a quote; returns the end, or NULL. */
static const char *read_numbers(int numbers[3], const char *text)
{
    for (int i = 0; i < 3; i++) {
        const char *const from = text;
        char *end;
        long value;
        text += strspn(text, " ");
        if (i > 0 && *text == ',') text++;
        text += strspn(text, " ");
        if ((i > 0 && text == from) || !isdigit((unsigned char)*text)) return NULL;
        value = strtol(text, &end, 10);
        if (value > 1000000) return NULL;
        numbers[i] = (int)value;
        text = end;
    }
    text += strspn(text, " ");
    return *text == 0 || *text == '"' ? text : NULL;
}

/* A whole number, and nothing else up to the end, a zero or one of the characters of
   `ends`; returns the end, or NULL. */
static const char *read_target(int *target, const char *text, const char *ends)
{
    char *end;
    const long value = strtol(text, &end, 10);
    if (end == text || value <= -1000000 || value >= 1000000) return NULL;
    *target = (int)value;
    while (*end == ' ') end++;
    return *end == 0 || strchr(ends, *end) != NULL ? end : NULL;
}

/* What stands after "key":, or NULL. */
static const char *find_value(const char *text, const char *key)
{
    char quoted[32];
    snprintf(quoted, sizeof quoted, "\"%s\"", key);
    text = strstr(text, quoted);
    if (text == NULL) return NULL;
    text += strlen(quoted);
    text += strspn(text, " ");
    return *text == ':' ? text + 1 + strspn(text + 1, " ") : NULL;
}

/* Of a line; 0 if it is none.  Numbers are a string, a target may be a plain number. */
static int parse_problem(task_problem *p, const char *text)
{
    const char *input = find_value(text, "input"), *output = find_value(text, "output");
    if (input == NULL || output == NULL || *input != '"') return 0;
    input = read_numbers(p->numbers, input + 1);
    if (input == NULL || *input != '"') return 0;
    if (*output != '"') return read_target(&p->target, output, ",}") != NULL;
    output = read_target(&p->target, output + 1, "\"");
    return output != NULL && *output == '"';
}

/* 1 and a problem, or 0 at the end of the file. */
static int read_problem(FILE *f, task_problem *p, int *line)
{
    char text[1024];
    if (!solver_line(&task, f, text, sizeof text, line)) return 0;
    if (!parse_problem(p, text))
        solver_refuse(&task, *line, "{\"input\":\"30,100,93\",\"output\":\"23\"}", text);
    return 1;
}

/* Has every number a token?  What has none is scored as not solved. */
static int in_range(const task_problem *p)
{
    const task_variant v = task_countdown_large;
    int good = p->target >= 1 && p->target <= v.largest_target;
    for (int i = 0; i < 3; i++)
        good = good && p->numbers[i] >= 1 && p->numbers[i] <= v.largest;
    return good;
}

/* --[ eval ]---------------------------------------------------------------- */

static void eval(dlm_ctx *ctx, const char *model_path, const char *path)
{
    dlm_model *const m = solver_load(&task, ctx, model_path);
    FILE *const f = fopen(path, "rb");
    task_problem problems[BATCH];
    solver s;
    double guess = 0.0, guess_sum = 0.0;
    long right = 0, total = 0, foreign = 0;
    int n = 0, line = 0, more = 1;
    if (f == NULL) fail("cannot open ", path);
    solver_open(&s, &task, ctx, m);
    while (more) {
        task_problem *const p = &problems[n];
        more = read_problem(f, p, &line);
        if (more) {
            total++;
            guess += task_countdown_floor(p, 4);
            guess_sum += task_countdown_floor(p, 2);
            if (in_range(p)) n++;
            else foreign++;
        }
        if (n == 0 || (more && n < BATCH)) continue;
        right += solve_and_score(&s, problems, n);
        n = 0;
    }
    fclose(f);
    solver_close(&s);
    dlm_model_free(m);
    if (total == 0) fail("no problems in ", path);
    if (foreign > 0) printf("%ld with numbers beyond 1..100, not solved\n", foreign);
    printf("guessing is right with a random expression %.4f, with a random +- %.4f\n",
           guess / (double)total, guess_sum / (double)total);
    printf("correct=%.4f n=%ld\n", (double)right / (double)total, total);
}

/* --[ show ]---------------------------------------------------------------- */

static int colours;

static void show_token(int token)
{
    static const char signs[] = "+-*/=;.";
    if (token == TASK_MASK) printf("   _");
    else if (token >= TASK_NUMBER) printf("%4d", token - TASK_NUMBER);
    else if (token >= TASK_PLUS && token <= TASK_END)
        printf("%4c", signs[token - TASK_PLUS]);
    else printf("   ?");
}

/* The prompt in another colour, then the response after so many of its events. */
static void show_state(const int *canvas, const dlm_event *events, int n)
{
    const int newest = n > 0 ? events[n - 1].position : -1;
    int row[LENGTH];
    for (int k = 0; k < LENGTH; k++) row[k] = k < PROMPT ? canvas[k] : TASK_MASK;
    for (int e = 0; e < n; e++) row[events[e].position] = events[e].token;
    if (colours) printf("\033[36m");
    for (int k = 1; k < PROMPT - 1; k++) show_token(row[k]);
    printf(colours ? "\033[0m  |" : "  |");
    for (int k = PROMPT; k < LENGTH; k++) {
        if (colours && k == newest) printf("\033[1;32m");
        show_token(row[k]);
        if (colours && k == newest) printf("\033[0m");
    }
    if (n > 0) printf("   %5.1f %% sure", 100.0 * (double)events[n - 1].confidence);
    printf("\n");
}

static void show(dlm_ctx *ctx, const char *model_path, const char *numbers,
                 const char *target)
{
    dlm_model *const m = solver_load(&task, ctx, model_path);
    task_problem p = {{0}, 0};
    solver s;
    const dlm_event *events;
    const char *end;
    char text[96], expression[96];
    int n;
    end = read_numbers(p.numbers, numbers);
    if (end == NULL || *end != 0) fail("not three whole numbers: ", numbers);
    if (!read_target(&p.target, target, "")) fail("not a whole number: ", target);
    if (!in_range(&p)) fail("numbers and targets go from 1 to 100", "");
    colours = isatty(fileno(stdout)) && getenv("NO_COLOR") == NULL;
    solver_open(&s, &task, ctx, m);
    solve(&s, &p, 1);
    events = dlm_sampler_trace(s.sampler, &n);
    for (int e = 0; e <= n; e++) show_state(s.canvas, events, e);
    task_countdown_text(text, s.canvas + PROMPT);
    task_countdown_parse(expression, sizeof expression, text);
    printf("\n%s: %s\n", expression,
           task_countdown_score(text, p.numbers, 3, p.target) ? "right" : "wrong");
    solver_close(&s);
    dlm_model_free(m);
}

/* --[ gen ]----------------------------------------------------------------- */

static void gen(const char *path, int count, uint64_t seed)
{
    FILE *const f = fopen(path, "wb");
    if (f == NULL) fail("cannot write ", path);
    for (int k = 0; k < count; k++) {
        task_problem p;
        task_countdown_problem(&p, task_countdown_large, TASK_TEST, seed, (uint32_t)k);
        fprintf(f, "{\"input\":\"%d,%d,%d\",\"output\":\"%d\"}\n", p.numbers[0],
                p.numbers[1], p.numbers[2], p.target);
    }
    if (fclose(f) != 0) fail("cannot write ", path);
}

int main(int argc, char **argv)
{
    static const char usage[] =
        "countdown train MODEL [SEED]\n"
        "       countdown eval  MODEL FILE.jsonl\n"
        "       countdown show  MODEL 30,100,93 23\n"
        "       countdown gen   FILE.jsonl [COUNT [SEED]]";
    const int training = solver_command(argc, argv, "train", 1, 2);
    const int evaluating = solver_command(argc, argv, "eval", 2, 2);
    const int showing = solver_command(argc, argv, "show", 3, 3);
    const int generating = solver_command(argc, argv, "gen", 1, 3);
    dlm_ctx *ctx;
    if (!training && !evaluating && !showing && !generating)
        bench_usage(usage, argc == 2 ? argv[1] : NULL);
    ctx = bench_ctx(DLM_ISA_AUTO, THREADS);
    task.vocab = task_countdown_vocab(task_countdown_large);
    if (training) train(ctx, argv[2], solver_seed(argc, argv, 3));
    if (evaluating) eval(ctx, argv[2], argv[3]);
    if (showing) show(ctx, argv[2], argv[3], argv[4]);
    if (generating)
        gen(argv[2], argc > 3 ? (int)bench_number("COUNT", argv[3], 1, 1000000) : 1000,
            solver_seed(argc, argv, 4));
    dlm_shutdown(ctx);
    return 0;
}
