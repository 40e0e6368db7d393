// What the drivers (operators.cpp) ask of the kernels, which are compiled once for each instruction set.
#pragma once
#include <cstdint>

namespace modiff {

enum Type : int { kFloat = 0, kBFloat16 = 1 };
enum Norm : int { kNoNorm = 0, kAffine = 1, kLayerNorm = 2 };
enum Activation : int { kIdentity = 0, kSilu = 1, kGeluTanh = 2, kGelu = 3, kGeglu = 4 };

// What stands between the tensor that is read and the operator's input: y = act(norm(x)). kGeglu: x has two halves, and
// y is the first one times gelu of the second one.
struct Prologue {
  int norm = kNoNorm;
  int act = kIdentity;
  const float* mul = nullptr;  // per sample and channel, or per channel (stride 0); null: 1
  const float* add = nullptr;  // likewise; null: 0
  int64_t stride = 0;          // from one sample's numbers to the next one's
  int64_t rows_per_sample = 1;
  float eps = 0;
};

// The reconstruction: floats, or whole numbers of a grid. Neither: the input itself is quantized.
struct Held {
  float* values = nullptr;
  int16_t* numbers = nullptr;
  float step = 1;
  float center = 0;
  bool compensates = true;
};

struct Quantizer {
  bool symmetric;
  float top;
  float offset;  // the unsigned code that stands for 0
};

// Geometry of a product over rows of channels; a Linear is a convolution of one image that is one line.
struct Geometry {
  int64_t images, height, width, channels, padded_channels;
  int64_t pad_y, pad_x, padded_height, padded_width;
  int64_t out_height, out_width, out_channels;
  int64_t stride_y, stride_x, dilation_y, dilation_x, kernel_y, kernel_x;
};

// What becomes of the sums: o = scale * sum [+ o_hat | + bias]; out = (gate * o + residual) * factor.
struct Epilogue {
  const float* scales;  // of the codes, one for each set of rows
  int64_t rows_per_set;
  const float* zeros = nullptr;  // zero points that the codes keep, one for each set; null: 0 is code 128
  float* o_hat = nullptr;
  const float* bias = nullptr;
  void* out = nullptr;
  int out_type = kFloat;
  const void* residual = nullptr;
  int residual_type = kFloat;
  const float* gate = nullptr;
  int64_t gate_stride = 0;
  int64_t rows_per_sample = 1;
  float factor = 1;
};

struct Range {
  float low, high, bad;  // bad: NaN where an input is not finite
};

struct Table {
  const char* name;
  // Sums and sums of squares of each channel, less the pilot.
  void (*moments)(const void* x, int type, int64_t rows, int64_t channels, const float* pilot, double* sum, double* squares);
  void (*load)(const void* x, int type, int64_t begin, int64_t count, float* out);
  // d = y - a_hat of rows begin.. (held and x are the whole tensors); the range of d is merged into `range`.
  void (*difference)(const void* x, int type, const Prologue& prologue, const Held& held, int64_t begin, int64_t rows,
                     int64_t channels, float* d, Range& range);
  // The reconstruction becomes y itself (no error compensation); `y` is memory for one row.
  void (*hold)(const void* x, int type, const Prologue& prologue, const Held& held, int64_t begin, int64_t rows,
               int64_t channels, float* y);
  // Codes of d, with `offset` added, into the padded buffer; advances a_hat.
  void (*codes)(const float* d, const Held& held, const Quantizer& quantizer, float scale, float zero, int64_t begin,
                int64_t rows, const Geometry& geometry, uint8_t* out);
  // Sums of rows begin..end and output channels of one block; null: this instruction set has no exact ones.
  void (*product)(const uint8_t* codes, const int8_t* weight, const int32_t* start, const float* weight_scale,
                  const Geometry& geometry, int64_t block, int64_t begin, int64_t end, const Epilogue& epilogue);
  // The same epilogue for sums that another product made, times the scales of the weight.
  void (*finish)(const float* product, int64_t begin, int64_t end, int64_t channels, const Epilogue& epilogue);
};

constexpr int64_t kBlock = 64;  // output channels of a block

const Table* avx512();
const Table* avx2();

}  // namespace modiff
