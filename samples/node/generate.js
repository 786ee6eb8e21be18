// Let a decoder go on with a text, in one batch: as the base, and with each adapter in a row of its own.
//
//   node samples/node/generate.js FOLDER [--adapter NAME]... [--max-new-tokens N] [--json] TEXT
import { parseArgs } from "node:util";
import { generate } from "../js/decoder.js";
import { openFolder, run } from "./folder.js";

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    adapter: { type: "string", multiple: true },
    "max-new-tokens": { type: "string", default: "40" },
    json: { type: "boolean" },
  },
});
const [root, text, ...more] = positionals;
const maxNewTokens = Number(values["max-new-tokens"]);
if (text === undefined || more.length || !Number.isInteger(maxNewTokens) || maxNewTokens < 1) {
  console.error("usage: generate.js FOLDER [--adapter NAME]... [--max-new-tokens N] [--json] TEXT");
  process.exit(2);
}

await run(async () => {
  const { ort, folder, session, textsOf } = await openFolder(root);
  const rows = values.adapter ?? [null, ...folder.adapters.keys()];
  const eosIds = rows.map((adapter) => textsOf(adapter).eosIds);
  const found = await generate(
    ort,
    folder,
    session,
    rows.map((adapter) => textsOf(adapter).promptIds(text)),
    rows,
    { maxNewTokens, eosIds, padId: textsOf(null).padId },
  );
  const results = rows.map((adapter, row) => ({ adapter, ids: found[row], text: textsOf(adapter).decode(found[row]) }));
  if (values.json) console.log(JSON.stringify(results));
  else for (const each of results) console.log(`[${each.adapter ?? "base"}] ${text}${each.text}\n`);
});
