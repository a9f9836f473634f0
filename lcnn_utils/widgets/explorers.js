// Screen readers: a slider says what it is and what it is at, as in "β = 2", and a picture the line of text below it.
// A slider over given values takes no typed ones.
if (!window.lcnnExplorers) {
  const set = (node, name, value) => node.getAttribute(name) === value || node.setAttribute(name, value);
  window.lcnnExplorers = new MutationObserver(() => {
    for (const box of document.querySelectorAll('.lcnn-explorer')) {
      for (const slider of box.querySelectorAll('.widget-slider')) {
        const [label, readout] = ['.widget-label', '.widget-readout'].map(part => slider.querySelector(part).textContent);
        if (slider.matches('.lcnn-choices')) slider.querySelector('.widget-readout').contentEditable = 'false';
        const handle = slider.querySelector('.noUi-handle');
        set(handle, 'aria-label', label);
        set(handle, 'aria-valuetext', `${label.split(':')[0]} = ${readout}`);
      }
      const text = box.querySelector('.widget-html-content');
      set(text, 'aria-live', 'polite');
      set(box.querySelector('.widget-image'), 'alt', text.textContent);
    }
    for (const figure of document.querySelectorAll('.jp-RenderedImage img:not([alt])')) {
      figure.alt = 'figure, read in the text below';
    }
  });
  const everything = {subtree: true, childList: true, characterData: true, attributeFilter: ['aria-valuetext']};
  window.lcnnExplorers.observe(document.body, everything);
}
