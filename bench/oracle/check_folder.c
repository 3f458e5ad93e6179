/* check_folder - dlm.h's logits against those that another program has left in a folder.

     check_folder DIR [SAVED]       saves what it opened in the folder SAVED, too

   DIR has ids.i32, logits.f64 and the line `expect` of folders.py; a lone safetensors
   among them is the model where there is no config.json.  The last line is "error E": the
   largest difference over the largest logit.  Ends with 3 when the folder is refused. */
#define DLM_IMPLEMENTATION
#include "dlm.h"
#include "../../examples/save_folder.h"

typedef struct expected {
    char pattern[16], say[32];
    int  block, shifted, mask, vocab, sequences, length;
} expected;

static void *read_all(const char *dir, const char *name, size_t size, size_t most)
{
    char path[1024], *data = (char *)calloc(most + 1, size);
    FILE *f;
    snprintf(path, sizeof path, "%s/%s", dir, name);
    f = fopen(path, "rb");
    if (f == NULL || data == NULL || fread(data, size, most, f) == 0) {
        printf("cannot read %s\n", path);
        exit(1);
    }
    fclose(f);
    return data;
}

/* The folder, or the file in it that expect's layout names. */
static dlm_error open_it(dlm_model **m, dlm_ctx *ctx, const char *dir, const expected *x)
{
    dlm_open_options how;
    char path[1024];
    memset(&how, 0, sizeof how);
    snprintf(path, sizeof path, "%s", dir);
    if (x && x->say[0] != '-') how.family = x->say;
    if (x && strcmp(x->say, "smdm") == 0)
        snprintf(path, sizeof path, "%s/mdm-tiny.safetensors", dir);
    return dlm_open(m, NULL, ctx, path, &how);
}

/* What was decided is what folders.py expects. */
static int decided(const dlm_config *c, const expected *x)
{
    const char *pattern = c->pattern == DLM_PATTERN_CAUSAL ? "causal"
        : c->pattern == DLM_PATTERN_FULL ? "full" : "block";
    const int mask = c->mask_id == c->vocab ? -1 : c->mask_id;
    if (strcmp(pattern, x->pattern) == 0 && c->shifted == x->shifted && mask == x->mask
        && c->vocab == x->vocab && (x->block == 0 || c->block == x->block)) return 1;
    printf("decided: pattern %s, block %d, shifted %d, mask %d, vocab %d\n", pattern,
           c->block, c->shifted, mask, c->vocab);
    return 0;
}

static double compare(dlm_ctx *ctx, const dlm_model *m, const char *dir,
                      const expected *x)
{
    const int T = x->length;
    const size_t row = (size_t)x->vocab, n = (size_t)(x->sequences * T);
    int *ids = (int *)read_all(dir, "ids.i32", sizeof *ids, n);
    double *want = (double *)read_all(dir, "logits.f64", sizeof *want, n * row);
    float *got = (float *)malloc((size_t)T * row * sizeof *got);
    dlm_keys keys[256];
    int start[2] = { 0, 0 }, rows[256];
    double worst = 0.0, scale = 0.0;
    dlm_session *s = NULL;
    dlm_limits lim;
    dlm_batch b;
    memset(&lim, 0, sizeof lim);
    lim.slots = T;
    dlm_keys_fill(keys, T, m->config.pattern, m->config.block, 0);
    for (int i = 0; i < T; i++) rows[i] = i;
    memset(&b, 0, sizeof b);
    start[1] = T;
    b.n_seqs = 1; b.start = start; b.keys = keys; b.out_rows = rows; b.n_out = T;
    if (got == NULL || dlm_session_create(&s, ctx, m, &lim, NULL) != DLM_OK) return NAN;
    for (int q = 0; q < x->sequences; q++) {
        const double *w = want + (size_t)(q * T) * row;
        b.tokens = ids + q * T;
        if (dlm_logits(s, &b, got) != DLM_OK) return NAN;
        for (size_t i = 0; i < (size_t)T * row; i++) {
            if (w[i] < -DBL_MAX && got[i] < -FLT_MAX) continue;
            worst = fmax(worst, fabs((double)got[i] - w[i]));
            if (!(fabs((double)got[i] - w[i]) <= DBL_MAX)) worst = INFINITY;
            scale = fmax(scale, fabs(w[i]));
        }
    }
    dlm_session_free(s);
    free(ids);
    free(want);
    free(got);
    return worst / scale;
}

int main(int argc, char **argv)
{
    static const char form[] = "pattern=%15s block=%d shifted=%d mask=%d vocab=%d "
                               "sequences=%d length=%d say=%31s";
    expected x;
    char *line, why[256];
    dlm_ctx *ctx;
    dlm_model *m;
    dlm_error e = DLM_OK;
    int known;
    if (argc < 2 || dlm_init(&ctx, NULL) != DLM_OK) return 1;
    line = (char *)read_all(argv[1], "expect", 1, 4096);
    known = sscanf(line, form, x.pattern, &x.block, &x.shifted, &x.mask, &x.vocab,
                   &x.sequences, &x.length, x.say) == 8;
    free(line);
    e = open_it(&m, ctx, argv[1], known ? &x : NULL);
    if (e != DLM_OK) printf("%s\n", dlm_last_error(ctx));
    else if (argc > 2 && save_folder(ctx, argv[2], m, NULL, why, sizeof why))
        printf("%s\n", why);
    else if (known && decided(&m->config, &x) && x.length <= 256)
        printf("error %.3g\n", compare(ctx, m, argv[1], &x));
    if (e == DLM_OK) dlm_model_free(m);
    dlm_shutdown(ctx);
    return e == DLM_OK ? 0 : 3;
}
