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
    last->n_outputs = last->next = 0;
    last->image = rows->image;
    last->text = rows->token != NULL;
    last->reordered = false;
    int32_t members = 0;
    for (int32_t row = 0; row < rows->n_tokens; row++) {
        bool output = rows->output == NULL ? row == rows->n_tokens - 1 : rows->output[row] != 0;
        last->token[row] = rows->token == NULL ? -1 : rows->token[row];
        last->text = last->text && last->token[row] >= 0;
        last->pos[row] = rows->pos == NULL ? -1 : rows->pos[row];
        last->output[row] = output;
        last->used[row] = false;
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

/* The ids of the tokens that go in: inputs are leaves, which the evaluation callback never sees. */
static bool same_tokens(const sb_last *last, const struct ggml_tensor *tokens, int32_t count) {
    enum { PART = 256 };
    static read_tensor read;
    read = read != NULL ? read : SB_CALL(read_tensor, "ggml_backend_tensor_get", NULL);
    int32_t found[PART];
    for (int32_t i = 0; i < count; i += PART) {
        size_t n = (size_t)(count - i < PART ? count - i : PART);
        read(tokens, found, (size_t)i * sizeof *found, n * sizeof *found);
        if (memcmp(found, last->token + last->next + i, n * sizeof *found) != 0) {
            return false;
        }
    }
    return true;
}

bool sb_last_complete(const sb_last *last) {
    return !last->reordered && (!last->text || last->next == last->n_rows);
}

void sb_last_check(sb_last *last, const struct ggml_cgraph *graph) {
    static tensor_of find;
    static size_of size;
    if (!last->text) {
        return; /* embeddings: an image's rows have no ids */
    }
    find = find != NULL ? find : SB_CALL(tensor_of, "ggml_graph_get_tensor", NULL);
    size = size != NULL ? size : SB_CALL(size_of, "ggml_nbytes", NULL);
    const struct ggml_tensor *tokens = find(graph, "inp_tokens");
    if (tokens == NULL) {
        return; /* it moves rows of the cache; one that holds ours is missed at the end */
    }
    int32_t count = (int32_t)(size(tokens) / sizeof(int32_t));
    if (count > last->n_rows - last->next || !same_tokens(last, tokens, count)) {
        last->reordered = true;
        return;
    }
    last->next += count;
}
