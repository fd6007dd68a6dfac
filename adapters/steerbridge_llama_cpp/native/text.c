#include "text.h"

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

bool sh_text_equal(sh_text a, sh_text b) {
    return a.size == b.size && (a.size == 0 || memcmp(a.data, b.data, a.size) == 0);
}

bool sh_text_is(sh_text a, const char *b) {
    return sh_text_equal(a, (sh_text){b, strlen(b)});
}

int sh_text_order(sh_text a, sh_text b) {
    /* Length first: most comparisons then end without touching the bytes. */
    if (a.size != b.size) {
        return a.size < b.size ? -1 : 1;
    }
    return a.size == 0 ? 0 : memcmp(a.data, b.data, a.size);
}

/* The length of the UTF-8 sequence at `s`, or 0 if it is none. */
static size_t utf8_sequence(const unsigned char *s, size_t left) {
    static const unsigned char lowest[5] = {0, 0, 0x80, 0xA0, 0x90};
    unsigned char lead = s[0];
    size_t length = lead < 0x80 ? 1 : lead < 0xC2 ? 0 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3
                  : lead < 0xF5 ? 4 : 0;
    if (length < 2 || length > left) {
        return length > left ? 0 : length;
    }
    for (size_t i = 1; i < length; i++) {
        if ((s[i] & 0xC0) != 0x80) {
            return 0;
        }
    }
    bool overlong = (lead == 0xE0 || lead == 0xF0) && s[1] < lowest[length];
    bool surrogate = lead == 0xED && s[1] > 0x9F;
    bool too_high = lead == 0xF4 && s[1] > 0x8F;
    return overlong || surrogate || too_high ? 0 : length;
}

bool sh_is_utf8(const char *bytes, size_t size) {
    const unsigned char *s = (const unsigned char *)bytes;
    for (size_t at = 0; at < size;) {
        size_t length = utf8_sequence(s + at, size - at);
        if (length == 0) {
            return false;
        }
        at += length;
    }
    return true;
}

bool sh_is_name(sh_text text) {
    if (text.size < 1 || text.size > 63) {
        return false;
    }
    for (size_t i = 0; i < text.size; i++) {
        char c = text.data[i];
        bool ok = (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') ||
                  c == '_' || c == '.' || c == '-';
        if (!ok) {
            return false;
        }
    }
    return true;
}

bool sh_fail(const sh_error *error, const char *field, const char *want, const char *got, ...) {
    if (error->text == NULL || error->size == 0) {
        return false;
    }
    char got_text[160];
    va_list arguments;
    va_start(arguments, got);
    vsnprintf(got_text, sizeof got_text, got, arguments);
    va_end(arguments);
    snprintf(error->text, error->size, "%s: expected %s, found %s", field, want, got_text);
    return false;
}

sh_quoted sh_quote(sh_text text) {
    enum { SHOWN = 64 };
    sh_quoted quoted;
    size_t shown = text.size < SHOWN ? text.size : SHOWN;
    size_t at = 0;
    quoted.text[at++] = '\'';
    for (size_t i = 0; i < shown; i++) {
        char c = text.data[i];
        quoted.text[at++] = c >= 0x20 && c < 0x7F ? c : '?';
    }
    quoted.text[at++] = '\'';
    for (int i = 0; i < 3 && shown < text.size; i++) {
        quoted.text[at++] = '.';
    }
    quoted.text[at] = '\0';
    return quoted;
}

struct sh_block {
    struct sh_block *next;
    max_align_t data[];
};

void *sh_arena_new(sh_arena *arena, size_t count, size_t size) {
    if (size != 0 && count > (SIZE_MAX - sizeof(struct sh_block)) / size) {
        return NULL;
    }
    struct sh_block *block = calloc(1, sizeof(struct sh_block) + count * size);
    if (block == NULL) {
        return NULL;
    }
    block->next = arena->blocks;
    arena->blocks = block;
    return block->data;
}

void sh_arena_free(sh_arena *arena) {
    while (arena->blocks != NULL) {
        struct sh_block *next = arena->blocks->next;
        free(arena->blocks);
        arena->blocks = next;
    }
}
