"use strict";
(() => {
  const $ = (selector) => document.querySelector(selector);
  const all = (selector) => [...document.querySelectorAll(selector)];

  // Light, dark, or as the system has it; remembered where the browser allows.
  const root = document.documentElement;
  const button = $("#theme");
  const themes = ["auto", "light", "dark"];
  const wear = (theme) => {
    if (theme === "auto") delete root.dataset.theme;
    else root.dataset.theme = theme;
    button.textContent = { auto: "Auto", light: "Light", dark: "Dark" }[theme];
    button.setAttribute("aria-label", `Colours: ${theme === "auto" ? "as the system" : theme}. Change.`);
  };
  let theme = "auto";
  try { theme = localStorage.getItem("moe-compress-theme") || "auto"; } catch { /* no storage for files */ }
  wear(themes.includes(theme) ? theme : "auto");
  button.hidden = false;
  button.addEventListener("click", () => {
    theme = themes[(themes.indexOf(theme) + 1) % themes.length];
    wear(theme);
    try { localStorage.setItem("moe-compress-theme", theme); } catch { /* as above */ }
  });

  // One tip for all: beside what is pointed at, or has the focus.
  const tip = $("#tip");
  let again = null;  // says the same where it now belongs
  const say = (title, rows, box) => {
    const head = document.createElement("strong");
    head.textContent = title;
    tip.replaceChildren(head);
    if (rows.length) {
      const table = document.createElement("table");
      for (const pair of rows) {
        const row = table.insertRow();
        for (const text of pair) row.insertCell().textContent = text;
      }
      tip.append(table);
    }
    const own = tip.getBoundingClientRect();
    const left = Math.min(Math.max(8, box.left + box.width / 2 - own.width / 2), innerWidth - own.width - 8);
    const above = box.top - own.height - 10;
    tip.style.left = `${left}px`;
    tip.style.top = `${above < 8 ? box.bottom + 10 : above}px`;
    tip.style.visibility = "visible";
  };
  const hush = () => { again = null; tip.style.visibility = "hidden"; };
  const lifted = (event) => event.pointerType === "touch";  // a finger that is gone leaves what it showed
  addEventListener("pointerdown", (event) => { if (!event.target.closest("svg.outer, [data-tip]")) { hush(); point(-1, -1); } });
  for (const one of all("[data-tip]")) {
    const show = () => { say(one.dataset.tip, [], one.getBoundingClientRect()); again = show; };
    one.addEventListener("pointerenter", show);
    one.addEventListener("focus", show);
    one.addEventListener("pointerleave", (event) => { if (!lifted(event)) hush(); });
    one.addEventListener("blur", hush);
  }
  addEventListener("keydown", (event) => { if (event.key === "Escape") { hush(); point(-1, -1); } });
  // What has the focus brings itself into view, and its tip goes with it; what is pointed at scrolls away.
  addEventListener("scroll", () => { document.activeElement.matches(":focus-visible") && again ? again() : hush(); }, { passive: true });

  // Maps of experts: one cursor for all of them, moved by pointer or arrow keys.
  const store = $("#expert-figures");
  const experts = store ? JSON.parse(store.textContent) : null;
  const live = $("#live");
  let row = -1;
  let column = -1;
  const point = (toRow, toColumn) => {
    row = toRow;
    column = toColumn;
    for (const cursor of all(".cursor")) {
      cursor.style.visibility = row < 0 ? "hidden" : "visible";
      if (row >= 0) { cursor.setAttribute("x", column); cursor.setAttribute("y", row); }
    }
  };
  const read = (map) => {
    const known = experts.facts.filter((fact) => fact.texts[row] && fact.texts[row][column]);
    const title = `Layer ${experts.layers[row]}, expert ${column}`;
    const rows = known.length ? known.map((fact) => [fact.title, fact.texts[row][column]]) : [["", "no such expert"]];
    const box = map.getBoundingClientRect();
    const wide = box.width / experts.columns;
    const high = box.height / experts.layers.length;
    say(title, rows, { left: box.left + column * wide, width: wide, top: box.top + row * high, bottom: box.top + (row + 1) * high });
    again = () => read(map);
    live.textContent = `${title}. ${rows.map((pair) => pair.join(" ")).join(". ")}`;
  };
  for (const map of all("svg.outer")) {
    const at = (share, count) => Math.min(Math.max(Math.floor(share * count), 0), count - 1);
    const follow = (event) => {
      const box = map.getBoundingClientRect();
      point(at((event.clientY - box.top) / box.height, experts.layers.length), at((event.clientX - box.left) / box.width, experts.columns));
      read(map);
    };
    const leave = () => { hush(); point(-1, -1); };
    map.addEventListener("pointermove", follow);
    map.addEventListener("pointerdown", follow);
    map.addEventListener("pointerleave", (event) => { if (!lifted(event)) leave(); });
    map.addEventListener("blur", leave);
    map.addEventListener("focus", () => {
      if (!map.matches(":focus-visible")) return;
      if (row < 0) point(0, 0);
      read(map);
    });
    map.addEventListener("keydown", (event) => {
      const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
      const ends = { Home: 0, End: experts.columns - 1 };
      if (event.key in ends) point(Math.max(row, 0), ends[event.key]);
      else if (event.key in moves) {
        const [down, right] = moves[event.key];
        point(Math.min(Math.max(row + down, 0), experts.layers.length - 1), Math.min(Math.max(column + right, 0), experts.columns - 1));
      } else return;
      event.preventDefault();
      const frame = map.parentElement;  // where it scrolls sideways, the cursor stays in sight
      const left = map.getBoundingClientRect().width * (column + 0.5) / experts.columns;
      frame.scrollLeft = Math.min(Math.max(frame.scrollLeft, left - frame.clientWidth + 60), Math.max(left - 20, 0));
      read(map);
    });
  }

  const copy = $("#copy");
  if (copy && navigator.clipboard) {
    copy.hidden = false;
    copy.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText($("#recipe-text").textContent);
        copy.textContent = "Copied";
      } catch { copy.textContent = "Not allowed here"; }
    });
  }

  // On paper everything is open.
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = all("details:not([open])");
    for (const one of closed) one.open = true;
  });
  addEventListener("afterprint", () => { for (const one of closed) one.open = false; });
})();
