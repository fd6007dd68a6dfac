/* The rows that a sequence has in the KV cache, by their positions. Rows are counted in this order
 * everywhere else. Each has a history: a number that stands for it and the rows before it, so two
 * sequences, or a sequence and a saved state of it, have the same rows up to one where their
 * histories are the same. Internal. */
#ifndef SB_CELLS_H
#define SB_CELLS_H

#include <stdbool.h>
#include <stdint.h>

typedef struct {
    int32_t count, capacity;
    int32_t *positions; /* ascending; rows of an image may share one */
    uint64_t *histories;
} sb_cells;

/* The number of rows before a position; behind the last one if it is negative. */
int32_t sb_cells_before(const sb_cells *cells, int32_t position);
/* Each returns false if positions would no longer be in order. */
bool sb_cells_add(sb_cells *cells, int32_t position, bool image);
bool sb_cells_shift(sb_cells *cells, int32_t from, int32_t to, int32_t delta);
void sb_cells_cut(sb_cells *cells, int32_t first, int32_t last); /* numbers of rows */
void sb_cells_fill(sb_cells *cells, int32_t count);              /* positions 0 to count - 1 */
/* Rows from `first` on are others than they were, or elsewhere. */
void sb_cells_renew(sb_cells *cells, int32_t first);
/* The history of the first `count` rows; 0: of none. */
uint64_t sb_cells_history(const sb_cells *cells, int32_t count);
/* Takes rows from arrays; false if their positions are not ascending. */
bool sb_cells_take(sb_cells *cells, const int32_t *positions, const uint64_t *histories,
                   int32_t count);
/* Adds the rows of another sequence between two positions. */
bool sb_cells_copy(const sb_cells *from, sb_cells *to, int32_t first, int32_t last);
void sb_cells_free(sb_cells *cells);

#endif
