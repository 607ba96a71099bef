// The knobs: a slider for each, limited to its safe range unless the server leaves doses free, over its dose-response.

import { chartText, curveTable, drawChart, legendEntry, linesOf, valueAt } from "./chart.js";
import { el, fromTemplate, number, scroll, setting } from "./dom.js";

const STEP = 0.05;
const BEYOND = 2; // how far a slider goes where nothing limits it
const SMALL = "(max-width: 40rem)"; // screens where charts are closed at first, so that sliders and answers are near

// What the server does with strengths outside of a safe range.
export const POLICIES = {
  strict: "This server refuses strengths outside the safe range.",
  clamp: "This server moves strengths outside the safe range to its nearest end.",
  free: "This server takes any strength. Outside the safe range answers may break.",
};

// The strengths from and to which a knob can be turned, or null where it cannot be.
export function limitsOf({ safe_range: safe, dose_response: curve }, dose) {
  const known = [...(safe ?? []), ...(curve?.strengths ?? [])];
  if (dose === "free") return [Math.min(-BEYOND, ...known), Math.max(BEYOND, ...known)];
  return safe && [Math.min(safe[0], 0), Math.max(safe[1], 0)]; // off is always possible
}

// Make the card of a knob; `turned` is called when a person turns it.
export function knobCard(knob, dose, index, turned) {
  const root = fromTemplate("knob-template");
  const part = (selector) => root.querySelector(selector);
  const [slider, field, chart] = [part("input[type=range]"), part("input[type=number]"), part(".chart")];
  const { safe_range: safe, dose_response: curve } = knob;
  const limits = limitsOf(knob, dose);
  const domain = domainOf(curve, limits ?? safe);
  let strength = 0;

  part("h3").textContent = knob.id;
  part("h3").id = `knob-${index}`;
  part(".meta").textContent = safe ? `safe from ${number(safe[0])} to ${number(safe[1])}` : "no safe range";
  part(".meta").id = `knob-${index}-meta`;
  root.setAttribute("aria-labelledby", `knob-${index}`);
  slider.setAttribute("aria-label", `${knob.id}, strength`);
  field.setAttribute("aria-label", `${knob.id}, strength as a number`);
  for (const input of [slider, field]) input.setAttribute("aria-describedby", `knob-${index}-meta`);
  if (!limits) {
    slider.disabled = field.disabled = true;
    part(".reason").textContent =
      "No safe range is known for this knob, and this server turns no knob without one. Tuning (trimtab tune) finds it.";
  }
  placeOnRail(part(".rail"), slider, limits ?? domain, safe, domain);
  if (curve) {
    chart.setAttribute("aria-label", chartText(knob.id, curve, safe));
    part(".numbers").append(curveTable(knob.id, curve));
    part(".dose").open = !matchMedia(SMALL).matches;
  } else for (const details of root.querySelectorAll(".dose, .numbers")) details.remove();
  part(".card p").textContent = describe(knob);
  if (knob.card) part(".card").append(cardTable(`About ${knob.id}`, knob.card));

  function show() {
    slider.value = strength;
    field.value = Number(strength.toFixed(4));
    root.classList.toggle("on", strength !== 0);
    if (!curve) return;
    drawChart(chart, { curve, safe, domain, strength });
    part(".legend").replaceChildren(...legend(curve, safe, strength));
  }
  function turn(value) {
    if (!limits) return;
    strength = Math.min(limits[1], Math.max(limits[0], Number.isFinite(value) ? value : 0));
    show();
  }
  slider.addEventListener("input", () => (turn(slider.valueAsNumber), turned()));
  field.addEventListener("change", () => (turn(field.valueAsNumber), turned()));
  new ResizeObserver(show).observe(chart); // when the width changes, and when the chart is opened
  show();
  return { name: knob.id, root, turn, enabled: Boolean(limits), strength: () => strength };
}

// The panels as buttons that set the sliders, first one that turns everything off. Returns what marks the one that is set.
export function panelButtons(root, panels, choose) {
  const all = [{ id: "All off", knobs: {} }, ...panels];
  const buttons = all.map((panel) => {
    const button = el("button", { type: "button", "aria-pressed": "false" }, panel.id);
    button.title = setting(panel.knobs);
    button.addEventListener("click", () => choose(panel));
    return button;
  });
  root.replaceChildren(...buttons);
  const sorted = (knobs) => setting(Object.fromEntries(Object.entries(knobs).sort()));
  return (strengths) => {
    all.forEach(({ knobs }, i) => buttons[i].setAttribute("aria-pressed", String(sorted(knobs) === sorted(strengths))));
  };
}

// The lines of a card, most of them a term, spaces, and what is said of it, as a table that finds room on any screen.
function cardTable(label, card) {
  const rows = card.split("\n").map((line) => {
    const [, term, said] = line.match(/^(\S.*?) {2,}(.*)$/) ?? [];
    return term ? [el("th", { scope: "row" }, term), el("td", {}, said)] : [el("td", { colspan: 2 }, line)];
  });
  return scroll(label, el("table", {}, el("tbody", {}, ...rows.map((cells) => el("tr", {}, ...cells)))));
}

function describe({ kind, method, layers, layer, where }) {
  const at = layers?.length ? layers : layer === null || layer === undefined ? [] : [layer];
  const place = at.length > 1 ? `layers ${at[0]} to ${at.at(-1)}` : at.length ? `layer ${at[0]}` : "";
  return [kind, method, place, where && `${where} tokens`].filter(Boolean).join(", ");
}

// The strengths that chart and rail show: everything that was measured or can be set, and 0 and 1 for orientation.
function domainOf(curve, limits) {
  const shown = [0, 1, ...(limits ?? [-1]), ...(curve?.strengths ?? [])];
  return [Math.min(...shown), Math.max(...shown)];
}

// Stand the slider over the part of the rail that can be set. Whole steps, so that 0 is one of them; the number field
// takes what lies between.
function placeOnRail(rail, slider, limits, safe, [low, high]) {
  const [min, max] = [Math.ceil(limits[0] / STEP - 1e-9) * STEP, Math.floor(limits[1] / STEP + 1e-9) * STEP];
  slider.min = min.toFixed(2);
  slider.max = max.toFixed(2);
  const percent = (value) => `${(100 * value) / (high - low)}%`;
  const place = (name, from, to) => {
    rail.style.setProperty(`--${name}-from`, percent(from - low));
    rail.style.setProperty(`--${name}-span`, percent(to - from));
  };
  place("slider", min, max);
  place("safe", ...(safe ?? [low, low]));
}

function legend(curve, safe, strength) {
  const entries = linesOf(curve).map(({ name, kind, values }) => {
    const value = valueAt(curve.strengths, values, strength);
    return legendEntry(kind, name, value === null ? "" : number(value, 2));
  });
  return safe ? [...entries, legendEntry("safe", "safe range", "")] : entries;
}
