#define _GNU_SOURCE /* newlocale, uselocale */
#include "json.h"

#include <locale.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#if defined(__APPLE__)
#include <xlocale.h>
#endif

enum { MAX_BYTES = 16 << 20, MAX_DEPTH = 64, MAX_NODES = 1 << 20, MAX_NUMBER = 255 };

typedef struct {
    sh_json *json;
    const char *start, *at, *end;
    char *free_text; /* decoded strings are never longer than the document */
    int depth;
    const char *what;
    const sh_error *error;
} parser;

static bool fail(const parser *p, const char *problem) {
    return sh_fail(p->error, p->what, "JSON in UTF-8", "%s at byte %zu", problem,
                   (size_t)(p->at - p->start));
}

static void skip_space(parser *p) {
    while (p->at < p->end &&
           (*p->at == ' ' || *p->at == '\n' || *p->at == '\t' || *p->at == '\r')) {
        p->at++;
    }
}

static bool accept(parser *p, char c) {
    if (p->at < p->end && *p->at == c) {
        p->at++;
        return true;
    }
    return false;
}

/* A new node, by index: the array may move. */
static bool add_node(parser *p, sh_json_type type, uint32_t *index) {
    sh_json *json = p->json;
    if (json->n_nodes == json->capacity) {
        if (json->n_nodes == MAX_NODES) {
            return fail(p, "more than a million values");
        }
        uint32_t capacity = json->capacity == 0 ? 256 : json->capacity * 2;
        sh_json_node *nodes = realloc(json->nodes, capacity * sizeof *nodes);
        if (nodes == NULL) {
            return fail(p, "no memory");
        }
        json->nodes = nodes;
        json->capacity = capacity;
    }
    *index = json->n_nodes++;
    json->nodes[*index] = (sh_json_node){.type = type, .end = *index + 1};
    return true;
}

/* ---- strings ---- */

static bool hex4(parser *p, uint32_t *value) {
    if (p->end - p->at < 4) {
        return fail(p, "a cut \\u escape");
    }
    *value = 0;
    for (int i = 0; i < 4; i++) {
        char c = *p->at++;
        int digit = c >= '0' && c <= '9'   ? c - '0'
                    : c >= 'a' && c <= 'f' ? c - 'a' + 10
                    : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                           : -1;
        if (digit < 0) {
            return fail(p, "a broken \\u escape");
        }
        *value = *value * 16 + (uint32_t)digit;
    }
    return true;
}

static char *put_utf8(char *out, uint32_t c) {
    if (c < 0x80) {
        *out++ = (char)c;
        return out;
    }
    if (c < 0x800) {
        *out++ = (char)(0xC0 | (c >> 6));
    } else {
        if (c < 0x10000) {
            *out++ = (char)(0xE0 | (c >> 12));
        } else {
            *out++ = (char)(0xF0 | (c >> 18));
            *out++ = (char)(0x80 | ((c >> 12) & 0x3F));
        }
        *out++ = (char)(0x80 | ((c >> 6) & 0x3F));
    }
    *out++ = (char)(0x80 | (c & 0x3F));
    return out;
}

static bool unicode_escape(parser *p, char **out) {
    uint32_t c = 0;
    uint32_t low = 0;
    if (!hex4(p, &c)) {
        return false;
    }
    if (c >= 0xD800 && c < 0xDC00) {
        if (!accept(p, '\\') || !accept(p, 'u')) {
            return fail(p, "a lone surrogate");
        }
        if (!hex4(p, &low)) {
            return false;
        }
        if (low < 0xDC00 || low > 0xDFFF) {
            return fail(p, "a lone surrogate");
        }
        c = 0x10000 + ((c - 0xD800) << 10) + (low - 0xDC00);
    } else if (c >= 0xDC00 && c <= 0xDFFF) {
        return fail(p, "a lone surrogate");
    }
    *out = put_utf8(*out, c);
    return true;
}

static bool escape(parser *p, char **out) {
    static const char names[] = "\"\\/bfnrt";
    static const char values[] = "\"\\/\b\f\n\r\t";
    if (p->at == p->end) {
        return fail(p, "a string without end");
    }
    char c = *p->at++;
    if (c == 'u') {
        return unicode_escape(p, out);
    }
    const char *name = c == '\0' ? NULL : strchr(names, c);
    if (name == NULL) {
        return fail(p, "an unknown escape");
    }
    *(*out)++ = values[name - names];
    return true;
}

/* The opening quote has been read. The document is known to be UTF-8. */
static bool read_string(parser *p) {
    uint32_t index = 0;
    if (!add_node(p, SH_JSON_STRING, &index)) {
        return false;
    }
    char *text = p->free_text;
    char *out = text;
    while (p->at < p->end && *p->at != '"') {
        char c = *p->at++;
        if ((unsigned char)c < 0x20) {
            return fail(p, "a control character in a string");
        }
        if (c != '\\') {
            *out++ = c;
        } else if (!escape(p, &out)) {
            return false;
        }
    }
    if (!accept(p, '"')) {
        return fail(p, "a string without end");
    }
    p->free_text = out;
    p->json->nodes[index].count = (uint32_t)(out - text);
    p->json->nodes[index].value.text = text;
    return true;
}

/* ---- numbers ---- */

static size_t skip_digits(parser *p) {
    const char *from = p->at;
    while (p->at < p->end && *p->at >= '0' && *p->at <= '9') {
        p->at++;
    }
    return (size_t)(p->at - from);
}

/* Moves over a number as JSON spells it. */
static bool scan_number(parser *p, bool *integer) {
    accept(p, '-');
    if (!accept(p, '0') && skip_digits(p) == 0) {
        return fail(p, "no value");
    }
    *integer = true;
    if (accept(p, '.')) {
        *integer = false;
        if (skip_digits(p) == 0) {
            return fail(p, "a number without digits after the point");
        }
    }
    if (accept(p, 'e') || accept(p, 'E')) {
        *integer = false;
        if (!accept(p, '+')) {
            accept(p, '-');
        }
        if (skip_digits(p) == 0) {
            return fail(p, "a number without exponent");
        }
    }
    return true;
}

static bool read_number(parser *p) {
    const char *from = p->at;
    bool integer = false;
    uint32_t index = 0;
    if (!scan_number(p, &integer) ||
        !add_node(p, integer ? SH_JSON_INTEGER : SH_JSON_REAL, &index)) {
        return false;
    }
    char digits[MAX_NUMBER + 1];
    size_t size = (size_t)(p->at - from);
    if (size > MAX_NUMBER) {
        return fail(p, "a number of more than 255 characters");
    }
    memcpy(digits, from, size);
    digits[size] = '\0';
    double number = strtod(digits, NULL); /* in the C locale, see sh_json_parse */
    if (!isfinite(number)) {
        return fail(p, "a number beyond double");
    }
    p->json->nodes[index].value.number = number;
    return true;
}

/* ---- values ---- */

static bool read_value(parser *p);

static int order_keys(const void *a, const void *b) {
    return sh_text_order(*(const sh_text *)a, *(const sh_text *)b);
}

static bool unique_keys(parser *p, uint32_t index) {
    const sh_json_node *nodes = p->json->nodes;
    uint32_t count = nodes[index].count;
    sh_text few[16];
    sh_text *keys = count <= 16 ? few : malloc(count * sizeof *keys);
    if (keys == NULL) {
        return fail(p, "no memory");
    }
    uint32_t at = index + 1;
    for (uint32_t i = 0; i < count; i++) {
        keys[i] = sh_json_text(&nodes[at]);
        at = nodes[at + 1].end;
    }
    qsort(keys, count, sizeof *keys, order_keys);
    bool unique = true;
    for (uint32_t i = 1; i < count && unique; i++) {
        unique = !sh_text_equal(keys[i - 1], keys[i]) || fail(p, "a key twice in an object");
    }
    if (keys != few) {
        free(keys);
    }
    return unique;
}

static bool read_member(parser *p) {
    skip_space(p);
    if (!accept(p, '"')) {
        return fail(p, "no key");
    }
    if (!read_string(p)) {
        return false;
    }
    skip_space(p);
    return accept(p, ':') ? read_value(p) : fail(p, "no colon");
}

/* An array or an object whose opening bracket has been read. */
static bool read_container(parser *p, sh_json_type type, char close) {
    uint32_t index = 0;
    if (++p->depth > MAX_DEPTH) {
        return fail(p, "nesting too deep");
    }
    if (!add_node(p, type, &index)) {
        return false;
    }
    uint32_t count = 0;
    skip_space(p);
    if (!accept(p, close)) {
        do {
            if (!(type == SH_JSON_OBJECT ? read_member(p) : read_value(p))) {
                return false;
            }
            count++;
            skip_space(p);
        } while (accept(p, ','));
        if (!accept(p, close)) {
            return fail(p, "no comma or closing bracket");
        }
    }
    p->depth--;
    p->json->nodes[index].count = count;
    p->json->nodes[index].end = p->json->n_nodes;
    return type != SH_JSON_OBJECT || unique_keys(p, index);
}

static bool read_word(parser *p) {
    static const struct {
        const char *word;
        sh_json_type type;
        double number;
    } words[] = {{"true", SH_JSON_BOOLEAN, 1}, {"false", SH_JSON_BOOLEAN, 0},
                 {"null", SH_JSON_NULL, 0}};
    for (size_t i = 0; i < sizeof words / sizeof *words; i++) {
        size_t size = strlen(words[i].word);
        if ((size_t)(p->end - p->at) >= size && memcmp(p->at, words[i].word, size) == 0) {
            uint32_t index = 0;
            p->at += size;
            if (!add_node(p, words[i].type, &index)) {
                return false;
            }
            p->json->nodes[index].value.number = words[i].number;
            return true;
        }
    }
    return read_number(p);
}

static bool read_value(parser *p) {
    skip_space(p);
    if (accept(p, '{')) {
        return read_container(p, SH_JSON_OBJECT, '}');
    }
    if (accept(p, '[')) {
        return read_container(p, SH_JSON_ARRAY, ']');
    }
    return accept(p, '"') ? read_string(p) : read_word(p);
}

static bool read_document(parser *p) {
    if (!read_value(p)) {
        return false;
    }
    skip_space(p);
    return p->at == p->end || fail(p, "more after the value");
}

bool sh_json_parse(sh_json *json, sh_text document, const char *what, const sh_error *error) {
    *json = (sh_json){0};
    parser p = {.json = json, .start = document.data, .at = document.data, .what = what,
                .end = document.data + document.size, .error = error};
    if (document.size == 0 || document.size > MAX_BYTES) {
        return sh_fail(error, what, "1 to 16777216 bytes", "%zu bytes", document.size);
    }
    if (!sh_is_utf8(document.data, document.size)) {
        return fail(&p, "no UTF-8");
    }
    p.free_text = json->text = malloc(document.size);
    locale_t c_locale = newlocale(LC_ALL_MASK, "C", (locale_t)0);
    if (json->text == NULL || c_locale == (locale_t)0) {
        if (c_locale != (locale_t)0) {
            freelocale(c_locale);
        }
        return fail(&p, "no memory");
    }
    /* The host program's locale may use a decimal comma; strtod must not. This thread only. */
    locale_t before = uselocale(c_locale);
    bool ok = read_document(&p);
    uselocale(before);
    freelocale(c_locale);
    return ok;
}

void sh_json_free(sh_json *json) {
    free(json->nodes);
    free(json->text);
    *json = (sh_json){0};
}

sh_text sh_json_text(const sh_json_node *node) {
    return (sh_text){node->value.text, node->count};
}

const sh_json_node *sh_json_member(const sh_json *json, const sh_json_node *object,
                                   const char *name) {
    uint32_t at = (uint32_t)(object - json->nodes) + 1;
    for (uint32_t i = 0; i < object->count; i++) {
        if (sh_text_is(sh_json_text(&json->nodes[at]), name)) {
            return &json->nodes[at + 1];
        }
        at = json->nodes[at + 1].end;
    }
    return NULL;
}
