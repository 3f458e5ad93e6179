# lines.awk - sections of dlm.h against their budgets, then the house rules for all
# files given: functions of at most 60 lines, 50 in dlm.h, 90 columns, no tabs, ASCII.
# Use: awk -f bench/lines.awk dlm.h dlm_test.c examples/*.c bench/*.c ...
# A section over its budget is a remark for review; everything marked FAIL fails.

BEGIN {
    total_target = 10200; total_limit = 11500
    function_limit = 60; header_limit = 50; width_limit = 90
    split("top:280 api:1090 platform:120 memory:220 random:120 cpu:190 kernels:805 " \
          "instances:425 threads:250 context:165 matmul:460 layers:335 " \
          "attention:365 config:45 parameters:540 patterns:50 work:330 passes:340 " \
          "sessions:125 states:430 trainer:160 optimizer:140 lift:200 steps:150 " \
          "sampler:850 likelihood:120 distill:440 json:270 files:250 " \
          "unicode:50 tokenizers:1130 safetensors:310 checkpoints:370 llama2c:80 " \
          "loading:90 options:135 quantised:350 hf:400 history:35 license:45", words, " ")
    for (i in words) { split(words[i], pair, ":"); budget[pair[1]] = pair[2] }
    files["README.md"] = 170; files["Makefile"] = 95
    files["examples/00_by_hand.c"] = 300            # a whole model, not one feature
    files["examples/demo.c"] = 510                  # seven stages
}

function fail(where, text) { printf "FAIL %s: %s\n", where, text; failures++ }

# The name in front of the first parenthesis; TEST(name) and DLM__K(name)(...) hide it.
function function_name(line) {
    if (line ~ /^TEST\(/) { sub(/\).*$/, ")", line); return line }
    sub(/^.*DLM__K\(/, "", line); sub(/^.*DLM__TARGET /, "", line)
    sub(/[()].*$/, "", line); sub(/^.*[ *]/, "", line)
    return line
}

function function_ends(first, last) {
    n_functions++; length_of[n_functions] = last - first + 1
    name_of[n_functions] = name; file_of[n_functions] = FILENAME ":" first
}

FNR == 1 {
    section = "top"; start = 0; body = 0
    header = FILENAME ~ /(^|\/)dlm\.h$/
    n_files++
}

{ lines[FILENAME]++ }
/\t/ && FILENAME !~ /Makefile$/ { fail(FILENAME ":" FNR, "a tab") }
/[^ -~\t]/ && FILENAME !~ /README/ { fail(FILENAME ":" FNR, "not ASCII") }
/ +$/ { fail(FILENAME ":" FNR, "ends in a space") }
length($0) > width_limit && FILENAME !~ /README/ {
    fail(FILENAME ":" FNR, "is " length($0) " columns wide, the limit is " width_limit)
}

header && /^\/\* ==\[ [a-z0-9]+ \]==/ {
    section = $3
    if (section in size) fail(FILENAME ":" FNR, "a second section " section)
}
header { if (!(section in size)) { size[section] = 0; order[++n_sections] = section }
         size[section]++; total++
         if (in_comment || /\/\*/) comments++
         if (/\/\*/) in_comment = 1
         if (/\*\//) in_comment = 0 }

FILENAME !~ /\.[ch]$/ { next }

# A function starts in column 0, with a parenthesis, and ends at a brace in column 0.
/^[A-Za-z_]/ && !body { start = 0
    if (/\(/ && !/^(typedef|struct|enum|union|extern "C"|static const [^(]*=)/ &&
        !/ = /) { start = FNR; name = function_name($0) } }
start && !body && /;[ ]*(\/\*.*)?$/ && !/{/ { start = 0 }
start && !body && /{/ { body = 1
    if (/}[ ]*(\/\*.*)?$/) { function_ends(start, FNR); body = 0; start = 0 } }
body && /^}/ { function_ends(start, FNR); body = 0; start = 0 }

END {
    print "section        lines  budget"
    for (i = 1; i <= n_sections; i++) {
        s = order[i]; b = s in budget ? budget[s] : 0
        note = !b ? "  no budget for this name" : ""
        if (b && size[s] > b) note = "  over by " (size[s] - b)
        printf "%-12s %7d %7s%s\n", s, size[s], b ? b : "-", note
    }
    printf "%-12s %7d %7d  (hard stop %d), comments on %.0f %% of the lines\n", "total",
           total, total_target, total_limit, total ? 100 * comments / total : 0
    if (total > total_limit) fail("dlm.h", "is longer than " total_limit " lines")
    for (f in lines) {
        limit = f in files ? files[f] : f ~ /^examples\/[0-9]/ ? 200 : 0
        if (limit && lines[f] > limit) fail(f, lines[f] " lines, the limit is " limit)
    }
    for (i = 2; i <= n_functions; i++)     # insertion sort, the longest first
        for (j = i; j > 1 && length_of[j - 1] < length_of[j]; j--) {
            t = length_of[j]; length_of[j] = length_of[j - 1]; length_of[j - 1] = t
            t = name_of[j]; name_of[j] = name_of[j - 1]; name_of[j - 1] = t
            t = file_of[j]; file_of[j] = file_of[j - 1]; file_of[j - 1] = t
        }
    printf "%d functions, median %d lines, 90 %% at most %d; the longest:\n", n_functions,
           length_of[int((n_functions + 1) / 2)], length_of[int(n_functions / 10) + 1]
    for (i = 1; i <= n_functions && (i <= 5 || length_of[i] > header_limit); i++) {
        if (i <= 5) printf "%6d  %s (%s)\n", length_of[i], name_of[i], file_of[i]
        limit = file_of[i] ~ /(^|\/)dlm\.h:/ ? header_limit : function_limit
        if (length_of[i] > limit)
            fail(file_of[i], name_of[i] ": " length_of[i] " lines, the limit is " limit)
    }
    printf "lines: %d files, %d failed\n", n_files, failures
    exit failures > 0
}
