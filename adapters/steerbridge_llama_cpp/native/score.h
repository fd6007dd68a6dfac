/* Probe scores and interventions on single rows, in the formulas of steerbridge/reference.py. */
#ifndef STEERHOOK_SCORE_H
#define STEERHOOK_SCORE_H

#include "package.h"

/* Floats that sh_score needs as scratch for this probe. */
size_t sh_score_scratch(const sh_probe *probe, int32_t n_embd);

/* The score of concatenated readings, before standardisation. missing[k] says that reading k
 * found no rows (a prompt without images): its part is exactly 0 after standardisation. NaN if a
 * state or a logit is not finite. */
double sh_score(const sh_probe *probe, const double *readings, const bool *missing,
                float *scratch);

/* The logit of harm of a row, from the first map's outputs; NaN if an output is not finite. */
float sh_row_finish(const sh_probe *probe, const float *first, float *scratch);

/* Whether a score fires; one that is not finite always does (fail closed). */
bool sh_fires(sh_comparator comparator, double score, double threshold);

/* Floats that sh_intervene needs as scratch. */
size_t sh_intervene_scratch(const sh_intervention *x);

/* One row after the intervention acted: `target` is the vector of an add or a projection, unused
 * for a head. `factor` is the strength times eps or alpha. */
void sh_intervene(const sh_intervention *x, const sh_tensor *target, float factor, float *row,
                  float *scratch);

#endif
