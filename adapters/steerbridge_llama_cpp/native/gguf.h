/* A bounded reader of GGUF (versions 2 and 3, little endian) over bytes in memory.
 *
 * Every count, length and offset is checked against the size of the data before it is used or
 * multiplied: files are untrusted. Format:
 * https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
 */
#ifndef STEERHOOK_GGUF_H
#define STEERHOOK_GGUF_H

#include <stdint.h>

#include "text.h"

enum { SH_GGUF_DIMS = 4 };

typedef enum { SH_F32 = 0, SH_F16 = 1, SH_BF16 = 30 } sh_dtype; /* ggml's numbers */

typedef struct {
    sh_text name;
    sh_dtype dtype;
    uint32_t n_dims;
    uint64_t shape[SH_GGUF_DIMS]; /* ggml's order: the fastest dimension first; 1 beyond n_dims */
    uint64_t n_values;
    const void *data; /* aligned to 8 */
} sh_gguf_tensor;

typedef struct {
    sh_text key;
    uint32_t type;
    const unsigned char *value; /* the scalar, or the first byte of a string */
    uint64_t size;              /* bytes of a string */
} sh_gguf_entry;

typedef struct {
    sh_gguf_entry *entries; /* sorted by key */
    sh_gguf_tensor *tensors; /* sorted by name */
    uint32_t n_entries, n_tensors;
} sh_gguf;

/* The arrays are allocated in `arena`; names and data point into `bytes`, aligned to 8. */
bool sh_gguf_read(sh_gguf *gguf, const void *bytes, size_t size, sh_arena *arena,
                  const sh_error *error);

/* The value of a string entry; {NULL, 0} if there is no such entry or it is no string. */
sh_text sh_gguf_string(const sh_gguf *gguf, const char *key);

const sh_gguf_tensor *sh_gguf_tensor_named(const sh_gguf *gguf, sh_text name);

#endif
