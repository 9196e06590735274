/** The choice of a model or an adapter, and how far one that is being loaded has come. */

import { byId, el, say } from "./dom.js";
import { store } from "./store.js";
import { bytes, inOneLine } from "./words.js";

export class ModelPicker {
  constructor(api) {
    this.api = api;
    this.cards = [];
    this.select = el("select", { id: "model", "aria-label": "Model", onchange: () => this.#choose() });
    this.beside = el("span", { class: "model-state" });
    byId("models").replaceChildren(this.select, this.beside);
  }

  /** The name that requests use; undefined is the default model. */
  get model() {
    return this.select.value || undefined;
  }

  /** How many tokens the chosen model can read, null while that is not known. */
  get contextLength() {
    const card = this.#card;
    const base = this.cards.find((each) => each.id === card?.parent);
    return card?.max_model_len ?? base?.max_model_len ?? null;
  }

  async refresh() {
    try {
      this.cards = (await this.api.get("v1/models")).data;
    } catch (error) {
      this.beside.replaceChildren(el("span", { class: "bad" }, inOneLine(error)));
      return;
    }
    const models = this.cards.filter((card) => !card.parent && card.architecture.output_modalities.includes("text"));
    const options = models.flatMap((model) => [
      option(model, ""),
      ...this.cards.filter((card) => card.parent === model.id).map((card) => option(card, "+ ")),
    ]);
    this.select.replaceChildren(...options);
    if (this.cards.some((card) => card.id === store.model)) this.select.value = store.model;
    this.#draw();
  }

  #choose() {
    store.model = this.select.value;
    this.#draw();
  }

  get #card() {
    return this.cards.find((card) => card.id === this.select.value);
  }

  #draw() {
    const card = this.#card;
    const parts = [];
    if (card?.status.failed) parts.push(el("span", { class: "bad" }, "could not be loaded"));
    if (card?.status.value === "loading") {
      parts.push("is loading …");
      clearTimeout(this.waiting);
      this.waiting = setTimeout(() => this.refresh(), 2000);
    }
    if (card?.status.value === "unloaded" && !card.parent) {
      parts.push(el("button", { type: "button", class: "small", onclick: () => this.#load(card.id) }, "Load"));
    }
    this.beside.replaceChildren(...parts);
  }

  async #load(name) {
    const bar = el("progress", { "aria-label": `Loading ${name}` });
    const words = el("span", {}, "starting …");
    this.beside.replaceChildren(bar, words);
    let problem = null;
    try {
      for await (const [event, data] of this.api.stream("v1/models/load", { model_name: name })) {
        if (event === "progress") showProgress(bar, words, data);
      }
      say(`${name} is loaded`);
    } catch (error) {
      problem = el("span", { class: "bad" }, inOneLine(error));
    }
    await this.refresh();
    if (problem) this.beside.prepend(problem);
  }
}

function option(card, before) {
  return el("option", { value: card.id }, before + card.id);
}

function showProgress(bar, words, { stage, bytes_done: done, bytes_total: total }) {
  if (total) {
    bar.max = total;
    bar.value = done ?? 0;
  } else bar.removeAttribute("value");
  words.textContent = total ? `${stage}: ${bytes(done)} of ${bytes(total)}` : `${stage} …`;
}
