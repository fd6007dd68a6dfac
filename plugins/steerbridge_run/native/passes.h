/* The rows of a context's last batch, as they were given, and the check that a pass computes them
 * in that order. Internal. */
#ifndef SB_PASSES_H
#define SB_PASSES_H

#include "llama_abi.h"
#include "shadow.h"
#include "steerhook.h"

typedef struct {
    uint64_t number; /* of the batch in its context, from 1 on */
    int32_t n_rows, n_outputs, row_capacity, member_capacity;
    int32_t *token; /* -1: an embedding */
    int32_t *pos;   /* -1: llama.cpp counts */
    int32_t *first_member, *members; /* sequences of row r: members[first_member[r]..] */
    int8_t *output;
    bool *used; /* whether its logits were */
    bool image, text;
    int32_t n_computed; /* rows of the passes so far */
    bool *computed;
    bool strange; /* a pass computed other rows */
    int32_t *ids, *positions, *pass, *sets; /* of one pass */
    bool streams; /* each sequence has a cache of its own, as far as llama.cpp tells */
} sb_last;

void sb_last_take(sb_last *last, const sb_rows *rows);
void sb_last_free(sb_last *last);

/* The row that an index of llama.cpp means (below 0: outputs, from the end); -1 if none. */
int32_t sb_last_row(const sb_last *last, int32_t index);
bool sb_last_has(const sb_last *last, int32_t row, int32_t seq);
/* How many of the first `row` rows are the sequence's. */
int32_t sb_last_before(const sb_last *last, int32_t row, int32_t seq);

/* The same rows as a batch of llama.cpp; the sequence lists are the caller's to free. */
llama_batch sb_last_batch(const sb_last *last);

/* A graph is about to be computed: its tokens, at their positions, must be some of the batch's. Tells
 * the session which. */
void sb_last_pass(sb_last *last, const struct ggml_cgraph *graph, steerhook_session *session);
/* Whether all of them were. */
bool sb_last_complete(const sb_last *last);

#endif
