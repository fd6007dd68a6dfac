#include "states.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "events.h"
#include "settings.h"
#include "sha256.h"
#include "watch.h"

/* ---- the layout: a frame, a record for each sequence, an end ----
 *
 * Frames and records are zeroed before they are filled: their padding is written too. */

typedef struct {
    char magic[8];
    char package[SB_SHA256_TEXT];
    int32_t n_sequences;
} frame;

typedef struct {
    int32_t n_rows, partial, used, told, told_rules, held, at_end, strange, n_prompt;
    int32_t first, ended, n_tokens, n_choices; /* of its answer */
    uint64_t n_hook; /* bytes of libsteerhook */
} record;

typedef struct {
    uint64_t size, sum; /* of the bytes before, and their checksum */
    char magic[8];
} end;

static const char start_magic[8] = "SBSTATE", end_magic[8] = "SBSTEND";

/* Guards against accidents: words of 8 bytes, multiplied by the golden ratio's. */
static uint64_t checksum(uint64_t sum, const void *bytes, size_t size) {
    const unsigned char *at = bytes;
    while (size > 0) {
        uint64_t word = 0;
        size_t step = size < sizeof word ? size : sizeof word;
        memcpy(&word, at, step);
        sum = (sum ^ word) * UINT64_C(0x9e3779b97f4a7c15);
        sum ^= sum >> 32;
        at += step;
        size -= step;
    }
    return sum;
}

/* ---- writing ---- */

static const sb_watch *saved_by(llama_context *context) {
    const sb_watch *watch = sb_watch_known(context);
    return watch == NULL || watch->failed ? NULL : watch;
}

static size_t record_size(const sb_watch *watch, int32_t seq, bool partial) {
    const sb_sequence *q = &watch->sequences[seq];
    size_t rows = (size_t)q->cells.count;
    return sizeof(record) + rows * (sizeof *q->cells.positions + sizeof *q->cells.histories) +
           (size_t)q->answer.n_tokens * sizeof *q->answer.tokens +
           (size_t)q->answer.n_choices * sizeof *q->answer.choices +
           steerhook_saved_size(watch->session, seq, !partial);
}

static int32_t first_of(sb_part part) {
    return part.seq < 0 ? 0 : part.seq;
}

static int32_t past_last(const sb_watch *watch, sb_part part) {
    return part.seq < 0 ? watch->n_seq_max : part.seq + 1;
}

static bool holds(const sb_watch *watch, sb_part part) {
    return watch != NULL && part.seq < watch->n_seq_max;
}

size_t sb_state_size(llama_context *context, sb_part part) {
    const sb_watch *watch = saved_by(context);
    if (!holds(watch, part)) {
        return 0;
    }
    size_t size = sizeof(frame) + sizeof(end);
    for (int32_t seq = first_of(part); seq < past_last(watch, part); seq++) {
        size += record_size(watch, seq, part.partial);
    }
    return size;
}

typedef struct {
    uint8_t *at;
} writer;

static void put(writer *w, const void *bytes, size_t count, size_t size) {
    if (count * size > 0) {
        memcpy(w->at, bytes, count * size);
        w->at += count * size;
    }
}

static bool write_record(writer *w, const sb_watch *watch, int32_t seq, bool partial) {
    const sb_sequence *q = &watch->sequences[seq];
    const sb_cells *cells = &q->cells;
    record r;
    memset(&r, 0, sizeof r);
    r.n_rows = cells->count;
    r.partial = partial;
    r.used = q->used;
    r.told = q->told;
    r.told_rules = q->told_rules;
    r.held = q->held;
    r.at_end = q->at_end;
    r.strange = q->strange;
    r.first = q->answer.first;
    r.ended = q->answer.ended;
    r.n_tokens = q->answer.n_tokens;
    r.n_choices = q->answer.n_choices;
    r.n_hook = steerhook_saved_size(watch->session, seq, !partial);
    steerhook_request_rows(watch->session, seq, &r.n_prompt);
    put(w, &r, 1, sizeof r);
    put(w, cells->positions, (size_t)cells->count, sizeof *cells->positions);
    put(w, cells->histories, (size_t)cells->count, sizeof *cells->histories);
    put(w, q->answer.tokens, (size_t)r.n_tokens, sizeof *q->answer.tokens);
    put(w, q->answer.choices, (size_t)r.n_choices, sizeof *q->answer.choices);
    bool saved = steerhook_save(watch->session, seq, !partial, w->at, r.n_hook) == STEERHOOK_OK;
    w->at += r.n_hook;
    return saved;
}

static frame frame_of(int32_t n_sequences) {
    frame f;
    memset(&f, 0, sizeof f);
    memcpy(f.magic, start_magic, sizeof f.magic);
    snprintf(f.package, sizeof f.package, "%s", sb_package_sha256());
    f.n_sequences = n_sequences;
    return f;
}

size_t sb_state_append(llama_context *context, sb_part part, uint8_t *state, size_t used,
                       size_t size) {
    size_t ours = sb_state_size(context, part);
    if (used == 0 || ours == 0 || size < used || size - used < ours) {
        return used; /* a program that did not ask for the size: the rows will be unknown */
    }
    const sb_watch *watch = saved_by(context);
    frame f = frame_of(past_last(watch, part) - first_of(part));
    writer w = {state + used};
    bool saved = true;
    put(&w, &f, 1, sizeof f);
    for (int32_t seq = first_of(part); seq < past_last(watch, part); seq++) {
        saved = write_record(&w, watch, seq, part.partial) && saved;
    }
    end e = {.size = ours - sizeof e};
    e.sum = checksum(0, state + used, (size_t)e.size);
    memcpy(e.magic, end_magic, sizeof e.magic);
    put(&w, &e, 1, sizeof e);
    return saved ? used + ours : used;
}

/* ---- reading ---- */

size_t sb_state_ours(const uint8_t *state, size_t size) {
    end e;
    if (state == NULL || size < sizeof(frame) + sizeof e) {
        return 0;
    }
    memcpy(&e, state + size - sizeof e, sizeof e);
    bool found = memcmp(e.magic, end_magic, sizeof e.magic) == 0 && e.size >= sizeof(frame) &&
                 e.size <= size - sizeof e &&
                 e.sum == checksum(0, state + size - sizeof e - e.size, (size_t)e.size);
    return found ? (size_t)e.size + sizeof e : 0;
}

typedef struct {
    const uint8_t *at;
    size_t left;
} reader;

/* The next so many items, which are only read if they are there; NULL if they are not. */
static const uint8_t *take(reader *r, int64_t count, size_t size) {
    const uint8_t *at = r->at;
    if (count < 0 || (uint64_t)count > r->left / size) {
        return NULL;
    }
    r->at += (size_t)count * size;
    r->left -= (size_t)count * size;
    return at;
}

typedef struct {
    record is;
    const uint8_t *positions, *histories, *tokens, *choices, *hook;
} read_record;

static bool next_record(reader *r, read_record *out) {
    const uint8_t *at = take(r, 1, sizeof out->is);
    if (at == NULL) {
        return false;
    }
    memcpy(&out->is, at, sizeof out->is);
    out->positions = take(r, out->is.n_rows, sizeof(int32_t));
    out->histories = take(r, out->is.n_rows, sizeof(uint64_t));
    out->tokens = take(r, out->is.n_tokens, sizeof(int32_t));
    out->choices = take(r, out->is.n_choices, sizeof(sb_choice));
    out->hook = out->is.n_hook > INT64_MAX ? NULL : take(r, (int64_t)out->is.n_hook, 1);
    return out->is.n_rows >= 0 && out->positions != NULL && out->histories != NULL &&
           out->tokens != NULL && out->choices != NULL && out->hook != NULL;
}

/* Bytes as an array of their type; the caller frees it. */
static void *aligned(const uint8_t *bytes, int32_t count, size_t size) {
    void *copy = malloc((size_t)count * size + 1);
    if (copy == NULL) {
        sb_fatal("no memory");
    }
    memcpy(copy, bytes, (size_t)count * size);
    return copy;
}

static bool take_cells(sb_cells *cells, const read_record *r) {
    int32_t *positions = aligned(r->positions, r->is.n_rows, sizeof *positions);
    uint64_t *histories = aligned(r->histories, r->is.n_rows, sizeof *histories);
    bool ordered = sb_cells_take(cells, positions, histories, r->is.n_rows);
    free(positions);
    free(histories);
    return ordered;
}

static void take_choices(sb_answer *answer, const read_record *r) {
    sb_choice *choices = aligned(r->choices, r->is.n_choices, sizeof *choices);
    for (int32_t i = 0; i < r->is.n_choices; i++) {
        sb_answer_choose(answer, choices[i].row, choices[i].token);
    }
    free(choices);
}

static void take_answer(sb_answer *answer, const read_record *r) {
    int32_t *tokens = aligned(r->tokens, r->is.n_tokens, sizeof *tokens);
    sb_answer_forget(answer);
    sb_answer_begin(answer, r->is.first);
    for (int32_t i = 0; i < r->is.n_tokens; i++) {
        sb_answer_add(answer, r->is.first + i, tokens[i], false);
    }
    take_choices(answer, r);
    answer->ended = r->is.ended;
    free(tokens);
}

/* How many of the first rows of a record are those of the cache. */
static int32_t shared_rows(const sb_cells *cells, const read_record *r) {
    int32_t count = r->is.n_rows < cells->count ? r->is.n_rows : cells->count;
    for (; count > 0; count--) { /* a history stands for all rows before it */
        uint64_t history;
        memcpy(&history, r->histories + (size_t)(count - 1) * sizeof history, sizeof history);
        if (history == sb_cells_history(cells, count)) {
            break;
        }
    }
    return count;
}

/* A part of the state comes from rows of which only the first `shared` are the cache's own: the rows
 * behind them are a mixture, until the program removes them (llama-server goes back to a checkpoint
 * one row behind the prompts' common beginning). */
static bool overlay(sb_watch *watch, int32_t seq, const read_record *r, int32_t shared) {
    if (shared == 0) {
        return false;
    }
    int32_t *positions = aligned(r->positions, r->is.n_rows, sizeof *positions);
    sb_overlaid(watch, seq, shared, positions + shared, r->is.n_rows - shared);
    free(positions);
    return true;
}

/* The cache of a sequence is what a record says. False: what it holds is not known. */
static bool restore(sb_watch *watch, int32_t seq, const read_record *r) {
    sb_sequence *q = &watch->sequences[seq];
    sb_cells *cells = &q->cells;
    /* Its own first rows: they may be where the state was saved, with others behind. */
    int32_t shared = shared_rows(cells, r);
    bool own = shared == r->is.n_rows;
    int32_t n_prompt;
    steerhook_request_rows(watch->session, seq, &n_prompt);
    if (own && q->used && r->is.used && n_prompt > 0 && n_prompt == r->is.n_prompt) {
        if (r->is.n_rows < cells->count) { /* the same answer, some tokens earlier */
            sb_cut(watch->context, seq, cells->positions[r->is.n_rows], -1);
        }
        take_choices(&q->answer, r); /* it went on, and they were not needed any more */
        return true;
    }
    if (r->is.partial && !own) {
        return overlay(watch, seq, r, shared);
    }
    if (steerhook_load(watch->session, seq, r->hook, r->is.n_hook) != STEERHOOK_OK) {
        return false;
    }
    if (r->is.partial) {
        sb_cells_cut(cells, r->is.n_rows, cells->count);
    } else if (!take_cells(cells, r)) {
        return false;
    }
    int32_t behind = cells->count == 0 ? 0 : cells->positions[cells->count - 1] + 1;
    if (!r->is.partial && sb_next_position(watch, seq) != behind) {
        return false;
    }
    take_answer(&q->answer, r);
    q->used = r->is.used != 0;
    q->told = r->is.told != 0;
    q->told_rules = r->is.told_rules;
    q->held = r->is.held != 0;
    q->at_end = r->is.at_end != 0;
    q->strange = r->is.strange;
    q->batch = 0;
    q->origin = seq;
    q->first = r->is.n_rows;
    q->rows = q->blind = 0;
    q->judged = q->draft = -1;
    return true;
}

void sb_state_restored(llama_context *context, sb_part part, const uint8_t *state, size_t size,
                       size_t ours) {
    sb_watch *watch = sb_watch_of(context);
    if (!sb_steers(watch) || part.seq >= watch->n_seq_max) {
        return;
    }
    int32_t first = first_of(part), past = past_last(watch, part);
    frame expected = frame_of(past - first);
    reader r = {ours == 0 ? NULL : state + size - ours, ours};
    const uint8_t *at = take(&r, 1, sizeof expected);
    bool known = !watch->failed && at != NULL && memcmp(at, &expected, sizeof expected) == 0;
    for (int32_t seq = first; seq < past; seq++) {
        read_record one;
        known = known && next_record(&r, &one);
        if (!known || (one.is.partial != 0) != part.partial || !restore(watch, seq, &one)) {
            sb_forget(watch, seq);
        }
    }
}

/* ---- files ---- */

typedef struct {
    char magic[8];
    uint64_t size, sum; /* of the state's own file */
} file_frame;

static const char file_magic[8] = "SBSFILE";

static char *named(const char *path, const char *suffix) {
    char *name = malloc(strlen(path) + strlen(suffix) + 1);
    if (name == NULL) {
        sb_fatal("no memory");
    }
    strcpy(name, path);
    return strcat(name, suffix);
}

/* What a state's file is known by; false if it cannot be read. */
static bool identify(const char *path, file_frame *frame_of_file) {
    enum { CHUNK = 1 << 20 };
    FILE *file = fopen(path, "rb");
    uint8_t *bytes = malloc(CHUNK);
    size_t count = 1;
    memset(frame_of_file, 0, sizeof *frame_of_file);
    memcpy(frame_of_file->magic, file_magic, sizeof file_magic);
    while (file != NULL && bytes != NULL && (count = fread(bytes, 1, CHUNK, file)) > 0) {
        frame_of_file->sum = checksum(frame_of_file->sum, bytes, count);
        frame_of_file->size += count;
    }
    bool whole = file != NULL && bytes != NULL && ferror(file) == 0;
    if (file != NULL) {
        fclose(file);
    }
    free(bytes);
    return whole;
}

static bool write_file(const char *path, const file_frame *f, const uint8_t *ours, size_t size) {
    FILE *file = fopen(path, "wb");
    bool written = file != NULL && fwrite(f, sizeof *f, 1, file) == 1 &&
                   fwrite(ours, 1, size, file) == size;
    return (file == NULL || fclose(file) == 0) && written;
}

void sb_state_beside(llama_context *context, sb_part part, const char *path) {
    size_t size = sb_state_size(context, part);
    if (size == 0) {
        return;
    }
    char *beside = named(path, ".steerbridge"), *fresh = named(path, ".steerbridge.new");
    uint8_t *ours = malloc(size + 1); /* behind a state of one byte */
    file_frame f;
    bool done = ours != NULL && sb_state_append(context, part, ours, 1, size + 1) == size + 1 &&
                identify(path, &f) && write_file(fresh, &f, ours + 1, size) &&
                rename(fresh, beside) == 0;
    if (!done) {
        fprintf(stderr, "steerbridge: %s: cannot be written (%s); what is read from %s will be "
                "unjudged\n", beside, strerror(errno), path);
        remove(fresh);
        remove(beside);
    }
    free(ours);
    free(beside);
    free(fresh);
}

/* The whole of a file; NULL if it cannot be read. */
static uint8_t *read_file(const char *path, size_t *size) {
    FILE *file = fopen(path, "rb");
    uint8_t *bytes = NULL;
    long length = -1;
    if (file != NULL && fseek(file, 0, SEEK_END) == 0 && (length = ftell(file)) >= 0 &&
        fseek(file, 0, SEEK_SET) == 0) {
        bytes = malloc((size_t)length + 1);
    }
    if (bytes != NULL && fread(bytes, 1, (size_t)length, file) != (size_t)length) {
        free(bytes);
        bytes = NULL;
    }
    if (file != NULL) {
        fclose(file);
    }
    *size = bytes == NULL ? 0 : (size_t)length;
    return bytes;
}

void sb_state_loaded(llama_context *context, sb_part part, const char *path) {
    size_t size = 0;
    char *beside = path == NULL ? NULL : named(path, ".steerbridge");
    uint8_t *bytes = beside == NULL ? NULL : read_file(beside, &size);
    file_frame found;
    /* Another state may have been written there since. */
    bool same = size > sizeof found && identify(path, &found) &&
                memcmp(bytes, &found, sizeof found) == 0;
    sb_state_restored(context, part, bytes, size, same ? sb_state_ours(bytes, size) : 0);
    free(bytes);
    free(beside);
}
