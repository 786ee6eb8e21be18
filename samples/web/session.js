/** A session of an exported folder's graph: on WebGPU where there is one that computes it right, else on WebAssembly. */
import { toTensors } from "./js/adapters.js";

const DIST = "/node_modules/onnxruntime-web/dist";
const BUILDS = { wasm: `${DIST}/ort.wasm.bundle.min.mjs`, webgpu: `${DIST}/ort.webgpu.bundle.min.mjs` };
// Of the largest output: float32 sums in another order.
const TOLERANCE = 1e-3;

const NAMES = { wasm: "WebAssembly", webgpu: "WebGPU" };

async function start(device, graph, data) {
  const ort = await import(BUILDS[device]);
  ort.env.wasm.wasmPaths = `${DIST}/`;
  ort.env.logLevel = "error";
  // Threads need a page that is isolated from others, which serve.js asks for.
  if (!globalThis.crossOriginIsolated) ort.env.wasm.numThreads = 1;
  const externalData = [{ path: "model.onnx.data", data }];
  const options = { executionProviders: [device], externalData, logSeverityLevel: 3 };
  const session = await ort.InferenceSession.create(graph, options);
  return { ort, session, device: NAMES[device], leastRank: device === "webgpu" ? 1 : 0 };
}

/** Some tokens by each adapter in turn in one run, and as the base in another, where every pair has rank 0. */
async function sample({ ort, session, leastRank }, folder) {
  folder.leastRank = leastRank;
  const names = [null, ...folder.adapters.keys()];
  const length = 5;
  const found = [];
  for (const rows of [names, names.map(() => null)]) {
    const size = rows.length * length;
    const values = (name) => (i) => BigInt(name === "input_ids" ? 100 + i : name === "attention_mask" ? 1 : 0);
    const own = folder.contract.inputs.map(({ name }) => {
      const data = BigInt64Array.from(Array.from({ length: size }, (_, i) => values(name)(i)));
      return [name, { type: "int64", dims: [rows.length, length], data }];
    });
    const feeds = toTensors(ort, { ...Object.fromEntries(own), ...folder.feeds(rows, rows.length) });
    const { logits } = await session.run(feeds, ["logits"]);
    found.push(...(await logits.getData()));
  }
  return found;
}

/** Whether two runs of `sample` agree; a class that pads a smaller head is the lowest number in both. */
function agree(expected, found) {
  const isPadding = (x) => x < -1e30;
  const largest = Math.max(1, ...expected.filter((x) => !isPadding(x)).map(Math.abs));
  const isNear = (x, y) => (isPadding(x) ? isPadding(y) : Math.abs(x - y) <= TOLERANCE * largest);
  return expected.length === found.length && expected.every((x, i) => isNear(x, found[i]));
}

/** The device asked for in the page's address (?device=wasm or webgpu), or WebGPU if it gives WebAssembly's numbers. */
async function choose(folder, graph, data) {
  const asked = new URLSearchParams(location.search).get("device");
  if (asked === "webgpu") return start("webgpu", graph, data);
  const plain = await start("wasm", graph, data);
  if (asked === "wasm" || !(await navigator.gpu?.requestAdapter())) return plain;
  try {
    const fast = await start("webgpu", graph, data);
    const isRight = agree(await sample(plain, folder), await sample(fast, folder));
    await (isRight ? plain : fast).session.release();
    if (isRight) return fast;
    console.warn("WebGPU gives other numbers than WebAssembly here, so WebAssembly runs.");
  } catch (error) {
    console.warn(`WebGPU does not run this graph, so WebAssembly does: ${error.message}`);
  }
  return plain;
}

/** A session of `graph`, with what `folder` feeds set up for it. */
export async function openSession(folder, graph, data) {
  const { ort, session, leastRank, device } = await choose(folder, graph, data);
  folder.leastRank = leastRank;
  return { ort, session, device };
}
