// Loads, stores and one step of a product, for each dtype of weights and each vector unit.
//
// Widened bfloat16 is multiplied in split order: of each 32 elements along K the even ones, then the odd ones, which a
// shift and a mask yield without a shuffle; activations are stored in the same order, padded with zeros.
//
// Expects load.h; Weight, the dtype of the weights; BRAZE_TRANSPOSED, whether they are [K, N] rather than [N, K].

#undef BRAZE_PAIRED
#undef BRAZE_SPLIT
#if BRAZE_BF16_WEIGHT && BRAZE_BF16_DOT && defined(__AVX512BF16__) && defined(CPU_CAPABILITY_AVX512)
#define BRAZE_PAIRED 1
using Operand = at::BFloat16;  // what activations are multiplied as
#else
#define BRAZE_PAIRED 0
using Operand = float;
#endif
#if BRAZE_BF16_WEIGHT && !BRAZE_PAIRED && !BRAZE_TRANSPOSED && defined(CPU_CAPABILITY_AVX512)
#define BRAZE_SPLIT 1
#else
#define BRAZE_SPLIT 0
#endif

#if BRAZE_AMX && !BRAZE_PAIRED  // its rows are pairs
#undef BRAZE_AMX
#define BRAZE_AMX 0
#endif

#if defined(CPU_CAPABILITY_AVX512)
constexpr int MR = 12;  // rows of a register tile of the panel form: 12 x 2 accumulators of 32 registers
constexpr int MD = 6;   // rows of a register tile of the dot form: 6 x 4 accumulators
#else
constexpr int MR = 6;
constexpr int MD = 2;
#endif
constexpr int STRIP_ROWS = 8;             // rows that one load of weights serves in the strip form
constexpr int ND = 4;                     // weight columns of a register tile of the dot form
constexpr int NR = 2 * L;                 // columns of a panel
constexpr int PARTS = BRAZE_SPLIT ? 2 : 1;  // vectors that one load of weights widens to
constexpr int UNIT = BRAZE_PAIRED ? 2 : 1;  // elements along K in one 4-byte unit
constexpr int ROWS_IN_PLACE = 12;         // the most rows for which packing weights does not pay: measured
constexpr int TILE_HEIGHT = 16;              // rows of a matrix unit's tile
constexpr int TILE_DEPTH = 32;               // bfloat16 in each
constexpr int BLOCK_ROWS = BRAZE_AMX ? 2 * TILE_HEIGHT : MR;  // rows multiplied together with packed columns
constexpr int TILE_ROWS = ROWS_IN_PLACE > BLOCK_ROWS ? ROWS_IN_PLACE : BLOCK_ROWS;
constexpr int PANELS = BRAZE_AMX ? 8 : BRAZE_TRANSPOSED ? 4 : 2;  // of a task that packs
constexpr int PANEL_COLUMNS = PANELS * NR;  // columns of a task that packs
constexpr int TILE_COLUMNS = BRAZE_TRANSPOSED ? 4096 : PANEL_COLUMNS;  // columns of a task that reads in place
constexpr int TILE_STRIDE = TILE_COLUMNS + L;  // rows a multiple of 4 KiB apart would compete for lines of the L1 cache
constexpr int GROUP = TILE_COLUMNS / 2;  // where the second group of columns lies in a tile

// Elements along K that are multiplied: in split order whole blocks.
constexpr int64_t depth(int64_t k) { return BRAZE_SPLIT ? (k + 2 * L - 1) / (2 * L) * (2 * L) : k; }

// Elements along K of a panel: whole tiles.
constexpr int64_t panel_depth(int64_t k) {
  return BRAZE_AMX ? (k + TILE_DEPTH - 1) / TILE_DEPTH * TILE_DEPTH : (depth(k) + UNIT - 1) / UNIT * UNIT;
}

// From one copied row to the next: not a multiple of 4 KiB, as above.
constexpr int64_t row_pitch(int64_t k) { return panel_depth(k) + TILE_DEPTH; }

inline float widen(float v) { return v; }
inline float widen(at::BFloat16 v) { return static_cast<float>(v); }
inline float widen(at::Half v) { return static_cast<float>(v); }

inline V load_wide(const float* p, int count) { return V::loadu(p, count); }
template <class T>
inline V load_wide(const T* p, int count) {
  float tmp[L] = {};
  for (int i = 0; i < count; ++i) tmp[i] = widen(p[i]);
  return V::loadu(tmp);
}

inline void store(float* p, V v, int count) { v.store(p, count); }
template <class T>
inline void store(T* p, V v, int count) {
#if BRAZE_PAIRED
  if (std::is_same_v<T, at::BFloat16> && count == L) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v));
    return;
  }
#endif
  float tmp[L];
  v.store(tmp);
  for (int i = 0; i < count; ++i) p[i] = static_cast<T>(tmp[i]);
}

// One step of a product: L lanes of UNIT products each, added to fp32.
#if BRAZE_PAIRED
using Step = __m512i;
inline V madd(Step a, Step b, V acc) { return V(_mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b)); }
inline Step splat(const Operand* p) {
  int32_t both;
  std::memcpy(&both, p, 4);
  return _mm512_set1_epi32(both);
}
inline Step splat_last(const Operand* p) { return _mm512_set1_epi32(p->x); }
inline Step load_unit(const uint32_t* p) { return _mm512_loadu_si512(p); }
inline Step load_operand(const Operand* p) { return _mm512_loadu_si512(p); }
inline __m512i load_some(const at::BFloat16* p, int count) {
  return _mm512_maskz_loadu_epi16((__mmask32)((uint64_t(1) << count) - 1), p);
}
inline Step load_operand(const Operand* p, int count) { return load_some(p, count); }
template <int Part>
inline Step load_part(const Weight* p) { return _mm512_loadu_si512(p); }
template <int Part>
inline Step load_part(const Weight* p, int count) { return load_some(p, count); }
#else
using Step = V;
inline V madd(Step a, Step b, V acc) { return at::vec::fmadd(a, b, acc); }
inline Step splat(const Operand* p) { return V(*p); }
inline Step splat_last(const Operand* p) { return V(*p); }
inline Step load_unit(const uint32_t* p) { return V::loadu(p); }
inline Step load_operand(const Operand* p) { return V::loadu(p); }
#if BRAZE_SPLIT
inline Step load_operand(const Operand* p, int) { return V::loadu(p); }  // padded with zeros
inline __m512i load_some(const at::BFloat16* p, int count) {
  return _mm512_maskz_loadu_epi16((__mmask32)((uint64_t(1) << count) - 1), p);
}
template <int Part>
inline V part(__m512i both) {
  return V(_mm512_castsi512_ps(
      Part == 0 ? _mm512_slli_epi32(both, 16) : _mm512_and_si512(both, _mm512_set1_epi32(0xffff0000))));
}
template <int Part>
inline Step load_part(const Weight* p) { return part<Part>(_mm512_loadu_si512(p)); }
template <int Part>
inline Step load_part(const Weight* p, int count) { return part<Part>(load_some(p, count)); }
#else
inline Step load_operand(const Operand* p, int count) { return V::loadu(p, count); }
template <int Part>
inline Step load_part(const Weight* p) { return load_wide(p); }
template <int Part>
inline Step load_part(const Weight* p, int count) { return load_wide(p, count); }
#endif
#endif

// f(0), f(1) ... as compile-time numbers, for each part of a load.
template <class F>
inline void each_part(F&& f) {
  f(std::integral_constant<int, 0>{});
  if constexpr (PARTS == 2) f(std::integral_constant<int, 1>{});
}

inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

// `count` columns of one expert's weight, every `step`-th from `first` on.
struct Columns {
  int64_t first, step, count;
};

// One expert's weight: element (k, n) at base[k * 1 + n * stride], or base[k * stride + n] where transposed.
struct Matrix {
  const Weight* base;
  int64_t stride;
  int64_t k;
  const Weight* column(int64_t n) const { return base + n * (BRAZE_TRANSPOSED ? 1 : stride); }
};

// A block of one expert's columns in one or two groups of as many, group i of w[i].
struct Block {
  Matrix w[2];
  Columns groups[2];
  int group_count;
};
