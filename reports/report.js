"use strict";
(() => {
  const data = JSON.parse(document.getElementById("charts").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const print = matchMedia("print");

  const colours = () => {
    const on_dark = dark.matches && !print.matches;
    return on_dark ? { ink: "#e8ebef", soft: "#a5afbc", grid: "#39414c", bad: "#ff8a4d", good: "#2fc796", blue: "#45aaf2" }
                   : { ink: "#16191d", soft: "#55606e", grid: "#d5dae1", bad: "#b23c00", good: "#00714f", blue: "#0072b2" };
  };

  const paint = () => {
    const c = colours();
    for (const doc of Bokeh.documents) {
      for (const model of doc.all_models) {
        if (model.type.endsWith("Axis")) {
          model.setv({ axis_label_text_color: c.soft, major_label_text_color: c.ink, axis_line_color: c.soft,
                       major_tick_line_color: c.soft, minor_tick_line_color: null,
                       axis_label_text_font_style: "normal", axis_label_text_font_size: "11px" });
        } else if (model.type === "Grid") {
          model.setv({ grid_line_color: model.grid_line_color === null ? null : c.grid });
        } else if (model.type === "Legend") {
          model.setv({ label_text_color: c.ink, inactive_fill_color: c.grid });
        } else if (model.type === "Label") {
          model.setv({ text_color: c[model.name] ?? c.soft });
        } else if (model.type === "GlyphRenderer" && model.name === "themed") {
          model.glyph.setv({ text_color: { value: c.ink } });
        } else if (model.type === "GlyphRenderer" && model.name === "area good") {
          model.glyph.setv({ fill_color: { value: c.blue } });
        } else if (model.type === "GlyphRenderer" && model.name === "good line") {
          model.glyph.setv({ line_color: { value: c.blue } });
        } else if (model.type === "GlyphRenderer" && model.name === "good") {
          model.glyph.setv({ fill_color: { value: c.blue }, line_color: { value: c.blue } });
        }
      }
    }
  };

  const narrow = matchMedia("(max-width: 42rem)");
  const fit = () => {
    for (const doc of Bokeh.documents) {
      for (const plot of doc.roots()) {
        plot.setv({ min_border_left: narrow.matches ? 96 : 138, min_border_right: narrow.matches ? 6 : 14 });
        for (const part of plot.above) if (part.type === "Legend") part.ncols = narrow.matches ? 2 : "auto";
        for (const axis of plot.left) axis.major_label_text_font_size = narrow.matches ? "9px" : "11px";
      }
    }
  };

  const range = () => {
    for (const doc of Bokeh.documents) {
      const plot = doc.roots().find((root) => root.id === data.roots.latency);
      if (plot) return plot.x_range;
    }
    return null;
  };

  const wire = () => {
    const shared = range();
    if (!shared) return;
    const all = { start: shared.start, end: shared.end };
    const show = (start, end) => shared.setv({ start, end });
    const pressed = (chosen) => {
      for (const id of ["zoom-all", "zoom-fault"]) {
        const button = document.getElementById(id);
        if (button) button.setAttribute("aria-pressed", String(id === chosen));
      }
    };
    const on = (id, act) => {
      const button = document.getElementById(id);
      if (button) button.addEventListener("click", () => { act(); pressed(id); });
    };
    const scale = (factor) => {
      const middle = (shared.start + shared.end) / 2, half = ((shared.end - shared.start) / 2) * factor;
      show(Math.max(all.start, middle - half), Math.min(all.end, middle + half));
    };
    const shift = (share) => {
      const width = shared.end - shared.start;
      const start = Math.min(Math.max(all.start, shared.start + width * share), all.end - width);
      show(start, start + width);
    };
    on("zoom-all", () => show(all.start, all.end));
    on("zoom-fault", () => show(data.fault.start, data.fault.end));
    on("zoom-in", () => scale(0.5));
    on("zoom-out", () => scale(2));
    on("left", () => shift(-0.25));
    on("right", () => shift(0.25));
    const keys = { ArrowLeft: "left", ArrowRight: "right", "+": "zoom-in", "-": "zoom-out" };
    const group = document.querySelector(".buttons");
    if (group) group.addEventListener("keydown", (event) => {
      const id = keys[event.key];
      if (!id || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      document.getElementById(id).click();
    });
  };

  // The pictures are hidden from screen readers, which have the words and the tables: so nothing in them takes the focus.
  const unfocus = (node) => {
    for (const one of node.querySelectorAll("*")) {
      if (one.tabIndex >= 0) one.tabIndex = -1;
      if (one.shadowRoot) unfocus(one.shadowRoot);
    }
  };

  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details.print:not([open])")];
    for (const details of opened) details.open = true;
  });
  addEventListener("afterprint", () => { for (const details of opened) details.open = false; });

  const roots = {};
  for (const [name, id] of Object.entries(data.roots)) roots[id] = "chart-" + name;
  const done = Bokeh.embed.embed_items(data.docs, [{ docid: data.docid, roots, root_ids: Object.keys(roots) }]);
  done.then(() => {
    paint();
    fit();
    wire();
    for (const chart of document.querySelectorAll(".chart")) unfocus(chart);
    narrow.addEventListener("change", fit);
    dark.addEventListener("change", paint);
    print.addEventListener("change", paint);
    document.documentElement.dataset.charts = "drawn";
  });
})();
