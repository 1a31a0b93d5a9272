// Elements, requests, the state of the runs, and the choice of the page by the address after `#`.
"use strict";

const RUN_COLORS = ["#1f5f8b", "#c8553d"];
const PAGES = {}; // name -> function(main, parameters), filled by the other files
const runs = []; // {name, path, stages, rows, dumps, offset, file, damaged, age}
const embedded = document.getElementById("answers"); // of an export
const answers = embedded ? JSON.parse(embedded.textContent) : null;

function set(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") node.addEventListener(name, value);
    else if (name === "style") Object.assign(node.style, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}
// Text becomes text nodes only: nothing of a response is ever read as HTML.
const el = (tag, attributes, ...children) => set(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) =>
  set(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

// Control characters as pictures, and those that change the direction of text by their number.
function visible(text) {
  return text
    .replace(/[\u0000-\u0008\u000b-\u001f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0)))
    .replace(/[\u007f-\u009f\u200e\u200f\u202a-\u202e\u2066-\u2069]/g, (c) => `⟨${c.charCodeAt(0).toString(16)}⟩`);
}

function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e6) return String(value);
  return size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(2) : value.toFixed(digits);
}

async function api(path, parameters) {
  if (answers) return embeddedAnswer(path, parameters);
  const known = Object.entries(parameters).filter(([, value]) => value !== "" && value !== null && value !== undefined);
  const response = await fetch(`api/${path}?${new URLSearchParams(known)}`);
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

function embeddedAnswer(path, p) {
  if (path === "runs") return answers.runs;
  const place = `${p.run}/${p.kind}/${p.stage}/${p.step}`;
  if (path === "sample") return answers[`sample/${place}/${p.line}`];
  if (path !== "rows") return answers[`${path}/${p.run}`];
  const within = (value, low, high) =>
    (!low && !high) || (value !== null && (!low || value >= Number(low)) && (!high || value <= Number(high)));
  const text = (p.text || "").toLowerCase();
  const found = answers[`rows/${place}`].filter((row) =>
    row.line >= (p.start || 0) && (!p.verdict || row.verdict === p.verdict) && (!p.question || row.digest === p.question) &&
    within(row.length, p.min_length, p.max_length) && within(row.entropy, p.min_entropy, p.max_entropy) &&
    (!text || (row.response + row.question).toLowerCase().includes(text)));
  const next = found.length > p.count ? found[p.count].line : null;
  return { rows: found.slice(0, p.count), next, complete: true, damaged: 0 };
}

async function refresh(run) {
  const old = run.rows.length + run.dumps.length;
  for (let more = true; more; ) {
    const answer = await api("metrics", { run: run.index, offset: run.offset, file: run.file });
    if (answer.reset) Object.assign(run, { rows: [], damaged: 0 });
    run.rows.push(...answer.rows);
    run.damaged += answer.damaged;
    Object.assign(run, { offset: answer.offset, file: answer.file, age: answer.age });
    more = answer.more;
    if (answer.reset) run.changed = true;
  }
  run.dumps = await api("dumps", { run: run.index });
  const changed = run.changed || run.rows.length + run.dumps.length !== old;
  run.changed = false;
  return changed;
}

const stagesOf = (run) => [
  ...new Set([...run.stages.map((s) => s.name), ...run.rows.map((r) => r.stage), ...run.dumps.map((d) => d.stage)]),
];
const link = (page, parameters) => `#${page}?${new URLSearchParams(parameters)}`;
const parameters = () => Object.fromEntries(new URLSearchParams(location.hash.split("?")[1] || ""));
const pageName = () => (location.hash.slice(1).split("?")[0] in PAGES ? location.hash.slice(1).split("?")[0] : "curves");

function drawHeader() {
  const tab = (name, title) =>
    el("a", { href: `#${name}`, class: pageName() === name ? "tab active" : "tab" }, title);
  document.getElementById("header").replaceChildren(
    el("nav", {}, tab("curves", "Curves"), tab("rollouts", "Rollouts")),
    ...runs.map((run) => {
      const live = run.age !== null && run.age < 60;
      const last = run.rows[run.rows.length - 1];
      return el("span", { class: "run", title: run.path },
        el("span", { class: "dot", style: { background: RUN_COLORS[run.index] } }), visible(run.name),
        el("span", { class: "dim" }, last ? ` ${last.stage}, step ${last.step}` : " no step yet",
          live ? ", live" : "", run.damaged ? `, ${run.damaged} damaged lines skipped` : ""));
    }),
  );
}

let shown = 0; // guards against answers that arrive after the page has changed
async function show() {
  const main = document.getElementById("main"), turn = ++shown;
  drawHeader();
  try {
    const content = await PAGES[pageName()](parameters());
    if (turn === shown) main.replaceChildren(...content);
  } catch (error) {
    if (turn === shown) main.replaceChildren(el("p", { class: "error" }, visible(error.message)));
  }
}

async function start() {
  const found = await api("runs", {});
  found.forEach((info, index) =>
    runs.push({ ...info, index, rows: [], dumps: [], offset: 0, file: 0, damaged: 0, age: null }));
  await Promise.all(runs.map(refresh));
  addEventListener("hashchange", () => { scrollTo(0, 0); show(); });
  await show();
  document.body.dataset.ready = "yes";
  if (!answers) setInterval(poll, 3000);
}

let polling = false;
async function poll() {
  if (polling || document.hidden) return;
  polling = true;
  try {
    const changed = await Promise.all(runs.map(refresh));
    document.body.classList.remove("lost");
    if (changed.includes(true) && runs.some((run) => !run.stages.length)) {
      (await api("runs", {})).forEach((info, index) => Object.assign(runs[index], info));
    }
    drawHeader();
    const typing = document.activeElement && ["INPUT", "SELECT"].includes(document.activeElement.tagName);
    const reading = pageName() === "sample" || (pageName() === "rollouts" && scrollY > 80);
    if (changed.includes(true) && !reading && !typing) await show();
  } catch {
    document.body.classList.add("lost"); // the server has stopped; the style says so
  }
  polling = false;
}

addEventListener("DOMContentLoaded", start);
if (answers) setTimeout(start);
