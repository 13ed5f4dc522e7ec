/* `squeeze bench logits`: bench_logits.c. */
#ifndef SQZ_RESEARCH_BENCH_LOGITS_H
#define SQZ_RESEARCH_BENCH_LOGITS_H

int bench_logits(int argc, char **argv);

#endif
