/* llama.cpp as a library that is linked in, whatever model it runs. */
#ifndef SQZ_ENGINE_LLAMA_LIBRARY_H
#define SQZ_ENGINE_LLAMA_LIBRARY_H

/* Version text of the llama.cpp linked in. */
const char *sqz_llama_version(void);

#endif
