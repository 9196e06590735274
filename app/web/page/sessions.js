/** The list at the side: the conversations that the service remembers, to open, rename, search and delete. */

import { byId, cancelButton, confirmed, dialog, el, iconButton } from "./dom.js";
import { ago, inOneLine } from "./words.js";

export class SessionList {
  /** `listener` has gone(id) and renamed(id, title). */
  constructor(api, listener) {
    this.api = api;
    this.listener = listener;
    this.sessions = [];
    this.current = null;
    byId("search").addEventListener("input", () => this.#draw());
  }

  /** Read the list, and return false where the service remembers no conversations. */
  async refresh() {
    try {
      this.sessions = (await this.api.get("v1/sessions")).sessions;
    } catch (error) {
      this.sessions = [];
      this.#draw();
      byId("sessions-note").textContent =
        error.status === 404 ? "This service remembers no conversations." : inOneLine(error);
      return error.status !== 404;
    }
    this.#draw();
    return true;
  }

  set shown(id) {
    this.current = id;
    this.#draw();
  }

  titleOf(id) {
    return this.sessions.find((session) => session.session_id === id)?.title ?? null;
  }

  #draw() {
    const wanted = byId("search").value.trim().toLocaleLowerCase();
    const found = this.sessions.filter((session) => nameOf(session).toLocaleLowerCase().includes(wanted));
    byId("sessions").replaceChildren(...found.map((session) => this.#row(session)));
    const none = this.sessions.length ? "No conversation has this in its title." : "No conversations yet.";
    byId("sessions-note").textContent = found.length ? "" : none;
  }

  #row(session) {
    const id = session.session_id;
    const name = nameOf(session);
    const current = id === this.current ? "page" : null;
    const details = `${name}\n${session.turns} turns, ${ago(session.updated)}`;
    const link = el("a", { href: `#/s/${id}`, "aria-current": current, dir: "auto", title: details }, name);
    const rename = iconButton("edit", `Rename: ${name}`, () => this.#rename(session));
    const remove = iconButton("trash", `Delete: ${name}`, () => this.#delete(session));
    return el("li", {}, link, el("span", { class: "row-actions" }, rename, remove));
  }

  async #rename(session) {
    const field = el("input", {
      value: nameOf(session),
      maxlength: "200",
      required: true,
      dir: "auto",
      autofocus: true,
    });
    const content = el("label", {}, "Title", field);
    const buttons = [cancelButton(), el("button", { value: "rename" }, "Rename")];
    if ((await dialog("Rename the conversation", content, buttons)) !== "rename" || !field.value.trim()) return;
    await this.#change(async () => {
      const path = `v1/sessions/${session.session_id}`;
      const { title } = await this.api.send("PATCH", path, { title: field.value.trim() });
      this.listener.renamed(session.session_id, title);
    });
  }

  async #delete(session) {
    const text = `“${nameOf(session)}” is deleted on the service, and cannot be brought back.`;
    if (!(await confirmed("Delete the conversation?", text, "Delete"))) return;
    await this.#change(async () => {
      await this.api.send("DELETE", `v1/sessions/${session.session_id}`);
      this.listener.gone(session.session_id);
    });
  }

  async #change(work) {
    let problem = null;
    await work().catch((error) => {
      problem = error;
    });
    await this.refresh();
    if (problem) byId("sessions-note").textContent = inOneLine(problem);
  }
}

const nameOf = (session) => session.title ?? session.session_id;
