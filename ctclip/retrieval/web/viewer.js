// Two NiiVue canvases, the query and a case, that scroll together.
"use strict";

const WINDOWS = { lung: [-1350, 150], mediastinum: [-160, 240], bone: [-500, 1500] };
const PLANES = ["axial", "coronal", "sagittal"];

class Viewers {
  constructor(queryCanvas, caseCanvas) {
    this.canvas = { query: queryCanvas, case: caseCanvas };
    this.view = {};
    this.shown = {};
    this.window = "lung";
    this.plane = "axial";
  }

  async open(side) {
    if (this.view[side]) return this.view[side];
    const nv = new niivue.Niivue({
      backColor: [0, 0, 0, 1], crosshairWidth: 0.15, crosshairColor: [0.4, 0.7, 0.95, 0.5],
      isRadiologicalConvention: true, dragAndDropEnabled: false, loadingText: "", logLevel: "error",
      isOrientCube: false, isColorbar: false, show3Dcrosshair: false,
    });
    await nv.attachToCanvas(this.canvas[side]);
    this.view[side] = nv;
    this.applyPlane(nv);
    const { query, case: hit } = this.view;
    if (query && hit) {
      query.broadcastTo([hit], { "2d": true, "3d": false });
      hit.broadcastTo([query], { "2d": true, "3d": false });
    }
    return nv;
  }

  async show(side, url) {
    if (this.shown[side] === url) return;
    const nv = await this.open(side);
    const [low, high] = WINDOWS[this.window];
    const position = this.position();
    await nv.loadVolumes([{ url, colormap: "gray", cal_min: low, cal_max: high }]);
    this.shown[side] = url;
    if (position) {
      nv.scene.crosshairPos = position;
      nv.drawScene();
    }
  }

  // Fractions of the volume, or null while nothing is shown.
  position() {
    const nv = Object.values(this.view).find((view) => view.volumes.length > 0);
    return nv ? Array.from(nv.scene.crosshairPos) : null;
  }

  clear(side) {
    const nv = this.view[side];
    this.shown[side] = null;
    if (!nv) return;
    while (nv.volumes.length > 0) nv.removeVolume(nv.volumes[nv.volumes.length - 1]);
    nv.drawScene();
  }

  async heat(side, url) {
    const nv = this.view[side];
    if (!nv || nv.volumes.length === 0) return;
    while (nv.volumes.length > 1) nv.removeVolume(nv.volumes[nv.volumes.length - 1]);
    if (!url) return;
    await nv.addVolumeFromUrl({ url, colormap: "warm", opacity: 0.5, cal_min: 80, cal_max: 255 });
  }

  // Both views go to where a side's heat-map is hottest: its key slice for the finding.
  // NiiVue's own sync() does nothing while the focus is elsewhere, as it is here.
  goToHottest(side) {
    const nv = this.view[side];
    if (!nv || nv.volumes.length < 2) return;
    const { img, hdr: { dims } } = nv.volumes[1];
    const [, width, height, depth] = dims;
    const at = img.indexOf(img.reduce((most, value) => Math.max(most, value), 0));
    const [i, j, k] = [at % width, Math.floor(at / width) % height, Math.floor(at / (width * height))];
    // files run towards left, posterior and superior; NiiVue's fractions towards right, anterior, superior
    const hottest = [1 - (i + 0.5) / width, 1 - (j + 0.5) / height, (k + 0.5) / depth];
    for (const view of Object.values(this.view)) {
      view.scene.crosshairPos = [...hottest];
      view.drawScene();
    }
  }

  setWindow(name) {
    this.window = name;
    for (const nv of Object.values(this.view)) {
      if (nv.volumes.length === 0) continue;
      [nv.volumes[0].cal_min, nv.volumes[0].cal_max] = WINDOWS[name];
      nv.updateGLVolume();
    }
  }

  setPlane(name) {
    this.plane = name;
    for (const nv of Object.values(this.view)) this.applyPlane(nv);
  }

  applyPlane(nv) {
    nv.setSliceType([nv.sliceTypeAxial, nv.sliceTypeCoronal, nv.sliceTypeSagittal][PLANES.indexOf(this.plane)]);
  }

  scroll(steps) {
    const axis = { axial: 2, coronal: 1, sagittal: 0 }[this.plane];
    for (const nv of Object.values(this.view)) {
      if (nv.volumes.length === 0) continue;
      const move = [0, 0, 0];
      move[axis] = steps;
      nv.moveCrosshairInVox(...move);
    }
  }
}
