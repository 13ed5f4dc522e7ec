/* Exact answers; speculation.h describes it. */
#include "speculation.h"

#include "json_output.h"

const char *const exact_names[] = {"off", "f16", "int8", NULL};
const char *const draft_names[] = {"chain", "self", "ngram", "none", NULL};
const char *const draft_row_names[] = {"upper", "both", NULL};

void speculation_flags_apply(const struct speculation_flags *flags, struct sqz_session_options *options)
{
    options->exact = flags->exact;
    options->draft = flags->draft;
    options->draft_rows = flags->draft_rows;
    options->draft_budget = (float)flags->draft_budget;
    options->draft_tokens = (uint32_t)flags->draft_tokens;
    options->draft_steady = flags->steady;
}

static double share(uint64_t part, uint64_t whole)
{
    return whole ? (double)part / (double)whole : 0;
}

double speculation_accepted(const struct sqz_speculation_stats *s)
{
    return share(s->n_accepted, s->n_drafted);
}

double speculation_agreed(const struct sqz_speculation_stats *s)
{
    return share(s->n_accepted, s->n_tested);
}

double speculation_tokens_a_cycle(const struct sqz_speculation_stats *s)
{
    return share(s->n_accepted + s->n_cycles, s->n_cycles);
}

void print_speculation(const struct sqz_speculation_stats *s, FILE *file)
{
    if (s->n_cycles == 0) return;
    fprintf(
        file,
        "drafted %llu tokens, %llu of them from the text, reading %.1f%% of the context; %.1f%% were kept, %.2f tokens "
        "a cycle\n",
        (unsigned long long)s->n_drafted, (unsigned long long)s->n_drafted_by_text,
        100.0 * sqz_attention_stats_share(&s->draft), 100.0 * speculation_accepted(s), speculation_tokens_a_cycle(s));
}

json_t *speculation_json(const struct sqz_speculation_stats *s)
{
    json_t *root = json_object();
    json_object_set_new(root, "n_cycles", json_count(s->n_cycles));
    json_object_set_new(root, "n_drafted", json_count(s->n_drafted));
    json_object_set_new(root, "n_drafted_by_text", json_count(s->n_drafted_by_text));
    json_object_set_new(root, "n_accepted", json_count(s->n_accepted));
    json_object_set_new(root, "n_tested", json_count(s->n_tested));
    json_object_set_new(root, "accepted", json_number(speculation_accepted(s)));
    json_object_set_new(root, "agreed", json_number(speculation_agreed(s)));
    json_object_set_new(root, "tokens_a_cycle", json_number(speculation_tokens_a_cycle(s)));
    json_object_set_new(root, "draft_budget", json_number((double)s->draft_budget));
    json_object_set_new(
        root, "draft_rows",
        json_string(s->draft_rows == SQZ_DRAFT_ROWS_F16 ? exact_names[SQZ_EXACT_F16] : draft_row_names[s->draft_rows]));
    json_object_set_new(root, "draft_read", json_number(sqz_attention_stats_share(&s->draft)));
    json_object_set_new(root, "draft_seconds", json_number(s->draft_seconds));
    json_object_set_new(root, "verify_seconds", json_number(s->verify_seconds));
    return root;
}
