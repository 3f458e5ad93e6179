/* encode.c - dlm.h's tokenizers for the programs that compare them with others.

   Use:  encode TOKENIZER [OUT] < texts      encode --train VOCAB TEXT OUT
   TOKENIZER is a tokenizer.json, a llama2.c .bin or a model's folder; it is saved as OUT.
   texts: 4 bytes of length (little-endian) before each.  Prints for each a line of ids, a
   tab and, in hexadecimal, the bytes that they are decoded to, without masks ('_'). */
#define DLM_IMPLEMENTATION
#include "dlm.h"
#include "../../examples/train_bpe.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST = 1 << 24 };
static char text[MOST], back[8 * MOST];
static int ids[MOST];
static dlm_ctx *ctx;

static void require(dlm_error e)
{
    if (e == DLM_OK) return;
    fprintf(stderr, "%s: %s\n", dlm_error_string(e), dlm_last_error(ctx));
    exit(1);
}

static int ends_in(const char *path, const char *end)
{
    const size_t n = strlen(path), m = strlen(end);
    return n >= m && strcmp(path + n - m, end) == 0;
}

static dlm_tokenizer *open_tokenizer(const char *path)
{
    dlm_tokenizer *t = NULL;
    const dlm_tokenizer_kind kind = ends_in(path, ".bin") ? DLM_TOKENIZER_PIECES
                                                          : DLM_TOKENIZER_JSON;
    if (kind == DLM_TOKENIZER_PIECES || ends_in(path, ".json"))
        require(dlm_tokenizer_load(&t, ctx, kind, path));
    else require(dlm_tokenizer_open(&t, ctx, path));
    return t;
}

static dlm_tokenizer *train(int vocab, const char *path)
{
    dlm_tokenizer *t;
    char why[256];
    FILE *f = fopen(path, "rb");
    const size_t size = f ? fread(text, 1, MOST, f) : 0;
    if (f) fclose(f);
    if (train_bpe(&t, ctx, vocab, text, size, why, sizeof why) == DLM_OK) return t;
    fprintf(stderr, "%s\n", why);
    exit(1);
}

static void save(const dlm_tokenizer *t, const char *path)
{
    FILE *f = fopen(path, "wb");
    const int sound = f && fwrite(t->text, 1, t->size, f) == t->size;
    if (f && fclose(f) == 0 && sound) return;
    fprintf(stderr, "%s: cannot be written\n", path);
    exit(1);
}

/* The next text; its size, -1 at the end. */
static long read_text(void)
{
    unsigned char head[4];
    size_t size;
    if (fread(head, 1, 4, stdin) != 4) return -1;
    size = (size_t)head[0] | (size_t)head[1] << 8 | (size_t)head[2] << 16
        | (size_t)head[3] << 24;
    return size <= MOST && fread(text, 1, size, stdin) == size ? (long)size : -1;
}

int main(int argc, char **argv)
{
    const int training = argc == 5 && strcmp(argv[1], "--train") == 0;
    const char *out = training ? argv[4] : argc > 2 ? argv[2] : NULL;
    dlm_tokenizer *t;
    long size;
    if (argc < 2 || (argc > 3 && !training)) return 2;
    if (dlm_init(&ctx, NULL) != DLM_OK) return 1;
    t = training ? train(atoi(argv[2]), argv[3]) : open_tokenizer(argv[1]);
    if (out) save(t, out);
    while (!training && (size = read_text()) >= 0) {
        size_t n, m, kept = 0;
        require(dlm_encode(t, text, (size_t)size, ids, MOST, &n));
        for (size_t i = 0; i < n; i++) printf(i ? " %d" : "%d", ids[i]);
        for (size_t i = 0; i < n; i++) if (ids[i] != t->mask) ids[kept++] = ids[i];
        m = dlm_decode(t, ids, kept, back, sizeof back);
        putchar('\t');
        for (size_t i = 0; i < m; i++) printf("%02x", (unsigned)(unsigned char)back[i]);
        putchar('\n');
    }
    dlm_tokenizer_free(t);
    dlm_shutdown(ctx);
    return 0;
}
