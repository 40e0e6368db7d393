"use strict";
// Samples: one version at a time, flipped by a key or a button, and a dialog that shows one sample larger.
(() => {
  const DIFFERENCE = "difference";
  // Recipes keep their names as they are.
  const title = (text) => ({ teacher: "Teacher", student: "Student", difference: "Difference" })[text] ?? text;

  function show(node, names, choice) {
    // A difference stacks the first version and the chosen one; the style sheet subtracts them.
    const [base, other] = choice === DIFFERENCE ? [0, names.length - 1] : [names.indexOf(choice), -1];
    node.classList.toggle("difference", choice === DIFFERENCE);
    for (const group of node.matches(".stage") ? [node] : node.querySelectorAll(".sample"))
      [...group.querySelectorAll("img")].forEach((image, i) => image.classList.toggle("shown", i === base || i === other));
  }

  function choices(names, onchange) {
    const all = names.length === 2 ? [...names, DIFFERENCE] : names;
    const buttons = all.map((name) =>
      modiff.make("button", { type: "button", "data-name": name, onclick: () => choose(name) }, title(name))
    );
    let current = all[0];
    function choose(name) {
      current = name;
      for (const button of buttons) button.setAttribute("aria-pressed", button.dataset.name === name);
      onchange(name);
    }
    const flip = () => {
      choose(names[(names.indexOf(current) + 1) % names.length]);
      modiff.announce(`Showing ${current}`);
    };
    return { buttons, choose, flip, current: () => current };
  }

  function makeViewer(gallery, names) {
    const stage = modiff.make("div", { class: "stage" });
    const view = modiff.make("div", { class: "view", tabindex: "0", role: "group", "aria-label": "Image" }, stage);
    const heading = modiff.make("h2", { id: "viewer-title" });
    const note = modiff.make("p", { class: "note soft", role: "status" });
    const samples = [...gallery.querySelectorAll(".sample")];
    let index = 0;
    let zoom = 1;
    const pick = choices(names, (name) => {
      show(stage, names, name);
      const shown = stage.children[names.indexOf(name)];
      const about = name === DIFFERENCE ? "absolute difference, four times as bright" : shown?.dataset.note;
      note.textContent = `${title(name)}${about ? `: ${about}` : ""}`;
    });
    const resize = (factor) => {
      const image = stage.querySelector("img");
      zoom = factor === 0 ? fit(image) : Math.min(512, Math.max(0.125, zoom * factor));
      stage.style.width = `${image.naturalWidth * zoom}px`;
      stage.style.height = `${image.naturalHeight * zoom}px`;
      level.textContent = `${Math.round(100 * zoom)} %`;
    };
    const fit = (image) => {
      const room = Math.min(view.clientWidth / image.naturalWidth, view.clientHeight / image.naturalHeight);
      return room > 1 ? Math.max(1, Math.floor(room)) : room;
    };
    const open = (at, version) => {
      if (version) pick.choose(version);
      index = (at + samples.length) % samples.length;
      stage.replaceChildren(...[...samples[index].querySelectorAll("img")].map((image) => image.cloneNode()));
      stage.classList.toggle("pixels", gallery.querySelector(".samples").classList.contains("pixels"));
      heading.textContent = `Sample ${index}`;
      if (!dialog.open) dialog.showModal();
      pick.choose(pick.current());
      resize(0);
    };
    const level = modiff.make("output", { "aria-label": "Zoom" });
    const button = (text, label, onclick) => modiff.make("button", { type: "button", "aria-label": label, onclick }, text);
    const tools = modiff.make(
      "div",
      { class: "toolbar", role: "toolbar", "aria-label": "Viewer" },
      button("←", "Previous sample", () => open(index - 1)),
      button("→", "Next sample", () => open(index + 1)),
      ...pick.buttons,
      button("Flip (F)", "Flip to the next version", pick.flip),
      button("−", "Zoom out", () => resize(0.5)),
      level,
      button("+", "Zoom in", () => resize(2)),
      button("Fit (0)", "Fit into the window", () => resize(0)),
      button("Close", "Close", () => dialog.close())
    );
    const dialog = modiff.make("dialog", { class: "viewer", "aria-labelledby": "viewer-title" }, heading, tools, view, note);
    const keys = {
      ArrowLeft: () => open(index - 1),
      ArrowRight: () => open(index + 1),
      f: pick.flip,
      "+": () => resize(2),
      "=": () => resize(2),
      "-": () => resize(0.5),
      0: () => resize(0),
    };
    dialog.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || !keys[event.key]) return;
      event.preventDefault();
      event.stopPropagation();
      keys[event.key]();
    });
    dialog.addEventListener("close", () => samples[index].focus());
    drag(view);
    document.body.append(dialog);
    return open;
  }

  function drag(view) {
    let from = null;
    view.addEventListener("pointerdown", (event) => {
      from = [event.clientX + view.scrollLeft, event.clientY + view.scrollTop];
    });
    view.addEventListener("pointermove", (event) => {
      if (from && event.buttons) view.scrollTo(from[0] - event.clientX, from[1] - event.clientY);
    });
    addEventListener("pointerup", () => (from = null));
    view.addEventListener("dragstart", (event) => event.preventDefault());
  }

  for (const gallery of document.querySelectorAll(".gallery")) {
    const names = JSON.parse(gallery.dataset.names);
    const pick = choices(names, (name) => show(gallery, names, name));
    const flip = modiff.make("button", { type: "button", class: "flip", onclick: pick.flip }, "Flip (F)");
    const hint = modiff.make("span", { class: "soft" }, "Select a sample to see it larger.");
    gallery.querySelector(".toolbar").append(...pick.buttons, flip, hint);
    pick.choose(names[names.length - 1]);
    const open = makeViewer(gallery, names);
    [...gallery.querySelectorAll(".sample")].forEach((sample, i) =>
      sample.addEventListener("click", () => open(i, pick.current()))
    );
    gallery.addEventListener("keydown", (event) => {
      if (event.key !== "f" || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      pick.flip();
    });
  }
})();
