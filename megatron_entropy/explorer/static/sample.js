// The page of one response: its tokens, and what decided about it.
"use strict";

const TOKEN_COLORS = { // name -> [title, color of a token]
  entropy: ["entropy (white 0, full from 2 nats)", (t) => shade("240,140,40", (t.entropy ?? 0) / 2)],
  difference: ["|log-prob of engine − trainer| (full from 0.1 nats)", (t) => shade("123,79,142", Math.abs(t.difference ?? 0) / 0.1)],
  probability: ["surprise −log p of the trainer (full from 4 nats)", (t) => shade("31,95,139", -(t.logprob ?? 0) / 4)],
  advantage: ["advantage (green raised, red lowered)", (t) => shade(t.advantage > 0 ? "79,121,66" : "200,85,61", Math.abs(t.advantage ?? 0) / 2)],
  penalty: ["KL penalty weight (full at the largest)", (t) => shade("160,40,120", t.penaltyPart ?? 0)],
};
let tokenColor = "entropy";

const shade = (rgb, part) => `rgba(${rgb},${Math.min(Math.max(part, 0), 1) ** 0.6})`;

// One record a token from the lists of a response.
function tokenRecords(lists, sample) {
  const top = Math.max(0, ...(lists.kl_weights || []).map((v) => v ?? 0));
  const untrained = new Set(lists.untrained || []);
  return lists.texts.map((text, i) => {
    const at = (name) => (lists[name] ? lists[name][i] : null);
    const [logprob, engine, reference] = [at("logprobs"), at("rollout_logprobs"), at("reference_logprobs")];
    const penalty = at("kl_weights") ?? sample.kl_weight;
    const log_ratio = reference === null || logprob === null ? null : reference - logprob;
    return { text, entropy: at("entropies"), logprob, engine, penalty, penaltyPart: top ? (at("kl_weights") ?? 0) / top : null,
      difference: logprob === null || engine === null ? null : engine - logprob, advantage: at("advantages") ?? sample.advantage, alternatives: at("alternatives"),
      kl: log_ratio === null ? null : Math.exp(log_ratio) - log_ratio - 1, untrained: untrained.has(i) };
  });
}

function tokenFacts(token, i, teca, decision) {
  const p = (v) => (v === null ? "–" : `${number(v, 4)} (p ${Math.exp(v).toFixed(3)})`);
  const pairs = [["token", `${i + 1}: ${JSON.stringify(visible(token.text))}`], ["entropy", `${number(token.entropy)} nats`],
    ["TECA so far", `${number(teca)} nats`], ["log-prob, engine", p(token.engine)], ["log-prob, trainer", p(token.logprob)],
    ["difference", number(token.difference, 6)], ["advantage", number(token.advantage)]];
  if (token.penalty) pairs.push(["KL penalty", `weight ${number(token.penalty, 4)}${token.kl === null ? "" : ` × k3 ${number(token.kl, 5)} = ${number(token.penalty * token.kl, 6)}`}`]);
  if (token.untrained) pairs.push(["training", "no weight in the loss"]);
  if (token.alternatives) pairs.push(["most probable", token.alternatives.map(([text, logprob]) => `${Math.exp(logprob).toFixed(3)} ${JSON.stringify(visible(text))}`).join("\n")]);
  if (decision) pairs.push(["decision", decision]);
  return pairs.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]);
}

function tokenView(sample) {
  const prefix = sample.prefix ? tokenRecords({ ...sample.prefix, untrained: [] }, { kl_weight: null, advantage: null }) : [];
  const own = tokenRecords(sample.tokens, sample), tokens = [...prefix, ...own];
  const children = sample.members.filter((m) => m.parent === sample.sample && m.cut_token);
  const cuts = new Map(); // position in `tokens` -> what was decided there
  if (prefix.length) cuts.set(prefix.length, `sampled again here; response ${sample.parent} has ${JSON.stringify(visible(sample.members.find((m) => m.sample === sample.sample).cut_token?.text ?? "?"))}`);
  for (const child of children) {
    const says = `${JSON.stringify(visible(child.first))} p ${child.first_logprob === null ? "?" : Math.exp(child.first_logprob).toFixed(3)} → ${child.verdict}, reward ${number(child.reward)}`;
    cuts.set(child.cut, `${cuts.get(child.cut) ?? "cut here; sampled again:"}\n${says}`);
  }
  const facts = el("dl", { class: "tokenfacts" }, el("dt", {}, "Point at a token"), el("dd", {}, "or at the plot, for its numbers"));
  const spans = tokens.map((t, i) => el("span", { "data-i": i, title: null,
    class: ["t", i < prefix.length ? "prefix" : "", cuts.has(i) ? "cut" : "", i >= prefix.length && t.untrained ? "untrained" : "", t.penaltyPart ? "penalized" : ""].filter(Boolean).join(" ") },
    visible(t.text) === "" ? "∅" : visible(t.text).replace(/\n/g, "⏎\n")));
  const text = el("div", { class: "tokens" }, spans);
  const plot = tokens.some((t) => t.entropy !== null) ? entropyPlot(tokens.map((t) => t.entropy), [...cuts.keys()].map((position) => ({ position, label: "cut" })), (i) => point(i)) : null;
  let pointed = null;
  function point(i) {
    if (pointed !== null) spans[pointed].classList.remove("on");
    spans[(pointed = i)].classList.add("on");
    if (plot) plot.mark(i);
    facts.replaceChildren(...tokenFacts(tokens[i], i, plot ? plot.teca[i] : null, cuts.get(i)));
  }
  const onToken = (event) => { const i = event.target.dataset?.i; if (i !== undefined) point(Number(i)); };
  text.addEventListener("pointerover", onToken);
  text.addEventListener("click", onToken);
  const paint = () => spans.forEach((span, i) => { span.style.backgroundColor = TOKEN_COLORS[tokenColor][1](tokens[i]); });
  paint();
  if (cuts.size) setTimeout(() => { text.scrollTop = spans[[...cuts.keys()][0]].offsetTop - text.offsetTop - 80; });
  const usable = { entropy: "entropy", difference: "difference", probability: "logprob", advantage: "advantage", penalty: "penaltyPart" };
  const picker = el("label", { class: "picker" }, "colour: ", el("select", { class: "colour", change: (e) => { tokenColor = e.target.value; paint(); } },
    Object.entries(TOKEN_COLORS).filter(([name]) => tokens.some((t) => t[usable[name]] !== null && t[usable[name]] !== undefined))
      .map(([name, [title]]) => el("option", { value: name, selected: name === tokenColor }, title))));
  return [el("h2", {}, "Response"), picker, el("div", { class: "beside" },
    el("div", {}, text, el("p", { class: "dim small" }, prefix.length ? `Grey: the first ${prefix.length} tokens are those of response ${sample.parent}. ` : "", cuts.size ? "Red bar: a cut. " : "",
      own.some((t) => t.penaltyPart) ? "Underlined: a KL penalty. " : "", own.some((t) => t.untrained) ? "Struck out: no weight in the loss." : "")),
    el("div", { class: "side" }, plot ? [plot.node, el("p", { class: "dim small" }, "Bars: entropy of a token in nats. Line: TECA, their running mean.")] : null, facts))];
}

function rewardView(sample) {
  const parts = sample.parts.filter(([, value]) => value || sample.parts.length === 1);
  if (!parts.length) return null;
  const top = Math.max(...parts.map(([, value]) => Math.abs(value)), 1e-9);
  return el("div", { class: "parts" }, parts.map(([name, value]) => el("div", {},
    el("span", { class: "meter" }, el("i", { class: value < 0 ? "minus" : "plus", style: { width: `${(Math.abs(value) / top) * 100}%` } })),
    el("b", {}, number(value)), ` ${visible(name)}`)),
    parts.length > 1 ? el("div", {}, el("span", { class: "meter" }), el("b", {}, number(sample.reward)), " reward") : null);
}

function clusterView(sample) {
  const { entropy, answers } = sample.clusters, total = sample.members.length;
  return [el("h2", {}, "Answers of the group"),
    el("p", {}, `${answers.length} different answers of ${total}: semantic entropy ${number(entropy)} nats`,
      sample.semantic_entropy === null ? "." : `; ${number(sample.semantic_entropy)} nats recorded for the question before training.`),
    el("div", { class: "parts" }, answers.slice(0, 12).map((a) => el("div", {},
      el("span", { class: "meter" }, el("i", { class: a.correct === true ? "plus" : a.correct === false ? "minus" : "", style: { width: `${(a.count / total) * 100}%` } })),
      el("b", {}, a.count), " ", a.text === null ? el("i", {}, "not readable") : visible(a.text).slice(0, 80))))];
}

// The same question in another run, at the dump nearest to this one.
async function otherRun(sample, p) {
  const other = runs.find((run) => run.index !== Number(p.run));
  if (!other) return null;
  const dumps = other.dumps.filter((d) => d.kind === p.kind).sort((a, b) =>
    (b.stage === p.stage) - (a.stage === p.stage) || Math.abs(a.step - p.step) - Math.abs(b.step - p.step));
  for (const dump of dumps.slice(0, 12)) {
    const page = await loadRows(other, dump, { question: sample.digest }, 0);
    if (page.rows.length) {
      return [el("h2", {}, el("span", { class: "dot", style: { background: RUN_COLORS[other.index] } }), `The same question in ${visible(other.name)}, ${dump.stage}, step ${dump.step}`),
        page.rows.slice(0, 8).map((row) => rowCard(other, dump, row))];
    }
  }
  return [el("p", { class: "dim" }, `${visible(other.name)} did not sample this question at the nearest 12 dumps.`)];
}

PAGES.sample = async (p) => {
  const run = runs[Number(p.run)];
  const place = { kind: p.kind, stage: p.stage, step: Number(p.step) };
  const sample = await api("sample", { run: p.run, ...place, line: p.line });
  if (!sample) throw new Error("this response is not in the export");
  const href = (member) => link("sample", { run: p.run, ...place, line: member.line });
  return [
    el("p", { class: "crumbs" }, el("a", { href: link("rollouts", { [`dump${run.index}`]: `${p.kind}/${p.stage}/${p.step}` }) },
      visible(`${run.name}: ${p.stage}, ${p.kind}, step ${p.step}`)), ` › prompt ${sample.prompt ?? "?"}, response ${sample.sample}`),
    el("div", { class: "questionbox" }, visible(sample.question.trimEnd())),
    el("p", {}, chip(sample.verdict), ` expected `, el("b", {}, visible(sample.answer ?? "–")), ", found ", el("b", {}, visible(sample.extracted ?? "–")),
      ` · ${sample.length ?? "?"} tokens · ${sample.finish_reason ?? "?"} · mean entropy ${number(sample.entropy)} nats`),
    sample.sentences.length ? el("ul", { class: "why" }, sample.sentences.map((s) => el("li", {}, visible(s)))) : null,
    rewardView(sample),
    ...tokenView(sample),
    el("h2", {}, "Group"), el("div", { class: "box" }, groupTree(sample.members, sample.sample, href)),
    ...clusterView(sample),
    ...((await otherRun(sample, p)) || []).flat(),
  ].filter(Boolean);
};
