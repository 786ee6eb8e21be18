/** Texts to labels, each by the adapter of its row; the same in Node.js and in a browser. */
import { toTensors } from "./adapters.js";
import { batchOf } from "./texts.js";

export class Classifier {
  /** `ort` is an onnxruntime-web or -node, `folder` an `ExportedFolder`, `textsOf` from `openTokenizers`. */
  constructor(ort, folder, session, textsOf) {
    folder.requireGraph(session);
    Object.assign(this, { ort, folder, session, textsOf });
  }

  /** The labels of an adapter, or of the base's own head, by class. */
  labels(adapter) {
    const record = this.folder.manifest.adapters.find(({ name }) => name === adapter);
    return (index) => record?.labels?.[index] ?? `LABEL_${index}`;
  }

  /** For each text, its labels and their probabilities, likeliest first; `adapters` has one entry for each text. */
  async classify(texts, adapters) {
    const { inputs } = batchOf(
      texts.map((text, row) => this.textsOf(adapters[row]).ids(text)),
      this.folder.contract,
      this.textsOf(null),
    );
    const feeds = this.folder.feeds(adapters, texts.length);
    const { logits } = await this.session.run(toTensors(this.ort, { ...inputs, ...feeds }), ["logits"]);
    const width = logits.dims.at(-1),
      classes = this.folder.classes(adapters, texts.length);
    return texts.map((_, row) => {
      const own = Array.from(logits.data.subarray(row * width, row * width + (classes?.[row] ?? width)));
      const most = Math.max(...own),
        powers = own.map((score) => Math.exp(score - most));
      const sum = powers.reduce((a, b) => a + b),
        label = this.labels(adapters[row]);
      const scores = powers.map((power, index) => ({ label: label(index), score: power / sum }));
      return scores.sort((a, b) => b.score - a.score);
    });
  }
}
