/* Saved states of llama.cpp: what is known of their rows travels with them, behind their bytes or, for
 * a file, in another file beside it. Internal. */
#ifndef SB_STATES_H
#define SB_STATES_H

#include "llama_abi.h"

/* Which part of a context a state holds. */
typedef struct {
    int32_t seq;  /* below 0: every sequence */
    bool partial; /* only what slides or recurs (LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) */
} sb_part;

/* Bytes that go behind those of a state; 0: nothing is known of its rows. */
size_t sb_state_size(llama_context *context, sb_part part);
/* Puts them behind the first `used` of `size` bytes; returns how many bytes there are in all. */
size_t sb_state_append(llama_context *context, sb_part part, uint8_t *state, size_t used,
                       size_t size);
/* How many bytes at the end of a state are ours. */
size_t sb_state_ours(const uint8_t *state, size_t size);
/* llama.cpp has read a state, or could not: its cache is what the last `ours` bytes say. */
void sb_state_restored(llama_context *context, sb_part part, const uint8_t *state, size_t size,
                       size_t ours);

/* The same for a file that llama.cpp has just written, or read; NULL: it could not. */
void sb_state_beside(llama_context *context, sb_part part, const char *path);
void sb_state_loaded(llama_context *context, sb_part part, const char *path);

#endif
