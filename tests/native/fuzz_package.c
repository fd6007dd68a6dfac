/* libFuzzer target: bytes from a stranger -> steerhook_package_parse -> a session that runs.
 *
 *   clang -g -O2 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -I NATIVE
 *         fuzz_package.c NATIVE/[a-z]*.c -lm -o fuzz_package
 *   ./fuzz_package -dict=GOLDEN/json.dict CORPUS GOLDEN/seeds
 */
#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "steerhook.h"

struct ggml_tensor {
    const char *name;
    size_t nbytes;
    float *data;
};

static const char *get_name(const struct ggml_tensor *t) { return t->name; }
static size_t get_nbytes(const struct ggml_tensor *t) { return t->nbytes; }

static void get(const struct ggml_tensor *t, void *data, size_t offset, size_t size) {
    assert(offset <= t->nbytes && size <= t->nbytes - offset);
    memcpy(data, (const char *)t->data + offset, size);
}

static void set(struct ggml_tensor *t, const void *data, size_t offset, size_t size) {
    assert(offset <= t->nbytes && size <= t->nbytes - offset);
    memcpy((char *)t->data + offset, data, size);
}

enum { ROWS = 5, WIDTH_LIMIT = 64, DEPTH_LIMIT = 16 };

static void run_node(steerhook_session *session, const char *name, int rows, int width) {
    static float data[ROWS * WIDTH_LIMIT];
    for (int i = 0; i < rows * width; i++) {
        data[i] = (float)(i % 7) - 3.0F;
    }
    struct ggml_tensor node = {name, (size_t)(rows * width) * sizeof(float), data};
    if (steerhook_eval(&node, true, session)) {
        steerhook_eval(&node, false, session);
    }
}

/* A prompt of four rows and a generated one, through every layer. */
static void run(const steerhook_package *package) {
    static const char digits[] = "0123456789";
    const steerhook_ggml ggml = {get_name, get_nbytes, get, set};
    steerhook_package_info info = steerhook_package_describe(package);
    if (info.n_embd > WIDTH_LIMIT || info.n_layer > DEPTH_LIMIT || info.n_vocab > WIDTH_LIMIT) {
        return;
    }
    const steerhook_model model = {NULL, info.n_embd, info.n_layer, 16, 2};
    char error[256];
    steerhook_session *session = steerhook_session_new(package, &model, &ggml, error, sizeof error);
    if (session == NULL) {
        return;
    }
    int8_t outputs[ROWS] = {0, 0, 0, 1, 1};
    const int32_t tokens[ROWS] = {1, 4, 5, 6, 2};
    steerhook_batch batch = {.n_tokens = ROWS, .output = outputs, .tokens = tokens};
    if (steerhook_request_begin(session, 0, 0, 4) == STEERHOOK_OK &&
        steerhook_batch_begin(session, &batch) == STEERHOOK_OK) {
        for (int32_t layer = 0; layer < info.n_layer; layer++) {
            char name[16] = "l_out-";
            char *at = name + 6;
            if (layer >= 10) {
                *at++ = digits[layer / 10];
            }
            *at++ = digits[layer % 10];
            *at = '\0';
            run_node(session, name, layer == info.n_layer - 1 ? 2 : ROWS, info.n_embd);
        }
        run_node(session, "result_norm", 2, info.n_embd);
        run_node(session, "result_output", 2, info.n_vocab);
        steerhook_status status = steerhook_batch_end(session);
        assert(status == STEERHOOK_OK || status == STEERHOOK_STRENGTH);
        assert(status != STEERHOOK_OK ||
               steerhook_verdicts(session, 0, NULL, 0) == info.n_probes);
    }
    steerhook_session_free(session);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
    char error[256] = "";
    void *copy = malloc(size); /* of the exact size: one byte too far is seen */
    if (copy == NULL) {
        return 0;
    }
    memcpy(copy, bytes, size);
    steerhook_package *package = steerhook_package_parse(copy, size, error, sizeof error);
    if (package != NULL) {
        run(package);
        steerhook_package_free(package);
    } else {
        assert(error[0] != '\0');
    }
    free(copy);
    return 0;
}

#ifndef NO_MUTATOR
size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t max_size);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned seed);

/* Where the JSON of the spec stands, or 0. */
static size_t find_spec(const uint8_t *data, size_t size, size_t *length) {
    static const char key[] = "steering.spec";
    const size_t head = sizeof key - 1 + 4 + 8; /* key, value type, length */
    for (size_t at = 0; at + head <= size; at++) {
        if (memcmp(data + at, key, sizeof key - 1) == 0) {
            uint64_t stored = 0;
            memcpy(&stored, data + at + sizeof key - 1 + 4, sizeof stored);
            *length = (size_t)stored;
            return stored <= size - at - head ? at + head : 0;
        }
    }
    return 0;
}

/* Three times of four, only the JSON changes: in its place and padded with spaces, so that the
 * file around it stays sound and the mutation reaches the spec. */
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned seed) {
    size_t length = 0;
    size_t at = seed % 4 == 0 ? 0 : find_spec(data, size, &length);
    if (at == 0 || length == 0) {
        return LLVMFuzzerMutate(data, size, max_size);
    }
    size_t used = length;
    while (used > 1 && data[at + used - 1] == ' ') {
        used--;
    }
    uint8_t *json = malloc(length);
    if (json == NULL) {
        return size;
    }
    memcpy(json, data + at, used);
    used = LLVMFuzzerMutate(json, used, length);
    memset(data + at, ' ', length);
    memcpy(data + at, json, used);
    free(json);
    return size;
}
#endif
