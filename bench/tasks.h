/* tasks.h - the two tasks that LIFT is measured on, Sudoku 4x4 and Countdown with three
   numbers: one vocabulary, generators that are pure functions of (seed, index), splits
   that training cannot reach across, token formats, and exact scorers of answer texts.
   Include after dlm.h.  Nothing here allocates, prints or keeps state. */
#ifndef TASKS_H
#define TASKS_H

#include <ctype.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* --[ vocabulary ]------------------------------------------------------------
   Numbers come last, so that a model gets as many as it needs: a vocabulary of
   TASK_NUMBER + largest + 1.  The mask is not the last token: config.mask_id says so. */

enum {
    TASK_STOP = 0, TASK_MASK,
    TASK_BREAK,                            /* ends a prompt; trace from grid       */
    TASK_CANVAS, TASK_DIRECT, TASK_TRACE,  /* first token: which format            */
    TASK_COUNTDOWN,
    TASK_PLUS, TASK_MINUS, TASK_TIMES, TASK_DIVIDE,
    TASK_EQUALS, TASK_THEN, TASK_END,      /* "=", ";" and "."                     */
    TASK_CELL,                             /* 16 of them: the place of a digit     */
    TASK_NUMBER = TASK_CELL + 16,          /* n is TASK_NUMBER + n                 */
    TASK_SUDOKU_VOCAB = TASK_NUMBER + 5,
    TASK_LENGTH = 64                       /* no example is longer                 */
};

typedef enum task_part {                   /* what a problem may be used for       */
    TASK_TRAIN = 0, TASK_VALIDATION, TASK_TEST
} task_part;

enum {                                     /* streams of random numbers            */
    TASK_RANDOM_SPLIT = DLM_RANDOM_USER, TASK_RANDOM_PUZZLE, TASK_RANDOM_PROBLEM,
    TASK_RANDOM_USER = DLM_RANDOM_USER + 16
};

/* The splits never change, whatever seed draws the problems. */
static const uint64_t task_split_seed = 20260522;

typedef struct task_example {              /* dlm_example, with room of its own    */
    int tokens[TASK_LENGTH];
    int length, prompt;
} task_example;

static inline void task_push(task_example *ex, int token)
{
    DLM_ASSERT(ex->length < TASK_LENGTH);
    ex->tokens[ex->length++] = token;
}

static inline int task_below(const dlm_address *at, uint32_t index, int n)
{
    return (int)(n * dlm_uniform(at, index));
}

/* A random order of items[0 .. n); numbers first .. first + n of the address. */
static inline void task_shuffle(int *items, int n, const dlm_address *at, uint32_t first)
{
    for (int i = n - 1; i > 0; i--) {
        const int j = task_below(at, first + (uint32_t)i, i + 1), item = items[i];
        items[i] = items[j];
        items[j] = item;
    }
}

/* --[ sudoku: rules ]---------------------------------------------------------
   A grid is 16 digits, row by row, 0 for a blank.  Rows, columns and the four 2x2
   boxes hold 1..4 once each. */

typedef struct task_puzzle {
    unsigned char given[16];               /* 0: blank                             */
    unsigned char solution[16];            /* the only one                         */
} task_puzzle;

/* Do two different cells share a row, a column or a box? */
static inline int task_peers(int i, int j)
{
    const int same_box = i / 8 == j / 8 && i % 4 / 2 == j % 4 / 2;
    return i != j && (i / 4 == j / 4 || i % 4 == j % 4 || same_box);
}

/* Bit d is set where digit d (1..4) is in no peer of the cell. */
static inline int task_candidates(const unsigned char grid[16], int cell)
{
    int seen = 1;
    for (int j = 0; j < 16; j++)
        if (task_peers(cell, j)) seen |= 1 << grid[j];
    return ~seen & 0x1e;
}

static inline int task_count_bits(int mask)
{
    int n = 0;
    for (; mask != 0; mask &= mask - 1) n++;
    return n;
}

static inline int task_valid_grid(const unsigned char grid[16])
{
    for (int i = 0; i < 16; i++)
        if (grid[i] < 1 || grid[i] > 4 || !(task_candidates(grid, i) >> grid[i] & 1))
            return 0;
    return 1;
}

/* Appends the completions of grid to found[n ..], in lexicographic order, until there
   are limit of them; returns how many there are then.  grid comes back unchanged. */
static inline int task_complete(unsigned char grid[16], unsigned char (*found)[16], int n,
                                int limit)
{
    int cell = 0, candidates;
    while (cell < 16 && grid[cell] != 0) cell++;
    if (cell == 16) {
        memcpy(found[n], grid, 16);
        return n + 1;
    }
    candidates = task_candidates(grid, cell);
    for (int d = 1; d <= 4 && n < limit; d++)
        if (candidates >> d & 1) {
            grid[cell] = (unsigned char)d;
            n = task_complete(grid, found, n, limit);
        }
    grid[cell] = 0;
    return n;
}

/* Fills in a solution, if there is one; returns how many there are, 2 for any more. */
static inline int task_solve(task_puzzle *p)
{
    unsigned char grid[16], found[2][16];
    int n;
    memcpy(grid, p->given, 16);
    for (int i = 0; i < 16; i++)           /* givens that contradict each other    */
        if (grid[i] != 0 && !(task_candidates(grid, i) >> grid[i] & 1)) return 0;
    n = task_complete(grid, found, 0, 2);
    if (n > 0) memcpy(p->solution, found[0], 16);
    return n;
}

/* --[ sudoku: split and generator ]-------------------------------------------
   All 288 grids, split by grid: 58 for the test, 29 for validation, 201 to train on.
   Renaming digits or swapping rows turns any grid into many others, so augmenting
   with such symmetries would carry training across the split: do not. */

enum { TASK_GRIDS = 288, TASK_TEST_GRIDS = 58, TASK_VALIDATION_GRIDS = 29 };

typedef struct task_grids {                /* in random order: test, validation, train */
    unsigned char cell[TASK_GRIDS][16];
} task_grids;

static inline void task_grids_init(task_grids *g)
{
    static const unsigned char nothing[16] = {0};
    unsigned char grid[16], all[TASK_GRIDS][16];
    memcpy(grid, nothing, 16);
    task_complete(grid, all, 0, TASK_GRIDS);
    for (size_t i = 0; i < TASK_GRIDS; i++)
        memcpy(g->cell[i], all[dlm_shuffled(task_split_seed, 0, TASK_GRIDS, i)], 16);
}

static inline void task_grids_range(task_part part, int *first, int *end)
{
    const int validation = TASK_TEST_GRIDS, train = validation + TASK_VALIDATION_GRIDS;
    *first = part == TASK_TEST ? 0 : part == TASK_VALIDATION ? validation : train;
    *end = part == TASK_TEST ? validation : part == TASK_VALIDATION ? train : TASK_GRIDS;
}

static inline task_part task_grid_part(const task_grids *g,
                                       const unsigned char solution[16])
{
    int i = 0;
    while (i < TASK_GRIDS && memcmp(g->cell[i], solution, 16) != 0) i++;
    return i < TASK_TEST_GRIDS ? TASK_TEST
         : i < TASK_TEST_GRIDS + TASK_VALIDATION_GRIDS ? TASK_VALIDATION : TASK_TRAIN;
}

/* Puzzle number index: a random grid of the part with so many random blanks (0..12),
   drawn again until its solution is unique.  No puzzle with 13 blanks is. */
static inline void task_sudoku_puzzle(task_puzzle *p, const task_grids *g, task_part part,
                                      int blanks, uint64_t seed, uint32_t index)
{
    dlm_address at = {0};
    int first, end, cells[16];
    at.seed = seed, at.purpose = TASK_RANDOM_PUZZLE, at.row = index;
    at.position = (uint32_t)part;
    task_grids_range(part, &first, &end);
    DLM_ASSERT(blanks >= 0 && blanks <= 12);
    do {
        memcpy(p->given, g->cell[first + task_below(&at, 0, end - first)], 16);
        for (int i = 0; i < 16; i++) cells[i] = i;
        task_shuffle(cells, 16, &at, 1);
        for (int i = 0; i < blanks; i++) p->given[cells[i]] = 0;
        at.step++;
    } while (task_solve(p) != 1);
}

static inline int task_blanks(const task_puzzle *p)
{
    int n = 0;
    for (int i = 0; i < 16; i++) n += p->given[i] == 0;
    return n;
}

/* --[ sudoku: formats ]-------------------------------------------------------
     canvas  [format, 16 digits], any of them masked: 17 tokens, the prompt is one
   and two with the puzzle as prompt, [format, 16 digits with 0 for a blank, break]:
     direct  the 16 digits of the solution: 34 tokens
     trace   for each blank its cell and its digit; break; the 16 digits; stop
   The trace fills in the cell with the fewest candidates first, counted with what was
   filled in before (of equal ones the lower cell): every digit follows from its left. */

static inline void task_push_grid(task_example *ex, const unsigned char grid[16])
{
    for (int i = 0; i < 16; i++) task_push(ex, TASK_NUMBER + grid[i]);
}

static inline void task_push_trace(task_example *ex, const task_puzzle *p)
{
    unsigned char grid[16];
    memcpy(grid, p->given, 16);
    for (int left = task_blanks(p); left > 0; left--) {
        int best = -1, fewest = 5;
        for (int i = 0; i < 16; i++) {
            const int n = task_count_bits(task_candidates(grid, i));
            if (grid[i] == 0 && n < fewest) best = i, fewest = n;
        }
        grid[best] = p->solution[best];
        task_push(ex, TASK_CELL + best);
        task_push(ex, TASK_NUMBER + grid[best]);
    }
}

/* format: TASK_CANVAS, TASK_DIRECT or TASK_TRACE.  length - prompt tokens are the
   response; to ask, overwrite them with TASK_MASK (of a canvas: the blanks). */
static inline void task_sudoku_example(task_example *ex, const task_puzzle *p, int format)
{
    ex->length = 0;
    task_push(ex, format);
    if (format != TASK_CANVAS) {
        task_push_grid(ex, p->given);
        task_push(ex, TASK_BREAK);
    }
    ex->prompt = ex->length;
    if (format == TASK_TRACE) {
        task_push_trace(ex, p);
        task_push(ex, TASK_BREAK);
    }
    task_push_grid(ex, p->solution);
    if (format == TASK_TRACE) task_push(ex, TASK_STOP);
}

/* The answer text of a response of n tokens, for the parser below: what stands after
   the break (trace) or all (others), up to a stop.  '?' is a token that is no digit. */
static inline void task_sudoku_text(char text[TASK_LENGTH + 32], const int *response,
                                    int n, int format)
{
    int i = 0, length;
    if (format == TASK_TRACE) {
        while (i < n && response[i] != TASK_BREAK) i++;
        i++;
    }
    length = sprintf(text, "<answer>");
    for (; i < n && response[i] != TASK_STOP; i++) {
        const int digit = response[i] - TASK_NUMBER;
        text[length++] = (char)(digit >= 0 && digit <= 9 ? '0' + digit : '?');
    }
    sprintf(text + length, "</answer>");
}

/* --[ sudoku: score ]---------------------------------------------------------
   The rules of LIFT's evaluator, from an answer text; and the exact
   score, which that evaluator does not have: a valid grid that keeps all givens. */

typedef struct task_score {                /* sums over puzzles                    */
    long puzzles, blanks, blanks_right, exact;
} task_score;

typedef struct task_span {                 /* a piece of a text                    */
    const char *from, *to;
} task_span;

static inline int task_is_empty(task_span s)
{
    while (s.from < s.to && isspace((unsigned char)*s.from)) s.from++;
    return s.from >= s.to;
}

/* Up to the first of the end marks; *found says whether there is one. */
static inline const char *task_text_end(const char *text, int with_answer, int *found)
{
    static const char *const marks[3] = {"<|eot_id|>", "<|endoftext|>", "</answer>"};
    const char *end = text + strlen(text);
    *found = 0;
    for (int i = 0; i < 2 + with_answer; i++) {
        const char *at = strstr(text, marks[i]);
        if (at != NULL) *found = 1;
        if (at != NULL && at < end) end = at;
    }
    return end;
}

/* The first ``` ... ``` after from with nothing but digits and white space inside. */
static inline task_span task_fence(const char *from)
{
    task_span s = {NULL, NULL};
    for (const char *c = from; (c = strstr(c, "```")) != NULL; c++) {
        const char *end = c + 3;
        while (isdigit((unsigned char)*end) || isspace((unsigned char)*end)) end++;
        if (end == c + 3 || strncmp(end, "```", 3) != 0) continue;
        s.from = c + 3, s.to = end;
        break;
    }
    return s;
}

/* 16 digits right before the mark, white space between allowed. */
static inline task_span task_digits_before(const char *text, const char *mark)
{
    task_span s = {NULL, NULL};
    int n = 0;
    while (mark > text && isspace((unsigned char)mark[-1])) mark--;
    while (n < 16 && mark - n > text && isdigit((unsigned char)mark[-n - 1])) n++;
    if (n == 16) s.from = mark - 16, s.to = mark;
    return s;
}

static inline int task_in_word(char c)
{
    return isalnum((unsigned char)c) || c == '_';
}

/* The first word that is 16 digits. */
static inline task_span task_digit_word(const char *text)
{
    task_span s = {NULL, NULL};
    for (const char *c = text; *c != 0; c++) {
        const char *from = c;
        int word = 1;
        if (!task_in_word(*c)) continue;
        for (; task_in_word(*c); c++) word = word && isdigit((unsigned char)*c);
        if (word && c - from == 16) {
            s.from = from, s.to = c;
            return s;
        }
        c--;
    }
    return s;
}

/* The piece of text that counts as the answer: the first rule that finds something. */
static inline task_span task_answer_span(const char *text)
{
    const char *open = strstr(text, "<answer>"), *close = strstr(text, "</answer>");
    task_span s = {NULL, NULL};
    int found;
    if (open != NULL) s = task_fence(open + 8);
    if (task_is_empty(s) && open != NULL) {
        s.from = open + 8;
        s.to = task_text_end(s.from, 1, &found);
        if (!found) s.to = s.from;
    }
    if (task_is_empty(s) && close != NULL) {
        s.from = close + 9;
        s.to = task_text_end(s.from, 0, &found);
    }
    if (task_is_empty(s) && close != NULL) s = task_digits_before(text, close);
    return task_is_empty(s) ? task_digit_word(text) : s;
}

/* The 16 characters that are scored: white space removed, padded with 0 or cut. */
static inline void task_sudoku_parse(char answer[17], const char *text)
{
    const task_span s = task_answer_span(text);
    int n = 0;
    for (const char *c = s.from; c < s.to && n < 16; c++)
        if (!isspace((unsigned char)*c)) answer[n++] = *c;
    while (n < 16) answer[n++] = '0';
    answer[16] = 0;
}

/* Adds a puzzle to the sums; 1 if it is solved exactly. */
static inline int task_sudoku_score(task_score *sum, const task_puzzle *p,
                                    const char *text)
{
    unsigned char grid[16];
    char answer[17];
    int exact;
    task_sudoku_parse(answer, text);
    sum->puzzles++;
    for (int i = 0; i < 16; i++) {
        const int digit = answer[i] >= '0' && answer[i] <= '4' ? answer[i] - '0' : 0;
        grid[i] = (unsigned char)digit;
        if (p->given[i] != 0) continue;
        sum->blanks++;
        sum->blanks_right += digit == p->solution[i];
    }
    exact = task_valid_grid(grid);
    for (int i = 0; i < 16; i++)
        if (p->given[i] != 0 && p->given[i] != grid[i]) exact = 0;
    sum->exact += exact;
    return exact;
}

/* --[ countdown: problems ]---------------------------------------------------
   Make the target from three numbers, each used once, with + - * and /. */

typedef struct task_variant {
    int largest;                           /* numbers are 1 .. largest             */
    int largest_target;                    /* targets are 1 .. this                */
    int largest_step;                      /* what a first step gives: 0 .. this   */
} task_variant;

static const task_variant task_countdown_small = {20, 99, 99};
static const task_variant task_countdown_large = {100, 100, 200};

static inline int task_countdown_vocab(task_variant v)
{
    const int largest = v.largest_step > v.largest_target ? v.largest_step
                                                          : v.largest_target;
    return TASK_NUMBER + (largest > v.largest ? largest : v.largest) + 1;
}

typedef struct task_problem {
    int numbers[3], target;
} task_problem;

typedef struct task_steps {                /* x op y = u; p op q = target          */
    int x, op, y, u, p, op2, q;            /* p or q is u; ops 0..3 are + - * /    */
} task_steps;

/* a op b, or -1 where that is no whole number of at least 0. */
static inline int task_apply(int a, int op, int b)
{
    switch (op) {
    case 0: return a + b;
    case 1: return a >= b ? a - b : -1;
    case 2: return a * b;
    default: return b != 0 && a % b == 0 ? a / b : -1;
    }
}

static inline void task_sort3(int a[3])    /* descending                           */
{
    for (int i = 0; i < 3; i++)
        for (int j = i + 1; j < 3; j++)
            if (a[j] > a[i]) {
                const int t = a[i];
                a[i] = a[j];
                a[j] = t;
            }
}

/* Candidate number `which` of TASK_CANDIDATES ways to combine three descending numbers
   in two steps: the easiest first, those with + and - alone, u before the number that
   is left, the largest numbers first.  Returns what it gives, -1 for nothing. */
enum { TASK_CANDIDATES = 3 * 4 * 4 * 2 };
static inline int task_candidate(task_steps *s, const int sorted[3], int which,
                                 int largest_step)
{
    static const signed char pair[3][3] = {{0, 1, 2}, {0, 2, 1}, {1, 2, 0}};
    static const signed char ops[16][2] = {{0, 0}, {0, 1}, {1, 0}, {1, 1}, {0, 2}, {1, 2},
        {2, 0}, {2, 1}, {0, 3}, {1, 3}, {3, 0}, {3, 1}, {2, 2}, {2, 3}, {3, 2}, {3, 3}};
    const signed char *const use = pair[which % 3];
    const int reversed = which / 3 / 16;
    s->op = ops[which / 3 % 16][0], s->op2 = ops[which / 3 % 16][1];
    s->x = sorted[use[0]], s->y = sorted[use[1]];
    s->u = task_apply(s->x, s->op, s->y);
    if (s->u < 0 || s->u > largest_step) return -1;
    s->p = reversed ? sorted[use[2]] : s->u;
    s->q = reversed ? s->u : sorted[use[2]];
    return task_apply(s->p, s->op2, s->q);
}

/* The first candidate that gives the target; 0 if none does. */
static inline int task_countdown_solve(task_steps *s, const task_problem *p,
                                       task_variant v)
{
    int sorted[3];
    memcpy(sorted, p->numbers, sizeof sorted);
    task_sort3(sorted);
    for (int which = 0; which < TASK_CANDIDATES; which++)
        if (task_candidate(s, sorted, which, v.largest_step) == p->target) return 1;
    return 0;
}

/* Split by unordered triple: 10 % test, 5 % validation. */
static inline task_part task_triple_part(const int numbers[3])
{
    dlm_address at = {0};
    int sorted[3];
    double u;
    memcpy(sorted, numbers, sizeof sorted);
    task_sort3(sorted);
    at.seed = task_split_seed, at.purpose = TASK_RANDOM_SPLIT;
    at.step = (uint32_t)sorted[0];
    at.row = (uint32_t)sorted[1], at.position = (uint32_t)sorted[2];
    u = dlm_uniform(&at, 0);
    return u < 0.10 ? TASK_TEST : u < 0.15 ? TASK_VALIDATION : TASK_TRAIN;
}

/* Problem number index: a random triple of the part and a random way to combine it, drawn
   again until that gives a target in range. */
static inline void task_countdown_problem(task_problem *p, task_variant v, task_part part,
                                          uint64_t seed, uint32_t index)
{
    dlm_address at = {0};
    task_steps s;
    int sorted[3];
    at.seed = seed, at.purpose = TASK_RANDOM_PROBLEM, at.row = index;
    at.position = (uint32_t)part;
    do {
        for (int i = 0; i < 3; i++)
            p->numbers[i] = 1 + task_below(&at, (uint32_t)i, v.largest);
        memcpy(sorted, p->numbers, sizeof sorted);
        task_sort3(sorted);
        p->target = task_candidate(&s, sorted, task_below(&at, 3, TASK_CANDIDATES),
                                   v.largest_step);
        at.step++;
    } while (p->target < 1 || p->target > v.largest_target
             || task_triple_part(p->numbers) != part);
}

/* --[ countdown: format ]-----------------------------------------------------
   Prompt [format, three numbers, equals, target, break], response
   [x op y = u ; p op q = target .], the first candidate's.  Every number is a token. */

enum { TASK_COUNTDOWN_PROMPT = 7, TASK_COUNTDOWN_LENGTH = 19 };

/* 0 if two steps do not reach the target; the response is then left masked. */
static inline int task_countdown_example(task_example *ex, const task_problem *p,
                                         task_variant v)
{
    task_steps s = {0};
    const int solved = task_countdown_solve(&s, p, v);
    ex->length = 0;
    task_push(ex, TASK_COUNTDOWN);
    for (int i = 0; i < 3; i++) task_push(ex, TASK_NUMBER + p->numbers[i]);
    task_push(ex, TASK_EQUALS);
    task_push(ex, TASK_NUMBER + p->target);
    task_push(ex, TASK_BREAK);
    ex->prompt = ex->length;
    if (solved) {
        const int response[12] = {TASK_NUMBER + s.x, TASK_PLUS + s.op, TASK_NUMBER + s.y,
            TASK_EQUALS, TASK_NUMBER + s.u, TASK_THEN, TASK_NUMBER + s.p,
            TASK_PLUS + s.op2, TASK_NUMBER + s.q, TASK_EQUALS, TASK_NUMBER + p->target,
            TASK_END};
        for (int i = 0; i < 12; i++) task_push(ex, response[i]);
    }
    while (ex->length < TASK_COUNTDOWN_LENGTH) task_push(ex, TASK_MASK);
    return solved;
}

/* A response of 12 tokens as one expression, "\boxed{(30 - 7) + 2}": u names the first
   step wherever it stands in the second.  0, and a text that is no expression, if the
   tokens are not of this form. */
static inline int task_countdown_text(char text[96], const int response[12])
{
    static const char form[13] = "non=n;non=n.", op[5] = "+-*/";
    static const int fixed[3] = {TASK_EQUALS, TASK_THEN, TASK_END};
    int good = 1, n[12];
    char first[40];
    for (int i = 0; i < 12; i++) {
        const int token = response[i];
        n[i] = token - (form[i] == 'o' ? TASK_PLUS : TASK_NUMBER);
        if (form[i] == 'n') good = good && n[i] >= 0;
        else if (form[i] == 'o') good = good && n[i] >= 0 && n[i] < 4;
        else good = good && token == fixed[strchr("=;.", form[i]) - "=;."];
    }
    good = good && (n[6] == n[4] || n[8] == n[4]);
    if (!good) {
        strcpy(text, "\\boxed{?}");
        return 0;
    }
    snprintf(first, sizeof first, "(%d %c %d)", n[0], op[n[1]], n[2]);
    if (n[6] == n[4])
        snprintf(text, 96, "\\boxed{%s %c %d}", first, op[n[7]], n[8]);
    else snprintf(text, 96, "\\boxed{%d %c %s}", n[6], op[n[7]], first);
    return 1;
}

/* --[ countdown: score ]------------------------------------------------------
   The rules of LIFT's evaluator, on any answer text. */

typedef struct task_parser {               /* expr = term {+- term}, ...           */
    const char *at;
    int bad, depth;
} task_parser;

static inline double task_expression(task_parser *p);

static inline char task_peek(task_parser *p)
{
    while (*p->at == ' ') p->at++;
    return *p->at;
}

/* A number, a signed factor, or an expression in parentheses. */
static inline double task_factor(task_parser *p)
{
    const char c = task_peek(p);
    double value = 0.0;
    if (p->depth++ > 100) p->bad = 1;
    if (p->bad) return 0.0;
    if (isdigit((unsigned char)c) || c == '.') {
        char *end;
        value = strtod(p->at, &end);
        if (end == p->at) p->bad = 1;
        p->at = end;
    } else if (c == '+' || c == '-') {
        p->at++;
        value = c == '-' ? -task_factor(p) : task_factor(p);
    } else if (c == '(') {
        p->at++;
        value = task_expression(p);
        if (task_peek(p) == ')') p->at++;
        else p->bad = 1;
    } else p->bad = 1;
    p->depth--;
    return value;
}

static inline double task_term(task_parser *p)
{
    double value = task_factor(p);
    for (char c = task_peek(p); !p->bad && (c == '*' || c == '/'); c = task_peek(p)) {
        double right;
        p->at++;
        right = task_factor(p);            /* "**" and "//" are refused here       */
        if (c == '*') value *= right;
        else if (right != 0.0) value /= right;
        else p->bad = 1;
    }
    return value;
}

static inline double task_expression(task_parser *p)
{
    double value = task_term(p);
    for (char c = task_peek(p); !p->bad && (c == '+' || c == '-'); c = task_peek(p)) {
        p->at++;
        value += c == '+' ? task_term(p) : -task_term(p);
    }
    return value;
}

/* 1 and the value of an arithmetic expression (true division), or 0. */
static inline int task_evaluate(const char *text, double *value)
{
    task_parser p = {0};
    p.at = text;
    *value = task_expression(&p);
    return !p.bad && task_peek(&p) == 0;
}

/* The text in <answer>, closed or not; without one all of it. */
static inline task_span task_answer_or_all(const char *text)
{
    const char *open = strstr(text, "<answer>");
    task_span s;
    int found;
    s.from = text, s.to = text + strlen(text);
    if (open == NULL) return s;
    s.from = open + 8;
    s.to = task_text_end(s.from, 1, &found);
    return s;
}

/* The content of the last \boxed{...}, braces matched.  Without any: all of the text. */
static inline task_span task_boxed(const char *text)
{
    task_span s = {NULL, NULL};
    int depth = 1;
    for (const char *c = text; (c = strstr(c, "\\boxed{")) != NULL;) s.from = c += 7;
    if (s.from == NULL) {
        s.from = text, s.to = text + strlen(text);
        return s;
    }
    for (s.to = s.from; *s.to != 0; s.to++) {
        depth += (*s.to == '{') - (*s.to == '}');
        if (depth == 0) return s;
    }
    return task_answer_or_all(text);       /* it never closes                      */
}

static inline int task_is_expression(char c)
{
    return c != 0 && (isdigit((unsigned char)c) || strchr("+-*/(). ", c) != NULL);
}

/* Of "expression = number" the left side stays, in place. */
static inline void task_left_side(char *text)
{
    for (char *equals = text; (equals = strchr(equals, '=')) != NULL; equals++) {
        const char *right = equals + 1;
        char *left = equals;
        int digits = 0;
        while (left > text && task_is_expression(left[-1])) left--;
        for (const char *c = left; c < equals; c++)
            digits += isdigit((unsigned char)*c) != 0;
        while (*right == ' ') right++;
        if (*right == '-' || *right == '+') right++;
        if (digits == 0 || !isdigit((unsigned char)*right)) continue;
        *equals = 0;
        memmove(text, left, (size_t)(equals - left) + 1);
        return;
    }
}

/* The expression that is scored: spaces for white space, / and * for their names. */
static inline void task_countdown_parse(char *out, size_t size, const char *text)
{
    static const char *const names[3] = {"\\div", "\\times", "\\cdot"};
    static const char signs[4] = "/**";
    const task_span s = task_boxed(text);
    size_t n = 0;
    for (const char *c = s.from; c < s.to && n + 1 < size;) {
        int k = 0;
        while (k < 3 && strncmp(c, names[k], strlen(names[k])) != 0) k++;
        out[n++] = k < 3 ? signs[k] : isspace((unsigned char)*c) ? ' ' : *c;
        c += k < 3 ? strlen(names[k]) : 1;
    }
    out[n] = 0;
    task_left_side(out);
}

/* Are the whole numbers in the text these, each once?  A decimal point parts them. */
static inline int task_uses(const char *text, const int *numbers, int n)
{
    int used[16] = {0}, found = 0;
    DLM_ASSERT(n <= 16);
    for (const char *c = text; *c != 0;) {
        char *end;
        long value;
        int i = 0;
        if (!isdigit((unsigned char)*c)) {
            c++;
            continue;
        }
        value = strtol(c, &end, 10);
        while (i < n && (used[i] || numbers[i] != value)) i++;
        if (i == n) return 0;
        used[i] = 1;
        found++;
        c = end;
    }
    return found == n;
}

/* 1 if the answer text makes the target from the numbers. */
static inline int task_countdown_score(const char *text, const int *numbers, int n,
                                       double target)
{
    char expression[1024];
    double value;
    task_countdown_parse(expression, sizeof expression, text);
    if (!task_uses(expression, numbers, n)) return 0;
    for (const char *c = expression; *c != 0; c++)
        if (!task_is_expression(*c)) return 0;
    return task_evaluate(expression, &value) && fabs(value - target) < 1e-5;
}

/* How often guessing is right: over all orders of the numbers, both ways to set the
   parentheses and all signs, + and - alone where n_ops is 2, all four where it is 4. */
static inline double task_countdown_floor(const task_problem *p, int n_ops)
{
    static const signed char order[6][3] = {{0, 1, 2}, {0, 2, 1}, {1, 0, 2}, {1, 2, 0},
                                            {2, 0, 1}, {2, 1, 0}};
    static const char op[5] = "+-*/";
    int right = 0;
    for (int i = 0; i < 6 * n_ops * n_ops * 2; i++) {
        const int *const n = p->numbers, k = i % 6;
        const int a = n[order[k][0]], b = n[order[k][1]], c = n[order[k][2]];
        const char o1 = op[i / 6 % n_ops], o2 = op[i / 6 / n_ops % n_ops];
        char text[96];
        double value;
        snprintf(text, sizeof text, i / 6 / n_ops / n_ops ? "%d %c (%d %c %d)"
                                                          : "(%d %c %d) %c %d",
                 a, o1, b, o2, c);
        right += task_evaluate(text, &value) && fabs(value - p->target) < 1e-5;
    }
    return (double)right / (6.0 * n_ops * n_ops * 2);
}

#endif /* TASKS_H */
