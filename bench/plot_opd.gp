# plot_opd.gp - pictures of what bench_opd found.
#   gnuplot -e "csv='opd.csv'; task='sudoku'" bench/plot_opd.gp
# Writes opd_<task>_tokens.png (quality over tokens) and opd_<task>_threshold.png (quality
# over tokens per step, one line per arm, a point per threshold); means over seeds.
if (!exists("csv")) csv = "opd.csv"
if (!exists("task")) task = "stories"
set terminal pngcairo size 900,600
set datafile separator ","
set key outside right noenhanced
set grid
set ylabel (task eq "sudoku") ? "exact grids" : "minus excess nats per token"

# One line per arm: tokens, then quality and tokens per step of every threshold.
means = sprintf("< awk -F, -v task=%s '$2 == task && $4 != \"teacher\" { n[$4]++; ".\
    "t[$4] += $6; for (g = 0; g < 5; g++) { q[$4, g] += $(12 + 4 * g); ".\
    "s[$4, g] += $(13 + 4 * g) } } END { for (a in n) { printf \"%%s,%%f\", a, ".\
    "t[a] / n[a]; for (g = 0; g < 5; g++) printf \",%%f,%%f\", q[a, g] / n[a], ".\
    "s[a, g] / n[a]; print \"\" } }' %s", task, csv)

set output sprintf("opd_%s_tokens.png", task)
set xlabel "response tokens learnt from"
set logscale x
plot means using ($2 > 0 ? $2 : NaN):3 with points pt 7 notitle, \
     means using ($2 > 0 ? $2 : NaN):3:1 with labels left offset 1,0 noenhanced notitle

unset logscale x
set output sprintf("opd_%s_threshold.png", task)
set xlabel "tokens per denoising step (one; thresholds 0.95, 0.9, 0.85, 0.8)"
arms = system(sprintf("awk -F, -v task=%s '$2 == task && $4 != \"teacher\" && ".\
    "$4 != \"untouched\" && !seen[$4]++ { print $4 }' %s", task, csv))
row(a) = sprintf("%s | awk -F, -v arm=%s '$1 == arm { for (g = 0; g < 5; g++) ".\
    "print $(4 + 2 * g) \",\" $(3 + 2 * g) }'", means, a)
plot for [a in arms] row(a) using 1:2 with linespoints pt 7 title a
