/** An exported folder on disk, and sessions of its graph, with onnxruntime-node. */
import { open } from "node:fs/promises";
import { join } from "node:path";
import * as ort from "onnxruntime-node";
import { Tokenizer } from "@huggingface/tokenizers";
import { openExport } from "../js/adapters.js";
import { openTokenizers } from "../js/texts.js";

/** Reads files of the folder at `root`, or parts of them. */
export function reader(root) {
  return async (path, offset = 0, length = null) => {
    const file = await open(join(root, path));
    try {
      const bytes = new Uint8Array(length ?? (await file.stat()).size - offset);
      const { bytesRead } = await file.read(bytes, 0, bytes.length, offset);
      return bytes.subarray(0, bytesRead);
    } finally {
      await file.close();
    }
  };
}

/** The folder at `root` with its session and its tokenizers. */
export async function openFolder(root) {
  const read = reader(root);
  const folder = await openExport(read);
  const session = await ort.InferenceSession.create(join(root, "model.onnx"), { logSeverityLevel: 3 });
  folder.requireGraph(session);
  return { ort, folder, session, textsOf: await openTokenizers(Tokenizer, read, folder.manifest) };
}

/** Run `main` and print what it refuses as one line: an exit code of 3, as `lora-export` has it. */
export async function run(main) {
  try {
    await main();
  } catch (error) {
    if (error.name !== "AdapterError") throw error;
    console.error(`refused: ${error.message}`);
    process.exitCode = 3;
  }
}
