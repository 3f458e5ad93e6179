/* bench_matmul - what share of the CPU's own multiply-add rate do the matmuls reach?

   Build:  make build/bench_matmul
   Run:    build/bench_matmul [--quick] [isa]      (isa as in DLM_ISA: avx2, ...)

   For every instruction set: squares and the weight shapes of small models, each beside
   a plain triple loop and beside a loop that multiplies and adds in registers only; that
   loop is the 100 % of pct_of_peak.  nt: weights as stored; packed: rearranged
   before; nn and tn of a weight shape: the gradients of its input and of itself.
   bf16 and int8: packed weights of that type.  They take and give
   f32, so that narrowing the activations is part of the time; their pct_of_peak is of
   the same f32 loop and can exceed 100.

   The best instruction set also meets the libraries OpenBLAS, BLIS and oneDNN, where
   they are installed: best_peer is the fastest of them on the same row, rows "packed"
   have none.  Those of bf16 and int8 (oneDNN alone) get both factors narrowed before
   and give int8 as unscaled integers: they have nothing to convert.

   The last line is of that instruction set too, and of f32 alone: geometric means of
   the ratio (nn, nt, tn) and of pct_of_peak (M >= 32, packed as well), and the worst
   ratio.  Comments before it have the same for the squares and for bf16 and int8.
   avx512 is left out, unless it is named, where the best has the same f32 kernels.
   --quick leaves out most shapes, gemv, and the triple loops where there is a library. */
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
    case DLM_ISA_AVX512: case DLM_ISA_AVX512BF16: case DLM_ISA_AMX:
        p.loop = peak_avx512;
        p.lanes = 16;
        break;
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

enum { NN, NT, TN, PACKED, PACKED_BF16, PACKED_I8, NAIVE_NN, NAIVE_NT, NAIVE_TN, PEAK };
enum { F32, BF16, I8, WIDTHS };            /* what the factors are kept in         */

static const char *const op_names[] = { "nn", "nt", "tn", "packed", "bf16", "int8" };
static const dlm_dtype types[WIDTHS] = { DLM_F32, DLM_BF16, DLM_I8 };

static int width_of(int op)
{
    return op == PACKED_BF16 ? BF16 : op == PACKED_I8 ? I8 : F32;
}

static int transposed_b(int op) { return op == NT || (op >= PACKED && op <= PACKED_I8); }

static void naive_run(int op, float *out, const float *a, const float *b, int M, int N,
                      int K)
{
    (op == NN ? naive_nn : op == TN ? naive_tn : naive_nt)(out, a, b, M, N, K);
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
typedef int (*onednn_bf16)(char trans_a, char trans_b, int64_t M, int64_t N, int64_t K,
                           float alpha, const uint16_t *a, int64_t lda,
                           const uint16_t *b, int64_t ldb, float beta, float *c,
                           int64_t ldc);
typedef int (*onednn_int8)(char trans_a, char trans_b, char kind_of_shift, int64_t M,
                           int64_t N, int64_t K, float alpha, const int8_t *a,
                           int64_t lda, int8_t zero_a, const int8_t *b, int64_t ldb,
                           int8_t zero_b, float beta, int32_t *c, int64_t ldc,
                           const int32_t *shift);

typedef struct peer {                      /* has one of the five                  */
    const char *name;
    cblas_gemm  gemm;
    cblas_gemv  gemv;                      /* of one row and weights as stored     */
    onednn_gemm onednn;
    onednn_bf16 bf16;
    onednn_int8 int8;
} peer;

#define LIBRARIES  3
#define CALLS      4                       /* gemm, gemv, bf16, int8               */
#define MOST_PEERS (CALLS * LIBRARIES)

static int peer_can(const peer *r, int op, int M)
{
    if (op >= PACKED) return op == PACKED_BF16 ? r->bf16 != NULL
                           : op == PACKED_I8 && r->int8 != NULL;
    return r->gemm || r->onednn || (r->gemv && op == NT && M == 1);
}

/* Floats; bf16 has words of it in a and b, int8 bytes there and integers in out. */
static void peer_run(const peer *r, int op, void *out, const void *a, const void *b,
                     int M, int N, int K)
{
    const int at = op == TN, bt = transposed_b(op), lda = at ? M : K, ldb = bt ? K : N;
    const int32_t shift = 0;
    if (r->int8)
        r->int8('N', 'T', 'F', M, N, K, 1.0f, a, K, 0, b, K, 0, 0.0f, out, N, &shift);
    else if (r->bf16)
        r->bf16('N', 'T', M, N, K, 1.0f, a, K, b, K, 0.0f, out, N);
    else if (r->onednn)
        r->onednn(at ? 'T' : 'N', bt ? 'T' : 'N', M, N, K, 1.0f, a, lda, b, ldb, 0.0f,
                  out, N);
    else if (r->gemm)
        r->gemm(ROW_MAJOR, at ? TRANS : NO_TRANS, bt ? TRANS : NO_TRANS, M, N, K, 1.0f,
                a, lda, b, ldb, 0.0f, out, N);
    else
        r->gemv(ROW_MAJOR, NO_TRANS, N, K, 1.0f, b, K, a, 1, 0.0f, out, 1);
}

/* What such a peer is given for n floats: bf16, to nearest even, or int8 of x * scale. */
static void narrow(int width, void *out, const float *x, size_t n, float scale)
{
    uint16_t *words = (uint16_t *)out;
    int8_t *bytes = (int8_t *)out;
    for (size_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, &x[i], sizeof bits);
        bits += 0x7fff + (bits >> 16 & 1);
        if (width == BF16) words[i] = (uint16_t)(bits >> 16);
        else bytes[i] = (int8_t)(x[i] * scale);
    }
}

#ifdef HAVE_PEERS

enum { TRIAL_M = 3, TRIAL_N = 5, TRIAL_K = 7 };

/* The peer's product of small whole numbers, which every width holds exactly. */
static void peer_try(const peer *r, int op, float *out, const float *a, const float *b,
                     int M)
{
    uint16_t words_a[TRIAL_M * TRIAL_K], words_b[TRIAL_N * TRIAL_K];
    int32_t sums[TRIAL_M * TRIAL_N] = { 0 };
    const int width = width_of(op);
    memset(out, 0, TRIAL_M * TRIAL_N * sizeof *out);
    if (width == F32) {
        peer_run(r, op, out, a, b, M, TRIAL_N, TRIAL_K);
        return;
    }
    narrow(width, words_a, a, TRIAL_M * TRIAL_K, 1.0f);
    narrow(width, words_b, b, TRIAL_N * TRIAL_K, 1.0f);
    peer_run(r, op, width == I8 ? (void *)sums : out, words_a, words_b, M, TRIAL_N,
             TRIAL_K);
    for (int i = 0; width == I8 && i < M * TRIAL_N; i++) out[i] = (float)sums[i];
}

/* A rival that computes something else, or nothing, would be no rival. */
static int peer_agrees(const peer *r)
{
    float a[TRIAL_M * TRIAL_K], b[TRIAL_N * TRIAL_K];
    float want[TRIAL_M * TRIAL_N], got[TRIAL_M * TRIAL_N];
    int tried = 0;
    for (int i = 0; i < TRIAL_M * TRIAL_K; i++) a[i] = (float)(i % 4) - 1.0f;
    for (int i = 0; i < TRIAL_N * TRIAL_K; i++) b[i] = (float)(i % 6) - 2.0f;
    for (int op = NN; op <= PACKED_I8; op++)
        for (int M = 1; M <= TRIAL_M; M++) {
            if (!peer_can(r, op, M)) continue;
            naive_run(op, want, a, b, M, TRIAL_N, TRIAL_K);
            peer_try(r, op, got, a, b, M);
            for (int i = 0; i < M * TRIAL_N; i++)
                if (!(fabsf(got[i] - want[i]) < 1e-3f)) return 0;
            tried = 1;
        }
    return tried;
}

static void symbol(void *library, const char *name, void *function)
{
    void *address = dlsym(library, name);
    memcpy(function, &address, sizeof address);
}

/* With the kernels that the library chose for this CPU, if it says which, and those of
   its calls that agree. */
static void library_print(const char *file, void *library, const peer *usable, int n)
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
    printf(n > 0 ? ", as" : ", has no call that agrees with ours");
    for (int i = 0; i < n; i++) printf(" %s", usable[i].name);
    printf("\n");
}

/* Its calls, one peer each; returns how many agree. */
static int library_peers(void *library, const char *const names[CALLS], peer *peers)
{
    peer found[CALLS];
    int n = 0;
    memset(found, 0, sizeof found);
    symbol(library, "cblas_sgemm", &found[0].gemm);
    symbol(library, "dnnl_sgemm", &found[0].onednn);
    symbol(library, "cblas_sgemv", &found[1].gemv);
    symbol(library, "dnnl_gemm_bf16bf16f32", &found[2].bf16);
    symbol(library, "dnnl_gemm_s8s8s32", &found[3].int8);
    for (int i = 0; i < CALLS; i++) {
        found[i].name = names[i];
        if (peer_agrees(&found[i])) peers[n++] = found[i];
    }
    return n;
}

/* Where the library has both, gemv stands beside gemm: which is faster depends on the
   size. */
static int peers_find(peer *peers)
{
    static const struct { const char *files[2], *names[CALLS]; } known[LIBRARIES] = {
        { { "libopenblas.so.0", "libopenblas.so" }, { "openblas", "openblas_gemv" } },
        { { "libblis.so.4", "libblis.so" }, { "blis", "blis_gemv" } },
        { { "libdnnl.so.3", "libdnnl.so.2" },
          { "onednn", NULL, "onednn_bf16", "onednn_int8" } }
    };
    static const char *const threads[] = {
        "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "BLIS_NUM_THREADS"
    };
    int n = 0;
    for (int i = 0; i < 3; i++) setenv(threads[i], "1", 1);
    for (int i = 0; i < LIBRARIES; i++) {
        const char *const *file = known[i].files;
        const int before = n;
        void *library = dlopen(*file, RTLD_NOW | RTLD_LOCAL);
        if (library == NULL) library = dlopen(*++file, RTLD_NOW | RTLD_LOCAL);
        printf("# peer     %s: ", known[i].names[0]);
        if (library == NULL) {
            printf("not found\n");
            continue;
        }
        n += library_peers(library, known[i].names, peers + n);
        library_print(*file, library, peers + before, n - before);
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
    void   *out;                           /* see peer_run; else floats            */
    const void  *a, *b;
    const dlm_matrix *packed;
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
    case PACKED: case PACKED_BF16: case PACKED_I8:
        dlm_matmul(p->ctx, p->out, p->a, p->packed, M);
        break;
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
    float   *out, *a, *b, *words[WIDTHS];  /* (most) each, 64-byte aligned, as are */
    void    *peer_a[WIDTHS], *peer_b[WIDTHS];  /* a and b in bf16 and int8         */
    dlm_matrix packed[WIDTHS];             /* b of this line-up                    */
    mean     squares[PACKED + 1];          /* pct_of_peak of the large ones, by op */
    mean     pct, vs_peer;
    lowest   vs_naive, worst;
    mean     vs_f32[WIDTHS], narrow_vs_peer[WIDTHS];   /* of bf16 and int8: to packed,
                                              to the best peer; M >= 32            */
} bench;

/* --[ one line-up ]-----------------------------------------------------------
   Products that take turns: ours, the loops, the peers, and the peak once. */

#define MOST_CASES ((PACKED_I8 + 1) * (1 + MOST_PEERS) + 3 + 1)
#define NAIVE_MOST (256.0 * 256.0 * 256.0) /* above this the loops take too long   */

typedef struct lineup {
    bench     *b;
    product    p[MOST_CASES];
    bench_case c[MOST_CASES];
    int        n;
} lineup;

static void lineup_case(lineup *l, int op, const peer *rival, int M, int N, int K)
{
    bench *b = l->b;
    const int width = width_of(op), narrowed = rival != NULL && width != F32;
    product *p = &l->p[l->n];
    bench_case *c = &l->c[l->n++];
    memset(p, 0, sizeof *p);
    memset(c, 0, sizeof *c);
    p->op = op, p->rival = rival;
    p->M = M, p->N = N, p->K = K;
    p->ctx = b->ctx;
    p->out = b->out, p->packed = &b->packed[width];
    p->a = narrowed ? b->peer_a[width] : b->a;
    p->b = narrowed ? b->peer_b[width] : b->b;
    p->fma = peak_of(b->isa);
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

/* The triple loop that op is compared with, or -1. */
static int loop_of(int op)
{
    return op == PACKED ? NAIVE_NT : op < PACKED ? NAIVE_NN + op : -1;
}

/* One operation and all that compete with it; packed shares the loop of nt. */
static void lineup_add(lineup *l, int op, int M, int N, int K)
{
    bench *b = l->b;
    const int loop = loop_of(op), width = width_of(op);
    const int loops = loop >= 0 && (double)M * N * K <= NAIVE_MOST
                   && !(b->quick && b->n_peers > 0);
    if (op >= PACKED) {
        const dlm_dtype type = types[width];
        if (dlm_pack_bytes(b->ctx, type, N, K) > b->most * sizeof(float)) return;
        b->packed[width] = dlm_pack(b->ctx, b->words[width], type, b->b, N, K);
    }
    lineup_case(l, op, NULL, M, N, K);
    if (loops && !lineup_has(l, loop)) lineup_case(l, loop, NULL, M, N, K);
    for (int i = 0; b->best && i < b->n_peers; i++)
        if (peer_can(&b->peers[i], op, M) && !(b->quick && b->peers[i].gemv))
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

/* naive and best: the loop and the peer that p met, or -1. */
static void score(lineup *l, int i, int naive, int best, double pct)
{
    bench *b = l->b;
    const product *p = &l->p[i];
    const int width = width_of(p->op), f32 = lineup_fastest(l, PACKED, 0);
    const double own = bench_median(&l->c[i]);
    const double peer_ratio = best < 0 ? 0.0 : own / bench_median(&l->c[best]);
    if (width != F32) {
        if (p->M < 32) return;
        if (f32 >= 0) mean_add(&b->vs_f32[width], own / bench_median(&l->c[f32]));
        if (best >= 0) mean_add(&b->narrow_vs_peer[width], peer_ratio);
        return;
    }
    if (naive >= 0) lowest_add(&b->vs_naive, own / bench_median(&l->c[naive]), p);
    if (best >= 0) {
        mean_add(&b->vs_peer, peer_ratio);
        lowest_add(&b->worst, peer_ratio, p);
    }
    if (p->M >= 32) mean_add(&b->pct, pct);
    if (p->M == p->N && p->N == p->K && p->M >= 256) mean_add(&b->squares[p->op], pct);
}

static void report(lineup *l, int i, double top)
{
    const product *p = &l->p[i];
    const bench_case *c = &l->c[i];
    const double own = bench_median(c), pct = 100.0 * own / top;
    const int naive = lineup_fastest(l, loop_of(p->op), 0);
    const int best = lineup_fastest(l, p->op, 1);
    printf("%s,%s,%d,%d,%d,%.2f,%.2f,%.2f,%.1f,", dlm_isa_name(l->b->isa),
           op_names[p->op], p->M, p->N, p->K, 1e-9 * own, 1e-9 * bench_min(c),
           1e-9 * bench_max(c), pct);
    if (naive >= 0) {
        const double loop = bench_median(&l->c[naive]);
        printf("%.2f,%.2f,", 1e-9 * loop, own / loop);
    } else {
        printf(",,");
    }
    if (best >= 0) {
        const double rival = bench_median(&l->c[best]);
        printf("%s,%.2f,%.3f,", l->p[best].rival->name, 1e-9 * rival, own / rival);
    } else {
        printf(",,,");
    }
    printf("%d,%d\n", BENCH_SAMPLES,
           bench_noisy(c) || (best >= 0 && bench_noisy(&l->c[best])));
    fflush(stdout);
    score(l, i, naive, best, pct);
}

static void lineup_run(lineup *l)
{
    lineup_case(l, PEAK, NULL, 0, 0, 0);
    bench_run(l->c, l->n);
    const double top = bench_median(&l->c[l->n - 1]);
    for (int i = 0; i < l->n; i++)
        if (l->p[i].op <= PACKED_I8 && l->p[i].rival == NULL) report(l, i, top);
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
    const int brief = b->quick && !b->best;
    for (int edge = brief ? 1024 : b->quick ? 64 : 16; edge <= 1024;
         edge *= b->quick ? 4 : 2) {
        lineup l;
        l.b = b, l.n = 0;
        for (int op = NN; op <= (brief ? PACKED : PACKED_I8); op++)
            lineup_add(&l, op, edge, edge, edge);
        lineup_run(&l);
    }
}

static void bench_weight(bench *b, int M, int N, int K)
{
    lineup l;
    l.b = b, l.n = 0;
    lineup_add(&l, NT, M, N, K);
    for (int op = PACKED; op <= PACKED_I8; op++) lineup_add(&l, op, M, N, K);
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

#define MOST_BLOCKS (3 + 3 * WIDTHS)

typedef struct blocks {                    /* what an instruction set frees        */
    void *base[MOST_BLOCKS];
    int   n;
} blocks;

static void *block(blocks *own, size_t bytes)
{
    void *base = bench_alloc(bytes + 64, 1);
    own->base[own->n++] = base;
    return (void *)(((uintptr_t)base + 63) & ~(uintptr_t)63);
}

static void fill(float *x, size_t n)       /* -1 .. 1                              */
{
    for (size_t i = 0; i < n; i++)
        x[i] = (float)(int)(i * 2654435761u % 2001u) * 1e-3f - 1.0f;
}

static void bench_open(bench *b, blocks *own)
{
    b->most = b->quick ? (size_t)1024 * 1024 : (size_t)50304 * 768;
    b->out = (float *)block(own, b->most * sizeof(float));
    b->a = (float *)block(own, b->most * sizeof(float));
    b->b = (float *)block(own, b->most * sizeof(float));
    fill(b->a, b->most);
    fill(b->b, b->most);
    b->ctx = bench_ctx(b->isa, 1);
    for (int w = F32; w < WIDTHS; w++) {
        b->words[w] = (float *)block(own, b->most * sizeof(float));
        if (w == F32 || !b->best || b->n_peers == 0) continue;
        b->peer_a[w] = block(own, b->most * sizeof(uint16_t));
        b->peer_b[w] = block(own, b->most * sizeof(uint16_t));
        narrow(w, b->peer_a[w], b->a, b->most, 127.0f);
        narrow(w, b->peer_b[w], b->b, b->most, 127.0f);
    }
}

static void bench_isa(bench *b)
{
    blocks own = { { NULL }, 0 };
    bench_open(b, &own);
    bench_squares(b);
    if (b->best || !b->quick) bench_weights(b);
    dlm_shutdown(b->ctx);
    while (own.n > 0) free(own.base[--own.n]);
}

static void summary_narrow(const bench *b)
{
    const char *between = " ";
    if (b->vs_f32[BF16].n + b->vs_f32[I8].n == 0) return;
    printf("# %s:", dlm_isa_name(b->isa));
    for (int i = 0; i < 2 * (WIDTHS - 1); i++) {
        const int w = BF16 + i % 2, peers = i >= 2;
        const mean *m = peers ? &b->narrow_vs_peer[w] : &b->vs_f32[w];
        if (m->n == 0) continue;
        printf("%s%s / %s %.2f", between, w == BF16 ? "bf16" : "int8",
               peers ? "best peer" : "packed f32", mean_of(m));
        between = ", ";
    }
    printf(" (geometric means, M >= 32)\n");
}

static void bench_summary(const bench *b)
{
    mean all = { 0.0, 0 };
    printf("# %s: pct_of_peak over the squares from 256 on, geometric means:",
           dlm_isa_name(b->isa));
    for (int op = NN; op <= PACKED; op++) {
        all.log_sum += b->squares[op].log_sum, all.n += b->squares[op].n;
        printf(" %s %.1f,", op_names[op], mean_of(&b->squares[op]));
    }
    printf(" all %.1f\n", mean_of(&all));
    if (b->vs_naive.shape[0])
        printf("# %s: worst ratio_to_naive %.2f at %s\n", dlm_isa_name(b->isa),
               b->vs_naive.ratio, b->vs_naive.shape);
    summary_narrow(b);
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

/* avx512bf16 and amx have the f32 kernels of avx512. */
static int chosen(dlm_isa isa, dlm_isa best, int quick, const char *only)
{
    if (!dlm_isa_supported(isa)) return 0;
    if (only != NULL) return strcmp(only, dlm_isa_name(isa)) == 0;
    if (quick) return isa == best || isa == DLM_ISA_AVX2;
    return isa != DLM_ISA_AVX512
        || (best != DLM_ISA_AVX512BF16 && best != DLM_ISA_AMX);
}

/* The ISA that is asked for, or NULL. */
static const char *read_only(int argc, char **argv, int first)
{
    const char *const usage = "bench_matmul [--quick] [one isa of this CPU]";
    if (argc > first + 1) bench_usage(usage, argv[first + 1]);
    for (int i = DLM_ISA_SCALAR; i < DLM_ISA_COUNT && argc > first; i++)
        if (chosen((dlm_isa)i, DLM_ISA_AUTO, 0, argv[first])) return argv[first];
    if (argc > first) bench_usage(usage, argv[first]);
    return NULL;
}

int main(int argc, char **argv)
{
    const int quick = argc > 1 && strcmp(argv[1], "--quick") == 0;
    const char *only = read_only(argc, argv, 1 + quick);
    peer peers[MOST_PEERS];
    bench b[DLM_ISA_COUNT];
    dlm_ctx *ctx = bench_ctx(DLM_ISA_AUTO, 1);
    const dlm_isa best = dlm_active_isa(ctx);
    dlm_shutdown(ctx);
    memset(b, 0, sizeof b);
    bench_context("bench_matmul", only ? only : quick ? "the best and avx2"
                  : chosen(DLM_ISA_AVX512, best, 0, NULL)
                    || !dlm_isa_supported(DLM_ISA_AVX512) ? "all of this CPU"
                  : "all of this CPU but avx512", "1");
    const int n_peers = peers_find(peers);
    printf("isa,op,M,N,K,gflops_median,gflops_min,gflops_max,pct_of_peak,naive_gflops,"
           "ratio_to_naive,best_peer,peer_gflops,ratio,samples,noisy\n");
    for (int i = DLM_ISA_COUNT - 1; i > DLM_ISA_AUTO; i--) {
        b[i].isa = (dlm_isa)i;
        b[i].quick = quick;
        b[i].peers = peers;
        b[i].n_peers = n_peers;
        b[i].best = b[i].isa == best;
        if (chosen(b[i].isa, best, quick, only)) bench_isa(&b[i]);
    }
    for (int i = DLM_ISA_COUNT - 1; i > DLM_ISA_AUTO; i--)
        if (b[i].pct.n > 0) bench_summary(&b[i]);
    last_line(&b[best]);
    return 0;
}
