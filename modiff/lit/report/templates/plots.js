"use strict";
// Axes and grids that the plots share.
modiff.plot = {
  width: 1080,
  box: { left: 74, right: 16, top: 14, bottom: 46 },

  // Round numbers within a range: 1, 2 or 5 times a power of ten; powers of ten on a logarithmic axis.
  ticks(low, high, log) {
    if (log) {
      const found = [];
      for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
        for (const factor of high / low > 300 ? [1] : [1, 2, 5]) found.push(factor * 10 ** power);
      return found.filter((value) => value >= low * 0.999 && value <= high * 1.001);
    }
    const rough = (high - low) / 6 || 1;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((factor) => factor * power).find((value) => value >= rough);
    const found = [];
    for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-6; value += step)
      found.push(Number(value.toPrecision(12)));
    return found;
  },

  scale([low, high], [start, end], log) {
    const at = log ? Math.log10 : (value) => value;
    const [a, b] = [at(low), at(high)];
    return (value) => start + ((at(value) - a) / (b - a || 1)) * (end - start);
  },

  range(values, log) {
    const known = values.filter((value) => value !== null && Number.isFinite(value) && (!log || value > 0));
    if (!known.length) return null;
    const [low, high] = [Math.min(...known), Math.max(...known)];
    if (log) return low === high ? [low / 2, high * 2] : [low / 1.15, high * 1.15];
    const pad = low === high ? Math.abs(low) || 1 : 0.06 * (high - low);
    return [low - pad, high + pad];
  },

  // An empty plot with both axes; y grows upwards.
  frame({ height, x, y, xTicks, yTicks, xLabel, yLabel, xText = String, yText = String, label }) {
    const { width, box } = modiff.plot;
    const svg = modiff.make("svg", { class: "plot", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
    for (const value of yTicks) {
      const at = y(value);
      svg.append(
        modiff.make("line", { class: "grid", x1: box.left, x2: width - box.right, y1: at, y2: at }),
        modiff.make("text", { x: box.left - 8, y: at + 4, "text-anchor": "end" }, yText(value))
      );
    }
    for (const [at, text] of xTicks.map((value) => [x(value), xText(value)])) {
      svg.append(
        modiff.make("line", { class: "axis", x1: at, x2: at, y1: height - box.bottom, y2: height - box.bottom + 5 }),
        modiff.make("text", { x: at, y: height - box.bottom + 19, "text-anchor": "middle" }, text)
      );
    }
    const middle = (height - box.bottom + box.top) / 2;
    svg.append(
      modiff.make("line", { class: "axis", x1: box.left, x2: width - box.right, y1: height - box.bottom, y2: height - box.bottom }),
      modiff.make("text", { x: (width + box.left) / 2, y: height - 6, "text-anchor": "middle" }, xLabel),
      modiff.make("text", { x: 16, y: middle, "text-anchor": "middle", transform: `rotate(-90 16 ${middle})` }, yLabel)
    );
    return svg;
  },
};
