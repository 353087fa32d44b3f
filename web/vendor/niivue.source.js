// What the page uses of NiiVue.
export { Niivue, NVImage } from "@niivue/niivue";
