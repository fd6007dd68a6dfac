/* Text with a length, error texts, and memory that is freed as a whole. */
#ifndef STEERHOOK_TEXT_H
#define STEERHOOK_TEXT_H

#include <stdbool.h>
#include <stddef.h>

typedef struct {
    const char *data; /* may hold NUL; not terminated */
    size_t size;
} sh_text;

bool sh_text_equal(sh_text a, sh_text b);
bool sh_text_is(sh_text a, const char *b);
int sh_text_order(sh_text a, sh_text b);

/* Strict UTF-8: no overlong forms, no surrogates, nothing above U+10FFFF. */
bool sh_is_utf8(const char *bytes, size_t size);

/* 1 to 63 of A-Z a-z 0-9 _ . - : ids, and names that fit ggml. */
bool sh_is_name(sh_text text);

/* Where the text of the first error goes. */
typedef struct {
    char *text;
    size_t size;
} sh_error;

/* Writes "<field>: expected <want>, found <got>" and returns false, so that callers can
 * `return sh_fail(...)`. `got` is a printf format. */
#if defined(__GNUC__)
__attribute__((format(printf, 4, 5)))
#endif
bool sh_fail(const sh_error *error, const char *field, const char *want, const char *got, ...);

/* The text in quotes, cut and with unprintable bytes as '?': files are untrusted, and error texts
 * are printed in terminals and logs. */
typedef struct {
    char text[72];
} sh_quoted;
sh_quoted sh_quote(sh_text text);

typedef struct {
    struct sh_block *blocks;
} sh_arena;

/* Zeroed memory for `count` items, or NULL; freed by sh_arena_free. */
void *sh_arena_new(sh_arena *arena, size_t count, size_t size);
void sh_arena_free(sh_arena *arena);

#endif
