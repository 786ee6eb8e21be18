/** The page: an exported folder in the browser, its adapters chosen line by line. */
import { Tokenizer } from "@huggingface/tokenizers";
import { openExport } from "./js/adapters.js";
import { Classifier } from "./js/classifier.js";
import { openTokenizers } from "./js/texts.js";
import { openSession } from "./session.js";

const EXAMPLES = [
  "Open a socket, bind it to an address and listen for connections.",
  "Permission is hereby granted, free of charge, to any person obtaining a copy of this software.",
  "for (int i = 0; i < n; ++i) sum += x[i];",
];
const SHOWN = 3; // likeliest labels
const place = (id) => document.getElementById(id);
const megabytes = (n) => `${(n / 1e6).toFixed(1)} MB`;

/** A file of the folder, or a part of it; `onBytes` is told how much of it is there. */
async function read(path, offset, length, onBytes = () => {}) {
  const headers = length === undefined ? {} : { Range: `bytes=${offset}-${offset + length - 1}` };
  const response = await fetch(`export/${path}`, { headers });
  if (!response.ok) throw new Error(`${path}: ${response.status} ${response.statusText}`);
  const bytes = new Uint8Array(Number(response.headers.get("Content-Length")));
  let at = 0;
  for (const reader = response.body.getReader(); ;) {
    const { done, value } = await reader.read();
    if (done) return bytes.subarray(0, at);
    bytes.set(value, at);
    onBytes((at += value.length), bytes.length);
  }
}

async function open() {
  const onBytes = (n, total) => {
    place("progress").value = n / total;
    place("stage").textContent = `Loading the model: ${megabytes(n)} of ${megabytes(total)}`;
  };
  const data = await read("model.onnx.data", undefined, undefined, onBytes);
  place("stage").textContent = "Starting the model";
  place("progress").removeAttribute("value");
  // The heads' defaults are parts of the weights, which are here already.
  const parts = async (path, offset, length) =>
    path === "model.onnx.data" ? data.subarray(offset, offset + length) : read(path, offset, length);
  const folder = await openExport(parts);
  const textsOf = await openTokenizers(Tokenizer, read, folder.manifest);
  const { ort, session, device } = await openSession(folder, await read("model.onnx"), data);
  const names = [...folder.adapters.keys()].join(", ");
  place("about").textContent =
    `A model of ${megabytes(data.length)} was loaded once. Every line is read by the adapter that you choose for it ` +
    `(${names}), all lines in one run. Nothing leaves this page.`;
  return { folder, device, classifier: new Classifier(ort, folder, session, textsOf) };
}

function lineOf(text, adapter) {
  const line = place("line").content.cloneNode(true).firstElementChild;
  line.querySelector("textarea").value = text;
  line.dataset.adapter = adapter;
  line.querySelector("textarea").addEventListener("input", update);
  line.querySelector(".remove").addEventListener("click", () => {
    line.remove();
    update();
  });
  place("lines").append(line);
  offerAdapters(line);
  return line;
}

/** One choice for each adapter that is loaded now. */
function offerAdapters(line) {
  const group = `adapter-${crypto.randomUUID()}`;
  const choices = [...page.folder.adapters.keys()].map((name) => {
    const label = document.createElement("label"),
      input = document.createElement("input");
    Object.assign(input, {
      type: "radio",
      name: group,
      value: name,
      checked: name === line.dataset.adapter,
      className: "unseen",
    });
    input.addEventListener("change", () => {
      line.dataset.adapter = name;
      update();
    });
    label.append(input, name);
    return label;
  });
  line.querySelector("fieldset").replaceChildren(line.querySelector("legend"), ...choices);
}

function show(line, scores) {
  const found = line.querySelector(".found");
  if (!scores) {
    const empty = Object.assign(document.createElement("p"), { className: "empty", textContent: "Type something." });
    return found.replaceChildren(empty);
  }
  const best = Object.assign(document.createElement("p"), { className: "best", textContent: scores[0].label });
  const rows = scores.slice(0, SHOWN).map(({ label, score }) => {
    const row = Object.assign(document.createElement("div"), { className: "score" });
    const [name, track, share] = ["span", "span", "span"].map((tag) => document.createElement(tag));
    name.textContent = name.title = label;
    track.className = "track";
    track.append(document.createElement("i"));
    track.firstChild.style.width = `${100 * score}%`;
    share.textContent = `${(100 * score).toFixed(1)} %`;
    row.append(name, track, share);
    return row;
  });
  found.replaceChildren(best, ...rows);
}

let isRunning = false,
  isStale = false;

/** Run all lines at once; what changes meanwhile is run next. */
async function update() {
  if (isRunning) return void (isStale = true);
  isRunning = true;
  document.body.dataset.running = "true";
  try {
    do {
      isStale = false;
      const lines = [...place("lines").children];
      const full = lines.filter((line) => line.querySelector("textarea").value.trim());
      const texts = full.map((line) => line.querySelector("textarea").value);
      const adapters = full.map((line) => line.dataset.adapter);
      const start = performance.now();
      const found = texts.length ? await page.classifier.classify(texts, adapters) : [];
      const took = performance.now() - start;
      for (const line of lines) show(line, found[full.indexOf(line)]);
      const n = new Set(adapters).size;
      place("status").textContent = texts.length
        ? `${texts.length} ${texts.length === 1 ? "line" : "lines"}, ${n} ${n === 1 ? "adapter" : "adapters"}, one run: ${took.toFixed(0)} ms (${page.device})`
        : page.device;
      globalThis.found = full.map((line, row) => ({ text: texts[row], adapter: adapters[row], scores: found[row] }));
    } while (isStale);
    place("problem").hidden = true;
  } catch (error) {
    problem(error);
  } finally {
    isRunning = false;
    document.body.dataset.running = "false";
  }
}

function problem(error) {
  place("loading").hidden = true;
  place("problem").textContent = error.message;
  place("problem").hidden = false;
  console.error(error);
}

async function loadFile(file) {
  const name = file.name.replace(/\.onnx_adapter$/, "");
  try {
    page.folder.load(name, new Uint8Array(await file.arrayBuffer()), { file: file.name });
  } catch (error) {
    return problem(error);
  }
  for (const line of place("lines").children) offerAdapters(line);
  await update();
}

let page;
try {
  page = await open();
  const names = [...page.folder.adapters.keys()];
  EXAMPLES.forEach((text, index) => lineOf(text, names[index % names.length]));
  for (const id of ["lines", "actions"]) place(id).hidden = false;
  await update();
  place("loading").hidden = true;
  place("add").addEventListener("click", () => {
    lineOf("", names[0]).querySelector("textarea").focus();
    update();
  });
  place("file").addEventListener("change", ({ target }) => {
    if (target.files.length) loadFile(target.files[0]).finally(() => (target.value = ""));
  });
  document.body.dataset.ready = page.device;
} catch (error) {
  problem(error);
}
