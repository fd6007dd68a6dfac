#include "tokens.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_SEQUENCES = 1 << 16, MAX_LAYERS = 1 << 16 };

const char *steerhook_status_name(steerhook_status status) {
    static const char *const names[] = {
        "OK",         "ARGUMENT", "MEMORY",    "MODEL",      "SITE",
        "SEQUENCE",   "NO_REQUEST", "CACHED",  "STEERED",    "PROMPT",
        "NO_OUTPUT",  "SHARED_ROW", "ROWS",     "HOOK_LOST", "STRENGTH",   "ORDER"};
    size_t index = (size_t)status;
    return index < sizeof names / sizeof *names ? names[index] : "UNKNOWN";
}

/* ---- errors ---- */

steerhook_status sh_session_check(const steerhook_session *s) {
    return s == NULL ? STEERHOOK_ARGUMENT : s->status;
}

steerhook_status sh_session_refuse(steerhook_session *s, steerhook_status status,
                                   const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(s->error, sizeof s->error, format, arguments);
    va_end(arguments);
    return status;
}

steerhook_status sh_session_fail(steerhook_session *s, steerhook_status status,
                                 const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(s->error, sizeof s->error, format, arguments);
    va_end(arguments);
    s->status = status;
    return status;
}

steerhook_status steerhook_session_status(const steerhook_session *s) {
    return sh_session_check(s);
}

const char *steerhook_session_error(const steerhook_session *s) {
    return s == NULL ? "no session" : s->error;
}

/* ---- create, clear, free ---- */

static bool check_model(const steerhook_package *package, const steerhook_model *model,
                        const sh_error *error) {
    if (model->n_embd != package->n_embd) {
        return sh_fail(error, "n_embd", "the package's width", "%ld, not %ld",
                       (long)model->n_embd, (long)package->n_embd);
    }
    if (model->n_layer != package->n_layer || model->n_layer > MAX_LAYERS) {
        return sh_fail(error, "n_layer", "the package's depth", "%ld, not %ld",
                       (long)model->n_layer, (long)package->n_layer);
    }
    if (model->n_ubatch < 1) {
        return sh_fail(error, "n_ubatch", "1 or more", "%ld", (long)model->n_ubatch);
    }
    return (model->n_seq_max >= 1 && model->n_seq_max <= MAX_SEQUENCES) ||
           sh_fail(error, "n_seq_max", "1 to 65536", "%ld", (long)model->n_seq_max);
}

steerhook_session *steerhook_session_new(const steerhook_package *package,
                                         const steerhook_model *model, const steerhook_ggml *ggml,
                                         char *error, size_t error_size) {
    sh_error to = {error, error_size};
    if (package == NULL || model == NULL || ggml == NULL || ggml->get_name == NULL ||
        ggml->nbytes == NULL || ggml->tensor_get == NULL || ggml->tensor_set == NULL) {
        sh_fail(&to, "session", "a package, a model and four functions", "NULL");
        return NULL;
    }
    if (!check_model(package, model, &to)) {
        return NULL;
    }
    steerhook_session *s = calloc(1, sizeof *s);
    if (s == NULL) {
        sh_fail(&to, "session", "memory", "none");
        return NULL;
    }
    s->package = package;
    s->model = *model;
    s->ggml = *ggml;
    sh_package_share(package);
    if (!sh_plan(s, &to)) {
        steerhook_session_free(s);
        return NULL;
    }
    s->model.architecture = NULL;
    return s;
}

static void free_request(sh_request *request) {
    free(request->values);
    free(request->progress);
    free(request->probes);
    free(request->rules);
    free(request->running);
    sh_rows_free(&request->cache.rows);
    free(request->cache.kept);
    free(request->cache.kept_image);
}

void steerhook_session_free(steerhook_session *s) {
    if (s == NULL) {
        return;
    }
    for (int32_t i = 0; s->requests != NULL && i < s->model.n_seq_max; i++) {
        free_request(&s->requests[i]);
    }
    free(s->row_sums);
    free(s->batch.first_member);
    free(s->batch.outputs);
    free(s->batch.pass);
    free(s->batch.pass_outputs);
    free(s->batch.is_output);
    free(s->batch.members);
    sh_arena_free(&s->arena);
    steerhook_package_free((steerhook_package *)(uintptr_t)s->package);
    free(s);
}

steerhook_status steerhook_session_clear(steerhook_session *s) {
    if (s == NULL) {
        return STEERHOOK_ARGUMENT;
    }
    sh_batch_forget(s);
    for (int32_t i = 0; i < s->model.n_seq_max; i++) {
        sh_request *request = &s->requests[i];
        request->open = request->acting = false;
        request->cache.first_steered = SH_NO_ROW;
        request->cache.n_kept = request->cache.rows.n = 0;
        if (request->probes != NULL) {
            memset(request->probes, 0, (size_t)s->package->n_probes * sizeof *request->probes);
            memset(request->rules, 0, (size_t)s->package->n_rules * sizeof *request->rules);
        }
    }
    s->status = STEERHOOK_OK;
    s->error[0] = '\0';
    return STEERHOOK_OK;
}

/* ---- settings ---- */

steerhook_status steerhook_pause(steerhook_session *s, bool paused) {
    if (s == NULL) {
        return STEERHOOK_ARGUMENT;
    }
    if (paused && s->status != STEERHOOK_OK) {
        return s->status;
    }
    if (s->batch.open) {
        return sh_session_refuse(s, STEERHOOK_ORDER, "pause: expected no open batch");
    }
    s->paused = paused;
    return STEERHOOK_OK;
}

static int32_t find_probe(const steerhook_session *s, const char *id) {
    for (int32_t i = 0; id != NULL && i < s->package->n_probes; i++) {
        if (strcmp(s->package->probes[i].id, id) == 0) {
            return i;
        }
    }
    return -1;
}

steerhook_status steerhook_set_threshold(steerhook_session *s, const char *probe,
                                         double threshold) {
    steerhook_status status = sh_session_check(s);
    if (status != STEERHOOK_OK) {
        return status;
    }
    if (probe == NULL || !isfinite(threshold)) {
        return sh_session_refuse(s, STEERHOOK_ARGUMENT, "threshold: expected a finite number");
    }
    int32_t index = find_probe(s, probe);
    if (index < 0) {
        return sh_session_refuse(s, STEERHOOK_ARGUMENT, "threshold: no probe %s",
                                 sh_quote((sh_text){probe, strlen(probe)}).text);
    }
    s->thresholds[index] = threshold;
    return STEERHOOK_OK;
}

steerhook_status steerhook_calibrate(steerhook_session *s, const char *runtime,
                                     const char *quantisation, const char *weights,
                                     bool *calibrated) {
    steerhook_status status = sh_session_check(s);
    if (status != STEERHOOK_OK) {
        return status;
    }
    if (runtime == NULL || quantisation == NULL) {
        return sh_session_refuse(s, STEERHOOK_ARGUMENT, "calibrate: expected two names");
    }
    bool match = false;
    for (int32_t i = s->package->n_calibrations - 1; i >= 0 && !match; i--) {
        const sh_calibration *c = &s->package->calibrations[i];
        match = sh_text_is(c->runtime, runtime) && sh_text_is(c->quantisation, quantisation) &&
                (c->weights.size == 0 || (weights != NULL && sh_text_is(c->weights, weights)));
        for (int32_t j = 0; match && j < c->n_thresholds; j++) {
            s->thresholds[c->probes[j]] = c->thresholds[j];
        }
    }
    if (calibrated != NULL) {
        *calibrated = match;
    }
    return STEERHOOK_OK;
}

/* ---- decisions ---- */

static bool has_sequence(const steerhook_session *s, int32_t seq) {
    return seq >= 0 && seq < s->model.n_seq_max;
}

/* As steerbridge/reference.py words them. */
static const char *reason(sh_unjudged unjudged) {
    switch (unjudged) {
    case SH_NOT_FINITE: return "its states or logits are not finite";
    case SH_TOO_SHORT: return "the prompt is shorter than its reading needs";
    case SH_UNKNOWN: return "rows that it reads are of unknown history";
    case SH_JUDGED: break;
    }
    return "";
}

/* What is told of a probe: of a token reading, as far as its rows have survived. */
static steerhook_verdict verdict_of(const steerhook_session *s, const sh_request *request,
                                    int32_t probe) {
    const sh_decision *decision = &request->probes[probe];
    const sh_running *running = sh_running_of(s, request, probe);
    steerhook_verdict verdict = {s->package->probes[probe].id, decision->score,
                                 decision->threshold, decision->fired, reason(decision->unjudged),
                                 false, SH_NO_ROW};
    if (running == NULL || decision->unjudged == SH_UNKNOWN) {
        return verdict;
    }
    if (request->survived < request->count) {
        verdict.score = sh_running_score(s, request, probe, request->survived);
    }
    verdict.fired = running->fired_row != SH_NO_ROW && running->fired_row < request->survived;
    if (!verdict.fired) {
        verdict.unjudged = "";
    } else {
        verdict.row = running->told_row;
        verdict.in_answer = running->fired_row >= request->n_prompt;
    }
    return verdict;
}

int32_t steerhook_verdicts(const steerhook_session *s, int32_t seq, steerhook_verdict *out,
                           int32_t max) {
    steerhook_status status = sh_session_check(s);
    if (status != STEERHOOK_OK || !has_sequence(s, seq) || (out == NULL && max > 0)) {
        return -(int32_t)(status != STEERHOOK_OK ? status : STEERHOOK_ARGUMENT);
    }
    const sh_decision *decisions = s->requests[seq].probes;
    int32_t count = 0;
    for (int32_t i = 0; decisions != NULL && i < s->package->n_probes; i++) {
        if (!decisions[i].known) {
            continue;
        }
        if (count < max) {
            out[count] = verdict_of(s, &s->requests[seq], i);
        }
        count++;
    }
    return count;
}

int32_t steerhook_rules(const steerhook_session *s, int32_t seq, steerhook_rule_state *out,
                        int32_t max) {
    steerhook_status status = sh_session_check(s);
    if (status != STEERHOOK_OK || !has_sequence(s, seq) || (out == NULL && max > 0)) {
        return -(int32_t)(status != STEERHOOK_OK ? status : STEERHOOK_ARGUMENT);
    }
    const sh_rule_state *rules = s->requests[seq].rules;
    for (int32_t i = 0; i < s->package->n_rules && i < max; i++) {
        sh_rule_state state = rules == NULL ? (sh_rule_state){0} : rules[i];
        state.fired &= state.begin < s->requests[seq].survived;
        out[i] = (steerhook_rule_state){s->package->rules[i].id, state.decided, state.fired,
                                        state.strength};
    }
    return s->package->n_rules;
}

int32_t steerhook_first_steered(const steerhook_session *s, int32_t seq) {
    return s == NULL || !has_sequence(s, seq) ? SH_NO_ROW : s->requests[seq].cache.first_steered;
}

int32_t steerhook_row_logits(const steerhook_session *s, int32_t seq, const char *probe, float *out,
                             int32_t max) {
    steerhook_status status = sh_session_check(s);
    if (status != STEERHOOK_OK) {
        return -(int32_t)status;
    }
    int32_t p = find_probe(s, probe);
    if (!has_sequence(s, seq) || p < 0 || max < 0 || (out == NULL && max > 0)) {
        return -(int32_t)STEERHOOK_ARGUMENT;
    }
    const sh_rows *rows = &s->requests[seq].cache.rows;
    int32_t count = 0;
    for (int32_t k = 0; k < s->n_row_probes; k++) {
        if (s->row_probes[k].probe == p) {
            count = rows->n;
            for (int32_t row = 0; row < rows->n && row < max; row++) {
                out[row] = *sh_row_logit(s, rows, row, k);
            }
        }
    }
    return count;
}

int64_t steerhook_readings(const steerhook_session *s, int32_t seq, const char *probe,
                           double *out, int64_t max) {
    steerhook_status status = sh_session_check(s);
    if (status != STEERHOOK_OK) {
        return -(int64_t)status;
    }
    int32_t index = find_probe(s, probe);
    if (!has_sequence(s, seq) || index < 0 || max < 0 || (out == NULL && max > 0)) {
        return -(int64_t)STEERHOOK_ARGUMENT;
    }
    const sh_request *request = &s->requests[seq];
    if (request->probes == NULL || !request->probes[index].known) {
        return 0;
    }
    int64_t d = s->package->n_embd;
    int64_t count = s->package->probes[index].n_readings * d;
    const double *values = request->values + s->first_slot[index] * d;
    for (int64_t i = 0; i < count && i < max; i++) {
        out[i] = values[i];
    }
    return count;
}
