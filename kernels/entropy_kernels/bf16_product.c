/* Products of bfloat16 matrices with a float32 result, for CPUs with AVX512-BF16 or AMX-BF16.
 *
 * The right operand is packed, 64 columns at a time, into a panel of pairs along the depth, the
 * layout that vdpbf16ps and tdpbf16ps read. AVX512: 6 rows of the left operand meet the whole panel
 * in registers. AMX: 32 rows meet half of it in four tiles. Sums longer than a block of the depth
 * are cut into blocks, which shortens the chains of roundings.
 */
#define _GNU_SOURCE
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { ROWS = 6, VECTORS = 4, COLUMNS = 16 * VECTORS, DEPTH_BLOCK = 128 };
enum { TILE_ROWS = 32, STEP = 16, TILE_DEPTH_BLOCK = 256 }; /* depths count pairs */

static int64_t pairs_of(int64_t depth)
{
    return (depth + 1) / 2;
}

/* Pairs of a panel: whole steps of the tiles. */
static int64_t padded_pairs(int64_t depth)
{
    return (pairs_of(depth) + STEP - 1) / STEP * STEP;
}

/* panel[pair][column][2] from w [columns, depth] (along = 1) or w [depth, columns] (along = 0). */
static void pack(const uint16_t *w, int64_t stride, int along, int64_t count, int64_t depth,
                 uint16_t *panel)
{
    int64_t whole = count < COLUMNS ? 0 : depth / 2; /* pairs that are written in full */
    memset(panel + whole * 2 * COLUMNS, 0,
           (size_t)(padded_pairs(depth) - whole) * 2 * COLUMNS * sizeof *panel);
    for (int64_t p = 0; p < depth / 2; p++) {
        uint16_t *pair = panel + p * 2 * COLUMNS;
        if (along)
            for (int64_t j = 0; j < count; j++)
                memcpy(pair + 2 * j, w + j * stride + 2 * p, 2 * sizeof *pair);
        else
            for (int64_t j = 0; j < count; j++) {
                pair[2 * j] = w[2 * p * stride + j];
                pair[2 * j + 1] = w[(2 * p + 1) * stride + j];
            }
    }
    if (depth & 1)
        for (int64_t j = 0; j < count; j++)
            panel[(depth / 2) * 2 * COLUMNS + 2 * j] = along ? w[j * stride + depth - 1] : w[(depth - 1) * stride + j];
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
    int64_t pairs = pairs_of(depth);
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

#ifdef __AMX_BF16__
struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

/* Tiles 0 to 3: sums of 2 x 2 tiles of z; 4 and 5: rows of a; 6 and 7: columns of the panel. */
static void configure(int64_t rows)
{
    struct tile_config config __attribute__((aligned(64))) = {.palette = 1};
    uint8_t upper = rows < 16 ? rows : 16, lower = rows > 16 ? rows - 16 : 1;
    const uint8_t counts[8] = {upper, upper, lower, lower, upper, lower, STEP, STEP};
    for (int i = 0; i < 8; i++) {
        config.row_bytes[i] = 64;
        config.rows[i] = counts[i];
    }
    _tile_loadconfig(&config);
}

/* `block` for at most TILE_ROWS rows, with tiles configured for them. */
static void tile_block(const uint16_t *a, int64_t a_stride, int64_t rows, int64_t depth,
                       const uint16_t *panel, float *z, int64_t z_stride, int64_t columns, int add)
{
    int64_t pairs = padded_pairs(depth), second = rows > 16 ? 16 : 0;
    uint16_t tail[TILE_ROWS][2 * STEP] __attribute__((aligned(64)));
    float sums[TILE_ROWS][32] __attribute__((aligned(64)));
    int64_t left = depth % (2 * STEP);
    if (left) {
        memset(tail, 0, sizeof tail);
        for (int64_t i = 0; i < rows; i++)
            memcpy(tail[i], a + i * a_stride + depth - left, left * sizeof **tail);
    }
    for (int64_t column = 0; column < columns; column += 32)
        for (int64_t first = 0; first < pairs; first += TILE_DEPTH_BLOCK) {
            int64_t last = first + TILE_DEPTH_BLOCK < pairs ? first + TILE_DEPTH_BLOCK : pairs;
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int64_t p = first; p < last; p += STEP) {
                int whole = 2 * (p + STEP) <= depth;
                const uint16_t *x = whole ? a + 2 * p : tail[0];
                int64_t stride = whole ? a_stride : 2 * STEP;
                const uint16_t *b = panel + p * 2 * COLUMNS + 2 * column;
                _tile_loadd(4, x, stride * 2);
                _tile_loadd(6, b, COLUMNS * 4);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(7, b + 32, COLUMNS * 4);
                _tile_dpbf16ps(1, 4, 7);
                _tile_loadd(5, x + second * stride, stride * 2);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            float *target = z + column;
            if (!add && !first && rows == TILE_ROWS && columns - column >= 32) {
                _tile_stored(0, target, z_stride * 4);
                _tile_stored(1, target + 16, z_stride * 4);
                _tile_stored(2, target + 16 * z_stride, z_stride * 4);
                _tile_stored(3, target + 16 * z_stride + 16, z_stride * 4);
                continue;
            }
            _tile_stored(0, sums[0], sizeof *sums);
            _tile_stored(1, sums[0] + 16, sizeof *sums);
            _tile_stored(2, sums[16], sizeof *sums);
            _tile_stored(3, sums[16] + 16, sizeof *sums);
            for (int64_t i = 0; i < rows; i++)
                for (int v = 0; v < 2 && column + 16 * v < columns; v++) {
                    int64_t rest = columns - column - 16 * v;
                    __mmask16 mask = rest >= 16 ? 0xffff : (__mmask16)((1u << rest) - 1);
                    float *place = target + i * z_stride + 16 * v;
                    __m512 sum = _mm512_load_ps(sums[i] + 16 * v);
                    if (add || first)
                        sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, place));
                    _mm512_mask_storeu_ps(place, mask, sum);
                }
        }
}

/* Ask Linux for the tiles' registers; whether this CPU and kernel grant them. */
static int tiles_granted(void)
{
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}
#endif

static void rows_times_panel(const uint16_t *a, int64_t a_stride, int64_t rows, int64_t depth,
                             const uint16_t *panel, float *z, int64_t z_stride, int64_t columns,
                             int add, int tiles)
{
#ifdef __AMX_BF16__
    if (tiles) {
        int64_t whole = rows / TILE_ROWS * TILE_ROWS;
        configure(TILE_ROWS);
        for (int64_t i = 0; i < whole; i += TILE_ROWS)
            tile_block(a + i * a_stride, a_stride, TILE_ROWS, depth, panel, z + i * z_stride,
                       z_stride, columns, add);
        if (whole < rows) {
            configure(rows - whole);
            tile_block(a + whole * a_stride, a_stride, rows - whole, depth, panel,
                       z + whole * z_stride, z_stride, columns, add);
        }
        _tile_release();
        return;
    }
#endif
    for (int64_t i = 0; i < rows; i += ROWS)
        block(a + i * a_stride, a_stride, rows - i, depth, panel, z + i * z_stride, z_stride,
              columns, add);
}

/* z [rows, columns] (+)= a [rows, depth] x b, with b as `pack` reads it. Returns 0 on success. */
int bf16_product(const uint16_t *a, int64_t a_stride, const uint16_t *b, int64_t b_stride, int along,
                 float *z, int64_t z_stride, int64_t rows, int64_t columns, int64_t depth, int add,
                 int threads)
{
    int64_t panels = (columns + COLUMNS - 1) / COLUMNS;
    size_t size = (size_t)padded_pairs(depth) * 2 * COLUMNS * sizeof(uint16_t);
    int failed = 0, tiles = 0;
#ifdef __AMX_BF16__
    tiles = tiles_granted();
#endif
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
            rows_times_panel(a, a_stride, rows, depth, panel, z + column, z_stride, count, add,
                             tiles);
        }
        free(panel);
    }
    return failed;
}
