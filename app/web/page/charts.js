/** Draws bars as SVG.  A screen reader gets the figures as a table beside it. */

import { el, svg } from "./dom.js";
import { whole } from "./words.js";

const HEIGHT = 160;
const WIDTH = 640;
const FOOT = 22;
const LEFT = 56;

/** Bars of [label, number], side by side: one for each day, say. */
export function bars(title, rows) {
  const most = rounded(Math.max(1, ...rows.map(([, number]) => number)));
  const step = (WIDTH - LEFT) / rows.length;
  const shown = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT + FOOT}`, class: "chart", "aria-hidden": "true" });
  for (const share of [0, 0.5, 1]) {
    const y = HEIGHT - share * (HEIGHT - 10);
    shown.append(svg("line", { x1: LEFT, x2: WIDTH, y1: y, y2: y, class: "grid" }));
    shown.append(svg("text", { x: LEFT - 6, y: y + 4, class: "scale" }, short(most * share)));
  }
  const every = Math.ceil(rows.length / 8);
  for (const [index, [label, number]] of rows.entries()) {
    const height = (number / most) * (HEIGHT - 10);
    const x = LEFT + index * step;
    const shape = { x: x + step * 0.15, y: HEIGHT - height, width: step * 0.7, height, rx: 2, class: "bar" };
    shown.append(svg("rect", shape, svg("title", {}, `${label}: ${whole(number)}`)));
    if (index % every === 0) shown.append(svg("text", { x: x + step / 2, y: HEIGHT + 16, class: "name" }, label));
  }
  return el("figure", {}, el("figcaption", {}, title), shown, readable(title, rows));
}

/** Bars of [label, number], one below the other: one for each model, say. */
export function lines(title, rows) {
  const most = Math.max(1, ...rows.map(([, number]) => number));
  const items = rows.map(([label, number]) =>
    el(
      "div",
      { class: "line" },
      el("span", { dir: "auto" }, label),
      share(number / most),
      el("span", { class: "number" }, whole(number)),
    ),
  );
  return el("figure", {}, el("figcaption", {}, title), items);
}

/** One bar of which a share, 0 to 1, is filled; the figure itself stands beside it. */
export function share(part) {
  const ground = svg("rect", { width: 100, height: 6, class: "ground" });
  const filled = svg("rect", { width: 100 * part, height: 6, class: "bar" });
  const attributes = { viewBox: "0 0 100 6", preserveAspectRatio: "none", class: "share", "aria-hidden": "true" };
  return svg("svg", attributes, ground, filled);
}

/** A line through numbers, the newest at the right. */
export function course(numbers) {
  const limit = Math.max(1, ...numbers);
  const points = numbers.map(
    (number, index) => `${(index / Math.max(1, numbers.length - 1)) * 100},${30 - (number / limit) * 28}`,
  );
  return svg(
    "svg",
    { viewBox: "0 0 100 30", preserveAspectRatio: "none", class: "course", "aria-hidden": "true" },
    svg("polyline", { points: points.join(" ") }),
  );
}

function readable(title, rows) {
  const body = rows.map(([label, number]) =>
    el("tr", {}, el("th", { scope: "row" }, label), el("td", {}, whole(number))),
  );
  return el("table", { class: "hidden" }, el("caption", {}, title), el("tbody", {}, body));
}

function rounded(number) {
  const unit = 10 ** Math.floor(Math.log10(number));
  return Math.ceil(number / unit) * unit;
}

function short(number) {
  if (number >= 1e6) return `${number / 1e6} M`;
  return number >= 1e4 ? `${number / 1e3} k` : whole(number);
}
