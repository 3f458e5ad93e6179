#!/bin/sh
# programs.sh - every example and bench program, given what is wrong: it must end soon,
# with the right status and words that say what is wrong, and leave files as they were.
# Use: sh bench/programs.sh [scratch folder], from the top of the repository.
set -u
dir=${1:-build/programs}
rm -rf "$dir" && mkdir -p "$dir/folder" "$dir/folder.bin" || exit 1
passed=0 failed=0

# Quick to compile, without optimisation: only what is wrong has to be found.
build="${CC:-cc} -std=c99 -O0 -DDLM_NO_SIMD -I. -Ibench"
compile() {
    for source in "$@"; do
        name=$(basename "$source" .c)
        $build "$source" -o "$dir/$name" -lm -pthread || echo "$source" >> "$dir/broken"
    done
}

# says STATUS WORDS PROGRAM ARGUMENTS...: within 20 seconds it ends with STATUS, having
# printed WORDS.
says() {
    status=$1; words=$2; shift 2
    (cd "$dir" && timeout 20 "./$@") > "$dir/log" 2>&1 < /dev/null
    got=$?
    if [ $got -eq "$status" ] && { [ -z "$words" ] || grep -qF -e "$words" "$dir/log"; }
    then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAIL $*: status $got, want $status with '$words':"; head -n 3 "$dir/log"
    fi
}

# same FILE LABEL: FILE is still what it was when it was kept.
keep() { cp "$dir/$1" "$dir/$1.kept"; }
same() {
    if cmp -s "$dir/$1" "$dir/$1.kept"; then passed=$((passed + 1))
    else failed=$((failed + 1)); echo "FAIL $1: changed by $2"; fi
}
absent() {
    if [ ! -e "$dir/$1" ]; then passed=$((passed + 1))
    else failed=$((failed + 1)); echo "FAIL $1: left by $2"; fi
}

# --[ files: models, right ones and such as do not fit ]-----------------------------
cat > "$dir/files.c" << 'EOF'
#define DLM_IMPLEMENTATION
#include "dlm.h"
#include "tasks.h"
#include "examples/save_folder.h"

static dlm_ctx *ctx;

static void require(dlm_error e)
{
    if (e == DLM_OK) return;
    fprintf(stderr, "files: %s\n", dlm_last_error(ctx));
    exit(1);
}

static void save(const char *path, int vocab, int mask, int max_seq, dlm_pattern pattern,
                 const char *corpus, int state)
{
    dlm_tokenizer *tok = NULL;
    dlm_trainer *trainer;
    dlm_model *m;
    dlm_config cfg = {0};
    char name[64];
    if (corpus) require(dlm_tokenizer_create(&tok, ctx, DLM_TOKENIZER_CHARS, corpus,
                                             strlen(corpus)));
    cfg.vocab = corpus ? tok->vocab : vocab, cfg.mask_id = mask;
    cfg.dim = 16, cfg.layers = 1, cfg.heads = 2, cfg.max_seq = max_seq;
    cfg.pattern = pattern;
    require(dlm_model_create(&m, ctx, &cfg, 1, NULL));
    require(dlm_save(ctx, path, m, tok));
    snprintf(name, sizeof name, "%s.train", path);
    if (state) require(dlm_trainer_create(&trainer, ctx, m, NULL, NULL));
    if (state) require(dlm_trainer_save(trainer, name));
}

/* llama2.c: seven sizes, then zeros for all weights and rotary tables; 300 pieces. */
static void write_llama(void)
{
    const int32_t sizes[7] = { 8, 8, 1, 2, 2, 300, 128 }, longest = 8;
    const float zeros[64] = {0};
    FILE *f = fopen("llama.bin", "wb");
    fwrite(sizes, 4, 7, f);
    for (int n = 300 * 8 + 8 + 4 * 64 + 8 + 3 * 64 + 8 + 2 * 128 * 2; n > 0; n -= 64)
        fwrite(zeros, 4, n < 64 ? (size_t)n : 64, f);
    fclose(f);
    for (int extra = 0; extra < 2; extra++) {
        f = fopen(extra ? "more_pieces.bin" : "pieces.bin", "wb");
        fwrite(&longest, 4, 1, f);
        for (int i = 0; i < 300 + extra; i++) {
            char text[16];
            const int32_t length = snprintf(text, sizeof text, "<0x%02X>", i);
            fwrite(zeros, 4, 1, f);
            fwrite(&length, 4, 1, f);
            fwrite(text, 1, (size_t)length, f);
        }
        fclose(f);
    }
}

/* A checkpoint as a folder. */
static void write_folder(const char *name, const char *from)
{
    dlm_model *m;
    dlm_tokenizer *tok;
    char why[256];
    require(dlm_load(&m, &tok, ctx, from));
    require(save_folder(ctx, name, m, tok, why, sizeof why));
    dlm_model_free(m);
    dlm_tokenizer_free(tok);
}

int main(void)
{
    const char *const letters = "abcdefghijklmnopqrstuvwxyz. ", *const capitals = "ABC ";
    if (dlm_init(&ctx, NULL) != DLM_OK) return 1;
    save("bare.st", 30, 0, 128, DLM_PATTERN_BLOCK, NULL, 0);
    save("block.st", 0, 0, 128, DLM_PATTERN_BLOCK, letters, 0);
    save("ar.st", 0, 0, 128, DLM_PATTERN_CAUSAL, letters, 0);
    save("ar_short.st", 0, 0, 8, DLM_PATTERN_CAUSAL, letters, 0);
    save("run.st", 0, 0, 128, DLM_PATTERN_BLOCK, letters, 1);
    save("run_capitals.st", 0, 0, 128, DLM_PATTERN_BLOCK, capitals, 1);
    save("run_short.st", 0, 0, 64, DLM_PATTERN_BLOCK, letters, 1);
    save("run_bare.st", 30, 0, 128, DLM_PATTERN_BLOCK, NULL, 1);
    save("sudoku.st", TASK_SUDOKU_VOCAB, TASK_MASK, 17, DLM_PATTERN_FULL, NULL, 0);
    save("countdown.st", task_countdown_vocab(task_countdown_large), TASK_MASK,
         TASK_COUNTDOWN_LENGTH, DLM_PATTERN_FULL, NULL, 0);
    write_llama();
    write_folder("ar", "ar.st");
    write_folder("block", "block.st");
    return 0;
}
EOF
halves=$(ls examples/*.c bench/*.c)
# shellcheck disable=SC2086
{ compile $(echo "$halves" | awk 'NR % 2') "$dir/files.c" &
  compile $(echo "$halves" | awk 'NR % 2 == 0'); wait; }
if [ -e "$dir/broken" ]; then echo "FAIL, not compiled:"; cat "$dir/broken"; exit 1; fi
(cd "$dir" && ./files) || exit 1
: > "$dir/one.file"; : > "$dir/empty"; : > "$dir/empty.bin"; printf 'abc' > "$dir/three"
printf 'abc' > "$dir/three.bin"; cp "$dir/pieces.bin" "$dir/pieces"
awk 'BEGIN { for (i = 0; i < 1000; i++) print "the cat sat on the mat." }' |
    tr '\n' ' ' > "$dir/text"
head -c 100 "$dir/text" > "$dir/short"

# --[ usage, and a context that cannot be had ]---------------------------------------
for source in $halves; do
    name=$(basename "$source" .c)
    [ "$name" = 00_by_hand ] && continue    # has no arguments, nor dlm.h
    says 0 'usage: ' "$name" --help
    says 2 'usage: ' "$name" --nonsense
    case $name in
    12_convert) arguments='llama.bin pieces.bin out.st' ;;
    13_continue) arguments=block.st ;;
    15_generate) arguments='block the' ;;
    16_choose) arguments='block.st - {a|b}' ;;
    17_describe | bench_folder) arguments=block ;;
    18_convert_folder) arguments='ar out' ;;
    sudoku | countdown) arguments='gen out.txt' ;;
    *) arguments= ;;
    esac
    export DLM_ISA=pentium
    # shellcheck disable=SC2086
    says 1 'DLM_ISA=pentium: this CPU and build have scalar' "$name" $arguments
    unset DLM_ISA
done
absent out.st 12_convert; absent out.txt gen
for name in 01_first_program 06_matmul_only 10_likelihood 14_own_network demo \
            picture; do
    says 2 'usage: ' $name block.st
done

says 0 'form        packed, f32' 03_sample -v block.st 'the ' 10
says 0 'pattern     block' 13_continue -v block.st 'the ' 10

# --[ examples ]-----------------------------------------------------------------------
for file in missing empty folder three pieces llama.bin bare.st; do
    for name in 03_sample 04_infill 05_watch_denoising 13_continue; do
        says 1 $file $name $file
    done
    [ $file = llama.bin ] || says 1 $file 12_convert $file - out.st
done
for name in 03_sample 04_infill 05_watch_denoising 13_continue; do
    says 1 'bare.st holds no tokenizer' $name bare.st
done
says 1 'llama.bin holds no tokenizer (of a model of llama2.c' 03_sample llama.bin
says 1 'pieces.bin' 03_sample pieces.bin
says 1 'bare.st: holds no tokenizer' 12_convert bare.st - out.st
says 1 'U+0058' 03_sample block.st 'X'
long=$(head -c 200 "$dir/text")
says 1 '200 tokens of prompt leave no room' 03_sample block.st "$long"
says 1 'the form has 200 tokens' 04_infill block.st "$long"
says 1 'the form has 0 tokens' 04_infill block.st ''
says 1 'a beginning of 1 .. 127' 13_continue block.st "$long"
for file in missing empty folder three; do
    says 1 $file.bin 12_convert $file.bin pieces.bin out.st
    says 1 $file 12_convert llama.bin $file out.st
done
says 1 'more tokens than the model' 12_convert llama.bin more_pieces.bin out.st
says 1 'is no autoregressive model' 12_convert block.st - out.st
says 1 'cannot take the 65 tokens' 12_convert ar_short.st - out.st
says 1 'cannot be written' 12_convert ar.st - no/such/out.st
says 1 'cannot be written' 12_convert ar.st - folder
says 2 'usage: ' 12_convert ar.st - out.st never
says 0 'kept: the same' 14_own_network
says 0 '20 tokens in ' 15_generate block 'the ' -n 20
says 0 '3 tokens in ' 15_generate block 'the [?][?][?] cat' -canvas -type bf16
says 0 '9 tokens in ' 15_generate ar 'the ' -n 9 -type f32 -t 1
says 1 'U+0058' 15_generate block 'X'
says 1 'more than the model' 15_generate block "$long"
says 1 'missing' 15_generate missing 'the '
says 2 'usage: ' 15_generate block 'the ' -n
says 2 'usage: ' 15_generate block 'the ' -type q4
says 0 'family      sdar' 17_describe block
says 0 'family      qwen3' 17_describe ar i8
says 0 'packed int8' 17_describe block.st f32
says 1 'folder: no config.json' 17_describe folder
says 2 'usage: ' 17_describe block q4
says 1 'it knows no ChatML' 15_generate block 'the ' -chat
says 1 'no [?] in the canvas' 15_generate block 'the ' -canvas
says 2 'usage: ' 18_convert_folder ar out 0
says 0 'written to out' 18_convert_folder ar out 4
says 0 'family      sdar' 17_describe out
: > "$dir/out/vocab.json"
says 1 'out/vocab.json is there, of another model' 18_convert_folder ar out 4
rm "$dir/out/vocab.json"
says 0 '5 tokens in ' 15_generate out 'the ' -n 5
says 1 'only of a folder' 18_convert_folder ar.st out2
says 1 'one.file' 18_convert_folder ar one.file
says 0 'one token per step' bench_folder block i8 8
says 1 'missing' bench_folder missing
says 0 '11 tokens, forwards 1: ' 16_choose block.st - 'the {c|m}at s{a|i}t'
says 0 '11 tokens, forwards 2: ' 16_choose ar.st - 'the {c|m}at s{a|i}t'
says 0 'bits/byte' 16_choose -l block.st - 'the cat ' 'sat on the mat.' 'ate.'
says 1 'bare.st' 16_choose bare.st - 'the {c|m}at'
says 1 'no {place} in the form' 16_choose block.st - 'the cat'
says 1 'not one token (-l takes longer ones): "mat"' 16_choose block.st - '{c|mat}'
says 1 'no }, or too many {: "c|mat' 16_choose block.st - '{c|mat'
says 1 'choice 0: 2 candidates at 0, wants' 16_choose ar.st - '{c|m}at'
says 1 'too long' 16_choose block.st - "$(head -c 5000 "$dir/text"){a|b}"
says 1 'there is room for 128' 16_choose block.st - "$long{a|b}"
says 1 'missing' 16_choose llama.bin missing '{a|b}'
absent out.st 12_convert

keep block.st; keep run.st.train; keep run_capitals.st
for file in missing folder; do
    says 1 "$file: cannot be read" 02_train_text $file new.st
done
for file in empty short; do
    says 1 "$file: 10 KB .. 32 MB of text" 02_train_text $file new.st
done
says 2 'usage: ' 02_train_text text new.st 0
says 2 'usage: ' 02_train_text text new.st 9 f16
for width in 0 33 -32 1056 wide; do
    says 2 'usage: ' 02_train_text text new.st 9 f32 $width
done
for bpe in 0 511 8193 many; do
    says 2 'usage: ' 02_train_text text new.st 9 f32 32 $bpe
done
says 1 'cannot be written' 02_train_text text no/such/new.st
says 1 'folder: cannot be written' 02_train_text text folder
says 1 'block.st: is there, but no .train' 02_train_text text block.st
says 1 'run_capitals.st is of another text' 02_train_text text run_capitals.st
says 1 'run_short.st: not a model of this program' 02_train_text text run_short.st
says 1 'run_bare.st: holds no tokenizer' 02_train_text text run_bare.st
same block.st 02_train_text; same run.st.train 02_train_text
same run_capitals.st 02_train_text; absent new.st 02_train_text
absent new.st.train 02_train_text
says 0 'run.st.train: from step 0 on' 02_train_text text run.st 1
says 0 'run.st.train: from step 1 on' 02_train_text text run.st 1
says 0 'saved' 02_train_text text bpe.st 1 f32 32 8192
says 0 'bpe.st.train: from step 1 on' 02_train_text text bpe.st 1 f32 32 512
says 0 'tokens in' 03_sample bpe.st

# --[ sudoku and countdown ]-----------------------------------------------------------
for name in sudoku countdown; do
    for file in missing empty folder three bare.st; do
        says 1 $file $name eval $file $file
    done
    says 1 'cannot be written' $name train no/such/model.st
    says 1 'cannot be written' $name train folder
    says 1 'SEED is a whole number' $name train out.st 1.5
    says 1 'cannot open missing' $name eval $name.st missing
    says 1 'the file cannot be read' $name eval $name.st folder
    says 2 'usage: ' $name eval $name.st
    says 2 'usage: ' $name evaluate $name.st text
done
says 1 'BLANKS is a whole number from 1 to 12, not 13' sudoku gen block.st 13
says 1 'COUNT is a whole number' sudoku gen block.st 8 -1
says 1 'SEED is a whole number' sudoku gen block.st 8 5 x
says 1 'COUNT is a whole number' countdown gen block.st 0
says 1 'cannot write' sudoku gen no/such/file.csv
says 1 'cannot write' countdown gen folder
same block.st gen; absent out.st train
says 0 '' sudoku gen good.csv 8 3
says 0 'n=3' sudoku eval sudoku.st good.csv
says 0 '' countdown gen good.jsonl 3
says 0 'n=3' countdown eval countdown.st good.jsonl

# lines TASK WORDS STATUS LINE...: a file of these lines (printf formats) is evaluated.
lines() {
    task=$1; status=$2; words=$3; shift 3
    printf "$@" > "$dir/lines"
    says "$status" "$words" "$task" eval $task.st lines
}
grid=1234341221434321
lines sudoku 0 'n=1' "\357\273\277Puzzle,Solution\r\n\n$grid,$grid\r\n"
lines sudoku 1 'no puzzles in' 'Puzzle,Solution\n'
lines sudoku 1 'line 1: not the header Puzzle,Solution but: puzzle' 'puzzle\n'
lines sudoku 1 'line 3: not 16 digits' "Puzzle,Solution\n\n12,$grid\n"
lines sudoku 1 'but: 1234' "Puzzle,Solution\n$grid,${grid}5\n"
lines sudoku 1 'too long a line' "Puzzle,Solution\n%0300d\n" 7
says 0 'no solution at all' sudoku show sudoku.st 1100000000000000
says 0 'more than one solution' sudoku show sudoku.st 0000000000000000
says 0 'its grid' sudoku show sudoku.st $grid
says 1 'not 16 digits' sudoku show sudoku.st 123

problem() { lines countdown "$1" "$2" '{"input":%s,"output":%s}\n' "$3" "$4"; }
problem 0 'n=1' '"30, 7,2"' 23
problem 0 'n=1' '"30,7,2"' '"23"'
problem 0 '1 with numbers beyond 1..100' '"30,7,2"' '"-5"'
for wrong in '[30,7,2]' '"-30,7,2"' '"30.5,7,2"' '"30.5,7"' '"30,7"' '"30,7,2,1"' \
             '"x30,7,2"' '"30,7,2 or so"' '"30,7,99999999999999999999"' 30; do
    problem 1 "\"output\":\"23\"} but: {\"input\":$wrong" "$wrong" 23
done
for wrong in 23.5 '"23.5"' '[23]' '"2 3"' '""' '"23' 1e2; do
    problem 1 'line 1: not {"input"' '"30,7,2"' "$wrong"
done
lines countdown 0 'n=1' '\357\273\277{"input":"30,7,2","output":"23"}\r\n\n'
lines countdown 1 'line 2: not' '{"input":"30,7,2","output":"23"}\n{}\n'
says 1 'not three whole numbers' countdown show countdown.st 30,-7,2 23
says 1 'not a whole number' countdown show countdown.st 30,7,2 23.5
says 1 'go from 1 to 100' countdown show countdown.st 30,7,2 500

# --[ benches ]-----------------------------------------------------------------------
says 2 'pentium: not understood' bench_matmul pentium
says 2 'twice: not understood' bench_matmul --quick scalar twice
says 2 'full: not understood' bench_step --quick full
says 2 'neon: not understood' bench_sample neon
for name in bench_lift bench_opd; do
    says 2 'usage: ' $name --only el9
    says 2 'usage: ' $name --seeds 5-4
    says 2 'usage: ' $name --out
    says 2 'usage: ' $name report
    says 1 'missing: cannot be read' $name report missing
    says 1 'folder: cannot be read' $name report folder
    says 1 'cannot be written' $name smoke --out no/such/file
done
says 2 'usage: ' bench_opd --arm none
says 2 'usage: ' bench_opd --rate none
says 1 'missing: cannot be read' bench_opd --model missing
says 1 'missing: cannot be read' bench_lift --text missing
echo "programs: $passed passed, $failed failed"
test "$failed" -eq 0
