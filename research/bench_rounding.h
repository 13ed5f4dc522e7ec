/* `squeeze bench rounding`: bench_rounding.c. */
#ifndef SQZ_RESEARCH_BENCH_ROUNDING_H
#define SQZ_RESEARCH_BENCH_ROUNDING_H

/* argv[0] is the subject's name. Returns the exit code. */
int bench_rounding(int argc, char **argv);

#endif
