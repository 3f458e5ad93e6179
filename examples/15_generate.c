/* 15_generate.c - open a published model and let it write, one token or many at a time.

   Build:  cc -O2 -I.. 15_generate.c -o generate -lm -pthread
   Run:    ./generate folder "prompt" [options]           any folder that dlm_open knows
             -n 64       tokens to write         -type i8    f32, bf16 or i8 (default)
             -chat       the prompt is a user's turn (ChatML, no thinking)
             -t 0.7      temperature, 0: argmax  -threshold 0.9  all that is so sure
             -block 4    -mask 151669    -family smdm    what the files do not say
             -absolute   blocks from position 0 on (SDAR, OPDLM)
             -canvas     the prompt is a canvas: write where it says [?]
   See:    the text as far as it is final, then tokens per second and per forward. */
#define _POSIX_C_SOURCE 199309L              /* clock_gettime under -std=c99         */
#define DLM_IMPLEMENTATION
#include "dlm.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { MAX = 4096 };
static int canvas[MAX];
static char text[16 * MAX];

typedef struct settings {
    const char *folder, *prompt;
    int length, chat, infill;
    dlm_open_options open;
    dlm_sample_options how;
} settings;

typedef struct stream {                      /* what on_step needs                   */
    const dlm_tokenizer *tok;
    size_t shown;                            /* bytes                                */
    int T, mask;
} stream;

/* Prints what is final: whole characters of everything up to the first mask. */
static void show(void *user, const dlm_event *events, int n_events)
{
    stream *s = (stream *)user;
    int end = 0;
    size_t size;
    (void)events;                            /* the canvas says it all               */
    while (end < s->T && canvas[end] != s->mask) end++;
    size = dlm_decode(s->tok, canvas, (size_t)end, text, sizeof text);
    size = size < sizeof text ? size : sizeof text - 1;
    if (n_events) size = dlm_whole_text(text, size);
    for (; s->shown < size; s->shown++) putchar(text[s->shown]);
    fflush(stdout);
}

static int number(const char *name, const char *word, const char *value, double *out)
{
    if (strcmp(name, word) != 0 || value == NULL) return 0;
    *out = atof(value);
    return 1;
}

/* 1 when the option and its value, if it has one, are understood; *used: how many. */
static int option(settings *s, char **arg, int *used)
{
    double x;
    *used = 1;
    if (strcmp(arg[0], "-chat") == 0) return s->chat = 1;
    if (strcmp(arg[0], "-canvas") == 0) return s->infill = 1;
    if (strcmp(arg[0], "-absolute") == 0) return s->how.absolute_blocks = 1;
    *used = 2;
    if (number(arg[0], "-n", arg[1], &x)) return (s->length = (int)x) > 0;
    if (number(arg[0], "-block", arg[1], &x)) return (s->open.block = (int)x) != 0;
    if (number(arg[0], "-mask", arg[1], &x)) return (s->open.mask_id = (int)x) > 0;
    if (number(arg[0], "-t", arg[1], &x)) {
        s->how.temperature = (float)x;
        return x >= 0;
    }
    if (number(arg[0], "-threshold", arg[1], &x)) {
        s->how.order = DLM_ORDER_THRESHOLD;
        s->how.threshold = (float)x;
        return x > 0;
    }
    if (arg[1] && strcmp(arg[0], "-family") == 0) {
        s->open.family = arg[1];
        return 1;
    }
    if (arg[1] && strcmp(arg[0], "-type") == 0) {
        s->open.type = arg[1][0] == 'b' ? DLM_BF16 : arg[1][0] == 'i' ? DLM_I8 : DLM_F32;
        return !strcmp(arg[1], "bf16") || !strcmp(arg[1], "i8") || !strcmp(arg[1], "f32");
    }
    return 0;
}

/* The prompt, or a user's turn, and masks; or a canvas with a mask for each [?].  Returns
   the tokens of the canvas, 0: an error, which why says. */
static int fill_canvas(const settings *s, const dlm_tokenizer *tok, const dlm_config *c,
                       char *why, size_t size)
{
    const char *from = s->prompt;
    size_t T = 0, n = 0;
    dlm_error e = DLM_OK;
    if (s->chat) {                           /* ChatML, with an empty think block    */
        snprintf(text, sizeof text, "<|im_start|>user\n%s<|im_end|>\n"
                 "<|im_start|>assistant\n<think>\n\n</think>\n\n", s->prompt);
        from = text;
    }
    while (!e && *from && T < MAX) {         /* the text up to a gap, and the gap    */
        const char *gap = s->infill ? strstr(from, "[?]") : NULL;
        size_t length = gap ? (size_t)(gap - from) : strlen(from);
        e = dlm_encode(tok, from, length, canvas + T, MAX - T, &n);
        T += n;
        from += length;
        for (; strncmp(from, "[?]", 3) == 0 && gap && T < MAX; from += 3)
            canvas[T++] = c->mask_id;
    }
    if (!e && !s->infill)
        for (int i = 0; i < s->length && T < MAX; i++) canvas[T++] = c->mask_id;
    if (s->chat && dlm_tokenizer_id(tok, "<|im_start|>") < 0)
        snprintf(why, size, "this tokenizer has no <|im_start|>: it knows no ChatML");
    else if (e) snprintf(why, size, "%s", dlm_last_error(tok->ctx));
    else if (s->infill && !strstr(s->prompt, "[?]"))
        snprintf(why, size, "no [?] in the canvas");
    else if (T >= MAX || (int)T > c->max_seq)
        snprintf(why, size, "more than the model's %d tokens", c->max_seq);
    else return (int)T;
    return 0;
}

static dlm_error generate(dlm_ctx *ctx, const dlm_model *model, dlm_tokenizer *tok,
                          settings *s, int T)
{
    const int masks_before = T;
    stream out = { tok, 0, T, model->config.mask_id };
    dlm_session *session = NULL;
    dlm_sampler *sampler = NULL;
    dlm_limits limits = {0};
    struct timespec from, to;
    int forwards, made = 0;
    double flops, seconds;
    limits.slots = T;
    limits.cached = model->config.pattern != DLM_PATTERN_FULL;
    s->how.on_step = show, s->how.step_user = &out;
    s->how.stop = &tok->stop, s->how.n_stop = tok->stop >= 0 && !s->infill;
    for (int i = 0; i < masks_before; i++) made += canvas[i] == model->config.mask_id;
    dlm_error e = dlm_session_create(&session, ctx, model, &limits, NULL);
    if (!e) e = dlm_sampler_create(&sampler, session, &s->how, NULL);
    if (!e) e = dlm_sampler_begin(sampler, canvas, &T, 1);
    clock_gettime(CLOCK_MONOTONIC, &from);
    while (!e && !dlm_sampler_done(sampler)) e = dlm_sampler_step(sampler);
    clock_gettime(CLOCK_MONOTONIC, &to);
    if (!e) {
        dlm_sampler_cost(sampler, &forwards, &flops);
        out.T = dlm_sampler_length(sampler, 0);
        made -= T - out.T;
        show(&out, NULL, 0);
        seconds = (double)(to.tv_sec - from.tv_sec)
            + 1e-9 * (double)(to.tv_nsec - from.tv_nsec);
        printf("\n\n%d tokens in %.2f s: %.1f tokens/s, %.2f per forward\n", made,
               seconds, made / seconds, (double)made / forwards);
    }
    dlm_sampler_free(sampler);
    dlm_session_free(session);
    return e;
}

int main(int argc, char **argv)
{
    settings s;
    char why[256] = "";                      /* where the library has no words yet   */
    dlm_ctx *ctx = NULL;
    dlm_tokenizer *tok = NULL;
    dlm_model *model = NULL;
    dlm_options options = {0};
    int used = 1, T = 0;
    memset(&s, 0, sizeof s);
    s.length = 64;
    s.open.type = DLM_I8;
    for (int i = 3; i < argc && used; i += used)
        if (!option(&s, argv + i, &used)) used = 0;
    if (argc < 3 || argv[1][0] == '-' || !used) {
        puts("usage: generate folder prompt [-n N] [-type f32|bf16|i8] [-chat] [-canvas] "
             "[-t T] [-threshold P] [-block N] [-mask ID] [-family NAME] [-absolute]");
        return argc > 1 && !strcmp(argv[1], "--help") ? 0 : 2;
    }
    s.folder = argv[1], s.prompt = argv[2];
    options.message = why, options.message_size = sizeof why;
    options.threads = 2;
    dlm_error e = dlm_init(&ctx, &options);
    if (!e) e = dlm_open(&model, &tok, ctx, s.folder, &s.open);
    if (!e && !tok) {
        snprintf(why, sizeof why, "%s has no tokenizer", s.folder);
        e = DLM_E_MISMATCH;
    }
    if (!e) T = fill_canvas(&s, tok, &model->config, why, sizeof why);
    if (!e && T == 0) e = DLM_E_INPUT;
    if (!e) e = generate(ctx, model, tok, &s, T);
    if (e) fprintf(stderr, "%s: %s\n", dlm_error_string(e),
                   *why ? why : dlm_last_error(ctx));
    dlm_model_free(model);
    dlm_tokenizer_free(tok);
    dlm_shutdown(ctx);
    return e != DLM_OK;
}
