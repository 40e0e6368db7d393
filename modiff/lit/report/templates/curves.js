"use strict";
// Errors over the trajectory: curves that can be switched off, and a cursor that reads them out.
(() => {
  const HEIGHT = 330;
  const { width, box, ticks, scale, range, frame } = modiff.plot;

  class Curves {
    constructor(node) {
      this.node = node;
      this.curves = modiff.data(node).map((curve, i) => ({ ...curve, shown: true, color: `var(--series-${(i % 6) + 1})` }));
      this.own = this.curves.length;
      this.position = null;
      this.legend = modiff.make("div", { class: "legend", role: "group", "aria-label": "Curves" });
      this.area = modiff.make("div", { tabindex: "0", class: "area", role: "group" });
      this.area.setAttribute("aria-label", `${node.dataset.label}; read it with the left and right arrow keys`);
      this.readout = modiff.make("p", { class: "readout", role: "status" });
      node.append(this.legend, this.area, this.readout);
      this.area.addEventListener("pointermove", (event) => this.point(event));
      this.area.addEventListener("pointerleave", () => this.move(null));
      this.area.addEventListener("keydown", (event) => this.key(event));
      document.addEventListener("operator", (event) => this.add(event.detail));
      this.draw();
    }

    get steps() {
      return this.curves.reduce((most, curve) => (curve.timesteps.length > most.length ? curve.timesteps : most), []);
    }

    // A curve of one operator, chosen in the heat map; a second choice takes it away.
    add(curve) {
      const before = this.curves.findIndex((other, i) => i >= this.own && other.name === curve.name);
      if (before >= 0) this.curves.splice(before, 1);
      else this.curves.push({ ...curve, shown: true, color: `var(--series-${(this.curves.length % 6) + 1})` });
      modiff.announce(`${curve.name} ${before >= 0 ? "removed from" : "added to"} the curves`);
      this.draw();
    }

    draw() {
      const shown = this.curves.filter((curve) => curve.shown);
      const values = shown.flatMap((curve) => curve.values);
      const found = range(values, true);
      const count = this.steps.length;
      this.x = scale([0, Math.max(count - 1, 1)], [box.left, width - box.right], false);
      const [low, high] = found ?? [0.01, 1];
      this.y = scale([low, high], [HEIGHT - box.bottom, box.top], true);
      const every = Math.max(1, Math.ceil(count / 12));
      const svg = frame({
        height: HEIGHT,
        x: this.x,
        y: this.y,
        xTicks: this.steps.map((_, i) => i).filter((i) => i % every === 0),
        yTicks: found ? ticks(low, high, true) : [],
        xLabel: "timestep t of the evaluation (noise on the left, image on the right)",
        yLabel: "relative L2 error",
        xText: (i) => String(this.steps[i]),
        yText: modiff.percent,
        label: this.node.dataset.label,
      });
      for (const curve of shown) svg.append(this.line(curve));
      if (!found) svg.append(modiff.make("text", { x: width / 2, y: HEIGHT / 2, "text-anchor": "middle" }, "no error above zero"));
      this.cursor = modiff.make("line", { class: "cursor", y1: box.top, y2: HEIGHT - box.bottom, visibility: "hidden" });
      svg.append(this.cursor);
      this.area.replaceChildren(svg);
      this.legend.replaceChildren(...this.curves.map((curve) => this.entry(curve)));
      this.move(this.position);
    }

    line(curve) {
      let path = "";
      let pen = "M";
      curve.values.forEach((value, i) => {
        if (value === null || value <= 0) pen = "M";
        else {
          path += `${pen}${this.x(i).toFixed(1)} ${this.y(value).toFixed(1)}`;
          pen = "L";
        }
      });
      const line = modiff.make("path", { class: "line", d: path, "data-name": curve.name });
      line.style.stroke = curve.color;
      return line;
    }

    entry(curve) {
      const swatch = modiff.make("i");
      swatch.style.background = curve.color;
      const button = modiff.make("button", { type: "button", "aria-pressed": curve.shown }, swatch, curve.name);
      button.addEventListener("click", () => {
        curve.shown = !curve.shown;
        const at = this.curves.indexOf(curve);
        this.draw();
        this.legend.children[at].focus();
      });
      return button;
    }

    point(event) {
      const bounds = this.area.getBoundingClientRect();
      const x = ((event.clientX - bounds.left) / bounds.width) * width;
      const part = (x - box.left) / (width - box.right - box.left);
      this.move(Math.round(part * (this.steps.length - 1)));
    }

    key(event) {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step) return;
      event.preventDefault();
      this.move(this.position === null ? 0 : this.position + step);
    }

    move(position) {
      const last = this.steps.length - 1;
      this.position = position === null || last < 0 ? null : Math.min(last, Math.max(0, position));
      this.cursor.setAttribute("visibility", this.position === null ? "hidden" : "visible");
      if (this.position === null) {
        this.readout.textContent = "";
        return;
      }
      this.cursor.setAttribute("x1", this.x(this.position));
      this.cursor.setAttribute("x2", this.x(this.position));
      const texts = this.curves
        .filter((curve) => curve.shown)
        .map((curve) => `${curve.name} ${modiff.percent(curve.values[this.position])}`);
      this.readout.textContent = `t = ${this.steps[this.position]}: ${texts.join(", ")}`;
    }
  }

  for (const node of document.querySelectorAll(".curves")) new Curves(node);
})();
