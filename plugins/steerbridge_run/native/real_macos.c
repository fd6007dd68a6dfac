/* Looking past our own functions, by dyld's means. It binds by library and name: `replaces` in
 * preload.c tells it what to bind instead, and ours may simply call theirs.
 *
 * What is replaced must be loaded at launch. A llama.cpp loaded later (by an interpreter) would run
 * without us, so that ends the process; see docs/run.md for the way around. Written after dyld's
 * sources and compiled, never run: there was no Mac.
 */
#include <dlfcn.h>
#include <mach-o/dyld.h>
#include <mach-o/loader.h>
#include <mach-o/nlist.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "events.h"
#include "llama_abi.h"
#include "real.h"

#define NEEDED "ggml_backend_sched_set_eval_callback" /* libllama imports it in every version */

extern void ggml_backend_sched_set_eval_callback(ggml_backend_sched *, eval_callback, void *)
    __attribute__((weak_import));

void *sb_real_dlsym(void *handle, const char *name) {
    return dlsym(handle, name); /* dyld replaces nothing in the library that brings the pairs */
}

void sb_libraries_loaded(sb_libraries *list) {
    for (uint32_t i = 0; i < _dyld_image_count(); i++) {
        const char *path = _dyld_get_image_name(i);
        if (path != NULL) {
            sb_library_add(list, path);
        }
    }
}

/* ---- libraries that come later ---- */

static bool launched;

/* Whether a loaded library takes a function from another one. */
static bool imports(const struct mach_header *header, intptr_t slide, const char *name) {
    const struct segment_command_64 *linkedit = NULL;
    const struct symtab_command *table = NULL;
    const char *at = (const char *)header + sizeof(struct mach_header_64);
    for (uint32_t i = 0; i < header->ncmds; i++) {
        const struct load_command *command = (const void *)at;
        const struct segment_command_64 *segment = (const void *)at;
        if (command->cmd == LC_SYMTAB) {
            table = (const void *)at;
        } else if (command->cmd == LC_SEGMENT_64 && strcmp(segment->segname, SEG_LINKEDIT) == 0) {
            linkedit = segment;
        }
        at += command->cmdsize;
    }
    if (header->magic != MH_MAGIC_64 || linkedit == NULL || table == NULL) {
        return false;
    }
    const char *base = (const char *)(slide + (intptr_t)(linkedit->vmaddr - linkedit->fileoff));
    const struct nlist_64 *symbols = (const void *)(base + table->symoff);
    const char *strings = base + table->stroff;
    for (uint32_t i = 0; i < table->nsyms; i++) {
        const char *symbol = strings + symbols[i].n_un.n_strx; /* "_" and the name in C */
        if ((symbols[i].n_type & N_TYPE) == N_UNDF && symbol[0] == '_' &&
            strcmp(symbol + 1, name) == 0) {
            return true;
        }
    }
    return false;
}

static void added(const struct mach_header *header, intptr_t slide) {
    if (launched && &ggml_backend_sched_set_eval_callback == NULL &&
        imports(header, slide, NEEDED)) {
        sb_fatal("llama.cpp was loaded after the program's start, where macOS cannot "
                 "intercept it: put its libraries into DYLD_INSERT_LIBRARIES");
    }
}

__attribute__((constructor)) static void watch_libraries(void) {
    _dyld_register_func_for_add_image(added); /* calls it for those loaded already, too */
    launched = true;
}
