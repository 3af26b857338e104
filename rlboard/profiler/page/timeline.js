// Every event as a flame chart: threads and streams as lanes, time from left to right, what is inside something below it.
import {count, el, eventColour, fitting, short, style, Surface, ticks, tickTime, time, Tooltip} from './common.js';

const RULER = 28; // pixels
const TITLE = 24;
const ROW = 22;
const GAP = 10;
const LETTER = 6.1; // about as wide as one is at 11 pixels
const NARROWEST = 0.005; // microseconds across the whole chart
const HELP = [['wheel, w s', 'zoom'], ['drag, a d', 'move'], ['↑ ↓, shift + wheel', 'scroll'], ['click', 'details'], ['/', 'search'], ['0', 'all of it']];

export async function show(content, {ask, add, wish}) {
  const search = el('input', {type: 'search', id: 'search', placeholder: 'Search names', 'aria-label': 'Search names', value: wish.text ?? ''});
  const found = el('span', {class: 'hint', role: 'status', id: 'found'});
  const button = (text, title, action) => el('button', {class: 'button', title, 'aria-label': title, onclick: action}, text);
  const previous = button('‹', 'previous match (shift + enter)', () => jump(true));
  const next = button('›', 'next match (enter)', () => jump(false));
  const scroller = el('div', {class: 'lanes'});
  const pane = el('div', {class: 'pane'});
  const spacer = el('div', {class: 'spacer'});
  scroller.append(pane, spacer);
  const details = el('section', {class: 'card details', 'aria-live': 'polite', 'aria-label': 'The selected event', hidden: true});
  const help = el('p', {class: 'hint keys'}, ...HELP.flatMap(([key, what]) => [el('kbd', {}, key), ` ${what} `]));
  content.append(
    el('div', {class: 'toolbar'}, search, previous, next, found, el('span', {class: 'spring'}),
      button('−', 'zoom out (s)', () => zoom(1.6)), button('+', 'zoom in (w)', () => zoom(1 / 1.6)),
      button('Reset', 'show all of it (0)', reset)),
    scroller, details, help);
  add();

  const tooltip = new Tooltip(content);
  const surface = new Surface(pane, 'Timeline of all events; arrow keys move, w and s zoom', draw);
  const canvas = surface.canvas;
  const {wall} = await ask('overview');
  let [begin, end] = [0, wall]; // what is shown
  let data = null; // what the server sent, about more than that
  let layout = []; // of each lane: its top, its rows
  let selected = null;
  let hovered = null;
  let loading = null;

  const scale = () => surface.width / (end - begin);
  const x = (when) => (when - begin) * scale();

  // --- what is asked for -------------------------------------------------------------------------------------------

  let timer = null;
  function load(now = false) {
    clearTimeout(timer);
    timer = setTimeout(fetchWindow, now ? 0 : 70);
  }

  function isEnough() {
    if (!data || data.text !== search.value) return false;
    const covered = data.begin <= Math.max(0, begin) && data.end >= Math.min(wall, end);
    return covered && data.end - data.begin < 4.5 * (end - begin);
  }

  async function fetchWindow() {
    if (isEnough() || !surface.width) return;
    loading?.abort();
    loading = new AbortController();
    const [text, size] = [search.value, end - begin];
    const [from, to] = [Math.max(0, begin - size / 2), Math.min(wall, end + size / 2)];
    const pixels = Math.round((surface.width * (to - from)) / size);
    try {
      const answer = await ask('timeline', {begin: from, end: to, pixels, text}, loading.signal);
      data = {...answer, text};
      arrange();
      say();
      surface.refresh();
      if (!isEnough()) load();
    } catch (error) {
      if (error.name !== 'AbortError') fail(error);
    }
  }

  function fail(error) {
    found.textContent = error.message;
  }

  function say() {
    previous.disabled = next.disabled = !data.found;
    if (data.found === null) found.textContent = '';
    else found.textContent = data.found ? `${count(data.found)} found, ${time(data.found_time)} in all` : 'nothing found';
  }

  function arrange() {
    let top = RULER;
    layout = data.lanes.map((lane) => {
      const place = {top, name: lane.name, rows: lane.rows};
      top += TITLE + lane.rows.length * ROW + GAP;
      return place;
    });
    spacer.style.height = `${Math.max(0, top - scroller.clientHeight)}px`;
  }

  // --- drawing -----------------------------------------------------------------------------------------------------

  function draw(context, width, height) {
    const [text, faint, line, card, accent] = ['--text', '--faint', '--line', '--card', '--accent'].map(style);
    const ink = style('--ink');
    context.clearRect(0, 0, width, height);
    context.textBaseline = 'middle';
    context.textAlign = 'left';
    const {values, step} = ticks(Math.max(0, begin), end, width / 130);
    context.fillStyle = line;
    for (const value of values) context.fillRect(Math.round(x(value)), RULER, 1, height);
    if (!data) return;

    const scrolled = scroller.scrollTop;
    const dimmed = data.found !== null;
    context.font = '11px system-ui, sans-serif';
    for (const lane of layout) {
      const top = lane.top - scrolled;
      if (top > height || top + TITLE + lane.rows.length * ROW < RULER) continue;
      context.globalAlpha = 1;
      context.fillStyle = card;
      context.fillRect(0, top, width, TITLE);
      context.fillStyle = faint;
      context.font = '600 11px system-ui, sans-serif';
      context.fillText(lane.name, 8, top + TITLE / 2);
      context.font = '11px system-ui, sans-serif';
      lane.rows.forEach((row, depth) => {
        const y = top + TITLE + depth * ROW;
        if (y > height || y + ROW < RULER) return;
        for (let i = 0; i < row.start.length; i++) {
          const left = x(row.start[i]);
          const full = row.width[i] * scale();
          if (left > width || left + full < 0) continue;
          const from = Math.max(left, -2);
          const wide = Math.max(1, Math.min(left + full, width + 2) - from - (full > 3 ? 1 : 0));
          const single = row.event[i] >= 0;
          const name = single ? data.names[row.name[i]] : '';
          const matches = row.found[i];
          context.globalAlpha = dimmed && !matches ? 0.22 : single ? 1 : 0.75;
          context.fillStyle = eventColour(name, data.categories[row.category[i]]);
          context.fillRect(from, y + 1, wide, ROW - 2);
          if (dimmed && matches && wide > 2) {
            context.strokeStyle = accent;
            context.lineWidth = 1.5;
            context.strokeRect(from + 0.75, y + 1.75, wide - 1.5, ROW - 3.5);
          }
          if (wide > 28) {
            const room = Math.floor((wide - 8) / LETTER);
            context.fillStyle = ink;
            const label = single ? name : `${count(row.count[i])} events`;
            context.fillText(fitting(label, room), Math.max(from, 0) + 5, y + ROW / 2 + 0.5);
          }
        }
      });
    }
    context.globalAlpha = 1;
    for (const [event, colour, thick] of [[hovered, faint, 1.5], [selected, text, 2]]) {
      const lane = event && layout[event.lane];
      if (!lane) continue;
      const y = lane.top - scrolled + TITLE + event.depth * ROW;
      context.strokeStyle = colour;
      context.lineWidth = thick;
      context.strokeRect(x(event.start), y + 1, Math.max(2, event.duration * scale() - 1), ROW - 2);
    }

    context.fillStyle = card;
    context.fillRect(0, 0, width, RULER);
    context.fillStyle = line;
    context.fillRect(0, RULER - 1, width, 1);
    context.fillStyle = faint;
    for (const value of values) {
      context.fillRect(Math.round(x(value)), RULER - 6, 1, 6);
      const label = tickTime(value, step, end);
      if (x(value) + 5 + context.measureText(label).width < width) context.fillText(label, x(value) + 5, RULER / 2);
    }
  }

  /** What is under the pointer: a rectangle with its lane and depth. */
  function hit(event) {
    if (!data || event.offsetY < RULER) return null;
    const y = event.offsetY + scroller.scrollTop;
    const lane = layout.findLastIndex(({top}) => top <= y);
    const depth = lane < 0 ? -1 : Math.floor((y - layout[lane].top - TITLE) / ROW);
    const row = layout[lane]?.rows[depth];
    if (!row) return null;
    const when = begin + event.offsetX / scale();
    const slack = 1.5 / scale();
    let best = -1;
    for (let i = 0; i < row.start.length && row.start[i] - slack <= when; i++) {
      if (when <= row.start[i] + Math.max(row.width[i], slack)) best = i;
    }
    if (best < 0) return null;
    return {
      lane, depth, start: row.start[best], duration: row.width[best], event: row.event[best], count: row.count[best],
      name: data.names[row.name[best]] ?? '', category: data.categories[row.category[best]],
    };
  }

  // --- moving ------------------------------------------------------------------------------------------------------

  function go(from, to) {
    const size = Math.min(Math.max(to - from, Math.min(NARROWEST, wall)), wall);
    const middle = (from + to) / 2;
    begin = Math.min(Math.max(middle - size / 2, 0), wall - size);
    end = begin + size;
    surface.refresh();
    load();
  }

  function zoom(factor, at = (begin + end) / 2) {
    const size = Math.min(Math.max((end - begin) * factor, Math.min(NARROWEST, wall)), wall);
    const part = (at - begin) / (end - begin);
    go(at - part * size, at + (1 - part) * size);
  }

  function reset() {
    scroller.scrollTop = 0;
    go(0, wall);
  }

  const pan = (part) => go(begin + part * (end - begin), end + part * (end - begin));

  canvas.addEventListener('wheel', (event) => {
    if (event.shiftKey) return; // scrolls
    event.preventDefault();
    tooltip.hide();
    if (Math.abs(event.deltaX) > Math.abs(event.deltaY)) pan(event.deltaX / surface.width);
    else zoom(Math.exp(Math.max(-240, Math.min(240, event.deltaY * (event.deltaMode ? 30 : 1))) * 0.0022), begin + event.offsetX / scale());
  }, {passive: false});

  let drag = null;
  canvas.addEventListener('pointerdown', (event) => {
    if (event.button) return;
    drag = {x: event.clientX, y: event.clientY, begin, end, top: scroller.scrollTop, moved: false};
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener('pointermove', (event) => {
    if (drag) {
      const [across, down] = [event.clientX - drag.x, event.clientY - drag.y];
      drag.moved ||= Math.hypot(across, down) > 4;
      if (!drag.moved) return;
      tooltip.hide();
      canvas.classList.add('dragging');
      const moved = (across / surface.width) * (drag.end - drag.begin);
      go(drag.begin - moved, drag.end - moved);
      scroller.scrollTop = drag.top - down;
    } else hover(event);
  });
  canvas.addEventListener('pointerup', (event) => {
    canvas.classList.remove('dragging');
    if (drag && !drag.moved) click(event);
    drag = null;
  });
  canvas.addEventListener('pointercancel', () => (drag = null));
  canvas.addEventListener('pointerleave', () => {
    hovered = null;
    tooltip.hide();
    surface.refresh();
  });
  canvas.addEventListener('dblclick', (event) => {
    const rectangle = hit(event);
    if (rectangle) go(rectangle.start - rectangle.duration * 0.1, rectangle.start + rectangle.duration * 1.1);
  });
  scroller.addEventListener('scroll', () => surface.refresh());

  const KEYS = {
    w: () => zoom(1 / 1.4), s: () => zoom(1.4), a: () => pan(-0.2), d: () => pan(0.2),
    ArrowLeft: () => pan(-0.2), ArrowRight: () => pan(0.2),
    ArrowUp: () => (scroller.scrollTop -= 60), ArrowDown: () => (scroller.scrollTop += 60),
    0: reset, Home: reset, '/': () => search.focus(), Escape: () => select(null),
    f: () => selected && go(selected.start - selected.duration, selected.start + 2 * selected.duration),
  };
  const onKey = (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches('input, select, button')) return;
    const action = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!action) return;
    event.preventDefault();
    action();
  };
  addEventListener('keydown', onKey);

  search.addEventListener('input', () => load());
  search.addEventListener('keydown', (event) => {
    if (event.key === 'Enter') jump(event.shiftKey);
    if (event.key === 'Escape') canvas.focus();
  });

  // --- one event ---------------------------------------------------------------------------------------------------

  let asking = null;
  function hover(event) {
    const rectangle = hit(event);
    const same = rectangle && hovered && rectangle.start === hovered.start && rectangle.lane === hovered.lane && rectangle.depth === hovered.depth;
    hovered = rectangle;
    canvas.classList.toggle('over', Boolean(rectangle));
    if (!rectangle) {
      clearTimeout(asking);
      tooltip.hide();
    } else if (same) {
      tooltip.show(event, ...tooltip.element.childNodes);
    } else {
      clearTimeout(asking);
      tooltip.show(event, ...describe(rectangle));
      if (rectangle.event >= 0) {
        asking = setTimeout(async () => {
          const known = await ask('event', {number: rectangle.event}).catch(() => null);
          if (known && hovered?.event === rectangle.event) tooltip.show(event, ...describe(rectangle, known));
        }, 120);
      }
    }
    surface.refresh();
  }

  function describe(rectangle, known) {
    if (rectangle.event < 0) {
      return [el('strong', {}, `${count(rectangle.count)} events`), el('div', {}, `within ${time(rectangle.duration)}: zoom in to see them`)];
    }
    const rows = [['takes', time(rectangle.duration)]];
    if (known) rows.push(['itself', time(known.self)]);
    if (known?.device) rows.push(['on the GPU', time(known.device)]);
    rows.push(['begins', time(rectangle.start)], ['category', rectangle.category]);
    if (known) rows.push(...Object.entries(known.arguments).slice(0, 6));
    return [el('strong', {}, rectangle.name), el('dl', {}, ...rows.flatMap(([name, value]) => [el('dt', {}, name), el('dd', {}, value)]))];
  }

  async function click(event) {
    canvas.focus({preventScroll: true});
    const rectangle = hit(event);
    if (!rectangle) select(null);
    else if (rectangle.event < 0) go(rectangle.start - rectangle.duration / 4, rectangle.start + rectangle.duration * 1.25);
    else await ask('event', {number: rectangle.event}).then(select, fail);
  }

  function select(event) {
    selected = event;
    details.hidden = !event;
    if (event) {
      const facts = [
        ['duration', time(event.duration)], ['self time', time(event.self)],
        ...(event.device ? [['GPU time', time(event.device)]] : []),
        ['begins at', time(event.start)], ['category', event.category], ['lane', layout[event.lane]?.name ?? ''],
        ...Object.entries(event.arguments),
      ];
      details.replaceChildren(
        el('div', {class: 'heading'}, el('h2', {}, event.name), button('Close', 'close (escape)', () => select(null))),
        event.around.length ? el('p', {class: 'hint'}, 'in ', event.around.map(short).join(' › ')) : '',
        el('dl', {}, ...facts.map(([name, value]) => el('div', {}, el('dt', {}, name), el('dd', {}, value)))));
    }
    surface.refresh();
  }

  /** Shows the next event, or the one before, that the search finds. */
  async function jump(backwards) {
    if (!search.value) return;
    const from = selected?.start ?? (backwards ? wall : -1);
    const event = await ask('find', {text: search.value, time: from, backwards: backwards ? '1' : '0'}).catch(fail);
    if (!event) return;
    const size = end - begin;
    if (event.duration < size / 100 || event.duration > size) {
      go(event.start - event.duration * 3, event.start + event.duration * 4);
    } else if (event.start < begin || event.start + event.duration > end) {
      const middle = event.start + event.duration / 2;
      go(middle - size / 2, middle + size / 2);
    }
    const top = layout[event.lane].top + TITLE + event.depth * ROW;
    if (top < scroller.scrollTop + RULER || top + ROW > scroller.scrollTop + scroller.clientHeight) {
      scroller.scrollTop = top - scroller.clientHeight / 2;
    }
    select(event);
  }

  const resized = new ResizeObserver(() => {
    if (data) arrange();
    load();
  });
  resized.observe(scroller);
  await fetchWindow();
  return () => {
    clearTimeout(timer);
    clearTimeout(asking);
    loading?.abort();
    resized.disconnect();
    surface.destroy();
    removeEventListener('keydown', onKey);
  };
}
