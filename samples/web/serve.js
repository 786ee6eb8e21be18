// Serve the page with an exported folder, on this machine only.
//
//   node samples/web/serve.js FOLDER [--port 8080]
import { createReadStream } from "node:fs";
import { stat } from "node:fs/promises";
import { createServer } from "node:http";
import { extname, join, normalize, resolve, sep } from "node:path";
import { pipeline } from "node:stream";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: { port: { type: "string", default: "8080" } },
});
if (positionals.length !== 1) {
  console.error("usage: serve.js FOLDER [--port 8080]");
  process.exit(2);
}
const samples = fileURLToPath(new URL("..", import.meta.url));
// What is served, by the start of its path; the first that fits.
const ROOTS = [
  ["/export/", resolve(positionals[0])],
  ["/js/", join(samples, "js")],
  ["/node_modules/onnxruntime-web/dist/", join(samples, "node_modules/onnxruntime-web/dist")],
  ["/node_modules/@huggingface/tokenizers/dist/", join(samples, "node_modules/@huggingface/tokenizers/dist")],
  ["/", join(samples, "web")],
];
const TYPES = {
  ".html": "text/html; charset=utf-8",
  ".css": "text/css; charset=utf-8",
  ".js": "text/javascript; charset=utf-8",
  ".mjs": "text/javascript; charset=utf-8",
  ".json": "application/json",
  ".wasm": "application/wasm",
};
const HEADERS = {
  // Isolated from other pages, so that WebAssembly may have threads.
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Embedder-Policy": "require-corp",
  "X-Content-Type-Options": "nosniff",
  "Cache-Control": "no-cache",
};

/** The file that a path names; null for one outside what is served. */
function fileOf(path) {
  const [start, root] = ROOTS.find(([prefix]) => path.startsWith(prefix));
  const file = normalize(join(root, path.slice(start.length) || "index.html"));
  return file.startsWith(root + sep) ? file : null;
}

const server = createServer(async (request, response) => {
  const fail = (code, text) => response.writeHead(code, HEADERS).end(text);
  if (!["GET", "HEAD"].includes(request.method)) return fail(405, "GET only");
  let file, size;
  try {
    file = fileOf(decodeURIComponent(new URL(request.url, "http://localhost").pathname));
    const found = await stat(file);
    if (!found.isFile()) throw new Error("no file");
    size = found.size;
  } catch {
    return fail(404, "not found");
  }
  const [, first, last] = /^bytes=(\d+)-(\d*)$/.exec(request.headers.range ?? "") ?? [];
  const start = Number(first ?? 0),
    end = Math.min(last ? Number(last) : size - 1, size - 1);
  if (first !== undefined && (start > end || start >= size)) return fail(416, "no such range");
  const headers = {
    ...HEADERS,
    "Content-Type": TYPES[extname(file)] ?? "application/octet-stream",
    "Content-Length": end - start + 1,
  };
  if (first !== undefined) headers["Content-Range"] = `bytes ${start}-${end}/${size}`;
  response.writeHead(first === undefined ? 200 : 206, headers);
  if (request.method === "HEAD" || size === 0) return response.end();
  pipeline(createReadStream(file, { start, end }), response, () => {});
});

server.listen(Number(values.port), "127.0.0.1", () => {
  console.log(`http://localhost:${server.address().port}/`);
});
