/* Turns a batch of activations, position by position, into rows of neurons.

   Elements are moved, never computed with: the result has the same bits on every machine. Columns
   are taken a cache line or two at a time, and rows in tiles: what is read across is written along
   from a core's first cache. */

#include <stdint.h>

enum { COLUMNS = 32, ROWS = 64 };

/* from: `stride` elements between rows; `chosen`: the rows to take, or NULL for the first `count`
   rows. to: row i takes column i, `length` elements apart. */
#define TRANSPOSE(name, type)                                                                      \
    void name(const type *from, int64_t stride, const int64_t *chosen, int64_t count,              \
              int64_t width, type *to, int64_t length, int threads) {                              \
        _Pragma("omp parallel for schedule(static) num_threads(threads)")                          \
        for (int64_t first = 0; first < width; first += COLUMNS) {                                 \
            int64_t columns = width - first < COLUMNS ? width - first : COLUMNS;                   \
            type tile[COLUMNS][ROWS];                                                              \
            for (int64_t start = 0; start < count; start += ROWS) {                                \
                int64_t rows = count - start < ROWS ? count - start : ROWS;                        \
                for (int64_t r = 0; r < rows; r++) {                                               \
                    int64_t row = chosen ? chosen[start + r] : start + r;                          \
                    const type *values = from + row * stride + first;                              \
                    for (int64_t c = 0; c < columns; c++)                                          \
                        tile[c][r] = values[c];                                                    \
                }                                                                                  \
                for (int64_t c = 0; c < columns; c++) {                                            \
                    type *out = to + (first + c) * length + start;                                 \
                    for (int64_t r = 0; r < rows; r++)                                             \
                        out[r] = tile[c][r];                                                       \
                }                                                                                  \
            }                                                                                      \
        }                                                                                          \
    }

TRANSPOSE(transpose_2, uint16_t)
TRANSPOSE(transpose_4, uint32_t)
