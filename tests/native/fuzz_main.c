/* Runs the fuzz target without libFuzzer, with any C compiler: seeds in, mutants of them through
 * the target. Not guided by coverage, but the same target and the same mutator of the JSON.
 *
 *   fuzz_short RUNS SEED FILE...
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size);
size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t max_size);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned seed);

enum { MAX_SIZE = 1 << 16, MAX_SEEDS = 64 };

static uint64_t state;

/* xorshift64*: the same mutants everywhere for one seed. */
static size_t below(size_t limit) {
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return (size_t)((state * 2685821657736338717ULL) >> 33) % (limit > 0 ? limit : 1);
}

static const char *const words[] = {
    "null",  "true", "1e999", "-0",     "[]",    "{}",      "\"\"",     "\\u0000",   "-1",
    "99999", "0.5",  "{",     "]",      ",",     "\"mlp\"", "\"cosine\"", "\"score\"", "\"all\"",
    "\"low_rank\"", "\"prompt_mean\"", "\"image_mean\"", "\"head_input\"", "\"layer_input\""};

static size_t put(uint8_t *data, size_t size, size_t max, size_t at, size_t drop, const void *from,
                  size_t length) {
    if (size - drop + length > max) {
        return size;
    }
    memmove(data + at + length, data + at + drop, size - at - drop);
    memcpy(data + at, from, length);
    return size - drop + length;
}

size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t max_size) {
    uint8_t piece[64];
    if (size == 0) {
        return 0;
    }
    for (size_t left = 1 + below(3); left > 0 && size > 0; left--) {
        size_t at = below(size);
        size_t length = 1 + below(sizeof piece);
        length = length < size - at ? length : size - at;
        const char *word = words[below(sizeof words / sizeof *words)];
        uint64_t number = (uint64_t)1 << below(64);
        switch (below(7)) {
        case 0: data[at] ^= (uint8_t)(1U << below(8)); break;
        case 1: data[at] = (uint8_t)below(256); break;
        case 2: size = put(data, size, max_size, at, length, "", 0); break;
        case 3:
            memcpy(piece, data + at, length);
            size = put(data, size, max_size, below(size), 0, piece, length);
            break;
        case 4: size = put(data, size, max_size, at, 0, word, strlen(word)); break;
        case 5: size = put(data, size, max_size, at, length, word, strlen(word)); break;
        default:
            if (size - at >= sizeof number) {
                memcpy(data + at, &number, sizeof number);
            }
        }
    }
    return size;
}

int main(int argc, char **argv) {
    static uint8_t data[MAX_SIZE];
    static uint8_t *seeds[MAX_SEEDS];
    static size_t sizes[MAX_SEEDS];
    if (argc < 4 || argc > 3 + MAX_SEEDS) {
        fprintf(stderr, "usage: fuzz_short RUNS SEED FILE...\n");
        return 2;
    }
    long long runs = atoll(argv[1]);
    state = strtoull(argv[2], NULL, 10) * 2 + 1;
    size_t count = (size_t)argc - 3;
    for (size_t i = 0; i < count; i++) {
        FILE *file = fopen(argv[i + 3], "rb");
        sizes[i] = file != NULL ? fread(data, 1, MAX_SIZE / 2, file) : 0;
        seeds[i] = malloc(MAX_SIZE);
        if (sizes[i] == 0 || seeds[i] == NULL) {
            fprintf(stderr, "fuzz_short: cannot read %s\n", argv[i + 3]);
            return 2;
        }
        memcpy(seeds[i], data, sizes[i]);
        fclose(file);
        LLVMFuzzerTestOneInput(seeds[i], sizes[i]);
    }
    for (long long run = 0; run < runs; run++) {
        size_t i = below(count);
        size_t size = sizes[i];
        memcpy(data, seeds[i], size);
        for (size_t times = 1 + below(4); times > 0 && size > 0; times--) {
            size = LLVMFuzzerCustomMutator(data, size, MAX_SIZE, (unsigned)below(1U << 30));
        }
        LLVMFuzzerTestOneInput(data, size);
    }
    printf("ok: %lld inputs\n", runs);
    for (size_t i = 0; i < count; i++) {
        free(seeds[i]);
    }
    return 0;
}
