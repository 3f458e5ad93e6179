/* picture.c - draws how a canvas of masks becomes text: the picture in README.md.

   Build:  make build/picture
   Run:    DLM_ISA=avx2 build/picture > bench/denoising.svg
   See:    a model with full attention learns sentences that are made up here, fills in
           one canvas, and its trace (dlm_sampler_trace) becomes an SVG: a row per step,
           the colour of a character is the step in which it was filled in.

   Half a minute on two cores.  Steps and seeds are fixed and threads change nothing: the
   same picture every time; another compiler or instruction set may draw another text. */
#define DLM_IMPLEMENTATION
#include "dlm.h"
#include <stdio.h>
#include <string.h>

enum { T = 69, BATCH = 8, UPDATES = 4000,
       SEED = 43,                            /* one text in eight has no slip, as this */
       CELL = 13, ROW = 22, LEFT = 48, TOP = 62, RIGHT = 22, BOTTOM = 26 };

/* ---- sentences ---- */

/* One canvas full: two sentences of a small grammar, the time at the end or in front. */
static void make_line(char line[T + 1], uint32_t number)
{
    static const char *const words[4][4] = {
        {"the baker", "my sister", "the queen", "the robin"},
        {"paints", "guards", "adores", "misses"},
        {"a comet", "the sea", "a clock", "a river"},
        {"at night", "in april", "all year", "tomorrow"}};
    static const int orders[2][4] = {{0, 1, 2, 3}, {3, 0, 1, 2}};
    const dlm_address at = {1, DLM_RANDOM_USER, 0, number, 0};
    size_t n = 0;
    for (uint32_t k = 0; k < 8; k++) {
        const int *order = orders[(int)(2.0 * dlm_uniform(&at, 8 + k / 4))];
        n += (size_t)snprintf(line + n, T + 1 - n, "%s%s",
                              words[order[k % 4]][(int)(4.0 * dlm_uniform(&at, k))],
                              k == 7 ? "." : k == 3 ? ". " : " ");
    }
}

static dlm_error train(dlm_trainer *trainer, const dlm_tokenizer *tok)
{
    static int ids[BATCH][T];
    dlm_example ex[BATCH];
    dlm_error e = DLM_OK;
    dlm_report r;
    for (uint32_t step = 0; step < UPDATES && !e; step++) {
        for (uint32_t i = 0; i < BATCH && !e; i++) {
            char line[T + 1];
            size_t n;
            make_line(line, step * BATCH + i);
            e = dlm_encode(tok, line, T, ids[i], T, &n);
            memset(&ex[i], 0, sizeof ex[i]);
            ex[i].tokens = ids[i], ex[i].length = T;
        }
        if (!e) e = dlm_trainer_step(trainer, ex, BATCH, &r);
        if (!e && (step + 1) % 500 == 0)
            fprintf(stderr, "step %4d: loss %.3f\n", (int)step + 1, r.loss);
    }
    return e;
}

/* ---- drawing ---- */

/* The colour of a step, from the first to the last of n. */
static void print_colour(int step, int n)
{
    static const int stops[6][3] = {{255, 92, 138}, {255, 150, 80}, {255, 209, 92},
                                    {110, 222, 138}, {76, 190, 245}, {160, 140, 255}};
    const double x = n > 1 ? 5.0 * (step - 1) / (n - 1) : 0.0;
    const int k = x < 4.0 ? (int)x : 4;
    putchar('#');
    for (int c = 0; c < 3; c++)
        printf("%02x", (unsigned)(stops[k][c] * (k + 1 - x) + stops[k + 1][c] * (x - k)));
}

/* Its own dark ground, so that it looks the same on a white page and on a black one. */
static void print_head(int width, int height, int steps)
{
    printf("<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %d\" width=\"%d\" "
           "height=\"%d\">\n<title>A canvas of masks becomes text</title>\n<style>\n"
           "text{font:15px ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',"
           "monospace;text-anchor:middle}\n"
           ".h{font:16px system-ui,-apple-system,'Segoe UI','DejaVu Sans',sans-serif;"
           "fill:#c9d4e5;text-anchor:start}\n"
           ".n{font-size:12px;fill:#7d8aa0;text-anchor:end}\n"
           "path{stroke-width:3;stroke-linejoin:round}\n"
           ".m{fill:#252d3d;stroke:#252d3d}.d{opacity:.22}\n", width, height,
           width, height);
    for (int step = 1; step <= steps; step++) {
        printf("path.c%d{stroke:", step), print_colour(step, steps);
        printf("}.c%d{fill:", step), print_colour(step, steps), printf("}\n");
    }
    printf("g.w{fill:#10151f}\n</style>\n<rect width=\"%d\" height=\"%d\" rx=\"14\" "
           "fill=\"#10151f\"/>\n", width, height);
}

/* In the row at height y: the cells filled in by step `born` and their letters, bright
   or dimmed; born 0: the cells that are masks after step `row`. */
static void print_cells(const char *text, const int *when, int y, int row, int born,
                        int bright)
{
    int n = 0;
    for (int i = 0; i < T; i++) {
        if (born ? when[i] != born : when[i] <= row) continue;
        if (!n++) printf(born && !bright ? "<path class=\"d c%d\" d=\"" : born
                         ? "<path class=\"c%d\" d=\"" : "<path class=\"m\" d=\"", born);
        printf("M%d %dh%dv%dh-%dz", LEFT + i * CELL + 2, y + 2, CELL - 5, ROW - 5,
               CELL - 5);
    }
    if (!n) return;
    printf("\"/>\n");
    if (!born) return;
    printf("<g class=\"%s%d\">", bright ? "w c" : "c", born);
    for (int i = 0; i < T; i++)
        if (when[i] == born && text[i] != ' ')
            printf("<text x=\"%d\" y=\"%d\">%c</text>", LEFT + i * CELL + CELL / 2,
                   y + 15, text[i]);
    printf("</g>\n");
}

/* text (T) as it came out; when[i] is the step in which character i did, of `steps`. */
static void draw(const char *text, const int *when, int steps)
{
    const int last = TOP + (steps + 1) * ROW + ROW / 2;
    print_head(LEFT + T * CELL + RIGHT, last + ROW + BOTTOM, steps);
    printf("<text class=\"h\" x=\"%d\" y=\"36\">%d masks become text in %d steps: the "
           "surest first, each read from what stands on both sides</text>\n", LEFT, T,
           steps);
    for (int row = 0; row <= steps; row++) {
        const int y = TOP + row * ROW;
        printf("<text class=\"n\" x=\"%d\" y=\"%d\">%d</text>\n", LEFT - 10, y + 15, row);
        for (int born = 0; born <= row; born++)
            print_cells(text, when, y, row, born, born == row);
    }
    for (int born = 1; born <= steps; born++)    /* the whole text once more, bright */
        print_cells(text, when, last, steps, born, 1);
    printf("</svg>\n");
}

/* Fills in the masks of a canvas (T): per step as many as it can be sure of together. */
static dlm_error fill_in(dlm_ctx *ctx, const dlm_model *model, int *canvas, int *when,
                         int *steps)
{
    dlm_session *session = NULL;
    dlm_sampler *sampler = NULL;
    dlm_sample_options how = {0};
    int length = T, n = 0;
    for (int i = 0; i < T; i++) canvas[i] = model->config.mask_id;
    how.order = DLM_ORDER_ENTROPY_BOUND, how.entropy_bound = 0.7f;
    how.temperature = 0.6f, how.seed = SEED;
    dlm_error e = dlm_session_create(&session, ctx, model, NULL, NULL);
    if (!e) e = dlm_sampler_create(&sampler, session, &how, NULL);
    if (!e) e = dlm_sampler_begin(sampler, canvas, &length, 1);
    while (!e && !dlm_sampler_done(sampler)) e = dlm_sampler_step(sampler);
    const dlm_event *events = e ? NULL : dlm_sampler_trace(sampler, &n);
    for (int i = 0; i < n; i++) when[events[i].position] = *steps = events[i].step;
    dlm_sampler_free(sampler);
    dlm_session_free(session);
    return e;
}

int main(int argc, char **argv)
{
    const char *const letters = "abcdefghijklmnopqrstuvwxyz. ";
    int canvas[T], when[T] = {0}, steps = 0;
    char text[T + 1], why[256] = "";
    dlm_ctx *ctx = NULL;
    dlm_tokenizer *tok = NULL;
    dlm_model *model = NULL;
    dlm_trainer *trainer = NULL;
    dlm_options machine = {0};
    dlm_config cfg = {0};
    dlm_train_options how = {0};

    if (argc > 1) {
        puts("usage: picture > denoising.svg        it takes no arguments");
        return strcmp(argv[1], "--help") ? 2 : 0;
    }
    machine.threads = 2, machine.message = why, machine.message_size = sizeof why;
    how.max_rows = BATCH * T, how.lr = 3e-3f, how.lr_min = 1e-5f, how.warmup = 100;
    how.total = UPDATES, how.schedule = DLM_SCHEDULE_COSINE;
    cfg.pattern = DLM_PATTERN_FULL, cfg.max_seq = T, cfg.rope_theta = 100.0f;
    cfg.dim = 64, cfg.layers = 3, cfg.heads = 4;
    dlm_error e = dlm_init(&ctx, &machine);
    if (!e) e = dlm_tokenizer_create(&tok, ctx, DLM_TOKENIZER_CHARS, letters, 28);
    if (!e) cfg.vocab = tok->vocab;
    if (!e) e = dlm_model_create(&model, ctx, &cfg, 1, NULL);
    if (!e) e = dlm_trainer_create(&trainer, ctx, model, &how, NULL);
    if (!e) e = train(trainer, tok);
    if (!e) e = fill_in(ctx, model, canvas, when, &steps);
    if (!e) {
        dlm_decode(tok, canvas, T, text, sizeof text);
        fprintf(stderr, "%s\n", text);
        draw(text, when, steps);
    } else {
        fprintf(stderr, "%s: %s\n", dlm_error_string(e),
                *why ? why : dlm_last_error(ctx));
    }
    dlm_trainer_free(trainer);
    dlm_model_free(model);
    dlm_tokenizer_free(tok);
    dlm_shutdown(ctx);
    return e != DLM_OK || fflush(stdout) != 0;
}
