/* The rows that a sequence has in the KV cache, by their positions. Rows are counted in this order
 * everywhere else. Internal. */
#ifndef SB_CELLS_H
#define SB_CELLS_H

#include <stdbool.h>
#include <stdint.h>

typedef struct {
    int32_t count, capacity;
    int32_t *positions; /* ascending */
} sb_cells;

/* The number of rows before a position; behind the last one if it is negative. */
int32_t sb_cells_before(const sb_cells *cells, int32_t position);
/* Each returns false if positions would no longer be in order. */
bool sb_cells_add(sb_cells *cells, int32_t position);
bool sb_cells_shift(sb_cells *cells, int32_t from, int32_t to, int32_t delta);
void sb_cells_cut(sb_cells *cells, int32_t first, int32_t last); /* numbers of rows */
void sb_cells_fill(sb_cells *cells, int32_t count);              /* positions 0 to count - 1 */
/* Adds the rows of another sequence between two positions. */
bool sb_cells_copy(const sb_cells *from, sb_cells *to, int32_t first, int32_t last);
void sb_cells_free(sb_cells *cells);

#endif
