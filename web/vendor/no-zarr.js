// Stands in for zarrita: the page opens no Zarr store, and its WebAssembly codecs are 2 MB.
export {};
