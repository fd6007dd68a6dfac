/* A steering package, compiled: ids resolved to indices, tensors to checked pointers.
 *
 * A site is its depth, as in spec.py: layer_input[L] is L, layer_output[k] is k + 1 and
 * head_input is n_layer + 1. Two names of one place have one depth.
 */
#ifndef STEERHOOK_PACKAGE_H
#define STEERHOOK_PACKAGE_H

#include <stdatomic.h>

#include "kernels.h"
#include "steerhook.h"

typedef enum { SH_PROMPT_END, SH_PROMPT_MEAN, SH_IMAGE_MEAN } sh_position;
typedef enum { SH_GREATER, SH_GREATER_EQUAL, SH_LESS, SH_LESS_EQUAL } sh_comparator;
typedef enum { SH_MLP, SH_LINEAR, SH_COSINE } sh_probe_type;
typedef enum { SH_RELU, SH_TANH, SH_GELU } sh_activation;
typedef enum { SH_HEAD_MATRIX, SH_ADD_VECTOR, SH_PROJECT_OUT, SH_SAY } sh_intervention_type;
typedef enum { SH_PROMPT, SH_ANSWER, SH_BOTH } sh_scope;
typedef enum { SH_ALL_ROWS, SH_TEXT_ROWS, SH_IMAGE_ROWS } sh_row_filter;

typedef struct {
    int32_t depth, offset;
    sh_position position;
} sh_reading;

enum { SH_MAX_ROW_SITES = 4 };

/* A reading over tokens; `n_sites` is 0 where there is none. */
typedef struct {
    int32_t n_sites, sites[SH_MAX_ROW_SITES];
    sh_scope scope;
    sh_row_filter rows;
    int32_t window, skip;
} sh_token_reading;

typedef struct {
    sh_tensor weight, bias;
} sh_dense;

typedef struct {
    int32_t count;
    int32_t *ids;
} sh_ids;

typedef struct {
    char id[64];
    sh_probe_type type;
    sh_comparator comparator;
    double threshold;
    int32_t n_readings, n_layers;
    sh_reading *readings;
    sh_token_reading tokens;
    sh_tensor mean, scale; /* of the input; data NULL: none */
    sh_dense *layers;      /* mlp */
    sh_activation activation;
    bool softmax, harmful_low; /* mlp: the output; harmful_low belongs to sigmoid */
    int32_t harmful;           /* softmax: the class that means harm */
    sh_tensor weight;          /* linear: weight; cosine: direction */
    double bias;               /* linear */
    bool squash;               /* linear: sigmoid; cosine: tanh */
} sh_probe;

typedef struct {
    int32_t depth;
    sh_tensor vector;
} sh_target;

typedef struct {
    char id[64];
    sh_intervention_type type;
    bool all_positions;
    double factor; /* eps or alpha */
    int32_t n_targets;
    sh_target *targets;
    sh_tensor matrix;   /* dense head */
    sh_tensor u, v;     /* low-rank head: W = u v */
    int32_t min_depth;  /* the first site where it acts */
    sh_ids tokens, header, open, close; /* say */
} sh_intervention;

typedef struct {
    char id[64];
    bool conditional, all; /* all or any of the probes */
    int32_t n_probes, n_interventions;
    int32_t *probes, *interventions;
    int32_t strength_probe; /* -1: constant */
    double strength;        /* the constant, or the scale of the score */
} sh_rule;

typedef struct {
    sh_text runtime, quantisation, weights; /* weights: no bytes for any checkpoint */
    int32_t n_thresholds;
    int32_t *probes;
    double *thresholds;
} sh_calibration;

struct steerhook_package {
    atomic_uint references;
    int32_t n_embd, n_layer, n_vocab;
    int32_t n_probes, n_interventions, n_rules, n_calibrations;
    sh_probe *probes;
    sh_intervention *interventions;
    sh_rule *rules;
    sh_calibration *calibrations;
    sh_arena arena;  /* holds all of the above */
    void *mapping;   /* the file, if this package mapped it */
    size_t mapped;
};

/* Reads and checks the spec; tensors are looked up in `gguf`. */
bool sh_compile_spec(steerhook_package *package, sh_text spec, const sh_gguf *gguf,
                     const sh_error *error);

void sh_package_share(const steerhook_package *package);

#endif
