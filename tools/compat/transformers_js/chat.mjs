// A compressed ONNX folder in transformers.js on Node:
//   npm install --ignore-scripts && node chat.mjs FOLDER "What is the capital of France?"
// FOLDER has transformers.js's layout: tokenizer and config.json, and the graph in onnx/model.onnx.
import path from "node:path";
import { env, pipeline, TextStreamer } from "@huggingface/transformers";

const [folder, question, dtype = "fp32"] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = path.dirname(path.resolve(folder)) + path.sep;

const generate = await pipeline("text-generation", path.basename(folder), {
  dtype, // which only chooses the file: fp32 is onnx/model.onnx, q4 is onnx/model_q4.onnx
  device: "cpu",
});
console.log(`transformers.js ${env.version}, Node ${process.version}`);
let tokens = 0;
const streamer = new TextStreamer(generate.tokenizer, {
  skip_prompt: true,
  callback_function: (text) => process.stdout.write(text),
  token_callback_function: () => { tokens += 1; },
});
const start = performance.now();
await generate([{ role: "user", content: question }], {
  max_new_tokens: 48, do_sample: false, streamer,
});
const seconds = (performance.now() - start) / 1000;
console.log(`\n${(tokens / seconds).toFixed(1)} tokens/s with the prompt's time`);
