/* 17_describe.c - what is in this folder or file?  The first thing to run when puzzled.

   Build:  cc -O2 -I.. 17_describe.c -o describe -lm -pthread
   Run:    ./describe path [f32|bf16|i8] [family]
   See:    family, sizes, type, rotary, shift, block, the mask and what it comes from,
           the memory of each type, its stop token; or why it cannot be opened.  Name
           the family of SMDM's files (not their folder) and of open-dcoder's folder. */
#define DLM_IMPLEMENTATION
#include "dlm.h"
#include <stdio.h>
#include <string.h>

static void memory(dlm_ctx *ctx, const dlm_config *c)
{
    static const char *const names[] = { "f32", "bf16", "int8" };
    const dlm_dtype types[] = { DLM_F32, DLM_BF16, DLM_I8 };
    for (int i = 0; i < 3; i++) {
        size_t bytes = dlm_model_bytes(ctx, c, types[i], 1);
        printf("packed %-4s %.1f MB\n", names[i], (double)bytes * 1e-6);
    }
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
    const char *type = argc > 2 ? argv[2] : "bf16";

    if (argc < 2 || argc > 4 || argv[1][0] == '-' || !strchr("fbi", type[0])) {
        puts("usage: describe path [f32|bf16|i8] [family]");
        return argc > 1 && !strcmp(argv[1], "--help") ? 0 : 2;
    }
    how.type = type[0] == 'b' ? DLM_BF16 : type[0] == 'i' ? DLM_I8 : DLM_F32;
    how.packed = 1;
    how.family = argc > 3 ? argv[3] : NULL;
    options.message = why, options.message_size = sizeof why;
    options.threads = 2;
    dlm_error e = dlm_init(&ctx, &options);
    if (!e) e = dlm_open(&model, &tok, ctx, argv[1], &how);
    if (!e) {
        dlm_describe(model, text, sizeof text);
        printf("%s", text);
        memory(ctx, &model->config);
        if (tok) printf("stops at    %d\n", tok->stop);
    } else {
        fprintf(stderr, "%s: %s\n", dlm_error_string(e),
                *why ? why : dlm_last_error(ctx));
    }
    dlm_model_free(model);
    dlm_tokenizer_free(tok);
    dlm_shutdown(ctx);
    return e != DLM_OK;
}
