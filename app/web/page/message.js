/** Shows one message: its text, what it cost, what can be done with it, and why it failed. */

import { el, icon, iconButton } from "./dom.js";
import { copyButton, prepare, rendered } from "./markdown.js";
import { markMasked } from "./masked.js";
import { tokenView } from "./probabilities.js";
import { inWords, seconds, whole } from "./words.js";

const PAUSE_MILLISECONDS = 60;
const ENDS = { length: "cut off at the token limit", content_filter: "withheld", tool_calls: "calls a function" };

export class MessageView {
  /** `actions` has edit(message, text), regenerate(), retry(); `contextLength()` is the model's, or null. */
  constructor(message, actions, contextLength) {
    this.message = message;
    this.actions = actions;
    this.contextLength = contextLength;
    this.body = el("div", { class: "body", dir: "auto" });
    this.foot = el("div", { class: "foot" });
    const who = message.role === "user" ? "You" : message.role === "tool" ? "Function" : "Assistant";
    this.element = el("article", { class: `message ${message.role}`, "aria-label": who }, this.body, this.foot);
    this.shown = null;
    this.tokensShown = false;
    this.update();
  }

  /** Show the message as it is now; while it grows not more often than a reader can see. */
  update() {
    if (this.message.state !== "streaming") {
      clearTimeout(this.waiting);
      this.waiting = undefined;
      this.#draw();
    } else {
      this.waiting ??= setTimeout(() => {
        const begun = performance.now();
        this.waiting = undefined;
        this.#draw();
        this.pause = Math.max(PAUSE_MILLISECONDS, 4 * (performance.now() - begun));
        this.onGrown?.();
      }, this.pause ?? 0);
    }
  }

  /** Whether it is the last one, which alone can be generated again. */
  set last(isLast) {
    if (this.isLast === isLast) return;
    this.isLast = isLast;
    this.#drawFoot();
  }

  #draw() {
    const { message } = this;
    this.element.classList.toggle("streaming", message.state === "streaming");
    if (this.shown !== message.content || this.tokensShown || message.state !== "streaming") this.#drawBody();
    this.#drawFoot();
  }

  #drawBody() {
    const { message } = this;
    this.shown = message.content;
    if (this.tokensShown && message.tokens) this.body.replaceChildren(tokenView(message.tokens));
    else if (message.role === "assistant") this.#drawMarkdown();
    else this.body.replaceChildren(message.content);
    if (!this.tokensShown) markMasked(this.body);
  }

  #drawMarkdown() {
    const { message } = this;
    const text = message.content;
    const parts = [];
    if (message.reasoning_content)
      parts.push(thought(message.reasoning_content, this.body.querySelector("details")?.open));
    parts.push(rendered(text));
    for (const call of message.tool_calls ?? []) if (call) parts.push(called(call));
    if (message.state === "streaming" && !text && !message.reasoning_content)
      parts.push(el("span", { class: "wait" }, "…"));
    this.body.replaceChildren(...parts);
    prepare(text).then((loaded) => {
      // What was just loaded shows at the next change; a text that no longer changes is drawn once more.
      if (loaded && message.state !== "streaming" && !this.tokensShown) this.#drawBody();
    });
  }

  #drawFoot() {
    const { message } = this;
    clearInterval(this.counting);
    const parts = [];
    if (message.state === "failed") parts.push(this.#problem(message.error));
    if (message.state === "stopped") parts.push(el("p", { class: "problem calm" }, "You stopped this answer."));
    if (message.state !== "streaming") {
      const figures = this.#figures();
      parts.push(el("div", { class: "row" }, el("div", { class: "actions" }, this.#buttons()), figures));
    }
    this.foot.replaceChildren(...parts);
  }

  #buttons() {
    const { message } = this;
    const buttons = [];
    if (message.content) buttons.push(copyButton("Copy", () => message.content));
    if (message.role === "user") buttons.push(iconButton("edit", "Edit and send again", () => this.#edit()));
    if (message.role === "assistant" && this.isLast && message.state !== "failed") {
      buttons.push(iconButton("redo", "Generate again", () => this.actions.regenerate()));
    }
    if (message.tokens?.length) {
      const toggle = iconButton("odds", "Show the probabilities", () => {
        this.tokensShown = !this.tokensShown;
        toggle.setAttribute("aria-pressed", this.tokensShown);
        this.#drawBody();
      });
      toggle.setAttribute("aria-pressed", this.tokensShown);
      buttons.push(toggle);
    }
    return buttons;
  }

  #figures() {
    const { finished, firstAfter } = this.message;
    if (!finished) return null;
    const { usage } = finished;
    const rest = finished.milliseconds - firstAfter;
    const facts = [`${whole(usage.completion_tokens)} tokens`];
    if (usage.completion_tokens > 1 && rest > 0 && !finished.cached) {
      const rate = (1000 * (usage.completion_tokens - 1)) / rest;
      facts.push(`${rate < 100 ? rate.toFixed(1) : whole(rate)} tokens/s`);
    }
    if (firstAfter !== undefined) facts.push(`first after ${seconds(firstAfter)}`);
    if (finished.cached) facts.push("from the cache");
    const limit = finished.context?.limit ?? this.contextLength();
    if (limit) facts.push(`context ${whole(usage.total_tokens)} of ${whole(limit)}`);
    if (finished.context?.turns_dropped) facts.push(`${finished.context.turns_dropped} earliest turns not read`);
    if (ENDS[finished.finish_reason]) facts.push(ENDS[finished.finish_reason]);
    return el("p", { class: "figures", title: finished.model }, facts.join(" · "));
  }

  /** Why it failed, and a button to try again, which counts down where it has to wait. */
  #problem(error) {
    const { head, text, seconds: wait } = inWords(error);
    const button = el("button", { type: "button", onclick: () => this.actions.retry() }, "Try again");
    const rest = el("span", {});
    const until = Date.now() + (wait ?? 0) * 1000;
    const count = () => {
      const left = Math.max(0, Math.ceil((until - Date.now()) / 1000));
      button.disabled = left > 0;
      rest.textContent = left > 0 ? ` Possible again in ${left} s.` : "";
      if (left === 0) clearInterval(this.counting);
    };
    this.counting = setInterval(count, 250);
    count();
    const words = el("p", {}, el("strong", {}, `${head}.`), ` ${text}`, rest);
    return el("div", { class: "problem", role: "alert" }, words, this.isLast === false ? null : button);
  }

  #edit() {
    const { message } = this;
    const field = el("textarea", { dir: "auto", "aria-label": "Your message", rows: "3" });
    field.value = message.content;
    const close = () => {
      form.replaceWith(this.body);
      this.foot.hidden = false;
    };
    const cancel = el("button", { type: "button", class: "quiet", onclick: close }, "Cancel");
    const form = el(
      "form",
      { class: "edit" },
      field,
      el("div", { class: "row end" }, cancel, el("button", {}, "Send")),
    );
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      const text = field.value.trim();
      close();
      if (text) this.actions.edit(message, text);
    });
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") close();
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        form.requestSubmit();
      }
    });
    this.body.replaceWith(form);
    this.foot.hidden = true;
    field.focus();
  }
}

function thought(text, open) {
  return el("details", { class: "thought", open }, el("summary", {}, "Thoughts"), el("div", {}, text));
}

function called(call) {
  const head = el("div", { class: "code-bar" }, el("span", {}, icon("settings"), ` ${call.function.name}`));
  return el("div", { class: "code call", dir: "ltr" }, head, el("pre", { tabindex: "0" }, call.function.arguments));
}
