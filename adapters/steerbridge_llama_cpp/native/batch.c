/* Batches: which requests their rows belong to, and whether every row was seen. */
#include <stdlib.h>
#include <string.h>

#include "tokens.h"

enum { MAX_ROWS = 1 << 24, MAX_SEQS_PER_ROW = 1 << 16 };

/* ---- arrays that only grow: no allocation in the token loop ---- */

static bool grow(void **array, int32_t count, size_t size) {
    void *larger = realloc(*array, (size_t)count * size);
    if (larger != NULL) {
        *array = larger;
    }
    return larger != NULL;
}

static bool reserve_rows(sh_batch *batch, int32_t count) {
    if (count + 1 <= batch->row_capacity) {
        return true;
    }
    void *first_member = batch->first_member;
    void *outputs = batch->outputs;
    void *is_output = batch->is_output;
    void *pass = batch->pass;
    void *pass_outputs = batch->pass_outputs;
    bool ok = grow(&first_member, count + 1, sizeof *batch->first_member);
    ok = grow(&outputs, count + 1, sizeof *batch->outputs) && ok;
    ok = grow(&is_output, count + 1, sizeof *batch->is_output) && ok;
    ok = grow(&pass, count + 1, sizeof *batch->pass) && ok;
    ok = grow(&pass_outputs, count + 1, sizeof *batch->pass_outputs) && ok;
    batch->pass = pass;
    batch->pass_outputs = pass_outputs;
    batch->first_member = first_member;
    batch->outputs = outputs;
    batch->is_output = is_output;
    batch->row_capacity = ok ? count + 1 : batch->row_capacity;
    return ok;
}

static bool add_member(sh_batch *batch, sh_member member) {
    if (batch->n_members == batch->member_capacity) {
        int32_t capacity = batch->member_capacity == 0 ? 64 : batch->member_capacity * 2;
        void *members = batch->members;
        if (capacity > MAX_ROWS || !grow(&members, capacity, sizeof *batch->members)) {
            return false;
        }
        batch->members = members;
        batch->member_capacity = capacity;
    }
    batch->members[batch->n_members++] = member;
    return true;
}

/* ---- rows of several sequences ---- */

static bool same_rules(const steerhook_session *s, const sh_request *a, const sh_request *b) {
    for (int32_t i = 0; i < s->package->n_rules; i++) {
        const sh_rule_state *x = &a->rules[i];
        const sh_rule_state *y = &b->rules[i];
        if (x->decided != y->decided || x->fired != y->fired || x->begin != y->begin ||
            memcmp(&x->strength, &y->strength, sizeof x->strength) != 0) {
            return false;
        }
    }
    return true;
}

/* Equal in everything that decides what will be read and steered. */
static bool same_state(const steerhook_session *s, const sh_request *a, const sh_request *b) {
    if (a->n_cached != b->n_cached || a->n_prompt != b->n_prompt || a->count != b->count) {
        return false;
    }
    for (int32_t i = 0; i < s->n_slots; i++) {
        if (a->progress[i].rows != b->progress[i].rows ||
            a->progress[i].complete != b->progress[i].complete) {
            return false;
        }
    }
    for (int32_t k = 0; k < s->n_row_probes; k++) {
        const sh_running *x = &a->running[k];
        const sh_running *y = &b->running[k];
        if (x->best_row != y->best_row || x->fired_row != y->fired_row ||
            memcmp(&x->best, &y->best, sizeof x->best) != 0) {
            return false;
        }
    }
    size_t values = (size_t)s->n_slots * (size_t)s->package->n_embd;
    return memcmp(a->values, b->values, values * sizeof *a->values) == 0 && same_rules(s, a, b);
}

/* Two requests may share a row if the row means the same to both. Past their prompts they need
 * equal rules only. Before, they must have advanced together: equal at the start of the batch,
 * and since then each row of one was a row of the other (equal `last_row` at every shared row
 * says so by induction). */
static bool may_share(const steerhook_session *s, const sh_request *a, const sh_request *b) {
    if (s->n_row_probes == 0 && a->count >= a->n_prompt && b->count >= b->n_prompt) {
        return same_rules(s, a, b);
    }
    return a->last_row == b->last_row && (a->last_row >= 0 || same_state(s, a, b));
}

/* ---- begin ---- */

static bool is_output(const steerhook_batch *batch, int32_t row) {
    return batch->output == NULL ? row == batch->n_tokens - 1 : batch->output[row] != 0;
}

static int32_t sequences_of(const steerhook_batch *batch, int32_t row) {
    return batch->n_seq_id == NULL ? 1 : batch->n_seq_id[row];
}

static int32_t sequence_of(const steerhook_batch *batch, int32_t row, int32_t index) {
    return batch->seq_id == NULL ? 0 : batch->seq_id[row][index];
}

static steerhook_status add_row_member(steerhook_session *s, int32_t row, int32_t seq) {
    sh_batch *batch = &s->batch;
    if (seq < 0 || seq >= s->model.n_seq_max) {
        return sh_session_fail(s, STEERHOOK_SEQUENCE,
                               "row %ld: expected a sequence of 0 to %ld, found %ld", (long)row,
                               (long)s->model.n_seq_max - 1, (long)seq);
    }
    sh_request *request = &s->requests[seq];
    if (!request->open) {
        return sh_session_fail(s, STEERHOOK_NO_REQUEST,
                               "row %ld: expected an open request on sequence %ld, found none",
                               (long)row, (long)seq);
    }
    int32_t first = batch->first_member[row];
    if (batch->n_members > first &&
        !may_share(s, &s->requests[batch->members[first].seq], request)) {
        return sh_session_fail(s, STEERHOOK_SHARED_ROW,
                               "row %ld: expected sequences in the same state, found %ld and %ld",
                               (long)row, (long)batch->members[first].seq, (long)seq);
    }
    return add_member(batch, (sh_member){seq, request->batch_count})
               ? STEERHOOK_OK
               : sh_session_fail(s, STEERHOOK_MEMORY, "batch: no memory");
}

/* Counts the row for its sequences, after all of them were compared. */
static steerhook_status count_row(steerhook_session *s, int32_t row) {
    sh_batch *batch = &s->batch;
    for (int32_t m = batch->first_member[row]; m < batch->n_members; m++) {
        sh_request *request = &s->requests[batch->members[m].seq];
        if (request->last_row == row) {
            return sh_session_fail(s, STEERHOOK_SEQUENCE, "row %ld: sequence %ld twice", (long)row,
                                   (long)batch->members[m].seq);
        }
        request->last_row = row;
        request->batch_count++;
    }
    return STEERHOOK_OK;
}

/* The last output row of an open-ended prompt is judged as its end. */
static steerhook_status end_prompts(steerhook_session *s, int32_t row) {
    const sh_batch *batch = &s->batch;
    steerhook_status status = STEERHOOK_OK;
    for (int32_t m = batch->first_member[row];
         status == STEERHOOK_OK && m < batch->n_members; m++) {
        sh_request *request = &s->requests[batch->members[m].seq];
        if (request->open_ended && request->end_row == row) {
            status = sh_request_end_prompt(s, request);
        }
    }
    return status;
}

/* A row that a probe reads in the last block or at the head must be an output row. Where only
 * batches are known, those that need it cannot judge, see `unjudged` in request.c. */
static steerhook_status check_output(steerhook_session *s, int32_t row) {
    const sh_batch *batch = &s->batch;
    for (int32_t m = batch->first_member[row]; m < batch->n_members; m++) {
        const sh_member *member = &batch->members[m];
        sh_request *request = &s->requests[member->seq];
        request->cache.unseen = true;
        for (int32_t i = 0; !request->by_batches && member->position < request->n_prompt && i < s->n_sites; i++) {
            const sh_site_plan *site = &s->sites[i];
            for (int32_t j = 0; site->outputs_only && j < site->n_reads; j++) {
                if (sh_wants(s, &site->reads[j], request, member->position)) {
                    return sh_session_fail(
                        s, STEERHOOK_NO_OUTPUT,
                        "row %ld: expected an output row, which probe %s reads", (long)row,
                        s->package->probes[site->reads[j].probe].id);
                }
            }
        }
    }
    return STEERHOOK_OK;
}

static steerhook_status add_row(steerhook_session *s, const steerhook_batch *from, int32_t row) {
    sh_batch *batch = &s->batch;
    int32_t count = sequences_of(from, row);
    bool output = is_output(from, row);
    steerhook_status status = STEERHOOK_OK;
    if (count < 1 || count > MAX_SEQS_PER_ROW) {
        return sh_session_fail(s, STEERHOOK_SEQUENCE,
                               "row %ld: expected a sequence or more, found %ld", (long)row,
                               (long)count);
    }
    batch->first_member[row] = batch->n_members;
    for (int32_t i = 0; i < count && status == STEERHOOK_OK; i++) {
        status = add_row_member(s, row, sequence_of(from, row, i));
    }
    status = status == STEERHOOK_OK ? count_row(s, row) : status;
    batch->is_output[row] = output;
    if (output) {
        batch->outputs[batch->n_outputs++] = row;
        status = status == STEERHOOK_OK ? end_prompts(s, row) : status;
    } else if (status == STEERHOOK_OK) {
        status = check_output(s, row);
    }
    return status;
}

/* The row that is judged if the prompt is open-ended: the last output row. Where several outputs in
 * a row close the sequence's part of the batch, behind rows without, it is the first of them: the
 * others are drafts that came with the prompt. */
static void find_end(sh_request *request, int32_t row, bool output) {
    bool drafts = output && request->quiet && request->ends_with_output;
    request->end_row = output && !drafts ? row : request->end_row;
    request->quiet |= !output;
    request->ends_with_output = output;
}

static bool has_rows(const steerhook_batch *batch, int32_t seq) {
    for (int32_t row = 0; row < batch->n_tokens; row++) {
        for (int32_t i = 0; i < sequences_of(batch, row); i++) {
            if (sequence_of(batch, row, i) == seq) {
                return true;
            }
        }
    }
    return false;
}

static void start(steerhook_session *s, const steerhook_batch *from) {
    s->batch.image = from->image;
    s->batch.n_rows = from->n_tokens;
    s->batch.n_outputs = s->batch.n_members = s->batch.n_passes = 0;
    s->batch.keeps_all = s->batch.has_norm = false;
    for (int32_t i = 0; i < s->model.n_seq_max; i++) {
        s->requests[i].batch_count = s->requests[i].count;
        if (has_rows(from, i)) {
            s->requests[i].survived = s->requests[i].count;
        }
        s->requests[i].last_row = s->requests[i].end_row = -1;
        s->requests[i].quiet = s->requests[i].ends_with_output = false;
    }
    for (int32_t row = 0; row < from->n_tokens; row++) {
        for (int32_t i = 0; i < sequences_of(from, row); i++) {
            int32_t seq = sequence_of(from, row, i);
            if (seq >= 0 && seq < s->model.n_seq_max) {
                find_end(&s->requests[seq], row, is_output(from, row));
            }
        }
    }
    for (int32_t i = 0; i < s->n_sites; i++) {
        s->sites[i].next_row = s->sites[i].chunk = 0;
    }
}

/* Token readings know every row of a sequence, read or not. */
static void announce_rows(steerhook_session *s, const steerhook_batch *from) {
    for (int32_t row = 0; sh_knows_rows(s) && row < from->n_tokens; row++) {
        for (int32_t m = s->batch.first_member[row]; m < s->batch.first_member[row + 1]; m++) {
            const sh_member *member = &s->batch.members[m];
            int32_t id = from->tokens == NULL ? -1 : from->tokens[row];
            sh_rows_announce(s, &s->requests[member->seq], member->position, id);
        }
    }
}

steerhook_status steerhook_batch_begin(steerhook_session *s, const steerhook_batch *batch) {
    steerhook_status status = sh_session_check(s);
    if (status != STEERHOOK_OK) {
        return status;
    }
    if (s->batch.open || s->paused) {
        return sh_session_fail(s, STEERHOOK_ORDER, "batch: expected %s",
                               s->paused ? "a session that is not paused"
                                         : "the last one to have ended");
    }
    if (batch == NULL || batch->n_tokens < 1 || batch->n_tokens >= MAX_ROWS ||
        (batch->n_seq_id == NULL) != (batch->seq_id == NULL)) {
        return sh_session_fail(s, STEERHOOK_ARGUMENT,
                               "batch: expected rows, and n_seq_id and seq_id or neither");
    }
    if (!reserve_rows(&s->batch, batch->n_tokens) || !sh_row_sums_room(s, batch->n_tokens)) {
        return sh_session_fail(s, STEERHOOK_MEMORY, "batch: no memory");
    }
    start(s, batch);
    for (int32_t row = 0; row < batch->n_tokens; row++) {
        status = add_row(s, batch, row);
        if (status != STEERHOOK_OK) {
            return status;
        }
    }
    s->batch.first_member[batch->n_tokens] = s->batch.n_members;
    for (int32_t i = 0; i < s->model.n_seq_max; i++) {
        sh_request *request = &s->requests[i];
        if (request->last_row >= 0 &&
            (!sh_keep_room(s, request) ||
             !sh_rows_room(s, &request->cache.rows, request->batch_count))) {
            return sh_session_fail(s, STEERHOOK_MEMORY, "batch: no memory for kept rows");
        }
    }
    announce_rows(s, batch);
    s->batch.idle = sh_batch_is_idle(s);
    s->batch.open = true;
    return STEERHOOK_OK;
}

steerhook_status steerhook_pass(steerhook_session *s, const int32_t *rows, int32_t n_rows) {
    steerhook_status status = sh_session_check(s);
    if (status != STEERHOOK_OK) {
        return status;
    }
    sh_batch *batch = &s->batch;
    if (!batch->open || s->pending != NULL) {
        return sh_session_fail(s, STEERHOOK_ORDER, "pass: expected an open batch");
    }
    if (rows == NULL || n_rows < 1 || n_rows > batch->n_rows) {
        return sh_session_fail(s, STEERHOOK_ARGUMENT, "pass: expected 1 to %ld rows, found %ld",
                               (long)batch->n_rows, (long)n_rows);
    }
    batch->n_passes++;
    batch->n_pass = batch->n_pass_outputs = 0;
    for (int32_t i = 0; i < n_rows; i++) {
        if (rows[i] < 0 || rows[i] >= batch->n_rows) {
            return sh_session_fail(s, STEERHOOK_ARGUMENT, "pass: no row %ld", (long)rows[i]);
        }
        batch->pass[batch->n_pass++] = rows[i];
        if (batch->is_output[rows[i]]) {
            batch->pass_outputs[batch->n_pass_outputs++] = rows[i];
        }
    }
    return STEERHOOK_OK;
}

/* ---- end ---- */

void sh_batch_forget(steerhook_session *s) {
    s->batch.open = false;
    s->pending = NULL;
    s->pending_node = NULL;
}

static steerhook_status check_sites(steerhook_session *s) {
    for (int32_t i = 0; i < s->n_sites; i++) {
        const sh_site_plan *site = &s->sites[i];
        bool outputs = site->outputs_only && !s->batch.keeps_all;
        int32_t want = outputs ? s->batch.n_outputs : s->batch.n_rows;
        if (site->next_row != want) {
            bool unseen = site->next_row == 0 && site->chunk == 0;
            return sh_session_fail(s, unseen ? STEERHOOK_HOOK_LOST : STEERHOOK_ROWS,
                                   "layer_input[%ld]%s: expected %ld rows, found %ld",
                                   (long)site->depth,
                                   site->depth > s->model.n_layer ? " (head_input)" : "",
                                   (long)want, (long)site->next_row);
        }
    }
    return STEERHOOK_OK;
}

static steerhook_status check_decided(steerhook_session *s, const sh_request *request) {
    for (int32_t i = 0; i < s->package->n_probes; i++) {
        if (!request->probes[i].known) {
            return sh_session_fail(s, STEERHOOK_HOOK_LOST,
                                   "probe %s: expected a score at the prompt end, found none",
                                   s->package->probes[i].id);
        }
    }
    return STEERHOOK_OK;
}

steerhook_status steerhook_batch_end(steerhook_session *s) {
    steerhook_status status = sh_session_check(s);
    if (status != STEERHOOK_OK) {
        return status;
    }
    if (!s->batch.open) {
        return sh_session_fail(s, STEERHOOK_ORDER, "batch: expected an open one");
    }
    if (s->pending != NULL) {
        return sh_session_fail(s, STEERHOOK_HOOK_LOST,
                               "layer_input[%ld]: asked for, but never delivered",
                               (long)s->pending->depth);
    }
    status = s->batch.idle ? STEERHOOK_OK : check_sites(s);
    for (int32_t i = 0; status == STEERHOOK_OK && i < s->model.n_seq_max; i++) {
        sh_request *request = &s->requests[i];
        if (!request->open || request->batch_count == request->count) {
            continue;
        }
        bool ended = request->count < request->n_prompt &&
                     request->batch_count >= request->n_prompt;
        sh_keep_batch(s, request);
        bool one = request->batch_count == request->count + 1;
        int64_t first = one ? request->batch_count : request->count + 1; /* others may be drafts */
        request->survived = first > request->n_prompt ? first : request->n_prompt;
        request->count = request->batch_count;
        request->ends_in_batch = false;
        status = ended ? check_decided(s, request) : STEERHOOK_OK;
    }
    if (status == STEERHOOK_OK) {
        sh_batch_forget(s);
    }
    return status;
}

steerhook_status steerhook_batch_cancel(steerhook_session *s) {
    steerhook_status status = sh_session_check(s);
    if (status != STEERHOOK_OK) {
        return status;
    }
    bool touched = s->pending != NULL;
    for (int32_t i = 0; i < s->n_sites; i++) {
        touched |= s->sites[i].chunk > 0;
    }
    if (s->batch.open && touched) {
        return sh_session_fail(s, STEERHOOK_HOOK_LOST,
                               "batch: decoding failed after some of its rows were read");
    }
    for (int32_t i = 0; i < s->model.n_seq_max; i++) {
        sh_request *request = &s->requests[i];
        sh_rows_cut(s, &request->cache.rows, request->count, -1);
        if (request->ends_in_batch) { /* it may come in smaller batches */
            bool distrusted = request->distrusted;
            status = sh_request_reopen(s, request, (int32_t)request->count, STEERHOOK_KEEP_HELD);
            if (status != STEERHOOK_OK) {
                return status;
            }
            request->distrusted |= distrusted;
        }
    }
    sh_batch_forget(s);
    return STEERHOOK_OK;
}
