/* What the preload uses of llama.cpp: names of exported C functions and the few types that they
 * pass by value. None of these types changed between llama.cpp b3950 (October 2024, which took
 * three fields from the end of llama_batch) and the version of llama-cpp-python 0.3.36. No header
 * of llama.cpp is used, so one binary serves them all. Internal. */
#ifndef SB_LLAMA_ABI_H
#define SB_LLAMA_ABI_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct llama_context llama_context;
typedef struct llama_model llama_model;
typedef struct llama_vocab llama_vocab;
typedef struct llama_memory llama_memory;
typedef struct llama_sampler llama_sampler;
typedef struct llama_batch_ext llama_batch_ext;
typedef struct ggml_backend_sched ggml_backend_sched;
typedef struct gguf_context gguf_context;
struct ggml_context;
struct ggml_tensor;
struct ggml_cgraph;

typedef struct {
    int32_t n_tokens;
    int32_t *token;
    float *embd;
    int32_t *pos;
    int32_t *n_seq_id;
    int32_t **seq_id;
    int8_t *logits;
} llama_batch;

typedef struct {
    const float *data;
    size_t n_rows, n_embd;
} llama_embd;

typedef struct {
    int32_t id;
    float logit, p;
} llama_token_data;

typedef struct {
    llama_token_data *data;
    size_t size;
    int64_t selected; /* below 0: none yet */
    bool sorted;
} llama_token_data_array;

typedef struct {
    bool no_alloc;
    struct ggml_context **ctx;
} gguf_init_params;

typedef bool (*eval_callback)(struct ggml_tensor *, bool ask, void *data);

enum { LLAMA_PROCESS_DECODE = 1 };
enum { LLAMA_STATE_SEQ_PARTIAL = 1 }; /* LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY, or SWA_ONLY */

#endif
