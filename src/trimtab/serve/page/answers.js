// The two answers as they are written, what differs between them, and the heat strips of their projections.

import { byId, el, fromTemplate, number, setting, table } from "./dom.js";

const ENDS = { stop: "complete", length: "ended by max tokens" };

// One of the two answers. `begin` keeps the text that is there until new text comes, so that turning a knob does not flicker.
export function answerColumn(name, title, rescale) {
  const root = fromTemplate("answer-template");
  const part = (selector) => root.querySelector(selector);
  let answer = blank();

  root.id = name;
  part("h3").textContent = title;
  part("h3").id = `${name}-title`;
  root.setAttribute("aria-labelledby", `${name}-title`);
  const say = (state) => (part(".meta").textContent = state);

  function clear() {
    part(".text").replaceChildren();
    part(".strips").replaceChildren();
    part("details").hidden = true;
    part("details").querySelector(".scroll")?.remove();
  }
  function begin() {
    answer = blank();
    part(".error").textContent = "";
    root.setAttribute("aria-busy", "true");
    say("waiting");
  }
  function add({ knobs, choices }) {
    const [choice] = choices ?? [];
    if (!answer.started) clear();
    answer.started = true;
    say("writing");
    if (knobs) part(".setting").textContent = setting(knobs) || "all knobs off";
    if (!choice) return;
    const text = choice.delta?.content ?? "";
    answer.text += text;
    answer.end = choice.finish_reason ?? answer.end;
    part(".text").append(text);
    if (choice.projections) addProjections(answer, part(".strips"), choice.projections);
    rescale();
  }
  function finish(state) {
    root.setAttribute("aria-busy", "false");
    answer.done = !state;
    const count = answer.tokens.length;
    const length = count ? `, ${count} ${count === 1 ? "token" : "tokens"}` : "";
    say((state ?? ENDS[answer.end] ?? "complete") + length);
    if (!answer.rows.size) return;
    for (const [knob, { cells, values }] of answer.rows) cells.setAttribute("aria-label", summary(knob, values, answer.tokens));
    part("details").append(projectionTable(title, answer));
    part("details").hidden = false;
  }
  function fail(message) {
    if (!answer.started) {
      clear();
      part(".setting").textContent = "";
    }
    finish("no answer");
    part(".error").textContent = message;
  }
  return { root, begin, add, finish, fail, answer: () => answer };
}

const blank = () => ({ text: "", end: null, started: false, done: false, tokens: [], rows: new Map() });

function addProjections(answer, strips, { tokens, knobs }) {
  answer.tokens.push(...tokens);
  for (const [knob, values] of Object.entries(knobs)) {
    if (!answer.rows.has(knob)) {
      const cells = el("p", { class: "cells", role: "img", "aria-label": `Projections on ${knob}, being written` });
      strips.append(el("div", { class: "strip" }, el("h4", {}, knob), cells));
      answer.rows.set(knob, { cells, values: [] });
    }
    const row = answer.rows.get(knob);
    row.values.push(...values);
    row.cells.append(...tokens.map((token, i) => heatCell(knob, token, values[i] ?? 0)));
  }
}

function heatCell(knob, token, value) {
  const shown = token.replaceAll("\n", "\u21b5").replaceAll("\t", "\u21e5");
  const title = `${knob} ${number(value, 3)} at ${JSON.stringify(token)}`;
  const cell = el("span", { class: value < 0 ? "against" : "along", title }, shown);
  cell.style.setProperty("--value", Math.abs(value));
  return cell;
}

function summary(knob, values, tokens) {
  const at = (value) => `${number(value, 3)} at ${JSON.stringify(tokens[values.indexOf(value)])}`;
  const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
  const [low, high] = [Math.min(...values), Math.max(...values)];
  return `Projections on ${knob}: mean ${number(mean, 3)}, lowest ${at(low)}, highest ${at(high)}. The table below has all of them.`;
}

function projectionTable(title, { tokens, rows }) {
  const lines = tokens.map((token, i) => [JSON.stringify(token), ...[...rows.values()].map(({ values }) => number(values[i], 3))]);
  return table(`Projections of the answer "${title}"`, ["token", ...rows.keys()], lines);
}

// One scale of colours for both answers and all knobs: they share a unit, so a colour means the same everywhere.
export function rescale(columns) {
  const rows = columns.flatMap((column) => [...column.answer().rows.values()]);
  const most = Math.max(0, ...rows.map(({ values }) => Math.max(...values.map(Math.abs))));
  byId("scale").hidden = !rows.length;
  byId("answers").style.setProperty("--most", most || 1);
  byId("scale-low").textContent = number(-most);
  byId("scale-high").textContent = number(most);
}

// Show the steps of `difference`; returns a sentence about them.
export function showDifference(steps) {
  const words = { removed: 0, added: 0 };
  const parts = (steps ?? []).flatMap(({ kind, text, count }) => {
    if (kind === "same") return text;
    words[kind] += count;
    const said = (word) => el("span", { class: "visually-hidden" }, word);
    const marked = text.trimEnd();
    return [el(kind === "added" ? "ins" : "del", {}, said(`[${kind}: `), marked, said("]")), text.slice(marked.length)];
  });
  const same = words.removed + words.added === 0;
  const sentence = !steps
    ? "The answers are too long to be compared."
    : same
      ? "The answers are the same."
      : `${words.removed} words removed, ${words.added} added.`;
  byId("difference").hidden = false;
  byId("difference-text").replaceChildren(...(steps && !same ? parts : [sentence]));
  return sentence;
}
