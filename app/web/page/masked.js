/** Marks the placeholders that the service puts in the place of personal data. */

import { el } from "./dom.js";

const KINDS = {
  EMAIL: "an e-mail address",
  PHONE: "a telephone number",
  CARD: "the number of a payment card",
  IBAN: "the number of a bank account",
  SSN: "a social security number",
  IP: "an address of a computer",
  API_KEY: "a key or a password",
};
const PLACEHOLDER = new RegExp(`\\[(${Object.keys(KINDS).join("|")})\\]`, "g");

/** Mark them in the texts of an element. */
export function markMasked(root) {
  const texts = [];
  const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) if (walker.currentNode.data.includes("[")) texts.push(walker.currentNode);
  for (const text of texts) {
    const parts = text.data.split(PLACEHOLDER);
    if (parts.length > 1) text.replaceWith(...parts.map((part, index) => (index % 2 ? badge(part) : part)));
  }
}

function badge(kind) {
  const words = `Here was ${KINDS[kind]}. The service removed it before the model saw it or anything stored it.`;
  return el("mark", { class: "masked", title: words }, `[${kind}]`);
}
