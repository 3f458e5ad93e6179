/* 01_first_program.c - train a tiny diffusion language model, let it fill in text.

   Build:  cc -O2 -I.. 01_first_program.c -lm -pthread
   See:    after a few seconds three forms, '_' being a masked character, and below
           each the same form filled in.  The last two can only come out right if the
           model reads what stands behind a hole, too. */
#define DLM_IMPLEMENTATION
#include "dlm.h"
#include <stdio.h>
#include <string.h>

static const char text[] =
    "the cat likes milk. the dog likes bones. the bird likes seeds. the fish likes "
    "water. the cat fears the dog. the bird fears the cat. the fish fears the bird. "
    "the dog fears the dark. the cat likes milk. the dog likes bones. ";

int main(int argc, char **argv)
{
    const char *forms[] = {"the bird likes _______",
                           "the ____ likes water. the ___ likes milk. ",
                           "the ___ fears the dark. "};
    enum { T = 48, B = 8, STEPS = 700 };      /* length and number of sequences     */
    dlm_ctx *ctx = NULL;
    dlm_tokenizer *tok = NULL;
    dlm_model *model = NULL;
    dlm_trainer *trainer = NULL;
    dlm_config cfg = {0};                     /* zero means the default, everywhere */
    dlm_train_options how = {0};
    int ids[sizeof text], canvas[T];
    size_t n = 0;
    char filled[T + 1], why[256] = "";        /* why: for a context that fails      */
    dlm_options options = {0};

    if (argc > 1) {
        puts("usage: first_program        it takes no arguments");
        return strcmp(argv[1], "--help") ? 2 : 0;
    }
    options.message = why, options.message_size = sizeof why;
    dlm_error e = dlm_init(&ctx, &options);
    if (!e) e = dlm_tokenizer_create(&tok, ctx, DLM_TOKENIZER_CHARS, text, strlen(text));
    if (!e) e = dlm_encode(tok, text, strlen(text), ids, sizeof text, &n);

    cfg.vocab = e ? 0 : tok->vocab;
    cfg.dim = 64, cfg.layers = 2, cfg.heads = 4, cfg.max_seq = T;
    cfg.pattern = DLM_PATTERN_FULL;           /* every character sees every other   */
    cfg.rope_theta = 10;                      /* few positions, so short waves      */
    how.lr = 2e-3f, how.warmup = 100, how.total = STEPS;
    how.schedule = DLM_SCHEDULE_COSINE;
    if (!e) e = dlm_model_create(&model, ctx, &cfg, 1, NULL);
    if (!e) e = dlm_trainer_create(&trainer, ctx, model, &how, NULL);
    for (int step = 0; step < STEPS && !e; step++)
        e = dlm_trainer_step_text(trainer, ids, n, T, B, NULL);

    for (int f = 0; f < 3 && !e; f++) {       /* fill in the masks of a canvas      */
        int length = (int)strlen(forms[f]);
        for (int i = 0; i < length && !e; i++) {
            const char *c = forms[f] + i;
            canvas[i] = tok->mask;
            if (*c != '_') e = dlm_encode(tok, c, 1, canvas + i, 1, &n);
        }
        if (!e) e = dlm_sample(ctx, model, canvas, length, NULL);
        dlm_decode(tok, canvas, (size_t)length, filled, sizeof filled);
        printf("%s\n%s\n\n", forms[f], filled);
    }
    if (e) fprintf(stderr, "%s: %s\n", dlm_error_string(e),
                   *why ? why : dlm_last_error(ctx));
    dlm_trainer_free(trainer);
    dlm_model_free(model);
    dlm_tokenizer_free(tok);
    dlm_shutdown(ctx);
    return e != DLM_OK;
}
