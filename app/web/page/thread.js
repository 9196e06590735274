/** Shows the messages of a conversation; of a long one the latest, and earlier ones on request. */

import { byId, el } from "./dom.js";
import { MessageView } from "./message.js";

const SHOWN_AT_ONCE = 60;
const NEAR_PIXELS = 80;

export class Thread {
  constructor(actions, contextLength) {
    this.actions = actions;
    this.contextLength = contextLength;
    this.root = byId("thread");
    this.scroller = byId("scroll");
    this.views = new Map();
    this.hidden = [];
    this.earlier = el("button", { type: "button", class: "quiet earlier", onclick: () => this.#showEarlier() });
    this.follows = true;
    this.scroller.addEventListener("scroll", () => {
      const { scrollTop, scrollHeight, clientHeight } = this.scroller;
      this.follows = scrollHeight - scrollTop - clientHeight < NEAR_PIXELS;
    });
  }

  reset(messages) {
    this.hidden = messages.slice(0, Math.max(0, messages.length - SHOWN_AT_ONCE));
    const shown = messages.slice(this.hidden.length);
    // Views of messages that stay keep what they show, such as a text that is being edited.
    this.views = new Map(shown.map((message) => [message, this.views.get(message) ?? this.#view(message)]));
    this.root.replaceChildren(...[...this.views.values()].map((view) => view.element));
    this.#afterChange();
    this.toEnd();
  }

  added(message) {
    const view = this.#view(message);
    this.views.set(message, view);
    this.root.append(view.element);
    this.#afterChange();
    if (message.role === "user") this.toEnd();
    else this.#follow();
  }

  changed(message) {
    this.root.setAttribute("aria-busy", message.state === "streaming");
    this.views.get(message)?.update();
    this.#follow();
  }

  toEnd() {
    this.follows = true;
    this.#follow();
  }

  #view(message) {
    const view = new MessageView(message, this.actions, this.contextLength);
    view.onGrown = () => this.#follow();
    return view;
  }

  #follow() {
    if (this.follows) this.scroller.scrollTop = this.scroller.scrollHeight;
  }

  #afterChange() {
    byId("greeting").hidden = this.views.size > 0;
    const views = [...this.views.values()];
    for (const [index, view] of views.entries()) view.last = index === views.length - 1;
    if (this.hidden.length) {
      this.earlier.textContent = `Show earlier messages (${this.hidden.length})`;
      this.root.before(this.earlier);
    } else this.earlier.remove();
  }

  #showEarlier() {
    const shown = this.hidden.splice(Math.max(0, this.hidden.length - SHOWN_AT_ONCE));
    const height = this.scroller.scrollHeight;
    const added = new Map(shown.map((message) => [message, this.#view(message)]));
    this.views = new Map([...added, ...this.views]);
    this.root.prepend(...[...added.values()].map((view) => view.element));
    this.#afterChange();
    this.follows = false;
    this.scroller.scrollTop += this.scroller.scrollHeight - height;
  }
}
