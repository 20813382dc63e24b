"""One image from its file to pixels: formats, bit depth, decoding."""
