/** Asks for the key, and what becomes of it. */

import { Api } from "./api.js";
import { cancelButton, dialog, el } from "./dom.js";
import { labelled } from "./settings.js";
import { store } from "./store.js";
import { inOneLine } from "./words.js";

const REFUSALS = new Set([401, 403, 429]);

/** A working key: the one that is known, or one that the user types; asks until there is one. */
export async function signedIn(known, problem = "") {
  if (known) {
    const found = await problemOf(known);
    if (found === null) return known;
    return signedIn(null, found);
  }
  const key = await asked(problem);
  return signedIn(key, "");
}

async function problemOf(key) {
  try {
    await new Api(key).get("v1/models");
    return null;
  } catch (error) {
    // Any other problem is not the key's, and the page says it where it stands in the way.
    return REFUSALS.has(error.status) ? inOneLine(error) : null;
  }
}

async function asked(problem) {
  const field = el("input", {
    type: "password",
    autocomplete: "off",
    required: true,
    autofocus: true,
    spellcheck: "false",
  });
  const keep = el("input", { type: "checkbox" });
  const content = el(
    "div",
    {},
    problem && el("p", { class: "problem", role: "alert" }, problem),
    el(
      "p",
      {},
      "The service made a key at its first start and printed it; it stands in data/api_key. Other keys come from an administrator.",
    ),
    labelled("API key", "", field),
    labelled("Keep it in this browser", "Else it is forgotten when this tab is closed.", keep, "check"),
  );
  let answer = null;
  while (answer !== "go") {
    answer = await dialog("Welcome", content, [el("button", { value: "go" }, "Start")], { class: "sign-in" });
  }
  store.keep(field.value.trim(), keep.checked);
  return store.key;
}

/** Let the user keep the key, or have it forgotten; returns whether it was. */
export async function changeKey() {
  const keep = el("input", { type: "checkbox" });
  keep.checked = store.kept;
  const content = el(
    "div",
    {},
    el("p", {}, `This page uses the key that ends with “${store.key.slice(-4)}”.`),
    labelled("Keep it in this browser", "Else it is forgotten when this tab is closed.", keep, "check"),
  );
  const forget = el("button", { value: "forget", class: "danger" }, "Forget the key");
  const answer = await dialog("API key", content, [forget, cancelButton(), el("button", { value: "save" }, "Save")]);
  if (answer === "save") store.keep(store.key, keep.checked);
  if (answer === "forget") store.forget();
  return answer === "forget";
}
