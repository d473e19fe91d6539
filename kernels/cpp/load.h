// A vector of float32 from numbers that are stored as float32, bfloat16 or float16; and heights known to the compiler.

using V = at::vec::Vectorized<float>;
constexpr int L = V::size();

inline V load_wide(const float* p) { return V::loadu(p); }
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

// Calls f with a compile-time height for `m` rows, 1..Max.
template <int Max, class F>
inline void with_height(int m, F&& f) {
  if constexpr (Max > 1) {
    if (m < Max) return with_height<Max - 1>(m, f);
  }
  f(std::integral_constant<int, Max>{});
}
