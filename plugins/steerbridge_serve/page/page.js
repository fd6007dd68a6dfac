// The page of `steerbridge serve`: a chat over /v1/chat/completions that shows every verdict.
// Text of a model or a person only ever becomes textContent.

const at = (id) => document.getElementById(id);
let limit = 512; // tokens of an answer
const KEPT = "steerbridge.chat"; // in the tab's own storage: it survives a reload
// A turn: { words, picture, answers: [{ title, text, steering, finish }], error }.
let turns = [];
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
  limit = Math.min(limit, Math.floor(info.max_total_tokens / 2));
  at("model").textContent = `${info.model_id}, guarded by ${steering.name}`;
  const facts = [["made for", steering.base_model]];
  for (const probe of steering.probes) {
    const rule = steering.scores ? `fires when the score is ${probe.comparator} ${probe.threshold.toFixed(4)}; ` : "";
    facts.push([`probe ${probe.probe}`, `${rule}reads ${probe.readings.join(", ")}`]);
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

function verdict(v, trace) {
  const line = make("li");
  const where = v.fired_in === "answer" ? "fired in the answer" : "fired";
  line.append(make("strong", v.fired ? "fired" : "calm", v.fired ? where : "quiet"));
  if (v.unjudged) {
    line.append(make("span", "", `${v.probe}: not judged, so it counts as fired (${v.unjudged})`));
  } else if (v.score === undefined) { // without --show-scores
    line.append(make("span", "", v.probe));
  } else {
    const score = v.score === null ? "no rows yet" : v.score.toFixed(4);
    line.append(make("span", "", `${v.probe}: ${score} (threshold ${v.comparator} ${v.threshold.toFixed(4)})`));
    if (v.score !== null && v.score >= 0 && v.score <= 1) {
      const meter = make("meter");
      meter.value = v.score;
      meter.setAttribute("aria-label", `score of ${v.probe}`);
      line.append(meter);
    }
    if (trace?.length > 1 && trace.at(-1) !== trace[0]) line.append(drawn(trace, v.probe));
  }
  return line;
}

// The score of a probe after each token of an answer.
function drawn(trace, probe) {
  const shape = (name) => document.createElementNS("http://www.w3.org/2000/svg", name);
  const picture = shape("svg");
  const line = shape("polyline");
  picture.setAttribute("viewBox", `0 0 ${trace.length - 1} 1`);
  picture.setAttribute("preserveAspectRatio", "none");
  picture.setAttribute("class", "trace");
  picture.setAttribute("role", "img");
  picture.setAttribute("aria-label", `score of ${probe} while it answered`);
  line.setAttribute("points", trace.map((score, at) => `${at},${1 - score}`).join(" "));
  picture.append(line);
  return picture;
}

const fired = (answer) => Boolean(answer?.steering?.rules.length);
const ENDS = { stop: "The answer is whole.", length: "The answer was cut at its limit." };

// ---------------------------------------------------------------- what is shown

function show() {
  at("chat").replaceChildren(...turns.map(shownTurn));
  at("hint").hidden = turns.length > 0;
  try {
    sessionStorage.setItem(KEPT, JSON.stringify({ system: at("system").value, turns }));
  } catch { /* pictures may be more than a tab can keep */ }
}

function shownTurn(turn, index) {
  const article = make("article", "turn"), question = make("div", "question");
  if (turn.picture) {
    const image = make("img");
    image.src = turn.picture;
    image.alt = "The picture of this message";
    question.append(image);
  }
  question.append(make("p", "text", turn.words));
  const boxes = make("div", "answers");
  boxes.append(...turn.answers.map((answer) => shownAnswer(answer, index === turns.length - 1)));
  article.append(question, boxes);
  if (turn.error) {
    const left = isSent(turn) ? "" : " (not part of the chat)";
    article.append(make("p", "fired", turn.error + left));
  } else if (!isSent(turn) && !stopping) {
    article.append(make("p", "note", "This turn is left out of what is sent next."));
  }
  return article;
}

function shownAnswer(answer, last) {
  const box = make("section", "answer"), list = make("ul", "verdict");
  const title = make("h2", "", answer.title);
  if (answer.steering) {
    title.textContent = fired(answer) ? "steered" : "left alone";
    title.classList.add(fired(answer) ? "fired" : "calm");
    list.append(...answer.steering.verdicts.map((v) => verdict(v, answer.traces[v.probe])));
  }
  box.append(title, make("p", "text", answer.text), list);
  if (answer.steering?.dropped_turns) box.append(make("p", "note", "Refused turns were left out of the prompt."));
  if (answer.steering?.untrained_form) {
    const form = answer.steering.untrained_form;
    box.append(make("p", "note", `The guard was not trained on prompts of this form (${form}).`));
  }
  if (!answer.finish) return box;
  box.append(make("p", "note", ENDS[answer.finish] ?? `It ended: ${answer.finish}.`));
  const row = make("div", "row");
  row.append(button("Copy", () => copy(answer.text)));
  if (last) row.append(button("Regenerate", regenerate));
  box.append(row);
  return box;
}

function button(name, act) {
  const element = make("button", "", name);
  element.type = "button";
  element.addEventListener("click", act);
  return element;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    say("Copied.");
  } catch {
    say("The browser does not let this page copy.");
  }
}

// ---------------------------------------------------------------- what is sent

// A turn that a rule fired on would fire again with every later one.
function isSent(turn) {
  return Boolean(turn.answers[0]?.finish) && !fired(turn.answers[0]);
}

function asked(turn) {
  if (!turn.picture) return { role: "user", content: turn.words };
  const parts = [{ type: "image_url", image_url: { url: turn.picture } }, { type: "text", text: turn.words }];
  return { role: "user", content: parts };
}

function messages() {
  const system = at("system").value.trim();
  const before = turns.slice(0, -1).filter(isSent);
  return [
    ...(system ? [{ role: "system", content: system }] : []),
    ...before.flatMap((turn) => [asked(turn), { role: "assistant", content: turn.answers[0].text }]),
    asked(turns.at(-1)),
  ];
}

async function answer(turn, title, body) {
  const told = { title, text: "", steering: null, finish: null, traces: {} };
  turn.answers.push(told);
  show();
  const box = () => at("chat").lastElementChild.querySelectorAll(".answer")[turn.answers.indexOf(told)];
  box().scrollIntoView({ block: "nearest" });
  for await (const event of events({ ...body, stream: true }, stopping.signal)) {
    const choice = event.choices[0];
    const news = JSON.stringify(told.steering) !== JSON.stringify(event.steering);
    told.steering = event.steering;
    for (const v of event.steering?.verdicts ?? []) {
      if (typeof v.score === "number") (told.traces[v.probe] ??= []).push(v.score);
    }
    told.text += choice?.delta?.content ?? "";
    told.finish = choice?.finish_reason ?? told.finish;
    if (news) box().replaceWith(shownAnswer(told, true));
    box().querySelector(".text").textContent = told.text;
  }
}

async function answerLast() {
  const turn = turns.at(-1);
  const beside = at("unsteered").checked && !at("unsteered-row").hidden;
  turn.answers = [];
  turn.error = null;
  busy(new AbortController());
  try {
    const body = { messages: messages(), temperature: turn.again ? 1 : 0, max_tokens: limit };
    await answer(turn, "answer", body);
    if (beside) await answer(turn, "unsteered", { ...body, steering: false });
    say("Done.");
  } catch (error) {
    turn.error = error.name === "AbortError" ? "Stopped." : `Error: ${error.message}`;
    say(turn.error);
  } finally {
    busy(null);
    show();
  }
}

async function send() {
  const words = at("prompt").value.trim();
  if (!words || stopping) return;
  turns.push({ words, picture, answers: [], error: null, again: false });
  at("prompt").value = "";
  choose(null);
  await answerLast();
}

// Another answer: the first one was the likeliest.
async function regenerate() {
  if (stopping) return;
  turns.at(-1).again = true;
  await answerLast();
}

function busy(controller) {
  stopping = controller;
  if (controller) say("Answering…");
  at("chat").setAttribute("aria-busy", String(controller !== null));
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
  turns = [];
  show();
  say("New chat.");
});
at("system").addEventListener("change", show);
at("key").addEventListener("change", card);
try {
  const kept = JSON.parse(sessionStorage.getItem(KEPT));
  if (kept) {
    at("system").value = kept.system;
    at("system-row").open = kept.system !== "";
    turns = kept.turns;
  }
} catch { /* nothing that this page kept */ }
show();
card();
