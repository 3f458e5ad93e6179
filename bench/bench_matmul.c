/* bench_matmul - what share of the CPU's own multiply-add rate do the matmuls reach?

   Build:  make build/bench_matmul
   Run:    build/bench_matmul [--quick] [isa]      (isa as in DLM_ISA: avx2, ...)

   For every instruction set: squares and the weight shapes of small models, each beside
   a plain triple loop and beside a loop that multiplies and adds in registers only; that
   loop is the 100 % of pct_of_peak.  nt: weights as stored; packed: rearranged
   before; nn and tn of a weight shape: the gradients of its input and of itself.

   The best instruction set also meets the libraries OpenBLAS, BLIS and oneDNN, where
   they are installed: best_peer is the fastest of them on the same row, packed rows
   have none.  The last line is of that instruction set too: geometric means of the
   ratio (nn, nt, tn) and of pct_of_peak (M >= 32, packed as well), and the worst ratio.
   --quick leaves out most shapes, and the triple loops where there is a library. */
#define _POSIX_C_SOURCE 200112L            /* clock_gettime, setenv                */
#define DLM_IMPLEMENTATION
#include "dlm.h"
#include "bench.h"

#include <math.h>
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

/* --[ peak ]------------------------------------------------------------------
   Twelve independent accumulators hide the latency of a fused multiply-add on every
   current core.  The empty asm keeps the compiler from merging or vectorising them. */

#if defined(__x86_64__) || defined(__i386__)
#define OPAQUE(v) __asm__ volatile("" : "+x"(v))
#elif defined(__aarch64__)
#define OPAQUE(v) __asm__ volatile("" : "+w"(v))
#else
#define OPAQUE(v) __asm__ volatile("" : "+m"(v))
#endif

#define PEAK_CHAINS 12
#define PEAK_REPEAT(X, f) X(0, f) X(1, f) X(2, f) X(3, f) X(4, f) X(5, f) X(6, f) \
                          X(7, f) X(8, f) X(9, f) X(10, f) X(11, f)
#define PEAK_DECLARE(i, vec) vec acc##i = x; OPAQUE(acc##i);
#define PEAK_STEP(i, madd)   acc##i = madd(acc##i, x, y); OPAQUE(acc##i);
#define PEAK_SUM(i, madd)    x = madd(x, acc##i, y);

/* One function per instruction set; returns something that depends on every chain. */
#define PEAK_FUNCTION(name, target, vec, set1, madd)          \
    target static float name(long n)                          \
    {                                                         \
        vec x = set1(0.999f), y = set1(0.001f);               \
        float first;                                          \
        PEAK_REPEAT(PEAK_DECLARE, vec)                        \
        for (; n > 0; n--) { PEAK_REPEAT(PEAK_STEP, madd) }   \
        PEAK_REPEAT(PEAK_SUM, madd)                           \
        memcpy(&first, &x, sizeof first);                     \
        return first;                                         \
    }

#define SCALAR_SET1(v)     (v)
#ifdef __FP_FAST_FMAF
#define SCALAR_MADD(a, x, y) fmaf(a, x, y)
#else
#define SCALAR_MADD(a, x, y) ((a) * (x) + (y))
#endif
PEAK_FUNCTION(peak_scalar, , float, SCALAR_SET1, SCALAR_MADD)

#if defined(__x86_64__) || defined(__i386__)
#define SSE2_MADD(a, x, y) _mm_add_ps(_mm_mul_ps(a, x), y)
#define TARGET(isa) __attribute__((target(isa)))
PEAK_FUNCTION(peak_sse2, TARGET("sse2"), __m128, _mm_set1_ps, SSE2_MADD)
PEAK_FUNCTION(peak_avx2, TARGET("avx2,fma"), __m256, _mm256_set1_ps, _mm256_fmadd_ps)
PEAK_FUNCTION(peak_avx512, TARGET("avx512f"), __m512, _mm512_set1_ps, _mm512_fmadd_ps)
#elif defined(__ARM_NEON)
#define NEON_MADD(a, x, y) vfmaq_f32(y, a, x)
PEAK_FUNCTION(peak_neon, , float32x4_t, vdupq_n_f32, NEON_MADD)
#endif

typedef struct peak {                      /* lanes 0: not built for this machine  */
    float (*loop)(long n);
    int   lanes;
} peak;

static peak peak_of(dlm_isa isa)
{
    peak p = { peak_scalar, 1 };
    switch (isa) {
#if defined(__x86_64__) || defined(__i386__)
    case DLM_ISA_SSE2:   p.loop = peak_sse2;   p.lanes = 4;  break;
    case DLM_ISA_AVX2:   p.loop = peak_avx2;   p.lanes = 8;  break;
    case DLM_ISA_AVX512: p.loop = peak_avx512; p.lanes = 16; break;
#elif defined(__ARM_NEON)
    case DLM_ISA_NEON:   p.loop = peak_neon;   p.lanes = 4;  break;
#endif
    default: break;
    }
    return p;
}

/* --[ loops ]-----------------------------------------------------------------
   What anyone would write first. */

static void naive_nn(float *out, const float *a, const float *b, int M, int N, int K)
{
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) {
            float sum = 0.0f;
            for (int k = 0; k < K; k++) sum += a[i * K + k] * b[k * N + j];
            out[i * N + j] = sum;
        }
}

static void naive_nt(float *out, const float *a, const float *b, int M, int N, int K)
{
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) {
            float sum = 0.0f;
            for (int k = 0; k < K; k++) sum += a[i * K + k] * b[j * K + k];
            out[i * N + j] = sum;
        }
}

static void naive_tn(float *out, const float *a, const float *b, int M, int N, int K)
{
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) {
            float sum = 0.0f;
            for (int k = 0; k < K; k++) sum += a[k * M + i] * b[k * N + j];
            out[i * N + j] = sum;
        }
}

enum { NN, NT, TN, PACKED, NAIVE_NN, NAIVE_NT, NAIVE_TN, PEAK };

static const char *const op_names[] = { "nn", "nt", "tn", "packed" };

static void naive_run(int op, float *out, const float *a, const float *b, int M, int N,
                      int K)
{
    (op == NN ? naive_nn : op == NT ? naive_nt : naive_tn)(out, a, b, M, N, K);
}

/* --[ peers ]-----------------------------------------------------------------
   Libraries found at run time, with one thread each.  None is needed and none is linked:
   the few declarations are written out here.  LIBXSMM is not among them, because Debian
   has it as a static library only.  They choose their kernels themselves; to hold them
   to less: DLM_ISA=avx2 OPENBLAS_CORETYPE=Haswell BLIS_ARCH_TYPE=3 (haswell in 0.9)
   DNNL_MAX_CPU_ISA=AVX2 build/bench_matmul avx2. */

#if defined(__unix__) || defined(__APPLE__)
#if !defined(__GLIBC__) || __GLIBC__ > 2 || __GLIBC_MINOR__ >= 34
#define HAVE_PEERS                         /* before 2.34 dlopen asks for -ldl     */
#include <dlfcn.h>
#endif
#endif

enum { ROW_MAJOR = 101, NO_TRANS = 111, TRANS = 112 };         /* of CBLAS         */

typedef void (*cblas_gemm)(int order, int trans_a, int trans_b, int M, int N, int K,
                           float alpha, const float *a, int lda, const float *b, int ldb,
                           float beta, float *c, int ldc);
typedef void (*cblas_gemv)(int order, int trans, int rows, int cols, float alpha,
                           const float *a, int lda, const float *x, int step_x,
                           float beta, float *y, int step_y);
typedef int (*onednn_gemm)(char trans_a, char trans_b, int64_t M, int64_t N, int64_t K,
                           float alpha, const float *a, int64_t lda, const float *b,
                           int64_t ldb, float beta, float *c, int64_t ldc);

typedef struct peer {                      /* has one of the three                 */
    const char *name;
    cblas_gemm  gemm;
    cblas_gemv  gemv;                      /* of one row and weights as stored     */
    onednn_gemm onednn;
} peer;

#define LIBRARIES  3
#define MOST_PEERS (2 * LIBRARIES)

static int peer_can(const peer *r, int op, int M)
{
    return r->gemm || r->onednn || (r->gemv && op == NT && M == 1);
}

static void peer_run(const peer *r, int op, float *out, const float *a, const float *b,
                     int M, int N, int K)
{
    const int at = op == TN, bt = op == NT, lda = at ? M : K, ldb = bt ? K : N;
    if (r->onednn)
        r->onednn(at ? 'T' : 'N', bt ? 'T' : 'N', M, N, K, 1.0f, a, lda, b, ldb, 0.0f,
                  out, N);
    else if (r->gemm)
        r->gemm(ROW_MAJOR, at ? TRANS : NO_TRANS, bt ? TRANS : NO_TRANS, M, N, K, 1.0f,
                a, lda, b, ldb, 0.0f, out, N);
    else
        r->gemv(ROW_MAJOR, NO_TRANS, N, K, 1.0f, b, K, a, 1, 0.0f, out, 1);
}

#ifdef HAVE_PEERS

/* A rival that computes something else, or nothing, would be no rival. */
static int peer_agrees(const peer *r)
{
    enum { MOST_M = 3, N = 5, K = 7 };
    float a[MOST_M * K], b[N * K], want[MOST_M * N], got[MOST_M * N];
    for (int i = 0; i < MOST_M * K; i++) a[i] = (float)(i % 4) - 1.0f;
    for (int i = 0; i < N * K; i++) b[i] = (float)(i % 6) - 2.0f;
    for (int op = NN; op <= TN; op++)
        for (int M = 1; M <= MOST_M; M++) {
            if (!peer_can(r, op, M)) continue;
            naive_run(op, want, a, b, M, N, K);
            peer_run(r, op, got, a, b, M, N, K);
            for (int i = 0; i < M * N; i++)
                if (!(fabsf(got[i] - want[i]) < 1e-3f)) return 0;
        }
    return peer_can(r, NT, 1);
}

static void symbol(void *library, const char *name, void *function)
{
    void *address = dlsym(library, name);
    memcpy(function, &address, sizeof address);
}

/* With the kernels that the library chose for this CPU, if it says which. */
static void peer_print(const char *file, void *library, int usable)
{
    char *(*openblas)(void);
    int (*blis_id)(void);
    const char *(*blis)(int id);
    symbol(library, "openblas_get_corename", &openblas);
    symbol(library, "bli_arch_query_id", &blis_id);
    symbol(library, "bli_arch_string", &blis);
    printf("%s", file);
    if (openblas) printf(", kernels %s", openblas());
    if (blis_id && blis) printf(", kernels %s", blis(blis_id()));
    printf(usable ? "\n" : ", lacks sgemm or gets it wrong\n");
}

/* Where the library has both, gemv stands beside gemm: which is faster depends on the
   size. */
static int peers_find(peer *peers)
{
    static const char *const known[LIBRARIES][4] = {
        { "openblas", "openblas_gemv", "libopenblas.so.0", "libopenblas.so" },
        { "blis",     "blis_gemv",     "libblis.so.4",     "libblis.so" },
        { "onednn",   "",              "libdnnl.so.3",     "libdnnl.so.2" }
    };
    static const char *const threads[] = {
        "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "BLIS_NUM_THREADS"
    };
    int n = 0;
    for (int i = 0; i < 3; i++) setenv(threads[i], "1", 1);
    for (int i = 0; i < LIBRARIES; i++) {
        int file = 2;
        const int before = n;
        peer found[2];
        void *library = dlopen(known[i][file], RTLD_NOW | RTLD_LOCAL);
        if (library == NULL) library = dlopen(known[i][++file], RTLD_NOW | RTLD_LOCAL);
        printf("# peer     %s: ", known[i][0]);
        if (library == NULL) {
            printf("not found\n");
            continue;
        }
        memset(found, 0, sizeof found);
        symbol(library, "cblas_sgemm", &found[0].gemm);
        symbol(library, "dnnl_sgemm", &found[0].onednn);
        symbol(library, "cblas_sgemv", &found[1].gemv);
        for (int j = 0; j < 2; j++) {
            found[j].name = known[i][j];
            if (peer_agrees(&found[j])) peers[n++] = found[j];
        }
        peer_print(known[i][file], library, n > before);
    }
    return n;
}

#else

static int peers_find(peer *peers)
{
    memset(peers, 0, MOST_PEERS * sizeof *peers);
    printf("# peer     none: no dlopen here\n");
    return 0;
}

#endif /* HAVE_PEERS */

/* --[ one product ]----------------------------------------------------------- */

typedef struct product {                   /* one matmul, ready to run             */
    int op, M, N, K;
    const peer *rival;                     /* NULL: our own, a loop or the peak    */
    dlm_ctx *ctx;
    float *out;
    const float *a, *b, *packed;
    peak   fma;
} product;

static volatile float sink;                /* keeps the register loop alive        */

static void product_run(void *arg)
{
    const product *p = (const product *)arg;
    const int M = p->M, N = p->N, K = p->K;
    if (p->rival) {
        peer_run(p->rival, p->op, p->out, p->a, p->b, M, N, K);
        return;
    }
    switch (p->op) {
    case NN:     dlm_matmul_nn(p->ctx, p->out, p->a, p->b, M, N, K); break;
    case NT:     dlm_matmul_nt(p->ctx, p->out, p->a, p->b, M, N, K); break;
    case TN:     dlm_matmul_tn(p->ctx, p->out, p->a, p->b, M, N, K); break;
    case PACKED: dlm_matmul_packed(p->ctx, p->out, p->a, p->packed, M, N, K); break;
    case PEAK:   sink = p->fma.loop(10000); break;
    default:     naive_run(p->op - NAIVE_NN, p->out, p->a, p->b, M, N, K); break;
    }
}

static double product_flops(const product *p)
{
    if (p->op == PEAK) return 2.0 * 10000 * PEAK_CHAINS * p->fma.lanes;
    return 2.0 * p->M * p->N * p->K;
}

/* --[ scores ]---------------------------------------------------------------- */

typedef struct mean {                      /* geometric                            */
    double log_sum;
    int    n;
} mean;

static void mean_add(mean *m, double x) { m->log_sum += log(x), m->n++; }
static double mean_of(const mean *m) { return exp(m->log_sum / m->n); }

typedef struct lowest {                    /* of a ratio; shape "": none yet       */
    double ratio;
    char   shape[64];
} lowest;

static void lowest_add(lowest *l, double ratio, const product *p)
{
    if (l->shape[0] && ratio >= l->ratio) return;
    l->ratio = ratio;
    snprintf(l->shape, sizeof l->shape, "%s_%dx%dx%d", op_names[p->op], p->M, p->N, p->K);
}

typedef struct bench {                     /* of one instruction set               */
    dlm_isa  isa;
    int      quick, best, n_peers;         /* best: the one that meets the peers   */
    const peer *peers;
    dlm_ctx *ctx;
    size_t   most;
    float   *out, *a, *b, *packed;         /* (most) each, 64-byte aligned         */
    mean     squares[PACKED + 1];          /* pct_of_peak of the large ones, by op */
    mean     pct, vs_peer;
    lowest   vs_naive, worst;
} bench;

/* --[ one line-up ]-----------------------------------------------------------
   Products that take turns: ours, the loops, the peers, and the peak once. */

#define MOST_CASES (PACKED + 1 + 3 + 3 * MOST_PEERS + 1)
#define NAIVE_MOST (256.0 * 256.0 * 256.0) /* above this the loops take too long   */

typedef struct lineup {
    bench     *b;
    product    p[MOST_CASES];
    bench_case c[MOST_CASES];
    int        n;
} lineup;

static void lineup_case(lineup *l, int op, const peer *rival, int M, int N, int K)
{
    product *p = &l->p[l->n];
    bench_case *c = &l->c[l->n++];
    memset(p, 0, sizeof *p);
    memset(c, 0, sizeof *c);
    p->op = op, p->rival = rival;
    p->M = M, p->N = N, p->K = K;
    p->ctx = l->b->ctx;
    p->out = l->b->out, p->a = l->b->a, p->b = l->b->b, p->packed = l->b->packed;
    p->fma = peak_of(l->b->isa);
    c->run = product_run;
    c->arg = p;
    c->work = product_flops(p);
}

static int lineup_has(const lineup *l, int op)
{
    for (int i = 0; i < l->n; i++)
        if (l->p[i].op == op) return 1;
    return 0;
}

/* One operation and all that compete with it; packed shares the loop of nt. */
static void lineup_add(lineup *l, int op, int M, int N, int K)
{
    const bench *b = l->b;
    const int loop = op == PACKED ? NAIVE_NT : NAIVE_NN + op;
    const int loops = (double)M * N * K <= NAIVE_MOST && !(b->quick && b->n_peers > 0);
    if (op == PACKED) {
        if (dlm_pack_floats(b->ctx, N, K) > b->most) return;
        dlm_pack(b->ctx, b->packed, b->b, N, K);
    }
    lineup_case(l, op, NULL, M, N, K);
    if (loops && !lineup_has(l, loop)) lineup_case(l, loop, NULL, M, N, K);
    for (int i = 0; b->best && op != PACKED && i < b->n_peers; i++)
        if (peer_can(&b->peers[i], op, M))
            lineup_case(l, op, &b->peers[i], M, N, K);
}

/* The fastest of op that are, or are not, of a peer; -1: there is none. */
static int lineup_fastest(const lineup *l, int op, int of_peers)
{
    int best = -1;
    for (int i = 0; i < l->n; i++) {
        if (l->p[i].op != op || (l->p[i].rival != NULL) != of_peers) continue;
        if (best < 0 || bench_median(&l->c[i]) > bench_median(&l->c[best])) best = i;
    }
    return best;
}

static void report(lineup *l, int i, double top)
{
    bench *b = l->b;
    const product *p = &l->p[i];
    const bench_case *c = &l->c[i];
    const double own = bench_median(c), pct = 100.0 * own / top;
    const int naive = lineup_fastest(l, p->op == PACKED ? NAIVE_NT : NAIVE_NN + p->op, 0);
    const int best = lineup_fastest(l, p->op, 1);
    printf("%s,%s,%d,%d,%d,%.2f,%.2f,%.2f,%.1f,", dlm_isa_name(b->isa), op_names[p->op],
           p->M, p->N, p->K, 1e-9 * own, 1e-9 * bench_min(c), 1e-9 * bench_max(c), pct);
    if (naive >= 0) {
        const double loop = bench_median(&l->c[naive]);
        printf("%.2f,%.2f,", 1e-9 * loop, own / loop);
        lowest_add(&b->vs_naive, own / loop, p);
    } else {
        printf(",,");
    }
    if (best >= 0) {
        const double rival = bench_median(&l->c[best]);
        printf("%s,%.2f,%.3f,", l->p[best].rival->name, 1e-9 * rival, own / rival);
        mean_add(&b->vs_peer, own / rival);
        lowest_add(&b->worst, own / rival, p);
    } else {
        printf(",,,");
    }
    printf("%d,%d\n", BENCH_SAMPLES,
           bench_noisy(c) || (best >= 0 && bench_noisy(&l->c[best])));
    fflush(stdout);
    if (p->M >= 32) mean_add(&b->pct, pct);
    if (p->M == p->N && p->N == p->K && p->M >= 256) mean_add(&b->squares[p->op], pct);
}

static void lineup_run(lineup *l)
{
    lineup_case(l, PEAK, NULL, 0, 0, 0);
    bench_run(l->c, l->n);
    const double top = bench_median(&l->c[l->n - 1]);
    for (int i = 0; i < l->n; i++)
        if (l->p[i].op <= PACKED && l->p[i].rival == NULL) report(l, i, top);
}

/* --[ the shapes ]------------------------------------------------------------ */

static const int weight_shapes[][2] = {    /* (N, K) of linear layers, d 64 .. 768 */
    { 64, 64 }, { 172, 64 }, { 64, 172 }, { 512, 64 }, { 288, 288 }, { 768, 288 },
    { 288, 768 }, { 1536, 384 }, { 768, 768 }, { 3072, 768 }, { 50257, 768 }
};
#define WEIGHT_SHAPES ((int)(sizeof weight_shapes / sizeof weight_shapes[0]))
#define HEAD_ROWS 64                       /* the 50257 head: few rows are looked at */

static void bench_squares(bench *b)
{
    for (int edge = b->quick ? 64 : 16; edge <= 1024; edge *= b->quick ? 4 : 2) {
        lineup l;
        l.b = b, l.n = 0;
        for (int op = NN; op <= PACKED; op++) lineup_add(&l, op, edge, edge, edge);
        lineup_run(&l);
    }
}

static void bench_weight(bench *b, int M, int N, int K)
{
    lineup l;
    l.b = b, l.n = 0;
    lineup_add(&l, NT, M, N, K);
    lineup_add(&l, PACKED, M, N, K);
    if (M >= 64 && N < 10000) {
        lineup_add(&l, NN, M, K, N);
        lineup_add(&l, TN, N, K, M);
    }
    lineup_run(&l);
}

static void bench_weights(bench *b)
{
    static const int rows[] = { 1, 4, 32, 64, 256, 1024 };
    for (int s = 0; s < WEIGHT_SHAPES; s++) {
        const int N = weight_shapes[s][0], K = weight_shapes[s][1], head = N > 10000;
        if (b->quick && (head || s % 3 != 1)) continue;
        for (int r = 0; r < (int)(sizeof rows / sizeof rows[0]); r++) {
            if (b->quick && rows[r] != 1 && rows[r] != 64) continue;
            if (!head || rows[r] <= HEAD_ROWS) bench_weight(b, rows[r], N, K);
        }
    }
}

static void bench_isa(bench *b)
{
    float **const blocks[] = { &b->out, &b->a, &b->b, &b->packed };
    void *bases[4];
    b->ctx = bench_ctx(b->isa, 1);
    b->most = b->quick ? (size_t)1024 * 1024 : (size_t)50304 * 768;
    for (int i = 0; i < 4; i++) {
        bases[i] = bench_alloc(b->most + 16, sizeof(float));
        *blocks[i] = (float *)(((uintptr_t)bases[i] + 63) & ~(uintptr_t)63);
        for (size_t j = 0; j < b->most; j++)
            (*blocks[i])[j] = (float)(int)(j * 2654435761u % 2001u) * 1e-3f - 1.0f;
    }
    bench_squares(b);
    if (b->best || !b->quick) bench_weights(b);
    for (int i = 0; i < 4; i++) free(bases[i]);
    dlm_shutdown(b->ctx);
}

static void bench_summary(const bench *b)
{
    mean all = { 0.0, 0 };
    printf("# %s: pct_of_peak over the squares 256 .. 1024, geometric means:",
           dlm_isa_name(b->isa));
    for (int op = NN; op <= PACKED; op++) {
        all.log_sum += b->squares[op].log_sum, all.n += b->squares[op].n;
        printf(" %s %.1f,", op_names[op], mean_of(&b->squares[op]));
    }
    printf(" all %.1f\n", mean_of(&all));
    if (b->vs_naive.shape[0])
        printf("# %s: worst ratio_to_naive %.2f at %s\n", dlm_isa_name(b->isa),
               b->vs_naive.ratio, b->vs_naive.shape);
}

static void last_line(const bench *b)
{
    if (b->vs_peer.n > 0)
        printf("geomean_vs_best_peer=%.3f", mean_of(&b->vs_peer));
    else
        printf("geomean_vs_best_peer=none");
    if (b->pct.n > 0)
        printf(" geomean_pct_peak=%.1f", mean_of(&b->pct));
    else
        printf(" geomean_pct_peak=none");
    if (b->worst.shape[0])
        printf(" worst=%s:%.3f\n", b->worst.shape, b->worst.ratio);
    else
        printf(" worst=none\n");
}

int main(int argc, char **argv)
{
    const int quick = argc > 1 && strcmp(argv[1], "--quick") == 0;
    const char *only = argc > 1 + quick ? argv[1 + quick] : NULL;
    peer peers[MOST_PEERS];
    bench b[DLM_ISA_COUNT];
    dlm_ctx *ctx = bench_ctx(DLM_ISA_AUTO, 1);
    const dlm_isa best = dlm_active_isa(ctx);
    dlm_shutdown(ctx);
    memset(b, 0, sizeof b);
    bench_context("bench_matmul", quick ? "the best and avx2" : "all of this CPU", "1");
    const int n_peers = peers_find(peers);
    printf("isa,op,M,N,K,gflops_median,gflops_min,gflops_max,pct_of_peak,naive_gflops,"
           "ratio_to_naive,best_peer,peer_gflops,ratio,samples,noisy\n");
    for (int i = DLM_ISA_COUNT - 1; i > DLM_ISA_AUTO; i--) {
        b[i].isa = (dlm_isa)i;
        b[i].quick = quick;
        b[i].peers = peers;
        b[i].n_peers = n_peers;
        b[i].best = b[i].isa == best;
        if (!dlm_isa_supported(b[i].isa)) continue;
        if (only != NULL && strcmp(only, dlm_isa_name(b[i].isa)) != 0) continue;
        if (only == NULL && quick && !b[i].best && i != DLM_ISA_AVX2) continue;
        bench_isa(&b[i]);
    }
    for (int i = DLM_ISA_COUNT - 1; i > DLM_ISA_AUTO; i--)
        if (b[i].pct.n > 0) bench_summary(&b[i]);
    last_line(&b[best]);
    return 0;
}
