// What was allocated when, a chart for each device.
import {bytes, count, el, style, Surface, tickBytes, ticks, tickTime, time, Tooltip} from './common.js';

const LEFT = 76;
const RIGHT = 20;
const TOP = 30;
const BOTTOM = 28;

export async function show(content, {ask, add}) {
  const answer = await ask('memory');
  add();
  if (!answer.curves.length) {
    content.append(el('div', {class: 'empty'}, el('h2', {}, 'No memory was recorded'),
      el('p', {}, 'Profile with ', el('code', {}, 'profile_memory=True'), '.')));
    return () => {};
  }
  const tooltip = new Tooltip(content);
  const surfaces = answer.curves.map((curve) => {
    const place = curve.peak.inside.filter((name) => !name.startsWith('ProfilerStep#'));
    const frame = el('div', {class: 'chart'});
    content.append(el('section', {class: 'card'},
      el('h2', {}, `Allocated on ${curve.device}`),
      el('p', {class: 'hint'}, 'Highest: ', el('strong', {}, bytes(curve.peak.bytes)), ` at ${time(curve.peak.time)}`,
        place.length ? ', in ' : '', ...place.flatMap((name, index) => [index ? ' › ' : '', el('code', {}, name)])),
      frame));
    return chart(frame, curve, answer, tooltip);
  });
  return () => surfaces.forEach((surface) => surface.destroy());
}

function chart(frame, curve, {wall, steps}, tooltip) {
  const {times, bytes: values, peak} = curve;
  const highest = Math.max(1, values.reduce((most, value) => Math.max(most, value), 0)) * 1.12;
  const lowest = Math.min(0, values.reduce((least, value) => Math.min(least, value), 0)) * 1.12;
  let pointer = null;
  const surface = new Surface(frame, `Bytes allocated on ${curve.device} over time; the highest is ${bytes(peak.bytes)}`, draw);

  const x = (when) => LEFT + (when / wall) * (surface.width - LEFT - RIGHT);
  const y = (value) => TOP + (1 - (value - lowest) / (highest - lowest)) * (surface.height - TOP - BOTTOM);

  /** The last record at or before a time; -1 before the first. */
  function at(when) {
    let first = 0;
    let last = times.length;
    while (first < last) {
      const middle = (first + last) >> 1;
      if (times[middle] <= when) first = middle + 1;
      else last = middle;
    }
    return first - 1;
  }

  function draw(context, width, height) {
    const [text, faint, line, accent, area, band] = ['--text', '--faint', '--line', '--accent', '--area', '--band'].map(style);
    context.clearRect(0, 0, width, height);
    context.font = '11px system-ui, sans-serif';
    context.textBaseline = 'middle';

    const room = steps.length && (width - LEFT - RIGHT) / steps.length > 44;
    steps.forEach((step, index) => {
      const [from, to] = [x(step.start), x(step.end)];
      if (index % 2 === 0) {
        context.fillStyle = band;
        context.fillRect(from, TOP, to - from, height - TOP - BOTTOM);
      }
      if (room) {
        context.fillStyle = faint;
        context.textAlign = 'center';
        context.fillText(step.name, (from + to) / 2, TOP - 12);
      }
    });

    const vertical = ticks(lowest, highest, (height - TOP - BOTTOM) / 56);
    context.textAlign = 'right';
    for (const value of vertical.values) {
      context.fillStyle = line;
      context.fillRect(LEFT, Math.round(y(value)), width - LEFT - RIGHT, 1);
      context.fillStyle = faint;
      context.fillText(tickBytes(value, vertical.step), LEFT - 10, y(value));
    }
    const horizontal = ticks(0, wall, (width - LEFT - RIGHT) / 120);
    context.textAlign = 'center';
    for (const value of horizontal.values) {
      context.fillStyle = faint;
      context.fillText(tickTime(value, horizontal.step, wall), x(value), height - BOTTOM + 14);
    }

    context.beginPath();
    context.moveTo(x(times[0]), y(values[0]));
    for (let i = 1; i < times.length; i++) {
      context.lineTo(x(times[i]), y(values[i - 1]));
      context.lineTo(x(times[i]), y(values[i]));
    }
    context.lineTo(x(wall), y(values.at(-1)));
    context.strokeStyle = accent;
    context.lineWidth = 1.5;
    context.lineJoin = 'round';
    context.stroke();
    context.lineTo(x(wall), y(Math.max(0, lowest)));
    context.lineTo(x(times[0]), y(Math.max(0, lowest)));
    context.closePath();
    context.fillStyle = area;
    context.fill();

    const [peakX, peakY] = [x(peak.time), y(peak.bytes)];
    context.beginPath();
    context.arc(peakX, peakY, 4.5, 0, 2 * Math.PI);
    context.fillStyle = style('--warm');
    context.fill();
    context.strokeStyle = style('--card');
    context.stroke();
    context.fillStyle = text;
    context.font = '600 12px system-ui, sans-serif';
    const label = `peak ${bytes(peak.bytes)}`;
    const toLeft = peakX + 12 + context.measureText(label).width > width - RIGHT;
    context.textAlign = toLeft ? 'right' : 'left';
    context.fillText(label, peakX + (toLeft ? -10 : 10), peakY - 6);

    if (pointer !== null) {
      const index = at(pointer);
      context.fillStyle = faint;
      context.fillRect(Math.round(x(pointer)), TOP, 1, height - TOP - BOTTOM);
      if (index >= 0) {
        context.beginPath();
        context.arc(x(pointer), y(values[index]), 4, 0, 2 * Math.PI);
        context.fillStyle = accent;
        context.fill();
      }
    }
  }

  const hover = (event) => {
    const inner = surface.width - LEFT - RIGHT;
    const when = ((event.offsetX - LEFT) / inner) * wall;
    pointer = when >= 0 && when <= wall ? when : null;
    if (pointer === null) tooltip.hide();
    else {
      const index = at(when);
      const step = steps.find(({start, end}) => start <= when && when <= end);
      tooltip.show(event, el('strong', {}, index < 0 ? 'nothing recorded yet' : bytes(values[index])),
        el('div', {}, `at ${time(when)}${step ? `, ${step.name}` : ''}`));
    }
    surface.refresh();
  };
  surface.canvas.addEventListener('pointermove', hover);
  surface.canvas.addEventListener('pointerleave', () => {
    pointer = null;
    tooltip.hide();
    surface.refresh();
  });
  frame.dataset.points = count(times.length);
  return surface;
}
