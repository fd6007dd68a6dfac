/* The contexts of a process and the requests on their sequences. Internal.
 *
 * A program gives llama.cpp only batches and edits of the KV cache. What they mean is seen by what
 * the program does with the results:
 *   - the last output row of a sequence that is not answering is judged, and steered, as if its
 *     prompt ended there;
 *   - it did end there if the logits of that row are used: by index or by a sampler. Rows that come
 *     without such use are more prompt, and the next output row is judged;
 *   - an answer goes on with a token that was chosen from the logits of the row before, or that
 *     stood there already. Any other token behind the prompt is a new prompt; behind tokens of an
 *     answer it is more of the conversation: what fired stays fired, and the new verdict is added,
 *     unless a token between them ends generation.
 * See docs/run.md for the programs in which this cannot be seen.
 */
#ifndef SB_WATCH_H
#define SB_WATCH_H

#include "answers.h"
#include "cells.h"
#include "llama_abi.h"
#include "passes.h"
#include "shadow.h"
#include "steerhook.h"

typedef struct {
    bool used;     /* its judged row's logits were: it is answering */
    bool told;     /* its verdict was reported */
    int32_t told_rules; /* rules that fired in what was reported last */
    bool lost;     /* it had a request when the session failed */
    bool held;     /* its prompt was taken for more of an answer: what fired stays fired */
    bool at_end;   /* its last row's token ends generation */
    uint64_t batch;  /* the context's batch that has its last rows */
    int32_t origin;  /* whose rows of that batch they are: its own, or those it was copied from */
    int32_t first;   /* number of the first of them in its request */
    int32_t rows;    /* of the batch being begun, or the last one */
    int32_t judged;  /* the row among them, in the batch, that was judged; of an answer the last
                      * output row; -1: none */
    int32_t draft;   /* the row from which the next one must have been chosen, if rows that no logits
                      * were seen for are drafts; -1: all are known */
    int32_t strange; /* from this row on its cache holds rows of unknown history, and no request since;
                      * -1: there are none */
    int32_t blind;   /* single rows of which nobody was seen to use the logits */
    sb_cells cells;
    sb_answer answer;
} sb_sequence;

typedef struct sb_watch {
    llama_context *context;
    const void *memory;
    const void *vocab;
    steerhook_session *session; /* NULL: not steered, see `other` */
    bool other;      /* named with --also: it goes unsteered */
    bool failed;
    bool observed;   /* the program uses logits by index or by a sampler */
    bool read_whole; /* llama_get_logits was called since the last batch */
    int32_t n_seq_max, number;
    sb_sequence *sequences;
    sb_last last;
    struct sb_watch *next;
} sb_watch;

enum { SB_ERROR = -3 }; /* what llama_decode returns when computing failed */

/* ---- contexts.c ---- */

/* The watch of a context, made when first asked for. It ends the process if the context cannot be
 * steered and is none that may go unsteered. */
sb_watch *sb_watch_of(llama_context *context);
/* The steered watch of a context or its cache; NULL if it has decoded nothing yet, or is not
 * steered. */
sb_watch *sb_watch_known(const void *context_or_memory);
bool sb_steers(const sb_watch *watch); /* false: named with --also */
void sb_watch_free(llama_context *context);
/* Whether a token ends generation. */
bool sb_ends(const sb_watch *watch, int32_t token);
/* llama_decode itself, and its llama_memory_seq_rm, past ours. */
int32_t sb_decode(const sb_watch *watch, llama_batch batch);
int32_t sb_batch_size(const sb_watch *watch); /* how many rows llama_decode takes */
/* Whether the rows that those from a position on attend to are in the cache: with sliding windows
 * they may be gone, and recurrent states hold all rows at once. */
bool sb_may_repeat(const sb_watch *watch, int32_t seq, int32_t from);
bool sb_remove(const sb_watch *watch, int32_t seq, int32_t from);
/* The position behind the last row of a sequence in the cache. */
int32_t sb_next_position(const sb_watch *watch, int32_t seq);

/* ---- requests.c ---- */

/* Before llama_decode: false if it must not be called and has failed with SB_ERROR. After it,
 * sb_after takes its result and returns the one to pass on. */
bool sb_before(sb_watch *watch, const sb_rows *rows);
int32_t sb_after(sb_watch *watch, int32_t result);

/* Whose graph is being built on this thread: of a steered context (then with which callback), of one
 * that may go unsteered, or of a llama_decode that was not seen. */
typedef enum { SB_UNSEEN, SB_UNSTEERED, SB_STEERED } sb_graph;
sb_graph sb_current(eval_callback *callback, void **data);
/* That graph is about to be computed. */
void sb_pass(const struct ggml_cgraph *graph);

/* The logits of a row of the last batch are being used; false if they must not be. */
bool sb_used(llama_context *context, int32_t index);
/* A token was chosen from them; or from those that this thread asked for last. */
void sb_chose(llama_context *context, int32_t index, int32_t token);
void sb_chose_last(int32_t token);
/* All logits of the last batch were asked for at once. */
void sb_read_whole(llama_context *context);
/* Whether rows of the last batch were steered: then their embeddings are none. */
bool sb_steered_embeddings(llama_context *context);

/* What happened to the KV cache. `memory` is a llama_memory or, in older versions, the context. */
void sb_cut(const void *memory, int32_t seq, int32_t from, int32_t to);
void sb_copied(const void *memory, int32_t from, int32_t to, int32_t p0, int32_t p1);
void sb_moved(const void *memory, int32_t seq, int32_t from, int32_t to, int32_t delta);
void sb_kept(const void *memory, int32_t seq);
void sb_forget(sb_watch *watch, int32_t seq); /* it holds rows of unknown history */
/* Behind its first rows it holds rows of unknown history, at these positions. */
void sb_overlaid(sb_watch *watch, int32_t seq, int32_t first, const int32_t *positions,
                 int32_t count);
void sb_broken(const void *memory, const char *what);

#endif
