/* The page of `squeeze serve`: documents, questions, answers beside one another, and what each of them read. Texts go into
 * the page as text, never as HTML. */
"use strict";

const TEXTS_KEPT = 2000, EVIDENCE = 3, EVIDENCE_LETTERS = 500, MOST_TOKENS = 512, POLL_MS = 700;
const byId = (id) => document.getElementById(id);
const state = {
  model: "", hasTemplate: true, key: "", contexts: [], selected: null, upload: null, asking: null, nPairs: 0,
  texts: new Map(), reader: null, poll: 0,
};

/* ---- Small things ------------------------------------------------------------------ */

/* An element with attributes, texts and elements within. */
function make(name, attributes = {}, ...within) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === true) element.setAttribute(key, "");
    else if (value !== false && value !== null) element.setAttribute(key, value);
  }
  element.append(...within);
  return element;
}

/* Said to screen readers. */
function announce(text) {
  byId("status").textContent = text;
}

function complain(text) {
  byId("problem").textContent = text || "";
  byId("problem").hidden = !text;
}

function percent(share) {
  const value = 100 * share;
  return `${value >= 10 || value === 0 ? value.toFixed(0) : value >= 0.95 ? value.toFixed(1) : value.toFixed(2)} %`;
}

function size(bytes) {
  return bytes >= 1e9 ? `${(bytes / 1e9).toFixed(1)} GB` : `${(bytes / 1e6).toFixed(1)} MB`;
}

function headers(more) {
  return state.key ? { ...more, Authorization: `Bearer ${state.key}` } : more;
}

/* What a refusal says, also of a server that is no squeeze. */
async function refusal(response) {
  if (response.status === 401) wantKey();
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

async function api(path, options = {}) {
  const response = await fetch(path, { ...options, headers: headers(options.headers || {}) });
  if (!response.ok) throw new Error(await refusal(response));
  return response.json();
}

/* ---- Keys ---------------------------------------------------------------------------- */

function wantKey() {
  byId("key-form").hidden = false;
}

async function useKey(event) {
  event.preventDefault();
  state.key = byId("key").value.trim();
  sessionStorage.setItem("key", state.key);
  byId("key-form").hidden = true;
  complain("");
  await begin();
  if (byId("key-form").hidden) byId("question").focus();
}

/* ---- Documents ------------------------------------------------------------------------- */

const IN_WORK = { waiting: "waits", converting: "is being made text", reading: "is being read", squeezing: "is being clustered" };

function describeContext(context) {
  if (context.status === "ready") return `${context.tokens.toLocaleString("en")} tokens, ${size(context.bytes)}`;
  if (context.status === "failed") return context.error;
  return `${IN_WORK[context.status] || context.status}, ${percent(context.progress || 0)}`;
}

function removeButton(context) {
  const ready = context.status === "ready", failed = context.status === "failed";
  if (ready) return "";
  const button = make("button", { type: "button", "aria-label": `${failed ? "Remove" : "Cancel"} ${context.id}` },
    failed ? "Remove" : "Cancel");
  button.addEventListener("click", () => removeContext(context.id));
  return button;
}

/* A line of the list; lines stay as long as their document does, so that the focus does. */
function showContext(context) {
  const id = `context-${context.id}`, ready = context.status === "ready";
  let line = byId(id);
  if (!line) {
    line = make("div", { class: "context", id });
    byId("contexts").append(line);
  }
  if (line.dataset.status !== context.status) {
    const radio = make("input", { type: "radio", name: "context", value: context.id, disabled: !ready,
      "aria-describedby": `${id}-hint` });
    radio.addEventListener("change", () => select(context.id));
    line.replaceChildren(make("label", {}, radio, context.id), removeButton(context),
      make("p", { class: "hint", id: `${id}-hint` }));
    if (!ready && context.status !== "failed")
      line.append(make("progress", { max: "1", value: "0", "aria-label": `Preparing ${context.id}` }));
    if (line.dataset.status && ready) announce(`${context.id} is ready.`);
    if (line.dataset.status && context.status === "failed") announce(`${context.id} could not be prepared.`);
    line.className = `context ${context.status}`;
    line.dataset.status = context.status;
  }
  line.querySelector(".hint").textContent = describeContext(context);
  const progress = line.querySelector("progress");
  if (progress) progress.value = context.progress || 0;
  line.querySelector("input").checked = context.id === state.selected;
}

function showContexts() {
  const there = new Set(state.contexts.map((context) => `context-${context.id}`));
  for (const line of [...byId("contexts").querySelectorAll(".context")]) if (!there.has(line.id)) line.remove();
  for (const context of state.contexts) showContext(context);
  byId("no-contexts").hidden = state.contexts.length > 0;
}

async function loadContexts() {
  clearTimeout(state.poll);
  const list = await api("v1/contexts");
  state.contexts = list.data.sort((a, b) => a.created - b.created || (a.id < b.id ? -1 : 1));
  const ready = state.contexts.filter((context) => context.status === "ready");
  if (!ready.some((context) => context.id === state.selected)) select(ready.length ? ready[0].id : null);
  showContexts();
  if (state.contexts.some((context) => context.status in IN_WORK))
    state.poll = setTimeout(() => loadContexts().catch((error) => complain(error.message)), POLL_MS);
}

function select(id) {
  state.selected = id;
  const context = state.contexts.find((one) => one.id === id);
  byId("about").textContent = id || "a document";
  byId("floor").hidden = !(context && context.budget_floor > 0.02);
  if (context)
    byId("floor").textContent = `At least ${percent(context.budget_floor)} of this document is read, whatever the budget.`;
}

async function removeContext(id) {
  try {
    await api(`v1/contexts/${encodeURIComponent(id)}`, { method: "DELETE" });
    announce(`${id} was cancelled.`);
    await loadContexts();
  } catch (error) {
    complain(error.message);
  }
}

/* ---- Uploads ------------------------------------------------------------------------------- */

function nameOf(file) {
  const name = file.name.replace(/\.[^.]*$/, "").replace(/[^A-Za-z0-9._-]+/g, "-").replace(/^[^A-Za-z0-9]+/, "");
  return name.slice(0, 64) || "document";
}

/* fetch() does not say how much was sent. What kind of document it is the server tells by its bytes. */
function send(name, file) {
  const request = new XMLHttpRequest();
  request.open("POST", `v1/contexts?name=${encodeURIComponent(name)}`);
  request.setRequestHeader("Content-Type", "application/octet-stream");
  if (state.key) request.setRequestHeader("Authorization", `Bearer ${state.key}`);
  request.upload.addEventListener("progress", (event) => {
    if (event.lengthComputable) byId("sent").value = event.loaded / event.total;
  });
  const done = new Promise((resolve, reject) => {
    request.addEventListener("error", () => reject(new Error("the server cannot be reached")));
    request.addEventListener("abort", () => reject(new Error("The upload was cancelled.")));
    request.addEventListener("load", () => {
      if (request.status === 202) return resolve();
      if (request.status === 401) wantKey();
      let message = `the server answered ${request.status}`;
      try {
        message = JSON.parse(request.responseText).error.message;
      } catch { /* no JSON: the number has to do */ }
      return reject(new Error(message));
    });
  });
  request.send(file);
  return { request, done };
}

async function upload(event) {
  event.preventDefault();
  const file = byId("file").files[0], name = byId("name").value.trim();
  if (!file || state.upload) return;
  complain("");
  byId("sending").hidden = false;
  byId("sent").value = 0;
  try {
    state.upload = send(name, file);
    await state.upload.done;
    announce(`${name} was sent and is being prepared.`);
    byId("upload").reset();
    if (!state.contexts.some((context) => context.status === "ready")) state.selected = name;
    await loadContexts();
  } catch (error) {
    complain(`${name}: ${error.message}`);
  }
  state.upload = null;
  byId("sending").hidden = true;
}

/* ---- Texts of a document ----------------------------------------------------------------------- */

async function textOf(context, passage) {
  const path = `v1/contexts/${encodeURIComponent(context)}/text?from=${passage.from}&to=${passage.to}`;
  if (!state.texts.has(path)) {
    if (state.texts.size >= TEXTS_KEPT) state.texts.clear();
    state.texts.set(path, api(path).then((reply) => reply.text));
    state.texts.get(path).catch(() => state.texts.delete(path));
  }
  return state.texts.get(path);
}

/* The document around a passage, which is marked. */
async function read(context, passages, number) {
  const first = Math.max(0, number - 3), last = Math.min(passages.length - 1, number + 3);
  const parts = [];
  for (let i = first; i <= last; i++) parts.push(await textOf(context, passages[i]));
  const text = byId("reader-text"), marked = make("mark", {}, parts[number - first]);
  text.replaceChildren(first > 0 ? "… " : "", ...parts.slice(0, number - first), marked,
    ...parts.slice(number - first + 1), last < passages.length - 1 ? " …" : "");
  state.reader = { context, passages, number };
  byId("reader-title").textContent =
    `${context}: passage ${number + 1} of ${passages.length}, ${percent(passages[number].share)} of the attention`;
  byId("reader-before").disabled = number === 0;
  byId("reader-behind").disabled = number === passages.length - 1;
  if (!byId("reader").open) byId("reader").showModal();
  marked.scrollIntoView({ block: "center" });
}

function readOn(step) {
  const { context, passages, number } = state.reader;
  if (passages[number + step]) read(context, passages, number + step).catch((error) => complain(error.message));
}

/* ---- What was read -------------------------------------------------------------------------------- */

function passageName(passages, number) {
  return `Passage ${number + 1} of ${passages.length}, ${percent(passages[number].share)} of the attention`;
}

async function preview(answer, number) {
  const { context, passages } = answer, target = answer.element.querySelector(".preview");
  answer.previewed = number;
  try {
    const text = await textOf(context, passages[number]);
    if (answer.previewed === number) target.textContent = `${passageName(passages, number)}: ${text.trim()}`;
  } catch (error) {
    target.textContent = error.message;
  }
}

/* One tab stop, arrows within. */
function moveIn(event, cells) {
  const at = cells.indexOf(event.target), last = cells.length - 1;
  const to = { ArrowLeft: at - 1, ArrowUp: at - 1, ArrowRight: at + 1, ArrowDown: at + 1, Home: 0, End: last }[event.key];
  if (to === undefined || at < 0) return;
  event.preventDefault();
  const next = cells[Math.min(Math.max(to, 0), last)];
  cells.forEach((cell) => cell.setAttribute("tabindex", cell === next ? "0" : "-1"));
  next.focus();
}

function showStrip(answer) {
  const { context, passages, element } = answer, most = Math.max(...passages.map((passage) => passage.share));
  const strip = element.querySelector(".strip");
  const cells = passages.map((passage, number) => {
    const cell = make("button", { type: "button", tabindex: number === 0 ? "0" : "-1",
      "aria-label": passageName(passages, number) });
    cell.style.setProperty("--heat", most > 0 ? (passage.share / most).toFixed(3) : "0");
    cell.addEventListener("mouseenter", () => preview(answer, number));
    cell.addEventListener("focus", () => preview(answer, number));
    cell.addEventListener("click", () => read(context, passages, number).catch((error) => complain(error.message)));
    return cell;
  });
  strip.replaceChildren(...cells);
  strip.addEventListener("keydown", (event) => moveIn(event, cells));
}

async function showEvidence(answer) {
  const { context, passages, element } = answer;
  const order = passages.map((passage, number) => number).sort((a, b) => passages[b].share - passages[a].share);
  for (const number of order.slice(0, EVIDENCE)) {
    const whole = (await textOf(context, passages[number])).trim();
    const text = whole.length > EVIDENCE_LETTERS ? `${whole.slice(0, EVIDENCE_LETTERS)}…` : whole;
    const button = make("button", { type: "button", "aria-label": `Show passage ${number + 1} in the document` },
      `${percent(passages[number].share)} of the attention: show in the document`);
    button.addEventListener("click", () => read(context, passages, number).catch((error) => complain(error.message)));
    element.querySelector(".evidence").append(make("li", {}, make("blockquote", {}, text), button));
  }
}

async function showMap(answer, squeeze) {
  const none = answer.element.querySelector(".no-map");
  if (!squeeze || !squeeze.passages) {
    none.hidden = false;
    none.textContent = "What this answer read is not known: it is recorded on the CPU alone, and for answers of a word or more.";
    return;
  }
  answer.passages = squeeze.passages;
  answer.element.querySelector(".map").hidden = false;
  showStrip(answer);
  await showEvidence(answer);
}

/* ---- Answers ----------------------------------------------------------------------------------------- */

/* The objects of a stream of events. */
async function* objects(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const events = text.split("\n\n");
    text = events.pop();
    for (const event of events)
      for (const line of event.split("\n"))
        if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
  }
}

function addFigure(answer, name, value) {
  answer.element.querySelector(".figures").append(make("div", {}, make("dt", {}, name), make("dd", {}, value)));
}

function showFigures(answer, usage) {
  const squeeze = usage.squeeze, seconds = (answer.lastAt - answer.firstAt) / 1000, n = usage.completion_tokens;
  if (n > 1 && seconds > 0) addFigure(answer, "Speed", `${((n - 1) / seconds).toFixed(1)} tokens/s`);
  if (answer.firstAt) addFigure(answer, "First token", `${((answer.firstAt - answer.askedAt) / 1000).toFixed(2)} s`);
  if (squeeze) addFigure(answer, "Read", percent(squeeze.share_read));
  if (squeeze) addFigure(answer, "Attention missed, estimated", percent(squeeze.missed_mass));
  addFigure(answer, "Length", `${n} tokens`);
}

function begunAnswer(place, context, question, budget) {
  const element = byId("answer-template").content.firstElementChild.cloneNode(true);
  const title = budget === 1 ? "Exact: everything read" : `Budget ${percent(budget)}`;
  element.querySelector("h3").textContent = `${title} · ${context}`;
  element.querySelector(".asked").textContent = question;
  place.append(element);
  return { element, context, title, text: "", askedAt: performance.now(), firstAt: 0, lastAt: 0 };
}

function take(answer, part) {
  if (part.error) throw new Error(part.error.message);
  const text = part.choices && part.choices.length ? part.choices[0].delta.content : "";
  if (part.usage) answer.usage = part.usage;
  if (!text) return;
  answer.lastAt = performance.now();
  answer.firstAt = answer.firstAt || answer.lastAt;
  answer.text += text;
  answer.element.querySelector(".said").append(text);
}

async function answerOnce(place, context, question, budget, signal) {
  const answer = begunAnswer(place, context, question, budget);
  const body = {
    model: `${state.model}:${context}`, messages: [{ role: "user", content: question }], stream: true,
    stream_options: { include_usage: true }, temperature: 0, max_tokens: MOST_TOKENS, squeeze: { budget, read_map: true },
  };
  try {
    const response = await fetch("v1/chat/completions", { method: "POST", signal, body: JSON.stringify(body),
      headers: headers({ "Content-Type": "application/json" }) });
    if (!response.ok) throw new Error(await refusal(response));
    for await (const part of objects(response)) take(answer, part);
    if (!answer.usage) throw new Error("the answer broke off");
    showFigures(answer, answer.usage);
    await showMap(answer, answer.usage.squeeze);
    announce(`${answer.title}: ${answer.text}`);
  } catch (error) {
    const stopped = error.name === "AbortError";
    addFigure(answer, stopped ? "Stopped" : "Failed", stopped ? "by you" : error.message);
    announce(stopped ? "Stopped." : `Failed: ${error.message}`);
  } finally {
    answer.element.setAttribute("aria-busy", "false");
  }
}

/* One after the other, so that the figures of each are its own. */
async function ask(event) {
  event.preventDefault();
  const question = byId("question").value.trim(), context = state.selected, budget = byId("budget").value / 100;
  if (!question || state.asking) return;
  complain(context ? "" : "Choose or upload a document first.");
  if (!context) return;
  state.asking = new AbortController();
  const { signal } = state.asking, pair = make("div", { class: "pair" });
  const budgets = byId("exact").checked && budget < 1 ? [budget, 1] : [budget];
  byId("answers").prepend(pair);
  byId("send").disabled = true;
  byId("stop").disabled = false;
  announce("Answering.");
  for (const one of budgets) if (!signal.aborted) await answerOnce(pair, context, question, one, signal);
  const hadFocus = document.activeElement === byId("stop");
  state.asking = null;
  byId("send").disabled = false;
  byId("stop").disabled = true;
  if (hadFocus) byId("question").focus();
}

/* ---- Beginning ------------------------------------------------------------------------------------------ */

function showBudget() {
  const value = byId("budget").value;
  byId("budget-text").textContent = `${value} %`;
  byId("budget").setAttribute("aria-valuetext", `${value} percent`);
  byId("exact").disabled = value === "100";
}

async function begin() {
  try {
    const props = await api("props");
    state.model = props.model;
    byId("model").textContent = props.description || props.model;
    byId("budget").value = Math.round(100 * props.budget);
    showBudget();
    await loadContexts();
  } catch (error) {
    complain(error.message);
  }
}

function listen() {
  byId("key-form").addEventListener("submit", useKey);
  byId("upload").addEventListener("submit", upload);
  byId("stop-upload").addEventListener("click", () => state.upload && state.upload.request.abort());
  byId("file").addEventListener("change", () => {
    const file = byId("file").files[0];
    if (file) byId("name").value = nameOf(file);
  });
  byId("ask").addEventListener("submit", ask);
  byId("stop").addEventListener("click", () => state.asking && state.asking.abort());
  byId("budget").addEventListener("input", showBudget);
  byId("question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("ask").requestSubmit();
  });
  byId("reader-before").addEventListener("click", () => readOn(-1));
  byId("reader-behind").addEventListener("click", () => readOn(1));
  byId("reader-close").addEventListener("click", () => byId("reader").close());
}

state.key = sessionStorage.getItem("key") || "";
listen();
begin();
