// A chat program on node-llama-cpp, as users write them: it knows nothing of Steerbridge.
//
// The first argument is JSON: `model`, `context`, `batch`, `sequences`, `drafts`, `draft`. Each line
// of standard input is a request (`id`, `ids`, `new`, `temperature`, `cancel_after`, `sequence`),
// and each line of standard output its answer: `tokens`, or `refused`, or `error`. One context lives
// as long as the program, with its cache; each of its sequences is a conversation.
import {createInterface} from "node:readline";
import {
    DraftSequenceTokenPredictor, getLlama, InputLookupTokenPredictor, LlamaCompletion
} from "node-llama-cpp";

const settings = JSON.parse(process.argv[2]);
const llama = await getLlama({gpu: false, build: "never", logLevel: "error"});

async function newContext(path, sequences) {
    const model = await llama.loadModel({modelPath: path});
    return await model.createContext({
        contextSize: settings.context,
        batchSize: settings.batch,
        sequences,
        threads: 1,
        flashAttention: false,
        experimentalKvCacheKeyType: "F32",
        experimentalKvCacheValueType: "F32"
    });
}

async function newPredictor() {
    if (settings.drafts === "ngram")
        return new InputLookupTokenPredictor({patternLength: {min: 1}, predictionLength: {max: 4}});
    if (settings.drafts === "model") {
        const context = await newContext(settings.draft, 1);
        return new DraftSequenceTokenPredictor(context.getSequence(), {minConfidence: 0});
    }
    return undefined;
}

async function answer(completion, {ids, new: wanted, temperature, cancel_after: cancelAfter}) {
    if (ids.length + wanted > settings.context)
        return {refused: `${ids.length} tokens in a context of ${settings.context}`};
    const tokens = [];
    const abort = new AbortController();
    try {
        await completion.generateCompletion(ids, {
            maxTokens: wanted,
            temperature,
            repeatPenalty: false,
            disableContextShift: true,
            contextShiftSize: 1,
            signal: abort.signal,
            stopOnAbortSignal: true,
            onToken(chunk) {
                tokens.push(...chunk);
                if (tokens.length === cancelAfter)
                    abort.abort();
            }
        });
    } catch (error) {
        return {error: String(error), tokens};
    }
    return {tokens};
}

function tell(content) {
    console.log(JSON.stringify(content));
}

const context = await newContext(settings.model, settings.sequences);
const completions = [];
for (let i = 0; i < settings.sequences; i++) {
    const contextSequence = context.getSequence({tokenPredictor: await newPredictor()});
    completions.push(new LlamaCompletion({contextSequence}));
}
tell({ready: true});

const running = new Set();
for await (const line of createInterface({input: process.stdin})) {
    const request = JSON.parse(line);
    const job = answer(completions[request.sequence], request)
        .then((content) => tell({id: request.id, ...content}))
        .finally(() => running.delete(job));
    running.add(job);
}
await Promise.all(running);
await llama.dispose();
