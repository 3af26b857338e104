// A sortable table of everything that was called. Only the rows in sight are in the page.
import {categoryColour, count, el, percent, short, time} from './common.js';

const ROW = 30; // pixels, as in style.css
const BEYOND = 12; // rows above and below those in sight
const TITLES = {
  cpu_op: 'operators', user_annotation: 'spans', kernel: 'GPU kernels', gpu_memcpy: 'GPU copies', gpu_memset: 'GPU fills',
  cuda_runtime: 'CUDA calls', cuda_driver: 'CUDA driver calls', gpu_user_annotation: 'spans on the GPU',
  python_function: 'Python functions',
};

export async function show(content, {ask, open, add}) {
  const view = {sort: 'self', descending: true, byShape: false, text: '', category: null, rows: []};
  const filter = el('input', {type: 'search', placeholder: 'Filter by name', 'aria-label': 'Filter by name', oninput: () => {
    view.text = filter.value.toLowerCase();
    arrange();
  }});
  const category = el('select', {'aria-label': 'What to show', onchange: () => {
    view.category = category.value;
    arrange();
  }});
  const shapes = el('input', {type: 'checkbox', onchange: () => load().catch((error) => (total.textContent = error.message))});
  const shapesLabel = el('label', {class: 'check'}, shapes, 'one row for each input shape');
  const total = el('span', {class: 'hint', role: 'status'});
  const head = el('tr');
  const columns = el('colgroup');
  const above = el('td');
  const below = el('td');
  const body = el('tbody');
  const scroller = el('div', {class: 'scroller', onscroll: () => draw(), tabIndex: 0, role: 'region', 'aria-label': 'Operators'},
    el('table', {class: 'operators'}, columns, el('thead', {}, head),
      el('tbody', {'aria-hidden': 'true'}, el('tr', {}, above)), body, el('tbody', {'aria-hidden': 'true'}, el('tr', {}, below))));
  content.append(el('div', {class: 'toolbar'}, filter, category, shapesLabel, total), scroller);

  let answer;
  let sum = 0;
  let most = 1;
  const share = (row) => (sum ? row.self / sum : 0);
  const list = () => [
    ['name', 'Name', null, (row) => row.name.toLowerCase()],
    ['calls', 'Calls', '76px', (row) => row.calls, (row) => count(row.calls)],
    ['self', 'Self time', '96px', (row) => row.self, (row) => time(row.self)],
    ['share', 'Share', '118px', share],
    ['total', 'Total time', '96px', (row) => row.total, (row) => time(row.total)],
    ['mean', 'Mean self', '96px', (row) => row.self / row.calls, (row) => time(row.self / row.calls)],
    ...(answer.has_device ? [['device', 'GPU time', '96px', (row) => row.device, (row) => (row.device ? time(row.device) : '–')]] : []),
    ...(answer.has_shapes ? [['shapes', 'Input shapes', '26%', (row) => row.shapes, (row) => row.shapes]] : []),
  ];

  async function load() {
    answer = await ask('operators', {by_shape: shapes.checked ? '1' : '0'});
    const kinds = [...new Set(answer.rows.map((row) => row.category))];
    view.category ??= kinds.includes('cpu_op') ? 'cpu_op' : 'all';
    category.replaceChildren(new Option('everything', 'all'),
      ...kinds.map((kind) => new Option(TITLES[kind] ?? kind, kind)));
    category.value = view.category;
    shapesLabel.hidden = !answer.has_shapes;
    arrange();
  }

  function arrange() {
    const known = list();
    const [, , , key] = known.find(([name]) => name === view.sort) ?? known[2];
    const kind = answer.rows.filter((row) => view.category === 'all' || row.category === view.category);
    sum = kind.reduce((all, row) => all + row.self, 0);
    most = kind.reduce((longest, row) => Math.max(longest, row.self), 1e-9);
    view.rows = kind.filter((row) => row.name.toLowerCase().includes(view.text));
    const order = view.descending ? -1 : 1;
    view.rows = view.rows.map((row) => [key(row), row]);
    view.rows.sort(([a], [b]) => (a < b ? -order : a > b ? order : 0));
    view.rows = view.rows.map(([, row]) => row);
    const left = answer.left_out ? `, ${count(answer.left_out)} left out` : '';
    total.textContent = `${count(view.rows.length)} rows${left}`;
    columns.replaceChildren(...known.map(([, , width]) => el('col', width ? {style: {width}} : {})));
    above.colSpan = below.colSpan = known.length;
    head.replaceChildren(...known.map(([name, title]) => {
      const sorted = name === view.sort;
      const sort = sorted ? (view.descending ? 'descending' : 'ascending') : 'none';
      return el('th', {scope: 'col', 'aria-sort': sort, class: name},
        el('button', {onclick: () => by(name)}, title, el('span', {class: 'arrow', 'aria-hidden': 'true'}, sorted ? (view.descending ? '▼' : '▲') : '')));
    }));
    scroller.scrollTop = 0;
    draw(true);
  }

  function by(name) {
    view.descending = view.sort === name ? !view.descending : !['name', 'shapes'].includes(name);
    view.sort = name;
    arrange();
    head.querySelector(`th.${name} button`).focus();
  }

  let drawn = '';
  function draw(force) {
    const first = Math.max(0, Math.floor(scroller.scrollTop / ROW) - BEYOND);
    const last = Math.min(view.rows.length, Math.ceil((scroller.scrollTop + scroller.clientHeight) / ROW) + BEYOND);
    if (!force && drawn === `${first} ${last}`) return;
    drawn = `${first} ${last}`;
    above.style.height = `${first * ROW}px`;
    below.style.height = `${(view.rows.length - last) * ROW}px`;
    const known = list();
    body.replaceChildren(...view.rows.slice(first, last).map((row) => el('tr', {}, ...known.map(([name, , , , text]) => cell(row, name, text)))));
  }

  function cell(row, name, text) {
    if (name === 'name') {
      return el('th', {scope: 'row', class: 'name'},
        el('i', {style: {background: categoryColour(row.category)}}),
        el('button', {class: 'link', title: `${row.name}\nShow in the timeline`, onclick: () => open('timeline', {text: row.name})}, short(row.name)));
    }
    if (name === 'share') {
      return el('td', {class: 'share'}, el('div', {class: 'track'}, el('div', {style: {width: `${(100 * row.self) / most}%`}})), el('span', {}, percent(share(row))));
    }
    return el('td', {class: name, title: name === 'shapes' ? row.shapes : null}, text(row));
  }

  await load();
  add();
  draw(true);
  const observer = new ResizeObserver(() => draw());
  observer.observe(scroller);
  const themed = () => draw(true);
  addEventListener('theme', themed);
  return () => {
    observer.disconnect();
    removeEventListener('theme', themed);
  };
}
