#include "cells.h"

#include <stdlib.h>
#include <string.h>

#include "events.h"

int32_t sb_cells_before(const sb_cells *cells, int32_t position) {
    int32_t low = 0, high = cells->count;
    while (position >= 0 && low < high) {
        int32_t middle = low + (high - low) / 2;
        if (cells->positions[middle] < position) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return high;
}

bool sb_cells_add(sb_cells *cells, int32_t position) {
    if (cells->count > 0 && position <= cells->positions[cells->count - 1]) {
        return false;
    }
    if (cells->count == cells->capacity) {
        cells->capacity = cells->capacity == 0 ? 512 : 2 * cells->capacity;
        void *larger = realloc(cells->positions, (size_t)cells->capacity * sizeof *cells->positions);
        if (larger == NULL) {
            sb_fatal("no memory");
        }
        cells->positions = larger;
    }
    cells->positions[cells->count++] = position;
    return true;
}

bool sb_cells_shift(sb_cells *cells, int32_t from, int32_t to, int32_t delta) {
    int32_t first = sb_cells_before(cells, from < 0 ? 0 : from);
    int32_t last = sb_cells_before(cells, to);
    for (int32_t i = first; i < last; i++) {
        cells->positions[i] += delta;
    }
    bool ordered = first >= last || first == 0 || cells->positions[first - 1] < cells->positions[first];
    return ordered && (first >= last || last == cells->count ||
                       cells->positions[last - 1] < cells->positions[last]);
}

void sb_cells_cut(sb_cells *cells, int32_t first, int32_t last) {
    if (first < last) {
        memmove(cells->positions + first, cells->positions + last,
                (size_t)(cells->count - last) * sizeof *cells->positions);
        cells->count -= last - first;
    }
}

void sb_cells_fill(sb_cells *cells, int32_t count) {
    cells->count = 0;
    for (int32_t i = 0; i < count; i++) {
        sb_cells_add(cells, i);
    }
}

bool sb_cells_copy(const sb_cells *from, sb_cells *to, int32_t first, int32_t last) {
    bool ordered = true;
    int32_t end = sb_cells_before(from, last);
    for (int32_t i = sb_cells_before(from, first < 0 ? 0 : first); i < end; i++) {
        ordered &= sb_cells_add(to, from->positions[i]);
    }
    return ordered;
}

void sb_cells_free(sb_cells *cells) {
    free(cells->positions);
    *cells = (sb_cells){0};
}
