/* llama.cpp as a library, see llama_library.h. */
#include "llama_library.h"

#include "llama.h"

const char *sqz_llama_version(void)
{
    return llama_version();
}
