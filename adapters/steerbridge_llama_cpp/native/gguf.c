#include "gguf.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "packages are read in place, which needs a little-endian machine"
#endif

enum { MAX_TENSORS = 1 << 16, MAX_KEYS = 1 << 16, MAX_NAME = 1 << 16, MAX_ARRAY = 1 << 24 };

/* GGUF value types; 0 to 5 are U8, I8, U16, I16, U32, I32, and 10 is U64. */
enum {
    TYPE_I32 = 5,
    TYPE_F32 = 6,
    TYPE_BOOL = 7,
    TYPE_STRING = 8,
    TYPE_ARRAY = 9,
    TYPE_I64 = 11,
    TYPE_F64 = 12
};

typedef struct {
    const unsigned char *bytes;
    uint64_t at, size; /* at <= size, always */
    const sh_error *error;
} cursor;

static bool take(cursor *c, uint64_t size, const char *field, const unsigned char **bytes) {
    uint64_t left = c->size - c->at;
    if (size > left) {
        return sh_fail(c->error, field, "more bytes",
                       "the end of the file (%" PRIu64 " needed, %" PRIu64 " left)", size, left);
    }
    *bytes = c->bytes + c->at;
    c->at += size;
    return true;
}

static bool take_u32(cursor *c, const char *field, uint32_t *value) {
    const unsigned char *bytes = NULL;
    if (!take(c, sizeof *value, field, &bytes)) {
        return false;
    }
    memcpy(value, bytes, sizeof *value);
    return true;
}

static bool take_u64(cursor *c, uint64_t limit, const char *field, uint64_t *value) {
    const unsigned char *bytes = NULL;
    if (!take(c, sizeof *value, field, &bytes)) {
        return false;
    }
    memcpy(value, bytes, sizeof *value);
    return *value <= limit ||
           sh_fail(c->error, field, "a smaller number", "%" PRIu64 " (limit %" PRIu64 ")", *value,
                   limit);
}

static bool take_text(cursor *c, uint64_t limit, const char *field, sh_text *text) {
    uint64_t size = 0;
    const unsigned char *bytes = NULL;
    if (!take_u64(c, limit, field, &size) || !take(c, size, field, &bytes)) {
        return false;
    }
    *text = (sh_text){(const char *)bytes, (size_t)size};
    return sh_is_utf8(text->data, text->size) || sh_fail(c->error, field, "UTF-8", "other bytes");
}

/* ---- metadata ---- */

static uint64_t scalar_size(uint32_t type) {
    static const unsigned char sizes[TYPE_F64 + 1] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
    return type <= TYPE_F64 ? sizes[type] : 0;
}

static bool skip_array(cursor *c, const char *field) {
    uint32_t type = 0;
    uint64_t length = 0;
    if (!take_u32(c, field, &type) || !take_u64(c, MAX_ARRAY, field, &length)) {
        return false;
    }
    const unsigned char *bytes = NULL;
    if (type != TYPE_STRING) {
        return scalar_size(type) != 0 ? take(c, length * scalar_size(type), field, &bytes)
                                      : sh_fail(c->error, field, "an array of scalars or strings",
                                                "value type %" PRIu32, type);
    }
    for (uint64_t i = 0; i < length; i++) { /* each takes 8 bytes or more: ends with the file */
        sh_text item;
        if (!take_text(c, c->size, field, &item)) {
            return false;
        }
    }
    return true;
}

static bool read_entry(cursor *c, sh_gguf_entry *entry) {
    const char *field = "metadata value";
    if (!take_text(c, MAX_NAME, "metadata key", &entry->key) ||
        !take_u32(c, field, &entry->type)) {
        return false;
    }
    if (entry->type == TYPE_ARRAY) {
        return skip_array(c, field);
    }
    if (entry->type == TYPE_STRING) {
        sh_text text = {NULL, 0};
        bool ok = take_text(c, c->size, field, &text);
        entry->value = (const unsigned char *)text.data;
        entry->size = text.size;
        return ok;
    }
    uint64_t size = scalar_size(entry->type);
    return size != 0 ? take(c, size, field, &entry->value)
                     : sh_fail(c->error, field, "a GGUF value type", "%" PRIu32, entry->type);
}

static int order_entries(const void *a, const void *b) {
    return sh_text_order(((const sh_gguf_entry *)a)->key, ((const sh_gguf_entry *)b)->key);
}

static bool read_entries(cursor *c, sh_gguf *gguf) {
    for (uint32_t i = 0; i < gguf->n_entries; i++) {
        if (!read_entry(c, &gguf->entries[i])) {
            return false;
        }
    }
    qsort(gguf->entries, gguf->n_entries, sizeof *gguf->entries, order_entries);
    for (uint32_t i = 1; i < gguf->n_entries; i++) {
        if (sh_text_equal(gguf->entries[i - 1].key, gguf->entries[i].key)) {
            return sh_fail(c->error, "metadata key", "unique keys", "%s twice",
                           sh_quote(gguf->entries[i].key).text);
        }
    }
    return true;
}

static const sh_gguf_entry *find_entry(const sh_gguf *gguf, const char *key) {
    sh_gguf_entry wanted = {.key = {key, strlen(key)}};
    return gguf->n_entries == 0 ? NULL
                                : bsearch(&wanted, gguf->entries, gguf->n_entries, sizeof wanted,
                                          order_entries);
}

sh_text sh_gguf_string(const sh_gguf *gguf, const char *key) {
    const sh_gguf_entry *entry = find_entry(gguf, key);
    if (entry == NULL || entry->type != TYPE_STRING) {
        return (sh_text){NULL, 0};
    }
    return (sh_text){(const char *)entry->value, (size_t)entry->size};
}

static bool read_alignment(const sh_gguf *gguf, const sh_error *error, uint64_t *alignment) {
    const sh_gguf_entry *entry = find_entry(gguf, "general.alignment");
    *alignment = 32;
    if (entry == NULL) {
        return true;
    }
    uint64_t size = scalar_size(entry->type);
    bool integer = size != 0 && entry->type != TYPE_F32 && entry->type != TYPE_F64 &&
                   entry->type != TYPE_BOOL;
    bool is_signed = entry->type == TYPE_I64 || (entry->type <= TYPE_I32 && entry->type % 2 == 1);
    bool negative = integer && is_signed && (entry->value[size - 1] & 0x80) != 0;
    *alignment = 0;
    if (integer && !negative) {
        memcpy(alignment, entry->value, (size_t)size);
    }
    return (*alignment >= 8 && *alignment <= 1 << 20 && *alignment % 8 == 0) ||
           sh_fail(error, "general.alignment", "a multiple of 8 up to 1 MiB", "another value");
}

/* ---- tensors ---- */

/* The number of values, or UINT64_MAX if no file could hold them. */
static uint64_t count_values(const sh_gguf_tensor *tensor, uint64_t limit) {
    uint64_t count = 1;
    for (uint32_t i = 0; i < tensor->n_dims; i++) {
        if (tensor->shape[i] == 0) {
            return 0;
        }
    }
    for (uint32_t i = 0; i < tensor->n_dims; i++) {
        if (tensor->shape[i] > limit / count) {
            return UINT64_MAX;
        }
        count *= tensor->shape[i];
    }
    return count;
}

/* The offset counts from the start of the data, which is known after the last tensor. */
static bool read_tensor(cursor *c, sh_gguf_tensor *tensor, uint64_t *offset) {
    uint32_t dtype = 0;
    if (!take_text(c, MAX_NAME, "tensor name", &tensor->name)) {
        return false;
    }
    sh_quoted name = sh_quote(tensor->name);
    const char *field = name.text;
    if (!take_u32(c, field, &tensor->n_dims)) {
        return false;
    }
    if (tensor->n_dims > SH_GGUF_DIMS) {
        return sh_fail(c->error, field, "up to 4 dimensions", "%" PRIu32, tensor->n_dims);
    }
    for (uint32_t i = 0; i < SH_GGUF_DIMS; i++) {
        tensor->shape[i] = 1;
        if (i < tensor->n_dims &&
            !take_u64(c, UINT64_C(1) << 40, field, &tensor->shape[i])) {
            return false;
        }
    }
    if (!take_u32(c, field, &dtype) || !take_u64(c, UINT64_MAX, field, offset)) {
        return false;
    }
    if (dtype != SH_F32 && dtype != SH_F16 && dtype != SH_BF16) {
        return sh_fail(c->error, field, "F32, F16 or BF16", "ggml type %" PRIu32, dtype);
    }
    tensor->dtype = (sh_dtype)dtype;
    tensor->n_values = count_values(tensor, c->size);
    return tensor->n_values != UINT64_MAX ||
           sh_fail(c->error, field, "a size that the file can hold", "a larger one");
}

static bool map_tensor(const cursor *c, sh_gguf_tensor *tensor, uint64_t start, uint64_t offset,
                       uint64_t alignment) {
    /* n_values <= file size, so this cannot overflow. */
    uint64_t bytes = tensor->n_values * (tensor->dtype == SH_F32 ? 4 : 2);
    bool inside = start <= c->size && offset <= c->size - start &&
                  bytes <= c->size - start - offset;
    if (!inside || offset % alignment != 0) {
        return sh_fail(c->error, sh_quote(tensor->name).text, "aligned data inside the file",
                       "%" PRIu64 " bytes at offset %" PRIu64, bytes, offset);
    }
    tensor->data = c->bytes + start + offset;
    return true;
}

static int order_tensors(const void *a, const void *b) {
    return sh_text_order(((const sh_gguf_tensor *)a)->name, ((const sh_gguf_tensor *)b)->name);
}

static bool read_tensors(cursor *c, sh_gguf *gguf, uint64_t *offsets) {
    uint64_t alignment = 0;
    for (uint32_t i = 0; i < gguf->n_tensors; i++) {
        if (!read_tensor(c, &gguf->tensors[i], &offsets[i])) {
            return false;
        }
    }
    if (!read_alignment(gguf, c->error, &alignment)) {
        return false;
    }
    uint64_t start = (c->at + alignment - 1) / alignment * alignment;
    for (uint32_t i = 0; i < gguf->n_tensors; i++) {
        if (!map_tensor(c, &gguf->tensors[i], start, offsets[i], alignment)) {
            return false;
        }
    }
    qsort(gguf->tensors, gguf->n_tensors, sizeof *gguf->tensors, order_tensors);
    for (uint32_t i = 1; i < gguf->n_tensors; i++) {
        if (sh_text_equal(gguf->tensors[i - 1].name, gguf->tensors[i].name)) {
            return sh_fail(c->error, "tensor names", "unique names", "%s twice",
                           sh_quote(gguf->tensors[i].name).text);
        }
    }
    return true;
}

const sh_gguf_tensor *sh_gguf_tensor_named(const sh_gguf *gguf, sh_text name) {
    sh_gguf_tensor wanted = {.name = name};
    return gguf->n_tensors == 0 ? NULL
                                : bsearch(&wanted, gguf->tensors, gguf->n_tensors, sizeof wanted,
                                          order_tensors);
}

/* ---- the file ---- */

static bool read_header(cursor *c, sh_gguf *gguf) {
    const unsigned char *magic = NULL;
    uint32_t version = 0;
    uint64_t tensors = 0;
    uint64_t entries = 0;
    if (!take(c, 4, "magic", &magic)) {
        return false;
    }
    if (memcmp(magic, "GGUF", 4) != 0) {
        return sh_fail(c->error, "magic", "'GGUF'", "%s",
                       sh_quote((sh_text){(const char *)magic, 4}).text);
    }
    if (!take_u32(c, "version", &version)) {
        return false;
    }
    if (version != 2 && version != 3) {
        return sh_fail(c->error, "version", "2 or 3, little endian", "%" PRIu32, version);
    }
    if (!take_u64(c, MAX_TENSORS, "tensor count", &tensors) ||
        !take_u64(c, MAX_KEYS, "metadata count", &entries)) {
        return false;
    }
    /* An entry takes 13 bytes at least, a tensor 24: memory is bounded by the file's size. */
    if (entries > (c->size - c->at) / 13 || tensors > (c->size - c->at) / 24) {
        return sh_fail(c->error, "tensor and metadata counts", "what the file can hold", "more");
    }
    gguf->n_tensors = (uint32_t)tensors;
    gguf->n_entries = (uint32_t)entries;
    return true;
}

bool sh_gguf_read(sh_gguf *gguf, const void *bytes, size_t size, sh_arena *arena,
                  const sh_error *error) {
    cursor c = {.bytes = bytes, .size = size, .error = error};
    *gguf = (sh_gguf){0};
    if ((uintptr_t)bytes % 8 != 0) {
        return sh_fail(error, "package bytes", "an address aligned to 8", "%p", bytes);
    }
    if (!read_header(&c, gguf)) {
        return false;
    }
    gguf->entries = sh_arena_new(arena, gguf->n_entries, sizeof *gguf->entries);
    gguf->tensors = sh_arena_new(arena, gguf->n_tensors, sizeof *gguf->tensors);
    uint64_t *offsets = sh_arena_new(arena, gguf->n_tensors, sizeof *offsets);
    if (gguf->entries == NULL || gguf->tensors == NULL || offsets == NULL) {
        return sh_fail(error, "package", "memory for its index", "none");
    }
    return read_entries(&c, gguf) && read_tensors(&c, gguf, offsets);
}
