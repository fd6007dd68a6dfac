/* A copy of what a program puts into llama.cpp's opaque llama_batch_ext. Internal. */
#ifndef SB_SHADOW_H
#define SB_SHADOW_H

#include "llama_abi.h"

/* Rows of a batch, whichever of llama.cpp's two interfaces it came through. */
typedef struct {
    int32_t n_tokens;
    const int32_t *token; /* NULL: embeddings */
    const int32_t *pos; /* NULL: llama.cpp counts */
    const int32_t *n_seq_id;
    int32_t *const *seq_id;
    const int8_t *output;
    bool image;
} sb_rows;

/* `token` is -1 for an embedding. Each returns false if there is no memory for it: the batch then cannot be decoded. */
bool sb_shadow_clear(const llama_batch_ext *batch);
bool sb_shadow_add(const llama_batch_ext *batch, int32_t index, int32_t seq, int32_t token,
                   bool image);
bool sb_shadow_add_seq(const llama_batch_ext *batch, int32_t index, int32_t seq);
bool sb_shadow_output(const llama_batch_ext *batch, int32_t index, bool output);
bool sb_shadow_pos(const llama_batch_ext *batch, int32_t index, int32_t pos);
void sb_shadow_free(const llama_batch_ext *batch);

/* The rows of a batch, valid until it changes. False if its rows are not all known, or are partly
 * an image's. */
bool sb_shadow_rows(const llama_batch_ext *batch, sb_rows *rows);

#endif
