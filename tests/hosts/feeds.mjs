// Of each case in a file of cases: what samples/js/adapters.js feeds, and what onnxruntime-node or -web makes of it.
//
//   node feeds.mjs FOLDER CASES.json OUT PACKAGE
//
// CASES.json: [{ adapters, batch, ids?, inputs?: { name: { type, dims, data } }, outputs?, leastRank? }]. OUT.json and OUT.bin get the feeds of
// each case, or its error, and its outputs.
import { createRequire } from "node:module";
import { open, readFile, stat, writeFile } from "node:fs/promises";
import { openExport, toTensors } from "../../samples/js/adapters.js";

const [folderPath, casesPath, out, name] = process.argv.slice(2);
const read = async (path, offset = 0, length) => {
  const file = await open(`${folderPath}/${path}`);
  try {
    const bytes = new Uint8Array(length ?? (await stat(`${folderPath}/${path}`)).size - offset);
    const { bytesRead } = await file.read(bytes, 0, bytes.length, offset);
    return bytes.subarray(0, bytesRead);
  } finally {
    await file.close();
  }
};

const found = [],
  parts = [];
let at = 0;
const put = ({ type, dims, data }) => {
  const bytes = Buffer.from(data.buffer, data.byteOffset, data.byteLength);
  parts.push(bytes);
  at += bytes.length;
  return { type, dims, at: at - bytes.length, n: bytes.length };
};
const putAll = (tensors) => Object.fromEntries(Object.entries(tensors).map(([key, tensor]) => [key, put(tensor)]));
const refusal = ({ name, message, file, tensor }) => ({ error: { name, message, file, tensor } });

let folder, session, ort;
try {
  folder = await openExport(read);
  if (name) {
    ort = createRequire(new URL("../../samples/package.json", import.meta.url))(name);
    if (name.startsWith("onnxruntime-web")) ort.env.wasm.numThreads = 1;
    const externalData = [
      { path: "model.onnx.data", data: new Uint8Array(await readFile(`${folderPath}/model.onnx.data`)) },
    ];
    session = await ort.InferenceSession.create(
      `${folderPath}/model.onnx`,
      name.startsWith("onnxruntime-web") ? { externalData } : {},
    );
    folder.requireGraph(session);
  }
} catch (error) {
  found.push(refusal(error));
}
const arrays = { int64: (data) => BigInt64Array.from(data, BigInt), float32: (data) => Float32Array.from(data) };
for (const { adapters, batch, ids, inputs, outputs, leastRank = 0 } of folder && !found.length
  ? JSON.parse(await readFile(casesPath))
  : []) {
  try {
    folder.leastRank = leastRank;
    const feeds = folder.feeds(adapters, batch, { ids });
    const own = Object.entries(inputs ?? {}).map(([key, { type, dims, data }]) => [
      key,
      { type, dims, data: arrays[type](data) },
    ]);
    const results = session && (await session.run(toTensors(ort, { ...Object.fromEntries(own), ...feeds }), outputs));
    found.push({ feeds: putAll(feeds), outputs: results && putAll(results), classes: folder.classes(adapters, batch) });
  } catch (error) {
    if (error.name !== "AdapterError") throw error;
    found.push(refusal(error));
  }
}
await writeFile(`${out}.json`, JSON.stringify(found));
await writeFile(`${out}.bin`, Buffer.concat(parts));
