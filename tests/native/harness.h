/* A toy llama.cpp for the tests: graphs of named nodes, cut into micro-batches as llama_decode
 * cuts them, and driven as ggml_backend_sched drives its evaluation callback. */
#ifndef STEERHOOK_TEST_HARNESS_H
#define STEERHOOK_TEST_HARNESS_H

#include <stdio.h>
#include <stdlib.h>

#include "steerhook.h"

/* Like assert, but in every build, and with the session's text. */
#define CHECK(condition)                                                              \
    do {                                                                              \
        if (!(condition)) {                                                           \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);           \
            abort();                                                                  \
        }                                                                             \
    } while (0)

#define CHECK_STATUS(call, want)                                                      \
    do {                                                                              \
        steerhook_status status_ = (call);                                            \
        if (status_ != (want)) {                                                      \
            fprintf(stderr, "%s:%d: %s is %s\n", __FILE__, __LINE__, #call,           \
                    steerhook_status_name(status_));                                  \
            abort();                                                                  \
        }                                                                             \
    } while (0)

struct ggml_tensor {
    const char *name;
    size_t nbytes;
    float *data;
};

extern const steerhook_ggml fake_ggml;

/* ---- golden files, see make_golden.py ---- */

enum { MAX_DEPTHS = 8, MAX_PROBES = 4, MAX_RULES = 4 };

typedef struct {
    int32_t n_rows, n_prompt, first_image, last_image;
    float *input[MAX_DEPTHS], *expected[MAX_DEPTHS]; /* by depth; NULL for 0 */
    double score[MAX_PROBES], strength[MAX_RULES];
    int32_t probe_fired[MAX_PROBES], rule_fired[MAX_RULES];
} golden_request;

typedef struct {
    char name[64];
    steerhook_package *package;
    int32_t d, n_layer, n_probes, n_rules, n_requests;
    golden_request *requests;
} golden;

golden *golden_load(const char *directory, const char *name);
void golden_free(golden *g);

/* ---- decoding ---- */

typedef struct {
    const golden_request *request;
    int32_t seq;
    int32_t row; /* of the request */
    bool output;
} toy_row;

typedef struct {
    steerhook_session *session;
    const golden *g;
    int32_t n_ubatch;
    int32_t asked_true;   /* nodes that the callback wanted, in the last batch */
    int32_t lose_depth;   /* a node that is left out, or 0 */
    int32_t extra_rows;   /* rows too many at the first layer */
    bool stopped;         /* the callback stopped the graph */
    bool uncompared;      /* rows are steered that the request's own are not */
} toy;

/* begin, all micro-batches, end; compares every row with the golden values. */
steerhook_status toy_decode(toy *t, const toy_row *rows, int32_t n, bool image);

/* The micro-batches alone. */
void toy_graphs(toy *t, const toy_row *rows, int32_t n);

/* A whole request on one sequence: prompt in chunks (image rows apart), then row by row. */
void toy_request(toy *t, const golden_request *request, int32_t seq, int32_t chunk,
                 bool all_outputs);

/* Compares verdicts and rules with the oracle's. */
void toy_check_verdicts(const toy *t, const golden_request *request, int32_t seq);

void toy_new(toy *t, const golden *g, int32_t n_ubatch, int32_t n_seq_max);

#endif
