/* bench_matmul - what share of the CPU's own multiply-add rate do the matmuls reach?

   Build:  make build/bench_matmul
   Run:    build/bench_matmul [--quick] [isa]      (isa as in DLM_ISA: avx2, ...)

   For every instruction set: squares and the weight shapes of small models, each beside
   a plain triple loop and beside a loop that multiplies and adds in registers only; that
   loop is the 100 % of pct_of_peak.  nt: weights as stored; packed: rearranged
   before; nn and tn of a weight shape: the gradients of its input and of itself. */
#define _POSIX_C_SOURCE 199309L
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

/* --[ competitors ]-----------------------------------------------------------
   The triple loops are what anyone would write first. */

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

enum { NN, NT, TN, PACKED, NAIVE_NN, NAIVE_NT, NAIVE_TN, PEAK, OPS };

static const char *const op_names[OPS] = {
    "nn", "nt", "tn", "packed", "naive_nn", "naive_nt", "naive_tn", "peak"
};

typedef struct product {                   /* one matmul, ready to run             */
    int op, M, N, K;
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
    switch (p->op) {
    case NN:       dlm_matmul_nn(p->ctx, p->out, p->a, p->b, M, N, K); break;
    case NT:       dlm_matmul_nt(p->ctx, p->out, p->a, p->b, M, N, K); break;
    case TN:       dlm_matmul_tn(p->ctx, p->out, p->a, p->b, M, N, K); break;
    case PACKED:   dlm_matmul_packed(p->ctx, p->out, p->a, p->packed, M, N, K); break;
    case NAIVE_NN: naive_nn(p->out, p->a, p->b, M, N, K); break;
    case NAIVE_NT: naive_nt(p->out, p->a, p->b, M, N, K); break;
    case NAIVE_TN: naive_tn(p->out, p->a, p->b, M, N, K); break;
    default:       sink = p->fma.loop(10000); break;
    }
}

static double product_flops(const product *p)
{
    if (p->op == PEAK) return 2.0 * 10000 * PEAK_CHAINS * p->fma.lanes;
    return 2.0 * p->M * p->N * p->K;
}

/* --[ one shape ]-------------------------------------------------------------
   All wanted operations on operands of one size, the loops beside them. */

typedef struct bench {                     /* of one instruction set               */
    dlm_ctx *ctx;
    dlm_isa  isa;
    size_t   most;
    float   *out, *a, *b, *packed;         /* (most) each, 64-byte aligned         */
    double   log_sum[PACKED + 1];          /* of pct_of_peak, large squares        */
    int      log_n[PACKED + 1];
    double   worst;                        /* least ratio_to_naive; 0: none yet    */
    char     worst_shape[64];
} bench;

#define NAIVE_MOST (256.0 * 256.0 * 256.0) /* above this the loops take too long   */

static void report(bench *b, const product *p, const bench_case *c, double top,
                   const bench_case *naive)
{
    const double pct = 100.0 * bench_median(c) / top;
    printf("%s,%s,%d,%d,%d,%.2f,%.2f,%.2f,%.1f,", dlm_isa_name(b->isa), op_names[p->op],
           p->M, p->N, p->K, 1e-9 * bench_median(c), 1e-9 * bench_min(c),
           1e-9 * bench_max(c), pct);
    if (naive != NULL) {
        const double ratio = bench_median(c) / bench_median(naive);
        printf("%.2f,%.2f,", 1e-9 * bench_median(naive), ratio);
        if (b->worst <= 0.0 || ratio < b->worst) {
            b->worst = ratio;
            snprintf(b->worst_shape, sizeof b->worst_shape, "%s %dx%dx%d",
                     op_names[p->op], p->M, p->N, p->K);
        }
    } else {
        printf(",,");
    }
    printf("%d,%d\n", BENCH_SAMPLES, bench_noisy(c));
    fflush(stdout);
    if (p->M == p->N && p->N == p->K && p->M >= 256) {
        b->log_sum[p->op] += log(pct);
        b->log_n[p->op]++;
    }
}

/* wanted: ops by bit; every op runs on (M,N,K) as it names them itself. */
static void bench_shape(bench *b, unsigned wanted, int M, int N, int K)
{
    product p[OPS];
    bench_case c[OPS];
    int n = 0, at[OPS];
    if ((double)M * N * K <= NAIVE_MOST) {
        if (wanted & 1u << NN) wanted |= 1u << NAIVE_NN;
        if (wanted & (1u << NT | 1u << PACKED)) wanted |= 1u << NAIVE_NT;
        if (wanted & 1u << TN) wanted |= 1u << NAIVE_TN;
    }
    if (wanted & 1u << PACKED) {
        if (dlm_pack_floats(b->ctx, N, K) > b->most) return;
        dlm_pack(b->ctx, b->packed, b->b, N, K);
    }
    for (int op = 0; op < OPS; op++) {
        at[op] = -1;
        if (op != PEAK && (wanted & 1u << op) == 0) continue;
        memset(&p[n], 0, sizeof p[n]);
        memset(&c[n], 0, sizeof c[n]);
        p[n].op = op;
        p[n].M = M, p[n].N = N, p[n].K = K;
        p[n].ctx = b->ctx;
        p[n].out = b->out, p[n].a = b->a, p[n].b = b->b, p[n].packed = b->packed;
        p[n].fma = peak_of(b->isa);
        c[n].run = product_run;
        c[n].arg = &p[n];
        c[n].work = product_flops(&p[n]);
        at[op] = n++;
    }
    bench_run(c, n);
    const double top = bench_median(&c[at[PEAK]]);
    for (int op = NN; op <= PACKED; op++) {
        const int loop = at[op == PACKED ? NAIVE_NT : NAIVE_NN + op];
        if (at[op] >= 0)
            report(b, &p[at[op]], &c[at[op]], top, loop >= 0 ? &c[loop] : NULL);
    }
}

/* --[ the shapes ]------------------------------------------------------------ */

static const int weight_shapes[][2] = {    /* (N, K) of linear layers, d 64 .. 768 */
    { 64, 64 }, { 172, 64 }, { 64, 172 }, { 512, 64 }, { 288, 288 }, { 768, 288 },
    { 288, 768 }, { 1536, 384 }, { 768, 768 }, { 3072, 768 }, { 50257, 768 }
};
#define WEIGHT_SHAPES ((int)(sizeof weight_shapes / sizeof weight_shapes[0]))
#define HEAD_ROWS 64                       /* the 50257 head: few rows are looked at */

static void bench_weights(bench *b, int quick)
{
    static const int rows[] = { 1, 4, 32, 64, 256, 1024 };
    const unsigned forward = 1u << NT | 1u << PACKED;
    for (int s = 0; s < WEIGHT_SHAPES; s++) {
        const int N = weight_shapes[s][0], K = weight_shapes[s][1];
        for (int r = 0; r < (int)(sizeof rows / sizeof rows[0]); r++) {
            const int M = rows[r], head = N > 10000;
            if (head ? quick || M > HEAD_ROWS : quick && M != 1 && M != 64) continue;
            if (quick && s % 2 == 1) continue;
            bench_shape(b, forward, M, N, K);
            if (quick || head) continue;
            bench_shape(b, 1u << NN, M, K, N);
            bench_shape(b, 1u << TN, N, K, M);
        }
    }
}

static void bench_summary(const bench *b, char *out, size_t size)
{
    double sum = 0.0;
    int n = 0, used;
    used = snprintf(out, size, "# %s: pct_of_peak over the squares 256 .. 1024, "
                    "geometric means:", dlm_isa_name(b->isa));
    for (int op = NN; op <= PACKED; op++) {
        sum += b->log_sum[op], n += b->log_n[op];
        used += snprintf(out + used, size - (size_t)used, " %s %.1f,", op_names[op],
                         exp(b->log_sum[op] / b->log_n[op]));
    }
    snprintf(out + used, size - (size_t)used, " all %.1f\n"
             "# %s: worst ratio_to_naive %.2f at %s\n", exp(sum / n),
             dlm_isa_name(b->isa), b->worst, b->worst_shape);
}

static void bench_isa(dlm_isa isa, int quick, char *summary, size_t size)
{
    bench b;
    float **const blocks[] = { &b.out, &b.a, &b.b, &b.packed };
    void *bases[4];
    memset(&b, 0, sizeof b);
    b.isa = isa;
    b.ctx = bench_ctx(isa, 1);
    b.most = quick ? (size_t)3072 * 1024 : (size_t)50304 * 768;
    for (int i = 0; i < 4; i++) {
        bases[i] = bench_alloc(b.most + 16, sizeof(float));
        *blocks[i] = (float *)(((uintptr_t)bases[i] + 63) & ~(uintptr_t)63);
        for (size_t j = 0; j < b.most; j++)
            (*blocks[i])[j] = (float)(int)(j * 2654435761u % 2001u) * 1e-3f - 1.0f;
    }
    for (int edge = 16; edge <= 1024; edge *= 2)
        bench_shape(&b, 1u << NN | 1u << NT | 1u << TN | 1u << PACKED, edge, edge, edge);
    bench_weights(&b, quick);
    bench_summary(&b, summary, size);
    for (int i = 0; i < 4; i++) free(bases[i]);
    dlm_shutdown(b.ctx);
}

int main(int argc, char **argv)
{
    const int quick = argc > 1 && strcmp(argv[1], "--quick") == 0;
    const char *only = argc > 1 + quick ? argv[1 + quick] : NULL;
    char summary[DLM_ISA_COUNT][512] = { { 0 } };
    dlm_ctx *ctx = bench_ctx(DLM_ISA_AUTO, 1);
    const dlm_isa best = dlm_active_isa(ctx);
    dlm_shutdown(ctx);
    bench_context("bench_matmul", quick ? "the best and avx2" : "all of this CPU", "1");
    printf("isa,op,M,N,K,gflops_median,gflops_min,gflops_max,pct_of_peak,naive_gflops,"
           "ratio_to_naive,samples,noisy\n");
    for (int i = DLM_ISA_COUNT - 1; i > DLM_ISA_AUTO; i--) {
        const dlm_isa isa = (dlm_isa)i;
        if (!dlm_isa_supported(isa)) continue;
        if (only != NULL && strcmp(only, dlm_isa_name(isa)) != 0) continue;
        if (only == NULL && quick && isa != best && isa != DLM_ISA_AVX2) continue;
        bench_isa(isa, quick, summary[i], sizeof summary[i]);
    }
    for (int i = DLM_ISA_COUNT - 1; i > DLM_ISA_AUTO; i--) fputs(summary[i], stdout);
    return 0;
}
