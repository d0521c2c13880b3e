// The code for processors with AVX-512 BF16: products of rows by dot products of bfloat16, the rest as with AVX-512.
#include "forms.h"

#ifdef EVA_X86

#include "bfloat16_products.h"

namespace eva {
namespace avx512 {
Code code();
}
namespace avx512bf16 {

using namespace bfloat16;

constexpr int64_t kTall = 4;  // rows of a tile of sums: with kWide registers, 24 of the 32

EVA_BF16 inline __m512 dot(__m512 sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

// What a tile is multiplied from, and goes to. An element of `left` and `right` is a pair of bfloat16, the product of
// two such is their dot product. Of the tile, `tall` rows are wanted, and `lanes` of each row's last register.
struct Operands {
  const uint32_t* left;  // (i, k) at left[i * step_i + k * step_k]
  int64_t step_i, step_k;
  const uint32_t* right;  // (k, c) at right[k * right_stride + c]
  int64_t right_stride, depth;
  float* out;  // (i, c) at out[i * out_stride + c]
  int64_t out_stride, tall;
  __mmask16 lanes;
  float sign;
};

// out(i, c) = Σ_k left(i, k) · right(k, c), or with Add: sign times that is added. kTall × Wide registers of it.
template <int Wide, bool Add>
EVA_BF16 void tile(const Operands& of) {
  if (Add)  // it may be in no cache; it is here when the sums are
    for (int64_t i = 0; i < std::min(kTall, of.tall); ++i)
      for (int v = 0; v < Wide; ++v) _mm_prefetch(of.out + i * of.out_stride + v * kLanes, _MM_HINT_T0);
  const auto [left, step_i, step_k, right, right_stride, depth, out, out_stride, tall, last_lanes, sign] = of;
  __m512 sum[kTall][Wide];
  for (int64_t i = 0; i < kTall; ++i)
    for (int v = 0; v < Wide; ++v) sum[i][v] = _mm512_setzero_ps();
  for (int64_t k = 0; k < depth; ++k) {
    __m512i column[Wide];
    for (int v = 0; v < Wide; ++v) column[v] = _mm512_loadu_si512(right + k * right_stride + v * kLanes);
    for (int64_t i = 0; i < kTall; ++i) {
      const __m512i row = _mm512_set1_epi32(static_cast<int>(left[i * step_i + k * step_k]));
      for (int v = 0; v < Wide; ++v) sum[i][v] = dot(sum[i][v], row, column[v]);
    }
  }
  for (int64_t i = 0; i < kTall; ++i)
    for (int v = 0; v < Wide && i < tall; ++v) {
      float* to = out + i * out_stride + v * kLanes;
      const __mmask16 lanes = v == Wide - 1 ? last_lanes : 0xffff;
      if (Add) sum[i][v] = _mm512_fmadd_ps(_mm512_set1_ps(sign), sum[i][v], load(to, lanes));
      _mm512_mask_storeu_ps(to, lanes, sum[i][v]);
    }
}

template <bool Add>
constexpr void (*kTiles[])(const Operands&) = {nullptr,      tile<1, Add>, tile<2, Add>, tile<3, Add>,
                                               tile<4, Add>, tile<5, Add>, tile<6, Add>};

// P is kept as pairs of rows, (pairs, q).
struct Dots {
  static constexpr int64_t kRows = kTall, kFeatures = kLanes;

  EVA_BF16 void project(const uint32_t* rows, int64_t count, const uint32_t* basis, int64_t depth, int64_t q,
                        float* out) const {
    for (int64_t c = 0; c < q; c += kWide * kLanes)
      for (int64_t r = 0; r < count; r += kTall)
        kTiles<false>[registers(c, q)]({rows + r * depth, depth, 1, basis + c, q, depth, out + r * q + c, q, kTall, 0xffff, 1});
  }

  EVA_BF16 static void settle(const __m512i* both, uint32_t* projected, int64_t pair, int64_t, int64_t c, int64_t q) {
    for (int64_t i = 0; i < kRows / 2; ++i) _mm512_storeu_si512(projected + (pair + i) * q + c, both[i]);
  }

  EVA_BF16 void accumulate(const uint32_t* columns, int64_t d, int64_t width, int64_t pairs, const uint32_t* projected,
                           int64_t, int64_t q, float* out, int64_t out_width, float sign) const {
    for (int64_t c = 0; c < q; c += kWide * kLanes) {
      const int wide = registers(c, q);
      const __mmask16 lanes = first_lanes(out_width - c - (wide - 1) * kLanes);
      for (int64_t j = 0; j < width; j += kTall)
        kTiles<true>[wide]({columns + j, 1, d, projected + c, q, pairs, out + j * out_width + c, out_width, width - j,
                            lanes, sign});
    }
  }

  static int64_t turned_size(int64_t, int64_t) { return 0; }
  static void turn(const uint32_t*, int64_t, int64_t, int64_t, uint32_t*, int64_t) {}

  EVA_BF16 void multiply_columns(const uint32_t* columns, int64_t d, const uint32_t*, int64_t, int64_t pairs,
                                 int64_t first, int64_t count, int64_t right, int wide, float* out) const {
    for (int64_t i = 0; i < count; i += kTall)
      kTiles<false>[wide]({columns + first + i, 1, d, columns + right, d, pairs, out + i * kColumns, kColumns, kTall,
                           0xffff, 1});
  }
};

// Rows in float32 are multiplied as such, for all of their precision.
void gram_accumulate(const GramTask& task, int threads) {
  task.is_float32 ? avx512::code().gram(task, threads) : accumulate_triangle<Triangle<Dots>>(task, threads);
}

Code code() {
  Code own = avx512::code();
  own.subspace = &accumulate_in_blocks<Block<Dots>>;
  own.gram = &gram_accumulate;
  own.project = &project_rows<Dots>;
  own.outer = &add_outer<Dots>;
  return own;
}

}  // namespace avx512bf16
}  // namespace eva

#endif
