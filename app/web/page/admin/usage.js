/** Usage of a key in a month: by day and by model. */

import { bars, lines } from "../charts.js";
import { el } from "../dom.js";
import { labelled } from "../settings.js";
import { whole } from "../words.js";

const PAGE = 200;

export async function showUsage(api, content) {
  const keys = await allKeys(api);
  const own = await api.get("v1/usage");
  const key = el(
    "select",
    {},
    keys.map((each) => el("option", { value: each.id }, `${each.id} …${each.last_four} (${each.role})`)),
  );
  if (!keys.some((each) => each.id === own.key_id))
    key.prepend(el("option", { value: own.key_id }, `${own.key_id} (this one)`));
  key.value = own.key_id;
  const month = el("input", { type: "month", value: own.month, max: own.month, required: true });
  const shown = el("div", {});
  const draw = async () => {
    const query = `key=${encodeURIComponent(key.value)}&month=${month.value}`;
    const report = key.value === own.key_id && month.value === own.month ? own : await api.get(`v1/usage?${query}`);
    shown.replaceChildren(...parts(report));
  };
  key.addEventListener("change", draw);
  month.addEventListener("change", () => month.value && draw());
  content.replaceChildren(
    el("h2", {}, "Usage"),
    el("div", { class: "row choices" }, labelled("Key", "", key), labelled("Month", "", month)),
    shown,
  );
  await draw();
}

async function allKeys(api) {
  const keys = [];
  let after = "";
  do {
    const page = await api.get(`v1/keys?limit=${PAGE}${after}`);
    keys.push(...page.keys);
    after = page.next && `&after=${encodeURIComponent(page.next)}`;
  } while (after);
  return keys;
}

function parts(report) {
  const used = report.limit ? `${whole(report.used)} of ${whole(report.limit)}` : whole(report.used);
  const sum = (name) => report.by_day.reduce((total, day) => total + day[name], 0);
  const facts = [
    ["Tokens of the quota", used],
    ["Requests", whole(sum("requests"))],
    ["Prompt tokens", whole(sum("prompt_tokens"))],
    ["Completion tokens", whole(sum("completion_tokens"))],
  ];
  const tiles = el(
    "dl",
    { class: "tiles" },
    facts.map(([name, figure]) => el("div", {}, el("dt", {}, name), el("dd", {}, figure))),
  );
  if (!report.by_day.length) return [tiles, el("p", { class: "note" }, "Nothing was used in this month.")];
  const total = (row) => row.prompt_tokens + row.completion_tokens;
  const days = everyDay(report.month).map((day) => [
    String(Number(day.slice(8))),
    report.by_day.find((each) => each.day === day),
  ]);
  return [
    tiles,
    bars(
      `Tokens by day of ${report.month}, UTC`,
      days.map(([label, row]) => [label, row ? total(row) : 0]),
    ),
    lines(
      "Tokens by model",
      report.by_model.map((row) => [row.model ?? "no model", total(row)]),
    ),
  ];
}

function everyDay(month) {
  const [year, number] = month.split("-").map(Number);
  const last = new Date(Date.UTC(year, number, 0)).getUTCDate();
  return Array.from({ length: last }, (_, index) => `${month}-${String(index + 1).padStart(2, "0")}`);
}
