// What a generated activation may call. Approximations of a few ulp of fp32, which keep infinities and NaN.

inline V fast_exp(V x) { return V::blendv(x.exp_u20(), x, x.isnan()); }

inline V fast_sigmoid(V x) { return V(1.f) / (V(1.f) + fast_exp(x.neg())); }

template <int N>
inline V power(V x) {
  if constexpr (N == 1) {
    return x;
  } else if constexpr (N % 2) {
    return power<N - 1>(x) * x;
  } else {
    return power<N / 2>(x * x);
  }
}
