// The operators of modiff's C++ backend: drivers that share the work among threads, and what PyTorch sees.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <limits>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "scratch.h"
#include "table.h"

namespace {
using namespace modiff;
using at::Tensor;
using Optional = std::optional<Tensor>;

const Table* table() {
#if defined(__x86_64__)
  static const Table* found = [] {
    __builtin_cpu_init();
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni");
    const char* most = getenv("ONEDNN_MAX_CPU_ISA");  // one switch for both, as oneDNN's own
    const std::string isa = most ? most : "";
    const bool narrow = isa == "AVX2" || isa == "SSE41" || isa == "AVX" || isa == "avx2";
    if (wide && !narrow) return avx512();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? avx2() : nullptr;
  }();
  return found;
#else
  return nullptr;
#endif
}

constexpr int64_t kOffset = 128;  // the code that stands for 0 in the products that are made here

struct Plan {
  Tensor weight, start, scale, zero;  // start: minus kOffset times the sums of the weight
  std::vector<int64_t> kernel, stride, padding, dilation;
  int64_t out = 0, groups = 1;
  bool linear = false, own = false;
};

std::mutex plans_mutex;
std::unordered_map<int64_t, std::shared_ptr<Plan>> plans;
int64_t next_plan = 0;

std::shared_ptr<Plan> find(int64_t handle) {
  const std::lock_guard<std::mutex> lock(plans_mutex);
  const auto found = plans.find(handle);
  TORCH_CHECK(found != plans.end(), "modiff: no operator is prepared under handle ", handle, ".");
  return found->second;
}

void release(int64_t handle) {
  const std::lock_guard<std::mutex> lock(plans_mutex);
  plans.erase(handle);
}

// Blocks of 64 output channels; inside: places of the kernel, quads of input channels, channels, the four of a quad.
void pack(Plan& plan, const Tensor& codes) {
  const int64_t out = plan.out, in = codes.size(1), places = codes.numel() / (out * in), quads = (in + 3) / 4;
  const int64_t padded = (out + 15) / 16 * 16;
  plan.weight = at::zeros({padded * places * quads * 4}, at::kChar);
  plan.start = at::zeros({padded}, at::kInt);
  const Tensor scale = plan.scale;
  plan.scale = at::zeros({padded}, at::kFloat);
  const int8_t* from = codes.const_data_ptr<int8_t>();
  int8_t* to = plan.weight.mutable_data_ptr<int8_t>();
  int32_t* start = plan.start.mutable_data_ptr<int32_t>();
  for (int64_t o = 0; o < out; o++) {
    plan.scale.mutable_data_ptr<float>()[o] = scale.const_data_ptr<float>()[o];
    const int64_t block = o / kBlock, inside = o % kBlock, left = padded - block * kBlock;
    const int64_t width = left < kBlock ? left : kBlock;
    int8_t* panel = to + block * kBlock * places * quads * 4;
    int64_t sum = 0;
    for (int64_t i = 0; i < in; i++) {
      for (int64_t p = 0; p < places; p++) {
        const int8_t code = from[(o * in + i) * places + p];
        sum += code;
        panel[((p * quads + i / 4) * width + inside) * 4 + i % 4] = code;
      }
    }
    start[o] = (int32_t)(-kOffset * sum);
  }
}

// codes: int8 [out, in / groups, (kernel)]; packed: as oneDNN has it, for products that are not made here.
int64_t prepare(const Tensor& codes, const Tensor& scale, const Optional& packed, at::IntArrayRef stride,
                at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  TORCH_CHECK(codes.scalar_type() == at::kChar && codes.is_contiguous(), "modiff: weight codes are contiguous int8.");
  auto plan = std::make_shared<Plan>();
  plan->linear = codes.dim() == 2;
  plan->out = codes.size(0);
  plan->groups = groups;
  plan->scale = scale.contiguous();
  plan->kernel = plan->linear ? std::vector<int64_t>{1, 1} : codes.sizes().slice(2).vec();
  plan->stride = plan->linear ? std::vector<int64_t>{1, 1} : stride.vec();
  plan->padding = plan->linear ? std::vector<int64_t>{0, 0} : padding.vec();
  plan->dilation = plan->linear ? std::vector<int64_t>{1, 1} : dilation.vec();
  plan->own = !packed.has_value();
  if (plan->own) {
    TORCH_CHECK(table() && table()->product && groups == 1, "modiff: this product is oneDNN's.");
    pack(*plan, codes);
  } else {
    plan->weight = *packed;
    plan->zero = at::zeros({plan->out}, at::kInt);
  }
  const std::lock_guard<std::mutex> lock(plans_mutex);
  plans[next_plan] = plan;
  return next_plan++;
}

// gated: the input of a Linear has twice its channels: values, and what gates them.
Geometry geometry(const Plan& plan, const Tensor& x, bool gated = false) {
  Geometry g{};
  const bool linear = plan.linear;
  TORCH_CHECK(!gated || (linear && x.size(-1) % 2 == 0), "modiff: a gated input is a Linear's, and has two halves.");
  g.images = linear ? 1 : x.size(0);
  g.channels = linear ? x.size(-1) / (gated ? 2 : 1) : x.size(1);
  g.height = linear ? 1 : x.size(2);
  g.width = linear ? (g.channels ? x.numel() / x.size(-1) : 0) : x.size(3);
  g.padded_channels = plan.own ? (g.channels + 3) / 4 * 4 : g.channels;
  g.pad_y = plan.padding[0], g.pad_x = plan.padding[1];
  g.kernel_y = plan.kernel[0], g.kernel_x = plan.kernel[1];
  g.stride_y = plan.stride[0], g.stride_x = plan.stride[1];
  g.dilation_y = plan.dilation[0], g.dilation_x = plan.dilation[1];
  g.out_height = (g.height + 2 * g.pad_y - g.dilation_y * (g.kernel_y - 1) - 1) / g.stride_y + 1;
  g.out_width = (g.width + 2 * g.pad_x - g.dilation_x * (g.kernel_x - 1) - 1) / g.stride_x + 1;
  g.out_channels = plan.out;
  if (!plan.own) g.pad_y = g.pad_x = 0;  // oneDNN pads by itself
  g.padded_height = g.height + 2 * g.pad_y;
  g.padded_width = g.width + 2 * g.pad_x;
  return g;
}

int type_of(const Tensor& x) {
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, "modiff: float32 or bfloat16, not ", x.scalar_type(), ".");
  return x.scalar_type() == at::kFloat ? kFloat : kBFloat16;
}

void check_layout(const Tensor& x, bool linear) {
  TORCH_CHECK(x.is_contiguous(linear ? at::MemoryFormat::Contiguous : at::MemoryFormat::ChannelsLast),
              "modiff: the C++ operators read rows of channels.");
}

// What stands before the operator, as tensors. shift: added to the input of a group norm, per sample and channel.
struct Before {
  int64_t norm, act, groups;
  Optional mul, add, shift;
  double eps;
};

struct Work {
  const Table* kernels;
  Prologue prologue;
  Held held;
  Quantizer quantizer;
  Geometry g;
  const void* x;
  int type;
  int64_t sets, rows, channels, samples;
  float clip, factor;
  const float *fixed_scale, *fixed_zero;
  int64_t fixed_stride;
  bool keeps_zero;  // the codes keep their zero point, which the product takes off
  uint8_t* codes;
  float *scales, *zeros;
  float* bads;
};

// The scale of a set, and its zero point: the float definition's arithmetic, operation by operation.
void scale_of(const Work& w, int64_t set, float low, float high, float& scale, float& zero) {
  constexpr float smallest = std::numeric_limits<float>::min();
  const bool whole = w.held.numbers != nullptr;
  auto in_steps = [&](float s) {
    if (!whole) return s;
    const float most = std::ceil((2 * 32767.0f) / w.quantizer.top), n = std::nearbyint(s / w.held.step);
    return std::min(std::max(n, 1.0f), most) * w.held.step;
  };
  zero = 0;
  if (w.fixed_scale) {
    const float given = w.fixed_scale[set * w.fixed_stride];
    scale = in_steps(given);
    if (!w.fixed_zero) return;
    zero = w.fixed_zero[set * w.fixed_stride];
    if (whole) zero = std::nearbyint(given * zero / scale);
    return;
  }
  if (w.quantizer.symmetric) {
    scale = std::max(-low, high) * w.factor;
    scale = in_steps(scale < smallest ? 1.0f : scale);
    return;
  }
  low = std::min(low, 0.0f) * w.clip, high = std::max(high, 0.0f) * w.clip;
  scale = (high - low) / w.quantizer.top;
  scale = in_steps(scale < smallest ? 1.0f : scale);
  zero = std::min(std::max(std::nearbyint(-low / scale), 0.0f), w.quantizer.top);
}

Range empty_range() {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  return Range{infinity, -infinity, 0.0f};
}

void encode_set(const Work& w, int64_t set, Buffer& scratch);

void run_set(const Work& w, int64_t set, Buffer& scratch) {
  encode_set(w, set, scratch);
  if (!w.held.compensates) {
    static thread_local Buffer row;
    w.kernels->hold(w.x, w.type, w.prologue, w.held, set * w.rows, w.rows, w.channels, row.get<float>(w.channels));
  }
}

void encode_set(const Work& w, int64_t set, Buffer& scratch) {
  const int64_t first = set * w.rows, last = first + w.rows;
  float scale, zero;
  Quantizer quantizer = w.quantizer;
  Range range = empty_range();
  if (w.fixed_scale) {  // no range to wait for: codes follow while the difference is in the cache
    scale_of(w, set, 0, 0, scale, zero);
    if (w.keeps_zero) quantizer.offset = zero;
    const int64_t step = std::max<int64_t>(1, 4096 / std::max<int64_t>(1, w.channels)), threads = at::get_num_threads();
    std::vector<float> bad(threads + 1, 0.0f);
    at::parallel_for(first, last, w.rows / threads + step, [&](int64_t begin, int64_t end) {
      static thread_local Buffer small;
      float* d = small.get<float>(step * w.channels);
      Range own = empty_range();
      for (int64_t r = begin; r < end; r += step) {
        const int64_t stop = std::min(end, r + step);
        w.kernels->difference(w.x, w.type, w.prologue, w.held, r, stop - r, w.channels, d, own);
        w.kernels->codes(d, w.held, quantizer, scale, zero, r, stop - r, w.g, w.codes);
      }
      bad[std::min<int64_t>(threads, at::get_thread_num())] += own.bad;
    });
    for (const float value : bad) range.bad += value;
    w.scales[set] = scale, w.zeros[set] = zero;
    w.bads[set] = range.bad;
    return;
  }
  float* d = scratch.get<float>(w.rows * w.channels);
  const int64_t threads = at::get_num_threads(), grain = std::max<int64_t>(1, (w.rows + threads - 1) / threads);
  std::vector<Range> ranges(threads + 1, empty_range());
  at::parallel_for(first, last, grain, [&](int64_t begin, int64_t end) {
    Range& own = ranges[std::min<int64_t>(threads, at::get_thread_num())];
    w.kernels->difference(w.x, w.type, w.prologue, w.held, begin, end - begin, w.channels, d + (begin - first) * w.channels, own);
  });
  for (const Range& part : ranges) {
    range.low = std::min(range.low, part.low), range.high = std::max(range.high, part.high), range.bad += part.bad;
  }
  scale_of(w, set, range.low, range.high, scale, zero);
  if (w.keeps_zero) quantizer.offset = zero;
  at::parallel_for(first, last, grain, [&](int64_t begin, int64_t end) {
    w.kernels->codes(d + (begin - first) * w.channels, w.held, quantizer, scale, zero, begin, end - begin, w.g, w.codes);
  });
  w.scales[set] = scale, w.zeros[set] = zero;
  w.bads[set] = range.bad + (range.high - range.low);
}

// Group norm as one factor and one summand for each sample and channel.
void group_norm(const Work& w, const Before& before, int64_t sample, float* mul, float* add) {
  const int64_t channels = w.channels, rows = w.prologue.rows_per_sample, at = sample * rows * channels;
  std::vector<float> pilot(channels);
  std::vector<double> sums(2 * channels, 0.0);
  w.kernels->load(w.x, w.type, at, channels, pilot.data());
  const char* base = (const char*)w.x + at * (w.type == kFloat ? 4 : 2);
  w.kernels->moments(base, w.type, rows, channels, pilot.data(), sums.data(), sums.data() + channels);
  const float* shift = before.shift ? before.shift->const_data_ptr<float>() + sample * channels : nullptr;
  const float* gamma = before.mul ? before.mul->const_data_ptr<float>() : nullptr;
  const float* beta = before.add ? before.add->const_data_ptr<float>() : nullptr;
  const int64_t size = channels / before.groups;
  for (int64_t group = 0; group < before.groups; group++) {
    double mean = 0, square = 0;
    for (int64_t c = group * size; c < (group + 1) * size; c++) mean += sums[c] / rows + pilot[c] + (shift ? shift[c] : 0.0f);
    mean /= size;
    for (int64_t c = group * size; c < (group + 1) * size; c++) {
      // Of (x - mean)^2, from the moments about the pilot.
      const double from = (double)pilot[c] + (shift ? shift[c] : 0.0f) - mean;
      square += (sums[channels + c] + 2 * from * sums[c]) / rows + from * from;
    }
    const double inverse = 1.0 / std::sqrt(std::max(square / size, 0.0) + before.eps);
    for (int64_t c = group * size; c < (group + 1) * size; c++) {
      const double factor = inverse * (gamma ? gamma[c] : 1.0f);
      mul[c] = (float)factor;
      add[c] = (float)(((shift ? shift[c] : 0.0f) - mean) * factor + (beta ? beta[c] : 0.0f));
    }
  }
}

void fill_border(const Geometry& g, int64_t image, uint8_t value, uint8_t* codes) {
  const int64_t line = g.padded_width * g.padded_channels, side = g.pad_x * g.padded_channels;
  uint8_t* at = codes + image * g.padded_height * line;
  for (int64_t y = 0; y < g.padded_height; y++, at += line) {
    if (y < g.pad_y || y >= g.pad_y + g.height) {
      memset(at, value, line);
    } else {
      memset(at, value, side);
      memset(at + line - side, value, side);
    }
  }
}

// Nanoseconds that callers spent before products and in them (with what follows), since they were last read.
std::atomic<int64_t> clocks[2];

struct Clock {
  std::atomic<int64_t>& total;
  std::chrono::steady_clock::time_point start = std::chrono::steady_clock::now();
  explicit Clock(int which) : total(clocks[which]) {}
  ~Clock() { total += std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - start).count(); }
};

std::tuple<double, double> read_clocks() { return {1e-9 * clocks[0].exchange(0), 1e-9 * clocks[1].exchange(0)}; }

struct Encoded {
  Tensor scale, zero, probe;
};

// The code of 0 in an image: its own where codes keep their zero point.
uint8_t border(const Tensor& zeros, int64_t offset, int64_t image) {
  if (offset >= 0) return (uint8_t)offset;
  return (uint8_t)zeros.const_data_ptr<float>()[zeros.numel() == 1 ? 0 : image];
}

// quantizer: symmetric, top, granularity (0 tensor, 1 sample, 2 token), offset (negative: codes keep their zero point),
// compensates.
Encoded encode_into(uint8_t* codes, const Geometry& g, const Tensor& x, const Optional& a_hat, const Optional& step, const Optional& center,
                    const Optional& fixed_scale, const Optional& fixed_zero, at::IntArrayRef q, double clip,
                    const Before& before, bool linear) {
  const Clock clock(0);
  TORCH_CHECK(table(), "modiff: this CPU has no AVX2.");
  check_layout(x, linear);
  Work w{};
  w.kernels = table();
  w.x = x.const_data_ptr();
  w.type = type_of(x);
  w.g = g;
  w.channels = g.channels;
  const int64_t all = g.images * g.height * g.width;
  w.samples = linear && x.dim() < 2 ? 1 : x.size(0);
  w.sets = q[2] == 0 ? 1 : q[2] == 1 ? w.samples : all;
  w.rows = w.sets ? all / w.sets : 0;
  w.quantizer = {q[0] != 0, (float)q[1], (float)q[3]};
  w.keeps_zero = q[3] < 0;
  w.clip = (float)clip, w.factor = (float)(clip / (double)q[1]);
  if (a_hat) {
    check_layout(*a_hat, linear);
    TORCH_CHECK(before.act == kGeglu ? a_hat->numel() == all * g.channels : a_hat->sizes() == x.sizes(),
                "modiff: the reconstruction has another shape than the input.");
    w.held.compensates = q[4] != 0;
    if (step) {
      w.held.numbers = a_hat->mutable_data_ptr<int16_t>();
      w.held.step = *step->const_data_ptr<float>(), w.held.center = *center->const_data_ptr<float>();
    } else {
      w.held.values = a_hat->mutable_data_ptr<float>();
    }
  }
  if (fixed_scale) {
    w.fixed_scale = fixed_scale->const_data_ptr<float>();
    w.fixed_zero = fixed_zero ? fixed_zero->const_data_ptr<float>() : nullptr;
    w.fixed_stride = fixed_scale->numel() == 1 ? 0 : 1;
  }
  w.codes = codes;
  const Tensor scale = at::empty({w.sets}, at::kFloat);
  const Tensor zero = at::empty({w.sets}, at::kFloat), bad = at::empty({w.sets}, at::kFloat);
  w.scales = scale.mutable_data_ptr<float>(), w.zeros = zero.mutable_data_ptr<float>(), w.bads = bad.mutable_data_ptr<float>();
  w.prologue.norm = (int)before.norm, w.prologue.act = (int)before.act, w.prologue.eps = (float)before.eps;
  w.prologue.rows_per_sample = w.samples ? std::max<int64_t>(1, all / w.samples) : 1;
  static thread_local Buffer norms;
  float* made = nullptr;
  if (before.norm == kAffine) {
    made = norms.get<float>(2 * w.samples * w.channels);
    w.prologue.mul = made, w.prologue.add = made + w.samples * w.channels, w.prologue.stride = w.channels;
  } else if (before.norm == kLayerNorm) {
    w.prologue.mul = before.mul ? before.mul->const_data_ptr<float>() : nullptr;
    w.prologue.add = before.add ? before.add->const_data_ptr<float>() : nullptr;
    const int64_t given = before.mul ? before.mul->numel() : before.add ? before.add->numel() : 0;
    w.prologue.stride = given > w.channels ? w.channels : 0;
  }
  auto norm_of = [&](int64_t n) {
    group_norm(w, before, n, made + n * w.channels, made + (w.samples + n) * w.channels);
  };
  const bool together = w.sets == w.samples;
  if (made && !together) at::parallel_for(0, w.samples, 1, [&](int64_t b, int64_t e) { for (int64_t n = b; n < e; n++) norm_of(n); });
  auto run = [&](int64_t begin, int64_t end) {
    static thread_local Buffer scratch;
    for (int64_t set = begin; set < end; set++) {
      if (made && together) norm_of(set);
      run_set(w, set, scratch);
    }
  };
  if (w.sets >= at::get_num_threads()) {
    at::parallel_for(0, w.sets, std::max<int64_t>(1, 4096 / std::max<int64_t>(1, w.rows * w.channels)), run);
  } else {
    run(0, w.sets);
  }
  if (g.pad_x || g.pad_y) {
    at::parallel_for(0, g.images, 1, [&](int64_t b, int64_t e) { for (int64_t n = b; n < e; n++) fill_border(g, n, border(zero, q[3], n), codes); });
  }
  float total = 0;
  for (int64_t set = 0; set < w.sets; set++) total += w.bads[set];
  const Tensor probe = at::empty({}, at::kFloat);
  probe.mutable_data_ptr<float>()[0] = total;
  return {scale, zero, probe};
}

// What follows the product, as tensors.
struct After {
  Optional o_hat, bias, residual, gate;
  double factor;
  int64_t out_type;  // of the result: 0 float32, 1 bfloat16, -1: none, o_hat is read instead
};

Tensor call_onednn(const Plan& plan, const Tensor& codes, int64_t offset) {
  const auto name = plan.linear ? "onednn::qlinear_pointwise" : "onednn::qconv2d_pointwise";
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
  torch::jit::Stack stack;
  torch::jit::push(stack, codes, 1.0, offset, plan.weight, plan.scale, plan.zero, Optional());
  if (!plan.linear) torch::jit::push(stack, plan.stride, plan.padding, plan.dilation, plan.groups);
  c10::List<std::optional<at::Scalar>> none;
  torch::jit::push(stack, 1.0, (int64_t)0, std::optional<at::ScalarType>(at::kFloat), std::string("none"), none, std::optional<std::string>(std::string("")));
  op.callBoxed(&stack);
  Tensor product = torch::jit::pop(stack).toTensor();
  return product.contiguous(plan.linear ? at::MemoryFormat::Contiguous : at::MemoryFormat::ChannelsLast);
}

Tensor multiply_codes(const Plan& plan, const Geometry& g, const uint8_t* codes, const Tensor& plain, const Tensor& x,
                      const Tensor& scale, const Optional& zeros, int64_t granularity, int64_t offset, const After& after) {
  const Clock clock(1);
  std::vector<int64_t> sizes = x.sizes().vec();
  if (plan.linear) sizes.back() = plan.out;
  else sizes = {g.images, plan.out, g.out_height, g.out_width};
  const int64_t rows = plan.linear ? g.width : g.images * g.out_height * g.out_width;
  const auto layout = plan.linear ? at::MemoryFormat::Contiguous : at::MemoryFormat::ChannelsLast;
  Tensor out;
  Epilogue e{};
  if (after.out_type >= 0) {
    out = at::empty(sizes, at::TensorOptions(after.out_type == kBFloat16 ? at::kBFloat16 : at::kFloat).memory_format(layout));
    e.out = out.mutable_data_ptr(), e.out_type = (int)after.out_type;
  } else {
    out = at::empty({0}, at::kFloat);
  }
  const int64_t samples = plan.linear && x.dim() < 2 ? 1 : std::max<int64_t>(1, x.size(0));
  e.scales = scale.const_data_ptr<float>();
  e.rows_per_sample = std::max<int64_t>(1, rows / samples);
  e.rows_per_set = granularity == 0 ? std::max<int64_t>(1, rows) : granularity == 1 ? e.rows_per_sample : 1;
  e.factor = (float)after.factor;
  if (after.o_hat) {
    check_layout(*after.o_hat, plan.linear);
    TORCH_CHECK(after.o_hat->sizes() == at::IntArrayRef(sizes), "modiff: the held output has another shape than the product.");
    e.o_hat = after.o_hat->mutable_data_ptr<float>();
  }
  if (after.bias) e.bias = after.bias->const_data_ptr<float>();
  if (after.residual) {
    check_layout(*after.residual, plan.linear);
    TORCH_CHECK(after.residual->sizes() == at::IntArrayRef(sizes), "modiff: the residual has another shape than the product.");
    e.residual = after.residual->const_data_ptr(), e.residual_type = type_of(*after.residual);
  }
  if (after.gate) e.gate = after.gate->const_data_ptr<float>(), e.gate_stride = plan.out;
  TORCH_CHECK(!plan.own || zeros || offset == kOffset, "modiff: 0 is code ", kOffset, " here, not ", offset, ".");
  TORCH_CHECK(plan.own || !zeros, "modiff: codes with zero points of their own are for the products that are made here.");
  if (zeros) e.zeros = zeros->const_data_ptr<float>();
  if (!plan.own) {
    const Tensor product = call_onednn(plan, plain, offset);
    at::parallel_for(0, rows, std::max<int64_t>(1, 32768 / plan.out), [&](int64_t begin, int64_t end) {
      table()->finish(product.const_data_ptr<float>(), begin, end, plan.out, e);
    });
    return out;
  }
  const int64_t blocks = (plan.out + kBlock - 1) / kBlock, threads = at::get_num_threads();
  const int64_t parts = std::max<int64_t>(1, std::min((rows + 23) / 24, threads == 1 ? 1 : threads * 2));
  const int64_t chunk = ((rows + parts - 1) / parts + 5) / 6 * 6;
  at::parallel_for(0, blocks * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; item++) {
      const int64_t block = item / parts, first = item % parts * chunk, last = std::min(rows, first + chunk);
      if (first < last) {
        table()->product(codes, plan.weight.const_data_ptr<int8_t>(), plan.start.const_data_ptr<int32_t>(),
                         plan.scale.const_data_ptr<float>(), g, block, first, last, e);
      }
    }
  });
  return out;
}

Before before_of(at::IntArrayRef prologue, const Optional& mul, const Optional& add, const Optional& shift, double eps) {
  return {prologue[0], prologue[1], prologue[2], mul, add, shift, eps};
}

// All of an evaluation of one operator: codes, product, accumulation.
std::tuple<Tensor, Tensor, Tensor> advance(
    int64_t handle, const Tensor& x, const Optional& a_hat, const Optional& step, const Optional& center, const Optional& fixed_scale,
    const Optional& fixed_zero, at::IntArrayRef quantizer, double clip, at::IntArrayRef prologue, const Optional& mul,
    const Optional& add, const Optional& shift, double eps, const Optional& o_hat, const Optional& bias,
    const Optional& residual, const Optional& gate, double factor, int64_t out_type) {
  const auto plan = find(handle);
  const bool gated = prologue[1] == kGeglu;
  const Geometry g = geometry(*plan, x, gated);
  static thread_local Buffer buffer;
  Tensor plain;
  uint8_t* codes;
  if (plan->own) {
    codes = buffer.get<uint8_t>(g.images * g.padded_height * g.padded_width * g.padded_channels);
  } else {
    std::vector<int64_t> sizes = x.sizes().vec();
    if (gated) sizes.back() /= 2;
    plain = at::empty(sizes, at::TensorOptions(at::kByte).memory_format(plan->linear ? at::MemoryFormat::Contiguous : at::MemoryFormat::ChannelsLast));
    codes = plain.mutable_data_ptr<uint8_t>();
  }
  const Encoded encoded = encode_into(codes, g, x, a_hat, step, center, fixed_scale, fixed_zero, quantizer, clip,
                                      before_of(prologue, mul, add, shift, eps), plan->linear);
  const Tensor out = multiply_codes(*plan, g, codes, plain, x, encoded.scale, quantizer[3] < 0 ? Optional(encoded.zero) : Optional(), quantizer[2], quantizer[3], {o_hat, bias, residual, gate, factor, out_type});
  return {out, encoded.scale, encoded.probe};
}

// Codes alone, in the layout of the input, for several operators that read the same tensor.
std::tuple<Tensor, Tensor, Tensor, Tensor> encode(
    const Tensor& x, const Optional& a_hat, const Optional& step, const Optional& center, const Optional& fixed_scale, const Optional& fixed_zero,
    at::IntArrayRef quantizer, double clip, bool linear, at::IntArrayRef prologue, const Optional& mul, const Optional& add,
    const Optional& shift, double eps) {
  Plan plain;
  plain.linear = linear;
  plain.kernel = plain.stride = plain.dilation = {1, 1};
  plain.padding = {0, 0};
  const Geometry g = geometry(plain, x);
  const Tensor codes = at::empty(x.sizes(), at::TensorOptions(at::kByte).memory_format(linear ? at::MemoryFormat::Contiguous : at::MemoryFormat::ChannelsLast));
  const Encoded encoded = encode_into(codes.mutable_data_ptr<uint8_t>(), g, x, a_hat, step, center, fixed_scale, fixed_zero,
                                      quantizer, clip, before_of(prologue, mul, add, shift, eps), linear);
  return {codes, encoded.scale, encoded.zero, encoded.probe};
}

// Product and accumulation for codes in the layout of the input.
Tensor multiply(int64_t handle, const Tensor& codes, const Tensor& scale, const Optional& zeros, int64_t granularity, int64_t offset, const Optional& o_hat,
                const Optional& bias, const Optional& residual, const Optional& gate, double factor, int64_t out_type) {
  const auto plan = find(handle);
  check_layout(codes, plan->linear);
  const Geometry g = geometry(*plan, codes);
  const After after{o_hat, bias, residual, gate, factor, out_type};
  const uint8_t* from = codes.const_data_ptr<uint8_t>();
  if (!plan->own || (!g.pad_x && !g.pad_y && g.channels == g.padded_channels))
    return multiply_codes(*plan, g, from, codes, codes, scale, zeros, granularity, offset, after);
  static thread_local Buffer buffer;
  uint8_t* padded = buffer.get<uint8_t>(g.images * g.padded_height * g.padded_width * g.padded_channels);
  for (int64_t n = 0; n < g.images; n++) {
    fill_border(g, n, border(zeros ? *zeros : scale, zeros ? -1 : offset, n), padded);
    for (int64_t y = 0; y < g.height; y++) {
      uint8_t* to = padded + ((n * g.padded_height + y + g.pad_y) * g.padded_width + g.pad_x) * g.padded_channels;
      for (int64_t x = 0; x < g.width; x++, to += g.padded_channels, from += g.channels) memcpy(to, from, g.channels);
    }
  }
  return multiply_codes(*plan, g, padded, Tensor(), codes, scale, zeros, granularity, offset, after);
}

std::string isa() { return table() ? table()->name : "none"; }

// How many threads the loops above are shared by.
int64_t threads_used() {
  std::atomic<int64_t> used{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) { used++; });
  return used;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(modiff, m) {
  m.def("cpp_isa() -> str", isa);
  m.def("cpp_threads() -> int", threads_used);
  m.def("cpp_clocks() -> (float, float)", read_clocks);
  m.def("cpp_release(int handle) -> ()", release);
  m.def("cpp_prepare(Tensor codes, Tensor scale, Tensor? packed, int[] stride, int[] padding, int[] dilation, int groups) -> int",
        prepare);  // of any layout: oneDNN's packed weights have a dispatch key of their own
  m.def(
      "cpp_advance(int handle, Tensor x, Tensor(a!)? a_hat, Tensor? step, Tensor? center, Tensor? fixed_scale, Tensor? fixed_zero, "
      "int[] quantizer, float clip, int[] prologue, Tensor? mul, Tensor? add, Tensor? shift, float eps, "
      "Tensor(b!)? o_hat, Tensor? bias, Tensor? residual, Tensor? gate, float factor, int out_type) -> (Tensor, Tensor, Tensor)");
  m.def(
      "cpp_encode(Tensor x, Tensor(a!)? a_hat, Tensor? step, Tensor? center, Tensor? fixed_scale, Tensor? fixed_zero, int[] quantizer, "
      "float clip, bool linear, int[] prologue, Tensor? mul, Tensor? add, Tensor? shift, float eps) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "cpp_multiply(int handle, Tensor codes, Tensor scale, Tensor? zeros, int granularity, int offset, Tensor(a!)? o_hat, Tensor? bias, "
      "Tensor? residual, Tensor? gate, float factor, int out_type) -> Tensor");
}

TORCH_LIBRARY_IMPL(modiff, CPU, m) {
  m.impl("cpp_advance", advance);
  m.impl("cpp_encode", encode);
  m.impl("cpp_multiply", multiply);
}
