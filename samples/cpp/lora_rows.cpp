// Run an exported text model in C++: one adapter by ONNX Runtime's own LoraAdapter, or another one in each row by plain inputs.
//
//   lora_rows FOLDER one NAME < ids           every row by adapter NAME
//   lora_rows FOLDER rows NAME,NAME,- < ids   row by row; - is the base
//
// Standard input has a line of token ids for each row; shorter rows are padded on the right. A line of logits comes out for
// each row; of a decoder, those of its last token. Exit codes: 2 usage, 3 refused.
#include <onnxruntime_cxx_api.h>

#include <iomanip>
#include <iostream>
#include <sstream>

#include "rows.hpp"

namespace {

using Ids = std::vector<std::vector<int64_t>>;

Declared declared_of(const Ort::TypeInfo& type) {
  const auto info = type.GetTensorTypeAndShapeInfo();
  return {static_cast<int32_t>(info.GetElementType()), info.GetShape()};
}

// The graph's own inputs, and those of adapters, optional or required.
void describe(const Ort::Session& session, Inputs& own, Inputs& of_adapters) {
  Ort::AllocatorWithDefaultOptions allocator;
  for (size_t i = 0; i < session.GetInputCount(); ++i) {
    const std::string name = session.GetInputNameAllocated(i, allocator).get();
    (kind_of(name) ? of_adapters : own)[name] = declared_of(session.GetInputTypeInfo(i));
  }
  for (size_t i = 0; i < session.GetOverridableInitializerCount(); ++i) {
    const std::string name = session.GetOverridableInitializerNameAllocated(i, allocator).get();
    if (kind_of(name)) of_adapters[name] = declared_of(session.GetOverridableInitializerTypeInfo(i));
  }
}

Tensor int64_tensor(const Ids& rows) {
  Tensor tensor{7, {static_cast<int64_t>(rows.size()), static_cast<int64_t>(rows[0].size())}, {}};
  for (const auto& row : rows) {
    const char* start = reinterpret_cast<const char*>(row.data());
    tensor.data.insert(tensor.data.end(), start, start + 8 * row.size());
  }
  return tensor;
}

// Padded ids with what follows from them: the mask, token types, positions, and a cache of length 0.
Tensors own_inputs(const Inputs& declared, Ids ids) {
  size_t longest = 0;
  for (const auto& row : ids) longest = std::max(longest, row.size());
  Ids mask, types, positions;
  for (auto& row : ids) {
    mask.emplace_back(row.size(), 1);
    positions.emplace_back(row.size());
    std::iota(positions.back().begin(), positions.back().end(), 0);
    types.emplace_back(longest, 0);
    for (auto* each : {&row, &mask.back(), &positions.back()}) each->resize(longest, 0);
  }
  const std::map<std::string, const Ids*> known = {{"input_ids", &ids}, {"attention_mask", &mask}, {"token_type_ids", &types}, {"position_ids", &positions}};
  Tensors found;
  for (const auto& [name, input] : declared) {
    if (known.count(name)) found[name] = int64_tensor(*known.at(name));
    else if (name.rfind("past_key_values.", 0) == 0) found[name] = {input.type, {static_cast<int64_t>(ids.size()), input.dims[1], 0, input.dims[3]}, {}};
    else throw Refused("This sample does not make an input", "model.onnx", name);
  }
  return found;
}

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  std::stringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
  return parts;
}

void run(const std::string& folder, const std::string& mode, const std::string& names, const Ids& ids) {
  Ort::Env env(ORT_LOGGING_LEVEL_ERROR);  // each optional input is a warning
  Ort::Session session(env, (folder + "/model.onnx").c_str(), Ort::SessionOptions());
  Inputs own, of_adapters;
  describe(session, own, of_adapters);
  Tensors feeds = own_inputs(own, ids);
  Ort::RunOptions options;
  Ort::LoraAdapter active(nullptr);  // must outlive the run
  std::map<std::string, Tensors> adapters;
  for (const auto& name : split(names)) {
    const std::string file = folder + "/adapters/" + name + ".onnx_adapter";
    if (name == "-" || adapters.count(name)) continue;
    require_fit(adapters[name] = AdapterFile(file).read(), of_adapters, file);
    if (mode == "one") {
      try {
        active = Ort::LoraAdapter::CreateLoraAdapter(file, nullptr);
      } catch (const Ort::Exception& error) {
        throw Refused(std::string("ONNX Runtime takes no such adapter file: ") + error.what(), file);
      }
      options.AddActiveLoraAdapter(active);
    }
  }
  if (mode == "rows") {
    const Tensors base;
    std::vector<const Tensors*> rows;
    for (const auto& name : split(names)) rows.push_back(name == "-" ? &base : &adapters.at(name));
    if (rows.size() != ids.size()) throw std::invalid_argument("there must be as many names as rows");
    for (const auto& [name, input] : of_adapters) {
      const bool is_brought = std::any_of(rows.begin(), rows.end(), [&, key = name](const Tensors* row) { return row->count(key); });
      if (is_brought) feeds[name] = stacked(name, input, rows);
    }
  }
  // A graph of `--inputs required` has no defaults of its own: what no adapter brings has rank 0. One that is active brings its own.
  for (size_t i = 0; i < session.GetInputCount(); ++i) {
    const std::string name = session.GetInputNameAllocated(i, Ort::AllocatorWithDefaultOptions()).get();
    const bool is_active = mode == "one" && adapters.begin()->second.count(name);
    if (of_adapters.count(name) && !feeds.count(name) && !is_active) {
      const Tensors none;
      feeds[name] = stacked(name, of_adapters.at(name), {&none});
    }
  }
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  std::vector<const char*> input_names;
  std::vector<Ort::Value> values;
  for (auto& [name, tensor] : feeds) {
    input_names.push_back(name.c_str());
    const auto type = static_cast<ONNXTensorElementDataType>(tensor.type);
    values.push_back(Ort::Value::CreateTensor(memory, tensor.data.data(), tensor.data.size(), tensor.dims.data(), tensor.dims.size(), type));
  }
  const char* output = "logits";
  const auto results = session.Run(options, input_names.data(), values.data(), values.size(), &output, 1);
  const auto shape = results[0].GetTensorTypeAndShapeInfo().GetShape();
  const float* logits = results[0].GetTensorData<float>();
  const int64_t n = shape.back(), per_row = product({shape.begin() + 1, shape.end()});
  std::cout << std::setprecision(9);
  for (int64_t row = 0; row < shape[0]; ++row) {
    const int64_t last = shape.size() == 3 ? static_cast<int64_t>(ids[row].size()) - 1 : 0;
    for (int64_t i = 0; i < n; ++i) std::cout << logits[row * per_row + last * n + i] << (i + 1 < n ? ' ' : '\n');
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc == 4 ? argv[2] : "";
  const bool is_one = mode == "one" && std::string(argv[3]).find(',') == std::string::npos && std::string(argv[3]) != "-";
  Ids ids;
  for (std::string line; std::getline(std::cin, line);) {
    std::stringstream stream(line);
    ids.emplace_back(std::istream_iterator<int64_t>(stream), std::istream_iterator<int64_t>());
  }
  if (!(is_one || mode == "rows") || ids.empty() || ids[0].empty()) {
    std::cerr << "usage: lora_rows FOLDER one NAME < ids\n       lora_rows FOLDER rows NAME,NAME,- < ids\n";
    return 2;
  }
  try {
    run(argv[1], mode, argv[3], ids);
  } catch (const Refused& error) {
    std::cerr << "refused: " << error.what() << '\n';
    return 3;
  } catch (const std::exception& error) {
    std::cerr << "failed: " << error.what() << '\n';
    return 1;
  }
}
