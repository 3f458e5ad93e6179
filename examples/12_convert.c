/* 12_convert.c - make a block-diffusion model of an autoregressive one (OPDLM).

   Build:  cc -O2 -I.. 12_convert.c -o convert -lm -pthread
   Run:    ./convert MODEL TOKENIZER OUT.safetensors [minutes, else 2]
           MODEL is a llama2.c .bin file with its TOKENIZER, or a checkpoint of ours with
           its tokenizer in it (TOKENIZER is then "-").  Then: 13_continue.
   See:    a line per round; at the end what the teacher thinks of samples of both. */
#define DLM_IMPLEMENTATION
#include "dlm.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { THREADS = 2, TEXTS = 128, T = 65, UPDATE = 8, BLOCK = 4, V = 1024 };
static int text[TEXTS][T], step[TEXTS][T];   /* what is written, and when            */
static dlm_example ex[TEXTS];
static dlm_ctx *ctx;
static dlm_model *teacher, *student;
static int begin;                            /* the token that every text begins with */
static char why[256];                        /* for a context that fails             */

static void require(dlm_error e)
{
    if (e == DLM_OK) return;
    fprintf(stderr, "%s: %s\n", dlm_error_string(e), *why ? why : dlm_last_error(ctx));
    exit(1);
}

static void refuse(const char *path, const char *sentence)
{
    fprintf(stderr, "%s: %s\n", path, sentence);
    exit(1);
}

/* Writes all texts: one token per step, or where sure more (threshold 0.9).  Returns
   tokens per step. */
static double write_texts(const dlm_model *m, int threshold, int round)
{
    uint32_t ids[TEXTS];
    int lengths[TEXTS];
    dlm_limits limits = {0};
    dlm_sample_options how = {0};
    dlm_session *s;
    dlm_sampler *sm;
    double tokens = 0, rounds = 0;
    limits.seqs = TEXTS, limits.slots = T, limits.rows = 2 * TEXTS * BLOCK;
    limits.cached = 1;
    how.order = threshold ? DLM_ORDER_THRESHOLD : DLM_ORDER_SEQUENTIAL;
    how.left_first = 1;                      /* the student ignores its right        */
    how.temperature = 1, how.ids = ids, how.stop = &begin, how.n_stop = 1;
    for (int i = 0; i < TEXTS; i++) {
        ids[i] = (uint32_t)(TEXTS * round + i), lengths[i] = T, text[i][0] = begin;
        for (int k = 1; k < T; k++) text[i][k] = m->config.mask_id;
    }
    require(dlm_session_create(&s, ctx, m, &limits, NULL));
    require(dlm_sampler_create(&sm, s, &how, NULL));
    require(dlm_sampler_begin(sm, text[0], lengths, TEXTS));
    while (!dlm_sampler_done(sm)) require(dlm_sampler_step(sm));
    for (int i = 0, last = 0; i < TEXTS; i++, rounds += last, last = 0) {
        dlm_sampler_steps(sm, i, step[i]);
        ex[i].tokens = text[i], ex[i].prompt = 1, ex[i].steps = step[i];
        ex[i].length = dlm_sampler_length(sm, i), tokens += ex[i].length - 1;
        for (int k = 0; k < ex[i].length; k++) if (step[i][k] > last) last = step[i][k];
    }
    dlm_sampler_free(sm), dlm_session_free(s);
    return tokens / rounds;
}

/* Writes texts and prints what the teacher thinks of them, and how varied they are. */
static void judge(const char *name, const dlm_model *m, int threshold)
{
    static unsigned char seen[V][V];
    double nats = 0, tokens = 0, pairs = 0, different = 0, log_p;
    const double per_step = write_texts(m, threshold, 1 << 20);
    dlm_session *s;
    memset(seen, 0, sizeof seen);
    require(dlm_session_create(&s, ctx, teacher, NULL, NULL));
    for (int i = 0; i < TEXTS; i++) {
        require(dlm_log_likelihood(s, text[i], ex[i].length, 1, 1, 0, &log_p));
        nats -= log_p, tokens += ex[i].length - 1;
        for (int k = 2; k < ex[i].length; k++, pairs++)
            different += !seen[text[i][k - 1] % V][text[i][k] % V]++;
    }
    printf("%-27s teacher's NLL %.3f nats/token, distinct-2 %.3f, %.2f tokens/step\n",
           name, nats / tokens, different / pairs, per_step);
    dlm_session_free(s);
}

/* The first 5 % of the rounds learn from the teacher's texts: the student's are not yet
   worth it.  Then from its own.  JSD also unlearns what the teacher would not say.  The
   rate is a tenth of training's, or the teacher's skill is lost before it is copied. */
static void convert(int rounds, double minutes)
{
    const time_t t0 = time(NULL);
    const int warm = 1 + rounds / 20;
    dlm_train_options how = {0};
    dlm_distill_options o[2] = {{0}};
    dlm_distiller *d[2];
    dlm_trainer *trainer;
    dlm_report r = {0};
    how.lr = 1e-4f, how.lr_min = 2e-6f, how.warmup = 20, how.max_rows = 2 * T * UPDATE;
    how.schedule = DLM_SCHEDULE_COSINE, how.total = rounds * TEXTS / UPDATE + 9;
    o[0].divergence.kind = DLM_JSD, o[0].divergence.weight = 0.25f;
    o[1] = o[0], o[0].states = DLM_STATES_RANDOM;
    require(dlm_trainer_create(&trainer, ctx, student, &how, NULL));
    require(dlm_distiller_create(&d[0], trainer, teacher, &o[0], NULL));
    require(dlm_distiller_create(&d[1], trainer, teacher, &o[1], NULL));
    for (int i = 0; i < rounds && difftime(time(NULL), t0) < 60 * minutes; i++) {
        const int own = i >= warm;
        double per_step = write_texts(own ? student : teacher, own, i), loss = 0;
        for (int k = 0; k < TEXTS; k += UPDATE, loss += r.loss * UPDATE / TEXTS)
            require(dlm_distiller_step(d[own], ex + k, UPDATE, &r));
        printf("%4d of %d, %s: JSD %.3f, %.2f tokens/step, %.0f s left\n", i + 1, rounds,
               own ? "own texts" : "teacher's", loss, per_step,
               (rounds - i - 1) * difftime(time(NULL), t0) / (i + 1));
        fflush(stdout);
    }
    dlm_distiller_free(d[0]), dlm_distiller_free(d[1]), dlm_trainer_free(trainer);
}

/* The teacher, what it is written in, and the token that begins its texts. */
static dlm_tokenizer *open_teacher(const char *path, const char *pieces)
{
    dlm_tokenizer *tok = NULL;
    size_t one;
    require(dlm_load(&teacher, &tok, ctx, path));
    if (tok == NULL && !strcmp(pieces, "-")) refuse(path, "holds no tokenizer");
    if (tok == NULL) {                       /* llama2.c's are files of their own     */
        require(dlm_tokenizer_load(&tok, ctx, DLM_TOKENIZER_PIECES, pieces));
        begin = tok->stop;
    } else {
        require(dlm_encode(tok, " ", 1, &begin, 1, &one));
    }
    if (tok->vocab > teacher->config.vocab)
        refuse(pieces, "has more tokens than the model knows");
    if (teacher->config.pattern != DLM_PATTERN_CAUSAL)
        refuse(path, "is no autoregressive model");
    if (teacher->config.max_seq < T) refuse(path, "cannot take the 65 tokens of a text");
    return tok;
}

/* Before the training, not after it: can the file be written?  What is there stays. */
static void check_writable(const char *path)
{
    FILE *there = fopen(path, "rb"), *f = fopen(path, "ab");
    if (f == NULL) refuse(path, "cannot be written");
    fclose(f);
    if (there) fclose(there);
    else remove(path);
}

int main(int argc, char **argv)
{
    const double minutes = argc > 4 ? atof(argv[4]) : 2;
    dlm_tokenizer *tok;
    dlm_options options = {0};
    if (argc < 4 || argc > 5 || !(minutes > 0)) {
        puts("usage: convert MODEL TOKENIZER OUT.safetensors [minutes]");
        return argc > 1 && !strcmp(argv[1], "--help") ? 0 : 2;
    }
    options.threads = THREADS;
    options.message = why, options.message_size = sizeof why;
    require(dlm_init(&ctx, &options));
    tok = open_teacher(argv[1], argv[2]);
    check_writable(argv[3]);
    const clock_t start = clock();           /* counts all threads' time             */
    write_texts(teacher, 0, 0);              /* a round takes about 5 times as long  */
    const double pace = 5.0 * (double)(clock() - start) / CLOCKS_PER_SEC / THREADS;
    /* A small model keeps its habit: row i goes on predicting token i + 1. */
    require(dlm_convert(&student, ctx, teacher, BLOCK, DLM_NEW_TOKEN, 1, NULL));
    convert((int)(60 * minutes / pace) + 4, minutes);
    require(dlm_save(ctx, argv[3], student, tok));
    judge("teacher", teacher, 0);
    judge("student, one token per step", student, 0);
    judge("student, threshold 0.9", student, 1);
    dlm_model_free(student), dlm_model_free(teacher);
    dlm_tokenizer_free(tok), dlm_shutdown(ctx);
    return 0;
}
