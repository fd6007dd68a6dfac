/* The C tests of libsteerhook: test_steerhook GOLDEN, a folder written by make_golden.py.
 * Everything is compared with the numpy oracle's numbers. */
#include <pthread.h>
#include <string.h>

#include "harness.h"

void test_parts(const char *directory);
void test_sessions(const char *directory);

static const char *const names[] = {
    "head_guard-f32",  "head_guard-f16",  "head_guard-bf16",  "layer_guard-f32",
    "layer_guard-f16", "layer_guard-bf16", "image_guard-f32", "image_guard-f16",
    "image_guard-bf16", "always-f32",     "always-f16",       "always-bf16",
    "scored-f32",      "scored-f16",      "scored-bf16"};
enum { N_NAMES = sizeof names / sizeof *names };

/* Every request alone: micro-batches of 1, 3, 512 rows, prompts in chunks, all rows as outputs. */
static void test_alone(const golden *g) {
    static const int32_t ubatches[] = {1, 3, 512};
    static const int32_t chunks[] = {1, 4, 100};
    for (size_t u = 0; u < 3; u++) {
        toy t;
        toy_new(&t, g, ubatches[u], 3);
        for (size_t c = 0; c < 3; c++) {
            for (int32_t i = 0; i < g->n_requests; i++) {
                toy_request(&t, &g->requests[i], i % 3, chunks[c], (c + (size_t)i) % 2 == 0);
            }
        }
        steerhook_session_free(t.session);
    }
}

/* The next batch of many sequences: some rows of each, mixed, in an order of its own. */
static int32_t mix(const golden *g, const int32_t *order, int32_t n, int32_t *done, unsigned *state,
                   toy_row *rows, bool images) {
    int32_t count = 0;
    for (int32_t turn = 0; turn < 4; turn++) {
        for (int32_t s = 0; s < n; s++) {
            const golden_request *request = &g->requests[order[s]];
            *state = *state * 1664525U + 1013904223U;
            int32_t take = (int32_t)(*state >> 28);
            for (; take > 0 && done[s] < request->n_rows; take--) {
                bool image = done[s] >= request->first_image && done[s] < request->last_image;
                if (image != images) {
                    break;
                }
                rows[count++] = (toy_row){request, s, done[s], done[s] >= request->n_prompt - 1 ||
                                                                  (*state & 64) != 0};
                done[s]++;
            }
        }
    }
    return count;
}

static void test_mixed(const golden *g, unsigned seed) {
    const int32_t order[] = {4, 0, 3, 2, 5, 1};
    int32_t done[6] = {0};
    toy_row *rows = malloc(4 * 6 * 16 * sizeof *rows);
    unsigned state = seed;
    toy t;
    CHECK(rows != NULL && g->n_requests == 6);
    toy_new(&t, g, 5 + (int32_t)seed % 9, 6);
    for (int32_t s = 0; s < 6; s++) {
        CHECK_STATUS(steerhook_request_begin(t.session, s, 0, g->requests[order[s]].n_prompt),
                     STEERHOOK_OK);
    }
    for (int32_t idle = 0; idle < 40;) {
        bool images = (state >> 9) % 2 == 0;
        int32_t n = mix(g, order, 6, done, &state, rows, images);
        idle = n == 0 ? idle + 1 : 0;
        if (n > 0) {
            CHECK_STATUS(toy_decode(&t, rows, n, images), STEERHOOK_OK);
        }
    }
    for (int32_t s = 0; s < 6; s++) {
        CHECK(done[s] == g->requests[order[s]].n_rows);
        toy_check_verdicts(&t, &g->requests[order[s]], s);
    }
    steerhook_session_free(t.session);
    free(rows);
}

/* Two sessions of one package in two threads. */
static void *in_thread(void *argument) {
    for (int i = 0; i < 3; i++) {
        test_alone(argument);
    }
    return NULL;
}

static void test_threads(const golden *g) {
    pthread_t threads[2];
    for (int i = 0; i < 2; i++) {
        CHECK(pthread_create(&threads[i], NULL, in_thread, (void *)(uintptr_t)g) == 0);
    }
    for (int i = 0; i < 2; i++) {
        CHECK(pthread_join(threads[i], NULL) == 0);
    }
}

/* A package with one text replaced by another of the same length. */
static steerhook_package *patched(const char *directory, const char *name, const char *from,
                                  const char *to, char *bytes, size_t size) {
    char path[512];
    char error[256] = "";
    snprintf(path, sizeof path, "%s/%s.gguf", directory, name);
    FILE *file = fopen(path, "rb");
    CHECK(file != NULL && strlen(from) == strlen(to));
    size = fread(bytes, 1, size, file);
    fclose(file);
    size_t at = 0;
    while (at + strlen(from) <= size && memcmp(bytes + at, from, strlen(from)) != 0) {
        at++;
    }
    CHECK(at + strlen(from) <= size);
    memcpy(bytes + at, to, strlen(to));
    return steerhook_package_parse(bytes, size, error, sizeof error);
}

/* Sound packages that cannot run: layer_input[0], and a strength that no float can hold. */
static void test_patched(const char *directory, const golden *scored) {
    enum { SIZE = 1 << 16 };
    static _Alignas(8) char bytes[SIZE];
    char error[256] = "";
    const golden_request *r = &scored->requests[0];
    const steerhook_model model = {NULL, scored->d, scored->n_layer, 8, 2};
    steerhook_package *package =
        patched(directory, "scored-f32", "\"layer\": 1", "\"layer\": 0", bytes, SIZE);
    CHECK(package != NULL);
    CHECK(steerhook_session_new(package, &model, &fake_ggml, error, sizeof error) == NULL);
    CHECK(strstr(error, "layer_input[0]") != NULL);
    steerhook_package_free(package);
    package = patched(directory, "scored-f32", "-2.0", "9e99", bytes, SIZE);
    CHECK(package != NULL);
    golden other = *scored;
    toy t;
    toy_row rows[128];
    other.package = package;
    toy_new(&t, &other, 8, 2);
    steerhook_package_free(package); /* the session keeps it */
    for (int32_t i = 0; i < r->n_prompt; i++) {
        rows[i] = (toy_row){r, 0, i, true};
    }
    CHECK_STATUS(steerhook_request_begin(t.session, 0, 0, r->n_prompt), STEERHOOK_OK);
    CHECK_STATUS(toy_decode(&t, rows, r->n_prompt, false), STEERHOOK_STRENGTH);
    CHECK(t.stopped);
    steerhook_session_free(t.session);
    package =
        patched(directory, "always-f32", "\"alpha\": -1.0", "\"alpha\": 9e99", bytes, SIZE);
    CHECK(package != NULL);
    CHECK(steerhook_session_new(package, &model, &fake_ggml, error, sizeof error) == NULL);
    CHECK(strstr(error, "r1: expected a strength") != NULL);
    steerhook_package_free(package);
}

int main(int argc, char **argv) {
    if (argc != 2) {
        fprintf(stderr, "usage: test_steerhook GOLDEN\n");
        return 2;
    }
    test_parts(argv[1]);
    test_sessions(argv[1]);
    for (size_t i = 0; i < N_NAMES; i++) {
        golden *g = golden_load(argv[1], names[i]);
        test_alone(g);
        for (unsigned seed = 0; seed < 8; seed++) {
            test_mixed(g, seed);
        }
        if (strcmp(g->name, "layer_guard-f32") == 0) {
            test_threads(g);
        } else if (strcmp(g->name, "scored-f32") == 0) {
            test_patched(argv[1], g);
        }
        golden_free(g);
    }
    printf("ok: %d packages\n", (int)N_NAMES);
    return 0;
}
