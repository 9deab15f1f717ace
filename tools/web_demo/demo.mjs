// Loads a dense and a compressed ONNX folder, answers a question with each, and times both.
import * as ort from "./lib/ort.wasm.bundle.min.mjs";
import { Tokenizer } from "./lib/tokenizers.mjs";
import { Template } from "./lib/jinja.js";

const MODELS = { dense: "Dense", compressed: "Low rank" };
const settings = new URLSearchParams(location.search);
const MAX_TOKENS = Number(settings.get("tokens") ?? 48);
ort.env.wasm.wasmPaths = new URL("./lib/", location.href).href;
ort.env.wasm.numThreads = crossOriginIsolated ? Number(settings.get("threads") ?? 2) : 1;

const json = async (url) => (await fetch(url)).json();

class Model {
  static async load(folder) {
    const model = new Model();
    const [words, wordsConfig, config, end] = await Promise.all([
      json(`${folder}/tokenizer.json`), json(`${folder}/tokenizer_config.json`),
      json(`${folder}/config.json`), json(`${folder}/genai_config.json`),
    ]);
    model.tokenizer = new Tokenizer(words, wordsConfig);
    const template = await fetch(`${folder}/chat_template.jinja`);
    model.template = template.ok ? new Template(await template.text()) : null;
    model.config = config;
    model.ends = [end.model.eos_token_id].flat();
    const sizes = [];
    const bytes = async (name) => {
      const found = new Uint8Array(await (await fetch(`${folder}/${name}`)).arrayBuffer());
      sizes.push(found.byteLength);
      return found;
    };
    const graph = await bytes("model_last.onnx");
    const data = await bytes("model.onnx.data");
    model.bytes = sizes[0] + sizes[1];
    model.session = await ort.InferenceSession.create(graph, {
      executionProviders: ["wasm"],
      externalData: [{ path: "model.onnx.data", data }],
      // Weights behind DequantizeLinear become float32 once, here; WebAssembly has no kernel that
      // multiplies with packed ones, and would unpack them for every token.
      extra: { session: { disable_quant_qdq: "1" } },
    });
    return model;
  }

  emptyCache() {
    const heads = this.config.num_key_value_heads;
    const width = this.config.head_dim ?? this.config.hidden_size / this.config.num_attention_heads;
    const cache = {};
    for (const name of this.session.inputNames) {
      if (name.startsWith("past_key_values.")) {
        cache[name] = new ort.Tensor("float32", new Float32Array(0), [1, heads, 0, width]);
      }
    }
    return cache;
  }

  prompt(question) {
    if (!this.template) return question;
    return this.template.render({
      messages: [{ role: "user", content: question }], add_generation_prompt: true,
    });
  }

  // Greedy answer; `show` gets the text so far. Gives {text, tokens, prefill, decode}: the latter
  // two in tokens a second of the model alone, without what the page draws between.
  async answer(question, show) {
    const ids = this.tokenizer.encode(this.prompt(question), { add_special_tokens: false }).ids;
    let cache = this.emptyCache();
    let step = ids;
    let total = 0;
    const made = [];
    const seconds = []; // of each run: the prompt's, then one for each token behind it
    while (made.length < MAX_TOKENS) {
      total += step.length;
      const feeds = {
        input_ids: new ort.Tensor("int64", BigInt64Array.from(step, BigInt), [1, step.length]),
        attention_mask: new ort.Tensor("int64", new BigInt64Array(total).fill(1n), [1, total]),
      };
      if (this.session.inputNames.includes("position_ids")) {
        const places = step.map((_, index) => BigInt(total - step.length + index));
        feeds.position_ids = new ort.Tensor("int64", BigInt64Array.from(places), [1, step.length]);
      }
      const start = performance.now();
      const found = await this.session.run({ ...feeds, ...cache });
      seconds.push((performance.now() - start) / 1000);
      const logits = found.logits.data;
      let token = 0;
      for (let index = 1; index < logits.length; index += 1) {
        if (logits[index] > logits[token]) token = index;
      }
      const next = {};
      for (const name of Object.keys(cache)) {
        next[name] = found[name.replace("past_key_values", "present")];
      }
      cache = next;
      if (this.ends.includes(token)) break;
      made.push(token);
      step = [token];
      show(this.tokenizer.decode(made, { skip_special_tokens: true }));
      await new Promise((resume) => setTimeout(resume)); // lets the page draw
    }
    const [first, ...steps] = seconds;
    return {
      text: this.tokenizer.decode(made, { skip_special_tokens: true }),
      tokens: made.length,
      prefill: ids.length / first,
      decode: steps.length ? steps.length / steps.reduce((sum, one) => sum + one) : null,
    };
  }
}

function column(title) {
  const section = document.createElement("section");
  section.innerHTML = `<h2>${title}</h2><dl><dt>file</dt><dd data-k="bytes">loading …</dd>
    <dt>prompt</dt><dd data-k="prefill">–</dd><dt>answer</dt><dd data-k="decode">–</dd></dl>
    <div class="answer"></div>`;
  document.querySelector("#columns").append(section);
  return {
    set: (key, text) => { section.querySelector(`[data-k=${key}]`).textContent = text; },
    answer: (text) => { section.querySelector(".answer").textContent = text; },
  };
}

const models = {};
const columns = {};
async function ask(question) {
  const results = {};
  for (const name of Object.keys(MODELS)) {
    results[name] = await models[name].answer(question, columns[name].answer);
    columns[name].answer(results[name].text);
  }
  for (const [name, found] of Object.entries(results)) {
    for (const key of ["prefill", "decode"]) {
      const dense = results.dense[key];
      const ratio = name === "dense" || !dense ? "" : `, ${(found[key] / dense).toFixed(2)}x`;
      columns[name].set(key, found[key] ? `${found[key].toFixed(1)} tokens/s${ratio}` : "–");
    }
    found.bytes = models[name].bytes;
  }
  return results;
}

const report = (result) => fetch("result", { method: "POST", body: JSON.stringify(result) });
try {
  for (const name of Object.keys(MODELS)) columns[name] = column(MODELS[name]);
  for (const name of Object.keys(MODELS)) {
    models[name] = await Model.load(`models/${name}`);
    columns[name].set("bytes", `${(models[name].bytes / 1e6).toFixed(1)} MB`);
  }
  document.querySelector("#machine").textContent =
    `onnxruntime-web ${ort.env.versions.web}, WebAssembly, ${ort.env.wasm.numThreads} thread(s).`;
  const button = document.querySelector("button");
  const field = document.querySelector("#question");
  document.querySelector("#ask").addEventListener("submit", async (event) => {
    event.preventDefault();
    button.disabled = true;
    try {
      await ask(field.value);
    } catch (error) {
      document.querySelector("#machine").textContent = `It failed: ${error}`;
    }
    button.disabled = false;
  });
  if (settings.has("auto")) {
    if (settings.get("auto")) field.value = settings.get("auto");
    for (let round = 1; round < Number(settings.get("rounds") ?? 2); round += 1) await ask(field.value);
    const results = await ask(field.value);
    results.outside = performance.getEntriesByType("resource")
      .map((entry) => entry.name).filter((name) => !name.startsWith(location.origin));
    await report(results);
  }
  button.disabled = false;
} catch (error) {
  document.querySelector("#machine").textContent = `It failed: ${error}`;
  if (settings.has("auto")) await report({ error: String(error?.stack ?? error) });
}
