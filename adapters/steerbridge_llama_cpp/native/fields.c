#include "fields.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* Writes the path from the outermost value inwards; the root itself has no name. */
static size_t write_path(const sh_place *at, char *path, size_t size) {
    if (at->up == NULL) {
        path[0] = '\0';
        return 0;
    }
    size_t used = write_path(at->up, path, size);
    int more = at->name == NULL ? snprintf(path + used, size - used, "[%u]", (unsigned)at->index)
                                : snprintf(path + used, size - used, "%s%s", used ? "." : "",
                                           at->name);
    size_t length = more < 0 ? 0 : (size_t)more;
    return used + (length < size - used ? length : size - used - 1);
}

bool sh_refuse(const sh_place *at, const char *want, const char *got, ...) {
    char path[128];
    char got_text[128];
    va_list arguments;
    va_start(arguments, got);
    vsnprintf(got_text, sizeof got_text, got, arguments);
    va_end(arguments);
    return sh_fail(at->error, write_path(at, path, sizeof path) ? path : "spec", want, "%s",
                   got_text);
}

static const char *type_names(unsigned types) {
    switch (types) {
    case SH_JSON_NULL: return "null";
    case SH_JSON_BOOLEAN: return "true or false";
    case SH_JSON_INTEGER: return "an integer";
    case SH_JSON_STRING: return "a string";
    case SH_JSON_ARRAY: return "an array";
    case SH_JSON_OBJECT: return "an object";
    default: return (types & SH_JSON_NUMBER) != 0 ? "a number" : "another value";
    }
}

bool sh_field(const sh_place *in, const char *name, unsigned types, unsigned flags,
              sh_place *place) {
    const sh_json_node *node = sh_json_member(in->json, in->node, name);
    *place = (sh_place){.up = in, .name = name, .json = in->json, .error = in->error};
    if (node == NULL) {
        return (flags & SH_OPTIONAL) != 0 || sh_refuse(place, "this field", "nothing");
    }
    if (node->type == SH_JSON_NULL && (flags & SH_NULLABLE) != 0) {
        return true;
    }
    if ((node->type & types) == 0) {
        return sh_refuse(place, type_names(types), "%s", type_names(node->type));
    }
    place->node = node;
    return true;
}

bool sh_only(const sh_place *in, const char *const *names) {
    const sh_json_node *key = in->node + 1;
    for (uint32_t i = 0; i < in->node->count; i++) {
        sh_text name = sh_json_text(key);
        bool known = false;
        for (int j = 0; !known && names[j] != NULL; j++) {
            known = sh_text_is(name, names[j]);
        }
        if (!known) {
            return sh_refuse(in, "no unknown field", "%s", sh_quote(name).text);
        }
        key = &in->json->nodes[(key + 1)->end];
    }
    return true;
}

bool sh_next(const sh_place *array, sh_place *item) {
    bool first = item->up == NULL;
    uint32_t index = first ? 0 : item->index + 1;
    if (index == array->node->count) {
        return false;
    }
    const sh_json_node *node = first ? array->node + 1 : &array->json->nodes[item->node->end];
    *item = (sh_place){.up = array, .index = index, .node = node, .json = array->json,
                       .error = array->error};
    return true;
}

bool sh_string(const sh_place *in, const char *name, sh_text *text) {
    sh_place at;
    if (!sh_field(in, name, SH_JSON_STRING, SH_REQUIRED, &at)) {
        return false;
    }
    *text = sh_json_text(at.node);
    return true;
}

bool sh_identifier(const sh_place *in, const char *name, char id[64]) {
    sh_place at;
    if (!sh_field(in, name, SH_JSON_STRING, SH_REQUIRED, &at)) {
        return false;
    }
    sh_text text = sh_json_text(at.node);
    if (!sh_is_name(text)) {
        return sh_refuse(&at, "1 to 63 of A-Z a-z 0-9 _ . -", "%s", sh_quote(text).text);
    }
    memcpy(id, text.data, text.size);
    id[text.size] = '\0';
    return true;
}

bool sh_number(const sh_place *in, const char *name, double *number) {
    sh_place at;
    if (!sh_field(in, name, SH_JSON_NUMBER, SH_REQUIRED, &at)) {
        return false;
    }
    *number = at.node->value.number;
    return true;
}

bool sh_integer(const sh_place *in, const char *name, unsigned flags, int32_t low, int32_t high,
                int32_t *number) {
    sh_place at;
    if (!sh_field(in, name, SH_JSON_INTEGER, flags, &at)) {
        return false;
    }
    if (at.node == NULL) {
        return true;
    }
    double value = at.node->value.number;
    if (value < low || value > high) {
        char want[48];
        snprintf(want, sizeof want, "%ld to %ld", (long)low, (long)high);
        return sh_refuse(&at, want, "%.0f", value);
    }
    *number = (int32_t)value;
    return true;
}

bool sh_choice(const sh_place *in, const char *name, const char *const *choices, int *choice) {
    sh_place at;
    char want[96] = "one of";
    if (!sh_field(in, name, SH_JSON_STRING, SH_REQUIRED, &at)) {
        return false;
    }
    sh_text text = sh_json_text(at.node);
    for (int i = 0; choices[i] != NULL; i++) {
        size_t used = strlen(want);
        if (sh_text_is(text, choices[i])) {
            *choice = i;
            return true;
        }
        snprintf(want + used, sizeof want - used, " %s", choices[i]);
    }
    return sh_refuse(&at, want, "%s", sh_quote(text).text);
}

bool sh_array(const sh_place *in, const char *name, uint32_t low, uint32_t high,
              sh_place *array) {
    if (!sh_field(in, name, SH_JSON_ARRAY, SH_REQUIRED, array)) {
        return false;
    }
    uint32_t count = array->node->count;
    if (count < low || count > high) {
        char want[64];
        snprintf(want, sizeof want, "%lu to %lu items", (unsigned long)low, (unsigned long)high);
        return sh_refuse(array, want, "%lu", (unsigned long)count);
    }
    return true;
}
