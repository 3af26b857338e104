// What the views share: elements, numbers as text, colours, and canvases that follow their size and the theme.

/** An element with properties and children; `class`, `aria-…`, `role` and the like are set as attributes. */
export function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (name.startsWith('on')) element.addEventListener(name.slice(2), value);
    else if (name === 'style') for (const [key, text] of Object.entries(value)) element.style.setProperty(key, text);
    else if (name in element && name !== 'list' && name !== 'role') element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

const trimmed = (value) => {
  const digits = value >= 100 ? 0 : value >= 10 ? 1 : 2;
  return value.toLocaleString('en', {minimumFractionDigits: digits, maximumFractionDigits: digits});
};

/** Microseconds as text in the unit that fits. */
export function time(microseconds) {
  const size = Math.abs(microseconds);
  if (size < 0.0005) return '0';
  if (size < 1) return `${Math.round(microseconds * 1e3)} ns`;
  if (size < 1e3) return `${trimmed(microseconds)} µs`;
  if (size < 1e6) return `${trimmed(microseconds / 1e3)} ms`;
  return `${trimmed(microseconds / 1e6)} s`;
}

export function bytes(count) {
  const size = Math.abs(count);
  if (size < 1e3) return `${count} B`;
  if (size < 1e6) return `${trimmed(count / 1e3)} kB`;
  if (size < 1e9) return `${trimmed(count / 1e6)} MB`;
  return `${trimmed(count / 1e9)} GB`;
}

export const count = (number) => number.toLocaleString('en');
export const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;

/** The name of an event without what makes those of C++ kernels long: the type, the template and the arguments. */
export function short(name) {
  if (!name.includes('<') && !name.startsWith('void ')) return name;
  return name.replace(/^void /, '').replace(/\(anonymous namespace\)::/g, '').replace(/[<(].*$/s, '') || name;
}

/** As much of the name of an event as there is room for, in letters: without its namespace sooner than cut off. */
export function fitting(name, room) {
  let label = short(name);
  if (label.length > room) label = label.replace(/^.*(?:::|: )(?=[^:\s])/, '');
  return label.length > room ? `${label.slice(0, Math.max(1, room - 1))}…` : label;
}

const SPANS = {data: [36, 88], forward: [213, 84], backward: [262, 78], optimizer: [160, 48]}; // hue, saturation
const MORE = [330, 188, 12, 88, 238, 300, 55];
const CATEGORIES = {
  cpu_op: 214, user_annotation: 265, gpu_user_annotation: 265, kernel: 148, gpu_memcpy: 178, gpu_memset: 60,
  cuda_runtime: 28, cuda_driver: 20, cuda_sync: 8, python_function: 320, overhead: 0,
};
const HUES = [300, 88, 55, 120, 238];
const hash = (text) => {
  let value = 0;
  for (let i = 0; i < text.length; i++) value = (31 * value + text.charCodeAt(i)) | 0;
  return value >>> 0;
};

export const isDark = () => document.documentElement.classList.contains('dark');
const colour = (hue, saturation, light, dark) =>
  isDark() ? `hsl(${hue} ${saturation * 0.62}% ${dark}%)` : `hsl(${hue} ${saturation}% ${light}%)`;

/** The strong colour of a span, the `place`-th of those shown. */
export function spanColour(name, place = 0) {
  if (name === 'other') return isDark() ? 'hsl(220 6% 46%)' : 'hsl(220 10% 72%)';
  const [hue, saturation] = SPANS[name] ?? [MORE[place % MORE.length], 66];
  return colour(hue, saturation, hue > 240 && hue < 290 ? 74 : 62, hue > 240 && hue < 290 ? 64 : 56);
}

/** The fill of an event's rectangle: its category, and a shade of its own for each name. */
export function eventColour(name, category) {
  const plain = name.replace(/^[# ]+|[# ]+$/g, '');
  if (category.endsWith('user_annotation')) {
    if (plain in SPANS) return colour(...SPANS[plain], 74, 44);
    if (plain.startsWith('ProfilerStep')) return isDark() ? 'hsl(220 9% 38%)' : 'hsl(220 16% 84%)';
  }
  const hue = CATEGORIES[category] ?? HUES[hash(category) % HUES.length];
  const shade = hash(name);
  return colour(hue + (shade % 37) - 18, 72, 74 + ((shade >> 6) % 11), 37 + ((shade >> 6) % 9));
}

export const categoryColour = (category) =>
  colour(CATEGORIES[category] ?? HUES[hash(category) % HUES.length], 70, 66, 52);

export const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** A canvas that fills its parent and is drawn anew, at most once a frame, when that or the theme changes. */
export class Surface {
  constructor(parent, label, draw) {
    this.canvas = el('canvas', {tabIndex: 0, role: 'img', 'aria-label': label});
    this.parent = parent;
    this.draw = draw;
    parent.append(this.canvas);
    this.observer = new ResizeObserver(() => this.resize());
    this.observer.observe(parent);
    this.themed = () => this.refresh();
    addEventListener('theme', this.themed);
    this.resize();
  }

  resize() {
    const ratio = devicePixelRatio || 1;
    this.width = this.parent.clientWidth;
    this.height = this.parent.clientHeight;
    this.canvas.width = Math.round(this.width * ratio);
    this.canvas.height = Math.round(this.height * ratio);
    this.canvas.style.width = `${this.width}px`;
    this.canvas.style.height = `${this.height}px`;
    this.context = this.canvas.getContext('2d');
    this.context.scale(ratio, ratio);
    this.refresh();
  }

  refresh() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      if (this.width && this.height) this.draw(this.context, this.width, this.height);
    });
  }

  destroy() {
    if (this.frame) cancelAnimationFrame(this.frame);
    this.observer.disconnect();
    removeEventListener('theme', this.themed);
  }
}

/** Round values for an axis from `begin` to `end`, about `wanted` of them. */
export function ticks(begin, end, wanted) {
  const rough = (end - begin) / Math.max(1, wanted);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const values = [];
  for (let value = Math.ceil(begin / step) * step; value <= end + step / 1e6; value += step) values.push(value);
  return {values, step};
}

/** The label of a tick: all in the unit of the largest, with the digits that tell neighbours apart. */
export function tickTime(value, step, largest) {
  const [unit, size] = [['s', 1e6], ['ms', 1e3], ['µs', 1], ['ns', 1e-3]].find(([, each]) => largest >= each) ?? ['ns', 1e-3];
  const digits = Math.min(6, Math.max(0, -Math.floor(Math.log10(step / size) + 1e-9)));
  return `${(value / size).toLocaleString('en', {minimumFractionDigits: digits, maximumFractionDigits: digits})} ${unit}`;
}

/** The label of a tick of bytes, with the digits that tell neighbours apart. */
export function tickBytes(value, step) {
  if (!value) return '0';
  const [unit, size] = [['GB', 1e9], ['MB', 1e6], ['kB', 1e3]].find(([, each]) => Math.abs(value) >= each) ?? ['B', 1];
  const digits = Math.max(0, -Math.floor(Math.log10(step / size) + 1e-9));
  return `${(value / size).toLocaleString('en', {minimumFractionDigits: digits, maximumFractionDigits: digits})} ${unit}`;
}

/** A box beside the pointer. */
export class Tooltip {
  constructor(parent) {
    this.element = el('div', {class: 'tooltip', hidden: true, role: 'tooltip'});
    parent.append(this.element);
  }

  show(event, ...content) {
    this.element.replaceChildren(...content);
    this.element.hidden = false;
    const {offsetWidth: width, offsetHeight: height} = this.element;
    const x = event.clientX + 16 + width > innerWidth ? event.clientX - width - 12 : event.clientX + 16;
    const y = event.clientY + 16 + height > innerHeight ? event.clientY - height - 12 : event.clientY + 16;
    this.element.style.left = `${Math.max(4, x)}px`;
    this.element.style.top = `${Math.max(4, y)}px`;
  }

  hide() {
    this.element.hidden = true;
  }
}
