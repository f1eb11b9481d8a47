"use strict";
// Plain tables become ones that sort, filter and hide columns; without this script they are still complete.

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function valueOf(row, column) {
  const cell = row.cells[column];
  return cell.dataset.v === undefined ? cell.textContent.trim() : cell.dataset.v;
}

/** Order numbers before words; an empty cell is last in both directions. */
function compared(a, b, direction) {
  const empty = (value) => value === "" || value === "-";
  if (empty(a) || empty(b)) return empty(a) - empty(b);
  const [x, y] = [Number(a), Number(b)];
  if (Number.isNaN(x) || Number.isNaN(y)) {
    return direction * (Number.isNaN(x) - Number.isNaN(y) || a.localeCompare(b, "en", { numeric: true }));
  }
  return direction * (x - y);
}

function sort(table, column, direction) {
  const body = table.tBodies[0];
  const rows = [...body.rows].sort((a, b) => compared(valueOf(a, column), valueOf(b, column), direction));
  rows.forEach((row) => row.classList.remove("rule")); // they are no longer in groups
  body.append(...rows);
  for (const head of table.tHead.rows[0].cells) head.removeAttribute("aria-sort");
  table.tHead.rows[0].cells[column].setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
}

function filter(table, text, output) {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const row of table.tBodies[0].rows) {
    const names = row.dataset.names ?? row.textContent.toLowerCase();
    row.hidden = !words.every((word) => names.includes(word));
    shown += !row.hidden;
  }
  const all = table.tBodies[0].rows.length;
  output.textContent = shown === all ? `${all} rows` : `${shown} of ${all} rows`;
}

function show(table, column, visible) {
  for (const row of table.rows) row.cells[column].hidden = !visible;
}

function columnChoice(table, heads) {
  const boxes = heads.map((head, column) => {
    const box = make("input", { type: "checkbox", checked: !head.hidden });
    box.addEventListener("change", () => show(table, column, box.checked));
    return box;
  });
  const names = heads.map((head) => head.textContent.trim().replace(/\s+/g, " "));
  const labels = boxes.map((box, column) => make("label", { title: heads[column].title }, box, ` ${names[column]}`));
  const details = make("details", { className: "columns" }, make("summary", { className: "button" }, "Columns"), make("div", {}, ...labels));
  details.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && details.open) {
      details.open = false;
      details.firstChild.focus();
    }
  });
  document.addEventListener("click", (event) => {
    if (!details.contains(event.target)) details.open = false;
  });
  const groups = [...new Set(heads.map((head) => head.dataset.group).filter(Boolean))].map((group) => {
    const own = boxes.filter((_, column) => heads[column].dataset.group === group);
    const button = make("button", { type: "button" }, group);
    const press = () => button.setAttribute("aria-pressed", String(own.some((box) => box.checked)));
    button.addEventListener("click", () => {
      const wanted = button.getAttribute("aria-pressed") !== "true";
      for (const box of own) {
        box.checked = wanted;
        box.dispatchEvent(new Event("change"));
      }
    });
    own.forEach((box) => box.addEventListener("change", press));
    press();
    return button;
  });
  return [...groups, details];
}

function enhance(table) {
  const heads = [...table.tHead.rows[0].cells];
  const output = make("output");
  const input = make("input", { type: "search", placeholder: "Filter, such as static 512", autocomplete: "off" });
  input.setAttribute("aria-label", "Filter the rows");
  input.addEventListener("input", () => filter(table, input.value, output));
  const tools = make("div", { className: "tools" }, make("label", {}, input), output, ...columnChoice(table, heads));
  heads.forEach((head, column) => {
    const button = make("button", { type: "button" }, ...head.childNodes);
    button.addEventListener("click", () => sort(table, column, head.getAttribute("aria-sort") === "ascending" ? -1 : 1));
    head.append(button);
  });
  table.closest(".scroll").before(tools);
  filter(table, "", output);
}

const embedded = (id) => {
  const element = document.getElementById(id);
  return element && JSON.parse(element.textContent);
};

/** Every column of summary.csv, made only when it is asked for. */
function everyColumn(details, { columns, rows }) {
  const heads = columns.map(({ name, unit, meaning }) => {
    const head = make("th", { scope: "col", title: `${unit}: ${meaning}` }, name);
    head.classList.toggle("name", name === "strategy");
    return head;
  });
  const body = rows.map((row) => {
    const cells = row.map((value, column) => {
      const [tag, scope] = columns[column].name === "strategy" ? ["th", { scope: "row" }] : ["td", {}];
      const cell = make(tag, scope, value === null ? "-" : String(value));
      cell.classList.toggle("left", typeof value === "string");
      return cell;
    });
    return make("tr", {}, ...cells);
  });
  const table = make("table", {}, make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...body));
  const scroll = make("div", { className: "scroll tall", tabIndex: 0, role: "region", ariaLabel: "Every column" }, table);
  details.append(scroll);
  enhance(table);
}

function csv({ columns, rows }) {
  const quoted = (value) => (value === null ? "" : /[",\r\n]/.test(value) ? `"${String(value).replaceAll('"', '""')}"` : value);
  return [columns.map(({ name }) => name), ...rows].map((row) => row.map(quoted).join(",")).join("\n") + "\n";
}

/** Show what belongs to one baseline, and write the ratios to it into the table. */
function choose(baseline, against) {
  for (const part of document.querySelectorAll("[data-baseline]")) part.hidden = part.dataset.baseline !== String(baseline);
  for (const button of document.querySelectorAll("[role=radio]")) {
    const chosen = button.value === String(baseline);
    button.setAttribute("aria-checked", String(chosen));
    button.tabIndex = chosen ? 0 : -1;
  }
  const table = document.querySelector("table.ranking");
  for (const row of table.tBodies[0].rows) {
    const [ratio, interval, verdict] = against[baseline][row.dataset.row];
    const [figure, word] = [row.querySelector("td.ratio"), row.querySelector("td.verdict")];
    figure.dataset.v = ratio === "-" ? "" : ratio;
    figure.replaceChildren(ratio, make("i", {}, interval));
    word.textContent = verdict;
    word.className = `left verdict ${verdict}`;
  }
  const sorted = table.querySelector("th[aria-sort]");
  if (sorted) sort(table, sorted.cellIndex, sorted.getAttribute("aria-sort") === "ascending" ? 1 : -1);
}

function switchOfBaseline({ against }) {
  const buttons = [...document.querySelectorAll("[role=radio]")];
  buttons.forEach((button, place) => {
    button.addEventListener("click", () => choose(place, against));
    button.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (step) {
        event.preventDefault();
        const next = buttons[(place + step + buttons.length) % buttons.length];
        next.focus();
        next.click();
      }
    });
  });
  document.querySelector(".switch").hidden = false;
}

for (const table of document.querySelectorAll("table.data")) enhance(table);

const summary = embedded("summary");
if (summary) {
  const details = document.getElementById("every-column");
  details.hidden = false;
  details.addEventListener("toggle", () => details.querySelector("table") || everyColumn(details, summary));
  document.getElementById("download").addEventListener("click", () => {
    const link = make("a", { href: URL.createObjectURL(new Blob([csv(summary)], { type: "text/csv" })), download: "summary.csv" });
    link.click();
    URL.revokeObjectURL(link.href);
  });
}

const ranking = embedded("ranking");
if (ranking) switchOfBaseline(ranking);

addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details.more:not(#every-column)")) details.open = true;
});
