/** API keys: list, create, limits, rotate, revoke. */

import { cancelButton, confirmed, dialog, el } from "../dom.js";
import { labelled } from "../settings.js";
import { ago } from "../words.js";
import { attempted, limitFields, limitsInWords, showSecret } from "./forms.js";

const PAGE = 50;
const DAY_SECONDS = 86_400;

export async function showKeys(api, content) {
  let keys = [];
  let next = null;
  const draw = async () => {
    ({ keys, next } = await api.get(`v1/keys?limit=${PAGE}`));
    show();
  };
  const more = async () => {
    const page = await api.get(`v1/keys?limit=${PAGE}&after=${encodeURIComponent(next)}`);
    keys = [...keys, ...page.keys];
    next = page.next;
    show();
  };
  const show = () => {
    const rows = keys.map((key) => row(api, key, draw));
    const names = ["Key", "State", "Role", "Owner", "Limits", "Last used", ""];
    const head = el(
      "tr",
      {},
      names.map((name) => (name ? el("th", { scope: "col" }, name) : el("td", {}))),
    );
    const create = el("button", { type: "button", onclick: () => attempted(() => createKey(api), draw) }, "New key");
    const table = el("table", { class: "list" }, el("thead", {}, head), el("tbody", {}, rows));
    const further = next && el("button", { type: "button", class: "quiet", onclick: more }, "Show more");
    content.replaceChildren(
      el("div", { class: "row between" }, el("h2", {}, "API keys"), create),
      el("div", { class: "wide-table", tabindex: "0", role: "region", "aria-label": "API keys" }, table),
      ...(further ? [further] : []),
    );
  };
  await draw();
}

function row(api, key, draw) {
  const button = (words, work, kind = "small") =>
    el(
      "button",
      { type: "button", class: kind, "aria-label": `${words} key ${key.id}`, onclick: () => attempted(work, draw) },
      words,
    );
  const buttons = [button("Edit", () => editKey(api, key))];
  if (key.state === "active") {
    buttons.push(
      button("Rotate", () => rotateKey(api, key)),
      button("Revoke", () => revokeKey(api, key)),
    );
  }
  return el(
    "tr",
    {},
    el("th", { scope: "row" }, el("code", {}, `${key.id} …${key.last_four}`)),
    el("td", {}, el("span", { class: `state ${key.state}` }, key.state)),
    el("td", {}, key.role),
    el("td", { dir: "auto" }, key.owner ?? "its own"),
    el("td", { class: "limits" }, limitsInWords(key.limits) || "the role's"),
    el("td", {}, key.last_used ? ago(key.last_used) : "never"),
    el("td", { class: "row-buttons" }, buttons),
  );
}

async function roleField(api, chosen) {
  const { roles } = await api.get("v1/roles");
  const field = el(
    "select",
    {},
    roles.map((role) => el("option", { value: role.name }, role.name)),
  );
  field.value = chosen;
  return field;
}

async function createKey(api) {
  const role = await roleField(api, "standard");
  const owner = el("input", { autocomplete: "off", dir: "auto" });
  const days = el("input", { type: "number", min: "1", step: "1", placeholder: "never" });
  const limits = limitFields(null, "the role's");
  const content = el(
    "div",
    {},
    labelled("Role", "Its rights, and the limits that the key does not have itself.", role),
    labelled("Owner", "Keys of one owner share conversations and cached answers. Empty: it has its own.", owner),
    labelled("Expires after days", "", days),
    limits.shown,
  );
  if ((await dialog("New key", content, [cancelButton(), el("button", { value: "create" }, "Create")])) !== "create")
    return;
  const body = { role: role.value, owner: owner.value.trim() || null, limits: limits.read() };
  if (days.value) body.expires_in_seconds = Number(days.value) * DAY_SECONDS;
  await showSecret("The new key", (await api.send("POST", "v1/keys", body)).key);
}

async function editKey(api, key) {
  const role = await roleField(api, key.role);
  const limits = limitFields(key.limits, "the role's");
  const content = el("div", {}, labelled("Role", "", role), limits.shown);
  if ((await dialog(`Key ${key.id}`, content, [cancelButton(), el("button", { value: "save" }, "Save")])) !== "save")
    return;
  await api.send("PATCH", `v1/keys/${key.id}`, { role: role.value, limits: limits.read() });
}

async function rotateKey(api, key) {
  const overlap = el("input", { type: "number", min: "0", max: "720", step: "1", value: "1" });
  const content = labelled("Hours for which the old secret stays valid", "0: it ends at once.", overlap);
  const buttons = [cancelButton(), el("button", { value: "rotate" }, "Rotate")];
  if ((await dialog(`Rotate key ${key.id}`, content, buttons)) !== "rotate") return;
  const body = { overlap_seconds: Math.round(Number(overlap.value) * 3600) };
  await showSecret("The new secret", (await api.send("POST", `v1/keys/${key.id}/rotate`, body)).key);
}

async function revokeKey(api, key) {
  const text = `Key ${key.id} (…${key.last_four}) ends at once, and for good. Who uses it gets 401.`;
  if (await confirmed("Revoke the key?", text, "Revoke")) await api.send("DELETE", `v1/keys/${key.id}`);
}
