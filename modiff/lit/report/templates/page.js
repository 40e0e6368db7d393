"use strict";
// Shared by the scripts of the page, and what the header's buttons do.
const modiff = {
  announce(text) {
    document.getElementById("announcements").textContent = text;
  },
  make(tag, attributes = {}, ...content) {
    const svg = ["svg", "g", "path", "line", "text", "circle", "rect", "title"].includes(tag);
    const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (value !== null && value !== undefined) node.setAttribute(name, value);
    }
    node.append(...content);
    return node;
  },
  percent(value) {
    if (value === null || value === undefined) return "not recorded";
    return value === 0 ? "0 %" : `${Number((100 * value).toPrecision(3))} %`;
  },
  data(node) {
    const found = JSON.parse(document.getElementById(node.dataset.source).textContent);
    return node.dataset.part ? found[node.dataset.part] : found;
  },
};
document.documentElement.classList.add("js");

(() => {
  const themes = ["system", "light", "dark"];
  const button = document.getElementById("theme");
  const show = (theme) => {
    if (theme === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    button.textContent = `Theme: ${theme}`;
    document.dispatchEvent(new Event("themechange"));
  };
  let current = 0;
  button.hidden = false;
  button.addEventListener("click", () => {
    current = (current + 1) % themes.length;
    show(themes[current]);
    modiff.announce(`Theme: ${themes[current]}`);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () =>
    document.dispatchEvent(new Event("themechange"))
  );
  const print = document.getElementById("print");
  print.hidden = false;
  print.addEventListener("click", () => window.print());
  addEventListener("beforeprint", () => document.querySelectorAll("details:not(.static)").forEach((d) => (d.open = true)));
})();
