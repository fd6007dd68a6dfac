/* What the rows of requests and batches may do, and every way in which a session fails. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "harness.h"

void test_sessions(const char *directory);

static int32_t prompt_rows(const golden_request *r, int32_t seq, toy_row *rows) {
    for (int32_t i = 0; i < r->n_prompt; i++) {
        rows[i] = (toy_row){r, seq, i, true};
    }
    return r->n_prompt;
}

static void begin(toy *t, int32_t seq, const golden_request *r) {
    CHECK_STATUS(steerhook_request_begin(t->session, seq, 0, r->n_prompt), STEERHOOK_OK);
}

/* Failed: every call says so and the callback stops graphs, until the session is cleared. */
static void check_failed(toy *t, steerhook_status status) {
    const steerhook_batch batch = {.n_tokens = 1};
    steerhook_verdict verdict;
    struct ggml_tensor other = {"ffn_out-0", 0, NULL};
    CHECK(steerhook_session_error(t->session)[0] != '\0');
    CHECK_STATUS(steerhook_session_status(t->session), status);
    CHECK_STATUS(steerhook_batch_begin(t->session, &batch), status);
    CHECK_STATUS(steerhook_batch_end(t->session), status);
    CHECK_STATUS(steerhook_batch_cancel(t->session), status);
    CHECK_STATUS(steerhook_request_begin(t->session, 0, 0, 5), status);
    CHECK_STATUS(steerhook_request_end(t->session, 0), status);
    CHECK_STATUS(steerhook_request_copy(t->session, 0, 1), status);
    CHECK_STATUS(steerhook_set_threshold(t->session, "p", 0.5), status);
    CHECK(steerhook_verdicts(t->session, 0, &verdict, 1) == -(int32_t)status);
    CHECK(steerhook_eval(&other, true, t->session) && !steerhook_eval(&other, false, t->session));
    CHECK_STATUS(steerhook_session_clear(t->session), STEERHOOK_OK);
    CHECK(steerhook_session_error(t->session)[0] == '\0');
    CHECK_STATUS(steerhook_batch_begin(t->session, &batch), STEERHOOK_NO_REQUEST);
    CHECK_STATUS(steerhook_session_clear(t->session), STEERHOOK_OK);
    *t = (toy){.session = t->session, .g = t->g, .n_ubatch = t->n_ubatch};
}

/* Architectures whose nodes are not what their names say; head_guard reads blocks and steers the
 * head. */
static void test_architectures(const golden *g) {
    static const char *const refused[] = {"nanbeige", "hrm_text", "minicpm3",
                                          "plamo3",   "plamo2",   "deepseek4",
                                          "qwen4exp", "eagle3",   "gemma4-assistant"};
    static const char *const taken[] = {"llama", "gpt-oss", "gemma4", "cohere2moe", "qwen3vl", ""};
    steerhook_model model = {NULL, g->d, g->n_layer, 8, 2};
    char error[256] = "";
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++) {
        model.architecture = refused[i];
        CHECK(steerhook_session_new(g->package, &model, &fake_ggml, error, sizeof error) == NULL);
        CHECK(strstr(error, refused[i]) != NULL && strstr(error, "site") != NULL);
    }
    for (size_t i = 0; i < sizeof taken / sizeof *taken; i++) {
        model.architecture = taken[i];
        steerhook_session *s =
            steerhook_session_new(g->package, &model, &fake_ggml, error, sizeof error);
        CHECK(s != NULL);
        steerhook_session_free(s);
    }
    model.n_deepstack = -1; /* features are added where no node shows it */
    CHECK(steerhook_session_new(g->package, &model, &fake_ggml, error, sizeof error) == NULL);
    CHECK(strstr(error, "features of an image") != NULL);
}

static void test_models(const golden *g) {
    char error[256] = "";
    steerhook_model model = {NULL, g->d + 1, g->n_layer, 8, 2};
    CHECK(steerhook_session_new(g->package, &model, &fake_ggml, error, sizeof error) == NULL);
    CHECK(strstr(error, "n_embd") != NULL);
    model = (steerhook_model){NULL, g->d, g->n_layer - 1, 8, 2};
    CHECK(steerhook_session_new(g->package, &model, &fake_ggml, error, sizeof error) == NULL);
    CHECK(strstr(error, "n_layer") != NULL);
    model = (steerhook_model){NULL, g->d, g->n_layer, 0, 2};
    CHECK(steerhook_session_new(g->package, &model, &fake_ggml, error, sizeof error) == NULL);
    model = (steerhook_model){NULL, g->d, g->n_layer, 8, 0};
    CHECK(steerhook_session_new(g->package, &model, &fake_ggml, NULL, 0) == NULL);
    CHECK(steerhook_session_new(NULL, &model, &fake_ggml, error, sizeof error) == NULL);
    CHECK(steerhook_package_load("/dev/null", error, sizeof error) == NULL);
    CHECK(steerhook_package_load("/none", error, sizeof error) == NULL);
    CHECK(steerhook_package_load("/", error, sizeof error) == NULL);
    steerhook_session_free(NULL);
    steerhook_package_free(NULL);
}

/* layer_guard reads prompt_end-2, a mean at depth 1 and prompt_end at depth 2. */
static void test_requests(const golden *g) {
    toy t;
    toy_new(&t, g, 8, 2);
    steerhook_package_info info = steerhook_package_describe(g->package);
    CHECK(info.whole_prompt && info.steers_layers && info.lowest_offset == -2);
    CHECK_STATUS(steerhook_request_begin(t.session, 2, 0, 5), STEERHOOK_SEQUENCE);
    CHECK_STATUS(steerhook_request_begin(t.session, -1, 0, 5), STEERHOOK_SEQUENCE);
    CHECK_STATUS(steerhook_request_begin(t.session, 0, 5, 5), STEERHOOK_PROMPT);
    CHECK_STATUS(steerhook_request_begin(t.session, 0, -1, 5), STEERHOOK_PROMPT);
    CHECK_STATUS(steerhook_request_begin(t.session, 0, 0, 0), STEERHOOK_PROMPT);
    /* Shorter than a reading needs: the probe cannot judge it, and fires. */
    CHECK_STATUS(steerhook_request_begin(t.session, 0, 0, 2), STEERHOOK_OK);
    steerhook_verdict verdict;
    CHECK(steerhook_verdicts(t.session, 0, &verdict, 1) == 1 && verdict.fired);
    CHECK(isnan(verdict.score) && strstr(verdict.unjudged, "shorter") != NULL);
    CHECK_STATUS(steerhook_request_begin(t.session, 0, 0, 3), STEERHOOK_OK);
    CHECK(steerhook_verdicts(t.session, 0, NULL, 0) == 0);
    /* A refusal ends the old request and leaves the session sound. */
    CHECK_STATUS(steerhook_request_begin(t.session, 0, 1, 9), STEERHOOK_CACHED);
    CHECK(strstr(steerhook_session_error(t.session), "probe p") != NULL);
    CHECK_STATUS(steerhook_request_copy(t.session, 0, 1), STEERHOOK_NO_REQUEST);
    begin(&t, 1, &g->requests[0]);
    CHECK_STATUS(steerhook_request_end(t.session, 1), STEERHOOK_OK);
    CHECK_STATUS(steerhook_batch_end(t.session), STEERHOOK_ORDER);
    check_failed(&t, STEERHOOK_ORDER);
    steerhook_session_free(t.session);
}

/* A follow-up turn: part of the prompt is in the cache, and the probe reads its end only. */
static void test_cached(const golden *g) {
    const golden_request *r = &g->requests[0];
    toy t;
    toy_row rows[128];
    toy_new(&t, g, 8, 2);
    CHECK_STATUS(steerhook_request_begin(t.session, 1, 2, r->n_prompt), STEERHOOK_OK);
    int32_t n = prompt_rows(r, 1, rows);
    CHECK_STATUS(toy_decode(&t, rows + 2, n - 2, false), STEERHOOK_OK);
    toy_check_verdicts(&t, r, 1);
    steerhook_session_free(t.session);
}

static void test_thresholds(const golden *g) {
    const golden_request *r = &g->requests[0];
    toy t;
    toy_row rows[128];
    steerhook_verdict verdict;
    bool found = true;
    toy_new(&t, g, 64, 1);
    CHECK_STATUS(steerhook_set_threshold(t.session, "nobody", 1.0), STEERHOOK_ARGUMENT);
    CHECK_STATUS(steerhook_set_threshold(t.session, "p", (double)NAN), STEERHOOK_ARGUMENT);
    CHECK_STATUS(steerhook_calibrate(t.session, "llama.cpp", "Q8_0", NULL, &found), STEERHOOK_OK);
    CHECK(!found);
    CHECK_STATUS(steerhook_calibrate(t.session, "llama.cpp", "Q4_1", NULL, &found), STEERHOOK_OK);
    CHECK(found);
    const char *checkpoint = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";
    CHECK_STATUS(steerhook_calibrate(t.session, "llama.cpp", "Q5_1", NULL, &found), STEERHOOK_OK);
    CHECK(!found);
    CHECK_STATUS(steerhook_calibrate(t.session, "llama.cpp", "Q5_1", checkpoint + 1, &found),
                 STEERHOOK_OK);
    CHECK(!found);
    CHECK_STATUS(steerhook_calibrate(t.session, "llama.cpp", "Q5_1", checkpoint, &found),
                 STEERHOOK_OK);
    CHECK(found);
    begin(&t, 0, r);
    const steerhook_batch batch = {.n_tokens = r->n_prompt};
    CHECK(steerhook_verdicts(t.session, 0, &verdict, 1) == 0);
    CHECK_STATUS(steerhook_batch_begin(t.session, &batch), STEERHOOK_OK);
    CHECK_STATUS(steerhook_request_begin(t.session, 0, 0, 9), STEERHOOK_ORDER);
    CHECK_STATUS(steerhook_batch_cancel(t.session), STEERHOOK_OK);
    CHECK_STATUS(steerhook_set_threshold(t.session, "p", 2.0), STEERHOOK_OK);
    prompt_rows(r, 0, rows);
    for (int32_t i = 0; i < r->n_prompt; i++) {
        rows[i].output = i == r->n_prompt - 1; /* what output == NULL means */
    }
    steerhook_batch_begin(t.session, &batch);
    if (r->rule_fired[0] == 0) {
        toy_graphs(&t, rows, r->n_prompt);
        CHECK_STATUS(steerhook_batch_end(t.session), STEERHOOK_OK);
        CHECK(steerhook_verdicts(t.session, 0, &verdict, 1) == 1);
        CHECK(verdict.threshold == 2.0 && !verdict.fired && strcmp(verdict.probe, "p") == 0);
    }
    steerhook_session_free(t.session);
}

/* The cost of a quiet sequence: after a prompt end that fired nothing, no node is wanted. */
static void test_quiet(const golden *g) {
    toy t;
    toy_row rows[128];
    int quiet = 0;
    toy_new(&t, g, 512, 1);
    for (int32_t i = 0; i < g->n_requests; i++) {
        const golden_request *r = &g->requests[i];
        begin(&t, 0, r);
        CHECK_STATUS(toy_decode(&t, rows, prompt_rows(r, 0, rows), false), STEERHOOK_OK);
        CHECK(t.asked_true == (r->rule_fired[0] ? 2 : 1));
        for (int32_t row = r->n_prompt; row < r->n_rows; row++) {
            rows[0] = (toy_row){r, 0, row, true};
            CHECK_STATUS(toy_decode(&t, rows, 1, false), STEERHOOK_OK);
            CHECK(t.asked_true == (r->rule_fired[0] ? 1 : 0));
            quiet += !r->rule_fired[0];
        }
    }
    CHECK(quiet > 0);
    steerhook_session_free(t.session);
}

static void test_lost(const golden *g) {
    const golden_request *r = &g->requests[0];
    toy t;
    toy_row rows[128];
    toy_new(&t, g, 8, 2);
    int32_t n = prompt_rows(r, 0, rows);
    /* A node that is never seen, at a read layer, at a written one. */
    for (int32_t depth = 1; depth <= 4; depth += 1 + (depth == 2)) {
        begin(&t, 0, r);
        t.lose_depth = depth;
        steerhook_status status = toy_decode(&t, rows, n, false);
        CHECK(status == STEERHOOK_HOOK_LOST);
        check_failed(&t, STEERHOOK_HOOK_LOST);
    }
    /* Too many rows at a node: the graph stops. */
    begin(&t, 0, r);
    t.extra_rows = 1;
    CHECK_STATUS(toy_decode(&t, rows, n, false), STEERHOOK_ROWS);
    CHECK(t.stopped);
    check_failed(&t, STEERHOOK_ROWS);
    /* Graphs without a batch, and a batch whose graphs stop half-way. */
    begin(&t, 0, r);
    toy_graphs(&t, rows, n);
    CHECK(t.stopped);
    check_failed(&t, STEERHOOK_HOOK_LOST);
    begin(&t, 0, r);
    const steerhook_batch batch = {.n_tokens = n};
    CHECK_STATUS(steerhook_batch_begin(t.session, &batch), STEERHOOK_OK);
    for (int32_t i = 0; i < n; i++) {
        rows[i].output = i == n - 1;
    }
    toy_graphs(&t, rows, n > 8 ? 8 : n - 1);
    steerhook_status status = n > 8 ? steerhook_batch_end(t.session) : STEERHOOK_ROWS;
    CHECK(status == STEERHOOK_ROWS || status == STEERHOOK_HOOK_LOST);
    steerhook_session_clear(t.session);
    /* Decoding failed after rows were read: not to be tried again. */
    begin(&t, 0, r);
    CHECK_STATUS(steerhook_batch_begin(t.session, &batch), STEERHOOK_OK);
    toy_graphs(&t, rows, n > 8 ? 8 : n);
    CHECK_STATUS(steerhook_batch_cancel(t.session), STEERHOOK_HOOK_LOST);
    check_failed(&t, STEERHOOK_HOOK_LOST);
    steerhook_session_free(t.session);
}

/* A node asked for but not delivered, and one that somebody else asked for. */
static void test_observer(const golden *g) {
    toy t;
    toy_new(&t, g, 512, 1);
    const golden_request *r = &g->requests[0];
    const steerhook_batch batch = {.n_tokens = r->n_prompt};
    struct ggml_tensor other = {"ffn_out-0", 0, NULL};
    struct ggml_tensor node = {"l_out-1", (size_t)(r->n_prompt * g->d) * sizeof(float),
                               r->input[2]};
    begin(&t, 0, r);
    CHECK_STATUS(steerhook_batch_begin(t.session, &batch), STEERHOOK_OK);
    CHECK(!steerhook_eval(&other, true, t.session) && steerhook_eval(&other, false, t.session));
    CHECK(steerhook_eval(&node, true, t.session));
    CHECK_STATUS(steerhook_batch_end(t.session), STEERHOOK_HOOK_LOST);
    check_failed(&t, STEERHOOK_HOOK_LOST);
    steerhook_session_free(t.session);
}

/* image_guard reads the head: its row must be an output. */
static void test_outputs(const golden *g) {
    const golden_request *r = &g->requests[0];
    toy t;
    toy_row rows[128];
    toy_new(&t, g, 8, 2);
    begin(&t, 0, r);
    int32_t n = prompt_rows(r, 0, rows);
    rows[n - 1].output = false;
    CHECK_STATUS(toy_decode(&t, rows, n, false), STEERHOOK_NO_OUTPUT);
    check_failed(&t, STEERHOOK_NO_OUTPUT);
    steerhook_session_free(t.session);
}

/* Batches with rows of several sequences; the lists are given as text, one row a letter:
 * 'a' sequence 0, 'b' sequence 1, '*' both. */
static steerhook_status shared(toy *t, const golden_request *r, int32_t row, const char *list) {
    static int32_t sequences[2][2] = {{0, 1}, {1, 0}};
    int32_t n = (int32_t)strlen(list);
    int32_t counts[64];
    int32_t *seqs[64];
    int8_t outputs[64];
    toy_row rows[64];
    int32_t next[2] = {row, row};
    for (int32_t i = 0; i < n; i++) {
        counts[i] = list[i] == '*' ? 2 : 1;
        seqs[i] = sequences[list[i] == 'b'];
        outputs[i] = 1;
        rows[i] = (toy_row){r, 0, next[list[i] == 'b'], true};
        next[0] += list[i] != 'b';
        next[1] += list[i] != 'a';
    }
    const steerhook_batch batch = {n, counts, seqs, outputs, false};
    steerhook_status status = steerhook_batch_begin(t->session, &batch);
    if (status != STEERHOOK_OK) {
        return status;
    }
    toy_graphs(t, rows, n);
    return steerhook_batch_end(t->session);
}

static void test_shared(const golden *g) {
    const golden_request *r = &g->requests[1]; /* a prompt of 3 rows and a generated one */
    toy t;
    toy_new(&t, g, 2, 2);
    CHECK(r->n_prompt == 3 && r->n_rows == 4);
    begin(&t, 0, r);
    begin(&t, 1, r);
    CHECK_STATUS(shared(&t, r, 0, "**"), STEERHOOK_OK);
    CHECK_STATUS(shared(&t, r, 2, "*"), STEERHOOK_OK);
    toy_check_verdicts(&t, r, 0);
    toy_check_verdicts(&t, r, 1);
    CHECK_STATUS(shared(&t, r, 3, "*"), STEERHOOK_OK);
    CHECK_STATUS(shared(&t, r, 3, "ab"), STEERHOOK_OK);
    /* Out of step: in one batch, and across batches. */
    begin(&t, 0, r);
    begin(&t, 1, r);
    CHECK_STATUS(shared(&t, r, 0, "ab*"), STEERHOOK_SHARED_ROW);
    check_failed(&t, STEERHOOK_SHARED_ROW);
    begin(&t, 0, r);
    begin(&t, 1, r);
    CHECK_STATUS(shared(&t, r, 0, "a"), STEERHOOK_OK);
    CHECK_STATUS(shared(&t, r, 1, "*"), STEERHOOK_SHARED_ROW);
    check_failed(&t, STEERHOOK_SHARED_ROW);
    /* In step, but with other contents behind them. */
    if (steerhook_package_describe(g->package).whole_prompt) {
        const toy_row first[2] = {{r, 0, 0, true}, {r, 1, 1, true}};
        begin(&t, 0, r);
        begin(&t, 1, r);
        CHECK_STATUS(toy_decode(&t, first, 2, false), STEERHOOK_OK);
        CHECK_STATUS(shared(&t, r, 1, "*"), STEERHOOK_SHARED_ROW);
        check_failed(&t, STEERHOOK_SHARED_ROW);
    }
    begin(&t, 0, r);
    CHECK_STATUS(shared(&t, r, 0, "*"), STEERHOOK_NO_REQUEST);
    check_failed(&t, STEERHOOK_NO_REQUEST);
    /* n > 1: the prompt once, then a copy of the request. */
    begin(&t, 0, r);
    CHECK_STATUS(shared(&t, r, 0, "aa"), STEERHOOK_OK);
    CHECK_STATUS(steerhook_request_copy(t.session, 0, 1), STEERHOOK_OK);
    CHECK_STATUS(shared(&t, r, 2, "*"), STEERHOOK_OK);
    CHECK_STATUS(shared(&t, r, 3, "ba"), STEERHOOK_OK);
    toy_check_verdicts(&t, r, 1);
    steerhook_session_free(t.session);
}

/* Rows leave the cache: only a cut into a prompt ends its request. */
static void test_cut(const golden *g) {
    const golden_request *r = &g->requests[0];
    int32_t n = r->n_prompt;
    toy t;
    toy_row rows[128];
    toy_new(&t, g, 512, 2);
    CHECK(r->n_rows >= n + 2);
    prompt_rows(r, 0, rows);
    rows[n] = rows[n + 1] = (toy_row){r, 0, n, true};
    rows[n + 1].row = n + 1;
    begin(&t, 0, r);
    CHECK_STATUS(toy_decode(&t, rows, 2, false), STEERHOOK_OK);
    CHECK_STATUS(steerhook_request_cut(t.session, 0, 2, -1), STEERHOOK_OK); /* nothing there */
    CHECK_STATUS(steerhook_request_cut(t.session, 1, 0, -1), STEERHOOK_OK); /* another sequence */
    CHECK_STATUS(toy_decode(&t, rows + 2, n - 2, false), STEERHOOK_OK);
    CHECK_STATUS(steerhook_request_cut(t.session, 0, n, -1), STEERHOOK_OK);
    CHECK_STATUS(toy_decode(&t, rows + n, 2, false), STEERHOOK_OK);
    CHECK_STATUS(steerhook_request_cut(t.session, 0, n + 1, -1), STEERHOOK_OK); /* a draft row */
    CHECK_STATUS(toy_decode(&t, rows + n + 1, 1, false), STEERHOOK_OK);
    CHECK_STATUS(steerhook_request_cut(t.session, 0, 1, 3), STEERHOOK_OK); /* a context shift */
    CHECK_STATUS(toy_decode(&t, rows + n + 1, 1, false), STEERHOOK_OK);
    CHECK_STATUS(steerhook_request_cut(t.session, 0, n - 3, -1), STEERHOOK_OK);
    CHECK_STATUS(toy_decode(&t, rows + n - 1, 1, false), STEERHOOK_NO_REQUEST);
    steerhook_session_clear(t.session);
    begin(&t, 0, r);
    CHECK_STATUS(toy_decode(&t, rows, 2, false), STEERHOOK_OK);
    CHECK_STATUS(steerhook_request_cut(t.session, -1, 0, 1), STEERHOOK_OK); /* of an open prompt */
    CHECK_STATUS(toy_decode(&t, rows + 2, 1, false), STEERHOOK_NO_REQUEST);
    CHECK_STATUS(steerhook_request_cut(t.session, 2, 0, -1), STEERHOOK_NO_REQUEST);
    steerhook_session_clear(t.session);
    CHECK_STATUS(steerhook_request_cut(t.session, 2, 0, -1), STEERHOOK_SEQUENCE);
    CHECK_STATUS(steerhook_request_cut(NULL, 0, 0, -1), STEERHOOK_ARGUMENT);
    steerhook_session_free(t.session);
}

/* scored's first rule always steers layer 3: rows of its requests from the prompt end on serve no
 * later prompt, as long as they are in the cache. Its probes read the last two rows. */
static void test_steered_cache(const golden *g) {
    const golden_request *r = &g->requests[0];
    int32_t n = r->n_prompt;
    toy t;
    toy_row rows[128];
    toy_new(&t, g, 512, 3);
    CHECK(steerhook_first_steered(t.session, 0) == -1);
    CHECK(steerhook_first_steered(NULL, 0) == -1 && steerhook_first_steered(t.session, 9) == -1);
    begin(&t, 0, r);
    CHECK_STATUS(toy_decode(&t, rows, prompt_rows(r, 0, rows), false), STEERHOOK_OK);
    CHECK(steerhook_first_steered(t.session, 0) == n - 1);
    CHECK_STATUS(steerhook_request_copy(t.session, 0, 1), STEERHOOK_OK);
    CHECK_STATUS(steerhook_request_end(t.session, 0), STEERHOOK_OK);
    CHECK_STATUS(steerhook_request_copy(t.session, 0, 2), STEERHOOK_NO_REQUEST);
    for (int32_t seq = 0; seq < 3; seq++) {
        CHECK_STATUS(steerhook_request_begin(t.session, seq, n, n + 3), STEERHOOK_STEERED);
    }
    CHECK_STATUS(steerhook_request_cut(t.session, 0, n, -1), STEERHOOK_OK);
    CHECK(steerhook_first_steered(t.session, 0) == n - 1);
    CHECK_STATUS(steerhook_request_cut(t.session, 0, n - 1, -1), STEERHOOK_OK);
    CHECK(steerhook_first_steered(t.session, 0) == -1);
    /* A copy onto a sequence with steered rows of its own leaves its mark, and so the other way. */
    CHECK_STATUS(steerhook_request_copy(t.session, 0, 1), STEERHOOK_NO_REQUEST);
    CHECK(steerhook_first_steered(t.session, 1) == n - 1);
    /* Rows in front of steered ones go: these move up. */
    CHECK_STATUS(steerhook_request_cut(t.session, 2, 1, 2), STEERHOOK_OK);
    CHECK(steerhook_first_steered(t.session, 2) == n - 2);
    CHECK_STATUS(steerhook_request_cut(t.session, 2, n, n + 1), STEERHOOK_OK);
    CHECK(steerhook_first_steered(t.session, 2) == n - 2);
    CHECK_STATUS(steerhook_request_begin(t.session, 1, n - 1, n + 3), STEERHOOK_OK);
    CHECK_STATUS(steerhook_session_clear(t.session), STEERHOOK_OK);
    CHECK(steerhook_first_steered(t.session, 2) == -1);
    steerhook_session_free(t.session);
}

/* While paused every node is left alone and nothing can be decoded as a request. */
static void test_pause(const golden *g) {
    const golden_request *r = &g->requests[0];
    const steerhook_batch batch = {.n_tokens = r->n_prompt};
    struct ggml_tensor head = {"result_norm", 0, NULL};
    toy t;
    toy_new(&t, g, 64, 1);
    begin(&t, 0, r);
    CHECK_STATUS(steerhook_pause(t.session, true), STEERHOOK_OK);
    CHECK(!steerhook_eval(&head, true, t.session) && steerhook_eval(&head, false, t.session));
    CHECK_STATUS(steerhook_batch_begin(t.session, &batch), STEERHOOK_ORDER);
    CHECK_STATUS(steerhook_pause(t.session, true), STEERHOOK_ORDER); /* it failed */
    CHECK_STATUS(steerhook_pause(t.session, false), STEERHOOK_OK);
    check_failed(&t, STEERHOOK_ORDER);
    begin(&t, 0, r);
    CHECK_STATUS(steerhook_batch_begin(t.session, &batch), STEERHOOK_OK);
    CHECK_STATUS(steerhook_pause(t.session, true), STEERHOOK_ORDER);
    CHECK_STATUS(steerhook_batch_cancel(t.session), STEERHOOK_OK);
    CHECK_STATUS(steerhook_pause(NULL, true), STEERHOOK_ARGUMENT);
    steerhook_session_free(t.session);
}

/* head_guard's probe reads depth 2 at the prompt end: its reading is that very row. */
static void test_readings(const golden *g) {
    const golden_request *r = &g->requests[0];
    double out[64];
    toy t;
    toy_row rows[128];
    toy_new(&t, g, 64, 1);
    begin(&t, 0, r);
    CHECK(g->d <= 64 && steerhook_readings(t.session, 0, "p", out, 64) == 0);
    CHECK_STATUS(toy_decode(&t, rows, prompt_rows(r, 0, rows), false), STEERHOOK_OK);
    CHECK(steerhook_readings(t.session, 0, "p", NULL, 0) == g->d);
    out[1] = -7.0;
    CHECK(steerhook_readings(t.session, 0, "p", out, 1) == g->d && out[1] == -7.0);
    CHECK(steerhook_readings(t.session, 0, "p", out, 64) == g->d);
    for (int32_t i = 0; i < g->d; i++) {
        CHECK(out[i] == (double)r->input[2][(r->n_prompt - 1) * g->d + i]);
    }
    CHECK(steerhook_readings(t.session, 1, "p", out, 64) == -(int64_t)STEERHOOK_ARGUMENT);
    CHECK(steerhook_readings(t.session, 0, "nobody", out, 64) == -(int64_t)STEERHOOK_ARGUMENT);
    CHECK(steerhook_readings(t.session, 0, "p", NULL, 64) == -(int64_t)STEERHOOK_ARGUMENT);
    CHECK(steerhook_readings(NULL, 0, "p", out, 64) == -(int64_t)STEERHOOK_ARGUMENT);
    steerhook_session_free(t.session);
}

static void test_batches(const golden *g) {
    toy t;
    toy_new(&t, g, 8, 2);
    begin(&t, 0, &g->requests[0]);
    int32_t count = 1;
    int32_t seq = 2;
    int32_t twice[2] = {0, 0};
    int32_t *list = &seq;
    const steerhook_batch wrong[] = {{.n_tokens = 0}, {.n_tokens = 1, .n_seq_id = &count}};
    for (size_t i = 0; i < 2; i++) {
        CHECK_STATUS(steerhook_batch_begin(t.session, &wrong[i]), STEERHOOK_ARGUMENT);
        check_failed(&t, STEERHOOK_ARGUMENT);
        begin(&t, 0, &g->requests[0]);
    }
    steerhook_batch batch = {.n_tokens = 1, .n_seq_id = &count, .seq_id = &list};
    CHECK_STATUS(steerhook_batch_begin(t.session, &batch), STEERHOOK_SEQUENCE);
    check_failed(&t, STEERHOOK_SEQUENCE);
    begin(&t, 0, &g->requests[0]);
    count = 2;
    list = twice;
    CHECK_STATUS(steerhook_batch_begin(t.session, &batch), STEERHOOK_SEQUENCE);
    check_failed(&t, STEERHOOK_SEQUENCE);
    begin(&t, 0, &g->requests[0]);
    batch = (steerhook_batch){.n_tokens = 1};
    CHECK_STATUS(steerhook_batch_begin(t.session, &batch), STEERHOOK_OK);
    CHECK_STATUS(steerhook_batch_begin(t.session, &batch), STEERHOOK_ORDER);
    check_failed(&t, STEERHOOK_ORDER);
    CHECK_STATUS(steerhook_batch_begin(NULL, &batch), STEERHOOK_ARGUMENT);
    CHECK(strcmp(steerhook_status_name(STEERHOOK_ORDER), "ORDER") == 0);
    CHECK(strcmp(steerhook_status_name((steerhook_status)99), "UNKNOWN") == 0);
    steerhook_session_free(t.session);
}

/* The prompt as a program sends it: logits are asked for at its end only. */
static int32_t quiet_rows(const golden_request *r, toy_row *rows) {
    int32_t n = prompt_rows(r, 0, rows);
    for (int32_t i = 0; i + 1 < n; i++) {
        rows[i].output = false;
    }
    return n;
}

/* Every probe fires because it could not judge. */
static void check_unjudged(const toy *t) {
    steerhook_verdict verdicts[8];
    int32_t count = steerhook_verdicts(t->session, 0, verdicts, 8);
    CHECK(count > 0);
    for (int32_t i = 0; i < count; i++) {
        CHECK(verdicts[i].fired && isnan(verdicts[i].score) && verdicts[i].unjudged[0] != '\0');
    }
}

/* Requests known by their batches: each last output row is judged as the prompt's end; layer_guard,
 * as in test_requests. */
static void test_open(const golden *g) {
    const golden_request *r = &g->requests[0];
    toy t;
    toy_row rows[128];
    toy_new(&t, g, 8, 2);
    int32_t n = quiet_rows(r, rows), n_prompt;
    CHECK(steerhook_request_stage(t.session, 0) == STEERHOOK_NONE);
    CHECK(steerhook_request_stage(t.session, 2) == STEERHOOK_NONE);
    CHECK(steerhook_request_rows(t.session, 2, &n_prompt) == 0);
    CHECK_STATUS(steerhook_request_open(t.session, 0, -1, STEERHOOK_KEEP_NONE),
                 STEERHOOK_ARGUMENT);
    CHECK_STATUS(steerhook_keep_rows(t.session, true), STEERHOOK_OK);
    CHECK_STATUS(steerhook_request_open(t.session, 0, 0, STEERHOOK_KEEP_NONE), STEERHOOK_OK);
    CHECK_STATUS(toy_decode(&t, rows, n - 4, false), STEERHOOK_OK);
    CHECK(steerhook_request_stage(t.session, 0) == STEERHOOK_PROMPTING);
    /* No room in the cache: the same rows come again, in smaller batches. */
    const int8_t output[] = {0, 0, 0, 1};
    const steerhook_batch batch = {.n_tokens = 4, .output = output};
    CHECK_STATUS(steerhook_batch_begin(t.session, &batch), STEERHOOK_OK);
    CHECK_STATUS(steerhook_batch_cancel(t.session), STEERHOOK_OK);
    CHECK_STATUS(toy_decode(&t, rows + n - 4, 1, false), STEERHOOK_OK);
    CHECK_STATUS(toy_decode(&t, rows + n - 3, 3, false), STEERHOOK_OK);
    CHECK(steerhook_request_stage(t.session, 0) == STEERHOOK_ANSWERING);
    CHECK(steerhook_request_rows(t.session, 0, &n_prompt) == n && n_prompt == n);
    toy_check_verdicts(&t, r, 0);
    /* The next prompt begins with rows of this one: their mean was kept. */
    CHECK_STATUS(steerhook_request_cut(t.session, 0, n - 4, -1), STEERHOOK_OK);
    CHECK(steerhook_request_stage(t.session, 0) == STEERHOOK_NONE);
    CHECK_STATUS(steerhook_request_open(t.session, 0, n - 4, STEERHOOK_KEEP_NONE), STEERHOOK_OK);
    CHECK_STATUS(toy_decode(&t, rows + n - 4, 4, false), STEERHOOK_OK);
    toy_check_verdicts(&t, r, 0);
    /* The reading at the prompt end minus two was in an earlier batch: it was kept. */
    for (int32_t last = 1; last <= 2; last++) {
        CHECK_STATUS(steerhook_request_cut(t.session, -1, 0, -1), STEERHOOK_OK);
        CHECK_STATUS(steerhook_request_open(t.session, 0, 0, STEERHOOK_KEEP_NONE), STEERHOOK_OK);
        CHECK_STATUS(toy_decode(&t, rows, n - last, false), STEERHOOK_OK);
        CHECK_STATUS(toy_decode(&t, rows + n - last, last, false), STEERHOOK_OK);
        toy_check_verdicts(&t, r, 0);
        /* The same prompt again, whose rows are all cached but the last ones. */
        CHECK_STATUS(steerhook_request_cut(t.session, 0, n - last, -1), STEERHOOK_OK);
        CHECK_STATUS(steerhook_request_open(t.session, 0, n - last, STEERHOOK_KEEP_NONE),
                     STEERHOOK_OK);
        CHECK_STATUS(toy_decode(&t, rows + n - last, last, false), STEERHOOK_OK);
        toy_check_verdicts(&t, r, 0);
        CHECK_STATUS(steerhook_request_cut(t.session, 0, n - last, -1), STEERHOOK_OK);
        CHECK_STATUS(steerhook_request_begin(t.session, 0, n - last, n), STEERHOOK_OK);
        CHECK_STATUS(toy_decode(&t, rows + n - last, last, false), STEERHOOK_OK);
        toy_check_verdicts(&t, r, 0);
    }
    /* More cached rows than were kept: nobody knows what they held. */
    CHECK_STATUS(steerhook_request_cut(t.session, 0, n - 4, -1), STEERHOOK_OK);
    CHECK_STATUS(steerhook_request_open(t.session, 0, n - 3, STEERHOOK_KEEP_NONE), STEERHOOK_OK);
    t.uncompared = true;
    CHECK_STATUS(toy_decode(&t, rows + n - 3, 3, false), STEERHOOK_OK);
    check_unjudged(&t);
    steerhook_session_free(t.session);
}

/* A row that was judged was none's end: the prompt goes on, and is judged as if it had come whole.
 * Single rows, and rows behind the last output, are prompts like any other. */
static void test_open_goes_on(const golden *g) {
    const golden_request *r = &g->requests[0];
    toy t;
    toy_row rows[128];
    toy_new(&t, g, 8, 2);
    int32_t n = quiet_rows(r, rows);
    CHECK_STATUS(steerhook_keep_rows(t.session, true), STEERHOOK_OK);
    for (int32_t first = 1; first < n; first += first < 4 ? 1 : 5) {
        CHECK_STATUS(steerhook_request_cut(t.session, 0, 0, -1), STEERHOOK_OK);
        CHECK_STATUS(steerhook_request_open(t.session, 0, 0, STEERHOOK_KEEP_NONE), STEERHOOK_OK);
        rows[first - 1].output = t.uncompared = true;
        CHECK_STATUS(toy_decode(&t, rows, first, false), STEERHOOK_OK);
        rows[first - 1].output = t.uncompared = false;
        CHECK(steerhook_request_stage(t.session, 0) == STEERHOOK_ANSWERING);
        /* What fired for it is not kept: its logits were not used. */
        int32_t steered = steerhook_first_steered(t.session, 0);
        CHECK(steered == -1 || steered == first - 1);
        int32_t from = steered == -1 ? first : first - 1; /* evaluated again if it was steered */
        CHECK_STATUS(steerhook_request_open(t.session, 0, from, STEERHOOK_KEEP_HELD),
                     STEERHOOK_OK);
        CHECK_STATUS(toy_decode(&t, rows + from, n - from, false), STEERHOOK_OK);
        toy_check_verdicts(&t, r, 0);
    }
    steerhook_session_free(t.session);
}

/* Rows of two sequences that take turns in the batch, computed one sequence after the other, in
 * several graphs. */
static void test_passes(const golden *g) {
    const golden_request *r = &g->requests[0], *q = &g->requests[1];
    for (int32_t size = 3; size < 64; size += 20) {
        toy t;
        toy_row rows[128], graph[128];
        int32_t order[128], *lists[128], counts[128], seqs[128];
        int8_t outputs[128];
        toy_new(&t, g, 64, 2);
        begin(&t, 0, r);
        begin(&t, 1, q);
        int32_t n = 0;
        for (int32_t i = 0; i < r->n_prompt || i < q->n_prompt; i++) {
            if (i < r->n_prompt) {
                rows[n++] = (toy_row){r, 0, i, i == r->n_prompt - 1};
            }
            if (i < q->n_prompt) {
                rows[n++] = (toy_row){q, 1, i, i == q->n_prompt - 1};
            }
        }
        int32_t next = 0;
        for (int32_t i = 0; i < n; i++) {
            seqs[i] = rows[i].seq;
            counts[i] = 1;
            lists[i] = &seqs[i];
            outputs[i] = rows[i].output;
        }
        for (int32_t seq = 0; seq < 2; seq++) {
            for (int32_t i = 0; i < n; i++) {
                if (rows[i].seq == seq) {
                    order[next++] = i;
                }
            }
        }
        const steerhook_batch batch = {n, counts, lists, outputs, false};
        CHECK_STATUS(steerhook_batch_begin(t.session, &batch), STEERHOOK_OK);
        for (int32_t from = 0; from < n; from += size) {
            int32_t count = n - from < size ? n - from : size;
            for (int32_t i = 0; i < count; i++) {
                graph[i] = rows[order[from + i]];
            }
            CHECK_STATUS(steerhook_pass(t.session, order + from, count), STEERHOOK_OK);
            toy_graphs(&t, graph, count);
        }
        CHECK_STATUS(steerhook_batch_end(t.session), STEERHOOK_OK);
        toy_check_verdicts(&t, r, 0);
        toy_check_verdicts(&t, q, 1);
        CHECK_STATUS(steerhook_pass(t.session, order, 1), STEERHOOK_ORDER);
        steerhook_session_free(t.session);
    }
}

/* A graph that was not announced, and rows that the batch does not have. */
static void test_strange_passes(const golden *g) {
    const golden_request *r = &g->requests[0];
    toy t;
    toy_row rows[128];
    const int32_t none = 99, first = 0;
    toy_new(&t, g, 1, 1);
    int32_t n = prompt_rows(r, 0, rows);
    int8_t outputs[128];
    memset(outputs, 1, sizeof outputs);
    steerhook_batch batch = {.n_tokens = n, .output = outputs};
    begin(&t, 0, r);
    CHECK_STATUS(steerhook_batch_begin(t.session, &batch), STEERHOOK_OK);
    CHECK_STATUS(steerhook_pass(t.session, &first, 1), STEERHOOK_OK);
    toy_graphs(&t, rows, 2);
    CHECK_STATUS(steerhook_session_status(t.session), STEERHOOK_HOOK_LOST);
    check_failed(&t, STEERHOOK_HOOK_LOST);
    begin(&t, 0, r);
    CHECK_STATUS(steerhook_batch_begin(t.session, &batch), STEERHOOK_OK);
    CHECK_STATUS(steerhook_pass(t.session, &none, 1), STEERHOOK_ARGUMENT);
    check_failed(&t, STEERHOOK_ARGUMENT);
    steerhook_session_free(t.session);
}

/* Kept rows are copied to a sequence that never had a request, so has no room of its own. */
static void test_copy_kept(const golden *g) {
    const golden_request *r = &g->requests[0];
    toy t;
    toy_row rows[128];
    toy_new(&t, g, 8, 2);
    int32_t n = quiet_rows(r, rows);
    CHECK_STATUS(steerhook_keep_rows(t.session, false), STEERHOOK_OK);
    CHECK_STATUS(steerhook_request_begin(t.session, 0, 0, n), STEERHOOK_OK);
    CHECK_STATUS(toy_decode(&t, rows, n, false), STEERHOOK_OK);
    CHECK(steerhook_kept_rows(t.session, 0) == n);
    CHECK_STATUS(steerhook_request_copy(t.session, 0, 1), STEERHOOK_OK);
    CHECK(steerhook_kept_rows(t.session, 1) == n);
    toy_check_verdicts(&t, r, 1);
    steerhook_session_free(t.session);
}

/* A request leaves as bytes and comes back to another sequence of another session, with its verdicts
 * and rows; rows that are left out must be there already. */
static void test_saved(const golden *g) {
    const golden_request *r = &g->requests[0];
    toy t, other;
    toy_row rows[128];
    toy_new(&t, g, 8, 2);
    toy_new(&other, g, 8, 2);
    int32_t n = quiet_rows(r, rows);
    CHECK_STATUS(steerhook_keep_rows(t.session, true), STEERHOOK_OK);
    CHECK_STATUS(steerhook_keep_rows(other.session, true), STEERHOOK_OK);
    CHECK_STATUS(steerhook_request_begin(t.session, 0, 0, n), STEERHOOK_OK);
    CHECK_STATUS(toy_decode(&t, rows, n, false), STEERHOOK_OK);
    size_t size = steerhook_saved_size(t.session, 0, true);
    unsigned char *bytes = malloc(size), *broken = malloc(size);
    CHECK(bytes != NULL && broken != NULL);
    CHECK_STATUS(steerhook_save(t.session, 0, true, bytes, size - 1), STEERHOOK_ARGUMENT);
    CHECK_STATUS(steerhook_save(t.session, 5, true, bytes, size), STEERHOOK_SEQUENCE);
    CHECK_STATUS(steerhook_save(t.session, 0, true, bytes, size), STEERHOOK_OK);
    CHECK_STATUS(steerhook_load(other.session, 1, bytes, size), STEERHOOK_OK);
    CHECK(steerhook_kept_rows(other.session, 1) == n);
    CHECK(steerhook_request_stage(other.session, 1) == STEERHOOK_ANSWERING);
    CHECK(steerhook_first_steered(other.session, 1) == steerhook_first_steered(t.session, 0));
    toy_check_verdicts(&other, r, 1);
    /* Some rows earlier, and on with the same prompt: the means are of all its rows. */
    CHECK_STATUS(steerhook_request_cut(other.session, 1, n - 2, -1), STEERHOOK_OK);
    CHECK_STATUS(steerhook_request_begin(other.session, 1, n - 2, n), STEERHOOK_OK);
    for (int32_t i = 0; i < n; i++) {
        rows[i].seq = 1;
    }
    CHECK_STATUS(toy_decode(&other, rows + n - 2, 2, false), STEERHOOK_OK);
    toy_check_verdicts(&other, r, 1);
    size_t part = steerhook_saved_size(t.session, 0, false);
    CHECK(part < size);
    CHECK_STATUS(steerhook_save(t.session, 0, false, bytes, part), STEERHOOK_OK);
    CHECK_STATUS(steerhook_load(other.session, 1, bytes, part), STEERHOOK_OK);
    CHECK(steerhook_kept_rows(other.session, 1) == n);
    toy_check_verdicts(&other, r, 1);
    CHECK_STATUS(steerhook_load(other.session, 0, bytes, part), STEERHOOK_OK);
    CHECK(steerhook_kept_rows(other.session, 0) == 0);
    /* Bytes of another writer: refused, or taken for what a session could have written. */
    CHECK_STATUS(steerhook_save(t.session, 0, true, bytes, size), STEERHOOK_OK);
    for (size_t i = 0; i < size; i += i < 512 ? 1 : 97) {
        memcpy(broken, bytes, size);
        broken[i] ^= (unsigned char)(1u << (i % 8));
        steerhook_status status = steerhook_load(other.session, 0, broken, size);
        CHECK(status == STEERHOOK_OK || status == STEERHOOK_ARGUMENT);
        if (status != STEERHOOK_OK) {
            CHECK(steerhook_request_stage(other.session, 0) == STEERHOOK_NONE);
            CHECK(steerhook_kept_rows(other.session, 0) == 0);
        }
    }
    for (size_t cut = 0; cut < size; cut += cut < 512 ? 1 : 997) {
        CHECK_STATUS(steerhook_load(other.session, 0, bytes, cut), STEERHOOK_ARGUMENT);
    }
    free(bytes);
    free(broken);
    steerhook_session_free(t.session);
    steerhook_session_free(other.session);
}

/* Rows of prompts alone are kept: an answer is not read, and the next prompt begins before it. */
static void test_keep_prompts(const golden *g) {
    const golden_request *r = &g->requests[0];
    toy t;
    toy_row rows[128];
    toy_new(&t, g, 8, 2);
    int32_t n = quiet_rows(r, rows);
    CHECK_STATUS(steerhook_keep_rows(t.session, false), STEERHOOK_OK);
    CHECK(steerhook_kept_rows(t.session, 0) == 0);
    CHECK_STATUS(steerhook_request_begin(t.session, 0, 0, n), STEERHOOK_OK);
    CHECK_STATUS(toy_decode(&t, rows, n - 1, false), STEERHOOK_OK);
    CHECK(steerhook_kept_rows(t.session, 0) == n - 1);
    CHECK_STATUS(toy_decode(&t, rows + n - 1, 1, false), STEERHOOK_OK);
    toy_check_verdicts(&t, r, 0);
    for (int32_t i = 0; i < 3; i++) {
        CHECK_STATUS(toy_decode(&t, rows + n - 1, 1, false), STEERHOOK_OK);
        CHECK(steerhook_kept_rows(t.session, 0) == n);
    }
    CHECK_STATUS(steerhook_request_begin(t.session, 0, n + 2, n + 4), STEERHOOK_CACHED);
    for (int32_t from = n - 1; from > 0; from -= 3) {
        CHECK_STATUS(steerhook_request_cut(t.session, 0, from, -1), STEERHOOK_OK);
        CHECK(steerhook_kept_rows(t.session, 0) == from);
        CHECK_STATUS(steerhook_request_begin(t.session, 0, from, n), STEERHOOK_OK);
        CHECK_STATUS(toy_decode(&t, rows + from, n - from, false), STEERHOOK_OK);
        toy_check_verdicts(&t, r, 0);
    }
    CHECK(steerhook_kept_rows(t.session, 9) == 0);
    steerhook_session_free(t.session);
}

/* What cannot be judged fires: a reading whose row was not kept, a prompt of two rows with a
 * reading two rows before its end, a prompt that is not trusted. Rules that fired stay fired where
 * they are kept. */
static void test_open_unjudged(const golden *g) {
    const golden_request *r = &g->requests[0];
    toy t;
    toy_row rows[128];
    toy_new(&t, g, 8, 2);
    t.uncompared = true;
    int32_t n = quiet_rows(r, rows);
    CHECK_STATUS(steerhook_request_open(t.session, 0, 0, STEERHOOK_KEEP_NONE), STEERHOOK_OK);
    CHECK_STATUS(toy_decode(&t, rows, n - 2, false), STEERHOOK_OK);
    CHECK_STATUS(toy_decode(&t, rows + n - 2, 2, false), STEERHOOK_OK);
    check_unjudged(&t);
    CHECK_STATUS(steerhook_session_clear(t.session), STEERHOOK_OK);
    CHECK_STATUS(steerhook_request_distrust(t.session, 0), STEERHOOK_NO_REQUEST);
    CHECK_STATUS(steerhook_request_open(t.session, 0, 0, STEERHOOK_KEEP_NONE), STEERHOOK_OK);
    steerhook_batch batch = {.n_tokens = 2};
    CHECK_STATUS(steerhook_batch_begin(t.session, &batch), STEERHOOK_OK);
    check_unjudged(&t);
    CHECK_STATUS(steerhook_batch_cancel(t.session), STEERHOOK_OK);
    CHECK(steerhook_request_stage(t.session, 0) == STEERHOOK_PROMPTING);
    CHECK_STATUS(steerhook_request_distrust(t.session, 0), STEERHOOK_OK);
    CHECK_STATUS(toy_decode(&t, rows, n, false), STEERHOOK_OK);
    check_unjudged(&t);
    steerhook_rule_state before[8], after[8];
    int32_t count = steerhook_rules(t.session, 0, before, 8);
    CHECK_STATUS(steerhook_request_open(t.session, 0, n, STEERHOOK_KEEP_FIRED), STEERHOOK_OK);
    CHECK(steerhook_rules(t.session, 0, after, 8) == count);
    bool any = false;
    for (int32_t i = 0; i < count; i++) {
        any |= before[i].fired;
        CHECK(!before[i].fired || after[i].fired);
    }
    CHECK(any);
    /* Rows of unknown history count as steered. */
    CHECK_STATUS(steerhook_rows_restored(t.session, 0, n - 1), STEERHOOK_OK);
    CHECK(steerhook_request_stage(t.session, 0) == STEERHOOK_NONE);
    CHECK(steerhook_first_steered(t.session, 0) == n - 1);
    CHECK_STATUS(steerhook_request_cut(t.session, 0, n - 1, -1), STEERHOOK_OK);
    CHECK(steerhook_first_steered(t.session, 0) == -1);
    CHECK_STATUS(steerhook_rows_restored(t.session, 0, 0), STEERHOOK_OK);
    CHECK(steerhook_first_steered(t.session, 0) == 0);
    steerhook_session_free(t.session);
}

void test_sessions(const char *directory) {
    golden *head = golden_load(directory, "head_guard-f32");
    golden *layer = golden_load(directory, "layer_guard-f32");
    golden *image = golden_load(directory, "image_guard-f16");
    golden *scored = golden_load(directory, "scored-f32");
    test_models(head);
    test_architectures(head);
    test_requests(layer);
    test_cached(head);
    test_thresholds(head);
    test_quiet(head);
    test_lost(layer);
    test_observer(head);
    test_outputs(image);
    test_shared(layer);
    test_shared(head);
    test_batches(layer);
    test_cut(head);
    test_steered_cache(scored);
    test_pause(head);
    test_readings(head);
    test_open(layer);
    test_copy_kept(layer);
    test_saved(layer);
    test_keep_prompts(layer);
    test_open_goes_on(layer);
    test_passes(layer);
    test_strange_passes(layer);
    test_open_unjudged(layer);
    golden_free(head);
    golden_free(layer);
    golden_free(image);
    golden_free(scored);
}
