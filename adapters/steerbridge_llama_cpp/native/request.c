/* Requests: their begin and end, and the decisions that hold for them. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tokens.h"

const sh_reading *sh_reading_of(const steerhook_session *s, const sh_read *read) {
    return &s->package->probes[read->probe].readings[read->reading];
}

bool sh_wants(const steerhook_session *s, const sh_read *read, const sh_request *request,
              int64_t position) {
    int64_t end = (int64_t)request->n_prompt - 1;
    if (position > end) {
        return false;
    }
    const sh_reading *reading = sh_reading_of(s, read);
    switch (reading->position) {
    case SH_PROMPT_END: return position == end + reading->offset;
    case SH_PROMPT_MEAN: return true;
    case SH_IMAGE_MEAN: break;
    }
    return s->batch.image || position == end; /* the prompt end completes it, image or not */
}

/* ---- begin, copy, end ---- */

/* Zeroed memory for at least one item, kept for the later requests of the sequence. */
static void *fresh(void *old, size_t count, size_t size) {
    size_t bytes = (count > 0 ? count : 1) * size;
    void *memory = old != NULL ? old : malloc(bytes);
    if (memory != NULL) {
        memset(memory, 0, bytes);
    }
    return memory;
}

bool sh_request_reset(const steerhook_session *s, sh_request *request) {
    size_t slots = (size_t)s->n_slots;
    size_t width = (size_t)s->package->n_embd;
    request->values = fresh(request->values, slots * width, sizeof *request->values);
    request->progress = fresh(request->progress, slots, sizeof *request->progress);
    request->probes = fresh(request->probes, (size_t)s->package->n_probes,
                            sizeof *request->probes);
    request->rules = fresh(request->rules, (size_t)s->package->n_rules, sizeof *request->rules);
    request->running = fresh(request->running, (size_t)s->n_row_probes, sizeof *request->running);
    return request->running != NULL && request->values != NULL && request->progress != NULL && request->probes != NULL &&
           request->rules != NULL;
}

steerhook_status sh_may_change(steerhook_session *s, int32_t seq) {
    steerhook_status status = sh_session_check(s);
    if (status != STEERHOOK_OK) {
        return status;
    }
    if (seq < 0 || seq >= s->model.n_seq_max) {
        return sh_session_refuse(s, STEERHOOK_SEQUENCE, "sequence: expected 0 to %ld, found %ld",
                                 (long)s->model.n_seq_max - 1, (long)seq);
    }
    if (s->batch.open) {
        return sh_session_refuse(s, STEERHOOK_ORDER, "request: expected no open batch");
    }
    return STEERHOOK_OK;
}

int64_t sh_first_row(const sh_reading *reading, int64_t n_prompt) {
    return reading->position == SH_PROMPT_END ? n_prompt - 1 + reading->offset : 0;
}

/* Where a reading has a row of a prompt that a batch or the cache brings, or does not. */
typedef enum { BEFORE_PROMPT, EVALUATED, KEPT, LOST } place;

static place place_of(const steerhook_session *s, const sh_request *request, int32_t slot,
                      const sh_reading *reading, int64_t n_prompt) {
    int64_t row = sh_first_row(reading, n_prompt);
    if (row < 0) {
        return BEFORE_PROMPT;
    }
    bool all = reading->position != SH_PROMPT_END;
    /* Without its length, rows of a prompt that came in earlier batches are over. */
    int64_t over = request->by_batches && !all ? request->count : request->n_cached;
    if (row >= over) {
        return EVALUATED;
    }
    int64_t needed = all ? request->n_cached : row + 1;
    return s->keeps && s->kept_of[slot] >= 0 && request->cache.n_kept >= needed ? KEPT : LOST;
}

/* Whether no reading needs a row that is cached. One that needs a row before the prompt makes its
 * probe fire, see fire_unjudged. */
static steerhook_status check_readings(steerhook_session *s, const sh_request *request,
                                       int64_t n_prompt) {
    for (int32_t p = 0; p < s->package->n_probes; p++) {
        const sh_probe *probe = &s->package->probes[p];
        for (int32_t k = 0; k < probe->n_readings; k++) {
            const sh_reading *reading = &probe->readings[k];
            if (place_of(s, request, s->first_slot[p] + k, reading, n_prompt) == LOST) {
                return sh_session_refuse(s, STEERHOOK_CACHED,
                                         "probe %s: expected row %ld evaluated, found %ld cached",
                                         probe->id, (long)sh_first_row(reading, n_prompt),
                                         (long)request->n_cached);
            }
        }
        if (probe->tokens.n_sites > 0 && !sh_rows_known(s, request, p, request->n_cached)) {
            return sh_session_refuse(s, STEERHOOK_CACHED,
                                     "probe %s: expected rows evaluated, found %ld cached",
                                     probe->id, (long)request->n_cached);
        }
    }
    return STEERHOOK_OK;
}

/* Why a probe cannot judge the prompt, as far as that is known when its end is. */
static sh_unjudged unjudged(const steerhook_session *s, const sh_request *request, int32_t p) {
    const sh_probe *probe = &s->package->probes[p];
    for (int32_t k = 0; k < probe->n_readings; k++) {
        const sh_reading *reading = &probe->readings[k];
        int32_t slot = s->first_slot[p] + k;
        place found = place_of(s, request, slot, reading, request->n_prompt);
        if (found == BEFORE_PROMPT) {
            return SH_TOO_SHORT;
        }
        bool earlier = reading->position != SH_PROMPT_END || reading->offset < 0;
        bool outputs_only = s->sites[s->site_at[reading->depth]].outputs_only;
        if (found == LOST || request->distrusted ||
            (request->by_batches && request->cache.unseen && earlier && outputs_only)) {
            return SH_UNKNOWN;
        }
    }
    bool reads_rows = probe->tokens.n_sites > 0;
    if (reads_rows && (request->distrusted || !sh_rows_known(s, request, p, request->n_cached))) {
        return SH_UNKNOWN;
    }
    return SH_JUDGED;
}

/* A probe that cannot judge the prompt fires. */
static steerhook_status fire_unjudged(steerhook_session *s, sh_request *request) {
    bool any = false;
    for (int32_t p = 0; p < s->package->n_probes; p++) {
        sh_unjudged why = unjudged(s, request, p);
        if (why != SH_JUDGED) {
            request->probes[p] = (sh_decision){true, true, why, NAN, s->thresholds[p]};
            any = true;
        }
    }
    return any ? sh_decide_rules(s, request) : STEERHOOK_OK;
}

/* ---- begin ---- */

static void start(steerhook_session *s, sh_request *request, int32_t n_cached, int32_t n_prompt) {
    request->open = true;
    request->open_ended = n_prompt == SH_ENDLESS;
    request->ends_in_batch = request->distrusted = false;
    request->n_cached = n_cached;
    request->n_prompt = n_prompt;
    request->count = request->batch_count = n_cached;
    request->last_row = request->end_row = -1;
    request->cache.n_kept = request->cache.n_kept < n_cached ? request->cache.n_kept : n_cached;
    request->survived = n_cached;
    sh_rows_cut(s, &request->cache.rows, n_cached, -1);
    sh_kept_sums(s, request);
    sh_running_start(s, request);
}

static steerhook_status begin(steerhook_session *s, sh_request *request, int32_t n_cached,
                              int32_t n_prompt) {
    if (n_cached < 0 || n_cached >= n_prompt) {
        return sh_session_refuse(s, STEERHOOK_PROMPT,
                                 "prompt: expected a row to evaluate, found %ld of %ld cached",
                                 (long)n_cached, (long)n_prompt);
    }
    request->n_cached = n_cached;
    request->by_batches = false;
    steerhook_status status = check_readings(s, request, n_prompt);
    if (status != STEERHOOK_OK) {
        return status;
    }
    if (request->cache.first_steered != SH_NO_ROW && n_cached > request->cache.first_steered) {
        return sh_session_refuse(s, STEERHOOK_STEERED,
                                 "prompt: expected %ld cached rows at most, found %ld; later ones "
                                 "were steered for another prompt",
                                 (long)request->cache.first_steered, (long)n_cached);
    }
    request->cache.first_steered = SH_NO_ROW;
    start(s, request, n_cached, n_prompt);
    status = sh_kept_ends(s, request);
    status = status == STEERHOOK_OK ? sh_decide_rules(s, request) : status;
    return status == STEERHOOK_OK ? fire_unjudged(s, request) : status;
}

steerhook_status steerhook_request_begin(steerhook_session *s, int32_t seq, int32_t n_cached,
                                         int32_t n_prompt) {
    steerhook_status status = sh_may_change(s, seq);
    if (status != STEERHOOK_OK) {
        return status;
    }
    sh_request *request = &s->requests[seq];
    request->open = request->acting = false; /* also if refused: the old request is over */
    if (!sh_request_reset(s, request)) {
        return sh_session_refuse(s, STEERHOOK_MEMORY, "request: no memory");
    }
    return begin(s, request, n_cached, n_prompt);
}

/* ---- requests that are known by their batches ---- */

steerhook_status sh_request_reopen(steerhook_session *s, sh_request *request, int32_t n_cached,
                                   steerhook_keep keep) {
    bool had = keep != STEERHOOK_KEEP_NONE && request->open && request->rules != NULL;
    size_t bytes = (size_t)s->package->n_rules * sizeof *request->rules;
    sh_rule_state *before = had ? malloc(bytes + 1) : NULL;
    if (before != NULL) {
        memcpy(before, request->rules, bytes);
    }
    request->open = request->acting = false;
    if ((had && before == NULL) || !sh_request_reset(s, request)) {
        free(before);
        return sh_session_refuse(s, STEERHOOK_MEMORY, "request: no memory");
    }
    for (int32_t r = 0; before != NULL && r < s->package->n_rules; r++) {
        bool fired = s->package->rules[r].conditional && before[r].decided && before[r].fired;
        if (fired && (keep == STEERHOOK_KEEP_FIRED || before[r].held)) {
            request->rules[r] = before[r];
            request->rules[r].held = request->acting = true;
            request->rules[r].begin = SH_NO_ROW; /* at the prompt's end */
        }
    }
    free(before);
    request->by_batches = true;
    if (n_cached == 0) {
        request->cache.unseen = false;
    }
    start(s, request, n_cached, SH_ENDLESS);
    if (request->cache.first_steered != SH_NO_ROW && n_cached > request->cache.first_steered) {
        request->distrusted = true; /* its rows attend to some that were steered */
    } else {
        request->cache.first_steered = SH_NO_ROW;
    }
    return sh_decide_rules(s, request);
}

steerhook_status steerhook_request_open(steerhook_session *s, int32_t seq, int32_t n_cached,
                                        steerhook_keep keep) {
    steerhook_status status = sh_may_change(s, seq);
    if (status != STEERHOOK_OK) {
        return status;
    }
    if (n_cached < 0) {
        return sh_session_refuse(s, STEERHOOK_ARGUMENT, "request: expected cached rows, found %ld",
                                 (long)n_cached);
    }
    return sh_request_reopen(s, &s->requests[seq], n_cached, keep);
}

steerhook_status steerhook_request_distrust(steerhook_session *s, int32_t seq) {
    steerhook_status status = sh_may_change(s, seq);
    if (status != STEERHOOK_OK) {
        return status;
    }
    sh_request *request = &s->requests[seq];
    if (!request->open || !request->open_ended) {
        return sh_session_refuse(s, STEERHOOK_NO_REQUEST,
                                 "distrust: no open prompt on sequence %ld", (long)seq);
    }
    request->distrusted = true;
    return STEERHOOK_OK;
}

steerhook_status sh_request_end_prompt(steerhook_session *s, sh_request *request) {
    request->n_prompt = (int32_t)request->batch_count;
    request->open_ended = false;
    request->ends_in_batch = true;
    steerhook_status status = fire_unjudged(s, request);
    status = status == STEERHOOK_OK ? sh_decide_rules(s, request) : status;
    return status == STEERHOOK_OK ? sh_kept_ends(s, request) : status;
}

int32_t steerhook_request_rows(const steerhook_session *s, int32_t seq, int32_t *n_prompt) {
    bool known = steerhook_request_stage(s, seq) != STEERHOOK_NONE;
    if (n_prompt != NULL) {
        bool judged = known && !s->requests[seq].open_ended;
        *n_prompt = judged ? s->requests[seq].n_prompt : 0;
    }
    return known ? (int32_t)s->requests[seq].count : 0;
}

void steerhook_request_survived(steerhook_session *s, int32_t seq, int32_t rows) {
    if (s == NULL || seq < 0 || seq >= s->model.n_seq_max) {
        return;
    }
    sh_request *request = &s->requests[seq];
    int64_t stay = rows < 0 || rows > request->count ? request->count : rows;
    request->survived = stay > request->survived ? stay : request->survived;
}

steerhook_stage steerhook_request_stage(const steerhook_session *s, int32_t seq) {
    if (s == NULL || seq < 0 || seq >= s->model.n_seq_max || !s->requests[seq].open) {
        return STEERHOOK_NONE;
    }
    const sh_request *request = &s->requests[seq];
    return request->count < request->n_prompt ? STEERHOOK_PROMPTING : STEERHOOK_ANSWERING;
}

void sh_forget_rows(const steerhook_session *s, sh_request *request, int32_t first) {
    int32_t steered = request->cache.first_steered;
    request->open = request->acting = false;
    sh_kept_cut(s, request, first, -1);
    sh_rows_cut(s, &request->cache.rows, first, -1);
    if (!steerhook_package_describe(s->package).steers_layers) {
        request->cache.first_steered = SH_NO_ROW;
    } else if (steered == SH_NO_ROW || steered > first) {
        request->cache.first_steered = first;
    }
}

steerhook_status steerhook_rows_restored(steerhook_session *s, int32_t seq, int32_t first) {
    steerhook_status status = sh_may_change(s, seq);
    if (status == STEERHOOK_OK) {
        sh_forget_rows(s, &s->requests[seq], first < 0 ? 0 : first);
    }
    return status;
}

/* The cache of a sequence got rows of another one, steered from `first_steered` on. */
static void add_steered_rows(sh_request *request, int32_t first_steered) {
    bool before = request->cache.first_steered == SH_NO_ROW || first_steered < request->cache.first_steered;
    if (first_steered != SH_NO_ROW && before) {
        request->cache.first_steered = first_steered;
    }
}

steerhook_status steerhook_request_copy(steerhook_session *s, int32_t from, int32_t to) {
    steerhook_status status = sh_may_change(s, from);
    status = status == STEERHOOK_OK ? sh_may_change(s, to) : status;
    if (status != STEERHOOK_OK || from == to) {
        return status;
    }
    const sh_request *source = &s->requests[from];
    sh_request *target = &s->requests[to];
    target->open = target->acting = false;
    add_steered_rows(target, source->cache.first_steered); /* it may hold steered rows of its own */
    if (!sh_kept_copy(s, source, target) ||
        !sh_rows_copy(s, &source->cache.rows, &target->cache.rows)) {
        return sh_session_refuse(s, STEERHOOK_MEMORY, "copy: no memory");
    }
    if (!source->open) {
        return sh_session_refuse(s, STEERHOOK_NO_REQUEST, "copy: no open request on sequence %ld",
                                 (long)from);
    }
    if (!sh_request_reset(s, target)) {
        return sh_session_refuse(s, STEERHOOK_MEMORY, "request: no memory");
    }
    sh_request copy = *source;
    copy.cache = target->cache;
    copy.cache.unseen = source->cache.unseen;
    size_t slots = (size_t)s->n_slots;
    copy.values = target->values;
    copy.progress = target->progress;
    copy.probes = target->probes;
    copy.rules = target->rules;
    copy.running = target->running;
    memcpy(copy.running, source->running, (size_t)s->n_row_probes * sizeof *copy.running);
    memcpy(copy.values, source->values,
           slots * (size_t)s->package->n_embd * sizeof *copy.values);
    memcpy(copy.progress, source->progress, slots * sizeof *copy.progress);
    memcpy(copy.probes, source->probes, (size_t)s->package->n_probes * sizeof *copy.probes);
    memcpy(copy.rules, source->rules, (size_t)s->package->n_rules * sizeof *copy.rules);
    *target = copy;
    return STEERHOOK_OK;
}

/* The number of a row after others were removed, or of the first behind them if it was among them;
 * SH_NO_ROW if there is none. */
static int32_t moved(int32_t row, int64_t from, int64_t to) {
    if (row == SH_NO_ROW || row < from) {
        return row;
    }
    if (to < 0) {
        return SH_NO_ROW;
    }
    return (int32_t)(row < to ? from : row - (to - from));
}

/* Rows left the middle of a request: what was found in those behind them stays, at other places. */
static void move_rows(const steerhook_session *s, sh_request *request, int64_t from, int64_t to) {
    for (int32_t k = 0; k < s->n_row_probes; k++) {
        sh_running_move(&request->running[k], from, to);
    }
    for (int32_t r = 0; r < s->package->n_rules; r++) {
        request->rules[r].begin = moved(request->rules[r].begin, from, to);
    }
}

static void cut(steerhook_session *s, sh_request *request, int64_t from, int64_t to) {
    sh_kept_cut(s, request, from, to);
    sh_rows_cut(s, &request->cache.rows, from, to);
    request->cache.unseen = request->cache.unseen && (from > 0 || to >= 0);
    request->cache.first_steered = moved(request->cache.first_steered, from, to);
    bool tail = to < 0 || to >= request->count;
    if (!request->open || from >= request->count || (!tail && to <= from)) {
        return;
    }
    bool judged = !request->open_ended && request->count >= request->n_prompt;
    if (!judged || (tail && from < request->n_prompt)) {
        request->open = request->acting = false;
        return;
    }
    int64_t removed_to = tail ? request->count : to;
    if (!tail) {
        move_rows(s, request, from, to);
    }
    if (from < request->n_prompt) { /* a context shift: the answer goes on */
        int64_t in_prompt = removed_to < request->n_prompt ? removed_to : request->n_prompt;
        request->n_prompt -= (int32_t)(in_prompt - from);
    }
    request->count -= removed_to - from;
    request->batch_count = request->count;
    request->survived = request->count; /* what was rejected is gone */
    if (tail && s->n_row_probes > 0) {
        sh_running_cut(s, request, from);
        sh_decide_rules(s, request); /* of strengths that were checked before */
    }
}

steerhook_status steerhook_request_cut(steerhook_session *s, int32_t seq, int32_t from,
                                       int32_t to) {
    steerhook_status status = sh_may_change(s, seq < 0 ? 0 : seq);
    if (status != STEERHOOK_OK) {
        return status;
    }
    for (int32_t i = seq < 0 ? 0 : seq; i < (seq < 0 ? s->model.n_seq_max : seq + 1); i++) {
        cut(s, &s->requests[i], from < 0 ? 0 : from, to);
    }
    return STEERHOOK_OK;
}

steerhook_status steerhook_request_end(steerhook_session *s, int32_t seq) {
    steerhook_status status = sh_may_change(s, seq);
    if (status == STEERHOOK_OK) {
        s->requests[seq].open = s->requests[seq].acting = false;
    }
    return status;
}
