/* A strict, bounded JSON reader: the same documents as Python's steerbridge._json, and a few
 * less (nesting of 64, a million values, numbers of 255 characters, no number beyond double).
 * If two readers disagree on a document, a guard can be bypassed; so duplicate keys, lone
 * surrogates and numbers such as NaN are errors.
 */
#ifndef STEERHOOK_JSON_H
#define STEERHOOK_JSON_H

#include <stdint.h>

#include "text.h"

typedef enum {
    SH_JSON_NULL = 1,
    SH_JSON_BOOLEAN = 2,
    SH_JSON_INTEGER = 4, /* a number without fraction and exponent */
    SH_JSON_REAL = 8,
    SH_JSON_STRING = 16,
    SH_JSON_ARRAY = 32,
    SH_JSON_OBJECT = 64
} sh_json_type;

/* Nodes stand in document order: the first child follows its parent, and `end` is the index
 * after the whole value. The children of an object are key, value, key, value, ... */
typedef struct {
    sh_json_type type;
    uint32_t end;
    uint32_t count; /* items of an array, members of an object, bytes of a string */
    union {
        double number;    /* integers are exact up to 2^53 */
        const char *text; /* decoded; may hold NUL */
    } value;
} sh_json_node;

typedef struct {
    sh_json_node *nodes;
    uint32_t n_nodes, capacity;
    char *text; /* all decoded strings */
} sh_json;

bool sh_json_parse(sh_json *json, sh_text document, const char *what, const sh_error *error);
void sh_json_free(sh_json *json);

sh_text sh_json_text(const sh_json_node *node);

/* The value of a member, or NULL. */
const sh_json_node *sh_json_member(const sh_json *json, const sh_json_node *object,
                                   const char *name);

#endif
