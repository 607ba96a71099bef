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

// A number as people write it: with a minus sign, and no more digits than say something.
export function number(value, digits = 2) {
  if (value === null || value === undefined) return "";
  const small = value !== 0 && Math.abs(value) < 10 ** -digits;
  const text = small ? String(Number(value.toPrecision(2))) : String(Number(value.toFixed(digits)));
  return text.replace("-", "\u2212");
}

export const setting = (knobs) =>
  Object.entries(knobs)
    .filter(([, strength]) => strength !== 0)
    .map(([name, strength]) => `${name} ${number(strength)}`)
    .join(", ");

// A table that scrolls in a box of its own, which the keyboard can reach.
export function table(label, heads, rows) {
  const cell = (text, i) => (i ? el("td", {}, text) : el("th", { scope: "row" }, text));
  return el(
    "div",
    { class: "scroll", tabindex: "0", role: "group", "aria-label": label },
    el(
      "table",
      {},
      el("thead", {}, el("tr", {}, ...heads.map((head) => el("th", { scope: "col" }, head)))),
      el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map(cell)))),
    ),
  );
}
