/** The adapters of an exported folder, for ONNX Runtime in JavaScript; see adapters.js. */

export type Dtype = "float32" | "float16" | "int64";

export interface Tensor {
  type: Dtype;
  dims: readonly number[];
  /** float16 as its bits. */
  data: Float32Array | Uint16Array | BigInt64Array;
}
export type Tensors = Record<string, Tensor>;

/** A name, nothing (the base), or weights by name. */
export type RowAdapter = string | null | Record<string, number>;

export interface TensorSpec {
  name: string;
  dtype: string;
  dims: readonly (number | string)[];
}
export interface AdapterInput extends TensorSpec {
  dtype: Dtype;
  module: string;
  kind: "lora_A" | "lora_B" | "lora_magnitude" | "weight" | "bias" | "token_ids" | "token_delta" | "lora_gate";
  default: { shape: number[]; offset: number; length: number } | null;
  base_has_default: boolean;
}
export interface Contract {
  inputs: TensorSpec[];
  outputs: TensorSpec[];
  optional_inputs?: TensorSpec[];
  adapter_inputs: AdapterInput[];
  adapter_inputs_required?: boolean;
  cache_layout?: "columns" | "tokens" | null;
}
export interface AdapterRecord {
  name: string;
  file?: string | null;
  files?: Record<string, string>;
  labels: Record<string, string> | null;
  n_labels: number | null;
  invocation_tokens?: number[] | null;
}
/** lora_export.json; docs/contract.md has every field. */
export interface Manifest {
  schema: 1;
  kind: "merged" | "dynamic";
  task: string;
  dtype: string;
  adapters: AdapterRecord[];
  contract?: Contract;
  graphs?: Record<string, Contract>;
  files: Record<string, string>;
}

/** Something does not fit: `file` and `tensor` say where, where they are known. */
export class AdapterError extends Error {
  constructor(what: string, where?: { file?: string; tensor?: string; expected?: string; found?: string });
  readonly file?: string;
  readonly tensor?: string;
}

/** The bytes of `path` in the folder, or `length` of them from `offset` on. */
export type Read = (path: string, offset?: number, length?: number) => Promise<Uint8Array>;

/** Open an exported folder and load its adapters. */
export function openExport(read: Read, options?: { graph?: string | null; verify?: boolean }): Promise<ExportedFolder>;

/** An exported folder: its manifest, its adapters, and what a run is fed. */
export class ExportedFolder {
  constructor(manifest: Manifest, graph: string | null, defaults: Tensors);
  readonly manifest: Manifest;
  readonly contract: Contract;
  readonly defaults: Tensors;
  /** 0; set it to 1 for WebGPU, whose kernels take no tensor without elements: a pair of zeros, a token that is none. */
  leastRank: 0 | 1;
  readonly adapters: Map<string, { tensors: Tensors; invocationTokens: number[] | null }>;
  /** Load the bytes of an `.onnx_adapter` file under `name`. */
  load(name: string, bytes: Uint8Array, options?: { file?: string; invocationTokens?: number[] | null }): void;
  unload(name: string): void;
  /** Refuse a session of another graph. */
  requireGraph(session: { readonly inputNames: readonly string[] }): void;
  /** All adapter inputs of a run: for all rows the same, or a list with an entry for each. */
  feeds(
    adapters: RowAdapter | readonly RowAdapter[],
    batch: number,
    options?: { ids?: readonly (readonly (number | bigint)[])[] | null; gate?: Tensor | null },
  ): Tensors;
  /** The gate of prompts, `[batch, sequence, 1]`; a step that continues a cache is fed its last column. */
  gate(adapters: RowAdapter | readonly RowAdapter[], ids: readonly (readonly (number | bigint)[])[]): Tensor;
  /** The number of each row's classes; null for a graph whose heads adapters do not bring. */
  classes(adapters: RowAdapter | readonly RowAdapter[], batch: number): number[] | null;
}

export function readManifest(text: string): Manifest;
/** `path` of a manifest, refused where it leaves the folder. */
export function withinFolder(path: string): string;
/** The tensors of an `.onnx_adapter` file; `file` is what errors call it. */
export function readAdapter(bytes: Uint8Array, file: string): Tensors;
/** `feeds` as tensors of `ort`, an onnxruntime-web or onnxruntime-node. */
export function toTensors<T>(
  ort: { Tensor: new (type: any, data: any, dims: readonly number[]) => T },
  feeds: Tensors,
): Record<string, T>;
export function fromHalf(bits: number): number;
export function toHalf(number: number): number;
