/* bench.h - what the benches share: arguments, a clock, interleaved sampling, order
   statistics and the context lines.  Include after dlm.h and after defining
   _POSIX_C_SOURCE. */
#ifndef BENCH_H
#define BENCH_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#ifndef DLM_BENCH_FLAGS
#define DLM_BENCH_FLAGS "unknown"
#endif

#define BENCH_SAMPLES 7                    /* per row, after one warm-up call      */
#define BENCH_SECONDS 0.05                 /* least duration of one sample         */
#define BENCH_NOISY   0.20                 /* (max - min) / median above: marked   */

typedef struct bench_case {                /* one competitor                       */
    void (*run)(void *arg);                /* one call of what is measured         */
    void  *arg;
    double work;                           /* per call: floating-point operations,
                                              tokens, ...; may be set by run       */
    long   calls;                          /* per sample; found by bench_run       */
    double seconds[BENCH_SAMPLES];         /* per call, ascending                  */
} bench_case;

/* Ends the program: with 0 where argument is --help, else with 2, and says which argument
   was not understood (NULL: one is missing). */
static inline void bench_usage(const char *usage, const char *argument)
{
    const int asked = argument != NULL && strcmp(argument, "--help") == 0;
    FILE *const to = asked ? stdout : stderr;
    if (argument != NULL && !asked) fprintf(to, "%s: not understood\n", argument);
    fprintf(to, "usage: %s\n", usage);
    exit(asked ? 0 : 2);
}

/* For programs whose only argument is --quick: is it there? */
static inline int bench_quick(int argc, char **argv, const char *usage)
{
    const int quick = argc > 1 && strcmp(argv[1], "--quick") == 0;
    if (argc > 1 + quick) bench_usage(usage, argv[1 + quick]);
    return quick;
}

/* The whole number that text is, least .. most; what: its name in the usage. */
static inline long bench_number(const char *what, const char *text, long least, long most)
{
    char *end;
    const long value = strtol(text, &end, 10);
    if (end != text && *end == 0 && value >= least && value <= most) return value;
    fprintf(stderr, "%s is a whole number from %ld to %ld, not %s\n", what, least, most,
            text);
    exit(1);
}

static inline void bench_readable(const char *path)
{
    FILE *const f = fopen(path, "rb");
    if (f != NULL && (fgetc(f) != EOF || !ferror(f))) {
        fclose(f);
        return;
    }
    fprintf(stderr, "%s: cannot be read\n", path);
    exit(1);
}

/* Before hours of work, not after them: can the file be written?  What is there stays. */
static inline void bench_writable(const char *path)
{
    FILE *const there = fopen(path, "rb"), *const f = fopen(path, "ab");
    if (f == NULL) {
        fprintf(stderr, "%s: cannot be written\n", path);
        exit(1);
    }
    fclose(f);
    if (there != NULL) fclose(there);
    else remove(path);
}

static inline double bench_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static inline double bench_sample(bench_case *c, long calls)
{
    const double start = bench_now();
    for (long i = 0; i < calls; i++) c->run(c->arg);
    return bench_now() - start;
}

/* Enough calls that a sample lasts BENCH_SECONDS.  The first call is the warm-up. */
static inline void bench_calibrate(bench_case *c)
{
    double seconds = bench_sample(c, 1);
    c->calls = 1;
    while (seconds < BENCH_SECONDS / 4) {
        seconds = bench_sample(c, c->calls);
        if (seconds < BENCH_SECONDS / 4) c->calls *= 4;
    }
    if (seconds < BENCH_SECONDS)
        c->calls = (long)((double)c->calls * BENCH_SECONDS / seconds) + 1;
}

static inline int bench_ascending(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Takes turns, so that a drifting clock meets every competitor alike. */
static inline void bench_run(bench_case *cases, int n)
{
    for (int i = 0; i < n; i++) bench_calibrate(&cases[i]);
    for (int s = 0; s < BENCH_SAMPLES; s++)
        for (int i = 0; i < n; i++)
            cases[i].seconds[s] = bench_sample(&cases[i], cases[i].calls)
                                / (double)cases[i].calls;
    for (int i = 0; i < n; i++)
        qsort(cases[i].seconds, BENCH_SAMPLES, sizeof(double), bench_ascending);
}

/* Work per second: of the median, the slowest and the fastest sample. */
static inline double bench_median(const bench_case *c)
{
    return c->work / c->seconds[BENCH_SAMPLES / 2];
}

static inline double bench_min(const bench_case *c)
{
    return c->work / c->seconds[BENCH_SAMPLES - 1];
}

static inline double bench_max(const bench_case *c)
{
    return c->work / c->seconds[0];
}

static inline double bench_ms(const bench_case *c)
{
    return 1e3 * c->seconds[BENCH_SAMPLES / 2];
}

static inline int bench_noisy(const bench_case *c)
{
    const double spread = c->seconds[BENCH_SAMPLES - 1] - c->seconds[0];
    return spread > BENCH_NOISY * c->seconds[BENCH_SAMPLES / 2];
}

static inline void bench_machine(char *out, size_t size)
{
    FILE *f = fopen("/proc/cpuinfo", "r");
    char line[256];
    snprintf(out, size, "unknown");
    if (f == NULL) return;
    while (fgets(line, sizeof line, f) != NULL) {
        const char *colon = strchr(line, ':');
        if (colon == NULL || strncmp(line, "model name", 10) != 0) continue;
        line[strcspn(line, "\n")] = 0;
        snprintf(out, size, "%s", colon + 2);
        break;
    }
    fclose(f);
}

/* What else the machine was doing at the start; "" where it does not say. */
static inline void bench_load(char *out, size_t size)
{
    FILE *f = fopen("/proc/loadavg", "r");
    out[0] = 0;
    if (f == NULL) return;
    if (fgets(out, (int)size, f) != NULL) out[strcspn(out, " ")] = 0;
    fclose(f);
}

/* A number without these lines is not to be quoted. */
static inline void bench_context(const char *program, const char *isa,
                                 const char *threads)
{
    char machine[256], load[64];
    bench_machine(machine, sizeof machine);
    bench_load(load, sizeof load);
#ifdef __clang__
    const char *compiler = "";             /* its version text says what it is      */
#else
    const char *compiler = "gcc ";
#endif
    printf("# program  %s, dlm.h %d.%d.%d\n", program, DLM_VERSION_MAJOR,
           DLM_VERSION_MINOR, DLM_VERSION_PATCH);
    printf("# machine  %s, load %s at the start\n", machine, load[0] ? load : "unknown");
    printf("# compiler %s%s\n", compiler, __VERSION__);
    printf("# flags    %s\n", DLM_BENCH_FLAGS);
    printf("# isa      %s\n", isa);
    printf("# threads  %s\n", threads);
    printf("# samples  %d of >= %.0f ms each, competitors interleaved; noisy = 1 where "
           "(max - min) / median > %.0f %%\n", BENCH_SAMPLES, 1e3 * BENCH_SECONDS,
           1e2 * BENCH_NOISY);
}

static inline void bench_require(dlm_ctx *ctx, dlm_error e)
{
    if (e == DLM_OK) return;
    fprintf(stderr, "%s: %s\n", dlm_error_string(e), dlm_last_error(ctx));
    exit(1);
}

static inline dlm_ctx *bench_ctx_with(dlm_options opt)
{
    char why[256] = "";
    dlm_ctx *ctx;
    dlm_error e;
    opt.message = why;
    opt.message_size = sizeof why;
    e = dlm_init(&ctx, &opt);
    if (e == DLM_OK) return ctx;
    fprintf(stderr, "%s: %s\n", dlm_error_string(e), why);
    exit(1);
}

static inline dlm_ctx *bench_ctx(dlm_isa isa, int threads)
{
    dlm_options opt = {0};
    opt.isa = isa;
    opt.threads = threads;
    return bench_ctx_with(opt);
}

/* Zeroed and never freed before the program ends. */
static inline void *bench_alloc(size_t count, size_t size)
{
    void *p = calloc(count > 0 ? count : 1, size);
    if (p != NULL) return p;
    fprintf(stderr, "out of memory\n");
    exit(1);
}

#endif /* BENCH_H */
