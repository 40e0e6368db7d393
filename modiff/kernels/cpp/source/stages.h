// The element-wise stages over rows of channels: what stands before an operator, difference, range, codes, accumulation.
#pragma once

namespace {
using namespace modiff;

constexpr float kTop = 32767.0f;  // of an int16 reconstruction
constexpr int64_t kChunk = 2048;  // floats that are worked on at a time: they stay in the first cache

void load(const void* x, int type, int64_t begin, int64_t count, float* out) {
  if (type == kFloat) {
    memcpy(out, (const float*)x + begin, count * sizeof(float));
    return;
  }
  const uint16_t* half = (const uint16_t*)x + begin;
  along(count, [&](auto v, int64_t i) { decltype(v)::store(out + i, decltype(v)::load_bf16(half + i)); });
}

void moments(const void* x, int type, int64_t rows, int64_t channels, const float* pilot, double* sum, double* squares) {
  constexpr int64_t kRows = 64, kChannels = 4 * Wide::width;
  for (int64_t c0 = 0; c0 < channels; c0 += kChannels) {
    const int64_t count = channels - c0 < kChannels ? channels - c0 : kChannels;
    for (int64_t r0 = 0; r0 < rows; r0 += kRows) {
      const int64_t last = r0 + kRows < rows ? r0 + kRows : rows;
      along(count, [&](auto v, int64_t i) {
        using V = decltype(v);
        const auto shift = V::load(pilot + c0 + i);
        auto s = V::set(0.0f), q = V::set(0.0f);
        for (int64_t r = r0; r < last; r++) {
          const int64_t at = r * channels + c0 + i;
          const auto value = type == kFloat ? V::load((const float*)x + at) : V::load_bf16((const uint16_t*)x + at);
          const auto d = V::sub(value, shift);
          s = V::add(s, d);
          q = V::fma(d, d, q);
        }
        float parts[2][V::width];
        V::store(parts[0], s);
        V::store(parts[1], q);
        for (int k = 0; k < V::width; k++) {
          sum[c0 + i + k] += parts[0][k];
          squares[c0 + i + k] += parts[1][k];
        }
      });
    }
  }
}

template <class V>
inline typename V::F activate(typename V::F x, int act) {
  if (act == kSilu) return V::mul(x, logistic<V>(x));
  if (act == kGelu) return V::mul(x, normal_cdf<V>(x));
  // tanh form: x * logistic(2 * sqrt(2 / pi) * (x + 0.044715 x^3))
  const auto cube = V::mul(V::mul(x, x), x);
  const auto inner = V::mul(V::set(1.5957691216057308f), V::fma(V::set(0.044715f), cube, x));
  return V::mul(x, logistic<V>(inner));
}

void normalize(float* row, int64_t channels, float eps) {
  auto total = Wide::set(0.0f);
  float rest = 0;
  int64_t i = 0;
  for (; i + Wide::width <= channels; i += Wide::width) total = Wide::add(total, Wide::load(row + i));
  for (; i < channels; i++) rest += row[i];
  const float mean = (Wide::sum(total) + rest) / (float)channels;
  auto square = Wide::set(0.0f);
  rest = 0;
  for (i = 0; i + Wide::width <= channels; i += Wide::width) {
    const auto d = Wide::sub(Wide::load(row + i), Wide::set(mean));
    square = Wide::fma(d, d, square);
  }
  for (; i < channels; i++) rest += (row[i] - mean) * (row[i] - mean);
  const float inverse = 1.0f / __builtin_sqrtf((Wide::sum(square) + rest) / (float)channels + eps);
  along(channels, [&](auto v, int64_t k) {
    using V = decltype(v);
    V::store(row + k, V::mul(V::sub(V::load(row + k), V::set(mean)), V::set(inverse)));
  });
}

// Rows of the input as floats; of a gated one, the first half times gelu of the second.
void read(const void* x, int type, const Prologue& prologue, int64_t begin, int64_t rows, int64_t channels, float* y) {
  if (prologue.act != kGeglu) {
    load(x, type, begin * channels, rows * channels, y);
    return;
  }
  for (int64_t r = 0; r < rows; r++, y += channels) {
    const int64_t values = (begin + r) * 2 * channels, gates = values + channels;
    load(x, type, values, channels, y);
    along(channels, [&](auto v, int64_t i) {
      using V = decltype(v);
      const auto gate = type == kFloat ? V::load((const float*)x + gates + i) : V::load_bf16((const uint16_t*)x + gates + i);
      V::store(y + i, V::mul(V::load(y + i), activate<V>(gate, kGelu)));
    });
  }
}

void apply(const Prologue& prologue, float* y, int64_t begin, int64_t rows, int64_t channels) {
  for (int64_t r = 0; prologue.norm != kNoNorm && r < rows; r++) {
    float* row = y + r * channels;
    if (prologue.norm == kLayerNorm) normalize(row, channels, prologue.eps);
    const int64_t shift = (begin + r) / prologue.rows_per_sample * prologue.stride;
    const float *mul = prologue.mul ? prologue.mul + shift : nullptr, *add = prologue.add ? prologue.add + shift : nullptr;
    if (!mul && !add) continue;
    along(channels, [&](auto v, int64_t i) {
      using V = decltype(v);
      auto x = V::load(row + i);
      if (mul) x = V::mul(x, V::load(mul + i));
      if (add) x = V::add(x, V::load(add + i));
      V::store(row + i, x);
    });
  }
  if (prologue.act == kIdentity || prologue.act == kGeglu) return;
  along(rows * channels, [&](auto v, int64_t i) {
    using V = decltype(v);
    V::store(y + i, activate<V>(V::load(y + i), prologue.act));
  });
}

// The residual of `count` elements in place of the input, and its range; equations (13)'s difference.
void subtract(float* y, const Held& held, int64_t at, int64_t count, Range& range) {
  const float step = held.step, center = held.center;
  const float bottom = (center - kTop) * step, top = (center + kTop) * step;
  auto low = Wide::set(range.low), high = Wide::set(range.high), bad = Wide::set(0.0f);
  float low1 = range.low, high1 = range.high, bad1 = range.bad;
  along(count, [&](auto v, int64_t i) {
    using V = decltype(v);
    const auto value = V::load(y + i);
    auto d = value;
    if (held.values) {
      d = V::sub(value, V::load(held.values + at + i));
    } else if (held.numbers) {
      const auto number = V::load_i16(held.numbers + at + i);
      const auto inside = V::max(V::min(value, V::set(top)), V::set(bottom));
      d = V::sub(inside, V::mul(V::add(number, V::set(center)), V::set(step)));
    }
    V::store(y + i, d);
    if constexpr (V::width > 1) {
      low = V::min(d, low);
      high = V::max(d, high);
      bad = V::fma(value, V::set(0.0f), bad);
    } else {
      low1 = d < low1 ? d : low1;
      high1 = d > high1 ? d : high1;
      bad1 += value * 0.0f;
    }
  });
  const float low2 = Wide::low(low), high2 = Wide::high(high);
  range.low = low2 < low1 ? low2 : low1;
  range.high = high2 > high1 ? high2 : high1;
  range.bad = bad1 + Wide::sum(bad);
}

void difference(const void* x, int type, const Prologue& prologue, const Held& held, int64_t begin, int64_t rows,
                int64_t channels, float* d, Range& range) {
  const int64_t step = channels > kChunk ? 1 : kChunk / channels;
  for (int64_t r = 0; r < rows; r += step) {
    const int64_t count = r + step < rows ? step : rows - r;
    float* y = d + r * channels;
    read(x, type, prologue, begin + r, count, channels, y);
    apply(prologue, y, begin + r, count, channels);
    subtract(y, held, (begin + r) * channels, count * channels, range);
  }
}

// Without error compensation, the reconstruction is the input.
void hold(const void* x, int type, const Prologue& prologue, const Held& held, int64_t begin, int64_t rows,
          int64_t channels, float* y) {
  for (int64_t r = begin; r < begin + rows; r++) {
    read(x, type, prologue, r, 1, channels, y);
    apply(prologue, y, r, 1, channels);
    along(channels, [&](auto v, int64_t i) {
      using V = decltype(v);
      const auto value = V::load(y + i);
      if (held.values) {
        V::store(held.values + r * channels + i, value);
      } else {
        const auto nearest = V::sub(V::round(V::div(value, V::set(held.step))), V::set(held.center));
        V::store_i16(held.numbers + r * channels + i, V::max(V::min(nearest, V::set(kTop)), V::set(-kTop)));
      }
    });
  }
}

// Equation (4), and (13): codes of `count` elements, and the reconstruction advanced by them.
void encode(const float* d, const Held& held, const Quantizer& quantizer, float scale, float zero, int64_t at,
            int64_t count, uint8_t* out) {
  const float multiple = held.numbers ? __builtin_nearbyintf(scale / held.step) : 0;
  along(count, [&](auto v, int64_t i) {
    using V = decltype(v);
    const auto top = V::set(quantizer.top);
    auto code = V::round(V::div(V::load(d + i), V::set(scale)));
    if (quantizer.symmetric) {
      code = V::max(V::min(code, top), V::set(-quantizer.top));
    } else {
      code = V::sub(V::min(V::max(V::add(code, V::set(zero)), V::set(0.0f)), top), V::set(zero));
    }
    if (held.numbers) {
      int16_t* kept = held.numbers + at + i;
      const auto number = V::load_i16(kept), unit = V::set(multiple);
      const auto lowest = V::ceil(V::div(V::sub(V::set(-kTop), number), unit));
      const auto highest = V::floor(V::div(V::sub(V::set(kTop), number), unit));
      code = V::max(V::min(code, highest), lowest);
      if (held.compensates) V::store_i16(kept, V::add(number, V::mul(code, unit)));
    } else if (held.values && held.compensates) {
      float* kept = held.values + at + i;
      V::store(kept, V::fma(code, V::set(scale), V::load(kept)));
    }
    V::store_u8(out + i, V::add(code, V::set(quantizer.offset)));
  });
}

void codes(const float* d, const Held& held, const Quantizer& quantizer, float scale, float zero, int64_t begin,
           int64_t rows, const Geometry& g, uint8_t* out) {
  const int64_t end = begin + rows, area = g.height * g.width;
  for (int64_t row = begin; row < end;) {
    const int64_t image = row / area, y = row % area / g.width, x = row % g.width;
    int64_t count = g.width - x;
    count = row + count < end ? count : end - row;
    uint8_t* to = out + ((image * g.padded_height + y + g.pad_y) * g.padded_width + x + g.pad_x) * g.padded_channels;
    const float* from = d + (row - begin) * g.channels;
    if (g.channels == g.padded_channels) {
      encode(from, held, quantizer, scale, zero, row * g.channels, count * g.channels, to);
    } else {
      for (int64_t k = 0; k < count; k++)
        encode(from + k * g.channels, held, quantizer, scale, zero, (row + k) * g.channels, g.channels, to + k * g.padded_channels);
    }
    row += count;
  }
}

// Equation (14) and what follows it, on channels c.. of one row: `sum` is the product times the scales of the weight.
template <class V>
inline void epilogue(typename V::F sum, int64_t row, int64_t channels, int64_t c, const Epilogue& e) {
  const int64_t at = row * channels + c;
  auto o = V::mul(sum, V::set(e.scales[row / e.rows_per_set]));
  if (e.o_hat) {
    o = V::add(o, V::load(e.o_hat + at));
    V::store(e.o_hat + at, o);
  } else if (e.bias) {
    o = V::add(o, V::load(e.bias + c));
  }
  if (!e.out) return;
  if (e.gate) o = V::mul(o, V::load(e.gate + row / e.rows_per_sample * e.gate_stride + c));
  if (e.residual) {
    o = V::add(o, e.residual_type == kFloat ? V::load((const float*)e.residual + at) : V::load_bf16((const uint16_t*)e.residual + at));
  }
  if (e.factor != 1.0f) o = V::mul(o, V::set(e.factor));
  if (e.out_type == kFloat) {
    V::store((float*)e.out + at, o);
  } else {
    V::store_bf16((uint16_t*)e.out + at, o);
  }
}

void finish(const float* product, int64_t begin, int64_t end, int64_t channels, const Epilogue& e) {
  for (int64_t row = begin; row < end; row++) {
    along(channels, [&](auto v, int64_t c) {
      using V = decltype(v);
      epilogue<V>(V::load(product + row * channels + c), row, channels, c, e);
    });
  }
}

}  // namespace
