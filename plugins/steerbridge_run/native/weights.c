#define _GNU_SOURCE
#include "weights.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "real.h"

enum { BLOCKS = 1024, BLOCK = 4096 };
enum { GGUF_UINT32 = 4, GGUF_STRING = 8 };

typedef struct sb_gguf {
    struct sb_gguf *next;
    char *path;
    char architecture[64];
    uint32_t n_embd, n_layer, file_type;
    char digest[SB_SHA256_TEXT]; /* "" before it is needed */
} sb_gguf;

static sb_gguf *opened;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* ---- what a file says of itself ---- */

/* Keys were numbered by int, now by int64_t: the lower half is the same. */
typedef int (*find_key)(const gguf_context *, const char *);
typedef int (*get_type)(const gguf_context *, int64_t);
typedef uint32_t (*get_u32)(const gguf_context *, int64_t);
typedef const char *(*get_string)(const gguf_context *, int64_t);

/* The index of a key with a value of this type; below 0: there is none. */
static int key_of(const gguf_context *file, const char *name, int type) {
    int index = SB_CALL(find_key, "gguf_find_key", NULL)(file, name);
    if (index >= 0 && SB_CALL(get_type, "gguf_get_kv_type", NULL)(file, index) != type) {
        return -1;
    }
    return index;
}

static bool number(const gguf_context *file, const char *name, uint32_t *value) {
    int index = key_of(file, name, GGUF_UINT32);
    if (index < 0) {
        return false;
    }
    *value = SB_CALL(get_u32, "gguf_get_val_u32", NULL)(file, index);
    return true;
}

/* False for files that hold no language model: adapters, projectors of images. */
static bool describe(const gguf_context *file, sb_gguf *out) {
    int index = key_of(file, "general.architecture", GGUF_STRING);
    if (index < 0) {
        return false;
    }
    const char *name = SB_CALL(get_string, "gguf_get_val_str", NULL)(file, index);
    char key[96];
    snprintf(out->architecture, sizeof out->architecture, "%s", name);
    snprintf(key, sizeof key, "%s.embedding_length", out->architecture);
    if (!number(file, key, &out->n_embd)) {
        return false;
    }
    snprintf(key, sizeof key, "%s.block_count", out->architecture);
    return number(file, key, &out->n_layer) &&
           number(file, "general.file_type", &out->file_type);
}

void sb_gguf_opened(const gguf_context *file, const char *path) {
    sb_gguf *one = calloc(1, sizeof *one);
    if (one == NULL || !describe(file, one) || (one->path = strdup(path)) == NULL) {
        free(one);
        return;
    }
    pthread_mutex_lock(&lock);
    one->next = opened;
    opened = one;
    pthread_mutex_unlock(&lock);
}

/* ---- its hash ---- */

/* False if the file cannot be read any more. */
static bool hash_blocks(sb_sha256 *hash, FILE *stream, uint64_t size) {
    static char block[BLOCK];
    uint64_t last = size > BLOCK ? size - BLOCK : 0;
    size_t wanted = size < BLOCK ? (size_t)size : BLOCK;
    uint64_t before = UINT64_MAX;
    for (uint64_t i = 0; i < BLOCKS; i++) {
        uint64_t at = last * i / (BLOCKS - 1);
        if (at != before && (fseeko(stream, (off_t)at, SEEK_SET) != 0 ||
                             fread(block, 1, wanted, stream) != wanted)) {
            return false;
        }
        if (at != before) {
            sb_sha256_add(hash, block, wanted);
        }
        before = at;
    }
    return true;
}

static void hash_file(sb_gguf *one) {
    FILE *stream = fopen(one->path, "rb");
    if (stream == NULL) {
        return;
    }
    if (fseeko(stream, 0, SEEK_END) == 0) {
        uint64_t size = (uint64_t)ftello(stream);
        char head[32];
        int length = snprintf(head + 1, sizeof head - 1, "%llu", (unsigned long long)size);
        head[0] = '\0'; /* the name of the only part, and the ends of name and size */
        sb_sha256 hash;
        sb_sha256_begin(&hash);
        sb_sha256_add(&hash, head, (size_t)length + 2);
        if (hash_blocks(&hash, stream, size)) {
            sb_sha256_end(&hash, one->digest);
        }
    }
    fclose(stream);
}

static bool is_of(const sb_gguf *one, const sb_facts *model) {
    return strcmp(one->architecture, model->architecture) == 0 &&
           one->n_embd == (uint32_t)model->n_embd && one->n_layer == (uint32_t)model->n_layer &&
           one->file_type == strtoul(model->file_type, NULL, 10);
}

bool sb_weights_of(const sb_facts *model, char digest[SB_SHA256_TEXT]) {
    digest[0] = '\0';
    bool same = true;
    pthread_mutex_lock(&lock);
    for (sb_gguf *one = opened; one != NULL && same; one = one->next) {
        if (!is_of(one, model)) {
            continue;
        }
        if (one->digest[0] == '\0') {
            hash_file(one);
        }
        same = one->digest[0] != '\0' && (digest[0] == '\0' || strcmp(digest, one->digest) == 0);
        memcpy(digest, one->digest, SB_SHA256_TEXT);
    }
    pthread_mutex_unlock(&lock);
    return same && digest[0] != '\0';
}
