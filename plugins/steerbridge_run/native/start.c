/* The proof that the preload is there, and its way into programs that are started from here.
 *
 * The constructor answers `run` before `main`. A program that gives its children another
 * environment (`env -i`, a shell's `unset`, a launcher) would start them without us: each function
 * that replaces a process puts our variables back. What gets past this, `run` sees from outside. */
#define _GNU_SOURCE
#include <errno.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "events.h"
#include "real.h"

extern char **environ;

#ifndef __APPLE__

#define EXPORT __attribute__((visibility("default")))
#define OWN "STEERBRIDGE_"
#define PRELOAD "LD_PRELOAD"

enum { MAX_OWN = 64 };

static struct {
    const char *library;       /* our own path in LD_PRELOAD */
    char *variables[MAX_OWN];  /* ours, as they were at the start */
    size_t count;
} ours;

static bool names(const char *variable, const char *name) {
    size_t length = strlen(name);
    return strncmp(variable, name, length) == 0 && variable[length] == '=';
}

static const char *value_of(char *const *variables, const char *name) {
    for (char *const *v = variables; v != NULL && *v != NULL; v++) {
        if (names(*v, name)) {
            return *v + strlen(name) + 1;
        }
    }
    return NULL;
}

__attribute__((constructor)) static void answer(void) {
    const char *preload = getenv(PRELOAD);
    const char *nonce = getenv(OWN "NONCE");
    if (preload == NULL || nonce == NULL) {
        return; /* not started by `run` */
    }
    ours.library = strndup(preload, strcspn(preload, ": "));
    for (char **v = environ; *v != NULL && ours.count < MAX_OWN; v++) {
        if (strncmp(*v, OWN, sizeof OWN - 1) == 0) {
            ours.variables[ours.count++] = strdup(*v);
        }
    }
    sb_event event;
    sb_event_begin(&event, "loaded");
    sb_event_text(&event, "nonce", "%s", nonce);
    sb_event_send(&event);
}

/* ---- an environment with ours in it ---- */

typedef struct {
    char **variables;
    char *preload; /* allocated, as the list is */
} environment;

static bool is_ours(const char *variable) {
    return names(variable, PRELOAD) || strncmp(variable, OWN, sizeof OWN - 1) == 0;
}

static bool complete(char *const *variables) {
    const char *preload = value_of(variables, PRELOAD);
    bool found = preload != NULL && strstr(preload, ours.library) != NULL;
    for (size_t i = 0; i < ours.count && found; i++) {
        size_t length = strcspn(ours.variables[i], "=");
        char name[128];
        found = length < sizeof name;
        if (found) {
            memcpy(name, ours.variables[i], length);
            name[length] = '\0';
            found = value_of(variables, name) != NULL;
        }
    }
    return found;
}

/* Nothing but malloc: a child of vfork runs this. False without memory. */
static bool with_ours(char *const *given, environment *made) {
    *made = (environment){(char **)(char *const *)given, NULL};
    if (ours.library == NULL || complete(given)) {
        return true;
    }
    size_t count = 0;
    while (given != NULL && given[count] != NULL) {
        count++;
    }
    const char *others = value_of(given, PRELOAD);
    bool has = others != NULL && strstr(others, ours.library) != NULL;
    size_t length = sizeof PRELOAD + strlen(ours.library) + (others == NULL ? 0 : strlen(others)) + 2;
    made->variables = calloc(count + ours.count + 2, sizeof *made->variables);
    made->preload = malloc(length);
    if (made->variables == NULL || made->preload == NULL) {
        free(made->variables);
        free(made->preload);
        return false;
    }
    snprintf(made->preload, length, "%s=%s%s%s", PRELOAD, has ? others : ours.library,
             has || others == NULL || others[0] == '\0' ? "" : ":",
             has || others == NULL ? "" : others);
    size_t next = 0;
    for (size_t i = 0; i < count; i++) {
        if (!is_ours(given[i])) {
            made->variables[next++] = given[i];
        }
    }
    made->variables[next++] = made->preload;
    for (size_t i = 0; i < ours.count; i++) {
        made->variables[next++] = ours.variables[i];
    }
    return true;
}

static void drop(environment *made) {
    if (made->preload != NULL) {
        free(made->variables);
        free(made->preload);
    }
}

/* ---- functions that start a program ---- */

#define REAL(name)                                            \
    static __typeof__(&name) real;                            \
    if (real == NULL) {                                       \
        void *function = sb_real_dlsym(RTLD_NEXT_HANDLE, #name); \
        memcpy(&real, &function, sizeof real);                \
    }
#define RTLD_NEXT_HANDLE ((void *)-1L)

/* Calls `call` with `made.variables`; what an exec returns is its failure. */
#define WITH(given, result, call)    \
    environment made;                \
    if (!with_ours(given, &made)) {  \
        errno = ENOMEM;              \
        return -1;                   \
    }                                \
    int result = call;               \
    drop(&made);                     \
    return result

EXPORT int execve(const char *path, char *const *arguments, char *const *variables) {
    REAL(execve)
    WITH(variables, result, real(path, arguments, made.variables));
}

EXPORT int execvpe(const char *file, char *const *arguments, char *const *variables) {
    REAL(execvpe)
    WITH(variables, result, real(file, arguments, made.variables));
}

EXPORT int fexecve(int descriptor, char *const *arguments, char *const *variables) {
    REAL(fexecve)
    WITH(variables, result, real(descriptor, arguments, made.variables));
}

EXPORT int execv(const char *path, char *const *arguments) {
    return execve(path, arguments, environ);
}

EXPORT int execvp(const char *file, char *const *arguments) {
    return execvpe(file, arguments, environ);
}

/* The arguments of a call of execl and its kin, as a list; NULL without memory. */
static char **listed(const char *first, va_list *rest) {
    size_t count = 0, room = 16;
    char **arguments = malloc(room * sizeof *arguments);
    const char *argument = first;
    while (arguments != NULL) {
        if (count == room) {
            room *= 2;
            char **larger = realloc(arguments, room * sizeof *arguments);
            if (larger == NULL) {
                free(arguments);
            }
            arguments = larger;
            continue;
        }
        arguments[count++] = (char *)(uintptr_t)argument;
        if (argument == NULL) {
            break;
        }
        argument = va_arg(*rest, const char *);
    }
    return arguments;
}

#define EXECL(call)                                \
    va_list rest;                                  \
    va_start(rest, first);                         \
    char **arguments = listed(first, &rest);       \
    int result = arguments == NULL ? -1 : call;    \
    va_end(rest);                                  \
    free(arguments);                               \
    return result

EXPORT int execl(const char *path, const char *first, ...) {
    EXECL(execve(path, arguments, environ));
}

EXPORT int execlp(const char *file, const char *first, ...) {
    EXECL(execvpe(file, arguments, environ));
}

EXPORT int execle(const char *path, const char *first, ...) {
    EXECL(execve(path, arguments, va_arg(rest, char *const *)));
}

EXPORT int posix_spawn(pid_t *pid, const char *path, const posix_spawn_file_actions_t *actions,
                       const posix_spawnattr_t *attributes, char *const *arguments,
                       char *const *variables) {
    REAL(posix_spawn)
    WITH(variables, result, real(pid, path, actions, attributes, arguments, made.variables));
}

EXPORT int posix_spawnp(pid_t *pid, const char *file, const posix_spawn_file_actions_t *actions,
                        const posix_spawnattr_t *attributes, char *const *arguments,
                        char *const *variables) {
    REAL(posix_spawnp)
    WITH(variables, result, real(pid, file, actions, attributes, arguments, made.variables));
}

#endif
