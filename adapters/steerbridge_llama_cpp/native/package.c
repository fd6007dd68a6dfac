#define _POSIX_C_SOURCE 200809L
#include "package.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static bool expect_string(const sh_gguf *gguf, const char *key, const char *want,
                          const sh_error *error) {
    sh_text got = sh_gguf_string(gguf, key);
    return (got.data != NULL && sh_text_is(got, want)) ||
           sh_fail(error, key, want, "%s", got.data == NULL ? "no string" : sh_quote(got).text);
}

static bool check_tensors(const sh_gguf *gguf, const sh_error *error) {
    for (uint32_t i = 0; i < gguf->n_tensors; i++) {
        const sh_gguf_tensor *tensor = &gguf->tensors[i];
        sh_quoted name = sh_quote(tensor->name);
        if (!sh_is_name(tensor->name)) {
            return sh_fail(error, "tensor name", "1 to 63 of A-Z a-z 0-9 _ . -", "%s", name.text);
        }
        if (!sh_all_finite(tensor->data, tensor->dtype, tensor->n_values)) {
            return sh_fail(error, name.text, "finite values", "NaN or infinity");
        }
    }
    return true;
}

static bool read_package(steerhook_package *package, const void *bytes, size_t size,
                         const sh_error *error) {
    sh_gguf gguf;
    return sh_gguf_read(&gguf, bytes, size, &package->arena, error) &&
           expect_string(&gguf, "general.architecture", "steering", error) &&
           expect_string(&gguf, "general.type", "adapter", error) &&
           check_tensors(&gguf, error) &&
           sh_compile_spec(package, sh_gguf_string(&gguf, "steering.spec"), &gguf, error);
}

static steerhook_package *new_package(const void *bytes, size_t size, const sh_error *error) {
    steerhook_package *package = calloc(1, sizeof *package);
    if (package == NULL) {
        sh_fail(error, "package", "memory", "none");
        return NULL;
    }
    atomic_init(&package->references, 1);
    if (!read_package(package, bytes, size, error)) {
        steerhook_package_free(package);
        return NULL;
    }
    return package;
}

steerhook_package *steerhook_package_parse(const void *bytes, size_t size, char *error,
                                           size_t error_size) {
    sh_error to = {error, error_size};
    if (bytes == NULL) {
        sh_fail(&to, "package bytes", "an address", "NULL");
        return NULL;
    }
    return new_package(bytes, size, &to);
}

/* Maps a whole regular file; never blocks on a pipe that stands in its place. */
static void *map_file(const char *path, size_t *size, const sh_error *error) {
    struct stat status;
    int file = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (file < 0 || fstat(file, &status) != 0) {
        sh_fail(error, path, "a readable file", "%s", strerror(errno));
        if (file >= 0) {
            close(file);
        }
        return NULL;
    }
    void *mapping = NULL;
    if (!S_ISREG(status.st_mode) || status.st_size < 24) {
        sh_fail(error, path, "a GGUF file", "%s",
                S_ISREG(status.st_mode) ? "fewer than 24 bytes" : "no regular file");
    } else {
        *size = (size_t)status.st_size;
        mapping = mmap(NULL, *size, PROT_READ, MAP_PRIVATE, file, 0);
        if (mapping == MAP_FAILED) {
            sh_fail(error, path, "a file that can be mapped", "%s", strerror(errno));
            mapping = NULL;
        }
    }
    close(file);
    return mapping;
}

steerhook_package *steerhook_package_load(const char *path, char *error, size_t error_size) {
    sh_error to = {error, error_size};
    size_t size = 0;
    if (path == NULL) {
        sh_fail(&to, "package path", "a path", "NULL");
        return NULL;
    }
    void *mapping = map_file(path, &size, &to);
    if (mapping == NULL) {
        return NULL;
    }
    steerhook_package *package = new_package(mapping, size, &to);
    if (package == NULL) {
        munmap(mapping, size);
        return NULL;
    }
    package->mapping = mapping;
    package->mapped = size;
    return package;
}

/* Only the reference count of a shared package changes; `const` is cast away for it only. */
void sh_package_share(const steerhook_package *package) {
    atomic_fetch_add_explicit(&((steerhook_package *)(uintptr_t)package)->references, 1,
                              memory_order_relaxed);
}

void steerhook_package_free(steerhook_package *package) {
    if (package == NULL ||
        atomic_fetch_sub_explicit(&package->references, 1, memory_order_acq_rel) != 1) {
        return;
    }
    sh_arena_free(&package->arena);
    if (package->mapping != NULL) {
        munmap(package->mapping, package->mapped);
    }
    free(package);
}

steerhook_package_info steerhook_package_describe(const steerhook_package *package) {
    steerhook_package_info info = {.n_embd = package->n_embd, .n_layer = package->n_layer, .n_vocab = package->n_vocab,
                                   .n_probes = package->n_probes, .n_rules = package->n_rules};
    for (int32_t i = 0; i < package->n_probes; i++) {
        const sh_token_reading *tokens = &package->probes[i].tokens;
        info.whole_prompt |= tokens->n_sites > 0 && tokens->scope != SH_ANSWER;
        for (int32_t k = 0; k < package->probes[i].n_readings; k++) {
            const sh_reading *reading = &package->probes[i].readings[k];
            info.whole_prompt |= reading->position != SH_PROMPT_END;
            if (reading->offset < info.lowest_offset) {
                info.lowest_offset = reading->offset;
            }
        }
    }
    for (int32_t i = 0; i < package->n_rules; i++) {
        for (int32_t j = 0; j < package->rules[i].n_interventions; j++) {
            int32_t index = package->rules[i].interventions[j];
            info.steers_layers |= package->interventions[index].min_depth <= package->n_layer;
        }
    }
    return info;
}
