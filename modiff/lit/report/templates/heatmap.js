"use strict";
// Operators by timesteps: a cell's color is its error, on a logarithmic scale; every cell can be reached by keys.
(() => {
  const ROW = 13;
  // Six stops from pale to dark, perceptually ordered; missing cells take the color of the theme.
  const STOPS = ["#fcfdbf", "#fec287", "#fb8761", "#b73779", "#51127c", "#0d0829"].map((hex) =>
    [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16))
  );
  const color = (part) => {
    const at = Math.min(0.9999, Math.max(0, part)) * (STOPS.length - 1);
    const [a, b] = [STOPS[Math.floor(at)], STOPS[Math.floor(at) + 1]];
    return a.map((value, i) => Math.round(value + (b[i] - value) * (at - Math.floor(at))));
  };

  class HeatMap {
    constructor(node) {
      this.node = node;
      this.found = modiff.data(node);
      this.order = this.found.operators.map((_, i) => i);
      this.cell = null;
      const positive = this.found.values.flat().filter((value) => value !== null && value > 0).sort((a, b) => a - b);
      this.high = positive.at(-1) ?? 1;
      this.low = Math.max(positive[Math.floor(positive.length / 50)] ?? 0.01, this.high * 1e-4);
      this.canvas = modiff.make("canvas", { role: "img", "aria-label": node.dataset.label });
      this.box = modiff.make("div", { class: "box", hidden: "" });
      this.names = modiff.make("div", { class: "names", "aria-hidden": "true" });
      this.area = modiff.make("div", { class: "heat", tabindex: "0", role: "group" }, this.names, this.canvas, this.box);
      this.area.setAttribute("aria-label", `${node.dataset.label}; move with the arrow keys, Enter adds the curve`);
      this.readout = modiff.make("p", { class: "readout", role: "status" });
      node.append(this.tools(), this.area, this.readout);
      this.listen();
      this.draw();
    }

    tools() {
      const means = this.found.values.map((row) => {
        const known = row.filter((value) => value !== null);
        return known.length ? known.reduce((a, b) => a + b, 0) / known.length : -1;
      });
      const select = modiff.make(
        "select",
        { "aria-label": "Order of the operators" },
        modiff.make("option", { value: "network" }, "in the network's order"),
        modiff.make("option", { value: "error" }, "largest mean error first")
      );
      const filter = modiff.make("input", { type: "search", "aria-label": "Operators whose name holds", placeholder: "name holds" });
      const update = () => {
        this.order = this.found.operators.map((_, i) => i).filter((i) => this.found.operators[i].includes(filter.value));
        if (select.value === "error") this.order.sort((a, b) => means[b] - means[a]);
        this.cell = null;
        this.draw();
      };
      select.addEventListener("change", update);
      filter.addEventListener("input", update);
      const scale = modiff.make("i");
      scale.style.background = `linear-gradient(to right, ${STOPS.map((stop) => `rgb(${stop})`).join(", ")})`;
      const legend = modiff.make("span", { class: "scale" }, modiff.percent(this.low), scale, modiff.percent(this.high));
      return modiff.make("div", { class: "toolbar" }, "Operators ", select, filter, legend, "gray: zero, or not recorded");
    }

    listen() {
      this.area.addEventListener("pointermove", (event) => {
        const bounds = this.canvas.getBoundingClientRect();
        const column = Math.floor(((event.clientX - bounds.left) / bounds.width) * this.found.timesteps.length);
        this.move(Math.floor((event.clientY - bounds.top) / ROW), column);
      });
      this.area.addEventListener("click", () => this.choose());
      this.area.addEventListener("keydown", (event) => {
        const [down, right] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key] ?? [];
        if (event.key === "Enter") this.choose();
        if (down === undefined) return;
        event.preventDefault();
        const [row, column] = this.cell ?? [-Math.max(down, 0), -Math.max(right, 0)];
        this.move(row + down, column + right, true);
      });
      document.addEventListener("themechange", () => this.draw());
    }

    choose() {
      if (!this.cell) return;
      const operator = this.order[this.cell[0]];
      const detail = {
        name: this.found.operators[operator],
        timesteps: this.found.timesteps,
        values: this.found.values[operator],
      };
      document.dispatchEvent(new CustomEvent("operator", { detail }));
    }

    draw() {
      const [rows, columns] = [this.order.length, this.found.timesteps.length];
      this.canvas.width = Math.max(columns, 1);
      this.canvas.height = Math.max(rows, 1);
      this.canvas.style.height = `${ROW * Math.max(rows, 1)}px`;
      const image = new ImageData(Math.max(columns, 1), Math.max(rows, 1));
      const none = getComputedStyle(document.documentElement).getPropertyValue("--none").trim();
      const gray = [1, 3, 5].map((i) => parseInt(none.slice(i, i + 2), 16));
      this.order.forEach((operator, row) =>
        this.found.values[operator].forEach((value, column) => {
          const part = Math.log(value / this.low) / Math.log(this.high / this.low || 2);
          const rgb = value === null || value <= 0 ? gray : color(part);
          image.data.set([...rgb, 255], 4 * (row * columns + column));
        })
      );
      this.canvas.getContext("2d").putImageData(image, 0, 0);
      this.names.replaceChildren(...this.order.map((i) => modiff.make("div", {}, this.found.operators[i])));
      this.box.hidden = true;
      this.readout.textContent = `${rows} operators, ${columns} evaluations.`;
    }

    move(row, column, scroll = false) {
      const [rows, columns] = [this.order.length, this.found.timesteps.length];
      if (!rows || !columns) return;
      const cell = [Math.min(rows - 1, Math.max(0, row)), Math.min(columns - 1, Math.max(0, column))];
      this.cell = cell;
      const part = this.canvas.clientWidth / columns;
      this.box.hidden = false;
      this.box.style.left = `${this.canvas.offsetLeft + cell[1] * part}px`;
      this.box.style.top = `${cell[0] * ROW}px`;
      this.box.style.width = `${Math.max(part, 3)}px`;
      this.box.style.height = `${ROW}px`;
      if (scroll) this.box.scrollIntoView({ block: "nearest" });
      const operator = this.order[cell[0]];
      const value = modiff.percent(this.found.values[operator][cell[1]]);
      this.readout.textContent = `${this.found.operators[operator]}, t = ${this.found.timesteps[cell[1]]}: ${value}`;
    }
  }

  for (const node of document.querySelectorAll(".heatmap")) new HeatMap(node);
})();
