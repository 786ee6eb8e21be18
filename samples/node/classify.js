// Classify texts by every adapter of an exported folder, in one run with another adapter in each row.
//
//   node samples/node/classify.js FOLDER [--adapter NAME]... [--json] TEXT...
import { parseArgs } from "node:util";
import { Classifier } from "../js/classifier.js";
import { openFolder, run } from "./folder.js";

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: { adapter: { type: "string", multiple: true }, json: { type: "boolean" } },
});
const [root, ...texts] = positionals;
if (!texts.length) {
  console.error("usage: classify.js FOLDER [--adapter NAME]... [--json] TEXT...");
  process.exit(2);
}

await run(async () => {
  const { ort, folder, session, textsOf } = await openFolder(root);
  const names = values.adapter ?? [...folder.adapters.keys()];
  const rows = texts.flatMap((text) => names.map((adapter) => ({ text, adapter })));
  const classifier = new Classifier(ort, folder, session, textsOf);
  const found = await classifier.classify(
    rows.map(({ text }) => text),
    rows.map(({ adapter }) => adapter),
  );
  const results = rows.map((row, index) => ({ ...row, scores: found[index] }));
  if (values.json) console.log(JSON.stringify(results));
  else {
    for (const { text, adapter, scores } of results) {
      const best = scores
        .slice(0, 3)
        .map(({ label, score }) => `${label} ${(100 * score).toFixed(1)}%`)
        .join(", ");
      console.log(`${adapter.padEnd(10)} ${best}   ${text.slice(0, 60)}`);
    }
  }
});
