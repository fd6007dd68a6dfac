/* The evaluation callback: reads and rewrites the rows of the nodes in the plan. */
#include <math.h>
#include <string.h>

#include "say.h"
#include "score.h"
#include "tokens.h"

/* ---- which node ---- */

/* What the output embedding reads. A context that gives embeddings without pooling them gives the
 * same tensor another name; one that pools has both. It may change from batch to batch. */
static bool is_head(steerhook_session *s, const char *name) {
    if (strcmp(name, "result_norm") == 0) {
        s->batch.has_norm = true;
        return true;
    }
    return !s->batch.has_norm && strcmp(name, "result_embd_pooled") == 0;
}

/* The number behind a name; -1 if the rest is none, or no block of the model. */
static int32_t layer_of(const steerhook_session *s, const char *digits) {
    int32_t layer = 0;
    for (const char *digit = digits; *digit != '\0'; digit++) {
        if (*digit < '0' || *digit > '9' || layer >= s->model.n_layer) {
            return -1; /* "l_out-3 (view)", or deeper than the model */
        }
        layer = layer * 10 + (*digit - '0');
    }
    return *digits != '\0' && layer < s->model.n_layer ? layer : -1;
}

/* "l_out-<k>" is depth k + 1, or "deepstack_out-<k>" where features of an image are added to it;
 * "result_norm" is the head, "result_output" are its logits; anything else is -1. Most of the names
 * of a graph end at the first comparison. */
static int32_t depth_of(steerhook_session *s, const char *name) {
    if (name == NULL) {
        return -1;
    }
    if (name[0] == 'r') {
        if (strcmp(name, "result_output") == 0) {
            return s->model.n_layer + 2;
        }
        return is_head(s, name) ? s->model.n_layer + 1 : -1;
    }
    bool added = name[0] == 'd' && strncmp(name, "deepstack_out-", 14) == 0;
    if (!added && (name[0] != 'l' || strncmp(name, "l_out-", 6) != 0)) {
        return -1;
    }
    int32_t layer = layer_of(s, name + (added ? 14 : 6));
    return layer >= 0 && added == (layer < s->model.n_deepstack) ? layer + 1 : -1;
}

static sh_site_plan *site_of(steerhook_session *s, const struct ggml_tensor *node) {
    int32_t depth = depth_of(s, s->ggml.get_name(node));
    return depth < 0 || s->site_at[depth] < 0 ? NULL : &s->sites[s->site_at[depth]];
}

/* ---- which rows ---- */

/* Whether the graph keeps output rows alone at this site. */
static bool keeps_outputs(const steerhook_session *s, const sh_site_plan *site) {
    return site->outputs_only && !s->batch.keeps_all;
}

/* The row of the batch that is number `index` of the graph at this site. */
static int32_t batch_row(const steerhook_session *s, const sh_site_plan *site, int32_t index) {
    if (s->batch.n_passes > 0) {
        return keeps_outputs(s, site) ? s->batch.pass_outputs[index] : s->batch.pass[index];
    }
    int32_t row = site->next_row + index;
    return site->outputs_only ? s->batch.outputs[row] : row;
}

/* Rows that micro-batch `chunk` has at this site: llama.cpp cuts a batch every n_ubatch tokens. */
static int32_t rows_of_chunk(const steerhook_session *s, const sh_site_plan *site,
                             int32_t chunk) {
    if (s->batch.n_passes > 0) {
        return keeps_outputs(s, site) ? s->batch.n_pass_outputs : s->batch.n_pass;
    }
    int64_t from = (int64_t)chunk * s->model.n_ubatch;
    int64_t to = from + s->model.n_ubatch;
    to = to < s->batch.n_rows ? to : s->batch.n_rows;
    if (!site->outputs_only) {
        return from < to ? (int32_t)(to - from) : 0;
    }
    int32_t end = site->next_row;
    while (end < s->batch.n_outputs && s->batch.outputs[end] < to) {
        end++;
    }
    return end - site->next_row;
}

static bool reads_row(const steerhook_session *s, const sh_site_plan *site, int32_t row) {
    for (int32_t m = s->batch.first_member[row]; m < s->batch.first_member[row + 1]; m++) {
        const sh_member *member = &s->batch.members[m];
        const sh_request *request = &s->requests[member->seq];
        bool prompt = member->position < request->n_prompt;
        for (int32_t i = 0; i < site->n_rows; i++) {
            if (sh_row_wanted(s, &site->rows[i], request, member->position)) {
                return true;
            }
        }
        for (int32_t i = 0; (prompt || s->keeps_answers) && i < site->n_reads; i++) {
            const sh_read *read = &site->reads[i];
            if (sh_keeps(s, read, prompt) || sh_wants(s, read, request, member->position)) {
                return true;
            }
        }
    }
    return false;
}

/* Sequences that share a row have equal rules (see may_share), so the first one is used. */
sh_act_state sh_act_on(const steerhook_session *s, const sh_act *act, int32_t row,
                       int64_t *begin) {
    const sh_member *member = &s->batch.members[s->batch.first_member[row]];
    const sh_request *request = &s->requests[member->seq];
    const sh_rule_state *rule = &request->rules[act->rule];
    const sh_intervention *x = act->intervention;
    int64_t end = (int64_t)request->n_prompt - 1;
    if (!x->all_positions && member->position < end) {
        return SH_IDLE;
    }
    if (!rule->decided) {
        return SH_UNDECIDED;
    }
    int64_t from = rule->begin > end ? rule->begin : end;
    if (begin != NULL) {
        *begin = from;
    }
    /* A factor of 0 has no effect: leave the row bit-identical. What is said has no strength. */
    bool acts = rule->fired && (x->type == SH_SAY || (float)(rule->strength * x->factor) != 0.0F);
    return acts && (x->all_positions || member->position >= from) ? SH_ACTS : SH_IDLE;
}

static bool writes_row(const steerhook_session *s, const sh_site_plan *site, int32_t row) {
    for (int32_t i = 0; i < site->n_acts; i++) {
        if (sh_act_on(s, &site->acts[i], row, NULL) != SH_IDLE) {
            return true;
        }
    }
    return false;
}

bool sh_batch_is_idle(const steerhook_session *s) {
    for (int32_t i = 0; i < s->n_sites; i++) {
        for (int32_t row = 0; row < s->batch.n_rows; row++) {
            if (reads_row(s, &s->sites[i], row) || writes_row(s, &s->sites[i], row)) {
                return false;
            }
        }
    }
    return true;
}

/* ---- reading ---- */

static void take_row(steerhook_session *s, const sh_read *read, sh_request *request,
                     int64_t position, const float *x) {
    sh_progress *progress = &request->progress[read->slot];
    int32_t d = s->package->n_embd;
    double *values = request->values + (int64_t)read->slot * d;
    sh_position kind = sh_reading_of(s, read)->position;
    bool last = kind == SH_PROMPT_END || position == (int64_t)request->n_prompt - 1;
    if (kind != SH_IMAGE_MEAN || s->batch.image) {
        progress->rows++;
        for (int32_t i = 0; i < d; i++) {
            values[i] += (double)x[i];
        }
    }
    for (int32_t i = 0; last && progress->rows > 1 && i < d; i++) {
        values[i] /= progress->rows;
    }
    progress->complete = last;
}

/* Scores the probe once its readings are complete. */
steerhook_status sh_decide_probe(steerhook_session *s, int32_t probe_index,
                                 sh_request *request) {
    const sh_probe *probe = &s->package->probes[probe_index];
    int32_t slot = s->first_slot[probe_index];
    for (int32_t k = 0; k < probe->n_readings; k++) {
        const sh_progress *progress = &request->progress[slot + k];
        if (!progress->complete) {
            return STEERHOOK_OK;
        }
        if (probe->readings[k].position == SH_PROMPT_MEAN &&
            progress->rows != request->n_prompt) {
            return sh_session_fail(s, STEERHOOK_ROWS,
                                   "probe %s: expected a mean over %ld rows, found %ld", probe->id,
                                   (long)request->n_prompt, (long)progress->rows);
        }
        s->missing[k] = progress->rows == 0;
    }
    sh_decision *decision = &request->probes[probe_index];
    const double *values = request->values + (int64_t)slot * s->package->n_embd;
    decision->score = sh_score(probe, values, s->missing, s->scratch);
    decision->threshold = s->thresholds[probe_index];
    decision->fired = sh_fires(probe->comparator, decision->score, decision->threshold);
    decision->unjudged = isfinite(decision->score) ? SH_JUDGED : SH_NOT_FINITE;
    decision->known = true;
    return sh_decide_rules(s, request);
}

static steerhook_status read_row(steerhook_session *s, const sh_site_plan *site, int32_t row,
                                 const float *x) {
    steerhook_status status = STEERHOOK_OK;
    for (int32_t m = s->batch.first_member[row]; m < s->batch.first_member[row + 1]; m++) {
        const sh_member *member = &s->batch.members[m];
        sh_request *request = &s->requests[member->seq];
        bool prompt = member->position < request->n_prompt;
        for (int32_t i = 0; status == STEERHOOK_OK && i < site->n_reads; i++) {
            const sh_read *read = &site->reads[i];
            if (sh_keeps(s, read, prompt)) {
                memcpy(sh_kept(s, request, read->slot, member->position), x,
                       (size_t)s->package->n_embd * sizeof *x);
            }
            if (!sh_wants(s, read, request, member->position)) {
                continue;
            }
            take_row(s, read, request, member->position, x);
            if (request->progress[read->slot].complete && !request->probes[read->probe].known) {
                status = sh_decide_probe(s, read->probe, request);
            }
        }
    }
    return status;
}

/* ---- writing ---- */

static steerhook_status write_row(steerhook_session *s, const sh_site_plan *site, int32_t row,
                                  float *x) {
    const sh_request *request =
        &s->requests[s->batch.members[s->batch.first_member[row]].seq];
    for (int32_t i = 0; i < site->n_acts; i++) {
        const sh_act *act = &site->acts[i];
        sh_act_state state = sh_act_on(s, act, row, NULL);
        if (state == SH_UNDECIDED) {
            return sh_session_fail(s, STEERHOOK_HOOK_LOST,
                                   "rule %s: expected its probes to be known at layer_input[%ld]",
                                   s->package->rules[act->rule].id, (long)site->depth);
        }
        if (state == SH_ACTS && act->intervention->type != SH_SAY) {
            double factor = request->rules[act->rule].strength * act->intervention->factor;
            sh_intervene(act->intervention, act->vector, (float)factor, x, s->scratch);
        }
    }
    return STEERHOOK_OK;
}

/* ---- a node ---- */

static size_t row_size(const steerhook_session *s, const sh_site_plan *site) {
    bool logits = site->depth == s->model.n_layer + 2;
    return (size_t)(logits ? s->package->n_vocab : s->package->n_embd) * sizeof(float);
}

/* Token readings take rows together, and judge them one by one, behind what else reads a row. */
static steerhook_status read_rows(steerhook_session *s, const sh_site_plan *site, int32_t first,
                                  int32_t n) {
    steerhook_status status = STEERHOOK_OK;
    for (int32_t i = 0; i < site->n_rows; i++) {
        sh_rows_sum(s, &site->rows[i], first, s->rows, n);
    }
    for (int32_t j = 0; j < n && status == STEERHOOK_OK; j++) {
        int32_t row = batch_row(s, site, first + j);
        status = read_row(s, site, row, s->rows + (int64_t)j * s->package->n_embd);
        for (int32_t i = 0; i < site->n_rows && status == STEERHOOK_OK; i++) {
            if (site->rows[i].last) {
                status = sh_rows_take(s, &site->rows[i], row, first + j);
            }
        }
    }
    return status;
}

static steerhook_status write_rows(steerhook_session *s, const sh_site_plan *site, int32_t first,
                                   int32_t n) {
    steerhook_status status = STEERHOOK_OK;
    for (int32_t j = 0; j < n && status == STEERHOOK_OK; j++) {
        float *x = s->rows + (int64_t)j * s->package->n_embd;
        status = write_row(s, site, batch_row(s, site, first + j), x);
    }
    return status;
}

typedef bool (*row_filter)(const steerhook_session *, const sh_site_plan *, int32_t);

/* Copies each run of rows that the filter wants, and has them read or rewritten. */
static steerhook_status visit_rows(steerhook_session *s, const sh_site_plan *site,
                                   struct ggml_tensor *node, bool writing) {
    row_filter wanted = writing ? writes_row : reads_row;
    size_t row_bytes = (size_t)s->package->n_embd * sizeof(float);
    steerhook_status status = STEERHOOK_OK;
    for (int32_t i = 0; i < s->pending_rows && status == STEERHOOK_OK;) {
        int32_t n = 0;
        while (n < SH_SPAN && i + n < s->pending_rows &&
               wanted(s, site, batch_row(s, site, i + n))) {
            n++;
        }
        if (n == 0) {
            i++;
            continue;
        }
        size_t offset = (size_t)i * row_bytes;
        s->ggml.tensor_get(node, s->rows, offset, (size_t)n * row_bytes);
        status = writing ? write_rows(s, site, i, n) : read_rows(s, site, i, n);
        if (writing && status == STEERHOOK_OK) {
            s->ggml.tensor_set(node, s->rows, offset, (size_t)n * row_bytes);
        }
        i += n;
    }
    return status;
}

static void advance(sh_site_plan *site, int32_t rows) {
    site->next_row += rows;
    site->chunk++;
}

/* ask = true: counts the node's rows; true if it must be computed now and passed to us. */
static bool announce(steerhook_session *s, sh_site_plan *site, const struct ggml_tensor *node) {
    size_t row_bytes = row_size(s, site);
    size_t bytes = s->ggml.nbytes(node);
    if (!s->batch.open || s->pending != NULL) {
        sh_session_fail(s, STEERHOOK_HOOK_LOST, "layer_input[%ld]: seen %s", (long)site->depth,
                        s->batch.open ? "before an earlier node was delivered"
                                      : "without an open batch");
        return true;
    }
    if (s->batch.n_passes > 0 && site->chunk >= s->batch.n_passes) {
        sh_session_fail(s, STEERHOOK_HOOK_LOST, "layer_input[%ld]: seen twice in a graph",
                        (long)site->depth);
        return true;
    }
    site->chunk = s->batch.n_passes > 0 ? s->batch.n_passes - 1 : site->chunk;
    while (s->batch.n_passes == 0 && bytes > 0 && rows_of_chunk(s, site, site->chunk) == 0 &&
           (int64_t)site->chunk * s->model.n_ubatch < s->batch.n_rows) {
        site->chunk++; /* a micro-batch without outputs may leave the node out */
    }
    bool fewer = s->batch.n_passes > 0 && s->batch.n_pass_outputs < s->batch.n_pass;
    if (fewer && site->outputs_only && bytes == (size_t)s->batch.n_pass * row_bytes) {
        s->batch.keeps_all = true;
    }
    int32_t rows = rows_of_chunk(s, site, site->chunk);
    if (bytes != (size_t)rows * row_bytes) {
        sh_session_fail(s, STEERHOOK_ROWS,
                        "layer_input[%ld]: expected %ld rows of %ld values, found %zu bytes",
                        (long)site->depth, (long)rows, (long)(row_bytes / sizeof(float)), bytes);
        return true;
    }
    for (int32_t i = 0; i < rows; i++) {
        int32_t row = batch_row(s, site, i);
        if (reads_row(s, site, row) || writes_row(s, site, row)) {
            s->pending = site;
            s->pending_node = node;
            s->pending_rows = rows;
            return true;
        }
    }
    advance(site, rows);
    return false;
}

static void say_rows(steerhook_session *s, const sh_site_plan *site, struct ggml_tensor *node) {
    for (int32_t i = 0; i < s->pending_rows; i++) {
        sh_say_row(s, site, node, batch_row(s, site, i), i);
    }
}

/* ask = false: probes read the node before interventions rewrite it. */
static bool deliver(steerhook_session *s, struct ggml_tensor *node) {
    sh_site_plan *site = s->pending;
    if (site->depth == s->model.n_layer + 2) {
        say_rows(s, site, node);
    } else if (visit_rows(s, site, node, false) != STEERHOOK_OK ||
               visit_rows(s, site, node, true) != STEERHOOK_OK) {
        return false;
    }
    advance(site, s->pending_rows);
    s->pending = NULL;
    s->pending_node = NULL;
    return true;
}

bool steerhook_eval(struct ggml_tensor *node, bool ask, void *session) {
    steerhook_session *s = session;
    if (s->paused) {
        return !ask; /* nothing is wanted, and nothing is stopped */
    }
    if (s->status != STEERHOOK_OK) {
        return ask; /* cut the graph at the next node, then stop it */
    }
    if (!ask) {
        /* Another observer may have asked for a node that is not ours. */
        return s->pending == NULL || s->pending_node != node || deliver(s, node);
    }
    if (s->batch.open && s->batch.idle) {
        return false; /* most tokens: not even the node's name is read */
    }
    sh_site_plan *site = site_of(s, node);
    return site != NULL && announce(s, site, node);
}
