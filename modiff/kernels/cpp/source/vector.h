// A vector of floats of the instruction set at hand (Wide), and one of a single float (One) for what remains of a row.
#pragma once

namespace {

#if MODIFF_AVX512
struct Wide {
  using F = __m512;
  static constexpr int width = 16;
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static F set(float x) { return _mm512_set1_ps(x); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F round(F a) { return _mm512_roundscale_ps(a, 0x08); }
  static F ceil(F a) { return _mm512_roundscale_ps(a, 0x0A); }
  static F floor(F a) { return _mm512_roundscale_ps(a, 0x09); }
  static F pow2(F a) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(a), _mm512_set1_epi32(127)), 23)); }
  static float low(F a) { return _mm512_reduce_min_ps(a); }
  static float high(F a) { return _mm512_reduce_max_ps(a); }
  static float sum(F a) { return _mm512_reduce_add_ps(a); }
  static F load_bf16(const uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
  }
  static void store_bf16(uint16_t* p, F x) {
    const __m512i bits = _mm512_castps_si512(x), one = _mm512_set1_epi32(1);
    const __m512i half = _mm512_add_epi32(_mm512_set1_epi32(0x7fff), _mm512_and_si512(_mm512_srli_epi32(bits, 16), one));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
    rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(rounded));
  }
  static F load_i16(const int16_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i*)p))); }
  static void store_i16(int16_t* p, F x) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(x))); }
  static void store_u8(uint8_t* p, F x) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x))); }
};
#else
struct Wide {
  using F = __m256;
  static constexpr int width = 8;
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static F set(float x) { return _mm256_set1_ps(x); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F round(F a) { return _mm256_round_ps(a, 0x08); }
  static F ceil(F a) { return _mm256_round_ps(a, 0x0A); }
  static F floor(F a) { return _mm256_round_ps(a, 0x09); }
  static F pow2(F a) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(a), _mm256_set1_epi32(127)), 23)); }
  static float low(F a) { return fold(a, [](float x, float y) { return x < y ? x : y; }); }
  static float high(F a) { return fold(a, [](float x, float y) { return x > y ? x : y; }); }
  static float sum(F a) { return fold(a, [](float x, float y) { return x + y; }); }
  template <class Op>
  static float fold(F a, Op op) {
    float x[8];
    store(x, a);
    for (int i = 1; i < 8; i++) x[0] = op(x[0], x[i]);
    return x[0];
  }
  static F load_bf16(const uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
  }
  static void store_bf16(uint16_t* p, F x);
  static F load_i16(const int16_t* p) { return _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i*)p))); }
  static __m128i narrow(F x) {
    const __m256i n = _mm256_cvtps_epi32(x);
    return _mm_packs_epi32(_mm256_castsi256_si128(n), _mm256_extracti128_si256(n, 1));
  }
  static void store_i16(int16_t* p, F x) { _mm_storeu_si128((__m128i*)p, narrow(x)); }
  static void store_u8(uint8_t* p, F x) { _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(narrow(x), _mm_setzero_si128())); }
};
#endif

struct One {
  using F = float;
  static constexpr int width = 1;
  static F load(const float* p) { return *p; }
  static void store(float* p, F x) { *p = x; }
  static F set(float x) { return x; }
  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F mul(F a, F b) { return a * b; }
  static F div(F a, F b) { return a / b; }
  static F fma(F a, F b, F c) { return __builtin_fmaf(a, b, c); }
  static F min(F a, F b) { return a < b ? a : b; }
  static F max(F a, F b) { return a > b ? a : b; }
  static F round(F a) { return __builtin_nearbyintf(a); }
  static F ceil(F a) { return __builtin_ceilf(a); }
  static F floor(F a) { return __builtin_floorf(a); }
  static F pow2(F a) {
    const uint32_t bits = (uint32_t)((int32_t)a + 127) << 23;
    float x;
    memcpy(&x, &bits, 4);
    return x;
  }
  static float low(F a) { return a; }
  static float high(F a) { return a; }
  static float sum(F a) { return a; }
  static F load_bf16(const uint16_t* p) {
    const uint32_t bits = (uint32_t)*p << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
  }
  static void store_bf16(uint16_t* p, F x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    *p = x != x ? 0x7fc0 : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
  static F load_i16(const int16_t* p) { return *p; }
  static void store_i16(int16_t* p, F x) { *p = (int16_t)x; }
  static void store_u8(uint8_t* p, F x) { *p = (uint8_t)(int)x; }
};

#if !MODIFF_AVX512
void Wide::store_bf16(uint16_t* p, F x) {
  float values[8];
  store(values, x);
  for (int i = 0; i < 8; i++) One::store_bf16(p + i, values[i]);
}
#endif

// Calls f<Wide> along `count` elements and f<One> for what remains.
template <class Body>
inline void along(int64_t count, Body body) {
  int64_t i = 0;
  for (; i + Wide::width <= count; i += Wide::width) body(Wide(), i);
  for (; i < count; i++) body(One(), i);
}

// exp(x), to about 2 units in the last place; x is clamped to -87..88.
template <class V>
inline typename V::F exponential(typename V::F x) {
  x = V::min(V::max(x, V::set(-87.0f)), V::set(88.0f));
  const auto n = V::round(V::mul(x, V::set(1.44269504088896341f)));
  auto r = V::fma(n, V::set(-0.693359375f), x);
  r = V::fma(n, V::set(2.12194440e-4f), r);
  auto p = V::set(1.9875691500e-4f);
  p = V::fma(p, r, V::set(1.3981999507e-3f));
  p = V::fma(p, r, V::set(8.3334519073e-3f));
  p = V::fma(p, r, V::set(4.1665795894e-2f));
  p = V::fma(p, r, V::set(1.6666665459e-1f));
  p = V::fma(p, r, V::set(5.0000001201e-1f));
  p = V::add(V::fma(V::mul(r, r), p, r), V::set(1.0f));
  return V::mul(p, V::pow2(n));
}

template <class V>
inline typename V::F logistic(typename V::F x) {
  const auto one = V::set(1.0f);
  return V::div(one, V::add(one, exponential<V>(V::sub(V::set(0.0f), x))));
}

// erf by Abramowitz and Stegun 7.1.26 has an error of 1.5e-7, below that of a float near 1.
template <class V>
inline typename V::F normal_cdf(typename V::F x) {
  const auto one = V::set(1.0f), zero = V::set(0.0f);
  const auto magnitude = V::max(x, V::sub(zero, x));
  const auto z = V::mul(magnitude, V::set(0.70710678118654752f));
  const auto t = V::div(one, V::fma(z, V::set(0.3275911f), one));
  auto p = V::set(1.061405429f);
  p = V::fma(p, t, V::set(-1.453152027f));
  p = V::fma(p, t, V::set(1.421413741f));
  p = V::fma(p, t, V::set(-0.284496736f));
  p = V::mul(V::fma(p, t, V::set(0.254829592f)), t);
  const auto tail = V::mul(V::set(0.5f), V::mul(p, exponential<V>(V::sub(zero, V::mul(z, z)))));
  const auto upper = V::sub(one, tail);  // for x >= 0; the tail itself below
  const auto positive = V::min(one, V::max(zero, V::mul(x, V::set(3.4e38f))));
  return V::fma(positive, V::sub(upper, tail), tail);
}

}  // namespace
