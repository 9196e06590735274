/** Shows how likely the model found each token: a colour for each, and its alternatives for whoever points at it. */

import { share } from "./charts.js";
import { el } from "./dom.js";

const LEVELS = [0.9, 0.6, 0.3, 0.1];

const percent = (logprob) => {
  const share = 100 * Math.exp(logprob);
  return share > 0 && share < 0.1 ? "< 0.1 %" : `${share.toFixed(1)} %`;
};

/** Which of the five colours a token has; 0 is the likeliest. */
const level = (logprob) => {
  const found = LEVELS.findIndex((least) => Math.exp(logprob) >= least);
  return found < 0 ? LEVELS.length : found;
};

const visible = (text) => text.replaceAll("\n", "⏎\n").replaceAll("\t", "⇥");

/** The tokens of an answer; one can be pointed at, or reached by the Tab key. */
export function tokenView(tokens) {
  const card = el("div", { class: "odds-card", role: "status" });
  const legend = el("p", { class: "note" }, "How likely the model found each token: ");
  const names = ["90 % and more", "60 %", "30 %", "10 %", "less"];
  for (const [index, name] of names.entries()) legend.append(el("span", { class: `token level-${index}` }, name), " ");
  const text = el("div", { class: "tokens" });
  for (const token of tokens) {
    const shown = el("span", { class: `token level-${level(token.logprob)}`, tabindex: "0" }, visible(token.text));
    const show = () => card.replaceChildren(...alternatives(token));
    shown.addEventListener("pointerenter", show);
    shown.addEventListener("focus", show);
    text.append(shown);
  }
  return el("div", {}, legend, text, card);
}

function alternatives(token) {
  const rows = token.top.some((other) => other.text === token.text) ? token.top : [token, ...token.top];
  const lines = rows.map((other) => {
    const bar = share(Math.exp(other.logprob));
    const chosen = other.text === token.text ? "chosen" : null;
    return el(
      "tr",
      { class: chosen },
      el("td", {}, el("code", {}, visible(other.text))),
      el("td", {}, percent(other.logprob)),
      el("td", {}, bar),
    );
  });
  return [el("table", {}, el("caption", {}, "In its place"), el("tbody", {}, lines))];
}
