/* Typed access to the fields of a JSON document, with errors that say where. */
#ifndef STEERHOOK_FIELDS_H
#define STEERHOOK_FIELDS_H

#include "json.h"

/* A value and the way to it, as a chain on the stack: probes -> [2] -> readings -> ... */
typedef struct sh_place {
    const struct sh_place *up;
    const char *name; /* NULL: an item, at `index` */
    uint32_t index;
    const sh_json_node *node; /* NULL: an optional field that is absent */
    const sh_json *json;
    const sh_error *error;
} sh_place;

enum { SH_REQUIRED = 0, SH_OPTIONAL = 1, SH_NULLABLE = 2 };
enum { SH_JSON_NUMBER = SH_JSON_INTEGER | SH_JSON_REAL };

/* "<path>: expected <want>, found <got>"; always false. */
#if defined(__GNUC__)
__attribute__((format(printf, 3, 4)))
#endif
bool sh_refuse(const sh_place *at, const char *want, const char *got, ...);

/* The field `name` of the object `in`. `types` is a set of sh_json_type. With SH_OPTIONAL it may
 * be absent, with SH_NULLABLE null: `place->node` is then NULL. */
bool sh_field(const sh_place *in, const char *name, unsigned types, unsigned flags,
              sh_place *place);

/* Refuses a field of the object that is not among `names` (NULL at the end), with its path. */
bool sh_only(const sh_place *in, const char *const *names);

/* Walks an array: `item` starts zeroed and is the next item as long as true is returned. */
bool sh_next(const sh_place *array, sh_place *item);

bool sh_string(const sh_place *in, const char *name, sh_text *text);
bool sh_identifier(const sh_place *in, const char *name, char id[64]);
bool sh_number(const sh_place *in, const char *name, double *number);
bool sh_integer(const sh_place *in, const char *name, unsigned flags, int32_t low, int32_t high,
                int32_t *number);

/* One of `choices` (NULL at the end), as its index. */
bool sh_choice(const sh_place *in, const char *name, const char *const *choices, int *choice);

/* An array of `low` to `high` items. */
bool sh_array(const sh_place *in, const char *name, uint32_t low, uint32_t high,
              sh_place *array);

#endif
