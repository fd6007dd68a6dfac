#define _GNU_SOURCE
#include "real.h"

#include <dlfcn.h>
#include <link.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "events.h"

typedef void *(*dlsym_function)(void *, const char *);

/* glibc's dlsym, by a way that is not interposed; its version differs by machine and age. */
static dlsym_function real_dlsym(void) {
    static dlsym_function found;
    static const char *const versions[] = {"GLIBC_2.34", "GLIBC_2.17", "GLIBC_2.2.5"};
    for (size_t i = 0; found == NULL && i < sizeof versions / sizeof *versions; i++) {
        void *symbol = dlvsym(RTLD_NEXT, "dlsym", versions[i]);
        memcpy(&found, &symbol, sizeof found);
    }
    if (found == NULL) {
        sb_fatal("dlsym: expected glibc's, found none");
    }
    return found;
}

void *sb_real_dlsym(void *handle, const char *name) {
    return real_dlsym()(handle, name);
}

/* ---- loaded libraries, those of local scope included ---- */

enum { MAX_PATHS = 1024 };

typedef struct {
    char *paths[MAX_PATHS];
    size_t count;
} path_list;

static int collect(struct dl_phdr_info *info, size_t size, void *data) {
    (void)size;
    path_list *list = data;
    if (info->dlpi_name != NULL && info->dlpi_name[0] == '/' && list->count < MAX_PATHS) {
        char *copy = strdup(info->dlpi_name);
        if (copy != NULL) {
            list->paths[list->count++] = copy;
        }
    }
    return 0;
}

/* Where a symbol of a library resolves to, if the library is loaded and does not mean ours. */
static void *in_library(const char *path, const char *name, const void *ours) {
    void *handle = dlopen(path, RTLD_LAZY | RTLD_NOLOAD);
    if (handle == NULL) {
        return NULL;
    }
    void *symbol = sb_real_dlsym(handle, name);
    dlclose(handle); /* the library was loaded before, and stays so */
    return symbol == ours ? NULL : symbol;
}

void *sb_find(const char *name, const void *ours) {
    path_list *list = calloc(1, sizeof *list);
    if (list == NULL) {
        sb_fatal("no memory");
    }
    dl_iterate_phdr(collect, list);
    void *found = sb_real_dlsym(RTLD_NEXT, name);
    found = found == ours ? NULL : found;
    for (size_t i = 0; i < list->count; i++) {
        void *other = in_library(list->paths[i], name, ours);
        if (found != NULL && other != NULL && other != found) {
            sb_fatal("%s: expected one loaded llama.cpp, found two", name);
        }
        found = found == NULL ? other : found;
        free(list->paths[i]);
    }
    free(list);
    return found;
}

void *sb_need(const char *name, const void *ours) {
    void *found = sb_find(name, ours);
    if (found == NULL) {
        sb_fatal("%s: expected it in the loaded llama.cpp, found none", name);
    }
    return found;
}
