/* What the views of `squeeze analyze` share: costs of a workload, names, output. */
#include "analyze.h"

#include <math.h>
#include <stdio.h>

#include "common.h"
#include "json_output.h"

const char *const phase_names[N_PHASES] = {"prefill", "decode"};
const char *const score_traffic_names[] = {"talk", "chip", "memory", NULL};

struct sqz_costs analysis_costs(const struct analysis *a, enum analyze_phase phase, size_t batch, size_t n_tokens)
{
    struct sqz_costs costs;
    struct sqz_error error;
    struct sqz_workload work = phase == PHASE_PREFILL ? sqz_workload_prefill(batch, n_tokens)
                                                      : sqz_workload_decode(batch, n_tokens, a->n_generated);
    work.causal = a->causal;
    work.scores = a->scores;
    if (sqz_roofline(&costs, &a->shape, &a->bits, &work, &a->lookup, &error) != SQZ_OK)
        usage_error("%s", error.message);
    return costs;
}

double analysis_intensity(const struct sqz_costs *costs)
{
    const struct sqz_op_cost sum = sqz_costs_sum(costs, SQZ_CLASS_AGGREGATE);
    return sqz_op_cost_intensity(&sum);
}

const char *bound_name(const struct analysis *a, const struct sqz_op_cost *cost)
{
    return sqz_op_cost_intensity(cost) < sqz_roof_ridge(&a->roof) ? "memory" : "compute";
}

void fill_counts(struct count_list *list, size_t first, size_t n)
{
    if (list->n > 0) return;
    for (size_t i = 0; i < n; i++) list->value[list->n++] = first << i;
}

const char *short_count(char text[NUMBER_TEXT_MAX], size_t count)
{
    const size_t k = 1024, m = k * k;
    const bool millions = count >= m && count % m == 0, thousands = count >= k && count % k == 0;
    snprintf(text, NUMBER_TEXT_MAX, "%zu%s",
             millions    ? count / m
             : thousands ? count / k
                         : count,
             millions    ? "M"
             : thousands ? "K"
                         : "");
    return text;
}

/* ---- Output ------------------------------------------------------------------------------ */

void print_subject(const struct analysis *a)
{
    const struct sqz_model_shape *s = &a->shape;
    char weights[NUMBER_TEXT_MAX], token[NUMBER_TEXT_MAX], experts[64] = "";
    char name[PLAIN_TEXT_MAX];
    if (a->format != OUTPUT_TEXT) return;
    if (s->n_expert) snprintf(experts, sizeof experts, ", %u of %u experts", s->n_expert_used, s->n_expert);
    printf("model    %s: %.4g billion parameters, %u layers, d %u, %u heads, %u key-value heads of %u, %s FFN %u%s\n"
           "         %s of weights, %s of KV cache a token (%.4g-bit weights, %.4g-bit KV)\n",
           plain_text(name, s->name), sqz_shape_parameters(s) / 1e9, s->n_layer, s->n_embd, s->n_head, s->n_head_kv,
           s->head_dim, s->gated_ffn ? "gated" : "plain", s->n_ff, experts,
           bytes_text(weights, (uint64_t)sqz_shape_weight_bytes(s, &a->bits)),
           bytes_text(token, (uint64_t)sqz_shape_kv_bytes(s, &a->bits, 1)), a->bits.weight, a->bits.kv);
    if (!a->machine.name[0]) { /* none counts */
        printf("\n");
        return;
    }
    if (!(a->roof.flops_per_second < INFINITY)) {
        printf("machine  %s: %.4g GB/s (a long copy)\n\n", a->machine.name, a->roof.bytes_per_second / 1e9);
        return;
    }
    printf("machine  %s: %.4g TFLOP/s %s, %.4g GB/s, ridge point %.4g FLOP/byte\n\n", a->machine.name,
           a->roof.flops_per_second / 1e12, sqz_precision_name(a->machine.precision), a->roof.bytes_per_second / 1e9,
           sqz_roof_ridge(&a->roof));
}

static json_t *model_json(const struct analysis *a)
{
    const struct sqz_model_shape *s = &a->shape;
    json_t *model = json_object();
    const struct {
        const char *key;
        double value;
    } numbers[] = {
        {"parameters", sqz_shape_parameters(s)},
        {"layers", s->n_layer},
        {"width", s->n_embd},
        {"heads", s->n_head},
        {"kv_heads", s->n_head_kv},
        {"head_dim", s->head_dim},
        {"ffn_width", s->n_ff},
        {"vocabulary", s->n_vocab},
        {"experts", s->n_expert},
        {"active_experts", s->n_expert_used},
        {"shared_ffn_width", s->n_ff_shared},
        {"window_layers", s->n_window_layer},
        {"window_tokens", s->n_window_tokens},
        {"weight_bytes", sqz_shape_weight_bytes(s, &a->bits)},
        {"kv_bytes_a_token", sqz_shape_kv_bytes(s, &a->bits, 1)},
        {"weight_bits", a->bits.weight},
        {"output_bits", a->bits.output},
        {"kv_bits", a->bits.kv},
        {"activation_bits", a->bits.activation},
    };
    json_object_set_new(model, "name", json_text(s->name));
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        json_object_set_new(model, numbers[i].key, json_number(numbers[i].value));
    json_object_set_new(model, "gated_ffn", json_boolean(s->gated_ffn));
    json_object_set_new(model, "tied_embeddings", json_boolean(s->tied_embeddings));
    return model;
}

static json_t *roof_json(const struct analysis *a)
{
    json_t *machine = json_object();
    json_object_set_new(machine, "name", json_text(a->machine.name));
    json_object_set_new(machine, "note", json_text(a->machine.note));
    json_object_set_new(machine, "precision",
                        a->roof.flops_per_second < INFINITY ? json_text(sqz_precision_name(a->machine.precision))
                                                            : json_null());
    json_object_set_new(machine, "flops_per_second", json_number(a->roof.flops_per_second));
    json_object_set_new(machine, "bytes_per_second", json_number(a->roof.bytes_per_second));
    json_object_set_new(machine, "memory_bytes", json_number(a->machine.memory_bytes));
    json_object_set_new(machine, "ridge_flop_per_byte", json_number(sqz_roof_ridge(&a->roof)));
    return machine;
}

static int print_as_json(const struct analysis *a, const struct table *tables, size_t n, json_t *more)
{
    json_t *root = json_object();
    json_object_set_new(root, "model", model_json(a));
    json_object_set_new(root, "roofline", roof_json(a));
    json_object_set_new(root, "generated_tokens", json_count(a->n_generated));
    json_object_set_new(root, "causal", json_boolean(a->causal));
    json_object_set_new(root, "scores", json_text(score_traffic_names[a->scores]));
    for (size_t i = 0; i < n; i++) json_object_set_new(root, tables[i].name, table_json(&tables[i]));
    if (more) {
        json_object_update(root, more);
        json_decref(more);
    }
    json_object_set_new(root, "version", json_text(sqz_version()));
    json_object_set_new(root, "command", json_command_line());
    return print_json(root);
}

int analysis_print(const struct analysis *a, struct table *tables, size_t n, json_t *more)
{
    int code = 0;
    if (a->format == OUTPUT_JSON) {
        code = print_as_json(a, tables, n, more);
    } else {
        json_decref(more);
        for (size_t i = 0; i < n; i++) {
            if (i > 0) printf("\n");
            (a->format == OUTPUT_CSV ? table_print_csv : table_print)(&tables[i]);
        }
        code = close_stdout();
    }
    for (size_t i = 0; i < n; i++) table_free(&tables[i]);
    return code;
}
