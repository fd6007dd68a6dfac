/* Finding the functions of the llama.cpp that is loaded, past our own of the same names. Internal. */
#ifndef SB_REAL_H
#define SB_REAL_H

#include <stdbool.h>
#include <stddef.h>

/* The function of that name in the loaded llama.cpp, or NULL. `ours` is skipped. Ends the process if
 * two loaded libraries define it: which one a context belongs to could not be told. */
void *sb_find(const char *name, const void *ours);

/* The same, where its absence ends the process. */
void *sb_need(const char *name, const void *ours);

/* What the program's own dlsym would have answered. */
void *sb_real_dlsym(void *handle, const char *name);

#endif
