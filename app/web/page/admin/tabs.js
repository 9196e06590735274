/** What administrators see: keys, roles, usage and live figures, each behind an address of its own. */

import { byId, el } from "../dom.js";
import { inOneLine } from "../words.js";
import { showKeys } from "./keys.js";
import { showLive } from "./live.js";
import { showRoles } from "./roles.js";
import { showUsage } from "./usage.js";

const TABS = {
  keys: ["Keys", showKeys],
  roles: ["Roles", showRoles],
  usage: ["Usage", showUsage],
  live: ["Live", showLive],
};

let leave = () => {};
let shown = 0;

/** Show one of them; `name` is from the address. */
export async function showAdministration(api, name) {
  const chosen = name in TABS ? name : "keys";
  const links = Object.entries(TABS).map(([each, [words]]) =>
    el("a", { href: `#/admin/${each}`, "aria-current": each === chosen ? "page" : null }, words),
  );
  const content = el("div", { class: "admin-content" });
  const head = el(
    "div",
    { class: "admin-head" },
    el("h1", {}, "Administration"),
    el("a", { href: "#/" }, "Back to the chat"),
  );
  byId("admin").replaceChildren(head, el("nav", { class: "tabs", "aria-label": "Administration" }, links), content);
  leaveAdministration();
  const turn = shown;
  try {
    const ended = await TABS[chosen][1](api, content);
    // Another tab may be shown by now.
    if (turn === shown) leave = ended ?? leave;
    else ended?.();
  } catch (error) {
    content.replaceChildren(el("p", { class: "problem", role: "alert" }, inOneLine(error)));
  }
}

/** End what a tab does by itself; called when the chat is shown again. */
export function leaveAdministration() {
  shown += 1;
  leave();
  leave = () => {};
}
