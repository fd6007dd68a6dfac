/* Which checkpoint a model is: the GGUF files that the process opened. Internal. */
#ifndef SB_WEIGHTS_H
#define SB_WEIGHTS_H

#include <stdbool.h>

#include "facts.h"
#include "sha256.h"

/* llama.cpp opened a GGUF file; called with what it made of it. */
void sb_gguf_opened(const gguf_context *file, const char *path);

/* The hash of samples of a model's file, as `steerbridge.fingerprint.file_sha256` computes it. false
 * if it is not known: no file of this shape was seen, or several that differ. */
bool sb_weights_of(const sb_facts *model, char digest[SB_SHA256_TEXT]);

#endif
