#define _GNU_SOURCE
#include "real.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

#include "events.h"

enum { MAX_LIBRARIES = 1024 };

struct sb_libraries {
    char *paths[MAX_LIBRARIES];
    size_t count;
};

void sb_library_add(sb_libraries *list, const char *path) {
    if (path[0] == '/' && list->count < MAX_LIBRARIES) {
        char *copy = strdup(path);
        if (copy != NULL) {
            list->paths[list->count++] = copy;
        }
    }
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
    sb_libraries *list = calloc(1, sizeof *list);
    if (list == NULL) {
        sb_fatal("no memory");
    }
    sb_libraries_loaded(list);
    void *function = sb_real_dlsym(RTLD_NEXT, name);
    function = function == ours ? NULL : function;
    for (size_t i = 0; i < list->count; i++) {
        void *other = in_library(list->paths[i], name, ours);
        if (function != NULL && other != NULL && other != function) {
            sb_fatal("%s: expected one loaded llama.cpp, found two", name);
        }
        function = function == NULL ? other : function;
        free(list->paths[i]);
    }
    free(list);
    return function;
}

void *sb_need(const char *name, const void *ours) {
    void *function = sb_find(name, ours);
    if (function == NULL) {
        sb_fatal("%s: expected it in the loaded llama.cpp, found none", name);
    }
    return function;
}
