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

/* The next row of the batch with this id and position that no pass has computed: one of the sequence
 * of the row before if there is one, as llama.cpp takes the rows of a sequence one after the other.
 * -1 if there is none. */
static int32_t find_row(const sb_last *last, int32_t before, int32_t id, int32_t position) {
    int32_t found = -1;
    for (int32_t row = 0; row < last->n_rows; row++) {
        bool same = !last->computed[row] && last->token[row] == id &&
                    (position < 0 || last->pos[row] == position);
        if (same && before >= 0 && sb_last_has(last, row, last->members[last->first_member[before]])) {
            return row;
        }
        found = same && found < 0 ? row : found;
    }
    return found;
}

/* Which rows a pass computes; false if some are none of the batch's. */
static bool find_rows(sb_last *last, int32_t count, bool positions) {
    for (int32_t i = 0; i < count; i++) {
        int32_t next = last->n_computed + i, position = positions ? last->positions[i] : -1;
        bool in_order = next < last->n_rows && !last->computed[next] &&
                        last->token[next] == last->ids[i] &&
                        (position < 0 || last->pos[next] == position);
        int32_t before = i > 0 ? last->pass[i - 1] : -1;
        int32_t row = in_order ? next : find_row(last, before, last->ids[i], position);
        if (row < 0) {
            return false;
        }
        last->pass[i] = row;
        last->computed[row] = true;
    }
    return true;
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
