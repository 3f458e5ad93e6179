#!/bin/sh
# hygiene.sh - dlm.h as a guest in other people's programs: every way of including and
# building it that is promised, with gcc and clang where present.
# Use: sh bench/hygiene.sh [scratch folder], from the top of the repository.
set -u
dir=${1:-build/hygiene}
mkdir -p "$dir/inc/sub"
cp dlm.h "$dir/inc/sub/dlm.h" && cp dlm.h "$dir/inc/other_name.h" || exit 1
strict='-Wall -Wextra -pedantic -Wshadow -Wconversion -Wstrict-prototypes -Werror'
passed=0 failed=0

# says LABEL COMMAND...: the command must succeed; its output is shown if it does not.
says() {
    label=$1; shift
    if "$@" > "$dir/log" 2>&1; then passed=$((passed + 1)); return 0; fi
    failed=$((failed + 1)); echo "FAIL $label: $*"; head -n 12 "$dir/log"; return 1
}

# refuses LABEL TEXT COMMAND...: the command must fail and print TEXT.
refuses() {
    label=$1; text=$2; shift 2
    if "$@" > "$dir/log" 2>&1; then failed=$((failed + 1)); echo "FAIL $label: accepted"
    elif grep -q "$text" "$dir/log"; then passed=$((passed + 1))
    else failed=$((failed + 1)); echo "FAIL $label: no '$text' in:"; head -n 5 "$dir/log"
    fi
}

nothing() { ! grep .; }                    # succeeds on empty input

# prints OBJECT PATTERN: symbols of OBJECT (type and name) that match.
symbols() { nm "$1" | sed 's/^[0-9a-f]* *//' | grep -E "$2"; }

# Compiles, allocates, trains nothing: one context, one product, one shutdown.
program='
int main(void)
{
    float a[4] = { 1, 2, 3, 4 }, out[4];
    dlm_ctx *ctx;
    if (dlm_init(&ctx, NULL) != DLM_OK) return 1;
    dlm_matmul_nn(ctx, out, a, a, 2, 2, 2);
    dlm_shutdown(ctx);
    return out[0] == 7.0f && out[3] == 22.0f ? 0 : 1;
}'

unit() { printf '%s\n' "$2" > "$dir/$1.c"; }

unit whole "#define DLM_IMPLEMENTATION
#include \"dlm.h\"
$program"
unit user "#include \"dlm.h\"
$program"
unit body '#define DLM_IMPLEMENTATION
#include "dlm.h"'
unit twice "#include \"dlm.h\"
#include \"dlm.h\"
#define DLM_IMPLEMENTATION
#include \"dlm.h\"
#include \"dlm.h\"
$program"
unit local "#define DLM_STATIC
#include \"dlm.h\"
$program"
unit sub "#define DLM_IMPLEMENTATION
#include \"sub/dlm.h\"
$program"
unit renamed "#define DLM_IMPLEMENTATION
#define DLM_SELF \"other_name.h\"
#include \"other_name.h\"
$program"
unit half_hooks '#define DLM_MALLOC(size) 0
#define DLM_IMPLEMENTATION
#include "dlm.h"'

# The macros of the includer, as programs, Arduino.h and windows.h define them: none may
# break the header, all must come through it unchanged, #if and all.
numbers='A B C D E F G H I J K L M N O P Q R S T U V W X Y Z PI ERROR IN OUT CONST VOID
         HIGH LOW INPUT OUTPUT DEFAULT near far small interface pascal cdecl TILE RUN'
words='MIN MAX MR NR FOR ABS SWAP UNUSED INLINE ALIGN EPS LANES BLOCK CHUNK BF16 INT8'
functions='max(a,b)|((a)>(b)?(a):(b))
min(a,b)|((a)<(b)?(a):(b))
abs(x)|((x)>0?(x):-(x))
round(x)|((long)(x))
constrain(x,low,high)|((x)<(low)?(low):(x)>(high)?(high):(x))
sq(x)|((x)*(x))
bit(b)|(1UL<<(b))
add(a,b)|((a)+(b))
dot(...)|dot_of(__VA_ARGS__)
word(...)|make_word(__VA_ARGS__)'
define_all() {
    for name in $numbers; do echo "#define $name 7"; done
    for name in $words; do echo "#define $name %% this is the includer %%"; done
    echo "$functions" | sed 's/^\(.*\)|/#define \1 /'
}
# The same text before and after: what a macro with arguments becomes shows all of it.
unchanged() {
    echo '#include <string.h>'
    echo '#define STRING(...) STRING_(__VA_ARGS__)'
    echo '#define STRING_(...) #__VA_ARGS__'
    echo 'int main(void)'
    echo '{'
    for name in $numbers; do echo "    if (strcmp(STRING($name), \"7\")) return 1;"; done
    for name in $words; do echo "    if (STRING($name)[0] != '%') return 1;"; done
    echo "$functions" | sed \
        's/^\([a-z]*\)\(.*\)|\(.*\)/    if (strcmp(STRING(\1\2), "\3")) return 1;/' |
        sed 's/(\.\.\.)/(a,b)/; s/__VA_ARGS__/a,b/'
    echo '    return 0;'
    echo '}'
}
macro_units='macros macros_twice macros_user'
{ define_all; cat "$dir/body.c"; unchanged; } > "$dir/macros.c"
{ define_all; sed '/^int main/,$d' "$dir/twice.c"; unchanged; } > "$dir/macros_twice.c"
{ define_all; echo '#include "dlm.h"'; unchanged; } > "$dir/macros_user.c"

# build CC LABEL UNIT FLAGS...: strict, linked, and run.
build() {
    cc=$1; label="$cc: $2"; name=$3; shift 3
    says "$label" $cc $strict -I. -I"$dir/inc" "$@" "$dir/$name.c" -o "$dir/a.out" \
         -lm -pthread && says "$label, run" "$dir/a.out"
}

one_compiler() {
    cc=$1
    for std in c99 gnu11 c17; do build $cc "$std" whole -std=$std -O1; done
    build $cc "-O0" whole -std=c99 -O0
    build $cc "-O3" whole -std=c99 -O3
    for unit in $macro_units; do build $cc "$unit" $unit -std=c99 -O0; done
    build $cc "included twice" twice -std=c99 -O0
    build $cc "DLM_STATIC" local -std=c99 -O1
    build $cc "from another folder" sub -std=c99 -O0
    build $cc "under another name" renamed -std=c99 -O0
    for option in DLM_NO_SIMD DLM_NO_STDIO DLM_NO_THREADS; do
        build $cc "$option" whole -std=c99 -O1 -D$option
    done
    build $cc "all three DLM_NO" whole -std=c99 -O1 -DDLM_NO_SIMD -DDLM_NO_STDIO \
          -DDLM_NO_THREADS
    says "$cc: no warning that a plain c99 user asks for" \
         $cc -std=c99 -Wall -Wextra -Werror -I. -O0 -c "$dir/body.c" -o "$dir/body.o"
    says "$cc: declarations alone" $cc -std=c99 $strict -I. -c "$dir/user.c" \
         -o "$dir/user.o"
    says "$cc: two translation units" $cc "$dir/user.o" "$dir/body.o" -o "$dir/a.out" \
         -lm -pthread && says "$cc: two translation units, run" "$dir/a.out"
    refuses "$cc: -ffast-math" 'fast-math' $cc -ffast-math -I. -c "$dir/body.c" \
            -o "$dir/fast.o"
    refuses "$cc: -ffinite-math-only" 'without -ffinite-math-only' $cc \
            -ffinite-math-only -I. -c "$dir/body.c" -o "$dir/fast.o"
    if $cc -fassociative-math -fno-signed-zeros -fno-trapping-math -E -dM \
           "$dir/user.c" -I. 2> "$dir/log" | grep -q __ASSOCIATIVE_MATH__; then
        refuses "$cc: -funsafe-math-optimizations" 'without -fassociative-math' $cc \
                -funsafe-math-optimizations -I. -c "$dir/body.c" -o "$dir/fast.o"
    fi
    says "$cc: -fno-signed-zeros and -freciprocal-math, which do no harm" \
         $cc -fno-signed-zeros -freciprocal-math -I. -c "$dir/body.c" -o "$dir/fast.o"
    says "$cc: -ffast-math where allowed" $cc -ffast-math -DDLM_ALLOW_FAST_MATH -I. \
         -c "$dir/body.c" -o "$dir/fast.o"
    refuses "$cc: DLM_MALLOC without DLM_FREE" 'DLM_FREE' $cc -I. -c "$dir/half_hooks.c" \
            -o "$dir/half.o"
}

# The macros with other compilers; the library of C++ undefines some while it is included.
other_compiler() {
    for unit in $macro_units; do
        says "$1: $unit" "$@" -Wall -Werror -I. "$dir/$unit.c" -o "$dir/a.out" -lm \
             -pthread && says "$1: $unit, run" "$dir/a.out"
    done
}

# What the header leaves behind: macros, symbols, state, calls it must not make.
leaks() {
    cc=$1
    $cc -std=c99 -O1 -fno-pic -I. -c "$dir/body.c" -o "$dir/body.o" || return
    $cc -std=c99 -O1 -fno-pic -I. -DDLM_NO_STDIO -DDLM_NO_THREADS -c "$dir/body.c" \
        -o "$dir/bare.o" || return
    $cc -std=c99 -I. -E -dD "$dir/body.c" | awk '
        /^# [0-9]+ "/ { ours = $3 ~ /dlm\.h"$/ }
        ours && $1 == "#define" && $2 !~ /^(DLM_|dlm_)/ { print $2 }' > "$dir/macros.txt"
    says 'every macro begins with DLM_ or dlm_' nothing < "$dir/macros.txt"
    symbols "$dir/body.o" '^[A-TV-Z] ' | grep -v ' dlm_[a-z]' > "$dir/symbols.txt"
    says 'every exported symbol begins with dlm_' nothing < "$dir/symbols.txt"
    symbols "$dir/body.o" '^[A-TV-Z] dlm__' > "$dir/symbols.txt"
    says 'nothing private is exported' nothing < "$dir/symbols.txt"
    symbols "$dir/body.o" '^[bBdDC] ' > "$dir/symbols.txt"
    says 'no global or static variable' nothing < "$dir/symbols.txt"
    symbols "$dir/body.o" '^U (exit|abort|printf|puts|putchar|rand|srand|time)$' \
        > "$dir/symbols.txt"
    says 'no printing, no exit, no hidden randomness' nothing < "$dir/symbols.txt"
    # strtof is fed the locale's decimal point, and a test tries locales; nothing else is
    symbols "$dir/body.o" '^U .*(strtol?d|strtou?l|ato[filq]+|localeconv)(@.*)?$' \
        > "$dir/symbols.txt"
    says 'no number passes through the locale unseen' nothing < "$dir/symbols.txt"
    symbols "$dir/bare.o" '^U (f[a-z]*(open|close|read|write|seek|tell)|pthread_.*)$' \
        > "$dir/symbols.txt"
    says 'DLM_NO_STDIO and DLM_NO_THREADS leave neither' nothing < "$dir/symbols.txt"
}

for cc in gcc clang; do
    if command -v $cc > "$dir/log" 2>&1; then one_compiler $cc
    else echo "hygiene: $cc is not here, skipped"; fi
done
for cc in 'g++ -x c++ -std=c++17' 'clang++ -x c++ -std=c++11' 'tcc -std=c99'; do
    if command -v ${cc%% *} > "$dir/log" 2>&1; then other_compiler $cc
    else echo "hygiene: ${cc%% *} is not here, skipped"; fi
done
leaks "${CC:-cc}"
echo "hygiene: $passed passed, $failed failed"
test "$failed" -eq 0
