// What a host in TypeScript writes. `npx tsc -p samples/js` checks it against the types.
import * as ort from "onnxruntime-web";
import { AdapterError, type ExportedFolder, openExport, toTensors } from "./adapters.js";

const read = async (path: string, offset?: number, length?: number): Promise<Uint8Array> => {
  const range = length === undefined ? undefined : { Range: `bytes=${offset}-${offset! + length - 1}` };
  return new Uint8Array(await (await fetch(`/export/${path}`, { headers: range })).arrayBuffer());
};

export async function scores(inputs: ort.InferenceSession.FeedsType): Promise<Float32Array[]> {
  const folder: ExportedFolder = await openExport(read);
  const session = await ort.InferenceSession.create("/export/model.onnx");
  folder.requireGraph(session);
  const rows = ["topic", null, { kind: 0.5 }];
  try {
    const feeds = toTensors<ort.Tensor>(ort, folder.feeds(rows, rows.length));
    const { logits } = await session.run({ ...inputs, ...feeds });
    const [, n] = logits.dims;
    const classes = folder.classes(rows, rows.length) ?? rows.map(() => n);
    return classes.map((own, row) => (logits.data as Float32Array).slice(row * n, row * n + own));
  } catch (error) {
    if (error instanceof AdapterError) console.error(error.file, error.tensor);
    throw error;
  }
}
