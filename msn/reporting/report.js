"use strict";
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const mouse = matchMedia("(hover: hover)").matches;
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const axis = (own) => ({
    automargin: true, zeroline: false, gridcolor: colour("--line"), linecolor: colour("--line"), ...own,
  });
  const layout = (own) => ({
    margin: { l: 8, r: 12, t: 28, b: 8 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, sans-serif", size: 12, color: colour("--ink") },
    hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: colour("--ink") } },
    // A finger must be able to scroll past a chart: there the buttons zoom.
    hovermode: "x unified", dragmode: mouse ? "zoom" : false,
    modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("--soft"), activecolor: colour("--accent") },
    legend: { orientation: "h", x: 0, y: -0.16, yanchor: "top", bgcolor: "rgba(0,0,0,0)" },
    ...own, xaxis: axis(own.xaxis), yaxis: axis(own.yaxis),
  });
  // Named one by one: plotly's own choice may hold buttons that leave the page.
  const settings = {
    responsive: true, displaylogo: false,
    modeBarButtons: [
      ["toImage"], mouse ? ["zoom2d", "pan2d"] : ["pan2d"], ["zoomIn2d", "zoomOut2d", "resetScale2d"],
    ],
  };
  const plots = [...document.querySelectorAll(".plot")].map((box) => [
    box, JSON.parse(box.parentElement.querySelector("script").textContent),
  ]);
  const draw = () => Promise.all(
    plots.map(([box, figure]) => Plotly.react(box, figure.data, layout(figure.layout), settings)),
  ).then(() => { document.documentElement.dataset.charts = String(plots.length); });
  draw();
  dark.addEventListener("change", draw);
})();
