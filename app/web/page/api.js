/** Calls the service: its native routes, by relative addresses, so that a proxy may put the page below any path. */

export class ApiError extends Error {
  /** `status` is 0 where no answer came, or none that is complete. */
  constructor(status, code, message, { retryAfter = null, details = {} } = {}) {
    super(message);
    this.status = status;
    this.code = code;
    this.retryAfter = retryAfter;
    this.details = details;
  }
}

const lost = () => new ApiError(0, "connection_lost", "The service did not answer, or stopped in the middle.");

export class Api {
  constructor(key) {
    this.key = key;
    this.onUnauthorized = () => {};
  }

  get(path) {
    return this.send("GET", path);
  }

  /** The JSON that a route answers, null where it answers nothing. */
  async send(method, path, body) {
    const reply = await this.#fetch(method, path, body);
    try {
      return reply.status === 204 ? null : await reply.json();
    } catch {
      throw lost();
    }
  }

  async text(path) {
    return (await this.#fetch("GET", path)).text();
  }

  /** Yields the events of a stream as [name, data]; an event `error` is thrown. */
  async *stream(path, body, signal) {
    const reply = await this.#fetch("POST", path, { ...body, stream: true }, signal);
    for await (const [name, data] of events(reply.body, signal)) {
      if (name === "error") throw ofEnvelope(0, data, null);
      yield [name, data];
    }
  }

  async #fetch(method, path, body, signal) {
    const headers = { Accept: "application/json, text/event-stream", "X-API-Key": this.key };
    if (body !== undefined) headers["Content-Type"] = "application/json";
    let reply;
    try {
      reply = await fetch(path, { method, headers, body: body && JSON.stringify(body), signal, cache: "no-store" });
    } catch (error) {
      throw error.name === "AbortError" ? error : lost();
    }
    if (reply.ok) return reply;
    const seconds = Number(reply.headers.get("retry-after")) || null;
    const error = ofEnvelope(reply.status, await reply.json().catch(() => ({})), seconds);
    if (reply.status === 401) this.onUnauthorized(error);
    throw error;
  }
}

/** An error of either dialect's envelope. */
function ofEnvelope(status, body, retryAfter) {
  const inner = typeof body.error === "object" && body.error ? body.error : body;
  const code = typeof body.error === "string" ? body.error : (inner.code ?? "error");
  return new ApiError(status, code, inner.message ?? `Status ${status}.`, { retryAfter, details: body.details ?? {} });
}

async function* events(stream, signal) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let ended = false;
  try {
    for (;;) {
      const { done, value } = await reader.read();
      ended = done;
      if (done) return;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const found = parsed(block);
        if (found) yield found;
      }
    }
  } catch (error) {
    throw signal?.aborted || error instanceof ApiError ? error : lost();
  } finally {
    if (!ended) reader.cancel().catch(() => {});
  }
}

function parsed(block) {
  let name = "message";
  let data = "";
  for (const line of block.split("\n")) {
    if (line.startsWith("event: ")) name = line.slice(7);
    if (line.startsWith("data: ")) data += line.slice(6);
  }
  return data && [name, JSON.parse(data)];
}
