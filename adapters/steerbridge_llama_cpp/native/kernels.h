/* Arithmetic on rows of stored tensors: F32, F16 or BF16 times float32, summed in float32. */
#ifndef STEERHOOK_KERNELS_H
#define STEERHOOK_KERNELS_H

#include "gguf.h"

/* A vector is a matrix of one row. `data` is NULL where an optional tensor is absent. */
typedef struct {
    const void *data;
    int64_t rows, cols;
    sh_dtype dtype;
} sh_tensor;

/* Values are finite (packages are checked), which the F16 conversion relies on. */
float sh_dot(const sh_tensor *w, int64_t row, const float *x);

/* y += a * row */
void sh_axpy(const sh_tensor *w, int64_t row, float a, float *y);

/* y = W x */
void sh_multiply(const sh_tensor *w, const float *x, float *y);

enum { SH_PANEL = 16, SH_ROW_BLOCK = 4 };

/* y += W x for `n` rows (SH_ROW_BLOCK at most), one after the other in `x` and `stride` apart in
 * `y`. W is [outputs, inputs], packed in panels of SH_PANEL outputs: [outputs / SH_PANEL][inputs]
 * [SH_PANEL]. A row's sums do not depend on its neighbours. */
void sh_panels(const float *w, int32_t outputs, int32_t inputs, const float *x, int32_t n,
               float *y, int64_t stride);

float sh_value(const sh_tensor *w, int64_t row, int64_t col);

/* True if no value is NaN or infinite. */
bool sh_all_finite(const void *data, sh_dtype dtype, uint64_t count);

#endif
