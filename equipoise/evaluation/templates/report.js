"use strict";
// The sample browser: filters the embedded rows and shows one page of them. Texts are only ever set as text.
(() => {
  const data = JSON.parse(document.getElementById("samples-data").textContent);
  const [METHOD, OCCUPATION, RUN, TEXT, OUTCOME, WHY, WORDS, BASE, BONUS, LENGTH, REPETITION, NLL, SPANS] = Array(13).keys();
  const PAGE = 25;
  const by = (id) => document.getElementById(id);
  const pick = { [METHOD]: by("pick-method"), [OCCUPATION]: by("pick-occupation"), [OUTCOME]: by("pick-outcome") };
  const search = by("pick-text");
  const lower = data.rows.map((row) => row[TEXT].toLowerCase());
  let found = [];
  let page = 0;

  const fill = (select, names) => names.forEach((name, i) => select.add(new Option(name, i)));
  fill(pick[METHOD], data.methods);
  fill(pick[OCCUPATION], data.occupations);
  fill(pick[OUTCOME], data.outcomes);

  const element = (name, text, className) => {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  };

  function marked(row) {
    const cell = element("bdi", undefined, "text");
    const text = row[TEXT];
    let end = 0;
    for (let i = 0; i < row[SPANS].length; i += 3) {
      const [from, to, kind] = row[SPANS].slice(i, i + 3);
      cell.append(text.slice(end, from), element("mark", text.slice(from, to), `term-${kind}`));
      end = to;
    }
    cell.append(text.slice(end));
    return cell;
  }

  const signed = (value) => (value < 0 ? "−" : "+") + String(Math.abs(value));

  function parts(row) {
    const total = row[BASE] + row[BONUS] + row[LENGTH] + row[REPETITION];
    const named = [["base", row[BASE]], ["bonus", row[BONUS]], ["length", row[LENGTH]], ["repetition", row[REPETITION]]];
    const rest = named.filter(([name, value]) => name === "base" || value !== 0);
    return [signed(Math.round(total * 1000) / 1000), rest.map(([name, value]) => `${name} ${signed(value)}`).join(", ")];
  }

  function line(row) {
    const tr = element("tr");
    const told = element("td");
    told.append(marked(row));
    const number = (label, text) => {
      const td = element("td", text, "number");
      if (text !== "") td.dataset.label = label; // shown where the table's head is not
      return td;
    };
    const [total, made] = parts(row);
    const reward = number("reward", total);
    reward.append(" ", element("small", made));
    tr.append(
      element("td", data.methods[row[METHOD]]), element("td", `${data.occupations[row[OCCUPATION]]} ${row[RUN]}`), told,
      number("words", row[WORDS]), element("td", data.outcomes[row[OUTCOME]] + (row[WHY] ? ` (${row[WHY]})` : "")),
      reward, number("NLL", row[NLL] === null ? "" : row[NLL].toFixed(2)),
    );
    return tr;
  }

  function show() {
    const pages = Math.max(1, Math.ceil(found.length / PAGE));
    page = Math.min(Math.max(page, 0), pages - 1);
    by("samples-body").replaceChildren(...found.slice(page * PAGE, (page + 1) * PAGE).map((i) => line(data.rows[i])));
    const share = data.rows.length ? (100 * found.length) / data.rows.length : 0;
    by("samples-count").textContent =
      `${found.length.toLocaleString("en")} of ${data.rows.length.toLocaleString("en")} sentences ` +
      `(${share.toFixed(1)} %), page ${page + 1} of ${pages}`;
    by("samples-back").disabled = page === 0;
    by("samples-next").disabled = page === pages - 1;
  }

  function filter() {
    const wanted = Object.entries(pick).filter(([, select]) => select.value !== "");
    const words = search.value.trim().toLowerCase();
    found = [];
    data.rows.forEach((row, i) => {
      if (wanted.every(([column, select]) => row[column] === Number(select.value)) && lower[i].includes(words)) found.push(i);
    });
    page = 0;
    show();
  }

  Object.values(pick).forEach((select) => select.addEventListener("change", filter));
  search.addEventListener("input", filter);
  by("samples-back").addEventListener("click", () => { page -= 1; show(); });
  by("samples-next").addEventListener("click", () => { page += 1; show(); });
  by("samples-controls").hidden = false;
  filter();

  // Tables whose headings are buttons sort by that column; a second click turns the order round.
  for (const table of document.querySelectorAll("table.sortable")) {
    const body = table.tBodies[0];
    [...table.tHead.rows[0].cells].forEach((heading, column) => {
      const button = element("button", heading.textContent.trim());
      button.type = "button";
      heading.replaceChildren(button);
      button.addEventListener("click", () => {
        const down = heading.getAttribute("aria-sort") !== "descending";
        for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
        heading.setAttribute("aria-sort", down ? "descending" : "ascending");
        const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
        const missing = (row) => key(row) === "";
        const order = (a, b) => (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b);
        const rows = [...body.rows].sort((a, b) => missing(a) - missing(b) || order(key(a), key(b)) * (down ? -1 : 1));
        body.append(...rows);
      });
    });
  }
})();
