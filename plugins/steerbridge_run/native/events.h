/* Events of the preload: one JSON line per event, to the socket or file of STEERBRIDGE_EVENTS.
 * Internal. */
#ifndef SB_EVENTS_H
#define SB_EVENTS_H

#include <stdbool.h>
#include <stddef.h>

#if defined(__GNUC__)
#define SB_PRINTF(a, b) __attribute__((format(printf, a, b)))
#else
#define SB_PRINTF(a, b)
#endif

/* A line being written: {"event": ..., "pid": ..., "time": ...} and more. A line that is too
 * long is truncated between fields, never within one. */
typedef struct {
    char text[8192];
    size_t length;
    bool full;
    int skipped; /* brackets that did not fit and are still to be closed */
} sb_event;

void sb_event_begin(sb_event *event, const char *name);
SB_PRINTF(3, 4) void sb_event_text(sb_event *event, const char *field, const char *format, ...);
void sb_event_number(sb_event *event, const char *field, double value);
void sb_event_bool(sb_event *event, const char *field, bool value);
/* Opens and closes a list or an object; `field` may be NULL inside a list. */
void sb_event_open(sb_event *event, const char *field, char bracket);
void sb_event_close(sb_event *event, char bracket);
void sb_event_send(sb_event *event);

/* A note on standard error, and an event with the same `reason`. */
SB_PRINTF(2, 3) void sb_tell(const char *name, const char *format, ...);

/* The same as event `stopped`, then the process ends with code 78: no answer is better than an
 * unguarded one. */
SB_PRINTF(1, 2) _Noreturn void sb_fatal(const char *format, ...);

#endif
