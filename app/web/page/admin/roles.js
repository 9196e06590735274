/** Roles: what their keys may do, and how much. */

import { cancelButton, confirmed, dialog, el } from "../dom.js";
import { labelled } from "../settings.js";
import { attempted, limitFields, limitsInWords } from "./forms.js";

const RIGHTS = [
  ["load_models", "Load models"],
  ["manage_keys", "Manage keys"],
  ["system_messages", "System messages"],
  ["raw_logprobs", "Probabilities of single tokens"],
  ["control_tokens", "Control tokens in prompts"],
];

export async function showRoles(api, content) {
  const draw = async () => {
    const { roles } = await api.get("v1/roles");
    const create = el(
      "button",
      { type: "button", onclick: () => attempted(() => editRole(api, null), draw) },
      "New role",
    );
    content.replaceChildren(
      el("div", { class: "row between" }, el("h2", {}, "Roles"), create),
      el(
        "div",
        { class: "cards" },
        roles.map((role) => card(api, role, draw)),
      ),
    );
  };
  await draw();
}

function card(api, role, draw) {
  const rights = RIGHTS.filter(([name]) => role.rights[name]).map(([, words]) => words);
  const button = (words, work) =>
    el(
      "button",
      {
        type: "button",
        class: "small",
        "aria-label": `${words} role ${role.name}`,
        onclick: () => attempted(work, draw),
      },
      words,
    );
  return el(
    "section",
    { class: "card", "aria-label": role.name },
    el("h3", {}, role.name),
    el("p", {}, rights.join(", ") || "May only generate"),
    el("p", { class: "note" }, modelsInWords(role.rights.models)),
    el("p", { class: "limits note" }, limitsInWords(role.limits) || "The configured limits"),
    el(
      "div",
      { class: "row" },
      button("Edit", () => editRole(api, role)),
      button("Delete", () => deleteRole(api, role)),
    ),
  );
}

/** null is all models, and an empty list none. */
function modelsInWords(models) {
  if (models === null) return "All models";
  return models.length ? `Models: ${models.join(", ")}` : "No model";
}

/** A field for the models of a role, and a function that returns what stands in it. */
function modelFields(listed) {
  const all = el("input", { type: "checkbox" });
  const names = el("textarea", { rows: "2", dir: "ltr" });
  const part = labelled("Models", "One a line. Empty: none.", names);
  all.checked = listed === null;
  names.value = (listed ?? []).join("\n");
  const show = () => {
    part.hidden = all.checked;
  };
  all.addEventListener("change", show);
  show();
  const lines = () => names.value.split("\n").map((each) => each.trim());
  return {
    parts: [labelled("All models", "", all, "check"), part],
    read: () => (all.checked ? null : lines().filter(Boolean)),
  };
}

async function editRole(api, role) {
  const name = el("input", {
    value: role?.name,
    required: true,
    pattern: "[A-Za-z0-9._\\-]{1,64}",
    disabled: role !== null,
  });
  const boxes = RIGHTS.map(([right, words]) => {
    const box = el("input", { type: "checkbox" });
    box.checked = role ? role.rights[right] : ["system_messages", "raw_logprobs", "control_tokens"].includes(right);
    return [right, words, box];
  });
  const models = modelFields(role?.rights.models ?? null);
  const limits = limitFields(role?.limits, "as configured");
  const content = el(
    "div",
    {},
    labelled("Name", "", name),
    el(
      "fieldset",
      {},
      el("legend", {}, "Rights"),
      boxes.map(([, words, box]) => labelled(words, "", box, "check")),
    ),
    models.parts,
    limits.shown,
  );
  const title = role ? `Role ${role.name}` : "New role";
  if ((await dialog(title, content, [cancelButton(), el("button", { value: "save" }, "Save")])) !== "save") return;
  const rights = Object.fromEntries(boxes.map(([right, , box]) => [right, box.checked]));
  rights.models = models.read();
  await api.send("PUT", `v1/roles/${encodeURIComponent(name.value)}`, { rights, limits: limits.read() });
}

async function deleteRole(api, role) {
  const text = `A role that a key still has cannot be deleted.`;
  if (await confirmed(`Delete role ${role.name}?`, text, "Delete")) await api.send("DELETE", `v1/roles/${role.name}`);
}
