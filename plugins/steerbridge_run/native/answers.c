#include "answers.h"

#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "events.h"

/* Room for one item more, doubled when it is needed. */
static void *room(void *items, int32_t count, int32_t *capacity, size_t size) {
    if (count < *capacity) {
        return items;
    }
    *capacity = *capacity == 0 ? 64 : 2 * *capacity;
    void *larger = realloc(items, (size_t)*capacity * size);
    if (larger == NULL) {
        sb_fatal("no memory");
    }
    return larger;
}

void sb_answer_forget(sb_answer *answer) {
    sb_answer_begin(answer, 0);
    answer->n_choices = 0;
}

void sb_answer_begin(sb_answer *answer, int32_t first) {
    answer->first = first;
    answer->ended = SB_NOT_ENDED;
    answer->n_tokens = 0;
}

void sb_answer_choose(sb_answer *answer, int32_t row, int32_t token) {
    if (token < 0 || sb_answer_chosen(answer, row, token)) {
        return;
    }
    answer->choices = room(answer->choices, answer->n_choices, &answer->choice_capacity,
                           sizeof *answer->choices);
    answer->choices[answer->n_choices++] = (sb_choice){row, token};
}

void sb_answer_add(sb_answer *answer, int32_t row, int32_t token, bool ends) {
    int32_t index = row - answer->first;
    if (index < 0 || index > answer->n_tokens) {
        answer->first = row; /* those between are not known */
        answer->n_tokens = index = 0;
    }
    if (index == answer->n_tokens) {
        answer->tokens =
            room(answer->tokens, index, &answer->token_capacity, sizeof *answer->tokens);
        answer->n_tokens++;
    } else if (answer->tokens[index] != token) {
        answer->n_tokens = index + 1; /* another continuation */
    }
    answer->tokens[index] = token;
    if (ends && row < answer->ended) {
        answer->ended = row;
    }
}

void sb_answer_cut(sb_answer *answer, int32_t row, int32_t unsure) {
    int32_t kept = 0;
    int32_t from = row > unsure ? row : unsure;
    for (int32_t i = from - answer->first; i > 0 && i < answer->n_tokens; i++) {
        if (!sb_answer_chosen(answer, answer->first + i - 1, answer->tokens[i])) {
            answer->n_tokens = i;
        }
    }
    for (int32_t i = 0; i < answer->n_choices; i++) {
        if (answer->choices[i].row < row) {
            answer->choices[kept++] = answer->choices[i];
        }
    }
    answer->n_choices = kept;
    answer->ended = answer->ended >= row ? SB_NOT_ENDED : answer->ended;
}

void sb_answer_move(sb_answer *answer, int32_t first, int32_t last) {
    int32_t kept = 0;
    for (int32_t i = 0; i < answer->n_choices; i++) {
        sb_choice choice = answer->choices[i];
        if (choice.row < first || choice.row >= last) {
            choice.row -= choice.row >= last ? last - first : 0;
            answer->choices[kept++] = choice;
        }
    }
    answer->n_choices = kept;
    if (last <= answer->first) {
        answer->first -= last - first;
    } else { /* some of its own tokens: they are not asked for again */
        answer->n_tokens = 0;
        answer->first = first;
    }
    if (answer->ended != SB_NOT_ENDED && answer->ended >= first) {
        answer->ended = answer->ended < last ? first : answer->ended - (last - first);
    }
}

void sb_answer_prune(sb_answer *answer, int32_t row) {
    int32_t kept = 0;
    for (int32_t i = 0; i < answer->n_choices; i++) {
        if (answer->choices[i].row >= row) {
            answer->choices[kept++] = answer->choices[i];
        }
    }
    answer->n_choices = kept;
}

void sb_answer_copy(const sb_answer *from, sb_answer *to) {
    sb_answer_begin(to, from->first);
    to->n_choices = 0;
    for (int32_t i = 0; i < from->n_tokens; i++) {
        sb_answer_add(to, from->first + i, from->tokens[i], false);
    }
    to->ended = from->ended;
    for (int32_t i = 0; i < from->n_choices; i++) {
        sb_answer_choose(to, from->choices[i].row, from->choices[i].token);
    }
}

void sb_answer_free(sb_answer *answer) {
    free(answer->tokens);
    free(answer->choices);
    *answer = (sb_answer){0};
}

const int32_t *sb_answer_tokens(const sb_answer *answer, int32_t first, int32_t past) {
    if (first < answer->first || past > answer->first + answer->n_tokens) {
        return NULL;
    }
    const int32_t *tokens = answer->tokens + (first - answer->first);
    for (int32_t i = 0; i < past - first; i++) {
        if (tokens[i] < 0) {
            return NULL;
        }
    }
    return tokens;
}

bool sb_answer_chosen(const sb_answer *answer, int32_t row, int32_t token) {
    for (int32_t i = answer->n_choices - 1; i >= 0; i--) {
        if (answer->choices[i].row == row && answer->choices[i].token == token) {
            return true;
        }
    }
    return false;
}

bool sb_answer_goes_on(const sb_answer *answer, int32_t row, int32_t token) {
    int32_t index = row - answer->first;
    bool stood = index >= 0 && index < answer->n_tokens && answer->tokens[index] == token;
    return stood || sb_answer_chosen(answer, row - 1, token);
}
