/** Texts as a graph's inputs, with a tokenizer of @huggingface/tokenizers; the same in Node.js and in a browser. */
import { AdapterError, withinFolder } from "./adapters.js";

// As `lora_export/runtime/tokenizer.py` has it.
const VOCABULARIES = ["tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"];

/**
 * The tokenizers of an exported folder: the function that gives each adapter's, or the base's for null and for a blend.
 *
 * `Tokenizer` is the class of @huggingface/tokenizers, `read` as `openExport` takes it. An adapter's own lies where its
 * `preprocessing` in the manifest says; a place without a vocabulary goes with the tokenizer of the export.
 */
export async function openTokenizers(Tokenizer, read, manifest) {
  const json = async (name) => JSON.parse(new TextDecoder().decode(await read(name)));
  const ifThere = async (name) => (name in manifest.files ? json(name) : {});
  const within = (place, name) => (place === "." ? name : withinFolder(`${place}/${name}`));
  const model = await json("config.json"),
    opened = new Map(),
    byAdapter = new Map();
  const isBrought = manifest.adapters.some(({ preprocessing }) => preprocessing === ".");
  /** The tokens that end a text: as `lora_export/runtime/end_tokens.py` has it. */
  const endsIn = async (place, eosId) => {
    const files = ["config.json", "generation_config.json"].flatMap((name) => [name, within(place, name)]);
    let found = null;
    for (const file of files) found = (await ifThere(file)).eos_token_id ?? found;
    const ends = found === null ? [] : [found].flat();
    if (!ends.every(Number.isInteger))
      throw new AdapterError("eos_token_id is neither a token id nor a list of them", { file: files.at(-1) });
    const withOwn = eosId !== undefined && (!ends.length || place !== "." || isBrought);
    return withOwn && !ends.includes(eosId) ? [...ends, eosId] : ends;
  };
  const open = async (place) => {
    const has = (name) => within(place, name) in manifest.files;
    const whole = VOCABULARIES.some(has) ? place : ".";
    if (!(within(whole, "tokenizer.json") in manifest.files))
      throw new AdapterError("The tokenizer has no tokenizer.json, which JavaScript needs", { file: whole });
    const settings = await json(within(has("tokenizer_config.json") ? place : whole, "tokenizer_config.json"));
    const texts = new Texts(new Tokenizer(await json(within(whole, "tokenizer.json")), settings), settings, model);
    texts.eosIds = await endsIn(place, texts.eosId);
    return texts;
  };
  for (const [name, place] of [[null, "."], ...manifest.adapters.map(({ name, preprocessing }) => [name, preprocessing ?? "."])]) {
    if (!opened.has(place)) opened.set(place, await open(place));
    byAdapter.set(name, opened.get(place));
  }
  return (adapter) => {
    const names = adapter && typeof adapter === "object" ? Object.keys(adapter) : [adapter ?? null];
    return byAdapter.get(names.length === 1 ? names[0] : null) ?? byAdapter.get(null);
  };
}

class Texts {
  constructor(tokenizer, settings, model) {
    const id = (token) => tokenizer.token_to_id(token?.content ?? token ?? "");
    // `eosId` is the tokenizer's own; `eosIds` end a text that is written.
    Object.assign(this, { tokenizer, padId: id(settings.pad_token) ?? 0, eosId: id(settings.eos_token), eosIds: [] });
    this.longest = Math.min(settings.model_max_length ?? Infinity, model.max_position_embeddings ?? Infinity);
  }

  /** Token ids; of a text too long for the model, its start and its last special token. */
  ids(text) {
    const { ids } = this.tokenizer.encode(text);
    return ids.length > this.longest ? [...ids.slice(0, this.longest - 1), ids.at(-1)] : ids;
  }

  /** As `ids`, for a text to go on with: a tokenizer that ends every text would end the prompt, too. */
  promptIds(text) {
    const ids = this.ids(text);
    return ids.length > 1 && ids.at(-1) === this.eosId ? ids.slice(0, -1) : ids;
  }

  decode(ids) {
    return ids.length ? this.tokenizer.decode(ids, { skip_special_tokens: true }) : "";
  }
}

/** `[rows, columns]` of int64 from lists of equal length. */
export function int64(rows) {
  return { type: "int64", dims: [rows.length, rows[0].length], data: BigInt64Array.from(rows.flat(), BigInt) };
}

/** Token ids as a graph's inputs, padded on the right, or on the left where texts go on. */
export function batchOf(ids, contract, { padId = 0, left = false } = {}) {
  const longest = Math.max(...ids.map((row) => row.length));
  const padded = (row, filler) => (left ? [...filler(row), ...row] : [...row, ...filler(row)]);
  const fill = (value) => (row) => Array(longest - row.length).fill(value);
  const rows = ids.map((row) => padded(row, fill(padId)));
  const mask = ids.map((row) =>
    padded(
      row.map(() => 1),
      fill(0),
    ),
  );
  const named = {
    input_ids: int64(rows),
    attention_mask: int64(mask),
    token_type_ids: int64(rows.map((row) => row.map(() => 0))),
  };
  const inputs = Object.fromEntries(
    contract.inputs.filter(({ name }) => name in named).map(({ name }) => [name, named[name]]),
  );
  return { rows, mask, inputs };
}
