#!/bin/sh
# compilers.sh - dlm.h with the compilers its users have, warnings being errors; what is
# not installed is skipped.
# Use: sh bench/compilers.sh cxx|tcc|mingw [scratch folder], from the top.
set -eu
stage=$1
dir=${2:-build/$stage}
mkdir -p "$dir"
warn='-Wall -Wextra -pedantic -Wshadow -Wconversion -Werror'
libs='-lm -pthread'

here() { command -v "$1" > /dev/null || { echo "$1 is not here, skipped"; return 1; }; }
tried() { "$@" || { echo "FAIL $*"; exit 1; }; }

# A program of a user, optimised and linked: some warnings come only when kernels have
# been inlined, and which ones depends on the level.
cat > "$dir/guest.cpp" << 'END'
#define DLM_IMPLEMENTATION
#include "dlm.h"
int main()
{
    dlm_options o = {};
    dlm_ctx *ctx = nullptr;
    o.threads = 2;
    dlm_error e = dlm_init(&ctx, &o);
    dlm_shutdown(ctx);
    return e;
}
END

guest() {
    tried "$@" $warn -I. "$dir/guest.cpp" -o "$dir/guest" $libs
    tried "$dir/guest"
}

stage_cxx() {
    for cc in g++ clang++; do
        here $cc || continue
        guest $cc -std=c++11 -O2
        guest $cc -std=gnu++17 -O2
        for level in -O0 -O1 -O2 -O3 -Os -Og; do guest $cc -std=c++20 $level; done
        for std in c++11 c++20; do
            tried $cc -x c++ -std=$std -O2 -Wall -Wextra -pedantic -Werror -I. \
                  -Wno-missing-field-initializers dlm_test.c -o "$dir/dlm_test" $libs
        done
    done
}

# No atomics, hence no pool; kernels are scalar, so that only a few tests are run.
stage_tcc() {
    here tcc || return 0
    for f in examples/*.c dlm_test.c; do
        tried tcc -std=c99 -Wall -Werror -I. $f -o "$dir/program" $libs
    done
    for some in matmul random context checkpoint; do tried "$dir/program" $some; done
}

# Linked, not run.  Its isfinite and signbit narrow what they are given.
stage_mingw() {
    cc=x86_64-w64-mingw32-gcc
    here $cc || return 0
    for f in examples/*.c bench/*.c dlm_test.c; do
        tried $cc -std=c99 -O0 $warn -Wno-float-conversion -I. $f -o "$dir/program.exe" \
              $libs
    done
}

stage_$stage
