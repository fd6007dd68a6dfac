/* The preloaded library: functions of llama.cpp, ggml and libc under their own names.
 *
 * A program that calls one of these through the dynamic linker gets ours; a program that looks it
 * up (dlsym: ctypes, JNA, P/Invoke) gets ours too, because dlsym is among them. Each does its work
 * and calls the original. Nothing here depends on the version of llama.cpp; see llama_abi.h.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <string.h>

#include "events.h"
#include "llama_abi.h"
#include "real.h"
#include "shadow.h"
#include "states.h"
#include "watch.h"
#include "weights.h"

#define EXPORT __attribute__((visibility("default")))

/* Linux takes the first function of a name, and a preloaded library comes first. macOS goes by
 * library and name: ours has a name of its own there, see `replaced`. */
#ifdef __APPLE__
#define OURS(name) steered_##name
#else
#define OURS(name) name
#endif

static void *theirs(const char *name, void *ours);

/* The program's own function of that name, looked up at the first call. */
#define REAL(name)                                                                 \
    static __typeof__(&OURS(name)) real;                                           \
    if (real == NULL) {                                                            \
        void *function = theirs(#name, (void *)&OURS(name));                       \
        memcpy(&real, &function, sizeof real);                                     \
    }

/* ---- decoding ---- */

EXPORT int32_t OURS(llama_decode)(llama_context *context, llama_batch batch) {
    REAL(llama_decode)
    sb_rows rows = {batch.n_tokens, batch.token,  batch.pos,           batch.n_seq_id,
                    batch.seq_id,   batch.logits, batch.token == NULL};
    sb_watch *watch = sb_watch_of(context);
    return sb_before(watch, &rows) ? sb_after(watch, real(context, batch)) : SB_ERROR;
}

EXPORT int32_t OURS(llama_process)(llama_context *context, int type, llama_batch_ext *batch) {
    REAL(llama_process)
    sb_watch *watch = sb_watch_of(context);
    sb_rows rows = {0};
    if (sb_steers(watch) && !sb_shadow_rows(batch, &rows)) {
        sb_tell("refused", "a batch with rows that were not seen, or that mixes text and image rows");
        return SB_ERROR;
    }
    if (sb_steers(watch) && type != LLAMA_PROCESS_DECODE) {
        sb_tell("refused", "llama_process of type %d: expected decoding", type);
        return SB_ERROR;
    }
    return sb_before(watch, &rows) ? sb_after(watch, real(context, type, batch)) : SB_ERROR;
}

EXPORT int32_t OURS(llama_encode)(llama_context *context, llama_batch batch) {
    REAL(llama_encode)
    sb_watch *watch = sb_watch_of(context);
    if (sb_steers(watch)) {
        sb_tell("refused", "llama_encode: expected a model without an encoder");
        return SB_ERROR;
    }
    const sb_rows rows = {0};
    return sb_before(watch, &rows) ? sb_after(watch, real(context, batch)) : SB_ERROR;
}

EXPORT void OURS(ggml_backend_sched_set_eval_callback)(ggml_backend_sched *sched,
                                                 eval_callback callback, void *data) {
    REAL(ggml_backend_sched_set_eval_callback)
    eval_callback ours = NULL;
    void *session = NULL;
    switch (sb_current(&ours, &session)) {
    case SB_STEERED:
        if (callback != NULL && callback != ours) {
            sb_fatal("evaluation callback: expected none, found the program's own");
        }
        real(sched, ours, session);
        return;
    case SB_UNSTEERED: break;
    case SB_UNSEEN:
        sb_fatal("a graph was built outside llama_decode: is llama.cpp linked into the program?");
    }
    real(sched, callback, data);
}

EXPORT void OURS(llama_free)(llama_context *context) {
    REAL(llama_free)
    sb_watch_free(context); /* before its address may be another context's */
    real(context);
}

/* ---- batches that llama.cpp keeps to itself ---- */

EXPORT llama_batch_ext *OURS(llama_batch_ext_init)(llama_context *context) {
    REAL(llama_batch_ext_init)
    llama_batch_ext *batch = real(context);
    sb_shadow_clear(batch);
    return batch;
}

EXPORT void OURS(llama_batch_ext_free)(llama_batch_ext *batch) {
    REAL(llama_batch_ext_free)
    sb_shadow_free(batch);
    real(batch);
}

EXPORT void OURS(llama_batch_ext_clear)(llama_batch_ext *batch) {
    REAL(llama_batch_ext_clear)
    sb_shadow_clear(batch);
    real(batch);
}

EXPORT int32_t OURS(llama_batch_ext_add)(llama_batch_ext *batch, int32_t seq) {
    REAL(llama_batch_ext_add)
    int32_t index = real(batch, seq);
    if (index >= 0) {
        sb_shadow_add(batch, index, seq, -1, false);
    }
    return index;
}

EXPORT int32_t OURS(llama_batch_ext_add_token)(llama_batch_ext *batch, int32_t seq, int32_t token) {
    REAL(llama_batch_ext_add_token)
    int32_t index = real(batch, seq, token);
    if (index >= 0) {
        sb_shadow_add(batch, index, seq, token, false);
    }
    return index;
}

EXPORT int32_t OURS(llama_batch_ext_add_embd)(llama_batch_ext *batch, int32_t seq, llama_embd embd) {
    REAL(llama_batch_ext_add_embd)
    int32_t index = real(batch, seq, embd);
    if (index >= 0) {
        sb_shadow_add(batch, index, seq, -1, true);
    }
    return index;
}

EXPORT bool OURS(llama_batch_ext_add_seq)(llama_batch_ext *batch, int32_t index, int32_t seq) {
    REAL(llama_batch_ext_add_seq)
    return real(batch, index, seq) && sb_shadow_add_seq(batch, index, seq);
}

EXPORT bool OURS(llama_batch_ext_set_output_embd)(llama_batch_ext *batch, int32_t index, bool value) {
    REAL(llama_batch_ext_set_output_embd)
    return real(batch, index, value) && sb_shadow_output(batch, index, value);
}

EXPORT bool OURS(llama_batch_ext_set_output_logits)(llama_batch_ext *batch, int32_t index, bool value) {
    REAL(llama_batch_ext_set_output_logits)
    return real(batch, index, value) && sb_shadow_output(batch, index, value);
}

EXPORT bool OURS(llama_batch_ext_set_pos)(llama_batch_ext *batch, int32_t index, const int32_t *pos) {
    REAL(llama_batch_ext_set_pos)
    return real(batch, index, pos) && sb_shadow_pos(batch, index, pos[0]);
}

/* Some versions implement one name by another: only the outermost call is reported. */
static _Thread_local int nested;

/* ---- the KV cache: one set of functions, three names of it over the years ---- */

#define CACHE(clear_name, prefix, memory_type, CLEAR_ARGUMENTS, CLEAR_VALUES)                \
    EXPORT void OURS(clear_name) CLEAR_ARGUMENTS {                                                 \
        REAL(clear_name)                                                                     \
        nested++;                                                                            \
        real CLEAR_VALUES;                                                                   \
        if (--nested == 0) {                                                                 \
            sb_cut(memory, -1, 0, -1);                                                       \
        }                                                                                    \
    }                                                                                        \
    EXPORT bool OURS(prefix##_seq_rm)(memory_type *memory, int32_t seq, int32_t p0, int32_t p1) {  \
        REAL(prefix##_seq_rm)                                                                \
        nested++;                                                                            \
        bool removed = real(memory, seq, p0, p1);                                            \
        if (--nested == 0 && removed) {                                                      \
            sb_cut(memory, seq, p0, p1);                                                     \
        }                                                                                    \
        return removed;                                                                      \
    }                                                                                        \
    EXPORT void OURS(prefix##_seq_cp)(memory_type *memory, int32_t from, int32_t to, int32_t p0,   \
                                int32_t p1) {                                                \
        REAL(prefix##_seq_cp)                                                                \
        nested++;                                                                            \
        real(memory, from, to, p0, p1);                                                      \
        if (--nested == 0) {                                                                 \
            sb_copied(memory, from, to, p0, p1);                                             \
        }                                                                                    \
    }                                                                                        \
    EXPORT void OURS(prefix##_seq_keep)(memory_type *memory, int32_t seq) {                        \
        REAL(prefix##_seq_keep)                                                              \
        nested++;                                                                            \
        real(memory, seq);                                                                   \
        if (--nested == 0) {                                                                 \
            sb_kept(memory, seq);                                                            \
        }                                                                                    \
    }                                                                                        \
    EXPORT void OURS(prefix##_seq_add)(memory_type *memory, int32_t seq, int32_t p0, int32_t p1,   \
                                 int32_t delta) {                                            \
        REAL(prefix##_seq_add)                                                               \
        nested++;                                                                            \
        real(memory, seq, p0, p1, delta);                                                    \
        if (--nested == 0) {                                                                 \
            sb_moved(memory, seq, p0, p1, delta);                                            \
        }                                                                                    \
    }                                                                                        \
    EXPORT void OURS(prefix##_seq_div)(memory_type *memory, int32_t seq, int32_t p0, int32_t p1,   \
                                 int d) {                                                    \
        REAL(prefix##_seq_div)                                                               \
        sb_broken(memory, #prefix "_seq_div: positions no longer identify rows");                \
        real(memory, seq, p0, p1, d);                                                        \
    }

CACHE(llama_memory_clear, llama_memory, llama_memory, (llama_memory * memory, bool data),
      (memory, data))
CACHE(llama_kv_self_clear, llama_kv_self, llama_context, (llama_context * memory), (memory))
CACHE(llama_kv_cache_clear, llama_kv_cache, llama_context, (llama_context * memory), (memory))

/* ---- saved states ---- */

static sb_part part(int32_t seq, uint32_t flags) {
    return (sb_part){seq, (flags & LLAMA_STATE_SEQ_PARTIAL) != 0};
}

/* Sizes, and functions that write a state to memory or read one: ours goes behind it. */
#define STATE(size_name, get_name, set_name, PARAMETERS, ARGUMENTS, PART)                          \
    EXPORT size_t OURS(size_name)(llama_context * context PARAMETERS) {                            \
        REAL(size_name)                                                                            \
        nested++;                                                                                  \
        size_t size = real(context ARGUMENTS);                                                     \
        return --nested == 0 && size > 0 ? size + sb_state_size(context, PART) : size;    \
    }                                                                                              \
    EXPORT size_t OURS(get_name)(llama_context * context, uint8_t *data, size_t size PARAMETERS) { \
        REAL(get_name)                                                                             \
        nested++;                                                                                  \
        size_t used = real(context, data, size ARGUMENTS);                                         \
        return --nested == 0 ? sb_state_append(context, PART, data, used, size) : used;   \
    }                                                                                              \
    EXPORT size_t OURS(set_name)(llama_context * context, const uint8_t *data,                     \
                                 size_t size PARAMETERS) {                                         \
        REAL(set_name)                                                                             \
        size_t ours = nested == 0 ? sb_state_ours(data, size) : 0;                                 \
        nested++;                                                                                  \
        size_t read = real(context, data, size - ours ARGUMENTS);                                  \
        if (--nested == 0) {                                                                       \
            sb_state_restored(context, PART, data, size, read == 0 ? 0 : ours);           \
        }                                                                                          \
        return read == 0 ? 0 : read + ours;                                                        \
    }

#define NOTHING
#define SEQ , int32_t seq
#define SEQ_VALUE , seq
#define SEQ_FLAGS , int32_t seq, uint32_t flags
#define SEQ_FLAGS_VALUE , seq, flags

STATE(llama_state_get_size, llama_state_get_data, llama_state_set_data, NOTHING, NOTHING,
      part(-1, 0))
STATE(llama_state_seq_get_size, llama_state_seq_get_data, llama_state_seq_set_data, SEQ, SEQ_VALUE,
      part(seq, 0))
STATE(llama_state_seq_get_size_ext, llama_state_seq_get_data_ext, llama_state_seq_set_data_ext,
      SEQ_FLAGS, SEQ_FLAGS_VALUE, part(seq, flags))

EXPORT bool OURS(llama_state_save_file)(llama_context *context, const char *path,
                                        const int32_t *tokens, size_t count) {
    REAL(llama_state_save_file)
    bool saved = real(context, path, tokens, count);
    if (saved) {
        sb_state_beside(context, part(-1, 0), path);
    }
    return saved;
}

EXPORT bool OURS(llama_state_load_file)(llama_context *context, const char *path, int32_t *tokens,
                                        size_t capacity, size_t *count) {
    REAL(llama_state_load_file)
    bool loaded = real(context, path, tokens, capacity, count);
    if (tokens != NULL) { /* else it only counts them */
        sb_state_loaded(context, part(-1, 0), loaded ? path : NULL);
    }
    return loaded;
}

EXPORT size_t OURS(llama_state_seq_save_file)(llama_context *context, const char *path, int32_t seq,
                                              const int32_t *tokens, size_t count) {
    REAL(llama_state_seq_save_file)
    size_t saved = real(context, path, seq, tokens, count);
    if (saved > 0) {
        sb_state_beside(context, part(seq, 0), path);
    }
    return saved;
}

EXPORT size_t OURS(llama_state_seq_load_file)(llama_context *context, const char *path, int32_t seq,
                                              int32_t *tokens, size_t capacity, size_t *count) {
    REAL(llama_state_seq_load_file)
    size_t read = real(context, path, seq, tokens, capacity, count);
    if (tokens != NULL) {
        sb_state_loaded(context, part(seq, 0), read > 0 ? path : NULL);
    }
    return read;
}

/* ---- logits that are used ---- */

EXPORT float *OURS(llama_get_logits)(llama_context *context) {
    REAL(llama_get_logits)
    sb_read_whole(context);
    return real(context);
}

/* Functions of a context and the index of a row; what they return is one of its results. */
#define USE(type, name, nothing)                                         \
    EXPORT type OURS(name)(llama_context *context, int32_t index) {      \
        REAL(name)                                                       \
        return sb_used(context, index) ? real(context, index) : nothing; \
    }

USE(float *, llama_get_logits_ith, NULL)
USE(float *, llama_get_sampled_probs_ith, NULL)
USE(float *, llama_get_sampled_logits_ith, NULL)
USE(int32_t *, llama_get_sampled_candidates_ith, NULL)

EXPORT int32_t OURS(llama_get_sampled_token_ith)(llama_context *context, int32_t index) {
    REAL(llama_get_sampled_token_ith)
    int32_t token = sb_used(context, index) ? real(context, index) : -1;
    sb_chose(context, index, token);
    return token;
}

/* Samplers apply others: only what the program's own call chose counts. */
static _Thread_local int applying;

EXPORT int32_t OURS(llama_sampler_sample)(llama_sampler *sampler, llama_context *context,
                                          int32_t index) {
    REAL(llama_sampler_sample)
    if (!sb_used(context, index)) {
        sb_fatal("llama_sampler_sample: the last batch failed");
    }
    applying++;
    int32_t token = real(sampler, context, index);
    applying--;
    sb_chose(context, index, token);
    return token;
}

EXPORT void OURS(llama_sampler_apply)(llama_sampler *sampler, llama_token_data_array *tokens) {
    REAL(llama_sampler_apply)
    applying++;
    real(sampler, tokens);
    if (--applying == 0 && tokens->selected >= 0 && (size_t)tokens->selected < tokens->size) {
        sb_chose_last(tokens->data[tokens->selected].id);
    }
}

EXPORT float *OURS(llama_get_embeddings)(llama_context *context) {
    REAL(llama_get_embeddings)
    return sb_steered_embeddings(context) ? NULL : real(context);
}

EXPORT float *OURS(llama_get_embeddings_ith)(llama_context *context, int32_t index) {
    REAL(llama_get_embeddings_ith)
    return sb_steered_embeddings(context) ? NULL : real(context, index);
}

EXPORT float *OURS(llama_get_embeddings_seq)(llama_context *context, int32_t seq) {
    REAL(llama_get_embeddings_seq)
    return sb_steered_embeddings(context) ? NULL : real(context, seq);
}

/* ---- files ---- */

EXPORT gguf_context *OURS(gguf_init_from_file)(const char *path, gguf_init_params params) {
    REAL(gguf_init_from_file)
    gguf_context *file = real(path, params);
    if (file != NULL) {
        sb_gguf_opened(file, path);
    }
    return file;
}

EXPORT int OURS(ggml_backend_sched_graph_compute_async)(ggml_backend_sched *sched,
                                                        struct ggml_cgraph *graph) {
    REAL(ggml_backend_sched_graph_compute_async)
    sb_pass(graph);
    return real(sched, graph);
}

/* ---- looking up ---- */

#define CACHE_FUNCTIONS(X, prefix)                                                           \
    X(prefix##_clear) X(prefix##_seq_rm) X(prefix##_seq_cp) X(prefix##_seq_keep)             \
    X(prefix##_seq_add) X(prefix##_seq_div)
#define FUNCTIONS(X)                                                                         \
    X(llama_decode) X(llama_process) X(llama_encode)                                         \
    X(ggml_backend_sched_set_eval_callback) X(llama_free) X(llama_batch_ext_init)            \
    X(llama_batch_ext_free) X(llama_batch_ext_clear) X(llama_batch_ext_add)                  \
    X(llama_batch_ext_add_token) X(llama_batch_ext_add_embd) X(llama_batch_ext_add_seq)      \
    X(llama_batch_ext_set_output_embd) X(llama_batch_ext_set_output_logits)                  \
    X(llama_batch_ext_set_pos) CACHE_FUNCTIONS(X, llama_memory)                              \
    CACHE_FUNCTIONS(X, llama_kv_self) CACHE_FUNCTIONS(X, llama_kv_cache)                     \
    X(llama_state_get_size) X(llama_state_get_data) X(llama_state_set_data)                  \
    X(llama_state_seq_get_size) X(llama_state_seq_get_data) X(llama_state_seq_set_data)      \
    X(llama_state_seq_get_size_ext) X(llama_state_seq_get_data_ext)                          \
    X(llama_state_seq_set_data_ext) X(llama_state_save_file) X(llama_state_load_file)        \
    X(llama_state_seq_save_file) X(llama_state_seq_load_file)                                \
    X(llama_get_logits) X(llama_get_logits_ith) X(llama_get_sampled_probs_ith)               \
    X(llama_get_sampled_logits_ith) X(llama_get_sampled_candidates_ith)                      \
    X(llama_get_sampled_token_ith) X(llama_sampler_sample) X(llama_sampler_apply)            \
    X(llama_get_embeddings) X(llama_get_embeddings_ith) X(llama_get_embeddings_seq)          \
    X(ggml_backend_sched_graph_compute_async) X(gguf_init_from_file)

#define ENTRY(name) {#name, (void *)&OURS(name)},
static const struct {
    const char *name;
    void *ours;
} replaced[] = {FUNCTIONS(ENTRY)};

void *sb_original(const char *name) {
    for (size_t i = 0; i < sizeof replaced / sizeof *replaced; i++) {
        if (strcmp(name, replaced[i].name) == 0) {
            return theirs(name, replaced[i].ours);
        }
    }
    return NULL;
}

SB_EARLY static bool special(const void *handle) {
#ifdef __APPLE__
    (void)handle; /* whichever library it means, none of them has ours */
    return false;
#else
    return handle == RTLD_NEXT || handle == RTLD_DEFAULT; /* ours comes first by itself */
#endif
}

/* Ours where the program's own lookup finds one of these functions. */
SB_EARLY EXPORT void *OURS(dlsym)(void *handle, const char *name) {
    /* Special handles depend on who asks: the call must leave this frame before it arrives. */
    if (special(handle) || (strncmp(name, "llama_", 6) != 0 && strncmp(name, "ggml_", 5) != 0 &&
                            strncmp(name, "gguf_", 5) != 0)) {
        return sb_real_dlsym(handle, name);
    }
    void *function = sb_real_dlsym(handle, name);
    for (size_t i = 0; function != NULL && i < sizeof replaced / sizeof *replaced; i++) {
        if (strcmp(name, replaced[i].name) == 0) {
            return replaced[i].ours;
        }
    }
    return function;
}

#ifdef __APPLE__

/* Absent in this version of llama.cpp, or not loaded at launch: NULL, and dyld passes over it. */
#define DECLARE(name) extern __typeof__(OURS(name)) name __attribute__((weak_import));
FUNCTIONS(DECLARE)

#define PAIR(name) {(const void *)&OURS(name), (const void *)&name},
__attribute__((used, section("__DATA,__interpose"))) static const struct {
    const void *ours, *theirs;
} pairs[] = {FUNCTIONS(PAIR) PAIR(dlsym)};

static void *theirs(const char *name, void *ours) {
    for (size_t i = 0; i < sizeof replaced / sizeof *replaced; i++) {
        if (replaced[i].ours == ours && pairs[i].theirs != NULL) {
            return (void *)(uintptr_t)pairs[i].theirs;
        }
    }
    return sb_need(name, ours);
}

#else

static void *theirs(const char *name, void *ours) {
    return sb_need(name, ours);
}

#endif
