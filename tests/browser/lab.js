// What the browser test asks of the page. Needs JupyterLab started with --LabApp.expose_app_in_browser=True.
window.lcnn = {
  said: [], // every error and every line of stderr that the kernel sends, wherever JupyterLab shows it, if at all
  run: null, // what became of "Run All Cells"
  timing: null,

  panel: () => window.jupyterapp?.shell.currentWidget,
  kernel: () => lcnn.panel()?.sessionContext?.session?.kernel,
  idle: () => lcnn.kernel()?.connectionStatus === 'connected' && lcnn.kernel().status === 'idle',

  // An exception in a widget's callback goes to no cell (JupyterLab hides it in its log console): hear it on the wire.
  listen() {
    lcnn.panel().sessionContext.iopubMessage.connect((_, { header, content }) => {
      if (header.msg_type === 'error') lcnn.said.push(`${content.ename}: ${content.evalue}`);
      if (header.msg_type === 'stream' && content.name === 'stderr') lcnn.said.push(`stderr: ${content.text}`);
    });
  },

  start() {
    lcnn.run = 'running';
    window.jupyterapp.commands
      .execute('notebook:run-all-cells')
      .then(() => (lcnn.run = 'ended'), (error) => (lcnn.run = `failed: ${error}`));
  },

  // How many code cells were run, of how many that hold any code.
  counts() {
    const cells = lcnn.panel().content.widgets.map((cell) => cell.model);
    const code = cells.filter((cell) => cell.type === 'code' && cell.sharedModel.getSource().trim());
    return [code.filter((cell) => cell.executionCount !== null).length, code.length];
  },

  // The images of the smallest box that holds the control and an image.
  images(control) {
    for (let box = control.parentElement; box && !box.matches('.jp-OutputArea-output'); box = box.parentElement) {
      const found = [...box.querySelectorAll('img.widget-image')];
      if (found.length) return found;
    }
    return [];
  },

  // What is painted in these images, as text to compare: a new src may well show the old picture. '' while loading.
  async pixels(images) {
    const sums = [];
    for (const image of images) {
      const source = image.src;
      if (image.lcnnSource !== source) {
        try {
          await image.decode();
        } catch {
          return ''; // replaced by the next one meanwhile
        }
        const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight);
        const context = canvas.getContext('2d');
        context.drawImage(image, 0, 0);
        const data = context.getImageData(0, 0, canvas.width, canvas.height).data;
        let sum = 2166136261; // FNV-1a over 32-bit words
        for (const word of new Uint32Array(data.buffer)) sum = Math.imul(sum ^ word, 16777619) >>> 0;
        if (image.src !== source) return '';
        Object.assign(image, { lcnnSource: source, lcnnSum: `${canvas.width}×${canvas.height}:${sum}` });
      }
      sums.push(image.lcnnSum);
    }
    return sums.join(' ');
  },

  // What the images show once it is other than `before`, or null after so many milliseconds.
  async other(images, before, ms) {
    for (const end = performance.now() + ms; performance.now() < end; ) {
      const now = await lcnn.pixels(images);
      if (now !== '' && now !== before) return now;
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
    return null;
  },

  slider(handle) {
    const { noUiSlider: api } = handle.closest('.noUi-target');
    const [place, values, { min, max }] = [Number(handle.dataset.handle ?? 0), [api.get(true)].flat(), api.options.range];
    // of two handles on one slider each ends at the other
    return { value: values[place], min: values[place - 1] ?? min, max: values[place + 1] ?? max };
  },

  label: (control) =>
    control.closest('.jupyter-widgets:has(> .widget-label)')?.querySelector('.widget-label')?.textContent.trim() ||
    control.textContent.trim() ||
    control.title,

  // From the next keydown on the control to the frame in which a new picture is on the screen: lcnn.timing.
  time(control, images) {
    const stop = new AbortController();
    let began = null;
    const heard = { signal: stop.signal };
    lcnn.timing = new Promise((resolve) => {
      const end = (ms) => (stop.abort(), clearTimeout(clock), resolve(ms));
      const clock = setTimeout(end, 10000, null);
      control.addEventListener('keydown', (event) => (began = event.timeStamp), { ...heard, capture: true });
      for (const image of images)
        image.addEventListener(
          'load',
          () => requestAnimationFrame(() => setTimeout(() => end(performance.now() - began))),
          heard,
        );
    });
  },
};
