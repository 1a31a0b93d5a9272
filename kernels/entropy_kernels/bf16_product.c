/* Products of bfloat16 matrices with a float32 result, for CPUs with AVX512-BF16.
 *
 * The right operand is packed, 64 columns at a time, into a panel of pairs along the depth (the
 * layout vdpbf16ps reads); 6 rows of the left operand then meet the whole panel in registers.
 * Sums longer than DEPTH_BLOCK pairs are cut into blocks, which shortens the chains of roundings.
 */
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { ROWS = 6, VECTORS = 4, COLUMNS = 16 * VECTORS, DEPTH_BLOCK = 128 };

/* panel[pair][column][2] from w [columns, depth] (along = 1) or w [depth, columns] (along = 0). */
static void pack(const uint16_t *w, int64_t stride, int along, int64_t count, int64_t depth,
                 uint16_t *panel)
{
    int64_t pairs = (depth + 1) / 2;
    if (count < COLUMNS || (depth & 1))
        memset(panel, 0, (size_t)pairs * 2 * COLUMNS * sizeof *panel);
    if (along) {
        for (int64_t j = 0; j < count; j++)
            for (int64_t k = 0; k < depth; k++)
                panel[(k >> 1) * 2 * COLUMNS + 2 * j + (k & 1)] = w[j * stride + k];
        return;
    }
    for (int64_t k = 0; k < depth; k++)
        for (int64_t j = 0; j < count; j++)
            panel[(k >> 1) * 2 * COLUMNS + 2 * j + (k & 1)] = w[k * stride + j];
}

static inline __m512bh pair_of(const uint16_t *a, int64_t pair, int64_t depth)
{
    uint32_t two = a[2 * pair];
    if (2 * pair + 1 < depth)
        memcpy(&two, a + 2 * pair, sizeof two);
    return (__m512bh)_mm512_set1_epi32((int)two);
}

/* z [rows, columns] (+)= a [rows, depth] x panel, for at most ROWS rows and COLUMNS columns. */
static void block(const uint16_t *a, int64_t a_stride, int64_t rows, int64_t depth,
                  const uint16_t *panel, float *z, int64_t z_stride, int64_t columns, int add)
{
    const uint16_t *row[ROWS];
    for (int i = 0; i < ROWS; i++)
        row[i] = a + (i < rows ? i : 0) * a_stride;
    int64_t pairs = (depth + 1) / 2;
    for (int64_t first = 0; first < pairs; first += DEPTH_BLOCK) {
        int64_t last = first + DEPTH_BLOCK < pairs ? first + DEPTH_BLOCK : pairs;
        int64_t whole = 2 * last <= depth ? last : last - 1;
        __m512 sum[ROWS][VECTORS];
        for (int i = 0; i < ROWS; i++)
            for (int v = 0; v < VECTORS; v++)
                sum[i][v] = _mm512_setzero_ps();
        for (int64_t p = first; p < last; p++) {
            __m512bh b[VECTORS];
            for (int v = 0; v < VECTORS; v++)
                b[v] = (__m512bh)_mm512_loadu_si512(panel + p * 2 * COLUMNS + 32 * v);
            for (int i = 0; i < ROWS; i++) {
                int32_t two;
                __m512bh x;
                if (p < whole) {
                    memcpy(&two, row[i] + 2 * p, sizeof two);
                    x = (__m512bh)_mm512_set1_epi32(two);
                } else {
                    x = pair_of(row[i], p, depth);
                }
                for (int v = 0; v < VECTORS; v++)
                    sum[i][v] = _mm512_dpbf16_ps(sum[i][v], x, b[v]);
            }
        }
        for (int i = 0; i < ROWS && i < rows; i++)
            for (int v = 0; v < VECTORS && 16 * v < columns; v++) {
                int64_t left = columns - 16 * v;
                __mmask16 mask = left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1);
                float *target = z + i * z_stride + 16 * v;
                if (add || first)
                    sum[i][v] = _mm512_add_ps(sum[i][v], _mm512_maskz_loadu_ps(mask, target));
                _mm512_mask_storeu_ps(target, mask, sum[i][v]);
            }
    }
}

/* z [rows, columns] (+)= a [rows, depth] x b, with b as `pack` reads it. Returns 0 on success. */
int bf16_product(const uint16_t *a, int64_t a_stride, const uint16_t *b, int64_t b_stride, int along,
                 float *z, int64_t z_stride, int64_t rows, int64_t columns, int64_t depth, int add,
                 int threads)
{
    int64_t panels = (columns + COLUMNS - 1) / COLUMNS;
    size_t size = (size_t)((depth + 1) / 2) * 2 * COLUMNS * sizeof(uint16_t);
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        uint16_t *panel = aligned_alloc(64, size);
        if (!panel) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t j = 0; j < panels; j++) {
            if (!panel)
                continue;
            int64_t column = j * COLUMNS;
            int64_t count = columns - column < COLUMNS ? columns - column : COLUMNS;
            pack(b + column * (along ? b_stride : 1), b_stride, along, count, depth, panel);
            for (int64_t i = 0; i < rows; i += ROWS)
                block(a + i * a_stride, a_stride, rows - i, depth, panel, z + i * z_stride + column,
                      z_stride, count, add);
        }
        free(panel);
    }
    return failed;
}
