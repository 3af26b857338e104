// Where a step's time goes, what took longest, and what that suggests.
import {bytes, count, el, percent, short, spanColour, time} from './common.js';

export async function show(content, {ask, open, add}) {
  const trace = await ask('overview');
  content.append(
    cards(trace),
    hints(trace),
    el('div', {class: 'columns'}, steps(trace), spans(trace)),
    operators(trace, open),
  );
  add();
  const repaint = () => content.querySelectorAll('[data-span]').forEach(paint);
  repaint();
  addEventListener('theme', repaint);
  return () => removeEventListener('theme', repaint);
}

const paint = (element) =>
  element.style.setProperty('background', spanColour(element.dataset.span, Number(element.dataset.place)));

const part = (tag, span, place, properties = {}, ...children) => {
  const element = el(tag, properties, ...children);
  Object.assign(element.dataset, {span, place});
  return element;
};

function cards(trace) {
  const card = (name, value, note) =>
    el('div', {class: 'card figure'}, el('h3', {}, name), el('strong', {}, value), el('small', {}, note ?? ' '));
  const peak = trace.memory.reduce((most, each) => (each.peak > (most?.peak ?? -Infinity) ? each : most), null);
  const gpu = trace.gpu_busy;
  return el('section', {class: 'cards', 'aria-label': 'Summary'},
    card('Wall time', time(trace.wall), `${count(trace.events)} events`),
    trace.step_count
      ? card('Step', time(trace.step_mean), `mean of ${count(trace.step_count)}`)
      : card('Step', '–', 'none marked'),
    gpu === null
      ? card('Device', 'CPU', 'no GPU work in this trace')
      : card('GPU busy', percent(gpu), trace.devices[0] ?? 'of the wall time'),
    card('Peak memory', peak ? bytes(peak.peak) : '–', peak ? `allocated on ${peak.device}` : 'not recorded'));
}

function steps(trace) {
  const names = trace.spans.map(({name}) => name);
  const all = [...names.filter((name) => name !== 'other'), 'other'];
  const longest = Math.max(...trace.steps.map((step) => step.time));
  const rows = trace.steps.map((step) =>
    el('div', {class: 'step'},
      el('span', {class: 'name'}, step.name),
      el('div', {class: 'bar', style: {width: `${(100 * step.time) / longest}%`}},
        ...step.spans.map((took, place) => {
          const name = all[place] ?? 'other';
          const share = took / step.time;
          return took > 0 && part('div', name, place, {
            style: {flex: `${took} 0 0`},
            title: `${name}: ${time(took)}, ${percent(share)} of ${step.name}`,
          }, share * (step.time / longest) > 0.1 ? `${percent(share)}` : '');
        }).filter(Boolean)),
      el('span', {class: 'number'}, time(step.time))));
  const left = trace.step_count - trace.steps.length;
  return el('section', {class: 'card'},
    el('h2', {}, trace.step_count ? 'Where each step goes' : 'Where the time goes'),
    el('div', {class: 'legend'}, ...all.filter((name) => names.includes(name)).map((name) =>
      el('span', {}, part('i', name, all.indexOf(name)), name))),
    el('div', {class: 'steps', tabIndex: 0, role: 'group', 'aria-label': 'Steps'}, ...rows),
    left > 0 ? el('p', {class: 'hint'}, `and ${count(left)} more steps`) : null);
}

function spans(trace) {
  const rows = trace.spans.map(({name, time: took, share}, place) =>
    el('tr', {}, el('th', {scope: 'row'}, part('i', name, place), name),
      el('td', {}, time(took)), el('td', {}, percent(share))));
  return el('section', {class: 'card'}, el('h2', {}, trace.step_count ? 'The mean step' : 'All of it'),
    el('table', {class: 'plain'},
      el('thead', {}, el('tr', {}, el('th', {scope: 'col'}, 'span'), el('th', {scope: 'col'}, 'time'), el('th', {scope: 'col'}, 'share'))),
      el('tbody', {}, ...rows)));
}

function hints(trace) {
  if (!trace.hints.length) return '';
  return el('section', {class: 'card hints'}, el('h2', {}, 'Worth a look'),
    el('ul', {}, ...trace.hints.map((hint) => el('li', {}, hint))));
}

function operators(trace, open) {
  const longest = Math.max(1e-9, ...trace.top.map((each) => each.share));
  const hasDevice = trace.top.some((each) => each.device > 0);
  const heading = hasDevice ? 'Operators by self time, CPU and GPU' : 'Operators by self time';
  return el('section', {class: 'card'}, el('h2', {}, heading),
    el('ol', {class: 'top'}, ...trace.top.map((each) =>
      el('li', {},
        el('button', {class: 'link name', title: `${each.name}: show in the timeline`, onclick: () => open('timeline', {text: each.name})}, short(each.name)),
        el('div', {class: 'track'}, el('div', {style: {width: `${(100 * each.share) / longest}%`}})),
        el('span', {class: 'number'}, time(each.self + each.device)),
        el('span', {class: 'number'}, percent(each.share)),
        el('span', {class: 'number faint'}, `${count(each.calls)}×`)))),
    trace.top.length ? null : el('p', {class: 'hint'}, 'This trace has no operators.'));
}
