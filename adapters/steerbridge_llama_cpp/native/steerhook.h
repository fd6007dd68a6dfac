/* libsteerhook: runs a steering package inside llama.cpp.
 *
 * The library watches the nodes of a ggml graph through the scheduler's evaluation callback,
 * reads the rows that the package's probes want, decides once per request, and rewrites the
 * rows that a fired rule steers. It uses no struct of ggml or llama.cpp and needs only libc.
 *
 *     package = steerhook_package_load("guard.gguf", error, sizeof error);
 *     session = steerhook_session_new(package, &model, &ggml, error, sizeof error);
 *     context_params.cb_eval = steerhook_eval;  context_params.cb_eval_user_data = session;
 *
 *     steerhook_request_begin(session, seq, n_cached, n_prompt);
 *     for every batch of the prompt and of the answer:
 *         steerhook_batch_begin(session, &batch)   not STEERHOOK_OK: do not decode
 *         llama_decode(...)                        not 0: steerhook_batch_cancel(session)
 *         steerhook_batch_end(session)             not STEERHOOK_OK: use no logits of this batch
 *     steerhook_request_end(session, seq);
 *
 * FAIL CLOSED. After an error in a batch the session stays failed: the callback stops the graph,
 * and every call returns that error until steerhook_session_clear. A graph that was stopped does
 * NOT make llama_decode fail (ggml reports success), so the logits of a batch count only after
 * steerhook_batch_end returned STEERHOOK_OK. Refusals of steerhook_request_begin, _copy and _end
 * and of the settings change nothing else: a sequence without a request cannot be decoded.
 *
 * ROWS. Rows of a sequence are counted, not identified by position. The count starts at
 * `n_cached`; the row that makes it `n_prompt` is the prompt end; later rows are generated ones.
 * llama.cpp must split batches in order (one sequence, or a unified KV cache), unless the caller
 * says which rows each graph computes (steerhook_pass).
 *
 * THREADS. A package is immutable and may be used by any number of sessions and threads; a
 * session belongs to one thread at a time. There is no global state.
 */
#ifndef STEERHOOK_H
#define STEERHOOK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define STEERHOOK_API __declspec(dllexport)
#else
#define STEERHOOK_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_tensor;
typedef struct steerhook_package steerhook_package;
typedef struct steerhook_session steerhook_session;

typedef enum {
    STEERHOOK_OK = 0,
    STEERHOOK_ARGUMENT,   /* a null pointer, an unknown id, a number out of range */
    STEERHOOK_MEMORY,     /* out of memory */
    STEERHOOK_MODEL,      /* the package was made for another width or depth */
    STEERHOOK_SITE,       /* a site that llama.cpp does not expose (layer_input[0]) */
    STEERHOOK_SEQUENCE,   /* a sequence id outside 0..n_seq_max-1, or twice in a row */
    STEERHOOK_NO_REQUEST, /* rows of a sequence without an open request */
    STEERHOOK_CACHED,     /* a reading needs a prompt row that is in the cache already */
    STEERHOOK_STEERED,    /* cached rows of the prompt were steered at a layer, for another one */
    STEERHOOK_PROMPT,     /* a prompt without rows to evaluate */
    STEERHOOK_NO_OUTPUT,  /* a wanted row of the last block or the head is no output row */
    STEERHOOK_SHARED_ROW, /* a row of several sequences whose requests differ */
    STEERHOOK_ROWS,       /* the rows of a node do not add up to the batch */
    STEERHOOK_HOOK_LOST,  /* a needed node was not seen, or seen at the wrong time */
    STEERHOOK_STRENGTH,   /* a fired rule's strength does not fit a float */
    STEERHOOK_ORDER       /* calls in the wrong order (a batch in a batch, ...) */
} steerhook_status;

/* The name of a status as above, without the prefix; never NULL. */
STEERHOOK_API const char *steerhook_status_name(steerhook_status status);

/* ---- packages ---- */

/* Maps and checks a package in its single-file GGUF encoding. NULL on failure, with a text that
 * names the field, what was expected and what was found. The file must not be changed in place
 * while it is in use (Steerbridge itself only ever renames files into place). */
STEERHOOK_API steerhook_package *steerhook_package_load(const char *path, char *error,
                                                        size_t error_size);

/* The same for bytes in memory, which must be aligned to 8 and outlive the package (nothing is
 * copied). For other bindings and for fuzzing. */
STEERHOOK_API steerhook_package *steerhook_package_parse(const void *bytes, size_t size,
                                                         char *error, size_t error_size);

/* Drops the caller's reference; sessions hold their own, so the order does not matter. */
STEERHOOK_API void steerhook_package_free(steerhook_package *package);

typedef struct {
    int32_t n_embd, n_layer, n_vocab, n_probes, n_rules;
    int32_t lowest_offset; /* 0 or less: how far before the prompt end a probe reads */
    bool whole_prompt;     /* a mean is read: requests must begin with n_cached == 0 */
    bool steers_layers;    /* a rule writes before the head: caches hold steered states */
} steerhook_package_info;

STEERHOOK_API steerhook_package_info steerhook_package_describe(const steerhook_package *package);

/* ---- sessions: one for each llama_context ---- */

typedef struct {
    const char *architecture; /* general.architecture of the model; NULL: not known */
    int32_t n_embd, n_layer;  /* of the model: must be the package's */
    int32_t n_ubatch;        /* llama_n_ubatch(ctx) */
    int32_t n_seq_max;       /* llama_n_seq_max(ctx) */
    int32_t n_deepstack;     /* first blocks to whose outputs features of an image are added; -1: they
                              * are added elsewhere */
} steerhook_model;

/* ggml_get_name, ggml_nbytes, ggml_backend_tensor_get and ggml_backend_tensor_set. */
typedef struct {
    const char *(*get_name)(const struct ggml_tensor *);
    size_t (*nbytes)(const struct ggml_tensor *);
    void (*tensor_get)(const struct ggml_tensor *, void *data, size_t offset, size_t size);
    void (*tensor_set)(struct ggml_tensor *, const void *data, size_t offset, size_t size);
} steerhook_ggml;

/* NULL if the package does not fit the model, reads or writes a site that llama.cpp does not show
 * (layer_input[0], and those of some architectures, see plan.c), or memory ends. */
STEERHOOK_API steerhook_session *steerhook_session_new(const steerhook_package *package,
                                                       const steerhook_model *model,
                                                       const steerhook_ggml *ggml, char *error,
                                                       size_t error_size);
STEERHOOK_API void steerhook_session_free(steerhook_session *session);

/* Ends every request and any batch, and forgets an error; thresholds stay. The caller clears the
 * KV cache as well. */
STEERHOOK_API steerhook_status steerhook_session_clear(steerhook_session *session);

/* STEERHOOK_OK, or the error that made the session fail. */
STEERHOOK_API steerhook_status steerhook_session_status(const steerhook_session *session);

/* The text of the last refusal or error of this session; "" if there was none. */
STEERHOOK_API const char *steerhook_session_error(const steerhook_session *session);

/* While paused the callback answers no for every node and no batch may be announced: for work on
 * the same context that generates nothing (embeddings). Refused while a batch is open. */
STEERHOOK_API steerhook_status steerhook_pause(steerhook_session *session, bool paused);

/* The evaluation callback (ggml_backend_sched_eval_callback); `session` is the user data. */
STEERHOOK_API bool steerhook_eval(struct ggml_tensor *tensor, bool ask, void *session);

/* From now on every row that a reading of a mean or of a place before the prompt's end may need
 * is kept beside the KV cache (4 n_embd bytes a row and reading), so that requests may begin with
 * cached rows, and a prompt's last rows come in a batch of their own. With `answers`, rows of
 * answers too, at one more cut of the graph a token and site: for programs that cannot be told
 * where the next prompt must be evaluated from (see steerhook_kept_rows). */
STEERHOOK_API steerhook_status steerhook_keep_rows(steerhook_session *session, bool answers);

/* How many rows at the start of a sequence are kept: the next prompt that is begun may have so
 * many of them cached. */
STEERHOOK_API int32_t steerhook_kept_rows(const steerhook_session *session, int32_t seq);

/* Another threshold for one probe, for verdicts from now on. */
STEERHOOK_API steerhook_status steerhook_set_threshold(steerhook_session *session,
                                                       const char *probe, double threshold);

/* The thresholds that the package calibrated for a runtime, a quantisation and a checkpoint (the
 * hash of samples of its weights; NULL: not known, and an entry for one checkpoint does not match).
 * The last matching entry counts, and without one nothing changes. `calibrated` (whether there is
 * one) may be NULL. */
STEERHOOK_API steerhook_status steerhook_calibrate(steerhook_session *session,
                                                   const char *runtime, const char *quantisation,
                                                   const char *weights, bool *calibrated);

/* ---- requests ---- */

/* A prompt of `n_prompt` rows starts on sequence `seq`, of which `n_cached` are in the KV cache
 * and will not be evaluated. Ends an older request of the sequence, even if it refuses. */
STEERHOOK_API steerhook_status steerhook_request_begin(steerhook_session *session, int32_t seq,
                                                       int32_t n_cached, int32_t n_prompt);

/* Which rules stay fired when a request goes on from the last one of its sequence: none; those
 * that were kept for it already; or all that fired. */
typedef enum { STEERHOOK_KEEP_NONE = 0, STEERHOOK_KEEP_HELD, STEERHOOK_KEEP_FIRED } steerhook_keep;

/* The same for a caller that sees batches only. The last output row that the sequence has in a
 * batch is judged, and steered, as if its prompt ended there (where outputs in a row close its part
 * of the batch behind rows without, the first of them: the others are drafts). Whether it does is seen later, by
 * whether its logits are used: if not, the request is opened again with all its rows cached, and
 * the next output row is judged. A probe that cannot judge fires: its readings reach behind the
 * first row, or rows that they need were not seen. Needs steerhook_keep_rows. */
STEERHOOK_API steerhook_status steerhook_request_open(steerhook_session *session, int32_t seq,
                                                      int32_t n_cached, steerhook_keep keep);

/* The prompt of an open request that has not been judged cannot be: every probe will fire. */
STEERHOOK_API steerhook_status steerhook_request_distrust(steerhook_session *session, int32_t seq);

typedef enum { STEERHOOK_NONE = 0, STEERHOOK_PROMPTING, STEERHOOK_ANSWERING } steerhook_stage;

/* Whether the sequence has an open request, and whether its prompt has been judged. */
STEERHOOK_API steerhook_stage steerhook_request_stage(const steerhook_session *session,
                                                      int32_t seq);

/* Rows of the open request so far, cached ones included, and in `n_prompt` (may be NULL) how many
 * of them are its prompt, once it has been judged; 0 without a request. */
STEERHOOK_API int32_t steerhook_request_rows(const steerhook_session *session, int32_t seq,
                                             int32_t *n_prompt);

/* The first `rows` rows of a request stay (negative: all): none of them was a rejected draft. Without
 * this it shows in the next batch, or in a cut. */
STEERHOOK_API void steerhook_request_survived(steerhook_session *session, int32_t seq, int32_t rows);

/* The cache of a sequence was replaced, from row `first` on, by rows of unknown history (a saved
 * state): its request has ended, and if the package steers layers these rows count as steered. */
STEERHOOK_API steerhook_status steerhook_rows_restored(steerhook_session *session, int32_t seq,
                                                       int32_t first);

/* What is known of the rows of a sequence, and its request, as bytes that travel with a saved state
 * of the cache: how many (0 without the sequence), and the bytes. Without `rows`, those that are kept
 * beside the cache are left out: for states that replace a part of the cache only. */
STEERHOOK_API size_t steerhook_saved_size(const steerhook_session *session, int32_t seq, bool rows);
STEERHOOK_API steerhook_status steerhook_save(steerhook_session *session, int32_t seq, bool rows,
                                              void *bytes, size_t size);

/* The cache of a sequence was replaced by the state with which the bytes were saved, by a session of
 * the same package and build. Where rows were left out, those that the sequence has must be the
 * same. On a refusal nothing is known of its rows (see steerhook_rows_restored). */
STEERHOOK_API steerhook_status steerhook_load(steerhook_session *session, int32_t seq,
                                              const void *bytes, size_t size);

/* Copies the request of `from` to `to` (beams, n > 1), as llama_memory_seq_cp does with the
 * cache. Ends an older request of `to`. */
STEERHOOK_API steerhook_status steerhook_request_copy(steerhook_session *session, int32_t from,
                                                      int32_t to);

/* Rows `from` to `to` - 1 of a sequence were removed from the cache (`to` < 0: all from `from` on;
 * `seq` < 0: every sequence), as llama_memory_seq_rm and llama_memory_clear do; rows behind them
 * are numbered anew. A request that loses rows of its prompt has ended, unless its prompt was
 * complete and rows behind the gap stay (a context shift). */
STEERHOOK_API steerhook_status steerhook_request_cut(steerhook_session *session, int32_t seq,
                                                     int32_t from, int32_t to);

/* The first row in the cache of a sequence that was steered at a layer from a prompt end on: no
 * later request may use it or rows behind it. -1 if there is none. */
STEERHOOK_API int32_t steerhook_first_steered(const steerhook_session *session, int32_t seq);

/* Verdicts stay readable until the next request of the sequence. */
STEERHOOK_API steerhook_status steerhook_request_end(steerhook_session *session, int32_t seq);

/* ---- batches ---- */

typedef struct {
    int32_t n_tokens;
    const int32_t *n_seq_id;       /* NULL, like seq_id: every row belongs to sequence 0 */
    int32_t *const *seq_id;
    const int8_t *output;          /* llama_batch.logits; NULL: only the last row */
    bool image;                    /* the rows are the tokens of an image */
    const int32_t *tokens;         /* ids; NULL: the rows are embeddings */
} steerhook_batch;

/* Before llama_decode, with the same batch. The arrays are not kept. */
STEERHOOK_API steerhook_status steerhook_batch_begin(steerhook_session *session,
                                                     const steerhook_batch *batch);

/* For a caller that sees the graphs: the rows of the batch that the next graph computes, in its
 * order. Without it, llama.cpp must split the batch in order (see ROWS). */
STEERHOOK_API steerhook_status steerhook_pass(steerhook_session *session, const int32_t *rows,
                                              int32_t n_rows);

/* After llama_decode returned 0: an error if a needed node was not seen with all its rows. */
STEERHOOK_API steerhook_status steerhook_batch_end(steerhook_session *session);

/* After llama_decode failed. If no needed node was reached (no room in the cache), the batch is
 * forgotten and may be tried again; otherwise the session has failed. */
STEERHOOK_API steerhook_status steerhook_batch_cancel(steerhook_session *session);

/* ---- decisions ---- */

typedef struct {
    const char *probe; /* lives as long as the package */
    double score, threshold;
    bool fired;
    const char *unjudged; /* why the probe could not be judged: then it fired, and its score is
                           * NaN; "" if it was judged */
    bool in_answer; /* it fired behind the prompt's end */
    int32_t row;    /* of a token reading that fired: where, from the first row of the sequence on;
                     * else -1 */
} steerhook_verdict;

/* Of token readings, rows count that cannot be rejected drafts any more: those before the last batch,
 * its first, and all of the prompt. A score is NaN, too, while a probe's scope has no rows. */

/* Writes up to `max` verdicts of the sequence's latest request, in the order of the package, and
 * returns how many there are so far; -status on an error. `out` may be NULL if `max` is 0. */
STEERHOOK_API int32_t steerhook_verdicts(const steerhook_session *session, int32_t seq,
                                         steerhook_verdict *out, int32_t max);

typedef struct {
    const char *rule;
    bool decided, fired; /* a rule without a condition is fired */
    double strength;     /* 0 until decided */
} steerhook_rule_state;

/* The same for rules: one for each rule of the package, decided or not. */
STEERHOOK_API int32_t steerhook_rules(const steerhook_session *session, int32_t seq,
                                      steerhook_rule_state *out, int32_t max);

/* The logits of a probe with a token reading by row of the sequence, as far as they are kept: minus
 * infinity for a row that was out of scope, NaN where a state was not finite. Writes up to `max` and
 * returns how many there are; -status on an error. `out` may be NULL if `max` is 0. */
STEERHOOK_API int32_t steerhook_row_logits(const steerhook_session *session, int32_t seq,
                                           const char *probe, float *out, int32_t max);

/* What a probe of the sequence's latest request read, before standardisation: its readings one
 * after the other, n_embd values each. Writes up to `max` values and returns how many there are; 0
 * until the prompt has ended, -status on an error. A reading without rows (image_mean of a request
 * without images) is zeros. `out` may be NULL if `max` is 0. */
STEERHOOK_API int64_t steerhook_readings(const steerhook_session *session, int32_t seq,
                                         const char *probe, double *out, int64_t max);

#ifdef __cplusplus
}
#endif
#endif
