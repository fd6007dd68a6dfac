/* Readings over tokens: the logit of every row in scope, running scores, and where a probe fired.
 *
 * The logits are kept by sequence and row as long as the row is in the cache; everything else
 * follows from them, in the terms of steerbridge/running.py. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "score.h"
#include "tokens.h"

enum { LEAST = 4 }; /* rows that a running score needs, or as many as its window has */

static const sh_token_reading *reading_of(const steerhook_session *s, int32_t k) {
    return &s->package->probes[s->row_probes[k].probe].tokens;
}

/* ---- which rows ---- */

static bool of_kind(const sh_token_reading *reading, sh_row_kind kind) {
    return reading->rows == SH_ALL_ROWS ||
           (kind == SH_IMAGE) == (reading->rows == SH_IMAGE_ROWS);
}

static bool in_prompt(const sh_request *request, int64_t row) {
    return row < request->n_prompt;
}

static bool scope_has(const sh_token_reading *reading, bool prompt) {
    return reading->scope == SH_BOTH || prompt == (reading->scope == SH_PROMPT);
}

/* A row of unknown history may be of any kind. */
static bool in_scope(const sh_token_reading *reading, const sh_request *request, int64_t row) {
    sh_row_kind kind = (sh_row_kind)request->cache.rows.kinds[row];
    return row >= reading->skip && scope_has(reading, in_prompt(request, row)) &&
           (kind == SH_UNKNOWN_ROW || of_kind(reading, kind));
}

bool sh_row_wanted(const steerhook_session *s, const sh_row_site *site, const sh_request *request,
                   int64_t row) {
    const sh_token_reading *reading = reading_of(s, site->probe);
    bool prompt = in_prompt(request, row);
    /* Rows of an answer are a prompt's in a later turn. */
    bool later = !prompt && s->reads_answers && reading->scope == SH_PROMPT;
    if (row == (int64_t)request->n_prompt - 1 && reading->scope != SH_ANSWER) {
        return true; /* it concludes the prompt, whatever kind of row it is */
    }
    return row >= reading->skip && (scope_has(reading, prompt) || later) &&
           of_kind(reading, s->batch.image ? SH_IMAGE : SH_TEXT);
}

/* ---- kept logits ---- */

static bool grow(void **array, int64_t count, size_t size) {
    void *larger = realloc(*array, (size_t)count * size);
    if (larger != NULL) {
        *array = larger;
    }
    return larger != NULL;
}

bool sh_knows_rows(const steerhook_session *s) {
    return s->n_row_probes > 0 || s->listens;
}

bool sh_rows_room(const steerhook_session *s, sh_rows *rows, int64_t need) {
    if (!sh_knows_rows(s) || need <= rows->capacity) {
        return true;
    }
    int64_t capacity = need < 256 ? 256 : need + need / 2;
    size_t width = (size_t)(s->n_row_probes + 1) * sizeof *rows->logits; /* one to spare: not 0 */
    if (capacity > SH_ENDLESS || (size_t)capacity > SIZE_MAX / width) {
        return false;
    }
    void *logits = rows->logits;
    void *kinds = rows->kinds;
    void *ids = rows->ids;
    bool ok = grow(&logits, capacity, width);
    ok = grow(&kinds, capacity, sizeof *rows->kinds) && ok;
    ok = grow(&ids, capacity, sizeof *rows->ids) && ok;
    rows->logits = logits;
    rows->kinds = kinds;
    rows->ids = ids;
    rows->capacity = ok ? (int32_t)capacity : rows->capacity;
    return ok;
}

float *sh_row_logit(const steerhook_session *s, const sh_rows *rows, int64_t row, int32_t k) {
    return &rows->logits[row * s->n_row_probes + k];
}

/* Rows are as good as new: nothing is known of them but their kind and id. */
static void set_row(const steerhook_session *s, sh_rows *rows, int64_t row, sh_row_kind kind,
                    int32_t id) {
    rows->kinds[row] = (unsigned char)kind;
    rows->ids[row] = id;
    for (int32_t k = 0; k < s->n_row_probes; k++) {
        *sh_row_logit(s, rows, row, k) = SH_NO_LOGIT;
    }
}

void sh_rows_announce(const steerhook_session *s, sh_request *request, int64_t row, int32_t id) {
    sh_rows *rows = &request->cache.rows;
    for (; rows->n < row; rows->n++) {
        set_row(s, rows, rows->n, SH_UNKNOWN_ROW, -1);
    }
    set_row(s, rows, row, s->batch.image ? SH_IMAGE : SH_TEXT, id);
    rows->n = (int32_t)row + 1;
}

void sh_rows_cut(const steerhook_session *s, sh_rows *rows, int64_t from, int64_t to) {
    if (from >= rows->n) {
        return;
    }
    if (to < 0 || to >= rows->n) {
        rows->n = (int32_t)from;
    } else if (to > from) {
        size_t moved = (size_t)(rows->n - to);
        memmove(sh_row_logit(s, rows, from, 0), sh_row_logit(s, rows, to, 0),
                moved * (size_t)s->n_row_probes * sizeof *rows->logits);
        memmove(rows->kinds + from, rows->kinds + to, moved * sizeof *rows->kinds);
        memmove(rows->ids + from, rows->ids + to, moved * sizeof *rows->ids);
        rows->n -= (int32_t)(to - from);
    }
}

bool sh_rows_copy(const steerhook_session *s, const sh_rows *from, sh_rows *to) {
    to->n = 0;
    if (from->n == 0) {
        return true;
    }
    if (!sh_rows_room(s, to, from->n)) {
        return false;
    }
    size_t n = (size_t)from->n;
    memcpy(to->logits, from->logits, n * (size_t)s->n_row_probes * sizeof *to->logits);
    memcpy(to->kinds, from->kinds, n * sizeof *to->kinds);
    memcpy(to->ids, from->ids, n * sizeof *to->ids);
    to->n = from->n;
    return true;
}

void sh_rows_free(sh_rows *rows) {
    free(rows->logits);
    free(rows->kinds);
    free(rows->ids);
    *rows = (sh_rows){0};
}

/* ---- running scores ---- */

static double squash(double logit) {
    return 0.5 * (1.0 + tanh(0.5 * logit));
}

/* The mean over the rows in scope that end at `row`, summed from the oldest to the newest; false if
 * there are too few. */
static bool running_score(const steerhook_session *s, const sh_request *request, int32_t k,
                          int64_t row, double *score) {
    const sh_token_reading *reading = reading_of(s, k);
    int32_t n = 0;
    for (int64_t at = row; at >= 0 && n < reading->window; at--) {
        if (in_scope(reading, request, at)) {
            s->window[n++] = (double)*sh_row_logit(s, &request->cache.rows, at, k);
        }
    }
    bool at_end = row == (int64_t)request->n_prompt - 1 && reading->scope != SH_ANSWER;
    int32_t least = reading->window < LEAST ? reading->window : LEAST;
    bool enough = n >= least && in_scope(reading, request, row);
    if (!enough && !(at_end && n > 0 && n < least)) {
        return false;
    }
    double sum = 0.0;
    for (int32_t i = n - 1; i >= 0; i--) {
        sum += s->window[i];
    }
    *score = sum / n;
    return true;
}

static const sh_running nothing = {.best = 0.0, .best_row = SH_NO_ROW, .fired_row = SH_NO_ROW,
                                   .told_row = SH_NO_ROW, .broken_row = SH_NO_ROW,
                                   .unknown_row = SH_NO_ROW};

static void add(const steerhook_session *s, const sh_request *request, int32_t k, int64_t row,
                sh_running *running) {
    const sh_token_reading *reading = reading_of(s, k);
    double score = 0.0;
    if (in_scope(reading, request, row)) {
        float logit = *sh_row_logit(s, &request->cache.rows, row, k);
        if (logit == SH_NO_LOGIT) {
            running->unknown_row = running->unknown_row == SH_NO_ROW ? (int32_t)row
                                                                     : running->unknown_row;
            return;
        }
        if (isnan(logit) && running->broken_row == SH_NO_ROW) {
            running->broken_row = (int32_t)row;
        }
    }
    int32_t p = s->row_probes[k].probe;
    bool judged = running->broken_row == SH_NO_ROW && running->unknown_row == SH_NO_ROW;
    if (judged && running_score(s, request, k, row, &score) &&
        (running->best_row == SH_NO_ROW || score > running->best)) {
        running->best = score;
        running->best_row = (int32_t)row;
    }
    bool fires = !judged || (running->best_row != SH_NO_ROW &&
                             sh_fires(s->package->probes[p].comparator, squash(running->best),
                                      s->thresholds[p]));
    if (fires && running->fired_row == SH_NO_ROW) {
        running->fired_row = running->told_row = (int32_t)row;
    }
}

static sh_running derive(const steerhook_session *s, const sh_request *request, int32_t k,
                         int64_t rows) {
    sh_running running = nothing;
    int64_t known = request->cache.rows.n < rows ? request->cache.rows.n : rows;
    for (int64_t row = 0; row < known; row++) {
        add(s, request, k, row, &running);
    }
    return running;
}

static double score_of(const sh_running *running) {
    bool judged = running->best_row != SH_NO_ROW && running->broken_row == SH_NO_ROW &&
                  running->unknown_row == SH_NO_ROW;
    return judged ? squash(running->best) : (double)NAN;
}

static sh_unjudged reason_of(const sh_running *running) {
    if (running->unknown_row != SH_NO_ROW) {
        return SH_UNKNOWN;
    }
    return running->broken_row != SH_NO_ROW ? SH_NOT_FINITE : SH_JUDGED;
}

/* What the probe says now. One that could not judge the prompt stays so. */
static void conclude(const steerhook_session *s, sh_request *request, int32_t k) {
    const sh_running *running = &request->running[k];
    int32_t p = s->row_probes[k].probe;
    sh_decision *decision = &request->probes[p];
    if (decision->known && decision->unjudged == SH_UNKNOWN) {
        return;
    }
    sh_unjudged why = reason_of(running);
    bool fired = running->fired_row != SH_NO_ROW || why != SH_JUDGED;
    *decision = (sh_decision){true, fired, why, score_of(running), s->thresholds[p]};
}

void sh_running_start(const steerhook_session *s, sh_request *request) {
    for (int32_t k = 0; k < s->n_row_probes; k++) {
        request->running[k] = derive(s, request, k, request->count);
        if (reading_of(s, k)->scope == SH_ANSWER) {
            conclude(s, request, k); /* it has no rows in the prompt */
        }
    }
}

bool sh_rows_known(const steerhook_session *s, const sh_request *request, int32_t p, int64_t rows) {
    const sh_token_reading *reading = &s->package->probes[p].tokens;
    for (int32_t k = 0; k < s->n_row_probes && reading->scope != SH_ANSWER; k++) {
        for (int64_t row = reading->skip; s->row_probes[k].probe == p && row < rows; row++) {
            const sh_rows *kept = &request->cache.rows;
            sh_row_kind kind = row < kept->n ? (sh_row_kind)kept->kinds[row] : SH_UNKNOWN_ROW;
            bool read = kind == SH_UNKNOWN_ROW || of_kind(reading, kind);
            if (read && (kind == SH_UNKNOWN_ROW ||
                         *sh_row_logit(s, kept, row, k) == SH_NO_LOGIT)) {
                return false;
            }
        }
    }
    return true;
}

/* The rows of an open request were cut behind its prompt. */
void sh_running_cut(const steerhook_session *s, sh_request *request, int64_t from) {
    for (int32_t k = 0; k < s->n_row_probes; k++) {
        sh_running *running = &request->running[k];
        bool touched = running->best_row >= from || running->fired_row >= from ||
                       running->broken_row >= from || running->unknown_row >= from;
        if (touched) {
            *running = derive(s, request, k, from);
            conclude(s, request, k);
        }
    }
}

void sh_running_move(sh_running *running, int64_t from, int64_t to) {
    int32_t *rows[] = {&running->best_row, &running->fired_row, &running->broken_row,
                       &running->unknown_row};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        int32_t row = *rows[i];
        if (row != SH_NO_ROW && row >= from) {
            *rows[i] = (int32_t)(row < to ? from : row - (to - from));
        }
    }
}

double sh_running_score(const steerhook_session *s, const sh_request *request, int32_t p,
                        int64_t until) {
    for (int32_t k = 0; k < s->n_row_probes; k++) {
        if (s->row_probes[k].probe == p) {
            const sh_running *now = &request->running[k];
            sh_running then = now->best_row < until && now->fired_row < until &&
                                      now->broken_row < until && now->unknown_row < until
                                  ? *now
                                  : derive(s, request, k, until);
            return score_of(&then);
        }
    }
    return (double)NAN;
}

const sh_running *sh_running_of(const steerhook_session *s, const sh_request *request,
                                int32_t p) {
    for (int32_t k = 0; k < s->n_row_probes; k++) {
        if (s->row_probes[k].probe == p) {
            return &request->running[k];
        }
    }
    return NULL;
}

/* ---- from states to logits ---- */

float *sh_row_sums(const steerhook_session *s, int32_t index) {
    return s->row_sums + (int64_t)index * s->n_row_sums;
}

bool sh_row_sums_room(steerhook_session *s, int32_t rows) {
    if (s->n_row_sums == 0 || rows <= s->row_sums_capacity) {
        return true;
    }
    void *sums = s->row_sums;
    if (!grow(&sums, rows, (size_t)s->n_row_sums * sizeof *s->row_sums)) {
        return false;
    }
    s->row_sums = sums;
    s->row_sums_capacity = rows;
    return true;
}

void sh_rows_sum(const steerhook_session *s, const sh_row_site *site, int32_t index,
                 const float *x, int32_t count) {
    const sh_row_probe *probe = &s->row_probes[site->probe];
    int32_t d = s->package->n_embd;
    for (int32_t i = 0; i < count; i++) {
        float *sums = sh_row_sums(s, index + i) + probe->offset;
        if (site->first) {
            memcpy(sums, probe->bias, (size_t)probe->padded * sizeof *sums);
        }
    }
    for (int32_t i = 0; i < count; i += SH_ROW_BLOCK) {
        int32_t n = count - i < SH_ROW_BLOCK ? count - i : SH_ROW_BLOCK;
        sh_panels(probe->weights[site->site], probe->padded, d, x + (int64_t)i * d, n,
                  sh_row_sums(s, index + i) + probe->offset, s->n_row_sums);
    }
}

/* NaN if the first map or an output is not finite: an activation would hide it. */
static float logit_of(const steerhook_session *s, int32_t k, const float *sums) {
    const sh_row_probe *row_probe = &s->row_probes[k];
    for (int32_t i = 0; i < row_probe->hidden; i++) {
        if (!isfinite(sums[i])) {
            return NAN;
        }
    }
    return sh_row_finish(&s->package->probes[row_probe->probe], sums, s->scratch);
}

/* The logit of a row at the last of the reading's sites, and what follows for its sequences. */
steerhook_status sh_rows_take(steerhook_session *s, const sh_row_site *site, int32_t row,
                              int32_t index) {
    float logit = logit_of(s, site->probe, sh_row_sums(s, index) +
                                               s->row_probes[site->probe].offset);
    steerhook_status status = STEERHOOK_OK;
    for (int32_t m = s->batch.first_member[row];
         status == STEERHOOK_OK && m < s->batch.first_member[row + 1]; m++) {
        const sh_member *member = &s->batch.members[m];
        sh_request *request = &s->requests[member->seq];
        int64_t position = member->position;
        if (!sh_row_wanted(s, site, request, position)) {
            continue;
        }
        *sh_row_logit(s, &request->cache.rows, position, site->probe) = logit;
        add(s, request, site->probe, position, &request->running[site->probe]);
        if (position >= (int64_t)request->n_prompt - 1) {
            conclude(s, request, site->probe);
            status = sh_decide_rules(s, request);
        }
    }
    return status;
}

/* ---- the plan ---- */

static bool pack(steerhook_session *s, sh_row_probe *out, const sh_probe *probe,
                 const sh_error *error) {
    const sh_tensor *weight = probe->type == SH_MLP ? &probe->layers[0].weight : &probe->weight;
    int64_t d = s->package->n_embd;
    out->hidden = (int32_t)weight->rows;
    out->padded = (out->hidden + SH_PANEL - 1) / SH_PANEL * SH_PANEL;
    out->bias = sh_arena_new(&s->arena, (size_t)out->padded, sizeof *out->bias);
    bool ok = out->bias != NULL;
    for (int32_t site = 0; ok && site < probe->tokens.n_sites; site++) {
        out->weights[site] = sh_arena_new(&s->arena, (size_t)(out->padded * d), sizeof(float));
        ok = out->weights[site] != NULL;
    }
    if (!ok) {
        return sh_fail(error, "session", "memory", "none");
    }
    for (int32_t h = 0; h < out->hidden; h++) {
        double bias = probe->type == SH_MLP ? (double)sh_value(&probe->layers[0].bias, 0, h)
                                            : probe->bias;
        for (int64_t i = 0; i < weight->cols; i++) {
            double w = (double)sh_value(weight, h, i);
            w = probe->scale.data != NULL ? w / (double)sh_value(&probe->scale, 0, i) : w;
            bias -= probe->mean.data != NULL ? w * (double)sh_value(&probe->mean, 0, i) : 0.0;
            float *panel = out->weights[i / d] + (h / SH_PANEL) * d * SH_PANEL;
            panel[i % d * SH_PANEL + h % SH_PANEL] = (float)w;
        }
        out->bias[h] = (float)bias;
    }
    return true;
}

bool sh_plan_rows(steerhook_session *s, const sh_error *error) {
    const steerhook_package *package = s->package;
    int32_t longest = 1;
    for (int32_t p = 0; p < package->n_probes; p++) {
        s->n_row_probes += package->probes[p].tokens.n_sites > 0;
    }
    s->row_probes = sh_arena_new(&s->arena, (size_t)s->n_row_probes + 1, sizeof *s->row_probes);
    if (s->row_probes == NULL) {
        return sh_fail(error, "session", "memory", "none");
    }
    for (int32_t p = 0, k = 0; p < package->n_probes; p++) {
        const sh_probe *probe = &package->probes[p];
        if (probe->tokens.n_sites == 0) {
            continue;
        }
        sh_row_probe *out = &s->row_probes[k++];
        out->probe = p;
        out->offset = s->n_row_sums;
        if (!pack(s, out, probe, error)) {
            return false;
        }
        s->n_row_sums += out->padded;
        longest = probe->tokens.window > longest ? probe->tokens.window : longest;
    }
    s->window = sh_arena_new(&s->arena, (size_t)longest, sizeof *s->window);
    return s->window != NULL || sh_fail(error, "session", "memory", "none");
}
