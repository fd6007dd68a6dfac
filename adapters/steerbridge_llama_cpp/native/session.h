/* A session: the plan of a package for one model, the requests of its sequences, and the batch
 * that is being decoded. Internal. */
#ifndef STEERHOOK_SESSION_H
#define STEERHOOK_SESSION_H

#include "package.h"

/* ---- the plan: what happens at each site that the package names ---- */

typedef struct {
    int32_t probe, reading;
    int32_t slot; /* place of the reading among all readings of the package */
} sh_read;

typedef struct {
    int32_t rule;
    const sh_intervention *intervention;
    const sh_tensor *vector; /* NULL for a head */
} sh_act;

/* A site of a token reading: `site` of its probe's, the first or last of them to be computed. */
typedef struct {
    int32_t probe; /* among those with token readings */
    int32_t site;
    bool first, last;
} sh_row_site;

/* A probe with a token reading: its first map, packed for sh_panels. */
typedef struct {
    int32_t probe;           /* in the package */
    int32_t hidden, padded;  /* outputs, and those with padding */
    int32_t offset;          /* of its sums among a row's */
    float *weights[SH_MAX_ROW_SITES];
    float *bias;
} sh_row_probe;

typedef struct {
    int32_t depth;
    bool outputs_only; /* the last block and the head compute output rows only */
    int32_t n_reads, n_acts, n_rows;
    sh_row_site *rows;
    sh_read *reads;
    sh_act *acts; /* in the order in which they apply */
    /* Progress of the open batch's micro-batches at this node. */
    int32_t next_row; /* in the batch, or among its outputs */
    int32_t chunk;    /* micro-batches seen */
} sh_site_plan;

/* ---- requests ---- */

typedef enum { SH_JUDGED = 0, SH_NOT_FINITE, SH_TOO_SHORT, SH_UNKNOWN } sh_unjudged;

typedef struct {
    bool known, fired;
    sh_unjudged unjudged; /* then it fired, and its score is NaN */
    double score, threshold;
} sh_decision;

typedef struct {
    bool decided, fired;
    bool held; /* it fired for an earlier part of the conversation */
    int32_t begin; /* the first row that it changes, if that is behind the prompt's end */
    double strength;
} sh_rule_state;

/* Running scores of a token reading: the largest so far, and rows at which something happened first;
 * SH_NO_ROW if it did not. */
typedef struct {
    double best; /* a logit */
    int32_t best_row, fired_row, broken_row, unknown_row;
    int32_t told_row; /* where it fired, whatever moved since */
} sh_running;

typedef enum { SH_UNKNOWN_ROW = 0, SH_TEXT, SH_IMAGE } sh_row_kind;

/* Rows of a sequence as token readings know them: logits [n][probes], kinds, ids of tokens. */
typedef struct {
    float *logits;
    unsigned char *kinds;
    int32_t *ids;
    int32_t n, capacity;
} sh_rows;

/* Progress of a reading: how many rows it has taken, and whether it is complete. */
typedef struct {
    int32_t rows;
    bool complete;
} sh_progress;

/* What is known of the rows of a sequence in the cache: it outlives their request. */
typedef struct {
    /* First row that was steered at a layer; SH_NO_ROW: none was. In zeroed memory it would mean
     * that every row was. */
    int32_t first_steered;
    bool unseen; /* some row did not reach the last block: no output row */
    /* Rows as the readings saw them, [n_kept][n_kept_readings][n_embd], and which of them are an
     * image's. */
    float *kept;
    bool *kept_image;
    int32_t n_kept, kept_capacity;
    sh_rows rows;
} sh_cache;

/* A prompt and its answer. */
typedef struct {
    sh_cache cache;
    bool open;
    bool acting; /* a fired rule may rewrite rows of this sequence */
    bool open_ended;     /* n_prompt is not known yet: SH_ENDLESS */
    bool ends_in_batch;  /* n_prompt became known in the open batch */
    bool by_batches;     /* begun by steerhook_request_open */
    bool distrusted;     /* no probe can judge it */
    int32_t end_row;     /* in the batch being begun: the row to judge; -1: none */
    bool quiet;          /* ... some row of it is no output */
    bool ends_with_output; /* ... its latest row is one */
    int32_t n_cached, n_prompt;
    int64_t count;        /* rows so far, cached ones included */
    int64_t batch_count;  /* the same after the open batch */
    int32_t last_row;     /* its latest row in the batch being begun; -1: none */
    double *values;       /* readings, n_embd each; sums while a mean is running */
    sh_progress *progress;
    sh_decision *probes;
    sh_rule_state *rules;
    sh_running *running; /* by probe with a token reading */
    int64_t survived;    /* rows that cannot be rejected drafts */
} sh_request;

/* ---- the batch ---- */

typedef struct {
    int32_t seq;
    int64_t position; /* in its request, from 0 */
} sh_member;

typedef struct {
    bool open, image;
    bool idle; /* no row of it is read or rewritten: its nodes can be skipped */
    int32_t n_rows, n_outputs, n_members;
    int32_t row_capacity, member_capacity;
    int32_t *first_member; /* by row, and one after the last */
    int32_t *outputs;      /* rows that are outputs, in order */
    int32_t n_passes;      /* graphs that were announced; 0: they come in order */
    int32_t n_pass, n_pass_outputs;
    bool keeps_all;        /* graphs keep every row to their end: embeddings are computed */
    bool has_norm;         /* a node "result_norm" was seen */
    int32_t *pass, *pass_outputs; /* rows of the announced graph, and its outputs */
    bool *is_output;
    sh_member *members;
} sh_batch;

struct steerhook_session {
    const steerhook_package *package;
    steerhook_model model; /* its architecture is the caller's, and not kept */
    steerhook_ggml ggml;
    steerhook_status status; /* not OK: failed */
    bool paused;
    bool keeps; /* rows for later readings, see steerhook_keep_rows */
    bool keeps_answers;
    int32_t n_kept_readings;
    int32_t *kept_of; /* slot -> its number among the kept readings, or -1 */
    bool *sums;       /* slot -> whether it reads a mean */
    bool *image_only; /* slot -> whether it reads rows of images only */
    char error[256];
    double *thresholds;
    int32_t n_slots; /* readings of all probes */
    int32_t n_sites;
    sh_site_plan *sites;  /* by depth, ascending */
    int32_t *site_at;     /* depth -> index of the site, or -1 */
    int32_t *first_slot;  /* by probe */
    sh_request *requests; /* by sequence */
    sh_batch batch;
    sh_site_plan *pending; /* the node that was asked for and is being computed */
    const struct ggml_tensor *pending_node;
    int32_t pending_rows;
    float *rows;    /* SH_SPAN rows of a node */
    int32_t n_row_probes, n_row_sums; /* token readings; floats of a row's sums */
    sh_row_probe *row_probes;
    float *row_sums;
    int32_t row_sums_capacity;
    double *window;     /* logits of one running score */
    bool reads_answers; /* rows of answers, for the prompts of later turns */
    bool listens;       /* ids of tokens matter */
    float *said;        /* logits of a row that says something */
    float *scratch; /* for scores and interventions */
    bool *missing;  /* by reading of one probe */
    sh_arena arena;
};

enum { SH_ENDLESS = INT32_MAX };

enum { SH_NO_ROW = -1 };

enum { SH_MAX_ACTS = 1 << 16 }; /* as MAX_ACTS in steerbridge/spec.py */

enum { SH_SPAN = 32 }; /* rows that are copied from or to a backend at a time */

/* Writes the text and returns `status`. sh_session_fail makes the session failed as well. */
#if defined(__GNUC__)
__attribute__((format(printf, 3, 4)))
#endif
steerhook_status sh_session_refuse(steerhook_session *session, steerhook_status status,
                                   const char *format, ...);
#if defined(__GNUC__)
__attribute__((format(printf, 3, 4)))
#endif
steerhook_status sh_session_fail(steerhook_session *session, steerhook_status status,
                                 const char *format, ...);

/* Whether an act changes a row; UNDECIDED: its rule should be decided, and is not. */
typedef enum { SH_IDLE, SH_ACTS, SH_UNDECIDED } sh_act_state;

/* `begin` (may be NULL): the first row that its rule changes. */
sh_act_state sh_act_on(const steerhook_session *session, const sh_act *act, int32_t row,
                       int64_t *begin);

/* Whether a reading takes anything from this row of a request. */
bool sh_wants(const steerhook_session *session, const sh_read *read, const sh_request *request,
              int64_t position);

/* Whether a row of a prompt, or of an answer, is kept for later readings, even if the current
 * prompt does not read it. */
bool sh_keeps(const steerhook_session *session, const sh_read *read, bool prompt);

/* Where a reading's value of a row is kept. */
float *sh_kept(const steerhook_session *session, const sh_request *request, int32_t slot,
               int64_t position);

/* Room for the rows that the open batch adds; false without memory. */
bool sh_keep_room(const steerhook_session *session, sh_request *request);

/* Room for so many kept rows in all; false without memory. */
bool sh_kept_room(const steerhook_session *session, sh_request *request, int64_t rows);

/* Update the kept rows: after a cut, after a copy of the cache, and when a request begins with
 * cached rows. */
void sh_kept_cut(const steerhook_session *session, sh_request *request, int64_t from, int64_t to);
bool sh_kept_copy(const steerhook_session *session, const sh_request *from, sh_request *to);
void sh_kept_sums(const steerhook_session *session, sh_request *request);

/* Whether the value of a reading at a row is kept. */
bool sh_kept_has(const steerhook_session *session, const sh_request *request, int32_t slot,
                 int64_t position);

/* Takes the readings before the prompt's end whose rows are in the cache already, and decides the
 * probes that need nothing else. */
steerhook_status sh_kept_ends(steerhook_session *session, sh_request *request);

/* The open batch was decoded: its rows are in the cache. */
void sh_keep_batch(const steerhook_session *session, sh_request *request);

const sh_reading *sh_reading_of(const steerhook_session *session, const sh_read *read);

/* True if no row of the batch that is being begun will be read or rewritten. */
bool sh_batch_is_idle(const steerhook_session *session);

/* Ends the batch without counting its rows. */
void sh_batch_forget(steerhook_session *session);

/* The last row that was counted ends the open-ended prompt of a request: its length is known, and
 * which probes can judge it. */
steerhook_status sh_request_end_prompt(steerhook_session *session, sh_request *request);

/* The row was no end after all: the prompt goes on behind `n_cached` rows. */
steerhook_status sh_request_reopen(steerhook_session *session, sh_request *request,
                                   int32_t n_cached, steerhook_keep keep);

/* The first row of a prompt that a reading takes; negative: the prompt is too short. */
int64_t sh_first_row(const sh_reading *reading, int64_t n_prompt);

/* Scores a probe if its readings are complete. */
steerhook_status sh_decide_probe(steerhook_session *session, int32_t probe, sh_request *request);

/* Decides every rule whose probes are known, again as rows of the answer come or go. */
steerhook_status sh_decide_rules(steerhook_session *session, sh_request *request);

/* The plan of the package's sites; see plan.c. */
bool sh_plan(steerhook_session *session, const sh_error *error);

/* Ends a request: of the rows in its cache, from `first` on, nothing is known. */
void sh_forget_rows(const steerhook_session *session, sh_request *request, int32_t first);

/* Clears what belongs to one request, and makes room for it; false without memory. */
bool sh_request_reset(const steerhook_session *session, sh_request *request);

/* OK if a sequence exists, nothing has failed and no batch is open. */
steerhook_status sh_may_change(steerhook_session *session, int32_t seq);

/* OK, or the error of a null or failed session. */
steerhook_status sh_session_check(const steerhook_session *session);

#endif
