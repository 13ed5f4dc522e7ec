/* What a client of `squeeze serve` sends, and the JSON that a model streams: a body within limits, its values, messages,
 * schemas as grammars, tool calls, and text that arrives in pieces with stops in it. */
#include "fuzz.h"

#include <stdlib.h>
#include <string.h>

#include "grammar.h"
#include "input.h"
#include "spoken.h"
#include "talk.h"
#include "tools.h"

/* A fault says what it is about, and its body is JSON whatever the client's words were. */
static void check_fault(const struct fault *fault)
{
    struct bytes body = {0};
    if (!fault->status) return;
    if (fault->status < 400 || fault->status > 599 || !fault->message[0])
        fuzz_fail("a fault has a status and a sentence", "it has not");
    for (int api = API_OPENAI; api <= API_ANTHROPIC; api++) {
        fault_body(fault, api, &body);
        json_t *root = body.data ? json_loadb(body.data, body.n, 0, NULL) : NULL;
        if (!root || !json_object_get(root, "error")) fuzz_fail("a fault's body is JSON", body.data);
        json_decref(root);
        bytes_free(&body);
    }
}

static void read_values(const json_t *body)
{
    struct fault faults[4] = {{0}};
    double real = 0.5;
    int64_t count = 5;
    bool flag = false;
    const char *text = "";
    input_real(body, "temperature", 0, 10, &real, &faults[0]);
    input_count(body, "max_tokens", 1, INT32_MAX, &count, &faults[1]);
    input_flag(body, "stream", &flag, &faults[2]);
    input_text(body, "model", &text, &faults[3]);
    if (!(real >= 0 && real <= 10) || count < 1 || count > INT32_MAX || !text)
        fuzz_fail("values are within their bounds", "one is not");
    for (int i = 0; i < 4; i++) check_fault(&faults[i]);
}

static void read_messages(const json_t *body)
{
    struct talk talk = {0};
    struct fault fault = {0};
    size_t i;
    json_t *one;
    json_array_foreach(json_object_get(body, "messages"), i, one)
    {
        struct bytes *text = talk_say(&talk, i % 3 ? "user" : "assistant", &fault);
        if (!text || !talk_content(text, json_object_get(one, "content"), "content", &fault)) break;
        if (text->n && memchr(text->data, '\r', text->n)) fuzz_fail("lines end in one way", "a carriage return");
    }
    if (!fault.status) talk_instruct(&talk, "Be brief.", 9, &fault);
    check_fault(&fault);
    talk_free(&talk);
}

static void read_schema(const json_t *body)
{
    const json_t *schema = json_object_get(body, "schema");
    struct bytes grammar = {0};
    struct fault fault = {0};
    struct tools tools = {.choice = TOOL_REQUIRED, .named = -1};
    if (grammar_of_schema(&grammar, schema ? schema : body, &fault) == (fault.status != 0))
        fuzz_fail("a schema is a grammar or a fault", "neither, or both");
    check_fault(&fault);
    bytes_free(&grammar);
    fault = (struct fault){0};
    if (tools_add(&tools, json_string_value(json_object_get(body, "name")), NULL, schema, &fault))
        tools_grammar(&tools, &grammar, &fault);
    check_fault(&fault);
    bytes_free(&grammar);
    tools_free(&tools);
}

/* In pieces as in one, and always UTF-8. */
static void stream(const uint8_t *bytes, size_t n)
{
    char first[] = "\n\n", second[] = "</s>", third[] = "a";
    const struct stops stops = {n && bytes[0] & 1 ? 3 : 2, {first, second, third}};
    const size_t step = n ? 1 + bytes[0] % 7u : 1;
    struct spoken whole, pieces;
    size_t ready = 0, n_plain;
    spoken_begin(&whole);
    spoken_begin(&pieces);
    spoken_put(&whole, &stops, (const char *)bytes, n);
    for (size_t at = 0; at < n; at += step) {
        spoken_put(&pieces, &stops, (const char *)bytes + at, n - at < step ? n - at : step);
        if (pieces.n_ready < ready) fuzz_fail("what went out stays", "it was taken back");
        ready = pieces.n_ready;
    }
    spoken_end(&whole);
    spoken_end(&pieces);
    if (whole.text.n != pieces.text.n || (whole.text.n && memcmp(whole.text.data, pieces.text.data, whole.text.n) != 0))
        fuzz_fail("pieces say what the whole says", "they differ");
    json_t *text = json_stringn(whole.text.data ? whole.text.data : "", whole.text.n);
    if (!text) fuzz_fail("an answer is UTF-8", "it is not");
    json_decref(text);
    for (enum call_format format = CALLS_MARKED; format <= CALLS_LLAMA; format++) {
        json_decref(calls_read(format, (const char *)bytes, n, &n_plain));
        if (n_plain > n || calls_plain_bytes(format, (const char *)bytes, n) > n)
            fuzz_fail("text lies within the answer", "beyond");
    }
    spoken_free(&whole);
    spoken_free(&pieces);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n)
{
    struct fault fault = {0};
    char *copy = malloc(n ? n : 1);
    if (!copy) return 0;
    if (n) memcpy(copy, bytes, n);
    json_t *body = input_parse(copy, n, &fault);
    if (!body == !fault.status) fuzz_fail("a body is an object or a fault", "neither, or both");
    check_fault(&fault);
    if (body) {
        read_values(body);
        read_messages(body);
        read_schema(body);
        json_decref(body);
    }
    stream((const uint8_t *)copy, n);
    free(copy);
    return 0;
}
