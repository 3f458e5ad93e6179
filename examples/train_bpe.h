/* train_bpe.h - a byte-pair vocabulary of a text of one's own, as a tokenizer.json that
   dlm.h and others read.  Include after dlm.h, in the file that uses it.

   Byte-pair encoding (Sennrich, Haddow and Birch 2016): the two neighbours that stand
   together most often inside words become one token, again and again.  It is byte-level
   and of GPT-2's form: ids are the 256 bytes in GPT-2's order, the merges, then
   <|endoftext|> and <|mask|>.  To save it, write tok->text (tok->size).
   Words are GPT-2's, but that all bytes from 0x80 on count as letters.  Only what is
   learned depends on it: a merge across what the tokenizer knows to be two words, such as
   a letter and a dash of Unicode, is an id that is never used. */
#ifndef TRAIN_BPE_H
#define TRAIN_BPE_H

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { BPE_BEGINS = 1 << 20,        /* is in an id with which a word begins        */
       BPE_SPELLED = 64 };          /* a token takes fewer bytes in the file       */

typedef struct bpe_token { int left, right; char text[BPE_SPELLED]; } bpe_token;

typedef struct bpe_learner {
    int  vocab, n_ids, n, *ids;     /* (n + 2) the text, then two BEGINS           */
    int *count, *best;              /* (vocab, vocab) of left and right; (vocab) the
                                       best of a row, -1: has to be looked for     */
    bpe_token *tokens;              /* (vocab)                                     */
} bpe_learner;

enum { BPE_SPACE, BPE_LETTER, BPE_NUMERAL, BPE_OTHER };

static int bpe_class(char byte)
{
    const int c = (unsigned char)byte;
    if (c == ' ' || (c >= 9 && c <= 13)) return BPE_SPACE;
    if (c >= '0' && c <= '9') return BPE_NUMERAL;
    return c > 127 || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ? BPE_LETTER
                                                                       : BPE_OTHER;
}

/* Where the word ends that begins at i < size: 's 't 're 've 'm 'll 'd, or a run of one
   class with a space before it.  Of white space the last goes with the next word. */
static size_t bpe_word_end(const char *text, size_t size, size_t i)
{
    static const char *const endings[] = { "'s", "'t", "'re", "'ve", "'m", "'ll", "'d" };
    const size_t at = i + (text[i] == ' ' && i + 1 < size);
    const int kind = bpe_class(text[at]);
    size_t end = kind == BPE_SPACE ? i : at;
    for (int k = 0; k < 7; k++) {
        const size_t n = strlen(endings[k]);
        if (n <= size - i && memcmp(text + i, endings[k], n) == 0) return i + n;
    }
    while (end < size && bpe_class(text[end]) == kind) end++;
    return kind == BPE_SPACE && end < size && end > i + 1 ? end - 1 : end;
}

static void bpe_count(bpe_learner *m, int left, int right, int by)
{
    if (right & BPE_BEGINS) return;
    left &= ~BPE_BEGINS;
    if (strlen(m->tokens[left].text) + strlen(m->tokens[right].text) >= BPE_SPELLED)
        return;
    m->count[left * m->vocab + right] += by;
    m->best[left] = -1;
}

/* The left one of the most frequent pair, of equals that of the smallest ids; -1: no pair
   is there twice. */
static int bpe_best_left(bpe_learner *m)
{
    int top = -1, most = 1;
    for (int left = 0; left < m->n_ids; left++) {
        const int *row = m->count + left * m->vocab;
        int *best = &m->best[left];
        if (*best < 0)
            for (int k = *best = 0; k < m->n_ids; k++) if (row[k] > row[*best]) *best = k;
        if (row[*best] <= most) continue;
        most = row[*best];
        top = left;
    }
    return top;
}

/* One token for two neighbours wherever they are, of "aaa" for the first two.  The counts
   are kept, so that a merge is one pass over the text. */
static void bpe_merge(bpe_learner *m, int left, int right)
{
    const int id = m->n_ids++, n = m->n;
    const char *behind = m->tokens[right].text;
    bpe_token *token = &m->tokens[id];
    *token = m->tokens[left];
    token->left = left;
    token->right = right;
    memcpy(token->text + strlen(token->text), behind, strlen(behind) + 1);
    m->n = 0;
    for (int i = 0; i < n; i++) {
        int *to = &m->ids[m->n++];
        const int begins = m->ids[i] & BPE_BEGINS;
        *to = m->ids[i];
        if (*to != left + begins || m->ids[i + 1] != right) continue;
        if (!begins) bpe_count(m, to[-1], left, -1);
        if (!begins) bpe_count(m, to[-1], id, 1);
        bpe_count(m, right, m->ids[i + 2], -1);
        bpe_count(m, id, m->ids[i + 2], 1);
        *to = id + begins;
        i++;
    }
    m->ids[m->n] = m->ids[m->n + 1] = BPE_BEGINS;
    m->count[left * m->vocab + right] = 0;
    m->best[left] = -1;
}

/* GPT-2 spells the bytes that print as the characters of their numbers, the others as
   U+0100 and on; ids follow these characters. */
static void bpe_begin(bpe_learner *m, const char *text)
{
    int ids[256], others = 0;
    for (int printing = 1; printing >= 0; printing--)
        for (int byte = 0; byte < 256; byte++) {
            const int prints = (byte > 32 && byte < 127) || (byte > 160 && byte != 173);
            const int c = printing ? byte : 256 + others;
            char *spelled = m->tokens[m->n_ids].text;
            if (prints != printing) continue;
            others += !printing;
            if (c > 127) *spelled++ = (char)(0xC0 | c >> 6);
            *spelled = (char)(c > 127 ? 0x80 | (c & 63) : c);
            ids[byte] = m->n_ids++;
        }
    for (size_t at = 0, end = 0, size = (size_t)m->n; at < size; at++) {
        const int id = ids[(unsigned char)text[at]];
        m->ids[at] = id | (at == end ? (int)BPE_BEGINS : 0);
        if (at == end) end = bpe_word_end(text, size, at);
        else bpe_count(m, m->ids[at - 1], id, 1);
    }
    m->ids[m->n] = m->ids[m->n + 1] = BPE_BEGINS;
}

static char *bpe_quote(char *at, const char *text)
{
    for (; *text; *at++ = *text++) if (*text == '"' || *text == '\\') *at++ = '\\';
    return at;
}

/* The tokenizer.json of what was learned, into json; returns its size, below 2048 bytes
   and 5 BPE_SPELLED for each id. */
static size_t bpe_write(char *json, const bpe_learner *m)
{
    static const char byte_level[] = "{\"type\":\"ByteLevel\",\"add_prefix_space\":false,"
                                     "\"trim_offsets\":true,\"use_regex\":true}";
    static const char *const added[] = { "<|endoftext|>", "<|mask|>" };
    char *at = json + sprintf(json, "{\"version\":\"1.0\",\"truncation\":null,"
                              "\"padding\":null,\"post_processor\":null,"
                              "\"added_tokens\":[");
    for (int k = 0; k < 2; k++)
        at += sprintf(at, "%s{\"id\":%d,\"content\":\"%s\",\"single_word\":false,"
                      "\"lstrip\":false,\"rstrip\":false,\"normalized\":false,"
                      "\"special\":true}", k ? "," : "", m->n_ids + k, added[k]);
    at += sprintf(at, "],\"decoder\":%s,\"normalizer\":null,\"pre_tokenizer\":%s,"
                  "\"model\":{\"type\":\"BPE\",\"vocab\":{", byte_level, byte_level);
    for (int id = 0; id < m->n_ids; id++) {
        if (id > 0) *at++ = ',';
        *at++ = '"';
        at = bpe_quote(at, m->tokens[id].text);
        at += sprintf(at, "\":%d", id);
    }
    at += sprintf(at, "},\"merges\":[");
    for (int id = 256; id < m->n_ids; id++) {
        if (id > 256) *at++ = ',';
        *at++ = '"';
        at = bpe_quote(at, m->tokens[m->tokens[id].left].text);
        *at++ = ' ';
        at = bpe_quote(at, m->tokens[m->tokens[id].right].text);
        *at++ = '"';
    }
    return (size_t)(at + sprintf(at, "]}}") - json);
}

/* *out gets the tokenizer, of kind JSON, learned from text (size) of any bytes: after the
   bytes come pairs, the most frequent first, of equals that of the smallest ids, none of
   more than 63 bytes as the file spells it.  There are `vocab` ids (258 .. 8192), fewer
   when no pair is left twice.  Takes 4 (vocab^2 + size) bytes of malloc's and passes over
   the text for every merge: 2 s for 1 MB and a vocabulary of 4096.  why (size_of_why)
   gets a sentence when that fails. */
static dlm_error train_bpe(dlm_tokenizer **out, dlm_ctx *ctx, int vocab, const char *text,
                           size_t size, char *why, size_t size_of_why)
{
    bpe_learner m = { vocab, 0, (int)size, NULL, NULL, NULL, NULL };
    const size_t row = (size_t)vocab;
    dlm_error e = DLM_E_NOMEM;
    char *json;
    int left;
    *out = NULL;
    if (vocab < 258 || vocab > 8192 || size >= INT_MAX - 2) {
        snprintf(why, size_of_why, "vocab %d is not in 258 .. 8192, or %.0f bytes of "
                 "text are too many", vocab, (double)size);
        return DLM_E_CONFIG;
    }
    json = (char *)malloc(2048 + row * 5 * BPE_SPELLED);
    m.ids = (int *)malloc((size + 2) * sizeof *m.ids);
    m.count = (int *)calloc(row * row, sizeof *m.count);
    m.best = (int *)calloc(row, sizeof *m.best);
    m.tokens = (bpe_token *)calloc(row, sizeof *m.tokens);
    if (!json || !m.ids || !m.count || !m.best || !m.tokens)
        snprintf(why, size_of_why, "no memory to train a vocabulary of %d", vocab);
    else {
        bpe_begin(&m, text);
        while (m.n_ids < vocab - 2 && (left = bpe_best_left(&m)) >= 0)
            bpe_merge(&m, left, m.best[left]);
        e = dlm_tokenizer_create(out, ctx, DLM_TOKENIZER_JSON, json, bpe_write(json, &m));
        if (e != DLM_OK) snprintf(why, size_of_why, "%s", dlm_last_error(ctx));
    }
    free(m.tokens); free(m.best); free(m.count); free(m.ids); free(json);
    return e;
}
#endif
