/* 18_convert_folder.c - an autoregressive folder becomes a block diffusion folder: the
   weights stay, attention sees whole blocks, and one unused token becomes the mask.  This
   is where OPDLM begins (the teacher is the old folder, see 12_convert.c).

   Build:  cc -O2 -I.. 18_convert_folder.c -o convert -lm -pthread
   Run:    ./convert from to [block [mask]]        block 4; mask: the model's, the
                                                   tokenizer's, or the first id that the
                                                   tokenizer has not
   See:    what was read; `to`, in f32, opens in dlm_open, and in Python with the code of
           its family (sdar, a2d-qwen2 and the like). */
#define DLM_IMPLEMENTATION
#include "dlm.h"
#include "save_folder.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The mask that the converted model gets; 0: nothing says which ids are free. */
static int choose_mask(const dlm_model *ar, const dlm_tokenizer *tok)
{
    if (ar->config.mask_id < ar->config.vocab) return ar->config.mask_id;
    if (tok && tok->mask >= 0 && tok->mask < ar->config.vocab) return tok->mask;
    if (tok && tok->vocab < ar->config.vocab) return tok->vocab;
    return 0;
}

int main(int argc, char **argv)
{
    static char text[4096];
    char why[256] = "";                      /* where the library has no words yet   */
    dlm_ctx *ctx = NULL;
    dlm_model *model = NULL;
    dlm_tokenizer *tok = NULL;
    dlm_options options = {0};
    dlm_open_options how = {0};
    how.block = argc > 3 ? atoi(argv[3]) : 4;
    if (argc < 3 || argc > 5 || argv[1][0] == '-' || how.block < 1) {
        puts("usage: convert from to [block [mask]]");
        return argc > 1 && !strcmp(argv[1], "--help") ? 0 : 2;
    }
    options.message = why, options.message_size = sizeof why;
    options.threads = 2;
    dlm_error e = dlm_init(&ctx, &options);
    how.mask_id = argc > 4 ? atoi(argv[4]) : 0;
    if (!e) e = dlm_open(&model, &tok, ctx, argv[1], NULL);      /* what is it?       */
    if (!e && how.mask_id <= 0) how.mask_id = choose_mask(model, tok);
    if (!e && how.mask_id <= 0) {
        snprintf(why, sizeof why, "no tokenizer says which ids are free: name the mask "
                 "as fourth argument");
        e = DLM_E_INPUT;
    }
    if (!e) {                                /* the same weights, read as a student  */
        dlm_model_free(model);
        dlm_tokenizer_free(tok);
        e = dlm_open(&model, &tok, ctx, argv[1], &how);
    }
    if (!e) e = save_folder(ctx, argv[2], model, tok, why, sizeof why);
    if (!e) {
        dlm_describe(model, text, sizeof text);
        printf("%s\nwritten to %s\n", text, argv[2]);
    } else {
        fprintf(stderr, "%s: %s\n", dlm_error_string(e),
                *why ? why : dlm_last_error(ctx));
    }
    dlm_model_free(model);
    dlm_tokenizer_free(tok);
    dlm_shutdown(ctx);
    return e != DLM_OK;
}
