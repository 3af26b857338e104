// Runs before TensorBoard's own scripts, with `preset` in scope: what `rlboard dashboard` was asked for.
'use strict';

const SETTINGS = '_tb_global_settings';
const PINS = 'tb-saved-scalar-pins';
const SEEDED = 'rlboard.preset';

const stored = (key, otherwise) => {
  try {
    return JSON.parse(localStorage.getItem(key)) ?? otherwise;
  } catch {
    return otherwise;
  }
};

// Once for each preset, so that what the user chooses later in the gear menu stays.
if (localStorage.getItem(SEEDED) !== preset.id) {
  localStorage.setItem(SETTINGS, JSON.stringify({...stored(SETTINGS, {}), ...preset.settings}));
  localStorage.setItem(PINS, JSON.stringify([...new Set([...stored(PINS, []), ...preset.pins])]));
  localStorage.setItem(SEEDED, preset.id);
}

// The period's floor could not be lowered in this TensorBoard: press its reload button instead, while the user has
// neither switched reloading off nor chosen a longer period.
if (preset.press) {
  setInterval(() => {
    const {autoReload, autoReloadPeriodInMs} = stored(SETTINGS, {});
    if (autoReload && autoReloadPeriodInMs === preset.settings.autoReloadPeriodInMs && !document.hidden) {
      document.querySelector('app-header-reload button:not([disabled])')?.click();
    }
  }, preset.period);
}

// TensorBoard starts at the first tab that has content, and a run's first record is a text or a graph: go on to the
// curves when there are any, unless the user has been quicker.
if (!location.hash) {
  const stop = () => clearInterval(timer);
  const timer = setInterval(async () => {
    const plugins = await fetch('data/plugins_listing').then((answer) => answer.json(), () => ({}));
    if (plugins.timeseries?.enabled) {
      stop();
      if (location.hash !== '#timeseries') location.hash = 'timeseries';
    }
  }, preset.period);
  for (const type of ['pointerdown', 'keydown']) addEventListener(type, stop, {capture: true, once: true});
}

// Scalars and Custom Scalars keep the y axis of their first load: fit it to the new points, except where the user has
// zoomed or panned; a double click gives the chart back.
const CHART = 'tf-line-chart-data-loader';
const zoomed = new WeakSet();
for (const type of ['mousemove', 'wheel', 'dblclick']) {
  addEventListener(
    type,
    (event) => {
      const chart = event.composedPath().find((node) => node.localName === CHART);
      if (!chart) return;
      if (type === 'dblclick') zoomed.delete(chart);
      else if (event.buttons || (type === 'wheel' && event.altKey)) zoomed.add(chart);
    },
    {capture: true, passive: true},
  );
}
const fit = (root) => {
  for (const node of root.querySelectorAll('*')) {
    if (node.localName === CHART && !zoomed.has(node)) node.resetDomain?.();
    if (node.shadowRoot) fit(node.shadowRoot);
  }
};
setInterval(() => {
  if (!document.hidden && /^#(scalars|custom_scalars)/.test(location.hash)) fit(document);
}, preset.period);
