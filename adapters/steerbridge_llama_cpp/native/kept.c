/* Rows of the KV cache that readings need again: means, when a later prompt begins with these
 * rows; positions before a prompt's end, when its last rows are in a separate batch. */
#include <stdlib.h>
#include <string.h>

#include "tokens.h"

steerhook_status steerhook_keep_rows(steerhook_session *s, bool answers) {
    steerhook_status status = sh_session_check(s);
    if (status != STEERHOOK_OK) {
        return status;
    }
    if (s->batch.open) {
        return sh_session_refuse(s, STEERHOOK_ORDER, "keep rows: expected no open batch");
    }
    s->keeps = s->n_kept_readings > 0;
    s->keeps_answers = s->keeps && answers;
    s->reads_answers = answers;
    return STEERHOOK_OK;
}

int32_t steerhook_kept_rows(const steerhook_session *s, int32_t seq) {
    if (seq < 0 || seq >= s->model.n_seq_max) {
        return 0;
    }
    const sh_request *request = &s->requests[seq];
    int32_t kept = s->keeps ? request->cache.n_kept : SH_ENDLESS;
    for (int32_t k = 0; k < s->n_row_probes; k++) {
        int32_t rows = request->cache.rows.n;
        int32_t known = rows < kept ? rows : kept;
        while (known > 0 && !sh_rows_known(s, request, s->row_probes[k].probe, known)) {
            known--;
        }
        kept = known;
    }
    return kept == SH_ENDLESS ? 0 : kept;
}

bool sh_keeps(const steerhook_session *s, const sh_read *read, bool prompt) {
    bool image = sh_reading_of(s, read)->position == SH_IMAGE_MEAN;
    return (prompt ? s->keeps : s->keeps_answers) && s->kept_of[read->slot] >= 0 &&
           (!image || s->batch.image);
}

/* The row behind the last one of the batch that is kept. */
static int64_t kept_end(const steerhook_session *s, const sh_request *request) {
    int64_t end = request->batch_count;
    bool whole = s->keeps_answers || end < request->n_prompt;
    return whole ? end : request->n_prompt;
}

float *sh_kept(const steerhook_session *s, const sh_request *request, int32_t slot,
               int64_t position) {
    return request->cache.kept + (position * s->n_kept_readings + s->kept_of[slot]) * s->package->n_embd;
}

bool sh_kept_room(const steerhook_session *s, sh_request *request, int64_t need) {
    if (!s->keeps || need <= request->cache.kept_capacity) {
        return true;
    }
    int64_t capacity = need < 256 ? 256 : need + need / 2;
    size_t row = (size_t)s->n_kept_readings * (size_t)s->package->n_embd * sizeof *request->cache.kept;
    if (capacity > SH_ENDLESS || (size_t)capacity > SIZE_MAX / row) {
        return false;
    }
    void *kept = realloc(request->cache.kept, (size_t)capacity * row);
    request->cache.kept = kept == NULL ? request->cache.kept : kept;
    void *image = realloc(request->cache.kept_image, (size_t)capacity * sizeof *request->cache.kept_image);
    request->cache.kept_image = image == NULL ? request->cache.kept_image : image;
    if (kept != NULL && image != NULL) {
        request->cache.kept_capacity = (int32_t)capacity;
    }
    return kept != NULL && image != NULL;
}

bool sh_keep_room(const steerhook_session *s, sh_request *request) {
    return sh_kept_room(s, request, kept_end(s, request));
}

void sh_keep_batch(const steerhook_session *s, sh_request *request) {
    int64_t from = request->count;
    int64_t to = kept_end(s, request);
    if (!s->keeps || request->cache.n_kept < from || to <= from) {
        return; /* rows before these are not known, or these are an answer's */
    }
    for (int64_t row = from; row < to; row++) {
        request->cache.kept_image[row] = s->batch.image;
    }
    request->cache.n_kept = (int32_t)to;
}

void sh_kept_cut(const steerhook_session *s, sh_request *request, int64_t from, int64_t to) {
    int64_t first = from, last = to;
    if (!s->keeps || first >= request->cache.n_kept) {
        return;
    }
    if (to < 0 || last >= request->cache.n_kept) {
        request->cache.n_kept = (int32_t)first;
    } else if (last > first) {
        size_t row = (size_t)s->n_kept_readings * (size_t)s->package->n_embd;
        size_t moved = (size_t)(request->cache.n_kept - last);
        memmove(request->cache.kept + (size_t)first * row, request->cache.kept + (size_t)last * row,
                moved * row * sizeof *request->cache.kept);
        memmove(request->cache.kept_image + first, request->cache.kept_image + last,
                moved * sizeof *request->cache.kept_image);
        request->cache.n_kept -= (int32_t)(last - first);
    }
}

bool sh_kept_copy(const steerhook_session *s, const sh_request *from, sh_request *to) {
    to->cache.n_kept = 0;
    if (!s->keeps || from->cache.n_kept == 0) {
        return true;
    }
    if (!sh_kept_room(s, to, from->cache.n_kept)) {
        return false;
    }
    size_t row = (size_t)s->n_kept_readings * (size_t)s->package->n_embd;
    memcpy(to->cache.kept, from->cache.kept, (size_t)from->cache.n_kept * row * sizeof *to->cache.kept);
    memcpy(to->cache.kept_image, from->cache.kept_image, (size_t)from->cache.n_kept * sizeof *to->cache.kept_image);
    to->cache.n_kept = from->cache.n_kept;
    return true;
}

bool sh_kept_has(const steerhook_session *s, const sh_request *request, int32_t slot,
                 int64_t position) {
    return s->keeps && s->kept_of[slot] >= 0 && position >= 0 && position < request->cache.n_kept;
}

/* The value of a reading at one row, as if the row had just been seen. */
static void take_again(const steerhook_session *s, sh_request *request, int32_t slot,
                       int64_t position) {
    const float *x = sh_kept(s, request, slot, position);
    double *values = request->values + (int64_t)slot * s->package->n_embd;
    for (int32_t i = 0; i < s->package->n_embd; i++) {
        values[i] = (double)x[i];
    }
    request->progress[slot] = (sh_progress){1, true};
}

steerhook_status sh_kept_ends(steerhook_session *s, sh_request *request) {
    steerhook_status status = STEERHOOK_OK;
    for (int32_t p = 0; status == STEERHOOK_OK && p < s->package->n_probes; p++) {
        const sh_probe *probe = &s->package->probes[p];
        bool taken = false;
        for (int32_t k = 0; k < probe->n_readings; k++) {
            int64_t row = sh_first_row(&probe->readings[k], request->n_prompt);
            int32_t slot = s->first_slot[p] + k;
            if (probe->readings[k].position == SH_PROMPT_END && row < request->count &&
                sh_kept_has(s, request, slot, row)) {
                take_again(s, request, slot, row);
                taken = true;
            }
        }
        status = taken && !request->probes[p].known ? sh_decide_probe(s, p, request) : status;
    }
    return status;
}

void sh_kept_sums(const steerhook_session *s, sh_request *request) {
    int32_t d = s->package->n_embd;
    for (int32_t slot = 0; s->keeps && slot < s->n_slots; slot++) {
        if (!s->sums[slot]) {
            continue;
        }
        double *sum = request->values + (int64_t)slot * d;
        for (int32_t row = 0; row < request->cache.n_kept; row++) {
            if (s->image_only[slot] && !request->cache.kept_image[row]) {
                continue;
            }
            const float *x = sh_kept(s, request, slot, row);
            for (int32_t i = 0; i < d; i++) {
                sum[i] += (double)x[i];
            }
            request->progress[slot].rows++;
        }
    }
}
