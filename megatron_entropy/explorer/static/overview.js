// The page of curves: stages, and any metric against the step.
"use strict";

const FIRST = [
  ["Accuracy", ["eval/accuracy", "reward/accuracy"]],
  ["Token entropy (nats)", ["eval/entropy", "policy/entropy"]],
  ["Response length (tokens)", ["eval/length", "rollout/length"]],
  ["Reward", ["reward/mean"]],
  ["Loss", ["train/loss"]],
  ["KL of engine and trainer (nats)", ["policy/rollout_kl"]],
];
const chosen = new Set(); // further metrics that the reader has ticked

function metricPlot(title, names, stage) {
  const series = [];
  for (const run of runs) {
    names.forEach((name, i) => {
      const points = run.rows.filter((r) => r.stage === stage && typeof r[name] === "number").map((r) => [r.step, r[name]]);
      const label = (runs.length > 1 ? `${run.name}: ` : "") + name;
      const color = runs.length > 1 ? RUN_COLORS[run.index] : ["#1f5f8b", "#c8553d"][i];
      if (points.length) series.push({ label: visible(label), color, points, dashed: runs.length > 1 && i > 0 });
    });
  }
  return series.length ? curves(title, series) : null;
}

function stageTable(stages, stage) {
  const last = (rows, name) => [...rows].reverse().map((r) => r[name]).find((v) => typeof v === "number");
  const change = (rows, name) => {
    const values = rows.map((r) => r[name]).filter((v) => typeof v === "number");
    return values.length ? [...new Set([values[0], values[values.length - 1]])].map((v) => number(v)).join(" → ") : "–";
  };
  const lines = stages.flatMap((name) => runs.map((run) => {
    const rows = run.rows.filter((r) => r.stage === name), settings = run.stages.find((s) => s.name === name);
    const done = rows.length ? rows[rows.length - 1].step : 0;
    return el("tr", { class: name === stage ? "active" : null },
      el("td", {}, runs.length > 1 ? el("span", { class: "dot", style: { background: RUN_COLORS[run.index] } }) : null,
        el("a", { href: link("curves", { stage: name }) }, visible(name))),
      el("td", {}, settings ? visible(settings.method) : "–"),
      el("td", {}, `${done}${settings && settings.steps ? ` of ${settings.steps}` : ""}`),
      el("td", {}, change(rows, "eval/accuracy")), el("td", {}, change(rows, "eval/entropy")),
      el("td", {}, number(last(rows, "timing/step"), 1)));
  }));
  return el("div", { class: "box" }, el("table", { class: "stages" },
    el("thead", {}, el("tr", {}, ["stage", "method", "step", "eval accuracy", "eval entropy", "s/step"].map((h) => el("th", {}, h)))),
    el("tbody", {}, lines)));
}

PAGES.curves = (p) => {
  const stages = [...new Set(runs.flatMap(stagesOf))];
  if (!runs.some((run) => run.rows.length)) return [el("p", { class: "dim" }, "No step is logged yet; this page follows the run.")];
  const stage = stages.includes(p.stage) ? p.stage : runs[0].rows.length ? runs[0].rows[runs[0].rows.length - 1].stage : stages[0];
  const names = [...new Set(runs.flatMap((run) => run.rows.filter((r) => r.stage === stage).flatMap(Object.keys)))]
    .filter((name) => !["stage", "step"].includes(name)).sort();
  const plots = el("div", { class: "plots" });
  const draw = () => plots.replaceChildren(...[...FIRST, ...[...chosen].sort().map((n) => [n, [n]])]
    .map(([title, list]) => metricPlot(title, list, stage)).filter(Boolean));
  const areas = [...new Set(names.map((name) => name.split("/")[0]))];
  const picker = el("details", { class: "picker", open: chosen.size > 0 }, el("summary", {}, `All ${names.length} metrics`),
    areas.map((area) => el("fieldset", {}, el("legend", {}, area), names.filter((n) => n.split("/")[0] === area).map((name) =>
      el("label", {}, el("input", { type: "checkbox", checked: chosen.has(name), change: (event) => {
        if (event.target.checked) chosen.add(name); else chosen.delete(name);
        draw();
      } }), visible(name.slice(area.length + 1)))))));
  draw();
  return [stageTable(stages, stage), el("h2", {}, `Stage ${visible(stage)}`), plots, picker];
};
