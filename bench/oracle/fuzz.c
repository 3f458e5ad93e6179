/* fuzz - every reader of files, given whatever a fuzzer finds.

     clang -g -O1 -fsanitize=fuzzer,address,undefined -I. bench/oracle/fuzz.c -o fuzz -lm
     ./fuzz -max_total_time=300 seeds/            without libFuzzer: -DREPLAY, then files

   The first byte of an input says which reader gets the rest: 0 a checkpoint or .bin,
   1 tokenizer.json, 2 scored pieces, 3 config.json, 4 an index, 5 a tokenizer's folder
   (the rest is cut at zeros into tokenizer_config.json, vocab.json and merges.txt). */
#define DLM_NO_THREADS
#define DLM_IMPLEMENTATION
#include "dlm.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void model(dlm_ctx *ctx, const char *text, size_t size)
{
    dlm_model *m = NULL;
    dlm_tokenizer *tok = NULL;
    if (dlm_load_memory(&m, &tok, ctx, text, size) == DLM_OK) dlm_model_free(m);
    dlm_tokenizer_free(tok);
}

/* What opens encodes something, and decodes what came of it. */
static void use(dlm_tokenizer *t)
{
    static const char text[] = "Hello  w\xC3\xB6rld's\n\n <s>\xFF 123";
    char back[256];
    int ids[64];
    size_t n = 0;
    if (dlm_encode(t, text, sizeof text - 1, ids, 64, &n) == DLM_OK)
        dlm_decode(t, ids, n < 64 ? n : 64, back, sizeof back);
    dlm_tokenizer_free(t);
}

static void tokenizer(dlm_ctx *ctx, dlm_tokenizer_kind kind, const char *text,
                      size_t size)
{
    dlm_tokenizer *t = NULL;
    if (dlm_tokenizer_create(&t, ctx, kind, text, size) == DLM_OK) use(t);
}

static void json(dlm_ctx *ctx, int index, const char *text, size_t size)
{
    dlm__folder f;
    dlm__json j;
    memset(&f, 0, sizeof f);
    f.s.ctx = ctx;
    f.path = "no such folder";
    j.p = text; j.end = text + size; j.bad = 0;
    if (index) (void)dlm__read_index(&f, &j);
    else (void)dlm__read_config(&f, &j);
}

static void folder(dlm_ctx *ctx, const char *text, size_t size)
{
    static const int part[] = { DLM__T_CONFIG, DLM__T_VOCAB, DLM__T_MERGES };
    dlm__json files[DLM__T_FILES];
    dlm_tokenizer *t = NULL;
    const char *end = text + size;
    memset(files, 0, sizeof files);
    for (int i = 0; i < 3 && text < end; i++) {
        const char *zero = (const char *)memchr(text, 0, (size_t)(end - text));
        files[part[i]].p = text;
        files[part[i]].end = zero ? zero : end;
        text = zero ? zero + 1 : end;
    }
    if (dlm__tok_from(&t, ctx, files) == DLM_OK) use(t);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const char *text = (const char *)data + 1;
    dlm_ctx *ctx = NULL;
    if (size < 1 || size > 1 << 16 || dlm_init(&ctx, NULL) != DLM_OK) return 0;
    size--;
    if (data[0] % 6 == 0) model(ctx, text, size);
    if (data[0] % 6 == 1) tokenizer(ctx, DLM_TOKENIZER_JSON, text, size);
    if (data[0] % 6 == 2) tokenizer(ctx, DLM_TOKENIZER_PIECES, text, size);
    if (data[0] % 6 == 3) json(ctx, 0, text, size);
    if (data[0] % 6 == 4) json(ctx, 1, text, size);
    if (data[0] % 6 == 5) folder(ctx, text, size);
    dlm_shutdown(ctx);
    return 0;
}

#ifdef REPLAY
int main(int argc, char **argv)
{
    static uint8_t data[1 << 16];
    for (int i = 1; i < argc; i++) {
        FILE *f = fopen(argv[i], "rb");
        const size_t n = f ? fread(data, 1, sizeof data, f) : 0;
        if (f) fclose(f);
        LLVMFuzzerTestOneInput(data, n);
    }
    return 0;
}
#endif
