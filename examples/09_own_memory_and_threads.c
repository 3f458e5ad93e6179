/* 09_own_memory_and_threads.c - no malloc, and threads that belong to the program.

   Build:  cc -O2 -I.. 09_own_memory_and_threads.c -lm -pthread
   See:    the bytes each object takes of one static block, then the same training run
           on one thread and on the program's own fork and join: the same loss, and the
           same weights to the last bit. */
#define DLM_MALLOC(size) ((void)(size), (void *)0)   /* the library must do without   */
#define DLM_FREE(ptr)    ((void)(ptr))
#define DLM_IMPLEMENTATION
#include "dlm.h"
#include <pthread.h>
#include <stdio.h>
#include <string.h>

enum { WORKERS = 2, STEPS = 50, T = 32 };

/* ---- memory: a stack of 64-byte aligned pieces, emptied all at once ---- */

static unsigned char memory[24 << 20];
static size_t used;

static void *take(void *user, size_t size)
{
    size_t base = (size_t)(-(uintptr_t)memory & 63), at = base + used;
    (void)user;
    if (at > sizeof memory || size > sizeof memory - at) return NULL;
    used += (size + 63) & ~(size_t)63;
    return memory + at;
}

static void keep(void *user, void *ptr) { (void)user, (void)ptr; }

static void place(const char *what, dlm_memory *m)   /* size: what was asked for      */
{
    m->base = take(NULL, m->size);
    printf("  %-10s %9lu bytes%s\n", what, (unsigned long)m->size,
           m->base ? "" : "  do not fit");
}

/* ---- threads: worker w runs the jobs w, w + WORKERS, ... ---- */

struct share {
    int    first, n;
    void (*job)(void *arg, int i);
    void  *arg;
};

static void *work(void *user)
{
    struct share *s = user;
    for (int i = s->first; i < s->n; i += WORKERS) s->job(s->arg, i);
    return NULL;
}

static void fork_join(void *user, int n, void (*job)(void *arg, int i), void *arg)
{
    struct share s[WORKERS];
    pthread_t thread[WORKERS];
    int started[WORKERS] = {0};
    (void)user;
    for (int w = WORKERS - 1; w >= 0; w--) { /* the caller is worker 0               */
        s[w].first = w, s[w].n = n, s[w].job = job, s[w].arg = arg;
        if (w > 0 && w < n) started[w] = !pthread_create(&thread[w], NULL, work, &s[w]);
        if (!started[w]) work(&s[w]);
    }
    for (int w = 1; w < WORKERS; w++)
        if (started[w]) pthread_join(thread[w], NULL);
}

/* ---- a run ---- */

static uint32_t checksum(const dlm_model *m)         /* FNV-1a over the weights       */
{
    const unsigned char *byte = (const unsigned char *)m->weights;
    uint32_t sum = 2166136261u;
    for (size_t i = 0; i < m->n_params * sizeof *m->weights; i++)
        sum = (sum ^ byte[i]) * 16777619u;
    return sum;
}

static dlm_error run(const char *name, dlm_options options, uint32_t *sum)
{
    static const char text[] = "one two three four five six seven eight nine ten eleven ";
    int ids[sizeof text];
    size_t n = 0;
    dlm_ctx *ctx = NULL;
    dlm_tokenizer *tok = NULL;
    dlm_model *model = NULL;
    dlm_trainer *trainer = NULL;
    dlm_config cfg = {0};
    dlm_train_options how = {0};
    dlm_report r = {0};
    char why[256] = "";                      /* for a context that fails             */

    used = 0;
    printf("%s\n", name);
    options.message = why, options.message_size = sizeof why;
    options.memory.size = dlm_ctx_bytes(&options);
    place("context", &options.memory);
    dlm_error e = dlm_init(&ctx, &options);
    if (!e) e = dlm_tokenizer_create(&tok, ctx, DLM_TOKENIZER_CHARS, text, strlen(text));
    if (!e) e = dlm_encode(tok, text, strlen(text), ids, sizeof text, &n);

    cfg.vocab = e ? 0 : tok->vocab;
    cfg.dim = 64, cfg.layers = 2, cfg.heads = 2, cfg.max_seq = T;
    how.max_rows = 8 * T;
    dlm_memory mem = {0};                    /* a creator without out only asks      */
    if (!e) e = dlm_model_create(NULL, ctx, &cfg, 1, &mem);
    if (!e) place("model", &mem);
    if (!e) e = dlm_model_create(&model, ctx, &cfg, 1, &mem);
    if (!e) e = dlm_trainer_create(NULL, ctx, model, &how, &mem);
    if (!e) place("trainer", &mem);
    if (!e) e = dlm_trainer_create(&trainer, ctx, model, &how, &mem);
    for (int step = 0; step < STEPS && !e; step++)
        e = dlm_trainer_step_text(trainer, ids, n, T, 8, &r);
    if (!e) {
        *sum = checksum(model);
        printf("  loss %.4f after %d steps, weights %08lx\n", r.loss, STEPS,
               (unsigned long)*sum);
    } else {
        fprintf(stderr, "%s: %s\n", dlm_error_string(e),
                *why ? why : dlm_last_error(ctx));
    }
    dlm_trainer_free(trainer);
    dlm_model_free(model);
    dlm_tokenizer_free(tok);
    dlm_shutdown(ctx);
    return e;
}

int main(int argc, char **argv)
{
    dlm_options options = {0};
    uint32_t one = 0, own = 0;
    if (argc > 1) {
        puts("usage: own_memory_and_threads        it takes no arguments");
        return strcmp(argv[1], "--help") ? 2 : 0;
    }
    options.allocator.alloc = take;          /* the tokenizer asks it                */
    options.allocator.release = keep;
    if (run("one thread", options, &one)) return 1;
    options.threads = WORKERS;
    options.parallel_for = fork_join;
    if (run("own threads", options, &own)) return 1;
    printf("the weights are %s\n", one == own ? "the same" : "NOT the same");
    return one != own;
}
