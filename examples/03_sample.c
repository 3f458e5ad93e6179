/* 03_sample.c - load a checkpoint and let it continue a prompt, block by block.

   Build:  cc -O2 -I.. 03_sample.c -o sample -lm -pthread
   Run:    ./sample [-v] [checkpoint] [prompt] [length]       (02_train_text.c makes one)
           -v says first what model it is
   See:    the text, then how many tokens each forward pass filled in, and tokens/s. */
#define DLM_IMPLEMENTATION
#include "dlm.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { MAX = 4096 };
static int canvas[MAX];
static char text[4 * MAX + 1];

/* Fills the masks of the canvas (T) and says what that cost. */
static dlm_error generate(dlm_ctx *ctx, const dlm_model *model, int T, int n_prompt)
{
    dlm_session *session = NULL;
    dlm_sampler *sampler = NULL;
    dlm_limits limits = {0};
    dlm_sample_options how = {0};

    /* Finished blocks stay in the cache: a step runs only the block being filled.
       A model without blocks sees the whole canvas at every step, so has no cache. */
    limits.slots = T;
    limits.cached = model->config.pattern != DLM_PATTERN_FULL;
    how.order = DLM_ORDER_THRESHOLD;         /* all the model is sure of, at once    */
    how.threshold = 0.9f;
    how.temperature = 0.5f;
    how.seed = (uint64_t)time(NULL);

    dlm_error e = dlm_session_create(&session, ctx, model, &limits, NULL);
    if (!e) e = dlm_sampler_create(&sampler, session, &how, NULL);
    clock_t t0 = clock();                    /* one thread: processor time           */
    if (!e) e = dlm_sampler_begin(sampler, canvas, &T, 1);
    while (!e && !dlm_sampler_done(sampler)) e = dlm_sampler_step(sampler);
    if (!e) {
        double spent = (double)(clock() - t0) / CLOCKS_PER_SEC, flops;
        int forwards, made = dlm_sampler_length(sampler, 0) - n_prompt;
        dlm_sampler_cost(sampler, &forwards, &flops);
        printf("%d tokens in %d forward passes (%.2f each), %.0f tokens/s, "
               "%.2f MFLOP per token\n\n", made, forwards, (double)made / forwards,
               made / spent, flops * 1e-6 / made);
    }
    dlm_sampler_free(sampler);
    dlm_session_free(session);
    return e;
}

static void describe(const dlm_model *model)
{
    dlm_describe(model, text, sizeof text);
    printf("%s\n", text);
}

int main(int argc, char **argv)
{
    const int verbose = argc > 1 && !strcmp(argv[1], "-v");
    argc -= verbose, argv += verbose;
    const char *path = argc > 1 ? argv[1] : "model.safetensors";
    const char *prompt = argc > 2 ? argv[2] : "the ";
    char why[256] = "";                      /* where the library has no words yet   */
    int T = argc > 3 ? atoi(argv[3]) : 100;
    size_t n = 0;
    dlm_ctx *ctx = NULL;
    dlm_tokenizer *tok = NULL;
    dlm_model *loaded = NULL, *model = NULL;
    dlm_options options = {0};

    if (argc > 4 || (argc > 1 && argv[1][0] == '-')) {
        puts("usage: sample [-v] [checkpoint] [prompt] [length]");
        return strcmp(argv[1], "--help") ? 2 : 0;
    }
    options.message = why, options.message_size = sizeof why;
    dlm_error e = dlm_init(&ctx, &options);
    if (!e) e = dlm_load(&loaded, &tok, ctx, path);
    if (!e) e = dlm_model_pack(&model, ctx, loaded, DLM_F32, NULL);  /* to run fast */
    dlm_model_free(loaded);
    if (!e && !tok) {
        snprintf(why, sizeof why, "%s holds no tokenizer (of a model of llama2.c "
                 "12_convert makes a checkpoint that does)", path);
        e = DLM_E_MISMATCH;
    }
    if (!e && verbose) describe(model);
    if (!e) e = dlm_encode(tok, prompt, strlen(prompt), canvas, MAX, &n);
    if (!e) {                                /* the canvas: the prompt, then masks   */
        int most = model->config.max_seq < MAX ? model->config.max_seq : MAX;
        if (T < 1 || T > most - (int)n) T = most - (int)n;
        if (T < 1) {
            snprintf(why, sizeof why, "%d tokens of prompt leave no room: %s has %d",
                     (int)n, path, most);
            e = DLM_E_INPUT;
        }
        T += (int)n;
        for (int i = (int)n; i < T; i++) canvas[i] = model->config.mask_id;
    }
    if (!e) e = generate(ctx, model, T, (int)n);
    if (!e) {
        dlm_decode(tok, canvas, (size_t)T, text, sizeof text);
        printf("%s\n", text);
    } else {
        fprintf(stderr, "%s: %s\n", dlm_error_string(e),
                *why ? why : dlm_last_error(ctx));
    }
    dlm_model_free(model);
    dlm_tokenizer_free(tok);
    dlm_shutdown(ctx);
    return e != DLM_OK;
}
