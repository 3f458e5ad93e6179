/* 04_infill.c - fill in a form: every '_' is one character the model has to find.

   Build:  cc -O2 -I.. 04_infill.c -o infill -lm -pthread
   Run:    ./infill [checkpoint] [form]                  (02_train_text.c makes one)
   See:    the form, and three ways to fill it in.  What is written stays as it is, and
           a hole stays as long as it is: the model has to find words that fit. */
#define DLM_IMPLEMENTATION
#include "dlm.h"
#include <stdio.h>
#include <string.h>

enum { MAX = 1024 };

/* The canvas of a form: the tokens of the text between the holes, masks for '_'. */
static dlm_error read_form(const dlm_tokenizer *tok, const char *form, int *canvas,
                           int *T)
{
    *T = 0;
    while (*form && *T < MAX) {
        size_t size = strcspn(form, "_"), n = 1;
        if (size == 0) {
            canvas[*T] = tok->mask;
            size = 1;
        } else {
            size_t room = (size_t)(MAX - *T);
            dlm_error e = dlm_encode(tok, form, size, canvas + *T, room, &n);
            if (e != DLM_OK) return e;
        }
        *T += (int)n;
        form += size;
    }
    return DLM_OK;
}

int main(int argc, char **argv)
{
    const char *path = argc > 1 ? argv[1] : "model.safetensors";
    const char *form = argc > 2 ? argv[2]
                     : "a friend _______ the silver ___ at home. ";
    char why[256] = "";                      /* where the library has no words yet   */
    static int blank[MAX], canvas[MAX];
    static char text[4 * MAX + 1];
    int T = 0;
    dlm_ctx *ctx = NULL;
    dlm_tokenizer *tok = NULL;
    dlm_model *model = NULL;
    dlm_options options = {0};
    dlm_sample_options how = {0};

    if (argc > 3 || (argc > 1 && argv[1][0] == '-')) {
        puts("usage: infill [checkpoint] [form with _]");
        return strcmp(argv[1], "--help") ? 2 : 0;
    }
    options.message = why, options.message_size = sizeof why;
    dlm_error e = dlm_init(&ctx, &options);
    if (!e) e = dlm_load(&model, &tok, ctx, path);
    if (!e && tok) e = read_form(tok, form, blank, &T);
    if (!e && !tok) {
        snprintf(why, sizeof why, "%s holds no tokenizer", path);
        e = DLM_E_MISMATCH;
    }
    if (!e && (T < 1 || T > MAX || T > model->config.max_seq)) {
        snprintf(why, sizeof why, "the form has %d tokens, %s takes 1 to %d", T, path,
                 model->config.max_seq < MAX ? model->config.max_seq : MAX);
        e = DLM_E_INPUT;
    }
    /* The surest character first.  A model trained in blocks sees what stands to the
       right of a hole up to the end of the block, one with the full pattern all of it. */
    how.order = DLM_ORDER_CONFIDENCE;
    how.temperature = 0.7f;
    if (!e) printf("%s\n", form);
    for (how.seed = 1; !e && how.seed <= 3; how.seed++) {
        memcpy(canvas, blank, sizeof canvas);
        e = dlm_sample(ctx, model, canvas, T, &how);
        dlm_decode(tok, canvas, (size_t)T, text, sizeof text);
        if (!e) printf("%s\n", text);
    }
    if (e) fprintf(stderr, "%s: %s\n", dlm_error_string(e),
                   *why ? why : dlm_last_error(ctx));
    dlm_model_free(model);
    dlm_tokenizer_free(tok);
    dlm_shutdown(ctx);
    return e != DLM_OK;
}
