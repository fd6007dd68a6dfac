/* The plan of a session: which sites have work, and what, in order of computation. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "say.h"
#include "score.h"
#include "tokens.h"

static void *need(steerhook_session *s, size_t count, size_t size, const sh_error *error) {
    void *memory = sh_arena_new(&s->arena, count, size);
    if (memory == NULL) {
        sh_fail(error, "session", "memory", "none");
    }
    return memory;
}

typedef void (*visit_read)(steerhook_session *, const sh_read *, int32_t depth);
typedef void (*visit_act)(steerhook_session *, const sh_act *, int32_t depth);

static void each_read(steerhook_session *s, visit_read visit) {
    int32_t slot = 0;
    for (int32_t p = 0; p < s->package->n_probes; p++) {
        const sh_probe *probe = &s->package->probes[p];
        for (int32_t k = 0; k < probe->n_readings; k++, slot++) {
            visit(s, &(sh_read){p, k, slot}, probe->readings[k].depth);
        }
    }
}

static void each_act(steerhook_session *s, visit_act visit) {
    for (int32_t r = 0; r < s->package->n_rules; r++) {
        const sh_rule *rule = &s->package->rules[r];
        for (int32_t i = 0; i < rule->n_interventions; i++) {
            const sh_intervention *x = &s->package->interventions[rule->interventions[i]];
            if (x->type == SH_HEAD_MATRIX || x->type == SH_SAY) {
                visit(s, &(sh_act){r, x, NULL}, x->min_depth);
            }
            for (int32_t t = 0; t < x->n_targets; t++) {
                visit(s, &(sh_act){r, x, &x->targets[t].vector}, x->targets[t].depth);
            }
        }
    }
}

typedef void (*visit_row_site)(steerhook_session *, const sh_row_site *, int32_t depth);

static void each_row_site(steerhook_session *s, visit_row_site visit) {
    for (int32_t p = 0, k = 0; p < s->package->n_probes; p++) {
        const sh_token_reading *reading = &s->package->probes[p].tokens;
        int32_t first = 0;
        int32_t last = 0;
        for (int32_t i = 1; i < reading->n_sites; i++) {
            first = reading->sites[i] < reading->sites[first] ? i : first;
            last = reading->sites[i] > reading->sites[last] ? i : last;
        }
        for (int32_t i = 0; i < reading->n_sites; i++) {
            visit(s, &(sh_row_site){k, i, i == first, i == last}, reading->sites[i]);
        }
        k += reading->n_sites > 0;
    }
}

/* What all rules do must be countable: rules, their interventions and targets multiply. */
static bool check_acts(const steerhook_session *s, const sh_error *error) {
    int64_t acts = 0;
    for (int32_t r = 0; r < s->package->n_rules; r++) {
        const sh_rule *rule = &s->package->rules[r];
        for (int32_t i = 0; i < rule->n_interventions; i++) {
            const sh_intervention *x = &s->package->interventions[rule->interventions[i]];
            acts += x->n_targets == 0 ? 1 : x->n_targets;
        }
    }
    return acts <= SH_MAX_ACTS ||
           sh_fail(error, "rules", "65536 targets at most", "%lld", (long long)acts);
}

/* In site_at, 0 is "no work yet"; depths in use are marked, then numbered in order. */
static void mark_read(steerhook_session *s, const sh_read *read, int32_t depth) {
    (void)read;
    s->site_at[depth] = 1;
}

static void mark_row_site(steerhook_session *s, const sh_row_site *site, int32_t depth) {
    (void)site;
    s->site_at[depth] = 1;
}

static void count_row_site(steerhook_session *s, const sh_row_site *site, int32_t depth) {
    (void)site;
    s->sites[s->site_at[depth]].n_rows++;
}

static void store_row_site(steerhook_session *s, const sh_row_site *row_site, int32_t depth) {
    sh_site_plan *site = &s->sites[s->site_at[depth]];
    site->rows[site->n_rows++] = *row_site;
}

static void mark_act(steerhook_session *s, const sh_act *act, int32_t depth) {
    (void)act;
    s->site_at[depth] = 1;
}

static void count_read(steerhook_session *s, const sh_read *read, int32_t depth) {
    (void)read;
    s->sites[s->site_at[depth]].n_reads++;
    s->n_slots++;
}

static void count_act(steerhook_session *s, const sh_act *act, int32_t depth) {
    (void)act;
    s->sites[s->site_at[depth]].n_acts++;
}

static void store_read(steerhook_session *s, const sh_read *read, int32_t depth) {
    sh_site_plan *site = &s->sites[s->site_at[depth]];
    site->reads[site->n_reads++] = *read;
    if (read->reading == 0) {
        s->first_slot[read->probe] = read->slot;
    }
    sh_position kind = sh_reading_of(s, read)->position;
    bool before_end = kind == SH_PROMPT_END && sh_reading_of(s, read)->offset < 0;
    bool kept = kind != SH_PROMPT_END || (before_end && !site->outputs_only);
    s->kept_of[read->slot] = kept ? s->n_kept_readings++ : -1;
    s->sums[read->slot] = kind != SH_PROMPT_END;
    s->image_only[read->slot] = kind == SH_IMAGE_MEAN;
}

static void store_act(steerhook_session *s, const sh_act *act, int32_t depth) {
    sh_site_plan *site = &s->sites[s->site_at[depth]];
    site->acts[site->n_acts++] = *act;
}

/* ---- architectures whose nodes are not what their names say ---- */

enum { NO_BLOCKS = 1, NO_HEAD = 2, WHOLE_LAST = 4 };

/* As llama.cpp of llama-cpp-python 0.3.36 builds their graphs. Of another architecture or version, a
 * node that is missing or has other rows fails its batch. */
static const struct {
    const char *name;
    int differs;
} architectures[] = {
    /* no l_out */
    {"deepseek4", NO_BLOCKS},
    {"eagle3", NO_BLOCKS},
    {"gemma4-assistant", NO_BLOCKS},
    {"plamo2", NO_BLOCKS},
    {"qwen4exp", NO_BLOCKS},
    /* l_out is not what the next block reads: a norm comes between */
    {"hrm_text", NO_BLOCKS},
    {"nanbeige", NO_BLOCKS},
    /* no result_norm, or the output embedding reads a multiple of it */
    {"minicpm3", NO_HEAD},
    {"plamo3", NO_HEAD},
    /* the last block holds all rows */
    {"bailingmoe3", WHOLE_LAST},
    {"cohere2moe", WHOLE_LAST},
    {"gemma4", WHOLE_LAST},
    {"gpt-oss", WHOLE_LAST},
    {"hy_v3", WHOLE_LAST},
    {"nemotron_h", WHOLE_LAST},
    {"qwen35", WHOLE_LAST},
    {"qwen35moe", WHOLE_LAST},
    {"qwen3next", WHOLE_LAST},
    {"step35", WHOLE_LAST},
};

static int differences(const steerhook_session *s) {
    size_t count = sizeof architectures / sizeof *architectures;
    for (size_t i = 0; s->model.architecture != NULL && i < count; i++) {
        if (strcmp(s->model.architecture, architectures[i].name) == 0) {
            return architectures[i].differs;
        }
    }
    return 0;
}

/* Whether llama.cpp shows a site by the name of a node. */
static bool is_shown(const steerhook_session *s, int32_t depth, const sh_error *error) {
    char site[48];
    bool head = depth == s->model.n_layer + 1;
    if (depth > s->model.n_layer + 1) {
        return true; /* every graph has logits */
    }
    snprintf(site, sizeof site, head ? "site head_input" : "site layer_input[%ld]", (long)depth);
    if (depth == 0) {
        return sh_fail(error, site, "a site that llama.cpp shows by name", "the input of block 0");
    }
    if (!head && s->model.n_deepstack < 0) {
        return sh_fail(error, site, "a site that llama.cpp shows by name",
                       "features of an image that are added before the block");
    }
    return (differences(s) & (head ? NO_HEAD : NO_BLOCKS)) == 0 ||
           sh_fail(error, site, "a site that llama.cpp shows by name", "architecture %s",
                   s->model.architecture);
}

/* ---- numbering ---- */

static bool number_sites(steerhook_session *s, const sh_error *error) {
    int32_t depths = s->model.n_layer + 3; /* the head's logits are the last */
    s->site_at = need(s, (size_t)depths, sizeof *s->site_at, error);
    if (s->site_at == NULL) {
        return false;
    }
    each_read(s, mark_read);
    each_row_site(s, mark_row_site);
    each_act(s, mark_act);
    for (int32_t depth = 0; depth < depths; depth++) {
        if (s->site_at[depth] != 0 && !is_shown(s, depth, error)) {
            return false;
        }
        s->site_at[depth] = s->site_at[depth] != 0 ? s->n_sites++ : -1;
    }
    s->sites = need(s, (size_t)s->n_sites, sizeof *s->sites, error);
    for (int32_t depth = 0; s->sites != NULL && depth < depths; depth++) {
        if (s->site_at[depth] >= 0) {
            sh_site_plan *site = &s->sites[s->site_at[depth]];
            site->depth = depth;
            bool whole = (differences(s) & WHOLE_LAST) != 0;
            site->outputs_only = depth >= s->model.n_layer + whole;
        }
    }
    return s->sites != NULL;
}

static bool fill_sites(steerhook_session *s, const sh_error *error) {
    each_read(s, count_read);
    each_row_site(s, count_row_site);
    each_act(s, count_act);
    for (int32_t i = 0; i < s->n_sites; i++) {
        sh_site_plan *site = &s->sites[i];
        site->reads = need(s, (size_t)site->n_reads, sizeof *site->reads, error);
        site->acts = need(s, (size_t)site->n_acts, sizeof *site->acts, error);
        site->rows = need(s, (size_t)site->n_rows, sizeof *site->rows, error);
        site->n_reads = site->n_acts = site->n_rows = 0;
        if (site->reads == NULL || site->acts == NULL || site->rows == NULL) {
            return false;
        }
    }
    s->kept_of = need(s, (size_t)s->n_slots, sizeof *s->kept_of, error);
    s->sums = need(s, (size_t)s->n_slots, sizeof *s->sums, error);
    s->image_only = need(s, (size_t)s->n_slots, sizeof *s->image_only, error);
    if (s->kept_of == NULL || s->sums == NULL || s->image_only == NULL) {
        return false;
    }
    each_read(s, store_read);
    each_row_site(s, store_row_site);
    each_act(s, store_act);
    return true;
}

/* The factor of a constant rule must fit a float; one with a score is checked per verdict. */
static bool check_constants(const steerhook_session *s, const sh_error *error) {
    for (int32_t r = 0; r < s->package->n_rules; r++) {
        const sh_rule *rule = &s->package->rules[r];
        for (int32_t i = 0; rule->strength_probe < 0 && i < rule->n_interventions; i++) {
            const sh_intervention *x = &s->package->interventions[rule->interventions[i]];
            if (!isfinite((float)(rule->strength * x->factor))) {
                return sh_fail(error, rule->id, "a strength that fits a float", "%g times %g",
                               rule->strength, x->factor);
            }
        }
    }
    return true;
}

static bool make_buffers(steerhook_session *s, const sh_error *error) {
    const steerhook_package *package = s->package;
    size_t scratch = 1;
    int32_t most_readings = 1;
    for (int32_t i = 0; i < package->n_probes; i++) {
        size_t size = sh_score_scratch(&package->probes[i], package->n_embd);
        int32_t readings = package->probes[i].n_readings;
        scratch = size > scratch ? size : scratch;
        most_readings = readings > most_readings ? readings : most_readings;
        s->thresholds[i] = package->probes[i].threshold;
    }
    for (int32_t i = 0; i < package->n_interventions; i++) {
        size_t size = sh_intervene_scratch(&package->interventions[i]);
        scratch = size > scratch ? size : scratch;
    }
    s->scratch = need(s, scratch, sizeof *s->scratch, error);
    s->missing = need(s, (size_t)most_readings, sizeof *s->missing, error);
    s->rows = need(s, (size_t)SH_SPAN * (size_t)package->n_embd, sizeof *s->rows, error);
    return s->scratch != NULL && s->missing != NULL && s->rows != NULL;
}

bool sh_plan(steerhook_session *s, const sh_error *error) {
    size_t probes = (size_t)s->package->n_probes;
    s->thresholds = need(s, probes, sizeof *s->thresholds, error);
    s->first_slot = need(s, probes, sizeof *s->first_slot, error);
    s->requests = need(s, (size_t)s->model.n_seq_max, sizeof *s->requests, error);
    for (int32_t i = 0; s->requests != NULL && i < s->model.n_seq_max; i++) {
        s->requests[i].cache.first_steered = SH_NO_ROW;
    }
    return s->thresholds != NULL && s->first_slot != NULL && s->requests != NULL &&
           check_acts(s, error) && number_sites(s, error) && fill_sites(s, error) &&
           check_constants(s, error) && make_buffers(s, error) && sh_plan_rows(s, error) &&
           sh_plan_say(s, error);
}
