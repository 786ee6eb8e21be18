/** Greedy generation with the cache; the same in Node.js and in a browser. */
import { toTensors } from "./adapters.js";
import { batchOf, int64 } from "./texts.js";

const PAST = "past_key_values.";

/**
 * The greedy continuation of each prompt of token ids, without the prompt, up to and without an end token.
 *
 * `adapters` has an entry for each prompt, `eosIds` a list of end tokens for each; `onToken(row, id)` is told of each
 * token as it comes.
 */
export async function generate(
  ort,
  folder,
  session,
  prompts,
  adapters,
  { maxNewTokens = 40, eosIds = [], padId = 0, onToken } = {},
) {
  folder.requireGraph(session);
  const { contract } = folder,
    n = prompts.length;
  const past = contract.inputs.filter(({ name }) => name.startsWith(PAST));
  const outputs = ["logits", ...past.map(({ name }) => name.replace(PAST, "present."))];
  const takesPositions = contract.inputs.some(({ name }) => name === "position_ids");
  let { rows, mask } = batchOf(prompts, contract, { padId, left: true });
  let cache = Object.fromEntries(past.map(({ name, dtype, dims }) => [name, emptyCache(ort, dtype, dims, n)]));
  const hasGate = contract.adapter_inputs.some(({ kind }) => kind === "lora_gate");
  let gate = hasGate ? folder.gate(adapters, rows) : null;
  const found = prompts.map(() => []),
    isOver = prompts.map(() => false);
  for (let step = 0; step < maxNewTokens && isOver.includes(false); step++) {
    const own = { input_ids: int64(rows), attention_mask: int64(mask) };
    if (takesPositions) own.position_ids = int64(mask.map((row) => positions(row).slice(-rows[0].length)));
    const feeds = toTensors(ort, { ...own, ...folder.feeds(adapters, n, { gate }) });
    const results = await session.run({ ...feeds, ...cache }, outputs);
    const best = lastLikeliest(results.logits);
    best.forEach((id, row) => {
      isOver[row] ||= !!eosIds[row]?.includes(id);
      if (isOver[row]) return;
      found[row].push(id);
      onToken?.(row, id);
    });
    for (const tensor of Object.values(cache)) tensor.dispose?.();
    cache = Object.fromEntries(past.map(({ name }) => [name, results[name.replace(PAST, "present.")]]));
    rows = best.map((id) => [id]);
    mask = mask.map((row) => [...row, 1]);
    // What was invoked in the prompt stays active: the gate's last column.
    if (gate) gate = { ...gate, dims: [n, 1, 1], data: gate.data.filter((_, i) => (i + 1) % gate.dims[1] === 0) };
  }
  return found;
}

/** Each token's index among the real ones; 0 on padding. */
function positions(mask) {
  let index = -1;
  return mask.map((real) => Math.max(0, (index += real)));
}

function emptyCache(ort, dtype, [, heads, , size], batch) {
  return new ort.Tensor(dtype, dtype === "float16" ? new Uint16Array(0) : new Float32Array(0), [batch, heads, 0, size]);
}

/** The likeliest token at each row's last position. */
function lastLikeliest({ data, dims: [batch, length, vocabulary] }) {
  return Array.from({ length: batch }, (_, row) => {
    const start = (row * length + length - 1) * vocabulary;
    let best = 0;
    for (let id = 1; id < vocabulary; id++) if (data[start + id] > data[start + best]) best = id;
    return best;
  });
}
