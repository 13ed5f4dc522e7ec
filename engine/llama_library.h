/*
 * llama.cpp as a library that is linked in, whatever model it runs: its
 * version, and its log, which is the whole process's. Errors of the log are
 * kept where the program has called sqz_llama_log_take() of squeeze.h; the
 * library itself never does.
 */
#ifndef SQZ_ENGINE_LLAMA_LIBRARY_H
#define SQZ_ENGINE_LLAMA_LIBRARY_H

/* Version text of the llama.cpp linked in. */
const char *sqz_llama_version(void);

/* For error messages: what llama.cpp complained about first since the last _clear(), `otherwise` when about nothing.
 * Where nobody has taken the log: that the reason is there. */
const char *sqz_llama_complaint(const char *otherwise);
void sqz_llama_complaint_clear(void);

#endif
