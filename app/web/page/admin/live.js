/** Live figures: queue, tokens a second, cache hit rate, memory; read every two seconds while they are looked at. */

import { course } from "../charts.js";
import { el } from "../dom.js";
import { bytes, inOneLine, whole } from "../words.js";

const PAUSE_MILLISECONDS = 2000;
const POINTS = 60;

export async function showLive(api, content) {
  const tiles = el("dl", { class: "tiles" });
  const models = el("tbody", {});
  const problem = el("p", { class: "note", role: "status" });
  const names = ["Model", "State", "Device", "Memory", "Running", "Waiting", "Requests"];
  const head = el(
    "tr",
    {},
    names.map((name) => el("th", { scope: "col" }, name)),
  );
  const table = el("table", { class: "list" }, el("thead", {}, head), models);
  const frame = el("div", { class: "wide-table", tabindex: "0", role: "region", "aria-label": "Models" }, table);
  content.replaceChildren(el("h2", {}, "Live"), tiles, frame, problem);
  const past = new Map();
  let before = null;
  let waiting = 0;
  let left = false;
  const draw = async () => {
    try {
      const now = {
        status: await api.get("status"),
        figures: samples(await api.text("metrics")),
        at: performance.now(),
      };
      tiles.replaceChildren(...facts(now, before).map((fact) => tile(fact, past)));
      models.replaceChildren(...now.status.models.map(modelRow));
      problem.textContent = "";
      before = now;
    } catch (error) {
      problem.textContent = inOneLine(error);
    }
    if (!left) waiting = setTimeout(draw, PAUSE_MILLISECONDS);
  };
  await draw();
  return () => {
    left = true;
    clearTimeout(waiting);
  };
}

/** [name, number, in words] of each figure. */
function facts({ status, figures, at }, before) {
  const generated = figures.get("tokens_generated_total") ?? 0;
  const seconds = before ? (at - before.at) / 1000 : 0;
  const rate = before ? Math.max(0, (generated - (before.figures.get("tokens_generated_total") ?? 0)) / seconds) : 0;
  const hits = status.cache?.hits ?? 0;
  const asked = hits + (status.cache?.misses ?? 0);
  const share = asked ? hits / asked : 0;
  const memory = status.models.reduce((total, model) => total + (model.memory_bytes ?? 0), 0);
  const device = status.models.reduce((total, model) => total + (model.device_memory_bytes ?? 0), 0);
  const running = figures.get("requests_running") ?? 0;
  const queued = figures.get("requests_waiting") ?? 0;
  const found = [
    ["Tokens a second", rate, rate.toFixed(1)],
    ["Running requests", running, whole(running)],
    ["Waiting requests", queued, whole(queued)],
    ["Answers from the cache", share, asked ? `${(100 * share).toFixed(0)} % of ${whole(asked)}` : "none yet"],
    ["Memory of the models", memory, bytes(memory)],
    ["Conversations", status.sessions ?? 0, whole(status.sessions ?? 0)],
  ];
  if (device) found.push(["Memory of the GPUs", device, bytes(device)]);
  return found;
}

function tile([name, number, words], past) {
  const numbers = [...(past.get(name) ?? []), number].slice(-POINTS);
  past.set(name, numbers);
  return el("div", {}, el("dt", {}, name), el("dd", {}, words, course(numbers)));
}

function modelRow(model) {
  const cells = [
    model.state,
    model.device ?? "",
    bytes(model.memory_bytes),
    model.running,
    model.waiting,
    model.requests,
  ];
  return el(
    "tr",
    {},
    el("th", { scope: "row" }, model.name),
    cells.map((cell) => el("td", {}, String(cell))),
  );
}

/** The sum of each metric over its labels. */
function samples(text) {
  const sums = new Map();
  for (const line of text.split("\n")) {
    const found = /^(\w+)(?:\{[^}]*\})? (\S+)$/.exec(line);
    if (found) sums.set(found[1], (sums.get(found[1]) ?? 0) + Number(found[2]));
  }
  return sums;
}
