/* A stand-in for libllama and ggml, for the fuzzer of sessions: as much of their C API as the preload
 * and the fuzzed program use, with states that are hashes of a row and the rows before it.
 *
 * The program computes the same hashes, so it knows what every probe must read. Graphs are cut into
 * micro-batches as llama.cpp cuts them: in order, or, where each sequence has a cache of its own, of
 * several sequences row by row. Built with the sanitizers that the preload is built with.
 */
#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "llama_abi.h"

enum { WIDTH = 8, LAYERS = 4, VOCAB = 300, EOG = 256, MAX_ROWS = 4096, MAX_SEQ = 8 };

#define EXPORT __attribute__((visibility("default")))

typedef struct {
    uint64_t hash; /* of the row and those before it */
    int32_t pos;
} cell;

typedef struct {
    cell cells[MAX_ROWS];
    int32_t count;
} sequence;

struct ggml_tensor {
    char name[32];
    void *data;
    size_t nbytes;
};

struct ggml_cgraph {
    struct ggml_tensor tokens, positions;
};

struct ggml_backend_sched {
    eval_callback callback;
    void *data;
    struct ggml_cgraph graph;
};

struct llama_model {
    int unused;
};

struct llama_context {
    int32_t n_batch, n_ubatch, n_seq_max, unified;
    sequence *sequences;
    struct ggml_backend_sched sched;
    int32_t n_rows;
    int8_t output[MAX_ROWS];
    float logits[MAX_ROWS][VOCAB];
    float states[LAYERS + 2][MAX_ROWS][WIDTH]; /* of one pass */
};

static struct llama_model the_model;

/* Callers in this library go through the dynamic linker, as those in llama.cpp do. */
EXPORT void ggml_backend_sched_set_eval_callback(struct ggml_backend_sched *sched,
                                                 eval_callback callback, void *data);
EXPORT int ggml_backend_sched_graph_compute_async(struct ggml_backend_sched *sched,
                                                  struct ggml_cgraph *graph);

static uint64_t mixed(uint64_t x) {
    x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
    return x ^ (x >> 31);
}

/* Uniform in [-1, 1): the value of a channel at a depth. */
static float value_of(uint64_t hash, int depth, int channel) {
    uint64_t bits = mixed(hash + (uint64_t)(depth * WIDTH + channel + 1));
    return (float)((double)(bits >> 40) / (double)(1 << 23) - 1.0);
}

/* ---- facts ---- */

EXPORT const struct llama_model *llama_get_model(const struct llama_context *c) {
    (void)c;
    return &the_model;
}
EXPORT const void *llama_model_get_vocab(const struct llama_model *m) { return m; }
EXPORT int32_t llama_model_n_embd(const struct llama_model *m) { (void)m; return WIDTH; }
EXPORT int32_t llama_model_n_layer(const struct llama_model *m) { (void)m; return LAYERS; }
EXPORT int32_t llama_vocab_n_tokens(const void *v) { (void)v; return VOCAB; }
EXPORT bool llama_vocab_is_eog(const void *v, int32_t token) { (void)v; return token == EOG; }
EXPORT const char *llama_vocab_get_text(const void *v, int32_t t) { (void)v; (void)t; return "t"; }
EXPORT int llama_model_rope_type(const struct llama_model *m) { (void)m; return 0; }
EXPORT int32_t llama_model_meta_val_str(const struct llama_model *m, const char *key, char *text,
                                        size_t size) {
    (void)m;
    return strcmp(key, "general.architecture") == 0 ? snprintf(text, size, "llama") : -1;
}
EXPORT uint32_t llama_n_batch(const struct llama_context *c) { return (uint32_t)c->n_batch; }
EXPORT uint32_t llama_n_ubatch(const struct llama_context *c) { return (uint32_t)c->n_ubatch; }
EXPORT uint32_t llama_n_ctx(const struct llama_context *c) { (void)c; return MAX_ROWS; }
EXPORT uint32_t llama_n_ctx_seq(const struct llama_context *c) {
    return (uint32_t)(c->unified ? MAX_ROWS : MAX_ROWS / c->n_seq_max);
}
EXPORT uint32_t llama_n_seq_max(const struct llama_context *c) { return (uint32_t)c->n_seq_max; }
EXPORT void *llama_get_memory(const struct llama_context *c) { return (void *)(uintptr_t)c; }
EXPORT const char *ggml_get_name(const struct ggml_tensor *t) { return t->name; }
EXPORT size_t ggml_nbytes(const struct ggml_tensor *t) { return t->nbytes; }

static void in_range(const struct ggml_tensor *t, size_t offset, size_t size) {
    if (offset > t->nbytes || size > t->nbytes - offset) {
        abort();
    }
}

EXPORT void ggml_backend_tensor_get(const struct ggml_tensor *t, void *data, size_t offset,
                                    size_t size) {
    in_range(t, offset, size);
    memcpy(data, (char *)t->data + offset, size);
}
EXPORT void ggml_backend_tensor_set(struct ggml_tensor *t, const void *data, size_t offset,
                                    size_t size) {
    in_range(t, offset, size);
    memcpy((char *)t->data + offset, data, size);
}
EXPORT struct ggml_tensor *ggml_graph_get_tensor(struct ggml_cgraph *graph, const char *name) {
    return strcmp(name, "inp_tokens") == 0 ? &graph->tokens
           : strcmp(name, "inp_pos") == 0  ? &graph->positions
                                           : NULL;
}

/* ---- contexts ---- */

EXPORT struct llama_context *stub_context(int32_t n_batch, int32_t n_ubatch, int32_t n_seq_max,
                                          int32_t unified) {
    struct llama_context *c = calloc(1, sizeof *c);
    c->n_batch = n_batch;
    c->n_ubatch = n_ubatch;
    c->n_seq_max = n_seq_max;
    c->unified = unified;
    c->sequences = calloc((size_t)n_seq_max, sizeof *c->sequences);
    return c;
}
EXPORT void llama_free(struct llama_context *c) {
    free(c->sequences);
    free(c);
}

EXPORT void ggml_backend_sched_set_eval_callback(struct ggml_backend_sched *sched,
                                                 eval_callback callback, void *data) {
    sched->callback = callback;
    sched->data = data;
}
EXPORT int ggml_backend_sched_graph_compute_async(struct ggml_backend_sched *sched,
                                                  struct ggml_cgraph *graph) {
    (void)sched;
    (void)graph;
    return 0;
}

/* A node of a graph; false if the callback stopped it. */
static bool node(struct llama_context *c, const char *name, int number, float *data, int32_t rows,
                 size_t width) {
    struct ggml_tensor t = {.data = data, .nbytes = (size_t)rows * width * sizeof *data};
    if (number >= 0) {
        snprintf(t.name, sizeof t.name, "%s-%d", name, number);
    } else {
        snprintf(t.name, sizeof t.name, "%s", name);
    }
    if (c->sched.callback == NULL || !c->sched.callback(&t, true, c->sched.data)) {
        return true;
    }
    return c->sched.callback(&t, false, c->sched.data);
}

/* One micro-batch: rows of the batch, in this order. */
static void pass(struct llama_context *c, const llama_batch *batch, const int32_t *rows,
                 int32_t count) {
    int32_t ids[MAX_ROWS], positions[MAX_ROWS], outputs[MAX_ROWS], n_outputs = 0;
    uint64_t hashes[MAX_ROWS];
    ggml_backend_sched_set_eval_callback(&c->sched, NULL, NULL);
    for (int32_t i = 0; i < count; i++) {
        int32_t row = rows[i];
        ids[i] = batch->token[row];
        positions[i] = batch->pos[row];
        sequence *s = &c->sequences[batch->seq_id[row][0]];
        uint64_t before = s->count > 0 ? s->cells[s->count - 1].hash : 1;
        hashes[i] = mixed(before * 3 + (uint64_t)ids[i] + 7);
        for (int32_t k = 0; k < batch->n_seq_id[row]; k++) {
            sequence *q = &c->sequences[batch->seq_id[row][k]];
            q->cells[q->count++] = (cell){hashes[i], positions[i]};
        }
        if (c->output[row]) {
            outputs[n_outputs++] = row;
        }
    }
    struct ggml_cgraph *graph = &c->sched.graph;
    graph->tokens = (struct ggml_tensor){"inp_tokens", ids, (size_t)count * sizeof *ids};
    graph->positions = (struct ggml_tensor){"inp_pos", positions, (size_t)count * sizeof *ids};
    ggml_backend_sched_graph_compute_async(&c->sched, graph);
    for (int depth = 1; depth <= LAYERS + 1; depth++) {
        int32_t n = 0;
        for (int32_t i = 0; i < count; i++) {
            if (depth >= LAYERS && !c->output[rows[i]]) {
                continue; /* the last block keeps output rows only */
            }
            for (int k = 0; k < WIDTH; k++) {
                c->states[depth][n][k] = value_of(hashes[i], depth, k);
            }
            n++;
        }
        bool head = depth > LAYERS;
        if (n > 0 && !node(c, head ? "result_norm" : "l_out", head ? -1 : depth - 1,
                           c->states[depth][0], n, WIDTH)) {
            return;
        }
    }
    for (int32_t i = 0; i < n_outputs; i++) {
        for (int32_t t = 0; t < VOCAB; t++) {
            c->logits[outputs[i]][t] = c->states[LAYERS + 1][i][t % WIDTH] * (float)(t % 7);
        }
    }
    float none[VOCAB];
    node(c, "result_output", -1, none, 1, VOCAB);
}

EXPORT int32_t llama_decode(struct llama_context *c, llama_batch batch) {
    int32_t rows[MAX_ROWS], room = c->n_ubatch;
    if (batch.n_tokens < 1 || batch.n_tokens > c->n_batch) {
        return -1;
    }
    c->n_rows = batch.n_tokens;
    memcpy(c->output, batch.logits, (size_t)batch.n_tokens);
    if (c->unified) {
        for (int32_t at = 0; at < batch.n_tokens; at += room) {
            int32_t count = batch.n_tokens - at < room ? batch.n_tokens - at : room;
            for (int32_t i = 0; i < count; i++) {
                rows[i] = at + i;
            }
            pass(c, &batch, rows, count);
        }
        return 0;
    }
    bool done[MAX_ROWS] = {false};
    for (int32_t left = batch.n_tokens; left > 0;) { /* split_equal, sequential */
        int32_t sets[MAX_SEQ], n_sets = 0, count = 0, each = 0;
        for (int32_t r = 0; r < batch.n_tokens && n_sets < MAX_SEQ; r++) {
            int32_t s = batch.seq_id[r][0];
            if (!done[r] && (n_sets == 0 || s == sets[n_sets - 1] + 1)) {
                sets[n_sets++] = s;
            }
        }
        for (bool more = true; more && (each + 1) * n_sets <= room; each += more) {
            for (int32_t i = 0; i < n_sets; i++) {
                int32_t rest = 0;
                for (int32_t r = 0; r < batch.n_tokens; r++) {
                    rest += !done[r] && batch.seq_id[r][0] == sets[i];
                }
                more = more && rest > each;
            }
        }
        for (int32_t i = 0; i < n_sets; i++) {
            for (int32_t r = 0, taken = 0; r < batch.n_tokens && taken < each; r++) {
                if (!done[r] && batch.seq_id[r][0] == sets[i]) {
                    done[r] = true;
                    rows[count++] = r;
                    taken++;
                }
            }
        }
        pass(c, &batch, rows, count);
        left -= count;
    }
    return 0;
}

static int32_t row_of(const struct llama_context *c, int32_t index) {
    for (int32_t r = c->n_rows - 1; index < 0 && r >= 0; r--) {
        if (c->output[r] && ++index == 0) {
            return r;
        }
    }
    return index;
}

EXPORT float *llama_get_logits_ith(struct llama_context *c, int32_t index) {
    return c->logits[row_of(c, index)];
}
EXPORT float *llama_get_logits(struct llama_context *c) { return c->logits[0]; }
EXPORT void llama_sampler_apply(void *sampler, llama_token_data_array *tokens) {
    (void)sampler;
    tokens->selected = 0; /* the fuzzer offers one token */
}
EXPORT int32_t llama_sampler_sample(void *sampler, struct llama_context *c, int32_t index) {
    (void)sampler;
    const float *logits = llama_get_logits_ith(c, index);
    int32_t best = 0;
    for (int32_t t = 1; t < VOCAB; t++) {
        best = logits[t] > logits[best] ? t : best;
    }
    return best;
}

/* ---- the cache ---- */

EXPORT void llama_memory_clear(struct llama_context *c, bool data) {
    (void)data;
    for (int32_t s = 0; s < c->n_seq_max; s++) {
        c->sequences[s].count = 0;
    }
}

EXPORT bool llama_memory_seq_rm(struct llama_context *c, int32_t seq, int32_t p0, int32_t p1) {
    for (int32_t s = 0; s < c->n_seq_max; s++) {
        sequence *q = &c->sequences[s];
        int32_t kept = 0;
        for (int32_t i = 0; (seq < 0 || seq == s) && i < q->count; i++) {
            if (q->cells[i].pos < p0 || (p1 >= 0 && q->cells[i].pos >= p1)) {
                q->cells[kept++] = q->cells[i];
            }
        }
        q->count = seq < 0 || seq == s ? kept : q->count;
    }
    return true;
}

EXPORT void llama_memory_seq_cp(struct llama_context *c, int32_t from, int32_t to, int32_t p0,
                                int32_t p1) {
    const sequence *q = &c->sequences[from];
    for (int32_t i = 0; i < q->count; i++) {
        if (q->cells[i].pos >= p0 && (p1 < 0 || q->cells[i].pos < p1)) {
            c->sequences[to].cells[c->sequences[to].count++] = q->cells[i];
        }
    }
}

EXPORT void llama_memory_seq_add(struct llama_context *c, int32_t seq, int32_t p0, int32_t p1,
                                 int32_t delta) {
    sequence *q = &c->sequences[seq];
    for (int32_t i = 0; i < q->count; i++) {
        if (q->cells[i].pos >= p0 && (p1 < 0 || q->cells[i].pos < p1)) {
            q->cells[i].pos += delta;
        }
    }
}

EXPORT int32_t llama_memory_seq_pos_max(const struct llama_context *c, int32_t seq) {
    const sequence *q = &c->sequences[seq];
    return q->count > 0 ? q->cells[q->count - 1].pos : -1;
}

/* ---- states ---- */

EXPORT size_t llama_state_seq_get_size(struct llama_context *c, int32_t seq) {
    return sizeof(int32_t) + (size_t)c->sequences[seq].count * sizeof(cell);
}
EXPORT size_t llama_state_seq_get_data(struct llama_context *c, uint8_t *data, size_t size,
                                       int32_t seq) {
    const sequence *q = &c->sequences[seq];
    size_t bytes = (size_t)q->count * sizeof *q->cells;
    if (size < sizeof q->count + bytes) {
        return 0;
    }
    memcpy(data, &q->count, sizeof q->count);
    memcpy(data + sizeof q->count, q->cells, bytes);
    return sizeof q->count + bytes;
}
EXPORT size_t llama_state_seq_set_data(struct llama_context *c, const uint8_t *data, size_t size,
                                       int32_t seq) {
    sequence *q = &c->sequences[seq];
    int32_t count;
    memcpy(&count, data, sizeof count);
    size_t bytes = (size_t)count * sizeof *q->cells;
    if (size < sizeof count + bytes) {
        return 0;
    }
    q->count = count;
    memcpy(q->cells, data + sizeof count, bytes);
    return sizeof count + bytes;
}
