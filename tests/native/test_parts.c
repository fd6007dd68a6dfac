/* The parts by themselves: kernels against double loops, JSON, broken packages. */
#include <math.h>
#include <string.h>

#include "harness.h"
#include "json.h"
#include "kernels.h"

void test_parts(const char *directory);

/* ---- kernels ---- */

static double value_of(sh_dtype dtype, const void *data, int64_t i) {
    uint32_t bits = 0;
    float value = 0;
    if (dtype == SH_F32) {
        return (double)((const float *)data)[i];
    }
    uint16_t half = ((const uint16_t *)data)[i];
    if (dtype == SH_BF16) {
        bits = (uint32_t)half << 16;
        memcpy(&value, &bits, sizeof value);
        return (double)value;
    }
    int exponent = (half >> 10) & 31;
    int mantissa = half & 1023;
    double size = exponent == 0 ? ldexp(mantissa, -24) : ldexp(1024 + mantissa, exponent - 25);
    return half & 0x8000 ? -size : size;
}

static uint32_t random_bits(void) {
    static uint32_t state = 1;
    state = state * 1664525U + 1013904223U;
    return state >> 8;
}

/* Finite values of any sign; halves of any kind, subnormals included. */
static void fill(sh_dtype dtype, void *data, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        if (dtype == SH_F32) {
            ((float *)data)[i] = (float)random_bits() / 8388608.0F - 1.0F;
        } else if (dtype == SH_F16) {
            ((uint16_t *)data)[i] = (uint16_t)((random_bits() & 0x83FF) |
                                               (random_bits() % 20) << 10);
        } else {
            ((uint16_t *)data)[i] = (uint16_t)(0x3F00 | (random_bits() & 0x80FF));
        }
    }
}

static void test_kernel(sh_dtype dtype, int64_t n) {
    float *x = malloc((size_t)n * sizeof *x);
    float *y = malloc((size_t)n * sizeof *y);
    size_t item = dtype == SH_F32 ? 4 : 2;
    void *w = malloc((size_t)(2 * n) * item); /* exact: the sanitizer sees one value too far */
    CHECK(x != NULL && y != NULL && w != NULL);
    fill(SH_F32, x, n);
    memcpy(y, x, (size_t)n * sizeof *y);
    fill(dtype, w, 2 * n);
    const sh_tensor tensor = {w, 2, n, dtype};
    double sum = 0;
    double size = 0;
    for (int64_t i = 0; i < n; i++) {
        double term = value_of(dtype, w, n + i) * (double)x[i];
        sum += term;
        size += fabs(term);
        CHECK((double)sh_value(&tensor, 1, i) == value_of(dtype, w, n + i));
    }
    CHECK(fabs((double)sh_dot(&tensor, 1, x) - sum) <= 1e-6 * size + 1e-30);
    sh_axpy(&tensor, 1, -0.75F, y);
    for (int64_t i = 0; i < n; i++) {
        double want = (double)x[i] - 0.75 * value_of(dtype, w, n + i);
        CHECK(fabs((double)y[i] - want) <= 1e-6 * (1.0 + fabs(want)));
    }
    float both[2];
    sh_multiply(&tensor, x, both);
    CHECK(both[1] == sh_dot(&tensor, 1, x) && both[0] == sh_dot(&tensor, 0, x));
    CHECK(sh_all_finite(w, dtype, (uint64_t)(2 * n)));
    free(x);
    free(y);
    free(w);
}

static void test_kernels(void) {
    static const sh_dtype dtypes[] = {SH_F32, SH_F16, SH_BF16};
    for (size_t i = 0; i < 3; i++) {
        for (int64_t n = 1; n <= 100; n++) {
            test_kernel(dtypes[i], n);
        }
        test_kernel(dtypes[i], 576);
        test_kernel(dtypes[i], 4099);
    }
    /* Every finite half. */
    for (uint32_t half = 0; half < 0x10000; half++) {
        uint16_t value = (uint16_t)half;
        const sh_tensor tensor = {&value, 1, 1, SH_F16};
        bool finite = (half & 0x7C00) != 0x7C00;
        CHECK(sh_all_finite(&value, SH_F16, 1) == finite);
        CHECK(!finite || (double)sh_value(&tensor, 0, 0) == value_of(SH_F16, &value, 0));
    }
    static const float bad[] = {0.0F, NAN, INFINITY};
    CHECK(sh_all_finite(bad, SH_F32, 1) && !sh_all_finite(bad, SH_F32, 2));
    CHECK(!sh_all_finite(bad + 2, SH_F32, 1));
}

/* ---- JSON ---- */

static bool parses(const char *text, size_t size) {
    sh_json json;
    char message[200] = "";
    sh_error error = {message, sizeof message};
    bool ok = sh_json_parse(&json, (sh_text){text, size}, "test", &error);
    CHECK(ok == (message[0] == '\0'));
    sh_json_free(&json);
    return ok;
}

static void test_json(void) {
    static const char *const good[] = {
        "{}", " [1, -0, 1e5, 1E-2, 0.5e+3] ", "\"\"", "null", "[true,false]", "-1.5",
        "{\"a\":{\"a\":1},\"b\":[]}", "\"\\u00e9\\ud83d\\ude00\\u0000\\n\"",
        "\"\xF0\x9F\x98\x80\""};
    static const char *const bad[] = {
        "", " ", "{", "[1,]", "{\"a\":1,}", "{\"a\":1,\"a\":2}", "{\"a\":1,\"\\u0061\":2}", "01",
        "+1", ".5", "1.", "1e", "-", "NaN", "Infinity", "-Infinity", "1e999", "\"\\x\"",
        "\"\\u12\"",
        "\"\\ud800\"", "\"\\udc00\"", "\"\\ud800\\u0041\"", "\"\n\"", "\"", "tru", "[] []", "{1:2}",
        "{\"a\" 1}", "\"\xC0\x80\"", "\"\xED\xA0\x80\"", "\"\xF5\x80\x80\x80\"", "\"\xE2\x82\"",
        "\xEF\xBB\xBF{}", "'a'", "[1 2]", "0x1"};
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        CHECK(parses(good[i], strlen(good[i])));
    }
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        CHECK(!parses(bad[i], strlen(bad[i])));
    }
    char deep[200];
    memset(deep, '[', 100);
    memset(deep + 100, ']', 100);
    CHECK(parses(deep + 36, 128) && !parses(deep + 35, 130));
    CHECK(!parses("1\0", 2) && !parses("\"\\\0\"", 4));
    sh_json json;
    sh_error error = {NULL, 0};
    const char *text = "{\"x\":\"\\u00e9\\ud83d\\ude00\\u0000z\",\"n\":[-12.5e1]}";
    CHECK(sh_json_parse(&json, (sh_text){text, strlen(text)}, "test", &error));
    sh_text x = sh_json_text(sh_json_member(&json, json.nodes, "x"));
    CHECK(x.size == 8 && memcmp(x.data, "\xC3\xA9\xF0\x9F\x98\x80\0z", 8) == 0);
    CHECK(sh_json_member(&json, json.nodes, "n")[1].value.number == -125.0);
    CHECK(sh_json_member(&json, json.nodes, "m") == NULL);
    sh_json_free(&json);
}

/* ---- broken packages ---- */

static char *read_file(const char *directory, const char *name, size_t *size) {
    char path[512];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    FILE *file = fopen(path, "rb");
    CHECK(file != NULL);
    char *bytes = malloc(1 << 20);
    CHECK(bytes != NULL);
    *size = fread(bytes, 1, 1 << 20, file);
    fclose(file);
    return bytes;
}

/* Parses with `from` replaced by `to` of the same length; the error must hold `want`. */
static void refuses(const char *bytes, size_t size, const char *from, const char *to,
                    const char *want) {
    char error[256] = "";
    size_t length = strlen(from);
    char *copy = malloc(size);
    bool inside = false;
    CHECK(copy != NULL && length == strlen(to));
    memcpy(copy, bytes, size);
    for (size_t at = 0; at + length <= size && !inside; at++) {
        inside = memcmp(copy + at, from, length) == 0;
        if (inside) {
            memcpy(copy + at, to, length);
        }
    }
    CHECK(inside);
    steerhook_package *package = steerhook_package_parse(copy, size, error, sizeof error);
    if (package != NULL || strstr(error, want) == NULL) {
        fprintf(stderr, "%s -> %s: '%s' lacks '%s'\n", from, to, error, want);
    }
    CHECK(package == NULL && strstr(error, want) != NULL);
    free(copy);
}

static void test_broken(const char *directory) {
    size_t size = 0;
    char error[256];
    char *bytes = read_file(directory, "layer_guard-f32.gguf", &size);
    for (size_t cut = 0; cut < size; cut += 1 + cut / 64) {
        char *copy = malloc(cut + 1);
        CHECK(copy != NULL);
        memcpy(copy, bytes, cut);
        CHECK(steerhook_package_parse(copy, cut, error, sizeof error) == NULL);
        free(copy);
    }
    refuses(bytes, size, "GGUF\3", "GGUF\7", "version: expected 2 or 3");
    refuses(bytes, size, "steering", "steersng", "general.architecture");
    refuses(bytes, size, "adapter", "adaptor", "general.type: expected adapter");
    refuses(bytes, size, "\"1.1\"", "\"2.1\"", "upgrade");
    refuses(bytes, size, "\"1.1\"", "\"1,1\"", "spec_version");
    refuses(bytes, size, "\"mlp\"", "\"mlq\"",
            "probes[0].type: expected one of mlp linear cosine, found 'mlq'");
    refuses(bytes, size, "\"gelu\"", "\"silu\"", "probes[0].activation");
    refuses(bytes, size, "\">=\"", "\"=>\"", "probes[0].comparator");
    refuses(bytes, size, "\"threshold\"", "\"thresholt\"",
            "probes[0]: expected no unknown field, found 'thresholt'");
    refuses(bytes, size, "\"layer\": 0", "\"layer\": 7", "probes[0].readings[0].site.layer");
    refuses(bytes, size, "\"offset\": -2", "\"offset\": +2", "JSON");
    refuses(bytes, size, "\"offset\": -2", "\"offset\":  2", "readings[0].position.offset");
    refuses(bytes, size, "\"offset\": -2", "\"offset\": .2", "JSON");
    refuses(bytes, size, "\"hidden_size\": 37", "\"hidden_size\": 38", "shape [");
    refuses(bytes, size, "\"hidden_size\": 37", "\"hidden_size\": 0 ", "base_model.hidden_size");
    refuses(bytes, size, "\"alpha\": 2.0", "\"alpha\": \"x\"",
            "interventions[0].alpha: expected a number");
    refuses(bytes, size, "\"id\": \"o\"", "\"id\": \"a\"",
            "interventions[1]: expected a unique id");
    refuses(bytes, size, "\"from_prompt_end\"", "\"all_positions\"  ", "under a rule that reads");
    refuses(bytes, size, "\"probe\": \"p\"", "\"probe\": \"q\"", "rules[0].strength");
    free(bytes);
}

/* One tensor's offset moved by a byte. */
static void test_misaligned(const char *directory) {
    size_t size = 0;
    char error[256] = "";
    char *bytes = read_file(directory, "layer_guard-f32.gguf", &size);
    static const char name[] = "\3\0\0\0\0\0\0\0t.9\1\0\0\0";
    size_t at = 0;
    while (memcmp(bytes + at, name, sizeof name - 1) != 0) {
        at++;
        CHECK(at + sizeof name < size);
    }
    bytes[at + sizeof name - 1 + 8 + 4] ^= 1; /* after one size and the type */
    CHECK(steerhook_package_parse(bytes, size, error, sizeof error) == NULL);
    CHECK(strstr(error, "aligned data inside the file") != NULL);
    CHECK(steerhook_package_parse(bytes + 1, size - 1, error, sizeof error) == NULL);
    CHECK(strstr(error, "aligned to 8") != NULL);
    free(bytes);
    bytes = read_file(directory, "scored-f32.gguf", &size);
    refuses(bytes, size, "\"layer\": 3", "\"layer\": 4",
            "rules[0]: expected interventions at or after");
    free(bytes);
}

void test_parts(const char *directory) {
    test_kernels();
    test_json();
    test_broken(directory);
    test_misaligned(directory);
}
