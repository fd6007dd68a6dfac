/* The rows of a context's last batch, as they were given, and the check that a pass computes them
 * in that order. Internal. */
#ifndef SB_PASSES_H
#define SB_PASSES_H

#include "llama_abi.h"
#include "shadow.h"

typedef struct {
    uint64_t number; /* of the batch in its context, from 1 on */
    int32_t n_rows, n_outputs, row_capacity, member_capacity;
    int32_t *token; /* -1: an embedding */
    int32_t *pos;   /* -1: llama.cpp counts */
    int32_t *first_member, *members; /* sequences of row r: members[first_member[r]..] */
    int8_t *output;
    bool *used; /* whether its logits were */
    bool image, text;
    int32_t next; /* row of the next pass */
    bool reordered;
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

/* A graph is about to be computed: its tokens must be the next ones of the batch. */
void sb_last_check(sb_last *last, const struct ggml_cgraph *graph);
/* Whether all of them were. */
bool sb_last_complete(const sb_last *last);

#endif
