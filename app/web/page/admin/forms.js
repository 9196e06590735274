/** What the forms of keys and roles share: the fields of limits, and work whose errors are shown. */

import { dialog, el } from "../dom.js";
import { copyButton } from "../markdown.js";
import { labelled } from "../settings.js";
import { inOneLine, whole } from "../words.js";

const LIMITS = [
  ["requests_per_minute", "Requests a minute"],
  ["burst", "Requests at once"],
  ["tokens_per_minute", "Tokens a minute"],
  ["parallel_requests", "Requests in parallel"],
  ["monthly_tokens", "Tokens a month"],
];

/** Fields for limits, and a function that returns what stands in them. */
export function limitFields(limits, otherwise) {
  const fields = LIMITS.map(([name, words]) => {
    const field = el("input", { type: "number", min: "0", step: "1", placeholder: otherwise });
    field.value = limits?.[name] ?? "";
    return [name, words, field];
  });
  const shown = el("fieldset", {}, el("legend", {}, "Limits (0 is no limit)"));
  shown.append(
    el(
      "div",
      { class: "settings narrow" },
      fields.map(([, words, field]) => labelled(words, "", field)),
    ),
  );
  const read = () =>
    Object.fromEntries(fields.map(([name, , field]) => [name, field.value === "" ? null : Number(field.value)]));
  return { shown, read };
}

/** The limits that are set, in words. */
export function limitsInWords(limits) {
  const set = LIMITS.filter(([name]) => limits[name] !== null);
  return set.map(([name, words]) => `${words}: ${limits[name] === 0 ? "no limit" : whole(limits[name])}`).join("\n");
}

/** Do something, then draw again; what goes wrong is said in a dialog. */
export async function attempted(work, draw) {
  try {
    await work();
  } catch (error) {
    await dialog("That did not work", el("p", { role: "alert" }, inOneLine(error)), [
      el("button", { value: "ok" }, "Close"),
    ]);
  }
  await draw();
}

/** Show a secret that is never shown again. */
export async function showSecret(title, key) {
  const shown = el("code", { class: "secret" }, key);
  const content = el(
    "div",
    {},
    el("p", {}, "It is shown now and never again: the service stores only its digest."),
    el(
      "div",
      { class: "row" },
      shown,
      copyButton("Copy the key", () => key),
    ),
  );
  await dialog(title, content, [el("button", { value: "ok" }, "Done")]);
}
