// The playground: asks the server twice, with all knobs off and with the strengths of the sliders, and shows both.

import { answerColumn, rescale, showDifference, showStrips } from "./answers.js";
import { byId, el, number } from "./dom.js";
import { POLICIES, knobCard, panelButtons } from "./knobs.js";
import { COMPLETIONS, ServerError, get, stream } from "./server.js";
import { asCurl, asPython, difference } from "./texts.js";

const PAUSE = 400; // milliseconds a knob rests before the steered answer is written anew
const KEY = "trimtab-api-key";

let cards = [];
let markPanel = () => {};
let sent = null; // what both answers answer: a request without knobs
let pause = 0;
let loading = 0; // counts the times that everything was loaded

const columns = {};
for (const [name, title] of [["base", "Base"], ["steered", "Steered"]]) {
  columns[name] = answerColumn(name, title, () => cards.map((card) => card.name), showProjections);
  document.querySelector("#answers .pair").append(columns[name].root);
}
const running = { base: null, steered: null };

const key = () => byId("key").value.trim();
const strengths = () => Object.fromEntries(cards.map((card) => [card.name, card.strength()]));
const turned = () => Object.fromEntries(Object.entries(strengths()).filter(([, strength]) => strength !== 0));

// Loading: what the server has

async function load() {
  const [mine, given] = [++loading, key()];
  const fetched = (path) => get(path, given, (seconds) => (byId("dose-note").textContent = `Loading, ${busy(seconds)}.`));
  for (const place of ["load", "key"]) complain(place, "");
  try {
    const [models, knobs, panels] = await Promise.all(["v1/models", "v1/knobs", "v1/panels"].map(fetched));
    const whole = await Promise.all(knobs.data.map(({ id }) => fetched(`v1/knobs/${encodeURIComponent(id)}`)));
    if (mine !== loading) return; // another key was given meanwhile
    showModels(models.data.filter(({ panel }) => !panel));
    showKnobs(whole, knobs.dose);
    markPanel = panelButtons(byId("panels"), panels.data, choosePanel);
    markPanel(strengths());
  } catch (error) {
    if (mine !== loading) return;
    byId("dose-note").textContent = "";
    complain(error.place === "key" ? "key" : "load", plain(error));
  }
}

function showModels(models) {
  byId("model").replaceChildren(...models.map(({ id }) => el("option", { value: id }, id)));
  const limit = () => {
    const length = models.find(({ id }) => id === byId("model").value)?.max_model_len;
    if (length) byId("max-tokens").max = length;
  };
  byId("model").onchange = limit;
  limit();
}

function showKnobs(knobs, dose) {
  const before = strengths(); // of a first try, without the right key
  cards = knobs.map((knob, i) => knobCard(knob, dose, i, knobTurned));
  for (const card of cards) card.turn(before[card.name] ?? 0);
  byId("knob-list").replaceChildren(...cards.map(({ root }) => root));
  byId("dose-note").textContent = knobs.length ? POLICIES[dose] : "This server has no knobs: start it with --knob FILE.";
}

function choosePanel(panel) {
  for (const card of cards) card.turn(panel.knobs[card.name] ?? 0);
  const reached = strengths();
  const [missing, short] = [[], []];
  for (const [name, strength] of Object.entries(panel.knobs)) {
    if (!cards.some((card) => card.name === name && card.enabled)) missing.push(name);
    else if (reached[name] !== strength) short.push(`${name} to ${number(strength)}`);
  }
  const beyond = short.length ? `${panel.id} turns ${short.join(", ")}, farther than can be set here.` : "";
  const absent = missing.length ? `${panel.id} also turns ${missing.join(", ")}, which cannot be turned here.` : "";
  byId("panel-note").textContent = `${beyond} ${absent}`.trim();
  knobTurned();
}

function knobTurned() {
  markPanel(strengths());
  clearTimeout(pause);
  if (sent && byId("rerun").checked) pause = setTimeout(() => ask(["steered"]), PAUSE);
}

function showProjections() {
  showStrips(Object.values(columns), strengths());
  rescale(Object.values(columns));
  const { started, text } = columns.steered.answer();
  if (started) byId("peek").textContent = text;
}

// Asking

function request() {
  const [system, seed] = [byId("system").value.trim(), byId("seed").valueAsNumber];
  const user = { role: "user", content: byId("prompt").value };
  return {
    model: byId("model").value,
    messages: system ? [{ role: "system", content: system }, user] : [user],
    max_tokens: byId("max-tokens").valueAsNumber,
    temperature: byId("temperature").valueAsNumber,
    ...(Number.isNaN(seed) ? {} : { seed }),
  };
}

// Ask for the answers named, together; what was still running of them is dropped.
async function ask(names) {
  clearTimeout(pause);
  for (const place of ["ask", "knobs", "key"]) complain(place, "");
  byId("announce").textContent = "";
  byId("no-answers").hidden = true;
  byId("asked").textContent = sent.messages.at(-1).content;
  const knobs = { base: {}, steered: turned() };
  await Promise.all(names.map((name) => write(name, { ...sent, knobs: knobs[name] })));
  if (!Object.values(running).some(Boolean)) compare(names);
}

// Fill a column with an answer, until it ends or a later one takes its place.
async function write(name, body) {
  const column = columns[name];
  const control = new AbortController();
  running[name]?.abort();
  running[name] = control;
  showRunning();
  column.begin(body.knobs);
  const current = () => running[name] === control;
  try {
    for await (const chunk of stream(body, key(), control.signal, (seconds) => column.say(`waiting, ${busy(seconds)}`))) {
      if (!current()) return;
      column.add(chunk);
    }
    column.finish();
  } catch (error) {
    if (!current()) return;
    if (error.name === "AbortError") return column.finish("stopped");
    const place = { prompt: "ask", knobs: "knobs", key: "key" }[error.place];
    column.fail(place ? "" : plain(error));
    if (name === "steered") byId("peek").textContent = "";
    if (place) complain(place, plain(error));
  } finally {
    if (current()) running[name] = null;
    showRunning();
  }
}

function compare(names) {
  const [base, steered] = [columns.base.answer(), columns.steered.answer()];
  showProjections();
  if (!base.done || !steered.done) {
    byId("difference").hidden = true;
    return;
  }
  const sentence = showDifference(difference(base.text, steered.text));
  const which = names.length > 1 ? "Both answers are" : "The steered answer is";
  byId("announce").textContent = `${which} complete. ${sentence}`;
}

const busy = (seconds) => `the server is busy: next try in ${seconds} s`;

function showRunning() {
  byId("stop").setAttribute("aria-disabled", String(!Object.values(running).some(Boolean)));
}

function stop() {
  clearTimeout(pause);
  const halted = Object.values(running).filter(Boolean);
  halted.forEach((control) => control.abort());
  if (halted.length) byId("announce").textContent = "Stopped.";
}

// Copying

async function copy(written) {
  if (!byId("ask-form").reportValidity()) return;
  const byHand = byId("copy-by-hand");
  const text = written({ ...request(), knobs: turned() });
  try {
    await navigator.clipboard.writeText(text);
    byHand.hidden = true;
    byId("copied").textContent = "Copied.";
  } catch {
    // Browsers give pages the clipboard on https and on this machine only, or when a person allows it.
    byId("copied").textContent = "The browser keeps its clipboard closed here. The text below can be copied by hand.";
    byHand.hidden = false;
    byId("copy-text").value = text;
    byId("copy-text").select();
  }
}

const here = (path) => new URL(path, document.baseURI).href;

// Errors

function complain(place, message) {
  byId(`${place}-error`).textContent = message;
  if (message) byId(`${place}-error`).scrollIntoView({ block: "nearest" });
}

function plain(error) {
  if (error instanceof ServerError) return error.message;
  console.error(error);
  return `This page has a fault: ${error.message}`;
}

byId("ask-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sent = request();
  ask(["base", "steered"]);
});
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("ask-form").requestSubmit();
});
byId("stop").addEventListener("click", stop);
byId("copy-curl").addEventListener("click", () => copy((body) => asCurl(here(COMPLETIONS), body, key())));
byId("copy-python").addEventListener("click", () => copy((body) => asPython(here("v1"), body, key())));
byId("key-form").addEventListener("submit", (event) => event.preventDefault());
byId("key").addEventListener("change", () => {
  sessionStorage.setItem(KEY, key());
  load();
});
byId("key").value = sessionStorage.getItem(KEY) ?? "";
load();
