/**
 * The adapters of an exported folder, for ONNX Runtime in JavaScript: onnxruntime-web and onnxruntime-node.
 *
 * Neither can feed optional inputs or knows LoraAdapter. So the folder is one of `lora-export dynamic --inputs required`,
 * and this module makes the feeds: for one adapter, a blend, or another one for each row. It has no dependencies.
 *
 *     const folder = await openExport(read)                       // read(path, offset?, length?) gives bytes
 *     const session = await ort.InferenceSession.create(…)        // of folder's model.onnx and model.onnx.data
 *     folder.requireGraph(session)
 *     const feeds = toTensors(ort, folder.feeds(["topic", null, { kind: 0.5 }], 3))
 *     const { logits } = await session.run({ ...inputs, ...feeds })
 *
 * What does not fit is refused with an AdapterError that names the file and the tensor. docs/contract.md has the rules.
 */

/** Something does not fit: `file` and `tensor` say where, where they are known. */
export class AdapterError extends Error {
  constructor(what, { file, tensor, expected, found } = {}) {
    const where = [file, tensor].filter(Boolean).join(": ");
    super(
      [what, where && ` [${where}]`, expected && `; expected ${expected}`, found && `; found ${found}`]
        .filter(Boolean)
        .join(""),
    );
    this.name = "AdapterError";
    Object.assign(this, { file, tensor });
  }
}

const MANIFEST = "lora_export.json";
const LOWEST = { float32: -3.4028234663852886e38, float16: -65504 };
const ARRAYS = { float32: Float32Array, float16: Uint16Array, int64: BigInt64Array };
const ONNX_TYPES = { 1: "float32", 7: "int64", 10: "float16", 16: "bfloat16" };

// As `lora_export/contract.py` has it. `axis`: where adapters differ in size; rows are filled up there.
const KINDS = {
  lora_A: { axis: 2, fill: 0, blend: "concatenate", empty: true, companions: ["lora_B"] },
  lora_B: { axis: 1, fill: 0, blend: "weighted", empty: true, companions: ["lora_A"] },
  lora_magnitude: { axis: null, blend: "taskVectors", constant: 1, companions: [] },
  weight: { axis: 2, fill: 0, blend: "taskVectors", constant: 0, companions: ["bias"] },
  bias: { axis: 2, fill: "lowest", blend: "taskVectors", constant: 0, companions: [] },
  token_ids: { axis: 1, fill: -1, blend: "concatenate", empty: true, companions: ["token_delta"] },
  token_delta: { axis: 1, fill: 0, blend: "weighted", empty: true, companions: ["token_ids"] },
  lora_gate: { axis: null, blend: "fromPrompt", constant: 1, companions: [] },
};

const product = (dims) => dims.reduce((a, b) => a * b, 1);

// ---------------------------------------------------------------------------------------------------------- float16

const scratch = new DataView(new ArrayBuffer(4));

/** The number that the 16 bits are. */
export function fromHalf(bits) {
  const exponent = (bits >> 10) & 31,
    fraction = bits & 1023,
    sign = bits & 0x8000 ? -1 : 1;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
}

/** The 16 bits nearest to a float32, ties to even. */
export function toHalf(number) {
  scratch.setFloat32(0, number);
  const bits = scratch.getUint32(0),
    sign = (bits >>> 16) & 0x8000,
    magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return sign | 0x7e00;
  if (magnitude >= 0x477ff000) return sign | 0x7c00; // rounds to infinity
  if (magnitude < 0x38800000) {
    // subnormal: float32 adds with the right rounding
    scratch.setUint32(0, magnitude);
    const sum = Math.fround(scratch.getFloat32(0) + 0.5);
    scratch.setFloat32(0, sum);
    return sign | (scratch.getUint32(0) - 0x3f000000);
  }
  const odd = (magnitude >>> 13) & 1;
  return sign | ((magnitude - 0x38000000 + 0xfff + odd) >>> 13);
}

const getter = (dtype) => (dtype === "float16" ? fromHalf : (x) => x);
const setter = (dtype) => (dtype === "float16" ? toHalf : dtype === "int64" ? BigInt : Math.fround);

// ------------------------------------------------------------------------------------------------ .onnx_adapter files

/** The tensors of an `.onnx_adapter` file (flatbuffer "TORT", format version 1) by name. */
export function readAdapter(bytes, file) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const refuse = (what, tensor) => {
    throw new AdapterError(what, { file, tensor });
  };
  const slice = (start, length, tensor) => {
    if (start < 0 || start + length > bytes.byteLength) refuse("The adapter file is truncated", tensor);
    return bytes.slice(start, start + length);
  };
  const field = (table, index) => {
    const vtable = table - view.getInt32(table, true);
    const at = 4 + 2 * index;
    const offset = at < view.getUint16(vtable, true) ? view.getUint16(vtable + at, true) : 0;
    return offset ? table + offset : null;
  };
  const int32 = (place) => (place === null ? 0 : view.getInt32(place, true));
  const vector = (place) => {
    if (place === null) return [0, 0];
    const start = place + view.getUint32(place, true);
    return [start + 4, view.getUint32(start, true)];
  };
  const text = (place) => new TextDecoder("utf-8", { fatal: true }).decode(slice(...vector(place)));
  const tensors = {};
  let name; // of the tensor being read
  try {
    if (new TextDecoder().decode(slice(4, 4)) !== "TORT") refuse("The file is no ONNX Runtime adapter");
    const root = view.getUint32(0, true);
    const version = int32(field(root, 0));
    if (version !== 1) refuse(`The adapter file has format version ${version}, not 1`);
    const [start, n] = vector(field(root, 3));
    for (let index = 0; index < n; index++) {
      name = undefined;
      const place = start + 4 * index,
        table = place + view.getUint32(place, true);
      name = text(field(table, 0));
      const [dimsAt, nDims] = vector(field(table, 1));
      const dims = Array.from({ length: nDims }, (_, i) => Number(view.getBigInt64(dimsAt + 8 * i, true)));
      const type = int32(field(table, 2)),
        dtype = ONNX_TYPES[type];
      if (!(dtype in ARRAYS))
        refuse(`The adapter has a tensor of ${dtype ?? `ONNX type ${type}`}, which is not served in JavaScript`, name);
      const raw = slice(...vector(field(table, 3)), name);
      if (raw.byteLength !== product(dims) * ARRAYS[dtype].BYTES_PER_ELEMENT)
        refuse(`The adapter has ${raw.byteLength} bytes for ${dtype} [${dims}]`, name);
      if (name in tensors) refuse("The adapter has two tensors of one name", name);
      tensors[name] = { type: dtype, dims, data: new ARRAYS[dtype](raw.buffer) };
    }
  } catch (error) {
    if (error instanceof RangeError || error instanceof TypeError)
      refuse("The adapter file is truncated or damaged", name);
    throw error;
  }
  return tensors;
}

/** Refuse tensors that are not those of the inputs of `contract`. */
function requireFit(tensors, contract, file) {
  const byName = new Map(contract.adapter_inputs.map((entry) => [entry.name, entry]));
  const sizes = { rows: 1 };
  for (const [tensor, { type, dims, data }] of Object.entries(tensors)) {
    const entry = byName.get(tensor);
    const found = `${type} [${dims}]`;
    if (!entry)
      throw new AdapterError("The adapter was made for another graph, which has no such input", {
        file,
        tensor,
        found,
      });
    const fits =
      entry.dims.length === dims.length &&
      entry.dims.every((dim, i) => dims[i] === (typeof dim === "number" ? dim : (sizes[dim] ??= dims[i])));
    if (type !== entry.dtype || !fits)
      throw new AdapterError("The adapter was made for another graph", {
        file,
        tensor,
        found,
        expected: `${entry.dtype} [${entry.dims}]`,
      });
    if (type !== "int64" && !data.every((x) => Number.isFinite(getter(type)(x))))
      throw new AdapterError("The adapter holds numbers that are not finite", { file, tensor });
  }
  for (const [tensor, { dims }] of Object.entries(tensors)) {
    const entry = byName.get(tensor);
    for (const kind of KINDS[entry.kind].companions) {
      const other = contract.adapter_inputs.find((each) => each.module === entry.module && each.kind === kind);
      // A replaced weight may go with the stored bias, if that has its size.
      if (other && !(other.name in tensors) && other.default?.shape.at(-1) !== dims.at(-1)) {
        throw new AdapterError("The adapter lacks a tensor", {
          file,
          tensor: other.name,
          expected: `it beside ${tensor}`,
        });
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------- stacking of rows

/** One after another along `axis`. */
function concatenated(tensors, axis) {
  const [{ type, dims }] = tensors;
  const outer = product(dims.slice(0, axis));
  const whole = tensors.reduce((sum, each) => sum + each.dims[axis], 0);
  const data = new ARRAYS[type](outer * whole * product(dims.slice(axis + 1)));
  let at = 0;
  for (let i = 0; i < outer; i++) {
    for (const each of tensors) {
      const n = product(each.dims.slice(axis));
      data.set(each.data.subarray(i * n, (i + 1) * n), at);
      at += n;
    }
  }
  return { type, dims: dims.map((dim, i) => (i === axis ? whole : dim)), data };
}

function scaled(tensor, weight) {
  if (weight === 1) return tensor;
  const [get, set] = [getter(tensor.type), setter(tensor.type)];
  const factor = get(set(weight)); // in the tensor's own dtype
  return { ...tensor, data: tensor.data.map((x) => set(Math.fround(get(x) * factor))) };
}

/** `W0 + Σ w_k (W_k − W0)` in float32, rounded once; `W0` is 0 if the base has none. */
function addedTaskVectors(entry, brought, base) {
  const sizes = new Set(brought.map(([each]) => String(each.dims)));
  if (entry.base_has_default) sizes.add(String(base.dims));
  if (sizes.size > 1)
    throw new AdapterError("A row blends heads of different sizes", {
      tensor: entry.name,
      found: [...sizes].map((dims) => `[${dims}]`).join(" and "),
    });
  const [[{ type, dims, data }]] = brought,
    [get, set] = [getter(type), setter(type)];
  const result = data.map((_, i) => {
    const start = entry.base_has_default ? get(base.data[i]) : 0;
    const sum = brought.reduce(
      (total, [each, weight]) =>
        Math.fround(total + Math.fround(Math.fround(weight) * Math.fround(get(each.data[i]) - start))),
      0,
    );
    return set(Math.fround(start + sum));
  });
  return { type, dims, data: result };
}

/** What one row is fed, `[1, …]`, of its own size. */
function blended(entry, row, adapters, base) {
  const { blend, axis } = KINDS[entry.kind];
  const brought = row
    .map(([name, weight]) => [adapters.get(name).tensors[entry.name], weight])
    .filter(([tensor]) => tensor);
  if (!brought.length) return base;
  if (brought.length === 1 && (brought[0][1] === 1 || blend === "concatenate")) return brought[0][0];
  if (blend === "taskVectors") return addedTaskVectors(entry, brought, base);
  return concatenated(
    brought.map(([tensor, weight]) => (blend === "weighted" ? scaled(tensor, weight) : tensor)),
    axis,
  );
}

/** `[1, …]` each as `[rows, …]`, filled up to the largest. */
function padded(entry, values) {
  if (new Set(values.map((each) => String(each.dims))).size === 1) return concatenated(values, 0);
  const { axis, fill } = KINDS[entry.kind],
    [{ type }] = values;
  const most = Math.max(...values.map((each) => each.dims[axis]));
  return concatenated(
    values.map((each) => {
      const missing = each.dims.map((dim, i) => (i === axis ? most - dim : dim));
      const filler = new ARRAYS[type](product(missing)).fill(setter(type)(fill === "lowest" ? LOWEST[type] : fill));
      return concatenated([each, { type, dims: missing, data: filler }], axis);
    }),
    0,
  );
}

// ------------------------------------------------------------------------------------------------------- the folder

/** An exported folder: its manifest, its adapters, and what a run is fed. */
export class ExportedFolder {
  constructor(manifest, graph, defaults) {
    this.manifest = manifest;
    this.contract = graph ? manifest.graphs[graph] : manifest.contract;
    this.defaults = defaults;
    this.adapters = new Map();
    /** Set it to 1 for WebGPU, whose kernels take no tensor without elements: a pair of zeros, a token that is none. */
    this.leastRank = 0;
  }

  /** Load an adapter's file under `name`. Its `invocation_tokens` are in the manifest, of an activated LoRA. */
  load(name, bytes, { file = name, invocationTokens = null } = {}) {
    const tensors = readAdapter(bytes, file);
    requireFit(tensors, this.contract, file);
    this.adapters.set(name, { tensors, invocationTokens });
  }

  unload(name) {
    this.#known(name);
    this.adapters.delete(name);
  }

  /** Refuse a session of another graph: ONNX Runtime drops feeds that it does not know in silence. */
  requireGraph(session) {
    const { inputs, adapter_inputs, optional_inputs = [] } = this.contract;
    const names = (specs) => specs.map(({ name }) => name);
    const needed = names([...inputs, ...adapter_inputs]),
      known = new Set([...needed, ...names(optional_inputs)]);
    const other =
      needed.find((name) => !session.inputNames.includes(name)) ?? session.inputNames.find((name) => !known.has(name));
    if (other !== undefined)
      throw new AdapterError("The session's graph is not the one that the manifest describes", {
        file: MANIFEST,
        tensor: other,
      });
  }

  /**
   * The adapter inputs of a run by name, all of them: `{ type, dims, data }`.
   *
   * `adapters`: a name, null for the base, or `{ name: weight }`, for all rows; or a list with one of these for each row.
   * `ids`: the prompts' token ids, a list for each row, which an activated LoRA looks for its invocation in; `gate`: as
   * `gate` gave it, for a step that continues a cache.
   */
  feeds(adapters, batch, { ids = null, gate = null } = {}) {
    const rows = this.#rows(adapters, batch);
    const brought = new Set(rows.flat().flatMap(([name]) => Object.keys(this.adapters.get(name).tensors)));
    const isTaskVector = (entry) => KINDS[entry.kind].blend === "taskVectors";
    // Where one of a module's differs from the base, all do: a head's bias has the size of its weight.
    const changed = new Set(
      this.contract.adapter_inputs.filter((e) => isTaskVector(e) && brought.has(e.name)).map((e) => e.module),
    );
    const found = {};
    for (const entry of this.contract.adapter_inputs) {
      const base = this.#default(entry);
      if (entry.kind === "lora_gate")
        found[entry.name] =
          gate ?? (ids || rows.some((row) => this.#invocation(row)) ? this.#gate(rows, ids, batch) : base);
      else if (isTaskVector(entry) ? changed.has(entry.module) : brought.has(entry.name)) {
        found[entry.name] = padded(
          entry,
          rows.map((row) => blended(entry, row, this.adapters, base)),
        );
      } else found[entry.name] = base;
    }
    return found;
  }

  /** The `lora_gate` of prompts, `[batch, sequence, 1]`: 1 from an invocation's last occurrence on. */
  gate(adapters, ids) {
    return this.#gate(this.#rows(adapters, ids.length), ids, ids.length);
  }

  /** The classes that each row's adapter has, by row; null for a graph whose heads adapters do not bring. */
  classes(adapters, batch) {
    const entry = this.contract.adapter_inputs.find(({ kind }) => kind === "weight");
    if (!entry) return null;
    const rows = this.#rows(adapters, batch);
    const found = rows.map((row) => blended(entry, row, this.adapters, this.#default(entry)).dims[2]);
    return rows.length === 1 ? Array(batch).fill(found[0]) : found;
  }

  #known(name) {
    if (!this.adapters.has(name))
      throw new AdapterError(`No adapter "${name}" is loaded`, {
        found: [...this.adapters.keys()].join(", ") || "none",
      });
  }

  /** What each row runs, as [name, weight] pairs; one entry where all run the same. */
  #rows(adapters, batch) {
    if (Array.isArray(adapters) && adapters.length !== batch)
      throw new AdapterError("`adapters` must have one entry for each row", {
        expected: `${batch}`,
        found: `${adapters.length}`,
      });
    const rows = (Array.isArray(adapters) ? adapters : [adapters]).map((entry) => {
      const blend = entry == null ? [] : typeof entry === "string" ? [[entry, 1]] : Object.entries(entry);
      for (const [name, weight] of blend) {
        this.#known(name);
        if (!Number.isFinite(weight))
          throw new AdapterError(`The weight of adapter "${name}" is no finite number`, { found: `${weight}` });
      }
      return blend.filter(([, weight]) => weight !== 0);
    });
    return new Set(rows.map((row) => JSON.stringify(row))).size === 1 ? rows.slice(0, 1) : rows;
  }

  /** What the graph is fed where no adapter is: stored, or a constant. */
  #default({ name, kind, dims, dtype }) {
    if (this.defaults[name]) return this.defaults[name];
    const { axis, empty, fill, constant = fill } = KINDS[kind];
    const size = (dim, i) => (empty && i === axis ? this.leastRank : dim === "rows" || dim === "gate_length" ? 1 : dim);
    const sizes = dims.map(size);
    return { type: dtype, dims: sizes, data: new ARRAYS[dtype](product(sizes)).fill(setter(dtype)(constant)) };
  }

  #invocation(row) {
    const waiting = row.filter(([name]) => this.adapters.get(name).invocationTokens);
    if (waiting.length && row.length > 1)
      throw new AdapterError("A row blends an activated LoRA with another adapter, but a row has one gate", {
        found: row.map(([name]) => name).join(", "),
      });
    return waiting.length ? this.adapters.get(waiting[0][0]).invocationTokens : null;
  }

  #gate(rows, ids, batch) {
    const { name, dtype } = this.contract.adapter_inputs.find(({ kind }) => kind === "lora_gate") ?? {};
    if (!name) throw new AdapterError("The graph has no gate", { file: MANIFEST });
    if (!ids)
      throw new AdapterError("An activated LoRA needs the prompt's token ids, or the gate of a step", { tensor: name });
    const length = ids[0].length,
      data = new ARRAYS[dtype](batch * length).fill(setter(dtype)(1));
    for (let row = 0; row < batch; row++) {
      const tokens = this.#invocation(rows[row % rows.length]);
      if (!tokens) continue;
      let start = length - tokens.length;
      while (start >= 0 && !tokens.every((token, i) => Number(ids[row][start + i]) === token)) start--;
      data.fill(0, row * length, row * length + (start < 0 ? length : start));
    }
    return { type: dtype, dims: [batch, length, 1], data };
  }
}

/** The manifest in `text`, refused where this module does not know it. */
export function readManifest(text) {
  let manifest;
  try {
    manifest = JSON.parse(text);
  } catch (error) {
    throw new AdapterError(`The manifest is no JSON: ${error.message}`, { file: MANIFEST });
  }
  if (manifest?.schema !== 1)
    throw new AdapterError("The manifest is of another version", {
      file: MANIFEST,
      expected: "schema 1",
      found: `schema ${manifest?.schema}`,
    });
  for (const [graph, { adapter_inputs, adapter_inputs_required }] of Object.entries(
    manifest.graphs ?? { "": manifest.contract ?? {} },
  )) {
    const where = { file: MANIFEST, tensor: graph || undefined };
    if (!Array.isArray(adapter_inputs)) throw new AdapterError("The manifest is damaged: it has no contract", where);
    if (adapter_inputs.length && !adapter_inputs_required)
      throw new AdapterError(
        "The graph's adapter inputs are optional, and JavaScript cannot feed those: export with `lora-export dynamic --inputs required`",
        where,
      );
    const unknown = adapter_inputs.find(({ kind, dtype }) => !(kind in KINDS) || !(dtype in ARRAYS));
    if (unknown)
      throw new AdapterError(
        `An adapter input is of a kind or dtype that JavaScript does not serve: ${unknown.kind}, ${unknown.dtype}`,
        { file: MANIFEST, tensor: unknown.name },
      );
  }
  return manifest;
}

/**
 * Open an exported folder and load its adapters.
 *
 * `read(path, offset, length)` gives a file's bytes, or the part of it that is asked for, as a Uint8Array.
 * `graph`: which one of an export of several. `verify`: compare adapter files with the manifest's sha256.
 */
export async function openExport(read, { graph = null, verify = true } = {}) {
  const manifest = readManifest(new TextDecoder().decode(await read(MANIFEST)));
  const folder = new ExportedFolder(manifest, graph, {});
  const data = `${graph === "decoder_with_past_model" ? "decoder_model" : (graph ?? "model")}.onnx.data`;
  for (const { name, dtype, default: stored } of folder.contract.adapter_inputs) {
    if (!stored) continue;
    const bytes = await read(data, stored.offset, stored.length);
    if (bytes.byteLength !== stored.length)
      throw new AdapterError("The data file is truncated", {
        file: data,
        tensor: name,
        expected: `${stored.length} bytes at ${stored.offset}`,
        found: `${bytes.byteLength}`,
      });
    folder.defaults[name] = { type: dtype, dims: stored.shape, data: new ARRAYS[dtype](bytes.slice().buffer) };
  }
  for (const record of manifest.adapters) {
    const file = graph ? record.files[graph] : record.file;
    if (!file) {
      if (graph && Object.keys(record.files).length)
        folder.adapters.set(record.name, { tensors: {}, invocationTokens: null }); // it touches other graphs only
      continue;
    }
    const bytes = await read(withinFolder(file));
    if (verify && (await sha256(bytes)) !== manifest.files[file])
      throw new AdapterError(
        "An adapter file is not the one that was exported: its sha256 is another than the manifest's",
        { file },
      );
    folder.load(record.name, bytes, { file, invocationTokens: record.invocation_tokens });
  }
  return folder;
}

/** `path` of a manifest, refused where it leaves the folder. */
export function withinFolder(path) {
  if (/^\/|\\|(^|\/)\.\.(\/|$)/.test(path))
    throw new AdapterError("The manifest names a file outside its folder", { file: MANIFEST, found: path });
  return path;
}

async function sha256(bytes) {
  if (!globalThis.crypto?.subtle)
    throw new AdapterError(
      "This page is no secure context, so hashes cannot be computed: serve it by https or from localhost, or pass { verify: false }",
    );
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** `feeds` as tensors of `ort`, an onnxruntime-web or onnxruntime-node. */
export function toTensors(ort, feeds) {
  return Object.fromEntries(
    Object.entries(feeds).map(([name, { type, dims, data }]) => [name, new ort.Tensor(type, data, dims)]),
  );
}
