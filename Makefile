# make           build everything into build/     make test    run the tests
# make demo      train and watch, one minute      make bench   measure this machine
# make check     all that a change must pass      make clean   remove build/
# Nothing here makes dlm.h faster: kernels are chosen at run time (DLM_ISA=avx2 etc.).

CC      ?= cc
CROSS   ?= aarch64-linux-gnu-gcc
QEMU    ?= qemu-aarch64
WARN     = -Wall -Wextra -pedantic -Wshadow -Wconversion
CFLAGS  ?= -O2 -std=c99 $(WARN) -Wstrict-prototypes
LDLIBS   = -lm -pthread
BUILD    = $(CC) $(CFLAGS) -I.
STRICT   = -std=c99 $(WARN) -Wstrict-prototypes -Werror -I.
EXAMPLES = $(wildcard examples/*.c)
BENCHES  = $(wildcard bench/*.c)
MEASURES = build/bench_matmul build/bench_step build/bench_sample
SOURCES  = dlm_test.c $(EXAMPLES) $(BENCHES) $(wildcard bench/oracle/*.c)
HELPERS  = $(wildcard examples/*.h bench/*.h bench/*.sh bench/*.awk bench/oracle/*.*[!c])

all: build/dlm_test examples benches
examples: $(EXAMPLES:examples/%.c=build/%)
benches: $(BENCHES:bench/%.c=build/%)

build/dlm_test: dlm_test.c dlm.h $(wildcard examples/*.h) bench/rivals.h \
                examples/00_by_hand.c examples/07_check_gradient.c
	@mkdir -p build
	$(BUILD) $< -o $@ $(LDLIBS)
build/%: examples/%.c dlm.h $(wildcard examples/*.h)
	@mkdir -p build
	$(BUILD) $< -o $@ $(LDLIBS)
build/%: bench/%.c $(wildcard bench/*.h) dlm.h
	@mkdir -p build
	$(BUILD) -DDLM_BENCH_FLAGS='"$(CFLAGS)"' $< -o $@ $(LDLIBS)

test: build/dlm_test
	@build/dlm_test
demo: build/demo
	@build/demo
bench: $(MEASURES)
	@for b in $(MEASURES); do $$b --quick || exit 1; done

check: lines hygiene cxx strict readme programs oracle
	@$(MAKE) --output-sync -j2 san cross tcc mingw         # the long ones, side by side
	@echo "check: every stage passed"

lines:
	@echo "== lines: budgets, longest functions, width, what lies at the top"
	@awk -f bench/lines.awk dlm.h $(SOURCES) $(HELPERS) Makefile README.md
	@! ls | grep -vxE 'dlm\.h|dlm_test\.c|examples|bench|Makefile|README\.md|build'
hygiene:
	@echo "== hygiene: every promised way of including dlm.h"
	@CC="$(CC)" sh bench/hygiene.sh build/hygiene
cxx:
	@echo "== cxx: header, tests and a small program as C++, optimised and linked"
	@sh bench/compilers.sh cxx
tcc mingw:
	@echo "== $@: tests and programs with $@"
	@sh bench/compilers.sh $@
strict:
	@for cc in gcc clang; do echo "== strict: $$cc, warnings are errors"; \
	   command -v $$cc > /dev/null || { echo "$$cc is not here, skipped"; continue; }; \
	   for f in $(SOURCES); do $$cc $(STRICT) -O2 -fsyntax-only $$f || exit 1; done; \
	   for no in STDIO THREADS SIMD; do \
	   $$cc $(STRICT) -DDLM_NO_$$no -fsyntax-only dlm_test.c || exit 1; done; \
	   $$cc $(STRICT) -O2 dlm_test.c -o build/dlm_test_$$cc $(LDLIBS) || exit 1; done
readme:
	@echo "== readme: its programs and the one on top of dlm.h compile"
	@mkdir -p build/readme && rm -f build/readme/*
	@awk '/^```c$$/ { on = 1; text = ""; next } /^```/ { if (on && text ~ /int main/) { \
	   f = "build/readme/" ++n ".c"; printf "%s", text > f; close(f) } on = 0; next } \
	   on { text = text $$0 "\n" } END { print n + 0 " programs"; exit n == 0 }' README.md
	@awk '/A WHOLE PROGRAM/ { on = 1; next } on && /^       / { print substr($$0, 8) } \
	   on && /^       }/ { exit }' dlm.h > build/readme/top.c
	@for f in build/readme/*.c; do $(BUILD) -Werror $$f -o $${f%.c} $(LDLIBS) && \
	   { DLM_ISA=none $${f%.c} > /dev/null; test $$? -eq 1; } || exit 1; done
programs:
	@echo "== programs: all of examples/ and bench/, given what is wrong"
	@CC="$(CC)" sh bench/programs.sh build/programs
oracle:
	@echo "== oracle: against programs of others"; CC="$(CC)" sh bench/oracle/run.sh
san:
	@echo "== san: the tests under address and undefined-behaviour sanitizers"
	@mkdir -p build
	$(CC) -std=c99 -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -I. \
	   dlm_test.c -o build/dlm_test_san $(LDLIBS) && build/dlm_test_san
cross:
	@echo "== cross: the tests on aarch64, emulated"
	@if command -v $(CROSS) > /dev/null && command -v $(QEMU) > /dev/null; then \
	   mkdir -p build && $(CROSS) -std=c99 -O2 -I. -static dlm_test.c \
	   -o build/dlm_test_aarch64 $(LDLIBS) && $(QEMU) build/dlm_test_aarch64; \
	 else echo "$(CROSS) or $(QEMU) is not here, skipped"; fi
clean:
	rm -rf build
.PHONY: all test demo bench check lines hygiene cxx tcc mingw strict readme programs \
        oracle san cross clean
