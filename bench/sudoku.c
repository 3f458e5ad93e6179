/* sudoku.c - a diffusion model that learns 4x4 Sudoku from 201 of the 288 grids and
   solves puzzles made of the others.

     sudoku train MODEL.safetensors [SEED]       about a minute on two cores
     sudoku eval  MODEL.safetensors FILE.csv     last line: cell_accuracy= exact= n=
     sudoku show  MODEL.safetensors PUZZLE       step by step; 16 digits, 0 = blank
     sudoku gen   FILE.csv [BLANKS [COUNT [SEED]]]   unseen puzzles, 8 blanks, 1000

   The puzzle is the canvas: 16 digits in a row, the blanks are masks, and solving is
   filling them in, one token per step, the most confident one first.  Training masks
   grids at random; a masked digit is a blank.  What makes a model this small learn the
   rules and not the 201 grids is the range of noise levels: with 30 to 70 % masked two
   states of three have one solution, so the rules say as much as remembering would, and
   every grid has thousands of such states.  The second part of the recipe is LIFT, at
   all noise levels.  All 288 grids are related by symmetries, so unseen grids are a weak
   form of new; none of these symmetries is used to make more training grids.

   The files have the header Puzzle,Solution. */
#define _POSIX_C_SOURCE 200112L            /* clock_gettime, isatty under -std=c99   */
#define DLM_IMPLEMENTATION
#include "dlm.h"
#include "bench.h"
#include "tasks.h"
#include "solver.h"
#include <unistd.h>

enum {
    THREADS = 2, DIM = 64, LAYERS = 4, HEADS = 4, FFN = 192,
    LENGTH = 17,                           /* format token, 16 digits              */
    BATCH = SOLVER_SEQS,
    BASE_STEPS = 1200, LIFT_STEPS = 600, REPORT = 100,
    CHECKS = 256, CHECK_BLANKS = 8         /* validation puzzles while training    */
};

static task_grids grids;

static void train_example(task_example *ex, uint64_t seed, uint32_t number);
static double validate(dlm_ctx *ctx, const dlm_model *m);
static const solver_task task = {
    "sudoku", TASK_SUDOKU_VOCAB, LENGTH, BASE_STEPS, LIFT_STEPS, REPORT,
    train_example, validate
};

static void fail(const char *what, const char *detail)
{
    solver_fail(&task, what, detail);
}

/* --[ solving ]------------------------------------------------------------- */

/* Lays n <= BATCH puzzles out, blanks as masks. */
static void solver_begin(solver *s, const task_puzzle *puzzles, int n)
{
    int lengths[BATCH];
    for (int i = 0; i < n; i++) {
        int *const row = s->canvas + i * LENGTH;
        lengths[i] = LENGTH;
        row[0] = TASK_CANVAS;
        for (int k = 0; k < 16; k++) {
            const int digit = puzzles[i].given[k];
            row[1 + k] = digit ? TASK_NUMBER + digit : TASK_MASK;
        }
    }
    bench_require(s->ctx, dlm_sampler_begin(s->sampler, s->canvas, lengths, n));
}

static void solve_and_score(solver *s, const task_puzzle *puzzles, int n,
                            task_score *score)
{
    char text[TASK_LENGTH + 32];
    solver_begin(s, puzzles, n);
    while (!dlm_sampler_done(s->sampler))
        bench_require(s->ctx, dlm_sampler_step(s->sampler));
    for (int i = 0; i < n; i++) {
        task_sudoku_text(text, s->canvas + i * LENGTH + 1, 16, TASK_CANVAS);
        task_sudoku_score(score, &puzzles[i], text);
    }
}

static double ratio(long a, long b)
{
    return b > 0 ? (double)a / (double)b : 0.0;
}

/* --[ train ]--------------------------------------------------------------- */

static void train_example(task_example *ex, uint64_t seed, uint32_t number)
{
    task_puzzle p;
    task_sudoku_puzzle(&p, &grids, TASK_TRAIN, 0, seed, number);
    task_sudoku_example(ex, &p, TASK_CANVAS);
}

/* Exactly solved validation puzzles; their grids are in neither training nor test. */
static double validate(dlm_ctx *ctx, const dlm_model *m)
{
    solver s;
    task_score score = {0};
    task_puzzle puzzles[BATCH];
    solver_open(&s, &task, ctx, m);
    for (int first = 0; first < CHECKS; first += BATCH) {
        for (int i = 0; i < BATCH; i++)
            task_sudoku_puzzle(&puzzles[i], &grids, TASK_VALIDATION, CHECK_BLANKS, 0,
                               (uint32_t)(first + i));
        solve_and_score(&s, puzzles, BATCH, &score);
    }
    solver_close(&s);
    return ratio(score.exact, score.puzzles);
}

static void train(dlm_ctx *ctx, const char *path, uint64_t seed)
{
    dlm_config cfg = {0};
    dlm_train_options how = {0};
    dlm_model *m;
    const double started = bench_now();
    bench_writable(path);
    cfg.vocab = TASK_SUDOKU_VOCAB, cfg.mask_id = TASK_MASK, cfg.max_seq = LENGTH;
    cfg.dim = DIM, cfg.layers = LAYERS, cfg.heads = HEADS, cfg.ffn = FFN;
    cfg.pattern = DLM_PATTERN_FULL;
    bench_require(ctx, dlm_model_create(&m, ctx, &cfg, seed, NULL));
    printf("%d parameters, %d grids to learn from\n", (int)m->n_params,
           TASK_GRIDS - TASK_TEST_GRIDS - TASK_VALIDATION_GRIDS);

    how.max_rows = BATCH * LENGTH, how.seed = seed, how.weight_decay = 0.1f;
    how.schedule = DLM_SCHEDULE_COSINE, how.warmup = 50;
    how.lr = 3e-3f, how.lr_min = 3e-4f, how.total = BASE_STEPS;
    how.level_min = 0.3f, how.level_max = 0.7f;
    solver_learn(&task, ctx, m, &how, 0, started);

    how.lr = 1e-3f, how.lr_min = 1e-5f, how.total = LIFT_STEPS;
    how.level_min = 0.0f, how.level_max = 0.0f;     /* zeros: all levels           */
    how.lift.method = DLM_METHOD_LIFT3;
    solver_learn(&task, ctx, m, &how, BASE_STEPS, started);

    bench_require(ctx, dlm_save(ctx, path, m, NULL));
    printf("saved %s\n", path);
    dlm_model_free(m);
}

/* --[ files ]--------------------------------------------------------------- */

/* 16 digits 0..4 (1..4 where blanks are not allowed); returns what follows, or NULL. */
static const char *read_grid(unsigned char grid[16], const char *text, int blanks)
{
    for (int i = 0; i < 16; i++) {
        if (text[i] < (blanks ? '0' : '1') || text[i] > '4') return NULL;
        grid[i] = (unsigned char)(text[i] - '0');
    }
    return text + 16;
}

/* 1 and a puzzle, or 0 at the end of the file. */
static int read_puzzle(FILE *f, task_puzzle *p, int *line)
{
    char text[256];
    const char *c;
    if (!solver_line(&task, f, text, sizeof text, line)) return 0;
    c = read_grid(p->given, text, 1);
    if (c != NULL) c = *c == ',' ? read_grid(p->solution, c + 1, 0) : NULL;
    if (c == NULL || *c != 0)
        solver_refuse(&task, *line, "16 digits 0..4, a comma and 16 digits 1..4", text);
    return 1;
}

static void read_header(FILE *f, int *line)
{
    char text[256] = "";
    (void)solver_line(&task, f, text, sizeof text, line);
    if (strcmp(text, "Puzzle,Solution") != 0)
        solver_refuse(&task, *line, "the header Puzzle,Solution", text);
}

/* --[ eval ]---------------------------------------------------------------- */

static void eval(dlm_ctx *ctx, const char *model_path, const char *path)
{
    dlm_model *const m = solver_load(&task, ctx, model_path);
    FILE *const f = fopen(path, "rb");
    task_puzzle puzzles[BATCH];
    task_score score = {0};
    solver s;
    int n = 0, line = 0, more = 1;
    if (f == NULL) fail("cannot open ", path);
    read_header(f, &line);
    solver_open(&s, &task, ctx, m);
    while (more) {
        more = read_puzzle(f, &puzzles[n], &line);
        n += more;
        if (n == 0 || (more && n < BATCH)) continue;
        solve_and_score(&s, puzzles, n, &score);
        n = 0;
    }
    fclose(f);
    solver_close(&s);
    dlm_model_free(m);
    if (score.puzzles == 0) fail("no puzzles in ", path);
    printf("cell_accuracy=%.4f exact=%.4f n=%ld\n",
           ratio(score.blanks_right, score.blanks), ratio(score.exact, score.puzzles),
           score.puzzles);
}

/* --[ show ]---------------------------------------------------------------- */

enum { ACROSS = 4 };                       /* grids beside each other              */

static int colours;

/* A cell, three columns wide: givens in another colour, the newest digit marked. */
static void show_cell(const task_puzzle *p, const unsigned char grid[16], int i,
                      int newest)
{
    const char digit = (char)(grid[i] ? '0' + grid[i] : '.');
    const char *const colour = p->given[i] ? "\033[36m"
                             : i == newest ? "\033[1;32m" : grid[i] ? "\033[33m" : "";
    if (colours) printf("%s %c %s", colour, digit, *colour ? "\033[0m" : "");
    else if (i == newest) printf("[%c]", digit);
    else printf(p->given[i] || !grid[i] ? " %c " : "(%c)", digit);
}

/* Rows of n <= ACROSS states beside each other. */
static void show_states(const task_puzzle *p, unsigned char (*grid)[16],
                        const int *newest, int n)
{
    for (int row = 0; row < 4; row++) {
        for (int k = 0; k < n; k++) {
            for (int column = 0; column < 4; column++) {
                if (column == 2) printf("|");
                show_cell(p, grid[k], 4 * row + column, newest[k]);
            }
            printf(k + 1 < n ? "    " : "\n");
        }
        for (int k = 0; k < n && row == 1; k++)
            printf(k + 1 < n ? "------+------    " : "------+------\n");
    }
    printf("\n");
}

/* Replays what the sampler did: the puzzle, then the grid after every token. */
static void show_trace(const task_puzzle *p, const dlm_event *events, int n_events)
{
    unsigned char grid[ACROSS][16];
    int newest[ACROSS], n = 0;
    char caption[32];
    memcpy(grid[0], p->given, 16);
    newest[0] = -1;
    for (int e = -1; e < n_events; e++) {
        if (e >= 0) {
            const int digit = events[e].token - TASK_NUMBER;
            newest[n] = events[e].position - 1;
            grid[n][newest[n]] = (unsigned char)(digit >= 0 && digit <= 9 ? digit : 0);
            snprintf(caption, sizeof caption, "%d: %.1f %% sure", events[e].step,
                     100.0 * (double)events[e].confidence);
        } else snprintf(caption, sizeof caption, "puzzle");
        printf("%-17s", caption);
        if (++n < ACROSS && e + 1 < n_events) {
            memcpy(grid[n], grid[n - 1], 16);
            continue;
        }
        printf("\n");
        show_states(p, grid, newest, n);
        memcpy(grid[0], grid[n - 1], 16);
        n = 0;
    }
}

static void show_verdict(const task_puzzle *p, const int *digits, int solutions)
{
    static const char *const parts[3] = {"was trained on", "is a validation grid",
                                         "is a test grid, never trained on"};
    task_score score = {0};
    char text[TASK_LENGTH + 32];
    task_sudoku_text(text, digits, 16, TASK_CANVAS);
    if (task_sudoku_score(&score, p, text))
        printf("solved: a valid grid that keeps all givens");
    else printf("not solved: the grid breaks a rule");
    if (solutions == 1)
        printf("; its grid %s\n", parts[task_grid_part(&grids, p->solution)]);
    else printf("; the puzzle has %s\n", solutions ? "more than one solution"
                                                   : "no solution at all");
}

static void show(dlm_ctx *ctx, const char *model_path, const char *text)
{
    dlm_model *const m = solver_load(&task, ctx, model_path);
    task_puzzle p = {0};
    solver s;
    const dlm_event *events;
    const char *const end = read_grid(p.given, text, 1);
    int solutions, n;
    if (end == NULL || *end != 0) fail("not 16 digits from 0 to 4: ", text);
    solutions = task_solve(&p);
    colours = isatty(fileno(stdout)) && getenv("NO_COLOR") == NULL;
    solver_open(&s, &task, ctx, m);
    solver_begin(&s, &p, 1);
    while (!dlm_sampler_done(s.sampler))
        bench_require(ctx, dlm_sampler_step(s.sampler));
    events = dlm_sampler_trace(s.sampler, &n);
    show_trace(&p, events, n);
    show_verdict(&p, s.canvas + 1, solutions);
    solver_close(&s);
    dlm_model_free(m);
}

/* --[ gen ]----------------------------------------------------------------- */

static void gen(const char *path, int blanks, int count, uint64_t seed)
{
    FILE *const f = fopen(path, "wb");
    if (f == NULL) fail("cannot write ", path);
    fprintf(f, "Puzzle,Solution\n");
    for (int k = 0; k < count; k++) {
        task_puzzle p;
        task_sudoku_puzzle(&p, &grids, TASK_TEST, blanks, seed, (uint32_t)k);
        for (int i = 0; i < 16; i++) fputc('0' + p.given[i], f);
        fputc(',', f);
        for (int i = 0; i < 16; i++) fputc('0' + p.solution[i], f);
        fputc('\n', f);
    }
    if (fclose(f) != 0) fail("cannot write ", path);
}

int main(int argc, char **argv)
{
    static const char usage[] =
        "sudoku train MODEL [SEED]\n"
        "       sudoku eval  MODEL FILE.csv\n"
        "       sudoku show  MODEL PUZZLE\n"
        "       sudoku gen   FILE.csv [BLANKS [COUNT [SEED]]]";
    const int training = solver_command(argc, argv, "train", 1, 2);
    const int evaluating = solver_command(argc, argv, "eval", 2, 2);
    const int showing = solver_command(argc, argv, "show", 2, 2);
    const int generating = solver_command(argc, argv, "gen", 1, 4);
    dlm_ctx *ctx;
    if (!training && !evaluating && !showing && !generating)
        bench_usage(usage, argc == 2 ? argv[1] : NULL);
    ctx = bench_ctx(DLM_ISA_AUTO, THREADS);
    task_grids_init(&grids);
    if (training) train(ctx, argv[2], solver_seed(argc, argv, 3));
    if (evaluating) eval(ctx, argv[2], argv[3]);
    if (showing) show(ctx, argv[2], argv[3]);
    if (generating)
        gen(argv[2], argc > 3 ? (int)bench_number("BLANKS", argv[3], 1, 12) : 8,
            argc > 4 ? (int)bench_number("COUNT", argv[4], 1, 1000000) : 1000,
            solver_seed(argc, argv, 5));
    dlm_shutdown(ctx);
    return 0;
}
