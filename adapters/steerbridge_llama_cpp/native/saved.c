/* Requests as bytes: what is known of the rows of a sequence leaves the session with a saved state,
 * and comes back with it. The layout is this build's own. */
#include <math.h>
#include <string.h>

#include "tokens.h"

typedef struct {
    char magic[8];
    int32_t n_embd, n_slots, n_probes, n_rules, n_kept_readings, n_row_probes; /* of the session */
    int32_t n_rows;
    int32_t n_kept, with_rows, first_steered;
    int32_t open, acting, open_ended, by_batches, distrusted, unseen;
    int32_t n_cached, n_prompt;
    int64_t count;
} header;

static const char magic[8] = "SBROWS2";

/* Writes, reads or only counts what it is led over. */
typedef struct {
    enum { COUNT, WRITE, READ } mode;
    unsigned char *out;
    const unsigned char *in;
    size_t at;
} walk;

static void over(walk *w, void *data, size_t count, size_t size) {
    size_t bytes = count * size;
    if (w->mode == WRITE && bytes > 0) {
        memcpy(w->out + w->at, data, bytes);
    } else if (w->mode == READ && bytes > 0) {
        memcpy(data, w->in + w->at, bytes);
    }
    w->at += bytes;
}

static header header_of(const steerhook_session *s, const sh_request *request, bool rows) {
    header h = {
        .n_embd = s->package->n_embd,
        .n_slots = s->n_slots,
        .n_probes = s->package->n_probes,
        .n_rules = s->package->n_rules,
        .n_kept_readings = s->keeps ? s->n_kept_readings : 0,
        .n_kept = s->keeps ? request->cache.n_kept : 0,
        .n_row_probes = s->n_row_probes,
        .n_rows = request->cache.rows.n,
        .with_rows = rows,
        .first_steered = request->cache.first_steered,
        .open = request->open,
        .acting = request->acting,
        .open_ended = request->open_ended,
        .by_batches = request->by_batches,
        .distrusted = request->distrusted,
        .unseen = request->cache.unseen,
        .n_cached = request->n_cached,
        .n_prompt = request->n_prompt,
        .count = request->count,
    };
    memcpy(h.magic, magic, sizeof magic);
    return h;
}

static void over_request(walk *w, const steerhook_session *s, sh_request *request, bool rows) {
    size_t slots = (size_t)s->n_slots, d = (size_t)s->package->n_embd;
    if (request->open) {
        over(w, request->values, slots * d, sizeof *request->values);
        over(w, request->progress, slots, sizeof *request->progress);
        over(w, request->probes, (size_t)s->package->n_probes, sizeof *request->probes);
        over(w, request->rules, (size_t)s->package->n_rules, sizeof *request->rules);
        over(w, request->running, (size_t)s->n_row_probes, sizeof *request->running);
    }
    if (rows && sh_knows_rows(s)) {
        size_t n = (size_t)request->cache.rows.n;
        over(w, request->cache.rows.logits, n * (size_t)s->n_row_probes, sizeof(float));
        over(w, request->cache.rows.kinds, n, sizeof *request->cache.rows.kinds);
        over(w, request->cache.rows.ids, n, sizeof *request->cache.rows.ids);
    }
    if (rows && s->keeps) {
        size_t n = (size_t)request->cache.n_kept;
        over(w, request->cache.kept, n * (size_t)s->n_kept_readings * d, sizeof *request->cache.kept);
        over(w, request->cache.kept_image, n, sizeof *request->cache.kept_image);
    }
}

static bool has(const steerhook_session *s, int32_t seq) {
    return s != NULL && seq >= 0 && seq < s->model.n_seq_max;
}

size_t steerhook_saved_size(const steerhook_session *s, int32_t seq, bool rows) {
    if (!has(s, seq)) {
        return 0;
    }
    walk w = {.mode = COUNT, .at = sizeof(header)};
    sh_request request = s->requests[seq];
    over_request(&w, s, &request, rows);
    return w.at;
}

steerhook_status steerhook_save(steerhook_session *s, int32_t seq, bool rows, void *bytes,
                                size_t size) {
    steerhook_status status = sh_may_change(s, seq);
    if (status != STEERHOOK_OK) {
        return status;
    }
    size_t expected = steerhook_saved_size(s, seq, rows);
    if (bytes == NULL || size != expected) {
        return sh_session_refuse(s, STEERHOOK_ARGUMENT, "save: expected %lu bytes, found %lu",
                                 (unsigned long)expected, (unsigned long)size);
    }
    walk w = {.mode = WRITE, .out = bytes};
    header h = header_of(s, &s->requests[seq], rows);
    over(&w, &h, 1, sizeof h);
    over_request(&w, s, &s->requests[seq], rows);
    return STEERHOOK_OK;
}

static bool flag(int32_t value) {
    return value == 0 || value == 1;
}

/* Whether a header can be one of this session's. */
static bool plausible(const steerhook_session *s, const header *h) {
    header own = header_of(s, &s->requests[0], false);
    bool fits = memcmp(h->magic, magic, sizeof magic) == 0 && h->n_embd == own.n_embd &&
                h->n_slots == own.n_slots && h->n_probes == own.n_probes &&
                h->n_rules == own.n_rules && h->n_kept_readings == own.n_kept_readings &&
                h->n_row_probes == own.n_row_probes;
    bool flags = flag(h->with_rows) && flag(h->open) && flag(h->acting) && flag(h->open_ended) &&
                 flag(h->by_batches) && flag(h->distrusted) && flag(h->unseen);
    bool counts = h->n_kept >= 0 && h->first_steered >= SH_NO_ROW && h->n_cached >= 0 &&
                  h->n_prompt >= 0 && h->count >= 0 && h->count < SH_ENDLESS &&
                  (h->n_kept_readings > 0 || h->n_kept == 0) && h->n_rows >= 0 &&
                  h->n_rows < SH_ENDLESS && (sh_knows_rows(s) || h->n_rows == 0) &&
                  (h->open_ended == 0) == (h->n_prompt < SH_ENDLESS);
    return fits && flags && counts;
}

/* How many bytes follow a plausible header; 0 if that is no number. */
static size_t body_of(const steerhook_session *s, const header *h) {
    size_t row = (size_t)h->n_kept_readings * (size_t)h->n_embd * sizeof(float) + sizeof(bool);
    size_t known = (size_t)h->n_row_probes * sizeof(float) + sizeof(unsigned char) + sizeof(int32_t);
    bool rows = h->with_rows != 0;
    if ((size_t)h->n_kept > SIZE_MAX / 4 / row || (size_t)h->n_rows > SIZE_MAX / 4 / known) {
        return 0;
    }
    walk w = {.mode = COUNT};
    sh_request closed = {.open = h->open != 0};
    over_request(&w, s, &closed, false);
    w.at += rows && s->keeps ? (size_t)h->n_kept * row : 0;
    return w.at + (rows && sh_knows_rows(s) ? (size_t)h->n_rows * known : 0);
}

/* Whether a byte of another writer can be read as a bool. */
static bool is_bool(const bool *value) {
    unsigned char byte;
    memcpy(&byte, value, 1);
    return byte <= 1;
}

/* Values that are no plain numbers must be what the session would have written. */
static bool sane(const steerhook_session *s, const sh_request *request) {
    bool good = true;
    for (int32_t i = 0; i < s->n_slots; i++) {
        good &= request->progress[i].rows >= 0 && is_bool(&request->progress[i].complete);
    }
    for (int32_t p = 0; p < s->package->n_probes; p++) {
        const sh_decision *decision = &request->probes[p];
        int why = (int)decision->unjudged;
        good &= is_bool(&decision->known) && is_bool(&decision->fired) && why >= SH_JUDGED &&
                why <= SH_UNKNOWN;
    }
    for (int32_t r = 0; r < s->package->n_rules; r++) {
        const sh_rule_state *state = &request->rules[r];
        good &= is_bool(&state->decided) && is_bool(&state->fired) && is_bool(&state->held) &&
                isfinite(state->strength) != 0;
    }
    for (int32_t k = 0; k < s->n_row_probes; k++) {
        const sh_running *running = &request->running[k];
        const int32_t rows[] = {running->best_row, running->fired_row, running->broken_row,
                                running->unknown_row, running->told_row};
        for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
            good &= rows[i] >= SH_NO_ROW;
        }
    }
    return good;
}

static steerhook_status refuse(steerhook_session *s, sh_request *request) {
    sh_forget_rows(s, request, 0);
    return sh_session_refuse(s, STEERHOOK_ARGUMENT,
                             "load: expected rows that a session of this package saved");
}

steerhook_status steerhook_load(steerhook_session *s, int32_t seq, const void *bytes,
                                size_t size) {
    steerhook_status status = sh_may_change(s, seq);
    if (status != STEERHOOK_OK) {
        return status;
    }
    sh_request *request = &s->requests[seq];
    header h;
    if (bytes == NULL || size < sizeof h) {
        return refuse(s, request);
    }
    memcpy(&h, bytes, sizeof h);
    if (!plausible(s, &h) || size - sizeof h != body_of(s, &h)) {
        return refuse(s, request);
    }
    bool rows = h.with_rows != 0;
    if ((h.open != 0 && !sh_request_reset(s, request)) ||
        (rows && (!sh_kept_room(s, request, h.n_kept) ||
                  !sh_rows_room(s, &request->cache.rows, h.n_rows)))) {
        return sh_session_refuse(s, STEERHOOK_MEMORY, "load: no memory");
    }
    int32_t live = request->cache.first_steered; /* of rows that stay */
    bool stays = !rows && live != SH_NO_ROW && live < h.count;
    bool sooner = stays && (h.first_steered == SH_NO_ROW || live < h.first_steered);
    request->cache.first_steered = sooner ? live : h.first_steered;
    request->cache.n_kept = rows || h.n_kept < request->cache.n_kept ? h.n_kept : request->cache.n_kept;
    request->cache.unseen = h.unseen != 0 || (!rows && request->cache.unseen);
    request->cache.rows.n = rows || h.n_rows < request->cache.rows.n ? h.n_rows
                                                                    : request->cache.rows.n;
    request->open = h.open != 0;
    walk w = {.mode = READ, .in = bytes, .at = sizeof h};
    over_request(&w, s, request, rows);
    bool images = true;
    for (int32_t i = 0; rows && i < h.n_kept; i++) {
        images &= is_bool(&request->cache.kept_image[i]);
    }
    for (int32_t i = 0; rows && i < h.n_rows; i++) {
        images &= request->cache.rows.kinds[i] <= SH_IMAGE;
    }
    if (!images || (request->open && !sane(s, request))) {
        return refuse(s, request);
    }
    request->acting = h.acting != 0;
    request->open_ended = h.open_ended != 0;
    request->by_batches = h.by_batches != 0;
    request->distrusted = h.distrusted != 0;
    request->n_cached = h.n_cached;
    request->n_prompt = h.n_prompt;
    request->count = request->batch_count = request->survived = h.count;
    request->ends_in_batch = false;
    request->last_row = request->end_row = -1;
    return STEERHOOK_OK;
}
