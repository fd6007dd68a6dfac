#define _GNU_SOURCE
#include "watch.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "events.h"
#include "facts.h"
#include "real.h"
#include "steerhook.h"

typedef struct {
    bool cut;      /* its cache was cut since its last rows */
    bool lost;     /* it had a request when the session failed */
    bool in_batch; /* of the batch being begun */
    bool quiet;    /* a row of it in this batch asks for no logits */
    bool drafts;   /* its answer was drafted: several rows of a batch asked for logits */
    int32_t first, rows; /* its first row in this batch, and how many there are */
    int32_t gap, shift; /* rows that a context shift took out at `gap` */
    uint64_t made, reset;  /* samplers made and reset before its last rows */
    steerhook_stage stage; /* before this batch */
} sequence;

struct sb_watch {
    llama_context *context;
    const void *memory;
    steerhook_session *session; /* NULL: not steered, see `other` */
    bool other, mrope, failed;
    int32_t n_seq_max, number;
    sequence *sequences;
    struct sb_watch *next;
};

static sb_watch *watches;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static _Thread_local sb_watch *current; /* whose llama_decode runs on this thread */
static atomic_uint_fast64_t samplers_made, samplers_reset;

void sb_sampler_made(void) {
    atomic_fetch_add(&samplers_made, 1);
}

void sb_sampler_reset(void) {
    atomic_fetch_add(&samplers_reset, 1);
}

sb_graph sb_current(eval_callback *callback, void **data) {
    if (current == NULL) {
        return SB_UNSEEN;
    }
    if (current->session == NULL) {
        return SB_UNSTEERED;
    }
    *callback = steerhook_eval;
    *data = current->session;
    return SB_STEERED;
}

/* ---- the loaded llama.cpp ---- */

typedef int32_t (*of_model)(const llama_model *);
typedef uint32_t (*of_context)(const llama_context *);
typedef const llama_model *(*model_of)(const llama_context *);

static bool is(const char *function, const llama_model *model) {
    typedef bool (*question)(const llama_model *);
    question ask = (question)sb_either(function, NULL);
    return ask != NULL && ask(model);
}

static int32_t rope_type(const llama_model *model) {
    return SB_CALL(of_model, "llama_model_rope_type", "llama_rope_type")(model);
}

/* ---- settings ---- */

/* Whether one of the items between `;` in a variable is `item`. */
static bool listed(const char *variable, const char *item) {
    const char *list = getenv(variable);
    size_t length = strlen(item);
    while (list != NULL && *list != '\0') {
        size_t end = strcspn(list, ";");
        if (end == length && strncmp(list, item, length) == 0) {
            return true;
        }
        list += end + (list[end] == ';');
    }
    return false;
}

static steerhook_package *package(void) {
    static steerhook_package *loaded;
    const char *path = getenv("STEERBRIDGE_PACKAGE");
    char error[512];
    if (loaded == NULL) {
        if (path == NULL || path[0] == '\0') {
            sb_fatal("STEERBRIDGE_PACKAGE: expected the path of a steering package, found none");
        }
        loaded = steerhook_package_load(path, error, sizeof error);
        if (loaded == NULL) {
            sb_fatal("%s: %s", path, error);
        }
    }
    return loaded;
}

/* The name under which a package keeps thresholds for a `general.file_type`, from items such as
 * "3:Q4_1". */
static bool calibrate(steerhook_session *session, const char *file_type) {
    const char *list = getenv("STEERBRIDGE_FILE_TYPES");
    size_t length = strlen(file_type);
    bool calibrated = false;
    while (list != NULL && *list != '\0') {
        size_t end = strcspn(list, ";");
        if (length > 0 && end > length && end - length < 64 && list[length] == ':' &&
            strncmp(list, file_type, length) == 0) {
            char name[64];
            snprintf(name, sizeof name, "%.*s", (int)(end - length - 1), list + length + 1);
            steerhook_calibrate(session, "llama.cpp", name, &calibrated);
        }
        list += end + (list[end] == ';');
    }
    return calibrated;
}

/* ---- a context ---- */

static void check_context(const llama_context *context, const llama_model *model,
                          const sb_facts *f) {
    sb_check_model(model, f);
    if (is("llama_model_has_encoder", model) || is("llama_model_is_recurrent", model) ||
        is("llama_model_is_hybrid", model)) {
        sb_fatal("model %s: expected a decoder with only a KV cache, found an encoder or "
                 "recurrent state",
                 f->name);
    }
    uint32_t n_seq = SB_CALL(of_context, "llama_n_seq_max", NULL)(context);
    of_context per_sequence = (of_context)sb_either("llama_n_ctx_seq", NULL);
    uint32_t n_ctx = SB_CALL(of_context, "llama_n_ctx", NULL)(context);
    if (n_seq > 1 && per_sequence != NULL && per_sequence(context) != n_ctx) {
        sb_fatal("KV cache: expected a unified one for %lu sequences, found one per sequence; set "
                 "LLAMA_ARG_KV_UNIFIED=1 or kv_unified",
                 (unsigned long)n_seq);
    }
}

static steerhook_session *session_for(const llama_context *context, const sb_facts *f) {
    steerhook_model shape = {
        .n_embd = f->n_embd,
        .n_layer = f->n_layer,
        .n_ubatch = (int32_t)SB_CALL(of_context, "llama_n_ubatch", NULL)(context),
        .n_seq_max = (int32_t)SB_CALL(of_context, "llama_n_seq_max", NULL)(context),
    };
    typedef const char *(*get_name)(const struct ggml_tensor *);
    typedef size_t (*nbytes)(const struct ggml_tensor *);
    typedef void (*get)(const struct ggml_tensor *, void *, size_t, size_t);
    typedef void (*set)(struct ggml_tensor *, const void *, size_t, size_t);
    steerhook_ggml ggml = {
        SB_CALL(get_name, "ggml_get_name", NULL),
        SB_CALL(nbytes, "ggml_nbytes", NULL),
        SB_CALL(get, "ggml_backend_tensor_get", NULL),
        SB_CALL(set, "ggml_backend_tensor_set", NULL),
    };
    char error[512];
    steerhook_session *session =
        steerhook_session_new(package(), &shape, &ggml, error, sizeof error);
    if (session == NULL) {
        sb_fatal("package: %s", error);
    }
    /* Programs may begin prompts with any cached rows, also with rows of answers. */
    steerhook_keep_rows(session, true);
    return session;
}

static void tell_active(const sb_watch *watch, const sb_facts *f, bool calibrated) {
    sb_event event;
    sb_event_begin(&event, watch->other ? "unsteered" : "active");
    sb_event_number(&event, "context", watch->number);
    sb_event_text(&event, "model", "%s", f->name);
    sb_event_text(&event, "architecture", "%s", f->architecture);
    sb_event_number(&event, "n_embd", f->n_embd);
    sb_event_number(&event, "n_layer", f->n_layer);
    sb_event_number(&event, "sequences", watch->n_seq_max);
    sb_event_bool(&event, "calibrated", calibrated);
    sb_event_send(&event);
}

static void open_watch(sb_watch *watch) {
    const llama_model *model = SB_CALL(model_of, "llama_get_model", NULL)(watch->context);
    sb_facts f = sb_facts_of(model);
    steerhook_package_info info = steerhook_package_describe(package());
    char shape[128];
    snprintf(shape, sizeof shape, "%s:%ld:%ld", f.architecture, (long)f.n_embd, (long)f.n_layer);
    bool calibrated = false;
    watch->other = f.n_embd != info.n_embd || f.n_layer != info.n_layer;
    if (watch->other && !listed("STEERBRIDGE_UNSTEERED", shape)) {
        sb_fatal("model %s (%s): expected width %ld and %ld blocks, which the package steers; a "
                 "draft or embedding model must be named with --also",
                 f.name, shape, (long)info.n_embd, (long)info.n_layer);
    }
    if (!watch->other) {
        check_context(watch->context, model, &f);
        typedef const void *(*memory_of)(const llama_context *);
        memory_of memory = (memory_of)sb_either("llama_get_memory", NULL);
        watch->memory = memory == NULL ? watch->context : memory(watch->context);
        watch->mrope = rope_type(model) == LLAMA_ROPE_MROPE || rope_type(model) == LLAMA_ROPE_IMROPE;
        watch->session = session_for(watch->context, &f);
        watch->n_seq_max = (int32_t)SB_CALL(of_context, "llama_n_seq_max", NULL)(watch->context);
        watch->sequences = calloc((size_t)watch->n_seq_max, sizeof *watch->sequences);
        if (watch->sequences == NULL) {
            sb_fatal("no memory");
        }
        calibrated = calibrate(watch->session, f.file_type);
    }
    tell_active(watch, &f, calibrated);
}

static sb_watch *known(const void *context, const void *memory) {
    sb_watch *watch = watches;
    while (watch != NULL && watch->context != context &&
           (memory == NULL || (watch->memory != memory && watch->context != memory))) {
        watch = watch->next;
    }
    return watch;
}

sb_watch *sb_watch_of(llama_context *context) {
    static int32_t count;
    pthread_mutex_lock(&lock);
    sb_watch *watch = known(context, NULL);
    if (watch == NULL) {
        watch = calloc(1, sizeof *watch);
        if (watch == NULL) {
            sb_fatal("no memory");
        }
        watch->context = context;
        watch->number = count++;
        open_watch(watch);
        watch->next = watches;
        watches = watch;
    }
    pthread_mutex_unlock(&lock);
    return watch;
}

bool sb_steers(const sb_watch *watch) {
    return !watch->other;
}

void sb_watch_free(llama_context *context) {
    pthread_mutex_lock(&lock);
    sb_watch **link = &watches;
    while (*link != NULL && (*link)->context != context) {
        link = &(*link)->next;
    }
    sb_watch *watch = *link;
    if (watch != NULL) {
        *link = watch->next;
        steerhook_session_free(watch->session);
        free(watch->sequences);
        free(watch);
    }
    pthread_mutex_unlock(&lock);
}

/* The watch whose cache this is, or NULL: it has decoded nothing yet, or is not steered. */
static sb_watch *of_memory(const void *memory) {
    pthread_mutex_lock(&lock);
    sb_watch *watch = memory == NULL ? NULL : known(NULL, memory);
    pthread_mutex_unlock(&lock);
    return watch != NULL && watch->session != NULL ? watch : NULL;
}

/* ---- failure ---- */

static void tell_refused(const sb_watch *watch, int32_t seq, const char *reason) {
    sb_event event;
    fprintf(stderr, "steerbridge: sequence %ld refused: %s\n", (long)seq, reason);
    sb_event_begin(&event, "refused");
    sb_event_number(&event, "context", watch->number);
    sb_event_number(&event, "sequence", seq);
    sb_event_text(&event, "reason", "%s", reason);
    sb_event_send(&event);
}

/* No sequence that had a request may go on before its cache was emptied. */
static void fail(sb_watch *watch, const char *reason) {
    if (!watch->failed) {
        sb_tell("failed", "context %ld: %s", (long)watch->number, reason);
    }
    watch->failed = true;
    for (int32_t i = 0; i < watch->n_seq_max; i++) {
        watch->sequences[i].lost = steerhook_request_stage(watch->session, i) != STEERHOOK_NONE;
    }
}

static void recover(sb_watch *watch) {
    for (int32_t i = 0; i < watch->n_seq_max; i++) {
        if (watch->sequences[i].lost) {
            return;
        }
    }
    watch->failed = false;
    steerhook_session_clear(watch->session);
    for (int32_t i = 0; i < watch->n_seq_max; i++) {
        steerhook_rows_restored(watch->session, i); /* rows of finished requests are still there */
    }
}

/* ---- requests of a batch ---- */

static bool in_range(const sb_watch *watch, int32_t seq) {
    return seq >= 0 && seq < watch->n_seq_max;
}

/* Notes which sequences have rows here; false if one is out of range. */
static bool survey(sb_watch *watch, const sb_rows *rows) {
    for (int32_t i = 0; i < watch->n_seq_max; i++) {
        watch->sequences[i].in_batch = false;
    }
    for (int32_t row = 0; row < rows->n_tokens; row++) {
        bool output = rows->output == NULL ? row == rows->n_tokens - 1 : rows->output[row] != 0;
        int32_t count = rows->n_seq_id == NULL ? 1 : rows->n_seq_id[row];
        for (int32_t i = 0; i < count; i++) {
            int32_t seq = rows->seq_id == NULL ? 0 : rows->seq_id[row][i];
            if (!in_range(watch, seq)) {
                return false;
            }
            sequence *q = &watch->sequences[seq];
            if (!q->in_batch) {
                q->in_batch = true;
                q->quiet = false;
                q->first = row;
                q->rows = 0;
                q->stage = steerhook_request_stage(watch->session, seq);
            }
            q->quiet |= !output;
            q->rows++;
        }
    }
    return true;
}

/* Rows of a sequence that are in the cache before this batch. */
static int32_t cached(const sb_watch *watch, const sb_rows *rows, int32_t seq) {
    if (rows->pos != NULL) {
        return rows->pos[watch->sequences[seq].first];
    }
    typedef int32_t (*last_position)(const void *, int32_t);
    static last_position last; /* looked up once: every prompt without positions asks */
    if (last == NULL) {
        last = (last_position)sb_either("llama_memory_seq_pos_max", "llama_kv_self_seq_pos_max");
    }
    if (last == NULL) {
        last = SB_CALL(last_position, "llama_kv_cache_seq_pos_max", NULL);
    }
    return last(watch->memory, seq) + 1;
}

/* Opens a request where these rows start one; false if it was refused. */
static bool enter(sb_watch *watch, const sb_rows *rows, int32_t seq) {
    sequence *q = &watch->sequences[seq];
    uint64_t made = atomic_load(&samplers_made), reset = atomic_load(&samplers_reset);
    bool sampler = q->made != made || (q->reset != reset && !q->drafts);
    bool restarted = q->cut && q->rows == 1 && sampler;
    bool fresh = q->stage == STEERHOOK_NONE ||
                 (q->stage == STEERHOOK_ANSWERING && (q->quiet || restarted));
    if (fresh) {
        steerhook_status status = steerhook_request_open(
            watch->session, seq, cached(watch, rows, seq), !q->quiet);
        if (status != STEERHOOK_OK) {
            tell_refused(watch, seq, steerhook_session_error(watch->session));
            return false;
        }
        q->gap = q->shift = 0;
        q->drafts = false;
        q->stage = STEERHOOK_PROMPTING;
    }
    q->drafts |= q->stage == STEERHOOK_ANSWERING && q->rows > 1;
    q->cut = false;
    q->made = made;
    q->reset = reset;
    return true;
}

bool sb_before(sb_watch *watch, const sb_rows *rows) {
    current = watch; /* also where nothing is steered: llama.cpp may use this graph again */
    if (watch->other) {
        return true;
    }
    current = NULL;
    if (watch->failed) {
        return false;
    }
    if (rows->image && watch->mrope) {
        fail(watch, "images of a model with M-RoPE: positions do not identify rows");
        return false;
    }
    if (!survey(watch, rows)) {
        fail(watch, "a row of a sequence that the context does not have");
        return false;
    }
    for (int32_t seq = 0; seq < watch->n_seq_max; seq++) {
        if (watch->sequences[seq].in_batch && !enter(watch, rows, seq)) {
            return false;
        }
    }
    steerhook_batch batch = {rows->n_tokens, rows->n_seq_id, rows->seq_id, rows->output,
                             rows->image};
    if (steerhook_batch_begin(watch->session, &batch) != STEERHOOK_OK) {
        fail(watch, steerhook_session_error(watch->session));
        return false;
    }
    current = watch;
    return true;
}

static void tell_verdict(const sb_watch *watch, int32_t seq) {
    enum { MAX = 64 };
    steerhook_verdict verdicts[MAX];
    steerhook_rule_state rules[MAX];
    int32_t probes = steerhook_verdicts(watch->session, seq, verdicts, MAX);
    int32_t count = steerhook_rules(watch->session, seq, rules, MAX);
    sb_event event;
    sb_event_begin(&event, "verdict");
    sb_event_number(&event, "context", watch->number);
    sb_event_number(&event, "sequence", seq);
    sb_event_open(&event, "probes", '[');
    for (int32_t i = 0; i < probes && i < MAX; i++) {
        sb_event_open(&event, NULL, '{');
        sb_event_text(&event, "probe", "%s", verdicts[i].probe);
        sb_event_number(&event, "score", verdicts[i].score);
        sb_event_number(&event, "threshold", verdicts[i].threshold);
        sb_event_bool(&event, "fired", verdicts[i].fired);
        if (verdicts[i].unjudged[0] != '\0') {
            sb_event_text(&event, "unjudged", "%s", verdicts[i].unjudged);
        }
        sb_event_close(&event, '}');
    }
    sb_event_close(&event, ']');
    sb_event_open(&event, "fired", '[');
    for (int32_t i = 0; i < count && i < MAX; i++) {
        if (rules[i].fired) {
            sb_event_text(&event, NULL, "%s", rules[i].rule);
        }
    }
    sb_event_close(&event, ']');
    sb_event_send(&event);
}

int32_t sb_after(sb_watch *watch, int32_t result) {
    current = NULL;
    if (watch->other) {
        return result;
    }
    steerhook_status status = result == 0 ? steerhook_batch_end(watch->session)
                                          : steerhook_batch_cancel(watch->session);
    if (status != STEERHOOK_OK) {
        fail(watch, steerhook_session_error(watch->session));
        return SB_ERROR; /* the logits in the context are of an earlier batch */
    }
    for (int32_t seq = 0; result == 0 && seq < watch->n_seq_max; seq++) {
        if (watch->sequences[seq].in_batch && watch->sequences[seq].stage == STEERHOOK_PROMPTING &&
            steerhook_request_stage(watch->session, seq) == STEERHOOK_ANSWERING) {
            tell_verdict(watch, seq);
        }
    }
    return result;
}

/* ---- the KV cache ---- */

/* Positions are rows until a context shift takes some out; behind it they lag by so many. */
static int32_t row_at(const sequence *q, int32_t position) {
    return q->shift > 0 && position > q->gap ? position + q->shift : position;
}

static void cut(sb_watch *watch, int32_t seq, int32_t from, int32_t to) {
    sequence *q = &watch->sequences[seq];
    from = from < 0 ? 0 : from;
    q->cut |= to < 0;
    if (watch->failed) {
        q->lost &= from > 0 || to >= 0;
        return;
    }
    steerhook_request_cut(watch->session, seq, row_at(q, from), to < 0 ? to : row_at(q, to));
    if (to > from && steerhook_request_stage(watch->session, seq) == STEERHOOK_ANSWERING) {
        q->gap = q->shift == 0 || from < q->gap ? from : q->gap;
        q->shift += to - from;
    }
}

void sb_cut(const void *memory, int32_t seq, int32_t from, int32_t to) {
    sb_watch *watch = of_memory(memory);
    if (watch == NULL) {
        return;
    }
    for (int32_t i = 0; i < watch->n_seq_max; i++) {
        if (seq < 0 || seq == i) {
            cut(watch, i, from, to);
        }
    }
    if (watch->failed) {
        recover(watch);
    }
}

void sb_kept(const void *memory, int32_t seq) {
    sb_watch *watch = of_memory(memory);
    for (int32_t i = 0; watch != NULL && i < watch->n_seq_max; i++) {
        if (i != seq) {
            sb_cut(memory, i, 0, -1);
        }
    }
}

void sb_copied(const void *memory, int32_t from, int32_t to, int32_t p0, int32_t p1) {
    sb_watch *watch = of_memory(memory);
    if (watch == NULL || from == to || !in_range(watch, from) || !in_range(watch, to)) {
        return;
    }
    if (watch->failed) {
        watch->sequences[to].lost = true; /* only emptying its cache helps */
        return;
    }
    steerhook_status status = steerhook_request_copy(watch->session, from, to);
    if (status == STEERHOOK_OK) {
        watch->sequences[to] = watch->sequences[from];
    }
    if (status != STEERHOOK_OK || p0 > 0) { /* the copy is of no request, or of its middle */
        steerhook_request_end(watch->session, to);
    } else if (p1 >= 0) {
        cut(watch, to, p1, -1);
    }
}

void sb_restored(llama_context *context, int32_t seq) {
    sb_watch *watch = sb_watch_of(context);
    for (int32_t i = 0; i < watch->n_seq_max; i++) {
        if (seq < 0 || seq == i) {
            steerhook_rows_restored(watch->session, i);
            watch->sequences[i].cut = true;
        }
    }
}

void sb_broken(const void *memory, const char *what) {
    sb_watch *watch = of_memory(memory);
    if (watch != NULL) {
        fail(watch, what);
    }
}
