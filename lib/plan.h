/*
 * What a head does at a budget, from the curve that calibration left.
 */
#ifndef SQZ_LIB_PLAN_H
#define SQZ_LIB_PLAN_H

#include "layer.h"

/* What a head does at a budget. */
struct sqz_head_plan {
    float log_threshold; /* -INFINITY: everything is retained */
    float tail_gain;     /* g */
    float variance_gain; /* a */
};

/* The plan of a head at a budget, the threshold multiplied by exp(offset). */
struct sqz_head_plan sqz_head_plan_at(const struct sqz_layer *layer, uint32_t head_kv, float budget, float offset);

/* The same in two steps: where on its curve the budget lies, with global_share the same for all heads, and what the plan
 * is there. */
#define SQZ_NO_POSITION (-1.0f) /* everything is read */
float sqz_head_position(const struct sqz_layer *layer, uint32_t head_kv, float budget);
struct sqz_head_plan sqz_head_plan_of(const struct sqz_layer *layer, uint32_t head_kv, float position, float offset);

/* Share of the head's KV bytes that its calibration queries read at a budget. */
float sqz_head_share_at(const struct sqz_layer *layer, uint32_t head_kv, float budget);
/* Attention mass that they lost of the head's at a budget. */
float sqz_head_lost_at(const struct sqz_layer *layer, uint32_t head_kv, float budget);
/* The share of a plan whose threshold is finite. */
float sqz_head_share_of(const struct sqz_layer *layer, uint32_t head_kv, const struct sqz_head_plan *plan);

#endif
