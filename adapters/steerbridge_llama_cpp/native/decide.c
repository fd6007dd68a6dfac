/* Which rules hold for a request, and what follows for the rows that it leaves in the cache. */
#include <math.h>

#include "tokens.h"

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

/* The row at which a probe fired, from the prompt's end on. */
static int64_t fired_row(const steerhook_session *s, const sh_request *request, int32_t probe) {
    const sh_running *running = sh_running_of(s, request, probe);
    int64_t end = (int64_t)request->n_prompt - 1;
    return running != NULL && running->fired_row > end ? running->fired_row : end;
}

/* The first row that a rule changes whose condition holds. */
static int64_t begin_of(const steerhook_session *s, const sh_request *request,
                        const sh_rule *rule) {
    int64_t begin = -1;
    for (int32_t i = 0; i < rule->n_probes; i++) {
        if (!request->probes[rule->probes[i]].fired) {
            continue;
        }
        int64_t row = fired_row(s, request, rule->probes[i]);
        bool replaces = begin < 0 || (rule->all ? row > begin : row < begin);
        begin = replaces ? row : begin;
    }
    return begin < 0 ? (int64_t)request->n_prompt - 1 : begin;
}

/* A score is the one where the rule begins, whatever rows came behind that. */
static double strength_of(const steerhook_session *s, const sh_request *request,
                          const sh_rule *rule, int64_t begin) {
    int32_t probe = rule->strength_probe;
    if (probe < 0) {
        return rule->strength;
    }
    double score = sh_running_of(s, request, probe) == NULL
                       ? request->probes[probe].score
                       : sh_running_score(s, request, probe, begin + 1);
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
        if (x->type != SH_HEAD_MATRIX && x->type != SH_SAY && !x->all_positions) {
            return true;
        }
    }
    return false;
}

/* A rule writes rows from the one where it begins: the next request is not to trust those. */
static void note_steered(sh_request *request, int64_t begin) {
    int32_t first = (int32_t)begin;
    if (request->cache.first_steered == SH_NO_ROW || first < request->cache.first_steered) {
        request->cache.first_steered = first;
    }
}

/* What a rule does from now on; one that follows rows may begin later, and be taken back. */
static steerhook_status settle(steerhook_session *s, sh_request *request, int32_t r, bool holds) {
    const sh_rule *rule = &s->package->rules[r];
    sh_rule_state *state = &request->rules[r];
    int64_t begin = begin_of(s, request, rule);
    bool same = state->decided && state->fired == holds && (!holds || state->begin == begin);
    if (same || state->held) {
        return STEERHOOK_OK;
    }
    state->decided = true;
    state->fired = holds;
    state->begin = (int32_t)begin;
    state->strength = holds ? strength_of(s, request, rule, begin) : 0.0;
    request->acting |= holds;
    return check_strength(s, rule, state->strength);
}

steerhook_status sh_decide_rules(steerhook_session *s, sh_request *request) {
    for (int32_t r = 0; r < s->package->n_rules; r++) {
        const sh_rule *rule = &s->package->rules[r];
        sh_rule_state *state = &request->rules[r];
        bool holds = false;
        if (condition(rule, request->probes, &holds)) {
            steerhook_status status = settle(s, request, r, holds);
            if (status != STEERHOOK_OK) {
                return status;
            }
        }
        if (state->fired && !request->open_ended && leaves_rows(s, rule)) {
            int64_t end = (int64_t)request->n_prompt - 1;
            note_steered(request, state->begin > end ? state->begin : end);
        }
    }
    return STEERHOOK_OK;
}
