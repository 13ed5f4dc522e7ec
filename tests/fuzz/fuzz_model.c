/* A model's metadata: what is read of a GGUF file before llama.cpp loads it. */
#include "fuzz.h"
#include "model.h"

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n)
{
    struct sqz_model_shape shape;
    struct sqz_bit_widths widths;
    struct sqz_error error = {SQZ_OK, ""};
    const enum sqz_status status = sqz_model_shape_read(fuzz_file(bytes, n), &shape, &widths, &error);
    if (status && !error.message[0])
        fuzz_fail("a model that cannot be read is refused with a reason", sqz_status_name(status));
    if (!status) {
        volatile double sum = sqz_shape_parameters(&shape) + sqz_shape_kv_bytes(&shape, &widths, 1000);
        (void)sum;
    }
    return 0;
}
