/* Times W x for the sizes and dtypes of head matrices; see benchmarks/kernels.py. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "kernels.h"

static double now(void) {
    struct timespec t;
    timespec_get(&t, TIME_UTC);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

int main(void) {
    static const int64_t widths[] = {576, 3584};
    static const struct {
        const char *name;
        sh_dtype dtype;
    } kinds[] = {{"f32", SH_F32}, {"f16", SH_F16}, {"bf16", SH_BF16}};
    for (size_t i = 0; i < 2; i++) {
        int64_t d = widths[i];
        float *x = calloc((size_t)d, sizeof *x);
        float *y = calloc((size_t)d, sizeof *y);
        void *w = calloc((size_t)(d * d), sizeof(float));
        if (x == NULL || y == NULL || w == NULL) {
            return 1;
        }
        memset(w, 0x3C, (size_t)(d * d) * sizeof(float)); /* finite in every dtype */
        for (size_t k = 0; k < 3; k++) {
            const sh_tensor matrix = {.data = w, .dtype = kinds[k].dtype, .rows = d, .cols = d};
            double best = 1e9;
            for (int round = 0; round < 40; round++) {
                double start = now();
                sh_multiply(&matrix, x, y);
                double seconds = now() - start;
                best = seconds < best ? seconds : best;
            }
            printf("%s_%lld %.9f\n", kinds[k].name, (long long)d, best);
        }
        free(x);
        free(y);
        free(w);
    }
    return 0;
}
