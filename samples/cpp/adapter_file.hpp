// An .onnx_adapter file (flatbuffer "TORT", format version 1), read with nothing but the standard library.
#pragma once

#include <cstdint>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

// Something does not fit; the message names the file and the tensor.
struct Refused : std::runtime_error {
  Refused(const std::string& what, const std::string& file, const std::string& tensor = "")
      : std::runtime_error(what + " [" + file + (tensor.empty() ? "" : ": " + tensor) + "]") {}
};

// `type` as ONNX numbers it: 1 is float32, 7 int64, 10 float16, 16 bfloat16.
struct Tensor {
  int32_t type;
  std::vector<int64_t> dims;
  std::vector<char> data;
};
using Tensors = std::map<std::string, Tensor>;

inline size_t bytes_of(int32_t type) { return type == 1 ? 4 : type == 7 ? 8 : type == 10 || type == 16 ? 2 : 0; }

inline int64_t product(const std::vector<int64_t>& dims) {
  return std::accumulate(dims.begin(), dims.end(), int64_t{1}, std::multiplies<>());
}

class AdapterFile {
 public:
  explicit AdapterFile(const std::string& path) : path_(path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) throw Refused("There is no such adapter file", path);
    bytes_.assign(std::istreambuf_iterator<char>(file), {});
  }

  Tensors read() {
    if (part(4, 4) != "TORT") throw Refused("The file is no ONNX Runtime adapter", path_);
    const size_t root = get<uint32_t>(0);
    const size_t version = field(root, 0);
    if (!version || get<int32_t>(version) != 1) throw Refused("The adapter file is not of format version 1", path_);
    Tensors found;
    const auto [start, n] = vector(field(root, 3));
    for (size_t i = 0; i < n; ++i) {
      tensor_.clear();
      const size_t place = start + 4 * i, table = place + get<uint32_t>(place);
      const auto [name_at, name_n] = vector(field(table, 0));
      tensor_ = part(name_at, name_n);
      const auto [dims_at, n_dims] = vector(field(table, 1));
      Tensor tensor{};
      for (size_t dim = 0; dim < n_dims; ++dim) tensor.dims.push_back(get<int64_t>(dims_at + 8 * dim));
      const size_t type = field(table, 2);
      tensor.type = type ? get<int32_t>(type) : 0;
      const auto [data_at, n_bytes] = vector(field(table, 3));
      const std::string data = part(data_at, n_bytes);
      tensor.data.assign(data.begin(), data.end());
      if (!bytes_of(tensor.type) || n_bytes != product(tensor.dims) * bytes_of(tensor.type))
        throw Refused("The adapter's bytes are not those of its dtype and dims", path_, tensor_);
      if (!found.emplace(tensor_, std::move(tensor)).second) throw Refused("The adapter has two tensors of one name", path_, tensor_);
    }
    return found;
  }

 private:
  std::string part(size_t start, size_t n) const {
    if (start > bytes_.size() || n > bytes_.size() - start) throw Refused("The adapter file is truncated or damaged", path_, tensor_);
    return {bytes_.data() + start, n};
  }
  template <typename T>
  T get(size_t place) const {
    T value;
    std::memcpy(&value, part(place, sizeof(T)).data(), sizeof(T));
    return value;
  }
  // Where a table's field is; 0 if it is left out.
  size_t field(size_t table, size_t index) const {
    const size_t vtable = table - get<int32_t>(table), at = 4 + 2 * index;
    const uint16_t offset = at < get<uint16_t>(vtable) ? get<uint16_t>(vtable + at) : 0;
    return offset ? table + offset : 0;
  }
  std::pair<size_t, size_t> vector(size_t place) const {
    if (!place) return {0, 0};
    const size_t start = place + get<uint32_t>(place);
    return {start + 4, get<uint32_t>(start)};
  }

  std::string path_, tensor_;  // the tensor being read
  std::vector<char> bytes_;
};
