/* save_folder.h - a model as a folder that Python and dlm_open read: model.safetensors,
   config.json and, of a tokenizer that was one, tokenizer.json.  Include after dlm.h, in
   the file that uses it.

   The weights are dlm_save's file, whose names are those of Hugging Face already; here is
   what else a folder has.  Its family follows from the config: llama, qwen2, qwen3, sdar,
   a2d-llama, a2d-qwen2, a2d-qwen3, Dream or Fast_dLLM_Qwen, whose own code Python needs
   to run them; what none of these has (biases and QK-norms, a folded model) is "dlm", for
   dlm_open alone. */
#ifndef SAVE_FOLDER_H
#define SAVE_FOLDER_H

#include <stdio.h>
#include <string.h>
#if defined(_WIN32)
#include <direct.h>
#define save_folder_make(path) _mkdir(path)
#else
#include <sys/stat.h>
#define save_folder_make(path) mkdir(path, 0777)
#endif

typedef struct save_family {                 /* model_type, and what Python makes of it */
    const char *name, *class_name;
    dlm_pattern pattern;
    int shifted, bias, qk_norm;
} save_family;

/* The family that has the config; NULL: none but ours. */
static const save_family *save_family_of(const dlm_config *c)
{
    static const save_family known[] = {
        { "llama", "LlamaForCausalLM", DLM_PATTERN_CAUSAL, 1, 0, 0 },
        { "qwen2", "Qwen2ForCausalLM", DLM_PATTERN_CAUSAL, 1, 1, 0 },
        { "qwen3", "Qwen3ForCausalLM", DLM_PATTERN_CAUSAL, 1, 0, 1 },
        { "sdar", "SDARForCausalLM", DLM_PATTERN_BLOCK, 0, 0, 1 },
        { "a2d-llama", "A2DLlamaLMHeadModel", DLM_PATTERN_FULL, 0, 0, 0 },
        { "a2d-qwen2", "A2DQwen2LMHeadModel", DLM_PATTERN_FULL, 0, 1, 0 },
        { "a2d-qwen3", "A2DQwen3LMHeadModel", DLM_PATTERN_FULL, 0, 0, 1 },
        { "Dream", "DreamModel", DLM_PATTERN_FULL, 1, 1, 0 },
        { "Fast_dLLM_Qwen", "Fast_dLLM_QwenForCausalLM", DLM_PATTERN_BLOCK, 1, 1, 0 },
    };
    const int causal = c->pattern == DLM_PATTERN_CAUSAL;
    const save_family *found = NULL;
    for (int i = 0; i < 9 && !c->gelu_mlp && !c->head_bias; i++) {
        const save_family *x = &known[i];
        if (x->shifted != c->shifted || x->bias != c->qkv_bias
            || x->qk_norm != !c->no_qk_norm) continue;
        if (x->pattern == c->pattern) return x;
        if ((x->pattern == DLM_PATTERN_CAUSAL) == causal) found = x;    /* + block_size */
    }
    return found;
}

/* A float as JSON has it, whatever the locale: the fewest digits that read back. */
static void save_float(FILE *f, const char *name, float x)
{
    char text[40];
    int digits = 5;
    float back = 0;
    while (digits < 9 && back != x) {
        snprintf(text, sizeof text, "%.*e", digits++, (double)x);
        sscanf(text, "%f", &back);
    }
    for (char *c = text; *c; c++) if (*c == ',') *c = '.';
    fprintf(f, "  \"%s\": %s,\n", name, text);
}

static int save_config(const char *path, const dlm_config *c, int stop)
{
    const save_family *x = save_family_of(c);
    const struct { const char *name; int value; } numbers[] = {         /* -1: not said */
        { "hidden_size", c->dim }, { "num_hidden_layers", c->layers },
        { "num_attention_heads", c->heads }, { "num_key_value_heads", c->kv_heads },
        { "head_dim", c->head_dim }, { "intermediate_size", c->ffn },
        { "vocab_size", c->vocab }, { "max_position_embeddings", c->max_seq },
        { "block_size", c->pattern == DLM_PATTERN_BLOCK ? c->block : -1 },
        { "mask_token_id", c->mask_id < c->vocab ? c->mask_id : -1 },
        { "eos_token_id", stop }, { "shifted", x ? -1 : c->shifted },
        { "is_causal", x ? -1 : c->pattern == DLM_PATTERN_CAUSAL }
    };
    FILE *f = fopen(path, "w");
    int sound;
    if (f == NULL) return 0;
    fprintf(f, "{\n  \"model_type\": \"%s\",\n  \"architectures\": [\"%s\"],\n",
            x ? x->name : "dlm", x ? x->class_name : "");
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        if (numbers[i].value >= 0)
            fprintf(f, "  \"%s\": %d,\n", numbers[i].name, numbers[i].value);
    save_float(f, "rms_norm_eps", c->norm_eps);
    save_float(f, "rope_theta", c->rope_theta);
    fprintf(f, "  \"tie_word_embeddings\": %s,\n  \"hidden_act\": \"%s\",\n"
            "  \"torch_dtype\": \"float32\"\n}\n", c->untied_head ? "false" : "true",
            c->gelu_mlp ? "gelu_pytorch_tanh" : "silu");
    sound = !ferror(f);
    return fclose(f) == 0 && sound;
}

/* m is plain; tok may be NULL.  The folder is made if it is not there.  config.json is
   written last: without it nobody takes the folder for whole.  why (size) gets a sentence
   when that fails.  What another model left there and would be read with this one, an
   index or a tokenizer, is refused. */
static dlm_error save_folder(dlm_ctx *ctx, const char *path, const dlm_model *m,
                             const dlm_tokenizer *tok, char *why, size_t size)
{
    static const char *const others[] = {
        "model.safetensors.index.json", "generation_config.json", "tokenizer_config.json",
        "special_tokens_map.json", "vocab.json", "tokenizer.json"
    };
    const int json = tok && tok->kind == DLM_TOKENIZER_JSON;
    char file[1024];
    FILE *f = NULL;
    dlm_error e;
    int sound = 1;
    for (int i = 0; i < 6 - json; i++) {
        snprintf(file, sizeof file, "%.900s/%s", path, others[i]);
        if ((f = fopen(file, "rb")) == NULL) continue;
        fclose(f);
        snprintf(why, size, "%.200s is there, of another model", file);
        return DLM_E_IO;
    }
    (void)save_folder_make(path);
    snprintf(file, sizeof file, "%.900s/model.safetensors", path);
    e = dlm_save(ctx, file, m, json ? NULL : tok);
    if (e != DLM_OK) {
        snprintf(why, size, "%s", dlm_last_error(ctx));
        return e;
    }
    snprintf(file, sizeof file, "%.900s/tokenizer.json", path);
    if (json) sound = (f = fopen(file, "wb")) != NULL;
    if (json && f) sound = fwrite(tok->text, 1, tok->size, f) == tok->size;
    if (json && f) sound = fclose(f) == 0 && sound;
    if (sound) snprintf(file, sizeof file, "%.900s/config.json", path);
    if (sound && save_config(file, &m->config, tok ? tok->stop : -1)) return DLM_OK;
    snprintf(why, size, "cannot write %.200s", file);
    return DLM_E_IO;
}
#endif
