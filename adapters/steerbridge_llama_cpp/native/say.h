/* Forced answers; see say.c. Internal. */
#ifndef STEERHOOK_SAY_H
#define STEERHOOK_SAY_H

#include "session.h"

/* Forces row `row` of the batch, number `index` of the logits, if a rule says something there. */
void sh_say_row(steerhook_session *session, const sh_site_plan *site, struct ggml_tensor *node,
                int32_t row, int32_t index);

bool sh_plan_say(steerhook_session *session, const sh_error *error);

#endif
