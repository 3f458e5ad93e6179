/* demo.c - one minute with dlm.h: what a diffusion model does, and how it is made.

   Build:  cc -O2 -I.. demo.c -o demo -lm -pthread       (or: make demo)
   See:    a model with full attention learns a text that is made up here, writes a line
           out of masks and fills in holes (coloured by step; plain lines into a file or
           with NO_COLOR); OPDLM makes a diffusion model of an autoregressive one; a
           Sudoku solver is trained on, plainly and with LIFT, and solves a puzzle.
   Steps and seeds are fixed: the numbers printed depend on the instruction set only,
   but for the seconds. */
#define _POSIX_C_SOURCE 200112L    /* clock_gettime, isatty, nanosleep under -std=c99 */
#define DLM_IMPLEMENTATION
#include "dlm.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum {
    THREADS = 2, TEXT = 200000,
    T = 64, B = 8,                 /* characters per sequence, sequences of a step     */
    READ = 400,                    /* characters that the first model learns by heart  */
    READER_STEPS = 2500, TEACHER_STEPS = 800,
    ROUNDS = 240, TEXTS = 16,      /* of OPDLM, and the texts of each                  */
    BLOCK = 4, GIVEN = 8,          /* block size; characters given of every text       */
    JUDGED = 64,                   /* texts that the teacher judges at the end         */
    CELLS = 16, BLANKS = 8, MASK = 5,        /* of a puzzle: 0 is blank, 1 .. 4, mask  */
    GRIDS = 288, UNSEEN = 58,      /* solved grids there are; the first are for tests  */
    PUZZLES = 32, TESTS = 200,     /* of an update; unseen ones of a test              */
    BASE_STEPS = 480, LIFT_STEPS = 260, PLAIN_STEPS = 320   /* the last two: equal FLOP */
};
static const int ramp[12] = {197, 203, 209, 215, 185, 149, 79, 74, 69, 99, 134, 170};
static char text[TEXT + 200];
static int ids[TEXT + 200], grids[GRIDS][CELLS];

struct demo {
    dlm_ctx       *ctx;
    dlm_tokenizer *tok;
    dlm_trainer   *trainer;        /* of the model that is learning                    */
    dlm_model     *reader, *teacher, *student, *solver[3];
    size_t         n, n_train;     /* ids, and how many of them are learned from       */
    int            live;           /* a terminal that takes colours and cursor moves   */
    int            canvas[TEXTS][T], when[TEXTS][T];  /* filled in at which step       */
};

static double seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* Ten pictures a second, where somebody watches. */
static void pause_for(const struct demo *d, int tenths)
{
    const struct timespec tenth = {0, 100000000};
    while (d->live && tenths-- > 0) nanosleep(&tenth, NULL);
}

/* ---- a text and its tokens ---- */

/* Facts about eight animals, in random order. */
static size_t make_text(void)
{
    static const char *const facts[8][4] = {
        {"cat", "milk", "the dog", "on the bed"},
        {"dog", "bones", "bears", "in the hall"},
        {"bird", "seeds", "the cat", "in a tree"},
        {"fish", "water", "birds", "in a lake"},
        {"bear", "honey", "bees", "in a cave"},
        {"mouse", "cheese", "cats", "in its hole"},
        {"horse", "apples", "fire", "in the barn"},
        {"frog", "flies", "the fish", "by the pond"}};
    static const char *const verbs[4] = {"", "likes", "fears", "sleeps"};
    const dlm_address at = {1, DLM_RANDOM_USER, 0, 0, 0};
    size_t n = 0;
    for (uint32_t i = 0; n < TEXT; i += 2) {
        const char *const *animal = facts[(int)(8.0 * dlm_uniform(&at, i))];
        const int fact = 1 + (int)(3.0 * dlm_uniform(&at, i + 1));
        n += (size_t)sprintf(text + n, "the %s %s %s. ", animal[0], verbs[fact],
                             animal[fact]);
    }
    return n;
}

static dlm_error stage_text(struct demo *d)
{
    const size_t size = make_text();
    dlm_error e = dlm_tokenizer_create(&d->tok, d->ctx, DLM_TOKENIZER_CHARS, text, size);
    if (!e) e = dlm_encode(d->tok, text, size, ids, size, &d->n);
    d->n_train = d->n - d->n / 10;
    if (!e) printf("%.77s...\n%d characters; the last tenth is held out\n", text,
                   (int)d->n);
    return e;
}

/* ---- learning ---- */

typedef dlm_error (*step_fn)(struct demo *d, int step, dlm_report *r);

static dlm_error step_text(struct demo *d, int step, dlm_report *r)
{
    const size_t n = d->teacher ? d->n_train : READ;
    (void)step;
    return dlm_trainer_step_text(d->trainer, ids, n, T, B, r);
}

/* All steps of a model; *flops gets what they cost.  Losses are means of a quarter. */
static dlm_error learn(struct demo *d, dlm_model *m, const dlm_train_options *o,
                       int steps, step_fn next, double *flops)
{
    dlm_train_options how = *o;
    dlm_report r = {0};
    double loss = 0.0;
    *flops = 0.0;
    how.total = steps, how.warmup = steps / 10, how.schedule = DLM_SCHEDULE_COSINE;
    dlm_error e = dlm_trainer_create(&d->trainer, d->ctx, m, &how, NULL);
    for (int step = 1; step <= steps && !e; step++) {
        e = next(d, step, &r);
        *flops += r.flops, loss += r.loss * 4.0 / steps;
        if (e || step % (steps / 4) != 0) continue;
        printf("step %4d of %d: loss %.3f\n", step, steps, loss);
        loss = 0.0;
    }
    dlm_trainer_free(d->trainer);
    d->trainer = NULL;
    return e;
}

/* A model of the text: masks are filled in with both sides in view (FULL), or it writes
   from left to right (CAUSAL). */
static dlm_error learn_text(struct demo *d, dlm_model **m, dlm_pattern pattern, int steps)
{
    const dlm_train_options how = {.max_rows = B * T, .lr = 2e-3f, .lr_min = 1e-5f};
    const dlm_config cfg = {.vocab = d->tok->vocab, .dim = 64, .layers = 3,
                            .heads = 4, .max_seq = T, .pattern = pattern,
                            .rope_theta = 10.0f};
    double flops;
    dlm_error e = dlm_model_create(m, d->ctx, &cfg, 1, NULL);
    return e ? e : learn(d, *m, &how, steps, step_text, &flops);
}

static dlm_error stage_reader(struct demo *d)
{
    return learn_text(d, &d->reader, DLM_PATTERN_FULL, READER_STEPS);
}

static dlm_error stage_teacher(struct demo *d)
{
    return learn_text(d, &d->teacher, DLM_PATTERN_CAUSAL, TEACHER_STEPS);
}

/* ---- denoising ---- */

/* A canvas of n tokens; when[i]: the step in which i was filled in, 0: it was given. */
static void draw_text(const struct demo *d, int n, int step)
{
    char line[T + 1];
    dlm_decode(d->tok, d->canvas[0], (size_t)n, line, sizeof line);
    if (!d->live) { printf("%3d  %s\n", step, line); return; }
    printf("\r");
    for (int i = 0; i < n; i++) {
        const int masked = d->canvas[0][i] == d->tok->mask;
        if (masked) printf("\033[48;5;237m \033[0m");
        else if (!d->when[0][i]) printf("%c", line[i]);
        else printf("\033[38;5;%dm%c\033[0m", ramp[(d->when[0][i] - 1) % 12], line[i]);
    }
}

/* Fills in the masks of the first canvas, in each step all that it is 98 % sure of, and
   shows every `often`-th step. */
static dlm_error denoise(struct demo *d, int n, int often)
{
    dlm_session *session = NULL;
    dlm_sampler *sampler = NULL;
    const dlm_sample_options how = {.order = DLM_ORDER_THRESHOLD, .threshold = 0.98f,
                                    .temperature = 0.6f, .seed = 3};
    int step = 0;
    memset(d->when[0], 0, sizeof d->when[0]);
    draw_text(d, n, 0);
    pause_for(d, 8);
    dlm_error e = dlm_session_create(&session, d->ctx, d->reader, NULL, NULL);
    if (!e) e = dlm_sampler_create(&sampler, session, &how, NULL);
    if (!e) e = dlm_sampler_begin(sampler, d->canvas[0], &n, 1);
    while (!e && !dlm_sampler_done(sampler)) {
        e = dlm_sampler_step(sampler);
        if (e) break;
        dlm_sampler_steps(sampler, 0, d->when[0]);
        step++;
        if (d->live || step % often == 0 || dlm_sampler_done(sampler))
            draw_text(d, n, step);
        pause_for(d, 1);
    }
    if (d->live) printf("\n");
    dlm_sampler_free(sampler);
    dlm_session_free(session);
    return e;
}

/* Only ". " in front is given, so that a sentence begins. */
static dlm_error stage_denoise(struct demo *d)
{
    size_t n;
    for (int i = 0; i < T; i++) d->canvas[0][i] = d->reader->config.mask_id;
    dlm_error e = dlm_encode(d->tok, ". ", 2, d->canvas[0], T, &n);
    return e ? e : denoise(d, T, 2);
}

/* '_' is a mask.  Who likes milk, only the right side tells. */
static dlm_error stage_infill(struct demo *d)
{
    static const char *const forms[] = {
        "the ____ likes honey. the ___ sleeps in the hall.",
        "the frog likes _____. the ___ likes bones. the bird sleeps in a"};
    dlm_error e = DLM_OK;
    for (size_t f = 0; f < sizeof forms / sizeof *forms && !e; f++) {
        const int n = (int)strlen(forms[f]);
        size_t one;
        for (int i = 0; i < n && !e; i++) {
            d->canvas[0][i] = d->reader->config.mask_id;
            if (forms[f][i] != '_')
                e = dlm_encode(d->tok, forms[f] + i, 1, &d->canvas[0][i], 1, &one);
        }
        if (!e) e = denoise(d, n, T);
    }
    return e;
}

/* ---- conversion: OPDLM ---- */

/* A model goes on from TEXTS places of a text; an autoregressive one character by
   character, a student with all that it is 90 % sure of.  Returns characters per pass. */
static dlm_error write_texts(struct demo *d, const dlm_model *m, uint32_t number,
                             const int *from, size_t size, double *per_pass)
{
    uint32_t names[TEXTS];
    int lengths[TEXTS];
    double passes = 0.0;
    dlm_session *session = NULL;
    dlm_sampler *sampler = NULL;
    const int mask = d->tok->mask;   /* the student's is another one   */
    const dlm_limits limits = {.seqs = TEXTS, .slots = T, .cached = 1};
    const dlm_sample_options how = {.order = DLM_ORDER_THRESHOLD, .left_first = 1,
                                    .temperature = 1.0f, .ids = names,
                                    .suppress = &mask, .n_suppress = 1};
    for (int k = 0; k < TEXTS; k++) {
        const dlm_address at = {1, DLM_RANDOM_USER + 1, 0, number + (uint32_t)k, 0};
        const int *start = from + (size_t)(dlm_uniform(&at, 0) * (double)(size - T));
        for (int i = 0; i < T; i++)
            d->canvas[k][i] = i < GIVEN ? start[i] : m->config.mask_id;
        names[k] = at.row, lengths[k] = T;
    }
    dlm_error e = dlm_session_create(&session, d->ctx, m, &limits, NULL);
    if (!e) e = dlm_sampler_create(&sampler, session, &how, NULL);
    if (!e) e = dlm_sampler_begin(sampler, d->canvas[0], lengths, TEXTS);
    while (!e && !dlm_sampler_done(sampler)) e = dlm_sampler_step(sampler);
    for (int k = 0; k < TEXTS && !e; k++) {
        int last = 0;
        dlm_sampler_steps(sampler, k, d->when[k]);
        for (int i = 0; i < T; i++) if (d->when[k][i] > last) last = d->when[k][i];
        passes += last;
    }
    *per_pass = TEXTS * (T - GIVEN) / passes;
    dlm_sampler_free(sampler);
    dlm_session_free(session);
    return e;
}

/* What the teacher thinks of the texts of a model, m NULL: of the held-out text. */
static dlm_error judge(struct demo *d, const char *name, const dlm_model *m)
{
    const int *held = ids + d->n_train;
    const size_t size = d->n - d->n_train;
    dlm_session *session = NULL;
    double nats = 0.0, per_pass = 0.0, sum = 0.0, log_p;
    dlm_error e = dlm_session_create(&session, d->ctx, d->teacher, NULL, NULL);
    for (size_t k = 0; k < JUDGED && !e; k++) {
        if (m && k % TEXTS == 0) {
            e = write_texts(d, m, (uint32_t)k, held, size, &per_pass);
            sum += per_pass * TEXTS / JUDGED;
        }
        const int *tokens = m ? d->canvas[k % TEXTS] : held + k * (size - T) / JUDGED;
        if (!e) e = dlm_log_likelihood(session, tokens, T, GIVEN, 1, 0, &log_p);
        if (!e) nats -= log_p;
    }
    dlm_session_free(session);
    if (!e) printf("%-24s %19.3f", name, nats / (JUDGED * (T - GIVEN)));
    if (!e && m) printf(" %16.2f", sum);
    printf("\n");
    return e;
}

/* A round: the student writes, the teacher reads what was written, and the student
   learns to say what the teacher would have said, from the states that it wrote in. */
static dlm_error distil(struct demo *d)
{
    const dlm_train_options how = {.max_rows = 2 * T * B, .lr = 1e-3f, .lr_min = 1e-5f,
                                   .warmup = 20, .total = ROUNDS * TEXTS / B,
                                   .schedule = DLM_SCHEDULE_COSINE};
    const dlm_distill_options o = {.divergence = {.kind = DLM_FORWARD_KL}};
    dlm_distiller *distiller = NULL;
    double loss = 0.0;                       /* the mean of a quarter                 */
    dlm_error e = dlm_trainer_create(&d->trainer, d->ctx, d->student, &how, NULL);
    if (!e) e = dlm_distiller_create(&distiller, d->trainer, d->teacher, &o, NULL);
    for (int round = 1; round <= ROUNDS && !e; round++) {
        dlm_example ex[TEXTS];
        dlm_report r = {0};
        double per_pass;
        e = write_texts(d, d->student, (uint32_t)(round * 1000), ids, d->n_train,
                        &per_pass);
        for (int k = 0; k < TEXTS; k++)
            ex[k] = (dlm_example){.tokens = d->canvas[k], .length = T, .prompt = GIVEN,
                                  .steps = d->when[k]};
        for (int k = 0; k < TEXTS && !e; k += B) {
            e = dlm_distiller_step(distiller, ex + k, B, &r);
            loss += r.loss * B / TEXTS * 4.0 / ROUNDS;
        }
        if (e || round % (ROUNDS / 4) != 0) continue;
        printf("round %3d of %d: divergence %.3f nats, %.2f characters per pass\n", round,
               ROUNDS, loss, per_pass);
        loss = 0.0;
    }
    dlm_distiller_free(distiller);
    dlm_trainer_free(d->trainer);
    d->trainer = NULL;
    return e;
}

/* As in the paper, with one difference: shifted is 1, the student goes on predicting the
   next character, which a small model learns in a fraction of the time. */
static dlm_error stage_convert(struct demo *d)
{
    dlm_model *before = NULL;
    dlm_model **copies[2] = {&before, &d->student};
    dlm_error e = DLM_OK;
    for (int k = 0; k < 2 && !e; k++)
        e = dlm_convert(copies[k], d->ctx, d->teacher, BLOCK, DLM_NEW_TOKEN, 1, NULL);
    if (!e) e = distil(d);
    if (!e) printf("text by                  teacher's nats/char  characters/pass\n");
    if (!e) e = judge(d, "(held out)", NULL);
    if (!e) e = judge(d, "the teacher", d->teacher);
    if (!e) e = judge(d, "the student, untouched", before);
    if (!e) e = judge(d, "the student", d->student);
    dlm_model_free(before);
    return e;
}

/* ---- Sudoku: LIFT ---- */

/* Stores the ways to complete a grid (out may be NULL) from number n on; returns n plus
   how many there are.  A digit must be new to its row, column and box. */
static int complete(int *grid, int (*out)[CELLS], int n)
{
    int c = 0;
    while (c < CELLS && grid[c] != 0) c++;
    if (c == CELLS && out) memcpy(out[n], grid, sizeof *out);
    if (c == CELLS) return n + 1;
    for (int digit = 1; digit <= 4; digit++) {
        int i = 0;
        while (i < CELLS && (grid[i] != digit || (i / 4 != c / 4 && i % 4 != c % 4
               && (i / 8 != c / 8 || i % 4 / 2 != c % 4 / 2)))) i++;
        if (i < CELLS) continue;
        grid[c] = digit;
        n = complete(grid, out, n);
        grid[c] = 0;
    }
    return n;
}

/* A puzzle and behind it its only solution, which is an unseen grid or is not. */
static void make_puzzle(int *puzzle, uint32_t number, int unseen)
{
    dlm_address at = {1, DLM_RANDOM_USER + 2, 0, number, (uint32_t)unseen};
    int grid[CELLS];
    do {
        int i = (int)(dlm_uniform(&at, 0) * (unseen ? UNSEEN : GRIDS - UNSEEN));
        size_t which = dlm_shuffled(1, 0, GRIDS, (size_t)(unseen ? i : UNSEEN + i));
        memcpy(grid, grids[which], sizeof grid);
        memcpy(puzzle + CELLS, grid, sizeof grid);
        at.step++;
        for (size_t k = 0; k < BLANKS; k++)
            grid[dlm_shuffled(number, at.step, CELLS, k)] = 0;
        memcpy(puzzle, grid, sizeof grid);
    } while (complete(grid, NULL, 0) != 1);
}

static dlm_error step_sudoku(struct demo *d, int step, dlm_report *r)
{
    int puzzles[PUZZLES][2 * CELLS];
    dlm_example ex[PUZZLES];
    for (int k = 0; k < PUZZLES; k++) {
        make_puzzle(puzzles[k], (uint32_t)(step * PUZZLES + k), 0);
        ex[k] = (dlm_example){.tokens = puzzles[k], .length = 2 * CELLS, .prompt = CELLS};
    }
    return dlm_trainer_step(d->trainer, ex, PUZZLES, r);
}

/* Prints what is known of the solution: over the last one, or as one line. */
static void draw_grid(void *user, const dlm_event *events, int n)
{
    const struct demo *d = (const struct demo *)user;
    const int *given = d->canvas[0], *cell = given + CELLS;
    if (!d->live) printf("%3d  ", events ? events[n - 1].step : 0);
    else if (events) printf("\033[4A");
    for (int i = 0; i < CELLS; i++) {
        char c = (char)(cell[i] == MASK ? '.' : '0' + cell[i]);
        if (!d->live) printf(given[i] && c != '.' ? "[%c]" : " %c ", c);
        else printf("\033[%sm %c\033[0m", c == '.' ? "2" : given[i] ? "36" : "1;33", c);
        if (i % 4 == 3) printf("%s", d->live || i == CELLS - 1 ? "\n" : "  /  ");
    }
    pause_for(d, 1);
}

/* Solves unseen puzzle `number`, some cells per step, the surest first. */
static dlm_error solve(struct demo *d, const dlm_model *m, uint32_t number, int at_once,
                       int watched, int *right)
{
    int puzzle[2 * CELLS];
    dlm_sample_options how = {.steps = CELLS / at_once};
    make_puzzle(puzzle, number, 1);
    for (int i = 0; i < 2 * CELLS; i++) d->canvas[0][i] = i < CELLS ? puzzle[i] : MASK;
    if (watched) how.on_step = draw_grid, how.step_user = d, draw_grid(d, NULL, 0);
    dlm_error e = dlm_sample(d->ctx, m, d->canvas[0], 2 * CELLS, &how);
    *right += !memcmp(d->canvas[0], puzzle, sizeof puzzle);
    return e;
}

static dlm_error test_solver(struct demo *d, const char *name, const dlm_model *m,
                             int steps, double flops)
{
    int single = 0, four = 0;
    dlm_error e = DLM_OK;
    for (uint32_t k = 0; k < TESTS && !e; k++) {
        e = solve(d, m, k, 1, 0, &single);
        if (!e) e = solve(d, m, k, 4, 0, &four);
    }
    if (!e) printf("%-13s %5d %7.0f %10d of %d %6d of %d\n", name, steps, 1e-9 * flops,
                   single, TESTS, four, TESTS);
    return e;
}

/* One base; from its weights on plain training and LIFT, with as many operations. */
static dlm_error stage_sudoku(struct demo *d)
{
    static const char *const names[3] = {"base", "base + plain", "base + LIFT"};
    static const int steps[3] = {BASE_STEPS, PLAIN_STEPS, LIFT_STEPS};
    const dlm_config cfg = {.vocab = MASK + 1, .pattern = DLM_PATTERN_FULL, .dim = 64,
                            .layers = 3, .heads = 4, .max_seq = 2 * CELLS,
                            .rope_theta = 10.0f};
    double flops[3];
    int grid[CELLS] = {0}, right = 0;
    dlm_error e = DLM_OK;
    complete(grid, grids, 0);
    for (int k = 0; k < 3 && !e; k++) {
        dlm_train_options how = {.max_rows = 2 * CELLS * PUZZLES, .weight_decay = 0.1f,
                                 .lr = k ? 1e-3f : 3e-3f, .lr_min = k ? 1e-5f : 1e-3f};
        if (k == 2) how.lift.method = DLM_METHOD_LIFT3;
        e = dlm_model_create(&d->solver[k], d->ctx, &cfg, 1, NULL);
        if (!e && k) memcpy(d->solver[k]->weights, d->solver[0]->weights,
                            d->solver[0]->n_params * sizeof(float));
        if (!e) printf("%s:\n", names[k]);
        if (!e) e = learn(d, d->solver[k], &how, steps[k], step_sudoku, &flops[k]);
    }
    if (!e) printf("exact, cells per pass:  GFLOP          one         four\n");
    for (int k = 0; k < 3 && !e; k++)
        e = test_solver(d, names[k], d->solver[k], steps[k], flops[k]);
    if (!e) printf("(one seed, and 9 of 200 are one standard error: no ranking)\n");
    if (!e) e = solve(d, d->solver[2], 0, 1, 1, &right);
    if (!e) printf("%s\n", right ? "solved" : "not solved");
    return e;
}

int main(int argc, char **argv)
{
    static const struct { const char *name; dlm_error (*run)(struct demo *); } stage[] = {
        {"a text", stage_text}, {"a diffusion model learns it", stage_reader},
        {"a line out of masks", stage_denoise}, {"filling in", stage_infill},
        {"an autoregressive model learns it", stage_teacher},
        {"and becomes a diffusion model (OPDLM)", stage_convert},
        {"Sudoku, plainly and with LIFT", stage_sudoku}};
    struct demo d = {0};
    char why[256] = "";                      /* for a context that fails              */
    dlm_options options = {.threads = THREADS, .message = why, .message_size = 256};
    const char *plain = getenv("NO_COLOR");
    const double begin = seconds();
    if (argc > 1) {
        puts("usage: demo        it takes no arguments");
        return strcmp(argv[1], "--help") ? 2 : 0;
    }
    setvbuf(stdout, NULL, _IONBF, 0);
    d.live = isatty(1) && !(plain && *plain);
    dlm_error e = dlm_init(&d.ctx, &options);
    for (size_t s = 0; s < sizeof stage / sizeof *stage && !e; s++) {
        const double t0 = seconds();
        printf("\n== %s\n", stage[s].name);
        e = stage[s].run(&d);
        if (!e) printf("   %.1f s\n", seconds() - t0);
    }
    if (e) fprintf(stderr, "%s: %s\n", dlm_error_string(e),
                   *why ? why : dlm_last_error(d.ctx));
    else printf("\n%d threads, %s kernels, %.0f s in all\n", dlm_active_threads(d.ctx),
                dlm_isa_name(dlm_active_isa(d.ctx)), seconds() - begin);
    for (int k = 3; k-- > 0;) dlm_model_free(d.solver[k]);
    dlm_model_free(d.student), dlm_model_free(d.teacher), dlm_model_free(d.reader);
    dlm_tokenizer_free(d.tok);
    dlm_shutdown(d.ctx);
    return e != DLM_OK;
}
