/* Finds the functions of the loaded llama.cpp behind our own of the same names. Internal. */
#ifndef SB_REAL_H
#define SB_REAL_H

#include <stdbool.h>
#include <stddef.h>

/* The function of that name in the loaded llama.cpp, or NULL. `ours` is skipped. Ends the process if
 * two loaded libraries define it: which one a context belongs to is then unknown. */
void *sb_find(const char *name, const void *ours);

/* The same, but its absence ends the process. */
void *sb_need(const char *name, const void *ours);

/* The program's own function behind one of ours; its absence ends the process. In preload.c. */
void *sb_original(const char *name);

/* A sanitizer, in builds that have one, looks its own functions up before it is ready to watch. */
#define SB_EARLY __attribute__((no_sanitize("address"), no_sanitize("undefined")))

/* The result of the program's own dlsym. */
void *sb_real_dlsym(void *handle, const char *name);

/* ---- what differs by system: real_linux.c, real_macos.c ---- */

/* Paths of loaded libraries, those of local scope included. */
typedef struct sb_libraries sb_libraries;
void sb_libraries_loaded(sb_libraries *list);
void sb_library_add(sb_libraries *list, const char *path);

#endif
