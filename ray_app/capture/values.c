/* Turns a batch of activations, position by position, into rows of neurons.

   Elements are moved, or rounded to half precision, which processors do alike for all finite
   numbers: the result has the same bits on every machine. Rows are taken in tiles. A riffle, as of
   the two halves of a deck of cards, rotates the bits of an element's index left by one. After one
   riffle for each bit of a row's index, i * COLUMNS + j has become j * ROWS + i. Compilers make
   shuffles of whole registers of a riffle, and what is written to a neuron is whole cache lines. */

#include <stdint.h>
#include <string.h>
#ifdef __F16C__
#include <immintrin.h>
#endif

enum { COLUMNS = 32, ROW_BITS = 6, ROWS = 1 << ROW_BITS, TILE = ROWS * COLUMNS };
_Static_assert((COLUMNS & (COLUMNS - 1)) == 0, "riffles rotate bits of powers of two");

/* from: `stride` elements between rows; `chosen`: the rows to take, or NULL for the first `count`
   rows. to: row i takes column i, `length` elements apart. */
#define TRANSPOSE(name, source, type, READ)                                                        \
    void name(const source *from, int64_t stride, const int64_t *chosen, int64_t count,            \
              int64_t width, type *to, int64_t length, int threads) {                              \
        _Pragma("omp parallel for schedule(static) num_threads(threads)")                          \
        for (int64_t first = 0; first < width; first += COLUMNS) {                                 \
            int64_t columns = width - first < COLUMNS ? width - first : COLUMNS;                   \
            type tiles[2][TILE] = {0};                                                             \
            for (int64_t start = 0; start < count; start += ROWS) {                                \
                int64_t rows = count - start < ROWS ? count - start : ROWS;                        \
                for (int64_t r = 0; r < rows; r++) {                                               \
                    int64_t row = chosen ? chosen[start + r] : start + r;                          \
                    READ(from + row * stride + first, tiles[0] + r * COLUMNS, columns);            \
                }                                                                                  \
                for (int bit = 0; bit < ROW_BITS; bit++) {                                         \
                    const type *deck = tiles[bit % 2];                                             \
                    type *riffled = tiles[1 - bit % 2];                                            \
                    for (int64_t i = 0; i < TILE / 2; i++) {                                       \
                        riffled[2 * i] = deck[i];                                                  \
                        riffled[2 * i + 1] = deck[TILE / 2 + i];                                   \
                    }                                                                              \
                }                                                                                  \
                for (int64_t c = 0; c < columns; c++)                                              \
                    memcpy(to + (first + c) * length + start,                                      \
                           tiles[ROW_BITS % 2] + c * ROWS, rows * sizeof(type));                   \
            }                                                                                      \
        }                                                                                          \
    }

#define COPY(from, to, count) memcpy(to, from, (count) * sizeof *(to))

TRANSPOSE(transpose_2, uint16_t, uint16_t, COPY)
TRANSPOSE(transpose_4, uint32_t, uint32_t, COPY)

#ifdef __F16C__

/* Half precision of the nearest number, of two the even one. */
static inline void round_to_half(const float *from, uint16_t *to, int64_t count) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8)
        _mm_storeu_si128((__m128i *)(to + i),
                         _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
    for (; i < count; i++)
        to[i] = _cvtss_sh(from[i], _MM_FROUND_TO_NEAREST_INT);
}

TRANSPOSE(transpose_4_to_2, float, uint16_t, round_to_half)

#endif
