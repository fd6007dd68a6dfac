// node-llama-cpp as its users use it. Knows nothing of Steerbridge.
//
//     node ask.mjs SHAPE MODEL PROMPT...
//
// Prints a JSON list with `tokens` (of the answer) and `context` (all that its sequence holds) for
// each prompt.
import {
    DraftSequenceTokenPredictor, getLlama, InputLookupTokenPredictor, LlamaChatSession,
    LlamaCompletion, TemplateChatWrapper
} from "node-llama-cpp";

const [shape, path, ...prompts] = process.argv.slice(2);
const llama = await getLlama({gpu: false, build: "never", logLevel: "error"});

async function newContext(sequences) {
    const model = await llama.loadModel({modelPath: path});
    return await model.createContext({
        contextSize: 512,
        sequences,
        threads: 1,
        flashAttention: false,
        experimentalKvCacheKeyType: "F32",
        experimentalKvCacheValueType: "F32"
    });
}

async function newPredictor() {
    if (shape === "lookup drafts")
        return new InputLookupTokenPredictor({patternLength: {min: 1}, predictionLength: {max: 4}});
    if (shape === "a draft sequence") {
        const context = await newContext(1);
        return new DraftSequenceTokenPredictor(context.getSequence(), {minConfidence: 0});
    }
    return undefined;
}

async function grammar() {
    if (shape === "grammar")
        return await llama.createGrammar({grammar: "root ::= [a-z]+"});
    if (shape === "JSON schema")
        return await llama.createGrammarForJsonSchema({type: "object", properties: {a: {type: "integer"}}});
    return undefined;
}

async function answer(ask, sequence, prompt) {
    const tokens = [];
    await ask(prompt, {
        maxTokens: 8,
        temperature: 0,
        repeatPenalty: false,
        grammar: await grammar(),
        onToken: (chunk) => tokens.push(...chunk)
    });
    return {tokens, context: sequence.contextTokens};
}

// The model's own template, as this library writes one.
const chatWrapper = new TemplateChatWrapper({
    template: "{{history}}<|assistant|>{{completion}}<|end|>",
    historyTemplate: {
        system: "{{message}}",
        user: "<|user|>{{message}}<|end|>",
        model: "<|assistant|>{{message}}<|end|>"
    }
});
const chats = shape.includes("chat");
const count = shape === "two sequences" ? 2 : 1;
const context = await newContext(count);
const asks = [];
for (let i = 0; i < count; i++) {
    const sequence = context.getSequence({tokenPredictor: await newPredictor()});
    const used = {contextSequence: sequence};
    const session = chats ? new LlamaChatSession({...used, chatWrapper, systemPrompt: ""}) : new LlamaCompletion(used);
    const method = chats ? session.prompt : session.generateCompletion;
    asks.push((prompt) => answer(method.bind(session), sequence, prompt));
}

let beside = undefined;
if (shape === "embeddings beside a chat") {
    const model = await llama.loadModel({modelPath: path});
    beside = await model.createEmbeddingContext({contextSize: 256, threads: 1});
}

const answers = [];
if (count > 1)
    answers.push(...await Promise.all(prompts.map((prompt, i) => asks[i % count](prompt))));
else
    for (const prompt of prompts) {
        if (beside != null)
            await beside.getEmbeddingFor("a quiet text");
        answers.push(await asks[0](prompt));
    }
console.log(JSON.stringify(answers));
await llama.dispose();
