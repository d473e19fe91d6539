// Products of a few gathered rows with a block of one expert's columns, into a small fp32 tile.
//
// Two forms of the same product. Where a weight column is contiguous along K and rows are few, `dot` runs along K and
// reads weights in place, once. Otherwise columns are packed to a panel [K][NR] of 4-byte units (one float, or two
// bfloat16 for the CPU's own bf16 dot), which stays in L2 while all rows pass over it.
//
// Expects: Weight, the dtype of the weights; BRAZE_TRANSPOSED, whether they are [K, N] rather than [N, K].

using V = at::vec::Vectorized<float>;
constexpr int L = V::size();

#if BRAZE_BF16_WEIGHT && defined(__AVX512BF16__) && defined(CPU_CAPABILITY_AVX512)
#define BRAZE_PAIRED 1
using Operand = at::BFloat16;  // what activations are multiplied as
#else
#define BRAZE_PAIRED 0
using Operand = float;
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
constexpr int UNIT = BRAZE_PAIRED ? 2 : 1;  // elements along K in one 4-byte unit
constexpr int DOT_ROWS = BRAZE_DOT_ROWS;  // the most rows for which reading weights in place beats packing them
constexpr int TILE_ROWS = DOT_ROWS > MR ? DOT_ROWS : MR;
constexpr int TILE_COLUMNS = 2 * NR;

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
inline Step load_step(const at::BFloat16* p) { return _mm512_loadu_si512(p); }
inline Step load_step(const at::BFloat16* p, int count) {
  return _mm512_maskz_loadu_epi16((__mmask32)((uint64_t(1) << count) - 1), p);
}
#else
using Step = V;
inline V madd(Step a, Step b, V acc) { return at::vec::fmadd(a, b, acc); }
inline Step splat(const Operand* p) { return V(*p); }
inline Step splat_last(const Operand* p) { return V(*p); }
inline Step load_unit(const uint32_t* p) { return V::loadu(p); }
template <class T>
inline Step load_step(const T* p) { return load_wide(p); }
template <class T>
inline Step load_step(const T* p, int count) { return load_wide(p, count); }
#endif

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
  constexpr int S = L * UNIT;
  V acc[M][ND];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < ND; ++n) acc[m][n] = V(0.f);
  int64_t i = 0;
  for (; i + S <= k; i += S) {
    Step b[ND];
#pragma GCC unroll 8
    for (int n = 0; n < ND; ++n) {
      b[n] = load_step(w[n] + i);
      prefetch(w[n] + i + ahead);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Step a = load_step(rows[m] + i);
#pragma GCC unroll 8
      for (int n = 0; n < ND; ++n) acc[m][n] = madd(a, b[n], acc[m][n]);
    }
  }
  if (i < k) {
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < ND; ++n)
        acc[m][n] = madd(load_step(rows[m] + i, k - i), load_step(w[n] + i, k - i), acc[m][n]);
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
  const int64_t units = (w.k + UNIT - 1) / UNIT;
#if BRAZE_PAIRED
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
  for (int64_t u = 0; u < units; ++u, panel += NR) {
    const Weight* row = src + u * w.stride;
    prefetch(row + 16 * w.stride);
    for (int half = 0; half < 2; ++half) {
      const int left = std::clamp<int>(columns.count - half * L, 0, L);
      const V v = left == L ? load_wide(row + half * L) : load_wide(row + half * L, left);
      v.store(panel + half * L);
    }
  }
#endif
}
#else
// L columns x L units are transposed at a time; an edge, or a dtype to widen, passes through a buffer.
inline void pack(const Matrix& w, Columns columns, uint32_t* panel) {
  const int64_t units = (w.k + UNIT - 1) / UNIT;
  const int64_t pitch = columns.step * w.stride;
  constexpr bool direct = sizeof(Weight) * UNIT == 4;
  for (int64_t n = 0; n < NR; n += L) {
    const int64_t valid = std::clamp<int64_t>(columns.count - n, 0, L);
    for (int64_t u = 0; u < units; u += L) {
      const int64_t depth = std::min<int64_t>(L, units - u);
      float* dst = reinterpret_cast<float*>(panel) + u * NR + n;
      const Weight* src = valid > 0 ? w.column(columns.first + n * columns.step) + u * UNIT : nullptr;
      if (direct && valid == L && (u + L) * UNIT <= w.k && pitch % UNIT == 0) {
        for (int64_t j = 0; j < L; ++j) prefetch(src + j * pitch + 2 * L * UNIT);
        at::vec::transpose_mxn<float, L, L>(reinterpret_cast<const float*>(src), pitch / UNIT, dst, NR);
        continue;
      }
      alignas(64) float buffer[L][L] = {};
      for (int64_t j = 0; j < valid; ++j) {
        const int64_t elements = std::min<int64_t>(L * UNIT, w.k - u * UNIT);
        if constexpr (direct) {
          std::memcpy(buffer[j], src + j * pitch, elements * sizeof(Weight));
        } else {
          (elements == L ? load_wide(src + j * pitch) : load_wide(src + j * pitch, elements)).store(buffer[j]);
        }
      }
      alignas(64) float turned[L][L];
      at::vec::transpose_mxn<float, L, L>(&buffer[0][0], L, &turned[0][0], L);
      for (int64_t i = 0; i < depth; ++i) std::memcpy(dst + i * NR, turned[i], sizeof(turned[i]));
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
  const int64_t size = (w.k + UNIT - 1) / UNIT * NR;
  for (int g = 0; g < group_count; ++g) pack(w, groups[g], space.panels + g * size);
  const int64_t tiles = (count + MR - 1) / MR;
  for (int64_t t = 0, first = 0; t < tiles; ++t) {
    const int m = (count - first + tiles - t - 1) / (tiles - t);
    for (int g = 0; g < group_count; ++g)
      with_height<MR>(m, [&](auto height) {
        panel_tile<height()>(rows + first, space.panels + g * size, w.k, space.tile + g * NR);
      });
    done(first, m);
    first += m;
  }
}
