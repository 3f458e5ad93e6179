#!/bin/sh
# folders.sh - dlm.h against folders that numpy wrote, and numpy against folders that
# dlm.h saves.  Use: sh bench/oracle/folders.sh FOLDER, from the top of the repository.
#   check_folder DIR         opens it, runs ids.i32, prints as its last line "error E",
#                            the largest difference to logits.f64 over the largest logit;
#                            or ends with status 3, having printed why it was refused
#   check_folder DIR SAVED   saves what it opened in the folder SAVED, too
set -u
dir=$1
export PYTHONDONTWRITEBYTECODE=1
skipped() { echo "folders: $*, skipped"; exit 0; }

python=
for p in python3 /usr/bin/python3; do
    if $p -c "import numpy" 2> /dev/null; then python=$p; break; fi
done
[ -n "$python" ] || skipped "no Python 3 with numpy"
data=../shared/data
[ -d $data ] || data=shared/data
if [ -d $data/tiny_qwen3 ]; then
    $python bench/oracle/check_forward.py $data > "$dir/forward.log" \
        || { cat "$dir/forward.log"; exit 1; }
else echo "folders: no $data, the forward's own check skipped"; fi
$python bench/oracle/folders.py "$dir/folders" || exit 1
[ -f bench/oracle/check_folder.c ] || skipped "no check_folder.c"
${CC:-cc} -std=c99 -O2 -I. bench/oracle/check_folder.c -o "$dir/check_folder" \
    -lm -pthread || exit 1

passed=0 failed=0
pass() { passed=$((passed + 1)); }
fail() { failed=$((failed + 1)); echo "FAIL folders: $*"; }
below() {                              # NaN and words are no numbers
    awk -v e="$1" -v most="$2" 'BEGIN { exit !(e ~ /^[0-9]/ && e + 0 <= most + 0) }'
}

rm -rf "$dir/saved" && mkdir -p "$dir/saved" || exit 1
for folder in "$dir"/folders/*/; do
    name=$(basename "$folder")
    case $name in
        refuse) continue ;;
        mdlm | bd3lm | radd) most=1e-5 ;;
        *) most=1e-4 ;;
    esac
    "$dir/check_folder" "$folder" > "$dir/log" 2>&1
    error=$(awk '$1 == "error" { e = $2 } END { print e }' "$dir/log")
    if below "$error" $most; then pass; printf '%-18s %s\n' "$name" "$error"
    else fail "$name: $(tail -n 1 "$dir/log")"; continue; fi
    case $name in                      # what is saved under names that numpy reads
        llama* | qwen* | sdar | a2d* | fast-dllm | dream | open-dcoder) ;;
        *) continue ;;
    esac
    one=$dir/saved/$name.1 two=$dir/saved/$name.2
    mkdir "$one" "$two"
    "$dir/check_folder" "$folder" "$one" > "$dir/log" 2>&1
    $python bench/oracle/read_folder.py "$one" --against "$folder" > "$dir/log" 2>&1
    error=$(tail -n 1 "$dir/log")
    if below "$error" 1e-6; then pass; else fail "$name, saved: $error"; continue; fi
    cp "$folder/ids.i32" "$folder/logits.f64" "$folder/expect" "$one"
    "$dir/check_folder" "$one" "$two" > "$dir/log" 2>&1
    for file in "$two"/*; do
        if cmp -s "$file" "$one/${file##*/}"; then pass
        else fail "$name: saved twice, ${file##*/} differs"; fi
    done
done

for folder in "$dir"/folders/refuse/*/; do
    name=$(basename "$folder") word=$(cat "$folder/expect")
    "$dir/check_folder" "$folder" > "$dir/log" 2>&1
    status=$?
    if [ $status -eq 3 ] && grep -qF -e "$word" "$dir/log"; then pass
    else fail "refuse/$name: status $status, '$word' not in: $(tail -n 1 "$dir/log")"; fi
done
echo "folders: $passed passed, $failed failed"
[ $failed -eq 0 ]
