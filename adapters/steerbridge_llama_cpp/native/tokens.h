/* Readings over tokens; see tokens.c. Internal. */
#ifndef STEERHOOK_TOKENS_H
#define STEERHOOK_TOKENS_H

#include "session.h"

/* The logit of a row that was not computed; NaN: a state or an output was not finite. */
#define SH_NO_LOGIT (-INFINITY)

/* Whether a reading takes this row of a request, now or in a later turn. */
bool sh_row_wanted(const steerhook_session *session, const sh_row_site *site,
                   const sh_request *request, int64_t row);

/* ---- kept logits, by row of a sequence ---- */

/* Whether rows are noted at all: something reads tokens, or listens to their ids. */
bool sh_knows_rows(const steerhook_session *session);

/* Room for so many rows; false without memory. */
bool sh_rows_room(const steerhook_session *session, sh_rows *rows, int64_t need);

/* A row of the batch that is being begun; `id` of its token, -1 if it has none. */
void sh_rows_announce(const steerhook_session *session, sh_request *request, int64_t row,
                      int32_t id);

/* As the cache: rows were cut, or copied from another sequence (false without memory). */
void sh_rows_cut(const steerhook_session *session, sh_rows *rows, int64_t from, int64_t to);
bool sh_rows_copy(const steerhook_session *session, const sh_rows *from, sh_rows *to);
void sh_rows_free(sh_rows *rows);

float *sh_row_logit(const steerhook_session *session, const sh_rows *rows, int64_t row,
                    int32_t probe);

/* Whether the logits of the first rows are known, as far as the probe would read them in a prompt. */
bool sh_rows_known(const steerhook_session *session, const sh_request *request, int32_t probe,
                   int64_t rows);

/* ---- what follows from them ---- */

/* A request begins with the rows that it has. */
void sh_running_start(const steerhook_session *session, sh_request *request);

/* Rows from `from` on, behind the prompt, were taken back. */
void sh_running_cut(const steerhook_session *session, sh_request *request, int64_t from);

/* Rows were removed in the middle: the numbers of those behind them change. */
void sh_running_move(sh_running *running, int64_t from, int64_t to);

/* The score of a probe in front of row `until`; NaN if there is none. */
double sh_running_score(const steerhook_session *session, const sh_request *request, int32_t probe,
                        int64_t until);

/* NULL for a probe without a token reading. */
const sh_running *sh_running_of(const steerhook_session *session, const sh_request *request,
                                int32_t probe);

/* ---- rows of a node ---- */

/* Room for the sums of a graph's rows; false without memory. */
bool sh_row_sums_room(steerhook_session *session, int32_t rows);

float *sh_row_sums(const steerhook_session *session, int32_t index);

/* Adds what a site gives to the sums of `count` rows, from number `index` of the graph on. */
void sh_rows_sum(const steerhook_session *session, const sh_row_site *site, int32_t index,
                 const float *x, int32_t count);

/* All sites of the reading were summed: the logit of row `row` of the batch, number `index` of the
 * graph, is kept and judged. */
steerhook_status sh_rows_take(steerhook_session *session, const sh_row_site *site, int32_t row,
                              int32_t index);

/* Weights of the first maps, packed for sh_panels. */
bool sh_plan_rows(steerhook_session *session, const sh_error *error);

#endif
