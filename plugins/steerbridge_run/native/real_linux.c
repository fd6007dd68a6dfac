/* Looking past our own functions, by glibc's means. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <link.h>
#include <string.h>

#include "events.h"
#include "real.h"

typedef void *(*dlsym_function)(void *, const char *);

/* glibc's dlsym, by a way that is not interposed; its version differs by machine and age. */
SB_EARLY static dlsym_function real_dlsym(void) {
    static dlsym_function function;
    static const char *const versions[] = {"GLIBC_2.34", "GLIBC_2.17", "GLIBC_2.2.5"};
    for (size_t i = 0; function == NULL && i < sizeof versions / sizeof *versions; i++) {
        void *symbol = dlvsym(RTLD_NEXT, "dlsym", versions[i]);
        memcpy(&function, &symbol, sizeof function);
    }
    if (function == NULL) {
        sb_fatal("dlsym: expected glibc's, found none");
    }
    return function;
}

SB_EARLY void *sb_real_dlsym(void *handle, const char *name) {
    return real_dlsym()(handle, name);
}

static int collect(struct dl_phdr_info *info, size_t size, void *list) {
    (void)size;
    if (info->dlpi_name != NULL) {
        sb_library_add(list, info->dlpi_name);
    }
    return 0;
}

void sb_libraries_loaded(sb_libraries *list) {
    dl_iterate_phdr(collect, list);
}
