/*
 * How OpenMP's threads wait for each other. GNU's runtime lets them spin for
 * some 5 ms by default, which takes a core from whoever it is that the others
 * wait for: one busy process on two cores then leaves a thirtieth of the speed.
 */
#ifndef SQZ_PROGRAMS_WAIT_POLICY_H
#define SQZ_PROGRAMS_WAIT_POLICY_H

/* First of all in main(). The runtime reads its variables before main(), so where none says how to wait, this sets one
 * and starts the program again in its place. Returns when there is nothing to set, or when it cannot. */
void choose_wait_policy(char **argv);

#endif
