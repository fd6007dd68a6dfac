/* What a sequence has answered: tokens that were chosen from logits, and tokens that were decoded
 * from its prompt's last row on, or from the first row that was steered, if that came before.
 * Rows are numbered as in the request. Internal. */
#ifndef SB_ANSWERS_H
#define SB_ANSWERS_H

#include <stdbool.h>
#include <stdint.h>

typedef struct {
    int32_t row, token;
} sb_choice;

typedef struct {
    int32_t first;       /* the row of its first token */
    int32_t ended;       /* the first row that ends generation; SB_NOT_ENDED */
    int32_t n_tokens, token_capacity;
    int32_t *tokens;     /* of rows first, first + 1, ...; they outlive a cut */
    int32_t n_choices, choice_capacity;
    sb_choice *choices;  /* tokens that were chosen from the logits of a row */
} sb_answer;

enum { SB_NOT_ENDED = INT32_MAX };

/* Nothing is known of the sequence. */
void sb_answer_forget(sb_answer *answer);
/* Its next answer begins at a row; what was chosen so far stays. */
void sb_answer_begin(sb_answer *answer, int32_t first);
void sb_answer_choose(sb_answer *answer, int32_t row, int32_t token);
void sb_answer_add(sb_answer *answer, int32_t row, int32_t token, bool ends);
/* Rows from `row` on were removed. Tokens of rows from `unsure` on that were not chosen were
 * drafts: they are forgotten. */
void sb_answer_cut(sb_answer *answer, int32_t row, int32_t unsure);
/* Rows `first` to `last` - 1 were removed, and those behind them moved up. */
void sb_answer_move(sb_answer *answer, int32_t first, int32_t last);
/* Choices at rows before `row` are not needed any more. */
void sb_answer_prune(sb_answer *answer, int32_t row);
void sb_answer_copy(const sb_answer *from, sb_answer *to);
void sb_answer_free(sb_answer *answer);

/* The tokens of the rows from `first` to `past` - 1; NULL where one is not known. */
const int32_t *sb_answer_tokens(const sb_answer *answer, int32_t first, int32_t past);
bool sb_answer_chosen(const sb_answer *answer, int32_t row, int32_t token);
/* Whether a token at a row is this answer's: it was chosen from the row before, or it stood there
 * already. */
bool sb_answer_goes_on(const sb_answer *answer, int32_t row, int32_t token);

#endif
