// Products of unsigned codes and signed weights by AVX512-VNNI: exact 32-bit sums, the epilogue applied in registers.
#pragma once

namespace {

constexpr int kRows = 6;  // 6 rows x 4 vectors of channels: 24 sums, 4 weights and a code fit 32 registers
constexpr int kSegments = 64;

// One tile. `segments`: runs of codes that are contiguous for every row (a line of the kernel, or one of its places).
template <int NR>
inline void tile(const uint8_t* const* rows, const int64_t* offsets, int segments, int64_t quads, const int8_t* weight,
                 const int32_t* start, const float* weight_scale, int64_t row, int64_t valid, int64_t channel,
                 int64_t channels, const Epilogue& e) {
  __m512i sums[kRows][NR];
  for (int j = 0; j < NR; j++) {
    const __m512i first = _mm512_loadu_si512(start + channel + 16 * j);
    for (int r = 0; r < kRows; r++) sums[r][j] = first;
  }
  // What the epilogue reads arrives while the sums are made.
  for (int r = 0; r < valid; r++) {
    for (int j = 0; j < NR; j++) {
      const int64_t at = (row + r) * channels + channel + 16 * j;
      if (e.o_hat) _mm_prefetch((const char*)(e.o_hat + at), _MM_HINT_T0);
      if (e.residual && e.residual_type == kFloat) _mm_prefetch((const char*)e.residual + 4 * at, _MM_HINT_T0);
      if (e.residual && e.residual_type == kBFloat16 && j % 2 == 0) _mm_prefetch((const char*)e.residual + 2 * at, _MM_HINT_T0);
    }
  }
  for (int s = 0; s < segments; s++) {
    const uint8_t* p[kRows];
    for (int r = 0; r < kRows; r++) p[r] = rows[r] + offsets[s];
    for (int64_t k = 0; k < quads; k++) {
      __m512i w[NR];
      for (int j = 0; j < NR; j++) w[j] = _mm512_loadu_si512(weight + 64 * j);
      weight += 64 * NR;
#pragma GCC unroll 6
      for (int r = 0; r < kRows; r++) {
        int four;
        memcpy(&four, p[r] + 4 * k, 4);
        const __m512i codes = _mm512_set1_epi32(four);
#pragma GCC unroll 4
        for (int j = 0; j < NR; j++) sums[r][j] = _mm512_dpbusd_epi32(sums[r][j], codes, w[j]);
      }
    }
  }
  for (int r = 0; r < valid; r++) {
    for (int j = 0; j < NR; j++) {
      const int64_t c = channel + 16 * j;
      if (e.zeros) {  // the sums begin as if 0 were code 128; what is left to take off is a multiple of the weight's sum
        const int32_t left = 128 - (int32_t)e.zeros[(row + r) / e.rows_per_set];
        const __m512i minus_weights = _mm512_srai_epi32(_mm512_loadu_si512(start + c), 7);
        sums[r][j] = _mm512_sub_epi32(sums[r][j], _mm512_mullo_epi32(minus_weights, _mm512_set1_epi32(left)));
      }
      const __m512 sum = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[r][j]), _mm512_loadu_ps(weight_scale + c));
      if (c + 16 <= channels) {
        epilogue<Wide>(sum, row + r, channels, c, e);
      } else {
        float rest[16];
        _mm512_storeu_ps(rest, sum);
        for (int64_t k = 0; c + k < channels; k++) epilogue<One>(rest[k], row + r, channels, c + k, e);
      }
    }
  }
}

void product(const uint8_t* codes, const int8_t* weight, const int32_t* start, const float* weight_scale,
             const Geometry& g, int64_t block, int64_t begin, int64_t end, const Epilogue& e) {
  const bool lines = g.dilation_x == 1;
  const int segments = (int)(g.kernel_y * (lines ? 1 : g.kernel_x));
  const int64_t quads = g.padded_channels / 4 * (lines ? g.kernel_x : 1);
  int64_t offsets[kSegments];
  for (int s = 0; s < segments; s++) {
    const int64_t ky = lines ? s : s / g.kernel_x, kx = lines ? 0 : s % g.kernel_x;
    offsets[s] = (ky * g.dilation_y * g.padded_width + kx * g.dilation_x) * g.padded_channels;
  }
  const int64_t channel = block * kBlock, left = g.out_channels - channel;
  const int vectors = left >= kBlock ? 4 : (int)((left + 15) / 16);
  const int8_t* panel = weight + channel * segments * quads * 4;
  const int64_t area = g.out_height * g.out_width;
  int64_t image = begin / area, y = begin % area / g.out_width, x = begin % g.out_width;
  for (int64_t row = begin; row < end; row += kRows) {
    const uint8_t* rows[kRows];
    const int64_t valid = end - row < kRows ? end - row : kRows;
    for (int r = 0; r < kRows; r++) {
      if (r >= valid) {
        rows[r] = rows[r - 1];
        continue;
      }
      rows[r] = codes + ((image * g.padded_height + y * g.stride_y) * g.padded_width + x * g.stride_x) * g.padded_channels;
      if (++x == g.out_width) {
        x = 0;
        if (++y == g.out_height) y = 0, image++;
      }
    }
    auto run = [&](auto size) {
      tile<decltype(size)::value>(rows, offsets, segments, quads, panel, start, weight_scale, row, valid, channel, g.out_channels, e);
    };
    switch (vectors) {
      case 4: run(Number<4>()); break;
      case 3: run(Number<3>()); break;
      case 2: run(Number<2>()); break;
      default: run(Number<1>());
    }
  }
}

}  // namespace
