// The adapters of a batch's rows as inputs of the graph, as docs/contract.md says.
#pragma once

#include <algorithm>
#include <optional>

#include "adapter_file.hpp"

// What is known of an input by the end of its name. `axis`: where adapters differ in size, so that rows are filled up.
struct Kind {
  std::string suffix, companion;
  int axis;
  bool is_stored;  // its default is the base's own tensor, which lies where the manifest says
};
inline const std::vector<Kind> KINDS = {
    {".lora_A.weight", ".lora_B.weight", 2, false}, {".lora_B.weight", ".lora_A.weight", 1, false},
    {".lora_magnitude", "", -1, false},             {".token_ids", ".token_delta", 1, false},
    {".token_delta", ".token_ids", 1, false},       {".weight", "", 2, true},
    {".bias", "", 2, true},                         {"lora_gate", "", -1, false},
};

inline const Kind* kind_of(const std::string& name) {
  for (const Kind& kind : KINDS)
    if (name.size() >= kind.suffix.size() && !name.compare(name.size() - kind.suffix.size(), kind.suffix.size(), kind.suffix)) return &kind;
  return nullptr;
}

// An input as the graph declares it; -1 for a size that varies.
struct Declared {
  int32_t type;
  std::vector<int64_t> dims;
};
using Inputs = std::map<std::string, Declared>;

// Refuse an adapter that ONNX Runtime would run wrongly or trip over: its missing tensors are silently the base's.
inline void require_fit(const Tensors& adapter, const Inputs& inputs, const std::string& file) {
  for (const auto& [name, tensor] : adapter) {
    const auto found = inputs.find(name);
    const Kind* kind = kind_of(name);
    if (found == inputs.end() || !kind) throw Refused("The adapter was made for another graph, which has no such input", file, name);
    const Declared& declared = found->second;
    bool fits = tensor.type == declared.type && tensor.dims.size() == declared.dims.size() && tensor.dims[0] == 1;
    for (size_t i = 1; fits && i < tensor.dims.size(); ++i) fits = declared.dims[i] < 0 || declared.dims[i] == tensor.dims[i];
    if (!fits) throw Refused("The adapter was made for another graph: dtype or dims differ", file, name);
  }
  for (const auto& [name, tensor] : adapter) {
    const Kind* kind = kind_of(name);
    const std::string other = name.substr(0, name.size() - kind->suffix.size()) + kind->companion;
    if (!kind->companion.empty() && !adapter.count(other)) throw Refused("The adapter lacks a tensor beside " + name, file, other);
  }
}

// The bytes that fill up a row of `type`: of a head's bias the lowest number, so that a padded class never wins.
inline std::vector<char> filler(const std::string& name, int32_t type) {
  const std::string& suffix = kind_of(name)->suffix;
  std::vector<char> bytes(bytes_of(type), 0);
  if (suffix == ".token_ids") std::fill(bytes.begin(), bytes.end(), '\xff');                      // -1
  if (suffix == ".bias") bytes = type == 1 ? std::vector<char>{'\xff', '\xff', '\x7f', '\xff'}  // little-endian
                                           : std::vector<char>{'\xff', type == 10 ? '\xfb' : '\xff'};
  if (suffix == ".bias" && type == 16) bytes = {'\x7f', '\xff'};
  return bytes;
}

inline Tensor ones(const Declared& declared) {
  Tensor tensor{declared.type, {1, 1, declared.dims[2]}, {}};
  const std::vector<char> one = declared.type == 1    ? std::vector<char>{0, 0, '\x80', '\x3f'}
                                : declared.type == 10 ? std::vector<char>{0, '\x3c'}
                                                      : std::vector<char>{'\x80', '\x3f'};
  for (int64_t i = 0; i < declared.dims[2]; ++i) tensor.data.insert(tensor.data.end(), one.begin(), one.end());
  return tensor;
}

// One input `[rows, …]` of each row's tensor; a row without one has rank 0, no tokens, or a gain of ones.
inline Tensor stacked(const std::string& name, const Declared& declared, const std::vector<const Tensors*>& rows) {
  const Kind& kind = *kind_of(name);
  std::vector<Tensor> values;
  for (const Tensors* row : rows) {
    const auto found = row->find(name);
    if (found != row->end()) values.push_back(found->second);
    else if (kind.is_stored) throw Refused("A row brings no such tensor; its default lies where lora_export.json says", "model.onnx.data", name);
    else if (kind.axis < 0) values.push_back(ones(declared));
    else {
      Tensor empty{declared.type, declared.dims, {}};
      empty.dims[0] = 1;
      empty.dims[kind.axis] = 0;
      values.push_back(empty);
    }
  }
  Tensor whole{declared.type, values[0].dims, {}};
  whole.dims[0] = static_cast<int64_t>(values.size());
  if (kind.axis >= 0)
    for (const Tensor& value : values) whole.dims[kind.axis] = std::max(whole.dims[kind.axis], value.dims[kind.axis]);
  const std::vector<char> fill = filler(name, declared.type);
  for (const Tensor& value : values) {
    if (kind.axis < 0) {
      whole.data.insert(whole.data.end(), value.data.begin(), value.data.end());
      continue;
    }
    const auto after = [&](const std::vector<int64_t>& dims) { return product({dims.begin() + kind.axis, dims.end()}) * static_cast<int64_t>(fill.size()); };
    const int64_t outer = product({whole.dims.begin() + 1, whole.dims.begin() + kind.axis}), own = after(value.dims), all = after(whole.dims);
    for (int64_t i = 0; i < outer; ++i) {
      whole.data.insert(whole.data.end(), value.data.begin() + i * own, value.data.begin() + (i + 1) * own);
      for (int64_t n = own; n < all; n += static_cast<int64_t>(fill.size())) whole.data.insert(whole.data.end(), fill.begin(), fill.end());
    }
  }
  return whole;
}
