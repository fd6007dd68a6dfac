#include "shadow.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    int32_t token, pos;
    bool has_pos, output, image;
    int32_t n_seqs;
    int32_t *seqs;
} row;

typedef struct shadow {
    const llama_batch_ext *batch;
    bool broken;
    int32_t count, capacity;
    row *rows;
    /* the same as arrays, made when asked for */
    int32_t *token, *pos, *n_seq_id, **seq_id;
    int8_t *output;
    struct shadow *next;
} shadow;

static shadow *shadows;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static shadow *find(const llama_batch_ext *batch, bool make) {
    pthread_mutex_lock(&lock);
    shadow *item = shadows;
    while (item != NULL && item->batch != batch) {
        item = item->next;
    }
    if (item == NULL && make && (item = calloc(1, sizeof *item)) != NULL) {
        item->batch = batch;
        item->next = shadows;
        shadows = item;
    }
    pthread_mutex_unlock(&lock);
    return item;
}

static bool grow(void **array, int32_t count, size_t size) {
    void *larger = realloc(*array, (size_t)count * size);
    *array = larger == NULL ? *array : larger;
    return larger != NULL;
}

static bool reserve(shadow *s, int32_t count) {
    if (count <= s->capacity) {
        return true;
    }
    int32_t capacity = count < 512 ? 512 : 2 * count;
    void *rows = s->rows, *token = s->token, *pos = s->pos, *n_seq_id = s->n_seq_id;
    void *seq_id = s->seq_id, *output = s->output;
    bool ok = grow(&rows, capacity, sizeof *s->rows);
    ok = grow(&token, capacity, sizeof *s->token) && ok;
    ok = grow(&pos, capacity, sizeof *s->pos) && ok;
    ok = grow(&n_seq_id, capacity, sizeof *s->n_seq_id) && ok;
    ok = grow(&seq_id, capacity, sizeof *s->seq_id) && ok;
    ok = grow(&output, capacity, sizeof *s->output) && ok;
    s->rows = rows;
    s->token = token;
    s->pos = pos;
    s->n_seq_id = n_seq_id;
    s->seq_id = seq_id;
    s->output = output;
    if (ok) {
        memset(s->rows + s->capacity, 0, (size_t)(capacity - s->capacity) * sizeof *s->rows);
        s->capacity = capacity;
    }
    return ok;
}

bool sb_shadow_clear(const llama_batch_ext *batch) {
    shadow *s = find(batch, true);
    if (s == NULL) {
        return false;
    }
    s->count = 0;
    s->broken = false;
    return true;
}

bool sb_shadow_add(const llama_batch_ext *batch, int32_t index, int32_t seq, int32_t token,
                   bool image) {
    shadow *s = find(batch, true);
    if (s == NULL || s->broken || index != s->count || !reserve(s, index + 1)) {
        if (s != NULL) {
            s->broken = true; /* rows that we did not see */
        }
        return false;
    }
    row *added = &s->rows[s->count++];
    *added = (row){.token = token, .image = image, .seqs = added->seqs};
    return sb_shadow_add_seq(batch, index, seq);
}

static row *row_of(const llama_batch_ext *batch, int32_t index) {
    shadow *s = find(batch, false);
    return s == NULL || index < 0 || index >= s->count ? NULL : &s->rows[index];
}

bool sb_shadow_add_seq(const llama_batch_ext *batch, int32_t index, int32_t seq) {
    row *r = row_of(batch, index);
    void *seqs = r == NULL ? NULL : r->seqs;
    if (r == NULL || !grow(&seqs, r->n_seqs + 1, sizeof *r->seqs)) {
        return false;
    }
    r->seqs = seqs;
    r->seqs[r->n_seqs++] = seq;
    return true;
}

bool sb_shadow_output(const llama_batch_ext *batch, int32_t index, bool output) {
    row *r = row_of(batch, index);
    if (r != NULL) {
        r->output = output;
    }
    return r != NULL;
}

bool sb_shadow_pos(const llama_batch_ext *batch, int32_t index, int32_t pos) {
    row *r = row_of(batch, index);
    if (r != NULL) {
        r->pos = pos;
        r->has_pos = true;
    }
    return r != NULL;
}

void sb_shadow_free(const llama_batch_ext *batch) {
    pthread_mutex_lock(&lock);
    shadow **link = &shadows;
    while (*link != NULL && (*link)->batch != batch) {
        link = &(*link)->next;
    }
    shadow *s = *link;
    if (s != NULL) {
        *link = s->next;
    }
    pthread_mutex_unlock(&lock);
    if (s == NULL) {
        return;
    }
    for (int32_t i = 0; i < s->capacity; i++) {
        free(s->rows[i].seqs);
    }
    free(s->rows);
    free(s->token);
    free(s->pos);
    free(s->n_seq_id);
    free(s->seq_id);
    free(s->output);
    free(s);
}

bool sb_shadow_rows(const llama_batch_ext *batch, sb_rows *rows) {
    shadow *s = find(batch, false);
    if (s == NULL || s->broken) {
        return false;
    }
    bool positions = true;
    for (int32_t i = 0; i < s->count; i++) {
        const row *r = &s->rows[i];
        if (r->image != s->rows[0].image) {
            return false;
        }
        positions &= r->has_pos;
        s->token[i] = r->token;
        s->pos[i] = r->pos;
        s->n_seq_id[i] = r->n_seqs;
        s->seq_id[i] = r->seqs;
        s->output[i] = r->output;
    }
    bool image = s->count > 0 && s->rows[0].image;
    *rows = (sb_rows){s->count, image ? NULL : s->token, positions ? s->pos : NULL, s->n_seq_id, s->seq_id, s->output,
                      image};
    return true;
}
