/* bench_folder - a published model on this machine: opening it, what it takes, how fast
   it writes, beside what the memory allows.

     bench_folder FOLDER [f32|bf16|i8] [tokens [block [mask]]]

   Prints the seconds to open, the most memory resident, and for a canvas of `tokens`
   after a prompt of 16: tokens per second with one token per step and with all that are
   surer than 0.9.  The bound of the first is reading every packed weight once per step,
   with the bandwidth that two threads have here, measured before, between and after.  A
   FULL model has its likelihood and 64 steps of sampling timed instead. */
#define _GNU_SOURCE                          /* getrusage                            */
#define DLM_IMPLEMENTATION
#include "dlm.h"
#include "bench.h"
#include <pthread.h>
#if !defined(_WIN32)
#include <sys/resource.h>
#endif

enum { PROMPT = 16, REPEATS = 3, STREAM = 256 << 20 };

typedef struct stream {                      /* a half of what is read               */
    const uint64_t *x;
    size_t n;
    uint64_t sum;
} stream;

static void *read_half(void *arg)
{
    stream *s = (stream *)arg;
    uint64_t a = 0, b = 0, c = 0, d = 0;     /* a load of each line of 64 bytes and  */
    for (size_t i = 0; i + 32 <= s->n; i += 32) {       /* the core fetches the rest */
        a += s->x[i];
        b += s->x[i + 8];
        c += s->x[i + 16];
        d += s->x[i + 24];
    }
    s->sum = a + b + c + d;
    return NULL;
}

/* Bytes per second that two threads read of memory that no cache holds. */
static double bandwidth(const uint64_t *x)
{
    double best = 0;
    for (int i = 0; i < 5; i++) {
        stream half[2];
        pthread_t other;
        const double start = bench_now();
        for (int h = 0; h < 2; h++) {
            half[h].n = (size_t)STREAM / 8 / 2;
            half[h].x = x + (size_t)h * half[h].n;
        }
        if (pthread_create(&other, NULL, read_half, &half[1]) != 0) return 0;
        read_half(&half[0]);
        pthread_join(other, NULL);
        if ((double)STREAM / (bench_now() - start) > best)
            best = (double)STREAM / (bench_now() - start);
    }
    return best;
}

static double resident(void)                 /* MB, the most so far; 0: not known    */
{
#if defined(_WIN32)
    return 0;
#else
    struct rusage r;
    getrusage(RUSAGE_SELF, &r);
    return (double)r.ru_maxrss / 1024;
#endif
}

/* Fills a canvas; seconds, and how many forwards that took. */
static dlm_error sample(dlm_ctx *ctx, const dlm_model *m, int tokens, int prompt,
                        dlm_sample_options *how, double *seconds, int *forwards)
{
    int T = prompt + tokens, *canvas = (int *)malloc((size_t)T * sizeof *canvas);
    dlm_session *session = NULL;
    dlm_sampler *sampler = NULL;
    dlm_limits limits = { 0 };
    double start, flops;
    dlm_error e;
    if (canvas == NULL) return DLM_E_NOMEM;
    for (int i = 0; i < T; i++)
        canvas[i] = i < prompt ? i % (m->config.vocab / 2) : m->config.mask_id;
    limits.slots = T;
    limits.cached = m->config.pattern != DLM_PATTERN_FULL;
    e = dlm_session_create(&session, ctx, m, &limits, NULL);
    if (!e) e = dlm_sampler_create(&sampler, session, how, NULL);
    if (!e) e = dlm_sampler_begin(sampler, canvas, &T, 1);
    if (!e) e = dlm_sampler_step(sampler);   /* takes the prompt in                  */
    start = bench_now();
    while (!e && !dlm_sampler_done(sampler)) e = dlm_sampler_step(sampler);
    *seconds = bench_now() - start;
    if (!e) dlm_sampler_cost(sampler, forwards, &flops);
    (*forwards)--;
    dlm_sampler_free(sampler);
    dlm_session_free(session);
    free(canvas);
    return e;
}

static dlm_error full(dlm_ctx *ctx, const dlm_model *m, int tokens)
{
    const int T = dlm__min(1024, m->config.max_seq);
    int *text = (int *)malloc((size_t)T * sizeof *text), forwards = 0;
    dlm_session *session = NULL;
    dlm_limits limits = { 0 };
    dlm_sample_options how = { 0 };
    double nats = 0, start, seconds = 0;
    dlm_error e;
    if (text == NULL) return DLM_E_NOMEM;
    for (int i = 0; i < T; i++) text[i] = (i * 7919 + 13) % (m->config.vocab - 1);
    limits.slots = T;
    e = dlm_session_create(&session, ctx, m, &limits, NULL);
    start = bench_now();
    if (!e) e = dlm_log_likelihood(session, text, T, 0, 4, 1, &nats);
    if (!e) printf("likelihood of %d tokens, 4 samples: %.2f s, %.3f nats per token\n", T,
                   bench_now() - start, -nats / T);
    dlm_session_free(session);
    free(text);
    how.steps = 64;
    how.temperature = 1;
    if (!e) e = sample(ctx, m, tokens, 0, &how, &seconds, &forwards);
    if (!e) printf("sampling %d tokens in %d steps: %.2f s, %.1f tokens/s\n", tokens,
                   forwards + 1, seconds * 64 / 63, tokens / seconds * 63 / 64);
    return e;
}

static dlm_error blocks(dlm_ctx *ctx, const dlm_model *m, int tokens, const uint64_t *x)
{
    const double bytes = (double)dlm_model_bytes(ctx, &m->config, m->type, 1);
    const double embed = m->config.untied_head
        ? (double)dlm_pack_bytes(ctx, m->type, m->config.vocab, m->config.dim) : 0;
    dlm_error e = DLM_OK;
    for (int sure = 0; sure < 2 && !e; sure++) {
        double rate = 0, memory = bandwidth(x), bound;
        int forwards = 0;
        for (int i = 0; i < REPEATS && !e; i++) {
            dlm_sample_options how = { 0 };
            double seconds = 0;
            how.order = sure ? DLM_ORDER_THRESHOLD : DLM_ORDER_CONFIDENCE;
            e = sample(ctx, m, tokens, PROMPT, &how, &seconds, &forwards);
            memory = fmax(memory, bandwidth(x));
            rate = fmax(rate, (tokens - 1) / seconds);
        }
        if (e) break;
        bound = memory / (bytes - embed);    /* of an embedding, a few rows are read */
        printf("%-22s %6.2f tokens/s, %.2f per forward", sure ? "surer than 0.9:"
               : "one token per step:", rate, (double)(tokens - 1) / forwards);
        if (!sure) printf("; memory %.1f GB/s, bound %.2f tokens/s: %.0f %%",
                          memory * 1e-9, bound, 100 * rate / bound);
        puts("");
    }
    return e;
}

int main(int argc, char **argv)
{
    static const char usage[] = "bench_folder FOLDER [f32|bf16|i8] [tokens [block "
                                "[mask]]]";
    const char *type = argc > 2 ? argv[2] : "i8";
    char why[256] = "";
    uint64_t *x = (uint64_t *)malloc(STREAM);
    dlm_open_options how = { 0 };
    dlm_options options = { 0 };
    dlm_model *m = NULL;
    dlm_ctx *ctx = NULL;
    double start;
    int tokens;
    dlm_error e;
    if (argc < 2 || argv[1][0] == '-' || argc > 6)
        bench_usage(usage, argc > 1 ? argv[argc > 6 ? 6 : 1] : NULL);
    how.type = type[0] == 'b' ? DLM_BF16 : type[0] == 'i' ? DLM_I8 : DLM_F32;
    how.packed = 1;
    tokens = argc > 3 ? (int)bench_number("tokens", argv[3], 2, 4096) : 64;
    how.block = argc > 4 ? (int)bench_number("block", argv[4], -1, 4096) : 0;
    how.mask_id = argc > 5 ? (int)bench_number("mask", argv[5], 0, 1 << 22) : 0;
    options.threads = 2;
    options.message = why;
    options.message_size = sizeof why;
    e = dlm_init(&ctx, &options);
    start = bench_now();
    if (!e) e = dlm_open(&m, NULL, ctx, argv[1], &how);
    if (e || x == NULL) {
        fprintf(stderr, "%s\n", ctx ? dlm_last_error(ctx) : why);
        return 1;
    }
    printf("%s, %s, %.1f M parameters, %s kernels: opened in %.2f s, resident %.0f MB at "
           "most\n", argv[1], type, (double)m->n_params * 1e-6,
           dlm_isa_name(dlm_active_isa(ctx)), bench_now() - start, resident());
    memset(x, 1, STREAM);
    e = m->config.pattern == DLM_PATTERN_FULL ? full(ctx, m, dlm__max(tokens, 256))
        : blocks(ctx, m, tokens, x);
    if (e) fprintf(stderr, "%s\n", dlm_last_error(ctx));
    printf("resident with everything, %d MB of the measurement's own among it: %.0f MB\n",
           STREAM >> 20, resident());
    dlm_model_free(m);
    dlm_shutdown(ctx);
    free(x);
    return e != DLM_OK;
}
