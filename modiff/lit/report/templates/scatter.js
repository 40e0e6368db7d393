"use strict";
// Recipes by two of their numbers.
(() => {
  const HEIGHT = 400;
  const { width, box, ticks, scale, range, frame } = modiff.plot;

  class Scatter {
    constructor(node) {
      this.node = node;
      this.found = modiff.data(node);
      const { axes } = this.found;
      this.x = this.select("Horizontal axis", axes.findIndex((name) => name.startsWith("GBOPs")));
      this.y = this.select("Vertical axis", 0);
      this.area = modiff.make("div");
      this.readout = modiff.make("p", { class: "readout", role: "status" });
      const tools = modiff.make("div", { class: "toolbar" }, "Across: ", this.x, "Up: ", this.y);
      node.append(tools, this.area, this.readout);
      this.draw();
    }

    select(label, chosen) {
      const options = this.found.axes.map((name, i) => modiff.make("option", { value: i }, name));
      const select = modiff.make("select", { "aria-label": label, onchange: () => this.draw() }, ...options);
      select.value = String(Math.max(0, chosen));
      return select;
    }

    draw() {
      const [i, j] = [Number(this.x.value), Number(this.y.value)];
      const points = this.found.points.filter((point) => point.values[i] !== null && point.values[j] !== null);
      if (!points.length) {
        this.area.replaceChildren("No recipe has both numbers.");
        return;
      }
      const [across, up] = [i, j].map((k) => {
        const values = points.map((point) => point.values[k]);
        const log = Math.min(...values) > 0 && Math.max(...values) > 20 * Math.min(...values);
        return { values, log, range: range(values, log) };
      });
      const x = scale(across.range, [box.left + 10, width - box.right - 120], across.log);
      const y = scale(up.range, [HEIGHT - box.bottom - 10, box.top + 10], up.log);
      const title = (k) => {
        const better = this.found.better[k];
        return this.found.axes[k] + (better ? ` (${better} is better)` : "");
      };
      const svg = frame({
        height: HEIGHT,
        x,
        y,
        xTicks: ticks(...across.range, across.log),
        yTicks: ticks(...up.range, up.log),
        xLabel: title(i),
        yLabel: title(j),
        label: this.node.dataset.label,
      });
      svg.setAttribute("role", "group");
      for (const point of points) svg.append(this.mark(point, x(point.values[i]), y(point.values[j]), i, j));
      this.area.replaceChildren(svg);
    }

    mark(point, x, y, i, j) {
      const text = `${point.name}: ${this.found.axes[i]} ${point.texts[i]}, ${this.found.axes[j]} ${point.texts[j]}`;
      const kind = point === this.found.points[0] ? "point teacher" : "point";
      const mark = modiff.make(
        "g",
        { tabindex: "0", role: "img", "aria-label": text },
        modiff.make("circle", { class: kind, cx: x, cy: y, r: 7 }),
        modiff.make("text", { class: "name", x: x + 12, y: y + 4 }, point.name)
      );
      for (const event of ["pointerenter", "focus"]) mark.addEventListener(event, () => (this.readout.textContent = text));
      return mark;
    }
  }

  for (const node of document.querySelectorAll(".scatter")) new Scatter(node);
})();
