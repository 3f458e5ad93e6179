/* demo.c - one minute with dlm.h: a text is learned, a model converted, a puzzle solved.

   Build:  cc -O2 -I.. demo.c -o demo -lm -pthread       (or: make demo)
   See:    an autoregressive model learns a text that is made up here; OPDLM makes a
           diffusion model of it, whose text comes out of noise, coloured by step (plain
           lines into a file or with NO_COLOR), and which fills in holes; another learns
           4x4 Sudoku, is fine-tuned with LIFT and solves a puzzle it has never seen. */
#define _POSIX_C_SOURCE 200112L    /* clock_gettime, isatty, nanosleep under -std=c99 */
#define DLM_IMPLEMENTATION
#include "dlm.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum {
    THREADS = 2, TEXT = 300000,
    T = 128, B = 4, BLOCK = 8,     /* characters per sequence, sequences, block size  */
    TEXTS = 8, LENGTH = 64,        /* of a round: texts, their characters, and how    */
    GIVEN = 8,                     /* many of these are given                         */
    READINGS = 3, WINDOWS = 2,     /* updates on the corpus per round, sequences each */
    SAMPLES = 48, WATCHED = 60, TIMED = 6,   /* texts, characters, steps: see there   */
    CELLS = 16, BLANKS = 8, MASK = 5,        /* of a puzzle: 0 is blank, 1 .. 4, mask */
    GRIDS = 288, UNSEEN = 58,      /* solved grids there are; the first are for tests */
    BATCH = 32, PUZZLES = 100      /* puzzles of an update, unseen ones of a test     */
};
enum { TEACHER, STUDENT, PLAIN, LIFTED, MODELS };
static const double LATE = 1.05;   /* learning ends after so many times its seconds,  */
static const double TEST = 1.2;    /* a test after so many seconds                    */
static char text[TEXT + 200];
static int ids[TEXT + 200], grids[GRIDS][CELLS];

struct demo {
    dlm_ctx       *ctx;
    dlm_tokenizer *tok;
    dlm_model     *model[MODELS];
    dlm_trainer   *trainer;        /* of the model that is learning                   */
    dlm_distiller *distiller;
    size_t         n, n_train;     /* ids, and how many of them are learned from      */
    int            steps[MODELS], tested[MODELS], exact[MODELS];
    int            live;           /* a terminal that takes colours and cursor moves  */
    int            canvas[TEXTS][T], born[TEXTS][T];  /* born at which step; 0: given */
    int            watched;        /* is it shown while it is written?                */
    double         chars, forwards, begin;     /* written; when the program started   */
    char           note[80];       /* what the last step of learning has to say       */
};

struct phase {                     /* a model that learns for a given time            */
    int         which, updates;    /* so many updates in a step                       */
    double      seconds;           /* the number of steps follows from it             */
    const char *step_name;
    dlm_error (*step)(struct demo *d, int step);     /* learns and writes the note    */
    dlm_config  cfg;
    dlm_train_options how;
};

static double seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* ---- a text and its tokens ---- */

/* Sentences of a small grammar, always the same ones. */
static size_t make_text(void)
{
    static const char *const words[5][6] = {
        {"the sailor", "a young fox", "my sister", "the baker", "an owl", "a friend"},
        {"carries", "finds", "watches", "hides", "remembers", "paints"},
        {"the silver key", "a red apple", "some honey", "a letter", "a clock", "a boat"},
        {"in the forest", "near the river", "on the hill", "at home", "at sea", "here"},
        {"at night", "every summer", "after the rain", "in winter", "again", "at last"}};
    static const int orders[3][5] = {{0, 1, 2, 3, 4}, {4, 0, 1, 2, 3}, {3, 0, 1, 2, 4}};
    dlm_address at = {1, DLM_RANDOM_USER, 0, 0, 0};
    size_t n = 0;
    for (; n < TEXT; at.step++) {
        const int *order = orders[(int)(3.0 * dlm_uniform(&at, 5))];
        for (uint32_t k = 0; k < 5; k++)
            n += (size_t)sprintf(text + n, k < 4 ? "%s " : "%s. ",
                                 words[order[k]][(int)(6.0 * dlm_uniform(&at, k))]);
    }
    return n;
}

static dlm_error stage_text(struct demo *d)
{
    size_t size = make_text();
    dlm_error e = dlm_tokenizer_create(&d->tok, d->ctx, DLM_TOKENIZER_CHARS, text, size);
    if (!e) e = dlm_encode(d->tok, text, size, ids, size, &d->n);
    d->n_train = d->n - d->n / 10;
    if (!e) printf("%.72s...\n%d characters, %d different; the last tenth is held out\n",
                   text, (int)d->n, d->tok->vocab - 2);
    return e;
}

/* ---- learning for a given time ---- */

static void forget(struct demo *d, int which)
{
    dlm_distiller_free(d->distiller);
    dlm_trainer_free(d->trainer);
    dlm_model_free(d->model[which]);
    d->distiller = NULL, d->trainer = NULL, d->model[which] = NULL;
}

/* A model and what makes it learn, in place of those there were.  The student begins as
   a copy of the teacher, LIFT where plain training ended. */
static dlm_error make(struct demo *d, const struct phase *p, int steps)
{
    dlm_train_options how = p->how;
    dlm_distill_options o = {.divergence = {.kind = DLM_JSD, .weight = 0.25f}};
    dlm_config cfg = p->cfg;
    dlm_model **m = &d->model[p->which], *teacher = d->model[TEACHER];
    dlm_error e;
    forget(d, p->which);
    if (p->which == TEACHER) cfg.vocab = d->tok->vocab;
    if (p->which == LIFTED) e = dlm_model_clone(m, d->ctx, d->model[PLAIN], NULL);
    else if (p->which != STUDENT) e = dlm_model_create(m, d->ctx, &cfg, 1, NULL);
    else                                     /* shifted: it keeps its habit          */
        e = dlm_convert(m, d->ctx, teacher, BLOCK, d->tok->mask, 1, NULL);
    if (e) return e;
    how.total = steps * p->updates, how.warmup = how.total / 10;
    how.schedule = DLM_SCHEDULE_COSINE;
    e = dlm_trainer_create(&d->trainer, d->ctx, *m, &how, NULL);
    if (e || p->which != STUDENT) return e;
    return dlm_distiller_create(&d->distiller, d->trainer, teacher, &o, NULL);
}

/* How many steps fit?  Times some with a model that is thrown away, because the
   schedule of the learning rate has to know the number beforehand. */
static dlm_error plan(struct demo *d, const struct phase *p)
{
    double begin = seconds(), t0 = begin;
    dlm_error e = make(d, p, 100);
    for (int step = 0; step <= TIMED && !e; step++) {
        if (step == 1) t0 = seconds();       /* the first one warms up               */
        e = p->step(d, step);
    }
    double now = seconds(), fit = (p->seconds - (now - begin)) * TIMED / (now - t0);
    d->steps[p->which] = fit < 10.0 ? 10 : fit > 5000.0 ? 5000 : (int)fit;
    return e ? e : make(d, p, d->steps[p->which]);
}

static dlm_error learn(struct demo *d, const struct phase *p)
{
    double begin = seconds();
    dlm_error e = plan(d, p);
    double t0 = seconds(), now = t0, shown = t0;
    int *steps = &d->steps[p->which];
    for (int step = 1; step <= *steps && !e; step++) {
        e = p->step(d, step);
        now = seconds();
        if (now - begin > LATE * p->seconds) *steps = step;       /* a busy machine   */
        if (e || (now - shown < 2.0 && step < *steps)) continue;
        printf("%s %4d of %d  %s  %3.0f s left\n", p->step_name, step, *steps, d->note,
               (now - t0) / step * (*steps - step));
        shown = now;
    }
    return e;
}

/* ---- an autoregressive teacher ---- */

static dlm_error step_teacher(struct demo *d, int step)
{
    dlm_report r = {0};
    dlm_error e = dlm_trainer_step_text(d->trainer, ids, d->n_train, T, B, &r);
    (void)step;
    snprintf(d->note, sizeof d->note, "loss %.3f nats/char", r.loss);
    return e;
}

static dlm_error stage_teacher(struct demo *d)
{
    static const struct phase p = {
        .which = TEACHER, .seconds = 11.0, .step_name = "step", .step = step_teacher,
        .cfg = {.pattern = DLM_PATTERN_CAUSAL, .dim = 128, .layers = 3, .heads = 4,
                .ffn = 384, .max_seq = T, .rope_theta = 100.0f},
        .how = {.max_rows = B * T, .lr = 1.5e-3f, .lr_min = 1e-4f}, .updates = 1};
    dlm_error e = learn(d, &p);
    if (!e && d->steps[TEACHER] < 300)
        printf("(a slow or busy machine: expect letters rather than words)\n");
    return e;
}

/* ---- writing ---- */

/* Prints the first canvas as it is after a step of the sampler. */
static void draw_text(const struct demo *d, int step)
{
    static const int ramp[] = {197, 208, 220, 154, 48, 45, 69, 135};
    const struct timespec pause = {0, 60000000};
    char c[16];
    if (d->live) printf("\r");
    else printf("%3d  ", step);
    for (int i = 0; i < WATCHED; i++) {
        const int masked = d->canvas[0][i] == d->tok->mask;
        dlm_decode(d->tok, &d->canvas[0][i], 1, c, sizeof c);
        if (d->live) printf("\033[38;5;%dm", masked ? 240 : ramp[d->born[0][i] % 8]);
        printf("%s%s", masked ? "." : c, d->live ? "\033[0m" : "");
    }
    if (d->live) nanosleep(&pause, NULL);
    else printf("\n");
}

static void after_step(void *user, const dlm_event *events, int n)
{
    struct demo *d = (struct demo *)user;
    for (int i = 0; i < n; i++) {
        d->born[events[i].seq][events[i].position] = events[i].step;
        d->forwards += i == 0 || events[i].seq != events[i - 1].seq;
    }
    d->chars += n;
    if (d->watched) draw_text(d, events[0].step);
}

/* Lets a model go on from some places of a text, in n canvases.  Every step takes all it
   is 90 % sure of, and at least one character; an autoregressive model takes one. */
static dlm_error write_texts(struct demo *d, const dlm_model *m, int n, int length,
                             uint32_t number, const int *start, size_t size)
{
    uint32_t names[TEXTS];
    int lengths[TEXTS];
    dlm_session *session = NULL;
    dlm_sampler *sampler = NULL;
    dlm_limits limits = {.seqs = n, .slots = T, .cached = 1};
    dlm_sample_options how = {
        .order = DLM_ORDER_THRESHOLD, .left_first = 1, .ids = names,
        .temperature = d->watched ? 0.4f : 1.0f, .on_step = after_step,
        .step_user = d};
    for (int k = 0; k < n; k++) {
        dlm_address at = {1, DLM_RANDOM_USER + 1, 0, number + (uint32_t)k, 0};
        const int *from = start + (size_t)(dlm_uniform(&at, 0) * (double)(size - T));
        for (int i = 0; i < length; i++)
            d->canvas[k][i] = i < GIVEN ? from[i] : m->config.mask_id, d->born[k][i] = 0;
        names[k] = at.row, lengths[k] = length;
    }
    dlm_error e = dlm_session_create(&session, d->ctx, m, &limits, NULL);
    if (!e) e = dlm_sampler_create(&sampler, session, &how, NULL);
    if (!e) e = dlm_sampler_begin(sampler, d->canvas[0], lengths, n);
    while (!e && !dlm_sampler_done(sampler)) e = dlm_sampler_step(sampler);
    dlm_sampler_free(sampler);
    dlm_session_free(session);
    return e;
}

static dlm_error stage_watch(struct demo *d)
{
    int start[T];
    size_t n;
    dlm_error e = dlm_encode(d->tok, "a friend", GIVEN, start, GIVEN, &n);
    d->watched = 1;
    if (!e) e = write_texts(d, d->model[STUDENT], 1, WATCHED, 0, start, T);
    d->watched = 0;
    if (d->live) printf("\n");
    return e;
}

static dlm_error stage_infill(struct demo *d)
{
    static const char *const forms[] = {
        "the sailor f____ the silver key near the river at night. ",
        "in winter my sister paints a red _____ on the hill. "};
    dlm_error e = DLM_OK;
    for (size_t f = 0; f < sizeof forms / sizeof *forms && !e; f++) {
        int canvas[T] = {0};
        char line[T];
        size_t n = strlen(forms[f]);
        for (size_t i = 0; i < n; i++) line[i] = forms[f][i] == '_' ? ' ' : forms[f][i];
        e = dlm_encode(d->tok, line, n, canvas, T, &n);
        for (size_t i = 0; i < n; i++)
            if (forms[f][i] == '_') canvas[i] = d->tok->mask;
        if (!e) e = dlm_sample(d->ctx, d->model[STUDENT], canvas, (int)n, NULL);
        dlm_decode(d->tok, canvas, n, line, sizeof line);
        if (!e) printf("%s\n%s\n", forms[f], line);
    }
    return e;
}

/* ---- conversion ---- */

/* The student writes and learns what the teacher would have said.  That one knows only
   what is on the left, so that the student learns from the corpus, too. */
static dlm_error step_student(struct demo *d, int round)
{
    dlm_example ex[TEXTS];
    dlm_report own = {0}, corpus = {0};
    d->chars = d->forwards = 0.0;
    dlm_error e = write_texts(d, d->model[STUDENT], TEXTS, LENGTH,
                              (uint32_t)(round * TEXTS), ids, d->n_train);
    for (int k = 0; k < TEXTS; k++)
        ex[k] = (dlm_example){d->canvas[k], LENGTH, GIVEN, 0, d->born[k]};
    if (!e) e = dlm_distiller_step(d->distiller, ex, TEXTS, &own);
    for (int k = 0; k < READINGS && !e; k++)
        e = dlm_trainer_step_text(d->trainer, ids, d->n_train, T, WINDOWS, &corpus);
    snprintf(d->note, sizeof d->note, "divergence %.3f  corpus %.3f  %.2f tokens/step",
             own.loss, corpus.loss, d->chars / d->forwards);
    return e;
}

static dlm_error stage_convert(struct demo *d)
{
    static const struct phase p = {
        .which = STUDENT, .seconds = 25.0, .step_name = "round", .step = step_student,
        .how = {.max_rows = 2 * WINDOWS * T, .lr = 1e-3f, .lr_min = 1e-5f,
                .level_min = 0.2f, .level_max = 0.9f}, .updates = 1 + READINGS};
    return learn(d, &p);
}

/* ---- Sudoku ---- */

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

static dlm_error step_sudoku(struct demo *d, int step)
{
    int puzzles[BATCH][2 * CELLS];
    dlm_example ex[BATCH];
    dlm_report r = {0};
    for (int k = 0; k < BATCH; k++) {
        make_puzzle(puzzles[k], (uint32_t)(step * BATCH + k), 0);
        ex[k] = (dlm_example){puzzles[k], 2 * CELLS, CELLS, 0, NULL};
    }
    dlm_error e = dlm_trainer_step(d->trainer, ex, BATCH, &r);
    snprintf(d->note, sizeof d->note, "loss %.3f nats/cell", r.loss);
    return e;
}

/* Prints what is known of the solution: over the last one, or as one line. */
static void draw_grid(void *user, const dlm_event *events, int n)
{
    const struct timespec pause = {0, 120000000};
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
    if (d->live) nanosleep(&pause, NULL);
}

/* Solves unseen puzzle `number`, one cell per step, the surest first. */
static dlm_error solve(struct demo *d, int which, uint32_t number, int watched,
                       int *right)
{
    int puzzle[2 * CELLS];
    dlm_sample_options how = {0};
    make_puzzle(puzzle, number, 1);
    for (int i = 0; i < 2 * CELLS; i++) d->canvas[0][i] = i < CELLS ? puzzle[i] : MASK;
    if (watched) how.on_step = draw_grid, how.step_user = d, draw_grid(d, NULL, 0);
    dlm_error e = dlm_sample(d->ctx, d->model[which], d->canvas[0], 2 * CELLS, &how);
    *right = !memcmp(d->canvas[0], puzzle, sizeof puzzle);
    return e;
}

static dlm_error stage_sudoku(struct demo *d)
{
    struct phase p = {
        .which = PLAIN, .seconds = 9.5, .step_name = "step", .step = step_sudoku,
        .cfg = {.vocab = MASK + 1, .pattern = DLM_PATTERN_FULL, .max_seq = 2 * CELLS,
                .dim = 64, .layers = 3, .heads = 4, .rope_theta = 10.0f},
        .how = {.max_rows = 2 * CELLS * BATCH, .lr = 3e-3f, .lr_min = 3e-4f,
                .weight_decay = 0.1f, .level_min = 0.3f}, .updates = 1};
    int grid[CELLS] = {0}, right = 0;
    dlm_error e = DLM_OK;
    complete(grid, grids, 0);
    for (int m = PLAIN; m <= LIFTED && !e; m++) {
        e = learn(d, &p);
        double t0 = seconds();
        for (int *n = &d->tested[m]; *n < PUZZLES && seconds() - t0 < TEST && !e;
             ++*n, d->exact[m] += right) e = solve(d, m, (uint32_t)*n, 0, &right);
        printf("exact: %d of %d unseen puzzles\n", d->exact[m], d->tested[m]);
        p.which = LIFTED, p.seconds = 5.0, p.step_name = "LIFT step";
        p.how.lr = 1e-3f, p.how.lr_min = 1e-5f, p.how.level_min = 0.0f;
        p.how.lift.method = DLM_METHOD_LIFT3, p.how.lift.policy = DLM_POLICY_TIME;
    }
    if (!e) e = solve(d, LIFTED, 0, 1, &right);
    if (!e) printf("%s\n", right ? "solved" : "not solved");
    return e;
}

/* ---- table ---- */

/* A row of the table; MODELS is the held-out text.  The teacher says how likely a text
   is; what was given in it does not count. */
static dlm_error judge(struct demo *d, const char *name, int which)
{
    const dlm_model *m = which < MODELS ? d->model[which] : NULL;
    const int *held = ids + d->n_train;
    const size_t size = d->n - d->n_train;
    dlm_session *session = NULL;
    double begin = seconds(), writing = 0.0, nats = 0.0, n = 0.0, log_p = 0.0;
    dlm_error e = dlm_session_create(&session, d->ctx, d->model[TEACHER], NULL, NULL);
    d->chars = d->forwards = 0.0;
    for (size_t k = 0; k < SAMPLES && seconds() - begin < TEST && !e; k += TEXTS) {
        writing -= seconds();
        if (m) e = write_texts(d, m, TEXTS, T, (uint32_t)k, held, size);
        writing += seconds();
        for (size_t i = 0; i < TEXTS && !e; i++) {
            const int *tokens = m ? d->canvas[i] : held + (k + i) * (size - T) / SAMPLES;
            e = dlm_log_likelihood(session, tokens, T, GIVEN, 1, 0, &log_p);
            nats -= log_p, n += T - GIVEN;
        }
    }
    dlm_session_free(session);
    if (e) return e;
    printf("%-10s %19.3f", name, nats / n);
    if (m) printf("%15.2f %7.0f %6d %11d", d->chars / d->forwards, d->chars / writing,
                  d->steps[which], (int)m->n_params);
    printf("\n");
    return e;
}

static dlm_error stage_table(struct demo *d)
{
    printf("text by    teacher's nats/char  chars/forward chars/s  steps  parameters\n");
    dlm_error e = judge(d, "(held out)", MODELS);
    if (!e) e = judge(d, "teacher", TEACHER);
    if (!e) e = judge(d, "student", STUDENT);
    printf("\nSudoku after             exact\n");
    for (int m = PLAIN; m <= LIFTED; m++)
        printf("%-10s %12d of %3d %29d %11d\n", m == PLAIN ? "training" : "LIFT, too",
               d->exact[m], d->tested[m], d->steps[m],
               (int)d->model[m]->n_params);
    printf("\n%d threads, %s kernels, %.0f s in all\n", dlm_active_threads(d->ctx),
           dlm_isa_name(dlm_active_isa(d->ctx)), seconds() - d->begin);
    return e;
}

int main(int argc, char **argv)
{
    static const struct { const char *name; dlm_error (*run)(struct demo *); } stage[] = {
        {"a text", stage_text}, {"an autoregressive teacher", stage_teacher},
        {"conversion (OPDLM)", stage_convert}, {"denoising", stage_watch},
        {"filling in", stage_infill}, {"Sudoku (LIFT)", stage_sudoku},
        {"table", stage_table}};
    struct demo d = {0};
    char why[256] = "";                      /* for a context that fails             */
    dlm_options options = {.threads = THREADS, .message = why, .message_size = 256};
    const char *plain = getenv("NO_COLOR");
    if (argc > 1) {
        puts("usage: demo        it takes no arguments");
        return strcmp(argv[1], "--help") ? 2 : 0;
    }
    setvbuf(stdout, NULL, _IONBF, 0);
    d.begin = seconds();
    d.live = isatty(1) && !(plain && *plain);
    dlm_error e = dlm_init(&d.ctx, &options);
    for (size_t s = 0; s < sizeof stage / sizeof *stage && !e; s++) {
        printf("\n== %s (%.0f s)\n", stage[s].name, seconds() - d.begin);
        e = stage[s].run(&d);
    }
    if (e) fprintf(stderr, "%s: %s\n", dlm_error_string(e),
                   *why ? why : dlm_last_error(d.ctx));
    for (int m = MODELS; m-- > 0;) forget(&d, m);
    dlm_tokenizer_free(d.tok);
    dlm_shutdown(d.ctx);
    return e != DLM_OK;
}
