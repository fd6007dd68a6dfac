/* The spec of a package: its JSON becomes the structs of package.h, and every rule of spec.py
 * is checked on the way. Limits of our own: 1024 probes, interventions, rules, calibrations. */
#include <stdio.h>
#include <string.h>

#include "spec_parts.h"

enum { MAX_ITEMS = 1024, MAX_SIZE = 1 << 24, SUPPORTED_MAJOR = 1 };

/* ---- version and base model ---- */

static bool check_version(const sh_place *root) {
    sh_text version = {NULL, 0};
    size_t digits[2] = {0, 0};
    int major = 0;
    if (!sh_string(root, "spec_version", &version)) {
        return false;
    }
    size_t at = 0;
    for (int part = 0; part < 2; part++) {
        for (; at < version.size && version.data[at] >= '0' && version.data[at] <= '9'; at++) {
            major = part == 0 && digits[0] < 4 ? major * 10 + version.data[at] - '0' : major;
            digits[part]++;
        }
        if (part == 0 && (at == version.size || version.data[at++] != '.')) {
            break;
        }
    }
    bool spelt = digits[0] >= 1 && digits[0] <= 4 && digits[1] >= 1 && digits[1] <= 4 &&
                 at == version.size;
    if (!spelt || major != SUPPORTED_MAJOR) {
        return sh_refuse(root, spelt ? "spec_version 1.x (upgrade steerbridge)"
                                     : "spec_version 1.x", "%s", sh_quote(version).text);
    }
    return true;
}

static bool optional_string(const sh_place *in, const char *name) {
    sh_place at;
    return sh_field(in, name, SH_JSON_STRING, SH_OPTIONAL | SH_NULLABLE, &at);
}

static bool optional_hash(const sh_place *in, const char *name) {
    sh_place at;
    if (!sh_field(in, name, SH_JSON_STRING, SH_OPTIONAL | SH_NULLABLE, &at)) {
        return false;
    }
    if (at.node == NULL) {
        return true;
    }
    sh_text text = sh_json_text(at.node);
    bool ok = text.size == 64;
    for (size_t i = 0; i < text.size && ok; i++) {
        ok = (text.data[i] >= '0' && text.data[i] <= '9') ||
             (text.data[i] >= 'a' && text.data[i] <= 'f');
    }
    return ok || sh_refuse(&at, "64 lowercase hexadecimal digits", "%s", sh_quote(text).text);
}

static bool compile_head_fields(steerhook_package *package, const sh_place *root) {
    sh_place base;
    sh_text text;
    return sh_string(root, "name", &text) && optional_string(root, "description") &&
           optional_string(root, "license") && optional_string(root, "created") &&
           sh_field(root, "base_model", SH_JSON_OBJECT, SH_REQUIRED, &base) &&
           sh_string(&base, "name", &text) && sh_string(&base, "model_type", &text) &&
           optional_string(&base, "architecture") &&
           sh_integer(&base, "hidden_size", SH_REQUIRED, 1, MAX_SIZE, &package->n_embd) &&
           sh_integer(&base, "num_layers", SH_REQUIRED, 1, MAX_SIZE, &package->n_layer) &&
           sh_integer(&base, "vocab_size", SH_REQUIRED, 1, MAX_SIZE, &package->n_vocab) &&
           optional_hash(&base, "tokenizer_sha256") &&
           optional_hash(&base, "chat_template_sha256") &&
           sh_field(root, "evidence", SH_JSON_OBJECT, SH_OPTIONAL | SH_NULLABLE, &base);
}

/* ---- ids ---- */

static int32_t probe_named(const steerhook_package *package, sh_text id, int32_t count) {
    for (int32_t i = 0; i < count; i++) {
        if (sh_text_is(id, package->probes[i].id)) {
            return i;
        }
    }
    return -1;
}

static int32_t intervention_named(const steerhook_package *package, sh_text id, int32_t count) {
    for (int32_t i = 0; i < count; i++) {
        if (sh_text_is(id, package->interventions[i].id)) {
            return i;
        }
    }
    return -1;
}

static int32_t rule_named(const steerhook_package *package, sh_text id, int32_t count) {
    for (int32_t i = 0; i < count; i++) {
        if (sh_text_is(id, package->rules[i].id)) {
            return i;
        }
    }
    return -1;
}

typedef int32_t (*find_id)(const steerhook_package *, sh_text, int32_t);

static bool unique_id(const sh_compiler *c, const sh_place *at, const char *id, find_id find) {
    sh_text text = {id, strlen(id)};
    return find(c->package, text, (int32_t)at->index) < 0 ||
           sh_refuse(at, "a unique id", "%s again", sh_quote(text).text);
}

/* An array of ids that stand in the package, as indices. */
static bool compile_ids(const sh_compiler *c, const sh_place *in, const char *name, find_id find,
                        int32_t known, int32_t **indices, int32_t *count) {
    sh_place array;
    sh_place item = {0};
    if (!sh_array(in, name, 1, MAX_ITEMS, &array)) {
        return false;
    }
    *count = (int32_t)array.node->count;
    *indices = sh_items(c, &array, array.node->count, sizeof **indices);
    if (*indices == NULL) {
        return false;
    }
    while (sh_next(&array, &item)) {
        sh_text id = {"", 0};
        if (item.node->type == SH_JSON_STRING) {
            id = sh_json_text(item.node);
        }
        (*indices)[item.index] = find(c->package, id, known);
        if ((*indices)[item.index] < 0) {
            return sh_refuse(&item, "an id of this spec", "%s", sh_quote(id).text);
        }
        for (size_t i = 0; i < item.index; i++) {
            if ((*indices)[i] == (*indices)[item.index]) {
                return sh_refuse(&item, "an id once", "%s again", sh_quote(id).text);
            }
        }
    }
    return true;
}

/* ---- rules ---- */

static bool compile_strength(const sh_compiler *c, const sh_place *at, sh_rule *rule) {
    static const char *const types[] = {"constant", "score", NULL};
    sh_place strength;
    sh_text probe = {NULL, 0};
    int type = 0;
    rule->strength_probe = -1;
    if (!sh_field(at, "strength", SH_JSON_OBJECT, SH_REQUIRED, &strength) ||
        !sh_choice(&strength, "type", types, &type)) {
        return false;
    }
    static const char *const of_constant[] = {"type", "value", NULL};
    static const char *const of_score[] = {"type", "probe", "scale", NULL};
    if (!sh_only(&strength, type == 0 ? of_constant : of_score)) {
        return false;
    }
    if (type == 0) {
        return sh_number(&strength, "value", &rule->strength);
    }
    if (!sh_string(&strength, "probe", &probe) ||
        !sh_number(&strength, "scale", &rule->strength)) {
        return false;
    }
    rule->strength_probe = probe_named(c->package, probe, c->package->n_probes);
    return rule->strength_probe >= 0 ||
           sh_refuse(&strength, "probe: an id of this spec", "%s", sh_quote(probe).text);
}

static int32_t deepest_reading(const sh_probe *probe, int32_t depth) {
    for (int32_t k = 0; k < probe->n_readings; k++) {
        depth = probe->readings[k].depth > depth ? probe->readings[k].depth : depth;
    }
    for (int32_t k = 0; k < probe->tokens.n_sites; k++) {
        depth = probe->tokens.sites[k] > depth ? probe->tokens.sites[k] : depth;
    }
    return depth;
}

/* A decision must be known before it acts: later sites only, from the prompt end on. */
static bool check_order(const sh_compiler *c, const sh_place *at, const sh_rule *rule) {
    int32_t deepest = -1;
    for (int32_t i = 0; i < rule->n_probes; i++) {
        deepest = deepest_reading(&c->package->probes[rule->probes[i]], deepest);
    }
    if (rule->strength_probe >= 0) {
        deepest = deepest_reading(&c->package->probes[rule->strength_probe], deepest);
    }
    for (int32_t i = 0; i < rule->n_interventions && deepest >= 0; i++) {
        const sh_intervention *x = &c->package->interventions[rule->interventions[i]];
        if (x->all_positions) {
            return sh_refuse(at, "interventions from_prompt_end under a rule that reads a probe",
                             "'%s' at all_positions", x->id);
        }
        if (x->min_depth < deepest) {
            return sh_refuse(at, "interventions at or after the sites that the rule reads",
                             "'%s' at depth %ld before %ld", x->id, (long)x->min_depth,
                             (long)deepest);
        }
    }
    return true;
}

static bool compile_rule(const sh_compiler *c, const sh_place *at, sh_rule *rule) {
    static const char *const types[] = {"any", "all", NULL};
    static const char *const fields[] = {"id", "condition", "interventions", "strength", NULL};
    static const char *const of_condition[] = {"type", "probes", NULL};
    sh_place condition;
    int type = 0;
    const steerhook_package *package = c->package;
    if (!sh_identifier(at, "id", rule->id) || !unique_id(c, at, rule->id, rule_named) ||
        !sh_only(at, fields) ||
        !sh_field(at, "condition", SH_JSON_OBJECT, SH_NULLABLE, &condition)) {
        return false;
    }
    rule->conditional = condition.node != NULL;
    if (rule->conditional &&
        (!sh_only(&condition, of_condition) || !sh_choice(&condition, "type", types, &type) ||
         !compile_ids(c, &condition, "probes", probe_named, package->n_probes, &rule->probes,
                      &rule->n_probes))) {
        return false;
    }
    rule->all = type == 1;
    return compile_ids(c, at, "interventions", intervention_named, package->n_interventions,
                       &rule->interventions, &rule->n_interventions) &&
           compile_strength(c, at, rule) && check_order(c, at, rule);
}

/* ---- calibrations ---- */

static bool copy_text(const sh_compiler *c, const sh_place *in, const char *name, sh_text *copy) {
    sh_text text = {NULL, 0};
    if (!sh_string(in, name, &text)) {
        return false;
    }
    char *memory = sh_items(c, in, text.size + 1, 1);
    if (memory == NULL) {
        return false;
    }
    memcpy(memory, text.data, text.size);
    *copy = (sh_text){memory, text.size};
    return true;
}

/* The hash of a checkpoint, if the entry is for one alone. */
static bool compile_weights(const sh_compiler *c, const sh_place *at, sh_text *out) {
    sh_place place;
    if (!sh_field(at, "weights", SH_JSON_STRING, SH_OPTIONAL | SH_NULLABLE, &place)) {
        return false;
    }
    if (place.node == NULL) {
        return true;
    }
    if (!copy_text(c, at, "weights", out)) {
        return false;
    }
    bool digits = out->size == 64;
    for (size_t i = 0; digits && i < out->size; i++) {
        digits = strchr("0123456789abcdef", out->data[i]) != NULL;
    }
    return digits || sh_refuse(&place, "64 hexadecimal digits", "%s", sh_quote(*out).text);
}

static bool compile_calibration(const sh_compiler *c, const sh_place *at, sh_calibration *out) {
    static const char *const fields[] = {"runtime", "quantisation", "weights", "thresholds",
                                         "evidence", NULL};
    sh_place map;
    sh_place evidence;
    if (!sh_only(at, fields) || !copy_text(c, at, "runtime", &out->runtime) ||
        !copy_text(c, at, "quantisation", &out->quantisation) ||
        !compile_weights(c, at, &out->weights) ||
        !sh_field(at, "evidence", SH_JSON_OBJECT, SH_OPTIONAL | SH_NULLABLE, &evidence) ||
        !sh_field(at, "thresholds", SH_JSON_OBJECT, SH_REQUIRED, &map)) {
        return false;
    }
    uint32_t count = map.node->count;
    out->n_thresholds = (int32_t)count;
    out->probes = sh_items(c, &map, count, sizeof *out->probes);
    out->thresholds = sh_items(c, &map, count, sizeof *out->thresholds);
    if (out->probes == NULL || out->thresholds == NULL) {
        return false;
    }
    const sh_json_node *key = map.node + 1;
    for (uint32_t i = 0; i < count; i++) {
        const sh_json_node *value = key + 1;
        sh_text id = sh_json_text(key);
        out->probes[i] = probe_named(c->package, id, c->package->n_probes);
        if (out->probes[i] < 0 || (value->type & SH_JSON_NUMBER) == 0) {
            return sh_refuse(&map, "a number for a probe of this spec", "%s", sh_quote(id).text);
        }
        out->thresholds[i] = value->value.number;
        key = &map.json->nodes[value->end];
    }
    return true;
}

/* ---- the spec ---- */

static bool compile_probe_item(const sh_compiler *c, const sh_place *at) {
    sh_probe *probe = &c->package->probes[at->index];
    return sh_compile_probe(c, at, probe) && unique_id(c, at, probe->id, probe_named);
}

static bool compile_intervention_item(const sh_compiler *c, const sh_place *at) {
    sh_intervention *x = &c->package->interventions[at->index];
    return sh_compile_intervention(c, at, x) && unique_id(c, at, x->id, intervention_named);
}

static bool compile_rule_item(const sh_compiler *c, const sh_place *at) {
    return compile_rule(c, at, &c->package->rules[at->index]);
}

static bool compile_calibration_item(const sh_compiler *c, const sh_place *at) {
    return compile_calibration(c, at, &c->package->calibrations[at->index]);
}

typedef bool (*compile_item)(const sh_compiler *, const sh_place *);

static bool compile_items(const sh_compiler *c, const sh_place *root, const char *name,
                          unsigned flags, size_t size, compile_item compile, void *items,
                          int32_t *count) {
    sh_place array;
    sh_place item = {0};
    if (!sh_field(root, name, SH_JSON_ARRAY, flags, &array)) {
        return false;
    }
    if (array.node == NULL) {
        return true;
    }
    if (array.node->count > MAX_ITEMS) {
        return sh_refuse(&array, "at most 1024 items", "%lu", (unsigned long)array.node->count);
    }
    void *memory = sh_items(c, &array, array.node->count, size);
    if (memory == NULL) {
        return false;
    }
    memcpy(items, &memory, sizeof memory); /* `items` points to a pointer of some struct type */
    *count = (int32_t)array.node->count;
    while (sh_next(&array, &item)) {
        if (item.node->type != SH_JSON_OBJECT) {
            return sh_refuse(&item, "an object", "another value");
        }
        if (!compile(c, &item)) {
            return false;
        }
    }
    return true;
}

static bool compile_root(steerhook_package *p, const sh_place *root, const sh_gguf *gguf) {
    sh_compiler c = {.package = p, .gguf = gguf};
    if (root->node->type != SH_JSON_OBJECT) {
        return sh_refuse(root, "an object", "another value");
    }
    return check_version(root) && compile_head_fields(p, root) &&
           compile_items(&c, root, "probes", SH_REQUIRED, sizeof *p->probes, compile_probe_item,
                         &p->probes, &p->n_probes) &&
           compile_items(&c, root, "interventions", SH_REQUIRED, sizeof *p->interventions,
                         compile_intervention_item, &p->interventions, &p->n_interventions) &&
           compile_items(&c, root, "rules", SH_REQUIRED, sizeof *p->rules, compile_rule_item,
                         &p->rules, &p->n_rules) &&
           compile_items(&c, root, "calibrations", SH_OPTIONAL, sizeof *p->calibrations,
                         compile_calibration_item, &p->calibrations, &p->n_calibrations);
}

bool sh_compile_spec(steerhook_package *package, sh_text spec, const sh_gguf *gguf,
                     const sh_error *error) {
    sh_json json = {0};
    if (spec.data == NULL) {
        return sh_fail(error, "steering.spec", "a string", "none");
    }
    bool ok = sh_json_parse(&json, spec, "steering.spec", error);
    if (ok) {
        sh_place root = {.node = json.nodes, .json = &json, .error = error};
        ok = compile_root(package, &root, gguf);
    }
    sh_json_free(&json);
    return ok;
}
