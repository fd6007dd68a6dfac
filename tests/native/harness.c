#include "harness.h"

#include <math.h>
#include <string.h>

/* ---- fake ggml ---- */

static const char *get_name(const struct ggml_tensor *t) { return t->name; }
static size_t get_nbytes(const struct ggml_tensor *t) { return t->nbytes; }

static void get(const struct ggml_tensor *t, void *data, size_t offset, size_t size) {
    CHECK(offset <= t->nbytes && size <= t->nbytes - offset);
    memcpy(data, (const char *)t->data + offset, size);
}

static void set(struct ggml_tensor *t, const void *data, size_t offset, size_t size) {
    CHECK(offset <= t->nbytes && size <= t->nbytes - offset);
    memcpy((char *)t->data + offset, data, size);
}

const steerhook_ggml fake_ggml = {get_name, get_nbytes, get, set};

/* ---- golden files ---- */

static void take(FILE *file, void *data, size_t size) {
    CHECK(fread(data, 1, size, file) == size);
}

static int32_t take_i32(FILE *file) {
    int32_t value = 0;
    take(file, &value, sizeof value);
    return value;
}

static float *take_rows(FILE *file, size_t count) {
    float *rows = malloc(count * sizeof *rows);
    CHECK(rows != NULL);
    take(file, rows, count * sizeof *rows);
    return rows;
}

static void take_request(FILE *file, const golden *g, const int32_t *depths, int32_t n_depths,
                         golden_request *r) {
    r->n_rows = take_i32(file);
    r->n_prompt = take_i32(file);
    r->first_image = take_i32(file);
    r->last_image = take_i32(file);
    size_t count = (size_t)r->n_rows * (size_t)g->d;
    for (int32_t i = 0; i < n_depths; i++) {
        r->input[depths[i]] = take_rows(file, count);
        r->expected[depths[i]] = take_rows(file, count);
    }
    for (int32_t i = 0; i < g->n_probes; i++) {
        take(file, &r->score[i], sizeof r->score[i]);
        r->probe_fired[i] = take_i32(file);
    }
    for (int32_t i = 0; i < g->n_rules; i++) {
        r->rule_fired[i] = take_i32(file);
        take(file, &r->strength[i], sizeof r->strength[i]);
    }
}

golden *golden_load(const char *directory, const char *name) {
    char path[512];
    char error[256] = "";
    char magic[4];
    int32_t depths[MAX_DEPTHS];
    golden *g = calloc(1, sizeof *g);
    CHECK(g != NULL);
    snprintf(g->name, sizeof g->name, "%s", name);
    snprintf(path, sizeof path, "%s/%s.gguf", directory, name);
    g->package = steerhook_package_load(path, error, sizeof error);
    if (g->package == NULL) {
        fprintf(stderr, "%s\n", error);
    }
    CHECK(g->package != NULL);
    snprintf(path, sizeof path, "%s/%s.golden", directory, name);
    FILE *file = fopen(path, "rb");
    CHECK(file != NULL);
    take(file, magic, sizeof magic);
    CHECK(memcmp(magic, "SHG1", 4) == 0);
    g->d = take_i32(file);
    g->n_layer = take_i32(file);
    int32_t n_depths = take_i32(file);
    CHECK(n_depths == g->n_layer + 1 && n_depths < MAX_DEPTHS);
    take(file, depths, (size_t)n_depths * sizeof *depths);
    g->n_probes = take_i32(file);
    g->n_rules = take_i32(file);
    g->n_requests = take_i32(file);
    CHECK(g->n_probes <= MAX_PROBES && g->n_rules <= MAX_RULES);
    g->requests = calloc((size_t)g->n_requests, sizeof *g->requests);
    CHECK(g->requests != NULL);
    for (int32_t i = 0; i < g->n_requests; i++) {
        take_request(file, g, depths, n_depths, &g->requests[i]);
    }
    fclose(file);
    return g;
}

void golden_free(golden *g) {
    for (int32_t i = 0; i < g->n_requests; i++) {
        for (int32_t depth = 0; depth < MAX_DEPTHS; depth++) {
            free(g->requests[i].input[depth]);
            free(g->requests[i].expected[depth]);
        }
    }
    free(g->requests);
    steerhook_package_free(g->package);
    free(g);
}

/* ---- graphs ---- */

void toy_new(toy *t, const golden *g, int32_t n_ubatch, int32_t n_seq_max) {
    char error[256] = "";
    const steerhook_model model = {NULL, g->d, g->n_layer, n_ubatch, n_seq_max};
    *t = (toy){.g = g, .n_ubatch = n_ubatch};
    t->session = steerhook_session_new(g->package, &model, &fake_ggml, error, sizeof error);
    if (t->session == NULL) {
        fprintf(stderr, "%s\n", error);
    }
    CHECK(t->session != NULL);
}

/* Equal within float32 rounding; bit-equal where nothing was to change. */
static void compare(const toy *t, const toy_row *row, int32_t depth, const float *got) {
    const float *want = row->request->expected[depth] + (int64_t)row->row * t->g->d;
    const float *input = row->request->input[depth] + (int64_t)row->row * t->g->d;
    if (memcmp(want, input, (size_t)t->g->d * sizeof *want) == 0) {
        CHECK(memcmp(got, want, (size_t)t->g->d * sizeof *want) == 0);
        return;
    }
    for (int32_t i = 0; i < t->g->d; i++) {
        bool same = isnan(want[i]) ? isnan(got[i])
                                   : fabsf(got[i] - want[i]) <= 2e-5F * (1.0F + fabsf(want[i]));
        if (!same) {
            fprintf(stderr, "%s: depth %d row %d value %d: %g, expected %g\n", t->g->name,
                    (int)depth, (int)row->row, (int)i, (double)got[i], (double)want[i]);
        }
        CHECK(same);
    }
}

static bool run_node(toy *t, const char *name, int32_t depth, const toy_row **rows, int32_t n) {
    size_t d = (size_t)t->g->d;
    size_t extra = depth == 1 ? (size_t)t->extra_rows : 0;
    struct ggml_tensor node = {name, ((size_t)n + extra) * d * sizeof(float), NULL};
    node.data = calloc((size_t)n + extra + 1, d * sizeof(float));
    CHECK(node.data != NULL);
    for (int32_t i = 0; i < n && depth > 0; i++) {
        memcpy(node.data + (size_t)i * d, rows[i]->request->input[depth] + (size_t)rows[i]->row * d,
               d * sizeof(float));
    }
    bool wanted = steerhook_eval(&node, true, t->session);
    bool go_on = !wanted || steerhook_eval(&node, false, t->session);
    t->asked_true += wanted;
    CHECK(!wanted || depth > 0 || !go_on);
    for (int32_t i = 0; i < n && depth > 0 && go_on && !t->uncompared; i++) {
        compare(t, rows[i], depth, node.data + (size_t)i * d);
    }
    free(node.data);
    return go_on;
}

/* One micro-batch: every block, then the norm; the last block and the norm hold outputs only. */
static bool run_graph(toy *t, const toy_row *rows, int32_t n) {
    const toy_row **all = malloc((size_t)n * sizeof *all);
    const toy_row **outputs = malloc((size_t)n * sizeof *outputs);
    int32_t n_outputs = 0;
    CHECK(all != NULL && outputs != NULL);
    for (int32_t i = 0; i < n; i++) {
        all[i] = &rows[i];
        if (rows[i].output) {
            outputs[n_outputs++] = &rows[i];
        }
    }
    bool ok = run_node(t, "inp_embd", 0, all, n);
    for (int32_t layer = 0; layer < t->g->n_layer && ok; layer++) {
        char name[32];
        bool last = layer == t->g->n_layer - 1;
        snprintf(name, sizeof name, "l_out-%d (view)", (int)layer);
        ok = run_node(t, name, 0, all, n) && run_node(t, "l_out-", 0, all, n) &&
             run_node(t, "l_out-4", 0, all, n) && run_node(t, "l_out-99999999999", 0, all, n);
        snprintf(name, sizeof name, "l_out-%d", (int)layer);
        if (ok && t->lose_depth != layer + 1) {
            ok = run_node(t, name, layer + 1, last ? outputs : all, last ? n_outputs : n);
        }
    }
    if (t->lose_depth != t->g->n_layer + 1) {
        ok = ok && run_node(t, "result_norm", t->g->n_layer + 1, outputs, n_outputs);
    }
    free(all);
    free(outputs);
    return ok;
}

void toy_graphs(toy *t, const toy_row *rows, int32_t n) {
    t->asked_true = 0;
    t->stopped = false;
    for (int32_t from = 0; from < n && !t->stopped; from += t->n_ubatch) {
        int32_t left = n - from;
        t->stopped = !run_graph(t, rows + from, left < t->n_ubatch ? left : t->n_ubatch);
    }
}

steerhook_status toy_decode(toy *t, const toy_row *rows, int32_t n, bool image) {
    int32_t *counts = malloc((size_t)n * sizeof *counts);
    int32_t *seqs = malloc((size_t)n * sizeof *seqs);
    int32_t **seq_ids = malloc((size_t)n * sizeof *seq_ids);
    int8_t *outputs = malloc((size_t)n);
    CHECK(counts != NULL && seqs != NULL && seq_ids != NULL && outputs != NULL);
    for (int32_t i = 0; i < n; i++) {
        counts[i] = 1;
        seqs[i] = rows[i].seq;
        seq_ids[i] = &seqs[i];
        outputs[i] = rows[i].output;
    }
    const steerhook_batch batch = {n, counts, seq_ids, outputs, image};
    steerhook_status status = steerhook_batch_begin(t->session, &batch);
    free(counts);
    free(seqs);
    free(seq_ids);
    free(outputs);
    if (status != STEERHOOK_OK) {
        return status;
    }
    toy_graphs(t, rows, n);
    return steerhook_batch_end(t->session);
}

void toy_request(toy *t, const golden_request *request, int32_t seq, int32_t chunk,
                 bool all_outputs) {
    toy_row rows[128];
    CHECK_STATUS(steerhook_request_begin(t->session, seq, 0, request->n_prompt), STEERHOOK_OK);
    for (int32_t row = 0; row < request->n_rows;) {
        bool image = row >= request->first_image && row < request->last_image;
        int32_t end = row + (row < request->n_prompt ? chunk : 1);
        end = row < request->n_prompt && end > request->n_prompt ? request->n_prompt : end;
        end = row < request->first_image && end > request->first_image ? request->first_image : end;
        end = image && end > request->last_image ? request->last_image : end;
        int32_t n = 0;
        for (; row < end; row++) {
            bool output = all_outputs || row >= request->n_prompt - 1;
            rows[n++] = (toy_row){request, seq, row, output};
        }
        CHECK_STATUS(toy_decode(t, rows, n, image), STEERHOOK_OK);
    }
    toy_check_verdicts(t, request, seq);
    CHECK_STATUS(steerhook_request_end(t->session, seq), STEERHOOK_OK);
}

void toy_check_verdicts(const toy *t, const golden_request *request, int32_t seq) {
    steerhook_verdict verdicts[MAX_PROBES];
    steerhook_rule_state rules[MAX_RULES];
    CHECK(steerhook_verdicts(t->session, seq, verdicts, MAX_PROBES) == t->g->n_probes);
    CHECK(steerhook_rules(t->session, seq, rules, MAX_RULES) == t->g->n_rules);
    for (int32_t i = 0; i < t->g->n_probes; i++) {
        double want = request->score[i];
        double got = verdicts[i].score;
        CHECK(isnan(want) ? isnan(got) : fabs(got - want) <= 1e-5 * (1.0 + fabs(want)));
        CHECK(verdicts[i].fired == (request->probe_fired[i] != 0));
    }
    for (int32_t i = 0; i < t->g->n_rules; i++) {
        CHECK(rules[i].decided && rules[i].fired == (request->rule_fired[i] != 0));
        CHECK(fabs(rules[i].strength - request->strength[i]) <=
              1e-5 * (1.0 + fabs(request->strength[i])));
    }
}
