// Products of a few gathered rows with a block of one expert's columns, into a small fp32 tile.
//
// Two forms of the same product. Where a weight column is contiguous along K and rows are few, `dot` runs along K and
// reads weights in place, once. Otherwise columns are packed to a panel [K][NR] of 4-byte units (one float, or two
// bfloat16 for the CPU's own bf16 dot where that is the faster one), which stays in L2 while all rows pass over it.
//
// Widened bfloat16 is multiplied in split order: of each 32 elements along K the even ones, then the odd ones, which a
// shift and a mask yield without a shuffle; activations are stored in the same order, padded with zeros.
//
// Expects: Weight, the dtype of the weights; BRAZE_TRANSPOSED, whether they are [K, N] rather than [N, K].

using V = at::vec::Vectorized<float>;
constexpr int L = V::size();

#if BRAZE_BF16_WEIGHT && BRAZE_BF16_DOT && defined(__AVX512BF16__) && defined(CPU_CAPABILITY_AVX512)
#define BRAZE_PAIRED 1
using Operand = at::BFloat16;  // what activations are multiplied as
#else
#define BRAZE_PAIRED 0
using Operand = float;
#endif
#if BRAZE_BF16_WEIGHT && !BRAZE_PAIRED && defined(CPU_CAPABILITY_AVX512)
#define BRAZE_SPLIT 1
#else
#define BRAZE_SPLIT 0
#endif

#if defined(CPU_CAPABILITY_AVX512)
constexpr int MR = 12;  // rows of a register tile of the panel form: 12 x 2 accumulators of 32 registers
constexpr int MD = 6;   // rows of a register tile of the dot form: 6 x 4 accumulators
#else
constexpr int MR = 6;
constexpr int MD = 2;
#endif
constexpr int ND = 4;                     // weight columns of a register tile of the dot form
constexpr int NR = 2 * L;                 // columns of a panel
constexpr int PARTS = BRAZE_SPLIT ? 2 : 1;  // vectors that one load of weights widens to
constexpr int UNIT = BRAZE_PAIRED ? 2 : 1;  // elements along K in one 4-byte unit
constexpr int DOT_ROWS = BRAZE_DOT_ROWS;  // the most rows for which reading weights in place beats packing them
constexpr int TILE_ROWS = DOT_ROWS > MR ? DOT_ROWS : MR;
constexpr int TILE_COLUMNS = 2 * NR;

// Elements along K that are multiplied: in split order whole blocks.
constexpr int64_t depth(int64_t k) { return BRAZE_SPLIT ? (k + 2 * L - 1) / (2 * L) * (2 * L) : k; }

inline float widen(float v) { return v; }
inline float widen(at::BFloat16 v) { return static_cast<float>(v); }
inline float widen(at::Half v) { return static_cast<float>(v); }

inline V load_wide(const float* p) { return V::loadu(p); }
inline V load_wide(const float* p, int count) { return V::loadu(p, count); }
template <class T>
inline V load_wide(const T* p) {
  V v;
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    at::vec::load_fp32_from_bf16(p, v);
  } else {
    at::vec::load_fp32_from_fp16(p, v);
  }
  return v;
}
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

// The sums of the lanes of four vectors.
inline void sum4(const V* v, float* out) {
#if defined(CPU_CAPABILITY_AVX512)
  __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
  __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
  __m512 s = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  __m256 t = _mm256_add_ps(_mm512_castps512_ps256(s), _mm512_extractf32x8_ps(s, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1)));
#else
  for (int i = 0; i < 4; ++i) out[i] = at::vec::vec_reduce_all<float>([](V a, V b) { return a + b; }, v[i]);
#endif
}

// c[m][n] = rows[m] . columns[n] for M rows and ND columns, each contiguous along K; `ahead` columns on are prefetched.
template <int M>
inline void dot_tile(const Operand* const* rows, const Weight* const* w, int64_t k, int64_t ahead, float* c) {
  constexpr int S = L * UNIT * PARTS;
  V acc[M][ND];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < ND; ++n) acc[m][n] = V(0.f);
  int64_t i = 0;
  for (; i + S <= k; i += S) {
#pragma GCC unroll 8
    for (int n = 0; n < ND; ++n) prefetch(w[n] + i + ahead);
    each_part([&](auto part) {
      Step b[ND];
#pragma GCC unroll 8
      for (int n = 0; n < ND; ++n) b[n] = load_part<part()>(w[n] + i);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const Step a = load_operand(rows[m] + i + part() * L);
#pragma GCC unroll 8
        for (int n = 0; n < ND; ++n) acc[m][n] = madd(a, b[n], acc[m][n]);
      }
    });
  }
  if (i < k) {
    each_part([&](auto part) {
      for (int m = 0; m < M; ++m)
        for (int n = 0; n < ND; ++n)
          acc[m][n] = madd(
              load_operand(rows[m] + i + part() * L, k - i), load_part<part()>(w[n] + i, k - i), acc[m][n]);
    });
  }
  for (int m = 0; m < M; ++m) sum4(acc[m], c + m * TILE_COLUMNS);
}

// Calls f with a compile-time height for `m` rows, 1..Max.
template <int Max, class F>
inline void with_height(int m, F&& f) {
  if constexpr (Max > 1) {
    if (m < Max) return with_height<Max - 1>(m, f);
  }
  f(std::integral_constant<int, Max>{});
}

inline void dot_block(const Matrix& w, Columns columns, const Operand* const* rows, int count, float* c) {
  const int tiles = (count + MD - 1) / MD;
  for (int64_t n = 0; n < columns.count; n += ND) {
    const Weight* col[ND];
    for (int j = 0; j < ND; ++j) col[j] = w.column(columns.first + std::min(n + j, columns.count - 1) * columns.step);
    const int64_t ahead = n + ND < columns.count ? ND * columns.step * w.stride : 0;
    for (int t = 0, done = 0; t < tiles; ++t) {
      const int m = (count - done + tiles - t - 1) / (tiles - t);
      with_height<MD>(m, [&](auto height) {
        dot_tile<height()>(rows + done, col, w.k, t == 0 ? ahead : 0, c + done * TILE_COLUMNS + n);
      });
      done += m;
    }
  }
}

#if BRAZE_TRANSPOSED
// Rows of the weight are runs of columns already: widen them, or interleave two for pairs along K.
inline void pack(const Matrix& w, Columns columns, uint32_t* panel) {
  const Weight* src = w.column(columns.first);
#if BRAZE_PAIRED
  const int64_t units = (w.k + UNIT - 1) / UNIT;
  const __mmask32 valid = (__mmask32)((uint64_t(1) << columns.count) - 1);
  for (int64_t u = 0; u < units; ++u, panel += NR) {
    const __m512i even = _mm512_maskz_loadu_epi16(valid, src + 2 * u * w.stride);
    const __m512i odd = _mm512_maskz_loadu_epi16(2 * u + 1 < w.k ? valid : 0, src + (2 * u + 1) * w.stride);
    prefetch(src + (2 * u + 16) * w.stride);
    prefetch(src + (2 * u + 17) * w.stride);
    const __m512i lo = _mm512_or_si512(
        _mm512_cvtepu16_epi32(_mm512_castsi512_si256(even)),
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(odd)), 16));
    const __m512i hi = _mm512_or_si512(
        _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(even, 1)),
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(odd, 1)), 16));
    _mm512_storeu_si512(panel, lo);
    _mm512_storeu_si512(panel + L, hi);
  }
#else
  if (w.k < depth(w.k)) std::fill(panel + (depth(w.k) - 2 * L) * NR, panel + depth(w.k) * NR, 0);
  for (int64_t k = 0; k < w.k; ++k) {
    const Weight* row = src + k * w.stride;
    uint32_t* dst = panel + (BRAZE_SPLIT ? k / (2 * L) * (2 * L) + k % 2 * L + k % (2 * L) / 2 : k) * NR;
    prefetch(row + 16 * w.stride);
    for (int half = 0; half < 2; ++half) {
      const int left = std::clamp<int>(columns.count - half * L, 0, L);
      const V v = left == L ? load_wide(row + half * L) : load_wide(row + half * L, left);
      v.store(dst + half * L);
    }
  }
#endif
}
#else
constexpr int WORD = 4 / sizeof(Weight);  // weights in 4 bytes

// dst[u][j] = the u-th word of column j, for `valid` <= L columns and `elements` <= L * WORD weights each, else zero.
inline void transpose_words(const Weight* src, int64_t pitch, int64_t valid, int64_t elements, float* dst, int64_t ld) {
  if (valid == L && elements == L * WORD && pitch % WORD == 0)
    return at::vec::transpose_mxn<float, L, L>(reinterpret_cast<const float*>(src), pitch / WORD, dst, ld);
  alignas(64) float buffer[L][L] = {};
  for (int64_t j = 0; j < valid; ++j) std::memcpy(buffer[j], src + j * pitch, elements * sizeof(Weight));
  at::vec::transpose_mxn<float, L, L>(&buffer[0][0], L, dst, ld);
}

// L columns x L words are transposed at a time.
inline void pack(const Matrix& w, Columns columns, uint32_t* panel) {
  const int64_t pitch = columns.step * w.stride;
  for (int64_t n = 0; n < NR; n += L) {
    const int64_t valid = std::clamp<int64_t>(columns.count - n, 0, L);
    for (int64_t k = 0; k < w.k; k += L * WORD) {
      const int64_t elements = std::min<int64_t>(L * WORD, w.k - k);
      const Weight* src = w.column(columns.first + (valid > 0 ? n : 0) * columns.step) + k;
      for (int64_t j = 0; j < valid; ++j) prefetch(src + j * pitch + 2 * L * WORD);
      alignas(64) float words[L][L];
      transpose_words(src, pitch, valid, elements, &words[0][0], L);
      for (int u = 0; u < L; ++u) {
#if BRAZE_SPLIT
        const __m512i both = _mm512_load_si512(words[u]);
        part<0>(both).store(panel + (k + u) * NR + n);
        part<1>(both).store(panel + (k + L + u) * NR + n);
#else
        if (k + u * WORD >= w.k) break;
        if constexpr (UNIT == WORD) {
          V::loadu(words[u]).store(panel + (k / UNIT + u) * NR + n);
        } else {
          const Weight* pairs = reinterpret_cast<const Weight*>(words[u]);
          for (int i = 0; i < WORD && k + u * WORD + i < w.k; ++i) {
            alignas(64) Weight one[L];
            for (int j = 0; j < L; ++j) one[j] = pairs[j * WORD + i];
            load_wide(one).store(panel + (k + u * WORD + i) * NR + n);
          }
        }
#endif
      }
    }
  }
}
#endif

// c[m][0:NR] = rows[m] @ panel
template <int M>
inline void panel_tile(const Operand* const* rows, const uint32_t* panel, int64_t k, float* c) {
  V acc[M][2];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) acc[m][0] = acc[m][1] = V(0.f);
  int64_t i = 0;
  for (; i + UNIT <= k; i += UNIT, panel += NR) {
    const Step b0 = load_unit(panel), b1 = load_unit(panel + L);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const Step a = splat(rows[m] + i);
      acc[m][0] = madd(a, b0, acc[m][0]);
      acc[m][1] = madd(a, b1, acc[m][1]);
    }
  }
  if (i < k) {
    const Step b0 = load_unit(panel), b1 = load_unit(panel + L);
    for (int m = 0; m < M; ++m) {
      const Step a = splat_last(rows[m] + i);
      acc[m][0] = madd(a, b0, acc[m][0]);
      acc[m][1] = madd(a, b1, acc[m][1]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    acc[m][0].store(c + m * TILE_COLUMNS);
    acc[m][1].store(c + m * TILE_COLUMNS + L);
  }
}

// Where a product leaves its results, and its panels; one a thread.
struct Workspace {
  float* tile;       // [TILE_ROWS][TILE_COLUMNS]
  uint32_t* panels;  // [2][K / UNIT][NR]
};

// rows [count] times one or two groups of columns; group i lies at tile[:, i * NR :]. `done(first, count)` is called
// for each run of rows once the tile holds it.
template <class Done>
inline void multiply(
    const Matrix& w, const Columns* groups, int group_count, const Operand* const* rows, int64_t count,
    const Workspace& space, Done&& done) {
  if (!BRAZE_TRANSPOSED && count <= DOT_ROWS) {
    for (int g = 0; g < group_count; ++g) dot_block(w, groups[g], rows, count, space.tile + g * NR);
    done(0, count);
    return;
  }
  const int64_t size = (depth(w.k) + UNIT - 1) / UNIT * NR;
  for (int g = 0; g < group_count; ++g) pack(w, groups[g], space.panels + g * size);
  const int64_t tiles = (count + MR - 1) / MR;
  for (int64_t t = 0, first = 0; t < tiles; ++t) {
    const int m = (count - first + tiles - t - 1) / (tiles - t);
    for (int g = 0; g < group_count; ++g)
      with_height<MR>(m, [&](auto height) {
        panel_tile<height()>(rows + first, space.panels + g * size, depth(w.k), space.tile + g * NR);
      });
    done(first, m);
    first += m;
  }
}
