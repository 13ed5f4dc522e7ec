# Speed-up over the best dense kernel by query count, one curve a share pruned:
#   jq -r '.rows[] | select(.tokens == 524288 and .kv_heads == 32 and .ratio != null)
#          | select(.op == "squeezed" or .op == "squeezed, block") | [.queries, .pruned, .ratio] | @tsv' RESULT.json > points
#   sort -n points -o points; gnuplot -e "points='points'; plot_out='speed-up.svg'" plot.gnuplot
set terminal svg size 640,400 font "sans,12"
set output plot_out
set logscale x 2
set xlabel "queries"
set ylabel "times the best dense kernel"
set yrange [0:*]
set grid ytics
set key top right
plot points using 1:($2 == 0.9 ? $3 : NaN) with linespoints title "90% pruned", \
     points using 1:($2 == 0.7 ? $3 : NaN) with linespoints title "70% pruned", \
     1 with lines dashtype 2 title "dense"
