#include "settings.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "events.h"
#include "weights.h"

/* Whether one of the items between `;` in a variable is `item`. */
static bool listed(const char *variable, const char *item) {
    const char *list = getenv(variable);
    size_t length = strlen(item);
    while (list != NULL && *list != '\0') {
        size_t end = strcspn(list, ";");
        if (end == length && strncmp(list, item, length) == 0) {
            return true;
        }
        list += end + (list[end] == ';');
    }
    return false;
}

bool sb_may_go_unsteered(const char *shape) {
    return listed("STEERBRIDGE_UNSTEERED", shape);
}

steerhook_package *sb_package(void) {
    static steerhook_package *loaded;
    const char *path = getenv("STEERBRIDGE_PACKAGE");
    char error[512];
    if (loaded == NULL) {
        if (path == NULL || path[0] == '\0') {
            sb_fatal("STEERBRIDGE_PACKAGE: expected the path of a steering package, found none");
        }
        loaded = steerhook_package_load(path, error, sizeof error);
        if (loaded == NULL) {
            sb_fatal("%s: %s", path, error);
        }
    }
    return loaded;
}

const char *sb_package_sha256(void) {
    const char *digest = getenv("STEERBRIDGE_PACKAGE_SHA256");
    return digest == NULL ? "" : digest;
}

/* The name under which a package keeps thresholds for a `general.file_type`, from items such as
 * "3:Q4_1". */
bool sb_calibrate(steerhook_session *session, const sb_facts *model) {
    const char *file_type = model->file_type;
    const char *list = getenv("STEERBRIDGE_FILE_TYPES");
    size_t length = strlen(file_type);
    bool calibrated = false;
    while (list != NULL && *list != '\0') {
        size_t end = strcspn(list, ";");
        if (length > 0 && end > length && end - length < 64 && list[length] == ':' &&
            strncmp(list, file_type, length) == 0) {
            char name[64];
            snprintf(name, sizeof name, "%.*s", (int)(end - length - 1), list + length + 1);
            char weights[SB_SHA256_TEXT];
            bool known = sb_weights_of(model, weights);
            steerhook_calibrate(session, "llama.cpp", name, known ? weights : NULL, &calibrated);
        }
        list += end + (list[end] == ';');
    }
    return calibrated;
}
