#include "facts.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "events.h"
#include "real.h"
#include "sha256.h"

void *sb_either(const char *name, const char *older) {
    void *function = sb_find(name, NULL);
    return function != NULL || older == NULL ? function : sb_find(older, NULL);
}

void *sb_function(const char *name, const char *older) {
    void *function = sb_either(name, older);
    if (function == NULL) {
        sb_fatal("%s: expected it in the loaded llama.cpp, found none", name);
    }
    return function;
}

typedef int32_t (*of_model)(const llama_model *);
typedef int32_t (*read_value)(const llama_model *, const char *, char *, size_t);
typedef const llama_vocab *(*vocab_of)(const llama_model *);

static const char *metadata(const llama_model *model, const char *key, char *text, size_t size) {
    read_value read = SB_CALL(read_value, "llama_model_meta_val_str", NULL);
    return read(model, key, text, size) < 0 ? "" : text;
}

const void *sb_vocabulary(const llama_model *model) {
    vocab_of get = (vocab_of)sb_either("llama_model_get_vocab", NULL);
    return get != NULL ? (const void *)get(model) : model;
}

static int32_t n_vocab(const llama_model *model) {
    typedef int32_t (*count)(const void *);
    return SB_CALL(count, "llama_vocab_n_tokens", "llama_n_vocab")(sb_vocabulary(model));
}

static int32_t n_deepstack(const llama_model *model, const char *architecture) {
    char key[128], text[32];
    snprintf(key, sizeof key, "%s.deepstack_mapping", architecture);
    if (metadata(model, key, text, sizeof text)[0] != '\0') {
        return -1;
    }
    snprintf(key, sizeof key, "%s.n_deepstack_layers", architecture);
    return (int32_t)strtol(metadata(model, key, text, sizeof text), NULL, 10);
}

sb_facts sb_facts_of(const llama_model *model) {
    sb_facts f = {0};
    metadata(model, "general.architecture", f.architecture, sizeof f.architecture);
    metadata(model, "general.name", f.name, sizeof f.name);
    metadata(model, "general.file_type", f.file_type, sizeof f.file_type);
    f.n_embd = SB_CALL(of_model, "llama_model_n_embd", "llama_n_embd")(model);
    f.n_layer = SB_CALL(of_model, "llama_model_n_layer", "llama_n_layer")(model);
    f.n_vocab = n_vocab(model);
    f.n_deepstack = n_deepstack(model, f.architecture);
    return f;
}

/* ---- comparison ---- */

typedef const char *(*text_of)(const void *, int32_t);

/* Tokens without the padding that converters add up to the embedding's size. */
static int32_t unpadded(const void *vocab, text_of text, int32_t count) {
    char padding[32];
    while (count > 0) {
        snprintf(padding, sizeof padding, "[PAD%ld]", (long)count - 1);
        if (strcmp(text(vocab, count - 1), padding) != 0) {
            break;
        }
        count--;
    }
    return count;
}

/* Writes a token with spaces for the blanks of SentencePiece; returns its length. */
static size_t with_spaces(const char *token, char *out) {
    static const char blank[] = "\xe2\x96\x81";
    size_t length = 0;
    while (*token != '\0') {
        bool found = strncmp(token, blank, sizeof blank - 1) == 0;
        out[length++] = found ? ' ' : *token;
        token += found ? sizeof blank - 1 : 1;
    }
    return length;
}

/* As steerbridge/fingerprint.py: each token behind its length in bytes, 32 bits, little endian. */
static void hash_tokens(const llama_model *model, int32_t count, char digest[SB_SHA256_TEXT]) {
    text_of text = SB_CALL(text_of, "llama_vocab_get_text", "llama_token_get_text");
    const void *vocab = sb_vocabulary(model);
    sb_sha256 hash;
    sb_sha256_begin(&hash);
    count = unpadded(vocab, text, count);
    char *token = NULL;
    for (int32_t i = 0; i < count; i++) {
        const char *found = text(vocab, i);
        char *larger = realloc(token, strlen(found) + 1);
        if (larger == NULL) {
            sb_fatal("no memory");
        }
        token = larger;
        size_t length = with_spaces(found, token);
        const uint8_t size[4] = {(uint8_t)length, (uint8_t)(length >> 8), (uint8_t)(length >> 16),
                                 (uint8_t)(length >> 24)};
        sb_sha256_add(&hash, size, sizeof size);
        sb_sha256_add(&hash, token, length);
    }
    free(token);
    sb_sha256_end(&hash, digest);
}

/* "" for a model without a template. */
static void hash_template(const llama_model *model, char digest[SB_SHA256_TEXT]) {
    static const char key[] = "tokenizer.chat_template";
    read_value read = SB_CALL(read_value, "llama_model_meta_val_str", NULL);
    int32_t length = read(model, key, NULL, 0);
    digest[0] = '\0';
    if (length < 0) {
        return;
    }
    char *text = malloc((size_t)length + 1);
    if (text == NULL) {
        sb_fatal("no memory");
    }
    read(model, key, text, (size_t)length + 1);
    sb_sha256 hash;
    sb_sha256_begin(&hash);
    sb_sha256_add(&hash, text, (size_t)length);
    sb_sha256_end(&hash, digest);
    free(text);
}

/* What `steerbridge run` expects; NULL if it does not know or is told to ignore it. */
static const char *expected(const char *variable) {
    const char *want = getenv(variable);
    return want != NULL && want[0] != '\0' ? want : NULL;
}

static void compare(const char *variable, const char *what, const char *found,
                    const sb_facts *f) {
    const char *want = expected(variable);
    if (want != NULL && strcmp(want, found) != 0) {
        sb_fatal("model %s: expected the %s that the package was made for (%.12s), found another "
                 "(%.12s)",
                 f->name, what, want, found);
    }
}

void sb_check_model(const llama_model *model, const sb_facts *f) {
    const char *want = expected("STEERBRIDGE_VOCABULARY");
    if (want != NULL && strtol(want, NULL, 10) != f->n_vocab) {
        sb_fatal("model %s: expected a vocabulary of %s, found %ld", f->name, want,
                 (long)f->n_vocab);
    }
    char digest[SB_SHA256_TEXT];
    if (expected("STEERBRIDGE_TOKENIZER") != NULL) {
        hash_tokens(model, f->n_vocab, digest);
        compare("STEERBRIDGE_TOKENIZER", "tokenizer", digest, f);
    }
    hash_template(model, digest);
    if (digest[0] != '\0') { /* a model without a template cannot disagree */
        compare("STEERBRIDGE_TEMPLATE", "chat template", digest, f);
    }
}
