// Plots in SVG: curves over steps, the entropies of a response, the tree of a group.
"use strict";

function ticks(low, high, count = 4) {
  const rough = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-9; value += step) found.push(value);
  return found;
}

const isNarrow = () => innerWidth < 700; // a phone: plots of this many units keep their text readable
const short = (value) => (Math.abs(value) >= 1e4 || (value && Math.abs(value) < 1e-3) ? value.toExponential(0)
  : String(Number(value.toPrecision(4))));
const path = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");

// series: [{label, color, points: [[step, value], ...], dashed}]
function curves(title, series) {
  const W = 380, H = 200, L = 48, R = 10, T = 10, B = 24;
  const points = series.flatMap((s) => s.points);
  let [x0, x1] = [Math.min(...points.map((p) => p[0])), Math.max(...points.map((p) => p[0]))];
  let [y0, y1] = [Math.min(...points.map((p) => p[1])), Math.max(...points.map((p) => p[1]))];
  if (x0 === x1) x1 = x0 + 1;
  const margin = (y1 - y0) * 0.06 || Math.abs(y1) * 0.1 || 1;
  [y0, y1] = [y0 - margin, y1 + margin];
  const x = (v) => L + ((v - x0) / (x1 - x0)) * (W - L - R), y = (v) => H - B - ((v - y0) / (y1 - y0)) * (H - T - B);
  const readout = el("span", { class: "readout" });
  const cursor = svg("line", { class: "cursor", y1: T, y2: H - B, x1: -9, x2: -9 });
  const move = (event) => {
    const box = event.currentTarget.getBoundingClientRect();
    const at = x0 + ((((event.clientX - box.left) / box.width) * W - L) / (W - L - R)) * (x1 - x0);
    const near = series.map((s) => s.points.reduce((a, b) => (Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a)));
    cursor.setAttribute("x1", x(near[0][0]));
    cursor.setAttribute("x2", x(near[0][0]));
    readout.textContent = `step ${near[0][0]}: ${near.map((p) => number(p[1], 4)).join(" | ")}`;
  };
  return el("figure", { class: "plot" },
    el("figcaption", {}, el("b", {}, title), readout),
    svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": title, pointermove: move,
      pointerleave: () => { readout.textContent = ""; cursor.setAttribute("x1", -9); cursor.setAttribute("x2", -9); } },
      ticks(y0, y1).map((v) => [svg("line", { class: "grid", x1: L, x2: W - R, y1: y(v), y2: y(v) }),
        svg("text", { x: L - 5, y: y(v) + 3.5, "text-anchor": "end" }, short(v))]),
      ticks(x0, x1).filter(Number.isInteger).map((v) => svg("text", { x: x(v), y: H - 7, "text-anchor": "middle" }, short(v))),
      cursor,
      series.map((s) => {
        const line = s.points.map((p) => [x(p[0]), y(p[1])]);
        return [svg("path", { d: path(line), fill: "none", stroke: s.color, "stroke-width": 1.6, "stroke-dasharray": s.dashed ? "4 3" : null }),
          s.points.length < 30 ? line.map(([cx, cy]) => svg("circle", { cx, cy, r: 2.2, fill: s.color })) : null];
      })),
    el("div", { class: "legend" }, series.map((s) =>
      el("span", {}, el("i", { class: s.dashed ? "key dashed" : "key", style: { borderColor: s.color } }), s.label))));
}

// Entropy of every token as a bar, their running mean (TECA) as a line; marks: [{position, label}].
function entropyPlot(entropies, marks, choose) {
  const W = isNarrow() ? 380 : 700, H = 150, L = 36, R = 14, T = 16, B = 20, n = entropies.length;
  const top = Math.max(0.1, ...entropies.map((v) => v ?? 0)) * 1.05;
  const x = (i) => L + (i / n) * (W - L - R), y = (v) => H - B - (v / top) * (H - T - B);
  let sum = 0;
  const teca = entropies.map((value, i) => { sum += value ?? 0; return sum / (i + 1); });
  const bars = entropies.map((v, i) => `M${x(i + 0.5).toFixed(1)} ${y(0)}V${y(v ?? 0).toFixed(1)}`).join("");
  const cursor = svg("line", { class: "cursor", y1: T, y2: H - B, x1: -9, x2: -9 });
  const at = (event) => {
    const box = event.currentTarget.getBoundingClientRect();
    const i = Math.floor(((((event.clientX - box.left) / box.width) * W - L) / (W - L - R)) * n);
    if (i >= 0 && i < n) choose(i);
  };
  const node = svg("svg", { viewBox: `0 0 ${W} ${H}`, class: "teca", role: "img", "aria-label": "entropy and TECA by token", pointermove: at, click: at },
    ticks(0, top, 3).map((v) => [svg("line", { class: "grid", x1: L, x2: W - R, y1: y(v), y2: y(v) }),
      svg("text", { x: L - 4, y: y(v) + 3.5, "text-anchor": "end" }, short(v))]),
    ticks(0, n, 6).filter(Number.isInteger).map((v) => svg("text", { x: x(v), y: H - 5, "text-anchor": "middle" }, v)),
    svg("path", { d: bars, stroke: "#f0a860", "stroke-width": Math.max(0.6, Math.min(10, ((W - L - R) / n) * 0.7)) }),
    svg("path", { d: path(teca.map((v, i) => [x(i + 0.5), y(v)])), fill: "none", stroke: "#1f5f8b", "stroke-width": 1.8 }),
    marks.map((m) => [svg("line", { class: "cutline", x1: x(m.position), x2: x(m.position), y1: T, y2: H - B }),
      svg("text", { x: x(m.position), y: T - 4, "text-anchor": m.position > n * 0.8 ? "end" : "start", class: "cuttext" }, m.label)]),
    cursor);
  return { node, teca, mark: (i) => { cursor.setAttribute("x1", x(i + 0.5)); cursor.setAttribute("x2", x(i + 0.5)); } };
}

// The responses of a group as bars over their tokens; a branch starts where its parent was cut.
function groupTree(members, current, href) {
  const rows = [];
  for (const root of members.filter((m) => m.parent === null || !members.some((o) => o.sample === m.parent))) {
    rows.push(root, ...members.filter((m) => m.parent === root.sample && m !== root));
  }
  const start = (m) => (m.parent === null ? 0 : m.cut ?? 0), end = (m) => start(m) + Math.max(m.length ?? 1, 1);
  const narrow = isNarrow(), W = narrow ? 380 : 700, L = 30, R = narrow ? 160 : 250, RH = 19, H = rows.length * RH + 26, longest = Math.max(...rows.map(end));
  const x = (tokens) => L + (tokens / longest) * (W - L - R);
  const [rewardAt, advantageAt, answerAt] = narrow ? [8, 50, 112] : [12, 66, 140];
  const place = new Map(rows.map((m, i) => [m.sample, 22 + i * RH]));
  return svg("svg", { viewBox: `0 0 ${W} ${H}`, class: "tree", role: "img", "aria-label": "responses of the group" },
    svg("text", { x: x(0), y: 10 }, "0"), svg("text", { x: x(longest), y: 10, "text-anchor": "end" }, `${longest} tokens`),
    svg("text", { x: W - R + rewardAt, y: 10 }, "reward"), svg("text", { x: W - R + advantageAt, y: 10 }, "advantage"), svg("text", { x: W - R + answerAt, y: 10 }, "answer"),
    rows.map((m) => {
      const top = place.get(m.sample), parent = place.get(m.parent), color = { right: "#4f7942", wrong: "#c8553d", error: "#999" }[m.verdict];
      return svg("a", { href: href(m), class: m.sample === current ? "member current" : "member" },
        svg("rect", { x: 0, y: top - RH / 2, width: W, height: RH, class: "hit" }),
        parent !== undefined && m.parent !== null ? svg("path", { d: `M${x(start(m))} ${parent}V${top}`, class: "branchline" }) : null,
        svg("text", { x: 4, y: top + 4 }, `${m.parent === null ? "" : "↳"}${m.sample}`),
        svg("rect", { x: x(start(m)), y: top - 5, width: Math.max(2, x(end(m)) - x(start(m))), height: 10, rx: 2, fill: color, opacity: m.trained === false ? 0.35 : 1 }),
        svg("title", {}, `response ${m.sample}: ${m.verdict}, ${m.length} tokens${m.cut_token ? `, begins with ${JSON.stringify(visible(m.first))}` : ""}`),
        svg("text", { x: W - R + rewardAt, y: top + 4 }, number(m.reward)),
        svg("text", { x: W - R + advantageAt, y: top + 4 }, m.advantage === null ? "–" : (m.advantage > 0 ? "+" : "") + number(m.advantage)),
        svg("text", { x: W - R + answerAt, y: top + 4 }, visible(m.extracted ?? "–").slice(0, narrow ? 7 : 16)));
    }));
}
