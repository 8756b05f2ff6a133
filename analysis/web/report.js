// Draws the figures of a report from the JSON block of the page.
//
// A figure is an object with these keys:
//   kind      "facts", "table", "heat" or "lines"
//   query     index of the query whose rows it shows
//   controls  [{column, name}]: the reader chooses one value of each column
//   present, absent   columns that must, or must not, have a value
//   panels    columns: one panel for each combination of their values
//   prefix    {column: what stands before its values in titles and legends}
//   percent   true, or columns: shares to be shown as percent
//   table:    columns that are shown, all if not given
//   heat:     row, column, value; mark: {column, most} frames cells up to that value
//   lines:    x, series (columns), values [{column, name, and lower, upper or spread}], or picks
//             [{column, name}], of which the reader chooses one; zero: the axis holds 0; free: each
//             panel has its own axis
// What comes from the store becomes text nodes and attributes, never markup.
"use strict";
(() => {
  const report = JSON.parse(document.getElementById("report").textContent);
  const COLORS = ["#4c9be8", "#e8793a", "#3fae6a", "#d65f8f", "#a17fe0",
                  "#b59a1e", "#2fb5b5", "#e05252", "#8a8f98", "#b0764c"];
  const DASHES = ["", "6 3", "2 3"];
  const SCALE = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];

  // ---- elements ----

  function fill(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes)) {
      if (value !== undefined && value !== null) node.setAttribute(name, value);
    }
    node.append(...children.flat(Infinity).filter((child) => child !== null));
    return node;
  }
  const h = (tag, attributes = {}, ...children) =>
    fill(document.createElement(tag), attributes, children);
  const s = (tag, attributes = {}, ...children) =>
    fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

  // A sentence in which `such parts` are code.
  const sentence = (text) =>
    text.split("`").map((part, index) => (index % 2 ? h("code", {}, part) : part));

  // ---- values ----

  const isNumber = (value) => typeof value === "number";
  const labels = new Map(Object.entries(report.labels));
  const label = (value) => labels.get(value) ?? show(value);
  const words = (column) => column.replaceAll("_", " ");
  const distinct = (values) => [...new Set(values)];
  const isPercent = (figure, column) =>
    figure.percent === true || (figure.percent ?? []).includes(column);

  function show(value, percent = false) {
    if (value === null) return "–";
    if (typeof value === "boolean") return value ? "yes" : "no";
    if (!isNumber(value)) return String(value);
    if (percent) return `${(100 * value).toFixed(1)} %`;
    if (Number.isInteger(value)) return value.toLocaleString("en-US");
    if (Math.abs(value) < 1e-3) return value.toExponential(1);
    if (Math.abs(value) >= 1000) return Math.round(value).toLocaleString("en-US");
    return String(Number(value.toPrecision(3)));
  }

  function rowsOf({columns, data}) {
    // Text is kept once for all rows that have it.
    const whole = data.map((column) => column.codes
      ? column.codes.map((code) => code === null ? null : column.values[code]) : column);
    return whole[0].map((_, index) =>
      Object.fromEntries(columns.map((column, place) => [column, whole[place][index]])));
  }

  // Rows in groups by the values of some columns, in order of appearance.
  function grouped(rows, columns) {
    const groups = new Map();
    for (const row of rows) {
      const key = JSON.stringify(columns.map((column) => row[column]));
      if (!groups.has(key)) groups.set(key, []);
      groups.get(key).push(row);
    }
    return [...groups.values()];
  }

  const nameOf = (figure, row, columns) => columns
    .map((column) => (figure.prefix?.[column] ?? "") + label(row[column])).join(" · ");

  const describe = (figure, row) => Object.entries(row)
    .map(([column, value]) => `${words(column)}: ${show(value, column === figure.value
      && isPercent(figure, column))}`).join("\n");

  function csv(columns, rows) {
    const cell = (value) => {
      const text = value === null ? "" : String(value);
      return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
    };
    return [columns, ...rows.map((row) => columns.map((column) => row[column]))]
      .map((line) => line.map(cell).join(",") + "\r\n").join("");
  }

  // ---- tables and facts ----

  function tableOf(figure, rows, columns, name) {
    const isText = (column) => rows.every((row) => !isNumber(row[column]));
    const style = (column, row) => {
      if (!isText(column)) return "number";
      return row && String(row[column]).length > 40 ? "long" : null;
    };
    const head = columns.map((column) =>
      h("th", {scope: "col", class: style(column)}, words(column)));
    const body = rows.map((row) => h("tr", {}, columns.map((column, place) =>
      h(place ? "td" : "th", {scope: place ? null : "row", class: style(column, row)},
        isText(column) ? label(row[column]) : show(row[column], isPercent(figure, column))))));
    return h("div", {class: "scroll", role: "group", "aria-label": name},
      h("table", {}, h("thead", {}, h("tr", {}, head)), h("tbody", {}, body)));
  }

  const draw = {};

  draw.facts = (figure, rows) => rows.map((row) => h("div", {class: "panel"},
    h("h5", {}, label(row[figure.name])),
    h("dl", {}, Object.entries(row).filter(([column]) => column !== figure.name)
      .map(([column, value]) => [h("dt", {}, words(column)), h("dd", {}, show(value))]))));

  draw.table = (figure, rows) => panelsOf(figure, rows, (own, name) =>
    tableOf(figure, own, figure.columns ?? Object.keys(own[0]), name));

  // One panel for each combination of the panel columns, those that share the first side by side;
  // `make(rows, accessible name)` fills it.
  function panelsOf(figure, rows, make) {
    const columns = figure.panels ?? [];
    const panelOf = (own) => {
      const title = nameOf(figure, own[0], columns);
      const name = title ? `${figure.title}, ${title}` : figure.title;
      return h("div", {class: "panel"}, title ? h("h5", {}, title) : null, make(own, name));
    };
    const panels = grouped(rows, columns).map((own) => [own[0][columns[0]], panelOf(own)]);
    const firsts = distinct(panels.map(([first]) => first));
    if (firsts.length < 2 || firsts.length === panels.length) return panels.map(([, panel]) => panel);
    return firsts.map((first) => h("div", {class: "panels side"},
      panels.filter(([own]) => own === first).map(([, panel]) => panel)));
  }

  // ---- heat maps ----

  function color(share) {
    const place = Math.min(Math.max(share, 0), 1) * (SCALE.length - 1);
    const index = Math.min(Math.floor(place), SCALE.length - 2);
    return SCALE[index].map((low, channel) =>
      Math.round(low + (place - index) * (SCALE[index + 1][channel] - low)));
  }
  const rgb = (channels) => `rgb(${channels.join(" ")})`;
  const isDark = ([red, green, blue]) => 0.3 * red + 0.59 * green + 0.11 * blue < 140;

  const short = (text, length = 16) =>
    text.length > length ? text.slice(0, length - 1) + "…" : text;

  function cellText(figure, value) {
    if (isPercent(figure, figure.value)) return (100 * value).toFixed(0);
    return value >= 10 ? value.toFixed(0) : value.toFixed(1);
  }

  draw.heat = (figure, rows) => {
    const most = Math.max(...rows.map((row) => row[figure.value]).filter(isNumber), 0);
    const percent = isPercent(figure, figure.value);
    const stops = SCALE.map((channels, index) =>
      s("stop", {offset: index / (SCALE.length - 1), "stop-color": rgb(channels)}));
    const id = `scale-${figure.id}`;
    const bar = s("svg", {width: 120, height: 12, "aria-hidden": "true"},
      s("linearGradient", {id}, stops),
      s("rect", {width: 120, height: 12, fill: `url(#${id})`}));
    return [
      h("div", {class: "scale"}, show(0, percent), bar, show(most, percent)),
      panelsOf(figure, rows, (own, name) => heatMap(figure, own, name, most || 1)),
    ];
  };

  function heatMap(figure, rows, name, most) {
    const down = distinct(rows.map((row) => row[figure.row]));
    const columns = distinct(rows.map((row) => row[figure.column]));
    // Tasks against tasks: in one order, whichever appears first.
    const across = distinct([...down.filter((value) => columns.includes(value)), ...columns]);
    const size = across.length > 30 ? 14 : across.length > 12 ? 24 : 30;
    const widest = (values) => Math.max(...values.map((value) => short(label(value)).length));
    const left = 8 + 6.6 * widest(down), top = 10 + 4.9 * widest(across);
    // The last labels lean out to the right.
    const width = left + size * across.length + 4.9 * widest(across);
    const height = top + size * down.length + 4;
    const texts = [
      ...down.map((value, place) => s("text",
        {x: left - 5, y: top + size * (place + 0.5) + 4, "text-anchor": "end"},
        short(label(value)), s("title", {}, label(value)))),
      ...across.map((value, place) => {
        const x = left + size * (place + 0.5), y = top - 6;
        return s("text", {x, y, transform: `rotate(-45 ${x} ${y})`},
          short(label(value)), s("title", {}, label(value)));
      }),
    ];
    const cells = rows.map((row) => {
      const x = left + size * across.indexOf(row[figure.column]);
      const y = top + size * down.indexOf(row[figure.row]);
      const value = row[figure.value];
      const isMarked = figure.mark && isNumber(row[figure.mark.column])
        && row[figure.mark.column] <= figure.mark.most;
      const fillColor = isNumber(value) ? color(value / most) : null;
      const box = {x: x + 0.5, y: y + 0.5, width: size - 1, height: size - 1};
      return s("g", {}, s("title", {}, describe(figure, row)),
        s("rect", fillColor ? {...box, fill: rgb(fillColor)} : {...box, class: "empty"}),
        fillColor && size > 14 ? s("text", {
          x: x + size / 2, y: y + size / 2 + 4, "text-anchor": "middle",
          class: isDark(fillColor) ? "light" : "dark",
        }, cellText(figure, value)) : null,
        isMarked ? s("rect", {...box, class: "marked"}) : null);
    });
    const text = `${name}: ${words(figure.value)} by ${words(figure.row)} and `
      + `${words(figure.column)}, ${rows.length} cells. The rows are below the figure.`;
    return h("div", {class: "scroll", role: "group", "aria-label": name},
      s("svg", {width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": text},
        texts, cells));
  }

  // ---- lines ----

  // Round numbers over a range, about five of them.
  function ticks(low, high) {
    const rough = (high - low) / 4;
    const unit = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].map((factor) => factor * unit).find((one) => one >= rough);
    const found = [];
    for (let tick = Math.ceil(low / step - 1e-9); tick * step <= high + step * 1e-9; tick++) {
      found.push(tick * step);
    }
    return found;
  }

  function linesOf(figure, rows) {
    return grouped(rows, figure.series ?? []).flatMap((own) => figure.values.map((value) => ({
      name: [nameOf(figure, own[0], figure.series ?? []), value.name].filter(Boolean).join(" · "),
      points: own.map((row) => {
        const y = row[value.column];
        const spread = value.spread ? row[value.spread] : null;
        return {
          row, x: row[figure.x], y,
          lower: isNumber(spread) ? y - spread : row[value.lower],
          upper: isNumber(spread) ? y + spread : row[value.upper],
        };
      }).filter((point) => isNumber(point.x) && isNumber(point.y)).sort((a, b) => a.x - b.x),
    })));
  }

  function range(values, isRoomy) {
    let low = Math.min(...values), high = Math.max(...values);
    if (low === high) [low, high] = [low - 0.5, high + 0.5];
    const room = isRoomy ? 0.04 * (high - low) : 0;
    return [low - room, high + room];
  }

  function heights(figure, lines) {
    const all = lines.flatMap((line) => line.points)
      .flatMap((point) => [point.y, point.lower, point.upper]).filter(isNumber);
    return range(figure.zero || !all.length ? [0, ...all] : all, true);
  }

  draw.lines = (figure, rows) => {
    const all = linesOf(figure, rows);
    const names = distinct(all.map((line) => line.name));
    const common = heights(figure, all);
    const panels = panelsOf(figure, rows, (own, name) => {
      const lines = linesOf(figure, own);
      return chart(figure, lines, name, names, figure.free ? heights(figure, lines) : common);
    });
    return [names.length > 1 ? legend(names, panels) : null, panels];
  };

  const strokeOf = (place) => ({
    stroke: COLORS[place % COLORS.length],
    "stroke-dasharray": DASHES[Math.floor(place / COLORS.length) % DASHES.length],
  });

  // Buttons that bring one line forward.
  function legend(names, panels) {
    const buttons = names.map((name, place) => h("button", {type: "button", "aria-pressed": "false"},
      s("svg", {width: 26, height: 10, "aria-hidden": "true"},
        s("line", {x1: 0, x2: 26, y1: 5, y2: 5, "stroke-width": 3, ...strokeOf(place)})), name));
    buttons.forEach((button, place) => button.addEventListener("click", () => {
      const isOn = button.getAttribute("aria-pressed") !== "true";
      buttons.forEach((other) => other.setAttribute("aria-pressed", String(isOn && other === button)));
      for (const panel of panels) {
        for (const line of panel.querySelectorAll("[data-line]")) {
          line.classList.toggle("dim", isOn && line.dataset.line !== String(place));
        }
      }
    }));
    return h("div", {class: "legend", role: "group", "aria-label": "Bring one line forward"}, buttons);
  }

  function chart(figure, lines, name, names, [low, high]) {
    const width = 340, height = 220, left = 52, right = 10, top = 8, bottom = 36;
    const [first, last] = range(lines.flatMap((line) => line.points).map((point) => point.x), false);
    const x = (value) => left + (value - first) / (last - first) * (width - left - right);
    const y = (value) => height - bottom - (value - low) / (high - low) * (height - top - bottom);
    const percent = isPercent(figure, figure.values[0].column);
    const axes = [
      ticks(low, high).flatMap((tick) => [
        s("line", {class: "grid", x1: left, x2: width - right, y1: y(tick), y2: y(tick)}),
        s("text", {x: left - 6, y: y(tick) + 4, "text-anchor": "end"},
          percent ? `${Number((100 * tick).toPrecision(3))} %` : String(Number(tick.toPrecision(3)))),
      ]),
      ticks(first, last)
        .filter((tick) => figure.x !== "layer" || Number.isInteger(tick))
        .map((tick) => s("text", {x: x(tick), y: height - bottom + 15, "text-anchor": "middle"},
          String(Number(tick.toPrecision(3))))),
      s("line", {class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom}),
      s("text", {x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle"},
        words(figure.x)),
    ];
    const drawn = lines.map((line) => {
      const place = names.indexOf(line.name);
      const banded = line.points.filter((point) => isNumber(point.lower) && isNumber(point.upper));
      const edge = [
        ...banded.map((point) => `${x(point.x)},${y(point.upper)}`),
        ...banded.reverse().map((point) => `${x(point.x)},${y(point.lower)}`),
      ];
      const stroke = strokeOf(place);
      return s("g", {"data-line": place},
        banded.length > 1 ? s("polygon", {class: "band", points: edge.join(" "), fill: stroke.stroke})
          : null,
        s("polyline", {class: "line", ...stroke,
          points: line.points.map((point) => `${x(point.x)},${y(point.y)}`).join(" ")}),
        line.points.map((point) => s("circle",
          {cx: x(point.x), cy: y(point.y), r: 2.6, fill: stroke.stroke},
          s("title", {}, describe(figure, point.row)))));
    });
    const text = `${name}: ${words(figure.values[0].column)} by ${words(figure.x)}, `
      + `${lines.length} lines. The rows are below the figure.`;
    return h("div", {class: "scroll", role: "group", "aria-label": name},
      s("svg", {width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": text},
        axes, drawn));
  }

  // ---- figures ----

  // The keyboard stops at what it has to scroll, and at nothing else.
  function reach() {
    for (const box of document.querySelectorAll(".scroll")) {
      box.tabIndex = box.scrollWidth > box.clientWidth ? 0 : -1;
    }
  }

  const ascending = (a, b) => (isNumber(a) && isNumber(b) ? a - b : 0);

  // A slider for numbers, a list for names; `choose` gets a value now and at each change.
  function control(name, values, shown, choose) {
    choose(values[0]);
    if (!values.every(isNumber)) {
      const options = values.map((value, place) => h("option", {value: place}, shown(value)));
      const list = h("select", {}, options);
      list.addEventListener("change", () => choose(values[Number(list.value)]));
      return h("label", {}, name, list);
    }
    const slider = h("input", {type: "range", min: 0, max: values.length - 1, step: 1, value: 0});
    const output = h("output", {}, shown(values[0]));
    slider.setAttribute("aria-valuetext", shown(values[0]));
    slider.addEventListener("input", () => {
      const value = values[Number(slider.value)];
      output.textContent = shown(value);
      slider.setAttribute("aria-valuetext", shown(value));
      choose(value);
    });
    return h("label", {}, name, slider, output);
  }

  function figureOf(given, id) {
    let figure = {...given, id};
    const query = report.queries[figure.query];
    const all = rowsOf(query);
    const rows = all
      .filter((row) => (figure.present ?? []).every((column) => row[column] !== null))
      .filter((row) => (figure.absent ?? []).every((column) => row[column] === null));
    const chosen = {};
    const body = h("div", {class: "panels"});
    const csvLink = h("a", {download: `${query.name}.csv`}, "Download these rows as CSV");
    const drawnRows = h("p", {class: "note"});
    const details = h("details", {}, h("summary", {}, "Rows"));
    const rowsBox = h("div", {class: "rows"});
    details.append(rowsBox);
    let plotted = rows, isReady = false;

    function fillRows() {
      rowsBox.replaceChildren();
      if (details.open) {
        rowsBox.append(tableOf({}, plotted, query.columns, `Rows of ${figure.title}`));
      }
    }

    function redraw() {
      if (!isReady) return;
      plotted = rows.filter((row) =>
        Object.entries(chosen).every(([column, value]) => row[column] === value));
      body.replaceChildren(...[draw[figure.kind](figure, plotted)].flat(Infinity).filter(Boolean));
      if (csvLink.href) URL.revokeObjectURL(csvLink.href);
      csvLink.href = URL.createObjectURL(
        new Blob([csv(query.columns, plotted)], {type: "text/csv;charset=utf-8"}));
      const conditions = [
        ...Object.entries(chosen).map(([column, value]) => `${column} = ${value}`),
        ...(figure.present ?? []).map((column) => `${column} is not null`),
        ...(figure.absent ?? []).map((column) => `${column} is null`),
      ];
      drawnRows.textContent = plotted.length === all.length
        ? `All its ${show(plotted.length)} rows are shown.`
        : `Of its ${show(all.length)} rows, the ${show(plotted.length)} with `
          + `${conditions.join(" and ")} are shown.`;
      fillRows();
      reach();
    }

    const controls = (figure.controls ?? []).flatMap(({column, name}) => {
      const values = distinct(rows.map((row) => row[column])).sort(ascending);
      const made = control(name ?? words(column), values, (value) => show(value), (value) => {
        chosen[column] = value;
        redraw();
      });
      return values.length > 1 ? [made] : [h("span", {}, `${name ?? words(column)}: ${show(values[0])}`)];
    });
    if (figure.picks) {
      const names = figure.picks.map((pick) => pick.name);
      controls.push(control("shown", names, String, (name) => {
        figure = {...figure, values: [{column: figure.picks.find((pick) => pick.name === name).column}]};
        redraw();
      }));
    }
    details.addEventListener("toggle", () => {
      fillRows();
      reach();
    });
    isReady = true;
    redraw();
    return h("figure", {id, "aria-labelledby": `${id}-title`},
      h("figcaption", {}, h("h4", {id: `${id}-title`}, figure.title),
        figure.text ? h("p", {}, figure.text) : null),
      controls.length ? h("div", {class: "controls"}, controls) : null,
      body,
      h("div", {class: "tools"}, csvLink, details,
        h("details", {}, h("summary", {}, "SQL"), h("pre", {tabindex: 0}, query.sql), drawnRows)));
  }

  // ---- the page ----

  function sectionOf(section, id) {
    return h("section", {"aria-labelledby": `${id}-title`, id},
      h("h3", {id: `${id}-title`}, section.title),
      section.missing ? h("p", {}, sentence(section.missing)) : null,
      (section.notes ?? []).map((note) => h("p", {class: "note"}, sentence(note))),
      (section.figures ?? []).map((figure, place) => figureOf(figure, `${id}-${place}`)));
  }

  document.getElementById("place").textContent = `Store ${report.store}`;
  const contents = report.parts.map((part, place) => h("li", {}, part.title, h("ul", {},
    part.sections.map((section, index) =>
      h("li", {}, h("a", {href: `#part-${place}-${index}`}, section.title))))));
  document.getElementById("contents").append(h("ul", {}, contents));
  document.getElementById("content").append(...report.parts.map((part, place) => h("section", {},
    h("h2", {}, part.title),
    part.sections.map((section, index) => sectionOf(section, `part-${place}-${index}`)))));
  reach();
  window.addEventListener("resize", reach);
})();
