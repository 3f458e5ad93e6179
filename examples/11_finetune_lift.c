/* 11_finetune_lift.c - fine-tune twice from the same weights: plainly, and with LIFT.

   Build:  cc -O2 -I.. 11_finetune_lift.c -o finetune_lift -lm -pthread
   See:    a base model learns to sort two digits; how often each fine-tuning then sorts
           five unseen ones after equally many steps; and, per noise level, what LIFT kept
           masked and how probable the gold tokens of the kept and the rejected were.
           One seed and a small task: this shows a mechanism, not a ranking. */
#define DLM_IMPLEMENTATION
#include "dlm.h"
#include <stdio.h>
#include <string.h>
enum { T = 36, B = 16, BASE_STEPS = 200, STEPS = 400, TESTS = 200 };

typedef struct task { dlm_example ex; int tokens[T]; } task;

/* "72:" -> "2 then 7." with n = 2 digits.  Of the long ones every fifth is for tests. */
static dlm_error make_task(task *s, const dlm_tokenizer *tok, int n, int test,
                           uint32_t number)
{
    char text[T + 1];
    int digit[10], length = n + 1, sum = 0;
    size_t count;
    for (uint32_t draw = number * 64; draw == number * 64
         || (n > 2 && (sum % 5 == 0) != test); draw++) {
        sum = 0;
        for (int i = 0; i < 10; i++)
            digit[i] = (int)dlm_shuffled(7 + (uint64_t)test, draw, 10, (size_t)i);
        for (int i = 0; i < n; i++) sum += (i + 1) * digit[i];
    }
    for (int i = 0; i < n; i++) text[i] = (char)('0' + digit[i]);
    text[n] = ':';
    for (int d = 0; d < 10; d++)
        for (int i = 0; i < n; i++)
            if (digit[i] == d)
                length += snprintf(text + length, sizeof text - (size_t)length, "%s%d",
                                   length > n + 1 ? " then " : "", d);
    text[length++] = '.';
    s->ex.tokens = s->tokens, s->ex.length = length, s->ex.prompt = n + 1;
    return dlm_encode(tok, text, (size_t)length, s->tokens, T, &count);
}

/* Adds one step's table to a sum of tables; means become sums. */
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

static dlm_error train(dlm_model *m, dlm_ctx *ctx, const dlm_tokenizer *tok,
                       dlm_method method, int digits, int steps, dlm_report *sum)
{
    static task tasks[B];
    dlm_example batch[B];
    dlm_trainer *trainer = NULL;
    dlm_train_options how = {0};
    how.max_rows = B * T, how.lr = 3e-3f, how.warmup = 20, how.total = steps;
    how.schedule = DLM_SCHEDULE_COSINE;
    how.lift.method = method;                /* all of LIFT that a program sees      */
    memset(sum, 0, sizeof *sum);
    dlm_error e = dlm_trainer_create(&trainer, ctx, m, &how, NULL);
    for (int step = 0; step < steps && !e; step++) {
        dlm_report r;
        for (int i = 0; i < B && !e; i++) {
            e = make_task(&tasks[i], tok, digits, 0, (uint32_t)(step * B + i));
            batch[i] = tasks[i].ex;
        }
        if (!e) e = dlm_trainer_step(trainer, batch, B, &r);
        if (!e) add_bins(sum, &r);
    }
    dlm_trainer_free(trainer);
    return e;
}

/* How many tests come out exactly, decoded in blocks of 8, two tokens at a time. */
static dlm_error test(dlm_model *m, dlm_ctx *ctx, const dlm_tokenizer *tok, int *right)
{
    dlm_sample_options how = {0};
    dlm_error e = DLM_OK;
    how.block = 8, how.steps = 4;
    for (uint32_t i = 0; i < TESTS && !e; i++) {
        task s;
        int canvas[T];
        e = make_task(&s, tok, 5, 1, i);
        for (int k = 0; k < s.ex.length; k++)
            canvas[k] = k < s.ex.prompt ? s.tokens[k] : m->config.mask_id;
        if (!e) e = dlm_sample(ctx, m, canvas, s.ex.length, &how);
        *right += !memcmp(canvas, s.tokens, (size_t)s.ex.length * sizeof *canvas);
    }
    return e;
}

/* With rho uniform in [0, 1-t] the superset holds (1+t)/2 of the tokens, t are kept. */
static void print_bins(const dlm_report *r)
{
    printf("\nnoise level    superset   kept   2t/(1+t)   p(gold) kept   rejected\n");
    for (int i = 0; i < DLM_BINS; i++) {
        double t = (i + 0.5) / DLM_BINS, all = (double)r->bin_superset[i];
        double kept = (double)r->bin_kept[i], rejected = (double)r->bin_rejected[i];
        printf("%.3f .. %.3f %8.0f %7.3f %10.3f", t - 0.5 / DLM_BINS, t + 0.5 / DLM_BINS,
               all, (double)r->bin_count[i] / all, 2.0 * t / (1.0 + t));
        if (kept == 0.0 || rejected == 0.0) printf("%26s\n", "random, not scored");
        else printf("%15.3f %10.3f\n", r->bin_gold_kept[i] / kept,
                    r->bin_gold_rejected[i] / rejected);
    }
}

int main(int argc, char **argv)
{
    static const char *const names[3] = {"base", "vanilla", "LIFT-3"};
    static const dlm_method methods[3] = {DLM_METHOD_VANILLA, DLM_METHOD_VANILLA,
                                          DLM_METHOD_LIFT3};
    const char *alphabet = "0123456789: then.";
    dlm_ctx *ctx = NULL;
    dlm_tokenizer *tok = NULL;
    dlm_model *m[3] = {NULL, NULL, NULL};
    dlm_config cfg = {0};
    dlm_report r;
    char why[256] = "";                      /* for a context that fails             */
    dlm_options options = {0};

    if (argc > 1) {
        puts("usage: finetune_lift        it takes no arguments");
        return strcmp(argv[1], "--help") ? 2 : 0;
    }
    options.message = why, options.message_size = sizeof why;
    dlm_error e = dlm_init(&ctx, &options);
    if (!e) e = dlm_tokenizer_create(&tok, ctx, DLM_TOKENIZER_CHARS, alphabet, 17);
    if (!e) cfg.vocab = tok->vocab;
    cfg.pattern = DLM_PATTERN_FULL, cfg.max_seq = T, cfg.dim = 64;
    cfg.layers = 3, cfg.heads = 4;
    for (int k = 0; k < 3 && !e; k++) {
        int right = 0, digits = k ? 5 : 2, steps = k ? STEPS : BASE_STEPS;
        e = k ? dlm_model_clone(&m[k], ctx, m[0], NULL)
              : dlm_model_create(&m[k], ctx, &cfg, 1, NULL);
        if (!e) e = train(m[k], ctx, tok, methods[k], digits, steps, &r);
        if (!e) e = test(m[k], ctx, tok, &right);
        if (!e) printf("%-8s %d steps, %3.0f GFLOP: %3d of %d exact\n", names[k], steps,
                       1e-9 * r.flops, right, TESTS);
    }
    if (!e) print_bins(&r);
    else fprintf(stderr, "%s: %s\n", dlm_error_string(e),
                 *why ? why : dlm_last_error(ctx));
    for (int k = 0; k < 3; k++) dlm_model_free(m[k]);
    dlm_tokenizer_free(tok);
    dlm_shutdown(ctx);
    return e != DLM_OK;
}
