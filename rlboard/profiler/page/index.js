// The page of the tab Profile: which trace, which of its views. TensorBoard calls `render` in a frame of its own.
import {bytes, el} from './common.js';
import * as overview from './overview.js';
import * as operators from './operators.js';
import * as timeline from './timeline.js';
import * as memory from './memory.js';

const VIEWS = {overview, operators, timeline, memory};
const TITLES = {overview: 'Overview', operators: 'Operators', timeline: 'Timeline', memory: 'Memory'};
const KEPT = 'rlboard.profile';
const POLL = 10_000;

const state = {view: 'overview', run: null, trace: null, ...remembered()};
let runs = [];
let shown = null; // the view on the page, and what stops it
let answers = new Map();

function remembered() {
  try {
    return JSON.parse(sessionStorage.getItem(KEPT)) ?? {};
  } catch {
    return {};
  }
}

function remember() {
  try {
    sessionStorage.setItem(KEPT, JSON.stringify(state));
  } catch {
    // A browser that keeps nothing starts at the overview.
  }
}

const page = {};

export async function render() {
  document.documentElement.lang = 'en';
  document.head.append(el('link', {rel: 'stylesheet', href: './style.css'}));
  followTheme();
  page.run = el('select', {id: 'run', onchange: () => choose(page.run.value, null)});
  page.trace = el('select', {id: 'trace', onchange: () => choose(state.run, page.trace.value)});
  page.download = el('a', {class: 'button', id: 'download', download: '', title: 'The file of this trace'}, 'Download');
  page.perfetto = el('span', {class: 'hint'}, 'and drag it into ',
    el('a', {href: 'https://ui.perfetto.dev', target: '_blank', rel: 'noreferrer'}, 'ui.perfetto.dev'),
    ' for every detail');
  page.tabs = el('div', {class: 'tabs', role: 'tablist', 'aria-label': 'Views', onkeydown: moveTab},
    ...Object.entries(TITLES).map(([view, title]) =>
      el('button', {role: 'tab', id: `tab-${view}`, 'aria-controls': 'view', onclick: () => open(view)}, title)));
  page.notice = el('div', {class: 'notice', role: 'status', hidden: true});
  page.view = el('main', {id: 'view', role: 'tabpanel'});
  page.bar = el('header', {},
    el('label', {}, 'Run', page.run), el('label', {}, 'Trace', page.trace),
    el('div', {class: 'export'}, page.download, page.perfetto));
  document.body.append(page.bar, page.tabs, page.notice, page.view);
  await refresh();
  setInterval(() => document.hidden || refresh(), POLL);
}

/** TensorBoard has its theme as a class of its body. */
function followTheme() {
  const system = matchMedia('(prefers-color-scheme: dark)');
  let outside = null;
  try {
    outside = parent !== window ? parent.document.body : null;
  } catch {
    // Not TensorBoard's frame.
  }
  const follow = () => {
    document.documentElement.classList.toggle('dark', outside ? outside.classList.contains('dark-mode') : system.matches);
    dispatchEvent(new Event('theme'));
  };
  if (outside) new MutationObserver(follow).observe(outside, {attributes: true, attributeFilter: ['class']});
  else system.addEventListener('change', follow);
  follow();
}

/** Asks which traces there are, and shows the one chosen where it is new or has been written again. */
async function refresh() {
  let found;
  try {
    found = await (await fetch('./traces')).json();
  } catch {
    if (!shown) say('TensorBoard does not answer: is it still running?');
    return;
  }
  if (shown && JSON.stringify(found) === JSON.stringify(runs)) return;
  const before = current()?.modified;
  runs = found;
  const same = shown && current()?.modified === before && before !== undefined;
  choose(state.run, state.trace, same);
}

const current = () => runs.find(({run}) => run === state.run)?.traces.find(({name}) => name === state.trace);

function choose(run, trace, keep = false) {
  const entry = runs.find((each) => each.run === run) ?? runs.at(-1);
  page.bar.hidden = page.tabs.hidden = !entry;
  if (!entry) {
    shown?.stop?.();
    shown = null;
    page.view.replaceChildren(el('div', {class: 'empty'}, el('h2', {}, 'No traces yet'),
      el('p', {}, 'They appear here by themselves: train with ', el('code', {}, '--profile'),
        ', or put what torch.profiler exports into ', el('code', {}, '<run>/profile/NAME.trace.json.gz'), '.')));
    return;
  }
  state.run = entry.run;
  state.trace = (entry.traces.find(({name}) => name === trace) ?? entry.traces[0]).name;
  remember();
  page.run.replaceChildren(...runs.map((each) => new Option(each.run, each.run, false, each.run === state.run)));
  page.trace.replaceChildren(...entry.traces.map(({name, size}) =>
    new Option(`${title(name)} (${bytes(size)})`, name, false, name === state.trace)));
  page.download.href = `./download?${new URLSearchParams({run: state.run, trace: state.trace})}`;
  if (!keep) {
    answers = new Map();
    open(state.view);
  }
}

const title = (name) => name.replace(/^(plugins\/)?profile\//, '').replace(/(\.pt)?\.trace\.json(\.gz)?$/, '');

function moveTab(event) {
  const names = Object.keys(TITLES);
  const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
  if (!step) return;
  const view = names[(names.indexOf(state.view) + step + names.length) % names.length];
  open(view);
  document.getElementById(`tab-${view}`).focus();
}

/** Shows a view of the chosen trace; `wish` is what it should begin with. */
async function open(view, wish = {}) {
  state.view = view in VIEWS ? view : 'overview';
  remember();
  for (const name of Object.keys(TITLES)) {
    const tab = document.getElementById(`tab-${name}`);
    tab.setAttribute('aria-selected', String(name === state.view));
    tab.tabIndex = name === state.view ? 0 : -1;
  }
  page.view.setAttribute('aria-labelledby', `tab-${state.view}`);
  shown?.stop?.();
  const here = (shown = {});
  const content = el('div', {class: 'content'});
  page.notice.hidden = true;
  page.view.className = state.view;
  page.view.replaceChildren();
  const waiting = setTimeout(() => progress(0), 250);
  const isHere = () => shown === here;
  const ask = (name, parameters, signal) => request(name, parameters, signal, (part) => isHere() && progress(part));
  try {
    const first = await ask('overview'); // what is wrong with a trace is said on every page
    if (!isHere()) return;
    page.notice.hidden = !first.notice;
    page.notice.textContent = first.notice;
    const stop = await VIEWS[state.view].show(content, {ask, open, wish, add: () => isHere() && attach()});
    if (isHere()) here.stop = stop;
    else stop?.();
  } catch (error) {
    if (isHere()) say(error.message);
  } finally {
    clearTimeout(waiting);
  }

  function attach() {
    clearTimeout(waiting);
    page.view.replaceChildren(content);
  }
  function progress(part) {
    if (page.view.contains(content)) return; // it was shown before, and waits with what it shows
    if (!page.view.querySelector('progress')) {
      page.view.replaceChildren(el('div', {class: 'empty', role: 'status'}, el('p', {}, 'Reading the trace …'),
        el('progress', {max: 1})));
    }
    if (part) page.view.querySelector('progress').value = part;
  }
}

function say(text) {
  page.view.replaceChildren(el('div', {class: 'empty', role: 'alert'}, el('p', {id: 'problem'}, text)));
}

/** What the server answers about the chosen trace, waiting where it is still being read. */
async function request(name, parameters = {}, signal, progress) {
  const query = new URLSearchParams({run: state.run, trace: state.trace, ...parameters});
  const address = `./${name}?${query}`;
  if (answers.has(address)) return answers.get(address);
  const kept = answers;
  for (;;) {
    const answer = await fetch(address, {signal});
    const value = await answer.json().catch(() => ({error: `TensorBoard cannot answer: ${answer.status}`}));
    if (answer.status === 202) {
      progress(value.reading);
      await new Promise((done) => setTimeout(done, 100));
      continue;
    }
    if (!answer.ok) throw new Error(value.error ?? `TensorBoard cannot answer: ${answer.status}`);
    if (name === 'overview' || name === 'operators' || name === 'memory') kept.set(address, value);
    return value;
  }
}
