#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "events.h"
#include "facts.h"
#include "real.h"
#include "settings.h"
#include "watch.h"

static sb_watch *watches;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* ---- the loaded llama.cpp ---- */

typedef int32_t (*of_model)(const llama_model *);
typedef uint32_t (*of_context)(const llama_context *);
typedef const llama_model *(*model_of)(const llama_context *);

static bool is(const char *function, const llama_model *model) {
    typedef bool (*question)(const llama_model *);
    question ask = (question)sb_either(function, NULL);
    return ask != NULL && ask(model);
}

/* ---- a context ---- */

static void check_kind(const llama_model *model, const sb_facts *f) {
    sb_check_model(model, f);
    if (is("llama_model_has_encoder", model)) {
        sb_fatal("model %s: expected a decoder, found an encoder", f->name);
    }
}

static steerhook_session *session_for(const llama_context *context, const sb_facts *f) {
    steerhook_model shape = {
        .architecture = f->architecture,
        .n_embd = f->n_embd,
        .n_layer = f->n_layer,
        .n_ubatch = (int32_t)SB_CALL(of_context, "llama_n_ubatch", NULL)(context),
        .n_seq_max = (int32_t)SB_CALL(of_context, "llama_n_seq_max", NULL)(context),
        .n_deepstack = f->n_deepstack,
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
        steerhook_session_new(sb_package(), &shape, &ggml, error, sizeof error);
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
    steerhook_package_info info = steerhook_package_describe(sb_package());
    char shape[128];
    snprintf(shape, sizeof shape, "%s:%ld:%ld", f.architecture, (long)f.n_embd, (long)f.n_layer);
    bool calibrated = false;
    watch->other = f.n_embd != info.n_embd || f.n_layer != info.n_layer;
    if (watch->other && !sb_may_go_unsteered(shape)) {
        sb_fatal("model %s (%s): expected width %ld and %ld blocks, which the package steers; a "
                 "draft or embedding model must be named with --also",
                 f.name, shape, (long)info.n_embd, (long)info.n_layer);
    }
    if (!watch->other) {
        check_kind(model, &f);
        typedef const void *(*memory_of)(const llama_context *);
        memory_of memory = (memory_of)sb_either("llama_get_memory", NULL);
        watch->memory = memory == NULL ? watch->context : memory(watch->context);
        watch->vocab = sb_vocabulary(model);
        watch->session = session_for(watch->context, &f);
        watch->n_seq_max = (int32_t)SB_CALL(of_context, "llama_n_seq_max", NULL)(watch->context);
        of_context room = (of_context)sb_either("llama_n_ctx_seq", NULL);
        watch->last.streams =
            room != NULL && room(watch->context) < SB_CALL(of_context, "llama_n_ctx", NULL)(watch->context);
        watch->sequences = calloc((size_t)watch->n_seq_max, sizeof *watch->sequences);
        if (watch->sequences == NULL) {
            sb_fatal("no memory");
        }
        for (int32_t i = 0; i < watch->n_seq_max; i++) {
            watch->sequences[i].strange = -1;
        }
        calibrated = sb_calibrate(watch->session, &f);
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
        for (int32_t i = 0; i < watch->n_seq_max; i++) {
            sb_answer_free(&watch->sequences[i].answer);
            sb_cells_free(&watch->sequences[i].cells);
        }
        sb_last_free(&watch->last);
        free(watch->sequences);
        free(watch);
    }
    pthread_mutex_unlock(&lock);
}

sb_watch *sb_watch_known(const void *context_or_memory) {
    pthread_mutex_lock(&lock);
    sb_watch *watch = context_or_memory == NULL ? NULL : known(NULL, context_or_memory);
    pthread_mutex_unlock(&lock);
    return watch != NULL && watch->session != NULL ? watch : NULL;
}

/* ---- functions of llama.cpp ---- */

bool sb_ends(const sb_watch *watch, int32_t token) {
    typedef bool (*question)(const void *, int32_t);
    static question ask;
    ask = ask != NULL ? ask : SB_CALL(question, "llama_vocab_is_eog", "llama_token_is_eog");
    return token >= 0 && ask(watch->vocab, token);
}

int32_t sb_decode(const sb_watch *watch, llama_batch batch) {
    typedef int32_t (*decode)(llama_context *, llama_batch);
    static decode real;
    real = real != NULL ? real : (decode)sb_original("llama_decode");
    return real(watch->context, batch);
}

bool sb_remove(const sb_watch *watch, int32_t seq, int32_t from) {
    typedef bool (*removal)(const void *, int32_t, int32_t, int32_t);
    static removal real;
    if (real == NULL) {
        bool newest = sb_either("llama_memory_seq_pos_max", NULL) != NULL;
        bool newer = sb_either("llama_kv_self_seq_pos_max", NULL) != NULL;
        real = (removal)sb_original(newest  ? "llama_memory_seq_rm"
                                    : newer ? "llama_kv_self_seq_rm"
                                            : "llama_kv_cache_seq_rm");
    }
    return real(watch->memory, seq, from, -1);
}

int32_t sb_batch_size(const sb_watch *watch) {
    return (int32_t)SB_CALL(of_context, "llama_n_batch", NULL)(watch->context);
}

bool sb_may_repeat(const sb_watch *watch, int32_t seq, int32_t from) {
    typedef int32_t (*window_of)(const llama_model *);
    typedef int32_t (*first_position)(const void *, int32_t);
    const llama_model *model = SB_CALL(model_of, "llama_get_model", NULL)(watch->context);
    if (is("llama_model_is_recurrent", model) || is("llama_model_is_hybrid", model)) {
        return from == 0; /* their states cannot go back */
    }
    window_of window = (window_of)sb_either("llama_model_n_swa", NULL);
    first_position first = (first_position)sb_either("llama_memory_seq_pos_min", NULL);
    if (window == NULL || first == NULL) {
        return true; /* these releases keep all rows */
    }
    int32_t size = window(model);
    return size == 0 || first(watch->memory, seq) <= (from > size ? from - size : 0);
}

int32_t sb_next_position(const sb_watch *watch, int32_t seq) {
    typedef int32_t (*last_position)(const void *, int32_t);
    static last_position real;
    if (real == NULL) {
        real = (last_position)sb_either("llama_memory_seq_pos_max", "llama_kv_self_seq_pos_max");
        real = real != NULL ? real : SB_CALL(last_position, "llama_kv_cache_seq_pos_max", NULL);
    }
    return real(watch->memory, seq) + 1;
}
