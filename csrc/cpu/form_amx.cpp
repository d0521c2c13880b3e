// The code for processors with AMX: products of rows by tiles of 16 rows of 64 bytes, the rest as with AVX-512 BF16.
#include "forms.h"

#if defined(EVA_X86) && defined(EVA_AMX)

#include <utility>

#include "bfloat16_products.h"

namespace eva {
namespace avx512bf16 {
Code code();
}
namespace amx {

using namespace bfloat16;

constexpr int64_t kTile = 16;           // rows of a tile, and the float32 or pairs of bfloat16 of a row
constexpr int kFixed = 6, kMoving = 7;  // tiles that factors are loaded to; the first kWide hold sums
static_assert(kTile == kLanes && kWide == kFixed);

// The instructions as they are: so the compiler need not know them, only its assembler.
template <int Tile>
void zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(Tile));
}

template <int Tile, typename T>
void load(const T* from, int64_t stride) {  // in elements, all of which have four bytes
  __asm__ volatile("tileloadd (%0,%1,4), %%tmm%c2" ::"r"(from), "r"(stride), "i"(Tile) : "memory");
}

template <int Tile>
void store(float* to, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,4)" ::"r"(to), "r"(stride), "i"(Tile) : "memory");
}

template <int Sum, int Left, int Right>
void multiply() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(Left), "i"(Right));
}

// One after the other: run(0), …, run(Wide − 1), as constants.
template <typename Run, int... Tile>
void each(std::integer_sequence<int, Tile...>, const Run& run) {
  (run(std::integral_constant<int, Tile>()), ...);
}

// out(i, c) = Σ_k left(i, k) · right(k, c), one tile high, Wide tiles wide. An element of the factors is a pair of
// bfloat16, the product of two such is their dot product.
template <int Wide>
void multiply_row(const uint32_t* left, int64_t left_stride, const uint32_t* right, int64_t right_stride, int64_t depth,
                  float* out, int64_t out_stride) {
  constexpr std::make_integer_sequence<int, Wide> kSums;
  each(kSums, [](auto tile) { zero<tile>(); });
  for (int64_t k = 0; k < depth; k += kTile) {
    load<kFixed>(left + k, left_stride);
    each(kSums, [&](auto tile) {
      load<kMoving>(right + k * right_stride + tile * kTile, right_stride);
      multiply<tile, kFixed, kMoving>();
    });
  }
  each(kSums, [&](auto tile) { store<tile>(out + tile * kTile, out_stride); });
}

// The same Wide tiles high and one wide, each tile of the result where the one above it ends.
template <int Wide>
void multiply_column(const uint32_t* left, int64_t left_stride, const uint32_t* right, int64_t right_stride,
                     int64_t depth, float* out) {
  constexpr std::make_integer_sequence<int, Wide> kSums;
  each(kSums, [](auto tile) { zero<tile>(); });
  for (int64_t k = 0; k < depth; k += kTile) {
    load<kFixed>(right + k * right_stride, right_stride);
    each(kSums, [&](auto tile) {
      load<kMoving>(left + tile * kTile * left_stride + k, left_stride);
      multiply<tile, kMoving, kFixed>();
    });
  }
  each(kSums, [&](auto tile) { store<tile>(out + tile * kTile * kTile, kTile); });
}

constexpr decltype(&multiply_row<1>) kRowsOfTiles[] = {nullptr,         multiply_row<1>, multiply_row<2>, multiply_row<3>,
                                                       multiply_row<4>, multiply_row<5>, multiply_row<6>};
constexpr decltype(&multiply_column<1>) kColumnsOfTiles[] = {
    nullptr,           multiply_column<1>, multiply_column<2>, multiply_column<3>,
    multiply_column<4>, multiply_column<5>, multiply_column<6>};

// Row i, column j of 16 registers becomes row j, column i.
EVA_BF16 inline void transpose(__m512i* rows) {
  __m512i t[kTile];
  for (int i = 0; i < kTile; i += 2) {  // pairs of rows: (0, 0), (1, 0), (0, 1), (1, 1) of each quarter
    t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < kTile; i += 4) {  // four rows: columns i of each quarter
    rows[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {  // rows 0 … 7 and 8 … 15: quarters 0 and 2, then 1 and 3
    t[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    rows[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

// While there is one, its thread's tiles have their full size. P is kept as (q, pairs), and Yᵀ = Pᵀ Z is multiplied:
// rows come as pairs of rows, which is how a right factor has to lie.
struct Tiles {
  static constexpr int64_t kRows = 2 * kTile, kFeatures = 2 * kTile;

  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } sizes;
    __asm__ volatile("ldtilecfg %0" ::"m"(sizes));
  }
  ~Tiles() { __asm__ volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;

  void project(const uint32_t* rows, int64_t count, const uint32_t* basis, int64_t depth, int64_t q, float* out) const {
    for (int64_t r = 0; r < count; r += kTile)
      for (int64_t c = 0; c < q; c += kWide * kTile)
        kRowsOfTiles[registers(c, q)](rows + r * depth, depth, basis + c, q, depth, out + r * q + c, q);
  }

  EVA_BF16 static void settle(__m512i* both, uint32_t* projected, int64_t pair, int64_t stride, int64_t c, int64_t) {
    transpose(both);
    for (int64_t i = 0; i < kTile; ++i) _mm512_storeu_si512(projected + (c + i) * stride + pair, both[i]);
  }

  EVA_BF16 void accumulate(const uint32_t* columns, int64_t d, int64_t width, int64_t pairs, const uint32_t* projected,
                           int64_t stride, int64_t q, float* out, int64_t out_width, float sign) const {
    alignas(64) float sums[kWide * kTile * kTile];
    const __m512 factor = _mm512_set1_ps(sign);
    for (int64_t j = 0; j < width; j += kTile)
      for (int64_t c = 0; c < q; c += kWide * kTile) {
        const int high = registers(c, q);
        // What is added to may be in no cache; it is here when the sums are.
        for (int64_t i = 0; i < std::min(kTile, width - j); ++i)
          for (int64_t v = 0; v < high; ++v) _mm_prefetch(out + (j + i) * out_width + c + v * kTile, _MM_HINT_T0);
        kColumnsOfTiles[high](projected + c * stride, stride, columns + j, d, pairs, sums);
        for (int64_t v = 0; v < high; ++v) {
          const __mmask16 lanes = first_lanes(out_width - c - v * kTile);
          __m512i columns_of_it[kTile];
          for (int64_t i = 0; i < kTile; ++i) columns_of_it[i] = _mm512_load_si512(sums + (v * kTile + i) * kTile);
          transpose(columns_of_it);
          for (int64_t i = 0; i < std::min(kTile, width - j); ++i) {
            float* to = out + (j + i) * out_width + c + v * kTile;
            const __m512 sum = _mm512_castsi512_ps(columns_of_it[i]);
            _mm512_mask_storeu_ps(to, lanes, _mm512_fmadd_ps(factor, sum, bfloat16::load(to, lanes)));
          }
        }
      }
  }

  // The left factor as (d, pairs).
  static int64_t turned_size(int64_t d, int64_t pairs) { return d * pairs; }

  EVA_BF16 static void turn(const uint32_t* columns, int64_t d, int64_t first, int64_t width, uint32_t* turned,
                            int64_t pairs) {
    for (int64_t j = first; j < first + width; j += kTile)
      for (int64_t k = 0; k < pairs; k += kTile) {
        __m512i block[kTile];
        for (int64_t i = 0; i < kTile; ++i) block[i] = _mm512_loadu_si512(columns + (k + i) * d + j);
        transpose(block);
        for (int64_t i = 0; i < kTile; ++i) _mm512_storeu_si512(turned + (j + i) * pairs + k, block[i]);
      }
  }

  void multiply_columns(const uint32_t* columns, int64_t d, const uint32_t* turned, int64_t stride, int64_t pairs,
                        int64_t first, int64_t count, int64_t right, int wide, float* out) const {
    for (int64_t i = 0; i < count; i += kTile)
      kRowsOfTiles[wide](turned + (first + i) * stride, stride, columns + right, d, pairs, out + i * kColumns, kColumns);
  }
};

// Rows in float32 are multiplied as such, for all of their precision.
void gram_accumulate(const GramTask& task, int threads) {
  task.is_float32 ? avx512bf16::code().gram(task, threads) : accumulate_triangle<Triangle<Tiles>>(task, threads);
}

Code code() {
  Code own = avx512bf16::code();
  own.subspace = &accumulate_in_blocks<Block<Tiles>>;
  own.gram = &gram_accumulate;
  own.project = &project_rows<Tiles>;
  own.outer = &add_outer<Tiles>;
  return own;
}

}  // namespace amx
}  // namespace eva

#endif
