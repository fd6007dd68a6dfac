#include "passes.h"

#include <stdlib.h>
#include <string.h>

#include "events.h"
#include "facts.h"

static void *grown(void *items, int32_t count, size_t size) {
    void *larger = realloc(items, (size_t)count * size);
    if (larger == NULL) {
        sb_fatal("no memory");
    }
    return larger;
}

static void reserve(sb_last *last, int32_t rows) {
    if (rows + 1 <= last->row_capacity) {
        return;
    }
    int32_t n = last->row_capacity = rows + 1 < 512 ? 512 : 2 * rows + 1;
    last->token = grown(last->token, n, sizeof *last->token);
    last->pos = grown(last->pos, n, sizeof *last->pos);
    last->first_member = grown(last->first_member, n, sizeof *last->first_member);
    last->output = grown(last->output, n, sizeof *last->output);
    last->used = grown(last->used, n, sizeof *last->used);
    last->computed = grown(last->computed, n, sizeof *last->computed);
    last->ids = grown(last->ids, n, sizeof *last->ids);
    last->positions = grown(last->positions, n, sizeof *last->positions);
    last->pass = grown(last->pass, n, sizeof *last->pass);
    last->sets = grown(last->sets, n, sizeof *last->sets);
}

static void add_member(sb_last *last, int32_t index, int32_t seq) {
    if (index == last->member_capacity) {
        last->member_capacity = index == 0 ? 512 : 2 * index;
        last->members =
            grown(last->members, last->member_capacity, sizeof *last->members);
    }
    last->members[index] = seq;
}

void sb_last_take(sb_last *last, const sb_rows *rows) {
    reserve(last, rows->n_tokens);
    last->number++;
    last->n_rows = rows->n_tokens;
    last->n_outputs = last->n_computed = 0;
    last->image = rows->image;
    last->text = rows->token != NULL;
    last->strange = false;
    int32_t members = 0;
    for (int32_t row = 0; row < rows->n_tokens; row++) {
        bool output = rows->output == NULL ? row == rows->n_tokens - 1 : rows->output[row] != 0;
        last->token[row] = rows->token == NULL ? -1 : rows->token[row];
        last->text = last->text && last->token[row] >= 0;
        last->pos[row] = rows->pos == NULL ? -1 : rows->pos[row];
        last->output[row] = output;
        last->used[row] = last->computed[row] = false;
        last->n_outputs += output;
        last->first_member[row] = members;
        int32_t count = rows->n_seq_id == NULL ? 1 : rows->n_seq_id[row];
        for (int32_t i = 0; i < count; i++) {
            add_member(last, members++, rows->seq_id == NULL ? 0 : rows->seq_id[row][i]);
        }
    }
    last->first_member[rows->n_tokens] = members;
}

void sb_last_free(sb_last *last) {
    free(last->token);
    free(last->pos);
    free(last->first_member);
    free(last->members);
    free(last->output);
    free(last->used);
    free(last->computed);
    free(last->ids);
    free(last->positions);
    free(last->pass);
    free(last->sets);
    *last = (sb_last){0};
}

int32_t sb_last_row(const sb_last *last, int32_t index) {
    if (index >= 0) {
        return index < last->n_rows && last->output[index] ? index : -1;
    }
    int32_t wanted = last->n_outputs + index;
    for (int32_t row = 0; wanted >= 0 && row < last->n_rows; row++) {
        if (last->output[row] && wanted-- == 0) {
            return row;
        }
    }
    return -1;
}

bool sb_last_has(const sb_last *last, int32_t row, int32_t seq) {
    for (int32_t m = last->first_member[row]; m < last->first_member[row + 1]; m++) {
        if (last->members[m] == seq) {
            return true;
        }
    }
    return false;
}

int32_t sb_last_before(const sb_last *last, int32_t row, int32_t seq) {
    int32_t count = 0;
    for (int32_t i = 0; i < row; i++) {
        count += sb_last_has(last, i, seq);
    }
    return count;
}

llama_batch sb_last_batch(const sb_last *last) {
    int32_t n = last->n_rows;
    int32_t **lists = grown(NULL, n, sizeof *lists);
    int32_t *counts = grown(NULL, n, sizeof *counts);
    for (int32_t row = 0; row < n; row++) {
        lists[row] = &last->members[last->first_member[row]];
        counts[row] = last->first_member[row + 1] - last->first_member[row];
    }
    return (llama_batch){n, last->token, NULL, last->pos, counts, lists, last->output};
}

/* ---- what a graph is given ---- */

typedef struct ggml_tensor *(*tensor_of)(const struct ggml_cgraph *, const char *);
typedef size_t (*size_of)(const struct ggml_tensor *);
typedef void (*read_tensor)(const struct ggml_tensor *, void *, size_t, size_t);

static int32_t set_size(const sb_last *last, int32_t row) {
    return last->first_member[row + 1] - last->first_member[row];
}

/* Whether two rows are of the same sequences. */
static bool same_set(const sb_last *last, int32_t a, int32_t b) {
    bool same = set_size(last, a) == set_size(last, b);
    for (int32_t m = last->first_member[a]; same && m < last->first_member[a + 1]; m++) {
        same = sb_last_has(last, b, last->members[m]);
    }
    return same;
}

static bool overlap(const sb_last *last, int32_t a, int32_t b) {
    for (int32_t m = last->first_member[a]; m < last->first_member[a + 1]; m++) {
        if (sb_last_has(last, b, last->members[m])) {
            return true;
        }
    }
    return false;
}

/* The rules by which llama.cpp takes the next rows of a batch for a graph (llama-batch.cpp: split_simple,
 * and split_equal with and without `sequential`). Each fills last->pass, or there are no such rows. */
typedef enum { SIMPLE, SEQUENTIAL, EQUAL } split;

static bool simple(sb_last *last, int32_t count) {
    int32_t n = 0;
    for (int32_t row = 0; row < last->n_rows && n < count; row++) {
        if (!last->computed[row]) {
            last->pass[n++] = row;
        }
    }
    return n == count;
}

/* As many rows of each of the sequences, one sequence after the other. Of the sequences that come
 * first in the batch; sequential: whose numbers go up by one. */
static bool equal(sb_last *last, int32_t count, bool sequential) {
    int32_t n_sets = 0, previous = -1;
    int32_t *sets = last->sets; /* a row of each */
    for (int32_t row = 0; row < last->n_rows; row++) {
        bool add = !last->computed[row] && set_size(last, row) > 0;
        for (int32_t i = 0; add && i < n_sets; i++) {
            add = !overlap(last, sets[i], row);
        }
        int32_t seq = add ? last->members[last->first_member[row]] : -1;
        if (add && (!sequential || n_sets == 0 || seq == previous + 1)) {
            sets[n_sets++] = row;
            previous = seq;
        }
    }
    int32_t each = n_sets == 0 || count % n_sets != 0 ? 0 : count / n_sets, n = 0;
    for (int32_t i = 0; i < n_sets; i++) {
        int32_t taken = 0;
        for (int32_t row = 0; row < last->n_rows && taken < each; row++) {
            if (!last->computed[row] && same_set(last, sets[i], row)) {
                last->pass[n++] = row;
                taken++;
            }
        }
    }
    return each > 0 && n == count;
}

/* Whether these are the rows of the graph, by its ids and positions. */
static bool fits(const sb_last *last, int32_t count, bool positions) {
    bool same = true;
    for (int32_t i = 0; i < count && same; i++) {
        int32_t row = last->pass[i];
        same = last->token[row] == last->ids[i] &&
               (!positions || last->pos[row] == last->positions[i]);
    }
    return same;
}

/* Which rows a pass computes; false if they are none of the batch's. */
static bool find_rows(sb_last *last, int32_t count, bool positions) {
    static const split in_one[] = {SIMPLE, SEQUENTIAL, EQUAL};
    static const split in_several[] = {SEQUENTIAL, SIMPLE, EQUAL};
    const split *rules = last->streams ? in_several : in_one;
    for (size_t i = 0; i < sizeof in_one / sizeof *in_one; i++) {
        bool made = rules[i] == SIMPLE ? simple(last, count)
                                       : equal(last, count, rules[i] == SEQUENTIAL);
        if (made && fits(last, count, positions)) {
            for (int32_t k = 0; k < count; k++) {
                last->computed[last->pass[k]] = true;
            }
            return true;
        }
    }
    return false;
}

bool sb_last_complete(const sb_last *last) {
    return !last->strange && (!last->text || last->n_computed == last->n_rows);
}

void sb_last_pass(sb_last *last, const struct ggml_cgraph *graph, steerhook_session *session) {
    static tensor_of find;
    static size_of size;
    static read_tensor read;
    if (!last->text) {
        return; /* embeddings: an image's rows have no ids */
    }
    find = find != NULL ? find : SB_CALL(tensor_of, "ggml_graph_get_tensor", NULL);
    size = size != NULL ? size : SB_CALL(size_of, "ggml_nbytes", NULL);
    read = read != NULL ? read : SB_CALL(read_tensor, "ggml_backend_tensor_get", NULL);
    /* Inputs are leaves, which the evaluation callback never sees. */
    const struct ggml_tensor *tokens = find(graph, "inp_tokens");
    const struct ggml_tensor *positions = find(graph, "inp_pos");
    if (tokens == NULL) {
        return; /* it moves rows of the cache; one that holds ours is missed at the end */
    }
    size_t bytes = size(tokens);
    int32_t count = (int32_t)(bytes / sizeof *last->ids);
    if (count < 1 || count > last->n_rows - last->n_computed) {
        last->strange = true;
        return;
    }
    read(tokens, last->ids, 0, bytes);
    bool placed = positions != NULL && size(positions) >= bytes;
    if (placed) {
        read(positions, last->positions, 0, bytes); /* of M-RoPE: the first of four */
    }
    last->strange |= !find_rows(last, count, placed) ||
                     steerhook_pass(session, last->pass, count) != STEERHOOK_OK;
    last->n_computed += count;
}
