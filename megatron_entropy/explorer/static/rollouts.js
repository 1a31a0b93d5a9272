// The page of rollouts: of one run, or of two side by side, the responses of a dump with filters.
"use strict";

const PAGE_SIZE = 40;
const FILTERS = ["verdict", "min_length", "max_length", "min_entropy", "max_entropy", "text", "question"];

const dumpName = (dump) => `${dump.kind}/${dump.stage}/${dump.step}`;

// The dump a column shows: the chosen one, or the newest of its stage and kind; `auto` follows a live run.
function chosenDump(run, wanted) {
  const exact = run.dumps.find((d) => dumpName(d) === wanted);
  if (exact) return exact;
  const [kind, stage, step] = (wanted || "").split("/");
  const score = (d) => [d.stage === stage, d.kind === kind, -Math.abs(d.step - Number(step || 1e12)), d.kind === "train"];
  const better = (a, b) => {
    const [left, right] = [score(a), score(b)], i = left.findIndex((v, k) => v !== right[k]);
    return i >= 0 && left[i] > right[i];
  };
  const newest = [...run.dumps].filter((d) => !wanted || d.stage === stage || !run.dumps.some((o) => o.stage === stage));
  const last = run.rows.length ? run.rows[run.rows.length - 1].stage : null;
  const pool = wanted ? newest : newest.filter((d) => d.stage === last).length ? newest.filter((d) => d.stage === last) : newest;
  return pool.reduce((best, d) => (!best || better(d, best) ? d : best), null);
}

const chip = (verdict) => el("span", { class: `chip ${verdict}` }, verdict);

function rowCard(run, dump, row) {
  const href = link("sample", { run: run.index, ...dump, line: row.line });
  const facts = [`${row.length ?? "?"} tokens`, row.entropy === null ? null : `${number(row.entropy)} nats`,
    row.reward === null ? null : `reward ${number(row.reward)}`, row.advantage === null ? null : `advantage ${number(row.advantage)}`,
    row.parent === null ? null : `branch of ${row.parent}, cut at ${row.cut}`, row.trained === false ? "left out" : null, row.error];
  return el("a", { class: `card ${row.verdict}`, href },
    el("span", { class: "facts" }, chip(row.verdict), el("b", {}, ` ${visible(row.extracted ?? "–")} `), visible(facts.filter(Boolean).join(" · "))),
    el("span", { class: "response" }, visible(row.response) || el("i", { class: "dim" }, "no text")));
}

// The rows of one page; a request that runs out of time is continued.
async function loadRows(run, dump, filters, start) {
  const found = [];
  let next = start, answer = { damaged: 0, complete: true };
  for (let turn = 0; next !== null && found.length < PAGE_SIZE && turn < 200; turn++) {
    answer = await api("rows", { run: run.index, ...dump, ...filters, start: next, count: PAGE_SIZE - found.length });
    found.push(...answer.rows);
    next = answer.next;
  }
  return { rows: found, next, damaged: answer.damaged };
}

async function column(run, p) {
  const dump = chosenDump(run, p[`dump${run.index}`]);
  const title = runs.length > 1 ? el("h2", {}, el("span", { class: "dot", style: { background: RUN_COLORS[run.index] } }), visible(run.name)) : null;
  if (!dump) return el("section", {}, title, el("p", { class: "dim" }, "No rollouts are written yet (log.rollouts_every)."));
  const go = (changes) => { location.hash = link("rollouts", { ...p, [`start${run.index}`]: "", ...changes }); };
  const kinds = [...new Map(run.dumps.map((d) => [`${d.kind}/${d.stage}`, d])).keys()];
  const steps = run.dumps.filter((d) => d.kind === dump.kind && d.stage === dump.stage), at = steps.indexOf(dump);
  const to = (d) => go({ [`dump${run.index}`]: dumpName(d) });
  const bar = el("div", { class: "bar" },
    el("select", { "aria-label": "stage", class: "stage", change: (e) => to(steps.length && run.dumps.filter((d) => `${d.kind}/${d.stage}` === e.target.value).pop()) },
      kinds.map((k) => el("option", { value: k, selected: k === `${dump.kind}/${dump.stage}` }, visible(`${k.split("/").slice(1).join("/")}, ${k.split("/")[0]}`)))),
    el("button", { type: "button", disabled: at <= 0, "aria-label": "earlier step", click: () => to(steps[at - 1]) }, "‹"),
    el("select", { "aria-label": "step", class: "step", change: (e) => to(steps[Number(e.target.value)]) },
      steps.map((d, i) => el("option", { value: i, selected: i === at }, `step ${d.step}`))),
    el("button", { type: "button", disabled: at >= steps.length - 1, "aria-label": "later step", click: () => to(steps[at + 1]) }, "›"));
  const filters = Object.fromEntries(FILTERS.map((name) => [name, p[name] || ""]));
  const starts = (p[`start${run.index}`] || "0").split(",").map(Number);
  const page = await loadRows(run, dump, filters, starts[starts.length - 1]);
  const cards = [];
  page.rows.forEach((row, i) => {
    if (!i || row.group !== page.rows[i - 1].group) {
      cards.push(el("h3", { class: "question" }, el("span", {}, visible(row.question.trimEnd())), el("span", { class: "dim" }, ` expected ${visible(row.answer ?? "–")} `),
        el("button", { type: "button", class: "only", click: () => go({ question: row.digest, [`dump${run.index}`]: dumpName(dump) }) }, "only this question")));
    }
    cards.push(rowCard(run, dump, row));
  });
  const start = (list) => go({ [`start${run.index}`]: list.join(","), [`dump${run.index}`]: dumpName(dump) });
  return el("section", {}, title, bar,
    page.damaged ? el("p", { class: "warning" }, `${page.damaged} damaged lines are skipped.`) : null,
    cards.length ? cards : el("p", { class: "dim" }, "No response passes the filters."),
    el("div", { class: "bar" },
      el("button", { type: "button", class: "back", disabled: starts.length < 2, click: () => start(starts.slice(0, -1)) }, "Back"),
      el("button", { type: "button", class: "next", disabled: page.next === null, click: () => start([...starts, page.next]) }, "Next")));
}

PAGES.rollouts = async (p) => {
  const clear = { start0: "", start1: "" };
  const apply = (event) => {
    event.preventDefault();
    location.hash = link("rollouts", { ...p, ...clear, ...Object.fromEntries(new FormData(form)) });
  };
  const field = (name, label, type = "number") => el("label", { class: name }, label,
    el("input", { name, type, value: p[name] || "", min: 0, step: "any", size: 6, placeholder: type === "number" ? "any" : "" }));
  const form = el("form", { class: "filters", submit: apply, change: apply },
    el("label", {}, "verdict", el("select", { name: "verdict" }, ["", "right", "wrong", "error"].map((v) => el("option", { value: v, selected: v === (p.verdict || "") }, v || "all")))),
    field("min_length", "tokens from"), field("max_length", "to"), field("min_entropy", "nats from"), field("max_entropy", "to"),
    field("text", "text", "search"),
    p.question ? el("label", {}, "one question", el("button", { type: "button", click: () => { location.hash = link("rollouts", { ...p, ...clear, question: "" }); } }, "show all")) : null);
  return [form, el("div", { class: runs.length > 1 ? "columns" : "" }, await Promise.all(runs.map((run) => column(run, p))))];
};
