/* `squeeze bench cluster`: bench_cluster.c. */
#ifndef SQZ_RESEARCH_BENCH_CLUSTER_H
#define SQZ_RESEARCH_BENCH_CLUSTER_H

/* argv[0] is the subject's name. Returns the exit code. */
int bench_cluster(int argc, char **argv);

#endif
