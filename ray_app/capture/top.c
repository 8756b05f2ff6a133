/* Adds a batch of activations to the highest and lowest that were seen of each neuron.

   Each value is compared with the worst that its column keeps, many columns and four rows at a
   time; few are better, and only those touch the lists. Of equal values the one of the smaller
   place is better: places are all different, so what is kept depends neither on the order of rows
   nor on the number of threads, which share out the columns. */

#include <stdint.h>
#include <string.h>

enum { TILE = 512, WORD = 8, GROUP = 4 };

typedef struct {
    float high[TILE], low[TILE];
    int32_t high_place[TILE], low_place[TILE];
} Worst;

typedef struct {
    float *values;
    int32_t *places;
} Lists;

/* Comparisons are false of NaN: it is kept nowhere. */
#define IS_HIGHER(v, place, i)                                                                     \
    (((v) > w->high[i]) | (((v) == w->high[i]) & ((place) < w->high_place[i])))
#define IS_LOWER(v, place, i)                                                                      \
    (((v) < w->low[i]) | (((v) == w->low[i]) & ((place) < w->low_place[i])))
#define IS_BETTER(v, place, i) (IS_HIGHER(v, place, i) | IS_LOWER(v, place, i))

/* Puts a value where it belongs in a list of k, best first, and drops the last. */
static void insert(float v, int32_t place, Lists lists, int64_t column, int64_t k) {
    float *values = lists.values + column * k;
    int32_t *places = lists.places + column * k;
    int64_t i = k - 1;
    for (; i > 0; i--) {
        if (values[i - 1] > v || (values[i - 1] == v && places[i - 1] < place))
            break;
        values[i] = values[i - 1];
        places[i] = places[i - 1];
    }
    values[i] = v;
    places[i] = place;
}

static void update(Worst *w, Lists high, Lists low, int64_t column, int64_t k) {
    int64_t last = column * k + k - 1;
    w->high[column] = high.values[last];
    w->low[column] = -low.values[last];
    w->high_place[column] = high.places[last];
    w->low_place[column] = low.places[last];
}

typedef struct {
    const float *z;
    int64_t stride, count, k;
    const int64_t *chosen;
    const int32_t *places;
} Batch;

/* Adds n columns from `first` on to their lists. */
static void add_tile(const Batch *b, int64_t first, int64_t n, Lists high, Lists low) {
    Worst worst, *w = &worst;
    for (int64_t i = 0; i < n; i++)
        update(w, high, low, i, b->k);
    uint8_t better[TILE] = {0};
    for (int64_t start = 0; start < b->count; start += GROUP) {
        int64_t rows = b->count - start < GROUP ? b->count - start : GROUP;
        const float *row[GROUP];
        int32_t place[GROUP];
        /* Where there are fewer rows left, the last stands in for those that are missing. */
        for (int64_t g = 0; g < GROUP; g++) {
            int64_t r = start + (g < rows ? g : rows - 1);
            row[g] = b->z + (b->chosen ? b->chosen[r] : r) * b->stride + first;
            place[g] = b->places[r];
        }
#pragma omp simd
        for (int64_t i = 0; i < n; i++)
            better[i] = IS_BETTER(row[0][i], place[0], i) | IS_BETTER(row[1][i], place[1], i) |
                        IS_BETTER(row[2][i], place[2], i) | IS_BETTER(row[3][i], place[3], i);
        for (int64_t word = 0; word < n; word += WORD) {
            uint64_t any;
            memcpy(&any, better + word, WORD);
            if (!any)
                continue;
            for (int64_t i = word; i < word + WORD; i++)
                for (int64_t g = 0; better[i] && g < rows; g++) {
                    float v = row[g][i];
                    if (IS_HIGHER(v, place[g], i))
                        insert(v, place[g], high, i, b->k);
                    if (IS_LOWER(v, place[g], i))
                        insert(-v, place[g], low, i, b->k);
                    update(w, high, low, i, b->k);
                }
        }
    }
}

/* z: float32, rows `stride` values apart; `chosen`: the rows that count, or NULL for the first
   `count` rows; `places`: of each row that counts. The lists are (2, width, k), best first: the
   highest values, then the lowest with their signs turned; at first all -infinity at place
   INT32_MAX. */
void add_top(const float *z, int64_t stride, const int64_t *chosen, const int32_t *places,
             int64_t count, int64_t width, int64_t k, float *values, int32_t *found, int threads) {
    int64_t tiles = threads * ((width + threads * TILE - 1) / (threads * TILE));
    int64_t size = ((width + tiles - 1) / tiles + 15) / 16 * 16;
    Batch batch = {z, stride, count, k, chosen, places};
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t first = 0; first < width; first += size) {
        Lists high = {values + first * k, found + first * k};
        Lists low = {high.values + width * k, high.places + width * k};
        add_tile(&batch, first, width - first < size ? width - first : size, high, low);
    }
}
