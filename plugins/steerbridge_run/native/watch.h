/* The contexts of a process and the requests on their sequences. Internal.
 *
 * A program gives llama.cpp only batches and edits of the KV cache, so requests are inferred:
 *   - rows on a sequence without a request start a prompt;
 *   - the first row whose logits are asked for ends it, later ones are answers;
 *   - a row without logits after an answer starts the next prompt (a follow-up turn);
 *   - so does a single row of a sequence whose cache was cut while a sampler was made or reset: a
 *     prompt of which all but the last row is cached looks like that, and so does a slot whose
 *     drafts were all rejected while its neighbour starts. Then what had fired stays fired;
 *   - several rows of an answer that all ask for logits are drafts to verify. They are no prompt:
 *     that of a program which asks for the logits of its prompts was refused at its first one.
 */
#ifndef SB_WATCH_H
#define SB_WATCH_H

#include "llama_abi.h"
#include "shadow.h"

typedef struct sb_watch sb_watch;

enum { SB_ERROR = -3 }; /* what llama_decode returns when computing failed */

/* The watch of a context, made when first asked for. It ends the process if the context cannot be
 * steered and is none that may go unsteered. */
sb_watch *sb_watch_of(llama_context *context);
bool sb_steers(const sb_watch *watch); /* false: named with --also */
void sb_watch_free(llama_context *context);

/* Before llama_decode: false if it must not be called and has failed with SB_ERROR. After it,
 * sb_after takes its result and returns the one to pass on. */
bool sb_before(sb_watch *watch, const sb_rows *rows);
int32_t sb_after(sb_watch *watch, int32_t result);

/* Whose graph is being built on this thread: of a steered context (then with which callback), of one
 * that may go unsteered, or of a llama_decode that was not seen. */
typedef enum { SB_UNSEEN, SB_UNSTEERED, SB_STEERED } sb_graph;
sb_graph sb_current(eval_callback *callback, void **data);

/* What happened to the KV cache. `memory` is a llama_memory or, in older versions, the context. */
void sb_cut(const void *memory, int32_t seq, int32_t from, int32_t to);
void sb_copied(const void *memory, int32_t from, int32_t to, int32_t p0, int32_t p1);
void sb_kept(const void *memory, int32_t seq);
void sb_restored(llama_context *context, int32_t seq); /* seq < 0: every sequence */
void sb_broken(const void *memory, const char *what);
void sb_sampler_made(void);
void sb_sampler_reset(void); /* drafts are made by a sampler that is reset every time */

#endif
