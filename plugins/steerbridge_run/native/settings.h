/* What `steerbridge run` says in the environment. Internal. */
#ifndef SB_SETTINGS_H
#define SB_SETTINGS_H

#include <stdbool.h>

#include "facts.h"
#include "steerhook.h"

/* The package, loaded once; ends the process without one. */
steerhook_package *sb_package(void);

/* The SHA-256 of its file, as hexadecimal digits; "" if it was not said. */
const char *sb_package_sha256(void);

/* Whether a model may go unsteered: a shape "architecture:width:blocks" that --also named. */
bool sb_may_go_unsteered(const char *shape);

/* Takes the thresholds calibrated for a model's quantisation and checkpoint; false if there are
 * none. */
bool sb_calibrate(steerhook_session *session, const sb_facts *model);

#endif
