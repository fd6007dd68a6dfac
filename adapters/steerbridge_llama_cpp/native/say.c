/* Forced answers: which token a row says, as steerbridge/reference.py has it. */
#include "say.h"

#include <stdlib.h>
#include <string.h>

static const float unsaid = -30000.0F;

/* Where a part last ends among the first rows; 0 if it is not there. */
static int64_t last_of(const sh_rows *rows, int64_t count, const sh_ids *part) {
    for (int64_t stop = count; stop >= part->count && part->count > 0; stop--) {
        size_t bytes = (size_t)part->count * sizeof *part->ids;
        if (memcmp(rows->ids + stop - part->count, part->ids, bytes) == 0) {
            return stop;
        }
    }
    return 0;
}

/* The token of row `j` since the rule began at row `begin`. */
static int32_t token_of(const sh_request *request, const sh_intervention *say, int64_t begin,
                        int64_t j) {
    const sh_rows *rows = &request->cache.rows;
    int64_t known = begin + 1 < rows->n ? begin + 1 : rows->n;
    bool thinks = say->open.count > 0 && last_of(rows, known, &say->open) >
                                             last_of(rows, known, &say->close);
    bool opens = thinks || begin == (int64_t)request->n_prompt - 1;
    const sh_ids none = {0};
    const sh_ids *parts[] = {thinks ? &say->close : &none, opens ? &say->header : &none,
                             &say->tokens};
    for (int i = 0; i < 3; i++) {
        if (j < parts[i]->count) {
            return parts[i]->ids[j];
        }
        j -= parts[i]->count;
    }
    return say->tokens.ids[say->tokens.count - 1];
}

/* The first that began wins, then the order of the package. */
static const sh_act *speaker(const steerhook_session *s, const sh_site_plan *site, int32_t row,
                             int64_t *begin) {
    const sh_act *chosen = NULL;
    for (int32_t i = 0; i < site->n_acts; i++) {
        int64_t from = 0;
        if (sh_act_on(s, &site->acts[i], row, &from) == SH_ACTS &&
            (chosen == NULL || from < *begin)) {
            chosen = &site->acts[i];
            *begin = from;
        }
    }
    return chosen;
}

void sh_say_row(steerhook_session *s, const sh_site_plan *site, struct ggml_tensor *node,
                int32_t row, int32_t index) {
    int64_t begin = 0;
    const sh_act *act = speaker(s, site, row, &begin);
    if (act == NULL) {
        return;
    }
    const sh_member *member = &s->batch.members[s->batch.first_member[row]];
    int32_t token = token_of(&s->requests[member->seq], act->intervention, begin,
                             member->position - begin);
    size_t bytes = (size_t)s->package->n_vocab * sizeof *s->said;
    s->said[token] = 0.0F;
    s->ggml.tensor_set(node, s->said, (size_t)index * bytes, bytes);
    s->said[token] = unsaid;
}

bool sh_plan_say(steerhook_session *s, const sh_error *error) {
    bool says = false;
    for (int32_t i = 0; i < s->package->n_interventions; i++) {
        says |= s->package->interventions[i].type == SH_SAY;
        s->listens |= s->package->interventions[i].open.count > 0;
    }
    if (!says) {
        return true;
    }
    s->said = sh_arena_new(&s->arena, (size_t)s->package->n_vocab, sizeof *s->said);
    for (int32_t i = 0; s->said != NULL && i < s->package->n_vocab; i++) {
        s->said[i] = unsaid;
    }
    return s->said != NULL || sh_fail(error, "session", "memory", "none");
}
