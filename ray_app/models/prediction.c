/* Scores rows of logits: each row is read from memory once, and once more from the cache.

   Sums are kept in sixteen parts, whatever the machine's vectors hold, and nothing is contracted:
   the number of threads changes no bit, and another machine none but by its C library's log(). */

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { PARTS = 16 };

/* e^x of x <= 0 to about 1e-7 relative: 2^n by the exponent's bits, and e^r of |r| <= ln(2)/2 by
   its Taylor series of degree 7. Below the smallest normal number it is 0. NaN stays NaN. */
static inline __attribute__((always_inline)) float exp_of(float x) {
    float shifted = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: rounds to an integer. */
    float n = shifted - 12582912.0f;
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    int32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (int32_t)((uint32_t)(bits + 127) << 23);
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    return x < -87.0f ? 0.0f : p * scale;
}

/* logits: float32, `count` rows of `width` values. Of each row: loss receives -ln P(target), above
   and level the numbers of logits above the target's and equal to it. */
void score_rows(const float *logits, int64_t count, int64_t width, const int64_t *targets,
                float *loss, int32_t *above, int32_t *level, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < count; row++) {
        const float *z = logits + row * width;
        float right = z[targets[row]], most[PARTS], most_all = -INFINITY;
        int32_t more[PARTS] = {0}, same[PARTS] = {0};
        double sums[PARTS] = {0}, sum = 0;
        for (int k = 0; k < PARTS; k++)
            most[k] = -INFINITY;
        int64_t whole = width / PARTS * PARTS;
        for (int64_t i = 0; i < whole; i += PARTS)
#pragma omp simd
            for (int k = 0; k < PARTS; k++) {
                float v = z[i + k];
                most[k] = v > most[k] ? v : most[k];
                more[k] += v > right;
                same[k] += v == right;
            }
        for (int64_t i = whole; i < width; i++) {
            most[0] = z[i] > most[0] ? z[i] : most[0];
            more[0] += z[i] > right;
            same[0] += z[i] == right;
        }
        above[row] = level[row] = 0;
        for (int k = 0; k < PARTS; k++) {
            most_all = most[k] > most_all ? most[k] : most_all;
            above[row] += more[k];
            level[row] += same[k];
        }
        for (int64_t i = 0; i < whole; i += PARTS)
#pragma omp simd
            for (int k = 0; k < PARTS; k++)
                sums[k] += exp_of(z[i + k] - most_all);
        for (int64_t i = whole; i < width; i++)
            sums[0] += exp_of(z[i] - most_all);
        for (int k = 0; k < PARTS; k++)
            sum += sums[k];
        loss[row] = (float)(log(sum) + ((double)most_all - right));
    }
}
