/* SHA-256 (FIPS 180-4). Internal. */
#ifndef SB_SHA256_H
#define SB_SHA256_H

#include <stddef.h>
#include <stdint.h>

typedef struct {
    uint32_t state[8];
    uint64_t length; /* bytes so far */
    uint8_t block[64];
} sb_sha256;

enum { SB_SHA256_TEXT = 65 }; /* 64 hexadecimal digits and the end */

void sb_sha256_begin(sb_sha256 *hash);
void sb_sha256_add(sb_sha256 *hash, const void *bytes, size_t size);

/* The digest as hexadecimal digits. */
void sb_sha256_end(sb_sha256 *hash, char text[SB_SHA256_TEXT]);

#endif
