/* Which rules hold for a request, and what follows for the rows that it leaves in the cache. */
#include <math.h>

#include "session.h"

/* Whether all that the rule reads is known, and then whether its condition holds. */
static bool condition(const sh_rule *rule, const sh_decision *probes, bool *holds) {
    *holds = !rule->conditional || rule->all;
    if (rule->strength_probe >= 0 && !probes[rule->strength_probe].known) {
        return false;
    }
    for (int32_t i = 0; i < rule->n_probes; i++) {
        const sh_decision *decision = &probes[rule->probes[i]];
        if (!decision->known) {
            return false;
        }
        *holds = rule->all ? *holds && decision->fired : *holds || decision->fired;
    }
    return true;
}

static double strength_of(const sh_rule *rule, const sh_decision *probes) {
    if (rule->strength_probe < 0) {
        return rule->strength;
    }
    double score = probes[rule->strength_probe].score;
    return rule->strength * (isfinite(score) ? score : 1.0);
}

static steerhook_status check_strength(steerhook_session *s, const sh_rule *rule,
                                       double strength) {
    for (int32_t i = 0; i < rule->n_interventions; i++) {
        const sh_intervention *x = &s->package->interventions[rule->interventions[i]];
        if (!isfinite((float)(strength * x->factor))) {
            return sh_session_fail(s, STEERHOOK_STRENGTH,
                                   "rule %s: expected a strength that fits a float, found %g",
                                   rule->id, strength);
        }
    }
    return STEERHOOK_OK;
}

/* Whether the rule rewrites rows that stay in the cache. An intervention at all positions has no
 * condition: every request of the session would see its rows the same. */
static bool leaves_rows(const steerhook_session *s, const sh_rule *rule) {
    for (int32_t i = 0; i < rule->n_interventions; i++) {
        const sh_intervention *x = &s->package->interventions[rule->interventions[i]];
        if (x->type != SH_HEAD_MATRIX && !x->all_positions) {
            return true;
        }
    }
    return false;
}

/* A rule writes rows from the prompt's end on. */
static void note_steered(sh_request *request) {
    int32_t first = request->n_prompt - 1;
    if (request->cache.first_steered == SH_NO_ROW || first < request->cache.first_steered) {
        request->cache.first_steered = first;
    }
}

steerhook_status sh_decide_rules(steerhook_session *s, sh_request *request) {
    for (int32_t r = 0; r < s->package->n_rules; r++) {
        const sh_rule *rule = &s->package->rules[r];
        sh_rule_state *state = &request->rules[r];
        bool holds = false;
        if (!state->decided && condition(rule, request->probes, &holds)) {
            state->decided = true;
            state->fired = holds;
            state->strength = holds ? strength_of(rule, request->probes) : 0.0;
            steerhook_status status = check_strength(s, rule, state->strength);
            if (status != STEERHOOK_OK) {
                return status;
            }
            request->acting |= holds;
        }
        if (state->fired && !request->open_ended && leaves_rows(s, rule)) {
            note_steered(request);
        }
    }
    return STEERHOOK_OK;
}
