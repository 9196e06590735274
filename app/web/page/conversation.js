/**
 * One conversation: its messages, what the service has stored of them, and the answer in progress.
 *
 * The service remembers a session by whole turns, so a request holds only the messages that it does not have yet.  Where
 * the past is changed (an earlier message edited, an answer generated again), the whole conversation begins a new session,
 * and the old one is deleted once the new one is stored: a failure loses nothing.
 */

import { ApiError } from "./api.js";

const TITLE_CHARS = 60;
const SETTLED = new Set(["done", "stopped", "failed"]);

const newId = () => `chat-${crypto.getRandomValues(new Uint32Array(3)).join("-")}`;

export class Conversation {
  /** `listener` has added(message), changed(message), reset() and stored(): what a view does about each. */
  constructor(api, listener) {
    this.api = api;
    this.listener = listener;
    this.sessions = true;
    this.clear();
  }

  clear() {
    this.#leave();
    this.id = null;
    this.title = null;
    this.messages = [];
    this.diverged = false;
    this.updated = null;
    this.listener.reset(this.messages);
  }

  /** Show a stored session. */
  async open(id, title) {
    this.opening = id;
    const session = await this.api.get(`v1/sessions/${id}`);
    // Another one may have been chosen by now.
    if (this.opening !== id) return;
    this.#leave();
    this.id = id;
    this.title = title;
    this.diverged = false;
    this.updated = session.updated;
    this.messages = session.messages.map((message) => ({ ...message, state: "done", stored: true }));
    this.listener.reset(this.messages);
  }

  stop() {
    this.running?.abort();
  }

  #leave() {
    this.stop();
    this.running = null;
    this.opening = null;
  }

  /** Send a message, and return once its answer has ended, however. */
  async send(text, settings) {
    this.#add({ role: "user", content: text, state: "done", stored: false });
    await this.answer(settings);
  }

  /** Send the last message again, whose answer failed. */
  async retry(settings) {
    this.#dropAfter(this.messages.findLastIndex((message) => message.role === "user"));
    await this.answer(settings);
  }

  /** Generate the last answer anew. */
  async regenerate(settings) {
    const question = this.messages.findLastIndex((message) => message.role === "user");
    this.#diverge(question + 1);
    await this.answer({ ...settings, cache: false });
  }

  /** Replace one of the user's messages, and answer that; what followed it goes. */
  async edit(message, text, settings) {
    this.#diverge(this.messages.indexOf(message));
    await this.send(text, settings);
  }

  async answer(settings) {
    const body = this.#body(settings);
    const message = this.#add({
      role: "assistant",
      content: "",
      state: "streaming",
      stored: false,
      begun: performance.now(),
    });
    const running = new AbortController();
    this.running = running;
    try {
      await this.#read(message, body, running.signal);
      message.state = "done";
    } catch (error) {
      message.state = running.signal.aborted ? "stopped" : "failed";
      message.error = error;
      if (!running.signal.aborted && !(error instanceof ApiError)) console.error(error);
    }
    this.listener.changed(message);
    if (this.running === running) await this.#settle(message, body.session_id ?? null);
    if (this.running !== running) return;
    this.running = null;
    this.listener.changed(message);
  }

  async #read(message, body, signal) {
    for await (const [name, data] of this.api.stream("v1/chat", body, signal)) {
      if (name === "delta") this.#extend(message, data);
      if (name === "done") message.finished = { ...data, milliseconds: performance.now() - message.begun };
    }
    if (!message.finished) throw new ApiError(0, "connection_lost", "The answer ended in the middle.");
  }

  #extend(message, delta) {
    message.firstAfter ??= performance.now() - message.begun;
    message.content += delta.content ?? "";
    if (delta.reasoning_content)
      message.reasoning_content = (message.reasoning_content ?? "") + delta.reasoning_content;
    for (const call of delta.tool_calls ?? []) addCall(message, call);
    if (delta.tokens) message.tokens = [...(message.tokens ?? []), ...delta.tokens];
    this.listener.changed(message);
  }

  /** Take over what the service stored of a turn: with personal data masked, and also one that a stop came too late for. */
  async #settle(message, id) {
    if (id === null || message.state === "failed") return;
    const { running, id: before, diverged } = this;
    const session = await this.api.get(`v1/sessions/${id}`).catch(() => null);
    if (this.running !== running || !session || (id === before && session.updated === this.updated)) return;
    const [question, answer] = this.messages.slice(-2);
    const stored = session.messages.slice(-2);
    if (question?.role === "user" && stored[0]?.role === "user") question.content = stored[0].content;
    if (stored[1]?.role === "assistant") answer.content = stored[1].content;
    answer.state = "done";
    for (const each of this.messages) each.stored = true;
    this.id = id;
    this.updated = session.updated;
    this.diverged = false;
    this.listener.changed(question);
    if (diverged || before === null) await this.#name(id, before);
    this.listener.stored(id);
  }

  /** Give a new session a title, the one of the session that it replaces or its first words, and delete that one. */
  async #name(id, replaced) {
    const first = this.messages.find((message) => message.role === "user");
    const title = this.title ?? shortened(first?.content ?? "");
    try {
      this.title = (await this.api.send("PATCH", `v1/sessions/${id}`, { title })).title;
      if (replaced) await this.api.send("DELETE", `v1/sessions/${replaced}`);
    } catch (error) {
      // The conversation is stored all the same, under its id.
      console.warn(error);
    }
  }

  #body(settings) {
    const { system, ...fields } = settings;
    const whole = this.diverged || !this.sessions;
    const sent = this.messages.filter((message, index) => (whole || !message.stored) && this.#counts(message, index));
    const messages = sent.map(asSent);
    if (system) messages.unshift({ role: "system", content: system });
    if (!this.sessions) return { ...fields, messages };
    return { ...fields, messages, session_id: this.diverged || this.id === null ? newId() : this.id };
  }

  /** Whether a message is part of what the model reads: not a question without an answer, unless it is the last one. */
  #counts(message, index) {
    if (message.role === "assistant" && SETTLED.has(message.state))
      return Boolean(message.content || message.tool_calls);
    const answer = this.messages[index + 1];
    return answer?.role !== "assistant" || Boolean(answer.content || answer.tool_calls);
  }

  #add(message) {
    this.messages.push(message);
    this.listener.added(message);
    return message;
  }

  #diverge(from) {
    this.diverged ||= this.messages.slice(from).some((message) => message.stored);
    this.#dropAfter(from - 1);
  }

  #dropAfter(place) {
    this.messages.splice(place + 1);
    this.listener.reset(this.messages);
  }
}

function asSent({ role, content, tool_calls, tool_call_id, name, reasoning_content }) {
  return { role, content, tool_calls, tool_call_id, name, reasoning_content };
}

/** Put a part of a call behind those that came before. */
function addCall(message, part) {
  message.tool_calls ??= [];
  const call = message.tool_calls[part.index];
  if (!call) message.tool_calls[part.index] = { id: part.id, type: "function", function: { ...part.function } };
  else call.function.arguments += part.function?.arguments ?? "";
}

export function shortened(text) {
  const line = text.replace(/\s+/g, " ").trim();
  if (line.length <= TITLE_CHARS) return line || "Conversation";
  return `${[...line]
    .slice(0, TITLE_CHARS)
    .join("")
    .replace(/\s\S*$/, "")}…`;
}
