/** The settings of answers: what each means, what it is when nothing is said, and what of them a request carries. */

import { cancelButton, dialog, el } from "./dom.js";
import { store } from "./store.js";

/** [name, label, meaning, default in words, attributes of the field] */
const NUMBERS = [
  [
    "temperature",
    "Temperature",
    "How freely tokens are drawn: 0 always takes the likeliest, above 1 gets wild.",
    null,
    { min: 0, max: 2, step: "any" },
  ],
  [
    "max_tokens",
    "Longest answer",
    "New tokens at most; the context window may leave fewer.",
    null,
    { min: 1, step: 1 },
  ],
  ["top_p", "Top p", "Only the likeliest tokens that make up this share.", "1, all", { min: 0, max: 1, step: "any" }],
  ["top_k", "Top k", "Only so many of the likeliest tokens.", "0, all", { min: 0, step: 1 }],
  [
    "min_p",
    "Min p",
    "Only tokens at least this share as likely as the likeliest.",
    "0, all",
    { min: 0, max: 1, step: "any" },
  ],
  [
    "repetition_penalty",
    "Repetition penalty",
    "Above 1 avoids what was said before, in the prompt too.",
    "1, off",
    { min: 0.01, max: 10, step: "any" },
  ],
  [
    "presence_penalty",
    "Presence penalty",
    "Above 0 avoids each token that the answer holds already.",
    "0, off",
    { min: -2, max: 2, step: "any" },
  ],
  [
    "frequency_penalty",
    "Frequency penalty",
    "The same, more with each time.",
    "0, off",
    { min: -2, max: 2, step: "any" },
  ],
  ["seed", "Seed", "The same seed and conversation give the same answer.", "random", { min: 0, step: 1 }],
];
const FORMATS = [
  ["text", "Free text"],
  ["json_object", "Any JSON object"],
  ["json_schema", "JSON of the schema below"],
];

/** The fields of a request that the settings make. */
export function requestFields(settings) {
  const fields = {};
  for (const [name] of NUMBERS) if (settings[name] !== undefined) fields[name] = settings[name];
  const stop = (settings.stop ?? "").split("\n").filter(Boolean);
  if (stop.length) fields.stop = stop;
  if (settings.format === "json_object") fields.response_format = { type: "json_object" };
  if (settings.format === "json_schema") {
    const schema = { name: "answer", schema: JSON.parse(settings.schema) };
    fields.response_format = { type: "json_schema", json_schema: schema };
  }
  if (settings.logprobs) fields.logprobs = 5;
  if (settings.system?.trim()) fields.system = settings.system.trim();
  return fields;
}

/** Let the user change them.  `model` is what GET /status says of the model, or null. */
export async function changeSettings(model) {
  const settings = store.settings;
  const fields = new Map();
  const system = el("textarea", { rows: "3", dir: "auto", autofocus: true });
  system.value = settings.system ?? "";
  const content = el("div", { class: "settings" });
  content.append(labelled("System prompt", "How the assistant is to behave. Empty: the service's own.", system));
  for (const line of NUMBERS) content.append(number(line, settings, model, fields));
  const stop = el("textarea", { rows: "2", dir: "auto" });
  stop.value = settings.stop ?? "";
  content.append(labelled("Stop texts", "One a line: the answer ends before the first of them.", stop));
  const { format, schema, parts } = formatFields(settings);
  const logprobs = el("input", { type: "checkbox" });
  logprobs.checked = Boolean(settings.logprobs);
  content.append(...parts, labelled("Probabilities", "Show how likely the model found each token.", logprobs, "check"));
  const reset = el("button", { type: "button", class: "quiet", onclick: () => clear(content) }, "Reset all");
  const buttons = [reset, cancelButton(), el("button", { value: "save" }, "Save")];
  if ((await dialog("Settings of the answers", content, buttons, { class: "wide" })) !== "save") return;
  const changed = {
    system: system.value,
    stop: stop.value,
    format: format.value,
    schema: schema.value,
    logprobs: logprobs.checked,
  };
  for (const [name, field] of fields) if (field.value !== "") changed[name] = Number(field.value);
  store.settings = changed;
}

function number([name, label, meaning, usual, attributes], settings, model, fields) {
  const recommended = Object.fromEntries(model?.recommended ?? [])[name];
  const known = model?.defaults?.[name] ?? usual;
  const shown = known === null || known === undefined ? "the service's default" : String(known);
  const field = el("input", { type: "number", ...attributes, placeholder: shown, inputmode: "decimal" });
  field.value = settings[name] ?? "";
  if (model?.unsupported?.includes(name)) {
    field.disabled = true;
    return labelled(label, "The loaded model's runner cannot do this.", field);
  }
  fields.set(name, field);
  const hint = recommended === undefined ? "" : ` The model's authors recommend ${recommended}.`;
  return labelled(label, `${meaning}${hint}`, field);
}

function formatFields(settings) {
  const format = el(
    "select",
    {},
    FORMATS.map(([value, words]) => el("option", { value }, words)),
  );
  format.value = settings.format ?? "text";
  const schema = el("textarea", { rows: "5", class: "mono", spellcheck: "false", dir: "ltr" });
  schema.value =
    settings.schema ??
    '{\n  "type": "object",\n  "properties": {"city": {"type": "string"}},\n  "required": ["city"]\n}';
  const schemaPart = labelled("JSON schema", "The answer is valid by it, unless it is cut off.", schema);
  const check = () => {
    schemaPart.hidden = format.value !== "json_schema";
    schema.setCustomValidity(schemaPart.hidden || isObject(schema.value) ? "" : "This is no JSON object.");
  };
  format.addEventListener("change", check);
  schema.addEventListener("input", check);
  check();
  return {
    format,
    schema,
    parts: [labelled("Form of the answer", "Enforced while it is generated.", format), schemaPart],
  };
}

function isObject(text) {
  try {
    const value = JSON.parse(text);
    return typeof value === "object" && value !== null && !Array.isArray(value);
  } catch {
    return false;
  }
}

function clear(content) {
  for (const field of content.querySelectorAll("input[type=number], textarea:not(.mono)")) field.value = "";
  for (const box of content.querySelectorAll("input[type=checkbox]")) box.checked = false;
  for (const choice of content.querySelectorAll("select")) {
    choice.selectedIndex = 0;
    choice.dispatchEvent(new Event("change"));
  }
}

let labels = 0;

/** A field with its name and its meaning, which a screen reader reads with it. */
export function labelled(label, meaning, field, kind = "") {
  labels += 1;
  field.id = `field-${labels}`;
  const hint = meaning ? el("small", { id: `hint-${labels}` }, meaning) : null;
  if (hint) field.setAttribute("aria-describedby", hint.id);
  return el("div", { class: `labelled ${kind}` }, el("label", { for: field.id }, label), hint, field);
}
