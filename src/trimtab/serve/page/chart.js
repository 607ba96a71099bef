// The dose-response of a knob as a small chart. Its plot stands exactly over the slider's rail: a thumb is under its dose.

import { el, number, svg, table } from "./dom.js";

// Pixels; the stylesheet gives the rail the same margins left and right.
const LEFT = 36;
const RIGHT = 72;
const TOP = 20;
const BOTTOM = 20;
const HEIGHT = 156;
const RAILS = 4; // looks of guardrails, see the stylesheet

// The lines of a dose-response: [{name, kind, values}]; of what was never measured there is none.
export function linesOf(curve) {
  const rails = Object.entries(curve.guardrails).map(([name, values], i) => ({ name, kind: `guardrail rail-${i % RAILS}`, values }));
  return [
    { name: "score", kind: "score", values: curve.score },
    ...rails,
    { name: "broken", kind: "broken", values: curve.broken },
    { name: "KL", kind: "kl", values: curve.kl },
  ].filter(({ values }) => values.some((value) => value !== null));
}

// What a line says at a strength, between two measured ones on the straight line that is drawn; null where none is.
export function valueAt(strengths, values, x) {
  const i = strengths.findIndex((strength) => strength >= x - 1e-9);
  if (i < 0 || values[i] === null) return null;
  if (strengths[i] <= x + 1e-9) return values[i];
  if (i === 0 || values[i - 1] === null) return null;
  const part = (x - strengths[i - 1]) / (strengths[i] - strengths[i - 1]);
  return values[i - 1] + part * (values[i] - values[i - 1]);
}

// Draw into `node`, an <svg> as wide as its place.
export function drawChart(node, { curve, safe, domain: [low, high], strength }) {
  const width = node.clientWidth;
  if (width <= LEFT + RIGHT) return; // not shown
  const right = width - RIGHT;
  const bottom = HEIGHT - BOTTOM;
  const lines = linesOf(curve);
  const top = roundUp(Math.max(0, ...curve.kl.filter((value) => value !== null))); // of the axis of KL
  const x = (value) => LEFT + ((value - low) / (high - low)) * (right - LEFT);
  const share = (value) => bottom - value * (bottom - TOP);
  const y = (kind) => (value) => share(kind === "kl" ? value / top : value);
  const parts = [];
  if (safe) parts.push(svg("rect", { class: "safe", x: x(safe[0]), y: TOP, width: x(safe[1]) - x(safe[0]), height: bottom - TOP }));
  for (const value of [0, 0.5, 1]) {
    parts.push(svg("line", { class: "grid", x1: LEFT, x2: right, y1: share(value), y2: share(value) }));
    parts.push(label(LEFT - 7, share(value) + 4, "end", number(value)));
    if (lines.at(-1)?.kind === "kl") parts.push(label(right + 7, share(value) + 4, "start", number(value * top)));
  }
  parts.push(label(LEFT, 11, "start", "share"));
  if (lines.at(-1)?.kind === "kl") parts.push(label(right, 11, "end", "KL"));
  for (const value of ticks(low, high, right - LEFT)) {
    parts.push(svg("line", { class: "tick", x1: x(value), x2: x(value), y1: bottom, y2: bottom + 4 }));
    parts.push(label(x(value), HEIGHT - 3, "middle", number(value)));
  }
  parts.push(svg("line", { class: "axis", x1: LEFT, x2: right, y1: bottom, y2: bottom }));
  parts.push(svg("line", { class: "now", x1: x(strength), x2: x(strength), y1: TOP - 4, y2: bottom }));
  for (const { kind, values } of lines) parts.push(...drawLine(curve.strengths, values, kind, x, y(kind)));
  for (const { kind, values } of lines) {
    const value = valueAt(curve.strengths, values, strength);
    if (value !== null) parts.push(svg("circle", { class: `dot ${kind}`, cx: x(strength), cy: y(kind)(value), r: 3.5 }));
  }
  node.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
  node.setAttribute("height", HEIGHT);
  node.replaceChildren(...parts);
}

// One entry of a legend: how the line looks, its name, and what it says at the strength that is set.
export function legendEntry(kind, name, value) {
  const sample = svg("svg", { class: "sample", viewBox: "0 0 28 12", width: 28, height: 12 });
  if (kind === "safe") sample.append(svg("rect", { class: "safe", x: 1, y: 1, width: 26, height: 10 }));
  else sample.append(svg("path", { class: `line ${kind}`, d: "M1 6H27" }), mark(kind, 14, 6));
  return el("li", {}, sample, ` ${name} `, el("b", {}, value));
}

// What a screen reader says in place of the picture.
export function chartText(name, curve, safe) {
  const [first, last] = [0, curve.strengths.length - 1];
  const ends = linesOf(curve).map(
    ({ name, values }) => `${name} ${number(values[first], 3) || "unknown"} to ${number(values[last], 3) || "unknown"}`,
  );
  const range = safe ? ` Safe range ${number(safe[0])} to ${number(safe[1])}.` : "";
  const span = `${number(curve.strengths[first])} to ${number(curve.strengths[last])}`;
  return `Dose-response of ${name}, from strength ${span}: ${ends.join(", ")}.${range} The table below has all numbers.`;
}

export function curveTable(name, curve) {
  const lines = linesOf(curve);
  const rows = curve.strengths.map((strength, i) => [number(strength), ...lines.map(({ values }) => number(values[i], 3))]);
  return table(`Dose-response of ${name}`, ["strength", ...lines.map((line) => line.name)], rows);
}

function drawLine(strengths, values, kind, x, y) {
  const marks = [];
  let path = "";
  let drawing = false;
  values.forEach((value, i) => {
    if (value !== null) {
      path += `${drawing ? "L" : "M"}${x(strengths[i])} ${y(value)}`;
      marks.push(mark(kind, x(strengths[i]), y(value)));
    }
    drawing = value !== null; // where nothing was measured the line has a gap
  });
  return [svg("path", { class: `line ${kind}`, d: path }), ...marks];
}

// Lines differ in the shape of their marks too.
const MARKS = {
  score: "m-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0",
  "guardrail rail-0": "m-3-3h6v6h-6z",
  "guardrail rail-1": "m-3-3l6 6m0-6l-6 6",
  "guardrail rail-2": "m-4-3h8l-4 7z",
  "guardrail rail-3": "m-4 0h8m-4-4v8",
  broken: "m0-4l4 7h-8z",
  kl: "m0-4l4 4l-4 4l-4-4z",
};

const mark = (kind, x, y) => svg("path", { class: `mark ${kind}`, d: `M${x} ${y}${MARKS[kind]}` });

const label = (x, y, anchor, text) => svg("text", { x, y, "text-anchor": anchor }, text);

// The next of 1, 2, 5, 10, ... from a positive value on: the end of an axis.
function roundUp(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return power * [1, 2, 5, 10].find((step) => step * power >= value * 0.999);
}

// Round strengths along the axis, as many as have room for their labels.
function ticks(low, high, width) {
  const room = Math.max(2, Math.floor(width / 34));
  const step = [0.1, 0.25, 0.5, 1, 2, 5, 10, 25, 50, 100].find((size) => (high - low) / size <= room) ?? high - low;
  const [first, last] = [Math.ceil(low / step - 1e-9), Math.floor(high / step + 1e-9)];
  return Array.from({ length: last - first + 1 }, (_, i) => (first + i) * step); // whole multiples, so that 0 is exact
}
