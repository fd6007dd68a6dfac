#define _GNU_SOURCE
#include "cells.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "events.h"

/* The finaliser of splitmix64 (Steele, Lea, Flood 2014). */
static uint64_t mixed(uint64_t x) {
    x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
    return x ^ (x >> 31);
}

static uint64_t behind(uint64_t before, uint64_t row) {
    uint64_t history = mixed(before + mixed(row));
    return history == 0 ? 1 : history;
}

/* A number that no other row has, here or in an earlier process. */
static uint64_t fresh(void) {
    static _Atomic uint64_t next;
    uint64_t unset = 0;
    if (atomic_load(&next) == 0) {
        struct timespec now;
        clock_gettime(CLOCK_REALTIME, &now);
        uint64_t start = mixed((uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec) ^
                         ((uint64_t)getpid() << 40);
        atomic_compare_exchange_strong(&next, &unset, start);
    }
    return atomic_fetch_add(&next, 1);
}

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

uint64_t sb_cells_history(const sb_cells *cells, int32_t count) {
    return count == 0 ? 0 : cells->histories[count - 1];
}

static void *grown(void *items, int32_t capacity, size_t size) {
    void *larger = realloc(items, (size_t)capacity * size);
    if (larger == NULL) {
        sb_fatal("no memory");
    }
    return larger;
}

/* A row with a history of its own. Rows of an image may share a position (M-RoPE). */
static bool add(sb_cells *cells, int32_t position, uint64_t history) {
    if (cells->count > 0 && position < cells->positions[cells->count - 1]) {
        return false;
    }
    if (cells->count == cells->capacity) {
        cells->capacity = cells->capacity == 0 ? 512 : 2 * cells->capacity;
        cells->positions = grown(cells->positions, cells->capacity, sizeof *cells->positions);
        cells->histories = grown(cells->histories, cells->capacity, sizeof *cells->histories);
    }
    cells->positions[cells->count] = position;
    cells->histories[cells->count++] = history;
    return true;
}

bool sb_cells_add(sb_cells *cells, int32_t position, bool image) {
    bool taken = cells->count > 0 && position == cells->positions[cells->count - 1];
    return (image || !taken) && add(cells, position, behind(sb_cells_history(cells, cells->count), fresh()));
}

void sb_cells_renew(sb_cells *cells, int32_t first) {
    for (int32_t i = first; i < cells->count; i++) {
        cells->histories[i] = behind(sb_cells_history(cells, i), cells->histories[i]);
    }
}

bool sb_cells_shift(sb_cells *cells, int32_t from, int32_t to, int32_t delta) {
    int32_t first = sb_cells_before(cells, from < 0 ? 0 : from);
    int32_t last = sb_cells_before(cells, to);
    for (int32_t i = first; i < last; i++) {
        cells->positions[i] += delta;
    }
    if (delta != 0) {
        sb_cells_renew(cells, first);
    }
    bool ordered = first >= last || first == 0 || cells->positions[first - 1] < cells->positions[first];
    return ordered && (first >= last || last == cells->count ||
                       cells->positions[last - 1] < cells->positions[last]);
}

void sb_cells_cut(sb_cells *cells, int32_t first, int32_t last) {
    if (first < last) {
        memmove(cells->positions + first, cells->positions + last,
                (size_t)(cells->count - last) * sizeof *cells->positions);
        memmove(cells->histories + first, cells->histories + last,
                (size_t)(cells->count - last) * sizeof *cells->histories);
        cells->count -= last - first;
        sb_cells_renew(cells, first);
    }
}

void sb_cells_fill(sb_cells *cells, int32_t count) {
    cells->count = 0;
    for (int32_t i = 0; i < count; i++) {
        sb_cells_add(cells, i, false);
    }
}

bool sb_cells_copy(const sb_cells *from, sb_cells *to, int32_t first, int32_t last) {
    bool ordered = true;
    int32_t start = sb_cells_before(from, first < 0 ? 0 : first);
    int32_t end = sb_cells_before(from, last);
    bool same = to->count == 0 && start == 0;
    for (int32_t i = start; i < end; i++) {
        uint64_t history = from->histories[i];
        history = same ? history : behind(sb_cells_history(to, to->count), history);
        /* Behind rows of its own, one at their position is none of their image's. */
        ordered &= (i > start || to->count == 0 ||
                    to->positions[to->count - 1] != from->positions[i]) &&
                   add(to, from->positions[i], history);
    }
    return ordered;
}

bool sb_cells_take(sb_cells *cells, const int32_t *positions, const uint64_t *histories,
                   int32_t count) {
    bool ordered = true;
    cells->count = 0;
    for (int32_t i = 0; i < count; i++) {
        ordered &= add(cells, positions[i], histories[i]);
    }
    return ordered;
}

void sb_cells_free(sb_cells *cells) {
    free(cells->positions);
    free(cells->histories);
    *cells = (sb_cells){0};
}
