/* What a model is: read through llama.cpp's C API, compared with the package's. Internal. */
#ifndef SB_FACTS_H
#define SB_FACTS_H

#include <stdint.h>

#include "llama_abi.h"

typedef struct {
    char architecture[64], name[256], file_type[16];
    int32_t n_embd, n_layer, n_vocab, n_deepstack; /* the last as in steerhook_model */
} sb_facts;

sb_facts sb_facts_of(const llama_model *model);

/* The first argument of functions of the vocabulary: in older versions the model itself. */
const void *sb_vocabulary(const llama_model *model);

/* Ends the process if the model's vocabulary, token texts or chat template are not those that
 * `steerbridge run` names in the environment. */
void sb_check_model(const llama_model *model, const sb_facts *facts);

/* A function of the loaded llama.cpp under one of two names, the older one second (or NULL). NULL
 * if there is neither; `sb_function` ends the process then. */
void *sb_either(const char *name, const char *older);
void *sb_function(const char *name, const char *older);

#define SB_CALL(type, name, older) ((type)sb_function(name, older))

#endif
