/* 02_train_text.c - train a block-diffusion model on a text file; stop, resume.

   Build:  cc -O2 -I.. 02_train_text.c -o train_text -lm -pthread
   Run:    ./train_text [text file or -] [checkpoint] [steps] [f32 or bf16] [width] [bpe]
   See:    a line every second; before and after, the loss on the held-out last tenth
           (see README.md).  No file: a made-up text.  Ctrl-C saves; the same goes on.
           bpe 512 .. 8192: not characters but so many byte pairs of the text, learned. */
#define _POSIX_C_SOURCE 200112L              /* clock_gettime under -std=c99         */
#define DLM_IMPLEMENTATION
#include "dlm.h"
#include "train_bpe.h"
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { THREADS = 2, T = 128, B = 4, WINDOWS = 64, MAX_TEXT = 1 << 25, HEAD = 32 };
static char text[MAX_TEXT];
static int ids[MAX_TEXT];
static dlm_ctx *ctx;
static char why[256];                        /* what failed, if it is not ctx's      */

static volatile sig_atomic_t interrupted;
static void on_interrupt(int number) { (void)number; interrupted = 1; }

static void require(dlm_error e)
{
    if (e == DLM_OK) return;
    fprintf(stderr, "%s: %s\n", dlm_error_string(e), *why ? why : dlm_last_error(ctx));
    exit(1);
}

static void refuse(const char *path, const char *sentence)
{
    fprintf(stderr, "%s: %s\n", path, sentence);
    exit(1);
}

static double seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* 300 KB of sentences of a small grammar, always the same ones. */
static size_t make_text(void)
{
    static const char *const words[4][6] = {
        {"the sailor ", "a young fox ", "my sister ", "the baker ", "a friend ", "he "},
        {"carries ", "finds ", "watches ", "hides ", "remembers ", "paints "},
        {"the silver key ", "a wooden boat ", "some honey ", "a letter ", "it ", "me "},
        {"in the forest. ", "by the river. ", "at home. ", "here. ", "again. ", "now. "}};
    dlm_address at = {1, DLM_RANDOM_USER, 0, 0, 0};
    size_t n = 0;
    for (; n < 300000; at.step++)
        n += (size_t)sprintf(text + n, "%s",
                             words[at.step % 4][(int)(6.0 * dlm_uniform(&at, 0))]);
    return n;
}

static size_t read_text(const char *path)
{
    FILE *input = fopen(path, "rb");
    size_t n = input ? fread(text, 1, MAX_TEXT, input) : 0;
    if (!input || ferror(input)) refuse(path, "cannot be read");
    fclose(input);
    if (n < 80 * T || n == MAX_TEXT) refuse(path, "10 KB .. 32 MB of text are needed");
    return n;
}

/* Is there such a file?  One that could not be written is refused before the training,
   not after it; what is there stays as it is. */
static int exists(const char *path)
{
    FILE *there = fopen(path, "rb"), *f = fopen(path, "ab");
    if (!f) refuse(path, "cannot be written");
    fclose(f);
    return there ? fclose(there), 1 : (remove(path), 0);
}

/* Nats per token for a model that knows how frequent each one is, no more. */
static double unigram_entropy(size_t n, int vocab)
{
    double sum = 0.0, *count = calloc((size_t)vocab, sizeof *count);
    for (size_t i = 0; count && i < n; i++) count[ids[i]] += 1.0;
    for (int v = 0; count && v < vocab; v++)
        if (count[v] > 0.0) sum -= count[v] / (double)n * log(count[v] / (double)n);
    free(count);
    return sum;
}

/* Loss without learning, on windows spread over ids[first .. n). */
static void evaluate(dlm_trainer *t, size_t first, size_t n)
{
    dlm_example windows[WINDOWS] = {{0}};
    dlm_report r;
    for (size_t i = 0; i < WINDOWS; i++) {
        windows[i].tokens = ids + first + i * (n - first - T) / WINDOWS;
        windows[i].length = T;
    }
    require(dlm_trainer_evaluate(t, windows, WINDOWS, 0, &r));
    printf("step %5d: held-out loss %.3f\n", (int)t->steps, r.loss);
}

static void train(dlm_trainer *t, size_t n, int steps)
{
    double t0 = seconds(), shown = t0, tokens = 0.0;
    int64_t first = t->steps;
    while (t->steps < steps && !interrupted) {
        dlm_report r;
        require(dlm_trainer_step_text(t, ids, n, T, B, &r));
        double now = seconds();
        tokens += (double)r.tokens;
        if (now - shown < 1.0) continue;
        double per_step = (now - t0) / (double)(r.step - first);
        printf("step %5d: loss %.3f nats, %.0f tokens/s, %.0f s left\n", (int)r.step,
               r.loss, tokens / (now - t0), (double)(steps - r.step) * per_step);
        fflush(stdout);
        shown = now;
    }
}

/* A new model for the text, or the one of a run that was stopped and has its tokens. */
static void open_model(dlm_model **model, dlm_tokenizer **tok, const char *path,
                       int resumed, int width, int bpe, size_t size, size_t *n)
{
    dlm_config cfg = {0};
    if (!resumed) {
        size_t part = size < 1 << 20 ? size : 1 << 20;       /* has most words       */
        require(bpe ? train_bpe(tok, ctx, bpe, text, part, why, sizeof why)
                    : dlm_tokenizer_create(tok, ctx, DLM_TOKENIZER_CHARS, text, size));
        cfg.vocab = (*tok)->vocab, cfg.max_seq = T, cfg.block = 8;
        cfg.dim = width, cfg.layers = 3, cfg.heads = width / HEAD, cfg.ffn = 3 * width;
        cfg.rope_theta = 100;
        require(dlm_model_create(model, ctx, &cfg, 1, NULL));
    } else {
        require(dlm_load(model, tok, ctx, path));
        if (!*tok) refuse(path, "holds no tokenizer");
        if ((*model)->config.max_seq < T) refuse(path, "not a model of this program");
    }
    dlm_error e = dlm_encode(*tok, text, size, ids, MAX_TEXT, n);
    if (e) fprintf(stderr, "%s is of another text; give another checkpoint\n", path);
    require(e);
    if (*n < 20 * T) refuse(path, "the text has too few tokens");
}

int main(int argc, char **argv)
{
    const char *path = argc > 2 ? argv[2] : "model.safetensors";
    const char *precision = argc > 4 ? argv[4] : "f32";
    int steps = argc > 3 ? atoi(argv[3]) : 1000, made = argc < 2 || !strcmp(argv[1], "-");
    int width = argc > 5 ? atoi(argv[5]) : 160, bpe = argc > 6 ? atoi(argv[6]) : 0;
    char state[1024];
    size_t size, n = 0, n_train;
    dlm_tokenizer *tok = NULL;
    dlm_model *model = NULL;
    dlm_trainer *trainer = NULL;
    dlm_options options = {0};
    dlm_train_options how = {0};
    if (argc > 7 || (!made && argv[1][0] == '-') || steps < 1 || width < HEAD
        || width % HEAD || width > 32 * HEAD || (argc > 6 && (bpe < 512 || bpe > 8192))
        || (strcmp(precision, "f32") && strcmp(precision, "bf16"))) {
        puts("usage: train_text [text] [checkpoint] [steps] [f32 or bf16] [width] [bpe]\n"
             "       else - (made up) model.safetensors 1000 f32 160 characters");
        return strcmp(argv[1], "--help") ? 2 : 0;
    }
    options.threads = THREADS;               /* changes the time, never the result   */
    options.message = why, options.message_size = sizeof why;
    require(dlm_init(&ctx, &options));
    size = made ? make_text() : read_text(argv[1]);
    if (snprintf(state, sizeof state, "%s.train", path) >= (int)sizeof state)
        refuse(path, "too long a name");
    int old = exists(path), resumed = exists(state);     /* a run that was stopped?   */
    if (old && !resumed) refuse(path, "is there, but no .train to go on from");
    open_model(&model, &tok, path, resumed, width, bpe, size, &n);
    n_train = n - n / 10;                    /* the rest is held out                 */
    how.max_rows = 2 * B * T, how.lr = 1e-3f, how.warmup = steps / 10, how.total = steps;
    how.schedule = DLM_SCHEDULE_COSINE, how.lr_min = 5e-5f, how.weight_decay = 0.01f;
    if (!strcmp(precision, "bf16")) how.precision = DLM_BF16;
    require(dlm_trainer_create(&trainer, ctx, model, &how, NULL));
    if (resumed) require(dlm_trainer_load(trainer, state));
    if (resumed) printf("%s: from step %d on\n", state, (int)trainer->steps);
    printf("%d parameters, %d tokens; single tokens: %.3f nats/token\n",
           (int)model->n_params, (int)n, unigram_entropy(n, model->config.vocab));
    signal(SIGINT, on_interrupt);            /* from here on, Ctrl-C saves first     */
    evaluate(trainer, n_train, n);
    train(trainer, n_train, steps);
    evaluate(trainer, n_train, n);
    require(dlm_save(ctx, path, model, tok));
    require(dlm_trainer_save(trainer, state));
    printf("saved; the same command %s\n", interrupted ? "goes on" : "evaluates");
    dlm_trainer_free(trainer);
    dlm_model_free(model);
    dlm_tokenizer_free(tok);
    dlm_shutdown(ctx);
    return 0;
}
