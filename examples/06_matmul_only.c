/* 06_matmul_only.c - the library without a model: three matrix products.

   Build:  cc -O2 -I.. 06_matmul_only.c -lm -pthread
   See:    one row per orientation and size: the largest difference from a plain triple
           loop and the speed of both, in GFLOP/s (a multiply-add counts as two).
           DLM_ISA=scalar (or sse2, avx2, ...) in the environment picks the kernels. */
#define DLM_IMPLEMENTATION
#include "dlm.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { LARGEST = 512 };

typedef void (*product)(dlm_ctx *ctx, float *out, const float *a, const float *b,
                        int M, int N, int K);

/* out (M,N): element (m,k) of a stands at a[m*am + k*ak], (k,n) of b likewise. */
static void naive(float *out, const float *a, int am, int ak, const float *b, int bk,
                  int bn, int M, int N, int K)
{
    for (int m = 0; m < M; m++) {
        for (int n = 0; n < N; n++) {
            float sum = 0.0f;
            for (int k = 0; k < K; k++) sum += a[m * am + k * ak] * b[k * bk + n * bn];
            out[m * N + n] = sum;
        }
    }
}

static double seconds(void) { return (double)clock() / CLOCKS_PER_SEC; }

/* Best GFLOP/s of several runs; there is one thread, so processor time is right. */
static double speed(dlm_ctx *ctx, product f, float *out, const float *a, const float *b,
                    int n)
{
    double best = 0.0, flops = 2.0 * n * n * n;
    int runs = (int)(2e8 / flops) + 1;
    for (int k = 0; k < 5; k++) {
        double t0 = seconds();
        for (int r = 0; r < runs; r++) f(ctx, out, a, b, n, n, n);
        double g = flops * runs / (seconds() - t0) * 1e-9;
        if (g > best) best = g;
    }
    return best;
}

/* Compares and times one product; returns the largest difference. */
static double check(dlm_ctx *ctx, int form, float *buffer, int n)
{
    static const char *const names[] = {"nn", "nt", "tn"};
    static const product f[] = {dlm_matmul_nn, dlm_matmul_nt, dlm_matmul_tn};
    size_t nn = (size_t)n * (size_t)n;
    float *a = buffer, *b = a + LARGEST * LARGEST;
    float *out = b + LARGEST * LARGEST, *want = out + LARGEST * LARGEST;
    double t0 = seconds(), worst = 0.0;

    naive(want, a, form == 2 ? 1 : n, form == 2 ? n : 1, b, form == 1 ? 1 : n,
          form == 1 ? n : 1, n, n, n);
    double plain = 2.0 * n * n * n / (seconds() - t0 + 1e-9) * 1e-9;
    double g = speed(ctx, f[form], out, a, b, n);
    for (size_t i = 0; i < nn; i++) {
        double difference = fabs((double)out[i] - want[i]);
        if (difference > worst) worst = difference;
    }
    printf("%-5s %5d %14.2e %12.2f %12.2f\n", names[form], n, worst, plain, g);
    return worst;
}

int main(int argc, char **argv)
{
    static const int sizes[] = {64, 100, 256, LARGEST};
    dlm_address at = {1, DLM_RANDOM_USER, 0, 0, 0};
    dlm_ctx *ctx = NULL;
    size_t count = 4 * (size_t)LARGEST * LARGEST;
    float *buffer = malloc(count * sizeof *buffer);
    int wrong = 0;
    char why[256] = "out of memory";
    dlm_options options = {0};
    if (argc > 1) {
        puts("usage: matmul_only        it takes no arguments");
        return strcmp(argv[1], "--help") ? 2 : 0;
    }
    options.message = why, options.message_size = sizeof why;
    dlm_error e = dlm_init(&ctx, &options);

    if (e != DLM_OK || !buffer) {
        fprintf(stderr, "%s\n", why);
        free(buffer);
        dlm_shutdown(ctx);
        return 1;
    }
    for (size_t i = 0; i < count; i++)
        buffer[i] = (float)(2.0 * dlm_uniform(&at, (uint32_t)i) - 1.0);
    printf("kernels: %s, one thread\n\n", dlm_isa_name(dlm_active_isa(ctx)));
    printf("%-5s %5s %14s %12s %12s\n", "form", "size", "worst diff.", "naive GF/s",
           "dlm GF/s");
    for (int form = 0; form < 3; form++)
        for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++)
            wrong |= !(check(ctx, form, buffer, sizes[s]) < 1e-4);
    free(buffer);
    dlm_shutdown(ctx);
    return wrong;
}
