"use strict";
// Draws every chart of the page, again when the colours of the page change, and narrower for paper.
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const config = { displayModeBar: false };
  // a template of plotly: the look of every chart, as far as the chart itself says nothing else
  const axis = {
    showgrid: true, gridcolor: "var(--line)",
    showline: true, linecolor: "var(--line)",
    zeroline: true, zerolinecolor: "var(--line)",
  };
  const look = {
    layout: {
      margin: { l: 60, r: 12, t: 24, b: 44 },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: "var(--text)", family: "system-ui, sans-serif", size: 12 },
      hoverlabel: {
        align: "left", bgcolor: "var(--panel)", bordercolor: "var(--line)", font: { color: "var(--text)" },
      },
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
      dragmode: false,
      xaxis: axis,
      yaxis: axis,
    },
    data: {
      scatter: [{ hoverinfo: "text", mode: "lines+markers", line: { width: 2 }, marker: { size: 5 } }],
      bar: [{ hoverinfo: "text" }],
      heatmap: [{
        hoverinfo: "text", texttemplate: "%{text}", textfont: { size: 11 }, hoverongaps: false, xgap: 1, ygap: 1,
        // bad to good; told apart by every kind of colour vision, and readable on white and on black
        colorscale: [[0, "#a50026"], [0.25, "#f46d43"], [0.5, "#fee090"], [0.75, "#cfe5f0"], [1, "#74b0d9"]],
        colorbar: { thickness: 12, outlinewidth: 0 },
      }],
    },
  };

  function coloured(value, style) {
    if (Array.isArray(value)) return value.map((item) => coloured(item, style));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, coloured(item, style)]));
    }
    const name = typeof value === "string" && /^var\((--[a-z]+)\)$/.exec(value);
    return name ? style.getPropertyValue(name[1]).trim() : value;
  }

  // where cells are narrow, only the crosses of those that failed have room
  function fitted(data, width) {
    const [heat] = data;
    if (heat.type !== "heatmap" || (width - 220) / heat.z[0].length >= 33) return;
    heat.text = heat.text.map((row) => row.map((text) => (text.includes("✕") ? "✕" : "")));
  }

  function draw(paper) {
    document.documentElement.classList.toggle("paper", paper);
    for (const rest of document.querySelectorAll("details.findings")) rest.open = paper;
    const style = getComputedStyle(document.documentElement);
    const drawn = Object.entries(figures).map(([id, figure]) => {
      const place = document.getElementById(id);
      const { data, layout } = coloured(figure, style);
      layout.template = coloured(look, style);
      layout.width = paper ? (place.closest(".plots") ? 320 : 1000) : place.clientWidth;
      if (paper) layout.template.layout.font.size = 10;
      if (paper && data[0].type !== "heatmap") layout.height = Math.min(layout.height, 260);
      fitted(data, layout.width);
      return Plotly.react(place, data, layout, config);
    });
    return Promise.all(drawn).then(() => { document.documentElement.dataset.drawn = String(drawn.length); });
  }

  let waiting;
  window.addEventListener("resize", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => draw(document.documentElement.classList.contains("paper")), 150);
  });
  window.addEventListener("beforeprint", () => draw(true));
  window.addEventListener("afterprint", () => draw(false));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw(false));
  draw(false);
})();
