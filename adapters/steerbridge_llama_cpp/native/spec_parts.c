#include "spec_parts.h"

#include <inttypes.h>
#include <stdio.h>

enum { MAX_LAYER = 1 << 16, MAX_OFFSET = 1 << 20, MAX_WINDOW = 1 << 12, MAX_TOKENS = 1 << 12 };

void *sh_items(const sh_compiler *c, const sh_place *array, size_t count, size_t size) {
    void *items = sh_arena_new(&c->package->arena, count, size);
    if (items == NULL) {
        sh_refuse(array, "memory", "none");
    }
    return items;
}

/* ---- tensors and sites ---- */

static void write_size(char *out, size_t size, int64_t value) {
    if (value == SH_ANY_SIZE) {
        snprintf(out, size, "any");
    } else {
        snprintf(out, size, "%" PRId64, value);
    }
}

static bool refuse_shape(const sh_place *at, int64_t rows, int64_t cols,
                         const sh_gguf_tensor *stored) {
    char first[24];
    char second[24];
    char want[80];
    write_size(first, sizeof first, rows);
    write_size(second, sizeof second, cols);
    snprintf(want, sizeof want, rows == SH_VECTOR ? "shape [%.0s%s]" : "shape [%s, %s]", first,
             second);
    return sh_refuse(at, want, "%s with %" PRIu32 " dimensions, rows %" PRIu64 ", columns %" PRIu64,
                     sh_quote(stored->name).text, stored->n_dims, stored->shape[1],
                     stored->shape[0]);
}

static bool fits(int64_t want, uint64_t got) {
    return got >= 1 && (want == SH_ANY_SIZE || (uint64_t)want == got);
}

bool sh_tensor_field(const sh_compiler *c, const sh_place *in, const char *name, unsigned flags,
                     int64_t rows, int64_t cols, sh_tensor *tensor) {
    sh_place at;
    if (!sh_field(in, name, SH_JSON_STRING, flags, &at)) {
        return false;
    }
    if (at.node == NULL) {
        return true;
    }
    sh_text text = sh_json_text(at.node);
    const sh_gguf_tensor *stored = sh_gguf_tensor_named(c->gguf, text);
    if (stored == NULL) {
        return sh_refuse(&at, "the name of a tensor in the package", "%s", sh_quote(text).text);
    }
    bool vector = rows == SH_VECTOR;
    if (stored->n_dims != (vector ? 1U : 2U) || !fits(cols, stored->shape[0]) ||
        !fits(vector ? 1 : rows, stored->shape[1])) {
        return refuse_shape(&at, rows, cols, stored);
    }
    *tensor = (sh_tensor){.data = stored->data, .rows = (int64_t)stored->shape[1],
                          .cols = (int64_t)stored->shape[0], .dtype = stored->dtype};
    return true;
}

static bool compile_site(const sh_compiler *c, const sh_place *site, bool head_allowed,
                         int32_t *depth) {
    static const char *const streams[] = {"layer_input", "layer_output", "head_input", NULL};
    static const char *const layer_streams[] = {"layer_input", "layer_output", NULL};
    static const char *const of_head[] = {"stream", NULL};
    static const char *const of_layer[] = {"stream", "layer", NULL};
    int stream = 0;
    int32_t layer = 0;
    if (!sh_choice(site, "stream", head_allowed ? streams : layer_streams, &stream) ||
        !sh_only(site, stream == 2 ? of_head : of_layer)) {
        return false;
    }
    int32_t n_layer = c->package->n_layer;
    if (stream == 2) {
        *depth = n_layer + 1;
        return true;
    }
    int32_t last = stream == 0 ? n_layer : n_layer - 1;
    if (!sh_integer(site, "layer", SH_REQUIRED, 0, last < MAX_LAYER ? last : MAX_LAYER, &layer)) {
        return false;
    }
    *depth = layer + stream;
    return true;
}

bool sh_site(const sh_compiler *c, const sh_place *in, bool head_allowed, int32_t *depth) {
    sh_place site;
    return sh_field(in, "site", SH_JSON_OBJECT, SH_REQUIRED, &site) &&
           compile_site(c, &site, head_allowed, depth);
}

/* ---- probes ---- */

static bool compile_reading(const sh_compiler *c, const sh_place *at, sh_reading *reading) {
    static const char *const types[] = {"prompt_end", "prompt_mean", "image_mean", NULL};
    static const char *const fields[] = {"site", "position", NULL};
    static const char *const of_end[] = {"type", "offset", NULL};
    static const char *const of_mean[] = {"type", NULL};
    sh_place position;
    int type = 0;
    if (!sh_site(c, at, true, &reading->depth) ||
        !sh_field(at, "position", SH_JSON_OBJECT, SH_REQUIRED, &position) ||
        !sh_choice(&position, "type", types, &type) || !sh_only(at, fields) ||
        !sh_only(&position, type == 0 ? of_end : of_mean)) {
        return false;
    }
    reading->position = (sh_position)type;
    if (reading->position == SH_PROMPT_END &&
        !sh_integer(&position, "offset", SH_OPTIONAL, -MAX_OFFSET, 0, &reading->offset)) {
        return false;
    }
    bool at_end = reading->position == SH_PROMPT_END && reading->offset == 0;
    if (reading->depth == c->package->n_layer + 1 && !at_end) {
        return sh_refuse(&position, "prompt_end at head_input", "another row, never computed");
    }
    return true;
}

static bool compile_readings(const sh_compiler *c, const sh_place *at, sh_probe *probe) {
    sh_place array;
    sh_place item = {0};
    if (!sh_array(at, "readings", 1, 64, &array)) {
        return false;
    }
    probe->n_readings = (int32_t)array.node->count;
    probe->readings = sh_items(c, &array, array.node->count, sizeof *probe->readings);
    if (probe->readings == NULL) {
        return false;
    }
    while (sh_next(&array, &item)) {
        if (item.node->type != SH_JSON_OBJECT) {
            return sh_refuse(&item, "an object", "another value");
        }
        if (!compile_reading(c, &item, &probe->readings[item.index])) {
            return false;
        }
    }
    return true;
}

/* ---- readings over tokens ---- */

static bool compile_row_sites(const sh_compiler *c, const sh_place *at, sh_token_reading *out) {
    sh_place array;
    sh_place item = {0};
    if (!sh_array(at, "sites", 1, SH_MAX_ROW_SITES, &array)) {
        return false;
    }
    out->n_sites = (int32_t)array.node->count;
    while (sh_next(&array, &item)) {
        int32_t *depth = &out->sites[item.index];
        sh_text stream = {NULL, 0};
        if (item.node->type != SH_JSON_OBJECT) {
            return sh_refuse(&item, "an object", "another value");
        }
        if (!sh_string(&item, "stream", &stream) || !compile_site(c, &item, false, depth)) {
            return false;
        }
        bool inside = *depth >= 1 && *depth < c->package->n_layer;
        if (!sh_text_is(stream, "layer_input") || !inside) {
            return sh_refuse(&item, "the input of a block but the first", "depth %ld",
                             (long)*depth);
        }
        for (uint32_t i = 0; i < item.index; i++) {
            if (out->sites[i] == *depth) {
                return sh_refuse(&item, "each site once", "depth %ld again", (long)*depth);
            }
        }
    }
    return true;
}

static bool compile_tokens(const sh_compiler *c, const sh_place *at, sh_token_reading *out) {
    static const char *const fields[] = {"sites", "scope", "window", "skip", "rows", NULL};
    static const char *const scopes[] = {"prompt", "answer", "both", NULL};
    static const char *const filters[] = {"all", "text", "image", NULL};
    int scope = 0;
    int filter = 0;
    bool ok = sh_only(at, fields) && compile_row_sites(c, at, out) &&
              sh_choice(at, "scope", scopes, &scope) && sh_choice(at, "rows", filters, &filter) &&
              sh_integer(at, "window", SH_REQUIRED, 1, MAX_WINDOW, &out->window) &&
              sh_integer(at, "skip", SH_REQUIRED, 0, MAX_OFFSET, &out->skip);
    out->scope = (sh_scope)scope;
    out->rows = (sh_row_filter)filter;
    return ok;
}

/* Either readings or a token_reading; how many vectors they concatenate. */
static bool compile_inputs(const sh_compiler *c, const sh_place *at, sh_probe *probe,
                           int64_t *n_vectors) {
    sh_place tokens;
    sh_place readings;
    if (!sh_field(at, "token_reading", SH_JSON_OBJECT, SH_OPTIONAL | SH_NULLABLE, &tokens) ||
        !sh_field(at, "readings", SH_JSON_ARRAY, SH_OPTIONAL, &readings)) {
        return false;
    }
    bool pooled = readings.node != NULL && readings.node->count > 0;
    if (pooled == (tokens.node != NULL)) {
        return sh_refuse(at, "either readings or a token_reading", pooled ? "both" : "neither");
    }
    bool ok = pooled ? compile_readings(c, at, probe) : compile_tokens(c, &tokens, &probe->tokens);
    *n_vectors = pooled ? probe->n_readings : probe->tokens.n_sites;
    return ok;
}

/* classes: distinct strings, one of them `harmful`. */
static bool compile_softmax(const sh_place *output, sh_probe *probe, int64_t *n_outputs) {
    sh_place array;
    sh_text harmful = {NULL, 0};
    if (!sh_array(output, "classes", 2, 1024, &array) ||
        !sh_string(output, "harmful", &harmful)) {
        return false;
    }
    sh_place item = {0};
    probe->harmful = -1;
    while (sh_next(&array, &item)) {
        if (item.node->type != SH_JSON_STRING) {
            return sh_refuse(&item, "a string", "another value");
        }
        for (const sh_json_node *other = array.node + 1; other != item.node; other++) {
            if (sh_text_equal(sh_json_text(other), sh_json_text(item.node))) {
                return sh_refuse(&item, "distinct names", "%s",
                                 sh_quote(sh_json_text(item.node)).text);
            }
        }
        if (sh_text_equal(sh_json_text(item.node), harmful)) {
            probe->harmful = (int32_t)item.index;
        }
    }
    *n_outputs = array.node->count;
    return probe->harmful >= 0 ||
           sh_refuse(output, "harmful: one of the classes", "%s", sh_quote(harmful).text);
}

static bool compile_output(const sh_place *at, sh_probe *probe, int64_t *n_outputs) {
    static const char *const types[] = {"softmax", "sigmoid", NULL};
    static const char *const polarities[] = {"high", "low", NULL};
    static const char *const of_softmax[] = {"type", "classes", "harmful", NULL};
    static const char *const of_sigmoid[] = {"type", "harmful_when", NULL};
    sh_place output;
    int type = 0;
    int low = 0;
    if (!sh_field(at, "output", SH_JSON_OBJECT, SH_REQUIRED, &output) ||
        !sh_choice(&output, "type", types, &type) ||
        !sh_only(&output, type == 0 ? of_softmax : of_sigmoid)) {
        return false;
    }
    probe->softmax = type == 0;
    if (probe->softmax) {
        return compile_softmax(&output, probe, n_outputs);
    }
    *n_outputs = 1;
    bool ok = sh_choice(&output, "harmful_when", polarities, &low);
    probe->harmful_low = low == 1;
    return ok;
}

static bool compile_mlp(const sh_compiler *c, const sh_place *at, int64_t width,
                        sh_probe *probe) {
    static const char *const activations[] = {"relu", "tanh", "gelu", NULL};
    sh_place array;
    sh_place item = {0};
    int activation = 0;
    int64_t n_outputs = 0;
    if (!sh_choice(at, "activation", activations, &activation) ||
        !compile_output(at, probe, &n_outputs) || !sh_array(at, "layers", 1, 16, &array)) {
        return false;
    }
    probe->activation = (sh_activation)activation;
    probe->n_layers = (int32_t)array.node->count;
    probe->layers = sh_items(c, &array, array.node->count, sizeof *probe->layers);
    if (probe->layers == NULL) {
        return false;
    }
    while (sh_next(&array, &item)) {
        sh_dense *layer = &probe->layers[item.index];
        int64_t rows = item.index + 1 == array.node->count ? n_outputs : SH_ANY_SIZE;
        if (item.node->type != SH_JSON_OBJECT) {
            return sh_refuse(&item, "an object", "another value");
        }
        static const char *const fields[] = {"weight", "bias", NULL};
        if (!sh_only(&item, fields) ||
            !sh_tensor_field(c, &item, "weight", SH_REQUIRED, rows, width, &layer->weight) ||
            !sh_tensor_field(c, &item, "bias", SH_REQUIRED, SH_VECTOR, layer->weight.rows,
                             &layer->bias)) {
            return false;
        }
        width = layer->weight.rows;
    }
    return true;
}

static bool compile_single(const sh_compiler *c, const sh_place *at, int64_t width,
                           sh_probe *probe) {
    static const char *const links[] = {"identity", "sigmoid", NULL};
    static const char *const squashes[] = {"none", "tanh", NULL};
    bool linear = probe->type == SH_LINEAR;
    int squash = 0;
    if (!sh_tensor_field(c, at, linear ? "weight" : "direction", SH_REQUIRED, SH_VECTOR, width,
                         &probe->weight) ||
        !sh_choice(at, linear ? "link" : "squash", linear ? links : squashes, &squash)) {
        return false;
    }
    probe->squash = squash == 1;
    return !linear || sh_number(at, "bias", &probe->bias);
}

static bool positive(const sh_place *at, const sh_tensor *scale) {
    for (int64_t i = 0; scale->data != NULL && i < scale->cols; i++) {
        if (!(sh_value(scale, 0, i) > 0)) {
            return sh_refuse(at, "positive values in input_scale", "zero or negative ones");
        }
    }
    return true;
}

#define PROBE_FIELDS                                                                            \
    "id", "type", "readings", "token_reading", "input_mean", "input_scale", "comparator", "threshold"

static bool only_probe_fields(const sh_place *at, int type) {
    static const char *const mlp[] = {PROBE_FIELDS, "layers", "activation", "output", NULL};
    static const char *const linear[] = {PROBE_FIELDS, "weight", "bias", "link", NULL};
    static const char *const cosine[] = {PROBE_FIELDS, "direction", "squash", NULL};
    static const char *const *const by_type[] = {mlp, linear, cosine};
    return sh_only(at, by_type[type]);
}

/* A running score is a mean of logits that grow with harm. */
static bool check_tokens(const sh_place *at, const sh_probe *probe) {
    if (probe->tokens.n_sites == 0) {
        return true;
    }
    if (probe->type == SH_COSINE || (probe->type == SH_LINEAR && !probe->squash)) {
        return sh_refuse(at, "a sigmoid or softmax for a token_reading", "neither");
    }
    bool above = probe->comparator == SH_GREATER || probe->comparator == SH_GREATER_EQUAL;
    return above || sh_refuse(at, "comparator > or >= for a token_reading", "another");
}

bool sh_compile_probe(const sh_compiler *c, const sh_place *at, sh_probe *probe) {
    static const char *const types[] = {"mlp", "linear", "cosine", NULL};
    static const char *const comparators[] = {">", ">=", "<", "<=", NULL};
    int type = 0;
    int comparator = 0;
    unsigned maybe = SH_OPTIONAL | SH_NULLABLE;
    int64_t n_vectors = 0;
    if (!sh_identifier(at, "id", probe->id) || !sh_choice(at, "type", types, &type) ||
        !only_probe_fields(at, type) || !compile_inputs(c, at, probe, &n_vectors) ||
        !sh_choice(at, "comparator", comparators, &comparator) ||
        !sh_number(at, "threshold", &probe->threshold)) {
        return false;
    }
    probe->type = (sh_probe_type)type;
    probe->comparator = (sh_comparator)comparator;
    int64_t width = (int64_t)c->package->n_embd * n_vectors;
    return sh_tensor_field(c, at, "input_mean", maybe, SH_VECTOR, width, &probe->mean) &&
           sh_tensor_field(c, at, "input_scale", maybe, SH_VECTOR, width, &probe->scale) &&
           positive(at, &probe->scale) &&
           (probe->type == SH_MLP ? compile_mlp(c, at, width, probe)
                                  : compile_single(c, at, width, probe)) &&
           check_tokens(at, probe);
}

/* ---- interventions ---- */

static bool compile_head(const sh_compiler *c, const sh_place *at, sh_intervention *head) {
    static const char *const forms[] = {"dense", "low_rank", NULL};
    static const char *const fields[] = {"id", "type", "position", "eps", "weight", NULL};
    static const char *const of_dense[] = {"form", "matrix", NULL};
    static const char *const of_low_rank[] = {"form", "u", "v", NULL};
    sh_place weight;
    int form = 0;
    int64_t d = c->package->n_embd;
    head->min_depth = c->package->n_layer + 1;
    if (!sh_only(at, fields) || !sh_number(at, "eps", &head->factor) ||
        !sh_field(at, "weight", SH_JSON_OBJECT, SH_REQUIRED, &weight) ||
        !sh_choice(&weight, "form", forms, &form) ||
        !sh_only(&weight, form == 0 ? of_dense : of_low_rank)) {
        return false;
    }
    if (form == 0) {
        return sh_tensor_field(c, &weight, "matrix", SH_REQUIRED, d, d, &head->matrix);
    }
    return sh_tensor_field(c, &weight, "u", SH_REQUIRED, d, SH_ANY_SIZE, &head->u) &&
           sh_tensor_field(c, &weight, "v", SH_REQUIRED, head->u.cols, d, &head->v);
}

static bool compile_targets(const sh_compiler *c, const sh_place *at, sh_intervention *x) {
    static const char *const fields[] = {"id", "type", "position", "alpha", "targets", NULL};
    static const char *const of_target[] = {"site", "vector", NULL};
    sh_place array;
    sh_place item = {0};
    if (!sh_only(at, fields) || !sh_number(at, "alpha", &x->factor) || !sh_array(at, "targets", 1, 1 << 16, &array)) {
        return false;
    }
    x->n_targets = (int32_t)array.node->count;
    x->targets = sh_items(c, &array, array.node->count, sizeof *x->targets);
    x->min_depth = c->package->n_layer + 1;
    if (x->targets == NULL) {
        return false;
    }
    while (sh_next(&array, &item)) {
        sh_target *target = &x->targets[item.index];
        if (item.node->type != SH_JSON_OBJECT) {
            return sh_refuse(&item, "an object", "another value");
        }
        if (!sh_only(&item, of_target) || !sh_site(c, &item, false, &target->depth) ||
            !sh_tensor_field(c, &item, "vector", SH_REQUIRED, SH_VECTOR, c->package->n_embd,
                             &target->vector)) {
            return false;
        }
        x->min_depth = target->depth < x->min_depth ? target->depth : x->min_depth;
    }
    return true;
}

/* Token ids of the vocabulary. */
static bool compile_token_ids(const sh_compiler *c, const sh_place *in, const char *name,
                              uint32_t low, sh_ids *out) {
    sh_place array;
    sh_place item = {0};
    if (low == 0 && sh_json_member(in->json, in->node, name) == NULL) {
        return true;
    }
    if (!sh_array(in, name, low, MAX_TOKENS, &array)) {
        return false;
    }
    out->count = (int32_t)array.node->count;
    out->ids = sh_items(c, &array, array.node->count, sizeof *out->ids);
    while (out->ids != NULL && sh_next(&array, &item)) {
        double id = item.node->type == SH_JSON_INTEGER ? item.node->value.number : -1.0;
        if (id < 0 || id >= c->package->n_vocab) {
            return sh_refuse(&item, "the id of a token", "%.0f", id);
        }
        out->ids[item.index] = (int32_t)id;
    }
    return out->ids != NULL;
}

static bool compile_say(const sh_compiler *c, const sh_place *at, sh_intervention *say) {
    static const char *const fields[] = {"id", "type", "text", "header", "tokens", "reasoning",
                                         NULL};
    static const char *const of_marks[] = {"open", "close", NULL};
    sh_place marks;
    sh_text text = {NULL, 0};
    say->factor = 1.0;
    say->min_depth = c->package->n_layer + 2;
    if (!sh_only(at, fields) || !sh_string(at, "text", &text) ||
        !compile_token_ids(c, at, "header", 0, &say->header) ||
        !compile_token_ids(c, at, "tokens", 1, &say->tokens) ||
        !sh_field(at, "reasoning", SH_JSON_OBJECT, SH_OPTIONAL | SH_NULLABLE, &marks)) {
        return false;
    }
    return marks.node == NULL ||
           (sh_only(&marks, of_marks) && compile_token_ids(c, &marks, "open", 1, &say->open) &&
            compile_token_ids(c, &marks, "close", 1, &say->close));
}

bool sh_compile_intervention(const sh_compiler *c, const sh_place *at, sh_intervention *x) {
    static const char *const types[] = {"head_matrix", "add_vector", "project_out", "say", NULL};
    static const char *const positions[] = {"from_prompt_end", "all_positions", NULL};
    int type = 0;
    int position = 0;
    if (!sh_identifier(at, "id", x->id) || !sh_choice(at, "type", types, &type)) {
        return false;
    }
    x->type = (sh_intervention_type)type;
    if (x->type == SH_SAY) {
        return compile_say(c, at, x);
    }
    if (!sh_choice(at, "position", positions, &position)) {
        return false;
    }
    x->all_positions = position == 1;
    return x->type == SH_HEAD_MATRIX ? compile_head(c, at, x) : compile_targets(c, at, x);
}
