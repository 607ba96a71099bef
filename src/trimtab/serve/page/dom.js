// Elements and numbers on the page. Names, answers and errors come from others, so text only ever enters as text.

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

export const el = (name, attributes, ...children) => build(document.createElement(name), attributes, children);

export const svg = (name, attributes, ...children) => build(document.createElementNS(SVG, name), attributes, children);

function build(node, attributes = {}, children = []) {
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children); // strings become text nodes
  return node;
}

// A copy of the element in a <template>.
export const fromTemplate = (id) => byId(id).content.cloneNode(true).firstElementChild;

const MINUS = "\u2212";

// A number as people write it: with a minus sign, and no more digits than say something, which are two of a small one.
export function number(value, digits = 2) {
  if (value === null || value === undefined) return "";
  const small = value !== 0 && Math.abs(value) < 10 ** (1 - digits);
  const text = small ? String(Number(value.toPrecision(2))) : String(Number(value.toFixed(digits)));
  return text.replaceAll("-", MINUS);
}

// A number among others of one unit, all of them with as many digits.
export const fixed = (value) => (value ?? null) === null ? "" : (Number(value.toFixed(3)) || 0).toFixed(3).replace("-", MINUS);

// Knobs and strengths in words; with `asked`, also where something else was asked for.
export const setting = (knobs, asked = knobs) =>
  Object.entries(knobs)
    .flatMap(([name, strength]) => {
      const [is, was] = [number(strength), number(asked[name] ?? 0)];
      if (is !== was) return `${name} ${is} (${was} was asked for)`;
      return strength === 0 ? [] : `${name} ${is}`;
    })
    .join(", ");

// A table that scrolls in a box of its own.
export function table(label, heads, rows) {
  const cell = (text, i) => (i ? el("td", {}, text) : el("th", { scope: "row" }, text));
  const head = el("thead", {}, el("tr", {}, ...heads.map((text) => el("th", { scope: "col" }, text))));
  return scroll(label, el("table", {}, head, el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map(cell))))));
}

// A box that the keyboard can reach, and that scrolls by itself.
export const scroll = (label, content) => el("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": label }, content);
