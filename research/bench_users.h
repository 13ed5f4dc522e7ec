/* squeeze bench users: many users' questions on one context at once. */
#ifndef SQZ_RESEARCH_BENCH_USERS_H
#define SQZ_RESEARCH_BENCH_USERS_H

int bench_users(int argc, char **argv);

#endif
