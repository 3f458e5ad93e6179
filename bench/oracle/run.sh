#!/bin/sh
# run.sh - dlm.h against programs of others: a part for each, which says "skipped" when
# its program is not to be had.
# Use: sh bench/oracle/run.sh [scratch folder], from the top of the repository.
set -u
dir=${1:-build/oracle}
mkdir -p "$dir" || exit 1
status=0
sh bench/oracle/tokenizers.sh "$dir" || status=1
sh bench/oracle/folders.sh "$dir" || status=1
exit $status
