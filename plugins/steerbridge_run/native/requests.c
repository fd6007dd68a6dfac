#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "events.h"
#include "watch.h"

static _Thread_local sb_watch *current; /* whose llama_decode runs on this thread */

/* The row of logits that this thread asked for last. */
static _Thread_local struct {
    const llama_context *context;
    int32_t number, row; /* of the context, and in its batch */
    uint64_t batch;
} fetched;

sb_graph sb_current(eval_callback *callback, void **data) {
    if (current == NULL) {
        return SB_UNSEEN;
    }
    if (current->session == NULL) {
        return SB_UNSTEERED;
    }
    *callback = steerhook_eval;
    *data = current->session;
    return SB_STEERED;
}

void sb_pass(const struct ggml_cgraph *graph) {
    if (current != NULL && current->session != NULL) {
        sb_last_pass(&current->last, graph, current->session);
    }
}

/* ---- failure ---- */

static void tell_refused(const sb_watch *watch, int32_t seq, const char *reason) {
    sb_event event;
    fprintf(stderr, "steerbridge: sequence %ld refused: %s\n", (long)seq, reason);
    sb_event_begin(&event, "refused");
    sb_event_number(&event, "context", watch->number);
    sb_event_number(&event, "sequence", seq);
    sb_event_text(&event, "reason", "%s", reason);
    sb_event_send(&event);
}

/* No sequence that had a request may go on before its cache was emptied. */
static void fail(sb_watch *watch, const char *reason) {
    if (!watch->failed) {
        sb_tell("failed", "context %ld: %s", (long)watch->number, reason);
    }
    watch->failed = true;
    for (int32_t i = 0; i < watch->n_seq_max; i++) {
        watch->sequences[i].lost = steerhook_request_stage(watch->session, i) != STEERHOOK_NONE;
    }
}

static void recover(sb_watch *watch) {
    for (int32_t i = 0; i < watch->n_seq_max; i++) {
        if (watch->sequences[i].lost) {
            return;
        }
    }
    watch->failed = false;
    steerhook_session_clear(watch->session);
    for (int32_t i = 0; i < watch->n_seq_max; i++) {
        steerhook_rows_restored(watch->session, i, 0); /* rows of finished requests are still there */
    }
}

/* ---- what is told ---- */

/* `name`: "verdict" of a prompt, or "answer" where a rule fired behind it. */
static void tell(sb_watch *watch, int32_t seq, const char *name) {
    enum { MAX = 64 };
    steerhook_verdict verdicts[MAX];
    steerhook_rule_state rules[MAX];
    int32_t probes = steerhook_verdicts(watch->session, seq, verdicts, MAX);
    int32_t count = steerhook_rules(watch->session, seq, rules, MAX);
    sb_event event;
    sb_event_begin(&event, name);
    sb_event_number(&event, "context", watch->number);
    sb_event_number(&event, "sequence", seq);
    sb_event_open(&event, "probes", '[');
    for (int32_t i = 0; i < probes && i < MAX; i++) {
        sb_event_open(&event, NULL, '{');
        sb_event_text(&event, "probe", "%s", verdicts[i].probe);
        sb_event_number(&event, "score", verdicts[i].score);
        sb_event_number(&event, "threshold", verdicts[i].threshold);
        sb_event_bool(&event, "fired", verdicts[i].fired);
        if (verdicts[i].unjudged[0] != '\0') {
            sb_event_text(&event, "unjudged", "%s", verdicts[i].unjudged);
        }
        if (verdicts[i].fired) {
            sb_event_text(&event, "fired_in", verdicts[i].in_answer ? "answer" : "prompt");
        }
        if (verdicts[i].row >= 0) {
            sb_event_number(&event, "row", verdicts[i].row);
        }
        sb_event_close(&event, '}');
    }
    sb_event_close(&event, ']');
    sb_event_open(&event, "fired", '[');
    watch->sequences[seq].told_rules = 0;
    for (int32_t i = 0; i < count && i < MAX; i++) {
        if (rules[i].fired) {
            sb_event_text(&event, NULL, "%s", rules[i].rule);
            watch->sequences[seq].told_rules++;
        }
    }
    sb_event_close(&event, ']');
    sb_event_send(&event);
    watch->sequences[seq].told = true;
}

/* A rule that fired in the answer is told once the row that made it cannot be a rejected draft. */
static void tell_changes(sb_watch *watch, int32_t seq) {
    enum { MAX = 64 };
    steerhook_rule_state rules[MAX];
    const sb_sequence *q = &watch->sequences[seq];
    if (!q->told || steerhook_request_stage(watch->session, seq) != STEERHOOK_ANSWERING) {
        return;
    }
    int32_t count = steerhook_rules(watch->session, seq, rules, MAX);
    int32_t fired = 0;
    for (int32_t i = 0; i < count && i < MAX; i++) {
        fired += rules[i].fired;
    }
    if (fired > q->told_rules) {
        tell(watch, seq, "answer");
    }
}

/* An answer is over. */
static void conclude(sb_watch *watch, int32_t seq) {
    steerhook_request_survived(watch->session, seq, -1);
    tell_changes(watch, seq);
}

/* ---- a request begins, or goes on ---- */

static bool in_range(const sb_watch *watch, int32_t seq) {
    return seq >= 0 && seq < watch->n_seq_max;
}

static bool open_request(sb_watch *watch, int32_t seq, int32_t n_cached, steerhook_keep keep) {
    sb_sequence *q = &watch->sequences[seq];
    conclude(watch, seq);
    if (steerhook_request_open(watch->session, seq, n_cached, keep) != STEERHOOK_OK) {
        tell_refused(watch, seq, steerhook_session_error(watch->session));
        return false;
    }
    q->used = q->told = false;
    q->held = keep == STEERHOOK_KEEP_FIRED || (q->held && keep == STEERHOOK_KEEP_HELD);
    q->draft = -1;
    return true;
}

/* The first row of a sequence in the batch being begun. */
static int32_t first_row(const sb_watch *watch, int32_t seq) {
    int32_t row = 0;
    while (!sb_last_has(&watch->last, row, seq)) {
        row++;
    }
    return row;
}

/* Evaluates rows of a sequence in one batch, unsteered and without outputs. */
static bool evaluate(sb_watch *watch, int32_t seq, const int32_t *tokens, const int32_t *positions,
                     int32_t count) {
    int32_t *n_seq_id = malloc((size_t)count * sizeof *n_seq_id);
    int32_t **seq_id = malloc((size_t)count * sizeof *seq_id);
    int8_t *output = calloc((size_t)count, sizeof *output);
    if (n_seq_id == NULL || seq_id == NULL || output == NULL) {
        sb_fatal("no memory");
    }
    for (int32_t i = 0; i < count; i++) {
        n_seq_id[i] = 1;
        seq_id[i] = &seq;
    }
    sb_rows rows = {count, tokens, positions, n_seq_id, seq_id, output, false};
    steerhook_batch ours = {count, n_seq_id, seq_id, output, false, tokens};
    sb_last_take(&watch->last, &rows);
    llama_batch batch = {count,    watch->last.token, NULL,  watch->last.pos,
                         n_seq_id, seq_id,            output};
    bool done = steerhook_batch_begin(watch->session, &ours) == STEERHOOK_OK;
    current = watch;
    done = done && sb_decode(watch, batch) == 0 && sb_last_complete(&watch->last) &&
           steerhook_batch_end(watch->session) == STEERHOOK_OK;
    current = NULL;
    free(n_seq_id);
    free(seq_id);
    free(output);
    return done;
}

/* Evaluates the rows from `first` to `past` - 1 again: they were steered in their blocks, and what
 * follows must not attend to such rows. The caller has opened the request before them. */
static bool evaluate_again(sb_watch *watch, int32_t seq, const int32_t *tokens, int32_t first,
                           int32_t past) {
    sb_cells *cells = &watch->sequences[seq].cells;
    if (!sb_remove(watch, seq, cells->positions[first])) {
        return false;
    }
    sb_last kept = watch->last;
    watch->last = (sb_last){.streams = kept.streams};
    sb_cells_renew(cells, first);
    int32_t most = sb_batch_size(watch);
    bool done = true;
    for (int32_t i = first; i < past && done; i += most) {
        int32_t count = past - i < most ? past - i : most;
        done = evaluate(watch, seq, tokens + (i - first), cells->positions + i, count);
    }
    sb_last_free(&watch->last);
    watch->last = kept;
    return done;
}

/* Opens a request behind `count` rows, none of which may be left steered in its blocks: those are
 * evaluated again. Where that cannot be done, its probes will fire. */
static bool open_behind(sb_watch *watch, int32_t seq, int32_t count, steerhook_keep keep) {
    sb_sequence *q = &watch->sequences[seq];
    int32_t steered = steerhook_first_steered(watch->session, seq);
    bool any = steered >= 0 && steered < count && steered < q->cells.count &&
               sb_may_repeat(watch, seq, q->cells.positions[steered]);
    const int32_t *tokens = any ? sb_answer_tokens(&q->answer, steered, count) : NULL;
    if (!open_request(watch, seq, tokens == NULL ? count : steered, keep)) {
        return false;
    }
    if (tokens != NULL && !evaluate_again(watch, seq, tokens, steered, count)) {
        fail(watch, "rows that were steered could not be evaluated again");
        return false;
    }
    return true;
}

static bool begin(sb_watch *watch, int32_t seq) {
    sb_sequence *q = &watch->sequences[seq];
    int32_t row = first_row(watch, seq);
    int32_t n_cached = q->cells.count;
    int32_t token = watch->last.token[row];
    /* It may answer from the logits of a prompt's earlier row, which were not steered. */
    bool distrust = sb_answer_chosen(&q->answer, n_cached - 1, token) && !sb_ends(watch, token);
    /* A single row behind rows of unknown history may belong to an answer. */
    distrust |= q->strange >= 0 && q->rows == 1;
    q->strange = -1;
    q->blind = 0;
    if (!open_behind(watch, seq, n_cached, STEERHOOK_KEEP_NONE)) {
        return false;
    }
    if (distrust) {
        steerhook_request_distrust(watch->session, seq);
    }
    return true;
}

/* A last output row may be a draft that is chosen yet; what stands before it was not. */
static bool ends_turn(const sb_watch *watch, int32_t row, bool last) {
    return !(last && watch->last.output[row]) && sb_ends(watch, watch->last.token[row]);
}

/* Whether a token between the rows of a sequence in the batch ends generation. */
static bool ends_within(const sb_watch *watch, int32_t seq) {
    int32_t left = watch->sequences[seq].rows;
    for (int32_t row = 0; row < watch->last.n_rows; row++) {
        if (sb_last_has(&watch->last, row, seq) && ends_turn(watch, row, --left == 0)) {
            return true;
        }
    }
    return false;
}

/* More rows of a prompt. One that was taken for more of an answer is a new request once a token
 * in it ends the turn. */
static bool more(sb_watch *watch, int32_t seq) {
    const sb_sequence *q = &watch->sequences[seq];
    if (!q->held || !(q->at_end || ends_within(watch, seq))) {
        return true;
    }
    int32_t rows = steerhook_request_rows(watch->session, seq, NULL);
    return open_behind(watch, seq, rows, STEERHOOK_KEEP_NONE);
}

/* Rows come, and the logits of the judged one were not used: the prompt goes on. */
static bool extend(sb_watch *watch, int32_t seq) {
    sb_sequence *q = &watch->sequences[seq];
    int32_t rows = steerhook_request_rows(watch->session, seq, NULL);
    /* Nobody was ever seen to use logits, and it feeds single tokens: it may be answering. */
    bool blind = watch->read_whole && !watch->observed && q->rows == 1;
    q->blind = blind ? q->blind + 1 : 0;
    if (!blind) {
        return open_behind(watch, seq, rows, STEERHOOK_KEEP_HELD) && more(watch, seq);
    }
    bool told = q->told;
    bool opened = open_request(watch, seq, rows, STEERHOOK_KEEP_FIRED);
    q->told = told; /* once is enough */
    if (opened && q->blind > 1) {
        steerhook_request_distrust(watch->session, seq);
    }
    return opened;
}

static bool is_shared(const sb_last *last, int32_t row) {
    return last->first_member[row + 1] - last->first_member[row] > 1;
}

/* Rows behind an answer: its own tokens, drafts of them, or a new part of the conversation. */
static bool go_on(sb_watch *watch, int32_t seq, bool drafts) {
    sb_sequence *q = &watch->sequences[seq];
    const sb_last *last = &watch->last;
    int32_t n_prompt, count = steerhook_request_rows(watch->session, seq, &n_prompt);
    int32_t previous = -1, number = count;
    bool ended = q->answer.ended < count, known = true, outputs = true, ahead = false;
    q->draft = -1;
    for (int32_t row = 0; row < last->n_rows; row++) {
        if (!sb_last_has(last, row, seq)) {
            continue;
        }
        if (known && !sb_answer_goes_on(&q->answer, number, last->token[row])) {
            known = false;
            q->draft = previous;
            /* Drafts are verified by the logits of the row before. Behind a token that several
             * sequences share they may also look ahead, without any. */
            ahead = previous >= 0 && is_shared(last, previous);
            outputs = outputs && (previous < 0 || last->output[previous]);
        }
        outputs = outputs && (known || last->output[row]);
        ended |= ends_turn(watch, row, number + 1 == count + q->rows);
        previous = row;
        number++;
    }
    if (known || (drafts && q->draft >= 0 && (outputs || ahead))) {
        return true;
    }
    bool fresh = ended || (q->draft < 0 && count == n_prompt);
    return fresh ? open_behind(watch, seq, count, STEERHOOK_KEEP_NONE)
                 : open_request(watch, seq, count, STEERHOOK_KEEP_FIRED);
}

/* Notes which sequences have rows here; false if one is out of range. */
static bool survey(sb_watch *watch) {
    const sb_last *last = &watch->last;
    for (int32_t i = 0; i < watch->n_seq_max; i++) {
        watch->sequences[i].rows = 0;
    }
    for (int32_t m = 0; m < last->first_member[last->n_rows]; m++) {
        if (!in_range(watch, last->members[m])) {
            return false;
        }
        watch->sequences[last->members[m]].rows++;
    }
    return true;
}

/* Whether more than one sequence has rows in the batch being begun. */
static bool of_several(const sb_watch *watch) {
    int32_t count = 0;
    for (int32_t i = 0; i < watch->n_seq_max; i++) {
        count += watch->sequences[i].rows > 0;
    }
    return count > 1;
}

/* Where a program leaves positions to llama.cpp, they go on from the cache. */
static void number_rows(sb_watch *watch) {
    sb_last *last = &watch->last;
    for (int32_t seq = 0; last->pos[0] < 0 && seq < watch->n_seq_max; seq++) {
        int32_t next = watch->sequences[seq].rows > 0 ? sb_next_position(watch, seq) : 0;
        for (int32_t row = 0; watch->sequences[seq].rows > 0 && row < last->n_rows; row++) {
            if (sb_last_has(last, row, seq)) {
                last->pos[row] = next++;
            }
        }
    }
}

static bool enter(sb_watch *watch, int32_t seq, bool drafts) {
    switch (steerhook_request_stage(watch->session, seq)) {
    case STEERHOOK_NONE: return begin(watch, seq);
    case STEERHOOK_PROMPTING: return more(watch, seq);
    case STEERHOOK_ANSWERING: break;
    }
    return watch->sequences[seq].used ? go_on(watch, seq, drafts) : extend(watch, seq);
}

/* As sb_before; without `drafts`, rows behind an answer's last token are no drafts. */
static bool before(sb_watch *watch, const sb_rows *rows, bool drafts) {
    sb_last_take(&watch->last, rows);
    if (!survey(watch)) {
        fail(watch, "a row of a sequence that the context does not have");
        return false;
    }
    number_rows(watch);
    if (rows->image && of_several(watch)) {
        fail(watch, "a batch of image rows of several sequences: their order is not known");
        return false;
    }
    for (int32_t seq = 0; seq < watch->n_seq_max; seq++) {
        if (watch->sequences[seq].rows > 0 && !enter(watch, seq, drafts)) {
            return false;
        }
    }
    steerhook_batch batch = {rows->n_tokens, rows->n_seq_id, rows->seq_id, rows->output,
                             rows->image, rows->token};
    if (steerhook_batch_begin(watch->session, &batch) != STEERHOOK_OK) {
        fail(watch, steerhook_session_error(watch->session));
        return false;
    }
    current = watch;
    return true;
}

bool sb_before(sb_watch *watch, const sb_rows *rows) {
    current = watch; /* also where nothing is steered: llama.cpp may use this graph again */
    if (watch->other) {
        return true;
    }
    current = NULL;
    if (watch->failed) {
        return false;
    }
    return rows->n_tokens < 1 || before(watch, rows, true);
}

/* ---- a batch was decoded ---- */

/* Notes what the rows of the batch are for a sequence. From the row on that was judged, their
 * tokens are kept. */
static void note_rows(sb_watch *watch, int32_t seq) {
    sb_sequence *q = &watch->sequences[seq];
    const sb_last *last = &watch->last;
    int32_t n_prompt, number;
    q->first = number = steerhook_request_rows(watch->session, seq, &n_prompt) - q->rows;
    q->batch = last->number;
    q->origin = seq;
    q->judged = -1;
    for (int32_t row = 0; row < last->n_rows; row++) {
        if (!sb_last_has(last, row, seq)) {
            continue;
        }
        if (!sb_cells_add(&q->cells, last->pos[row], last->image)) {
            fail(watch, "rows behind later ones: their order in the cache is not known");
        }
        if (q->used ? last->output[row] != 0 : number == n_prompt - 1) {
            q->judged = row;
        }
        int32_t steered = steerhook_first_steered(watch->session, seq);
        bool behind = steered >= 0 && steered < number; /* they may have to be evaluated again */
        if (!q->used && q->judged == row && !behind) {
            sb_answer_begin(&q->answer, number);
        }
        if (behind || (n_prompt > 0 && number >= n_prompt - 1)) {
            bool ends = n_prompt > 0 && number >= n_prompt && sb_ends(watch, last->token[row]);
            sb_answer_add(&q->answer, number, last->token[row], ends);
        }
        q->at_end = sb_ends(watch, last->token[row]);
        number++;
    }
    sb_answer_prune(&q->answer, q->first - 1);
    if (q->blind > 1 && !q->told) {
        tell(watch, seq, "verdict");
    }
    tell_changes(watch, seq);
}

int32_t sb_after(sb_watch *watch, int32_t result) {
    current = NULL;
    if (watch->other) {
        return result;
    }
    steerhook_status status = result == 0 ? steerhook_batch_end(watch->session)
                                          : steerhook_batch_cancel(watch->session);
    if (status != STEERHOOK_OK) {
        fail(watch, steerhook_session_error(watch->session));
        return SB_ERROR; /* the logits in the context are of an earlier batch */
    }
    if (result != 0) {
        return result;
    }
    if (!sb_last_complete(&watch->last)) {
        fail(watch, "a pass computed other rows than those of the batch");
        return SB_ERROR;
    }
    watch->read_whole = false;
    for (int32_t seq = 0; seq < watch->n_seq_max; seq++) {
        if (watch->sequences[seq].rows > 0) {
            note_rows(watch, seq);
        }
    }
    return watch->failed ? SB_ERROR : result;
}

/* ---- its logits are used ---- */

/* The row in the last batch that a sequence would know it by: its own, or the one it was copied
 * from. */
static bool concerns(const sb_watch *watch, const sb_sequence *q, int32_t row) {
    return q->batch == watch->last.number && sb_last_has(&watch->last, row, q->origin);
}

/* The number of a row of the last batch in a sequence's request. */
static int32_t number_of(const sb_watch *watch, const sb_sequence *q, int32_t row) {
    return q->first + sb_last_before(&watch->last, row, q->origin);
}

/* What looked like drafts was prompt: decode it again, judged. It must be alone in its batch. */
static bool judge_again(sb_watch *watch, int32_t seq) {
    sb_sequence *q = &watch->sequences[seq];
    sb_last copy = watch->last;
    for (int32_t i = 0; i < watch->n_seq_max; i++) {
        if (i != seq && watch->sequences[i].batch == copy.number) {
            fail(watch, "a batch of several sequences, one with drafts that are not verified");
            return false;
        }
    }
    watch->last = (sb_last){.number = copy.number, .streams = copy.streams};
    llama_batch batch = sb_last_batch(&copy);
    sb_rows rows = {copy.n_rows,  copy.token,  copy.pos, batch.n_seq_id,
                    batch.seq_id, copy.output, copy.image};
    steerhook_request_cut(watch->session, seq, q->first, -1);
    sb_cells_cut(&q->cells, q->first, q->cells.count);
    sb_answer_cut(&q->answer, q->first, q->first);
    bool done = sb_remove(watch, seq, copy.pos[0]) && before(watch, &rows, false) &&
                sb_after(watch, sb_decode(watch, batch)) == 0;
    if (!done && !watch->failed) {
        fail(watch, "rows behind an answer could not be evaluated again");
    }
    current = NULL;
    free(batch.n_seq_id);
    free(batch.seq_id);
    sb_last_free(&copy);
    return done;
}

static void latch(sb_watch *watch, int32_t seq) {
    sb_sequence *q = &watch->sequences[seq];
    q->used = true;
    q->blind = 0;
    if (q->origin == seq && !q->told) {
        tell(watch, seq, "verdict");
    }
}

bool sb_used(llama_context *context, int32_t index) {
    sb_watch *watch = sb_watch_known(context);
    if (watch == NULL || watch->failed || watch->last.n_rows == 0) {
        return watch == NULL || !watch->failed;
    }
    int32_t row = sb_last_row(&watch->last, index);
    fetched.context = context;
    fetched.number = watch->number;
    fetched.batch = watch->last.number;
    fetched.row = row;
    if (row < 0 || (watch->last.used[row] && watch->observed)) {
        return true;
    }
    watch->observed = true;
    for (int32_t seq = 0; seq < watch->n_seq_max; seq++) {
        const sb_sequence *q = &watch->sequences[seq];
        bool judged = steerhook_request_stage(watch->session, seq) == STEERHOOK_ANSWERING;
        if (!judged || !concerns(watch, q, row) || q->judged > row) {
            continue;
        }
        if (!q->used && q->judged < row) {
            fail(watch, "logits behind a prompt's end were used before those of the end");
            return false;
        }
        if (q->judged != row) {
            continue;
        }
        if (q->used && q->draft >= 0 && !watch->last.used[q->draft] && q->draft != row) {
            if (!judge_again(watch, seq)) {
                return false;
            }
            fetched.batch = watch->last.number;
        }
        if (!q->used) {
            latch(watch, seq);
        }
    }
    watch->last.used[row] = true;
    return true;
}

/* Rows of the last batch whose tokens were chosen are no rejected drafts. */
static void note_survivors(sb_watch *watch, int32_t seq) {
    const sb_sequence *q = &watch->sequences[seq];
    int32_t number = q->first;
    for (int32_t row = 0; row < watch->last.n_rows; row++) {
        if (!sb_last_has(&watch->last, row, q->origin)) {
            continue;
        }
        bool first = number == q->first;
        if (!first && !sb_answer_chosen(&q->answer, number - 1, watch->last.token[row])) {
            break;
        }
        number++;
    }
    steerhook_request_survived(watch->session, seq, number);
    tell_changes(watch, seq);
}

static void chose(sb_watch *watch, int32_t row, int32_t token) {
    for (int32_t seq = 0; row >= 0 && seq < watch->n_seq_max; seq++) {
        sb_sequence *q = &watch->sequences[seq];
        if (concerns(watch, q, row)) {
            sb_answer_choose(&q->answer, number_of(watch, q, row), token);
            if (q->used) {
                note_survivors(watch, seq);
            }
        }
    }
}

void sb_chose(llama_context *context, int32_t index, int32_t token) {
    sb_watch *watch = sb_watch_known(context);
    if (watch != NULL && watch->last.n_rows > 0) {
        chose(watch, sb_last_row(&watch->last, index), token);
    }
}

void sb_chose_last(int32_t token) {
    sb_watch *watch = fetched.context == NULL ? NULL : sb_watch_known(fetched.context);
    if (watch != NULL && watch->number == fetched.number && watch->last.number == fetched.batch) {
        chose(watch, fetched.row, token);
    }
}

void sb_read_whole(llama_context *context) {
    sb_watch *watch = sb_watch_known(context);
    if (watch != NULL) {
        watch->read_whole = true;
    }
}

bool sb_steered_embeddings(llama_context *context) {
    sb_watch *watch = sb_watch_known(context);
    for (int32_t seq = 0; watch != NULL && seq < watch->n_seq_max; seq++) {
        enum { MAX = 64 };
        steerhook_rule_state rules[MAX];
        bool last = watch->sequences[seq].batch == watch->last.number &&
                    steerhook_request_stage(watch->session, seq) == STEERHOOK_ANSWERING;
        int32_t count = last ? steerhook_rules(watch->session, seq, rules, MAX) : 0;
        for (int32_t i = 0; i < count && i < MAX; i++) {
            if (rules[i].fired) {
                tell_refused(watch, seq, "embeddings of rows that were steered");
                return true;
            }
        }
    }
    return false;
}

/* ---- the KV cache ---- */

static void cut(sb_watch *watch, int32_t seq, int32_t from, int32_t to) {
    sb_sequence *q = &watch->sequences[seq];
    int32_t first = sb_cells_before(&q->cells, from < 0 ? 0 : from);
    int32_t last = sb_cells_before(&q->cells, to);
    bool tail = last == q->cells.count;
    sb_cells_cut(&q->cells, first, last);
    if (first < last && first <= q->strange) {
        q->strange = tail ? -1 : first;
    }
    if (watch->failed) {
        q->lost &= from > 0 || to >= 0;
        return;
    }
    if (first >= last) {
        return; /* nothing was there: what is known of the answer stays */
    }
    int32_t n_prompt = 0;
    steerhook_request_rows(watch->session, seq, &n_prompt);
    if (tail && first < n_prompt) {
        conclude(watch, seq);
    }
    steerhook_request_cut(watch->session, seq, first, tail ? -1 : last);
    tell_changes(watch, seq);
    if (tail) {
        sb_answer_cut(&q->answer, first, q->first);
    } else {
        sb_answer_move(&q->answer, first, last);
    }
    q->used &= steerhook_request_stage(watch->session, seq) == STEERHOOK_ANSWERING;
}

void sb_forget(sb_watch *watch, int32_t seq) {
    sb_sequence *q = &watch->sequences[seq];
    steerhook_rows_restored(watch->session, seq, 0);
    q->used = false;
    sb_answer_forget(&q->answer);
    sb_cells_fill(&q->cells, sb_next_position(watch, seq));
    q->strange = q->cells.count > 0 ? 0 : -1;
}

void sb_overlaid(sb_watch *watch, int32_t seq, int32_t first, const int32_t *positions,
                 int32_t count) {
    sb_sequence *q = &watch->sequences[seq];
    bool ordered = true;
    conclude(watch, seq);
    steerhook_rows_restored(watch->session, seq, first);
    q->used = false;
    sb_answer_cut(&q->answer, first, q->first);
    sb_cells_cut(&q->cells, first, q->cells.count);
    for (int32_t i = 0; i < count; i++) {
        ordered &= sb_cells_add(&q->cells, positions[i], true);
    }
    q->strange = first;
    if (!ordered) {
        sb_forget(watch, seq);
    }
}

void sb_moved(const void *memory, int32_t seq, int32_t from, int32_t to, int32_t delta) {
    sb_watch *watch = sb_watch_known(memory);
    for (int32_t i = 0; watch != NULL && i < watch->n_seq_max; i++) {
        if ((seq < 0 || seq == i) && !sb_cells_shift(&watch->sequences[i].cells, from, to, delta)) {
            sb_forget(watch, i);
        }
    }
}

void sb_cut(const void *memory, int32_t seq, int32_t from, int32_t to) {
    sb_watch *watch = sb_watch_known(memory);
    if (watch == NULL) {
        return;
    }
    for (int32_t i = 0; i < watch->n_seq_max; i++) {
        if (seq < 0 || seq == i) {
            cut(watch, i, from, to);
        }
    }
    if (watch->failed) {
        recover(watch);
    }
}

void sb_kept(const void *memory, int32_t seq) {
    sb_watch *watch = sb_watch_known(memory);
    for (int32_t i = 0; watch != NULL && i < watch->n_seq_max; i++) {
        if (i != seq) {
            sb_cut(memory, i, 0, -1);
        }
    }
}

void sb_copied(const void *memory, int32_t from, int32_t to, int32_t p0, int32_t p1) {
    sb_watch *watch = sb_watch_known(memory);
    if (watch == NULL || from == to || !in_range(watch, from) || !in_range(watch, to)) {
        return;
    }
    sb_sequence *q = &watch->sequences[to];
    bool whole = q->cells.count == 0 && p0 <= 0;
    bool ordered = sb_cells_copy(&watch->sequences[from].cells, &q->cells, p0, p1);
    if (watch->failed) {
        q->lost = true; /* only emptying its cache helps */
        return;
    }
    if (!whole || !ordered) { /* of its middle, or behind rows of its own */
        steerhook_request_copy(watch->session, from, to); /* which rows were steered */
        sb_forget(watch, to);
        return;
    }
    if (steerhook_request_copy(watch->session, from, to) != STEERHOOK_OK) {
        q->used = false; /* there was no request */
        sb_answer_forget(&q->answer);
        return;
    }
    sb_answer answer = q->answer;
    sb_cells cells = q->cells;
    sb_answer_copy(&watch->sequences[from].answer, &answer);
    *q = watch->sequences[from];
    q->answer = answer;
    q->cells = cells;
    int32_t rows = steerhook_request_rows(watch->session, to, NULL);
    if (cells.count < rows) { /* p1 left some of them out */
        steerhook_request_cut(watch->session, to, cells.count, -1);
        sb_answer_cut(&q->answer, cells.count, q->first);
        q->used &= steerhook_request_stage(watch->session, to) == STEERHOOK_ANSWERING;
    }
}

void sb_broken(const void *memory, const char *what) {
    sb_watch *watch = sb_watch_known(memory);
    if (watch != NULL) {
        fail(watch, what);
    }
}
