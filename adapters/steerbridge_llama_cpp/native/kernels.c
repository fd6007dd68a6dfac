#include "kernels.h"

#include <string.h>

/* The loops below are plain C that compilers vectorise; where the loader can choose among
 * versions of a function (x86-64 ELF with glibc's ifunc), wider ones are compiled as well.
 * Sanitizers cannot run before the resolvers do, so they get the portable version. */
#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(undefined_behavior_sanitizer) || \
    __has_feature(thread_sanitizer) || __has_feature(memory_sanitizer)
#define SANITIZED 1
#endif
#endif
#if defined(__x86_64__) && defined(__ELF__) && defined(__GLIBC__) && defined(__has_attribute) && \
    !defined(SANITIZED) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__) &&     \
    !defined(STEERHOOK_PORTABLE)
#if __has_attribute(target_clones)
#define MULTIVERSION __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#endif
#ifndef MULTIVERSION
#define MULTIVERSION
#endif

/* Independent sums: enough for four 256-bit adders, and shorter chains of rounding. */
enum { LANES = 32 };

static inline float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float load_f32(const float *w, int64_t i) { return w[i]; }

static inline float load_bf16(const uint16_t *w, int64_t i) {
    return from_bits((uint32_t)w[i] << 16);
}

/* Finite halves only. Exponent and mantissa, moved to their places in a float, make a value that
 * is 2^-112 of the half's, for normal and subnormal halves alike; no branch, so it vectorises. */
static inline float load_f16(const uint16_t *w, int64_t i) {
    uint32_t half = w[i];
    float magnitude = from_bits((half & 0x7FFFU) << 13) * 0x1p112F;
    uint32_t bits;
    memcpy(&bits, &magnitude, sizeof bits);
    return from_bits(bits | (half & 0x8000U) << 16);
}

static inline float sum_lanes(const float *lanes) {
    float part[LANES];
    memcpy(part, lanes, sizeof part);
    for (int width = LANES / 2; width > 0; width /= 2) {
        for (int i = 0; i < width; i++) {
            part[i] += part[i + width];
        }
    }
    return part[0];
}

#define DEFINE_KERNELS(suffix, type)                                                        \
    MULTIVERSION                                                                            \
    static float dot_##suffix(const type *restrict w, const float *restrict x, int64_t n) { \
        float lanes[LANES] = {0};                                                           \
        int64_t i = 0;                                                                      \
        for (; i + LANES <= n; i += LANES) {                                                \
            for (int l = 0; l < LANES; l++) {                                               \
                lanes[l] += load_##suffix(w, i + l) * x[i + l];                             \
            }                                                                               \
        }                                                                                   \
        for (int l = 0; i < n; i++, l++) {                                                  \
            lanes[l] += load_##suffix(w, i) * x[i];                                         \
        }                                                                                   \
        return sum_lanes(lanes);                                                            \
    }                                                                                       \
    MULTIVERSION                                                                            \
    static void axpy_##suffix(const type *restrict w, float a, float *restrict y,           \
                              int64_t n) {                                                  \
        for (int64_t i = 0; i < n; i++) {                                                   \
            y[i] += a * load_##suffix(w, i);                                                \
        }                                                                                   \
    }

/* Rows side by side, their sums in registers; in blocks of inputs, for shorter chains of rounding. */
enum { INPUT_BLOCK = 32 };

#define DEFINE_PANEL(count)                                                                      \
    MULTIVERSION                                                                                 \
    static void panel_##count(const float *restrict w, int64_t inputs, const float *restrict x,  \
                              float *restrict y, int64_t stride) {                               \
        for (int64_t from = 0; from < inputs; from += INPUT_BLOCK) {                             \
            int64_t to = from + INPUT_BLOCK < inputs ? from + INPUT_BLOCK : inputs;              \
            float sums[count][SH_PANEL] = {{0}};                                                 \
            for (int64_t i = from; i < to; i++, w += SH_PANEL) {                                 \
                for (int r = 0; r < (count); r++) {                                              \
                    for (int l = 0; l < SH_PANEL; l++) {                                         \
                        sums[r][l] += w[l] * x[r * inputs + i];                                  \
                    }                                                                            \
                }                                                                                \
            }                                                                                    \
            for (int r = 0; r < (count); r++) {                                                  \
                for (int l = 0; l < SH_PANEL; l++) {                                             \
                    y[r * stride + l] += sums[r][l];                                             \
                }                                                                                \
            }                                                                                    \
        }                                                                                        \
    }

DEFINE_PANEL(1)
DEFINE_PANEL(2)
DEFINE_PANEL(3)
DEFINE_PANEL(4)

void sh_panels(const float *w, int32_t outputs, int32_t inputs, const float *x, int32_t n,
               float *y, int64_t stride) {
    for (int32_t at = 0; at < outputs; at += SH_PANEL, w += (int64_t)inputs * SH_PANEL) {
        switch (n) {
        case 1: panel_1(w, inputs, x, y + at, stride); break;
        case 2: panel_2(w, inputs, x, y + at, stride); break;
        case 3: panel_3(w, inputs, x, y + at, stride); break;
        default: panel_4(w, inputs, x, y + at, stride); break;
        }
    }
}

DEFINE_KERNELS(f32, float)
DEFINE_KERNELS(f16, uint16_t)
DEFINE_KERNELS(bf16, uint16_t)

static const float *row_f32(const sh_tensor *w, int64_t row) {
    return (const float *)w->data + row * w->cols;
}

static const uint16_t *row_16(const sh_tensor *w, int64_t row) {
    return (const uint16_t *)w->data + row * w->cols;
}

float sh_dot(const sh_tensor *w, int64_t row, const float *x) {
    switch (w->dtype) {
    case SH_F32: return dot_f32(row_f32(w, row), x, w->cols);
    case SH_F16: return dot_f16(row_16(w, row), x, w->cols);
    case SH_BF16: break;
    }
    return dot_bf16(row_16(w, row), x, w->cols);
}

void sh_axpy(const sh_tensor *w, int64_t row, float a, float *y) {
    switch (w->dtype) {
    case SH_F32: axpy_f32(row_f32(w, row), a, y, w->cols); return;
    case SH_F16: axpy_f16(row_16(w, row), a, y, w->cols); return;
    case SH_BF16: axpy_bf16(row_16(w, row), a, y, w->cols); return;
    }
}

void sh_multiply(const sh_tensor *w, const float *x, float *y) {
    for (int64_t row = 0; row < w->rows; row++) {
        y[row] = sh_dot(w, row, x);
    }
}

float sh_value(const sh_tensor *w, int64_t row, int64_t col) {
    switch (w->dtype) {
    case SH_F32: return load_f32(row_f32(w, row), col);
    case SH_F16: return load_f16(row_16(w, row), col);
    case SH_BF16: break;
    }
    return load_bf16(row_16(w, row), col);
}

bool sh_all_finite(const void *data, sh_dtype dtype, uint64_t count) {
    /* The bits, not isfinite: an exponent of ones, whatever flags the compiler was given. */
    uint32_t bad = 0;
    if (dtype == SH_F32) {
        const unsigned char *bytes = data;
        for (uint64_t i = 0; i < count; i++) {
            uint32_t bits;
            memcpy(&bits, bytes + 4 * i, sizeof bits);
            bad |= (bits & 0x7F800000U) == 0x7F800000U;
        }
        return bad == 0;
    }
    uint32_t exponent = dtype == SH_F16 ? 0x7C00U : 0x7F80U;
    const uint16_t *values = data;
    for (uint64_t i = 0; i < count; i++) {
        bad |= (values[i] & exponent) == exponent;
    }
    return bad == 0;
}
