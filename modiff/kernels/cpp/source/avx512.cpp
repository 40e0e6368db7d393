// AVX-512: the element-wise stages, and products where VNNI makes them exact (chosen at run time).
#include <cstdint>
#include <cstring>

#include "table.h"

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,prefer-vector-width=512")
#endif
#define MODIFF_AVX512 1
namespace {
template <int N>
struct Number {
  static constexpr int value = N;
};
}  // namespace
#include "vector.h"
#include "stages.h"
#include "product.h"

const modiff::Table* modiff::avx512() {
  static const Table table{"avx512_vnni", moments, load, difference, hold, codes, product, finish};
  return &table;
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
const modiff::Table* modiff::avx512() { return nullptr; }
#endif
