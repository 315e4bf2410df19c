// The page: ask, wait, read scores, compare cases. Talks to this server only.
"use strict";

const $ = (id) => document.getElementById(id);
const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};

const page = {
  words: null, language: "en", info: null, viewers: null,
  scan: null, examples: { more: [], less: [] }, result: null, current: 0, finding: null,
};

class Problem extends Error {
  constructor(code, detail) { super(detail); this.code = code; }
}

const word = (key) => page.words[page.language][key] ?? key;
const findingName = (finding) => word("findings")[finding] ?? finding;

async function request(path, body) {
  let response;
  try {
    response = await fetch(path, body === undefined ? {} : {
      method: "POST", body: JSON.stringify(body), headers: { "x-ctclip": "1" },
    });
  } catch {
    throw new Problem("network", "");
  }
  if (response.ok) return response.json();
  const answer = await response.json().catch(() => ({}));
  if (response.status === 401) showLogin();
  throw new Problem(statusCode(response.status, answer.code), answer.detail ?? response.statusText);
}

const statusCode = (status, code) => code ?? { 413: "too-large", 429: "busy" }[status] ?? "failed";

function say(text, isBad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", isBad);
}

function complain(error) {
  if (!(error instanceof Problem)) throw error;
  const known = word("problems")[error.code];
  say([known, error.message].filter(Boolean).join(" — "), true);
}

// Language ------------------------------------------------------------------------------------

function translate() {
  document.documentElement.lang = page.language;
  document.title = word("title");
  for (const element of document.querySelectorAll("[data-word]")) element.textContent = word(element.dataset.word);
  $("text").placeholder = word("text_hint");
  if (!page.info) return;
  $("about").textContent = `${word("model")} ${page.info.model} · ${page.info.size} ${word("volumes")}`;
  fill($("window"), Object.keys(WINDOWS).map((name) => [name, word(name)]));
  fill($("plane"), PLANES.map((name) => [name, word(name)]));
  fill($("heat"), [["", word("off")], ...page.info.findings.map((name, n) => [n, findingName(name)])]);
  buildFilters();
  if (page.result) render();
}

function fill(select, pairs) {
  const before = select.value;
  select.replaceChildren(...pairs.map(([value, textContent]) => make("option", { value, textContent })));
  if (before) select.value = before;
}

// Filters -------------------------------------------------------------------------------------

// What stands for an end that was left open.
const OPEN = { age: [0, 150], date: ["0000-01-01", "9999-12-31"] };

function buildFilters(kept = readFilters()) {
  const rows = [];
  for (const [name, values] of Object.entries(page.info.fields)) {
    const label = make("label", {}, make("span", { textContent: word(name) }), make("br"));
    if (name in OPEN) {
      const type = name === "age" ? "number" : "date";
      for (const end of [0, 1]) {
        const hint = word(end ? "to" : "from");
        const bound = kept[name]?.[end] ?? "";
        const value = bound === OPEN[name][end] ? "" : bound;
        label.append(make("input", { type, id: `${name}-${end}`, value, placeholder: hint, ariaLabel: `${word(name)} ${hint}` }), " ");
      }
    } else {
      const select = make("select", { id: `field-${name}` });
      fill(select, [["", word("any")], ...values.map((value) => [value, value])]);
      select.value = (Array.isArray(kept[name]) ? kept[name][0] : kept[name]) ?? "";
      label.append(select);
    }
    rows.push(label);
  }
  $("fields").replaceChildren(...rows);
  $("conditions").replaceChildren(...page.info.findings.map((finding, number) => {
    const select = make("select", { id: `condition-${number}` });
    fill(select, ["", "present", "absent", "unknown"].map((value) => [value, word(value || "any")]));
    select.value = ["present", "absent", "unknown"].find((state) => kept[state]?.includes(finding)) ?? "";
    return make("label", {}, make("span", { textContent: findingName(finding) }), select);
  }));
}

function readFilters() {
  const where = {};
  for (const name of Object.keys(page.info.fields)) {
    if (name in OPEN) {
      const bounds = [0, 1].map((end) => $(`${name}-${end}`)?.value || OPEN[name][end]);
      if (bounds.some((bound, end) => bound !== OPEN[name][end])) {
        where[name] = name === "age" ? bounds.map(Number) : bounds;
      }
    } else {
      const value = $(`field-${name}`)?.value;
      if (value) where[name] = name === "sex" ? value : [value];
    }
  }
  page.info.findings.forEach((finding, number) => {
    const state = $(`condition-${number}`)?.value;
    if (state) (where[state] ??= []).push(finding);
  });
  return where;
}

// Asking --------------------------------------------------------------------------------------

function upload(file) {
  return new Promise((resolve, reject) => {
    const transfer = new XMLHttpRequest();
    transfer.open("POST", "/api/scans");
    transfer.setRequestHeader("x-ctclip", "1");
    transfer.upload.onprogress = (event) => {
      $("progress").value = event.loaded / event.total;
      say(`${word("uploading")} ${Math.round((100 * event.loaded) / event.total)} %`);
    };
    transfer.onload = () => {
      const answer = JSON.parse(transfer.responseText || "{}");
      if (transfer.status === 200) resolve(answer.job);
      else reject(new Problem(statusCode(transfer.status, answer.code), answer.detail));
    };
    transfer.onerror = () => reject(new Problem("network", ""));
    transfer.send(file);
  });
}

async function analyse(file) {
  page.scan = null;
  $("study").value = "";
  $("chosen").textContent = file.name;
  $("progress").hidden = false;
  try {
    const job = await upload(file);
    $("progress").removeAttribute("value");
    for (;;) {
      const { state, scan, code, detail } = await request(`/api/scans/${job}`);
      if (state === "failed") throw new Problem(code, detail);
      if (state === "done") { page.scan = scan; break; }
      say(word(state));
      await new Promise((wake) => setTimeout(wake, 400));
    }
    await search();
  } catch (error) {
    $("chosen").textContent = "";
    complain(error);
  } finally {
    $("progress").hidden = true;
    $("file").value = "";
  }
}

async function search() {
  const question = {
    where: readFilters(), k: Number($("count").value) || 8,
    per_patient: Number($("per-patient").value) || 1, text_weight: Number($("weight").value),
    more: page.examples.more, less: page.examples.less,
  };
  const study = $("study").value.trim();
  const text = $("text").value.trim();
  if (page.scan) question.scan = page.scan;
  else if (study) question.study = study;
  if (text) question.text = text;
  say(word("searching"));
  $("search").disabled = true;
  try {
    show(await request("/api/search", question));
    say(word("done"));
  } catch (error) {
    complain(error);
  } finally {
    $("search").disabled = false;
  }
}

function example(kind, study) {
  page.examples[kind] = [...new Set([...page.examples[kind], study])];
  renderExamples();
  search();
}

function renderExamples() {
  $("examples").replaceChildren(...["more", "less"].flatMap((kind) => page.examples[kind].map((study) => make("button", {
    type: "button", textContent: `${kind === "more" ? "+" : "−"} ${study} ✕`,
    onclick: () => { page.examples[kind] = page.examples[kind].filter((other) => other !== study); renderExamples(); },
  }))));
}

// Showing -------------------------------------------------------------------------------------

function show(result) {
  page.result = result;
  page.current = 0;
  page.finding = null;
  history.replaceState(null, "", `#${result.id}`);
  render();
  compare();
}

function render() {
  const { result } = page;
  $("asked").textContent = asked(result.question);
  renderWarnings(result.warnings ?? []);
  renderReadings(result.readings);
  const base = `/api/results/${result.id}`;
  $("as-html").href = `${base}/result.html?language=${page.language}`;
  $("as-pdf").href = `${base}/result.pdf?language=${page.language}`;
  const hasHits = result.hits.length > 0;
  const hasPictures = hasHits && page.info.pictures;
  $("tools").hidden = !hasHits;
  $("viewers").hidden = $("keys").hidden = !hasPictures;
  $("cases").replaceChildren(...result.hits.map(renderCase));
  if (!hasHits) $("cases").append(make("li", { textContent: word("no_cases") }));
  else if (!hasPictures) $("cases").prepend(make("p", { className: "hint", textContent: word("no_pictures") }));
  mark();
}

// What a result answers: the form may say something else by now.
function asked({ scan, study, text, text_weight: weight, more, less, where }) {
  const parts = [scan && word("uploaded_scan"), study, text && `“${text}”`,
    ...more.map((other) => `+ ${other}`), ...less.map((other) => `- ${other}`)].filter(Boolean);
  if (text && parts.length > 1) parts.push(`${word("weight")} ${Math.round(100 * weight)} %`);
  const conditions = Object.entries(where).filter(([, value]) => value?.length).map(([name, value]) =>
    `${word(name)}: ${[value].flat().map(findingName).join(/^(age|date)$/.test(name) ? " - " : ", ")}`);
  const filters = conditions.length ? ` · ${word("filters")}: ${conditions.join("; ")}` : "";
  return `${word("query")}: ${parts.join(", ")}${filters}`;
}

function renderWarnings(warnings) {
  $("warnings").replaceChildren(...warnings.map(({ code, text }) =>
    make("li", { textContent: [word("warnings")[code], text].filter(Boolean).join(" — ") })));
}

function renderReadings(readings) {
  const isRead = readings?.some((reading) => reading.share !== null);
  $("readings-hint").textContent = word(!readings ? "scores_none" : isRead ? "scores_hint" : "scores_raw");
  $("bars").replaceChildren(...(readings ?? []).map((reading, number) => {
    const value = reading.share ?? reading.score;
    const number_ = make("span", { className: "number", textContent: `${reading.is_above ? "▲ " : ""}${Math.round(100 * value)} %` });
    const button = make("button", {
      type: "button", className: reading.is_above ? "above" : "", title: describe(reading),
      onclick: () => { $("heat").value = number; setFinding(number); },
    }, make("span", { textContent: findingName(reading.finding) }), number_, bar(value, reading));
    button.dataset.finding = number;
    return make("li", {}, button);
  }));
}

function describe(reading) {
  const parts = [`${word("scores")}: ${reading.score.toFixed(3)}`];
  if (reading.share !== null) parts.push(`95 %: ${Math.round(100 * reading.low)}–${Math.round(100 * reading.high)} %`);
  return parts.join(" · ");
}

function bar(value, reading) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 100 9");
  svg.setAttribute("preserveAspectRatio", "none");
  const add = (tag, className, attributes) => {
    const shape = document.createElementNS(svg.namespaceURI, tag);
    shape.setAttribute("class", className);
    for (const [name, setting] of Object.entries(attributes)) shape.setAttribute(name, setting);
    svg.append(shape);
  };
  add("rect", "track", { x: 0, y: 2, width: 100, height: 5 });
  add("rect", "bar", { x: 0, y: 2, width: 100 * value, height: 5 });
  if (reading.low !== null) add("line", "interval", { x1: 100 * reading.low, x2: 100 * reading.high, y1: 4.5, y2: 4.5 });
  if (reading.operating_share !== null) {
    add("line", "tick", { x1: 100 * reading.operating_share, x2: 100 * reading.operating_share, y1: 0, y2: 9 });
  }
  return svg;
}

function renderCase(hit, number) {
  const line = (key, names) => names.length === 0 ? "" :
    make("p", {}, make("b", { textContent: `${word(key)}: ` }), names.map(findingName).join(", "));
  const fields = Object.entries(hit.fields).map(([name, value]) => `${word(name)} ${value}`).join(" · ");
  const heading = make("h3", { textContent: `${number + 1} · ${hit.study}` });
  const similarity = make("p", { className: hit.is_ordinary ? "ordinary" : "" },
    `${word("similarity")} ${hit.similarity.toFixed(3)}${hit.is_ordinary ? ` — ${word("ordinary")}` : ""}`);
  const picture = page.info.pictures
    ? make("img", { src: `/api/results/${page.result.id}/${number}/thumbnail.png`, alt: "", loading: "lazy" }) : make("span");
  const examples = ["more", "less"].map((kind) => make("button", {
    type: "button", textContent: word(kind), onclick: (event) => { event.stopPropagation(); example(kind, hit.study); },
  }));
  return make("li", { tabIndex: 0, onclick: () => select(number), onkeydown: (event) => { if (event.key === "Enter") select(number); } },
    picture, make("div", {}, heading, similarity, line("shared", hit.shared), line("only_hit", hit.only_hit),
      line("only_query", hit.only_query), fields ? make("p", { textContent: fields }) : "",
      hit.excerpt ? make("p", { className: "excerpt", textContent: hit.excerpt }) : "", make("p", {}, ...examples)));
}

function mark() {
  [...$("cases").querySelectorAll("li")].forEach((row, number) => row.setAttribute("aria-current", number === page.current));
  for (const button of $("bars").querySelectorAll("button")) {
    button.setAttribute("aria-pressed", Number(button.dataset.finding) === page.finding);
  }
}

function select(number) {
  if (!page.result || number >= page.result.hits.length) return;
  page.current = number;
  mark();
  compare();
}

async function compare() {
  const { result } = page;
  if (!page.info.pictures || result.hits.length === 0) return;
  page.viewers ??= new Viewers($("query-canvas"), $("case-canvas"));
  const base = `/api/results/${result.id}`;
  const { scan, study, more, text } = result.question;
  const name = scan ? word("uploaded_scan") : study ?? more[0];
  $("query-name").textContent = `${word("query")}: ${name ?? `“${text}”`}`;
  $("case-name").textContent = `${page.current + 1} · ${result.hits[page.current].study}`;
  try {
    if (name) await page.viewers.show("query", `${base}/query/volume.nii.gz`);
    else page.viewers.clear("query");
  } catch {
    page.viewers.clear("query");
    $("query-name").textContent = word("gone");
  }
  await page.viewers.show("case", `${base}/${page.current}/volume.nii.gz`);
  await showHeat();
}

async function setFinding(number) {
  page.finding = number;
  mark();
  await showHeat();
  if (number !== null) page.viewers?.goToHottest(page.viewers.shown.query ? "query" : "case");
}

async function showHeat() {
  $("heat-note").hidden = page.finding === null;
  if (!page.viewers || !page.result) return;
  const base = `/api/results/${page.result.id}`;
  for (const [side, name] of [["query", "query"], ["case", page.current]]) {
    await page.viewers.heat(side, page.finding === null ? null : `${base}/${name}/heat-${page.finding}.nii.gz`);
  }
}

// Start ---------------------------------------------------------------------------------------

function next(select_) {
  select_.selectedIndex = (select_.selectedIndex + 1) % select_.options.length;
  select_.dispatchEvent(new Event("change"));
}

function onKey(event) {
  const isTyping = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName);
  if (event.key === "Escape") document.activeElement.blur();
  if (isTyping || event.ctrlKey || event.metaKey || event.altKey) return;
  const actions = {
    ArrowUp: () => page.viewers?.scroll(1), ArrowDown: () => page.viewers?.scroll(-1),
    w: () => next($("window")), p: () => next($("plane")), "/": () => $("text").focus(),
    h: () => { $("heat").value = page.finding === null ? "0" : ""; $("heat").dispatchEvent(new Event("change")); },
  };
  if (/^[1-9]$/.test(event.key)) select(Number(event.key) - 1);
  else if (actions[event.key]) actions[event.key]();
  else return;
  event.preventDefault();
}

function listen() {
  $("language").onclick = () => { page.language = page.language === "en" ? "zh" : "en"; translate(); };
  $("login").onsubmit = async (event) => {
    event.preventDefault();
    try { await request("/login", { token: $("token").value }); location.reload(); } catch { $("token").value = ""; }
  };
  $("question").onsubmit = (event) => { event.preventDefault(); search(); };
  $("text").onkeydown = (event) => { if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); search(); } };
  $("file").onchange = () => { if ($("file").files[0]) analyse($("file").files[0]); };
  const drop = $("drop");
  drop.onkeydown = (event) => { if (event.key === "Enter") $("file").click(); };
  drop.ondragover = (event) => { event.preventDefault(); drop.classList.add("over"); };
  drop.ondragleave = () => drop.classList.remove("over");
  drop.ondrop = (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    if (event.dataTransfer.files[0]) analyse(event.dataTransfer.files[0]);
  };
  let typing;
  $("study").oninput = () => {
    page.scan = null;
    $("chosen").textContent = "";
    clearTimeout(typing);
    typing = setTimeout(suggest, 200);
  };
  $("window").onchange = () => page.viewers?.setWindow($("window").value);
  $("plane").onchange = () => page.viewers?.setPlane($("plane").value);
  $("heat").onchange = () => setFinding($("heat").value === "" ? null : Number($("heat").value));
  $("link").onclick = async () => {
    await navigator.clipboard?.writeText(location.href).catch(() => {});
    say(word("copied"));
  };
  document.addEventListener("keydown", onKey);
  window.addEventListener("hashchange", restore);
}

async function suggest() {
  const found = await request("/api/studies", { beginning: $("study").value });
  $("studies").replaceChildren(...found.map((value) => make("option", { value })));
}

async function restore() {
  const handle = location.hash.slice(1);
  if (!handle || handle === page.result?.id) return;
  try {
    const result = await request(`/api/results/${encodeURIComponent(handle)}`);
    askAgain(result.question);
    show(result);
  } catch (error) {
    complain(error);
  }
}

// The form as it was when a saved result was asked, so that the next search starts from there.
function askAgain({ scan, study, text, text_weight: weight, more, less, where, k, per_patient: perPatient }) {
  page.scan = scan;
  $("chosen").textContent = scan ? word("uploaded_scan") : "";
  $("study").value = study ?? "";
  $("text").value = text ?? "";
  $("weight").value = weight;
  $("count").value = k;
  $("per-patient").value = perPatient;
  page.examples = { more: [...more], less: [...less] };
  renderExamples();
  buildFilters(where);
}

function showLogin() {
  $("main").hidden = true;
  $("login").hidden = false;
  $("token").focus();
}

async function start() {
  page.words = await (await fetch("/web/words.json")).json();
  page.language = navigator.language.startsWith("zh") ? "zh" : "en";
  translate();
  listen();
  try {
    page.info = await request("/api/info");
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    return;
  }
  $("main").hidden = false;
  translate();
  await suggest();
  await restore();
}

start();
