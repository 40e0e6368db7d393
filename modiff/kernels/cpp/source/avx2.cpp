// AVX2 without exact 8-bit products: the element-wise stages; products are oneDNN's.
#include <cstdint>
#include <cstring>

#include "table.h"

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define MODIFF_AVX512 0
#include "vector.h"
#include "stages.h"

const modiff::Table* modiff::avx2() {
  static const Table table{"avx2", moments, load, difference, hold, codes, nullptr, finish};
  return &table;
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
const modiff::Table* modiff::avx2() { return nullptr; }
#endif
