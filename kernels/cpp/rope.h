// A rotation of bfloat16 heads, an RMSNorm over each before it: a head is read, turned in float32 and written once.
//
// A token's tables are widened once for all its heads; of a head the rows of BLOCK tokens are written one after the other.
// Expects: BRAZE_IN_INTERLEAVED, BRAZE_OUT_INTERLEAVED, whether a pair's components lie side by side or half a rotation apart.

using V = at::vec::Vectorized<float>;
using B = at::vec::Vectorized<at::BFloat16>;
using T = at::BFloat16;
constexpr int64_t L = V::size();
constexpr int64_t MOST = 512;     // elements of a head
constexpr int64_t BLOCK = L < 8 ? L : 8;
constexpr int64_t GRAIN = 16384;  // elements for which another thread pays

// One row of a table: n numbers, `step` apart, in float32 or bfloat16; as it lies where that will do.
inline const float* row_of(const void* p, int64_t first, int64_t n, int64_t step, bool is_float, float* room) {
  if (is_float) {
    const float* q = static_cast<const float*>(p) + first;
    if (step == 1) return q;
    for (int64_t i = 0; i < n; ++i) room[i] = q[i * step];
  } else {
    const T* q = static_cast<const T*>(p) + first;
    int64_t i = 0;
    for (; step == 1 && i + 2 * L <= n; i += 2 * L) {
      auto [a, b] = at::vec::convert_bfloat16_float(B::loadu(q + i));
      a.store(room + i);
      b.store(room + i + L);
    }
    for (; i < n; ++i) room[i] = static_cast<float>(q[i * step]);
  }
  return room;
}

// What multiplies the first and the second component of each pair.
struct Pair {
  const float *a, *b;
};

inline Pair components(const float* row, int64_t half, bool wide, bool apart, float* room) {
  if (!wide) return {row, row};
  if (apart) return {row, row + half};
  for (int64_t i = 0; i < half; ++i) {
    room[i] = row[2 * i];
    room[half + i] = row[2 * i + 1];
  }
  return {room, room + half};
}

inline std::tuple<V, V> load(const T* p) { return at::vec::convert_bfloat16_float(B::loadu(p)); }
inline void store(T* p, V a, V b) { at::vec::convert_float_bfloat16(a, b).store(p); }

// The 2 * L pairs from `i` on.
struct Pairs {
  V a0, a1, b0, b1;
};

inline Pairs load_pairs(const T* x, int64_t i, int64_t half) {
#if BRAZE_IN_INTERLEAVED
  const auto [p, q] = load(x + 2 * i);
  const auto [r, s] = load(x + 2 * i + 2 * L);
  const auto [a0, b0] = at::vec::deinterleave2<float>(p, q);
  const auto [a1, b1] = at::vec::deinterleave2<float>(r, s);
#else
  const auto [a0, a1] = load(x + i);
  const auto [b0, b1] = load(x + half + i);
#endif
  return {a0, a1, b0, b1};
}

inline void store_pairs(T* out, int64_t i, int64_t half, const Pairs& v) {
#if BRAZE_OUT_INTERLEAVED
  const auto [p, q] = at::vec::interleave2<float>(v.a0, v.b0);
  const auto [r, s] = at::vec::interleave2<float>(v.a1, v.b1);
  store(out + 2 * i, p, q);
  store(out + 2 * i + 2 * L, r, s);
#else
  store(out + i, v.a0, v.a1);
  store(out + half + i, v.b0, v.b1);
#endif
}

inline int64_t place(int64_t i, int64_t j, int64_t half, bool interleaved) { return interleaved ? 2 * i + j : half * j + i; }

inline void turn(T* out, const T* x, int64_t half, Pair c, Pair s, float one, Pair weight, float sign, bool norm) {
  int64_t i = 0;
  const V signs(sign), scale(one);
  for (; i + 2 * L <= half; i += 2 * L) {
    Pairs v = load_pairs(x, i, half);
    if (norm) {
      v.a0 = v.a0 * scale * V::loadu(weight.a + i);
      v.a1 = v.a1 * scale * V::loadu(weight.a + i + L);
      v.b0 = v.b0 * scale * V::loadu(weight.b + i);
      v.b1 = v.b1 * scale * V::loadu(weight.b + i + L);
    }
    const V sa0 = signs * V::loadu(s.a + i), sa1 = signs * V::loadu(s.a + i + L);
    const V sb0 = signs * V::loadu(s.b + i), sb1 = signs * V::loadu(s.b + i + L);
    store_pairs(
        out, i, half,
        {v.a0 * V::loadu(c.a + i) - v.b0 * sa0, v.a1 * V::loadu(c.a + i + L) - v.b1 * sa1,
         v.b0 * V::loadu(c.b + i) + v.a0 * sb0, v.b1 * V::loadu(c.b + i + L) + v.a1 * sb1});
  }
  for (; i < half; ++i) {
    float a = x[place(i, 0, half, BRAZE_IN_INTERLEAVED)], b = x[place(i, 1, half, BRAZE_IN_INTERLEAVED)];
    if (norm) {
      a *= one * weight.a[i];
      b *= one * weight.b[i];
    }
    out[place(i, 0, half, BRAZE_OUT_INTERLEAVED)] = static_cast<T>(a * c.a[i] - b * sign * s.a[i]);
    out[place(i, 1, half, BRAZE_OUT_INTERLEAVED)] = static_cast<T>(b * c.b[i] + a * sign * s.b[i]);
  }
}

// n elements that do not turn.
inline void pass(T* out, const T* x, int64_t n, float scale, const float* weight, bool norm) {
  if (!norm) {
    std::memcpy(out, x, n * sizeof(T));
    return;
  }
  int64_t i = 0;
  for (; i + 2 * L <= n; i += 2 * L) {
    const auto [a, b] = load(x + i);
    store(out + i, a * V(scale) * V::loadu(weight + i), b * V(scale) * V::loadu(weight + i + L));
  }
  for (; i < n; ++i) out[i] = static_cast<T>(static_cast<float>(x[i]) * scale * weight[i]);
}

inline float mean_of_squares(const T* x, int64_t n) {
  V even(0.0f), odd(0.0f);
  int64_t i = 0;
  for (; i + 2 * L <= n; i += 2 * L) {
    const auto [a, b] = load(x + i);
    even = at::vec::fmadd(a, a, even);
    odd = at::vec::fmadd(b, b, odd);
  }
  float sum = at::vec::vec_reduce_all<float>([](V& a, V& b) { return a + b; }, even + odd);
  for (; i < n; ++i) sum += static_cast<float>(x[i]) * static_cast<float>(x[i]);
  return sum / static_cast<float>(n);
}

// Strides o, s are for (batch, token, head), a table's c, n for (batch, token, column). weight: as bfloat16 or float32, less
// `add`; norm: 0 none, 1 without a weight, 2 with one.
void rope(
    T* out, const T* x, const void* cos, const void* sin, const void* weight, int64_t batch, int64_t tokens, int64_t heads,
    int64_t size, int64_t start, int64_t half, const int64_t* o, const int64_t* s, const int64_t* c, const int64_t* n,
    bool cos_float, bool sin_float, bool wide, bool inverse, int64_t norm, bool weight_float, float add, float eps) {
  const int64_t blocks = (tokens + BLOCK - 1) / BLOCK, end = start + 2 * half, width = wide ? 2 * half : half;
  float scales[MOST], apart[MOST];  // the norm's weights: in order, and those that turn, by component
  for (int64_t i = 0; i < size; ++i) scales[i] = 1.0f;
  if (norm == 2) {
    const float* given = row_of(weight, 0, size, 1, weight_float, apart);
    for (int64_t i = 0; i < size; ++i) scales[i] = given[i] + add;
  }
  const Pair weights = components(scales + start, half, true, !BRAZE_IN_INTERLEAVED, apart);
#pragma omp parallel for if (batch * tokens * heads * size > GRAIN)
  for (int64_t task = 0; task < batch * blocks; ++task) {
    const int64_t i = task / blocks, first = task % blocks * BLOCK, count = std::min(BLOCK, tokens - first);
    float rooms[4][BLOCK][MOST];
    Pair cosines[BLOCK], sines[BLOCK];
    for (int64_t m = 0; m < count; ++m) {
      const int64_t t = first + m;
      const float* p = row_of(cos, i * c[0] + t * c[1], width, c[2], cos_float, rooms[0][m]);
      const float* q = row_of(sin, i * n[0] + t * n[1], width, n[2], sin_float, rooms[1][m]);
      cosines[m] = components(p, half, wide, !BRAZE_OUT_INTERLEAVED, rooms[2][m]);
      sines[m] = components(q, half, wide, !BRAZE_OUT_INTERLEAVED, rooms[3][m]);
    }
    for (int64_t h = 0; h < heads; ++h) {
      const T* head = x + i * s[0] + first * s[1] + h * s[2];
      float by[L];  // all rows' norms before the first is turned: none waits for its own
      for (int64_t m = 0; m < L; ++m) by[m] = norm && m < count ? mean_of_squares(head + m * s[1], size) : 1.0f;
      if (norm) (V(1.0f) / (V::loadu(by) + V(eps)).sqrt()).store(by);
      for (int64_t m = 0; m < count; ++m) {
        const T* from = head + m * s[1];
        T* to = out + i * o[0] + (first + m) * o[1] + h * o[2];
        const float scale = by[m];
        if (start) pass(to, from, start, scale, scales, norm);
        turn(to + start, from + start, half, cosines[m], sines[m], scale, weights, inverse ? -1.0f : 1.0f, norm);
        if (end < size) pass(to + end, from + end, size - end, scale, scales + end, norm);
      }
    }
  }
}
