/* Adds a batch of activations to the statistics of its neurons, reading each value once.

   Every column is computed for itself, row after row, in IEEE arithmetic without contraction: the
   result has the same bits on every machine and with every number of threads. Rows are taken four
   at a time so that accumulators pass through registers a quarter as often; columns are taken in
   tiles whose accumulators stay in a core's first cache; blocks of 128 rows are summed in float
   and blocks in double. Squares are of deviations from a pivot, the mean so far, which keeps them
   small wherever the values lie. */

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { TILE = 512, BLOCK = 128, GROUP = 4 };

typedef struct {
    double sum[TILE];
    float pivot[TILE], squares[TILE], roots[TILE], positive[TILE], negative[TILE], above[TILE],
        below[TILE], low[TILE], high[TILE];
} Tile;

/* Comparisons are false of NaN: it reaches the squares and is found there. */
#define ADD(z)                                                                                     \
    {                                                                                              \
        float v = (z), d = v - pivot, p = v > 0 ? v : 0.0f;                                        \
        sum += v;                                                                                  \
        squares += d * d;                                                                          \
        roots += sqrtf(fabsf(v));                                                                  \
        positive += p;                                                                             \
        negative += v - p;                                                                         \
        above += v > 0 ? 1.0f : 0.0f;                                                              \
        below += v < 0 ? 1.0f : 0.0f;                                                              \
        low = v < low ? v : low;                                                                   \
        high = v > high ? v : high;                                                                \
    }

static inline __attribute__((always_inline)) void add_rows(Tile *t, int64_t n,
                                                           const float *const *rows, int count) {
    const float *a = rows[0], *b = rows[count - 1], *c = b, *d = b;
    if (count == GROUP) {
        b = rows[1];
        c = rows[2];
        d = rows[3];
    }
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        double sum = t->sum[i];
        float pivot = t->pivot[i], squares = t->squares[i], roots = t->roots[i];
        float positive = t->positive[i], negative = t->negative[i];
        float above = t->above[i], below = t->below[i], low = t->low[i], high = t->high[i];
        ADD(a[i])
        if (count == GROUP) {
            ADD(b[i])
            ADD(c[i])
            ADD(d[i])
        }
        t->sum[i] = sum;
        t->squares[i] = squares;
        t->roots[i] = roots;
        t->positive[i] = positive;
        t->negative[i] = negative;
        t->above[i] = above;
        t->below[i] = below;
        t->low[i] = low;
        t->high[i] = high;
    }
}

/* z: float32, rows `stride` values apart; `chosen`: the rows that count, or NULL for the first
   `count` rows. `before`: rows added earlier. The state is that of MomentAccumulator: mean, m2,
   low and high of `width`, and sums of 5 x `width`. */
void add_moments(const float *z, int64_t stride, const int64_t *chosen, int64_t count,
                 int64_t width, int64_t before, double *mean, double *m2, double *sums, float *low,
                 float *high, int threads) {
    int64_t tiles = threads * ((width + threads * TILE - 1) / (threads * TILE));
    int64_t size = ((width + tiles - 1) / tiles + 15) / 16 * 16;
#define ROW(r) (z + (chosen ? chosen[r] : (r)) * stride + first)
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t first = 0; first < width; first += size) {
        int64_t n = width - first < size ? width - first : size;
        double squares[TILE] = {0}, total[TILE] = {0};
        Tile t;
        /* A mean of fewer rows than are added may lie too far off to be their pivot. */
        if (before < count) {
            int64_t rows = count < BLOCK ? count : BLOCK;
            double start[TILE] = {0};
            for (int64_t r = 0; r < rows; r++)
                for (int64_t i = 0; i < n; i++)
                    start[i] += ROW(r)[i];
            for (int64_t i = 0; i < n; i++)
                t.pivot[i] = (float)(start[i] / rows);
        } else
            for (int64_t i = 0; i < n; i++)
                t.pivot[i] = (float)mean[first + i];
        memcpy(t.low, low + first, n * sizeof(float));
        memcpy(t.high, high + first, n * sizeof(float));
        for (int64_t start = 0; start < count; start += BLOCK) {
            int64_t stop = count < start + BLOCK ? count : start + BLOCK, r = start;
            memset(t.sum, 0, sizeof t.sum);
            memset(t.squares, 0, (char *)t.low - (char *)t.squares);
            for (; r + GROUP <= stop; r += GROUP) {
                const float *rows[GROUP] = {ROW(r), ROW(r + 1), ROW(r + 2), ROW(r + 3)};
                add_rows(&t, n, rows, GROUP);
            }
            for (; r < stop; r++) {
                const float *rows[1] = {ROW(r)};
                add_rows(&t, n, rows, 1);
            }
            for (int64_t i = 0; i < n; i++) {
                double *out = sums + first + i;
                total[i] += t.sum[i];
                squares[i] += t.squares[i];
                out[0] += t.roots[i];
                out[width] += t.positive[i];
                out[2 * width] += t.negative[i];
                out[3 * width] += t.above[i] - t.below[i];
                out[4 * width] += t.above[i] + t.below[i];
            }
        }
        /* Merged as Chan, Golub and LeVeque (1979) merge two parts. */
        double share = (double)count / (double)(before + count);
        for (int64_t i = 0; i < n; i++) {
            double here = total[i] / count, off = here - t.pivot[i];
            double part = squares[i] - count * off * off, delta = here - mean[first + i];
            mean[first + i] += delta * share;
            m2[first + i] += (part < 0 ? 0 : part) + delta * delta * (before * share);
        }
        memcpy(low + first, t.low, n * sizeof(float));
        memcpy(high + first, t.high, n * sizeof(float));
    }
}
