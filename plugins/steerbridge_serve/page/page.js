// The page of `steerbridge serve`: a chat over /v1/chat/completions that shows every verdict.
// Text of a model or a person only ever becomes textContent.

const at = (id) => document.getElementById(id);
const messages = []; // of the conversation, as the server takes them
let picture = null; // data: URL that goes with the next message
let stopping = null; // AbortController of the answer under way

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function headers() {
  const key = at("key").value;
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

function say(text) {
  at("status").textContent = text;
}

// ---------------------------------------------------------------- the package's card

async function card() {
  const answer = await fetch("/info", { headers: headers() });
  at("key-row").hidden = answer.status !== 401;
  if (!answer.ok) {
    say(answer.status === 401 ? "The server asks for its API key." : "The server is not ready.");
    return;
  }
  const info = await answer.json();
  const steering = info.steering;
  at("model").textContent = `${info.model_id}, guarded by ${steering.name}`;
  const facts = [["made for", steering.base_model]];
  for (const probe of steering.probes) {
    const rule = `fires when the score is ${probe.comparator} ${probe.threshold.toFixed(4)}`;
    facts.push([`probe ${probe.probe}`, `${rule}; reads ${probe.readings.join(", ")}`]);
  }
  facts.push(["acts by", steering.interventions.join(", ")], ["context", `${info.max_total_tokens} tokens`]);
  at("facts").replaceChildren(...facts.flatMap(([name, value]) => [make("dt", "", name), make("dd", "", value)]));
  at("image-row").hidden = info.model_pipeline_tag !== "image-text-to-text";
  at("unsteered-row").hidden = !steering.unsteered;
  say("");
}

// ---------------------------------------------------------------- answers

async function* events(body, signal) {
  const answer = await fetch("/v1/chat/completions", {
    method: "POST", headers: headers(), body: JSON.stringify(body), signal,
  });
  if (!answer.ok) {
    if (answer.status === 401) at("key-row").hidden = false;
    const found = await answer.json().catch(() => ({}));
    throw new Error(found.error?.message ?? `the server answered ${answer.status}`);
  }
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let held = "", ended = false; !ended;) {
    const { value, done } = await reader.read();
    held += value ?? "";
    const lines = held.split(/\r?\n/);
    held = done ? "" : lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      if (!line.startsWith("data: ")) continue;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
    ended = done;
  }
  throw new Error("the answer broke off");
}

function verdict(list, steering) {
  const lines = steering.verdicts.map((v) => {
    const score = v.score === null ? "not finite" : v.score.toFixed(4);
    const line = make("li");
    line.append(
      make("strong", v.fired ? "fired" : "calm", v.fired ? "fired" : "quiet"),
      make("span", "", `${v.probe}: ${score} (threshold ${v.comparator} ${v.threshold.toFixed(4)})`),
    );
    if (v.score !== null && v.score >= 0 && v.score <= 1) {
      const meter = make("meter");
      meter.value = v.score;
      meter.setAttribute("aria-label", `score of ${v.probe}`);
      line.append(meter);
    }
    return line;
  });
  list.replaceChildren(...lines);
}

async function answer(box, body, signal) {
  const text = make("p", "text"), list = make("ul", "verdict");
  box.append(text, list);
  let shown = false;
  for await (const event of events({ ...body, stream: true }, signal)) {
    if (event.steering && !shown) {
      verdict(list, event.steering);
      shown = true;
      box.querySelector("h2").textContent = event.steering.rules.length ? "steered" : "left alone";
      box.querySelector("h2").classList.add(event.steering.rules.length ? "fired" : "calm");
    }
    text.textContent += event.choices[0]?.delta?.content ?? "";
  }
  return text.textContent;
}

async function send() {
  const words = at("prompt").value.trim();
  if (!words || stopping) return;
  const beside = at("unsteered").checked && !at("unsteered-row").hidden;
  const content = picture
    ? [{ type: "image_url", image_url: { url: picture } }, { type: "text", text: words }]
    : words;
  messages.push({ role: "user", content });
  const turn = make("article", "turn"), question = make("div", "question");
  if (picture) {
    const image = make("img");
    image.src = picture;
    image.alt = "The picture of this message";
    question.append(image);
  }
  question.append(make("p", "text", words));
  const boxes = make("div", "answers");
  turn.append(question, boxes);
  at("chat").append(turn);
  const body = { messages: [...messages], temperature: 0, max_tokens: 256 };
  at("prompt").value = "";
  choose(null);
  busy(new AbortController());
  try {
    const said = await answer(opened(boxes, "answer"), body, stopping.signal);
    messages.push({ role: "assistant", content: said });
    if (beside) {
      await answer(opened(boxes, "unsteered"), { ...body, steering: false }, stopping.signal);
    }
    say("Done.");
  } catch (error) {
    const told = error.name === "AbortError" ? "Stopped." : `Error: ${error.message}`;
    const answered = messages.at(-1)?.role !== "user";
    if (!answered) messages.pop();
    say(told);
    turn.append(make("p", "fired", answered ? told : `${told} (not part of the chat)`));
  } finally {
    busy(null);
  }
}

function opened(boxes, title) {
  const box = make("section", "answer");
  box.append(make("h2", "", title));
  boxes.append(box);
  box.scrollIntoView({ block: "nearest" });
  return box;
}

function busy(controller) {
  stopping = controller;
  if (controller) say("Answering…");
  at("chat").setAttribute("aria-busy", String(controller !== null));
  at("hint").hidden = at("chat").childElementCount > 0;
  at("send").hidden = controller !== null;
  at("stop").hidden = controller === null;
  if (!controller) at("prompt").focus();
}

// ---------------------------------------------------------------- the form

function choose(url) {
  picture = url;
  at("picture").hidden = url === null;
  if (url) at("preview").src = url;
  else at("image").value = "";
}

at("image").addEventListener("change", () => {
  const file = at("image").files[0];
  if (!file) return;
  const reader = new FileReader();
  reader.onload = () => choose(reader.result);
  reader.readAsDataURL(file);
});
at("remove").addEventListener("click", () => choose(null));
at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
at("stop").addEventListener("click", () => stopping?.abort());
at("clear").addEventListener("click", () => {
  stopping?.abort();
  messages.length = 0;
  at("chat").replaceChildren();
  at("hint").hidden = false;
  say("New chat.");
});
at("key").addEventListener("change", card);
card();
