// The page of `sememe serve`: writes, chats and reads, and colours text by concept (text.js).

import { call, parts } from "./server.js";
import { $, $$, ConceptText, announce, leave, make, number, paint } from "./text.js";

// ---- a request and its article ----

let card = null;
let running = null;
let dialled = false; // whether the reader has moved the dial

/** What all requests have in common; a seed of its own where the reader gave none. */
function sampling() {
  const own = $("#seed").valueAsNumber;
  const seed = Number.isNaN(own) ? Math.floor(Math.random() * 2 ** 31) : own;
  return { model: card.id, temperature: $("#temperature").valueAsNumber, seed };
}

const rate = () => (dialled ? { rate: $("#rate").valueAsNumber } : {});

function article(panel, title, className = "") {
  const element = make("article", { className }, make("h2", {}, title));
  $(".empty", panel)?.remove();
  $(".log", panel).append(element);
  toEnd();
  return element;
}

function statistics(element, pairs, follow = true) {
  const items = pairs.map(([value, words]) => make("li", {}, make("b", {}, value), ` ${words}`));
  element.append(make("ul", { className: "stats" }, ...items));
  if (follow) toEnd();
}

/** Of an answer's `sememe` field. */
function costs({ rate, cache_bytes, base_cache_bytes, queue_s, prefill_s, decode_s }) {
  const pairs = rate > 0 ? [[number(1 / rate), "tokens a concept (R)"]] : [];
  if (base_cache_bytes) {
    const [own, base] = [cache_bytes, base_cache_bytes].map((bytes) => number(bytes / 1e6));
    const more = Math.round(100 * (cache_bytes / base_cache_bytes - 1));
    const change = more ? ` (${more < 0 ? "−" : "+"}${Math.abs(more)} %)` : "";
    pairs.push([`${own} MB`, `cache, ${base} in the base${change}`]);
  }
  for (const [seconds, phase] of [[queue_s, "queue"], [prefill_s, "prefill"], [decode_s, "decode"]])
    pairs.push([`${number(seconds)} s`, phase]);
  return pairs;
}

/** Runs one request of a panel; what goes wrong is written into its article. */
async function run(panel, element, work) {
  running = new AbortController();
  const stop = make("button", { type: "button", className: "stop" }, "Stop");
  stop.onclick = () => running?.abort();
  $(".send", panel).after(stop);
  const buttons = () => $$(".send, .again, .clear", $("#panels"));
  for (const button of buttons()) button.disabled = true;
  announce("Working.");
  let outcome = "Done.";
  try {
    await work(running.signal);
  } catch (fault) {
    outcome = running.signal.aborted ? "Stopped." : fault.message;
    if (!running.signal.aborted) {
      const message = fault instanceof TypeError ? "The server cannot be reached." : fault.message;
      element.append(make("p", { className: "fault", role: "alert" }, message));
    }
  } finally {
    stop.remove();
    running = null;
    for (const button of buttons()) button.disabled = false;
    announce(`${outcome} ${$(".text", element)?.textContent.slice(-1000) ?? ""}`);
  }
  return outcome === "Done.";
}

const atEnd = () => innerHeight + scrollY > document.documentElement.scrollHeight - 60;
const toEnd = () => scrollTo({ top: document.documentElement.scrollHeight });

/** Streams one answer into an article. `body`: of either route; `read`: its choice → what
 * `ConceptText.add` takes. */
async function stream(path, body, element, read, signal) {
  const view = new ConceptText("Text");
  element.append(view.root);
  const begin = performance.now();
  let last = null;
  let finish = "stopped";
  try {
    const response = await call(path, { ...body, stream: true }, signal);
    for await (const part of parts(response)) {
      const [choice] = part.choices;
      if (!choice) {
        last = part;
        continue;
      }
      const follow = atEnd();
      if (choice.sememe?.prompt_tokens) {
        view.given = choice.sememe.prompt_tokens;
        if (!body.echo) view.hidden = view.given;
      }
      view.add({ ...read(choice, view), concepts: choice.sememe?.concepts ?? [] });
      finish = choice.finish_reason ?? finish;
      if (follow) toEnd();
    }
  } finally {
    view.finish();
    const written = Math.max(0, view.tokens.length + view.hidden - view.given);
    const count = last?.usage.completion_tokens ?? written;
    const seconds = last?.sememe.decode_s ?? (performance.now() - begin) / 1000;
    const reasons = { stop: "text ended", length: "limit reached", stopped: "not at its end" };
    const pairs = [
      [number(count, 0), `tokens written, ${reasons[finish] ?? finish}`],
      [number(seconds ? count / seconds : 0, 1), "tokens/s"],
      ...(last ? costs(last.sememe) : []),
      [String(body.seed), "seed"],
    ];
    statistics(element, pairs, atEnd());
  }
  return view.text;
}

const written = ({ text, logprobs }) => ({
  text,
  tokens: (logprobs?.tokens ?? []).map((_, n) => ({
    offset: logprobs.text_offset[n],
    nll: logprobs.token_logprobs[n] === null ? null : -logprobs.token_logprobs[n],
  })),
});

/** The chat route gives no offsets: a part's tokens lie one after the other in its text. */
function spoken({ delta, logprobs }, view) {
  let offset = view.characters.length;
  const end = offset + [...(delta.content ?? "")].length;
  const tokens = (logprobs?.content ?? []).map(({ token, logprob }) => {
    const start = Math.min(offset, end);
    offset += [...token].length;
    return { offset: start, nll: -logprob };
  });
  return { text: delta.content, tokens };
}

// ---- the panels ----

async function complete(text, panel) {
  const max_tokens = $("#max-tokens").valueAsNumber;
  const options = { ...sampling(), max_tokens, echo: true, logprobs: 0 };
  const body = { prompt: text, ...options, sememe: { concepts: true, ...rate() } };
  const element = article(panel, "Text");
  await run(panel, element, (signal) => stream("v1/completions", body, element, written, signal));
}

const messages = [];

async function chat(text, panel) {
  const question = article(panel, "You", "from-reader");
  question.append(make("p", { className: "text" }, text));
  const element = article(panel, card.id);
  const answer = { role: "assistant", content: "" };
  messages.push({ role: "user", content: text });
  const limits = { max_completion_tokens: $("#max-tokens").valueAsNumber, logprobs: true };
  const body = { messages, ...sampling(), ...limits, sememe: { concepts: true, ...rate() } };
  $("#chat-text").value = "";
  await run(panel, element, (signal) =>
    stream("v1/chat/completions", body, element, spoken, signal),
  );
  answer.content = $(".text", element)?.textContent ?? "";
  if (answer.content) messages.push(answer);
  else messages.pop(); // nothing came: the message was not part of a chat
}

async function inspect(text, panel) {
  const element = article(panel, "Read");
  const body = { model: card.id, text, ...rate() };
  await run(panel, element, async (signal) => {
    const got = await (await call("v1/sememe/inspect", body, signal)).json();
    let offset = 0;
    const tokens = got.tokens.map((token, n) => {
      const start = offset;
      offset += [...token].length;
      return { offset: start, nll: got.nll[n] };
    });
    const view = new ConceptText("Text that was read");
    element.append(view.root);
    const concepts = [...got.concept_ids.entries()].filter(([, id]) => id !== -1);
    view.add({ text: got.tokens.join(""), tokens, concepts });
    view.finish();
    const known = got.nll.filter((value) => value !== null);
    const mean = known.reduce((sum, value) => sum + value, 0) / Math.max(1, known.length);
    const pairs = [[number(tokens.length, 0), "tokens"]];
    if (known.length) pairs.push([`${number(mean)} nats`, "a token"]);
    statistics(element, [...pairs, ...costs(got.sememe)]);
  });
}

const chip = (concept, kind) => {
  const element = make("span", { className: "chip" }, String(concept));
  paint(element, concept, kind);
  return element;
};

async function compress(text, panel) {
  const element = article(panel, "Compressed and back");
  await run(panel, element, async (signal) => {
    const body = { model: card.id, text, ...rate() };
    const codes = await (await call("v1/sememe/compress", body, signal)).json();
    const windows = codes.documents.flatMap((document) => document.windows);
    const ids = windows.flatMap(({ concepts }) => concepts);
    const tokens = windows.reduce((sum, window) => sum + window.tokens, 0);
    element.append(make("div", { className: "chips" }, ...ids.map((id) => chip(id))));
    const back = await (await call("v1/sememe/decompress", codes, signal)).json();
    const sides = [["Original", text], ["From the ids", back.text]].map(([title, words]) =>
      make("div", {}, make("h2", {}, title), make("p", { className: "text" }, words)),
    );
    element.append(make("div", { className: "pair" }, ...sides));
    const r = ids.length ? [[number(tokens / ids.length), "tokens a concept (R)"]] : [];
    statistics(element, [[number(tokens, 0), "tokens"], [number(ids.length, 0), "concepts"], ...r]);
  });
}

/** The fields of a plan, one for each id; `read` gives the ids that stand in them. */
function planFields(plan) {
  const rows = plan.map((ids, kind) => {
    const fields = ids.map((id, slot) => {
      const limits = { min: 0, max: card.sememe.sizes?.[kind] - 1 || "", step: 1 };
      const field = make("input", { type: "number", className: "chip", value: id, ...limits });
      field.setAttribute("aria-label", `Type ${kind}, concept ${slot + 1} of ${ids.length}`);
      field.oninput = () => paint(field, field.valueAsNumber || 0, kind);
      paint(field, id, kind);
      return field;
    });
    const title = `Type ${kind}${ids.length ? "" : " –"}`;
    return make("div", { className: "chips" }, make("span", { className: "type" }, title), ...fields);
  });
  const ids = (row) => $$("input", row).map((field) => field.valueAsNumber);
  return { rows, read: () => rows.map((row) => ids(row).filter(Number.isInteger)) };
}

/** `plan`: ids of each type, where the reader has changed the model's own. */
async function write(text, panel, plan) {
  const element = article(panel, plan ? "From the changed plan" : "Planned and written");
  const budget = $("#budget").value.split(",").filter((part) => part.trim()).map(Number);
  const wish = plan ? { plan } : budget.length ? { budget } : {};
  const options = { ...sampling(), max_tokens: $("#max-tokens").valueAsNumber };
  await run(panel, element, async (signal) => {
    const body = { prompt: text, ...options, sememe: wish };
    const got = await (await call("v1/completions", body, signal)).json();
    const [choice] = got.choices;
    const { rows, read } = planFields(choice.sememe.plan);
    const again = make("button", { className: "again" }, "Write again with this plan");
    const form = make("form", {}, ...rows, make("div", { className: "buttons" }, again));
    form.onsubmit = (event) => {
      event.preventDefault();
      if (!running) write(text, panel, read());
    };
    element.append(form, make("p", { className: "text" }, choice.text));
    const count = got.usage.completion_tokens;
    statistics(element, [
      [number(count, 0), "tokens written"],
      ...(got.sememe.decode_s ? [[number(count / got.sememe.decode_s, 1), "tokens/s"]] : []),
      ...costs({ ...got.sememe, rate: 0 }),
      [String(options.seed), "seed"],
    ]);
  });
}

const PANELS = { complete, chat, inspect, compress, plan: write };
const SYSTEMS = { compressor: ["compress"], planner: ["plan"] };
const TEXT = ["complete", "chat", "inspect"];

function select(name) {
  leave();
  for (const tab of $$("[role=tab]")) {
    const chosen = tab.getAttribute("aria-controls") === name;
    tab.setAttribute("aria-selected", chosen);
    tab.tabIndex = chosen ? 0 : -1;
    $(`#${tab.getAttribute("aria-controls")}`).hidden = !chosen;
  }
  document.body.classList.toggle("unsampled", ["inspect", "compress"].includes(name));
  document.body.classList.toggle("uncoloured", ["compress", "plan"].includes(name));
}

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey))
    event.target.closest?.("form.composer")?.requestSubmit();
});

for (const [name, send] of Object.entries(PANELS)) {
  const panel = $(`#${name}`);
  const form = $("form", panel);
  form.onsubmit = (event) => {
    event.preventDefault();
    const settled = $$("#settings input").every((input) => input.reportValidity());
    if (!running && settled) send($("textarea", form).value, panel);
  };
  const clear = make("button", { type: "button", className: "clear quiet" }, "Clear");
  clear.onclick = () => {
    $(".log", panel).replaceChildren();
    if (name === "chat") messages.length = 0;
    $("textarea", form).focus();
  };
  $(".buttons", form).append(clear);
}

$("[role=tablist]").addEventListener("click", (event) => {
  const name = event.target.getAttribute("aria-controls");
  if (name) select(name);
});
$("[role=tablist]").addEventListener("keydown", (event) => {
  const tabs = $$("[role=tab]").filter((tab) => !tab.hidden);
  const at = tabs.indexOf(document.activeElement);
  const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: tabs.length - 1 }[event.key];
  if (to === undefined || at < 0) return;
  event.preventDefault();
  const tab = tabs[(to + tabs.length) % tabs.length];
  tab.focus();
  select(tab.getAttribute("aria-controls"));
});

// ---- settings ----

function colourBy(name) {
  for (const way of ["concept", "surprise", "nothing"])
    document.body.classList.toggle(`by-${way}`, way === name);
}
for (const radio of $$("[name=colour]")) radio.onchange = () => colourBy(radio.value);

function showRate() {
  const value = dialled ? $("#rate").valueAsNumber : card.sememe.rate;
  $("#rate-shown").textContent = `${number(value)}${dialled ? "" : ", as trained"}`;
  $("#rate").setAttribute("aria-valuetext", `${number(value)} concepts per token`);
}
$("#rate").oninput = () => {
  dialled = true;
  showRate();
};

const wide = matchMedia("(min-width: 800px)");
wide.onchange = () => ($("#settings").open = wide.matches);

function theme(name) {
  document.documentElement.dataset.theme = name;
  localStorage.setItem("sememe-theme", name);
}
$("#theme").onclick = () => {
  const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  theme((document.documentElement.dataset.theme ?? system) === "dark" ? "light" : "dark");
};
const remembered = localStorage.getItem("sememe-theme");
if (remembered) theme(remembered);

// ---- the model ----

/** The model's card, which says nothing of it until it is loaded. */
async function load() {
  for (;;) {
    const { data } = await (await call("v1/models")).json();
    if (data[0].sememe.system) return data[0];
    $("#state").textContent = "The model is being loaded …";
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
}

function introduce() {
  const { system, context, split, num_concepts, codes_per_concept, rate, rates } = card.sememe;
  const words = [system, `context of ${number(context, 0)} tokens`];
  if (split) words.push(`layers ${split.join(" / ")}`);
  const several = codes_per_concept > 1 ? `${codes_per_concept} × ` : "";
  if (num_concepts) words.push(`${several}${number(num_concepts, 0)} codes`);
  $("#model").replaceChildren(make("b", {}, card.id), ` · ${words.join(" · ")}`);
  document.title = `${card.id} · Sememe`;
  document.body.classList.toggle("plain", !rates);
  if (rates) {
    // Within what the model allows, in steps of the field.
    $("#rate").min = Math.ceil(rates[0] * 100 - 1e-9) / 100;
    $("#rate").max = rates[1];
    $("#rate").value = rate;
    showRate();
  }
  colourBy(rates ? "concept" : "surprise");
  $(`[name=colour][value=${rates ? "concept" : "surprise"}]`).checked = true;
  const shown = SYSTEMS[system] ?? TEXT;
  for (const tab of $$("[role=tab]")) tab.hidden = !shown.includes(tab.getAttribute("aria-controls"));
  if (!card.sememe.chat) {
    $("#chat .empty").textContent =
      "This model has no chat template, so it cannot chat. Complete works.";
    $("#chat form").hidden = true;
  }
  wide.onchange();
  select(shown[0]);
  $("#state").hidden = true;
  $("#work").hidden = false;
}

try {
  card = await load();
  introduce();
} catch (fault) {
  $("#state").textContent = fault instanceof TypeError ? "The server cannot be reached." : fault.message;
  $("#state").classList.add("fault");
}
