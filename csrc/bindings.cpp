// The only file that knows Python. Pointers arrive as integers: bert_fast/backends/cpu.py and
// bert_fast/backends/cuda.py have checked the tensors they came from and keep them alive for the call.
//
// Compiled twice: as bert_fast._C, and with BERT_FAST_HOST as the test module _cuda_host, whose CUDA
// kernels run on the CPU.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/threads.h"
#include "cpu/tokens.h"
#if defined(BERT_FAST_WITH_CUDA) || defined(BERT_FAST_HOST)
#include "cuda/kernels.h"
#endif

#ifdef BERT_FAST_WITH_CUDA
// The CUDA runtime's own, declared here so that this file compiles without CUDA's headers.
extern "C" int cudaDriverGetVersion(int* version);
extern "C" int cudaRuntimeGetVersion(int* version);
#endif

namespace py = pybind11;
using namespace bert_fast;

namespace {

using Address = uintptr_t;
using StridedTensor = std::array<int64_t, 3>;  // address, token stride, head stride

template <class T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

Strided strided(const StridedTensor& t) {
  return {pointer(static_cast<Address>(t[0])), t[1], t[2]};
}

using PositionTuple = std::tuple<Address, int64_t, int64_t, Address>;  // as in PositionBias

AttentionShape attention_shape(int dtype, int64_t batch, int64_t num_heads, int64_t head_dim,
                               int64_t total_q, int64_t total_k, Address cu_q, Address cu_k,
                               float scale, bool causal, double dropout_p, uint64_t seed,
                               int num_threads, const PositionTuple& position_bias,
                               int precision) {
  const auto& [data, rows, columns, gradient] = position_bias;
  return {static_cast<DType>(dtype), batch, num_heads, head_dim, total_q, total_k,
          pointer<int32_t>(cu_q), pointer<int32_t>(cu_k), scale, causal, dropout_p, seed,
          num_threads, {pointer<float>(data), rows, columns, pointer<float>(gradient)},
          static_cast<Precision>(precision)};
}

// ---- what a call's arguments are, on either kind of processor ----

AttentionForward attention_forward(const AttentionShape& shape, StridedTensor q, StridedTensor k,
                                   StridedTensor v, StridedTensor out, Address bias, Address lse) {
  return {shape, strided(q), strided(k), strided(v), strided(out), pointer<float>(bias),
          pointer<float>(lse)};
}

AttentionBackward attention_backward(const AttentionShape& shape, StridedTensor q, StridedTensor k,
                                     StridedTensor v, StridedTensor out, StridedTensor dout,
                                     StridedTensor dq, StridedTensor dk, StridedTensor dv,
                                     Address bias, Address lse) {
  return {shape, strided(q), strided(k), strided(v), strided(out), strided(dout), strided(dq),
          strided(dk), strided(dv), pointer<float>(bias), pointer<float>(lse)};
}

LayerNormForward layer_norm_forward(int dtype, int64_t rows, int64_t hidden, Address x,
                                    Address residual, Address linear_bias, Address weight,
                                    Address bias, Address out, Address sum, Address mean,
                                    Address rstd, double eps, double dropout_p, uint64_t seed,
                                    int num_threads) {
  return {static_cast<DType>(dtype), rows, hidden, pointer(x), pointer(residual),
          pointer<float>(linear_bias), pointer<float>(weight), pointer<float>(bias), pointer(out),
          pointer(sum), pointer<float>(mean), pointer<float>(rstd), eps, dropout_p, seed,
          num_threads};
}

LayerNormBackward layer_norm_backward(int dtype, int64_t rows, int64_t hidden, Address dout,
                                      Address sum, Address mean, Address rstd, Address weight,
                                      Address dsum, Address dx, Address dweight, Address dbias,
                                      Address dlinear_bias, double dropout_p, uint64_t seed,
                                      int num_threads) {
  return {static_cast<DType>(dtype), rows, hidden, pointer(dout), pointer(sum),
          pointer<float>(mean), pointer<float>(rstd), pointer<float>(weight), pointer(dsum),
          pointer(dx), pointer<float>(dweight), pointer<float>(dbias),
          pointer<float>(dlinear_bias), dropout_p, seed, num_threads};
}

GeluForward gelu_forward(int dtype, int64_t rows, int64_t width, Address x, Address bias,
                         Address out, int approximate, int num_threads) {
  return {static_cast<DType>(dtype), rows, width, pointer(x), pointer<float>(bias), pointer(out),
          static_cast<Gelu>(approximate), num_threads};
}

GeluBackward gelu_backward(int dtype, int64_t rows, int64_t width, Address dout, Address x,
                           Address bias, Address dx, Address dbias, int approximate,
                           int num_threads) {
  return {static_cast<DType>(dtype), rows, width, pointer(dout), pointer(x), pointer<float>(bias),
          pointer(dx), pointer<float>(dbias), static_cast<Gelu>(approximate), num_threads};
}

void bind_shapes(py::module_& m) {
  py::class_<AttentionShape>(m, "AttentionShape", py::module_local())
      .def(py::init(&attention_shape), py::kw_only(), py::arg("dtype"), py::arg("batch"),
           py::arg("num_heads"), py::arg("head_dim"), py::arg("total_q"), py::arg("total_k"),
           py::arg("cu_q"), py::arg("cu_k"), py::arg("scale"), py::arg("causal"),
           py::arg("dropout_p"), py::arg("seed"), py::arg("num_threads"),
           py::arg("position_bias") = PositionTuple(), py::arg("precision") = 0);
}

// ---- CUDA ----

#if defined(BERT_FAST_WITH_CUDA) || defined(BERT_FAST_HOST)

using TableTuple = std::tuple<Address, int64_t, int64_t>;  // address, rows, columns
// device, stream, seed, scratch, longest, programs, table, dtable
using CallTuple =
    std::tuple<int, Address, Address, Address, int64_t, int, TableTuple, Address>;

std::string shape_of(const AttentionShape& a) {
  return std::to_string(a.total_q) + " and " + std::to_string(a.total_k) + " tokens, " +
         std::to_string(a.num_heads) + " heads of " + std::to_string(a.head_dim);
}
std::string by(int64_t rows, int64_t width) {
  return std::to_string(rows) + " x " + std::to_string(width);
}
std::string shape_of(const LayerNormForward& a) { return by(a.rows, a.hidden); }
std::string shape_of(const LayerNormBackward& a) { return by(a.rows, a.hidden); }
std::string shape_of(const GeluForward& a) { return by(a.rows, a.width); }
std::string shape_of(const GeluBackward& a) { return by(a.rows, a.width); }

using PartialsTuple = std::tuple<Address, int, int, int64_t>;  // as in cuda::Partials

cuda::Sums sums(int dtype, const std::vector<PartialsTuple>& kinds, Address out) {
  cuda::Sums found = {static_cast<DType>(dtype), {}, pointer(out)};
  if (kinds.size() > cuda::kSumKinds) throw std::invalid_argument("too many kinds of sums");
  for (size_t i = 0; i < kinds.size(); ++i) {
    const auto& [data, sums, programs, width] = kinds[i];
    found.kinds[i] = {pointer<float>(data), sums, programs, width};
  }
  return found;
}
std::string shape_of(const cuda::Sums& a) {
  std::string shapes;
  for (const cuda::Partials& kind : a.kinds) {
    if (!kind.sums) continue;
    shapes += (shapes.empty() ? "" : ", ") + std::to_string(kind.sums) + " x " +
              by(kind.programs, kind.width);
  }
  return shapes;
}

cuda::Table table(const TableTuple& t) {
  return {pointer<float>(std::get<0>(t)), std::get<1>(t), std::get<2>(t)};
}

template <class>
py::arg unnamed() {
  return py::arg();
}

cuda::Call call_of(const CallTuple& c, int low) {
  return {std::get<0>(c), pointer(std::get<1>(c)), pointer<uint64_t>(std::get<2>(c)),
          pointer<float>(std::get<3>(c)), std::get<4>(c), std::get<5>(c), table(std::get<6>(c)),
          pointer<float>(std::get<7>(c)), low};
}

template <class Args, class... P>
void bind_cuda(py::module_& m, const char* name, Args (*arguments)(P...),
               const char* (*run)(const Args&, const cuda::Call&)) {
  m.def(name,
        [=](P... given, CallTuple c, int low) {
          const Args args = arguments(given...);
          if (const char* error = run(args, call_of(c, low))) {
            throw std::runtime_error(std::string(name) + " (" + shape_of(args) + ") on cuda:" +
                                     std::to_string(std::get<0>(c)) + ": " + error);
          }
        },
        unnamed<P>()..., py::arg("call"), py::arg("low") = 0,
        py::call_guard<py::gil_scoped_release>());
}

void bind_cuda(py::module_& m) {
  bind_cuda(m, "cuda_attention_forward", attention_forward, cuda::attention_forward);
  bind_cuda(m, "cuda_attention_backward", attention_backward, cuda::attention_backward);
  m.def("cuda_attention_scratch", [](const AttentionShape& shape, const CallTuple& c) {
    return cuda::attention_scratch(shape, call_of(c, 0));
  });
  bind_cuda(m, "cuda_layer_norm_forward", layer_norm_forward, cuda::layer_norm_forward);
  bind_cuda(m, "cuda_layer_norm_backward", layer_norm_backward, cuda::layer_norm_backward);
  bind_cuda(m, "cuda_gelu_forward", gelu_forward, cuda::gelu_forward);
  bind_cuda(m, "cuda_gelu_backward", gelu_backward, cuda::gelu_backward);
  bind_cuda(m, "cuda_sum_partials", sums, cuda::sum_partials);
  m.attr("SUM_COLUMNS") = cuda::kSumColumns;
}

#endif

}  // namespace

#ifdef BERT_FAST_HOST

namespace bert_fast::host {
uint64_t launched();  // host/runtime.h
}

PYBIND11_MODULE(_cuda_host, m) {
  bind_shapes(m);
  bind_cuda(m);
  m.def("launched", &host::launched);
}

#else

namespace {

// The table is asked at every call: BERT_FAST_CPU_ISA's kernels can be changed at run time.
template <class Args, class... P>
void bind_cpu(py::module_& m, const char* name, Args (*arguments)(P...),
              void (*CpuKernels::*kernel)(const Args&)) {
  m.def(name, [=](P... given) { (cpu_kernels().*kernel)(arguments(given...)); },
        py::call_guard<py::gil_scoped_release>());
}

using EmbeddingTable = std::tuple<Address, int64_t, Address, bool>;  // as in Table

// Whether each token's ids were in their tables.
bool embedding_forward(int tables, int dtype, int64_t rows, int64_t hidden, const EmbeddingTable& word,
                       const EmbeddingTable& position, const EmbeddingTable& token_type, Address weight,
                       Address bias, Address out, Address sum, Address mean, Address rstd,
                       double eps, int num_threads) {
  const auto table = [](const EmbeddingTable& t) {
    return Table{pointer(std::get<0>(t)), std::get<1>(t), pointer(std::get<2>(t)), std::get<3>(t)};
  };
  bool outside = false;
  cpu_kernels().embedding_forward(
      {static_cast<DType>(tables), static_cast<DType>(dtype), rows, hidden, table(word),
       table(position), table(token_type), pointer<float>(weight), pointer<float>(bias),
       pointer(out), pointer(sum), pointer<float>(mean), pointer<float>(rstd), eps, num_threads,
       &outside});
  return !outside;
}

// Embeddings whose memory the caller keeps alive, and where it is: inference in fp32.
class Embeddings {
 public:
  using Weights = std::pair<Address, int64_t>;  // a table, its rows
  using Ids = std::pair<Address, bool>;         // 0: none; whether they are int64
  using LayerNorm = std::tuple<Address, Address, double>;  // weight, bias, eps

  Embeddings(const std::array<Weights, 3>& tables, int64_t hidden, const LayerNorm& norm)
      : tables_(tables), hidden_(hidden), norm_(norm) {}

  // Whether each id of the padded batch, or the packed tokens, is below its limit, and not below 0.
  static bool inside(const std::array<Ids, 3>& ids, const std::array<int64_t, 3>& limits,
                     int64_t count) {
    for (int i = 0; i < 3; ++i) {
      if (!ids[i].first) continue;
      const auto [low, high] = ids[i].second
                                   ? range_of(pointer<const int64_t>(ids[i].first), count)
                                   : range_of(pointer<const int32_t>(ids[i].first), count);
      if (low < 0 || high >= limits[i]) return false;
    }
    return true;
  }

  // x (rows, hidden), of word, position and token type; whether all ids were in their tables.
  bool forward(const std::array<Ids, 3>& ids, int64_t rows, int64_t seqlen, Address cu_seqlens,
               Address index, Address x, int num_threads) const {
    const OnTeam team;
    const Tokens tokens = {rows, seqlen, pointer<int32_t>(cu_seqlens), pointer<int64_t>(index)};
    EmbeddingForward a = {};
    Table* tables[] = {&a.word, &a.position, &a.token_type};
    std::vector<int64_t> packed[3];
    for (int i = 0; i < 3; ++i) {
      *tables[i] = {pointer(tables_[i].first), tables_[i].second, pointer(ids[i].first),
                    ids[i].second};
      packed[i] = pack(*tables[i], tokens, i == 1);
    }
    bool outside = false;
    a.rows = rows;
    a.hidden = hidden_;
    a.weight = pointer<float>(std::get<0>(norm_));
    a.bias = pointer<float>(std::get<1>(norm_));
    a.eps = std::get<2>(norm_);
    a.out = pointer(x);
    a.num_threads = num_threads;
    a.outside = &outside;
    cpu_kernels().embedding_forward(a);
    return !outside;
  }

 private:
  std::array<Weights, 3> tables_;
  int64_t hidden_;
  LayerNorm norm_;
};

// Layers whose memory the caller keeps alive, and where it is.
class Encoder {
 public:
  // Packed weight, bias, precision, samples of the weight; None where that is gone.
  using Linear = std::tuple<Address, Address, int, const Samples*>;
  using LayerNorm = std::tuple<Address, Address, double>;  // weight, bias, eps
  using Linears = std::vector<Linear>;  // of queries, keys and values: one, or one for each
  using Layer = std::tuple<Linears, Linear, LayerNorm, Linear, Linear, LayerNorm>;

  Encoder(const std::vector<Layer>& layers, int64_t hidden, int64_t intermediate, int64_t num_heads,
          double scale, int activation)
      : hidden_(hidden), intermediate_(intermediate), num_heads_(num_heads), scale_(scale),
        activation_(static_cast<Activation>(activation)) {
    for (const Layer& layer : layers) {
      const auto& [qkv, out, attention_norm, up, down, output_norm] = layer;
      EncoderLayer& to = layers_.emplace_back();
      to.qkv_products = static_cast<int>(qkv.size());
      for (size_t i = 0; i < qkv.size(); ++i) to.qkv[i] = linear(qkv[i]);
      to.out = linear(out);
      to.attention_norm = norm(attention_norm);
      to.up = linear(up);
      to.down = linear(down);
      to.output_norm = norm(output_norm);
    }
  }

  // Whether the packed weights are still those of the weights, and of the instructions asked for.
  // The weights must be where they were.
  bool holds() const {
    for (const Samples& samples : samples_) samples.prefetch();
    for (const Samples& samples : samples_) {
      if (!samples.hold()) return false;
    }
    for (const auto& [precision, kernels] : kernels_) {
      if (&linear_kernels(precision) != kernels) return false;
    }
    return true;
  }

  // Floats that forward needs to work in.
  int64_t workspace(int64_t rows, int64_t batch, Address cu_seqlens, int num_threads) const {
    return encoder_memory(call(rows, batch, cu_seqlens, {}, {}, num_threads));
  }

  void forward(int64_t rows, int64_t batch, Address cu_seqlens, Address x, Address workspace,
               int num_threads) const {
    encoder_forward(call(rows, batch, cu_seqlens, x, workspace, num_threads));
  }

 private:
  EncoderForward call(int64_t rows, int64_t batch, Address cu_seqlens, Address x, Address memory,
                      int num_threads) const {
    return {layers_.data(), static_cast<int64_t>(layers_.size()), rows, batch, hidden_,
            intermediate_, num_heads_, pointer<int32_t>(cu_seqlens), static_cast<float>(scale_),
            activation_, pointer<float>(x), pointer<float>(memory), num_threads};
  }

  PackedLinear linear(const Linear& l) {
    const auto& [packed, bias, code, samples] = l;
    const auto precision = static_cast<Precision>(code);
    kernels_[precision] = &linear_kernels(precision);
    if (samples) samples_.push_back(*samples);
    return {pointer(packed), pointer<float>(bias), precision};
  }
  static Norm norm(const LayerNorm& n) {
    return {pointer<float>(std::get<0>(n)), pointer<float>(std::get<1>(n)), std::get<2>(n)};
  }

  std::vector<EncoderLayer> layers_;
  std::vector<Samples> samples_;
  std::map<Precision, const LinearKernels*> kernels_;
  int64_t hidden_, intermediate_, num_heads_;
  double scale_;
  Activation activation_;
};

using release_gil = py::call_guard<py::gil_scoped_release>;

const LinearKernels& linear_kernels_of(int precision) {
  return linear_kernels(static_cast<Precision>(precision));
}

// out = the product of each sequence's first row, on a team; whether each sequence has one.
bool linear_of_first(int precision, int64_t batch, int64_t in_features, int64_t out_features,
                     Address cu_seqlens, Address x, Address packed, Address bias, Address out,
                     int num_threads) {
  const OnTeam team;
  const LinearKernels& kernels = linear_kernels_of(precision);
  const int32_t* begins = pointer<int32_t>(cu_seqlens);
  const int64_t firsts = ceil_div(batch * in_features, 16) * 16;
  const int64_t scratch = kernels.scratch_size(batch, in_features, num_threads);
  const std::unique_ptr<float[]> memory(new float[firsts + ceil_div(scratch, 4) + 16]);
  float* first = memory.get();
  while (reinterpret_cast<Address>(first) % 64) ++first;
  for (int64_t i = 0; i < batch; ++i) {
    if (begins[i] == begins[i + 1]) return false;
    std::memcpy(first + i * in_features, pointer<float>(x) + begins[i] * in_features,
                in_features * sizeof(float));
  }
  kernels.forward({batch, in_features, out_features, first, pointer(packed), pointer<float>(bias),
                   pointer<float>(out), first + firsts, Activation::kNone, num_threads,
                   in_features, out_features});
  return true;
}

void bind_linear(py::module_& m) {
  m.def("linear_of_first", &linear_of_first, release_gil());
  m.def("linear_kind", [](int precision) { return linear_kernels_of(precision).name; });
  m.def("linear_is_fast", [](int precision) { return linear_kernels_of(precision).fast; });
  m.def("linear_packed_size", [](int precision, int64_t out_features, int64_t in_features) {
    return linear_kernels_of(precision).packed_size(out_features, in_features);
  });
  m.def("linear_scratch_size",
        [](int precision, int64_t rows, int64_t in_features, int num_threads) {
          return linear_kernels_of(precision).scratch_size(rows, in_features, num_threads);
        });
  py::class_<Samples>(m, "Samples", py::module_local())
      .def(py::init([](Address weight, int64_t rows, int64_t columns, int64_t row_stride,
                       int64_t column_stride) {
        return Samples(pointer<float>(weight), rows, columns, row_stride, column_stride);
      }))
      .def("hold", &Samples::hold);
  m.def("linear_pack",
        [](int precision, int64_t out_features, int64_t in_features, Address elements,
           Address scale, Address x_factor, Address packed, int num_threads) {
          linear_kernels_of(precision).pack(
              {out_features, in_features, pointer(elements), pointer<float>(scale),
               pointer<float>(x_factor)},
              pointer(packed), num_threads);
        },
        release_gil());
  m.def("linear_unpack",
        [](int precision, int64_t out_features, int64_t in_features, Address elements,
           Address packed) {
          linear_kernels_of(precision).unpack(
              pointer(packed), {out_features, in_features, pointer(elements), nullptr, nullptr});
        },
        release_gil());
  m.def("linear_forward",
        [](int precision, int64_t rows, int64_t in_features, int64_t out_features, Address x,
           Address packed, Address bias, Address out, Address scratch, int activation,
           int num_threads, int64_t x_stride, int64_t out_stride) {
          linear_kernels_of(precision).forward(
              {rows, in_features, out_features, pointer<float>(x), pointer(packed),
               pointer<float>(bias), pointer<float>(out), pointer(scratch),
               static_cast<Activation>(activation), num_threads, x_stride, out_stride});
        },
        release_gil());
}

void bind_encoder(py::module_& m) {
  py::class_<Embeddings>(m, "Embeddings", py::module_local())
      .def(py::init<const std::array<Embeddings::Weights, 3>&, int64_t,
                    const Embeddings::LayerNorm&>())
      .def_static("inside", &Embeddings::inside)
      .def("forward", &Embeddings::forward, release_gil());
  py::class_<Encoder>(m, "Encoder", py::module_local())
      .def(py::init<const std::vector<Encoder::Layer>&, int64_t, int64_t, int64_t, double, int>())
      .def("holds", &Encoder::holds)
      .def("workspace", &Encoder::workspace)
      .def("forward", &Encoder::forward, release_gil());
}

// Whether Python's objects are what they were: asked in every call, where Python would take as long
// for it as for a layer. The caller keeps them alive, who shows them to the garbage collector.
class Unchanged {
 public:
  using Kinds = std::vector<std::pair<py::handle, py::handle>>;               // object, type
  using Values = std::vector<std::tuple<py::handle, py::handle, py::handle>>;  // dict, key, value
  using Contents = std::vector<std::pair<py::handle, std::vector<py::handle>>>;  // dict, values
  using Tensors = std::vector<std::tuple<py::handle, Address, int64_t>>;  // address, version or -1

  Unchanged(Kinds kinds, Values values, Contents contents, Tensors tensors)
      : kinds_(std::move(kinds)), values_(std::move(values)), contents_(std::move(contents)),
        tensors_(std::move(tensors)) {
    for (const auto& [object, kind] : kinds_) add(object);
    for (const auto& value : values_) add(std::get<0>(value));
    for (const auto& [dict, values] : contents_) add(dict);
    for (const auto& tensor : tensors_) add(std::get<0>(tensor));
  }

  bool hold() const {
    prefetch();
    for (const auto& [object, kind] : kinds_) {
      if (reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())) != kind.ptr()) return false;
    }
    for (const auto& [dict, key, value] : values_) {
      PyObject* now = PyDict_GetItemWithError(dict.ptr(), key.ptr());
      if (!now && PyErr_Occurred()) throw py::error_already_set();
      if ((now ? now : Py_None) != value.ptr()) return false;
    }
    for (const auto& [dict, values] : contents_) {
      Py_ssize_t at = 0;
      PyObject* now;
      for (py::handle value : values) {
        if (!PyDict_Next(dict.ptr(), &at, nullptr, &now) || now != value.ptr()) return false;
      }
      if (PyDict_Next(dict.ptr(), &at, nullptr, &now)) return false;
    }
    for (const auto& [tensor, address, version] : tensors_) {
      if (number(PyObject_CallMethodNoArgs(tensor.ptr(), data_ptr_.ptr())) != address) return false;
      if (version >= 0 &&
          number(PyObject_GetAttr(tensor.ptr(), version_.ptr())) != static_cast<Address>(version)) {
        return false;
      }
    }
    return true;
  }

 private:
  void add(py::handle object) {
    if (!read_.empty() && read_.back().first == object.ptr()) return;
    const size_t words = Py_TYPE(object.ptr())->tp_basicsize / sizeof(void*);
    read_.emplace_back(object.ptr(), std::min(kWords, words));
  }

  // After a model's weights have gone through the caches all of this lies in memory. It is asked for
  // at once, then what it points to (a dict's entries, a tensor's numbers), or else each step of
  // the comparison would wait for the one before. A word that is no address does no harm.
  void prefetch() const {
    for (const auto& [object, count] : read_) __builtin_prefetch(object);
    for (const auto& [object, count] : read_) {
      uintptr_t words[kWords] = {};
      std::memcpy(words, object, count * sizeof(*words));
      for (size_t i = sizeof(PyObject) / sizeof(*words); i < count; ++i) {
        __builtin_prefetch(pointer(words[i]));
        __builtin_prefetch(pointer(words[i] + 64));
      }
    }
  }

  static Address number(PyObject* found) {
    if (!found) throw py::error_already_set();
    const py::object number = py::reinterpret_steal<py::object>(found);
    const Address value = PyLong_AsUnsignedLongLongMask(found);
    if (PyErr_Occurred()) throw py::error_already_set();
    return value;
  }

  Kinds kinds_;
  Values values_;
  Contents contents_;
  Tensors tensors_;
  static constexpr size_t kWords = 6;  // of an object that may be addresses: a dict has as many
  std::vector<std::pair<const PyObject*, size_t>> read_;
  py::str data_ptr_ = "data_ptr", version_ = "_version";
};

// f(values as they are), of an integer, bool or float type that is called as Python's array module
// calls it.
template <class F>
auto with_type(char code, Address address, F f) {
  switch (code) {
    case 'B': return f(pointer<const uint8_t>(address));
    case 'b': return f(pointer<const int8_t>(address));
    case 'h': return f(pointer<const int16_t>(address));
    case 'i': return f(pointer<const int32_t>(address));
    case 'q': return f(pointer<const int64_t>(address));
    case 'f': return f(pointer<const float>(address));
    case 'd': return f(pointer<const double>(address));
  }
  throw py::value_error("no type is called that");
}

void bind_tokens(py::module_& m) {
  m.def("mean_rows",
        [](Address x, int64_t rows, Address cu_seqlens, int64_t batch, int64_t width, Address out) {
          return mean_rows(pointer<float>(x), rows, pointer<int32_t>(cu_seqlens), batch, width,
                           pointer<float>(out));
        },
        release_gil());
  m.def("range_of", [](char code, Address ids, int64_t count) {
    return with_type(code, ids, [=](auto* values) { return range_of(values, count); });
  });
  m.def("real_tokens", [](char code, Address mask, int64_t batch, int64_t seqlen,
                          Address cu_seqlens, Address index) {
    const RealTokens found = with_type(code, mask, [=](auto* values) {
      return real_tokens(values, batch, seqlen, pointer<int32_t>(cu_seqlens),
                         pointer<int64_t>(index));
    });
    return std::make_tuple(found.count, found.longest, found.shortest, found.valid);
  });
}

void bind_unchanged(py::module_& m) {
  py::class_<Unchanged>(m, "Unchanged", py::module_local())
      .def(py::init<Unchanged::Kinds, Unchanged::Values, Unchanged::Contents, Unchanged::Tensors>())
      .def("hold", &Unchanged::hold);
}

}  // namespace

// Without py::mod_gil_not_used: nobody has shown that this module needs no GIL.
PYBIND11_MODULE(_C, m) {
  m.doc() = "bert_fast's compiled kernels. Private: bert_fast's ops validate, this does not.";

  m.def("forked", &forked);
  // Also sets the threads of OpenMP and MKL, by their own functions; returns MKL's that were.
  m.def("put_on_team", [](bool on, Address set_openmp, int openmp, Address set_mkl, int mkl) {
    put_on_team(on);
    if (set_openmp) reinterpret_cast<void (*)(int)>(set_openmp)(openmp);
    return set_mkl ? reinterpret_cast<int (*)(int)>(set_mkl)(mkl) : 0;
  });
  m.def("cpu_isa", &cpu_isa);
  m.def("set_cpu_isa", [](const std::string& name) {
    if (!set_cpu_isa(name.c_str())) {
      throw py::value_error("cpu isa '" + name + "' is not one this processor and build have");
    }
  });

  bind_shapes(m);
  m.def("attention_forward",
        [](const AttentionShape& shape, StridedTensor q, StridedTensor k, StridedTensor v,
           StridedTensor out, Address bias, Address lse) {
          bert_fast::attention_forward(attention_forward(shape, q, k, v, out, bias, lse));
        },
        release_gil());
  bind_cpu(m, "attention_backward", attention_backward, &CpuKernels::attention_backward);
  bind_cpu(m, "layer_norm_forward", layer_norm_forward, &CpuKernels::layer_norm_forward);
  bind_cpu(m, "layer_norm_backward", layer_norm_backward, &CpuKernels::layer_norm_backward);
  m.def("embedding_forward", &embedding_forward, release_gil());
  bind_cpu(m, "gelu_forward", gelu_forward, &CpuKernels::gelu_forward);
  bind_cpu(m, "gelu_backward", gelu_backward, &CpuKernels::gelu_backward);

  bind_linear(m);
  bind_encoder(m);
  bind_unchanged(m);
  bind_tokens(m);

#ifdef BERT_FAST_WITH_CUDA
  m.attr("cuda_archs") = BERT_FAST_CUDA_ARCHS;
  // 1000 * major + 10 * minor: the newest CUDA that the driver runs, 0 without a driver; and ours.
  m.def("cuda_versions", [] {
    int driver = 0, runtime = 0;
    if (cudaDriverGetVersion(&driver) || cudaRuntimeGetVersion(&runtime)) {
      throw std::runtime_error("CUDA does not say its version");
    }
    return std::make_pair(driver, runtime);
  });
  bind_cuda(m);
#else
  m.attr("cuda_archs") = py::none();
#endif
}

#endif
