/** Starts the page: asks for the key, puts the parts together, and shows what the address says. */

import { Api } from "./api.js";
import { Conversation } from "./conversation.js";
import { byId, icon, say } from "./dom.js";
import { ModelPicker } from "./models.js";
import { SessionList } from "./sessions.js";
import { changeSettings, requestFields } from "./settings.js";
import { changeKey, signedIn } from "./signin.js";
import { codeOfLink, store } from "./store.js";
import { Thread } from "./thread.js";
import { inOneLine } from "./words.js";

const THEMES = ["auto", "light", "dark"];

class Page {
  constructor(api) {
    this.api = api;
    this.models = new ModelPicker(api);
    this.sessions = new SessionList(api, {
      gone: (id) => id === this.conversation.id && this.#go("#/"),
      renamed: (id, title) => {
        if (id === this.conversation.id) this.conversation.title = title;
      },
    });
    const actions = {
      edit: (message, text) => this.#run(() => this.conversation.edit(message, text, this.#fields())),
      regenerate: () => this.#run(() => this.conversation.regenerate(this.#fields())),
      retry: () => this.#run(() => this.conversation.retry(this.#fields())),
    };
    this.thread = new Thread(actions, () => this.models.contextLength);
    this.conversation = new Conversation(api, {
      reset: (messages) => this.thread.reset(messages),
      added: (message) => this.thread.added(message),
      changed: (message) => this.thread.changed(message),
      stored: (id) => this.#stored(id),
    });
    api.onUnauthorized = () => this.#signInAgain();
  }

  async start() {
    this.#listen();
    await Promise.all([this.#describeService(), this.models.refresh(), this.#findRights(), this.#listSessions()]);
    byId("shell").hidden = false;
    byId("draft").value = store.draft;
    fit(byId("draft"));
    await this.show();
  }

  /** Show what the address says. */
  async show() {
    const [, where, name] = location.hash.split("/");
    const isAdmin = where === "admin";
    byId("chat").hidden = isAdmin;
    byId("admin").hidden = !isAdmin;
    this.#openSide(false);
    if (isAdmin) this.administration ??= await import("./admin/tabs.js");
    if (isAdmin) return this.administration.showAdministration(this.api, name);
    this.administration?.leaveAdministration();
    if (where === "s" && name && name !== this.conversation.id) await this.#open(name);
    else if (where !== "s" && (this.conversation.id || this.conversation.messages.length)) this.conversation.clear();
    this.sessions.shown = this.conversation.id;
    byId("draft").focus();
  }

  async #open(id) {
    try {
      await this.conversation.open(id, this.sessions.titleOf(id));
    } catch (error) {
      this.#go("#/");
      note(inOneLine(error));
    }
  }

  #listen() {
    addEventListener("hashchange", () => this.show());
    byId("new-chat").addEventListener("click", () => {
      if (location.hash === "" || location.hash === "#/") this.conversation.clear();
    });
    byId("open-side").append(icon("menu"));
    byId("open-side").addEventListener("click", () => this.#openSide(true));
    byId("close-side").append(icon("close"));
    byId("close-side").addEventListener("click", () => this.#openSide(false));
    byId("shade").addEventListener("click", () => this.#openSide(false));
    byId("settings-button").append(icon("settings"));
    byId("settings-button").addEventListener("click", async () => changeSettings(await this.#modelFacts()));
    byId("key-button").addEventListener("click", async () => {
      if (await changeKey()) location.reload();
    });
    byId("theme-button").addEventListener("click", nextTheme);
    this.#listenToComposer();
  }

  #listenToComposer() {
    const draft = byId("draft");
    byId("send").append(icon("send"));
    byId("stop").append(icon("stop"));
    draft.addEventListener("input", () => {
      fit(draft);
      store.draft = draft.value;
    });
    draft.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      byId("composer").requestSubmit();
    });
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send();
    });
    byId("stop").addEventListener("click", () => this.conversation.stop());
    addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !document.querySelector("dialog[open]")) this.conversation.stop();
    });
  }

  async #send() {
    const draft = byId("draft");
    const text = draft.value.trim();
    if (!text || this.conversation.running) return;
    draft.value = "";
    fit(draft);
    await this.#run(() => this.conversation.send(text, this.#fields()));
  }

  /** Run one answer: its button stops it, and what was typed is not lost before it has ended well. */
  async #run(work) {
    if (this.conversation.running) return;
    note("");
    busy(true);
    say("The answer begins");
    const { conversation } = this;
    try {
      await work();
    } finally {
      busy(false);
    }
    const last = conversation.messages.at(-1);
    const failed = last?.state === "failed";
    const question = last?.state === "done" ? "" : (conversation.messages.at(-2)?.content ?? "");
    store.draft = byId("draft").value || question;
    say(failed ? "The answer failed" : "The answer is complete");
    if (failed) this.models.refresh();
  }

  #fields() {
    return { ...requestFields(store.settings), model: this.models.model };
  }

  async #stored(id) {
    history.replaceState(null, "", `#/s/${id}`);
    this.sessions.current = id;
    await this.sessions.refresh();
  }

  async #listSessions() {
    this.conversation.sessions = await this.sessions.refresh();
  }

  async #describeService() {
    const about = await this.api.get("./").catch(() => ({ name: "Chat", links: {} }));
    document.title = about.name;
    byId("service-name").textContent = about.name;
    byId("greeting").textContent = "What would you like to know?";
    byId("docs-link").hidden = !about.links.docs;
  }

  async #findRights() {
    const isAdmin = await this.api.get("v1/keys?limit=1").then(
      () => true,
      () => false,
    );
    byId("admin-link").hidden = !isAdmin;
  }

  /** What the service says of the default model; of another it says less. */
  async #modelFacts() {
    const status = await this.api.get("status").catch(() => null);
    return status?.model.model === this.models.model ? status.model : null;
  }

  async #signInAgain() {
    if (this.asking) return;
    this.asking = true;
    store.draft = byId("draft").value || store.draft;
    this.api.key = await signedIn(null, "The service does not take this key, or no longer.");
    this.asking = false;
    await this.#listSessions();
  }

  #openSide(isOpen) {
    document.body.classList.toggle("side-open", isOpen);
    byId("open-side").setAttribute("aria-expanded", isOpen);
    if (isOpen) byId("close-side").focus();
  }

  #go(hash) {
    history.replaceState(null, "", hash);
    this.conversation.clear();
    this.show();
  }
}

function busy(isBusy) {
  const hadFocus = [byId("send"), byId("stop")].includes(document.activeElement);
  byId("send").hidden = isBusy;
  byId("stop").hidden = !isBusy;
  if (hadFocus) byId(isBusy ? "stop" : "draft").focus();
}

function note(text) {
  byId("composer-note").textContent = text || "Enter sends, Shift+Enter begins a new line.";
}

/** Let a field be as high as its text. */
function fit(field) {
  field.style.height = "auto";
  field.style.height = `${Math.min(field.scrollHeight, 240)}px`;
}

function nextTheme() {
  store.theme = THEMES[(THEMES.indexOf(store.theme) + 1) % THEMES.length];
  showTheme();
}

function showTheme() {
  document.documentElement.dataset.theme = store.theme;
  byId("theme-button").textContent = `Theme: ${store.theme}`;
}

/** Exchange the code of a link, which may also be opened while the page is, for the key; returns what stood in the way. */
async function takeLink() {
  const code = codeOfLink();
  if (code === null) return null;
  try {
    store.keep((await new Api("").send("POST", "page/key", { code })).key, store.kept);
    return "";
  } catch (error) {
    return error.message;
  }
}

showTheme();
const problem = await takeLink();
addEventListener("hashchange", async () => {
  if ((await takeLink()) === "") location.reload();
});
new Page(new Api(await signedIn(store.key, problem ?? ""))).start();
