// The two answers as they are written, what differs between them, and the heat strips of their projections.

import { byId, el, fixed, fromTemplate, number, setting, table } from "./dom.js";

const ENDS = { stop: "complete", length: "ended by max tokens" };
const FEW = 4; // knobs whose strips are all shown at first
const opened = new Map(); // whether a person has opened or closed a knob's strips

// One of the two answers. `begin` keeps the text that is there until new text comes, so that turning a knob does not flicker.
// `order` returns the names of the knobs as the page has them; `changed` is called when there is more to show.
export function answerColumn(name, title, order, changed) {
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
    part(".numbers").hidden = true;
    part(".numbers").querySelector(".scroll")?.remove();
  }
  function begin(asked) {
    answer = blank(asked);
    part(".error").textContent = "";
    root.setAttribute("aria-busy", "true");
    say("waiting");
  }
  function add({ knobs, choices }) {
    const [choice] = choices ?? [];
    if (!answer.started) clear();
    answer.started = true;
    say("writing");
    if (knobs) part(".setting").textContent = setting(knobs, answer.asked) || "all knobs off";
    if (!choice) return;
    const text = choice.delta?.content ?? "";
    answer.text += text;
    answer.end = choice.finish_reason ?? answer.end;
    part(".text").append(text);
    if (choice.projections) addProjections(answer, part(".strips"), choice.projections, order(), changed);
    changed();
  }
  function finish(state) {
    root.setAttribute("aria-busy", "false");
    answer.done = !state;
    const count = answer.tokens.length;
    const length = count ? `, ${count} ${count === 1 ? "token" : "tokens"}` : "";
    say((state ?? ENDS[answer.end] ?? "complete") + length);
    if (!answer.rows.size) return;
    for (const [knob, { cells, values }] of answer.rows) cells.setAttribute("aria-label", summary(knob, values, answer.tokens));
    part(".numbers").append(projectionTable(title, answer));
    part(".numbers").hidden = false;
  }
  function fail(message) {
    if (!answer.started) {
      clear();
      part(".setting").textContent = "";
    }
    finish("no answer");
    part(".error").textContent = message;
  }
  return { root, say, begin, add, finish, fail, answer: () => answer };
}

const blank = (asked = {}) => ({ asked, text: "", end: null, started: false, done: false, tokens: [], rows: new Map() });

function addProjections(answer, strips, { tokens, knobs: along }, order, changed) {
  answer.tokens.push(...tokens);
  for (const knob of new Set([...order, ...Object.keys(along)])) {
    if (!Object.hasOwn(along, knob)) continue;
    if (!answer.rows.has(knob)) answer.rows.set(knob, newRow(knob, strips, changed));
    const [row, values] = [answer.rows.get(knob), along[knob]];
    row.values.push(...values);
    row.most = Math.max(row.most, ...values.map(Math.abs));
    row.cells.append(...tokens.map((token, i) => heatCell(knob, token, values[i] ?? 0)));
  }
}

function newRow(knob, strips, changed) {
  const cells = el("p", { class: "cells", role: "img", "aria-label": `Projections on ${knob}, being written` });
  const row = { strip: el("details", { class: "strip" }, el("summary", {}, knob), cells), cells, values: [], most: 0, shown: false };
  row.strip.addEventListener("toggle", () => {
    if (row.strip.open === row.shown) return; // as `showStrips` has it
    opened.set(knob, row.strip.open);
    changed();
  });
  strips.append(row.strip);
  return row;
}

// Where there are many knobs only the strips of those that are turned are open, in both answers, unless a person chose.
export function showStrips(columns, strengths) {
  for (const { rows } of columns.map((column) => column.answer()))
    for (const [knob, row] of rows) {
      row.shown = opened.get(knob) ?? (rows.size <= FEW || strengths[knob] !== 0);
      row.strip.open = row.shown;
    }
}

function heatCell(knob, token, value) {
  const shown = token.replaceAll("\n", "\u21b5").replaceAll("\t", "\u21e5");
  const title = `${knob} ${fixed(value)} at ${JSON.stringify(token)}`;
  const cell = el("span", { class: value < 0 ? "against" : "along", title }, shown);
  cell.style.setProperty("--value", Math.abs(value));
  return cell;
}

function summary(knob, values, tokens) {
  const at = (value) => `${fixed(value)} at ${JSON.stringify(tokens[values.indexOf(value)])}`;
  const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
  const [low, high] = [Math.min(...values), Math.max(...values)];
  return `Projections on ${knob}: mean ${fixed(mean)}, lowest ${at(low)}, highest ${at(high)}. The table below has all of them.`;
}

function projectionTable(title, { tokens, rows }) {
  const lines = tokens.map((token, i) => [JSON.stringify(token), ...[...rows.values()].map(({ values }) => fixed(values[i]))]);
  return table(`Projections of the answer "${title}"`, ["token", ...rows.keys()], lines);
}

// One scale of colours for all strips that are open: they share a unit, so a colour means the same everywhere.
export function rescale(columns) {
  const rows = columns.flatMap((column) => [...column.answer().rows.values()]);
  const shown = rows.filter((row) => row.shown);
  const most = Math.max(0, ...shown.map((row) => row.most));
  byId("scale").hidden = !rows.length;
  document.querySelector(".scale-ends").hidden = !shown.length;
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
