/* dlm_test.c - the tests of dlm.h.

     cc -O2 -std=c99 dlm_test.c -lm -pthread -o dlm_test
     ./dlm_test [substring] [seed]

   Runs every test whose name contains the substring.  Prints what failed and where,
   and on the last line "N passed, N failed, N skipped"; the exit status is 0 if and only
   if nothing failed.  Expected values are worked out here, in double and from the
   formulas, never with the code under test.  Sections follow the order of the header. */

#if !defined(DLM_NO_STDIO) && (defined(__unix__) || defined(__APPLE__))
static int test_refuse_maps;               /* 1: as on a disk that maps no files   */
#define DLM__MAY_MAP (!test_refuse_maps)
#endif
static void test_overrun(const char *words);
#define DLM_GUARD 64
#define DLM__OVERRUN(words) test_overrun(words)
#define DLM_IMPLEMENTATION
#include "dlm.h"

#include <fenv.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* ==[ harness ]===============================================================
   A check that fails says so once per line of source and test, with the number of times
   and the largest error; the test goes on.  SKIP leaves the test. */

typedef struct test_failure {
    const char *file, *label;
    int         line, count;
    double      error;                     /* the largest seen on this line        */
    char        detail[200];               /* of that one                          */
} test_failure;

static test_failure test_failed[16];       /* of the running test                  */
static int          test_failed_lines, test_was_skipped;
static uint64_t     test_seed = 1, test_state;
static const dlm_ctx *test_ctx;            /* whose last error CHECK_OK shows      */
static char         test_label_text[160];  /* what is being tried: a size, an ISA  */

static void test_fail(const char *file, int line, const char *label, double error,
                      const char *detail)
{
    test_failure *f = test_failed;
    while (f < test_failed + test_failed_lines && f->line != line) f++;
    if (f == test_failed + 16) return;
    if (f == test_failed + test_failed_lines) {
        memset(f, 0, sizeof *f);
        test_failed_lines++;
    }
    if (f->count++ == 0 || error > f->error || error != error) {
        f->file = file; f->line = line; f->label = label; f->error = error;
        snprintf(f->detail, sizeof f->detail, "%.90s%s%.100s", detail,
                 test_label_text[0] ? " | " : "", test_label_text);
    }
}

/* Objects are looked at when they are freed, whoever frees them. */
static int test_overruns_wanted;

static void test_overrun(const char *words)
{
    if (test_overruns_wanted > 0) test_overruns_wanted--;
    else test_fail(__FILE__, __LINE__, "arrays of an object", 0, words);
}

static void test_close_to(const char *file, int line, const char *label, double got,
                          double want, double tol)
{
    double error = fabs(got - want);
    if (error <= tol || got == want) return;
    char detail[100];
    snprintf(detail, sizeof detail, "got %.9g, want %.9g +- %.2g", got, want, tol);
    test_fail(file, line, label, error, detail);
}

static void test_error(const char *file, int line, const char *label, dlm_error got,
                       dlm_error want, const dlm_ctx *ctx, const char *text)
{
    const char *said = ctx && got != DLM_OK ? dlm_last_error(ctx) : "";
    if (got == want && (!text || strstr(said, text))) return;
    char detail[200];
    snprintf(detail, sizeof detail, "%s: \"%.80s\", want %s with \"%.40s\"",
             dlm_error_string(got), said, dlm_error_string(want), text ? text : "");
    test_fail(file, line, label, 0, detail);
}

#define TEST(name)  static void name(void)
#define SKIP(why)   do { \
        printf("skip  %s\n", why); test_was_skipped = 1; return; } while (0)
#define CHECK(cond) do { if (!(cond)) \
        test_fail(__FILE__, __LINE__, #cond, 0, "is false"); } while (0)
#define CHECK_CLOSE(got, want, tol) \
        test_close_to(__FILE__, __LINE__, #got, (double)(got), (double)(want), tol)
#define CHECK_OK(call) \
        test_error(__FILE__, __LINE__, #call, call, DLM_OK, test_ctx, NULL)
#define CHECK_ERROR(call, code, ctx, text) \
        test_error(__FILE__, __LINE__, #call, call, code, ctx, text)
/* Names what the following checks are about; "" ends that.  printf arguments. */
#define LABEL(...)  snprintf(test_label_text, sizeof test_label_text, __VA_ARGS__)
#define FOR_EACH_ISA(isa) for (int isa = DLM_ISA_SCALAR; isa < DLM_ISA_COUNT; isa++) \
        if (!dlm_isa_supported((dlm_isa)isa)) { } else

/* A context for one test; CHECK_OK prints its last error until test_close. */
static dlm_ctx *test_open(int isa, int threads)
{
    dlm_ctx *ctx = NULL;
    dlm_options o = {0};
    o.isa = (dlm_isa)isa;
    o.threads = threads;
    CHECK_OK(dlm_init(&ctx, &o));
    test_ctx = ctx;
    return ctx;
}

static void test_close(dlm_ctx *ctx)
{
    test_ctx = NULL;
    dlm_shutdown(ctx);
}

/* The tests' own randomness (splitmix64), restarted for every test. */
static uint64_t test_bits(void)
{
    uint64_t z = (test_state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}
static double test_uniform(void)           /* [0, 1) */
{
    return (double)(test_bits() >> 11) / 9007199254740992.0;
}
static int   test_below(int n) { return (int)(test_bits() % (uint64_t)n); }
static float test_float(void)  { return (float)(2 * test_uniform() - 1); }   /* [-1, 1) */
static void   test_fill(float *x, size_t n, float scale)
{
    for (size_t i = 0; i < n; i++) x[i] = scale * test_float();
}

/* An allocator that counts, and fails at call number fail_at (1-based; 0: never).  What
   it returns is 16-byte aligned and never more, so that nothing may rely on 64. */
typedef struct test_heap {
    int    calls, live, fail_at;
    size_t last, sum;                      /* bytes of the latest request; of all  */
} test_heap;

static void *test_heap_alloc(void *user, size_t size)
{
    test_heap *heap = (test_heap *)user;
    heap->last = size;
    heap->sum += size;
    if (++heap->calls == heap->fail_at) return NULL;
    char *raw = (char *)malloc(size + 96);
    if (!raw) return NULL;
    char *p = raw + 80 - ((uintptr_t)raw & 63);
    memcpy(p - sizeof raw, &raw, sizeof raw);
    heap->live++;
    return p;
}

/* The same, but no more than 64 MiB at a time. */
static void *test_heap_small(void *user, size_t size)
{
    return size > (size_t)1 << 26 ? NULL : test_heap_alloc(user, size);
}

static void test_heap_release(void *user, void *ptr)
{
    if (!ptr) return;
    char *raw;
    memcpy(&raw, (char *)ptr - sizeof raw, sizeof raw);
    ((test_heap *)user)->live--;
    free(raw);
}

/* Registers of the x87 do not keep every pattern of bits: bf16 and int8 are refused
   there, and tests with other things to say go on in f32. */
#if defined(FLT_EVAL_METHOD) && FLT_EVAL_METHOD == 2
enum { TEST_NARROW = 0 };
#else
enum { TEST_NARROW = 1 };
#endif
#define NEEDS_NARROW_WORDS() \
    if (!TEST_NARROW) SKIP("bf16 and int8 are not in this build")

static dlm_dtype test_type(dlm_dtype type) { return TEST_NARROW ? type : DLM_F32; }

static void *test_malloc(size_t size)      /* for the tests' own data              */
{
    void *p = malloc(size ? size : 1);
    if (!p) { printf("out of memory in a test\n"); exit(1); }
    return p;
}
static float *test_floats(size_t n) { return (float *)test_malloc(n * sizeof(float)); }
static int   *test_ints(size_t n)   { return (int *)test_malloc(n * sizeof(int)); }

/* ==[ context ]============================================================== */

TEST(context_defaults_to_one_thread_and_a_supported_isa)
{
    dlm_ctx *ctx = NULL;
    CHECK_OK(dlm_init(&ctx, NULL));
    if (!ctx) return;
    CHECK(dlm_active_threads(ctx) == 1);
    CHECK(dlm_active_isa(ctx) != DLM_ISA_AUTO);
    CHECK(dlm_isa_supported(dlm_active_isa(ctx)));
    CHECK(dlm_isa_supported(DLM_ISA_SCALAR));
    CHECK(strcmp(dlm_last_error(ctx), "") == 0);
    dlm_shutdown(ctx);
    dlm_shutdown(NULL);
}

#ifdef DLM__POSIX_THREADS
/* The line of /proc that says on which CPUs a thread may run; 0 where there is none. */
static int test_affinity(char *line, int size)
{
    FILE *f = fopen("/proc/thread-self/status", "r");
    int found = 0;
    while (f && !found && fgets(line, size, f))
        found = strncmp(line, "Cpus_allowed_list", 17) == 0;
    if (f) fclose(f);
    return found;
}

typedef struct test_where { char line[2][256]; int met; } test_where;

static void test_where_job(void *arg, int i)
{
    test_where *w = (test_where *)arg;
    const double until = 5.0 * CLOCKS_PER_SEC + (double)clock();
    if (i > 1 || !test_affinity(w->line[i], 256)) return;
    dlm__atomic_add(&w->met, 1);                           /* both at the same time  */
    while (dlm__atomic_get(&w->met) < 2 && (double)clock() < until) { }
}

TEST(workers_keep_off_the_callers_core_and_its_affinity_is_left_alone)
{
    char before[256], after[256];
    test_where w;
    dlm_options o = {0};
    dlm_ctx *ctx;
    memset(&w, 0, sizeof w);
    if (!test_affinity(before, sizeof before)) SKIP("no /proc");
    o.threads = 2;
    CHECK_OK(dlm_init(&ctx, &o));
    if (dlm_active_threads(ctx) < 2) { dlm_shutdown(ctx); SKIP("one core"); }
    dlm__parallel(ctx, 2, 1e9, test_where_job, &w);
    CHECK(test_affinity(after, sizeof after) && strcmp(before, after) == 0);
    CHECK(strcmp(w.line[0], before) == 0 || strcmp(w.line[1], before) == 0);
#if defined(__GLIBC__) && !defined(__UCLIBC__)
    unsigned long mine[1024 / (8 * sizeof(long))] = {0};   /* may this be set at all? */
    if (dlm__get_affinity(0, sizeof mine, mine) == 0
        && dlm__set_affinity(0, sizeof mine, mine) == 0)
        CHECK(strcmp(w.line[0], w.line[1]) != 0);
#endif
    dlm_shutdown(ctx);
}
#endif /* DLM__POSIX_THREADS */

TEST(context_uses_the_isa_and_threads_it_was_asked_for)
{
    FOR_EACH_ISA(isa) {
        LABEL("isa %s", dlm_isa_name((dlm_isa)isa));
        dlm_ctx *ctx = test_open(isa, 2);
        CHECK((int)dlm_active_isa(ctx) == isa);
        CHECK(dlm_active_threads(ctx) == 2 || dlm_active_threads(ctx) == 1);
        test_close(ctx);
    }
}

TEST(context_lives_in_memory_of_exactly_the_predicted_size)
{
    test_heap heap = {0};
    dlm_options o = {0};
    o.threads = 2;
    o.scratch = 65536;
    o.allocator.alloc = test_heap_alloc;
    o.allocator.release = test_heap_release;
    o.allocator.user = &heap;
    size_t bytes = dlm_ctx_bytes(&o);
    dlm_ctx *ctx = NULL;
    CHECK_OK(dlm_init(&ctx, &o));
    CHECK(heap.calls == 1 && heap.last == bytes);
    dlm_shutdown(ctx);
    CHECK(heap.live == 0);
    char *block = (char *)test_malloc(bytes + 2);
    for (int lacking = 0; lacking < 2; lacking++) {
        o.memory.base = block + 1;
        o.memory.size = bytes - (size_t)lacking;
        memset(block, 0x5A, bytes + 2);
        CHECK_ERROR(dlm_init(&ctx, &o), lacking ? DLM_E_NOMEM : DLM_OK, NULL, NULL);
        CHECK((ctx == NULL) == lacking);
        dlm_shutdown(ctx);
        CHECK(block[0] == 0x5A && block[bytes + 1] == 0x5A);
    }
    CHECK(heap.calls == 1);
    free(block);
}

static void *test_no_memory(void *user, size_t size)
{
    (void)user, (void)size;
    return NULL;
}

/* dlm_init and dlm_ctx_bytes fail alike, in words, within the room given for them. */
static void test_init_fails(dlm_options o, dlm_error want, const char *text)
{
    for (int by_size = 0; by_size < 2; by_size++)
        for (size_t room = 0; room <= 256; room = room * 4 + 1) {
            char said[256];
            dlm_ctx *ctx = (dlm_ctx *)&o;
            if (by_size && want == DLM_E_NOMEM) continue;    /* only counts        */
            memset(said, '#', sizeof said);
            o.message = said;
            o.message_size = room;
            if (by_size) CHECK(dlm_ctx_bytes(&o) == 0);
            else CHECK(dlm_init(&ctx, &o) == want && ctx == NULL);
            CHECK(said[room] == '#' && (!room || memchr(said, 0, room)));
            LABEL("\"%s\" is not in \"%.100s\"", text, room ? said : "");
            CHECK(room < 85 || strstr(said, text));
            LABEL("%s", text);
        }
    o.message = NULL;
    CHECK(want == DLM_E_NOMEM || dlm_ctx_bytes(&o) == 0);
}

TEST(context_refuses_options_that_make_no_sense)
{
    static const char *const texts[] = {
        "threads: -1 is not", "scratch: 1000 bytes", "scratch: ", "allocator: alloc and",
        "allocator: alloc and", "isa 77 (unknown): this CPU and build have scalar",
        "context: cannot allocate", "context: needs "
    };
    char small[16];
    for (int i = 0; i < 8; i++) {
        dlm_options o = {0};
        if (i == 0) o.threads = -1;
        if (i == 1) o.scratch = 1000;
        if (i == 2) o.scratch = (size_t)-1;
        if (i == 3 || i == 6) o.allocator.alloc = test_no_memory;
        if (i == 4 || i == 6) o.allocator.release = test_heap_release;
        if (i == 5) o.isa = (dlm_isa)77;
        if (i == 7) o.memory.base = small, o.memory.size = sizeof small;
        test_init_fails(o, i == 5 ? DLM_E_UNSUPPORTED : i < 6 ? DLM_E_CONFIG
                                                              : DLM_E_NOMEM, texts[i]);
    }
}

TEST(context_says_no_more_once_it_exists)
{
    char said[64] = "untouched";
    dlm_options o = {0};
    dlm_ctx *ctx = NULL;
    dlm_config c = {0};
    o.message = said, o.message_size = sizeof said;
    CHECK_OK(dlm_init(&ctx, &o));
    CHECK_ERROR(dlm_config_resolve(ctx, &c), DLM_E_CONFIG, ctx, "vocab");
    CHECK(strcmp(said, "untouched") == 0);
    /* what a success leaves as it is */
    c.vocab = c.dim = c.layers = c.heads = c.max_seq = 8;
    c.head_dim = 2;
    CHECK_OK(dlm_config_resolve(ctx, &c));
    CHECK(strstr(dlm_last_error(ctx), "vocab") != NULL);
    dlm_shutdown(ctx);
    CHECK(strcmp(dlm_last_error(NULL), "") == 0);
}

#if defined(__unix__) || defined(__APPLE__)
extern int test_setenv(const char *name, const char *value, int replace)
#ifdef __APPLE__
    __asm__("_setenv");
#else
    __asm__("setenv");                     /* not in a plain -std=c99              */
#endif

TEST(context_takes_its_isa_from_the_environment)
{
    char before[64] = "";
    const char *old = getenv("DLM_ISA");
    dlm_options o = {0};
    dlm_ctx *ctx = NULL;
    if (old) snprintf(before, sizeof before, "%s", old);
    test_setenv("DLM_ISA", "pentium", 1);
    test_init_fails(o, DLM_E_UNSUPPORTED,
                    "DLM_ISA=pentium: this CPU and build have scalar");
    o.isa = DLM_ISA_SCALAR;                /* what is asked for goes before it     */
    CHECK_OK(dlm_init(&ctx, &o));
    dlm_shutdown(ctx);
    o.isa = DLM_ISA_AUTO;
    test_setenv("DLM_ISA", "scalar", 1);
    CHECK_OK(dlm_init(&ctx, &o));
    CHECK(ctx && dlm_active_isa(ctx) == DLM_ISA_SCALAR);
    dlm_shutdown(ctx);
    test_setenv("DLM_ISA", before, 1);
}
#endif

TEST(context_refuses_an_isa_this_cpu_lacks)
{
    int found = 0;
    for (int isa = DLM_ISA_SCALAR; isa < DLM_ISA_COUNT; isa++) {
        if (dlm_isa_supported((dlm_isa)isa)) continue;
        found = 1;
        dlm_options o = {0};
        o.isa = (dlm_isa)isa;
        dlm_ctx *ctx = NULL;
        LABEL("isa %s", dlm_isa_name((dlm_isa)isa));
        CHECK_ERROR(dlm_init(&ctx, &o), DLM_E_UNSUPPORTED, NULL, NULL);
        CHECK(ctx == NULL);
        char text[64];
        snprintf(text, sizeof text, "isa %d (%s): this CPU and build have scalar", isa,
                 dlm_isa_name((dlm_isa)isa));
        test_init_fails(o, DLM_E_UNSUPPORTED, text);
    }
    if (!found) SKIP("this CPU has every instruction set");
}

TEST(error_strings_and_isa_names_exist_and_differ)
{
    for (int e = DLM_OK; e <= DLM_E_UNSUPPORTED; e++) {
        const char *text = dlm_error_string((dlm_error)e);
        CHECK(text && text[0]);
        for (int f = DLM_OK; f < e; f++)
            CHECK(strcmp(text, dlm_error_string((dlm_error)f)) != 0);
    }
    CHECK(dlm_error_string((dlm_error)99) != NULL);
    CHECK(strcmp(dlm_isa_name(DLM_ISA_SCALAR), "scalar") == 0);
    CHECK(strcmp(dlm_isa_name(DLM_ISA_AVX2), "avx2") == 0);
    CHECK(strcmp(dlm_isa_name(DLM_ISA_AVX512), "avx512") == 0);
    CHECK(strcmp(dlm_isa_name(DLM_ISA_AVX512BF16), "avx512bf16") == 0);
    CHECK(strcmp(dlm_isa_name(DLM_ISA_AMX), "amx") == 0);
    CHECK(strcmp(dlm_isa_name(DLM_ISA_NEON), "neon") == 0);
}

/* ==[ random ]===============================================================
   Philox4x32-10 written from the paper; the header's addresses must reach it. */

static void ref_philox(uint32_t c[4], uint32_t k0, uint32_t k1)
{
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)c[0] * 0xD2511F53u, p1 = (uint64_t)c[2] * 0xCD9E8D57u;
        uint32_t next[4];
        next[0] = (uint32_t)(p1 >> 32) ^ c[1] ^ k0;
        next[1] = (uint32_t)p1;
        next[2] = (uint32_t)(p0 >> 32) ^ c[3] ^ k1;
        next[3] = (uint32_t)p0;
        memcpy(c, next, sizeof next);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
}

TEST(random_bits_match_the_known_answer_of_philox)
{
    static const uint32_t want[4] = {
        0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u };
    uint32_t out[4], c[4] = {0};
    ref_philox(c, 0, 0);
    CHECK(memcmp(c, want, sizeof want) == 0);
    uint32_t ones[4] = { ~0u, ~0u, ~0u, ~0u };
    ref_philox(ones, ~0u, ~0u);
    CHECK(ones[0] == 0x408f276du && ones[1] == 0x41c83b0eu && ones[2] == 0xa20bc7c6u &&
          ones[3] == 0x6d5451fdu);
    dlm_address at = {0};
    dlm_random_bits(&at, 0, out);
    CHECK(memcmp(out, want, sizeof want) == 0);
}

TEST(random_bits_depend_on_every_part_of_the_address)
{
    uint32_t out[8][4];
    for (int i = 0; i < 8; i++) {
        dlm_address at = { 5, DLM_RANDOM_USER, 6, 7, 8 };
        if (i == 1) at.seed ^= 1;
        if (i == 2) at.seed ^= (uint64_t)1 << 63;
        if (i == 3) at.purpose++;
        if (i == 4) at.step++;
        if (i == 5) at.row++;
        if (i == 6) at.position++;
        dlm_random_bits(&at, i == 7, out[i]);
        for (int j = 0; j < i; j++) CHECK(memcmp(out[i], out[j], sizeof out[i]) != 0);
    }
}

/* Pearson's statistic of counts over n cells that should be equally full; its mean is
   n - 1 and its variance 2(n - 1). */
static double test_chi_square(const int *count, int n, double total)
{
    double sum = 0, expected = total / n;
    for (int i = 0; i < n; i++) {
        double d = count[i] - expected;
        sum += d * d / expected;
    }
    return sum;
}

TEST(uniform_is_uniform_along_every_part_of_the_address)
{
    enum { N = 65536, CELLS = 64 };
    for (int part = 0; part < 5; part++) {
        int count[CELLS] = {0}, pairs[CELLS] = {0};
        double sum = 0, squares = 0, before = 0;
        for (int i = 0; i < N; i++) {
            dlm_address at = { test_seed, DLM_RANDOM_USER, 0, 0, 0 };
            uint32_t *field[4] = { &at.purpose, &at.step, &at.row, &at.position };
            if (part < 4) *field[part] += (uint32_t)i;
            double u = dlm_uniform(&at, part < 4 ? 0 : (uint32_t)i);
            CHECK(u >= 0 && u < 1);
            if (!(u >= 0 && u < 1)) return;
            count[(int)(u * (int)CELLS)]++;
            if (i & 1) pairs[(int)(before * 8) * 8 + (int)(u * 8)]++;
            sum += u;
            squares += u * u;
            before = u;
        }
        LABEL("part %d of the address", part);
        CHECK_CLOSE(sum / (int)N, 0.5, 5 * sqrt(1.0 / 12 / (int)N));
        CHECK_CLOSE(squares / (int)N, 1.0 / 3, 5 * sqrt(4.0 / 45 / (int)N));
        CHECK_CLOSE(test_chi_square(count, CELLS, N), 63, 6 * sqrt(126));
        CHECK_CLOSE(test_chi_square(pairs, CELLS, N / 2), 63, 6 * sqrt(126));
    }
}

TEST(uniform_has_53_bits)
{
    uint64_t any = 0, all = ~(uint64_t)0;
    dlm_address at = { test_seed, DLM_RANDOM_USER, 0, 0, 0 };
    for (uint32_t i = 0; i < 200; i++) {
        double scaled = dlm_uniform(&at, i) * 9007199254740992.0;
        CHECK(scaled == floor(scaled));
        any |= (uint64_t)scaled;
        all &= (uint64_t)scaled;
    }
    CHECK(any == ((uint64_t)1 << 53) - 1);
    CHECK(all == 0);
}

TEST(shuffled_visits_every_index_once)
{
    for (size_t n = 1; n <= 200; n++) {
        for (uint32_t epoch = 0; epoch < 3; epoch++) {
            char seen[200] = {0};
            size_t visited = 0;
            for (size_t i = 0; i < n; i++) {
                size_t j = dlm_shuffled(test_seed, epoch, n, i);
                if (j < n && !seen[j]) visited++;
                if (j < n) seen[j] = 1;
            }
            LABEL("n %d, epoch %d", (int)n, (int)epoch);
            CHECK(visited == n);
        }
    }
}

TEST(shuffled_differs_between_epochs_and_seeds)
{
    for (size_t n = 16; n <= 200; n += 23) {
        size_t same_epoch = 0, same_seed = 0, fixed = 0;
        for (size_t i = 0; i < n; i++) {
            size_t j = dlm_shuffled(test_seed, 0, n, i);
            same_epoch += j == dlm_shuffled(test_seed, 1, n, i);
            same_seed += j == dlm_shuffled(test_seed + 1, 0, n, i);
            fixed += j == i;
        }
        LABEL("n %d", (int)n);
        CHECK(same_epoch < n / 2);
        CHECK(same_seed < n / 2);
        CHECK(fixed < n / 2);
    }
}

TEST(shuffled_puts_every_index_anywhere)
{
    enum { N = 6, TRIES = 6000 };
    for (size_t i = 0; i < N; i++) {
        int count[N] = {0};
        for (uint32_t epoch = 0; epoch < TRIES; epoch++)
            count[dlm_shuffled(test_seed, epoch, N, i) % N]++;
        LABEL("place %d", (int)i);
        CHECK_CLOSE(test_chi_square(count, N, TRIES), 0, 40);    /* 5 degrees: p 1e-7 */
    }
    size_t huge = SIZE_MAX / 2 + 1;
    for (size_t i = 0; i < 100; i++)
        CHECK(dlm_shuffled(test_seed, 0, huge, huge - 1 - i) < huge);
}

/* ==[ math ]=================================================================
   One product in four spellings: nn, nt, tn and packed get the same numbers laid out
   for them and must agree to the last bit. */

enum { MATMUL_NN, MATMUL_NT, MATMUL_TN, MATMUL_PACKED, MATMUL_KINDS };
static const char *const matmul_names[MATMUL_KINDS] = { "nn", "nt", "tn", "packed" };

typedef struct matmul_data {
    int    M, N, K;
    float *a, *b;                          /* (M,K), (N,K)                         */
    float *at, *bt;                        /* (K,M), (K,N)                         */
    float *out[MATMUL_KINDS];              /* (M,N) and 8 more                     */
    float *packed, *packed_block;          /* 64-byte aligned; what to free        */
} matmul_data;

static void matmul_make(matmul_data *d, int M, int N, int K)
{
    size_t m = (size_t)M, n = (size_t)N, k = (size_t)K;
    memset(d, 0, sizeof *d);
    d->M = M; d->N = N; d->K = K;
    d->a = test_floats(m * k);
    d->at = test_floats(m * k);
    d->b = test_floats(n * k);
    d->bt = test_floats(n * k);
    test_fill(d->a, m * k, 1);
    test_fill(d->b, n * k, 1);
    for (size_t i = 0; i < m * k; i++) d->at[i % k * m + i / k] = d->a[i];
    for (size_t i = 0; i < n * k; i++) d->bt[i % k * n + i / k] = d->b[i];
    for (int kind = 0; kind < MATMUL_KINDS; kind++)
        d->out[kind] = test_floats(m * n + 8);
}

static void matmul_free(matmul_data *d)
{
    free(d->a); free(d->at); free(d->b); free(d->bt); free(d->packed_block);
    for (int kind = 0; kind < MATMUL_KINDS; kind++) free(d->out[kind]);
}

static float *test_align64(float *p)
{
    return p + (64 - ((uintptr_t)p & 63)) % 64 / sizeof(float);
}

/* All four products; out starts as NaN with a guard behind it. */
static void matmul_run(dlm_ctx *ctx, matmul_data *d)
{
    dlm_matrix packed;
    size_t n = (size_t)d->M * (size_t)d->N;
    for (int kind = 0; kind < MATMUL_KINDS; kind++) {
        for (size_t i = 0; i < n; i++) d->out[kind][i] = (float)NAN;
        for (size_t i = n; i < n + 8; i++) d->out[kind][i] = 12345.0f;
    }
    free(d->packed_block);
    size_t floats = dlm_pack_bytes(ctx, DLM_F32, d->N, d->K) / sizeof(float);
    d->packed_block = test_floats(floats + 16);
    d->packed = test_align64(d->packed_block);
    packed = dlm_pack(ctx, d->packed, DLM_F32, d->b, d->N, d->K);
    dlm_matmul_nn(ctx, d->out[MATMUL_NN], d->a, d->bt, d->M, d->N, d->K);
    dlm_matmul_nt(ctx, d->out[MATMUL_NT], d->a, d->b, d->M, d->N, d->K);
    dlm_matmul_tn(ctx, d->out[MATMUL_TN], d->at, d->bt, d->M, d->N, d->K);
    dlm_matmul(ctx, d->out[MATMUL_PACKED], d->a, &packed, d->M);
    for (int kind = 0; kind < MATMUL_KINDS; kind++)
        for (size_t i = n; i < n + 8; i++)
            CHECK(d->out[kind][i] == 12345.0f);
}

/* The same as a trainer in bf16 multiplies. */
static void matmul_run_in_bf16(dlm_ctx *ctx, matmul_data *d)
{
    const int M = d->M, N = d->N, K = d->K;
    const dlm_matrix w = dlm__plain(d->b, N, K, DLM_BF16);
    matmul_run(ctx, d);
    dlm__gemm_nn(ctx, d->out[MATMUL_NN], d->a, d->bt, DLM__WORD_BF16, M, N, K, 0);
    dlm_matmul(ctx, d->out[MATMUL_NT], d->a, &w, M);
    dlm__gemm_tn(ctx, d->out[MATMUL_TN], d->at, d->bt, DLM__WORD_BF16, M, N, K, 0);
}

/* Against double; the tolerance is the rounding bound of a chain of K additions. */
static void matmul_compare(const matmul_data *d, int kind)
{
    for (int i = 0; i < d->M; i++) {
        for (int j = 0; j < d->N; j++) {
            const float *a_i = d->a + (size_t)i * (size_t)d->K;
            const float *b_j = d->b + (size_t)j * (size_t)d->K;
            double sum = 0, size = 0;
            for (int k = 0; k < d->K; k++) {
                sum += (double)a_i[k] * b_j[k];
                size += fabs((double)a_i[k] * b_j[k]);
            }
            float got = d->out[kind][(size_t)i * (size_t)d->N + (size_t)j];
            CHECK_CLOSE(got, sum, (d->K + 1) * 5.97e-8 * size);
        }
    }
}

static int matmul_size(void)
{
    static const int sizes[] = {
        0, 1, 2, 3, 5, 7, 8, 11, 12, 13, 16, 17, 31, 32, 33, 47, 64, 65 };
    return sizes[test_below((int)(sizeof sizes / sizeof *sizes))];
}

TEST(matmul_equals_double_reference_on_every_isa)
{
    static const int fixed[][3] = {
        { 172, 64, 257 }, { 130, 301, 515 }, { 1, 700, 129 }, { 300, 1, 1030 },
        { 5, 3, 4099 }, { 0, 5, 3 }, { 5, 0, 3 }, { 5, 3, 0 }, { 1, 1, 1 }, { 0, 0, 0 } };
    enum { FIXED = sizeof fixed / sizeof *fixed, SAMPLED = 300 };
    FOR_EACH_ISA(isa) {
        dlm_ctx *ctx = test_open(isa, 1);
        for (int i = 0; i < FIXED + SAMPLED; i++) {
            int M = i < FIXED ? fixed[i][0] : matmul_size();
            int N = i < FIXED ? fixed[i][1] : matmul_size();
            int K = i < FIXED ? fixed[i][2] : matmul_size();
            matmul_data d;
            matmul_make(&d, M, N, K);
            LABEL("M %d N %d K %d, %s", M, N, K, dlm_isa_name((dlm_isa)isa));
            matmul_run(ctx, &d);
            size_t bytes = (size_t)M * (size_t)N * sizeof(float);
            CHECK(memcmp(d.out[MATMUL_NT], d.out[MATMUL_PACKED], bytes) == 0);
            CHECK(memcmp(d.out[MATMUL_NT], d.out[MATMUL_NN], bytes) == 0);
            CHECK(memcmp(d.out[MATMUL_NT], d.out[MATMUL_TN], bytes) == 0);
            for (int kind = 0; kind < MATMUL_KINDS; kind++) {
                LABEL("%s M %d N %d K %d, %s", matmul_names[kind], M, N, K,
                      dlm_isa_name((dlm_isa)isa));
                matmul_compare(&d, kind);
            }
            matmul_free(&d);
        }
        test_close(ctx);
    }
}

TEST(matmul_is_one_chain_of_fused_multiply_adds)
{
    FOR_EACH_ISA(isa) {
        if (isa == DLM_ISA_SCALAR || isa == DLM_ISA_SSE2) continue;   /* no FMA there */
        dlm_ctx *ctx = test_open(isa, 1);
        matmul_data d;
        matmul_make(&d, 19, 37, 1031);
        matmul_run(ctx, &d);
        LABEL("%s", dlm_isa_name((dlm_isa)isa));
        for (int i = 0; i < d.M * d.N; i++) {
            float sum = 0;
            for (int k = 0; k < d.K; k++)
                sum = fmaf(d.a[i / d.N * d.K + k], d.b[i % d.N * d.K + k], sum);
            CHECK_CLOSE(d.out[MATMUL_NT][i], sum, 0);
        }
        matmul_free(&d);
        test_close(ctx);
    }
}

/* Rows first .. first+rows of a and of b on their own: the same bits as in the whole. */
static void matmul_compare_part(dlm_ctx *ctx, const matmul_data *whole, int first_m,
                                int M, int first_n, int N)
{
    matmul_data d;
    int K = whole->K;
    matmul_make(&d, M, N, K);
    memcpy(d.a, whole->a + first_m * K, (size_t)(M * K) * sizeof(float));
    memcpy(d.b, whole->b + first_n * K, (size_t)(N * K) * sizeof(float));
    for (int i = 0; i < M * K; i++) d.at[i % K * M + i / K] = d.a[i];
    for (int i = 0; i < N * K; i++) d.bt[i % K * N + i / K] = d.b[i];
    matmul_run(ctx, &d);
    for (int kind = 0; kind < MATMUL_KINDS; kind++) {
        LABEL("%s, rows %d+%d, columns %d+%d of %d x %d x %d, %s, %d threads",
              matmul_names[kind], first_m, M, first_n, N, whole->M, whole->N, K,
              dlm_isa_name(dlm_active_isa(ctx)), dlm_active_threads(ctx));
        for (int i = 0; i < M; i++)
            CHECK(memcmp(d.out[kind] + i * N,
                         whole->out[kind] + (first_m + i) * whole->N + first_n,
                         (size_t)N * sizeof(float)) == 0);
    }
    matmul_free(&d);
}

TEST(matmul_rows_do_not_depend_on_sizes_or_threads)
{
    static const int shapes[][3] = { { 65, 47, 33 }, { 140, 300, 530 }, { 33, 65, 1 } };
    FOR_EACH_ISA(isa) {
        for (int s = 0; s < 3; s++) {
            matmul_data whole;
            matmul_make(&whole, shapes[s][0], shapes[s][1], shapes[s][2]);
            dlm_ctx *one = test_open(isa, 1);
            matmul_run(one, &whole);
            test_close(one);
            for (int threads = 1; threads <= 4; threads *= 2) {
                dlm_ctx *ctx = test_open(isa, threads);
                matmul_compare_part(ctx, &whole, 0, whole.M, 0, whole.N);
                for (int i = 0; i < 10; i++) {
                    int m = test_below(whole.M), n = test_below(whole.N);
                    matmul_compare_part(ctx, &whole, m, 1 + test_below(whole.M - m),
                                        n, 1 + test_below(whole.N - n));
                }
                test_close(ctx);
            }
            matmul_free(&whole);
        }
    }
}

/* Denormal factors count; a product with a power of two is exact. */
TEST(matmul_of_denormals_is_exact)
{
    FOR_EACH_ISA(isa) {
        dlm_ctx *ctx = test_open(isa, 1);
        for (int side = 0; side < 2; side++) {
            matmul_data d;
            matmul_make(&d, 37, 65, 1);
            for (int i = 0; i < d.M; i++)
                d.a[i] = d.at[i] = side ? (float)ldexp(1 + i, -149) : (i % 2 ? 0.5f : 2);
            for (int i = 0; i < d.N; i++)
                d.b[i] = d.bt[i] = side ? 2 : (float)ldexp(2 + 2 * i, -149);
            matmul_run(ctx, &d);
            for (int i = 0; i < d.M * d.N * MATMUL_KINDS; i++) {
                const int at = i / MATMUL_KINDS, kind = i % MATMUL_KINDS;
                LABEL("%s, side %d, %s", dlm_isa_name((dlm_isa)isa), side,
                      matmul_names[kind]);
                CHECK_CLOSE(d.out[kind][at],
                            (double)d.a[at / d.N] * (double)d.b[at % d.N], 0);
            }
            matmul_free(&d);
        }
        test_close(ctx);
    }
}

/* The smallest scratch of an ISA, as the contract has it. */
static size_t least_scratch(int isa)
{
    switch (isa) {
    case DLM_ISA_SCALAR: return 4096;
    case DLM_ISA_SSE2: case DLM_ISA_NEON: return 8192;
    case DLM_ISA_AVX2: return 16384;
    default: return 32768;
    }
}

/* In memory given byte by byte, so that a sanitizer sees what goes beyond.  150 rows:
   too many for b to be read in place. */
TEST(matmul_does_not_depend_on_scratch)
{
    NEEDS_NARROW_WORDS();
    FOR_EACH_ISA(isa) {
        matmul_data d[6];
        for (int i = 0; i < 6; i++) {
            const size_t sizes[3] = { least_scratch(isa), 65536, (size_t)1 << 24 };
            dlm_options o = {0};
            o.isa = (dlm_isa)isa;
            o.scratch = sizes[i % 3];
            o.memory.size = dlm_ctx_bytes(&o);
            o.memory.base = test_malloc(o.memory.size);
            dlm_ctx *ctx = NULL;
            CHECK_OK(dlm_init(&ctx, &o));
            test_state = test_seed;
            matmul_make(&d[i], 150, 333, 700);
            if (ctx && i < 3) matmul_run(ctx, &d[i]);
            else if (ctx) matmul_run_in_bf16(ctx, &d[i]);
            dlm_shutdown(ctx);
            free(o.memory.base);
        }
        for (int i = 0; i < 6 * MATMUL_KINDS; i++) {
            const int a = i % 6, kind = i / 6;
            LABEL("%s, %s, %d", matmul_names[kind], dlm_isa_name((dlm_isa)isa), a);
            CHECK(memcmp(d[a].out[kind], d[a / 3 * 3].out[kind],
                         150 * 333 * sizeof(float)) == 0);
        }
        for (int i = 0; i < 6; i++) matmul_free(&d[i]);
        dlm_options less = {0};
        char text[40];
        less.isa = (dlm_isa)isa;
        less.scratch = least_scratch(isa) - 1;
        snprintf(text, sizeof text, "%s can use %u .. ", dlm_isa_name((dlm_isa)isa),
                 (unsigned)least_scratch(isa));
        test_init_fails(less, DLM_E_CONFIG, text);
    }
}

/* ==[ toys ]==================================================================
   Tiny models with lively weights, ragged canvases to fill in, and a record of a run:
   what the tests of sessions, samplers, trainers and files work on. */

enum { TOY_VOCAB = 13, TOY_MASK = 12, TOY_SEQS = 6, TOY_SLOTS = 24,
       TOY_ALL = TOY_SEQS * TOY_SLOTS, TOY_KINDS = 5 };

/* The patterns with their two alignments.  0, 1: FULL; 2, 3: BLOCK; 4: CAUSAL. */
static const char *const toy_kind_names[TOY_KINDS] = {
    "full", "full shifted", "block", "block shifted", "causal"
};

static dlm_config toy_config(int kind)
{
    dlm_config c = {0};
    c.vocab = TOY_VOCAB;
    c.dim = 16;
    c.layers = 2;
    c.heads = 2;
    c.kv_heads = 1;
    c.ffn = 32;
    c.max_seq = TOY_SLOTS;
    c.block = 4;
    c.pattern = kind < 2 ? DLM_PATTERN_FULL : kind < 4 ? DLM_PATTERN_BLOCK
                                                       : DLM_PATTERN_CAUSAL;
    c.shifted = kind == 1 || kind == 3;
    return c;
}

/* Matrices are blown up: fresh weights give nearly uniform predictions, in which a
   wrong key or row would not show. */
static dlm_model *toy_model_of(dlm_ctx *ctx, const dlm_config *c, uint64_t seed)
{
    dlm_model *m = NULL;
    CHECK_OK(dlm_model_create(&m, ctx, c, seed, NULL));
    for (int i = 0; m && i < dlm_model_tensors(m); i++) {
        dlm_tensor t;
        dlm_model_tensor(m, i, &t);
        float gain = t.decayed || t.layer < 0 ? 20.0f : 1.0f;
        if (t.cols == 1 && t.layer < 0) gain = 1.0f;         /* the last norm */
        for (int k = 0; k < t.rows * t.cols; k++) t.data[k] *= gain;
    }
    return m;
}

static dlm_model *toy_model(dlm_ctx *ctx, int kind, uint64_t seed)
{
    dlm_config c = toy_config(kind);
    return toy_model_of(ctx, &c, seed);
}

/* All weights 0: every logit is exactly 0, so that logit_bias is the logits. */
static dlm_model *toy_blank(dlm_ctx *ctx, int vocab)
{
    dlm_model *m = NULL;
    dlm_config c = toy_config(0);
    c.vocab = vocab;
    CHECK_OK(dlm_model_create(&m, ctx, &c, 1, NULL));
    if (m) memset(m->weights, 0, m->n_params * sizeof(float));
    return m;
}

static dlm_session *toy_session(dlm_ctx *ctx, const dlm_model *m, int cached)
{
    dlm_session *s = NULL;
    dlm_limits lim = {0};
    lim.seqs = TOY_SEQS;
    lim.cached = cached;
    CHECK_OK(dlm_session_create(&s, ctx, m, &lim, NULL));
    return s;
}

typedef struct toy_run {
    int       canvas[TOY_ALL], lengths[TOY_SEQS], n_seqs;
    dlm_event events[TOY_ALL];
    int       n_events, forwards, length[TOY_SEQS];
    double    flops;
    dlm_error error;
} toy_run;

static void toy_sequence(toy_run *r, int seq, int length, int prompt, uint64_t salt)
{
    dlm_address at = { salt, DLM_RANDOM_USER, 0, (uint32_t)seq, 0 };
    r->lengths[seq] = length;
    for (int i = 0; i < TOY_SLOTS; i++) {
        int token = (int)(dlm_uniform(&at, (uint32_t)i) * (int)TOY_MASK);
        r->canvas[seq * TOY_SLOTS + i] = i >= length ? -7 : i < prompt ? token : TOY_MASK;
    }
}

/* Ragged: long, no prompt with visible islands, nothing to do, one token, one mask at
   the end, prompt of whole blocks with islands.  A causal model needs a prompt. */
static void toy_canvas(toy_run *r, int causal)
{
    memset(r, 0, sizeof *r);
    r->n_seqs = TOY_SEQS;
    toy_sequence(r, 0, 24, 5, 1);
    toy_sequence(r, 1, 13, causal, 1);
    toy_sequence(r, 2, 9, 9, 1);
    toy_sequence(r, 3, 1, causal, 1);
    toy_sequence(r, 4, 7, 6, 1);
    toy_sequence(r, 5, 18, 4, 1);
    r->canvas[1 * TOY_SLOTS + 3] = 2;
    r->canvas[1 * TOY_SLOTS + 8] = 11;
    r->canvas[5 * TOY_SLOTS + 9] = 0;
    r->canvas[5 * TOY_SLOTS + 10] = 5;
    r->canvas[5 * TOY_SLOTS + 17] = 7;
}

/* Runs a session's sampler to the end, or gives up: a run that hangs fails the test. */
static void toy_drive(toy_run *r, dlm_session *s, const dlm_sample_options *o)
{
    dlm_sampler *sm = NULL;
    r->error = dlm_sampler_create(&sm, s, o, NULL);
    if (r->error) return;
    r->error = dlm_sampler_begin(sm, r->canvas, r->lengths, r->n_seqs);
    for (int i = 0; !r->error && !dlm_sampler_done(sm) && i < 1000; i++)
        r->error = dlm_sampler_step(sm);
    if (!r->error) {
        const dlm_event *trace = dlm_sampler_trace(sm, &r->n_events);
        CHECK(dlm_sampler_done(sm));
        CHECK(r->n_events <= TOY_ALL);
        if (r->n_events > TOY_ALL) r->n_events = TOY_ALL;
        for (int i = 0; i < r->n_events; i++) r->events[i] = trace[i];
        for (int q = 0; q < r->n_seqs; q++) r->length[q] = dlm_sampler_length(sm, q);
        dlm_sampler_cost(sm, &r->forwards, &r->flops);
    }
    dlm_sampler_free(sm);
}

static void toy_generate(toy_run *r, dlm_ctx *ctx, const dlm_model *m, int cached,
                         const dlm_sample_options *o)
{
    dlm_session *s = toy_session(ctx, m, cached);
    if (s) toy_drive(r, s, o);
    dlm_session_free(s);
    CHECK_OK(r->error);
}

static int toy_same_tokens(const toy_run *a, const toy_run *b)
{
    return memcmp(a->canvas, b->canvas, sizeof a->canvas) == 0;
}

static int toy_same_events(const toy_run *a, const toy_run *b)
{
    return a->n_events == b->n_events
        && memcmp(a->events, b->events, (size_t)a->n_events * sizeof a->events[0]) == 0;
}

/* Upper limit of chi-square with `dof` degrees that chance exceeds once in a million
   (Wilson and Hilferty's cube root approximation, z = 4.75). */
static double toy_chi_limit(int dof)
{
    double a = 2.0 / (9.0 * dof), c = 1 - a + 4.75 * sqrt(a);
    return dof * c * c * c;
}

/* Chi-square of counts (n) against probabilities p; the test fails when a count stands
   where p is 0. */
static void toy_check_counts(const int *counts, const double *p, int n)
{
    double total = 0, chi = 0;
    int dof = -1;
    for (int i = 0; i < n; i++) total += counts[i];
    for (int i = 0; i < n; i++) {
        if (p[i] <= 0) { CHECK(counts[i] == 0); continue; }
        double want = total * p[i], d = counts[i] - want;
        chi += d * d / want;
        dof++;
    }
    CHECK(total > 0);
    if (dof > 0) CHECK_CLOSE(chi, 0, toy_chi_limit(dof));
}

/* ==[ reference ]=============================================================
   The transformer in double, written from its formulas for reading: every row, every
   key, no blocking.  Parameters are found by their Hugging Face names in a double copy
   of the weights, which finite differences may change entry by entry. */

enum { REF_LAYERS = 4 };

typedef struct ref_layer {
    const double *norm1, *q, *k, *v, *o, *bq, *bk, *bv, *qn, *kn;
    const double *norm2, *gate, *up, *bup, *down, *bdown;
} ref_layer;

typedef struct reference {
    dlm_config    c;
    double       *w;                       /* (n_params), laid out as the model's  */
    const double *embed, *norm, *head, *head_bias;
    ref_layer     layer[REF_LAYERS];
} reference;

/* The parameter called name, which must be there with this shape. */
static const double *ref_find(const reference *r, const dlm_model *m, int layer,
                              const char *name, int rows, int cols)
{
    char full[80];
    if (layer < 0) snprintf(full, sizeof full, "%s", name);
    else           snprintf(full, sizeof full, "model.layers.%d.%s", layer, name);
    for (int i = 0; i < dlm_model_tensors(m); i++) {
        dlm_tensor t;
        dlm_model_tensor(m, i, &t);
        if (strcmp(t.name, full) != 0) continue;
        LABEL("%s", full);
        CHECK(t.rows == rows && t.cols == cols && t.layer == layer);
        LABEL("%s", "");
        return r->w + (t.data - m->weights);
    }
    printf("the model has no tensor %s\n", full);
    exit(1);
    return NULL;                           /* tcc does not know of exit            */
}

static void ref_find_layer(reference *r, const dlm_model *m, int i)
{
    const dlm_config *c = &r->c;
    ref_layer *l = &r->layer[i];
    int C = c->dim, F = c->ffn, Q = c->heads * c->head_dim, K = c->kv_heads * c->head_dim;
    l->norm1 = ref_find(r, m, i, "input_layernorm.weight", C, 1);
    l->q = ref_find(r, m, i, "self_attn.q_proj.weight", Q, C);
    l->k = ref_find(r, m, i, "self_attn.k_proj.weight", K, C);
    l->v = ref_find(r, m, i, "self_attn.v_proj.weight", K, C);
    l->o = ref_find(r, m, i, "self_attn.o_proj.weight", C, Q);
    if (c->qkv_bias) {
        l->bq = ref_find(r, m, i, "self_attn.q_proj.bias", Q, 1);
        l->bk = ref_find(r, m, i, "self_attn.k_proj.bias", K, 1);
        l->bv = ref_find(r, m, i, "self_attn.v_proj.bias", K, 1);
    }
    if (!c->no_qk_norm) {
        l->qn = ref_find(r, m, i, "self_attn.q_norm.weight", c->head_dim, 1);
        l->kn = ref_find(r, m, i, "self_attn.k_norm.weight", c->head_dim, 1);
    }
    l->norm2 = ref_find(r, m, i, "post_attention_layernorm.weight", C, 1);
    if (c->gelu_mlp) {
        l->bup = ref_find(r, m, i, "mlp.up_proj.bias", F, 1);
        l->bdown = ref_find(r, m, i, "mlp.down_proj.bias", C, 1);
    } else {
        l->gate = ref_find(r, m, i, "mlp.gate_proj.weight", F, C);
    }
    l->up = ref_find(r, m, i, "mlp.up_proj.weight", F, C);
    l->down = ref_find(r, m, i, "mlp.down_proj.weight", C, F);
}

static double *ref_doubles(size_t n) { return (double *)test_malloc(n * sizeof(double)); }

static void ref_open(reference *r, const dlm_model *m)
{
    memset(r, 0, sizeof *r);
    r->c = m->config;
    r->w = ref_doubles(m->n_params);
    for (size_t i = 0; i < m->n_params; i++) r->w[i] = m->weights[i];
    int V = r->c.vocab, C = r->c.dim;
    r->embed = ref_find(r, m, -1, "model.embed_tokens.weight", V, C);
    r->norm = ref_find(r, m, -1, "model.norm.weight", C, 1);
    r->head = r->embed;
    if (r->c.untied_head) r->head = ref_find(r, m, -1, "lm_head.weight", V, C);
    if (r->c.head_bias) r->head_bias = ref_find(r, m, -1, "lm_head.bias", V, 1);
    for (int i = 0; i < r->c.layers; i++) ref_find_layer(r, m, i);
}

static void ref_close(reference *r) { free(r->w); }

/* y (rows,N) = x (rows,K) w^T + bias, w (N,K). */
static double *ref_linear(const double *x, const double *w, const double *bias, int rows,
                          int N, int K)
{
    double *y = ref_doubles((size_t)rows * (size_t)N);
    for (int i = 0; i < rows; i++) {
        for (int n = 0; n < N; n++) {
            double sum = bias ? bias[n] : 0;
            for (int k = 0; k < K; k++) sum += x[i * K + k] * w[n * K + k];
            y[i * N + n] = sum;
        }
    }
    return y;
}

static void ref_normalise(double *y, const double *x, const double *g, int C, double eps)
{
    double mean = 0;
    for (int i = 0; i < C; i++) mean += x[i] * x[i] / C;
    for (int i = 0; i < C; i++) y[i] = x[i] / sqrt(mean + eps) * g[i];
}

static double *ref_norm_rows(const double *x, const double *g, int rows, int C,
                             double eps)
{
    double *y = ref_doubles((size_t)rows * (size_t)C);
    for (int i = 0; i < rows; i++) ref_normalise(y + i * C, x + i * C, g, C, eps);
    return y;
}

/* Rotates the pairs (i, i + D/2) of one head by position * theta^(-2i/D). */
static void ref_rotate(double *x, int D, int position, double theta)
{
    for (int i = 0; i < D / 2; i++) {
        double angle = position * pow(theta, -2.0 * i / D);
        double a = x[i], b = x[i + D / 2];
        x[i] = a * cos(angle) - b * sin(angle);
        x[i + D / 2] = b * cos(angle) + a * sin(angle);
    }
}

static int ref_slot(const dlm_batch *b, int s, int row)
{
    return b->slots ? b->slots[row] : row - b->start[s];
}

static int ref_sees(const dlm_keys *k, int slot)
{
    return (slot >= k->lo0 && slot < k->hi0) || (slot >= k->lo1 && slot < k->hi1);
}

/* QK-norm, then rotation, of every head of x (N, heads * D). */
static void ref_prepare(const reference *r, const dlm_batch *b, double *x, int heads,
                        const double *g)
{
    int D = r->c.head_dim;
    for (int s = 0; s < b->n_seqs; s++) {
        for (int i = b->start[s]; i < b->start[s + 1]; i++) {
            int position = b->positions ? b->positions[i] : ref_slot(b, s, i);
            for (int h = 0; h < heads; h++) {
                double *x_ih = x + (i * heads + h) * D;
                if (g) ref_normalise(x_ih, x_ih, g, D, r->c.norm_eps);
                ref_rotate(x_ih, D, position, r->c.rope_theta);
            }
        }
    }
}

/* One row and head: out (D) = softmax(q . k / sqrt(D)) v over the rows of sequence s
   that stand in slots the row may see. */
static void ref_attend(const reference *r, const dlm_batch *b, int s, int row,
                       const double *q, const double *k, const double *v, double *out)
{
    int D = r->c.head_dim, stride = r->c.kv_heads * D;
    double total = 0, largest = -INFINITY;
    for (int pass = 0; pass < 2; pass++) {
        for (int j = b->start[s]; j < b->start[s + 1]; j++) {
            if (!ref_sees(&b->keys[row], ref_slot(b, s, j))) continue;
            double score = 0;
            for (int d = 0; d < D; d++) score += q[d] * k[j * stride + d] / sqrt(D);
            if (pass == 0) {
                if (score > largest) largest = score;
                continue;
            }
            double p = exp(score - largest);
            total += p;
            for (int d = 0; d < D; d++) out[d] += p * v[j * stride + d];
        }
    }
    for (int d = 0; d < D; d++) out[d] /= total;
}

/* x (N,C) += attention of layer l on the normalised rows. */
static void ref_attention(const reference *r, const ref_layer *l, const dlm_batch *b,
                          double *x)
{
    const dlm_config *c = &r->c;
    int N = b->start[b->n_seqs], C = c->dim, D = c->head_dim, H = c->heads;
    int KV = c->kv_heads;
    double *y = ref_norm_rows(x, l->norm1, N, C, c->norm_eps);
    double *q = ref_linear(y, l->q, l->bq, N, H * D, C);
    double *k = ref_linear(y, l->k, l->bk, N, KV * D, C);
    double *v = ref_linear(y, l->v, l->bv, N, KV * D, C);
    ref_prepare(r, b, q, H, l->qn);
    ref_prepare(r, b, k, KV, l->kn);
    double *out = (double *)calloc((size_t)(N * H * D) + 1, sizeof(double));
    if (!out) exit(1);
    for (int s = 0; s < b->n_seqs; s++)
        for (int i = b->start[s]; i < b->start[s + 1]; i++)
            for (int h = 0; h < H; h++) {
                int kv = h / (H / KV);
                ref_attend(r, b, s, i, q + (i * H + h) * D, k + kv * D, v + kv * D,
                           out + (i * H + h) * D);
            }
    double *o = ref_linear(out, l->o, NULL, N, C, H * D);
    for (int i = 0; i < N * C; i++) x[i] += o[i];
    free(y); free(q); free(k); free(v); free(out); free(o);
}

/* GELU in its tanh form. */
static double ref_gelu(double x)
{
    return 0.5 * x * (1 + tanh(sqrt(2 / 3.141592653589793) * (x + 0.044715 * x * x * x)));
}

/* x (N,C) += down(silu(gate) * up), or ungated down(gelu(up + b)) + b. */
static void ref_mlp(const reference *r, const ref_layer *l, int N, double *x)
{
    int C = r->c.dim, F = r->c.ffn;
    double *y = ref_norm_rows(x, l->norm2, N, C, r->c.norm_eps);
    double *up = ref_linear(y, l->up, l->bup, N, F, C);
    double *gate = l->gate ? ref_linear(y, l->gate, NULL, N, F, C) : NULL;
    for (int i = 0; i < N * F; i++)
        up[i] = gate ? gate[i] / (1 + exp(-gate[i])) * up[i] : ref_gelu(up[i]);
    double *down = ref_linear(up, l->down, l->bdown, N, C, F);
    for (int i = 0; i < N * C; i++) x[i] += down[i];
    free(y); free(gate); free(up); free(down);
}

/* Logits (n_out, V) of the out rows; free them. */
static double *ref_logits(const reference *r, const dlm_batch *b)
{
    int N = b->start[b->n_seqs], C = r->c.dim;
    double *x = ref_doubles((size_t)(N * C));
    for (int i = 0; i < N; i++)
        for (int j = 0; j < C; j++) x[i * C + j] = r->embed[b->tokens[i] * C + j];
    for (int i = 0; i < r->c.layers; i++) {
        ref_attention(r, &r->layer[i], b, x);
        ref_mlp(r, &r->layer[i], N, x);
    }
    double *looked_at = ref_doubles((size_t)(b->n_out * C));
    for (int i = 0; i < b->n_out; i++)
        ref_normalise(looked_at + i * C, x + b->out_rows[i] * C, r->norm, C,
                      r->c.norm_eps);
    double *logits = ref_linear(looked_at, r->head, r->head_bias, b->n_out, r->c.vocab,
                                C);
    free(x); free(looked_at);
    return logits;
}

static double ref_log_sum_exp(const double *x, int n)
{
    double largest = x[0], sum = 0;
    for (int i = 1; i < n; i++) if (x[i] > largest) largest = x[i];
    for (int i = 0; i < n; i++) sum += exp(x[i] - largest);
    return largest + log(sum);
}

/* -log softmax(logits)[target]. */
static double ref_cross_entropy(const double *logits, int V, int target)
{
    return ref_log_sum_exp(logits, V) - logits[target];
}

/* ==[ model ]================================================================ */

/* Weights of useful size everywhere, norms and biases included, so that no part of the
   network can hide: matrices keep the variance, norms lie around 1. */
static void test_randomise(dlm_model *m)
{
    for (int i = 0; i < dlm_model_tensors(m); i++) {
        dlm_tensor t;
        dlm_model_tensor(m, i, &t);
        size_t n = (size_t)t.rows * (size_t)t.cols;
        int norm = strstr(t.name, "norm.") != NULL;
        float scale = t.cols > 1 ? sqrtf(3.0f / (float)t.cols) : 0.5f;
        for (size_t j = 0; j < n; j++)
            t.data[j] = (norm ? 1.0f : 0.0f) + scale * test_float();
    }
}

static dlm_config test_config(int vocab, int dim, int layers, int heads, int max_seq)
{
    dlm_config c = {0};
    c.vocab = vocab; c.dim = dim; c.layers = layers; c.heads = heads;
    c.max_seq = max_seq;
    return c;
}

/* A randomised model; every failure is fatal to the test program's sense. */
static dlm_model *test_model(dlm_ctx *ctx, const dlm_config *c)
{
    dlm_model *m = NULL;
    CHECK_OK(dlm_model_create(&m, ctx, c, test_seed, NULL));
    if (!m) { printf("no model: %s\n", dlm_last_error(ctx)); exit(1); }
    test_randomise(m);
    return m;
}

static dlm_session *test_session(dlm_ctx *ctx, const dlm_model *m, int seqs, int slots,
                                 int rows, int cached)
{
    dlm_limits lim = {0};
    lim.seqs = seqs; lim.slots = slots; lim.rows = rows; lim.cached = cached;
    dlm_session *s = NULL;
    CHECK_OK(dlm_session_create(&s, ctx, m, &lim, NULL));
    if (!s) { printf("no session: %s\n", dlm_last_error(ctx)); exit(1); }
    return s;
}

TEST(model_tensors_tile_the_weights_in_order)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int i = 0; i < 32; i++) {
        dlm_config c = test_config(11, 16, 2, 4, 32);
        c.untied_head = i & 1; c.no_qk_norm = i >> 1 & 1; c.qkv_bias = i >> 2 & 1;
        c.gelu_mlp = i >> 3 & 1; c.head_bias = i >> 4 & 1;
        c.kv_heads = 2;
        dlm_model *m = test_model(ctx, &c);
        reference r;
        ref_open(&r, m);                   /* checks every name and shape          */
        size_t used = 0;
        int n = dlm_model_tensors(m), layers = 9 + 2 * !c.no_qk_norm + 3 * c.qkv_bias;
        layers += c.gelu_mlp;
        CHECK(n == 2 + c.untied_head + c.head_bias + 2 * layers);
        for (int j = 0; j < n; j++) {
            dlm_tensor t;
            dlm_model_tensor(m, j, &t);
            LABEL("%s", t.name);
            CHECK(t.data == m->weights + used);
            CHECK(t.decayed == (t.cols > 1));
            used += (size_t)t.rows * (size_t)t.cols;
        }
        LABEL("%s", "");
        CHECK(used == m->n_params);
        ref_close(&r);
        dlm_model_free(m);
    }
    dlm_model_free(NULL);
    test_close(ctx);
}

TEST(model_starts_with_the_documented_distribution)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_config c = test_config(300, 96, 2, 4, 32);
    c.qkv_bias = c.untied_head = 1;
    dlm_model *m = NULL, *same = NULL, *other = NULL;
    CHECK_OK(dlm_model_create(&m, ctx, &c, 7, NULL));
    CHECK_OK(dlm_model_create(&same, ctx, &c, 7, NULL));
    CHECK_OK(dlm_model_create(&other, ctx, &c, 8, NULL));
    CHECK(memcmp(m->weights, same->weights, m->n_params * sizeof(float)) == 0);
    for (int i = 0; i < dlm_model_tensors(m); i++) {
        dlm_tensor t;
        dlm_model_tensor(m, i, &t);
        size_t n = (size_t)t.rows * (size_t)t.cols, equal = 0;
        double sum = 0, squares = 0;
        for (size_t j = 0; j < n; j++) {
            sum += t.data[j];
            squares += (double)t.data[j] * t.data[j];
            equal += t.data[j] == other->weights[t.data - m->weights + (ptrdiff_t)j];
        }
        LABEL("%s", t.name);
        if (t.cols == 1) {
            CHECK_CLOSE(sum / (double)n, strstr(t.name, "norm") ? 1 : 0, 0);
            continue;
        }
        int residual = strstr(t.name, "o_proj") || strstr(t.name, "down_proj");
        double want = residual ? 0.02 / sqrt(2.0 * 2) : 0.02, count = (double)n;
        CHECK_CLOSE(sum / count, 0, 5 * want / sqrt(count));
        CHECK_CLOSE(sqrt(squares / count) / want, 1, 5 / sqrt(2 * count));
        CHECK(equal < n / 1000 + 2);
    }
    dlm_model_free(m); dlm_model_free(same); dlm_model_free(other);
    test_close(ctx);
}

/* ==[ configs and options ]=================================================== */

static void config_try(dlm_ctx *ctx, const dlm_config *c, const char *text)
{
    dlm_config copy = *c;
    dlm_model *m = NULL, *w = NULL;
    static const float nothing[1] = { 0 };
    LABEL("%s", text);
    CHECK_ERROR(dlm_config_resolve(ctx, &copy), DLM_E_CONFIG, ctx, text);
    CHECK_ERROR(dlm_model_create(&m, ctx, c, 1, NULL), DLM_E_CONFIG, ctx, text);
    CHECK(m == NULL);
    CHECK_ERROR(dlm_model_wrap(&w, ctx, c, nothing, 1), DLM_E_CONFIG, ctx, text);
    CHECK(w == NULL);
    CHECK(dlm_model_bytes(ctx, c, DLM_F32, 0) == 0);
    CHECK(dlm_model_bytes(ctx, c, DLM_F32, 1) == 0);
    CHECK(strstr(dlm_last_error(ctx), text));
}

static const int config_huge = 2147483647;

#define TRY(assignment, text) do { c = base; assignment; config_try(ctx, &c, text); } \
        while (0)
TEST(config_refuses_absurd_sizes_by_name)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_config base = toy_config(2), c;
    TRY(c.vocab = 0, "vocab");
    TRY(c.vocab = -1, "vocab");
    TRY(c.vocab = config_huge, "vocab");
    TRY(c.dim = 0, "dim");
    TRY(c.dim = -16, "dim");
    TRY(c.dim = config_huge, "dim");
    TRY(c.layers = 0, "layers");
    TRY(c.layers = -1, "layers");
    TRY(c.layers = config_huge, "layers");
    TRY(c.heads = 0, "heads");
    TRY(c.heads = -2, "heads");
    TRY(c.heads = config_huge, "heads");
    TRY(c.max_seq = 0, "max_seq");
    TRY(c.max_seq = -1, "max_seq");
    TRY(c.kv_heads = -1, "kv_heads");
    TRY(c.head_dim = -2, "head_dim");
    TRY(c.head_dim = 258, "head_dim");
    TRY(c.head_dim = config_huge - 1, "head_dim");
    TRY(c.ffn = -1, "ffn");
    TRY(c.ffn = config_huge, "ffn");
    TRY(c.block = -1, "block");
    test_close(ctx);
}

TEST(config_refuses_contradictions_by_name)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_config base = toy_config(2), c;
    TRY(c.kv_heads = 4, "kv_heads");                 /* more than heads           */
    TRY((c.heads = 6, c.kv_heads = 4, c.head_dim = 4), "kv_heads");
    TRY(c.head_dim = 7, "head_dim");
    TRY((c.heads = 3, c.kv_heads = 0), "head");      /* 16 / 3 is not whole       */
    TRY((c.heads = 16, c.kv_heads = 0), "head_dim"); /* 1: odd                    */
    TRY(c.mask_id = -1, "mask_id");
    TRY(c.mask_id = TOY_VOCAB, "mask_id");
    TRY(memset(&c.pattern, 3, 1), "pattern");
    TRY(memset(&c.pattern, 255, sizeof c.pattern), "pattern");
    TRY(c.rope_theta = -1, "rope_theta");
    TRY(c.rope_theta = NAN, "rope_theta");
    TRY(c.rope_theta = INFINITY, "rope_theta");
    TRY(c.norm_eps = -1e-6f, "norm_eps");
    TRY(c.norm_eps = NAN, "norm_eps");
    test_close(ctx);
}
#undef TRY

/* Sizes that are allowed one by one and overflow together. */
static const dlm__option *const option_tables[] = {
    dlm__config_options, dlm__limits_options, dlm__sample_options, dlm__train_options,
    dlm__distill_options
};

/* Every option at the ends of int (or of float) and around its range: taken, or refused
   with its name, and nothing overflows on the way (make san would stop).  The objects are
   small, so that what is taken is made, or is honestly too large. */
static void options_try(dlm_ctx *ctx, const dlm_model *m, const dlm_model *teacher,
                        int which, const dlm__option *o, double value)
{
    dlm_config c = m->config;
    dlm_limits lim = {0};
    dlm_sample_options sample = {0};
    dlm_train_options train = {0};
    dlm_distill_options distill = {0};
    void *const options[] = { &c, &lim, &sample, &train, &distill };
    dlm_model *fresh = NULL;
    dlm_session *s = NULL;
    dlm_sampler *sm = NULL;
    dlm_trainer *t = NULL;
    dlm_distiller *d = NULL;
    dlm_error e = DLM_OK;
    train.max_rows = 64;
    dlm__set_option(o, options[which], value);
    if (which == 0 && value > 1) e = dlm_config_resolve(ctx, &c);
    else if (which == 0) e = dlm_model_create(&fresh, ctx, &c, 1, NULL);
    else if (which < 3) e = dlm_session_create(&s, ctx, m, &lim, NULL);
    if (which == 2 && !e) e = dlm_sampler_create(&sm, s, &sample, NULL);
    if (which > 2) e = dlm_trainer_create(&t, ctx, (dlm_model *)(uintptr_t)m, &train,
                                          NULL);
    if (which > 3 && !e) e = dlm_distiller_create(&d, t, teacher, &distill, NULL);
    value = dlm__get_option(o, options[which]);              /* rounded to float   */
    LABEL("struct %d, %s = %g", which, o->name, value);
    CHECK(e == DLM_OK || e == DLM_E_CONFIG || e == DLM_E_NOMEM || e == DLM_E_MISMATCH);
    const double lo = o->real ? (float)o->lo : o->lo, hi = o->real ? (float)o->hi : o->hi;
    if (value != 0 && !(value >= lo && value <= hi)
        && strcmp(o->name, "clip") != 0)                 /* above: never             */
        CHECK_ERROR(e, DLM_E_CONFIG, ctx, o->name);
    if (value == o->preset && value != 0) CHECK_OK(e);
    dlm_distiller_free(d); dlm_trainer_free(t); dlm_sampler_free(sm);
    dlm_session_free(s); dlm_model_free(fresh);
}

TEST(options_are_taken_in_their_range_and_refused_outside_by_name)
{
    static const double values[] = { INT_MIN, INT_MIN + 1.0, -1, 0, 1, INT_MAX - 1.0,
                                     INT_MAX };
    test_heap heap = {0};
    dlm_options o = {0};
    dlm_ctx *ctx = NULL;
    dlm_model *m = NULL, *teacher = NULL;
    o.allocator.alloc = test_heap_small; o.allocator.release = test_heap_release;
    o.allocator.user = &heap;
    CHECK_OK(dlm_init(&ctx, &o));
    dlm_config c = test_config(9, 8, 1, 2, 16);
    c.block = 4;
    CHECK_OK(dlm_model_create(&m, ctx, &c, 1, NULL));
    c.pattern = DLM_PATTERN_CAUSAL;
    CHECK_OK(dlm_model_create(&teacher, ctx, &c, 1, NULL));
    for (int which = 0; which < 5; which++)
        for (const dlm__option *at = option_tables[which]; at->name; at++) {
            const double ends[] = { at->preset, at->lo, at->hi, 2 * at->hi, NAN };
            for (size_t k = 0; k < sizeof values / sizeof *values; k++)
                options_try(ctx, m, teacher, which, at, values[k]);
            for (int k = 0; k < 3 + 2 * at->real; k++)
                options_try(ctx, m, teacher, which, at, ends[k]);
        }
    dlm_model_free(m); dlm_model_free(teacher);
    dlm_shutdown(ctx);
    CHECK(heap.live == 0);
}

TEST(config_refuses_more_parameters_than_can_be_counted)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int k = 0; k < 4; k++) {
        dlm_model *m = NULL;
        dlm_config c = toy_config(0);
        c.layers = k < 2 ? 1 << 20 : 2;
        c.dim = k < 2 ? 1 << 20 : 1 << 16;
        c.ffn = k & 1 ? 1 << 30 : 1 << 20;
        c.vocab = 1 << 30;
        c.heads = 1 << 12;
        c.kv_heads = 0;
        LABEL("case %d", k);
        dlm_error e = dlm_config_resolve(ctx, &c);
        CHECK(e == DLM_OK || e == DLM_E_CONFIG);
        size_t bytes = dlm_model_bytes(ctx, &c, DLM_F32, 0);
        CHECK(bytes == 0 || bytes > SIZE_MAX / (1 << 24));  /* never wrapped */
        if (k > 1) continue;                             /* 2^60 floats: too many */
        CHECK_ERROR(dlm_model_create(&m, ctx, &c, 1, NULL), DLM_E_CONFIG, ctx, NULL);
        CHECK(m == NULL && bytes == 0);
    }
    test_close(ctx);
}

TEST(config_fills_in_the_documented_defaults)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_config c = {0};
    c.vocab = 100;
    c.dim = 48;
    c.layers = 1;
    c.heads = 4;
    c.max_seq = 10;
    CHECK_OK(dlm_config_resolve(ctx, &c));
    CHECK(c.mask_id == 99 && c.pattern == DLM_PATTERN_BLOCK && c.block == 8);
    CHECK(c.kv_heads == 4 && c.head_dim == 12 && c.ffn == 128 && c.shifted == 0);
    CHECK(c.rope_theta == 10000 && c.norm_eps == (float)1e-6f);
    dlm_config again = c;
    CHECK_OK(dlm_config_resolve(ctx, &again));
    CHECK(memcmp(&c, &again, sizeof c) == 0);
    c.pattern = DLM_PATTERN_CAUSAL;
    CHECK_OK(dlm_config_resolve(ctx, &c));
    CHECK(c.shifted == 1);
    test_close(ctx);
}

/* In memory of the size it asks for; what becomes of the original is nothing to it. */
TEST(clone_is_a_model_of_its_own)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_memory mem = { NULL, 0 };
    dlm_model *m = toy_model(ctx, 2, 5), *copy = NULL, *packed = NULL, *none = m;
    const dlm_config c = m->config;
    const size_t bytes = m->n_params * sizeof(float);
    float *kept = test_floats(m->n_params);
    memcpy(kept, m->weights, bytes);
    CHECK_OK(dlm_model_clone(NULL, ctx, m, &mem));
    CHECK(mem.size == dlm_model_bytes(ctx, &c, DLM_F32, 0));
    mem.base = test_malloc(mem.size);
    CHECK_OK(dlm_model_clone(&copy, ctx, m, &mem));
    CHECK(copy->weights != m->weights && copy->n_params == m->n_params);
    memset(m->weights, 0, bytes);
    CHECK(!memcmp(kept, copy->weights, bytes) && !memcmp(&copy->config, &c, sizeof c));
    CHECK_OK(dlm_model_pack(&packed, ctx, m, DLM_F32, NULL));
    CHECK_ERROR(dlm_model_clone(&none, ctx, packed, NULL), DLM_E_CONFIG, ctx, "packed");
    CHECK(none == NULL);
    dlm_model_free(m); dlm_model_free(packed); dlm_model_free(copy);
    free(mem.base); free(kept);
    test_close(ctx);
}

TEST(describe_lists_form_and_every_field_and_keeps_to_its_room)
{
    static const char plain[] =
        "form        plain, f32\nparameters  %lu\nbytes       %lu\npattern     causal\n"
        "vocab       9\ndim         8\nlayers      1\nheads       2\n"
        "max_seq     1048576\nmask_id     8\nblock       8\nshifted     1\n"
        "kv_heads    2\nhead_dim    4\n"
        "ffn         32\nuntied_head 0\nno_qk_norm  0\nqkv_bias    0\n"
        "rope_theta  30.5\nnorm_eps    1e-06\nmask_is_0   0\n"
        "gelu_mlp    0\nhead_bias   0\n";
    char want[1024], got[1024];
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_config c = test_config(9, 8, 1, 2, 1 << 20);
    c.pattern = DLM_PATTERN_CAUSAL;
    c.rope_theta = 30.5f;
    dlm_model *m = test_model(ctx, &c), *packed = NULL;
    CHECK_OK(dlm_model_pack(&packed, ctx, m, DLM_F32, NULL));
    snprintf(want, sizeof want, plain, (unsigned long)m->n_params,
             (unsigned long)dlm_model_bytes(ctx, &c, DLM_F32, 0));
    CHECK(dlm_describe(m, got, sizeof got) == strlen(want) && !strcmp(got, want));
    CHECK(dlm_describe(m, NULL, 0) == strlen(want));
    memset(got, '#', sizeof got);
    CHECK(dlm_describe(m, got, 20) == strlen(want));
    CHECK(strlen(got) == 19 && !strncmp(got, want, 19) && got[20] == '#');
    dlm_describe(packed, got, sizeof got);
    CHECK(!strncmp(got, "form        packed, f32\n", 24));
    snprintf(want, sizeof want, "\nbytes       %lu\n",
             (unsigned long)dlm_model_bytes(ctx, &c, DLM_F32, 1));
    CHECK(strstr(got, want) != NULL);
    dlm_model_free(packed); dlm_model_free(m);
    test_close(ctx);
}

TEST(session_limits_are_checked_by_name)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_model *m = toy_model(ctx, 2, 1);
    for (int k = 0; m && k < 9; k++) {
        static const char *const names[4] = { "seqs", "slots", "rows", "out" };
        dlm_session *s = NULL;
        dlm_limits lim = {0};
        int v = k < 4 ? -1 : 2147483647, which = k % 4;
        if (which == 0) lim.seqs = v;
        if (which == 1) lim.slots = v;
        if (which == 2) lim.rows = v;
        if (which == 3) lim.out = v;
        if (k == 8) lim.seqs = lim.slots = 1 << 20;          /* one by one allowed */
        LABEL("%s %d", names[which], v);
        CHECK_ERROR(dlm_session_create(&s, ctx, m, &lim, NULL), DLM_E_CONFIG, ctx,
                    names[which]);
        CHECK(s == NULL);
        dlm_memory mem = { NULL, 7 };
        CHECK_ERROR(dlm_session_create(NULL, ctx, m, &lim, &mem), DLM_E_CONFIG, ctx,
                    names[which]);
        CHECK(mem.size == 7);
    }
    dlm_model_free(m);
    test_close(ctx);
}

static void train_try_options(dlm_ctx *ctx, dlm_model *m, const dlm_train_options *o,
                              const char *text)
{
    dlm_trainer *t = NULL;
    LABEL("%s", text);
    CHECK_ERROR(dlm_trainer_create(&t, ctx, m, o, NULL), DLM_E_CONFIG, ctx, text);
    CHECK(t == NULL);
    CHECK_ERROR(dlm_trainer_create(NULL, ctx, m, o, NULL), DLM_E_CONFIG, ctx, text);
    dlm_trainer_free(t);
}

TEST(trainer_options_are_checked_by_name)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_model *m = toy_model(ctx, 2, 1), *causal = toy_model(ctx, 4, 1);
    if (m && causal) {
        dlm_train_options o, zero = {0};
#define TRY(model, assignment, text) \
        do { o = zero; assignment; train_try_options(ctx, model, &o, text); } while (0)
        TRY(m, o.max_rows = -1, "max_rows");
        TRY(m, memset(&o.objective, 1, sizeof o.objective), "objective");
        TRY(m, memset(&o.objective, 255, sizeof o.objective), "objective");
        TRY(causal, o.objective = DLM_OBJECTIVE_MDLM, "objective");
        TRY(causal, o.objective = DLM_OBJECTIVE_BLOCK, "objective");
        TRY(m, o.objective = DLM_OBJECTIVE_AR, "objective");
        TRY(m, o.precision = DLM_I8, "precision");
        TRY(m, o.precision = (dlm_dtype)77, "precision");
        TRY(m, o.lr = -1, "lr");
        TRY(m, o.lr = NAN, "lr");
        TRY(m, o.lr = INFINITY, "lr");
        TRY(m, o.warmup = -1, "warmup");
        TRY(m, o.total = -1, "total");
        TRY(m, o.schedule = DLM_SCHEDULE_COSINE, "total");
        TRY(m, o.schedule = DLM_SCHEDULE_LINEAR, "total");
        TRY(m, memset(&o.schedule, 1, sizeof o.schedule), "schedule");
        TRY(m, o.lr_min = -1, "lr_min");
        TRY(m, o.lr_min = NAN, "lr_min");
        TRY(m, o.beta1 = 1, "beta1");
        TRY(m, o.beta1 = -0.1f, "beta1");
        TRY(m, o.beta1 = NAN, "beta1");
        TRY(m, o.beta2 = 1, "beta2");
        TRY(m, o.beta2 = NAN, "beta2");
        TRY(m, o.adam_eps = -1, "adam_eps");
        TRY(m, o.adam_eps = 1e-30f, "adam_eps");
        TRY(m, o.adam_eps = NAN, "adam_eps");
        TRY(m, o.weight_decay = -1, "weight_decay");
        TRY(m, o.weight_decay = NAN, "weight_decay");
        TRY(m, o.clip = NAN, "clip");
        TRY(m, o.clip = -1, "clip");
        TRY(m, o.level_min = -0.1f, "level_min");
        TRY(m, o.level_min = NAN, "level_min");
        TRY(m, o.level_max = 1.5f, "level_max");
        TRY(m, o.level_max = NAN, "level_max");
        TRY(m, (o.level_min = 0.6f, o.level_max = 0.5f), "level");
        TRY(m, o.ema = 1, "ema");
        TRY(m, o.ema = -1, "ema");
        TRY(m, o.ema = NAN, "ema");
#undef TRY
    }
    dlm_model_free(m);
    dlm_model_free(causal);
    test_close(ctx);
}

/* ==[ batch ]================================================================ */

enum { TEST_ROWS = 1024, TEST_SEQS = 8 };

typedef struct test_batch {                /* a dlm_batch and what it points to    */
    dlm_batch b;
    int       start[TEST_SEQS + 1], tokens[TEST_ROWS], positions[TEST_ROWS];
    int       slots[TEST_ROWS], lanes[TEST_SEQS], out_rows[TEST_ROWS];
    dlm_keys  keys[TEST_ROWS];
} test_batch;

static void batch_clear(test_batch *t) { memset(t, 0, sizeof *t); }

/* One more sequence of T random tokens. */
static void batch_add(test_batch *t, int T, int vocab, int pattern, int block, int offset)
{
    int first = t->start[t->b.n_seqs];
    for (int i = 0; i < T; i++) {
        t->tokens[first + i] = test_below(vocab);
        t->positions[first + i] = t->slots[first + i] = i;
    }
    dlm_keys_fill(t->keys + first, T, (dlm_pattern)pattern, block, offset);
    t->start[++t->b.n_seqs] = first + T;
}

/* One more doubled row; the noisy copy goes on with masks up to n tokens. */
static void batch_add_copies(test_batch *t, int P, int R, int n, int block, int mask,
                             int vocab)
{
    int first = t->start[t->b.n_seqs], T = P + R;
    dlm_keys_fill(t->keys + first, T, DLM_PATTERN_BLOCK, block, P);
    for (int i = 0; i < T + n; i++) {
        dlm_keys *k = &t->keys[first + i];
        int r = (i - T) / block * block;
        t->tokens[first + i] = i < T + R ? test_below(vocab) : mask;
        t->slots[first + i] = i;
        t->positions[first + i] = i < T ? i : P + i - T;
        if (i < T) continue;
        k->lo0 = 0;
        k->hi0 = P + r;
        k->lo1 = T + r;
        k->hi1 = T + (r + block < n ? r + block : n);
    }
    t->start[++t->b.n_seqs] = first + T + n;
}

static void batch_add_doubled(test_batch *t, int P, int R, int block, int vocab)
{
    batch_add_copies(t, P, R, R, block, 0, vocab);
}

/* As a model of config c learns from it: to the end of its last block, or of it. */
static void batch_add_padded(test_batch *t, const dlm_config *c, int P, int R, int vocab)
{
    int b = c->block, n = (R + b - 1) / b * b;
    batch_add_copies(t, P, R, P + n > c->max_seq ? c->max_seq - P : n, b, c->mask_id,
                     vocab);
}

/* Looks at each row with probability share, and at one at least. */
static const dlm_batch *batch_close(test_batch *t, double share)
{
    int N = t->start[t->b.n_seqs];
    t->b.n_out = 0;
    for (int i = 0; i < N; i++)
        if (test_uniform() < share) t->out_rows[t->b.n_out++] = i;
    if (!t->b.n_out) t->out_rows[t->b.n_out++] = N - 1;
    t->b.start = t->start;
    t->b.tokens = t->tokens;
    t->b.positions = t->positions;
    t->b.keys = t->keys;
    t->b.out_rows = t->out_rows;
    return &t->b;
}

TEST(keys_fill_shows_what_the_pattern_says)
{
    dlm_keys keys[40];
    for (int T = 1; T <= 40; T += 3) {
        for (int block = 1; block <= 9; block++) {
            int offset = test_below(block);
            for (int pattern = 0; pattern < 3; pattern++) {
                dlm_keys_fill(keys, T, (dlm_pattern)pattern, block, offset);
                LABEL("pattern %d, T %d, block %d, offset %d", pattern, T, block, offset);
                for (int i = 0; i < T; i++)
                    for (int j = 0; j < T; j++) {
                        int bi = i < offset ? 0 : (i - offset) / block + 1;
                        int bj = j < offset ? 0 : (j - offset) / block + 1;
                        int want = pattern == DLM_PATTERN_FULL ? 1 :
                                   pattern == DLM_PATTERN_CAUSAL ? j <= i : bj <= bi;
                        CHECK(ref_sees(&keys[i], j) == want);
                        CHECK(keys[i].hi0 <= T && keys[i].hi1 <= T);
                    }
            }
        }
    }
}

/* Methods B.4, as its table says it. */
static int doubled_sees(int n, int m, int P, int R, int block)
{
    if (n < P) return m < P - (P - 1 - n) / block * block;
    if (m < P) return 1;
    int noisy = n >= P + R, r = (n - P) % R / block;
    int other_noisy = m >= P + R, q = (m - P) % R / block;
    if (!noisy) return !other_noisy && q <= r;
    return other_noisy ? q == r : q < r;
}

/* Of the whole blocks that a state shows, up to the response's own end. */
static void doubled_check(const dlm_state *s, int P, int R, int block)
{
    const dlm_batch *b = &s->batch;
    int T = P + R, n_rows = T + (R + block - 1) / block * block;
    CHECK(b->n_seqs == 1 && b->start[1] == n_rows);
    for (int n = 0; n < P + 2 * R; n++) {
        const dlm_keys *k = &b->keys[n];
        CHECK(b->positions[n] == (n < T ? n : n - R));
        CHECK(k->hi0 <= k->lo1 || k->lo1 == k->hi1);
        for (int m = 0; m < n_rows; m++) {
            int seen = m < P + 2 * R ? doubled_sees(n, m, P, R, block)
                : n >= T && (n - T) / block == (m - T) / block;
            CHECK(ref_sees(k, m) == seen);
        }
    }
}

TEST(states_show_doubled_rows_as_block_diffusion_says)
{
    static int tokens[40];
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int P = 0; P <= 13; P++) {
        for (int R = 1; R <= 14; R++) {
            for (int block = 1; block <= 6; block++) {
                dlm_config c = toy_config(2);
                dlm_example e = {0};
                dlm_state *s = NULL;
                c.max_seq = 40;
                c.block = block;
                CHECK_OK(dlm_config_resolve(ctx, &c));
                e.tokens = tokens; e.length = P + R; e.prompt = P;
                LABEL("P %d, R %d, block %d", P, R, block);
                CHECK_OK(dlm_state_create(&s, ctx, &c, DLM_OBJECTIVE_AUTO, 64, 1, NULL));
                CHECK_OK(dlm_state_take(s, &e, 1, 1));
                dlm_state_noise(s, NULL);
                CHECK_OK(dlm_state_layout(s, 0));
                doubled_check(s, P, R, block);
                dlm_state_free(s);
            }
        }
    }
    test_close(ctx);
}

/* ==[ batches ]=============================================================== */

typedef struct batch_rig {                 /* two sequences of 4 and 3 rows        */
    int start[3], tokens[7], positions[7], slots[7], lanes[2], out[3];
    dlm_keys keys[7];
    dlm_batch b;
} batch_rig;

static void batch_make(batch_rig *r)
{
    static const int start[3] = { 0, 4, 7 }, out[3] = { 0, 3, 6 };
    memset(r, 0, sizeof *r);
    memcpy(r->start, start, sizeof start);
    memcpy(r->out, out, sizeof out);
    for (int i = 0; i < 7; i++) {
        r->tokens[i] = i;
        r->slots[i] = r->positions[i] = i < 4 ? i : i - 4;
    }
    r->lanes[1] = 1;
    dlm_keys_fill(r->keys, 4, DLM_PATTERN_FULL, 1, 0);
    dlm_keys_fill(r->keys + 4, 3, DLM_PATTERN_FULL, 1, 0);
    r->b.n_seqs = 2;
    r->b.start = r->start;
    r->b.tokens = r->tokens;
    r->b.positions = r->positions;
    r->b.slots = r->slots;
    r->b.lanes = r->lanes;
    r->b.keys = r->keys;
    r->b.out_rows = r->out;
    r->b.n_out = 3;
}

static int batch_scored;                   /* calls of the callback                */

static void batch_score(void *user, int i, float *logits)
{
    (void)user; (void)i; (void)logits;
    batch_scored++;
}

/* The batch is refused, by name, before anything is written or scored. */
static void batch_try(dlm_ctx *ctx, dlm_session *s, const batch_rig *r, const char *text)
{
    float logits[3 * TOY_VOCAB];
    for (int i = 0; i < 3 * TOY_VOCAB; i++) logits[i] = 777;
    LABEL("%s", text);
    batch_scored = 0;
    CHECK_ERROR(dlm_logits(s, &r->b, logits), DLM_E_INPUT, ctx, text);
    CHECK_ERROR(dlm_forward(s, &r->b, batch_score, NULL), DLM_E_INPUT, ctx, text);
    CHECK(batch_scored == 0);
    for (int i = 0; i < 3 * TOY_VOCAB; i++) CHECK(logits[i] == 777);
}

static void batch_try_all(dlm_ctx *ctx, dlm_session *s, int cached)
{
    batch_rig r;
#define TRY(assignment, text) \
    do { batch_make(&r); assignment; batch_try(ctx, s, &r, text); } while (0)
    TRY(r.b.n_seqs = -1, "seq");
    TRY(r.b.n_seqs = TOY_SEQS + 1, "seq");
    TRY(r.start[0] = 1, "start");
    TRY(r.start[0] = -1, "start");
    TRY(r.start[1] = 8, "start");
    TRY(r.start[1] = -1, "start");
    TRY(r.start[2] = 3, "start");
    TRY(r.start[2] = TOY_ALL + 1, "rows");
    TRY(r.start[2] = 2147483647, "rows");
    TRY(r.tokens[6] = TOY_VOCAB, "token");
    TRY(r.tokens[0] = -1, "token");
    TRY(r.positions[5] = -1, "position");
    TRY(r.positions[5] = TOY_SLOTS, "position");
    TRY(r.slots[5] = -1, "slot");
    TRY(r.slots[5] = TOY_SLOTS, "slot");
    if (cached) TRY(r.lanes[1] = -1, "lane");
    if (cached) TRY(r.lanes[1] = TOY_SEQS, "lane");
    if (cached) TRY(r.lanes[1] = 0, "lanes[0] and lanes[1] are both 0");
    TRY(r.keys[3].lo0 = -1, "key");
    TRY(r.keys[3].hi0 = TOY_SLOTS + 1, "key");
    TRY((r.keys[3].lo0 = 3, r.keys[3].hi0 = 2), "key");
    TRY((r.keys[3].lo1 = 2, r.keys[3].hi1 = 4), "key");      /* overlaps 0..3     */
    TRY((r.keys[3].lo0 = 2, r.keys[3].lo1 = 0, r.keys[3].hi1 = 1), "key");
    TRY((r.keys[3].lo1 = 5, r.keys[3].hi1 = TOY_SLOTS + 9), "key");
    TRY((r.keys[3].hi0 = 0), "key");                 /* a row that sees nothing   */
    TRY(r.b.n_out = -1, "out");
    TRY(r.out[1] = 0, "out_rows");
    TRY(r.out[2] = 2, "out_rows");
    TRY(r.out[0] = -1, "out_rows");
    TRY(r.out[2] = 7, "out_rows");
#undef TRY
    batch_make(&r);
    LABEL("sound, cached %d", cached);
    CHECK_OK(dlm_forward(s, &r.b, batch_score, NULL));
    CHECK(batch_scored == 3);
}

/* A million lanes, shuffled, then one of them twice; all pairs would take minutes. */
TEST(batch_lanes_are_checked_in_one_go)
{
    enum { S = 1 << 20 };
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    int *start = (int *)calloc(S + 1, sizeof(int));
    int *lanes = (int *)calloc(S, sizeof(int));
    dlm__work w;
    dlm_batch b = {0};
    memset(&w, 0, sizeof w);
    w.ctx = ctx; w.seqs = S; w.rows = 1;
    w.n_slots = (int *)calloc(S, sizeof(int));
    b.n_seqs = S; b.start = start; b.lanes = lanes;
    for (int i = 0; i < S; i++) lanes[i] = (int)dlm_shuffled(1, 0, S, (size_t)i);
    CHECK_OK(dlm__check_sequences(&w, &b));
    CHECK_OK(dlm__check_sequences(&w, &b));
    lanes[S - 1] = lanes[77];
    CHECK_ERROR(dlm__check_sequences(&w, &b), DLM_E_INPUT, ctx,
                "lanes[77] and lanes[1048575]");
    free(start); free(lanes); free(w.n_slots);
    test_close(ctx);
}

TEST(forward_refuses_bad_batches_by_name)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_model *m = toy_model(ctx, 0, 1);
    for (int cached = 0; cached < 2; cached++) {
        dlm_session *s = toy_session(ctx, m, cached);
        if (s) batch_try_all(ctx, s, cached);
        dlm_session_free(s);
    }
    dlm_model_free(m);
    test_close(ctx);
}

/* ==[ inference ]============================================================
   The grid: every feature on and off, against the reference, on every ISA. */

typedef struct model_case {
    int   vocab, dim, layers, heads, kv_heads, head_dim, ffn;
    int   untied, no_qk_norm, bias, pattern, block, shifted;
    float theta, eps;                      /* 0: the default                       */
    int   family;
} model_case;

/* MDLM: GELU without a gate, a bias of the head. */
enum { LLAMA, MDLM };

static const model_case model_grid[] = {
    /* V   C  L  H KV   D   F   u  n  b  pattern              block s  theta    eps  */
    {  11, 16, 2, 2, 2,  8, 24, 0, 0, 0, DLM_PATTERN_BLOCK,   4, 0,     0,     0, LLAMA },
    {  13, 12, 2, 4, 2,  2, 10, 1, 1, 1, DLM_PATTERN_FULL,    0, 0,   100, 0.01f, LLAMA },
    {  17, 20, 3, 4, 1, 16, 33, 0, 0, 1, DLM_PATTERN_CAUSAL,  0, 1,     0,  0.1f, LLAMA },
    {  40, 24, 2, 2, 1, 32, 40, 1, 0, 0, DLM_PATTERN_BLOCK,   8, 1, 1e6f,      0, LLAMA },
    {  19, 48, 2, 2, 2, 64, 16, 0, 1, 0, DLM_PATTERN_FULL,    0, 1,     0,     0, LLAMA },
    {   5,  7, 1, 3, 3,  4,  5, 0, 0, 0, DLM_PATTERN_BLOCK,   1, 0,    10,     0, LLAMA },
    {  65, 64, 3, 8, 2, 16, 70, 1, 0, 1, DLM_PATTERN_BLOCK,   5, 0,     0, 0.01f, LLAMA },
    {  33,  8, 1, 1, 1, 256, 8, 1, 0, 0, DLM_PATTERN_FULL,    0, 0,     0,     0, LLAMA },
    {   2,  1, 1, 1, 1,  2,  1, 0, 1, 1, DLM_PATTERN_CAUSAL,  0, 1,     0,  0.1f, LLAMA },
    { 130, 33, 2, 6, 3, 10, 65, 0, 1, 0, DLM_PATTERN_CAUSAL,  0, 1,     0,     0, LLAMA },
    {  50, 24, 2, 3, 3,  8, 96, 1, 1, 1, DLM_PATTERN_FULL,    0, 0,     0, 1e-5f, MDLM },
    {  12, 18, 3, 4, 2,  6, 31, 0, 0, 0, DLM_PATTERN_BLOCK,   4, 0,    50,     0, MDLM },
};
enum { MODEL_CASES = sizeof model_grid / sizeof *model_grid };

static dlm_config case_config(const model_case *g, int max_seq)
{
    dlm_config c = test_config(g->vocab, g->dim, g->layers, g->heads, max_seq);
    c.kv_heads = g->kv_heads; c.head_dim = g->head_dim; c.ffn = g->ffn;
    c.untied_head = g->untied; c.no_qk_norm = g->no_qk_norm; c.qkv_bias = g->bias;
    c.pattern = (dlm_pattern)g->pattern; c.block = g->block; c.shifted = g->shifted;
    c.rope_theta = g->theta; c.norm_eps = g->eps;
    c.gelu_mlp = c.head_bias = g->family == MDLM;
    return c;
}

/* Batches of a case: 0 one sequence, 1 ragged, 2 doubled among others, 3 a long one,
   4 a single row, 5 arbitrary keys; and 6, two long ones for gradients. */
enum { BATCH_SHAPES = 6 };

/* Any two ranges in order, one of them not empty; every row its own. */
static void batch_any_keys(test_batch *t)
{
    for (int s = 0; s < t->b.n_seqs; s++) {
        int T = t->start[s + 1] - t->start[s];
        for (int i = t->start[s]; i < t->start[s + 1]; i++) {
            int cut[4];
            do {
                for (int j = 0; j < 4; j++) cut[j] = test_below(T + 1);
                for (int j = 0; j < 4; j++)
                    for (int l = 0; l < 3; l++)
                        if (cut[l] > cut[l + 1]) {
                            int kept = cut[l];
                            cut[l] = cut[l + 1];
                            cut[l + 1] = kept;
                        }
            } while (cut[0] == cut[1] && cut[2] == cut[3]);
            dlm_keys k = { cut[0], cut[1], cut[2], cut[3] };
            t->keys[i] = k;
        }
    }
}

static const dlm_batch *case_batch(test_batch *t, const dlm_config *c, int shape)
{
    int V = c->vocab, pattern = (int)c->pattern, block = c->block;
    batch_clear(t);
    if (shape == 0) batch_add(t, 23, V, pattern, block, 0);
    if (shape == 1) {
        batch_add(t, 9, V, pattern, block, block > 1);
        batch_add(t, 1, V, DLM_PATTERN_FULL, 0, 0);
        batch_add(t, 34, V, DLM_PATTERN_CAUSAL, 0, 0);
        batch_add(t, 17, V, DLM_PATTERN_BLOCK, 3, 2);
    }
    if (shape == 2) {
        batch_add_doubled(t, 5, 19, 4, V);
        batch_add(t, 12, V, DLM_PATTERN_FULL, 0, 0);
        batch_add_doubled(t, 0, 7, 8, V);
    }
    if (shape == 3) batch_add(t, 300, V, pattern, block, 0);
    if (shape == 4) batch_add(t, 1, V, pattern, block, 0);
    if (shape == 5) {
        batch_add(t, 9, V, pattern, block, 0);
        batch_add(t, 130, V, pattern, block, 0);
        batch_any_keys(t);
    }
    if (shape == 6) {
        batch_add(t, 137, V, pattern, block, 0);
        batch_add_doubled(t, 10, 40, 16, V);
    }
    return batch_close(t, shape == 0 || shape == 4 ? 1.0 : 0.4);
}

static double max_abs(const double *x, size_t n)
{
    double largest = 0;
    for (size_t i = 0; i < n; i++) if (fabs(x[i]) > largest) largest = fabs(x[i]);
    return largest;
}

static dlm_model *test_packed(dlm_ctx *ctx, const dlm_model *m, dlm_dtype type)
{
    dlm_model *packed = NULL;
    CHECK_OK(dlm_model_pack(&packed, ctx, m, type, NULL));
    if (!packed) { printf("not packed: %s\n", dlm_last_error(ctx)); exit(1); }
    return packed;
}

/* Logits of a fresh session on the model as it is; free them. */
static float *test_logits_as_is(dlm_ctx *ctx, const dlm_model *m, const dlm_batch *b)
{
    size_t n = (size_t)b->n_out * (size_t)m->config.vocab;
    float *logits = test_floats(n);
    for (size_t i = 0; i < n; i++) logits[i] = (float)NAN;
    dlm_limits lim = {0};
    lim.seqs = b->n_seqs;
    lim.slots = m->config.max_seq;
    lim.rows = b->start[b->n_seqs];
    lim.out = b->n_out;
    dlm_session *s = NULL;
    CHECK_OK(dlm_session_create(&s, ctx, m, &lim, NULL));
    if (s) CHECK_OK(dlm_logits(s, b, logits));
    dlm_session_free(s);
    return logits;
}

/* The same of its packed form. */
static float *test_logits_in(dlm_ctx *ctx, const dlm_model *m, const dlm_batch *b,
                             dlm_dtype type)
{
    dlm_model *packed = test_packed(ctx, m, type);
    float *logits = test_logits_as_is(ctx, packed, b);
    dlm_model_free(packed);
    return logits;
}

static float *test_logits(dlm_ctx *ctx, const dlm_model *m, const dlm_batch *b,
                          int as_is)
{
    return as_is || m->packed ? test_logits_as_is(ctx, m, b)
                                : test_logits_in(ctx, m, b, DLM_F32);
}

/* A file of a few KB can say that it reads 2^20 tokens; whoever asks for few pays for
   few: bytes of a canvas of 4, of a trainer, and of a distiller of 64 rows. */
TEST(long_context_costs_only_where_it_is_used)
{
    static const int short_and_long[2] = { 64, 1 << 20 };
    size_t sum[2][3];
    for (int k = 0; k < 2; k++) {
        test_heap heap = {0};
        dlm_options options = {0};
        dlm_ctx *ctx = NULL;
        dlm_model *m = NULL, *teacher = NULL;
        dlm_trainer *t = NULL;
        dlm_distiller *d = NULL;
        int canvas[4] = { 1, 2, 7, 7 };
        dlm_config c = test_config(8, 2, 1, 1, short_and_long[k]);
        dlm_train_options how = {0};
        c.head_dim = 256; c.block = 8;
        options.allocator.alloc = test_heap_alloc;
        options.allocator.release = test_heap_release;
        options.allocator.user = &heap;
        CHECK_OK(dlm_init(&ctx, &options));
        CHECK_OK(dlm_model_create(&m, ctx, &c, 1, NULL));
        c.pattern = DLM_PATTERN_CAUSAL;
        CHECK_OK(dlm_model_create(&teacher, ctx, &c, 1, NULL));
        heap.sum = 0;
        CHECK_OK(dlm_sample(ctx, m, canvas, 4, NULL));
        CHECK(canvas[2] != 7 && canvas[3] != 7);
        sum[k][0] = heap.sum, heap.sum = 0;
        how.max_rows = 64;
        CHECK_OK(dlm_trainer_create(&t, ctx, m, &how, NULL));
        sum[k][1] = heap.sum, heap.sum = 0;
        CHECK_OK(dlm_distiller_create(&d, t, teacher, NULL, NULL));
        sum[k][2] = heap.sum;
        dlm_distiller_free(d); dlm_trainer_free(t);
        dlm_model_free(teacher); dlm_model_free(m);
        test_close(ctx);
        CHECK(heap.live == 0);
    }
    for (int i = 0; i < 3; i++) CHECK(sum[0][i] == sum[1][i]);
    CHECK(sum[0][0] < 1000000);
}

TEST(logits_equal_double_reference_for_every_feature_on_every_isa)
{
    static test_batch t;
    dlm_ctx *home = test_open(DLM_ISA_SCALAR, 1);
    for (int g = 0; g < MODEL_CASES; g++) {
        dlm_config c = case_config(&model_grid[g], 320);
        dlm_model *m = test_model(home, &c);
        reference r;
        ref_open(&r, m);
        for (int shape = 0; shape < BATCH_SHAPES; shape++) {
            const dlm_batch *b = case_batch(&t, &m->config, shape);
            size_t n = (size_t)b->n_out * (size_t)c.vocab;
            double *want = ref_logits(&r, b), scale = max_abs(want, n);
            FOR_EACH_ISA(isa) {
                dlm_ctx *ctx = test_open(isa, 1);
                float *got = test_logits(ctx, m, b, 0);
                LABEL("case %d, batch %d, %s", g, shape, dlm_isa_name((dlm_isa)isa));
                for (size_t i = 0; i < n; i++) CHECK_CLOSE(got[i], want[i], 2e-5 * scale);
                free(got);
                test_close(ctx);
            }
            free(want);
        }
        ref_close(&r);
        dlm_model_free(m);
    }
    test_close(home);
}

TEST(logits_agree_between_isas_and_packings)
{
    static test_batch t;
    dlm_ctx *home = test_open(DLM_ISA_SCALAR, 1);
    for (int g = 0; g < MODEL_CASES; g++) {
        dlm_config c = case_config(&model_grid[g], 320);
        dlm_model *m = test_model(home, &c);
        const dlm_batch *b = case_batch(&t, &m->config, 2);
        size_t n = (size_t)b->n_out * (size_t)c.vocab;
        float *want = test_logits(home, m, b, 0);
        double scale = 0;
        for (size_t i = 0; i < n; i++)
            if (fabsf(want[i]) > scale) scale = fabsf(want[i]);
        FOR_EACH_ISA(isa) {
            dlm_ctx *ctx = test_open(isa, 2);
            float *packed = test_logits(ctx, m, b, 0), *plain = test_logits(ctx, m, b, 1);
            LABEL("case %d, %s", g, dlm_isa_name((dlm_isa)isa));
            for (size_t i = 0; i < n; i++) CHECK_CLOSE(packed[i], want[i], 1e-4 * scale);
            CHECK(memcmp(packed, plain, n * sizeof(float)) == 0);
            free(packed); free(plain);
            test_close(ctx);
        }
        free(want);
        dlm_model_free(m);
    }
    test_close(home);
}

/* The sequences of t one by one, each alone, must get the logits `all` gave them. */
static void purity_alone(dlm_ctx *ctx, const dlm_model *m, const test_batch *t,
                         const float *all)
{
    int V = m->config.vocab, next = 0;
    for (int s = 0; s < t->b.n_seqs; s++) {
        static test_batch one;
        int first = t->start[s], T = t->start[s + 1] - first, out = next;
        batch_clear(&one);
        memcpy(one.tokens, t->tokens + first, (size_t)T * sizeof(int));
        memcpy(one.positions, t->positions + first, (size_t)T * sizeof(int));
        memcpy(one.keys, t->keys + first, (size_t)T * sizeof(dlm_keys));
        one.start[1] = T;
        one.b.n_seqs = 1;
        batch_close(&one, 0);
        one.b.n_out = 0;
        for (; next < t->b.n_out && t->out_rows[next] < first + T; next++)
            one.out_rows[one.b.n_out++] = t->out_rows[next] - first;
        if (one.b.n_out == 0) continue;
        float *alone = test_logits(ctx, m, &one.b, 0);
        CHECK(memcmp(alone, all + out * V,
                     (size_t)(one.b.n_out * V) * sizeof(float)) == 0);
        free(alone);
    }
}

/* Only every third of the out rows: the same bits. */
static void purity_fewer_rows(dlm_ctx *ctx, const dlm_model *m, const test_batch *t,
                              const float *all)
{
    static test_batch few;
    int V = m->config.vocab;
    few = *t;
    few.b.start = few.start; few.b.tokens = few.tokens; few.b.positions = few.positions;
    few.b.keys = few.keys; few.b.out_rows = few.out_rows;
    few.b.n_out = 0;
    for (int i = 0; i < t->b.n_out; i += 3) few.out_rows[few.b.n_out++] = t->out_rows[i];
    float *got = test_logits(ctx, m, &few.b, 0);
    for (int i = 0; i < few.b.n_out; i++)
        CHECK(memcmp(got + i * V, all + 3 * i * V, (size_t)V * sizeof(float)) == 0);
    free(got);
}

TEST(logits_do_not_depend_on_neighbours_out_rows_or_threads)
{
    static test_batch t;
    FOR_EACH_ISA(isa) {
        for (int g = 0; g < MODEL_CASES; g++) {
            dlm_ctx *ctx = test_open(isa, 1);
            dlm_config c = case_config(&model_grid[g], 320);
            dlm_model *m = test_model(ctx, &c);
            for (int shape = 1; shape < BATCH_SHAPES; shape++) {
                if (shape == 4) continue;
                const dlm_batch *b = case_batch(&t, &m->config, shape);
                float *all = test_logits(ctx, m, b, 0);
                LABEL("case %d, batch %d, %s", g, shape, dlm_isa_name((dlm_isa)isa));
                purity_alone(ctx, m, &t, all);
                purity_fewer_rows(ctx, m, &t, all);
                for (int threads = 2; threads <= 3; threads++) {
                    dlm_ctx *many = test_open(isa, threads);
                    float *got = test_logits(many, m, b, 0);
                    LABEL("case %d, batch %d, %s, %d threads", g, shape,
                          dlm_isa_name((dlm_isa)isa), threads);
                    CHECK(memcmp(got, all, (size_t)(b->n_out * c.vocab) *
                                           sizeof(float)) == 0);
                    free(got);
                    test_close(many);
                }
                free(all);
                test_ctx = ctx;
            }
            dlm_model_free(m);
            test_close(ctx);
        }
    }
}

/* Rows [first, first + T) of sequence s of `whole`, into the cache lane `lane`. */
static void cached_add(test_batch *t, const test_batch *whole, int s, int first, int T,
                       int lane)
{
    int to = t->start[t->b.n_seqs], from = whole->start[s] + first;
    memcpy(t->tokens + to, whole->tokens + from, (size_t)T * sizeof(int));
    memcpy(t->keys + to, whole->keys + from, (size_t)T * sizeof(dlm_keys));
    for (int i = 0; i < T; i++) t->slots[to + i] = first + i;
    t->lanes[t->b.n_seqs] = lane;
    t->start[++t->b.n_seqs] = to + T;
}

/* Two sequences in two lanes, block after block, the second one block behind: each
   forward's logits must be those of the whole sequences in one forward. */
static void cached_compare(dlm_ctx *ctx, const dlm_model *m, test_batch *whole, int T,
                           int block)
{
    int V = m->config.vocab;
    static test_batch t;
    const dlm_batch *b = batch_close(whole, 2);
    float *want = test_logits(ctx, m, b, 0), *got = test_floats((size_t)(2 * T * V));
    dlm_session *s = test_session(ctx, m, 2, T, 0, 1);
    for (int at = 0; at < T + block; at += block) {
        batch_clear(&t);
        int n0 = at >= T ? 0 : at + block > T ? T - at : block;
        int behind = at - block, n1 = behind < 0 ? 0 : at > T ? T - behind : block;
        if (n1) cached_add(&t, whole, 1, behind, n1, 0);
        if (n0) cached_add(&t, whole, 0, at, n0, 1);
        batch_close(&t, 2);
        t.b.slots = t.slots;
        t.b.lanes = t.lanes;
        t.b.positions = NULL;
        if (test_below(2)) CHECK_OK(dlm_forward(s, &t.b, NULL, NULL));
        CHECK_OK(dlm_logits(s, &t.b, got));
        CHECK(!n1 || memcmp(got, want + (T + behind) * V,
                            (size_t)(n1 * V) * sizeof(float)) == 0);
        CHECK(!n0 || memcmp(got + n1 * V, want + at * V,
                            (size_t)(n0 * V) * sizeof(float)) == 0);
    }
    dlm_session_free(s);
    free(want); free(got);
}

TEST(cached_forward_equals_one_whole_forward_bit_for_bit)
{
    static test_batch whole;
    FOR_EACH_ISA(isa) {
        for (int g = 0; g < MODEL_CASES; g++) {
            dlm_config c = case_config(&model_grid[g], 320);
            if (c.pattern == DLM_PATTERN_FULL) continue;
            dlm_ctx *ctx = test_open(isa, 1 + g % 2);
            dlm_model *m = test_model(ctx, &c);
            int block = c.pattern == DLM_PATTERN_CAUSAL ? 7 : m->config.block;
            batch_clear(&whole);
            batch_add(&whole, 61, c.vocab, (int)c.pattern, block, 0);
            batch_add(&whole, 61, c.vocab, (int)c.pattern, block, 0);
            LABEL("case %d, %s", g, dlm_isa_name((dlm_isa)isa));
            cached_compare(ctx, m, &whole, 61, block);
            dlm_model_free(m);
            test_close(ctx);
        }
    }
}

/* bf16 has 8 bits of precision: the two neighbours of x in it, found by arithmetic, and
   the nearer one; the one with the even mantissa when both are as near. */
static float test_round_bf16(float x)
{
    int exponent;
    if (x == 0.0f || !isfinite(x)) return x;
    (void)frexp((double)x, &exponent);               /* |x| in [2^(e-1), 2^e)      */
    if (exponent < -125) exponent = -125;            /* subnormals                 */
    const double step = ldexp(1.0, exponent - 8), low = floor((double)x / step);
    const double rest = (double)x / step - low;
    const double up = rest > 0.5 || (rest == 0.5 && fmod(low, 2.0) != 0.0);
    return (float)((low + up) * step);
}

/* What widens bf16 computes the chain of f32 over rounded factors; dot products sum two
   at a time and flush what is tiny. */
static int test_dots(int isa)
{
    return isa == DLM_ISA_AVX512BF16 || isa == DLM_ISA_AMX;
}

typedef struct narrow_case {               /* c (M,N) = a (M,K) b^T, b (N,K)       */
    int        M, N, K;
    dlm_dtype  type;
    dlm_matrix w;                          /* b, packed                            */
    float     *a, *b, *got, *packed;
} narrow_case;

static narrow_case narrow_open(const dlm_ctx *ctx, dlm_dtype type, int M, int N, int K,
                               int spread)
{
    narrow_case c;
    c.M = M, c.N = N, c.K = K;
    c.a = test_floats((size_t)(M * K + 1)), c.b = test_floats((size_t)(N * K + 1));
    c.got = test_floats((size_t)(M * N));
    c.type = type;
    c.packed = test_floats(dlm_pack_bytes(ctx, type, N, K) / sizeof(float));
    for (int i = 0; i < M * K; i++) c.a[i] = test_float();
    for (int i = 0; i < N * K; i++)
        c.b[i] = ldexpf(test_float(), test_below(spread + 1) - spread / 2);
    if (N * K > 8) {                                 /* ties, and what carries over */
        c.b[0] = 1.00390625f, c.b[1] = 1.01171875f, c.b[2] = -1.00390625f;
        c.b[3] = 1.998f, c.b[4] = 0.0f, c.b[5] = 1e-40f;
    }
    for (int i = 0; i < M * N; i++) c.got[i] = (float)NAN;
    return c;
}

static void narrow_close(narrow_case *c)
{
    free(c->a); free(c->b); free(c->got); free(c->packed);
}

static void narrow_packed(dlm_ctx *ctx, narrow_case *c)
{
    c->w = dlm_pack(ctx, c->packed, c->type, c->b, c->N, c->K);
    dlm_matmul(ctx, c->got, c->a, &c->w, c->M);
}

static float *test_transposed(const float *x, int rows, int cols)
{
    float *y = test_floats((size_t)(rows * cols + 1));
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < cols; j++) y[j * rows + i] = x[i * cols + j];
    return y;
}

static const int narrow_sizes[][3] = { { 1, 1, 1 }, { 1, 5, 7 }, { 1, 300, 300 },
    { 3, 130, 257 }, { 13, 33, 64 }, { 40, 96, 520 }, { 70, 31, 1300 }, { 2, 4, 0 } };
enum { NARROW_SIZES = sizeof narrow_sizes / sizeof *narrow_sizes };

TEST(bf16_products_round_both_factors)
{
    NEEDS_NARROW_WORDS();
    FOR_EACH_ISA(isa) {
        dlm_ctx *ctx = test_open(isa, 1);
        for (int s = 0; s < NARROW_SIZES; s++) {
            const int M = narrow_sizes[s][0], N = narrow_sizes[s][1];
            const int K = narrow_sizes[s][2];
            narrow_case c = narrow_open(ctx, DLM_BF16, M, N, K, 40);
            float *same = test_floats((size_t)(M * N));
            LABEL("%d %d %d, %s", M, N, K, dlm_isa_name((dlm_isa)isa));
            narrow_packed(ctx, &c);
            dlm_matmul(ctx, same, c.a, &c.w, 1);
            CHECK(memcmp(c.got, same, (size_t)N * sizeof(float)) == 0);
            for (int i = 0; i < M * K; i++) c.a[i] = test_round_bf16(c.a[i]);
            for (int i = 0; i < N * K; i++) c.b[i] = test_round_bf16(c.b[i]);
            dlm_matmul_nt(ctx, same, c.a, c.b, M, N, K);
            if (!test_dots(isa))
                CHECK(memcmp(c.got, same, (size_t)(M * N) * sizeof(float)) == 0);
            for (int i = 0; i < M * N; i++) {
                double sum = 0, size = 1e-30;
                for (int k = 0; k < K; k++) {
                    double x = (double)c.a[i / N * K + k] * c.b[i % N * K + k];
                    sum += x, size += fabs(x);
                }
                CHECK_CLOSE(c.got[i], sum, 6e-8 * (K + 1) * size);
            }
            free(same);
            narrow_close(&c);
        }
        test_close(ctx);
    }
}

/* What a trainer in bf16 multiplies: every orientation, added to what is there or not,
   gives the bits of the packed product. */
TEST(bf16_products_of_factors_as_stored_equal_packed_ones)
{
    NEEDS_NARROW_WORDS();
    FOR_EACH_ISA(isa) {
        dlm_ctx *ctx = test_open(isa, 1);
        for (int s = 0; s < NARROW_SIZES; s++) {
            const int M = narrow_sizes[s][0], N = narrow_sizes[s][1];
            const int K = narrow_sizes[s][2];
            narrow_case c = narrow_open(ctx, DLM_BF16, M, N, K, 4);
            const dlm_matrix w = dlm__plain(c.b, N, K, DLM_BF16);
            const dlm__word kind = DLM__WORD_BF16;
            const size_t size = (size_t)(M * N) * sizeof(float);
            float *got = test_floats((size_t)(M * N));
            float *at = test_transposed(c.a, M, K), *bt = test_transposed(c.b, N, K);
            LABEL("%d %d %d, %s", M, N, K, dlm_isa_name((dlm_isa)isa));
            narrow_packed(ctx, &c);
            dlm_matmul(ctx, got, c.a, &w, M);
            CHECK(memcmp(c.got, got, size) == 0);
            dlm__gemm_nn(ctx, got, c.a, bt, kind, M, N, K, 0);
            CHECK(memcmp(c.got, got, size) == 0);
            dlm__gemm_tn(ctx, got, at, bt, kind, M, N, K, 0);
            CHECK(memcmp(c.got, got, size) == 0);
            dlm__gemm_tn(ctx, got, at, bt, kind, M, N, K, 1);
            for (int i = 0; i < M * N; i++)
                CHECK_CLOSE(got[i], 2.0 * c.got[i], 1e-5 * (K + 1));
            free(got); free(at); free(bt);
            narrow_close(&c);
        }
        test_close(ctx);
    }
}

static float narrow_most(const float *x, int n)
{
    float most = 0;
    for (int i = 0; i < n; i++) most = fmaxf(most, fabsf(x[i]));
    return most;
}

TEST(int8_products_equal_integers_bit_for_bit)
{
    NEEDS_NARROW_WORDS();
    FOR_EACH_ISA(isa) {
        dlm_ctx *ctx = test_open(isa, 1);
        for (int s = 0; s < NARROW_SIZES; s++) {
            const int M = narrow_sizes[s][0], N = narrow_sizes[s][1];
            const int K = narrow_sizes[s][2];
            narrow_case c = narrow_open(ctx, DLM_I8, M, N, K, 4);
            LABEL("%d %d %d, %s", M, N, K, dlm_isa_name((dlm_isa)isa));
            for (int k = 0; M > 2 && k < K; k++) c.a[K + k] = 0;    /* a row of zeros */
            narrow_packed(ctx, &c);
            for (int i = 0; i < M * N; i++) {
                const float *x = c.a + i / N * K, *y = c.b + i % N * K;
                const float s_i = narrow_most(x, K), t_j = narrow_most(y, K);
                int32_t sum = 0;
                for (int k = 0; k < K; k++)
                    sum += (int32_t)rintf(x[k] * (s_i > 0 ? 127 / s_i : 0))
                         * (int32_t)rintf(y[k] * (t_j > 0 ? 127 / t_j : 0));
                CHECK(c.got[i] == (float)sum * (s_i / 127) * (t_j / 127));
            }
            narrow_close(&c);
        }
        test_close(ctx);
    }
}

TEST(narrow_products_show_what_is_not_finite)
{
    NEEDS_NARROW_WORDS();
    static const dlm_dtype types[] = { DLM_BF16, DLM_I8 };
    FOR_EACH_ISA(isa) {
        for (int p = 0; p < 2; p++) {
            dlm_ctx *ctx = test_open(isa, 1);
            narrow_case c = narrow_open(ctx, types[p], 3, 40, 70, 4);
            union { uint32_t u; float f; } nan = { 0x7fffffff }, signals = { 0x7f800001 };
            LABEL("type %d, %s", (int)types[p], dlm_isa_name((dlm_isa)isa));
            memcpy(c.a + 33, &nan, 4);
            memcpy(c.a + 70 + 69, &signals, 4);
            narrow_packed(ctx, &c);
            for (int j = 0; j < 40; j++) {
                CHECK(!isfinite(c.got[j]) && !isfinite(c.got[40 + j]));
                CHECK(isfinite(c.got[80 + j]));
            }
            c.a[33] = c.a[70 + 69] = 0;
            c.b[0] = INFINITY;
            narrow_packed(ctx, &c);
            for (int j = 0; j < 40; j++) CHECK(!isfinite(c.got[j]) == (j == 0));
            narrow_close(&c);
            test_close(ctx);
        }
    }
}

TEST(narrow_sessions_differ_from_f32_by_their_rounding)
{
    NEEDS_NARROW_WORDS();
    static test_batch t;
    static const struct { dlm_dtype type; double most; } cases[] = {
        { DLM_BF16, 0.02 }, { DLM_I8, 0.05 } };
    FOR_EACH_ISA(isa) {
        for (int p = 0; p < 2; p++) {
            dlm_config c = case_config(&model_grid[3], 64);
            dlm_ctx *ctx = test_open(isa, 1);
            dlm_model *m = test_model(ctx, &c);
            double difference = 0, size = 0;
            batch_clear(&t);
            batch_add(&t, 20, c.vocab, (int)c.pattern, c.block, 0);
            batch_close(&t, 1);
            LABEL("type %d, %s", (int)cases[p].type, dlm_isa_name((dlm_isa)isa));
            float *got = test_logits_in(ctx, m, &t.b, cases[p].type);
            float *want = test_logits(ctx, m, &t.b, 0);
            for (int i = 0; i < t.b.n_out * c.vocab; i++) {
                difference += pow((double)got[i] - want[i], 2);
                size += pow(want[i], 2);
            }
            CHECK(difference > 0 && sqrt(difference / size) < cases[p].most);
            free(got); free(want);
            dlm_model_free(m);
            test_close(ctx);
        }
    }
}

/* Types that cannot be packed, too wide models, and what a packed one refuses. */
TEST(packing_is_checked)
{
    const char *path = "dlm_test_packed.st";
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_config c = {0};
    c.vocab = 8, c.dim = 8, c.layers = 1, c.heads = 1, c.max_seq = 8;
    c.ffn = DLM_I8_MOST + 1;
    c.pattern = DLM_PATTERN_CAUSAL;
    dlm_model *m = test_model(ctx, &c), *packed = m, *other = m;
    dlm_trainer *t = NULL;
    CHECK_ERROR(dlm_model_pack(&packed, ctx, m, DLM_F16, NULL), DLM_E_CONFIG, ctx,
                "none of");
    CHECK(packed == NULL && dlm_model_bytes(ctx, &c, DLM_F16, 1) == 0);
    if (TEST_NARROW)
        CHECK_ERROR(dlm_model_pack(&packed, ctx, m, DLM_I8, NULL), DLM_E_CONFIG, ctx,
                    "I8");
    CHECK(packed == NULL && dlm_model_bytes(ctx, &c, DLM_I8, 1) == 0);
    if (!TEST_NARROW) {
        dlm_train_options train = {0};
        train.precision = DLM_BF16;
        CHECK_ERROR(dlm_model_pack(&packed, ctx, m, DLM_BF16, NULL), DLM_E_UNSUPPORTED,
                    ctx, "mfpmath");
        CHECK_ERROR(dlm_trainer_create(&t, ctx, m, &train, NULL), DLM_E_UNSUPPORTED, ctx,
                    "mfpmath");
    }
    packed = test_packed(ctx, m, test_type(DLM_BF16));
    CHECK(dlm_model_tensors(packed) == 0 && packed->type == test_type(DLM_BF16));
    CHECK_ERROR(dlm_trainer_create(&t, ctx, packed, NULL, NULL), DLM_E_CONFIG, ctx,
                "is packed");
    CHECK_ERROR(dlm_model_pack(&other, ctx, packed, DLM_F32, NULL), DLM_E_CONFIG, ctx,
                "is packed");
    CHECK_ERROR(dlm_convert(&other, ctx, packed, 4, DLM_NEW_TOKEN, 0, NULL), DLM_E_CONFIG,
                ctx, "is packed");
    CHECK_ERROR(dlm_model_repack(packed, packed), DLM_E_CONFIG, ctx, "is packed");
    CHECK_ERROR(dlm_model_repack(m, m), DLM_E_MISMATCH, ctx, "repack");
#ifndef DLM_NO_STDIO
    CHECK_ERROR(dlm_save(ctx, path, packed, NULL), DLM_E_CONFIG, ctx, "is packed");
#endif
    (void)path;
    dlm_model_free(packed);
    dlm_model_free(m);
    test_close(ctx);
}

/* Panels of one ISA are no use to another. */
TEST(packed_models_belong_to_an_isa)
{
    dlm_ctx *scalar = test_open(DLM_ISA_SCALAR, 1), *best = test_open(DLM_ISA_AUTO, 1);
    dlm_config c = case_config(&model_grid[0], 16);
    dlm_model *m = test_model(scalar, &c), *packed = test_packed(scalar, m, DLM_F32);
    dlm_session *s = NULL;
    if (dlm_active_isa(best) != DLM_ISA_SCALAR)
        CHECK_ERROR(dlm_session_create(&s, best, packed, NULL, NULL), DLM_E_MISMATCH,
                    best, "another ISA");
    dlm_model_free(packed);
    dlm_model_free(m);
    dlm_shutdown(scalar);
    test_close(best);
}

/* The largest sum that there can be, and rows at both ends of what floats are. */
TEST(int8_products_at_their_limits)
{
    NEEDS_NARROW_WORDS();
    FOR_EACH_ISA(isa) {
        dlm_ctx *ctx = test_open(isa, 1);
        narrow_case c = narrow_open(ctx, DLM_I8, 1, 1, DLM_I8_MOST, 0);
        LABEL("%s", dlm_isa_name((dlm_isa)isa));
        for (int k = 0; k < DLM_I8_MOST; k++) c.a[k] = c.b[k] = -1;
        narrow_packed(ctx, &c);
        CHECK_CLOSE(c.got[0], DLM_I8_MOST, 0.1);
        memset(c.a, 0, DLM_I8_MOST * sizeof(float));
        memset(c.b, 0, DLM_I8_MOST * sizeof(float));
        c.a[0] = 9e-31f, c.b[0] = 1e30f;
        narrow_packed(ctx, &c);
        CHECK_CLOSE(c.got[0], 0.9, 1e-5);
        c.a[0] = c.b[1] = 3e38f, c.b[0] = 0;
        narrow_packed(ctx, &c);
        CHECK(c.got[0] == 0);
        narrow_close(&c);
        test_close(ctx);
    }
}

/* One row at a time takes another way through matmul and attention (keys in the lanes);
   131 keys are more than one chunk of them. */
TEST(rows_decoded_one_by_one_equal_one_whole_forward_bit_for_bit)
{
    static test_batch whole;
    static const dlm_dtype types[] = { DLM_F32, DLM_BF16, DLM_I8 };
    FOR_EACH_ISA(isa) {
        for (int kv = 1, p = 0; kv <= 4; kv *= 2, p++) {
            dlm_config c = {0};
            c.vocab = 300, c.dim = 96, c.layers = 2, c.heads = 4, c.kv_heads = kv;
            c.head_dim = kv == 2 ? 34 : 24;
            c.ffn = 70, c.max_seq = 140, c.pattern = DLM_PATTERN_CAUSAL;
            for (int pass = p == 0; pass < 2; pass++) {      /* f32, and another    */
                const dlm_dtype type = test_type(types[pass ? p : 0]);
                dlm_ctx *ctx = test_open(isa, 1 + kv % 2);
                dlm_model *plain = test_model(ctx, &c);
                dlm_model *m = test_packed(ctx, plain, type);
                batch_clear(&whole);
                batch_add(&whole, 131, c.vocab, (int)c.pattern, 1, 0);
                batch_add(&whole, 131, c.vocab, (int)c.pattern, 1, 0);
                LABEL("%d key/value heads, type %d, %s", kv, (int)type,
                      dlm_isa_name((dlm_isa)isa));
                cached_compare(ctx, m, &whole, 131, 1);
                dlm_model_free(m);
                dlm_model_free(plain);
                test_close(ctx);
            }
        }
    }
}

TEST(packed_model_lives_in_used_memory_and_needs_no_original)
{
    static test_batch t;
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int g = 0; g < MODEL_CASES; g++) {
        dlm_config c = case_config(&model_grid[g], 32);
        dlm_model *m = test_model(ctx, &c), *packed = NULL;
        const dlm_batch *b = case_batch(&t, &m->config, 0);
        size_t n = (size_t)(b->n_out * c.vocab);
        size_t bytes = dlm_model_bytes(ctx, &c, DLM_F32, 1);
        float *block = test_floats(bytes / sizeof(float) + 1);
        float *want = test_logits_as_is(ctx, m, b);
        dlm_memory mem = { block, bytes };
        memset(block, 0xFF, bytes);
        LABEL("case %d", g);
        CHECK_OK(dlm_model_pack(&packed, ctx, m, DLM_F32, &mem));
        dlm_model_free(m);
        float *got = test_logits_as_is(ctx, packed, b);
        CHECK(memcmp(got, want, n * sizeof(float)) == 0);
        free(got); free(want);
        dlm_model_free(packed);
        free(block);
    }
    test_close(ctx);
}

/* One byte behind every array in turn. */
TEST(overrun_array_of_an_object_is_reported)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_model *m = toy_model(ctx, 2, 1);
    dlm_session *s = NULL;
    char got[256], want[256];
    int arrays = 0;
    CHECK_OK(dlm_session_create(&s, ctx, m, NULL, NULL));
    CHECK(!dlm__overrun(s, got, sizeof got));
    for (char *at = (char *)s; at < dlm__origin_of(s)->end; arrays++) {
        size_t n;
        memcpy(&n, at - sizeof n, sizeof n);
        LABEL("array %d", arrays);
        at[n] ^= 1;
        snprintf(want, sizeof want, "session: array %d, of %lu bytes, was overrun by 1",
                 arrays, (unsigned long)n);
        CHECK(dlm__overrun(s, got, sizeof got) && !strcmp(got, want));
        at[n] ^= 1;
        at += (n + 63) / 64 * 64 + DLM_GUARD;
    }
    CHECK(arrays > 20 && !dlm__overrun(s, got, sizeof got));
    s->w.rf[s->w.out] = 0;                     /* too far by one float             */
    test_overruns_wanted = 1;
    dlm_session_free(s);
    CHECK(test_overruns_wanted == 0);
    test_overruns_wanted = 0;
    dlm_model_free(m);
    test_close(ctx);
}

/* Two users of one model hold it once: sessions are the same size for any weights. */
TEST(sessions_share_the_weights_of_a_model)
{
    NEEDS_NARROW_WORDS();
    static const dlm_dtype types[] = { DLM_F32, DLM_BF16, DLM_I8 };
    test_heap heap = {0};
    dlm_options options = {0};
    dlm_ctx *ctx = NULL;
    dlm_config c = test_config(500, 64, 3, 4, 32);
    size_t plain;
    options.allocator.alloc = test_heap_alloc;
    options.allocator.release = test_heap_release;
    options.allocator.user = &heap;
    CHECK_OK(dlm_init(&ctx, &options));
    dlm_model *m = test_model(ctx, &c);
    plain = m->n_params * sizeof(float);
    for (int i = 0; i < 3; i++) {
        dlm_session *a = NULL, *b = NULL;
        dlm_memory mem = { NULL, 0 };
        heap.sum = 0;
        dlm_model *packed = test_packed(ctx, m, types[i]);
        LABEL("type %d", (int)types[i]);
        CHECK(heap.sum == dlm_model_bytes(ctx, &c, types[i], 1));
        CHECK_CLOSE(heap.sum, plain >> i, 0.2 * (double)(plain >> i));
        heap.sum = 0;
        CHECK_OK(dlm_session_create(&a, ctx, packed, NULL, NULL));
        CHECK_OK(dlm_session_create(&b, ctx, packed, NULL, NULL));
        CHECK_OK(dlm_session_create(NULL, ctx, m, NULL, &mem));
        CHECK(heap.sum == 2 * mem.size && heap.sum < plain);
        dlm_session_free(a); dlm_session_free(b); dlm_model_free(packed);
    }
    dlm_model_free(m);
    dlm_shutdown(ctx);
    CHECK(heap.live == 0);
}

/* Slots between the two ranges were never written, or hold something else: no matter
   what they hold, rows 0 .. 2 and 9 .. 14 get what they get without the gap. */
TEST(unseen_slots_do_not_matter)
{
    enum { T = 9, GAP = 6, V = 11 };
    static test_batch t;
    FOR_EACH_ISA(isa) {
        dlm_ctx *ctx = test_open(isa, 1);
        dlm_config c = case_config(&model_grid[0], 32);
        dlm_model *m = test_model(ctx, &c);
        dlm_limits lim = {0};
        lim.cached = 1;
        dlm_memory mem = { NULL, 0 };
        CHECK_OK(dlm_session_create(NULL, ctx, m, &lim, &mem));
        float *block = test_floats(mem.size / sizeof(float) + 16), got[2][T * V];
        mem.base = block;
        memset(mem.base, 0xFF, mem.size);                       /* NaN everywhere  */
        dlm_session *s = NULL;
        CHECK_OK(dlm_session_create(&s, ctx, m, &lim, &mem));
        batch_clear(&t);
        batch_add(&t, T, V, DLM_PATTERN_FULL, 0, 0);
        batch_close(&t, 2);
        t.b.slots = t.slots;
        for (int gap = 1; gap >= 0; gap--) {
            for (int i = 0; i < T; i++) {
                dlm_keys k = { 0, 3, 3 + gap * GAP, T + gap * GAP };
                t.keys[i] = k;
                t.slots[i] = i < 3 ? i : i + gap * GAP;
            }
            CHECK_OK(dlm_logits(s, &t.b, got[gap]));
        }
        LABEL("%s", dlm_isa_name((dlm_isa)isa));
        CHECK(memcmp(got[0], got[1], sizeof got[0]) == 0);
        dlm_session_free(s);
        free(block);
        dlm_model_free(m);
        test_close(ctx);
    }
}

TEST(doubled_row_equals_cached_block_at_the_same_state)
{
    enum { P = 7, R = 11, BLOCK = 4, V = 23 };
    static test_batch doubled, t;
    dlm_keys plain[P + R];
    dlm_config c = test_config(V, 32, 2, 4, 64);
    c.block = BLOCK;
    dlm_keys_fill(plain, P + R, DLM_PATTERN_BLOCK, BLOCK, P % BLOCK);
    FOR_EACH_ISA(isa) {
        dlm_ctx *ctx = test_open(isa, 1);
        dlm_model *m = test_model(ctx, &c);
        batch_clear(&doubled);
        batch_add_doubled(&doubled, P, R, BLOCK, V);
        float *want = test_logits(ctx, m, batch_close(&doubled, 2), 0);
        dlm_session *s = test_session(ctx, m, 1, P + R, 0, 1);
        float got[BLOCK * V];
        LABEL("%s", dlm_isa_name((dlm_isa)isa));
        for (int at = -P; at < R; at += at < 0 ? P : BLOCK) {
            int n = at < 0 ? P : at + BLOCK > R ? R - at : BLOCK;
            for (int noisy = at >= 0; noisy >= 0; noisy--) {   /* noisy, then commit */
                batch_clear(&t);
                cached_add(&t, &doubled, 0, P + at + noisy * R, n, 0);
                memcpy(t.keys, plain + P + at, (size_t)n * sizeof(dlm_keys));
                for (int i = 0; i < n; i++) t.slots[i] = P + at + i;
                batch_close(&t, noisy ? 2 : 0);
                t.b.slots = t.slots;
                t.b.positions = NULL;
                if (!noisy) CHECK_OK(dlm_forward(s, &t.b, NULL, NULL));
                if (!noisy) continue;
                CHECK_OK(dlm_logits(s, &t.b, got));
                for (int i = 0; i < n * V; i++)
                    CHECK_CLOSE(got[i], want[(P + R + at) * V + i], 2e-5);
            }
        }
        dlm_session_free(s);
        free(want);
        dlm_model_free(m);
        test_close(ctx);
    }
}

TEST(repacking_follows_a_change_of_the_weights)
{
    static test_batch t;
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_config c = case_config(&model_grid[6], 64);
    dlm_model *m = test_model(ctx, &c), *packed = test_packed(ctx, m, DLM_F32);
    const dlm_batch *b = case_batch(&t, &m->config, 0);
    size_t n = (size_t)b->n_out * (size_t)c.vocab;
    float *before = test_floats(n), *after = test_floats(n);
    dlm_session *s = test_session(ctx, packed, 1, 0, 0, 0);
    CHECK_OK(dlm_logits(s, b, before));
    test_randomise(m);
    CHECK_OK(dlm_model_repack(packed, m));
    CHECK_OK(dlm_logits(s, b, after));
    float *fresh = test_logits(ctx, m, b, 1);
    CHECK(memcmp(after, before, n * sizeof(float)) != 0);
    CHECK(memcmp(after, fresh, n * sizeof(float)) == 0);
    dlm_session_free(s);
    dlm_session_free(NULL);
    free(before); free(after); free(fresh);
    dlm_model_free(packed);
    dlm_model_free(m);
    test_close(ctx);
}

TEST(model_wrap_borrows_weights_and_checks_their_number)
{
    static test_batch t;
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_config c = case_config(&model_grid[3], 64);
    dlm_model *m = test_model(ctx, &c), *w = NULL;
    CHECK_ERROR(dlm_model_wrap(&w, ctx, &c, m->weights, m->n_params - 1),
                DLM_E_MISMATCH, ctx, "");
    CHECK(w == NULL && dlm_last_error(ctx)[0] != 0);
    float *copy = test_floats(m->n_params);
    memcpy(copy, m->weights, m->n_params * sizeof(float));
    CHECK_OK(dlm_model_wrap(&w, ctx, &c, copy, m->n_params));
    if (!w) return;
    CHECK(w->weights == copy);
    const dlm_batch *b = case_batch(&t, &m->config, 1);
    float *x = test_logits(ctx, m, b, 0), *y = test_logits(ctx, w, b, 1);
    CHECK(memcmp(x, y, (size_t)(b->n_out * c.vocab) * sizeof(float)) == 0);
    dlm_model_free(w);
    CHECK(memcmp(copy, m->weights, m->n_params * sizeof(float)) == 0);
    free(copy); free(x); free(y);
    dlm_model_free(m);
    test_close(ctx);
}

/* Multiply-adds counted by hand, two operations each; the last layer works on the rows
   that are looked at. */
TEST(forward_flops_count_what_is_computed)
{
    static test_batch t;
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int g = 0; g < MODEL_CASES; g++) {
        dlm_config c = case_config(&model_grid[g], 320);
        CHECK_OK(dlm_config_resolve(ctx, &c));
        const dlm_batch *b = case_batch(&t, &c, 2);
        double want = 0, C = c.dim, Q = c.heads * c.head_dim, K = c.kv_heads * c.head_dim;
        int N = b->start[b->n_seqs];
        for (int layer = 0; layer < c.layers; layer++) {
            int last = layer == c.layers - 1, rows = last ? b->n_out : N;
            want += 4.0 * N * C * K;
            want += rows * (4 * C * Q + (c.gelu_mlp ? 4 : 6) * C * c.ffn);
            for (int i = 0; i < rows; i++) {
                const dlm_keys *k = &b->keys[last ? b->out_rows[i] : i];
                want += 4 * Q * (k->hi0 - k->lo0 + k->hi1 - k->lo1);
            }
        }
        want += 2.0 * b->n_out * C * c.vocab;
        LABEL("case %d", g);
        CHECK_CLOSE(dlm_forward_flops(&c, b), want, 1e-9 * want);
    }
    test_close(ctx);
}

/* ==[ naive sampler ]=========================================================
   The rules of the six deterministic orders at temperature 0, in double, one sequence
   at a time, everything computed from scratch at every step. */

typedef struct naive_run {
    dlm_session *s;                        /* uncached                             */
    const dlm_model *m;
    const dlm_sample_options *o;
    int  *canvas, T, prompt, block, offset;
    float logits[TOY_SLOTS * TOY_VOCAB];
    int   token[TOY_SLOTS];                /* of every masked position judged      */
    double confidence[TOY_SLOTS], entropy[TOY_SLOTS], margin[TOY_SLOTS];
    dlm_event events[TOY_SLOTS];
    int   n_events, step;
} naive_run;

static int naive_prefix(const int *canvas, int T)
{
    int P = 0;
    while (P < T && canvas[P] != TOY_MASK) P++;
    return P;
}

/* Logits (T, V) of all rows of a canvas. */
static void naive_forward(naive_run *n)
{
    int start[2] = { 0, 0 }, rows[TOY_SLOTS];
    dlm_keys keys[TOY_SLOTS];
    dlm_batch b = {0};
    start[1] = n->T;
    for (int i = 0; i < n->T; i++) rows[i] = i;
    dlm_keys_fill(keys, n->T, (dlm_pattern)n->m->config.pattern, n->block, n->offset);
    b.n_seqs = 1;
    b.start = start;
    b.tokens = n->canvas;
    b.keys = keys;
    b.out_rows = rows;
    b.n_out = n->T;
    CHECK_OK(dlm_logits(n->s, &b, n->logits));
}

/* Which row predicts position i: of shifted models the one before, and the first row
   serves twice. */
static const float *naive_logits_of(const naive_run *n, int i)
{
    int row = n->m->config.shifted && i > 0 ? i - 1 : i;
    return n->logits + row * TOY_VOCAB;
}

/* Most likely token of position i without the mask, its probability, the lead over the
   second and the entropy of the whole distribution. */
static void naive_judge(naive_run *n, int i)
{
    const float *l = naive_logits_of(n, i);
    double sum = 0, best = -1, second = -1, entropy = 0, p[TOY_VOCAB];
    for (int v = 0; v < TOY_MASK; v++) sum += p[v] = exp((double)l[v]);
    for (int v = 0; v < TOY_MASK; v++) {
        p[v] /= sum;
        entropy -= p[v] * log(p[v]);
        if (p[v] > best) {
            second = best;
            best = p[v];
            n->token[i] = v;
        } else if (p[v] > second) {
            second = p[v];
        }
    }
    n->confidence[i] = best;
    n->margin[i] = best - second;
    n->entropy[i] = entropy;
}

/* The higher, the earlier. */
static double naive_score(const naive_run *n, int i)
{
    switch (n->o->order) {
    case DLM_ORDER_ENTROPY:
    case DLM_ORDER_ENTROPY_BOUND: return -n->entropy[i];
    case DLM_ORDER_MARGIN:        return n->margin[i];
    case DLM_ORDER_SEQUENTIAL:    return -i;
    default:                      return n->confidence[i];
    }
}

/* How many of the masks, sorted best first, are taken when `plan` are due. */
static int naive_quota(const naive_run *n, const int *sorted, int masks, int plan)
{
    int k = 0;
    double sum = 0;
    if (n->o->order == DLM_ORDER_THRESHOLD) {
        double limit = n->o->threshold > 0 ? (double)n->o->threshold : 0.9;
        while (k < masks && n->confidence[sorted[k]] > limit) k++;
        return k > plan ? k : plan;
    }
    if (n->o->order == DLM_ORDER_ENTROPY_BOUND) {
        double bound = n->o->entropy_bound > 0 ? (double)n->o->entropy_bound : 0.35;
        while (k < masks && (sum += n->entropy[sorted[k]]) < bound) k++;
        return k > 0 ? k : 1;
    }
    return plan;
}

static void naive_step(naive_run *n, int lo, int hi, int plan)
{
    int sorted[TOY_SLOTS], masks = 0;
    naive_forward(n);
    for (int i = lo; i < hi; i++) {
        if (n->canvas[i] != TOY_MASK) continue;
        naive_judge(n, i);
        int at = masks++;                  /* insertion keeps equals left to right */
        for (; at > 0 && naive_score(n, sorted[at - 1]) < naive_score(n, i); at--)
            sorted[at] = sorted[at - 1];
        sorted[at] = i;
    }
    int quota = naive_quota(n, sorted, masks, plan < masks ? plan : masks);
    n->step++;
    for (int k = 0; k < quota; k++) {
        dlm_event *e = &n->events[n->n_events++];
        e->position = sorted[k];
        e->token = n->canvas[sorted[k]] = n->token[sorted[k]];
        e->confidence = (float)n->confidence[sorted[k]];
        e->step = n->step;
    }
}

static int naive_masks(const naive_run *n, int lo, int hi)
{
    int masks = 0;
    for (int i = lo; i < hi; i++) masks += n->canvas[i] == TOY_MASK;
    return masks;
}

/* Decodes n->canvas (T), block by block. */
static void naive_decode(naive_run *n)
{
    const dlm_config *c = &n->m->config;
    n->n_events = n->step = 0;
    n->prompt = naive_prefix(n->canvas, n->T);
    n->block = n->o->block ? n->o->block
             : c->pattern == DLM_PATTERN_FULL ? n->T : c->block;
    n->offset = n->o->absolute_blocks ? 0 : n->prompt % n->block;
    int lo = n->o->absolute_blocks ? n->prompt / n->block * n->block : n->prompt;
    for (; lo < n->T; lo += n->block) {
        int hi = lo + n->block < n->T ? lo + n->block : n->T;
        int full = c->pattern == DLM_PATTERN_FULL;
        int cells = full ? naive_masks(n, lo, hi) : n->block;
        int steps = n->o->steps ? n->o->steps : cells;
        for (int s = 0; naive_masks(n, lo, hi) > 0; s++) {
            int plan = cells / steps + (s < cells % steps);
            naive_step(n, lo, hi, plan > 0 ? plan : 1);
        }
    }
}

/* ==[ sampler ]=============================================================== */

/* Everything filled in, nothing visible changed, no mask emitted, nothing written
   beyond the lengths. */
static void sampler_check_filled(const toy_run *before, const toy_run *after)
{
    int masks = 0;
    for (int i = 0; i < TOY_ALL; i++) {
        int was = before->canvas[i], now = after->canvas[i];
        if (was != TOY_MASK) { CHECK(now == was); continue; }
        masks++;
        CHECK(now >= 0 && now < TOY_MASK);
    }
    CHECK(after->n_events == masks);
    for (int q = 0; q < after->n_seqs; q++)
        CHECK(after->length[q] == after->lengths[q]);
}

/* Replaying the trace on the first canvas gives the last; only masks are filled; steps
   of a sequence start at 1 and have no gaps (`gaps`: revealing nothing is allowed). */
static void sampler_check_trace(const toy_run *before, const toy_run *after, int gaps)
{
    int canvas[TOY_ALL], last[TOY_SEQS] = { 0 };
    memcpy(canvas, before->canvas, sizeof canvas);
    for (int i = 0; i < after->n_events; i++) {
        const dlm_event *e = &after->events[i];
        CHECK(e->seq >= 0 && e->seq < after->n_seqs);
        CHECK(e->position >= 0 && e->position < after->lengths[e->seq]);
        CHECK(canvas[e->seq * TOY_SLOTS + e->position] == TOY_MASK);
        CHECK(e->step == last[e->seq] || e->step == last[e->seq] + 1
              || (gaps && e->step > last[e->seq]));
        CHECK(e->step >= 1);
        CHECK(e->confidence > 0 && e->confidence <= 1.000001f);
        CHECK(e->time >= 0 && e->time <= 1);
        canvas[e->seq * TOY_SLOTS + e->position] = e->token;
        last[e->seq] = e->step;
    }
    CHECK(memcmp(canvas, after->canvas, sizeof canvas) == 0);
}

static void sampler_try_order(dlm_ctx *ctx, const dlm_model *m, int order, int cached,
                              float temperature)
{
    toy_run before, after;
    dlm_sample_options o = {0};
    o.order = (dlm_order)order;
    o.temperature = temperature;
    o.seed = test_seed + 5;
    for (int steps = 0; steps <= 3; steps += 3) {
        o.steps = steps;
        toy_canvas(&before, m->config.pattern == DLM_PATTERN_CAUSAL);
        after = before;
        toy_generate(&after, ctx, m, cached, &o);
        sampler_check_filled(&before, &after);
        sampler_check_trace(&before, &after, order == DLM_ORDER_ANCESTRAL);
        CHECK(after.forwards > 0 && after.flops > 0);
    }
}

TEST(sampler_fills_masks_and_only_masks_in_every_order)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int kind = 0; kind < TOY_KINDS; kind++) {
        dlm_model *m = toy_model(ctx, kind, test_seed);
        for (int k = 0; k < DLM_ORDER_COUNT * 4; k++) {
            LABEL("%s, order %d, cached %d, temperature %d", toy_kind_names[kind], k / 4,
                  k & 1, (k >> 1) & 1);
            if (m) sampler_try_order(ctx, m, k / 4, k & 1, (float)((k >> 1) & 1));
        }
        dlm_model_free(m);
    }
    test_close(ctx);
}

TEST(sampler_same_seed_same_tokens_for_any_thread_count)
{
    dlm_ctx *one = test_open(DLM_ISA_AUTO, 1), *two = test_open(DLM_ISA_AUTO, 2);
    int differs = 0;
    for (int k = 0; k < TOY_KINDS * (int)DLM_ORDER_COUNT; k++) {
        toy_run a, b, c;
        dlm_sample_options o = {0};
        int kind = k % TOY_KINDS;
        dlm_model *m1 = toy_model(one, kind, 3), *m2 = toy_model(two, kind, 3);
        LABEL("%s, order %d", toy_kind_names[kind], k / TOY_KINDS);
        o.order = (dlm_order)(k / TOY_KINDS);
        o.temperature = 1;
        o.seed = test_seed;
        toy_canvas(&a, kind == 4);
        b = c = a;
        toy_generate(&a, one, m1, 1, &o);
        toy_generate(&b, two, m2, 1, &o);
        CHECK(toy_same_tokens(&a, &b) && toy_same_events(&a, &b));
        o.seed++;
        toy_generate(&c, one, m1, 1, &o);
        differs += !toy_same_tokens(&a, &c);
        dlm_model_free(m1);
        dlm_model_free(m2);
    }
    LABEL("another seed");
    CHECK(differs > TOY_KINDS * (int)DLM_ORDER_COUNT / 2);
    dlm_shutdown(two);
    test_close(one);
}

/* Events of one sequence only, without its number. */
static void sampler_pick(const toy_run *from, int seq, toy_run *to)
{
    memset(to, 0, sizeof *to);
    for (int i = 0; i < from->n_events; i++)
        if (from->events[i].seq == seq) {
            to->events[to->n_events] = from->events[i];
            to->events[to->n_events++].seq = 0;
        }
    memcpy(to->canvas, from->canvas + seq * TOY_SLOTS, TOY_SLOTS * sizeof(int));
}

static void sampler_try_neighbours(dlm_ctx *ctx, const dlm_model *m,
                                   const dlm_sample_options *o, int cached)
{
    toy_run all, few, a, b;
    dlm_sample_options alone = *o;
    uint32_t id;
    toy_canvas(&all, m->config.pattern == DLM_PATTERN_CAUSAL);
    few = all;
    for (int seq = 0; seq < TOY_SEQS; seq += 2) {
        toy_sequence(&few, seq, 3 + 5 * (seq & 3), 2, 99);   /* other company */
        few.lengths[seq] = 3 + 5 * (seq & 3);
    }
    toy_generate(&all, ctx, m, cached, o);
    toy_generate(&few, ctx, m, cached, o);
    for (int seq = 1; seq < TOY_SEQS; seq += 2) {
        sampler_pick(&all, seq, &a);
        sampler_pick(&few, seq, &b);
        CHECK(toy_same_tokens(&a, &b) && toy_same_events(&a, &b));
        toy_canvas(&b, m->config.pattern == DLM_PATTERN_CAUSAL);   /* without any */
        b.n_seqs = 1;
        b.lengths[0] = b.lengths[seq];
        memmove(b.canvas, b.canvas + seq * TOY_SLOTS, TOY_SLOTS * sizeof(int));
        id = (uint32_t)seq;
        alone.ids = &id;                         /* the same one to the dice */
        toy_generate(&b, ctx, m, cached, &alone);
        CHECK(memcmp(b.canvas, a.canvas, TOY_SLOTS * sizeof(int)) == 0);
        CHECK(toy_same_events(&a, &b));
    }
}

TEST(sampler_result_does_not_depend_on_batch_neighbours)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int kind = 0; kind < TOY_KINDS; kind++) {
        dlm_model *m = toy_model(ctx, kind, test_seed);
        for (int k = 0; m && k < DLM_ORDER_COUNT * 4; k++) {
            dlm_sample_options o = {0};
            o.order = (dlm_order)(k / 4);
            o.temperature = (float)((k >> 1) & 1);
            o.seed = 11;
            LABEL("%s, order %d, cached %d, temperature %d", toy_kind_names[kind], k / 4,
                  k & 1, (k >> 1) & 1);
            sampler_try_neighbours(ctx, m, &o, k & 1);
        }
        dlm_model_free(m);
    }
    test_close(ctx);
}

TEST(sampler_cached_blocks_equal_uncached_ones_token_for_token)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int k = 0; k < 3 * DLM_ORDER_COUNT * 4; k++) {
        toy_run a, b;
        dlm_sample_options o = {0};
        int kind = 2 + k % 3, order = k / 3 % DLM_ORDER_COUNT;
        dlm_model *m = toy_model(ctx, kind, test_seed + 1);
        o.order = (dlm_order)order;
        o.temperature = (float)(k / (3 * DLM_ORDER_COUNT) & 1);
        o.absolute_blocks = k / (6 * DLM_ORDER_COUNT);
        o.steps = 2;
        LABEL("%s, order %d, temperature %d, absolute %d", toy_kind_names[kind], order,
              (int)o.temperature, o.absolute_blocks);
        toy_canvas(&a, kind == 4);
        b = a;
        toy_generate(&a, ctx, m, 1, &o);
        toy_generate(&b, ctx, m, 0, &o);
        CHECK(toy_same_tokens(&a, &b));
        CHECK(toy_same_events(&a, &b));
        dlm_model_free(m);
    }
    test_close(ctx);
}

/* Rebuilds the canvas as it stood before each event's step and compares the event's
   confidence with that of a forward pass from scratch. */
static void sampler_check_confidences(naive_run *n, const toy_run *before,
                                      const toy_run *after)
{
    for (int seq = 0; seq < after->n_seqs; seq++) {
        int canvas[TOY_SLOTS], step = -1;
        memcpy(canvas, before->canvas + seq * TOY_SLOTS, sizeof canvas);
        n->canvas = canvas;
        n->T = after->lengths[seq];
        n->prompt = naive_prefix(canvas, n->T);
        n->block = n->m->config.pattern == DLM_PATTERN_FULL ? n->T : n->m->config.block;
        n->offset = n->prompt % n->block;
        for (int i = 0; i < after->n_events; i++) {
            const dlm_event *e = &after->events[i];
            if (e->seq != seq) continue;
            if (e->step != step) naive_forward(n);
            step = e->step;
            const float *l = naive_logits_of(n, e->position);
            double sum = 0;
            for (int v = 0; v < TOY_MASK; v++) sum += exp((double)l[v]);
            CHECK_CLOSE(e->confidence, exp((double)l[e->token]) / sum, 1e-5);
            int next = i + 1;                                /* the step's end? */
            while (next < after->n_events && after->events[next].seq != seq) next++;
            if (next < after->n_events && after->events[next].step == step) continue;
            for (int j = 0; j <= i; j++)
                if (after->events[j].seq == seq)
                    canvas[after->events[j].position] = after->events[j].token;
        }
    }
}

TEST(sampler_confidence_is_the_untempered_probability_from_scratch)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    naive_run *n = (naive_run *)test_malloc(sizeof *n);
    for (int k = 0; k < TOY_KINDS * 6; k++) {
        toy_run before, after;
        dlm_sample_options o = {0};
        int kind = k % TOY_KINDS;
        dlm_model *m = toy_model(ctx, kind, test_seed + 2);
        o.temperature = (float)(k / TOY_KINDS % 3) * 0.75f;
        o.order = k / (TOY_KINDS * 3) ? DLM_ORDER_RANDOM : DLM_ORDER_CONFIDENCE;
        o.top_k = o.temperature > 1 ? 3 : 0;    /* filters leave confidence alone */
        o.steps = 2;
        LABEL("%s, temperature %g, order %d", toy_kind_names[kind],
              (double)o.temperature, (int)o.order);
        toy_canvas(&before, kind == 4);
        after = before;
        toy_generate(&after, ctx, m, 1, &o);
        n->m = m;
        n->o = &o;
        n->s = toy_session(ctx, m, 0);
        if (n->s) sampler_check_confidences(n, &before, &after);
        dlm_session_free(n->s);
        dlm_model_free(m);
    }
    free(n);
    test_close(ctx);
}

/* Every event of the naive run stands in the trace, with its step; order inside a step
   is not looked at. */
static void sampler_check_naive(const naive_run *n, const toy_run *after, int seq)
{
    int found = 0;
    for (int i = 0; i < after->n_events; i++) {
        const dlm_event *e = &after->events[i];
        if (e->seq != seq) continue;
        found++;
        for (int j = 0; j < n->n_events; j++) {
            const dlm_event *want = &n->events[j];
            if (want->position != e->position) continue;
            CHECK(e->step == want->step);
            CHECK(e->token == want->token);
            CHECK_CLOSE(e->confidence, want->confidence, 1e-5);
        }
    }
    CHECK(found == n->n_events);
}

static void sampler_try_naive(dlm_ctx *ctx, naive_run *n, const dlm_sample_options *o,
                              int cached)
{
    toy_run before, after;
    toy_canvas(&before, n->m->config.pattern == DLM_PATTERN_CAUSAL);
    after = before;
    toy_generate(&after, ctx, n->m, cached, o);
    n->o = o;
    for (int seq = 0; seq < TOY_SEQS; seq++) {
        n->canvas = before.canvas + seq * TOY_SLOTS;
        n->T = before.lengths[seq];
        naive_decode(n);
        sampler_check_naive(n, &after, seq);
    }
    CHECK(toy_same_tokens(&before, &after));
}

/* The seed is fixed: of two confidences that differ in the last bit either may win. */
TEST(sampler_orders_reproduce_naive_trajectories_at_temperature_0)
{
    static const dlm_order orders[6] = {
        DLM_ORDER_CONFIDENCE, DLM_ORDER_THRESHOLD, DLM_ORDER_ENTROPY,
        DLM_ORDER_ENTROPY_BOUND, DLM_ORDER_MARGIN, DLM_ORDER_SEQUENTIAL
    };
    static const struct { int steps, block, absolute; float threshold, bound; } set[] = {
        { 0, 0, 0, 0, 0 }, { 2, 0, 0, 0.4f, 1.5f }, { 3, 0, 1, 0.7f, 3 },
        { 5, 0, 0, 0.25f, 6 }, { 1, 0, 1, 1, 100 }, { 2, 6, 0, 0.3f, 2 }
    };
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    naive_run *n = (naive_run *)test_malloc(sizeof *n);
    for (int kind = 0; kind < 4; kind++) {
        dlm_model *m = toy_model(ctx, kind, 21);
        n->m = m;
        n->s = toy_session(ctx, m, 0);
        for (int k = 0; n->s && k < 6 * 6 * 2; k++) {
            dlm_sample_options o = {0};
            int row = k / 12;
            o.order = orders[k / 2 % 6];
            o.steps = set[row].steps;
            o.block = set[row].block;
            o.absolute_blocks = set[row].absolute;
            o.threshold = set[row].threshold;
            o.entropy_bound = set[row].bound;
            LABEL("%s, order %d, steps %d, row %d, cached %d", toy_kind_names[kind],
                  (int)o.order, o.steps, row, k & 1);
            sampler_try_naive(ctx, n, &o, k & 1);
        }
        dlm_session_free(n->s);
        dlm_model_free(m);
    }
    free(n);
    test_close(ctx);
}

TEST(sampler_greedy_causal_equals_an_argmax_loop)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    naive_run *n = (naive_run *)test_malloc(sizeof *n);
    for (int k = 0; k < 2 * DLM_ORDER_COUNT; k++) {
        toy_run before, after;
        dlm_sample_options o = {0};
        dlm_model *m = toy_model(ctx, 4, 31);
        o.order = (dlm_order)(k / 2);
        LABEL("order %d, cached %d", k / 2, k & 1);
        toy_canvas(&before, 1);
        after = before;
        toy_generate(&after, ctx, m, k & 1, &o);
        n->m = m;
        n->s = toy_session(ctx, m, 0);
        n->block = 1;
        n->offset = 0;
        for (int seq = 0; n->s && seq < TOY_SEQS; seq++) {
            n->canvas = before.canvas + seq * TOY_SLOTS;
            n->T = before.lengths[seq];
            for (int i = 1; i < n->T; i++) {
                if (n->canvas[i] != TOY_MASK) continue;
                naive_forward(n);
                naive_judge(n, i);
                n->canvas[i] = n->token[i];
            }
        }
        CHECK(toy_same_tokens(&before, &after));
        dlm_session_free(n->s);
        dlm_model_free(m);
    }
    free(n);
    test_close(ctx);
}

TEST(sampler_threshold_1_is_the_plan_and_a_tiny_one_takes_the_block)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int kind = 0; kind < 4; kind++) {
        toy_run a, b;
        dlm_model *m = toy_model(ctx, kind, test_seed);
        LABEL("%s", toy_kind_names[kind]);
        for (int steps = 0; steps < 4; steps++) {
            dlm_sample_options o = {0};
            o.steps = steps;
            o.temperature = 0.5f;
            toy_canvas(&a, 0);
            b = a;
            toy_generate(&a, ctx, m, 1, &o);
            o.order = DLM_ORDER_THRESHOLD;
            o.threshold = 1;
            toy_generate(&b, ctx, m, 1, &o);
            CHECK(toy_same_tokens(&a, &b) && toy_same_events(&a, &b));
            toy_canvas(&a, 0);
            toy_canvas(&b, 0);
            o.left_first = 1;
            toy_generate(&a, ctx, m, 1, &o);
            o.order = DLM_ORDER_SEQUENTIAL;
            toy_generate(&b, ctx, m, 1, &o);
            CHECK(toy_same_tokens(&a, &b));          /* in a step the order differs */
            toy_canvas(&b, 0);
            o.order = DLM_ORDER_THRESHOLD;
            o.threshold = 1e-30f;
            toy_generate(&b, ctx, m, 1, &o);
            int last = 0;
            for (int i = 0; i < b.n_events; i++)
                if (b.events[i].seq == 0) last = b.events[i].step;
            CHECK(last == (kind < 2 ? 1 : 5));   /* 19 masks in blocks of 4 */
        }
        dlm_model_free(m);
    }
    test_close(ctx);
}

/* A confidence equal to the threshold is not above it. */
TEST(sampler_threshold_is_strict)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_model *m = toy_blank(ctx, 5);                /* 4 tokens of exactly 1/4 each */
    for (int k = 0; k < 2; k++) {
        toy_run r;
        dlm_sample_options o = {0};
        memset(&r, 0, sizeof r);
        r.n_seqs = 1;
        r.lengths[0] = 8;
        for (int i = 0; i < 8; i++) r.canvas[i] = 4;
        o.order = DLM_ORDER_THRESHOLD;
        o.threshold = k ? 0.249f : 0.25f;
        toy_generate(&r, ctx, m, 0, &o);
        CHECK(r.n_events == 8);
        CHECK(r.events[7].step == (k ? 1 : 8));
        CHECK_CLOSE(r.events[0].confidence, 0.25, 1e-7);
    }
    dlm_model_free(m);
    test_close(ctx);
}

TEST(sampler_plan_is_masks_over_steps_remainder_first)
{
    static const dlm_order planned[5] = {
        DLM_ORDER_CONFIDENCE, DLM_ORDER_ENTROPY, DLM_ORDER_MARGIN, DLM_ORDER_RANDOM,
        DLM_ORDER_SEQUENTIAL
    };
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_model *m = toy_model(ctx, 0, test_seed);
    for (int k = 0; k < 5 * 12 * 12; k++) {
        toy_run r;
        dlm_sample_options o = {0};
        int masks = 1 + k % 12, steps = 1 + k / 12 % 12, count[TOY_SLOTS] = { 0 };
        memset(&r, 0, sizeof r);
        r.n_seqs = 1;
        toy_sequence(&r, 0, masks + 2, 2, 1);
        o.order = planned[k / 144];
        o.steps = steps;
        LABEL("order %d, %d masks in %d steps", (int)o.order, masks, steps);
        toy_generate(&r, ctx, m, 0, &o);
        for (int i = 0; i < r.n_events; i++) count[r.events[i].step]++;
        for (int s = 1; s <= steps; s++)
            CHECK(count[s] == masks / steps + (s <= masks % steps));
        CHECK(r.forwards == (masks < steps ? masks : steps));
    }
    dlm_model_free(m);
    test_close(ctx);
}
/* Blocks of 8 in a canvas of 13: of the first P tokens are visible, of the second three
   lie beyond the end.  Both are filled as whole ones would be, until nothing is left. */
TEST(sampler_plan_of_a_block_does_not_ask_what_is_visible)
{
    static const dlm_order planned[5] = {
        DLM_ORDER_CONFIDENCE, DLM_ORDER_ENTROPY, DLM_ORDER_MARGIN, DLM_ORDER_RANDOM,
        DLM_ORDER_SEQUENTIAL
    };
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_model *m = toy_model(ctx, 2, test_seed);
    for (int k = 0; k < 5 * 8 * 10; k++) {
        toy_run r;
        dlm_sample_options o = {0};
        const int P = k % 8, left[2] = { 8 - P, 5 };
        int count[TOY_SLOTS + 1] = { 0 }, step = 1;
        memset(&r, 0, sizeof r);
        r.n_seqs = 1;
        toy_sequence(&r, 0, 13, P, 1);
        o.order = planned[k / 80];
        o.steps = k / 8 % 10;
        o.block = 8;
        o.absolute_blocks = 1;
        LABEL("order %d, %d visible, %d steps", (int)o.order, P, o.steps);
        toy_generate(&r, ctx, m, 1, &o);
        for (int i = 0; i < r.n_events; i++) count[r.events[i].step]++;
        for (int block = 0; block < 2; block++)
            for (int s = 0, n = left[block]; n > 0; s++) {
                int steps = o.steps ? o.steps : 8, plan = 8 / steps + (s < 8 % steps);
                int want = plan < 1 ? 1 : plan < n ? plan : n;
                CHECK(count[step++] == want);
                n -= want;
            }
        CHECK(step == r.forwards + 1);
    }
    dlm_model_free(m);
    test_close(ctx);
}

/* Canvases of `masks` masks after one visible token, in all sequences. */
static void sampler_small_canvas(toy_run *r, int masks, int mask_id)
{
    memset(r, 0, sizeof *r);
    r->n_seqs = TOY_SEQS;
    for (int seq = 0; seq < TOY_SEQS; seq++) {
        r->lengths[seq] = masks + 1;
        for (int i = 0; i < TOY_SLOTS; i++)
            r->canvas[seq * TOY_SLOTS + i] = i == 0 ? 1 : mask_id;
    }
}

/* Number 0..5 of the permutation in which a sequence's three masks were filled. */
static int sampler_permutation(const toy_run *r, int seq)
{
    int at[3] = { 0 }, n = 0;
    for (int i = 0; i < r->n_events && n < 3; i++)
        if (r->events[i].seq == seq) at[n++] = r->events[i].position - 1;
    return at[0] * 2 + (at[1] > at[2]);
}

TEST(sampler_random_and_first_hitting_orders_are_uniform)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_model *m = toy_model(ctx, 0, 5);
    dlm_session *s = toy_session(ctx, m, 0);
    const double p[6] = { 1.0/6, 1.0/6, 1.0/6, 1.0/6, 1.0/6, 1.0/6 };
    for (int k = 0; s && k < 2; k++) {
        int counts[6] = { 0 };
        double first = 0, last = 0, n = 0;
        dlm_sample_options o = {0};
        o.order = k ? DLM_ORDER_FIRST_HITTING : DLM_ORDER_RANDOM;
        LABEL("order %d", (int)o.order);
        for (int round = 0; round < 400; round++) {
            toy_run r;
            sampler_small_canvas(&r, 3, TOY_MASK);
            o.seed = test_seed + (uint64_t)round;
            toy_drive(&r, s, &o);
            CHECK_OK(r.error);
            for (int q = 0; q < TOY_SEQS; q++) counts[sampler_permutation(&r, q)]++;
            for (int i = 0; i < r.n_events; i++) {
                first += r.events[i].step == 1 ? (double)r.events[i].time : 0;
                last += r.events[i].step == 3 ? (double)r.events[i].time : 0;
            }
            n += (int)TOY_SEQS;
        }
        toy_check_counts(counts, p, 6);
        if (k == 0) continue;
        /* The times are those of three uniforms, sorted: means 3/4 and 1/4, variance
           3/80; five standard errors. */
        CHECK_CLOSE(first / n, 0.75, 5 * sqrt(3.0 / 80 / n));
        CHECK_CLOSE(last / n, 0.25, 5 * sqrt(3.0 / 80 / n));
    }
    dlm_session_free(s);
    dlm_model_free(m);
    test_close(ctx);
}

/* From t to s each mask is revealed with probability 1 - s/t: over n equal steps from
   1 to 0 the step of every mask is uniform, and independent of the others. */
TEST(sampler_ancestral_steps_are_uniform_and_independent)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_model *m = toy_model(ctx, 0, 5);
    dlm_session *s = toy_session(ctx, m, 0);
    int counts[27] = { 0 };
    double p[27];
    dlm_sample_options o = {0};
    o.order = DLM_ORDER_ANCESTRAL;
    o.steps = 3;
    for (int i = 0; i < 27; i++) p[i] = 1.0 / 27;
    for (int round = 0; s && round < 700; round++) {
        toy_run r;
        int cell[TOY_SEQS] = { 0 };
        sampler_small_canvas(&r, 3, TOY_MASK);
        o.seed = test_seed + (uint64_t)round;
        toy_drive(&r, s, &o);
        CHECK_OK(r.error);
        for (int i = 0; i < r.n_events; i++) {
            const dlm_event *e = &r.events[i];
            static const int place[4] = { 0, 1, 3, 9 };
            double at = (1 - (double)e->time) * 3;       /* empty steps do not count */
            int step = (int)floor(at + 0.5);
            CHECK_CLOSE(at, step, 1e-5);
            CHECK(step >= 1 && step <= 3);
            cell[e->seq] += place[e->position] * (step - 1);
        }
        for (int seq = 0; seq < TOY_SEQS; seq++) counts[cell[seq]]++;
    }
    toy_check_counts(counts, p, 27);
    dlm_session_free(s);
    dlm_model_free(m);
    test_close(ctx);
}

/* How many of n masks are revealed in step k of 4, given how many are left, is binomial
   with p = 1/(4 - k). */
TEST(sampler_ancestral_counts_are_binomial)
{
    enum { N = 5 };
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_model *m = toy_model(ctx, 0, 5);
    dlm_session *s = toy_session(ctx, m, 0);
    int counts[4][N + 1][N + 1] = { { { 0 } } };           /* [step][left][revealed]  */
    int checked = 0;
    dlm_sample_options o = {0};
    o.order = DLM_ORDER_ANCESTRAL;
    o.steps = 4;
    for (int round = 0; s && round < 600; round++) {
        toy_run r;
        int revealed[TOY_SEQS][5] = { { 0 } };
        sampler_small_canvas(&r, N, TOY_MASK);
        o.seed = test_seed + (uint64_t)round;
        toy_drive(&r, s, &o);
        CHECK_OK(r.error);
        for (int i = 0; i < r.n_events; i++)
            revealed[r.events[i].seq][3 - (int)floor(4 * r.events[i].time + 0.5f)]++;
        for (int seq = 0; seq < TOY_SEQS; seq++)
            for (int k = 0, left = N; k < 4; left -= revealed[seq][k], k++)
                if (left > 0) counts[k][left][revealed[seq][k]]++;
    }
    for (int k = 0; k < 4; k++)
        for (int left = k ? 1 : N; left <= N; left++) {
            double p[N + 1], q = 1.0 / (4 - k), ways = 1;
            int total = 0;
            for (int j = 0; j <= left; ways = ways * (left - j) / (j + 1), j++) {
                p[j] = ways * pow(q, j) * pow(1 - q, left - j);
                total += counts[k][left][j];
            }
            LABEL("step %d, %d left", k, left);
            if (total < 100) continue;                   /* 5 left at last are rare */
            toy_check_counts(counts[k][left], p, left + 1);
            checked++;
        }
    CHECK(checked >= 8);
    dlm_session_free(s);
    dlm_model_free(m);
    test_close(ctx);
}

/* With very many steps time is continuous: no two masks at once, any order, times as in
   FIRST_HITTING, and as few forwards as masks. */
TEST(sampler_ancestral_does_not_wait_for_empty_steps)
{
    static const int many[2] = { 100000000, 2147483647 };
    const double p[6] = { 1.0/6, 1.0/6, 1.0/6, 1.0/6, 1.0/6, 1.0/6 };
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_model *m = toy_model(ctx, 0, 5);
    dlm_session *s = toy_session(ctx, m, 0);
    for (int k = 0; s && k < 2; k++) {
        int counts[6] = { 0 };
        double sum[3] = { 0 }, n = 0;
        dlm_sample_options o = {0};
        o.order = DLM_ORDER_ANCESTRAL;
        o.steps = many[k];
        for (int round = 0; round < 200; round++) {
            toy_run r;
            sampler_small_canvas(&r, 3, TOY_MASK);
            o.seed = test_seed + (uint64_t)round;
            toy_drive(&r, s, &o);
            CHECK_OK(r.error);
            CHECK(r.forwards == 3);
            for (int q = 0; q < TOY_SEQS; q++) counts[sampler_permutation(&r, q)]++;
            for (int i = 0; i < r.n_events; i++)
                sum[(r.events[i].step - 1) % 3] += (double)r.events[i].time;
            n += (int)TOY_SEQS;
        }
        toy_check_counts(counts, p, 6);
        for (int j = 0; j < 3; j++)        /* sorted uniforms; variance at most 1/20  */
            CHECK_CLOSE(sum[j] / n, (3 - j) / 4.0, 5 * sqrt(1.0 / 20 / n));
    }
    dlm_session_free(s);
    dlm_model_free(m);
    test_close(ctx);
}

/* A sampler of one sequence whose n candidates are all masks of a canvas. */
typedef struct sampler_crowd {
    dlm_sampler   sm;
    dlm__sequence q;
} sampler_crowd;

static void sampler_crowd_open(sampler_crowd *w, int n, dlm_order order)
{
    memset(w, 0, sizeof *w);
    w->sm.c.pattern = DLM_PATTERN_FULL;
    w->sm.opt.order = order;
    w->sm.opt.steps = 1;
    w->sm.seqs = &w->q;
    w->q.n = w->q.e = w->q.block_masks = n;
    w->q.canvas = (int *)test_malloc((size_t)n * sizeof(int));
    w->sm.trace = (dlm_event *)test_malloc((size_t)n * sizeof(dlm_event));
    w->sm.cands = (dlm__candidate *)test_malloc((size_t)n * sizeof(dlm__candidate));
    for (int i = 0; i < n; i++) {
        dlm__candidate *c = &w->sm.cands[i];
        memset(c, 0, sizeof *c);
        c->position = i;
        c->guess.token = 1;
        c->guess.rank = c->guess.confidence = (float)(test_below(n / 4) + 1);  /* ties */
        w->q.canvas[i] = 0;
    }
}

static void sampler_crowd_close(sampler_crowd *w)
{
    free(w->q.canvas); free(w->sm.trace); free(w->sm.cands);
}

/* Repeated scans would take minutes here. */
TEST(sampler_chooses_among_half_a_million_candidates)
{
    enum { N = 1 << 19, KEEP = N / 3 };
    sampler_crowd w;
    sampler_crowd_open(&w, N, DLM_ORDER_CONFIDENCE);
    dlm__commit(&w.sm, &w.q);
    CHECK(w.sm.n_events == N);
    for (int i = 1; i < w.sm.n_events; i++) {
        const dlm_event *a = &w.sm.trace[i - 1], *b = &w.sm.trace[i];
        CHECK(a->confidence > b->confidence
              || (a->confidence == b->confidence && a->position < b->position));
    }
    for (int i = 0; i < N; i++) CHECK(w.q.canvas[i] == 1);
    sampler_crowd_close(&w);

    sampler_crowd_open(&w, N, DLM_ORDER_RANDOM);
    dlm__keep_blindly(&w.sm, &w.q, w.sm.cands, KEEP);
    CHECK(w.q.n == KEEP);
    float in = 0, out = 1;                 /* largest key kept, smallest left out     */
    for (int i = 0, k = 0; i < N; i++) {
        float key = (float)dlm__sampler_uniform(&w.sm, &w.q, DLM_RANDOM_ORDER, 0, i);
        const int kept = k < KEEP && w.sm.cands[k].position == i;
        k += kept;
        if (kept && key > in) in = key;
        if (!kept && key < out) out = key;
        if (i == N - 1) CHECK(k == KEEP);  /* so they stand left to right             */
    }
    CHECK(in <= out);
    sampler_crowd_close(&w);
}

/* What the filters leave of the logits (V - 1, the mask is out), normalised: heat,
   then the k highest with ties, then a token whose predecessors have mass <= top_p,
   then those of at least min_p times the largest. */
static void sampler_naive_filter(double *p, const float *logits, int V,
                                 const dlm_sample_options *o)
{
    double sum = 0, q[TOY_VOCAB], most = (double)logits[0];
    for (int v = 1; v < V - 1; v++) most = fmax(most, (double)logits[v]);
    for (int v = 0; v < V - 1; v++) {
        int above = 0;
        for (int w = 0; w < V - 1; w++) above += logits[w] > logits[v];
        p[v] = o->top_k && above >= o->top_k
             ? 0 : exp(((double)logits[v] - most) / (double)o->temperature);
        sum += p[v];
    }
    p[V - 1] = 0;
    double best = 0;
    for (int v = 0; v < V; v++) {
        q[v] = p[v] /= sum;
        if (q[v] > best) best = q[v];
    }
    for (int v = 0; v < V; v++) {
        double before = 0;
        for (int w = 0; w < V; w++) before += q[w] > q[v] ? q[w] : 0;
        if (o->top_p > 0 && before > (double)o->top_p) p[v] = 0;
        if (q[v] < (double)o->min_p * best) p[v] = 0;
    }
    sum = 0;
    for (int v = 0; v < V; v++) sum += p[v];
    for (int v = 0; v < V; v++) p[v] /= sum;
}

/* 24 masks in 6 sequences are 144 draws from the same distribution per round. */
static void sampler_count_draws(int *counts, dlm_session *s, dlm_sample_options *o,
                                int V, int rounds)
{
    for (int round = 0; round < rounds; round++) {
        toy_run r;
        memset(&r, 0, sizeof r);
        r.n_seqs = TOY_SEQS;
        for (int i = 0; i < TOY_ALL; i++) r.canvas[i] = V - 1;
        for (int seq = 0; seq < TOY_SEQS; seq++) r.lengths[seq] = TOY_SLOTS;
        o->seed = test_seed + (uint64_t)round;
        toy_drive(&r, s, o);
        CHECK_OK(r.error);
        for (int i = 0; i < TOY_ALL; i++) {
            CHECK(r.canvas[i] >= 0 && r.canvas[i] < V - 1);
            if (r.canvas[i] >= 0 && r.canvas[i] < V) counts[r.canvas[i]]++;
        }
    }
}

TEST(sampler_draws_follow_the_tempered_and_filtered_softmax)
{
    enum { V = 8 };
    static const float logits[2][V] = {
        { 1.2f, 0.3f, -0.5f, 0, 2, -1, 0.7f, 9 },
        { 1, 3, 2, 2, 0, -1, 2, 9 }              /* a tie at the second place     */
    };
    static const struct { int logits, k; float heat, p, min; } set[] = {
        { 0, 0, 1, 0, 0 }, { 0, 0, 0.7f, 0, 0 }, { 0, 0, 3, 0, 0 },
        { 1, 2, 1, 0, 0 }, { 1, 1, 1, 0, 0 }, { 1, 4, 0.5f, 0, 0 }, { 1, 5, 2, 0, 0 },
        { 1, 99, 1, 0, 0 },
        { 0, 0, 1, 0.6f, 0 }, { 0, 0, 1, 0.0001f, 0 }, { 0, 0, 2, 0.6f, 0 },
        { 0, 0, 1, 1, 0 }, { 0, 3, 1, 0.6f, 0 },
        { 0, 0, 1, 0, 0.3f }, { 0, 0, 2, 0, 0.3f }, { 0, 0, 1, 0, 1 },
        { 0, 4, 0.9f, 0.9f, 0.15f }
    };
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_model *m = toy_blank(ctx, V);
    dlm_session *s = toy_session(ctx, m, 0);
    for (int row = 0; s && row < (int)(sizeof set / sizeof set[0]); row++) {
        int counts[V] = { 0 };
        double p[V];
        dlm_sample_options o = {0};
        o.steps = 1;
        o.logit_bias = logits[set[row].logits];
        o.temperature = set[row].heat;
        o.top_k = set[row].k;
        o.top_p = set[row].p;
        o.min_p = set[row].min;
        LABEL("row %d", row);
        sampler_naive_filter(p, o.logit_bias, V, &o);
        sampler_count_draws(counts, s, &o, V, 30);
        toy_check_counts(counts, p, V);
        for (int v = 0; v < V; v++)              /* what is kept does come up */
            if (p[v] > 0.01) CHECK(counts[v] > 0);
    }
    dlm_session_free(s);
    dlm_model_free(m);
    test_close(ctx);
}

typedef struct sampler_looks {
    float logits[TOY_SLOTS][TOY_VOCAB];    /* of the step that is under way        */
} sampler_looks;

static void sampler_look(void *user, int seq, int position, float *logits)
{
    sampler_looks *w = (sampler_looks *)user;
    (void)seq;
    memcpy(w->logits[position], logits, sizeof w->logits[position]);
}

/* The masks that one step had to take: with ascending entropies of the tempered and
   filtered distributions, while their sum is below the bound, at least one.  Returns the
   smallest distance of a sum from the bound, as rounding may decide below it. */
static double sampler_bounded(char *due, const sampler_looks *w, const int *canvas, int T,
                              const dlm_sample_options *o)
{
    double h[TOY_SLOTS], sum = 0, nearest = INFINITY;
    memset(due, 0, TOY_SLOTS);
    for (int i = 0; i < T; i++) {
        double p[TOY_VOCAB];
        h[i] = -1;
        if (canvas[i] != TOY_MASK) continue;
        sampler_naive_filter(p, w->logits[i], TOY_VOCAB, o);
        h[i] = 0;
        for (int v = 0; v < TOY_VOCAB; v++) if (p[v] > 0) h[i] -= p[v] * log(p[v]);
    }
    for (int n = 0; n < T; n++) {
        int best = -1;
        for (int i = 0; i < T; i++)
            if (h[i] >= 0 && !due[i] && (best < 0 || h[i] < h[best])) best = i;
        if (best < 0) break;
        sum += h[best];
        if (n > 0) nearest = fmin(nearest, fabs(sum - (double)o->entropy_bound));
        if (n > 0 && !(sum < (double)o->entropy_bound)) break;
        due[best] = 1;
    }
    return nearest;
}

TEST(sampler_entropy_bound_is_on_what_is_drawn_from)
{
    static const struct { float heat, p, bound; int k; } set[] = {
        { 0.5f, 0, 1.0f, 0 }, { 1, 0, 5, 0 }, { 2, 0, 8, 0 }, { 1, 0.8f, 3, 0 },
        { 1, 0, 2, 3 }, { 1.5f, 0.9f, 5, 6 }, { 1e-40f, 0, 0.1f, 0 }
    };
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_model *m = toy_model(ctx, 0, 21);
    dlm_session *s = toy_session(ctx, m, 0);
    for (int k = 0; s && k < 7; k++) {
        sampler_looks w;
        toy_run r;
        dlm_sampler *sm = NULL;
        dlm_sample_options o = {0};
        int several = 0, kept[TOY_SLOTS];
        char due[TOY_SLOTS];
        o.order = DLM_ORDER_ENTROPY_BOUND;
        o.temperature = set[k].heat; o.top_p = set[k].p; o.top_k = set[k].k;
        o.entropy_bound = set[k].bound; o.constrain = sampler_look; o.constrain_user = &w;
        LABEL("row %d", k);
        toy_canvas(&r, 0);
        CHECK_OK(dlm_sampler_create(&sm, s, &o, NULL));
        CHECK_OK(dlm_sampler_begin(sm, r.canvas, r.lengths, 1));
        for (int step = 0; !dlm_sampler_done(sm) && step < TOY_SLOTS; step++) {
            int filled = 0;
            memcpy(kept, r.canvas, sizeof kept);
            CHECK_OK(dlm_sampler_step(sm));
            CHECK(sampler_bounded(due, &w, kept, r.lengths[0], &o) > 1e-5);
            for (int i = 0; i < r.lengths[0]; i++) {
                CHECK(due[i] == (kept[i] != r.canvas[i]));
                filled += due[i];
            }
            several += filled > 1;
        }
        CHECK(dlm_sampler_done(sm) && several > 0);
        dlm_sampler_free(sm);
    }
    dlm_session_free(s);
    dlm_model_free(m);
    test_close(ctx);
}

/* One at a time, in an order that does not look at the tokens: the same frequencies,
   and draws of later steps do not repeat those of earlier ones. */
TEST(sampler_draws_of_different_steps_are_independent)
{
    enum { V = 4 };
    static const float bias[V] = { 0, 0.4f, 0.8f, 0 };
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_model *m = toy_blank(ctx, V);
    dlm_session *s = toy_session(ctx, m, 0);
    for (int order = 0; s && order < 3; order++) {
        int counts[9] = { 0 };
        double p[V], pairs[9];
        dlm_sample_options o = {0};
        o.temperature = 1;
        o.logit_bias = bias;
        o.order = order == 0 ? DLM_ORDER_SEQUENTIAL
                : order == 1 ? DLM_ORDER_RANDOM : DLM_ORDER_FIRST_HITTING;
        LABEL("order %d", (int)o.order);
        sampler_naive_filter(p, bias, V, &o);
        for (int i = 0; i < 9; i++) pairs[i] = p[i / 3] * p[i % 3];
        for (int round = 0; round < 500; round++) {
            toy_run r;
            sampler_small_canvas(&r, 2, V - 1);
            o.seed = test_seed + (uint64_t)round;
            toy_drive(&r, s, &o);
            for (int q = 0; q < TOY_SEQS; q++) {
                const int *c = r.canvas + q * TOY_SLOTS;
                CHECK(c[1] >= 0 && c[1] < 3 && c[2] >= 0 && c[2] < 3);
                if (c[1] < 3 && c[2] < 3) counts[c[1] * 3 + c[2]]++;
            }
        }
        toy_check_counts(counts, pairs, 9);
    }
    dlm_session_free(s);
    dlm_model_free(m);
    test_close(ctx);
}

TEST(sampler_never_emits_suppressed_tokens)
{
    static const int out[] = { 0, 3, 4, 7, 11 };
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int k = 0; k < TOY_KINDS * 2; k++) {
        toy_run before, after;
        dlm_sample_options o = {0};
        int kind = k % TOY_KINDS;
        dlm_model *m = toy_model(ctx, kind, test_seed);
        o.suppress = out;
        o.n_suppress = 5;
        o.temperature = (float)(k / TOY_KINDS) * 1.5f;
        toy_canvas(&before, kind == 4);
        after = before;
        toy_generate(&after, ctx, m, 1, &o);
        sampler_check_filled(&before, &after);
        for (int i = 0; i < after.n_events; i++)
            for (int j = 0; j < 5; j++) CHECK(after.events[i].token != out[j]);
        dlm_model_free(m);
    }
    test_close(ctx);
}

/* Forces (3 * seq + position) mod 12 at even positions. */
static void sampler_force_even(void *user, int seq, int position, float *logits)
{
    (void)user;
    if (position % 2) return;
    for (int v = 0; v < TOY_VOCAB; v++)
        if (v != (3 * seq + position) % TOY_MASK) logits[v] = -INFINITY;
}

TEST(sampler_constraint_decides_what_stands_where)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 2);
    for (int k = 0; k < TOY_KINDS * 2 * DLM_ORDER_COUNT; k++) {
        toy_run before, after;
        dlm_sample_options o = {0};
        int kind = k % TOY_KINDS;
        dlm_model *m = toy_model(ctx, kind, test_seed);
        o.constrain = sampler_force_even;
        o.order = (dlm_order)(k / (2 * TOY_KINDS));
        o.temperature = (float)(k / TOY_KINDS % 2) * 1.5f;
        LABEL("%s, order %d", toy_kind_names[kind], (int)o.order);
        toy_canvas(&before, kind == 4);
        after = before;
        toy_generate(&after, ctx, m, 1, &o);
        sampler_check_filled(&before, &after);
        for (int i = 0; i < after.n_events; i++) {
            const dlm_event *e = &after.events[i];
            if (e->position % 2) continue;
            CHECK(e->token == (3 * e->seq + e->position) % TOY_MASK);
        }
        dlm_model_free(m);
    }
    test_close(ctx);
}

/* What a constraint sees of the run: the canvas now and as the step began. */
typedef struct sampler_view {
    toy_run run;
    int     began[TOY_ALL];
    float   bias[TOY_VOCAB];
    char    moved[TOY_ALL], wrong[TOY_ALL], seen[TOY_ALL];
} sampler_view;

static void sampler_view_look(void *user, int seq, int position, float *logits)
{
    sampler_view *w = (sampler_view *)user;
    const int at = seq * TOY_SLOTS + position;
    if (memcmp(w->run.canvas, w->began, sizeof w->began) != 0) w->moved[at] = 1;
    if (w->began[at] != TOY_MASK || memcmp(logits, w->bias, sizeof w->bias) != 0)
        w->wrong[at] = 1;
    w->seen[at] = 1;
}

static void sampler_view_step(void *user, const dlm_event *events, int n_events)
{
    sampler_view *w = (sampler_view *)user;
    (void)events; (void)n_events;
    memcpy(w->began, w->run.canvas, sizeof w->began);
}

TEST(sampler_constraint_sees_the_canvas_as_the_step_began)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 2);
    dlm_model *m = toy_blank(ctx, TOY_VOCAB);               /* the bias is the logits */
    for (int k = 0; m && k < DLM_ORDER_COUNT * 3; k++) {
        static sampler_view w;
        dlm_sample_options o = {0};
        memset(&w, 0, sizeof w);
        test_fill(w.bias, TOY_VOCAB, 1.0f);
        o.order = (dlm_order)(k / 3);
        o.steps = k % 3 * 3;
        o.temperature = (float)(k % 2);
        o.logit_bias = w.bias;
        o.constrain = sampler_view_look;
        o.on_step = sampler_view_step;
        o.constrain_user = o.step_user = &w;
        LABEL("order %d, steps %d", (int)o.order, o.steps);
        toy_canvas(&w.run, 0);
        memcpy(w.began, w.run.canvas, sizeof w.began);
        toy_generate(&w.run, ctx, m, 0, &o);
        for (int i = 0; i < TOY_ALL; i++) CHECK(!w.moved[i] && !w.wrong[i]);
        for (int i = 0; i < w.run.n_events; i++)
            CHECK(w.seen[w.run.events[i].seq * TOY_SLOTS + w.run.events[i].position]);
    }
    dlm_model_free(m);
    test_close(ctx);
}

/* Position 7 must be token 9, nothing else may be: 9 is the stop token. */
static void sampler_force_stop(void *user, int seq, int position, float *logits)
{
    int at = ((const int *)user)[seq];
    for (int v = 0; v < TOY_VOCAB; v++)
        if ((v == 9) != (position == at)) logits[v] = -INFINITY;
}

/* Up to the stop everything is filled in; behind it fixed tokens stand and the rest is
   masked, whatever the trace says was there for a while. */
static void sampler_check_stopped(const toy_run *before, const toy_run *after,
                                  const int *at)
{
    for (int seq = 0; seq < TOY_SEQS; seq++) {
        const int *was = before->canvas + seq * TOY_SLOTS;
        const int *now = after->canvas + seq * TOY_SLOTS;
        int T = before->lengths[seq];
        int stops = at[seq] >= 0 && at[seq] < T && was[at[seq]] == TOY_MASK;
        int length = stops ? at[seq] + 1 : T;
        CHECK(after->length[seq] == length);
        for (int i = 0; i < TOY_SLOTS; i++) {
            if (was[i] != TOY_MASK || i >= T) CHECK(now[i] == was[i]);
            else if (i >= length) CHECK(now[i] == TOY_MASK);
            else CHECK(now[i] >= 0 && now[i] < TOY_MASK);
        }
        if (stops) CHECK(now[at[seq]] == 9);
        for (int i = 0; i < after->n_events; i++) {
            const dlm_event *e = &after->events[i];
            if (e->seq == seq && e->position < length)
                CHECK(e->token == now[e->position]);
        }
    }
}

TEST(sampler_stop_token_ends_a_sequence_and_leaves_the_rest_masked)
{
    static const int at[3][TOY_SEQS] = {
        { 7, 2, 3, 0, 6, 12 },               /* stops in first and later blocks   */
        { 23, 12, -1, -1, -1, 4 },           /* at the end, never, at the start   */
        { 5, 4, -1, -1, 3, 11 }              /* 3 of sequence 4 is its prompt     */
    };
    static const int stop[2] = { 9, 9 };
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int k = 0; k < TOY_KINDS * 3 * 2 * DLM_ORDER_COUNT; k++) {
        toy_run before, after;
        dlm_sample_options o = {0};
        int kind = k % TOY_KINDS, row = k / TOY_KINDS % 3, own[TOY_SEQS];
        dlm_model *m = toy_model(ctx, kind, test_seed);
        memcpy(own, at[row], sizeof own);
        o.order = (dlm_order)(k / (6 * TOY_KINDS));
        o.temperature = (float)(k / (3 * TOY_KINDS) % 2);
        o.constrain = sampler_force_stop;
        o.constrain_user = own;
        o.stop = stop;
        o.n_stop = 2;
        LABEL("%s, order %d, row %d", toy_kind_names[kind], (int)o.order, row);
        toy_canvas(&before, kind == 4);
        before.canvas[4 * TOY_SLOTS + 2] = 9;          /* in a prompt: no stop */
        before.canvas[5 * TOY_SLOTS + 9] = 9;          /* fixed: no stop either */
        before.canvas[5 * TOY_SLOTS + 17] = 9;
        after = before;
        toy_generate(&after, ctx, m, 1, &o);
        sampler_check_stopped(&before, &after, own);
        dlm_model_free(m);
    }
    test_close(ctx);
}

typedef struct sampler_watch {
    dlm_event events[TOY_ALL];
    int       n;
} sampler_watch;

static void sampler_watch_step(void *user, const dlm_event *events, int n_events)
{
    sampler_watch *w = (sampler_watch *)user;
    for (int i = 0; i < n_events && w->n < TOY_ALL; i++) w->events[w->n++] = events[i];
}

TEST(sampler_step_callback_sees_the_trace)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int k = 0; k < TOY_KINDS * (int)DLM_ORDER_COUNT; k++) {
        toy_run r;
        sampler_watch w;
        dlm_sample_options o = {0};
        dlm_model *m = toy_model(ctx, k % TOY_KINDS, test_seed);
        o.order = (dlm_order)(k / TOY_KINDS);
        o.temperature = 1;
        w.n = 0;
        o.on_step = sampler_watch_step;
        o.step_user = &w;
        LABEL("%s, order %d", toy_kind_names[k % TOY_KINDS], (int)o.order);
        toy_canvas(&r, k % TOY_KINDS == 4);
        toy_generate(&r, ctx, m, 1, &o);
        CHECK(w.n == r.n_events);
        CHECK(memcmp(w.events, r.events, (size_t)w.n * sizeof w.events[0]) == 0);
        dlm_model_free(m);
    }
    test_close(ctx);
}

TEST(sampler_begin_resets_and_the_one_call_form_agrees)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int kind = 0; kind < TOY_KINDS; kind++) {
        toy_run a, b;
        int tokens[TOY_SLOTS];
        dlm_sample_options o = {0};
        dlm_model *m = toy_model(ctx, kind, test_seed);
        dlm_session *s = toy_session(ctx, m, 1);
        LABEL("%s", toy_kind_names[kind]);
        o.temperature = 1;
        toy_canvas(&a, kind == 4);
        b = a;
        if (s) {
            toy_drive(&a, s, &o);
            toy_canvas(&a, kind == 4);
            toy_sequence(&a, 0, 20, 3, 5);       /* leaves other keys behind */
            toy_drive(&a, s, &o);
            toy_canvas(&a, kind == 4);
            toy_drive(&a, s, &o);
        }
        memcpy(tokens, b.canvas, sizeof tokens);
        toy_generate(&b, ctx, m, 1, &o);
        CHECK(toy_same_tokens(&a, &b) && toy_same_events(&a, &b));
        CHECK_OK(dlm_sample(ctx, m, tokens, TOY_SLOTS, &o));
        CHECK(memcmp(tokens, b.canvas, sizeof tokens) == 0);
        dlm_session_free(s);
        dlm_model_free(m);
    }
    test_close(ctx);
}

/* A causal model may mark what is to be filled in with vocab, which is no token: then
   all tokens can be emitted. */
TEST(sampler_causal_mark_may_lie_outside_the_vocabulary)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    float bias[TOY_VOCAB] = { 0 };
    bias[TOY_VOCAB - 1] = 1000;
    for (int k = 0; k < 4; k++) {
        int tokens[TOY_SLOTS];
        dlm_sample_options o = {0};
        dlm_config c = toy_config(4);
        c.mask_id = TOY_VOCAB;
        dlm_model *m = toy_model_of(ctx, &c, test_seed);
        for (int i = 0; i < TOY_SLOTS; i++) tokens[i] = i % 7 ? TOY_VOCAB : 12;
        o.logit_bias = k & 1 ? bias : NULL;
        o.temperature = (float)(k >> 1);
        if (m) CHECK_OK(dlm_sample(ctx, m, tokens, TOY_SLOTS, &o));
        for (int i = 0; i < TOY_SLOTS; i++) {
            CHECK(tokens[i] >= 0 && tokens[i] < TOY_VOCAB);
            if (i % 7 == 0 || k & 1) CHECK(tokens[i] == 12);
        }
        dlm_model_free(m);
    }
    test_close(ctx);
}

/* One mask, at position 0: its token comes from row 0, as that of position 1 does. */
TEST(sampler_shifted_model_reads_row_0_for_position_0)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    naive_run *n = (naive_run *)test_malloc(sizeof *n);
    for (int kind = 1; kind < 4; kind += 2) {
        toy_run r;
        int canvas[TOY_SLOTS];
        dlm_sample_options o = {0};
        dlm_model *m = toy_model(ctx, kind, 17);
        n->m = m;
        n->s = toy_session(ctx, m, 0);
        n->canvas = canvas;
        n->T = 6;
        n->block = 4;
        n->offset = 0;
        memset(&r, 0, sizeof r);
        r.n_seqs = 1;
        toy_sequence(&r, 0, 6, 6, 3);
        r.canvas[0] = TOY_MASK;
        memcpy(canvas, r.canvas, sizeof canvas);
        toy_generate(&r, ctx, m, 1, &o);
        if (n->s) naive_forward(n);
        const float *row = n->logits;
        int best = 0;
        for (int v = 1; v < TOY_MASK; v++) if (row[v] > row[best]) best = v;
        LABEL("%s", toy_kind_names[kind]);
        CHECK(r.n_events == 1 && r.canvas[0] == best);
        dlm_session_free(n->s);
        dlm_model_free(m);
    }
    free(n);
    test_close(ctx);
}
/* Starting with one number out of place names it, and the canvas is left alone. */
static void sampler_try_begin(dlm_ctx *ctx, dlm_sampler *sm, const char *text, int seq,
                              int at, int token, int length, int n_seqs)
{
    toy_run r, kept;
    toy_canvas(&r, 1);
    if (seq >= 0 && at >= 0) r.canvas[seq * TOY_SLOTS + at] = token;
    if (seq >= 0) r.lengths[seq] = length;
    kept = r;
    LABEL("%s", text);
    CHECK_ERROR(dlm_sampler_begin(sm, r.canvas, r.lengths, n_seqs), DLM_E_INPUT, ctx,
                text);
    CHECK(toy_same_tokens(&r, &kept));
}

TEST(sampler_begin_refuses_bad_canvases)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int kind = 0; kind < TOY_KINDS; kind++) {
        toy_run r;
        dlm_sampler *sm = NULL;
        dlm_sample_options o = {0};
        dlm_model *m = toy_model(ctx, kind, 1);
        dlm_session *s = toy_session(ctx, m, 1);
        if (s) CHECK_OK(dlm_sampler_create(&sm, s, &o, NULL));
        if (sm) {
            sampler_try_begin(ctx, sm, "token", 0, 3, TOY_VOCAB, 24, TOY_SEQS);
            sampler_try_begin(ctx, sm, "token", 5, 17, -1, 18, TOY_SEQS);
            sampler_try_begin(ctx, sm, "token", 2, 8, 2147483647, 9, TOY_SEQS);
            sampler_try_begin(ctx, sm, "length", 1, -1, 0, 25, TOY_SEQS);
            sampler_try_begin(ctx, sm, "length", 1, -1, 0, -1, TOY_SEQS);
            sampler_try_begin(ctx, sm, "seq", -1, -1, 0, 0, TOY_SEQS + 1);
            sampler_try_begin(ctx, sm, "seq", -1, -1, 0, 0, -1);
            toy_canvas(&r, 0);                       /* sequence 1 has no prompt */
            CHECK_ERROR(dlm_sampler_begin(sm, r.canvas, r.lengths, TOY_SEQS),
                        kind == 4 ? DLM_E_INPUT : DLM_OK, ctx, NULL);
            toy_canvas(&r, 1);
            CHECK_OK(dlm_sampler_begin(sm, r.canvas, r.lengths, TOY_SEQS));
        }
        dlm_sampler_free(sm);
        dlm_session_free(s);
        dlm_model_free(m);
    }
    test_close(ctx);
}

static void sampler_try_options(dlm_ctx *ctx, dlm_session *s, const dlm_sample_options *o,
                                const char *text)
{
    dlm_sampler *sm = NULL;
    LABEL("%s", text);
    CHECK_ERROR(dlm_sampler_create(&sm, s, o, NULL), DLM_E_CONFIG, ctx, text);
    CHECK(sm == NULL);
    dlm_sampler_free(sm);
}

TEST(sampler_options_are_checked_by_name)
{
    static const int none[1] = { -1 }, high[1] = { TOY_VOCAB };
    static const int all[TOY_MASK] = { 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 };
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_model *m = toy_model(ctx, 2, 1);
    dlm_session *s = toy_session(ctx, m, 1);
    float bad[2 * TOY_VOCAB] = { -INFINITY };        /* which is allowed */
    bad[7] = (float)NAN;
    bad[12] = INFINITY;
    if (s) {
        dlm_sample_options o = {0}, zero = {0};
#define TRY(assignment, text) \
        do { o = zero; assignment; sampler_try_options(ctx, s, &o, text); } while (0)
        TRY(o.steps = -1, "steps");
        TRY(o.list_drawn = 2, "list_drawn");
        TRY((o.remask_below = 1, o.order = DLM_ORDER_RANDOM), "order random");
        TRY(o.block = -1, "block");
        TRY(memset(&o.order, 1, sizeof o.order), "order");
        TRY(memset(&o.order, 255, sizeof o.order), "order");
        TRY(o.threshold = -0.1f, "threshold");
        TRY(o.threshold = 1.5f, "threshold");
        TRY(o.threshold = NAN, "threshold");
        TRY(o.entropy_bound = -1, "entropy_bound");
        TRY(o.entropy_bound = NAN, "entropy_bound");
        TRY(o.temperature = -1, "temperature");
        TRY(o.temperature = NAN, "temperature");
        TRY(o.temperature = INFINITY, "temperature");
        TRY(o.top_k = -1, "top_k");
        TRY(o.top_p = -0.5f, "top_p");
        TRY(o.top_p = 1.5f, "top_p");
        TRY(o.top_p = NAN, "top_p");
        TRY(o.min_p = -0.5f, "min_p");
        TRY(o.min_p = 1.5f, "min_p");
        TRY(o.min_p = NAN, "min_p");
        TRY((o.suppress = none, o.n_suppress = 1), "suppress");
        TRY((o.suppress = high, o.n_suppress = 1), "suppress");
        TRY(o.n_suppress = 1, "suppress");
        TRY((o.suppress = all, o.n_suppress = -1), "suppress");
        TRY((o.stop = none, o.n_stop = 1), "stop");
        TRY((o.stop = high, o.n_stop = 1), "stop");
        TRY(o.n_stop = 1, "stop");
        TRY(o.logit_bias = bad, "logit_bias[7]: NaN");
        TRY(o.logit_bias = bad + 8, "logit_bias[4]: +infinity");
        TRY((o.stop = all, o.n_stop = -2), "stop");
#undef TRY
    }
    dlm_session_free(s);
    dlm_model_free(m);
    test_close(ctx);
}

/* Sets every logit to -INFINITY at position 6. */
static void sampler_forbid_6(void *user, int seq, int position, float *logits)
{
    (void)user;
    (void)seq;
    for (int v = 0; v < TOY_VOCAB && position == 6; v++) logits[v] = -INFINITY;
}

TEST(sampler_reports_when_nothing_is_allowed)
{
    static const int all[TOY_MASK] = { 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 };
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int k = 0; k < 4; k++) {
        toy_run r, kept;
        dlm_sample_options o = {0};
        dlm_model *m = toy_model(ctx, k % 2 ? 2 : 0, 1);
        dlm_session *s = toy_session(ctx, m, 1);
        if (k < 2) {
            o.suppress = all;
            o.n_suppress = TOY_MASK;
        } else {
            o.constrain = sampler_forbid_6;
        }
        toy_canvas(&r, 0);
        kept = r;
        if (s) toy_drive(&r, s, &o);
        CHECK_ERROR(r.error, DLM_E_INPUT, ctx, k < 2 ? "forbidden" : "position 6");
        CHECK(toy_same_tokens(&r, &kept));       /* the first step failed */
        dlm_session_free(s);
        dlm_model_free(m);
    }
    test_close(ctx);
}

/* Puts a value in place of one logit of one position. */
typedef struct sampler_fault {
    int   seq, position, at;               /* at -1: nowhere                       */
    float value;
} sampler_fault;

static void sampler_spoil(void *user, int seq, int position, float *logits)
{
    const sampler_fault *f = (const sampler_fault *)user;
    if (f->at >= 0 && seq == f->seq && position == f->position) logits[f->at] = f->value;
}

enum { FAULT_V = 600, FAULT_SEQS = 2, FAULT_T = 6,
       FAULT_CELLS = (int)FAULT_SEQS * (int)TOY_SLOTS };

/* Steps to the end of the run; the first step that fails must name the fault and leave
   the canvas alone, and does as if nothing had been once the fault is taken away. */
static void sampler_try_fault(dlm_ctx *ctx, dlm_sampler *sm, sampler_fault *f,
                              int *canvas)
{
    const int lengths[FAULT_SEQS] = { FAULT_T, FAULT_T };
    const size_t size = (size_t)FAULT_SEQS * (size_t)TOY_SLOTS;
    int kept[FAULT_CELLS], failed = f->at < 0;
    char where[64];
    snprintf(where, sizeof where, "sequence %d, position %d: the logit of token %d is ",
             f->seq, f->position, f->at);
    for (size_t i = 0; i < size; i++) canvas[i] = FAULT_V - 1;
    CHECK_OK(dlm_sampler_begin(sm, canvas, lengths, FAULT_SEQS));
    for (int step = 0; !dlm_sampler_done(sm) && step < 20; step++) {
        memcpy(kept, canvas, sizeof kept);
        dlm_error e = dlm_sampler_step(sm);
        if (e == DLM_OK) continue;
        CHECK(!failed);
        failed = 1;
        CHECK_ERROR(e, DLM_E_INPUT, ctx, where);
        CHECK(memcmp(kept, canvas, sizeof kept) == 0);
        CHECK(canvas[f->seq * TOY_SLOTS + f->position] == FAULT_V - 1);
        f->at = -1;
    }
    CHECK(failed && dlm_sampler_done(sm));
}

/* A sound run, then one for every place at which a logit can be bad: the ends of a
   vector, of a run of 512, a suppressed token, the mask. */
static void sampler_try_faults(dlm_ctx *ctx, dlm_session *s, dlm_sample_options o)
{
    static const int places[] = { 0, 1, 3, 15, 16, 17, 511, 512, FAULT_V - 2,
                                  FAULT_V - 1 };
    const float values[] = { (float)NAN, (float)-NAN, (float)INFINITY };
    int canvas[FAULT_CELLS], sound[FAULT_CELLS], n_sound, n;
    dlm_event events[FAULT_SEQS * FAULT_T];
    sampler_fault f = { 1, 4, -1, 0 };
    dlm_sampler *sm = NULL;
    o.constrain = sampler_spoil;
    o.constrain_user = &f;
    CHECK_OK(dlm_sampler_create(&sm, s, &o, NULL));
    sampler_try_fault(ctx, sm, &f, sound);
    memcpy(events, dlm_sampler_trace(sm, &n_sound), sizeof events);
    for (int i = 0; i < 10 * 3; i++) {
        f.at = places[i / 3];
        f.value = values[i % 3];
        LABEL("order %d, temperature %g, token %d is %g, %s", (int)o.order,
              (double)o.temperature, f.at, (double)f.value,
              dlm_isa_name(dlm_active_isa(ctx)));
        sampler_try_fault(ctx, sm, &f, canvas);
        CHECK(memcmp(canvas, sound, sizeof canvas) == 0);
        CHECK(memcmp(dlm_sampler_trace(sm, &n), events, sizeof events) == 0);
        CHECK(n == n_sound && n == FAULT_SEQS * FAULT_T);
    }
    dlm_sampler_free(sm);
}

TEST(sampler_refuses_logits_that_are_not_numbers)
{
    static const int suppressed = 16;
    FOR_EACH_ISA(isa) {
        dlm_ctx *ctx = test_open(isa, 1);
        dlm_model *m = toy_blank(ctx, FAULT_V);
        dlm_session *s = toy_session(ctx, m, 0);
        for (int k = 0; s && k < 2 * DLM_ORDER_COUNT; k++) {
            dlm_sample_options o = {0};
            o.order = (dlm_order)(k / 2);
            o.temperature = (float)(k % 2);
            o.suppress = &suppressed;
            o.n_suppress = 1;
            sampler_try_faults(ctx, s, o);
        }
        dlm_session_free(s);
        dlm_model_free(m);
        test_close(ctx);
    }
}

/* The fault stands in a row of the head, in a bias that is spoilt after it was given, or
   comes out of guidance, where both sides are infinite. */
TEST(sampler_refuses_bad_weights_biases_and_guidance)
{
    for (int k = 0; k < 3 * TOY_KINDS; k++) {
        toy_run r, kept;
        dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
        dlm_config c = toy_config(k % TOY_KINDS);
        float bias[TOY_VOCAB] = { 0 };
        dlm_sample_options o = {0};
        dlm_sampler *sm = NULL;
        c.untied_head = 1;
        dlm_model *m = toy_model_of(ctx, &c, 3);
        dlm_session *s = toy_session(ctx, m, 1);
        o.temperature = 1;
        o.logit_bias = bias;
        o.guidance = k / TOY_KINDS == 2 ? 1.0f : 0.0f;
        LABEL("%s, case %d", toy_kind_names[k % TOY_KINDS], k / TOY_KINDS);
        if (s) CHECK_OK(dlm_sampler_create(&sm, s, &o, NULL));
        for (int i = 0; m && i < dlm_model_tensors(m); i++) {
            dlm_tensor t;
            dlm_model_tensor(m, i, &t);
            if (strcmp(t.name, "lm_head.weight") != 0 || k / TOY_KINDS == 1) continue;
            for (int j = 0; j < t.cols; j++)         /* NaN; 0 and inf; c - u = NaN */
                t.data[5 * t.cols + j] = k / TOY_KINDS ? INFINITY : (float)NAN;
        }
        if (k / TOY_KINDS == 1) bias[5] = INFINITY;
        toy_canvas(&r, 1);
        r.n_seqs = TOY_SEQS / 2;
        kept = r;
        if (sm) {
            CHECK_OK(dlm_sampler_begin(sm, r.canvas, r.lengths, r.n_seqs));
            CHECK_ERROR(dlm_sampler_step(sm), DLM_E_INPUT, ctx, "the logit of token 5");
        }
        CHECK(toy_same_tokens(&r, &kept));
        dlm_sampler_free(sm); dlm_session_free(s); dlm_model_free(m);
        test_close(ctx);
    }
}

/* 1/T is infinite below 2.9e-39: the smallest temperatures are argmax all the same.  For
   ENTROPY_BOUND, whose entropies are then 0, where the bound takes the whole block. */
TEST(sampler_smallest_temperatures_are_argmax)
{
    static const float heats[] = { 1.4e-45f, 1e-40f, 2.9e-39f, 1e-37f, 1e-20f };
    FOR_EACH_ISA(isa) {
        dlm_ctx *ctx = test_open(isa, 1);
        for (int k = 0; k < TOY_KINDS * (int)DLM_ORDER_COUNT; k++) {
            dlm_model *m = toy_model(ctx, k % TOY_KINDS, 7);
            dlm_sample_options o = {0};
            toy_run want, got;
            o.order = (dlm_order)(k / TOY_KINDS);
            o.entropy_bound = 1e6f;
            toy_canvas(&want, 1);
            toy_generate(&want, ctx, m, 1, &o);
            for (int i = 0; i < 5; i++) {
                o.temperature = heats[i];
                LABEL("%s, order %d, temperature %g, %s", toy_kind_names[k % TOY_KINDS],
                      (int)o.order, (double)heats[i], dlm_isa_name((dlm_isa)isa));
                toy_canvas(&got, 1);
                toy_generate(&got, ctx, m, 1, &o);
                CHECK(toy_same_tokens(&got, &want));
                CHECK(o.order == DLM_ORDER_ENTROPY_BOUND || toy_same_events(&got, &want));
            }
            dlm_model_free(m);
        }
        test_close(ctx);
    }
}

/* A long canvas in a session of two rows: what the sampler keeps per mask must not run
   over what it was given for two (the sanitizers look). */
TEST(sampler_refuses_a_canvas_longer_than_its_rows)
{
    enum { LONG = 600 };
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_config c = toy_config(0);
    c.max_seq = LONG;
    dlm_model *m = toy_model_of(ctx, &c, 1);
    for (int order = 0; m && order < DLM_ORDER_COUNT; order++) {
        int canvas[LONG], length = LONG;
        dlm_limits lim = {0};
        dlm_session *s = NULL;
        dlm_sampler *sm = NULL;
        dlm_sample_options o = {0};
        o.order = (dlm_order)order;
        lim.rows = 2;
        for (int i = 0; i < LONG; i++) canvas[i] = TOY_MASK;
        LABEL("order %d", order);
        CHECK_OK(dlm_session_create(&s, ctx, m, &lim, NULL));
        if (s) CHECK_OK(dlm_sampler_create(&sm, s, &o, NULL));
        if (sm) {
            dlm_error e = dlm_sampler_begin(sm, canvas, &length, 1);
            if (!e) e = dlm_sampler_step(sm);
            CHECK_ERROR(e, DLM_E_INPUT, ctx, "row");
        }
        for (int i = 0; i < LONG; i++) CHECK(canvas[i] == TOY_MASK);
        dlm_sampler_free(sm);
        dlm_session_free(s);
    }
    dlm_model_free(m);
    test_close(ctx);
}

/* Rows and out rows for less than a step needs: an error, and nothing overwritten. */
TEST(sampler_refuses_a_session_too_small_for_a_step)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int k = 0; k < TOY_KINDS * (int)DLM_ORDER_COUNT * 2; k++) {
        toy_run r, kept;
        dlm_limits lim = {0};
        dlm_session *s = NULL;
        dlm_sample_options o = {0};
        int kind = k % TOY_KINDS;
        dlm_model *m = toy_model(ctx, kind, 1);
        o.order = (dlm_order)(k / TOY_KINDS % DLM_ORDER_COUNT);
        lim.seqs = TOY_SEQS;
        lim.rows = k < TOY_KINDS * (int)DLM_ORDER_COUNT ? 2 : 0;
        lim.out = lim.rows ? 0 : 1;
        lim.cached = 1;
        LABEL("%s, order %d, rows %d", toy_kind_names[kind], (int)o.order, lim.rows);
        toy_canvas(&r, 1);
        kept = r;
        if (m) CHECK_OK(dlm_session_create(&s, ctx, m, &lim, NULL));
        if (s) toy_drive(&r, s, &o);
        CHECK(r.error == DLM_E_INPUT);
        CHECK(toy_same_tokens(&r, &kept));
        dlm_session_free(s);
        dlm_model_free(m);
    }
    test_close(ctx);
}

/* --[ asking and answering ]-------------------------------------------------- */

enum { TAPE_STEPS = 4 * TOY_SLOTS };

/* The logits of a run, as they were before the sampler overwrote them. */
typedef struct sampler_tape {
    int    n, n_out[TAPE_STEPS], tokens[TAPE_STEPS];     /* rows; a sum of their tokens */
    float *logits[TAPE_STEPS];
} sampler_tape;

/* A fixed mixture of what a batch consists of. */
static int sampler_batch_sum(const dlm_batch *b)
{
    unsigned sum = (unsigned)b->n_out;
    for (int s = 0; s < b->n_seqs; s++)
        for (int i = b->start[s]; i < b->start[s + 1]; i++)
            sum = sum * 31 + (unsigned)(b->tokens[i] + 64 * b->slots[i] + b->lanes[s] +
                                        7 * b->keys[i].lo0 + 9 * b->keys[i].hi0);
    for (int i = 0; i < b->n_out; i++) sum = sum * 31 + (unsigned)b->out_rows[i];
    return (int)(sum & 0x7FFFFFFF);
}

/* Shows the rows of the tape's step to the sampler, the last row first. */
static void sampler_show(dlm_sampler *sm, const float *logits, int n_out)
{
    for (int i = n_out - 1; i >= 0; i--) {
        float x[TOY_VOCAB];
        memcpy(x, logits + i * TOY_VOCAB, sizeof x);
        dlm_sampler_score(sm, i, x);
    }
}

/* One step by hand: from the session to the tape, or, s NULL, from the tape. */
static dlm_error sampler_by_hand(dlm_sampler *sm, dlm_session *s, sampler_tape *t)
{
    dlm_batch b;
    dlm_error e = dlm_sampler_ask(sm, &b);
    const int k = t->n++;
    CHECK(t->n <= TAPE_STEPS);
    if (e || k >= TAPE_STEPS) return e ? e : DLM_E_INPUT;
    if (s) {
        t->n_out[k] = b.n_out;
        t->tokens[k] = sampler_batch_sum(&b);
        t->logits[k] = (float *)test_malloc((size_t)b.n_out * TOY_VOCAB * sizeof(float));
        e = dlm_logits(s, &b, t->logits[k]);
    }
    CHECK(b.n_out == t->n_out[k] && sampler_batch_sum(&b) == t->tokens[k]);
    if (!e) sampler_show(sm, t->logits[k], b.n_out);
    return e ? e : dlm_sampler_answer(sm);
}

static void sampler_run_by_hand(toy_run *r, dlm_sampler *sm, dlm_session *s,
                                sampler_tape *t)
{
    t->n = 0;
    CHECK_OK(dlm_sampler_begin(sm, r->canvas, r->lengths, r->n_seqs));
    while (!dlm_sampler_done(sm) && !r->error) r->error = sampler_by_hand(sm, s, t);
    CHECK_OK(r->error);
    const dlm_event *trace = dlm_sampler_trace(sm, &r->n_events);
    for (int i = 0; i < r->n_events && i < TOY_ALL; i++) r->events[i] = trace[i];
    dlm_sampler_cost(sm, &r->forwards, &r->flops);
}

/* A sampler of a model's sizes, as a network of someone else's would have it. */
static dlm_error sampler_of_sizes(dlm_sampler **sm, dlm_ctx *ctx, const dlm_config *c,
                                  const dlm_limits *lim, const dlm_sample_options *o)
{
    dlm_config sizes = {0};
    sizes.vocab = c->vocab; sizes.max_seq = c->max_seq; sizes.block = c->block;
    sizes.pattern = c->pattern; sizes.shifted = c->shifted;
    return dlm_sampler_create_for(sm, ctx, &sizes, lim, o, NULL);
}

static void sampler_try_by_hand(dlm_ctx *ctx, const dlm_model *m, int cached,
                                const dlm_sample_options *o)
{
    static sampler_tape t;
    toy_run step, hand, again;
    dlm_session *s = toy_session(ctx, m, cached);
    dlm_sampler *sm = NULL;
    dlm_limits lim = {0};
    toy_canvas(&step, m->config.pattern == DLM_PATTERN_CAUSAL);
    if (o->guidance > 0) step.n_seqs = TOY_SEQS / 2;
    hand = again = step;
    toy_drive(&step, s, o);
    CHECK_OK(step.error);
    CHECK_OK(dlm_sampler_create(&sm, s, o, NULL));
    sampler_run_by_hand(&hand, sm, s, &t);
    CHECK(toy_same_tokens(&step, &hand) && toy_same_events(&step, &hand));
    CHECK(step.forwards == hand.forwards && t.n == hand.forwards);
    CHECK_CLOSE(hand.flops, step.flops, 1e-9 * step.flops);
    dlm_sampler_free(sm); dlm_session_free(s);

    lim.seqs = TOY_SEQS; lim.cached = cached;
    CHECK_OK(sampler_of_sizes(&sm, ctx, &m->config, &lim, o));
    sampler_run_by_hand(&again, sm, NULL, &t);
    CHECK(toy_same_tokens(&step, &again) && toy_same_events(&step, &again));
    CHECK(again.forwards == step.forwards && again.flops == 0);
    dlm_sampler_free(sm);
    for (int k = 0; k < t.n; k++) free(t.logits[k]);
}

/* The same tokens and events from dlm_sampler_step, from the halves with a forward in
   between, and from the logits that this left, without any model. */
TEST(sampler_asked_and_answered_by_hand_is_the_step_and_its_tape_replays)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 2);
    for (int k = 0; k < TOY_KINDS * 8 * (int)DLM_ORDER_COUNT; k++) {
        dlm_sample_options o = {0};
        const int kind = k % TOY_KINDS, variant = k / TOY_KINDS % 8;
        dlm_model *m = toy_model(ctx, kind, 11);
        o.order = (dlm_order)(k / TOY_KINDS / 8);
        o.temperature = (float)(variant & 1);
        o.guidance = variant & 4 ? 1.5f : 0.0f;
        o.steps = variant & 2 ? 3 : 0;
        o.seed = test_seed;
        if (variant & 2 && o.order < DLM_ORDER_RANDOM) o.remask_below = 0.2f;
        LABEL("%s, order %d, variant %d", toy_kind_names[kind], (int)o.order, variant);
        if (m) sampler_try_by_hand(ctx, m, k & 1, &o);
        dlm_model_free(m);
    }
    test_close(ctx);
}

/* The timeline on top of section sampler. */
TEST(sampler_runs_the_rows_of_the_timeline)
{
    static const struct { int from, to, masks; } steps[] = {
        { 0, 7, 4 }, { 3, 7, 2 }, { 3, 11, 4 }, { 7, 11, 2 }, { 7, 15, 4 }, { 11, 15, 2 }
    };
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    const dlm_config c = toy_config(2);
    dlm_limits lim = {0};
    dlm_sample_options o = {0};
    dlm_sampler *sm = NULL;
    int canvas[TOY_SLOTS], length = 15;
    lim.cached = 1;
    o.steps = 2;
    for (int i = 0; i < length; i++) canvas[i] = i < 3 ? 1 : TOY_MASK;
    CHECK_OK(sampler_of_sizes(&sm, ctx, &c, &lim, &o));
    CHECK_OK(dlm_sampler_begin(sm, canvas, &length, 1));
    for (int k = 0; k < 6; k++) {
        dlm_batch b;
        LABEL("step %d", k + 1);
        CHECK_OK(dlm_sampler_ask(sm, &b));
        CHECK(b.n_seqs == 1 && b.n_out == steps[k].masks);
        CHECK(b.start[1] == steps[k].to - steps[k].from);
        for (int i = 0; i < b.start[1]; i++) CHECK(b.slots[i] == steps[k].from + i);
        for (int i = 0; i < b.n_out; i++) {
            float x[TOY_VOCAB] = { 0 };
            dlm_sampler_score(sm, i, x);
        }
        CHECK_OK(dlm_sampler_answer(sm));
    }
    CHECK(dlm_sampler_done(sm));
    dlm_sampler_free(sm);
    test_close(ctx);
}

TEST(sampler_of_sizes_says_what_it_cannot_do)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    const dlm_config good = toy_config(0);
    dlm_limits lim = {0};
    dlm_sample_options o = {0};
    dlm_sampler *sm = NULL;
    dlm_batch b;
    toy_run r, kept;
#define TRY(lhs, value, text) \
    do { dlm_config c = good; dlm_limits l = lim; dlm_sample_options how = o; \
         (void)c; (void)l; (void)how; lhs = value; sm = (dlm_sampler *)&c; \
         CHECK_ERROR(sampler_of_sizes(&sm, ctx, &c, &l, &how), DLM_E_CONFIG, ctx, text); \
         CHECK(sm == NULL); } while (0)
    TRY(c.vocab, 1, "vocab");
    TRY(c.max_seq, 0, "max_seq");
    TRY(c.pattern, (dlm_pattern)9, "pattern");
    TRY(c.block, -1, "block");
    TRY(l.seqs, -1, "limits.seqs");
    TRY(l.rows, -1, "limits.rows");
    TRY(how.steps, -1, "steps");
#undef TRY
    CHECK_OK(sampler_of_sizes(&sm, ctx, &good, &lim, &o));
    toy_canvas(&r, 0);
    kept = r;
    CHECK_ERROR(dlm_sampler_begin(sm, r.canvas, r.lengths, 2), DLM_E_INPUT, ctx, "room");
    CHECK_OK(dlm_sampler_begin(sm, r.canvas, r.lengths, 1));
    CHECK_ERROR(dlm_sampler_step(sm), DLM_E_INPUT, ctx, "no session");
    dlm_sampler_free(sm);
    for (int k = 0; k < 4; k++) {           /* 24 rows, 19 looked at; then twice that */
        lim.seqs = 2;
        lim.rows = k == 0 ? 23 : k == 1 ? 47 : 0;
        lim.out = k == 2 ? 18 : k == 3 ? 37 : 0;
        o.guidance = (float)(k & 1);
        LABEL("case %d", k);
        CHECK_OK(sampler_of_sizes(&sm, ctx, &good, &lim, &o));
        CHECK_OK(dlm_sampler_begin(sm, r.canvas, r.lengths, 1));
        CHECK_ERROR(dlm_sampler_ask(sm, &b), DLM_E_INPUT, ctx,
                    k == 0 ? "needs 24 rows, there is room for 23"
                    : k == 1 ? "needs 48 rows, there is room for 47"
                    : k == 2 ? "looks at 19 rows, there is room for 18"
                             : "looks at 38 rows, there is room for 37");
        CHECK_ERROR(dlm_sampler_answer(sm), DLM_E_INPUT, ctx, "nothing has been asked");
        dlm_sampler_free(sm);
    }
    CHECK(toy_same_tokens(&r, &kept));
    test_close(ctx);
}

/* One run in which every step fails first, in each way there is: nothing was asked, a row
   was not shown, a logit is no number.  It is the run that never failed. */
static void sampler_try_again(dlm_ctx *ctx, const dlm_config *c,
                              const dlm_sample_options *o, const sampler_tape *t,
                              const toy_run *want)
{
    dlm_sampler *sm = NULL;
    dlm_limits lim = {0};
    dlm_batch b;
    toy_run r;
    int k = 0;
    lim.seqs = TOY_SEQS;
    toy_canvas(&r, 0);
    if (o->guidance > 0) r.n_seqs = TOY_SEQS / 2;
    CHECK_OK(sampler_of_sizes(&sm, ctx, c, &lim, o));
    CHECK_OK(dlm_sampler_begin(sm, r.canvas, r.lengths, r.n_seqs));
    for (; !dlm_sampler_done(sm) && k < t->n; k++) {
        toy_run kept = r;
        float x[TOY_VOCAB] = { 0 };
        x[5] = (float)NAN;
        CHECK_ERROR(dlm_sampler_answer(sm), DLM_E_INPUT, ctx, "nothing has been asked");
        CHECK_OK(dlm_sampler_ask(sm, &b));
        sampler_show(sm, t->logits[k], b.n_out - 1);
        CHECK_ERROR(dlm_sampler_answer(sm), DLM_E_INPUT, ctx, "were not shown");
        CHECK_OK(dlm_sampler_ask(sm, &b));
        sampler_show(sm, t->logits[k], b.n_out);
        dlm_sampler_score(sm, 0, x);
        CHECK_ERROR(dlm_sampler_answer(sm), DLM_E_INPUT, ctx, "the logit of token 5");
        CHECK_ERROR(dlm_sampler_answer(sm), DLM_E_INPUT, ctx, "nothing has been asked");
        CHECK(toy_same_tokens(&r, &kept));
        CHECK_OK(dlm_sampler_ask(sm, &b));
        CHECK_OK(dlm_sampler_ask(sm, &b));
        CHECK(sampler_batch_sum(&b) == t->tokens[k]);
        sampler_show(sm, t->logits[k], b.n_out);
        CHECK_OK(dlm_sampler_answer(sm));
    }
    CHECK(dlm_sampler_done(sm) && k == t->n);
    CHECK_ERROR(dlm_sampler_ask(sm, &b), DLM_E_INPUT, ctx, "all is done");
    const dlm_event *trace = dlm_sampler_trace(sm, &r.n_events);
    for (int i = 0; i < r.n_events && i < TOY_ALL; i++) r.events[i] = trace[i];
    CHECK(toy_same_tokens(&r, want) && toy_same_events(&r, want));
    dlm_sampler_free(sm);
}

TEST(sampler_step_that_failed_can_be_asked_again)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int k = 0; k < 4 * DLM_ORDER_COUNT; k++) {
        static sampler_tape t;
        toy_run want;
        dlm_sample_options o = {0};
        dlm_model *m = toy_model(ctx, k % 4, 11);
        dlm_session *s = toy_session(ctx, m, 0);
        dlm_sampler *sm = NULL;
        o.order = (dlm_order)(k / 4);
        o.temperature = 0.5f;
        o.guidance = (float)(k / 4 % 2);
        LABEL("%s, order %d", toy_kind_names[k % 4], (int)o.order);
        toy_canvas(&want, 0);
        if (o.guidance > 0) want.n_seqs = TOY_SEQS / 2;
        CHECK_OK(dlm_sampler_create(&sm, s, &o, NULL));
        sampler_run_by_hand(&want, sm, s, &t);
        CHECK_OK(dlm_sampler_step(sm));                     /* done: nothing to do */
        sampler_try_again(ctx, &m->config, &o, &t, &want);
        for (int i = 0; i < t.n; i++) free(t.logits[i]);
        dlm_sampler_free(sm); dlm_session_free(s); dlm_model_free(m);
    }
    test_close(ctx);
}

/* --[ random numbers of one's own ]------------------------------------------- */

typedef struct sampler_dice {
    dlm_address asked[64 * TOY_ALL];
    int    n, fixed;                       /* fixed: `value` for tokens            */
    double value;
} sampler_dice;

static double sampler_throw(void *user, const dlm_address *at)
{
    sampler_dice *d = (sampler_dice *)user;
    if (d->n < 64 * TOY_ALL) d->asked[d->n++] = *at;
    return d->fixed && at->purpose == DLM_RANDOM_TOKEN ? d->value : dlm_uniform(at, 0);
}

/* Whether the documented table has this address, for the order and sequence. */
static int sampler_in_table(const dlm_address *at, const dlm_sample_options *o,
                            const toy_run *r, int seq, int last)
{
    const int p = (int)at->position, T = r->lengths[seq];
    if (at->seed != o->seed || at->step >= (uint32_t)last) return 0;
    if (at->purpose == DLM_RANDOM_ORDER && p == T)
        return o->order == DLM_ORDER_FIRST_HITTING;
    if (p >= T || r->canvas[seq * TOY_SLOTS + p] != TOY_MASK) return 0;
    if (at->purpose == DLM_RANDOM_TOKEN) return o->temperature > 0;
    if (at->purpose != DLM_RANDOM_ORDER) return 0;
    if (o->order == DLM_ORDER_ANCESTRAL) return at->step == 0;
    return o->order == DLM_ORDER_RANDOM || o->order == DLM_ORDER_FIRST_HITTING;
}

static void sampler_check_dice(const sampler_dice *d, const dlm_sample_options *o,
                               const toy_run *before, const toy_run *after)
{
    int tokens = 0, times = 0;
    for (int i = 0; i < d->n; i++) {
        const dlm_address *at = &d->asked[i];
        int seq = 0, last = 0;
        while (seq < TOY_SEQS && o->ids[seq] != at->row) seq++;
        CHECK(seq < TOY_SEQS);
        if (seq == TOY_SEQS) return;
        for (int k = 0; k < after->n_events; k++)
            if (after->events[k].seq == seq) last = after->events[k].step;
        CHECK(sampler_in_table(at, o, before, seq, last));
        tokens += at->purpose == DLM_RANDOM_TOKEN;
        times += at->purpose == DLM_RANDOM_ORDER
              && at->position == (uint32_t)before->lengths[seq];
    }
    if (o->temperature > 0) CHECK(tokens >= after->n_events);
    if (o->order == DLM_ORDER_FIRST_HITTING) CHECK(times == after->n_events);
    CHECK((d->n > 0) == (o->temperature > 0 || o->order == DLM_ORDER_RANDOM
                         || o->order >= DLM_ORDER_ANCESTRAL));
}

TEST(sampler_asks_for_the_random_numbers_that_are_documented)
{
    static const uint32_t ids[TOY_SEQS] = { 40, 7, 19, 3, 1u << 31, 5 };
    static sampler_dice d;
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int k = 0; k < 3 * 2 * DLM_ORDER_COUNT; k++) {
        toy_run before, want, got;
        dlm_sample_options o = {0};
        dlm_model *m = toy_model(ctx, k % 3 * 2, 11);
        o.order = (dlm_order)(k / 6);
        o.temperature = (float)(k / 3 % 2);
        o.seed = 0x123456789ABCull;
        o.ids = ids;
        LABEL("%s, order %d", toy_kind_names[k % 3 * 2], (int)o.order);
        toy_canvas(&before, k % 3 == 2);
        want = got = before;
        toy_generate(&want, ctx, m, 0, &o);
        d.n = d.fixed = 0;
        o.uniform = sampler_throw; o.uniform_user = &d;
        toy_generate(&got, ctx, m, 0, &o);
        CHECK(toy_same_tokens(&want, &got) && toy_same_events(&want, &got));
        sampler_check_dice(&d, &o, &before, &got);
        dlm_model_free(m);
    }
    test_close(ctx);
}

/* p descending as the position goes up, in steps that no rounding blurs. */
static double sampler_backwards(void *user, const dlm_address *at)
{
    (void)user;
    return at->position == 8 ? 0.5 : 1.0 - (at->position + 1) / 16.0;
}

/* Probabilities 1/8, 1/8, 1/4, 1/2: u says which; and numbers that fall to the right let
   the blind orders go from right to left. */
TEST(sampler_uses_the_random_numbers_that_it_is_given)
{
    static const float bias[5] = { 0, 0, 0.69314718f, 1.38629436f, 0 };
    static const struct { double u; int token; } draws[] = {
        { 0, 0 }, { 0.1249, 0 }, { 0.1251, 1 }, { 0.2499, 1 }, { 0.2501, 2 },
        { 0.4999, 2 }, { 0.5001, 3 }, { 0.999999, 3 },
    };
    static sampler_dice d;
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_model *m = toy_blank(ctx, 5);
    for (int k = 0; m && k < 8; k++) {
        int tokens[8] = { 4, 4, 4, 4, 4, 4, 4, 4 };
        dlm_sample_options o = {0};
        o.temperature = 1; o.logit_bias = bias;
        o.uniform = sampler_throw; o.uniform_user = &d;
        d.n = 0; d.fixed = 1; d.value = draws[k].u;
        CHECK_OK(dlm_sample(ctx, m, tokens, 8, &o));
        for (int i = 0; i < 8; i++) CHECK(tokens[i] == draws[k].token);
    }
    dlm_session *s = toy_session(ctx, m, 0);
    for (int order = DLM_ORDER_RANDOM; s && order < DLM_ORDER_COUNT; order++) {
        toy_run r;
        dlm_sample_options o = {0};
        double time = 1;
        memset(&r, 0, sizeof r);
        r.n_seqs = 1; r.lengths[0] = 8;
        for (int i = 0; i < 8; i++) r.canvas[i] = 4;
        o.order = (dlm_order)order; o.uniform = sampler_backwards; o.steps = 16;
        LABEL("order %d", order);
        toy_drive(&r, s, &o);
        CHECK(r.n_events == 8);
        for (int i = 0; i < 8; i++) {
            const dlm_event *e = &r.events[i];
            CHECK(e->position == (order == DLM_ORDER_SEQUENTIAL ? i : 7 - i));
            if (order == DLM_ORDER_FIRST_HITTING)
                CHECK_CLOSE(e->time, time *= pow(0.5, 1.0 / (8 - i)), 1e-6);
            if (order == DLM_ORDER_ANCESTRAL)     /* turns 8 .. 15 of 16           */
                CHECK_CLOSE(e->time, (7 - i) / 16.0, 1e-6);
        }
    }
    dlm_session_free(s);
    dlm_model_free(m);
    test_close(ctx);
}

/* --[ what was drawn ]-------------------------------------------------------- */

/* Events of one step of a sequence: those filled in, then the others by rank, which is
   their confidence here; together all masks the canvas had there.  Moves canvas on and
   returns how many there were. */
static int sampler_check_drawn(int *canvas, const dlm_event *e, int n, int a, int end)
{
    int k = 0, masks = 0, seq = e->seq;
    char named[TOY_SLOTS] = { 0 };
    for (int i = a; i < end; i++) masks += canvas[seq * TOY_SLOTS + i] == TOY_MASK;
    for (; k < n && e[k].seq == seq && e[k].step == e->step; k++) {
        CHECK(e[k].drawn_only == 0 || e[k].drawn_only == 1);
        CHECK(e[k].position >= a && e[k].position < end && !named[e[k].position]);
        CHECK(canvas[seq * TOY_SLOTS + e[k].position] == TOY_MASK);
        CHECK(e[k].token >= 0 && e[k].token < TOY_MASK && e[k].confidence > 0);
        if (k) CHECK(e[k].drawn_only >= e[k - 1].drawn_only);
        if (k) CHECK(e[k].confidence <= e[k - 1].confidence);
        CHECK(e[k].time >= 0 && e[k].time < 1);
        named[e[k].position] = 1;
    }
    CHECK(k == masks && !e->drawn_only);
    for (int i = 0; i < k; i++)
        if (!e[i].drawn_only) canvas[seq * TOY_SLOTS + e[i].position] = e[i].token;
    return k;
}

TEST(sampler_trace_can_list_what_was_drawn_and_not_filled_in)
{
    static dlm_event only[TOY_ALL];
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int k = 0; k < 4 * DLM_ORDER_COUNT; k++) {
        toy_run plain, r;
        dlm_sample_options o = {0};
        dlm_sampler *sm = NULL;
        dlm_model *m = toy_model(ctx, k % 4, 11);
        dlm_session *s = toy_session(ctx, m, 1);
        int canvas[TOY_ALL], n = 0, kept = 0, drawn = 0, steps[TOY_SLOTS];
        o.order = (dlm_order)(k / 4);
        o.temperature = 0.7f;
        LABEL("%s, order %d", toy_kind_names[k % 4], (int)o.order);
        toy_canvas(&plain, 0);
        r = plain;
        memcpy(canvas, r.canvas, sizeof canvas);
        toy_drive(&plain, s, &o);
        o.list_drawn = 1;
        CHECK_OK(dlm_sampler_create(&sm, s, &o, NULL));
        CHECK_OK(dlm_sampler_begin(sm, r.canvas, r.lengths, r.n_seqs));
        CHECK_OK(dlm_sampler_step(sm));
        dlm_sampler_steps(sm, 0, steps);            /* of what is filled in alone  */
        for (int i = 0; i < 24; i++)
            CHECK(steps[i] == (i >= 5 && r.canvas[i] != TOY_MASK));
        while (!dlm_sampler_done(sm)) CHECK_OK(dlm_sampler_step(sm));
        const dlm_event *e = dlm_sampler_trace(sm, &n);
        CHECK(toy_same_tokens(&plain, &r));
        for (int i = 0; i < n; i++) {
            drawn += e[i].drawn_only;
            if (!e[i].drawn_only && kept < TOY_ALL) only[kept++] = e[i];
        }
        CHECK(kept == plain.n_events
              && !memcmp(only, plain.events, (size_t)kept * sizeof only[0]));
        CHECK((drawn > 0) == (o.order < DLM_ORDER_RANDOM));
        if (o.order == DLM_ORDER_CONFIDENCE || o.order == DLM_ORDER_THRESHOLD)
            for (int i = 0; i < n; ) {
                const int T = r.lengths[e[i].seq], full = k % 4 < 2;
                const int P = e[i].seq == 1 ? 0 : e[i].seq == 0 ? 5 : e[i].seq == 3 ? 0
                            : e[i].seq == 4 ? 6 : 4;
                const int first = (e[i].position - P % 4) / 4 * 4 + P % 4;
                const int a = full || e[i].position < P % 4 ? 0 : first;
                const int end = full ? T : a == 0 && P % 4 ? P % 4 : a + 4;
                i += sampler_check_drawn(canvas, e + i, n - i, a, end < T ? end : T);
            }
        dlm_sampler_free(sm); dlm_session_free(s); dlm_model_free(m);
    }
    test_close(ctx);
}

/* The longest trace there is: one token a step, each taken back once. */
TEST(sampler_trace_of_all_draws_has_room_when_everything_is_taken_back)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int kind = 0; kind < 4; kind++) {
        dlm_sample_options o = {0};
        dlm_sampler *sm = NULL;
        dlm_model *m = toy_model(ctx, kind, 11);
        dlm_session *s = toy_session(ctx, m, 0);
        const int length = TOY_SLOTS, b = kind < 2 ? (int)TOY_SLOTS : 4;
        int canvas[TOY_SLOTS], n = 0, steps[TOY_SLOTS];
        o.remask_below = 1; o.list_drawn = 1; o.temperature = 1;
        for (int i = 0; i < TOY_SLOTS; i++) canvas[i] = TOY_MASK;
        LABEL("%s", toy_kind_names[kind]);
        CHECK_OK(dlm_sampler_create(&sm, s, &o, NULL));
        CHECK_OK(dlm_sampler_begin(sm, canvas, &length, 1));
        while (!dlm_sampler_done(sm)) CHECK_OK(dlm_sampler_step(sm));
        const dlm_event *e = dlm_sampler_trace(sm, &n);
        CHECK(n > TOY_SLOTS * b / 2 && n <= 2 * TOY_SLOTS * b);
        dlm_sampler_steps(sm, 0, steps);
        for (int i = 0; i < n; i++)
            if (!e[i].drawn_only && steps[e[i].position] == e[i].step)
                CHECK(canvas[e[i].position] == e[i].token);
        dlm_sampler_free(sm); dlm_session_free(s); dlm_model_free(m);
    }
    test_close(ctx);
}

/* ==[ objectives ]=========================================================== */

TEST(noise_levels_stay_in_range_and_spread)
{
    enum { ROWS = 64, STEPS = 300 };
    const double lo = 0.2, hi = 0.9;
    double sum[2] = {0};
    int count[2][16] = {{0}}, first[16] = {0}, within[16] = {0};
    for (uint32_t step = 0; step < STEPS; step++) {
        char taken[ROWS] = {0};
        for (int row = 0; row < ROWS; row++) {
            dlm_address at = { test_seed, DLM_RANDOM_LEVEL, step, 0, 0 };
            for (int stratified = 0; stratified < 2; stratified++) {
                double t = dlm__noise_level(&at, row, ROWS, stratified, lo, hi);
                double u = (t - lo) / (hi - lo);
                CHECK(t >= lo && t < hi);
                sum[stratified] += u / (ROWS * STEPS);
                count[stratified][(int)(u * 15.999999) & 15]++;
                if (!stratified) continue;
                taken[(int)(u * (int)ROWS) % ROWS]++;
                within[(int)(u * (int)ROWS * 16) % 16]++;
                if (row == 3) first[(int)(u * 15.999999) & 15]++;
            }
        }
        for (int i = 0; i < ROWS; i++) CHECK(taken[i] == 1);   /* one per stratum  */
    }
    CHECK_CLOSE(sum[0], 0.5, 5 * sqrt(1.0 / 12 / (ROWS * STEPS)));
    CHECK_CLOSE(sum[1], 0.5, 5 * sqrt(1.0 / 12 / (ROWS * STEPS)) / (int)ROWS);
    CHECK_CLOSE(test_chi_square(count[0], 16, ROWS * STEPS), 15, 6 * sqrt(30));
    CHECK_CLOSE(test_chi_square(within, 16, ROWS * STEPS), 15, 6 * sqrt(30));
    CHECK_CLOSE(test_chi_square(first, 16, STEPS), 15, 6 * sqrt(30));
}

TEST(stratified_noise_levels_of_every_row_are_uniform)
{
    enum { STEPS = 6000 };
    for (int n = 2; n <= 8; n += 3) {
        for (int row = 0; row < n; row++) {
            int count[8] = {0};
            for (uint32_t step = 0; step < STEPS; step++) {
                dlm_address at = { test_seed, DLM_RANDOM_LEVEL, step, 0, 0 };
                count[(int)(dlm__noise_level(&at, row, n, 1, 0, 1) * n) % 8]++;
            }
            LABEL("row %d of %d", row, n);
            CHECK_CLOSE(test_chi_square(count, n, STEPS), n - 1, 6 * sqrt(2.0 * (n - 1)));
        }
    }
}

/* At one level a fraction t of the response, weighed 1/t; more at a larger rate, never
   others; the same whatever stands beside it, but for its number in the step. */
TEST(states_mask_a_fraction_t_of_the_response)
{
    enum { T = 4000, FIRST = 500, N = T - FIRST };
    static int tokens[T];
    static unsigned char masked[N];
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_config c = toy_config(0);
    dlm_example e[2] = { { tokens, T, FIRST, 0, NULL },
                         { tokens, 1000, FIRST, 0, NULL } };
    dlm_state *s = NULL;
    c.max_seq = T;
    CHECK_OK(dlm_config_resolve(ctx, &c));
    CHECK_OK(dlm_state_create(&s, ctx, &c, DLM_OBJECTIVE_AUTO, 2 * T, 0, NULL));
    for (int k = 1; k <= 10; k++) {
        dlm_noise noise = {0};
        double t = 0.1 * k;
        int masks = 0;
        LABEL("t %g", t);
        noise.seed = test_seed; noise.step = (uint32_t)k; noise.lo = noise.hi = t;
        CHECK_OK(dlm_state_take(s, e, 2, 1));
        CHECK(s->n_examples == 2 && s->n_units == 2 && s->n_cells == N + 1000 - FIRST);
        dlm_state_noise(s, &noise);
        for (int i = 0; i < N; i++) {
            masks += s->masked[i];
            CHECK_CLOSE(s->weight[i], 1 / t, 1e-6 / t);
        }
        CHECK_CLOSE(masks, (int)N * t, 5 * sqrt((int)N * t * (1 - t)) + 1e-9);
        CHECK(t > 0.95 || memcmp(s->masked, s->masked + N, 1000 - FIRST) != 0);
        memcpy(masked, s->masked, N);
        dlm_state_mask(s, 0, t + 0.05);
        for (int i = 0; i < N; i++) CHECK(s->masked[i] || !masked[i]);
        noise.row = 1;
        CHECK_OK(dlm_state_take(s, e, 1, 1));
        dlm_state_noise(s, &noise);             /* as the second example was       */
        dlm_state_mask(s, 0, t);
        CHECK(t > 0.95 || memcmp(s->masked, masked, N) != 0);
        noise.row = 0;
        dlm_state_noise(s, &noise);
        CHECK(memcmp(s->masked, masked, N) == 0);
    }
    dlm_state_free(s);
    test_close(ctx);
}

TEST(largest_and_second_largest_logits_are_found_wherever_they_stand)
{
    enum { V = 1100 };                     /* two whole runs of the search and a rest */
    static float x[V];
    FOR_EACH_ISA(isa) {
        dlm_ctx *ctx = test_open(isa, 1);
        for (int at = 0; at < V; at += at < 3 || at > V - 40 ? 1 : 15) {
            const int second = (at + 1 + test_below(V - 1)) % V, last = V - 1;
            int argmax = -1;
            test_fill(x, V, 1.0f);
            x[at] = 3, x[second] = 2;
            LABEL("%d then %d, %s", at, second, dlm_isa_name((dlm_isa)isa));
            dlm_log_sum_exp(ctx, x, V, &argmax);
            CHECK(argmax == at);
            CHECK(dlm__runner_up(ctx->k, x, V, at) == 2);
            x[second] = 3;                           /* equal ones: the first      */
            dlm_log_sum_exp(ctx, x, V, &argmax);
            CHECK(argmax == (at < second ? at : second));
            CHECK(dlm__runner_up(ctx->k, x, V, argmax) == 3);
            if (at == last) continue;
            x[second] = 0, x[last] = 2;
            CHECK(dlm__runner_up(ctx->k, x, V, at) == 2);
        }
        test_close(ctx);
    }
}

TEST(cross_entropy_equals_double_on_every_isa)
{
    enum { MAX = 1000 };
    static const int sizes[] = { 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 65, 257, MAX };
    float logits[MAX];
    double x[MAX];
    FOR_EACH_ISA(isa) {
        dlm_ctx *ctx = test_open(isa, 1);
        for (int i = 0; i < 14 * 6; i++) {
            int V = sizes[i % 14], target = test_below(V), largest = 0, got = -1;
            float scale = i / 14 == 5 ? 300.0f : (float)(i / 14);
            test_fill(logits, (size_t)V, scale);
            if (V > 3 && i % 3 == 0) logits[(target + 1) % V] = -INFINITY;
            for (int j = 0; j < V; j++) x[j] = logits[j];
            for (int j = 0; j < V; j++) if (x[j] > x[largest]) largest = j;
            double lse = ref_log_sum_exp(x, V), weight = 2.5;
            LABEL("V %d, scale %g, %s", V, (double)scale, dlm_isa_name((dlm_isa)isa));
            CHECK_CLOSE(dlm_log_sum_exp(ctx, logits, V, &got), lse, 1e-6 * (1 + scale));
            CHECK_CLOSE(dlm_log_sum_exp(ctx, logits, V, NULL), lse, 1e-6 * (1 + scale));
            CHECK(logits[got] == logits[largest]);
            CHECK_CLOSE(dlm_cross_entropy(ctx, logits, V, target, weight),
                        lse - x[target], 1e-6 * (1 + scale));
            for (int j = 0; j < V; j++)
                CHECK_CLOSE(logits[j], weight * (exp(x[j] - lse) - (j == target)),
                            5e-7 * weight);
        }
        test_close(ctx);
    }
}

enum { SPOILT = 600 };

/* Logits of which some are -INFINITY, one is bad, and the uniform distribution. */
static void spoilt_fill(float *x, float *p, int at, float value)
{
    for (int v = 0; v < SPOILT; v++) x[v] = v < SPOILT - 40 ? 1.0f : -INFINITY;
    for (int v = 0; v < SPOILT; v++) p[v] = 1.0f / (float)SPOILT;
    x[at] = value;
}

static void spoilt_check(double value, const float *gradient)
{
    CHECK(value != value);
    for (int v = 0; v < SPOILT; v++) CHECK(gradient[v] != gradient[v]);
}

/* Wherever the bad logit stands, value and gradient tell: no ISA passes over it. */
TEST(losses_of_logits_that_are_not_numbers_are_not_numbers)
{
    const float values[] = { (float)NAN, (float)-NAN, (float)INFINITY };
    static float x[SPOILT], p[SPOILT];
    FOR_EACH_ISA(isa) {
        dlm_ctx *ctx = test_open(isa, 1);
        for (int i = 0; i < SPOILT * 3; i += i < 99 || i > (SPOILT - 20) * 3 ? 1 : 7) {
            const int at = i / 3, target = (at + 9) % (SPOILT - 40);
            const float value = values[i % 3];
            dlm_divergence_options o = {0};
            o.kind = (dlm_divergence_kind)(i % 4);
            o.sparse = i % 5 == 0 ? 7 : 0;
            o.temperature = i % 3 ? 0.0f : 1e-40f;
            LABEL("place %d, %g, %s", at, (double)value, dlm_isa_name((dlm_isa)isa));
            spoilt_fill(x, p, at, value);
            CHECK(!(fabs(dlm_log_sum_exp(ctx, x, SPOILT, NULL)) >= 0));
            spoilt_check(dlm_cross_entropy(ctx, x, SPOILT, target, 1), x);
            spoilt_fill(x, p, at, value);
            spoilt_check(dlm_divergence(ctx, x, p, SPOILT, 1, &o), x);
            spoilt_fill(x, p, at, value);                    /* now the teacher     */
            dlm_teacher_probs(ctx, x, SPOILT, &o);
            spoilt_check(dlm_divergence(ctx, p, x, SPOILT, 1, &o), p);
        }
        for (int v = 0; v < SPOILT; v++) x[v] = -INFINITY;
        CHECK(dlm_log_sum_exp(ctx, x, SPOILT, NULL) == -INFINITY);
        test_close(ctx);
    }
}

/* Measured over 12 million arguments in [-87.3, 88.3]: at most 7.9e-8 relative with
   fused multiply-adds, 1.02e-7 without; half a unit in the last place is 6.0e-8. */
#define EXP_BOUND 1.1e-7

TEST(exp_is_within_its_bound_of_libm_on_every_isa)
{
    enum { N = 1 << 17 };
    float *x = test_floats(N + 1), *y = test_floats(N + 1);
    for (int i = 0; i <= N; i++) x[i] = (float)(-87.0 + 175.0 * i / (int)N);
    FOR_EACH_ISA(isa) {
        dlm_ctx *ctx = test_open(isa, 1);
        double worst = 0;
        ctx->k->exp_scaled(y, x, N + 1, 0, 1);
        for (int i = 0; i <= N; i++) {
            double want = exp((double)x[i]), error = fabs(y[i] - want) / want;
            if (!(error <= worst)) worst = error;
        }
        LABEL("%s", dlm_isa_name((dlm_isa)isa));
        CHECK_CLOSE(worst, 0, EXP_BOUND);
        float far[21];
        for (int i = 0; i < 21; i++) far[i] = i == 20 ? 0.0f : -88.0f * (float)(1 << i);
        far[7] = -INFINITY;
        ctx->k->exp_scaled(y, far, 21, 0, 1);
        for (int i = 0; i < 20; i++) CHECK(y[i] == 0);
        CHECK(y[20] == 1);
        far[3] = (float)NAN;
        ctx->k->exp_scaled(y, far, 21, 0, 1);
        CHECK(y[3] != y[3]);
        test_close(ctx);
    }
    free(x); free(y);
}

/* Measured over 2^19 arguments in [-12, 12]: the value errs by 1.2e-7 of the argument,
   the slope by 2e-6, where it is a small difference of larger numbers. */
TEST(gelu_and_its_slope_are_those_of_double_on_every_isa)
{
    enum { N = 20000 };
    const double h = 1e-5;
    static const float far[] = { 1e30f, -1e30f, FLT_MAX, -FLT_MAX, 30, -30, 0, 1e-42f };
    float x[N], dy[N], y[N + 1], dx[N + 1];
    for (int i = 0; i < N; i++) x[i] = (float)(-12 + 24.0 * i / (int)N);
    for (int i = 0; i < 8; i++) x[i] = far[i];
    test_fill(dy, N, 1);
    FOR_EACH_ISA(isa) {
        dlm_ctx *ctx = test_open(isa, 1);
        for (int n = 1; n <= N; n += n < 70 ? 1 : N - 70) {
            y[n] = dx[n] = 777;
            ctx->k->gelu(y, x, n);
            ctx->k->gelu_backward(dx, dy, x, n);
            LABEL("%d, %s", n, dlm_isa_name((dlm_isa)isa));
            CHECK(y[n] == 777 && dx[n] == 777);
            for (int i = 0; i < n; i++) {
                double z = x[i], slope = z > 0;
                if (fabs(z) < 20) slope = (ref_gelu(z + h) - ref_gelu(z - h)) / (2 * h);
                CHECK_CLOSE(y[i], ref_gelu(z), 1.5e-7 * fabs(z));
                CHECK_CLOSE(dx[i], dy[i] * slope, 3e-6);
            }
        }
        x[3] = (float)NAN;
        ctx->k->gelu(y, x, 5);
        ctx->k->gelu_backward(dx, dy, x, 5);
        CHECK(y[3] != y[3] && dx[3] != dx[3]);
        x[3] = far[3];
        test_close(ctx);
    }
}

/* ==[ likelihood ]============================================================
   Exact bounds by enumeration: with n tokens masked in all possible ways,
     bound = - sum over the mask sets M, not empty, of  CE(M) / (|M| C(n, |M|))
   is what "l uniform in 1..n, a random M of size l, weight n / l" gives on average, and
   equally what t uniform in (0, 1), masks with probability t, weight 1 / t gives. */

enum { BOUND_P = 4, BOUND_R = 6, BOUND_V = 7 };

typedef struct bound_sums {
    double mean, square;                   /* of one draw of (l, M)                */
} bound_sums;

/* tokens [0, P) are given, [P, P + n) are to be predicted, all of them see each other,
   and masks up to P + shown.  In a shifted model row i - 1 predicts token i. */
static bound_sums bound_block(const reference *r, const int *tokens, int P, int n,
                              int shown)
{
    static test_batch t;
    bound_sums sums = {0};
    int V = r->c.vocab, shift = r->c.shifted;
    for (int set = 1; set < 1 << n; set++) {
        int size = 0;
        batch_clear(&t);
        batch_add(&t, P + shown, V, DLM_PATTERN_FULL, 0, 0);
        if (r->c.pattern == DLM_PATTERN_BLOCK)
            dlm_keys_fill(t.keys, P + shown, DLM_PATTERN_BLOCK, r->c.block,
                          P % r->c.block);
        for (int i = 0; i < P + shown; i++) {
            int masked = i >= P && i < P + n && (set >> (i - P) & 1);
            t.tokens[i] = masked || i >= P + n ? r->c.mask_id : tokens[i];
            size += masked;
        }
        const dlm_batch *b = batch_close(&t, 2);
        double *logits = ref_logits(r, b), nats = 0, ways = 1;
        for (int i = P; i < P + n; i++)
            if (set >> (i - P) & 1)
                nats -= ref_cross_entropy(logits + (i - shift) * V, V, tokens[i]);
        for (int i = 0; i < size; i++) ways = ways * (n - i) / (i + 1);
        double draw = nats * n / size, p = 1.0 / (n * ways);
        sums.mean += p * draw;
        sums.square += p * draw * draw;
        free(logits);
    }
    return sums;
}

static void bound_tokens(int *tokens, int n)
{
    for (int i = 0; i < n; i++) tokens[i] = test_below(BOUND_V - 1);
}

static dlm_model *bound_model(dlm_ctx *ctx, int pattern, int block, int shifted)
{
    dlm_config c = test_config(BOUND_V, 8, 1, 2, 16);
    c.pattern = (dlm_pattern)pattern; c.block = block; c.shifted = shifted; c.ffn = 12;
    return test_model(ctx, &c);
}

TEST(log_likelihood_expectation_is_the_exact_bound)
{
    enum { SAMPLES = 6000 };
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int shifted = 0; shifted < 2; shifted++) {
        for (int n = 1; n <= BOUND_R; n++) {
            int tokens[BOUND_P + BOUND_R];
            dlm_model *m = bound_model(ctx, DLM_PATTERN_FULL, 0, shifted);
            reference r;
            ref_open(&r, m);
            bound_tokens(tokens, BOUND_P + n);
            bound_sums want = bound_block(&r, tokens, BOUND_P, n, n);
            double sd = sqrt(fmax(0, want.square - want.mean * want.mean)), got = NAN;
            dlm_session *s = test_session(ctx, m, 4, 0, 0, 0);
            LABEL("n %d, shifted %d", n, shifted);
            CHECK_OK(dlm_log_likelihood(s, tokens, BOUND_P + n, BOUND_P, SAMPLES,
                                        test_seed, &got));
            CHECK_CLOSE(got, want.mean, 4.5 * sd / sqrt((double)SAMPLES) + 1e-4);
            dlm_session_free(s);
            ref_close(&r);
            dlm_model_free(m);
        }
    }
    test_close(ctx);
}

TEST(log_likelihood_of_blocks_is_the_sum_of_their_bounds)
{
    enum { SAMPLES = 6000, BLOCK = 3 };
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_model *m = bound_model(ctx, DLM_PATTERN_BLOCK, BLOCK, 0);
    reference r;
    ref_open(&r, m);
    for (int P = 0; P <= BOUND_P; P += 2) {
        for (int n = 2; n <= 8; n += 3) {
            int tokens[BOUND_P + 8];
            double mean = 0, variance = 0, got = NAN;
            bound_tokens(tokens, P + n);
            for (int at = 0; at < n; at += BLOCK) {
                int size = at + BLOCK > n ? n - at : BLOCK;
                bound_sums one = bound_block(&r, tokens, P + at, size, BLOCK);
                mean += one.mean;
                variance += one.square;
            }
            /* The masks of all blocks may be drawn together: then the draws are n / size
               times as large and size / n times as frequent. */
            variance *= (double)n;
            dlm_session *s = test_session(ctx, m, 2, 32, 0, 0);
            LABEL("P %d, n %d", P, n);
            CHECK_OK(dlm_log_likelihood(s, tokens, P + n, P, SAMPLES, test_seed, &got));
            CHECK_CLOSE(got, mean, 4.5 * sqrt(variance / (int)SAMPLES) + 1e-4);
            dlm_session_free(s);
        }
    }
    ref_close(&r);
    dlm_model_free(m);
    test_close(ctx);
}

TEST(log_likelihood_of_a_causal_model_is_exact)
{
    enum { T = 19 };
    static test_batch t;
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_config c = case_config(&model_grid[2], T);
    dlm_model *m = test_model(ctx, &c);
    reference r;
    ref_open(&r, m);
    batch_clear(&t);
    batch_add(&t, T, c.vocab - 1, DLM_PATTERN_CAUSAL, 0, 0);
    double *logits = ref_logits(&r, batch_close(&t, 2));
    for (int P = 1; P < T; P++) {
        double want = 0, got = NAN, again = NAN;
        for (int i = P; i < T; i++)
            want -= ref_cross_entropy(logits + (i - 1) * c.vocab, c.vocab, t.tokens[i]);
        dlm_session *s = test_session(ctx, m, 1, 0, 0, 0);
        LABEL("P %d", P);
        CHECK_OK(dlm_log_likelihood(s, t.tokens, T, P, 1, 1, &got));
        CHECK_OK(dlm_log_likelihood(s, t.tokens, T, P, 9, 2, &again));
        CHECK_CLOSE(got, want, 1e-4 * (1 + fabs(want)));
        CHECK(got == again);
        dlm_session_free(s);
    }
    free(logits);
    ref_close(&r);
    dlm_model_free(m);
    test_close(ctx);
}

/* --[ examples/scoring.h ]----------------------------------------------------  */

#include "examples/scoring.h"

/* log p of tokens[i] in double, given batch rows (T) that are looked at everywhere. */
static double score_gold(const reference *r, test_batch *t, int row, int token, int mask)
{
    const dlm_batch *b = batch_close(t, 2);
    double *logits = ref_logits(r, b), *x = logits + row * r->c.vocab, nats;
    if (mask >= 0) x[mask] = -INFINITY;
    nats = -ref_cross_entropy(x, r->c.vocab, token);
    free(logits);
    return nats;
}

static dlm_state *score_state(dlm_ctx *ctx, const dlm_model *m, int rows)
{
    dlm_state *x = NULL;
    CHECK_OK(dlm_state_create(&x, ctx, &m->config, DLM_OBJECTIVE_AUTO, rows, 1, NULL));
    if (!x) { printf("no state: %s\n", dlm_last_error(ctx)); exit(1); }
    return x;
}

static scoring score_with(dlm_session *s, dlm_state *x)
{
    scoring o;
    memset(&o, 0, sizeof o);
    o.session = s;
    o.state = x;
    return o;
}

/* Refused in these words, its own or the library's. */
static void score_refused(dlm_error e, const scoring *o, dlm_error want, const char *text)
{
    LABEL("%.70s: %.70s", text, o->why);
    if (*o->why) CHECK(e == want && strstr(o->why, text) != NULL);
    else CHECK_ERROR(e, want, test_ctx, text);
}

/* What the sampler would show: a canvas of the first i tokens and masks up to `end`, of
   which the blocks begin at `offset`. */
static double score_next(const reference *r, const int *tokens, int i, int end,
                         int offset, int exclude)
{
    static test_batch t;
    const dlm_config *c = &r->c;
    batch_clear(&t);
    batch_add(&t, end, c->vocab, (int)c->pattern, c->block, offset);
    for (int j = 0; j < end; j++) t.tokens[j] = j < i ? tokens[j] : c->mask_id;
    return score_gold(r, &t, i - c->shifted, tokens[i], exclude ? c->mask_id : -1);
}

/* Left to right through windows: every token of the response by a forward of its own in
   double, on the window it belongs to. */
static double score_windows(const reference *r, const int *tokens, int T, int P,
                            const scoring *o, int *count)
{
    const dlm_config *c = &r->c;
    const int block = c->pattern == DLM_PATTERN_BLOCK ? c->block : 1;
    const int most = o->window - c->shifted;         /* some token must be seen    */
    const int stride = o->stride < most ? o->stride : most;
    double nats = 0;
    *count = 0;
    for (int at = P, end, first; at < T; at = end) {
        end = T;
        if (T > o->window) {
            int n = at == P && P + stride < o->window ? o->window - P : stride;
            if (at + n / block * block < T) end = at + n / block * block;
        }
        first = end > o->window ? end - o->window : 0;
        for (int i = at; i < end; i++) {
            int stop = at - first + (i - at) / block * block + block;    /* its block */
            if (c->pattern == DLM_PATTERN_FULL) stop = end - first;
            if (c->pattern == DLM_PATTERN_CAUSAL) stop = i - first;
            if (stop > c->max_seq) stop = c->max_seq;
            if (i == 0 && c->shifted) continue;
            nats += score_next(r, tokens + first, i - first, stop, at - first,
                               o->exclude_mask);
            ++*count;
        }
    }
    return nats;
}

/* Every pattern, shifted or not; texts that fit and texts of several windows. */
TEST(score_left_to_right_is_the_sum_over_windows)
{
    static const int windows[4][2] = { { 16, 8 }, { 12, 6 }, { 9, 3 }, { 7, 9 } };
    enum { T = 31 };
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int k = 0; k < 5 * 4 * 2; k++) {
        int kind = k % 5, P = k / 20 * 3, tokens[T], length = k & 1 ? T : 9, count;
        scoring_result got = {0};
        dlm_model *m = bound_model(ctx, kind / 2, 3, kind & 1);    /* FULL is 1,
                                                                      CAUSAL 2     */
        dlm_session *s = test_session(ctx, m, 1, 32, 0, 0);
        dlm_state *x = score_state(ctx, m, 32);
        scoring o = score_with(s, x);
        reference r;
        ref_open(&r, m);
        o.window = windows[k / 5 % 4][0];
        o.stride = windows[k / 5 % 4][1];
        o.left_to_right = 1;
        o.exclude_mask = k / 5 & 1;
        bound_tokens(tokens, T);
        double want = score_windows(&r, tokens, length, P, &o, &count);
        LABEL("kind %d, P %d, T %d, window %d, stride %d", kind, P, length, o.window,
              o.stride);
        CHECK_OK(score_text(&o, tokens, length, P, 7, &got));
        CHECK_CLOSE(got.nats, want, 1e-4 * (1 + fabs(want)));
        CHECK(got.error == 0 && got.tokens == count);
        CHECK_CLOSE(got.bits_per_byte, -want / 7 / log(2.0), 1e-4 * (1 + fabs(want)));
        ref_close(&r);
        dlm_state_free(x); dlm_session_free(s); dlm_model_free(m);
    }
    test_close(ctx);
}

/* All texts there are: without the mask their probabilities sum to 1, with it to less. */
TEST(score_left_to_right_sums_to_one_over_all_texts)
{
    enum { R = 5, V = 4, P = 1 };
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int k = 0; k < 8; k++) {
        dlm_config c = test_config(V, 8, 1, 2, 8);
        double sum = 0;
        int texts = 1;
        c.pattern = k / 2 % 2 ? DLM_PATTERN_FULL : DLM_PATTERN_BLOCK;
        c.block = 2; c.shifted = k & 1; c.ffn = 12;
        dlm_model *m = test_model(ctx, &c);
        dlm_session *s = test_session(ctx, m, 1, 16, 0, 0);
        dlm_state *x = score_state(ctx, m, 16);
        scoring o = score_with(s, x);
        o.left_to_right = 1;
        o.exclude_mask = k < 4;
        for (int i = 0; i < R; i++) texts *= V - 1;
        for (int text = 0; text < texts; text++) {
            int tokens[P + R] = { 1 };
            scoring_result got = {0};
            for (int i = 0, rest = text; i < R; i++, rest /= V - 1)
                tokens[P + i] = rest % (V - 1);
            CHECK_OK(score_text(&o, tokens, P + R, P, 0, &got));
            sum += exp(got.nats);
        }
        LABEL("case %d", k);
        if (k < 4) CHECK_CLOSE(sum, 1, 1e-5);
        else CHECK(sum < 0.9);
        dlm_state_free(x); dlm_session_free(s); dlm_model_free(m);
    }
    test_close(ctx);
}

/* The sampler's own account of what it wrote, drawn token by token from the left. */
TEST(score_left_to_right_is_what_the_sampler_drew_with)
{
    enum { T = 22, P = 4 };
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int k = 0; k < 4; k++) {
        int canvas[T], n_events;
        double nats = 0;
        scoring_result got = {0};
        dlm_sample_options how = {0};
        dlm_sampler *sm = NULL;
        int lengths[1] = { T };
        dlm_config c = test_config(BOUND_V, 8, 1, 2, T);
        c.pattern = k / 2 ? DLM_PATTERN_FULL : DLM_PATTERN_BLOCK;
        c.block = 6; c.shifted = k & 1;
        dlm_model *m = test_model(ctx, &c);
        dlm_session *s = test_session(ctx, m, 1, T, 0, k < 2);
        dlm_session *own = test_session(ctx, m, 1, 2 * T, 0, 0);
        dlm_state *x = score_state(ctx, m, 2 * T);
        scoring o = score_with(own, x);
        o.left_to_right = o.exclude_mask = 1;
        how.order = DLM_ORDER_SEQUENTIAL;
        how.temperature = 1;
        for (int i = 0; i < T; i++) canvas[i] = i < P ? i : c.vocab - 1;
        CHECK_OK(dlm_sampler_create(&sm, s, &how, NULL));
        CHECK_OK(dlm_sampler_begin(sm, canvas, lengths, 1));
        while (!dlm_sampler_done(sm)) CHECK_OK(dlm_sampler_step(sm));
        const dlm_event *e = dlm_sampler_trace(sm, &n_events);
        for (int i = 0; i < n_events; i++) nats += log((double)e[i].confidence);
        LABEL("pattern %d, shifted %d", (int)c.pattern, k & 1);
        CHECK(n_events == T - P);
        CHECK_OK(score_text(&o, canvas, T, P, 0, &got));
        CHECK_CLOSE(got.nats, nats, 1e-4);
        dlm_sampler_free(sm); dlm_state_free(x);
        dlm_session_free(own); dlm_session_free(s); dlm_model_free(m);
    }
    test_close(ctx);
}

/* 600 estimates of the bound: they scatter as each of them says.  In windows, too. */
TEST(score_error_is_the_spread_of_repetitions)
{
    enum { REPEAT = 600, T = 25 };
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int k = 0; k < 6; k++) {
        int tokens[T], P = k & 1;
        double sum = 0, squares = 0, said = 0;
        scoring_result got = {0};
        dlm_model *m = bound_model(ctx, k < 3, 4, 0);              /* FULL is 1    */
        dlm_session *s = test_session(ctx, m, 1, 32, 0, 0);
        dlm_state *x = score_state(ctx, m, 32);
        scoring o = score_with(s, x);
        int length = k % 3 == 2 ? T : 12;                /* fits, or 3 windows     */
        bound_tokens(tokens, T);
        o.samples = k < 3 ? 48 : 16;
        o.window = 16;
        for (int i = 0; i < REPEAT; i++) {
            o.seed = test_bits();
            CHECK_OK(score_text(&o, tokens, length, P, 0, &got));
            sum += got.nats / (int)REPEAT;
            squares += got.nats * got.nats / (int)REPEAT;
            said += got.error * got.error / (int)REPEAT;
        }
        LABEL("case %d: spread %.4f, said %.4f", k, sqrt(squares - sum * sum),
              sqrt(said));
        CHECK_CLOSE(sqrt(said / (squares - sum * sum)), 1, 0.2);
        o.samples = 1;
        CHECK_OK(score_text(&o, tokens, length, P, 0, &got));
        CHECK(got.error > 1e300 && got.nats == got.nats);
        dlm_state_free(x); dlm_session_free(s); dlm_model_free(m);
    }
    test_close(ctx);
}

/* Two equal windows that see nothing of each other: with the same masks their estimates
   would be equal, too. */
TEST(score_windows_draw_masks_of_their_own)
{
    enum { T = 16 };
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int pattern = 0; pattern < 2; pattern++) {
        int tokens[T], equal = 0;
        scoring_result one = {0}, both = {0};
        dlm_model *m = bound_model(ctx, pattern, 8, 0);
        dlm_session *s = test_session(ctx, m, 1, T, 0, 0);
        dlm_state *x = score_state(ctx, m, T);
        scoring o = score_with(s, x);
        o.samples = 1;
        o.window = o.stride = 8;
        bound_tokens(tokens, 8);
        memcpy(tokens + 8, tokens, 8 * sizeof *tokens);
        for (o.seed = 0; o.seed < 9; o.seed++) {
            CHECK_OK(score_text(&o, tokens, 8, 0, 0, &one));
            CHECK_OK(score_text(&o, tokens, T, 0, 0, &both));
            CHECK(both.tokens == 2 * one.tokens);
            equal += both.nats == 2 * one.nats;
        }
        LABEL("pattern %d", pattern);
        CHECK(equal < 5);
        dlm_state_free(x); dlm_session_free(s); dlm_model_free(m);
    }
    test_close(ctx);
}

enum { CHOICES = 5 };

/* Some masked places of a canvas of T tokens, at random but rising, with candidates. */
static int choose_places(scoring_choice *choices, int *canvas, int T, const dlm_config *c,
                         int (*lists)[4], double (*p)[4], double (*among)[4])
{
    int n = 0, at = 0;
    for (int i = 0; i < T; i++) canvas[i] = test_below(c->vocab - 1);
    at = test_below(3) + (c->pattern == DLM_PATTERN_CAUSAL);
    for (; at < T && n < CHOICES; at += 1 + (at == 0) + test_below(6)) {
        scoring_choice *q = &choices[n];
        memset(q, 0, sizeof *q);
        q->position = at;
        q->n = 1 + test_below(4);
        for (int k = 0; k < q->n; k++) lists[n][k] = test_below(c->vocab);
        q->candidates = lists[n];
        q->p = p[n];
        q->among = among[n];
        canvas[at] = c->mask_id;
        n++;
    }
    return n;
}

/* One row in double against what the choice was told. */
static void choose_compare(const scoring_choice *q, double *logits, int V, int excluded)
{
    double sum = 0, most = -1;
    if (excluded >= 0) logits[excluded] = -INFINITY;
    for (int k = 0; k < q->n; k++)
        sum += exp(-ref_cross_entropy(logits, V, q->candidates[k]));
    for (int k = 0; k < q->n; k++) {
        double p = exp(-ref_cross_entropy(logits, V, q->candidates[k]));
        CHECK_CLOSE(q->p[k], p, 1e-4 * p);
        if (sum > 0) CHECK_CLOSE(q->among[k], p / sum, 1e-4);
        if (p > most) most = p;
    }
    CHECK_CLOSE(q->p[q->best], most, 1e-4 * most);
}

/* The whole canvas in double; blocks begin where the prompt ends, or at 0.  Token 0 of a
   shifted model comes from row 0. */
TEST(choose_gives_the_probabilities_of_one_forward)
{
    enum { T = 21 };
    static test_batch t;
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int k = 0; k < 60; k++) {
        int canvas[T], lists[CHOICES][4], prompt = 0;
        double p[CHOICES][4], among[CHOICES][4];
        scoring_choice choices[CHOICES];
        dlm_config c = test_config(11, 8, 2, 2, T);
        c.pattern = (dlm_pattern)(k % 3); c.block = 4; c.shifted = k / 3 & 1;
        dlm_model *m = test_model(ctx, &c);
        dlm_session *s = test_session(ctx, m, 1, T, 0, 0);
        dlm_state *x = score_state(ctx, m, T);
        scoring o = score_with(s, x);
        o.exclude_mask = k / 6 & 1;
        o.absolute_blocks = k / 12 & 1;
        reference r;
        ref_open(&r, m);
        int n = choose_places(choices, canvas, T, &m->config, lists, p, among);
        while (canvas[prompt] != m->config.mask_id) prompt++;
        batch_clear(&t);
        if (o.absolute_blocks) prompt = 0;
        batch_add(&t, T, c.vocab, (int)c.pattern, c.block, prompt);
        memcpy(t.tokens, canvas, sizeof canvas);
        const dlm_batch *b = batch_close(&t, 2);
        double *logits = ref_logits(&r, b);
        LABEL("pattern %d, shifted %d", (int)c.pattern, c.shifted);
        CHECK_OK(score_choices(&o, canvas, T, choices, n));
        for (int i = 0; i < n; i++)
            choose_compare(&choices[i], logits + 11 * (choices[i].position > 0
                           ? choices[i].position - r.c.shifted : 0), 11,
                           o.exclude_mask ? r.c.mask_id : -1);
        free(logits);
        ref_close(&r);
        dlm_state_free(x); dlm_session_free(s); dlm_model_free(m);
    }
    test_close(ctx);
}

/* Token 0 of a shifted model comes from row 0, as the sampler has it; a causal model
   whose mask is no token decides at the end of its canvas, and in the midst of a text. */
TEST(choose_takes_the_rows_that_the_sampler_takes)
{
    enum { T = 9, V = 11 };
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int k = 0; k < 3; k++) {
        int canvas[T], all[V], place = k == 0 ? 0 : k == 1 ? T - 1 : 5;
        double p[V], among[V];
        scoring_choice q = { place, V - (k == 0), -1, all, p, among };
        dlm_config c = test_config(V, 8, 1, 2, T);
        c.pattern = k ? DLM_PATTERN_CAUSAL : DLM_PATTERN_FULL;
        c.shifted = 1;
        c.mask_id = k ? V : V - 1;
        dlm_model *m = test_model(ctx, &c);
        dlm_session *s = test_session(ctx, m, 1, T - (k > 0), 0, 0);
        dlm_state *x = score_state(ctx, m, T);
        scoring o = score_with(s, x);
        for (int i = 0; i < V; i++) all[i] = i;
        for (int i = 0; i < T; i++) canvas[i] = i;
        if (k < 2) canvas[place] = m->config.mask_id;
        LABEL("case %d", k);
        CHECK_OK(score_choices(&o, canvas, T, &q, 1));
        canvas[place] = m->config.mask_id;
        CHECK_OK(dlm_sample(ctx, m, canvas, k ? place + 1 : T, NULL));
        CHECK(q.best == canvas[place]);
        dlm_state_free(x); dlm_session_free(s); dlm_model_free(m);
    }
    test_close(ctx);
}

TEST(scoring_names_what_it_cannot_take)
{
    enum { T = 8 };
    static const int yes_no[2] = { 3, 4 }, strange[2] = { 3, 11 };
    static const struct { int at, n, T, choices; const char *text; } wrong[] = {
        { 4, 2, T + 1, 1, "choices: 1 on a canvas of 9, there is room for 8" },
        { 4, 2, T, 0, "choices: 0 on" },
        { 4, 2, 1, 2, "choices: 2 on a canvas of 1" },
        { 2, 2, T, 2, "out_rows[1] = 2" },
        { 3, 2, T, 2, "choice 1: 2 candidates at 3, wants" },
        { T, 2, T, 2, "choice 1: 2 candidates at 8, wants" },
        { -1, 2, T, 2, "choice 1: 2 candidates at -1, wants" },
        { 4, 0, T, 2, "choice 1: 0 candidates at 4, wants" },
        { 4, -2, T, 2, "choice 1: candidates[1]: 11 is not in 0..10" } };
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    int canvas[T + 1] = { 1, 2, 10, 3, 10, 4, 10, 5, 1 }, text[T] = { 1, 2, 3, 10, 11 };
    double p[2], among[2];
    dlm_config c = test_config(11, 8, 1, 2, T);
    scoring_choice q[2] = { { 2, 2, 0, yes_no, p, among },
                            { 4, 2, 0, yes_no, p, among } };
    scoring_result score;
    c.pattern = DLM_PATTERN_FULL;
    dlm_model *m = test_model(ctx, &c);
    dlm_session *s = test_session(ctx, m, 1, 0, 0, 0);
    dlm_state *x = score_state(ctx, m, T);
    scoring o = score_with(s, x);
    CHECK_OK(score_choices(&o, canvas, T, q, 2));
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        q[1].position = wrong[i].at;
        q[1].n = abs(wrong[i].n);
        q[1].candidates = wrong[i].n < 0 ? strange : yes_no;
        score_refused(score_choices(&o, canvas, wrong[i].T, q, wrong[i].choices), &o,
                      DLM_E_INPUT, wrong[i].text);
    }
    score_refused(score_text(&o, text, 4, 0, 0, &score), &o, DLM_E_INPUT,
                  "text: token 10 at 3 is the mask");
    score_refused(score_text(&o, text + 4, 1, 0, 0, &score), &o, DLM_E_INPUT,
                  "text: token 11 at 0 is not in 0..10");
    score_refused(score_text(&o, text, 3, 4, 0, &score), &o, DLM_E_INPUT, "prompt 4");
    score_refused(score_text(&o, text, 3, -1, 0, &score), &o, DLM_E_INPUT, "prompt -1");
    CHECK_OK(score_text(&o, text, 3, 0, 0, &score));
    CHECK(*o.why == 0);
    dlm_state_free(x); dlm_session_free(s); dlm_model_free(m);
    test_close(ctx);
}

/* Of a causal model, which takes one forward a window, whatever is asked for. */
TEST(scoring_options_are_taken_in_their_range_and_refused_outside)
{
    static const char *const names[] = { "exclude_mask", "absolute_blocks",
                                         "left_to_right", "samples", "window", "stride" };
    static const int most[] = { 1, 1, 1, INT_MAX / 2, 1 << 20, 1 << 20 };
    static const int text[5] = { 1, 2, 3, 4, 5 };
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int which = 0; which < 6; which++) {
        dlm_config c = test_config(11, 8, 1, 2, 16);
        c.pattern = DLM_PATTERN_CAUSAL;
        dlm_model *m = test_model(ctx, &c);
        dlm_session *s = test_session(ctx, m, 1, 0, 0, 0);
        dlm_state *x = score_state(ctx, m, 16);
        const int values[] = { INT_MIN, INT_MIN + 1, -1, 0, 1, most[which],
                               most[which] + 1, INT_MAX - 1, INT_MAX };
        for (size_t i = 0; i < sizeof values / sizeof *values; i++) {
            scoring o = score_with(s, x);
            int *const fields[] = { &o.exclude_mask, &o.absolute_blocks, &o.left_to_right,
                                    &o.samples, &o.window, &o.stride };
            scoring_result score;
            *fields[which] = values[i];
            dlm_error e = score_text(&o, text, 5, 1, 0, &score);
            LABEL("%s = %d", names[which], values[i]);
            if (values[i] >= 0 && values[i] <= most[which]) CHECK_OK(e);
            else score_refused(e, &o, DLM_E_CONFIG, names[which]);
        }
        dlm_state_free(x); dlm_session_free(s); dlm_model_free(m);
    }
    test_close(ctx);
}

/* A head whose row 5 is NaN: no error, but no number either, whatever the target is. */
TEST(log_likelihood_of_bad_weights_is_not_a_number)
{
    FOR_EACH_ISA(isa) {
        dlm_ctx *ctx = test_open(isa, 1);
        for (int kind = 0; kind < TOY_KINDS; kind++) {
            static const int tokens[9] = { 1, 2, 3, 4, 6, 7, 8, 9, 10 };
            dlm_config c = toy_config(kind);
            double got = 0;
            c.untied_head = 1;
            dlm_model *m = toy_model_of(ctx, &c, 3);
            dlm_session *s = toy_session(ctx, m, 0);
            for (int i = 0; m && i < dlm_model_tensors(m); i++) {
                dlm_tensor t;
                dlm_model_tensor(m, i, &t);
                if (strcmp(t.name, "lm_head.weight") == 0)
                    t.data[5 * t.cols + 2] = (float)NAN;
            }
            LABEL("%s, %s", toy_kind_names[kind], dlm_isa_name((dlm_isa)isa));
            if (s) CHECK_OK(dlm_log_likelihood(s, tokens, 9, 2, 4, 1, &got));
            CHECK(got != got);
            dlm_session_free(s);
            dlm_model_free(m);
        }
        test_close(ctx);
    }
}

/* ==[ training ]============================================================= */

static dlm_trainer *test_trainer(dlm_ctx *ctx, dlm_model *m, const dlm_train_options *o)
{
    dlm_trainer *t = NULL;
    CHECK_OK(dlm_trainer_create(&t, ctx, m, o, NULL));
    if (!t) { printf("no trainer: %s\n", dlm_last_error(ctx)); exit(1); }
    return t;
}

/* Weighted cross-entropy in double, for dlm_trainer_pass and the gradient check. */
typedef struct ce_score {
    int     V;
    int    *target;                        /* (n_out)                              */
    double *weight, *loss;                 /* (n_out) loss: of the latest pass     */
    int     n_out;
} ce_score;

static void ce_open(ce_score *c, const dlm_batch *b, int V)
{
    c->V = V;
    c->n_out = b->n_out;
    c->target = test_ints((size_t)b->n_out);
    c->weight = ref_doubles((size_t)b->n_out);
    c->loss = ref_doubles((size_t)b->n_out);
    for (int i = 0; i < b->n_out; i++) {
        c->target[i] = test_below(V);
        c->weight[i] = 0.2 + test_uniform();
    }
}

static void ce_close(ce_score *c) { free(c->target); free(c->weight); free(c->loss); }

static void ce_apply(void *user, int i, float *logits)
{
    ce_score *c = (ce_score *)user;
    double largest = logits[0], sum = 0;
    for (int v = 1; v < c->V; v++) if (logits[v] > largest) largest = logits[v];
    for (int v = 0; v < c->V; v++) sum += exp(logits[v] - largest);
    c->loss[i] = c->weight[i] * (largest + log(sum) - logits[c->target[i]]);
    for (int v = 0; v < c->V; v++)
        logits[v] = (float)(c->weight[i] * (exp(logits[v] - largest) / sum -
                                            (v == c->target[i])));
}

static double ce_total(void *user)
{
    const ce_score *c = (const ce_score *)user;
    double sum = 0;
    for (int i = 0; i < c->n_out; i++) sum += c->loss[i];
    return sum;
}

static double ce_reference(const ce_score *c, const reference *r, const dlm_batch *b)
{
    double *logits = ref_logits(r, b), sum = 0;
    for (int i = 0; i < b->n_out; i++)
        sum += c->weight[i] * ref_cross_entropy(logits + i * c->V, c->V, c->target[i]);
    free(logits);
    return sum;
}

/* Finite differences: a few entries of every tensor, the one with the largest gradient
   among them, differentiated in double on the reference. */
enum { PROBES = 5, PROBES_MAX = PROBES * 64 };

typedef struct grad_probe {
    size_t index;                          /* in the weights                       */
    int    tensor;
    double numeric;
} grad_probe;

static float *grad_of_pass_in(dlm_ctx *ctx, dlm_model *m, const dlm_batch *b, ce_score *c,
                              dlm_dtype precision)
{
    dlm_train_options o = {0};
    o.max_rows = b->start[b->n_seqs];
    o.precision = precision;
    dlm_trainer *t = test_trainer(ctx, m, &o);
    float *grad = test_floats(m->n_params);
    CHECK_OK(dlm_trainer_pass(t, b, ce_apply, c));
    memcpy(grad, t->gradients, m->n_params * sizeof(float));
    dlm_trainer_free(t);
    return grad;
}

static float *grad_of_pass(dlm_ctx *ctx, dlm_model *m, const dlm_batch *b, ce_score *c)
{
    return grad_of_pass_in(ctx, m, b, c, DLM_F32);
}

static size_t grad_largest(const float *g, size_t n)
{
    size_t best = 0;
    for (size_t i = 0; i < n; i++) if (fabsf(g[i]) > fabsf(g[best])) best = i;
    return best;
}

static int grad_probe_all(grad_probe *probes, dlm_model *m, reference *r,
                          const dlm_batch *b, const ce_score *c, const float *grad)
{
    const double h = 1e-4;
    int n = 0;
    for (int i = 0; i < dlm_model_tensors(m); i++) {
        dlm_tensor t;
        dlm_model_tensor(m, i, &t);
        size_t first = (size_t)(t.data - m->weights);
        size_t size = (size_t)t.rows * (size_t)t.cols;
        for (int j = 0; j < PROBES; j++) {
            grad_probe *p = &probes[n++];
            p->tensor = i;
            p->index = first + (j == 0 ? grad_largest(grad + first, size)
                                       : (size_t)test_below((int)size));
            double *w = &r->w[p->index], kept = *w;
            *w = kept + h;
            double above = ce_reference(c, r, b);
            *w = kept - h;
            double below = ce_reference(c, r, b);
            *w = kept;
            p->numeric = (above - below) / (2 * h);
        }
    }
    return n;
}

static void grad_compare(const dlm_model *m, const grad_probe *probes, int n,
                         const float *grad, const char *what)
{
    for (int i = 0; i < n; i++) {
        dlm_tensor t;
        dlm_model_tensor(m, probes[i].tensor, &t);
        size_t first = (size_t)(t.data - m->weights);
        size_t size = (size_t)t.rows * (size_t)t.cols;
        double scale = 1e-3 * fabsf(grad[first + grad_largest(grad + first, size)]);
        double got = grad[probes[i].index], want = probes[i].numeric;
        if (fabs(got) > scale) scale = fabs(got);
        if (fabs(want) > scale) scale = fabs(want);
        LABEL("%s[%d], %s", t.name, (int)(probes[i].index - first), what);
        CHECK_CLOSE(got, want, 1e-3 * scale + 1e-9);
    }
    LABEL("%s", "");
}

static void grad_check_case(const model_case *g, int shape)
{
    static test_batch t;
    static grad_probe probes[PROBES_MAX];
    dlm_ctx *home = test_open(DLM_ISA_SCALAR, 1);
    dlm_config c = case_config(g, 160);
    dlm_model *m = test_model(home, &c);
    reference r;
    ce_score score;
    ref_open(&r, m);
    const dlm_batch *b = case_batch(&t, &m->config, shape);
    ce_open(&score, b, c.vocab);
    float *grad = grad_of_pass(home, m, b, &score);
    int n = grad_probe_all(probes, m, &r, b, &score, grad);
    FOR_EACH_ISA(isa) {
        char what[80];
        dlm_ctx *ctx = test_open(isa, 1 + isa % 2);
        float *got = grad_of_pass(ctx, m, b, &score);
        snprintf(what, sizeof what, "V %d C %d, batch %d, %s", c.vocab, c.dim, shape,
                 dlm_isa_name((dlm_isa)isa));
        grad_compare(m, probes, n, got, what);
        free(got);
        test_close(ctx);
    }
    free(grad);
    ce_close(&score);
    ref_close(&r);
    dlm_model_free(m);
    dlm_shutdown(home);
}

/* All eight combinations of QK-norm, bias and head, and the shapes of the grid (where a
   norm over one number has no gradient worth the name). */
TEST(gradients_match_finite_differences_of_the_reference)
{
    for (int i = 0; i < 8; i++) {
        model_case g = {
            11, 12, 2, 4, 2, 6, 20, 0, 0, 0, DLM_PATTERN_BLOCK, 4, 0, 50, 0, LLAMA };
        g.untied = i & 1; g.no_qk_norm = i >> 1 & 1; g.bias = i >> 2 & 1;
        grad_check_case(&g, i < 6 ? i % 3 : 5);
    }
    for (int i = 1; i < MODEL_CASES; i++)
        if (model_grid[i].dim > 1 && model_grid[i].dim < 64)
            grad_check_case(&model_grid[i], 1 + i % 2);
}

/* Long enough for several chunks of keys in the attention. */
TEST(gradients_of_long_sequences_match_finite_differences)
{
    static const model_case wide = {
        9, 10, 1, 2, 1, 12, 14, 0, 0, 1, DLM_PATTERN_FULL, 0, 0, 0, 0, LLAMA };
    static const model_case causal = {
        9, 8, 2, 2, 2, 4, 8, 0, 0, 0, DLM_PATTERN_CAUSAL, 0, 1, 0, 0, MDLM };
    grad_check_case(&wide, 6);
    grad_check_case(&causal, 5);
}

/* Against the f32 gradients, which the differences above have checked. */
TEST(gradients_in_bf16_are_those_of_f32_but_for_rounding)
{
    NEEDS_NARROW_WORDS();
    static test_batch t;
    FOR_EACH_ISA(isa) {
        dlm_ctx *ctx = test_open(isa, 1);
        for (int g = 0; g < MODEL_CASES; g++) {
            dlm_config c = case_config(&model_grid[g], 64);
            if (g >= 7 && !c.gelu_mlp) continue;
            dlm_model *m = test_model(ctx, &c);
            const dlm_batch *b = case_batch(&t, &c, 0);
            double along = 0, sizes[2] = { 0, 0 };
            ce_score score;
            ce_open(&score, b, c.vocab);
            float *want = grad_of_pass(ctx, m, b, &score);
            float *got = grad_of_pass_in(ctx, m, b, &score, DLM_BF16);
            for (size_t i = 0; i < m->n_params; i++) {
                along += (double)got[i] * want[i];
                sizes[0] += (double)got[i] * got[i];
                sizes[1] += (double)want[i] * want[i];
            }
            LABEL("case %d, %s", g, dlm_isa_name((dlm_isa)isa));
            CHECK(memcmp(got, want, m->n_params * sizeof(float)) != 0);
            CHECK_CLOSE(sqrt(sizes[0] / sizes[1]), 1, 0.02);
            CHECK_CLOSE(along / sqrt(sizes[0] * sizes[1]), 1, 0.001);
            free(want); free(got);
            ce_close(&score);
            dlm_model_free(m);
        }
        test_close(ctx);
    }
}

TEST(gradients_of_passes_add_up_until_the_update)
{
    static test_batch t;
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_config c = case_config(&model_grid[0], 64);
    dlm_model *m = test_model(ctx, &c);
    const dlm_batch *b = case_batch(&t, &m->config, 1);
    ce_score score;
    ce_open(&score, b, c.vocab);
    dlm_train_options o = {0};
    o.lr = 1e-30f;                         /* the update leaves the weights alone  */
    dlm_trainer *tr = test_trainer(ctx, m, &o);
    float *g = tr->gradients, *once = test_floats(m->n_params);
    for (int round = 0; round < 2; round++) {
        CHECK_OK(dlm_trainer_pass(tr, b, ce_apply, &score));
        if (round == 0) memcpy(once, g, m->n_params * sizeof(float));
        CHECK(memcmp(once, g, m->n_params * sizeof(float)) == 0);
        CHECK_OK(dlm_trainer_pass(tr, b, ce_apply, &score));
        double scale = fabsf(once[grad_largest(once, m->n_params)]);
        for (size_t i = 0; i < m->n_params; i++)
            CHECK_CLOSE(g[i], 2 * once[i], 1e-5 * scale);
        CHECK_OK(dlm_trainer_update(tr, NULL));
    }
    CHECK(tr->steps == 2);
    free(once);
    ce_close(&score);
    dlm_trainer_free(tr);
    dlm_trainer_free(NULL);
    dlm_model_free(m);
    test_close(ctx);
}

TEST(trainer_pass_refuses_bad_batches_by_name)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_model *m = toy_model(ctx, 0, 1);
    dlm_train_options o = {0};
    o.max_rows = 7;
    dlm_trainer *t = test_trainer(ctx, m, &o);
    for (int kind = 0; kind < 7; kind++) {
        static const char *const names[] = {
            "token", "position", "key", "out_rows", "start", "seq", "key" };
        batch_rig r;
        batch_make(&r);
        if (kind == 0) r.tokens[6] = m->config.vocab;
        if (kind == 1) r.positions[5] = m->config.max_seq;
        if (kind == 2) r.keys[5].hi0 = 4;              /* its sequence has 3 rows */
        if (kind == 3) r.out[2] = 7;
        if (kind == 4) r.start[2] = 8;                 /* more than max_rows      */
        if (kind == 5) r.b.n_seqs = -1;
        if (kind == 6) r.keys[0].hi0 = 0;
        LABEL("%s", names[kind]);
        CHECK_ERROR(dlm_trainer_pass(t, &r.b, batch_score, NULL), DLM_E_INPUT, ctx,
                    names[kind]);
        float *g = t->gradients;
        for (size_t i = 0; i < m->n_params; i++) CHECK(g[i] == 0);
    }
    dlm_trainer_free(t);
    dlm_model_free(m);
    test_close(ctx);
}

/* AdamW in double: what one update must do to weights, moments and average. */
typedef struct ref_adam {
    double *w, *m, *v, *ema;
    const dlm_train_options *o;
    int     step;
} ref_adam;

static void ref_adam_step(ref_adam *a, const float *g, size_t n, const char *decayed,
                          double lr, double *norm)
{
    double squares = 0, b1 = a->o->beta1, b2 = a->o->beta2, clip = a->o->clip;
    for (size_t i = 0; i < n; i++) squares += (double)g[i] * g[i];
    *norm = sqrt(squares);
    double shrink = *norm > clip ? clip / *norm : 1;
    a->step++;
    for (size_t i = 0; i < n; i++) {
        double gi = g[i] * shrink;
        a->m[i] = b1 * a->m[i] + (1 - b1) * gi;
        a->v[i] = b2 * a->v[i] + (1 - b2) * gi * gi;
        double mhat = a->m[i] / (1 - pow(b1, a->step));
        double vhat = a->v[i] / (1 - pow(b2, a->step));
        if (decayed[i]) a->w[i] -= lr * a->o->weight_decay * a->w[i];
        a->w[i] -= lr * mhat / (sqrt(vhat) + a->o->adam_eps);
        a->ema[i] = a->o->ema * a->ema[i] + (1 - a->o->ema) * a->w[i];
    }
}

static void adam_compare(dlm_ctx *ctx, dlm_model *m, const dlm_train_options *o)
{
    size_t n = m->n_params;
    dlm_trainer *t = test_trainer(ctx, m, o);
    ref_adam a = {0};
    a.w = ref_doubles(4 * n);
    memset(a.w, 0, 4 * n * sizeof(double));
    a.m = a.w + n; a.v = a.m + n; a.ema = a.v + n; a.o = o;
    for (size_t i = 0; i < n; i++) a.w[i] = a.ema[i] = m->weights[i];
    char *decayed = (char *)test_malloc(n);
    for (int i = 0; i < dlm_model_tensors(m); i++) {
        dlm_tensor x;
        dlm_model_tensor(m, i, &x);
        memset(decayed + (x.data - m->weights), x.cols > 1, (size_t)(x.rows * x.cols));
    }
    float *g = t->gradients, *random = test_floats(n);
    for (int step = 0; step < 4; step++) {
        double norm;
        dlm_report report;
        test_fill(random, n, step == 2 ? 1e-4f : 1);
        memcpy(g, random, n * sizeof(float));
        CHECK_OK(dlm_trainer_update(t, &report));
        ref_adam_step(&a, random, n, decayed, o->lr, &norm);
        CHECK_CLOSE(report.grad_norm, norm, 1e-6 * norm);
        CHECK_CLOSE(report.lr, o->lr, 1e-9);
        CHECK(report.step == step + 1);
        for (size_t i = 0; i < n; i++) {
            CHECK_CLOSE(m->weights[i], a.w[i], 2e-6);
            CHECK_CLOSE(t->ema[i], a.ema[i], 2e-6);
        }
    }
    free(random); free(decayed); free(a.w);
    dlm_trainer_free(t);
}

TEST(adamw_update_equals_double_reference_on_every_isa)
{
    FOR_EACH_ISA(isa) {
        for (int i = 0; i < 4; i++) {
            dlm_ctx *ctx = test_open(isa, 1);
            dlm_config c = case_config(&model_grid[5], 16);
            c.qkv_bias = 1;
            dlm_model *m = test_model(ctx, &c);
            dlm_train_options o = {0};
            o.lr = 0.02f; o.beta1 = 0.8f; o.beta2 = 0.95f; o.adam_eps = 1e-5f;
            o.clip = i & 1 ? 0.5f : INFINITY;
            o.weight_decay = i & 2 ? 0.3f : 0;
            o.ema = 0.7f;
            LABEL("clip %g, decay %g, %s", (double)o.clip, (double)o.weight_decay,
                  dlm_isa_name((dlm_isa)isa));
            adam_compare(ctx, m, &o);
            dlm_model_free(m);
            test_close(ctx);
        }
    }
}

/* A model, its trainer, and room for all that an update may change. */
typedef struct update_rig {
    dlm_ctx     *ctx;
    dlm_model   *m;
    dlm_trainer *t;
    size_t       n;
    float       *before;                   /* (4 n) as update_keep leaves them     */
} update_rig;

static void update_open(update_rig *r, int isa, int threads, dlm_train_options o)
{
    dlm_config c = case_config(&model_grid[6], 16);
    r->ctx = test_open(isa, threads);
    r->m = test_model(r->ctx, &c);
    o.ema = 0.9f;
    r->t = test_trainer(r->ctx, r->m, &o);
    r->n = r->m->n_params;
    r->before = test_floats(4 * r->n);
}

static void update_close(update_rig *r)
{
    free(r->before);
    dlm_trainer_free(r->t);
    dlm_model_free(r->m);
    test_close(r->ctx);
}

static float *update_array(const update_rig *r, int which)
{
    return which == 0 ? r->m->weights : which == 1 ? r->t->adam_m
         : which == 2 ? r->t->adam_v : r->t->ema;
}

static void update_keep(update_rig *r)
{
    for (int i = 0; i < 4; i++)
        memcpy(r->before + (size_t)i * r->n, update_array(r, i), r->n * sizeof(float));
}

static int update_changed(const update_rig *r)
{
    for (int i = 0; i < 4; i++)
        if (memcmp(r->before + (size_t)i * r->n, update_array(r, i),
                   r->n * sizeof(float))) return 1;
    return 0;
}

/* Also of gradients whose squares f32 cannot hold, alone or among ordinary ones, and an
   update with them moves no weight by more than Adam may. */
TEST(gradient_norm_is_right_for_all_finite_gradients_on_every_isa)
{
    static const float sizes[] = { 1, 1e20f, 3e38f, 1e-25f, 1e-20f, 1e-44f, 0 };
    FOR_EACH_ISA(isa)
        for (int k = 0; k < 7 * 2 * 2; k++) {
            update_rig r;
            dlm_train_options o = {0};
            dlm_report report[2];
            double squares = 0;
            const uint64_t kept = test_state;
            const float size = sizes[k % 7], other = k / 7 % 2 ? size : 1.0f;
            if (k >= 14) o.clip = INFINITY;
            LABEL("%g and %g, %s", (double)size, (double)other,
                  dlm_isa_name((dlm_isa)isa));
            for (int threads = 1; threads <= 2; threads++) {
                test_state = kept;
                update_open(&r, isa, threads, o);
                update_keep(&r);
                float *g = r.t->gradients, most = 0;
                squares = 0;
                for (size_t i = 0; i < r.n; i++) {
                    g[i] = (i % 3 ? size : other) * test_float();
                    squares += (double)g[i] * (double)g[i];
                }
                CHECK_OK(dlm_trainer_update(r.t, &report[threads - 1]));
                for (size_t i = 0; i < r.n; i++) {
                    float by = fabsf(r.m->weights[i] - r.before[i]);
                    if (!(by <= most)) most = by;
                }
                CHECK(most <= 1.001e-3f);
                update_close(&r);
            }
            CHECK(report[0].grad_norm == report[1].grad_norm);
            CHECK_CLOSE(report[0].grad_norm, sqrt(squares), 1e-6 * sqrt(squares));
        }
}

/* Of a damaged state, say: none of it may reach the weights. */
TEST(update_reports_unsound_moments_and_changes_nothing)
{
    const struct { int array; float value; } bad[] = {
        { 1, (float)NAN }, { 1, INFINITY }, { 1, -INFINITY }, { 2, (float)NAN },
        { 2, INFINITY }, { 2, -INFINITY }, { 2, -1.0f }, { 2, -1e-45f } };
    FOR_EACH_ISA(isa)
        for (int k = 0; k < 8; k++)
            for (int place = 0; place < 3; place++) {
                update_rig r;
                dlm_report report;
                dlm_train_options o = {0};
                update_open(&r, isa, 1, o);
                float *g = r.t->gradients;
                for (int step = 0; step < 2; step++) {
                    test_fill(g, r.n, 1.0f);
                    CHECK_OK(dlm_trainer_update(r.t, &report));
                    CHECK(report.grad_norm > 0 && report.grad_norm < 1e6);
                }
                float *one = update_array(&r, bad[k].array)
                           + (place == 0 ? 0 : place == 1 ? r.n / 2 : r.n - 1);
                const float was = *one;
                *one = bad[k].value;
                update_keep(&r);
                test_fill(g, r.n, 1.0f);
                LABEL("case %d, place %d, %s", k, place, dlm_isa_name((dlm_isa)isa));
                CHECK_OK(dlm_trainer_update(r.t, &report));
                CHECK(report.grad_norm - report.grad_norm != 0 && report.step == 3);
                CHECK(!update_changed(&r));
                for (size_t i = 0; i < r.n; i++) CHECK(g[i] == 0);
                *one = was;
                test_fill(g, r.n, 1.0f);
                CHECK_OK(dlm_trainer_update(r.t, &report));
                CHECK(report.grad_norm > 0 && report.grad_norm < 1e6);
                CHECK(update_changed(&r));
                update_close(&r);
            }
}

/* Left without gradients, moments, decayed weights and their average shrink to 0 and not
   to the denormals that round to themselves; the same on every ISA. */
TEST(updates_leave_no_denormals_behind)
{
    FOR_EACH_ISA(isa) {
        update_rig r;
        dlm_train_options o = {0};
        int denormal = 0, zeros = 0;
        o.lr = 0.01f; o.weight_decay = 20;
        update_open(&r, isa, 1, o);
        for (int i = 1; i < 3; i++)
            for (size_t j = 0; j < r.n; j++)
                update_array(&r, i)[j] = j % 2 ? 1e-41f : 1e-37f;
        LABEL("%s", dlm_isa_name((dlm_isa)isa));
        CHECK_OK(dlm_trainer_update(r.t, NULL));
        for (size_t j = 1; j < r.n; j += 2)
            CHECK(r.t->adam_m[j] == 0 && r.t->adam_v[j] == 0);
        while (r.t->steps < 1025) CHECK_OK(dlm_trainer_update(r.t, NULL));
        for (int i = 0; i < 4; i++)
            for (size_t j = 0; j < r.n; j++) {
                const float x = fabsf(update_array(&r, i)[j]);
                denormal += x > 0 && x < 1.17549435e-38f;
                zeros += x == 0;
            }
        CHECK(denormal == 0);
        CHECK(zeros > (int)(3 * r.n));
        update_close(&r);
    }
}

/* lr of update `step` (1-based): the first reaches lr / warmup, the one after the
   warm-up has all of lr, and lr_min would be that of update total + 1. */
static double schedule_lr(const dlm_train_options *o, int step)
{
    if (step <= o->warmup) return (double)o->lr * step / o->warmup;
    double x = (double)(step - 1 - o->warmup) / (o->total - o->warmup);
    if (o->schedule == DLM_SCHEDULE_CONSTANT) return o->lr;
    if (x > 1) x = 1;
    double wave = 0.5 + 0.5 * cos(3.14159265358979 * x);
    double fall = o->schedule == DLM_SCHEDULE_LINEAR ? 1 - x : wave;
    return o->lr_min + ((double)o->lr - o->lr_min) * fall;
}

TEST(schedules_warm_up_and_fall_as_documented)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_config c = case_config(&model_grid[8], 16);
    for (int schedule = 0; schedule < 3; schedule++) {
        for (int warmup = 0; warmup < 6; warmup += 5) {
            dlm_model *m = test_model(ctx, &c);
            dlm_train_options o = {0};
            o.lr = 0.5f; o.lr_min = 0.125f; o.warmup = warmup; o.total = 25;
            o.schedule = (dlm_schedule)schedule;
            dlm_trainer *t = test_trainer(ctx, m, &o);
            for (int step = 1; step <= 30; step++) {
                dlm_report report;
                CHECK_OK(dlm_trainer_update(t, &report));
                LABEL("schedule %d, warm-up %d, step %d", schedule, warmup, step);
                CHECK_CLOSE(report.lr, schedule_lr(&o, step), 1e-6);
            }
            CHECK(t->ema == NULL);
            dlm_trainer_free(t);
            dlm_model_free(m);
        }
    }
    test_close(ctx);
}

/* ==[ by hand ]===============================================================
   The program to be read first, in double and without a line of dlm.h, against dlm.h on
   the same weights.  Its sizes are macros; they end here. */

#define BY_HAND_NO_MAIN
#include "examples/00_by_hand.c"

enum { HAND_T = T, HAND_P = P, HAND_V = V, HAND_MASK = MASK };

static dlm_config hand_config(void)
{
    dlm_config c = test_config(V, C, L, H, T);
    c.ffn = F;
    c.mask_id = MASK;
    c.pattern = DLM_PATTERN_FULL;
    c.rope_theta = 10;
    return c;
}

#undef T
#undef P
#undef C
#undef H
#undef D
#undef F
#undef V
#undef L
#undef MASK

static num *hand_flat(void) { return (num *)&net.w; }

/* A random model with whose weights the program goes on, its gradients zero. */
static dlm_model *hand_model(dlm_ctx *ctx)
{
    dlm_config c = hand_config();
    dlm_model *m = test_model(ctx, &c);
    CHECK(m->n_params == HAND_WEIGHTS);
    for (int i = 0; i < HAND_WEIGHTS; i++) {
        hand_flat()[i].v = (double)m->weights[i];
        hand_flat()[i].d = 0;
    }
    srand((unsigned)test_below(1 << 30));
    return m;
}

/* A text that holds no mask. */
static void hand_text(char *text)
{
    for (int i = 0; i < HAND_T; i++) {
        int token = test_below(HAND_V - 1);
        text[i] = (char)(token + (token >= HAND_MASK));
    }
}

/* The program's canvas as a batch that looks at its masks, or at all rows. */
static const dlm_batch *hand_batch(test_batch *t, int all)
{
    batch_clear(t);
    batch_add(t, HAND_T, HAND_V, DLM_PATTERN_FULL, 0, 0);
    memcpy(t->tokens, net.canvas, sizeof net.canvas);
    batch_close(t, 1);
    t->b.n_out = 0;
    for (int i = 0; i < HAND_T; i++)
        if (all || net.canvas[i] == HAND_MASK) t->out_rows[t->b.n_out++] = i;
    return &t->b;
}

TEST(by_hand_logits_equal_those_of_dlm_on_every_isa)
{
    static test_batch t;
    FOR_EACH_ISA(isa) {
        dlm_ctx *ctx = test_open(isa, 1);
        dlm_model *m = hand_model(ctx);
        for (int i = 0; i < HAND_T; i++) net.canvas[i] = test_below(HAND_V);
        forward();
        float *got = test_logits(ctx, m, hand_batch(&t, 1), 0);
        LABEL("%s", dlm_isa_name((dlm_isa)isa));
        for (int i = 0; i < HAND_T * HAND_V; i++)
            CHECK_CLOSE(got[i], net.a.logits[i].v, 1e-4);
        free(got);
        dlm_model_free(m);
        test_close(ctx);
    }
}

/* CE / t over the masked tokens, and its gradient, 1e-4 of each tensor's largest. */
static void hand_compare_gradient(dlm_ctx *ctx, dlm_model *m, double level)
{
    static test_batch t;
    char text[HAND_T];
    ce_score score;
    hand_text(text);
    double loss = learn(text, level, 0.25);
    const dlm_batch *b = hand_batch(&t, 0);
    ce_open(&score, b, HAND_V);
    for (int i = 0; i < b->n_out; i++) {
        score.target[i] = text[b->out_rows[i]];
        score.weight[i] = 0.25 / level;
    }
    float *grad = grad_of_pass(ctx, m, b, &score);
    CHECK_CLOSE(loss, ce_total(&score), 1e-4 * loss);
    for (int k = 0; k < dlm_model_tensors(m); k++) {
        dlm_tensor tensor;
        dlm_model_tensor(m, k, &tensor);
        size_t first = (size_t)(tensor.data - m->weights);
        size_t n = (size_t)tensor.rows * (size_t)tensor.cols;
        double largest = fabsf(grad[first + grad_largest(grad + first, n)]);
        LABEL("%s, t = %g", tensor.name, level);
        CHECK((largest > 0) == (b->n_out > 0));
        for (size_t i = first; i < first + n; i++)
            CHECK_CLOSE(grad[i], hand_flat()[i].d, 1e-4 * largest);
    }
    free(grad);
    ce_close(&score);
}

TEST(by_hand_loss_and_gradient_equal_those_of_dlm_on_every_isa)
{
    static const double levels[] = { 0.2, 0.5, 1 };
    FOR_EACH_ISA(isa) {
        dlm_ctx *ctx = test_open(isa, 1);
        for (int i = 0; i < 3; i++) {
            dlm_model *m = hand_model(ctx);
            hand_compare_gradient(ctx, m, levels[i]);
            dlm_model_free(m);
        }
        test_close(ctx);
    }
}

/* The prompt and what is not masked stay; every number is within 5 deviations. */
TEST(by_hand_masks_a_fraction_t_after_the_prompt)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_model_free(hand_model(ctx));
    for (int k = 1; k <= 3; k++) {
        const double t = 0.3 * k, n = 40 * (HAND_T - HAND_P);
        int masks = 0;
        char text[HAND_T];
        for (int run = 0; run < 40; run++) {
            hand_text(text);
            learn(text, t, 1);
            for (int i = 0; i < HAND_T; i++) {
                int masked = net.canvas[i] == HAND_MASK;
                CHECK(masked ? i >= HAND_P : net.canvas[i] == text[i]);
                masks += masked;
            }
        }
        CHECK_CLOSE(masks, n * t, 5 * sqrt(n * t * (1 - t)));
    }
    test_close(ctx);
}

/* Both are given the same gradients.  The program's moments live as long as it does, so
   this is the one test that may call its adam(). */
TEST(by_hand_updates_equal_those_of_dlm)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_model *m = hand_model(ctx);
    dlm_train_options o = {0};
    o.lr = 0.01f;
    o.clip = INFINITY;
    dlm_trainer *t = test_trainer(ctx, m, &o);
    for (int n = 1; n <= 4; n++) {
        for (int i = 0; i < HAND_WEIGHTS; i++) {
            t->gradients[i] = 0.1f * test_float();
            hand_flat()[i].d = (double)t->gradients[i];
        }
        CHECK_OK(dlm_trainer_update(t, NULL));
        adam(0.01, n);
        LABEL("update %d", n);
        for (int i = 0; i < HAND_WEIGHTS; i++) {
            CHECK_CLOSE(m->weights[i], hand_flat()[i].v, 1e-6 * n);
            CHECK(hand_flat()[i].d == 0);
        }
    }
    dlm_trainer_free(t);
    dlm_model_free(m);
    test_close(ctx);
}

/* Both fill in the program's canvas, `steps` or, when 0, one token per step. */
static void hand_compare_canvases(dlm_ctx *ctx, const dlm_model *m, int steps)
{
    const int T = HAND_T;
    int canvas[HAND_T], masks = 0;
    dlm_sample_options o = {0};
    dlm_sampler *sm = NULL;
    dlm_session *s = test_session(ctx, m, 1, T, T, 0);
    memcpy(canvas, net.canvas, sizeof canvas);
    for (int i = 0; i < T; i++) masks += canvas[i] == HAND_MASK;
    o.steps = steps;
    if (!steps) steps = masks;
    CHECK_OK(dlm_sampler_create(&sm, s, &o, NULL));
    CHECK_OK(dlm_sampler_begin(sm, canvas, &T, 1));
    for (int i = 0; i < steps; i++) {
        CHECK(!dlm_sampler_done(sm));
        CHECK_OK(dlm_sampler_step(sm));
        fill_in(masks / steps + (i < masks % steps));
        CHECK(!memcmp(canvas, net.canvas, sizeof canvas));
    }
    CHECK(dlm_sampler_done(sm));
    dlm_sampler_free(sm);
    dlm_session_free(s);
}

TEST(by_hand_writes_what_the_sampler_writes_step_by_step_on_every_isa)
{
    FOR_EACH_ISA(isa) {
        dlm_ctx *ctx = test_open(isa, 1);
        for (int run = 0; run < 9; run++) {
            dlm_model *m = hand_model(ctx);
            char text[HAND_T];
            hand_text(text);
            for (int i = 0; i < HAND_T; i++) {
                net.canvas[i] = HAND_MASK;
                if (test_uniform() < 0.3 || i == 2) net.canvas[i] = text[i];
            }
            LABEL("run %d, %s", run, dlm_isa_name((dlm_isa)isa));
            hand_compare_canvases(ctx, m, run % 3 * 3);
            dlm_model_free(m);
        }
        test_close(ctx);
    }
}

/* ==[ training runs ]======================================================== */

static int train_tokens[8][64];            /* what the tests below learn from      */

static void run_examples(dlm_example *e, int n, int vocab)
{
    for (int i = 0; i < n; i++) {
        for (int j = 0; j < 64; j++) train_tokens[i][j] = test_below(vocab - 1);
        e[i].tokens = train_tokens[i];
        e[i].length = i == 0 ? 1 : 20 + 5 * i;
        e[i].prompt = i == 0 ? 0 : 3 * (i % 3);
        e[i].canvas = 0;
    }
}

TEST(untrained_models_lose_ln_v_nats_per_token)
{
    enum { ROWS = 8, T = 64, V = 50, DRAWS = 400 };
    static const dlm_pattern patterns[] = {
        DLM_PATTERN_BLOCK, DLM_PATTERN_FULL, DLM_PATTERN_CAUSAL };
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 2);
    for (int p = 0; p < 3; p++) {
        dlm_config c = test_config(V, 32, 1, 2, T);
        c.pattern = patterns[p];
        dlm_model *m = NULL;
        CHECK_OK(dlm_model_create(&m, ctx, &c, test_seed, NULL));
        dlm_train_options o = {0};
        o.seed = test_seed;
        dlm_trainer *t = test_trainer(ctx, m, &o);
        dlm_example e[ROWS];
        double loss = 0, bins = 0, counts = 0;
        int draws = patterns[p] == DLM_PATTERN_CAUSAL ? 1 : DRAWS;
        for (int draw = 0; draw < draws; draw++) {
            dlm_report report;
            run_examples(e, ROWS, V - 1);
            for (int i = 0; i < ROWS; i++) { e[i].length = T; e[i].prompt = 0; }
            CHECK_OK(dlm_trainer_evaluate(t, e, ROWS, (uint32_t)draw, &report));
            loss += report.loss / draws;
            for (int i = 0; i < DLM_BINS; i++) {
                if (!report.bin_count[i]) continue;
                bins += report.bin_loss[i] * (double)report.bin_count[i];
                counts += (double)report.bin_count[i];
            }
        }
        LABEL("pattern %d", patterns[p]);
        double want = log((double)V);
        CHECK_CLOSE(loss, want, 0.02 * want);
        if (draws > 1) CHECK_CLOSE(bins / counts, want, 0.01 * want);
        if (draws > 1) CHECK_CLOSE(counts / (ROWS * T * DRAWS), 0.5, 0.01);
        dlm_trainer_free(t);
        dlm_model_free(m);
    }
    test_close(ctx);
}

/* -bound / n on average: the loss that evaluate reports for copies of one example. */
static void objective_compare(dlm_ctx *ctx, int pattern, int shifted, int n, int P)
{
    enum { BLOCK = 3, COPIES = 64, DRAWS = 150 };
    int tokens[BOUND_P + 6];
    dlm_model *m = bound_model(ctx, pattern, BLOCK, shifted);
    reference r;
    ref_open(&r, m);
    bound_tokens(tokens, P + n);
    double want = 0, sum = 0, squares = 0;
    int size = pattern == DLM_PATTERN_BLOCK ? BLOCK : n;
    for (int at = 0; at < n; at += size)
        want -= bound_block(&r, tokens, P + at, at + size > n ? n - at : size, size).mean
              / n;
    dlm_train_options o = {0};
    o.seed = test_seed;
    o.independent_levels = n & 1;
    dlm_trainer *t = test_trainer(ctx, m, &o);
    dlm_example e[COPIES];
    for (int i = 0; i < COPIES; i++) {
        e[i].tokens = tokens; e[i].length = P + n; e[i].prompt = P; e[i].canvas = 0;
    }
    for (int draw = 0; draw < DRAWS; draw++) {
        dlm_report report = {0};
        CHECK_OK(dlm_trainer_evaluate(t, e, COPIES, (uint32_t)draw, &report));
        CHECK(report.tokens == COPIES * n);
        sum += report.loss;
        squares += report.loss * report.loss;
    }
    double mean = sum / (int)DRAWS, sd = sqrt(squares / (int)DRAWS - mean * mean);
    LABEL("pattern %d, shifted %d, n %d, P %d", pattern, shifted, n, P);
    CHECK_CLOSE(mean, want, 4.5 * sd / sqrt((double)DRAWS) + 0.002 * want);
    dlm_trainer_free(t);
    ref_close(&r);
    dlm_model_free(m);
}

TEST(objective_expectation_is_the_exact_bound)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 2);
    for (int n = 1; n <= 5; n += 2) {
        objective_compare(ctx, DLM_PATTERN_FULL, 0, n, n % 4);
        objective_compare(ctx, DLM_PATTERN_FULL, 1, n, 2);
        objective_compare(ctx, DLM_PATTERN_BLOCK, 0, n, n % 4);
    }
    test_close(ctx);
}

/* A shifted model has no row that predicts token 0: it can carry no loss. */
TEST(report_counts_the_tokens_that_could_carry_loss)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int i = 0; i < 6; i++) {
        int pattern = i / 2, shifted = i % 2 || pattern == DLM_PATTERN_CAUSAL;
        dlm_model *m = bound_model(ctx, pattern, 3, shifted);
        dlm_trainer *t = test_trainer(ctx, m, NULL);
        int tokens[10];
        bound_tokens(tokens, 10);
        dlm_example e[3] = { { tokens, 10, 0, 0, NULL }, { tokens, 7, 3, 0, NULL },
                             { tokens, 1, 0, 0, NULL } };
        int64_t want = 10 - shifted + 4 + 1 - shifted, most = 0;
        for (uint32_t draw = 0; draw < 400; draw++) {
            dlm_report report;
            CHECK_OK(dlm_trainer_evaluate(t, e, 3, draw, &report));
            LABEL("pattern %d, shifted %d", pattern, shifted);
            CHECK(report.tokens == want);
            if (report.scored > most) most = report.scored;
        }
        CHECK(most <= want && most >= want - 2);
        dlm_trainer_free(t);
        dlm_model_free(m);
    }
    test_close(ctx);
}

TEST(training_levels_keep_to_their_range)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int pattern = 0; pattern < 2; pattern++) {
        dlm_model *m = bound_model(ctx, pattern, 3, 0);
        dlm_train_options o = {0};
        o.level_min = 0.4f; o.level_max = 0.85f;                /* bins 3 .. 6     */
        dlm_trainer *t = test_trainer(ctx, m, &o);
        int tokens[10];
        bound_tokens(tokens, 10);
        dlm_example e = { tokens, 10, 0, 0, NULL };
        int64_t step_bins[DLM_BINS] = {0}, bins[DLM_BINS] = {0};
        for (uint32_t i = 0; i < 200; i++) {
            dlm_report report;
            CHECK_OK(dlm_trainer_step(t, &e, 1, &report));
            for (int j = 0; j < DLM_BINS; j++) step_bins[j] += report.bin_count[j];
            CHECK_OK(dlm_trainer_evaluate(t, &e, 1, i, &report));
            for (int j = 0; j < DLM_BINS; j++) bins[j] += report.bin_count[j];
        }
        for (int j = 0; j < DLM_BINS; j++) {
            LABEL("pattern %d, bin %d", pattern, j);
            CHECK((step_bins[j] > 0) == (j >= 3 && j <= 6));
            CHECK(bins[j] > 0);
        }
        dlm_trainer_free(t);
        dlm_model_free(m);
    }
    test_close(ctx);
}

/* Loss, gradient norm and counts of the AR objective, pass by pass, by hand. */
TEST(ar_objective_is_next_token_cross_entropy)
{
    enum { ROWS = 5 };
    static test_batch t;
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_config c = case_config(&model_grid[2], 64);
    dlm_model *m = test_model(ctx, &c);
    dlm_example e[ROWS];
    run_examples(e, ROWS, c.vocab);
    batch_clear(&t);
    for (int i = 0; i < ROWS; i++)
        batch_add(&t, e[i].length, c.vocab, DLM_PATTERN_CAUSAL, 0, 0);
    batch_close(&t, 2);
    ce_score score;
    ce_open(&score, &t.b, c.vocab);
    int n = 0;
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < e[i].length; j++) {
            t.tokens[t.start[i] + j] = e[i].tokens[j];
            if (j + 1 >= e[i].length || j + 1 < e[i].prompt) continue;
            t.out_rows[n] = t.start[i] + j;
            score.target[n++] = e[i].tokens[j + 1];
        }
    t.b.n_out = score.n_out = n;
    for (int i = 0; i < n; i++) score.weight[i] = 1.0 / n;
    float *g = grad_of_pass(ctx, m, &t.b, &score);
    double squares = 0;
    for (size_t i = 0; i < m->n_params; i++) squares += (double)g[i] * g[i];
    for (int max_rows = 64; max_rows <= 256; max_rows *= 4) {
        dlm_train_options o = {0};
        o.lr = 1e-30f;
        o.max_rows = max_rows;
        dlm_trainer *tr = test_trainer(ctx, m, &o);
        dlm_report report;
        LABEL("max_rows %d", max_rows);
        CHECK_OK(dlm_trainer_step(tr, e, ROWS, &report));
        CHECK_CLOSE(report.loss, ce_total(&score), 1e-5);
        CHECK_CLOSE(report.grad_norm, sqrt(squares), 1e-4 * sqrt(squares));
        CHECK(report.tokens == n && report.scored == n);
        dlm_trainer_free(tr);
    }
    free(g);
    ce_close(&score);
    dlm_model_free(m);
    test_close(ctx);
}

/* With one token to predict the loss is CE / t and its gradient that of CE over t. */
TEST(masked_objectives_weigh_the_gradient_as_the_loss)
{
    static test_batch t;
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int pattern = 0; pattern < 2; pattern++) {
        dlm_model *m = bound_model(ctx, pattern, 4, 0);
        int tokens[BOUND_P + 1];
        bound_tokens(tokens, BOUND_P + 1);
        batch_clear(&t);
        batch_add(&t, BOUND_P + 1, BOUND_V, pattern, 4, 0);
        memcpy(t.tokens, tokens, sizeof tokens);
        t.tokens[BOUND_P] = m->config.mask_id;
        batch_close(&t, 0);
        ce_score score;
        ce_open(&score, &t.b, BOUND_V);
        score.target[0] = tokens[BOUND_P];
        score.weight[0] = 1;
        float *g = grad_of_pass(ctx, m, &t.b, &score);
        double squares = 0;
        for (size_t i = 0; i < m->n_params; i++) squares += (double)g[i] * g[i];
        dlm_train_options o = {0};
        o.lr = 1e-30f;
        dlm_trainer *tr = test_trainer(ctx, m, &o);
        dlm_example e = { tokens, BOUND_P + 1, BOUND_P, BOUND_P + 1, NULL };
        for (int step = 0; step < 20; step++) {
            dlm_report report;
            CHECK_OK(dlm_trainer_step(tr, &e, 1, &report));
            LABEL("pattern %d, step %d", pattern, step);
            CHECK(report.tokens == 1);
            if (!report.scored) CHECK(report.loss == 0 && report.grad_norm == 0);
            if (!report.scored) continue;
            double per_t = report.loss / score.loss[0];        /* 1 / t */
            CHECK(per_t > 0.9999 && per_t < 1001);
            CHECK_CLOSE(report.grad_norm, per_t * sqrt(squares), 1e-3 * per_t *
                        sqrt(squares));
            int bin = (int)(8 / per_t) > 7 ? 7 : (int)(8 / per_t);
            CHECK(report.bin_count[bin] == 1);
            CHECK_CLOSE(report.bin_loss[bin], score.loss[0], 1e-4);
        }
        free(g);
        ce_close(&score);
        dlm_trainer_free(tr);
        dlm_model_free(m);
    }
    test_close(ctx);
}

/* Every way a step can take computes in the precision asked for. */
TEST(steps_of_every_kind_take_the_precision)
{
    NEEDS_NARROW_WORDS();
    static const struct { dlm_method method; int one_pass, complementary; } kinds[] = {
        { DLM_METHOD_VANILLA, 0, 0 }, { DLM_METHOD_VANILLA, 0, 1 },
        { DLM_METHOD_LIFT3, 0, 0 }, { DLM_METHOD_LIFT3, 1, 0 } };
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int k = 0; k < 4; k++) {
        dlm_config c = case_config(&model_grid[0], 64);
        dlm_report r[2] = {{0}};
        for (int bf16 = 0; bf16 < 2; bf16++) {
            uint64_t kept = test_state;
            dlm_model *m = test_model(ctx, &c);
            dlm_train_options o = {0};
            dlm_example e[6];
            o.lift.method = kinds[k].method, o.lift.one_pass = kinds[k].one_pass;
            o.lift.complementary = kinds[k].complementary;
            o.precision = bf16 ? DLM_BF16 : DLM_F32;
            o.max_rows = 400;
            dlm_trainer *t = test_trainer(ctx, m, &o);
            run_examples(e, 6, c.vocab);
            CHECK_OK(dlm_trainer_step(t, e, 6, &r[bf16]));
            dlm_trainer_free(t);
            dlm_model_free(m);
            if (!bf16) test_state = kept;
        }
        LABEL("kind %d", k);
        CHECK(r[0].grad_norm > 0 && r[0].grad_norm != r[1].grad_norm);
        CHECK_CLOSE(r[1].grad_norm / r[0].grad_norm, 1, 0.05);
    }
    test_close(ctx);
}

/* Everything that computes, on one thread: forwards of every pattern in every precision,
   training with what is beside it, sampling in every order. */
static void exceptions_models(int isa)
{
    static test_batch t;
    for (int g = 0; g < MODEL_CASES; g++) {
        dlm_config c = case_config(&model_grid[g], 300);
        dlm_ctx *ctx = test_open(isa, 1);
        dlm_model *m = test_model(ctx, &c);
        for (int shape = 0; shape < BATCH_SHAPES; shape++) {
            const dlm_batch *b = case_batch(&t, &c, shape);
            free(test_logits_as_is(ctx, m, b));
            free(test_logits_in(ctx, m, b, DLM_F32));
            free(test_logits_in(ctx, m, b, test_type(DLM_BF16)));
            free(test_logits_in(ctx, m, b, test_type(DLM_I8)));
        }
        dlm_model_free(m);
        test_close(ctx);
    }
}

static void exceptions_training(int isa)
{
    for (int g = 0; g < (int)MODEL_CASES + (int)DLM_METHOD_COUNT; g++) {
        dlm_config c = case_config(&model_grid[g < MODEL_CASES ? g : 0], 64);
        dlm_ctx *ctx = test_open(isa, 1);
        dlm_model *m = test_model(ctx, &c);
        dlm_train_options o = {0};
        dlm_example e[6];
        o.max_rows = 400; o.weight_decay = 0.1f; o.ema = 0.9f;
        o.precision = g % 2 ? test_type(DLM_BF16) : DLM_F32;
        if (g >= MODEL_CASES) o.lift.method = (dlm_method)(g - MODEL_CASES);
        dlm_trainer *t = test_trainer(ctx, m, &o);
        run_examples(e, 6, c.vocab);
        for (int step = 0; step < 3; step++) CHECK_OK(dlm_trainer_step(t, e, 6, NULL));
        dlm_trainer_free(t);
        dlm_model_free(m);
        test_close(ctx);
    }
}

static void exceptions_sampling(int isa)
{
    static toy_run run;
    dlm_ctx *ctx = test_open(isa, 1);
    for (int k = 0; k < (int)TOY_KINDS * (int)DLM_ORDER_COUNT * 2; k++) {
        dlm_model *m = toy_model(ctx, k % TOY_KINDS, test_seed);
        dlm_sample_options o = {0};
        o.order = (dlm_order)(k / TOY_KINDS % DLM_ORDER_COUNT);
        if (k >= (int)TOY_KINDS * (int)DLM_ORDER_COUNT) {
            o.temperature = 0.7f; o.top_k = 7; o.top_p = 0.95f; o.min_p = 0.01f;
            o.suppress = &run.lengths[0]; o.n_suppress = 1;
        }
        toy_canvas(&run, k % TOY_KINDS == 4);
        run.lengths[0] = 3;
        toy_generate(&run, ctx, m, k % 2, &o);
        dlm_model_free(m);
    }
    test_close(ctx);
}

/* Losses of logits that are far below 0, far apart, or forbidden. */
static void exceptions_losses(int isa)
{
    enum { V = 37 };
    static const float far[] = { 0.0f, -1000.0f, -3e38f, 1e4f };
    dlm_ctx *ctx = test_open(isa, 1);
    for (int k = 0; k < 4; k++) {
        dlm_divergence_options o = {0};
        float x[V], teacher[V];
        for (int i = 0; i < V; i++) {
            x[i] = far[k] + 20 * test_float();
            teacher[i] = i == 3 ? -INFINITY : x[i] - far[k & i];
        }
        CHECK(dlm_cross_entropy(ctx, x, V, 1, 1000.0) >= 0);
        o.kind = (dlm_divergence_kind)k;
        dlm_teacher_probs(ctx, teacher, V, &o);
        CHECK(dlm_divergence(ctx, x, teacher, V, 1, &o) >= 0);
    }
    test_close(ctx);
}

#if defined(__GLIBC__) && !defined(__UCLIBC__)      /* as in the header: own names    */
extern int test_trap(int exceptions) __asm__("feenableexcept");
extern int test_trap_no_more(int exceptions) __asm__("fedisableexcept");
#else
static int test_trap(int exceptions) { return exceptions; }
static int test_trap_no_more(int exceptions) { return exceptions; }
#endif

/* A host may trap them, and reads of them after its own computations.  Each part runs
   first to see the flags it leaves, then, if there are none, with traps. */
TEST(ordinary_work_raises_no_floating_point_exceptions_on_any_isa)
{
    static const struct { const char *name; void (*run)(int isa); } parts[] = {
        { "forward", exceptions_models }, { "training", exceptions_training },
        { "sampling", exceptions_sampling }, { "losses", exceptions_losses } };
    const int wrong = FE_DIVBYZERO | FE_INVALID | FE_OVERFLOW;
    FOR_EACH_ISA(isa)
        for (int i = 0; i < 4; i++) {
            feclearexcept(FE_ALL_EXCEPT);
            parts[i].run(isa);
            LABEL("%s, %s: %d", parts[i].name, dlm_isa_name((dlm_isa)isa),
                  fetestexcept(wrong));
            CHECK(fetestexcept(wrong) == 0);
            if (fetestexcept(wrong)) continue;
            test_trap(wrong);
            parts[i].run(isa);
            test_trap_no_more(wrong);
        }
}

/* A pool that runs everything backwards on the calling thread. */
static void reverse_for(void *user, int n, void (*job)(void *arg, int i), void *arg)
{
    ++*(int *)user;
    for (int i = n - 1; i >= 0; i--) job(arg, i);
}

/* Five steps; the weights that come out (n_params), to be freed. */
static float *train_five(int isa, int threads, const dlm_config *c, dlm_dtype precision,
                         int *hook_calls)
{
    dlm_ctx *ctx = NULL;
    dlm_options opt = {0};
    opt.isa = (dlm_isa)isa;
    opt.threads = threads;
    if (hook_calls) {
        opt.parallel_for = reverse_for;
        opt.parallel_user = hook_calls;
    }
    CHECK_OK(dlm_init(&ctx, &opt));
    test_ctx = ctx;
    uint64_t kept = test_state;
    dlm_model *m = test_model(ctx, c);
    dlm_train_options o = {0};
    o.seed = test_seed; o.weight_decay = 0.1f; o.lr = 0.01f; o.max_rows = 200;
    o.ema = 0.9f; o.precision = precision;
    dlm_trainer *t = test_trainer(ctx, m, &o);
    dlm_example e[6];
    run_examples(e, 6, c->vocab);
    double losses = 0;
    for (int step = 0; step < 5; step++) {
        dlm_report report = {0};
        CHECK_OK(dlm_trainer_step(t, e, 6, &report));
        losses += report.loss;
    }
    CHECK(losses > 0);
    float *w = test_floats(2 * m->n_params);
    memcpy(w, m->weights, m->n_params * sizeof(float));
    memcpy(w + m->n_params, t->ema, m->n_params * sizeof(float));
    dlm_trainer_free(t);
    dlm_model_free(m);
    test_close(ctx);
    test_state = kept;
    return w;
}

TEST(training_is_bit_identical_for_any_threads_and_order)
{
    FOR_EACH_ISA(isa) {
        for (int g = 0; g < 9; g++) {
            dlm_config c = case_config(&model_grid[g % 7], 64);
            const dlm_dtype precision = g < 7 ? DLM_F32 : test_type(DLM_BF16);
            LABEL("case %d, %s", g, dlm_isa_name((dlm_isa)isa));
            dlm_ctx *ctx = test_open(isa, 1);
            dlm_model *m = test_model(ctx, &c);
            size_t bytes = 2 * m->n_params * sizeof(float);
            dlm_model_free(m);
            test_close(ctx);
            float *one = train_five(isa, 1, &c, precision, NULL);
            int calls = 0;
            for (int threads = 2; threads <= 4; threads++) {
                float *many = train_five(isa, threads, &c, precision,
                                         threads == 4 ? &calls : NULL);
                LABEL("case %d, %s, %d threads%s", g, dlm_isa_name((dlm_isa)isa), threads,
                      threads == 4 ? " in reverse" : "");
                CHECK(memcmp(one, many, bytes) == 0);
                free(many);
            }
            CHECK(calls > 0);
            free(one);
        }
    }
}

/* ==[ tokenizers ]============================================================ */

/* Latin, two, three and four byte characters, out of order; 11 different ones. */
static const char tokenizer_corpus[] =
    "b a\n\xC3\xA9\xE2\x82\xAC\xF0\x9F\x99\x82" "cab\xC3\xBC\xE2\x82\xAC zZ\xC3\xA9";
enum { CORPUS_CHARS = 11, CORPUS_LENGTH = 16 };

TEST(tokenizer_bytes_round_trip_all_bytes)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_tokenizer *t = NULL;
    char text[256], back[257];
    int ids[256];
    size_t n = 0;
    for (int i = 0; i < 256; i++) text[i] = (char)(unsigned char)i;
    CHECK_OK(dlm_tokenizer_create(&t, ctx, DLM_TOKENIZER_BYTES, NULL, 0));
    if (t) {
        CHECK(t->vocab == 258);
        CHECK(t->stop == 256 && t->mask == 257);
        CHECK_OK(dlm_encode(t, text, 256, ids, 256, &n));
        CHECK(n == 256);
        for (int i = 0; i < 256; i++) CHECK(ids[i] == i);
        CHECK(dlm_decode(t, ids, 256, back, sizeof back) == 256);
        CHECK(memcmp(text, back, 256) == 0 && back[256] == 0);
    }
    dlm_tokenizer_free(t);
    test_close(ctx);
}

TEST(tokenizer_chars_round_trip_and_stand_by_code_point)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_tokenizer *t = NULL;
    const size_t size = sizeof tokenizer_corpus - 1;
    int ids[64], euro = 0, sorted[3];
    char back[64];
    size_t n = 0;
    CHECK_OK(dlm_tokenizer_create(&t, ctx, DLM_TOKENIZER_CHARS, tokenizer_corpus, size));
    if (t) {
        CHECK(t->vocab == CORPUS_CHARS + 2);
        CHECK(t->stop == CORPUS_CHARS);
        CHECK(t->mask == CORPUS_CHARS + 1);
        CHECK_OK(dlm_encode(t, tokenizer_corpus, size, ids, 64, &n));
        CHECK(n == CORPUS_LENGTH);
        CHECK(dlm_decode(t, ids, n, back, sizeof back) == size);
        CHECK(strcmp(back, tokenizer_corpus) == 0);
        CHECK_OK(dlm_encode(t, "\n", 1, sorted, 1, &n));
        CHECK(n == 1 && sorted[0] == 0);             /* the lowest code point */
        CHECK_OK(dlm_encode(t, "Za\xC3\xA9", 4, sorted, 3, &n));
        CHECK(n == 3 && sorted[0] < sorted[1] && sorted[1] < sorted[2]);
        CHECK_OK(dlm_encode(t, "\xE2\x82\xAC", 3, &euro, 1, &n));
        CHECK(euro == CORPUS_CHARS - 2);
    }
    dlm_tokenizer_free(t);
    test_close(ctx);
}

TEST(tokenizer_names_an_unknown_character)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_tokenizer *t = NULL;
    int ids[8];
    size_t n = 0;
    CHECK_OK(dlm_tokenizer_create(&t, ctx, DLM_TOKENIZER_CHARS, "abc", 3));
    if (t) {
        CHECK_ERROR(dlm_encode(t, "abxc", 4, ids, 8, &n), DLM_E_INPUT, ctx, "x");
        CHECK_ERROR(dlm_encode(t, "a\xC3\xA9", 3, ids, 8, &n), DLM_E_INPUT, ctx, "E9");
        CHECK_ERROR(dlm_encode(t, "abxc", 4, NULL, 0, &n), DLM_E_INPUT, ctx, "x");
    }
    dlm_tokenizer_free(t);
    test_close(ctx);
}

TEST(tokenizer_says_sizes_and_truncates)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int kind = 0; kind < 2; kind++) {
        dlm_tokenizer *t = NULL;
        int ids[8], other[3] = { 0, -5, -5 };
        char out[8];
        size_t n = 99;
        CHECK_OK(dlm_tokenizer_create(&t, ctx, (dlm_tokenizer_kind)kind, "abcdef", 6));
        if (!t) continue;
        CHECK_OK(dlm_encode(t, "fedcba", 6, NULL, 0, &n));
        CHECK(n == 6);
        for (int i = 0; i < 8; i++) ids[i] = -5;
        n = 99;
        CHECK_OK(dlm_encode(t, "fedcba", 6, ids, 4, &n));
        CHECK(n == 6 && ids[3] >= 0 && ids[4] == -5 && ids[5] == -5);
        CHECK_OK(dlm_encode(t, "fedcba", 6, ids, 8, &n));
        CHECK(n == 6 && ids[5] >= 0 && ids[6] == -5);
        CHECK(dlm_decode(t, ids, 6, NULL, 0) == 6);
        memset(out, '#', sizeof out);
        CHECK(dlm_decode(t, ids, 6, out, 4) == 6);
        CHECK(memcmp(out, "fed\0####", 8) == 0);
        CHECK(dlm_decode(t, ids, 6, out, 1) == 6);
        CHECK(out[0] == 0 && out[1] == 'e');
        CHECK(dlm_decode(t, ids, 6, out, 0) == 6);
        CHECK_OK(dlm_encode(t, "", 0, ids, 8, &n));      /* nothing at all */
        CHECK(n == 0);
        CHECK_OK(dlm_encode(t, NULL, 0, NULL, 0, &n));
        CHECK(n == 0);
        CHECK(dlm_decode(t, ids, 0, out, 8) == 0 && out[0] == 0);
        other[0] = t->stop;
        other[1] = t->mask;
        other[2] = t->vocab;
        CHECK(dlm_decode(t, other, 3, out, 8) == 2 && strcmp(out, "__") == 0);
        other[1] = -1;
        CHECK(dlm_decode(t, other, 2, out, 8) == 1 && strcmp(out, "_") == 0);
        dlm_tokenizer_free(t);
    }
    test_close(ctx);
}

/* Byte strings that are not UTF-8, each in a block of its exact size: a reader that
   trusts the leading byte runs over its end. */
TEST(tokenizer_survives_invalid_utf8)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_tokenizer *known = NULL;
    CHECK_OK(dlm_tokenizer_create(&known, ctx, DLM_TOKENIZER_CHARS, tokenizer_corpus,
                                  sizeof tokenizer_corpus - 1));
    for (int k = 0; known && k < 4000; k++) {
        dlm_tokenizer *t = NULL;
        int ids[16];
        size_t n = 0, size = (size_t)(1 + k % 6);
        char *text = (char *)test_malloc(size);
        for (size_t i = 0; i < size; i++)
            text[i] = (char)(unsigned char)(k % 2 ? test_below(256)
                                                  : 0xC0 + test_below(64));
        dlm_error e = dlm_encode(known, text, size, ids, 16, &n);
        CHECK(e == DLM_OK || e == DLM_E_INPUT);
        if (k % 10 < 2) {
            e = dlm_tokenizer_create(&t, ctx, DLM_TOKENIZER_CHARS, text, size);
            CHECK((e == DLM_OK) == (t != NULL));
            CHECK(e == DLM_OK || e == DLM_E_INPUT);
        }
        if (t) {
            e = dlm_encode(t, text, size, ids, 16, &n);
            CHECK(e == DLM_OK || e == DLM_E_INPUT);
        }
        dlm_tokenizer_free(t);
        free(text);
    }
    dlm_tokenizer_free(known);
    test_close(ctx);
}

static dlm_error tokenizer_try(dlm_ctx *ctx, const char *text, size_t size)
{
    dlm_tokenizer *t = NULL;
    dlm_error e = dlm_tokenizer_create(&t, ctx, DLM_TOKENIZER_CHARS, text, size);
    CHECK((e == DLM_OK) == (t != NULL));
    dlm_tokenizer_free(t);
    return e;
}

/* n entries "k": id, where all ids but the one at `wrong` follow each other. */
static size_t tokenizer_vocab_json(char *out, int n, int wrong)
{
    size_t k = (size_t)sprintf(out, " {\n");
    for (int i = 0; i < n; i++)
        k += (size_t)sprintf(out + k, "%s\"\\u0120t%d\": %d", i ? ", " : "", i,
                             i + (i == wrong));
    return k + (size_t)sprintf(out + k, "}\n");
}

TEST(tokenizer_takes_no_vocabulary_for_a_corpus)
{
    static const char *const vocabularies[] = {
        "{\"version\":\"1.0\",\"added_tokens\":[{\"id\":0,\"content\":\"<s>\"}],"
            "\"model\":{\"type\":\"BPE\",\"dropout\":null,\"vocab\":{\"a\":0}}}",
        "\n{ \"model\" : { \"vocab\" : [ [\"a\", -1.5] ]"
    };
    static const char *const texts[] = {                   /* honest JSON           */
        "{\"a\":0,\"b\":1}", "{}", "[]", "{\"model\":\"vocab\"}", "{\"model\":{\"a\":1}}",
        "{\"vocab\":{\"a\":0}}", "{\"a\":{\"model\":{\"vocab\":1}}}", "{", "{\"",
        "{\"model",
        "{\"name\":\"x\",\"n\":1}\n{\"name\":\"y\",\"n\":2}\n", "model vocab"
    };
    static const char pieces[] = "\7\0\0\0\0\0\0\0\5\0\0\0<unk>";
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    char *json = (char *)test_malloc(40000);
    for (size_t i = 0; i < sizeof vocabularies / sizeof *vocabularies; i++) {
        LABEL("%.100s", vocabularies[i]);
        CHECK_ERROR(tokenizer_try(ctx, vocabularies[i], strlen(vocabularies[i])),
                    DLM_E_INPUT, ctx, "vocabulary in JSON");
    }
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        LABEL("%s", texts[i]);
        CHECK_OK(tokenizer_try(ctx, texts[i], strlen(texts[i])));
    }
    LABEL("ids");
    CHECK_ERROR(tokenizer_try(ctx, json, tokenizer_vocab_json(json, 256, -1)),
                DLM_E_INPUT, ctx, "vocabulary in JSON");
    CHECK_OK(tokenizer_try(ctx, json, tokenizer_vocab_json(json, 255, -1)));
    CHECK_OK(tokenizer_try(ctx, json, tokenizer_vocab_json(json, 1000, 999)));
    CHECK_OK(tokenizer_try(ctx, json, tokenizer_vocab_json(json, 1000, -1) - 2));
    LABEL("binary");                       /* pieces; then a safetensors file      */
    CHECK_ERROR(tokenizer_try(ctx, pieces, sizeof pieces - 1), DLM_E_INPUT, ctx,
                "not a text");
    CHECK_ERROR(tokenizer_try(ctx, "\2\0\0\0\0\0\0\0{}", 10), DLM_E_INPUT, ctx,
                "not a text");
    free(json);
    test_close(ctx);
}

/* Adds up what is asked for; nothing here is freed and asked for again. */
static void *tokenizer_alloc(void *user, size_t size)
{
    *(size_t *)user += size;
    return malloc(size);
}
static void tokenizer_release(void *user, void *ptr) { (void)user; free(ptr); }

TEST(tokenizer_chars_take_memory_by_their_number)
{
    dlm_ctx *ctx = NULL;
    dlm_options o = {0};
    const size_t set = DLM__CODES / 8;     /* lives only while it is made          */
    size_t asked = 0, before;
    char text[128 + 4 * 200], *end = text;
    o.allocator.alloc = tokenizer_alloc;
    o.allocator.release = tokenizer_release;
    o.allocator.user = &asked;
    CHECK_OK(dlm_init(&ctx, &o));
    before = asked;
    CHECK_OK(tokenizer_try(ctx, "abcdefghijklmnopqrst", 20));
    CHECK(asked - before < set + 1024 + 8 * DLM_GUARD);
    for (uint32_t c = 1; c < 128; c++) *end++ = (char)c;
    for (uint32_t c = 0x80; c < 0x110000; c += 0x110000 / 180)   /* pages of their own */
        if (c < 0xD800 || c > 0xDFFF) end += dlm__utf8_put(end, c);
    before = asked;
    CHECK_OK(tokenizer_try(ctx, text, (size_t)(end - text)));
    CHECK(asked - before < set + 10000);
    dlm_shutdown(ctx);
}

/* ==[ safetensors ]=========================================================== */

typedef struct test_file {
    unsigned char *data;                   /* a block of exactly size bytes        */
    size_t         size;
} test_file;

/* The length in 8 bytes, the header, the payload (zeros when NULL). */
static test_file file_make(const char *header, size_t length, const void *payload,
                           size_t size)
{
    test_file f;
    f.size = 8 + length + size;
    f.data = (unsigned char *)test_malloc(f.size);
    memset(f.data, 0, f.size);
    for (int i = 0; i < 8; i++) f.data[i] = (unsigned char)((uint64_t)length >> (8 * i));
    memcpy(f.data + 8, header, length);
    if (payload && size) memcpy(f.data + 8 + length, payload, size);
    return f;
}

static dlm_error file_parse(dlm_ctx *ctx, const char *header, const void *payload,
                            size_t size)
{
    dlm_safetensors *s = NULL;
    test_file f = file_make(header, strlen(header), payload, size);
    dlm_error e = dlm_safetensors_parse(&s, ctx, f.data, f.size);
    CHECK((e == DLM_OK) == (s != NULL));
    dlm_safetensors_close(s);
    free(f.data);
    return e;
}

/* Reads everything an entry promises: with a wrong promise the sanitizers speak. */
static void file_touch(dlm_ctx *ctx, const dlm_safetensors *s, const test_file *f)
{
    for (int i = 0; i < s->count; i++) {
        const dlm_st_tensor *t = &s->tensors[i];
        const unsigned char *data = (const unsigned char *)t->data;
        CHECK(t->dtype >= DLM_F32 && t->dtype < DLM_DTYPE_COUNT);
        size_t count = 1;
        for (int k = 0; k < t->n_dims; k++) count *= (size_t)t->dims[k];
        CHECK(t->n_dims >= 0 && count == t->count);
        CHECK(strlen(t->name) < f->size && strlen(t->type) < f->size);
        CHECK(dlm_safetensors_find(s, t->name) == t);
        CHECK(data >= f->data + 8 && data + t->bytes <= f->data + f->size);
        if (t->dtype == DLM_DTYPE_OTHER) {
            float none;
            CHECK_ERROR(dlm_safetensors_floats(ctx, t, &none), DLM_E_UNSUPPORTED, ctx,
                        NULL);
            continue;
        }
        CHECK(t->count <= f->size);
        if (t->count > f->size) continue;
        float *x = test_floats(t->count);
        if (t->dtype <= DLM_F64) CHECK_OK(dlm_safetensors_floats(ctx, t, x));
        free(x);
    }
}

TEST(safetensors_reads_hand_made_files)
{
    static const char header[] =
        "{ \"__metadata__\":{\"k\":\"x\\n\\\"\\u00e9\\uD83D\\ude42\",\"e\":\"\"},\n"
        "\"b\":{\"dtype\":\"F32\",\"shape\":[1,2],\"data_offsets\":[4,12]} , "
        "\"a\":{\"data_offsets\":[0,4],\"shape\":[2,1,1],\"dtype\":\"F16\"},"
        "\"none\":{\"dtype\":\"I64\",\"shape\":[3,0],\"data_offsets\":[12,12]},"
        "\"one\":{\"dtype\":\"U8\",\"shape\":[],\"data_offsets\":[12,13]}}   ";
    static const unsigned char payload[13] =
        { 0, 0x3C, 0, 0xC0, 0, 0, 0x80, 0x3F, 0, 0, 0x20, 0xC0, 7 };
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_safetensors *s = NULL;
    test_file f = file_make(header, sizeof header - 1, payload, 13);
    CHECK_OK(dlm_safetensors_parse(&s, ctx, f.data, f.size));
    if (s) {
        float x[2] = { 0, 0 };
        const dlm_st_tensor *a = dlm_safetensors_find(s, "a");
        const dlm_st_tensor *b = dlm_safetensors_find(s, "b");
        const dlm_st_tensor *one = dlm_safetensors_find(s, "one");
        const char *k = dlm_safetensors_metadata(s, "k");
        const char *e = dlm_safetensors_metadata(s, "e");
        CHECK(s->count == 4);
        CHECK(k && strcmp(k, "x\n\"\xC3\xA9\xF0\x9F\x99\x82") == 0);
        CHECK(e && *e == 0);
        CHECK(dlm_safetensors_metadata(s, "x") == NULL);
        CHECK(dlm_safetensors_find(s, "c") == NULL);
        CHECK(dlm_safetensors_find(s, "__metadata__") == NULL);
        CHECK(a && a->dtype == DLM_F16 && a->n_dims == 3 && a->count == 2);
        CHECK(b && b->n_dims == 2 && b->dims[0] == 1 && b->dims[1] == 2);
        CHECK(one && one->n_dims == 0 && one->count == 1 && one->dtype == DLM_U8);
        if (a) CHECK_OK(dlm_safetensors_floats(ctx, a, x));
        CHECK(x[0] == 1 && x[1] == -2);
        if (b) CHECK_OK(dlm_safetensors_floats(ctx, b, x));
        CHECK(x[0] == 1 && x[1] == -2.5f);
        if (one) CHECK_ERROR(dlm_safetensors_floats(ctx, one, x), DLM_E_UNSUPPORTED, ctx,
                             "one");
        file_touch(ctx, s, &f);
    }
    dlm_safetensors_close(s);
    free(f.data);
    CHECK_OK(file_parse(ctx, "{}", NULL, 0));
    CHECK_OK(file_parse(ctx, "{\"__metadata__\":null,"
        "\"a\":{\"dtype\":\"I8\",\"shape\":[2],\"data_offsets\":[0,2]}}", NULL, 2));
    CHECK_OK(file_parse(ctx, "{\"__metadata__\":{}}", NULL, 0));
    test_close(ctx);
}

/* The value of a half: sign, 5 bits of exponent, 10 of fraction. */
static double half_value(unsigned bits)
{
    int e = (int)(bits >> 10) & 31, f = (int)bits & 1023;
    double v = e == 31 ? (f ? NAN : INFINITY)
             : e == 0 ? ldexp(f, -24) : ldexp(1024 + f, e - 25);
    return bits & 0x8000u ? -v : v;
}

/* The value of a bfloat: sign, 8 bits of exponent, 7 of fraction. */
static double bfloat_value(unsigned bits)
{
    int e = (int)(bits >> 7) & 255, f = (int)bits & 127;
    double v = e == 255 ? (f ? NAN : INFINITY)
             : e == 0 ? ldexp(f, -133) : ldexp(128 + f, e - 134);
    return bits & 0x8000u ? -v : v;
}

static int same_float(float got, double want)
{
    if (want != want) return got != got;
    return (double)got == want && (signbit(want) != 0) == (signbit(got) != 0);
}

TEST(safetensors_widens_every_half_and_bfloat)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    unsigned char *payload = (unsigned char *)test_malloc(131072);
    float *x = test_floats(65536);
    for (int i = 0; i < 65536; i++) {
        payload[2 * i] = (unsigned char)(i & 255);
        payload[2 * i + 1] = (unsigned char)(i >> 8);
    }
    for (int bf = 0; bf < 2; bf++) {
        char header[120];
        dlm_safetensors *s = NULL;
        snprintf(header, sizeof header, "{\"x\":{\"dtype\":\"%s\",\"shape\":[65536],"
                 "\"data_offsets\":[0,131072]}}", bf ? "BF16" : "F16");
        test_file f = file_make(header, strlen(header), payload, 131072);
        CHECK_OK(dlm_safetensors_parse(&s, ctx, f.data, f.size));
        if (s) CHECK_OK(dlm_safetensors_floats(ctx, &s->tensors[0], x));
        for (unsigned i = 0; s && i < 65536; i++) {
            LABEL("%s %04x", bf ? "BF16" : "F16", i);
            CHECK(same_float(x[i], bf ? bfloat_value(i) : half_value(i)));
        }
        dlm_safetensors_close(s);
        free(f.data);
    }
    free(x);
    free(payload);
    test_close(ctx);
}

TEST(safetensors_widens_singles_and_doubles)
{
    static const double want[8] = { 1.5, -0.0, 1e-40, 0.1, -65504.5, INFINITY, 1e300,
                                    NAN };
    static const char header[] =
        "{\"d\":{\"dtype\":\"F64\",\"shape\":[2,4],\"data_offsets\":[0,64]},"
        "\"f\":{\"dtype\":\"F32\",\"shape\":[8],\"data_offsets\":[64,96]}}";
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    unsigned char payload[96];
    float single[8], x[8];
    dlm_safetensors *s = NULL;
    for (int i = 0; i < 8; i++) {
        uint64_t bits;
        uint32_t low;
        single[i] = i == 6 ? INFINITY : (float)want[i];
        memcpy(&bits, &want[i], 8);
        memcpy(&low, &single[i], 4);
        for (int k = 0; k < 8; k++) payload[8 * i + k] = (unsigned char)(bits >> (8 * k));
        for (int k = 0; k < 4; k++)
            payload[64 + 4 * i + k] = (unsigned char)(low >> (8 * k));
    }
    test_file f = file_make(header, sizeof header - 1, payload, 96);
    CHECK_OK(dlm_safetensors_parse(&s, ctx, f.data, f.size));
    for (int k = 0; s && k < 2; k++) {
        const dlm_st_tensor *t = dlm_safetensors_find(s, k ? "f" : "d");
        if (t) CHECK_OK(dlm_safetensors_floats(ctx, t, x));
        for (int i = 0; t && i < 8; i++) CHECK(same_float(x[i], (double)single[i]));
    }
    dlm_safetensors_close(s);
    free(f.data);
    test_close(ctx);
}

#define ENTRY(name, dtype, shape, offsets) "\"" name "\":{\"dtype\":\"" dtype \
        "\",\"shape\":" shape ",\"data_offsets\":" offsets "}"

/* Metadata twice, the second shorter: counted once, stored twice, it would overflow. */
TEST(safetensors_rejects_metadata_twice)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    char header[4000];
    for (int second = 0; second < 2; second++) {
        int n = sprintf(header, "{\"__metadata__\":{");
        if (second) n += sprintf(header + n, "},\"__metadata__\":{");
        for (int i = 0; i < 200; i++)
            n += sprintf(header + n, "%s\"%d\":\"\"", i ? "," : "", i);
        n += sprintf(header + n, "}");
        if (!second) n += sprintf(header + n, ",\"__metadata__\":{}");
        sprintf(header + n, "}");
        LABEL("long one %s", second ? "second" : "first");
        CHECK_ERROR(file_parse(ctx, header, NULL, 0), DLM_E_FORMAT, ctx, "metadata");
    }
    test_close(ctx);
}

TEST(safetensors_rejects_malformed_headers)
{
    static const struct { const char *header; size_t payload; } bad[] = {
        { "", 0 }, { "  ", 0 }, { "[]", 0 }, { "null", 0 }, { "\"a\"", 0 }, { "1", 0 },
        { "{", 0 }, { "{\"a\"}", 0 }, { "{} x", 0 }, { "{}}", 0 }, { "{,}", 0 },
        { "{\"a\":1}", 0 }, { "{\"a\":{}}", 0 }, { "{\"a\":null}", 0 },
        { "{" ENTRY("a", "F32", "[1]", "[0,4]") ",}", 4 },
        { "{" ENTRY("a", "F32", "[1]", "[0,4]"), 4 },
        { "{\"a\":{\"shape\":[1],\"data_offsets\":[0,4]}}", 4 },
        { "{\"a\":{\"dtype\":\"F32\",\"data_offsets\":[0,4]}}", 4 },
        { "{\"a\":{\"dtype\":\"F32\",\"shape\":[1]}}", 4 },
        { "{\"a\":{\"dtype\":4,\"shape\":[1],\"data_offsets\":[0,4]}}", 4 },
        { "{" ENTRY("a", "F32", "[2]", "[0,8]") "}", 4 },         /* out of range  */
        { "{" ENTRY("a", "F32", "[1]", "[4,8]") "}", 4 },
        { "{" ENTRY("a", "F32", "[1]", "[4,0]") "}", 8 },         /* backwards     */
        { "{" ENTRY("a", "F32", "[1]", "[0,8]") "}", 8 },         /* wrong length  */
        { "{" ENTRY("a", "F32", "[3]", "[0,8]") "}", 8 },
        { "{" ENTRY("a", "F32", "[]", "[0,8]") "}", 8 },
        { "{" ENTRY("a", "F32", "[1]", "[0]") "}", 4 },
        { "{" ENTRY("a", "F32", "[1]", "[0,4,4]") "}", 4 },
        { "{" ENTRY("a", "F32", "[1]", "[-4,0]") "}", 4 },
        { "{" ENTRY("a", "F32", "[1]", "[0,4.5]") "}", 4 },
        { "{" ENTRY("a", "F32", "[1]", "[\"0\",4]") "}", 4 },
        { "{" ENTRY("a", "F32", "[-1]", "[0,4]") "}", 4 },
        { "{" ENTRY("a", "F32", "[-1,-1]", "[0,4]") "}", 4 },
        { "{" ENTRY("a", "F32", "[1.5]", "[0,4]") "}", 4 },
        { "{" ENTRY("a", "F32", "1", "[0,4]") "}", 4 },
        { "{" ENTRY("a", "F32", "[4294967296,4294967296]", "[0,0]") "}", 0 },
        { "{" ENTRY("a", "F32", "[4611686018427387904]", "[0,0]") "}", 0 },
        { "{" ENTRY("a", "U8", "[18446744073709551617]", "[0,1]") "}", 1 },
        { "{" ENTRY("a", "U8", "[1]", "[18446744073709551616,1]") "}", 1 },
        { "{" ENTRY("a", "U8", "[1]", "[0,18446744073709551617]") "}", 1 },
        { "{" ENTRY("a", "F32", "[1]", "[0,4]") "," ENTRY("b", "F32", "[1]", "[2,6]")
          "}", 6 },                                               /* overlap       */
        { "{" ENTRY("b", "U8", "[2]", "[1,3]") "," ENTRY("a", "U8", "[2]", "[0,2]")
          "}", 3 },
        { "{" ENTRY("a", "F32", "[1]", "[0,4]") "," ENTRY("b", "F32", "[1]", "[0,4]")
          "}", 4 },
        { "{" ENTRY("a", "F32", "[1]", "[0,4]") "," ENTRY("a", "F32", "[1]", "[4,8]")
          "}", 8 },                                               /* twice         */
        { "{" ENTRY("a", "F32", "[1]", "[0,4]") " " ENTRY("b", "F32", "[1]", "[4,8]")
          "}", 8 },
        { "{" ENTRY("a\\q", "F32", "[1]", "[0,4]") "}", 4 },      /* escapes       */
        { "{" ENTRY("a\\u12", "F32", "[1]", "[0,4]") "}", 4 },
        { "{" ENTRY("a\\ud800", "F32", "[1]", "[0,4]") "}", 4 },
        { "{" ENTRY("a\\ud800\\u0041", "F32", "[1]", "[0,4]") "}", 4 },
        { "{" ENTRY("a\\udc00", "F32", "[1]", "[0,4]") "}", 4 },
        { "{" ENTRY("a\n", "F32", "[1]", "[0,4]") "}", 4 },
        { "{" ENTRY("a\\u0000", "F32", "[1]", "[0,4]") "}", 4 },
        { "{\"__metadata__\":1}", 0 }, { "{\"__metadata__\":{\"a\":1}}", 0 },
        { "{\"__metadata__\":{\"a\":\"x}}", 0 }, { "{\"__metadata__\":[\"a\"]}", 0 }
    };
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        LABEL("%.100s", bad[i].header);
        CHECK_ERROR(file_parse(ctx, bad[i].header, NULL, bad[i].payload), DLM_E_FORMAT,
                    ctx, "safetensors");
    }
    test_close(ctx);
}

/* Numbers have the form of JSON even where they are passed over. */
TEST(safetensors_rejects_what_is_no_number)
{
    static const char *const shapes[] = {
        "[01]", "[1],\"x\":1.2.3", "[1],\"x\":-", "[1],\"x\":01", "[1],\"x\":1e+",
        "[1],\"x\":.5", "[1],\"x\":5.", "[1],\"x\":+1", "[1],\"x\":1e5",
        "[1],\"x\":-0.5E-07"
    };
    const int wrong = 8;                   /* the last two are numbers             */
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int i = 0; i < wrong + 2; i++) {
        char header[120];
        snprintf(header, sizeof header, "{\"a\":{\"dtype\":\"U8\",\"shape\":%s,"
                 "\"data_offsets\":[0,1]}}", shapes[i]);
        LABEL("%s", header);
        CHECK(file_parse(ctx, header, NULL, 1) == (i < wrong ? DLM_E_FORMAT : DLM_OK));
    }
    test_close(ctx);
}

/* A header is UTF-8: what is not would come back as a name nobody can print. */
TEST(safetensors_rejects_headers_that_are_not_utf8)
{
    static const char *const bad[] = {
        "\xFF", "\x80", "\xC3", "\xC0\x80", "\xED\xA0\x80", "\xF4\x90\x80\x80",
        "\xE2\x82"
    };
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        char header[120];
        LABEL("case %u", (unsigned)i);
        snprintf(header, sizeof header, "{\"a%s\":{\"dtype\":\"U8\",\"shape\":[1],"
                 "\"data_offsets\":[0,1]}}", bad[i]);
        CHECK_ERROR(file_parse(ctx, header, NULL, 1), DLM_E_FORMAT, ctx, NULL);
        snprintf(header, sizeof header, "{\"__metadata__\":{\"a\":\"%s\"}}", bad[i]);
        CHECK_ERROR(file_parse(ctx, header, NULL, 1), DLM_E_FORMAT, ctx, NULL);
    }
    CHECK_OK(file_parse(ctx, "{" ENTRY("\xC3\xA9\xE2\x82\xAC\xF0\x9F\x99\x82", "U8",
                                      "[1]", "[0,1]") "}", NULL, 1));
    test_close(ctx);
}

/* Faults that name the tensor they are about. */
TEST(safetensors_errors_name_the_tensor)
{
    static const struct { const char *header; size_t payload; } bad[] = {
        { "{" ENTRY("w.x", "F32", "[2]", "[0,8]") "}", 4 },
        { "{" ENTRY("w.x", "F32", "[3]", "[0,8]") "}", 8 },
        { "{" ENTRY("w.x", "F32", "[1]", "[0,4]") "," ENTRY("w.x", "F32", "[1]", "[4,8]")
          "}", 8 },
        { "{" ENTRY("a", "U8", "[4]", "[0,4]") "," ENTRY("w.x", "U8", "[1]", "[3,4]")
          "}", 4 },
        { "{" ENTRY("a", "U8", "[2]", "[0,2]") "," ENTRY("w.x", "U8", "[1]", "[3,4]")
          "}", 4 },
        { "{" ENTRY("w.x", "U8", "[1]", "[1,2]") "}", 2 },
        { "{" ENTRY("w.x", "U99", "[1]", "[0,2]") "}", 1 }
    };
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        LABEL("%.100s", bad[i].header);
        dlm_error e = file_parse(ctx, bad[i].header, NULL, bad[i].payload);
        CHECK(e == DLM_E_FORMAT && strstr(dlm_last_error(ctx), "w.x") != NULL);
    }
    test_close(ctx);
}

/* Types nobody here reads, many dimensions and long names: listed, with what they
   are; one who asks for the numbers is told which type they have. */
TEST(safetensors_lists_what_only_others_use)
{
    static const char *const types[] = {
        "U16", "U32", "U64", "F8_E4M3", "F8_E5M2", "F4", "E8M0", "a type yet to come", ""
    };
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    char header[3000], long_name[1001];
    int n = sprintf(header, "{" ENTRY("w", "F32", "[1,1,2,1,1,1,1]", "[0,8]"));
    for (int i = 0; i < 9; i++)
        n += sprintf(header + n, ",\"t%d\":{\"dtype\":\"%s\",\"shape\":[3,1,1,1,1],"
                     "\"data_offsets\":[%d,%d]}", i, types[i], 8 + i, 9 + i);
    memset(long_name, 'n', 1000);
    long_name[1000] = 0;
    n += sprintf(header + n, ",\"%s\":{\"dtype\":\"U8\",\"shape\":[3],\"data_offsets\":"
                 "[17,20]}}", long_name);
    test_file f = file_make(header, (size_t)n, NULL, 20);
    dlm_safetensors *s = NULL;
    float x[2] = { 1, 1 };
    CHECK_OK(dlm_safetensors_parse(&s, ctx, f.data, f.size));
    CHECK(s && s->count == 11);
    for (int i = 0; s && i < 9; i++) {
        char name[8];
        snprintf(name, sizeof name, "t%d", i);
        const dlm_st_tensor *t = dlm_safetensors_find(s, name);
        CHECK(t && t->dtype == DLM_DTYPE_OTHER && strcmp(t->type, types[i]) == 0);
        CHECK(t && t->n_dims == 5 && t->dims[0] == 3 && t->count == 3 && t->bytes == 1);
        if (t) CHECK_ERROR(dlm_safetensors_floats(ctx, t, x), DLM_E_UNSUPPORTED, ctx,
                           types[i]);
    }
    const dlm_st_tensor *w = s ? dlm_safetensors_find(s, "w") : NULL;
    CHECK(w && w->n_dims == 7 && w->dims[2] == 2 && w->dims[6] == 1 && w->count == 2);
    if (w) CHECK_OK(dlm_safetensors_floats(ctx, w, x));
    CHECK(x[0] == 0 && x[1] == 0);
    w = s ? dlm_safetensors_find(s, long_name) : NULL;
    CHECK(w && w->dtype == DLM_U8 && strcmp(w->name, long_name) == 0);
    if (s) file_touch(ctx, s, &f);
    dlm_safetensors_close(s);
    free(f.data);
    test_close(ctx);
}

/* Between the header and the end of the file every byte belongs to one tensor. */
TEST(safetensors_rejects_what_the_format_forbids)
{
    static const struct { const char *header; unsigned payload; const char *says; } bad[]
        = {
        { " {}", 0, "'{'" }, { "\n{}", 0, "'{'" }, { "{}", 1, "behind" },
        { "{" ENTRY("a", "U8", "[2]", "[0,2]") "}", 3, "behind" },
        { "{" ENTRY("a", "U8", "[2]", "[1,3]") "}", 3, "a: a hole" },
        { "{" ENTRY("a", "U8", "[1]", "[2,3]") "," ENTRY("b", "U8", "[1]", "[0,1]") "}",
          3, "a: a hole" },
        { "{" ENTRY("a", "U8", "[3]", "[0,3]") "," ENTRY("b", "U8", "[0]", "[1,1]") "}",
          3, "b: overlaps" },
        { "{" ENTRY("a", "U99", "[3]", "[0,3]") "," ENTRY("b", "U8", "[1]", "[2,3]") "}",
          3, "b: overlaps" },
        { "{" ENTRY("a", "U8\",\"dtype\":\"U8", "[1]", "[0,1]") "}", 1, "twice" },
        { "{" ENTRY("a", "U8", "[1],\"shape\":[1]", "[0,1]") "}", 1, "twice" },
        { "{" ENTRY("a", "U8", "[1]", "[0,1],\"data_offsets\":[0,1]") "}", 1, "twice" },
    };
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        LABEL("%.100s", bad[i].header);
        CHECK_ERROR(file_parse(ctx, bad[i].header, NULL, bad[i].payload), DLM_E_FORMAT,
                    ctx, bad[i].says);
    }
    LABEL("what it allows");
    CHECK_OK(file_parse(ctx, "{} \n\t ", NULL, 0));
    CHECK_OK(file_parse(ctx, "{" ENTRY("a", "U8", "[0]", "[1,1]") ","
                        ENTRY("b", "U8", "[1]", "[0,1]") ","
                        ENTRY("c", "F32", "[2,0]", "[0,0]") "}", NULL, 1));
    test_close(ctx);
}

TEST(safetensors_rejects_deep_nesting)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    char *header = (char *)test_malloc(300000);
    for (int k = 0; k < 4; k++) {
        static const char *const before[4] = {
            "{\"x\":", "{\"__metadata__\":{\"a\":", "{\"a\":{\"extra\":",
            "{\"a\":{\"dtype\":\"U8\",\"shape\":"
        };
        size_t n = strlen(before[k]);
        LABEL("nested after %s", before[k]);
        strcpy(header, before[k]);
        memset(header + n, '[', 200000);
        header[n + 200000] = 0;
        CHECK_ERROR(file_parse(ctx, header, NULL, 1), DLM_E_FORMAT, ctx, NULL);
        for (size_t i = 0; i < 40000; i++) memcpy(header + n + 5 * i, "{\"a\":", 5);
        CHECK_ERROR(file_parse(ctx, header, NULL, 1), DLM_E_FORMAT, ctx, NULL);
    }
    free(header);
    test_close(ctx);
}

TEST(safetensors_rejects_absurd_header_lengths)
{
    static const uint64_t lengths[] = {
        UINT64_MAX, UINT64_MAX - 7, UINT64_MAX - 8, (uint64_t)1 << 63, (uint64_t)1 << 32,
        3, 1000, 100000001
    };
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
        dlm_safetensors *s = NULL;
        test_file f = file_make("{}", 2, NULL, 0);
        for (int k = 0; k < 8; k++) f.data[k] = (unsigned char)(lengths[i] >> (8 * k));
        LABEL("%llu", (unsigned long long)lengths[i]);
        CHECK_ERROR(dlm_safetensors_parse(&s, ctx, f.data, f.size), DLM_E_FORMAT, ctx,
                    "header");
        CHECK(s == NULL);
        free(f.data);
    }
    test_close(ctx);
}

static const char file_sample[] =
    "{\"__metadata__\":{\"form\":\"te\\u0073t\"},"
    ENTRY("model.norm.weight", "BF16", "[2,3]", "[8,20]") ","
    ENTRY("b", "F64", "[1]", "[0,8]") "} ";

TEST(safetensors_rejects_every_truncation)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    test_file f = file_make(file_sample, sizeof file_sample - 1, NULL, 20);
    for (size_t n = 0; n <= f.size; n++) {
        dlm_safetensors *s = NULL;
        unsigned char *part = (unsigned char *)test_malloc(n);
        memcpy(part, f.data, n);
        LABEL("%u of %u bytes", (unsigned)n, (unsigned)f.size);
        CHECK_ERROR(dlm_safetensors_parse(&s, ctx, part, n),
                    n == f.size ? DLM_OK : DLM_E_FORMAT, ctx, NULL);
        CHECK((s != NULL) == (n == f.size));
        dlm_safetensors_close(s);
        free(part);
    }
    free(f.data);
    test_close(ctx);
}

TEST(safetensors_survives_every_changed_header_byte)
{
    static const unsigned char other[] = { 0, '"', '{', '}', '[', ']', ',', '\\', '9',
                                           '-', 0x80, 0xFF };
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    test_file f = file_make(file_sample, sizeof file_sample - 1, NULL, 20);
    for (size_t i = 0; i < f.size - 20; i++) {
        unsigned char kept = f.data[i];
        for (int k = 0; k < 8 + (int)sizeof other; k++) {
            dlm_safetensors *s = NULL;
            f.data[i] = k < 8 ? (unsigned char)(kept ^ (1 << k)) : other[k - 8];
            dlm_error e = dlm_safetensors_parse(&s, ctx, f.data, f.size);
            LABEL("byte %u is %02x", (unsigned)i, f.data[i]);
            CHECK((e == DLM_OK) == (s != NULL));
            CHECK(e == DLM_OK || dlm_last_error(ctx)[0] != 0);
            if (s) file_touch(ctx, s, &f);
            dlm_safetensors_close(s);
        }
        f.data[i] = kept;
    }
    free(f.data);
    test_close(ctx);
}

#ifndef DLM_NO_STDIO
#include <locale.h>

/* The whole file, or no data. */
static test_file file_read(const char *path)
{
    test_file f = { NULL, 0 };
    FILE *in = fopen(path, "rb");
    if (!in) return f;
    fseek(in, 0, SEEK_END);
    f.size = (size_t)ftell(in);
    rewind(in);
    f.data = (unsigned char *)test_malloc(f.size);
    if (fread(f.data, 1, f.size, in) != f.size) f.size = 0;
    fclose(in);
    return f;
}

static void file_write(const char *path, const void *data, size_t size)
{
    FILE *out = fopen(path, "wb");
    CHECK(out != NULL);
    if (!out) return;
    CHECK(fwrite(data, 1, size, out) == size);
    fclose(out);
}

static int file_equal(const test_file *a, const test_file *b)
{
    return a->data && b->data && a->size == b->size && !memcmp(a->data, b->data, a->size);
}

TEST(safetensors_parses_a_released_layout)
{
    static const char *const paths[2] = { "../shared/data/tiny_qwen3/model.safetensors",
                                          "shared/data/tiny_qwen3/model.safetensors" };
    FILE *in = fopen(paths[0], "rb");
    const char *path = in ? paths[0] : paths[1];
    if (in) fclose(in);
    else if (!(in = fopen(path, "rb"))) SKIP("no tiny_qwen3 beside the repository");
    else fclose(in);
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_safetensors *s = NULL;
    CHECK_OK(dlm_safetensors_open(&s, ctx, path));
    if (s) {
        const dlm_st_tensor *t = dlm_safetensors_find(s, "model.embed_tokens.weight");
        CHECK(s->count == 25);
        CHECK(t && t->dtype == DLM_BF16 && t->dims[0] == 256 && t->dims[1] == 64);
        float *x = test_floats(256 * 64);
        double sum = 0;
        if (t) CHECK_OK(dlm_safetensors_floats(ctx, t, x));
        for (int i = 0; t && i < 256 * 64; i++) sum += fabs((double)x[i]);
        CHECK(sum > 0 && sum < 1e6);
        free(x);
    }
    dlm_safetensors_close(s);
    test_close(ctx);
}

TEST(safetensors_open_reports_unreadable_files)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_safetensors *s = NULL;
    dlm_model *m = NULL;
    CHECK_ERROR(dlm_safetensors_open(&s, ctx, "dlm_test_absent.st"), DLM_E_IO, ctx,
                "dlm_test_absent.st");
    CHECK(s == NULL);
    CHECK_ERROR(dlm_load(&m, NULL, ctx, "dlm_test_absent.st"), DLM_E_IO, ctx,
                "dlm_test_absent.st");
    CHECK(m == NULL);
    CHECK(dlm_safetensors_open(&s, ctx, ".") != DLM_OK && s == NULL);
    file_write("dlm_test_empty.st", "", 0);
    dlm_error e = dlm_safetensors_open(&s, ctx, "dlm_test_empty.st");
    CHECK(e == DLM_E_IO || e == DLM_E_FORMAT);
    CHECK(s == NULL && strstr(dlm_last_error(ctx), "dlm_test_empty.st"));
    remove("dlm_test_empty.st");
    test_close(ctx);
}

/* ==[ checkpoints ]=========================================================== */

/* One of 64 configs: every feature on and off. */
static dlm_config checkpoint_config(int k)
{
    dlm_config c = toy_config(k % TOY_KINDS);
    c.kv_heads = k & 1 ? 2 : 1;
    c.untied_head = k >> 1 & 1;
    c.no_qk_norm = k >> 2 & 1;
    c.qkv_bias = k >> 3 & 1;
    c.head_dim = k >> 4 & 1 ? 6 : 0;
    c.ffn = k >> 5 & 1 ? 7 : 0;
    c.mask_id = k % 3 ? 0 : 4;
    c.block = 3 + k % 5;
    c.rope_theta = k & 2 ? 1012480.75f : 0;
    c.norm_eps = k & 4 ? 1.10555504e-07f : 0;     /* both need 9 digits */
    c.gelu_mlp = k % 3 == 1;
    c.head_bias = k % 5 > 2;
    c.max_seq = 1 + k;
    return c;
}

/* Odd values that a detour over text or arithmetic would lose. */
static void checkpoint_odd_weights(dlm_model *m)
{
    const float odd[6] = { -0.0f, 1e-42f, 3.4028235e38f, -3.4028235e38f, 1e-45f, 0.1f };
    for (size_t i = 0; i < 6; i++) m->weights[i * (m->n_params / 6)] = odd[i];
}

TEST(checkpoint_round_trip_is_bit_exact_with_every_feature)
{
    const char *path = "dlm_test_model.st", *again = "dlm_test_again.st";
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int k = 0; k < 64; k++) {
        dlm_model *a = NULL, *b = NULL, *c = NULL;
        dlm_config config = checkpoint_config(k);
        LABEL("config %d", k);
        CHECK_OK(dlm_model_create(&a, ctx, &config, (uint64_t)k, NULL));
        if (!a) continue;
        checkpoint_odd_weights(a);
        CHECK_OK(dlm_save(ctx, path, a, NULL));
        CHECK_OK(dlm_load(&b, NULL, ctx, path));
        test_file f = file_read(path);
        CHECK_OK(dlm_load_memory(&c, NULL, ctx, f.data, f.size));
        for (int i = 0; i < 2; i++) {
            const dlm_model *m = i ? c : b;
            if (!m) continue;
            CHECK(memcmp(&m->config, &a->config, sizeof a->config) == 0);
            CHECK(m->n_params == a->n_params);
            CHECK(memcmp(m->weights, a->weights, a->n_params * sizeof(float)) == 0);
        }
        if (b) CHECK_OK(dlm_save(ctx, again, b, NULL));
        test_file g = file_read(again);
        CHECK(file_equal(&f, &g));
        free(f.data);
        free(g.data);
        dlm_model_free(a);
        dlm_model_free(b);
        dlm_model_free(c);
    }
    remove(path);
    remove(again);
    test_close(ctx);
}

TEST(checkpoint_of_numbers_that_are_none_is_not_saved)
{
    static const uint32_t bad[3] = { 0x7FC00000u, 0x7F800000u, 0xFF800000u };
    const char *path = "dlm_test_finite.st";
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_model *m = toy_model(ctx, 2, 1);
    CHECK_OK(dlm_save(ctx, path, m, NULL));
    test_file f = file_read(path);
    for (int i = 0; i < 3 * dlm_model_tensors(m); i++) {
        dlm_tensor t;
        char place[80];
        dlm_model_tensor(m, i / 3, &t);
        const size_t last = (size_t)t.rows * (size_t)t.cols - 1;
        const float kept = t.data[last];
        snprintf(place, sizeof place, "%s[%u]", t.name, (unsigned)last);
        LABEL("%s, %08x", place, (unsigned)bad[i % 3]);
        memcpy(t.data + last, &bad[i % 3], sizeof kept);
        CHECK_ERROR(dlm_save(ctx, path, m, NULL), DLM_E_INPUT, ctx, place);
        t.data[last] = kept;
        test_file g = file_read(path);
        CHECK(file_equal(&f, &g));
        free(g.data);
    }
    CHECK_OK(dlm_save(ctx, path, m, NULL));
    remove(path);
    free(f.data);
    dlm_model_free(m);
    test_close(ctx);
}

/* Any bits, now and then special ones. */
static float number_float(int k)
{
    static const uint32_t special[] = {
        0, 0x80000000u, 1, 0x007FFFFFu, 0x00800000u, 0x7F7FFFFFu, 0xFF7FFFFFu,
        0x3F800000u, 0x4B7FFFFFu, 0x4B800000u, 0x501502F9u /* 1e10 */, 0x38D1B717u
    };
    const uint32_t bits = k < 12 ? special[k] : (uint32_t)(test_bits() >> 20);
    float x;
    memcpy(&x, &bits, 4);
    return fabsf(x) <= 3.4028235e38f ? x : 1.0f;
}

/* In the C locale the library's routines are the reference: the same characters, the
   same floats, the same refusals. */
TEST(numbers_in_files_are_what_the_c_library_would_write_and_read)
{
    static const char *const wrong[] = {
        "", "-", ".5", "5.", "1e", "1e+", "01", "-01", "+1", " 1", "1 ", "1,5", "0x10",
        "nan", "inf", "1e99", "-3.4028236e38", "1e99999999999999999999", "1.5.5", "1e5e5"
    };
    static const struct { const char *text; int sound; double v; } whole[] = {
        { "0", 1, 0 }, { "-7", 1, -7 }, { "9007199254740992", 1, 9007199254740992.0 },
        { "9007199254740993", 0, 0 }, { "9223372036854775808", 0, 0 }, { "-8", 0, 0 },
        { "99999999999999999999999", 0, 0 }, { "1.0", 0, 0 }, { "1e3", 0, 0 },
        { "07", 0, 0 }, { "", 0, 0 }, { "-", 0, 0 }, { "+1", 0, 0 }, { "1 ", 0, 0 }
    };
    char digits[300] = "";
    float x, y = 0, z;
    int64_t v = 0;
    for (int k = 0; k < 3000; k++) {
        char ours[DLM__NUMBER], theirs[64];
        x = number_float(k);
        dlm__float_text(ours, x);
        snprintf(theirs, sizeof theirs, "%.9g", (double)x);
        LABEL("%s", theirs);
        CHECK(strcmp(ours, theirs) == 0);
        CHECK(dlm__float_from(ours, &y) && memcmp(&x, &y, 4) == 0);
        snprintf(theirs, sizeof theirs, "%.*e", k % 44, (double)x * (1 + 3e-8 * (k % 3)));
        LABEL("%s", theirs);
        z = strtof(theirs, NULL);
        if (!(fabsf(z) <= 3.4028235e38f)) CHECK(!dlm__float_from(theirs, &y));
        else CHECK(dlm__float_from(theirs, &y) && memcmp(&z, &y, 4) == 0);
    }
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        LABEL("\"%s\"", wrong[i]);
        CHECK(!dlm__float_from(wrong[i], &y));
    }
    for (size_t i = 0; i < sizeof whole / sizeof *whole; i++) {
        LABEL("\"%s\"", whole[i].text);
        CHECK(dlm__int_from(whole[i].text, -7, (int64_t)1 << 53, &v) == whole[i].sound);
        if (whole[i].sound) CHECK((double)v == whole[i].v);
    }
    LABEL("half between two floats, and a little more");
    CHECK(dlm__float_from("16777217", &y) && y == 16777216.0f);
    CHECK(dlm__float_from("16777219", &y) && y == 16777220.0f);
    CHECK(dlm__float_from("16777217.00000000000000000000000000000000000000000000001", &y)
          && y == 16777218.0f);
    CHECK(dlm__float_from("1e-99999999999999999999", &y) && y == 0);
    LABEL("long ones");
    memset(digits, '0', sizeof digits);
    memcpy(digits, "1.5", 3);
    digits[255] = 0;
    CHECK(dlm__float_from(digits, &y) && y == 1.5f);
    digits[254] = 'e';                     /* no number; and one that is too long  */
    CHECK(!dlm__float_from(digits, &y));
    digits[254] = digits[255] = '0';
    digits[256] = 0;
    CHECK(!dlm__float_from(digits, &y));
}

/* Under a locale with another decimal point, of one byte or two, the numbers in a file
   are written and read as everywhere else. */
TEST(checkpoint_does_not_depend_on_the_locale)
{
    static const char *const commas[] = {
        "ps_AF", "ps_AF.UTF-8", "fa_IR", "fa_IR.UTF-8", "de_DE.UTF-8", "de_DE.utf8",
        "fr_FR.UTF-8", "fr_FR.utf8", "de_DE", "German_Germany.1252"
    };
    const char *path = "dlm_test_comma.st", *found = NULL;
    for (size_t i = 0; i < sizeof commas / sizeof commas[0] && !found; i++)
        found = setlocale(LC_NUMERIC, commas[i]);
    if (!found) SKIP("no locale with another decimal point is installed");
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_model *m = NULL, *back = NULL, *there = NULL;
    dlm_config c = checkpoint_config(6);
    CHECK_OK(dlm_model_create(&m, ctx, &c, 1, NULL));
    if (m) CHECK_OK(dlm_save(ctx, path, m, NULL));
    CHECK_OK(dlm_load(&there, NULL, ctx, path));
    setlocale(LC_NUMERIC, "C");
    CHECK_OK(dlm_load(&back, NULL, ctx, path));
    if (m && back) CHECK(memcmp(&m->config, &back->config, sizeof m->config) == 0);
    if (m && there) CHECK(memcmp(&m->config, &there->config, sizeof m->config) == 0);
    test_file f = file_read(path), g;
    if (m) CHECK_OK(dlm_save(ctx, path, m, NULL));
    g = file_read(path);
    CHECK(file_equal(&f, &g));
    free(f.data);
    free(g.data);
    dlm_model_free(there);
    dlm_model_free(m);
    dlm_model_free(back);
    remove(path);
    test_close(ctx);
}

TEST(checkpoint_carries_its_tokenizer)
{
    const char *path = "dlm_test_tok.st";
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int kind = 0; kind < 2; kind++) {
        dlm_model *m = NULL, *loaded = NULL;
        dlm_tokenizer *t = NULL, *back = NULL;
        int a[32], b[32];
        size_t n = 0, k = 0, size = sizeof tokenizer_corpus - 1;
        CHECK_OK(dlm_tokenizer_create(&t, ctx, (dlm_tokenizer_kind)kind, tokenizer_corpus,
                                      size));
        dlm_config c = toy_config(2);
        if (t) c.vocab = t->vocab;
        CHECK_OK(dlm_model_create(&m, ctx, &c, 1, NULL));
        if (m) CHECK_OK(dlm_save(ctx, path, m, t));
        CHECK_OK(dlm_load(&loaded, &back, ctx, path));
        CHECK(back != NULL);
        if (t && back) {
            CHECK(back->vocab == t->vocab);
            CHECK_OK(dlm_encode(t, tokenizer_corpus, size, a, 32, &n));
            CHECK_OK(dlm_encode(back, tokenizer_corpus, size, b, 32, &k));
            CHECK(n == k && memcmp(a, b, n * sizeof a[0]) == 0);
        }
        dlm_tokenizer_free(back);
        dlm_model_free(loaded);
        loaded = NULL;
        CHECK_OK(dlm_load(&loaded, NULL, ctx, path));      /* not asked for */
        dlm_model_free(loaded);
        if (m) CHECK_OK(dlm_save(ctx, path, m, NULL));
        loaded = NULL;
        back = (dlm_tokenizer *)m;                         /* none there: NULL */
        CHECK_OK(dlm_load(&loaded, &back, ctx, path));
        CHECK(back == NULL);
        dlm_model_free(loaded);
        dlm_tokenizer_free(t);
        dlm_model_free(m);
    }
    remove(path);
    test_close(ctx);
}

/* Quotes, backslashes, control characters and zero are characters like any other. */
TEST(checkpoint_carries_every_character)
{
    enum { N = 127 };                      /* 1 .. 127; a zero is refused          */
    const char *path = "dlm_test_chars.st";
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_model *m = NULL, *loaded = NULL;
    dlm_tokenizer *t = NULL, *back = NULL;
    char text[N], out[N + 1];
    int ids[N];
    size_t n = 0;
    CHECK_ERROR(dlm_tokenizer_create(&t, ctx, DLM_TOKENIZER_CHARS, "a\0b", 3),
                DLM_E_INPUT, ctx, "zero");
    CHECK(t == NULL);
    for (int i = 0; i < N; i++) text[i] = (char)(i + 1);
    CHECK_OK(dlm_tokenizer_create(&t, ctx, DLM_TOKENIZER_CHARS, text, N));
    dlm_config c = toy_config(2);
    c.vocab = N + 2;
    CHECK_OK(dlm_model_create(&m, ctx, &c, 1, NULL));
    if (m && t) CHECK_OK(dlm_save(ctx, path, m, t));
    CHECK_OK(dlm_load(&loaded, &back, ctx, path));
    if (back) {
        CHECK_OK(dlm_encode(back, text, N, ids, N, &n));
        CHECK(n == N && dlm_decode(back, ids, n, out, sizeof out) == N);
        CHECK(memcmp(out, text, N) == 0);
    }
    dlm_tokenizer_free(back);
    dlm_tokenizer_free(t);
    dlm_model_free(loaded);
    dlm_model_free(m);
    remove(path);
    test_close(ctx);
}

/* A checkpoint of a few kilobytes with a tokenizer, in memory. */
static test_file checkpoint_bytes(dlm_ctx *ctx, dlm_model **keep)
{
    const char *path = "dlm_test_small.st";
    dlm_model *m = NULL;
    dlm_tokenizer *t = NULL;
    dlm_config c = {0};
    c.vocab = 5;
    c.dim = 4;
    c.layers = 1;
    c.heads = 1;
    c.ffn = 3;
    c.max_seq = 8;
    CHECK_OK(dlm_model_create(&m, ctx, &c, 1, NULL));
    CHECK_OK(dlm_tokenizer_create(&t, ctx, DLM_TOKENIZER_CHARS, "ab\xC3\xA9", 4));
    if (m && t) CHECK_OK(dlm_save(ctx, path, m, t));
    test_file f = file_read(path);
    CHECK(f.size > 0);
    remove(path);
    dlm_tokenizer_free(t);
    if (keep) *keep = m;
    else dlm_model_free(m);
    return f;
}

TEST(checkpoint_rejects_every_truncation)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    test_file f = checkpoint_bytes(ctx, NULL);
    for (size_t n = 0; n < f.size; n++) {
        dlm_model *m = NULL;
        dlm_tokenizer *t = NULL;
        unsigned char *part = (unsigned char *)test_malloc(n);
        memcpy(part, f.data, n);
        LABEL("%u of %u bytes", (unsigned)n, (unsigned)f.size);
        CHECK_ERROR(dlm_load_memory(&m, &t, ctx, part, n), DLM_E_FORMAT, ctx, NULL);
        CHECK(m == NULL && t == NULL);
        free(part);
    }
    free(f.data);
    test_close(ctx);
}

TEST(checkpoint_survives_every_changed_header_byte)
{
    static const unsigned char other[] = { 0, '"', '}', '9', 0xFF };
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    test_file f = checkpoint_bytes(ctx, NULL);
    size_t end = f.size ? 8 + (f.data[0] | (size_t)f.data[1] << 8) : 0;
    for (size_t i = 0; i < end && end <= f.size; i++) {
        unsigned char kept = f.data[i];
        for (int k = 0; k < 4 + (int)sizeof other; k++) {
            dlm_model *m = NULL;
            dlm_tokenizer *t = NULL;
            f.data[i] = k < 4 ? (unsigned char)(kept ^ (1 << 2 * k)) : other[k - 4];
            LABEL("byte %u is %02x", (unsigned)i, f.data[i]);
            dlm_error e = dlm_load_memory(&m, &t, ctx, f.data, f.size);
            CHECK((e == DLM_OK) == (m != NULL));
            CHECK(e == DLM_OK || (t == NULL && dlm_last_error(ctx)[0] != 0));
            CHECK(e != DLM_E_NOMEM && e != DLM_E_IO);
            dlm_tokenizer_free(t);
            dlm_model_free(m);
        }
        f.data[i] = kept;
    }
    free(f.data);
    test_close(ctx);
}
#endif /* DLM_NO_STDIO */
#ifndef DLM_NO_STDIO
/* What to do to the entry of one tensor when a header is written anew. */
enum { EDIT_NONE, EDIT_RENAME, EDIT_DROP, EDIT_RESHAPE, EDIT_EXTRA };

/* The shape of a tensor, or another one of as many elements. */
static void checkpoint_shape(char *out, size_t size, const dlm_st_tensor *t, int other)
{
    int rows = (int)t->dims[0], cols = t->n_dims > 1 ? (int)t->dims[1] : 0;
    if (other && cols && rows != cols) snprintf(out, size, "%d,%d", cols, rows);
    else if (other && cols) snprintf(out, size, "%d", rows * cols);
    else if (other) snprintf(out, size, "%d,%d", 2 + rows % 2, rows / (2 + rows % 2));
    else if (cols) snprintf(out, size, "%d,%d", rows, cols);
    else snprintf(out, size, "%d", rows);
}

/* The checkpoint f with one tensor's entry edited; its metadata stays as it is. */
static test_file checkpoint_edit(dlm_ctx *ctx, const test_file *f, int which, int edit)
{
    dlm_safetensors *s = NULL;
    char *h = (char *)test_malloc(f->size + 4096);
    const char *text = (const char *)f->data + 8;
    size_t header = f->data[0] | (size_t)f->data[1] << 8;
    const unsigned char *payload = f->data + 8 + header;
    const dlm_st_tensor *gone = NULL;      /* its bytes go with it                 */
    int n = 0;
    CHECK_OK(dlm_safetensors_parse(&s, ctx, f->data, f->size));
    if (s && edit == EDIT_DROP) gone = &s->tensors[which];
    const char *meta = strstr(text, "\"__metadata__\"");
    const char *end = meta ? meta : text;
    while (meta && !(end[0] == '"' && end[1] == '}')) end++;
    n += sprintf(h + n, "{%.*s\"}", (int)(end - meta), meta);
    for (int i = 0; s && i < s->count; i++) {
        const dlm_st_tensor *t = &s->tensors[i];
        size_t at = (size_t)((const unsigned char *)t->data - payload);
        char name[140], shape[60];
        int hit = i == which;
        if (t == gone) continue;
        if (gone && t->data > gone->data) at -= gone->bytes;
        snprintf(name, sizeof name, "%s", t->name);
        if (hit && edit == EDIT_RENAME) name[strlen(name) - 1] = '!';
        checkpoint_shape(shape, sizeof shape, t, hit && edit == EDIT_RESHAPE);
        n += sprintf(h + n, ",\"%s\":{\"dtype\":\"F32\",\"shape\":[%s],"
                     "\"data_offsets\":[%u,%u]}", name, shape, (unsigned)at,
                     (unsigned)(at + 4 * t->count));
    }
    if (edit == EDIT_EXTRA)
        n += sprintf(h + n, ",\"stray.weight\":{\"dtype\":\"F32\",\"shape\":[0],"
                     "\"data_offsets\":[0,0]}");
    n += sprintf(h + n, "}");
    size_t bytes = gone ? gone->bytes : 0, size = f->size - 8 - header - bytes;
    size_t before = gone ? (size_t)((const unsigned char *)gone->data - payload) : size;
    test_file g = file_make(h, (size_t)n, payload, size);
    memcpy(g.data + 8 + n + before, payload + before + bytes, size - before);
    dlm_safetensors_close(s);
    free(h);
    return g;
}

static void checkpoint_try_edit(dlm_ctx *ctx, const test_file *f, int which, int edit,
                                const char *name)
{
    dlm_model *m = NULL;
    dlm_tokenizer *t = NULL;
    test_file g = checkpoint_edit(ctx, f, which, edit);
    LABEL("tensor %d, edit %d", which, edit);
    CHECK_ERROR(dlm_load_memory(&m, &t, ctx, g.data, g.size),
                edit == EDIT_NONE ? DLM_OK : DLM_E_MISMATCH, ctx, name);
    CHECK((m != NULL) == (edit == EDIT_NONE) && (t != NULL) == (edit == EDIT_NONE));
    dlm_tokenizer_free(t);
    dlm_model_free(m);
    free(g.data);
}

TEST(checkpoint_mismatch_names_the_tensor)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_safetensors *s = NULL;
    test_file f = checkpoint_bytes(ctx, NULL);
    CHECK_OK(dlm_safetensors_parse(&s, ctx, f.data, f.size));
    checkpoint_try_edit(ctx, &f, -1, EDIT_NONE, NULL);
    checkpoint_try_edit(ctx, &f, -1, EDIT_EXTRA, "stray.weight");
    CHECK(s && s->count > 5);
    for (int i = 0; s && i < s->count; i++) {
        char name[140];
        snprintf(name, sizeof name, "%s", s->tensors[i].name);
        checkpoint_try_edit(ctx, &f, i, EDIT_DROP, name);
        checkpoint_try_edit(ctx, &f, i, EDIT_RESHAPE, name);
        name[strlen(name) - 1] = 0;
        checkpoint_try_edit(ctx, &f, i, EDIT_RENAME, name);
    }
    dlm_safetensors_close(s);
    free(f.data);
    test_close(ctx);
}

/* 9,000 tensors that are looked for, 9,000 that nobody looks for: with one look at all
   of them for each it takes many seconds. */
TEST(checkpoint_of_many_tensors_loads_in_no_time)
{
    const char *path = "dlm_test_many.st";
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_model *m = NULL, *back = NULL;
    dlm_config c = {0};
    c.vocab = c.dim = 2;
    c.layers = 1024;
    c.heads = c.ffn = c.max_seq = 1;
    CHECK_OK(dlm_model_create(&m, ctx, &c, 1, NULL));
    if (m) CHECK_OK(dlm_save(ctx, path, m, NULL));
    test_file f = file_read(path);
    size_t header = 0, at = m ? m->n_params * sizeof(float) : 0;
    for (int i = 0; i < 4; i++) header |= (size_t)f.data[i] << (8 * i);
    char *h = (char *)test_malloc(header + 1000000);
    size_t n = header;
    memcpy(h, f.data + 8, header);
    while (h[n - 1] != '}') n--;
    n--;
    for (int i = 0; i < 9000; i++)
        n += (size_t)sprintf(h + n, ",\"z%04d\":{\"dtype\":\"F32\",\"shape\":[0],"
                             "\"data_offsets\":[%u,%u]}", i, (unsigned)at, (unsigned)at);
    h[n++] = '}';
    test_file g = file_make(h, n, f.data + 8 + header, f.size - 8 - header);
    clock_t begin = clock();
    CHECK_OK(dlm_load_memory(&back, NULL, ctx, f.data, f.size));
    dlm_model_free(back);
    CHECK_ERROR(dlm_load_memory(&back, NULL, ctx, g.data, g.size), DLM_E_MISMATCH, ctx,
                "z0000");
    CHECK((double)(clock() - begin) / CLOCKS_PER_SEC < 2.0);
    remove(path);
    free(h);
    free(f.data);
    free(g.data);
    dlm_model_free(m);
    test_close(ctx);
}

#ifndef _WIN32
#include <dirent.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

/* Entries of this directory whose name contains `part`. */
static int file_count(const char *part)
{
    int n = 0;
    DIR *d = opendir(".");
    CHECK(d != NULL);
    for (struct dirent *e = d ? readdir(d) : NULL; e; e = readdir(d))
        n += strstr(e->d_name, part) != NULL;
    if (d) closedir(d);
    return n;
}

/* A save that breaks off after `limit` bytes, as on a full disk. */
static dlm_error checkpoint_save_limited(dlm_ctx *ctx, const char *path,
                                         const dlm_model *m, dlm_trainer *t, rlim_t limit)
{
    struct rlimit kept, low;
    if (getrlimit(RLIMIT_FSIZE, &kept)) return DLM_E_IO;
    void (*handler)(int) = signal(SIGXFSZ, SIG_IGN);
    low = kept;
    low.rlim_cur = limit;
    setrlimit(RLIMIT_FSIZE, &low);
    dlm_error e = t ? dlm_trainer_save(t, path) : dlm_save(ctx, path, m, NULL);
    setrlimit(RLIMIT_FSIZE, &kept);
    signal(SIGXFSZ, handler);
    return e;
}

TEST(checkpoint_failing_save_keeps_the_old_file_and_leaves_no_other)
{
    const char *path = "dlm_test_kept.st";
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_model *m = toy_model(ctx, 2, 1), *other = toy_model(ctx, 2, 2);
    dlm_trainer *t = NULL;
    if (m) CHECK_OK(dlm_trainer_create(&t, ctx, m, NULL, NULL));
    if (m && other && t) {
        CHECK_OK(dlm_save(ctx, path, m, NULL));
        test_file before = file_read(path);
        for (rlim_t limit = 0; limit <= before.size - 1; limit += before.size / 7) {
            LABEL("%u bytes", (unsigned)limit);
            CHECK_ERROR(checkpoint_save_limited(ctx, path, other, NULL, limit), DLM_E_IO,
                        ctx, path);
            CHECK_ERROR(checkpoint_save_limited(ctx, path, NULL, t, limit), DLM_E_IO, ctx,
                        path);
            test_file after = file_read(path);
            CHECK(file_equal(&before, &after));
            CHECK(file_count("dlm_test_kept") == 1);
            free(after.data);
        }
        CHECK_ERROR(dlm_save(ctx, "dlm_test_nowhere/x.st", m, NULL), DLM_E_IO, ctx,
                    "dlm_test_nowhere/x.st");
        CHECK_ERROR(dlm_trainer_save(t, "dlm_test_nowhere/x.st"), DLM_E_IO, ctx,
                    "dlm_test_nowhere/x.st");
        CHECK(mkdir("dlm_test_dir.st", 0777) == 0);
        CHECK_ERROR(dlm_save(ctx, "dlm_test_dir.st", m, NULL), DLM_E_IO, ctx,
                    "dlm_test_dir.st");
        CHECK(file_count("dlm_test_dir") == 1 && file_count("dlm_test_nowhere") == 0);
        CHECK(rmdir("dlm_test_dir.st") == 0);
        LABEL("over an old one");
        CHECK_OK(dlm_save(ctx, path, other, NULL));
        test_file after = file_read(path);
        CHECK(!file_equal(&before, &after) && before.size == after.size);
        CHECK(file_count("dlm_test_kept") == 1);
        free(before.data);
        free(after.data);
    }
    remove(path);
    dlm_trainer_free(t);
    dlm_model_free(m);
    dlm_model_free(other);
    test_close(ctx);
}

#include <sys/wait.h>
#if defined(__STRICT_ANSI__) && !defined(__cplusplus)
extern int symlink(const char *to, const char *path);      /* hidden by -std=c99  */
#endif

static int file_mode(const char *path)     /* 0: not there                         */
{
    struct stat st;
    return stat(path, &st) == 0 ? (int)st.st_mode & 0777 : 0;
}

static int file_is_link(const char *path)
{
    char to[256];
    return readlink(path, to, sizeof to) > 0;
}

TEST(checkpoint_keeps_the_mode_of_an_old_file_and_the_files_of_others)
{
    const char *path = "dlm_test_mode.st";
    const char *const others[2] = { "dlm_test_mode.st.part", "dlm_test_mode.st.0.part" };
    static const int modes[] = { 0600, 0644, 0664, 0400 };
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_model *m = toy_model(ctx, 2, 1), *back = NULL;
    for (int i = 0; i < 2; i++) file_write(others[i], "mine", 4);
    mode_t kept = umask(027);
    remove(path);
    CHECK_OK(dlm_save(ctx, path, m, NULL));
    CHECK(file_mode(path) == 0640);                        /* new: as the mask says */
    umask(077);
    for (size_t i = 0; i < sizeof modes / sizeof *modes; i++) {
        LABEL("mode %o", (unsigned)modes[i]);
        CHECK(chmod(path, (mode_t)modes[i]) == 0);
        CHECK_OK(dlm_save(ctx, path, m, NULL));
        CHECK(file_mode(path) == modes[i]);
    }
    umask(kept);
    CHECK_OK(dlm_load(&back, NULL, ctx, path));
    for (int i = 0; i < 2; i++) {
        test_file f = file_read(others[i]);
        CHECK(f.size == 4 && memcmp(f.data, "mine", 4) == 0);
        free(f.data);
        remove(others[i]);
    }
    CHECK(file_count("dlm_test_mode") == 1);
    remove(path);
    dlm_model_free(back);
    dlm_model_free(m);
    test_close(ctx);
}

TEST(checkpoint_is_saved_through_links)
{
    static const char *const links[][2] = {                /* path, what it says   */
        { "dlm_test_l1.st", "dlm_test_d/l2.st" }, { "dlm_test_d/l2.st", "real.st" },
        { "dlm_test_l3.st", "./dlm_test_l1.st" }, { "dlm_test_l4.st", "dlm_test_l4.st" }
    };
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_model *m = toy_model(ctx, 2, 1), *back = NULL;
    CHECK(mkdir("dlm_test_d", 0777) == 0);
    for (int i = 0; i < 4; i++) CHECK(symlink(links[i][1], links[i][0]) == 0);
    for (int i = 0; i < 3; i++) {                          /* the first to nothing */
        LABEL("link %d", i);
        CHECK_OK(dlm_save(ctx, links[i][0], m, NULL));
        for (int k = 0; k < 4; k++) CHECK(file_is_link(links[k][0]));
        CHECK(!file_is_link("dlm_test_d/real.st"));
        CHECK_OK(dlm_load(&back, NULL, ctx, "dlm_test_d/real.st"));
        CHECK(remove("dlm_test_d/real.st") == 0);
        dlm_model_free(back);
    }
    CHECK_ERROR(dlm_save(ctx, links[3][0], m, NULL), DLM_E_IO, ctx, "links");
    for (int i = 0; i < 4; i++) CHECK(remove(links[i][0]) == 0);
    CHECK(rmdir("dlm_test_d") == 0 && file_count("dlm_test_l") == 0);
    dlm_model_free(m);
    test_close(ctx);
}

/* Neither opening for reading waits for a writer nor does saving replace it. */
TEST(pipes_and_devices_are_refused_at_once)
{
    static const char *const paths[2] = { "dlm_test_fifo.st", "dlm_test_fifo2.st" };
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_model *m = toy_model(ctx, 2, 1), *back = NULL;
    dlm_trainer *t = NULL;
    dlm_tokenizer *tok = NULL;
    struct stat st;
    if (m) CHECK_OK(dlm_trainer_create(&t, ctx, m, NULL, NULL));
    if (mkfifo(paths[0], 0600) != 0) SKIP("no FIFO here");
    CHECK(symlink(paths[0], paths[1]) == 0);
    alarm(20);                                             /* ends what would wait */
    for (int i = 0; i < 2; i++) {
        const char *const path = paths[i], *text = "not a regular file";
        CHECK_ERROR(dlm_load(&back, NULL, ctx, path), DLM_E_IO, ctx, text);
        CHECK_ERROR(dlm_load(&back, NULL, ctx, path), DLM_E_IO, ctx, text);
        CHECK_ERROR(dlm_tokenizer_load(&tok, ctx, DLM_TOKENIZER_CHARS, path), DLM_E_IO,
                    ctx, text);
        CHECK_ERROR(dlm_trainer_load(t, path), DLM_E_IO, ctx, text);
        CHECK_ERROR(dlm_save(ctx, path, m, NULL), DLM_E_IO, ctx, text);
        CHECK_ERROR(dlm_trainer_save(t, path), DLM_E_IO, ctx, text);
        CHECK(stat(path, &st) == 0 && S_ISFIFO(st.st_mode));
    }
    alarm(0);
    CHECK(file_is_link(paths[1]) && file_count("dlm_test_fifo") == 2);
    CHECK(dlm__file_mode("/dev/null") == -2);   /* saving there might really do it */
    CHECK_ERROR(dlm_load(&back, NULL, ctx, "/dev/null"), DLM_E_IO, ctx, "regular");
    for (int i = 0; i < 2; i++) remove(paths[i]);
    dlm_trainer_free(t);
    dlm_model_free(m);
    test_close(ctx);
}

static dlm_ctx *heap_open(test_heap *heap, int threads);   /* in section memory      */

TEST(files_that_cannot_be_mapped_are_read)
{
    const char *path = "dlm_test_read.st";
    test_heap heap = {0};
    dlm_ctx *ctx = heap_open(&heap, 1);
    dlm_model *m = toy_model(ctx, 2, 1), *back = NULL;
    dlm_tokenizer *tok = NULL;
    CHECK_OK(dlm_save(ctx, path, m, NULL));
    test_file f = file_read(path);
    const int live = heap.live;
    test_refuse_maps = 1;
    CHECK_OK(dlm_load(&back, NULL, ctx, path));
    if (m && back)
        CHECK(memcmp(m->weights, back->weights, m->n_params * sizeof(float)) == 0);
    dlm_model_free(back);
    back = NULL;
    heap.fail_at = heap.calls + 1;
    CHECK_ERROR(dlm_load(&back, NULL, ctx, path), DLM_E_IO, ctx, path);
    CHECK(heap.last == f.size && heap.live == live);
    file_write(path, "abc", 3);
    CHECK_OK(dlm_tokenizer_load(&tok, ctx, DLM_TOKENIZER_CHARS, path));
    CHECK(tok && tok->vocab == 5);
    dlm_tokenizer_free(tok);
    CHECK_ERROR(dlm_load(&back, NULL, ctx, path), DLM_E_FORMAT, ctx, path);
    CHECK(heap.live == live);
    test_refuse_maps = 0;
    remove(path);
    free(f.data);
    dlm_model_free(m);
    test_close(ctx);
}

/* Saves its own model over and over; never returns. */
static void checkpoint_writer(const char *path, uint64_t seed, int times)
{
    dlm_ctx *ctx = NULL;
    dlm_model *m = NULL;
    dlm_config c = toy_config(2);
    int bad = dlm_init(&ctx, NULL) || dlm_model_create(&m, ctx, &c, seed, NULL);
    while (!bad && times-- > 0) bad = dlm_save(ctx, path, m, NULL) != DLM_OK;
    _exit(bad);
}

TEST(checkpoint_of_two_writers_is_always_that_of_one)
{
    const char *path = "dlm_test_both.st";
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_model *m[2] = { NULL, NULL };
    dlm_config c = toy_config(2);
    for (int i = 0; i < 2; i++)
        CHECK_OK(dlm_model_create(&m[i], ctx, &c, (uint64_t)i + 1, NULL));
    size_t bytes = m[0] ? m[0]->n_params * sizeof(float) : 0;
    int left = 2, status = 0;
    CHECK_OK(dlm_save(ctx, path, m[0], NULL));
    fflush(NULL);
    for (int i = 0; i < 2; i++) {
        const pid_t child = fork();
        if (child == 0) checkpoint_writer(path, (uint64_t)i + 1, 40);
        if (child < 0) left--;
    }
    if (left < 2) printf("fork failed\n");
    while (left > 0) {
        dlm_model *back = NULL;
        CHECK_OK(dlm_load(&back, NULL, ctx, path));
        if (back) CHECK(memcmp(back->weights, m[0]->weights, bytes) == 0
                        || memcmp(back->weights, m[1]->weights, bytes) == 0);
        dlm_model_free(back);
        if (waitpid(-1, &status, WNOHANG) <= 0) continue;
        CHECK(status == 0);
        left--;
    }
    CHECK(file_count("dlm_test_both") == 1);
    remove(path);
    for (int i = 0; i < 2; i++) dlm_model_free(m[i]);
    test_close(ctx);
}
#endif /* _WIN32 */
#endif /* DLM_NO_STDIO */

/* ==[ trainer ]=============================================================== */

enum { TRAIN_TEXT = 200, TRAIN_SEQS = 8 };

/* A text in which the next token mostly follows from the last: 1, 2, 3, ... with a
   jump now and then. */
static void train_text(int *text)
{
    dlm_address at = { 4, DLM_RANDOM_USER, 0, 0, 0 };
    int token = 0;
    for (int i = 0; i < TRAIN_TEXT; i++) {
        token = dlm_uniform(&at, (uint32_t)i) < 0.1 ? (token + 5) % TOY_MASK
                                                    : (token + 1) % TOY_MASK;
        text[i] = token;
    }
}

/* Eight ragged examples out of a text. */
static void train_examples(dlm_example *e, const int *text)
{
    static const int lengths[TRAIN_SEQS] = { 24, 5, 17, 2, 24, 9, 12, 24 };
    static const int prompts[TRAIN_SEQS] = { 0, 1, 6, 1, 23, 0, 4, 11 };
    for (int i = 0; i < TRAIN_SEQS; i++) {
        e[i].tokens = text + 20 * i;
        e[i].length = lengths[i];
        e[i].prompt = prompts[i];
        e[i].canvas = 0;
    }
}

/* FULL, BLOCK and CAUSAL models with the objective of their pattern. */
static const int train_kinds[3] = { 0, 2, 4 };

typedef struct train_rig {
    dlm_model   *m;
    dlm_trainer *t;
} train_rig;

static train_rig train_open(dlm_ctx *ctx, int kind, uint64_t seed,
                            const dlm_train_options *o)
{
    train_rig r = { NULL, NULL };
    dlm_config c = toy_config(kind);
    CHECK_OK(dlm_model_create(&r.m, ctx, &c, seed, NULL));
    if (r.m) CHECK_OK(dlm_trainer_create(&r.t, ctx, r.m, o, NULL));
    return r;
}

static void train_close(train_rig *r)
{
    dlm_trainer_free(r->t);
    dlm_model_free(r->m);
}

/* Steps of both kinds in turn, so that every stream of randomness is used. */
static void train_run(train_rig *r, const int *text, int steps)
{
    dlm_example e[TRAIN_SEQS];
    train_examples(e, text);
    for (int i = 0; i < steps; i++) {
        if (r->t->steps % 2)
            CHECK_OK(dlm_trainer_step(r->t, e, TRAIN_SEQS, NULL));
        else
            CHECK_OK(dlm_trainer_step_text(r->t, text, TRAIN_TEXT, 20, 4, NULL));
    }
}

static int train_same(const train_rig *a, const train_rig *b)
{
    const float *x = a->t->ema, *y = b->t->ema;
    size_t size = a->m->n_params * sizeof(float);
    return a->t->steps == b->t->steps
        && memcmp(a->m->weights, b->m->weights, size) == 0
        && (x != NULL) == (y != NULL) && (!x || memcmp(x, y, size) == 0);
}

static dlm_train_options train_options(void)
{
    dlm_train_options o = {0};
    o.lr = 5e-3f;
    o.warmup = 2;
    o.total = 20;
    o.schedule = DLM_SCHEDULE_COSINE;
    o.weight_decay = 0.1f;
    o.seed = 9;
    return o;
}

#ifndef DLM_NO_STDIO
static void train_try_resume(dlm_ctx *ctx, int kind, const dlm_train_options *o)
{
    const char *path = "dlm_test_state.st", *again = "dlm_test_state2.st";
    int text[TRAIN_TEXT];
    train_text(text);
    train_rig a = train_open(ctx, kind, 1, o), b = train_open(ctx, kind, 1, o);
    train_rig c = train_open(ctx, kind, 77, o);          /* other weights at first */
    if (a.t && b.t && c.t) {
        train_run(&a, text, 7);
        train_run(&b, text, 3);
        CHECK_OK(dlm_trainer_save(b.t, path));
        train_run(&b, text, 4);                          /* saving changes nothing */
        CHECK(train_same(&a, &b));
        train_run(&c, text, 1);
        CHECK_OK(dlm_trainer_load(c.t, path));
        CHECK(c.t->steps == 3);
        train_run(&c, text, 4);
        CHECK(train_same(&a, &c));
        for (int k = 0; k < 2; k++) {                    /* both files, byte for byte */
            if (k) CHECK_OK(dlm_save(ctx, path, a.m, NULL));
            else CHECK_OK(dlm_trainer_save(a.t, path));
            if (k) CHECK_OK(dlm_save(ctx, again, c.m, NULL));
            else CHECK_OK(dlm_trainer_save(c.t, again));
            test_file f = file_read(path), g = file_read(again);
            CHECK(file_equal(&f, &g));
            free(f.data);
            free(g.data);
        }
    }
    train_close(&a);
    train_close(&b);
    train_close(&c);
    remove(path);
    remove(again);
}

TEST(trainer_resumes_bit_exactly)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int k = 0; k < 12; k++) {
        dlm_train_options o = train_options();
        o.ema = k < 6 ? 0.9f : 0;
        o.max_rows = k / 3 % 2 ? 60 : 0;
        LABEL("%s, ema %g, max_rows %d", toy_kind_names[train_kinds[k % 3]],
              (double)o.ema, o.max_rows);
        train_try_resume(ctx, train_kinds[k % 3], &o);
    }
    test_close(ctx);
}

/* Cut short and with bytes of the header changed; where a change does no harm to the
   meaning, the state is as loaded, and one step leads to b's again. */
static void train_try_broken_files(dlm_ctx *ctx, train_rig *a, const train_rig *b,
                                   const char *path, const int *text)
{
    test_file f = file_read(path);                       /* a sound state */
    size_t header = f.size ? f.data[0] | (size_t)f.data[1] << 8 : 0;
    for (size_t n = 1; n < f.size; n += n < 3000 ? 31 : 911) {
        file_write(path, f.data, n);
        LABEL("%u of %u bytes", (unsigned)n, (unsigned)f.size);
        CHECK_ERROR(dlm_trainer_load(a->t, path), DLM_E_FORMAT, ctx, NULL);
        CHECK(train_same(a, b));
    }
    for (size_t i = 0; i < 8 + header && i < f.size; i += 3) {
        unsigned char kept = f.data[i];
        f.data[i] = (unsigned char)(i % 2 ? '1' : kept ^ 0x55);
        file_write(path, f.data, f.size);
        f.data[i] = kept;
        LABEL("byte %u changed", (unsigned)i);
        if (dlm_trainer_load(a->t, path) == DLM_OK) {
            file_write(path, f.data, f.size);
            CHECK_OK(dlm_trainer_load(a->t, path));
            train_run(a, text, 1);
        }
        CHECK(train_same(a, b));
    }
    free(f.data);
}

/* Loads each wrong file into a; b never sees them; afterwards both train alike. */
static void train_try_wrong_files(dlm_ctx *ctx, train_rig *a, const char *path)
{
    LABEL("absent");
    remove(path);
    CHECK_ERROR(dlm_trainer_load(a->t, path), DLM_E_IO, ctx, path);
    LABEL("checkpoint");
    CHECK_OK(dlm_save(ctx, path, a->m, NULL));
    CHECK_ERROR(dlm_trainer_load(a->t, path), DLM_E_MISMATCH, ctx, NULL);
    LABEL("state of another shape");
    dlm_config c = toy_config(0);
    c.ffn = 40;
    train_rig other = { NULL, NULL };
    CHECK_OK(dlm_model_create(&other.m, ctx, &c, 1, NULL));
    if (other.m) CHECK_OK(dlm_trainer_create(&other.t, ctx, other.m, NULL, NULL));
    if (other.t) CHECK_OK(dlm_trainer_save(other.t, path));
    CHECK_ERROR(dlm_trainer_load(a->t, path), DLM_E_MISMATCH, ctx, NULL);
    train_close(&other);
    LABEL("state as a model");
    dlm_model *m = NULL;
    CHECK_OK(dlm_trainer_save(a->t, path));
    CHECK(dlm_load(&m, NULL, ctx, path) != DLM_OK && m == NULL);
    remove(path);
}

TEST(trainer_load_refuses_wrong_files_and_stays_unharmed)
{
    const char *path = "dlm_test_wrong.st";
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    int text[TRAIN_TEXT];
    dlm_train_options o = train_options();
    o.ema = 0.9f;
    train_text(text);
    train_rig a = train_open(ctx, 0, 1, &o), b = train_open(ctx, 0, 1, &o);
    if (a.t && b.t) {
        train_run(&a, text, 2);
        CHECK_OK(dlm_trainer_save(a.t, path));
        train_run(&a, text, 1);
        train_run(&b, text, 3);
        train_try_broken_files(ctx, &a, &b, path, text);
        train_try_wrong_files(ctx, &a, path);
        LABEL("afterwards");
        CHECK(train_same(&a, &b));
        train_run(&a, text, 2);
        train_run(&b, text, 2);
        CHECK(train_same(&a, &b));
    }
    train_close(&a);
    train_close(&b);
    test_close(ctx);
}

/* One metadata string of f becomes another; the rest of the file stays. */
static test_file train_with_step(const test_file *f, const char *step)
{
    static const char key[] = "\"dlm.step\":\"";
    size_t header = f->data[0] | (size_t)f->data[1] << 8, at = 8, n = 0;
    char *h = (char *)test_malloc(header + 100);
    while (memcmp(f->data + at, key, sizeof key - 1) != 0) at++;
    at += sizeof key - 1;
    memcpy(h, f->data + 8, at - 8);
    n = at - 8 + (size_t)sprintf(h + at - 8, "%s", step);
    while (f->data[at] != '"') at++;
    memcpy(h + n, f->data + at, 8 + header - at);
    n += 8 + header - at;
    test_file g = file_make(h, n, f->data + 8 + header, f->size - 8 - header);
    free(h);
    return g;
}

static void train_try_bad_numbers(dlm_ctx *ctx, train_rig *a, const train_rig *b,
                                  const test_file *f)
{
    static const char *const names[4] = { "weights", "adam.m", "adam.v", "ema" };
    const float bad[4] = { NAN, INFINITY, -INFINITY, -1e-45f };
    const size_t n = a->m->n_params, payload = f->size - 16 * n;
    for (int i = 0; i < 4 * 4 * 3; i++) {
        const int which = i / 12, value = i / 3 % 4;
        const size_t at = i % 3 == 0 ? 0 : i % 3 == 1 ? n - 1 : n / 3;
        unsigned char *entry = f->data + payload + 4 * ((size_t)which * n + at), kept[4];
        char text[60];
        if (value == 3 && which != 2) continue;            /* negative: no matter  */
        snprintf(text, sizeof text, "%s[%u]", names[which], (unsigned)at);
        LABEL("%g in %s", (double)bad[value], text);
        memcpy(kept, entry, 4);
        memcpy(entry, &bad[value], 4);
        CHECK_ERROR(dlm_trainer_load_memory(a->t, f->data, f->size), DLM_E_FORMAT, ctx,
                    text);
        memcpy(entry, kept, 4);
        CHECK(train_same(a, b));
    }
}

TEST(trainer_load_refuses_numbers_that_are_none_and_steps_without_end)
{
    static const char *const steps[] = {
        "9223372036854775807", "9223372036854775808", "18446744073709551616", "-1", "1.5",
        "9007199254740993", "1e3", "", "x", " 1"
    };
    const char *path = "dlm_test_numbers.st";
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    int text[TRAIN_TEXT];
    dlm_train_options o = train_options();
    o.ema = 0.9f;
    train_text(text);
    train_rig a = train_open(ctx, 0, 1, &o), b = train_open(ctx, 0, 1, &o);
    train_run(&a, text, 2);
    train_run(&b, text, 2);
    CHECK_OK(dlm_trainer_save(a.t, path));
    test_file f = file_read(path), g;
    train_try_bad_numbers(ctx, &a, &b, &f);
    for (size_t i = 0; i < sizeof steps / sizeof *steps; i++) {
        LABEL("step %s", steps[i]);
        g = train_with_step(&f, steps[i]);
        CHECK_ERROR(dlm_trainer_load_memory(a.t, g.data, g.size), DLM_E_FORMAT, ctx,
                    "step");
        free(g.data);
        CHECK(train_same(&a, &b));
    }
    LABEL("the largest");
    g = train_with_step(&f, "9007199254740992");
    CHECK_OK(dlm_trainer_load_memory(a.t, g.data, g.size));
    CHECK(a.t->steps == (int64_t)1 << 53);
    train_run(&a, text, 1);
    free(g.data);
    LABEL("afterwards");
    CHECK_OK(dlm_trainer_load_memory(a.t, f.data, f.size));
    train_run(&a, text, 2);
    train_run(&b, text, 2);
    CHECK(train_same(&a, &b));
    a.t->ema[3] = NAN;         /* nor is such a state saved            */
    CHECK_ERROR(dlm_trainer_save(a.t, path), DLM_E_INPUT, ctx, "ema[3]");
    g = file_read(path);
    CHECK(file_equal(&f, &g));
    remove(path);
    free(f.data);
    free(g.data);
    train_close(&a);
    train_close(&b);
    test_close(ctx);
}
#endif /* DLM_NO_STDIO */

static void train_try_example(dlm_ctx *ctx, dlm_trainer *t, const dlm_example *e, int n,
                              const char *text)
{
    dlm_report r;
    LABEL("%s", text);
    CHECK_ERROR(dlm_trainer_step(t, e, n, NULL), DLM_E_INPUT, ctx, text);
    CHECK_ERROR(dlm_trainer_step(t, e, n, &r), DLM_E_INPUT, ctx, text);
    CHECK_ERROR(dlm_trainer_evaluate(t, e, n, 0, &r), DLM_E_INPUT, ctx, text);
}

static void train_try_bad_steps(dlm_ctx *ctx, train_rig *r, const int *text)
{
    int bad[TRAIN_TEXT];
    dlm_example good[TRAIN_SEQS], e[TRAIN_SEQS];
    train_examples(good, text);
#define TRY(assignment, what) do { memcpy(e, good, sizeof e); \
        memcpy(bad, text, sizeof bad); e[6].tokens = bad; assignment; \
        train_try_example(ctx, r->t, e, TRAIN_SEQS, what); } while (0)
    TRY(bad[11] = TOY_VOCAB, "token");               /* the last of its sequence */
    TRY(bad[0] = -1, "token");
    TRY(bad[5] = 2147483647, "token");
    TRY(e[7].length = 0, "length");
    TRY(e[7].length = -3, "length");
    TRY(e[7].length = TOY_SLOTS + 1, "length");
    TRY(e[6].prompt = -1, "prompt");
    TRY(e[6].prompt = 13, "prompt");
    TRY(bad[7] = TOY_MASK, "example 6: token 12 at 7 is the mask");
    TRY(e[6].canvas = 11, "example 6: canvas 11");
    TRY(e[6].canvas = -1, "canvas");
#undef TRY
    train_try_example(ctx, r->t, good, 0, "example");
    train_try_example(ctx, r->t, good, -1, "example");
    memcpy(bad, text, sizeof bad);
    LABEL("text");
    CHECK_ERROR(dlm_trainer_step_text(r->t, text, 10, 20, 4, NULL), DLM_E_INPUT, ctx,
                NULL);
    CHECK_ERROR(dlm_trainer_step_text(r->t, text, 0, 1, 1, NULL), DLM_E_INPUT, ctx, NULL);
    CHECK_ERROR(dlm_trainer_step_text(r->t, text, TRAIN_TEXT, 0, 4, NULL), DLM_E_INPUT,
                ctx, NULL);
    CHECK_ERROR(dlm_trainer_step_text(r->t, text, TRAIN_TEXT, TOY_SLOTS + 1, 4, NULL),
                DLM_E_INPUT, ctx, NULL);
    CHECK_ERROR(dlm_trainer_step_text(r->t, text, TRAIN_TEXT, 20, 0, NULL), DLM_E_INPUT,
                ctx, NULL);
    for (int i = 0; i < TRAIN_TEXT; i++) bad[i] = TOY_VOCAB + i;
    CHECK_ERROR(dlm_trainer_step_text(r->t, bad, TRAIN_TEXT, 20, 4, NULL), DLM_E_INPUT,
                ctx, "token");
}

TEST(trainer_failed_steps_change_nothing)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    int text[TRAIN_TEXT];
    train_text(text);
    for (int k = 0; k < 6; k++) {
        dlm_train_options o = train_options();
        o.max_rows = k / 3 ? 50 : 0;            /* the bad one in a later pass */
        o.ema = 0.5f;
        train_rig a = train_open(ctx, train_kinds[k % 3], 1, &o);
        train_rig b = train_open(ctx, train_kinds[k % 3], 1, &o);
        if (a.t && b.t) {
            train_run(&a, text, 1);
            train_run(&b, text, 1);
            train_try_bad_steps(ctx, &a, text);
            LABEL("%s, max_rows %d", toy_kind_names[train_kinds[k % 3]], o.max_rows);
            CHECK(train_same(&a, &b));
            train_run(&a, text, 3);
            train_run(&b, text, 3);
            CHECK(train_same(&a, &b));
        }
        train_close(&a);
        train_close(&b);
    }
    test_close(ctx);
}

/* A response of nothing carries no loss; every number in the report stays one.  Among
   others it changes nothing. */
TEST(trainer_takes_examples_without_a_response)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    int text[TRAIN_TEXT];
    train_text(text);
    for (int k = 0; k < 3; k++) {
        dlm_example e[2] = { { text, 6, 6, 0, NULL }, { text, 1, 1, 0, NULL } };
        dlm_report r = {0};
        train_rig a = train_open(ctx, train_kinds[k], 1, NULL);
        LABEL("%s", toy_kind_names[train_kinds[k]]);
        if (a.t) {
            dlm_error error = dlm_trainer_step(a.t, e, 2, &r);
            CHECK(error == DLM_OK || error == DLM_E_INPUT);
            if (!error) CHECK(r.loss == 0 && r.scored == 0 && r.grad_norm == 0);
            e[0].prompt = 0;
            CHECK_OK(dlm_trainer_step(a.t, e, 1, &r));
            CHECK(r.loss == r.loss && r.grad_norm == r.grad_norm);
            for (size_t i = 0; i < a.m->n_params; i++)
                CHECK(a.m->weights[i] == a.m->weights[i]);
        }
        train_close(&a);
    }
    test_close(ctx);
}

TEST(examples_without_a_response_contribute_nothing)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    int text[TRAIN_TEXT];
    train_text(text);
    for (int k = 0; k < 3 * DLM_METHOD_COUNT; k++) {
        int kind = train_kinds[k % 3];
        dlm_example e[4] = { { text, 17, 3, 0, NULL }, { text + 9, 24, 0, 0, NULL },
                             { text, 6, 6, 0, NULL },
                             { text, TOY_SLOTS, TOY_SLOTS, 0, NULL } };
        dlm_train_options o = {0};
        dlm_report x = {0}, y = {0};
        o.lift.method = (dlm_method)(k / 3);
        if (kind == 4 && o.lift.method) continue;
        train_rig a = train_open(ctx, kind, 1, &o), b = train_open(ctx, kind, 1, &o);
        LABEL("%s, method %d", toy_kind_names[kind], k / 3);
        CHECK_OK(dlm_trainer_step(a.t, e, 2, &x));
        CHECK_OK(dlm_trainer_step(b.t, e, 4, &y));
        CHECK(x.scored > 0 && memcmp(&x, &y, sizeof x) == 0);
        CHECK(train_same(&a, &b));
        e[2] = e[0]; e[0] = e[3];                        /* in front as well    */
        CHECK_OK(dlm_trainer_step(b.t, e, 4, &y));
        CHECK(y.scored > 0 && y.tokens == x.tokens && y.grad_norm - y.grad_norm == 0);
        train_close(&a);
        train_close(&b);
        o.max_rows = 8;                                  /* less than that prompt */
        a = train_open(ctx, kind, 1, &o), b = train_open(ctx, kind, 1, &o);
        dlm_example few[2] = { { text, 4, 1, 0, NULL },
                               { text, TOY_SLOTS, TOY_SLOTS, 0, NULL } };
        CHECK_OK(dlm_trainer_step(a.t, few, 1, &x));
        CHECK_OK(dlm_trainer_step(b.t, few, 2, &y));
        CHECK(memcmp(&x, &y, sizeof x) == 0 && train_same(&a, &b));
        train_close(&a);
        train_close(&b);
    }
    test_close(ctx);
}

/* adam_eps is large, so that a gradient near 0 does not decide a whole step. */
TEST(trainer_accumulates_over_passes)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    int text[TRAIN_TEXT];
    dlm_example e[TRAIN_SEQS];
    train_text(text);
    train_examples(e, text);
    for (int k = 0; k < 3; k++) {
        dlm_report x = {0}, y = {0};
        dlm_train_options o = train_options();
        o.adam_eps = 1e-2f;
        o.warmup = 0;
        train_rig a = train_open(ctx, train_kinds[k], 1, &o);
        o.max_rows = 2 * TOY_SLOTS;
        train_rig b = train_open(ctx, train_kinds[k], 1, &o);
        LABEL("%s", toy_kind_names[train_kinds[k]]);
        if (a.t && b.t) {
            CHECK_OK(dlm_trainer_step(a.t, e, TRAIN_SEQS, &x));
            CHECK_OK(dlm_trainer_step(b.t, e, TRAIN_SEQS, &y));
            CHECK_CLOSE(x.loss, y.loss, 1e-5 * fabs(x.loss));
            CHECK_CLOSE(x.grad_norm, y.grad_norm, 1e-5 * x.grad_norm);
            CHECK(y.flops <= x.flops * (1 + 1e-9));    /* a pass without masks is free */
            CHECK(x.tokens == y.tokens && x.scored == y.scored && x.scored > 0);
            CHECK(x.step == 1 && y.step == 1);
            for (size_t i = 0; i < a.m->n_params; i++)
                CHECK_CLOSE(a.m->weights[i], b.m->weights[i], 1e-5);
        }
        train_close(&a);
        train_close(&b);
    }
    test_close(ctx);
}

TEST(trainer_learns_a_sentence_by_heart)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int k = 0; k < 3; k++) {
        int text[TRAIN_TEXT];
        dlm_example e[4];
        dlm_report r = {0};
        dlm_train_options o = {0};
        o.lr = 1e-2f;
        train_text(text);
        train_rig a = train_open(ctx, train_kinds[k], 1, &o);
        for (int i = 0; i < 4; i++) {
            e[i].tokens = text;
            e[i].length = 16;
            e[i].prompt = e[i].canvas = 0;
        }
        LABEL("%s", toy_kind_names[train_kinds[k]]);
        if (a.t) {
            double before = 0, after = 0;
            for (uint32_t d = 0; d < 64; d++) {
                CHECK_OK(dlm_trainer_evaluate(a.t, e, 4, d, &r));
                before += r.loss / 64;
            }
            CHECK_CLOSE(before, log((double)TOY_VOCAB), 0.4);
            for (int i = 0; i < 150; i++) CHECK_OK(dlm_trainer_step(a.t, e, 4, &r));
            CHECK(r.step == 150 && a.t->steps == 150);
            for (uint32_t d = 0; d < 64; d++) {
                CHECK_OK(dlm_trainer_evaluate(a.t, e, 4, d, &r));
                after += r.loss / 64;
            }
            CHECK(a.t->steps == 150);
            CHECK_CLOSE(after, 0, 0.5 * before);
        }
        train_close(&a);
    }
    test_close(ctx);
}

/* ==[ gradient check ]========================================================
   The program that checks gradients, on this file's batches and losses. */

#define GRADCHECK_NO_MAIN
#include "examples/07_check_gradient.c"

/* Fresh weights, trained ones, and those of test_model, which are blown up. */
enum { CHECK_FRESH, CHECK_TRAINED, CHECK_LIVELY, CHECK_WEIGHTS };
static const char *const check_weights_names[] = { "fresh", "trained", "lively" };

static dlm_model *check_model(dlm_ctx *ctx, dlm_config c, const dlm_batch *b,
                              ce_score *score, int weights)
{
    dlm_model *m = NULL;
    dlm_train_options o = {0};
    if (weights == CHECK_LIVELY) return test_model(ctx, &c);
    CHECK_OK(dlm_model_create(&m, ctx, &c, 3, NULL));
    if (!m) { printf("no model: %s\n", dlm_last_error(ctx)); exit(1); }
    o.lr = 3e-3f;
    if (weights == CHECK_FRESH) return m;
    dlm_trainer *t = test_trainer(ctx, m, &o);
    for (int step = 0; step < 30; step++) {
        CHECK_OK(dlm_trainer_pass(t, b, ce_apply, score));
        CHECK_OK(dlm_trainer_update(t, NULL));
    }
    dlm_trainer_free(t);
    return m;
}

/* Opened: the gradients of trainer tr are those of the loss of a pass with `apply`. */
static gradcheck check_open(dlm_model *m, dlm_trainer *tr, const dlm_batch *b,
                            dlm_score_fn apply, ce_score *score)
{
    gradcheck c = { m, tr, b, apply, ce_total, score, NULL, NULL };
    CHECK_OK(gradcheck_begin(&c));
    return c;
}

static void check_close(gradcheck *c)
{
    dlm_session_free(c->session);
    free(c->before);
}

/* The derivatives themselves are checked in double above.  Here: that the check passes
   what is right, within what it says. */
TEST(gradcheck_passes_for_every_feature)
{
    static test_batch t;
    double worst = 0;
    for (int run = 0; run < 6 * CHECK_WEIGHTS * DLM_ISA_COUNT; run++) {
        const int g = run % 6 < 4 ? run % 6 : (int)MODEL_CASES - 6 + run % 6;
        const int weights = run / 6 % CHECK_WEIGHTS, isa = run / 6 / CHECK_WEIGHTS;
        if (isa == DLM_ISA_AUTO || !dlm_isa_supported((dlm_isa)isa)) continue;
        if (isa > DLM_ISA_SCALAR && (weights == CHECK_LIVELY || (g + isa) % 2)) continue;
        dlm_ctx *ctx = test_open(isa, 1);
        dlm_config c = case_config(&model_grid[g], 64);
        const dlm_batch *b = case_batch(&t, &c, g % 3);
        ce_score score;
        ce_open(&score, b, c.vocab);
        for (int i = 0; i < b->n_out; i++) score.weight[i] /= b->n_out;
        dlm_model *m = check_model(ctx, c, b, &score, weights);
        float *kept = test_floats(m->n_params);
        memcpy(kept, m->weights, m->n_params * sizeof(float));
        dlm_trainer *tr = test_trainer(ctx, m, NULL);
        gradcheck check = check_open(m, tr, b, ce_apply, &score);
        for (int i = 0; i < dlm_model_tensors(m); i++) {
            gradcheck_row x;
            CHECK_OK(gradcheck_tensor(&check, i, &x));
            LABEL("case %d, %s, %s, %.60s: %g and %g", g, check_weights_names[weights],
                  dlm_isa_name((dlm_isa)isa), x.tensor.name, x.analytic, x.numeric);
            double size = fmax(fmax(fabs(x.analytic), fabs(x.numeric)), 1e-3);
            CHECK_CLOSE(x.error, 0, GRADCHECK_TOLERANCE);
            CHECK_CLOSE(fabs(x.analytic - x.numeric) / size, x.error, 1e-6);
            worst = fmax(worst, x.error);
        }
        CHECK(memcmp(kept, m->weights, m->n_params * sizeof(float)) == 0);
        free(kept);
        check_close(&check);
        ce_close(&score);
        dlm_trainer_free(tr);
        dlm_model_free(m);
        test_close(ctx);
    }
    LABEL("the worst error is %g", worst);
    CHECK(worst > 1e-6);                   /* it did compare something             */
}

static void ce_apply_wrong(void *user, int i, float *logits)
{
    ce_apply(user, i, logits);
    logits[0] += 0.5f;
}

TEST(gradcheck_notices_a_wrong_gradient)
{
    static test_batch t;
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_config c = case_config(&model_grid[0], 64);
    dlm_model *m = test_model(ctx, &c);
    const dlm_batch *b = case_batch(&t, &m->config, 0);
    ce_score score;
    ce_open(&score, b, c.vocab);
    dlm_trainer *tr = test_trainer(ctx, m, NULL);
    gradcheck check = check_open(m, tr, b, ce_apply_wrong, &score);
    double worst = 0;
    for (int i = 0; i < dlm_model_tensors(m); i++) {
        gradcheck_row x;
        CHECK_OK(gradcheck_tensor(&check, i, &x));
        worst = fmax(worst, x.error);
    }
    CHECK(worst > 0.3);
    check_close(&check);
    ce_close(&score);
    dlm_trainer_free(tr);
    dlm_model_free(m);
    test_close(ctx);
}

/* The gradients of a pass, of which one tensor is then 1 % off in size: each must be
   noticed, whatever the weights.  What is below 1e-3 is judged against that. */
TEST(gradcheck_notices_one_percent_in_one_tensor)
{
    static test_batch t;
    for (int g = 0; g < 4; g++) {
        const int weights = g % CHECK_WEIGHTS;
        dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
        dlm_config c = case_config(&model_grid[g], 64);
        const dlm_batch *b = case_batch(&t, &c, g % 3);
        ce_score score;
        ce_open(&score, b, c.vocab);
        for (int i = 0; i < b->n_out; i++) score.weight[i] /= b->n_out;
        dlm_model *m = check_model(ctx, c, b, &score, weights);
        dlm_trainer *tr = test_trainer(ctx, m, NULL);
        gradcheck check = check_open(m, tr, b, ce_apply, &score);
        for (int i = 0; i < dlm_model_tensors(m); i++) {
            dlm_tensor x;
            gradcheck_row found;
            dlm_model_tensor(m, i, &x);
            float *wrong = tr->gradients + (x.data - m->weights);
            const size_t n = (size_t)x.rows * (size_t)x.cols;
            const float factor = i % 2 ? 1.01f : 0.99f;
            for (size_t k = 0; k < n; k++) wrong[k] *= factor;
            CHECK_OK(gradcheck_tensor(&check, i, &found));
            LABEL("case %d, %s, %.60s: %g and %g", g, check_weights_names[weights],
                  x.name, found.analytic, found.numeric);
            CHECK(found.error > GRADCHECK_TOLERANCE || fabs(found.analytic) < 1e-3);
            for (size_t k = 0; k < n; k++) wrong[k] /= factor;
        }
        check_close(&check);
        ce_close(&score);
        dlm_trainer_free(tr);
        dlm_model_free(m);
        test_close(ctx);
    }
}

/* ==[ memory ]===============================================================
   One block per object, of the predicted size; none in the steady state; and a failing
   allocator at every call. */

static dlm_ctx *heap_open(test_heap *heap, int threads)
{
    dlm_ctx *ctx = NULL;
    dlm_options o = {0};
    o.threads = threads;
    o.allocator.alloc = test_heap_alloc;
    o.allocator.release = test_heap_release;
    o.allocator.user = heap;
    (void)dlm_init(&ctx, &o);
    test_ctx = ctx;
    return ctx;
}

/* The objects of one program, made in this order and freed in the reverse one. */
typedef struct heap_objects {
    dlm_ctx     *ctx;
    dlm_model   *m;
    dlm_session *s;
    dlm_sampler *sm;
    dlm_trainer *t;
} heap_objects;

static dlm_config heap_config(int pattern)
{
    dlm_config c = test_config(21, 24, 2, 4, 32);
    c.kv_heads = 2; c.pattern = (dlm_pattern)pattern; c.qkv_bias = 1;
    return c;
}

static dlm_limits heap_limits(int pattern)
{
    dlm_limits lim = {0};
    lim.seqs = 3;
    lim.slots = pattern == DLM_PATTERN_BLOCK ? 64 : 32;
    lim.cached = pattern != DLM_PATTERN_FULL;
    return lim;
}

static void heap_free(heap_objects *o)
{
    dlm_trainer_free(o->t);
    dlm_sampler_free(o->sm);
    dlm_session_free(o->s);
    dlm_model_free(o->m);
    test_close(o->ctx);
}

/* Everything, each in memory of its own if mem is not NULL (4 of them). */
static dlm_error heap_make(heap_objects *o, test_heap *heap, int pattern,
                           dlm_memory *mem)
{
    dlm_config c = heap_config(pattern);
    dlm_limits lim = heap_limits(pattern);
    memset(o, 0, sizeof *o);
    o->ctx = heap_open(heap, 2);
    if (!o->ctx) return DLM_E_NOMEM;
    dlm_error e = dlm_model_create(&o->m, o->ctx, &c, 1, mem ? &mem[0] : NULL);
    if (!e) e = dlm_session_create(&o->s, o->ctx, o->m, &lim, mem ? &mem[1] : NULL);
    if (!e) e = dlm_sampler_create(&o->sm, o->s, NULL, mem ? &mem[2] : NULL);
    if (!e) e = dlm_trainer_create(&o->t, o->ctx, o->m, NULL, mem ? &mem[3] : NULL);
    return e;
}

/* A forward, a training step, an evaluation and a generation. */
static void heap_work(heap_objects *o)
{
    static test_batch t;
    static float logits[TEST_ROWS * 21];
    int canvas[3 * 64], lengths[3] = { 32, 7, 20 };
    batch_clear(&t);
    batch_add(&t, 20, 21, (int)o->m->config.pattern, 8, 0);
    batch_add(&t, 32, 21, (int)o->m->config.pattern, 8, 3);
    batch_close(&t, 0.5);
    CHECK_OK(dlm_logits(o->s, &t.b, logits));
    CHECK_OK(dlm_forward(o->s, &t.b, NULL, NULL));
    dlm_example e[4];
    run_examples(e, 4, 20);
    for (int i = 0; i < 4; i++) if (e[i].length > 32) e[i].length = 32;
    CHECK_OK(dlm_trainer_step(o->t, e, 4, NULL));
    CHECK_OK(dlm_trainer_step_text(o->t, train_tokens[0], 64, 16, 3, NULL));
    dlm_report report;
    CHECK_OK(dlm_trainer_evaluate(o->t, e, 4, 1, &report));
    int slots = heap_limits((int)o->m->config.pattern).slots;
    for (int i = 0; i < 3 * slots; i++)
        canvas[i] = i % slots < 3 ? 1 : o->m->config.mask_id;
    CHECK_OK(dlm_sampler_begin(o->sm, canvas, lengths, 3));
    while (!dlm_sampler_done(o->sm)) {
        dlm_error failed = dlm_sampler_step(o->sm);
        CHECK_OK(failed);
        if (failed) return;
    }
}

/* What each would take, the sampler only where there is a session. */
static void heap_sizes(const heap_objects *o, const dlm_limits *lim, dlm_memory *mem)
{
    CHECK_OK(dlm_model_create(NULL, o->ctx, &o->m->config, 1, &mem[0]));
    CHECK_OK(dlm_session_create(NULL, o->ctx, o->m, lim, &mem[1]));
    if (o->s) CHECK_OK(dlm_sampler_create(NULL, o->s, NULL, &mem[2]));
    CHECK_OK(dlm_trainer_create(NULL, o->ctx, o->m, NULL, &mem[3]));
}

TEST(memory_predicted_equals_memory_requested)
{
    for (int pattern = 0; pattern < 3; pattern++) {
        test_heap heap = {0};
        heap_objects o = {0};
        dlm_config c = heap_config(pattern);
        dlm_limits lim = heap_limits(pattern);
        o.ctx = heap_open(&heap, 1);
        int calls = heap.calls;
        dlm_memory mem[4];
        LABEL("pattern %d", pattern);
        CHECK_OK(dlm_model_create(NULL, o.ctx, &c, 1, &mem[0]));
        CHECK(mem[0].size == dlm_model_bytes(o.ctx, &c, DLM_F32, 0));
        CHECK_OK(dlm_model_create(&o.m, o.ctx, &c, 1, NULL));
        CHECK(heap.last == mem[0].size && heap.calls == ++calls);
        heap_sizes(&o, &lim, mem);
        CHECK(heap.calls == calls);
        CHECK_OK(dlm_session_create(&o.s, o.ctx, o.m, &lim, NULL));
        CHECK(heap.last == mem[1].size && heap.calls == ++calls);
        heap_sizes(&o, &lim, mem);
        CHECK_OK(dlm_sampler_create(&o.sm, o.s, NULL, NULL));
        CHECK(heap.last == mem[2].size && heap.calls == ++calls);
        CHECK_OK(dlm_trainer_create(&o.t, o.ctx, o.m, NULL, NULL));
        CHECK(heap.last == mem[3].size && heap.calls == ++calls);
        heap_free(&o);
        CHECK(heap.live == 0);
    }
}

TEST(steady_state_makes_no_allocation)
{
    for (int pattern = 0; pattern < 3; pattern++) {
        test_heap heap = {0};
        heap_objects o;
        LABEL("pattern %d", pattern);
        CHECK_OK(heap_make(&o, &heap, pattern, NULL));
        int calls = heap.calls;
        heap_work(&o);
        CHECK(heap.calls == calls);
        heap_free(&o);
        CHECK(heap.live == 0);
    }
}

/* Four objects in memory of exactly the predicted size, with guards behind them; then
   each of them in one byte less. */
TEST(objects_live_in_memory_of_exactly_the_predicted_size)
{
    for (int pattern = 0; pattern < 3; pattern++) {
        test_heap heap = {0};
        heap_objects o;
        dlm_memory mem[4];
        float *block[4];
        dlm_limits lim = heap_limits(pattern);
        CHECK_OK(heap_make(&o, &heap, pattern, NULL));
        heap_sizes(&o, &lim, mem);
        heap_free(&o);
        for (int i = 0; i < 4; i++) {
            block[i] = test_floats(mem[i].size / sizeof(float) + 32);
            mem[i].base = (char *)block[i] + 1;                /* any alignment    */
            memset(mem[i].base, 0xFF, mem[i].size + 63);    /* all NaN */
        }
        LABEL("pattern %d", pattern);
        for (int lacking = 3; lacking >= -1; lacking--) {
            if (lacking >= 0) mem[lacking].size--;
            dlm_error made = heap_make(&o, &heap, pattern, mem);
            CHECK(made == (lacking < 0 ? DLM_OK : DLM_E_NOMEM));
            int calls = heap.calls;
            if (made == DLM_OK) heap_work(&o);
            CHECK(heap.calls == calls);
            const void *made_objects[4] = { o.m, o.s, o.sm, o.t };
            for (int i = lacking < 0 ? 4 : lacking; i < 4; i++)
                CHECK(made_objects[i] == NULL);
            heap_free(&o);
            if (lacking >= 0) mem[lacking].size++;
        }
        CHECK(heap.live == 0);
        for (int i = 0; i < 4; i++) {
            const unsigned char *end = (unsigned char *)mem[i].base + mem[i].size;
            for (int j = 0; j < 63; j++) CHECK(end[j] == 0xFF);
            free(block[i]);
        }
    }
}

TEST(every_failing_allocation_leaves_nothing_behind)
{
    for (int pattern = 0; pattern < 3; pattern++) {
        for (int n = 1; n < 100; n++) {
            test_heap heap = {0};
            heap_objects o;
            heap.fail_at = n;
            LABEL("pattern %d, allocation %d", pattern, n);
            dlm_error e = heap_make(&o, &heap, pattern, NULL);
            CHECK(e == (heap.calls < n ? DLM_OK : DLM_E_NOMEM));
            CHECK((e != DLM_OK) == (o.t == NULL));
            CHECK(!o.ctx || e == DLM_OK || dlm_last_error(o.ctx)[0]);
            heap_free(&o);
            CHECK(heap.live == 0);
            if (heap.calls < n) break;
            CHECK(n < 99);
        }
    }
}

/* The state and the session say what they take; after them nothing is allocated. */
TEST(scoring_allocates_nothing)
{
    for (int pattern = 0; pattern < 3; pattern++) {
        test_heap heap = {0};
        dlm_ctx *ctx = heap_open(&heap, 2);
        dlm_config c = heap_config(pattern);
        dlm_limits lim = heap_limits(pattern);
        dlm_model *m = test_model(ctx, &c);
        dlm_session *s = NULL;
        dlm_memory mem = { NULL, 0 };
        scoring_result score;
        int tokens[90], list[2] = { 1, 2 };
        double p[2], among[2];
        scoring_choice q = { 9, 2, 0, list, p, among };
        CHECK_OK(dlm_session_create(&s, ctx, m, &lim, NULL));
        CHECK_OK(dlm_state_create(NULL, ctx, &m->config, DLM_OBJECTIVE_AUTO, 64, 1,
                                  &mem));
        dlm_state *x = score_state(ctx, m, 64);
        scoring o = score_with(s, x);
        int calls = heap.calls;
        CHECK(heap.last == mem.size);
        for (int i = 0; i < 90; i++) tokens[i] = i % 7;
        CHECK_OK(score_text(&o, tokens, 90, 1, 90, &score));
        o.left_to_right = 1;
        CHECK_OK(score_text(&o, tokens, 90, 1, 90, &score));
        tokens[9] = m->config.mask_id;
        CHECK_OK(score_choices(&o, tokens, 32, &q, 1));
        CHECK(heap.calls == calls);
        dlm_state_free(x); dlm_session_free(s); dlm_model_free(m);
        test_close(ctx);
        CHECK(heap.live == 0);
    }
}

/* The calls that need memory of their own for a while: 0 dlm_sample, 1 likelihood. */
static dlm_error heap_call(heap_objects *o, int which)
{
    int tokens[32];
    double nats;
    for (int i = 0; i < 32; i++) tokens[i] = i < 3 ? i : o->m->config.mask_id;
    if (which == 0) return dlm_sample(o->ctx, o->m, tokens, 32, NULL);
    for (int i = 0; i < 32; i++) tokens[i] = i % 7;
    return dlm_log_likelihood(o->s, tokens, 20, 4, 2, 1, &nats);
}

TEST(calls_that_allocate_survive_every_failing_allocation)
{
    for (int which = 0; which < 2; which++) {
        test_heap heap = {0};
        heap_objects o;
        CHECK_OK(heap_make(&o, &heap, DLM_PATTERN_BLOCK, NULL));
        float *kept = test_floats(o.m->n_params);
        memcpy(kept, o.m->weights, o.m->n_params * sizeof(float));
        for (int n = 1; n < 100; n++) {
            int before = heap.live;
            heap.fail_at = heap.calls + n;
            dlm_error e = heap_call(&o, which);
            LABEL("call %d, allocation %d", which, n);
            CHECK(e == (heap.calls < heap.fail_at ? DLM_OK : DLM_E_NOMEM));
            CHECK(heap.live == before);
            CHECK(memcmp(kept, o.m->weights, o.m->n_params * sizeof(float)) == 0);
            if (e == DLM_OK) break;
            CHECK(n < 99);
        }
        heap_free(&o);
        CHECK(heap.live == 0);
        free(kept);
    }
}


/* ==[ lift ]==================================================================
   What a step of every method must do is worked out here in double, from the formulas:
   noise, scores, how many are kept, weights, the rows of both views.  Random choices and
   near ties are read off the trainer, after a check that it was free to make them. */

#include "bench/rivals.h"

enum { LIFT_SEQS = 3, LIFT_STEPS = 3 };

typedef struct lift_case {
    const char      *name;
    dlm_lift_options o;
} lift_case;

static rival_options lift_over_t = { 0.3f, 1, 0 }, lift_masked_mean = { 0, 0, 1 };

#define M(method) DLM_METHOD_##method
#define P(policy) DLM_POLICY_##policy
static const lift_case lift_cases[] = {    /* .. code rho, one pass, two views, unscaled,
                                              a rule in the method's place         */
    { "vanilla",                { 0, M(VANILLA),  P(TIME),     0, 0, 0, 0, NULL, NULL } },
    { "vanilla unscaled",       { 0, M(VANILLA),  P(TIME),     0, 0, 0, 1, NULL, NULL } },
    { "vanilla, two views",     { 0, M(VANILLA),  P(TIME),     0, 0, 1, 0, NULL, NULL } },
    { "lift3",                  { 0, M(LIFT3),    P(TIME),     0, 0, 0, 0, NULL, NULL } },
    { "lift3, H 4, rho coded",  { 4, M(LIFT3),    P(TIME),     1, 0, 0, 0, NULL, NULL } },
    { "lift3 sampled",          { 0, M(LIFT3),    P(SAMPLED),  0, 0, 0, 0, NULL, NULL } },
    { "lift3 random",           { 0, M(LIFT3),    P(RANDOM),   0, 0, 0, 0, NULL, NULL } },
    { "lift3 reversed, H 2.5",  { 2.5f, M(LIFT3), P(REVERSED), 0, 0, 0, 0, NULL, NULL } },
    { "lift3, two views",       { 0, M(LIFT3),    P(TIME),     0, 0, 1, 0, NULL, NULL } },
    { "the same, unscaled",     { 0, M(LIFT3),    P(TIME),     0, 0, 1, 1, NULL, NULL } },
    { "lift3, one pass",        { 0, M(LIFT3),    P(TIME),     0, 1, 0, 0, NULL, NULL } },
    { "lift2",                  { 0, M(LIFT2),    P(TIME),     0, 0, 0, 0, NULL, NULL } },
    { "lift2 reversed",         { 0, M(LIFT2),    P(REVERSED), 0, 0, 0, 0, NULL, NULL } },
    { "lift2 random, one pass", { 0, M(LIFT2),    P(RANDOM),   0, 1, 0, 1, NULL, NULL } },
    { "top k",                  { 0, M(TOP_K),    P(TIME),     0, 0, 0, 0, NULL, NULL } },
    { "bottom k",               { 0, M(BOTTOM_K), P(TIME),     0, 0, 0, 0, NULL, NULL } },
    { "random k",               { 0, M(RANDOM_K), P(TIME),     0, 0, 0, 0, NULL, NULL } },
    { "cart", { 0, M(VANILLA), P(TIME), 0, 0, 0, 0, rival_cart, NULL } },
    { "cart over t, p 0.3",
      { 0, M(VANILLA), P(TIME), 0, 0, 0, 0, rival_cart, &lift_over_t } },
    { "gift", { 0, M(VANILLA), P(TIME), 0, 0, 0, 0, rival_gift, NULL } },
    { "gift, masked mean",
      { 0, M(VANILLA), P(TIME), 0, 0, 0, 0, rival_gift, &lift_masked_mean } },
};
#undef M
#undef P
enum { LIFT_CASES = sizeof lift_cases / sizeof *lift_cases };

/* Under these a step leaves the weights alone and its gradient in adam_m. */
static dlm_train_options lift_options(dlm_lift_options lift, float least, float most)
{
    dlm_train_options o = {0};
    o.lr = o.beta1 = 1e-30f;
    o.clip = INFINITY;
    o.seed = test_seed;
    o.level_min = least; o.level_max = most;
    o.lift = lift;
    return o;
}

/* Three examples: a long one between two of the given length and prompt. */
static void lift_examples(dlm_example *e, int length, int prompt)
{
    static int tokens[LIFT_SEQS][TOY_SLOTS];
    for (int k = 0; k < LIFT_SEQS; k++) {
        for (int i = 0; i < TOY_SLOTS; i++) tokens[k][i] = test_below(TOY_MASK);
        e[k].tokens = tokens[k];
        e[k].length = k == 1 ? TOY_SLOTS : length;
        e[k].prompt = k == 1 ? 5 : prompt;
        e[k].canvas = 0;
    }
}

/* No kept one comes after a rejected one; of equals the lower position comes first. */
static void lift_try_select(const unsigned char *masked, const float *score, int n, int k,
                            dlm_select mode)
{
    unsigned char kept[40];
    dlm_address at = { test_seed, DLM_RANDOM_LIFT, 3, 5, 7 };
    int had = 0, has = 0;
    memcpy(kept, masked, (size_t)n);
    int random = mode == DLM_SELECT_RANDOM;
    int returned = dlm_lift_select(kept, random ? NULL : score, n, k, mode,
                                   random ? &at : NULL);
    for (int i = 0; i < n; i++) {
        had += masked[i] != 0;
        has += kept[i];
        CHECK(kept[i] == 0 || (kept[i] == 1 && masked[i]));
        for (int j = 0; j < n; j++) {
            if (!kept[i] || kept[j] || !masked[j] || random) continue;
            double ahead = mode == DLM_SELECT_EASIEST ? score[i] - score[j]
                                                      : score[j] - score[i];
            CHECK(ahead > 0 || (ahead == 0 && i < j));
        }
    }
    CHECK(returned == has && has == (k < had ? k : had));
}

TEST(lift_select_keeps_the_right_ones_and_of_equals_the_first)
{
    for (int n = 0; n <= 40; n += n < 6 ? 1 : 17)
        for (int draw = 0; draw < 60; draw++) {
            unsigned char masked[40];
            float score[40];
            for (int i = 0; i < n; i++) {
                masked[i] = (unsigned char)(draw < 5 ? 63 * draw : test_below(3));
                score[i] = draw % 2 ? test_float() : -(float)test_below(4);
                if (!masked[i]) score[i] = NAN;         /* nobody may look         */
            }
            for (int k = 0; k <= n + 1; k += k < 2 || k >= n - 1 ? 1 : (n + 3) / 4)
                for (int mode = 0; mode < 3; mode++) {
                    LABEL("n %d, k %d, mode %d", n, k, mode);
                    lift_try_select(masked, score, n, k, (dlm_select)mode);
                }
        }
}

/* Half of 2^18: seconds where selection is linear, hours where it is quadratic. */
TEST(lift_select_takes_many)
{
    enum { N = 1 << 18 };
    unsigned char *masked = (unsigned char *)test_malloc(N);
    float *score = test_floats(N);
    dlm_address at = { 1, DLM_RANDOM_LIFT, 0, 0, 0 };
    for (int mode = 0; mode < 3; mode++) {
        int high = 0;
        LABEL("mode %d", mode);
        for (int i = 0; i < N; i++) {
            score[i] = (float)((i * 7919) % N);                  /* a permutation  */
            masked[i] = 1;
        }
        CHECK(dlm_lift_select(masked, score, N, N / 2, (dlm_select)mode, &at) == N / 2);
        for (int i = 0; i < N; i++) high += masked[i] && score[i] >= N / 2;
        if (mode == DLM_SELECT_RANDOM) CHECK_CLOSE(high, N / 4, 2000);
        else CHECK(high == (mode == DLM_SELECT_EASIEST ? N / 2 : 0));
    }
    free(masked); free(score);
}

TEST(lift_select_at_random_keeps_every_subset_alike)
{
    enum { DRAWS = 30000, N = 6 };
    for (int along = 0; along < 3; along++) {
        int counts[1 << N] = {0};
        double p[1 << N] = {0};
        dlm_address at = { test_seed, DLM_RANDOM_LIFT, 4, 5, 0 };
        for (int i = 0; i < N; i++)
            for (int j = 0; j < i; j++)
                if (i != 3 && j != 3) p[1 << i | 1 << j] = 0.1; /* 3 is not masked */
        for (uint32_t draw = 0; draw < DRAWS; draw++) {
            unsigned char masked[N] = { 1, 1, 1, 0, 1, 1 };
            int set = 0;
            *(along == 0 ? &at.step : along == 1 ? &at.row : &at.purpose) = 70 + draw;
            CHECK(dlm_lift_select(masked, NULL, N, 2, DLM_SELECT_RANDOM, &at) == 2);
            for (int i = 0; i < N; i++) set |= masked[i] << i;
            counts[set]++;
        }
        LABEL("along part %d of the address", along);
        toy_check_counts(counts, p, 1 << N);
    }
}

TEST(lift_count_rounds_half_to_even_and_keeps_at_least_one)
{
    static const struct { int n; double t, rho; int want; } cases[] = {
        { 0, 0.5, 0.5, 0 }, { 0, 1, 0, 0 }, { 1, 0.5, 0.5, 1 }, { 1, 0.001, 0.999, 1 },
        { 3, 0.5, 0.5, 2 }, { 5, 0.5, 0.5, 2 }, { 7, 0.5, 0.5, 4 }, { 9, 0.5, 0.5, 4 },
        { 2, 0.25, 0.75, 1 }, { 6, 0.25, 0.75, 2 }, { 10, 0.25, 0.75, 2 },
        { 10, 0.26, 0.74, 3 }, { 14, 0.25, 0.75, 4 }, { 10, 1, 0, 10 },
        { 10, 0.3, 0, 10 }, { 5, 0, 0, 1 }, { 2000, 1e-6, 0.9, 2 }, { 4000, 0, 0, 4 },
        { 9, 0.35, 0.55, 4 },              /* 3.5 in single precision, less in double */
        { 8, 5e-4, 0, 4 },                 /* t + rho is taken for 1e-3 at least   */
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        LABEL("n %d, t %g, rho %g", cases[i].n, cases[i].t, cases[i].rho);
        CHECK(dlm_lift_count(cases[i].n, cases[i].t, cases[i].rho) == cases[i].want);
    }
}

/* How many are masked and kept, by thirds of t, and where rho may lie. */
TEST(lift_rho_and_kept_fractions_have_the_documented_means)
{
    enum { DRAWS = 240000 };
    static const double want[2][6] = { { 0.418, 0.249, 0.083, 0.337, 0.690, 0.909 },
                                       { 0.466, 0.300, 0.119, 0.285, 0.635, 0.874 } };
    for (int code = 0; code < 2; code++) {
        double sum[6] = {0}, n[3] = {0};                /* rho, then kept          */
        for (uint32_t i = 0; i < DRAWS; i++) {
            dlm_address at = { test_seed, DLM_RANDOM_LIFT, i, 0, i % 7 };
            double raw = test_uniform(), t = 1e-3 + (1 - 1e-3) * raw;
            double rho = dlm_lift_rho(&at, t, code);
            int third = t < 1.0 / 3 ? 0 : t < 2.0 / 3 ? 1 : 2;
            sum[third] += rho; sum[third + 3] += t / (t + rho); n[third]++;
            LABEL("code form %d, t %.4f, rho %.6f", code, t, rho);
            CHECK(rho >= (code && 1 - raw > 0.1 + 1e-9 ? 0.1 : 0));
            CHECK(rho <= 1 - raw + 1e-12);
        }
        for (int k = 0; k < 6; k++) {
            LABEL("code form %d, column %d", code, k);
            CHECK_CLOSE(sum[k] / n[k % 3], want[code][k], 0.005);
        }
    }
}

TEST(lift_mode_changes_at_its_thresholds)
{
    for (int i = 0; i < 4; i++) {
        static const double values[] = { 2, 3, 4, 1e4 };
        double H = values[i], low = 1 / H, high = 1 - 1 / H;
        double t[] = { 0.001, low - 1e-5, low, low + 1e-5, 0.5, high - 1e-5, high,
                       high + 1e-5, 1 };
        for (int k = 0; k < 18; k++) {
            double at = t[k / 2];
            dlm_policy policy = k % 2 ? DLM_POLICY_REVERSED : DLM_POLICY_TIME;
            dlm_select easy = k % 2 ? DLM_SELECT_HARDEST : DLM_SELECT_EASIEST;
            dlm_select hard = k % 2 ? DLM_SELECT_EASIEST : DLM_SELECT_HARDEST;
            dlm_select two = at >= 0.5 ? easy : hard;
            LABEL("H %g, t %.7f, reversed %d", H, at, k % 2);
            CHECK(dlm_lift_mode(at, 2, H, policy, NULL) == two);
            CHECK(dlm_lift_mode(at, 3, 1, policy, NULL) == two);
            CHECK(dlm_lift_mode(at, 3, H, policy, NULL) ==
                  (at < low ? hard : at > high ? easy : DLM_SELECT_RANDOM));
        }
    }
}

TEST(lift_mode_is_drawn_from_its_weights)
{
    enum { DRAWS = 20000 };
    static const double levels[] = { 0.001, 0.2, 0.5, 0.9, 1 };
    for (int i = 0; i < 20; i++) {
        int components = 2 + i % 2, uniform = i / 2 % 2, counts[3] = {0};
        double t = levels[i / 4], H = 4, p[3] = { H * t * (1 - t), t, 1 - t };
        if (components == 2) p[DLM_SELECT_RANDOM] = 0;
        double sum = p[0] + p[1] + p[2];
        for (int k = 0; k < 3; k++)
            p[k] = !uniform ? p[k] / sum : k || components == 3 ? 1.0 / components : 0;
        for (uint32_t draw = 0; draw < DRAWS; draw++) {
            dlm_address at = { test_seed, DLM_RANDOM_LIFT, 5, draw, 9 };
            if (dlm_lift_rho(&at, 0.5, 0) < 0.25) continue;     /* other bits than rho */
            counts[dlm_lift_mode(t, components, H, uniform ? DLM_POLICY_RANDOM
                                 : DLM_POLICY_SAMPLED, &at)]++;
        }
        LABEL("t %g, %d components, uniform %d", t, components, uniform);
        toy_check_counts(counts, p, 3);
    }
}

/* A state of one cell, 3, is shown logits of which some are -INFINITY. */
TEST(state_entropy_is_its_formula_on_every_isa)
{
    static const int sizes[] = { 1, 2, 7, 16, 33, 513, 1200 };
    enum { MAX = 1200, SIZES = sizeof sizes / sizeof *sizes };
    static float logits[MAX];
    FOR_EACH_ISA(isa) {
        dlm_ctx *ctx = test_open(isa, 1);
        for (int i = 0; i < SIZES * 6; i++) {
            int V = sizes[i % SIZES], cell = 3;
            float score[5] = { 9, 9, 9, 9, 9 };
            double x[MAX], h = 0;
            dlm_state s;
            memset(&s, 0, sizeof s);
            s.ctx = ctx; s.config.vocab = V; s.out_cell = &cell; s.score = score;
            test_fill(logits, (size_t)V, i / SIZES == 5 ? 1e4f : (float)(i / SIZES));
            for (int j = 1; j < V && i % 2; j += 3) logits[j] = -INFINITY;
            for (int j = 0; j < V; j++) x[j] = logits[j];
            double lse = ref_log_sum_exp(x, V);
            for (int j = 0; j < V; j++)
                if (x[j] > -INFINITY) h += exp(x[j] - lse) * (lse - x[j]);
            dlm_state_entropy(&s, 0, logits);
            LABEL("V %d, number %d, %s", V, i / SIZES, dlm_isa_name((dlm_isa)isa));
            CHECK_CLOSE(score[3], h, 2e-6 * (1 + h));
            CHECK(score[3] >= 0 && score[2] == 9 && score[4] == 9);
            logits[V - 1] = (float)NAN;
            dlm_state_entropy(&s, 0, logits);
            CHECK(score[3] != score[3]);
        }
        test_close(ctx);
    }
}

/* The CART weight of token i of T. */
static double lift_cart(const unsigned char *masked, int T, int i, double p)
{
    double sum = 0;
    for (int j = 0; j < T; j++)
        if (!masked[j] && j != i) sum += 0.5 * p * pow(1 - p, abs(i - j) - 1);
    return sum;
}

TEST(cart_weights_and_gift_levels_are_their_formulas)
{
    static const double probabilities[] = { 0.1, 0.3, 1 };
    unsigned char masked[67] = {0};
    float weight[60];
    for (int n = 0; n <= 60; n += n < 4 ? 1 : 28)
        for (int k = 0; k < 6; k++) {
            double p = probabilities[k % 3];
            int P = k < 3 ? 0 : 7;
            for (int i = 0; i < n; i++) masked[P + i] = (unsigned char)test_below(2);
            rival_cart_weights(weight, masked + P, P, n, p);
            LABEL("P %d, R %d, p %g", P, n, p);
            for (int i = 0; i < n; i++)
                if (masked[P + i])
                    CHECK_CLOSE(weight[i], lift_cart(masked, P + n, P + i, p), 1e-6);
            memset(masked, 0, sizeof masked);
        }
    for (double t = 0.001; t <= 1; t += 0.111)
        for (double h = 0; h < 3; h += 0.3) {
            LABEL("t %g, entropy %g", t, h);
            CHECK_CLOSE(rival_gift_level(t, h, 0.8), 1 - pow(1 - t, sqrt(h) / 0.8),
                        1e-12);
        }
    CHECK(rival_gift_level(1, 0.1, 0.8) == 1 && rival_gift_level(1, 0, 0.8) == 0);
    CHECK(rival_gift_level(0.5, 0, 0) == 0 && rival_gift_level(0.5, -1e-9, 0.8) == 0);
}

/* --[ plan ]------------------------------------------------------------------
   Everything by example and response token ("cell"). */

typedef double        lift_values[LIFT_SEQS][TOY_SLOTS];
typedef unsigned char lift_masks[LIFT_SEQS][TOY_SLOTS];

typedef struct lift_plan {
    dlm_config         c;
    dlm_train_options  o;
    const dlm_example *e;                  /* (LIFT_SEQS)                          */
    uint32_t           step;
    double             D;                  /* tokens that could carry loss         */
    int                R[LIFT_SEQS], unit[LIFT_SEQS];   /* cells in all, of one level */
    int                lift, n_kept;       /* is this a LIFT; cells kept in all    */
    lift_values        t, rho, u;          /* u: masked where below level          */
    lift_values        level, score;       /* log p(gold) or, GIFT, entropy        */
    lift_values        own;                /* GIFT: levels, also where others drew */
    lift_values        weight, other;      /* of the two views                     */
    lift_masks         wide, kept;         /* before and after selection           */
    lift_masks         seen, rest;         /* masked in the two views              */
    dlm_select         mode[LIFT_SEQS][TOY_SLOTS];
} lift_plan;

/* A shifted model has no row that predicts token 0. */
static int lift_blind(const lift_plan *p, int k, int cell)
{
    return p->c.shifted && p->e[k].prompt + cell == 0;
}

static dlm_select lift_mode_of(const lift_plan *p, double t, const dlm_address *at)
{
    const dlm_lift_options *o = &p->o.lift;
    double H = o->H > 0 ? o->H : 3;
    if (o->method == DLM_METHOD_TOP_K) return DLM_SELECT_EASIEST;
    if (o->method == DLM_METHOD_BOTTOM_K) return DLM_SELECT_HARDEST;
    if (o->method == DLM_METHOD_RANDOM_K || !p->lift) return DLM_SELECT_RANDOM;
    if (o->policy == DLM_POLICY_RANDOM || o->policy == DLM_POLICY_SAMPLED)
        return dlm_lift_mode(t, o->method == DLM_METHOD_LIFT3 ? 3 : 2, H, o->policy, at);
    if (o->method == DLM_METHOD_LIFT3 && t >= 1 / H && t <= 1 - 1 / H)
        return DLM_SELECT_RANDOM;
    return (t >= 0.5) == (o->policy == DLM_POLICY_TIME) ? DLM_SELECT_EASIEST
                                                        : DLM_SELECT_HARDEST;
}

/* Noise level, rho, mode and the mask before selection of every cell. */
static void lift_draw(lift_plan *p)
{
    double lo = p->o.level_min > 0 ? p->o.level_min : 1e-3f;
    double hi = p->o.level_max > 0 ? p->o.level_max : 1;
    dlm_address at_level = { p->o.seed, DLM_RANDOM_LEVEL, p->step, 0, 0 };
    int all = 0, unit = -1;
    p->lift = p->o.lift.method != DLM_METHOD_VANILLA;
    for (int k = 0; k < LIFT_SEQS; k++) {
        p->R[k] = p->e[k].length - p->e[k].prompt;
        p->unit[k] = p->c.pattern == DLM_PATTERN_BLOCK ? p->c.block : p->R[k];
        all += (p->R[k] + p->unit[k] - 1) / p->unit[k];
        p->D += p->e[k].length - fmax(p->e[k].prompt, p->c.shifted);
    }
    for (int k = 0; k < LIFT_SEQS; k++)
        for (int i = 0; i < p->R[k]; i++) {
            dlm_address at = { p->o.seed, DLM_RANDOM_LIFT, p->step, (uint32_t)k,
                               (uint32_t)(i - i % p->unit[k]) };
            unit += i % p->unit[k] == 0;
            double t = dlm__noise_level(&at_level, unit, all, 1, lo, hi);
            double rest = 1 - fmax(0, (t - 1e-3) / (1 - 1e-3));
            double least = p->o.lift.rho_code_form && rest > 0.1 ? 0.1 : 0;
            double rho = p->lift ? least + (rest - least) * dlm_uniform(&at, 0) : 0;
            p->t[k][i] = t;
            p->rho[k][i] = rho;
            p->mode[k][i] = lift_mode_of(p, t, &at);
            at.purpose = DLM_RANDOM_MASK;
            at.position = (uint32_t)i;
            p->u[k][i] = dlm_uniform(&at, 0);
            p->level[k][i] = t + rho;
            p->wide[k][i] = p->u[k][i] < t + rho;
        }
}

/* A batch and what its rows predict. */
typedef struct lift_rows {
    test_batch t;
    int        ex[TEST_ROWS], cell[TEST_ROWS];          /* by row; ex -1: nothing  */
    double     weight[TEST_ROWS];
} lift_rows;

/* View 0 or 1 of all examples. */
static void lift_view(lift_rows *r, const lift_plan *p, int view, lift_masks masked,
                      lift_values weight)
{
    if (view == 0) batch_clear(&r->t);
    for (int i = 0; view == 0 && i < TEST_ROWS; i++) r->ex[i] = -1;
    for (int k = 0; k < LIFT_SEQS; k++) {
        const dlm_example *e = &p->e[k];
        int first = r->t.start[r->t.b.n_seqs], P = e->prompt, R = p->R[k];
        int block = p->c.pattern == DLM_PATTERN_BLOCK ? p->c.block : 0;
        if (block) batch_add_padded(&r->t, &p->c, P, R, TOY_VOCAB);
        else batch_add(&r->t, P + R, TOY_VOCAB, DLM_PATTERN_FULL, 0, 0);
        for (int i = 0; i < P + R; i++) r->t.tokens[first + i] = e->tokens[i];
        for (int i = 0; i < R; i++) {
            int at = first + P + i + (block ? R : 0), row = at - p->c.shifted;
            r->t.tokens[at] = masked[k][i] ? p->c.mask_id : e->tokens[P + i];
            if (block && p->c.shifted && i % block == 0) row = first + P + i - 1;
            if (!masked[k][i] || P + i < p->c.shifted) continue;
            r->ex[row] = k;
            r->cell[row] = i;
            r->weight[row] = weight[k][i];
        }
    }
}

/* Looks at the rows that weigh something; c gets targets and weights. */
static const dlm_batch *lift_rows_end(lift_rows *r, const lift_plan *p, ce_score *c)
{
    int n = 0, N = batch_close(&r->t, 2)->n_out;
    for (int row = 0; row < N; row++)
        if (r->ex[row] >= 0 && r->weight[row] != 0) r->t.out_rows[n++] = row;
    r->t.b.n_out = n;
    ce_open(c, &r->t.b, TOY_VOCAB);
    for (int i = 0; i < n; i++) {
        int row = r->t.out_rows[i];
        const dlm_example *e = &p->e[r->ex[row]];
        c->target[i] = e->tokens[e->prompt + r->cell[row]];
        c->weight[i] = r->weight[row] / p->D;
    }
    return &r->t.b;
}

/* log p(gold) where masked before selection; GIFT: entropies with all masked, levels. */
static void lift_score(lift_plan *p, const reference *ref)
{
    static lift_rows rows;
    ce_score c;
    lift_masks all;
    int gift = p->o.lift.choose == rival_gift, hits = 0;
    memset(all, 1, sizeof all);
    lift_view(&rows, p, 0, gift ? all : p->wide, p->t);
    const dlm_batch *b = lift_rows_end(&rows, p, &c);
    double *logits = ref_logits(ref, b), mean = 0;
    for (int i = 0; i < b->n_out; i++) {
        const double *x = logits + i * TOY_VOCAB;
        double lse = ref_log_sum_exp(x, TOY_VOCAB), h = lse;
        int row = b->out_rows[i];
        for (int v = 0; v < TOY_VOCAB; v++) h -= exp(x[v] - lse) * x[v];
        h = h < 1e-6 ? 0 : h;               /* what a sharp softmax leaves is noise */
        p->score[rows.ex[row]][rows.cell[row]] = gift ? h : x[c.target[i]] - lse;
        mean += sqrt(h) / b->n_out;
    }
    mean = fmax(mean, 1e-12);
    for (int k = 0; gift && k < LIFT_SEQS; k++)
        for (int i = 0; i < p->R[k]; i++) {
            p->level[k][i] = 1 - pow(1 - p->t[k][i], sqrt(p->score[k][i]) / mean);
            hits += p->u[k][i] < p->level[k][i] && !lift_blind(p, k, i);
        }
    memcpy(p->own, p->level, sizeof p->own);
    if (gift && !hits) memcpy(p->level, p->t, sizeof p->t);     /* GIFT falls back */
    free(logits); ce_close(&c);
}

/* Cells [first, end) of example k: how many are kept, and none worse than a rejected. */
static void lift_check_unit(const lift_plan *p, int k, int first, int end)
{
    int n = 0, kept = 0;
    double best = -INFINITY, worst = INFINITY;
    for (int i = first + lift_blind(p, k, first); i < end; i++) {
        double x = p->mode[k][i] == DLM_SELECT_HARDEST ? -p->score[k][i] : p->score[k][i];
        n += p->wide[k][i];
        kept += p->kept[k][i];
        CHECK(p->wide[k][i] || !p->kept[k][i]);
        if (p->kept[k][i]) worst = fmin(worst, x);
        else if (p->wide[k][i]) best = fmax(best, x);
    }
    double t = p->t[k][first], want = rint(n * (t / (t + p->rho[k][first])));
    CHECK(kept == (n < 1 ? 0 : want < 1 ? 1 : (int)want));
    if (p->mode[k][first] != DLM_SELECT_RANDOM) CHECK(worst >= best - 1e-4);
}

/* With two views the masks are those of either: the rows of the first view tell. */
static int lift_kept(const dlm_state *s, int cell, int two_views)
{
    const dlm_batch *b = &s->batch;
    if (!two_views) return s->masked[cell];
    for (int i = 0; i < b->n_out && s->out_rows[i] < s->start[b->n_seqs / 2]; i++)
        if (s->out_cell[i] == cell) return s->out_weight[i] != 0;
    return 0;
}

/* Takes over what the trainer kept, if it may be. */
static void lift_check_kept(lift_plan *p, const dlm_state *s)
{
    for (int k = 0; k < LIFT_SEQS; k++) {
        int R = p->R[k];
        for (int i = 0; i < R; i++) {
            int kept = lift_kept(s, s->first_cell[k] + i, p->o.lift.complementary);
            double ahead = p->level[k][i] - p->u[k][i];
            if (lift_blind(p, k, i)) kept = ahead > 0;           /* as it was drawn */
            p->kept[k][i] = (unsigned char)kept;
            p->n_kept += kept && !lift_blind(p, k, i);
            if (!p->lift && fabs(ahead) > 1e-4) CHECK(kept == (ahead > 0));
        }
        for (int i = 0; p->lift && i < R; i += p->unit[k])
            lift_check_unit(p, k, i, i + p->unit[k] < R ? i + p->unit[k] : R);
    }
}

static void lift_weigh(lift_plan *p)
{
    const dlm_lift_options *o = &p->o.lift;
    rival_options none = { 0, 0, 0 }, *rival = &none;
    if (o->choose_user) rival = (rival_options *)o->choose_user;
    double half = o->complementary ? 0.5 : 1, p_cart = rival->p > 0 ? rival->p : 0.1f;
    for (int k = 0; k < LIFT_SEQS; k++) {
        unsigned char masked[TOY_SLOTS] = {0};
        memcpy(masked + p->e[k].prompt, p->kept[k], (size_t)p->R[k]);
        for (int i = 0; i < p->R[k]; i++) {
            double t = p->t[k][i], w = o->no_time_scaling ? 1 : 1 / t;
            if (o->choose == rival_cart)
                w = lift_cart(masked, p->e[k].length, p->e[k].prompt + i, p_cart)
                    / (rival->time_scaling ? t : 1);
            if (o->choose == rival_gift)
                w = p->own[k][i] == 0 ? 0
                    : (rival->masked_mean ? p->D / p->n_kept : 1) / p->own[k][i];
            int wide = o->one_pass && p->mode[k][i] != DLM_SELECT_RANDOM;
            p->seen[k][i] = wide ? p->wide[k][i] : p->kept[k][i];
            p->rest[k][i] = !p->seen[k][i];
            p->weight[k][i] = p->kept[k][i] ? half * w : 0;
            p->other[k][i] = half / (o->no_time_scaling ? 1 : fmax(1 - t, 1e-3));
        }
    }
}

static double lift_mean(double sum, int64_t n) { return n ? sum / (double)n : 0; }

static void lift_check_bins(const lift_plan *p, const lift_rows *rows, const ce_score *c,
                            const dlm_report *r)
{
    double loss[DLM_BINS] = {0}, gold[2][DLM_BINS] = {{0}};
    int64_t n[DLM_BINS] = {0}, wide[DLM_BINS] = {0}, count[2][DLM_BINS] = {{0}};
    for (int i = 0; i < c->n_out; i++) {
        int k = rows->ex[rows->t.out_rows[i]], cell = rows->cell[rows->t.out_rows[i]];
        double t = p->rest[k][cell] ? fmax(1 - p->t[k][cell], 1e-3) : p->t[k][cell];
        int bin = (int)fmin(7, 8 * t);
        n[bin]++;
        loss[bin] += c->loss[i] / c->weight[i];
    }
    for (int k = 0; p->lift && k < LIFT_SEQS; k++)
        for (int i = 0; i < p->R[k]; i++) {
            int bin = (int)fmin(7, 8 * p->t[k][i]), kept = p->kept[k][i];
            if (lift_blind(p, k, i)) continue;
            wide[bin] += p->wide[k][i];
            if (p->mode[k][i] == DLM_SELECT_RANDOM || !p->wide[k][i]) continue;
            count[kept][bin]++;
            gold[kept][bin] += exp(p->score[k][i]);
        }
    for (int i = 0; i < DLM_BINS; i++) {
        CHECK(r->bin_superset[i] == wide[i] && r->bin_kept[i] == count[1][i]);
        CHECK(r->bin_rejected[i] == count[0][i]);
        CHECK_CLOSE(r->bin_gold_kept[i], lift_mean(gold[1][i], count[1][i]), 1e-4);
        CHECK_CLOSE(r->bin_gold_rejected[i], lift_mean(gold[0][i], count[0][i]), 1e-4);
        CHECK(r->bin_count[i] == n[i]);
        CHECK_CLOSE(r->bin_loss[i], lift_mean(loss[i], n[i]), 1e-4);
    }
}

/* The gradient got is that of the weighted cross-entropy c on batch b, by a plain pass
   and, in one direction, by differences of the reference. */
static void lift_check_gradient(dlm_ctx *ctx, dlm_model *m, reference *ref,
                                const dlm_batch *b, ce_score *c, const float *got)
{
    const double h = 1e-6;
    size_t n = m->n_params;
    float *want = grad_of_pass(ctx, m, b, c);
    double scale = fabs((double)want[grad_largest(want, n)]), squares = 0;
    double *kept = ref_doubles(n), *d = ref_doubles(n), slope = 0, loss[2];
    for (size_t i = 0; i < n; i++) {
        squares += (double)want[i] * want[i];
        CHECK_CLOSE(got[i], want[i], 1e-4 * scale);
        kept[i] = ref->w[i];
    }
    for (size_t i = 0; i < n; i++) {
        d[i] = test_float() / sqrt((double)n) + got[i] / (sqrt(squares) + 1e-30);
        slope += d[i] * got[i];
    }
    for (int side = 0; side < 2; side++) {
        for (size_t i = 0; i < n; i++) ref->w[i] = kept[i] + (side ? h : -h) * d[i];
        loss[side] = ce_reference(c, ref, b);
    }
    CHECK_CLOSE((loss[1] - loss[0]) / (2 * h), slope, 1e-3 * sqrt(squares));
    memcpy(ref->w, kept, n * sizeof(double));
    free(want); free(kept); free(d);
}

static void lift_check_step(dlm_ctx *ctx, dlm_model *m, reference *ref, dlm_trainer *t,
                            const dlm_train_options *o, const dlm_example *e)
{
    static lift_plan p;
    static lift_rows rows;
    ce_score c;
    dlm_report r;
    double squares = 0;
    memset(&p, 0, sizeof p);
    p.c = m->config; p.o = *o; p.e = e; p.step = (uint32_t)t->steps;
    memset(t->adam_m, 0, m->n_params * sizeof(float));
    CHECK_OK(dlm_trainer_step(t, e, LIFT_SEQS, &r));
    lift_draw(&p);
    if (p.lift || o->lift.choose == rival_gift) lift_score(&p, ref);
    lift_check_kept(&p, t->state);
    lift_weigh(&p);
    lift_view(&rows, &p, 0, p.seen, p.weight);
    if (o->lift.complementary) lift_view(&rows, &p, 1, p.rest, p.other);
    const dlm_batch *b = lift_rows_end(&rows, &p, &c);
    const int n_rows = t->state->start[t->state->batch.n_seqs];
    CHECK(n_rows == rows.t.start[b->n_seqs]);
    for (int i = 0; i < n_rows; i++) CHECK(t->state->tokens[i] == rows.t.tokens[i]);
    lift_check_gradient(ctx, m, ref, b, &c, t->adam_m);
    for (size_t i = 0; i < m->n_params; i++) squares += pow((double)t->adam_m[i], 2);
    CHECK_CLOSE(r.grad_norm, sqrt(squares), 1e-5 * sqrt(squares));
    CHECK_CLOSE(r.loss, ce_total(&c), 1e-5 * (1 + ce_total(&c)));
    CHECK((double)r.tokens == p.D && r.scored == c.n_out);
    if (o->lift.method == DLM_METHOD_RANDOM_K)          /* nothing is scored       */
        CHECK_CLOSE(r.flops, 3 * dlm_forward_flops(&m->config, b), 1e-6 * r.flops);
    lift_check_bins(&p, &rows, &c, &r);
    ce_close(&c);
}

/* What is learnt from; shifted, a token more. */
static const struct lift_setting {
    int    length, prompt, steps;
    float  level_min, level_max;
    float  sharpness;                      /* of predictions; very: entropy 0, for GIFT */
    int    given;                          /* shifted: the token more is given, too */
} lift_settings[] = {
    { 17, 0, 3, 0, 0, 1, 1 },
    { 1, 0, 2, 0, 0, 1, 1 },               /* a response of one token              */
    { 19, 18, 1, 1e-3f, 1e-3f, 1, 1 },     /* hardly anything is masked            */
    { 9, 1, 1, 1, 1, 1, 1 },               /* everything is masked                 */
    { 17, 2, 2, 0, 0, 1e8f, 1 },
    { 18, 0, 3, 0, 0, 1, 0 },              /* shifted, nothing predicts token 0    */
};
enum { LIFT_SETTINGS = sizeof lift_settings / sizeof *lift_settings };

static void lift_check_case(dlm_ctx *ctx, int kind, const lift_case *c, int setting)
{
    const struct lift_setting *s = &lift_settings[setting];
    dlm_model *m = toy_model(ctx, kind, 3);
    dlm_train_options o = lift_options(c->o, s->level_min, s->level_max);
    dlm_trainer *t = test_trainer(ctx, m, &o);
    dlm_example e[LIFT_SEQS];
    dlm_tensor norm;
    reference ref;
    dlm_model_tensor(m, dlm_model_tensors(m) - 1, &norm);
    CHECK(strcmp(norm.name, "model.norm.weight") == 0);
    for (int i = 0; i < norm.rows; i++) norm.data[i] *= s->sharpness;
    ref_open(&ref, m);
    for (int step = 0; step < s->steps; step++) {
        lift_examples(e, s->length + kind % 2, s->prompt + kind % 2 * s->given);
        LABEL("%s, %s, setting %d.%d", toy_kind_names[kind], c->name, setting, step);
        lift_check_step(ctx, m, &ref, t, &o, e);
    }
    ref_close(&ref);
    dlm_trainer_free(t);
    dlm_model_free(m);
}

TEST(lift_steps_of_every_method_follow_their_formulas)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int kind = 0; kind < 4; kind++)
        for (int i = 0; i < LIFT_CASES; i++)
            for (int k = 0; k < LIFT_SETTINGS; k++)
                if (lift_settings[k].sharpness < 2 ||
                    lift_cases[i].o.choose == rival_gift)
                    lift_check_case(ctx, kind, &lift_cases[i], k);
    test_close(ctx);
}

/* Selection with rho = 0, then the gradient, at the masks of the vanilla step before. */
static double lift_again_without_rho(dlm_trainer *t)
{
    dlm_state *s = t->state;
    dlm_report r;
    memset(&r, 0, sizeof r);
    for (int k = 0; k < s->n_units; k++) {
        s->units[k].keep = (dlm_select)(k % 3);
        s->units[k].wanted = s->units[k].keep != DLM_SELECT_RANDOM;
    }
    CHECK_OK(dlm_state_layout(s, 0));
    CHECK_OK(dlm_trainer_forward(t, &s->batch, dlm_state_gold, s));
    for (int k = 0; k < s->n_units; k++) {
        dlm__lift_refill(s, &s->units[k], &r);
        s->units[k].wanted = 1;
    }
    CHECK_OK(dlm_state_layout(s, 0));
    CHECK_OK(dlm_trainer_pass(t, &s->batch, dlm_state_loss, s));
    dlm__report_state(&r, s);
    return r.loss;
}

/* What a user can write with a state is what the library runs: two steps of the trainer
   against the same in pieces. */
TEST(steps_are_the_public_pieces_bit_for_bit)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int kind = 0; kind < 4; kind++) {
        dlm_model *m[2] = { toy_model(ctx, kind, 3), toy_model(ctx, kind, 3) };
        dlm_trainer *t[2] = { test_trainer(ctx, m[0], NULL),
                              test_trainer(ctx, m[1], NULL) };
        dlm_state *s = NULL;
        dlm_example e[LIFT_SEQS];
        dlm_report r;
        lift_examples(e, 17, 3);
        CHECK_OK(dlm_state_create(&s, ctx, &m[1]->config, DLM_OBJECTIVE_AUTO, 300, 0,
                                  NULL));
        for (uint32_t step = 0; s && step < 2; step++) {
            dlm_noise noise = {0};
            double loss = 0;
            noise.step = step;
            noise.lo = (double)1e-3f;           /* as the options hold it          */
            CHECK_OK(dlm_trainer_step(t[0], e, LIFT_SEQS, &r));
            CHECK_OK(dlm_state_take(s, e, LIFT_SEQS, 1));
            CHECK(s->n_examples == LIFT_SEQS);
            dlm_state_noise(s, &noise);
            CHECK_OK(dlm_state_layout(s, 0));
            CHECK_OK(dlm_trainer_forward(t[1], &s->batch, dlm_state_gold, s));
            CHECK_OK(dlm_trainer_pass(t[1], &s->batch, dlm_state_loss, s));
            for (int i = 0; i < s->batch.n_out; i++)
                CHECK(s->score[s->out_cell[i]] == (float)-s->loss[i]);
            for (int i = 0; i < s->batch.n_out; i++)
                loss += s->loss[i] * (double)s->out_weight[i] * s->scale;
            CHECK_OK(dlm_trainer_update(t[1], NULL));
            LABEL("%s, step %d", toy_kind_names[kind], (int)step);
            CHECK(loss == r.loss && s->batch.n_out == r.scored);
        }
        CHECK(!memcmp(m[0]->weights, m[1]->weights, m[0]->n_params * sizeof(float)));
        dlm_state_free(s);
        for (int k = 0; k < 2; k++) { dlm_trainer_free(t[k]); dlm_model_free(m[k]); }
    }
    test_close(ctx);
}

/* A state takes what fits and refuses what never could. */
TEST(states_take_what_fits)
{
    static int tokens[TOY_SLOTS];
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_config c = toy_config(2);
    dlm_example e[3] = { { tokens, 10, 3, 0, NULL }, { tokens, 12, 12, 0, NULL },
                         { tokens, 9, 1, 0, NULL } };
    const dlm_example few[2] = { { tokens, 2, 0, 2, NULL }, { tokens, 2, 0, 2, NULL } };
    dlm_state *s = NULL;
    CHECK_OK(dlm_config_resolve(ctx, &c));
    CHECK_ERROR(dlm_state_create(&s, ctx, &c, DLM_OBJECTIVE_BLOCK, 0, 0, NULL),
                DLM_E_CONFIG, ctx, "rows");
    CHECK_ERROR(dlm_state_create(&s, ctx, &c, DLM_OBJECTIVE_AR, 20, 2, NULL),
                DLM_E_CONFIG, ctx, "causal pattern");
    CHECK_OK(dlm_state_create(&s, ctx, &c, DLM_OBJECTIVE_BLOCK, 20, 2, NULL));
    CHECK_OK(dlm_state_take(s, e, 3, 1));       /* 18 rows, 0 rows, no third       */
    CHECK(s->n_examples == 2 && s->n_units == 2 && s->n_cells == 7);
    dlm_state_noise(s, NULL);
    CHECK_OK(dlm_state_layout(s, 0));
    CHECK(s->batch.n_seqs == 1 && s->start[1] == 18 && s->scale == 1.0 / 7);
    CHECK_ERROR(dlm_state_layout(s, 1), DLM_E_INPUT, ctx, "rows of example 0");
    CHECK(s->batch.n_seqs == 0 && s->batch.n_out == 0);
    CHECK_OK(dlm_state_take(s, few, 2, 2));     /* 4 rows twice, no room for a third */
    CHECK(s->n_examples == 1);
    dlm_state_noise(s, NULL);
    CHECK_OK(dlm_state_layout(s, 0));
    CHECK_OK(dlm_state_layout(s, 1));
    CHECK(s->batch.n_seqs == 2 && s->start[2] == 2 * s->start[1]);
    CHECK_ERROR(dlm_state_layout(s, 1), DLM_E_INPUT, ctx, "no room");
    for (int views = 0; views <= 3; views += 3)
        CHECK_ERROR(dlm_state_take(s, e, 2, views), DLM_E_CONFIG, ctx, "views");
    CHECK_OK(dlm_state_take(s, e + 1, 1, 1));
    CHECK(s->n_examples == 1 && s->n_cells == 0);
    dlm_state_noise(s, NULL);
    CHECK_OK(dlm_state_layout(s, 0));
    CHECK(s->batch.n_seqs == 0 && s->batch.n_out == 0);
    CHECK_ERROR(dlm_state_take(s, e, 0, 1), DLM_E_INPUT, ctx, "0 of them");
    CHECK_ERROR(dlm_state_take(s, e, 1, 2), DLM_E_INPUT, ctx, "36 rows");
    tokens[4] = -1;
    CHECK_ERROR(dlm_state_take(s, e, 1, 1), DLM_E_INPUT, ctx, "token -1 at 4");
    dlm_state_free(s);
    CHECK_OK(dlm_state_create(&s, ctx, &c, DLM_OBJECTIVE_BLOCK, 20, 1, NULL));
    CHECK_ERROR(dlm_state_take(s, e, 1, 2), DLM_E_CONFIG, ctx, "views: 2");
    dlm_state_free(s);
    test_close(ctx);
}

/* With rho set to 0, and at t = 1, which leaves no room for it. */
TEST(lift_without_extra_masks_is_vanilla_bit_for_bit)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int kind = 0; kind < 4; kind++) {
        dlm_model *m = toy_model(ctx, kind, 2);
        dlm_train_options o = lift_options(lift_cases[0].o, 0, 0);
        dlm_trainer *t = test_trainer(ctx, m, &o);
        dlm_example e[LIFT_SEQS];
        dlm_report want, got;
        size_t size = m->n_params * sizeof(float);
        float *g = test_floats(m->n_params);
        lift_examples(e, 13, 2);
        LABEL("%s", toy_kind_names[kind]);
        CHECK_OK(dlm_trainer_step(t, e, LIFT_SEQS, &want));
        CHECK(want.scored > 0 && want.loss == lift_again_without_rho(t));
        CHECK(memcmp(t->adam_m, t->gradients, size) == 0);
        dlm_trainer_free(t);
        o.level_min = o.level_max = 1;
        for (int i = DLM_METHOD_VANILLA; i <= DLM_METHOD_RANDOM_K; i++) {
            o.lift.method = (dlm_method)i;
            t = test_trainer(ctx, m, &o);
            CHECK_OK(dlm_trainer_step(t, e, LIFT_SEQS, &got));
            if (i == DLM_METHOD_VANILLA) { want = got; memcpy(g, t->adam_m, size); }
            CHECK(want.scored == got.scored && want.loss == got.loss);
            CHECK(memcmp(g, t->adam_m, size) == 0);
            dlm_trainer_free(t);
        }
        free(g);
        dlm_model_free(m);
    }
    test_close(ctx);
}

/* With one pass the scores come from the activations that learn, otherwise from a pass
   that keeps none; the cross-entropies of the former stand beside them. */
TEST(lift_scores_equal_those_of_the_learning_pass_bit_for_bit)
{
    FOR_EACH_ISA(isa) {
        dlm_ctx *ctx = test_open(isa, 1);
        for (int kind = 0; kind < 4; kind++) {
            dlm_model *m = toy_model(ctx, kind, 4);
            dlm_example e[LIFT_SEQS];
            dlm_trainer *t[2];
            lift_examples(e, 13, 3);
            for (int one = 0; one < 2; one++) {
                dlm_train_options o = lift_options(lift_cases[0].o, 0.1f, 0.6f);
                o.lift.method = DLM_METHOD_TOP_K;
                o.lift.one_pass = one;
                t[one] = test_trainer(ctx, m, &o);
                CHECK_OK(dlm_trainer_step(t[one], e, LIFT_SEQS, NULL));
            }
            const dlm_state *s = t[1]->state;
            LABEL("%s, %s", dlm_isa_name((dlm_isa)isa), toy_kind_names[kind]);
            CHECK(s->batch.n_out > 15);
            for (int i = 0; i < s->batch.n_out; i++) {
                int cell = s->out_cell[i];
                CHECK(t[0]->state->score[cell] == s->score[cell]);
                CHECK(s->score[cell] == (float)-s->loss[i]);
            }
            dlm_trainer_free(t[0]);
            dlm_trainer_free(t[1]);
            dlm_model_free(m);
        }
        test_close(ctx);
    }
}

/* Of blocks of four one token stays masked: which one says nothing about which one does
   in the next block of the same example. */
TEST(lift_blocks_choose_independently)
{
    enum { STEPS = 60, BLOCKS = 6 };
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_model *m = toy_model(ctx, 2, 1);
    dlm_train_options o = lift_options(lift_cases[0].o, 0.25f, 0.25f);
    o.lift.method = DLM_METHOD_RANDOM_K;
    dlm_trainer *t = test_trainer(ctx, m, &o);
    dlm_example e[LIFT_SEQS];
    int pairs = 0, alike = 0;
    lift_examples(e, TOY_SLOTS, 0);
    e[1].prompt = 0;
    for (int step = 0; step < STEPS; step++) {
        CHECK_OK(dlm_trainer_step(t, e, LIFT_SEQS, NULL));
        for (int k = 0, before = -1; k < LIFT_SEQS * (int)BLOCKS; k++) {
            const unsigned char *x = t->state->masked + 4 * k;
            int place = x[0] + x[1] + x[2] + x[3] == 1 ? x[1] + 2 * x[2] + 3 * x[3] : -1;
            pairs += k % 2 && before >= 0 && place >= 0;
            alike += k % 2 && before >= 0 && place == before;
            before = place;
        }
    }
    CHECK(pairs > 100);
    CHECK_CLOSE(alike, 0.25 * pairs, 4.75 * sqrt(0.1875 * pairs));
    dlm_trainer_free(t);
    dlm_model_free(m);
    test_close(ctx);
}

/* Without learning every method is vanilla: of a model that knows nothing, ln V. */
TEST(lift_evaluate_is_the_plain_bound_for_every_method)
{
    enum { DRAWS = 1500 };
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int kind = 0; kind < 4; kind += 2) {
        dlm_model *m = toy_model(ctx, kind, 6);
        dlm_trainer *t = test_trainer(ctx, m, NULL);
        dlm_example e[LIFT_SEQS];
        dlm_report want, got;
        double sum = 0, squares = 0;
        lift_examples(e, 20, 2);
        for (int i = 0; i < LIFT_CASES; i++) {
            dlm_train_options o = lift_options(lift_cases[i].o, 0.3f, 0.4f);
            o.seed = 0;
            dlm_trainer *other = test_trainer(ctx, m, &o);
            LABEL("%s, %s", toy_kind_names[kind], lift_cases[i].name);
            CHECK_OK(dlm_trainer_step(other, e, LIFT_SEQS, NULL));
            CHECK_OK(dlm_trainer_evaluate(other, e, LIFT_SEQS, (uint32_t)i, &got));
            CHECK_OK(dlm_trainer_evaluate(t, e, LIFT_SEQS, (uint32_t)i, &want));
            got.step = want.step;
            CHECK(memcmp(&got, &want, sizeof got) == 0);
            dlm_trainer_free(other);
        }
        memset(m->weights, 0, m->n_params * sizeof(float));
        for (uint32_t draw = 0; draw < DRAWS; draw++) {
            CHECK_OK(dlm_trainer_evaluate(t, e, LIFT_SEQS, draw, &got));
            sum += got.loss / (int)DRAWS;
            squares += got.loss * got.loss / (int)DRAWS;
        }
        double error = sqrt((squares - sum * sum) / (int)DRAWS);
        LABEL("%s", toy_kind_names[kind]);
        CHECK_CLOSE(sum, log((double)TOY_VOCAB), fmin(4.75 * error, 0.3));
        dlm_trainer_free(t);
        dlm_model_free(m);
    }
    test_close(ctx);
}

/* A few steps; the weights that come out, to be freed. */
static float *lift_run(int kind, const lift_case *c, int threads, float lr, int max_rows,
                       dlm_report *r)
{
    uint64_t before = test_state;
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, threads);
    dlm_model *m = toy_model(ctx, kind, 7);
    dlm_train_options o = lift_options(c->o, 0, 0);
    dlm_example e[LIFT_SEQS];
    o.lr = lr;
    o.max_rows = max_rows;
    dlm_trainer *t = test_trainer(ctx, m, &o);
    for (int step = 0; step < LIFT_STEPS; step++) {
        lift_examples(e, 15, 2);
        CHECK_OK(dlm_trainer_step(t, e, LIFT_SEQS, &r[step]));
    }
    float *weights = test_floats(m->n_params);
    memcpy(weights, m->weights, m->n_params * sizeof(float));
    dlm_trainer_free(t);
    dlm_model_free(m);
    test_close(ctx);
    test_state = before;
    return weights;
}

/* With room for one example at a time there are other sums, but the same numbers. */
TEST(lift_steps_do_not_depend_on_threads_or_passes)
{
    for (int k = 0; k < 4 * LIFT_CASES; k++) {
        dlm_report r[4][LIFT_STEPS];
        const lift_case *c = &lift_cases[k / 4];
        int rows = (k % 4 < 2 ? TOY_SLOTS : 2 * TOY_SLOTS - 5) << c->o.complementary;
        float *one = lift_run(k % 4, c, 1, 1e-3f, 0, r[0]);
        float *two = lift_run(k % 4, c, 2, 1e-3f, 0, r[1]);
        free(lift_run(k % 4, c, 1, 1e-30f, 0, r[2]));
        free(lift_run(k % 4, c, 1, 1e-30f, rows, r[3]));
        dlm_config config = toy_config(k % 4);
        dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
        const size_t half = dlm_model_bytes(ctx, &config, DLM_F32, 0) / 2;
        test_close(ctx);
        LABEL("%s, %s", toy_kind_names[k % 4], c->name);
        CHECK(half > 0 && memcmp(one, two, half) == 0);
        CHECK(memcmp(r[0], r[1], sizeof r[0]) == 0);
        for (int step = 0; step < LIFT_STEPS; step++) {
            const dlm_report *a = &r[2][step], *b = &r[3][step];
            if (c->o.choose == rival_gift) continue;            /* means of a pass */
            CHECK_CLOSE(b->loss, a->loss, 1e-6 * a->loss);
            CHECK_CLOSE(b->grad_norm, a->grad_norm, 1e-4 * a->grad_norm);
            CHECK(a->tokens == b->tokens && a->scored == b->scored);
            CHECK(memcmp(a->bin_count, b->bin_count, sizeof a->bin_count) == 0);
            CHECK(memcmp(a->bin_kept, b->bin_kept, sizeof a->bin_kept) == 0);
        }
        free(one); free(two);
    }
}

/* A step is a function of weights, seed, step and examples, not of earlier examples: as
   when training goes on from a file.  Shifted, token 0 can be masked but has no row. */
TEST(lift_steps_depend_on_nothing_that_was_before)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int k = 0; k < 4 * 4 * LIFT_CASES; k++) {
        const lift_case *c = &lift_cases[k / 16];
        double scores[2] = {0};
        dlm_report r[2];
        dlm_example e[LIFT_SEQS];
        dlm_model *m = toy_model(ctx, k % 4, 8);
        dlm_train_options o = lift_options(c->o, 0, 0);
        o.seed += (uint64_t)(k / 4 % 4);
        lift_examples(e, 12, 3);
        LABEL("%s, %s, seed + %d", toy_kind_names[k % 4], c->name, k / 4 % 4);
        for (int fresh = 0; fresh < 2; fresh++) {
            dlm_trainer *t = test_trainer(ctx, m, &o);
            e[0].prompt = e[2].prompt = 3;
            if (fresh) CHECK_OK(dlm_trainer_update(t, NULL));
            else CHECK_OK(dlm_trainer_step(t, e, LIFT_SEQS, NULL));
            e[0].prompt = e[2].prompt = 0;
            CHECK_OK(dlm_trainer_step(t, e, LIFT_SEQS, &r[fresh]));
            for (int i = 0; c->o.method && i < t->state->n_cells; i++)
                scores[fresh] += t->state->score[i];
            dlm_trainer_free(t);
        }
        CHECK(memcmp(&r[0], &r[1], sizeof r[0]) == 0 && scores[0] == scores[1]);
        dlm_model_free(m);
    }
    test_close(ctx);
}

/* Learns from the first unit alone; says DLM_E_NOMEM in call number `bad`. */
typedef struct lift_rule {
    int calls, bad, masked;
} lift_rule;

static dlm_error lift_first_unit(void *user, dlm_trainer *t)
{
    lift_rule *rule = (lift_rule *)user;
    dlm_state *s = t->state;
    for (int k = 0; k < s->n_units; k++) {
        dlm_unit *u = &s->units[k];
        CHECK(u->wanted == 1 && u->rho == 0);
        for (int i = u->cell; i < u->cell + u->n; i++) {
            dlm_address at = { s->noise.seed, DLM_RANDOM_MASK, s->noise.step,
                               (uint32_t)(s->noise.row + u->example),
                               (uint32_t)(i - s->first_cell[u->example]) };
            CHECK(s->masked[i] == (dlm_uniform(&at, 0) < u->t));
            CHECK(s->weight[i] == (float)(1 / u->t));
            if (k == 0 && i >= u->cell + u->blind) rule->masked += s->masked[i];
        }
        u->wanted = k == 0;
        for (int i = 0; k > 0 && i < u->n; i++) s->weight[u->cell + i] = 0;
    }
    return ++rule->calls == rule->bad ? DLM_E_NOMEM : DLM_OK;
}

TEST(lift_rules_of_ones_own_take_the_place_of_the_method)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int k = 0; k < 8; k++) {
        dlm_model *m = toy_model(ctx, k / 2, 8);
        dlm_train_options o = lift_options(lift_cases[0].o, 0.5f, 0.9f);
        lift_rule rule = { 0, 0, 0 };
        dlm_example e[LIFT_SEQS];
        dlm_report r;
        lift_examples(e, 12, 3);
        o.lift.method = DLM_METHOD_LIFT3;
        o.lift.one_pass = k % 2;
        o.lift.choose = lift_first_unit;
        o.lift.choose_user = &rule;
        o.max_rows = k < 4 ? TOY_SLOTS : 2 * TOY_SLOTS;     /* not for all of them */
        dlm_trainer *t = test_trainer(ctx, m, &o);
        LABEL("%s, one pass %d", toy_kind_names[k / 2], k % 2);
        CHECK_OK(dlm_trainer_step(t, e, LIFT_SEQS, &r));
        CHECK(rule.calls > 1 && r.scored == rule.masked && r.scored > 0);
        for (int i = 0; i < DLM_BINS; i++) CHECK(r.bin_superset[i] == 0);
        rule.bad = 2 * rule.calls;
        CHECK_OK(dlm_trainer_evaluate(t, e, LIFT_SEQS, 0, &r));
        CHECK(rule.calls == rule.bad / 2);
        CHECK(dlm_trainer_step(t, e, LIFT_SEQS, &r) == DLM_E_NOMEM);
        CHECK(rule.calls == rule.bad && t->steps == 1);
        CHECK(t->gradients[grad_largest(t->gradients, m->n_params)] != 0);
        dlm_trainer_free(t);
        dlm_model_free(m);
    }
    test_close(ctx);
}

TEST(lift_options_are_checked_by_name)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_model *m = toy_model(ctx, 2, 1), *causal = toy_model(ctx, 4, 1);
    static const float bad[] = { -0.01f, (float)NAN, (float)INFINITY };
#define TRY(model, assignment, text) do { dlm_train_options o = {0}; \
        assignment; train_try_options(ctx, model, &o, text); } while (0)
    for (int byte = 1; byte < 256; byte += 254) {
        TRY(m, memset(&o.lift.method, byte, sizeof o.lift.method), "lift.method");
        TRY(m, memset(&o.lift.policy, byte, sizeof o.lift.policy), "lift.policy");
    }
    for (int i = 0; i < 3; i++) TRY(m, o.lift.H = bad[i], "lift.H");
    for (int i = 1; i < DLM_METHOD_COUNT; i++)
        TRY(causal, o.lift.method = (dlm_method)i, "lift.method");
    TRY(causal, o.lift.complementary = 1, "lift");      /* there are no masks      */
    TRY(causal, o.lift.choose = rival_cart, "choose");
    TRY(m, o.lift.one_pass = o.lift.complementary = 1, "lift.one_pass");
#undef TRY
    dlm_model_free(m);
    dlm_model_free(causal);
    test_close(ctx);
}

/* ==[ divergences ]===========================================================
   Values and gradients of the divergences in double.  K: the tokens that take part. */

enum { OPD_BIG = 300 };

/* in[v]: v is among the K best of p, of equals the lower id; K = 0: all are. */
static void opd_members(int *in, const float *p, int V, int K)
{
    for (int v = 0; v < V; v++) {
        int before = 0;
        for (int u = 0; u < V; u++) before += p[u] > p[v] || (p[u] == p[v] && u < v);
        in[v] = K == 0 || before < K;
    }
}

static double opd_value(const double *z, const float *p, const int *in, int V,
                        const dlm_divergence_options *o)
{
    double lse = ref_log_sum_exp(z, V), sum = 0;
    double w = o->weight > 0 ? (double)o->weight : 0.5;
    if (o->kind == DLM_FORWARD_KL) w = 0;
    if (o->kind == DLM_REVERSE_KL) w = 1;
    for (int v = 0; v < V; v++) {
        double ls = z[v] - lse, s = exp(ls), q = (double)p[v], m = w * q + (1 - w) * s;
        if (!in[v]) continue;
        if (o->kind == DLM_JSD) sum += (1 - w) * s * log(s / m);
        if (o->kind == DLM_JSD && q > 0) sum += w * q * log(q / m);
        if (o->kind != DLM_JSD && q > 0) sum += (1 - w) * q * (log(q) - ls);
        if (o->kind != DLM_JSD && w > 0) sum += w * s * (ls - log(q));
    }
    return sum;
}

/* g (V): the last column of the table of B.7, sparse forms included. */
static void opd_gradient(double *g, const double *z, const float *p, const int *in, int V,
                         const dlm_divergence_options *o)
{
    double lse = ref_log_sum_exp(z, V), PK = 0, rev = 0, jsd = 0;
    double w = o->weight > 0 ? (double)o->weight : 0.5, to_rev = w;
    if (o->kind == DLM_FORWARD_KL) to_rev = 0;
    if (o->kind == DLM_REVERSE_KL) to_rev = 1;
    for (int pass = 0; pass < 2; pass++) {
        for (int v = 0; v < V; v++) {
            double s = exp(z[v] - lse), q = (double)p[v];
            double r = in[v] && to_rev > 0 ? z[v] - lse - log(q) + 1 : 0;
            double j = in[v] ? log(s / (w * q + (1 - w) * s)) : 0;
            if (pass == 0) {
                PK += in[v] ? q : 0;
                rev += s * r;
                jsd += s * j;
            } else if (o->kind == DLM_JSD) {
                g[v] = (1 - w) * s * (j - jsd);
            } else {
                g[v] = (1 - to_rev) * (PK * s - (in[v] ? q : 0))
                     + (to_rev > 0 ? to_rev * s * (r - rev) : 0);
            }
        }
    }
}

static void opd_try_divergence(dlm_ctx *ctx, const dlm_divergence_options *o, int V,
                               const float *p)
{
    float z[OPD_BIG];
    double x[OPD_BIG], g[OPD_BIG];
    int in[OPD_BIG];
    test_fill(z, (size_t)V, 4.0f);
    for (int v = 0; v < V; v++) x[v] = (double)z[v];
    opd_members(in, p, V, o->sparse < V ? o->sparse : 0);
    opd_gradient(g, x, p, in, V, o);
    double want = opd_value(x, p, in, V, o);
    CHECK_CLOSE(dlm_divergence(ctx, z, p, V, 0.75, o), want, 2e-6 * (1 + fabs(want)));
    for (int v = 0; v < V; v++) {
        double keep = x[v], h = 1e-5, up, down;
        x[v] = keep + h;
        up = opd_value(x, p, in, V, o);
        x[v] = keep - h;
        down = opd_value(x, p, in, V, o);
        x[v] = keep;
        CHECK_CLOSE(g[v], (up - down) / (2 * h), 1e-8);         /* the formula     */
        CHECK_CLOSE(z[v], 0.75 * g[v], 1e-6);
    }
}

/* 0: any probabilities, 1: many ties, 2: with zeros. */
static void opd_target(float *p, int V, int which)
{
    double sum = 0;
    for (int v = 0; v < V; v++) {
        p[v] = which == 1 ? (float)(1 + test_below(2)) : expf(3.0f * test_float());
        if (which == 2 && v % 3 == 1) p[v] = 0;
        sum += (double)p[v];
    }
    for (int v = 0; v < V; v++) p[v] = (float)((double)p[v] / sum);
}

static const struct { int kind; float weight; } opd_kinds[] = {
    { DLM_FORWARD_KL, 0 }, { DLM_REVERSE_KL, 0 }, { DLM_MIXED_KL, 0 },
    { DLM_MIXED_KL, 0.125f }, { DLM_MIXED_KL, 1 }, { DLM_JSD, 0 }, { DLM_JSD, 0.1f },
    { DLM_JSD, 0.9f },
};
enum { OPD_KINDS = sizeof opd_kinds / sizeof *opd_kinds };

TEST(divergences_and_gradients_follow_their_formulas_on_every_isa)
{
    static const int sizes[] = { 1, 2, 7, 33, OPD_BIG };
    float p[OPD_BIG];
    FOR_EACH_ISA(isa) {
        dlm_ctx *ctx = test_open(isa, 1);
        for (int i = 0; i < OPD_KINDS * 5 * 3 * 4; i++) {
            dlm_divergence_options o = {0};
            int V = sizes[i / OPD_KINDS % 5], which = i / OPD_KINDS / 5 % 3;
            int sparse[4] = { 0, 1, 3, V };
            o.kind = (dlm_divergence_kind)opd_kinds[i % OPD_KINDS].kind;
            o.weight = opd_kinds[i % OPD_KINDS].weight;
            o.sparse = sparse[i / OPD_KINDS / 15];
            if (V == OPD_BIG && isa > DLM_ISA_SSE2 && o.sparse != 3) continue;
            if (which == 2 && (o.kind == DLM_REVERSE_KL || o.kind == DLM_MIXED_KL))
                continue;                       /* infinite                        */
            opd_target(p, V, which);
            LABEL("%s, kind %d, w %g, V %d, K %d, target %d", dlm_isa_name((dlm_isa)isa),
                  (int)o.kind, (double)o.weight, V, o.sparse, which);
            opd_try_divergence(ctx, &o, V, p);
        }
        test_close(ctx);
    }
}

/* Equal distributions, and logits as far apart as they ever are. */
TEST(divergences_vanish_for_equals_and_stay_finite_far_apart)
{
    enum { V = 9 };
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int i = 0; i < OPD_KINDS; i++) {
        dlm_divergence_options o = {0};
        float z[V], p[V];
        o.kind = (dlm_divergence_kind)opd_kinds[i].kind;
        o.weight = opd_kinds[i].weight;
        LABEL("kind %d", (int)o.kind);
        test_fill(z, V, 3.0f);
        memcpy(p, z, sizeof p);
        dlm_teacher_probs(ctx, p, V, &o);
        CHECK_CLOSE(dlm_divergence(ctx, z, p, V, 1, &o), 0, 1e-6);
        for (int v = 0; v < V; v++) CHECK_CLOSE(z[v], 0, 1e-6);
        for (int v = 0; v < V; v++) z[v] = (float)(40 * v);
        for (int v = 0; v < V; v++) p[v] = (float)(-10 * v);
        o.temperature = 0.1f;                   /* a cold teacher: e^-100 and less */
        dlm_teacher_probs(ctx, p, V, &o);
        double value = dlm_divergence(ctx, z, p, V, 1, &o);
        CHECK(value - value == 0 && value > 0);
        for (int v = 0; v < V; v++) CHECK(z[v] - z[v] == 0);
    }
    test_close(ctx);
}

/* Temperature, then top-k, then top-p, then min-p, each on what the last one left. */
static void opd_renormalise(double *p, const float *logits, int V,
                            const dlm_divergence_options *o)
{
    const double heat = o->temperature > 0 ? (double)o->temperature : 1;
    double sum = 0, best = 0, q[OPD_BIG], most = (double)logits[0];
    for (int v = 0; v < V; v++) most = fmax(most, (double)logits[v]);
    for (int v = 0; v < V; v++) {
        int above = 0;
        for (int u = 0; u < V; u++) above += logits[u] > logits[v];
        p[v] = exp(((double)logits[v] - most) / heat);
        if (o->top_k > 0 && above >= o->top_k) p[v] = 0;
        sum += p[v];
    }
    for (int v = 0; v < V; v++) {
        q[v] = p[v] /= sum;
        if (q[v] > best) best = q[v];
    }
    sum = 0;
    for (int v = 0; v < V; v++) {
        double before = 0;
        for (int u = 0; u < V; u++) before += q[u] > q[v] ? q[u] : 0;
        if (o->top_p > 0 && before > (double)o->top_p) p[v] = 0;
        if (q[v] < (double)o->min_p * best) p[v] = 0;
        sum += p[v];
    }
    for (int v = 0; v < V; v++) p[v] /= sum;
}

TEST(teacher_probabilities_are_tempered_then_filtered)
{
    static const struct { float temperature, top_p, min_p; int top_k; } list[] = {
        { 0, 0, 0, 0 },    { 0.5f, 0, 0, 0 },  { 3, 0, 0, 0 },   { 0, 0, 0, 1 },
        { 0, 0, 0, 5 },    { 0, 0, 0, 9999 },  { 0, 0.7f, 0, 0 }, { 0, 1, 0, 0 },
        { 0, 0.001f, 0, 0 }, { 0, 0, 0.2f, 0 }, { 0, 0, 1, 0 }, { 2, 0.6f, 0.3f, 4 },
        { 0.7f, 0.9f, 0.02f, 9 }, { 1e-40f, 0, 0, 0 },
    };
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int i = 0; i < 14 * 5; i++) {
        float x[OPD_BIG];
        double want[OPD_BIG];
        int V = i / 14 == 0 ? 1 : i / 14 == 1 ? 2 : i / 14 == 4 ? OPD_BIG : 17;
        test_fill(x, (size_t)V, 4.0f);
        if (i / 14 == 3) x[3] = x[11] = x[4] = 4.5f;             /* ties stay together */
        dlm_divergence_options o = {0};
        o.temperature = list[i % 14].temperature; o.top_k = list[i % 14].top_k;
        o.top_p = list[i % 14].top_p; o.min_p = list[i % 14].min_p;
        LABEL("options %d, V %d", i % 14, V);
        opd_renormalise(want, x, V, &o);
        dlm_teacher_probs(ctx, x, V, &o);
        for (int v = 0; v < V; v++) CHECK_CLOSE(x[v], want[v], 1e-6);
        for (int v = 0; v < V; v++) CHECK((x[v] > 0) == (want[v] > 0));
    }
    test_close(ctx);
}

/* ==[ conversion ]============================================================ */

enum { OPD_V = TOY_MASK, OPD_MAX = 48 };       /* converted: TOY_VOCAB, TOY_MASK   */

static dlm_model *opd_teacher(dlm_ctx *ctx, uint64_t seed)
{
    dlm_config c = toy_config(4);
    c.vocab = c.mask_id = OPD_V;
    c.max_seq = OPD_MAX;
    return toy_model_of(ctx, &c, seed);
}

static dlm_model *opd_student(dlm_ctx *ctx, const dlm_model *teacher, int block,
                              int mask_id, int shifted)
{
    dlm_model *m = NULL;
    if (mask_id == 0) mask_id = DLM_NEW_TOKEN;
    CHECK_OK(dlm_convert(&m, ctx, teacher, block, mask_id, shifted, NULL));
    if (!m) { printf("no student: %s\n", dlm_last_error(ctx)); exit(1); }
    return m;
}

static void opd_compare_models(const dlm_model *ar, const dlm_model *m)
{
    int V = ar->config.vocab, grown = 0;
    CHECK(dlm_model_tensors(ar) == dlm_model_tensors(m));
    for (int i = 0; i < dlm_model_tensors(ar); i++) {
        dlm_tensor a, b;
        dlm_model_tensor(ar, i, &a);
        dlm_model_tensor(m, i, &b);
        CHECK(!strcmp(a.name, b.name) && a.cols == b.cols);
        CHECK(!memcmp(a.data, b.data, (size_t)(a.rows * a.cols) * sizeof(float)));
        if (b.rows == a.rows) continue;
        CHECK(a.rows == V && b.rows == V + 1);
        grown++;
        for (int j = 0; j < a.cols; j++) {
            double sum = 0;
            for (int v = 0; v < V; v++) sum += (double)a.data[v * a.cols + j];
            CHECK_CLOSE(b.data[V * a.cols + j], sum / V, 1e-6);
        }
    }
    CHECK(grown == (m->config.vocab > V) * (1 + ar->config.untied_head
                                            + ar->config.head_bias));
}

TEST(convert_copies_weights_and_adds_a_mean_embedding)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int i = 0; i < 8; i++) {
        dlm_config c = toy_config(4);
        c.untied_head = i & 1; c.qkv_bias = i >> 1 & 1; c.no_qk_norm = i >> 1 & 1;
        c.rope_theta = 500; c.mask_id = i & 1 ? TOY_VOCAB : 0;
        c.gelu_mlp = c.head_bias = i >> 2 & 1;
        int old_mask = i >> 2 ? 5 : 0;
        dlm_model *ar = test_model(ctx, &c);
        dlm_model *m = opd_student(ctx, ar, i & 1 ? 3 : 0, old_mask, 0);
        dlm_config want = ar->config;
        LABEL("case %d", i);
        want.pattern = DLM_PATTERN_BLOCK;
        want.shifted = 0;
        want.block = i & 1 ? 3 : 4;
        want.vocab = TOY_VOCAB + !old_mask;
        want.mask_id = old_mask ? old_mask : TOY_VOCAB;
        CHECK(memcmp(&want, &m->config, sizeof want) == 0);
        opd_compare_models(ar, m);
        dlm_model_free(m); dlm_model_free(ar);
    }
    test_close(ctx);
}

TEST(convert_refuses_what_it_cannot_make_by_name)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_model *ar = toy_model(ctx, 4, 1), *block = toy_model(ctx, 2, 1), *m = ar;
    float place[4];
    dlm_memory mem = { place, sizeof place };
    CHECK_ERROR(dlm_convert(&m, ctx, block, 4, DLM_NEW_TOKEN, 0, NULL), DLM_E_CONFIG, ctx,
                "causal");
    CHECK(m == NULL);
    CHECK_ERROR(dlm_convert(&m, ctx, ar, -1, DLM_NEW_TOKEN, 0, NULL), DLM_E_CONFIG, ctx,
                "block");
    CHECK_ERROR(dlm_convert(&m, ctx, ar, 4, 13, 0, NULL), DLM_E_CONFIG, ctx, "mask_id");
    CHECK_ERROR(dlm_convert(&m, ctx, ar, 4, -2, 0, NULL), DLM_E_CONFIG, ctx, "mask_id");
    CHECK_ERROR(dlm_convert(&m, ctx, ar, 4, DLM_NEW_TOKEN, 0, &mem), DLM_E_NOMEM, ctx,
                NULL);
    CHECK(m == NULL);
    dlm_model_free(block); dlm_model_free(ar);
    test_close(ctx);
}

/* A vocabulary whose mask is token 0: learned, filled in, saved, converted. */
TEST(mask_may_be_token_0)
{
    const char *path = "dlm_test_mask.st";
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int kind = 0; kind < TOY_KINDS; kind++) {
        dlm_config c = toy_config(kind);
        dlm_model *m = NULL, *again = NULL;
        int text[TRAIN_TEXT], canvas[TOY_SLOTS], holes = 0;
        c.mask_is_0 = 1;
        LABEL("%s", toy_kind_names[kind]);
        CHECK_OK(dlm_config_resolve(ctx, &c));
        CHECK_OK(dlm_config_resolve(ctx, &c));           /* and nothing changes */
        CHECK(c.mask_id == 0 && c.mask_is_0 == 1);
        CHECK_OK(dlm_model_create(&m, ctx, &c, 1, NULL));
        dlm_trainer *tr = test_trainer(ctx, m, NULL);
        train_text(text);
        CHECK_ERROR(dlm_trainer_step_text(tr, text, TRAIN_TEXT, 20, 8, NULL), DLM_E_INPUT,
                    ctx, "is the mask");
        for (int i = 0; i < TRAIN_TEXT; i++) text[i]++;
        for (int i = 0; i < 5; i++)
            CHECK_OK(dlm_trainer_step_text(tr, text, TRAIN_TEXT, 20, 8, NULL));
        for (int i = 0; i < TOY_SLOTS; i++) canvas[i] = i < 5 ? 12 : 0;
        CHECK_OK(dlm_sample(ctx, m, canvas, TOY_SLOTS, NULL));
        for (int i = 0; i < TOY_SLOTS; i++) holes += canvas[i] == 0;
        CHECK(holes == 0);
#ifndef DLM_NO_STDIO
        CHECK_OK(dlm_save(ctx, path, m, NULL));
        CHECK_OK(dlm_load(&again, NULL, ctx, path));
        CHECK(again && memcmp(&again->config, &m->config, sizeof c) == 0);
#endif
        dlm_trainer_free(tr); dlm_model_free(again); dlm_model_free(m);
    }
    dlm_config c = toy_config(0);
    c.mask_is_0 = 1; c.mask_id = 3;
    CHECK_ERROR(dlm_config_resolve(ctx, &c), DLM_E_CONFIG, ctx, "mask_id");
    dlm_model *ar = opd_teacher(ctx, 3), *student = NULL;
    CHECK_ERROR(dlm_convert(&student, ctx, ar, 4, 0, 2, NULL), DLM_E_CONFIG, ctx,
                "shifted");
    CHECK_OK(dlm_convert(&student, ctx, ar, 4, 0, 0, NULL));
    CHECK(student->config.mask_is_0 == 1 && student->config.mask_id == 0);
    CHECK(student->config.vocab == ar->config.vocab);
    dlm_model_free(student); dlm_model_free(ar);
    remove(path);
    test_close(ctx);
}

/* ==[ step maps ]=============================================================
   A rollout with everything it showed: canvases around every step, and the logits that
   the constraint hook saw. */

enum { OPD_STEPS = 2 * TOY_SLOTS };

typedef struct opd_watch {
    toy_run run;
    int     prompt[TOY_SEQS], steps[TOY_SEQS][TOY_SLOTS];
    int     step, canvas[OPD_STEPS + 1][TOY_ALL];
    float   logits[OPD_STEPS][TOY_ALL][TOY_VOCAB];      /* NaN: not looked at       */
    int     forced, forced_token;                       /* position at step 0; -1   */
} opd_watch;

static void opd_look(void *user, int seq, int position, float *logits)
{
    opd_watch *w = (opd_watch *)user;
    float *x = w->logits[w->step][seq * TOY_SLOTS + position];
    memcpy(x, logits, TOY_VOCAB * sizeof *x);
    if (w->step || seq || position != w->forced) return;
    for (int v = 0; v < TOY_MASK; v++) if (x[v] < x[w->forced_token]) w->forced_token = v;
    for (int v = 0; v < TOY_VOCAB; v++) if (v != w->forced_token) logits[v] = -INFINITY;
}

static void opd_after(void *user, const dlm_event *events, int n)
{
    opd_watch *w = (opd_watch *)user;
    (void)events; (void)n;
    CHECK(w->step < OPD_STEPS);
    if (w->step < OPD_STEPS - 1) w->step++;
    memcpy(w->canvas[w->step], w->run.canvas, sizeof w->run.canvas);
}

/* The canvases of toy_canvas, filled in by a session of seqs sequences. */
static void opd_watch_run(opd_watch *w, dlm_ctx *ctx, const dlm_model *m, int seqs,
                          dlm_sample_options o)
{
    dlm_session *s = test_session(ctx, m, seqs, TOY_SLOTS, 0,
                                  m->config.pattern != DLM_PATTERN_FULL);
    dlm_sampler *sm = NULL;
    toy_run *r = &w->run;
    int spare[TOY_SLOTS];
    toy_canvas(r, 0);
    for (int q = 0; q < TOY_SEQS; q++)
        w->prompt[q] = naive_prefix(r->canvas + q * TOY_SLOTS, r->lengths[q]);
    w->step = 0;
    memcpy(w->canvas[0], r->canvas, sizeof r->canvas);
    memset(w->logits, 0xFF, sizeof w->logits);
    o.constrain = opd_look;
    o.on_step = opd_after;
    o.constrain_user = o.step_user = w;
    CHECK_OK(dlm_sampler_create(&sm, s, &o, NULL));
    if (sm) CHECK_OK(dlm_sampler_begin(sm, r->canvas, r->lengths, r->n_seqs));
    for (int i = 0; sm && !dlm_sampler_done(sm) && i < OPD_STEPS; i++)
        CHECK_OK(dlm_sampler_step(sm));
    CHECK(sm && dlm_sampler_done(sm));
    for (int q = 0; sm && q < TOY_SEQS; q++) {
        for (int i = 0; i < TOY_SLOTS; i++) spare[i] = -7;
        dlm_sampler_steps(sm, q, spare);
        r->length[q] = dlm_sampler_length(sm, q);
        for (int i = r->length[q]; i < TOY_SLOTS; i++) CHECK(spare[i] == -7);
        memcpy(w->steps[q], spare, sizeof spare);
    }
    const dlm_event *trace = sm ? dlm_sampler_trace(sm, &r->n_events) : NULL;
    CHECK(r->n_events <= TOY_ALL);
    for (int i = 0; trace && i < r->n_events && i < TOY_ALL; i++) r->events[i] = trace[i];
    dlm_sampler_free(sm); dlm_session_free(s);
}

/* The steps of cells (n), different and ascending, without zeros; how many. */
static int opd_distinct(const int *steps, int n, int *out)
{
    int k = 0;
    for (int value = 1; value <= OPD_STEPS; value++) {
        int found = 0;
        for (int i = 0; i < n; i++) found |= steps[i] == value;
        if (found) out[k++] = value;
    }
    return k;
}

/* One block [a, e) of sequence q: contiguous steps after `last`, and the canvas before
   each of them is what the map says.  Returns the last step. */
static int opd_check_block(const opd_watch *w, int q, int a, int e, int last, int rounds)
{
    const int *steps = w->steps[q], *after = w->run.canvas + q * TOY_SLOTS;
    int values[TOY_SLOTS], n = opd_distinct(steps + a, e - a, values), full = 1;
    for (int i = a; i < e; i++) full &= steps[i] > 0;
    if (rounds && full) CHECK(n == (rounds > 1 ? e - a : 1));
    for (int k = 0; k < n; k++) {
        const int *seen = w->canvas[values[k] - 1] + q * TOY_SLOTS;
        CHECK(values[k] == ++last);
        for (int i = a; i < e; i++)
            CHECK(seen[i] == (steps[i] >= values[k] ? TOY_MASK : after[i]));
        for (int i = e; i < w->run.lengths[q]; i++)
            CHECK((seen[i] == TOY_MASK) == (w->canvas[0][q * TOY_SLOTS + i] == TOY_MASK));
        for (int i = 0; i < a; i++) CHECK(seen[i] == after[i]);
    }
    return last;
}

/* Logits of the doubled row in round k of every block equal those the sampler saw (a
   blind order looks only at what it fills in).  Returns the masks. */
static int opd_check_round(const opd_watch *w, dlm_ctx *ctx, const dlm_model *m, int q,
                           int b, int k)
{
    static test_batch t;
    const int P = w->prompt[q], T = w->run.lengths[q], R = T - P;
    const int *x = w->run.canvas + q * TOY_SLOTS, *steps = w->steps[q];
    int values[TOY_SLOTS], value[TOY_SLOTS], masks = 0;
    batch_clear(&t);
    batch_add_doubled(&t, P, R, b, 2);
    for (int i = 0; i < T; i++) t.tokens[i] = x[i];
    for (int r = 0; r < R; r++) {
        const int a = r / b * b, n = a + b < R ? b : R - a;
        value[r] = opd_distinct(steps + P + a, n, values) > k ? values[k] : 0;
        if (steps[P + r] == 0 || steps[P + r] < value[r]) value[r] = -value[r];
        t.tokens[T + r] = value[r] > 0 ? TOY_MASK : x[P + r];
        masks += value[r] > 0;
    }
    if (masks == 0) return 0;
    float *logits = test_logits(ctx, m, batch_close(&t, 2), 0);
    for (int r = 0; r < R; r++) {
        if (value[r] <= 0) continue;
        const float *seen = w->logits[value[r] - 1][q * TOY_SLOTS + P + r];
        if (seen[0] != seen[0] && steps[P + r] != value[r]) continue;    /* blind   */
        for (int v = 0; v < TOY_VOCAB; v++)
            CHECK_CLOSE(seen[v], logits[(T + r) * TOY_VOCAB + v], 1e-5);
    }
    free(logits);
    return masks;
}

TEST(step_maps_rebuild_every_state_and_the_doubled_row_agrees)
{
    static const struct { int b, order; float threshold; int rounds; } cases[] = {
        { 4, DLM_ORDER_THRESHOLD, 0.3f, 0 }, { 4, DLM_ORDER_THRESHOLD, 1.0f, 4 },
        { 4, DLM_ORDER_THRESHOLD, 1e-9f, 1 }, { 1, DLM_ORDER_CONFIDENCE, 0, 0 },
        { 3, DLM_ORDER_RANDOM, 0, 0 }, { 5, DLM_ORDER_ENTROPY_BOUND, 0, 0 },
        { 4, DLM_ORDER_ANCESTRAL, 0, 0 }, { 24, DLM_ORDER_THRESHOLD, 0.2f, 0 },
    };
    static opd_watch w;
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_model *teacher = opd_teacher(ctx, 3);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const int b = cases[i].b;
        dlm_model *m = opd_student(ctx, teacher, b, 0, 0);
        dlm_sample_options o = {0};
        int masks = 0, filled = 0;
        o.order = (dlm_order)cases[i].order; o.threshold = cases[i].threshold;
        o.temperature = 1; o.seed = 7;
        w.forced = -1;
        LABEL("case %d, block %d", (int)i, b);
        opd_watch_run(&w, ctx, m, TOY_SEQS, o);
        for (int q = 0; q < TOY_SEQS; q++) {
            int T = w.run.lengths[q], last = 0;
            for (int a = w.prompt[q]; a < T; a += b)
                last = opd_check_block(&w, q, a, a + b < T ? a + b : T, last,
                                       cases[i].rounds);
            for (int j = 0; j < T; j++)
                CHECK((w.steps[q][j] > 0) ==
                      (w.canvas[0][q * TOY_SLOTS + j] == TOY_MASK));
            for (int k = 0; k < b; k++) masks += opd_check_round(&w, ctx, m, q, b, k);
            for (int j = 0; j < T; j++) filled += w.steps[q][j] > 0;
        }
        CHECK(masks >= filled && filled > 40);
        dlm_model_free(m);
    }
    dlm_model_free(teacher);
    test_close(ctx);
}

/* --[ the last block ]--------------------------------------------------------
   A text that stops inside a block: what the trainer lays out is what the sampler showed,
   to the last bit of every logit, at every step that had nothing behind the stop. */

enum { STOP_AT = 3 };                          /* the token; position: watch.forced */

typedef struct stop_watch {
    int   at, step, canvas[TOY_SLOTS + 1][TOY_SLOTS];
    float logits[TOY_SLOTS + 1][TOY_SLOTS][TOY_VOCAB];
} stop_watch;

static void stop_look(void *user, int seq, int position, float *logits)
{
    stop_watch *w = (stop_watch *)user;
    (void)seq;
    memcpy(w->logits[w->step][position], logits, sizeof w->logits[0][0]);
    for (int v = 0; v < TOY_VOCAB; v++)
        if ((v == STOP_AT) != (position == w->at)) logits[v] = -INFINITY;
}

static void stop_after(void *user, const dlm_event *events, int n)
{
    stop_watch *w = (stop_watch *)user;
    (void)events; (void)n;
    memcpy(w->canvas[w->step + 1], w->canvas[w->step], sizeof w->canvas[0]);
    for (int i = 0; i < n; i++)
        w->canvas[w->step + 1][events[i].position] = events[i].token;
    w->step++;
}

/* Writes on a canvas with the stop at w->at; e: the finished text. */
static void stop_write(stop_watch *w, dlm_ctx *ctx, const dlm_model *m, int P, int left,
                       int length, dlm_example *e, int *tokens, int *steps)
{
    static const int stop = STOP_AT;
    dlm_session *s = test_session(ctx, m, 1, TOY_SLOTS, 0, 1);
    dlm_sample_options o = {0};
    dlm_sampler *sm = NULL;
    o.order = left ? DLM_ORDER_THRESHOLD : DLM_ORDER_CONFIDENCE;
    o.threshold = 1; o.left_first = left;
    o.temperature = 1; o.seed = (uint64_t)w->at;
    o.stop = &stop; o.n_stop = 1;
    o.constrain = stop_look; o.on_step = stop_after;
    o.constrain_user = o.step_user = w;
    w->step = 0;
    for (int i = 0; i < TOY_SLOTS; i++)
        tokens[i] = w->canvas[0][i] = i < P ? 4 + i % 7 : TOY_MASK;
    CHECK_OK(dlm_sampler_create(&sm, s, &o, NULL));
    CHECK_OK(dlm_sampler_begin(sm, tokens, &length, 1));
    while (!dlm_sampler_done(sm) && w->step < TOY_SLOTS) CHECK_OK(dlm_sampler_step(sm));
    dlm_sampler_steps(sm, 0, steps);
    e->tokens = tokens;
    e->length = dlm_sampler_length(sm, 0);
    e->prompt = P;
    CHECK(e->length == w->at + 1 && tokens[w->at] == STOP_AT);
    dlm_sampler_free(sm); dlm_session_free(s);
}

/* The state before step `step` (1, 2, ..) against what the sampler saw; returns the rows
   compared, 0 where something stood behind the stop. */
static int stop_compare(const stop_watch *w, dlm_ctx *ctx, const dlm_model *m,
                        dlm_trainer *t, const dlm_example *e, const int *steps, int step)
{
    dlm_state *s = t->state;
    int rows = 0;
    for (int i = e->length; i < TOY_SLOTS; i++)
        if (w->canvas[step - 1][i] != TOY_MASK) return 0;
    CHECK_OK(dlm_state_take(s, e, 1, 1));
    dlm_state_noise(s, NULL);
    for (int i = e->prompt; i < e->length; i++)
        s->masked[i - e->prompt] = steps[i] >= step;
    CHECK_OK(dlm_state_layout(s, 0));
    float *logits = test_logits(ctx, m, &s->batch, 0);
    for (int i = 0; i < s->batch.n_out; i++) {
        const int at = e->prompt + s->out_cell[i];
        const float *seen = w->logits[step - 1][at];
        if (seen[0] != seen[0]) continue;       /* of a later block                */
        CHECK(!memcmp(seen, logits + i * TOY_VOCAB, TOY_VOCAB * sizeof *seen));
        rows++;
    }
    free(logits);
    return rows;
}

TEST(last_blocks_are_learned_as_the_sampler_shows_them)
{
    static stop_watch w;
    enum { B = 4 };
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_model *teacher = opd_teacher(ctx, 3);
    for (int k = 0; k < 2 * 2 * 5 * 2 * B; k++) {
        static const int prompts[] = { 1, 4, 5, 6, 8 };
        int tokens[TOY_SLOTS], steps[TOY_SLOTS], rows = 0;
        int P = prompts[k / 4 % 5], at = P + k / 20, cut = k & 1 ? at + 1 : 20;
        int left = k >> 1 & 1;
        for (int shifted = 0; shifted < 2; shifted++) {
            dlm_model *m = opd_student(ctx, teacher, B, 0, shifted);
            dlm_example e = {0};
            dlm_trainer *t = test_trainer(ctx, m, NULL);
            LABEL("prompt %d, stop at %d, canvas %d, left first %d, shifted %d", P, at,
                  cut, left, shifted);
            w.at = at;
            memset(w.logits, 0xFF, sizeof w.logits);
            stop_write(&w, ctx, m, P, left, cut, &e, tokens, steps);
            e.canvas = k & 1 ? cut : 0;
            for (int step = 1; step <= w.step; step++)
                rows += stop_compare(&w, ctx, m, t, &e, steps, step);
            for (int i = P; left && i <= at; i++) {      /* every row it looked at */
                int end = P + ((i - P) / B + 1) * B;
                rows -= end < at + 1 ? end - i : at + 1 - i;
            }
            CHECK(left ? rows == 0 : rows > 0);
            dlm_trainer_free(t); dlm_model_free(m);
            rows = 0;
        }
    }
    dlm_model_free(teacher);
    test_close(ctx);
}

/* 3 at position 9 of the first sequence, else 2. */
static void opd_force_stop(void *user, int seq, int position, float *logits)
{
    (void)user;
    logits[seq == 0 && position == 9 ? 3 : 2] += 50;
}

TEST(step_maps_end_at_the_stop_token)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_model *m = toy_model(ctx, 2, 5);
    dlm_session *s = toy_session(ctx, m, 1);
    dlm_sampler *sm = NULL;
    dlm_sample_options o = {0};
    toy_run r;
    int stop = 3, steps[TOY_SLOTS];
    toy_canvas(&r, 0);
    o.stop = &stop; o.n_stop = 1; o.constrain = opd_force_stop; o.threshold = 0.01f;
    o.order = DLM_ORDER_THRESHOLD;
    CHECK_OK(dlm_sampler_create(&sm, s, &o, NULL));
    if (sm) CHECK_OK(dlm_sampler_begin(sm, r.canvas, r.lengths, r.n_seqs));
    while (sm && !dlm_sampler_done(sm)) CHECK_OK(dlm_sampler_step(sm));
    for (int i = 0; i < TOY_SLOTS; i++) steps[i] = -7;
    if (sm) dlm_sampler_steps(sm, 0, steps);
    CHECK(sm && dlm_sampler_length(sm, 0) == 10 && r.canvas[9] == 3);
    for (int i = 0; i < TOY_SLOTS; i++)        /* prompt 5, block 5..8, then 9..12 */
        CHECK(steps[i] == (i < 5 ? 0 : i < 9 ? 1 : i == 9 ? 2 : -7));
    dlm_sampler_free(sm); dlm_session_free(s); dlm_model_free(m);
    test_close(ctx);
}

/* ==[ teacher ]=============================================================== */

/* Target r of the released construction: the doubled row with the noisy copy filled by
   the clean one, the student's mask cut to lower triangles; from which row it is read. */
static int opd_doubled_teacher(test_batch *t, const int *x, int P, int R, int b, int r)
{
    batch_clear(t);
    batch_add_doubled(t, P, R, b, 2);
    for (int i = 0; i < P + 2 * R; i++) {
        dlm_keys *k = &t->keys[i];
        t->tokens[i] = x[i < P + R ? i : i - R];
        if (i < P + R) k->hi0 = k->lo1 = k->hi1 = i + 1;
        else k->hi1 = i + 1;
    }
    batch_close(t, 2);
    return r == 0 ? P - 1 : r % b == 0 ? P + r - 1 : P + R + r - 1;
}

TEST(teacher_rows_equal_the_doubled_construction)
{
    static const int cases[][3] = { { 5, 13, 4 }, { 8, 9, 4 }, { 1, 6, 3 }, { 7, 5, 1 },
                                    { 3, 8, 8 } };
    static test_batch t;
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_model *m = opd_teacher(ctx, 3);
    for (int i = 0; i < 5; i++) {
        const int P = cases[i][0], R = cases[i][1], b = cases[i][2];
        int x[TOY_SLOTS];
        LABEL("P %d, R %d, block %d", P, R, b);
        for (int j = 0; j < P + R; j++) x[j] = test_below(OPD_V);
        opd_doubled_teacher(&t, x, P, R, b, 0);
        float *doubled = test_logits(ctx, m, &t.b, 0);
        batch_clear(&t);
        batch_add(&t, P + R, 2, DLM_PATTERN_CAUSAL, 1, 0);
        memcpy(t.tokens, x, sizeof x);
        float *causal = test_logits(ctx, m, batch_close(&t, 2), 0);
        for (int r = 0; r < R; r++)
            for (int v = 0, row = opd_doubled_teacher(&t, x, P, R, b, r); v < OPD_V; v++)
                CHECK_CLOSE(causal[(P + r - 1) * OPD_V + v], doubled[row * OPD_V + v],
                            1e-5);
        free(causal); free(doubled);
    }
    dlm_model_free(m);
    test_close(ctx);
}

TEST(blocks_of_one_see_only_what_stands_before)
{
    enum { P = 3, R = 7, N = P + 2 * R };
    static test_batch t;
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_model *ar = opd_teacher(ctx, 3), *m = opd_student(ctx, ar, 1, 0, 0);
    batch_clear(&t);
    batch_add_doubled(&t, P, R, 1, OPD_V);
    for (int r = 0; r < R; r++) t.tokens[P + R + r] = TOY_MASK;
    float *want = test_logits(ctx, m, batch_close(&t, 2), 0);
    for (int r = 0; r < R; r++) {
        int keep[N], changed = 0;
        memcpy(keep, t.tokens, sizeof keep);
        for (int i = r; i < R; i++) t.tokens[P + i] = (keep[P + i] + 1) % OPD_V;
        for (int i = 0; i < R; i++) if (i != r) t.tokens[P + R + i] = 2;
        float *got = test_logits(ctx, m, &t.b, 0);
        LABEL("row %d", r);
        CHECK(!memcmp(got + (P + R + r) * TOY_VOCAB, want + (P + R + r) * TOY_VOCAB,
                      TOY_VOCAB * sizeof(float)));
        free(got);
        memcpy(t.tokens, keep, sizeof keep);
        t.tokens[P + r - 1] = (keep[P + r - 1] + 1) % OPD_V;     /* this one it sees */
        got = test_logits(ctx, m, &t.b, 0);
        for (int v = 0; v < TOY_VOCAB; v++)
            changed |= got[(P + R + r) * TOY_VOCAB + v]
                    != want[(P + R + r) * TOY_VOCAB + v];
        CHECK(changed);
        free(got);
        memcpy(t.tokens, keep, sizeof keep);
    }
    free(want); dlm_model_free(m); dlm_model_free(ar);
    test_close(ctx);
}

/* ==[ distiller ]=============================================================
   Finished texts of awkward shapes with made-up step maps.  Which cells a step masked is
   read from the trainer's state; whether it may, and what follows from it, is worked out
   here.  The first moment of the first update is (1 - beta1) times the gradient. */

enum { OPD_EX = 6, OPD_STOP = 2 };

typedef struct opd_rig {
    dlm_ctx       *ctx;
    dlm_model     *teacher, *student, *copy;   /* copy: the student as it was      */
    dlm_trainer   *t;
    dlm_distiller *d;
    dlm_distill_options opt;
    int            tokens[OPD_EX][TOY_SLOTS], steps[OPD_EX][TOY_SLOTS];
    dlm_example    e[OPD_EX];
} opd_rig;

/* Prompts of whole blocks and not, none at all, responses of one token, a lone token. */
static void opd_examples(opd_rig *r, int block, int mask)
{
    static const int shape[OPD_EX][2] = { { 17, 5 }, { 13, 0 }, { 6, 5 }, { 12, 4 },
                                          { 1, 0 }, { 9, 8 } };
    for (int k = 0; k < OPD_EX; k++) {
        int base = 0;
        r->e[k].length = shape[k][0]; r->e[k].prompt = shape[k][1];
        r->e[k].tokens = r->tokens[k]; r->e[k].steps = r->steps[k];
        for (int i = 0; i < TOY_SLOTS; i++) {
            if (i >= r->e[k].prompt && (i - r->e[k].prompt) % block == 0) base += block;
            r->tokens[k][i] = i % 7 == 6 ? OPD_STOP : test_below(OPD_V);
            if (r->tokens[k][i] == mask) r->tokens[k][i]++;
            r->steps[k][i] = i < r->e[k].prompt ? 0 : base + test_below(block);
        }
    }
    r->steps[3][6] = 0;                        /* given, not filled in             */
}

static void opd_open(opd_rig *r, dlm_ctx *ctx, int block, int mask_id, int max_rows,
                     dlm_distill_options o, int shifted)
{
    dlm_train_options train = {0};
    memset(r, 0, sizeof *r);
    test_state = 99;                           /* the same for every rig           */
    r->ctx = ctx;
    r->opt = o;
    r->teacher = opd_teacher(ctx, 3);
    r->student = opd_student(ctx, r->teacher, block, mask_id, shifted);
    for (size_t i = 0; i < r->student->n_params; i++)
        r->student->weights[i] *= 1 + 0.5f * test_float();
    CHECK_OK(dlm_model_clone(&r->copy, ctx, r->student, NULL));
    train.clip = INFINITY; train.max_rows = max_rows; train.seed = 5;
    r->t = test_trainer(ctx, r->student, &train);
    CHECK_OK(dlm_distiller_create(&r->d, r->t, r->teacher, &o, NULL));
    if (!r->d) { printf("no distiller: %s\n", dlm_last_error(ctx)); exit(1); }
    opd_examples(r, block, mask_id);
}

static void opd_close(opd_rig *r)
{
    dlm_distiller_free(r->d); dlm_trainer_free(r->t); dlm_model_free(r->copy);
    dlm_model_free(r->student); dlm_model_free(r->teacher);
}

typedef struct opd_score {
    const float *teacher;                      /* (T - 1, OPD_V)                   */
    const dlm_divergence_options *o;
    int          row[TOY_SLOTS];
    double       weight, loss[TOY_SLOTS];
    int          V;                            /* of the student                   */
} opd_score;

static void opd_apply(void *user, int i, float *logits)
{
    opd_score *s = (opd_score *)user;
    double p[OPD_V], z[OPD_V], g[OPD_V];
    float target[OPD_V];
    int in[OPD_V];
    opd_renormalise(p, s->teacher + s->row[i] * OPD_V, OPD_V, s->o);
    for (int v = 0; v < OPD_V; v++) target[v] = (float)p[v];
    for (int v = 0; v < OPD_V; v++) z[v] = (double)logits[v];
    opd_members(in, target, OPD_V, s->o->sparse);
    s->loss[i] = s->weight * opd_value(z, target, in, OPD_V, s->o);
    opd_gradient(g, z, target, in, OPD_V, s->o);
    for (int v = 0; v < OPD_V; v++) logits[v] = (float)(s->weight * g[v]);
    for (int v = OPD_V; v < s->V; v++) logits[v] = 0;
}

/* Adds one row: example k with these response cells masked, out of `rows` in all.
   Returns its loss; *scored counts. */
static double opd_add_row(const opd_rig *r, dlm_trainer *plain, int k,
                          const unsigned char *masked, double rows, int *scored)
{
    static test_batch t;
    const dlm_example *e = &r->e[k];
    const dlm_config *c = &r->copy->config;
    const int P = e->prompt, T = e->length, R = T - P;
    opd_score s = {0};
    double loss = 0;
    if (T < 2) return 0;
    batch_clear(&t);
    batch_add(&t, T - 1, 2, DLM_PATTERN_CAUSAL, 1, 0);
    memcpy(t.tokens, e->tokens, (size_t)(T - 1) * sizeof(int));
    float *teacher = test_logits(r->ctx, r->teacher, batch_close(&t, 2), 0);
    batch_clear(&t);
    batch_add_padded(&t, c, P, R, 2);
    batch_close(&t, 2);
    t.b.n_out = 0;
    for (int i = 0; i < T + R; i++)
        t.tokens[i] = i >= T && masked[i - T] ? c->mask_id : e->tokens[i < T ? i : i - R];
    for (int noisy = 0; noisy < 2; noisy++)             /* rows in order: clean first */
        for (int i = 0; i < R; i++) {
            const int clean = c->shifted && i % c->block == 0, at = P + i;
            if (clean == noisy || !masked[i] || at == 0) continue;
            if (r->opt.exclude_stop && e->tokens[at] == r->opt.stop) continue;
            s.row[t.b.n_out] = at - 1;
            t.out_rows[t.b.n_out++] = (clean ? P : T) + i - c->shifted;
        }
    s.teacher = teacher;
    s.V = r->copy->config.vocab;
    s.o = &r->opt.divergence;
    s.weight = 1 / (rows * t.b.n_out);
    CHECK_OK(dlm_trainer_pass(plain, &t.b, opd_apply, &s));
    for (int i = 0; i < t.b.n_out; i++) loss += s.loss[i];
    *scored += t.b.n_out;
    free(teacher);
    return loss;
}

/* The cells of example k in round `round`: masked from that step on; round -1: those of
   the state, which must be one of the rounds, or random with a mask in every block. */
static void opd_cells(const opd_rig *r, int k, int round, unsigned char *masked)
{
    const dlm_state *s = r->t->state;
    const int P = r->e[k].prompt, R = r->e[k].length - P, b = r->copy->config.block;
    const int *steps = r->steps[k] + P;
    for (int a = 0; a < R; a += b) {
        int values[TOY_SLOTS], n = a + b < R ? b : R - a, hits = 0, ok = 0;
        int rounds = opd_distinct(steps + a, n, values);
        for (int i = a; i < a + n; i++)
            hits += masked[i] = round < 0 ? s->masked[s->first_cell[k] + i]
                : round < rounds && steps[i] >= values[round];
        for (int v = 0; v < rounds; v++) {
            int same = 1;
            for (int i = a; i < a + n; i++) same &= masked[i] == (steps[i] >= values[v]);
            ok |= same;
        }
        if (r->opt.states == DLM_STATES_RANDOM) CHECK(hits > 0);
        else if (round < 0) CHECK(ok || rounds == 0);
    }
}

/* What the step that was just done should have found. */
static double opd_expect(const opd_rig *r, dlm_trainer *plain, int *scored)
{
    unsigned char masked[TOY_SLOTS];
    int rounds[OPD_EX], rows = 0;
    double loss = 0;
    for (int k = 0; k < OPD_EX; k++) {
        int values[TOY_SLOTS], b = r->copy->config.block;
        rounds[k] = 1;
        for (int a = r->e[k].prompt; a < r->e[k].length; a += b) {
            int left = r->e[k].length - a;
            int n = opd_distinct(r->steps[k] + a, left < b ? left : b, values);
            if (r->opt.states == DLM_STATES_ALL && n > rounds[k]) rounds[k] = n;
        }
        rows += rounds[k];
    }
    for (int k = 0; k < OPD_EX; k++)
        for (int i = 0; i < rounds[k]; i++) {
            opd_cells(r, k, r->opt.states == DLM_STATES_ALL ? i : -1, masked);
            loss += opd_add_row(r, plain, k, masked, rows, scored);
        }
    return loss;
}

static void opd_try_step(dlm_ctx *ctx, int block, int mask_id, dlm_distill_options o,
                         int shifted)
{
    static opd_rig r;
    dlm_report report;
    int scored = 0, responses = 0;
    opd_open(&r, ctx, block, mask_id, 400, o, shifted);
    dlm_train_options plain_options = {0};
    plain_options.max_rows = 64;
    dlm_trainer *plain = test_trainer(ctx, r.copy, &plain_options);
    for (int k = 0; k < OPD_EX; k++)
        if (o.states == DLM_STATES_RANDOM) r.e[k].steps = NULL;
    CHECK_OK(dlm_distiller_step(r.d, r.e, OPD_EX, &report));
    double loss = opd_expect(&r, plain, &scored), largest = 0, norm = 0;
    const float *want = plain->gradients;
    for (size_t i = 0; i < r.copy->n_params; i++) {
        largest = fmax(largest, fabs((double)want[i]));
        norm += (double)want[i] * (double)want[i];
    }
    for (size_t i = 0; i < r.copy->n_params; i++)
        CHECK_CLOSE((double)r.t->adam_m[i] / (double)(1 - 0.9f), want[i], 2e-5 * largest);
    for (int k = 0; k < OPD_EX; k++) responses += r.e[k].length - r.e[k].prompt;
    CHECK(largest > 0);
    CHECK_CLOSE(report.grad_norm, sqrt(norm), 1e-5 * sqrt(norm));
    CHECK_CLOSE(report.loss, loss, 1e-5);
    CHECK(report.scored == scored && scored > 0);
    CHECK(report.tokens == responses && report.step == 1 && report.flops > 0);
    dlm_trainer_free(plain);
    opd_close(&r);
}

TEST(distiller_gradient_equals_a_reference_row_by_row)
{
    static const struct {
        int block, mask_id, states, exclude;
        dlm_divergence_options d;              /* w, kind, K, T, top-k, top-p, min-p */
    } cases[] = {
        { 4, 0, DLM_STATES_TRAJECTORY, 0, { 0, DLM_FORWARD_KL, 0, 0, 0, 0, 0 } },
        { 4, 0, DLM_STATES_ALL, 0, { 0, DLM_FORWARD_KL, 0, 0, 0, 0, 0 } },
        { 4, 0, DLM_STATES_RANDOM, 0, { 0, DLM_FORWARD_KL, 0, 0, 0, 0, 0 } },
        { 1, 0, DLM_STATES_TRAJECTORY, 1, { 0, DLM_REVERSE_KL, 0, 0, 0, 0, 0 } },
        { 3, 5, DLM_STATES_ALL, 1, { 0.25f, DLM_MIXED_KL, 0, 0, 0, 0, 0 } },
        { 24, 0, DLM_STATES_TRAJECTORY, 1, { 0, DLM_JSD, 0, 2, 0, 0, 0 } },
        { 4, 5, DLM_STATES_RANDOM, 1, { 0.8f, DLM_JSD, 0, 0, 4, 0, 0 } },
        { 5, 0, DLM_STATES_ALL, 0, { 0, DLM_FORWARD_KL, 3, 0, 0, 0.9f, 0.05f } },
        { 1, 0, DLM_STATES_ALL, 0, { 0, DLM_FORWARD_KL, 1, 0.5f, 0, 0, 0 } },
    };
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        dlm_distill_options o = {0};
        o.states = (dlm_states)cases[i].states;
        o.exclude_stop = cases[i].exclude; o.stop = OPD_STOP;
        o.divergence = cases[i].d;
        for (int shifted = 0; shifted < 2; shifted++) {
            LABEL("case %d, shifted %d", (int)i, shifted);
            opd_try_step(ctx, cases[i].block, cases[i].mask_id, o, shifted);
        }
    }
    test_close(ctx);
}

TEST(distiller_passes_over_examples_without_a_response)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int states = 0; states < 3; states++) {
        static opd_rig a, b;
        dlm_distill_options o = {0};
        dlm_report x, y;
        dlm_example e[OPD_EX + 1];
        o.states = (dlm_states)states;
        opd_open(&a, ctx, 4, 0, 400, o, 0);
        opd_open(&b, ctx, 4, 0, 400, o, 0);
        for (int k = 0; k <= OPD_EX; k++) e[k] = b.e[k % OPD_EX];
        e[OPD_EX].prompt = e[OPD_EX].length;
        LABEL("states %d", states);
        CHECK_OK(dlm_distiller_step(a.d, a.e, OPD_EX, &x));
        CHECK_OK(dlm_distiller_step(b.d, e, OPD_EX + 1, &y));
        CHECK(x.loss > 0 && memcmp(&x, &y, sizeof x) == 0);
        opd_close(&b);
        opd_close(&a);
    }
    test_close(ctx);
}

/* Few rows or few targets make many passes; three steps hardly differ for it. */
TEST(distiller_steps_do_not_depend_on_passes)
{
    enum { N = 2 * OPD_EX };
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int c = 0; c < 6; c++) {
        static opd_rig one, many;
        dlm_distill_options o = {0};
        dlm_report a, b;
        dlm_example e[2][N];
        o.states = (dlm_states)(c % 3);
        opd_open(&one, ctx, 4, 0, 400, o, 0);
        o.max_targets = OPD_MAX;
        opd_open(&many, ctx, 4, 0, c < 3 ? 60 : 400, o, 0);
        for (int k = 0; k < 2 * N; k++) {
            const opd_rig *r = k < N ? &one : &many;
            e[k / N][k % N] = r->e[k % OPD_EX];
        }
        LABEL("case %d", c);
        for (int i = 0; i < 3; i++) {
            CHECK_OK(dlm_distiller_step(one.d, e[0], N, &a));
            CHECK_OK(dlm_distiller_step(many.d, e[1], N, &b));
            CHECK_CLOSE(a.loss, b.loss, i ? 1e-3 : 1e-9);
            CHECK_CLOSE(a.grad_norm, b.grad_norm, i ? 1e-3 : 1e-5);
            CHECK(a.scored == b.scored && a.tokens == b.tokens && a.step == i + 1);
            if (o.states != DLM_STATES_ALL) CHECK_CLOSE(a.flops, b.flops, 1);
        }
        opd_close(&many);
        opd_close(&one);
    }
    test_close(ctx);
}

/* Trajectory: every round of a block alike; random: 1, 2, 3, 4 masks of 4 in the shares
   2/5, 1/5, 1/5, 1/5.  Neighbours in a batch change nothing. */
TEST(distiller_states_are_drawn_uniformly)
{
    static const int map[12] = { 0, 1, 2, 2, 1, 4, 5, 3, 6, 9, 9, 9 };
    static const double even[4] = { 0.25, 0.25, 0.25, 0.25 }, two[4] = { 0, 0.5, 0, 0.5 };
    static const double random[4] = { 0.4, 0.2, 0.2, 0.2 };
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int states = 0; states < 2; states++) {
        static opd_rig r;
        dlm_distill_options o = {0};
        int counts[3][4] = {{0}}, both = 0;
        o.states = (dlm_states)states;
        opd_open(&r, ctx, 4, 0, 200, o, 0);
        dlm_example e[2] = { r.e[3], r.e[3] };
        e[0].prompt = e[1].prompt = 0;
        e[0].steps = e[1].steps = map;
        for (int i = 0; i < 500; i++) {
            CHECK_OK(dlm_distiller_step(r.d, e, 2, NULL));
            for (int k = 0; k < 24; k += 4) {
                int n = 0;
                for (int j = 0; j < 4; j++) n += r.t->state->masked[k + j];
                if (n > 0 && n < 5) counts[k / 4 % 3][n - 1]++;
            }
            both += memcmp(r.t->state->masked, r.t->state->masked + 12, 12) == 0;
        }
        LABEL("states %d", states);
        CHECK(both < 250);                      /* examples draw for themselves    */
        if (states == 0) {
            int first[4] = { 0, counts[0][1], 0, counts[0][2] };
            CHECK(counts[0][0] + counts[0][3] == 0);       /* masks: 3, then 2      */
            toy_check_counts(first, two, 4);
            toy_check_counts(counts[1], even, 4);
            int last[4] = { 0, counts[2][2], 0, counts[2][3] };
            CHECK(counts[2][0] + counts[2][1] == 0);       /* 4, then 3             */
            toy_check_counts(last, two, 4);
        } else {
            for (int k = 0; k < 3; k++) toy_check_counts(counts[k], random, 4);
        }
        opd_close(&r);
    }
    test_close(ctx);
}

TEST(distiller_makes_the_student_say_what_the_teacher_says)
{
    for (int i = 0; i < 3; i++) {
        static opd_rig r;
        dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
        dlm_distill_options o = {0};
        dlm_report report;
        double first = 0, last = 0;
        o.states = DLM_STATES_ALL;
        o.divergence.kind = (dlm_divergence_kind)(i == 2 ? DLM_JSD : i);
        opd_open(&r, ctx, 4, 0, 400, o, 0);
        float *kept = test_floats(r.teacher->n_params);
        memcpy(kept, r.teacher->weights, r.teacher->n_params * sizeof(float));
        for (int step = 0; step < 30; step++) {
            CHECK_OK(dlm_distiller_step(r.d, r.e, OPD_EX, &report));
            CHECK(report.loss - report.loss == 0 && report.loss > 0);
            if (step == 0) first = report.loss;
            last = report.loss;
        }
        LABEL("kind %d: from %g to %g", i, first, last);
        CHECK(last < 0.6 * first);
        CHECK(!memcmp(kept, r.teacher->weights, r.teacher->n_params * sizeof(float)));
        free(kept);
        opd_close(&r);
        test_close(ctx);
    }
}

/* ==[ distiller: contracts ]================================================== */

static void opd_try_create(dlm_trainer *t, const dlm_model *teacher,
                           const dlm_distill_options *o, const char *text)
{
    const dlm_error want = strstr(text, "teacher of") ? DLM_E_MISMATCH : DLM_E_CONFIG;
    dlm_distiller *d = (dlm_distiller *)t;
    LABEL("%s", text);
    CHECK_ERROR(dlm_distiller_create(&d, t, teacher, o, NULL), want, test_ctx, text);
    CHECK(d == NULL);
    CHECK_ERROR(dlm_distiller_create(NULL, t, teacher, o, NULL), want, test_ctx, text);
}

/* Every wrong value alone; the last three with reverse KL. */
static void opd_try_options(const opd_rig *r)
{
    static const char *const texts[] = { "max_targets", "states", "kind", "sparse",
        "sparse", "weight", "weight", "temperature", "top_k", "top_p", "min_p",
        "reverse", "reverse", "reverse" };
    for (int i = 0; i < 14; i++) {
        dlm_distill_options o = {0};
        o.divergence.kind = i < 11 ? DLM_JSD : i == 12 ? DLM_MIXED_KL : DLM_REVERSE_KL;
        if (i == 0) o.max_targets = -1;
        if (i == 1) o.states = (dlm_states)3;
        if (i == 2) o.divergence.kind = (dlm_divergence_kind)4;
        if (i == 3) o.divergence.sparse = -1;
        if (i == 4) o.divergence.sparse = OPD_V + 1;
        if (i == 5) o.divergence.weight = 2;
        if (i == 6) o.divergence.weight = -1;
        if (i == 7) o.divergence.temperature = -1;
        if (i == 8 || i == 11) o.divergence.top_k = i == 8 ? -1 : 3;
        if (i == 9 || i == 12) o.divergence.top_p = i == 9 ? 1.5f : 0.9f;
        if (i == 10 || i == 13) o.divergence.min_p = i == 10 ? 1.5f : 0.1f;
        opd_try_create(r->t, r->teacher, &o, texts[i]);
    }
}

TEST(distiller_options_are_checked_by_name)
{
    static opd_rig r;
    dlm_distill_options none = {0};
    dlm_train_options mdlm = {0};
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    opd_open(&r, ctx, 4, 0, 200, none, 0);
    opd_try_options(&r);
    opd_try_create(r.t, r.student, NULL, "not causal");
    mdlm.objective = DLM_OBJECTIVE_MDLM;
    dlm_trainer *t = test_trainer(ctx, r.student, &mdlm);
    opd_try_create(t, r.teacher, NULL, "mdlm");
    dlm_trainer_free(t);
    dlm_config c = r.teacher->config;
    for (int i = 0; i < 2; i++) {              /* one token too short, two too many */
        c.max_seq = OPD_MAX - !i;
        c.vocab = c.mask_id = OPD_V + 2 * i;
        dlm_model *other = toy_model_of(ctx, &c, 1);
        opd_try_create(r.t, other, NULL, "teacher of");
        dlm_model_free(other);
    }
    mdlm.objective = DLM_OBJECTIVE_AUTO;
    mdlm.max_rows = OPD_MAX / 2;               /* fewer rows than max_seq: fine    */
    t = test_trainer(ctx, r.student, &mdlm);
    dlm_distiller *d = NULL;
    LABEL("%s", "few rows");
    CHECK_OK(dlm_distiller_create(&d, t, r.teacher, NULL, NULL));
    dlm_distiller_free(d); dlm_trainer_free(t);
    opd_close(&r);
    test_close(ctx);
}

/* A refused step changes nothing: the next one equals that of a rig that had none. */
TEST(distiller_refuses_bad_examples_and_forgets_them)
{
    static opd_rig r, clean;
    static const char *const texts[] = { "example 5: length", "example 5: token",
        "example 5", "step map", "step map", "0 of them" };
    dlm_distill_options none = {0};
    dlm_report a, b;
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    opd_open(&r, ctx, 4, 0, 60, none, 0);
    opd_open(&clean, ctx, 4, 0, 60, none, 0);
    for (int i = 0; i < 6; i++) {
        const dlm_example kept = r.e[5];
        const int token = r.tokens[5][3], step = r.steps[5][8];
        LABEL("case %d", i);
        if (i == 0) r.e[5].length = 0;
        if (i == 1) r.tokens[5][3] = TOY_VOCAB;
        if (i == 2) r.tokens[5][3] = TOY_MASK;              /* unknown to the teacher */
        if (i == 3) r.steps[5][8] = -1;
        if (i == 4) r.e[5].steps = NULL;
        CHECK_ERROR(dlm_distiller_step(r.d, r.e, i == 5 ? 0 : OPD_EX, NULL),
                    DLM_E_INPUT, ctx, texts[i]);
        CHECK(r.t->steps == 0);
        r.e[5] = kept;
        r.tokens[5][3] = token; r.steps[5][8] = step;
    }
    LABEL("%s", "");
    CHECK_OK(dlm_distiller_step(r.d, r.e, OPD_EX, &a));
    CHECK_OK(dlm_distiller_step(clean.d, clean.e, OPD_EX, &b));
    CHECK(a.loss == b.loss && a.grad_norm == b.grad_norm && a.flops == b.flops);
    CHECK(!memcmp(r.student->weights, clean.student->weights,
                  r.student->n_params * sizeof(float)));
    opd_close(&r);
    opd_close(&clean);
    test_close(ctx);
}

TEST(distiller_lives_in_one_block_and_steps_without_allocating)
{
    test_heap heap = {0};
    dlm_distill_options o = {0};
    static opd_rig r;
    dlm_ctx *ctx = heap_open(&heap, 1);
    opd_open(&r, ctx, 4, 0, 200, o, 0);
    const size_t bytes = heap.last;
    int calls = heap.calls;
    dlm_memory size = { NULL, 0 };
    CHECK_OK(dlm_distiller_create(NULL, r.t, r.teacher, &o, &size));
    CHECK(size.size == bytes && bytes > 0 && heap.calls == calls);
    CHECK_OK(dlm_distiller_step(r.d, r.e, OPD_EX, NULL));
    CHECK(heap.calls == calls);
    char *block = (char *)test_malloc(bytes + 2);
    for (int lacking = 1; lacking >= 0; lacking--) {
        dlm_memory mem = { block + 1, bytes - (size_t)lacking };
        dlm_distiller *d = r.d;
        memset(block, 0x5A, bytes + 2);
        CHECK_ERROR(dlm_distiller_create(&d, r.t, r.teacher, &o, &mem),
                    lacking ? DLM_E_NOMEM : DLM_OK, ctx, NULL);
        CHECK((d == NULL) == lacking);
        if (d) CHECK_OK(dlm_distiller_step(d, r.e, OPD_EX, NULL));
        dlm_distiller_free(d);
        CHECK(block[0] == 0x5A && block[bytes + 1] == 0x5A);
    }
    CHECK(heap.calls == calls);
    free(block);
    for (int which = 0; which < 2; which++) {  /* a distiller, a converted model   */
        dlm_distiller *d = r.d;
        dlm_model *m = r.copy;
        int live = heap.live;
        heap.fail_at = heap.calls + 1;
        CHECK((which ? dlm_convert(&m, ctx, r.teacher, 4, DLM_NEW_TOKEN, 0, NULL)
                     : dlm_distiller_create(&d, r.t, r.teacher, &o, NULL))
              == DLM_E_NOMEM);
        CHECK((which ? (void *)m : (void *)d) == NULL && heap.live == live);
    }
    opd_close(&r);
    test_close(ctx);
    CHECK(heap.live == 0);
    dlm_distiller_free(NULL);
}

/* ==[ dit ]===================================================================
   MDLM's DiT (Sahoo et al. 2024) as its authors have it, in double: LayerNorms without
   bias, shifted, scaled and gated by a condition (Peebles and Xie 2023).  At noise level
   0, where it does not depend on time, it is exactly a model of ours. */

enum { DIT_C = 12, DIT_H = 3, DIT_F = 24, DIT_V = 13, DIT_CD = 5, DIT_L = 3, DIT_T = 9,
       DIT_D = DIT_C / DIT_H };

typedef struct dit_layer {
    double norm1[DIT_C], norm2[DIT_C], qkv[3 * DIT_C * DIT_C], out[DIT_C * DIT_C];
    double up[DIT_F * DIT_C], bup[DIT_F], down[DIT_C * DIT_F], bdown[DIT_C];
    double ada[6 * DIT_C * DIT_CD], bada[6 * DIT_C];
} dit_layer;

typedef struct dit {                       /* nothing but doubles                  */
    double embed[DIT_V * DIT_C], norm[DIT_C], head[DIT_V * DIT_C], bhead[DIT_V];
    double ada[2 * DIT_C * DIT_CD], bada[2 * DIT_C];
    double sigma0[DIT_CD * 8], bsigma0[DIT_CD], sigma2[DIT_CD * DIT_CD], bsigma2[DIT_CD];
    dit_layer layer[DIT_L];
} dit;

static void dit_fill(dit *d)
{
    double *x = (double *)(void *)d;
    for (size_t i = 0; i < sizeof *d / sizeof *x; i++) x[i] = 0.7 * (double)test_float();
    for (int i = 0; i < DIT_C; i++) d->norm[i] += 1;
    for (int l = 0; l < DIT_L; l++)
        for (int i = 0; i < DIT_C; i++) {
            d->layer[l].norm1[i] += 1;
            d->layer[l].norm2[i] += 1;
        }
}

static void dit_silu(double *x, int n)
{
    for (int i = 0; i < n; i++) x[i] /= 1 + exp(-x[i]);
}

/* n numbers that the condition gives, W silu(MLP(embedding of level 0)) + b; free it. */
static double *dit_modulation(const dit *d, const double *w, const double *b, int n)
{
    const double level_0[8] = { 1, 1, 1, 1, 0, 0, 0, 0 };  /* cos 0 and sin 0      */
    double *h = ref_linear(level_0, d->sigma0, d->bsigma0, 1, DIT_CD, 8);
    dit_silu(h, DIT_CD);
    double *c = ref_linear(h, d->sigma2, d->bsigma2, 1, DIT_CD, DIT_CD);
    dit_silu(c, DIT_CD);
    double *out = ref_linear(c, w, b, 1, n, DIT_CD);
    free(h); free(c);
    return out;
}

/* LayerNorm(x) (1 + scale) + shift, of all rows; free it. */
static double *dit_norm(const double *x, const double *g, const double *shift,
                        const double *scale)
{
    double *y = ref_doubles(DIT_T * DIT_C);
    for (int t = 0; t < DIT_T; t++, x += DIT_C) {
        double mean = 0, variance = 0;
        for (int i = 0; i < DIT_C; i++) mean += x[i] / (int)DIT_C;
        for (int i = 0; i < DIT_C; i++) variance += pow(x[i] - mean, 2) / (int)DIT_C;
        for (int i = 0; i < DIT_C; i++)
            y[t * DIT_C + i] = (x[i] - mean) / sqrt(variance + 1e-5) * g[i]
                * (1 + scale[i]) + shift[i];
    }
    return y;
}

/* qkv (T, 3C) to heads (T, C): everyone sees everyone; free them. */
static double *dit_attention(double *qkv)
{
    double *out = ref_doubles(DIT_T * DIT_C);
    for (int t = 0; t < DIT_T; t++)
        for (int h = 0; h < 2 * DIT_H; h++)
            ref_rotate(qkv + t * 3 * DIT_C + h * DIT_D, DIT_D, t, 10000);
    for (int i = 0; i < DIT_T * DIT_H; i++) {
        const int t = i / DIT_H, at = i % DIT_H * DIT_D;
        double p[DIT_T], sum = 0;
        for (int u = 0; u < DIT_T; u++) {
            const double *q = qkv + t * 3 * DIT_C + at;
            const double *k = qkv + u * 3 * DIT_C + DIT_C + at;
            double s = 0;
            for (int j = 0; j < DIT_D; j++) s += q[j] * k[j] / sqrt((double)DIT_D);
            sum += p[u] = exp(s);
        }
        for (int j = 0; j < DIT_D; j++) {
            double mix = 0;
            for (int u = 0; u < DIT_T; u++)
                mix += p[u] / sum * qkv[u * 3 * DIT_C + 2 * DIT_C + at + j];
            out[t * DIT_C + at + j] = mix;
        }
    }
    return out;
}

/* x += gate * y, in every row; frees y. */
static void dit_gate(double *x, double *y, const double *gate)
{
    for (int i = 0; i < DIT_T * DIT_C; i++) x[i] += gate[i % DIT_C] * y[i];
    free(y);
}

static void dit_block(const dit *d, const dit_layer *l, double *x)
{
    double *m = dit_modulation(d, l->ada, l->bada, 6 * DIT_C);     /* shift scale gate */
    double *y = dit_norm(x, l->norm1, m, m + DIT_C);
    double *qkv = ref_linear(y, l->qkv, NULL, DIT_T, 3 * DIT_C, DIT_C);
    double *o = dit_attention(qkv);
    dit_gate(x, ref_linear(o, l->out, NULL, DIT_T, DIT_C, DIT_C), m + 2 * DIT_C);
    free(y); free(qkv); free(o);
    y = dit_norm(x, l->norm2, m + 3 * DIT_C, m + 4 * DIT_C);
    double *up = ref_linear(y, l->up, l->bup, DIT_T, DIT_F, DIT_C);
    for (int i = 0; i < DIT_T * DIT_F; i++) up[i] = ref_gelu(up[i]);
    dit_gate(x, ref_linear(up, l->down, l->bdown, DIT_T, DIT_C, DIT_F), m + 5 * DIT_C);
    free(y); free(up); free(m);
}

/* Logits (T, V); free them. */
static double *dit_logits(const dit *d, const int *tokens)
{
    double x[DIT_T * DIT_C];
    for (int i = 0; i < DIT_T * DIT_C; i++)
        x[i] = d->embed[tokens[i / DIT_C] * DIT_C + i % DIT_C];
    for (int l = 0; l < DIT_L; l++) dit_block(d, &d->layer[l], x);
    double *m = dit_modulation(d, d->ada, d->bada, 2 * DIT_C);
    double *y = dit_norm(x, d->norm, m, m + DIT_C);
    double *logits = ref_linear(y, d->head, d->bhead, DIT_T, DIT_V, DIT_C);
    free(m); free(y);
    return logits;
}

/* --[ the fold ]--------------------------------------------------------------
   What is written to the residual stream is made to have mean 0, then LayerNorm is
   RMSNorm; gates go into what they gate, scales into the gains, shifts into biases. */

/* The tensor = w, its row r times gain[r] where there is one; with centre its columns get
   mean 0: the mean of all outputs is taken from each. */
static void dit_put(dlm_model *m, int layer, const char *name, const double *w,
                    const double *gain, int centre)
{
    char full[80];
    dlm_tensor t;
    memset(&t, 0, sizeof t);
    snprintf(full, sizeof full, "%s%s", layer < 0 ? "" : "model.layers.0.", name);
    if (layer >= 0) full[13] = (char)('0' + layer);
    for (int i = 0; i < dlm_model_tensors(m); i++) {
        dlm_model_tensor(m, i, &t);
        if (!strcmp(t.name, full)) break;
    }
    LABEL("%s", full);
    CHECK(!strcmp(t.name, full));
    for (int c = 0; c < t.cols; c++) {
        double mean = 0;
        for (int r = 0; r < t.rows; r++)
            mean += w[r * t.cols + c] * (gain ? gain[r] : 1) / t.rows;
        for (int r = 0; r < t.rows; r++)
            t.data[r * t.cols + c] = (float)(w[r * t.cols + c] * (gain ? gain[r] : 1)
                                             - (centre ? mean : 0));
    }
}

/* The gain g (1 + scale) of a norm. */
static void dit_put_norm(dlm_model *m, int layer, const char *name, const double *g,
                         const double *scale)
{
    double gain[DIT_C];
    for (int i = 0; i < DIT_C; i++) gain[i] = 1 + scale[i];
    dit_put(m, layer, name, g, gain, 0);
}

static void dit_fold_layer(const dit *d, int i, dlm_model *m)
{
    static const char *const names[6] = {
        "self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight",
        "self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias" };
    const dit_layer *l = &d->layer[i];
    double *a = dit_modulation(d, l->ada, l->bada, 6 * DIT_C);
    double *bqkv = ref_linear(a, l->qkv, NULL, 1, 3 * DIT_C, DIT_C);
    double *bup = ref_linear(a + 3 * DIT_C, l->up, l->bup, 1, DIT_F, DIT_C);
    dit_put_norm(m, i, "input_layernorm.weight", l->norm1, a + DIT_C);
    for (int j = 0; j < 3; j++) {
        dit_put(m, i, names[j], l->qkv + j * DIT_C * DIT_C, NULL, 0);
        dit_put(m, i, names[3 + j], bqkv + j * DIT_C, NULL, 0);
    }
    dit_put(m, i, "self_attn.o_proj.weight", l->out, a + 2 * DIT_C, 1);
    dit_put_norm(m, i, "post_attention_layernorm.weight", l->norm2, a + 4 * DIT_C);
    dit_put(m, i, "mlp.up_proj.weight", l->up, NULL, 0);
    dit_put(m, i, "mlp.up_proj.bias", bup, NULL, 0);
    dit_put(m, i, "mlp.down_proj.weight", l->down, a + 5 * DIT_C, 1);
    dit_put(m, i, "mlp.down_proj.bias", l->bdown, a + 5 * DIT_C, 1);
    free(a); free(bqkv); free(bup);
}

static void dit_fold(const dit *d, dlm_model *m)
{
    double embed[DIT_V * DIT_C];
    double *a = dit_modulation(d, d->ada, d->bada, 2 * DIT_C);
    double *bhead = ref_linear(a, d->head, d->bhead, 1, DIT_V, DIT_C);
    for (int v = 0; v < DIT_V; v++) {
        double mean = 0;
        for (int i = 0; i < DIT_C; i++) mean += d->embed[v * DIT_C + i] / (int)DIT_C;
        for (int i = 0; i < DIT_C; i++)
            embed[v * DIT_C + i] = d->embed[v * DIT_C + i] - mean;
    }
    dit_put(m, -1, "model.embed_tokens.weight", embed, NULL, 0);
    for (int l = 0; l < DIT_L; l++) dit_fold_layer(d, l, m);
    dit_put_norm(m, -1, "model.norm.weight", d->norm, a + DIT_C);
    dit_put(m, -1, "lm_head.weight", d->head, NULL, 0);
    dit_put(m, -1, "lm_head.bias", bhead, NULL, 0);
    free(a); free(bhead);
}

static dlm_config dit_config(void)
{
    dlm_config c = test_config(DIT_V, DIT_C, DIT_L, DIT_H, DIT_T);
    c.pattern = DLM_PATTERN_FULL;
    c.ffn = DIT_F;
    c.norm_eps = 1e-5f;
    c.untied_head = c.no_qk_norm = c.qkv_bias = c.gelu_mlp = c.head_bias = 1;
    return c;
}

TEST(folded_dit_equals_the_unfolded_one_in_double)
{
    static dit d;
    static test_batch t;
    const dlm_config c = dit_config();
    for (int draw = 0; draw < 10; draw++) {
        dit_fill(&d);
        batch_clear(&t);
        batch_add(&t, DIT_T, DIT_V, DLM_PATTERN_FULL, 0, 0);
        const dlm_batch *b = batch_close(&t, 2);
        double *want = dit_logits(&d, t.tokens), scale = max_abs(want, DIT_T * DIT_V);
        FOR_EACH_ISA(isa) {
            dlm_ctx *ctx = test_open(isa, 1);
            dlm_model *m = test_model(ctx, &c);
            dit_fold(&d, m);
            for (int packed = 0; packed < 2; packed++) {
                float *got = packed ? test_logits_in(ctx, m, b, DLM_F32)
                                    : test_logits_as_is(ctx, m, b);
                LABEL("draw %d, packed %d, %s", draw, packed, dlm_isa_name((dlm_isa)isa));
                for (int i = 0; i < DIT_T * DIT_V; i++)
                    CHECK_CLOSE(got[i], want[i], 1e-5 * scale);
                free(got);
            }
            dlm_model_free(m);
            test_close(ctx);
        }
        free(want);
    }
}

/* ==[ forbidden tokens ]======================================================
   A bias of the head of -INFINITY at the mask, which is MDLM's SUBS parameterisation. */

static float *subs_bias(const dlm_model *m)
{
    return m->weights + m->n_params - m->config.vocab;
}

/* The same weights, the mask forbidden or not. */
static dlm_model *subs_model(dlm_ctx *ctx, int kind, int forbidden)
{
    dlm_config c = toy_config(kind);
    c.head_bias = 1;
    c.gelu_mlp = kind & 1;
    c.untied_head = kind >> 1 & 1;
    dlm_model *m = toy_model_of(ctx, &c, 5);
    if (!m) exit(1);
    for (int v = 0; v < TOY_VOCAB; v++) subs_bias(m)[v] = 0.2f * (float)(v % 5);
    if (forbidden) subs_bias(m)[TOY_MASK] = -INFINITY;
    return m;
}

TEST(forbidden_token_has_probability_0_and_leaves_all_other_logits)
{
    NEEDS_NARROW_WORDS();
    static test_batch t;
    static const dlm_dtype types[] = { DLM_F32, DLM_BF16, DLM_I8 };
    FOR_EACH_ISA(isa)
        for (int i = 0; i < 4 * TOY_KINDS; i++) {
            dlm_ctx *ctx = test_open(isa, 1 + i % 2);
            dlm_model *m[2];
            float *x[2];
            batch_clear(&t);
            batch_add(&t, TOY_SLOTS, TOY_VOCAB, DLM_PATTERN_FULL, 0, 0);
            const dlm_batch *b = batch_close(&t, 2);
            for (int k = 0; k < 2; k++) {
                m[k] = subs_model(ctx, i / 4, k);
                x[k] = i % 4 < 3 ? test_logits_in(ctx, m[k], b, types[i % 4])
                                 : test_logits_as_is(ctx, m[k], b);
            }
            LABEL("kind %d, form %d, %s", i / 4, i % 4, dlm_isa_name((dlm_isa)isa));
            for (int j = 0; j < b->n_out; j++) {
                float *open = x[0] + j * TOY_VOCAB, *shut = x[1] + j * TOY_VOCAB;
                double others[TOY_MASK], want;
                for (int v = 0; v < TOY_MASK; v++) others[v] = open[v];
                want = ref_cross_entropy(others, TOY_MASK, j % TOY_MASK);
                CHECK(!memcmp(open, shut, TOY_MASK * sizeof(float)));
                CHECK(open[TOY_MASK] > -1e9f && shut[TOY_MASK] == -INFINITY);
                CHECK_CLOSE(dlm_cross_entropy(ctx, shut, TOY_VOCAB, j % TOY_MASK, 1),
                            want, 1e-5 * (1 + want));
                CHECK(shut[TOY_MASK] == 0);        /* its gradient                 */
            }
            for (int k = 0; k < 2; k++) { free(x[k]); dlm_model_free(m[k]); }
            test_close(ctx);
        }
}

/* The sampler forbids the mask anyway, so that all is as without the bias. */
TEST(forbidden_mask_is_sampled_as_any_mask_in_every_order)
{
    static toy_run run[2];
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int i = 0; i < (int)TOY_KINDS * (int)DLM_ORDER_COUNT * 4; i++) {
        const int kind = i % TOY_KINDS;
        dlm_sample_options o = {0};
        o.order = (dlm_order)(i / TOY_KINDS % DLM_ORDER_COUNT);
        o.temperature = i & 1 ? 0.8f : 0;
        o.top_p = i & 1 ? 0.9f : 0;
        o.guidance = i / TOY_KINDS / DLM_ORDER_COUNT & 1 ? 1.5f : 0;
        if (i / TOY_KINDS / DLM_ORDER_COUNT & 2 && o.order < DLM_ORDER_RANDOM)
            o.remask_below = 0.3f;
        for (int k = 0; k < 2; k++) {
            dlm_model *m = subs_model(ctx, kind, k);
            toy_canvas(&run[k], kind == 4);
            if (o.guidance > 0) run[k].n_seqs = TOY_SEQS / 2;
            feclearexcept(FE_ALL_EXCEPT);
            toy_generate(&run[k], ctx, m, kind > 1, &o);
            LABEL("%s, order %d, run %d", toy_kind_names[kind], (int)o.order, i);
            CHECK(!fetestexcept(FE_INVALID | FE_DIVBYZERO | FE_OVERFLOW));
            dlm_model_free(m);
        }
        CHECK(run[0].n_events > 0 && run[0].n_events == run[1].n_events);
        CHECK(!memcmp(&run[0], &run[1], offsetof(toy_run, flops)));
    }
    test_close(ctx);
}

/* What a careless loss writes there has no effect, either. */
static void subs_apply_nan(void *user, int i, float *logits)
{
    ce_apply(user, i, logits);
    logits[TOY_MASK] = i & 1 ? (float)NAN : 1e30f;
}

TEST(forbidden_token_has_no_gradient)
{
    static test_batch t;
    static grad_probe probes[PROBES_MAX];
    FOR_EACH_ISA(isa)
        for (int kind = 0; kind < TOY_KINDS; kind++) {
            dlm_ctx *ctx = test_open(isa, 1 + kind % 2);
            dlm_model *m = subs_model(ctx, kind, 1);
            reference r;
            ce_score score;
            batch_clear(&t);
            batch_add(&t, TOY_SLOTS, TOY_VOCAB, (int)m->config.pattern, 4, 0);
            const dlm_batch *b = batch_close(&t, 0.5);
            ce_open(&score, b, TOY_VOCAB);
            for (int i = 0; i < b->n_out; i++) score.target[i] %= TOY_MASK;
            ref_open(&r, m);
            float *grad = grad_of_pass(ctx, m, b, &score);
            int n = grad_probe_all(probes, m, &r, b, &score, grad);
            grad_compare(m, probes, n, grad, toy_kind_names[kind]);
            CHECK(grad[m->n_params - TOY_VOCAB + TOY_MASK] == 0);
            dlm_trainer *tr = test_trainer(ctx, m, NULL);
            CHECK_OK(dlm_trainer_pass(tr, b, subs_apply_nan, &score));
            CHECK(!memcmp(grad, tr->gradients, m->n_params * sizeof(float)));
            dlm_trainer_free(tr);
            free(grad);
            ref_close(&r);
            ce_close(&score);
            dlm_model_free(m);
            test_close(ctx);
        }
}

/* Weights, averages and both moments: numbers, but for the one that is forbidden. */
static void subs_check_trained(const dlm_trainer *t)
{
    const size_t n = t->model->n_params, at = n - TOY_VOCAB + TOY_MASK;
    for (size_t i = 0; i < n; i++) {
        const float w = t->model->weights[i], ema = t->ema[i];
        const float m = t->adam_m[i], v = t->adam_v[i];
        if (i == at) CHECK(w == -INFINITY && ema == -INFINITY && m == 0 && v == 0);
        else CHECK(isfinite(w) && isfinite(ema) && isfinite(m) && isfinite(v));
    }
}

TEST(forbidden_token_stays_so_in_training)
{
    FOR_EACH_ISA(isa)
        for (int i = 0; i < 4 * (int)DLM_METHOD_COUNT; i++) {
            dlm_ctx *ctx = test_open(isa, 1);
            const int kind = i % 4;
            dlm_model *m = subs_model(ctx, kind, 1);
            dlm_train_options o = {0};
            dlm_example e[6];
            dlm_report report;
            o.max_rows = 400; o.weight_decay = 0.1f; o.ema = 0.9f; o.lr = 1e-2f;
            o.lift.method = (dlm_method)(i / 4);
            o.lift.one_pass = i & 1 && i / 4 > 0;
            dlm_trainer *t = test_trainer(ctx, m, &o);
            run_examples(e, 6, TOY_VOCAB);
            for (int j = 0; j < 6; j++) {
                e[j].length = e[j].length > TOY_SLOTS ? TOY_SLOTS : e[j].length;
                e[j].prompt %= 3;
            }
            feclearexcept(FE_ALL_EXCEPT);
            for (int step = 0; step < 70; step++) {
                CHECK_OK(dlm_trainer_step(t, e, 6, &report));
                LABEL("kind %d, method %d, step %d, %s", kind, i / 4, step,
                      dlm_isa_name((dlm_isa)isa));
                CHECK(isfinite(report.loss) && isfinite(report.grad_norm));
            }
            CHECK(!fetestexcept(FE_INVALID | FE_DIVBYZERO | FE_OVERFLOW));
            subs_check_trained(t);
            dlm_trainer_free(t);
            dlm_model_free(m);
            test_close(ctx);
        }
}

#ifndef DLM_NO_STDIO
/* Saves and loads what t has, with x in place of *at: the array called name in a file. */
static void subs_try(dlm_trainer *t, const char *name, float *at, size_t index,
                     uint32_t x, int sound)
{
    const char *path = "dlm_test_subs.st", *copy = "dlm_test_copy.st";
    const float kept = at[index];
    dlm_ctx *ctx = t->ctx;
    dlm_safetensors *s = NULL;
    LABEL("%s[%u] = %08x", name, (unsigned)index, (unsigned)x);
    dlm_error e = dlm_trainer_save(t, path);
    CHECK_OK(e);
    if (e) return;
    test_file f = file_read(path);
    memcpy(at + index, &x, sizeof x);
    CHECK((dlm_trainer_save(t, path) == DLM_OK) == sound);
    if (at == t->model->weights)
        CHECK((dlm_save(ctx, copy, t->model, NULL) == DLM_OK) == sound);
    at[index] = kept;
    CHECK_OK(dlm_safetensors_parse(&s, ctx, f.data, f.size));
    memcpy((char *)f.data + ((const char *)dlm_safetensors_find(s, name)->data
                             - (const char *)f.data) + 4 * index, &x, sizeof x);
    CHECK((dlm_trainer_load_memory(t, f.data, f.size) == DLM_OK) == sound);
    at[index] = kept;
    dlm_safetensors_close(s);
    free(f.data);
    remove(path);
    remove(copy);
}

TEST(only_the_bias_of_a_head_is_kept_at_minus_infinity_in_files)
{
    static const uint32_t bad[3] = { 0xFF800000u, 0x7FC00000u, 0x7F800000u };
    static const char *const names[4] = { "weights", "ema", "adam.m", "adam.v" };
    const char *path = "dlm_test_subs.st";
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_model *m = subs_model(ctx, 2, 1), *again = NULL;
    dlm_train_options o = {0};
    o.ema = 0.9f;
    dlm_trainer *t = test_trainer(ctx, m, &o);
    float *const arrays[4] = { m->weights, t->ema, t->adam_m, t->adam_v };
    CHECK_OK(dlm_save(ctx, path, m, NULL));
    CHECK_OK(dlm_load(&again, NULL, ctx, path));
    if (again) CHECK(!memcmp(m->weights, again->weights, m->n_params * sizeof(float)));
    for (int i = 0; i < 12; i++) {
        const size_t bias = m->n_params - TOY_VOCAB;
        const int sound = i / 4 == 0 && i % 4 < 2;
        subs_try(t, names[i % 4], arrays[i % 4], bias, bad[i / 4], sound);
        subs_try(t, names[i % 4], arrays[i % 4], m->n_params - 1, bad[i / 4], sound);
        subs_try(t, names[i % 4], arrays[i % 4], bias - 1, bad[i / 4], 0);
        subs_try(t, names[i % 4], arrays[i % 4], 0, bad[i / 4], 0);
    }
    dlm_trainer_free(t);
    dlm_model_free(again); dlm_model_free(m);
    test_close(ctx);
}
#endif

/* ==[ guidance and remasking ]================================================ */

/* Logits (T, V) of a canvas, every row, blocks counted from offset. */
static float *opd_canvas_logits(dlm_ctx *ctx, const dlm_model *m, const int *canvas,
                                int T, int offset)
{
    static test_batch t;
    batch_clear(&t);
    batch_add(&t, T, 2, (int)m->config.pattern, m->config.block, offset);
    memcpy(t.tokens, canvas, (size_t)T * sizeof(int));
    return test_logits(ctx, m, batch_close(&t, 2), 0);
}

/* All logits the sampler chose from are u + (s + 1)(c - u), in u every token is masked
   that stood in the first canvas: the second sequence has islands and no prompt. */
static void opd_check_guidance(dlm_ctx *ctx, const dlm_model *m, int b)
{
    static opd_watch w;
    dlm_sample_options o = {0};
    int compared = 0, islands = 0;
    o.guidance = 1.5f; o.temperature = 1;
    w.forced = -1;
    opd_watch_run(&w, ctx, m, 2 * TOY_SEQS + 1, o);
    for (int i = 0; i < w.step * TOY_SEQS; i++) {
        const int step = i / TOY_SEQS, q = i % TOY_SEQS, T = w.run.lengths[q];
        const int P = w.prompt[q];
        int canvas[TOY_SLOTS];
        memcpy(canvas, w.canvas[step] + q * TOY_SLOTS, sizeof canvas);
        float *c = opd_canvas_logits(ctx, m, canvas, T, P % b);
        for (int j = 0; j < T; j++)
            if (w.canvas[0][q * TOY_SLOTS + j] != TOY_MASK) canvas[j] = TOY_MASK;
        float *u = opd_canvas_logits(ctx, m, canvas, T, P % b);
        for (int j = 0; j < T * TOY_VOCAB; j++) {
            const float *seen = w.logits[step][q * TOY_SLOTS + j / TOY_VOCAB];
            if (seen[0] != seen[0]) continue;
            compared++;
            CHECK_CLOSE(seen[j % TOY_VOCAB], u[j] + 2.5f * (c[j] - u[j]), 1e-4);
            islands += q == 1 && fabsf(seen[j % TOY_VOCAB] - c[j]) > 0.1f;
        }
        free(c); free(u);
    }
    CHECK(compared > 40 * TOY_VOCAB && islands > 5 * TOY_VOCAB);
}

/* A canvas that begins with masks: what stands further right guides, too. */
static void opd_check_infilling(dlm_ctx *ctx, const dlm_model *m)
{
    enum { M = TOY_MASK, T = 12 };
    static const int given[T] = { M, M, 3, 7, M, M, 11, 2, M, M, 5, 6 };
    int canvas[2][T];
    for (int k = 0; k < 2; k++) {
        dlm_sample_options o = {0};
        o.guidance = 2.0f * (float)k;
        memcpy(canvas[k], given, sizeof given);
        CHECK_OK(dlm_sample(ctx, m, canvas[k], T, &o));
        for (int i = 0; i < T; i++) CHECK(given[i] == M || canvas[k][i] == given[i]);
    }
    CHECK(memcmp(canvas[0], canvas[1], sizeof canvas[0]) != 0);
}

TEST(guidance_is_its_formula_and_needs_twice_the_sequences)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int kind = 0; kind < 3; kind += 2) {
        dlm_model *m = toy_model(ctx, kind, 5);
        LABEL("%s", toy_kind_names[kind]);
        opd_check_infilling(ctx, m);
        opd_check_guidance(ctx, m, kind == 0 ? 1 << 20 : 4);
        dlm_sample_options o = {0};
        dlm_session *s = toy_session(ctx, m, kind == 2);
        dlm_sampler *sm = NULL;
        toy_run r;
        toy_canvas(&r, 0);
        o.guidance = 0.5f;
        CHECK_OK(dlm_sampler_create(&sm, s, &o, NULL));
        if (sm) CHECK_ERROR(dlm_sampler_begin(sm, r.canvas, r.lengths, TOY_SEQS / 2 + 1),
                            DLM_E_INPUT, ctx, "guidance");
        dlm_sampler_free(sm);
        double flops[2];
        for (int guided = 0; guided < 2; guided++) {        /* costs twice as much  */
            o.guidance = 0.5f * (float)guided;
            toy_canvas(&r, 0);
            r.n_seqs = TOY_SEQS / 2;
            toy_drive(&r, s, &o);
            CHECK_OK(r.error);
            flops[guided] = r.flops;
        }
        CHECK_CLOSE(flops[1], 2 * flops[0], 1);
        dlm_session_free(s);
        toy_canvas(&r, 0);
        CHECK_OK(dlm_sample(ctx, m, r.canvas, r.lengths[0], &o));       /* one call */
        for (int i = 0; i < r.lengths[0]; i++) CHECK(r.canvas[i] != TOY_MASK);
        dlm_model_free(m);
    }
    test_close(ctx);
}

/* A token loses its place exactly when it is the sampler's own, in the active block,
   less likely than the limit, and for the first time. */
static int opd_check_remasks(const opd_watch *w, double limit)
{
    static char once[TOY_ALL];
    int revised = 0;
    memset(once, 0, sizeof once);
    for (int i = 0; i < w->step * TOY_ALL; i++) {
        const int step = i / TOY_ALL, at = i % TOY_ALL;
        const int before = w->canvas[step][at], after = w->canvas[step + 1][at];
        const float *x = w->logits[step][at];
        double z[TOY_VOCAB], p;
        if (w->canvas[0][at] != TOY_MASK || before == after) CHECK(before == after);
        if (before == TOY_MASK || w->canvas[0][at] != TOY_MASK) continue;
        if (x[0] != x[0]) { CHECK(before == after); continue; }
        for (int v = 0; v < TOY_MASK; v++) z[v] = (double)x[v];
        p = exp(z[before] - ref_log_sum_exp(z, TOY_MASK));
        CHECK(!once[at]);                       /* not asked again                 */
        if (fabs(p - limit) > 1e-5) CHECK(after == (p < limit ? TOY_MASK : before));
        if (after != TOY_MASK) continue;
        once[at] = 1;
        revised++;
    }
    for (int q = 0; q < TOY_SEQS; q++)
        for (int i = 0; i < w->run.lengths[q]; i++)
            CHECK(w->run.canvas[q * TOY_SLOTS + i] != TOY_MASK);
    return revised;
}

TEST(remasking_revises_unlikely_tokens_once)
{
    static opd_watch w, plain;
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int i = 0; i < 2 * 4 * 2; i++) {
        static const dlm_order orders[4] = { DLM_ORDER_CONFIDENCE, DLM_ORDER_THRESHOLD,
                                             DLM_ORDER_MARGIN, DLM_ORDER_ENTROPY };
        dlm_model *m = toy_model(ctx, i % 2 ? 2 : 0, 5);
        dlm_sample_options o = {0};
        const int forced = 7;
        o.order = orders[i / 2 % 4];
        o.threshold = 0.4f; o.temperature = 1; o.seed = 3;
        o.remask_below = i / 8 ? 1.0f : 0.2f;
        w.forced = forced;
        w.forced_token = 0;
        LABEL("case %d", i);
        opd_watch_run(&w, ctx, m, TOY_SEQS, o);
        const int revised = opd_check_remasks(&w, (double)o.remask_below);
        CHECK(revised > 0);
        CHECK(w.run.n_events == revised + 24 - 5 + 13 - 2 + 0 + 1 + 1 + 18 - 4 - 3);
        CHECK(w.canvas[1][forced] == w.forced_token);       /* the least likely one */
        if (i / 8) CHECK(w.canvas[2][forced] == TOY_MASK);
        o.remask_below = 0;                     /* equals not having the option    */
        w.forced = plain.forced = -1;
        opd_watch_run(&w, ctx, m, TOY_SEQS, o);
        CHECK(opd_check_remasks(&w, 0) == 0);
        o.remask_below = 1e-30f;
        opd_watch_run(&plain, ctx, m, TOY_SEQS, o);
        CHECK(toy_same_tokens(&w.run, &plain.run) && toy_same_events(&w.run, &plain.run));
        dlm_model_free(m);
    }
    test_close(ctx);
}

/* ==[ llama2c ]===============================================================
   Hand-made files, and the model in double as its own program computes it: pairs
   (2j, 2j+1) of a head are turned. */

typedef struct llama_file {
    int32_t h[7];                              /* dim hidden layers heads kv vocab seq */
    float   x[8192];
    int     n;
} llama_file;

/* The n floats at *at, which moves on. */
static double *llama_next(const llama_file *f, int *at, int n)
{
    double *x = ref_doubles((size_t)n);
    for (int i = 0; i < n; i++) x[i] = (double)f->x[*at + i];
    *at += n;
    return x;
}

static size_t llama_make(llama_file *f, int untied, int kv, int seq)
{
    const int C = 12, F = 20, L = 2, H = 3, V = 11, D = C / H, K = kv * D;
    const int32_t h[7] = { C, F, L, H, kv, untied ? -V : V, seq };
    memcpy(f->h, h, sizeof h);
    f->n = V * C + L * (2 * C + 2 * C * C + 2 * K * C + 3 * F * C) + C + seq * D
         + untied * V * C;
    CHECK(f->n <= 8192);
    test_fill(f->x, (size_t)f->n, 0.6f);
    return sizeof f->h + (size_t)f->n * sizeof(float);
}

static void llama_turn(double *x, int rows, int heads, int D)
{
    for (int i = 0; i < rows * heads * D; i += 2) {
        double angle = i / (heads * D) * pow(10000.0, -(i % D) / (double)D), a = x[i];
        x[i] = a * cos(angle) - x[i + 1] * sin(angle);
        x[i + 1] = x[i + 1] * cos(angle) + a * sin(angle);
    }
}

/* out of one head: causal attention of q, k, v, rows C or K apart. */
static void llama_attend(double *out, const double *q, const double *k, const double *v,
                         int row, int C, int K, int D)
{
    double score[32], lse;
    for (int j = 0; j <= row; j++) {
        score[j] = 0;
        for (int d = 0; d < D; d++) score[j] += q[row * C + d] * k[j * K + d] / sqrt(D);
    }
    lse = ref_log_sum_exp(score, row + 1);
    for (int d = 0; d < D; d++) {
        out[row * C + d] = 0;
        for (int j = 0; j <= row; j++)
            out[row * C + d] += exp(score[j] - lse) * v[j * K + d];
    }
}

enum { LLAMA_W = 9 };                          /* arrays of a layer, in file order */

static void llama_layer(const llama_file *f, double *x, int T, double *const *w, int l)
{
    const int C = f->h[0], F = f->h[1], H = f->h[3], kv = f->h[4], D = C / H, K = kv * D;
    double *a[8];
    a[0] = ref_norm_rows(x, w[0] + l * C, T, C, 1e-5);
    a[1] = ref_linear(a[0], w[1] + l * C * C, NULL, T, C, C);
    a[2] = ref_linear(a[0], w[2] + l * K * C, NULL, T, K, C);
    a[3] = ref_linear(a[0], w[3] + l * K * C, NULL, T, K, C);
    llama_turn(a[1], T, H, D);
    llama_turn(a[2], T, kv, D);
    for (int i = 0, g = H / kv; i < T * H; i++)
        llama_attend(a[0] + i % H * D, a[1] + i % H * D, a[2] + i % H / g * D,
                     a[3] + i % H / g * D, i / H, C, K, D);
    a[4] = ref_linear(a[0], w[4] + l * C * C, NULL, T, C, C);
    for (int i = 0; i < T * C; i++) x[i] += a[4][i];
    free(a[0]);
    a[0] = ref_norm_rows(x, w[5] + l * C, T, C, 1e-5);
    a[5] = ref_linear(a[0], w[6] + l * F * C, NULL, T, F, C);
    a[6] = ref_linear(a[0], w[8] + l * F * C, NULL, T, F, C);
    for (int i = 0; i < T * F; i++) a[5][i] *= a[6][i] / (1 + exp(-a[5][i]));
    a[7] = ref_linear(a[5], w[7] + l * C * F, NULL, T, C, F);
    for (int i = 0; i < T * C; i++) x[i] += a[7][i];
    for (int i = 0; i < 8; i++) free(a[i]);
}

static double *llama_logits(const llama_file *f, const int *tokens, int T)
{
    const int C = f->h[0], F = f->h[1], L = f->h[2], V = abs(f->h[5]);
    const int D = C / f->h[3], K = f->h[4] * D;
    const int size[LLAMA_W] = { C, C * C, K * C, K * C, C * C, C, F * C, C * F, F * C };
    double *w[LLAMA_W], *x = ref_doubles((size_t)(T * C));
    int at = 0;
    double *embed = llama_next(f, &at, V * C);
    for (int i = 0; i < LLAMA_W; i++) w[i] = llama_next(f, &at, L * size[i]);
    double *norm = llama_next(f, &at, C);
    at += f->h[6] * D;
    double *head = f->h[5] < 0 ? llama_next(f, &at, V * C) : embed;
    CHECK(at == f->n);
    for (int i = 0; i < T * C; i++) x[i] = embed[tokens[i / C] * C + i % C];
    for (int l = 0; l < L; l++) llama_layer(f, x, T, w, l);
    double *n = ref_norm_rows(x, norm, T, C, 1e-5);
    double *logits = ref_linear(n, head, NULL, T, V, C);
    for (int i = 0; i < LLAMA_W; i++) free(w[i]);
    if (head != embed) free(head);
    free(embed); free(norm); free(x); free(n);
    return logits;
}

TEST(llama2c_models_compute_what_their_own_program_would)
{
    static llama_file f;
    static test_batch t;
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int i = 0; i < 4; i++) {
        dlm_model *m = NULL;
        size_t size = llama_make(&f, i & 1, i & 2 ? 1 : 3, 16);
        char *bytes = (char *)test_malloc(size + 1);
        memcpy(bytes + 1, &f, size);           /* any alignment                    */
        LABEL("case %d", i);
        CHECK_OK(dlm__llama2c_from(&m, ctx, bytes + 1, size));
        free(bytes);                           /* weights were copied              */
        if (!m) continue;
        CHECK(m->config.pattern == DLM_PATTERN_CAUSAL && m->config.mask_id == 11);
        CHECK(m->config.untied_head == (i & 1) && m->config.max_seq == 16);
        CHECK(m->config.no_qk_norm && fabsf(m->config.norm_eps - 1e-5f) < 1e-9f);
        batch_clear(&t);
        batch_add(&t, 16, 11, DLM_PATTERN_CAUSAL, 1, 0);
        float *got = test_logits(ctx, m, batch_close(&t, 2), 0);
        double *want = llama_logits(&f, t.tokens, 16);
        for (int j = 0; j < 16 * 11; j++) CHECK_CLOSE(got[j], want[j], 2e-5);
        free(got); free(want); dlm_model_free(m);
    }
    test_close(ctx);
}

TEST(llama2c_refuses_files_that_do_not_fit_their_header)
{
    static const int32_t absurd[][2] = { { 0, 0 }, { 0, -12 }, { 0, 2147483647 },
        { 1, 0 }, { 1, -1 }, { 1, 2147483647 }, { 2, 0 }, { 2, -2 }, { 2, 2147483647 },
        { 3, 0 }, { 3, 13 }, { 3, 4 }, { 4, 0 }, { 4, -1 }, { 4, 2 }, { 4, 9 }, { 5, 0 },
        { 5, 1 }, { 5, INT32_MIN }, { 5, 2147483647 }, { 6, 0 }, { 6, -5 }, { 6, 17 },
        { 6, 2147483647 } };
    static llama_file f;
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int untied = 0; untied < 2; untied++) {
        size_t size = llama_make(&f, untied, 1, 4);
        for (size_t n = 0; n <= size + 4; n++) {
            dlm_model *m = NULL;
            char *part = (char *)test_malloc(n);            /* reads past it show  */
            memcpy(part, &f, n);
            LABEL("%u of %u bytes", (unsigned)n, (unsigned)size);
            const dlm_error want = n == size ? DLM_OK : DLM_E_FORMAT;
            CHECK_ERROR(dlm__llama2c_from(&m, ctx, part, n), want, ctx,
                        want ? "llama2.c" : NULL);
            CHECK((m != NULL) == (n == size));
            dlm_model_free(m); free(part);
        }
        for (size_t i = 0; i < sizeof absurd / sizeof *absurd; i++) {
            dlm_model *m = NULL;
            llama_file g = f;
            g.h[absurd[i][0]] = absurd[i][1];
            LABEL("header %d: %d", (int)absurd[i][0], (int)absurd[i][1]);
            dlm_error e = dlm__llama2c_from(&m, ctx, &g, size);
            CHECK((e == DLM_E_FORMAT || e == DLM_E_CONFIG) && m == NULL);
            CHECK(dlm_last_error(ctx)[0]);
        }
    }
    test_heap heap = {0};
    dlm_ctx *poor = heap_open(&heap, 1);
    dlm_model *m = NULL;
    size_t size = llama_make(&f, 0, 1, 4);
    int live = heap.live;
    for (int n = 1; n < 9; n++) {
        heap.fail_at = heap.calls + n;
        dlm_error e = dlm__llama2c_from(&m, poor, &f, size);
        CHECK(e == (heap.calls < heap.fail_at ? DLM_OK : DLM_E_NOMEM));
        dlm_model_free(m);
        CHECK(heap.live == live);
    }
    test_close(poor);
    test_close(ctx);
}

/* ==[ pieces ]================================================================ */

typedef struct piece_file { char x[8192]; size_t n, end[320]; int count; } piece_file;

static void piece_put(piece_file *f, const char *text, float score)
{
    int32_t length = (int32_t)strlen(text);
    memcpy(f->x + f->n, &score, 4);
    memcpy(f->x + f->n + 4, &length, 4);
    memcpy(f->x + f->n + 8, text, (size_t)length);
    f->end[f->count++] = f->n += 8 + (size_t)length;
}

enum { PIECE_A = 260 };                        /* the first piece of the list below */

/* Ids 0..2, 256 bytes, then: 259 " ", 260 a, 261 b, 262 c, 263 e acute, 264 bc, 265 ab,
   266 abc, 267 " a", 268 "aa", 269 "aab", 270 "bc" again, 271 "c a" if spaces. */
static void piece_make(piece_file *f, int spaces)
{
    static const struct { const char *text; float score; } list[] = {
        { " ", -9 }, { "a", -1 }, { "b", -2 }, { "c", -3 }, { "\xC3\xA9", -4 },
        { "bc", -5 }, { "ab", -6 }, { "abc", -7 }, { " a", -8 }, { "aa", -7 },
        { "aab", -7.5f }, { "bc", 0 }, { "c a", 1 },
    };
    char byte[8];
    memset(f, 0, sizeof *f);
    f->n = 4;
    piece_put(f, "<unk>", 0);
    piece_put(f, "\n<s>\n", 0);
    piece_put(f, "\n</s>\n", 0);
    for (unsigned i = 0; i < 256; i++) {
        snprintf(byte, sizeof byte, "<0x%02X>", i);
        piece_put(f, byte, 0);
    }
    for (int i = 0; i < 12 + spaces; i++) piece_put(f, list[i].text, list[i].score);
}

static dlm_tokenizer *piece_tokenizer(dlm_ctx *ctx, const piece_file *f)
{
    dlm_tokenizer *t = NULL;
    CHECK_OK(dlm_tokenizer_create(&t, ctx, DLM_TOKENIZER_PIECES, f->x, f->n));
    if (!t) { printf("no tokenizer: %s\n", dlm_last_error(ctx)); exit(1); }
    return t;
}

TEST(pieces_merge_the_best_score_first_and_fall_back_to_bytes)
{
    static const struct { const char *text; int spaces, n, ids[8]; } cases[] = {
        { "", 0, 0, { 0 } },
        { "abc", 0, 2, { 259, 266 } },         /* bc, then abc; never " a"         */
        { "ab", 0, 2, { 259, 265 } },
        { "a", 0, 1, { 267 } },
        { "aa", 0, 2, { 259, 268 } },
        { "aaa", 0, 3, { 259, 268, 260 } },    /* leftmost of equals               */
        { "aab", 0, 2, { 259, 269 } },         /* ab is better than aa             */
        { "b a a", 0, 4, { 259, 261, 267, 267 } },
        { "\xC3\xA9x\xFF", 0, 4, { 259, 263, 3 + 'x', 3 + 0xFF } },
        { "\xE2\x82\xAC", 0, 4, { 259, 3 + 0xE2, 3 + 0x82, 3 + 0xAC } },
        { "<0x41>", 0, 7, { 259, 3 + '<', 3 + '0', 3 + 'x', 3 + '4', 3 + '1', 3 + '>' } },
        { "c a", 0, 3, { 259, 262, 267 } },
        { "c a", 1, 2, { 259, 271 } },
        { "bc a", 1, 3, { 259, 264, 267 } },   /* bc is the better start           */
    };
    static piece_file f;
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        piece_make(&f, cases[i].spaces);
        dlm_tokenizer *t = piece_tokenizer(ctx, &f);
        int ids[16], few[2] = { -1, -1 };
        size_t n = 99, k = 99;
        LABEL("\"%s\"", cases[i].text);
        CHECK(t->vocab == f.count && t->mask == f.count);
        CHECK(t->stop == 1);
        CHECK_OK(dlm_encode(t, cases[i].text, strlen(cases[i].text), ids, 16, &n));
        CHECK((int)n == cases[i].n);
        CHECK(!memcmp(ids, cases[i].ids, (size_t)cases[i].n * sizeof *ids));
        CHECK_OK(dlm_encode(t, cases[i].text, strlen(cases[i].text), few, 1, &k));
        CHECK(k == n && few[1] == -1);
        dlm_tokenizer_free(t);
    }
    test_close(ctx);
}

TEST(pieces_round_trip_any_bytes)
{
    static const char letters[] = "aabbcc   \xC3\xA9\xE2\x82\xAC\xFF" "x<\n";
    static piece_file f;
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int i = 0; i < 400; i++) {
        char text[700], back[800];
        int ids[800], special[5] = { 1, 260, 1, -1, 0 }, length = i < 300 ? i % 12 : 700;
        size_t n = 0;
        piece_make(&f, i & 1);
        dlm_tokenizer *t = piece_tokenizer(ctx, &f);
        for (int j = 0; j < length; j++)
            text[j] = i % 8 == 7 ? 'b' : i % 8 == 6 ? letters[9 + j % 2]
                : letters[test_below(sizeof letters - 1)];
        LABEL("text %d of %d bytes, \"%.12s\"", i, length, length ? text : "");
        CHECK_OK(dlm_encode(t, text, (size_t)length, ids, 800, &n));
        if (length == 700 && i % 8 == 6) CHECK(n == 351);   /* whole characters    */
        size_t m = dlm_decode(t, ids, n, back, sizeof back);
        CHECK(m == (size_t)length && !memcmp(text, back, (size_t)length) && !back[m]);
        CHECK(dlm_decode(t, ids, n, NULL, 0) == m);
        special[4] = f.count;                   /* stops vanish, strangers are _    */
        CHECK(dlm_decode(t, special, 5, back, sizeof back) == 3 && !strcmp(back, "a__"));
        dlm_tokenizer_free(t);
    }
    test_close(ctx);
}

/* Texts behind each other, as a trainer gets them: encoding puts a space in front of
   each, and the stop says where that was (llama2.c drops it behind every BOS). */
TEST(pieces_decode_each_of_several_texts_as_one)
{
    static const struct { int n, ids[9]; const char *text; } cases[] = {
        { 5, { 1, 267, 1, 267, 1 }, "aa" },             /* <s> " a" <s> " a" <s>     */
        { 5, { 267, 267, 1, 267, 267 }, "a aa a" },
        { 4, { 1, 1, 259, 260 }, "a" },                 /* <s> <s> " " "a"           */
        { 5, { 1, 259, 259, 267, 1 }, "  a" },          /* one of them is dropped    */
        { 5, { 260, 1, 260, 267, 260 }, "aa aa" },      /* "a" <s> "a" " a" "a"      */
        { 4, { 1, -1, 267, 267 }, "_ a a" },            /* a mask begins the text    */
        { 2, { 1, 267 }, "a" }, { 1, { 1 }, "" }, { 1, { 259 }, "" },
    };
    static piece_file f;
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    piece_make(&f, 0);
    dlm_tokenizer *t = piece_tokenizer(ctx, &f);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char out[32];
        const size_t n = dlm_decode(t, cases[i].ids, (size_t)cases[i].n, out, sizeof out);
        LABEL("case %d: \"%s\", want \"%s\"", (int)i, out, cases[i].text);
        CHECK(!strcmp(out, cases[i].text) && n == strlen(out));
    }
    int ids[64];
    size_t n = 0, all = 0;
    for (int i = 0; i < 3; i++, all += n) {
        ids[all++] = t->stop;
        CHECK_OK(dlm_encode(t, " b aa", i ? 5 : 4, ids + all, 64 - all, &n));
    }
    char out[32];
    LABEL("three texts");
    CHECK(dlm_decode(t, ids, all, out, sizeof out) == 14);
    CHECK(!strcmp(out, " b a b aa b aa"));
    dlm_tokenizer_free(t);
    test_close(ctx);
}

/* n > max drops the rest and says how much there is; a failure counts up to it. */
TEST(encode_says_how_many_tokens_there_are)
{
    static piece_file f;
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    piece_make(&f, 0);
    for (int kind = 0; kind < 3; kind++) {
        const char *corpus = kind == DLM_TOKENIZER_PIECES ? f.x : "abc";
        dlm_tokenizer *t = NULL;
        int all[8], some[8];
        size_t n = 0, k;
        CHECK_OK(dlm_tokenizer_create(&t, ctx, (dlm_tokenizer_kind)kind, corpus,
                                      kind == DLM_TOKENIZER_PIECES ? f.n : 3));
        if (t) CHECK_OK(dlm_encode(t, "cacab", 5, all, 8, &n));
        for (size_t max = 0; t && max <= n; max++) {
            for (int i = 0; i < 8; i++) some[i] = -7;
            LABEL("kind %d, %u of %u", kind, (unsigned)max, (unsigned)n);
            CHECK_OK(dlm_encode(t, "cacab", 5, some, max, &k));
            CHECK(k == n && !memcmp(some, all, max * sizeof *all) && some[max] == -7);
            CHECK_OK(dlm_encode(t, "cacab", 5, NULL, max, &k));
            CHECK(k == n);
        }
        if (t && kind == DLM_TOKENIZER_CHARS) {
            CHECK_ERROR(dlm_encode(t, "cab\xC3\xA9" "a", 6, some, 2, &k), DLM_E_INPUT,
                        ctx, "U+00E9");
            CHECK(k == 3 && some[0] == all[0]);
            CHECK_ERROR(dlm_encode(t, "c\xFF", 2, some, 2, &k), DLM_E_INPUT, ctx,
                        "byte 1");
            CHECK(k == 1);
        }
        dlm_tokenizer_free(t);
    }
    test_close(ctx);
}

TEST(pieces_refuse_malformed_files)
{
    static piece_file f;
    test_heap heap = {0};
    dlm_ctx *ctx = heap_open(&heap, 1);
    const int live = heap.live;
    piece_make(&f, 1);
    for (size_t n = 0; n <= f.n; n++) {
        dlm_tokenizer *t = NULL;
        char *part = (char *)test_malloc(n);
        size_t tokens;
        int whole = 0;
        for (int i = 2; i < f.count; i++) if (f.end[i] == n) whole = i + 1;
        memcpy(part, f.x, n);
        LABEL("%u of %u bytes", (unsigned)n, (unsigned)f.n);
        CHECK_ERROR(dlm_tokenizer_create(&t, ctx, DLM_TOKENIZER_PIECES, part, n),
                    whole ? DLM_OK : DLM_E_FORMAT, ctx, whole ? NULL : "tokenizer");
        CHECK((t != NULL) == (whole > 0));
        if (t) CHECK(t->vocab == whole);
        if (t) CHECK_ERROR(dlm_encode(t, "a", 1, NULL, 0, &tokens),
                           whole < 259 ? DLM_E_INPUT : DLM_OK, ctx, NULL);
        dlm_tokenizer_free(t); free(part);
    }
    for (int i = 0; i < 5; i++) {
        static const int32_t bad[5] = { -1, 2147483647, -2147483647 - 1, 6, 0x7FC00000 };
        dlm_tokenizer *t = NULL;
        piece_make(&f, 1);
        memcpy(f.x + (i == 4 ? 4 : 8), &bad[i], 4);         /* a length; a score    */
        LABEL("%d", (int)bad[i]);
        CHECK_ERROR(dlm_tokenizer_create(&t, ctx, DLM_TOKENIZER_PIECES, f.x, f.n),
                    DLM_E_FORMAT, ctx, "tokenizer");
        CHECK(t == NULL);
    }
    LABEL("empty pieces are pieces");
    piece_make(&f, 0);
    piece_put(&f, "", 0);
    piece_put(&f, "b a", 2);
    dlm_tokenizer *t = piece_tokenizer(ctx, &f);
    const int last[2] = { f.count - 2, f.count - 1 };
    char out[8];
    CHECK(t->vocab == f.count && t->lexicon->pieces.spaces == 1);
    CHECK(dlm_decode(t, last, 2, out, sizeof out) == 3 && !strcmp(out, "b a"));
    dlm_tokenizer_free(t);
    piece_make(&f, 1);
    t = NULL;
    heap.fail_at = heap.calls + 1;
    CHECK(dlm_tokenizer_create(&t, ctx, DLM_TOKENIZER_PIECES, f.x, f.n) == DLM_E_NOMEM);
    CHECK(t == NULL && heap.live == live);
    test_close(ctx);
}

#ifndef DLM_NO_STDIO

TEST(pieces_ride_along_in_a_checkpoint)
{
    const char *path = "dlm_test_pieces.st", *text = "abc a b\xC3\xA9 aaab \xFF";
    static piece_file f;
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int extra = -1; extra < 2; extra++) { /* too few ids, as many, with a mask */
        dlm_model *m = NULL, *loaded = NULL;
        dlm_tokenizer *back = NULL;
        piece_make(&f, 1);
        dlm_tokenizer *t = piece_tokenizer(ctx, &f);
        dlm_config c = toy_config(extra > 0 ? 2 : 4);
        int a[64], b[64];
        size_t n = 0, k = 0;
        c.vocab = f.count + extra;
        LABEL("extra %d", extra);
        CHECK_OK(dlm_model_create(&m, ctx, &c, 1, NULL));
        dlm_error e = m ? dlm_save(ctx, path, m, t) : DLM_E_NOMEM;
        if (e == DLM_OK) e = dlm_load(&loaded, &back, ctx, path);
        CHECK(e == (extra < 0 ? DLM_E_MISMATCH : DLM_OK));
        CHECK((back != NULL) == (extra >= 0));
        CHECK_OK(dlm_encode(t, text, strlen(text), a, 64, &n));
        if (back) CHECK_OK(dlm_encode(back, text, strlen(text), b, 64, &k));
        if (back) CHECK(n == k && !memcmp(a, b, n * sizeof *a));
        if (back) CHECK(back->vocab == f.count);
        dlm_tokenizer_free(back); dlm_model_free(loaded); dlm_model_free(m);
        dlm_tokenizer_free(t);
    }
    remove(path);
    test_close(ctx);
}

/* A file of the released model, from the repository's root or below it. */
static const char *golden_path(const char *name)
{
    static char path[128];
    static const char *const roots[] = { "../", "", "../../" };
    for (int i = 0; i < 3; i++) {
        snprintf(path, sizeof path, "%sshared/data/stories260K/%s", roots[i], name);
        FILE *in = fopen(path, "rb");
        if (in) fclose(in);
        if (in) return path;
    }
    return NULL;
}

/* The author's text for temperature 0 is that of 200 steps from BOS. */
TEST(llama2c_released_model_writes_the_published_text)
{
    enum { T = 201 };
    static int canvas[T], ids[T];
    static char text[4096];
    dlm_ctx *ctx = NULL;
    dlm_model *m = NULL;
    dlm_tokenizer *tok = NULL;
    size_t n = 0;
    if (!golden_path("greedy.txt")) SKIP("no stories260K beside the repository");
    test_file want = file_read(golden_path("greedy.txt"));
    ctx = test_open(DLM_ISA_AUTO, 1);
    CHECK_OK(dlm_load(&m, NULL, ctx, golden_path("stories260K.bin")));
    CHECK_OK(dlm_tokenizer_load(&tok, ctx, DLM_TOKENIZER_PIECES,
                                golden_path("tok512.bin")));
    if (m && tok) {
        CHECK(m->config.vocab == tok->vocab);
        for (int i = 0; i < T; i++) canvas[i] = i ? m->config.mask_id : 1;
        CHECK_OK(dlm_sample(ctx, m, canvas, T, NULL));
        size_t size = dlm_decode(tok, canvas, T, text, sizeof text);
        CHECK(size == want.size);
        CHECK(size >= want.size && !memcmp(text, want.data, want.size));
        CHECK_OK(dlm_encode(tok, (const char *)want.data, want.size, ids, T, &n));
        CHECK(n == T - 1 && !memcmp(ids, canvas + 1, (T - 1) * sizeof *ids));
    }
    dlm_model *none = m;
    CHECK_ERROR(dlm_load(&none, NULL, ctx, "no such"), DLM_E_IO, ctx, "no such");
    CHECK(none == NULL);
    dlm_tokenizer_free(tok); dlm_model_free(m); free(want.data);
    test_close(ctx);
}

/* What rounding costs where it matters: nats per token of the published text. */
TEST(llama2c_released_model_scores_its_text_in_every_precision)
{
    enum { T = 201 };
    static const struct { dlm_dtype type; double most; } cases[] = {
        { DLM_F32, 0 }, { DLM_BF16, 0.02 }, { DLM_I8, 0.05 } };
    static int ids[T];
    double nats[3] = { 0, 0, 0 };
    if (!golden_path("greedy.txt")) SKIP("no stories260K beside the repository");
    test_file text = file_read(golden_path("greedy.txt"));
    for (int i = 0; i < 3; i++) {
        dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
        dlm_model *m = NULL;
        dlm_tokenizer *tok = NULL;
        size_t n = 0;
        CHECK_OK(dlm_load(&m, NULL, ctx, golden_path("stories260K.bin")));
        CHECK_OK(dlm_tokenizer_load(&tok, ctx, DLM_TOKENIZER_PIECES,
                                    golden_path("tok512.bin")));
        if (m && tok) {
            ids[0] = 1;                              /* beginning of text          */
            CHECK_OK(dlm_encode(tok, (const char *)text.data, text.size, ids + 1, T - 1,
                                &n));
            dlm_model *packed = test_packed(ctx, m, test_type(cases[i].type));
            dlm_session *s = test_session(ctx, packed, 1, T, T, 0);
            CHECK_OK(dlm_log_likelihood(s, ids, T, 1, 1, 1, &nats[i]));
            dlm_session_free(s);
            dlm_model_free(packed);
        }
        LABEL("type %d: %.4f nats a token", (int)cases[i].type, -nats[i] / (T - 1));
        CHECK(nats[i] < 0);
        CHECK_CLOSE(nats[i] / (T - 1), nats[0] / (T - 1), cases[i].most);
        dlm_tokenizer_free(tok); dlm_model_free(m);
        test_close(ctx);
    }
    free(text.data);
}

/* ==[ folders ]==============================================================
   Models as others publish them.  bench/oracle/ has folders written by another program;
   here they are written by hand, tensor by tensor. */

#include "examples/save_folder.h"

static const char *const folder_files[] = {
    "config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json",
    "a.safetensors", "b.safetensors", "generation_config.json"
};
enum { FOLDER_FILES = sizeof folder_files / sizeof *folder_files };

static void folder_put(const char *folder, const char *name, const void *data,
                       size_t size)
{
    char path[256];
    (void)save_folder_make(folder);
    snprintf(path, sizeof path, "%s/%s", folder, name);
    file_write(path, data, size);
}

static void folder_text(const char *folder, const char *name, const char *text)
{
    folder_put(folder, name, text, strlen(text));
}

static test_file folder_get(const char *folder, const char *name)
{
    char path[256];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    return file_read(path);
}

static void folder_remove(const char *folder)
{
    char path[256];
    for (int i = 0; i < FOLDER_FILES; i++) {
        snprintf(path, sizeof path, "%s/%s", folder, folder_files[i]);
        remove(path);
    }
    remove(folder);
}

/* Some tensors as the bytes of a safetensors file, in f32. */
typedef struct folder_writer {
    char   header[16384];
    float *data;
    size_t length, n;
} folder_writer;

static void writer_open(folder_writer *w)
{
    w->length = (size_t)snprintf(w->header, sizeof w->header, "{\"__metadata__\":null");
    w->data = test_floats(1 << 18);
    w->n = 0;
}

/* cols 0: a vector. */
static float *writer_add(folder_writer *w, const char *name, int rows, int cols)
{
    const size_t n = (size_t)rows * (size_t)(cols ? cols : 1);
    char shape[32];
    float *at = w->data + w->n;
    if (cols) snprintf(shape, sizeof shape, "%d,%d", rows, cols);
    else snprintf(shape, sizeof shape, "%d", rows);
    w->length += (size_t)snprintf(w->header + w->length, sizeof w->header - w->length,
        ",\"%s\":{\"dtype\":\"F32\",\"shape\":[%s],\"data_offsets\":[%u,%u]}", name,
        shape,        (unsigned)(w->n * 4), (unsigned)((w->n + n) * 4));
    w->n += n;
    CHECK(w->n <= 1 << 18 && w->length < sizeof w->header);
    return at;
}

static void writer_close(folder_writer *w, const char *folder, const char *name)
{
    test_file f;
    w->header[w->length++] = '}';
    f = file_make(w->header, w->length, w->data, w->n * 4);
    folder_put(folder, name, f.data, f.size);
    free(f.data);
    free(w->data);
}

/* The model's tensors by their own names: all, or every second one from `which` on. */
static void writer_add_model(folder_writer *w, const dlm_model *m, int which, int step)
{
    for (int i = which; i < dlm_model_tensors(m); i += step) {
        dlm_tensor t;
        dlm_model_tensor(m, i, &t);
        memcpy(writer_add(w, t.name, t.rows, t.cols > 1 ? t.cols : 0), t.data,
               (size_t)t.rows * (size_t)t.cols * sizeof(float));
    }
}

static dlm_config folder_config(int kind)
{
    dlm_config c = test_config(40, 24, 2, 4, 32);
    c.kv_heads = 2;
    c.head_dim = 10;                        /* 2 * 10: no whole number of panels   */
    c.ffn = 36;
    c.mask_id = 7;
    c.pattern = (dlm_pattern)(kind % 3);
    c.block = c.pattern == DLM_PATTERN_BLOCK ? 4 : 0;
    c.shifted = kind / 3 % 2;
    c.qkv_bias = kind / 6 % 2;
    c.no_qk_norm = kind / 12 % 2;
    c.untied_head = kind % 2;
    c.gelu_mlp = kind / 24 == 2;
    c.head_bias = kind / 24 > 0;
    return c;
}
enum { FOLDER_KINDS = 72 };

static void folder_same_files(const char *one, const char *two)
{
    for (int i = 0; i < FOLDER_FILES; i++) {
        test_file a = folder_get(one, folder_files[i]), b = folder_get(two,
                                                                     folder_files[i]);
        CHECK((a.data == NULL) == (b.data == NULL));
        if (a.data && b.data) CHECK(file_equal(&a, &b));
        free(a.data);
        free(b.data);
    }
}

/* Every config comes back, in f32 with every bit; a second save is the first. */
TEST(folders_come_back_as_they_were_saved)
{
    char why[256];
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 2);
    for (int kind = 0; kind < FOLDER_KINDS; kind++) {
        const dlm_config c = folder_config(kind);
        dlm_model *m = test_model(ctx, &c), *back = NULL;
        LABEL("kind %d", kind);
        if (c.head_bias) {
            dlm_tensor bias;
            dlm_model_tensor(m, dlm_model_tensors(m) - 1, &bias);
            CHECK(strcmp(bias.name, "lm_head.bias") == 0);
            bias.data[7] = -INFINITY;
        }
        CHECK_OK(save_folder(ctx, "dlm_test_one", m, NULL, why, sizeof why));
        CHECK_OK(dlm_open(&back, NULL, ctx, "dlm_test_one", NULL));
        if (back) {
            CHECK(memcmp(&back->config, &m->config, sizeof m->config) == 0);
            CHECK(!memcmp(back->weights, m->weights, m->n_params * sizeof(float)));
            CHECK_OK(save_folder(ctx, "dlm_test_two", back, NULL, why, sizeof why));
            folder_same_files("dlm_test_one", "dlm_test_two");
        }
        dlm_model_free(m);
        dlm_model_free(back);
        folder_remove("dlm_test_one");
        folder_remove("dlm_test_two");
    }
    test_close(ctx);
}

/* What is packed from a file is what is packed from the model. */
TEST(folders_open_in_every_type)
{
    char why[256];
    static const dlm_dtype types[] = { DLM_F32, DLM_BF16, DLM_I8 };
    NEEDS_NARROW_WORDS();
    FOR_EACH_ISA(isa) for (int kind = 0; kind < FOLDER_KINDS; kind += 23) {
        const dlm_config c = folder_config(kind);
        dlm_ctx *ctx = test_open(isa, 2);
        if (ctx == NULL) continue;
        dlm_model *m = test_model(ctx, &c);
        test_batch t;
        batch_clear(&t);
        batch_add(&t, 20, c.vocab, (int)c.pattern, c.block, 0);
        const dlm_batch *b = batch_close(&t, 1);
        CHECK_OK(save_folder(ctx, "dlm_test_one", m, NULL, why, sizeof why));
        for (int k = 0; k < 3; k++) {
            dlm_open_options how = {0};
            dlm_model *opened = NULL;
            LABEL("kind %d, type %d", kind, (int)types[k]);
            how.type = types[k];
            how.packed = 1;
            CHECK_OK(dlm_open(&opened, NULL, ctx, "dlm_test_one", &how));
            if (!opened) continue;
            float *want = test_logits_in(ctx, m, b, types[k]);
            float *got = test_logits_as_is(ctx, opened, b);
            CHECK(opened->packed && opened->type == types[k]);
            CHECK(memcmp(got, want, (size_t)(b->n_out * c.vocab) * sizeof *got) == 0);
            free(want);
            free(got);
            dlm_model_free(opened);
        }
        dlm_model_free(m);
        folder_remove("dlm_test_one");
        test_close(ctx);
    }
}

/* Our name, and LLaDA's and SMDM's, after the prefix of a layer. */
static const char *const folder_names[][3] = {
    { "model.embed_tokens.weight", "model.transformer.wte.weight",
      "transformer.wte.weight" },
    { "model.norm.weight", "model.transformer.ln_f.weight", "transformer.ln_f.weight" },
    { "lm_head.weight", "model.transformer.ff_out.weight", "lm_head.weight" },
    { "input_layernorm.weight", "attn_norm.weight", "norm_1.weight" },
    { "post_attention_layernorm.weight", "ff_norm.weight", "norm_2.weight" },
    { "self_attn.q_proj.weight", "q_proj.weight", NULL },
    { "self_attn.k_proj.weight", "k_proj.weight", NULL },
    { "self_attn.v_proj.weight", "v_proj.weight", NULL },
    { "self_attn.o_proj.weight", "attn_out.weight", "attn.proj.weight" },
    { "mlp.gate_proj.weight", "ff_proj.weight", "mlp.swiglu.w1.weight" },
    { "mlp.up_proj.weight", "up_proj.weight", "mlp.swiglu.w2.weight" },
    { "mlp.down_proj.weight", "ff_out.weight", "mlp.swiglu.w3.weight" },
};

/* The name of a tensor there; NULL: it is in SMDM's fused one. */
static const char *folder_rename(const dlm_tensor *t, int smdm, char out[128])
{
    const char *tail = t->name;
    size_t i = 0;
    for (int dots = 0; t->layer >= 0 && dots < 3; tail++) dots += *tail == '.';
    while (strcmp(folder_names[i][0], tail) != 0) i++;
    if (folder_names[i][1 + smdm] == NULL) return NULL;
    if (t->layer < 0) snprintf(out, 128, "%s", folder_names[i][1 + smdm]);
    else snprintf(out, 128, smdm ? "transformer.h.%d.%s"
                                 : "model.transformer.blocks.%d.%s",
                  t->layer, folder_names[i][1 + smdm]);
    return out;
}

/* For each key head its queries, its key, its value. */
static void folder_fuse(folder_writer *w, const dlm_model *m, int layer)
{
    const dlm_config *c = &m->config;
    const size_t head = (size_t)c->head_dim * (size_t)c->dim;
    const int per = c->heads / c->kv_heads;
    const dlm__layer p = dlm__layer_at(c, m->weights, layer);
    char name[64];
    float *to;
    snprintf(name, sizeof name, "transformer.h.%d.attn.attn.weight", layer);
    to = writer_add(w, name, (c->heads + 2 * c->kv_heads) * c->head_dim, c->dim);
    for (int g = 0; g < c->kv_heads; g++) {
        memcpy(to, p.wq + (size_t)(g * per) * head, (size_t)per * head * sizeof *to);
        memcpy(to + (size_t)per * head, p.wk + (size_t)g * head, head * sizeof *to);
        memcpy(to + (size_t)(per + 1) * head, p.wv + (size_t)g * head, head * sizeof *to);
        to += (size_t)(per + 2) * head;
    }
}

/* A model of LLaDA's or SMDM's form under their names opens with the same weights; SMDM's
   mask has no row in the head, and no probability. */
TEST(folders_of_llada_and_smdm_are_ours_renamed)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int smdm = 0; smdm < 2; smdm++) {
        dlm_config c = test_config(41, 24, 2, 4, 2048);
        folder_writer w;
        dlm_open_options how = {0};
        dlm_model *m, *got = NULL;
        LABEL("smdm %d", smdm);
        c.kv_heads = smdm ? 4 : 2; c.ffn = 36; c.norm_eps = 1e-5f;
        c.pattern = DLM_PATTERN_FULL; c.untied_head = 1; c.no_qk_norm = 1;
        c.mask_id = smdm ? 40 : 39;
        c.head_bias = smdm;
        m = test_model(ctx, &c);
        writer_open(&w);
        for (int i = 0; i < dlm_model_tensors(m); i++) {
            char name[128];
            dlm_tensor t;
            dlm_model_tensor(m, i, &t);
            const int short_head = smdm && strcmp(t.name, "lm_head.weight") == 0;
            if (smdm && strcmp(t.name, "lm_head.bias") == 0) {
                memset(t.data, 0, 41 * sizeof *t.data);
                t.data[40] = -INFINITY;
                continue;
            }
            if (short_head) memset(t.data + 40 * t.cols, 0, (size_t)t.cols * 4);
            if (!folder_rename(&t, smdm, name)) continue;
            memcpy(writer_add(&w, name, t.rows - short_head, t.cols > 1 ? t.cols : 0),
                   t.data, (size_t)((t.rows - short_head) * t.cols) * sizeof(float));
        }
        for (int l = 0; smdm && l < c.layers; l++) folder_fuse(&w, m, l);
        writer_close(&w, "dlm_test_one", "model.safetensors");
        if (!smdm) folder_text("dlm_test_one", "config.json",
            "{\"model_type\": \"llada\", \"d_model\": 24, \"n_heads\": 4, "
            "\"n_kv_heads\": 2, \"n_layers\": 2, \"mlp_hidden_size\": 36, "
            "\"max_sequence_length\": 2048, \"vocab_size\": 41, \"rope\": true, "
            "\"weight_tying\": false, \"mask_token_id\": 39, \"alibi\": false, "
            "\"block_type\": \"llama\", \"layer_norm_type\": \"rms\"}");
        how.family = smdm ? "smdm" : NULL;
        how.heads = smdm ? 4 : 0;
        CHECK_OK(dlm_open(&got, NULL, ctx, smdm ? "dlm_test_one/model.safetensors"
                                                : "dlm_test_one", &how));
        if (got) {
            CHECK(memcmp(&got->config, &m->config, sizeof m->config) == 0);
            CHECK(got->n_params == m->n_params
                  && !memcmp(got->weights, m->weights, m->n_params * sizeof(float)));
        }
        dlm_model_free(m);
        dlm_model_free(got);
        folder_remove("dlm_test_one");
    }
    test_close(ctx);
}

static const char folder_base[] = "\"model_type\": \"a2d-qwen3\", \"hidden_size\": 16, "
    "\"num_hidden_layers\": 1, \"num_attention_heads\": 2, \"num_key_value_heads\": 1, "
    "\"head_dim\": 8, \"intermediate_size\": 24, \"vocab_size\": 20, "
    "\"max_position_embeddings\": 16, \"tie_word_embeddings\": true";

/* A folder of that config with more keys behind it; the model of its weights. */
static dlm_model *folder_small(dlm_ctx *ctx, const char *more)
{
    char text[2048];
    folder_writer w;
    dlm_config c = test_config(20, 16, 1, 2, 16);
    dlm_model *m;
    c.kv_heads = 1; c.head_dim = 8; c.ffn = 24; c.pattern = DLM_PATTERN_FULL;
    m = test_model(ctx, &c);
    writer_open(&w);
    writer_add_model(&w, m, 0, 1);
    writer_close(&w, "dlm_test_one", "model.safetensors");
    snprintf(text, sizeof text, "{%s%s}", folder_base, more);
    folder_text("dlm_test_one", "config.json", text);
    return m;
}

static void folder_try(dlm_ctx *ctx, const char *more, dlm_error want, const char *word)
{
    dlm_model *got = NULL, *m = folder_small(ctx, more);
    LABEL("%.100s", more);
    CHECK_ERROR(dlm_open(&got, NULL, ctx, "dlm_test_one", NULL), want, ctx, word);
    CHECK(got == NULL);
    dlm_model_free(m);
    dlm_model_free(got);
}

TEST(folders_refuse_by_name_what_is_not_built_here)
{
    static const char *const refused[][2] = {
        { ", \"rope_scaling\": {\"rope_type\": \"yarn\", \"factor\": 4}", "yarn" },
        { ", \"rope_scaling\": {\"type\": \"linear\", \"factor\": 4}", "linear" },
        { ", \"rope_parameters\": {\"rope_type\": \"llama3\"}", "llama3" },
        { ", \"use_sliding_window\": true", "use_sliding_window" },
        { ", \"partial_rotary_factor\": 0.5", "partial_rotary_factor" },
        { ", \"hidden_act\": \"gelu\"", "hidden_act" },
        { ", \"num_experts\": 8", "num_experts" },
        { ", \"quantization_config\": {\"bits\": 4}", "quantization_config" },
        { ", \"time_conditioning\": true", "time_conditioning" },
    };
    static const char *const wrong[][2] = {
        { "", "mask_id" },
        { ", \"mask_token_id\": 3, \"mask_token_id\": 3", "twice" },
        { ", \"mask_token_id\": \"three\"", "mask_token_id" },
        { ", \"d_model\": 17, \"mask_token_id\": 3", "d_model" },
        { ", \"mask_token_id\": 20", "mask_id" },
        { ", \"mask_token_id\": 3, \"n_layers\": 1,", "malformed" },
        { ", \"mask_token_id\": 3} {", "malformed" },
        { ", \"mask_token_id\": 3, \"attention_bias\": true", "q_proj.bias" },
    };
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_model *got = NULL;
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++)
        folder_try(ctx, refused[i][0], DLM_E_UNSUPPORTED, refused[i][1]);
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        const dlm_error want = i == 0 || i == 4 ? DLM_E_CONFIG
            : i == 7 ? DLM_E_MISMATCH : DLM_E_FORMAT;
        folder_try(ctx, wrong[i][0], want, wrong[i][1]);
    }
    folder_text("dlm_test_one", "config.json", "{\"model_type\": \"mixtral\"}");
    CHECK_ERROR(dlm_open(&got, NULL, ctx, "dlm_test_one", NULL), DLM_E_UNSUPPORTED, ctx,
                "mixtral");
    remove("dlm_test_one/config.json");
    CHECK_ERROR(dlm_open(&got, NULL, ctx, "dlm_test_one", NULL), DLM_E_IO, ctx,
                "config.json");
    folder_remove("dlm_test_one");
    CHECK_ERROR(dlm_open(&got, NULL, ctx, "dlm_test_one", NULL), DLM_E_IO, ctx,
                "dlm_test_one");
    test_close(ctx);
}

/* The caller's words go before the config's; what they say is what dlm_describe says. */
TEST(folders_are_read_as_the_caller_wants)
{
    static char text[4096];
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_model *m = folder_small(ctx, ", \"mask_token_id\": 3, \"block_size\": 2, "
                                "\"rope_parameters\": {\"rope_theta\": 500.5}, "
                                "\"rms_norm_eps\": 1e-05"), *got = NULL;
    dlm_open_options how = {0};
    CHECK_OK(dlm_open(&got, NULL, ctx, "dlm_test_one", &how));
    if (got) {
        CHECK(got->config.mask_id == 3 && got->config.pattern == DLM_PATTERN_BLOCK);
        CHECK(got->config.block == 2 && !got->config.shifted);
        CHECK(got->config.rope_theta == 500.5f && got->config.norm_eps == 1e-5f);
        dlm_describe(got, text, sizeof text);
        CHECK(strstr(text, "a2d-qwen3") && strstr(text, "config.json: mask_token_id"));
        CHECK(strstr(text, "F32 in 1 file") && strstr(text, "tied"));
    }
    dlm_model_free(got);
    how.mask_id = 5; how.block = -1; how.shifted = 1; how.max_seq = 8;
    CHECK_OK(dlm_open(&got, NULL, ctx, "dlm_test_one", &how));
    if (got) {
        CHECK(got->config.mask_id == 5 && got->config.pattern == DLM_PATTERN_FULL);
        CHECK(got->config.shifted && got->config.max_seq == 8);
        dlm_describe(got, text, sizeof text);
        CHECK(strstr(text, "dlm_open_options") != NULL);
    }
    dlm_model_free(got);
    how.family = "qwen3"; how.block = 0; how.shifted = 0; how.mask_id = 0;
    CHECK_OK(dlm_open(&got, NULL, ctx, "dlm_test_one", &how));
    if (got) CHECK(got->config.pattern == DLM_PATTERN_CAUSAL && got->config.shifted);
    dlm_model_free(got);
    dlm_model_free(m);
    folder_remove("dlm_test_one");
    test_close(ctx);
}

/* Two files with an index are one model; a tensor in both, a file that is none, and one
   that lies elsewhere are named. */
TEST(folders_of_several_files_are_read_by_their_index)
{
    char why[256];
    static const char *const index[][2] = {
        { "{\"metadata\": {}, \"weight_map\": {\"x\": \"a.safetensors\", \"y\": "
          "\"b.safetensors\", \"z\": \"a.safetensors\"}}", "" },
        { "{\"weight_map\": {\"x\": \"a.safetensors\"}}", "missing" },
        { "{\"weight_map\": {\"x\": \"a.safetensors\", \"y\": \"model.safetensors\"}}",
          "is in a.safetensors and in model.safetensors" },
        { "{\"weight_map\": {\"x\": \"model.safetensors.index.json\"}}",
          "model.safetensors.index.json" },
        { "{\"weight_map\": {\"x\": \"../dlm_test_one/a.safetensors\"}}", "../dlm_test" },
        { "{\"weight_map\": {\"x\": \"c.safetensors\"}}", "c.safetensors" },
        { "{\"weight_map\": 3}", "malformed" },
        { "{}", "weight_map" },
    };
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_model *m = folder_small(ctx, ", \"mask_token_id\": 19");
    folder_writer w;
    for (int i = 0; i < 2; i++) {
        writer_open(&w);
        writer_add_model(&w, m, i, 2);
        writer_close(&w, "dlm_test_one", i ? "b.safetensors" : "a.safetensors");
    }
    for (size_t i = 0; i < sizeof index / sizeof *index; i++) {
        dlm_model *got = NULL;
        LABEL("index %d", (int)i);
        folder_text("dlm_test_one", "model.safetensors.index.json", index[i][0]);
        if (i == 0) CHECK_OK(dlm_open(&got, NULL, ctx, "dlm_test_one", NULL));
        else {
            dlm_error e = dlm_open(&got, NULL, ctx, "dlm_test_one", NULL);
            CHECK(e != DLM_OK && got == NULL
                  && strstr(dlm_last_error(ctx), index[i][1]) != NULL);
        }
        if (got) CHECK(!memcmp(got->weights, m->weights, m->n_params * sizeof(float)));
        dlm_model_free(got);
    }
    CHECK(save_folder(ctx, "dlm_test_one", m, NULL, why, sizeof why) == DLM_E_IO
          && strstr(why, "index"));
    dlm_model_free(m);
    folder_remove("dlm_test_one");
    test_close(ctx);
}

/* Cut anywhere, or with any byte changed, a config or an index gives an error that begins
   with the folder, or a model; nothing is read beyond its end, nothing stays. */
TEST(folders_survive_every_changed_byte)
{
    static const char *const names[] = { "config.json", "model.safetensors.index.json" };
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_model *m = folder_small(ctx, ", \"mask_token_id\": 3, \"x\": [1, {\"y\": null}]");
    folder_writer w;
    writer_open(&w);
    writer_add_model(&w, m, 0, 1);
    writer_close(&w, "dlm_test_one", "a.safetensors");
    folder_text("dlm_test_one", names[1], "{\"weight_map\": {\"x\": \"a.safetensors\"}}");
    for (int k = 0; k < 2; k++) {
        test_file f = folder_get("dlm_test_one", names[k]);
        unsigned char *edited = (unsigned char *)test_malloc(f.size);
        for (size_t i = 0; i < 2 * f.size; i++) {
            const size_t at = i / 2;
            dlm_model *got = NULL;
            LABEL("%s, byte %d, %s", names[k], (int)at, i % 2 ? "changed" : "the end");
            memcpy(edited, f.data, f.size);
            edited[at] = (unsigned char)(edited[at] ^ (1 + test_below(255)));
            folder_put("dlm_test_one", names[k], edited, i % 2 ? f.size : at);
            if (dlm_open(&got, NULL, ctx, "dlm_test_one", NULL) != DLM_OK)
                CHECK(got == NULL && !strncmp(dlm_last_error(ctx), "dlm_test_one", 12));
            if (i % 2 == 0 && at > 0) CHECK(got == NULL);
            dlm_model_free(got);
        }
        folder_put("dlm_test_one", names[k], f.data, f.size);
        free(edited);
        free(f.data);
    }
    dlm_model_free(m);
    folder_remove("dlm_test_one");
    test_close(ctx);
}

/* No memory, at any allocation: an error, and nothing stays allocated. */
TEST(folders_without_memory_leave_nothing)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1), *poor = NULL;
    dlm_model *m = folder_small(ctx, ", \"mask_token_id\": 3"), *got = NULL;
    dlm_error e = DLM_E_NOMEM;
    for (int allowed = 1; e != DLM_OK && allowed < 100; allowed++) {
        test_heap heap = {0};
        dlm_options o = {0};
        o.allocator.alloc = test_heap_alloc;
        o.allocator.release = test_heap_release;
        o.allocator.user = &heap;
        CHECK_OK(dlm_init(&poor, &o));
        heap.fail_at = heap.calls + allowed;
        e = dlm_open(&got, NULL, poor, "dlm_test_one", NULL);
        CHECK((e == DLM_OK) == (got != NULL));
        dlm_model_free(got);
        dlm_shutdown(poor);
        CHECK(heap.live == 0);
    }
    CHECK_OK(e);
    dlm_model_free(m);
    folder_remove("dlm_test_one");
    test_close(ctx);
}

/* The tiny model's greedy continuation is that of the program that published it; a folder
   of a released model without its weights is read up to the file that is missing. */
TEST(folders_of_released_models_are_read)
{
    static const int want[] = { 1, 2, 76, 112, 63, 76 };
    char path[128];
    int canvas[6] = { 1, 2, 256, 256, 256, 256 };
    dlm_model *m = NULL;
    if (!golden_path("greedy.txt")) SKIP("no data beside the repository");
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    snprintf(path, sizeof path, "%s", golden_path("greedy.txt"));
    char *end = strstr(path, "stories260K/");
    snprintf(end, sizeof path - (size_t)(end - path), "tiny_qwen3");
    CHECK_OK(dlm_open(&m, NULL, ctx, path, NULL));
    if (m) {
        CHECK(m->config.mask_id == 256 && m->config.pattern == DLM_PATTERN_CAUSAL);
        CHECK_OK(dlm_sample(ctx, m, canvas, 6, NULL));
        CHECK(memcmp(canvas, want, sizeof want) == 0);
    }
    dlm_model_free(m);
    snprintf(end, sizeof path - (size_t)(end - path), "tiny_qwen3_tied");
    CHECK_ERROR(dlm_open(&m, NULL, ctx, path, NULL), DLM_E_UNSUPPORTED, ctx,
                "quantization");
    snprintf(end, sizeof path - (size_t)(end - path), "qwen3");
    CHECK_ERROR(dlm_open(&m, NULL, ctx, path, NULL), DLM_E_IO, ctx, "model-0000");
    test_close(ctx);
}

#endif

/* ==[ json tokenizers ]===================================================== */

/* A tokenizer.json of some parts; added, normalizer and so on as the file has them. */
static char *json_file(const char *added, const char *pipeline, const char *model)
{
    static char text[1 << 16];
    snprintf(text, sizeof text, "{\"version\":\"1.0\",\"truncation\":null,"
             "\"added_tokens\":[%s],%s,\"model\":{\"type\":\"BPE\",%s}}", added,
             pipeline, model);
    return text;
}

static dlm_tokenizer *json_tokenizer(dlm_ctx *ctx, const char *text)
{
    dlm_tokenizer *t = NULL;
    CHECK_OK(dlm_tokenizer_create(&t, ctx, DLM_TOKENIZER_JSON, text, strlen(text)));
    if (!t) { printf("no tokenizer: %s\n", dlm_last_error(ctx)); exit(1); }
    return t;
}

/* ids of a text, as "1 2 3". */
static const char *json_ids(const dlm_tokenizer *t, const char *text, size_t size)
{
    static char line[8192];
    static int ids[2048];
    size_t n = 0, k = 0;
    CHECK_OK(dlm_encode(t, text, size, ids, 2048, &n));
    line[0] = '\0';
    for (size_t i = 0; i < n && i < 2048 && k < sizeof line - 16; i++)
        k += (size_t)sprintf(line + k, i ? " %d" : "%d", ids[i]);
    return line;
}

/* The character that GPT-2 writes for a byte: itself if it prints, else the next from
   U+0100 on. */
static uint32_t json_byte(unsigned byte)
{
    uint32_t next = 256;
    for (unsigned b = 0; b <= byte; b++) {
        const int prints = (b > 32 && b < 127) || (b > 160 && b != 173);
        if (b == byte) return prints ? b : next;
        next += !prints;
    }
    return 0;
}

/* "vocab" of all bytes, id = byte, then of `more`, and the rest of a model. */
static const char *json_model(const char *more, const char *rest)
{
    static char text[1 << 14];
    size_t n = (size_t)sprintf(text, "\"vocab\":{");
    for (unsigned b = 0; b < 256; b++) {
        n += (size_t)sprintf(text + n, b ? ",\"" : "\"");
        if (b == '"' || b == '\\') text[n++] = '\\';
        n += dlm__utf8_put(text + n, json_byte(b));
        n += (size_t)sprintf(text + n, "\":%u", b);
    }
    sprintf(text + n, "%s},%s", more, rest);
    return text;
}

/* Of every beginning of a text the whole characters are shown, and bytes that begin none;
   never more than three bytes wait. */
TEST(whole_text_never_ends_within_a_character)
{
    static const char text[] = "a\xC3\xB6\xE2\x82\xAC\xF0\x9F\x98\x80z";
    static const size_t whole[] = { 0, 1, 1, 3, 3, 3, 6, 6, 6, 6, 10, 11 };
    static const char *const broken[] = {
        "\x80", "\xC0", "\xC1", "\xF5", "\xFF", "a\x80\x80\x80\x80"
    };
    for (size_t n = 0; n < sizeof whole / sizeof *whole; n++) {
        LABEL("%d bytes", (int)n);
        CHECK(dlm_whole_text(text, n) == whole[n]);
    }
    for (size_t i = 0; i < sizeof broken / sizeof *broken; i++) {
        LABEL("broken %d", (int)i);
        CHECK(dlm_whole_text(broken[i], strlen(broken[i])) == strlen(broken[i]));
    }
    CHECK(dlm_whole_text("a\xE2\x82", 3) == 1 && dlm_whole_text("\xF0\x9F\x98", 3) == 0);
}

#define JSON_GPT2 "\"pre_tokenizer\":{\"type\":\"ByteLevel\"," \
    "\"add_prefix_space\":false,\"trim_offsets\":true}," \
    "\"decoder\":{\"type\":\"ByteLevel\"}"

/* 256 ab, 257 bc, 258 abc, 259 " a", 260 "aa", 261 "aab". */
#define JSON_MORE ",\"ab\":256,\"bc\":257,\"abc\":258,\"\\u0120a\":259," \
    "\"aa\":260,\"aab\":261"

TEST(json_merges_come_as_strings_or_as_pairs)
{
    static const char *const merges[] = {
        "\"merges\":[\"b c\",\"a bc\",\"a a\",\"\\u0120 a\",\"a b\",\"aa b\"]",
        "\"merges\":[[\"b\",\"c\"],[\"a\",\"bc\"],[\"a\",\"a\"],[\"\\u0120\",\"a\"],"
            "[\"a\",\"b\"],[\"aa\",\"b\"]]"
    };
    static const struct { const char *text, *ids; } cases[] = {
        { "", "" }, { "abc", "258" }, { "ab", "256" }, { "aab", "261" },
        { "aaa", "260 97" },
        { "aaaa", "260 260" }, { "a abc", "97 32 258" }, { "a a", "97 259" },
        { "\n\xFF", "10 255" }, { "abcb", "258 98" }
    };
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int k = 0; k < 2; k++) {
        const char *model = json_model(JSON_MORE, merges[k]);
        dlm_tokenizer *t = json_tokenizer(ctx, json_file("", JSON_GPT2, model));
        CHECK(t->vocab == 262 && t->stop == -1 && t->mask == -1);
        for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
            LABEL("merges %d, \"%s\"", k, cases[i].text);
            const char *ids = json_ids(t, cases[i].text, strlen(cases[i].text));
            CHECK(strcmp(ids, cases[i].ids) == 0);
        }
        dlm_tokenizer_free(t);
    }
    test_close(ctx);
}

#ifndef DLM_NO_STDIO

/* Texts, one line between each two, and a line of ids for each: both ways. */
static void json_golden(const dlm_tokenizer *t, const char *texts, const char *lines)
{
    static const char between[] = "\n__ggml_vocab_test__\n";
    test_file in = file_read(golden_path(texts)), want = file_read(golden_path(lines));
    const size_t gap = sizeof between - 1;
    int count = 0;
    char *id = (char *)want.data;
    want.data[want.size - 1] = '\0';
    for (size_t from = 0, to; from < in.size; from = to + gap, count++) {
        const char *text = (const char *)in.data + from;
        char line[8192] = "", back[2048];
        int ids[1024], n = 0;
        for (to = from; to < in.size && (in.size - to < gap
             || memcmp(in.data + to, between, gap)); to++) { }
        while (*id == ' ') id++;
        for (; *id && *id != '\n'; n++, id += *id == ' ')
            ids[n] = (int)strtol(id, &id, 10);
        for (int i = 0; i < n; i++)
            sprintf(line + strlen(line), i ? " %d" : "%d", ids[i]);
        LABEL("text %d: %.40s", count, text);
        CHECK(strcmp(json_ids(t, text, to - from), line) == 0);
        CHECK(dlm_decode(t, ids, (size_t)n, back, sizeof back) == to - from);
        CHECK(!memcmp(back, text, to - from));
        id += *id == '\n';
    }
    CHECK(count == 46);
    free(in.data); free(want.data);
}

TEST(json_gpt2_encodes_the_golden_texts)
{
    dlm_tokenizer *t = NULL;
    if (!golden_path("../gpt2/tokenizer.json")) SKIP("no GPT-2 beside the repository");
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    CHECK_OK(dlm_tokenizer_load(&t, ctx, DLM_TOKENIZER_JSON,
                                golden_path("../gpt2/tokenizer.json")));
    if (t) {
        CHECK(t->vocab == 50257 && t->stop == 50256 && t->mask == -1 && !t->mask_from);
        CHECK(dlm_tokenizer_id(t, "<|endoftext|>") == 50256);
        CHECK(dlm_tokenizer_id(t, " the") == 262);
        CHECK(dlm_tokenizer_id(t, "no such token") == -1);
        json_golden(t, "../golden_gpt-2.inp", "../golden_gpt-2.out");
    }
    dlm_tokenizer_free(t);
    test_close(ctx);
}

/* A folder's files, NULL: not there; its tokenizer, or NULL after an error. */
static dlm_tokenizer *json_folder(dlm_ctx *ctx, const char *const text[6])
{
    static const char *const names[] = {
        "tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json",
        "special_tokens_map.json", "added_tokens.json"
    };
    dlm_tokenizer *t = NULL;
    for (int k = 0; k < 6; k++)
        if (text[k]) file_write(names[k], text[k], strlen(text[k]));
    if (dlm_tokenizer_open(&t, ctx, ".") != DLM_OK) t = NULL;
    for (int k = 0; k < 6; k++) if (text[k]) remove(names[k]);
    return t;
}

TEST(json_folders_say_what_their_files_say)
{
    static const char merges[] = "#version: 0.2\r\n# #\n# \"\n";
    static const char config[] = "{\"tokenizer_class\":\"GPT2TokenizerFast\","
        "\"eos_token\":{\"content\":\"<e>\"},\"mask_token\":\"<m>\","
        "\"added_tokens_decoder\":{\"6\":{\"content\":\"<m>\",\"special\":true},"
        "\"5\":{\"content\":\"<e>\"}}}";
    static const char vocab[] = "{\"#\":0,\"##\":1,\"a\":2,\"\\\"\":3,\"#\\\"\":4}";
    static const char json[] = "{" JSON_GPT2 ",\"added_tokens\":[{\"id\":5,\"content\":"
        "\"<e>\"},{\"id\":6,\"content\":\"<other>\"}],\"model\":{\"vocab\":{\"a\":0},"
        "\"merges\":[]}}";
    const char *old[6] = { NULL, vocab, merges, config, NULL, NULL };
    const char *now[6] = { json, NULL, NULL, config, NULL, NULL };
    const char *gpt2 = "{\"tokenizer_class\":\"GPT2Tokenizer\"}";
    const char *added[6] = { NULL, vocab, merges, gpt2,
                             "{\"mask_token\":\"<m>\"}", "{\"<m>\":7}" };
    const char *bad[6] = { NULL, vocab, merges, "{\"tokenizer_class\":\"T5Tokenizer\"}",
                           NULL, "{\"<m>\":7}" };
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_tokenizer *t = json_folder(ctx, old);
    CHECK(t && t->stop == 5 && t->mask == 6 && t->vocab == 7);
    if (t) CHECK(strcmp(json_ids(t, "###\"a<m>#", 9), "1 4 2 6 0") == 0);
    dlm_tokenizer_free(t);
    t = json_folder(ctx, now);                  /* the config wins on 6             */
    CHECK(t && t->stop == 5 && t->mask == 6 && t->vocab == 7 && t->mask_from);
    dlm_tokenizer_free(t);
    t = json_folder(ctx, added);
    CHECK(t && t->stop == -1 && t->mask == 7 && dlm_tokenizer_id(t, "<m>") == 7);
    dlm_tokenizer_free(t);
    CHECK(json_folder(ctx, bad) == NULL);
    CHECK(strstr(dlm_last_error(ctx), "T5Tokenizer") != NULL);
    bad[3] = gpt2;
    bad[5] = "{\"<m>\":7,}";
    CHECK(json_folder(ctx, bad) == NULL);
    bad[1] = NULL;
    CHECK(json_folder(ctx, bad) == NULL);
    CHECK(strstr(dlm_last_error(ctx), "tokenizer.bin") != NULL);
    test_close(ctx);
}

TEST(json_qwen3_folder_encodes_the_golden_texts)
{
    dlm_tokenizer *t = NULL, *again = NULL;
    if (!golden_path("../qwen3/vocab.json")) SKIP("no Qwen3 beside the repository");
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    CHECK_OK(dlm_tokenizer_open(&t, ctx, golden_path("../qwen3")));
    if (t) {
        CHECK(t->vocab == 151670 && t->mask == 151669);    /* its files disagree    */
        CHECK(dlm_tokenizer_id(t, "<|MASK|>") == 151669);
        CHECK(dlm_tokenizer_id(t, "<MASK>") == -1);
        CHECK(strcmp(t->mask_from, "tokenizer_config.json: mask_token") == 0);
        CHECK(dlm_tokenizer_id(t, "<|im_end|>") == 151645);
        json_golden(t, "../golden_qwen2.inp", "../golden_qwen2.out");
        CHECK_OK(dlm_tokenizer_create(&again, ctx, DLM_TOKENIZER_JSON, t->text, t->size));
    }
    if (again) {
        CHECK(again->mask == 151669 && again->mask_from && again->vocab == t->vocab);
        json_golden(again, "../golden_qwen2.inp", "../golden_qwen2.out");
    }
    dlm_tokenizer_free(again);
    dlm_tokenizer_free(t);
    test_close(ctx);
}

#endif

#define JSON_SPLIT(regex) "\"normalizer\":{\"type\":\"NFC\"}," \
    "\"pre_tokenizer\":{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":" \
    "\"Split\",\"pattern\":{\"Regex\":\"" regex "\"},\"behavior\":" \
    "\"Isolated\",\"invert\":false},{\"type\":\"ByteLevel\"," \
    "\"add_prefix_space\":false,\"trim_offsets\":true,\"use_regex\":false}]}," \
    "\"decoder\":{\"type\":\"ByteLevel\"}"
#define JSON_QWEN(numerals) "(?i:'s|'t|'re|'ve|'m|'ll|'d)|" \
    "[^\\\\r\\\\n\\\\p{L}\\\\p{N}]?\\\\p{L}+|" numerals \
    "| ?[^\\\\s\\\\p{L}\\\\p{N}]+[\\\\r\\\\n]*|\\\\s*[\\\\r\\\\n]+|\\\\s+(?!\\\\S)|\\\\s+"
#define JSON_SMOL "\"pre_tokenizer\":{\"type\":\"Sequence\"," \
    "\"pretokenizers\":[{\"type\":\"Digits\",\"individual_digits\":true}," \
    "{\"type\":\"ByteLevel\"," \
    "\"add_prefix_space\":false,\"trim_offsets\":true,\"use_regex\":true}]}," \
    "\"decoder\":{\"type\":\"ByteLevel\"}"

TEST(json_patterns_cut_texts_into_words)
{
    static const char *const patterns[] = {
        JSON_GPT2, JSON_SMOL, JSON_SPLIT(JSON_QWEN("\\\\p{N}")),
        JSON_SPLIT(JSON_QWEN("\\\\p{N}{1,3}"))
    };
    static const struct { const char *text; int k; const char *words; } cases[] = {
        { "It's we'LL, don't", 0, "It|'s| we|'|LL|,| don|'t" },
        { "It's we'LL, don't", 2, "It|'s| we|'LL|,| don|'t" },
        { "a  b\n\n c12345 67", 0, "a| | b|\n\n| c|12345| 67" },
        { "a  b\n\n c12345 67", 1, "a| | b|\n\n| c|1|2|3|4|5| |6|7" },
        { "a  b\n\n c12345 67", 2, "a| | b|\n\n| c|1|2|3|4|5| |6|7" },
        { "a  b\n\n c12345 67", 3, "a| | b|\n\n| c|123|45| |67" },
        { "x?!\n\ny (z)  ", 0, "x|?!|\n|\n|y| (|z|)|  " },
        { "x?!\n\ny (z)  ", 2, "x|?!\n\n|y| (|z|)|  " },
        { "$a\tb \xC2\xA0" "c", 3, "$a|\tb| |\xC2\xA0" "c" },
        { "$a\tb \xC2\xA0" "c", 0, "$|a|\t|b| |\xC2\xA0|c" },
        { "\xC3\xA9t\xC3\xA9 \xE4\xB8\xAD\xC2\xB2 \xCC\x81", 2,
          "\xC3\xA9t\xC3\xA9| \xE4\xB8\xAD|\xC2\xB2| \xCC\x81" },
        { "a\xFF\xFE" "b", 0, "a|\xFF\xFE|b" }
    };
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const char *text = cases[i].text, *model = json_model("", "\"merges\":[]");
        const char *file = json_file("", patterns[cases[i].k], model);
        dlm_tokenizer *t = json_tokenizer(ctx, file);
        const size_t size = strlen(text);
        char words[128] = "";
        for (size_t at = 0, end; at < size; at = end) {
            end = dlm__word_end(t->lexicon, text, size, at);
            sprintf(words + strlen(words), at ? "|%.*s" : "%.*s", (int)(end - at),
                    text + at);
        }
        LABEL("pattern %d: %s", cases[i].k, words);
        CHECK(strcmp(words, cases[i].words) == 0);
        dlm_tokenizer_free(t);
    }
    test_close(ctx);
}

TEST(json_added_tokens_come_first)
{
    static const char added[] = "{\"id\":262,\"content\":\"<s>\",\"special\":true},"
        "{\"id\":263,\"content\":\"<s>>\",\"special\":false,\"normalized\":true},"
        "{\"id\":264,\"content\":\"<|mask|>\",\"special\":true,\"lstrip\":false}";
    static const int ids[] = { 262, 97, 263, 264, 98, 900, 265 };
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    const char *model = json_model(JSON_MORE, "\"merges\":[\"a b\"]");
    dlm_tokenizer *t = json_tokenizer(ctx, json_file(added, JSON_GPT2, model));
    char out[32];
    CHECK(t->vocab == 265 && t->mask == 264 && t->stop == -1);
    CHECK(strcmp(t->mask_from, "added token <|mask|>") == 0);
    CHECK(strcmp(json_ids(t, "<s>>a<s>b<s", 11), "263 97 262 98 60 115") == 0);
    CHECK(strcmp(json_ids(t, "ab<|mask|>ab", 12), "256 264 256") == 0);
    CHECK(dlm_tokenizer_id(t, "<s>") == 262 && dlm_tokenizer_id(t, "ab") == 256);
    CHECK(dlm_decode(t, ids, 7, out, sizeof out) == 9 && !strcmp(out, "a<s>>_b__"));
    dlm_tokenizer_free(t);
    test_close(ctx);
}

/* 0 <unk>, 1 <s>, 2 </s>, 3 .. 258 bytes, 259 U+2581, 260 a, 261 b, 262 ab, 263 U+2581
   and a. */
static const char *json_llama(const char *bytes)
{
    static char text[8192];
    size_t n = (size_t)sprintf(text, "\"unk_token\":\"<unk>\",\"fuse_unk\":true,"
                               "\"byte_fallback\":%s,\"vocab\":{\"<unk>\":0,\"<s>\":1,"
                               "\"</s>\":2,", bytes);
    for (int b = 0; b < 256; b++)
        n += (size_t)sprintf(text + n, "\"<0x%02X>\":%d,", (unsigned)b, 3 + b);
    sprintf(text + n, "\"\\u2581\":259,\"a\":260,\"b\":261,\"ab\":262,\"\\u2581a\":263},"
            "\"merges\":[\"a b\",\"\\u2581 a\"]");
    return text;
}

#define JSON_LLAMA "\"normalizer\":{\"type\":\"Sequence\",\"normalizers\":[" \
    "{\"type\":\"Prepend\",\"prepend\":\"\\u2581\"},{\"type\":\"Replace\"," \
    "\"pattern\":{\"String\":\" \"},\"content\":\"\\u2581\"}]},\"pre_tokenizer\":null," \
    "\"decoder\":{\"type\":\"Sequence\",\"decoders\":[{\"type\":\"Replace\"," \
    "\"pattern\":{\"String\":\"\\u2581\"},\"content\":\" \"}," \
    "{\"type\":\"ByteFallback\"},{\"type\":\"Fuse\"}," \
    "{\"type\":\"Strip\",\"content\":\" \",\"start\":1,\"stop\":0}]}"

TEST(json_reads_the_bpe_of_sentencepiece)
{
    static const char added[] = "{\"id\":1,\"content\":\"<s>\",\"special\":true}";
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    const char *file = json_file(added, JSON_LLAMA, json_llama("true"));
    dlm_tokenizer *t = json_tokenizer(ctx, file);
    int ids[64];
    char out[64];
    size_t n;
    CHECK(t->vocab == 264 && t->stop == 2 && dlm_tokenizer_id(t, " a") == 263);
    CHECK(strcmp(json_ids(t, "ab a", 4), "259 262 263") == 0);
    CHECK(strcmp(json_ids(t, "", 0), "") == 0);
    CHECK(strcmp(json_ids(t, "a<s>a", 5), "263 1 263") == 0);
    CHECK(strcmp(json_ids(t, " \xE2\x96\x81" "a\n\xFF", 7), "259 259 263 13 258") == 0);
    CHECK_OK(dlm_encode(t, "b \xE2\x82\xAC\xFF ab", 9, ids, 64, &n));
    CHECK(dlm_decode(t, ids, n, out, sizeof out) == 9);
    CHECK(!strcmp(out, "b \xE2\x82\xAC\xFF ab"));
    dlm_tokenizer_free(t);
    t = NULL;
    file = json_file(added, JSON_LLAMA, json_llama("false"));
    CHECK_ERROR(dlm_tokenizer_create(&t, ctx, DLM_TOKENIZER_JSON, file, strlen(file)),
                DLM_E_UNSUPPORTED, ctx, "not all bytes");
    test_close(ctx);
}

/* A vocabulary of random merges of a, b, c; rank k makes the id 256 + k. */
static int json_random_merges(char *more, char *merges, int pairs[][2])
{
    char pieces[24][64] = { "a", "b", "c" };
    int n = 3, m = 0;
    strcpy(merges, "\"merges\":[");
    more[0] = '\0';
    for (int tries = 0; tries < 40 && m < 20; tries++) {
        const int a = (int)test_below(n), b = (int)test_below(n);
        char both[128];
        int same = 0;
        sprintf(both, "%s%s", pieces[a], pieces[b]);
        for (int i = 0; i < n; i++) same |= !strcmp(pieces[i], both);
        if (same || strlen(both) > 60) continue;
        sprintf(merges + strlen(merges), m ? ",\"%s %s\"" : "\"%s %s\"", pieces[a],
                pieces[b]);
        sprintf(more + strlen(more), ",\"%s\":%d", both, 256 + m);
        pairs[m][0] = a < 3 ? 'a' + a : 253 + a;
        pairs[m++][1] = b < 3 ? 'a' + b : 253 + b;
        strcpy(pieces[n++], both);
    }
    strcat(merges, "]");
    return m;
}

TEST(json_merges_as_the_naive_way_does)
{
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int round = 0; round < 200; round++) {
        static char more[4096], merges[4096];
        char text[200];
        int pairs[20][2], ids[200], got[200], n = 1 + (int)test_below(200);
        const int m = json_random_merges(more, merges, pairs);
        const char *model = json_model(more, merges);
        dlm_tokenizer *t = json_tokenizer(ctx, json_file("", JSON_GPT2, model));
        size_t size = (size_t)n, found;
        for (int i = 0; i < n; i++) ids[i] = text[i] = (char)('a' + test_below(3));
        CHECK_OK(dlm_encode(t, text, size, got, 200, &found));
        for (int k = 0, i; k < m; k = i < n - 1 ? 0 : k + 1) {  /* best rank, leftmost */
            for (i = 0; i < n - 1 && (ids[i] != pairs[k][0]
                                      || ids[i + 1] != pairs[k][1]);) i++;
            if (i >= n - 1) continue;
            ids[i] = 256 + k;
            memmove(ids + i + 1, ids + i + 2, (size_t)(n-- - i - 2) * sizeof *ids);
            i = 0;
            if (n == 1) break;
        }
        LABEL("round %d, %.*s", round, (int)size, text);
        CHECK((int)found == n && !memcmp(ids, got, (size_t)n * sizeof *ids));
        dlm_tokenizer_free(t);
    }
    test_close(ctx);
}

TEST(json_encodes_any_bytes_and_long_words)
{
    enum { LONG = 1 << 20 };
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    const char *model = json_model(JSON_MORE, "\"merges\":[\"b c\",\"a a\",\"\\u0120 a\","
                                   "\"a b\",\"aa b\"]");
    dlm_tokenizer *t = json_tokenizer(ctx, json_file("", JSON_GPT2, model));
    char *text = (char *)test_malloc(LONG), *back = (char *)test_malloc(LONG + 1);
    int *ids = (int *)test_malloc(LONG * sizeof *ids);
    size_t n, m;
    for (int round = 0; round < 50; round++) {
        for (int i = 0; i < 1000; i++) text[i] = (char)test_below(256);
        CHECK_OK(dlm_encode(t, text, 1000, ids, LONG, &n));
        m = dlm_decode(t, ids, n, back, LONG);
        CHECK(m == 1000 && !memcmp(text, back, m));
    }
    memset(text, 'a', LONG);
    CHECK_OK(dlm_encode(t, text, LONG, ids, LONG, &n));
    CHECK(n == LONG / 2 && ids[0] == 260 && ids[n - 1] == 260);
    CHECK(dlm_decode(t, ids, n, back, LONG + 1) == LONG && !memcmp(text, back, LONG));
    free(text); free(back); free(ids);
    dlm_tokenizer_free(t);
    test_close(ctx);
}

TEST(json_refuses_what_it_does_not_do)
{
    static const struct { const char *added, *pipeline, *model, *words; } cases[] = {
        { "", JSON_GPT2, "\"vocab\":{\"a\":0}", "no model" },
        { "", JSON_GPT2, "\"dropout\":0.1,\"vocab\":{},\"merges\":[]", "dropout" },
        { "", JSON_GPT2, "\"dropout\":0.05,\"vocab\":{},\"merges\":[]", "dropout" },
        { "", JSON_GPT2, "\"end_of_word_suffix\":\"</w>\",\"vocab\":{},\"merges\":[]",
          "end_of_word_suffix" },
        { "", JSON_GPT2, "\"fuse_unk\":true,\"vocab\":{},\"merges\":[]", "fuse_unk" },
        { "", JSON_SPLIT("x+"), "\"vocab\":{},\"merges\":[]", "Split x+" },
        { "", "\"pre_tokenizer\":{\"type\":\"Metaspace\",\"replacement\":\"_\"}",
          "\"vocab\":{},\"merges\":[]", "Metaspace _" },
        { "", "\"pre_tokenizer\":{\"type\":\"ByteLevel\",\"add_prefix_space\":true},"
          "\"decoder\":{\"type\":\"ByteLevel\"}", "\"vocab\":{},\"merges\":[]",
          "add_prefix_space" },
        { "{\"id\":0,\"content\":\"x\",\"single_word\":true}", JSON_GPT2,
          "\"vocab\":{},\"merges\":[]", "single_word" },
        { "{\"id\":0,\"content\":\"x\",\"lstrip\":true}", JSON_GPT2,
          "\"vocab\":{},\"merges\":[]", "lstrip" },
        { "{\"id\":0,\"content\":\"x\"}", JSON_GPT2, "\"vocab\":{\"a\":0},\"merges\":[]",
          "added_tokens: an id given twice" },
        { "", JSON_GPT2, "\"vocab\":{\"a\":0,\"b\":0},\"merges\":[]",
          "vocab: an id given twice" },
        { "", JSON_GPT2, "\"vocab\":{\"a\":0,\"a\":1},\"merges\":[]",
          "vocab: a piece given twice" },
        { "", JSON_GPT2, "\"vocab\":{\"a\":99999},\"merges\":[]", "beyond" },
        { "", JSON_GPT2, "\"vocab\":{\"a\":0},\"merges\":[\"a b\"]", "no piece" },
        { "", JSON_GPT2, "\"vocab\":{\"a\":0},\"merges\":[\"a a\"]", "to no piece" },
        { "", JSON_GPT2, "\"vocab\":{\"a\":0,\"aa\":1},\"merges\":[\"a a\",\"a a\"]",
          "merge given twice" },
        { "", JSON_GPT2, "\"vocab\":{\"a\":0},\"merges\":[\"aa\"]", "merges: malformed" },
        { "", JSON_GPT2, "\"vocab\":{\"a\":-1},\"merges\":[]", "vocab: malformed" }
    };
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const char *text = json_file(cases[i].added, cases[i].pipeline, cases[i].model);
        dlm_tokenizer *t = NULL;
        const dlm_error e = dlm_tokenizer_create(&t, ctx, DLM_TOKENIZER_JSON, text,
                                                 strlen(text));
        LABEL("%s", cases[i].words);
        CHECK(e == DLM_E_UNSUPPORTED || e == DLM_E_FORMAT);
        CHECK(t == NULL && strstr(dlm_last_error(ctx), cases[i].words) != NULL);
    }
    test_close(ctx);
}

TEST(json_survives_malformed_files)
{
    static const char model[] = "\"vocab\":{\"a\":0,\"b\":1,\"ab\":2,\"\\u0120a\":3,"
        "\"\\u0120\":4},\"merges\":[\"a b\",[\"\\u0120\",\"a\"]],\"unk_token\":\"a\"";
    test_heap heap = {0};
    dlm_ctx *ctx = heap_open(&heap, 1);
    const int live = heap.live;
    const char *whole = json_file("{\"id\":5,\"content\":\"<s>\"}", JSON_GPT2, model);
    const size_t size = strlen(whole);
    for (size_t i = 0; i < 9 * size; i++) {     /* cut there; or a bit is another   */
        const size_t at = i % size, n = i < size ? at : size;
        char *part = (char *)test_malloc(n + 1);
        dlm_tokenizer *t = NULL;
        int ids[64];
        size_t found;
        memcpy(part, whole, n);
        if (i >= size) part[at] = (char)(part[at] ^ 1 << (i / size - 1));
        char *exact = (char *)test_malloc(n ? n : 1);
        memcpy(exact, part, n);
        const dlm_error e = dlm_tokenizer_create(&t, ctx, DLM_TOKENIZER_JSON, exact, n);
        LABEL("byte %u, round %u", (unsigned)at, (unsigned)(i / size));
        CHECK((e == DLM_OK) == (t != NULL));
        CHECK(i >= size || e == DLM_E_FORMAT);
        if (t) dlm_encode(t, "ab <s> a", 8, ids, 64, &found);
        dlm_tokenizer_free(t);
        free(part); free(exact);
        CHECK(heap.live == live);
    }
    for (int k = 1; k <= 2; k++) {              /* no memory for it; for a word     */
        dlm_tokenizer *t = NULL;
        size_t found;
        heap.fail_at = heap.calls + k;
        CHECK(dlm_tokenizer_create(&t, ctx, DLM_TOKENIZER_JSON, whole, size)
              == (k == 1 ? DLM_E_NOMEM : DLM_OK));
        if (t) CHECK_ERROR(dlm_encode(t, "ab", 2, NULL, 0, &found), DLM_E_NOMEM, ctx,
                           "a word");
        dlm_tokenizer_free(t);
    }
    dlm_shutdown(ctx);
}

/* --[ trained vocabularies ]-------------------------------------------------- */

#include "examples/train_bpe.h"

enum { NAIVE_WORDS = 600, NAIVE_VOCAB = 400 };

/* Words of few letters, the first without a space, as ids of bytes with -1 at the end. */
static size_t naive_words(char *text, int words[NAIVE_WORDS][16], int letters)
{
    size_t size = 0;
    for (int i = 0; i < NAIVE_WORDS; i++) {
        const int length = 1 + test_below(9);
        int n = 0;
        if (i > 0) text[size++] = ' ';
        if (i > 0) words[i][n++] = 220;            /* 188 print, then come 0 .. 32  */
        for (int k = 0; k < length; k++) {
            const int letter = test_below(1 + test_below(letters));
            text[size++] = (char)('a' + letter);
            words[i][n++] = 'a' - '!' + letter;
        }
        words[i][n] = -1;
    }
    return size;
}

/* The pair that occurs most often, of equals the smallest; 0: none occurs twice. */
static int naive_best(int words[NAIVE_WORDS][16], int best[2])
{
    static int count[NAIVE_VOCAB][NAIVE_VOCAB];
    int most = 1;
    memset(count, 0, sizeof count);
    for (int i = 0; i < NAIVE_WORDS; i++)
        for (const int *w = words[i]; w[0] >= 0 && w[1] >= 0; w++) count[w[0]][w[1]]++;
    for (int a = 0; a < NAIVE_VOCAB; a++)
        for (int b = 0; b < NAIVE_VOCAB; b++) {
            if (count[a][b] <= most) continue;
            most = count[a][b];
            best[0] = a;
            best[1] = b;
        }
    return most > 1;
}

static void naive_merge(int word[16], const int pair[2], int id)
{
    for (int i = 0; word[i] >= 0; i++)
        if (word[i] == pair[0] && word[i + 1] == pair[1]) {
            word[i] = id;
            memmove(word + i + 1, word + i + 2, (size_t)(14 - i) * sizeof *word);
        }
}

TEST(training_merges_what_a_count_of_all_pairs_finds)
{
    static int words[NAIVE_WORDS][16];
    static char text[NAIVE_WORDS * 16];
    char why[256];
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    for (int letters = 1; letters < 8; letters += 2) {
        const size_t size = naive_words(text, words, letters);
        dlm_tokenizer *t = NULL;
        int k = 0, pair[2];
        CHECK_OK(train_bpe(&t, ctx, NAIVE_VOCAB, text, size, why, sizeof why));
        if (!t) break;
        for (; k < NAIVE_VOCAB - 258 && naive_best(words, pair); k++) {
            const int n = t->lexicon->merges.n;
            LABEL("%d letters, merge %d of %d", letters, k, n);
            CHECK(k < n);
            if (k >= n) break;
            CHECK(t->lexicon->pairs[2 * k] == pair[0]);
            CHECK(t->lexicon->pairs[2 * k + 1] == pair[1]);
            for (int i = 0; i < NAIVE_WORDS; i++) naive_merge(words[i], pair, 256 + k);
        }
        CHECK(k == t->lexicon->merges.n && t->vocab == 258 + k);    /* none is left */
        CHECK((k < NAIVE_VOCAB - 258) == (letters == 1));
        CHECK(t->stop == 256 + k && t->mask == 257 + k);
        dlm_tokenizer_free(t);
    }
    test_close(ctx);
}

#ifndef DLM_NO_STDIO
/* Saved and opened again, alone and in a checkpoint: the same text, the same ids. */
TEST(trained_tokenizers_are_saved_as_they_are)
{
    const char *paths[2] = { "dlm_test_bpe.json", "dlm_test_bpe.st" };
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_config c = toy_config(2);
    dlm_model *m = NULL, *loaded = NULL;
    dlm_tokenizer *t = NULL, *back[2] = { NULL, NULL };
    static char text[4096];
    char why[256];
    size_t size = 0;
    while (size < 4000)
        size += (size_t)sprintf(text + size, "say \"%d\\\", \xC3\xA9\n ", 7);
    CHECK_OK(train_bpe(&t, ctx, 280, text, size, why, sizeof why));
    if (!t) return;
    c.vocab = t->vocab;
    CHECK_OK(dlm_model_create(&m, ctx, &c, 1, NULL));
    file_write(paths[0], t->text, t->size);
    CHECK_OK(dlm_tokenizer_load(&back[0], ctx, DLM_TOKENIZER_JSON, paths[0]));
    if (m) CHECK_OK(dlm_save(ctx, paths[1], m, t));
    CHECK_OK(dlm_load(&loaded, &back[1], ctx, paths[1]));
    for (int i = 0; i < 2 && back[i]; i++) {
        char bytes[300], out[320];
        int ids[2][300];
        size_t n[2];
        CHECK(back[i]->size == t->size && !memcmp(back[i]->text, t->text, t->size));
        CHECK(back[i]->stop == t->stop && back[i]->mask == t->mask);
        CHECK(dlm_tokenizer_id(back[i], "<|mask|>") == t->vocab - 1);
        for (int k = 0; k < 300; k++)
            bytes[k] = k < 150 ? text[k] : (char)test_below(256);
        CHECK_OK(dlm_encode(t, bytes, 300, ids[0], 300, &n[0]));
        CHECK_OK(dlm_encode(back[i], bytes, 300, ids[1], 300, &n[1]));
        CHECK(n[0] < 220 && n[0] == n[1] && !memcmp(ids[0], ids[1], n[0] * sizeof(int)));
        CHECK(dlm_decode(back[i], ids[1], n[1], out, sizeof out) == 300);
        CHECK(!memcmp(out, bytes, 300));
    }
    for (int i = 0; i < 2; i++) dlm_tokenizer_free(back[i]);
    for (int i = 0; i < 2; i++) remove(paths[i]);
    dlm_model_free(loaded); dlm_model_free(m); dlm_tokenizer_free(t);
    test_close(ctx);
}
#endif

/* On ASCII the words are those of the tokenizer that comes of it. */
TEST(training_knows_the_words_of_gpt2)
{
    static const char some[] = "'stremvldlSD  \n\t\v\r0129.,!\x7F\x1C";
    dlm_ctx *ctx = test_open(DLM_ISA_AUTO, 1);
    dlm_tokenizer *t = NULL;
    char why[256], text[24];
    CHECK_OK(train_bpe(&t, ctx, 258, "", 0, why, sizeof why));
    for (int round = 0; t && round < 20000; round++) {
        const size_t size = 1 + (size_t)test_below(24);
        for (size_t i = 0; i < size; i++)
            text[i] = round % 2 ? (char)test_below(128)
                                : some[test_below((int)sizeof some - 1)];
        for (size_t i = 0; i < size;) {
            const size_t end = bpe_word_end(text, size, i);
            CHECK(end == dlm__word_end(t->lexicon, text, size, i));
            if (end <= i) break;
            i = end;
        }
    }
    dlm_tokenizer_free(t);
    test_close(ctx);
}

TEST(training_refuses_what_is_no_vocabulary_and_survives_a_lack_of_memory)
{
    static const int wrong[] = { -1, 0, 257, 8193, 1 << 20 };
    test_heap heap = {0};
    dlm_ctx *ctx = heap_open(&heap, 1);
    const int live = heap.live;
    dlm_tokenizer *t = NULL;
    dlm_error e = DLM_E_NOMEM;
    char why[256], text[256];
    for (int i = 0; i < 5; i++) {
        CHECK(train_bpe(&t, ctx, wrong[i], "aaaa", 4, why, sizeof why) == DLM_E_CONFIG);
        CHECK(t == NULL && strstr(why, "vocab"));
    }
    for (int fail = 1; e == DLM_E_NOMEM && fail < 20; fail++) {
        heap.fail_at = heap.calls + fail;
        strcpy(why, "nothing");
        e = train_bpe(&t, ctx, 300, "aaaa bb", 7, why, sizeof why);
        CHECK((e == DLM_OK) == (t != NULL));
        CHECK((e == DLM_OK) == (strcmp(why, "nothing") == 0));
        if (!t) CHECK(heap.live == live);
        if (e == DLM_OK) CHECK(fail > 1);
    }
    heap.fail_at = 0;
    CHECK_OK(e);
    if (t) CHECK(t->vocab == 259);             /* aa, thrice; then aa aa, once     */
    dlm_tokenizer_free(t);
    CHECK_OK(train_bpe(&t, ctx, 300, NULL, 0, why, sizeof why));
    if (t) CHECK(t->vocab == 258);
    dlm_tokenizer_free(t);
    memset(text, 'a', sizeof text);
    CHECK_OK(train_bpe(&t, ctx, 300, text, sizeof text, why, sizeof why));
    if (t) CHECK(t->vocab == 263);             /* of 2, 4, 8, 16 and 32; none of 64 */
    dlm_tokenizer_free(t);
    CHECK(heap.live == live);
    dlm_shutdown(ctx);
}

/* ==[ table ]=================================================================
   In the order of the header. */

typedef struct test_case {
    const char *name;
    void      (*run)(void);
} test_case;

#define RUN(name) { #name, name }
static const test_case test_cases[] = {
    RUN(context_defaults_to_one_thread_and_a_supported_isa),
    RUN(context_uses_the_isa_and_threads_it_was_asked_for),
#ifdef DLM__POSIX_THREADS
    RUN(workers_keep_off_the_callers_core_and_its_affinity_is_left_alone),
#endif
    RUN(context_lives_in_memory_of_exactly_the_predicted_size),
    RUN(context_refuses_options_that_make_no_sense),
    RUN(context_says_no_more_once_it_exists),
#if defined(__unix__) || defined(__APPLE__)
    RUN(context_takes_its_isa_from_the_environment),
#endif
    RUN(context_refuses_an_isa_this_cpu_lacks),
    RUN(error_strings_and_isa_names_exist_and_differ),
    RUN(random_bits_match_the_known_answer_of_philox),
    RUN(random_bits_depend_on_every_part_of_the_address),
    RUN(uniform_is_uniform_along_every_part_of_the_address),
    RUN(uniform_has_53_bits),
    RUN(shuffled_visits_every_index_once),
    RUN(shuffled_differs_between_epochs_and_seeds),
    RUN(shuffled_puts_every_index_anywhere),
    RUN(matmul_equals_double_reference_on_every_isa),
    RUN(matmul_is_one_chain_of_fused_multiply_adds),
    RUN(matmul_rows_do_not_depend_on_sizes_or_threads),
    RUN(matmul_of_denormals_is_exact),
    RUN(matmul_does_not_depend_on_scratch),
    RUN(model_tensors_tile_the_weights_in_order),
    RUN(model_starts_with_the_documented_distribution),
    RUN(config_refuses_absurd_sizes_by_name),
    RUN(config_refuses_contradictions_by_name),
    RUN(options_are_taken_in_their_range_and_refused_outside_by_name),
    RUN(config_refuses_more_parameters_than_can_be_counted),
    RUN(config_fills_in_the_documented_defaults),
    RUN(clone_is_a_model_of_its_own),
    RUN(describe_lists_form_and_every_field_and_keeps_to_its_room),
    RUN(session_limits_are_checked_by_name),
    RUN(trainer_options_are_checked_by_name),
    RUN(keys_fill_shows_what_the_pattern_says),
    RUN(states_show_doubled_rows_as_block_diffusion_says),
    RUN(forward_refuses_bad_batches_by_name),
    RUN(long_context_costs_only_where_it_is_used),
    RUN(batch_lanes_are_checked_in_one_go),
    RUN(logits_equal_double_reference_for_every_feature_on_every_isa),
    RUN(logits_agree_between_isas_and_packings),
    RUN(logits_do_not_depend_on_neighbours_out_rows_or_threads),
    RUN(cached_forward_equals_one_whole_forward_bit_for_bit),
    RUN(rows_decoded_one_by_one_equal_one_whole_forward_bit_for_bit),
    RUN(bf16_products_round_both_factors),
    RUN(bf16_products_of_factors_as_stored_equal_packed_ones),
    RUN(int8_products_equal_integers_bit_for_bit),
    RUN(narrow_products_show_what_is_not_finite),
    RUN(narrow_sessions_differ_from_f32_by_their_rounding),
    RUN(packing_is_checked),
    RUN(packed_models_belong_to_an_isa),
    RUN(int8_products_at_their_limits),
    RUN(packed_model_lives_in_used_memory_and_needs_no_original),
    RUN(overrun_array_of_an_object_is_reported),
    RUN(sessions_share_the_weights_of_a_model),
    RUN(unseen_slots_do_not_matter),
    RUN(doubled_row_equals_cached_block_at_the_same_state),
    RUN(repacking_follows_a_change_of_the_weights),
    RUN(model_wrap_borrows_weights_and_checks_their_number),
    RUN(forward_flops_count_what_is_computed),
    RUN(sampler_fills_masks_and_only_masks_in_every_order),
    RUN(sampler_same_seed_same_tokens_for_any_thread_count),
    RUN(sampler_result_does_not_depend_on_batch_neighbours),
    RUN(sampler_cached_blocks_equal_uncached_ones_token_for_token),
    RUN(sampler_confidence_is_the_untempered_probability_from_scratch),
    RUN(sampler_orders_reproduce_naive_trajectories_at_temperature_0),
    RUN(sampler_greedy_causal_equals_an_argmax_loop),
    RUN(sampler_threshold_1_is_the_plan_and_a_tiny_one_takes_the_block),
    RUN(sampler_threshold_is_strict),
    RUN(sampler_plan_is_masks_over_steps_remainder_first),
    RUN(sampler_plan_of_a_block_does_not_ask_what_is_visible),
    RUN(sampler_random_and_first_hitting_orders_are_uniform),
    RUN(sampler_chooses_among_half_a_million_candidates),
    RUN(sampler_ancestral_steps_are_uniform_and_independent),
    RUN(sampler_ancestral_counts_are_binomial),
    RUN(sampler_ancestral_does_not_wait_for_empty_steps),
    RUN(sampler_draws_follow_the_tempered_and_filtered_softmax),
    RUN(sampler_entropy_bound_is_on_what_is_drawn_from),
    RUN(sampler_draws_of_different_steps_are_independent),
    RUN(sampler_never_emits_suppressed_tokens),
    RUN(sampler_constraint_decides_what_stands_where),
    RUN(sampler_constraint_sees_the_canvas_as_the_step_began),
    RUN(sampler_stop_token_ends_a_sequence_and_leaves_the_rest_masked),
    RUN(sampler_step_callback_sees_the_trace),
    RUN(sampler_begin_resets_and_the_one_call_form_agrees),
    RUN(sampler_causal_mark_may_lie_outside_the_vocabulary),
    RUN(sampler_shifted_model_reads_row_0_for_position_0),
    RUN(sampler_begin_refuses_bad_canvases),
    RUN(sampler_options_are_checked_by_name),
    RUN(sampler_reports_when_nothing_is_allowed),
    RUN(sampler_refuses_logits_that_are_not_numbers),
    RUN(sampler_refuses_bad_weights_biases_and_guidance),
    RUN(sampler_smallest_temperatures_are_argmax),
    RUN(sampler_refuses_a_canvas_longer_than_its_rows),
    RUN(sampler_refuses_a_session_too_small_for_a_step),
    RUN(sampler_asked_and_answered_by_hand_is_the_step_and_its_tape_replays),
    RUN(sampler_runs_the_rows_of_the_timeline),
    RUN(sampler_of_sizes_says_what_it_cannot_do),
    RUN(sampler_step_that_failed_can_be_asked_again),
    RUN(sampler_asks_for_the_random_numbers_that_are_documented),
    RUN(sampler_uses_the_random_numbers_that_it_is_given),
    RUN(sampler_trace_can_list_what_was_drawn_and_not_filled_in),
    RUN(sampler_trace_of_all_draws_has_room_when_everything_is_taken_back),
    RUN(noise_levels_stay_in_range_and_spread),
    RUN(stratified_noise_levels_of_every_row_are_uniform),
    RUN(states_mask_a_fraction_t_of_the_response),
    RUN(cross_entropy_equals_double_on_every_isa),
    RUN(losses_of_logits_that_are_not_numbers_are_not_numbers),
    RUN(largest_and_second_largest_logits_are_found_wherever_they_stand),
    RUN(exp_is_within_its_bound_of_libm_on_every_isa),
    RUN(gelu_and_its_slope_are_those_of_double_on_every_isa),
    RUN(log_likelihood_expectation_is_the_exact_bound),
    RUN(log_likelihood_of_blocks_is_the_sum_of_their_bounds),
    RUN(log_likelihood_of_a_causal_model_is_exact),
    RUN(log_likelihood_of_bad_weights_is_not_a_number),
    RUN(score_left_to_right_is_the_sum_over_windows),
    RUN(score_left_to_right_sums_to_one_over_all_texts),
    RUN(score_left_to_right_is_what_the_sampler_drew_with),
    RUN(score_error_is_the_spread_of_repetitions),
    RUN(score_windows_draw_masks_of_their_own),
    RUN(choose_gives_the_probabilities_of_one_forward),
    RUN(choose_takes_the_rows_that_the_sampler_takes),
    RUN(scoring_names_what_it_cannot_take),
    RUN(scoring_options_are_taken_in_their_range_and_refused_outside),
    RUN(gradients_match_finite_differences_of_the_reference),
    RUN(gradients_of_long_sequences_match_finite_differences),
    RUN(gradients_in_bf16_are_those_of_f32_but_for_rounding),
    RUN(steps_of_every_kind_take_the_precision),
    RUN(ordinary_work_raises_no_floating_point_exceptions_on_any_isa),
    RUN(gradients_of_passes_add_up_until_the_update),
    RUN(trainer_pass_refuses_bad_batches_by_name),
    RUN(adamw_update_equals_double_reference_on_every_isa),
    RUN(gradient_norm_is_right_for_all_finite_gradients_on_every_isa),
    RUN(update_reports_unsound_moments_and_changes_nothing),
    RUN(updates_leave_no_denormals_behind),
    RUN(schedules_warm_up_and_fall_as_documented),
    RUN(by_hand_logits_equal_those_of_dlm_on_every_isa),
    RUN(by_hand_loss_and_gradient_equal_those_of_dlm_on_every_isa),
    RUN(by_hand_masks_a_fraction_t_after_the_prompt),
    RUN(by_hand_updates_equal_those_of_dlm),
    RUN(by_hand_writes_what_the_sampler_writes_step_by_step_on_every_isa),
    RUN(untrained_models_lose_ln_v_nats_per_token),
    RUN(objective_expectation_is_the_exact_bound),
    RUN(report_counts_the_tokens_that_could_carry_loss),
    RUN(training_levels_keep_to_their_range),
    RUN(ar_objective_is_next_token_cross_entropy),
    RUN(masked_objectives_weigh_the_gradient_as_the_loss),
    RUN(training_is_bit_identical_for_any_threads_and_order),
    RUN(tokenizer_bytes_round_trip_all_bytes),
    RUN(tokenizer_chars_round_trip_and_stand_by_code_point),
    RUN(tokenizer_names_an_unknown_character),
    RUN(tokenizer_says_sizes_and_truncates),
    RUN(tokenizer_survives_invalid_utf8),
    RUN(tokenizer_takes_no_vocabulary_for_a_corpus),
    RUN(tokenizer_chars_take_memory_by_their_number),
    RUN(safetensors_reads_hand_made_files),
    RUN(safetensors_widens_every_half_and_bfloat),
    RUN(safetensors_widens_singles_and_doubles),
    RUN(safetensors_rejects_metadata_twice),
    RUN(safetensors_rejects_malformed_headers),
    RUN(safetensors_rejects_what_is_no_number),
    RUN(safetensors_rejects_headers_that_are_not_utf8),
    RUN(safetensors_errors_name_the_tensor),
    RUN(safetensors_lists_what_only_others_use),
    RUN(safetensors_rejects_what_the_format_forbids),
    RUN(safetensors_rejects_deep_nesting),
    RUN(safetensors_rejects_absurd_header_lengths),
    RUN(safetensors_rejects_every_truncation),
    RUN(safetensors_survives_every_changed_header_byte),
#ifndef DLM_NO_STDIO
    RUN(safetensors_parses_a_released_layout),
    RUN(safetensors_open_reports_unreadable_files),
    RUN(checkpoint_round_trip_is_bit_exact_with_every_feature),
    RUN(checkpoint_of_numbers_that_are_none_is_not_saved),
    RUN(numbers_in_files_are_what_the_c_library_would_write_and_read),
    RUN(checkpoint_does_not_depend_on_the_locale),
    RUN(checkpoint_carries_its_tokenizer),
    RUN(checkpoint_carries_every_character),
    RUN(checkpoint_rejects_every_truncation),
    RUN(checkpoint_survives_every_changed_header_byte),
    RUN(checkpoint_mismatch_names_the_tensor),
    RUN(checkpoint_of_many_tensors_loads_in_no_time),
#ifndef _WIN32
    RUN(checkpoint_failing_save_keeps_the_old_file_and_leaves_no_other),
    RUN(checkpoint_keeps_the_mode_of_an_old_file_and_the_files_of_others),
    RUN(checkpoint_is_saved_through_links),
    RUN(pipes_and_devices_are_refused_at_once),
    RUN(files_that_cannot_be_mapped_are_read),
    RUN(checkpoint_of_two_writers_is_always_that_of_one),
#endif
    RUN(trainer_resumes_bit_exactly),
    RUN(trainer_load_refuses_wrong_files_and_stays_unharmed),
    RUN(trainer_load_refuses_numbers_that_are_none_and_steps_without_end),
#endif
    RUN(trainer_failed_steps_change_nothing),
    RUN(trainer_takes_examples_without_a_response),
    RUN(examples_without_a_response_contribute_nothing),
    RUN(trainer_accumulates_over_passes),
    RUN(trainer_learns_a_sentence_by_heart),
    RUN(gradcheck_passes_for_every_feature),
    RUN(gradcheck_notices_a_wrong_gradient),
    RUN(gradcheck_notices_one_percent_in_one_tensor),
    RUN(memory_predicted_equals_memory_requested),
    RUN(steady_state_makes_no_allocation),
    RUN(objects_live_in_memory_of_exactly_the_predicted_size),
    RUN(every_failing_allocation_leaves_nothing_behind),
    RUN(scoring_allocates_nothing),
    RUN(calls_that_allocate_survive_every_failing_allocation),
    RUN(lift_select_keeps_the_right_ones_and_of_equals_the_first),
    RUN(lift_select_takes_many),
    RUN(lift_select_at_random_keeps_every_subset_alike),
    RUN(lift_count_rounds_half_to_even_and_keeps_at_least_one),
    RUN(lift_rho_and_kept_fractions_have_the_documented_means),
    RUN(lift_mode_changes_at_its_thresholds),
    RUN(lift_mode_is_drawn_from_its_weights),
    RUN(state_entropy_is_its_formula_on_every_isa),
    RUN(cart_weights_and_gift_levels_are_their_formulas),
    RUN(lift_steps_of_every_method_follow_their_formulas),
    RUN(steps_are_the_public_pieces_bit_for_bit),
    RUN(states_take_what_fits),
    RUN(lift_without_extra_masks_is_vanilla_bit_for_bit),
    RUN(lift_scores_equal_those_of_the_learning_pass_bit_for_bit),
    RUN(lift_blocks_choose_independently),
    RUN(lift_evaluate_is_the_plain_bound_for_every_method),
    RUN(lift_steps_do_not_depend_on_threads_or_passes),
    RUN(lift_steps_depend_on_nothing_that_was_before),
    RUN(lift_rules_of_ones_own_take_the_place_of_the_method),
    RUN(lift_options_are_checked_by_name),
    RUN(divergences_and_gradients_follow_their_formulas_on_every_isa),
    RUN(divergences_vanish_for_equals_and_stay_finite_far_apart),
    RUN(teacher_probabilities_are_tempered_then_filtered),
    RUN(convert_copies_weights_and_adds_a_mean_embedding),
    RUN(convert_refuses_what_it_cannot_make_by_name),
    RUN(mask_may_be_token_0),
    RUN(step_maps_rebuild_every_state_and_the_doubled_row_agrees),
    RUN(last_blocks_are_learned_as_the_sampler_shows_them),
    RUN(step_maps_end_at_the_stop_token),
    RUN(teacher_rows_equal_the_doubled_construction),
    RUN(blocks_of_one_see_only_what_stands_before),
    RUN(distiller_gradient_equals_a_reference_row_by_row),
    RUN(distiller_passes_over_examples_without_a_response),
    RUN(distiller_steps_do_not_depend_on_passes),
    RUN(distiller_states_are_drawn_uniformly),
    RUN(distiller_makes_the_student_say_what_the_teacher_says),
    RUN(distiller_options_are_checked_by_name),
    RUN(distiller_refuses_bad_examples_and_forgets_them),
    RUN(distiller_lives_in_one_block_and_steps_without_allocating),
    RUN(folded_dit_equals_the_unfolded_one_in_double),
    RUN(forbidden_token_has_probability_0_and_leaves_all_other_logits),
    RUN(forbidden_mask_is_sampled_as_any_mask_in_every_order),
    RUN(forbidden_token_has_no_gradient),
    RUN(forbidden_token_stays_so_in_training),
#ifndef DLM_NO_STDIO
    RUN(only_the_bias_of_a_head_is_kept_at_minus_infinity_in_files),
#endif
    RUN(guidance_is_its_formula_and_needs_twice_the_sequences),
    RUN(remasking_revises_unlikely_tokens_once),
    RUN(llama2c_models_compute_what_their_own_program_would),
    RUN(llama2c_refuses_files_that_do_not_fit_their_header),
    RUN(pieces_merge_the_best_score_first_and_fall_back_to_bytes),
    RUN(pieces_round_trip_any_bytes),
    RUN(pieces_decode_each_of_several_texts_as_one),
    RUN(encode_says_how_many_tokens_there_are),
    RUN(pieces_refuse_malformed_files),
    RUN(whole_text_never_ends_within_a_character),
    RUN(json_merges_come_as_strings_or_as_pairs),
    RUN(json_patterns_cut_texts_into_words),
    RUN(json_added_tokens_come_first),
    RUN(json_reads_the_bpe_of_sentencepiece),
    RUN(json_merges_as_the_naive_way_does),
    RUN(json_encodes_any_bytes_and_long_words),
    RUN(json_refuses_what_it_does_not_do),
    RUN(json_survives_malformed_files),
    RUN(training_merges_what_a_count_of_all_pairs_finds),
    RUN(training_knows_the_words_of_gpt2),
    RUN(training_refuses_what_is_no_vocabulary_and_survives_a_lack_of_memory),
#ifndef DLM_NO_STDIO
    RUN(trained_tokenizers_are_saved_as_they_are),
    RUN(pieces_ride_along_in_a_checkpoint),
    RUN(llama2c_released_model_writes_the_published_text),
    RUN(llama2c_released_model_scores_its_text_in_every_precision),
    RUN(folders_come_back_as_they_were_saved),
    RUN(folders_open_in_every_type),
    RUN(folders_of_llada_and_smdm_are_ours_renamed),
    RUN(folders_refuse_by_name_what_is_not_built_here),
    RUN(folders_are_read_as_the_caller_wants),
    RUN(folders_of_several_files_are_read_by_their_index),
    RUN(folders_survive_every_changed_byte),
    RUN(folders_without_memory_leave_nothing),
    RUN(folders_of_released_models_are_read),
    RUN(json_gpt2_encodes_the_golden_texts),
    RUN(json_folders_say_what_their_files_say),
    RUN(json_qwen3_folder_encodes_the_golden_texts),
#endif
    { NULL, NULL }
};

static void test_print_context(void)
{
    printf("seed %llu, isa", (unsigned long long)test_seed);
    FOR_EACH_ISA(isa) printf(" %s", dlm_isa_name((dlm_isa)isa));
#if defined(__clang__)
    printf(", clang %s", __clang_version__);
#elif defined(__GNUC__)
    printf(", gcc %s", __VERSION__);
#elif defined(_MSC_VER)
    printf(", msvc %d", _MSC_VER);
#endif
#ifdef __cplusplus
    printf(", C++ %ld\n", (long)__cplusplus);
#else
    printf(", C %ld\n", (long)__STDC_VERSION__);
#endif
}

/* 1: passed, 0: failed, -1: skipped. */
static int test_run(const test_case *t)
{
    test_failed_lines = test_was_skipped = 0;
    test_label_text[0] = 0;
    test_state = test_seed;
    for (const char *c = t->name; *c; c++) test_state = test_state * 31 + (uint64_t)*c;
    clock_t begin = clock();
    t->run();
    if (getenv("DLM_TEST_TIME"))
        printf("%6.2f s  %s\n", (double)(clock() - begin) / CLOCKS_PER_SEC, t->name);
    for (int i = 0; i < test_failed_lines; i++) {
        const test_failure *f = &test_failed[i];
        printf("%s:%d: %s: %s\n    %s\n    %d times, largest error %.3g\n", f->file,
               f->line, t->name, f->label, f->detail, f->count, f->error);
    }
    if (test_failed_lines) return 0;
    if (test_was_skipped) printf("      (%s)\n", t->name);
    return test_was_skipped ? -1 : 1;
}

int main(int argc, char **argv)
{
    int passed = 0, failed = 0, skipped = 0;
    const char *only = argc > 1 ? argv[1] : "";
    if (argc > 2) test_seed = strtoull(argv[2], NULL, 0);
    setvbuf(stdout, NULL, _IOLBF, BUFSIZ);
    test_print_context();
    for (const test_case *t = test_cases; t->name; t++) {
        if (!strstr(t->name, only)) continue;
        int result = test_run(t);
        passed += result > 0;
        failed += result == 0;
        skipped += result < 0;
    }
    printf("%d passed, %d failed, %d skipped\n", passed, failed, skipped);
    return failed != 0;
}
