#define _GNU_SOURCE
#include "events.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#ifndef MSG_NOSIGNAL
#define MSG_NOSIGNAL 0 /* macOS: an option of the socket says so */
#endif

enum { EXIT_CONFIG = 78, ROOM = 8 }; /* ROOM: for the brackets that close a line */

/* ---- where lines go ---- */

static int connect_to(const char *path) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof address.sun_path) {
        return -1;
    }
    strcpy(address.sun_path, path);
    int sock = socket(AF_UNIX, SOCK_STREAM, 0);
    fcntl(sock, F_SETFD, FD_CLOEXEC);
#ifdef SO_NOSIGPIPE
    setsockopt(sock, SOL_SOCKET, SO_NOSIGPIPE, &(int){1}, sizeof(int));
#endif
    if (sock >= 0 && connect(sock, (struct sockaddr *)&address, sizeof address) != 0) {
        close(sock);
        return -1;
    }
    return sock;
}

static int open_sink(const char *path) {
    struct stat status;
    if (stat(path, &status) == 0 && S_ISSOCK(status.st_mode)) {
        return connect_to(path);
    }
    return open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
}

/* Descriptor of the events of this process (a forked child opens its own), or -1. */
static int sink(void) {
    static int descriptor = -1;
    static pid_t owner;
    const char *path = getenv("STEERBRIDGE_EVENTS");
    if (owner != getpid()) {
        owner = getpid();
        descriptor = path == NULL || path[0] == '\0' ? -1 : open_sink(path);
        if (path != NULL && path[0] != '\0' && descriptor < 0) {
            fprintf(stderr, "steerbridge: cannot write events to %s: %s\n", path, strerror(errno));
        }
    }
    return descriptor;
}

static void write_all(const char *text, size_t length) {
    static pthread_mutex_t one_line = PTHREAD_MUTEX_INITIALIZER;
    pthread_mutex_lock(&one_line);
    int descriptor = sink();
    while (descriptor >= 0 && length > 0) {
        struct stat kind;
        bool socket = fstat(descriptor, &kind) == 0 && S_ISSOCK(kind.st_mode);
        /* A closed reader must not kill the program with SIGPIPE. */
        ssize_t n = socket ? send(descriptor, text, length, MSG_NOSIGNAL)
                           : write(descriptor, text, length);
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n <= 0) {
            break;
        }
        text += n;
        length -= (size_t)n;
    }
    pthread_mutex_unlock(&one_line);
}

/* ---- a line ---- */

static void append(sb_event *event, const char *text, size_t length) {
    if (event->full || event->length + length + ROOM > sizeof event->text) {
        event->full = true;
        return;
    }
    memcpy(event->text + event->length, text, length);
    event->length += length;
}

static void append_quoted(sb_event *event, const char *text) {
    append(event, "\"", 1);
    for (const char *c = text; *c != '\0'; c++) {
        char escaped[8];
        unsigned char byte = (unsigned char)*c;
        if (byte == '"' || byte == '\\') {
            append(event, (char[]){'\\', *c}, 2);
        } else if (byte < 0x20) {
            append(event, escaped, (size_t)snprintf(escaped, sizeof escaped, "\\u%04x", byte));
        } else {
            append(event, c, 1);
        }
    }
    append(event, "\"", 1);
}

/* A field that does not fit is omitted entirely, and so are the fields after it. */
static void finish(sb_event *event, size_t before) {
    event->length = event->full ? before : event->length;
}

/* A comma unless this is the first item of its bracket, then the name. */
static void append_field(sb_event *event, const char *field) {
    if (event->length > 0 && strchr("[{", event->text[event->length - 1]) == NULL) {
        append(event, ", ", 2);
    }
    if (field != NULL) {
        append_quoted(event, field);
        append(event, ": ", 2);
    }
}

void sb_event_begin(sb_event *event, const char *name) {
    event->length = 0;
    event->full = false;
    event->skipped = 0;
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    append(event, "{", 1);
    sb_event_text(event, "event", "%s", name);
    sb_event_number(event, "pid", (double)getpid());
    sb_event_number(event, "time", (double)now.tv_sec + (double)now.tv_nsec * 1e-9);
}

static void append_text(sb_event *event, const char *field, const char *format, va_list values) {
    char text[1024];
    vsnprintf(text, sizeof text, format, values);
    size_t before = event->length;
    append_field(event, field);
    append_quoted(event, text);
    finish(event, before);
}

void sb_event_text(sb_event *event, const char *field, const char *format, ...) {
    va_list values;
    va_start(values, format);
    append_text(event, field, format, values);
    va_end(values);
}

void sb_event_number(sb_event *event, const char *field, double value) {
    char text[40];
    /* JSON has no NaN and no infinity; such a score is written as null. */
    int length = isfinite(value) ? snprintf(text, sizeof text, "%.17g", value)
                                 : snprintf(text, sizeof text, "null");
    size_t before = event->length;
    append_field(event, field);
    append(event, text, (size_t)length);
    finish(event, before);
}

void sb_event_bool(sb_event *event, const char *field, bool value) {
    size_t before = event->length;
    append_field(event, field);
    append(event, value ? "true" : "false", value ? 4 : 5);
    finish(event, before);
}

void sb_event_open(sb_event *event, const char *field, char bracket) {
    size_t before = event->length;
    append_field(event, field);
    append(event, &bracket, 1);
    finish(event, before);
    event->skipped += event->full;
}

void sb_event_close(sb_event *event, char bracket) {
    if (event->skipped > 0) { /* it was not opened */
        event->skipped--;
        return;
    }
    event->text[event->length++] = bracket; /* ROOM was left for it */
}

void sb_event_send(sb_event *event) {
    event->text[event->length++] = '}';
    event->text[event->length++] = '\n';
    write_all(event->text, event->length);
}

/* ---- notes ---- */

static void note(const char *name, const char *format, va_list values) {
    sb_event event;
    va_list again;
    va_copy(again, values);
    fputs("steerbridge: ", stderr);
    vfprintf(stderr, format, again);
    fputc('\n', stderr);
    va_end(again);
    sb_event_begin(&event, name);
    append_text(&event, "reason", format, values);
    sb_event_send(&event);
}

void sb_tell(const char *name, const char *format, ...) {
    va_list values;
    va_start(values, format);
    note(name, format, values);
    va_end(values);
}

void sb_fatal(const char *format, ...) {
    va_list values;
    va_start(values, format);
    note("stopped", format, values);
    va_end(values);
    fflush(stderr);
    _exit(EXIT_CONFIG);
}
