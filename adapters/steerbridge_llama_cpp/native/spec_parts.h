/* Pieces of the spec that probes and interventions have in common. Internal to the compiler. */
#ifndef STEERHOOK_SPEC_PARTS_H
#define STEERHOOK_SPEC_PARTS_H

#include "fields.h"
#include "package.h"

typedef struct {
    steerhook_package *package;
    const sh_gguf *gguf;
} sh_compiler;

/* Memory for the `count` items of an array field. */
void *sh_items(const sh_compiler *c, const sh_place *array, size_t count, size_t size);

enum { SH_ANY_SIZE = -1, SH_VECTOR = 0 };

/* The tensor that the field names, of shape [rows, cols], or [cols] if rows is SH_VECTOR.
 * SH_ANY_SIZE leaves a size open. Absent optional fields leave `tensor` as it is. */
bool sh_tensor_field(const sh_compiler *c, const sh_place *in, const char *name, unsigned flags,
                     int64_t rows, int64_t cols, sh_tensor *tensor);

/* The object field `site` as a depth. */
bool sh_site(const sh_compiler *c, const sh_place *in, bool head_allowed, int32_t *depth);

bool sh_compile_probe(const sh_compiler *c, const sh_place *at, sh_probe *probe);
bool sh_compile_intervention(const sh_compiler *c, const sh_place *at,
                             sh_intervention *intervention);

#endif
